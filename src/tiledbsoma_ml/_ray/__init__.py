"""The parts of `RayTrainRunner`."""
