"""The trained network of a run, without its data: as a module, for predictions, and exported."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import checkpoint
from .config import TrainConfig
from .errors import CheckpointError, DataError
from .files import inert, prepare_folder, printable, replacing, shown
from .given import Handed, handed
from .images import ImageFiles
from .models import MODELS
from .readers import images_below
from .record import read_record, versions
from .sanm import SANM
from .settings import import_modules

GREY = (0.299, 0.587, 0.114)  # luma of red, green and blue
BATCH = 128
PROGRAM, WEIGHTS, FACTS = "model.pt2", "weights-{}.pt", "export.json"


class Trained(nn.Module):
    """The networks of a run as one: images (B, C, H, W) in [0, 1] to logits (B, K), the mean of the
    networks'. It normalises the images itself.

    Attributes: networks; mean and std (C, 1, 1) of the pixels; image_shape (C, H, W); classes, the
    names of the K classes, which are numbers where they have none; model, what the networks are
    called, and their settings.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, networks: Sequence[SANM], facts: dict[str, Any]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.register_buffer("mean", torch.tensor(facts["mean"])[:, None, None])
        self.register_buffer("std", torch.tensor(facts["std"])[:, None, None])
        self.image_shape, self.read_shape = tuple(facts["image_shape"]), tuple(facts["read_shape"])
        self.model, self.settings = facts["model"], facts["settings"]
        names = facts["classes"] or range(facts["num_classes"])
        self.classes = [str(name) for name in names]

    def forward(self, images: Tensor) -> Tensor:
        images = (images - self.mean) / self.std
        return torch.stack([network(images) for network in self.networks]).mean(0)

    def prepare(self, images: Tensor) -> Tensor:
        """Images (B, 3, h, w) in [0, 1], red, green and blue, as `forward` takes them: of as many
        channels, and of its size, cut from the centre."""
        channels, height, width = self.image_shape
        if channels == 1:
            images = (images * images.new_tensor(GREY)[:, None, None]).sum(1, keepdim=True)
        down, right = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
        return images[:, :, down : down + height, right : right + width]


class Prediction(NamedTuple):
    """The most probable class of an image and its probability; None where it cannot be read."""

    path: str
    name: str | None = None
    probability: float | None = None


def load_network(run: str | Path, device: str = "cpu", *, model: Any = None) -> Trained:
    """The networks of the last checkpoint of `run`, in eval mode; the data set is not needed. A
    `model` that `train` was handed is handed over again.

    Raises:
        OSError: there is no checkpoint, or it or the run's record cannot be read.
        ConfigError: the device cannot be used.
    """
    saved = checkpoint.load(Path(run))
    if saved is None:
        raise CheckpointError(f"run must be a folder with a checkpoint, got {run}")
    device = TrainConfig(device=device).device
    facts = read_record(run)["network"]
    import_modules(facts["imports"])
    channels, height, width = facts["image_shape"]
    networks = []
    for state in saved["averages"] or saved["networks"]:
        with handed({"model": facts["model"]}, Handed(model)):
            plain = MODELS.build(
                facts["model"], channels, facts["num_classes"], (height, width), **facts["settings"]
            )
        # an average's names begin with "module."; the decoder, which only training needs, is left
        named = {name.removeprefix("module."): value for name, value in state.items()}
        own = {k.removeprefix("model."): x for k, x in named.items() if k.startswith("model.")}
        checkpoint.load_module(plain, own)
        networks.append(SANM(plain))
    return Trained(networks, facts).to(device).eval()


