"""`Facts`: what a dataset says about itself. Nothing is read or written for it, but for `plan`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch

from tiledbsoma_ml._common import check_bool
from tiledbsoma_ml._dataset.describe import as_line, as_table, described
from tiledbsoma_ml._dataset.iterations import Iterations
from tiledbsoma_ml._dataset.options import Options, ShuffleMode, check_ranks
from tiledbsoma_ml._order.plan import Plan
from tiledbsoma_ml._order.share import ShuffleScope
from tiledbsoma_ml._order.sizes import Size
from tiledbsoma_ml._query_ids import QueryIDs, Tail
from tiledbsoma_ml._source import Source
from tiledbsoma_ml.x_locator import XLocator

_OPTIONS = frozenset(attrs.fields_dict(Options))
_CHANGEABLE: Mapping[str, Callable[[Any], Any]] = {
    "ranks": check_ranks,
    "return_sparse_X": partial(check_bool, "return_sparse_X"),
    "use_eager_fetch": partial(check_bool, "use_eager_fetch"),
}
"""Options that neither the order of the epoch depends on, nor what is read, each with its check."""


class Facts:
    """What a dataset consists of, and its options as attributes.

    Attributes:
        iterations: The epochs of the dataset, with its source, rows and options.
        not_in_use: Settings that were made and change nothing, each with the reason.
    """

    iterations: Iterations
    not_in_use: dict[str, str]

    batch_size: int
    device: torch.device | None
    io_batch_size: Size
    memory_budget: int
    mixing: float | None
    obs_column_names: list[str]
    padding_column_name: str | None
    ranks: tuple[int, int] | None
    return_sparse_X: bool
    seed: int | None
    shuffle: bool
    shuffle_chunk_size: Size
    shuffle_mode: ShuffleMode
    shuffle_scope: ShuffleScope
    tail: Tail
    use_eager_fetch: bool
    window_budget: int
    window_dir: Path | None

    @property
    def source(self) -> Source:
        """The source of the rows."""
        return self.iterations.source

    @property
    def query_ids(self) -> QueryIDs:
        """The rows and columns that are read."""
        return self.iterations.ids

    @property
    def options(self) -> Options:
        """All settings, checked and resolved; each of them is an attribute of the dataset as well."""
        return self.iterations.options

    @property
    def plan(self) -> Plan:
        """The order of rows, and what is read together, with what "auto" stands for.

        That is found out when it is first asked for; a snapshot that it depends on is made.
        """
        return self.iterations.plan

    @property
    def x_locator(self) -> XLocator | None:
        """Address of the layer; None if `X` is of no experiment, or a snapshot alone was given."""
        return self.source.locator

    @property
    def measurement_name(self) -> str | None:
        """Measurement that `X` is read from; None if `x_locator` is."""
        return None if self.x_locator is None else self.x_locator.measurement_name

    @property
    def layer_name(self) -> str | None:
        """Layer of `X`; None if `x_locator` is."""
        return None if self.x_locator is None else self.x_locator.layer_name

    @property
    def shape(self) -> tuple[int, int]:
        """Number of mini-batches, as `len` has it, and number of columns of `X`."""
        return self.iterations.n_mini_batches(), len(self.query_ids.var_joinids)

    @property
    def rank(self) -> int:
        """Number of this process among those that train, as it is known now."""
        return self.iterations.ranks[0]

    @property
    def world_size(self) -> int:
        """Number of processes that train, as it is known now."""
        return self.iterations.ranks[1]

    def __getattr__(self, name: str) -> Any:
        """Return an option."""
        if name in _OPTIONS and "iterations" in self.__dict__:
            value = getattr(self.options, name)
            return list(value) if name == "obs_column_names" else value
        return object.__getattribute__(self, name)  # raises the error of a property that failed, too

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _CHANGEABLE:
            self.iterations.options = attrs.evolve(self.options, **{name: _CHANGEABLE[name](value)})
        elif name in _OPTIONS or name in ("query_ids", "source", "x_locator"):
            raise AttributeError(
                f"{name} of a dataset cannot be changed, for its order was made with it; make another "
                f"dataset: ExperimentDataset(…, {name}={value!r})."
            )
        else:
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_OPTIONS})

    def __repr__(self) -> str:
        """Return one line with the rows, the source and the settings of the dataset."""
        return as_line(type(self).__name__, described(self.iterations))

    def _repr_html_(self) -> str:
        """Return the same as a table, with the settings that are not in use."""
        return as_table(type(self).__name__, described(self.iterations), self.not_in_use)
