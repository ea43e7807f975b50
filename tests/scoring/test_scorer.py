"""The scorer: what it computes is what each pair alone gives, however the job is cut, shared, ordered or killed."""

import dataclasses
import json
import multiprocessing
import os
import pickle
import random
import re
import socket
import subprocess
import sys
import time
import tracemalloc
import weakref
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import scoring_process
import tiny
import torch
from scoring_process import CAPTIONS, IMAGES, STORE

from unicoder_vl_hf import (
    ImageTextScorer,
    RegionStore,
    RegionStoreWriter,
    UnicoderVLForImageTextRetrieval,
    UnicoderVLForPreTraining,
    UnicoderVLModel,
    UnicoderVLProcessor,
)
from unicoder_vl_hf.modeling_unicoder_vl import PackedSequences
from unicoder_vl_hf.processes import start_processes
from unicoder_vl_hf.regions.shards import Shard
from unicoder_vl_hf.regions.store import manifest_checksum
from unicoder_vl_hf.scoring import packed, scorer as scoring
from unicoder_vl_hf.scoring.blocks import BlockFolder, read_blocks
from unicoder_vl_hf.scoring.checkpoints import former_scoring_digest, scoring_settings
from unicoder_vl_hf.scoring.packed import PairEncoder, Rows, pair_flops, rows_of_pairs, split_by_tokens
from unicoder_vl_hf.scoring.scorer import distinct


@pytest.fixture(scope="module")
def model():
    return tiny.model(UnicoderVLForImageTextRetrieval)


@pytest.fixture(scope="module")
def expected(model):
    return each_pair_alone(model)


def each_pair_alone(model) -> np.ndarray:
    """Each pair alone, without anything of the packed path."""
    processor = tiny.processor()
    with torch.no_grad():
        scores = np.array(
            [
                [model(**processor(text=c, regions=STORE[i], return_tensors="pt")).scores.item() for i in IMAGES]
                for c in CAPTIONS
            ]
        )
    assert np.ptp(scores) > 0.5  # far more than the tolerance
    return scores


def scorer(model, **arguments) -> ImageTextScorer:
    return ImageTextScorer(model, tiny.processor(), STORE, **{"verbose": False} | arguments)


def assert_close(found, expected, tolerance=1e-5):
    assert found.dtype == np.float32 and found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


# The packed path of the model

GROUPS = [(2, 3), (1, 5), (3, 1), (2, 7)]  # number and length of sequences


def packed_states():
    torch.manual_seed(0)
    return torch.randn(sum(count * length for count, length in GROUPS), 16)


def first_rows_one_by_one(bert, states):
    lengths = [length for count, length in GROUPS for _ in range(count)]
    return torch.stack([bert.encoder(part[None], None)[0, 0] for part in states.split(lengths)])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_sequences_do_not_see_each_other(implementation):
    bert = tiny.model(UnicoderVLModel)
    bert.set_attn_implementation(implementation)
    states = packed_states().requires_grad_()
    found, wanted = bert.encode_packed(states, GROUPS)[0], first_rows_one_by_one(bert, states)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    weights = torch.randn_like(found)
    (gradient,) = torch.autograd.grad((found * weights).sum(), states)
    (wanted_gradient,) = torch.autograd.grad((wanted * weights).sum(), states)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=0, atol=1e-5)


def test_flash_attention_is_told_the_borders():
    sequences = PackedSequences([(2, 3), (1, 5)], torch.device("cpu"), "flash_attention_2")
    every, first = sequences.attention_kwargs(), sequences.attention_kwargs(first_only=True)
    assert every["cu_seq_lens_q"].tolist() == every["cu_seq_lens_k"].tolist() == [0, 3, 6, 11]
    assert every["cu_seq_lens_q"].dtype == first["cu_seq_lens_q"].dtype == torch.int32
    assert every["max_length_q"] == every["max_length_k"] == first["max_length_k"] == 5
    assert first["cu_seq_lens_q"].tolist() == [0, 1, 2, 3] and first["max_length_q"] == 1
    assert first["cu_seq_lens_k"].tolist() == [0, 3, 6, 11]
    assert "attention_mask" not in {*every, *first}  # which would win


def varlen_attention(module, query, key, value, attention_mask, *, cu_seq_lens_q, cu_seq_lens_k, scaling, **kwargs):
    """What FlashAttention computes of these arguments, sequence by sequence."""
    assert attention_mask is None
    outputs = []
    for (q0, q1), (k0, k1) in zip(pairwise(cu_seq_lens_q), pairwise(cu_seq_lens_k), strict=True):
        weights = (query[:, :, q0:q1] @ key[:, :, k0:k1].transpose(2, 3) * scaling).softmax(-1)
        outputs.append((weights @ value[:, :, k0:k1]).transpose(1, 2))
    return torch.cat(outputs, dim=1), None


