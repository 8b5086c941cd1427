"""Data sets and noise: seeded, and always attached by index."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from real_formats import (
    FILE_SETS,
    number_of,
    tag_of,
    touch_images,
    write_cifar10,
    write_cifar100,
    write_clothing1m,
    write_files,
    write_idx,
    write_manifest,
)

from sanm_train import RECIPES, Recipe, TrainConfig, readers, register, train
from sanm_train.augment import Augment
from sanm_train.data import batches, endless
from sanm_train.datasets import DATASETS
from sanm_train.errors import ConfigError, DataError
from sanm_train.noise import add_noise

LABELS = torch.randint(10, (5000,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_symmetric_noise_rates(rate):
    noisy = add_noise(LABELS, "symmetric", rate, num_classes=10, seed=3)
    assert (noisy != LABELS).sum() == round(rate * 5000)
    assert int(noisy.min()) >= 0 and int(noisy.max()) <= 9
    with_true = add_noise(LABELS, "symmetric", rate, num_classes=10, seed=3, include_true=True)
    wrong = (with_true != LABELS).double().mean().item()
    assert wrong == pytest.approx(0.9 * rate, abs=0.02)
    if rate == 1.0:  # all wrong classes alike
        shift = (noisy - LABELS) % 10
        assert (torch.bincount(shift, minlength=10)[1:] - 5000 / 9).abs().max() < 100


def test_asymmetric_noise():
    noisy = add_noise(LABELS, "asymmetric", 0.4, num_classes=10, confusions={2: 7, 5: 6})
    changed = noisy != LABELS
    assert set(LABELS[changed].tolist()) == {2, 5}
    assert (noisy[changed & (LABELS == 2)] == 7).all()
    assert changed[LABELS == 5].sum() == round(0.4 * int((LABELS == 5).sum()))
    everything = add_noise(LABELS, "asymmetric", 1.0, num_classes=10)
    assert torch.equal(everything, (LABELS + 1) % 10)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.4, 0.9, 1.0])
def test_instance_noise(rate):
    images = torch.randint(256, (5000, 1, 6, 6), dtype=torch.uint8)
    images[2500:] = images[:2500]  # every image twice, of the same class
    labels = LABELS.clone()
    labels[2500:] = labels[:2500]
    options = {"num_classes": 10, "seed": 3}
    noisy = add_noise(labels, "instance", rate, images=images, **options)
    changed = noisy != labels
    assert changed.double().mean().item() == pytest.approx(rate, abs=0.02)
    assert int(noisy.min()) >= 0 and int(noisy.max()) <= 9
    floats = add_noise(labels, "instance", rate, images=images / 255, **options)
    assert torch.equal(noisy, floats)
    both = changed[:2500] & changed[2500:]
    if rate >= 0.4:  # like images are mistaken for the same class, which chance would in 1 of 9
        assert (noisy[:2500] == noisy[2500:])[both].double().mean() > 0.4
    with pytest.raises(ValueError, match="images must be given for instance noise"):
        add_noise(labels, "instance", rate, **options)


def test_noise_is_seeded_and_leaves_its_input():
    before = LABELS.clone()
    one, same, other = (
        add_noise(LABELS, "symmetric", 0.5, num_classes=10, seed=s) for s in (1, 1, 2)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(LABELS, before)


def test_noise_errors():
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\], got 1.5"):
        add_noise(LABELS, "symmetric", 1.5, num_classes=10)
    with pytest.raises(ValueError, match=r"noise must be one of .* got 'pink'"):
        add_noise(LABELS, "pink", 0.5, num_classes=10)


def load(name, **settings):
    """A data set as a run would load it, without noise where that is not given."""
    chosen = {"noise": "none", "model": "small-cnn", **settings}
    config = TrainConfig(recipe="ce", dataset=name, **chosen)
    return DATASETS[name](config)


def all_of(images, order=None):
    """All images in one tensor, or those at `order`, streamed in batches of 8."""
    order = torch.arange(len(images)) if order is None else order
    return torch.cat(list(images.stream(order.split(8))))


def test_instance_noise_of_a_run(tmp_path):
    config = {"noise": "instance", "rate": 0.4}
    found = train(TrainConfig(recipe="ce", epochs=1, limit=400, **config))
    assert (
        found.data.noise_rate == pytest.approx(0.4, abs=0.1) and "40% instance noise" in found.noise
    )


def shuffled(size):
    return torch.randperm(size, generator=torch.Generator().manual_seed(3))


def test_digits_split_is_fixed_and_stratified():
    one, two = load("digits"), load("digits")
    images, test_images = all_of(one.images), all_of(one.test_images)
    assert torch.equal(images, all_of(two.images)) and torch.equal(one.test_labels, two.test_labels)
    assert images.shape == (1347, 1, 8, 8) and test_images.shape == (450, 1, 8, 8)
    assert images.min() == 0 and images.max() == 1 and one.image_shape == (1, 8, 8)
    share = [torch.bincount(y).double() / len(y) for y in (one.true_labels, one.test_labels)]
    assert (share[0] - share[1]).abs().max() < 0.002
    noisy = one.with_noise("symmetric", 0.5, seed=0)
    assert noisy.noise_rate == pytest.approx(0.5, abs=1e-3)
    assert torch.equal(noisy.test_labels, one.test_labels) and one.noise_rate == 0


@pytest.mark.parametrize(
    ("name", "write"), [("cifar10", write_cifar10), ("cifar100", write_cifar100)]
)
def test_cifar_labels_follow_their_images(tmp_path, name, write):
    """Images say which one they are: labels and truth must say the same, in any order."""
    write(tmp_path)
    clean = load(name, data_root=str(tmp_path))
    data = clean.with_noise("symmetric", 0.5, seed=1)
    order = shuffled(len(data))
    who = number_of(all_of(data.images, order))
    assert torch.equal(who, order) and 0 < data.noise_rate < 0.6
    for part in (data.select(order), data.select(order).shard(1, 3), data.shard(2, 3)):
        who = number_of(all_of(part.images))
        assert torch.equal(who, part.index)
        assert torch.equal(part.labels, data.labels[who])
        assert torch.equal(part.true_labels, clean.labels[who])


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "kmnist"])
def test_idx_labels_follow_their_images(tmp_path, name):
    with pytest.raises(ConfigError, match="data_root must be the folder that holds train-images"):
        load(name)
    with pytest.raises(ConfigError, match=f"{name} needs train-images-idx3-ubyte, train-labels"):
        load(name, data_root=str(tmp_path))
    for split, size in (("train", 130), ("test", 20)):
        images, labels = readers.IDX_FILES[split]
        pixels = torch.arange(size)[:, None, None].expand(size, 28, 28)
        write_idx(tmp_path / f"{images}.gz", pixels, packed=True)
        write_idx(tmp_path / f"{labels}.gz", (torch.arange(size) * 7) % 10, packed=True)
    data = load(name, data_root=str(tmp_path))
    assert data.image_shape == (1, 28, 28) and data.num_classes == 10
    order = shuffled(130)
    images = all_of(data.images, order)
    assert torch.equal((images[:, 0, 0, 0] * 255).round().long(), order)
    assert torch.equal(data.labels[order], (order * 7) % 10)
    config = TrainConfig(
        recipe="sanm-ce", dataset=name, data_root=str(tmp_path), epochs=2, warmup=1, width=16
    )
    result = train(config)
    assert len(result.history) == 2 and result.data.noise_rate == 0.5
    write_idx(tmp_path / f"{readers.IDX_FILES['test'][1]}.gz", [3] * 19 + [10], packed=True)
    message = r"t10k-labels-idx1-ubyte must be from 0 to 9, got 3 to 10"
    with pytest.raises(DataError, match=message):
        load(name, data_root=str(tmp_path))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", FILE_SETS)
def test_labels_of_files_follow_their_images(tmp_path, kind, workers):
    settings, labels, test_labels = write_files(tmp_path, kind)
    data = load(settings.pop("dataset"), workers=workers, image_size=16, **settings)
    assert len(data) == 42 and data.image_shape == (3, 16, 16) and data.images.shape[1] == 18
    order = shuffled(42)
    who = tag_of(all_of(data.images, order)).tolist()
    assert sorted(who) == sorted(labels) and who != sorted(who)
    assert data.labels[order].tolist() == [labels[number] for number in who]
    part = data.select(order).shard(1, 2)
    who = tag_of(all_of(part.images)).tolist()
    assert part.labels.tolist() == [labels[number] for number in who]
    assert part.index.tolist() == order[21:].tolist()
    who = tag_of(all_of(data.test_images)).tolist()
    assert data.test_labels.tolist() == [test_labels[number] for number in who]
    assert (data.true_labels == -1).all() and math.isnan(data.noise_rate)
    views = Augment("photos", data.mean, data.std, data.image_size)
    assert views.strong(all_of(data.images)).shape == (42, 3, 16, 16)


def test_batches_of_a_run_keep_labels_quality_and_index_together(tmp_path):
    """What a recipe's loss is given, from an epoch of the loop, in shuffled order."""
    settings, labels, _ = write_files(tmp_path, "folder")
    seen = []

    @register("witness")
    class Witness(Recipe):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.quality[0] = torch.arange(len(self.data)) / 100

        def loss(self, network, batch, epoch):
            seen.append((tag_of(batch.images), *batch[1:5]))
            return {"loss": network(self.augment.weak(batch.images)).mean()}

    config = {"recipe": "witness", "model": "small-cnn", "noise": "none", "image_size": 16}
    try:
        train(TrainConfig(**settings, **config, epochs=1, batch_size=8, workers=0))
    finally:
        del RECIPES["witness"]
    who, targets, quality, index, row = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert index.tolist() != list(range(42)) == sorted(index.tolist())
    assert targets.tolist() == [labels[number] for number in who.tolist()]
    assert torch.equal(quality, row / 100) and not torch.equal(row, index)
    data = load("folder", data_root=settings["data_root"], image_size=16)
    in_order = tag_of(all_of(data.images))
    assert torch.equal(who, in_order[index])


