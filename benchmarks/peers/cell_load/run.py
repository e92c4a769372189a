"""cell-load: sentences of cells of one type from an h5ad file, as its data module loads them; dense."""

import tempfile
import warnings
from pathlib import Path

from cell_load.data_modules import PerturbationDataModule
from measure import answer_with, measure_epoch, request

CONFIG = """
[datasets]
cells = "{folder}"
[training]
cells = "train"
[zeroshot]
[fewshot]
"""


def open_batches(task, scratch):
    """Return the training batches of the data module, with the assay in place of perturbations."""
    config = Path(scratch, "cells.toml")
    config.write_text(CONFIG.format(folder=Path(task["h5ad"]).parent))
    module = PerturbationDataModule(
        toml_config_path=str(config),
        embed_key="X",
        num_workers=0,
        batch_size=task["batch_size"],
        batch_col="donor_id",
        pert_col="assay",
        cell_type_key="cell_type",
        control_pert="10x 3' v1",
        output_space="all",
        basal_mapping_strategy="random",
    )
    module.setup()
    return module.train_dataloader()


def measure(task):
    """Measure an epoch."""
    with tempfile.TemporaryDirectory() as scratch:
        return measure_epoch(
            lambda: open_batches(task, scratch),
            X=lambda batch: batch["pert_cell_emb"],
            limit_s=task["limit_s"],
        )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    answer_with(measure, request())
