"""Where things are, for tests in any room."""

import importlib
import re
from pathlib import Path
from types import ModuleType

TESTS = Path(__file__).parent
ROOT = TESTS.parent
SHARED = ROOT.parent / "shared"  # data for development, which the tests skip without
EXAMPLES = ROOT / "examples"


def script(name: str) -> ModuleType:
    """The module of the package that `examples/<name>.py` calls, or one of the tests by its own name."""
    caller = EXAMPLES / f"{name}.py"
    if caller.exists():
        (name,) = re.findall(r'"(unicoder_vl_hf\.\S+):main"', caller.read_text())
    return importlib.import_module(name)
