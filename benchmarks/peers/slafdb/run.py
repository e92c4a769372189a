"""slafdb: its mixture of scanners over its own Lance store, without tokens ("raw mode")."""

import time
import warnings
from pathlib import Path

from measure import answer_with, measure_epoch, request
from slaf import SLAFArray
from slaf.data.converter import SLAFConverter
from slaf.ml.dataloaders import SLAFDataLoader


def prepare(h5ad: str, store: Path) -> float:
    """Convert the file once, and return the seconds that took, also later."""
    took = store.with_suffix(".seconds.txt")
    if not took.exists():
        start = time.perf_counter()
        SLAFConverter().convert(h5ad, str(store))
        took.write_text(str(time.perf_counter() - start))
    return float(took.read_text())


class Batch:
    """A batch: its number of cells and values, as other loaders' matrices tell them."""

    def __init__(self, batch):
        self.shape = (len(batch["cell_ids"]), None)
        self.nnz = len(batch["x"])


def batches_of(store, task):
    """Yield the batches until all cells came: behind the last one, the loader waits a minute for more."""
    cells = SLAFArray(str(store))
    n_left = len(cells.obs)  # this waits for the metadata, without which the loader finds nothing
    for batch in SLAFDataLoader(cells, batch_size=task["batch_size"], raw_mode=True, verbose=False):
        yield batch
        n_left -= len(batch["cell_ids"])
        if n_left <= 0:
            return


def measure(task):
    """Measure an epoch, or convert the file."""
    store = Path(task["h5ad"]).parent / "cells.slaf"
    prepare_s = prepare(task["h5ad"], store)
    if task["prepare_only"]:
        return {"prepare_s": prepare_s}
    record = measure_epoch(lambda: batches_of(store, task), X=Batch, limit_s=task["limit_s"])
    return {**record, "prepare_s": prepare_s}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    answer_with(measure, request())
