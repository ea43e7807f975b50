"""What a batch holds, exactly; what is masked, by count; and that nothing but (seed, epoch, row) decides it."""

import dataclasses
import inspect

import datasets
import numpy as np
import pytest
import tiny
import torch
from torch.utils.data import DataLoader
from transformers import BertTokenizer

from unicoder_vl_hf import (
    DataCollatorForUnicoderVLPreTraining,
    RegionRecord,
    RegionStore,
    RegionStoreWriter,
    UnicoderVLFeatureExtractor,
    UnicoderVLForPreTraining,
    UnicoderVLProcessor,
)
from unicoder_vl_hf.data.negatives import PairsWithMismatches
from unicoder_vl_hf.scenes.world import scene_tokenizer

PAD, UNK, CLS, SEP, MASK, A, DOG, CAT, RUNS, SLEEPS, ON, THE, GRASS, DOT = range(14)
NAMES = ["input_ids", "token_type_ids", "attention_mask"]
NAMES += ["region_features", "region_locations", "region_attention_mask", "masked_regions"]
NAMES += ["labels", "region_labels", "matching_labels"]


def record(image_id, object_ids, *, scores=None, dtype=np.float32):
    """Region i of an image has the feature (i + 1) * ones and a quarter of a 4 x 2 photo."""
    count = len(object_ids)
    return RegionRecord(
        image_id=image_id,
        image_width=4,
        image_height=2,
        boxes=np.tile(np.array([0, 0, 2, 1], np.float32), (count, 1)),
        features=np.arange(1, count + 1, dtype=dtype)[:, None].repeat(tiny.FEATURE_DIM, axis=1),
        object_ids=np.array(object_ids),
        object_scores=None if scores is None else np.array(scores, np.float32),
    )


STORE = {"dogs": record("dogs", [3, 1]), "cats": record("cats", [2, -1, 4])}
ROW = {
    "image_id": "dogs",
    "caption": "a dog runs",
    "mismatch_image_id": "cats",
    "mismatch_caption": "a dog runs",
    "row_index": 0,
    "epoch": 0,
}
WITHOUT_MISMATCH = {name: ROW[name] for name in ("image_id", "caption", "row_index", "epoch")}


def collator(store=STORE, *, processor=None, **options):
    options = {"num_region_classes": 5} | options
    return DataCollatorForUnicoderVLPreTraining(processor or tiny.processor(), store, **options)


def rows_of(count, caption="a dog runs on the grass .", image_id="many", epoch=0, **mismatch):
    row = {"image_id": image_id, "caption": caption, "epoch": epoch}
    row |= {
        f"mismatch_{name}": value for name, value in ({"image_id": image_id, "caption": caption} | mismatch).items()
    }
    return [{**row, "row_index": index} for index in range(count)]


MANY = {"many": record("many", [0, 1, 2, 3, 4, -1, 0, 1])}


def assert_equal(batch, other):
    assert batch.keys() == other.keys()
    for name in batch:
        assert batch[name].dtype == other[name].dtype, name
        assert torch.equal(batch[name], other[name]), name


def within(share, probability, count, sigmas=5):
    """`share` of `count` draws is what `probability` gives, but for chance."""
    return abs(share - probability) <= sigmas * (probability * (1 - probability) / count) ** 0.5


# Exact tensors


