"""The rendered world and the questions about it."""
