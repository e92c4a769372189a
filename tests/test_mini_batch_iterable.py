from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import sparse

from devices import cuda, in_every_form, on_every_device
from stores import DTYPES, expected_X, make_obs
from tiledbsoma_ml._common import MiniBatch
from tiledbsoma_ml._csr import CSR_IO_Buffer
from tiledbsoma_ml._io_batch_iterable import IOBatch
from tiledbsoma_ml._mini_batch_iterable import MiniBatchIterable

N_VARS = 11
COLUMNS = ["soma_joinid", "cell_type", "stage", "n_genes"]


def as_io_batches(sizes: list[int], dtype: Any = np.float32) -> list[IOBatch]:
    """Return rows 0, 1, … of `expected_X` as IO batches, the entries of every row from right to left."""
    io_batches = []
    for start, stop in zip(np.cumsum([0, *sizes]), np.cumsum(sizes), strict=False):
        joinids = np.arange(start, stop)
        i, j = (axis[::-1] for axis in expected_X(joinids, range(N_VARS)).nonzero())
        values = expected_X(joinids, range(N_VARS), dtype)[i, j]
        matrix = CSR_IO_Buffer.from_ijd(
            i.astype(np.uint32), j.astype(np.uint16), values, (len(joinids), N_VARS)
        )
        io_batches.append((matrix, make_obs(joinids)[COLUMNS]))
    return io_batches


def as_numpy(X: Any) -> np.ndarray:
    """Return any kind of `X` as a dense array; torch itself does not make every sparse type dense."""
    if isinstance(X, np.ndarray):
        return X
    if isinstance(X, sparse.csr_matrix):
        return X.toarray()
    if X.layout is torch.strided:
        return X.cpu().numpy()
    parts = (part.cpu().numpy() for part in (X.values(), X.col_indices(), X.crow_indices()))
    return sparse.csr_matrix(tuple(parts), shape=X.shape).toarray()


def ids_in(mini_batches: Iterable[MiniBatch]) -> list[list[int]]:
    """Return the joinids of mini-batches, having checked that each row of X and obs is its own."""
    ids = []
    for X, obs in mini_batches:
        ids.append(obs["soma_joinid"].tolist())
        np.testing.assert_array_equal(as_numpy(X).reshape(len(obs), -1), expected_X(ids[-1], range(N_VARS)))
        pd.testing.assert_frame_equal(obs, make_obs(np.array(ids[-1]))[COLUMNS])
    return ids


def cut(ids: Any, batch_size: int) -> list[list[int]]:
    return [list(map(int, ids[start : start + batch_size])) for start in range(0, len(ids), batch_size)]


io_batch_sizes = st.lists(st.integers(0, 14), max_size=6)


# Rows -----------------------------------------------------------------------------------------------------


@on_every_device
@given(sizes=io_batch_sizes, batch_size=st.integers(1, 20))
@example(sizes=[3, 2, 0, 4], batch_size=1000)
@example(sizes=[1, 1, 1, 1, 1], batch_size=4)
@example(sizes=[12, 12], batch_size=3)
@example(sizes=[], batch_size=3)
@settings(max_examples=10)
def test_dense_sparse_and_on_a_device_read_ahead_or_not_are_the_same_rows_in_order(
    device: str, sizes: list[int], batch_size: int
) -> None:
    expected = cut(range(sum(sizes)), batch_size)
    for where in (None, torch.device(device)):
        for sparse_X in (False, True):
            for eager in (False, True):
                options = {"return_sparse_X": sparse_X, "device": where, "use_eager_fetch": eager}
                assert ids_in(MiniBatchIterable(as_io_batches(sizes), batch_size, **options)) == expected


@in_every_form
@pytest.mark.parametrize("device", [None, "cpu", cuda])
@given(sizes=io_batch_sizes, batch_size=st.integers(1, 20))
@settings(max_examples=10)
def test_every_mini_batch_is_full_but_the_last_and_none_is_empty(
    device: str | None, sparse_X: bool, sizes: list[int], batch_size: int
) -> None:
    mini_batches = list(
        MiniBatchIterable(as_io_batches(sizes), batch_size, return_sparse_X=sparse_X, device=device)
    )
    n_full, rest = divmod(sum(sizes), batch_size)
    assert [len(obs) for _, obs in mini_batches] == [batch_size] * n_full + [rest] * (rest > 0)
    if batch_size > 1:
        assert [X.shape[0] for X, _ in mini_batches] == [len(obs) for _, obs in mini_batches]


