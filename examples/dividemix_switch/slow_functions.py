"""Masking and criteria as training scripts have them: plain Python, one sample after another."""

import math
import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def resize(heat: np.ndarray, width: int, height: int) -> np.ndarray:
    """Bilinear, (h, w) float32 → (height, width), rounded as OpenCV's resize rounds it."""
    for axis, size in ((1, width), (0, height)):
        cells = heat.shape[axis]
        place = (np.arange(size) + 0.5) * (cells / size) - 0.5
        left = np.clip(np.floor(place).astype(int), 0, cells - 1)
        share = np.clip(place - left, 0, 1).astype(np.float32)
        share = share if axis else share[:, None]
        a, b = heat.take(left, axis), heat.take(np.minimum(left + 1, cells - 1), axis)
        heat = (a + (b - a) * np.float64(share)).astype(np.float32)
    return heat


@torch.no_grad()
def attention_erase_map(
    images: Tensor, outputs: Tensor, gmmweight: Tensor, target_mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Views with a box at the activation's peak and at its trough, and the softened labels.

    images (B, 3, H, W), H = W; outputs, the last feature map, (B, C, h, w); gmmweight (B,) or
    (B, 1) clean probability; target_mask (B, K) soft labels, changed in place.
    """
    _, channels, height, width = images.shape
    views = images.clone(), images.clone()
    energies = F.normalize((outputs**2).sum(1).flatten(1)).view(-1, *outputs.shape[2:])
    for i, energy in enumerate(energies):
        heat = resize(energy.cpu().numpy(), width, height)
        heat = heat - heat.min()
        levels = np.floor(255 * heat / (heat.max() + np.float32(1e-12))).astype(np.uint8)

        ratio = random.uniform(0.02, 0.07) + 0.03 * (1 - gmmweight[i].reshape(()))
        aspect = torch.tensor(random.uniform(0.8, 1.25))
        area = ratio * (height * width) * 0.5
        rows = min(max(round(math.sqrt(area * aspect)), 1), height)
        columns = min(max(round(math.sqrt(area / aspect)), 1), width)
        for view, place in zip(views, (levels.argmax(), levels.argmin()), strict=True):
            top, left = divmod(int(place), width)
            top, left = min(top, height - rows), min(left, width - columns)
            for channel in range(channels):
                view[i, channel, top : top + rows, left : left + columns] = random.random()

        label = target_mask[i].argmax()
        lowered = target_mask[i, label] - ratio
        target_mask[i] += ratio / (target_mask.shape[1] - 1)
        target_mask[i, label] = lowered
    return *views, target_mask


class SemiLoss:
    """Cross-entropy of the labelled rows, squared error of the others, and the latter's weight."""

    def __init__(self, lambda_u: float = 25, rampup_length: float = 16) -> None:
        self.lambda_u, self.rampup_length = lambda_u, rampup_length

    def __call__(
        self,
        outputs_x: Tensor,
        targets_x: Tensor,
        outputs_u: Tensor,
        targets_u: Tensor,
        epoch: float,
        warm_up: float,
    ) -> tuple[Tensor, Tensor, float]:
        probs_u = torch.softmax(outputs_u, dim=1)
        labeled = -torch.mean(torch.sum(F.log_softmax(outputs_x, dim=1) * targets_x, dim=1))
        unlabeled = torch.mean((probs_u - targets_u) ** 2)
        ramp = float(np.clip((epoch - warm_up) / self.rampup_length, 0, 1))
        return labeled, unlabeled, self.lambda_u * ramp


class NegEntropy:
    """Σ_k p_k log p_k, mean over the rows: small where the network is not certain."""

    def __call__(self, outputs: Tensor) -> Tensor:
        probs = torch.softmax(outputs, dim=1)
        return torch.mean(torch.sum(probs.log() * probs, dim=1))
