"""One photo, one line: photos are scored as their stored regions are, in every form and by every way in."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import photo_world
import pytest
from photo_world import CAPTIONS, IDS
from PIL import Image
from transformers import AutoModelForSequenceClassification, AutoProcessor, pipeline

from unicoder_vl_hf import ImageTextScorer, RegionStore, UnicoderVLConfig
from unicoder_vl_hf.cli import main
from unicoder_vl_hf.scoring import Calibration
from unicoder_vl_hf.tasks.retrieval import calibrate


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return photo_world.build(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def stored(world) -> np.ndarray:
    """The scores of the images of the store, `(C, M)`."""
    return ImageTextScorer.from_pretrained(world / "model", world / "store", verbose=False).score(CAPTIONS, IDS)


@pytest.fixture
def in_photos(world, monkeypatch) -> Path:
    monkeypatch.chdir(world / "photos")
    return world


def test_a_photo_scores_as_its_stored_regions(in_photos, stored):
    store = RegionStore(in_photos / "store")
    scorer = ImageTextScorer.from_pretrained(in_photos / "model", store, verbose=False)
    images = ["photo_0.png", IDS[1], Path("photo_2.png"), store[IDS[3]], Image.open("photo_4.png"), IDS[5]]
    np.testing.assert_allclose(scorer.score(CAPTIONS, images), stored, rtol=0, atol=1e-5)
    without = ImageTextScorer.from_pretrained(in_photos / "model", verbose=False)
    names = [f"{name}.png" for name in IDS]
    np.testing.assert_allclose(without.score(CAPTIONS, names), stored, rtol=0, atol=1e-5)
    ranked = without.rank(CAPTIONS[0], [*names[:5], Image.open(names[5]).copy()], top_k=6)
    order = np.argsort(-stored[0])
    assert [name for name, _ in ranked] == [[*names[:5], "photo 6"][place] for place in order]
    best = without.rank_captions(names[0], CAPTIONS)
    assert [caption for caption, _ in best] == [CAPTIONS[place] for place in np.argsort(-stored[:, 0])]


def test_a_name_that_is_an_id_and_a_file_is_refused_naming_both(in_photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(in_photos / "photos" / "photo_0.png", IDS[1])
    scorer = ImageTextScorer.from_pretrained(in_photos / "model", in_photos / "store", verbose=False)
    for images in ([IDS[1]], [IDS[0], IDS[1]]):
        both = rf"'photo_1' is an image id of .*store, and a file, {tmp_path}/photo_1: give a Path, or ./photo_1, for"
        with pytest.raises(ValueError, match=both):
            scorer.score(CAPTIONS, images)
    np.testing.assert_array_equal(scorer.score(CAPTIONS, ["./photo_1"]), scorer.score(CAPTIONS, [Path(IDS[1])]))
    of_file, of_store = scorer.score(CAPTIONS, [Path(IDS[1])]), scorer.score(CAPTIONS, [scorer.store[IDS[1]]])
    np.testing.assert_array_equal(of_file, scorer.score(CAPTIONS, [IDS[0]]))
    assert np.abs(of_file - of_store).max() > 1e-3
    with pytest.raises(KeyError, match=r"has no image 'photo_9'.* Nor is it the file of a photo"):
        scorer.score(CAPTIONS, ["photo_9"])


def test_a_checkpoint_without_a_detector_says_so(world, tmp_path):
    shutil.copytree(world / "model", tmp_path / "model")
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    processor.feature_extractor.region_provenance = None
    processor.save_pretrained(tmp_path / "model")
    photo = world / "photos" / "photo_0.png"
    scorer = ImageTextScorer.from_pretrained(tmp_path / "model", verbose=False)
    with pytest.raises(ValueError, match=r"come from no detector.*name the detector \(detector=, --detector\)"):
        scorer.score(CAPTIONS, [photo])
    detector, options = f"grid:{world / 'encoder'}", {"grid_size": 2, "image_size": 32}
    scorer = ImageTextScorer.from_pretrained(
        tmp_path / "model", detector=detector, detector_options=options, verbose=False
    )
    assert scorer.score(CAPTIONS, [photo]).shape == (3, 1)


def test_the_command(in_photos, stored, tmp_path, capsys):
    model, regions = str(in_photos / "model"), str(in_photos / "store")
    Path("saved.npz").unlink(missing_ok=True)
    RegionStore(regions)[IDS[0]].save("saved.npz")
    wanted = "".join(f"{score:+8.3f}  {caption}\n" for score, caption in zip(stored[:, 0], CAPTIONS, strict=True))
    for words in (["photo_0.png"], ["saved.npz"], [IDS[0], "--regions", regions]):
        assert main(["score", *words[:1], *CAPTIONS, "--model", model, *words[1:]]) == 0
        assert capsys.readouterr().out == wanted
    assert main(["score", "dog.png", "a dog", "--model", model]) == 1
    assert "dog.png is no file; if it is an image id, name its store: --regions" in capsys.readouterr().err
    found, cache = [], ["--cache", str(tmp_path / "cache")]
    for _ in range(2):
        assert main(["score", "photo_0.png", *CAPTIONS, "--model", model, *cache]) == 0
        found.append(capsys.readouterr().out)
    assert found == [wanted] * 2 and len(RegionStore(tmp_path / "cache")) == 1
    shutil.copytree(model, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert main(["score", "photo_0.png", "a dog", "--model", str(tmp_path / "cut")]) == 1
    assert "cut has a damaged file of weights" in capsys.readouterr().err


def test_the_command_for_machines_and_without_bars_of_libraries(in_photos, stored, capfd):
    assert main(["score", "photo_0.png", *CAPTIONS, "--model", str(in_photos / "model"), "--json"]) == 0
    output, error = capfd.readouterr()
    rows = json.loads(output)["captions"]
    assert [row["caption"] for row in rows] == CAPTIONS and error == ""
    np.testing.assert_allclose([row["score"] for row in rows], stored[:, 0], atol=1e-5)


# Yes or no


def test_a_calibration_by_hand():
    found = Calibration.fit(np.array([3.0, 1.0, 0.5, -1.0]), np.array([True, True, False, False]))
    assert (found.precision, found.recall, found.threshold, found.num_pairs) == (1.0, 1.0, 0.75, 4)
    assert str(found).endswith("100.0% and recall 100.0% on 4 pairs.")
    alike = np.array([0.2, *[0.0] * 9, 0.1, *[0.0] * 9])
    assert str(Calibration.fit(alike, np.arange(20) < 10)).endswith("20 pairs. That is hardly more than guessing.")
    found = Calibration.fit(np.array([3.0, 1.0, 2.0, 2.0, -1.0]), np.array([True, True, False, False, False]))
    assert (found.precision, found.recall, found.threshold) == (1.0, 0.5, 2.5)  # F1 2/3, and of both matches 2/3 too
    rng = np.random.default_rng(0)
    truth = rng.normal(size=20_000)
    matches = rng.random(20_000) < 1 / (1 + np.exp(-truth))
    found = Calibration.fit(3 * truth, matches)
    assert abs(found.temperature - 3) < 0.15
    probabilities = found.probabilities(3 * truth)
    for low in np.arange(0, 1, 0.2):
        some = (probabilities >= low) & (probabilities < low + 0.2)
        assert abs(matches[some].mean() - probabilities[some].mean()) < 0.03
    for scores, truth, message in (
        ([1.0, 2.0], [True, True], "Of 2 pairs 2 are matches"),
        ([1.0, 2.0], [True, False], "do not score higher"),
        ([np.nan, 2.0], [True, False], "1 of 2 scores are not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            Calibration.fit(np.array(scores), np.array(truth))


def test_a_calibrated_checkpoint_says_yes_or_no(in_photos, stored, tmp_path, capsys):
    """The captions of each image are those that score high with it, and so are right."""
    shutil.copytree(in_photos / "model", tmp_path / "model")
    model, regions, captions = (str(path) for path in (tmp_path / "model", in_photos / "store", tmp_path / "c.jsonl"))
    best = stored - stored.mean(0) - stored.mean(1, keepdims=True)
    rows = [{"image_id": name, "caption": CAPTIONS[best[:, place].argmax()]} for place, name in enumerate(IDS)]
    rows = [row | {"split": "val" if place % 2 else "train"} for place, row in enumerate(rows * 2)]
    Path(captions).write_text("\n".join(map(json.dumps, rows)))
    scorer = ImageTextScorer.from_pretrained(model, regions, verbose=False)
    with pytest.raises(ValueError, match=r"model is not calibrated: `unicoder-vl calibrate .*model CAPTIONS REGIONS`"):
        scorer.match(CAPTIONS, IDS)
    before = json.loads(Path(model, "config.json").read_text())
    assert main(["calibrate", model, captions, regions, "--split", "val"]) == 0
    said = capsys.readouterr().out
    after = json.loads(Path(model, "config.json").read_text())
    known = Calibration(**after.pop("calibration"))
    assert before == {name: after[name] for name in before if name != "calibration"} | {"calibration": None}
    assert str(known) == said.strip() and known.num_pairs == 2 * sum(row["split"] == "val" for row in rows)
    scorer = ImageTextScorer.from_pretrained(model, regions, verbose=False)
    found = scorer.match(CAPTIONS, IDS)
    np.testing.assert_array_equal(found.matches, stored >= known.threshold)
    np.testing.assert_allclose(found.probabilities, 1 / (1 + np.exp(-stored / known.temperature)), rtol=1e-5)
    assert found.calibration == known
    assert main(["score", "photo_0.png", CAPTIONS[0], "--model", model]) == 0
    assert capsys.readouterr().out.endswith(f"{CAPTIONS[0]}\n{known}\n")
    assert main(["score", "photo_0.png", CAPTIONS[0], "--model", model, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert Calibration(**told["calibration"]) == known and told["captions"][0]["match"] == bool(found.matches[0, 0])
    scorer.model.bert.pooler.dense.bias.data += 1
    with pytest.raises(ValueError, match="was calibrated with other weights"):
        scorer.match(CAPTIONS, IDS)
    with pytest.raises(ValueError, match="nobody/model is no folder of a checkpoint"):
        calibrate("nobody/model", captions, regions)


# The pipeline


def test_the_pipeline_is_in_the_registry(in_photos, stored):
    matcher = pipeline("image-text-matching", model=str(in_photos / "model"))
    assert type(matcher).__module__ == "unicoder_vl_hf.pipeline_unicoder_vl"
    wanted = sorted(zip(CAPTIONS, stored[:, 0].tolist(), strict=True), key=lambda pair: -pair[1])
    for found in (
        matcher("photo_0.png", text=CAPTIONS),
        matcher(Image.open("photo_0.png"), text=CAPTIONS),
        matcher({"image": Path("photo_0.png"), "text": CAPTIONS}),
        matcher(["photo_1.png", "photo_0.png"], text=CAPTIONS)[1],
    ):
        assert [each["text"] for each in found] == [text for text, _ in wanted]
        np.testing.assert_allclose([each["score"] for each in found], [score for _, score in wanted], atol=1e-5)
    store = RegionStore(in_photos / "store")
    (found,) = pipeline("image-text-matching", model=str(in_photos / "model"), store=store)(IDS[0], text=CAPTIONS[0])
    assert abs(found["score"] - stored[0, 0]) < 1e-5 and sorted(found) == ["score", "text"]
    matcher.model.config.calibration = {"temperature": 2.0, "threshold": 100.0}
    (found,) = matcher("photo_0.png", text=CAPTIONS[0])
    assert abs(found["probability"] - 1 / (1 + np.exp(-stored[0, 0] / 2))) < 1e-6 and found["match"] is False
    with pytest.raises(ValueError, match="There is no text"):
        matcher("photo_0.png")
    with pytest.raises(TypeError, match="txet"):
        matcher("photo_0.png", txet=CAPTIONS)


def test_the_pipeline_is_saved_for_those_without_the_package(in_photos, stored, tmp_path):
    """The installed class drops what would win over the registry; without the package records do, photos do not."""
    config = UnicoderVLConfig.from_pretrained(in_photos / "model")
    assert "custom_pipelines" not in config.to_dict()
    pipeline("image-text-matching", model=str(in_photos / "model")).save_pretrained(tmp_path / "saved")
    for folder in (in_photos / "model", tmp_path / "saved"):
        saved = json.loads((folder / "config.json").read_text())["custom_pipelines"]
        assert saved == {
            "image-text-matching": {
                "impl": "pipeline_unicoder_vl.UnicoderVLPipeline",
                "pt": ["AutoModelForSequenceClassification"],
            }
        }
        assert (folder / "pipeline_unicoder_vl.py").is_file()
    AutoModelForSequenceClassification.from_pretrained(in_photos / "model").save_pretrained(tmp_path / "again")
    RegionStore(in_photos / "store")[IDS[0]].save(tmp_path / "record.npz")
    client = Path(__file__).parents[1] / "pipeline_client.py"
    command = [sys.executable, "-I", client, in_photos / "model", tmp_path / "record.npz", "photo_0.png", *CAPTIONS]
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    found, refused = json.loads(done.stdout.splitlines()[-1])
    scores = {each["text"]: each["score"] for each in found}
    np.testing.assert_allclose([scores[text] for text in CAPTIONS], stored[:, 0], rtol=0, atol=1e-5)
    assert "photo_0.png is a photo, and there is no detector" in refused and "unicoder-vl-hf[detection]" in refused
