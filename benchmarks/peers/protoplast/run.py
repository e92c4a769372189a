"""protoplast: sequential blocks of an h5ad file, as its data module loads them."""

import warnings

from measure import answer, measure_epoch, request
from protoplast.scrna.anndata.strategy import SequentialShuffleStrategy
from protoplast.scrna.anndata.torch_dataloader import AnnDataModule, DistributedAnnDataset


def open_batches(task):
    """Return the training batches of the data module over the whole file."""
    n_workers = task["options"].get("num_workers", 0)
    strategy = SequentialShuffleStrategy(
        [task["h5ad"]],
        task["batch_size"],
        max(n_workers, 1),
        0.0,
        0.0,
        metadata_cb=lambda adata, metadata: None,
        drop_last=False,
    )
    module = AnnDataModule(
        strategy.split(), DistributedAnnDataset, 2, "X", strategy, override_thread=n_workers
    )
    module.setup("fit")
    return module.train_dataloader()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    task = request()
    answer(measure_epoch(lambda: open_batches(task), limit_s=task["limit_s"]))
