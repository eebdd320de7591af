"""The methods that ArcFlow is compared with, one paper a file, on the same network, head, prompts and budget."""
