"""Pre-training (paper, section Pre-training)."""
