"""Augmentation policies: what moves, what changes, and that every sample draws for itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from sanm_train import augment
from sanm_train.augment import POLICIES, Augment

VIEWS = ("plain", "weak", "auto", "strong", "warmup")


def make(policy, channels=3, size=(16, 16)):
    return Augment(policy, torch.full((channels,), 0.3), torch.full((channels,), 0.4), size)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("policy", POLICIES)
def test_views(policy, view):
    """Shape, range, seeds, images left as they were; stored as large as seen, or larger."""
    channels = 1 if policy == "digits" else 3
    maker = make(policy, channels)
    for side in (16, 19):
        images = torch.rand(30, channels, side, side)
        before = images.clone()
        found = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            found.append(getattr(maker, view)(images))
        assert found[0].shape == (30, channels, 16, 16) and found[0].dtype == torch.float32
        pixels = maker.denormalize(found[0])
        top = 1.3 if (policy, view) == ("digits", "strong") else 1.0
        assert pixels.isfinite().all() and pixels.min() >= -1e-6 and pixels.max() <= top + 1e-6
        assert torch.equal(found[0], found[1]) and torch.equal(images, before)
        assert torch.equal(found[0], found[2]) == (view == "plain" or policy == "none")
        if policy == "none":
            assert torch.equal(found[0], maker.plain(images))


@pytest.mark.parametrize(("policy", "view"), [("digits", "strong"), ("cifar", "auto")])
def test_autocast_changes_nothing(policy, view):
    images, maker = torch.rand(60, 3, 16, 16, requires_grad=True), make(policy)
    torch.manual_seed(0)
    expected = getattr(maker, view)(images)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        found = getattr(maker, view)(images)
    assert torch.equal(found, expected) and not found.requires_grad


def test_plain_is_the_centre():
    images = torch.rand(2, 3, 9, 12)
    found = make("photos", size=(5, 4)).plain(images)
    assert torch.allclose(found, (images[:, :, 2:7, 4:8] - 0.3) / 0.4)
    for view in VIEWS:
        with pytest.raises(
            ValueError, match=r"as large as image_size \(8, 16\), got \(2, 3, 9, 12\)"
        ):
            getattr(make("crop", size=(8, 16)), view)(images)


def test_weak_shifts_whole_images():
    images = torch.zeros(200, 1, 8, 8)
    images[:, 0, 4, 5] = 1
    maker = make("digits", 1, (8, 8))
    moved = maker.denormalize(maker.weak(images))
    places = {tuple(p[1:].tolist()) for p in (moved[:, 0] > 0.5).nonzero()}
    assert places == {(y, x) for y in (3, 4, 5) for x in (4, 5, 6)}
    assert torch.allclose(moved.sum((1, 2, 3)), torch.ones(200), atol=1e-4)


@pytest.mark.parametrize(("side", "offsets"), [(32, range(-4, 5)), (36, range(5))])
def test_crops_reach_every_place(side, offsets):
    """Out of the padded image, or out of a larger one."""
    ramp = torch.arange(1, side + 1).expand(side, side) / 64
    images = torch.stack([ramp, ramp.T, ramp]).expand(400, 3, side, side)
    maker = make("crop", size=(32, 32))
    found = (maker.denormalize(maker.weak(images)) * 64).round()
    middle = found[:, :, 15:17, 15:17]
    flipped = middle[:, 0, 0, 0] > middle[:, 0, 0, 1]
    left = torch.where(flipped, middle[:, 0, 0, 1], middle[:, 0, 0, 0]) - 16
    assert set(left.tolist()) == set(offsets)
    assert set((middle[:, 1, 0, 0] - 16).tolist()) == set(offsets)
    assert 0.4 < flipped.double().mean() < 0.6


@pytest.mark.parametrize("view", ["weak", "auto", "strong"])
@pytest.mark.parametrize("policy", ["digits", "crop"])
def test_flip_only_where_asked(policy, view):
    images = torch.zeros(300, 3, 8, 8)
    images[:, :, :, 6] = 1
    maker = make(policy, size=(8, 8))
    moved = maker.denormalize(getattr(maker, view)(images))
    left = moved[:, 0, :, :3].mean((1, 2)) > moved[:, 0, :, 5:].mean((1, 2))
    assert not left.any() if policy == "digits" else 0.3 < left.double().mean() < 0.7


@pytest.mark.parametrize(
    ("policy", "view"), [("cifar", "auto"), ("photos-auto", "auto"), ("crop", "strong")]
)
def test_every_sample_draws_its_own_operations(policy, view, monkeypatch):
    """Copies of one image, uncropped and unflipped, come out in many ways: a pair of operations
    drawn for the whole batch would give at most eight."""
    monkeypatch.setattr(Augment, "_crop", lambda self, images: images)
    torch.manual_seed(0)
    image = torch.rand(1, 3, 16, 16)
    found = getattr(make(policy), view)(image.expand(400, 3, 16, 16))
    assert len(found.flatten(1).unique(dim=0)) > 30


def test_released_strong_view_hides_a_square_and_applies_half_of_its_operations(monkeypatch):
    monkeypatch.setattr(Augment, "_crop", lambda self, images: images)
    torch.manual_seed(0)
    maker, count = make("released", size=(32, 32)), 600
    image = torch.rand(1, 3, 32, 32) * 0.4 + 0.55  # nothing is grey
    found = maker.denormalize(maker.strong(image.expand(count, 3, 32, 32)))
    grey = (found - 0.5).abs().amax(1) < 1e-5
    rows, columns = grey.any(2).sum(1), grey.any(1).sum(1)
    operations = augment._operations()
    same = ((found - image).abs().amax(1) < 1e-5) | grey
    untouched = same.flatten(1).all(1).double().mean()
    # Neither operation applied, or one that is the identity: (½ + 1/28)².
    assert abs(untouched - (0.5 + 0.5 / (len(operations) - 1)) ** 2) < 0.06
    alone = same.flatten(1).all(1)  # operations that move the image show grey too
    assert rows[alone].max() == columns[alone].max() == 16
    assert rows[alone].min() == columns[alone].min() == 8  # centred on the first row or column
    assert (grey.flatten(1).sum(1)[alone] == (rows * columns)[alone]).all()


def test_released_warmup_view_moves_and_recolours(monkeypatch):
    monkeypatch.setattr(Augment, "_crop", lambda self, images: images)
    torch.manual_seed(0)
    maker = make("released", size=(32, 32))
    images = torch.full((400, 3, 32, 32), 0.5)
    images[:, 0] = 0.7
    middle = maker.denormalize(maker.warmup(images))[:, :, 16, 16]
    assert 0.25 < middle[:, 0].min() < 0.5 and 0.85 < middle[:, 0].max() <= 1.0
    assert (middle[:, 1] - middle[:, 2]).abs().max() > 0.03  # hue
    dot = torch.zeros(400, 3, 32, 32)
    dot[:, :, 15:17, 15:17] = 1
    moved = maker.denormalize(augment._move(dot).sub(0.3).div(0.4))[:, 0].flatten(1).argmax(1)
    places = torch.stack([moved // 32, moved % 32])
    assert places.min() in (11, 12, 13) and places.max() in (18, 19, 20)


IMAGE = torch.full((1, 3, 8, 8), 0.2)
IMAGE[..., :4] = torch.tensor([0.9, 0.6, 0.3])[:, None, None]
GREY = (IMAGE * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
BLURRED = torch.nn.functional.avg_pool2d(IMAGE, 3, 1) * 9 / 13 + IMAGE[..., 1:7, 1:7] * 4 / 13


@pytest.mark.parametrize(
    ("name", "sign", "expected"),
    [
        ("identity", 1, IMAGE),
        ("invert", 1, 1 - IMAGE),
        ("brightness", 1, IMAGE * 1.9),
        ("brightness", -1, IMAGE * 0.1),
        ("contrast", -1, GREY.mean() + 0.1 * (IMAGE - GREY.mean())),
        ("color", -1, GREY + 0.1 * (IMAGE - GREY)),
        ("solarize", 1, 1 - IMAGE),
        ("posterize", 1, (IMAGE * 255).int().bitwise_and(0xF0) / 255),
        ("auto_contrast", 1, (IMAGE > 0.25).float()),
    ],
)
def test_operations_at_full_magnitude(name, sign, expected):
    """Against their definitions, on an image with a bright left half."""
    function = augment._operations()[name]
    found = function(IMAGE, torch.ones(1), torch.full((1,), float(sign))).clamp(0, 1)
    assert torch.allclose(found, expected.clamp(0, 1), atol=0.02)


def test_translations_are_as_published():
    """By up to 150/331 of the side: 3.6 of 8 pixels; grey moves in."""
    for name, dim in (("translate_x", 3), ("translate_y", 2)):
        for sign in (1.0, -1.0):
            found = augment._operations()[name](IMAGE, torch.ones(1), torch.full((1,), sign))
            found, image = (x.flip(dim) if sign < 0 else x for x in (found, IMAGE))
            assert torch.allclose(found.narrow(dim, 0, 3), torch.tensor(0.5))
            moved = image.narrow(dim, 0, 4).lerp(image.narrow(dim, 1, 4), 4 - 8 * 150 / 331)
            assert torch.allclose(found.narrow(dim, 4, 4), moved, atol=1e-3)


def test_sharpness_blends_with_a_blur():
    found = augment._operations()["sharpness"](IMAGE, torch.ones(1), -torch.ones(1))
    expected = IMAGE[..., 1:7, 1:7].lerp(BLURRED, 0.9)
    assert torch.allclose(found[..., 1:7, 1:7], expected, atol=1e-3)


def test_shear_and_rotation_are_as_published():
    """At most 0.3 of the height and 30°: by how much the edge between the halves moves."""
    edge = torch.zeros(1, 1, 60, 60)
    edge[..., :30] = 1
    operations = augment._operations()
    for name, tangent in (("shear_x", 0.3), ("rotate", math.tan(math.radians(30)))):
        for sign in (1.0, -1.0):
            found = operations[name](edge, torch.ones(1), torch.full((1,), sign))[0, 0]
            row = [(found[y, 10:50] > 0.75).sum().item() for y in (20, 40)]
            assert abs(abs(row[0] - row[1]) - 20 * tangent) < 1.5, name


def test_rotation_keeps_lengths_in_images_that_are_not_square():
    """A quarter turn of a point beside the centre brings it above: as many pixels away."""
    images = torch.zeros(1, 1, 20, 40)
    images[0, 0, 9:11, 25:27] = 1
    turned = augment._warp(images, angle=math.pi / 2)
    rows, columns = (turned[0, 0] > 0.5).nonzero().double().mean(0).tolist()
    assert abs(columns - 19.5) < 0.6 and abs(abs(rows - 9.5) - 6) < 0.6


def eight_bit(kind: str) -> np.ndarray:
    """An image (16, 16, 3) of bytes."""
    numbers = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    dark = np.random.default_rng(1).random(numbers.shape) < 0.5
    one_channel = np.full_like(numbers, 50)
    one_channel[..., 1] = numbers[..., 1]
    return {
        "one value": np.full_like(numbers, 77),
        "black": np.zeros_like(numbers),
        "white": np.full_like(numbers, 255),
        "two values": np.where(dark, 40, 200).astype(np.uint8),
        "extremes": np.where(dark, 0, 255).astype(np.uint8),
        "one channel": one_channel,
        "any": numbers,
    }[kind]


PILLOWS = {
    "auto_contrast": ImageOps.autocontrast,
    "equalize": ImageOps.equalize,
    "invert": ImageOps.invert,
    "solarize": lambda image: ImageOps.solarize(image, 0),
    "posterize": lambda image: ImageOps.posterize(image, 4),
    "contrast": lambda image: ImageEnhance.Contrast(image).enhance(1.9),
    "brightness": lambda image: ImageEnhance.Brightness(image).enhance(1.9),
    "color": lambda image: ImageEnhance.Color(image).enhance(1.9),
    "sharpness": lambda image: ImageEnhance.Sharpness(image).enhance(1.9),
}


@pytest.mark.parametrize(
    "kind", ["one value", "black", "white", "two values", "extremes", "one channel", "any"]
)
@pytest.mark.parametrize("name", PILLOWS)
def test_operations_are_pillows(name, kind):
    """At full magnitude, within its rounding to whole levels."""
    image = eight_bit(kind)
    expected = torch.from_numpy(np.array(PILLOWS[name](Image.fromarray(image)))).float()
    x = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    found = augment._operations()[name](x, torch.ones(1), torch.ones(1)).clamp(0, 1)
    assert (255 * found[0].permute(1, 2, 0) - expected).abs().max() < 1.5
