"""The parts of `SCVIDataModule`."""
