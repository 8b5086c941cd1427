"""Masking and criteria as training scripts have them: plain Python, one sample after another."""

import math
import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def attention_erase_map(
    images: Tensor, outputs: Tensor, gmmweight: Tensor, target_mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Views with a box at the activation's peak and at its trough, and the softened labels.

    images (B, Cin, H, W); outputs, the last feature map, (B, C, h, w); gmmweight (B,) clean
    probability; target_mask (B, K) soft labels, changed in place.
    """
    _, channels, height, width = images.shape
    views = images.clone(), images.clone()
    for i, feature_map in enumerate(outputs):
        energy = feature_map.float().square().sum(0)[None, None]
        energy = F.interpolate(energy / energy.norm(), (height, width), mode="bilinear")
        heat = energy[0, 0].cpu().numpy()
        span = heat.max() - heat.min() + np.float32(1e-12)
        levels = np.floor(255 * (heat - heat.min()) / span)

        ratio = random.uniform(0.02, 0.07) + 0.03 * (1 - gmmweight[i].item())
        aspect = random.uniform(0.8, 1.25)
        area = ratio * height * width / 2
        rows = min(max(round(math.sqrt(area * aspect)), 1), height)
        columns = min(max(round(math.sqrt(area / aspect)), 1), width)
        for view, place in zip(views, (levels.argmax(), levels.argmin()), strict=True):
            top, left = divmod(int(place), width)
            top, left = min(top, height - rows), min(left, width - columns)
            for channel in range(channels):
                view[i, channel, top : top + rows, left : left + columns] = random.random()

        label, share = int(target_mask[i].argmax()), ratio / (target_mask.shape[1] - 1)
        target_mask[i] += share
        target_mask[i, label] -= share + ratio
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
        ramp = float(np.clip((epoch - warm_up) / self.rampup_length, 0, 1))
        labeled = F.cross_entropy(outputs_x, targets_x)
        return labeled, F.mse_loss(outputs_u.softmax(1), targets_u), self.lambda_u * ramp


class NegEntropy:
    """Σ_k p_k log p_k, mean over the rows: small where the network is not certain."""

    def __call__(self, outputs: Tensor) -> Tensor:
        return (outputs.softmax(1) * outputs.log_softmax(1)).sum(1).mean()
