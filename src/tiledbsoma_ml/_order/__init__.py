"""Which rows an epoch has, in which order, and who yields them: NumPy on joinids, and nothing is read."""
