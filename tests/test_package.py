"""What holds for the package as a whole: layers, what an import does, and the published interface."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from inspect import Parameter
from itertools import groupby
from pathlib import Path
from typing import Any, get_args

import pytest

import tiledbsoma_ml
from stores import Store
from tiledbsoma_ml import (
    ExperimentDataset,
    QueryIDs,
    ShuffleMode,
    XLocator,
    _distributed,
    _query_ids,
    dataset,
)
from tiledbsoma_ml._csr import CSR_IO_Buffer
from tiledbsoma_ml._eager_iter import EagerIterator
from tiledbsoma_ml._io_batch_iterable import IOBatchIterable
from tiledbsoma_ml._mini_batch_iterable import MiniBatchIterable

PACKAGE = Path(tiledbsoma_ml.__file__).parent

# Layers ---------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]


def listed_modules(text: str) -> list[str]:
    """Return the modules that the list in CONTRIBUTING.md names, from the top down."""
    [block] = re.findall(r"```\n(_common\.py.*?)```", text, flags=re.DOTALL)
    modules, folder = [], ""
    for line in block.splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()  # type: ignore[union-attr]
        if name.endswith("/"):
            folder = name.replace("/", ".")
        else:
            modules.append((folder if indent else "") + name.removesuffix(".py"))
    return modules


LAYOUT = listed_modules((ROOT / "CONTRIBUTING.md").read_text())
FOLDERS = {module.rpartition(".")[0] for module in LAYOUT} - {""}


def imported_by(module: str) -> Iterator[str]:
    """Yield what a module imports from this package, anywhere in its text; "" is the package itself.

    A folder stands for the last of its modules: whoever imports it imports all of them.
    """
    for node in ast.walk(ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            assert node.module is not None
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == PACKAGE.name:
                found = [known for known in (*LAYOUT, *FOLDERS) if f"{rest}.".startswith(f"{known}.")]
                longest = max(found, key=len, default="")
                within = [known for known in LAYOUT if known.startswith(f"{longest}.")]
                yield within[-1] if longest in FOLDERS else longest


def test_the_layout_has_every_module_once() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if path.stem != "__init__"]
    modules = [".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in files]
    assert sorted(LAYOUT) == sorted(modules)


def test_the_modules_of_a_folder_are_listed_together() -> None:
    folders = [module.split(".")[0] for module in LAYOUT]
    assert len([*groupby(folders)]) == len({*folders})


@pytest.mark.parametrize("module", LAYOUT)
def test_a_module_imports_only_from_modules_above_it(module: str) -> None:
    above = LAYOUT[: LAYOUT.index(module)]
    assert set(imported_by(module)) <= set(above)


def test_imports_are_found() -> None:
    assert set(imported_by("_csr")) == {"_common", "_kernels.bits", "_kernels.csr"}
    assert {"dataset", "_epoch.position"} <= set(imported_by("dataloader"))
    assert {"_common", "_order.share", "_order.windows"} <= set(imported_by("_order.plan"))
    assert "snapshot.source" in set(imported_by("data_module")), "a folder is all of its modules"


# Each module has its tests --------------------------------------------------------------------------------

# What has no file of its own, and why.
TESTED_ELSEWHERE = {
    "_kernels.csr": "_kernels/test_kernels.py has all loops over entries, of one matrix",
    "_kernels.hold": "_kernels/test_kernels.py has all loops over entries, of one matrix",
    "_kernels.place": "_kernels/test_kernels.py has all loops over entries, of one matrix",
    "_kernels.pointer": "_kernels/test_kernels.py has the loops that use it",
    "_cli": "test_cli.py calls the commands as users do",
    "_ray": "test_ray_train.py trains with RayTrainRunner",
    "_ingest": "_ingest/test_h5ad.py ingests files",
    "_scvi": "test_scvi.py and the files of _scvi look at what scvi-tools gets",
}


@pytest.mark.parametrize("module", LAYOUT)
def test_a_module_has_its_tests_in_the_same_folder(module: str) -> None:
    folder, _, name = module.rpartition(".")
    names = {f"test_{name.lstrip('_')}.py", f"test_{folder.lstrip('_')}_{name.lstrip('_')}.py"}
    found = [file for file in names if (ROOT / "tests" / folder / file).is_file()]
    assert len(found) == 1 or (not found and {module, folder} & set(TESTED_ELSEWHERE))


@pytest.mark.parametrize("module", LAYOUT)
def test_modules_functions_and_classes_are_short_enough_to_be_read(module: str) -> None:
    text = (PACKAGE / f"{module.replace('.', '/')}.py").read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            n_lines = node.end_lineno - node.lineno + 1
            assert n_lines <= (300 if isinstance(node, ast.ClassDef) else 60), node.name


# Importing ------------------------------------------------------------------------------------------------

WHAT_AN_IMPORT_DOES = """
import json, multiprocessing, os, sys, warnings
import numpy as np, tiledbsoma, torch

