"""Other people's kernels, one file each: found, given their own layouts, run."""
