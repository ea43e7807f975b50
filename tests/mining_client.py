"""`mine` as a script of two_processes.py: `main([JSON of its arguments, JSON of its options])`."""

import json

from unicoder_vl_hf.tasks.retrieval.mining import mine


def main(arguments: list[str]):
    inputs, options = map(json.loads, arguments)
    mine(*inputs, **options)
