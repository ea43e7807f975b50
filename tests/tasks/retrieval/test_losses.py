"""The losses of groups: hand-worked examples, and a slow loop in values and gradients on groups of every shape."""

import functools
import math

import pytest
import tiny
import torch

from unicoder_vl_hf import UnicoderVLForImageTextRetrieval
from unicoder_vl_hf.modeling_unicoder_vl import (
    binary_matching_loss,
    group_softmax_loss,
    hardest_negative_triplet_loss,
    sum_of_negatives_triplet_loss,
)


def logit(probability):
    return math.log(probability / (1 - probability))


# (probability, label, group, caption, image). The match of group 0, two caption negatives, two image negatives, one
# unknown and one that shares neither; the match of group 1, whose only negative shares its caption with group 0.
GROUPS = [
    (0.70, 1, 0, 0, 0),
    (0.60, 0, 0, 1, 0),
    (0.55, 0, 0, 2, 0),
    (0.40, 0, 0, 0, 1),
    (0.65, 0, 0, 0, 2),
    (0.99, -100, 0, 3, 0),
    (0.97, 0, 0, 3, 3),
    (0.90, 1, 1, 4, 4),
    (0.75, 0, 1, 0, 4),
]
# In-batch: three captions with three images in one group. Captions 0 and 1 are of image 0, caption 2 of image 1; image
# 2 is a near-duplicate of image 0: what it would make with captions 0 and 1 is left out.
IN_BATCH = [
    (0.80, 1, 0, 0, 0),
    (0.30, 1, 0, 1, 0),
    (0.60, 1, 0, 2, 1),
    (0.50, 0, 0, 0, 1),
    (0.45, 0, 0, 1, 1),
    (0.70, 0, 0, 2, 0),
    (0.20, 0, 0, 2, 2),
]


def columns(rows):
    probabilities, *others = zip(*rows, strict=True)
    scores = torch.tensor([logit(p) for p in probabilities], dtype=torch.float64, requires_grad=True)
    return scores, *(torch.tensor(column) for column in others)


def loop(scores, labels, groups, captions, images, combine):
    """Mean over the matches of `combine(match, its caption negatives, its image negatives)`, all scores."""
    total, matches = 0.0, [row for row in range(len(scores)) if labels[row] == 1]
    for match in matches:
        of_group = [row for row in range(len(scores)) if groups[row] == groups[match] and labels[row] == 0]
        of_image = [scores[row] for row in of_group if images[row] == images[match]]
        of_caption = [scores[row] for row in of_group if captions[row] == captions[match]]
        total = total + combine(scores[match], of_image, of_caption)
    return total / len(matches)


def hinge(match, negative, margin=0.2):
    return torch.relu(margin - match.sigmoid() + negative.sigmoid())


def hardest(match, captions, images, margin=0.2, weights=(1, 1)):
    return sum(
        weight * hinge(match, max(negatives), margin)
        for weight, negatives in zip(weights, (captions, images), strict=True)
        if negatives
    )


def every(match, captions, images, margin=0.2, weights=(1, 1)):
    return sum(
        weight * hinge(match, negative, margin)
        for weight, negatives in zip(weights, (captions, images), strict=True)
        for negative in negatives
    )


def softmax(match, captions, images):
    return -torch.stack([match, *captions, *images]).log_softmax(0)[0]


OPTIONS = {"margin": 0.35, "caption_weight": 0.5, "image_weight": 2.0}
LOSSES = [
    (hardest_negative_triplet_loss, hardest),
    (
        functools.partial(hardest_negative_triplet_loss, **OPTIONS),
        functools.partial(hardest, margin=0.35, weights=(0.5, 2)),
    ),
    (sum_of_negatives_triplet_loss, every),
    (
        functools.partial(sum_of_negatives_triplet_loss, **OPTIONS),
        functools.partial(every, margin=0.35, weights=(0.5, 2)),
    ),
    (group_softmax_loss, softmax),
]


@pytest.mark.parametrize(
    ("loss", "rows", "expected"),
    [
        # Group 0: 0.2 - 0.7 + 0.6 = 0.10 (caption 1), 0.2 - 0.7 + 0.65 = 0.15 (image 2). Group 1: 0.2 - 0.9 + 0.75.
        (hardest_negative_triplet_loss, GROUPS, (0.10 + 0.15 + 0.05) / 2),
        # Caption 2 adds 0.2 - 0.7 + 0.55 = 0.05; image 1 is further away than the margin.
        (sum_of_negatives_triplet_loss, GROUPS, (0.10 + 0.05 + 0.15 + 0.05) / 2),
        (
            functools.partial(sum_of_negatives_triplet_loss, caption_weight=2.0, image_weight=3.0),
            GROUPS,
            (2 * (0.10 + 0.05 + 0.05) + 3 * 0.15) / 2,
        ),
        # exp(score) = p / (1 - p), the odds: 7/3 of 7/3 + 3/2 + 11/9 + 2/3 + 13/7, and 9 of 9 + 3.
        (
            group_softmax_loss,
            GROUPS,
            (math.log((7 / 3 + 3 / 2 + 11 / 9 + 2 / 3 + 13 / 7) / (7 / 3)) + math.log(12 / 9)) / 2,
        ),
        # All but the unknown one.
        (
            binary_matching_loss,
            GROUPS,
            -sum(map(math.log, (0.70, 0.40, 0.45, 0.60, 0.35, 0.03, 0.90, 0.25))) / 8,
        ),
        # Match (0, 0): caption 2 on image 0, 0.2 - 0.8 + 0.7 = 0.10; image 1, -0.1: 0. Match (1, 0): 0.2 - 0.3 + 0.7 =
        # 0.6; 0.2 - 0.3 + 0.45 = 0.35. Match (2, 1): 0.2 - 0.6 + 0.5 = 0.1; image 0, 0.2 - 0.6 + 0.7 = 0.3.
        (hardest_negative_triplet_loss, IN_BATCH, (0.10 + 0.60 + 0.35 + 0.10 + 0.30) / 3),
        # Match (2, 1) has caption 1 too: 0.2 - 0.6 + 0.45 = 0.05.
        (sum_of_negatives_triplet_loss, IN_BATCH, (0.10 + 0.60 + 0.35 + 0.10 + 0.05 + 0.30) / 3),
        # Odds: 4 of 4 + 1 + 7/3; 3/7 of 3/7 + 9/11 + 7/3; 3/2 of 3/2 + 1 + 9/11 + 7/3 + 1/4.
        (
            group_softmax_loss,
            IN_BATCH,
            (
                math.log((5 + 7 / 3) / 4)
                + math.log((3 / 7 + 9 / 11 + 7 / 3) * 7 / 3)
                + math.log((5 / 2 + 9 / 11 + 7 / 3 + 1 / 4) * 2 / 3)
            )
            / 3,
        ),
    ],
)  # fmt: skip
def test_hand_worked(loss, rows, expected):
    assert loss(*columns(rows)).item() == pytest.approx(expected, abs=1e-9)


