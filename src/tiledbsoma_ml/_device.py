"""`DeviceRows`: sparse rows on a torch device, which are taken, concatenated and made dense there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np
import torch
from numpy.typing import NDArray

_CARRIER = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
"""The type that carries the bits of values of a type that torch holds but cannot index."""


@attrs.frozen
class DeviceRows:
    """Sparse rows (CSR) on a device.

    Attributes:
        crow: Where each row starts, int64, of shape (n_rows + 1,).
        col: Columns, int32, of shape (nnz,).
        bits: Values, of shape (nnz,), in a type that carries them.
        dtype: The type of the values themselves.
        n_cols: Number of columns.
    """

    crow: torch.Tensor
    col: torch.Tensor
    bits: torch.Tensor
    dtype: torch.dtype
    n_cols: int

    @classmethod
    def put(
        cls,
        indptr: NDArray[np.int64],
        indices: NDArray[Any],
        data: NDArray[Any],
        n_cols: int,
        device: torch.device,
    ) -> DeviceRows:
        """Copy the arrays of a CSR matrix to the device, once each, in their narrow types."""
        crow, col, values = (torch.from_numpy(array).to(device) for array in (indptr, indices, data))
        bits = values.view(_CARRIER.get(values.dtype, values.dtype))
        return cls(crow, col.to(torch.int32), bits, values.dtype, n_cols)

    @classmethod
    def concat(cls, parts: Sequence[DeviceRows]) -> DeviceRows:
        """Return the rows of all parts, below each other."""
        if len(parts) == 1:
            return parts[0]
        lengths = torch.cat([part.crow.diff() for part in parts])
        col, bits = torch.cat([part.col for part in parts]), torch.cat([part.bits for part in parts])
        return attrs.evolve(parts[0], crow=_starts(lengths), col=col, bits=bits)

    def __len__(self) -> int:
        return len(self.crow) - 1

    def slice(self, start: int, stop: int) -> DeviceRows:
        """Return the rows from `start` to `stop`, without copying their values."""
        crow = self.crow[start : stop + 1]
        first, last = int(crow[0]), int(crow[-1])
        return attrs.evolve(self, crow=crow - first, col=self.col[first:last], bits=self.bits[first:last])

    def take(self, rows: NDArray[np.integer[Any]]) -> DeviceRows:
        """Return the rows with these numbers, in this order."""
        index = torch.from_numpy(rows).to(self.crow.device)
        lengths = self.crow.diff()[index]
        crow = _starts(lengths)
        entries = torch.repeat_interleave(self.crow[index] - crow[:-1], lengths)
        entries += torch.arange(len(entries), device=entries.device)
        return attrs.evolve(self, crow=crow, col=self.col[entries], bits=self.bits[entries])

    def to_dense(self) -> torch.Tensor:
        """Return a new dense tensor of shape (n_rows, n_cols)."""
        out = torch.zeros(len(self) * self.n_cols, dtype=self.bits.dtype, device=self.bits.device)
        row_starts = torch.arange(len(self), device=self.crow.device) * self.n_cols
        out[torch.repeat_interleave(row_starts, self.crow.diff()) + self.col] = self.bits
        return out.view(self.dtype).view(len(self), self.n_cols)

    def to_sparse(self) -> torch.Tensor:
        """Return a `torch.sparse_csr` tensor of shape (n_rows, n_cols), with int64 indices."""
        return torch.sparse_csr_tensor(
            self.crow,
            self.col.to(torch.int64),
            self.bits.view(self.dtype),
            (len(self), self.n_cols),
            check_invariants=False,
        )


def _starts(lengths: torch.Tensor) -> torch.Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
