"""The source of a query on an experiment."""
