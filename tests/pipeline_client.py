"""Run by test_photos.py, without the package: `python -I pipeline_client.py MODEL RECORD PHOTO CAPTION …`."""

import importlib.util
import json
import sys
from pathlib import Path

spec = importlib.util.spec_from_file_location("without_package", Path(__file__).with_name("without_package.py"))
without_package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(without_package)
without_package.hide_package()

from transformers import pipeline  # noqa: E402

model, record, photo, *captions = sys.argv[1:]
matcher = pipeline("image-text-matching", model=model, trust_remote_code=True)
assert "unicoder_vl_hf" not in sys.modules
found = matcher(Path(record), text=captions)
try:
    matcher(photo, text=captions)
except ValueError as error:
    print(json.dumps([found, str(error)]))
