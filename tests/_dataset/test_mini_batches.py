from __future__ import annotations

import gc
import threading

import numpy as np
import pandas as pd

from stores import Store


def test_leaving_an_epoch_early_leaves_no_thread_behind(store: Store) -> None:
    before = set(threading.enumerate())
    for mini_batch in store.dataset(batch_size=4, io_batch_size=64):
        assert mini_batch
        break
    gc.collect()
    assert not {thread for thread in set(threading.enumerate()) - before if "EagerIterator" in thread.name}


def test_reading_ahead_changes_nothing(store: Store) -> None:
    eager, lazy = (
        store.dataset(batch_size=30, io_batch_size=64, seed=2, use_eager_fetch=e) for e in (True, False)
    )
    for (X, obs), (other_X, other_obs) in zip(eager, lazy, strict=True):
        np.testing.assert_array_equal(X, other_X)
        pd.testing.assert_frame_equal(obs, other_obs)
