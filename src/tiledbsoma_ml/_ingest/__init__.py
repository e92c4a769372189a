"""Files to an experiment."""
