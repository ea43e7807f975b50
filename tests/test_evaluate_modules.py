"""The `evaluate` modules load from their folders, in one process that has an empty cache and no network."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from places import ROOT
from test_vcr_metrics import ANSWER_LABELS, ANSWERS, RATIONALE_LABELS, RATIONALES

from unicoder_vl_hf.tasks.retrieval.metrics import confidence_intervals, rank_queries, retrieval_metrics
from unicoder_vl_hf.tasks.vcr.metrics import vcr_metrics

SCORES = np.round(np.random.default_rng(0).standard_normal((40, 12)), 1).astype(np.float32)  # with ties
IMAGE_OF_CAPTION = np.concatenate([np.arange(12), np.random.default_rng(1).integers(12, size=28)])
QUESTIONS = {
    "predictions": ANSWERS,
    "rationale_predictions": RATIONALES,
    "references": ANSWER_LABELS,
    "rationale_references": RATIONALE_LABELS,
}

CLIENT = """
import json, socket, sys
import numpy as np

def refuse(*args, **kwargs):
    raise OSError("no network in this test")

socket.socket.connect = socket.getaddrinfo = refuse
import evaluate

found = {}
folder, vcr_folder, world, questions = sys.argv[1:]
scores, image_of_caption = (np.array(values) for values in json.loads(world))
sys.modules["unicoder_vl_hf"] = None  # as if it were not installed
try:
    evaluate.load(folder)
except ImportError as error:
    found["without package"] = str(error)
del sys.modules["unicoder_vl_hf"]

metric = evaluate.load(folder)
found["at once"] = metric.compute(predictions=scores, references=image_of_caption)
for start in range(0, len(scores), 7):
    rows = slice(start, start + 7)
    metric.add_batch(predictions=scores[rows], references=image_of_caption[rows])
found["in batches"] = metric.compute(ks=[2], confidence=0.9)
for name, predictions in (("ragged", [[0.9, 0.1], [0.8]]), ("nan", [[0.9, float("nan")], [0.8, 0.2]])):
    try:
        evaluate.load(folder).compute(predictions=predictions, references=[0, 1])
    except ValueError as error:
        found[name] = str(error)

metric = evaluate.load(vcr_folder)
for start in (0, 4):
    metric.add_batch(**{name: values[start : start + 4] for name, values in json.loads(questions).items()})
found["vcr"] = metric.compute()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folders = [str(ROOT / "metrics" / name) for name in ("image_text_retrieval", "vcr")]
    worlds = [json.dumps(world) for world in ([SCORES.tolist(), IMAGE_OF_CAPTION.tolist()], QUESTIONS)]
    cache = tmp_path_factory.mktemp("hf")
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, *folders, *worlds],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HOME": str(cache), "HF_EVALUATE_OFFLINE": "1"},
        cwd=cache,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_equals_the_pure_function(found):
    assert found["at once"] == retrieval_metrics(SCORES, IMAGE_OF_CAPTION)
    assert found["at once"]["image_retrieval_tied_ranks"] > 0


def test_batches_and_intervals(found):
    expected = retrieval_metrics(SCORES, IMAGE_OF_CAPTION, ks=[2])
    for name, bounds in confidence_intervals([rank_queries(SCORES, IMAGE_OF_CAPTION)], [2], level=0.9).items():
        expected |= dict(zip((f"{name}_low", f"{name}_high"), bounds, strict=True))
    assert found["in batches"] == expected


def test_vcr_equals_the_pure_function(found):
    assert found["vcr"] == vcr_metrics(ANSWERS, RATIONALES, ANSWER_LABELS, RATIONALE_LABELS)


def test_errors_say_what_to_do(found):
    assert found["without package"].endswith("pip install . in a checkout of unicoder-vl-hf")
    assert found["ragged"].startswith("predictions have rows of [1, 2] scores; expected one score for each image")
    assert found["nan"] == "scores[0, 1] is NaN; expected a number for every pair."
