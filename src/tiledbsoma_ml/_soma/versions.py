"""Digests of the writes to the arrays of an experiment, which show whether it changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import attrs
import tiledbsoma as soma

from tiledbsoma_ml._vfs import open_vfs
from tiledbsoma_ml.x_locator import XLocator


@attrs.frozen(kw_only=True)
class Written:
    """The writes to an experiment.

    Attributes:
        uri: URI of the experiment, the same in every working directory.
        versions: A digest of the writes to each array, by a name like "obs", "var", "X/raw" or "obsm/X_pca".
            Arrays that TileDB cannot list are left out.
    """

    uri: str
    versions: dict[str, str]


def written_at(locator: XLocator, layer_names: Sequence[str], obsm_names: Sequence[str] = ()) -> Written:
    """Return the writes until the timestamp of an address to `obs`, `var`, and these layers and `obsm`."""
    with opened(locator) as (measurement, obs):
        arrays = {"obs": obs, "var": measurement.var}
        arrays |= {f"X/{name}": measurement.X[name] for name in layer_names}
        arrays |= {f"obsm/{name}": measurement.obsm[name] for name in obsm_names}
        uris = {name: _absolute(array.uri) for name, array in arrays.items()}
    return Written(uri=_absolute(locator.uri), versions=_versions(uris, locator))


@contextmanager
def opened(locator: XLocator) -> Iterator[tuple[soma.Measurement, soma.DataFrame]]:
    """Open the measurement of an address, and `obs`."""
    with locator.open_experiment() as experiment:
        yield experiment.ms[locator.measurement_name], experiment.obs


def _absolute(uri: str) -> str:
    """Return a URI that does not depend on the working directory."""
    scheme, separator, rest = uri.partition("://")
    if separator and scheme != "file":
        return uri.rstrip("/")
    return str(Path(rest if separator else uri).resolve())


def _versions(uris: dict[str, str], locator: XLocator) -> dict[str, str]:
    """Return, for each array, a digest of the names of the writes until the timestamp of an address.

    The timestamp itself says nothing: it is new each time an experiment is opened. Arrays that TileDB cannot
    list are left out.
    """
    found = {}
    with suppress(OSError), open_vfs(locator.tiledb_config) as vfs:
        for name, uri in uris.items():
            with suppress(OSError):
                fragments = vfs.names(f"{uri}/__fragments")
                commits = vfs.names(f"{uri}/__commits")
                found[name] = _version(fragments, commits, locator.tiledb_timestamp_ms)
    return {name: version for name, version in found.items() if version is not None}


def _version(fragments: list[str], commits: list[str], timestamp_ms: int) -> str | None:
    """Return a digest of the writes until a timestamp; None if a name has an unknown form."""
    names = [*fragments, *(name for name in commits if name.endswith((".del", ".upd")))]
    try:
        times = [int(name.lstrip("_").split("_")[0]) for name in names]
    except ValueError:  # names of another version of TileDB
        return None
    written = sorted(name for name, t in zip(names, times, strict=True) if t <= timestamp_ms)
    return hashlib.blake2b("\n".join(written).encode(), digest_size=8).hexdigest()
