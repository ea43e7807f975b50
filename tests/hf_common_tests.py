"""Brings Hugging Face's own common tests, which the wheel of transformers lacks and its source distribution carries.

`load(name)` imports one of their modules; the sdist of the installed version comes through pip the first time and is
kept under `.pytest_cache`. It has the `test_*_common.py` files and not what they import beside them: `STUBS` stands in.
Left out with those: the tests of `generate` and of model export.
"""

import importlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType

import pytest
import transformers

CACHE = Path(__file__).parents[1] / ".pytest_cache" / f"transformers-{transformers.__version__}"
# Not `tests`: other packages, and users' own folders, have that name. Their imports of one another are relative.
PACKAGE = "transformers_common_tests"

STUBS = {
    f"{PACKAGE}/__init__.py": "",
    f"{PACKAGE}/exporters/__init__.py": "",
    f"{PACKAGE}/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    f"{PACKAGE}/generation/__init__.py": "",
    f"{PACKAGE}/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    f"{PACKAGE}/utils/__init__.py": "",
    # Values that differ from every default, for ConfigTester to find again.
    f"{PACKAGE}/utils/test_configuration_utils.py": (
        "config_common_kwargs = {\n"
        "    'return_dict': False,\n"
        "    'output_hidden_states': True,\n"
        "    'output_attentions': True,\n"
        "    'dtype': 'float16',\n"
        "    'chunk_size_feed_forward': 5,\n"
        "    'architectures': ['BertModel'],\n"
        "    'is_encoder_decoder': True,\n"
        "    'id2label': {0: 'label'},\n"
        "    'label2id': {'label': '0'},\n"
        "    'problem_type': 'regression',\n"
        "}\n"
    ),
    "utils/fetch_hub_objects_for_ci.py": "def url_to_local_path(url):\n    return url\n",
}


def load(module: str) -> ModuleType:
    """Imports `module` (such as `test_modeling_common`), or skips the test module that asks for it."""
    if not (CACHE / PACKAGE).is_dir():
        try:
            _fetch()
        except (OSError, subprocess.SubprocessError, tarfile.TarError) as error:
            detail = getattr(error, "stderr", None) or str(error)
            pytest.skip(
                f"Hugging Face's common tests cannot be had: pip gave no sdist of transformers "
                f"{transformers.__version__} ({detail.strip().splitlines()[-1]})",
                allow_module_level=True,
            )
    if str(CACHE) not in sys.path:
        sys.path.append(str(CACHE))
    return importlib.import_module(f"{PACKAGE}.{module}")


def _fetch():
    CACHE.parent.mkdir(exist_ok=True)
    # Built aside and renamed at the end: an interrupted or a second simultaneous fetch leaves nothing half-made.
    with tempfile.TemporaryDirectory(dir=CACHE.parent) as folder:
        build = Path(folder)
        requirement = f"transformers=={transformers.__version__}"
        options = [
            "--quiet",
            "--disable-pip-version-check",
            "--retries",
            "1",
            "--no-deps",
            "--no-binary",
            "transformers",
        ]
        subprocess.run(
            [sys.executable, "-m", "pip", "download", *options, "--dest", folder, requirement],
            check=True,
            capture_output=True,
            text=True,
            timeout=240,
        )
        (archive,) = build.glob("transformers-*.tar.gz")
        with tarfile.open(archive) as tar:
            root = archive.name.removesuffix(".tar.gz")
            wanted = [member for member in tar.getmembers() if member.name.startswith(f"{root}/tests/")]
            tar.extractall(build, members=wanted, filter="data")
        made = build / "made"
        shutil.move(build / root / "tests", made / PACKAGE)
        for path, source in STUBS.items():
            (made / path).parent.mkdir(parents=True, exist_ok=True)
            (made / path).write_text(source)
        if not CACHE.exists():
            made.rename(CACHE)