def test_packed_path_of_flash_attention(monkeypatch):
    bert = tiny.model(UnicoderVLModel)
    wanted = first_rows_one_by_one(bert, packed_states())
    monkeypatch.setattr(bert.config, "_attn_implementation_internal", "flash_attention_2")
    attention = "unicoder_vl_hf.modeling_unicoder_vl.ALL_ATTENTION_FUNCTIONS.get_interface"
    monkeypatch.setattr(attention, lambda *arguments: varlen_attention)
    torch.testing.assert_close(bert.encode_packed(packed_states(), GROUPS)[0], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("first_only", [False, True])
def test_block_mask_of_flex_attention(first_only):
    sequences = PackedSequences([(2, 3), (1, 4)], torch.device("cpu"), "flex_attention")
    mask = sequences.attention_kwargs(first_only)["attention_mask"]
    queries = [0, 1, 2] if first_only else [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    keys = [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    found = [
        [bool(mask.mask_mod(0, 0, torch.tensor(q), torch.tensor(k))) for k in range(10)] for q in range(len(queries))
    ]
    assert found == [[query == key for key in keys] for query in queries]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlashAttention and flex attention need a GPU here")
@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_packed_path_on_a_gpu(implementation):
    if implementation == "flash_attention_2":
        pytest.importorskip("flash_attn")
    bert = tiny.model(UnicoderVLModel).cuda().to(torch.bfloat16)
    states = packed_states().cuda().to(torch.bfloat16)
    wanted = first_rows_one_by_one(bert, states)
    bert.set_attn_implementation(implementation)
    torch.testing.assert_close(bert.encode_packed(states, GROUPS)[0], wanted, rtol=0, atol=0.05)


# Packing pairs


def test_rows_of_pairs_by_hand():
    captions = Rows.of(torch.zeros(5, 1), [2, 3])  # rows 0 1 | 2 3 4
    images = Rows.of(torch.zeros(4, 1), [3, 1])  # rows 5 6 7 | 8
    rows = rows_of_pairs(captions, images, np.array([1, 0, 1]), np.array([1, 0, 0]))
    assert rows.tolist() == [2, 3, 4, 8, 0, 1, 5, 6, 7, 2, 3, 4, 5, 6, 7]


def test_regions_follow_each_caption_wherever_it_ends(model, expected):
    """Known mistake: image slots gathered with the length of the LAST text instead of each; regions are lost."""
    by_length = sorted(range(len(CAPTIONS)), key=lambda index: -len(CAPTIONS[index].split()))
    captions = [CAPTIONS[index] for index in by_length]  # the last text is the shortest
    found = scorer(model, block_pairs=10**6, max_tokens=10**6).score(captions, IMAGES)
    assert_close(found, expected[by_length])
    inputs = tiny.processor()(text=captions, regions=[STORE[IMAGES[0]]] * len(captions), return_tensors="pt")
    with torch.no_grad():
        assert_close(model(**inputs).scores.numpy(), expected[by_length, 0])  # the padded path
    longest, image = by_length[0], max(IMAGES, key=lambda name: len(STORE[name]))
    record = STORE[image]
    for lost in range(len(record)):  # each region matters to the score of the longest caption
        features = record.features.copy()
        features[lost] *= -3
        changed = dataclasses.replace(record, features=features)
        (score,) = scorer(model).score([CAPTIONS[longest]], [changed])[0]
        assert abs(score - expected[longest, IMAGES.index(image)]) > 1e-4, lost


def test_split_by_tokens():
    parts = list(split_by_tokens(np.array([5, 3, 4, 0, 1]), np.array([2, 2, 3, 4, 9]), max_tokens=5))
    assert [part.tolist() for part in parts] == [[5, 3, 4], [0], [1]]  # these begin at 0 2 4 | 7 | 11
    assert len(list(split_by_tokens(np.arange(100), np.full(100, 7), max_tokens=1))) == 100


def test_flops_by_hand():
    config = tiny.config(hidden_size=2, num_attention_heads=1, intermediate_size=3, num_hidden_layers=2)
    # One layer of 5 tokens: q, k, v, out 4 x (5 x 2 x 2), feed-forward 2 x (5 x 2 x 3), attention 2 x (5 x 5 x 2), all
    # doubled. The last: k and v of 5 tokens; q, out and feed-forward of one; attention of one query.
    layer = 2 * (4 * 20 + 2 * 30 + 2 * 50)
    last = 2 * (2 * 20 + 2 * 4 + 2 * 6 + 2 * 10)
    assert pair_flops(config, np.array([5])).tolist() == [layer + last]


# Scores


@pytest.mark.parametrize("block_pairs", [1, 4, 7, 20, 1024])
@pytest.mark.parametrize("max_tokens", [1, 25, 2048])
def test_scores_equal_each_pair_alone(model, expected, block_pairs, max_tokens):
    assert_close(scorer(model, block_pairs=block_pairs, max_tokens=max_tokens).score(CAPTIONS, IMAGES), expected)


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("model_class", [UnicoderVLForImageTextRetrieval, UnicoderVLForPreTraining])
def test_linear_layers_by_onednn_or_not(model_class, onednn, expected, model, monkeypatch):
    other = tiny.model(model_class)
    other.load_state_dict(model.state_dict(), strict=False)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", onednn, raising=False)
    encoder = PairEncoder(other, None, 100)
    kinds = {type(module) for module in encoder.bert.encoder.modules()}
    assert (packed.OneDNNLinear in kinds) == onednn
    assert any(issubclass(kind, torch.nn.Linear) for kind in kinds) == (not onednn)
    assert_close(scorer(other).score(CAPTIONS, IMAGES), expected)


def changed_in_place(model):
    model.bert.encoder.layer[0].output.dense.weight.mul_(2)


def changed_by_data(model):
    weight = model.bert.encoder.layer[1].attention.self.query.weight
    weight.data = weight.data.flip(0)


def changed_in_place_by_data(model):
    model.bert.encoder.layer[1].attention.self.value.bias.data[3] += 1


def loaded(model):
    model.load_state_dict(tiny.model(type(model), seed=5).state_dict())


def assigned(model):
    model.load_state_dict(tiny.model(type(model), seed=5).state_dict(), assign=True)


def trained(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with torch.enable_grad():
        model(
            **tiny.processor()(text=CAPTIONS[:1], regions=STORE[IMAGES[0]], return_tensors="pt")
        ).scores.sum().backward()
    optimizer.step()


def cast(model):
    model.bfloat16()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(
    "change", [changed_in_place, changed_by_data, changed_in_place_by_data, loaded, assigned, trained, cast]
)
def test_the_encoder_is_made_anew_when_a_weight_has_changed(change, dtype):
    model = tiny.model(UnicoderVLForImageTextRetrieval)
    kept = scorer(model, dtype=dtype)
    before = kept.score(CAPTIONS, IMAGES)
    encoder = kept._encoder()
    np.testing.assert_array_equal(kept.score(CAPTIONS, IMAGES), before)
    assert kept._encoder() is encoder
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(kept)).score(CAPTIONS, IMAGES), before)
    with torch.no_grad():
        change(model)
    after = kept.score(CAPTIONS, IMAGES)
    assert np.abs(after - before).max() > 1e-3
    np.testing.assert_array_equal(after, scorer(model, dtype=dtype).score(CAPTIONS, IMAGES))


def test_a_frozen_scorer_looks_at_its_weights_no_more(model, expected, monkeypatch):
    frozen = scorer(model).freeze()
    with monkeypatch.context() as patched:
        patched.setattr(scoring, "fingerprint", lambda model: pytest.fail("the weights were looked at"))
        assert_close(frozen.score(CAPTIONS, IMAGES), expected)
    assert_close(pickle.loads(pickle.dumps(frozen)).score(CAPTIONS, IMAGES), expected)


def test_a_model_whose_state_is_not_all_in_its_weights_has_no_encoder_kept(model):
    class Switched(torch.nn.LayerNorm):
        """Stands for a module of another library, such as an adapter that can be turned off."""

    other = scorer(tiny.model(UnicoderVLForImageTextRetrieval))
    assert other._encoder() is other._encoder()
    hook = other.model.bert.encoder.layer[0].register_forward_hook(lambda *_: None)
    assert other._encoder() is not other._encoder()
    hook.remove()
    other.model.bert.encoder.layer[0].output.LayerNorm = Switched(other.model.config.hidden_size)
    assert other._encoder() is not other._encoder()


@pytest.mark.parametrize("num_hidden_layers", [1, 2, 3])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("pairs", [1, 30])  # of the same captions and images: shared, their rows are projected once
def test_first_and_last_layer_are_computed_once_and_for_cls_alone(num_hidden_layers, implementation, pairs):
    model = tiny.model(UnicoderVLForImageTextRetrieval, num_hidden_layers=num_hidden_layers)
    model.set_attn_implementation(implementation)
    for weight in model.bert.encoder.parameters():  # biases, too, which are new, and zero
        weight.data += 0.1 * torch.randn(weight.shape)
    kept = scorer(model)
    *layers, last = kept._encoder().bert.encoder.layer
    assert type(last.attention.self) is packed.FirstTokenAttention
    keys, calls = [layer.attention.self.key for layer in layers[:1]], []
    for key in keys:
        key.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    index = np.zeros(pairs, dtype=int)
    found = kept.score_pairs(CAPTIONS[:1], IMAGES[:1], index, index)
    with torch.no_grad():
        inputs = tiny.processor()(text=CAPTIONS[:1], regions=STORE[IMAGES[0]], return_tensors="pt")
        assert_close(found, np.full(pairs, model(**inputs).scores.item(), dtype=np.float32))
    length = inputs["input_ids"].shape[1] + inputs["region_features"].shape[1]
    assert calls == [length if pairs > 1 else 1] * len(keys)  # rows, or one batch of a single sequence


def test_order_of_captions_and_images(model, expected):
    rng = np.random.default_rng(1)
    rows, columns = rng.permutation(len(CAPTIONS)), rng.permutation(len(IMAGES))
    found = scorer(model, block_pairs=6).score([CAPTIONS[row] for row in rows], [IMAGES[column] for column in columns])
    assert_close(found, expected[np.ix_(rows, columns)])


def test_chosen_pairs(model, expected):
    rng = np.random.default_rng(2)
    captions, images = rng.integers(0, len(CAPTIONS), 40), rng.integers(0, len(IMAGES), 40)  # some of them twice
    for block_pairs in (1, 6, 1024):
        found = scorer(model, block_pairs=block_pairs).score_pairs(CAPTIONS, IMAGES, captions, images)
        assert_close(found, expected[captions, images])
    assert scorer(model).score_pairs(CAPTIONS, IMAGES, np.array([], dtype=int), np.array([], dtype=int)).shape == (0,)


def test_ranks(model, expected):
    best = np.argsort(-expected[3])[:4]
    found = scorer(model).rank(CAPTIONS[3], [STORE[image] for image in IMAGES], top_k=4)
    assert [image for image, _ in found] == [IMAGES[place] for place in best]
    np.testing.assert_allclose([score for _, score in found], expected[3][best], atol=1e-5)
    best = np.argsort(-expected[:, 2])
    found = scorer(model).rank_captions(IMAGES[2], CAPTIONS, top_k=100)
    assert [caption for caption, _ in found] == [CAPTIONS[place] for place in best]
    assert scorer(model).rank("a dog", ["image 1"] * 3, top_k=2)[0][0] == "image 1"


def test_scores_by_a_similarity_of_states_too():
    model = tiny.model(UnicoderVLForImageTextRetrieval, projection_dim=8, matching_head="similarity")
    expected = each_pair_alone(model)
    assert_close(scorer(model).score(CAPTIONS, IMAGES), expected)
    assert_close(scorer(model, max_tokens=20, block_pairs=5).score(CAPTIONS, IMAGES), expected)
    model.config.matching_head = "unicoder_vl"
    assert np.abs(scorer(model).score(CAPTIONS, IMAGES) - expected).max() > 0.5


def test_bfloat16_on_request(model, expected, monkeypatch):
    first, encode = [], UnicoderVLModel.encode_packed
    monkeypatch.setattr(UnicoderVLModel, "encode_packed", lambda *a, **k: (first.append(encode(*a, **k)), first[-1])[1])
    single = scorer(model, dtype=torch.bfloat16).score(CAPTIONS, IMAGES)
    assert_close(single, expected, tolerance=0.2)
    assert np.abs(single - expected).max() > 1e-4
    assert model.dtype == torch.float32
    # Pooler and head compute in float32, where bfloat16 would tie scores.
    assert [states.dtype for states, _ in first] == [torch.bfloat16]
    with torch.no_grad():
        logits = model.matching_head(model.bert.pooler(first[0][0].float()[:, None]))
    wanted = (logits[:, 1] - logits[:, 0]).numpy()
    np.testing.assert_allclose(np.sort(single.ravel()), np.sort(wanted), rtol=0, atol=1e-6)


def test_autocast_around_does_not_change_scores(model, expected):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(scorer(model).score(CAPTIONS, IMAGES), expected)


def test_each_item_is_embedded_once(model, monkeypatch):
    captions, images = [], []
    embed_captions, embed_images = PairEncoder.embed_captions, PairEncoder.embed_images

    def counting_captions(self, token_ids):
        captions.extend(map(tuple, token_ids))
        return embed_captions(self, token_ids)

    def counting_images(self, records, extractor):
        records = list(records)
        images.extend(record.image_id for record in records)
        return embed_images(self, records, extractor)

    monkeypatch.setattr(PairEncoder, "embed_captions", counting_captions)
    monkeypatch.setattr(PairEncoder, "embed_images", counting_images)
    scorer(model).score(CAPTIONS, IMAGES)
    assert len(captions) == len(CAPTIONS) and sorted(images) == sorted(IMAGES)
    captions.clear(), images.clear()
    scorer(model, block_pairs=9).score(CAPTIONS, IMAGES)  # 3 x 3 blocks
    assert sorted(images) == sorted(IMAGES)  # blocks of the same images follow each other


def test_memory_holds_the_regions_of_a_block_only(model):
    alive, most = set(), 0

    class Watched(dict):
        def __getitem__(self, image_id):
            nonlocal most
            record = dataclasses.replace(STORE[image_id])
            alive.add(id(record))
            most = max(most, len(alive))
            weakref.finalize(record, alive.discard, id(record))
            return record

    ImageTextScorer(model, tiny.processor(), Watched(STORE), block_pairs=4, verbose=False).score(CAPTIONS, IMAGES)
    assert most <= 3  # 2 x 2 pairs, and the record that is coming


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"captions": []}, "at least one caption"),
        ({"captions": ["a", " "]}, r"text\[1\] is ' '"),
        ({"captions": ["a", "\u200b"]}, r"makes no token of the caption '.u200b'"),
        ({"max_length": 2}, "max_length=2; expected at least 3"),
        ({"images": []}, "at least one image"),
        ({"max_length": 100, "captions": ["a " * 90]}, "92 tokens, the model 64 positions"),
    ],
)
def test_what_is_refused(model, change, message):
    with pytest.raises(ValueError, match=message):
        scorer(model).score(**{"captions": CAPTIONS, "images": IMAGES, **change})


