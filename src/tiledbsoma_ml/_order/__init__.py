"""The rows of an epoch, their order, and the ranks and workers that yield them: NumPy, without reads."""
