"""Runs of Lightning: ranks that train, resume, are interrupted or die."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.tuner import Tuner

from data_modules import make
from lightning_model import Model
from lightning_run import for_the_model
from stores import N_VARS, Store, joinids_of

# Under a Trainer ------------------------------------------------------------------------------------------


N_ROWS = 310  # 248 train, 31 validation and 31 test rows: 124 of two ranks, and 16 with one row that fills up
STEPS = 8  # of 16 rows of 124

Runs: TypeAlias = dict[str, list[dict[str, Any]]]


def start_run(store: Store, out: Path, **options: Any) -> subprocess.Popen[str]:
    out.mkdir(exist_ok=True)
    settings = {"uri": store.uri, "out": str(out), "n_rows": N_ROWS, "every_n_steps": 3, **options}
    environment = {name: value for name, value in os.environ.items() if name != "PL_GLOBAL_SEED"}
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("lightning_run.py")), json.dumps(settings)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )


def run(store: Store, out: Path, **options: Any) -> list[dict[str, Any]]:
    """Run `lightning_run.py`, and return what each rank wrote."""
    process = start_run(store, out, **options)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert "not resumable" not in output
    return seen_by_ranks(out)


def seen_by_ranks(out: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(out.glob("rank*.json"))]


CHECKPOINTS = {"epoch=1-step=12.ckpt": 12, "end-epoch=1.ckpt": 16}
"""Checkpoints within an epoch and at its end, with the number of steps before each."""


@pytest.fixture(scope="module")
def runs(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """What each of two ranks saw in three epochs: uninterrupted, and from each checkpoint on.

    The same processes make one run after the other, because to start them takes longer than to train.
    """
    folder = tmp_path_factory.mktemp("runs")
    whole = folder / "uninterrupted"
    resumed = [{"out": str(folder / name), "ckpt_path": str(whole / name)} for name in CHECKPOINTS]
    return {"uninterrupted": run(store, whole, then=resumed)} | {
        name: seen_by_ranks(folder / name) for name in CHECKPOINTS
    }


def test_two_ranks_train_the_same_number_of_steps_on_disjoint_rows_that_are_all_rows(
    store: Store, runs: Runs
) -> None:
    ranks = runs["uninterrupted"]
    data = make(store, slice(0, N_ROWS - 1), seed=5)
    orders = []
    for epoch in range(3):
        rows = [[step[1] for step in rank["train"] if step[0] == epoch] for rank in ranks]
        assert [len(steps) for steps in rows] == [STEPS, STEPS]
        orders.append([row for steps in rows for step in steps for row in step])
        assert sorted(orders[-1]) == data.train_ids.obs_joinids.tolist()
    assert orders[0] != orders[1] != orders[2]
    of_rank_0 = [set(order[: len(order) // 2]) for order in orders]
    assert of_rank_0[0] != of_rank_0[1]  # the global scope deals rows anew in each epoch


def test_two_ranks_evaluate_every_row_once(store: Store, runs: Runs) -> None:
    ranks = runs["uninterrupted"]
    data = make(store, slice(0, N_ROWS - 1), seed=5)
    for part, ids in [("val", data.val_ids), ("test", data.test_ids)]:
        last = max(step[0] for step in ranks[0][part])
        rows = [[step[1] for step in rank[part] if step[0] == last] for rank in ranks]
        assert len(rows[0]) == len(rows[1])
        assert [row for steps in rows for step in steps for row in step] == ids.obs_joinids.tolist()


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_a_run_resumed_within_an_epoch_or_at_its_end_has_the_losses_of_an_uninterrupted_one(
    runs: Runs, checkpoint: str
) -> None:
    for rank, again in zip(runs["uninterrupted"], runs[checkpoint], strict=True):
        assert again["train"] == rank["train"][CHECKPOINTS[checkpoint] :]
        assert again["train"]


def in_this_process(folder: Path, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )


@pytest.mark.filterwarnings("ignore")
def test_an_epoch_that_was_limited_to_some_batches_is_followed_by_the_next_one_after_resuming(
    store: Store, tmp_path: Path
) -> None:
    def rows_of(max_epochs: int, ckpt_path: Path | None = None) -> list[Any]:
        model, data = Model(N_VARS), make(store, transform=for_the_model)
        trainer = in_this_process(tmp_path, max_epochs=max_epochs, limit_train_batches=3)
        trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / f"{max_epochs}.ckpt")
        return [step[1] for step in model.seen["train"]]

    whole = rows_of(3)
    assert rows_of(1) == whole[:3]
    assert rows_of(3, tmp_path / "1.ckpt") == whole[3:]


@pytest.mark.filterwarnings("ignore")
def test_the_batch_size_that_lightning_finds_is_trained_with_from_the_first_epoch_on(
    store: Store, tmp_path: Path
) -> None:
    data, model = make(store, transform=for_the_model), Model(N_VARS)
    trainer = in_this_process(tmp_path, max_epochs=1, enable_checkpointing=False)
    found = Tuner(trainer).scale_batch_size(
        model, datamodule=data, init_val=20, max_trials=2, steps_per_trial=1
    )
    assert found == data.batch_size == 40
    model.seen["train"].clear()
    trainer.fit(model, datamodule=data)
    steps = [rows for _, rows, _ in model.seen["train"]]
    assert [len(rows) for rows in steps] == [40] * 6 + [9]
    expected = make(store, batch_size=40).train_dataloader()
    assert [row for rows in steps for row in rows] == joinids_of(expected).tolist()


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_says_nothing_of_inaccurate_lengths_and_leaves_the_filters_of_warnings_as_they_were(
    store: Store, tmp_path: Path, fails: bool
) -> None:
    data, model = make(store, transform=None if fails else for_the_model), Model(N_VARS)
    trainer = in_this_process(tmp_path, max_epochs=1, limit_train_batches=1, enable_checkpointing=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        with pytest.raises(TypeError) if fails else contextlib.nullcontext():
            trainer.fit(model, datamodule=data)
        assert warnings.filters == before
    assert not [warning for warning in caught if "__len__" in str(warning.message)]


class Stop(Callback):
    """Writes a checkpoint after so many steps, and ends the run as a crash would."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise InterruptedError


