"""Jobs cut into shares, as tasks of an array compute them: in any order, and again and again, they make the whole."""

import functools
import itertools
import json
import os
import random
import shutil
import subprocess

import numpy as np
import pytest
import scoring_process
import small_world
from places import EXAMPLES, script
from scoring_process import CAPTIONS, IMAGES

from unicoder_vl_hf import ImageTextScorer, RegionStore, UnicoderVLForImageTextRetrieval, UnicoderVLProcessor
from unicoder_vl_hf.cli import main as command
from unicoder_vl_hf.errors import run_script
from unicoder_vl_hf.scoring import FinishedShare, MissingShares, Share
from unicoder_vl_hf.scoring.blocks import BlockFolder
from unicoder_vl_hf.search import index as index_module
from unicoder_vl_hf.shares import in_ranges, run_shares
from unicoder_vl_hf.tasks.retrieval import mining, run_evaluation, run_two_stage

GATHER = ["--gather", "3"]


def share(index: int) -> list[str]:
    return ["--share", f"{index}/3"]


@pytest.mark.parametrize("count, processes", list(itertools.product((1, 3, 5), (1, 2))))
def test_each_block_is_of_one_process_of_one_share(count, processes):
    parts = [Share(i, count).of_process(p, processes).blocks(17) for i in range(count) for p in range(processes)]
    assert sorted(itertools.chain.from_iterable(parts)) == list(range(17))
    assert list(Share(None, count).of_process(1, processes).blocks(17)) == []


@pytest.mark.parametrize("values", [("3/3", None), ("-1/3", None), ("3", None), ("a/b", None), ("1/3", 3), (None, 0)])
def test_what_is_no_share_is_refused(values):
    with pytest.raises(ValueError, match=r"expected (--share )?I/N"):
        Share.of_options(*values)


def test_options_are_read():
    assert Share.of_options(None, None) is None
    assert Share.of_options("0/1", None) == Share(0, 1) and Share.of_options(None, 8) == Share(None, 8)


def test_ranges_are_those_of_an_array():
    assert in_ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8" and in_ranges([4]) == "4"


# The scorer


def scorer(part: Share | None = None) -> ImageTextScorer:
    made = scoring_process.scorer()
    made.share = part
    return made


@pytest.mark.parametrize("seed", range(2))
def test_shares_of_scores_make_the_whole(tmp_path, seed):
    """Some of them twice, and one cut short; then the ones that were missing."""
    whole = scorer().score(CAPTIONS, IMAGES, output_dir=tmp_path / "whole")
    folder, rng = tmp_path / "shares", random.Random(seed)
    late, cut, *early = rng.sample(range(5), 5)
    for index in [*early, *rng.sample(early, 2)]:
        with pytest.raises(FinishedShare, match=rf"share {index}/5 is computed.*--gather 5 in place of --share"):
            scorer(Share(index, 5)).score(CAPTIONS, IMAGES, output_dir=folder)
    with pytest.raises(FinishedShare):
        scorer(Share(cut, 5)).score(CAPTIONS, IMAGES, output_dir=folder)
    last = max(folder.glob("*.blocks"), key=lambda path: path.stat().st_mtime_ns)
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(MissingShares) as error:
        scorer(Share(None, 5)).score(CAPTIONS, IMAGES, output_dir=folder)
    assert error.value.indices == sorted([late, cut])
    assert f"--share {min(late, cut)}/5" in str(error.value) and not (folder / "scores.npy").exists()
    for index in (late, cut):
        with pytest.raises(FinishedShare):
            scorer(Share(index, 5)).score(CAPTIONS, IMAGES, output_dir=folder)
    assert np.array_equal(scorer(Share(None, 5)).score(CAPTIONS, IMAGES, output_dir=folder), whole)
    assert (folder / "scores.npy").read_bytes() == (tmp_path / "whole" / "scores.npy").read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == ["job.json", "scores.npy"]
    with pytest.raises(FinishedShare):  # after all is put together
        scorer(Share(0, 5)).score(CAPTIONS, IMAGES, output_dir=folder)
    assert np.array_equal(scorer(Share(None, 5)).score(CAPTIONS, IMAGES, output_dir=folder), whole)


