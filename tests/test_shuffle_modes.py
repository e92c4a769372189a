from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import sparse

from devices import in_every_form, on_every_device
from stores import N_OBS, N_VARS, Store, expected_X, joinids_of, workers
from tiledbsoma_ml import ShuffleMode, experiment_dataloader
from tiledbsoma_ml._common import MiniBatch
from tiledbsoma_ml.dataloader import _by_worker, _in_turn

SIZES = {"batch_size": 20, "shuffle_chunk_size": 8, "io_batch_size": 48}


def ids_in(mini_batches: Iterable[MiniBatch]) -> list[list[int]]:
    """Return the joinids of each mini-batch, having checked that each row of X is its own."""
    return [
        joinids_of([(X.cpu() if isinstance(X, torch.Tensor) else X, obs)]).tolist() for X, obs in mini_batches
    ]


def epochs_of(source: Iterable[MiniBatch], n_epochs: int) -> list[list[list[int]]]:
    return [ids_in(source) for _ in range(n_epochs)]


# The device changes where the work is done, not the order -------------------------------------------------


@in_every_form
@on_every_device
def test_the_cpu_and_both_ways_over_a_device_yield_the_same_mini_batches_in_every_epoch(
    store: Store, device: str, sparse_X: bool
) -> None:
    options = {**SIZES, "seed": 3, "return_sparse_X": sparse_X}
    on_cpu = epochs_of(store.dataset(**options), 3)
    put_on_device = store.dataset(**options, device=device)
    shuffled_on_device = store.dataset(**options, shuffle_mode=ShuffleMode.GPU_IOBATCH, device=device)
    assert epochs_of(put_on_device, 3) == on_cpu
    assert epochs_of(shuffled_on_device, 3) == on_cpu
    assert len({str(epoch) for epoch in on_cpu}) == 3


@on_every_device
@given(
    n_rows=st.integers(0, 120),
    batch_size=st.integers(1, 50),
    chunk_size=st.integers(1, 10),
    chunks_in_io_batch=st.integers(1, 6),
    seed=st.integers(0, 99),
    epoch=st.integers(0, 3),
    eager=st.booleans(),
)
@settings(max_examples=20)
def test_gpu_iobatch_equals_cpu_for_every_size(
    store: Store,
    device: str,
    n_rows: int,
    batch_size: int,
    chunk_size: int,
    chunks_in_io_batch: int,
    seed: int,
    epoch: int,
    eager: bool,
) -> None:
    options = {
        "batch_size": batch_size,
        "shuffle_chunk_size": chunk_size,
        "io_batch_size": chunk_size * chunks_in_io_batch,
        "seed": seed,
        "use_eager_fetch": eager,
    }
    on_cpu = store.dataset(range(n_rows), **options)
    on_device = store.dataset(range(n_rows), **options, shuffle_mode="gpu_iobatch", device=device)
    for dataset in (on_cpu, on_device):
        dataset.set_epoch(epoch)
    assert ids_in(on_device) == ids_in(on_cpu)


def test_set_epoch_chooses_the_order_on_a_device_as_well(store: Store) -> None:
    dataset = store.dataset(**SIZES, seed=3, shuffle_mode="gpu", device="cpu")
    epochs = epochs_of(dataset, 3)
    dataset.set_epoch(1)
    assert epochs_of(dataset, 2) == epochs[1:]


def test_an_unshuffled_query_stays_in_order_on_a_device(store: Store) -> None:
    for mode in ShuffleMode:
        dataset = store.dataset(range(50), **SIZES, shuffle=False, shuffle_mode=mode, device="cpu")
        assert np.concatenate(ids_in(dataset)).tolist() == list(range(50))


def test_obs_columns_stay_with_their_rows_on_a_device(store: Store) -> None:
    options = {**SIZES, "seed": 3, "obs_column_names": ["barcode", "cell_type", "soma_joinid"]}
    for mode in (ShuffleMode.GPU_IOBATCH, ShuffleMode.GPU_MINIBATCH):
        for _, obs in store.dataset(**options, shuffle_mode=mode, device="cpu"):
            assert obs["barcode"].tolist() == [f"cell-{i}" for i in obs["soma_joinid"]]
            assert obs["cell_type"].cat.codes.tolist() == [i % 3 for i in obs["soma_joinid"]]


# Each mini-batch on its own -------------------------------------------------------------------------------


@in_every_form
@on_every_device
def test_gpu_minibatch_shuffles_the_query_in_order_within_each_mini_batch(
    store: Store, device: str, sparse_X: bool
) -> None:
    rows = np.arange(N_OBS)[::-1]
    dataset = store.dataset(
        rows, **SIZES, seed=3, return_sparse_X=sparse_X, shuffle_mode="gpu_minibatch", device=device
    )
    epochs = epochs_of(dataset, 3)
    in_order = [rows[start : start + 20].tolist() for start in range(0, N_OBS, 20)]
    for epoch in epochs:
        assert [sorted(ids, reverse=True) for ids in epoch] == in_order
        assert all(ids != expected for ids, expected in zip(epoch, in_order, strict=True))
    for first, second in zip(epochs[0], epochs[1], strict=True):
        assert first != second


