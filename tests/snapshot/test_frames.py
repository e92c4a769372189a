from __future__ import annotations

import numpy as np
import pandas as pd

from snapshots import ALL_OBS
from stores import N_OBS, N_VARS, Store, make_obs
from tiledbsoma_ml.snapshot import Snapshot


def test_obs_and_var_are_kept_with_all_their_categories(store: Store, whole: Snapshot) -> None:
    pd.testing.assert_frame_equal(whole.obs, make_obs(np.arange(N_OBS))[ALL_OBS])
    assert whole.var["feature_id"].tolist() == [f"gene{j}" for j in range(N_VARS)]
    assert whole.var["soma_joinid"].tolist() == list(range(N_VARS))
    _, obs = whole[[0]]
    assert "unseen" in obs["cell_type"].cat.categories
