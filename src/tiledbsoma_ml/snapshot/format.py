"""`Manifest`: the shards, layers and arrays of a snapshot, and checks that they fit together.

`docs/snapshot_format.md` specifies it to the byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from tiledbsoma_ml._csr import smallest_uint
from tiledbsoma_ml.snapshot.content import Content, Origin
from tiledbsoma_ml.snapshot.files import (
    COMPRESSED_VERSION,
    COUNT,
    FORMAT,
    FORMAT_VERSION,
    TEXT,
    WAY_OUT,
    File,
    read_sealed,
    sealed,
    write_atomically,
)
from tiledbsoma_ml.snapshot.shard import DTYPES, Blocks, Shard, other_size

MANIFEST = "manifest.json"


PLACE_BYTES = 64
"""Memory of the place of a row that was decoded, about."""


@attrs.frozen(kw_only=True)
class Layer:
    """A layer of `X`.

    Attributes:
        name: Name of the layer.
        dtype: Type of the values that readers return.
        indices_dtype: Type of the stored columns.
        shards: The shards, which have all rows in order.
    """

    name: str = attrs.field(validator=TEXT)
    dtype: str = attrs.field(validator=TEXT)
    indices_dtype: str = attrs.field(validator=TEXT)
    shards: tuple[Shard, ...]

    @property
    def nnz(self) -> int:
        """Number of stored values."""
        return sum(shard.nnz for shard in self.shards)

    @property
    def nbytes(self) -> int:
        """Bytes of the files of all shards."""
        return sum(file.nbytes for shard in self.shards for file in shard.files)

    @property
    def held_row_bytes(self) -> float:
        """Mean memory of a row that was decoded: its columns and values, and its place."""
        widths = [np.dtype(shard.data_dtype).itemsize for shard in self.shards]
        entry_bytes = np.dtype(self.indices_dtype).itemsize + max(widths, default=0)
        return PLACE_BYTES + self.nnz * entry_bytes / max(1, sum(shard.n_rows for shard in self.shards))

    @property
    def compression(self) -> str | None:
        """Name of the compression; None if the layer is not compressed."""
        return next((shard.compression for shard in self.shards), None)

    @property
    def block_rows(self) -> int:
        """Largest number of neighbouring rows that are compressed together; 1 if none are."""
        return max((shard.blocks.n_rows for shard in self.shards if shard.blocks is not None), default=1)

    def contradictions(self, n_obs: int, n_vars: int) -> Iterator[str]:
        """Yield, in words, contradictions within the layer, or with the numbers of rows and columns."""
        if self.dtype not in DTYPES:
            yield f"layer {self.name!r} has the dtype {self.dtype!r}, which is none of X"
            return
        if self.indices_dtype != (expected := indices_dtype(n_vars).str):
            yield f"layer {self.name!r} has indices of {self.indices_dtype!r}, not {expected!r}"
            return
        if len({shard.blocks is None for shard in self.shards}) > 1:
            yield f"layer {self.name!r} has some shards that are compressed, and some that are not"
        row = 0
        for shard in self.shards:
            before, row = row, shard.row_stop
            if shard.row_start != before or shard.n_rows <= 0:
                yield f"{shard.data.name} has rows {shard.row_start:,} to {row:,}, not from {before:,} on"
            yield from shard.contradictions(self.dtype, self.indices_dtype, n_vars)
        if row != n_obs:
            yield f"the shards of layer {self.name!r} end with row {row:,}, not {n_obs:,}"


@attrs.frozen(kw_only=True)
class Embedding:
    """An array of `obsm`, with a row of `n_cols` values for each row of the snapshot."""

    name: str = attrs.field(validator=TEXT)
    dtype: str = attrs.field(validator=TEXT)
    n_cols: int = attrs.field(validator=COUNT)
    values: File

    def contradictions(self, n_obs: int) -> Iterator[str]:
        """Yield, in words, contradictions within the array, or with the number of rows."""
        if self.dtype not in DTYPES:
            yield f"obsm {self.name!r} has the dtype {self.dtype!r}, which is none of an array"
        else:
            yield from other_size(self.values, n_obs * self.n_cols, self.dtype)


def indices_dtype(n_vars: int) -> np.dtype[Any]:
    """Return the type of the numbers of `n_vars` columns."""
    dtype: np.dtype[Any] = smallest_uint(n_vars).newbyteorder("<")
    return dtype


@attrs.frozen(kw_only=True)
class Manifest:
    """The description of a snapshot and its files, without their data."""

    created_by: str = attrs.field(validator=TEXT)
    created_at: str = attrs.field(validator=TEXT)
    content: Content
    layers: tuple[Layer, ...]
    obsm: tuple[Embedding, ...]
    obs_joinids: File
    var_joinids: File
    obs: File
    var: File

    @property
    def files(self) -> Iterator[File]:
        """All files but the manifest itself."""
        yield from (self.obs_joinids, self.var_joinids, self.obs, self.var)
        for layer in self.layers:
            for shard in layer.shards:
                yield from shard.files
        yield from (embedding.values for embedding in self.obsm)

    @property
    def format_version(self) -> int:
        """The oldest version of the format that has all of this."""
        return version_of(shard for layer in self.layers for shard in layer.shards)

    def describe(self) -> str:
        """Return the size of the snapshot in words."""
        n_rows, n_cols, first = self.content.n_obs, self.content.n_vars, self.layers[0]
        stored = "not compressed" if first.compression is None else f"compressed by {first.compression}"
        n_bytes = sum(file.nbytes for file in self.files)
        return (
            f"{n_rows:,} by {n_cols:,}, {first.nnz:,} non-zeros of {first.nbytes / max(1, first.nnz):.2f} "
            f"bytes, {stored}, {n_bytes / 2**20:,.0f} MiB"
        )

    def write(self, folder: Path) -> None:
        """Write `manifest.json`."""
        fields = {
            "format": FORMAT,
            "format_version": self.format_version,
            "fingerprint": self.content.fingerprint,
            **fields_of(self),
        }
        write_atomically(folder / MANIFEST, sealed(fields))

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read `manifest.json`.

        Raises:
            ValueError: If `folder` is not a snapshot, has a newer format, or the manifest was altered.
        """
        fields = read_sealed(folder / MANIFEST, "a snapshot")
        path = str(folder / MANIFEST)
        try:
            manifest = _from_fields(fields)
        except KeyError as err:
            raise ValueError(f"{path!r} must be a manifest, but lacks {err}; {WAY_OUT}") from err
        except (TypeError, ValueError, AttributeError) as err:
            raise ValueError(f"{path!r} must be a manifest, but {err.args[0]}; {WAY_OUT}") from err
        if fields["fingerprint"] != manifest.content.fingerprint:
            raise ValueError(f"{path!r} must have the fingerprint of its content, but has another; {WAY_OUT}")
        if fields["format_version"] != manifest.format_version:
            raise ValueError(f"{path!r} must have format_version {manifest.format_version}; {WAY_OUT}")
        manifest.check(folder)
        return manifest

    def check(self, folder: Path) -> None:
        """Raise a ValueError if names, sizes, types or rows in the manifest contradict each other.

        No other file is read. After this check, files of the right sizes can be mapped safely.
        """
        if wrong := next(self._contradictions(), None):
            raise ValueError(f"{str(folder / MANIFEST)!r} must fit together, but {wrong}; {WAY_OUT}")

    def check_files(self, folder: Path) -> None:
        """Raise a ValueError that names the first file that is missing, or has a wrong size or wrong ends."""
        for file in self.files:
            file.check_size(folder)
        for layer in self.layers:
            for shard in layer.shards:
                shard.check_ends(folder)

    def _contradictions(self) -> Iterator[str]:
        content = self.content
        names = [file.name for file in self.files]
        for name in names:
            if name in ("", ".", "..", MANIFEST) or "/" in name or "\0" in name:
                yield f"{name!r} is no plain name of a file"
        if len(set(names)) < len(names):
            yield "two files have one name"
        if not content.sources or not content.layer_names:
            yield "it has no source, or no layer"
        if tuple(layer.name for layer in self.layers) != content.layer_names:
            yield f"it has other layers than {list(content.layer_names)}"
        if tuple(item.name for item in self.obsm) != content.obsm_names:
            yield f"it has other arrays of obsm than {list(content.obsm_names)}"
        yield from other_size(self.obs_joinids, content.n_obs, "<i8")
        yield from other_size(self.var_joinids, content.n_vars, "<i8")
        for layer in self.layers:
            yield from layer.contradictions(content.n_obs, content.n_vars)
        for item in self.obsm:
            yield from item.contradictions(content.n_obs)


