"""Cells that stay on disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anndata
import pytest

from memory_cells import make_adata


@pytest.fixture(scope="session")
def backed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], anndata.AnnData]:
    """Return an AnnData of a matrix, which stays on disk."""

    def make(X: Any) -> anndata.AnnData:
        path = tmp_path_factory.mktemp("backed") / "cells.h5ad"
        make_adata(X).write_h5ad(path)
        return anndata.read_h5ad(path, backed="r")

    return make
