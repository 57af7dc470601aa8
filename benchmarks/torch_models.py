"""PyTorch's side of benchmarks.step: the same networks, as a PyTorch user would write them.

The images of N94 and ResNet18 are 32x32. Their submodules have the names of the Flax modules;
tests/test_benchmarks.py copies parameters and compares logits, gradients and training steps. Other
networks are torchvision's, for photographs.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from torch.nn import functional

from benchmarks.worker import (
    IMAGES,
    LR,
    MEAN,
    MOMENTUM,
    STD,
    WEIGHT_DECAY,
    Steps,
    random_boxes,
    random_images,
)


class N94(nn.Module):
    """cv_jax/models/n94.py; (b, 3, 32, 32) -> (b, num_classes)."""

    def __init__(self, num_classes: int = 10, widths: Sequence[int] = (64, 256, 256)) -> None:
        super().__init__()
        self.whiten = nn.Conv2d(3, 24, 2)
        self.whiten.weight.requires_grad_(False)
        self.group1, self.group2, self.group3 = (
            Group(before, width) for before, width in zip((24, *widths), widths, strict=False)
        )
        self.head = nn.Linear(widths[-1], num_classes, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.gelu(self.whiten(x))
        x = self.group3(self.group2(self.group1(x)))
        return self.head(x.amax((2, 3))) / self.head.in_features


class Group(nn.Module):
    """Two 3x3 convolutions, a pool between them."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, padding=1, bias=False)
        self.norm1 = _norm_without_scale(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = _norm_without_scale(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.max_pool2d(self.conv1(x), 2)
        x = functional.gelu(self.norm1(x))
        return functional.gelu(self.norm2(self.conv2(x)))


def _norm_without_scale(width: int) -> nn.BatchNorm2d:
    # PyTorch's momentum is the weight of the new batch, Flax's 0.6 that of the old average.
    norm = nn.BatchNorm2d(width, eps=1e-12, momentum=0.4)
    norm.weight.requires_grad_(False)  # stays 1
    return norm


class ResNet18(nn.Module):
    """cv_jax/models/resnet.py's resnet18 with the CIFAR stem."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(64)
        before = 64
        for i, width in enumerate((64, 128, 256, 512), start=1):
            for j in (1, 2):
                strides = 2 if i > 1 and j == 1 else 1
                self.add_module(f"group{i}_block{j}", BasicBlock(before, width, strides))
                before = width
        self.head = nn.Linear(512, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.stem_norm(self.stem(x)))
        for name, block in self.named_children():
            if name.startswith("group"):
                x = block(x)
        return self.head(x.mean((2, 3)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, before: int, width: int, strides: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, strides, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut = self.shortcut_norm = nn.Identity()
        if strides != 1 or before != width:
            self.shortcut = nn.Conv2d(before, width, 1, strides, bias=False)
            self.shortcut_norm = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return functional.relu(y + self.shortcut_norm(self.shortcut(x)))


def _of_torchvision(name: str, **arguments: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision import models  # only here: n94 and resnet18 need no torchvision

        return getattr(models, name)(num_classes=10, **arguments)

    return build


MODELS = {
    "n94": N94,
    "resnet18": ResNet18,
    "resnet18_240x320": _of_torchvision("resnet18"),
    "resnet50": _of_torchvision("resnet50"),
    "vit_s16": _of_torchvision(
        "VisionTransformer",
        **{"image_size": 224, "patch_size": 16, "num_layers": 12},
        **{"num_heads": 6, "hidden_dim": 384, "mlp_dim": 1536},
    ),
    "convnext_t": _of_torchvision("convnext_tiny"),
}


def make_step(
    network: nn.Module,
    dtype: str,
    layout: torch.memory_format,
    device: str = "cpu",
    compiled: bool = False,
) -> Callable:
    """Returns (image (b, 3, 32, 32) uint8, label (b,) int64) -> loss (), which trains `network`.

    Args:
        network: is on `device` and has the layout `layout`.
        dtype: float32, or bfloat16 by autocast.
        layout: of the images.
        device: "cpu" or "cuda".
        compiled: whether torch.compile compiles the loss: normalisation, network, cross-entropy.
    """
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (MEAN, STD))
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, LR, MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY)

    def loss_of(image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        x = ((image.float() / 255 - mean) / std).contiguous(memory_format=layout)
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            return functional.cross_entropy(network(x), label)

    if compiled:
        loss_of = torch.compile(loss_of)

    def step(image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        loss = loss_of(image, label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def fcos(size: tuple[int, int]) -> nn.Module:
    """Builds torchvision's FCOS with ResNet-18, for images of `size` (h, w) and 10 classes."""
    from torchvision.models.detection import FCOS
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    backbone = resnet_fpn_backbone(
        backbone_name="resnet18",
        weights=None,
        trainable_layers=5,
        norm_layer=nn.BatchNorm2d,
        returned_layers=[2, 3, 4],
    )
    # One size for each of the pyramid's four levels; FCOS expects five unless told otherwise.
    anchors = AnchorGenerator(((8,), (16,), (32,), (64,)), ((1.0,),) * 4)
    return FCOS(backbone, 10, min_size=size[0], max_size=size[1], anchor_generator=anchors)


def _detector_steps(
    image: torch.Tensor, indices: Iterator, layout: torch.memory_format, size: tuple[int, int]
) -> Steps:
    """Builds steps of FCOS, in float32 on the CPU."""
    network = fcos(size).to(memory_format=layout)
    optimizer = torch.optim.SGD(
        network.parameters(), LR, MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    boxes, label = (torch.from_numpy(x) for x in random_boxes(len(image), size))

    def steps(num_steps: int) -> float:
        for index in itertools.islice(indices, num_steps):
            images = [x.float() / 255 for x in image[index]]
            targets = [{"boxes": boxes[i], "labels": label[i].long()} for i in index]
            loss = sum(network(images, targets).values())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 10.0)
            optimizer.step()
        return loss.item()

    return steps


def torch_steps(
    model: str,
    batch_size: int,
    dtype: str,
    channels_last: bool,
    num_threads: int,
    device: str = "cpu",
    compiled: bool = False,
) -> Steps:
    """Builds steps on batches of resident images; `dtype` to `compiled` are as in `make_step`."""
    torch.set_num_threads(num_threads)
    torch.backends.cudnn.benchmark = True  # looks for the fastest convolutions on a GPU
    layout = torch.channels_last if channels_last else torch.contiguous_format
    size, num_train = IMAGES[model]
    image, label = (torch.from_numpy(x).to(device) for x in random_images(num_train, size))
    image, label = image.permute(0, 3, 1, 2).contiguous(), label.long()
    order = torch.randperm(num_train, device=device).split(batch_size)[: num_train // batch_size]
    indices = itertools.cycle(order)
    if model == "detector":
        return _detector_steps(image, indices, layout, size)
    network = MODELS[model]().to(device, memory_format=layout)
    step = make_step(network, dtype, layout, device, compiled)

    def steps(num_steps: int) -> float:
        for index in itertools.islice(indices, num_steps):
            loss = step(image[index], label[index])
        if device == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    return steps