def test_without_a_share_the_same_call_computes_what_is_missing(tmp_path, monkeypatch):
    whole = scorer().score(CAPTIONS, IMAGES)
    for part in (Share(0, 3), Share(1, 4)):  # whose blocks overlap
        with pytest.raises(FinishedShare):
            scorer(part).score(CAPTIONS, IMAGES, output_dir=tmp_path)
    written, write = [], BlockFolder.write
    monkeypatch.setattr(
        BlockFolder,
        "write",
        lambda self, block, values: (written.append(block), write(self, block, values)),
    )
    assert np.array_equal(scorer().score(CAPTIONS, IMAGES, output_dir=tmp_path), whole)
    assert written == [block for block in range(36) if block % 3 != 0 and block % 4 != 1]


def test_a_share_ends_though_all_was_gathered_and_removed_meanwhile(tmp_path, monkeypatch):
    monkeypatch.setattr(BlockFolder, "_wait_until", lambda self, condition, what: condition() or pytest.fail(what))
    folder = BlockFolder(tmp_path / "scores", {"pairs": 2}, share=Share(0, 2))
    folder.write(0, np.zeros(1, dtype=np.float32))
    shutil.rmtree(tmp_path / "scores")
    with pytest.raises(FinishedShare):
        folder.result(2, (2,), np.atleast_1d)


def test_a_share_needs_a_folder():
    with pytest.raises(ValueError, match=r"share 0/2 of a job, which meet in a folder: give output_dir"):
        scorer(Share(0, 2)).score(CAPTIONS, IMAGES)


def test_the_missing_shares_of_all_parts_are_named():
    def lacking(*indices):
        raise MissingShares(indices, 9, "a part")

    parts = [functools.partial(lacking, 2, 1), lambda: "whole", functools.partial(lacking, 7)]
    with pytest.raises(MissingShares, match=r"scores lacks blocks of 3 of 9 shares: 1-2,7\..*--array=1-2,7\)"):
        run_shares(parts, "scores")
    run_shares([lambda: "whole"], "scores")