def test_one_caption_or_image_is_no_list(model):
    """Its letters, which are texts and might be ids, are not scored."""
    letters = {letter: tiny.record(letter) for letter in "cat"}
    several = ImageTextScorer(model, tiny.processor(), letters, verbose=False)
    calls = [
        lambda captions, images: several.score(captions, images),
        lambda captions, images: several.score_pairs(captions, images, [0], [0]),
        lambda captions, images: several.plan(captions, images),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"captions is 'cat', expected several: give a list, \['cat'\]"):
            call("cat", list(letters))
        with pytest.raises(ValueError, match=r"images is 'cat', expected several: give a list, \['cat'\]"):
            call(["a dog"], "cat")
        with pytest.raises(ValueError, match=r"images is the record of image 'c'.*\[record\]"):
            call(["a dog"], letters["c"])
    for images in ("cat", letters["c"]):
        with pytest.raises(ValueError, match=r"images is .*give a list"):
            several.rank("a dog", images)
    with pytest.raises(ValueError, match="captions is 'cat'"):
        several.rank_captions("c", "cat")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_said_and_not_kept(value, tmp_path):
    """Of a training that diverged, say: they would be ranked, mined by, and calibrated."""
    diverged = tiny.model(UnicoderVLForImageTextRetrieval)
    word = tiny.processor().tokenizer(CAPTIONS[2])["input_ids"][1]
    with torch.no_grad():
        diverged.bert.embeddings.word_embeddings.weight[word] = value
    with pytest.raises(ValueError, match=r"The score of image 'image \d' with .* is (nan|inf): the weights"):
        scorer(diverged).score(CAPTIONS, IMAGES, output_dir=tmp_path)
    assert not (tmp_path / "scores.npy").exists()


