"""Label quality of a large manifest: `python -m benchmarks.manifest --rows 1000000`.

Writes tiny images (8×8 PNG, the true class in the picture, three labels in ten wrong) and a Parquet
manifest, then times what a training run does with all of them before its first divided epoch:
reading the table, one pass in eval mode, the mixture, the split. Smaller shares of the same rows
show how each grows.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from pyarrow import parquet

import sanm_kernels as sk
from sanm_train import TrainConfig
from sanm_train.train import build

CLASSES = 10
PER_FOLDER = 5000


def write_images(folder: Path, rows: int) -> None:
    """`rows` images, and manifests of all, a half, a quarter and an eighth of them."""
    draws = np.random.default_rng(0)
    true = draws.integers(0, CLASSES, rows)
    wrong = draws.random(rows) < 0.3
    labels = np.where(wrong, (true + draws.integers(1, CLASSES, rows)) % CLASSES, true)
    names = [f"{i // PER_FOLDER:04d}/{i:07d}.png" for i in range(rows)]
    for name, label in zip(names, true, strict=True):
        path = folder / name
        if name.endswith(f"{0:03d}.png"):
            path.parent.mkdir(exist_ok=True)
        pixels = draws.integers(0, 90, (8, 8, 3), dtype=np.uint8)
        pixels[label % 8, label // 8 * 4 : label // 8 * 4 + 4] += 150
        Image.fromarray(pixels).save(path, compress_level=0)
    for part in (1, 2, 4, 8):
        table = pa.table({"path": names[: rows // part], "label": labels[: rows // part]})
        parquet.write_table(table, folder / f"rows{rows // part}.parquet")
    parquet.write_table(
        pa.table({"path": names[:1000], "label": true[:1000]}), folder / "test.parquet"
    )


def measure(folder: Path, rows: int, workers: int) -> dict[str, float]:
    """Seconds of each part, and the peak of the memory in GB (this process; the largest worker)."""
    config = TrainConfig(
        dataset="manifest",
        data_root=str(folder / f"rows{rows}.parquet"),
        test_root=str(folder / "test.parquet"),
        model="small-cnn",
        augmentation="crop",
        image_size=8,
        workers=workers,
        recipe="sanm-dividemix",
        warmup=0,
    )
    found: dict[str, float] = {"rows": rows}

    def lap(name: str) -> None:
        nonlocal start
        found[name] = time.perf_counter() - start
        start = time.perf_counter()

    start = time.perf_counter()
    recipe = build(config).recipe
    lap("table, split into ranks")
    logits = recipe.evaluate(recipe.networks[0], recipe.data.images)
    lap("pass over the images")
    recipe.losses[0] = sk.sample_loss(logits, recipe.data.labels)
    lap("losses")
    # An untrained network's losses say nothing: those of a mixture do as well.
    wrong = torch.rand(rows, generator=torch.Generator().manual_seed(0)) < 0.3
    losses = torch.where(wrong, 2.5 + torch.randn(rows), 0.3 * torch.rand(rows)).clamp_min(0)
    recipe.quality[:] = sk.fit_label_quality(losses, backend="reference").clean_prob
    lap("mixture")
    steps = recipe.plan(0)
    lap("split and steps of an epoch")
    found["steps"] = len(steps)
    for name, who in (("GB", resource.RUSAGE_SELF), ("GB of a worker", resource.RUSAGE_CHILDREN)):
        found[name] = resource.getrusage(who).ru_maxrss / 2**20
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dir", type=Path, help="keep the images here, or use those that are here")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.dir or Path(temporary)
        if not (folder / f"rows{options.rows}.parquet").exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_images(folder, options.rows)
        torch.set_num_threads(1)
        print(f"torch {torch.__version__}, {os.cpu_count()} cores, {options.workers} workers")
        for part in (8, 4, 2, 1):  # the peak of the memory only grows
            found = measure(folder, options.rows // part, options.workers)
            print("; ".join(f"{name} {value:.4g}" for name, value in found.items()), flush=True)


if __name__ == "__main__":
    main()
