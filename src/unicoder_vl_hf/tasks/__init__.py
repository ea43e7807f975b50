"""A folder a task: its data, collator, losses, metrics, training, evaluation and pictures. No task imports another."""
