"""Few-step methods, one paper a file; none imports another."""