def test_the_store_of_the_processor_is_that_of_the_scorer(model, expected):
    processor = tiny.processor()
    without = ImageTextScorer(model, processor, verbose=False)
    assert without.store is None
    processor.set_store(STORE)
    assert without.store is STORE
    assert_close(without.score(CAPTIONS, IMAGES), expected)
    without.store = {}
    with pytest.raises(KeyError):
        without.score(CAPTIONS, IMAGES)


def test_a_long_caption_among_many_takes_no_memory():
    names = [str(number) for number in range(5000)] * 2
    tracemalloc.start()
    found, places = distinct([*names, "word " * 20_000])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [*names[:5000], "word " * 20_000] and peak < 2**23
    assert places.tolist() == [*range(5000), *range(5000), 5000]


def test_what_else_is_refused(model):
    for top_k in (0, -1):
        with pytest.raises(ValueError, match=f"top_k={top_k}; expected at least 1"):
            scorer(model).rank("a dog", IMAGES, top_k=top_k)
        with pytest.raises(ValueError, match=f"top_k={top_k}; expected at least 1"):
            scorer(model).rank_captions(IMAGES[0], CAPTIONS, top_k=top_k)
    with pytest.raises(KeyError):
        scorer(model).score(CAPTIONS, ["image 99"])
    for wrong in ([9], [-1], [0.5], [[0]]):
        with pytest.raises(
            ValueError, match=r"caption_index .*expected integers of shape \(pairs,\), each in \[0, 9\)"
        ):
            scorer(model).score_pairs(CAPTIONS, IMAGES, wrong, [0])
    with pytest.raises(ValueError, match="one of each for every pair"):
        scorer(model).score_pairs(CAPTIONS, IMAGES, [0, 1], [0])
    with pytest.raises(ValueError, match="block_pairs=0"):
        scorer(model, block_pairs=0)
    wide = dataclasses.replace(tiny.record("wide"), features=np.zeros((3, 7), dtype=np.float32))
    with pytest.raises(ValueError, match="'wide': features have width 7, expected the model's region_feature_dim=6"):
        scorer(model).score(CAPTIONS, [wide])


