"""`--restart`: what a command wrote is replaced, anything else is left alone."""

import pytest

from unicoder_vl_hf.files import begun_anew, locked
from unicoder_vl_hf.regions.shards import STORE


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "store"


def fill(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text(f"old {name}")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_complete_stays_until_the_new_one_is(folder, tmp_path, caplog):
    fill(folder, "manifest.json", "regions-00000.safetensors")
    with begun_anew(folder, True, STORE):
        assert not folder.exists()
        (before,) = tmp_path.iterdir()
        assert names(before) == ["manifest.json", "regions-00000.safetensors"] and str(before) in caplog.text
        fill(folder, "manifest.json")
    assert names(tmp_path) == ["store"] and names(folder) == ["manifest.json"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_fails_before_it_begins_changes_nothing(folder, tmp_path, error):
    fill(folder, "manifest.json")
    with pytest.raises(error), begun_anew(folder, True, STORE):
        raise error
    assert names(tmp_path) == ["store"] and names(folder) == ["manifest.json"]


def test_a_stopped_restart_goes_on(folder, tmp_path):
    parts = tmp_path / "store.parts"
    fill(folder, "manifest.json")
    with pytest.raises(KeyboardInterrupt), begun_anew(folder, True, STORE, parts):
        fill(parts, "part-00000-00000")
        raise KeyboardInterrupt
    assert names(tmp_path) == [".store.before-restart", "store.parts"]
    with begun_anew(folder, False, STORE, parts):
        assert names(tmp_path) == [".store.before-restart", "store.parts"]
        fill(folder, "manifest.json")
    assert names(tmp_path) == ["store", "store.parts"]


def test_what_is_unfinished_is_removed(folder, tmp_path):
    parts = tmp_path / "store.parts"
    fill(folder, "unfinished.json", "regions-00000.safetensors")
    fill(parts, "part-00000-00000", "skipped-00000.jsonl")
    with begun_anew(folder, True, STORE, parts):
        assert names(tmp_path) == []


def test_restarted_again_what_was_complete_still_stays(folder, tmp_path):
    fill(folder, "manifest.json")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), begun_anew(folder, True, STORE):
            fill(folder, "unfinished.json")
            raise KeyboardInterrupt
    assert names(tmp_path / ".store.before-restart") == ["manifest.json"]


@pytest.mark.parametrize("place", ["store", "store.parts"])
def test_what_is_no_part_of_an_output_is_never_removed(folder, tmp_path, place):
    fill(folder, "manifest.json")
    fill(tmp_path / place, "notes.txt")
    with (
        pytest.raises(ValueError, match=f"{place} holds 'notes.txt', which is no part of a region store"),
        begun_anew(folder, True, STORE, tmp_path / "store.parts"),
    ):
        pytest.fail("the block is not entered")
    assert (folder / "manifest.json").exists() and (tmp_path / place / "notes.txt").exists()
    with begun_anew(folder, False, STORE, tmp_path / "store.parts"):
        pass  # without a restart nothing is removed, and nothing is asked


def test_a_file_is_never_removed(folder):
    folder.write_text("a file")
    with pytest.raises(ValueError, match="is a file, no region store"), begun_anew(folder, True, STORE):
        pytest.fail("the block is not entered")
    assert folder.exists()


def test_what_is_being_written_is_not_removed(folder, monkeypatch):
    monkeypatch.setattr("unicoder_vl_hf.files.LOCK_PATIENCE", 0)
    fill(folder, "unfinished.json")
    with locked(folder), pytest.raises(ValueError, match="being written"), begun_anew(folder, True, STORE):
        pytest.fail("the block is not entered")
    assert names(folder) == ["unfinished.json"]


def test_a_link_to_a_store_stays_a_link(folder, tmp_path):
    elsewhere = tmp_path / "large_disk"
    elsewhere.mkdir()
    fill(elsewhere / "real", "manifest.json")
    folder.symlink_to(elsewhere / "real")
    with begun_anew(folder, True, STORE):
        assert folder.is_symlink() and names(elsewhere) == [".real.before-restart"]
        fill(elsewhere / "real", "manifest.json")
    assert folder.is_symlink() and names(elsewhere) == ["real"]
