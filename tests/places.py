"""Where things are, for tests in any room."""

import sys
from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
SHARED = ROOT.parent / "shared"  # data for development, which the tests skip without
EXAMPLES = ROOT / "examples"


def examples_on_path() -> None:
    """Makes the scripts importable."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
