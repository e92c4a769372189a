"""A query on local disk, memory-mapped: what makes one, what checks one, and what reads from it."""

from tiledbsoma_ml.snapshot.snapshot import Snapshot

__all__ = ["Snapshot"]
