from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import ray
import tiledbsoma as soma
import torch
from lightning.pytorch import LightningModule
from ray.cluster_utils import Cluster
from scipy import sparse

from stores import N_VARS, Store, expected_X, make_cells
from tiledbsoma_ml import ExperimentDataModule, RayTrainRunner, Snapshot
from tiledbsoma_ml._context import open_experiment
from tiledbsoma_ml._ray.data import UnopenedQuery, as_data_module

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore:Sparse CSR tensor support"),
]

N_ROWS = 310  # 248 train rows are 124 for each of two ranks: 8 steps of 16


class Model(LightningModule):
    """A linear model that writes down what each rank was given, and kills its process if it is told to."""

    def __init__(self, n_vars: int, folder: str, dies_at: list[int] | None = None) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(n_vars, 2)
        self.folder = Path(folder)
        self.dies_at = dies_at

    def training_step(self, batch: Mapping[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        assert torch.equal(batch["X"], torch.tensor(expected_X(batch["rows"], range(N_VARS))))
        if [self.global_rank, self.current_epoch, batch_idx] == self.dies_at:
            died = self.folder / "died"
            if not died.exists():
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        loss = torch.nn.functional.cross_entropy(self.linear(batch["X"] / 3e5), batch["rows"] % 2)
        with (self.folder / f"rank{self.global_rank}").open("a") as file:
            file.write(
                json.dumps([self.current_epoch, batch_idx, batch["rows"].tolist(), loss.item()]) + "\n"
            )
        self.log("loss", loss, batch_size=len(batch["rows"]))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def rows_as_tensor(batch: Any) -> Any:
    X, obs = batch
    assert X.layout is torch.sparse_csr
    return X, torch.tensor(obs["soma_joinid"].to_numpy())


def named(batch: Any) -> dict[str, torch.Tensor]:
    X, rows = batch
    assert X.layout is torch.strided
    return {"X": X, "rows": rows}


def seen(folder: Path) -> list[list[Any]]:
    """Return what each rank wrote: [epoch, step within it, rows, loss] of each step."""
    files = sorted(folder.glob("rank*"))
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def runner(folder: Path, **options: Any) -> RayTrainRunner:
    folder.mkdir(exist_ok=True)
    dies_at = options.pop("dies_at", None)
    return RayTrainRunner(
        Model,
        model_args=lambda data: {"n_vars": data.n_vars, "folder": str(folder), "dies_at": dies_at},
        **{"before_dense": rows_as_tensor, "after_dense": named, **options},
    )


SIZES = {"batch_size": 16, "io_batch_size": 64, "shuffle_chunk_size": 8, "seed": 5}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes of one CPU each."""
    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)  # workers import this file
        cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        cluster.add_node(**node)
        ray.init(cluster.address)
        yield cluster
        ray.shutdown()
        cluster.shutdown()


def test_a_run_on_h5ad_files_goes_on_after_a_kill_and_one_from_its_checkpoint_tells_the_cause_of_an_error(
    cluster: Cluster, tmp_path: Path
) -> None:
    # One run shows several things, because to start workers takes most of the time.
    X = expected_X(range(N_ROWS + 1), range(N_VARS))
    files = [tmp_path / "0.h5ad", tmp_path / "1.h5ad"]
    for file, part in zip(files, (X[:200], X[200:]), strict=True):
        genes = [f"g{j:02}" for j in range(N_VARS)]
        make_cells(sparse.csr_matrix(part), genes=genes).write_h5ad(file)

    # Rank 1 dies in the middle of the second epoch.
    first, rows = tmp_path / "first", soma.AxisQuery(coords=(slice(0, N_ROWS - 1),))
    result = runner(first, dies_at=[1, 1, 6]).train(
        files,
        obs_query=rows,
        experiments_path=tmp_path / "experiments",
        **SIZES,
        max_epochs=2,
        num_workers=2,
        use_gpu=False,
        storage_path=tmp_path / "results",
        checkpoint_every_n_steps=3,
    )
    assert (first / "died").exists()
    assert (result.metrics["epoch"], result.metrics["step"]) == (1, 16)
    assert result.metrics["loss"] > 0
    [uri] = (tmp_path / "experiments").glob("*.soma")
    with (
        open_experiment(str(uri)) as experiment,
        experiment.axis_query("RNA", obs_query=rows) as query,
    ):
        train_ids = ExperimentDataModule(query, **SIZES).train_ids
        snapshot = Snapshot.create(tmp_path / "snapshot", query, progress=False)
    ranks = seen(first)
    for steps in ranks:
        # Steps that were taken twice were given the same rows, and had the same loss.
        assert len({(epoch, step) for epoch, step, _, _ in steps}) == 16
        assert len({json.dumps(step) for step in steps}) == 16
        # What came before the last checkpoint of the epoch was not taken again.
        assert [[epoch, step] for epoch, step, _, _ in steps].count([1, 0]) == 1
    for epoch in range(2):
        taken = {row for steps in ranks for at, _, rows, _ in steps if at == epoch for row in rows}
        assert sorted(taken) == train_ids.obs_joinids.tolist()

    # Another run, from a snapshot and with one worker, goes on with the third epoch, and fails in the fourth.
    second = tmp_path / "second"

    def fail_after_an_epoch(batch: Any) -> Any:
        if any(len(steps) == 16 for steps in seen(second)):
            raise OSError("the disk is gone")
        return rows_as_tensor(batch)

    assert result.checkpoint is not None
    with (
        pytest.warns(UserWarning, match="use_gpu=True, but the Ray cluster has no GPU: training on CPUs"),
        pytest.raises(ray.train.WorkerGroupError, match="rank 0: OSError: the disk is gone") as error,
    ):
        runner(second, before_dense=fail_after_an_epoch).train(
            snapshot,
            **SIZES,
            max_epochs=4,
            num_workers=1,
            storage_path=tmp_path / "results",
            ckpt_path=result.checkpoint.path,
            max_failures=0,
        )
    assert set(error.value.worker_failures) == {0}
    [steps] = seen(second)
    assert [(epoch, step) for epoch, step, _, _ in steps] == [(2, step) for step in range(16)]
    assert sorted(row for _, _, rows, _ in steps for row in rows) == train_ids.obs_joinids.tolist()


def test_the_uri_of_an_experiment_is_what_a_run_reads(store: Store) -> None:
    rows = soma.AxisQuery(coords=(slice(0, N_ROWS - 1),))
    query = UnopenedQuery("RNA", rows, None, None)
    data = as_data_module(store.uri, query, SIZES, None, None)
    assert data.query_ids.obs_joinids.tolist() == list(range(N_ROWS))
    assert data.batch_size == 16
