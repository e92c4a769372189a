"""`XLocator`: the address of an X layer, with which any process can open it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import attrs
import pyarrow as pa
import tiledbsoma as soma

from tiledbsoma_ml._budget import Budget, keep_freed_memory
from tiledbsoma_ml._common import absolute_uri, check_name, first_line
from tiledbsoma_ml._context import context, open_experiment, tell_if_unprotected
from tiledbsoma_ml._eager_iter import EagerMap
from tiledbsoma_ml._vfs import open_vfs


@attrs.frozen(kw_only=True)
class XLocator:
    """The address of an `X` layer and of the `obs` beside it, with a timestamp and a configuration.

    A path is made absolute, so that it does not depend on the working directory. The configuration is the
    whole TileDB configuration of the experiment's context, storage credentials included, so that a worker
    process or another machine opens what the user opened.
    """

    uri: str = attrs.field(converter=absolute_uri)
    measurement_name: str
    layer_name: str
    tiledb_timestamp_ms: int
    tiledb_config: dict[str, str | float] = attrs.field(repr=False)

    @classmethod
    def create(
        cls, experiment: soma.Experiment, measurement_name: str, layer_name: str | None = None
    ) -> XLocator:
        """Return the address of a layer of an open `experiment`.

        Args:
            experiment: Must be open.
            measurement_name: For instance "RNA".
            layer_name: If left out, "raw" if there is one, else the only layer.

        Raises:
            ValueError: If the experiment is closed, a name does not exist, or the layer is left out where
                there are several and none is "raw".
        """
        check_open(experiment)
        config = experiment.context.tiledb_config
        tell_if_unprotected(config)
        check_name(
            "measurement_name", measurement_name, experiment.ms.keys(), of="a measurement of the experiment"
        )
        measurement = experiment.ms[measurement_name]
        layers = list(measurement.X.keys()) if "X" in measurement else []
        return cls(
            uri=_address(experiment),
            measurement_name=measurement_name,
            layer_name=_choose_layer(layer_name, layers, measurement_name),
            tiledb_timestamp_ms=experiment.tiledb_timestamp_ms,
            tiledb_config=config,
        )

    @property
    def is_remote(self) -> bool:
        """Whether the experiment is in an object store or on a server."""
        scheme, separator, _ = self.uri.partition("://")
        return bool(separator) and scheme != "file"

    @contextmanager
    def open(
        self, budget: Budget | None = None
    ) -> Iterator[tuple[soma.SparseNDArray | soma.DenseNDArray, soma.DataFrame]]:
        """Open the layer's array and the experiment's `obs`; both close with the context.

        Args:
            budget: Memory that reading may use. It sets the sizes of buffers that the configuration does not.
        """
        budget = budget or Budget(2**31, self.is_remote)
        if budget.keeps_freed_memory:
            keep_freed_memory()
        sizes = _buffer_sizes(self.tiledb_config, budget)
        config = {**self.tiledb_config, **sizes}
        if self.is_remote and str(config.get(_IO_LEVEL, os.cpu_count())) == str(os.cpu_count()):
            config[_IO_LEVEL] = IO_THREADS
        arrays = self._arrays(config)
        if "sm.mem.total_budget" in sizes:
            config["sm.mem.total_budget"] = max(budget.tiledb_of_stream, arrays.least_total_budget)
        own = context(config)

        def opened(array: tuple[Any, str]) -> Any:
            kind, uri = array
            return kind.open(uri, context=own, tiledb_timestamp=self.tiledb_timestamp_ms)

        both = (arrays.X_type, arrays.X_uri), (soma.DataFrame, arrays.obs_uri)
        with ExitStack() as stack:
            with self._told(), EagerMap(opened, iter(both), n_threads=len(both)) as at_once:
                X, obs = map(stack.enter_context, at_once)
            yield X, obs

    def latency(self) -> float:
        """Return how many seconds a request takes; 0 if it cannot be measured."""
        key = self.uri, str(self.tiledb_config.get("vfs.s3.endpoint_override"))
        if key not in _latencies:
            _latencies[key] = 0.0
            with suppress(OSError), open_vfs(self.tiledb_config) as vfs:
                _latencies[key] = vfs.latency(self.uri)
        return _latencies[key]

    def _arrays(self, config: dict[str, str | float]) -> _Arrays:
        """Return where the arrays are. It opens groups, which take many requests, once in a process."""
        key = self.uri, self.measurement_name, self.layer_name, self.tiledb_timestamp_ms
        if key not in _known_arrays:
            with self.open_experiment(config) as experiment:
                check_name("measurement_name", self.measurement_name, experiment.ms, of="a measurement")
                layers = experiment.ms[self.measurement_name].X
                check_name("layer_name", self.layer_name, layers, of="an X layer of the measurement")
                X, obs = layers[self.layer_name], experiment.obs
                least = _least_total_budget([X, obs], config)
                _known_arrays[key] = _Arrays(type(X), X.uri, obs.uri, least)
        return _known_arrays[key]

    def open_experiment(self, config: dict[str, str | float] | None = None) -> soma.Experiment:
        """Open the experiment as of its timestamp.

        Args:
            config: A configuration to use in place of `tiledb_config`.

        Raises:
            ValueError: If it cannot be opened.
        """
        with self._told():
            chosen = self.tiledb_config if config is None else config
            return open_experiment(self.uri, config=chosen, timestamp=self.tiledb_timestamp_ms)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Raise a ValueError that names the experiment in place of errors of opening it."""
        try:
            yield
        except (soma.SOMAError, RuntimeError, TypeError, ValueError) as err:
            raise ValueError(
                f"uri={self.uri!r} must be an experiment that can be opened with its tiledb_config, but: "
                f"{first_line(err)}; check the path, your access to it and the configuration."
            ) from err


