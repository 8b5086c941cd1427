"""The engine: runs a recipe's steps on one process or on many, and knows its whole state."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import distributed
from .config import TrainConfig
from .recipes import Recipe
from .recipes.base import Losses
from .sanm import SANM, Batch

LOOK_EVERY = 50  # steps between two looks at the loss, where a look waits for the device


class LossModule(nn.Module):
    """A network whose forward is its recipe's loss: DistributedDataParallel sees one forward."""

    def __init__(self, recipe: Recipe, network: SANM) -> None:
        super().__init__()
        self.recipe, self.network = recipe, network

    def forward(self, batch: Batch, epoch: float) -> Losses:
        return self.recipe.loss(self.network, batch, epoch)


class Engine:
    """Trains `recipe`, epoch by epoch.

    Attributes: epoch and step, the next backward pass; sums, the epoch's losses so far, and counts,
    how many passes each stands for; seconds of training in the epoch.
    """

    def __init__(self, config: TrainConfig, recipe: Recipe, device: torch.device) -> None:
        self.config, self.recipe, self.device = config, recipe, device
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
        self.modules = [self._module(network) for network in recipe.networks]
        self.epoch = self.step = 0
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.seconds = 0.0
        self._plan_state = recipe.order.get_state()

    def _module(self, network: SANM) -> nn.Module:
        if self.config.sync_batchnorm:
            nn.SyncBatchNorm.convert_sync_batchnorm(network)
        if self.config.compile:
            network.model.compile()
        module = LossModule(self.recipe, network)
        if distributed.size() == 1:
            return module
        # The warm-up leaves the decoder unused.
        return DistributedDataParallel(module, find_unused_parameters=self.recipe.masking)

    def train_epoch(self, on_step: Callable[[int], None], on_checkpoint: Callable[[], None]) -> int:
        """The rest of the present epoch; returns its number of backward passes.

        on_step gets the number of passes done; on_checkpoint is called every `checkpoint_steps`.
        """
        recipe, config = self.recipe, self.config
        states = None
        if self.step:  # the steps are planned as before; then all draws go on where they were
            states = random_states(recipe, self.device)
            recipe.order.set_state(self._plan_state)
        else:
            self.sums, self.counts, self.seconds = {}, {}, 0.0
            recipe.begin_epoch(self.epoch)
            self._plan_state = recipe.order.get_state()
        plan = recipe.plan(self.epoch)
        if states is not None:
            set_random_states(states, recipe, self.device)
        passes = [sum(step.network == k for step in plan) for k in range(recipe.num_networks)]
        done = [sum(s.network == k for s in plan[: self.step]) for k in range(recipe.num_networks)]
        rate = config.lr * (0.1 if self.epoch >= config.lr_drop * config.epochs else 1.0)
        for optimizer in recipe.optimizers:
            for parameters in optimizer.param_groups:
                parameters["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
        todo = plan[self.step :]
        start, before, pending = time.perf_counter(), self.seconds, 0
        stream = recipe.data.images.stream(step.rows for step in todo)
        for (k, rows), images in zip(todo, stream, strict=True):
            pending += 1
            follows = plan[self.step + 1].network if self.step + 1 < len(plan) else -1
            update = pending == config.accumulate or follows != k
            losses = self._backward(k, rows, images, self.epoch + done[k] / passes[k], update)
            if update:
                self._update(k)
                pending = 0
            for name, value in losses.items():
                self.sums[name] = self.sums.get(name, 0) + value.detach().float()
                self.counts[name] = self.counts.get(name, 0) + 1
            done[k] += 1
            self.step += 1
            self.seconds = before + time.perf_counter() - start
            on_step(self.step)
            every = config.checkpoint_steps
            saves = every and update and self.step % every < config.accumulate and follows >= 0
            # before a checkpoint too: the last good one must not make way for a bad one
            if saves or self.step % LOOK_EVERY == 0 or self.step == len(plan):
                self._check_loss()
            if saves:
                on_checkpoint()
        return len(plan)

    def finish_epoch(self) -> None:
        self.epoch, self.step = self.epoch + 1, 0

    def mean_losses(self) -> dict[str, float]:
        """The epoch's mean losses over all ranks, each over the passes that have it."""
        sums = distributed.total(torch.stack(list(self.sums.values()))).tolist()
        ranks = distributed.size()
        return {n: s / (self.counts[n] * ranks) for n, s in zip(self.sums, sums, strict=True)}

    def _backward(self, k: int, rows: Tensor, images: Tensor, epoch: float, update: bool) -> Losses:
        recipe, module, data = self.recipe, self.modules[k], self.recipe.data
        there = rows.to(data.labels.device, non_blocking=True)
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        samples = (data.labels[there], recipe.clean_prob(k)[there], data.index[there], there)
        batch = Batch(images, *samples)
        module.train()
        alone = isinstance(module, DistributedDataParallel) and not update
        with cast(DistributedDataParallel, module).no_sync() if alone else nullcontext():
            with self.config.autocast():
                losses: Losses = module(batch, epoch)
            self.scaler.scale(losses["loss"] / self.config.accumulate).backward()
        return losses

    def _update(self, k: int) -> None:
        optimizer, norm = self.recipe.optimizers[k], self.recipe.clip(self.epoch)
        if norm:
            self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(self.modules[k].parameters(), norm)
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)

    def _check_loss(self) -> None:
        loss = distributed.total(self.sums["loss"]).item()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"epoch {self.epoch}, step {self.step}: the training loss is {loss}"
            )

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to go on, of tensors, numbers and strings; the same on all ranks."""
        recipe = self.recipe
        own = {name: getattr(recipe, name).cpu() for name in recipe.persistent}
        own["random"] = random_states(recipe, self.device)
        own["plan"] = self._plan_state
        own["counts"] = self.counts
        own["sums"] = {name: value.cpu() for name, value in self.sums.items()}
        own["corrupt"] = sorted(recipe.data.images.corrupt)
        return {
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "networks": [network.state_dict() for network in recipe.networks],
            "optimizers": [optimizer.state_dict() for optimizer in recipe.optimizers],
            "scaler": self.scaler.state_dict(),
            "mixtures": recipe.mixtures,
            "ranks": distributed.gather(own),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        recipe, own = self.recipe, state["ranks"][distributed.rank()]
        self.epoch, self.step, self.seconds = state["epoch"], state["step"], state["seconds"]
        for network, saved in zip(recipe.networks, state["networks"], strict=True):
            network.load_state_dict(saved)
        for optimizer, saved in zip(recipe.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.scaler.load_state_dict(state["scaler"])
        recipe.mixtures = state["mixtures"]
        for name in recipe.persistent:
            setattr(recipe, name, own[name].to(getattr(recipe, name).device))
        self._plan_state = own["plan"]
        self.sums = {name: value.to(self.device) for name, value in own["sums"].items()}
        recipe.data.images.corrupt.update(own["corrupt"])
        self.counts = dict(own["counts"])
        set_random_states(own["random"], recipe, self.device)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_states(recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """The state of every source of draws, without NumPy's arrays."""
    numpy = np.random.get_state(legacy=False)
    states = {
        "python": random.getstate(),
        "numpy": {**numpy, "state": {**numpy["state"], "key": numpy["state"]["key"].tolist()}},
        "torch": torch.get_rng_state(),
        "generator": recipe.generator.get_state(),
        "order": recipe.order.get_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: Mapping[str, Any], recipe: Recipe, device: torch.device) -> None:
    random.setstate(states["python"])
    numpy = states["numpy"]
    key = np.array(numpy["state"]["key"], dtype=np.uint32)
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": key}})
    torch.set_rng_state(states["torch"])
    recipe.generator.set_state(states["generator"])
    recipe.order.set_state(states["order"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
