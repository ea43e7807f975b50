"""
Load on `unicoder-vl serve`, on the loopback address: many clients ask for rankings, images by a sentence and sentences
by an image, and compare each answer with the right one; before them, one caller alone. New weights of a real size,
since no operation depends on their values.

    OMP_NUM_THREADS=1 python benchmarks/serve_load.py                 # 32 clients for two minutes
    python benchmarks/serve_load.py --size tiny --seconds 4 --clients 8
"""

import argparse
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import work

from unicoder_vl_hf import RegionStoreWriter

NUM_CAPTIONS, NUM_IMAGES = 60, 40
TOLERANCE = 1e-3  # of a relevance; other batches round otherwise
SHARE_BEFORE = 0.25  # of the seconds: for one caller, and then for all, until memory is measured first
MEASURED = 6  # times that memory is measured from then on


def prepare(folder: Path, size: str) -> tuple[list[str], list[str], np.ndarray]:
    """Writes a checkpoint and a store. Returns sentences, image ids and the relevance of all pairs, `(C, M)`."""
    torch.manual_seed(0)
    job = work.Job(NUM_CAPTIONS, NUM_IMAGES)
    scorer = work.our_scorer(torch.float32, size)
    for parameter in scorer.model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[1] ** -0.5)  # so that scores differ plainly
    scorer.model.save_pretrained(folder / "model")
    scorer.processor.save_pretrained(folder / "model")
    scores = scorer.score(job.captions, job.records)
    with RegionStoreWriter(folder / "store", dtype="float32") as writer:
        for record in job.records:
            writer.write(record)
    relevance = 1 / (1 + np.exp(-scores))
    if relevance.std() < 100 * TOLERANCE:
        raise ValueError(
            f"The relevance of pairs varies by {relevance.std():.3g}: a wrong answer might pass for right."
        )
    return job.captions, [record.image_id for record in job.records], relevance


class Clients:
    """
    Clients that ask one question after the other until they are told to stop.

    Attributes:
        seconds (`list[float]`): The time of each answer that was right.
        wrong (`list[str]`): What else came.
    """

    def __init__(self, port: int, captions: list[str], images: list[str], relevance: np.ndarray, documents: int):
        self.port, self.captions, self.images, self.relevance = port, captions, images, relevance
        self.documents = documents
        self.seconds: list[float] = []
        self.wrong: list[str] = []
        self.busy = 0
        self.stop = threading.Event()

    def run(self, number: int, seconds: float) -> None:
        """Runs this number of clients for so long."""
        threads = [threading.Thread(target=self._ask, args=(random.Random(seed),)) for seed in range(number)]
        for thread in threads:
            thread.start()
        self.stop.wait(seconds)
        self.stop.set()
        for thread in threads:
            thread.join()

    def _ask(self, draw: random.Random) -> None:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=600)
        while not self.stop.is_set():
            by_text = draw.random() < 0.5
            queries, documents = (self.captions, self.images) if by_text else (self.images, self.captions)
            query, chosen = draw.randrange(len(queries)), draw.sample(range(len(documents)), self.documents)
            expected = (self.relevance if by_text else self.relevance.T)[query, chosen]
            asked = queries[query] if by_text else {"image": queries[query]}
            body = {"query": asked, "documents": [documents[place] for place in chosen]}
            started = time.perf_counter()
            connection.request("POST", "/v1/rerank", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            content = response.read()
            if response.status == 429:
                self.busy += 1
                time.sleep(float(response.headers["Retry-After"]))
            elif response.status != 200 or not _is_right(json.loads(content)["results"], expected):
                self.wrong.append(f"{response.status}: {content[:300]!r}, expected {expected.tolist()}")
            else:
                self.seconds.append(time.perf_counter() - started)
        connection.close()


def _is_right(results: list[dict[str, Any]], expected: np.ndarray) -> bool:
    """Every document once, the best first, each with its own relevance."""
    places = [result["index"] for result in results]
    found = np.array([result["relevance_score"] for result in results])
    if sorted(places) != list(range(len(expected))) or (np.diff(found) > 0).any():
        return False
    return bool(np.allclose(found, expected[places], rtol=0, atol=TOLERANCE))


def metrics(port: int) -> dict[str, float]:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def figures(clients: Clients, took: float) -> dict[str, float]:
    p50, p95 = np.percentile(clients.seconds, [50, 95])
    pairs = len(clients.seconds) * clients.documents
    return {"requests": len(clients.seconds), "pairs/s": pairs / took, "p50 s": float(p50), "p95 s": float(p95)}


def measure(size: str, num_clients: int, seconds: float, documents: int) -> dict[str, Any]:
    """Loads a server of its own, and ends it by SIGTERM."""
    with tempfile.TemporaryDirectory() as name:
        asked = prepare(Path(name), size)
        command = [sys.executable, "-m", "unicoder_vl_hf.cli", "serve", f"{name}/model", "--regions", f"{name}/store"]
        with subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout is not None
                port = int(re.findall(r":(\d+);", server.stdout.readline())[0])
                results = _load(port, asked, num_clients, seconds, documents)
                server.send_signal(signal.SIGTERM)
                results["exit code"] = server.wait(60)
            finally:
                server.kill()
    return results


def _load(port: int, asked: tuple, num_clients: int, seconds: float, documents: int) -> dict[str, Any]:
    results: dict[str, Any] = {"wrong": [], "MiB": []}
    answered = 0

    def measure_memory() -> None:
        results["MiB"].append(metrics(port)["process_resident_memory_bytes"] / 2**20)

    for title, number, lasts in (
        ("one caller", 1, seconds * SHARE_BEFORE),
        ("warming", num_clients, seconds * SHARE_BEFORE),
        ("clients", num_clients, seconds),
    ):
        clients, started = Clients(port, *asked, documents), time.perf_counter()
        for part in range(MEASURED if title == "clients" else 0):
            threading.Timer(lasts * part / MEASURED, measure_memory).start()
        clients.run(number, lasts)
        results[title] = figures(clients, time.perf_counter() - started)
        results["wrong"] += clients.wrong
        answered += len(clients.seconds) + len(clients.wrong)
    measure_memory()
    counted = metrics(port)
    results["lost"] = counted['unicoder_vl_requests_total{path="/v1/rerank",status="200"}'] - answered
    results["together"] = counted["unicoder_vl_requests_together_sum"] / counted["unicoder_vl_requests_together_count"]
    return results


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=work.SIZES, default="minilm")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--documents", type=int, default=10, help="documents of a request")
    args = parser.parse_args(argv)
    results = measure(args.size, args.clients, args.seconds, args.documents)
    for title in ("one caller", "clients"):
        told = {"one caller": "one caller", "clients": f"{args.clients} clients"}[title]
        print(f"{told:12}", ", ".join(f"{value:,.4g} {name}" for name, value in results[title].items()))
    memory = ", ".join(f"{each:,.0f}" for each in results["MiB"])
    print(f"Requests in a call: {results['together']:.1f} on average. MiB, from warm to the end: {memory}.")
    print(f"Wrong answers: {len(results['wrong'])}; lost: {results['lost']:.0f}; exit code: {results['exit code']}.")
    print("\n".join(results["wrong"][:5]), end="")
    return results


if __name__ == "__main__":
    main()
