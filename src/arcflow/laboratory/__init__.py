"""Research on toys whose answers are known exactly."""
