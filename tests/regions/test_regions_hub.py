"""Stores go to a local stub of the Hub and come back: equal bytes, and no more of them than asked for."""

import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from hub_stub import HubStub
from places import TESTS

import unicoder_vl_hf

REPO = "datasets/someone/regions"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def hub():
    with HubStub() as hub:
        yield hub
    assert hub.unknown == []


@pytest.fixture(scope="module")
def run(hub, folder):
    """Gives what region_hub_client.py says of an action, and what it asked the Hub for. Its own cache begins empty."""
    paths = [TESTS, Path(unicoder_vl_hf.__file__).parents[1]]
    environment = hub.environment(folder / "home") | {"PYTHONPATH": ":".join(map(str, paths))}
    with (folder / "errors").open("w") as errors:
        client = subprocess.Popen(
            [sys.executable, TESTS / "region_hub_client.py", folder],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )

    def ask(action: str) -> tuple[dict, list[str]]:
        before = len(hub.requests)
        client.stdin.write(f"{action}\n")
        client.stdin.flush()
        answer = client.stdout.readline()
        assert answer, f"{(folder / 'errors').read_text()[-4000:]}\nunanswered: {hub.unknown}"
        return json.loads(answer), hub.requests[before:]

    with client:
        yield ask


@pytest.fixture(scope="module")
def pushed(run) -> tuple[dict, list[str]]:
    return run("push")


def test_bytes_on_the_hub_are_those_of_the_folder(hub, folder, pushed):
    assert pushed[0]["names"] == ["someone/regions"] * 3
    files = hub.files(REPO)
    local = {path.name: path.read_bytes() for path in (folder / "store").iterdir()}
    assert {name: content for name, content in files.items() if name != "README.md"} == local
    assert not (folder / "store" / "README.md").exists()


def test_a_second_push_sends_no_shard_again(pushed):
    uploads = [request for request in pushed[1] if "PUT /lfs" in request]
    assert len(uploads) == len(set(uploads))


def test_the_manifest_is_in_the_last_commit_of_a_push(hub, pushed):
    """After the first commit there are shards and no store."""
    first = hub.repositories[REPO][1]
    assert any(name.startswith("regions-") for name in first)
    assert "manifest.json" not in first and "index.safetensors" not in first


def test_the_card_says_what_the_manifest_says(hub, pushed):
    card = huggingface_hub.DatasetCard(hub.files(REPO)["README.md"].decode())
    assert card.data.tags == ["region-features", "image-text", "vision-language", "unicoder-vl-hf"]
    assert card.data.size_categories == "n<1K"
    for row in ("| images | 30 |", "| detector | vg |", "| box type | unknown |", "| feature dim | 8 |"):
        assert row in card.text, row
    assert "class \\| 0, class \\| 1" in card.text and "(11 in all)" in card.text
    assert 'RegionStore.from_hub("someone/regions")' in card.text
    assert 'store["photo_0"]' in card.text


def test_a_card_written_by_hand_stays(hub, pushed):
    assert hub.files("datasets/someone/other")["README.md"] == b"# By hand\n"


def test_only_the_shards_needed_are_fetched(hub, run, pushed):
    found, requests = run("fetch")
    shards = [name for name in hub.files(REPO) if name.startswith("regions-")]
    asked = {
        request.split("/")[-1] for request in requests if request.startswith(("GET", "HEAD")) and "resolve" in request
    }
    assert len(shards) > 5
    assert len(asked) == 4
    assert found["some"] == sorted(asked)
    assert {"manifest.json", "index.safetensors"} < asked
    assert "name the images you need in RegionStore.from_hub" in found["error"]
    assert "nobody" in found["unknown"]
    assert "image_ids is 'nobody', expected several: give a list, ['nobody']" in found["no list"]


def test_a_whole_store_comes_back_to_the_byte(hub, folder, pushed):
    found, _ = pushed
    local = {path.name: path.read_bytes() for path in (folder / "store").iterdir()}
    assert {path.name: path.read_bytes() for path in Path(found["folder"]).iterdir()} == local
    assert "cache" in found["error"]
