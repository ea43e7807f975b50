"""The losses of fine-tuning: hand-worked examples, a slow loop on groups of every shape, and their calls of a model."""

import functools
import math

import pytest
import tiny
import torch
from test_run_pretraining import launch, output_of
from two_processes import run

from unicoder_vl_hf import UnicoderVLForImageTextRetrieval
from unicoder_vl_hf.tasks.retrieval.losses import (
    BinaryMatchingLoss,
    ContrastiveLoss,
    GroupSoftmaxLoss,
    HardestNegativeLoss,
    HardNegativeLoss,
    SumOfNegativesLoss,
    TwoStageLoss,
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
    (HardestNegativeLoss(), hardest),
    (HardestNegativeLoss(**OPTIONS), functools.partial(hardest, margin=0.35, weights=(0.5, 2))),
    (SumOfNegativesLoss(), every),
    (SumOfNegativesLoss(**OPTIONS), functools.partial(every, margin=0.35, weights=(0.5, 2))),
    (GroupSoftmaxLoss(), softmax),
]


@pytest.mark.parametrize(
    ("loss", "rows", "expected"),
    [
        # Group 0: 0.2 - 0.7 + 0.6 = 0.10 (caption 1), 0.2 - 0.7 + 0.65 = 0.15 (image 2). Group 1: 0.2 - 0.9 + 0.75.
        (HardestNegativeLoss(), GROUPS, (0.10 + 0.15 + 0.05) / 2),
        # Caption 2 adds 0.2 - 0.7 + 0.55 = 0.05; image 1 is further away than the margin.
        (SumOfNegativesLoss(), GROUPS, (0.10 + 0.05 + 0.15 + 0.05) / 2),
        (
            SumOfNegativesLoss(caption_weight=2.0, image_weight=3.0),
            GROUPS,
            (2 * (0.10 + 0.05 + 0.05) + 3 * 0.15) / 2,
        ),
        # exp(score) = p / (1 - p), the odds: 7/3 of 7/3 + 3/2 + 11/9 + 2/3 + 13/7, and 9 of 9 + 3.
        (
            GroupSoftmaxLoss(),
            GROUPS,
            (math.log((7 / 3 + 3 / 2 + 11 / 9 + 2 / 3 + 13 / 7) / (7 / 3)) + math.log(12 / 9)) / 2,
        ),
        # All but the unknown one.
        (
            BinaryMatchingLoss(),
            GROUPS,
            -sum(map(math.log, (0.70, 0.40, 0.45, 0.60, 0.35, 0.03, 0.90, 0.25))) / 8,
        ),
        # Match (0, 0): caption 2 on image 0, 0.2 - 0.8 + 0.7 = 0.10; image 1, -0.1: 0. Match (1, 0): 0.2 - 0.3 + 0.7 =
        # 0.6; 0.2 - 0.3 + 0.45 = 0.35. Match (2, 1): 0.2 - 0.6 + 0.5 = 0.1; image 0, 0.2 - 0.6 + 0.7 = 0.3.
        (HardestNegativeLoss(), IN_BATCH, (0.10 + 0.60 + 0.35 + 0.10 + 0.30) / 3),
        # Match (2, 1) has caption 1 too: 0.2 - 0.6 + 0.45 = 0.05.
        (SumOfNegativesLoss(), IN_BATCH, (0.10 + 0.60 + 0.35 + 0.10 + 0.05 + 0.30) / 3),
        # Odds: 4 of 4 + 1 + 7/3; 3/7 of 3/7 + 9/11 + 7/3; 3/2 of 3/2 + 1 + 9/11 + 7/3 + 1/4.
        (
            GroupSoftmaxLoss(),
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
    assert loss.of_scores(*columns(rows)).item() == pytest.approx(expected, abs=1e-9)


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
        found, expected = loss.of_scores(*inputs), loop(*inputs, combine)
        assert found.item() > 0
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        gradient, reference = (torch.autograd.grad(value, inputs[0])[0] for value in (found, expected))
        assert reference.abs().max() > 1e-3
        torch.testing.assert_close(gradient, reference, rtol=0, atol=1e-12)


def test_binary_loss_is_the_cross_entropy_of_the_two_logits():
    _, *others = random_columns(0)
    logits = torch.randn(40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    found = BinaryMatchingLoss().of_scores(logits[:, 1] - logits[:, 0], *others)
    expected = torch.nn.functional.cross_entropy(logits, others[0], ignore_index=-100)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (found, expected)))


ALL = [loss for loss, _ in LOSSES] + [BinaryMatchingLoss()]


@pytest.mark.parametrize("loss", ALL)
def test_without_matches_the_loss_is_zero_and_its_gradient_finite(loss):
    scores, labels, *indices = columns(GROUPS)
    value = loss.of_scores(scores, torch.full_like(labels, -100), *indices)
    value.backward()
    assert value.item() == 0 and torch.equal(scores.grad, torch.zeros_like(scores))


@pytest.mark.parametrize("loss", ALL)
def test_extreme_scores_give_finite_values_and_gradients(loss):
    scores, *others = columns(GROUPS)
    scores = (scores.detach().float() * 1e4).requires_grad_()
    value = loss.of_scores(scores, *others)
    value.backward()
    assert value.isfinite() and scores.grad.isfinite().all()


@pytest.mark.parametrize("loss", ALL)
def test_groups_of_equal_number_add_up(loss):
    """The mean over two halves is the mean over the whole: what gradient accumulation relies on."""
    inputs = columns(GROUPS[:4] + [(p, label, 9, c + 9, i + 9) for p, label, _, c, i in GROUPS[1:4] + GROUPS[:1]])
    halves = [loss.of_scores(*(column[part] for column in inputs)) for part in (slice(0, 4), slice(4, 8))]
    torch.testing.assert_close(sum(halves) / 2, loss.of_scores(*inputs))


# Their calls of a model


def tiny_batch():
    """One group of a match, a caption negative and an image negative."""
    regions = [tiny.record(name) for name in ("a", "b")]
    inputs = tiny.processor()(text=["a dog runs .", "a cat sleeps ."], regions=regions, return_tensors="pt")
    index = {"caption_index": torch.tensor([0, 1, 0]), "image_index": torch.tensor([0, 0, 1])}
    return {**inputs, **index, "labels": torch.tensor([1, 0, 0]), "group_ids": torch.zeros(3, dtype=torch.long)}


@pytest.mark.parametrize("loss", ALL)
def test_a_loss_of_groups_is_that_of_the_scores(loss):
    model, batch = tiny.model(UnicoderVLForImageTextRetrieval), tiny_batch()
    value = loss(model, {**batch, "mismatches": torch.zeros(1, 1, dtype=torch.bool)})  # which others need
    targets = [batch[name] for name in ("labels", "group_ids", "caption_index", "image_index")]
    torch.testing.assert_close(value, loss.of_scores(model(**batch).scores, *targets))
    value.backward()
    assert model.matching_head.weight.grad.any()


def test_the_models_own_loss_is_the_papers_with_the_margin_of_the_config(tmp_path):
    tiny.model(UnicoderVLForImageTextRetrieval).save_pretrained(tmp_path)
    batch = tiny_batch()
    for changes, margin in (({}, 0.2), ({"triplet_margin": 0.5}, 0.5)):
        model = UnicoderVLForImageTextRetrieval.from_pretrained(tmp_path, **changes)
        assert torch.equal(model(**batch).loss, HardestNegativeLoss(margin)(model, batch))


@pytest.mark.parametrize("lacks", ["labels", "group_ids", "image_index"])
def test_what_a_batch_lacks_is_named(lacks):
    batch = {name: tensor for name, tensor in tiny_batch().items() if name != lacks}
    with pytest.raises(ValueError, match=f"The batch lacks {lacks}, which the loss needs"):
        HardestNegativeLoss()(tiny.model(UnicoderVLForImageTextRetrieval), batch)


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan")])
def test_weights_that_train_nothing_are_refused(value):
    groups = GroupSoftmaxLoss()
    for make, name in (
        (lambda: ContrastiveLoss(value), "weight"),
        (lambda: TwoStageLoss(groups, value), "contrastive_weight"),
        (lambda: HardNegativeLoss(groups, num_hard_negatives=value), "num_hard_negatives"),
    ):
        with pytest.raises(ValueError, match=f"^{name}=.*, expected above 0"):
            make()


def test_two_processes_equal_one(tmp_path):
    """Each loss called on the model as it is wrapped: the gradient is the mean over both, in both."""
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    run("loss_client", [str(alone)])
    process = launch(tmp_path, ("loss_client", [str(shared)]), processes=2)
    output = output_of(process, tmp_path)
    assert process.returncode == 0, output
    assert output.count("loss_client: world size 2") == 2, output
    expected = torch.load(f"{alone}-0")
    assert len(expected) == 18
    for rank in range(2):
        found = torch.load(f"{shared}-{rank}")
        for loss, gradients in expected.items():
            assert any(gradient.abs().max() > 1e-3 for gradient in gradients.values())
            for name, gradient in gradients.items():
                torch.testing.assert_close(found[loss][name], gradient, rtol=1e-4, atol=1e-6, msg=f"{loss} {name}")
