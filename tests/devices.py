"""The devices and forms of X that tests are tried with."""

from __future__ import annotations

import pytest
import torch

cuda = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA is not available"),
    ],
)
on_every_device = pytest.mark.parametrize("device", ["cpu", cuda])
in_every_form = pytest.mark.parametrize("sparse_X", [False, True], ids=["dense", "sparse"])
