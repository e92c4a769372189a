"""What is measured: a row of the table each. A new option or system is a new entry here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

SNAPSHOT = "{snapshot}"  # stands for a snapshot beside the data, which is made first if it is not there
ZSTD_SNAPSHOT = "{zstd snapshot}"  # the same, compressed
SCRATCH = "{scratch}"  # stands for an empty folder beside the data, removed afterwards

TUNED = "tuned scan"
"""The fastest that TileDB itself was seen to read X: what reads from TileDB are measured against."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement.

    Attributes:
        name: Row of the table; `--only` matches it.
        kind: A function of `child.py` or `raw.py`, or "peer".
        peer: Folder under `peers/`.
        layout: Of the data it reads.
        rows: Most rows that the data have; None if there may be any number.
        delay_ms: Delay of each request of a server like S3 on this machine, from which data are read; None if
            they are read from the disk.
        env: Environment variables of its process.
        query: See `raw.axis_queries`.
        options: Of `ExperimentDataset`, or of the peer.
        loader: Of `experiment_dataloader`.
        task: Further arguments of the function.
        cold: Whether its snapshot is read from the disk, not from memory.
        against: Case whose seconds are divided by this one's: the column "of scan". It reads the same rows.
        quick: Whether it is part of `--quick`.
    """

    name: str
    kind: str = "epoch"
    peer: str | None = None
    layout: str = "census"
    rows: int | None = None
    delay_ms: float | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    query: str = "all"
    options: Mapping[str, Any] = field(default_factory=dict)
    loader: Mapping[str, Any] = field(default_factory=dict)
    task: Mapping[str, Any] = field(default_factory=dict)
    cold: bool = False
    against: str | None = None
    quick: bool = True


def _scan(name: str, **changes: Any) -> Case:
    task = {"tiles": False, **changes.pop("task", {})}
    return Case(name=name, kind="scan", task=task, **changes)


def _epoch(name: str, *, dense: bool = False, against: str | None = TUNED, **changes: Any) -> Case:
    options = {"return_sparse_X": not dense, **changes.pop("options", {})}
    return Case(name=name, options=options, against=against, **changes)


def _first(name: str, **changes: Any) -> Case:
    return replace(_epoch(name, against=None, **changes), kind="first_batch")


def _s3(name: str, **changes: Any) -> Case:
    return _epoch(name, options=AUTO, rows=S3_ROWS, against=None, quick=False, **changes)


def _scvi(name: str, *, dense: bool = False, **changes: Any) -> Case:
    options = {"return_sparse_X": not dense, **changes.pop("options", {})}
    return Case(name=name, kind="scvi", options=options, against=TUNED, **changes)


def _old(name: str, **changes: Any) -> Case:
    return replace(_epoch(name, **changes), kind="peer", peer="tiledbsoma_ml_010")


def _peer(peer: str, name: str, **changes: Any) -> Case:
    return Case(name=name, kind="peer", peer=peer, layout="h5ad", against=TUNED, **changes)


SCATTERED = "raw scan, tiles of 10 % scattered"
CONTIGUOUS = "raw scan, 10 % contiguous"
N_IDS = 100_000_000
S3_ROWS = 32_768  # the server has them in its memory, and takes time of the same cores
AUTO = {"shuffle_chunk_size": "auto", "io_batch_size": "auto"}
CHUNK_2048 = {"shuffle_chunk_size": 2048}
ON_DISK = {"memory_budget": "256MiB", "window_dir": SCRATCH, "window_budget": "4GiB"}
TRUE_SHUFFLE = {**AUTO, "snapshot": SNAPSHOT}
ZSTD = {"compression": "zstd"}
LATER = {"epochs_before": 1}
COLD = {"NUMBA_CACHE_DIR": SCRATCH}


def _auto(budget: str) -> dict[str, Any]:
    return {**AUTO, "memory_budget": budget}


CASES = (
    # TileDB itself
    _scan(TUNED, task={"keep": True}),
    _scan("raw scan"),
    _scan("raw scan, 16 MiB buffers", task={"config": {"soma.init_buffer_bytes": 2**24}}, quick=False),
    _scan("raw scan, default config", task={"config": {}}, quick=False),
    _scan("tuned scan, training layout", layout="training", task={"keep": True}),
    _scan(SCATTERED, query="scattered", task={"tiles": True}),
    _scan(CONTIGUOUS, query="contiguous", quick=False),
    # tiledbsoma_ml
    _epoch("default, sparse"),
    _epoch("default, dense", dense=True),
    _epoch("default, sparse, 2 workers", loader={"num_workers": 2}, quick=False),
    _epoch("default 256MiB, window on disk", options=ON_DISK),
    _epoch("chunk 2048, sparse", options=CHUNK_2048),
    _epoch("chunk 2048, dense", dense=True, options=CHUNK_2048, quick=False),
    _epoch("auto, sparse", options=AUTO),
    _epoch("auto, dense", dense=True, options=AUTO),
    _epoch("auto, sparse, 2 workers", options=AUTO, loader={"num_workers": 2}),
    _epoch("auto 256MiB", options=_auto("256MiB"), task={"reread": True}),
    _epoch("auto 512MiB", options=_auto("512MiB"), quick=False),
    _epoch("auto 1GiB", options=_auto("1GiB"), quick=False),
    _epoch("auto 2GiB", options=_auto("2GiB"), quick=False),
    _epoch("auto 256MiB, window on disk", options={**AUTO, **ON_DISK}),
    _epoch("auto, 10 % scattered", query="scattered", options=AUTO, against=SCATTERED),
    _epoch(
        "auto, 10 % contiguous",
        query="contiguous",
        options=AUTO,
        against=CONTIGUOUS,
        quick=False,
    ),
    _epoch("auto, 2000 genes", query="genes", options=AUTO, quick=False),
    _epoch("chunk 64, training layout", layout="training", against="tuned scan, training layout"),
    _epoch("default, 10 % scattered", query="scattered", against=SCATTERED, quick=False),
    _epoch("default, 10 % contiguous", query="contiguous", against=CONTIGUOUS, quick=False),
    _epoch("default, 2000 genes", query="genes", quick=False),
    # Starting
    _first("first mini-batch, defaults"),
    _first("first mini-batch, defaults, cold kernels", env=COLD),
    _first("first mini-batch, snapshot", options=TRUE_SHUFFLE, quick=False),
    _first("first mini-batch, snapshot, cold kernels", options=TRUE_SHUFFLE, env=COLD, quick=False),
    # Over a network
    _s3("S3 0 ms, auto, first epoch", delay_ms=0),
    _s3("S3 50 ms, auto, first epoch", delay_ms=50),
    _s3("S3 0 ms, auto, second epoch", delay_ms=0, task=LATER),
    _s3("S3 50 ms, auto, second epoch", delay_ms=50, task=LATER),
    # From a snapshot
    Case(name="snapshot, creation", kind="create_snapshot", against=TUNED),
    Case(name="snapshot, zstd, creation", kind="create_snapshot", task=ZSTD, against=TUNED, quick=False),
    _epoch("snapshot, chunk 64, sparse", options={"snapshot": SNAPSHOT}),
    _epoch("snapshot, zstd, chunk 64, sparse", options={"snapshot": ZSTD_SNAPSHOT}, task=ZSTD),
    _epoch("snapshot, chunk 64, sparse, cold", options={"snapshot": SNAPSHOT}, cold=True),
    _epoch(
        "snapshot, zstd, chunk 64, sparse, cold", options={"snapshot": ZSTD_SNAPSHOT}, task=ZSTD, cold=True
    ),
    _epoch("snapshot, single rows, sparse", options=TRUE_SHUFFLE),
    _epoch("snapshot, single rows, dense", dense=True, options=TRUE_SHUFFLE, task={"fill": True}),
    # Batches for scVI
    _scvi("scVI batches, snapshot, sparse", options=TRUE_SHUFFLE),
    _scvi("scVI batches, snapshot, sparse, second epoch", options=TRUE_SHUFFLE, task=LATER),
    _scvi("scVI batches, snapshot, dense", dense=True, options=TRUE_SHUFFLE),
    _scvi("scVI batches, SOMA, dense", dense=True, options=AUTO),
    # Planning and starting
    Case(name="predicted mixing, ranks and workers", kind="predictions", quick=False),
    Case(name="plan 100M ids, chunk 64", kind="plan", task={"n_ids": N_IDS, "chunk": 64}),
    Case(name="plan 100M ids, chunk 2048", kind="plan", task={"n_ids": N_IDS, "chunk": 2048}, quick=False),
    Case(name="start 2 workers, 100M ids", kind="start_workers", task={"n_ids": N_IDS}, quick=False),
    # Peers
    _old("0.1.0 default, sparse"),
    _old("0.1.0 default, dense", dense=True),
    _old("0.1.0 chunk 2048, sparse", options=CHUNK_2048),
    _old("0.1.0 chunk 2048, dense", dense=True, options=CHUNK_2048),
    _peer("annbatch", "annbatch, chunks of 64", options={"chunk": 64}),
    _peer("bionemo_scdl", "BioNeMo-SCDL, random rows"),
    _peer("cell_load", "cell-load, sets of 64"),
    _peer("protoplast", "protoplast, sequential"),
    _peer("protoplast", "protoplast, sequential, 2 workers", options={"num_workers": 2}),
    _peer("scdataset", "scDataset, backed h5ad, blocks of 64"),
    _peer("slafdb", "slafdb, mixture of scanners"),
    Case(
        name="scvi-tools TileDBDataModule, 0.1.0",
        kind="peer",
        peer="scvi_tools_tiledb",
        against=TUNED,
    ),
    _peer("scvi_tools", "scvi-tools AnnDataLoader, sparse", options={"sparse": True}),
    _peer(
        "scvi_tools", "scvi-tools AnnDataLoader, sparse, second epoch", options={"sparse": True}, task=LATER
    ),
    _peer("scvi_tools", "scvi-tools AnnDataLoader, dense", options={"sparse": False}),
)
