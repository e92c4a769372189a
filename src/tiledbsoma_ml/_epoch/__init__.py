"""The state of epochs: their numbers, the positions of iterators, resuming, and the agreement of ranks."""
