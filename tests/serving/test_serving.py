"""The server over HTTP: its answers are the scorer's, whoever asks together, and it takes no more than it should."""

import base64
import importlib
import json
import signal
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import photo_world
import pytest
import uvicorn
from fastapi import FastAPI
from photo_world import CAPTIONS, IDS
from photos import photo
from PIL import Image
from places import ROOT

from unicoder_vl_hf import ImageTextScorer, RegionStore
from unicoder_vl_hf.cli import main
from unicoder_vl_hf.regions import RegionFinder
from unicoder_vl_hf.scoring import Calibration
from unicoder_vl_hf.serving import Batcher, Limits, Photo, create_app, open_app

BOUNDS = Limits(max_waiting=8, max_bytes=200_000, max_pixels=120 * 80, max_documents=6)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return photo_world.build(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def expected(world) -> np.ndarray:
    """The scores of the captions with the images of the store, `(C, M)`."""
    scores = ImageTextScorer.from_pretrained(world / "model", world / "store", verbose=False).score(CAPTIONS, IDS)
    assert np.diff(np.sort(scores.ravel())).min() > 1e-4  # so that no answer passes for another
    return scores


@contextmanager
def running(app):
    """Serves an application in a thread, and gives its port."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def port(world):
    with running(open_app(str(world / "model"), str(world / "store"), limits=BOUNDS)) as port:
        yield port


def ask(port: int, path: str, body=None, **headers):
    """The status and the JSON of an answer; `body` is JSON, or bytes as they are."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    if body is None:
        connection.request("GET", path)
    else:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", path, data, {"Content-Type": "application/json"} | headers)
    answer = connection.getresponse()
    content = answer.read().decode()
    connection.close()
    return answer.status, json.loads(content) if "json" in answer.headers["content-type"] else content


def uri(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def encoded(image: Image.Image, format: str = "PNG") -> bytes:
    buffer = BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def relevance(answer: dict) -> list[tuple[int, float]]:
    return [(result["index"], result["relevance_score"]) for result in answer["results"]]


def assert_ranked(answer: dict, scores: np.ndarray, temperature: float = 1.0) -> None:
    """By score, the best first, with a relevance between 0 and 1."""
    places, values = zip(*relevance(answer), strict=True)
    assert list(places) == np.argsort(-scores).tolist()
    np.testing.assert_allclose(values, 1 / (1 + np.exp(-np.sort(scores)[::-1] / temperature)), atol=1e-5)


# Answers


def test_images_are_ranked_by_a_sentence(port, expected, world):
    status, answer = ask(port, "/v1/rerank", {"model": "model", "query": CAPTIONS[0], "documents": IDS})
    assert status == 200 and answer.keys() == {"id", "model", "usage", "results"}
    assert answer["model"] == "model" and answer["id"].startswith("rerank-")
    assert answer["usage"] == {"total_tokens": 9}  # seven words, [CLS] and [SEP]
    assert answer["results"][0].keys() == {"index", "relevance_score"}
    assert_ranked(answer, expected[0])


def test_photos_are_ranked_by_a_sentence(port, expected, world):
    """As data URIs and ids, plain and said to be images; the best, and with what was sent."""
    photos = [uri((world / "photos" / f"{name}.png").read_bytes()) for name in IDS]
    documents = [IDS[0], photos[1], {"image": IDS[2]}, {"image": photos[3]}, photos[4], IDS[5]]
    body = {"query": {"text": CAPTIONS[1]}, "documents": documents, "top_n": 3, "return_documents": True}
    status, answer = ask(port, "/v1/rerank", body)
    assert status == 200
    order = np.argsort(-expected[1])[:3].tolist()
    assert [result["index"] for result in answer["results"]] == order
    plain = [document["image"] if isinstance(document, dict) else document for document in documents]
    assert [result["document"] for result in answer["results"]] == [{"image": plain[place]} for place in order]


def test_sentences_are_ranked_by_an_image(port, expected, world):
    photo = uri((world / "photos" / f"{IDS[2]}.png").read_bytes())
    for query in ({"image": IDS[2]}, {"image": photo}, photo):
        body = {"query": query, "documents": [*CAPTIONS[:2], {"text": CAPTIONS[2]}], "return_documents": True}
        status, answer = ask(port, "/v1/rerank", body)
        assert status == 200
        assert_ranked(answer, expected[:, 2])
        assert answer["results"][0]["document"] == {"text": CAPTIONS[int(expected[:, 2].argmax())]}


def test_scores_of_one_query_and_of_pairs(port, expected):
    status, answer = ask(port, "/v1/score", {"queries": CAPTIONS[0], "documents": IDS})
    assert status == 200 and answer["object"] == "list"
    assert [(each["index"], each["object"]) for each in answer["data"]] == [(place, "score") for place in range(6)]
    np.testing.assert_allclose([each["score"] for each in answer["data"]], expected[0], atol=1e-5)
    body = {"text_1": [CAPTIONS[1], {"image": IDS[0]}, CAPTIONS[2]], "text_2": [IDS[3], CAPTIONS[1], {"image": IDS[1]}]}
    status, answer = ask(port, "/v1/score", body)
    scores = [each["score"] for each in answer["data"]]
    np.testing.assert_allclose(scores, [expected[1, 3], expected[1, 0], expected[2, 1]], atol=1e-5)


def test_the_relevance_of_a_calibrated_checkpoint_is_its_probability(world, expected, tmp_path):
    scorer = ImageTextScorer.from_pretrained(world / "model", verbose=False)
    scorer.model.config.calibration = vars(Calibration(2.5, 0.0, 1.0, 1.0, 10))
    scorer.model.save_pretrained(tmp_path)
    scorer.processor.save_pretrained(tmp_path)
    with running(open_app(str(tmp_path), str(world / "store"))) as port:
        _, answer = ask(port, "/v1/rerank", {"query": CAPTIONS[0], "documents": IDS})
    assert_ranked(answer, expected[0], temperature=2.5)


# What is refused


@pytest.mark.parametrize(
    "change, status, message",
    [
        ({"query": " "}, 422, "query is ' ': a sentence needs at least one word"),
        ({"query": {"text": "a", "image": "b"}}, 422, "give either text or image"),
        (
            {"query": {"image": IDS[0]}, "documents": [{"image": IDS[1]}]},
            422,
            "documents[0] is an image, and so is its",
        ),
        ({"documents": [{"text": "a dog"}]}, 422, "documents[0] is a sentence, and so is its query: expected an image"),
        ({"documents": []}, 422, "documents: List should have at least 1 item"),
        ({"documents": [7]}, 422, "documents.0.str: Input should be a valid string"),
        ({"documents": IDS + IDS}, 413, "12 documents; at most 6 are taken"),
        ({"documents": [IDS[0], "no id"]}, 422, "documents[1] is 'no id', neither the id of an image of the store nor"),
        ({"documents": ["data:image/png;base64,####"]}, 422, "documents[0] is no data URI of the form"),
        ({"documents": ["data:image/png,abc"]}, 422, "documents[0] is no data URI of the form"),
        ({"documents": [uri(b"nothing")]}, 422, "documents[0] is no photo: expected JPEG, PNG, WEBP, GIF, BMP"),
        ({"documents": [uri(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")]}, 422, "is no photo: expected"),
        ({"documents": [uri(encoded(photo(121, 80)))]}, 413, "documents[0] has 121 x 80 pixels; at most 9,600"),
        ({"documents": [uri(encoded(photo(90, 90))[:-60])]}, 422, "documents[0] is no photo that can be read"),
        ({"documents": ["http://[bad/a.png"]}, 422, "documents[0] is 'http://[bad/a.png', which is no URL"),
        ({"query": "\u200b"}, 422, "makes no token of the caption"),
        ({"documents": ["http://127.0.0.1/a.png"]}, 422, "this server fetches no photos of 127.0.0.1: send a data URI"),
        ({"model": "other"}, 404, "There is no model 'other': this server has 'model'"),
        ({"top_n": 0}, 422, "top_n: Input should be greater than or equal to 1"),
        ({"query": "a \ud800 dog"}, 422, "query is no text of Unicode"),
        ({"documents": ["\udfff"]}, 422, "documents[0] is no text of Unicode"),
    ],
)
def test_what_cannot_be_scored_is_said(port, change, status, message):
    found, answer = ask(port, "/v1/rerank", {"query": CAPTIONS[0], "documents": IDS} | change)
    assert found == status and message in answer["error"]["message"], answer
    assert answer["error"].keys() == {"message", "type", "code"} and answer["error"]["code"] == status


def test_no_file_of_the_machine_is_read(port, world, tmp_path, monkeypatch):
    """Whatever a string names, it is no file; and an id that is the name of a file, too, is the id."""
    monkeypatch.chdir(world / "photos")
    (tmp_path / "photo.png").write_bytes(encoded(photo(20, 20)))
    names = ["/etc/passwd", "../photos/photo_0.png", "photo_0.png", "file:///etc/passwd", str(tmp_path / "photo.png")]
    names += ["~/.ssh/id_rsa", "..", ".", "", "\0", str(world / "store"), "ftp://localhost/x", "FILE:photo_0.png"]
    for name in names:
        for body in ({"query": "a dog", "documents": [name]}, {"query": {"image": name}, "documents": ["a dog"]}):
            status, answer = ask(port, "/v1/rerank", body)
            assert status == 422 and "neither the id of an image" in answer["error"]["message"], (name, answer)
    (world / "photos" / IDS[0]).write_bytes(encoded(photo(20, 20, seed=9)))
    named = ask(port, "/v1/score", {"queries": CAPTIONS[0], "documents": IDS[0]})
    (world / "photos" / IDS[0]).unlink()
    assert named[1]["data"] == ask(port, "/v1/score", {"queries": CAPTIONS[0], "documents": IDS[0]})[1]["data"]


def test_what_is_no_request(port):
    assert ask(port, "/v1/rerank", b"{")[0] == 422 and ask(port, "/v1/rerank", b"[" * 50_000)[0] in (400, 422)
    assert ask(port, "/v1/other", {})[1]["error"]["type"] == "Not Found" and ask(port, "/v1/rerank")[0] == 405
    status, answer = ask(port, "/v1/rerank", b" " * 5_000_000)  # far more than the sockets hold
    assert status == 413 and answer["error"]["message"] == "The request has more than 200,000 bytes."
    status, answer = ask(port, "/v1/score", {"queries": CAPTIONS[:2], "documents": IDS[:3]})
    assert status == 422 and "2 queries, 3 documents" in answer["error"]["message"]
    assert ask(port, "/v1/score", {"queries": CAPTIONS[0], "documents": []})[0] == 422


def test_behind_a_prefix_limits_hold_too(world):
    app = open_app(str(world / "model"), str(world / "store"), limits=BOUNDS)
    outer = FastAPI(lifespan=app.router.lifespan_context)
    outer.mount("/api", app)
    body = {"query": CAPTIONS[0], "documents": IDS}
    with running(outer) as port:
        assert ask(port, "/api/v1/rerank", body)[0] == 200
        assert ask(port, "/api/v1/rerank", b" " * 300_000)[0] == 413
        counted = ask(port, "/api/metrics")[1]
    assert 'path="/v1/rerank",status="200"} 1.0' in counted and 'path="/v1/rerank",status="413"} 1.0' in counted


def test_a_scorer_whose_processor_has_the_store(world, expected):
    scorer = ImageTextScorer.from_pretrained(world / "model", verbose=False)
    scorer.processor.set_store(RegionStore(world / "store"))
    with running(create_app(scorer, "model")) as port:
        assert_ranked(ask(port, "/v1/rerank", {"query": CAPTIONS[0], "documents": IDS})[1], expected[0])
    with pytest.raises(ValueError, match=r"max_length=2; expected 3 to \d+, the positions of model"):
        create_app(scorer, "model", max_length=2)


def test_photos_of_a_host_that_is_named(world, expected):
    """Nothing else is fetched, wherever the host sends us."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            data = (world / "photos" / f"{IDS[0]}.png").read_bytes()
            self.send_response(302 if self.path == "/away" else 200)
            self.send_header("Location", f"http://localhost:{site.server_port}/photo")
            self.end_headers()
            self.wfile.write(data * 40 if self.path == "/large" else data)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as site, ExitStack() as stack:
        threading.Thread(target=site.serve_forever).start()
        stack.callback(site.shutdown)
        host = f"127.0.0.1:{site.server_port}"
        limits = Limits(photo_hosts=[host], max_bytes=100_000)
        with running(open_app(str(world / "model"), limits=limits)) as port:

            def score(url):
                return ask(port, "/v1/score", {"queries": CAPTIONS[0], "documents": url})

            np.testing.assert_allclose(score(f"http://{host}/photo")[1]["data"][0]["score"], expected[0, 0], atol=1e-5)
            assert score(f"http://{host}/large")[0] == 413
            assert "302" in score(f"http://{host}/away")[1]["error"]["message"]
            for other in (f"localhost:{site.server_port}", f"{host}@localhost", f"a@{host}", "169.254.169.254"):
                assert "fetches no photos" in score(f"http://{other}/photo")[1]["error"]["message"], other


@contextmanager
def begun(port: int, body: bytes):
    """A request of which the last byte is still to be sent: a connection, once the server counts it."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        head = (
            f"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        )
        before = waiting(port)
        connection.sendall(head.encode() + b"\r\n" + body[:-1])
        while waiting(port) == before:
            pass
        yield connection


def metrics(port: int) -> dict[str, float]:
    lines = [line.rsplit(" ", 1) for line in ask(port, "/metrics")[1].splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def waiting(port: int) -> float:
    return metrics(port)["unicoder_vl_requests_waiting"]


def test_more_than_may_wait_are_told_to_come_again(world, expected):
    body = json.dumps({"queries": CAPTIONS[0], "documents": IDS}).encode()
    with (
        running(open_app(str(world / "model"), str(world / "store"), limits=Limits(max_waiting=2))) as port,
        begun(port, body) as first,
        begun(port, body),
    ):
        connection = HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/v1/score", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 429 and answer.headers["Retry-After"] == "1"
        assert "2 requests wait, as many as are taken" in json.loads(answer.read())["error"]["message"]
        connection.close()
        assert ask(port, "/health") == (200, {"status": "ok", "model": "model"})
        first.sendall(body[-1:])
        assert b" 200 OK" in first.recv(4096)
        assert ask(port, "/v1/score", body)[0] == 200  # there is place again
        counted = metrics(port)
        assert counted['unicoder_vl_requests_total{path="/v1/score",status="429"}'] == 1
        assert counted['unicoder_vl_requests_total{path="/v1/score",status="200"}'] == 2
        assert counted["unicoder_vl_pairs_total"] == 12


# What waits is scored together


def test_what_waits_is_scored_together_and_fails_alone(world, expected):
    """The first call waits in the detector until the others are there."""
    scorer = ImageTextScorer.from_pretrained(world / "model", world / "store", verbose=False, block_pairs=12)
    entered, release, calls = threading.Event(), threading.Event(), []
    own = RegionFinder(trained_on=scorer.processor.feature_extractor.region_provenance)

    def finder(photos):
        entered.set()
        release.wait()
        return own(photos)

    batcher = Batcher(scorer, finder, note=lambda *counts: calls.append(counts))
    held = Photo("held", (world / "photos" / f"{IDS[4]}.png").read_bytes(), "query")
    first = batcher.submit([(CAPTIONS[0], held)])
    entered.wait()
    two = batcher.submit([(CAPTIONS[1], IDS[2]), (CAPTIONS[1], IDS[0])])
    left = batcher.submit([(CAPTIONS[2], IDS[2])])
    left.cancel()
    bad = batcher.submit([(CAPTIONS[1], IDS[2]), (CAPTIONS[1], Photo("bad", held.data[:-60], "documents[1]"))])
    again = batcher.submit([(CAPTIONS[2], Photo("held", held.data, "again")), (CAPTIONS[0], IDS[2])])
    crossed = batcher.submit([(caption, name) for name in IDS for caption in CAPTIONS])
    last = batcher.submit([(CAPTIONS[2], IDS[5])])
    release.set()
    batcher.close()
    assert not batcher.is_alive()

    def close(job, *pairs):
        scores, tokens = job.result()
        np.testing.assert_allclose(scores, [expected[pair] for pair in pairs], atol=1e-5)
        return tokens

    assert close(first, (0, 4)) == 9 and close(two, (1, 2), (1, 0)) == 6 and close(again, (2, 4), (0, 2)) == 18
    with pytest.raises(ValueError, match=r"^documents\[1\] is no photo that can be read"):
        bad.result()
    close(crossed, *[(row, column) for column in range(6) for row in range(3)])
    close(last, (2, 5))
    # The call with the bad photo is made anew for each; the one after it waits, as 12 pairs were there.
    assert calls == [(1, 1), (1, 2), (1, 2), (1, 18), (1, 1)]


def test_requests_share_a_call(world, expected):
    scorer = ImageTextScorer.from_pretrained(world / "model", world / "store", verbose=False)
    entered, release, calls = threading.Event(), threading.Event(), []

    def note(*counts):
        calls.append(counts)
        entered.set()
        release.wait()

    batcher = Batcher(scorer, note=note)
    batcher.submit([(CAPTIONS[0], IDS[0])])
    entered.wait()
    jobs = [batcher.submit([(CAPTIONS[number % 3], IDS[number % 6])]) for number in range(9)]
    release.set()
    batcher.close()
    assert calls == [(1, 1), (9, 9)]
    found = [job.result()[0][0] for job in jobs]
    np.testing.assert_allclose(found, [expected[number % 3, number % 6] for number in range(9)], atol=1e-5)


# The command


@contextmanager
def serving(*arguments):
    """`unicoder-vl serve --json` in a process of its own, and what it says when it is ready."""
    command = [sys.executable, "-m", "unicoder_vl_hf.cli", "serve", "--json", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process, json.loads(process.stdout.readline())
        finally:
            process.kill()


@pytest.mark.slow
def test_a_stop_answers_what_was_taken(world, expected):
    """SIGTERM comes while a request is still being sent."""
    body = json.dumps({"queries": CAPTIONS[0], "documents": IDS}).encode()
    with serving(world / "model", "--regions", world / "store", "--port", 0) as (process, ready):
        port = urlsplit(ready["url"]).port
        assert ready == {"url": f"http://127.0.0.1:{port}", "model": "model", "images": len(IDS)}
        with begun(port, body) as connection:
            process.send_signal(signal.SIGTERM)
            while True:  # until nobody listens
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                except ConnectionRefusedError:
                    break
            connection.sendall(body[-1:])
            with connection.makefile("rb") as answer:
                content = answer.read().partition(b"\r\n\r\n")[2]
        np.testing.assert_allclose([each["score"] for each in json.loads(content)["data"]], expected[0], atol=1e-5)
        assert process.wait(60) == 0
        assert process.stderr.read() == "Stopped: all that was taken is answered.\n"


def test_a_server_that_cannot_start_says_why(world, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", str(world / "model"), "--port", str(taken.getsockname()[1])]) == 1
    assert main(["serve", str(world / "model"), "--regions", "nowhere"]) == 1
    assert main(["serve", str(world / "model"), "--port", "0", "--max-documents", "0"]) == 1
    assert main(["serve", str(world / "model"), "--port", "0", "--detector", f"grid:{world / 'none'}"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert "in use" in errors[0] and "nowhere does not exist" in errors[1] and "max_documents is 0" in errors[2]
    assert errors[-1].startswith("unicoder-vl serve: ") and str(world / "none") in errors[-1], errors


def test_a_server_without_a_detector_takes_ids_alone(world, tmp_path, caplog):
    scorer = ImageTextScorer.from_pretrained(world / "model", verbose=False)
    scorer.processor.feature_extractor.region_provenance = None
    scorer.model.save_pretrained(tmp_path)
    scorer.processor.save_pretrained(tmp_path)
    photo = uri((world / "photos" / f"{IDS[0]}.png").read_bytes())
    with running(open_app(str(tmp_path), str(world / "store"))) as port:
        assert ask(port, "/v1/rerank", {"query": "a dog", "documents": IDS})[0] == 200
        status, answer = ask(port, "/v1/rerank", {"query": "a dog", "documents": [photo]})
    assert status == 422 and "documents[0] is a photo, and this server has no detector" in answer["error"]["message"]
    assert caplog.messages[0].startswith("Photos will be refused, and images served by their ids alone.")


@pytest.mark.slow
def test_under_load_nothing_is_lost_or_mixed_up(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    load = importlib.import_module("serve_load")
    found = load.main(["--size", "tiny", "--seconds", "3", "--clients", "8"])
    assert found["clients"]["requests"] > 8 and found["together"] > 1
    assert not found["wrong"] and found["lost"] == 0 and found["exit code"] == 0
