"""Students held against their teacher, and benchmarks scored."""
