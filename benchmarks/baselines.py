"""What one writes without this package: in NumPy with OpenCV, torch, scikit-learn; and random
erasing by kornia and timm, which does less.

The torch functions work on whole batches; they are also what torch.compile gets.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LOW, HIGH, GAMMA = 0.02, 0.07, 0.03  # the mask ratio of the official CIFAR configuration
ASPECT_LOW, ASPECT_HIGH = 0.8, 1.25


def masked_forward_opencv(
    features: Tensor, targets: Tensor, clean_prob: Tensor, images: Tensor, draws: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Official masking sample by sample: upsample with OpenCV, quantise, find, fill, modulate.

    features (B, C, h, w), targets (B, K), clean_prob (B,), images (B, Cin, H, W), draws (B, D)
    → modulated targets (B, K), images with the peak's box filled and with the trough's.
    """
    import cv2

    device = images.device  # OpenCV works in the CPU's memory: the transfers are part of the time
    features, targets, clean_prob, images, draws = (
        x.cpu() for x in (features, targets, clean_prob, images, draws)
    )
    maps = F.normalize((features**2).sum(1).flatten(1)).view(-1, *features.shape[2:]).numpy()
    channels, H, W = images.shape[1:]
    images_max, images_min, new_targets = images.clone(), images.clone(), targets.clone()
    for i, (area_draw, aspect_draw, *fills) in enumerate(draws.tolist()):
        cam = cv2.resize(maps[i], (W, H))
        cam = cam - cam.min()
        cam = np.uint8(np.floor(255 * cam / (cam.max() + 1e-12)))
        ratio = np.float32(LOW + (HIGH - LOW) * area_draw) + GAMMA * (1 - clean_prob[i].numpy())
        aspect = np.float32(ASPECT_LOW + (ASPECT_HIGH - ASPECT_LOW) * aspect_draw)
        area = ratio * (H * W) * 0.5
        height = min(max(round(math.sqrt(area * aspect)), 1), H)
        width = min(max(round(math.sqrt(area / aspect)), 1), W)
        for image, flat, fill in (
            (images_max[i], cam.argmax(), fills[:channels]),
            (images_min[i], cam.argmin(), fills[channels:]),
        ):
            y, x = np.unravel_index(flat, cam.shape)
            y, x = min(y, H - height), min(x, W - width)
            for c in range(channels):
                image[c, y : y + height, x : x + width] = fill[c]
        top = targets[i].argmax()
        new_targets[i] += float(ratio / np.float32(targets.shape[1] - 1))
        new_targets[i, top] = targets[i, top] - float(ratio)
    return new_targets.to(device), images_max.to(device), images_min.to(device)


