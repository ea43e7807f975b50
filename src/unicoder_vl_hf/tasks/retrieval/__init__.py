"""Image-text retrieval (paper, section Image-Text Retrieval)."""
