"""Image files as batches: in order, whatever they look like inside, and none of them fatal."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from real_formats import tag, tag_of

from sanm_train.images import REPORTED, ImageFiles, TensorImages, read_image

WORKERS = [0, 2]


@pytest.fixture
def paths(tmp_path):
    return [str(tag(tmp_path / f"{k:02}.png", k)) for k in range(50)]


@pytest.mark.parametrize("workers", WORKERS)
def test_streams_follow_their_batches(paths, workers):
    images = ImageFiles(paths, 8, workers=workers)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    batches = [*order.split(8), order[:3].repeat(2)]
    before = torch.get_rng_state()
    found = list(images.stream(batches))
    assert torch.equal(torch.get_rng_state(), before), "a stream draws nothing"
    for index, batch in zip(batches, found, strict=True):
        assert batch.shape == (len(index), *images.shape) and batch.dtype == torch.float32
        assert batch.min() >= 0 and batch.max() <= 1
        assert torch.equal(tag_of(batch), index)
    assert all(map(torch.equal, found, images.stream(iter(batches)))) and not images.corrupt
    assert not multiprocessing.active_children()


def test_selections_are_independent(paths):
    os.truncate(paths[7], 20)
    images = ImageFiles(np.array(paths), 8)
    part = images.select(torch.tensor([9, 7, 3]))
    with pytest.warns(UserWarning, match=r"07\.png was replaced"):
        found = next(part.stream([torch.arange(3)]))
    assert tag_of(found[[0, 2]]).tolist() == [9, 3] and len(part) == 3
    assert part.corrupt == {1} and not images.corrupt
    assert [str(path) for path in part.paths] == [paths[k] for k in (9, 7, 3)]


def test_tensors_are_scaled_as_files_are():
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).view(4, 3, 8, 8)
    one = TensorImages(pixels).select(torch.tensor([2, 0]))
    found = next(one.stream([torch.tensor([1, 0, 1])]))
    assert torch.equal(found, pixels[[0, 2, 0]].float() / 255) and one.shape == (3, 8, 8)


@pytest.mark.parametrize("workers", WORKERS)
def test_images_that_cannot_be_read_are_replaced_reported_and_counted(paths, tmp_path, workers):
    photo = tmp_path / "photo.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(photo)
    photo.write_bytes(photo.read_bytes()[:-900])
    (tmp_path / "text.png").write_text("<html>404</html>")
    paths[3:6] = [str(photo), str(tmp_path / "text.png"), str(tmp_path / "missing.png")]
    images = ImageFiles(paths, 8, workers=workers)
    with pytest.warns(UserWarning) as caught:
        found = torch.cat(list(images.stream(torch.arange(50).split(4))))
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 3 and all(paths[k] in m for k, m in enumerate(messages, 3))
    reasons = ("truncated", "cannot identify", "No such file")
    for message, reason in zip(messages, reasons, strict=True):
        assert "was replaced by grey" in message and reason in message
    assert images.corrupt == {3, 4, 5}
    assert torch.equal(found[3:6], torch.full((3, 3, 8, 8), 128 / 255))
    others = torch.tensor([k for k in range(50) if k not in images.corrupt])
    assert torch.equal(tag_of(found[others]), others)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # each is reported once
        again = torch.cat(list(images.stream([torch.arange(50)])))
    assert torch.equal(again, found)


def test_warnings_do_not_flood(tmp_path):
    images = ImageFiles([str(tmp_path / f"{k}.png") for k in range(REPORTED + 9)], 4)
    with pytest.warns(UserWarning) as caught:
        list(images.stream([torch.arange(len(images))]))
    assert len(caught) == REPORTED + 1 and "only counted" in str(caught[-1].message)
    assert len(images.corrupt) == len(images)


def picture(tmp_path, name, image, **options):
    image.save(tmp_path / name, **options)
    return read_image(str(tmp_path / name), 8)


def test_formats(tmp_path):
    """What Pillow opens in other modes than RGB looks as a viewer shows it."""
    colour = Image.new("RGB", (12, 10), (200, 100, 40))
    expected = np.broadcast_to(np.uint8([200, 100, 40]), (8, 8, 3))
    cases = {
        "palette.png": colour.convert("P", palette=Image.Palette.ADAPTIVE),
        "palette.gif": colour.convert("P", palette=Image.Palette.ADAPTIVE),
        "print.jpg": colour.convert("CMYK"),
        "alpha.png": colour.convert("RGBA"),
        "photo.webp": colour,
    }
    for name, image in cases.items():
        assert np.abs(picture(tmp_path, name, image) - expected.astype(int)).max() <= 3, name
    grey = picture(tmp_path, "deep.png", Image.fromarray(np.full((9, 9), 100 * 257, np.uint16)))
    assert (grey == 100).all()
    assert (picture(tmp_path, "grey.png", Image.new("L", (9, 9), 77)) == 77).all()
    assert (picture(tmp_path, "bits.png", Image.new("1", (9, 9), 1)) == 255).all()
    hidden = Image.new("RGBA", (9, 9), (200, 0, 0, 0))
    assert (picture(tmp_path, "clear.png", hidden) == 255).all(), "transparent pixels are white"
    frames = [Image.new("L", (9, 9), value) for value in (10, 250)]
    first = picture(tmp_path, "film.gif", frames[0], save_all=True, append_images=frames[1:])
    assert (first == 10).all()


def test_centre_of_the_upright_image(tmp_path):
    """Left to right: black, grey, white; turned by its EXIF entry, from top to bottom."""
    bands = np.repeat(np.uint8([0, 128, 255]), 16)
    wide = Image.fromarray(np.tile(bands[:, None], (16, 1, 3)).reshape(16, 48, 3))
    kept = picture(tmp_path, "wide.png", wide)
    assert (kept[:, 1:-1] == 128).all() and kept.min() > 100 and kept.max() < 156
    square = Image.fromarray(np.broadcast_to(bands[None, :, None], (48, 48, 3)).copy())
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° to the right
    turned = picture(tmp_path, "turned.jpg", square, exif=exif).astype(int)
    assert (
        np.abs(turned - turned[:, :1]).max() < 6 and turned[0].max() < 20 < 235 < turned[-1].min()
    )
    large = np.kron(square.convert("L"), np.ones((20, 20), np.uint8))
    drafted = picture(tmp_path, "large.jpg", Image.fromarray(large))
    assert (
        np.abs(drafted - picture(tmp_path, "large.png", Image.fromarray(large)).astype(int)).max()
        < 30
    )


def test_bombs_are_refused(tmp_path, monkeypatch):
    path = tag(tmp_path / "a.png", 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    images = ImageFiles([str(path)], 8)
    with pytest.warns(
        UserWarning, match=r"a\.png was replaced by grey: Image size .* exceeds limit"
    ):
        list(images.stream([torch.tensor([0])]))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # less than double is a warning in Pillow
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(ImageFiles([str(path)], 8).stream([torch.tensor([0])]))


def test_a_stream_left_early_leaves_no_workers(paths):
    images = ImageFiles(paths, 8, workers=2)
    endless = (torch.arange(5) for _ in iter(int, 1))
    stream = images.stream(endless)
    next(stream)
    assert len(multiprocessing.active_children()) == 2
    stream.close()
    assert not multiprocessing.active_children()


def test_control_c_leaves_no_workers(paths):
    code = f"""
import multiprocessing, signal, torch
from sanm_train.images import ImageFiles
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if pytest runs in the background
try:
    for _ in ImageFiles({paths!r}, 8, workers=2).stream(torch.arange(5) for _ in iter(int, 1)):
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
except KeyboardInterrupt:
    pass
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    workers = process.stdout.readline().split()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    process.communicate(timeout=60)
    assert process.returncode == 0 and len(workers) == 2
    assert not any(os.path.exists(f"/proc/{worker}") for worker in workers)
