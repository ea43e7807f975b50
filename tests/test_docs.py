"""What README and docs say exists: linked files, scripts, their options, Python that parses and names that import."""

import ast
import contextlib
import dataclasses
import doctest
import functools
import importlib
import inspect
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import docs_world
import numpy as np
import pytest
from PIL import Image
from places import EXAMPLES, ROOT, script
from transformers import AutoTokenizer

from unicoder_vl_hf import UnicoderVLForPreTraining
from unicoder_vl_hf.cli import build_parser
from unicoder_vl_hf.scenes.world import sample_scene, scene_captions
from unicoder_vl_hf.scoring.onnx_export import export_onnx

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(params=PAGES, ids=lambda path: path.name)
def page(request):
    return request.param


def blocks(page: Path, language: str) -> list[str]:
    return code_of(page.read_text(encoding="utf-8"), language)


def code_of(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_imports_are_from_rooms(page):
    """From the package, or from a room that names what it offers; never from a module inside."""
    text = page.read_text(encoding="utf-8")
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "unicoder_vl_hf":
                offered = getattr(importlib.import_module(node.module), "__all__", [])
                assert {alias.name for alias in node.names} <= set(offered), f"{node.module} is no room, or lacks one"
    for place in re.findall(r"`unicoder_vl_hf\.([a-z_.]+)\.(?:\w+)`", text):
        assert hasattr(importlib.import_module(f"unicoder_vl_hf.{place}"), "__path__"), place


# What a page makes itself, and what is in the way of that.
MADE = {"extraction": ["regions", "vcr-regions"], "regions": ["my-regions"]}
NEEDED: dict = {"pretrained": {"peft": None}, "retrieval": {"lancedb": None, "qdrant_client": None}}
NEEDED["scoring"] = {"sentence_transformers": None, "onnxruntime": None, "onnxscript": None, "transformers": "5.24"}
# Why a block of Python is not run, as the page says in a comment before it that no reader sees.
NOT_RUN = re.compile(r"<!-- not run: (.+) -->\n+```python\n")


@pytest.fixture(scope="module")
def run_page(tmp_path_factory):
    """Runs a page's blocks in their order, in one namespace and a small world of its own; gives both."""
    world = tmp_path_factory.mktemp("docs")
    with contextlib.chdir(world):
        docs_world.build()

    @functools.cache
    def run(page: Path) -> tuple[Path, dict]:
        for library, version in NEEDED.get(page.stem, {}).items():
            pytest.importorskip(library, minversion=version)
        folder, names = tmp_path_factory.mktemp(page.stem) / "world", {"__name__": page.stem}
        shutil.copytree(world, folder, ignore=shutil.ignore_patterns(*MADE.get(page.stem, [])))
        with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(folder)
            if page.stem == "scoring":
                export_onnx("runs/mine-retrieval", "mine.onnx")
            for code in code_of(NOT_RUN.sub("```\n", page.read_text(encoding="utf-8")), "python"):
                exec(compile(code, str(page), "exec"), names)
        return folder, names

    return run


def test_python_runs(page, run_page):
    run_page(page)


def test_few_blocks_are_not_run():
    reasons = [(page.name, why) for page in PAGES for why in NOT_RUN.findall(page.read_text(encoding="utf-8"))]
    assert reasons == [
        ("regions.md", "it needs an account of the Hub"),
        ("scoring.md", "it fetches a data set of the Hub"),
    ]


def test_new_weights_without_a_network(run_page):
    """The folder that the page makes is a BERT to begin with, whose tokenizer knows the captions."""
    folder, _ = run_page(ROOT / "docs" / "pretraining.md")
    tokenizer = AutoTokenizer.from_pretrained(folder / "new-bert")
    assert (
        tokenizer.decode(tokenizer("A dog runs on the grass.")["input_ids"]) == "[CLS] a dog runs on the grass. [SEP]"
    )
    model = UnicoderVLForPreTraining.from_bert(folder / "new-bert", region_feature_dim=4)
    assert model.config.vocab_size == len(tokenizer) and model.config.num_hidden_layers == 6


def test_the_page_of_own_detectors_has_one(run_page):
    _, names = run_page(ROOT / "docs" / "own_detector.md")
    detector = names["Colours"](device="cpu", precision="no", cells=3)
    photo = Image.new("RGB", (90, 60), (51, 102, 255))
    (record,) = detector([detector.prepare(photo)], ["photo"])
    assert record.boxes[-1].tolist() == [60, 40, 90, 60] and len(record) == 9
    np.testing.assert_allclose(record.features, [[0.2, 0.4, 1.0]] * 9, rtol=1e-6)


def test_commands_of_the_package_parse(page):
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            _, command, arguments = line.partition("unicoder-vl ")
            if command and not line.startswith("#"):
                build_parser().parse_args(shlex.split(arguments, comments=True))  # exits on what it does not know


def test_commands_name_scripts_and_options_that_exist(page):
    for block in blocks(page, "bash"):
        for command in block.replace("\\\n", " ").splitlines():
            named = re.search(
                r"(?:examples/(?!slurm/|launching/)|-m unicoder_vl_hf\.(?=tasks|scripts))([\w.]+)(.*)", command
            )
            if named is None:
                continue
            known = options_of(named[1].removesuffix(".py"))
            for option in re.findall(r"--(\w+)", named[2]):
                assert option in known or option.removeprefix("no_") in known, f"{named[1]} --{option}"


def options_of(name: str) -> set[str]:
    """The options of a script: of a loop that parses its own, or of the dataclasses of the others."""
    if name.endswith("_loop"):
        return set(re.findall(r'add_argument\("--(\w+)"', (EXAMPLES / f"{name}.py").read_text()))
    module = vars(importlib.import_module(f"unicoder_vl_hf.{name}") if "." in name else script(name))
    fields = {
        field.name
        for value in module.values()
        if isinstance(value, type) and dataclasses.is_dataclass(value)
        for field in dataclasses.fields(value)
    }
    return fields | {"recipe"} if module.keys() & {"STRONG", "RECIPES"} else fields


@pytest.mark.parametrize("name", ["foil", "retrieval", "vqa"])
def test_examples_of_metrics_print_what_they_say(name):
    """Those of docstrings that need no data."""
    module, found = importlib.import_module(f"unicoder_vl_hf.tasks.{name}.metrics"), 0
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for value in vars(module).values():
        if callable(value) and value.__module__ == module.__name__ and ">>>" in (value.__doc__ or ""):
            text = re.sub("^ *```.*$", "", inspect.getdoc(value), flags=re.MULTILINE)
            runner.run(doctest.DocTestParser().get_doctest(text, dict(vars(module)), value.__name__, None, 0))
            found += 1
    assert found and runner.summarize(verbose=False).failed == 0


def test_nothing_points_at_an_index_that_lacks_the_package():
    files = [*ROOT.glob("*.md"), ROOT / "setup.cfg"]
    for folder in ("docs", "examples", "metrics", "src"):
        files += [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md", ".html")]
    for path in files:
        assert not re.search(r"pip install ['\"]?unicoder|pypi\.org/project/unicoder", path.read_text("utf-8")), path


def test_every_page_is_in_the_list_of_the_readme_and_of_the_site():
    readme, site = (ROOT / "README.md").read_text("utf-8"), (ROOT / "mkdocs.yml").read_text("utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f"](docs/{page.name})" in readme.partition("## Documentation")[2], page.name
        assert f"- {page.name}\n" in site, page.name


def test_what_is_sought_in_the_demo_is_there():
    """The demo's index holds the test scenes of seed 0, of which one has this very caption."""
    (sought,) = re.findall(r'unicoder-vl search "(.*)" --index demo/test-scenes', (ROOT / "README.md").read_text())
    assert any(sought in scene_captions(sample_scene(index, "test")) for index in range(150))


def test_make_targets_exist(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for block in blocks(page, "bash"):
        for target in re.findall(r"^make ([\w-]+)", block, re.MULTILINE):
            assert target in targets


def test_an_install_without_the_build_for_cpus_says_what_could_not_be_had(tmp_path):
    """No environment is made: what stands in for one reaches no index."""
    (tmp_path / "bin").mkdir()
    for name, code in (("pip", 0), ("python", 1)):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\nexit {code}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    def says(*words: str) -> str:
        words = ("make", "install", f"VENV={tmp_path}", "TORCH=cpu", f"PYTHON={sys.executable}", *words)
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and not (tmp_path / ".installed").exists()
        return done.stderr

    assert "come from https://download.pytorch.org/whl/cpu: leave TORCH=cpu out, or give a mirror, TORCH_IND" in says()
    assert "PyTorch for CPUs did not come from file:///mirror: " in says("TORCH_INDEX=file:///mirror")


def test_the_paper_is_where_its_page_says():
    """Each row names a file and a symbol that it defines, perhaps with its value."""
    text = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|.*\| `(\S+\.py)` \| `(.+)` \|$", text, re.MULTILINE)
    assert len(rows) == len(re.findall(r"^\|.*\.py", text, re.MULTILINE)) > 40
    for file, symbol in rows:
        name, _, value = symbol.partition(" = ")
        *owner, last = name.split(".")
        body = ast.parse((ROOT / "src" / "unicoder_vl_hf" / file).read_text(encoding="utf-8")).body
        for class_name in owner:
            (body,) = [node.body for node in body if isinstance(node, ast.ClassDef) and node.name == class_name]
        (found,) = [node for node in body if last in names_of(node)]
        if value:
            assert ast.dump(default_of(found)) == ast.dump(ast.parse(value, mode="eval").body), symbol


def names_of(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def default_of(node: ast.stmt) -> ast.expr:
    """What is assigned, or the default of an option of the command line."""
    value = node.value
    return value.args[0] if isinstance(value, ast.Call) and value.func.id == "option" else value