@attrs.frozen
class _Arrays:
    """The arrays of a layer and of `obs`.

    Attributes:
        X_type: Type of the layer.
        X_uri: URI of the layer.
        obs_uri: URI of `obs`.
        least_total_budget: Smallest `sm.mem.total_budget` with which both can be read; 0 if it is not known.
    """

    X_type: type[soma.SparseNDArray] | type[soma.DenseNDArray]
    X_uri: str
    obs_uri: str
    least_total_budget: int


_known_arrays: dict[tuple[str, str, str, int], _Arrays] = {}

_latencies: dict[tuple[str, str], float] = {}

TEXT_BYTES = 48
"""Estimated memory of a value of a text dimension."""

IO_THREADS = 16
"""Threads on which TileDB waits for an object store. Its default is the number of cores."""

_IO_LEVEL = "sm.io_concurrency_level"

_TILEDB_DEFAULTS = {"soma.init_buffer_bytes": 2**30, "sm.mem.total_budget": 10 * 2**30}


def _buffer_sizes(config: dict[str, str | float], budget: Budget) -> dict[str, str | float]:
    """Return sizes for the buffers whose sizes a configuration does not set.

    A context that was used has a value for each setting, so TileDB's own default counts as not set.
    """
    for name in _TILEDB_DEFAULTS.keys() & config.keys():
        if not str(config[name]).isdigit():
            raise ValueError(
                f"tiledb_config[{name!r}]={config[name]!r} must be a number of bytes; leave it out."
            )
    ours = {"soma.init_buffer_bytes": budget.buffer, "sm.mem.total_budget": budget.tiledb_of_stream}
    return {
        name: size
        for name, size in ours.items()
        if str(config.get(name, _TILEDB_DEFAULTS[name])) == str(_TILEDB_DEFAULTS[name])
    }


def _least_total_budget(arrays: Sequence[Any], config: dict[str, str | float]) -> int:
    """Return the smallest `sm.mem.total_budget` with which sparse arrays can be read; 0 if it is not known.

    Without its parallel merge, TileDB divides half of this budget equally among the fragments, and each share
    must hold the coordinates of a tile.
    """
    least = 0
    with suppress(OSError), open_vfs(config) as vfs:
        for array in arrays:
            if isinstance(array, soma.DenseNDArray):
                continue
            n_fragments = len(vfs.names(f"{array.uri}/__fragments"))
            is_text = [
                not pa.types.is_primitive(array.schema.field(name).type) for name in _dimensions(array)
            ]
            cell_bytes = 2 + sum(TEXT_BYTES if text else 8 for text in is_text)
            tile_bytes = array.schema_config_options().capacity * cell_bytes
            least = max(least, 2 * n_fragments * tile_bytes)
    return least


def _dimensions(array: soma.SparseNDArray | soma.DataFrame) -> Sequence[str]:
    names: Sequence[str] = (
        array.index_column_names
        if isinstance(array, soma.DataFrame)
        else [f"soma_dim_{d}" for d in range(array.ndim)]
    )
    return names


def check_open(experiment: soma.Experiment) -> None:
    """Raise a ValueError if the experiment is closed."""
    if experiment.closed:
        raise ValueError(
            f"the experiment {experiment.uri!r} must be open; build the dataset inside "
            "`with tiledbsoma.Experiment.open(uri) as experiment:`."
        )


def _address(experiment: soma.Experiment) -> str:
    """Return the absolute URI of an experiment.

    TileDB resolves a relative path in the folder in which it was first used. Only the URIs of members of the
    experiment contain that folder.
    """
    uri: str = experiment.uri
    parent, _, name = str(experiment.obs.uri).removeprefix("file://").rpartition("/")
    is_path = "://" not in uri and name == "obs" and Path(parent).name == Path(uri).name
    return parent if is_path else uri


def _choose_layer(name: Any, layers: list[str], measurement_name: str) -> str:
    if not layers:
        raise ValueError(
            f"measurement_name={measurement_name!r} must have an X layer; "
            "choose another measurement in `axis_query`."
        )
    if name is not None:
        return check_name("layer_name", name, layers, of=f"an X layer of measurement {measurement_name!r}")
    if "raw" in layers:
        return "raw"
    if len(layers) == 1:
        return layers[0]
    listed = ", ".join(map(repr, layers))
    raise ValueError(
        "layer_name must be given where no layer is called 'raw'; "
        f"measurement {measurement_name!r} has {listed}."
    )
