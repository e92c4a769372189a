from __future__ import annotations

import ast
import errno
import fcntl
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiledbsoma as soma

import tiledbsoma_ml
from snapshots import N_SHARDS, assert_is_right, building, ending_at, make, partial, raising, write_entries
from stores import MEASUREMENT, N_VARS, Store, expected_X
from tiledbsoma_ml import QueryIDs
from tiledbsoma_ml.snapshot import Snapshot
from tiledbsoma_ml.snapshot.build import create
from tiledbsoma_ml.snapshot.creation import Progress
from tiledbsoma_ml.snapshot.format import MANIFEST
from tiledbsoma_ml.snapshot.segments import located, segment_of
from tiledbsoma_ml.snapshot.takeover import PARTIAL
from windows import WindowsBudget

# Once -----------------------------------------------------------------------------------------------------


def test_a_snapshot_is_made_once_and_then_used(store: Store, path: Path) -> None:
    made = make(path, store)
    assert_is_right(path)
    inode, modified = path.stat().st_ino, (path / MANIFEST).stat().st_mtime_ns
    again = make(path, store, progress=ending_at(0))  # at another timestamp: the experiment was opened anew
    assert again.fingerprint == made.fingerprint
    assert (path.stat().st_ino, (path / MANIFEST).stat().st_mtime_ns) == (inode, modified)


def test_rows_that_are_asked_for_twice_or_in_another_order_are_kept_once_and_ascending(
    store: Store, path: Path
) -> None:
    ids = QueryIDs(obs_joinids=[9, 3, 9, 200], var_joinids=range(N_VARS))
    Snapshot.create_from(path, [(store.locator, ids)], obs_column_names=["soma_joinid"], progress=False)
    assert_is_right(path, [3, 9, 200])


def test_columns_of_a_query_stay_in_its_order(store: Store, path: Path) -> None:
    ids = QueryIDs(obs_joinids=range(100), var_joinids=[20, 3, 11])
    snapshot = Snapshot.create_from(
        path, [(store.locator, ids)], obs_column_names=["soma_joinid"], progress=False
    )
    X, _ = snapshot[:]
    np.testing.assert_array_equal(X.toarray(), expected_X(range(100), [20, 3, 11]))
    assert snapshot.var["soma_joinid"].tolist() == [20, 3, 11]
    X.has_canonical_format = False
    X.sum_duplicates()
    np.testing.assert_array_equal(X.indices, snapshot[:][0].indices)


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"obs": slice(0, 9)}, "the number of rows is 20 there, not 10"),
        ({"obs": slice(1, 20)}, "obs_joinids are others"),
        ({"var": [1]}, "the number of columns is 2 there, not 1"),
        ({"var": [1, 5]}, "var_joinids are others"),
        ({"obs_column_names": ["score"]}, r"obs_column_names is \['soma_joinid'\] there, not \['score'\]"),
    ],
)
def test_a_snapshot_of_another_query_is_not_used_and_not_overwritten(
    store: Store, path: Path, other: dict[str, Any], difference: str
) -> None:
    make(path, store, slice(0, 19), [1, 2])
    with pytest.raises(ValueError, match=f"holds another one .*{difference}.*; choose another path"):
        make(path, store, **{"obs": slice(0, 19), "var": [1, 2], **other})
    assert Snapshot.open(path).shape == (20, 2)


def test_a_snapshot_is_not_used_for_an_experiment_that_was_written_to_since(
    make_store: Any, store: Store, path: Path
) -> None:
    changing = make_store(obs_joinids=range(20))
    make(path, changing)
    with soma.SparseNDArray.open(f"{changing.uri}/ms/{MEASUREMENT}/X/raw", "w") as X:
        write_entries(X, np.array([1]), np.array([1]), np.ones(1, np.float32))
    with pytest.raises(ValueError, match="X/raw was written to since the snapshot was made"):
        make(path, changing)
    with soma.Experiment.open(changing.uri, "w") as experiment:
        experiment.metadata["note"] = "no data"
    with pytest.raises(ValueError, match=r"the experiment is .* there, not"):
        make(path, store, slice(0, 19))


