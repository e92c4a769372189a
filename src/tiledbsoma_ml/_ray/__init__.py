"""Behind `RayTrainRunner`."""