def state():
    return {
        "start method": multiprocessing.get_start_method(allow_none=True),
        "environment": dict(os.environ),
        "warnings": [repr(item) for item in warnings.filters],
        "numpy": repr([np.random.get_state()[1].tolist(), np.random.get_state()[2:]]),
        "torch": torch.get_rng_state().tolist(),
        "threads": torch.get_num_threads(),
        "default dtype": str(torch.get_default_dtype()),
        "sharing": torch.multiprocessing.get_sharing_strategy(),
    }

before, modules = state(), set(sys.modules)
import tiledbsoma_ml
after = state()
print(json.dumps({
    "changed": [key for key in before if before[key] != after[key]],
    "start method": after["start method"],
    "modules": sorted(set(sys.modules) - modules),
    "all": sorted(sys.modules),
}))
"""


@pytest.fixture(scope="module")
def of_import() -> dict[str, Any]:
    """What `import tiledbsoma_ml` does to a process that has imported torch and tiledbsoma."""
    command = [sys.executable, "-c", WHAT_AN_IMPORT_DOES]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def test_importing_the_package_loads_no_extra_no_compiler_and_no_command_line(of_import: Any) -> None:
    extras = {"lightning", "scvi", "ray", "typer", "rich", "numba", "matplotlib", "anndata"}
    assert not extras & set(of_import["modules"])
    assert not {"lightning", "ray", "rich", "numba", "matplotlib.pyplot"} & set(of_import["all"])
    own = {name.removeprefix("tiledbsoma_ml.") for name in of_import["modules"] if "tiledbsoma_ml." in name}
    assert {"dataset", "dataloader"} <= own
    assert not {"cli", "_cli.demo", "scvi", "simulate", "_kernels.csr"} & own


def test_importing_the_package_changes_no_global_state(of_import: Any) -> None:
    assert of_import["changed"] == []
    assert of_import["start method"] is None


def test_the_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


ON_A_BASE_INSTALL = """
import inspect, pydoc, sys
for package in ("lightning", "ray", "scvi"):
    sys.modules[package] = None  # cannot be imported
from tiledbsoma_ml import *
import tiledbsoma_ml

missing = ["ExperimentDataModule", "RayTrainRunner", "SCVIDataModule"]
assert ExperimentDataset is tiledbsoma_ml.ExperimentDataset
members = dict(inspect.getmembers(tiledbsoma_ml))
assert "Snapshot" in members and "Snapshot" in pydoc.render_doc(tiledbsoma_ml)
for name, extra in zip(missing, ["lightning", "ray", "scvi"], strict=True):
    assert name not in members and name not in dir(tiledbsoma_ml) and not hasattr(tiledbsoma_ml, name)
    assert getattr(tiledbsoma_ml, name, None) is None
    how = f"pip install 'tiledbsoma-ml[{extra}]'"
    asked = {f"tiledbsoma_ml.{name}": AttributeError, f"from tiledbsoma_ml import {name}": ImportError}
    for code, kind in asked.items():
        try:
            exec(code)
        except kind as err:
            assert how in str(err), (code, err)
        else:
            raise AssertionError(code)
try:
    tiledbsoma_ml.Snapshots
except AttributeError as err:
    assert "has no attribute" in str(err)
