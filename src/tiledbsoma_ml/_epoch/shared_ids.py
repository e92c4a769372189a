"""`SharedQueryIDs`: joinids in shared memory, so that all workers on a machine use the same copy."""

from __future__ import annotations

import attrs

from tiledbsoma_ml._query_ids import Partition, QueryIDs
from tiledbsoma_ml._shared_array import SharedArray


@attrs.frozen(eq=False)
class SharedQueryIDs:
    """A copy of `QueryIDs` that child processes share without further copies."""

    obs_joinids: SharedArray
    var_joinids: SharedArray
    partition: Partition | None

    @classmethod
    def of(cls, ids: QueryIDs) -> SharedQueryIDs:
        """Return a copy of joinids in shared memory."""
        return cls(SharedArray(ids.obs_joinids), SharedArray(ids.var_joinids), ids.partition)

    def query_ids(self) -> QueryIDs:
        """Return the joinids, without copying them."""
        obs_joinids, var_joinids = self.obs_joinids.numbers.view(), self.var_joinids.numbers.view()
        obs_joinids.flags.writeable = var_joinids.flags.writeable = (
            False  # `QueryIDs` copies writeable arrays
        )
        return QueryIDs(obs_joinids=obs_joinids, var_joinids=var_joinids, partition=self.partition)
