"""The recipe interface: networks, optimisers, label quality and one epoch of training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import sanm_kernels as sk

from ..augment import Augment
from ..data import Dataset, batches
from ..models import build_model
from ..pretrained import load_pretrained
from ..sanm import SANM, Batch

if TYPE_CHECKING:
    from ..config import TrainConfig

RECIPES: dict[str, type[Recipe]] = {}
Losses = dict[str, Tensor]


def register(name: str) -> Callable[[type[Recipe]], type[Recipe]]:
    """Class decorator: make a recipe known to `TrainConfig(recipe=name)` and `--recipe name`.

    Raises:
        TypeError: what it decorates is no subclass of `Recipe`.
        ValueError: another recipe has that name. (Running the same definition again, as in a
            notebook, replaces it.)
    """

    def add(recipe: type[Recipe]) -> type[Recipe]:
        if not (isinstance(recipe, type) and issubclass(recipe, Recipe)):
            raise TypeError(f"register({name!r}): expected a subclass of Recipe, got {recipe!r}")
        known = RECIPES.get(name, recipe)
        if (known.__module__, known.__qualname__) != (recipe.__module__, recipe.__qualname__):
            raise ValueError(f"register({name!r}): {known.__qualname__} has that name already")
        RECIPES[name] = recipe
        return recipe

    return add


class Recipe:
    """One training method. An ordinary one overrides `loss`, others `train_epoch`.

    ::

        @register("smooth")
        class Smooth(Recipe):
            def loss(self, network, batch, epoch):
                logits = network(self.augment.weak(batch.images))
                return {"loss": F.cross_entropy(logits, batch.targets, label_smoothing=0.1)}

    Attributes: config; data; augment; generator (all draws of order and augmentation); networks
    and their optimizers; quality (networks, N), each network's clean probability of every training
    sample, 1 until `fit_quality` is called.
    """

    num_networks = 1
    masking = False  # builds the decoders
    uses_quality = False  # fits the label quality after the warm-up

    def __init__(self, config: TrainConfig, data: Dataset, generator: torch.Generator) -> None:
        self.config, self.data, self.generator = config, data, generator
        mean, std = data.statistics
        self.augment = Augment(
            mean, std, flip=data.flip, background=data.background, generator=generator
        )
        self.networks = [self._build_network() for _ in range(self.num_networks)]
        if config.pretrained:
            load_pretrained(config.pretrained, [network.model for network in self.networks])
        self.optimizers = [
            torch.optim.SGD(
                network.parameters(),
                lr=config.lr,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
            )
            for network in self.networks
        ]
        shape = (self.num_networks, len(data))
        self.quality = torch.ones(shape, device=data.images.device)
        self.losses = torch.zeros(shape, device=data.images.device)
        self._history: list[Tensor] = []

    @classmethod
    def check(cls, config: TrainConfig) -> None:
        """Raise a ConfigError for settings this recipe cannot be run with; called before a run."""

    def loss(self, network: SANM, batch: Batch, epoch: int) -> Losses:
        """The value to minimise as "loss", and any others to log, from images in [0, 1]."""
        raise NotImplementedError

    def train_epoch(self, epoch: int) -> Iterator[Losses]:
        """Train every network for one epoch; yields each step's losses (0-d tensors)."""
        if self.uses_quality and epoch >= self.config.warmup:
            self.fit_quality()
        for k in range(self.num_networks):
            yield from self.train_all(k, lambda network, batch: self.loss(network, batch, epoch))

    def train_all(
        self, k: int, loss: Callable[[SANM, Batch], Losses], clip: float | None = None
    ) -> Iterator[Losses]:
        """One pass of network k over all training samples, minimising `loss(network, batch)`."""
        self.networks[k].train()
        for index in batches(torch.arange(len(self.data)), self.config.batch_size, self.generator):
            batch = self.data.take(index, self.quality[k])
            yield self.step(k, loss(self.networks[k], batch), clip)

    def step(self, k: int, losses: Losses, clip: float | None = None) -> Losses:
        """One optimiser step of network k on losses["loss"]; gradients clipped to norm `clip`."""
        optimizer = self.optimizers[k]
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(self.networks[k].parameters(), clip)
        optimizer.step()
        return {name: value.detach() for name, value in losses.items()}

    def fit_quality(self) -> None:
        """Refit `quality` (networks, N) to the networks' losses on the given labels (section 6)."""
        logits = [self.evaluate(network, self.data.images) for network in self.networks]
        self.losses = torch.stack([sk.sample_loss(z, self.data.labels) for z in logits])
        self._history = [*self._history[-4:], self.losses]
        for k, losses in enumerate(self.losses):
            past = torch.stack([past[k] for past in self._history])[:-1]
            use_past = self.config.average_losses and len(past) > 0
            if not bool(torch.isfinite(losses).all()):
                raise FloatingPointError(f"network {k + 1} gives losses that are not finite")
            fit = sk.fit_label_quality(
                losses, seed=self.config.seed, history=past if use_past else None
            )
            if bool(fit.degenerate):
                warnings.warn(
                    f"network {k + 1}: the losses do not fall into two groups; "
                    "all labels count as clean for now",
                    stacklevel=2,
                )
                self.quality[k] = 1.0
            else:
                self.quality[k] = fit.clean_prob.to(self.quality)

    @torch.no_grad()
    def evaluate(self, network: SANM, images: Tensor, size: int = 1024) -> Tensor:
        """Logits (N, K) in eval mode of images (N, C, H, W) in [0, 1]."""
        network.eval()
        parts = torch.split(images, size)
        return torch.cat([network(self.augment.normalize(part)) for part in parts])

    def predict(self, images: Tensor) -> Tensor:
        """Logits (N, K) of images in [0, 1], averaged over the networks."""
        return torch.stack([self.evaluate(net, images) for net in self.networks]).mean(0)

    def _build_network(self) -> SANM:
        config, data = self.config, self.data
        model = build_model(config.model or data.model, data.image_shape[0], data.num_classes)
        network = SANM(
            model.to(data.images.device),
            config=config.mask_config,
            image_shape=data.image_shape if self.masking else None,
            random_box=config.box == "random",
            modulate=config.modulate,
        )
        # channels_last is the faster layout for convolutions.
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return network