# Plan and progress


def test_plan(model, capfd):
    plan = scorer(model, block_pairs=8).plan(CAPTIONS, IMAGES)
    lengths = np.add.outer([len(caption.split()) + 2 for caption in CAPTIONS], [len(STORE[image]) for image in IMAGES])
    assert plan.flops == pytest.approx(pair_flops(model.config, lengths).sum())
    assert (plan.num_pairs, plan.num_done, plan.num_processes) == (63, 0, 1)
    two = dataclasses.replace(plan, flops=3e12, flops_per_second=1e8, num_processes=2, num_done=5)
    assert two.seconds == 15_000
    assert str(two) == (
        "Scoring 9 captions x 7 images: 63 pairs, 5 of them done before, 3.00TFLOP in float32 on cpu. At the measured "
        "100MFLOP/s on each of 2 processes: about 4 h 10 min."
    )
    capfd.readouterr()
    scorer(model, verbose=True).score(CAPTIONS, IMAGES)  # as fast as its plan
    shown = "".join(capfd.readouterr())
    assert "9 captions" not in shown and "100%" in shown
    scorer(model, verbose=True, max_tokens=int(lengths.sum()) // 50).score(CAPTIONS, IMAGES)
    shown = "".join(capfd.readouterr())
    assert "9 captions x 7 images: 63 pairs" in shown and re.search(r"about \d+ s", shown) and "100%" in shown
    scorer(model).score(CAPTIONS, IMAGES)
    assert "".join(capfd.readouterr()) == ""


# Blocks on disk


class Killed(Exception):
    pass


@contextmanager
def killed_after(blocks):
    write, left = BlockFolder.write, [blocks]

    def dying(self, *arguments):
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        write(self, *arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(BlockFolder, "write", dying)
        yield


def counted_blocks(monkeypatch):
    """The blocks that are computed and written from now on."""
    computed, write = [], BlockFolder.write
    monkeypatch.setattr(BlockFolder, "write", lambda self, block, v: (computed.append(block), write(self, block, v)))
    return computed


def test_folder_gives_what_memory_gives(model, tmp_path):
    in_memory = scorer(model, block_pairs=8).score(CAPTIONS, IMAGES)
    on_disk = scorer(model, block_pairs=8).score(CAPTIONS, IMAGES, output_dir=tmp_path / "scores")
    assert np.array_equal(in_memory, on_disk)
    assert isinstance(on_disk, np.memmap)
    assert sorted(path.name for path in (tmp_path / "scores").iterdir()) == ["job.json", "scores.npy"]
    assert np.array_equal(np.load(tmp_path / "scores" / "scores.npy"), in_memory)


def test_resumed_after_a_kill(model, tmp_path, monkeypatch):
    whole = scorer(model, block_pairs=8).score(CAPTIONS, IMAGES)
    with killed_after(5):
        scorer(model, block_pairs=8).score(CAPTIONS, IMAGES, output_dir=tmp_path)
    (file,) = tmp_path.glob("*.blocks")
    file.write_bytes(file.read_bytes()[:-3])  # the kill came while the fifth was written

    computed = counted_blocks(monkeypatch)
    resumed = scorer(model, block_pairs=8).score(CAPTIONS, IMAGES, output_dir=tmp_path)
    assert np.array_equal(resumed, whole)
    num_blocks = len(scoring._Grid(items(), 8))
    assert computed == list(range(4, num_blocks))
    computed.clear()
    assert np.array_equal(scorer(model, block_pairs=8).score(CAPTIONS, IMAGES, output_dir=tmp_path), whole)
    assert computed == []


def items(store=STORE, **options):
    return scoring._Items(tiny.processor(**options), store, CAPTIONS, IMAGES, 44)


# What is read and hashed


def write_store(path, records=STORE, **options):
    with RegionStoreWriter(path, dtype="float32", **options) as writer:
        for record in records.values():
            writer.write(record)
    return RegionStore(path)


@pytest.mark.parametrize("options", [{}, {"max_regions": 9}, {"min_regions": 1, "score_threshold": 0.5}])
def test_a_store_counts_the_regions_that_the_model_will_see(options, tmp_path):
    scores = np.random.default_rng(3)
    records = {
        image: dataclasses.replace(record, object_scores=scores.random(len(record), dtype=np.float32))
        for image, record in STORE.items()
    }
    store = write_store(tmp_path / "store", records, shard_size=400)
    assert len(store.shards) > 2
    extractor = tiny.processor(**options).feature_extractor
    wanted = [len(extractor.select(records[image])) for image in IMAGES]
    assert items(store, **options).num_regions.tolist() == wanted
    assert len(set(wanted)) > 1 and (not options or sum(wanted) < sum(map(len, STORE.values())))


def test_of_a_store_a_record_is_read_to_be_embedded_and_for_nothing_else(model, tmp_path, monkeypatch):
    store, read, record = write_store(tmp_path / "store"), [], Shard.record

    def reading(shard, row):
        read.append(shard.image_ids[row])
        return record(shard, row)

    monkeypatch.setattr(Shard, "record", reading)
    monkeypatch.setattr(scoring, "former_scoring_digest", lambda model: pytest.fail("no job of 9bccc44"))
    processor = tiny.processor()
    processor.set_store(store)  # the default serves as well as one that is given
    for given in (store, None):
        read.clear()
        made = ImageTextScorer(model, processor, given, verbose=False)
        scores = made.score(CAPTIONS, IMAGES, output_dir=tmp_path / f"scores-{given is None}")
        assert sorted(read) == sorted(IMAGES)
        assert np.array_equal(scores, scorer(model).score(CAPTIONS, IMAGES))
        job = json.loads((tmp_path / f"scores-{given is None}" / "job.json").read_text())
        assert job["store"] == manifest_checksum(store.manifest) and "regions" not in job
        read.clear()
        made.score(CAPTIONS, IMAGES, output_dir=tmp_path / f"scores-{given is None}")
        assert read == []  # nothing is left to embed
    changed = write_store(tmp_path / "changed", {**STORE, "image 3": tiny.record("image 3", num_regions=13)})
    with pytest.raises(ValueError, match=r"of another job: store was '[0-9a-f]{64}', is '[0-9a-f]{64}'\."):
        ImageTextScorer(model, processor, changed).score(CAPTIONS, IMAGES, output_dir=tmp_path / "scores-True")


def as_9bccc44_wrote(folder, model):
    """The job of a folder, told as that commit told it. test_golden.py has files that it wrote."""
    job = json.loads((folder / "job.json").read_text())
    for name in ("weights", "store", *scoring_settings(model.config)):
        job.pop(name, None)
    regions = items().digests(before={})["regions"]
    (folder / "job.json").write_text(json.dumps({"model": former_scoring_digest(model), "regions": regions} | job))


def test_a_job_begun_by_9bccc44_goes_on_with_its_model_and_regions_alone(model, tmp_path, monkeypatch):
    store, folder = write_store(tmp_path / "store"), tmp_path / "scores"
    options = {"block_pairs": 8, "verbose": False}
    with killed_after(5):
        ImageTextScorer(model, tiny.processor(), store, **options).score(CAPTIONS, IMAGES, output_dir=folder)
    as_9bccc44_wrote(folder, model)
    with pytest.raises(ValueError, match=r"another job: model was '[0-9a-f]{16}', is '[0-9a-f]{16}'"):
        other = tiny.model(UnicoderVLForImageTextRetrieval, 2)
        ImageTextScorer(other, tiny.processor(), store, **options).score(CAPTIONS, IMAGES, output_dir=folder)
    changed = write_store(tmp_path / "changed", {**STORE, "image 3": tiny.record("image 3", num_regions=13)})
    with pytest.raises(ValueError, match=r"another job: regions was '[0-9a-f]{16}', is '[0-9a-f]{16}'"):
        ImageTextScorer(model, tiny.processor(), changed, **options).score(CAPTIONS, IMAGES, output_dir=folder)
    computed = counted_blocks(monkeypatch)
    found = ImageTextScorer(model, tiny.processor(), store, **options).score(CAPTIONS, IMAGES, output_dir=folder)
    assert computed == list(range(5, len(scoring._Grid(items(), 8))))
    assert np.array_equal(found, scorer(model, block_pairs=8).score(CAPTIONS, IMAGES))


@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_blocks_gives_the_same_bits(model, tmp_path, monkeypatch, seed):
    whole = scorer(model, block_pairs=8).score(CAPTIONS, IMAGES)
    share = scoring._share
    monkeypatch.setattr(scoring, "_share", lambda *a: random.Random(seed).sample(share(*a), len(share(*a))))
    assert np.array_equal(scorer(model, block_pairs=8).score(CAPTIONS, IMAGES), whole)
    assert np.array_equal(scorer(model, block_pairs=8).score(CAPTIONS, IMAGES, output_dir=tmp_path), whole)


def test_damaged_blocks_are_computed_again(model, tmp_path):
    whole = scorer(model, block_pairs=8).score(CAPTIONS, IMAGES)
    with killed_after(6):
        scorer(model, block_pairs=8).score(CAPTIONS, IMAGES, output_dir=tmp_path)
    (file,) = tmp_path.glob("*.blocks")
    damaged = bytearray(file.read_bytes())
    damaged[40] ^= 1
    file.write_bytes(damaged)
    assert np.array_equal(scorer(model, block_pairs=8).score(CAPTIONS, IMAGES, output_dir=tmp_path), whole)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("weights", {"seed": 2}),
        ("num_attention_heads", {"heads": 1}),
        ("captions", {"captions": [*CAPTIONS[:-1], "a cat"]}),
        ("images", {"images": IMAGES[::-1]}),
        ("regions", {"store": {**STORE, "image 3": tiny.record("image 3", num_regions=13)}}),
        ("feature extractor", {"max_regions": 5}),
        ("dtype", {"dtype": torch.bfloat16}),
        ("block_pairs", {"block_pairs": 9}),
        ("max_tokens", {"max_tokens": 99}),
        ("pairs", {"pairs": ([0], [0])}),
    ],
)
@pytest.mark.parametrize("complete", [True, False])
def test_folder_of_another_job_is_refused(model, tmp_path, name, change, complete):
    def run(
        seed=1,
        heads=2,
        captions=CAPTIONS,
        images=IMAGES,
        store=STORE,
        pairs=None,
        max_regions=100,
        block_pairs=8,
        **options,
    ):
        other = tiny.model(UnicoderVLForImageTextRetrieval, seed, num_attention_heads=heads)
        made = ImageTextScorer(
            other, tiny.processor(max_regions=max_regions), store, block_pairs=block_pairs, verbose=False, **options
        )
        if pairs is not None:
            return made.score_pairs(captions, images, *pairs, output_dir=tmp_path)
        return made.score(captions, images, output_dir=tmp_path)

    if complete:
        run()
    else:
        with killed_after(2):
            run()
    before = sorted((path.name, path.read_bytes()) for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match=f"of another job: (.*; )?{name} was .*, is ") as error:
        run(**change)
    named = {part.split(" was ")[0] for part in str(error.value).split("another job: ")[1].split("; ")}
    assert named <= {name, "regions"}  # other images have other regions
    assert before == sorted((path.name, path.read_bytes()) for path in tmp_path.iterdir())


