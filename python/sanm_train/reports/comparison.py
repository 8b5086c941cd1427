"""Tables of many runs: recipes against kinds of noise, and SANM without each of its parts."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..config import TrainConfig
from ..errors import ConfigError
from ..files import prepare_folder, replacing, write_csv
from ..recipes import RECIPES
from ..settings import fitting
from ..train import Result, quality_auc, train

#: The control of every recipe with SANM, whose masks are also further views, and its parts.
CONTROL = "plain views"
PARTS: dict[str, dict[str, Any]] = {
    CONTROL: {"box": "none"},
    "random box": {"box": "random"},
    "no modulation": {"modulate": False},
    "no reconstruction": {"reconstruct": False},
    "max view only": {"views": "max"},
    "min view only": {"views": "min"},
}
NOISES = ("symmetric:0.2", "symmetric:0.5", "symmetric:0.8", "asymmetric:0.4")
Variants = dict[str, dict[str, Any]]
Bases = dict[str, list[str]]


def recipe_table(recipes: Sequence[str]) -> tuple[Variants, Bases]:
    """The recipes, each one with SANM followed by its control; and what a variant is held against:
    the same recipe without SANM, where it is in the table, and the control."""
    variants: Variants = {}
    bases: Bases = {}
    for name in recipes:
        variants[name] = {"recipe": name}
        base = name.removeprefix("sanm-")
        bases[name] = [base] if base != name and base in recipes else []
        if RECIPES[name].masking:
            control = f"{name}: {CONTROL}"
            variants[control] = {"recipe": name, **PARTS[CONTROL]}
            bases[control] = list(bases[name])
            bases[name].append(control)
    return variants, bases


def ablation_table(recipes: Sequence[str]) -> tuple[Variants, Bases]:
    """Each of the recipes, which have SANM, after the one without it and before SANM without each
    of its parts; all are held against the first, the control and SANM as a whole.

    Raises:
        ConfigError: a recipe has no masked views, or there is none of its name without SANM.
    """
    variants: Variants = {}
    bases: Bases = {}
    for name in recipes:
        base = name.removeprefix("sanm-")
        if not RECIPES[name].masking or base == name or base not in RECIPES:
            raise ConfigError(f"recipes must be SANM on another recipe, got {name}")
        against = [base, f"{name}: {CONTROL}", name]
        variants |= {base: {"recipe": base}, name: {"recipe": name}}
        variants |= {f"{name}: {part}": {"recipe": name, **own} for part, own in PARTS.items()}
        bases |= {f"{name}: {part}": against for part in PARTS}
        bases |= {against[1]: against[:1], name: against[:2]}
    return variants, bases


def compare(
    out: str | Path,
    seeds: Sequence[int],
    noises: Sequence[str] = NOISES,
    variants: Mapping[str, dict[str, Any]] | None = None,
    bases: Mapping[str, Sequence[str]] | None = None,
    **settings: Any,
) -> int:
    """Train every variant on every kind of noise with every seed.

    Args:
        out: folder for runs.csv, which gets a row after each run; runs it has already are not
            repeated, so an interrupted table continues where it was. settings.json says with which
            settings; other ones need another folder.
        noises: kind and rate, as "symmetric:0.5".
        variants: name → settings of its own; default: `recipe_table` of all recipes.
        bases: variant → the variants that it is held against, seed by seed; default: none, or those
            of the default variants.

    Returns the exit status, 130 when interrupted.

    Raises:
        ConfigError: a setting cannot be used, or `out` holds runs with other settings.
    """
    from .figure import draw_accuracies
    from .report import print_rows  # needs the extra, before the first run and not after the last

    if variants is None:
        variants, default = recipe_table(list(RECIPES))
        bases = default if bases is None else bases
    kinds = [(noise, *_noise(noise)) for noise in noises]
    configs = {  # all of them are checked before the first one runs
        (noise, name, seed): _config(
            {**settings, "noise": kind, "rate": rate, "seed": seed, **changes}
        )
        for seed in seeds
        for noise, kind, rate in kinds
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
                **_other_aucs(result),
                "ms_per_step": 1000 * result.seconds_per_step,
                "seconds": result.seconds,
                "accuracies": " ".join(f"{x:.4f}" for x in result.accuracies),
            }
        )
        write_csv(path, rows)
    rows = [row for row in _read(path) if int(row["seed"]) in seeds]
    cells = {noise: [row for row in rows if row["noise"] == noise] for noise in noises}
    for noise, cell in cells.items():
        runs = {name: [row for row in cell if row["variant"] == name] for name in variants}
        wrong = statistics.mean(float(row["wrong_labels"]) for row in cell)
        title = f"{noise}, {wrong:.1%} wrong labels, mean ± deviation over seeds"
        print_rows(title, [_summary(name, own) for name, own in runs.items()])
        if any(row["quality_auc"] for row in cell):  # the truth is known
            title = "AUC as a test for right labels"
            print_rows(title, [_ranking(name, own) for name, own in runs.items()])
        if against := differences(cell, bases or {}):
            print_rows("last accuracy, seed by seed: difference ± standard error", against)
    known = any(row.get("loss_auc") for row in rows)  # which labels are right
    if known and not any(row.get("cleanlab_auc") for row in rows):
        print("no cleanlab_auc: cleanlab is not installed")
    curves = accuracy_curves(rows, noises, variants)
    if any(runs for lines in curves.values() for runs in lines.values()):
        with replacing(folder / "accuracy.png") as temporary:
            draw_accuracies(curves).savefig(temporary)
    return 0


def accuracy_curves(
    rows: Sequence[Mapping[str, str]], noises: Sequence[str], variants: Iterable[str]
) -> dict[str, dict[str, list[list[float]]]]:
    """By noise and variant the accuracies by epoch of each run of runs.csv that has them; not those
    of SANM without one of its parts."""
    parts = tuple(f": {part}" for part in PARTS if part != CONTROL)
    return {
        noise: {
            name: [
                [float(x) for x in row["accuracies"].split()]
                for row in rows
                if (row["noise"], row["variant"]) == (noise, name) and row.get("accuracies")
            ]
            for name in variants
            if not name.endswith(parts)
        }
        for noise in noises
    }


def differences(
    rows: Sequence[Mapping[str, str]], bases: Mapping[str, Sequence[str]]
) -> list[dict[str, str]]:
    """Last accuracies of variants minus those of their bases in the runs of one kind of noise, seed
    by seed: in points the mean and its standard error, and whether it exceeds two of these."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["last_accuracy"]:
            found.setdefault(row["variant"], {})[row["seed"]] = 100 * float(row["last_accuracy"])
    table = []
    for name, others in bases.items():
        for other in others:
            ours, theirs = found.get(name, {}), found.get(other, {})
            values = [ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()]
            if len(values) < 2:  # which have no standard error
                continue
            mean = statistics.mean(values)
            error = statistics.stdev(values) / math.sqrt(len(values))
            table.append(
                {
                    "variant": name,
                    "against": other,
                    "difference": f"{mean:+.1f} ± {error:.1f}",
                    "seeds": str(len(values)),
                    "beyond two errors": "yes" if abs(mean) > 2 * error else "no",
                }
            )
    return table


