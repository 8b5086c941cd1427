"""One run, from a `TrainConfig` to a `Result`, and runs read back from their folders."""

from __future__ import annotations

import dataclasses
import functools
import random
import shutil
import warnings
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import checkpoint, distributed, record
from .config import TrainConfig
from .data import Dataset, generator
from .datasets import DATASETS
from .errors import CheckpointError, ConfigError, DataError
from .extra import extra
from .files import locked, prepare_folder, remove_partial, write_csv
from .given import Handed, handed
from .images import unreadable
from .recipes import RECIPES, Recipe

if TYPE_CHECKING:
    from .loop import Loop

METRICS, CONFIG = "metrics.csv", "config.yaml"
#: By a run in its folder.
LEFT = (checkpoint.NAME, METRICS, CONFIG, record.NAME, "tensorboard", "inspect", "export")
PER_RANK = {"device", "threads", "workers"}  # settings in which ranks may differ
LOOKED_AT = 256  # images that are read before a run starts, of each process
ANYTIME = {"workers", "threads", "device", "checkpoint_steps", "tensorboard", "lr"}
RESOLVED = {"image_size"}  # by the data set, where they are not given


@dataclass
class Result:
    """What a run gives. Accuracies are shares of the test set, or, where `data.test_noisy`, of a
    share of the training set with its noisy labels; NaN where there is neither.

    `last_accuracy` is the final epoch's. `best_accuracy` is the largest over the epochs: it is
    picked on the test set, so it only says how far memorisation pulled the run down again.
    data is the whole data set, with quality and losses (networks, N) in its order; recipe holds the
    networks, and what it knows of this rank's samples in an order of its own.
    """

    config: TrainConfig
    data: Dataset
    recipe: Recipe
    history: list[dict[str, Any]] = field(default_factory=list)
    interrupted: bool = False
    quality: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    losses: Tensor = field(default_factory=lambda: torch.empty(0, 0))

    @functools.cached_property
    def fingerprint(self) -> dict[str, Any]:
        return self.data.fingerprint()

    @property
    def last_accuracy(self) -> float:
        return self.accuracies[-1] if self.accuracies else float("nan")

    @property
    def best_accuracy(self) -> float:
        return max(self.accuracies, default=float("nan"))

    @property
    def accuracies(self) -> list[float]:
        """On the test or validation images after each epoch; none without such."""
        found = (row.get(self.data.accuracy_name) for row in self.history)
        return [accuracy for accuracy in found if accuracy is not None]

    @property
    def quality_auc(self) -> float | None:
        return quality_auc(self.quality.mean(0), self.data)

    @property
    def noise(self) -> str:
        """The noise in words, with kind, rate asked for and share of labels really wrong."""
        config, wrong = self.config, f"{self.data.noise_rate:.1%} of the labels wrong"
        if not bool((self.data.true_labels >= 0).any()):
            wrong = "the right labels are not known"
        if config.noise in ("none", "file"):
            return f"{getattr(config, 'noise_set', '') or 'no noise added'}, {wrong}"
        drawn = {True: " (true class included)", False: " (true class excluded)"}
        how = drawn[config.include_true] if config.noise == "symmetric" else ""
        return f"{config.rate:.0%} {config.noise} noise{how}, {wrong}"

    @property
    def steps(self) -> int:
        return sum(row["steps"] for row in self.history)

    @property
    def seconds(self) -> float:
        """Training time only, without evaluation."""
        return sum(row["seconds"] for row in self.history)

    @property
    def seconds_per_step(self) -> float:
        return self.seconds / max(1, self.steps)


