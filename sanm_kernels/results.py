"""What masked_forward and activation_stats return, with the types that checkers see."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Generic, TypedDict

import torch
from torch import Tensor
from typing_extensions import NamedTuple, TypeVar  # torch's own dependency; generic, with defaults

from sanm_kernels import validate
from sanm_kernels.backends import call, serving
from sanm_kernels.config import VIEWS, MaskConfig
from sanm_kernels.ops.masked_forward import INPUTS, OUTPUTS, TENSORS, Spec, specs
from sanm_kernels.reference.masked_forward import is_channels_last
from sanm_kernels.reference.precision import accumulate_dtype

#: Tensor where `images=` was given, None where not; either for a plain `MaskedForward`.
Images = TypeVar("Images", covariant=True, default=Tensor | None)
#: The same of `classifier=`.
Logits = TypeVar("Logits", covariant=True, default=Tensor | None)


class ActivationStats(NamedTuple):
    """Per-sample statistics of the energy map E = Σ_c F² in which clean and mislabelled differ.

    Attributes:
        max, min, mean, std, entropy: (B,) float32 (float64 for float64 features). `std` is the
            population's; `entropy` is normalised: 0 for one spike, 1 for a flat map.
        peak, trough: (B, 2) int32, the row and column in image pixels where the upsampled map is
            largest and smallest.
    """

    max: Tensor
    min: Tensor
    mean: Tensor
    std: Tensor
    entropy: Tensor
    peak: Tensor
    trough: Tensor


class MaskedForward(NamedTuple, Generic[Images, Logits]):
    """What :func:`masked_forward` returns; None where a thing was not asked for.

    To type checkers it is ``MaskedForward[Tensor, None]`` with ``images=``,
    ``MaskedForward[None, Tensor]`` with ``classifier=``; as an annotation, ``MaskedForward`` alone
    is any of them.

    Attributes:
        stats: the activation statistics.
        ratio_max, ratio_min: (B,) float32, the mask ratio r of each view. The same tensor twice
            where the configuration shares the draw between the views.
        box_max, box_min: (B, 4) int32 y0, x0, y1, x1, half open.
        targets_max, targets_min: (B, K) modulated targets, in the dtype of soft targets, float32
            for class indices. The same tensor twice where the draw is shared.
        images_max, images_min: (B, Cin, H, W) masked views in the images' dtype and memory format.
        images_masked: (V·B, Cin, H, W), the memory of which the views are slices: what a network
            takes to see all views in one forward.
        logits: (B, K) of the one-pass mode, float32 (float64 for float64 features).
        loss: () its cross-entropy against `targets_max`.
        buffers: the tensors that all of the above are slices of; what `out=` writes to.
    """

    stats: ActivationStats
    # `| Any`: None where the configuration lacks the view, which no type says
    ratio_max: Tensor | Any
    ratio_min: Tensor | Any
    box_max: Tensor | Any
    box_min: Tensor | Any
    targets_max: Tensor | Any
    targets_min: Tensor | Any
    images_max: Images | Any
    images_min: Images | Any
    images_masked: Images
    logits: Logits
    loss: Logits
    buffers: tuple[Tensor, ...]


#: Names of its buffers: the outputs of masked_forward, and the first of masked_classifier.
BUFFERS = (*OUTPUTS, "logits", "loss")
#: Names of a result's tensors.
PARTS = (*ActivationStats._fields, *MaskedForward._fields[1:-1])


class Options(TypedDict, total=False):
    """The arguments of masked_forward that its result's type does not depend on."""

    size: Sequence[int] | None
    config: MaskConfig | None
    num_classes: int | None
    draws: Tensor | None
    generator: torch.Generator | int | Tensor | None
    sample_index: Tensor | None
    out: MaskedForward | None
    backend: str | None


