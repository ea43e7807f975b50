"""Run by test_regions_hub.py in a process whose Hub is the stub: `region_hub_client.py FOLDER`, actions to JSON."""

import json
import sys
from pathlib import Path

from region_stores import assert_same, make, write_store

from unicoder_vl_hf import RegionStore

REPO = "someone/regions"


def push(folder: Path) -> dict:
    """A store, the same again, and after it grew; another one whose folder holds a card of its own."""
    options = {"shard_size": 1000, "detector": "vg", "class_names": [f"class | {k}" for k in range(11)]}
    names = []
    store = write_store(map(make, range(20)), folder / "store", **options)
    names.append(store.push_to_hub("regions", private=True))
    names.append(store.push_to_hub("someone/regions", commit_message="Once more"))
    store = write_store(map(make, range(30)), folder / "store", resume=True, **options)
    names.append(store.push_to_hub(REPO))
    other = write_store(map(make, range(5)), folder / "other", shard_size=1000)
    other.push_to_hub("someone/other")
    (folder / "other" / "README.md").write_text("# By hand\n")
    other.push_to_hub("someone/other")
    (folder / "other" / "README.md").unlink()
    other.push_to_hub("someone/other")  # the card that is there now is none of ours
    return {"names": names, **fetch_all(folder)}


def fetch(folder: Path) -> dict:
    """Two images of different shards, and what cannot be had."""
    wanted = [make(2).image_id, make(25).image_id]
    some = RegionStore.from_hub(REPO, image_ids=wanted)
    for number in (2, 25):
        assert_same(some[make(number).image_id], make(number))
    assert len(some) == 30 and list(some) == [make(number).image_id for number in range(30)]
    found = {"some": sorted(path.name for path in some.path.iterdir())}
    lost = next(n for n in range(30) if some.shards.number_of(n) not in {some.shards.number_of(k) for k in (2, 25)})
    try:
        some[make(lost).image_id]
    except FileNotFoundError as error:
        found["error"] = str(error)
    try:
        RegionStore.from_hub(REPO, image_ids=["nobody"])
    except KeyError as error:
        found["unknown"] = str(error)
    try:
        RegionStore.from_hub(REPO, image_ids="nobody")
    except ValueError as error:
        found["no list"] = str(error)
    return found


def fetch_all(folder: Path) -> dict:
    """Everything, then again from the cache alone, and from a cache that has nothing."""
    whole = RegionStore.from_hub(REPO, cache_dir=folder / "cache")
    for number, record in enumerate(whole.values()):
        assert_same(record, make(number))
    again = RegionStore.from_hub(REPO, cache_dir=folder / "cache", local_files_only=True)
    assert again.path == whole.path and len(again) == 30
    try:
        RegionStore.from_hub(REPO, cache_dir=folder / "nothing", local_files_only=True)
    except FileNotFoundError as error:
        return {"folder": str(whole.path), "error": str(error)}
    return {}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps({"push": push, "fetch": fetch}[line.strip()](Path(sys.argv[1]))), flush=True)