def test_what_is_no_snapshot_is_never_overwritten(store: Store, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("folder", "file", "link"):
        with pytest.raises(ValueError, match="something else is there, which is never overwritten"):
            make(tmp_path / name, store)
    assert sorted(other.name for other in tmp_path.iterdir()) == ["file", "folder", "link"]
    assert not list((tmp_path / "folder").iterdir())


def test_a_damaged_snapshot_is_named_and_not_made_anew(store: Store, path: Path) -> None:
    make(path, store)
    (path / "shard-00001.data").unlink()
    with pytest.raises(ValueError, match=r"shard-00001\.data' must be there"):
        make(path, store)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"obs_column_names": ["cell_typ"]}, "did you mean 'cell_type'"),
        ({"obs_column_names": "score"}, "must be a list of names"),
        ({"layer_name": "rw"}, "layer_name='rw' must be an X layer"),
        ({"layers": ["norm"]}, "layers='norm' must be an X layer"),
        ({"obsm": ["pca"]}, "obsm='pca' must be an array of obsm"),
        ({"memory_budget": "1MiB"}, "memory_budget='1MiB' must be at least 64 MiB"),
        ({"progress": "yes"}, "progress='yes' must be True, False or a function"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(
    store: Store, path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make(path, store, **options)
    assert not list(path.parent.iterdir())


def test_what_is_no_query_is_refused(store: Store, path: Path) -> None:
    with pytest.raises(TypeError, match="query must be an ExperimentAxisQuery, not of type str; try"):
        Snapshot.create(path, store.uri)


def test_a_closed_experiment_is_refused(store: Store, path: Path) -> None:
    with store.query() as query:
        pass
    with pytest.raises(ValueError, match="must be open"):
        Snapshot.create(path, query, progress=False)


# Shards ---------------------------------------------------------------------------------------------------


def test_a_small_budget_makes_small_shards(store: Store, path: Path) -> None:
    make(path, store)
    assert len(Snapshot.open(path)._manifest.layers[0].shards) == N_SHARDS
    shutil.rmtree(path)
    with store.query() as query:
        parts = [segment_of(*of) for of in located(query, None)]
    budget = WindowsBudget(2**26, windows_bytes=4 * 1000)
    names: dict[str, Any] = {"obs_column_names": ["soma_joinid"], "layers": [], "obsm": []}
    create(path, parts, **names, budget=budget, progress=Progress(False, ""))
    assert len(Snapshot.open(path)._manifest.layers[0].shards) > 2 * N_SHARDS
    assert_is_right(path)


# The disk -------------------------------------------------------------------------------------------------


def test_a_snapshot_is_made_where_nobody_else_looks_and_then_is_open_to_whom_the_umask_lets(
    store: Store, path: Path
) -> None:
    modes = []
    path.with_name("usual").mkdir()
    make(path, store, progress=lambda *_: modes.append(building(path).stat().st_mode & 0o777))
    assert set(modes) == {0o700}
    assert path.stat().st_mode == path.with_name("usual").stat().st_mode


def test_what_another_user_put_in_the_way_is_not_used_and_no_link_is_followed(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = path.with_name("other")
    other.mkdir()
    building(path).symlink_to(other)
    with pytest.raises(
        ValueError, match=r"is made in the folder .*, but a link or a file is there; remove it"
    ):
        make(path, store)
    building(path).unlink()
    partial(path, store)
    user = os.geteuid()
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: user + 1)
        with pytest.raises(OSError, match=r"but that belongs to the user .*, who began to make it; wait"):
            make(path, store)
    (other / "mine").write_text("mine")
    for name in ("shard-00001.indices", "obs.arrow", "manifest.json.new", f"{PARTIAL}.new"):
        (building(path) / name).unlink(missing_ok=True)
        (building(path) / name).symlink_to(other / "mine")
    make(path, store)
    assert (other / "mine").read_text() == "mine"
    assert_is_right(path)


def test_a_snapshot_on_a_disk_that_cannot_be_written_to_is_used(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(path, store)
    monkeypatch.setattr(fcntl, "flock", raising(errno.EROFS))
    make(path, store)


# The seam -------------------------------------------------------------------------------------------------


KNOW_NO_SOMA = [
    "build",
    "check",
    "claim",
    "content",
    "creation",
    "disk",
    "files",
    "format",
    "frames",
    "maker",
    "segment",
    "shards",
    "stored_layers",
    "takeover",
    "tasks",
]


def test_what_builds_a_snapshot_knows_nothing_of_experiments() -> None:
    of_soma = {
        "tiledbsoma",
        *(f"tiledbsoma_ml.{name}" for name in ("_soma.reader", "_soma.versions", "_vfs", "x_locator")),
    }
    for name in KNOW_NO_SOMA:
        text = (Path(tiledbsoma_ml.__file__).parent / "snapshot" / f"{name}.py").read_text()
        imports = [
            node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        found = {node.module for node in imports if isinstance(node, ast.ImportFrom)}
        found |= {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
        assert not found & of_soma, name
