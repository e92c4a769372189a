"""BioNeMo-SCDL: random rows of its memory-mapped copy, collated into sparse tensors by its own function."""

import shutil
import time
import warnings
from pathlib import Path

from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset
from bionemo.scdl.util.torch_dataloader_utils import collate_sparse_matrix_batch
from measure import answer, measure_epoch, request
from torch.utils.data import DataLoader


def prepare(h5ad: str, folder: Path) -> float:
    """Convert the file once, and return the seconds that took, also later."""
    took = folder / "seconds.txt"
    if not took.exists():
        shutil.rmtree(folder, ignore_errors=True)
        start = time.perf_counter()
        SingleCellMemMapDataset(str(folder), h5ad, use_X_not_raw=True).save()
        took.write_text(str(time.perf_counter() - start))
    return float(took.read_text())


def main() -> None:
    warnings.simplefilter("ignore")
    task = request()
    folder = Path(task["h5ad"]).parent / "bionemo_scdl"
    prepare_s = prepare(task["h5ad"], folder)
    if task["prepare_only"]:
        answer({"prepare_s": prepare_s})
        return
    record = measure_epoch(
        lambda: DataLoader(
            SingleCellMemMapDataset(str(folder)),
            batch_size=task["batch_size"],
            shuffle=True,
            collate_fn=collate_sparse_matrix_batch,
        ),
        limit_s=task["limit_s"],
    )
    answer({**record, "prepare_s": prepare_s})


if __name__ == "__main__":
    main()
