"""What every training run needs: arguments, setup, checkpoints, log, model card and Trainer."""
