"""`Partial`: what a creation leaves for a process that joins it, or that continues it after a kill."""

from __future__ import annotations

import secrets
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import attrs

from tiledbsoma_ml.snapshot.check import check_shard
from tiledbsoma_ml.snapshot.content import Content
from tiledbsoma_ml.snapshot.files import FORMAT, FORMAT_VERSION, read_sealed, sealed, write_atomically
from tiledbsoma_ml.snapshot.format import content_from, indices_dtype, shard_from

PARTIAL = "partial.json"


def new_creation() -> str:
    """Return a name that no other creation has."""
    return secrets.token_hex(8)


@attrs.frozen(kw_only=True)
class Partial:
    """A snapshot in the making, as `partial.json` describes it.

    Attributes:
        content: The content of the snapshot.
        borders: The first row of each shard, and the number of rows.
        bytes_per_row: Approximate size of a row of each layer, and of each array of `obsm`.
        compression: Name of the compression of `X`; None to compress nothing.
        creation: Name of the creation, which ends with the last process that takes part in it.
    """

    content: Content
    borders: list[int]
    bytes_per_row: dict[str, float]
    compression: str | None
    creation: str = attrs.field(factory=new_creation)

    def write(self, folder: Path) -> None:
        """Write `partial.json`."""
        fields = {"format": FORMAT, "format_version": FORMAT_VERSION, **attrs.asdict(self)}
        write_atomically(folder / PARTIAL, sealed(fields))

    @classmethod
    def read(cls, folder: Path) -> Partial:
        """Read `partial.json`.

        Raises:
            ValueError: If there is none, or it contradicts itself.
        """
        fields = read_sealed(folder / PARTIAL, "a snapshot in the making")
        try:
            content = content_from(fields["content"])
            return cls(
                content=content,
                borders=_borders_from(fields["borders"], content.n_obs),
                bytes_per_row={str(name): float(size) for name, size in fields["bytes_per_row"].items()},
                compression=fields["compression"],
                creation=str(fields["creation"]),
            )
        except (AttributeError, KeyError, TypeError) as err:
            raise ValueError(f"{PARTIAL} must describe a snapshot in the making, but: {err!r}.") from err


def is_current(folder: Path, creation: str) -> bool:
    """Return whether a creation is the one that goes on in a folder; if not, it was completed."""
    try:
        return Partial.read(folder).creation == creation
    except ValueError:
        return False


def take_over(folder: Path, content: Content, compression: str | None) -> Partial | None:
    """Return what a creation left whose processes have all ended, as a new creation.

    The folder is removed, and None is returned, if it belongs to a snapshot with another content, or with
    another compression than is asked for; "auto" asks for none.
    """
    try:
        left = Partial.read(folder)
    except ValueError:
        left = None
    # If changes of a source cannot be noticed, the finished part may come from an older version of it.
    is_same = left is not None and left.content.fingerprint == content.fingerprint and content.tells_changes
    if left is None or not is_same or compression not in ("auto", left.compression):
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return attrs.evolve(left, content=content, creation=new_creation())


def is_right_shard(
    folder: Path,
    written: Any,
    *,
    name: str,
    rows: tuple[int, int],
    dtype: str,
    n_vars: int,
    compression: str | None,
) -> bool:
    """Return whether an earlier creation finished a shard, and its files are as it wrote them.

    Args:
        folder: The folder in which the snapshot is made.
        written: The fields of the `Shard`, as they were recorded.
        name: Name of its files, without the endings.
        rows: Its first row, and the row after the last one.
        dtype: Type of the layer.
        n_vars: Number of columns.
        compression: Name of its compression; None if it must not be compressed.
    """
    columns = indices_dtype(n_vars).str
    try:
        shard = shard_from(written)
        if (shard.row_start, shard.row_stop) != rows or not shard.is_named(name):
            return False
        if shard.compression != compression:
            return False
        if any(shard.contradictions(dtype, columns, n_vars)):
            return False
        for file in shard.files:
            file.check_content(folder)
        check_shard(folder, columns, shard, n_vars)
    except (AttributeError, KeyError, TypeError, ValueError):
        return False
    return True


def _borders_from(written: Any, n_obs: int) -> list[int]:
    """Return the borders of shards that a creation wrote.

    Raises:
        ValueError: If they do not ascend from 0 to the number of rows.
    """
    borders = [0, *(int(border) for border in written[1:])]
    if borders != written or borders[-1] != n_obs or any(b <= a for a, b in pairwise(borders)):
        raise ValueError(f"borders={written} must ascend from 0 to {n_obs}.")
    return borders
