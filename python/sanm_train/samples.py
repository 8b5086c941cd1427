"""The images of any torch data set whose samples are pairs (image, label)."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .config import TrainConfig
from .data import LEAST_STD
from .datasets import larger, seen
from .errors import DataError
from .extra import extra
from .files import first_line
from .images import ReadImages, as_it_is, digest, fit_image

SIDE = 224  # that networks see of Pillow's images, where the settings do not say
AT_ONCE = 64  # samples, by one worker
READ_TWICE = 8  # samples, to see whether they are the same each time


class Look(NamedTuple):
    """What is kept of a sample: its label, the means (2, C) of its pixels in [0, 1] and of their
    squares, and a digest of the pixels."""

    label: Any
    moments: np.ndarray[Any, Any]
    digest: bytes


class Samples(ReadImages):
    """The images of a torch data set, each of which is read once for its label.

    Pillow's are fitted as files are, and may be of any size; tensors (C, H, W) and arrays (H, W, C)
    or (H, W), uint8 or floating in [0, 1], must all be like the first.

    Args:
        config: what says how large images are, and where they go.
        data: with a length and positions.
        where: what it is called.

    Attributes:
        labels: as the samples have them (N,).
        mean_std: (2, C) of the pixels in [0, 1].
        seen: (H, W) of what networks see.

    Raises:
        DataError: a sample cannot be read, or is not the same when it is read again.
    """

    def __init__(self, config: TrainConfig, data: Any, where: str) -> None:
        with extra():
            import pyarrow as pa
        if not len(data):
            raise DataError(f"{where} has no image")
        self.data, self.where = data, where
        first, _ = self._pair(0)
        self.fits = hasattr(first, "getbands")
        if self.fits:
            side = config.image_size or SIDE
            shape, self.seen = (3, larger(side), larger(side)), (side, side)
        else:
            pixels = self._pixels(first)
            height, width, channels = pixels.shape
            shape, self.seen = (channels, height, width), seen(config, (height, width))
            self.dtype = pixels.dtype
        names = pa.array((f"{where}[{i}]" for i in range(len(data))), pa.large_string())
        super().__init__(names, shape, config.device, config.workers)
        looks = self._looks()
        for row, look in enumerate(looks[:READ_TWICE]):
            if self.look(row).digest != look.digest:
                raise DataError(
                    f"{where}[{row}] is not the same when it is read again: leave random "
                    "transforms to the run (augmentation)"
                )
        self.labels = [look.label for look in looks]
        mean, square = np.mean([look.moments for look in looks], 0)
        std = np.sqrt((square - mean**2).clip(LEAST_STD**2))
        self.mean_std = torch.tensor(np.stack([mean, std]), dtype=torch.float32)
        self.digests = np.array([look.digest for look in looks])

    def read(self, position: int) -> np.ndarray[Any, Any]:
        return self._image(self._pair(int(self.rows[position]))[0])

    def digest(self) -> str:
        return digest([self.digests[self.rows.numpy()]])

    def look(self, row: int) -> Look:
        """Read one sample."""
        image, label = self._pair(row)
        pixels = self._image(image)
        scaled = pixels.astype(np.float64) / (255 if pixels.dtype == np.uint8 else 1)
        moments = np.stack([scaled.mean((0, 1)), (scaled**2).mean((0, 1))])
        label = label.item() if isinstance(label, Tensor) else label
        return Look(label, moments, hashlib.sha256(pixels.tobytes()).digest())

    def _looks(self) -> list[Look]:
        loader = DataLoader(
            _Looks(self),
            batch_size=None,
            sampler=(rows.tolist() for rows in self.rows.split(AT_ONCE)),
            num_workers=self.workers,
            collate_fn=as_it_is,
            generator=torch.Generator(),
        )
        looks: list[Look] = []
        for part, fault in loader:
            if fault:
                raise DataError(fault)
            looks += part
        return looks

    def _pair(self, row: int) -> tuple[Any, Any]:
        sample = self.data[row]
        if not isinstance(sample, (tuple, list)) or len(sample) != 2:
            got = type(sample).__name__
            raise DataError(f"{self.where}[{row}] must be a pair (image, label), got {got}")
        return sample[0], sample[1]

    def _image(self, image: Any) -> np.ndarray[Any, Any]:
        if self.fits:
            return fit_image(image, self.shape[1])
        pixels, (channels, height, width) = self._pixels(image), self.shape
        if pixels.shape != (height, width, channels) or pixels.dtype != self.dtype:
            raise DataError(
                f"it is (H, W, C) {pixels.shape} of {pixels.dtype}, and the first "
                f"{(height, width, channels)} of {self.dtype}"
            )
        return pixels

    def _pixels(self, image: Any) -> np.ndarray[Any, Any]:
        """(H, W, C) of an image that is not Pillow's."""
        found = torch.as_tensor(image)
        if isinstance(image, Tensor) and found.ndim == 3:
            found = found.permute(1, 2, 0)
        found = found[:, :, None] if found.ndim == 2 else found
        if found.ndim != 3:
            raise DataError(
                f"{self.where}: images must be tensors (C, H, W), arrays (H, W, C) or Pillow's, "
                f"got {type(image).__name__} {tuple(found.shape)}"
            )
        return in_range(found, self.where).numpy()


class _Looks(Dataset[Any]):
    """What a worker gives for a list of rows: `Look`s, and why one of them cannot be read."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __getitem__(self, rows: list[int]) -> tuple[list[Look], str]:
        looks = []
        for row in rows:
            try:
                looks.append(self.samples.look(row))
            except Exception as error:  # whatever the data set does
                return looks, f"{self.samples.where}[{row}] cannot be read: {first_line(error)}"
        return looks, ""


def in_range(images: Tensor, where: str) -> Tensor:
    """`images`, uint8 or float32 in [0, 1]."""
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise DataError(f"{where}: images must be uint8 or floating, got {images.dtype}")
    low, high = (x.item() for x in images.aminmax())
    if not 0 <= low <= high <= 1:
        raise DataError(
            f"{where}: floating images must be in [0, 1], got {low:.3g} to {high:.3g}; the run "
            "normalises them"
        )
    return images.float()
