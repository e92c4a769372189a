"""Results as an aligned table, as Markdown, and as files."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[Mapping[str, Any]]

_CASE_COLUMNS = (
    ("case", "name", "{}"),
    ("rows/s", "rows_per_s", "{:,.0f}"),
    ("million nz/s", "million_nnz_per_s", "{:,.1f}"),
    ("of scan", "of_scan", "{:.2f}"),
    ("seconds", "seconds", "{:.2f}"),
    ("first s", "first_s", "{:.2f}"),
    ("raw first s", "first_raw_s", "{:.2f}"),
    ("peak MiB", "peak_mib", "{:,.0f}"),
    ("anon MiB", "peak_anon_mib", "{:,.0f}"),
    ("CPU s", "cpu_s", "{:.1f}"),
    ("CPU ns/nz", "cpu_ns_per_nnz", "{:.1f}"),
    ("mixing", "mixing", "{:.3f}"),
    ("note", "note", "{}"),
)
_GOAL_COLUMNS = (
    ("goal", "what", "{}"),
    ("figure", "figure", "{:.2f}"),
    ("bound", "goal", "{}"),
    ("verdict", "verdict", "{}"),
)


def case_table(rows: Rows) -> list[list[str]]:
    """Return the cells of the table of cases, headings first."""
    return _cells(rows, _CASE_COLUMNS)


def goal_table(rows: Rows) -> list[list[str]]:
    """Return the cells of the table of goals, headings first."""
    return _cells(rows, _GOAL_COLUMNS)


def _cells(rows: Rows, columns: Sequence[tuple[str, str, str]]) -> list[list[str]]:
    def cell(row: Mapping[str, Any], key: str, form: str) -> str:
        return "-" if row.get(key) is None else form.format(row[key])

    # A column in the middle without any figure is left out.
    named = [key for _, key, _ in columns if any(row.get(key) is not None for row in rows)]
    columns = [column for column in columns if column[1] in (columns[0][1], *named, columns[-1][1])]
    heading = [title for title, _, _ in columns]
    return [heading, *([cell(row, key, form) for _, key, form in columns] for row in rows)]


def as_text(table: list[list[str]]) -> str:
    """Return cells in aligned columns: the first and the last to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        middle = [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *middle, row[-1]]).rstrip())
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def as_markdown(table: list[list[str]]) -> str:
    """Return cells as a Markdown table."""
    align = ["---", *(["---:"] * (len(table[0]) - 2)), "---"]
    return "\n".join("| " + " | ".join(row) + " |" for row in [table[0], align, *table[1:]])


def machine() -> dict[str, Any]:
    """Return what the figures were taken on, and with."""
    packages = ("tiledbsoma-ml", "tiledbsoma", "numpy", "scipy", "pandas", "pyarrow", "numba", "torch")
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
    }


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def save(report: Mapping[str, Any], folder: Path) -> Path:
    """Write `<date>-<machine>.json` and `.md` to a folder, and return the path of the first."""
    on = report["machine"]
    name = f"{report['date'][:10]}-{kind_of(report)}-cells-{on['cores']}-core-{on['cpu']}"
    path = folder / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    versions = ", ".join(f"{k} {v}" for k, v in on["packages"].items())
    title = f"# {report['date'][:10]}, {on['cores']} cores of {on['cpu']}, {on['memory_gib']} GiB"
    about = f"{describe_data(report)}; medians of {report['repetitions']}. Python {on['python']}, {versions}."
    tables = [as_markdown(case_table(report["cases"])), as_markdown(goal_table(report["goals"]))]
    path.with_suffix(".md").write_text("\n\n".join([title, about, *tables]) + "\n")
    return path


def kind_of(report: Mapping[str, Any]) -> str:
    """Return the kind of cells of a report; at first there were only light ones."""
    return report.get("data", {}).get("kind", "light")


def describe_data(report: Mapping[str, Any]) -> str:
    """Return which cells a report is about, and the size of mini-batches."""
    data = report["data"]
    return (
        f"{data['rows']:,} cells of {data['genes']:,} genes, {data['nnz_per_row']:,g} non-zeros a cell "
        f"(`--cells {kind_of(report)}`), mini-batches of {report['batch_size']:,}"
    )


def today() -> str:
    """Return the date and time, in UTC."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
