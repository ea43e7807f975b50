"""`UnicoderVLProcessor`: what it takes, what it refuses, and what becomes of its store."""

import copy
import inspect
import json
import logging
import pickle
import weakref
from collections.abc import Mapping
from pathlib import Path

import datasets
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoProcessor

from unicoder_vl_hf import RegionRecord, RegionStore, RegionStoreWriter, UnicoderVLForImageTextRetrieval
from unicoder_vl_hf.processing_unicoder_vl import UnicoderVLProcessor, UnicoderVLProcessorKwargs

CAPTIONS = ["a dog runs .", "the cat sleeps on the grass ."]
# [CLS] 2, [SEP] 3, then tiny.WORDS in order.
TOKENS = [[2, 5, 6, 8, 13, 3, 0, 0, 0], [2, 11, 7, 9, 10, 11, 12, 13, 3]]
REGION_INPUTS = ["region_features", "region_locations", "region_attention_mask"]


class UncopyableStore(Mapping):
    """Any mapping of records is a store; this one breaks where it is copied, as an open file would."""

    def __init__(self, records: Mapping[str, RegionRecord], provenance: dict | None = None):
        self.records = records
        if provenance is not None:
            self.provenance = provenance

    def __getitem__(self, image_id):
        return self.records[image_id]

    def __iter__(self):
        return iter(self.records)

    def __len__(self):
        return len(self.records)

    def __deepcopy__(self, memo):
        raise AssertionError("a store must not be copied")


@pytest.fixture
def processor() -> UnicoderVLProcessor:
    return tiny.processor()


@pytest.fixture
def store() -> UncopyableStore:
    return UncopyableStore({name: tiny.record(name, n) for name, n in (("one", 3), ("two", 2), ("7.npz", 4))})


def expected_regions(*records: RegionRecord) -> dict[str, np.ndarray]:
    """Padding written out: one loop, no sharing with the code under test."""
    longest = max(len(record.features) for record in records)
    features = np.zeros((len(records), longest, tiny.FEATURE_DIM), records[0].features.dtype)
    locations, mask = np.zeros((len(records), longest, 5)), np.zeros((len(records), longest), int)
    for row, record in enumerate(records):
        for index, (x1, y1, x2, y2) in enumerate(record.boxes.astype(float) / [640, 480, 640, 480]):
            features[row, index] = record.features[index]
            locations[row, index] = x1, y1, x2, y2, (x2 - x1) * (y2 - y1)
            mask[row, index] = 1
    return {"region_features": features, "region_locations": locations, "region_attention_mask": mask}


def assert_regions(inputs, *records: RegionRecord):
    for name, expected in expected_regions(*records).items():
        np.testing.assert_allclose(np.asarray(inputs[name]), expected, rtol=0, atol=1e-6, err_msg=name)


def test_captions_and_regions_become_padded_tensors(processor):
    inputs = processor(text=CAPTIONS, regions=[tiny.record("one", 3), tiny.record("two", 2)], return_tensors="pt")
    assert inputs["input_ids"].tolist() == TOKENS
    assert inputs["attention_mask"].tolist() == [[1] * 6 + [0] * 3, [1] * 9]
    assert inputs["token_type_ids"].tolist() == [[0] * 9] * 2
    assert_regions(inputs, tiny.record("one", 3), tiny.record("two", 2))
    assert all(isinstance(value, torch.Tensor) for value in inputs.values())
    assert sorted(inputs) == sorted(processor.model_input_names)
    assert sorted(processor.model_input_names) == sorted(
        ["input_ids", "token_type_ids", "attention_mask", *REGION_INPUTS]
    )


def test_regions_in_every_form_alone(processor, store, tmp_path):
    path = tmp_path / "one.npz"
    store["one"].save(path)
    for regions in (store["one"], tiny.region_arrays("one", 3), "one", path):
        assert_regions(processor(text="a dog", regions=regions, store=store), store["one"])
        assert_regions(processor(regions=[regions], store=store), store["one"])


