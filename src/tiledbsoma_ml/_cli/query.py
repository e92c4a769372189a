"""The query of a command: its experiment, its measurement and its filter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import tiledbsoma as soma

from tiledbsoma_ml import _context
from tiledbsoma_ml._common import absolute_uri, check_name, first_line


@contextmanager
def open_experiment(uri: str) -> Iterator[soma.Experiment]:
    """Open an experiment; raise a ValueError if it cannot be opened."""
    address = absolute_uri(uri)
    try:
        experiment = _context.open_experiment(address)
    except (soma.SOMAError, TypeError, ValueError) as err:
        raise ValueError(
            f"uri={uri!r} must be a SOMA experiment, and cannot be opened as one ({first_line(err)}); "
            "check the path and your access to it."
        ) from err
    with experiment:
        yield experiment


def choose_measurement(name: str | None, experiment: soma.Experiment) -> str:
    """Return the measurement of this name; without a name "RNA" if there is one, else the only one."""
    known: list[str] = list(experiment.ms)
    if name is None and len(known) == 1:
        return known[0]
    return check_name("measurement_name", name or "RNA", known, of="a measurement of the experiment")


@contextmanager
def filtering(obs_filter: str | None) -> Iterator[None]:
    """Name the filter in an error of SOMA that is raised while it is applied."""
    try:
        yield
    except soma.SOMAError as err:
        raise ValueError(
            f"obs_filter={obs_filter!r} must be a filter that SOMA understands ({first_line(err)}); "
            "try one like \"assay == 'Smart-seq2' and donor_id != 'D1'\"."
        ) from err


def check_selects(obs_filter: str | None, n_selected: int, experiment: soma.Experiment) -> None:
    """Raise a ValueError if a query selects no cells."""
    if not n_selected and not obs_filter:
        raise ValueError(
            f"uri={experiment.uri!r} must be an experiment with cells, and has none; choose another."
        )
    if not n_selected:
        raise ValueError(
            f"obs_filter={obs_filter!r} must select cells, and selects none of {experiment.obs.count:,}; "
            "loosen it or leave it out."
        )
