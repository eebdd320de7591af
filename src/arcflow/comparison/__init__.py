"""Rivals on one bench and one budget: numbers only, pages are made in `reports`."""
