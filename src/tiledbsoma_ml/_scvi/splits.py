"""`Splits`: the cells of a query that a model of scvi-tools is trained on, and those for validation."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import attrs

from tiledbsoma_ml._dataset.options import OF_SHUFFLING
from tiledbsoma_ml._query_ids import QueryIDs
from tiledbsoma_ml.dataset import ExperimentDataset


@attrs.frozen(kw_only=True, eq=False)
class Splits:
    """The cells to train on, and those for validation.

    Attributes:
        ids: All cells of the query.
        train: The cells to train on, shuffled.
        val: The other cells, sorted by joinid; None if there are none.
    """

    ids: QueryIDs
    train: ExperimentDataset
    val: ExperimentDataset | None

    @classmethod
    def create(cls, where: Mapping[str, Any], options: Mapping[str, Any], train_size: float) -> Splits:
        """Split a query.

        Args:
            where: The arguments of `ExperimentDataset` that say what is read.
            options: Its other arguments; the seed is that of the split as well.
            train_size: Share of the cells to train on.

        Raises:
            ValueError: If the share leaves a split without cells.
        """
        check_train_size(train_size)
        whole = ExperimentDataset(**where, **options)
        ids = whole.query_ids
        if train_size == 1:
            return cls(ids=ids, train=whole, val=None)
        train_ids, val_ids = ids.random_split(train_size, 1 - train_size, seed=options["seed"])
        for split, what in ((train_ids, "to train on"), (val_ids, "for validation")):
            if not len(split.obs_joinids):
                raise ValueError(
                    f"train_size={train_size} must leave at least one of {len(ids.obs_joinids):,} cells "
                    f"{what}, but leaves none; try 0.9, or train_size=1 for no validation."
                )
        kept = {name: value for name, value in options.items() if name not in OF_SHUFFLING}
        in_order = ExperimentDataset(source=whole.source, query_ids=ids, **kept | {"shuffle": False})
        return cls(ids=ids, train=whole.over(train_ids), val=in_order.over(val_ids))

    def with_batch_size(self, batch_size: int) -> Splits:
        """Return the same splits in mini-batches of another size; the epoch that comes next is the same."""
        train, val = (self._resized(split, batch_size) for split in (self.train, self.val))
        assert train is not None
        train.set_epoch(self.train.iterations.upcoming_epoch)
        return attrs.evolve(self, train=train, val=val)

    def _resized(self, split: ExperimentDataset | None, batch_size: int) -> ExperimentDataset | None:
        """Return a split anew; "auto" is chosen for the whole query."""
        if split is None:
            return None
        return split.over(self.ids).with_batch_size(batch_size).over(split.query_ids)


def check_train_size(train_size: object) -> None:
    """Raise a ValueError unless it is a share above 0."""
    if not isinstance(train_size, Real) or not 0 < float(train_size) <= 1:
        raise ValueError(f"train_size={train_size!r} must be a share above 0, up to 1; try 0.9.")
