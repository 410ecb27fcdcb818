"""Data: sources, transforms and the input pipeline. NumPy in, NumPy out; no model and no mesh."""
