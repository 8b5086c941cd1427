"""The data sets by name, and what must lie in the folder they are read from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import TrainConfig
from .data import Dataset, in_memory
from .errors import ConfigError, DataError, check_choice
from .extra import extra
from .hub import choose, library, read_split, read_splits
from .images import ImageFiles
from .readers import (
    CIFAR10_FILES,
    CIFAR100_FILES,
    IDX_FILES,
    Records,
    clothing1m_lists,
    read_animal10n,
    read_cifar10,
    read_cifar100,
    read_cifar_n,
    read_clothing1m,
    read_folder,
    read_idx,
    read_manifest,
)
from .registry import Registry
from .settings import setting

DATASETS: Registry[Callable[[TrainConfig], Dataset]] = Registry("dataset")
register_dataset = DATASETS.register

# Mean and standard deviation of ImageNet's pixels, which published weights were trained with.
IMAGENET = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])


@dataclass(frozen=True, kw_only=True)
class DigitsConfig(TrainConfig):
    model: str = "small-cnn"
    augmentation: str = "digits"
    noise: str = "symmetric"
    mask: str = "small-images"
    threads: int = 1  # more gain nothing


def check_root(config: TrainConfig, needed: Sequence[str]) -> None:
    """Raise a ConfigError that names what is missing in data_root of the files and folders
    `needed`."""
    name, root = config.dataset, Path(config.data_root)
    if not (config.data_root and root.is_dir()):
        raise ConfigError(
            f"data_root must be the folder that holds {needed[0]} and others for {name}, got "
            f"{config.data_root!r}" + (": no such folder" if config.data_root else "")
        )
    missing = [entry for entry in needed if not (root / entry).exists()]
    if missing:
        raise ConfigError(f"data_root: {name} needs {', '.join(missing)} in {root}, not found")


@dataclass(frozen=True, kw_only=True)
class CIFARConfig(TrainConfig):
    """CIFAR"""

    model: str = "preact-resnet18"
    augmentation: str = "cifar"
    noise: str = ""  # symmetric, or a file where one is named
    epochs: int = 360
    lr_drop: float = 0.4166  # epoch 150
    batch_size: int = 128
    noise_file: str = setting("", "noise file: a CIFAR-N label file")
    noise_set: str = setting("", "noise file: which of its label sets, e.g. worse_label")

    def __post_init__(self) -> None:
        if not self.noise:
            file = self.noise_file or self.noise_set
            object.__setattr__(self, "noise", "file" if file else "symmetric")
        super().__post_init__()

    def check(self) -> None:
        for name in ("noise_file", "noise_set"):
            if getattr(self, name) and self.noise != "file":
                raise ConfigError(f"{name} goes with noise file, got noise {self.noise}")
        if self.noise == "file" and not Path(self.noise_file).is_file():
            raise ConfigError(f"noise_file must be a file, got {self.noise_file!r}")
        super().check()
        check_root(self, CIFAR100_FILES if self.dataset == "cifar100" else CIFAR10_FILES)


@dataclass(frozen=True, kw_only=True)
class IDXConfig(TrainConfig):
    model: str = "resnet20"
    augmentation: str = "crop"
    noise: str = "symmetric"

    def check(self) -> None:
        super().check()
        names = [name for pair in IDX_FILES.values() for name in pair]
        packed = Path(self.data_root, f"{names[0]}.gz").exists()
        check_root(self, [f"{name}.gz" for name in names] if packed else names)


@dataclass(frozen=True, kw_only=True)
class DigitsIDXConfig(IDXConfig):
    """Digits and characters are not mirrored."""

    augmentation: str = "shift"


@dataclass(frozen=True, kw_only=True)
class PhotosConfig(TrainConfig):
    model: str = "torchvision:resnet50"
    augmentation: str = "photos"
    epochs: int = 80
    lr_drop: float = 0.5
    weight_decay: float = 1e-3


@dataclass(frozen=True, kw_only=True)
class Clothing1MConfig(PhotosConfig):
    def check(self) -> None:
        super().check()
        root = Path(self.data_root)
        lists = clothing1m_lists(root).relative_to(root)
        names = ("noisy_train_key_list", "clean_test_key_list", "noisy_label_kv", "clean_label_kv")
        check_root(self, [str(lists / f"{name}.txt") for name in names])


@dataclass(frozen=True, kw_only=True)
class Animal10NConfig(PhotosConfig):
    def check(self) -> None:
        super().check()
        check_root(self, ("training", "testing"))


@dataclass(frozen=True, kw_only=True)
class FolderConfig(PhotosConfig):
    def check(self) -> None:
        super().check()
        check_root(self, ("train",))


@dataclass(frozen=True, kw_only=True)
class ManifestConfig(PhotosConfig):
    """manifest"""

    test_root: str = setting("", "manifest of the test images, if there are any")

    def check(self) -> None:
        super().check()
        for name in ("data_root", "test_root"):
            file = getattr(self, name)
            if not Path(file).is_file() and (file or name == "data_root"):
                raise ConfigError(f"{name} must be a file, got {file!r}")


@dataclass(frozen=True, kw_only=True)
class HubConfig(PhotosConfig):
    """hf"""

    test_root: str = setting("", "what holds the test images, if data_root does not")
    subset: str = setting("", "which of the data sets of one name, where there are several")
    train_split: str = setting("", "split to train on; empty: train, or the only one")
    test_split: str = setting("", "split to test on; empty: test, else validation, if there is one")
    image_column: str = setting("", "column of images; empty: the only one")
    label_column: str = setting("", "column of given labels; empty: that of classes, or label")
    true_column: str = setting("", "column of labels known to be right, where there is one")

    def check(self) -> None:
        super().check()
        library()
        if not self.data_root:
            raise ConfigError("data_root must be a folder, files or a name of the hub, got ''")


@DATASETS.register("digits", DigitsConfig)
def load_digits(config: TrainConfig) -> Dataset:
    """scikit-learn's 1,797 digits, 8×8, split once and for all into 1,347 and 450 by class.

    Confusions are the usual ones for digits (Patrini et al., 2017): 2→7, 3→8, 5→6, 6→5, 7→1.
    """
    with extra():
        from sklearn.datasets import load_digits as load
        from sklearn.model_selection import train_test_split
    digits = load()
    train_x, test_x, train_y, test_y = train_test_split(
        digits.images / 16.0, digits.target, test_size=0.25, stratify=digits.target, random_state=0
    )
    return held(
        config,
        (torch.as_tensor(train_x).float()[:, None], torch.as_tensor(train_y).long()),
        (torch.as_tensor(test_x).float()[:, None], torch.as_tensor(test_y).long()),
        num_classes=10,
        confusions={2: 7, 3: 8, 5: 6, 6: 5, 7: 1},
    )


@DATASETS.register("cifar10", CIFARConfig)
def load_cifar10(config: CIFARConfig) -> Dataset:
    """CIFAR-10 below `data_root`. Confusions are the usual ones (Patrini et al., 2017):
    truck → automobile, bird → airplane, deer → horse, cat ↔ dog."""
    return _cifar(config, read_cifar10, 10, lambda _: {9: 1, 2: 0, 4: 7, 3: 5, 5: 3})


@DATASETS.register("cifar100", CIFARConfig)
def load_cifar100(config: CIFARConfig) -> Dataset:
    """CIFAR-100 below `data_root`. Each class is confused with the next of its superclass, the
    last one with the first (Patrini et al., 2017)."""

    def next_in_superclass(train: Records) -> dict[int, int]:
        coarse = train.metadata["coarse_labels"]
        pairs = set(zip(coarse.tolist(), train.labels.tolist(), strict=True))
        groups = [sorted(f for c, f in pairs if c == group) for group in {c for c, _ in pairs}]
        return {fine: g[(i + 1) % len(g)] for g in groups for i, fine in enumerate(g)}

    return _cifar(config, read_cifar100, 100, next_in_superclass)


def _idx(config: TrainConfig, **more: Any) -> Dataset:
    train, test = (read_idx(config.data_root, split) for split in ("train", "test"))
    return held(
        config, (train.items, train.labels), (test.items, test.labels), num_classes=10, **more
    )


@DATASETS.register("mnist", DigitsIDXConfig)
def load_mnist(config: TrainConfig) -> Dataset:
    """MNIST. Confusions as for `digits`: 2→7, 3→8, 5→6, 6→5, 7→1 (Patrini et al., 2017)."""
    return _idx(config, confusions={2: 7, 3: 8, 5: 6, 6: 5, 7: 1})


@DATASETS.register("kmnist", DigitsIDXConfig)
def load_kmnist(config: TrainConfig) -> Dataset:
    """KMNIST: ten Japanese characters."""
    return _idx(config)


@DATASETS.register("fashion-mnist", IDXConfig)
def load_fashion_mnist(config: TrainConfig) -> Dataset:
    """Fashion-MNIST. Confusions among clothes that are alike: shirt → T-shirt, pullover ↔ coat,
    sandal → sneaker, dress → coat."""
    names = (
        *("T-shirt", "trouser", "pullover", "dress", "coat"),
        *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
    )
    return _idx(config, classes=names, confusions={6: 0, 2: 4, 4: 2, 5: 7, 3: 4})


@DATASETS.register("clothing1m", Clothing1MConfig)
def load_clothing1m(config: TrainConfig) -> Dataset:
    """Clothing1M: the million noisy labels to train on, the clean test set."""
    train, test = (read_clothing1m(config.data_root, s) for s in ("noisy_train", "clean_test"))
    return from_files(config, train, test, 14)


@DATASETS.register("animal10n", Animal10NConfig)
def load_animal10n(config: TrainConfig) -> Dataset:
    """Animal-10N, seen at 64 pixels."""
    train, test = (read_animal10n(config.data_root, s) for s in ("training", "testing"))
    return from_files(config, train, test, 10, size=64)


@DATASETS.register("folder", FolderConfig)
def load_folder(config: TrainConfig) -> Dataset:
    """Image folders: `data_root`/train and, if there is one, `data_root`/test (or val), each with a
    sub-folder per class."""
    root = Path(config.data_root)
    train = read_folder(root / "train")
    classes = train.metadata["classes"]
    apart = [root / name for name in ("test", "val") if (root / name).is_dir()]
    if not apart:
        return from_files(config, train, None, len(classes))
    test = read_folder(apart[0])
    if classes != test.metadata["classes"]:
        odd = ", ".join(sorted({*classes} ^ {*test.metadata["classes"]}))
        raise DataError(f"{root}: train and {apart[0].name} must have the same classes: {odd}")
    return from_files(config, train, test, len(classes))


@DATASETS.register("manifest", ManifestConfig)
def load_manifest(config: ManifestConfig) -> Dataset:
    """Any images listed in tables: `data_root` those to train on, `test_root`, if there is one,
    those to test on."""
    train = read_manifest(config.data_root)
    classes = train.metadata.get("classes")
    test = read_manifest(config.test_root, classes=classes) if config.test_root else None
    number = count_classes(train, test, config.data_root, config.test_root)
    return from_files(config, train, test, number)


@DATASETS.register("hf", HubConfig)
def load_hub(config: HubConfig) -> Dataset:
    """What the library datasets (Hugging Face) reads: a name of its hub, a folder of save_to_disk,
    WebDataset shards (.tar), Parquet files with images in them."""
    splits = read_splits(config.data_root, config.subset)
    usual = ("train",) if len(splits) > 1 else tuple(splits)
    trained = choose(splits, "train_split", config.train_split, usual)
    if trained is None:
        raise ConfigError(f"train_split must name one of {', '.join(splits)}")
    columns = {"image_column": config.image_column, "label_column": config.label_column}
    true = config.true_column
    train = read_split(splits.pop(trained), config.data_root, trained, true_column=true, **columns)
    classes = train.metadata.get("classes")
    if config.test_root:
        splits = read_splits(config.test_root, config.subset)
    others = ("test", "validation", "val", *(splits if config.test_root else ()))
    tested = choose(splits, "test_split", config.test_split, others)
    test, root = None, config.test_root or config.data_root
    if tested is not None:
        test = read_split(splits[tested], root, tested, classes=classes, **columns)
    number = count_classes(train, test, config.data_root, root)
    return from_files(config, train, test, number)


def count_classes(train: Records, test: Records | None, where: str, test_where: str) -> int:
    """How many classes there are: those that are named, else those of the labels, which must leave
    none out."""
    if classes := train.metadata.get("classes"):
        return len(classes)
    if test is not None and "classes" in test.metadata:
        raise DataError(f"{test_where} names classes, but {where} counts them")
    used = train.labels.unique()
    gaps = (used != torch.arange(len(used))).nonzero()
    if len(gaps):
        raise DataError(f"{where}: no image is of class {int(gaps[0])}")
    return len(used)


def check_seen(labels: Tensor, test_labels: Tensor) -> None:
    """Raise a DataError if a test image is of a class that no training image is of."""
    unseen = test_labels[~torch.isin(test_labels, labels)]
    if len(unseen):
        raise DataError(f"no training image is of class {int(unseen[0])}, but test images are")


def held(
    config: TrainConfig,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor] | None,
    **more: Any,
) -> Dataset:
    """A data set in memory, of which networks see the config's image_size."""
    data = in_memory(config.dataset, train, test, config.device, **more)
    return replace(data, image_size=seen(config, data.image_size))


