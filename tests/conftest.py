"""
Where a process would be spawned, tests fork it from one that has imported what it needs: a new interpreter would import
for ten seconds. What it works on reaches it as a pickle, as before, and it inherits nothing else.
"""

import multiprocessing
import sys

import pytest

get_context = multiprocessing.get_context
multiprocessing.get_context = lambda method=None: get_context("forkserver" if method == "spawn" else method)
OURS = ["unicoder_vl_hf.processing_unicoder_vl", "unicoder_vl_hf.modeling_unicoder_vl"]
multiprocessing.set_forkserver_preload(["pytest", "datasets", "transformers.trainer", *OURS])

# The files that take longest begin, so that of two workers none is left alone with one of them at the end.
FIRST = [
    "test_run_pretraining.py",
    "test_modeling.py",
    "test_hf_common.py",
    "test_run_retrieval.py",
    "test_hub.py",
    "test_leak.py",
    "test_visual_genome.py",
    "test_remote_code.py",
    "test_finetuning.py",
    "test_negatives.py",
]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


@pytest.fixture(autouse=True)
def state_of_accelerate():
    """accelerate remembers the precision of a process's last run, which would become that of the next test."""
    yield
    if "accelerate.state" in sys.modules:
        state = sys.modules["accelerate.state"]
        state.AcceleratorState._reset_state()
        state.GradientState._reset_state()