class Look(Callback):
    """Looks at one training batch when training starts, and at all of them before step 7."""

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        next(iter(trainer.datamodule.train_dataloader()))

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 6:
            list(trainer.datamodule.train_dataloader())


class Scheduled(Model):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        total = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=int(total))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


FEW = slice(0, 99)  # 80 train rows: 5 batches of 16


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("model_of", "callbacks", "options", "stop"),
    [
        (Scheduled, [], {}, 7),
        (Model, [Look()], {}, 7),
        (Model, [], {"limit_train_batches": 3}, 6),
        (Model, [], {"limit_train_batches": 3}, 5),
    ],
    ids=[
        "a schedule asks how many steps there are",
        "callbacks look at batches",
        "an epoch is cut short",
        "one batch is left of an epoch that is cut short",
    ],
)
def test_a_run_resumes_in_its_place_whatever_looked_at_its_batches(
    store: Store, tmp_path: Path, model_of: Any, callbacks: list[Callback], options: dict[str, Any], stop: int
) -> None:
    checkpoint = tmp_path / "stopped.ckpt"

    def rows_of(*more: Callback, **fit_options: Any) -> list[Any]:
        model = model_of(N_VARS)
        trainer = in_this_process(tmp_path, max_epochs=3, callbacks=[*callbacks, *more], **options)
        with contextlib.suppress(InterruptedError):
            trainer.fit(model, datamodule=make(store, FEW, transform=for_the_model), **fit_options)
        return [step[1] for step in model.seen["train"]]

    whole = rows_of()
    assert len({tuple(rows) for rows in whole}) == len(whole)
    assert rows_of(Stop(stop, checkpoint)) == whole[:stop]
    assert rows_of(ckpt_path=checkpoint, weights_only=False) == whole[stop:]