def seen(config: TrainConfig, image_size: tuple[int, int]) -> tuple[int, int]:
    """What networks see (H, W) of images of one size: the config's image_size, or all."""
    side, largest = config.image_size, min(image_size)
    if side > largest:
        raise ConfigError(f"image_size must be at most {largest} for {config.dataset}, got {side}")
    return (side, side) if side else image_size


def _cifar(
    config: CIFARConfig,
    read: Callable[[str, str], Records],
    num_classes: int,
    confusions: Callable[[Records], dict[int, int]],
) -> Dataset:
    train, test = (read(config.data_root, split) for split in ("train", "test"))
    data = held(
        config,
        (train.items, train.labels),
        (test.items, test.labels),
        num_classes=num_classes,
        classes=train.metadata.get("classes"),
        confusions=confusions(train),
    )
    if config.noise != "file":
        return data
    sets = read_cifar_n(config.noise_file)
    file, chosen = config.noise_file, config.noise_set
    if not torch.equal(sets.pop("clean_label"), train.labels):
        raise DataError(f"{file}: clean_label must equal the labels of {data.name}")
    check_choice("noise_set", chosen, [name for name in sets if "coarse" not in name])
    highest = int(sets[chosen].max())
    if highest >= num_classes:
        raise DataError(f"{file}: {chosen} must have labels below {num_classes}, got {highest}")
    return replace(data, labels=sets[chosen].to(config.device))


