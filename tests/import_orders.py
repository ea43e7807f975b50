"""
Run by test_imports.py: `python import_orders.py CHECKPOINT ORDER …`. In processes that have imported nothing of ours or
of transformers yet: imports in each of these orders, then loads the checkpoint by every Auto class, and prints of each
order what it got as a line of JSON.
"""

import importlib
import json
import multiprocessing
import pickle
import sys
import threading
import time
from collections.abc import Callable

OURS, AUTO = "unicoder_vl_hf", "transformers.models.auto.modeling_auto"
AUTO_CLASSES = (
    "AutoConfig AutoModel AutoModelForPreTraining AutoModelForSequenceClassification AutoModelForMultipleChoice "
    "AutoModelForVisualQuestionAnswering AutoFeatureExtractor AutoProcessor"
).split()


def imports(*names: str) -> Callable[[], None]:
    """Imports modules, and asks for attributes of them (`module:attribute`), in this order."""

    def run():
        for name in names:
            module, _, attribute = name.partition(":")
            found = importlib.import_module(module)
            if attribute:
                getattr(found, attribute)

    return run


def in_a_thread():
    importlib.import_module(OURS)
    thread = threading.Thread(target=imports("transformers:AutoModel"))
    thread.start()
    thread.join()


class Meanwhile:
    """Before `AUTO` is executed, another thread begins what needs it, and waits for it."""

    def __init__(self, thread: threading.Thread):
        self.thread = thread

    def find_spec(self, name, path=None, target=None):
        if name != AUTO:
            return None
        (ours,) = (finder for finder in sys.meta_path if type(finder).__name__ == "Registration")
        spec = ours.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def execute_meanwhile(module):
            self.thread.start()
            while "transformers.modeling_layers" not in sys.modules:
                time.sleep(0.01)
            time.sleep(1)
            execute(module)

        spec.loader.exec_module = execute_meanwhile
        return spec


def in_two_threads_that_wait_for_each_other():
    """The first is to load our model, which needs `modeling_layers`, which the second loads, which needs the first."""
    importlib.import_module(OURS)
    importlib.import_module("transformers.modeling_utils")
    thread = threading.Thread(target=imports("transformers.modeling_layers"))
    sys.meta_path.insert(0, Meanwhile(thread))
    importlib.import_module(AUTO)
    thread.join()


def unpickled():
    """As a spawned process gets a class: by its name."""
    pickle.loads(b"cunicoder_vl_hf.modeling_unicoder_vl\nUnicoderVLModel\n.")


def unpickled_from_where_it_was():
    record = pickle.loads(b"cunicoder_vl_hf.feature_extraction_unicoder_vl\nRegionRecord\n.")
    assert record is importlib.import_module(OURS).RegionRecord


ORDERS = {
    "ours, then theirs": imports(OURS, "transformers:AutoModel"),
    "theirs, then ours": imports("transformers:AutoModel", OURS),
    "theirs without models, then ours": imports("transformers:AutoConfig", OURS),
    "theirs without Auto classes, then ours": imports("transformers", OURS),
    "our model": imports(f"{OURS}:UnicoderVLModel"),
    "the file of our processor": imports(f"{OURS}.processing_unicoder_vl"),
    "ours, then what our model needs": imports(OURS, "transformers.models.bert.modeling_bert"),
    "ours, then what imports AutoModel in its first lines": imports(OURS, "transformers.modeling_layers"),
    "what our model needs, then ours": imports("transformers.models.bert.modeling_bert", OURS),
    "ours, then the Trainer": imports(OURS, "transformers:Trainer"),
    "in a thread": in_a_thread,
    "in two threads that wait for each other": in_two_threads_that_wait_for_each_other,
    "unpickled": unpickled,
    "unpickled from where it was": unpickled_from_where_it_was,
}


def run(order: str, checkpoint: str):
    ORDERS[order]()
    transformers = importlib.import_module("transformers")
    found = {}
    for auto in AUTO_CLASSES:
        for options in ({}, {"trust_remote_code": True}):
            loaded = type(getattr(transformers, auto).from_pretrained(checkpoint, **options))
            found.setdefault(auto, []).append(f"{loaded.__module__}.{loaded.__name__}")
    registry = importlib.import_module("transformers.pipelines").PIPELINE_REGISTRY
    assert "image-text-matching" in registry.supported_tasks
    print(json.dumps([order, found]), flush=True)


if __name__ == "__main__":
    import torch  # noqa: F401, which takes longest, once for all

    for name in sys.argv[2:]:
        assert not {"transformers", OURS} & sys.modules.keys()
        process = multiprocessing.get_context("fork").Process(target=run, args=(name, sys.argv[1]))
        process.start()
        process.join()
