from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshots import files_of, set_value, with_manifest
from stores import N_OBS, N_VARS, expected_X
from tiledbsoma_ml.snapshot import Snapshot
from tiledbsoma_ml.snapshot.format import MANIFEST, Manifest


def code_blocks(path: Path) -> Iterator[str]:
    yield from re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


def test_the_reader_of_the_format_document_reads_a_snapshot_with_numpy_alone(whole: Snapshot) -> None:
    code, of_blocks = code_blocks(Path(__file__).parents[2] / "docs" / "snapshot_format.md")
    assert len(code.strip().splitlines()) <= 25
    assert len(of_blocks.strip().splitlines()) <= 30
    names: dict[str, Any] = {}
    exec(code, names)
    rows = [310, 0, 64, 63, 3]
    X = names["read_rows"](whole.path, rows)
    assert X.dtype == np.float32
    np.testing.assert_array_equal(X, expected_X(rows, range(N_VARS)))


def test_the_reader_of_compressed_rows_in_the_format_document_reads_a_block(compressed: Snapshot) -> None:
    names: dict[str, Any] = {"np": np}
    exec([*code_blocks(Path(__file__).parents[2] / "docs" / "snapshot_format.md")][1], names)
    [layer] = json.loads((compressed.path / MANIFEST).read_text())["layers"]
    X = compressed[:][0]
    for shard in layer["shards"]:
        for row in {
            0,
            (shard["row_stop"] - shard["row_start"]) // 2,
            shard["row_stop"] - shard["row_start"] - 1,
        }:
            columns, values = names["read_block"](compressed.path, layer, shard, row)
            expected = X[shard["row_start"] + row]
            assert columns.tolist() == expected.indices.tolist()
            assert values.tolist() == expected.data.tolist()


@given(data=st.data())
def test_no_flip_in_the_manifest_goes_unseen(whole: Snapshot, folder: Path, data: Any) -> None:
    content = (whole.path / MANIFEST).read_bytes()
    k, flip = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(1, 255))
    (folder / "flipped").mkdir(exist_ok=True)
    (folder / "flipped" / MANIFEST).write_bytes(content[:k] + bytes([content[k] ^ flip]) + content[k + 1 :])
    with pytest.raises(ValueError, match=MANIFEST):
        Manifest.read(folder / "flipped")


def test_missing_and_truncated_files_are_named_when_a_snapshot_is_opened(copied_either: Path) -> None:
    for name in files_of(copied_either):
        file = copied_either / name
        content = file.read_bytes()
        file.unlink()
        with pytest.raises(ValueError, match=f"{re.escape(name)}.*"):
            Snapshot.open(copied_either)
        file.write_bytes(content[:-1] if content else b"more")
        with pytest.raises(ValueError, match=re.escape(name)) as raised:
            Snapshot.open(copied_either)
        if name != MANIFEST:
            assert re.search(rf"must have {len(content):,} bytes \(SHA-256 \w+\), not", str(raised.value))
        file.write_bytes(content)
    Snapshot.open(copied_either)


