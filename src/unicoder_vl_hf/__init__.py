"""Unicoder-VL in the Hugging Face way."""