def test_everything_masked_is_known_by_hand():
    batch = collator(mlm_probability=1.0, moc_probability=1.0, region_zero_prob=1.0)([ROW])
    assert list(batch) == NAMES
    assert set(NAMES) <= set(inspect.signature(UnicoderVLForPreTraining.forward).parameters)
    location = [0.0, 0.0, 0.5, 0.5, 0.25]
    features = torch.zeros(2, 3, tiny.FEATURE_DIM)
    features[1, 1] = 2.0  # of no known class, hence never chosen
    expected = {
        "input_ids": torch.tensor([[CLS, MASK, MASK, MASK, SEP]] * 2),
        "token_type_ids": torch.zeros(2, 5, dtype=torch.long),
        "attention_mask": torch.ones(2, 5, dtype=torch.long),
        "region_features": features,
        "region_locations": torch.tensor([[location, location, [0.0] * 5], [location] * 3]),
        "region_attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
        "masked_regions": torch.tensor([[1, 1, 0], [1, 0, 1]]),
        "labels": torch.tensor([[-100, A, DOG, RUNS, -100]] * 2),
        "region_labels": torch.tensor([[3, 1, -100], [2, -100, 4]]),
        "matching_labels": torch.tensor([1, 0]),
    }
    assert_equal(batch, expected)


def test_nothing_masked_is_what_the_processor_gives():
    """Probability 0 leaves the input alone and predicts nothing: what evaluation of matching reads."""
    made = collator(mlm_probability=0.0, moc_probability=0.0)
    batch = made([ROW])
    inputs = made.processor(
        text=[ROW["caption"]] * 2, regions=["dogs", "cats"], store=STORE, return_tensors="pt", max_length=44
    )
    unmasked = {
        "masked_regions": torch.zeros(2, 3, dtype=torch.long),
        "labels": torch.full((2, 5), -100),
        "region_labels": torch.full((2, 3), -100),
    }
    assert_equal(batch, {**inputs, **unmasked, "matching_labels": torch.tensor([1, 0])})


def test_masks_of_a_seed_stay_what_they_are():
    """A release that drew others would make every published seed another run."""
    made = collator(MANY, seed=7)
    batch = made([row | {"epoch": 2} for row in rows_of(2)])
    tokens, regions = (
        [row.nonzero().flatten().tolist() for row in batch[name] != -100] for name in ("labels", "region_labels")
    )
    assert tokens == [[3], [7], [2, 4], [3, 5]]
    assert regions == [[0], [3], [0, 4], [1]]


def test_rows_without_mismatches_leave_matching_unknown():
    batch = collator(mlm_probability=1.0, moc_probability=0.0)([WITHOUT_MISMATCH])
    assert list(batch) == NAMES
    assert batch["matching_labels"].tolist() == [-100]
    assert batch["input_ids"].tolist() == [[CLS, MASK, MASK, MASK, SEP]]
    # The match of a row is masked the same whether or not its mismatch is there.
    with_mismatch, alone = collator(seed=3)([ROW]), collator(seed=3)([WITHOUT_MISMATCH])
    assert torch.equal(with_mismatch["labels"][:1], alone["labels"])
    assert torch.equal(with_mismatch["region_labels"][:1, :2], alone["region_labels"])


def test_matches_come_first_and_mismatches_follow_in_order():
    rows = [
        ROW | {"caption": "a dog", "mismatch_caption": "a dog"},
        ROW | {"caption": "a cat", "image_id": "cats", "mismatch_caption": "the grass", "row_index": 1},
    ]
    batch = collator(mlm_probability=0.0, moc_probability=0.0)(rows)
    assert batch["input_ids"].tolist() == [[CLS, *words, SEP] for words in ([A, DOG], [A, CAT], [A, DOG], [THE, GRASS])]
    assert batch["region_attention_mask"].sum(dim=1).tolist() == [2, 3, 3, 3]
    assert batch["matching_labels"].tolist() == [1, 1, 0, 0]


def test_long_captions_are_cut():
    batch = collator(max_length=5, mlm_probability=1.0)([ROW | {"caption": "a dog runs on the grass ."}])
    assert batch["input_ids"][0].tolist() == [CLS, MASK, MASK, MASK, SEP]
    assert batch["labels"][0].tolist() == [-100, A, DOG, RUNS, -100]


