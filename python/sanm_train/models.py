"""Networks for the recipes."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from .config import TrainConfig
from .libraries import Networks
from .settings import own_settings, setting

MODELS = Networks("model")
register_model = MODELS.register


@dataclass(frozen=True, kw_only=True)
class PreActResNet18Config(TrainConfig):
    """preact-resnet18"""

    width: int = setting(64, "channels of the first stage; the last has 8 times as many", low=1)


@dataclass(frozen=True, kw_only=True)
class SmallCNNConfig(TrainConfig):
    """small-cnn"""

    width: int = setting(16, "channels of the first layer; the last has 4 times as many", low=1)


class PreActBlock(nn.Module):
    """Pre-activation residual block (He et al., 2016): BN-ReLU-conv twice, plus a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        residual: Tensor = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return residual + shortcut


@MODELS.register("preact-resnet18", PreActResNet18Config)
class PreActResNet18(nn.Module):
    """PreAct ResNet-18 for 32×32 images; its last feature map is 512×4×4.

    Args:
        in_channels: channels of the images.
        num_classes: K.
        width: channels of the first stage (64 as published); the last has 8 times as many.
    """

    feature_layer = "layer4"
    classifier_layer = "linear"

    def __init__(self, in_channels: int = 3, num_classes: int = 10, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.layer1 = self._stage(width, width, 1)
        self.layer2 = self._stage(width, 2 * width, 2)
        self.layer3 = self._stage(2 * width, 4 * width, 2)
        self.layer4 = self._stage(4 * width, 8 * width, 2)
        self.linear = nn.Linear(8 * width, num_classes)

    @staticmethod
    def _stage(in_channels: int, channels: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            PreActBlock(in_channels, channels, stride), PreActBlock(channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


@MODELS.register("small-cnn", SmallCNNConfig)
class SmallCNN(nn.Module):
    """Four convolutions for 8×8 digits; its last feature map is 4·width × 4 × 4."""

    feature_layer = "features"
    classifier_layer = "linear"

    def __init__(self, in_channels: int = 1, num_classes: int = 10, width: int = 16) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *self._layer(in_channels, width),
            *self._layer(width, 2 * width, stride=2),
            *self._layer(2 * width, 4 * width),
            *self._layer(4 * width, 4 * width),
        )
        self.linear = nn.Linear(4 * width, num_classes)

    @staticmethod
    def _layer(in_channels: int, channels: int, stride: int = 1) -> tuple[nn.Module, ...]:
        conv = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        return conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.features(x).mean((2, 3)))
        return logits


def classifier(model: nn.Module) -> nn.Linear:
    """The linear layer after the average pooling: `model.classifier_layer` by its dotted name,
    or, in a model that does not say, its last linear layer.

    Raises:
        ValueError: there is no such layer.
    """
    name = getattr(model, "classifier_layer", None)
    if name is None:
        found = [m for m in model.modules() if isinstance(m, nn.Linear)][-1:]
    else:
        found = [m for n, m in model.named_modules() if n == name and isinstance(m, nn.Linear)]
    if not found:
        wanted = "a linear layer" if name is None else f"a linear layer {name!r}"
        raise ValueError(f"classifier_layer: {type(model).__name__} must have {wanted}")
    return found[0]


def build_model(
    config: TrainConfig, in_channels: int, num_classes: int, image_size: tuple[int, int]
) -> nn.Module:
    """The run's network with a fresh initialisation."""
    own = own_settings(config, MODELS.configs.get(config.model, TrainConfig))
    return MODELS.build(config.model, in_channels, num_classes, image_size, **own)
