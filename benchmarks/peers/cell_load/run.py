"""cell-load: sets of 64 cells of one type, each with a control, from an h5ad file; dense."""

import tempfile
import warnings
from pathlib import Path

from cell_load.data_modules import PerturbationDataModule
from measure import answer_with, measure_epoch, request

SET_SIZE = 64  # cells of one type; where there are fewer, some are taken again
CONFIG = """
[datasets]
cells = "{folder}"
[training]
cells = "train"
[zeroshot]
[fewshot]
"""


def open_batches(task, scratch):
    """Return the training batches of the data module: cell types take the place of perturbations.

    Controls are cells of the most common type, of which each assay, in place of a cell line, has some.
    """
    config = Path(scratch, "cells.toml")
    config.write_text(CONFIG.format(folder=Path(task["h5ad"]).parent))
    module = PerturbationDataModule(
        toml_config_path=str(config),
        num_workers=0,
        batch_size=max(1, task["batch_size"] // SET_SIZE),
        cell_sentence_len=SET_SIZE,
        batch_col="donor_id",
        pert_col="cell_type",
        cell_type_key="assay",
        control_pert="cell type 0",
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