def test_fewer_regions_than_the_record_has_keep_their_own_classes():
    store = {"dogs": record("dogs", [0, 1, 2, 3], scores=[0.1, 0.9, 0.2, 0.8])}
    batch = collator(store, processor=tiny.processor(max_regions=2), moc_probability=1.0, region_zero_prob=0.0)(
        [WITHOUT_MISMATCH]
    )
    assert batch["region_features"][0, :, 0].tolist() == [2.0, 4.0]  # records 1 and 3
    assert batch["region_labels"].tolist() == [[1, 3]]


# What is masked, by count


@pytest.fixture(scope="module")
def paper():
    return collator(MANY)(rows_of(3000))


def test_the_paper_masks_every_chosen_token(paper):
    words = torch.tensor([A, DOG, RUNS, ON, THE, GRASS, DOT])
    chosen = paper["labels"] != -100
    assert (paper["input_ids"][chosen] == MASK).all()
    assert torch.equal(paper["input_ids"][:, [0, 8]], torch.tensor([[CLS, SEP]]).expand(6000, 2))  # never chosen
    assert not chosen[:, [0, 8]].any()
    restored = torch.where(chosen, paper["labels"], paper["input_ids"])
    assert torch.equal(restored[:, 1:-1], words.expand(6000, 7))
    assert chosen.any(dim=1).all()  # at least one in each row
    # 7 tokens of 15 %, and one where none came up.
    assert within(chosen[:, 1:-1].float().mean().item(), 0.15 + 0.85**7 / 7, 6000 * 7)


def test_regions_are_zeroed_nine_times_of_ten(paper):
    object_ids, chosen = MANY["many"].object_ids, paper["region_labels"] != -100
    assert chosen.any(dim=1).all()
    assert not chosen[:, 5].any()  # -1 is never a target
    assert torch.equal(paper["region_labels"][chosen], torch.tensor(object_ids).expand(6000, 8)[chosen])
    zeroed = (paper["region_features"] == 0).all(dim=-1)
    assert not (zeroed & ~chosen).any()
    kept = paper["region_features"][~zeroed]
    assert torch.equal(kept, torch.tensor(MANY["many"].features).expand(6000, 8, -1)[~zeroed])
    assert within(zeroed[chosen].float().mean().item(), 0.9, int(chosen.sum()))
    assert within(chosen.float().mean().item() * 8 / 7, 0.15 + 0.85**7 / 7, 6000 * 7)


def test_matches_and_mismatches_are_masked_alike(paper):
    """A [MASK] or a zeroed region that occurs in matches alone would tell the label."""
    tokens = (paper["input_ids"] == MASK).float().mean(dim=1).split(3000)
    regions = (paper["region_features"] == 0).all(dim=-1).float().mean(dim=1).split(3000)
    for matches, mismatches in (tokens, regions):
        assert matches.mean() > 0.1 and mismatches.mean() > 0.1
        error = ((matches.var() + mismatches.var()) / 3000).sqrt()
        assert abs(matches.mean() - mismatches.mean()) < 4 * error
    # Alike, yet each by its own draw: else the pair of a caption and its two images would share the mask.
    assert not torch.equal(*paper["labels"].split(3000))


def test_bert_masks_eight_of_ten_and_swaps_one():
    batch = collator(MANY, mask_replace_prob=0.8, random_replace_prob=0.1)(rows_of(6000))
    chosen = batch["labels"] != -100
    count = int(chosen.sum())
    now, before = batch["input_ids"][chosen], batch["labels"][chosen]
    vocabulary = len(tiny.WORDS)  # a random token is [MASK], or what it was, once in so many
    assert within((now == MASK).float().mean().item(), 0.8 + 0.1 / vocabulary, count)
    assert within((now == before).float().mean().item(), 0.1 + 0.1 / vocabulary, count)
    assert set(now.tolist()) == set(range(vocabulary))
    assert not chosen[:, [0, 8]].any()


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_chosen_regions_that_are_not_zeroed_still_count(share):
    batch = collator(MANY, region_zero_prob=share)(rows_of(500))
    chosen = batch["region_labels"] != -100
    zeroed = (batch["region_features"] == 0).all(dim=-1)
    assert within(zeroed[chosen].float().mean().item(), share, int(chosen.sum()))


