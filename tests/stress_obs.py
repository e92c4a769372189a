"""Read `obs` and `var` over and over beside busy loops, with freed memory overwritten: `make stress`.

It shows whether TileDB frees what it still uses, which makes a process die now and then: each reader is a
process of its own, in the context that `tiledbsoma_ml.context()` returns or, with `--without`, in TileDB's.
With glibc, freed memory is overwritten at once, so that its use shows. The exit code is 1 if a reader died.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import tiledbsoma as soma

import tiledbsoma_ml
from stores import MEASUREMENT, make_experiment
from tiledbsoma_ml._context import PARALLEL_MERGE

VARIABLE = "TILEDB_" + PARALLEL_MERGE.upper().replace(".", "_")


def read_until(uri: str, seconds: float, protected: bool) -> int:
    """Open an experiment anew, and read its `obs` and `var`, until the time is over; return how often."""
    end, n_rounds = time.monotonic() + seconds, 0
    settings = {"soma.init_buffer_bytes": 2**20}
    while time.monotonic() < end:
        context = (tiledbsoma_ml.context if protected else soma.SOMATileDBContext)(settings)
        with soma.Experiment.open(uri, context=context) as experiment:
            for _ in range(5):
                assert len(experiment.obs.read(column_names=["soma_joinid"]).concat())
                assert len(experiment.ms[MEASUREMENT].var.read().concat())
        n_rounds += 1
    return n_rounds


@contextlib.contextmanager
def busy(n_loops: int) -> Iterator[None]:
    """Keep cores busy with processes that compute nothing, and end with this one."""
    code = f"import os\nwhile os.getppid() == {os.getpid()}: pass"
    loops = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(n_loops)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def stress(minutes: float, n_readers: int, n_busy: int, protected: bool) -> int:
    """Return how many readers died; print what became of each."""
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    environment["GLIBC_TUNABLES"] = "glibc.malloc.perturb=165"
    n_died = 0
    with tempfile.TemporaryDirectory() as folder, busy(n_busy):
        uri = make_experiment(Path(folder) / "experiment")
        command = [sys.executable, __file__, "--read", uri, "--minutes", str(minutes)]
        command += [] if protected else ["--without"]
        readers = [
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
            for _ in range(n_readers)
        ]
        for number, reader in enumerate(readers):
            said, _ = reader.communicate()
            died = reader.returncode != 0
            n_died += died
            end = signal.Signals(-reader.returncode).name if reader.returncode < 0 else reader.returncode
            print(f"reader {number}: {f'died by {end}' if died else said.strip()}", flush=True)
    return n_died


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0, help="how long (default: 5)")
    parser.add_argument("--readers", type=int, default=2 * (os.cpu_count() or 1), help="processes that read")
    parser.add_argument("--busy", type=int, default=3 * (os.cpu_count() or 1), help="busy loops beside them")
    parser.add_argument("--without", action="store_true", help="in TileDB's own context")
    parser.add_argument("--read", metavar="URI", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        n_rounds = read_until(options.read, 60 * options.minutes, not options.without)
        print(f"survived {n_rounds} rounds")
    else:
        n_died = stress(options.minutes, options.readers, options.busy, not options.without)
        print(f"{n_died} of {options.readers} readers died")
        sys.exit(n_died > 0)


if __name__ == "__main__":
    main()
