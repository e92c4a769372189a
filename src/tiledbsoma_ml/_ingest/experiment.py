"""Cells in memory to an experiment, which is built once and is complete when it appears."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TypeAlias

import anndata
import tiledbsoma as soma
import tiledbsoma.io

from tiledbsoma_ml._common import absolute_uri
from tiledbsoma_ml._context import context
from tiledbsoma_ml.snapshot.creation import check_own_folder, locked

Say: TypeAlias = Callable[[str], None]
"""Takes a line of text about something that the user may want to know."""

MEASUREMENT_NAME, LAYER_NAME = "RNA", "raw"
"""Measurement and layer of the experiments that are built."""


def write_cells(
    uri: str, cells: anndata.AnnData, *, layer_name: str = LAYER_NAME, var_id_name: str = "var_id"
) -> None:
    """Write cells in memory to a new experiment.

    Args:
        uri: Address of the experiment.
        cells: Their `X` becomes a layer of the measurement "RNA".
        layer_name: Name of that layer.
        var_id_name: Column of `var` that gets the names of the genes.
    """
    tiledbsoma.io.from_anndata(
        absolute_uri(uri),
        cells,
        MEASUREMENT_NAME,
        context=context(),
        X_layer_name=layer_name,
        var_id_name=var_id_name,
    )


def build_once(folder: Path, build: Callable[[str], None], say: Say) -> None:
    """Let `build` write the experiment `folder`, unless it exists already.

    `build` writes to a temporary folder beside it, which is renamed when it is complete: an experiment of
    this name is always complete, and nothing that exists is changed or deleted. If several processes ask for
    the same experiment, one builds it and the others wait. The next build removes what a killed process left.
    """
    if _is_built(folder, say):
        return
    with locked(folder, lambda maker: say(f"process {maker} is making it; waiting until it is there")):
        if _is_built(folder, say):
            return
        say(f"building the experiment {folder}")
        building = folder.with_name(f".{folder.name}.building")
        if check_own_folder(building, folder):
            shutil.rmtree(building)
        building.mkdir(mode=0o700)
        try:
            build(str(building / folder.name))
            (building / folder.name).rename(folder)
        finally:
            shutil.rmtree(building)


def _is_built(folder: Path, say: Say) -> bool:
    if soma.Experiment.exists(str(folder), context()):
        say(f"using the experiment built before: {folder}")
        return True
    if folder.exists():
        raise ValueError(f"{folder} exists and is not an experiment; choose another folder.")
    return False


def fingerprint(*parts: object) -> str:
    """Return eight letters that differ where the parts, or versions of this package, differ."""
    return hashlib.blake2b(repr((*parts, version("tiledbsoma-ml"))).encode(), digest_size=4).hexdigest()
