from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from stores import MEASUREMENT, Store

SCRIPT = """
import resource, sys
import numpy as np
import tiledbsoma
from tiledbsoma_ml import ExperimentDataset

def n_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [np.ones(2**20, dtype=np.uint8) for _ in range(40)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

n_faults()
before = n_faults()
with tiledbsoma.Experiment.open(sys.argv[1]) as experiment, experiment.axis_query(sys.argv[2]) as query:
    next(iter(ExperimentDataset(query, layer_name="raw", batch_size=20, memory_budget=sys.argv[3])))
n_faults()
print(before, n_faults())
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="another malloc keeps memory by rules of its own"
)
@pytest.mark.parametrize(("memory_budget", "is_kept"), [("2GiB", True), ("256MiB", False)])
def test_memory_that_was_freed_is_kept_for_the_next_block_if_the_budget_has_room(
    store: Store, memory_budget: str, is_kept: bool
) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, store.uri, MEASUREMENT, memory_budget],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    before, after = map(int, done.stdout.split())
    n_pages = 40 * 2**20 // os.sysconf("SC_PAGE_SIZE")
    assert before > n_pages / 2
    assert after < n_pages / 10 if is_kept else after > n_pages / 2
