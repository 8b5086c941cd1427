"""The engine: one run from a `TrainConfig` to a `Result`."""

from __future__ import annotations

import math
import random
import time
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .config import TrainConfig
from .data import DATASETS, Dataset
from .files import prepare_folder, write_csv
from .recipes import RECIPES, Recipe

METRICS = "metrics.csv"


@dataclass
class Result:
    """What a run gives. Accuracies are shares of the test set.

    `last_accuracy` is the final epoch's. `best_accuracy` is the largest over the epochs: it is
    picked on the test set, so it only says how far memorisation pulled the run down again.
    quality and losses (networks, N) belong to the final networks.
    """

    config: TrainConfig
    data: Dataset
    recipe: Recipe
    history: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    train_seconds: float = 0.0
    interrupted: bool = False

    @property
    def last_accuracy(self) -> float:
        return self.history[-1]["test_accuracy"] if self.history else float("nan")

    @property
    def best_accuracy(self) -> float:
        return max((row["test_accuracy"] for row in self.history), default=float("nan"))

    @property
    def quality(self) -> Tensor:
        """Clean probability (N,) of the training labels, mean over the networks."""
        return self.recipe.quality.mean(0)

    @property
    def quality_auc(self) -> float | None:
        return quality_auc(self.quality, self.data)

    @property
    def noise(self) -> str:
        """The noise in words: kind, rate asked for, share of labels that really are wrong."""
        config, wrong = self.config, f"{self.data.noise_rate:.1%} of the labels wrong"
        if config.noise == "none":
            return f"no noise, {wrong}"
        drawn = {True: " (true class included)", False: " (true class excluded)"}
        how = drawn[config.include_true] if config.noise == "symmetric" else ""
        return f"{config.rate:.0%} {config.noise} noise{how}, {wrong}"

    @property
    def seconds_per_step(self) -> float:
        """Training time only, without evaluation."""
        return self.train_seconds / max(1, self.steps)


def seed_everything(seed: int) -> torch.Generator:
    """Seed Python, NumPy and torch; returns the generator for order and augmentation."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def train(config: TrainConfig, out: str | Path | None = None, *, progress: bool = False) -> Result:
    """Train as `config` says.

    Args:
        out: folder for `metrics.csv`, rewritten after every epoch; None writes nothing.
        progress: show a progress bar.

    Ctrl-C ends the run early: the result has `interrupted` set and the epochs finished so far.
    """
    folder = None if out is None else prepare_folder(out)
    data = DATASETS[config.dataset](config.data_root).to(config.device)
    data = data.with_noise(
        config.noise, config.rate, seed=config.seed, include_true=config.include_true
    )
    if config.limit:
        data = data.subset(config.limit)
    generator = seed_everything(config.seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    recipe = RECIPES[config.recipe](config, data, generator)
    result = Result(config, data, recipe)
    try:
        with _progress(config) if progress else nullcontext() as bar:
            for epoch in range(config.epochs):
                result.history.append(_run_epoch(result, epoch, bar))
                if folder is not None:
                    write_csv(folder / METRICS, result.history)
    except KeyboardInterrupt:
        result.interrupted = True
    finally:
        torch.set_num_threads(threads)
    return result


def _run_epoch(result: Result, epoch: int, bar: Any) -> dict[str, Any]:
    """Train and test for one epoch; its row of metrics."""
    config, data, recipe = result.config, result.data, result.recipe
    lr = config.lr * (0.1 if epoch >= config.lr_drop * config.epochs else 1.0)
    for optimizer in recipe.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
    steps, start = 0, time.perf_counter()
    for losses in recipe.train_epoch(epoch):
        steps += 1
        for name, value in losses.items():
            sums[name] = sums[name] + value
        if bar is not None:
            bar.step(epoch, steps)
    seconds = time.perf_counter() - start
    result.steps += steps
    result.train_seconds += seconds
    if epoch + 1 == config.epochs:
        recipe.fit_quality()
    hits = recipe.predict(data.test_images).argmax(1) == data.test_labels
    fitted = (recipe.uses_quality and epoch >= config.warmup) or epoch + 1 == config.epochs
    train_loss = (sums.pop("loss") / steps).item()
    if not math.isfinite(train_loss):
        raise FloatingPointError(f"epoch {epoch}: the training loss is {train_loss}")
    row = {
        "epoch": epoch,
        "lr": lr,
        "steps": steps,
        "seconds": seconds,
        "train_loss": train_loss,
        **{name: (total / steps).item() for name, total in sums.items()},
        "test_accuracy": hits.double().mean().item(),
        "quality_auc": quality_auc(recipe.quality.mean(0), data) if fitted else None,
        "labeled_share": (recipe.quality > config.threshold).double().mean().item(),
    }
    accuracies = [earlier["test_accuracy"] for earlier in result.history]
    row["best_accuracy"] = max([*accuracies, row["test_accuracy"]])
    if bar is not None:
        bar.epoch(row)
    return row


def quality_auc(quality: Tensor, data: Dataset) -> float | None:
    """Area under the ROC curve of quality (N,) as a test for correct labels; None if all or none
    are correct."""
    from sklearn.metrics import roc_auc_score

    clean = data.labels == data.true_labels
    if bool(clean.all()) or not bool(clean.any()):
        return None
    return float(roc_auc_score(clean.cpu(), quality.cpu()))


def _progress(config: TrainConfig) -> Any:
    from .progress import RunProgress

    return RunProgress(f"{config.recipe} (seed {config.seed})", config.epochs)
