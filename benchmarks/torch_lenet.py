"""PyTorch's CIFAR-10 tutorial as one program, without cv_jax, JAX or torchvision.

    python benchmarks/torch_lenet.py DIRECTORY --epochs=1

https://pytorch.org/tutorials/beginner/blitz/cifar10_tutorial.html: four images a step, SGD, two
loader processes. The data set and its transforms are torchvision's, written out: each read turns
an image into a PIL image, a float tensor and a normalised tensor.

DIRECTORY holds {train,test}.{image,label}.npy. The last line of the output is JSON: accuracy on
test, seconds of the training loop and of the evaluation.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset


class CIFAR10(Dataset):
    """uint8 images in memory -> (image (3, 32, 32) float32 in [-1, 1], label)."""

    def __init__(self, directory: Path, split: str) -> None:
        self.images = np.load(directory / f"{split}.image.npy")
        self.labels = np.load(directory / f"{split}.label.npy").tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = Image.fromarray(self.images[index])
        return normalize(to_tensor(image)), self.labels[index]


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Converts (h, w, c) in 0..255 to (c, h, w) float32 in [0, 1], as transforms.ToTensor."""
    array = torch.from_numpy(np.array(image, np.uint8, copy=True))
    return array.permute((2, 0, 1)).contiguous().to(torch.get_default_dtype()).div(255)


def normalize(image: torch.Tensor) -> torch.Tensor:
    """Applies torchvision.transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))."""
    mean, std = (torch.as_tensor((0.5, 0.5, 0.5), dtype=image.dtype) for _ in range(2))
    return image.clone().sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))


class LeNet(nn.Module):
    """cv_jax/models/lenet.py; (b, 3, 32, 32) -> (b, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.dense1 = nn.Linear(16 * 5 * 5, 120)
        self.dense2 = nn.Linear(120, 84)
        self.head = nn.Linear(84, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.max_pool2d(functional.relu(self.conv1(x)), 2)
        x = functional.max_pool2d(functional.relu(self.conv2(x)), 2)
        x = torch.flatten(x, 1)
        x = functional.relu(self.dense1(x))
        return self.head(functional.relu(self.dense2(x)))


def train(network: nn.Module, loader: DataLoader, epochs: int) -> None:
    """Trains, and prints the mean loss every 2,000 steps."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.001, momentum=0.9)
    for epoch in range(1, epochs + 1):
        running_loss = 0.0
        for step, (images, labels) in enumerate(loader, start=1):
            optimizer.zero_grad()
            loss = functional.cross_entropy(network(images), labels)
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
            if step % 2000 == 0:
                print(f"[{epoch}, {step:5d}] loss: {running_loss / 2000:.3f}", flush=True)
                running_loss = 0.0


@torch.no_grad()
def evaluate(network: nn.Module, loader: DataLoader) -> float:
    """Returns the accuracy in [0, 1]."""
    correct = total = 0
    for images, labels in loader:
        correct += (network(images).argmax(1) == labels).sum().item()
        total += len(labels)
    return correct / total


def main() -> None:
    """Trains, evaluates, and prints accuracy and seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--epochs", type=int, default=2)
    args = parser.parse_args()
    train_set, test_set = CIFAR10(args.directory, "train"), CIFAR10(args.directory, "test")
    train_loader = DataLoader(train_set, batch_size=4, shuffle=True, num_workers=2)
    test_loader = DataLoader(test_set, batch_size=4, shuffle=False, num_workers=2)
    network = LeNet()
    start = time.perf_counter()
    train(network, train_loader, args.epochs)
    trained = time.perf_counter()
    accuracy = evaluate(network, test_loader)
    seconds = {"train": trained - start, "eval": time.perf_counter() - trained}
    print(json.dumps({"accuracy": accuracy, "seconds": seconds}))


if __name__ == "__main__":
    main()
