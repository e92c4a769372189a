"""`Content`: the rows, columns and layers of a snapshot, and their origin, which identify what it holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import attrs

from tiledbsoma_ml._common import warn
from tiledbsoma_ml.snapshot.files import COUNT, TEXT

SOURCE = "source:"
"""Prefix of the URI of a `Source`."""

_TEXTS = attrs.validators.deep_iterable(TEXT)


@attrs.frozen(kw_only=True)
class Origin:
    """The origin of consecutive rows of a snapshot: a query on an experiment, or a `Source`.

    Attributes:
        uri: URI of the experiment; for a `Source`, the prefix `SOURCE` and the name of its class.
        measurement_name: Name of the measurement, for instance "RNA"; "" for a `Source`.
        tiledb_timestamp_ms: Timestamp at which the experiment was opened; 0 for a `Source`.
        versions: A digest of the writes to each array that TileDB can list; for a `Source`, its content.
        n_obs: Number of rows.
        obs_digest: Digest of their joinids.
    """

    uri: str = attrs.field(validator=TEXT)
    measurement_name: str = attrs.field(validator=TEXT)
    tiledb_timestamp_ms: int = attrs.field(validator=COUNT)
    versions: dict[str, str] = attrs.field(validator=attrs.validators.deep_mapping(TEXT, TEXT))
    n_obs: int = attrs.field(validator=COUNT)
    obs_digest: str = attrs.field(validator=TEXT)

    @property
    def is_source(self) -> bool:
        """Whether the origin is a `Source`, and not a query on an experiment."""
        return self.uri.startswith(SOURCE)

    @property
    def tells_changes(self) -> bool:
        """Whether some changes of the origin can be noticed."""
        return bool(self.versions) or not self.is_source

    def differences(self, other: Origin) -> list[str]:
        """Return the differences from another origin in words, except for the rows."""
        found = _differences(
            ("the source" if self.is_source and other.is_source else "the experiment", self.uri, other.uri),
            ("the measurement", self.measurement_name, other.measurement_name),
        )
        if found:
            return found
        ours, its = self.versions, other.versions
        if self.is_source:
            names = sorted(ours.keys() | its.keys())
            return _differences(*((f"content[{name!r}]", ours.get(name), its.get(name)) for name in names))
        written = [name for name in sorted(ours.keys() & its.keys()) if ours[name] != its[name]]
        return [f"{written[0]} was written to since the snapshot was made"] if written else []


@attrs.frozen(kw_only=True)
class Content:
    """The content of a snapshot; snapshots with the same fingerprint hold the same.

    Attributes:
        sources: The origins of the rows, in order.
        n_vars: Number of columns.
        var_digest: Digest of the joinids of the columns.
        layer_names: Layers of `X`; the first is read by default.
        obs_column_names: Columns of `obs`.
        obsm_names: Arrays of `obsm`.
    """

    sources: tuple[Origin, ...]
    n_vars: int = attrs.field(validator=COUNT)
    var_digest: str = attrs.field(validator=TEXT)
    layer_names: tuple[str, ...] = attrs.field(validator=_TEXTS)
    obs_column_names: tuple[str, ...] = attrs.field(validator=_TEXTS)
    obsm_names: tuple[str, ...] = attrs.field(validator=_TEXTS)

    @property
    def n_obs(self) -> int:
        """Number of rows."""
        return sum(source.n_obs for source in self.sources)

    @property
    def stored_obs_names(self) -> tuple[str, ...]:
        """Columns that `obs` has in the snapshot: also "soma_source" if there are several origins."""
        return self.obs_column_names if len(self.sources) == 1 else (*self.obs_column_names, "soma_source")

    @property
    def tells_changes(self) -> bool:
        """Whether some changes of each origin can be noticed."""
        return all(source.tells_changes for source in self.sources)

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of the arrays that the content comes from, as in `Origin.versions`."""
        return arrays_of(self.layer_names, self.obsm_names)

    @property
    def fingerprint(self) -> str:
        """A digest of everything but the timestamps, which are new each time an experiment is opened."""
        text = json.dumps(attrs.asdict(self, filter=lambda a, _: a.name != "tiledb_timestamp_ms"))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def differences(self, other: Content) -> list[str]:
        """Return the differences from another content in words."""
        found = _differences(
            ("the number of queries", len(self.sources), len(other.sources)),
            ("the number of rows", self.n_obs, other.n_obs),
            ("the number of columns", self.n_vars, other.n_vars),
            ("the layers", list(self.layer_names), list(other.layer_names)),
            ("obs_column_names", list(self.obs_column_names), list(other.obs_column_names)),
            ("obsm", list(self.obsm_names), list(other.obsm_names)),
        )
        for ours, its in zip(self.sources, other.sources, strict=False):
            found += ours.differences(its)
        if not found and self.var_digest != other.var_digest:
            found = ["var_joinids are others, or in another order"]
        if not found and any(
            a.obs_digest != b.obs_digest for a, b in zip(self.sources, other.sources, strict=True)
        ):
            found = ["obs_joinids are others"]
        return found


def arrays_of(layer_names: Sequence[str], obsm_names: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the names, as in `Origin.versions`, of `obs`, `var`, these layers and arrays of `obsm`."""
    return ("obs", "var", *(f"X/{name}" for name in layer_names), *(f"obsm/{name}" for name in obsm_names))


def _differences(*compared: tuple[str, Any, Any]) -> list[str]:
    return [f"{what} is {ours!r} there, not {its!r}" for what, ours, its in compared if ours != its]


def warn_of_unknown(path: Path, made: Origin, asked: Origin, arrays: Sequence[str]) -> None:
    """Warn if changes of some arrays since a snapshot was made could not be noticed."""
    if not made.tells_changes and not asked.tells_changes:
        warn(
            f"snapshot={str(path)!r} holds {made.uri!r}; whether that changed since cannot be told, because "
            "its `content` is empty; if so, make it again at another path.",
        )
    if made.is_source:
        return
    if unknown := [name for name in arrays if name not in made.versions.keys() & asked.versions.keys()]:
        date = datetime.fromtimestamp(made.tiledb_timestamp_ms / 1000, UTC).isoformat(timespec="seconds")
        warn(
            f"snapshot={str(path)!r} holds {made.uri!r} as of {date}; whether {', '.join(unknown)} changed "
            "since cannot be told, because TileDB cannot list what was written there; if so, make it again "
            "at another path.",
        )
