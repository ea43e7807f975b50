"""From pairs to scores, at any scale."""