def train(
    config: TrainConfig,
    out: str | Path | None = None,
    *,
    model: Any = None,
    train_data: Any = None,
    test_data: Any = None,
    progress: bool = False,
    resume: bool = False,
) -> Result:
    """Train as `config` says, on the processes that `torchrun` has started or on this one.

    Args:
        config: every setting.
        out: folder for the config, a checkpoint after every epoch and `metrics.csv`; None writes
            nothing. A run that is there is replaced unless `resume`; see `check_free`.
        model: of a config whose model is "python": a module, of which each network of the recipe is
            a copy, or a function of in_channels and num_classes that makes one.
        train_data: of a config whose data set is "python", in one of three forms:

            - a pair of images (N, C, H, W), (N, H, W, C) or (N, H, W), uint8 or floating in [0, 1],
              and labels (N,), arrays or tensors, or a `TensorDataset` of both: held in memory;
            - a DataFrame with the columns label, and path, or image with files' bytes, Pillow's
              images or arrays;
            - a torch data set with a length, of pairs (image, label): images are tensors (C, H, W)
              or arrays (H, W, C), all of one size, or Pillow's, of any. It is read once before the
              run starts, and must give the same each time.

            Labels are whole numbers or names. Label quality belongs to samples by their position.
        test_data: the same to test on, if there is any.
        progress: show a progress bar.
        resume: continue from the checkpoint in `out`, if there is one. Only settings of `ANYTIME`
            may have changed.

    Ctrl-C ends the run early: the result has `interrupted` set and the epochs finished so far.

    Raises:
        ConfigError, OSError: the data set, the folder or the checkpoint cannot be used; another run
            is using the folder; the ranks' settings or data differ; the training set is not the one
            that the run to be resumed began with.
        FloatingPointError: a loss is not finite; the last checkpoint stays.
    """
    from .loop import Loop, launched  # which needs Fabric: reading a run back does not

    with ExitStack() as stack:
        stack.enter_context(_handed(config, model, train_data, test_data))
        fabric = stack.enter_context(launched(config))
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(config.threads)
        folder = None if out is None else prepare_folder(out)
        first = folder if fabric.is_global_zero else None
        if first is not None:
            stack.enter_context(locked(first))
        saved = checkpoint.load(folder) if folder is not None and resume else None
        if saved is not None:
            _check_resumed(config, saved)
        result = build(dataclasses.replace(config, device=str(fabric.device)))
        _check_ranks(config, result)
        if saved is not None:
            checkpoint.check_data(saved, result.fingerprint)
        _check_images(config, result.recipe.data)
        loop = Loop(fabric, result.config, result.recipe)
        # Networks start alike, what is drawn per sample does not.
        seed_everything(config.seed + 1_000_003 * fabric.global_rank)
        if saved is not None:
            loop.load_state_dict(saved)
            result.history = list(saved["history"])
        if first is not None:
            if saved is None:
                _remove_run(first)
            dataclasses.replace(result.config, device=config.device).write(first / CONFIG)
            record.write_record(first, config, result.data, result.config.device, RESOLVED)
        try:
            shown = progress and fabric.is_global_zero
            with _progress(result) if shown else nullcontext() as bar:
                _run(loop, result, first, bar, folder is not None)
        except KeyboardInterrupt:
            result.interrupted = True
        if not (result.interrupted and fabric.world_size > 1):  # the others may be elsewhere
            _collect(result)
        return result


def check_free(folder: str | Path, advice: str) -> None:
    """Raise FileExistsError with `advice` if there is a run in `folder`."""
    if any((Path(folder) / name).exists() for name in (CONFIG, METRICS, checkpoint.NAME)):
        raise FileExistsError(f"out: {folder} holds a run already; {advice}")


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def build(config: TrainConfig) -> Result:
    """The data set and the recipe of a run, before its first step."""
    ranks = distributed.size()
    if config.batch_size < 2 * ranks * config.accumulate:
        raise ConfigError(
            f"batch_size must be at least two for each of {ranks} processes and "
            f"{config.accumulate} passes (accumulate), got {config.batch_size}"
        )
    if config.folds and not config.fold:
        raise ConfigError(f"train takes one fold at a time, 1 to {config.folds}")
    data = read_data(config)
    if config.validation:
        data = data.with_validation(config.validation, config.seed)
    if config.folds:
        data = data.without(data.folds(config.folds, config.seed) == config.fold - 1)
    if len(data) < 2 * ranks:
        raise ConfigError(f"{data.name}: {len(data)} samples are too few for {ranks} processes")
    if data.noise_rate in (0.0, 1.0):
        what = "right: there is no noise to find" if data.noise_rate == 0 else "wrong"
        _warn(f"{data.name}: all labels are {what} (noise {config.noise})")
    if RECIPES[config.recipe].uses_quality and config.warmup >= config.epochs:
        what = f"never leaves its warm-up (warmup {config.warmup}, epochs {config.epochs})"
        _warn(f"{config.recipe} {what}")
    # Shuffled for good, so that a shard has all classes; on one process too, since the mixture's
    # fit depends on the order, and is to be the same on any number of ranks.
    order = torch.randperm(len(data), generator=generator(config.seed, "shards"))
    shard = data.select(order).shard(distributed.rank(), ranks)
    seed_everything(config.seed)
    config = dataclasses.replace(config, image_size=config.image_size or data.image_size[0])
    return Result(config, data, RECIPES[config.recipe](config, shard))


