"""Checks for sources and orders that are written for this package."""

from tiledbsoma_ml.testing.orders import check_order
from tiledbsoma_ml.testing.sources import check_source

__all__ = ["check_order", "check_source"]
