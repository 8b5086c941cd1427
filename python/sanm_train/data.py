"""Data sets as tensors; labels and clean probabilities are attached to images by index."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from .config import ConfigError
from .noise import add_noise
from .readers import CIFAR10_FILES, CIFAR100_FILES, Records, read_cifar10, read_cifar100
from .sanm import Batch


@dataclass(frozen=True)
class Dataset:
    """Training and test images (·, C, H, W) in [0, 1] with integer labels (·,).

    labels are the given, possibly wrong ones; true_labels what they were before noise.
    """

    name: str
    images: Tensor
    labels: Tensor
    true_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    model: str
    flip: bool = False
    background: float = 0.0
    confusions: Mapping[int, int] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, ...]:
        return tuple(self.images.shape[1:])

    @property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (C,) of the training pixels."""
        return self.images.mean((0, 2, 3)), self.images.std((0, 2, 3)).clamp_min(1e-6)

    @property
    def noise_rate(self) -> float:
        """Share of training labels that differ from the true ones."""
        return (self.labels != self.true_labels).double().mean().item()

    def with_noise(
        self, kind: str, rate: float, *, seed: int = 0, include_true: bool = False
    ) -> Dataset:
        """The same data with noisy training labels (see `noise.add_noise`); never the test set."""
        labels = add_noise(
            self.true_labels,
            kind,
            rate,
            num_classes=self.num_classes,
            seed=seed,
            include_true=include_true,
            confusions=self.confusions,
        )
        return replace(self, labels=labels)

    def to(self, device: str | torch.device) -> Dataset:
        """The same data with all tensors on `device`."""
        tensors = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)  # type: ignore[arg-type]

    def subset(self, size: int) -> Dataset:
        """The first `size` training samples."""
        names = ("images", "labels", "true_labels")
        return replace(self, **{name: getattr(self, name)[:size] for name in names})

    def take(self, index: Tensor, clean_prob: Tensor | None = None) -> Batch:
        """The samples at `index` (B,), in its order; clean_prob (N,) is indexed alike."""
        quality = None if clean_prob is None else clean_prob[index]
        return Batch(self.images[index], self.labels[index], quality, index)


def load_digits(root: str = "") -> Dataset:
    """scikit-learn's 1,797 digits, 8×8, split once and for all into 1,347 and 450 by class.

    They come with scikit-learn: `root` is not used.

    Confusions are the usual ones for digits (Patrini et al., 2017): 2→7, 3→8, 5→6, 6→5, 7→1.
    """
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    digits = load()
    train_x, test_x, train_y, test_y = train_test_split(
        digits.images / 16.0, digits.target, test_size=0.25, stratify=digits.target, random_state=0
    )
    labels = torch.as_tensor(train_y).long()
    return Dataset(
        name="digits",
        images=torch.as_tensor(train_x).float()[:, None],
        labels=labels,
        true_labels=labels,
        test_images=torch.as_tensor(test_x).float()[:, None],
        test_labels=torch.as_tensor(test_y).long(),
        num_classes=10,
        model="small-cnn",
        confusions={2: 7, 3: 8, 5: 6, 6: 5, 7: 1},
    )


def load_cifar10(root: str) -> Dataset:
    """CIFAR-10 below `root`. Confusions are the usual ones (Patrini et al., 2017):
    truck → automobile, bird → airplane, deer → horse, cat ↔ dog."""
    return _cifar("cifar10", read_cifar10, root, 10, lambda _: {9: 1, 2: 0, 4: 7, 3: 5, 5: 3})


def load_cifar100(root: str) -> Dataset:
    """CIFAR-100 below `root`. Each class is confused with the next of its superclass, the last
    one with the first (Patrini et al., 2017)."""

    def next_in_superclass(train: Records) -> dict[int, int]:
        coarse = train.metadata["coarse_labels"]
        pairs = set(zip(coarse.tolist(), train.labels.tolist(), strict=True))
        groups = [sorted(f for c, f in pairs if c == group) for group in {c for c, _ in pairs}]
        return {fine: g[(i + 1) % len(g)] for g in groups for i, fine in enumerate(g)}

    return _cifar("cifar100", read_cifar100, root, 100, next_in_superclass)


def _cifar(
    name: str,
    read: Callable[[str, str], Records],
    root: str,
    num_classes: int,
    confusions: Callable[[Records], dict[int, int]],
) -> Dataset:
    train, test = read(root, "train"), read(root, "test")
    return Dataset(
        name=name,
        images=train.items.float().div_(255),
        labels=train.labels,
        true_labels=train.labels,
        test_images=test.items.float().div_(255),
        test_labels=test.labels,
        num_classes=num_classes,
        model="preact-resnet18",
        flip=True,
        confusions=confusions(train),
    )


DATASETS: dict[str, Callable[[str], Dataset]] = {
    "digits": load_digits,
    "cifar10": load_cifar10,
    "cifar100": load_cifar100,
}
FILES = {"cifar10": CIFAR10_FILES, "cifar100": CIFAR100_FILES}  # needed below the root


def check_root(dataset: str, root: str) -> None:
    """Raise a ConfigError that names what is missing below `root`, before anything is read."""
    wanted = FILES.get(dataset, ())
    if not wanted:
        return
    folder = Path(wanted[0]).parent
    if not root or not Path(root).is_dir():
        raise ConfigError(
            f"data_root must be the folder that holds {folder}/ for {dataset}, got {root!r}"
            + (": no such folder" if root else "")
        )
    missing = [name for name in wanted if not (Path(root) / name).is_file()]
    if missing:
        raise ConfigError(
            f"data_root: {dataset} needs {', '.join(missing)} in {root}, not found; "
            "unpack the python version of the archive there"
        )


def batches(index: Tensor, size: int, generator: torch.Generator) -> list[Tensor]:
    """`index` (N,) shuffled and cut into about N/size parts, as equal as can be.

    Equal parts, because a remainder of one sample would give batch norm nothing to normalise.
    """
    order = index[torch.randperm(len(index), generator=generator)]
    return list(order.tensor_split(max(1, round(len(index) / size))))


def endless(index: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches of exactly `size` from `index` (N ≥ 1), reshuffled whenever it is used up."""
    pool = index[:0]
    while True:
        while len(pool) < size:
            pool = torch.cat([pool, index[torch.randperm(len(index), generator=generator)]])
        yield pool[:size]
        pool = pool[size:]
