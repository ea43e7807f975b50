"""Push to a local stub of the Hub and load back, with the package and without; what goes up, and what stays at home."""

import json
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from checkpoint_matrix import MODELS, OTHERS
from hub_client import KEPT_AT_HOME, METRICS
from hub_stub import HubStub
from places import TESTS

import unicoder_vl_hf

REPOSITORIES = ("someone/plain", "someone/trained", "someone/run")
CHECKPOINT = {
    "config.json",
    "config_sentence_transformers.json",
    "modules.json",
    "model.safetensors",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "configuration_unicoder_vl.py",
    "feature_extraction_unicoder_vl.py",
    "modeling_unicoder_vl.py",
    "pipeline_unicoder_vl.py",
    "processing_unicoder_vl.py",
    "records_unicoder_vl.py",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def hub():
    with HubStub() as hub:
        yield hub
    assert hub.unknown == []


def run(action: str, hub: HubStub, folder: Path) -> dict:
    """What hub_client.py says of `action`."""
    source = Path(unicoder_vl_hf.__file__).parents[1]
    paths = [TESTS, source]
    home = folder / f"home_{action}"  # fresh: nothing is cached
    environment = hub.environment(home) | {"PYTHONPATH": ":".join(map(str, paths))}
    done = subprocess.run(
        [sys.executable, TESTS / "hub_client.py", action, folder],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, f"{done.stderr[-4000:]}\nunanswered: {hub.unknown}"
    return json.loads((folder / f"{action}.json").read_text())


@pytest.fixture(scope="module")
def with_package(hub, folder) -> dict:
    return run("with_package", hub, folder)


@pytest.fixture(scope="module")
def pushed(with_package) -> dict:
    return with_package["pushed"]


@pytest.fixture(scope="module", params=["unicoder_vl_hf", "transformers_modules"])
def loaded(request, hub, folder, with_package) -> dict:
    """What was loaded, with the package and without; `origin` is where the classes must come from."""
    result = with_package if request.param == "unicoder_vl_hf" else run("without_package", hub, folder)
    return {**result["loaded"], "origin": request.param}


def card(hub: HubStub, repository: str) -> huggingface_hub.ModelCard:
    return huggingface_hub.ModelCard(hub.files(repository)["README.md"].decode())


def assert_same_output(got: list, expected: list):
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("repository", REPOSITORIES)
def test_a_whole_checkpoint_goes_up(hub, pushed, repository):
    files = hub.files(repository)
    extra = {
        "someone/plain": set(),
        "someone/trained": {"training_args.bin"},
        "someone/run": {"log.jsonl"},
    }
    assert set(files) - {".gitattributes"} == CHECKPOINT | {"README.md"} | extra[repository]
    source = Path(unicoder_vl_hf.__file__).parent
    for name in (name for name in files if name.endswith(".py")):
        assert files[name] == (source / name).read_bytes()


def test_what_the_loop_leaves_in_its_folder_stays_at_home(hub, folder, pushed):
    for path in KEPT_AT_HOME:
        assert (folder / "run" / path).is_file()
    assert not set(KEPT_AT_HOME) & set(hub.files("someone/run"))
    assert all("/" not in path for path in hub.files("someone/run"))


def test_a_repository_is_made_once_and_named_in_full(hub, pushed):
    assert pushed["names"] == ["someone/run", "someone/run"]
    assert hub.messages["someone/run"][0] == "Upload Unicoder-VL"


@pytest.mark.parametrize("name", ["trained", "run"])
def test_bytes_on_the_hub_are_those_of_the_folder(hub, folder, pushed, name):
    for path, content in hub.files(f"someone/{name}").items():
        assert (folder / name / path).read_bytes() == content, path


def test_bytes_load_back_equal(hub, loaded):
    for repository in REPOSITORIES:
        snapshot = Path(loaded[repository]["snapshot"])
        files = hub.files(repository)
        assert {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()} == set(files)
        for path, content in files.items():
            assert (snapshot / path).read_bytes() == content, path


def test_classes_and_outputs_load_back_equal(pushed, loaded):
    for name in (*REPOSITORIES, "saved"):
        for auto, (class_name, _) in MODELS.items():
            found, module = loaded[name][auto]["class"]
            assert found == class_name
            assert module.split(".")[0] == loaded["origin"]
        for auto, class_name in OTHERS.items():
            assert loaded[name][auto]["class"][0] == class_name
    for repository in REPOSITORIES:
        assert_same_output(loaded[repository]["AutoModelForPreTraining"]["output"], pushed["output"])
    run, saved = loaded["someone/run"], loaded["saved"]
    for auto in ("AutoModel", "AutoModelForSequenceClassification"):
        assert_same_output(saved[auto]["output"], run[auto]["output"])


def test_the_cards_snippet_runs_as_written(loaded):
    module, scores = loaded["snippet"]
    assert module.split(".")[0] == loaded["origin"]
    assert len(scores) == 2 and scores[0] != scores[1]


def test_our_card_is_still_there_after_trainer_push_to_hub(hub, pushed):
    trained = card(hub, "someone/trained")
    assert {"unicoder-vl", "image-text-retrieval"} <= set(trained.data.tags)
    assert trained.data.base_model == "google-bert/bert-base-uncased"
    assert "Training data: two photos" in trained.text
    assert '- detector: "pythia"' in trained.text
    assert "| matching_accuracy | 0.8765 |" in trained.text
    assert {result.metric_type: result.metric_value for result in trained.data.eval_results} == {
        name: round(value, 4) for name, value in METRICS.items()
    }
    assert 'name = "someone/trained"' in trained.text


def test_our_card_is_still_there_after_model_push_to_hub(hub, folder, pushed):
    assert len(hub.messages["someone/run"]) == 2
    assert card(hub, "someone/run").text == huggingface_hub.ModelCard.load(folder / "run" / "README.md").text
    assert re.search(r'name = "someone/run"', card(hub, "someone/run").text)
