"""Shards that a creation finished before it was killed, which the next creation takes over."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import attrs

from tiledbsoma_ml.snapshot.check import check_shard
from tiledbsoma_ml.snapshot.content import Content
from tiledbsoma_ml.snapshot.files import FORMAT, read_sealed, sealed, write_atomically
from tiledbsoma_ml.snapshot.format import fields_of, indices_dtype, shard_from, version_of
from tiledbsoma_ml.snapshot.shard import Shard

PARTIAL = "partial.json"


@attrs.frozen(kw_only=True)
class Finished:
    """The finished part of a creation.

    Attributes:
        borders: The first row of each shard, and the number of rows; empty if they are not decided yet.
        shards: The finished shards of each layer, which are its first ones.
    """

    borders: list[int]
    shards: dict[str, list[Shard]]


def keep_partial(folder: Path, content: Content, finished: Finished) -> None:
    """Write the finished part of a creation to `partial.json`."""
    fields = {
        "format": FORMAT,
        "format_version": version_of(chain.from_iterable(finished.shards.values())),
        "fingerprint": content.fingerprint,
        "borders": finished.borders,
        "shards": {name: [fields_of(s) for s in shards] for name, shards in finished.shards.items()},
    }
    write_atomically(folder / PARTIAL, sealed(fields))


def take_over(folder: Path, content: Content, dtypes: Mapping[str, str], compression: str | None) -> Finished:
    """Return the finished part of a creation that was killed, after checking its shards.

    The folder is removed if it belongs to a snapshot with another content.

    Args:
        folder: The folder in which the snapshot was being made.
        content: The content of the snapshot to make now.
        dtypes: The type of each layer.
        compression: Name of the compression that shards must have; None if they must not be compressed.
    """
    nothing = Finished(borders=[], shards={name: [] for name in content.layer_names})
    try:
        fields = read_sealed(folder / PARTIAL, "a snapshot in the making")
    except ValueError:
        fields = {}
    # If changes of a source cannot be noticed, the finished part may come from an older version of it.
    is_same = fields.get("fingerprint") == content.fingerprint and content.tells_changes
    if not is_same:
        shutil.rmtree(folder, ignore_errors=True)
        return nothing
    try:
        borders = _borders_from(fields["borders"], content.n_obs)
        shards = {
            name: list(
                _right_shards(
                    folder, content, name, dtypes[name], borders, fields["shards"][name], compression
                )
            )
            for name in content.layer_names
        }
    except (KeyError, TypeError, ValueError):
        return nothing
    return Finished(borders=borders, shards=shards)


def shard_name(content: Content, layer_name: str, number: int) -> str:
    """Return the name of the files of a shard, without the endings."""
    layer = content.layer_names.index(layer_name)
    return f"layer{layer}-shard-{number:05}" if layer else f"shard-{number:05}"


def _right_shards(
    folder: Path,
    content: Content,
    layer_name: str,
    dtype: str,
    borders: Sequence[int],
    written: Sequence[dict[str, Any]],
    compression: str | None,
) -> Iterator[Shard]:
    """Yield the shards of a layer that a killed creation finished, up to the first one that is wrong."""
    columns = indices_dtype(content.n_vars).str
    for number, (shard, rows) in enumerate(zip(map(shard_from, written), pairwise(borders))):  # noqa: B905
        name = shard_name(content, layer_name, number)
        if (shard.row_start, shard.row_stop) != rows or not shard.is_named(name):
            return
        if shard.compression != compression:
            return
        if any(shard.contradictions(dtype, columns, content.n_vars)):
            return
        try:
            for file in shard.files:
                file.check_content(folder)
            check_shard(folder, columns, shard, content.n_vars)
        except ValueError:
            return
        yield shard


def _borders_from(written: Any, n_obs: int) -> list[int]:
    """Return the borders of shards that a killed creation wrote.

    Raises:
        ValueError: If they do not ascend from 0 to the number of rows.
    """
    borders = [0, *(int(border) for border in written[1:])]
    if borders != written or borders[-1] != n_obs or any(b <= a for a, b in pairwise(borders)):
        raise ValueError(f"borders={written} must ascend from 0 to {n_obs}.")
    return borders
