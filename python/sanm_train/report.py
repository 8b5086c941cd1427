"""Tables of results, and the label quality of every training sample."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .files import write_csv
from .train import Result


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
        table.add_row(*row.values())
    Console().print(table)


def mean_and_spread(accuracies: Sequence[float]) -> str:
    """Mean and, with several values, sample standard deviation of shares, as per cents."""
    mean = f"{statistics.mean(accuracies):.1%}"
    if len(accuracies) < 2:
        return mean
    return f"{mean} ± {100 * statistics.stdev(accuracies):.1f}"


def write_label_quality(path: str | Path, result: Result) -> None:
    """One row per training sample: index, labels, clean probability (mean, each network), loss.

    clean_prob is the mean over the networks, and loss the mean cross-entropy of the given label.
    """
    data, recipe = result.data, result.recipe
    labels, truth = data.labels.tolist(), data.true_labels.tolist()
    quality, losses = recipe.quality.tolist(), recipe.losses.mean(0).tolist()
    rows = [
        {
            "index": i,
            "given_label": labels[i],
            "true_label": truth[i],
            "clean_prob": sum(q[i] for q in quality) / len(quality),
            **{f"clean_prob_{k + 1}": q[i] for k, q in enumerate(quality) if len(quality) > 1},
            "loss": losses[i],
        }
        for i in range(len(data))
    ]
    write_csv(path, rows)
