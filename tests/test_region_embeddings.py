"""The three ways to embed a region, hidden regions, and UNITER's head of region classes, each against its formula."""

import pytest
import tiny
import torch
from torch.nn.functional import cross_entropy, gelu, layer_norm, linear

from unicoder_vl_hf import ImageTextScorer, UnicoderVLForImageTextRetrieval, UnicoderVLForPreTraining, UnicoderVLModel

KINDS = ("unicoder_vl", "uniter", "visual_bert")


def model(kind: str, model_class=UnicoderVLModel, **changes):
    made = tiny.model(model_class, region_embedding=kind, use_image_token_embedding=False, **changes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # LayerNorms too, which are ones and zeros otherwise
        for parameter in made.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return made


def inputs(masked: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    corners = torch.rand(2, 3, 2, 2, generator=generator).sort(dim=2).values.flatten(2)
    area = (corners[..., 2:] - corners[..., :2]).prod(-1, keepdim=True)
    given = {
        "input_ids": torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        "region_features": torch.randn(2, 3, tiny.FEATURE_DIM, generator=generator),
        "region_locations": torch.cat((corners, area), dim=-1),
        "region_attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    }
    return given | ({"masked_regions": torch.tensor([[0, 1, 0], [1, 0, 0]])} if masked else {})


def region_states(made, given):
    return made(**given, output_hidden_states=True).hidden_states[0][:, 4:]


def norm(state: dict, name: str, values: torch.Tensor) -> torch.Tensor:
    return layer_norm(values, values.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-12)


def project(state: dict, name: str, values: torch.Tensor) -> torch.Tensor:
    return linear(values, state[f"{name}.weight"], state[f"{name}.bias"])


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_uniter_embeds_a_region_by_three_layer_norms(masked):
    made, given = model("uniter"), inputs(masked)
    state = made.embeddings.state_dict()
    features, (x1, y1, x2, y2, area) = given["region_features"].clone(), given["region_locations"].unbind(-1)
    if masked:
        features[0, 1] = features[1, 0] = state["region_embeddings.hidden_feature"]
    seven = torch.stack((x1, y1, x2, y2, x2 - x1, y2 - y1, area), dim=-1)
    r = "region_embeddings"
    expected = norm(
        state,
        f"{r}.LayerNorm",
        norm(state, f"{r}.feature_LayerNorm", project(state, f"{r}.feature_projection", features))
        + norm(state, f"{r}.location_LayerNorm", project(state, f"{r}.location_projection", seven))
        + state["token_type_embeddings.weight"][1],
    )
    torch.testing.assert_close(region_states(made, given), expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_visual_bert_embeds_a_region_without_its_location_by_the_layer_norm_of_the_text(masked):
    made, given = model("visual_bert"), inputs(masked)
    state = made.embeddings.state_dict()
    features = given["region_features"].clone()
    if masked:
        features[0, 1] = features[1, 0] = 0
    expected = norm(state, "LayerNorm", project(state, "region_embeddings.feature_projection", features))
    torch.testing.assert_close(region_states(made, given), expected, rtol=0, atol=1e-5)
    assert not [name for name in state if "location" in name]


@torch.no_grad()
def test_a_hidden_region_of_ours_has_a_feature_of_zeros_and_its_location():
    made, given = model("unicoder_vl"), inputs()
    by_hand = {**given, "region_features": given["region_features"].clone()}
    by_hand["region_features"][0, 1] = by_hand["region_features"][1, 0] = 0
    hidden = region_states(made, inputs(masked=True))
    torch.testing.assert_close(hidden, region_states(made, by_hand), rtol=0, atol=0)
    given["region_features"][0, 1] = 7  # whatever the feature was, nothing of it is seen
    torch.testing.assert_close(region_states(made, {**inputs(masked=True), **given}), hidden, rtol=0, atol=0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_parameter(kind, masked):
    """Also those of what hides a region where none is hidden: several processes want them all."""
    made = model(kind, UnicoderVLForPreTraining, region_head="uniter")
    labels = {"labels": inputs()["input_ids"], "matching_labels": torch.tensor([1, 0])}
    made(**inputs(masked), **labels, region_labels=torch.tensor([[-100, 1, -100], [-100, 2, -100]])).loss.backward()
    assert [name for name, parameter in made.named_parameters() if parameter.grad is None] == []


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_left_out_padding_changes_no_value(kind):
    made, given = model(kind), inputs(masked=True)
    real = torch.cat((given["attention_mask"], given["region_attention_mask"]), dim=1) == 1
    padded = made(**given).last_hidden_state
    made.config.padding_free = True
    torch.testing.assert_close(made(**given).last_hidden_state[real], padded[real], rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_scorer_scores_as_the_model_does(kind):
    made, processor = model(kind, UnicoderVLForImageTextRetrieval), tiny.processor()
    captions, records = ["a dog runs .", "a cat"], [tiny.record("one"), tiny.record("two", num_regions=5)]
    expected = [
        [made(**processor(text=c, regions=r, return_tensors="pt")).scores.item() for r in records] for c in captions
    ]
    scores = ImageTextScorer(made, processor, verbose=False).score(captions, records)
    torch.testing.assert_close(torch.tensor(scores), torch.tensor(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_computes_the_same(kind, tmp_path):
    made = model(kind, UnicoderVLForPreTraining, region_head="uniter")
    made.save_pretrained(tmp_path)
    again = UnicoderVLForPreTraining.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            again(**inputs(masked=True)).region_logits, made(**inputs(masked=True)).region_logits, rtol=0, atol=0
        )


@torch.no_grad()
def test_uniters_head_has_a_logit_for_background_before_the_classes():
    made, given = model("uniter", UnicoderVLForPreTraining, region_head="uniter"), inputs()
    state = made.region_head.state_dict()
    regions = made.bert(**given).last_hidden_state[:, 4:]
    logits = project(state, "1", norm(state, "0.LayerNorm", gelu(project(state, "0.dense", regions))))
    labels = torch.tensor([[-100, 0, 4], [3, -100, -100]])  # of 5 classes
    outputs = made(**given, region_labels=labels)
    assert outputs.region_logits.shape == (2, 3, 6)
    torch.testing.assert_close(outputs.region_logits, logits, rtol=0, atol=1e-5)
    first = cross_entropy(logits[0, 1:], torch.tensor([1, 5]))  # class k is logit k + 1
    second = cross_entropy(logits[1, :1], torch.tensor([4]))
    torch.testing.assert_close(outputs.moc_loss, (first + second) / 2, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_class", [UnicoderVLModel, UnicoderVLForPreTraining])
def test_masked_regions_have_the_shape_of_the_regions(model_class):
    made, given = tiny.model(model_class), inputs()
    with pytest.raises(ValueError, match=r"masked_regions has shape \(2, 4\), expected \(2, 3\)"):
        made(**given, masked_regions=torch.zeros(2, 4))
    with pytest.raises(ValueError, match="masked_regions was given without region_features"):
        made(input_ids=given["input_ids"], masked_regions=torch.zeros(2, 3))


def test_new_weights_of_locations_may_be_larger():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "initializer_range": 0.02, "region_feature_dim": 64}
    for wanted, expected in ((None, 0.02), (1.0, 1.0)):
        model = tiny.model(UnicoderVLModel, **sizes, location_initializer_range=wanted)
        embed = model.embeddings.region_embeddings
        assert embed.location_projection.weight.std().item() == pytest.approx(expected, rel=0.2)
        assert embed.feature_projection.weight.std().item() == pytest.approx(0.02, rel=0.2)
