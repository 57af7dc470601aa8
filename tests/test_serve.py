"""The page and what it asks: answers are those of evaluation, and nothing that is sent ends it."""

import base64
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import suppress

import jax
import numpy as np
import pytest
from etils.epath import Path
from playwright.sync_api import expect

from benchmarks import serve as benchmark
from cv_jax.config.errors import UserError
from cv_jax.data import load_dataset
from cv_jax.tools import serve
from cv_jax.trained.load import load_trained
from tests.conftest import ROOT
from tests.test_images import encode

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(digits_run):
    return load_trained(Path(digits_run), "seed=1", "mirror")


@pytest.fixture(scope="module")
def known(trained):
    """A test image that the network knows, as an array and a file, and its class."""
    test = load_dataset(trained.config.data).test
    logits = trained.task.predict(trained.state, {"image": test["image"][:20]})["logits"]
    i = int(np.argmax(np.asarray(logits).argmax(-1) == test["label"][:20]))
    return test["image"][i], encode(test["image"][i, ..., 0]), str(test["label"][i])


@pytest.fixture(scope="module")
def server(trained):
    answer, about = serve.make_answer(trained), serve.about(trained)
    with serve.Server("127.0.0.1", 0, answer, about) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def _request(body=b"", *headers, line="POST /predict HTTP/1.1", host="localhost:80"):
    return "\r\n".join([line, f"Host: {host}", *headers, "", ""]).encode() + body


def _file(file, *headers, **changes):
    return _request(file, f"Content-Length: {len(file)}", *headers, **changes)


def _ask(server, request):
    """What the server sends back: status (0: nothing), headers, body."""
    reply = b""
    with socket.create_connection(server.server_address) as connection, suppress(ConnectionError):
        connection.sendall(request)
        reply = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = reply.partition(b"\r\n\r\n")
    return int(head.split()[1]) if head else 0, head.decode(), body


def _pixels(values, dtype=np.uint8):
    return np.frombuffer(base64.b64decode(values["pixels"]), dtype)


def test_the_answer_is_that_of_evaluation(server, trained, known):
    image, file, label = known
    status, _, body = _ask(server, _file(file))
    answer = json.loads(body)
    logits = trained.task.predict(trained.state, {"image": image[None]})["logits"]
    explained = jax.jit(trained.task.explain)(trained.state, {"image": image[None]})
    assert status == 200
    assert answer["classes"][0]["name"] == label
    got = {row["name"]: row["probability"] for row in answer["classes"]}
    assert list(got.values()) == sorted(got.values(), reverse=True)
    want = jax.nn.softmax(logits[0])
    np.testing.assert_allclose([got[str(i)] for i in range(10)], want, rtol=1e-4)
    assert (answer["unlike"], answer["score"] < trained.spec.typical.threshold) == (False, True)
    assert answer["image"]["shape"] == [8, 8, 1]
    np.testing.assert_array_equal(_pixels(answer["image"]), image.ravel())

    assert [layer["name"] for layer in answer["features"]] == ["stem", "group1", "group2", "pooled"]
    for layer in answer["features"]:
        x = np.asarray(explained["features"][layer["name"]][0])
        assert layer["shape"] == list(x.shape)
        assert (layer["low"], layer["high"]) == pytest.approx((x.min(), x.max()), rel=1e-4)
        maps = np.moveaxis(x, -1, 0).ravel()
        scaled = layer["low"] + _pixels(layer) / 255 * (layer["high"] - layer["low"])
        half_a_grey = (x.max() - x.min()) / 255 * 0.51
        np.testing.assert_allclose(scaled, maps, rtol=0, atol=half_a_grey)
    want = explained["saliency"]
    brightest = np.argmax(want)
    assert _pixels(answer["saliency"])[brightest] == 255
    assert answer["saliency"]["high"] == pytest.approx(float(want.max()), rel=1e-4)


def test_a_layer_of_one_value_is_black():
    maps = serve._to_maps("flat", np.full((2, 3, 4), 7, np.float32))
    assert (maps["low"], maps["high"], maps["shape"]) == (7, 7, (2, 3, 4))
    assert _pixels(maps).tolist() == [0] * 24


