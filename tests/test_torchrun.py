from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tiledbsoma_ml.simulate import simulate_experiment

EXAMPLE = Path(__file__).parents[1] / "notebooks" / "train_ddp.py"

# 800 training cells are 400 for each of two ranks: 7 steps of 64.
N_CELLS, STEPS = 1000, 7


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("simulated") / "experiment")
    simulate_experiment(uri, n_cells=N_CELLS, n_genes=100)
    return uri


def run(*arguments: object) -> str:
    """Run the example on two ranks, and return what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.run(
        [*command, str(EXAMPLE), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stdout
    return process.stdout


def losses(output: str) -> dict[int, str]:
    return {int(step): loss for step, loss in re.findall(r"^step (\d+): loss (\S+)$", output, re.MULTILINE)}


def test_the_example_trains_on_two_ranks_and_resumes_within_an_epoch_with_the_same_losses(
    uri: str, tmp_path: Path
) -> None:
    # The last checkpoint is within the second epoch: the run stops when the step after its end would begin.
    options = ["--uri", uri, "--batch-size", 64, "--checkpoint", tmp_path / "run.pt", "--every", STEPS + 2]
    whole = run(*options, "--epochs", 2, "--steps", 2 * STEPS)
    assert list(losses(whole)) == list(range(1, 2 * STEPS + 1))
    assert whole.count("200 held-out cells on 2 ranks") == 2

    resumed = run(*options, "--epochs", 2)
    assert f"epoch 1, step {STEPS + 2}" in resumed
    assert losses(resumed) == {step: loss for step, loss in losses(whole).items() if step > STEPS + 2}
    accuracies = [re.findall(r"held-out accuracy (\S+)", output)[-1] for output in (whole, resumed)]
    assert accuracies[0] == accuracies[1]


def test_the_example_simulates_cells_if_it_is_given_none_and_removes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert "after 1 epochs" in run("--cells", 500, "--epochs", 1)
    assert not list(tmp_path.glob("*/simulated"))
