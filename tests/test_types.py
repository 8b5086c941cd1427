"""A user's scripts under mypy and pyright: right uses pass, and every wrong one is reported."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from test_docs import PAGES, code

import sanm_kernels
import sanm_train
from sanm_kernels.masking import Options, masked_forward

#: What a user does with every public function and class, and what checkers know of the results.
RIGHT = """
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import sanm_kernels as sk
from sanm_kernels import compat
from sanm_train import SANM, Batch, Decoder, TrainConfig

features, labels, clean_prob = torch.rand(2, 4, 3, 3), torch.arange(2), torch.rand(2)
images, head = torch.rand(2, 3, 9, 9), nn.Linear(4, 10)


def mask(images: Tensor, **options: Any) -> sk.MaskedForward[Tensor]:
    masked: sk.MaskedForward[Tensor] = sk.masked_forward(
        features, labels, clean_prob, images=images, num_classes=10, **options
    )
    return masked


def areas(masked: sk.MaskedForward) -> Tensor:
    sides: Tensor = masked.box_max[:, 2:] - masked.box_max[:, :2]
    return sides.prod(1) if masked.images_masked is None else masked.images_masked.sum()


views = sk.masked_forward(features, labels, clean_prob, images=images, num_classes=10)
assert_type(views, sk.MaskedForward[Tensor, None])
assert_type(views.images_masked, Tensor)
print(views.images_min.shape, views.targets_min[0], views.stats.entropy, areas(views))
print(mask(images, generator=3).images_max.mean())
again = sk.masked_forward(
    features, labels, clean_prob, images=images, num_classes=10, generator=3, out=views
)
assert_type(again, sk.MaskedForward[Tensor, None])

one_pass = sk.masked_forward(
    features, labels, clean_prob, classifier=(head.weight, head.bias), size=images.shape[2:]
)
assert_type(one_pass, sk.MaskedForward[None, Tensor])
both = sk.masked_forward(
    features, labels, clean_prob, images=images, classifier=(head.weight, None),
    config=sk.MaskConfig.official_cifar().replace(fill="mean"),
)
assert_type(both, sk.MaskedForward[Tensor, Tensor])
(one_pass.loss + both.loss).backward()
print(areas(one_pass), both.logits.argmax(1))
rebuilt = torch.rand_like(both.images_masked)
sk.reconstruction_loss(rebuilt, images, boxes=[both.box_max, both.box_min], region="masked")

scores = sk.sample_loss(both.logits, labels)
clean = sk.fit_label_quality(scores).clean_prob[0]
loss = sk.masked_loss(both.logits, views.targets_max, ratio=views.ratio_max).total
mixed = sk.mixup_views([views.images_max, views.images_min], 0.3, torch.randperm(4), rows=2)
refined = sk.refine_targets([both.logits], labels=labels, clean_prob=clean_prob)
print(clean, loss.item(), mixed.shape, refined[0], sk.available_backends()["cpu"])
erased, _, soft = compat.attention_erase_map(images, features, clean_prob, refined)
print(erased.shape, soft.shape)

