"""Draw the plots and tables of the documentation from the newest results of `make bench`.

    python docs/plots.py            # reads benchmarks/results, writes docs/_generated

Building the documentation does the same.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "benchmarks"))

import report  # noqa: E402

COMMAND = "make bench BENCH_ARGS=--save"

# Colours that keep apart for colour-blind eyes, on white and on near-black.
THEMES: Mapping[str, Mapping[str, str]] = {
    "light": {"ink": "#24292f", "grid": "#d9dee3", "ours": "#0b6bcb", "raw": "#6b7280", "others": "#b45309"},
    "dark": {"ink": "#d6dae0", "grid": "#3a4048", "ours": "#58a6ff", "raw": "#9aa4b1", "others": "#e3a04a"},
}

# What a user chooses between: the case of its epochs, of 0.1.0 for comparison, and what is made beforehand.
PATHS = (
    ("0.1.0, defaults", "0.1.0 default, sparse", None),
    ("streaming, defaults", "default, sparse", None),
    ('streaming, "auto"', "auto, sparse", None),
    ("training layout", "chunk 64, training layout", None),
    ("snapshot", "snapshot, single rows, sparse", "snapshot, creation"),
)
EPOCHS = 20


class Results:
    """The results of one run of the benchmarks: its cases by name, those that failed left out."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content = content
        self.cases = {case["name"]: case for case in content["cases"] if case["status"] == "ok"}

    @classmethod
    def newest(cls, folder: Path = RESULTS) -> Results:
        """Return the latest results in a folder, those of real cells before those of light ones."""
        files = [json.loads(path.read_text()) for path in folder.glob("*.json")]
        if not files:
            raise ValueError(f"{folder} must hold results of the benchmarks; run `{COMMAND}`.")
        return cls(max(files, key=lambda content: (report.kind_of(content) == "census", content["date"])))

    def has(self, *names: str) -> bool:
        """Whether all of these cases were measured."""
        return all(name in self.cases for name in names)

    @property
    def source(self) -> str:
        """Where the figures come from, in a sentence."""
        on = self.content["machine"]
        return (
            f"`{COMMAND}`, {self.content['date'][:10]}, {on['cores']} cores of {on['cpu']}, "
            f"{on['memory_gib']:g} GiB, {report.describe_data(self.content)}, page cache warm."
        )


def write_all(folder: Path, results: Results | None = None) -> None:
    """Write every plot, light and dark, and every table to a folder."""
    results = results or Results.newest()
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "source": results.source,
        "paths": paths_table(results),
        "cases": report.as_markdown(report.case_table(results.content["cases"])),
        "goals": report.as_markdown(report.goal_table(results.content["goals"])),
    }
    for name, text in texts.items():
        (folder / f"{name}.md").write_text(text + "\n")
    plots: Mapping[str, Callable[[Results, Mapping[str, str]], Figure]] = {
        "speed": draw_speed,
        "memory": draw_memory,
        "budgets": draw_budgets,
        "epochs": draw_epochs,
    }
    for name, draw in plots.items():
        for theme, colours in THEMES.items():
            with _style(colours):
                figure = draw(results, colours)
                FigureCanvasSVG(figure)
                # Without a date and with fixed ids, equal figures are equal files.
                figure.savefig(folder / f"{name}-{theme}.svg", transparent=True, metadata={"Date": None})


@contextmanager
def _style(colours: Mapping[str, str]) -> Iterator[None]:
    ink = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), colours["ink"])
    looks = {"axes.edgecolor": colours["grid"], "grid.color": colours["grid"], "font.size": 10}
    with mpl.rc_context({**ink, **looks, "svg.hashsalt": "tiledbsoma-ml"}):
        yield


# Tables -------------------------------------------------------------------------------------------------


def paths_table(results: Results) -> str:
    """Return what the ways to read cost, as a Markdown table."""
    heading = ["way", "made beforehand", "an epoch", "rows/s", "million non-zeros/s"]
    rows = [[*heading, "first mini-batch", "peak memory", "mixing"]]
    for title, name, before in PATHS:
        if not results.has(name):
            continue
        case = results.cases[name]
        rows.append(
            [
                title,
                f"{results.cases[before]['seconds']:.0f} s" if before and results.has(before) else "-",
                f"{_epoch_s(results, name):.1f} s",
                f"{case['rows_per_s']:,.0f}",
                f"{case['rows_per_s'] * results.content['data']['nnz_per_row'] / 1e6:,.0f}",
                f"{case['first_s']:.1f} s",
                f"{case['peak_anon_mib']:,.0f} MiB",
                f"{min(case['mixing'], 1):.3f}",
            ]
        )
    return report.as_markdown(rows)


def _epoch_s(results: Results, name: str) -> float:
    """Return the seconds of a whole epoch, also where the measurement was cut short."""
    return results.content["data"]["rows"] / results.cases[name]["rows_per_s"]


# Plots ----------------------------------------------------------------------------------------------


def draw_speed(results: Results, colours: Mapping[str, str]) -> Figure:
    """Rows per second of every way to get mini-batches of sparse rows."""
    return _dots(_compared(results), "rows_per_s", "rows per second (logarithmic)", "{:,.0f}", colours)


def draw_memory(results: Results, colours: Mapping[str, str]) -> Figure:
    """Peak anonymous memory of the same."""
    title = "peak anonymous memory above the imports, MiB (logarithmic)"
    return _dots(_compared(results), "peak_anon_mib", title, "{:,.0f} MiB", colours)


