"""Shows in a browser what a network that train.py has trained predicts.

    python -m cv_jax.tools.serve --workdir=runs/a
    python -m cv_jax.tools.serve --workdir=runs/a --run=seed=3 --tta=none --port=8080

On the page you drop, choose, paste or draw an image. You see the prediction, the image as the
network gets it, and, for a classifier, the saliency map and the feature maps of each layer. The
server answers this machine alone, unless --host is another address of it: then whoever reaches that
address may ask.

    POST /predict   a file of at most 10 MB as the body -> JSON, see `make_answer`
    GET /run        what network it is -> JSON, see `about`

Ctrl-C or SIGTERM ends it. Exit codes: 2 something to mend, the message says what; 130 or 143
stopped by Ctrl-C or SIGTERM.
"""

import base64
import hashlib
import json
import re
import signal
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while it imports there is nothing to end

import jax
import numpy as np

from cv_jax.config.errors import UserError
from cv_jax.data import DataSpec
from cv_jax.data.dataset import padding
from cv_jax.data.typical import score
from cv_jax.runtime.signals import Stopped, raise_when_signalled
from cv_jax.runtime.startup import check_platform, prepare_jax
from cv_jax.tools.command import add_run_arguments, command, make_parser
from cv_jax.trained.load import Trained, check_finite_predictions, in_words, load_trained
from cv_jax.workdir.bucket import work_directory

PAGE = Path(__file__).with_suffix(".html")
METHODS = {"/": "GET", "/run": "GET", "/predict": "POST"}  # of each path
MAX_BYTES = 10_000_000  # of an image file
MAX_REQUESTS = 32  # at once
SILENT_SECONDS = 10  # a client may be silent for so long,
WHOLE_SECONDS = 30  # and take so long in all
LINGER_SECONDS = 1


def make_answer(trained: Trained) -> Callable[[bytes], dict[str, Any]]:
    """Returns the function from a file to the JSON values that the page shows.

    They are `prediction`, as the task describes it; `picture`: {shape, pixels}, as the task draws
    it; `classes`: [{name, probability}], the most probable first, where the prediction has
    probabilities. For an image there are `image`: {shape, pixels}, what the network sees, (h, w,
    c); `score`, how unlike the training images it is, see `data.typical.score`; and `unlike`,
    whether that is above the threshold. Where the task explains its predictions there are
    `saliency`, and `features`, one for each layer: {name, shape, low, high, pixels} as `_to_maps`
    makes them. Pixels are bytes in base64.

    The function raises UserError for a file that cannot be read. The program is compiled here.

    Raises:
        UserError: the network predicts numbers that are not finite.
    """
    task, spec = trained.task, trained.spec

    @jax.jit
    def program(state, batch):
        explained = task.explain(state, batch) if task.explain else {}
        return task.predict(state, batch), explained

    def look(example: dict[str, np.ndarray], back: Any) -> dict[str, Any]:
        batch = {name: x[None] for name, x in example.items()}
        found = jax.device_get(program(trained.state, batch))
        prediction, explained = jax.tree.map(lambda x: x[0], found)
        check_finite_predictions(prediction)
        values = task.describe(example, prediction, back)
        answer = {
            "prediction": values,
            "picture": _to_picture(task.draw(example, prediction, back)),
        }
        if "probabilities" in values:
            shares = values["probabilities"].items()
            answer["classes"] = [{"name": name, "probability": x} for name, x in shares]
        if "image" in example:
            answer |= {"image": _to_picture(example["image"]), **_likeness(example["image"], spec)}
        if explained:
            answer["saliency"] = _to_maps("saliency", explained["saliency"][..., None])
            features = by_depth(explained["features"]).items()
            answer["features"] = [_to_maps(name, x) for name, x in features]
        return answer

    def answer(file: bytes) -> dict[str, Any]:
        example, back = task.read(file)[0]
        return look(example, back)

    # Work that is done once is done before the first request.
    blank = padding({name: spec.fields[name] for name in task.inputs}, 1)
    check_finite_predictions(jax.device_get(program(trained.state, blank)[0]))
    return answer


def _likeness(image: np.ndarray, spec: DataSpec) -> dict[str, Any]:
    if not spec.typical:
        return {}
    distance = float(score(image[None], spec.typical)[0])
    return {"score": distance, "unlike": distance > spec.typical.threshold}


