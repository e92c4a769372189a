"""What most workers load: a server that imports this module forks workers that load none of it again.

No thread may run when this is imported: a process that is forked from one with threads can hang.
"""

from __future__ import annotations

import threading

import numpy as np

import snapshots  # noqa: F401
from tiledbsoma_ml._csr import CSR_IO_Buffer
from tiledbsoma_ml._soma.held_rows import preload_kernels

one = np.arange(1)
preload_kernels().join()
CSR_IO_Buffer.from_ijd(one, one, np.ones(1, np.float32), (1, 1)).slice_tonumpy(slice(0, 1))
assert threading.active_count() == 1
