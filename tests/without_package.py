"""For scripts of the tests: hides unicoder_vl_hf, however it is installed, as in an environment without it."""

import sys
from importlib.abc import MetaPathFinder

PACKAGE = "unicoder_vl_hf"


class _Absent(MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] == PACKAGE:
            raise ModuleNotFoundError(f"No module named {fullname!r}: hidden by the test", name=fullname)
        return None


def hide_package():
    """Makes `import unicoder_vl_hf` fail in this process. An editable install is a finder too: ours comes first."""
    assert PACKAGE not in sys.modules
    sys.meta_path.insert(0, _Absent())
    try:
        __import__(PACKAGE)
    except ModuleNotFoundError:
        return
    raise AssertionError(f"{PACKAGE} could still be imported")
