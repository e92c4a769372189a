"""scvi-tools' `TileDBDataModule` on tiledbsoma-ml 0.1.0: its loader and its transfer hook."""

import warnings

import tiledbsoma as soma
from measure import answer_with, measure_epoch, request
from scvi.dataloaders import TileDBDataModule


def batches_of(datamodule):
    """Yield the batches of an epoch as scVI takes them."""
    for mini_batch in datamodule.train_dataloader():
        yield datamodule.on_before_batch_transfer(mini_batch, 0)


def measure(task):
    """Measure an epoch; like a model, it sets the module up before it asks for batches."""
    with soma.Experiment.open(task["uri"]) as experiment, experiment.axis_query("RNA") as query:
        datamodule = TileDBDataModule(
            query,
            layer_name="raw",
            batch_column_names=["cell_type"],
            batch_size=task["batch_size"],
            seed=0,
            **task["options"],
        )
        datamodule.setup()
        return measure_epoch(
            lambda: batches_of(datamodule), X=lambda batch: batch["X"], limit_s=task["limit_s"]
        )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    answer_with(measure, request())