@pytest.mark.parametrize("kind", ["cifar10", "cifar100", *FILE_SETS])
def test_runs_end_to_end(tmp_path, kind):
    """Every format trains, with one image that cannot be read where images are files."""
    if kind in FILE_SETS:
        settings, labels, _ = write_files(tmp_path, kind)
        next(tmp_path.rglob("*05*.*")).write_text("not found")
    else:
        {"cifar10": write_cifar10, "cifar100": write_cifar100}[kind](tmp_path)
        settings, labels = {"dataset": kind, "data_root": str(tmp_path)}, None
    config = {"recipe": "ce", "epochs": 1, "batch_size": 14, "workers": 0, "image_size": 16}
    with pytest.warns(UserWarning, match="was replaced by grey") if labels else nullcontext():
        result = train(TrainConfig(**settings, **config, model="small-cnn", noise="asymmetric"))
    assert result.history[0]["corrupt_images"] == (labels is not None)
    assert math.isfinite(result.history[0]["train_loss"]) and 0 < result.data.noise_rate < 1
    given = DATASETS[result.config.dataset](result.config)
    assert torch.equal(result.data.true_labels, given.labels), "noise is added to the given labels"


@pytest.mark.parametrize("kind", ["clothing1m", "animal10n", "folder", "manifest.csv"])
def test_noise_injected_into_files_makes_the_given_labels_true(tmp_path, kind):
    settings, *_ = write_files(tmp_path, kind)
    data = load(settings.pop("dataset"), noise="symmetric", image_size=16, **settings)
    assert torch.equal(data.true_labels, data.labels)
    assert data.with_noise("symmetric", 0.5).noise_rate == 0.5