def read_data(config: TrainConfig) -> Dataset:
    """The data set with its noise, before any of it is kept apart."""
    data = DATASETS[config.dataset](config)
    if config.noise not in ("none", "file"):
        data = data.with_noise(
            config.noise, config.rate, seed=config.seed, include_true=config.include_true
        )
    if config.limit:
        classes = len(data.labels.unique())
        data = data.select(torch.arange(min(config.limit, len(data))))
        if lost := classes - len(data.labels.unique()):
            what = f"the first {config.limit} samples lack {lost} of {classes} classes (limit)"
            _warn(f"{data.name}: {what}")
    return data


def _warn(what: str) -> None:
    """Once, not on every rank."""
    if distributed.rank() == 0:
        warnings.warn(what, stacklevel=3)


def load_run(
    folder: str | Path,
    device: str = "cpu",
    *,
    model: Any = None,
    train_data: Any = None,
    test_data: Any = None,
) -> Result:
    """A run as its last checkpoint in `folder` has it, on one process. What `train` was handed is
    handed over again.

    Raises:
        CheckpointError: there is no checkpoint, it cannot be read, or its training set has changed.
        ConfigError: its data set is not where it was.
    """
    folder = Path(folder)
    saved = checkpoint.load(folder)
    if saved is None:
        raise CheckpointError(f"run must be a folder with a checkpoint, got {folder}")
    here = {"device": device, "pretrained": "", "sync_batchnorm": False}
    config = TrainConfig.read(**{**saved["config"], **here})
    with _handed(config, model, train_data, test_data):
        result = build(config)
    checkpoint.check_data(saved, result.fingerprint)
    recipe = result.recipe
    recipe.load_weights(saved)
    recipe.mixtures = saved["mixtures"]
    for name in ("quality", "losses", "history"):
        parts = [rank[name] for rank in saved["ranks"]]
        setattr(recipe, name, torch.cat(parts, -1).to(config.device))
    result.history = list(saved["history"])
    _collect(result)
    return result


def _handed(config: TrainConfig, model: Any, train_data: Any, test_data: Any) -> Any:
    settings = {"dataset": config.dataset, "model": config.model}
    return handed(settings, Handed(model, train_data, test_data))


def _run(loop: Loop, result: Result, first: Path | None, bar: Any, saves: bool) -> None:
    """All epochs that are left; `first` is rank 0's folder, `saves` whether there is one."""
    config, history = result.config, result.history
    board = _tensorboard(first, loop.epoch) if config.tensorboard and first is not None else None

    def save() -> None:
        state = {
            "config": dataclasses.asdict(config),
            "data": result.fingerprint,
            "history": history,
            **loop.state_dict(),
        }
        if first is not None:
            checkpoint.save(first, state)

    if bar is not None:
        for row in history:
            bar.epoch(row)
    while loop.epoch < config.epochs:
        for due in loop.steps():
            if bar is not None:
                bar.step(loop.epoch, loop.step)
            if due and saves:
                save()
        row = _evaluate(loop, result)
        history.append(row)
        loop.finish_epoch()
        if first is not None:  # before the checkpoint: what ends between them is done again
            write_csv(first / METRICS, history)
        if saves:
            save()
        if board is not None:
            given = {n: v for n, v in row.items() if n != "epoch" and v is not None}
            board.log_metrics(given, row["epoch"])
            board.save()
        if bar is not None:
            bar.epoch(row)


