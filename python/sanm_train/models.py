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
class ResNet18Config(TrainConfig):
    """ResNet-18, of both kinds"""

    width: int = setting(64, "channels of the first stage; the last has 8 times as many", low=1)


@dataclass(frozen=True, kw_only=True)
class ResNet20Config(TrainConfig):
    """resnet20"""

    width: int = setting(16, "channels of the first stage; the last has 4 times as many", low=1)


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


@MODELS.register("preact-resnet18", ResNet18Config)
class PreActResNet18(nn.Module):
    """PreAct ResNet-18 for 32×32 images; its last feature map is 512×4×4.

    As DivideMix and SANM have it, batch norm and ReLU follow the first convolution too.

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
        self.bn1 = nn.BatchNorm2d(width)
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
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


class BasicBlock(nn.Module):
    """Residual block (He et al., 2016): conv-BN-ReLU, conv-BN, plus a shortcut, ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut.append(nn.Conv2d(in_channels, channels, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(residual + self.shortcut(x))


class ResNet(nn.Module):
    """A ResNet for small images, without pooling before its stages, each of which but the first
    halves the sides. All but the classifier has keys that begin with "encoder.", as self-supervised
    checkpoints have them.

    Args:
        in_channels: channels of the images.
        num_classes: K.
        width: channels of the first stage; each later one has twice as many.
        stages, blocks: how many, and blocks in each.
    """

    feature_layer = "encoder"
    classifier_layer = "linear"

    def __init__(
        self, in_channels: int, num_classes: int, width: int, stages: int, blocks: int
    ) -> None:
        super().__init__()
        self.encoder = nn.Sequential()
        self.encoder.add_module("conv1", nn.Conv2d(in_channels, width, 3, 1, 1, bias=False))
        self.encoder.add_module("bn1", nn.BatchNorm2d(width))
        self.encoder.add_module("relu", nn.ReLU(inplace=True))
        channels = width
        for i in range(stages):
            first = BasicBlock(channels, width << i, 1 if i == 0 else 2)
            channels = width << i
            rest = (BasicBlock(channels, channels) for _ in range(blocks - 1))
            self.encoder.add_module(f"layer{i + 1}", nn.Sequential(first, *rest))
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.encoder(x).mean((2, 3)))
        return logits


@MODELS.register("resnet18", ResNet18Config)
class ResNet18(ResNet):
    """ResNet-18 for 32×32 images, as C2D trains it by itself first; its last map is 512×4×4."""

    def __init__(self, in_channels: int = 3, num_classes: int = 10, width: int = 64) -> None:
        super().__init__(in_channels, num_classes, width, stages=4, blocks=2)


@MODELS.register("resnet20", ResNet20Config)
class ResNet20(ResNet):
    """ResNet-20 (He et al., 2016); its last map is 64×8×8 for 32×32 images, 64×7×7 for 28×28."""

    def __init__(self, in_channels: int = 3, num_classes: int = 10, width: int = 16) -> None:
        super().__init__(in_channels, num_classes, width, stages=3, blocks=3)


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