def unpack(config: MaskConfig, buffers: tuple[Tensor, ...], has_images: bool) -> MaskedForward:
    """BUFFERS, of a call with a classifier all of them, as named slices (views: no copy)."""
    stats, positions, ratio, boxes, targets, masked, *of_classifier = buffers
    count = len(config.views)
    images: Sequence[Tensor | None]
    if not has_images:
        images = (None,) * count
    elif masked.shape[0] == 0:
        images = (masked,) * count
    elif torch.compiler.is_compiling():  # chunk() would fix the number of samples
        images = masked.unflatten(0, (count, -1)).unbind(0)
    else:
        images = masked.chunk(count)
    ratios, modulated = ratio.unbind(0), targets.unbind(0)
    if config.shared_draws:
        ratios, modulated = ratios * count, modulated * count
    parts: list[Any] = []  # of both VIEWS, one after the other
    for part in (ratios, boxes.unbind(0), modulated, images):
        if count == len(VIEWS):
            parts += part
        else:
            parts += [part[0] if kind in config.views else None for kind in VIEWS]
    return MaskedForward._make(
        (
            ActivationStats._make((*stats.unbind(0), *positions.unbind(0))),
            *parts,
            masked if has_images else None,
            *(of_classifier or (None, None)),
            buffers,
        )
    )


class Slice(NamedTuple):
    """Where a result's tensor is in its buffers."""

    buffer: int
    offset: int  #: in bytes
    look: tuple[Any, ...]


class Expected(NamedTuple):
    """What `out` has to look like: its buffers as BUFFERS and as `_looks` sees them, its parts."""

    outputs: tuple[Spec, ...]
    looks: list[tuple[Any, ...]]
    slices: list[Slice | None]
    bytes: list[int]


@validate.by_kinds(MaskConfig)
def expect(
    features: Tensor,
    targets: Tensor,
    images: Tensor | None,
    num_classes: int,
    config: MaskConfig,
    channels_last: bool,
    classifier: bool,
) -> Expected:
    """What a call gives of such arguments, `channels_last` the images."""
    views, sets = len(config.views), config.draw_sets
    outputs = specs(features, targets, images, num_classes, views, sets, channels_last)
    if classifier:
        acc = accumulate_dtype(features)
        outputs += (Spec((features.shape[0], num_classes), acc), Spec((), acc))
    if torch.compiler.is_compiling():
        return Expected(outputs, [], [], [])
    with torch.inference_mode(False):  # where views would not know what they are of
        buffers = tuple(spec.empty(torch.device("meta")) for spec in outputs)
        result = unpack(config, buffers, images is not None)

    def find(x: Tensor) -> Slice:
        whole = x if x._base is None else x._base
        number = next(i for i, buffer in enumerate(buffers) if buffer is whole)
        offset = int(x.storage_offset()) * x.element_size() if x.numel() else 0
        return Slice(number, offset, _part(x))

    return Expected(
        outputs,
        [(*look[:-1], features.device) for look in _looks(buffers)],
        [None if x is None else find(x) for x in _parts(result)],
        [x.numel() * x.element_size() for x in buffers],
    )


