"""Region embeddings that begin as words."""

import datasets
import numpy as np
import pytest
import small_world
import tiny
import torch

from unicoder_vl_hf import RegionRecord, UnicoderVLForImageTextRetrieval
from unicoder_vl_hf.runs import alignment
from unicoder_vl_hf.runs.alignment import align_regions
from unicoder_vl_hf.tasks.retrieval.training import RetrievalArguments, prepare_retrieval

NOUNS = ("dog", "cat", "grass")


def a_world(num_images=40):
    """Images of one or two nouns, with a region for each whose feature is the noun's direction and a little noise."""
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((len(NOUNS), tiny.FEATURE_DIM))
    store, rows = {}, []
    for number in range(num_images):
        shown = rng.choice(len(NOUNS), rng.integers(1, 3), replace=False)
        features = directions[shown] + 0.1 * rng.standard_normal((len(shown), tiny.FEATURE_DIM)) + 3
        store[str(number)] = RegionRecord(str(number), features=features.astype(np.float32))
        rows += [{"image_id": str(number), "caption": f"a {NOUNS[noun]}"} for noun in shown]
    return store, datasets.Dataset.from_list(rows), directions + 3


def projected(model, features):
    projection = model.bert.embeddings.region_embeddings.feature_projection
    with torch.no_grad():
        return projection(torch.as_tensor(features, dtype=torch.float32))


def test_a_region_begins_as_the_word_of_what_it_shows():
    store, pairs, directions = a_world()
    model, processor = tiny.model(UnicoderVLForImageTextRetrieval), tiny.processor()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    explained = align_regions(model, processor, store, pairs)
    assert 0.3 < explained <= 1
    words = model.get_input_embeddings().weight[[tiny.WORDS.index(noun) for noun in NOUNS]]
    regions = projected(model, directions)
    similar = torch.nn.functional.cosine_similarity((regions - regions.mean(0))[:, None], words - words.mean(0), dim=-1)
    assert similar.argmax(1).tolist() == [0, 1, 2] and similar.diagonal().min() > 0.9
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    name = "bert.embeddings.region_embeddings.feature_projection"
    assert changed == {f"{name}.weight", f"{name}.bias"}


@pytest.mark.parametrize("ridge", [0.1, 10.0])
def test_it_is_the_least_squares_prediction_with_the_spread_of_the_words(ridge, monkeypatch):
    monkeypatch.setattr(alignment, "RIDGES", (ridge,))
    monkeypatch.setattr(alignment, "BATCH", 7)  # images of a fold are in all batches
    store, pairs, _ = a_world()
    model, processor = tiny.model(UnicoderVLForImageTextRetrieval), tiny.processor()
    align_regions(model, processor, store, pairs)
    words = model.get_input_embeddings().weight.detach().double().numpy()
    captions = pairs["caption"]
    share = {word: np.mean([word in caption.split() for caption in captions]) for word in ("a", *NOUNS)}
    features, targets = [], []
    for image_id, record in store.items():
        mine = [row["caption"].split() for row in pairs if row["image_id"] == image_id]
        weights = [(-np.log(share[word]), words[tiny.WORDS.index(word)]) for caption in mine for word in caption]
        targets += [sum(w * e for w, e in weights) / sum(w for w, _ in weights)] * record.num_regions
        features += list(record.features.astype(np.float64))
    features, targets = np.array(features), np.array(targets)
    centred, wanted = features - features.mean(0), targets - targets.mean(0)
    ridge = np.sqrt(ridge * centred.var(0).mean() * len(centred)) * np.eye(tiny.FEATURE_DIM)
    weight = np.linalg.lstsq(np.vstack((centred, ridge)), np.vstack((wanted, np.zeros((len(ridge), 16)))), rcond=None)[
        0
    ]
    predicted = centred @ weight
    scale = words[[tiny.WORDS.index(word) for word in ("a", *NOUNS)]].std() / np.sqrt((predicted**2).mean())
    np.testing.assert_allclose(projected(model, features), scale * predicted + targets.mean(0), atol=1e-4)


def test_images_are_drawn_evenly(monkeypatch):
    store, pairs, _ = a_world(40)
    read = []
    model, processor = tiny.model(UnicoderVLForImageTextRetrieval), tiny.processor()
    monkeypatch.setattr(alignment, "BATCH", 3)

    class Watched(dict):
        def __getitem__(self, image_id):
            read.append(int(image_id))
            return super().__getitem__(image_id)

    align_regions(model, processor, Watched(store), pairs, max_images=10)
    assert read == list(range(0, 40, 4))


def test_what_does_not_vary_cannot_be_aligned():
    model, processor = tiny.model(UnicoderVLForImageTextRetrieval), tiny.processor()
    store = {name: RegionRecord(name, features=np.ones((2, tiny.FEATURE_DIM), np.float32)) for name in "abcdef"}
    rows = [{"image_id": name, "caption": f"a {NOUNS[number % 3]}"} for number, name in enumerate(store)]
    with pytest.raises(ValueError, match="Regions cannot be aligned with words: the features of the images"):
        align_regions(model, processor, store, datasets.Dataset.from_list(rows))
    with pytest.raises(ValueError, match="captions of at least 5 images; there are 4"):
        align_regions(model, processor, store, datasets.Dataset.from_list(rows[:4]))
    store, pairs, _ = a_world()
    same = pairs.map(lambda row: {"caption": "a dog"})
    with pytest.raises(ValueError, match="Regions cannot be aligned with words: all images have the same ones"):
        align_regions(model, processor, store, same)


def test_the_ridge_is_the_one_that_predicts_best_what_was_left_out():
    """Features that are noise beside one direction: without a ridge the few images are learned by heart."""
    store, pairs, _ = a_world(20)
    rng = np.random.default_rng(1)
    wide = {
        name: RegionRecord(name, features=np.hstack((record.features, rng.standard_normal((record.num_regions, 40)))))
        for name, record in store.items()
    }
    found = {}
    for ridges in [(1e-6,), (1.0,), (1e-6, 1.0)]:
        model = tiny.model(UnicoderVLForImageTextRetrieval, region_feature_dim=tiny.FEATURE_DIM + 40)
        alignment.RIDGES, before = ridges, alignment.RIDGES
        try:
            found[ridges] = align_regions(model, tiny.processor(), wide, pairs)
        finally:
            alignment.RIDGES = before
    assert found[1e-6, 1.0] == found[(1.0,)] > found[(1e-6,)]


def test_a_run_aligns_the_regions_of_a_bert_alone(tmp_path, caplog):
    world, bert = small_world.build(tmp_path), small_world.save_bert(tmp_path / "bert", dropout=0.0)
    options = {
        "captions": str(world / "captions.jsonl"),
        "regions": str(world / "regions"),
        "max_validation_images": 2,
        "align_regions": True,
    }
    words = "Region embeddings begin as the words that captions of 40 images lead one to expect"
    setup = prepare_retrieval(RetrievalArguments(model_name_or_path=str(bert), **options), tmp_path, seed=0)
    assert words in caplog.text
    setup.model.save_pretrained(tmp_path / "trained")
    setup.processor.save_pretrained(tmp_path / "trained")
    caplog.clear()
    trained = RetrievalArguments(model_name_or_path=str(tmp_path / "trained"), **options)
    again = prepare_retrieval(trained, tmp_path, seed=0).model
    assert words not in caplog.text
    for name, tensor in setup.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