# The commands, whose jobs are of few blocks


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A checkpoint with a first stage, a store, and captions whose validation split is the test."""
    folder = tmp_path_factory.mktemp("world")
    model, captions, regions = small_world.save_retrieval(folder / "model", small_world.build(folder), spread=0.2)
    search = UnicoderVLForImageTextRetrieval.from_pretrained(model, projection_dim=8)
    search.config.first_stage_trained = True
    search.save_pretrained(folder / "search")
    UnicoderVLProcessor.from_pretrained(model).save_pretrained(folder / "search")
    return str(folder / "search"), captions, regions


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    small = functools.partial(ImageTextScorer, block_pairs=64, verbose=False)
    for module in (mining, run_evaluation, run_two_stage):
        monkeypatch.setattr(module, "ImageTextScorer", small)
    monkeypatch.setattr(index_module, "BLOCK_ITEMS", 4)


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "state.json"}  # has a random name


def shared(run, capsys, caplog, missing: str) -> None:
    """Runs a command in three shares, in an order of its own, and gathers too early and in time."""
    assert run(*share(2)) == 0
    assert "share 2/3 is computed" in caplog.text
    assert run(*share(0)) == 0
    capsys.readouterr()
    assert run(*GATHER) == 1
    assert missing in capsys.readouterr().err
    assert run(*share(1)) == 0
    assert run(*GATHER) == 0


def test_an_index_in_shares(world, tmp_path, capsys, caplog):
    model, _, regions = world

    def run(name, *options):
        return command(["index", regions, "--model", model, "--output", str(tmp_path / name), *options])

    assert run("whole") == 0
    shared(
        functools.partial(run, "shares"),
        capsys,
        caplog,
        "lacks blocks of 1 of 3 shares: 1. Run the same command with --sh",
    )
    assert files(tmp_path / "shares") == files(tmp_path / "whole")
    assert run("shares", *share(1)) == 0  # which is finished
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "shares"}
    assert run("shares", "--restart", *share(1)) == 1 and "cannot begin anew for all" in capsys.readouterr().err
    assert files(tmp_path / "shares") == files(tmp_path / "whole")


def test_an_index_grows_in_shares(world, tmp_path, capsys, caplog):
    model, _, regions = world
    some = tmp_path / "some.jsonl"
    rows = [{"image_id": image_id, "caption": "a dog"} for image_id in list(RegionStore(regions))[:7]]
    some.write_text("\n".join(map(json.dumps, rows)))

    def run(name, *options):
        return command(["index", regions, "--model", model, "--output", str(tmp_path / name), *options])

    for name in ("whole", "shares"):
        assert run(name, "--images-of", str(some)) == 0
    assert run("whole", "--add") == 0
    capsys.readouterr()
    shared(functools.partial(run, "shares", "--add"), capsys, caplog, "1 of 3 shares: 1.")
    assert files(tmp_path / "shares") == files(tmp_path / "whole")


@pytest.mark.parametrize("first_stage", [[], ["--candidates", "9"]])
def test_mining_in_shares(world, tmp_path, capsys, caplog, first_stage):
    def run(name, *options):
        return command(["mine", *world, str(tmp_path / name), "--images-per-set", "10", *first_stage, *options])

    assert run("whole") == 0
    shared(functools.partial(run, "shares"), capsys, caplog, "--array=1), then gather again")
    assert files(tmp_path / "shares") == files(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "shares"}
    assert run("shares", *share(0)) == 0
    assert run("shares", "--restart", *GATHER) == 1 and (tmp_path / "shares").exists()


@pytest.mark.parametrize("name", ["evaluate_retrieval", "evaluate_two_stage"])
def test_an_evaluation_in_shares(world, tmp_path, capsys, caplog, name):
    """That of two precisions has two folders, whose missing shares are named together."""
    model, captions, regions = world
    precision = ["--mixed_precision", "bf16"] if name == "evaluate_retrieval" else []
    words = ["--model", model, "--captions", captions, "--regions", regions, "--split", "val", *precision]
    main = script(name).main

    def run(folder, *options):
        output = ["--scores_dir", str(tmp_path / folder), "--output", str(tmp_path / f"{folder}.json")]
        try:
            run_script(lambda: main([*words, *output, *options]))
        except SystemExit as ended:
            return ended.code
        return 0

    assert run("whole") == 0
    shared(functools.partial(run, "shares"), capsys, caplog, "lacks blocks of 1 of 3 shares: 1")
    table = capsys.readouterr().out
    whole, gathered = (json.loads((tmp_path / f"{folder}.json").read_text()) for folder in ("whole", "shares"))
    for of in (whole, gathered):
        for row in of.get("report", {}).get("rows", []):
            row.pop("seconds")  # unknown where scores were there
    key = "results" if precision else "report"
    assert gathered[key] == whole[key] and "R@1" in table
    scores = sorted((tmp_path / "whole").glob("**/scores.npy"))
    assert len(scores) == (2 if precision else 1)
    for path in scores:
        assert path.read_bytes() == (tmp_path / "shares" / path.relative_to(tmp_path / "whole")).read_bytes()
    with pytest.raises(ValueError, match=r"--share 0/3: shares meet in a folder; give --scores_dir"):
        main([*words, *share(0)])


# Slurm

SLURM = EXAMPLES / "slurm"
SBATCH = """\
#!/bin/bash
# Runs what is submitted: the tasks of an array one after another.
set -euo pipefail
tasks=none
while [[ $1 == --* ]]; do
    case $1 in
    --array=*) tasks=$(seq ${1#--array=0-} -1 0) ;;
    --dependency=*) echo "after ${1#--dependency=}" >&2 ;;
    esac
    shift
done
for task in $tasks; do SLURM_ARRAY_TASK_ID=$task "$@" >&2; done
echo "77;cluster"
"""


def test_slurm_scripts_are_bash():
    scripts = sorted(SLURM.glob("*.sh"))
    assert len(scripts) == 5
    for path in scripts:
        checked = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
        assert (checked.returncode, checked.stderr) == (0, "")
        assert os.access(path, os.X_OK) and "set -euo pipefail" in path.read_text()


def test_an_array_on_slurm(tmp_path):
    """By an sbatch that runs what it is given, as the real one does at some time on some machine."""
    (tmp_path / "sbatch").write_text(SBATCH)
    (tmp_path / "sbatch").chmod(0o755)
    path = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    words = [SLURM / "array.sh", "3", "echo", "unicoder-vl", "mine", "two words"]
    ran = subprocess.run(words, env=os.environ | path, capture_output=True, text=True)
    assert ran.returncode == 0
    lines = [f"unicoder-vl mine two words --share {index}/3" for index in (2, 1, 0)]
    assert ran.stderr.splitlines() == [*lines, "after afterany:77", "unicoder-vl mine two words --gather 3"]
