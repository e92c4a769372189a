"""`obs` and `var` of h5ad files as one frame that SOMA can hold."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import anndata
import numpy as np
import pandas as pd

from tiledbsoma_ml._ingest.experiment import Say


def concat_cells(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return the rows of all frames, with the columns and the categories of all of them."""
    cells = pd.concat(frames)
    for name in cells:
        columns = [frame[name] for frame in frames if name in frame]
        are_categorical = all(isinstance(column.dtype, pd.CategoricalDtype) for column in columns)
        if are_categorical and not isinstance(cells[name].dtype, pd.CategoricalDtype):
            categories = pd.Index(np.concatenate([column.cat.categories for column in columns])).unique()
            cells[name] = pd.Categorical(cells[name], categories=categories)
    return cells


def merge_genes(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return the genes of all frames, each once, as the first frame that has a gene describes it."""
    genes = pd.concat(frames)
    return genes[~genes.index.duplicated()]


def with_unique_names(genes: pd.DataFrame) -> pd.DataFrame:
    """Return genes of which each has a name of its own: repeated names get a number."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Suffix used .* to deduplicate", category=UserWarning)
        return genes.set_axis(anndata.utils.make_index_unique(genes.index.astype(str)))


def clean(frame: pd.DataFrame, axis: str, say: Say) -> pd.DataFrame:
    """Return the columns that SOMA can hold, under unique row names; `axis` is "obs" or "var"."""
    names = frame.index.astype(str)
    if not names.is_unique:
        names = pd.Index([f"{name}-{i}" for i, name in enumerate(names)])
    kept = {name: column.array for name, column in frame.items() if is_kept(column, axis)}
    if left_out := [str(name) for name in frame if name not in kept]:
        say(f"left out of {axis}: {', '.join(left_out)} (neither classes nor numbers, or a name of SOMA's)")
    return pd.DataFrame(kept, index=names.rename(f"{axis}_id"))


def is_kept(column: pd.Series[Any], axis: str) -> bool:
    """Whether SOMA can hold a column: it holds classes or numbers, and SOMA does not use its name."""
    name = str(column.name)
    is_number = pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_complex_dtype(column)
    is_free = not name.startswith(("soma_", "__")) and name not in {"index", f"{axis}_id"}
    return is_free and (is_number or is_categorical(column))


def is_categorical(column: pd.Series[Any]) -> bool:
    """Whether a column holds classes: a pandas categorical, strings, or true and false."""
    values = column.cat.categories if isinstance(column.dtype, pd.CategoricalDtype) else column
    kinds = {"string", "boolean", "integer", "empty"} if values is not column else {"string", "boolean"}
    return pd.api.types.infer_dtype(values, skipna=True) in kinds