SHARD = ("layers", 0, "shards", 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_value("obs", "name", "../obs.arrow"), "'../obs.arrow' is no plain name"),
        (set_value("obs", "name", ".."), "is no plain name"),
        (set_value("obs", "name", MANIFEST), "is no plain name"),
        (set_value(*SHARD, "data", "name", "shard-00000.data"), "two files have one name"),
        (set_value(*SHARD, "data_dtype", "<f8"), "has values of '<f8', in which '<f4' is not kept"),
        (set_value(*SHARD, "data_dtype", "|O"), "has values of '|O'"),
        (set_value(*SHARD, "nnz", 3), "not the 6 of 3 values of '<u2'"),
        (set_value(*SHARD, "nnz", 2**62), "has more values than 64 rows of 23 columns"),
        (set_value(*SHARD, "row_start", 63), "has rows 63 to 128, not from 64 on"),
        (set_value("layers", 0, "shards", -1, "row_stop", N_OBS + 1), "bytes, not the"),
        (lambda fields: fields["layers"][0]["shards"].pop(), "end with row 256, not 311"),
        (set_value("layers", 0, "dtype", "|O"), "has the dtype '|O', which is none of X"),
        (set_value("layers", 0, "indices_dtype", "<u4"), "has indices of '<u4', not '<u2'"),
        (set_value("layers", []), "has other layers than"),
        (set_value("content", "n_vars", 22), "fingerprint"),
        (set_value("obs_joinids", "nbytes", 8), "obs_joinids has 8 bytes, not the"),
        (set_value(*SHARD, "nnz", "3"), "must be a manifest, but 'nnz' must be"),
        (set_value(*SHARD, "nnz", -3), "must be a manifest, but 'nnz' must be >= 0"),
        (set_value("layers", 0, "shards", 7), "must be a manifest, but"),
        (lambda fields: fields.pop("var"), "must be a manifest, but lacks 'var'"),
    ],
)
def test_a_manifest_that_does_not_fit_together_is_refused_whatever_its_checksum(
    copied: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    with_manifest(copied, change)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        Snapshot.open(copied)
    assert MANIFEST in str(raised.value)


def test_files_that_are_links_or_folders_are_refused(copied: Path, tmp_path: Path) -> None:
    for name in ("shard-00001.data", MANIFEST):
        (copied / name).rename(tmp_path / name)
        (copied / name).symlink_to(tmp_path / name)
        with pytest.raises(ValueError, match=f"{re.escape(name)}' must be a plain file, no link"):
            Snapshot.open(copied)
        (copied / name).unlink()
        (copied / name).mkdir()
        with pytest.raises(
            ValueError, match=f"{re.escape(name)}' must be a plain file, no link and no folder"
        ):
            Snapshot.open(copied)
        (copied / name).rmdir()
        (tmp_path / name).rename(copied / name)
    Snapshot.open(copied)


def test_a_newer_format_is_refused(copied: Path) -> None:
    text = (copied / MANIFEST).read_text().replace('"format_version": 1', '"format_version": 3')
    (copied / MANIFEST).write_text(text)
    with pytest.raises(ValueError, match=r"must have format_version 1 or 2, not 3; .* install a newer one"):
        Snapshot.open(copied)


def test_only_a_compressed_snapshot_has_the_newer_version(copied_either: Path) -> None:
    version = 1 if Snapshot.open(copied_either).compression is None else 2
    assert json.loads((copied_either / MANIFEST).read_text())["format_version"] == version
    with_manifest(copied_either, set_value("format_version", 3 - version))
    with pytest.raises(ValueError, match=rf"manifest\.json' must have format_version {version};"):
        Snapshot.open(copied_either)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_value(*SHARD, "blocks", "codec", "gzip"), "has the codec 'gzip', not 'zstd'"),
        (set_value(*SHARD, "blocks", "n_rows", 0), "has blocks of 0 rows, not of 1 to 4,096"),
        (set_value(*SHARD, "blocks", "n_rows", 5000), "has blocks of 5,000 rows"),
        (set_value(*SHARD, "blocks", "n_rows", 16), "shard-00001.blocks has"),
        (set_value(*SHARD, "blocks", "table", "name", "../x"), "'../x' is no plain name"),
        (set_value(*SHARD, "blocks", 7), "must be a manifest, but"),
        (set_value(*SHARD, "indices", "nbytes", 0), "has 0 bytes, too few for"),
        (lambda fields: fields["layers"][0]["shards"][1].pop("blocks"), "some shards that are compressed"),
    ],
)
def test_a_manifest_of_compressed_rows_that_does_not_fit_together_is_refused(
    compressed: Snapshot, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    copied = Path(shutil.copytree(compressed.path, tmp_path / "copied.snapshot"))
    with_manifest(copied, change)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        Snapshot.open(copied)
    assert MANIFEST in str(raised.value)


@pytest.mark.parametrize("text", ["{}", "[]", '"x"', '{"format": "other"}', "\xff"])
def test_another_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=MANIFEST):
        Snapshot.open(tmp_path)