def test_clothing1m_knows_some_true_labels(tmp_path):
    keys = [f"images/{k}.jpg" for k in range(4)]
    clean = dict(zip(keys, (-1, 2, 3, -1), strict=True))
    noisy = dict(zip(keys, (2, 2, 0, 3), strict=True))
    write_clothing1m(tmp_path, {"noisy_train": clean, "clean_test": {"t.jpg": 0}}, noisy)
    data = load("clothing1m", data_root=str(tmp_path))
    assert data.true_labels.tolist() == [-1, 2, 3, -1] and data.noise_rate == 0.5
    assert data.num_classes == 14 and data.classes[1] == "Garment 1"


def test_asymmetric_confusions(tmp_path):
    write_cifar10(tmp_path)
    _, coarse = write_cifar100(tmp_path)
    root = {"data_root": str(tmp_path)}
    assert load("cifar10", **root).confusions == {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}
    data = load("cifar100", **root)
    # Classes 0, 20, 40, 60, 80 are one superclass of the copy: each becomes the next, 80 becomes 0.
    assert data.confusions == {k: (k + 20) % 100 for k in range(100)}
    noisy = data.with_noise("asymmetric", 1.0)
    assert noisy.noise_rate == 1 and torch.equal(noisy.labels % 20, coarse)


def test_labels_from_a_cifar_n_file(tmp_path):
    clean = write_cifar10(tmp_path)
    file = tmp_path / "CIFAR-10_human.pt"
    worse = (clean + (torch.arange(100) < 40)) % 10
    settings = {"data_root": str(tmp_path), "noise": "file", "noise_file": str(file)}
    sets = {"clean_label": clean, "worse_label": worse, "high": clean + 1, "noisy_coarse": clean}
    torch.save({name: value.numpy() for name, value in sets.items()}, file)
    data = load("cifar10", noise_set="worse_label", **settings)
    assert torch.equal(data.labels, worse) and torch.equal(data.true_labels, clean)
    assert data.noise_rate == 0.4 and torch.equal(data.with_noise("file", 0.5).labels, worse)
    with pytest.raises(
        ConfigError, match="noise_set must be one of worse_label, high; got 'worse'"
    ):
        load("cifar10", noise_set="worse", **settings)
    with pytest.raises(DataError, match="high must have labels below 10, got 10"):
        load("cifar10", noise_set="high", **settings)
    torch.save({"clean_label": worse.numpy(), "worse_label": worse.numpy()}, file)
    with pytest.raises(DataError, match=r"human\.pt: clean_label must equal the labels of cifar10"):
        load("cifar10", noise_set="worse_label", **settings)


