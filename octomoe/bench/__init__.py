"""Layers of experts timed beside other people's kernels; a machine with a GPU is needed."""
