"""Lists of the names in a folder, by TileDB's virtual file system, which tiledbsoma does not offer."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

from tiledbsoma import pytiledbsoma

_ON_NAME = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_char_p, ctypes.c_void_p)

_NO_THREADS = {"sm.compute_concurrency_level": "1", "sm.io_concurrency_level": "1"}


class VFS:
    """TileDB's virtual file system, which lists folders by URI; see `open_vfs`."""

    def __init__(self, context: ctypes.c_void_p, vfs: ctypes.c_void_p) -> None:
        self._context = context
        self._vfs = vfs

    def names(self, uri: str) -> list[str]:
        """Return the names in a folder, sorted; none if the folder does not exist.

        Raises:
            OSError: If it cannot be listed.
        """
        found: list[str] = []

        def on_name(path: bytes, _: object) -> int:
            found.append(path.decode().rstrip("/").rpartition("/")[2])
            return 1

        library = _library()
        is_there = ctypes.c_int32()
        folder = uri.encode()
        _check(library.tiledb_vfs_is_dir(self._context, self._vfs, folder, ctypes.byref(is_there)), uri)
        if is_there.value:
            _check(library.tiledb_vfs_ls(self._context, self._vfs, folder, _ON_NAME(on_name), None), uri)
        return sorted(found)

    def latency(self, uri: str) -> float:
        """Return how many seconds a request takes; the first one may have to connect.

        Raises:
            OSError: If the folder cannot be asked for.
        """
        seconds = []
        for _ in range(2):
            began = time.perf_counter()
            is_there = ctypes.c_int32()
            status = _library().tiledb_vfs_is_dir(
                self._context, self._vfs, uri.encode(), ctypes.byref(is_there)
            )
            _check(status, uri)
            seconds.append(time.perf_counter() - began)
        return min(seconds)


@contextmanager
def open_vfs(config: Mapping[str, str | float]) -> Iterator[VFS]:
    """Open TileDB's virtual file system with a configuration of TileDB, credentials included.

    Raises:
        OSError: If this tiledbsoma lacks the functions for it, or the configuration is not valid.
    """
    library, configuration, context, vfs = _library(), *(ctypes.c_void_p() for _ in range(3))
    with ExitStack() as stack:
        error = ctypes.c_void_p()
        _check(library.tiledb_config_alloc(ctypes.byref(configuration), ctypes.byref(error)), "config")
        stack.callback(library.tiledb_config_free, ctypes.byref(configuration))
        for name, value in {**config, **_NO_THREADS}.items():
            text = str(value).lower() if isinstance(value, bool) else str(value)
            status = library.tiledb_config_set(
                configuration, name.encode(), text.encode(), ctypes.byref(error)
            )
            _check(status, name)
        _check(library.tiledb_ctx_alloc(configuration, ctypes.byref(context)), "context")
        stack.callback(library.tiledb_ctx_free, ctypes.byref(context))
        _check(library.tiledb_vfs_alloc(context, configuration, ctypes.byref(vfs)), "file system")
        stack.callback(library.tiledb_vfs_free, ctypes.byref(vfs))
        yield VFS(context, vfs)


@cache
def _library() -> Any:
    """Return the TileDB library that tiledbsoma has loaded; its functions are found through its module."""
    library = ctypes.CDLL(pytiledbsoma.__file__)
    pointer, text = ctypes.c_void_p, ctypes.c_char_p
    arguments = {
        "tiledb_config_alloc": [pointer, pointer],
        "tiledb_config_set": [pointer, text, text, pointer],
        "tiledb_ctx_alloc": [pointer, pointer],
        "tiledb_vfs_alloc": [pointer, pointer, pointer],
        "tiledb_vfs_is_dir": [pointer, pointer, text, pointer],
        "tiledb_vfs_ls": [pointer, pointer, text, _ON_NAME, pointer],
        **{f"tiledb_{what}_free": [pointer] for what in ("config", "ctx", "vfs")},
    }
    for name, types in arguments.items():
        try:
            function = getattr(library, name)
        except AttributeError as err:
            raise OSError(f"this tiledbsoma does not offer {name}") from err
        function.argtypes = types
        function.restype = None if name.endswith("_free") else ctypes.c_int32
    return library


def _check(status: int, what: str) -> None:
    if status:
        raise OSError(f"TileDB cannot list: {what}")
