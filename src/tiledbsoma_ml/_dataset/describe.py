"""What is shown of datasets, loaders and data modules: a line in a terminal, a table in a notebook."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from tiledbsoma_ml._dataset.iterations import Iterations
from tiledbsoma_ml._query_ids import Partition


def described(iterations: Iterations) -> dict[str, str]:
    """Return what there is to know about a dataset, as texts by name; nothing is read for it."""
    options, ids = iterations.options, iterations.ids
    partition = _partition(iterations)
    locator = iterations.source.locator
    return {
        "rows": f"{len(ids.obs_joinids):,} rows by {len(ids.var_joinids):,} columns",
        "source": type(iterations.source).__name__ if locator is None else repr(locator.uri),
        "batch_size": f"{options.batch_size:,}",
        **_sizes(iterations, partition),
        "shuffle": str(options.shuffle),
        **({"shuffle_scope": repr(options.shuffle_scope)} if options.shuffle else {}),
        "seed": str(options.seed),
        "X": ("sparse" if options.return_sparse_X else "dense")
        + ("" if options.device is None else f", on {options.device}"),
        "obs": ", ".join(options.obs_column_names),
        "rank": "unknown" if partition is None else f"{partition.rank} of {partition.world_size}",
    }


def _partition(iterations: Iterations) -> Partition | None:
    """Return this rank and worker; None if the environment variables contradict each other."""
    try:
        return iterations.partition()
    except ValueError:
        return None


def _sizes(iterations: Iterations, partition: Partition | None) -> dict[str, str]:
    """Return the sizes of chunks and IO batches, with what "auto" stands for as far as that is known."""
    options = iterations.options
    sizes = {"shuffle_chunk_size": options.shuffle_chunk_size, "io_batch_size": options.io_batch_size}
    if not options.shuffles_chunks:
        del sizes["shuffle_chunk_size"]
    shown = {name: f"{size:,}" for name, size in sizes.items() if isinstance(size, int)}
    unknown = dict.fromkeys(sizes.keys() - shown.keys(), "auto, which is found out when it is needed")
    if unknown and iterations.has_plan and partition is not None:
        found = iterations.plan.of(iterations.part(iterations.epoch, partition)).sizes
        assert found is not None
        known = {
            "shuffle_chunk_size": f"auto: runs of {found.run_length:,} rows",
            "io_batch_size": f"auto: windows of {found.window_rows:,} rows",
        }
        unknown = {name: known[name] for name in unknown}
    return {name: {**shown, **unknown}[name] for name in sizes}


def as_line(name: str, facts: Mapping[str, str]) -> str:
    """Return facts in a line."""
    first, *others = facts.items()
    listed = ", ".join(f"{key}={value}" for key, value in others)
    return f"<{name}: {first[1]}; {listed}>"


def as_table(name: str, facts: Mapping[str, str], not_in_use: Mapping[str, str] | None = None) -> str:
    """Return facts as a table in HTML, and the settings that are not in use, each with the reason."""
    rows = [*facts.items(), *((f"{key} (not in use)", why) for key, why in (not_in_use or {}).items())]
    left = "style='text-align:left'"
    cells = [f"<tr><th {left}>{escape(key)}</th><td {left}>{escape(value)}</td></tr>" for key, value in rows]
    caption = f"<caption {left}><b>{escape(name)}</b></caption>"
    return f"<table>{caption}<tbody>{''.join(cells)}</tbody></table>"