def test_padding_and_specials_are_never_chosen():
    rows = rows_of(200, caption="a dog", image_id="short") + rows_of(200)
    store = MANY | {"short": record("short", [1, 2])}
    batch = collator(store, mlm_probability=0.5, moc_probability=0.5)(rows)
    for labels, mask in (("labels", "attention_mask"), ("region_labels", "region_attention_mask")):
        assert (batch[mask] == 0).any()
        assert not (batch[labels][batch[mask] == 0] != -100).any()
    assert (batch["input_ids"][batch["attention_mask"] == 0] == PAD).all()
    assert not (batch["labels"] == SEP).any() and not (batch["labels"] == CLS).any()


def test_left_padding():
    processor = tiny.processor()
    processor.tokenizer.padding_side = "left"
    rows = [WITHOUT_MISMATCH | {"caption": "a dog"}, WITHOUT_MISMATCH | {"row_index": 1}]
    batch = collator(processor=processor, mlm_probability=1.0)(rows)
    assert batch["input_ids"][0].tolist() == [PAD, CLS, MASK, MASK, SEP]
    assert batch["labels"][0].tolist() == [-100, -100, A, DOG, -100]


def test_whole_words_are_masked_whole():
    tokenizer = scene_tokenizer()
    processor = UnicoderVLProcessor(UnicoderVLFeatureExtractor(), tokenizer)
    caption = "a tree and circles on grass"  # tree = t ##r ##e ##e, circles = circle ##s
    pieces = tokenizer.tokenize(caption)
    word_of_piece = [index for index, word in enumerate(caption.split()) for _ in tokenizer.tokenize(word)]
    assert pieces[1:5] == ["t", "##r", "##e", "##e"] and word_of_piece == [0, 1, 1, 1, 1, 2, 3, 3, 4, 5]
    rows = rows_of(2000, caption=caption)
    for whole in (False, True):
        made = collator(MANY, processor=processor, whole_word_mask=whole, mlm_probability=0.3)
        chosen = made(rows)["labels"][:, 1:-1] != -100
        together = chosen[:, [1, 6]] == chosen[:, [2, 7]]
        assert bool(together.all()) is whole
        assert chosen.any(dim=1).all()
        if whole:
            assert torch.equal(chosen[:, 1], chosen[:, 4])
            share = chosen[:, [0, 1, 5, 6, 8, 9]].float().mean().item()  # of the words, not of the pieces
            assert within(share, 0.3 + 0.7**6 / 6, 4000 * 6)


def test_all_regions_without_a_class_leave_no_target():
    batch = collator({"dogs": record("dogs", [-1, -1])})([WITHOUT_MISMATCH])
    assert (batch["region_labels"] == -100).all()
    assert (batch["region_features"] != 0).all()


# A pure function of (seed, epoch, row)


@pytest.fixture(scope="module")
def pairs():
    captions = [f"{a} {b} {c}" for a in ("a", "the") for b in ("dog", "cat") for c in ("runs", "sleeps", "runs .")]
    images = [f"image {index}" for index in range(len(captions))]
    rows = datasets.Dataset.from_dict({"image_id": images, "caption": captions})
    return PairsWithMismatches(rows, seed=4)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("collators") / "store"
    with RegionStoreWriter(folder) as writer:
        for index in range(12):
            writer.write(record(f"image {index}", [0, 1, 2, 3, 4][: 2 + index % 4]))
    return RegionStore(folder)