def test_foreign_folder_is_refused(model, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"holds \['thesis.tex'\] and no job.json"):
        scorer(model).score(CAPTIONS, IMAGES, output_dir=tmp_path)


def test_another_process_begins_the_job_right_after_we_looked(tmp_path, monkeypatch):
    job, exists = {"pairs": 3}, Path.exists

    def look(path):
        found = exists(path)
        if path.name == "job.json" and not found:
            path.write_text(json.dumps(job))
        return found

    monkeypatch.setattr(Path, "exists", look)
    assert BlockFolder(tmp_path, job, process=1).done == set()


# Two processes


def test_two_processes_killed_at_random(model, expected, tmp_path):
    """One of two is killed at a random moment, again and again, and both are started anew: the bits of one process."""
    folder, rng = tmp_path / "scores", random.Random(0)
    server = multiprocessing.get_context("forkserver")
    for victim in rng.sample(range(2), 2):
        goal, port = blocks_in(folder) + rng.randint(1, 8), free_port()
        pair = [server.Process(target=scoring_process.work, args=(folder, rank, port, 0.1)) for rank in range(2)]
        for process in pair:
            process.start()
        while blocks_in(folder) < goal:
            assert all(process.is_alive() for process in pair)
            time.sleep(0.02)
        time.sleep(rng.random() * 0.1)
        pair[victim].kill()
        pair[victim].join()
        assert not (folder / "scores.npy").exists()
        pair[1 - victim].terminate()  # as torchrun does
        pair[1 - victim].join()
    found = blocks_in(folder)
    assert 0 < found < 36

    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    command += [scoring_process.__file__, str(folder)]
    last = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert last.returncode == 0, last.stderr
    assert last.stdout.count("world size 2") == 2
    assert sum(map(int, re.findall(r"computed (\d+)", last.stdout))) == 36 - found
    assert sorted(re.findall(r"hashed (\d+)", last.stdout)) == ["0", "1"]  # records are hashed by one for all
    whole = np.load(folder / "scores.npy")
    assert_close(whole, expected)
    assert np.array_equal(whole, scorer(model, block_pairs=2).score(CAPTIONS, IMAGES))
    for rank in range(2):  # without a folder, every process gets all scores
        assert np.array_equal(np.load(tmp_path / f"scores-{rank}.npy"), whole)


