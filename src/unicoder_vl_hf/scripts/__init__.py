"""Scripts that use several tasks. The scripts of a single task are in its folder, as `run.py` and `run_….py`."""
