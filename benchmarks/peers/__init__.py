"""Other people's kernels as contenders of the benchmarks; their files stay outside this project."""
