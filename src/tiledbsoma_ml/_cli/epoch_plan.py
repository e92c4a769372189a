"""The plan of an epoch: which rows are read together and who yields which, for `tiledbsoma-ml plan`.

`docs/plan_format.md` specifies it. The page `shuffle_viz` draws it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import attrs
import numpy as np
import tiledbsoma as soma

from tiledbsoma_ml._cli.demo import choose_measurement, open_experiment
from tiledbsoma_ml._common import NDArrayJoinId, absolute_uri, check_count, first_line
from tiledbsoma_ml._order.plan import EpochPart, PartPlan
from tiledbsoma_ml._order.sizes import read_amplification
from tiledbsoma_ml._query_ids import Partition
from tiledbsoma_ml.dataset import ExperimentDataset

__all__ = ["FORMAT", "FORMAT_VERSION", "PlanOptions", "plan_epoch"]

FORMAT = "tiledbsoma-ml plan"
FORMAT_VERSION = 1

Json: TypeAlias = dict[str, Any]


@attrs.frozen(kw_only=True)
class PlanOptions:
    """What to plan: a query, and how it is read.

    Attributes:
        uri: Where the experiment is.
        measurement_name: If None, "RNA" if there is one, else the only one.
        layer_name: If None, "raw" if there is one, else the only one.
        obs_filter: Which rows, as a SOMA value filter; all if None.
        shuffle_chunk_size: As `ExperimentDataset` has it, and so are the others.
        io_batch_size: A number, or "auto".
        batch_size: Rows per mini-batch.
        seed: Seed of the order.
        epoch: Which epoch.
        world_size: Number of ranks.
        num_workers: Workers of each rank; 0 where the training process reads.
        shuffle_scope: "partition" or "global".
        limit: Rows that are listed, at most.
    """

    uri: str = attrs.field(converter=absolute_uri)
    measurement_name: str | None = None
    layer_name: str | None = None
    obs_filter: str | None = None
    shuffle_chunk_size: int | str = 64
    io_batch_size: int | str = 65_536
    batch_size: int = 1024
    seed: int = 0
    epoch: int = 0
    world_size: int = 1
    num_workers: int = 0
    shuffle_scope: str = "partition"
    limit: int = 100_000

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
    """Return the plan of an epoch, without reading `X`.

    Raises:
        ValueError: If there is no such query, or an option breaks a rule.
    """
    with open_experiment(options.uri) as experiment:
        measurement_name = choose_measurement(options.measurement_name, experiment)
        obs_query = soma.AxisQuery(value_filter=options.obs_filter)
        with experiment.axis_query(measurement_name, obs_query=obs_query) as query:
            _check_filter(options.obs_filter, query)
            dataset = ExperimentDataset(
                query,
                layer_name=options.layer_name,
                batch_size=options.batch_size,
                shuffle_chunk_size=options.shuffle_chunk_size,  # type: ignore[arg-type]  # it checks them
                io_batch_size=options.io_batch_size,  # type: ignore[arg-type]
                seed=options.seed,
                shuffle_scope=options.shuffle_scope,  # type: ignore[arg-type]
            )
    plan, ids, tile = dataset.plan, dataset.query_ids, dataset.source.row_tile
    places = [
        Partition(rank, options.world_size, worker, max(1, options.num_workers))
        for rank in range(options.world_size)
        for worker in range(max(1, options.num_workers))
    ]
    planned = [
        plan.of(EpochPart(ids=ids, partition=place, seed=options.seed, epoch=options.epoch))
        for place in places
    ]
    parts = [_part(part, options.limit // len(places)) for part in planned]
    first = planned[0]
    times = read_amplification(first.chunk_rows, first.window_rows, tile, parts[0]["n_rows"])
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "n_rows": len(ids.obs_joinids),
        "row_tile": tile,
        "settings": {
            "uri": options.uri,
            "measurement_name": measurement_name,
            "layer_name": dataset.layer_name,
            "obs_filter": options.obs_filter,
            "shuffle_chunk_size": dataset.shuffle_chunk_size,
            "io_batch_size": dataset.io_batch_size,
            "batch_size": dataset.batch_size,
            "seed": options.seed,
            "epoch": options.epoch,
            "world_size": options.world_size,
            "num_workers": options.num_workers,
            "shuffle_scope": plan.scope,
        },
        "sizes": {"chunk_rows": first.chunk_rows, "io_batch_rows": first.window_rows},
        "predicted": {"mixing": first.predicted_mixing, "read_amplification": times},
        "is_whole": all(_n_listed(part) == part["n_rows"] for part in parts),
        "parts": parts,
    }


def _check_filter(obs_filter: str | None, query: soma.ExperimentAxisQuery) -> None:
    try:
        n_rows = query.n_obs
    except soma.SOMAError as err:
        raise ValueError(
            f"obs_filter={obs_filter!r} must be a filter that SOMA understands ({first_line(err)}); "
            "try one like \"assay == 'Smart-seq2' and donor_id != 'D1'\"."
        ) from err
    if not n_rows:
        raise ValueError(f"obs_filter={obs_filter!r} must select cells, and selects none; loosen it.")


def _part(planned: PartPlan, limit: int) -> Json:
    """Return what one worker reads and yields; of chunks and IO batches, the rows that mini-batches list."""
    batch_size, place = planned.plan.batch_size, planned.part.partition
    io_batches = list(planned.io_batches())
    yielded = np.concatenate([planned.ids.obs_joinids[:0], *io_batches])
    chunks = _chunks(planned, yielded)
    n_listed = len(yielded) if len(yielded) <= limit else limit // batch_size * batch_size
    listed = np.sort(yielded[:n_listed])
    return {
        "rank": place.rank,
        "worker": place.worker_id,
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
    """Return batches that have listed rows: these rows, and how many there are in all."""
    pieces = []
    for batch in batches:
        place = np.minimum(np.searchsorted(listed, batch), max(0, len(listed) - 1))
        found = batch[listed[place] == batch] if len(listed) else batch[:0]
        if len(found):
            pieces.append({"n_rows": len(batch), "obs_joinids": found.tolist()})
    return pieces


def _n_listed(part: Json) -> int:
    return sum(map(len, part["mini_batches"]))
