"""The inputs of the commands that `chaos.py` kills, and a detector. `python chaos_inputs.py FOLDER` makes them."""

import sys
from pathlib import Path

import numpy as np

from unicoder_vl_hf import RegionRecord


class Colours:
    """A detector that finds the whole photo, and its mean colour."""

    provenance = {"detector": "colours", "detector_revision": "1"}

    def __init__(self, *, device, precision):
        pass

    def prepare(self, image):
        return np.asarray(image)

    def __call__(self, prepared, image_ids, boxes=None):
        return [self._record(image_id, pixels) for image_id, pixels in zip(image_ids, prepared, strict=True)]

    def _record(self, image_id, pixels):
        height, width, _ = pixels.shape
        colour = pixels.mean((0, 1), keepdims=True)[0] / 255
        return RegionRecord(
            image_id, image_width=width, image_height=height, boxes=[(0, 0, width, height)], features=colour
        )


def main(folder: Path) -> None:
    import region_stores
    import small_world
    from photos import photo

    from unicoder_vl_hf import UnicoderVLForImageTextRetrieval
    from unicoder_vl_hf.regions.conversion import export
    from unicoder_vl_hf.scenes.world import build_scenes

    (folder / "photos").mkdir(parents=True)
    for seed in range(24):
        photo(8, 6, seed).save(folder / "photos" / f"{seed:02d}.png")
    (folder / "photos" / "broken.png").write_text("no photo")
    whole = [record for record in map(region_stores.make, range(1, 200, 2)) if complete(record)][:24]
    export(region_stores.write_store(whole, folder / "whole"), folder / "features.tsv", "lxmert-tsv")
    lines = (folder / "features.tsv").read_bytes().splitlines(keepends=True)
    lines.insert(15, lines[4].replace(b"photo", b"broken")[:-9] + b"\n")
    (folder / "features.tsv").write_bytes(b"".join(lines))
    for part in range(3):
        region_stores.write_store(map(region_stores.make, range(8 * part, 8 * part + 8)), folder / "parts" / str(part))

    world = build_scenes(folder / "world", num_train=18, num_val=6, num_test=2, captions_per_image=2)
    model, _, _ = small_world.save_retrieval(folder / "model", world, spread=0.2, projection_dim=8)
    trained = UnicoderVLForImageTextRetrieval.from_pretrained(model)
    trained.config.first_stage_trained = True
    trained.save_pretrained(model)
    small_world.save_bert(folder / "bert_with_dropout", dropout=0.1)
    small_world.save_lively_bert(folder / "lively_bert")


def complete(record: RegionRecord) -> bool:
    """Tells whether a record has the fields that a TSV of LXMERT holds."""
    return record.boxes is not None and record.object_ids is not None and record.image_width is not None


if __name__ == "__main__":
    main(Path(sys.argv[1]))
