"""Scripts that use several tasks: those of one task are in its folder, as `run.py` and `run_….py`."""
