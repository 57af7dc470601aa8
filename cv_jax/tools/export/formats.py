"""Writes and reads the file formats of a trained network, with code that uses each.

A file holds the weights, the normalisation and a card (see card.py). Inputs are the task's input
fields, such as `image` (b, h, w, c) uint8, with b of 1 or more. Outputs are the predictions by
name, such as `logits` (b, n) float32.
"""

import importlib
import io
import json
import zipfile
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax import export

from cv_jax.config.errors import UserError, first_line
from cv_jax.models.ops import plain_lax
from cv_jax.trained.load import Trained, input_shapes, load_trained, variables

PLATFORMS = ("cpu", "cuda", "tpu")
_SERIALIZED, _CARD = "network.bin", "card.json"  # in the zip archive of a StableHLO file

Predict = Callable[[dict[str, np.ndarray]], dict[str, Any]]


class Format(NamedTuple):
    """A file format.

    Attributes:
        packages: modules that the format needs beside those of requirements.txt.
        write: (trained, card) -> the content of the file.
        read: path -> Predict, as another program would read the file.
        snippet: Python code that reads the file; {file}, {inputs} and {output} are filled in.
    """

    packages: tuple[str, ...]
    write: Callable[[Trained, dict[str, Any]], bytes]
    read: Callable[[epath.Path], Predict]
    snippet: str


def check_packages(name: str) -> None:
    """Raises UserError if a package that the format `name` needs is missing."""
    for package in FORMATS[name].packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(
                f"--format={name} needs {package}, which is missing: "
                "pip install -r requirements-export.txt"
            ) from error


def _network(trained: Trained) -> tuple[Callable, dict[str, jax.ShapeDtypeStruct]]:
    """Returns batch -> predictions, with constant weights, and the batch's shapes with symbol b."""
    (b,) = export.symbolic_shape("b")
    return partial(trained.task.predict, trained.state), input_shapes(trained, b)


def _write_stablehlo(trained: Trained, card: dict[str, Any]) -> bytes:
    network, batch = _network(trained)
    with plain_lax():
        exported = export.export(jax.jit(network), platforms=PLATFORMS)(batch)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as file:
        file.writestr(_SERIALIZED, bytes(exported.serialize()))
        file.writestr(_CARD, json.dumps(card, indent=2))
    return content.getvalue()


def _read_stablehlo(path: epath.Path) -> Predict:
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as file:
        return jax.jit(export.deserialize(bytearray(file.read(_SERIALIZED))).call)


def _write_onnx(trained: Trained, card: dict[str, Any]) -> bytes:
    from onnx import helper

    from cv_jax.tools.export.onnx_graph import to_onnx

    with plain_lax():
        model = to_onnx(*_network(trained))
    helper.set_model_props(model, {"card": json.dumps(card)})
    return model.SerializeToString()


def _read_onnx(path: epath.Path) -> Predict:
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda batch: dict(zip(names, session.run(names, batch), strict=True))


def _write_safetensors(trained: Trained, card: dict[str, Any]) -> bytes:
    from safetensors.numpy import save

    arrays = {name: np.asarray(x) for name, x in variables(trained.state).items()}
    return save(arrays, {"card": json.dumps(card)})


def _read_safetensors(path: epath.Path) -> Predict:
    trained = load_trained(path, own=True)  # trusted: this program wrote the file
    return jax.jit(partial(trained.task.predict, trained.state))


def snippet(name: str, trained: Trained, file: str) -> str:
    """Returns Python code that reads a file of the format `name` and predicts."""
    shapes = input_shapes(trained, 7)
    inputs = ", ".join(
        f'"{field}": np.zeros({x.shape}, np.{x.dtype})' for field, x in sorted(shapes.items())
    )
    output = next(iter(trained.task.outputs))
    return FORMATS[name].snippet.format(file=repr(file), inputs=f"{{{inputs}}}", output=output)


def read(name: str, path: epath.Path) -> Predict:
    """Reads a file of the format `name`.

    Raises:
        UserError: a package is missing, the file is damaged, or it was not written by
            cv_jax.tools.export.
    """
    check_packages(name)
    try:
        return FORMATS[name].read(path)
    except UserError:
        raise
    except Exception as error:  # a reader may raise anything on a damaged file
        raise UserError(
            f"{path} is damaged, or not a {name} file of cv_jax.tools.export "
            f"({first_line(error)}). Export the network again."
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
batch = {inputs}
{output} = np.asarray(network.call(batch)["{output}"])
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
batch = {inputs}
({output},) = session.run(["{output}"], batch)
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
batch = {inputs}
{output} = np.asarray(trained.task.predict(trained.state, batch)["{output}"])
""",
    ),
}
