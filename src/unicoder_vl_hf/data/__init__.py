"""Rows of captions and pairs: reading them, joining them with regions, and drawing negatives, masks and their order."""
