from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from scvi_models import N_CELLS, N_GENES
from tiledbsoma_ml._ingest.experiment import write_cells
from tiledbsoma_ml.simulate import simulate_cells


@pytest.fixture(scope="module")
def few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A simulated experiment; never written to."""
    cells = simulate_cells(N_CELLS, N_GENES)
    cells.obs["lane"] = [f"lane-{i % 3}" for i in range(N_CELLS)]
    cells.obs["age"] = np.arange(N_CELLS) % 50 / 10
    uri = str(tmp_path_factory.mktemp("scvi") / "experiment")
    write_cells(uri, cells, var_id_name="feature_id")
    return uri
