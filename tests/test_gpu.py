"""
What runs on a GPU as on a CPU: losses, gradients and scores of the packed path under every attention, a resumed run,
a detector and an extraction. Without a GPU the same tests run on the CPU, as far as they need none; `make gpu-check`
runs them where there is one.
"""

import os

import pytest
import tiny
import torch
from accelerate import Accelerator
from photos import SIZES, photo

from unicoder_vl_hf import ImageTextScorer, UnicoderVLForImageTextRetrieval, UnicoderVLForPreTraining, UnicoderVLModel
from unicoder_vl_hf.processes import Computing, new_accelerator
from unicoder_vl_hf.runs.checkpoints import CheckpointFolder, save_weights_as_pretrained

pytestmark = pytest.mark.gpu

DEVICE = os.environ.get("UNICODER_VL_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE == "cuda"
LARGE = {"hidden_size": 64, "intermediate_size": 96}  # heads of 32, the least that GPU kernels take
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(autouse=True)
def whole_float32(monkeypatch):
    """Convolutions would otherwise round to TF32 on a GPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def to_device(batch):
    return {name: tensor.to(DEVICE) for name, tensor in batch.items()}


def model_of(model_class, **fields):
    torch.manual_seed(1)
    return model_class(tiny.config(**LARGE, **NO_DROPOUT, **fields)).train()


def loss_and_gradients(model, batch, dtype=torch.float32):
    model.zero_grad()
    device = model.device.type
    with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
        loss = model(**batch).loss
    loss.backward()
    return loss.detach().cpu().float(), {name: weight.grad.cpu() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("attention", ["padded", "sdpa", "flex_attention", "flash_attention_2"])
def test_losses_and_gradients_are_those_of_the_cpu(attention, dtype, monkeypatch):
    """Of float32 with padding on the CPU."""
    if attention == "flash_attention_2" and (not ON_GPU or dtype == torch.float32):
        pytest.skip("FlashAttention runs on GPUs, in half precision")
    if attention == "flex_attention" and not ON_GPU:
        pytest.skip("torch has no backward of flex attention on CPUs")
    batch = tiny.pretraining_batch()
    expected, wanted = loss_and_gradients(model_of(UnicoderVLForPreTraining, padding_free=False), batch)
    model = model_of(UnicoderVLForPreTraining, padding_free=attention != "padded").to(DEVICE)
    if attention != "padded":
        try:
            model.set_attn_implementation(attention)
        except (ImportError, ValueError) as error:
            pytest.skip(f"{attention} is not here: {str(error)[:100]}")
        monkeypatch.setattr(UnicoderVLModel, "packs", lambda self, **_: True)  # with SDPA on a GPU, too
    loss, gradients = loss_and_gradients(model, to_device(batch), dtype)
    exact = dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0 if exact else 2e-2, atol=1e-5 if exact else 2e-2)
    assert gradients.keys() == wanted.keys()
    total = torch.cat([gradient.flatten() for gradient in wanted.values()]).norm()
    for name, gradient in wanted.items():
        if exact:
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
        else:  # the gradient of a key's bias is nothing but rounding
            assert (gradients[name] - gradient).norm() < 0.05 * (gradient.norm() + 0.1 * total), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scores_are_those_of_the_cpu(dtype):
    if dtype == torch.float16 and not ON_GPU:
        pytest.skip("no CPU is fast in float16")
    processor = tiny.processor()
    captions = ["a dog runs", "the cat sleeps on the grass .", "a cat"]
    records = [tiny.record(f"photo {number}", number) for number in (1, 5, 3)]
    model = model_of(UnicoderVLForImageTextRetrieval)
    expected = ImageTextScorer(model, processor, verbose=False).score(captions, records)
    scorer = ImageTextScorer(model.to(DEVICE), processor, dtype=dtype, verbose=False)
    found = scorer.score(captions, records)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=tolerance, atol=tolerance)


def test_a_resumed_run_equals_one_never_stopped(tmp_path):
    """Dropout too: the generator of the device is part of a checkpoint."""
    batch = to_device(tiny.pretraining_batch())

    def started(checkpoint=None):
        accelerator = new_accelerator(Computing("no"), cpu=not ON_GPU)
        torch.manual_seed(1)
        model = UnicoderVLForPreTraining(tiny.config(**LARGE)).train()
        # AdamW would make steps of the rounding that GPUs do not repeat.
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-1, momentum=0.9)
        model, optimizer = accelerator.prepare(model, optimizer)
        save_weights_as_pretrained(accelerator)
        if checkpoint is not None:
            accelerator.load_state(str(checkpoint))
        return accelerator, model, optimizer

    def take(steps, accelerator, model, optimizer):
        for _ in range(steps):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
        return {name: weight.detach().cpu() for name, weight in accelerator.unwrap_model(model).named_parameters()}

    accelerator, *rest = started()
    take(2, accelerator, *rest)
    folder = CheckpointFolder(tmp_path)
    folder.save({"step": 2}, {}, accelerator, tiny.processor(), Computing("no"))
    wanted = take(2, accelerator, *rest)
    found = take(2, *started(tmp_path / "checkpoint-2"))
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-5 if ON_GPU else 0, msg=name)
    assert isinstance(accelerator, Accelerator) and accelerator.device.type == DEVICE


def detector(model, device):
    from unicoder_vl_hf.regions.detectors.torchvision_models import TorchvisionDetector

    return TorchvisionDetector(model.to(device), device=torch.device(device), max_regions=10)


def test_a_detector_finds_what_it_finds_on_the_cpu():
    pytest.importorskip("torchvision")
    from test_torchvision_models import detect, tiny_model

    (on_cpu,), (here,) = (detect(detector(tiny_model(), device), photo(120, 80)) for device in ("cpu", DEVICE))
    torch.testing.assert_close(torch.tensor(here.boxes), torch.tensor(on_cpu.boxes), rtol=1e-3, atol=0.05)
    torch.testing.assert_close(torch.tensor(here.features), torch.tensor(on_cpu.features), rtol=1e-2, atol=1e-2)


def test_an_extraction_gives_what_it_gives_on_the_cpu(tmp_path):
    pytest.importorskip("torchvision")
    from test_torchvision_models import tiny_model

    from unicoder_vl_hf.regions.extraction import extract

    (tmp_path / "photos").mkdir()
    for number, size in enumerate(SIZES):
        photo(*size, seed=number).save(tmp_path / "photos" / f"{number}.png")
    stores = [
        extract(tmp_path / "photos", tmp_path / device, detector(tiny_model(), device), precision="no", num_workers=0)
        for device in dict.fromkeys(("cpu", DEVICE))
    ]
    assert len(stores[-1]) == len(SIZES)
    for image_id, record in stores[0].items():
        assert abs(stores[-1][image_id].features.astype("float32") - record.features.astype("float32")).max() < 0.05
