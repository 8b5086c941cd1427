"""A data set: labels and clean probabilities are attached to images by index."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .errors import ConfigError
from .images import Images, TensorImages, digest
from .noise import add_noise

#: Of a channel's pixels in [0, 1]: divided by less, what pads the images would be huge.
LEAST_STD = 0.01


@dataclass(frozen=True)
class Dataset:
    """Training and test images with integer labels (N,) on the images' device.

    labels are the given, possibly wrong ones; true_labels what is known to be right, −1 where
    nothing is. There may be no test images; with `test_noisy` they are a share of the training set,
    with its noisy labels. mean and std are the pixels' (C,). image_size (H, W) is what augmentation
    cuts the images to. index (N,) are the samples' positions in the training set as it was read, of
    which this may be one of several `shards`.
    """

    name: str
    images: Images
    labels: Tensor
    true_labels: Tensor
    test_images: Images
    test_labels: Tensor
    num_classes: int
    mean: Tensor
    std: Tensor
    image_size: tuple[int, int]
    index: Tensor
    shards: int = 1
    test_noisy: bool = False
    classes: Sequence[str] | None = None
    confusions: Mapping[int, int] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the networks see."""
        return (self.images.shape[0], *self.image_size)

    @property
    def noise_rate(self) -> float:
        """Share of the labels whose truth is known that differ from it; NaN if none is."""
        known = self.true_labels >= 0
        return (self.labels != self.true_labels)[known].double().mean().item()

    def fingerprint(self) -> dict[str, Any]:
        """What tells this training set from another: the number of samples, and digests of the
        images (paths, or pixels held in memory), the given labels and the classes' names."""
        names = "\0".join(self.classes or ())
        return {
            "samples": len(self),
            "images": self.images.digest(),
            "labels": digest([self.labels.cpu().numpy()]),
            "classes": digest([f"{self.num_classes} {names}".encode()]),
        }

    def with_noise(
        self, kind: str, rate: float, *, seed: int = 0, include_true: bool = False
    ) -> Dataset:
        """The same data with noisy training labels (see `noise.add_noise`); never the test set.

        Raises:
            ConfigError: instance-dependent noise of images that are not held in memory.
        """
        images = None
        if kind == "instance":
            if not isinstance(self.images, TensorImages):
                raise ConfigError(
                    f"noise instance needs images held in memory, which {self.name} has in files"
                )
            images = self.images.images
        labels = add_noise(
            self.labels,
            kind,
            rate,
            num_classes=self.num_classes,
            seed=seed,
            include_true=include_true,
            confusions=self.confusions,
            images=images,
        )
        return replace(self, labels=labels)

    def with_validation(self, part: float, seed: int = 0) -> Dataset:
        """The same data with a `part` of the training samples in the place of the test set, drawn
        evenly from each given label. Their labels are as noisy as the others'."""
        place = torch.arange(len(self), dtype=torch.float64)
        taken = ((place + 1) * part).floor() > (place * part).floor()
        held = torch.empty(len(self), dtype=torch.bool)
        held[self._by_label(generator(seed, "validation"))] = taken
        return self.without(held)

    def folds(self, number: int, seed: int = 0) -> Tensor:
        """The parts (N,) from 0 that the training samples are in, drawn evenly from each given
        label."""
        parts = torch.empty(len(self), dtype=torch.int64)
        parts[self._by_label(generator(seed, "folds"))] = torch.arange(len(self)) % number
        return parts

    def without(self, held: Tensor) -> Dataset:
        """The same data with the training samples `held` (N,) in the place of the test set."""
        apart = self.select(held.nonzero()[:, 0])
        return replace(
            self.select((~held).nonzero()[:, 0]),
            test_images=apart.images,
            test_labels=apart.labels,
            test_noisy=True,
        )

    def _by_label(self, draws: torch.Generator) -> Tensor:
        """Positions (N,) label by label, of each label in an order drawn."""
        order = torch.randperm(len(self), generator=draws)
        return order[self.labels.cpu()[order].argsort(stable=True)]

    @property
    def accuracy_name(self) -> str:
        """What the accuracy on the test images is called in metrics."""
        return "noisy_validation_accuracy" if self.test_noisy else "test_accuracy"

    def select(self, positions: Tensor) -> Dataset:
        """The training samples at `positions` (M,) alone, in their order; the whole test set."""
        there = positions.to(self.labels.device)
        return replace(
            self,
            images=self.images.select(positions),
            labels=self.labels[there],
            true_labels=self.true_labels[there],
            index=self.index[there],
        )

    def shard(self, rank: int, shards: int) -> Dataset:
        """The `rank`-th of `shards` parts, as equal as can be, of training and test samples."""
        test = torch.arange(len(self.test_labels)).tensor_split(shards)[rank]
        own = self.select(torch.arange(len(self)).tensor_split(shards)[rank])
        return replace(
            own,
            test_images=self.test_images.select(test),
            test_labels=self.test_labels[test.to(self.test_labels.device)],
            shards=shards,
        )


def in_memory(
    name: str,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor] | None,
    device: str | torch.device,
    **more: Any,
) -> Dataset:
    """A data set of images (N, C, H, W), uint8 or in [0, 1], and labels (N,), held on `device`;
    test may be None."""
    images, labels = train
    test_images, test_labels = (images[:0], labels[:0]) if test is None else test
    pixels = images if images.is_floating_point() else images.float().div_(255)
    return Dataset(
        name=name,
        images=TensorImages(images.to(device)),
        labels=labels.to(device),
        true_labels=labels.to(device),
        test_images=TensorImages(test_images.to(device)),
        test_labels=test_labels.to(device),
        mean=pixels.mean((0, 2, 3)).to(device),
        std=pixels.std((0, 2, 3)).clamp_min(LEAST_STD).to(device),
        image_size=(images.shape[2], images.shape[3]),
        index=torch.arange(len(labels), device=device),
        **more,
    )


def generator(seed: int, purpose: str, rank: int = 0) -> torch.Generator:
    """A source of draws for one purpose: with the same seed for two, the order of the samples would
    be the one in which label noise picks them, and one rank would get all wrong labels.

    torch uses the low 32 bits of a seed; ranks are spread over them by 2³² over the golden ratio.
    """
    mixed = seed + (zlib.crc32(purpose.encode()) << 24) + rank * 0x9E3779B1
    return torch.Generator().manual_seed(mixed % 2**32)


def batches(index: Tensor, number: int, generator: torch.Generator) -> list[Tensor]:
    """`index` (N,) shuffled and cut into `number` parts, as equal as can be.

    Equal parts, because a remainder of one sample would give batch norm nothing to normalise.
    """
    order = index[torch.randperm(len(index), generator=generator)]
    return list(order.tensor_split(number))


def endless(index: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches of exactly `size` from `index` (N ≥ 1), reshuffled whenever it is used up."""
    pool = index[:0]
    while True:
        while len(pool) < size:
            pool = torch.cat([pool, index[torch.randperm(len(index), generator=generator)]])
        yield pool[:size]
        pool = pool[size:]
