"""UnicoderVLConfig: round trip, the Auto table of every checkpoint, labels and errors."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoConfig, BertConfig

from unicoder_vl_hf import UnicoderVLConfig

AUTO_MAP = {
    "AutoConfig": "configuration_unicoder_vl.UnicoderVLConfig",
    "AutoModel": "modeling_unicoder_vl.UnicoderVLModel",
    "AutoModelForPreTraining": "modeling_unicoder_vl.UnicoderVLForPreTraining",
    "AutoModelForSequenceClassification": "modeling_unicoder_vl.UnicoderVLForImageTextRetrieval",
    "AutoModelForMultipleChoice": "modeling_unicoder_vl.UnicoderVLForMultipleChoice",
    "AutoModelForVisualQuestionAnswering": "modeling_unicoder_vl.UnicoderVLForQuestionAnswering",
}


def test_defaults_are_the_papers_on_bert_base():
    config = UnicoderVLConfig()
    assert (config.region_feature_dim, config.region_location_dim, config.num_region_classes) == (2048, 5, 1600)
    assert (config.triplet_margin, config.use_image_token_embedding) == (0.2, True)
    assert (config.padding_free, config.sparse_prediction) == (None, False)
    bert = BertConfig().to_dict()
    shared = [name for name in UnicoderVLConfig.__annotations__ if name in bert]
    assert len(shared) == 16
    assert {name: getattr(config, name) for name in shared} == {name: bert[name] for name in shared}


def test_round_trip_keeps_every_field(tmp_path):
    config = UnicoderVLConfig(
        vocab_size=41, hidden_size=24, num_hidden_layers=3, num_attention_heads=3, region_feature_dim=7,
        region_location_dim=6, num_region_classes=9, use_image_token_embedding=False, triplet_margin=1,
        hidden_dropout_prob=0, tie_word_embeddings=False, padding_free=False, sparse_prediction=True,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    for loaded in (UnicoderVLConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is UnicoderVLConfig
        assert loaded.to_diff_dict() == {**config.to_diff_dict(), "auto_map": AUTO_MAP}
    assert UnicoderVLConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_a_saved_config_carries_the_whole_auto_map(tmp_path):
    UnicoderVLConfig().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "unicoder_vl"
    assert saved["auto_map"] == AUTO_MAP


def test_two_labels_are_named_and_others_are_not(tmp_path):
    assert UnicoderVLConfig().id2label == {0: "mismatch", 1: "match"}
    assert UnicoderVLConfig().label2id == {"mismatch": 0, "match": 1}
    assert UnicoderVLConfig(num_labels=2).id2label == {0: "mismatch", 1: "match"}
    assert UnicoderVLConfig(num_labels=3).id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert UnicoderVLConfig(num_labels=1).id2label == {0: "LABEL_0"}
    own = UnicoderVLConfig(id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1})
    own.save_pretrained(tmp_path)
    assert UnicoderVLConfig.from_pretrained(tmp_path).id2label == {0: "no", 1: "yes"}


def test_the_parts_of_the_loss_are_no_predictions():
    assert UnicoderVLConfig.keys_to_ignore_at_inference == [
        "mlm_loss",
        "moc_loss",
        "matching_loss",
        "hidden_states",
        "attentions",
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 30, "num_attention_heads": 4}, "hidden_size=30 is not a multiple of num_attention_heads=4"),
        ({"region_feature_dim": 0}, "region_feature_dim=0 must be at least 1"),
        ({"region_location_dim": 0}, "region_location_dim=0 must be at least 1"),
        ({"num_region_classes": -1}, "num_region_classes=-1 must be at least 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be at least 1"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be at least 1"),
        ({"region_embedding": "unitr"}, "region_embedding='unitr' must be one of unicoder_vl, uniter, visual_bert"),
        ({"region_head": "visual_bert"}, "region_head='visual_bert' must be one of unicoder_vl, uniter"),
        ({"region_embedding": "uniter", "type_vocab_size": 1}, "needs region_location_dim=5 and type_vocab_size=2"),
        ({"region_embedding": "uniter", "region_location_dim": 7}, "needs region_location_dim=5 and type_vocab_size=2"),
    ],
)
def test_impossible_sizes_are_errors(fields, message):
    with pytest.raises((ValueError, StrictDataclassClassValidationError), match=message):
        UnicoderVLConfig(**fields)


def test_a_wrong_type_is_an_error_and_an_integer_rate_is_none():
    with pytest.raises(Exception, match="region_feature_dim"):
        UnicoderVLConfig(region_feature_dim="2048")
    assert UnicoderVLConfig(hidden_dropout_prob=0, triplet_margin=1).triplet_margin == 1


def test_a_config_changed_to_an_impossible_size_is_not_saved(tmp_path):
    config = UnicoderVLConfig()
    config.num_attention_heads = 7
    with pytest.raises((ValueError, StrictDataclassClassValidationError), match="num_attention_heads=7"):
        config.save_pretrained(tmp_path)
