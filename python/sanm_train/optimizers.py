"""Optimisers, the course of their learning rate, and averages of the weights: torch's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .config import TrainConfig
from .registry import Registry
from .settings import setting

OPTIMIZERS: Registry[Callable[[Any, Iterable[nn.Parameter]], Optimizer]] = Registry("optimizer")
WARMUP_START = 0.01  # of the rate, as torchvision's reference scripts have it


@dataclass(frozen=True, kw_only=True)
class SGDConfig(TrainConfig):
    """SGD"""

    momentum: float = setting(0.9, "SGD momentum", low=0)


@dataclass(frozen=True, kw_only=True)
class AdamWConfig(TrainConfig):
    lr: float = 1e-3
    weight_decay: float = 0.01


@OPTIMIZERS.register("sgd", SGDConfig)
def sgd(config: SGDConfig, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """torch.optim.SGD with momentum."""
    return torch.optim.SGD(
        parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )


@OPTIMIZERS.register("adamw", AdamWConfig)
def adamw(config: AdamWConfig, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """torch.optim.AdamW, with torch's defaults for rate and weight decay."""
    return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)


def learning_rate(config: TrainConfig, epoch: float) -> float:
    """The rate after `epoch` epochs and parts of one.

    A function of the time alone and not one of torch's schedulers, which count steps: how many an
    epoch of DivideMix has is not known before it, nor the same for both networks.
    """
    if epoch < config.lr_warmup_epochs:
        share = epoch / config.lr_warmup_epochs
        return config.lr * (WARMUP_START + (1 - WARMUP_START) * share)
    if config.schedule == "cosine":
        left = (epoch - config.lr_warmup_epochs) / (config.epochs - config.lr_warmup_epochs)
        return config.lr * (1 + math.cos(math.pi * left)) / 2
    return config.lr * (0.1 if math.floor(epoch) >= config.lr_drop * config.epochs else 1.0)


def averaged(network: nn.Module, decay: float) -> AveragedModel:
    """A copy of `network` that follows its weights and buffers, those of batch norm among them."""
    return AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
