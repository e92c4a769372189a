"""Choose a matrix of an h5ad file, by its name or by its values."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from tiledbsoma_ml._common import check_name
from tiledbsoma_ml._ingest.experiment import Say
from tiledbsoma_ml._ingest.h5ad_file import COUNTS_KEY, RAW_X_KEY, X_KEY, H5adFile
from tiledbsoma_ml._ingest.matrix import Matrix, Survey

Choose: TypeAlias = Callable[[H5adFile, str | None, Say], Matrix]
"""Chooses a matrix of a file; the name is None if the user gave none."""


def choose_matrix(file: H5adFile, layer_name: str | None, say: Say) -> Matrix:
    """Return the matrix of this name; without a name `X`, or its stand-in if the file has no `X`.

    Raises:
        ValueError: If the file has no such matrix, if `X` is scaled and the file has its counts as well, or
            if a value is not a number.
    """
    matrix = _named(file, layer_name) or _x_or_stand_in(file, say)
    file.check(matrix)
    survey = matrix.survey()
    file.check_finite(matrix, survey)
    others = [key for key in (COUNTS_KEY, RAW_X_KEY) if key in file.matrices]
    if layer_name is None and survey.least < 0 and others:
        raise ValueError(
            f"{matrix.title} is centred or scaled (it holds {survey.least:g}), and the file has the values "
            f"before that; name a layer: {' or '.join(map(repr, others))}, or 'X' to take it as it is."
        )
    return matrix


def find_counts(file: H5adFile, layer_name: str | None, say: Say) -> Matrix:
    """Return the matrix of this name; without a name the first with counts, else the first without negatives.

    Raises:
        ValueError: If the file has no such matrix, or if a value is not a number.
    """
    first = _named(file, layer_name) or _x_or_stand_in(file, say)
    keys = [first.key] if layer_name else dict.fromkeys([first.key, COUNTS_KEY, RAW_X_KEY])
    candidates = [file.matrices[key] for key in keys if key in file.matrices]
    candidates = [matrix for matrix in candidates if len(file.var(matrix))] or candidates
    surveys: list[Survey] = []
    for matrix in candidates:
        file.check(matrix)
        survey = matrix.survey()
        if survey.is_usable and survey.is_whole:
            if matrix.key != first.key:
                say(f"no counts found in {first.name}: {matrix.name} is taken")
            return matrix
        surveys.append(survey)
    for matrix, survey in zip(candidates, surveys, strict=True):
        if survey.is_usable:
            names = ", ".join(candidate.name for candidate in candidates)
            say(f"no counts found in {names}: {matrix.name} is taken as it is")
            return matrix
    matrix, survey = candidates[0], surveys[0]
    file.check_finite(matrix, survey)
    found, way_out = (
        (f"{survey.least:g}", "before the values are centred or scaled")
        if survey.least < 0
        else ("nothing but 0", "with its values")
    )
    raise ValueError(
        f"{matrix.title} must hold counts, or other numbers of 0 or more, and holds {found}; write the file "
        f"{way_out}{file.other_than(matrix)}."
    )


def _named(file: H5adFile, layer_name: str | None) -> Matrix | None:
    if layer_name is None:
        return None
    what = f"one of the layers of {str(file.path)!r}"
    return file.matrices[check_name("layer_name", layer_name, file.matrices, of=what)]


def _x_or_stand_in(file: H5adFile, say: Say) -> Matrix:
    """Return `X`; if the file has no `X`, the layer "counts", the only layer, or `raw.X`."""
    if X_KEY in file.matrices:
        return file.matrices[X_KEY]
    layers = [key for key in file.matrices if key != RAW_X_KEY]
    for key in (COUNTS_KEY, *(layers if len(layers) == 1 else [] if layers else [RAW_X_KEY])):
        if key in file.matrices:
            say(f"{file.path.name} has no X: {file.matrices[key].name} is taken")
            return file.matrices[key]
    listed = (
        f"; name a layer: {' or '.join(map(repr, file.matrices))}" if file.matrices else ", and no layers"
    )
    raise ValueError(f"h5ad={str(file.path)!r} must have X, and has none{listed}.")
