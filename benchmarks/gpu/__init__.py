"""The benchmarks of a GPU, in one command, and the writer of their tables in docs/."""
