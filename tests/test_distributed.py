from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from stores import Store, workers
from tiledbsoma_ml import ExperimentDataset, experiment_dataloader
from tiledbsoma_ml._distributed import get_distributed_rank_and_world_size, get_worker_id_and_num


@pytest.fixture(autouse=True)
def _no_ranks_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "NODE_RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def set_environment(monkeypatch: pytest.MonkeyPatch, variables: str) -> None:
    for assignment in variables.split():
        monkeypatch.setenv(*assignment.split("="))


@pytest.mark.parametrize(
    ("variables", "rank_and_world_size"),
    [
        ("", (0, 1)),
        ("RANK=2 WORLD_SIZE=4", (2, 4)),
        ("RANK=2 WORLD_SIZE=4 NODE_RANK=1 LOCAL_RANK=0 LOCAL_WORLD_SIZE=2", (2, 4)),
        ("LOCAL_RANK=1 WORLD_SIZE=2", (1, 2)),
        ("NODE_RANK=0 LOCAL_RANK=1 WORLD_SIZE=2", (1, 2)),
        ("NODE_RANK=1 LOCAL_RANK=2 LOCAL_WORLD_SIZE=4 WORLD_SIZE=8", (6, 8)),
        ("RANK=2", (0, 1)),
        ("WORLD_SIZE=4", (0, 1)),
        ("LOCAL_RANK=1", (0, 1)),
    ],
)
def test_the_environment_tells_the_rank(
    monkeypatch: pytest.MonkeyPatch, variables: str, rank_and_world_size: tuple[int, int]
) -> None:
    set_environment(monkeypatch, variables)
    assert get_distributed_rank_and_world_size() == rank_and_world_size


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ("RANK=one WORLD_SIZE=2", r"RANK='one' in the environment must be an integer; correct or unset it"),
        ("RANK=1 WORLD_SIZE=", r"WORLD_SIZE='' in the environment must be an integer"),
        ("LOCAL_RANK=1.5 WORLD_SIZE=2", r"LOCAL_RANK='1.5' in the environment must be an integer"),
        ("RANK=4 WORLD_SIZE=4", r"rank 4 must lie in 0 … 3 \(WORLD_SIZE=4\); correct RANK and WORLD_SIZE"),
        ("RANK=-1 WORLD_SIZE=4", r"rank -1 must lie in 0 … 3"),
        ("LOCAL_RANK=2 WORLD_SIZE=2", r"rank 2 must lie in 0 … 1"),
        (
            "NODE_RANK=1 LOCAL_RANK=0 WORLD_SIZE=4",
            r"NODE_RANK=1 and LOCAL_RANK=0 do not tell the rank without LOCAL_WORLD_SIZE; set RANK, or",
        ),
    ],
)
def test_an_environment_that_does_not_fit_together_is_an_error_that_says_what_to_correct(
    monkeypatch: pytest.MonkeyPatch, variables: str, message: str
) -> None:
    set_environment(monkeypatch, variables)
    with pytest.raises(ValueError, match=message):
        get_distributed_rank_and_world_size()


def test_the_cause_of_a_value_that_is_no_integer_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, "RANK=one WORLD_SIZE=2")
    with pytest.raises(ValueError, match="RANK") as caught:
        get_distributed_rank_and_world_size()
    assert isinstance(caught.value.__cause__, ValueError)


# torch.distributed ----------------------------------------------------------------------------------------


def test_a_process_group_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    set_environment(monkeypatch, "RANK=2 WORLD_SIZE=4")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1
    )
    try:
        assert get_distributed_rank_and_world_size() == (0, 1)
    finally:
        torch.distributed.destroy_process_group()
    assert get_distributed_rank_and_world_size() == (2, 4)


def test_torch_distributed_is_called_through_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 5)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 7)
    assert get_distributed_rank_and_world_size() == (5, 7)


