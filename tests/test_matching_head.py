"""The head that scores pairs by a similarity, too: what it adds, what it needs, and what it refuses."""

import pytest
import tiny
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError

from unicoder_vl_hf import UnicoderVLForImageTextRetrieval, UnicoderVLForPreTraining
from unicoder_vl_hf.scoring.checkpoints import load_for_scoring, scoring_digest
from unicoder_vl_hf.scoring.explanation import parts_of_similarity


def similarity_model(**changes) -> UnicoderVLForImageTextRetrieval:
    model = tiny.model(UnicoderVLForImageTextRetrieval, projection_dim=8, matching_head="similarity", **changes)
    with torch.no_grad():  # without a bias the length of the means would not matter
        model.first_stage.text_projection.bias.normal_()
        model.first_stage.image_projection.bias.normal_()
    return model


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("padding_free", [False, True])
def test_it_adds_the_logit_of_the_states_of_the_pair(padding_free, num_layers):
    model, batch = similarity_model(num_hidden_layers=num_layers), tiny.padded_batch()
    model.config.padding_free = padding_free
    found = model(**batch)
    layers = model.bert(**batch, output_hidden_states=True).hidden_states
    paper = model.matching_head(model.bert(**batch).pooler_output)
    for row, (length, regions) in enumerate(zip(tiny.TEXT_LENGTHS, tiny.NUM_REGIONS, strict=True)):
        states = torch.stack(layers[:-1])[:, row].mean(0)  # embeddings and all layers but the last
        text, image = states[:length].mean(0), states[7 : 7 + regions].mean(0)
        stage = model.first_stage
        embedded = [torch.nn.functional.normalize(each, dim=0)
                    for each in (stage.text_projection(text), stage.image_projection(image))]  # fmt: skip
        logit = stage.logit_scale.exp() * embedded[0] @ embedded[1]
        wanted = paper[row, 1] - paper[row, 0] + logit
        torch.testing.assert_close(found.scores[row], wanted, rtol=0, atol=1e-5)
        assert abs(logit) > 0.1  # far more than the tolerance
    assert found.hidden_states is None
    assert len(model(**batch, output_hidden_states=True).hidden_states) == num_layers + 1


def test_pairs_teach_the_projections_of_the_first_stage():
    model = similarity_model()
    model(**tiny.padded_batch()).scores.sum().backward()
    for projection in (model.first_stage.text_projection, model.first_stage.image_projection):
        assert projection.weight.grad.abs().max() > 1e-3
    assert model.first_stage.logit_scale.grad.abs() > 1e-3


def test_it_needs_a_first_stage():
    with pytest.raises(ValueError, match=r"no first stage: its config\.projection_dim is None"):
        tiny.model(UnicoderVLForImageTextRetrieval, matching_head="similarity")
    with pytest.raises(
        ValueError, match="matching_head='similarity' reads a first stage of search, which pre-training"
    ):
        tiny.model(UnicoderVLForPreTraining, matching_head="similarity", projection_dim=8)
    with pytest.raises(StrictDataclassClassValidationError, match="matching_head='cosine' must be one of unicoder_vl"):
        tiny.config(matching_head="cosine")


def test_scores_are_told_by_the_projections_too(tmp_path):
    model = similarity_model()
    before = scoring_digest(model)
    with torch.no_grad():
        model.first_stage.text_projection.bias.add_(1)
    assert scoring_digest(model) != before
    model.config.matching_head = "unicoder_vl"
    model.save_pretrained(tmp_path)
    tiny.processor().save_pretrained(tmp_path)
    loaded, _ = load_for_scoring(tmp_path)
    before = scoring_digest(loaded)
    with torch.no_grad():
        loaded.first_stage.text_projection.bias.add_(1)
    assert scoring_digest(loaded) == before


def test_a_checkpoint_without_the_projections_is_not_scored_with(tmp_path):
    tiny.model(UnicoderVLForImageTextRetrieval).save_pretrained(tmp_path)
    tiny.processor().save_pretrained(tmp_path)
    config = tiny.config(projection_dim=8, matching_head="similarity")
    config.architectures = ["UnicoderVLForImageTextRetrieval"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no \['first_stage"):
        load_for_scoring(tmp_path)


def test_it_is_saved_and_loaded(tmp_path):
    model, batch = similarity_model(), tiny.padded_batch()
    model.save_pretrained(tmp_path)
    loaded = UnicoderVLForImageTextRetrieval.from_pretrained(tmp_path)
    assert loaded.config.matching_head == "similarity"
    torch.testing.assert_close(loaded(**batch).scores, model(**batch).scores, rtol=0, atol=0)


def test_the_similarity_is_shared_out_among_the_positions():
    """A part is what the logit gains, to first order, where a position's states grow."""
    model, batch = similarity_model(), {name: tensor[:1, :7] for name, tensor in tiny.padded_batch().items()}
    batch = {
        name: batch[name][:, :3] if name in ("input_ids", "attention_mask") else batch[name][:, :4] for name in batch
    }
    layers = list(model.bert(**batch, output_hidden_states=True).hidden_states)
    found = parts_of_similarity(model.first_stage, torch.stack(layers[:-1])[:, 0].mean(0).detach(), num_tokens=3)

    def logit(states: list[torch.Tensor]) -> torch.Tensor:
        mean = torch.stack(states[:-1])[:, 0].mean(0)
        return model.first_stage.logits_of_means(torch.stack((mean[:3].mean(0), mean[3:].mean(0)))[None])

    for place in range(7):
        grown = [layer.clone() for layer in layers]
        for layer in grown:
            layer[0, place] *= 1.01
        gained = (logit(grown) - logit(layers)) / 0.01
        torch.testing.assert_close(found[place], gained[0], rtol=0.05, atol=2e-3)
    assert found.abs().max() > 0.1