def blocks_in(folder: Path) -> int:
    return sum(1 for path in folder.glob("*.blocks") for _ in read_blocks(path))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.parametrize("checkpoint", [UnicoderVLForImageTextRetrieval, UnicoderVLForPreTraining])
def test_a_scorer_from_a_checkpoint(checkpoint, tmp_path, caplog):
    """A store, its folder and any mapping give the same; the model's regions are compared with theirs."""
    saved = tiny.model(checkpoint)
    saved.save_pretrained(tmp_path / "model")
    tiny.processor(region_provenance={"detector": "pythia"}).save_pretrained(tmp_path / "model")
    with RegionStoreWriter(tmp_path / "store", dtype="float32", detector="vinvl") as writer:
        for record in STORE.values():
            writer.write(record)
    expected = ImageTextScorer(saved, tiny.processor(), STORE, verbose=False).score(CAPTIONS, IMAGES)
    folder, options = tmp_path / "store", {"device": "cpu", "verbose": False}
    for store in (folder, str(folder), RegionStore(folder), STORE):
        caplog.clear()
        scorer = ImageTextScorer.from_pretrained(tmp_path / "model", store, **options, block_pairs=7, max_tokens=300)
        assert (scorer.block_pairs, scorer.max_tokens, scorer.verbose) == (7, 300, False)
        assert scorer.model.device.type == "cpu" and not scorer.model.training
        assert ("'pythia' in training, 'vinvl' here" in caplog.text) == (store is not STORE)
        assert_close(scorer.score(CAPTIONS, IMAGES), expected)
    bare = ImageTextScorer.from_pretrained(str(tmp_path / "model"), verbose=False)
    assert_close(bare.score(CAPTIONS, [STORE[image] for image in IMAGES]), expected)
    assert next(bare.model.parameters()).device == start_processes().device


def test_a_scorer_from_what_is_none(tmp_path):
    tiny.model(UnicoderVLModel).save_pretrained(tmp_path / "headless")
    tiny.processor().save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match=r"headless .* its scores would be random"):
        ImageTextScorer.from_pretrained(tmp_path / "headless", STORE)
    with pytest.raises(TypeError, match=r"not '?list"):
        ImageTextScorer.from_pretrained(tmp_path / "headless", [*STORE.values()])
    with pytest.raises(FileNotFoundError, match="none is no region store"):
        ImageTextScorer.from_pretrained(tmp_path / "headless", tmp_path / "none")


def test_scorer_takes_three_lines(model):
    assert isinstance(tiny.processor(), UnicoderVLProcessor)
    ((image, score),) = ImageTextScorer(model, tiny.processor(), STORE).rank("a dog runs", IMAGES, top_k=1)
    assert image in STORE and isinstance(score, float)