@in_every_form
@pytest.mark.parametrize("device", [None, "cpu", cuda])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_keep_their_dtype(device: str | None, sparse_X: bool, dtype: Any) -> None:
    mini_batches = MiniBatchIterable(as_io_batches([3, 4], dtype), 5, return_sparse_X=sparse_X, device=device)
    arrays = [as_numpy(X) for X, _ in mini_batches]
    assert {array.dtype for array in arrays} == {np.dtype(dtype)}
    np.testing.assert_array_equal(np.concatenate(arrays), expected_X(range(7), range(N_VARS), dtype))


@pytest.mark.parametrize("device", [None, "cpu", cuda])
def test_one_row_is_a_vector_where_dense_and_a_matrix_where_sparse(device: str | None) -> None:
    for sparse_X, shape in ((False, (N_VARS,)), (True, (1, N_VARS))):
        io_batches = as_io_batches([2, 1])
        mini_batches = list(MiniBatchIterable(io_batches, 1, return_sparse_X=sparse_X, device=device))
        assert [tuple(X.shape) for X, _ in mini_batches] == [shape] * 3
        assert [len(obs) for _, obs in mini_batches] == [1] * 3


@pytest.mark.parametrize("device", [None, "cpu", cuda])
def test_a_last_mini_batch_of_one_row_is_a_matrix(device: str | None) -> None:
    *_, (X, _) = MiniBatchIterable(as_io_batches([5]), 4, device=device)
    assert tuple(X.shape) == (1, N_VARS)


def test_a_mini_batch_on_the_cpu_is_an_array_or_a_canonical_csr_matrix() -> None:
    X, _ = next(iter(MiniBatchIterable(as_io_batches([5, 5]), 8)))
    assert type(X) is np.ndarray
    X, _ = next(iter(MiniBatchIterable(as_io_batches([5, 5]), 8, return_sparse_X=True)))
    assert type(X) is sparse.csr_matrix
    assert X.has_canonical_format


@on_every_device
def test_a_mini_batch_on_a_device_is_a_tensor_there_dense_or_compressed_by_rows(device: str) -> None:
    for sparse_X, layout in ((False, torch.strided), (True, torch.sparse_csr)):
        io_batches = as_io_batches([5, 5])
        X, _ = next(iter(MiniBatchIterable(io_batches, 8, return_sparse_X=sparse_X, device=device)))
        assert isinstance(X, torch.Tensor)
        assert (X.device.type, X.layout) == (device, layout)


# obs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu_shuffle_mode", [None, "iobatch", "minibatch"])
def test_the_index_of_obs_starts_anew_in_every_mini_batch(gpu_shuffle_mode: str | None) -> None:
    shuffle = {"gpu_shuffle": True, "gpu_shuffle_mode": gpu_shuffle_mode, "device": "cpu"}
    mini_batches = list(MiniBatchIterable(as_io_batches([5, 7]), 4, **(shuffle if gpu_shuffle_mode else {})))
    assert len(mini_batches) == 3
    for _, obs in mini_batches:
        assert isinstance(obs.index, pd.RangeIndex)
        assert (obs.index.start, obs.index.stop, obs.index.step) == (0, 4, 1)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_categoricals_keep_all_categories_and_their_order_across_io_batches(batch_size: int) -> None:
    mini_batches = list(MiniBatchIterable(as_io_batches([1, 2, 1, 3]), batch_size))
    for _, obs in mini_batches:
        assert obs["cell_type"].cat.categories.tolist() == ["B cell", "T cell", "NK cell", "unseen"]
        assert not obs["cell_type"].cat.ordered
        assert obs["stage"].cat.categories.tolist() == ["young", "old"]
        assert obs["stage"].cat.ordered
    values = pd.concat([obs["cell_type"] for _, obs in mini_batches], ignore_index=True)
    assert values.tolist() == make_obs(np.arange(7))["cell_type"].tolist()


