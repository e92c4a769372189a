"""Rows → mini-batches: read ahead, put together, made dense, sparse, or on a device."""
