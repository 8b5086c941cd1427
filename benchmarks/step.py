"""What of a training step is spent outside the networks: `python -m benchmarks.step`.

Real steps of sanm-dividemix, done by the training loop: on the digits with the default settings,
and on random 32×32 images with those of the preset cifar10 (PreAct ResNet-18), but for the batch
size. The label quality is drawn at random, so that half of the samples count as labelled; what is
done once in an epoch (evaluation, mixture) is left out. Each moment of a step belongs to one part:

- networks: forward of both networks and of the decoder; backward, but for our functions' share;
- optimizer: its step;
- our functions: every call of one, checks of its arguments included, and its node of the backward;
- augmentation, loading: the views and the images they are made of;
- rest: what is left, in the recipe, the loop and this script's clock.

The figures are medians over the steps, for each row its own. CPU only; nothing is written.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

import sanm_kernels as sk
from benchmarks.common import Watch
from sanm_train import RECIPES, Recipe, TrainConfig
from sanm_train.config import read_preset
from sanm_train.data import in_memory
from sanm_train.loop import Loop, launched
from sanm_train.train import build, seed_everything

NETWORKS, OPTIMIZER, OURS, VIEWS, REST = PARTS = (
    "networks", "optimizer", "our functions", "augmentation, loading", "rest"
)  # fmt: skip
CALLS = ("masked_forward", "mixup_views", "refine_targets", "masked_loss", "reconstruction_loss")
SKIPPED = 2  # steps that come first


class Clock:
    """Divides time among PARTS: what was entered last and not left yet gets it.

    On a GPU every part ends when the device has done it, which makes steps longer than they are.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.wait = torch.cuda.synchronize if device.startswith("cuda") else None
        self.spent = dict.fromkeys(PARTS, 0.0)
        self.inside, self.since = [REST], time.perf_counter()
        self.watched: list[tuple[Any, str, Any]] = []

    def lap(self) -> None:
        if self.wait is not None:
            self.wait()
        now = time.perf_counter()
        self.spent[self.inside[-1]] += now - self.since
        self.since = now

    def enter(self, part: str) -> None:
        self.lap()
        self.inside.append(part)

    def leave(self) -> None:
        self.lap()
        self.inside.pop()

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose time is that of `part`, as is that of our result's backward."""

        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            self.enter(part)
            result = function(*arguments, **options)
            self.leave()
            value = result.total if isinstance(result, sk.MaskedLoss) else result
            node = value.grad_fn if part == OURS and isinstance(value, Tensor) else None
            if node is not None:
                node.register_prehook(lambda gradients: self.enter(OURS))
                node.register_hook(lambda inputs, outputs: self.leave())
            return result

        return call

    def watch(self, part: str, owner: Any, *names: str) -> None:
        for name in names:
            self.watched.append((owner, name, getattr(owner, name)))
            setattr(owner, name, self.timed(part, getattr(owner, name)))

    def watch_all(self) -> None:
        """What does not belong to one recipe."""
        self.watch(OURS, sk, *CALLS)
        self.watch(NETWORKS, torch.Tensor, "backward")

    def release(self) -> None:
        """Leave what was watched as it was."""
        for owner, name, original in reversed(self.watched):
            setattr(owner, name, original)


def random_images(batch: int, steps: int) -> Recipe:
    """Held in memory, about twice as many as the steps need."""
    settings = {"dataset": "digits", "batch_size": batch, "warmup": 0, "ramp": 0.0, "device": "cpu"}
    config = TrainConfig(**read_preset("cifar10") | settings)
    seed_everything(config.seed)
    pixels = torch.randint(256, (2 * batch * (steps + SKIPPED), 3, 32, 32), dtype=torch.uint8)
    given = (pixels, torch.randint(10, (len(pixels),)))
    data = in_memory("random", given, given, "cpu", num_classes=10)
    return RECIPES[config.recipe](config, data)


def measure(clock: Clock, recipe: Recipe, steps: int) -> list[dict[str, float]]:
    """The seconds of each part in each of so many steps."""
    recipe.quality, found = torch.rand_like(recipe.quality), []
    plan, images = recipe.plan(0)[: steps + SKIPPED], recipe.data.images
    recipe.begin_epoch, recipe.plan = (lambda epoch: None), (lambda epoch: plan)
    clock.watch(VIEWS, recipe.augment, "weak", "auto", "strong")
    for module in [m for net in recipe.networks for m in (net.model, net.decoder)]:
        if module is not None:
            clock.watch(NETWORKS, module, "forward")
    for optimizer in recipe.optimizers:
        clock.watch(OPTIMIZER, optimizer, "step")

    def stream(batches: Iterable[Tensor]) -> Iterator[Tensor]:
        each = type(images).stream(images, batches)
        yield from iter(clock.timed(VIEWS, lambda: next(each, None)), None)

    images.stream = stream
    with launched(recipe.config) as fabric:
        for _ in Loop(fabric, recipe.config, recipe).steps():
            clock.lap()
            found.append(clock.spent)
            clock.spent = dict.fromkeys(PARTS, 0.0)
    return found[SKIPPED:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--batch", type=int, default=32, help="32×32 images a step, half of them "
                        "labelled (default: 32; the preset's are 128)")  # fmt: skip
    parser.add_argument("--steps", type=int, default=6, help="with these; the digits: six times")
    parser.add_argument("--threads", type=int, help="default: torch's")
    options = parser.parse_args()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    watch = Watch(despite=True)
    watch.keeps("before the run")
    clock, steps = Clock(), options.steps
    clock.watch_all()
    for name, recipe, number in (
        ("digits", build(TrainConfig(warmup=0, ramp=0.0, device="cpu")).recipe, 6 * steps),
        ("random 32×32 images", random_images(options.batch, steps), steps),
    ):
        found, config = measure(clock, recipe, number), recipe.config
        print(f"\n{name}, {config.model}, {config.batch_size} samples a step, {len(found)} steps")
        for parts in (*((part,) for part in PARTS), (OURS, REST)):
            seconds = [sum(step[part] for part in parts) for step in found]
            shares = [s / sum(step.values()) for s, step in zip(seconds, found, strict=True)]
            milliseconds, share = 1e3 * statistics.median(seconds), statistics.median(shares)
            print(f"  {' + '.join(parts):22}{milliseconds:10.2f} ms{share:9.2%}", flush=True)
        watch.keeps(name)


if __name__ == "__main__":
    main()
