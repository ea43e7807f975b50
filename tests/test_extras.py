"""Libraries that not every user has."""

import configparser
import re
import sys

import pytest
from places import EXAMPLES, ROOT

from unicoder_vl_hf.extras import optional_import


def test_what_is_not_installed_is_told_by_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"^This needs h5py: pip install '.\[hdf5\]'"):
        optional_import("h5py", "hdf5")


@pytest.mark.parametrize(
    ("body", "says"),
    [("raise ImportError('libhdf5.so.103: no such file')", "libhdf5.so.103"), ("import not_here", "not_here")],
)
def test_what_is_installed_and_fails_is_no_matter_of_an_extra(body, says, tmp_path, monkeypatch):
    (tmp_path / "broken_library.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=f"^broken_library is installed, but cannot be imported: .*{says}"):
        optional_import("broken_library", "hdf5")


def test_the_space_names_what_the_package_needs():
    """Its requirements are those of setup.cfg, and its Gradio one that the extra allows."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    needed = setup["options"]["install_requires"] + setup["options.extras_require"]["detection"]
    written = [line for line in (EXAMPLES / "app" / "requirements.txt").read_text().splitlines() if line[0] != "#"]
    assert written == [line for line in needed.splitlines() if line and not line.startswith("#")]
    version = re.search(r"^sdk_version: (\S+)$", (EXAMPLES / "app" / "README.md").read_text(), re.MULTILINE)[1]
    assert f"gradio>={version.rpartition('.')[0]},<7" in setup["options.extras_require"]["app"]
