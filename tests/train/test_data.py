"""Data, noise, augmentation: seeded, and always attached by index."""

from __future__ import annotations

import pytest
import torch

from sanm_train.augment import Augment
from sanm_train.data import batches, endless, load_digits
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


def test_digits_split_is_fixed_and_stratified():
    one, two = load_digits(), load_digits()
    assert torch.equal(one.images, two.images) and torch.equal(one.test_labels, two.test_labels)
    assert one.images.shape == (1347, 1, 8, 8) and one.test_images.shape == (450, 1, 8, 8)
    assert one.images.min() == 0 and one.images.max() == 1
    share = [torch.bincount(y).double() / len(y) for y in (one.true_labels, one.test_labels)]
    assert (share[0] - share[1]).abs().max() < 0.002
    noisy = one.with_noise("symmetric", 0.5, seed=0)
    assert noisy.noise_rate == pytest.approx(0.5, abs=1e-3)
    assert torch.equal(noisy.test_labels, one.test_labels) and one.noise_rate == 0


def test_labels_and_quality_follow_their_images():
    """Samples that know their own index come back together, whatever the order."""
    data = load_digits()
    n = len(data)
    tagged = data.images.clone()
    tagged[:, 0, 0, 0] = torch.arange(n)
    data = data.__class__(**{**vars(data), "images": tagged, "labels": torch.arange(n) * 3})
    quality = torch.arange(n) / n
    generator = torch.Generator().manual_seed(0)
    seen = []
    for index in batches(torch.arange(n), 64, generator):
        batch = data.take(index, quality)
        assert torch.equal(batch.images[:, 0, 0, 0].long() * 3, batch.targets)
        assert torch.equal(batch.clean_prob, quality[batch.sample_index])
        assert torch.equal(batch.images[:, 0, 0, 0].long(), batch.sample_index)
        seen.append(batch.sample_index)
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(n))


def test_batches_never_leave_a_remainder_of_one():
    generator = torch.Generator().manual_seed(0)
    for n in range(1, 70):
        sizes = [len(part) for part in batches(torch.arange(n), 16, generator)]
        assert sum(sizes) == n and (min(sizes) > 1 or n == 1) and max(sizes) <= 24


def test_endless_batches_have_one_size_and_visit_all():
    generator = torch.Generator().manual_seed(0)
    stream = endless(torch.tensor([5, 7, 9]), 4, generator)
    taken = [next(stream) for _ in range(6)]
    assert all(len(part) == 4 for part in taken)
    assert torch.cat(taken).unique(return_counts=True)[1].tolist() == [8, 8, 8]


def augment(flip: bool, seed: int = 0, channels: int = 1) -> Augment:
    mean, std = torch.full((channels,), 0.3), torch.full((channels,), 0.4)
    return Augment(mean, std, flip=flip, generator=torch.Generator().manual_seed(seed))


def test_weak_shifts_whole_images():
    images = torch.zeros(200, 1, 8, 10)
    images[:, 0, 4, 5] = 1
    moved = augment(flip=False).denormalize(augment(flip=False).weak(images))
    places = {tuple(p[1:].tolist()) for p in (moved[:, 0] > 0.5).nonzero()}
    assert places == {(y, x) for y in (3, 4, 5) for x in (4, 5, 6)}
    assert torch.allclose(moved.sum((1, 2, 3)), torch.ones(200), atol=1e-4)


def test_flip_only_where_asked():
    images = torch.zeros(200, 3, 8, 8)
    images[:, :, :, 6] = 1
    for flip in (False, True):
        moved = augment(flip, channels=3).weak(images)
        left = moved[:, 0, :, :3].mean((1, 2)) > moved[:, 0, :, 5:].mean((1, 2))
        assert 0.35 < left.double().mean() < 0.65 if flip else not left.any()


def test_strong_keeps_shape_and_seed():
    images = torch.rand(6, 2, 7, 9)
    one, same, other = (augment(True, s, 2).strong(images) for s in (0, 0, 1))
    assert one.shape == images.shape and one.isfinite().all()
    assert torch.equal(one, same) and not torch.equal(one, other)
