"""Tables of many runs: recipes against kinds of noise, and SANM without each of its parts."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..config import TrainConfig
from ..errors import ConfigError
from ..files import prepare_folder, replacing, write_csv
from ..recipes import RECIPES
from ..settings import fitting
from ..train import train

ABLATION: dict[str, dict[str, Any]] = {
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
NOISES = ("symmetric:0.2", "symmetric:0.5", "symmetric:0.8", "asymmetric:0.4")


def compare(
    out: str | Path,
    seeds: Sequence[int],
    noises: Sequence[str] = NOISES,
    variants: Mapping[str, dict[str, Any]] | None = None,
    **settings: Any,
) -> int:
    """Train every variant (default: every recipe) on every kind of noise with every seed.

    Args:
        out: folder for runs.csv, which gets a row after each run; runs it has already are not
            repeated, so an interrupted table continues where it was. settings.json says with which
            settings; other ones need another folder.
        noises: kind and rate, as "symmetric:0.5".
        variants: name → settings of its own.

    Returns the exit status, 130 when interrupted.

    Raises:
        ConfigError: a setting cannot be used, or `out` holds runs with other settings.
    """
    from .report import print_rows  # needs the extra, before the first run and not after the last

    variants = {name: {"recipe": name} for name in RECIPES} if variants is None else variants
    cells = [(noise, *_noise(noise)) for noise in noises]
    configs = {  # all of them are checked before the first one runs
        (noise, name, seed): _config(
            {**settings, "noise": kind, "rate": rate, "seed": seed, **changes}
        )
        for seed in seeds
        for noise, kind, rate in cells
        for name, changes in variants.items()
    }
    folder = prepare_folder(out)
    path = folder / "runs.csv"
    rows = _read(path)
    resolved = {name: asdict(config) for (_, name, _), config in configs.items()}
    _check_settings(folder / "settings.json", resolved, started=bool(rows))
    done = {(row["noise"], row["variant"], int(row["seed"])) for row in rows}
    for (noise, name, seed), config in configs.items():
        if (noise, name, seed) in done:
            continue
        result = train(config, progress=True)
        if result.interrupted:
            return 130
        rows.append(
            {
                "noise": noise,
                "variant": name,
                "seed": seed,
                "wrong_labels": result.data.noise_rate,
                "last_accuracy": result.accuracies[-1] if result.accuracies else None,
                "best_accuracy": max(result.accuracies, default=None),
                "quality_auc": result.quality_auc,
                "ms_per_step": 1000 * result.seconds_per_step,
                "seconds": result.seconds,
            }
        )
        write_csv(path, rows)
    rows = _read(path)
    for noise in noises:
        cell = [row for row in rows if row["noise"] == noise and int(row["seed"]) in seeds]
        table = [_summary(name, [r for r in cell if r["variant"] == name]) for name in variants]
        wrong = statistics.mean(float(row["wrong_labels"]) for row in cell)
        print_rows(f"{noise}, {wrong:.1%} wrong labels, mean ± deviation over seeds", table)
    return 0


def _config(settings: dict[str, Any]) -> TrainConfig:
    """Without the settings of other recipes."""
    return TrainConfig(**fitting(settings, TrainConfig.chosen(settings)))


def _noise(text: str) -> tuple[str, float]:
    kind, _, rate = text.partition(":")
    try:
        return kind, float(rate)
    except ValueError:
        raise ConfigError(f"noises must be like symmetric:0.5, got {text!r}") from None


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = {"noise", "variant", "seed"} - set(reader.fieldnames or ())
        if missing:
            raise ConfigError(f"out: {path} has no column {', '.join(sorted(missing))}")
        return list(reader)


def _check_settings(path: Path, variants: dict[str, dict[str, Any]], started: bool) -> None:
    """The variants' settings are those of the runs that are there; kept at `path` for later ones.

    Noise, rate and seed stand in each run's row, and may be others.
    """
    own = ("noise", "rate", "seed")
    new = {name: {k: v for k, v in s.items() if k not in own} for name, s in variants.items()}
    new = json.loads(json.dumps(new))  # tuples become lists
    try:
        old = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise ConfigError(f"out: {path} cannot be read: {error}") from None
    if started and not old:
        raise ConfigError(f"out: {path.parent} has runs, but no {path.name} that says of what")
    for name in new.keys() & old.keys():
        for key in sorted(new[name].keys() | old[name].keys()):
            before, now = old[name].get(key), new[name].get(key)
            if before != now:
                raise ConfigError(
                    f"out: {path.parent} has runs of {name} with {key} {before!r}, not {now!r}; "
                    "name another folder"
                )
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(old | new, indent=1))


def mean_and_spread(accuracies: Sequence[float]) -> str:
    """Mean and, with several values, sample standard deviation of shares, as per cents; a dash
    for none."""
    if not accuracies:
        return "–"
    mean = f"{statistics.mean(accuracies):.1%}"
    if len(accuracies) < 2:
        return mean
    return f"{mean} ± {100 * statistics.stdev(accuracies):.1f}"


def _summary(name: str, rows: Sequence[Mapping[str, str]]) -> dict[str, str]:
    columns = {key: [float(row[key]) for row in rows if row[key]] for key in list(rows[0])[3:]}
    aucs = columns["quality_auc"]
    return {
        "variant": name,
        "last accuracy": mean_and_spread(columns["last_accuracy"]),
        "best accuracy": mean_and_spread(columns["best_accuracy"]),
        "last, per seed": ", ".join(f"{100 * x:.1f}" for x in columns["last_accuracy"]),
        "quality AUC": f"{statistics.mean(aucs):.3f}" if aucs else "–",
        "ms a step": f"{statistics.mean(columns['ms_per_step']):.0f}",
    }