def from_files(
    config: TrainConfig, train: Records, test: Records | None, num_classes: int, size: int = 224
) -> Dataset:
    """A data set of image files, kept a little larger than what networks see of them."""
    size = config.image_size or size

    def images(records: Records) -> ImageFiles:
        return ImageFiles(
            records.items,
            larger(size),
            files=records.metadata.get("files"),
            device=config.device,
            workers=config.workers,
        )

    train = train._replace(items=images(train))
    test = test and test._replace(items=images(test))
    return streamed(config, train, test, num_classes, (size, size), IMAGENET)


def larger(size: int) -> int:
    """The side that images of any size are kept at."""
    return round(size * 256 / 224)


def streamed(
    config: TrainConfig,
    train: Records,
    test: Records | None,
    num_classes: int,
    image_size: tuple[int, int],
    mean_std: Tensor,
) -> Dataset:
    """A data set of images that are read when they are needed; items are `Images`, mean_std (2, C)
    of their pixels."""
    if test is None:
        nothing = torch.arange(0)
        test = Records(train.items.select(nothing), train.labels[nothing], {})
    check_seen(train.labels, test.labels)
    true = train.metadata.get("true_labels", torch.full_like(train.labels, -1))
    if config.noise not in ("none", "file"):  # injected: the given labels count as true
        true = train.labels
    mean, std = mean_std.to(config.device)
    return Dataset(
        name=config.dataset,
        images=train.items,
        labels=train.labels.to(config.device),
        true_labels=true.to(config.device),
        test_images=test.items,
        test_labels=test.labels.to(config.device),
        num_classes=num_classes,
        mean=mean,
        std=std,
        image_size=image_size,
        index=torch.arange(len(train.labels), device=config.device),
        classes=train.metadata.get("classes"),
    )