def _evaluate(loop: Loop, result: Result) -> dict[str, Any]:
    """The metrics of the epoch whose steps have been done."""
    config, recipe, data, epoch = result.config, result.recipe, result.recipe.data, loop.epoch
    last = epoch + 1 == config.epochs
    if last:
        recipe.fit_quality()
    hits = (recipe.predict(data.test_images).argmax(1) == data.test_labels).double()
    right = distributed.total(torch.stack([hits.sum(), hits.new_tensor(len(hits))]))
    accuracy = (right[0] / right[1]).item() if right[1] else None
    _collect(result)
    fitted = (recipe.uses_quality and epoch >= config.warmup) or last
    losses = loop.mean_losses()
    corrupt = [len(data.images.corrupt), len(data.test_images.corrupt)]
    return {
        "epoch": epoch,
        "lr": recipe.optimizers[0].param_groups[0]["lr"],
        "steps": loop.step,
        "seconds": loop.seconds,
        "train_loss": losses.pop("loss"),
        **losses,
        data.accuracy_name: accuracy,
        "quality_auc": result.quality_auc if fitted else None,
        "labeled_share": (result.quality > config.threshold).double().mean().item(),
        "noise_rate": result.data.noise_rate,
        "corrupt_images": sum(map(sum, distributed.gather(corrupt))),
        "best_accuracy": max([accuracy, *result.accuracies]) if accuracy is not None else None,
    }


def quality_auc(quality: Tensor, data: Dataset) -> float | None:
    """Area under the ROC curve of quality (N,) as a test for correct labels, over those whose truth
    is known; None if all or none of these are correct."""
    known = data.true_labels.cpu() >= 0
    clean = (data.labels == data.true_labels).cpu()[known]
    right, wrong = int(clean.sum()), int((~clean).sum())
    if not right or not wrong:
        return None
    _, place, counts = quality.cpu()[known].unique(return_inverse=True, return_counts=True)
    counts = counts.double()
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[place]  # from 1; ties share their mean
    return float((ranks[clean].sum() - right * (right + 1) / 2) / (right * wrong))


def _collect(result: Result) -> None:
    """Label quality and losses of all ranks, in the order of the data."""
    order = distributed.whole(result.recipe.data.index).argsort()
    result.quality = distributed.whole(result.recipe.quality)[:, order]
    result.losses = distributed.whole(result.recipe.losses)[:, order]


def _check_resumed(config: TrainConfig, saved: dict[str, Any]) -> None:
    checkpoint.check_ranks(saved)
    before = saved["config"]
    for name, value in dataclasses.asdict(config).items():
        given = value or name not in RESOLVED
        if given and name not in ANYTIME and before.get(name) != value:
            raise ConfigError(
                f"resume: {name} was {before.get(name)!r} when the run began and is {value!r} now"
            )


def _check_ranks(config: TrainConfig, result: Result) -> None:
    """Raise, on every rank, if two were started with other settings or read other data."""
    if distributed.size() == 1:  # then the data are read only for a checkpoint
        return
    own = {name: v for name, v in dataclasses.asdict(config).items() if name not in PER_RANK}
    first, *others = distributed.gather((own, result.fingerprint))
    for rank, other in enumerate(others, 1):
        for before, here in zip(first, other, strict=True):
            odd = [name for name in before if before[name] != here[name]]
            if odd:
                raise ConfigError(
                    f"all ranks must have the same settings and data, but {odd[0]} is "
                    f"{before[odd[0]]!r} on rank 0 and {here[odd[0]]!r} on rank {rank}"
                )


def _check_images(config: TrainConfig, data: Dataset) -> None:
    """Raise, on every rank, if too many of a sample of the images cannot be read."""
    for what, images in (("training", data.images), ("test", data.test_images)):
        found = distributed.gather(unreadable(images, LOOKED_AT))
        looked_at = sum(number for number, _ in found)
        faults = [fault for _, own in found for fault in own]
        if len(faults) > config.max_unreadable * looked_at:
            named = "; ".join(f"{path}: {reason}" for path, reason in faults[:3])
            raise DataError(
                f"{len(faults)} of {looked_at} {what} images looked at cannot be read "
                f"(max_unreadable is {config.max_unreadable:g} of them): {named}"
            )


def _remove_run(folder: Path) -> None:
    """Remove what an earlier run has left in the folder, and nothing else."""
    remove_partial(folder)
    for name in LEFT:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _tensorboard(folder: Path, epoch: int) -> Any:
    with extra():
        import tensorboard  # noqa: F401
        from lightning_fabric.loggers.tensorboard import TensorBoardLogger
    return TensorBoardLogger(folder, "", "tensorboard", purge_step=epoch)


def _progress(result: Result) -> Any:
    from .progress import RunProgress

    print(f"{result.data.name}: {len(result.data)} training samples, {result.noise}")
    return RunProgress(f"{result.config.recipe} (seed {result.config.seed})", result.config.epochs)
