"""Runs scripts as processes that have what they import: to import it takes longer than most scripts."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

RunScript: TypeAlias = Callable[..., tuple[int, str]]
"""Runs a script; returns its exit code and what it printed."""

EXTRAS = ("lightning.pytorch", "ray.train", "scvi.model")

RUNNER = """
import importlib, json, os, sys, tempfile

tests, *modules = sys.argv[1:]
sys.path.append(tests)
for module in modules:
    importlib.import_module(module)
sys.path.remove(tests)

for line in sys.stdin:
    script, name, folder, environment, output = json.loads(line)
    if not (pid := os.fork()):
        os.chdir(folder)
        os.environ.update(environment)
        tempfile.tempdir = None
        output = os.open(output, os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1), os.dup2(output, 2)
        exec(compile(open(script).read(), name, "exec"))
        break
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@contextmanager
def forking_runner() -> Iterator[RunScript]:
    """Start a process that imports what scripts need, and forks itself for each script."""
    of_extras = [module for module in EXTRAS if is_installed(module.partition(".")[0])]
    command = [sys.executable, "-c", RUNNER, str(Path(__file__).parent), "preloaded", *of_extras]
    with (
        tempfile.TemporaryDirectory() as files,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "MPLBACKEND": "agg"},
        ) as runner,
    ):
        assert runner.stdin is not None
        assert runner.stdout is not None
        script, output = Path(files) / "script.txt", Path(files) / "output.txt"

        def run(code: str, *, name: str, folder: Path, environment: Mapping[str, str]) -> tuple[int, str]:
            script.write_text(code)
            output.unlink(missing_ok=True)
            print(
                json.dumps([str(script), name, str(folder), environment, str(output)]),
                file=runner.stdin,
                flush=True,
            )
            exit_code = int(runner.stdout.readline())
            return exit_code, output.read_text()

        yield run
        runner.stdin.close()
