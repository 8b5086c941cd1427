"""``python -m benchmarks.training``: what training costs on a GPU, and what comes of it; see
`make gpu-train`.

Fashion-MNIST (60,000 images, half of the labels wrong) with PreAct ResNet-18 in bfloat16, by ce,
dividemix and sanm-dividemix. Some steps of each are timed by their parts (`benchmarks.step`); then
it is trained for as many epochs as its share of the minutes allows. Exit status: 0; 2 without a
GPU, where nothing is run unless `--device cpu` asks for a rehearsal.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Watch
from benchmarks.run import HERE, environment, slug, write
from benchmarks.step import NETWORKS, OPTIMIZER, PARTS, Clock, measure
from sanm_train import TrainConfig, train
from sanm_train.train import build

SHARES = {"ce": 1.0, "dividemix": 3.0, "sanm-dividemix": 4.0}  # of the time
WARMUP = 1  # epochs
RESERVE = 0.15  # of a recipe's time, for what an estimate from a few steps misses


def settings(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "dataset": "fashion-mnist",
        "data_root": str(options.data_root),
        "model": "preact-resnet18",
        "width": options.width,
        "limit": options.limit,
        "noise": "symmetric",
        "rate": 0.5,
        "batch_size": 128,
        "precision": "float32" if options.device == "cpu" else "bfloat16",
        "device": options.device,
        "threads": 1 if options.device == "cpu" else 0,
    }


def pace(config: TrainConfig, steps: int) -> tuple[dict[str, float], float]:
    """The median seconds of a step's parts after the warm-up, and what an epoch takes, with half
    of the labels taken for right."""
    result = build(config)
    recipe, clock = result.recipe, Clock(config.device)
    began = time.perf_counter()
    recipe.fit_quality()
    recipe.predict(recipe.data.test_images).sum().item()
    evaluation = time.perf_counter() - began
    recipe.quality = torch.rand_like(recipe.quality)
    number = len(recipe.plan(config.warmup))
    clock.watch_all()
    try:
        found = measure(clock, recipe, steps)
    finally:
        clock.release()
    parts = {part: statistics.median(step[part] for step in found) for part in PARTS}
    return parts, number * statistics.median(sum(step.values()) for step in found) + evaluation


def run(recipe: str, options: argparse.Namespace, end: float) -> dict[str, Any]:
    """Time and train one recipe until `end` on the monotonic clock."""
    given = settings(options) | {"recipe": recipe}
    parts, epoch = pace(TrainConfig(**given, warmup=0), options.steps)
    left = (1 - RESERVE) * (end - time.monotonic())
    epochs = max(WARMUP + 1, int(left / epoch))
    result = train(TrainConfig(**given, warmup=WARMUP, epochs=epochs), progress=True)
    step = sum(parts.values())
    return {
        "recipe": recipe,
        "epochs": epochs,
        "steps": result.steps,
        "ms_per_step": 1000 * result.seconds_per_step,
        "ms_by_part": {part: 1000 * seconds for part, seconds in parts.items()},
        "outside_networks": 1 - (parts[NETWORKS] + parts[OPTIMIZER]) / step,
        "wrong_labels": result.data.noise_rate,
        "accuracies": result.accuracies,
        "quality_auc": result.quality_auc,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    add = parser.add_argument
    add("--data-root", type=Path, required=True, help="folder with Fashion-MNIST's IDX files")
    add("--minutes", type=float, default=11.5, help="for all recipes (default: 11.5)")
    add("--steps", type=int, default=20, help="that are timed by their parts (default: 20)")
    add("--device", default="cuda", help="cpu: a rehearsal, which needs --out")
    add("--limit", type=int, default=0, help="only the first N images, for a rehearsal")
    add("--width", type=int, default=64, help="of the network (default: 64)")
    add("--out", type=Path, help="JSON file (default: in benchmarks/results)")
    options = parser.parse_args(arguments)
    if options.device == "cpu" and options.out is None:
        parser.error("--device cpu needs --out")
    if options.device != "cpu" and not torch.cuda.is_available():
        print("There is no GPU here: nothing was measured.")
        return 2
    watch = Watch(despite=True)  # the host only launches: its load is written down
    watch.keeps("before the run")
    began, facts = time.monotonic(), environment()
    name = facts["gpu"]["name"] if options.device != "cpu" else "rehearsal"
    out = options.out or HERE / "results" / f"training-{slug(name)}.json"
    given = settings(options) | {"data_root": ""}
    shown: dict[str, Any] = {"minutes": options.minutes, "settings": given}
    rows: list[dict[str, Any]] = []
    for recipe, share in SHARES.items():
        weights = sum(list(SHARES.values())[len(rows) :])
        now = time.monotonic()
        left = began + 60 * options.minutes - now
        row = run(recipe, options, now + left * share / weights)
        rows.append(row)
        watch.keeps(recipe)
        shown |= {"seconds": time.monotonic() - began, "under_load": watch.found}
        write(out, {**facts, **shown, "recipes": rows})
        last, best = row["accuracies"][-1], max(row["accuracies"])
        print(
            f"{recipe}: {row['epochs']} epochs, accuracy {last:.1%} (best {best:.1%}), "
            f"{row['ms_per_step']:.1f} ms a step, {row['outside_networks']:.0%} of it outside "
            "networks and optimiser"
        )
    print(f"{time.monotonic() - began:.0f} s; written to {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