def by_depth(features: dict[str, Any]) -> dict[str, Any]:
    """Returns features in the order of the layers: maps shrink on the way; "stem" is the first."""

    def depth(name):
        x = features[name]
        return -x[..., 0].size, name != "stem", name

    return {name: features[name] for name in sorted(features, key=depth)}


def _to_picture(pixels: np.ndarray) -> dict[str, Any]:
    return {"shape": pixels.shape, "pixels": _to_text(np.ascontiguousarray(pixels))}


def _to_maps(name: str, x: np.ndarray) -> dict[str, Any]:
    """The maps of a layer, (h, w, c) or (c,), as grey pixels (c, h, w): `low` is 0, `high` 255."""
    low, high = float(x.min()), float(x.max())
    grey = (x - x.min()) * np.float32(255 / (high - low) if high > low else 0)
    maps = grey.round().astype(np.uint8).reshape(*((1, 1) if x.ndim == 1 else x.shape[:2]), -1)
    pixels = _to_text(maps.transpose(2, 0, 1))
    return {"name": name, "shape": x.shape, "low": low, "high": high, "pixels": pixels}


def _to_text(pixels: np.ndarray) -> str:
    return base64.b64encode(pixels.tobytes()).decode()


def about(trained: Trained) -> dict[str, Any]:
    """Returns what network it is, as JSON values."""
    fields = trained.spec.fields
    return {
        "model": trained.config.model,
        "data": trained.spec.name,
        "run": trained.name,
        "step": int(trained.state.step),
        "tta": trained.tta,
        "image_shape": fields["image"].shape if "image" in fields else None,
        "in_words": in_words(trained),
    }