def random_columns(seed):
    """Groups of every shape, in mixed order: several matches, no match, no negative, unknown rows, shared indices."""
    generator = torch.Generator().manual_seed(seed)
    size = 40
    scores = torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.tensor([-100, 0, 0, 0, 0, 1, 1])[torch.randint(7, (size,), generator=generator)]
    groups, captions, images = (torch.randint(count, (size,), generator=generator) for count in (5, 4, 4))
    same_pair = (captions[:, None] == captions) & (images[:, None] == images)
    labels[(labels == 0) & (same_pair & (labels == 1)).any(1)] = -100  # a pair that matches is no mismatch
    return scores, labels, groups, captions, images


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("loss", "combine"), LOSSES)
def test_equal_to_a_slow_loop_in_values_and_gradients(loss, combine, seed):
    for inputs in (random_columns(seed), columns(GROUPS), columns(IN_BATCH)):
        found, expected = loss(*inputs), loop(*inputs, combine)
        assert found.item() > 0
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        gradient, reference = (torch.autograd.grad(value, inputs[0])[0] for value in (found, expected))
        assert reference.abs().max() > 1e-3
        torch.testing.assert_close(gradient, reference, rtol=0, atol=1e-12)


def test_binary_loss_is_the_cross_entropy_of_the_two_logits():
    _, *others = random_columns(0)
    logits = torch.randn(40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    found = binary_matching_loss(logits[:, 1] - logits[:, 0], *others)
    expected = torch.nn.functional.cross_entropy(logits, others[0], ignore_index=-100)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (found, expected)))


ALL = [loss for loss, _ in LOSSES] + [binary_matching_loss]


@pytest.mark.parametrize("loss", ALL)
def test_without_matches_the_loss_is_zero_and_its_gradient_finite(loss):
    scores, labels, *indices = columns(GROUPS)
    value = loss(scores, torch.full_like(labels, -100), *indices)
    value.backward()
    assert value.item() == 0 and torch.equal(scores.grad, torch.zeros_like(scores))


@pytest.mark.parametrize("loss", ALL)
def test_extreme_scores_give_finite_values_and_gradients(loss):
    scores, *others = columns(GROUPS)
    scores = (scores.detach().float() * 1e4).requires_grad_()
    value = loss(scores, *others)
    value.backward()
    assert value.isfinite() and scores.grad.isfinite().all()


@pytest.mark.parametrize("loss", ALL)
def test_groups_of_equal_number_add_up(loss):
    """The mean over two halves is the mean over the whole: what gradient accumulation relies on."""
    inputs = columns(GROUPS[:4] + [(p, label, 9, c + 9, i + 9) for p, label, _, c, i in GROUPS[1:4] + GROUPS[:1]])
    halves = [loss(*(column[part] for column in inputs)) for part in (slice(0, 4), slice(4, 8))]
    torch.testing.assert_close(sum(halves) / 2, loss(*inputs))


@pytest.mark.parametrize("loss", ALL)
def test_the_model_takes_any_of_them(loss):
    model = tiny.model(UnicoderVLForImageTextRetrieval)
    processor = tiny.processor()
    regions = [tiny.record(name) for name in ("a", "b")]
    inputs = processor(text=["a dog runs .", "a cat sleeps ."], regions=regions, return_tensors="pt")
    index = {"caption_index": torch.tensor([0, 1, 0]), "image_index": torch.tensor([0, 0, 1])}
    labels, groups = torch.tensor([1, 0, 0]), torch.zeros(3, dtype=torch.long)
    model.group_loss = loss
    outputs = model(**inputs, **index, labels=labels, group_ids=groups)
    torch.testing.assert_close(outputs.loss, loss(outputs.scores, labels, groups, *index.values()))
    outputs.loss.backward()


def test_the_margin_of_the_config_is_the_default(tmp_path):
    model = tiny.model(UnicoderVLForImageTextRetrieval)
    model.save_pretrained(tmp_path)
    loaded = UnicoderVLForImageTextRetrieval.from_pretrained(tmp_path, triplet_margin=0.5)
    inputs = columns(GROUPS)
    assert model.group_loss(*inputs).item() == pytest.approx(0.15)
    # 0.5 - 0.7 + 0.6, 0.5 - 0.7 + 0.65, 0.5 - 0.9 + 0.75
    assert loaded.group_loss(*inputs).item() == pytest.approx((0.40 + 0.45 + 0.35) / 2)
