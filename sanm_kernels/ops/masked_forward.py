"""masked_forward and activation_stats: statistics, boxes, views and targets.

Shapes, with V views of which S have an own draw of area and aspect (S = 1 where they share it):
features (B, C, h, w), targets (B, K) or int64 (B,), clean_prob (B,) float32, draws (B, D) float64,
seed () int64, sample_index (B,) int64, images (B, Cin, H, W) → statistics (5, B),
positions (2, B, 2) int32, ratio (S, B) float32, boxes (V, B, 4) int32, new targets (S, B, K) and
views (V·B, Cin, H, W), of shape (0,) where no images are given.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sanm_kernels.ops.base import Overloads, arguments_of, define, needed
from sanm_kernels.reference import masked_forward as reference
from sanm_kernels.reference.masked_forward import MEAN, Settings, is_channels_last
from sanm_kernels.reference.precision import accumulate_dtype

OUTPUTS = ("stats", "positions", "ratio", "boxes", "new_targets", "views")
_SCHEMA_INPUTS = (
    "(Tensor features, Tensor targets, Tensor clean_prob, Tensor? draws, Tensor? seed, "
    "Tensor? sample_index, Tensor? images, SymInt height, SymInt width, SymInt num_classes, "
    "float[] settings"
)
INPUTS = tuple(arguments_of(_SCHEMA_INPUTS + ")"))
TENSORS = INPUTS[:7]


class Spec(NamedTuple):
    """Shape, dtype and memory format of an output."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool = False

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def empty(self, device: torch.device) -> Tensor:
        return torch.empty(
            self.shape, dtype=self.dtype, device=device, memory_format=self.memory_format
        )


def specs(
    features: Tensor,
    targets: Tensor,
    images: Tensor | None,
    num_classes: int,
    views: int,
    sets: int,
    channels_last: bool,
) -> tuple[Spec, ...]:
    """What each of OUTPUTS looks like, of V views and S draw sets; `channels_last`: the images."""
    batch = features.shape[0]
    acc = accumulate_dtype(features)
    soft = targets.dtype if targets.is_floating_point() else torch.float32
    masked = Spec((0,), features.dtype)
    if images is not None:
        masked = Spec((views * batch, *images.shape[1:]), images.dtype, channels_last)
    return (
        Spec((5, batch), acc),
        Spec((2, batch, 2), torch.int32),
        Spec((sets, batch), torch.float32),
        Spec((views, batch, 4), torch.int32),
        Spec((sets, batch, num_classes), soft),
        masked,
    )


def empty_outputs(*arguments: Any) -> tuple[Tensor, ...]:
    """OUTPUTS, not filled, of a call of masked_forward with these arguments."""
    given = dict(zip(INPUTS, arguments, strict=True))
    features, images = given["features"], given["images"]
    settings = Settings.of(given["settings"])
    return tuple(
        spec.empty(features.device)
        for spec in specs(
            features,
            given["targets"],
            images,
            given["num_classes"],
            settings.view_count,
            settings.draw_sets,
            images is not None and is_channels_last(images),
        )
    )


def split_out(arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
    """The arguments of masked_forward_out: those of masked_forward, and what it writes to."""
    return arguments[: len(INPUTS)], arguments[len(INPUTS) : -1]


def _reference_out(*arguments: Any) -> None:
    inputs, buffers = split_out(arguments)
    for buffer, result in zip(buffers, reference.forward(*inputs), strict=True):
        buffer.copy_(result)


def _check(features: Tensor, targets: Tensor, clean_prob: Tensor, *more: Any) -> None:
    given = dict(zip(INPUTS[3:], more, strict=False))  # before what the out variant writes to
    reference.check(targets, clean_prob, given["draws"], given["num_classes"])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    given = dict(zip(INPUTS, inputs, strict=True))
    ctx.settings = s = Settings.of(given["settings"])
    stats, positions, ratio, boxes, new_targets, views = output
    constants = [stats, positions, ratio, boxes]
    needs = [INPUTS[place] for place in needed(ctx)]
    if "targets" not in needs:
        constants.append(new_targets)
    if "images" not in needs:
        constants.append(views)
    ctx.mark_non_differentiable(*constants)
    ctx.total = len(inputs)
    targets = given["targets"]
    ctx.soft = targets.is_floating_point()
    ctx.save_for_backward(targets if ctx.soft and s.clamp else None, ratio, boxes)


def _backward(ops: Overloads, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    g_targets, g_views = grads[4:]
    targets, ratio, boxes = ctx.saved_tensors
    s = ctx.settings
    result: list[Tensor | None] = [None] * ctx.total
    if g_targets is not None and ctx.soft:
        result[INPUTS.index("targets")] = (
            g_targets.sum(0)
            if targets is None
            else ops.modulate_backward(g_targets, targets, ratio, s.clamp)
        )
    if g_views is not None:
        result[INPUTS.index("images")] = ops.masked_views_backward(g_views, boxes, s.fill == MEAN)
    return tuple(result)


define(
    "activation_stats",
    "(Tensor features, SymInt height, SymInt width, bool quantize) -> (Tensor stats, "
    "Tensor positions)",
    reference.activation_stats,
    fake=lambda features, height, width, quantize: (
        features.new_empty(5, features.shape[0], dtype=accumulate_dtype(features)),
        features.new_empty(2, features.shape[0], 2, dtype=torch.int32),
    ),
)
define(
    "masked_forward",
    _SCHEMA_INPUTS + ") -> (" + ", ".join(f"Tensor {name}_" for name in OUTPUTS) + ")",
    reference.forward,
    fake=empty_outputs,
    setup_context=_setup_context,
    backward=_backward,
    wrt=tuple(map(INPUTS.index, ("targets", "images"))),
    check=_check,
)
define(
    "masked_forward_out",
    _SCHEMA_INPUTS
    + "".join(
        f", Tensor({letter}!) {name}_" for letter, name in zip("abcdef", OUTPUTS, strict=True)
    )
    + ", Tensor(g!)[]? parts) -> ()",
    _reference_out,
    fake=lambda *arguments: None,
    check=_check,
)
define(
    "modulate_backward",
    "(Tensor grad, Tensor targets, Tensor ratio, bool clamp) -> Tensor",
    reference.modulate_backward,
    fake=lambda grad, targets, ratio, clamp: targets.new_empty(targets.shape),
)
define(
    "masked_views_backward",
    "(Tensor grad, Tensor boxes, bool mean_fill) -> Tensor",
    reference.masked_views_backward,
    fake=lambda grad, boxes, mean_fill: torch.empty_like(grad[: boxes.shape[1]]),
)