def test_batch_order_and_neighbours_change_no_mask(pairs, store):
    made = collator(store, seed=1)
    together = made([pairs[row] for row in range(12)])
    reverse = made([pairs[row] for row in reversed(range(12))])
    for row in range(12):
        alone = made([pairs[row]])
        for name in ("input_ids", "labels", "region_features", "region_labels"):
            for slot in range(2):
                expected = alone[name][slot]
                size = len(expected)
                assert torch.equal(together[name][slot * 12 + row][:size], expected), (name, row)
                assert torch.equal(reverse[name][slot * 12 + 11 - row][:size], expected), (name, row)


def test_seed_epoch_and_row_each_change_the_masks():
    made, other = collator(MANY, seed=1), collator(MANY, seed=2)
    rows = rows_of(200)
    first = made(rows)
    later = made([row | {"epoch": 1} for row in rows])
    shifted = made([row | {"row_index": row["row_index"] + 1} for row in rows])
    for name in ("labels", "region_labels"):
        for batch in (later, other(rows), shifted):
            same = (batch[name] == first[name]).all(dim=1).float().mean()
            assert same < 0.5, name
        # The next row's masks, not new ones.
        assert torch.equal(shifted[name][:199], first[name][1:200])
    assert_equal(first, made(rows))


@pytest.mark.parametrize("num_workers, method", [(1, "fork"), (2, "fork"), (1, "forkserver")])
def test_workers_change_no_batch(pairs, store, num_workers, method):
    def batches(**options):
        loader = DataLoader(pairs, batch_size=5, collate_fn=collator(store, seed=1), **options)
        epochs = []
        for epoch in range(2):
            pairs.set_epoch(epoch)
            epochs.append(list(loader))
        pairs.set_epoch(0)
        return epochs

    expected = batches()
    found = batches(num_workers=num_workers, multiprocessing_context=method, persistent_workers=True)
    for epoch in range(2):
        assert len(expected[epoch]) == len(found[epoch]) == 3
        for batch, other in zip(expected[epoch], found[epoch], strict=True):
            assert_equal(batch, other)
    assert not torch.equal(expected[0][0]["labels"], expected[1][0]["labels"])


def test_global_generators_play_no_part_and_are_left_alone(pairs, store):
    made = collator(store)
    rows = [pairs[row] for row in range(12)]
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    first = made(rows)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()  # noqa: NPY002
    torch.manual_seed(1)
    assert_equal(first, made(rows))


def test_records_are_never_modified(pairs, store):
    made = collator(store, mlm_probability=1.0, moc_probability=1.0, region_zero_prob=1.0)
    rows = [pairs[row] for row in range(12)]
    before = {image_id: store[image_id].features.copy() for image_id in store}
    assert_equal(made(rows), made(rows))
    for image_id, features in before.items():
        assert np.array_equal(store[image_id].features, features)
    in_memory = {"dogs": record("dogs", [3, 1])}
    collator(in_memory, moc_probability=1.0, region_zero_prob=1.0)([WITHOUT_MISMATCH])
    assert in_memory["dogs"].features[:, 0].tolist() == [1.0, 2.0]
    assert in_memory["dogs"].object_ids.tolist() == [3, 1]


def test_half_precision_regions_stay_half(pairs, store):
    assert store["image 0"].features.dtype == np.float16
    batch = collator(store, moc_probability=1.0, region_zero_prob=1.0)([pairs[0]])
    assert batch["region_features"].dtype == torch.float16
    assert not batch["region_features"].any()
    assert batch["region_locations"].dtype == torch.float32
    outputs = tiny.model(UnicoderVLForPreTraining)(**batch)  # float16 regions meet float32 weights
    assert outputs.loss.isfinite()


def test_a_batch_is_what_the_model_takes():
    model = tiny.model(UnicoderVLForPreTraining)
    outputs = model(**collator()([ROW]))
    parts = outputs.mlm_loss, outputs.moc_loss, outputs.matching_loss
    assert all(part > 0 for part in parts)
    assert outputs.loss.item() == pytest.approx(sum(part.item() for part in parts), rel=1e-6)