def masked_forward_torch(
    features: Tensor, targets: Tensor, clean_prob: Tensor, images: Tensor, draws: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same on whole batches."""
    channels, H, W = images.shape[1:]
    maps = F.normalize((features**2).sum(1).flatten(1)).view(-1, 1, *features.shape[2:])
    cam = F.interpolate(maps, (H, W), mode="bilinear", align_corners=False).flatten(1)
    low, high = cam.amin(1, keepdim=True), cam.amax(1, keepdim=True)
    # Not uint8: torch.compile's argmin of it is wrong (github.com/pytorch/pytorch/issues/191499).
    cam = (255 * (cam - low) / (high - low + 1e-12)).floor()
    ratio = (LOW + (HIGH - LOW) * draws[:, 0]).float() + GAMMA * (1 - clean_prob)
    aspect = (ASPECT_LOW + (ASPECT_HIGH - ASPECT_LOW) * draws[:, 1]).float()
    area = ratio * (H * W) * 0.5
    height = (area * aspect).sqrt().round().long().clamp(1, H)[:, None, None]
    width = (area / aspect).sqrt().round().long().clamp(1, W)[:, None, None]
    rows = torch.arange(H, device=images.device)[:, None]
    columns = torch.arange(W, device=images.device)

    def view(flat: Tensor, fill: Tensor) -> Tensor:
        y = torch.minimum(flat[:, None, None] // W, H - height)
        x = torch.minimum(flat[:, None, None] % W, W - width)
        hidden = (rows >= y) & (rows < y + height) & (columns >= x) & (columns < x + width)
        return torch.where(hidden[:, None], fill.float()[:, :, None, None], images)

    fills = draws[:, 2:].split(channels, 1)
    return modulate(targets, ratio), view(cam.argmax(1), fills[0]), view(cam.argmin(1), fills[1])


def random_erasing_kornia(images: Tensor) -> Tensor:
    """images (B, C, H, W) with a random box of each set to 0; new memory."""
    return _kornia_eraser()(images)


def random_erasing_timm(images: Tensor) -> Tensor:
    """The same by timm, sample by sample; it works in place, so on a copy."""
    return _timm_eraser(images.device.type)(images.clone())


@functools.cache
def _kornia_eraser() -> Callable[[Tensor], Tensor]:
    from kornia.augmentation import RandomErasing

    return RandomErasing(scale=(LOW, HIGH), ratio=(ASPECT_LOW, ASPECT_HIGH), value=0.0, p=1.0)


@functools.cache
def _timm_eraser(device: str) -> Callable[[Tensor], Tensor]:
    from timm.data.random_erasing import RandomErasing

    return RandomErasing(1.0, LOW, HIGH, ASPECT_LOW, ASPECT_HIGH, mode="const", device=device)


def modulate(targets: Tensor, ratio: Tensor) -> Tensor:
    """targets (…, K), each row's largest lowered by ratio (…), which the other classes share."""
    top = targets.argmax(-1, keepdim=True)
    ratio = ratio[..., None]
    lowered = targets.gather(-1, top) - ratio
    return (targets + ratio / (targets.shape[-1] - 1)).scatter(-1, top, lowered)


def masked_loss_torch(
    logits: Tensor, targets: Tensor, ratio: Tensor, permutation: Tensor, lam: float, weight: float
) -> Tensor:
    """The loss of a DivideMix step with four plain and two masked views of 2·B samples.

    logits (12·B, K), targets (2, B, K), ratio (2, B), permutation (12·B,) → cross-entropy of the
    labelled half of the rows + weight · squared error of the other + prior penalty, ().
    """
    n, K = logits.shape
    rows = torch.stack([targets] * 4 + [modulate(targets, ratio)] * 2, 1).view(n, K)
    rows = torch.lerp(rows[permutation], rows, lam)
    p = torch.softmax(logits, 1)
    labeled = -(F.log_softmax(logits[: n // 2], 1) * rows[: n // 2]).sum(1).mean()
    unlabeled = (p[n // 2 :] - rows[n // 2 :]).square().mean()
    prior = torch.full((K,), 1 / K, device=logits.device)
    return labeled + weight * unlabeled + (prior * torch.log(prior / p.mean(0))).sum()


def mixup_views_torch(
    views: Sequence[Tensor], lam: float, permutation: Tensor, rows: int
) -> Tensor:
    """views (b_i, …) → (rows, …): concatenate, gather the partners, interpolate."""
    stacked = torch.cat(list(views))
    return torch.lerp(stacked[permutation[:rows]], stacked[:rows], lam)


def refine_targets_torch(
    logits: Sequence[Tensor], labels: Tensor, clean_prob: Tensor, temperature: float
) -> Tensor:
    """logits (B, K) each, labels (B,), clean_prob (B,) → refined and sharpened targets (B, K)."""
    p = sum(torch.softmax(z, 1) for z in logits) / len(logits)
    q = clean_prob[:, None]
    p = q * F.one_hot(labels, p.shape[1]) + (1 - q) * p
    p = p ** (1 / temperature)
    return p / p.sum(1, keepdim=True)


def reconstruction_loss_torch(reconstruction: Tensor, images: Tensor) -> Tensor:
    """reconstruction (V·B, C, H, W), images (B, C, H, W) → Σ over the views of the MSE, ()."""
    return sum(F.mse_loss(part, images) for part in reconstruction.split(len(images)))


def sample_loss_torch(logits: Tensor, labels: Tensor) -> Tensor:
    """logits (B, K), labels (B,) → cross-entropies (B,)."""
    return F.cross_entropy(logits, labels, reduction="none")


def fit_label_quality_sklearn(losses: Tensor) -> Tensor:
    """losses (N,) → clean probability (N,) by scikit-learn's mixture, in float64."""
    from sklearn.mixture import GaussianMixture

    x = losses.double().cpu().numpy()
    x = ((x - x.min()) / (x.max() - x.min()))[:, None]
    mixture = GaussianMixture(2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ten iterations are the method's, converged or not
        posterior = mixture.fit(x).predict_proba(x)
    return torch.from_numpy(posterior[:, mixture.means_.argmin()]).to(losses.device)
