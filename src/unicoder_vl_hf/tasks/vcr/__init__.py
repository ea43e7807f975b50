"""Visual commonsense reasoning (paper, section Visual Commonsense Reasoning)."""