def test_regions_in_mixed_forms(processor, store, tmp_path):
    path = tmp_path / "saved.npz"
    saved = tiny.record("saved", 1)
    saved.save(path)
    regions = [path, "two", tiny.region_arrays("dict", 4), tiny.record("record", 3)]
    inputs = processor(text=["a"] * 4, regions=regions, store=store, return_tensors="np")
    assert_regions(inputs, saved, store["two"], tiny.record("dict", 4), tiny.record("record", 3))


def test_a_str_is_an_image_id_else_the_file_of_a_photo(processor, store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_regions(processor(regions="7.npz", store=store), store["7.npz"])
    tiny.record("other", 1).save("7.npz")
    assert_regions(processor(regions="7.npz", store=store), store["7.npz"])  # no photo could be read
    processor.set_detector(list)
    with pytest.raises(
        ValueError, match=r"'7.npz' is an image id of .*UncopyableStore.*, and a file, /.*7\.npz: give a"
    ):
        processor(regions="7.npz", store=store)
    with pytest.raises(KeyError, match=r"absent.* Nor is it the file of a photo"):
        processor(regions=["one", "absent"], store=store)


def test_photos_of_a_call_are_given_to_the_detector_at_once(processor, store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photo, calls = Image.new("RGB", (8, 8)), []
    for name in ("dog.png", "cat.png"):
        photo.save(name)
    tiny.record("saved", 1).save("saved.npz")

    def detector(photos):
        calls.append(photos)
        return [tiny.record(f"found {number}", 2) for number in range(len(photos))]

    found = [tiny.record(f"found {number}", 2) for number in range(3)]
    images = ["dog.png", "one", Path("cat.png"), Path("saved.npz"), photo]
    expected = found[0], store["one"], found[1], tiny.record("saved", 1), found[2]
    assert_regions(processor(images=images, store=store, detector=detector), *expected)
    processor.set_detector(detector)
    assert_regions(copy.deepcopy(processor)(regions=images, store=store), *expected)
    assert_regions(processor(text=CAPTIONS, images=photo), *[found[0]] * 2)
    assert calls == [[Path("dog.png"), Path("cat.png"), photo]] * 2 + [[photo]]
    processor.save_pretrained("saved")
    assert "detector" not in json.dumps(UnicoderVLProcessor.from_pretrained("saved").to_dict()).replace("region_", "")


def test_one_image_meets_every_text(processor, store):
    every = processor(text=CAPTIONS, regions=[store["one"]] * 2, return_tensors="pt")
    for one in ("one", ["one"], store["one"]):
        inputs = processor(text=CAPTIONS, regions=one, store=store, return_tensors="pt")
        assert sorted(inputs) == sorted(every)
        assert all(torch.equal(inputs[name], every[name]) for name in every)


def test_a_call_has_no_default_of_its_own_but_none(processor):
    """Defaults are options of the processor, as everywhere in the library: the class or an object may set others."""
    parameters = inspect.signature(UnicoderVLProcessor.__call__).parameters
    assert [*parameters] == ["self", "text", "regions", "images", "store", "detector", "kwargs"]
    assert all(each.annotation is not inspect.Parameter.empty for each in list(parameters.values())[1:])
    assert UnicoderVLProcessorKwargs._defaults == {
        "text_kwargs": {"padding": True, "truncation": True, "max_length": 44}
    }
    assert processor.valid_processor_kwargs is UnicoderVLProcessorKwargs


def test_transformers_merges_the_options_of_the_tokenizer_with_our_defaults(processor):
    merged = processor._merge_kwargs(processor.valid_processor_kwargs, tokenizer_init_kwargs={}, max_length=7)
    assert merged["text_kwargs"] == {"padding": True, "truncation": True, "max_length": 7}


def test_options_of_the_text_alone_leave_the_regions_as_they_are(processor, store):
    inputs = processor(text="a dog", regions=store["one"], text_kwargs={"return_tensors": "pt"})
    assert isinstance(inputs["input_ids"], torch.Tensor) and isinstance(inputs["region_features"], np.ndarray)


def test_text_or_regions_alone(processor):
    assert sorted(processor(text="a dog")) == ["attention_mask", "input_ids", "token_type_ids"]
    assert sorted(processor(regions=tiny.record())) == sorted(REGION_INPUTS)


def test_defaults_are_padding_truncation_and_44_tokens(processor):
    inputs = processor(text=["dog " * 60, "cat"])
    assert [len(ids) for ids in inputs["input_ids"]] == [44, 44]
    assert inputs["input_ids"][0] == [2] + [6] * 42 + [3]
    assert [sum(mask) for mask in inputs["attention_mask"]] == [44, 3]


def test_arguments_of_the_tokenizer_pass(processor):
    assert len(processor(text="dog " * 60, truncation=False, max_length=None)["input_ids"]) == 62
    assert processor(text="a dog runs .", max_length=4)["input_ids"] == [2, 5, 6, 3]
    inputs = processor(text=["cat"], padding="max_length", max_length=5, padding_side="left", return_tensors="pt")
    assert inputs["input_ids"].tolist() == [[0, 0, 2, 7, 3]]
    inputs = processor(text=["cat"], add_special_tokens=False, pad_to_multiple_of=4, return_token_type_ids=False)
    assert dict(inputs) == {"input_ids": [[7, 0, 0, 0]], "attention_mask": [[1, 0, 0, 0]]}
    assert processor(text="a dog runs .", max_length=9, text_kwargs={"max_length": 4})["input_ids"] == [2, 5, 6, 3]


@pytest.mark.parametrize("inputs", [{"text": "a dog"}, {"regions": tiny.record()}])
@pytest.mark.parametrize("arguments", [{"max_lenght": 7}, {"text_kwargs": {"max_lenght": 7}}])
def test_a_misspelt_argument_is_named(processor, inputs, arguments):
    with pytest.raises(TypeError, match="max_lenght"):
        processor(**inputs, **arguments)


def test_a_column_of_a_dataset_is_text_and_regions(processor, store):
    rows = datasets.Dataset.from_dict({"caption": CAPTIONS, "image_id": ["one", "two"]})
    inputs = processor(text=rows["caption"], regions=rows["image_id"], store=store, return_tensors="pt")
    assert inputs["input_ids"].tolist() == TOKENS
    assert_regions(inputs, store["one"], store["two"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "text, regions, or both"),
        ({"text": ""}, "''"),
        ({"text": []}, r"text is \[\]"),
        ({"text": ["a dog", " \n"]}, r"text\[1\]"),
        ({"text": ["a dog", None]}, r"text\[1\] is None"),
        ({"regions": []}, "at least one"),
        ({"regions": "one"}, "'one' is no file, and as an image id it needs a store"),
        ({"text": ["a", "a", "a"], "regions": [tiny.record(), tiny.record()]}, "3 texts but 2 images"),
        (
            {"text": "a dog", "regions": [tiny.record(), tiny.record()]},
            r"1 text but 2 images.*\['a dog'\] \* 2.*ImageTextScorer",
        ),
        ({"text": ["a dog"], "regions": [tiny.record(), tiny.record()]}, r"1 text but 2 images.*\['a dog'\] \* 2"),
        ({"images": Image.new("RGB", (8, 8))}, "is a photo, and there is no detector.*RegionFinder"),
        ({"images": tiny.record(), "regions": tiny.record()}, "both regions and images"),
        ({"regions": 391895}, "holds a int.*image id"),
        ({"regions": ["one", 391895]}, "holds a int.*image id"),
        ({"regions": np.ones((2, tiny.FEATURE_DIM))}, "holds a ndarray"),
        ({"regions": {"image_id": "x", "feature": 1}}, r"'x'.*\['feature'\]"),
        ({"regions": {**tiny.region_arrays("bad"), "boxes": np.ones((1, 4))}}, "'bad': boxes"),
    ],
)
def test_faults_are_named(processor, arguments, message):
    if isinstance(arguments.get("regions"), list) and "one" in arguments["regions"]:
        arguments = {**arguments, "store": {"one": tiny.record("one")}}
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


def test_a_path_without_a_record_is_named(processor, tmp_path):
    (tmp_path / "text.npz").write_text("no record")
    with pytest.raises(ValueError, match=r"text\.npz"):
        processor(regions=tmp_path / "text.npz")
    with pytest.raises(FileNotFoundError):
        processor(regions=tmp_path / "absent.npz")


def test_truncated_captions_are_counted(processor):
    texts = ["dog " * 42, "dog " * 43, "dog", "dog " * 99]  # 44, 45, 3 and 101 tokens
    assert processor.count_truncated(texts) == 2
    assert processor.count_truncated(texts, max_length=45) == 1
    assert processor.count_truncated(["dog"] * 10_001, max_length=2) == 10_001
    assert processor.count_truncated([]) == 0
    with pytest.raises(ValueError, match=r"texts is 'a dog'.*\['a dog'\]"):
        processor.count_truncated("a dog")


def test_the_default_store_gives_way_to_the_argument(processor, store):
    processor.set_store(store)
    assert_regions(processor(regions=["two"]), store["two"])
    other = {"two": tiny.record("other", 4)}
    assert_regions(processor(regions=["two"], store=other), other["two"])
    assert_regions(processor(regions=["two"], store={**other}), other["two"])
    assert_regions(processor(regions=["two"]), store["two"])  # still
    with pytest.raises(KeyError):
        processor(regions=["one"], store={})  # an empty store is a store
    processor.set_store(None)
    with pytest.raises(ValueError, match="needs a store"):
        processor(regions=["two"])


def test_the_store_is_shared_not_copied(processor, store):
    processor.set_store(store)
    twin = copy.deepcopy(processor)
    assert_regions(twin(regions=["one"]), store["one"])
    twin.set_store({"one": tiny.record("other", 1)})
    assert_regions(processor(regions=["one"]), store["one"])  # the twin's store is its own


def test_the_store_is_not_saved(processor, store, tmp_path):
    processor.save_pretrained(tmp_path / "without")
    processor.set_store(store)
    assert "store" not in json.dumps(processor.to_dict())
    assert "store" not in repr(processor).lower()
    processor.save_pretrained(tmp_path / "with")
    files = sorted(path.name for path in (tmp_path / "without").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "with").iterdir())
    for name in files:
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes(), name
    with pytest.raises(ValueError, match="needs a store"):
        UnicoderVLProcessor.from_pretrained(tmp_path / "with")(regions=["one"])


