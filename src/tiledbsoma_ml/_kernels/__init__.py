"""The compiled loops: they release the GIL, are cached on disk, and may run in several threads at once.

Values that are only moved are moved as unsigned integers of their own width (`as_bits`), so that one compiled
loop serves every type of that width. Imported on first use, because importing numba takes time.
"""
