"""The ONNX graph of a checkpoint, under the real ONNX Runtime."""

import numpy as np
import pytest
import tiny
import torch

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("transformers", minversion="5.24")

import onnxruntime
from transformers import AutoProcessor

from unicoder_vl_hf import UnicoderVLForImageTextRetrieval, UnicoderVLModel
from unicoder_vl_hf.cli import main
from unicoder_vl_hf.scoring import onnx_export
from unicoder_vl_hf.scoring.onnx_export import export_onnx


@pytest.mark.parametrize("matching_head", ["unicoder_vl", "similarity"])
def test_the_graph_scores_what_the_processor_makes(matching_head, tmp_path, capsys, monkeypatch):
    """Pairs of any number and length, as PyTorch scores them; a graph that differs is not kept."""
    model = tiny.model(UnicoderVLForImageTextRetrieval, projection_dim=8, matching_head=matching_head)
    model.save_pretrained(tmp_path / "model")
    tiny.processor().save_pretrained(tmp_path / "model")
    assert main(["export-onnx", str(tmp_path / "model"), str(tmp_path / "onnx")]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{tmp_path / 'onnx'}: 0.") and "by ONNX Runtime" in said and said.count("\n") == 1
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    processor = AutoProcessor.from_pretrained(tmp_path / "onnx")
    for captions, counts in ((["a dog"], [1]), (["a cat sleeps .", "a", "the dog runs on the grass ."], [4, 2, 9])):
        regions = [tiny.record(f"{count}", count) for count in counts]
        inputs = processor(text=captions, regions=regions, return_tensors="np")
        scores = session.run(["scores"], dict(inputs))[0]
        with torch.no_grad():
            expected = model(**processor(text=captions, regions=regions, return_tensors="pt")).scores.numpy()
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-4)

    monkeypatch.setattr(onnx_export, "TOLERANCE", -1.0)
    folder = tmp_path / "onnx"
    folder.rename(tmp_path / "kept")
    with pytest.raises(ValueError, match=r"The graph gives .* it is not kept"):
        onnx_export._check(model, tmp_path / "kept")


def test_what_cannot_be_exported_is_said(tmp_path):
    tiny.model(UnicoderVLModel).save_pretrained(tmp_path / "headless")
    tiny.processor().save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match="its scores would be random"):
        export_onnx(tmp_path / "headless", tmp_path / "onnx")
    (tmp_path / "there").mkdir()
    tiny.model(UnicoderVLForImageTextRetrieval).save_pretrained(tmp_path / "model")
    tiny.processor().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="there exists already"):
        export_onnx(tmp_path / "model", tmp_path / "there")
