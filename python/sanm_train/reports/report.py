"""Tables of results on the terminal, and the report of one run as an HTML file."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..extra import extra
from ..files import printable, replacing
from ..train import Result, quality_auc
from . import figure
from .split import Split

with extra():
    import jinja2
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.image import imsave
    from PIL import Image
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

SHOWN, LISTED = 24, 200  # of the most suspicious samples: with boxes and map, in the table
THUMBNAIL = 48  # pixels of the longer side
IN_MATRIX, PAIRS = 30, 40  # classes of a matrix, and pairs of labels that are listed


def print_table(results: Sequence[Result]) -> None:
    """One row per run: accuracies, AUC of the label quality, time."""
    rows = [
        {
            "recipe": result.config.recipe,
            "last accuracy": share(result.last_accuracy),
            "best accuracy": share(result.best_accuracy),
            "quality AUC": "–" if result.quality_auc is None else f"{result.quality_auc:.3f}",
            "epochs": str(len(result.history)),
            "steps": str(result.steps),
            "ms a step": f"{1000 * result.seconds_per_step:.1f}",
        }
        for result in results
    ]
    first = results[0]
    print_rows(f"{first.data.name}, {len(first.data)} training samples, {first.noise}", rows)
    data = first.data
    if not len(data.test_labels):
        print("there is no test set, and so no accuracy", end="; ")
    elif data.test_noisy:
        images = f"{len(data.test_labels)} validation images, whose labels are noisy"
        print(f"accuracies are on {images}; the best is picked on them", end="; ")
    else:
        print("best accuracy is picked on the test set", end="; ")
    print("quality AUC: label quality against correctness")


def print_rows(title: str, rows: Sequence[dict[str, str]]) -> None:
    """A table of equal-keyed rows; the first column is text, the others are numbers."""
    table = Table(title=title)
    for number, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if number else "left", no_wrap=not number)
    for row in rows:
        table.add_row(*(escape(printable(cell)) for cell in row.values()))  # names have anything
    Console().print(table)


def share(part: float, whole: float = 1) -> str:
    """As a per cent; a dash for a share of nothing, and for what is not known, NaN."""
    return "–" if not whole or math.isnan(part) else f"{part / whole:.1%}"


def write_report(
    path: str | Path,
    result: Result,
    table: Any,
    columns: Mapping[str, Any],
    split: Split,
    settings: Mapping[str, Any],
    record: Mapping[str, Any],
) -> None:
    """Write the run's report, one HTML file that loads nothing.

    table is `inspection.sample_table`'s and columns its numbers, settings the run's own
    (`result.config` is `load_run`'s), record its `record.read_record`.
    """
    config, data, history = result.config, result.data, result.history
    given, proposed = columns["given_label"], columns["proposed_label"]
    fitted = split.overlap is not None
    # Many clean probabilities are the same to the last bit, namely 0.
    order = np.lexsort((columns["given_prob"], np.nan_to_num(columns["clean_prob"])))
    order = order[np.argsort(split.unlearnt[given[order]], kind="stable")][:LISTED]
    figures: dict[str, str | list[str]] = {}
    with matplotlib.rc_context(figure.STYLE):
        if history:
            warmup = config.warmup if result.recipe.uses_quality else 0
            figures["history"] = _panels(figure.draw_history(history, warmup))
        if fitted:
            figures["mixtures"] = _panels(figure.draw_mixtures(result))
            quality = torch.tensor(columns["clean_prob"])
            known = (data.true_labels.cpu() >= 0) & ~quality.isnan()
            if known.any():
                right = (data.labels == data.true_labels).cpu()[known]
                drawn = figure.draw_calibration({config.recipe: quality[known]}, right)
                figures["calibration"] = _svg(drawn)
        statistics = {name: x for name, x in columns.items() if name.startswith("activation_")}
        figures["activations"] = _svg(figure.draw_activations(statistics, split.suspect))
    template = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    ).from_string(Path(__file__).with_name("report.html").read_text("utf-8"))
    text = template.render(
        result=result,
        names=[str(name) for name in data.classes or range(data.num_classes)],
        fitted=fitted,
        split=split,
        numbers=_numbers(result, columns, split),
        figures=figures,
        rows=table.take(order).to_pylist(),
        suspect=split.suspect[order].tolist(),
        thumbnails=_thumbnails(result, torch.from_numpy(order.copy())),
        pictures=_pictures(result, torch.from_numpy(order[:SHOWN].copy())),
        classes=_by_class(given, proposed, split, data.num_classes),
        matrix=_matrix(given, proposed, data.num_classes),
        moves=_moves(given, proposed, data.num_classes),
        record=record,
        changed=record["changed"],
        settings=settings,
    )
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _numbers(result: Result, columns: Mapping[str, Any], split: Split) -> dict[str, str]:
    """The numbers at the report's head."""
    suspect = split.suspect
    quality = torch.tensor(columns["clean_prob"])
    auc = quality_auc(quality, result.data) if split.overlap is not None else None
    numbers = {}
    if len(result.data.test_labels):
        tested = "noisy validation" if result.data.test_noisy else "test"
        numbers = {
            f"{tested} accuracy, last epoch": share(result.last_accuracy),
            f"best epoch (picked on the {tested} set)": share(result.best_accuracy),
        }
    numbers |= {
        "labels suspected": f"{suspect.mean():.1%}",
        "labels on the wrong side of the split, by its own mixture": split.overlap_in_words,
    }
    if "true_label" in columns:
        known = columns["true_label"] >= 0
        wrong = known & (columns["true_label"] != columns["given_label"])
        caught = (wrong & suspect).sum()
        numbers["labels wrong"] = share(wrong.sum(), known.sum())
        numbers["wrong labels that are suspected"] = share(caught, wrong.sum())
        numbers["suspected labels that are wrong"] = share(caught, (known & suspect).sum())
        numbers["AUC of the label quality"] = "–" if auc is None else f"{auc:.3f}"
    return numbers | {"images that cannot be read": str(len(result.data.images.corrupt))}


def _by_class(given: Any, proposed: Any, split: Split, size: int) -> list[dict[str, Any]]:
    """Of each class its number, the samples with its label, those predicted to be of it, the share
    of its labels that are suspected, the overlap of its mixture, and the label most often proposed
    for the suspected ones, −1 for none."""
    suspect = split.suspect
    total, predicted, suspected = (
        np.bincount(x, minlength=size) for x in (given, proposed, given[suspect])
    )
    moves = _counts(given[suspect], proposed[suspect], size)
    np.fill_diagonal(moves, 0)
    best = np.where(moves.any(1), moves.argmax(1), -1)
    overlaps = np.full(size, np.nan) if split.overlaps is None else split.overlaps
    return [
        {
            "label": k,
            "given": total[k],
            "predicted": predicted[k],
            "suspected": "not learnt" if split.unlearnt[k] else share(suspected[k], total[k]),
            "overlap": "as all" if np.isnan(overlaps[k]) else f"{overlaps[k]:.1%}",
            "best": best[k],
        }
        for k in range(size)
    ]


def _counts(given: Any, proposed: Any, size: int) -> Any:
    """How many samples (K, K) of each given label are proposed each label."""
    return np.bincount(given * size + proposed, minlength=size**2).reshape(size, size)


def _matrix(given: Any, proposed: Any, size: int) -> list[list[tuple[int, float]]]:
    """`_counts`, each with its share of the row; nothing for more classes than a page can show."""
    if size > IN_MATRIX:
        return []
    counts = _counts(given, proposed, size)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return [list(zip(*row, strict=True)) for row in zip(counts.tolist(), shares, strict=True)]


def _moves(given: Any, proposed: Any, size: int) -> list[tuple[int, int, int]]:
    """The most frequent pairs of a given and another proposed label, with their numbers."""
    pairs, counts = np.unique((given * size + proposed)[given != proposed], return_counts=True)
    most = np.argsort(-counts, kind="stable")[:PAIRS]
    return [(pairs[i] // size, pairs[i] % size, counts[i]) for i in most]


def _pictures(result: Result, chosen: Tensor) -> list[dict[str, Any]]:
    """Image and activation map as data URIs, and the boxes to be drawn over them."""
    shown = figure.explain(result, chosen)
    views = result.recipe.networks[0].mask_config.views
    images = _colours(shown["image"])
    return [
        {
            "image": _png(images[row].permute(1, 2, 0)),
            "map": _png(shown["map"][row, 0], cmap="magma"),
            "boxes": {view: shown[f"box_{view}"][row].tolist() for view in views},
        }
        for row in range(len(chosen))
    ]


def _thumbnails(result: Result, chosen: Tensor) -> list[str]:
    """The images at `chosen`, small, as data URIs."""
    augment = result.recipe.augment
    found = []
    for part in result.data.images.stream(chosen.split(64)):
        images = _colours(augment.denormalize(augment.plain(part)).clamp(0, 1)).cpu()
        side = max(images.shape[2:])
        if side > THUMBNAIL:
            size = [max(1, round(n * THUMBNAIL / side)) for n in images.shape[2:]]
            images = F.interpolate(images, size, mode="area")
        for image in images:
            pixels = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).contiguous().numpy()
            buffer, kind = io.BytesIO(), "PNG" if side <= THUMBNAIL else "JPEG"
            Image.fromarray(pixels).save(buffer, kind)
            found.append(_uri(buffer, kind.lower()))
    return found


def _colours(images: Tensor) -> Tensor:
    """Three channels (B, 3, H, W) of any number."""
    return images[:, :3] if images.shape[1] >= 3 else images[:, [0, 0, 0]]


def _png(pixels: Tensor, **style: Any) -> str:
    buffer = io.BytesIO()
    imsave(buffer, pixels.contiguous().numpy(), format="png", **style)
    return _uri(buffer, "png")


def _uri(buffer: io.BytesIO, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _panels(drawn: Figure) -> list[str]:
    """Each of the figure's axes by itself, so that a narrow page has them one below another."""
    drawn.draw_without_rendering()  # places them
    drawn.set_layout_engine("none")  # where they stay, while one by one is written
    inches = drawn.dpi_scale_trans.inverted()
    boxes = [axis.get_tightbbox() for axis in drawn.axes]
    return [_svg(drawn, box.transformed(inches).padded(0.06)) for box in boxes if box is not None]


def _svg(drawn: Figure, part: Any = None) -> str:
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="svg", metadata={"Date": None}, bbox_inches=part)
    return _uri(buffer, "svg+xml")
