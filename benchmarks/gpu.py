"""Measure what reaches a GPU: dense batches on it, the bytes sent for them, and how long scVI waits for data.

    python benchmarks/gpu.py --save
    python benchmarks/gpu.py --device cpu --rows 2048 --genes 500 --batch-size 128 --limit-s 1

Data of 20,000 genes are simulated first. All takes less than eight minutes. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import report
import tiledbsoma as soma
import torch
from make_data import DEFAULT_DATA_DIR, DataSpec, make_data, nnz_of
from torch.profiler import ProfilerActivity, profile

import tiledbsoma_ml
from tiledbsoma_ml import ExperimentDataset, Snapshot, experiment_dataloader

AUTO = {"shuffle_chunk_size": "auto", "io_batch_size": "auto"}
RESULTS = Path(__file__).parent / "results" / "gpu"


def main() -> None:
    options = parse_options()
    spec = DataSpec.of("census", rows=options.rows, genes=options.genes, nnz_per_row=options.nnz_per_row)
    start = time.perf_counter()
    uri = make_data(spec, options.data_dir)
    data_s = time.perf_counter() - start
    result = {"date": report.today(), "machine": report.machine(), "device": device_name(options.device)}
    result |= {"data": {"rows": spec.rows, "genes": spec.genes, "nnz": nnz_of(uri)}, "data_s": data_s}
    with ExitStack() as stack:
        experiment = stack.enter_context(soma.Experiment.open(str(uri), context=tiledbsoma_ml.context()))
        query = stack.enter_context(experiment.axis_query("RNA"))
        path = uri.with_name(f"{uri.name}.gpu.snapshot")
        start = time.perf_counter()
        Snapshot.create(path, query, obs_column_names=["cell_type"], progress=False)
        result["snapshot_s"] = time.perf_counter() - start
        result["cases"] = {
            "snapshot": dense_batches(query, options, {**AUTO, "snapshot": path}),
            "snapshot, shuffled on the device": dense_batches(
                query, options, {**AUTO, "snapshot": path, "shuffle_mode": "gpu"}
            ),
            "SOMA": dense_batches(query, options, AUTO),
        }
        result["scvi"] = scvi_waits(query, path, options)
    result["bytes_per_row_at_least"] = bytes_per_row_at_least(result["data"])
    text = json.dumps(result, indent=1)
    print(text)
    if options.save:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{result['date'][:10]}.json").write_text(text + "\n")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="default: %(default)s; cpu shows that it works")
    parser.add_argument("--rows", type=int, default=32_768, help="cells (default: %(default)s)")
    parser.add_argument("--genes", type=int, default=20_000, help="columns (default: %(default)s)")
    parser.add_argument(
        "--nnz-per-row", type=float, help="non-zeros of a cell (default: a tenth of the genes, at most 1900)"
    )
    parser.add_argument("--batch-size", type=int, default=1024, help="default: %(default)s")
    parser.add_argument("--limit-s", type=float, default=20, help="of each figure (default: %(default)s)")
    parser.add_argument("--data-dir", type=Path, default=DEFAULT_DATA_DIR, help="default: %(default)s")
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results/gpu")
    options = parser.parse_args()
    options.nnz_per_row = options.nnz_per_row or min(1900.0, options.genes / 10)
    options.data_dir = options.data_dir.resolve()
    options.device = torch.device(options.device)
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch finds; try --device cpu")
    return options


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def bytes_per_row_at_least(data: dict[str, int]) -> dict[str, float]:
    """Return what a row takes as dense float32, and as uint16 columns with uint16 values."""
    return {"dense": 4.0 * data["genes"], "non-zeros of 4 bytes": 4 * data["nnz"] / data["rows"]}


# Dense batches --------------------------------------------------------------------------------------------


def dense_batches(
    query: soma.ExperimentAxisQuery, options: argparse.Namespace, further: dict[str, Any]
) -> dict[str, float | None]:
    """Return how fast dense float32 batches come to the device, and what is sent for a row."""
    dataset = ExperimentDataset(
        query,
        layer_name="raw",
        obs_column_names=["cell_type"],
        batch_size=options.batch_size,
        seed=0,
        device=options.device,
        **further,
    )
    loader = experiment_dataloader(dataset)
    start = time.perf_counter()
    X, _ = next(iter(loader))
    synchronize(options.device)
    first_s = time.perf_counter() - start
    assert X.device.type == options.device.type
    assert X.dtype == torch.float32
    assert X.layout == torch.strided
    for _ in loader:  # so that what is measured are later epochs, and kernels are loaded
        pass
    rows_per_s = rate((X for X, _ in epochs(loader)), len, options)
    return {
        "rows_per_s": rows_per_s,
        "first_s": first_s,
        "bytes_sent_per_row": bytes_per_row(loader, options),
    }


def epochs(loader: Iterable[Any]) -> Iterator[Any]:
    """Yield the batches of one epoch after the other, without end."""
    return itertools.chain.from_iterable(itertools.repeat(loader))


def rate(batches: Iterable[Any], n_rows: Callable[[Any], int], options: argparse.Namespace) -> float:
    """Return the rows per second of batches, for as long as the limit says."""
    rows, start = 0, time.perf_counter()
    for batch in batches:
        rows += n_rows(batch)
        if time.perf_counter() - start > options.limit_s:
            break
    synchronize(options.device)
    return rows / (time.perf_counter() - start)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bytes_per_row(loader: Iterable[Any], options: argparse.Namespace) -> float | None:
    """Return the bytes that are sent to the device for a row, as torch's profiler saw them; None on a CPU.

    Whole epochs are profiled, since windows may be sent ahead of their batches.
    """
    if options.device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        rows = sum(len(X) for X, _ in loader)
        synchronize(options.device)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        return sent_bytes(json.loads(trace.read_text())) / rows


def sent_bytes(trace: dict[str, Any]) -> int:
    """Return the bytes of all copies to the device that a trace lists."""
    copies = (event for event in trace["traceEvents"] if event.get("name", "").startswith("Memcpy HtoD"))
    return sum(int(event["args"]["bytes"]) for event in copies)


# scVI -----------------------------------------------------------------------------------------------------


def scvi_waits(query: soma.ExperimentAxisQuery, path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the share of its time that scVI waits for data from a snapshot.

    Steps on batches as they come are compared with as many steps on one batch that stays on the device.
    """
    try:
        from scvi.model import SCVI

        from tiledbsoma_ml.scvi import SCVIDataModule
    except ImportError as err:
        return {"status": "not installed", "why": str(err)}
    datamodule = SCVIDataModule(
        query, batch_column_names=["cell_type"], batch_size=options.batch_size, snapshot=path, seed=0
    )
    module = SCVI(registry=datamodule.registry).module.to(options.device)
    optimizer = torch.optim.Adam(module.parameters())

    def step(batch: dict[str, torch.Tensor]) -> int:
        _, _, losses = module(batch)
        optimizer.zero_grad()
        losses.loss.backward()
        optimizer.step()
        return len(batch["X"])

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        for mini_batch in epochs(datamodule.train_dataloader()):
            batch = datamodule.on_before_batch_transfer(mini_batch, 0)
            sent = {name: tensor.to(options.device) for name, tensor in batch.items()}
            yield datamodule.on_after_batch_transfer(sent, 0)

    for kept in itertools.islice(batches(), 10):  # so that kernels are loaded
        step(kept)
    with_data = rate(batches(), step, options)
    without = rate(itertools.repeat(kept), step, options)
    return {
        "rows_per_s": with_data,
        "rows_per_s_without_data": without,
        "share_waiting": max(0.0, 1 - with_data / without),
    }


if __name__ == "__main__":
    main()
