"""What the page `shuffle_viz` must compute as Python does: `python tests/page_vectors.py` writes it anew.

The page draws orders that it computes itself. `shuffle_viz/src/golden/vectors.json` holds what Python
computes, as hashes where it is long; the tests of the page compare.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tiledbsoma_ml import QueryIDs
from tiledbsoma_ml._budget import Budget
from tiledbsoma_ml._order.mixing import Sharing, predicted_mixing
from tiledbsoma_ml._order.plan import EpochPart, Plan
from tiledbsoma_ml._order.sizes import Layout
from tiledbsoma_ml._query_ids import Partition

PATH = Path(__file__).parents[1] / "shuffle_viz" / "src" / "golden" / "vectors.json"

Setup: TypeAlias = dict[str, Any]
Rows: TypeAlias = NDArray[np.int64]

# Seeds on both sides of where SeedSequence takes one more word, and of what a JavaScript number holds.
SEEDS = [0, 1, 5, 2**32 - 1, 2**32, 2**53 + 1, 2**64 + 3, 2**128 + 2**70, 2**200 + 9]

BY_HAND: Setup = {
    "rows": 8, "chunk": 2, "ioBatch": 2, "miniBatch": 1, "ranks": 2, "workers": 2,
    "scope": "partition", "seed": 5, "epoch": 0,
}  # fmt: skip
"""The example of `docs/how_it_works.md`."""


def vectors() -> dict[str, Any]:
    """Return all that is compared."""
    return {
        "permutations": [permutations(seed, epoch) for seed in SEEDS for epoch in (0, 1, 2**33)],
        "orders": [{"setup": printable(setup), **order(setup)} for setup in setups()],
        "mixing": [predicted(*case) for case in mixing_cases()],
        "amplification": [
            amplification(*sizes)
            for sizes in [
                (64, 65_536, 2048, 1_000_000, 340_000, 1),
                (64, 65_536, 2048, 1_000_000, 20_000, 1),
                (64, 65_536, 2048, 1_000_000, 2_000_000, 1),
                (2048, 65_536, 2048, 500_000, 340_000, 1),
                (4096, 65_536, 2048, 500_000, 340_000, 1),
                (1000, 8000, 2048, 500_000, 50_000, 1),
                (64, 65_536, 2048, 1_000_000, 340_000, 4),
                (64, 65_536, 2048, 1_000_000, 20_000, 8),
                (1, 16, 8, 64, 32, 1),
                (4, 100, 8, 64, 64, 1),
            ]
        ],
        "windowBytes": [
            [total, Budget(total).share_of_windows().planned_bytes]
            for total in (2**26, 2**28, 3 * 2**28 + 17, 2**30, 2**31, 10 * 2**30)
        ],
        "sizes": [
            chosen(sharing_of(rows, batch, scope, ranks, readers), tile, window_rows)
            for rows, tile, window_rows, batch, scope, ranks, readers in [
                (500_000, 2048, 340_000, 1024, "partition", 1, 1),
                (1_000_000, 2048, 340_000, 1024, "global", 1, 3),
                (5_000_000, 2048, 340_000, 1024, "partition", 1, 1),
                (5_000_000, 2048, 65_536, 64, "partition", 2, 4),
                (3_000_000, 1000, 300_000, 1024, "global", 8, 1),
                (200_000, 2048, 300_000, 1024, "global", 8, 1),
                (200_000, 2048, 10_000, 128, "partition", 8, 2),
                (100_000, 64, 100_001, 128, "partition", 1, 1),
                (100_000, 64, 100_001, 128, "partition", 3, 1),
                (100_000, 1, 100_001, 128, "partition", 2, 2),
            ]
        ],
    }


def amplification(chunk: int, window: int, tile: int, n_rows: int, n_held: int, n_ranks: int) -> list[float]:
    """Return how often a tile is decoded where memory holds `n_held` rows, behind the sizes."""
    plan = Plan(shuffle_chunk_size=chunk, io_batch_size=window, batch_size=1, permutes=True, scope="global")
    ids = QueryIDs(obs_joinids=np.arange(n_rows), var_joinids=[0])
    part = EpochPart(ids=ids, partition=Partition(0, n_ranks, 0, 1), seed=0, epoch=0)
    sizes = plan.of(part).read_sizes(tile)
    return [chunk, window, tile, n_rows, n_held, n_ranks, sizes.predicted_amplification(n_held)]


def mixing_cases() -> Iterator[tuple[Setup, float, float, bool]]:
    """Yield settings of all kinds: who shares a query, rows of chunks and windows, and how windows end."""
    rng = np.random.default_rng(1)
    for k in range(60):
        rows = int(10 ** rng.uniform(1, 8))
        batch = int(rng.choice([1, 64, 100, 1024, 4096]))
        ranks, readers = int(rng.choice([1, 1, 2, 8, 64])), int(rng.choice([1, 1, 3, 8]))
        sharing = sharing_of(rows, batch, ["partition", "global"][k % 2], ranks, readers)
        chunk = float(np.round(2 ** rng.uniform(0, 12), 2))
        yield sharing, chunk, float(np.round(chunk * 2 ** rng.uniform(0, 12))), bool(k % 4 == 0)


def sharing_of(rows: int, batch: int, scope: str, ranks: int, readers: int) -> Setup:
    """Return a `Sharing`, by the names of the page."""
    return {"rows": rows, "miniBatch": batch, "scope": scope, "ranks": ranks, "readers": readers}


def sharing(found: Setup) -> Sharing:
    return Sharing(
        n_rows=found["rows"],
        batch_size=found["miniBatch"],
        scope=found["scope"],
        world_size=found["ranks"],
        n_workers=found["readers"],
    )


def predicted(found: Setup, chunk: float, window: float, ends_with_chunk: bool) -> dict[str, Any]:
    """Return the predicted mixing, after what it is predicted from."""
    mixing = predicted_mixing(
        sharing(found), chunk_rows=chunk, window_rows=window, ends_with_chunk=ends_with_chunk
    )
    given = {"chunk": chunk, "window": window, "endsWithChunk": ends_with_chunk}
    return {"sharing": found, **given, "mixing": mixing}


def permutations(seed: int, epoch: int) -> dict[str, Any]:
    """Return permutations drawn one after the other, hashed together."""
    sizes = [0, 1, 2, 3, 4, 5, 17, 64, 255, 256, 257, 1023, 4097, 65_536, 70_000, 2]
    rng = np.random.default_rng([seed, epoch])
    drawn = [rng.permutation(size) for size in sizes]
    return {"entropy": [str(seed), str(epoch)], "sizes": sizes, "sha256": sha256(*drawn)}


def setups() -> Iterator[Setup]:
    """Yield settings of all kinds: the example, small ones with many ranks and workers, and large ones."""
    yield BY_HAND
    yield {**BY_HAND, "epoch": 1}
    yield {**BY_HAND, "scope": "global"}
    rng = np.random.default_rng(0)
    for k in range(160):
        most = [12, 100, 3000, 70_000][(k // 2) % 4]
        chunk = int(rng.choice([1, 2, 3, 4, 7, 64, 100])) if most > 12 else int(rng.integers(1, 4))
        rows = int(rng.integers(1, most + 1))
        yield {
            "rows": rows,
            "chunk": chunk,
            "ioBatch": chunk * int(rng.integers(1, max(2, rows // chunk + 2))),
            "miniBatch": int(rng.integers(1, max(2, min(rows + 2, 1500)))),
            "ranks": int(rng.choice([1, 1, 2, 3, 8])),
            "workers": int(rng.choice([0, 0, 1, 2, 3, 5])),
            "scope": ["partition", "global"][k % 2],
            "seed": SEEDS[int(rng.integers(len(SEEDS)))],
            "epoch": int(rng.choice([0, 1, 2, 10, 2**31])),
        }


def printable(setup: Setup) -> Setup:
    return {**setup, "seed": str(setup["seed"])}


def order(setup: Setup) -> dict[str, Any]:
    """Return what is read and yielded, rank after rank: sizes of batches, and rows."""
    io_batches: list[Rows] = []
    mini_batches: list[Rows] = []
    for rank in range(setup["ranks"]):
        of_rank, of_workers = read(setup, rank)
        io_batches += of_rank
        in_turn = chain.from_iterable(zip_longest(*of_workers))
        mini_batches += [rows for rows in in_turn if rows is not None]
    found = {"ioBatches": digest(io_batches), "miniBatches": digest(mini_batches)}
    return found if setup["rows"] > 8 else {**found, "rows": [rows.tolist() for rows in mini_batches]}


def read(setup: Setup, rank: int) -> tuple[list[Rows], list[list[Rows]]]:
    """Return the IO batches of a rank, and the mini-batches of each of its workers.

    In the scope "partition", workers read IO batches of their own; in "global", pieces of those of the rank.
    """
    n_workers, is_global = max(1, setup["workers"]), setup["scope"] == "global"
    of_workers = [batches_of(setup, Partition(rank, setup["ranks"], k, n_workers)) for k in range(n_workers)]
    yielded = [cut(concatenated(batches), setup["miniBatch"]) for batches in of_workers]
    whole = [batches_of(setup, Partition(rank, setup["ranks"], 0, 1))] if is_global else of_workers
    return list(chain.from_iterable(whole)), yielded


def batches_of(setup: Setup, place: Partition) -> list[Rows]:
    plan = Plan(
        shuffle_chunk_size=setup["chunk"],
        io_batch_size=setup["ioBatch"],
        batch_size=setup["miniBatch"],
        permutes=True,
        scope=setup["scope"],
    )
    ids = QueryIDs(obs_joinids=np.arange(setup["rows"]), var_joinids=[0])
    part = EpochPart(ids=ids, partition=place, seed=setup["seed"], epoch=setup["epoch"])
    return list(plan.of(part).io_batches())


def chosen(found: Setup, tile: int, window_rows: int) -> dict[str, Any]:
    """Return what "auto" stands for, after what it is chosen from."""
    plan = Plan(
        shuffle_chunk_size="auto",
        io_batch_size="auto",
        batch_size=found["miniBatch"],
        permutes=True,
        layout=Layout(tile, 1.0, window_rows),
        scope=found["scope"],
    )
    ids = QueryIDs(obs_joinids=np.arange(found["rows"]), var_joinids=[0])
    place = Partition(0, found["ranks"], 0, found["readers"])
    sizes = plan.of(EpochPart(ids=ids, partition=place, seed=0, epoch=0)).sizes
    assert sizes is not None
    given = {"sharing": found, "tile": tile, "windowRows": window_rows}
    return {**given, "chunk": sizes.run_length, "window": sizes.window_rows, "mixing": sizes.mixing}


def cut(rows: Rows, size: int) -> list[Rows]:
    return [rows[k : k + size] for k in range(0, len(rows), size)]


def concatenated(parts: list[Rows]) -> Rows:
    return np.concatenate([np.empty(0, dtype=np.int64), *parts])


def digest(batches: list[Rows]) -> str:
    return sha256(np.array([len(batch) for batch in batches], dtype=np.int64), *batches)


def sha256(*arrays: Rows) -> str:
    return hashlib.sha256(b"".join(array.astype("<i4").tobytes() for array in arrays)).hexdigest()


def as_text(found: dict[str, Any]) -> str:
    """Return JSON with an item a line."""
    lists = [f'"{name}": [\n' + ",\n".join(map(json.dumps, items)) + "\n]" for name, items in found.items()]
    return "{\n" + ",\n".join(lists) + "\n}\n"


if __name__ == "__main__":
    PATH.parent.mkdir(parents=True, exist_ok=True)
    PATH.write_text(as_text(vectors()))