def test_image_size(tmp_path):
    write_cifar10(tmp_path, per_batch=4)
    data = load("cifar10", data_root=str(tmp_path), image_size=28)
    assert data.image_shape == (3, 28, 28) and data.images.shape == (3, 32, 32)
    with pytest.raises(ConfigError, match="image_size must be at most 32 for cifar10, got 64"):
        load("cifar10", data_root=str(tmp_path), image_size=64)
    settings, *_ = write_files(tmp_path, "animal10n")
    data = load(**{"name": settings.pop("dataset"), **settings})
    assert data.image_size == (64, 64) and data.images.shape == (3, 73, 73)


def test_folders_must_have_the_same_classes(tmp_path):
    touch_images(tmp_path, "train/a/1.png", "train/b/1.png", "val/a/1.png", "val/c/1.png")
    with pytest.raises(DataError, match="train and val must have the same classes: b, c"):
        load("folder", data_root=str(tmp_path))


@pytest.mark.parametrize(
    ("train_labels", "test_labels", "message"),
    [
        ([0, 2, 0], [0], r"a\.csv: no image is of class 1$"),
        ([0, 1, 0], [2], "no training image is of class 2, but test images are"),
        (["x", "y", "x"], ["z"], r"b\.csv: label 'z' is not one of the 2 known classes"),
        (["x", "y", "x"], [0], r"b\.csv: label '0' is not one of the 2 known classes"),
        ([0, 1, 0], ["x"], r"b\.csv names classes, but .*a\.csv counts them"),
        ([0, 10**15, 0], [0], "no image is of class 1$"),
    ],
)
def test_manifests_must_agree(tmp_path, train_labels, test_labels, message):
    roots = [
        str(write_manifest(tmp_path / name, {f"{i}.png": y for i, y in enumerate(labels)}))
        for name, labels in (("a.csv", train_labels), ("b.csv", test_labels))
    ]
    with pytest.raises(DataError, match=message):
        load("manifest", data_root=roots[0], test_root=roots[1])


def test_what_is_missing_is_found_before_anything_starts(tmp_path):
    missing = str(tmp_path / "nowhere")
    for name, needed in (
        ("cifar10", "data_batch_1"),
        ("folder", "train"),
        ("animal10n", "training"),
    ):
        with pytest.raises(ConfigError, match=rf"folder that holds .*{needed} .*{name}, got ''$"):
            TrainConfig(dataset=name)
        with pytest.raises(ConfigError, match=rf"{needed}.*got '{missing}': no such folder"):
            TrainConfig(dataset=name, data_root=missing)
    write_cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-py/data_batch_3").unlink()
    (tmp_path / "train").mkdir()
    root = {"data_root": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"cifar10 needs cifar-10-batches-py/data_batch_3 in"):
        TrainConfig(dataset="cifar10", **root)
    (tmp_path / "train").rmdir()
    with pytest.raises(ConfigError, match=rf"folder needs train in {tmp_path}, not found"):
        TrainConfig(dataset="folder", **root)
    (tmp_path / "annotations").mkdir()
    with pytest.raises(
        ConfigError, match=r"clothing1m needs annotations/noisy_train_key_list\.txt, "
    ):
        TrainConfig(dataset="clothing1m", **root)
    with pytest.raises(ConfigError, match=rf"data_root must be a file, got '{tmp_path}'"):
        TrainConfig(dataset="manifest", **root)
    (tmp_path / "a.csv").touch()
    with pytest.raises(ConfigError, match="test_root must be a file, got 'b'"):
        TrainConfig(dataset="manifest", data_root=str(tmp_path / "a.csv"), test_root="b")
    with pytest.raises(ConfigError, match="noise_file must be a file, got 'x'"):
        TrainConfig(dataset="cifar100", noise="file", noise_file="x", **root)
    with pytest.raises(ConfigError, match="noise file is for cifar10 and cifar100, not for digits"):
        TrainConfig(noise="file")


def test_batches_never_leave_a_remainder_of_one():
    generator = torch.Generator().manual_seed(0)
    for n in range(1, 70):
        parts = batches(torch.arange(n), max(1, round(n / 16)), generator)
        sizes = [len(part) for part in parts]
        assert sum(sizes) == n and (min(sizes) > 1 or n == 1) and max(sizes) <= 24
        assert torch.equal(torch.cat(parts).sort().values, torch.arange(n))


def test_endless_batches_have_one_size_and_visit_all():
    generator = torch.Generator().manual_seed(0)
    stream = endless(torch.tensor([5, 7, 9]), 4, generator)
    taken = [next(stream) for _ in range(6)]
    assert all(len(part) == 4 for part in taken)
    assert torch.cat(taken).unique(return_counts=True)[1].tolist() == [8, 8, 8]