@torch.no_grad()
def predict(
    run: str | Path,
    images: Iterable[str | Path],
    device: str = "cpu",
    workers: int = 0,
    *,
    model: Any = None,
) -> Iterator[Prediction]:
    """What the trained network makes of image files, and of all below folders, in their order.

    Images are read as for the test of the run: the shorter side resized, the centre kept. One that
    cannot be read is named in a warning.

    Raises:
        OSError: as `load_network`; a path is neither a file nor a folder; a folder has no image.
    """
    network = load_network(run, device, model=model)
    paths = [shown(path) for path in _files(images)]
    side = max(network.read_shape[1:])
    files = ImageFiles(paths, side, device=network.mean.device, workers=workers)
    parts = torch.arange(len(files)).split(BATCH)
    for part, batch in zip(parts, files.stream(parts), strict=True):
        probability, label = network(network.prepare(batch)).softmax(1).max(1)
        found = zip(part.tolist(), label.tolist(), probability.tolist(), strict=True)
        for i, k, p in found:
            known = i not in files.corrupt
            yield Prediction(paths[i], network.classes[k], p) if known else Prediction(paths[i])


def write_predictions(
    run: str | Path,
    images: Sequence[str | Path],
    out: str | Path | None = None,
    device: str = "cpu",
    workers: int = 0,
) -> None:
    """`predict` as CSV, with the columns path, class and probability, to `out` or to stdout. Text
    that a spreadsheet would run has an apostrophe in front."""
    if out is not None and not Path(out).parent.is_dir():
        raise FileNotFoundError(f"out: no such folder, {Path(out).parent}")
    with (
        nullcontext() if out is None else replacing(out) as path,
        nullcontext(sys.stdout) if path is None else path.open("w", encoding="utf-8") as file,
    ):
        cell = printable if file.isatty() else str
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("path", "class", "probability"))
        for row in predict(run, images, device, workers):
            shown = "" if row.probability is None else f"{row.probability:.6g}"
            writer.writerow((cell(inert(row.path)), cell(inert(row.name or "")), shown))


def export(run: str | Path, out: str | Path | None = None, *, model: Any = None) -> Path:
    """Write the trained network of `run` for use without this package, into `out` (default: the
    folder export in `run`), and return the folder:

    - model.pt2: a `torch.export` program of all networks and the normalisation: float32 images
      (B, C, H, W) in [0, 1], B ≥ 1, to logits (B, K), the mean of the networks'.
    - weights-1.pt, one for each network: its plain state dict, which takes normalised images.
    - export.json: the model's name and settings, input size, normalisation and classes.

    Raises:
        OSError: as `load_network`, or `out` cannot be written.
    """
    network = load_network(run, model=model)
    folder = prepare_folder(Path(run) / "export" if out is None else out)
    weights = []
    for number, each in enumerate(network.networks, 1):
        weights.append(WEIGHTS.format(number))
        with replacing(folder / weights[-1]) as path, path.open("wb") as file:
            torch.save(each.get_submodule("model").state_dict(), file)
    batch = torch.export.Dim("batch", min=1)
    example = torch.zeros(2, *network.image_shape)  # 1 would be taken for a constant
    program = torch.export.export(network, (example,), dynamic_shapes={"images": {0: batch}})
    buffer = io.BytesIO()  # on a full disk torch's writer would end the process
    torch.export.save(program, buffer)
    with replacing(folder / PROGRAM) as path:
        path.write_bytes(buffer.getbuffer())
    height, width = network.image_shape[1:]
    facts = {
        "program": PROGRAM,
        "weights": weights,
        "model": network.model,
        "settings": network.settings,
        "input": {
            "shape": ["batch", *network.image_shape],
            "dtype": "float32",
            "range": [0, 1],
            "resize": f"shorter side to {max(network.read_shape[1:])}, then the centre "
            f"{height} × {width}",
            "mean": network.mean.flatten().tolist(),
            "std": network.std.flatten().tolist(),
            "normalised_by": "the program; the weights alone take (image − mean) / std",
        },
        "output": "logits (batch, classes)",
        "classes": network.classes,
        "versions": versions(),
    }
    with replacing(folder / FACTS) as path:
        path.write_text(json.dumps(facts, indent=1, ensure_ascii=False), encoding="utf-8")
    return folder


def _files(images: Iterable[str | Path]) -> Iterator[str]:
    for path in images:
        if Path(path).is_dir():
            below = list(images_below(Path(path)))
            if not below:
                raise DataError(f"{path} holds no image")
            yield from below
        elif Path(path).exists():
            yield str(path)
        else:
            raise DataError(f"{path}: no such file or folder")
