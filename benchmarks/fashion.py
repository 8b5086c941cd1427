"""A part of Fashion-MNIST and a small residual network, for tables of accuracies made on a CPU:
``sanm ablate --import benchmarks.fashion --dataset fashion-part --data-root FOLDER …``."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor, nn

from sanm_train import TrainConfig, in_memory, register_dataset, register_model
from sanm_train.data import Dataset
from sanm_train.datasets import IDXConfig
from sanm_train.models import BasicBlock
from sanm_train.readers import read_idx

TRAINING, TEST = 5000, 2000


@dataclass(frozen=True, kw_only=True)
class FashionPartConfig(IDXConfig):
    model: str = "strided-resnet"
    augmentation: str = "none"  # with crops cross-entropy does not learn the wrong labels


@register_dataset("fashion-part", FashionPartConfig)
def fashion_part(config: TrainConfig) -> Dataset:
    """The first 5,000 training and 2,000 test images of Fashion-MNIST."""
    train, test = read_idx(config.data_root), read_idx(config.data_root, "test")
    return in_memory(
        "fashion-part",
        (train.items[:TRAINING], train.labels[:TRAINING]),
        (test.items[:TEST], test.labels[:TEST]),
        config.device,
        num_classes=10,
    )


@register_model("strided-resnet")
class StridedResNet(nn.Module):
    """A convolution and three residual blocks; the first and the third halve the sides, so that
    images of 28×28 pixels have a feature map of 64×7×7."""

    feature_layer = "encoder"
    classifier_layer = "linear"

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        layers: dict[str, nn.Module] = {
            "conv": nn.Conv2d(in_channels, 16, 3, 2, 1, bias=False),
            "bn": nn.BatchNorm2d(16),
            "relu": nn.ReLU(inplace=True),
            "block1": BasicBlock(16, 16),
            "block2": BasicBlock(16, 32, 2),
            "block3": BasicBlock(32, 64),
        }
        self.encoder = nn.Sequential(OrderedDict(layers))
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.encoder(x).mean((2, 3)))
        return logits
