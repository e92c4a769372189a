"""The plan of an epoch as JSON: which rows are read together, and who yields which.

`docs/plan_format.md` specifies it. The page `shuffle_viz` draws it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import attrs
import numpy as np
import tiledbsoma as soma

from tiledbsoma_ml._cli.query import check_selects, choose_measurement, filtering, open_experiment
from tiledbsoma_ml._common import NDArrayJoinId, absolute_uri, check_count
from tiledbsoma_ml._order.mixing import Labels
from tiledbsoma_ml._order.plan import EpochPart, PartPlan
from tiledbsoma_ml._order.quality import codes_of
from tiledbsoma_ml._query_ids import Partition
from tiledbsoma_ml.dataset import ExperimentDataset

__all__ = ["FORMAT", "FORMAT_VERSION", "PlanOptions", "plan_epoch"]

FORMAT = "tiledbsoma-ml plan"
FORMAT_VERSION = 1

LABEL = "dataset_id"
"""The column of `obs` whose labels are stored one after the other in the Census."""

Json: TypeAlias = dict[str, Any]


@attrs.frozen(kw_only=True)
class PlanOptions:
    """A query and an epoch of it; `ExperimentDataset` checks the options that it has itself.

    Attributes:
        uri: URI of the experiment.
        measurement_name: If None, "RNA" if there is one, else the only one.
        layer_name: If None, "raw" if there is one, else the only one.
        obs_filter: Rows to select, as a SOMA value filter; None for all.
        shuffle_chunk_size: A number, or "auto".
        io_batch_size: A number, or "auto".
        batch_size: Rows per mini-batch.
        seed: Seed of the order.
        epoch: Number of the epoch, from 0.
        world_size: Number of ranks.
        num_workers: Workers of each rank; with 0, each rank reads by itself.
        shuffle_scope: "partition" or "global".
        column: Column of `obs` for whose labels the mixing is predicted; if None, "dataset_id" if there is
            one, else labels of a model.
        limit: Rows that are listed, at most.
    """

    uri: str = attrs.field(converter=absolute_uri)
    measurement_name: str | None
    layer_name: str | None
    obs_filter: str | None
    shuffle_chunk_size: int | str
    io_batch_size: int | str
    batch_size: int
    seed: int
    epoch: int
    world_size: int
    num_workers: int
    shuffle_scope: str
    column: str | None
    limit: int

    def __attrs_post_init__(self) -> None:
        check_count("epoch", self.epoch, suggestion=0, minimum=0)
        check_count("world_size", self.world_size, suggestion=1)
        check_count("num_workers", self.num_workers, suggestion=0, minimum=0)
        check_count("limit", self.limit, suggestion=100_000)
        smallest = self.world_size * max(1, self.num_workers) * self.batch_size
        if self.limit < smallest:
            raise ValueError(
                f"limit={self.limit} must hold a mini-batch of every worker, {smallest} rows; try {smallest}."
            )


def plan_epoch(options: PlanOptions) -> Json:
    """Return the plan of an epoch; of `X`, only a sample is read.

    Raises:
        ValueError: If there is no such query, or an option breaks a rule.
    """
    with open_experiment(options.uri) as experiment:
        measurement_name = choose_measurement(options.measurement_name, experiment)
        obs_query = soma.AxisQuery(value_filter=options.obs_filter)
        with experiment.axis_query(measurement_name, obs_query=obs_query) as query:
            with filtering(options.obs_filter):
                n_rows = query.n_obs
            check_selects(options.obs_filter, n_rows, experiment)
            if options.column is None and LABEL in experiment.obs.keys():  # noqa: SIM118  # it is no mapping
                options = attrs.evolve(options, column=LABEL)
            dataset = ExperimentDataset(
                query,
                layer_name=options.layer_name,
                batch_size=options.batch_size,
                shuffle_chunk_size=options.shuffle_chunk_size,  # type: ignore[arg-type]  # it checks them
                io_batch_size=options.io_batch_size,  # type: ignore[arg-type]
                seed=options.seed,
                shuffle_scope=options.shuffle_scope,  # type: ignore[arg-type]
            )
    ids, tile = dataset.query_ids, dataset.source.row_tile
    planned = [
        dataset.plan.of(EpochPart(ids=ids, partition=worker, seed=options.seed, epoch=options.epoch))
        for worker in _workers(options)
    ]
    parts = [_part(part, options.limit // len(planned)) for part in planned]
    first = planned[0]
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "n_rows": n_rows,
        "row_tile": tile,
        "settings": _settings(options, measurement_name, dataset),
        "sizes": {"chunk_rows": first.chunk_rows, "io_batch_rows": first.window_rows},
        "predicted": _predicted(options, dataset, first),
        "is_whole": all(_n_listed(part) == part["n_rows"] for part in parts),
        "parts": parts,
    }


def _predicted(options: PlanOptions, dataset: ExperimentDataset, planned: PartPlan) -> Json:
    """Return what is predicted, from the plan of a worker."""
    joinids, column, labels = dataset.query_ids.obs_joinids, options.column, None
    if column is not None:
        labels = Labels.of_rows(codes_of(dataset.source.obs(joinids, [column])[column]))
    n_held = dataset.iterations.n_rows_held()
    return {
        "mixing": planned.predicted_mixing(labels),
        "global_mixing": planned.predicted_mixing(labels, "global"),
        "rows_held": n_held,
        "read_amplification": planned.read_sizes(dataset.source.row_tile).predicted_amplification(n_held),
    }


def _workers(options: PlanOptions) -> list[Partition]:
    """Return all workers, rank after rank; a rank that reads by itself counts as one."""
    n_workers = max(1, options.num_workers)
    return [
        Partition(rank, options.world_size, worker, n_workers)
        for rank in range(options.world_size)
        for worker in range(n_workers)
    ]


def _settings(options: PlanOptions, measurement_name: str, dataset: ExperimentDataset) -> Json:
    """Return the options, with the names that were chosen where none were given."""
    settings = attrs.asdict(options, filter=lambda field, _: field.name != "limit")
    return {**settings, "measurement_name": measurement_name, "layer_name": dataset.layer_name}


def _part(planned: PartPlan, limit: int) -> Json:
    """Return the reads and the mini-batches of one worker; chunks and IO batches list rows of those only."""
    batch_size, worker = planned.plan.batch_size, planned.part.partition
    io_batches = list(planned.io_batches())
    yielded = np.concatenate([planned.ids.obs_joinids[:0], *io_batches])
    chunks = _chunks(planned, yielded)
    n_listed = len(yielded) if len(yielded) <= limit else limit // batch_size * batch_size
    listed = np.sort(yielded[:n_listed])
    return {
        "rank": worker.rank,
        "worker": worker.worker_id,
        "n_rows": len(yielded),
        "n_chunks": len(chunks),
        "n_io_batches": len(io_batches),
        "n_mini_batches": planned.n_mini_batches,
        "chunks": _pieces(chunks, listed),
        "io_batches": _pieces(io_batches, listed),
        "mini_batches": [
            yielded[k : min(k + batch_size, n_listed)].tolist() for k in range(0, n_listed, batch_size)
        ],
    }


def _chunks(planned: PartPlan, yielded: NDArrayJoinId) -> list[NDArrayJoinId]:
    """Return the rows that are yielded, chunk after chunk: slices of the query, or runs of the layer."""
    if not len(yielded):
        return []
    order, joinids = planned.order, planned.ids.obs_joinids
    shuffled = order.rows(0, order.n_rows)
    shuffled = shuffled[np.isin(shuffled, yielded)]
    if planned.plan.shuffle_chunk_size == "auto":
        number = shuffled // planned.chunk_rows
    else:
        by_joinid = np.argsort(joinids, kind="stable")
        number = by_joinid[np.searchsorted(joinids, shuffled, sorter=by_joinid)] // planned.chunk_rows
    return np.split(shuffled, np.flatnonzero(np.diff(number)) + 1)


def _pieces(batches: Iterable[NDArrayJoinId], listed: NDArrayJoinId) -> list[Json]:
    """Return the listed rows of each batch that has any, and the number of all its rows."""
    pieces = []
    for batch in batches:
        position = np.minimum(np.searchsorted(listed, batch), max(0, len(listed) - 1))
        found = batch[listed[position] == batch] if len(listed) else batch[:0]
        if len(found):
            pieces.append({"n_rows": len(batch), "obs_joinids": found.tolist()})
    return pieces


def _n_listed(part: Json) -> int:
    return sum(map(len, part["mini_batches"]))
