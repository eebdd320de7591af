"""Benchmarks of text-to-image models: their prompts, their pictures on disk, their scorers, one file of results."""
