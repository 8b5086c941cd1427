"""A figure of what SANM hides, rebuilds and does to the targets, sample by sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sanm_kernels as sk

from .files import replacing
from .sanm import masked_views
from .train import Result

MAX_COLOR, MIN_COLOR = "#d62728", "#17becf"
COLUMNS = (
    "image and boxes",
    "activation map",
    "max view",
    "rebuilt from it",
    "min view",
    "rebuilt from it",
    "target before and after",
)


def save_figure(path: str | Path, result: Result, samples: int = 3, seed: int = 0) -> None:
    """Write a PNG with `samples` correctly and as many wrongly labelled training samples.

    They are the first of each kind with all given labels different, not picked for their looks.
    Columns: the image with both boxes, the activation map with its peak and trough, both masked
    views and what the decoder makes of them, the refined target before and after modulation.

    Raises:
        ValueError: the run's recipe or views leave something out that the figure shows.
    """
    from matplotlib.figure import Figure

    if not result.recipe.masking or len(result.recipe.networks[0].config.views) != 2:
        raise ValueError(f"the figure needs a SANM recipe with both views, got {result.config}")
    data = result.data
    clean = data.labels == data.true_labels
    chosen = torch.tensor(
        [i for kind in (clean, ~clean) for i in _first(kind, data.labels, samples)]
    )
    shown = _explain(result, chosen, seed)

    rows = len(chosen)
    figure = Figure(figsize=(15.5, 1.75 * rows + 1.3), dpi=110, layout="constrained")
    figure.suptitle(
        f"{result.config.recipe} on {data.name}, {result.noise}\n"
        f"q: clean probability, r: share of the image hidden and of the label taken away",
        fontsize=12,
    )
    axes = figure.subplots(rows, len(COLUMNS), width_ratios=[1, 1, 1, 1, 1, 1, 2.2], squeeze=False)
    for column, title in enumerate(COLUMNS):
        axes[0, column].set_title(title, fontsize=11)
    for row, index in enumerate(chosen.tolist()):
        given, true = int(data.labels[index]), int(data.true_labels[index])
        sample = {name: tensor[row] for name, tensor in shown.items()}
        _draw_row(axes[row], sample, given, last=row == rows - 1)
        color = "black" if given == true else MAX_COLOR
        note = f"sample {index}\ngiven {given}, true {true}\nq = {sample['quality']:.2f}"
        axes[row, 0].set_ylabel(note, rotation=0, ha="right", va="center", labelpad=8, color=color)
    figure.legend(
        *axes[0, -1].get_legend_handles_labels(), loc="outside lower right", ncols=3, frameon=False
    )
    with replacing(path) as temporary:
        figure.savefig(temporary)


@torch.no_grad()
def _explain(result: Result, chosen: Tensor, seed: int) -> dict[str, Tensor]:
    """Everything the figure shows of the chosen samples (n,), images back in [0, 1]."""
    recipe, data, quality = result.recipe, result.data, result.quality[chosen]
    network, images = recipe.networks[0].eval(), recipe.augment.normalize(data.images[chosen])
    logits, features = network.forward_features(images)
    targets = sk.refine_targets(
        logits,
        labels=data.labels[chosen],
        clean_prob=quality,
        temperature=result.config.temperature,
    )
    masked = network.mask(
        images, targets, quality, features=features, generator=seed, sample_index=chosen
    )
    energy = features.float().square().sum(1, keepdim=True)
    energy = F.interpolate(energy, images.shape[2:], mode="bilinear", align_corners=False)
    shown = {"quality": quality, "image": data.images[chosen], "map": energy, "before": targets}
    shown |= {"peak": masked.stats.peak, "trough": masked.stats.trough}
    for name in ("ratio_max", "targets_max", "box_max", "box_min"):
        shown[name] = getattr(masked, name)
    for name, view in zip(("max", "min"), masked_views(masked), strict=True):
        rebuilt = network.reconstruct(network.forward_features(view)[1], data.image_shape)
        shown[f"view_{name}"] = recipe.augment.denormalize(view).clamp(0, 1)
        shown[f"rebuilt_{name}"] = recipe.augment.denormalize(rebuilt).clamp(0, 1)
    return {name: tensor.cpu() for name, tensor in shown.items()}


def _draw_row(axes: Any, sample: dict[str, Tensor], given: int, last: bool) -> None:
    from matplotlib.patches import Rectangle

    pictures = ("image", "map", "view_max", "rebuilt_max", "view_min", "rebuilt_min")
    for axis, name in zip(axes, pictures, strict=False):
        style = {"cmap": "magma"} if name == "map" else {"cmap": "gray", "vmin": 0, "vmax": 1}
        axis.imshow(sample[name].permute(1, 2, 0), **style)
        for view, place, color in (("max", "peak", MAX_COLOR), ("min", "trough", MIN_COLOR)):
            if name == "map":
                y, x = sample[place].tolist()
                axis.plot(x, y, "x", color=color, markersize=7, markeredgewidth=2)
            if name in ("image", "map", f"view_{view}"):  # pixels reach half a unit to each side
                y0, x0, y1, x1 = sample[f"box_{view}"].tolist()
                corner, size = (x0 - 0.5, y0 - 0.5), (x1 - x0, y1 - y0)
                box = Rectangle(corner, *size, fill=False, edgecolor=color, lw=2.2)
                axis.add_patch(box).set_clip_on(False)
        axis.set_xticks([])
        axis.set_yticks([])

    bars, classes = axes[-1], torch.arange(len(sample["before"]))
    bars.bar(classes - 0.2, sample["before"], 0.4, color="#7f7f7f", label="before")
    bars.bar(classes + 0.2, sample["targets_max"], 0.4, color=MAX_COLOR, label="after (max view)")
    bars.axvspan(given - 0.5, given + 0.5, color="#ffe9a8", zorder=0, label="given label")
    bars.set(ylim=(0, 1.05), xlim=(-0.6, len(classes) - 0.4), yticks=[0, 0.5, 1])
    bars.set_xticks(classes, [str(int(k)) for k in classes] if last else [""] * len(classes))
    bars.tick_params(labelsize=8)
    note = f"r = {sample['ratio_max']:.2f}"
    bars.text(0.985, 0.93, note, transform=bars.transAxes, ha="right", va="top", fontsize=9)
    if last:
        bars.set_xlabel("class", fontsize=9)


def _first(where: Tensor, labels: Tensor, count: int) -> list[int]:
    """The first `count` positions in `where` (N,), their labels all different."""
    found: dict[int, int] = {}
    for index in where.nonzero()[:, 0].tolist():
        if len(found) < count:
            found.setdefault(int(labels[index]), index)
    return list(found.values())
