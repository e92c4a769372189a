"""Measure how fast mini-batches come: from this package, from TileDB alone, and from other loaders.

    python benchmarks/run.py --quick
    python benchmarks/run.py --save
    python benchmarks/run.py --cells light --save
    python benchmarks/run.py --only "auto*" --peers none

Each measurement runs in a process of its own. See benchmarks/README.md for the method.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from fnmatch import fnmatch
from pathlib import Path
from statistics import median
from typing import Any

import report
from cases import AUTO, CASES, SCRATCH, SNAPSHOT, ZSTD_SNAPSHOT, Case
from envs import HERE, PEERS, NotInstalledError, peer_python
from goals import assess_goals
from latency import serving
from make_data import DataSpec, add_size_options, make_data, nnz_of, spec_of

SCRIPTS = {
    "epoch": "child.py",
    "first_batch": "child.py",
    "plan": "child.py",
    "predictions": "child.py",
    "scan": "raw.py",
    "start_workers": "child.py",
    "create_snapshot": "child.py",
    "make_snapshot": "child.py",
    "scvi": "child.py",
}
_NO_PARALLEL_MERGE = {"TILEDB_SM_QUERY_SPARSE_GLOBAL_ORDER_PREPROCESS_TILE_MERGE": "0"}  # it can crash
_SNAPSHOTS = {SNAPSHOT: ".snapshot", ZSTD_SNAPSHOT: ".zstd.snapshot"}  # endings of their names
_OF_CELLS = ("epoch", "peer", "scvi")  # kinds whose rows are cells
_CONVERTING = ("annbatch", "bionemo_scdl", "slafdb")  # peers that make a store of their own of the file
QUICK = {"rows": 16_384, "repetitions": 1, "peers": "none"}


def main() -> None:
    options = parse_options()
    cases = choose_cases(options)
    if options.list:
        print("\n".join(case.name for case in cases))
        return
    result = measure_all(cases, options)
    print(report.as_text(report.case_table(result["cases"])))
    print()
    print(report.as_text(report.goal_table(result["goals"])))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nJSON: {options.json}")
    if options.save:
        print(f"Saved: {report.save(result, HERE / 'results')}")


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small data, once, no peers: under two minutes")
    parser.add_argument(
        "--only", action="append", metavar="PATTERN", help="cases whose name matches; repeatable"
    )
    parser.add_argument("--peers", default="all", help=f"all, none, or some of: {', '.join(PEERS)}")
    parser.add_argument("--repetitions", type=int, default=3, help="alternated (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=1024, help="default: %(default)s")
    parser.add_argument("--limit-s", type=float, default=180, help="longest epoch (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="default: results.json in the data folder")
    parser.add_argument("--save", action="store_true", help="keep the results in benchmarks/results")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    parser.add_argument("--envs-dir", type=Path, default=HERE / ".envs", help="default: %(default)s")
    add_size_options(parser)
    if parser.parse_args(arguments).quick:
        parser.set_defaults(**QUICK)
    options = parser.parse_args(arguments)
    options.data_dir, options.envs_dir = options.data_dir.resolve(), options.envs_dir.resolve()
    options.json = options.json or options.data_dir / "results.json"
    named = {"all": PEERS, "none": ()}.get(options.peers, tuple(options.peers.split(",")))
    if unknown := set(named) - set(PEERS):
        parser.error(f"--peers {','.join(unknown)} must be all, none, or some of {', '.join(PEERS)}")
    options.peers = named
    return options


def choose_cases(options: argparse.Namespace) -> list[Case]:
    """Return the cases that are asked for, and those that they are compared with."""
    chosen = [
        case
        for case in CASES
        if (case.peer is None or case.peer in options.peers)
        and (case.quick or not options.quick)
        and (not options.only or any(fnmatch(case.name, pattern) for pattern in options.only))
    ]
    needed = {case.against for case in chosen}
    return [case for case in CASES if case in chosen or case.name in needed]


def measure_all(cases: list[Case], options: argparse.Namespace) -> dict[str, Any]:
    """Run every case in turn, and all of them again for each repetition."""
    spec = spec_of(options)
    bench = Bench(spec, options)
    bench.prepare(cases)
    records: dict[str, list[dict[str, Any]]] = {case.name: [] for case in cases}
    for repetition in range(options.repetitions):
        for case in cases:
            if not any(record["status"] != "ok" for record in records[case.name]):
                progress(f"{repetition + 1}/{options.repetitions} {case.name}")
                records[case.name].append(bench.measure(case))
    progress("")
    rows = [summarise(case, records) for case in cases]
    return {
        "date": report.today(),
        "machine": report.machine(),
        "data": asdict(spec),
        "batch_size": options.batch_size,
        "repetitions": options.repetitions,
        "cases": rows,
        "goals": assess_goals({row["name"]: row for row in rows if row["status"] == "ok"}),
    }


class Bench:
    """Data, environments and processes of one run."""

    def __init__(self, spec: DataSpec, options: argparse.Namespace) -> None:
        self._spec, self._options = spec, options
        self._pythons: dict[str | None, Path] = {None: Path(sys.executable)}
        self._not_installed: dict[str, str] = {}

    def prepare(self, cases: Iterable[Case]) -> None:
        """Make the data and environments that cases need, and compile the kernels."""
        for case in cases:
            progress(f"data: {case.layout}")
            self._folder(case)
        for peer in dict.fromkeys(case.peer for case in cases if case.peer):
            progress(f"environment: {peer}")
            try:
                self._pythons[peer] = peer_python(peer, self._options.envs_dir)
            except NotInstalledError as err:
                self._not_installed[peer] = str(err)
        if any(case.kind in ("epoch", "first_batch", "scvi") for case in cases):
            progress("kernels")
            self._compile_kernels()
        snapshots = {path: case for case in cases if (path := self._snapshot(case))}
        for path, case in snapshots.items():
            progress(f"snapshot: {path.name}")
            self._run(replace(case, kind="make_snapshot", env={}))
        for peer, case in {case.peer: case for case in cases if case.peer in _CONVERTING}.items():
            if peer not in self._not_installed:
                progress(f"converting for {peer}")
                self._run(case, prepare_only=True)

    def measure(self, case: Case) -> dict[str, Any]:
        """Return the record of one process; "status" is ok, not available, not installed or failed."""
        if case.peer in self._not_installed:
            return {"status": "not installed", "why": self._not_installed[case.peer]}
        folder = self._folder(case)
        warm_page_cache(folder)
        if path := self._snapshot(case):
            drop_page_cache(path) if case.cold else warm_page_cache(path)
        if case.delay_ms is None:
            record = self._run(case)
        else:
            try:
                with serving(self._pythons[None], folder, case.delay_ms) as served:
                    record = {**self._run(case, **served), **_least_requests(folder)}
            except RuntimeError as err:
                return {"status": "not available", "why": str(err)}
        is_told = "nnz" in record or record["status"] != "ok"
        if not is_told and case.kind in _OF_CELLS and case.query == "all":
            # Dense batches do not tell. This is exact for a whole epoch, and else an estimate.
            record["nnz"] = round(record["rows"] * nnz_of(folder) / self._spec_of(case).rows)
        return record

    def _spec_of(self, case: Case) -> DataSpec:
        rows = min(self._spec.rows, case.rows or self._spec.rows)
        return replace(self._spec, layout=case.layout, rows=rows)

    def _folder(self, case: Case) -> Path:
        """Return the folder of the data of a case, made now if it is not there."""
        return make_data(self._spec_of(case), self._options.data_dir)

    def _snapshot(self, case: Case) -> Path | None:
        """Return the folder of the snapshot that a case reads."""
        names = [name for name in _SNAPSHOTS if name in case.options.values()]
        return _snapshot_of(self._folder(case), names[0]) if names else None

    def _compile_kernels(self) -> None:
        spec = replace(
            self._spec, layout="census", rows=4096, genes=min(2048, self._spec.genes), nnz_per_row=50
        )
        variants = [
            {"return_sparse_X": sparse, **options} for options in ({}, AUTO) for sparse in (True, False)
        ]
        task = {
            "variants": variants,
            "uri": str(make_data(spec, self._options.data_dir)),
            "loader": {},
            "query": "all",
            "windows_file": os.devnull,
        }
        record = self._start(None, "child.py", {"kind": "warm", **self._common(), **task}, {})
        if record["status"] != "ok":
            progress(f"the kernels could not be compiled beforehand: {record['why']}")

    def _common(self) -> dict[str, Any]:
        return {
            "batch_size": self._options.batch_size,
            "limit_s": self._options.limit_s,
            "epochs_before": 0,
            "store": {},
        }

    def _run(self, case: Case, **changes: Any) -> dict[str, Any]:
        folder = self._folder(case)
        with tempfile.TemporaryDirectory(dir=self._options.data_dir, prefix="scratch-") as scratch:
            windows_file = Path(scratch) / "windows.npz"
            snapshots = {name: str(_snapshot_of(folder, name)) for name in _SNAPSHOTS}
            places = {SCRATCH: scratch, **snapshots}
            task = {
                "kind": case.kind,
                "uri": str(folder),
                "h5ad": str(folder / "cells.h5ad"),
                "query": case.query,
                "tile_rows": self._spec.tile[0],
                "options": {k: places.get(v, v) for k, v in case.options.items()},
                "scratch": scratch,
                "loader": dict(case.loader),
                "windows_file": str(windows_file),
                "reread": False,
                "prepare_only": False,
                **self._common(),
                **case.task,
                **changes,
            }
            env = {k: places.get(v, v) for k, v in case.env.items()}
            script = f"peers/{case.peer}/run.py" if case.peer else SCRIPTS[case.kind]
            record = self._start(case.peer, script, task, env)
            if windows_file.exists() and record["status"] == "ok":
                record |= self._start(None, "raw.py", {**task, "kind": "windows"}, env)
            return record

    def _start(
        self, peer: str | None, script: str, task: dict[str, Any], env: dict[str, str]
    ) -> dict[str, Any]:
        paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")] if peer is None else [])]
        done = subprocess.run(
            [self._pythons[peer], HERE / script, json.dumps(task)],
            cwd=self._options.data_dir,  # some peers leave logs behind
            capture_output=True,
            text=True,
            env={**os.environ, **_NO_PARALLEL_MERGE, **env, "PYTHONPATH": os.pathsep.join(paths)},
        )
        try:
            record = json.loads(done.stdout.strip().splitlines()[-1])
        except (IndexError, ValueError):
            said = (done.stderr.strip() or done.stdout.strip() or f"exit {done.returncode}").splitlines()
            return {"status": "failed", "why": said[-1]}
        return {"status": "ok", **record}


def _snapshot_of(folder: Path, name: str) -> Path:
    return folder.with_name(f"{folder.name}{_SNAPSHOTS[name]}")


def _least_requests(folder: Path) -> dict[str, int]:
    """Return the requests and bytes with which X can be read: each file of it once, as a whole."""
    files = [path for path in (folder / "ms/RNA/X/raw/__fragments").rglob("*") if path.is_file()]
    return {"least_requests": len(files), "least_request_bytes": sum(path.stat().st_size for path in files)}


def summarise(case: Case, records: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return a case as one row: medians of its numbers, "of_scan" the median over pairs of one repetition."""
    own = records[case.name]
    row: dict[str, Any] = {
        "name": case.name,
        "peer": case.peer,
        "layout": case.layout,
        "status": own[-1]["status"],
    }
    row |= {"options": dict(case.options), "query": case.query, "against": case.against, "runs": own}
    if row["status"] != "ok":
        return {**row, "note": f"{row['status']}: {own[-1]['why']}"}
    for key, value in own[0].items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        row.setdefault(key, median(record[key] for record in own) if is_number else value)
    if "seconds" in row and "rows" in row:
        row["rows_per_s"] = median(record["rows"] / record["seconds"] for record in own)
    if row.get("nnz"):
        row["million_nnz_per_s"] = median(record["nnz"] / record["seconds"] / 1e6 for record in own)
        row["cpu_ns_per_nnz"] = median(record["cpu_s"] / record["nnz"] * 1e9 for record in own)
    row["note"] = _note(row)
    against = records.get(case.against or "", [])
    if against and all(record["status"] == "ok" for record in against):
        # The same rows, so a ratio of speeds; per row, since an epoch may have been cut short.
        pairs = zip(own, against, strict=True)
        row["of_scan"] = median((a["seconds"] / a["rows"]) / (b["seconds"] / b["rows"]) for b, a in pairs)
    return row


def _note(row: dict[str, Any]) -> str | None:
    notes = {
        "prepare_s": "prepared in {:.0f} s",
        "reread_s": "raw read of its windows {:.2f} s",
        "worker_mib": "a worker holds {:.0f} MiB for them",
        "bytes_per_value": "{:.2f} bytes a non-zero",
        "fill_rows_per_s": "NumPy fills {:,.0f} rows/s",
        "worst": "largest difference {:.3f}, of {n_compared} predictions",
        "requests": "{:,.0f} requests (at least {least_requests:,.0f})",
        "request_bytes": "{:,.0f} bytes (at least {least_request_bytes:,.0f})",
    }
    told = [form.format(row[key], **row) for key, form in notes.items() if key in row]
    return "; ".join(told) or None


def warm_page_cache(folder: Path) -> None:
    """Read all files of a folder, so that every case finds them in memory."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(2**24):
                    pass


def drop_page_cache(folder: Path) -> None:
    """Let the system forget the files of a folder, so that a case reads them from the disk."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def progress(text: str) -> None:
    """Show what is being done, on stderr."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