PNG = encode(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8))
BAD = {
    "nothing": (_file(b""), 422, "it is not an image"),
    "no image": (_file(b"words"), 422, "No prediction: it is not an image of a kind"),
    "half a PNG": (_file(PNG[:80]), 422, "No prediction: it is damaged"),
    "no length": (_request(PNG), 411, "A Content-Length is needed"),
    "in pieces": (_file(b"", "Transfer-Encoding: chunked"), 411, "A Content-Length is needed"),
    "a length of words": (_request(PNG, "Content-Length: ten"), 400, "not a number"),
    "a length below 0": (_request(PNG, "Content-Length: -1"), 400, "not a number"),
    "two lengths": (_file(PNG, "Content-Length: 5"), 400, "not a number"),
    "too large": (_request(b"", "Content-Length: 10000001"), 413, "larger than 10 MB"),
    "too large, and sent": (_file(bytes(10_000_001)), 413, "larger than 10 MB"),
    "huge": (_request(b"", f"Content-Length: {'9' * 5000}"), 413, "larger than 10 MB"),
    "another path": (_file(PNG, line="POST /x HTTP/1.1"), 404, "does not exist"),
    "a file's path": (_request(line="GET /../serve.py HTTP/1.1"), 404, "does not exist"),
    "to GET it": (_request(line="GET /predict HTTP/1.1"), 405, "/predict accepts only POST"),
    "to POST the page": (_file(PNG, line="POST / HTTP/1.1"), 405, "/ accepts only GET"),
    "another method": (_file(PNG, line="BREW /predict HTTP/1.1"), 405, "method"),
    "another host": (_file(PNG, host="evil.example"), 421, "The Host is not this"),
    "a host like ours": (_file(PNG, host="localhost.evil.example:80"), 421, "The Host is not this"),
    "two hosts": (_file(PNG, "Host: localhost"), 421, "The Host is not this"),
    "no host": (b"GET / HTTP/1.0\r\n\r\n", 421, "The Host is not this"),
    "another origin": (_file(PNG, "Origin: http://evil.example"), 403, "another site's page"),
    "a file's origin": (_file(PNG, "Origin: null"), 403, "another site's page"),
    "no HTTP": (b"\x16\x03\x01\x00\xff\r\n\r\n", 400, ""),
    "a long line": (b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n", 414, ""),
    "many headers": (_request(b"", *[f"X-{i}: 1" for i in range(200)]), 431, ""),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_wrong_gets_its_status_and_a_sentence(server, kind, capfd):
    request, status, sentence = BAD[kind]
    got, head, body = _ask(server, request)
    assert got == status, body
    assert sentence in json.loads(body)["error"]
    assert "Content-Type: application/json" in head
    assert capfd.readouterr() == ("", "")
    assert _ask(server, _file(PNG))[0] == 200


def test_a_method_that_is_refused_is_told_the_other(server):
    assert "Allow: POST" in _ask(server, _request(line="PUT /predict HTTP/1.1"))[1]
    _, head, body = _ask(server, _request(line="HEAD / HTTP/1.1"))
    assert (head.split()[1], body) == ("405", b"")
    assert "Allow: GET" in head


def test_the_page_and_its_headers(server):
    for host in ("localhost", "127.0.0.1:9", "[::1]:9", "LOCALHOST"):
        request = _request(b"", f"Origin: http://{host}", line="GET / HTTP/1.1", host=host)
        status, head, body = _ask(server, request)
        assert (status, body) == (200, serve.PAGE.read_bytes())
    assert "default-src 'none'" in head
    assert "nosniff" in head
    assert "no-store" in head
    status, _, body = _ask(server, _request(line="GET /run HTTP/1.1"))
    assert json.loads(body) == {
        "model": "n94(widths=(16, 32))",
        "data": "digits",
        "run": "seed=1",
        "step": 152,
        "tta": "mirror",
        "image_shape": [8, 8, 1],
        "in_words": "n94(widths=(16, 32)) trained on digits, 8x8x1, 10 classes: "
        "0, 1, 2, 3, 4, 5, 6, 7, 8, 9; seed=1, step 152",
    }


def test_who_hangs_up_leaves_no_trace(server, capfd):
    for request in (b"", b"POST", _request(PNG[:9], "Content-Length: 5000"), _file(PNG)):
        with socket.create_connection(server.server_address) as connection:
            connection.sendall(request)
            reset = b"\1\0\0\0\0\0\0\0"  # on, 0 s: closing resets the connection
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
    assert _ask(server, _file(PNG))[0] == 200
    assert capfd.readouterr() == ("", "")


def test_a_body_that_ends_early_is_told_so(server):
    with socket.create_connection(server.server_address) as connection:
        connection.sendall(_request(PNG, "Content-Length: 5000"))
        connection.shutdown(socket.SHUT_WR)
        assert b"The body ended before" in b"".join(iter(lambda: connection.recv(65536), b""))


def test_who_is_silent_is_not_waited_for(server, monkeypatch, capfd):
    monkeypatch.setattr(serve.Handler, "timeout", 0.1)
    assert _ask(server, _request(b"", "Content-Length: 9"))[0] == 0
    assert capfd.readouterr() == ("", "")


def test_nor_who_sends_little_by_little(server, monkeypatch):
    monkeypatch.setattr(serve, "WHOLE_SECONDS", 0.2)
    with socket.create_connection(server.server_address) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nX: ")
        connection.settimeout(0.02)
        for _ in range(1000):
            try:
                connection.sendall(b"X")
                reply = connection.recv(65536)
                break
            except TimeoutError:
                pass
            except ConnectionError:
                return
    assert reply == b"" or b"421" in reply


def test_more_at_once_are_sent_away(server, monkeypatch):
    while server._deadlines:  # of the tests before
        time.sleep(0.001)
    monkeypatch.setattr(serve, "MAX_REQUESTS", 1)
    with socket.create_connection(server.server_address) as first:
        first.sendall(b"GET")
        while not server._deadlines:
            time.sleep(0.001)
        assert _ask(server, _file(PNG))[0] == 0
    monkeypatch.undo()
    assert _ask(server, _file(PNG))[0] == 200


def test_the_benchmark_gets_an_answer_to_every_kind(server, capfd):
    random.seed(0)
    port = server.server_address[1]
    assert len(benchmark.time_answers(port, (8, 8), 2)) == 2
    got = {kind: set(counts) for kind, counts in benchmark.send_bad(port, 22).items()}
    known = {"400", "403", "404", "405", "411", "413", "421", "422", "431", "none"}
    assert set().union(*got.values()) == known
    assert got["20 MB"] == {"413"}
    assert got["a PNG of 60 million pixels"] == got["random bytes"] == {"422"}
    assert capfd.readouterr() == ("", "")


def test_a_port_that_is_taken_is_named(server):
    port = server.server_address[1]
    with pytest.raises(
        UserError, match=rf"--port={port} cannot be used \(Address already in use\)"
    ):
        serve._listen("127.0.0.1", port, None, {})
    with pytest.raises(UserError, match=r"--host=192\.0\.2\.1 --port=0 cannot be used"):
        serve._listen("192.0.2.1", 0, None, {})


def test_mistakes_are_named(digits_run, monkeypatch, capsys):
    monkeypatch.setattr(serve, "raise_when_signalled", lambda: None)
    for flag, sentence in (
        ("--tta=mirrors", "'mirrors' is unknown. Did you mean 'mirror'?"),
        ("--run=seed=9", "has no run 'seed=9'"),
        ("--port=70000", "must be from 0 to 65535"),
    ):
        monkeypatch.setattr(sys, "argv", ["serve", f"--workdir={digits_run}", flag])
        with pytest.raises(SystemExit) as ended:
            serve.main()
        assert ended.value.code == 2
        assert sentence in capsys.readouterr().err


def test_a_network_of_no_numbers_is_refused(trained):
    nothing = jax.tree.map(lambda x: x * np.nan, trained.state.params)
    state = trained.state.replace(params=nothing)
    with pytest.raises(UserError, match="logits that are not finite"):
        serve.make_answer(trained._replace(state=state))


# It says every address that the program looks up or connects to.
WATCHED = """
import runpy, sys
calls = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")
sys.addaudithook(lambda name, args: name in calls and print(name, args, flush=True))
runpy.run_module("cv_jax.tools.serve", run_name="__main__")
"""


def test_it_reaches_no_other_address_and_ends_in_order(digits_run, known):
    command = [sys.executable, "-c", WATCHED, f"--workdir={digits_run}", "--port=0", "--tta=none"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        url = re.match(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())[0]
        reply = urllib.request.urlopen(f"{url}predict", known[1], timeout=30)
        assert json.load(reply)["classes"][0]["name"] == known[2]
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (143, "Stopped by SIGTERM.\n", "")


# The page


@pytest.fixture
def page(browser, server):
    """The page; no error may come but for refused files, and nothing from elsewhere."""
    wrong, urls = [], []
    with browser.new_context(viewport={"width": 390, "height": 844}) as context:
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text))
        page.on("request", lambda request: urls.append(request.url))
        page.goto(server.url)
        expect(page.locator("#about")).not_to_be_empty()
        yield page
    assert [text for text in wrong if "a status of 422" not in text] == []
    assert [url for url in urls if not url.startswith((server.url, "data:"))] == []


def _status(page, text):
    expect(page.locator("#status")).to_have_text(re.compile(text), timeout=10_000)


def test_a_file_is_answered(page, known, tmp_path):
    _, file, label = known
    (tmp_path / "digit.png").write_bytes(file)
    page.set_input_files("#file", tmp_path / "digit.png")
    _status(page, rf"^{label}, \d")
    assert page.locator("#classes li").count() == 10
    assert page.locator("#classes li span").first.text_content() == label
    layers = page.locator("#features summary").all_text_contents()
    assert re.match(r"stem7\W+7\W+8, black -0\.\d+, white \d", layers[0])
    assert len(layers) == 4
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    seen = "[...document.querySelector('#seen').getContext('2d').getImageData(0, 0, 8, 8).data]"
    pixels = np.reshape(page.evaluate(seen), (8, 8, 4))
    np.testing.assert_array_equal(pixels[..., :1], known[0])


def test_an_image_unlike_the_training_images_is_said(page, known, server):
    grey = encode(np.full((9, 9), 128, np.uint8))
    assert json.loads(_ask(server, _file(grey))[2])["unlike"] is True
    for file, text in (
        (grey, r"^This is unlike the training images \(score \d+\.\d\)"),
        (known[1], "^$"),
    ):
        page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": file})
        expect(page.locator("#unlike")).to_have_text(re.compile(text))


def test_a_pixel_of_1_to_4_channels_is_drawn(page):
    drawn = "(x) => [...drawn(x).getContext('2d').getImageData(0, 0, 1, 1).data]"
    for values, rgb in (
        ([7], [7, 7, 7]),
        ([7, 255], [7, 7, 7]),
        ([7, 8, 9], [7, 8, 9]),
        ([7, 8, 9, 255], [7, 8, 9]),
    ):
        pixels = base64.b64encode(bytes(values)).decode()
        image = {"shape": [1, 1, len(values)], "pixels": pixels}
        assert page.evaluate(drawn, image) == [*rgb, 255]


def test_a_drawing_is_answered_and_cleared(page):
    box = page.locator("#drawing").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + 40
    page.mouse.move(x, y)
    page.mouse.down()
    for i in range(1, 11):
        page.mouse.move(x, y + i * (box["height"] - 80) / 10)
    page.mouse.up()
    _status(page, r"^\d, \d")
    page.get_by_role("button", name="Clear").click()
    _status(page, "No image yet")
    assert page.locator("#answer").is_hidden()


def test_what_is_no_image_is_told_so(page):
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": b"words"})
    _status(page, r"^No prediction: it is not an image of a kind that can be read\.$")
    assert page.locator("#answer").is_hidden()


def test_names_are_text(page, server, known, monkeypatch):
    answer, name = server.answer(known[1]), "<img src=/x onerror=alert(1)>"
    named = {**answer, "classes": [{"name": name, "probability": 1.0}]}
    named["features"][0]["name"] = name
    monkeypatch.setattr(server, "answer", lambda file: named)
    page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": known[1]})
    _status(page, "^<img src=/x")
    assert page.locator("#classes li span").first.text_content() == name
    assert page.locator("#features summary").first.text_content().startswith(name)
    assert page.locator("main img").count() == 0


def test_an_answer_that_is_late_is_dropped(page, known):
    held = []
    page.route("**/predict", lambda route: held.append(route))
    digit = {"name": "a.png", "mimeType": "image/png", "buffer": known[1]}
    page.set_input_files("#file", digit)
    while not held:
        page.wait_for_timeout(5)
    page.get_by_role("button", name="Clear").click()
    with page.expect_response("**/predict"):
        held[0].continue_()
    page.wait_for_timeout(50)
    assert page.locator("#status").text_content() == "No image yet."