model = SANM(nn.Sequential(nn.Conv2d(3, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), "0")
losses = model.losses(Batch(images, labels, clean_prob))
print(losses.total, losses.masked and losses.masked.images_max.shape)
print(model.losses((images, labels)).logits)
print(Decoder((4, 3, 3), images.shape[1:])(features).shape, TrainConfig(epochs=3).recipe)
"""

#: Comes after RIGHT up to `views`: each marked line is wrong, and no other.
WRONG = """
sk.masked_forward(features, labels, clean_prob, size=(9, 9), num_classes=10).images_max.shape  # !
views.loss.item()  # !
sk.masked_forward(features, labels, clean_prob, image=images)  # !
sk.masked_forward(features, labels, clean_prob, images=images, num_clases=10)  # !
sk.masked_forward(features, labels, clean_prob, images=images, config="paper")  # !
sk.masked_forward(features, labels, images=images)  # !
sk.masked_forward(features, labels, clean_prob, classifier=torch.rand(10, 4), size=(9, 9))  # !
views.images.shape  # !
views.box_max.shapes  # !
views.stats.kurtosis  # !
mask(images).box_max.shape
mask(None)  # !
sk.masked_loss(images, labels, reduce="mean")  # !
sk.masked_loss(images, labels).loss  # !
sk.fit_label_quality(images[0]).clean  # !
sk.mixup_views(images, "0.3", labels)  # !
sk.refine_targets(images, 0.5)  # !
SANM(nn.Flatten(), image_size=(3, 9, 9))  # !
Batch(images)  # !
SANM(nn.Flatten()).losses(Batch(images, labels)).classifcation  # !
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with RIGHT, WRONG and the code of every page, each as a script of its own."""
    folder = tmp_path_factory.mktemp("scripts")
    start, _, _ = RIGHT.partition("assert_type(views")
    texts = {"right": RIGHT, "wrong": start + WRONG}
    texts |= {page.stem: "\n".join(code(page)) for page in PAGES if code(page)}
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def roots() -> list[str]:
    """The folders that the packages are imported from, however they are installed."""
    return [str(Path(p.__file__).resolve().parents[1]) for p in (sanm_kernels, sanm_train)]


def marked(script: Path) -> set[int]:
    lines = script.read_text().splitlines()
    return {number for number, line in enumerate(lines, 1) if line.endswith("  # !")}


def check(scripts: Path, found: dict[str, dict[int, str]]) -> None:
    """`found`, messages by script and line, are on the marked lines, and on all of them."""
    assert {"README", "index", "right", "wrong"} <= {path.stem for path in scripts.glob("*.py")}
    for path in scripts.glob("*.py"):
        messages, expected = found[path.name], marked(path)
        unexpected = {line: messages[line] for line in messages if line not in expected}
        assert not unexpected, path.name
        missed = {
            line: path.read_text().splitlines()[line - 1] for line in expected - set(messages)
        }
        assert not missed, path.name


def test_mypy_strict(scripts: Path) -> None:
    """Strict, but for what is not ours: torch has untyped functions, scikit-learn no types, and the
    documentation a function without annotations."""
    options = ["--strict", "--untyped-calls-exclude=torch", "--disable-error-code=import-untyped"]
    options += ["--allow-untyped-defs", "--follow-imports=silent", "--config-file="]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, *sorted(p.name for p in scripts.glob("*.py"))],
        cwd=scripts,
        env={**os.environ, "MYPYPATH": os.pathsep.join(roots())},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    found: dict[str, dict[int, str]] = defaultdict(dict)
    for name, line, message in re.findall(r"^(\w+\.py):(\d+): error: (.*)", done.stdout, re.M):
        found[name][int(line)] = message
    check(scripts, found)


def test_pyright_basic(scripts: Path) -> None:
    pyright = shutil.which("pyright", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if pyright is None:
        pytest.skip("pyright is not installed (npm install -g pyright, or pip install pyright)")
    settings = {"typeCheckingMode": "basic", "extraPaths": roots(), "include": ["*.py"]}
    (scripts / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [pyright, "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run(command, cwd=scripts, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    found: dict[str, dict[int, str]] = defaultdict(dict)
    for entry in json.loads(done.stdout)["generalDiagnostics"]:
        if entry["severity"] == "error":
            line = entry["range"]["start"]["line"] + 1
            found[Path(entry["file"]).name][line] = entry["message"]
    check(scripts, found)


def test_right_uses_run() -> None:
    exec(compile(RIGHT, "right.py", "exec"), {"__name__": "right"})


def test_overloads_take_every_argument() -> None:
    """Checkers see the overloads alone: what they lack, no typed script could pass."""
    given = {"features", "targets", "clean_prob", "images", "classifier"}
    assert given | set(Options.__annotations__) == set(inspect.signature(masked_forward).parameters)
