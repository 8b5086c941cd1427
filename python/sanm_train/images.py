"""Where images come from: a tensor on the training device, or files that worker processes read."""

from __future__ import annotations

import hashlib
import os
import stat
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from .extra import extra
from .files import first_line, open_shown, shown

REPORTED = 20  # corrupt images that are named; further ones are only counted
#: Formats that are read, by their content. Of Pillow's others, some start programs (EPS).
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MOST_PIXELS = 2**27  # of an image, checked before it is decoded
#: EXIF orientation → the operation that turns the image upright.
UPRIGHT = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


class Images:
    """N images that are streamed in batches, in any order.

    Attributes:
        shape: (C, H, W) of every image that `stream` gives.
        paths: the file of image i is str(paths[i]); None where they come from no file.
        corrupt: positions of the images that could not be read and were replaced.
    """

    shape: tuple[int, int, int]
    paths: Sequence[Any] | None = None

    def __init__(self) -> None:
        self.corrupt: set[int] = set()

    def __len__(self) -> int:
        raise NotImplementedError

    def stream(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """For each of `batches`, positions (B,) int64, the images (B, C, H, W) in its order:
        float32 in [0, 1], on the device. `batches` may be read ahead of what is given."""
        raise NotImplementedError

    def select(self, index: Tensor) -> Images:
        """The images at `index` (M,) alone, in its order."""
        raise NotImplementedError

    def digest(self) -> str:
        """Of the paths, or of the pixels where they are held in memory, in their order."""
        raise NotImplementedError


class TensorImages(Images):
    """Images (N, C, H, W), uint8 or floating in [0, 1], all held on one device."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.images = images
        channels, height, width = images.shape[1:]
        self.shape = (channels, height, width)

    def __len__(self) -> int:
        return len(self.images)

    def stream(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        for index in batches:
            images = self.images[index.to(self.images.device, non_blocking=True)]
            yield images.float().div_(255) if images.dtype == torch.uint8 else images

    def select(self, index: Tensor) -> TensorImages:
        return TensorImages(self.images[index.to(self.images.device)])

    def digest(self) -> str:
        parts = self.images.split(4096)
        return digest(x.cpu().contiguous().view(torch.uint8).numpy() for x in parts)


class ImageFiles(Images):
    """Image files of the formats in `FORMATS`, as RGB; how is said at `read_image`.

    The shorter side is resized to `size`, of which the centre is kept. An image that cannot be read
    is replaced by mid-grey: its path and the reason are given in one warning, its position goes to
    `corrupt`. Every stream starts its own workers, which end with it.

    Args:
        paths: a list or array of strings (N,), kept as one Arrow array: a million Python strings
            would be copied into every worker as it touches their reference counts.
        size: side of the images.
        device: where batches are sent.
        workers: processes that read; 0: the training process itself.
    """

    def __init__(
        self, paths: Any, size: int, *, device: str | torch.device = "cpu", workers: int = 0
    ) -> None:
        super().__init__()
        with extra():
            import PIL.Image  # noqa: F401  (if missing, not the fault of every single image)
            import pyarrow as pa
        strings = pa.large_string()
        if not isinstance(paths, pa.Array):
            paths = list(paths)
            try:
                paths = pa.array(paths, strings)
            except UnicodeEncodeError:
                paths = pa.array([shown(path) for path in paths], strings)
        self.paths: Any = paths.cast(strings)
        self.shape = (3, size, size)
        self.device, self.workers = torch.device(device), workers

    def __len__(self) -> int:
        return len(self.paths)

    def stream(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        loader = torch.utils.data.DataLoader(
            _Files(self.paths, self.shape[1]),
            batch_size=None,  # an item is a batch
            sampler=(index.tolist() for index in batches),
            num_workers=self.workers,
            collate_fn=_as_it_is,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # or it would draw from the global state
        )
        for pixels, faults in loader:
            for position, reason in faults:
                self._report(position, reason)
            images = pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
            yield images.float().div_(255)

    def select(self, index: Tensor) -> ImageFiles:
        paths = self.paths.take(index.cpu().numpy())
        return ImageFiles(paths, self.shape[1], device=self.device, workers=self.workers)

    def digest(self) -> str:
        chunks = range(0, len(self), 2**16)
        return digest("\0".join(self.paths[i : i + 2**16].to_pylist()).encode() for i in chunks)

    def _report(self, position: int, reason: str) -> None:
        if position in self.corrupt:
            return
        self.corrupt.add(position)
        if len(self.corrupt) <= REPORTED:
            warnings.warn(f"{self.paths[position]} was replaced by grey: {reason}", stacklevel=3)
        elif len(self.corrupt) == REPORTED + 1:
            warnings.warn("further images that cannot be read are only counted", stacklevel=3)


class _Files(torch.utils.data.Dataset[Any]):
    """What a worker gives for a list of positions: uint8 (B, size, size, 3), and which images
    could not be read, why."""

    def __init__(self, paths: Any, size: int) -> None:
        self.paths, self.size = paths, size

    def __getitem__(self, positions: list[int]) -> tuple[Tensor, list[tuple[int, str]]]:
        pixels = np.full((len(positions), self.size, self.size, 3), 128, np.uint8)
        faults = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata: what matters raises
            for row, position in enumerate(positions):
                try:
                    pixels[row] = read_image(str(self.paths[position]), self.size)
                except Exception as error:  # what a broken file raises depends on where it breaks
                    faults.append((position, first_line(error)))
        return torch.from_numpy(pixels), faults


def read_image(path: str, size: int) -> np.ndarray[Any, Any]:
    """The image in a file as uint8 (size, size, 3): upright, its first frame, on white where it is
    transparent.

    Grey images of more than 8 bits are scaled by the range that their values fit into, the first
    of [0, 1] (floating point only), [0, 2⁸), [0, 2¹⁶) (always, of 16 bits) and [0, 2³²).

    Raises:
        OSError: not a regular file, or of a format that is not in `FORMATS`.
        ValueError: more than `MOST_PIXELS`, or values that are negative or not finite.
        Exception: whatever else Pillow raises where a file is broken.
    """
    with extra():
        from PIL import Image, ImageOps
    with _regular(path) as opened, _identified(opened) as file:
        image: Image.Image = file
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width}×{image.height} pixels, more than {MOST_PIXELS:,}")
        image.draft(None, (2 * size, 2 * size))  # JPEG: decoded at a fraction of its resolution
        if (turn := UPRIGHT.get(_orientation(image))) is not None:
            image = image.transpose(Image.Transpose[turn])
        if image.mode.startswith("I") or image.mode == "F":  # Pillow would cut these off at 255
            image = Image.fromarray(_to_8_bits(np.asarray(image)))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
        return np.asarray(image)


def digest(parts: Iterable[Any]) -> str:
    """SHA-256 of buffers, one after another."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
        sha.update(b"\0")
    return sha.hexdigest()


def unreadable(images: Images, most: int) -> tuple[int, list[tuple[str, str]]]:
    """How many of the images were looked at, up to `most` of them evenly spread, and the paths of
    those that cannot be read, each with the reason."""
    if not isinstance(images, ImageFiles):
        return 0, []
    step = -(-len(images) // most)
    positions = list(range(0, len(images), max(step, 1)))
    _, faults = _Files(images.paths, 1)[positions]
    return len(positions), [(str(images.paths[position]), reason) for position, reason in faults]


def _regular(path: str) -> BinaryIO:
    """An open regular file; a pipe or a device, which might never give anything, is refused."""
    opened = open_shown(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise OSError("not a regular file")
    return os.fdopen(opened, "rb")


def _identified(opened: BinaryIO) -> Any:
    """An image that is not decoded yet."""
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(opened, formats=FORMATS)
    except UnidentifiedImageError:  # its message names what was opened, not the file
        raise OSError(f"cannot identify it as one of {', '.join(FORMATS)}") from None


def _orientation(image: Any) -> Any:
    try:
        return image.getexif().get(0x0112)
    except Exception:  # broken metadata do not make an image unreadable
        return None


def _to_8_bits(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Grey values of 16 or 32 bits as uint8, as `read_image` says."""
    low, high = values.min(), values.max()
    if not (np.isfinite(high) and low >= 0):
        raise ValueError(f"grey values from {low} to {high}; expected finite ones from 0 on")
    if values.dtype.kind == "f" and high <= 1:
        return np.rint(values * 255).astype(np.uint8)
    if high < 2**8 and values.dtype.itemsize > 2:
        return values.astype(np.uint8)
    scale = 2**8 if high < 2**16 else 2**24
    return (values // scale).clip(0, 255).astype(np.uint8)


def _as_it_is(batch: Any) -> Any:
    return batch
