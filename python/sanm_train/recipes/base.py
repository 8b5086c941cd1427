"""The recipe interface: networks, optimisers, label quality, and the steps of an epoch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

import sanm_kernels as sk

from .. import distributed
from ..augment import Augment
from ..checkpoint import load_module
from ..config import VIEWS, TrainConfig
from ..data import Dataset, batches, generator
from ..decoders import DECODERS
from ..images import Images
from ..models import build_model
from ..optimizers import OPTIMIZERS, averaged
from ..pretrained import load_pretrained
from ..registry import Registry
from ..sanm import SANM, Batch, Criterion

RECIPES: Registry[type[Recipe]] = Registry("recipe")
Losses = dict[str, Tensor]
HISTORY = 5  # epochs whose losses `average_losses` averages, as DivideMix does at 90 % noise


def register(
    name: str, config: type[TrainConfig] | None = None
) -> Callable[[type[Recipe]], type[Recipe]]:
    """Class decorator: make a recipe known to `TrainConfig(recipe=name)` and `--recipe name`.

    Args:
        config: its own settings, a frozen dataclass that extends `TrainConfig`.

    Raises:
        TypeError: what it decorates is no subclass of `Recipe`.
        ValueError: another recipe has that name. (Running the same definition again, as in a
            notebook, replaces it.)
    """

    def add(recipe: type[Recipe]) -> type[Recipe]:
        if not (isinstance(recipe, type) and issubclass(recipe, Recipe)):
            raise TypeError(f"register({name!r}): expected a subclass of Recipe, got {recipe!r}")
        return RECIPES.register(name, config)(recipe)

    return add


class Step(NamedTuple):
    """One step of the optimiser: the network's number, and for each of the backward passes that
    the step is divided into the samples' rows (B,) in this rank's data, on the CPU."""

    network: int
    passes: Sequence[Tensor]


class Recipe:
    """One training method. An ordinary one overrides `loss`, others `plan` as well.

    ::

        @register("smooth")
        class Smooth(Recipe):
            def loss(self, network, batch, epoch):
                logits = network(self.augment.weak(batch.images))
                return {"loss": F.cross_entropy(logits, batch.targets, label_smoothing=0.1)}

    Attributes: config; data, this rank's shard; augment; generator (draws of the masking) and
    order (draws of `plan`); networks, their optimizers, with `ema` the averages of their weights,
    and whether they take images in channels_last; quality (networks, N), each network's clean
    probability of every sample in data, 1 until `fit_quality` is called; losses (networks, N) and
    mixtures (networks, 3, 2), means, variances and weights, that it comes from.
    """

    num_networks = 1
    masking = False  # builds the decoders
    uses_quality = False  # fits the label quality after the warm-up
    #: A method (self, logits, targets, rows, view) -> (B,), which the images and their masked views
    #: are trained with. None is cross-entropy.
    criterion: Criterion | None = None
    #: Attributes that hold tensors with an entry per sample, to be saved in checkpoints.
    persistent: tuple[str, ...] = ("quality", "losses", "history")

    def __init__(self, config: TrainConfig, data: Dataset) -> None:
        self.config, self.data = config, data
        self.augment = Augment(config.augmentation, data.mean, data.std, data.image_size)
        #: Views that are trained on in place of the masked ones, where nothing is to be hidden.
        self.plain_views = len(VIEWS[config.views]) if config.box == "none" else 0
        self.networks = [self._build_network() for _ in range(self.num_networks)]
        self.channels_last = config.channels_last and not _spoils_memory(self.networks[0])
        if self.channels_last:
            for network in self.networks:
                network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if config.pretrained:
            load_pretrained(config.pretrained, [network.model for network in self.networks])
        self.optimizers = [
            OPTIMIZERS[config.optimizer](config, network.parameters()) for network in self.networks
        ]
        self.averages = [averaged(net, config.ema) for net in self.networks if config.ema]
        self.generator = generator(config.seed, "masking", distributed.rank())
        self.order = generator(config.seed, "order", distributed.rank())
        shape = (self.num_networks, len(data))
        self.quality = torch.ones(shape, device=data.labels.device)
        self.losses = torch.zeros(shape, device=data.labels.device)
        self.history = self.losses.new_zeros(0, *shape)
        self.mixtures = torch.full((self.num_networks, 3, 2), float("nan"), dtype=torch.float64)
        #: Samples of all ranks, and this rank's share of a batch in one backward pass.
        self.total = int(self._total(len(data)))
        self.share = config.batch_size // (data.shards * config.accumulate)

    def loss(self, network: SANM, batch: Batch, epoch: float) -> Losses:
        """The value to minimise as "loss", and any others to log, from images in [0, 1].

        The mean of `criterion` on weakly augmented images; with `masking` and after the warm-up,
        SANM's losses, or those of as many `plain_views`.
        """
        images, masks = batch.images, self.masking and epoch >= self.config.warmup
        batch = batch._replace(images=self.augment.weak(images))
        if masks and not self.plain_views:
            losses = network.losses(batch, self.generator, self.criterion)
            return {
                "loss": losses.total,
                "labeled": losses.sample_loss.mean(),
                "reconstruction": losses.reconstruction,
            }
        logits = [network(batch.images)]
        if masks:  # in a pass of their own, as masked ones are
            views = torch.cat([self.augment.weak(images) for _ in range(self.plain_views)])
            logits += network(views).chunk(self.plain_views)
        if self.criterion is None:
            parts = [F.cross_entropy(z, batch.targets) for z in logits]
            return {"loss": torch.stack(parts).mean()}
        targets = F.one_hot(batch.targets, logits[0].shape[1]).to(logits[0].dtype)
        assert batch.row is not None  # the loop always says which samples these are
        names = ["image"] + ["plain"] * (len(logits) - 1)
        parts = [
            self.criterion(z, targets, batch.row, name).mean()
            for z, name in zip(logits, names, strict=True)
        ]
        labeled = F.cross_entropy(logits[0].detach(), batch.targets)
        return {"loss": torch.stack(parts).mean(), "labeled": labeled}

    def begin_epoch(self, epoch: int) -> None:
        """What precedes the steps of an epoch: after the warm-up, the label quality is refitted."""
        if self.uses_quality and epoch >= self.config.warmup:
            self.fit_quality()

    def plan(self, epoch: int) -> list[Step]:
        """The steps of an epoch, as many on every rank; draws from `order` alone."""
        return [step for k in range(self.num_networks) for step in self.steps_over_all(k)]

    def steps_over_all(self, k: int) -> list[Step]:
        """Steps that show network k every sample once, in batches as equal as can be."""
        rows = torch.arange(len(self.data))
        return self.steps(k, batches(rows, self.passes(self.total), self.order))

    def steps(self, k: int, passes: Sequence[Tensor]) -> list[Step]:
        """Steps of network k, of `accumulate` of the passes (rows (B,) each) or what is left."""
        size = self.config.accumulate
        return [Step(k, passes[i : i + size]) for i in range(0, len(passes), size)]

    def passes(self, samples: int, size: int | None = None) -> int:
        """Backward passes, of each rank, over `samples` of all ranks, `size` (default: the batch
        size) for one step of the optimiser."""
        steps = max(1, round(samples / (size or self.config.batch_size)))
        most = max(1, samples // (2 * self.data.shards))  # two samples each, for batch norm
        return min(steps * self.config.accumulate, most)

    def clean_prob(self, k: int) -> Tensor:
        """The clean probability (N,) that batches for network k carry."""
        return self.quality[k]

    def clip(self, epoch: int) -> float:
        """The norm that gradients are clipped to; 0 leaves them."""
        return self.config.clip

    def fit_quality(self) -> None:
        """Refit `quality` (networks, N) to the networks' losses on the given labels (section 6)."""
        logits = [self.evaluate(network, self.data.images) for network in self.networks]
        self.losses = torch.stack([sk.sample_loss(z, self.data.labels) for z in logits])
        # The losses of all epochs, the present one last; `history` only of those to be averaged.
        kept = HISTORY if self.config.average_losses else 1
        self.history = torch.cat([self.history, self.losses[None]])[-kept:]
        group = distributed.group()
        # The CPU backend's histogram is 1e-5 off: not the same split on one rank and on several.
        backend = "reference" if self.losses.device.type == "cpu" and group is None else None
        for k, losses in enumerate(self.losses):
            finite = torch.isfinite(losses).all().float()
            if not bool(distributed.least(finite)):
                raise FloatingPointError(f"network {k + 1} gives losses that are not finite")
            past = self.history[:-1, k]
            fit = sk.fit_label_quality(
                losses,
                seed=self.config.seed,
                history=past if len(past) else None,
                process_group=group,
                backend=backend,
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
            self.mixtures[k] = mixture_of(fit)

    @torch.no_grad()
    def evaluate(self, network: SANM, images: Images) -> Tensor:
        """Logits (N, K), float32, of all `images` in eval mode."""
        network.eval()
        distributed.same_buffers(network)
        if not len(images):
            return torch.zeros(0, self.data.num_classes, device=self.data.labels.device)
        stream = images.stream(self.eval_batches(images))
        with self.config.autocast():
            return torch.cat([network(self.augment.plain(part)).float() for part in stream])

    def eval_batches(self, images: Images) -> tuple[Tensor, ...]:
        """The positions of all `images` in batches for evaluation."""
        size = self.config.eval_batch_size or (1024 if images.paths is None else 128)
        return torch.arange(len(images)).split(size)

    @property
    def tested(self) -> list[SANM]:
        """The networks that are tested, shown and exported; with `ema` the averages."""
        return [cast(SANM, average.module) for average in self.averages] or self.networks

    def predict(self, images: Images) -> Tensor:
        """Logits (N, K) of `images`, averaged over the tested networks."""
        return torch.stack([self.evaluate(net, images) for net in self.tested]).mean(0)

    def load_weights(self, saved: Mapping[str, Any]) -> None:
        """Networks and averages as a checkpoint has them."""
        for ours, theirs in ((self.networks, "networks"), (self.averages, "averages")):
            for module, state in zip(ours, saved[theirs], strict=True):
                load_module(module, state)

    def _total(self, number: int) -> Tensor:
        """The sum of `number` over the ranks."""
        return distributed.total(torch.tensor(number, device=self.data.labels.device))

    def _build_network(self) -> SANM:
        config, data = self.config, self.data
        channels, *_ = data.image_shape
        model = build_model(config, channels, data.num_classes, data.image_size)
        network = SANM(
            model.to(data.labels.device),
            config.feature_layer or None,
            decoder=DECODERS[config.decoder],
            config=config.mask_config,
            image_shape=data.image_shape if self.masking and not self.plain_views else None,
            random_box=config.box == "random",
            modulate=config.modulate,
        )
        return network


def mixture_of(fit: sk.LabelQuality) -> Tensor:
    """The means, variances and weights of both components in one tensor (3, 2)."""
    return torch.stack([fit.means, fit.variances, fit.weights])


def _spoils_memory(network: torch.nn.Module) -> bool:
    """Whether torch's convolutions on the CPU (2.13, oneDNN) would write past their memory: in
    channels_last, on several threads, back through strided 1×1 ones of fewer than 16 channels."""
    return any(
        m.in_channels < 16 and m.kernel_size == (1, 1) and m.stride != (1, 1)
        for m in network.modules()
        if isinstance(m, torch.nn.Conv2d) and m.weight.device.type == "cpu"
    )
