"""Arguments of operators have one order, and a MaskConfig's numbers reach kernels as themselves.

The schema is the order. `define` and Triton's `implements` refuse functions whose parameters are
named otherwise; of C++, where the dispatcher sees types alone, the sources are compared here.
"""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from inputs import BACKENDS, GPU_DEVICES

import sanm_kernels as sk
from sanm_kernels import backends
from sanm_kernels.backends import operators
from sanm_kernels.ops import base
from sanm_kernels.reference.masked_forward import Settings

CSRC = Path(__file__).resolve().parent.parent / "csrc"
SHARED = (CSRC / "masked_forward.h").read_text().replace("\\\n", " ")
#: What the kernels call by a shorter name, or by another one than the argument of the same name.
SHORT = {"H": "height", "W": "width", "K": "num_classes", "reg": "reg_covar"}
SHORT |= {"targets_out": "new_targets", "views_out": "views"}


def in_cpp(text: str, function: str) -> list[str]:
    """The names of a C++ function's parameters."""
    found = re.search(rf"\b{function}\(([^()]*)\) \{{", text)
    assert found is not None, function
    parameters = found[1]
    for macro in re.findall(r"SANM_\w+", parameters):
        defined = re.search(rf"#define {macro} (.*)", SHARED)
        assert defined is not None, macro
        parameters = parameters.replace(macro, defined[1])
    names = [re.findall(r"\w+", parameter)[-1].rstrip("_") for parameter in parameters.split(",")]
    return [SHORT.get(name, name) for name in names]


SOURCES = {
    (path, op): path.read_text()
    for path in sorted(CSRC.glob("c*/*.c*"))
    for op in re.findall(r'm\.impl\("(\w+)\.', path.read_text())
}


@pytest.mark.parametrize("path, op", SOURCES, ids=lambda x: getattr(x, "name", x))
def test_a_kernel_takes_the_schemas_arguments_in_their_order(path, op):
    assert in_cpp(SOURCES[path, op], op) == base.arguments_of(operators[op])


def test_define_refuses_another_order():
    schema = "(Tensor a, Tensor? b, float[] c) -> Tensor"
    base.check_order("op", schema, lambda a, b, c, own=0: a)
    base.check_order("op", schema, lambda a, *rest: a)
    for wrong in (lambda b, a, c: a, lambda a, b: a, lambda b, *rest: b, lambda a, b, c, d: a):
        with pytest.raises(TypeError, match=r"op: .* takes .*, the schema has \['a', 'b', 'c'\]"):
            base.check_order("op", schema, wrong)


def test_the_settings_have_one_order():
    box = (CSRC / "math/box.h").read_text()
    fields = re.search(r"struct Settings \{(.*?)\n\n", box, re.DOTALL)
    assert fields is not None
    declared = re.findall(r"^ *(?:int64_t|bool|double) ([\w, ]+);", fields[1], re.MULTILINE)
    names = [name for line in declared for name in line.split(", ")]
    assert names == list(Settings._fields[:-1])
    reading = SHARED.partition("inline Settings as_settings")[2].partition("}\n")[0]
    assert list(map(int, re.findall(r"x\[(\d+)\]", reading))) == list(range(len(names)))


NUMBERS = {
    "area_scale": 0.7, "ratio_low": 0.11, "ratio_high": 0.29, "ratio_gamma": 0.17,
    "aspect_low": 0.55, "aspect_high": 1.9,
}  # fmt: skip
H, W = 128, 96
DRAWS = torch.tensor([[0.2, 0.3], [0.8, 0.9], [0.35, 0.75]], dtype=torch.float64)
QUALITY = (0.25, 0.5, 0.75)


def by_hand(x: dict[str, float]) -> list[tuple[float, int, int]]:
    """Ratio, height and width of each sample's box: section 2 of the method."""
    result = []
    for (area, aspect), q in zip(DRAWS.tolist(), QUALITY, strict=True):
        ratio = x["ratio_low"] + (x["ratio_high"] - x["ratio_low"]) * area
        ratio += x["ratio_gamma"] * (1 - q)
        s = x["aspect_low"] + (x["aspect_high"] - x["aspect_low"]) * aspect
        pixels = x["area_scale"] * ratio * H * W
        result.append((ratio, round(math.sqrt(pixels * s)), round(math.sqrt(pixels / s))))
    return result


def test_no_two_numbers_can_be_exchanged_unseen():
    """Shows that the next test can fail: any swap changes what it looks at."""
    for a, b in itertools.combinations(NUMBERS, 2):
        swapped = by_hand(NUMBERS | {a: NUMBERS[b], b: NUMBERS[a]})
        for (r, h, w), (other, *sides) in zip(by_hand(NUMBERS), swapped, strict=True):
            assert abs(r - other) > 1e-3 or [h, w] != sides, (a, b)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of Triton's interpreter
@pytest.mark.parametrize("backend", [*BACKENDS, *GPU_DEVICES])
def test_every_number_of_a_configuration_reaches_the_kernel_as_itself(backend):
    device = GPU_DEVICES.get(backend, "cpu")
    reason = "not here" if device is None else backends.serves(backend, "masked_forward", device)
    if reason is not None:
        pytest.skip(reason)
    fills = (0.2, 0.4, 0.8)
    masked = sk.masked_forward(
        torch.rand(3, 4, 2, 2, device=device), torch.softmax(torch.randn(3, 5, device=device), 1),
        torch.tensor(QUALITY, device=device), images=torch.ones(3, 3, H, W, device=device),
        draws=DRAWS.to(device), config=sk.MaskConfig(**NUMBERS, fill_value=fills), backend=backend,
    )  # fmt: skip
    for i, (ratio, height, width) in enumerate(by_hand(NUMBERS)):
        assert masked.ratio_max[i].item() == pytest.approx(ratio, rel=1e-5)
        for boxes, images in (
            (masked.box_max, masked.images_max),
            (masked.box_min, masked.images_min),
        ):
            y0, x0, y1, x1 = boxes[i].tolist()
            assert (y1 - y0, x1 - x0) == (height, width)
            torch.testing.assert_close(images[i, :, y0, x0].cpu(), torch.tensor(fills))
