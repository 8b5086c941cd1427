"""reconstruction_loss: of both masked views."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from maker import INDICES, Maker
from torch import Tensor

import sanm_kernels as sk
from sheets import OURS, Case, Inputs, Operation, Sheet, value_and_grad, with_compiled


def _inputs(B: int = 3, H: int = 13) -> Inputs:
    low = torch.randint(0, H // 2, (2, B, 2))
    return {
        "reconstruction": torch.rand(2 * B, 3, H, H),
        "images": torch.rand(B, 3, H, H),
        "boxes": torch.cat([low, low + torch.randint(1, H // 2, (2, B, 2))], 2),
    }


def _run(x: Inputs, **options: Any) -> Inputs:
    return {"loss": sk.reconstruction_loss(x["reconstruction"], x["images"], **options)}


def _run_boxes(x: Inputs, **options: Any) -> Inputs:
    return _run(x, boxes=x["boxes"], region="masked", **options)


def _random(m: Maker) -> None:
    V, B, C, H, W = m.integer(1, 3), m.integer(1, 6), m.choice([1, 3, 4]), m.size(50, 20), 0
    W = m.size(50, 20)
    given: dict[str, Any] = {
        "reconstruction": m.give(m.uniform(V * B, C, H, W), grad=True),
        "images": m.give(m.uniform(B, C, H, W)),
    }
    if m.chance(0.05):  # the same memory
        given["images"] = given["reconstruction"].detach()[:B]
    region = m.choice(["image", "masked"])
    if region == "masked":
        y, x = m.indices(H + 1, V, B, 2).sort(2).values, m.indices(W + 1, V, B, 2).sort(2).values
        boxes = torch.stack([y[..., 0], x[..., 0], y[..., 1], x[..., 1]], 2)
        boxes = m.give(m.spoil(boxes, [-1, max(H, W) + 1], "boxes"), INDICES)
        given["boxes"] = list(boxes) if m.chance(0.3) else boxes
    m.call.inputs = given
    m.call.run = lambda x, backend: sk.reconstruction_loss(**x, region=region, backend=backend)


def _torch(reconstruction: Tensor, images: Tensor) -> Tensor:
    """reconstruction (V·B, C, H, W), images (B, C, H, W) → Σ over the views of the MSE, ()."""
    return sum(F.mse_loss(part, images) for part in reconstruction.split(len(images)))


def _case(B: int, C: int, H: int) -> Case:
    def make() -> tuple[Tensor, Tensor]:
        images = torch.rand(B, C, H, H)
        return torch.rand(2 * B, C, H, H).requires_grad_(), images

    def call(f, x):
        return value_and_grad(f(*x), x[0])

    run = {
        OURS: lambda x: call(sk.reconstruction_loss, x),
        **with_compiled(_torch, call),
    }
    size = 4 * B * C * H * H
    shape = f"2 × ({B}, {C}, {H}, {H})"
    return Case("reconstruction_loss", shape, make, run, 3 * size, 2 * size, 2 * B)


def _operation(run: Any) -> Operation:
    names = ("reconstruction", "images")
    sizes = {"B": 128, "H": 32}
    return Operation("reconstruction_loss", _inputs, run, names[:1], names, sizes)


SHEET = Sheet(
    {
        "reconstruction_loss": _operation(_run),
        "reconstruction_loss, boxes": _operation(_run_boxes),
    },
    random=_random,
    share=8,
    case=_case,
    shapes=[(128, 3, 32), (64, 3, 224)],  # B, C, H = W; two views
    compiled=[{"B": 64, "H": 32}, {"B": 64, "H": 224}],
)
