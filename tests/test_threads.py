from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from stores import Store
from tiledbsoma_ml._eager_iter import EagerIterator
from tiledbsoma_ml._threads import ClosedWhenDropped

LONG = 1_000  # seconds; only a failure waits as long


def run(script: str, *arguments: str, folder: Path) -> dict[str, int | str]:
    """Run a script beside `stores.py`; return what it prints last, as JSON."""
    (folder / "script.py").write_text(script)
    command = [sys.executable, str(folder / "script.py"), *arguments]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# The end --------------------------------------------------------------------------------------------------

# Each situation is that of a process of its own, which ends as an interpreter does.
SITUATIONS = """
import json, os, signal, sys, threading, time
from stores import Store
from tiledbsoma_ml import QueryIDs, ExperimentDataset, XLocator
from tiledbsoma_ml._soma.source import SOMASource
from tiledbsoma_ml._soma.held_rows import ByteLimit, preload_kernels
import tiledbsoma

class Recorded(ByteLimit):
    def __init__(self, n_bytes):
        super().__init__(1)  # byte: the next window waits until this one is used up
        byte_limits.append(self)

    def take(self, rows, n_bytes, *, may_exceed=True):
        return super().take(rows, n_bytes)  # none drops rows

def begin():
    global iterator
    with tiledbsoma.Experiment.open(sys.argv[1]) as experiment, experiment.axis_query("RNA") as query:
        locator, ids = XLocator.create(experiment, "RNA"), QueryIDs.create(query)
    source = SOMASource(locator, ids, make_limit=Recorded)
    iterator = iter(ExperimentDataset(source=source, io_batch_size=64, seed=0))
    next(iterator)
    while not byte_limits[-1]._changed._waiters:
        time.sleep(0.01)
    return iterator

def raise_in_a_function():
    mine = begin()
    raise KeyError("mine")

def interrupt():
    mine = begin()
    raise KeyboardInterrupt

def exit_in_a_thread():
    thread = threading.Thread(target=lambda: (begin(), sys.exit(3)))
    thread.start()
    thread.join()

def iterate_in_a_thread(daemon):
    begun = threading.Event()
    def iterate():
        mine = begin()
        begun.set()
        for _ in mine:
            time.sleep(0.005)
    threading.Thread(target=iterate, daemon=daemon).start()
    begun.wait()

situations = {
    "at module level": (lambda: (begin(), sys.exit(7)), 7),
    "in a function that raises": (raise_in_a_function, 1),
    "interrupted": (interrupt, -signal.SIGINT),
    "sys.exit in a thread": (exit_in_a_thread, 0),
    "a thread goes on": (lambda: iterate_in_a_thread(False), 0),
    "a daemon thread goes on": (lambda: iterate_in_a_thread(True), 0),
}
byte_limits, pids = [], {}
preload_kernels().join()
for name, (situation, expected) in situations.items():
    pids[name] = os.fork()
    if not pids[name]:
        break
if not pids[name]:
    signal.alarm(1_000)
    situation()
else:
    wrong = {}
    for name, pid in pids.items():
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code != situations[name][1]:
            wrong[name] = code
    print(json.dumps(wrong))
"""


def test_a_process_ends_whatever_iterator_is_alive(store: Store, tmp_path: Path) -> None:
    assert run(SITUATIONS, store.uri, folder=tmp_path) == {}


def until(condition: Callable[[], object]) -> bool:
    """Wait until a condition holds; return whether it came to that."""
    end = time.monotonic() + LONG
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(condition())


def test_an_iterator_that_is_found_to_be_garbage_by_its_own_thread_is_closed() -> None:
    dropped, closed = threading.Event(), threading.Event()

    def compute() -> Iterator[int]:
        try:
            yield 0
            assert dropped.wait(LONG)
            gc.collect()
            yield 1
        finally:
            closed.set()

    def outer() -> Iterator[int]:
        with EagerIterator(compute()) as eager:
            yield from eager

    before = set(threading.enumerate())
    gc.disable()
    try:
        cycle: list[object] = [ClosedWhenDropped(outer())]
        assert next(cycle[0]) == 0  # type: ignore[call-overload]
        cycle.append(cycle)
        del cycle
        dropped.set()
        assert closed.wait(LONG)
    finally:
        gc.enable()
    assert until(lambda: set(threading.enumerate()) <= before)


# Forks ----------------------------------------------------------------------------------------------------

