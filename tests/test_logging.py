"""Bars and log lines: silence is silence, in every process and for every bar."""

import ast
import io
import os
import subprocess
import sys

import datasets
import pytest
import tiny
from places import ROOT

from unicoder_vl_hf import UnicoderVLForImageTextRetrieval, logging
from unicoder_vl_hf.errors import run_script

FILES = [*(ROOT / "src").rglob("*.py"), *(ROOT / "examples").glob("*.py")]


@pytest.mark.parametrize("loaded", ["", "import transformers\n"])
@pytest.mark.parametrize("variable", ["TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "NOTHING"])
def test_bars_obey(variable, loaded):
    """Also one that says which processes show it: False is no wish to be seen."""
    code = f"""{loaded}
from unicoder_vl_hf import logging
for options in ({{}}, {{"disable": False}}, {{"disable": True}}):
    for _ in logging.tqdm(range(2), desc=str(options), **options):
        pass
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("TQDM_DISABLE",)} | {variable: "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    shown = [name for name in ("{}:", "{'disable': False}:", "{'disable': True}:") if name in done.stderr]
    assert shown == (["{}:", "{'disable': False}:"] if variable == "NOTHING" else [])


def test_one_bar_at_a_time(capsys):
    """One within another stands in its place, and leaves it to it: no line is ever below the first."""
    with logging.tqdm(range(2), desc="Training") as around:
        list(logging.tqdm(range(3), desc="Evaluating", leave=False))
        around.update()
    shown = capsys.readouterr().err
    assert "Evaluating:" in shown and shown.index("Evaluating") < shown.rindex("Training: ")
    assert shown.count("\n") == 1 and "\x1b[A" not in shown


def test_there_is_no_other_bar():
    """`tqdm(…)` by itself lets `disable=False` overrule TQDM_DISABLE."""
    bars = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in FILES
        if path.name != "logging.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Call) and ast.unparse(node.func) in ("tqdm", "trange", "tqdm.tqdm", "auto.tqdm"))
        or (
            isinstance(node, ast.ImportFrom)
            and node.module == "transformers.utils"
            and not path.stem.endswith("_unicoder_vl")
            and "logging" in [alias.name for alias in node.names]
        )
    ]
    assert bars == []


def test_a_script_shows_bars_of_ours_alone(tmp_path, capfd):
    """Not those of datasets and transformers, in its run and no longer."""
    rows = datasets.Dataset.from_dict({"image_id": ["a", "b", "c"]})
    model = tiny.model(UnicoderVLForImageTextRetrieval)

    def main():
        rows.select([2, 0]).flatten_indices()
        model.save_pretrained(tmp_path)
        UnicoderVLForImageTextRetrieval.from_pretrained(tmp_path)
        list(logging.tqdm(range(2), desc="Ours"))

    of_libraries = ["Flattening the indices", "Writing model shards", "Loading weights"]
    run_script(main)
    shown = capfd.readouterr().err
    assert "Ours" in shown and not [name for name in of_libraries if name in shown]
    main()
    shown = capfd.readouterr().err
    assert [name for name in of_libraries if name in shown] == of_libraries


def test_bars_of_libraries_that_are_imported_later_are_hidden_too():
    code = """
import sys
from unicoder_vl_hf import logging
with logging.without_bars_of_libraries():
    assert not sys.modules.keys() & {"transformers", "datasets"}
    import datasets
    from transformers.utils import logging as of_transformers
    rows = datasets.Dataset.from_dict({"a": [1, 2, 3]}).select([2, 0])
    rows.flatten_indices()
    list(of_transformers.tqdm(range(2), desc="of transformers, hidden"))
    sys.stderr.write("end of the block")
rows.select([1, 0]).flatten_indices()
list(of_transformers.tqdm(range(2), desc="of transformers, shown"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    within, _, after = done.stderr.partition("end of the block")
    assert done.returncode == 0 and within == "", done.stderr
    assert "Flattening the indices" in after and "of transformers, shown" in after


def test_colours_are_for_terminals(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    assert logging.coloured("a dog", 31, Terminal()) == "\x1b[31ma dog\x1b[0m"
    assert logging.coloured("a dog", 31, io.StringIO()) == "a dog"
    monkeypatch.setenv("NO_COLOR", "1")
    assert logging.coloured("a dog", 31, Terminal()) == "a dog"


def test_a_warning_is_given_once(caplog):
    logger = logging.get_logger("unicoder_vl_hf.test")
    for _ in range(2):
        logging.warn_once(logger, "a dog")
    assert caplog.text.count("a dog") == 1
