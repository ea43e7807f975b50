"""Prints the lowest version of each library that setup.cfg allows, as constraints for pip."""

import re
from configparser import ConfigParser
from pathlib import Path

setup = ConfigParser()
setup.read(Path(__file__).parents[1] / "setup.cfg", encoding="utf-8")
for requirements in (setup["options"]["install_requires"], *setup["options.extras_require"].values()):
    for name, version in re.findall(r"^([\w-]+)(?:\[.+\])?>=([\w.]+)", requirements, re.MULTILINE):
        print(f"{name}=={version}")
