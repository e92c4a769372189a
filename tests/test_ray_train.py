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


def test_a_run_whose_worker_was_killed_goes_on_within_the_epoch_and_its_checkpoint_begins_another_run(
    cluster: Cluster, store: Store, tmp_path: Path
) -> None:
    # Rank 1 dies in the middle of the second epoch.
    folder, rows = tmp_path / "first", soma.AxisQuery(coords=(slice(0, N_ROWS - 1),))
    result = runner(folder, dies_at=[1, 1, 6]).train(
        store.uri,
        obs_query=rows,
        **SIZES,
        max_epochs=2,
        num_workers=2,
        use_gpu=False,
        storage_path=tmp_path / "results",
        checkpoint_every_n_steps=3,
    )
    assert (folder / "died").exists()
    assert (result.metrics["epoch"], result.metrics["step"]) == (1, 16)
    assert result.metrics["loss"] > 0
    with store.query(slice(0, N_ROWS - 1)) as query:
        train_ids = ExperimentDataModule(query, **SIZES).train_ids
        snapshot = Snapshot.create(tmp_path / "snapshot", query, progress=False)
    ranks = seen(folder)
    for steps in ranks:
        # Steps that were taken twice were given the same rows, and had the same loss.
        assert len({(epoch, step) for epoch, step, _, _ in steps}) == 16
        assert len({json.dumps(step) for step in steps}) == 16
        # What came before the last checkpoint of the epoch was not taken again.
        assert [[epoch, step] for epoch, step, _, _ in steps].count([1, 0]) == 1
    for epoch in range(2):
        taken = {row for steps in ranks for at, _, rows, _ in steps if at == epoch for row in rows}
        assert sorted(taken) == train_ids.obs_joinids.tolist()

    # Another run, from a snapshot and with one worker, goes on with the third epoch.
    assert result.checkpoint is not None
    with pytest.warns(UserWarning, match="use_gpu=True, but the Ray cluster has no GPU: training on CPUs"):
        runner(tmp_path / "second").train(
            snapshot,
            **SIZES,
            max_epochs=3,
            num_workers=1,
            storage_path=tmp_path / "results",
            ckpt_path=result.checkpoint.path,
        )
    [steps] = seen(tmp_path / "second")
    assert [(epoch, step) for epoch, step, _, _ in steps] == [(2, step) for step in range(16)]
    assert sorted(row for _, _, rows, _ in steps for row in rows) == train_ids.obs_joinids.tolist()


def test_h5ad_files_are_ingested_and_an_error_in_a_worker_tells_its_rank_and_cause(
    cluster: Cluster, tmp_path: Path
) -> None:
    X = expected_X(range(100), range(N_VARS))
    for number, rows in enumerate([range(60), range(60, 100)]):
        make_cells(sparse.csr_matrix(X[rows])).write_h5ad(tmp_path / f"{number}.h5ad")

    def fail(batch: Any) -> Any:
        (tmp_path / "rows").write_text(json.dumps(len(batch[1])))
        raise OSError("the disk is gone")

    with pytest.raises(ray.train.WorkerGroupError, match="rank 0: OSError: the disk is gone") as error:
        runner(tmp_path, before_dense=fail).train(
            [tmp_path / "0.h5ad", tmp_path / "1.h5ad"],
            experiments_path=tmp_path / "experiments",
            num_workers=1,
            use_gpu=False,
            batch_size=80,
            storage_path=tmp_path / "results",
            max_failures=0,
        )
    assert set(error.value.worker_failures) == {0}
    assert (tmp_path / "rows").read_text() == "80"  # the train part of 100 rows
    assert len(list((tmp_path / "experiments").glob("*.soma"))) == 1
