from __future__ import annotations

import copy
import pickle
from typing import Any

import attrs
import pytest
from scipy import sparse

from stores import Store


def test_every_option_is_an_attribute_of_the_dataset_and_of_copies_of_it(store: Store) -> None:
    made = store.dataset(batch_size=8, mixing=0.9, shuffle_chunk_size="auto", memory_budget="1GiB", seed=3)
    assert (made.memory_budget, made.mixing, made.window_dir, made.window_budget) == (2**30, 0.9, None, 0)
    for dataset in (made, copy.copy(made), pickle.loads(pickle.dumps(made)), made.random_split(0.5, 0.5)[0]):
        for name, value in attrs.asdict(made.options, recurse=False).items():
            found = getattr(dataset, name)
            assert (tuple(found) if name == "obs_column_names" else found) == value
            assert name in dir(dataset)
    with pytest.raises(AttributeError, match="'ExperimentDataset' object has no attribute 'batchsize'"):
        made.batchsize  # noqa: B018


@pytest.mark.parametrize("eager", [False, True])
def test_reading_ahead_can_be_changed(store: Store, eager: bool) -> None:
    dataset = store.dataset(use_eager_fetch=not eager)
    dataset.use_eager_fetch = eager
    assert dataset.iterations.budget.use_eager_fetch == eager


@pytest.mark.parametrize(
    ("name", "value"), [("batch_size", 3), ("shuffle", False), ("obs_column_names", []), ("query_ids", None)]
)
def test_what_the_order_was_made_with_cannot_be_changed(store: Store, name: str, value: Any) -> None:
    dataset = store.dataset(range(8), batch_size=4)
    with pytest.raises(AttributeError, match=f"{name} of a dataset cannot be changed, .* another dataset"):
        setattr(dataset, name, value)
    [first, _] = dataset.random_split(0.5, 0.5)
    for made in (dataset, first, pickle.loads(pickle.dumps(first))):
        assert (made.batch_size, made.shuffle, made.obs_column_names) == (4, True, ["soma_joinid"])


def test_the_form_of_x_can_be_changed(store: Store) -> None:
    dataset = store.dataset(range(8), batch_size=8)
    dataset.return_sparse_X = True
    [(X, _)] = dataset
    assert isinstance(X, sparse.csr_matrix)
