"""`Selection`: the cells and genes of a query, as a model knows them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np
import tiledbsoma as soma
from numpy.typing import NDArray

from tiledbsoma_ml._query_ids import QueryIDs
from tiledbsoma_ml._scvi.cells import Cells, Known, Roles
from tiledbsoma_ml._scvi.genes import Genes
from tiledbsoma_ml._scvi.labels import Unseen
from tiledbsoma_ml._scvi.models import registry_of
from tiledbsoma_ml._scvi.registry import gene_ids_of, known_of, roles_of
from tiledbsoma_ml.x_locator import XLocator

CENSUS_BATCH_COLUMNS = ("dataset_id", "assay", "suspension_type", "donor_id")
"""Columns that together are the batch in the CELLxGENE Census."""


@attrs.frozen(kw_only=True, eq=False)
class Scheme:
    """The columns of `obs`, the categories that have a code, and the genes that a model reads.

    Attributes:
        roles: The columns.
        known: The categories that have a code already.
        gene_ids: The genes; None where those of the query are to be taken.
        var_column_name: Column of `var` that names genes; None where one is to be found.
    """

    roles: Roles
    known: Known
    gene_ids: NDArray[np.object_] | None
    var_column_name: str | None

    @classmethod
    def create(
        cls, roles: Roles, batch_labels: Sequence[str] | None, reference: Any, var_column_name: str | None
    ) -> Scheme:
        """Return the scheme of a reference, or that of the columns and batches that were named.

        Raises:
            ValueError: If both are given, or they do not fit together.
        """
        known, gene_ids = Known(batch=_check_batch_labels(batch_labels)), None
        if reference is not None:
            registry = registry_of(reference)
            _check_only_reference(roles, batch_labels)
            roles, known, gene_ids = roles_of(registry), known_of(registry), gene_ids_of(registry)
        if roles.unlabeled is not None and roles.label is None:
            raise ValueError(
                f"unlabeled_category={roles.unlabeled!r} must come with label_column_name; name the column."
            )
        return cls(roles=roles, known=known, gene_ids=gene_ids, var_column_name=var_column_name)


@attrs.frozen(kw_only=True, eq=False)
class Selection:
    """The cells and genes of a query.

    Attributes:
        cells: What models read of each cell.
        genes: The genes, and which of them the query has.
        locator: Address of the layer of `X`.
        ids: The cells, in the order of the query, and the genes that it has, in the order of the model.
    """

    cells: Cells
    genes: Genes
    locator: XLocator
    ids: QueryIDs

    @classmethod
    def read(
        cls,
        query: soma.ExperimentAxisQuery,
        layer_name: str | None,
        scheme: Scheme,
        *,
        unseen: Unseen,
        is_inference: bool = False,
    ) -> Selection:
        """Read what a scheme asks for.

        Args:
            query: The cells and genes; its experiment must be open.
            layer_name: Layer of `X`; see `ExperimentDataset`.
            scheme: What to read.
            unseen: The treatment of batches that have no code; see `SCVIDataModule`.
            is_inference: Whether nothing is trained on the cells, so that their labels may be missing.

        Raises:
            ValueError: If the query selects nothing, or does not fit the scheme.
        """
        ids = _check_not_empty(QueryIDs.create(query))
        genes = Genes.read(query, ids.var_joinids, scheme.var_column_name, scheme.gene_ids)
        cells = Cells.read(
            query, ids.obs_joinids, scheme.roles, scheme.known, unseen=unseen, is_inference=is_inference
        )
        locator = XLocator.create(query.experiment, query.measurement_name, layer_name)
        ids = attrs.evolve(ids, var_joinids=genes.var_joinids)
        return cls(cells=cells, genes=genes, locator=locator, ids=ids)


def batch_columns(
    query: soma.ExperimentAxisQuery, names: Sequence[str] | None, reference: Any
) -> tuple[str, ...]:
    """Return the columns that together are the batch; without names those of the Census, if all are there."""
    if names is not None or reference is not None:
        return check_list("batch_column_names", names or ())
    is_census = set(CENSUS_BATCH_COLUMNS) <= set(query.experiment.obs.keys())
    return CENSUS_BATCH_COLUMNS if is_census else ()


def check_list(parameter: str, names: Sequence[str]) -> tuple[str, ...]:
    """Return names, having checked that they are several, or none, and not one string."""
    if isinstance(names, str):
        raise TypeError(f"{parameter}={names!r} must be a list of names; try [{names!r}].")
    return tuple(names)


def _check_batch_labels(labels: Sequence[str] | None) -> list[str] | None:
    if labels is None:
        return None
    names = [str(label) for label in labels]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"batch_labels must name each batch once, but has {twice[0]!r} twice; name it once.")
    return names


def _check_only_reference(roles: Roles, batch_labels: Sequence[str] | None) -> None:
    given = [name for name, columns in roles.by_parameter().items() if columns]
    given += ["unlabeled_category"] if roles.unlabeled is not None else []
    given += ["batch_labels"] if batch_labels is not None else []
    if given:
        raise ValueError(
            f"{', '.join(given)} must be left out where reference is given: the model knows its columns."
        )


def _check_not_empty(ids: QueryIDs) -> QueryIDs:
    for axis, joinids in (("cell", ids.obs_joinids), ("gene", ids.var_joinids)):
        if not len(joinids):
            raise ValueError(
                f"the query must select at least one {axis}, but selects none; check its filters."
            )
    return ids
