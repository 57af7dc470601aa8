"""Shows the predictions of a network that train.py has trained, in a browser.

    python -m cv_jax.tools.serve --workdir=runs/a
    python -m cv_jax.tools.serve --workdir=runs/a --run=seed=3 --tta=none --port=8080

Drop, choose, paste or draw an image on the page. The page shows the prediction, the network's input
image, and, for a classifier, the saliency map and the feature maps of each layer. Only this machine
can use the server. With --host=ADDRESS everyone who reaches that address of this machine can.

    POST /predict   a file of at most 10 MB as the body -> JSON, see `make_answer`
    GET /run        a description of the network -> JSON, see `about`

Ctrl-C or SIGTERM stops the server. Exit codes: 2 user error (see the message); 130 or 143 stopped
by Ctrl-C or SIGTERM.
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
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # during the imports nothing needs to be closed

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
from cv_jax.trained.words import texts
from cv_jax.workdir.bucket import work_directory

PAGE = Path(__file__).with_suffix(".html")
METHODS = {"/": "GET", "/run": "GET", "/predict": "POST"}  # path -> method
MAX_BYTES = 10_000_000  # the largest image file
MAX_REQUESTS = 32  # at once
SILENT_SECONDS = 10  # the longest silence of a client
WHOLE_SECONDS = 30  # the longest time of a request
LINGER_SECONDS = 1  # see `Handler.finish`


def make_answer(trained: Trained) -> Callable[[bytes], dict[str, Any]]:
    """Compiles the program; returns a function from a file to JSON values for the page.

    The function raises UserError for a file that cannot be read. Its values, with pixels as bytes
    in base64:
        prediction: the task's description of the prediction.
        texts: the same as texts by key.
        picture: {shape, pixels}, the task's drawing of the prediction.
        classes: [{name, probability}], the most probable first, if there are probabilities.
        image: {shape, pixels}, the network's input (h, w, c), for an image.
        score: the distance from the training images, see `data.typical.score`, for an image.
        unlike: whether the score is above the threshold, for an image.
        saliency: {name, shape, low, high, pixels}, see `_to_maps`, if the task has explanations.
        features: a list of the same for each layer.

    Raises:
        UserError: the network predicts numbers that are not finite.
    """
    task, spec = trained.task, trained.spec

    @jax.jit
    def program(state, batch):
        explained = task.explain(state, batch) if task.explain else {}
        return task.predict(state, batch), explained

    def look(example: dict[str, np.ndarray], back: Any) -> tuple:
        batch = {name: x[None] for name, x in example.items()}
        found = jax.device_get(program(trained.state, batch))
        prediction, explained = jax.tree.map(lambda x: x[0], found)
        check_finite_predictions(prediction)
        return (example, prediction, back), explained

    def answer(file: bytes) -> dict[str, Any]:
        examples = task.read(file)
        found = [look(*one) for one in (examples if task.join else examples[:1])]
        explained = found[0][1]
        parts = [part for part, _ in found]
        example, prediction, back = task.join(parts) if task.join else parts[0]
        values = task.describe(example, prediction, back)
        answer = {
            "prediction": values,
            "texts": texts(values),
            "picture": _to_picture(task.draw(example, prediction, back)),
        }
        if "probabilities" in values:
            shares = values["probabilities"].items()
            answer["classes"] = [{"name": name, "probability": x} for name, x in shares]
        if "image" in example:
            seen = np.stack([example["image"] for example, _, _ in parts])
            answer |= {"image": _to_picture(example["image"]), **_likeness(seen, spec)}
        if explained:
            answer["saliency"] = _to_maps("saliency", explained["saliency"][..., None])
            features = by_depth(explained["features"]).items()
            answer["features"] = [_to_maps(name, x) for name, x in features]
        return answer

    # Compiles before the first request.
    blank = padding({name: spec.fields[name] for name in task.inputs}, 1)
    check_finite_predictions(jax.device_get(program(trained.state, blank)[0]))
    return answer


def _likeness(images: np.ndarray, spec: DataSpec) -> dict[str, Any]:
    """Returns the score of a file, the mean over the images that the network saw of it."""
    if not spec.typical:
        return {}
    distance = float(score(images, spec.typical).mean())
    return {"score": distance, "unlike": distance > spec.typical.threshold}


def by_depth(features: dict[str, Any]) -> dict[str, Any]:
    """Returns features in the order of the layers: from large to small maps, "stem" first."""

    def depth(name):
        x = features[name]
        return -x[..., 0].size, name != "stem", name

    return {name: features[name] for name in sorted(features, key=depth)}


def _to_picture(pixels: np.ndarray) -> dict[str, Any]:
    return {"shape": pixels.shape, "pixels": _to_text(np.ascontiguousarray(pixels))}


def _to_maps(name: str, x: np.ndarray) -> dict[str, Any]:
    """Returns a layer's maps, (h, w, c) or (c,), as grey pixels (c, h, w) from 0 to 255.

    `low` is the value of pixel 0, `high` that of pixel 255.
    """
    low, high = float(x.min()), float(x.max())
    grey = (x - x.min()) * np.float32(255 / (high - low) if high > low else 0)
    maps = grey.round().astype(np.uint8).reshape(*((1, 1) if x.ndim == 1 else x.shape[:2]), -1)
    pixels = _to_text(maps.transpose(2, 0, 1))
    return {"name": name, "shape": x.shape, "low": low, "high": high, "pixels": pixels}


def _to_text(pixels: np.ndarray) -> str:
    return base64.b64encode(pixels.tobytes()).decode()


def about(trained: Trained) -> dict[str, Any]:
    """Returns a description of the network, as JSON values."""
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
    """Serves HTTP on (host, port), each request in its own thread.

    Args:
        host: a name or address of this machine.
        port: the port; 0: any free port.
        answer: see `make_answer`; one thread at a time calls it.
        about: the JSON values of GET /run.

    Raises:
        OSError: the address is in use or not one of this machine.
    """

    daemon_threads = False  # server_close waits for the threads
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
        socketserver.TCPServer.server_bind(self)  # HTTPServer.server_bind needs a name server

    def process_request(self, request: socket.socket, client_address: Any) -> None:
        if len(self._deadlines) >= MAX_REQUESTS:
            return self.shutdown_request(request)  # closes the connection without a response
        self._deadlines[request] = time.monotonic() + WHOLE_SECONDS
        return super().process_request(request, client_address)

    def process_request_thread(self, request: socket.socket, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._deadlines.pop(request, None)

    def service_actions(self) -> None:
        """Ends requests that take too long; called twice a second."""
        for request, deadline in list(self._deadlines.items()):
            if time.monotonic() > deadline:
                _end_reading(request)

    def server_close(self) -> None:
        """Closes the server. A request that was read completely still gets its response."""
        for request in list(self._deadlines):
            _end_reading(request)
        super().server_close()

    def handle_error(self, request: socket.socket, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # OSError: the client is gone
            super().handle_error(request, client_address)


def _end_reading(request: socket.socket) -> None:
    with suppress(OSError):  # the connection is already closed
        request.shutdown(socket.SHUT_RD)


class Handler(BaseHTTPRequestHandler):
    """Handles one request a connection."""

    timeout = SILENT_SECONDS
    default_request_version = "HTTP/1.0"  # a request without a version gets a status line, too
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
            return self.send_error(413, f"The file is larger than {MAX_BYTES // 10**6} MB.")
        file = self.rfile.read(int(lengths[0]))
        if len(file) < int(lengths[0]):
            return self.send_error(400, "The body ended before its Content-Length.")
        try:
            with self.server.lock:  # also for decoding: a large image takes much memory
                answer = self.server.answer(file)
        except UserError as error:
            return self.send_error(422, f"No prediction: {error}.")
        return self._send_json(200, answer)

    def parse_request(self) -> bool:
        """Refuses requests of other sites' pages, and of foreign names that point to this host."""
        if not super().parse_request():
            return False
        hosts = self.headers.get_all("Host", [])
        name = re.sub(r":\d*$", "", hosts[0]).lower() if len(hosts) == 1 else None
        if name not in self.server.host_names:
            self.send_error(421, "The Host is not this server's: use the address that it printed.")
        elif self.headers.get("Origin", f"http://{hosts[0]}") != f"http://{hosts[0]}":
            self.send_error(403, "The request is from another site's page.")
        else:
            return True
        return False

    def _refuse(self) -> None:
        if self.path in METHODS:
            self.send_error(405, f"{self.path} accepts only {METHODS[self.path]}.")
        else:
            self.send_error(404, "This path does not exist.")

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Sends {"error": message}. The parent class calls it, too, for requests that are not HTTP.

        Args:
            code: the HTTP status; 501 (no do_... for the method) becomes 405.
            message: the error; None: the description of the status.
            explain: ignored.
        """
        code = 405 if code == 501 else code
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
        """Reads the rest of the request: closing with unread bytes would discard the response."""
        super().finish()
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(LINGER_SECONDS)
        end = time.monotonic() + LINGER_SECONDS
        while self.connection.recv(65536) and time.monotonic() < end:
            pass

    def version_string(self) -> str:
        return "cv_jax"

    def log_message(self, *args: object) -> None:
        """Logs nothing: a response says what is wrong with its request."""


def _content_policy(page: str) -> str:
    """Returns the policy that allows only the page's own style and script, and loads no others."""

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
    parser.add_argument("--host", default="127.0.0.1", help="a name or address of this machine")
    parser.add_argument("--port", type=int, default=8000, help="0: any free port")
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
            print(f"{server.url}   Ctrl-C stops the server", flush=True)
            server.serve_forever()
    except Stopped as stopped:
        print(f"Stopped by {stopped}.")
        sys.exit(stopped.exit_code)


def _listen(host: str, port: int, *served: Any) -> Server:
    try:
        return Server(host, port, *served)
    except OSError as error:
        raise UserError(
            f"--host={host} --port={port} cannot be used ({error.strerror}): choose others."
        ) from error


if __name__ == "__main__":
    main()