def test_pickling_carries_the_store(processor, store):
    processor.set_store(store)
    assert_regions(pickle.loads(pickle.dumps(processor))(regions=["two"]), store["two"])


class ProcessRows:
    """A collate function; at module level, so that it reaches a spawned worker."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, image_ids):
        return dict(self.processor(text=["a dog"] * len(image_ids), regions=image_ids, return_tensors="pt"))


def test_a_worker_reads_the_default_store(processor, tmp_path):
    with RegionStoreWriter(tmp_path) as writer:
        for name in ("one", "two"):
            writer.write(tiny.record(name, 3, np.float16))
    processor.set_store(RegionStore(tmp_path))
    loader = DataLoader(["one", "two"], batch_size=2, num_workers=1, collate_fn=ProcessRows(processor))
    (inputs,) = loader
    assert_regions(inputs, tiny.record("one", 3, np.float16), tiny.record("two", 3, np.float16))


def test_float16_features_reach_the_model(processor, tmp_path):
    with RegionStoreWriter(tmp_path) as writer:
        writer.write(tiny.record("one", 3))
    half = RegionStore(tmp_path)
    inputs = processor(text="a dog", regions="one", store=half, return_tensors="pt", padding=True)
    assert inputs["region_features"].dtype == torch.float16
    rounded = dict(tiny.region_arrays("one", 3))
    rounded["features"] = rounded["features"].astype(np.float16).astype(np.float32)
    model = tiny.model(UnicoderVLForImageTextRetrieval)
    inputs = processor(text=["a dog"], regions=["one"], store=half, return_tensors="pt")
    expected = processor(text=["a dog"], regions=[rounded], return_tensors="pt")
    assert expected["region_features"].dtype == torch.float32
    torch.testing.assert_close(model(**inputs).scores, model(**expected).scores, rtol=0, atol=0)


def test_regions_of_another_kind_are_told_once_a_store(store, caplog):
    trained = {"detector": "pythia", "box_type": "detected", "dtype": "float16"}
    processor = tiny.processor(region_provenance=trained)
    same = UncopyableStore(store.records, {**trained, "dtype": "float32"})
    other = UncopyableStore(store.records, {**trained, "detector": "vinvl"})
    third = UncopyableStore(store.records, {**trained, "box_type": "ground truth"})

    def warnings() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]

    processor(regions="one", store=same)
    processor(regions="one", store=store)  # a mapping of unknown origin
    assert warnings() == []
    processor(regions="one", store=other)
    assert len(warnings()) == 1 and "'pythia'" in warnings()[0] and "'vinvl'" in warnings()[0]
    processor.set_store(third)
    assert len(warnings()) == 2 and "'detected'" in warnings()[1] and "'ground truth'" in warnings()[1]
    for _ in range(2):  # alternating, as training and validation do
        processor(regions="one", store=other)
        processor(regions="one")
        pickle.loads(pickle.dumps(processor))(regions="one")
    assert len(warnings()) == 2


def test_a_mapping_that_was_passed_once_is_let_go(processor):
    class Store(dict):
        pass

    store = Store(one=tiny.record("one"))
    kept = weakref.ref(store)
    processor(regions="one", store=store)
    del store
    assert kept() is None


def test_batch_decode(processor):
    assert processor.batch_decode(TOKENS, skip_special_tokens=True) == ["a dog runs.", "the cat sleeps on the grass."]
    assert processor.decode(TOKENS[0], skip_special_tokens=True) == "a dog runs."


def test_what_is_saved_does_not_depend_on_the_last_call(processor, tmp_path):
    processor.save_pretrained(tmp_path / "before")
    called = processor(text=["a dog", "a dog runs on the grass"], max_length=4)
    processor.save_pretrained(tmp_path / "after")
    saved = (tmp_path / "after" / "tokenizer.json").read_text()
    assert saved == (tmp_path / "before" / "tokenizer.json").read_text()
    assert json.loads(saved)["padding"] is None and json.loads(saved)["truncation"] is None
    assert processor(text=["a dog", "a dog runs on the grass"], max_length=4) == called


@pytest.mark.parametrize("loader", [UnicoderVLProcessor, AutoProcessor])
def test_saved_and_loaded_processors_are_equal(loader, tmp_path):
    processor = tiny.processor(max_regions=2, score_threshold=0.2, region_provenance={"detector": "pythia"})
    processor.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    assert type(loaded) is UnicoderVLProcessor
    assert loaded.feature_extractor.region_provenance == {"detector": "pythia"}
    scored = RegionRecord(**tiny.region_arrays("one", 4), object_scores=[0.1, 0.9, 0.3, 0.8])
    for name, value in processor(text=CAPTIONS[:1], regions=[scored], return_tensors="pt").items():
        assert torch.equal(loaded(text=CAPTIONS[:1], regions=[scored], return_tensors="pt")[name], value), name
    assert loaded(regions=[scored])["region_features"][0].tolist() == scored.features[[1, 3]].tolist()
