"""A run on Lightning Fabric: its processes, its steps, and the state that it resumes from."""

from __future__ import annotations

import logging
import math
import os
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import distributed
from .config import TrainConfig
from .errors import ConfigError
from .extra import extra
from .files import first_line
from .optimizers import learning_rate
from .recipes import RECIPES, Recipe
from .recipes.base import Losses
from .sanm import SANM, Batch

with extra():
    from lightning_fabric import Fabric
    from lightning_fabric.plugins import MixedPrecision
    from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
    from lightning_fabric.strategies.ddp import DDPStrategy
    from lightning_fabric.utilities.exceptions import MisconfigurationException

logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # not what hardware it found
LOOK_EVERY = 50  # steps between two looks at the loss, where a look waits for the device
MIXED = {"bfloat16": "bf16-mixed", "float16": "16-mixed"}


class Autocast(MixedPrecision):
    """Images and label quality keep their precision: autocast lowers what networks do to them."""

    def convert_input(self, data: Any) -> Any:
        return data


class LossModule(nn.Module):
    """A network whose forward is its recipe's loss: DistributedDataParallel sees one forward."""

    def __init__(self, recipe: Recipe, network: SANM) -> None:
        super().__init__()
        self.recipe, self.network = recipe, network

    def forward(self, batch: Batch, epoch: float) -> Losses:
        return self.recipe.loss(self.network, batch, epoch)


@contextmanager
def launched(config: TrainConfig) -> Iterator[Fabric]:
    """Fabric on the processes that `torchrun` has started, or on this one.

    A process group that is there already is used and left as it is.

    Raises:
        ConfigError: there is no such device for each process.
    """
    ranks, here = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    kind, _, index = config.device.partition(":")
    cluster = DDPStrategy(
        cluster_environment=TorchElasticEnvironment(),
        # Objects and the CPU's numbers travel as well.
        process_group_backend="cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
        find_unused_parameters=RECIPES[config.recipe].masking,  # the warm-up leaves the decoder
    )
    mixed = MIXED.get(config.precision)
    try:
        fabric = Fabric(
            accelerator=kind,
            devices=here if ranks > 1 else [int(index)] if index and kind != "cpu" else 1,
            num_nodes=ranks // here,
            strategy=cluster if ranks > 1 else "auto",
            plugins=[Autocast(mixed, kind)] if mixed else [],  # type: ignore[arg-type]
        )
    except (MisconfigurationException, RuntimeError, ValueError) as error:
        reason = first_line(error)
        raise ConfigError(f"device must be usable, got {config.device!r}: {reason}") from None
    own = not dist.is_initialized()
    try:
        fabric.launch()
        if fabric.world_size != distributed.size():
            raise ConfigError(
                f"{distributed.size()} processes must be started by torchrun: WORLD_SIZE is {ranks}"
            )
        yield fabric
    finally:
        if own and dist.is_initialized():
            dist.destroy_process_group()
            # Gloo's threads may still let go of the last call's tensors, for which they need the
            # interpreter: one that ends meanwhile takes the process down with it.
            time.sleep(0.3)


