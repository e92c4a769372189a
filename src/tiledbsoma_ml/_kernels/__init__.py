"""Compiled loops, which release the GIL, are cached on disk, and may run on several threads at once.

Loops that only move values take them as unsigned integers of the same width (`as_bits`), so that one compiled
loop serves all types of that width. The loops are imported on first use, because importing numba takes time.
"""
