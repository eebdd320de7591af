"""A student in a stock pipeline: attach it, generate, fill a folder."""
