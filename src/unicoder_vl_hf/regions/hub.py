"""
Stores on the Hub: a dataset repository holds the files of the folder unchanged, and a card made from the manifest.

`RegionStore.push_to_hub` and `RegionStore.from_hub` are what users call.
"""

import json
import os
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete

from ..records_unicoder_vl import check_several
from .shards import INDEX, MANIFEST, Index, Shards, read_manifest

CARD, SHARDS = "README.md", "regions-*.safetensors"
# Marks a card that we wrote, and may write again.
MARK = "<!-- Written from manifest.json by unicoder-vl-hf. Take this line out to keep your changes. -->"


def push_store(
    path: Path,
    manifest: dict[str, Any],
    repo_id: str,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    commit_message: str,
) -> str:
    """Uploads a store to a dataset repository; see `RegionStore.push_to_hub`."""
    api = huggingface_hub.HfApi(token=token)
    repo_id = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
    shards = [facts["file"] for facts in manifest["shards"]]
    place: dict[str, Any] = {"repo_id": repo_id, "repo_type": "dataset", "revision": revision}
    api.upload_folder(folder_path=path, allow_patterns=SHARDS, commit_message=f"{commit_message}: shards", **place)
    # The last commit holds all of these: a download meanwhile gets the old store or the new one.
    present = api.list_repo_files(**place)
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(name, path / name) for name in (INDEX, MANIFEST)
    ]
    if (path / CARD).exists():
        operations.append(CommitOperationAdd(CARD, path / CARD))
    elif CARD not in present or _is_ours(api, repo_id, revision):
        operations.append(CommitOperationAdd(CARD, dataset_card(path, manifest, repo_id).encode()))
    stale = [name for name in present if fnmatch(name, SHARDS) and name not in shards]
    operations.extend(CommitOperationDelete(name) for name in stale)
    api.create_commit(operations=operations, commit_message=commit_message, **place)
    return repo_id


def fetch_store(
    repo_id: str,
    revision: str | None,
    image_ids: Iterable[str] | None,
    cache_dir: str | os.PathLike | None,
    token: str | bool | None,
    local_files_only: bool,
) -> Path:
    """Downloads a store from the Hub and gives its folder in the cache; see `RegionStore.from_hub`."""

    def fetch(names: list[str], revision: str | None, pattern: str | None = None) -> Path:
        folder = huggingface_hub.snapshot_download(
            repo_id,
            repo_type="dataset",
            revision=revision,
            allow_patterns=pattern or names,
            cache_dir=None if cache_dir is None else str(cache_dir),
            token=token,
            local_files_only=local_files_only,
        )
        missing = [name for name in names if not Path(folder, name).exists()]
        if missing:
            raise FileNotFoundError(f"{repo_id} lacks {missing[0]} ({len(missing)} files in all): see {folder}.")
        return Path(folder)

    folder = fetch([MANIFEST, INDEX], revision)
    manifest = read_manifest(folder)
    shards = Shards(folder, manifest["shards"])
    numbers: Iterable[int] = range(len(shards))
    if image_ids is not None:
        check_several("image_ids", image_ids)
        index = Index(folder, manifest["images"])
        numbers = sorted({shards.number_of(index.number_of(image_id)) for image_id in image_ids})
    names = [shards.facts[number]["file"] for number in numbers]
    # The folder is named after its commit, so that a push in between changes nothing.
    return fetch(names, folder.name, SHARDS if image_ids is None else None)


def dataset_card(path: Path, manifest: dict[str, Any], repo_id: str) -> str:
    """Gives the README.md of the store in a folder, for the repository `repo_id`."""
    metadata = huggingface_hub.DatasetCardData(
        pretty_name=repo_id.split("/")[-1],
        tags=["region-features", "image-text", "vision-language", "unicoder-vl-hf"],
        size_categories=_size_category(manifest["images"]),
    )
    shards = manifest["shards"]
    facts = {
        "images": f"{manifest['images']:,}",
        "regions": f"{manifest['regions']:,}",
        "size": f"{sum(shard['bytes'] for shard in shards) / 1e9:,.2f} GB in {len(shards)} shards",
        **{name.replace("_", " "): _in_words(value) for name, value in manifest["provenance"].items()},
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    example = Index(path, manifest["images"]).image_ids[0]
    return _CARD.format(
        metadata=metadata, mark=MARK, repo_id=repo_id, rows=rows, example=json.dumps(example, ensure_ascii=False)
    )


_CARD = """---
{metadata}
---

{mark}

# {repo_id}

Region features of images: for each image the boxes that a detector found, the feature of each, and its class where
known. A store of unicoder-vl-hf.

| | |
|---|---|
{rows}

## Use

```python
from unicoder_vl_hf import RegionStore

store = RegionStore.from_hub("{repo_id}")  # image_ids=[...] fetches no more than these need
record = store[{example}]
record.features, record.boxes, record.object_ids  # NumPy, mapped from the file
```

The shards are [safetensors](https://huggingface.co/docs/safetensors): `features` and the other fields are flat over all
regions of a shard, and image `i` has the rows `region_offsets[i]` to `region_offsets[i + 1]`.
"""


def _is_ours(api: huggingface_hub.HfApi, repo_id: str, revision: str | None) -> bool:
    path = api.hf_hub_download(repo_id, CARD, repo_type="dataset", revision=revision)
    return MARK in Path(path).read_text(encoding="utf-8")


def _in_words(value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, list) and len(value) > 10:
        return f"{', '.join(map(str, value[:10]))}, … ({len(value)} in all)".replace("|", "\\|")
    return (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).replace("|", "\\|")


def _size_category(images: int) -> str:
    """Gives the name that the Hub has for this number of rows."""
    bounds = [1_000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_000]
    names = ["n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B"]
    return names[sum(images >= bound for bound in bounds)]
