"""
The rooms of the house and the direction of their imports, lazy ones included: downwards, never in a circle, and no task
knows another. docs/architecture.md says what each room is for.
"""

import ast
import configparser
from fnmatch import fnmatch
from functools import cache

import pytest
from places import ROOT

SOURCE, PACKAGE = ROOT / "src", "unicoder_vl_hf"
# From the top down. A room may import those below it, and rooms of one floor nothing of one another.
FLOORS = [
    ["cli"],
    ["app"],
    ["scripts"],
    ["tasks"],
    ["serving"],
    ["search"],
    ["runs"],
    ["scenes"],
    ["data"],
    ["scoring", "checkpoints"],
    ["regions"],
    ["registration"],
    ["pictures", "modeling_unicoder_vl", "processing_unicoder_vl"],
    ["feature_extraction_unicoder_vl"],
    ["configuration_unicoder_vl", "records_unicoder_vl"],
    ["pipeline_unicoder_vl"],
    ["processes", "shares"],
    ["files", "name_lists", "errors"],
    ["extras", "logging", "_version"],
]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


@cache
def imports() -> dict[str, set[str]]:
    """The modules of the package that each module imports, in functions and for types, too."""
    files = {}
    for path in (SOURCE / PACKAGE).rglob("*.py"):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        is_room = parts[-1] == "__init__"
        files[".".join(parts[:-1] if is_room else parts)] = (path, is_room)
    found = {module: _imported(module, *place, set(files)) for module, place in files.items()}
    for module, (path, is_room) in files.items():
        if (stub := path.with_suffix(".pyi")).exists():  # what a room loads lazily
            found[module] |= _imported(module, stub, is_room, set(files))
    return found


def _imported(module, path, is_room, known):
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            here = module.split(".") if is_room else module.split(".")[:-1]
            base = [] if not node.level else here[: len(here) + 1 - node.level]
            origin = ".".join([*base, *([node.module] if node.module else [])])
            names = {f"{origin}.{alias.name}" for alias in node.names}
            found |= (names & known) or {origin}
    return {name for name in found if name.split(".")[0] == PACKAGE} - {module}


def room(module: str) -> str:
    return module.split(".")[1]


ALL = sorted((module, target) for module, targets in imports().items() for target in targets if module != PACKAGE)


def test_every_room_has_its_floor():
    assert {room(module) for module in imports() if module != PACKAGE} == set(FLOOR_OF)


@pytest.mark.parametrize("module, target", ALL, ids=[f"{module}-{target}" for module, target in ALL])
def test_imports_point_downwards(module, target):
    assert target != PACKAGE, f"{module} imports the package itself, which is above it"
    if room(module) != room(target):
        assert FLOOR_OF[room(module)] < FLOOR_OF[room(target)], f"{module} imports {target}, which is not below it"
    elif room(module) == "tasks" and min(module.count("."), target.count(".")) > 1:
        assert module.split(".")[2] == target.split(".")[2], f"{module} imports another task: {target}"


def test_there_is_no_circle():
    left = {module: targets - {PACKAGE} for module, targets in imports().items() if module != PACKAGE}
    while free := {module for module, targets in left.items() if not targets & left.keys()}:
        left = {module: targets for module, targets in left.items() if module not in free}
    assert not left, f"these import one another: {sorted(left)}"


def test_a_wheel_holds_every_file():
    """Of the files beside the modules, such as the stubs by which rooms load, setuptools takes those that are named."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    named = {package: patterns.replace(",", " ").split() for package, patterns in setup["options.package_data"].items()}
    for path in (SOURCE / PACKAGE).rglob("*.*"):
        package = ".".join(path.parent.relative_to(SOURCE).parts)
        patterns = [*named["*"], *named.get(package, ())]
        taken = path.suffix == ".py" or any(fnmatch(path.name, pattern) for pattern in patterns)
        assert taken or "__pycache__" in path.parts, path