def test_without_torch_distributed_the_environment_tells_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    monkeypatch.delattr(torch.distributed, "is_initialized")
    set_environment(monkeypatch, "RANK=2 WORLD_SIZE=4")
    assert get_distributed_rank_and_world_size() == (2, 4)


# Workers --------------------------------------------------------------------------------------------------


class WhoAmI(IterableDataset):
    """Yields one item: the number of the worker, and how many there are."""

    def __iter__(self) -> Iterator[tuple[int, int]]:
        yield get_worker_id_and_num()


@pytest.mark.parametrize(("num_workers", "expected"), [(0, [[0, 1]]), (2, [[0, 2], [1, 2]])])
def test_a_worker_of_a_dataloader_knows_its_number(num_workers: int, expected: list[list[int]]) -> None:
    loader = DataLoader(WhoAmI(), batch_size=None, **workers(num_workers))
    assert sorted(loader) == expected


def test_the_worker_is_asked_for_through_torch_utils_data(monkeypatch: pytest.MonkeyPatch) -> None:
    assert get_worker_id_and_num() == (0, 1)
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: SimpleNamespace(id=3, num_workers=5))
    assert get_worker_id_and_num() == (3, 5)


# Accelerate -----------------------------------------------------------------------------------------------

# What its `prepare` does to a loader of an IterableDataset: process 0 reads, or each takes its share.
ACCELERATE = """
class DataLoaderDispatcher:
    def __init__(self, base_dataloader):
        self.base_dataloader = base_dataloader

    def __iter__(self):
        yield from self.base_dataloader


class IterableDatasetShard(DataLoaderDispatcher):
    pass


class SkipDataLoader(DataLoaderDispatcher):
    pass
"""


@pytest.fixture
def accelerate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return a stand-in for `accelerate.data_loader`."""
    module = ModuleType("accelerate.data_loader")
    exec(ACCELERATE, module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    return module


def fork_loader(dataset: ExperimentDataset) -> DataLoader[Any]:
    options = {"num_workers": 1, "multiprocessing_context": "fork", "collate_fn": lambda batch: batch}
    return DataLoader(dataset, batch_size=None, **options)


@pytest.mark.parametrize("loader_of", [iter, experiment_dataloader, fork_loader])
@pytest.mark.parametrize("dealer", ["DataLoaderDispatcher", "IterableDatasetShard"])
def test_what_accelerate_deals_to_ranks_is_not_dealt_before(
    store: Store, accelerate: ModuleType, dealer: str, loader_of: Callable[[ExperimentDataset], Any]
) -> None:
    prepared = getattr(accelerate, dealer)(loader_of(store.dataset(range(40), seed=1)))
    with pytest.raises(ValueError, match=r"Accelerate's prepare deals to all 2 ranks .* ranks=\(0, 1\)"):
        list(prepared)


def test_a_dataset_that_is_told_its_ranks_gives_accelerate_every_row(
    store: Store, accelerate: ModuleType
) -> None:
    whole = store.dataset(range(40), seed=1, ranks=(0, 1))
    for dealer in (accelerate.DataLoaderDispatcher, accelerate.IterableDatasetShard):
        found = [row for _, obs in dealer(experiment_dataloader(whole)) for row in obs["soma_joinid"]]
        assert sorted(found) == list(range(40))


def test_shares_of_one_order_need_its_seed(store: Store, accelerate: ModuleType) -> None:
    whole = store.dataset(range(40), ranks=(0, 1))
    with pytest.raises(ValueError, match="seed=None must be a number where each rank takes its share of one"):
        list(accelerate.IterableDatasetShard(whole))
    assert len(list(accelerate.DataLoaderDispatcher(whole))) == 40


def test_a_loader_that_accelerate_does_not_deal_to_ranks_is_left_alone(
    store: Store, accelerate: ModuleType
) -> None:
    assert len(list(accelerate.SkipDataLoader(store.dataset(range(40))))) == 20
