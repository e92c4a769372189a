"""The way from rows to mini-batches: dense or sparse, in memory or on a device."""
