"""The ablation table: `ce`, `dividemix` and `sanm-dividemix` without each of its parts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .config import TrainConfig
from .files import prepare_folder, write_csv
from .report import mean_and_spread, print_rows
from .train import train

VARIANTS: dict[str, dict[str, Any]] = {
    "ce": {"recipe": "ce"},
    "sanm-ce": {"recipe": "sanm-ce"},
    "dividemix": {"recipe": "dividemix"},
    "sanm-dividemix": {},
    "max view only": {"views": "max"},
    "min view only": {"views": "min"},
    "random box": {"box": "random"},
    "no modulation": {"modulate": False},
    "no reconstruction": {"reconstruct": False},
}


def ablate(out: str | Path, seeds: Sequence[int], **settings: Any) -> int:
    """Train every variant with every seed; writes ablation.csv after each run, prints the table.

    Returns the exit status, 130 when interrupted.
    """
    folder = prepare_folder(out)
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        for name, changes in VARIANTS.items():
            result = train(TrainConfig(seed=seed, **{**settings, **changes}), progress=True)
            if result.interrupted:
                return 130
            rows.append(
                {
                    "variant": name,
                    "seed": seed,
                    "last_accuracy": result.last_accuracy,
                    "best_accuracy": result.best_accuracy,
                    "quality_auc": result.quality_auc,
                    "ms_per_step": 1000 * result.seconds_per_step,
                    "seconds": result.train_seconds,
                }
            )
            write_csv(folder / "ablation.csv", rows)
    table = [_summary(name, [row for row in rows if row["variant"] == name]) for name in VARIANTS]
    print_rows(f"{result.data.name}, {result.noise}, mean ± deviation of {len(seeds)} seeds", table)
    return 0


def _summary(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    aucs = [auc for auc in columns["quality_auc"] if auc is not None]
    return {
        "variant": name,
        "last accuracy": mean_and_spread(columns["last_accuracy"]),
        "best accuracy": mean_and_spread(columns["best_accuracy"]),
        "quality AUC": f"{statistics.mean(aucs):.3f}" if aucs else "–",
        "ms a step": f"{statistics.mean(columns['ms_per_step']):.0f}",
    }
