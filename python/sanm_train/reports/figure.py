"""Figures: what SANM hides, rebuilds and does to the targets, and how a run went."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import sanm_kernels as sk

from ..extra import extra
from ..files import replacing
from ..train import Result

with extra():
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.rcsetup import cycler

MAX_COLOR, MIN_COLOR = "#d62728", "#17becf"
BLUE, ORANGE, GREY = "#0072b2", "#e69f00", "#7f7f7f"
#: Okabe and Ito's colours, which the colour-blind tell apart; the same file from the same numbers.
STYLE: dict[Any, Any] = {
    "axes.prop_cycle": cycler(color=[BLUE, ORANGE, "#009e73", "#cc79a7", "#56b4e9", "#d55e00"])
    + cycler(linestyle=["-", "--", "-.", ":", "-", "--"]),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "svg.hashsalt": "sanm",
}
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
    if not result.recipe.masking or len(result.recipe.networks[0].mask_config.views) != 2:
        raise ValueError(f"the figure needs a SANM recipe with both views, got {result.config}")
    data = result.data
    clean = data.labels == data.true_labels
    chosen = torch.tensor(
        [i for kind in (clean, ~clean) for i in _first(kind, data.labels, samples)]
    )
    shown = explain(result, chosen, seed)

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
def explain(result: Result, chosen: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """What the first network and its masking make of the samples at `chosen` (n,), on the CPU.

    image (n, C, H, W), as the network sees it, and the views in [0, 1]; map (n, 1, H, W); quality;
    peak, trough (n, 2); targets "before" (n, K). For each of the run's views, max and min: box
    (n, 4), targets, ratio, view, and what a decoder, if there is one, has rebuilt of it.
    """
    recipe, data, quality = result.recipe, result.data, result.quality.mean(0)[chosen]
    network, augment = recipe.tested[0].eval(), recipe.augment
    images = torch.cat([augment.plain(part) for part in data.images.stream([chosen])])
    labels, clean_prob = (x.to(images.device) for x in (data.labels.cpu()[chosen], quality))
    logits, features = network.forward_features(images)
    targets = sk.refine_targets(
        logits, labels=labels, clean_prob=clean_prob, temperature=result.config.temperature
    )
    masked = network.mask(
        images, targets, clean_prob, features=features, generator=seed, sample_index=chosen
    )
    energy = features.float().square().sum(1, keepdim=True)
    energy = F.interpolate(energy, images.shape[2:], mode="bilinear", align_corners=False)
    shown = {"quality": quality, "image": augment.denormalize(images), "map": energy}
    shown |= {"before": targets, "peak": masked.stats.peak, "trough": masked.stats.trough}
    for name in network.mask_config.views:
        for part in ("box", "targets", "ratio"):
            shown[f"{part}_{name}"] = getattr(masked, f"{part}_{name}")
        view = getattr(masked, f"images_{name}")
        shown[f"view_{name}"] = augment.denormalize(view)
        if network.decoder is not None:
            rebuilt = network.reconstruct(network.forward_features(view)[1], data.image_shape)
            shown[f"rebuilt_{name}"] = augment.denormalize(rebuilt)
    pictures = ("image", "view", "rebuilt")
    return {
        name: (tensor.clamp(0, 1) if name.startswith(pictures) else tensor).cpu()
        for name, tensor in shown.items()
    }


def _draw_row(axes: Any, sample: dict[str, Tensor], given: int, last: bool) -> None:
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


def draw_history(history: Sequence[Mapping[str, Any]], warmup: int) -> Figure:
    """Accuracy and label quality, and every loss, by epoch; a dotted line ends the warm-up."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    longest = max(history, key=len)
    names = list(longest)  # the warm-up's rows have fewer losses
    shares = ["test_accuracy", "noisy_validation_accuracy", "quality_auc", "labeled_share"]
    losses = names[names.index("train_loss") : min(names.index(n) for n in shares if n in names)]
    for axis, lines in zip(figure.subplots(1, 2), (shares, losses), strict=True):
        for name in lines:
            points = [(r["epoch"] + 1, r[name]) for r in history if r.get(name) is not None]
            if points:
                label = name.replace("_", " ").replace("auc", "AUC")
                axis.plot(*zip(*points, strict=True), marker=".", label=label)
        if 0 < warmup < len(history):
            axis.axvline(warmup + 0.5, color=GREY, linestyle=":")
        axis.set(xlabel="epoch", xlim=(0.5, len(history) + 0.5))
        axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=9)
    figure.axes[0].set(ylabel="share", ylim=(0, 1.02))
    figure.axes[1].set(ylabel="loss")
    return figure