def _compared(results: Results) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Return (name, kind, case) of the cases that say how fast rows come, slowest first."""
    peers = [(case["name"], "others", case) for case in results.cases.values() if case.get("peer")]
    ours = {
        "streaming, defaults": "default, sparse",
        "streaming, chunk 2048": "chunk 2048, sparse",
        'streaming, "auto"': "auto, sparse",
        "training layout, chunk 64": "chunk 64, training layout",
        "snapshot, single rows": "snapshot, single rows, sparse",
        "snapshot, single rows, dense": "snapshot, single rows, dense",
        "snapshot, chunk 64": "snapshot, chunk 64, sparse",
    }
    own = [(title, "ours", results.cases[name]) for title, name in ours.items() if results.has(name)]
    scans = {
        "TileDB alone: scan of X": "raw scan",
        "TileDB alone, freed memory kept": "tuned scan",
    }
    raw = [(title, "raw", results.cases[name]) for title, name in scans.items() if results.has(name)]
    return sorted([*peers, *own, *raw], key=lambda item: item[2]["rows_per_s"])


def _dots(
    rows: Sequence[tuple[str, str, Mapping[str, Any]]],
    key: str,
    label: str,
    form: str,
    colours: Mapping[str, str],
) -> Figure:
    """Draw one dot for each row, with its figure beside it."""
    rows = sorted((row for row in rows if row[2].get(key)), key=lambda row: row[2][key])
    figure = Figure(figsize=(7.2, 0.9 + 0.3 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    values = [case[key] for _, _, case in rows]
    for place, (_, kind, case) in enumerate(rows):
        axes.plot([min(values) / 1.5, case[key]], [place, place], color=colours["grid"], linewidth=1)
        axes.plot(case[key], place, MARKERS[kind], color=colours[kind], markersize=7)
        axes.annotate(
            form.format(case[key]), (case[key], place), (8, 0), textcoords="offset points", va="center"
        )
    axes.set(xscale="log", xlabel=label, xlim=(min(values) / 1.5, max(values) * 3))
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    _plain(axes.xaxis)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    names = {"ours": "this package", "raw": "TileDB alone", "others": "other loaders"}
    for kind in dict.fromkeys(kind for _, kind, _ in rows):
        axes.plot([], [], MARKERS[kind], color=colours[kind], label=names[kind])
    axes.legend(frameon=False, loc="lower right")
    return figure


MARKERS = {"ours": "o", "raw": "s", "others": "D"}


def draw_budgets(results: Results, colours: Mapping[str, str]) -> Figure:
    """Rows per second against the memory budget, with "auto"."""
    sizes = {"256MiB": 256, "512MiB": 512, "1GiB": 1024, "2GiB": 2048}
    points = [
        (size, results.cases[f"auto {name}"]["rows_per_s"])
        for name, size in sizes.items()
        if results.has(f"auto {name}")
    ]
    figure, axes = _frame()
    axes.plot(*zip(*points, strict=True), "o-", color=colours["ours"], label="window in memory")
    if results.has("auto 256MiB, window on disk"):
        value = results.cases["auto 256MiB, window on disk"]["rows_per_s"]
        axes.plot(
            256, value, "s", color=colours["ours"], fillstyle="none", markersize=8, label="window on disk"
        )
    if results.has("tuned scan"):
        scan = results.cases["tuned scan"]["rows_per_s"]
        axes.axhline(scan, color=colours["raw"], linestyle="--", label="TileDB alone: tuned scan")
    axes.set(xscale="log", xlabel="memory_budget", ylabel="rows per second", ylim=(0, None))
    axes.set_xticks([size for size, _ in points], [name for name in sizes if results.has(f"auto {name}")])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_epochs(results: Results, colours: Mapping[str, str]) -> Figure:
    """Seconds until so many epochs have been read, for what a user chooses between."""
    figure, axes = _frame()
    looks = [("others", "--"), ("ours", ":"), ("ours", "-."), ("ours", "--"), ("ours", "-")]
    ends = []
    for (title, name, before), (kind, line) in zip(PATHS, looks, strict=True):
        if not results.has(name):
            continue
        start = results.cases[before]["seconds"] if before and results.has(before) else 0.0
        epochs = range(1, EPOCHS + 1)
        seconds = [start + n * _epoch_s(results, name) for n in epochs]
        axes.plot(epochs, seconds, line, color=colours[kind], linewidth=1.8)
        ends.append((title, seconds[-1]))
    _label_ends(axes, ends)
    axes.set(yscale="log", xlabel="epochs", ylabel="seconds, all epochs (logarithmic)", xlim=(1, EPOCHS))
    axes.set_xticks([1, 5, 10, 15, 20])
    _plain(axes.yaxis)
    return figure


def _label_ends(axes: Axes, ends: Sequence[tuple[str, float]]) -> None:
    """Name each line at its right end, with labels pushed apart where lines meet."""
    lowest = 0.0
    for title, value in sorted(ends, key=lambda end: end[1]):
        place = max(value, lowest)
        axes.annotate(title, (EPOCHS, place), (6, 0), textcoords="offset points", va="center")
        lowest = place * 1.5


def _frame() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _plain(axis: Any) -> None:
    """Write the numbers of a logarithmic axis in full."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.set_minor_formatter(NullFormatter())


if __name__ == "__main__":
    write_all(Path(__file__).parent / "_generated")