class Server(ThreadingHTTPServer):
    """Answers on (host, port), each request in a thread of its own.

    Args:
        host: a name or address of this machine.
        port: 0: one that is free.
        answer: see `make_answer`; it is called by one thread at a time.
        about: what GET /run answers.

    Raises:
        OSError: the address cannot be had.
    """

    daemon_threads = False  # server_close waits for them
    allow_reuse_port = False

    def __init__(
        self,
        host: str,
        port: int,
        answer: Callable[[bytes], dict[str, Any]],
        about: dict[str, Any],
    ):
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        shown = f"[{host}]" if ":" in host else host
        self.host_names = {"localhost", "127.0.0.1", "[::1]", shown.lower()}
        self.answer, self.about = answer, about
        self.lock = threading.Lock()
        page = PAGE.read_text("utf-8")
        self.page, self.policy = page.encode(), _content_policy(page)
        self._deadlines: dict[socket.socket, float] = {}
        super().__init__((host, port), Handler)
        self.url = f"http://{shown}:{self.server_address[1]}/"

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's asks a name server for our name

    def process_request(self, request: socket.socket, client_address: Any) -> None:
        if len(self._deadlines) >= MAX_REQUESTS:
            return self.shutdown_request(request)  # it is closed without an answer
        self._deadlines[request] = time.monotonic() + WHOLE_SECONDS
        return super().process_request(request, client_address)

    def process_request_thread(self, request: socket.socket, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._deadlines.pop(request, None)

    def service_actions(self) -> None:
        """Twice a second: ends what takes too long."""
        for request, deadline in list(self._deadlines.items()):
            if time.monotonic() > deadline:
                _end_reading(request)

    def server_close(self) -> None:
        """Whoever is being answered gets the answer, nobody else is heard to the end."""
        for request in list(self._deadlines):
            _end_reading(request)
        super().server_close()

    def handle_error(self, request: socket.socket, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # the client is gone
            super().handle_error(request, client_address)


def _end_reading(request: socket.socket) -> None:
    with suppress(OSError):  # it is closed already
        request.shutdown(socket.SHUT_RD)


class Handler(BaseHTTPRequestHandler):
    """One request a connection."""

    timeout = SILENT_SECONDS
    default_request_version = "HTTP/1.0"  # of a request that has none: a status line answers it
    server: Server

    def do_GET(self) -> None:
        if self.path == "/":
            self._send(200, self.server.page, "text/html; charset=utf-8")
        elif self.path == "/run":
            self._send_json(200, self.server.about)
        else:
            self._refuse()

    def do_POST(self) -> None:
        if self.path != "/predict":
            return self._refuse()
        lengths = self.headers.get_all("Content-Length", [])
        if not lengths or "Transfer-Encoding" in self.headers:
            return self.send_error(411, "A Content-Length is needed.")
        if len(lengths) > 1 or not lengths[0].isdecimal():
            return self.send_error(400, "The Content-Length is not a number of bytes.")
        if len(lengths[0]) > 18 or int(lengths[0]) > MAX_BYTES:
            return self.send_error(413, f"A file of more than {MAX_BYTES // 10**6} MB is refused.")
        file = self.rfile.read(int(lengths[0]))
        if len(file) < int(lengths[0]):
            return self.send_error(400, "The body ended before its Content-Length.")
        try:
            with self.server.lock:  # for decoding as well: a large image takes much memory
                answer = self.server.answer(file)
        except UserError as error:
            return self.send_error(422, f"No answer: {error}.")
        return self._send_json(200, answer)

    def parse_request(self) -> bool:
        """Refuses pages of other sites, and names that others may have made point here."""
        if not super().parse_request():
            return False
        hosts = self.headers.get_all("Host", [])
        name = re.sub(r":\d*$", "", hosts[0]).lower() if len(hosts) == 1 else None
        if name not in self.server.host_names:
            self.send_error(421, "The Host is none of this server's: use the address it printed.")
        elif self.headers.get("Origin", f"http://{hosts[0]}") != f"http://{hosts[0]}":
            self.send_error(403, "Another site's page asks.")
        else:
            return True
        return False

    def _refuse(self) -> None:
        if self.path in METHODS:
            self.send_error(405, f"{self.path} takes {METHODS[self.path]} alone.")
        else:
            self.send_error(404, "There is nothing here.")

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answers {"error": message}; the parent class has its own for what is no HTTP."""
        code = 405 if code == 501 else code  # a method that it has no do_... for
        self._send_json(code, {"error": message or HTTPStatus(code).description})

    def _send_json(self, code: int, values: dict[str, Any]) -> None:
        body = json.dumps(values, allow_nan=False).encode()
        self._send(code, body, "application/json")

    def _send(self, code: int, body: bytes, content_type: str) -> None:
        self.send_response(code)
        if code == 405:
            self.send_header("Allow", METHODS.get(self.path, "GET, POST"))
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", self.server.policy)
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def finish(self) -> None:
        """Reads on for a moment: closing with bytes unread would take the answer back."""
        super().finish()
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(LINGER_SECONDS)
        end = time.monotonic() + LINGER_SECONDS
        while self.connection.recv(65536) and time.monotonic() < end:
            pass

    def version_string(self) -> str:
        return "cv_jax"

    def log_message(self, *args: object) -> None:
        """Nothing: what is wrong with a request, its answer says."""


def _content_policy(page: str) -> str:
    """The page's own style and script run, and nothing else is loaded from anywhere."""

    def hash_of(tag):
        text = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.S)[1]
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; script-src {hash_of('script')}; style-src {hash_of('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


@command("serve", results=False)
def main() -> None:
    """Reads the command line and serves until it is stopped."""
    parser = make_parser(__doc__)
    add_run_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="the name or address others use")
    parser.add_argument("--port", type=int, default=8000, help="0: one that is free")
    arguments = parser.parse_args()
    if not 0 <= arguments.port < 2**16:
        parser.error(f"--port={arguments.port} must be from 0 to 65535")
    raise_when_signalled()
    try:
        prepare_jax()
        check_platform()
        trained = load_trained(work_directory(arguments.workdir), arguments.run, arguments.tta)
        answer = make_answer(trained)
        with _listen(arguments.host, arguments.port, answer, about(trained)) as server:
            print(f"{server.url}   Ctrl-C ends it", flush=True)
            server.serve_forever()
    except Stopped as stopped:
        print(f"Stopped by {stopped}.")
        sys.exit(stopped.exit_code)


def _listen(host: str, port: int, *served: Any) -> Server:
    try:
        return Server(host, port, *served)
    except OSError as error:
        raise UserError(
            f"--host={host} --port={port} cannot be had ({error.strerror}): choose others."
        ) from error


if __name__ == "__main__":
    main()
