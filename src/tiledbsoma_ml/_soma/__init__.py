"""A query on an experiment, as a source."""
