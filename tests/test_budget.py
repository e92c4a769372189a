from __future__ import annotations

import os
import platform
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stores import MEASUREMENT, Store
from tiledbsoma_ml._budget import FIXED_BYTES, MIN_BUDGET, Budget, parse_bytes

GIB, MIB = 2**30, 2**20

# Budgets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "n_bytes"),
    [
        (MIN_BUDGET, 64 * MIB),
        (10**12, 10**12),
        ("2GiB", 2 * GIB),
        ("2gib", 2 * GIB),
        ("2 GiB", 2 * GIB),
        (" 2GiB ", 2 * GIB),
        ("2Gi", 2 * GIB),
        ("1.5GiB", 3 * GIB // 2),
        ("2GB", 2 * 10**9),
        ("2G", 2 * 10**9),
        ("64MiB", 64 * MIB),
        ("512m", 512 * 10**6),
        ("100000KiB", 100_000 * 1024),
        ("3TiB", 3 * 2**40),
        ("1TB", 10**12),
        ("134217728", 128 * MIB),
        ("134217728B", 128 * MIB),
    ],
)
def test_a_budget_is_a_number_of_bytes_or_a_string_with_a_unit(value: int | str, n_bytes: int) -> None:
    assert parse_bytes("memory_budget", value) == n_bytes


@given(n_bytes=st.integers(MIN_BUDGET, 2**60))
def test_a_number_and_its_digits_are_the_same_budget(n_bytes: int) -> None:
    assert parse_bytes("memory_budget", n_bytes) == n_bytes
    assert parse_bytes("memory_budget", f"{n_bytes // MIB}MiB") == n_bytes // MIB * MIB


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, ValueError, "memory_budget=0 must be at least 64 MiB; try '2GiB'."),
        (-1, ValueError, "memory_budget=-1 must be at least 64 MiB; try '2GiB'."),
        (MIN_BUDGET - 1, ValueError, "memory_budget=67108863 must be at least 64 MiB; try '2GiB'."),
        ("63MiB", ValueError, "memory_budget='63MiB' must be at least 64 MiB; try '2GiB'."),
        ("64MB", ValueError, "memory_budget='64MB' must be at least 64 MiB; try '2GiB'."),
        ("2", ValueError, "memory_budget='2' must be at least 64 MiB; try '2GiB'."),
        (True, TypeError, "memory_budget=True must be a number of bytes or a string; "),
        (2e9, TypeError, "memory_budget=2000000000.0 must be a number of bytes or a string; "),
        (None, TypeError, "memory_budget=None must be a number of bytes or a string; "),
        ([1], TypeError, "memory_budget=[1] must be a number of bytes or a string; "),
        (
            "2 apples",
            ValueError,
            "memory_budget='2 apples' must be a number of bytes, with a unit or without;",
        ),
        ("", ValueError, "memory_budget='' must be a number of bytes, with a unit or without; try '2GiB'."),
        ("-2GiB", ValueError, "memory_budget='-2GiB' must be a number of bytes, with a unit or without; "),
        ("GiB", ValueError, "memory_budget='GiB' must be a number of bytes, with a unit or without; "),
        ("1e9", ValueError, "memory_budget='1e9' must be a number of bytes, with a unit or without; "),
        ("2GiB 1", ValueError, "memory_budget='2GiB 1' must be a number of bytes, with a unit or without; "),
        ("inf", ValueError, "memory_budget='inf' must be a number of bytes, with a unit or without; "),
    ],
)
def test_a_bad_budget_is_refused_in_one_sentence_with_an_example(
    value: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        parse_bytes("memory_budget", value)
    assert str(caught.value).startswith(message)
    assert re.search(r"; try (memory_budget=)?'2GiB'\.$", str(caught.value))


def test_the_minimum_is_the_callers() -> None:
    assert parse_bytes("window_budget", "1MiB", minimum=MIB) == MIB
    with pytest.raises(ValueError, match=r"^window_budget='1MiB' must be at least 2 MiB"):
        parse_bytes("window_budget", "1MiB", minimum=2 * MIB)


def test_a_numpy_integer_is_an_integer() -> None:
    assert parse_bytes("memory_budget", np.int64(GIB)) == GIB


def test_a_string_of_too_many_digits_is_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match="memory_budget="):
        parse_bytes("memory_budget", "9" * 400 + "TiB")


@given(total=st.integers(MIN_BUDGET, 2**50), is_remote=st.booleans())
@example(total=MIN_BUDGET, is_remote=False)
def test_the_parts_of_a_budget_are_within_it(total: int, is_remote: bool) -> None:
    budget = Budget(total, is_remote)
    assert 1 <= budget.streams <= (4 if is_remote else 1)
    buffers = 9 * budget.buffer * budget.streams
    assert budget.windows + budget.tiledb + buffers + min(FIXED_BYTES, total // 2) <= total
    assert 16 * MIB <= budget.tiledb_of_stream <= budget.tiledb
    assert 16 * MIB <= budget.tiledb <= total / 4
    assert MIB <= budget.buffer <= total / 64


@given(total=st.integers(MIN_BUDGET, 2**40), more=st.integers(1, 2**40))
def test_of_a_larger_budget_no_part_is_smaller(total: int, more: int) -> None:
    small, large = Budget(total), Budget(total + more)
    assert large.tiledb >= small.tiledb
    assert large.buffer >= small.buffer
    if more >= MIB:
        assert large.windows > small.windows


@pytest.mark.parametrize(("total", "least_share"), [(256 * MIB, 0.3), (GIB, 0.55), (2 * GIB, 0.7)])
def test_most_of_a_large_budget_is_for_windows(total: int, least_share: float) -> None:
    assert Budget(total).windows >= least_share * total


# What TileDB takes up --------------------------------------------------------------------------------------

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
