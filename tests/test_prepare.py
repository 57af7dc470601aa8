"""Downloading and preparing, from a server on this machine that has a small CIFAR."""

import hashlib
import http.server
import io
import socket
import sys
import tarfile
import threading

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import checksums, downloader
from tensorflow_datasets.image_classification import cifar

from cv_jax.config.errors import UserError
from cv_jax.data import load_dataset
from cv_jax.data.sources import prepare

from .test_data import TinyBuilder, config_of, features_of, png, tiny_splits

CIFAR10_NAMES = [
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
]
COARSE_NAMES = [f"coarse {i}" for i in range(20)]
FINE_NAMES = [f"fine {i}" for i in range(100)]


@pytest.fixture(autouse=True)
def no_tensorflow():
    """Nothing here imports TensorFlow, also where it is installed."""
    yield
    assert "tensorflow" not in sys.modules


@pytest.fixture(autouse=True)
def own_directories(monkeypatch, tmp_path):
    monkeypatch.setenv("CV_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


# ---- a small CIFAR, in the real layout


def _records(seed, count, *num_classes):
    """Random labels (count, len(num_classes)) and images as planes r, g, b (count, 3, 32, 32)."""
    rng = np.random.default_rng(seed)
    labels = np.stack([rng.integers(0, n, count, np.uint8) for n in num_classes], 1)
    return labels, rng.integers(0, 256, (count, 3, 32, 32), np.uint8)


def _file(labels, planes):
    return np.concatenate([labels, planes.reshape(len(planes), -1)], 1).tobytes()


def _names(names):
    return "".join(f"{name}\n" for name in [*names, ""]).encode()  # with an empty last line


def _archive(files):
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return archive.getvalue()


TRAIN10 = [_records(seed, 4, 10) for seed in range(5)]
TEST10 = _records(5, 6, 10)
TRAIN100, TEST100 = _records(6, 8, 20, 100), _records(7, 5, 20, 100)

ARCHIVES = {
    "/cifar-10-binary.tar.gz": _archive(
        {
            "cifar-10-batches-bin/batches.meta.txt": _names(CIFAR10_NAMES),
            **{
                f"cifar-10-batches-bin/data_batch_{i}.bin": _file(*records)
                for i, records in enumerate(TRAIN10, start=1)
            },
            "cifar-10-batches-bin/readme.html": b"<html>",
            "cifar-10-batches-bin/test_batch.bin": _file(*TEST10),
        }
    ),
    "/cifar-100-binary.tar.gz": _archive(
        {
            "cifar-100-binary/coarse_label_names.txt": _names(COARSE_NAMES),
            "cifar-100-binary/fine_label_names.txt": _names(FINE_NAMES),
            "cifar-100-binary/train.bin": _file(*TRAIN100),
            "cifar-100-binary/test.bin": _file(*TEST100),
        }
    ),
}


# ---- the server


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves ARCHIVES as `server.behaviour` says."""

    def do_GET(self):
        self.server.requests.append(self.path)
        behaviour, content = self.server.behaviour, ARCHIVES[self.path]
        if behaviour == "hang":
            self.server.released.wait()
            return
        self.send_response(200 if behaviour in ("ok", "cut") else behaviour)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2 if behaviour == "cut" else None])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server to which TFDS's CIFAR addresses lead, with the checksums of ARCHIVES."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.behaviour, server.released, server.requests = "ok", threading.Event(), []
        server.url = f"http://127.0.0.1:{server.server_port}"
        for builder in (cifar.Cifar10, cifar.Cifar100):
            info = builder._cifar_info.fget(builder)
            url = server.url + "/" + info.url.rsplit("/")[-1]
            monkeypatch.setattr(builder, "_cifar_info", info._replace(url=url))
        _register(monkeypatch, server.url, ARCHIVES)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


def _register(monkeypatch, server_url, archives):
    infos = {
        server_url + path: checksums.UrlInfo(
            size=len(content), checksum=hashlib.sha256(content).hexdigest(), filename=path[1:]
        )
        for path, content in archives.items()
    }
    monkeypatch.setattr(checksums, "get_all_url_infos", lambda: infos)


def _tree(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def _error(name, directory):
    with pytest.raises(UserError) as error:
        load_dataset(config_of(name, directory))
    return str(error.value)


# ---- what is prepared


def test_cifar10_is_what_tfds_reads_as_its_own(tmp_path, server):
    data = load_dataset(config_of("cifar10", tmp_path / "tfds"))
    assert data.spec.class_names == tuple(CIFAR10_NAMES)

    builder = tfds.builder("cifar10", data_dir=tmp_path / "tfds")
    assert builder.is_prepared()
    assert builder.info.full_name == "cifar10/3.0.2"
    assert builder.info.features["label"].names == CIFAR10_NAMES
    assert builder.info.download_size == len(ARCHIVES["/cifar-10-binary.tar.gz"])
    train = [np.concatenate(parts) for parts in zip(*TRAIN10, strict=True)]
    for split, (labels, planes) in {"train": train, "test": TEST10}.items():
        examples = list(builder.as_data_source(split))
        assert sorted(e["id"] for e in examples) == [
            f"{split}_{i:05}".encode() for i in range(len(labels))
        ]
        for example in examples:
            i = int(example["id"][-5:])
            assert example["label"] == labels[i, 0]
            np.testing.assert_array_equal(example["image"], planes[i].transpose(1, 2, 0))
        ours = getattr(data, split)
        np.testing.assert_array_equal(ours["image"], [e["image"] for e in examples])
        np.testing.assert_array_equal(ours["label"], [e["label"] for e in examples])

    assert _tree(tmp_path / "tfds") == [
        "cifar10",
        "cifar10/3.0.2",
        "cifar10/3.0.2/cifar10-test.array_record-00000-of-00001",
        "cifar10/3.0.2/cifar10-train.array_record-00000-of-00001",
        "cifar10/3.0.2/dataset_info.json",
        "cifar10/3.0.2/features.json",
        "cifar10/3.0.2/label.labels.txt",
    ]


def test_the_description_is_the_one_of_the_real_cifar10(tmp_path, server, cifar10_dir):
    load_dataset(config_of("cifar10", tmp_path / "tfds"))
    for file in ("features.json", "label.labels.txt"):
        ours = (tmp_path / "tfds/cifar10/3.0.2" / file).read_text()
        assert ours.strip() == (cifar10_dir / "cifar10/3.0.2" / file).read_text().strip()
    ours, real = (
        tfds.builder_from_directory(directory / "cifar10/3.0.2").info.as_proto
        for directory in (tmp_path / "tfds", cifar10_dir)
    )
    for field in ("name", "version", "module_name", "file_format", "supervised_keys"):
        assert getattr(ours, field) == getattr(real, field)


def test_cifar100_has_its_fine_labels(tmp_path, server):
    data = load_dataset(config_of("cifar100", tmp_path / "tfds"))
    assert data.spec.class_names == tuple(FINE_NAMES)
    assert (data.spec.num_train, data.spec.num_test, data.spec.num_classes) == (8, 5, 100)
    labels, planes = TRAIN100
    fine = {
        image.transpose(1, 2, 0).tobytes(): n for image, (_, n) in zip(planes, labels, strict=True)
    }
    assert [fine[image.tobytes()] for image in data.train["image"]] == list(data.train["label"])
    builder = tfds.builder("cifar100", data_dir=tmp_path / "tfds")
    assert builder.info.features["coarse_label"].names == COARSE_NAMES


def test_what_is_prepared_is_not_fetched_again(tmp_path, server):
    load_dataset(config_of("cifar10", tmp_path / "tfds"))
    assert load_dataset(config_of("cifar10", tmp_path / "tfds")).spec.num_train == 20
    assert server.requests == ["/cifar-10-binary.tar.gz"]


def test_another_process_may_be_faster(tmp_path, server, monkeypatch):
    def overtaken(name, data_dir):
        download_and_prepare(name, data_dir)
        raise OSError("Directory not empty")

    download_and_prepare = prepare._download_and_prepare
    monkeypatch.setattr(prepare, "_download_and_prepare", overtaken)
    assert load_dataset(config_of("cifar10", tmp_path / "tfds")).spec.num_train == 20


def test_others_are_prepared_by_tfds_where_there_is_tensorflow(tmp_path, monkeypatch):
    def builder(name, data_dir):
        assert name == "mnist"
        return TinyBuilder(features_of(), tiny_splits(), name=name, data_dir=data_dir)

    monkeypatch.setattr(prepare.tfds, "builder", builder)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "tensorflow")
    prepare.prepare("mnist", tmp_path)
    assert "mnist/1.0.0/mnist-train.array_record-00000-of-00001" in _tree(tmp_path)


# ---- what cannot be


HINTS = ("TFDS_DATA_DIR", "--config.data.dir", "prepared copy", "configs/digits.py")


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        (404, "HTTP code: 404"),
        (500, "500 error"),
        ("hang", "timed out"),
        ("cut", "IncompleteRead|bytes"),
    ],
)
def test_a_failing_server_is_named_and_leaves_nothing(
    tmp_path, server, monkeypatch, behaviour, reason
):
    monkeypatch.setattr(prepare, "_TIMEOUT", (0.3, 0.3))
    server.behaviour = behaviour
    message = _error("cifar10", tmp_path / "tfds")
    assert f"{server.url}/cifar-10-binary.tar.gz cannot be fetched: " in message
    assert any(words in message for words in reason.split("|"))
    assert server.requests == ["/cifar-10-binary.tar.gz"]  # once: repeating it takes minutes
    assert all(hint in message for hint in HINTS)
    assert f"not prepared in {tmp_path / 'tfds'}" in message
    assert "\n" not in message
    assert _tree(tmp_path / "tfds") == []


def test_no_server_is_said_in_plain_words(tmp_path, server):
    server.shutdown()
    server.server_close()
    message = _error("cifar100", tmp_path / "tfds")
    assert f"{server.url}/cifar-100-binary.tar.gz cannot be fetched: Connection refused." in message
    assert all(hint in message for hint in HINTS)
    assert _tree(tmp_path / "tfds") == []


def test_no_name_server_is_said_in_plain_words(tmp_path, server, monkeypatch):
    def getaddrinfo(*args, **kwargs):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    message = _error("cifar10", tmp_path / "tfds")
    assert "/cifar-10-binary.tar.gz cannot be fetched: Name or service not known." in message
    assert _tree(tmp_path / "tfds") == []


def test_a_wrong_checksum_names_both(tmp_path, server, monkeypatch):
    _register(monkeypatch, server.url, dict.fromkeys(ARCHIVES, b"other"))
    message = _error("cifar10", tmp_path / "tfds")
    for content in (b"other", ARCHIVES["/cifar-10-binary.tar.gz"]):
        assert hashlib.sha256(content).hexdigest() in message
    assert f"{server.url}/cifar-10-binary.tar.gz" in message
    assert "\n" not in message
    assert all(hint in message for hint in HINTS)
    assert _tree(tmp_path / "tfds") == []


def _interrupted_download(self, url, destination_path, verify):
    (destination_path / "half").write_text("an arch")
    raise KeyboardInterrupt


def _interrupted_images(path, num_labels):
    yield np.zeros(1, np.uint8), png(np.zeros((32, 32, 3), np.uint8))
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("owner", "name", "interrupted"),
    [
        (downloader._Downloader, "_sync_download", _interrupted_download),
        (prepare, "_load_images", _interrupted_images),
    ],
)
def test_ctrl_c_leaves_nothing(tmp_path, server, monkeypatch, owner, name, interrupted):
    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_dataset(config_of("cifar10", tmp_path / "tfds"))
    assert _tree(tmp_path / "tfds") == []


def test_tensorflow_is_asked_for_where_it_is_needed(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = _error("fashion_mnist", tmp_path)
    assert f"fashion_mnist is not prepared in {tmp_path}" in message
    assert "pip install tensorflow\n" in message
    assert (
        "python -c \"import tensorflow_datasets as tfds; tfds.builder('fashion_mnist', "
        f"data_dir='{tmp_path}').download_and_prepare(file_format='array_record')\"" in message
    )
    assert _tree(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "guess"),
    [
        ("cifar_10", " Did you mean 'cifar10'?"),
        ("digit", " Did you mean 'digits'?"),
        ("../cifar10", ""),
    ],
)
def test_an_unknown_name_gets_the_nearest(tmp_path, name, guess):
    message = _error(name, tmp_path)
    assert f"Unknown data set {name!r}.{guess} Set config.data.name to 'digits', which" in message
    assert "returns cv_jax.data.Stored and set --config.data.name=MODULE:FUNCTION" in (message)


def test_a_directory_that_is_not_one_is_named(tmp_path):
    (tmp_path / "file").touch()
    message = _error("cifar10", tmp_path / "file")
    assert str(tmp_path / "file") in message
    assert all(hint in message for hint in HINTS)


def test_an_unfinished_directory_is_named(tmp_path):
    (tmp_path / "cifar10" / "3.0.2").mkdir(parents=True)
    message = _error("cifar10", tmp_path)
    assert f"The directory of cifar10 in {tmp_path} has no dataset_info.json" in message
