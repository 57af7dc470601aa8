"""Measures the page's server: the time of a response, and the responses to 1,000 bad requests.

    python -m benchmarks.serve --workdir=runs/cifar10

Starts `cv_jax.tools.serve` on the run and sends random PNG images of the network's size, one after
the other. A time runs from the connection to the whole response. Then sends 1,000 bad requests, of
each kind in turn, and one good request.
"""

import argparse
import json
import random
import re
import socket
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.machine import ROOT, make_parser, save

HANG_UP = "hangs up"  # in place of a body: the connection is closed in the middle of it


def encode(kind: str, size: tuple[int, int]) -> bytes:
    """Encodes a random image of size (w, h) as a file."""
    pixels = np.frombuffer(random.randbytes(3 * size[0] * size[1]), np.uint8)
    Image.fromarray(pixels.reshape(size[1], size[0], 3)).save(file := BytesIO(), kind)
    return file.getvalue()


def bomb(side: int) -> bytes:
    """Builds a small PNG file of `side` black pixels a side."""

    def chunk(kind, data):
        crc = zlib.crc32(kind + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + kind + data + crc

    header = side.to_bytes(4, "big") * 2 + bytes((1, 0, 0, 0, 0))
    rows = zlib.compress(bytes(min(side * (side // 8 + 1), 10**7)), 9)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def request(body: bytes, length: Any = None, *headers: str, line: str = "POST /predict") -> bytes:
    """Builds an HTTP request. Content-Length is `length`; None: that of the body; "": absent."""
    length = len(body) if length is None else length
    lines = [f"{line} HTTP/1.1", *headers]
    if not any(header.startswith("Host") for header in headers):
        lines.append("Host: localhost")
    if length != "":
        lines.append(f"Content-Length: {length}")
    return "\r\n".join([*lines, "", ""]).encode() + body


# Kind -> function that builds such a request; a random one differs at each call.
BAD: dict[str, Callable[[], bytes]] = {
    "random bytes": lambda: request(random.randbytes(3000)),
    "half a PNG": lambda: request(encode("PNG", (32, 32))[:1500]),
    "half a JPEG": lambda: request(encode("JPEG", (32, 32))[:700]),
    "a PNG of 10^10 pixels": lambda: request(bomb(100_000)),
    "a PNG of 60 million pixels": lambda: request(bomb(7_800)),
    "nothing": lambda: request(b""),
    "no Content-Length": lambda: request(b"x" * 3000, ""),
    "a Content-Length of words": lambda: request(b"x" * 3000, "ten"),
    "a Content-Length below 0": lambda: request(b"x" * 3000, -5),
    "a Content-Length of 20 MB": lambda: request(b"x" * 100_000, 20_000_000),
    "20 MB": lambda: request(bytes(20_000_000)),
    "a Content-Length of 10^30": lambda: request(b"x" * 3000, 10**30),
    "in pieces": lambda: request(b"5\r\nwords\r\n0\r\n\r\n", "", "Transfer-Encoding: chunked"),
    "another host": lambda: request(b"x", None, "Host: evil.example"),
    "another origin": lambda: request(b"x", None, "Origin: http://evil.example"),
    "another path": lambda: request(b"x", line="POST /../../etc/passwd"),
    "another method": lambda: request(b"x", line="DELETE /predict"),
    "1,000 headers": lambda: request(b"x", None, *(f"X-{i}: 1" for i in range(1000))),
    "a header of 100 kB": lambda: request(b"x", None, f"X: {'x' * 100_000}"),
    "no HTTP": lambda: random.randbytes(200) + b"\r\n\r\n",
    f"{HANG_UP} in the body": lambda: request(b"x" * 1000, 50_000),
    f"{HANG_UP} in the headers": lambda: b"POST /predict HTTP/1.1\r\nHost: loc",
}


def ask(port: int, sent: bytes, hang_up: bool = False) -> str:
    """Sends a request; returns the status, or "closed", "reset" or "none" without a response."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        try:
            connection.sendall(sent)
            if hang_up:
                return "none"
        except ConnectionError:
            pass  # the server responds before it has read all
        try:
            reply = b"".join(iter(lambda: connection.recv(65536), b""))
        except ConnectionError:
            return "reset"
    return reply[9:12].decode() or "closed"


def time_answers(port: int, size: tuple[int, int], count: int) -> list[float]:
    """Measures the milliseconds of `count` responses to images of (w, h), after ten uncounted."""
    times = []
    for _ in range(count + 10):
        sent = request(encode("PNG", size))
        start = time.perf_counter()
        status = ask(port, sent)
        times.append(1e3 * (time.perf_counter() - start))
        if status != "200":
            raise RuntimeError(f"a good image got {status}")
    return times[10:]


def send_bad(port: int, count: int) -> dict[str, dict[str, int]]:
    """Counts the statuses that each kind of bad request got."""
    got: dict[str, Counter] = {kind: Counter() for kind in BAD}
    for i in range(count):
        kind = list(BAD)[i % len(BAD)]
        got[kind][ask(port, BAD[kind](), hang_up=kind.startswith(HANG_UP))] += 1
    return got


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Starts the server, sends the requests, and stops the server."""
    command = [sys.executable, "-m", "cv_jax.tools.serve", f"--workdir={args.workdir}", "--port=0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        line = process.stdout.readline()
        if not line:
            sys.exit(process.stderr.read())
        port = int(re.search(r":(\d+)/", line)[1])
        try:
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(request(b"", line="GET /run"))
                reply = b"".join(iter(lambda: connection.recv(65536), b""))
            about = json.loads(reply.partition(b"\r\n\r\n")[2])
            size = tuple(about["image_shape"][1::-1])
            times = time_answers(port, size, args.rounds)
            bad = send_bad(port, args.bad)
            after = ask(port, request(encode("PNG", size)))
        finally:
            process.terminate()
            _, errors = process.communicate(timeout=60)
    median, p95 = np.percentile(times, (50, 95))
    return {
        "run": about,
        "milliseconds": {"median": median, "p95": p95, "rounds": times},
        "bad": bad,
        "good_after_them": after,
        "exit_code": process.returncode,
        "tracebacks": errors.count("Traceback"),
    }


def main() -> None:
    """Measures and prints; writes the record if --out is given."""
    parser = make_parser(__doc__, rounds=200)
    parser.add_argument("--workdir", required=True, help="work directory of a run on colour images")
    parser.add_argument("--bad", type=int, default=1000, help="number of bad requests")
    args = parser.parse_args()
    random.seed(0)
    results = measure(args)
    times = results["milliseconds"]
    print(f"answer   median {times['median']:.1f} ms, 95th percentile {times['p95']:.1f} ms")
    for kind, got in results["bad"].items():
        print(f"{kind:<28} {', '.join(f'{status} x {n}' for status, n in got.items())}")
    print(f"a good image after them: {results['good_after_them']}", end="; ")
    print(f"tracebacks: {results['tracebacks']}; exit code after SIGTERM: {results['exit_code']}")
    save("serve", args, results)


if __name__ == "__main__":
    main()