def content_from(fields: dict[str, Any]) -> Content:
    """Return the content from the fields that `attrs.asdict` made of it."""
    return Content(
        sources=tuple(Origin(**source) for source in fields["sources"]),
        n_vars=fields["n_vars"],
        var_digest=fields["var_digest"],
        layer_names=tuple(fields["layer_names"]),
        obs_column_names=tuple(fields["obs_column_names"]),
        obsm_names=tuple(fields["obsm_names"]),
    )


def shard_from(fields: dict[str, Any]) -> Shard:
    """Return the shard from the fields that `attrs.asdict` made of it."""
    files = {name: File(**fields[name]) for name in ("indptr", "indices", "data")}
    given = fields.get("blocks")
    blocks = None if given is None else Blocks(**{**given, "table": File(**given["table"])})
    return Shard(**{**fields, **files, "blocks": blocks})


def fields_of(item: Manifest | Shard) -> dict[str, Any]:
    """Return the fields as JSON has them: what is None is left out."""
    return attrs.asdict(item, filter=lambda _, value: value is not None)


def version_of(shards: Iterable[Shard]) -> int:
    """Return the oldest version of the format that has such shards: only compressed ones need a newer one."""
    return FORMAT_VERSION if all(shard.blocks is None for shard in shards) else COMPRESSED_VERSION


def embedding_from(fields: dict[str, Any]) -> Embedding:
    """Return the array of `obsm` from the fields that `attrs.asdict` made of it."""
    return Embedding(**{**fields, "values": File(**fields["values"])})


def _from_fields(fields: dict[str, Any]) -> Manifest:
    return Manifest(
        created_by=fields["created_by"],
        created_at=fields["created_at"],
        content=content_from(fields["content"]),
        layers=tuple(
            Layer(**{**layer, "shards": tuple(shard_from(shard) for shard in layer["shards"])})
            for layer in fields["layers"]
        ),
        obsm=tuple(embedding_from(item) for item in fields["obsm"]),
        **{name: File(**fields[name]) for name in ("obs_joinids", "var_joinids", "obs", "var")},
    )
