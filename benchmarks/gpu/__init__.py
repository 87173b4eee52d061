"""What ``benchmarks.gpu_session`` measures on a GPU, one step per file."""
