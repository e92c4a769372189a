"""scDataset: blocks of 64 rows of a backed h5ad file, shuffled; sparse."""

import anndata
from measure import answer, measure_epoch, request
from scdataset import BlockShuffling, scDataset
from torch.utils.data import DataLoader


def open_batches(task):
    """Return batches of a fetch factor that shuffles 65,536 rows together, as tiledbsoma-ml does."""
    dataset = scDataset(
        anndata.read_h5ad(task["h5ad"], backed="r"),
        BlockShuffling(block_size=64),
        batch_size=task["batch_size"],
        fetch_factor=max(1, 65_536 // task["batch_size"]),
        fetch_transform=lambda rows: rows.to_memory().X,
        seed=0,
    )
    return DataLoader(dataset, batch_size=None)


if __name__ == "__main__":
    task = request()
    answer(measure_epoch(lambda: open_batches(task), limit_s=task["limit_s"]))