def draw_accuracies(cells: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]) -> Figure:
    """For each kind of noise a panel, with the accuracies by epoch of each variant's runs: their
    mean, and a band of its standard error."""
    figure = Figure(figsize=(1.5 + 4.5 * len(cells), 3.8), layout="constrained")
    axes = figure.subplots(1, len(cells), squeeze=False, sharey=True)[0]
    for axis, (noise, curves) in zip(axes, cells.items(), strict=True):
        for name, runs in curves.items():
            if not runs:
                continue
            values = 100 * np.array([run[: min(map(len, runs))] for run in runs])
            epochs, mean = 1 + np.arange(values.shape[1]), values.mean(0)
            (line,) = axis.plot(epochs, mean, label=name)
            if len(runs) > 1:
                error = values.std(0, ddof=1) / math.sqrt(len(runs))
                band = {"color": line.get_color(), "alpha": 0.2, "lw": 0}
                axis.fill_between(epochs, mean - error, mean + error, **band)
        axis.set(xlabel="epoch", title=noise)
        axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes[0].set(ylabel="test accuracy, %")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False
    )
    return figure


def draw_calibration(qualities: Mapping[str, Tensor], right: Tensor) -> Figure:
    """How many of the labels of about a clean probability are right (N,), in ten bins of it; below,
    how many samples each bin has. On the diagonal a probability (N,) is what it says."""
    figure = Figure(figsize=(5.5, 4.5), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[3, 1], sharex=True)
    above.plot([0, 1], [0, 1], color=GREY, linestyle=":")
    for name, quality in qualities.items():
        bins = (10 * quality).long().clamp_max(9)
        count = torch.bincount(bins, minlength=10)
        means = [torch.bincount(bins, x.double(), 10) / count for x in (quality, right)]
        above.plot(*(mean[count > 0] for mean in means), marker=".", label=name)
        below.stairs(count / count.sum(), np.linspace(0, 1, 11))
    above.set(ylabel="share of right labels", ylim=(0, 1.02))
    above.legend(frameon=False)
    below.set(xlabel="clean probability", ylabel="samples", xlim=(0, 1), ylim=(0, 1))
    return figure


def draw_mixtures(result: Result) -> Figure:
    """Histogram of the losses that each network's mixture was fitted to, and the mixture."""
    recipe = result.recipe  # whose samples have an order of their own
    labels, truth = recipe.data.labels.cpu(), recipe.data.true_labels.cpu()
    right, known = labels == truth, truth >= 0
    groups = [
        ("right label", BLUE, right),
        ("wrong label", ORANGE, known & ~right),
        ("not known" if known.any() else "samples", "#b0b0b0", ~known),
    ]
    groups = [group for group in groups if group[2].any()]
    edges, at = np.linspace(0, 1, 61), np.linspace(0, 1, 600)
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    axes = figure.subplots(1, len(recipe.losses), squeeze=False)[0]
    for k, axis in enumerate(axes):
        epochs = torch.cat([recipe.history[:-1, k], recipe.losses[k][None]]).double().cpu()
        epochs -= epochs.amin(1, keepdim=True)
        x = (epochs / epochs.amax(1, keepdim=True).clamp_min(1e-300)).mean(0)
        axis.hist(
            [x[where].numpy() for _, _, where in groups],
            edges,
            stacked=True,
            label=[name for name, _, _ in groups],
            color=[color for _, color, _ in groups],
        )
        fit = recipe.mixtures[k].clamp_min(1e-9).T.tolist()
        for (mean, variance, weight), style in zip(fit, ("k-", "k:"), strict=True):
            area = len(x) * edges[1] * weight / math.sqrt(2 * math.pi * variance)
            curve = area * np.exp(-((at - mean) ** 2) / (2 * variance))
            axis.plot(at, curve, style, label="clean" if style == "k-" else "suspicious")
        axis.set(xlabel="loss, from smallest (0) to largest (1)", ylabel="samples")
        axis.set_title(f"network {k + 1}" if len(axes) > 1 else "")
    axes[0].legend(loc="upper right", fontsize=9)
    return figure


def draw_activations(columns: Mapping[str, Any], suspect: Any) -> Figure:
    """Histograms of each of `columns` (N,) over the suspect samples (N,) and the others."""
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    for axis, (name, values) in zip(figure.subplots(1, len(columns)), columns.items(), strict=True):
        low, high = np.nanquantile(values, (0.005, 0.995))
        edges = np.linspace(low, max(high, low + 1e-6), 31)
        for where, label, style in ((~suspect, "trusted", "-"), (suspect, "suspected", "--")):
            if where.any():
                shown = np.clip(values[where], low, high)
                axis.hist(
                    shown, edges, density=True, histtype="step", label=label, lw=1.8, ls=style
                )
        axis.set(yticks=[], xlabel=name.removeprefix("activation_"))
        axis.tick_params(labelsize=8)
        axis.locator_params("x", nbins=4)
    figure.axes[0].set_ylabel("density")
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper right", ncols=2, fontsize=9, frameon=False)
    return figure
