"""Extraction on Ray, here on two CPUs: the store of the local run, to the bit, whatever was killed meanwhile."""

import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="needs the extra [ray]")
pytest.importorskip("torchvision")

import ray
from photos import as_tables, as_tar
from test_extraction import bits, save_photos, shared, skipped
from two_processes import Processes

from unicoder_vl_hf import RegionStore
from unicoder_vl_hf.cli import main as command
from unicoder_vl_hf.regions.extraction import extract
from unicoder_vl_hf.shares import Share

DETECTOR = "ray_client:Convolution"


@pytest.fixture(scope="module", autouse=True)
def address():
    """The address of a Ray of two CPUs, whose processes find the modules that this one finds."""
    folder = tempfile.mkdtemp(prefix="ray-")  # a longer path than this is none of a socket
    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR", "_temp_dir": folder}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # by default they wait for every other process of the machine
        for attempt in range(3):
            try:
                started = ray.init(num_cpus=2, object_store_memory=200 * 2**20, **options)
                break
            except Exception as error:  # a raylet gives up after 15 s, within which a busy machine does not start it
                ray.shutdown()
                if attempt == 2:
                    pytest.skip(f"Ray did not start on this machine in three attempts: {error}")
        yield started.address_info["gcs_address"]
        ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = save_photos(tmp_path / "photos", 13)
    (folder / "photo_005.png").write_bytes(b"no photo")
    return folder


def run(photos, output, detector=DETECTOR, **options) -> RegionStore:
    return extract(photos, output, detector, **{"device": "cpu", "num_workers": 0, "share_size": 4, **options})


def computed(log: Path) -> Counter:
    """How often a detector saw each photo."""
    return Counter(line for file in log.glob("detectors/*") for line in file.read_text().split())


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def until(condition, what) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.01)


def test_the_command_writes_what_the_local_run_and_its_shares_write(tmp_path, photos, capsys):
    source = str(as_tar(photos, tmp_path / "0.tar"))
    words = ["extract", source, str(tmp_path / "store"), "--detector", DETECTOR, "--device", "cpu"]
    words += ["--engine", "ray", "--share-size", "4"]
    assert command(words) == 0 and "images       12" in capsys.readouterr().out
    store, whole = RegionStore(tmp_path / "store"), run(source, tmp_path / "whole")
    assert bits(store) == bits(whole)
    assert skipped(store) == skipped(whole) == {"photo_005": "its 8 bytes are no image of a known format"}
    shared(source, tmp_path / "shares/store", *(Share(index, 4) for index in range(4)), detector=DETECTOR, device="cpu")
    gathered = run(source, tmp_path / "shares/store", share=Share(None, 4))
    assert files(store.path) == files(gathered.path)
    assert not (tmp_path / "store.parts").exists()


def test_killed_workers_cost_a_share_at_most(tmp_path, photos):
    source, log = as_tables(photos, tmp_path / "tables"), tmp_path / "log"
    options = {"log": str(log), "delay": 0.1, "engine": "ray"}
    thread = threading.Thread(target=run, args=(source, tmp_path / "store"), kwargs=options)
    thread.start()
    until(lambda: log.exists() and sum(computed(log).values()) == 6, thread.is_alive)
    for kind in ("detectors", "decoders"):
        for process in (log / kind).iterdir():
            os.kill(int(process.name), signal.SIGKILL)
    thread.join()
    assert bits(RegionStore(tmp_path / "store")) == bits(run(source, tmp_path / "whole"))
    seen = computed(log)
    assert len(list((log / "detectors").iterdir())) == 2 and len(seen) == 12
    assert 1 <= sum(count - 1 for count in seen.values()) <= 4


def test_a_killed_driver_costs_a_share_at_most(tmp_path, photos, address):
    log = tmp_path / "log"
    call = {"photos": photos, "output": tmp_path / "store", "detector": DETECTOR, "device": "cpu", "share_size": 4}
    call |= {"log": str(log), "delay": 0.1, "engine": "ray"}
    # Its process is forked of one that may be older than this Ray, and so knows nothing of it.
    of_ray = {name: value for name, value in os.environ.items() if name.startswith("RAY_")}
    arguments = {**call, "environment": of_ray | {"RAY_ADDRESS": address}}
    driver = Processes(tmp_path, [{"script": "ray_client", "arguments": arguments}], 1)
    try:
        until(lambda: log.exists() and sum(computed(log).values()) == 10, driver.outputs[0].read_text)
    finally:
        driver.kill()
    assert not (tmp_path / "store").exists()
    store = extract(**call)
    assert bits(store) == bits(run(photos, tmp_path / "whole"))
    seen = computed(log)
    assert len(seen) == 12 and 1 <= sum(count - 1 for count in seen.values()) <= 4


def test_a_detector_that_fails_ends_the_run_and_what_was_before_is_kept(tmp_path, photos):
    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        run(photos, tmp_path / "store", fails_from="photo_003", engine="ray", share_size=13)
    store = run(photos, tmp_path / "store", log=str(tmp_path / "log"))
    assert bits(store) == bits(run(photos, tmp_path / "whole"))
    assert len(computed(tmp_path / "log")) == 9  # of 12
