"""Photos behind a URL: those of S3, from moto's server on the loopback address, give what those of a folder give."""

import json
import pickle

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("moto.server", reason="needs moto[server]")

from moto.server import ThreadedMotoServer
from photos import as_tables, as_tar
from pyarrow.fs import FileSystem, LocalFileSystem, copy_files
from test_extraction import bits, run, save_photos, skipped

from unicoder_vl_hf.cli import main as command
from unicoder_vl_hf.regions.photos import HIDDEN, list_photos


@pytest.fixture(scope="module")
def url():
    """Gives the URL of a path in a bucket, with all that a client must know of its server."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    _, port = server.get_host_and_port()
    options = f"endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1&allow_bucket_creation=true"
    yield f"s3://key:secret@bucket/{{}}?{options}".format
    server.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, url):
    """Photos in folders, as a .tar and as tables, here and in the bucket."""
    folder = tmp_path_factory.mktemp("folder")
    photos = save_photos(folder / "photos", 10)
    (photos / "photo_003.png").write_bytes(b"no photo")
    as_tar(photos, folder / "0.tar")
    as_tables(photos, folder / "tables")
    for name in ("a", "a0", "b/c"):  # so that their order by name is not that of whole paths
        (photos / name).mkdir(parents=True)
        (photos / f"photo_00{4 + len(name)}.png").rename(photos / name / f"{name[0]}.png")
    (photos / ".hidden.png").write_bytes(b"x")
    (photos / "notes.txt").write_text("x")
    filesystem, _ = FileSystem.from_uri(url(""))
    filesystem.create_dir("bucket")
    copy_files(str(folder), "bucket", source_filesystem=LocalFileSystem(), destination_filesystem=filesystem)
    return folder


@pytest.mark.parametrize("name", ["photos", "0.tar", "tables", "tables/1.parquet", "photos/a/a.png"])
def test_a_bucket_gives_what_a_folder_gives(tmp_path, folder, url, name):
    here = run(folder / name, tmp_path / "here", ids="path", num_workers=1)
    there = run(url(name), tmp_path / "there", ids="path", num_workers=1)
    assert bits(there) == bits(here) and skipped(there) == skipped(here)
    path = there.path / "skipped.jsonl"
    for row in map(json.loads, path.read_text().splitlines() if path.exists() else []):
        assert row["file"].startswith(f"s3://bucket/{name}") and "secret" not in row["file"]


def test_a_listing_can_be_sent_and_cut(folder, url):
    source = list_photos(url("photos"), ids="path")
    assert {reason for _, reason in source.left_out} == {HIDDEN, ".txt is no suffix of photos"}
    place = source.ids.index("photo_000.png")
    some = pickle.loads(pickle.dumps(source.only([place, 2])))
    assert some.ids == ["photo_000.png", source.ids[2]]
    assert some.read(0) == (folder / "photos/photo_000.png").read_bytes() and some.name(0) == source.name(place)


def test_the_command_takes_a_url(tmp_path, url, capsys):
    words = [str(tmp_path / "store"), "--detector", "grid:x"]
    assert command(["extract", url("nothing"), *words]) == 1
    assert "s3://bucket/nothing does not exist." in capsys.readouterr().err
    assert command(["extract", "gopher://photos", *words]) == 1
    assert "gopher://photos" in capsys.readouterr().err