class Loop:
    """Trains `recipe`, epoch by epoch.

    Attributes: epoch and step, of the optimiser, that come next; sums, the epoch's losses so far,
    and counts, how many backward passes each sums; seconds of training in the epoch.
    """

    def __init__(self, fabric: Fabric, config: TrainConfig, recipe: Recipe) -> None:
        self.fabric, self.config, self.recipe = fabric, config, recipe
        self.modules, self.optimizers = [], []
        for network, plain in zip(recipe.networks, recipe.optimizers, strict=True):
            if config.sync_batchnorm:
                nn.SyncBatchNorm.convert_sync_batchnorm(network)
            if config.compile:
                network.model.compile()
            module, optimizer = fabric.setup(LossModule(recipe, network), plain)
            self.modules.append(module)
            self.optimizers.append(optimizer)
        self.epoch = self.step = 0
        self.sums: dict[str, Tensor] = {}
        self.counts: Counter[str] = Counter()
        self.seconds = 0.0
        self.before_plan = recipe.order.get_state()

    def steps(self) -> Iterator[bool]:
        """Do what is left of the present epoch; gives after each step whether a checkpoint is due
        (every `checkpoint_steps`, but not after the last)."""
        recipe, config = self.recipe, self.config
        if self.step == 0:
            self.sums, self.counts, self.seconds = {}, Counter(), 0.0
            recipe.begin_epoch(self.epoch)
        self.before_plan = recipe.order.get_state()  # from which a resumed run plans the same steps
        plan = recipe.plan(self.epoch)
        passes = Counter(step.network for step in plan for _ in step.passes)
        done = Counter(step.network for step in plan[: self.step] for _ in step.passes)
        todo, started = plan[self.step :], time.perf_counter() - self.seconds
        images = recipe.data.images.stream(rows for step in todo for rows in step.passes)
        for k, parts in todo:
            module = self.modules[k]
            recipe.networks[k].train()
            for group in recipe.optimizers[k].param_groups:
                group["lr"] = learning_rate(config, self.epoch + done[k] / passes[k])
            for number, rows in enumerate(parts, 1):
                batch, epoch = self._batch(k, rows, next(images)), self.epoch + done[k] / passes[k]
                with self.fabric.no_backward_sync(module, enabled=number < len(parts)):
                    losses: Losses = module(batch, epoch)
                    self.fabric.backward(losses["loss"] / len(parts))
                for name, value in losses.items():
                    self.sums[name] = self.sums.get(name, 0) + value.detach().float()
                self.counts.update(losses.keys())
                done[k] += 1
            self._update(k)
            self.step += 1
            ends = self.step == len(plan)
            due = config.checkpoint_steps and self.step % config.checkpoint_steps == 0 and not ends
            # before a checkpoint too: the last good one must not make way for a bad one
            if due or ends or self.step % LOOK_EVERY == 0:
                self._check_loss()
            self.seconds = time.perf_counter() - started
            yield bool(due)

    def finish_epoch(self) -> None:
        self.epoch, self.step = self.epoch + 1, 0
        self.before_plan = self.recipe.order.get_state()

    def mean_losses(self) -> dict[str, float]:
        """The epoch's mean losses over all ranks, each over the passes that have it."""
        sums = distributed.total(torch.stack(list(self.sums.values()))).tolist()
        ranks = distributed.size()
        return {n: s / (self.counts[n] * ranks) for n, s in zip(self.sums, sums, strict=True)}

    def _batch(self, k: int, rows: Tensor, images: Tensor) -> Batch:
        recipe, data = self.recipe, self.recipe.data
        there = rows.to(data.labels.device, non_blocking=True)
        if recipe.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        quality = recipe.clean_prob(k)[there]
        return Batch(images, data.labels[there], quality, data.index[there], there)

    def _update(self, k: int) -> None:
        module, optimizer, norm = self.modules[k], self.optimizers[k], self.recipe.clip(self.epoch)
        if norm:
            self.fabric.clip_gradients(module, optimizer, max_norm=norm, error_if_nonfinite=False)
        optimizer.step()
        optimizer.zero_grad()
        if self.recipe.averages:
            self.recipe.averages[k].update_parameters(self.recipe.networks[k])

    def _check_loss(self) -> None:
        loss = distributed.total(self.sums["loss"]).item()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"epoch {self.epoch}, step {self.step}: the training loss is {loss}"
            )

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to resume: tensors, numbers and strings; the same on all ranks."""
        recipe = self.recipe
        own = {name: getattr(recipe, name).cpu() for name in recipe.persistent}
        own["random"] = random_states(self.fabric.device)
        own["masking"] = recipe.generator.get_state()
        own["order"] = self.before_plan
        own["counts"] = dict(self.counts)
        own["sums"] = {name: value.cpu() for name, value in self.sums.items()}
        own["corrupt"] = sorted(recipe.data.images.corrupt)
        return {
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "networks": [network.state_dict() for network in recipe.networks],
            "averages": [average.state_dict() for average in recipe.averages],
            "optimizers": [optimizer.state_dict() for optimizer in recipe.optimizers],
            "scaler": self.fabric.strategy.precision.state_dict(),
            "mixtures": recipe.mixtures,
            "ranks": distributed.gather(own),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        recipe, own = self.recipe, state["ranks"][distributed.rank()]
        self.epoch, self.step, self.seconds = state["epoch"], state["step"], state["seconds"]
        recipe.load_weights(state)
        for optimizer, saved in zip(recipe.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.fabric.strategy.precision.load_state_dict(state["scaler"])
        recipe.mixtures = state["mixtures"]
        for name in recipe.persistent:
            setattr(recipe, name, own[name].to(getattr(recipe, name).device))
        recipe.generator.set_state(own["masking"])
        recipe.order.set_state(own["order"])
        self.sums = {name: value.to(self.fabric.device) for name, value in own["sums"].items()}
        self.counts = Counter(own["counts"])
        recipe.data.images.corrupt.update(own["corrupt"])
        set_random_states(own["random"], self.fabric.device)


def random_states(device: torch.device) -> dict[str, Any]:
    """The state of every global source of draws, without NumPy's arrays."""
    numpy: Any = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": (numpy[0], numpy[1].tolist(), *numpy[2:]),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
