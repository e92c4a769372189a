"""Joinids in shared memory: every worker process on a machine sees the same ones."""

from __future__ import annotations

import attrs
import torch

from tiledbsoma_ml._common import NDArrayJoinId
from tiledbsoma_ml._query_ids import Partition, QueryIDs


@attrs.frozen(eq=False)
class SharedQueryIDs:
    """A copy of `QueryIDs` that reaches the processes spawned from this one without further copies."""

    obs_joinids: torch.Tensor
    var_joinids: torch.Tensor
    partition: Partition | None

    @classmethod
    def of(cls, ids: QueryIDs) -> SharedQueryIDs:
        """Copy joinids into shared memory."""
        return cls(_shared(ids.obs_joinids), _shared(ids.var_joinids), ids.partition)

    def query_ids(self) -> QueryIDs:
        """Return the joinids where they are."""
        return QueryIDs(
            obs_joinids=self.obs_joinids.numpy(),
            var_joinids=self.var_joinids.numpy(),
            partition=self.partition,
        )


def _shared(joinids: NDArrayJoinId) -> torch.Tensor:
    shared = torch.empty(len(joinids), dtype=torch.int64)
    shared.share_memory_()  # type: ignore[no-untyped-call]
    shared.numpy()[:] = joinids
    return shared