def test_a_tokenizer_that_leaves_out_token_types():
    processor = tiny.processor()
    processor.tokenizer.model_input_names = ["input_ids", "attention_mask"]
    assert list(collator(processor=processor)([ROW])) == NAMES


# Errors


def test_empty_captions():
    for caption in ("", "  \n"):
        with pytest.raises(ValueError, match=r"Image 'dogs': its caption '.*' has no word"):
            collator()([WITHOUT_MISMATCH | {"caption": caption}])
    with pytest.raises(ValueError, match="Image 'dogs': '', the caption of another that is its mismatch, has no word"):
        collator()([ROW | {"mismatch_caption": ""}])
    with pytest.raises(ValueError, match=r"Image 'dogs'.*no token"):  # a zero-width space
        collator()([WITHOUT_MISMATCH | {"caption": "​"}])
    with pytest.raises(ValueError, match=r"Image 'dogs'.*no token"):
        collator(max_length=2)([WITHOUT_MISMATCH])


def test_a_mismatch_without_a_token_blames_the_image_whose_caption_it_is():
    blank = chr(0x200B)
    own = ROW | {"image_id": "dogs", "caption": blank, "mismatch_image_id": "cats", "mismatch_caption": blank}
    others = ROW | {"image_id": "dogs", "caption": "a dog", "mismatch_image_id": "dogs", "mismatch_caption": blank}
    with pytest.raises(ValueError, match=r"Image 'dogs': its caption '.u200b' has no token"):
        collator()([own])
    with pytest.raises(
        ValueError, match=r"Image 'dogs': '.u200b', the caption of another that is its mismatch, has no"
    ):
        collator()([others])


def test_unknown_image(store):
    for made in (collator(), collator(store)):
        with pytest.raises(KeyError, match="elephants"):
            made([WITHOUT_MISMATCH | {"image_id": "elephants"}])


def test_class_out_of_range():
    with pytest.raises(ValueError, match=r"Image 'cats': object_ids holds 4, expected at most 3.*another detector"):
        collator(num_region_classes=4)([ROW])
    # Only what the model sees counts, and nothing where nothing is predicted.
    collator(num_region_classes=4, moc_probability=0.0)([ROW])
    collator(num_region_classes=None)([ROW])


def test_store_without_classes():
    bare = {"dogs": dataclasses.replace(STORE["dogs"], object_ids=None)}
    with pytest.raises(ValueError, match=r"Image 'dogs': object_ids is None.*moc_probability=0, --no-moc"):
        collator(bare)([WITHOUT_MISMATCH])
    batch = collator(bare, moc_probability=0.0)([WITHOUT_MISMATCH])
    assert batch["region_labels"].tolist() == [[-100, -100]]


def test_feature_width_that_differs_between_images():
    odd = STORE | {"cats": tiny.record("cats")}
    odd["cats"] = dataclasses.replace(odd["cats"], features=np.ones((3, 4), np.float32), object_ids=np.zeros(3, int))
    with pytest.raises(ValueError, match="'cats': features have width 4, expected 6"):
        collator(odd)([ROW])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mlm_probability": 1.5}, "mlm_probability=1.5"),
        ({"moc_probability": -0.1}, "moc_probability=-0.1"),
        ({"region_zero_prob": 2}, "region_zero_prob=2"),
        ({"mlm_probability": float("nan")}, "mlm_probability=nan"),
        ({"mask_replace_prob": 0.8, "random_replace_prob": 0.3}, "together at most 1"),
        ({"random_replace_prob": 0.1}, "together at most 1"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        collator(**options)


def test_tokenizer_without_mask_token():
    processor = UnicoderVLProcessor(
        UnicoderVLFeatureExtractor(), BertTokenizer(vocab={word: index for index, word in enumerate(tiny.WORDS)})
    )
    processor.tokenizer.mask_token = None
    with pytest.raises(ValueError, match="no mask token"):
        collator(processor=processor)
    collator(processor=processor, mlm_probability=0.0)([ROW])
