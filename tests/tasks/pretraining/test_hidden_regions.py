"""Hidden regions: predicted as each would be alone, and shown covered on the photo."""

import dataclasses

import datasets
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from places import script
from region_stores import write_store
from test_pictures import Page

from unicoder_vl_hf import RegionStore, UnicoderVLForPreTraining
from unicoder_vl_hf.scenes.world import CLASS_NAMES, FEATURE_DIM, build_scenes, scene_tokenizer
from unicoder_vl_hf.tasks.pretraining import predict_hidden_regions


@pytest.mark.parametrize("fields", [{}, {"region_embedding": "uniter", "region_head": "uniter"}])
def test_each_region_is_hidden_alone(fields):
    model, processor = tiny.model(UnicoderVLForPreTraining, **fields), tiny.processor(max_regions=3)
    record = dataclasses.replace(tiny.record(num_regions=4), object_scores=np.array([0.9, 0.1, 0.8, 0.7]))
    seen, probabilities = predict_hidden_regions(model, processor, record, "a dog")
    assert seen.tolist() == [0, 2, 3] and probabilities.shape == (3, 5)
    inputs = processor(text="a dog", regions=record, return_tensors="pt")
    for place in range(3):
        with torch.no_grad():
            logits = model(**inputs, masked_regions=torch.eye(3)[None, place]).region_logits[0, place]
        np.testing.assert_allclose(probabilities[place], logits[-5:].softmax(-1), atol=1e-5)


def test_the_page_of_an_evaluation(tmp_path, capsys):
    world = build_scenes(tmp_path / "world", num_train=1, num_val=1, num_test=2, captions_per_image=2)
    store, tokenizer = RegionStore(world / "regions"), scene_tokenizer()
    classes = {"region_feature_dim": FEATURE_DIM, "num_region_classes": len(CLASS_NAMES)}
    model = tiny.model(UnicoderVLForPreTraining, vocab_size=len(tokenizer), **classes)
    model.save_pretrained(tmp_path / "model")
    processor = type(tiny.processor())(tiny.processor().feature_extractor, tokenizer)
    processor.save_pretrained(tmp_path / "model")
    data = ["--captions", world / "captions.jsonl", "--regions", world / "regions", "--model", tmp_path / "model"]
    options = ["--gallery", tmp_path / "hidden.html", "--photos", world / "photos"]
    script("evaluate_pretraining").main([*map(str, data), *map(str, options)])
    assert f"Hidden regions: {tmp_path / 'hidden.html'}\n" in capsys.readouterr().out
    page = Page(tmp_path / "hidden.html")
    assert page.path == [] and len(page.sections) == 2
    for image_id, section in zip(("test-00000", "test-00001"), page.sections, strict=True):
        record = store[image_id]
        seen, probabilities = predict_hidden_regions(model, processor, record, section["caption"])
        order = np.argsort(-record.object_scores, kind="stable") if record.object_scores is not None else seen
        photo = (
            Image.open(world / "photos" / f"{image_id}.png").convert("RGB").resize((320, 240), Image.Resampling.LANCZOS)
        )
        assert len(section["figures"]) == len(record)
        for index, figure in zip(order, section["figures"], strict=True):
            guess, truth = CLASS_NAMES[probabilities[index].argmax()], CLASS_NAMES[record.object_ids[index]]
            expected = f"{guess} {100 * probabilities[index].max():.0f} %" + f" not {truth}" * (guess != truth)
            assert figure["text"] == expected and figure["class"] == ["right" if guess == truth else "wrong"]
            changed = (np.asarray(figure["picture"].convert("RGB")) != np.asarray(photo)).any(-1)
            x1, y1, x2, y2 = (record.locations()[index, :4] * [320, 240, 320, 240]).astype(int)
            outside = changed.copy()
            outside[max(0, y1 - 2) : y2 + 3, max(0, x1 - 2) : x2 + 3] = False
            assert changed[y1 + 4 : y2 - 4, x1 + 4 : x2 - 4].mean() > 0.9 and not outside.any()


def test_regions_without_classes_cannot_be_told(tmp_path):
    module = script("evaluate_pretraining")
    args = module.PretrainingEvaluationArguments(model="", captions="", regions="", gallery=str(tmp_path / "x.html"))
    rows = {"image_id": ["photo"], "caption": ["a dog"]}
    with pytest.raises(ValueError, match="the regions of 'photo' have no classes"):
        model = tiny.model(UnicoderVLForPreTraining)
        store = write_store([tiny.record()], tmp_path / "store")
        module.draw_gallery(args, model, tiny.processor(), store, datasets.Dataset.from_dict(rows))
