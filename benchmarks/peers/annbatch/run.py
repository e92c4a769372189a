"""annbatch: chunks of 64 rows of its own sharded zarr store, windows of 65,536 rows; sparse."""

import shutil
import time
import warnings
from pathlib import Path

import zarr
from annbatch import DatasetCollection, Loader
from measure import answer_with, measure_epoch, request


def prepare(h5ad: str, store: Path) -> float:
    """Convert the file once, and return the seconds that took, also later."""
    took = store.with_suffix(".seconds.txt")
    if not took.exists():
        shutil.rmtree(store, ignore_errors=True)
        start = time.perf_counter()
        DatasetCollection(store).add_adatas(adata_paths=[h5ad], shuffle=True)
        took.write_text(str(time.perf_counter() - start))
    return float(took.read_text())


def open_batches(store, task):
    """Return the batches of a loader that has 65,536 rows in memory, as tiledbsoma-ml 0.1.0 does."""
    chunk = task["options"]["chunk"]
    loader = Loader(
        batch_size=task["batch_size"],
        chunk_size=chunk,
        preload_nchunks=max(1, 65_536 // chunk),
        shuffle=True,
    )
    return loader.use_collection(DatasetCollection(store))


def measure(task):
    """Measure an epoch, or convert the file."""
    store = Path(task["h5ad"]).parent / "annbatch.zarr"
    prepare_s = prepare(task["h5ad"], store)
    if task["prepare_only"]:
        return {"prepare_s": prepare_s}
    record = measure_epoch(
        lambda: open_batches(store, task), X=lambda batch: batch["X"], limit_s=task["limit_s"]
    )
    return {**record, "prepare_s": prepare_s}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    answer_with(measure, request())
