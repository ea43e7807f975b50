"""The ablations: one tiny run of each kind of training, going on, and what the tables say of results."""

import json

import places
import pytest
import small_world

from unicoder_vl_hf import ImageTextScorer, UnicoderVLConfig
from unicoder_vl_hf.data.foils import Foil, write_foils
from unicoder_vl_hf.scripts import demo


@pytest.fixture
def script():
    return places.script("ablations")


def result(recall: float, zero_shot: float | None = None) -> dict:
    of_stage = {"image_retrieval_recall@1": recall, "text_retrieval_recall@1": recall, "foils all": 0.5}
    stages = {"fine-tuned": of_stage}
    return stages if zero_shot is None else {"zero-shot": dict.fromkeys(of_stage, zero_shot)} | stages


def test_tables_say_what_came_out_and_what_did_not(script):
    results = {
        "full": {"0": result(0.5, 0.25), "1": result(0.7, 0.75)},
        "scratch": {"0": result(0.4), "1": result(0.6)},
        "no_moc": {"0": result(0.6, 0.1), "1": result(0.6, 0.1)},
        "paper": {"0": result(0.5, 0.1)},
    }
    rows = script.results_table(results).splitlines()
    assert len(rows) == 2 + 4 and all(row.count("|") == rows[0].count("|") for row in rows)
    assert rows[2].split(" | ")[1:4] == ["0, 1", "50.0 ± 35.4", "50.0 ± 35.4"]
    assert rows[3].split(" | ")[2:6] == ["–", "–", "–", "50.0 ± 14.1"]
    assert [row.split(" | ")[1:] for row in script.orderings_table(results).splitlines()[2:]] == [
        ["10.0 ± 0.0", "yes |"],
        ["0.0 ± 14.1", "in 1 of 2 seeds |"],
        ["0.0", "no |"],
    ]


def test_every_ordering_is_of_runs_that_differ_in_one_thing(script):
    for better, worse in script.ORDERINGS:
        a, b = (vars(script.RUNS[name]) for name in (better, worse))
        assert len([name for name in a if a[name] != b[name] and name != "title"]) == 1


def test_a_share_of_the_images_keeps_the_other_splits(script, tmp_path):
    rows = [
        {"image_id": f"{split}-{n // 2}", "caption": "c", "split": split}
        for split in ("train", "val")
        for n in range(8)
    ]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = script.some_captions(tmp_path / "captions.jsonl", 0.25, tmp_path / "some.jsonl").read_text().splitlines()
    assert [json.loads(row) for row in kept] == rows[:2] + rows[8:]


