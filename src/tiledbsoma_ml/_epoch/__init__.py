"""Where an epoch stands: which it is, how far each iterator is, what to resume, and that ranks agree."""