def _other_aucs(result: Result) -> dict[str, float | None]:
    """The AUC of what ranks a finished run's labels without a mixture: the loss, and cleanlab's
    score, if it is installed. That one is the label's probability in relation to its class's mean,
    as confident learning has it; without this it would rank as the loss does."""
    aucs = {"loss_auc": quality_auc(-result.losses.mean(0), result.data)}
    try:
        from cleanlab.rank import get_label_quality_scores
    except ImportError:
        return aucs
    data = result.recipe.data
    predicted = result.recipe.predict(data.images).softmax(1).cpu().double().numpy()
    labels = data.labels.cpu().numpy()
    scores = get_label_quality_scores(labels, predicted, adjust_pred_probs=True)
    return aucs | {"cleanlab_auc": quality_auc(torch.from_numpy(scores), data)}


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

    Noise, rate and seed are in each run's row, and may differ.
    """
    own = ("noise", "rate", "seed")
    new = {name: {k: v for k, v in s.items() if k not in own} for name, s in variants.items()}
    new = json.loads(json.dumps(new))  # tuples become lists
    try:
        old = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise ConfigError(f"out: {path} cannot be read: {error}") from None
    if started and not old:
        raise ConfigError(f"out: {path.parent} has runs, but no {path.name} that describes them")
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
    def column(key: str) -> list[float]:
        return [float(row[key]) for row in rows if row.get(key)]

    return {
        "variant": name,
        "last accuracy": mean_and_spread(column("last_accuracy")),
        "best accuracy": mean_and_spread(column("best_accuracy")),
        "last, per seed": ", ".join(f"{100 * x:.1f}" for x in column("last_accuracy")),
        "quality AUC": _mean(rows, "quality_auc"),
        "ms a step": f"{statistics.mean(column('ms_per_step')):.0f}",
    }


def _ranking(name: str, rows: Sequence[Mapping[str, str]]) -> dict[str, str]:
    keys = {"clean probability": "quality_auc", "loss": "loss_auc", "cleanlab": "cleanlab_auc"}
    return {"variant": name} | {title: _mean(rows, key) for title, key in keys.items()}


def _mean(rows: Sequence[Mapping[str, str]], key: str) -> str:
    values = [float(row[key]) for row in rows if row.get(key)]
    return f"{statistics.mean(values):.3f}" if values else "–"
