"""Steps of scripts as they are, patched, and by hand: `python -m benchmarks.switching`.

What a step of DivideMix and one of SANM do outside the networks, 64 + 64 images of 3×32×32: targets
guessed and sharpened, masking, views mixed, losses and their backward to the logits; the decoder's
loss is left out with the decoder. The script's own functions are those of the example in
examples/dividemix_switch, with OpenCV's resize as scripts have it. Nothing is changed for "patched"
but by `compat.patch`; "by hand" calls this package's functions, as docs/switching.md shows.
"without images": the mixture of the images, which scripts compute in torch and patch does not
touch, is left out.

All ways of a row take turns of a few calls; printed are the medians of the original's seconds and
of the ratios original over ours, turn by turn: of the CPU's seconds, or with --wall of the clock's.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from sklearn.mixture import GaussianMixture
from torch import Tensor

import sanm_kernels as sk
from benchmarks.common import Watch
from sanm_kernels import compat

SCRIPT = Path(__file__).parent.parent / "examples/dividemix_switch/slow_functions.py"
HALF, SIZE, FEATURES, T, LAMBDA_U = 64, 32, (512, 4, 4), 0.5, 25
#: Inputs of the two steps; what a network gives is a leaf where the loss depends on it.
Inputs = types.SimpleNamespace


def script(name: str) -> Any:
    """A copy of the script's functions, its mixture and the loss that it collects."""
    spec = importlib.util.spec_from_file_location(name, SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vars(module)["resize"] = lambda heat, width, height: cv2.resize(heat, (width, height))
    vars(module)["GaussianMixture"] = GaussianMixture
    vars(module)["CE"] = torch.nn.CrossEntropyLoss(reduction="none")
    return module


def inputs(K: int) -> Inputs:
    torch.manual_seed(0)
    n = HALF
    losses = torch.cat([torch.empty(25_000).exponential_(20), 0.5 + 0.15 * torch.randn(25_000)])
    return Inputs(
        K=K,
        views=[torch.rand(n, 3, SIZE, SIZE) for _ in range(8)],  # four of each half
        features=torch.randn(2 * n, *FEATURES).relu(),
        quality=torch.rand(2 * n, 1),
        labels=torch.randint(K, (n,)),
        guesses=[torch.randn(n, K) for _ in range(6)],  # four of u, two of x
        four=torch.randn(4 * n, K, requires_grad=True),
        targets=torch.softmax(torch.randn(4 * n, K), 1),
        twelve=torch.randn(12 * n, K, requires_grad=True),
        losses=(losses.abs() / losses.abs().max()).reshape(-1, 1),
    )


def guessed(x: Inputs) -> tuple[Tensor, Tensor]:
    """Targets of both halves, (n, K) each, as scripts compute them."""
    soft = [torch.softmax(z, dim=1) for z in x.guesses]
    pu = (soft[0] + soft[1] + soft[2] + soft[3]) / 4
    onehot = torch.zeros(HALF, x.K).scatter_(1, x.labels.view(-1, 1), 1)
    w = x.quality[:HALF]
    px = w * onehot + (1 - w) * (soft[4] + soft[5]) / 2
    targets = []
    for p in (px, pu):
        sharp = p ** (1 / T)
        targets.append(sharp / sharp.sum(dim=1, keepdim=True))
    return targets[0].detach(), targets[1].detach()


def mixed(views: list[Tensor], targets: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Images and targets, mixed with a permutation of themselves as scripts do."""
    lam = np.random.beta(4, 4)
    lam = max(lam, 1 - lam)
    images, labels = torch.cat(views, dim=0), torch.cat(targets, dim=0)
    order = torch.randperm(images.size(0))
    image = lam * images + (1 - lam) * images[order]
    return image, lam * labels + (1 - lam) * labels[order]


def loss(m: Any, x: Inputs, logits: Tensor, targets: Tensor) -> Tensor:
    """As scripts have it: the criterion of the two halves and the prior penalty."""
    half = logits.size(0) // 2
    Lx, Lu, weight = m.SemiLoss(LAMBDA_U)(
        logits[:half], targets[:half], logits[half:], targets[half:], 17.5, 10
    )
    prior = torch.ones(x.K) / x.K
    mean = torch.softmax(logits, dim=1).mean(0)
    return Lx + weight * Lu + torch.sum(prior * torch.log(prior / mean))


def dividemix(m: Any, x: Inputs, images: bool = True) -> Any:
    px, pu = guessed(x)
    views = [*x.views[:2], *x.views[4:6]] if images else [x.labels] * 4
    mixture, targets = mixed(views, [px, px, pu, pu])
    total = loss(m, x, x.four, targets)
    return mixture, total.detach(), torch.autograd.grad(total, x.four)[0]


def dividemix_by_hand(m: Any, x: Inputs, images: bool = True) -> Any:
    px, pu = refined(x)
    lam, order = np.random.beta(4, 4), torch.randperm(4 * HALF)
    lam = max(lam, 1 - lam)
    views = [*x.views[:2], *x.views[4:6]]
    mixture = sk.mixup_views(views, lam, order) if images else None
    return mixture, *by_hand(x.four, torch.cat([px, px, pu, pu]), lam, order)


def refined(x: Inputs) -> tuple[Tensor, Tensor]:
    pu = sk.refine_targets(x.guesses[:4], temperature=T)
    px = sk.refine_targets(
        x.guesses[4:], labels=x.labels, clean_prob=x.quality[:HALF], temperature=T
    )
    return px, pu


def by_hand(logits: Tensor, targets: Tensor, lam: float, order: Tensor) -> tuple[Tensor, Tensor]:
    found = sk.masked_loss(
        logits, targets, mix=(lam, order), num_labeled=len(logits) // 2,
        unlabeled_weight=LAMBDA_U * 7.5 / 16, prior_weight=1.0,
    )  # fmt: skip
    return found.total.detach(), torch.autograd.grad(found.total, logits)[0]


def sanm(m: Any, x: Inputs, images: bool = True) -> Any:
    px, pu = guessed(x)
    targets = torch.cat([px, pu])
    both = torch.cat([x.views[0], x.views[4]])
    most, least, softened = m.attention_erase_map(both, x.features, x.quality, targets.clone())
    hidden = [[most[:HALF], least[:HALF]], [most[HALF:], least[HALF:]]]
    soft = softened[:HALF], softened[HALF:]
    views = [*x.views[:4], *hidden[0], *x.views[4:], *hidden[1]]
    mixture, labels = mixed(
        views if images else [x.labels] * 12,
        [px, px, px, px, soft[0], soft[0], pu, pu, pu, pu, soft[1], soft[1]],
    )
    total = loss(m, x, x.twelve, labels)
    return mixture, total.detach(), torch.autograd.grad(total, x.twelve)[0]


def sanm_by_hand(m: Any, x: Inputs, images: bool = True) -> Any:
    px, pu = refined(x)
    targets = torch.cat([px, pu])
    both = torch.cat([x.views[0], x.views[4]])
    found = sk.masked_forward(
        x.features, targets, x.quality, images=both, config=sk.MaskConfig.official_cifar()
    )
    most, least, softened = found.images_max, found.images_min, found.targets_max
    hidden = [[most[:HALF], least[:HALF]], [most[HALF:], least[HALF:]]]
    soft = softened[:HALF], softened[HALF:]
    lam, order = np.random.beta(4, 4), torch.randperm(12 * HALF)
    lam = max(lam, 1 - lam)
    views = [*x.views[:4], *hidden[0], *x.views[4:], *hidden[1]]
    mixture = sk.mixup_views(views, lam, order) if images else None
    labels = torch.cat([px, px, px, px, soft[0], soft[0], pu, pu, pu, pu, soft[1], soft[1]])
    return mixture, *by_hand(x.twelve, labels, lam, order)


def semi_loss(m: Any, x: Inputs, apart: bool = False) -> Any:
    z, t, half = x.four, x.targets, 2 * HALF
    halves = (z[:half] * 1.0, z[half:] * 1.0) if apart else (z[:half], z[half:])
    Lx, Lu, weight = m.SemiLoss(LAMBDA_U)(halves[0], t[:half], halves[1], t[half:], 17.5, 10)
    return torch.autograd.grad(Lx + weight * Lu, z)


def neg_entropy(m: Any, x: Inputs) -> Any:
    return torch.autograd.grad(m.NegEntropy()(x.four), x.four)


def collection(m: Any, x: Inputs) -> Any:
    with torch.no_grad():
        return m.CE(x.guesses[0], x.labels)


def mixture(m: Any, x: Inputs) -> Any:
    found = m.GaussianMixture(n_components=2, max_iter=10, tol=1e-2, reg_covar=5e-4)
    found.fit(x.losses)
    return found.predict_proba(x.losses)[:, found.means_.argmin()]


Step = Callable[..., Any]
ROWS: dict[str, tuple[Step, Step | None]] = {
    "DivideMix step": (dividemix, dividemix_by_hand),
    "DivideMix step without images": (
        lambda m, x: dividemix(m, x, False), lambda m, x: dividemix_by_hand(m, x, False)
    ),
    "SANM step": (sanm, sanm_by_hand),
    "SANM step without images": (
        lambda m, x: sanm(m, x, False), lambda m, x: sanm_by_hand(m, x, False)
    ),
    "SemiLoss": (semi_loss, None),
    "SemiLoss, logits not of one tensor": (lambda m, x: semi_loss(m, x, True), None),
    "NegEntropy": (neg_entropy, None),
    "losses of a batch collected": (collection, None),
    "an epoch's GaussianMixture": (mixture, None),
}  # fmt: skip


def compare(ways: dict[str, Callable[[], Any]], seconds: float, clock: Callable[[], float]) -> Any:
    """Median seconds of the first, and of its ratio to each of the others."""
    first, *others = ways
    once = {}
    for name, call in ways.items():
        call()
        start = clock()
        call()
        once[name] = max(clock() - start, 1e-5)
    repeats = {name: max(1, min(round(5e-3 / s), 50)) for name, s in once.items()}
    turns: dict[str, list[float]] = {name: [] for name in ways}
    end = time.perf_counter() + seconds
    while len(turns[first]) < 9 or time.perf_counter() < end:
        for name, call in ways.items():
            call()  # brings its code back into the caches
            start = clock()
            for _ in range(repeats[name]):
                call()
            turns[name].append((clock() - start) / repeats[name])
    ratios = {
        name: statistics.median(a / b for a, b in zip(turns[first], turns[name], strict=True))
        for name in others
    }
    return statistics.median(turns[first]), ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each row")
    parser.add_argument("--wall", action="store_true")
    parser.add_argument("--classes", type=int, nargs="*", default=[10, 100])
    parser.add_argument("--only", default="", help="rows whose names have this in them")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.perf_counter if options.wall else time.process_time
    print(f"torch {torch.__version__}, {options.threads} threads, {HALF} + {HALF} images")
    watch = Watch(despite=True)
    watch.keeps("before the run")
    theirs, patched = script("theirs"), script("patched")
    print(compat.patch(patched, verbose=False))
    for K in options.classes:
        x = inputs(K)
        print(f"\nK = {K:<38}{'original':>12}{'patched':>10}{'by hand':>10}")
        for name, (step, hand) in ROWS.items():
            if options.only not in name:
                continue
            ways = {"original": partial(step, theirs, x), "patched": partial(step, patched, x)}
            if hand is not None:
                ways["by hand"] = partial(hand, patched, x)
            seconds, ratios = compare(ways, options.seconds, clock)
            watch.keeps(name)
            row = "".join(
                f"{ratios[k]:10.2f}" if k in ratios else "" for k in ("patched", "by hand")
            )
            print(f"{name:42}{1e3 * seconds:9.2f} ms{row}", flush=True)


if __name__ == "__main__":
    main()
