"""Clean probabilities of every sample by networks that were not trained on it."""

from __future__ import annotations

import dataclasses
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import sanm_kernels as sk

from ..config import TrainConfig
from ..errors import ConfigError
from ..extra import extra
from ..files import prepare_folder, replacing
from ..loop import launched
from ..recipes.base import mixture_of
from ..train import Result, load_run, read_data, train
from .inspection import numbers_of, sample_table, write_tables
from .split import split

with extra():
    import pyarrow as pa

FEWEST = 50  # samples of a part, to whose losses a mixture is fitted


def train_folds(
    config: TrainConfig, out: str | Path, *, overwrite: bool = False, progress: bool = False
) -> int:
    """Train `config.folds` runs, each on all but one part of the training set, and judge the labels
    of each part by the run that has not seen it.

    Each label has its share in every part. Runs go to fold-1, fold-2, … in `out`; those that are
    there are continued, unless `overwrite`. samples.csv, samples.parquet, pred_probs.npy
    and relabel.csv are those of `inspect`; clean probabilities come from a mixture that is fitted
    to the part's own losses.

    Returns the exit status, 130 when interrupted.

    Raises:
        ConfigError, OSError: as `train`; a part would have fewer than 50 samples.
    """
    folder = prepare_folder(out)
    whole = read_data(config)
    if len(whole) < FEWEST * config.folds:
        raise ConfigError(
            f"folds: {len(whole)} samples are too few for {config.folds} parts, of at least "
            f"{FEWEST} each"
        )
    runs = [folder / f"fold-{k}" for k in range(1, config.folds + 1)]
    # One group of processes for all runs: in a second one they might meet the first's addresses.
    with launched(config):
        for number, run in enumerate(runs, 1):
            fold = dataclasses.replace(config, fold=number)
            if train(fold, run, progress=progress, resume=not overwrite).interrupted:
                return 130
    if int(os.environ.get("RANK", "0")):
        return 0
    parts = whole.folds(config.folds, config.seed)
    predictions = np.empty((len(whole), whole.num_classes), np.float32)
    tables, mixtures = [], []
    for number, run in enumerate(runs):
        result = load_run(run, config.device)
        rows = (parts == number).nonzero()[:, 0]
        unseen = dataclasses.replace(result, data=whole.select(rows))
        quality, fitted = held_out_quality(unseen)
        result.recipe.mixtures = fitted
        found = np.empty((len(rows), whole.num_classes), np.float32)
        table = sample_table(unseen, found, quality)
        predictions[rows.numpy()] = found
        tables.append(table.append_column("fold", pa.array([number + 1] * len(rows))))
        mixtures.append(fitted)
    order = parts.argsort(stable=True).argsort().numpy()  # from part by part to the data set's
    table = pa.concat_tables(tables, promote_options="default").take(pa.array(order))
    together = dataclasses.replace(result, data=whole)
    result.recipe.mixtures = torch.cat(mixtures)
    judged = split(together, numbers_of(table), None)
    with replacing(folder / "pred_probs.npy") as temporary:
        np.save(temporary, predictions)
    write_tables(folder, table, judged.suspect)
    for text in judged.warnings:
        warnings.warn(text, stacklevel=2)
    return 0


def held_out_quality(result: Result) -> tuple[Tensor, Tensor]:
    """Clean probabilities (networks, N) of `result.data` by mixtures (networks, 3, 2) that are
    fitted to the losses of the networks, which have not seen them."""
    recipe, labels = result.recipe, result.data.labels
    quality, mixtures = [], []
    for network in recipe.tested:
        losses = sk.sample_loss(recipe.evaluate(network, result.data.images), labels).cpu()
        fit = sk.fit_label_quality(losses, seed=result.config.seed, backend="reference")
        degenerate = bool(fit.degenerate)
        quality.append(torch.ones_like(fit.clean_prob) if degenerate else fit.clean_prob)
        mixtures.append(mixture_of(fit))
    return torch.stack(quality), torch.stack(mixtures)
