"""A checkpoint saved by any class loads by every Auto class: with the package, and by trust_remote_code without it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from checkpoint_matrix import MODELS, OTHERS, inspect_checkpoint, model_output

import unicoder_vl_hf

HUB_FILES = [
    "configuration_unicoder_vl.py",
    "feature_extraction_unicoder_vl.py",
    "modeling_unicoder_vl.py",
    "pipeline_unicoder_vl.py",
    "processing_unicoder_vl.py",
    "records_unicoder_vl.py",
]
SAVED = [class_name for class_name, _ in MODELS.values()]
# Kinds of imported models, one each.
KINDS = {
    "UnicoderVLForPreTraining": {"region_embedding": "uniter", "region_head": "uniter"},
    "UnicoderVLForMultipleChoice": {"region_embedding": "visual_bert"},
}
# The whole of what the second loads is in what the first saved.
SHARED_PARTS = [
    ("UnicoderVLForPreTraining", "AutoModelForSequenceClassification"),
    *((saved, "AutoModel") for saved in SAVED if saved != "UnicoderVLModel"),
]


def made(name: str, saved: str | None = None, **options):
    """A model of this class, of the kind of the checkpoint that `saved` saved."""
    return tiny.model(getattr(unicoder_vl_hf, name), **KINDS.get(saved or name, {}), **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint of each class in `saved`; then the client's work without the package: `again` and `remote.json`."""
    folder = tmp_path_factory.mktemp("remote_code")
    for name in SAVED:
        made(name).save_pretrained(folder / "saved" / name)
        tiny.processor(max_regions=7).save_pretrained(folder / "saved" / name)
    client = Path(__file__).with_name("remote_code_client.py")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-I", client, folder], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def remote(folder) -> dict:
    return json.loads((folder / "remote.json").read_text())


@pytest.fixture(scope="module")
def local(folder) -> dict:
    """What this process, with the package, makes of the same folders."""
    paths = [path for kind in ("saved", "again") for path in sorted((folder / kind).iterdir())]
    return {f"{path.parent.name}/{path.name}": inspect_checkpoint(path) for path in paths}


def assert_same_output(got: list, expected: list):
    """To the rounding of a matrix product, which varies with where in memory the weights lie."""
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=0, atol=1e-5)


def test_every_checkpoint_holds_the_hub_files_as_they_are(folder):
    source = Path(unicoder_vl_hf.__file__).parent
    checkpoints = [*(folder / "saved").iterdir(), *(folder / "again").iterdir()]
    assert len(checkpoints) == len(SAVED) + len(SAVED) ** 2
    for checkpoint in checkpoints:
        assert sorted(path.name for path in checkpoint.glob("*.py")) == HUB_FILES, checkpoint
        for name in HUB_FILES:
            assert (checkpoint / name).read_bytes() == (source / name).read_bytes(), checkpoint


@pytest.mark.parametrize("saved", SAVED)
def test_with_the_package_every_auto_class_gives_the_packages_class(local, saved):
    for auto, entry in local[f"saved/{saved}"].items():
        name = OTHERS.get(auto) or MODELS[auto][0]
        assert entry["class"] == [name, getattr(unicoder_vl_hf, name).__module__], auto
    assert local[f"saved/{saved}"]["AutoFeatureExtractor"]["max_regions"] == 7


def test_the_packages_class_comes_before_the_remote_one(folder):
    found = inspect_checkpoint(folder / "saved" / "UnicoderVLModel", trust_remote_code=True)
    assert {entry["class"][1].split(".")[0] for entry in found.values()} == {"unicoder_vl_hf"}


@pytest.mark.parametrize("saved", SAVED)
def test_without_the_package_every_auto_class_gives_the_remote_class(remote, saved):
    module = f"transformers_modules.{saved}"  # followed by a hash of the files
    for auto, entry in remote[f"saved/{saved}"].items():
        name = OTHERS.get(auto) or MODELS[auto][0]
        assert entry["class"][0] == name, auto
        assert entry["class"][1].startswith(module), auto
        assert entry["class"][1].endswith("." + next(file[:-3] for file in HUB_FILES if _defines(file, name))), auto
        if auto in MODELS:
            assert entry["config_class"][0] == "UnicoderVLConfig"
            assert entry["config_class"][1].startswith(module)
    (extractor, extractor_module), tokenizer = remote[f"saved/{saved}"]["AutoProcessor"]["parts"]
    assert (extractor, tokenizer) == ("UnicoderVLFeatureExtractor", "BertTokenizer")
    assert extractor_module.startswith("transformers_modules.")
    assert remote[f"saved/{saved}"]["AutoFeatureExtractor"]["max_regions"] == 7


def _defines(file: str, name: str) -> bool:
    return f"\nclass {name}(" in (Path(unicoder_vl_hf.__file__).parent / file).read_text()


@pytest.mark.parametrize("saved", SAVED)
def test_outputs_are_the_same_with_and_without_the_package(local, remote, saved):
    for auto in MODELS:
        assert_same_output(remote[f"saved/{saved}"][auto]["output"], local[f"saved/{saved}"][auto]["output"])
    original = made(saved)
    auto = next(auto for auto, (name, _) in MODELS.items() if name == saved)
    assert_same_output(remote[f"saved/{saved}"][auto]["output"], model_output(original, tiny.processor()))


@pytest.mark.parametrize(("saved", "loaded_by"), SHARED_PARTS)
def test_what_two_classes_share_is_loaded_not_drawn(local, saved, loaded_by):
    original = made(saved)
    wanted = made(MODELS[loaded_by][0], saved, seed=2)
    state = (original if loaded_by != "AutoModel" else original.bert).state_dict()
    wanted.load_state_dict({name: state[name] for name in wanted.state_dict()})
    assert_same_output(local[f"saved/{saved}"][loaded_by]["output"], model_output(wanted, tiny.processor()))


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("resaved_by", MODELS)
def test_what_the_remote_class_saved_loads_again(local, remote, saved, resaved_by):
    first = remote[f"saved/{saved}"]
    again = f"again/{saved}-{resaved_by}"
    for found, start in ((remote[again], "transformers_modules."), (local[again], "unicoder_vl_hf.")):
        for auto, entry in found.items():
            assert entry["class"][0] == (OTHERS.get(auto) or MODELS[auto][0]), auto
            assert entry["class"][1].startswith(start), auto
        assert_same_output(found[resaved_by]["output"], first[resaved_by]["output"])
        assert found["AutoFeatureExtractor"]["max_regions"] == 7
    for auto in MODELS:
        assert_same_output(local[again][auto]["output"], remote[again][auto]["output"])
