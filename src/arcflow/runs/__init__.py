"""What a run remembers: averaged weights, checkpoints, the log."""
