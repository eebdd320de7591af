"""From lists of prompts to batches of conditioning."""