# Shuffling on the device ----------------------------------------------------------------------------------


shuffles = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 99),
        "epoch": st.integers(0, 3),
        "return_sparse_X": st.booleans(),
        "use_eager_fetch": st.booleans(),
    }
)


def shuffled(
    mode: str, device: str, sizes: list[int], batch_size: int, shuffle: dict[str, Any]
) -> tuple[list[list[int]], np.random.Generator]:
    """Return the joinids of mini-batches that a device shuffled, and the generator that it had."""
    mini_batches = MiniBatchIterable(
        as_io_batches(sizes),
        batch_size,
        gpu_shuffle=True,
        gpu_shuffle_mode=mode,
        device=torch.device(device),
        **shuffle,
    )
    return ids_in(mini_batches), np.random.default_rng([shuffle["seed"], shuffle["epoch"]])


@on_every_device
@given(sizes=io_batch_sizes, batch_size=st.integers(1, 20), shuffle=shuffles)
@settings(max_examples=20)
def test_mode_iobatch_permutes_the_rows_of_each_io_batch_by_the_next_draw(
    device: str, sizes: list[int], batch_size: int, shuffle: dict[str, Any]
) -> None:
    found, rng = shuffled("iobatch", device, sizes, batch_size, shuffle)
    borders = np.cumsum([0, *sizes])
    ids = [start + rng.permutation(size) for start, size in zip(borders, sizes, strict=False)]
    assert found == cut(np.concatenate([np.empty(0), *ids]), batch_size)


@on_every_device
@given(sizes=io_batch_sizes, batch_size=st.integers(1, 20), shuffle=shuffles)
@settings(max_examples=20)
def test_mode_minibatch_cuts_in_order_and_then_permutes_each_mini_batch_by_the_next_draw(
    device: str, sizes: list[int], batch_size: int, shuffle: dict[str, Any]
) -> None:
    found, rng = shuffled("minibatch", device, sizes, batch_size, shuffle)
    in_order = cut(range(sum(sizes)), batch_size)
    assert found == [np.array(ids)[rng.permutation(len(ids))].tolist() for ids in in_order]


def test_iobatch_is_the_mode_if_none_is_named() -> None:
    options = {"gpu_shuffle": True, "device": "cpu", "seed": 3}
    named = MiniBatchIterable(as_io_batches([9, 9]), 4, **options, gpu_shuffle_mode="iobatch")
    assert ids_in(MiniBatchIterable(as_io_batches([9, 9]), 4, **options)) == ids_in(named)


def test_without_a_seed_rows_are_shuffled_differently_every_time() -> None:
    options = {"gpu_shuffle": True, "device": "cpu"}
    one, other = (np.concatenate(ids_in(MiniBatchIterable(as_io_batches([90]), 40, **options))) for _ in "ab")
    assert sorted(one) == sorted(other) == list(range(90))
    assert one.tolist() != other.tolist()


@pytest.mark.parametrize("mode", ["cpu", "io_batch", "", None])
def test_an_unknown_gpu_shuffle_mode_is_refused(mode: Any) -> None:
    with pytest.raises(ValueError, match=r"gpu_shuffle_mode.*'iobatch'.*'minibatch'"):
        MiniBatchIterable([], 4, gpu_shuffle=True, gpu_shuffle_mode=mode, device=torch.device("cpu"))


@pytest.mark.parametrize(("batch_size", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError)])
def test_a_batch_size_that_is_not_a_positive_integer_is_refused(
    batch_size: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match=f"batch_size={batch_size} must be a positive integer.*; try 128"):
        MiniBatchIterable([], batch_size)


@pytest.mark.parametrize("name", ["use_eager_fetch", "return_sparse_X", "gpu_shuffle"])
def test_an_option_that_is_true_or_false_refuses_what_is_neither(name: str) -> None:
    options: dict[str, Any] = {name: "no"}
    with pytest.raises(TypeError, match=f"{name}='no' must be True or False"):
        MiniBatchIterable([], 8, **options)


