"""Scoring of pairs of a caption and an image, at any scale."""
