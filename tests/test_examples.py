"""examples/: short callers of the package's scripts, which end as these do, and loops that can be read."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import places
import pytest

CALLERS = sorted(path for path in places.EXAMPLES.glob("*.py") if not path.stem.endswith("_loop"))


@pytest.fixture(params=CALLERS, ids=lambda path: path.stem)
def caller(request):
    return request.param


def load(path: Path):
    """The file as a module of its own, whatever else has its name."""
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def python(*words: str | Path, folder: Path, **environment: str):
    """A run of Python in `folder`, in which the package is not."""
    source = str(places.ROOT / "src")
    paths = os.pathsep.join([environment.pop("first", source), source])
    variables = os.environ | {"PYTHONPATH": paths} | environment
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=variables, capture_output=True, text=True, timeout=240
    )


def test_a_caller_is_the_script_of_the_package(caller, monkeypatch, capsys):
    module = places.script(caller.stem)
    assert module.__name__.startswith("unicoder_vl_hf.") and len(caller.read_text().splitlines()) < 25
    monkeypatch.setattr("sys.argv", [caller.name])
    said = []
    for main in (module.main, load(caller).main):
        for words, code in ((["--help"], 0), (["--bogus"], 2)):
            with pytest.raises(SystemExit) as ended:
                main(words)
            assert ended.value.code == code
            said.append(capsys.readouterr())
    assert said[:2] == said[2:] and said[1].err.startswith(f"{caller.name}: ") and said[1].err.count("\n") == 1


def test_ctrl_c_while_a_caller_imports_ends_in_a_line(caller, tmp_path):
    (tmp_path / "transformers.py").write_text("raise KeyboardInterrupt\n")
    done = python(caller, "--help", folder=tmp_path, first=str(tmp_path))
    assert done.returncode == 130 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"{caller.name}: stopped.")


def test_a_script_runs_without_a_checkout(tmp_path):
    done = python("-m", "unicoder_vl_hf.tasks.pretraining.run", "--bogus", folder=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("run.py: ") and done.stderr.count("\n") == 1
