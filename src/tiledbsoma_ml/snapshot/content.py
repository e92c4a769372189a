"""What a snapshot holds, and where that came from: two with the same content hold the same."""

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
"""What the URI of a `Source` begins with."""

_TEXTS = attrs.validators.deep_iterable(TEXT)


@attrs.frozen(kw_only=True)
class Origin:
    """Where neighbouring rows of a snapshot come from: a query on an experiment, or a `Source`.

    Attributes:
        uri: URI of the experiment; `SOURCE` and the name of its class for a `Source`.
        measurement_name: For instance "RNA"; "" for a `Source`.
        tiledb_timestamp_ms: At which the experiment was opened; 0 for a `Source`.
        versions: What was written to each array, as a digest; without those for which that is not known. Of a
            `Source`, its content.
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
        """Whether it is a `Source`, not a query on an experiment."""
        return self.uri.startswith(SOURCE)

    @property
    def tells_changes(self) -> bool:
        """Whether it says of some of what it holds whether that changed."""
        return bool(self.versions) or not self.is_source

    def differences(self, other: Origin) -> list[str]:
        """Return in words what `other` has, and what this has instead, but for the rows."""
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
    """What a snapshot holds; two with the same fingerprint hold the same.

    Attributes:
        sources: Where the rows come from, one after the other.
        n_vars: Number of columns.
        var_digest: Digest of the joinids of the columns.
        layer_names: Layers of `X`; the first is the one that is read if none is named.
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
        """Columns that `obs` has: "soma_source" as well where there are several sources."""
        return self.obs_column_names if len(self.sources) == 1 else (*self.obs_column_names, "soma_source")

    @property
    def tells_changes(self) -> bool:
        """Whether each of its sources says of some of what it holds whether that changed."""
        return all(source.tells_changes for source in self.sources)

    @property
    def arrays(self) -> tuple[str, ...]:
        """Arrays that it comes from."""
        return arrays_of(self.layer_names, self.obsm_names)

    @property
    def fingerprint(self) -> str:
        """A digest of all but the timestamps, which are new whenever an experiment is opened."""
        text = json.dumps(attrs.asdict(self, filter=lambda a, _: a.name != "tiledb_timestamp_ms"))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def differences(self, other: Content) -> list[str]:
        """Return in words what `other` has, and what this has instead."""
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
    """Return how versions name the arrays that layers and arrays of `obsm` come with."""
    return ("obs", "var", *(f"X/{name}" for name in layer_names), *(f"obsm/{name}" for name in obsm_names))


def _differences(*compared: tuple[str, Any, Any]) -> list[str]:
    return [f"{what} is {ours!r} there, not {its!r}" for what, ours, its in compared if ours != its]


def warn_of_unknown(path: Path, made: Origin, asked: Origin, arrays: Sequence[str]) -> None:
    """Warn that of some arrays it cannot be told whether they were written to since a snapshot was made."""
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
