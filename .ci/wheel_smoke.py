"""
Tries an installed wheel, in a folder that is no checkout: what loads lazily is there, and the files beside the code; a
store and a checkpoint are written and read, and the command answers.
"""

import importlib
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np

import unicoder_vl_hf
from unicoder_vl_hf import RegionRecord, RegionStoreWriter, UnicoderVLConfig, UnicoderVLForImageTextRetrieval

package = files(unicoder_vl_hf)
assert Path(str(package)).is_relative_to(sys.prefix), f"{package} is not in {sys.prefix}"
for name in ("py.typed", "gallery.html", "runs/model_card.md"):
    assert package.joinpath(name).is_file(), name
for stub in Path(str(package)).rglob("__init__.pyi"):
    room = importlib.import_module(".".join(("unicoder_vl_hf", *stub.relative_to(str(package)).parts[:-1])))
    assert room.__all__, room
    for name in room.__all__:
        try:
            getattr(room, name)
        except ImportError as error:
            assert "pip install '.[" in str(error), (room, name)  # it says which extra it needs

with RegionStoreWriter("regions", detector="smoke") as writer:
    writer.write(RegionRecord("a", boxes=[[0, 0, 1, 1]], features=np.ones((1, 4), np.float32)))
config = UnicoderVLConfig(
    vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, region_feature_dim=4
)
UnicoderVLForImageTextRetrieval(config).save_pretrained("model")
assert Path("model/modeling_unicoder_vl.py").is_file()  # for those who lack the package
UnicoderVLForImageTextRetrieval.from_pretrained("model")
for arguments in (["--version"], ["inspect", "regions"], ["validate", "regions"]):
    subprocess.run([Path(sys.executable).with_name("unicoder-vl"), *arguments], check=True)