"""


def test_what_a_base_install_lacks_is_not_listed_and_tells_how_to_install_it() -> None:
    command = [sys.executable, "-W", "error", "-c", ON_A_BASE_INSTALL]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# The published interface ----------------------------------------------------------------------------------

# Every signature of the public interface of tiledbsoma-ml 0.1.0.
PUBLISHED: dict[Callable[..., Any], str] = {
    ExperimentDataset: """
        query=None, layer_name=None, x_locator=None, query_ids=None, obs_column_names=("soma_joinid",),
        batch_size=1, io_batch_size=65536, shuffle=True, shuffle_chunk_size=64, seed=None,
        return_sparse_X=False, use_eager_fetch=True, shuffle_mode=ShuffleMode.CPU, device=None
    """,
    ExperimentDataset.set_epoch: "self, epoch",
    ExperimentDataset.random_split: "self, *fracs, seed=None, method='stochastic_rounding'",
    tiledbsoma_ml.experiment_dataloader: "ds, **dataloader_kwargs",
    QueryIDs: "*, obs_joinids, var_joinids, partition=None",
    QueryIDs.create: "query",
    QueryIDs.random_split: "self, *fracs, seed=None, method='stochastic_rounding'",
    QueryIDs.partitioned: "self, partition",
    QueryIDs.shuffle_chunks: "self, shuffle_chunk_size, seed=None",
    IOBatchIterable: """
        chunks, io_batch_size, obs, var_joinids, X, obs_column_names=("soma_joinid",), seed=None,
        shuffle=True, use_eager_fetch=True
    """,
    MiniBatchIterable: """
        io_batch_iter, batch_size, use_eager_fetch=True, return_sparse_X=False, gpu_shuffle=False,
        gpu_shuffle_mode="iobatch", device=None, seed=None, epoch=0
    """,
    XLocator: "*, uri, measurement_name, layer_name, tiledb_timestamp_ms, tiledb_config",
    XLocator.create: "experiment, measurement_name, layer_name",
    CSR_IO_Buffer: "indptr, indices, data, shape",
    CSR_IO_Buffer.from_ijd: "i, j, d, shape",
    CSR_IO_Buffer.from_pjd: "p, j, d, shape",
    CSR_IO_Buffer.merge: "mtxs",
    CSR_IO_Buffer.slice_tonumpy: "self, row_index",
    CSR_IO_Buffer.slice_toscipy: "self, row_index",
    CSR_IO_Buffer.sort_indices: "self",
    EagerIterator: "iterator, pool=None",
    XLocator.open: "self",
    _distributed.get_distributed_rank_and_world_size: "",
    _distributed.get_worker_id_and_num: "",
}


def parameters(signature: str) -> list[Parameter]:
    """Return the parameters of a function that has this signature."""
    return list(inspect.signature(eval(f"lambda {' '.join(signature.split())}: None")).parameters.values())


@pytest.mark.parametrize("item", PUBLISHED, ids=lambda item: item.__qualname__)
def test_a_call_written_for_0_1_0_is_still_valid(item: Callable[..., Any]) -> None:
    published = parameters(PUBLISHED[item])
    found = list(inspect.signature(item).parameters.values())
    assert len(found) >= len(published)
    for ours, theirs in zip(found, published, strict=False):
        assert (ours.name, ours.kind) == (theirs.name, theirs.kind)
        if theirs.default is not Parameter.empty:
            assert ours.default == theirs.default
    for added in found[len(published) :]:
        assert added.default is not Parameter.empty


def test_the_defaults_have_their_published_names_and_values() -> None:
    assert dataset.DEFAULT_OBS_COLUMN_NAMES == ("soma_joinid",)
    assert dataset.DEFAULT_IO_BATCH_SIZE == 65536
    assert dataset.DEFAULT_SHUFFLE_CHUNK_SIZE == 64


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("tiledbsoma_ml", "ExperimentDataset"),
        ("tiledbsoma_ml", "SamplingMethod"),
        ("tiledbsoma_ml", "experiment_dataloader"),
        ("tiledbsoma_ml.dataset", "ExperimentDataset"),
        ("tiledbsoma_ml.dataloader", "experiment_dataloader"),
        ("tiledbsoma_ml._common", "MiniBatch"),
        ("tiledbsoma_ml._common", "NDArrayJoinId"),
        ("tiledbsoma_ml._common", "NDArrayNumber"),
        ("tiledbsoma_ml._common", "XBatch"),
        ("tiledbsoma_ml._query_ids", "Chunks"),
        ("tiledbsoma_ml._query_ids", "Partition"),
        ("tiledbsoma_ml._query_ids", "QueryIDs"),
        ("tiledbsoma_ml._query_ids", "SamplingMethods"),
        ("tiledbsoma_ml._eager_iter", "EagerIterator"),
        ("tiledbsoma_ml._io_batch_iterable", "IOBatch"),
        ("tiledbsoma_ml._io_batch_iterable", "IOBatchIterable"),
        ("tiledbsoma_ml._mini_batch_iterable", "MiniBatchIterable"),
        ("tiledbsoma_ml.x_locator", "XLocator"),
    ],
)
def test_a_published_name_is_where_it_was(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name)


def test_the_sampling_methods_are_the_published_ones() -> None:
    published = {"deterministic", "multinomial", "stochastic_rounding"}
    assert set(get_args(_query_ids.SamplingMethod)) == published


def test_a_dataset_has_the_published_attributes(store: Store) -> None:
    ids = QueryIDs(obs_joinids=range(10), var_joinids=range(4))
    made = ExperimentDataset(x_locator=store.locator, query_ids=ids, batch_size=3, return_sparse_X=True)
    assert (made.x_locator, made.query_ids) == (store.locator, ids)
    assert (made.batch_size, made.io_batch_size, made.shuffle_chunk_size) == (3, 65536, 64)
    assert (made.shuffle, made.seed, made.use_eager_fetch, made.epoch) == (True, None, True, 0)
    assert (made.return_sparse_X, made.shuffle_mode, made.device) == (True, ShuffleMode.CPU, None)
    assert made.obs_column_names == ["soma_joinid"]
    assert (made.measurement_name, made.layer_name) == (store.locator.measurement_name, "raw")
    assert (made.rank, made.world_size) == (0, 1)
    made.epoch = 3
    assert made.epoch == 3
    assert (len(made), made.shape) == (4, (4, 4))


def test_everything_public_is_exported() -> None:
    for name in tiledbsoma_ml.__all__:
        assert hasattr(tiledbsoma_ml, name)
    assert tiledbsoma_ml.__all__ == sorted(tiledbsoma_ml.__all__)