def test_shuffling_on_a_device_without_a_device_is_refused() -> None:
    with pytest.raises(ValueError, match=r"device=None .* gpu_shuffle=True; try device='cuda' or 'cpu'"):
        MiniBatchIterable([], 4, gpu_shuffle=True)


# Who owns the memory --------------------------------------------------------------------------------------


def overwrite(X: Any, obs: pd.DataFrame) -> None:
    values = X.data if sparse.issparse(X) else X.values() if as_torch_csr(X) else X
    values[...] = 99
    obs["n_genes"] = -1
    obs["cell_type"] = obs["cell_type"].cat.rename_categories(str.upper)


def as_torch_csr(X: Any) -> bool:
    return isinstance(X, torch.Tensor) and X.layout is torch.sparse_csr


@in_every_form
@pytest.mark.parametrize("device", [None, "cpu", cuda])
@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_changing_a_mini_batch_changes_no_other(device: str | None, sparse_X: bool, batch_size: int) -> None:
    mini_batches = list(
        MiniBatchIterable(as_io_batches([9, 9, 9]), batch_size, return_sparse_X=sparse_X, device=device)
    )
    for X, obs in mini_batches[1::2]:
        overwrite(X, obs)
    assert ids_in(mini_batches[::2]) == cut(range(27), batch_size)[::2]


@in_every_form
@pytest.mark.parametrize("device", [None, "cpu", cuda])
@pytest.mark.parametrize("eager", [False, True])
def test_changing_each_mini_batch_while_it_is_used_changes_none_that_follows(
    device: str | None, sparse_X: bool, eager: bool
) -> None:
    mini_batches = MiniBatchIterable(
        as_io_batches([9, 9, 9]), 4, use_eager_fetch=eager, return_sparse_X=sparse_X, device=device
    )
    ids = []
    for mini_batch in mini_batches:
        ids += ids_in([mini_batch])
        overwrite(*mini_batch)
    assert ids == cut(range(27), 4)


@pytest.mark.parametrize("sparse_X", [False, True], ids=["dense", "sparse"])
def test_making_mini_batches_leaves_io_batches_fit_to_be_used_again(sparse_X: bool) -> None:
    io_batches = as_io_batches([9, 9])
    again = [ids_in(MiniBatchIterable(io_batches, 4, return_sparse_X=sparse_X)) for _ in range(2)]
    assert again == [cut(range(18), 4)] * 2


# Threads and errors ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_thread_left")
@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("eager", [False, True])
def test_an_error_of_the_io_batches_surfaces_after_the_full_mini_batches_with_its_cause(
    eager: bool, device: str | None
) -> None:
    def io_batches() -> Iterator[IOBatch]:
        yield from as_io_batches([9])
        raise OSError("unreadable") from KeyError("the cause")

    mini_batches = iter(MiniBatchIterable(io_batches(), 4, use_eager_fetch=eager, device=device))
    assert ids_in([next(mini_batches), next(mini_batches)]) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(OSError, match="unreadable") as caught:
        next(mini_batches)
    assert isinstance(caught.value.__cause__, KeyError)
    assert list(mini_batches) == []


@pytest.mark.usefixtures("no_thread_left")
@pytest.mark.parametrize("device", [None, "cpu"])
def test_leaving_midway_ends_the_thread(device: str | None) -> None:
    mini_batches = iter(MiniBatchIterable(as_io_batches([9, 9]), 4, device=device))
    next(mini_batches)
    mini_batches.close()
    assert list(mini_batches) == []


def test_no_io_batch_is_asked_for_before_the_first_mini_batch() -> None:
    n_asked_for = 0

    def io_batches() -> Iterator[IOBatch]:
        nonlocal n_asked_for
        for io_batch in as_io_batches([9, 9]):
            n_asked_for += 1
            yield io_batch

    mini_batches = iter(MiniBatchIterable(io_batches(), 4, use_eager_fetch=False))
    assert n_asked_for == 0
    next(mini_batches)
    assert n_asked_for == 1
