"""The files that a trained network can become: how each is written, read and used.

In each are the weights, the normalisation and a card (see card.py); what goes in are uint8 images
(b, h, w, c) with b of 1 or more, what comes out are logits (b, n) in float32.
"""

import importlib
import io
import json
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import export

from cv_jax.config.errors import UserError, first_line
from cv_jax.models.ops import plain_lax
from cv_jax.trained.load import Trained, load_trained, variables

PLATFORMS = ("cpu", "cuda", "tpu")
_SERIALIZED, _CARD = "network.bin", "card.json"  # in the zip of a StableHLO file

Predict = Callable[[np.ndarray], Any]


class Format(NamedTuple):
    """A kind of file.

    Attributes:
        packages: modules that it needs beside those of requirements.txt.
        write: (trained, tta, card) -> the content of the file.
        read: path -> (image -> logits), as another program would read it.
        snippet: Python code that does so, with {file} and {shape} to be filled in.
    """

    packages: tuple[str, ...]
    write: Callable[[Trained, str, dict[str, Any]], bytes]
    read: Callable[[epath.Path], Predict]
    snippet: str


def check_packages(name: str) -> None:
    """Raises UserError where a package is missing that the format of this name needs."""
    for package in FORMATS[name].packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(
                f"--format={name} needs packages more ({package} is not there): "
                "pip install -r requirements-export.txt"
            ) from error


def _network(trained: Trained, tta: str) -> tuple[Callable, jax.ShapeDtypeStruct]:
    """image -> logits, with the weights as constants, and what goes in: b is a symbol."""
    sizes = ", ".join(map(str, trained.spec.image_shape))
    image = jax.ShapeDtypeStruct(export.symbolic_shape(f"b, {sizes}"), jnp.uint8)
    return lambda image: trained.predict(trained.state, image, tta)[0], image


def _write_stablehlo(trained: Trained, tta: str, card: dict[str, Any]) -> bytes:
    network, image = _network(trained, tta)
    with plain_lax():
        exported = export.export(jax.jit(network), platforms=PLATFORMS)(image)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as file:
        file.writestr(_SERIALIZED, bytes(exported.serialize()))
        file.writestr(_CARD, json.dumps(card, indent=2))
    return content.getvalue()


def _read_stablehlo(path: epath.Path) -> Predict:
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as file:
        return jax.jit(export.deserialize(bytearray(file.read(_SERIALIZED))).call)


def _write_onnx(trained: Trained, tta: str, card: dict[str, Any]) -> bytes:
    from onnx import helper

    from cv_jax.tools.export.onnx_graph import to_onnx

    with plain_lax():
        model = to_onnx(*_network(trained, tta))
    helper.set_model_props(model, {"card": json.dumps(card)})
    return model.SerializeToString()


def _read_onnx(path: epath.Path) -> Predict:
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda image: session.run(["logits"], {"image": image})[0]


def _write_safetensors(trained: Trained, tta: str, card: dict[str, Any]) -> bytes:
    from safetensors.numpy import save

    del tta  # it is in the card
    arrays = {name: np.asarray(x) for name, x in variables(trained.state).items()}
    return save(arrays, {"card": json.dumps(card)})


def _read_safetensors(path: epath.Path) -> Predict:
    trained = load_trained(path)
    return jax.jit(lambda image: trained.predict(trained.state, image, trained.config.tta)[0])


def read(name: str, path: epath.Path) -> Predict:
    """Reads a file of the format of this name.

    Raises:
        UserError: a package is missing, or the file is damaged or another program's.
    """
    check_packages(name)
    try:
        return FORMATS[name].read(path)
    except UserError:
        raise
    except Exception as error:  # whatever such a file does to its reader
        raise UserError(
            f"{path} is damaged, or no {name} file of cv_jax.tools.export ({first_line(error)})."
        ) from error


FORMATS = {
    "stablehlo": Format(
        ("flatbuffers",),
        _write_stablehlo,
        _read_stablehlo,
        """
# pip install jax flatbuffers; on CPU, CUDA GPU or TPU
import json
import zipfile

import numpy as np
from jax import export

with zipfile.ZipFile({file}) as file:
    network = export.deserialize(bytearray(file.read("network.bin")))
    card = json.loads(file.read("card.json"))
images = np.zeros((7, {shape}), np.uint8)
logits = np.asarray(network.call(images))
names = [card["data"]["class_names"][i] for i in logits.argmax(-1)]
""",
    ),
    "onnx": Format(
        ("onnx", "onnxruntime"),
        _write_onnx,
        _read_onnx,
        """
# pip install onnxruntime
import json

import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession({file})
card = json.loads(session.get_modelmeta().custom_metadata_map["card"])
images = np.zeros((7, {shape}), np.uint8)
(logits,) = session.run(["logits"], {{"image": images}})
names = [card["data"]["class_names"][i] for i in logits.argmax(-1)]
""",
    ),
    "safetensors": Format(
        ("safetensors",),
        _write_safetensors,
        _read_safetensors,
        """
# pip install safetensors; in the directory of cv_jax
import numpy as np
from etils import epath

from cv_jax.trained.load import load_trained

trained = load_trained(epath.Path({file}))
images = np.zeros((7, {shape}), np.uint8)
logits = np.asarray(trained.predict(trained.state, images, trained.config.tta)[0])
names = [trained.spec.class_names[i] for i in logits.argmax(-1)]
""",
    ),
}
