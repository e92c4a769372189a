"""Memory at an address, for compiled loops: `pointer`, `load` and `store`.

An array would be counted each time that a loop passes it on, which takes longer than copying a short run.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import intrinsic


@intrinsic
def pointer(_: Any, address: Any, dtype: Any) -> Any:
    """Return an address as a pointer to values of a type."""
    result = types.CPointer(dtype.dtype)

    def make(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(result))

    return result(address, dtype), make


@intrinsic
def load(_: Any, at: Any, k: Any) -> Any:
    """Return the value with the index `k` at a pointer."""

    def make(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        return context.unpack_value(builder, at.dtype, builder.gep(arguments[0], [arguments[1]]))

    return at.dtype(at, types.intp), make


@intrinsic
def store(_: Any, at: Any, k: Any, value: Any) -> Any:
    """Write a value, as the type of the pointer, with the index `k`."""

    def make(context: Any, builder: Any, _: Any, arguments: Any) -> None:
        context.pack_value(builder, at.dtype, arguments[2], builder.gep(arguments[0], [arguments[1]]))

    return types.void(at, types.intp, at.dtype), make
