"""Where images come from: a tensor on the training device, or files that worker processes read."""

from __future__ import annotations

import copy
import hashlib
import io
import os
import stat
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any

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


class ReadImages(Images):
    """Images that worker processes read, each whenever it is needed.

    One that cannot be read is replaced by mid-grey: its path and the reason are given in one
    warning, its position goes to `corrupt`. Every stream starts its own workers, which end with it.

    Attributes:
        paths: what the images are called (N,), an Arrow array: a million Python strings would be
            copied into every worker as it touches their reference counts.
        rows: (N,) which of the images that there were at first these are.
        dtype: of what `read` gives.
        device: where batches are sent.
        workers: processes that read; 0: the training process itself.
    """

    paths: Any
    dtype: Any = np.uint8

    def __init__(
        self,
        paths: Any,
        shape: tuple[int, int, int],
        device: str | torch.device,
        workers: int,
    ) -> None:
        super().__init__()
        self.paths, self.rows, self.shape = paths, torch.arange(len(paths)), shape
        self.device, self.workers = torch.device(device), workers

    def read(self, position: int) -> np.ndarray[Any, Any]:
        """One image (H, W, C), uint8 or floating in [0, 1]."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.rows)

    def stream(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        loader = torch.utils.data.DataLoader(
            _Batches(self),
            batch_size=None,  # an item is a batch
            sampler=(index.tolist() for index in batches),
            num_workers=self.workers,
            collate_fn=as_it_is,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # or it would draw from the global state
        )
        for pixels, faults in loader:
            for position, reason in faults:
                self._report(position, reason)
            images = pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
            yield images.float().div_(255) if images.dtype == torch.uint8 else images

    def select(self, index: Tensor) -> ReadImages:
        part, index = copy.copy(self), index.cpu()
        part.paths, part.rows = self.paths.take(index.numpy()), self.rows[index]
        part.corrupt = set()
        return part

    def _report(self, position: int, reason: str) -> None:
        if position in self.corrupt:
            return
        self.corrupt.add(position)
        if len(self.corrupt) <= REPORTED:
            warnings.warn(f"{self.paths[position]} was replaced by grey: {reason}", stacklevel=3)
        elif len(self.corrupt) == REPORTED + 1:
            warnings.warn("further images that cannot be read are only counted", stacklevel=3)


class ImageFiles(ReadImages):
    """Image files of the formats in `FORMATS`, as RGB; how is said at `read_image`.

    The shorter side is resized to `size`, of which the centre is kept.

    Args:
        paths: a list or Arrow array of strings (N,).
        size: side of the images.
        files: the files' bytes (N,), or in their place a path, in any sequence; default: what lies
            at `paths`.
        device: where batches are sent.
        workers: processes that read; 0: the training process itself.
    """

    def __init__(
        self,
        paths: Any,
        size: int,
        *,
        files: Sequence[bytes | str] | None = None,
        device: str | torch.device = "cpu",
        workers: int = 0,
    ) -> None:
        with extra():
            import PIL.Image  # noqa: F401  (if missing, not the fault of every single image)
            import pyarrow as pa
        strings = pa.large_string()
        if not isinstance(paths, (pa.Array, pa.ChunkedArray)):
            paths = list(paths)
            try:
                paths = pa.array(paths, strings)
            except UnicodeEncodeError:
                paths = pa.array([shown(path) for path in paths], strings)
        paths = paths.cast(strings)
        super().__init__(paths, (3, size, size), device, workers)
        self.files = files

    def read(self, position: int) -> np.ndarray[Any, Any]:
        return read_image(self._file(position), self.shape[1])

    def digest(self) -> str:
        if self.files is not None:
            files = (self._file(position) for position in range(len(self)))
            return digest(x.encode() if isinstance(x, str) else x for x in files)
        chunks = range(0, len(self), 2**16)
        return digest("\0".join(self.paths[i : i + 2**16].to_pylist()).encode() for i in chunks)

    def _file(self, position: int) -> bytes | str:
        if self.files is None:
            return str(self.paths[position])
        return self.files[int(self.rows[position])]


class _Batches(torch.utils.data.Dataset[Any]):
    """What a worker gives for a list of positions: pixels (B, H, W, C), and which images could not
    be read, why."""

    def __init__(self, images: ReadImages) -> None:
        self.images = images

    def __getitem__(self, positions: list[int]) -> tuple[Tensor, list[tuple[int, str]]]:
        channels, height, width = self.images.shape
        grey = 128 if self.images.dtype == np.uint8 else 0.5
        shape = (len(positions), height, width, channels)
        pixels = np.full(shape, grey, self.images.dtype)
        faults = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata: what matters raises
            for row, position in enumerate(positions):
                try:
                    pixels[row] = self.images.read(position)
                except Exception as error:  # what a broken file raises depends on where it breaks
                    faults.append((position, first_line(error)))
        return torch.from_numpy(pixels), faults


def read_image(file: str | bytes, size: int) -> np.ndarray[Any, Any]:
    """The image in a file, given by its path or its bytes, as uint8 (size, size, 3).

    Raises:
        OSError: not a regular file, or of a format that is not in `FORMATS`.
        ValueError, Exception: as `fit_image`, and whatever else Pillow raises where a file is
            broken.
    """
    opened = io.BytesIO(file) if isinstance(file, bytes) else _regular(file)
    with opened, _identified(opened) as image:
        return fit_image(image, size)


def fit_image(image: Any, size: int) -> np.ndarray[Any, Any]:
    """An image of Pillow's as uint8 (size, size, 3): upright, its first frame, on white where it is
    transparent.

    Grey images of more than 8 bits are scaled by the range that their values fit into, the first
    of [0, 1] (floating point only), [0, 2⁸), [0, 2¹⁶) (always, of 16 bits) and [0, 2³²).

    Raises:
        ValueError: more than `MOST_PIXELS`, or values that are negative or not finite.
    """
    with extra():
        from PIL import Image, ImageOps
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
    part = images.select(torch.arange(0, len(images), max(step, 1)))
    part.shape = (3, 1, 1)  # the size matters little to what can be read
    _, faults = _Batches(part)[list(range(len(part)))]
    return len(part), [(str(part.paths[position]), reason) for position, reason in faults]


def _regular(path: str) -> IO[bytes]:
    """An open regular file; a pipe or a device, which might never give anything, is refused."""
    opened = open_shown(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise OSError("not a regular file")
    return os.fdopen(opened, "rb")


def _identified(opened: IO[bytes]) -> Any:
    """An image that is not decoded yet."""
    with extra():
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


def as_it_is(batch: Any) -> Any:
    """For a loader whose items are whole batches."""
    return batch
