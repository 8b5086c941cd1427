"""The released functions in the forms that scripts have them in, and in forms close to these.

Written from the description of the method; what `compat.patch` is to say of each is in FORMS.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sanm_kernels.reference import activation

# ---- Masking as the scripts have it: one sample after another, draws from `random`.


def masking(
    low: float = 0.02,
    high: float = 0.07,
    gamma: float = 0.03,
    scale: float = 0.5,
    aspects: tuple[float, float] = (0.8, 1.25),
    pixels: bool = False,
    quantize: bool = True,
    in_place: bool = True,
    device: str | None = None,
) -> Callable[..., Any]:
    def attention_erase_map(images, outputs, gmmweight, target_mask):
        if device is not None:
            images = images.to(device)
        channels, H, W = images.shape[1:]
        peaks, troughs = activation.locate((outputs**2).sum(1), H, W, quantize).tolist()
        views = images.clone(), images.clone()
        if not in_place:
            target_mask = target_mask.clone()
        for i in range(len(images)):
            ratio = random.uniform(low, high) * (H * W if pixels else 1)
            ratio = torch.tensor(ratio) + gamma * (1 - gmmweight[i].reshape(()))
            aspect = torch.tensor(random.uniform(*aspects))
            area = ratio if pixels else ratio * (H * W) * scale
            rows = min(max(round(math.sqrt(area * aspect)), 1), H)
            columns = min(max(round(math.sqrt(area / aspect)), 1), W)
            for view, place in zip(views, (peaks, troughs), strict=True):
                top, left = min(place[i][0], H - rows), min(place[i][1], W - columns)
                for channel in range(channels):
                    fill = random.random()
                    view[i, channel, top : top + rows, left : left + columns] = fill
            label = target_mask[i].argmax()
            rest = target_mask[i, label] - ratio
            target_mask[i] += ratio / (target_mask.shape[1] - 1)
            target_mask[i, label] = rest
        return *views, target_mask

    return attention_erase_map


def masking_clothing1m(images, outputs, gmmweight):
    """Areas in pixels, γ·(1 − q) added to them, returned as if they were ratios."""
    pixels = images.shape[2] * images.shape[3]
    area = torch.tensor([random.uniform(0.06, 0.13) * pixels for _ in images])
    area = area + 0.1 * (1 - gmmweight.reshape(-1))
    return area, area, images.clone(), images.clone()


def masking_inputs(seed: int) -> tuple[Tensor, ...]:
    torch.manual_seed(seed)
    random.seed(seed)
    features = torch.randn(9, 24, 5, 5).relu()
    return torch.rand(9, 3, 24, 24), features, torch.rand(9, 1), torch.softmax(torch.randn(9, 7), 1)


# ---- Criteria. `lx` and `lu` are DivideMix's; the forms differ in what comes after them.


def lx(outputs: Tensor, targets: Tensor) -> Tensor:
    return -torch.mean(torch.sum(F.log_softmax(outputs, dim=1) * targets, dim=1))


def lu(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.mean((torch.softmax(outputs, dim=1) - targets) ** 2)


def rampup(current: float, warm_up: float, length: float = 16) -> float:
    return float(np.clip((current - warm_up) / length, 0.0, 1.0))


class DivideMix:
    def __call__(self, outputs_x, targets_x, outputs_u, targets_u, epoch, warm_up):
        return lx(outputs_x, targets_x), lu(outputs_u, targets_u), 30 * rampup(epoch, warm_up)


class C2D:  # the ramp is given its λ_u too
    def __call__(self, outputs_x, targets_x, outputs_u, targets_u, epoch, warm_up, lambda_u):
        weight = lambda_u * rampup(epoch, warm_up)
        return lx(outputs_x, targets_x), lu(outputs_u, targets_u), weight


class LambdaFirst:
    def __call__(self, outputs_x, targets_x, outputs_u, targets_u, lambda_u, epoch, warm_up):
        weight = lambda_u * rampup(epoch, warm_up)
        return lx(outputs_x, targets_x), lu(outputs_u, targets_u), weight


class WithoutEpoch:
    def __call__(self, outputs_x, targets_x, outputs_u, targets_u):
        return lx(outputs_x, targets_x), lu(outputs_u, targets_u)


class MixMatch(torch.nn.Module):  # five arguments, a module, a ramp over all epochs
    def forward(self, outputs_x, targets_x, outputs_u, targets_u, epoch):
        return lx(outputs_x, targets_x), lu(outputs_u, targets_u), 75 * rampup(epoch, 0, 1024)


class LongRamp:
    def __init__(self, lambda_u, length=40):
        self.lambda_u, self.length = lambda_u, length

    def __call__(self, outputs_x, targets_x, outputs_u, targets_u, epoch, warm_up):
        weight = self.lambda_u * rampup(epoch, warm_up, self.length)
        return lx(outputs_x, targets_x), lu(outputs_u, targets_u), weight


class RampGiven:
    def __call__(self, xs, tx, us, tu, epoch, warm_up, rampup_length=16):
        return lx(xs, tx), lu(us, tu), 25 * rampup(epoch, warm_up, rampup_length)


class Probabilities:
    def __call__(self, outputs_x, targets_x, outputs_u, targets_u, epoch, warm_up):
        labeled = -torch.mean(torch.sum(torch.log(outputs_x) * targets_x, dim=1))
        unlabeled = torch.mean((outputs_u - targets_u) ** 2)
        return labeled, unlabeled, 30 * rampup(epoch, warm_up)


class ProbabilitiesU:  # of the unlabelled half alone
    def __call__(self, outputs_x, targets_x, outputs_u, targets_u, epoch, warm_up):
        unlabeled = torch.mean((outputs_u - targets_u) ** 2)
        return lx(outputs_x, targets_x), unlabeled, 30 * rampup(epoch, warm_up)


class SummedU:
    def __call__(self, outputs_x, targets_x, outputs_u, targets_u, epoch, warm_up):
        unlabeled = lu(outputs_u, targets_u) * outputs_u.shape[1]
        return lx(outputs_x, targets_x), unlabeled, 30 * rampup(epoch, warm_up)


class WeightInside:
    def __call__(self, outputs_x, targets_x, outputs_u, targets_u, epoch, warm_up):
        return lx(outputs_x, targets_x) + 30 * rampup(epoch, warm_up) * lu(outputs_u, targets_u)


class WeightOfLogits:
    def __call__(self, outputs_x, targets_x, outputs_u, targets_u, epoch, warm_up):
        weight = 30 * rampup(epoch, warm_up) * float(outputs_x.detach().abs().max() > 0)
        return lx(outputs_x, targets_x), lu(outputs_u, targets_u), weight


class NoGradientU:
    def __call__(self, outputs_x, targets_x, outputs_u, targets_u, epoch, warm_up):
        unlabeled = lu(outputs_u.detach(), targets_u)
        return lx(outputs_x, targets_x), unlabeled, 30 * rampup(epoch, warm_up)


class LateChange:  # after the ramp another loss
    def __call__(self, outputs_x, targets_x, outputs_u, targets_u, epoch, warm_up):
        labeled = lx(outputs_x, targets_x) * (2 if epoch > 200 else 1)
        return labeled, lu(outputs_u, targets_u), 30 * rampup(epoch, warm_up)


class OnGpuOnly:
    def __call__(self, outputs_x, targets_x, outputs_u, targets_u, epoch, warm_up):
        raise AssertionError("Torch not compiled with CUDA enabled")


class Entropy:
    def __call__(self, outputs):
        probs = torch.softmax(outputs, dim=1)
        return torch.mean(torch.sum(probs.log() * probs, dim=1))


class ClampedEntropy:
    def __call__(self, outputs):
        probs = torch.softmax(outputs, dim=1).clamp(min=1e-8)
        return torch.mean(torch.sum(probs.log() * probs, dim=1))


class EntropyOfProbabilities:
    def __call__(self, probs):
        return torch.mean(torch.sum(probs.clamp(min=1e-12).log() * probs, dim=1))


class PositiveEntropy(Entropy):
    def __call__(self, outputs):
        return -super().__call__(outputs)


def criterion_inputs(seed: int) -> tuple[Tensor, ...]:
    torch.manual_seed(seed)
    x, u = 3 * torch.randn(6, 5), 3 * torch.randn(8, 5)
    tx, tu = torch.softmax(torch.randn(6, 5), 1), torch.softmax(torch.randn(8, 5), 1)
    return x.requires_grad_(), tx, u.requires_grad_(), tu


class Form(NamedTuple):
    """A form of a released function, what `patch` is to say, and what it is called with then."""

    name: str
    stub: Any
    state: str
    says: tuple[str, ...] = ()
    more: tuple[float, ...] = ()
    made_with: tuple[float, ...] = ()


ERASE, SEMI, NEG = "attention_erase_map", "SemiLoss", "NegEntropy"
RAMP = (17.5, 10)
TARGETS = ("returned targets", "argument 4")
FORMS = {
    "masking: the released CIFAR function": Form(ERASE, masking(), "replaced"),
    "masking: γ = 0.05": Form(ERASE, masking(gamma=0.05), "replaced"),
    "masking: γ = 0.02": Form(ERASE, masking(gamma=0.02), "replaced"),
    "masking: ratios 0.05 to 0.1": Form(ERASE, masking(0.05, 0.1), "replaced"),
    "masking: ratios 0.02 to 0.3, γ = 0.1": Form(ERASE, masking(0.02, 0.3, 0.1), "replaced"),
    "masking: whole areas": Form(ERASE, masking(scale=1.0), "replaced"),
    "masking: areas in pixels": Form(ERASE, masking(pixels=True), "kept", TARGETS),
    "masking: flatter boxes": Form(ERASE, masking(aspects=(0.5, 1.0)), "kept", ("view at the",)),
    "masking: not quantised": Form(ERASE, masking(quantize=False), "kept", ("view at the",)),
    "masking: targets not in place": Form(ERASE, masking(in_place=False), "kept", TARGETS[1:]),
    "masking: on a GPU alone": Form(ERASE, masking(device="cuda:9"), "not verified"),
    "masking: Clothing1M": Form(ERASE, masking_clothing1m, "kept", ("ratio_max", "ratio_min")),
    "SemiLoss: DivideMix": Form(SEMI, DivideMix, "replaced", more=RAMP),
    "SemiLoss: C2D, epoch, warm_up, lambda_u": Form(SEMI, C2D, "replaced", more=(*RAMP, 50)),
    "SemiLoss: lambda_u first": Form(SEMI, LambdaFirst, "replaced", more=(50, *RAMP)),
    "SemiLoss: without the epoch": Form(SEMI, WithoutEpoch, "replaced"),
    "SemiLoss: MixMatch": Form(SEMI, MixMatch, "replaced", more=(17.5,)),
    "SemiLoss: another ramp": Form(SEMI, LongRamp, "replaced", more=RAMP, made_with=(50, 80)),
    "SemiLoss: the ramp's length given": Form(SEMI, RampGiven, "replaced", more=(*RAMP, 80)),
    "SemiLoss: of probabilities": Form(SEMI, Probabilities, "kept", ("L_x", "L_u"), RAMP),
    "SemiLoss: L_u of probabilities": Form(SEMI, ProbabilitiesU, "kept", ("L_u",), RAMP),
    "SemiLoss: L_u summed over classes": Form(SEMI, SummedU, "kept", ("L_u",), RAMP),
    "SemiLoss: one sum": Form(SEMI, WeightInside, "kept", ("cannot be had",), RAMP),
    "SemiLoss: weight of the logits": Form(SEMI, WeightOfLogits, "kept", ("cannot be had",), RAMP),
    "SemiLoss: L_u without a gradient": Form(SEMI, NoGradientU, "kept", ("gradient 3",), RAMP),
    "SemiLoss: another L_x later on": Form(SEMI, LateChange, "kept", ("L_x",), RAMP),
    "SemiLoss: on a GPU alone": Form(SEMI, OnGpuOnly, "not verified"),
    "NegEntropy": Form(NEG, Entropy, "replaced"),
    "NegEntropy: clamped": Form(NEG, ClampedEntropy, "kept", ("penalty",)),
    "NegEntropy: of probabilities": Form(NEG, EntropyOfProbabilities, "kept", ("penalty",)),
    "NegEntropy: the other sign": Form(NEG, PositiveEntropy, "kept", ("penalty",)),
}
