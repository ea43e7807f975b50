"""A server that is killed: every answer that came was right, and the next server gives the same."""

import json
import re
import threading
import time
from functools import cache
from http.client import HTTPConnection, HTTPException
from itertools import cycle
from pathlib import Path

from chaos_commands import UNICODER
from chaos_machine import PATIENCE, Machine, Run

QUERIES = ["a red square on the grass", "a blue star", "a white circle above a green triangle", "the snow"]


class Server:
    """A server of the machine's model, and what it answered."""

    def __init__(self, machine: Machine, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        inputs = machine.inputs
        words = ["serve", str(inputs / "model"), "--regions", str(inputs / "world" / "regions"), "--port", "0"]
        self.images = sorted(path.stem for path in (inputs / "world" / "photos").iterdir())
        self.run: Run = machine.start([*UNICODER.split(), *words], folder)
        self.killed = False

    def kill(self) -> None:
        self.killed = True
        self.run.kill()

    def port(self) -> int | None:
        """Waits until it serves; None if it was killed before."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until and not self.killed:
            if found := re.search(r"Serving .* on http://127.0.0.1:(\d+)", self.run.output):
                return int(found[1])
            time.sleep(0.01)
        assert self.killed, self.run.output
        return None

    def ask(self, port: int, query: str) -> object:
        """The ranking that it answers, None where no whole answer came."""
        body = json.dumps({"query": query, "documents": self.images})
        try:
            connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
            connection.request("POST", "/v1/rerank", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            content = answer.read()
        except (OSError, HTTPException):
            return None
        finally:
            connection.close()
        assert answer.status == 200, content
        return json.loads(content)["results"]


@cache
def expected_answers(machine: Machine) -> tuple[list[object], float]:
    """The answers of a server that nobody kills, and the seconds until it had given them."""
    server = Server(machine, machine.folder / "served")
    port = server.port()
    assert port is not None
    answers = [server.ask(port, query) for query in QUERIES]
    seconds = time.monotonic() - server.run.began
    server.run.kill()
    assert None not in answers and len({str(answer) for answer in answers}) == len(QUERIES)
    return answers, seconds


def kill_while_it_answers(machine: Machine, folder: Path, moment: float, expected: list[object]) -> int:
    """Kills a server so many seconds after its start while it is asked; how many requests it did not answer."""
    server = Server(machine, folder)
    timer = threading.Timer(moment, server.kill)
    timer.start()
    port, unanswered = server.port(), 0
    asked = cycle(zip(QUERIES, expected, strict=True))
    while port is not None and not unanswered:
        query, right = next(asked)
        answer = server.ask(port, query)
        assert answer in (None, right), f"{query!r}: {answer}, expected {right}"
        unanswered = int(answer is None)
    timer.join()
    server.run.wait()
    return unanswered
