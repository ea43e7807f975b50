"""Run by test_remote_code.py: `python -I remote_code_client.py FOLDER`, without the package.

Loads every checkpoint in FOLDER/saved by every Auto class with trust_remote_code, saves each again to FOLDER/again,
loads those in turn, and writes what came of it to FOLDER/remote.json.
"""

import importlib.util
import json
import sys
from pathlib import Path


def sibling(name: str):
    """-I leaves the script's own folder out of the path."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(folder: Path):
    sibling("without_package").hide_package()
    inspect_checkpoint = sibling("checkpoint_matrix").inspect_checkpoint
    found = {}
    for saved in sorted((folder / "saved").iterdir()):
        found[f"saved/{saved.name}"] = inspect_checkpoint(saved, resave=folder / "again", trust_remote_code=True)
    for again in sorted((folder / "again").iterdir()):
        found[f"again/{again.name}"] = inspect_checkpoint(again, trust_remote_code=True)
    assert "unicoder_vl_hf" not in sys.modules
    (folder / "remote.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
