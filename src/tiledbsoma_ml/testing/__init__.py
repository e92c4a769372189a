"""Checks of what is written for this package: does a source, or an order, do what it must?"""

from tiledbsoma_ml.testing.orders import check_order
from tiledbsoma_ml.testing.sources import check_source

__all__ = ["check_order", "check_source"]
