"""Compares logits of networks of torchvision and timm with those of cv_jax on photographs.

    python -m benchmarks.pretrained --photos=DIR --n=200

Builds each network in PyTorch with seeded random weights and scales. Its running averages are those
of the first photographs. Nothing is downloaded. The network is written as a safetensors file and
read as by config.init_from. Both programs compute logits of the same 224x224 pixels, in float32.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import timm
import torch
import torchvision
from flax.traverse_util import unflatten_dict
from safetensors.torch import save_file

from benchmarks.machine import save
from cv_jax.config.paths import expand
from cv_jax.data.read_image import fit_image
from cv_jax.learn.initial import take_over
from cv_jax.learn.inputs import MEAN_AND_STD, to_unit
from cv_jax.models import build_model

SIZE = 224
BATCH = 25
# Name: (the network in PyTorch, config.model, config.data.normalize_by).
NETWORKS: dict[str, tuple[Callable, str, str]] = {
    "resnet18": (torchvision.models.resnet18, "resnet18(stem='imagenet')", "imagenet"),
    "resnet50": (torchvision.models.resnet50, "resnet50(stem='imagenet')", "imagenet"),
    "vit_s16": (
        partial(timm.create_model, "vit_small_patch16_224"),
        "vit_s16(pool='token', positions='learned')",
        "half",
    ),
    "convnext_t": (partial(timm.create_model, "convnext_tiny"), "convnext_t", "imagenet"),
}


def read_photos(folder: Path, n: int) -> np.ndarray:
    """Reads the first n photographs of a folder, by name, as (n, 224, 224, 3) uint8."""
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in (".jpeg", ".jpg"))[:n]
    return np.stack([fit_image(path.read_bytes(), (SIZE, SIZE, 3))[0] for path in paths])


@torch.no_grad()
def logits_there(network: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    """Returns the logits of PyTorch, (b, 1000)."""
    return network(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()


@torch.no_grad()
def randomize(network: torch.nn.Module, images: np.ndarray) -> None:
    """Draws all arrays, and takes running averages from images.

    The head's bias makes the mean logits 0, so that the top-1 is not always the same class.
    """
    torch.manual_seed(0)
    for name, x in network.named_parameters():
        if x.ndim == 1 and name.endswith(("weight", "gamma")):
            x.copy_(torch.rand_like(x) + 0.5)
        elif x.ndim == 1:
            x.copy_(0.1 * torch.randn_like(x))
        else:
            x.copy_(torch.randn_like(x) / x[0].numel() ** 0.5)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the plain mean over batches
    network.train()
    logits_there(network, images)
    network.eval()
    head = [module for module in network.modules() if isinstance(module, torch.nn.Linear)][-1]
    head.bias -= torch.tensor(logits_there(network, images).mean(0))


def load_here(network: torch.nn.Module, model_text: str, scratch: Path) -> Callable:
    """Returns images -> logits of cv_jax, with the weights of the PyTorch network."""
    file = scratch / f"{model_text.partition('(')[0]}.safetensors"
    save_file({name: x.contiguous() for name, x in network.state_dict().items()}, file)
    model = build_model(model_text, 1000, np.dtype("float32"))
    image = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), np.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), image)
    taken, _ = take_over(str(file), shapes, lambda name: False, lambda name: False)
    variables = unflatten_dict(taken, sep="/")
    apply = jax.jit(lambda variables, x: model.apply(variables, x, train=False)[0])
    return lambda images: np.asarray(apply(variables, images))


def compare(name: str, photos: np.ndarray, scratch: Path) -> dict[str, Any]:
    """Returns how far the logits of the two programs differ on the photographs."""
    build, model_text, by = NETWORKS[name]
    mean, std = (np.broadcast_to(np.float32(x), 3) for x in MEAN_AND_STD[by])
    images = (to_unit(photos) - mean) / std
    network = build(num_classes=1000)
    randomize(network, images[:BATCH])
    here = load_here(network, model_text, scratch)
    batches = [images[i : i + BATCH] for i in range(0, len(images), BATCH)]
    theirs = np.concatenate([logits_there(network, batch) for batch in batches])
    ours = np.concatenate([here(batch) for batch in batches])
    return {
        "photographs": len(photos),
        "largest_logit": float(np.abs(theirs).max()),
        "largest_difference": float(np.abs(theirs - ours).max()),
        "same_top1": int((theirs.argmax(1) == ours.argmax(1)).sum()),
        "different_top1": len(set(theirs.argmax(1).tolist())),
    }


def main() -> None:
    """Compares and prints; writes the record if --out is given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", required=True, help="folder of JPEG files")
    parser.add_argument("--n", type=int, default=200, help="number of photographs")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--out", help="JSON file for the record")
    parser.set_defaults(rounds=1)
    args = parser.parse_args()
    photos = read_photos(Path(expand(args.photos)), args.n)
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.networks:
            results[name] = found = compare(name, photos, Path(scratch))
            print(
                f"{name:10}  {found['same_top1']} of {found['photographs']} photographs have the "
                f"same top-1, of {found['different_top1']} classes; largest difference "
                f"{found['largest_difference']:.2g}, largest logit {found['largest_logit']:.3g}"
            )
    save("pretrained", args, results)


if __name__ == "__main__":
    main()