def test_gpu_minibatch_does_not_ask_for_whole_chunks_in_an_io_batch(store: Store) -> None:
    dataset = store.dataset(
        range(30), batch_size=7, io_batch_size=10, shuffle_mode="gpu_minibatch", device="cpu"
    )
    assert sorted(ids_in(dataset)[0]) == list(range(7))


# What X is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int64, np.float32, np.float64])
@on_every_device
def test_x_is_a_tensor_on_the_device_with_the_values_and_the_dtype_of_the_layer(
    make_store: Callable[..., Store], device: str, dtype: Any
) -> None:
    typed = make_store(dtype=dtype, obs_joinids=range(30))
    torch_type = torch.from_numpy(np.empty(0, dtype)).dtype
    for mode in ShuffleMode:
        for sparse_X, layout in ((False, torch.strided), (True, torch.sparse_csr)):
            dataset = typed.dataset(
                range(30), batch_size=16, return_sparse_X=sparse_X, shuffle_mode=mode, device=device
            )
            for X, obs in dataset:
                assert isinstance(X, torch.Tensor)
                assert (X.device.type, X.layout, X.dtype) == (device, layout, torch_type)
                assert tuple(X.shape) == (len(obs), N_VARS)
                np.testing.assert_array_equal(
                    as_numpy(X), expected_X(obs["soma_joinid"], range(N_VARS), dtype)
                )


def as_numpy(X: torch.Tensor) -> np.ndarray:
    """Return a tensor as a dense array; torch itself does not make every sparse type dense."""
    if X.layout is torch.strided:
        return X.cpu().numpy()
    parts = (part.cpu().numpy() for part in (X.values(), X.col_indices(), X.crow_indices()))
    return sparse.csr_matrix(tuple(parts), shape=X.shape).toarray()


@on_every_device
def test_one_row_on_a_device_is_a_vector_where_dense(store: Store, device: str) -> None:
    for sparse_X, shape in ((False, (N_VARS,)), (True, (1, N_VARS))):
        dataset = store.dataset(
            range(4), batch_size=1, return_sparse_X=sparse_X, shuffle_mode="gpu", device=device
        )
        assert [tuple(X.shape) for X, _ in dataset] == [shape] * 4


def test_without_a_device_x_is_no_tensor(store: Store) -> None:
    X, _ = next(iter(store.dataset(**SIZES, shuffle_mode=ShuffleMode.CPU)))
    assert isinstance(X, np.ndarray)


# Workers --------------------------------------------------------------------------------------------------

# 101 rows for 2 workers: 51 in 3 IO batches and 6 mini-batches, and 50 in 2 and 5.
UNEVEN = {"batch_size": 10, "shuffle_chunk_size": 5, "io_batch_size": 25, "seed": 3}


def test_device_work_for_uneven_workers_yields_what_a_plain_dataloader_of_the_cpu_mode_yields(
    store: Store,
) -> None:
    on_cpu = store.dataset(range(101), **UNEVEN, return_sparse_X=True)
    on_device = store.dataset(
        range(101), **UNEVEN, return_sparse_X=True, shuffle_mode="gpu_iobatch", device="cpu"
    )
    expected = epochs_of(experiment_dataloader(on_cpu, **workers(2)), 2)
    loader = experiment_dataloader(on_device, **workers(2))
    assert epochs_of(loader, 2) == expected
    assert expected[0] != expected[1]
    assert [len(ids) for ids in expected[0]] == [10] * 10 + [1]
    assert len(loader) == 11


def test_gpu_minibatch_with_workers_shuffles_each_workers_part_in_order_also_after_an_epoch_left_early(
    store: Store,
) -> None:
    dataset = store.dataset(range(101), **UNEVEN, shuffle_mode="gpu_minibatch", device="cpu")
    loader = experiment_dataloader(dataset, **workers(2))
    parts = [list(range(51)), list(range(51, 101))]
    cuts = [[part[start : start + 10] for start in range(0, len(part), 10)] for part in parts]
    in_turn = [ids for pair in zip(*cuts, strict=False) for ids in pair] + cuts[0][5:]

    left_early = ids_in([next(iter(loader))])[0]
    epochs = epochs_of(loader, 2)

    assert sorted(left_early) == in_turn[0]
    for epoch in epochs:
        assert [sorted(ids) for ids in epoch] == in_turn
    assert len({str(ids) for ids in (left_early, epochs[0][0], epochs[1][0])}) == 3
    assert dataset.epoch == 2