def test_the_whole_way(script, monkeypatch, tmp_path, capsys):
    """A run on a few scenes; then another alone, while the first is not trained again."""
    trained = []

    def train(run, checkpoints, **options):
        trained.append(options)
        demo.train(run, checkpoints, **options)

    monkeypatch.setattr(script, "train", train)
    words = "--train_scenes 20 --held_out_scenes 4 --pretraining_epochs 1 --fine_tuning_epochs 1 --seeds 0".split()
    words += ["--output_dir", str(tmp_path)]
    script.main([*words, "--only", "data50"])
    assert [options["num_train_epochs"] for options in trained] == [2, 1]
    script.main([*words, "--only", "data50", "scratch"])
    assert len(trained) == 3 and {options["recipe"] for options in trained} == {"strong"}
    measured = json.loads((tmp_path / "ablations.json").read_text())["results"]
    stages = {name: list(seeds["0"]) for name, seeds in measured.items()}
    assert stages == {"data50": ["zero-shot", "fine-tuned"], "scratch": ["fine-tuned"]}
    assert {"foils relation", "foils count"} < measured["data50"]["0"]["zero-shot"].keys()
    table = (tmp_path / "ablations.md").read_text()
    assert table in capsys.readouterr().out and table.count("\n| ") == 2 + 1
    assert (tmp_path / "ablations.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="another --output_dir"):
        script.main([*words, "--fine_tuning_epochs", "2"])
    with pytest.raises(SystemExit):
        script.main(["--only", "nothing"])


def test_photos_of_ones_own(script, monkeypatch, tmp_path):
    """A BERT and files of captions, regions and foils take the scenes' place; what is measured is one split's."""
    world, bert = small_world.build(tmp_path), small_world.save_bert(tmp_path / "bert", dropout=0.0)
    rows = [json.loads(row) for row in (world / "captions.jsonl").read_text().splitlines()]
    told = [(row["split"], row["image_id"], row["caption"]) for row in rows if row["split"] != "train"]
    foils = tmp_path / "foils.jsonl"
    write_foils(foils, [Foil(image, split, text, f"{text} twice", "", "twice", "count") for split, image, text in told])
    measured = []

    def score(self, captions, image_ids):
        measured.append((len(captions), len(image_ids)))
        return scored(self, captions, image_ids)

    def margins(foils, score):
        told_of.extend(foil.image_id for foil in foils)
        return foil_margins(foils, score)

    told_of, foil_margins = [], script.foil_margins
    monkeypatch.setattr(script, "foil_margins", margins)
    scored = ImageTextScorer.score
    monkeypatch.setattr(ImageTextScorer, "score", score)
    options = {
        "--captions": world / "captions.jsonl", "--regions": world / "regions", "--model_name_or_path": bert,
        "--foils": foils, "--test_split": "val", "--test_images": 3, "--output_dir": tmp_path / "runs",
        "--fine_tuning_epochs": 1, "--seeds": 1, "--only": "scratch", "--learning_rate": 1e-3, "--batch_size": 16,
    }  # fmt: skip
    words = [str(word) for option in options.items() for word in option]
    script.main(words)
    results = json.loads((tmp_path / "runs" / "ablations.json").read_text())
    assert measured == [(6, 3)] and results["settings"]["batch_size"] == 16
    assert 0 <= results["results"]["scratch"]["1"]["fine-tuned"]["foils count"] <= 1
    config = UnicoderVLConfig.from_pretrained(tmp_path / "runs" / "scratch-1" / "fine_tuned")
    assert config.num_hidden_layers == 3 and not (tmp_path / "runs" / "scratch-1" / "bert").exists()
    assert told_of == [image for split, image, _ in told if split == "val"][: 3 * 2]
    with pytest.raises(ValueError, match="no foil of the 40 images of the split 'train'"):
        script.main([*words, "--test_split", "train", "--test_images", "40", "--output_dir", str(tmp_path / "others")])
    copy = tmp_path / "runs" / "captions_of_photos.jsonl"
    with pytest.raises(ValueError, match="is a copy of this script"):
        script.main([*words, "--captions", str(copy)])
    with (world / "captions.jsonl").open("a") as file:
        file.write(json.dumps(rows[0] | {"caption": "one more ."}) + "\n")
    with pytest.raises(ValueError, match="another --output_dir"):
        script.main(words)


@pytest.mark.parametrize(
    "options", [["captions"], ["captions", "regions"], ["regions", "model_name_or_path"], ["foils"], ["scale_features"]]
)
def test_half_of_the_photos_options_are_refused(script, options):
    with pytest.raises(ValueError, match="expected all three"):
        script.AblationArguments(**dict.fromkeys(options, "a file"))


@pytest.mark.parametrize("name", ["pretraining_epochs", "fine_tuning_epochs", "learning_rate", "batch_size"])
def test_numbers_are_above_0(script, name):
    with pytest.raises(ValueError, match=f"--{name} 0, expected above 0"):
        script.AblationArguments(**{name: 0})


def test_scenes_of_another_split(script, tmp_path):
    args = script.AblationArguments(output_dir=str(tmp_path), train_scenes=4, held_out_scenes=3, test_split="val")
    args.test_images = 2
    world = script.open_world(args)
    assert world.test.image_ids == ["val-00000", "val-00001"]
    assert {foil.image_id for foil in world.foils} == {"val-00000", "val-00001"}
