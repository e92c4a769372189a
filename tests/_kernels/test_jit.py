from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numba
import pytest

import tiledbsoma_ml
from tiledbsoma_ml._kernels.jit import Waiting, jit, waiting

# The package without what its `__init__` imports, which takes seconds.
ALONE = f"""
import sys, types
package = sys.modules["tiledbsoma_ml"] = types.ModuleType("tiledbsoma_ml")
package.__path__ = {list(tiledbsoma_ml.__path__)!r}
"""

COUNT_ONE_ROW = """
import json, numpy as np
from tiledbsoma_ml._kernels import csr

csr.count_rows(np.zeros(1, dtype=sys.argv[1]), np.zeros(1, dtype=np.int64))
stats, dtypes = csr.count_rows.stats, [str(rows.dtype) for rows, _ in csr.count_rows.signatures]
print(json.dumps([sum(stats.cache_hits.values()), sum(stats.cache_misses.values()), *dtypes]))
"""


def count_one_row(cache: Path, dtype: str, *, before: str = "") -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", ALONE + before + COUNT_ONE_ROW, dtype]
    return subprocess.Popen(command, env=os.environ | {"NUMBA_CACHE_DIR": str(cache)}, stdout=subprocess.PIPE)


def hits_misses_and_dtypes(process: subprocess.Popen[bytes]) -> list[int | str]:
    out, _ = process.communicate()
    assert process.returncode == 0
    return json.loads(out)


def test_a_kernel_is_compiled_once_and_then_read_from_disk(tmp_path: Path) -> None:
    assert hits_misses_and_dtypes(count_one_row(tmp_path, "uint32")) == [0, 1, "uint32"]
    assert hits_misses_and_dtypes(count_one_row(tmp_path, "uint32")) == [1, 0, "uint32"]


def test_a_long_wait_for_the_compiler_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    told = Waiting(told_after_s=2.0)
    for seconds in (1.9, 0.2, 3.0):
        told.add(seconds, "/some/folder")
    [line] = caplog.messages
    assert "compiles its loops for this machine, which takes some seconds once" in line
    assert "/some/folder" in line


def test_what_is_compiled_counts_and_what_is_read_from_disk_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(waiting, "seconds", 0.0)
    seconds = [waiting.seconds]
    for _ in range(2):
        jit(add_one)(1)
        seconds.append(waiting.seconds)
    assert seconds[0] < seconds[1] == seconds[2]


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def emptied(content: bytes) -> bytes:
    return b""


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :]


@pytest.mark.parametrize("pattern", ["*.nbi", "*.nbc"])
@pytest.mark.parametrize("damage", [cut, emptied, flipped])
def test_what_is_damaged_on_disk_is_compiled_anew(
    pattern: str, damage: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))

    def hits_and_misses() -> tuple[int, int]:
        compiled = jit(add_one)
        assert compiled(2) == 3
        stats = compiled.stats  # type: ignore[attr-defined]
        return sum(stats.cache_hits.values()), sum(stats.cache_misses.values())

    assert hits_and_misses() == (0, 1)
    [path] = tmp_path.rglob(pattern)
    path.write_bytes(damage(path.read_bytes()))
    assert hits_and_misses() == (0, 1)
    assert hits_and_misses() == (1, 0)


def add_one(number: int) -> int:
    return number + 1


MEET = """
import pathlib, time
from numba.core.caching import IndexDataCacheFile as File
from tiledbsoma_ml._kernels import csr

def touch_and_wait(mine, other, seconds):
    pathlib.Path({folder!r}, mine).touch()
    end = time.monotonic() + seconds
    while not pathlib.Path({folder!r}, other).exists() and time.monotonic() < end:
        time.sleep(0.01)

def save_index(self, overloads, save=File._save_index):
    touch_and_wait("first has read the index", "second has written the index", 3)
    save(self, overloads)

def save_data(self, name, data, save=File._save_data):
    touch_and_wait("second has written the index", "first is done", 30)
    save(self, name, data)
"""
FIRST = "File._save_index = save_index\n"
SECOND = 'touch_and_wait("second is there", "first has read the index", 60)\nFile._save_data = save_data\n'


def test_processes_that_compile_at_once_keep_each_what_it_compiled(tmp_path: Path) -> None:
    meet = MEET.format(folder=str(tmp_path))
    second = count_one_row(tmp_path, "uint32", before=meet + SECOND)
    while not (tmp_path / "second is there").exists():
        assert second.poll() is None
    hits_misses_and_dtypes(count_one_row(tmp_path, "int64", before=meet + FIRST))
    (tmp_path / "first is done").touch()
    hits_misses_and_dtypes(second)
    for dtype in ("uint32", "int64"):
        assert hits_misses_and_dtypes(count_one_row(tmp_path, dtype)) == [1, 0, dtype]


COMPILE_AND_FORK = """
import os, signal, sys, threading, time, numpy as np
from numba.core.compiler_lock import global_compiler_lock
from tiledbsoma_ml._kernels import csr

def compile_for_a_while():
    with global_compiler_lock:
        started.set()
        time.sleep(0.2)

started = threading.Event()
compiling = threading.Thread(target=compile_for_a_while)
compiling.start()
started.wait()
if not os.fork():
    signal.alarm(1_000)
    csr.count_rows(np.zeros(1, dtype=np.uint32), np.zeros(1, dtype=np.int64))
    os._exit(0)
compiling.join()
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_a_process_forked_while_a_thread_compiles_compiles_too() -> None:
    subprocess.run([sys.executable, "-c", ALONE + COMPILE_AND_FORK], check=True)
