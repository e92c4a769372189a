"""What stands behind `SCVIDataModule`."""
