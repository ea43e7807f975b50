"""Unknown names: of models, before the Hub is asked, and of options, before argparse misses what they were to give."""

import os
import socket
import subprocess
import sys
import threading

import pytest

from unicoder_vl_hf.name_lists import check_model_name, unknown_option


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "runs/retreival",
            "runs holds no 'retreival'. Did you mean 'retrieval'? A repository of the Hub is not sought ",
        ),
        ("runs/retrieval/checkpoint-7", "runs/retrieval holds no 'checkpoint-7'."),
        ("./retreival", "HERE holds no 'retreival'."),
        ("rnus/retrieval/checkpoint-30", "HERE holds no 'rnus'. Did you mean 'runs'?"),
        ("HERE/runs/retreival", "HERE/runs holds no 'retreival'. Did you mean 'retrieval'?"),
        ("~/retrieval", "HERE holds no '~'."),
    ],
)
def test_a_name_that_no_repository_can_have_is_that_of_a_folder(name, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "retrieval" / "checkpoint-30").mkdir(parents=True)
    name, says = (text.replace("HERE", str(tmp_path)) for text in (name, says))
    with pytest.raises(ValueError) as caught:
        check_model_name(name)
    assert str(caught.value).startswith(f"There is no {name}: {says}")
    assert ("Hub" in str(caught.value)) == (name == "runs/retreival")
    for found in ("runs", "runs/retrieval", "./runs", "google-bert/bert-base-uncased", "bert-base-uncased"):
        check_model_name(found)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["score", __file__, "a dog", "--model", "dmeo"], "There is no model 'dmeo': no folder of that name with a co"),
        (["extract", "photos", "new", "--detector", "grid:dmeo"], "grid:dmeo cannot be loaded: there is no folder "),
    ],
)
def test_where_the_hub_is_out_of_reach_it_is_asked_once(command, says, tmp_path):
    """What listens here hangs up at once, and counts; huggingface_hub alone calls six times, with pauses."""
    calls = []

    def hang_up():
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            calls.append(connection.recv(100))
            connection.close()

    (tmp_path / "demo").mkdir()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").touch()  # nobody comes to look into it
    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=hang_up, daemon=True).start()
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{listening.getsockname()[1]}", "HF_HOME": str(tmp_path)}
        variables = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | hub
        words = [sys.executable, "-m", "unicoder_vl_hf.cli", *command]
        done = subprocess.run(words, env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and sum(b"/dmeo/" in call for call in calls) == 1, (done.stderr, calls)
    assert done.stderr.startswith(f"unicoder-vl {command[0]}: {says}")
    assert done.stderr.endswith(" Did you mean 'demo'?\n") and done.stderr.count("\n") == 1


def test_an_unknown_option_is_found_among_values():
    known = ["--model", "--fp16", "-o"]
    assert unknown_option(["a --dash", "--model=--x", "-o", "--fp16", "--", "--modle"], known) is None
    assert unknown_option(["--model", "x", "--modle=y"], known) == "there is no option --modle. Did you mean '--model'?"
    assert unknown_option(["--bf16"], known) == "there is no option --bf16. Did you mean '--fp16'?"
    assert unknown_option(["--zzz", "--modle"], known) == "there is no option --zzz."
