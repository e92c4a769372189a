from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from test_task import N_CELLS, N_GENES, make_task

from tiledbsoma_ml._cli import classifier
from tiledbsoma_ml._cli.classifier import History, normalise, train_classifier
from tiledbsoma_ml._cli.task import Task, build_simulated


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_simulated(tmp_path_factory.mktemp("classifier"), N_CELLS, N_GENES, seed=0, say=print)


@pytest.fixture(autouse=True)
def one_thread_of_torch() -> Iterator[None]:
    """Threads that wait for each other on busy cores make small steps many times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train(task: Task, epochs: int = 3) -> History:
    return train_classifier(
        task, epochs=epochs, num_workers=0, seed=0, on_batch=lambda _: None, on_epoch=lambda _: None
    )


def test_training_learns_and_counts_what_it_streamed(uri: str) -> None:
    task = make_task(uri)
    history = train(task, epochs=6)
    n_train = len(task.train.query_ids.obs_joinids)
    assert len(history.losses) == 6 * len(task.train) == 6 * 15
    assert history.n_rows == 6 * n_train
    assert history.rows_per_s == pytest.approx(history.n_rows / history.train_s)
    assert np.mean(history.losses[-15:]) < np.mean(history.losses[:15])
    assert len(history.accuracies) == 6
    assert history.accuracies[-1] > task.majority_accuracy


def test_equal_seeds_train_equally_and_others_do_not(uri: str) -> None:
    first, again, other = (train(make_task(uri, seed=seed), epochs=1) for seed in (0, 0, 1))
    assert first.losses == again.losses
    assert first.accuracies == again.accuracies
    assert first.losses != other.losses


def test_making_the_classifier_leaves_torchs_generator_alone() -> None:
    before = torch.random.get_rng_state()
    weights = [classifier._make_classifier(5, 2, seed)[0].weight for seed in (0, 0, 1)]
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_mini_batches_of_one_cell_can_be_trained_on(uri: str) -> None:
    task = make_task(uri, batch_size=1, obs_filter="soma_joinid < 30", label="donor_id")
    assert len(train(task, epochs=1).losses) == 24


def test_normalise_gives_logarithms_of_counts_per_ten_thousand() -> None:
    X = np.array([[1, 3, 0], [0, 0, 0]], dtype=np.float32)
    expected = np.log1p([[2_500, 7_500, 0], [0, 0, 0]])
    np.testing.assert_allclose(normalise(X, torch.device("cpu")).numpy(), expected, rtol=1e-6)
