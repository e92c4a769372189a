from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiledbsoma_ml._ray.cluster import Workers, n_possible_workers

NODES = st.lists(st.fixed_dictionaries({"CPU": st.integers(0, 16), "GPU": st.integers(0, 4)}), max_size=5)


@given(nodes=NODES, cpus=st.integers(1, 8), gpus=st.integers(0, 2))
def test_as_many_workers_are_possible_as_each_node_can_hold_whole_ones(
    nodes: list[dict[str, float]], cpus: int, gpus: int
) -> None:
    expected = 0
    for node in nodes:
        left = dict(node)
        while left["CPU"] >= cpus and left["GPU"] >= gpus:
            left = {"CPU": left["CPU"] - cpus, "GPU": left["GPU"] - gpus}
            expected += 1
    assert n_possible_workers(nodes, {"CPU": cpus, "GPU": gpus}) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, None, True), "num_workers=0 must be a positive integer"),
        ((2, None, "no"), "use_gpu='no' must be True or False"),
    ],
)
def test_workers_that_cannot_be_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Workers.create(*arguments)
