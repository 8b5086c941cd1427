"""Draws the figures of docs/method.md and docs/accuracy.md from a short run on noisy digits, and of
the runs that the latter has a table of: python docs/figures.py"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import sanm_kernels as sk
from sanm_train import Result, TrainConfig, train
from sanm_train.files import replacing
from sanm_train.reports.comparison import accuracy_curves
from sanm_train.reports.figure import draw_accuracies, draw_calibration

DOCS = Path(__file__).resolve().parent
RUNS = {"digits": ("symmetric:0.5", "instance:0.4"), "fashion": ("symmetric:0.5",)}  # shown
PEAK, TROUGH, GREY = "#d62728", "#17becf", "#7f7f7f"
CLEAN, WRONG = "#1f77b4", "#ff7f0e"


def outline(axis: Any, box: torch.Tensor, color: str) -> None:
    """A half-open box (4,), which pixels reach half a unit beyond."""
    y0, x0, y1, x1 = box.tolist()
    frame = Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor=color, lw=2.2)
    axis.add_patch(frame).set_clip_on(False)


def masking(result: Result) -> Figure:
    """Two samples, from the image to the modulated label.

    The first with a right label taken for right, and the first with a wrong one taken for wrong.
    """
    data, network = result.data, result.recipe.networks[0].eval()
    right, trusted = data.labels == data.true_labels, result.quality.mean(0) > 0.5
    chosen = torch.stack([(right & trusted).nonzero()[0, 0], (~right & ~trusted).nonzero()[0, 0]])
    (images,) = data.images.stream([chosen])
    labels, quality = data.labels[chosen], result.quality.mean(0)[chosen]
    with torch.no_grad():
        _, features = network.forward_features(result.recipe.augment.plain(images))
    masked = sk.masked_forward(
        features, labels, quality, images=images, num_classes=data.num_classes,
        config=result.config.mask_config, generator=0, sample_index=chosen,
    )  # fmt: skip
    energy = features.square().sum(1)
    upsampled = F.interpolate(energy[:, None], images.shape[2:], mode="bilinear")[:, 0]

    figure = Figure(figsize=(13, 4.3), dpi=100, layout="constrained")
    axes = figure.subplots(2, 6, width_ratios=[1, 1, 1, 1, 1, 1.8])
    titles = ("image x", "energy E", "upsampled U", "max view", "min view", "label t and t′")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
    for i, row in enumerate(axes):
        gray = {"cmap": "gray", "vmin": 0, "vmax": 1}
        row[0].imshow(images[i, 0], **gray)
        row[1].imshow(energy[i], cmap="magma")
        row[2].imshow(upsampled[i], cmap="magma")
        row[3].imshow(masked.images_max[i, 0], **gray)
        row[4].imshow(masked.images_min[i, 0], **gray)
        for place, box, view, color in (
            (masked.stats.peak, masked.box_max, 3, PEAK),
            (masked.stats.trough, masked.box_min, 4, TROUGH),
        ):
            y, x = place[i].tolist()
            row[2].plot(x, y, "x", color=color, markersize=8, markeredgewidth=2.5)
            for axis in (row[2], row[view]):
                outline(axis, box[i], color)
        for axis in row[:5]:
            axis.set(xticks=[], yticks=[])
        classes = torch.arange(data.num_classes)
        before = F.one_hot(labels[i], data.num_classes)
        row[5].bar(classes - 0.2, before, 0.4, color=GREY, label="t, as given")
        row[5].bar(classes + 0.2, masked.targets_max[i], 0.4, color=PEAK, label="t′, modulated")
        row[5].set(ylim=(0, 1.05), yticks=[0, 0.5, 1])
        row[5].set_xticks(classes)
        row[5].set_title(f"r = {masked.ratio_max[i]:.2f}", loc="right", fontsize=10)
        given, true = int(labels[i]), int(data.true_labels[chosen[i]])
        row[0].set_ylabel(f"given {given}, true {true}\nq = {quality[i]:.2f}", fontsize=11)
    axes[1, 5].legend(fontsize=8, loc="upper right")
    return figure


def label_quality(result: Result) -> Figure:
    """The losses of right and wrong labels, the mixture fitted to them, and its posterior."""
    losses, right = result.losses[0], result.data.labels == result.data.true_labels
    fit = sk.fit_label_quality(losses)
    x = (losses - losses.min()) / (losses.max() - losses.min())
    figure = Figure(figsize=(9, 3.6), dpi=100, layout="constrained")
    axis = figure.subplots()
    axis.hist(
        [x[right], x[~right]], bins=50, range=(0, 1), stacked=True, alpha=0.6,
        color=[CLEAN, WRONG], label=["label right (not known to the fit)", "label wrong"],
    )  # fmt: skip
    grid = torch.linspace(0, 1, 400, dtype=torch.float64)[:, None]
    normal = torch.distributions.Normal(fit.means, fit.variances.sqrt())
    density = fit.weights * normal.log_prob(grid).exp() * len(x) / 50
    for k, color in enumerate((CLEAN, WRONG)):
        label = ("component with the smaller mean", "the other component")[k]
        axis.plot(grid, density[:, k], color=color, lw=2.5, label=label)
    axis.set(xlabel="loss, min–max normalised", ylabel="samples", xlim=(0, 1))
    other = axis.twinx()
    order = x.argsort()
    other.plot(x[order], fit.clean_prob[order], "--", color="black", label="label quality q")
    other.set(ylabel="q", ylim=(0, 1.02))
    (handles, labels), (more, names) = (a.get_legend_handles_labels() for a in (axis, other))
    axis.legend(handles + more, labels + names, fontsize=9, loc="center right")
    return figure


def accuracy() -> Figure:
    """Of the runs of docs/accuracy.md: cross-entropy, SANM on it, and its control."""
    variants = ("ce", "sanm-ce", "sanm-ce: plain views")
    panels = {}
    for data, noises in RUNS.items():
        with (DOCS.parent / f"benchmarks/results/training-{data}.csv").open(newline="") as file:
            curves = accuracy_curves(list(csv.DictReader(file)), noises, variants)
        panels |= {f"{data}, {noise}": lines for noise, lines in curves.items()}
    return draw_accuracies(panels)


def calibration(result: Result) -> Figure:
    right = result.data.labels == result.data.true_labels
    return draw_calibration({result.config.recipe: result.quality.mean(0)}, right)


def main() -> None:
    result = train(TrainConfig(recipe="sanm-ce", epochs=15))
    drawn = {
        "method-masking": masking(result),
        "method-label-quality": label_quality(result),
        "accuracy-epochs": accuracy(),
        "accuracy-calibration": calibration(result),
    }
    for name, figure in drawn.items():
        path = DOCS / f"{name}.png"
        with replacing(path) as temporary:
            figure.savefig(temporary)
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
