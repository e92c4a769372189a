"""Files → an experiment."""