FORKS = """
import fcntl, json, os, pathlib, signal, sys, threading, time
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader
import tiledbsoma
from tiledbsoma_ml import ExperimentDataset, experiment_dataloader
from tiledbsoma_ml._eager_iter import EagerIterator, EagerMap
from tiledbsoma_ml.snapshot.creation import locked

def in_a_fork(check):
    "Return how a fork of this process ends that does something."
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    signal.alarm(1_000)
    try:
        check()
        os._exit(0)
    except BaseException as err:
        print(repr(err), file=sys.stderr, flush=True)
        os._exit(1)

def slow_imports():
    yield begun.set()
    import slow_module

def import_slow_module():
    import slow_module

def use_inherited(iterator):
    try:
        next(iterator)
    except RuntimeError as err:
        assert "in the process that made it" in str(err), err
    else:
        raise AssertionError("an inherited iterator went on")
    iterator.close()

def fork_and_wait():
    yield in_a_fork(lambda: None)

pathlib.Path(sys.argv[0]).with_name("slow_module.py").write_text("import time; time.sleep(0.3)")
found, begun = {}, threading.Event()

with EagerIterator(slow_imports()) as importing:
    next(importing)
    begun.wait()
    time.sleep(0.05)
    found["a thread imports"] = in_a_fork(import_slow_module)
    found["an iterator goes on in a fork"] = in_a_fork(lambda: use_inherited(importing))
with EagerMap(str, iter(range(9)), 2) as mapped:
    found["a map goes on in a fork"] = in_a_fork(lambda: use_inherited(mapped))
with EagerIterator(fork_and_wait()) as forking:
    found["a thread of the package forks"] = next(forking)

path = pathlib.Path(sys.argv[0]).with_name("made")
lock, held = path.with_name(".made.lock"), locked(path, print)
held.__enter__()
found["a fork leaves what its parent locked"] = in_a_fork(lambda: held.__exit__(None, None, None))
found["a fork gives a lock back"] = int(lock.read_text() != str(os.getpid()))
held.__exit__(None, None, None)
with locked(path, print):
    waiting = lock.open()  # as another process does
    if not (child := os.fork()):
        time.sleep(200)
        os._exit(0)
try:
    fcntl.flock(waiting, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    found["a fork keeps a lock"] = 1
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)

with tiledbsoma.Experiment.open(sys.argv[1]) as experiment, experiment.axis_query("RNA") as query:
    dataset, other = (ExperimentDataset(query, batch_size=7, io_batch_size=64, seed=0) for _ in "ab")

def count(loader):
    return sum(len(obs) for X, obs in loader)

for round in range(3):
    for make in (DataLoader, StatefulDataLoader):  # the first while kernels are still loaded
        loader = make(dataset, batch_size=None, num_workers=2, multiprocessing_context="fork")
        found[f"{make.__name__} {round}"] = count(loader) - 311
iterator = iter(other)
next(iterator)
for round in range(3):
    loader = experiment_dataloader(dataset, num_workers=2, multiprocessing_context="fork")
    found[f"while this process reads {round}"] = count(loader) - 311
    next(iterator)
found["a dataset's iterator goes on in a fork"] = in_a_fork(lambda: use_inherited(iterator))
found["the iterator of the parent"] = 4 * 7 + count(iterator) - 311
print(json.dumps({name: code for name, code in found.items() if code}))
"""


def test_a_process_can_be_forked_whatever_threads_do(store: Store, tmp_path: Path) -> None:
    assert run(FORKS, store.uri, folder=tmp_path) == {}


GARBAGE = """
import gc, json, os, signal, sys
import tiledbsoma, tiledbsoma_ml

gc.disable()
with tiledbsoma.Experiment.open(sys.argv[1], context=tiledbsoma_ml.context()) as experiment:
    experiment.obs.read(column_names=["soma_joinid"]).concat()
    cycle = [experiment]
cycle.append(cycle)
del experiment, cycle
if not (pid := os.fork()):
    signal.alarm(1_000)
    gc.collect()
    os._exit(0)
print(json.dumps({"code": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}))
"""


def test_a_fork_leaves_the_contexts_of_tiledb_that_it_inherited_alone(store: Store, tmp_path: Path) -> None:
    assert run(GARBAGE, store.uri, folder=tmp_path) == {"code": 0}


# Workers and their parent ---------------------------------------------------------------------------------

TRAIN = """
import json, multiprocessing, sys, time
from torch.utils.data import DataLoader
import tiledbsoma
from tiledbsoma_ml import ExperimentDataset, experiment_dataloader

if __name__ == "__main__":
    with tiledbsoma.Experiment.open(sys.argv[1]) as experiment, experiment.axis_query("RNA") as query:
        dataset = ExperimentDataset(query, batch_size=10)
    plain = dict(batch_size=None, collate_fn=tuple, num_workers=2)
    loaders = [
        experiment_dataloader(dataset, num_workers=2),
        DataLoader(dataset, **plain, multiprocessing_context="fork"),
    ]
    iterators = [iter(loader) for loader in loaders]
    for iterator in iterators:
        next(iterator)
    print(json.dumps([worker.pid for worker in multiprocessing.active_children()]), flush=True)
    time.sleep(600)
"""


def test_workers_end_with_the_process_that_started_them(
    make_store: Callable[..., Store], tmp_path: Path
) -> None:
    uri = make_store(n_vars=3000).uri  # what is read ahead, 120 kB at once, waits for the pipe to be read
    (tmp_path / "train.py").write_text(TRAIN)
    command = [sys.executable, str(tmp_path / "train.py"), uri]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as trainer:
        assert trainer.stdout is not None
        workers = json.loads(trainer.stdout.readline())
        assert len(workers) == 4
        os.kill(trainer.pid, signal.SIGKILL)
    try:
        assert until(lambda: not any(map(is_running, workers)))
    finally:
        for worker in filter(is_running, workers):
            os.kill(worker, signal.SIGKILL)


def is_running(pid: int) -> bool:
    ps = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return bool(ps.stdout.strip()) and not ps.stdout.startswith("Z")
