"""Where images come from: a tensor on the training device, or files that worker processes read."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .extra import extra

REPORTED = 20  # corrupt images that are named; further ones are only counted


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


class ImageFiles(Images):
    """Image files of any format that Pillow reads, as RGB.

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
        self.paths: Any = (
            paths.cast(strings) if isinstance(paths, pa.Array) else pa.array(list(paths), strings)
        )
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
                    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                    faults.append((position, reason))
        return torch.from_numpy(pixels), faults


def read_image(path: str, size: int) -> np.ndarray[Any, Any]:
    """The image in a file as uint8 (size, size, 3): upright, its first frame, on white where it is
    transparent; whatever Pillow raises where it cannot be read."""
    with extra():
        from PIL import Image, ImageOps
    with Image.open(path) as file:
        image: Image.Image = file
        image.draft(None, (2 * size, 2 * size))  # JPEG: decoded at a fraction of its resolution
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):  # 16 bits, of which converting would keep the lower ones
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
        return np.asarray(image)


def _as_it_is(batch: Any) -> Any:
    return batch