@given(sizes=st.lists(st.lists(st.integers(1, 9), max_size=4), min_size=1, max_size=4), data=st.data())
@example(sizes=[[], [9, 1], []], data=None)
@settings(max_examples=60)
def test_workers_are_passed_over_when_they_end_in_whatever_order_their_io_batches_arrive(
    sizes: list[list[int]], data: st.DataObject | None
) -> None:
    senders = [worker for worker, of_worker in enumerate(sizes) for _ in of_worker]
    if data is not None:
        senders = data.draw(st.permutations(senders))
    unsent = [
        iter([(worker, number, size) for number, size in enumerate(s)]) for worker, s in enumerate(sizes)
    ]

    received = _by_worker(((sender, next(unsent[sender])) for sender in senders), len(sizes))
    yielded = list(_in_turn(split(io_batches) for io_batches in received))

    mini_batches = [list(split((w, k, n) for k, n in enumerate(of))) for w, of in enumerate(sizes)]
    n_turns = max(map(len, mini_batches))
    assert yielded == [own[turn] for turn in range(n_turns) for own in mini_batches if turn < len(own)]


def split(io_batches: Iterable[tuple[int, int, int]]) -> Iterator[tuple[int, int, int]]:
    """Stand in for mini-batches: cut each IO batch of `n` rows into pieces of at most 4."""
    for worker, number, n_rows in io_batches:
        for start in range(0, n_rows, 4):
            yield worker, number, start


def test_a_device_in_a_worker_of_a_plain_dataloader_is_refused_naming_the_way_out(store: Store) -> None:
    dataset = store.dataset(range(20), shuffle_mode="gpu", device="cpu")
    worker = mock.Mock(id=0, num_workers=2)
    with (
        mock.patch.object(torch.utils.data, "get_worker_info", return_value=worker),
        pytest.raises(RuntimeError, match=r"device='cpu' with workers .* `experiment_dataloader`"),
    ):
        next(iter(dataset))


def test_a_device_under_a_plain_dataloader_without_workers_is_fine(store: Store) -> None:
    options = {**SIZES, "seed": 3, "shuffle_mode": "gpu", "device": "cpu"}
    plain = torch.utils.data.DataLoader(
        store.dataset(**options), batch_size=None, collate_fn=lambda item: item
    )
    assert ids_in(plain) == ids_in(store.dataset(**options))


# Names and refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "mode"),
    [
        ("cpu", ShuffleMode.CPU),
        ("CPU", ShuffleMode.CPU),
        ("gpu", ShuffleMode.GPU_IOBATCH),
        ("GPU", ShuffleMode.GPU_IOBATCH),
        ("gpu_iobatch", ShuffleMode.GPU_IOBATCH),
        ("GPU_IOBATCH", ShuffleMode.GPU_IOBATCH),
        ("gpu_minibatch", ShuffleMode.GPU_MINIBATCH),
        (ShuffleMode.GPU, ShuffleMode.GPU_IOBATCH),
        (ShuffleMode.GPU_MINIBATCH, ShuffleMode.GPU_MINIBATCH),
    ],
)
def test_modes_are_accepted_by_name(store: Store, value: Any, mode: ShuffleMode) -> None:
    assert store.dataset(shuffle_mode=value, device="cpu").shuffle_mode is mode


def test_gpu_is_another_name_of_gpu_iobatch() -> None:
    assert ShuffleMode.GPU is ShuffleMode.GPU_IOBATCH
    assert [mode.name for mode in ShuffleMode] == ["CPU", "GPU_IOBATCH", "GPU_MINIBATCH"]


@pytest.mark.parametrize("value", ["tpu", "", "gpu_chunk", None, 1])
def test_other_modes_are_refused_with_the_list_of_those_there_are(store: Store, value: Any) -> None:
    with pytest.raises(ValueError, match="must be one of 'cpu', 'gpu_iobatch', 'gpu_minibatch' or 'gpu'"):
        store.dataset(shuffle_mode=value)


@pytest.mark.parametrize("mode", ["gpu", "gpu_minibatch"])
def test_a_gpu_mode_without_a_device_is_refused_where_cuda_is_not_available(store: Store, mode: str) -> None:
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=False),
        pytest.raises(ValueError, match=r"device=None with shuffle_mode='gpu_\w+' .* try device='cpu'"),
    ):
        store.dataset(shuffle_mode=mode)


def test_a_gpu_mode_is_not_read_when_not_shuffling(store: Store) -> None:
    with mock.patch.object(torch.cuda, "is_available", return_value=False):
        dataset = store.dataset(range(30), **SIZES, shuffle=False, shuffle_mode="gpu")
    assert all(isinstance(X, np.ndarray) for X, _ in dataset)
    assert np.concatenate(ids_in(dataset)).tolist() == list(range(30))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA is not available")
def test_a_gpu_mode_without_a_device_takes_the_current_cuda_device(store: Store) -> None:
    X, _ = next(iter(store.dataset(**SIZES, shuffle_mode="gpu")))
    assert X.device == torch.device("cuda", torch.cuda.current_device())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA is not available")
def test_workers_feed_a_cuda_device_through_the_training_process(store: Store) -> None:
    options = {**UNEVEN, "shuffle_mode": "gpu_iobatch"}
    on_cpu = store.dataset(range(101), **options, device="cpu")
    on_cuda = store.dataset(range(101), **options, device="cuda")
    expected = epochs_of(experiment_dataloader(on_cpu, **workers(2)), 2)
    assert epochs_of(experiment_dataloader(on_cuda, **workers(2)), 2) == expected