def _looks(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    return [(x.shape, x.stride(), x.dtype, x.device) for x in tensors]


def _parts(result: MaskedForward) -> tuple[Tensor | None, ...]:
    """All tensors of a result but its buffers, in the order of PARTS."""
    return (*result.stats, *result[1:-1])


def _placed(result: MaskedForward) -> list[tuple[Any, ...] | None]:
    return [None if x is None else (x.data_ptr(), _part(x)) for x in _parts(result)]


def _part(x: Tensor) -> tuple[Any, ...]:
    return x.numel(), x.stride(), x.dtype


#: Backends whose kernels check what they write to themselves, faster and in fewer words.
CHECKING = ("cpu", "cuda")


def write(
    out: MaskedForward,
    config: MaskConfig,
    arguments: tuple[Any, ...],
    head: dict[str, Tensor | None],
    device: torch.device,
    backend: str | None,
) -> None:
    """What masked_forward gives into `out`, which fits the call.

    Writing to it spoils neither a gradient nor an argument, among them those of the classifier,
    in `head`: all of its buffers are checked, and those of the classifier left to the caller.
    """
    if torch.is_grad_enabled():
        for name, x in (*zip(TENSORS, arguments, strict=False), *head.items()):
            if x is not None and x.requires_grad:
                raise RuntimeError(
                    f"out: cannot be given where {name} requires grad; call under "
                    "torch.no_grad() or omit out"
                )
    had = ("max",) * (out.box_max is not None) + ("min",) * (out.box_min is not None)
    if had != config.views:
        raise ValueError(f"out: expected a result with the views {config.views}, got {had}")
    served = serving("masked_forward_out", device, backend)
    buffers = out.buffers[: len(OUTPUTS)]
    if torch.compiler.is_compiling() or head or served not in CHECKING:
        _check(out, config, arguments, head)
        call("masked_forward_out", device, backend, *arguments, *buffers, None)
    else:
        parts = [x for x in _parts(out) if x is not None]
        try:
            call("masked_forward_out", device, backend, *arguments, *buffers, parts)
        except Exception:
            _check(out, config, arguments, head)  # says it better, if that is what was wrong
            raise
    if not torch.compiler.is_compiling():
        # autograd did not see the writing: a graph that saved what was overwritten must not run
        torch.autograd.graph.increment_version(buffers)


def _check(
    out: MaskedForward,
    config: MaskConfig,
    arguments: tuple[Any, ...],
    head: dict[str, Tensor | None],
) -> None:
    """The parts of `out` are slices of its buffers, which are what the call would have made.

    And share no memory with each other or with an argument.
    """
    count = len(BUFFERS if head else OUTPUTS)
    if len(out.buffers) != count or not all(isinstance(x, Tensor) for x in out.buffers):
        raise TypeError(f"out: expected buffers of {count} tensors, as such a call returns them")
    given = dict(zip(INPUTS, arguments, strict=True)) | head
    features, images = given["features"], given["images"]
    channels_last = images is not None and is_channels_last(images)
    expected = expect(
        features, given["targets"], images, given["num_classes"], config, channels_last, bool(head)
    )
    if torch.compiler.is_compiling():
        _compare(out.buffers, expected.outputs, features.device)
        return
    starts = [x.data_ptr() for x in out.buffers]
    if _looks(out.buffers) == expected.looks:
        slices = [
            None if part is None else (starts[part.buffer] + part.offset, part.look)
            for part in expected.slices
        ]
    else:  # if only in strides of dimensions of length 1
        _compare(out.buffers, expected.outputs, features.device)
        slices = _placed(unpack(config, out.buffers, images is not None))
    for name, found, wanted in zip(PARTS, _placed(out), slices, strict=True):
        if found != wanted:
            raise ValueError(f"out: its {name} is no longer a slice of its buffers")
    tensors = [(name, x) for name, x in given.items() if isinstance(x, Tensor)]
    _check_memory(starts, expected.bytes, tensors)


def _compare(buffers: Sequence[Tensor], outputs: Sequence[Spec], device: torch.device) -> None:
    for name, spec, buffer in zip(BUFFERS, outputs, buffers, strict=False):
        if (
            buffer.shape != spec.shape
            or buffer.dtype != spec.dtype
            or not buffer.is_contiguous(memory_format=spec.memory_format)
            or buffer.device != device
        ):
            raise ValueError(
                f"out: expected {name} of shape {list(spec.shape)} and {spec.dtype}"
                f"{' in channels_last' if spec.channels_last else ''}, got {list(buffer.shape)} "
                f"and {buffer.dtype} with strides {buffer.stride()} on {buffer.device}"
            )


def _check_memory(
    starts: Sequence[int], sizes: Sequence[int], arguments: Iterable[tuple[str, Tensor]]
) -> None:
    """BUFFERS, of so many bytes from `starts` on, share no memory with each other or an argument.

    Raises:
        ValueError: two do.
    """
    taken = sorted(
        (start, start + size, name)
        for start, size, name in zip(starts, sizes, BUFFERS, strict=False)
        if size
    )
    for (_, end, name), (first, _, other) in itertools.pairwise(taken):
        if first < end:
            raise ValueError(f"out: its {name} shares memory with its {other}")
    for argument, x in arguments:
        first, size = x.data_ptr(), x.numel()
        if not x.is_contiguous() and size:
            size = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
        end = first + size * x.element_size()
        place = bisect.bisect_left(taken, (end,))  # of those that start before its end, the last
        if place and size and first < taken[place - 1][1]:
            name = taken[place - 1][2]
            raise ValueError(f"out: shares its {name} with the argument {argument}")
