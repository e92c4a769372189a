"""What stands behind `ExperimentDataset`."""
