"""Tables of results on the terminal, and the report of one run as an HTML file."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..extra import extra
from ..files import replacing
from ..train import Result
from . import figure

with extra():
    import jinja2
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.image import imsave
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

SHOWN, LISTED = 24, 200  # of the most suspicious samples: with image, in the table


def print_table(results: Sequence[Result]) -> None:
    """One row per run: accuracies, AUC of the label quality, time."""
    rows = [
        {
            "recipe": result.config.recipe,
            "last accuracy": f"{result.last_accuracy:.1%}",
            "best accuracy": f"{result.best_accuracy:.1%}",
            "quality AUC": "–" if result.quality_auc is None else f"{result.quality_auc:.3f}",
            "epochs": str(len(result.history)),
            "steps": str(result.steps),
            "ms a step": f"{1000 * result.seconds_per_step:.1f}",
        }
        for result in results
    ]
    first = results[0]
    print_rows(f"{first.data.name}, {len(first.data)} training samples, {first.noise}", rows)
    print("best accuracy is picked on the test set; quality AUC: label quality against correctness")


def print_rows(title: str, rows: Sequence[dict[str, str]]) -> None:
    """A table of equal-keyed rows; the first column is text, the others are numbers."""
    table = Table(title=title)
    for number, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if number else "left", no_wrap=not number)
    for row in rows:
        table.add_row(*map(escape, row.values()))  # names may have brackets
    Console().print(table)


def share(part: float, whole: float) -> str:
    """As a per cent; a dash for a share of nothing."""
    return f"{part / whole:.1%}" if whole else "–"


def write_report(path: str | Path, result: Result, table: Any, settings: Mapping[str, Any]) -> None:
    """Write the run's report, one HTML file that loads nothing.

    table is `inspection.sample_table`'s, settings the run's own (`result.config` is `load_run`'s).
    """
    config, data, history = result.config, result.data, result.history
    numeric = [name for name in table.column_names if name != "path" and name[-6:] != "_class"]
    columns = {name: table[name].to_numpy() for name in numeric}
    given, proposed = columns["given_label"], columns["proposed_label"]
    fitted = not np.isnan(columns["clean_prob"]).all()
    suspect = columns["clean_prob"] <= config.threshold if fitted else given != proposed
    # Many clean probabilities are the same to the last bit, namely 0.
    order = np.lexsort((columns["given_prob"], np.nan_to_num(columns["clean_prob"])))[:LISTED]
    figures = {}
    with matplotlib.rc_context(figure.STYLE):
        if history:
            warmup = config.warmup if result.recipe.uses_quality else 0
            figures["history"] = _svg(figure.draw_history(history, warmup))
        if fitted:
            figures["mixtures"] = _svg(figure.draw_mixtures(result))
        statistics = {name: x for name, x in columns.items() if name.startswith("activation_")}
        figures["activations"] = _svg(figure.draw_activations(statistics, suspect))
    defaults = {entry.name: entry.default for entry in dataclasses.fields(config)}
    template = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    ).from_string(Path(__file__).with_name("report.html").read_text("utf-8"))
    text = template.render(
        result=result,
        names=data.classes or range(data.num_classes),
        fitted=fitted,
        numbers=_numbers(result, columns, suspect, fitted),
        figures=figures,
        rows=table.take(order).to_pylist(),
        pictures=_pictures(result, torch.from_numpy(order[:SHOWN].copy())),
        classes=_by_class(given, proposed, suspect, data.num_classes),
        changed={name: x for name, x in settings.items() if x != defaults.get(name)},
        settings=settings,
    )
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _numbers(result: Result, columns: Any, suspect: Any, fitted: bool) -> dict[str, str]:
    """The numbers at the report's head."""
    auc = result.quality_auc if fitted else None
    numbers = {
        "test accuracy, last epoch": share(result.last_accuracy, len(result.history) > 0),
        "best epoch (picked on the test set)": share(result.best_accuracy, len(result.history) > 0),
        "labels suspected": f"{suspect.mean():.1%}",
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


def _by_class(
    given: Any, proposed: Any, suspect: Any, size: int
) -> list[tuple[int, int, str, int]]:
    """Class, samples with its label, share of these that are suspect, and the label most often
    proposed for them, −1 for none."""
    total, suspected = (np.bincount(x, minlength=size) for x in (given, given[suspect]))
    pairs = (given * size + proposed)[suspect & (given != proposed)]
    moves = np.bincount(pairs, minlength=size**2).reshape(size, size)
    best = np.where(moves.any(1), moves.argmax(1), -1)
    return [(k, total[k], share(suspected[k], total[k]), best[k]) for k in range(size)]


def _pictures(result: Result, chosen: Tensor) -> list[dict[str, Any]]:
    """Image and activation map as data URIs, and the boxes to be drawn over them."""
    shown = figure.explain(result, chosen)
    views = result.recipe.networks[0].mask_config.views
    images = shown["image"] if shown["image"].shape[1] >= 3 else shown["image"][:, [0, 0, 0]]
    return [
        {
            "image": _png(images[row, :3].permute(1, 2, 0)),
            "map": _png(shown["map"][row, 0], cmap="magma"),
            "boxes": {view: shown[f"box_{view}"][row].tolist() for view in views},
        }
        for row in range(len(chosen))
    ]


def _png(pixels: Tensor, **style: Any) -> str:
    buffer = io.BytesIO()
    imsave(buffer, pixels.contiguous().numpy(), format="png", **style)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _svg(drawn: Figure) -> str:
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