@pytest.mark.filterwarnings("ignore")
def test_evaluating_a_checkpoint_of_other_data_is_not_refused_and_does_not_rewind_training(
    store: Store, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "trained.ckpt"
    model, data = Model(N_VARS), make(store, FEW, transform=for_the_model)
    trainer = in_this_process(tmp_path, max_epochs=1)
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(checkpoint)
    others = [{"batch_size": 20}, {"seed": 4}, {"obs": slice(100, 149)}]
    for change in others:
        other = make(store, transform=for_the_model, **{"obs": FEW, **change})
        predicted = in_this_process(tmp_path).predict(
            Model(N_VARS), datamodule=other, ckpt_path=checkpoint, weights_only=False
        )
        assert torch.cat(predicted).tolist() == other.query_ids.obs_joinids.tolist()
    with pytest.raises(ValueError, match="state must be of this dataset, but batch_size is 16 there, not 20"):
        in_this_process(tmp_path, max_epochs=2).fit(
            Model(N_VARS),
            datamodule=make(store, FEW, batch_size=20, transform=for_the_model),
            ckpt_path=checkpoint,
            weights_only=False,
        )
    in_this_process(tmp_path, max_epochs=1).fit(model, datamodule=data)
    in_this_process(tmp_path).test(
        Model(N_VARS), datamodule=data, ckpt_path=checkpoint, verbose=False, weights_only=False
    )
    in_this_process(tmp_path, max_epochs=1).fit(model, datamodule=data)
    seen = [tuple(step[1]) for step in model.seen["train"]]
    assert len(set(seen)) == len(seen) == 15


@pytest.mark.filterwarnings("ignore")
def test_overfitting_takes_the_same_batches_in_every_epoch(store: Store, tmp_path: Path) -> None:
    model = Model(N_VARS)
    trainer = in_this_process(tmp_path, max_epochs=3, overfit_batches=2)
    trainer.fit(model, datamodule=make(store, FEW, transform=for_the_model))
    seen = [step[1] for step in model.seen["train"]]
    assert seen == seen[:2] * 3
    assert seen[0] != seen[1]


def test_a_state_that_is_loaded_is_told_until_it_is_used(store: Store) -> None:
    data, other = make(store), make(store)
    mini_batches = iter(data.train_dataloader())
    next(mini_batches)
    state = data.state_dict()
    other.load_state_dict(state)
    assert other.state_dict() == state
    rest = iter(other.train_dataloader())
    for _ in range(2):
        np.testing.assert_array_equal(joinids_of([next(rest)]), joinids_of([next(mini_batches)]))
        assert other.state_dict() == data.state_dict()


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_failed_before_it_trained_leaves_no_place_to_the_next_one(
    store: Store, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "trained.ckpt"
    data, model = make(store, FEW, transform=for_the_model), Model(N_VARS)
    trainer = in_this_process(tmp_path, max_epochs=1)
    trainer.fit(model, datamodule=make(store, FEW, transform=for_the_model))
    trainer.save_checkpoint(checkpoint)
    failing = Model(N_VARS)
    failing.configure_optimizers = raises_interrupted
    with pytest.raises(InterruptedError):
        in_this_process(tmp_path).fit(failing, datamodule=data, ckpt_path=checkpoint, weights_only=False)
    again = Model(N_VARS)
    in_this_process(tmp_path, max_epochs=1).fit(again, datamodule=data)
    assert [step[1] for step in again.seen["train"]] == [step[1] for step in model.seen["train"]]


def raises_interrupted() -> None:
    raise InterruptedError


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("step", [1, 2, 3], ids=["within an epoch", "at its end", "within the next one"])
def test_a_run_that_overfits_resumes_with_the_batches_that_it_overfits(
    store: Store, tmp_path: Path, step: int
) -> None:
    checkpoint = tmp_path / "stopped.ckpt"
    stopped, resumed = Model(N_VARS), Model(N_VARS)
    for model, callbacks, path in [(stopped, [Stop(step, checkpoint)], None), (resumed, [], checkpoint)]:
        trainer = in_this_process(tmp_path, max_epochs=3, overfit_batches=2, callbacks=callbacks)
        with contextlib.suppress(InterruptedError):
            data = make(store, FEW, transform=for_the_model)
            trainer.fit(model, datamodule=data, ckpt_path=path, weights_only=False)
    rows = [seen[1] for model in (stopped, resumed) for seen in model.seen["train"]]
    assert rows[2:] == rows[:2] * (len(rows) // 2 - 1)
    assert rows[0] != rows[1]


@pytest.mark.filterwarnings("ignore")
def test_what_a_trainer_predicts_is_in_the_order_of_the_query(store: Store, tmp_path: Path) -> None:
    data = make(store, slice(5, 104), transform=for_the_model)
    predicted = in_this_process(tmp_path).predict(Model(N_VARS), datamodule=data)
    assert torch.cat(predicted).tolist() == list(range(5, 105))


# Interrupted ----------------------------------------------------------------------------------------------


def processes_of(session: int) -> set[int]:
    """Return the processes of a session that have not ended."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, of_session = stat.read_text().rpartition(")")[2].split()[:4]
            if int(of_session) == session and state != "Z":
                found.add(int(stat.parent.name))
    return found


def shared_memory_of(processes: set[int]) -> set[Path]:
    """Return the files of shared memory that processes have mapped."""
    found = set()
    for process in processes:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{process}/maps").read_text().splitlines()
            found |= {Path(line.split()[5]) for line in lines if " /dev/shm/" in line}
    return {path for path in found if path.exists()}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ctrl_c_in_the_middle_of_an_epoch_leaves_no_process_and_no_shared_memory(
    store: Store, tmp_path: Path
) -> None:
    with start_run(store, tmp_path / "out", num_workers=1, val_size=0, max_epochs=10_000) as process:
        assert process.stdout is not None
        n_steps = 0
        while n_steps < 6:  # of two ranks, in the first epoch
            line = process.stdout.readline()
            assert line, "the run ended by itself"
            n_steps += line == "step\n"
        running = processes_of(process.pid)
        shared = shared_memory_of(running)
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate()
    assert process.returncode not in (-signal.SIGSEGV, -signal.SIGABRT), output
    assert len(running) >= 4  # two ranks with a worker each
    deadline = time.monotonic() + 300
    while (left := processes_of(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left, output
    assert not [path for path in shared if path.exists()]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_that_dies_ends_the_run_which_says_which_one_and_why(store: Store, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = {"devices": 1, "strategy": "auto", "num_workers": 1, "val_size": 0, "max_epochs": 10_000}
    with start_run(store, out, **options) as process:
        assert process.stdout is not None
        while process.stdout.readline() != "step\n":
            pass
        victim = max(pid for pid in processes_of(process.pid) if "spawn_main" in command_of(pid))
        os.kill(victim, signal.SIGKILL)
        output, _ = process.communicate()
    assert process.returncode
    # As the loader tells it while it waits for a batch, or as torch does wherever training is.
    assert re.search(rf"\(process {victim}\) died by signal 9|\(pid {victim}\) is killed by signal", output)


def command_of(process: int) -> str:
    return Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ")
