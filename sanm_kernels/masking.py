"""masked_forward and activation_stats: validation, defaults, documentation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from sanm_kernels import results, validate
from sanm_kernels.backends import call
from sanm_kernels.config import FILLS, MaskConfig
from sanm_kernels.ops.masked_forward import OUTPUTS
from sanm_kernels.reference.masked_forward import Settings
from sanm_kernels.results import ActivationStats, MaskedForward, Options

_PAPER = MaskConfig.paper()


@validate.public
def activation_stats(
    features: Tensor,
    size: Sequence[int],
    *,
    config: MaskConfig | None = None,
    backend: str | None = None,
) -> ActivationStats:
    """Statistics, peak and trough of each sample's feature map (section 1 of the method).

    Args:
        features: (B, C, h, w), any floating dtype and strides; contiguous and channels_last are
            read in place.
        size: (H, W) of the image, in whose pixels the positions are given.
        config: only `quantize` is used. None: the paper's.
        backend: force a backend; see :func:`sanm_kernels.use_backend`.

    Returns:
        ActivationStats; nothing in it is differentiable.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or values.
    """
    _check_features(features)
    height, width = _size(size)
    config = _config(config)
    stats, positions = call(
        "activation_stats",
        features.device,
        backend,
        validate.detached(features),
        height,
        width,
        config.quantize,
    )
    return ActivationStats(*stats.unbind(0), *positions.unbind(0))


@overload
def masked_forward(
    features: Tensor,
    targets: Tensor,
    clean_prob: Tensor,
    *,
    images: Tensor,
    classifier: None = None,
    **options: Unpack[Options],
) -> MaskedForward[Tensor, None]: ...
@overload
def masked_forward(
    features: Tensor,
    targets: Tensor,
    clean_prob: Tensor,
    *,
    images: None = None,
    classifier: tuple[Tensor, Tensor | None],
    **options: Unpack[Options],
) -> MaskedForward[None, Tensor]: ...
@overload
def masked_forward(
    features: Tensor,
    targets: Tensor,
    clean_prob: Tensor,
    *,
    images: Tensor,
    classifier: tuple[Tensor, Tensor | None],
    **options: Unpack[Options],
) -> MaskedForward[Tensor, Tensor]: ...
@overload
def masked_forward(
    features: Tensor,
    targets: Tensor,
    clean_prob: Tensor,
    *,
    images: Tensor | None = None,
    classifier: tuple[Tensor, Tensor | None] | None = None,
    **options: Unpack[Options],
) -> MaskedForward | Any: ...
@validate.public
def masked_forward(
    features: Tensor,
    targets: Tensor,
    clean_prob: Tensor,
    *,
    images: Tensor | None = None,
    classifier: tuple[Tensor, Tensor | None] | None = None,
    size: Sequence[int] | None = None,
    config: MaskConfig | None = None,
    num_classes: int | None = None,
    draws: Tensor | None = None,
    generator: torch.Generator | int | Tensor | None = None,
    sample_index: Tensor | None = None,
    out: MaskedForward | None = None,
    backend: str | None = None,
) -> MaskedForward:
    """Statistics, label-quality-guided boxes, modulated targets, masked views, one-pass loss.

    Sections 1 to 4 of the method in one pass over the feature map: E = Σ_c F² gives peak and
    trough; r = a + γ·(1 − q) gives the boxes' area; views are the images with a box filled;
    targets lose min(r, t[j*]) (or r) at their maximum, spread over the other classes. With
    `classifier`, the peak's box hides cells of the feature map instead of pixels: what is left is
    average-pooled, classified and scored, z = Σ v·F / Σ v, logits = z·Wᵀ + bias (section 5); for
    that the map is read once more.

    Args:
        features: (B, C, h, w) last feature map, any floating dtype and strides; contiguous and
            channels_last are read in place.
        targets: (B, K) soft targets, or (B,) class indices (then `num_classes`, or the
            classifier's, says K). K ≥ 2.
        clean_prob: (B,) or (B, 1) probability in [0, 1] that the label is right.
        images: (B, Cin, H, W), any floating dtype; asks for the masked views.
        classifier: (weight (K, C), bias (K,) or None); asks for logits and loss of the one-pass
            mode. Needs the max view.
        size: (H, W) of the image; only where `images` is not given.
        config: the semantics. None: the paper's.
        num_classes: K; only for class indices.
        draws: (B, D) explicit uniforms in [0, 1), D = `config.num_draws(Cin)`, in the order given
            there. Without images the columns after the areas and aspects may be left out.
        generator: where random numbers come from if not from `draws`: a seed, a 0-d int64 tensor
            on the features' device holding one, a torch.Generator from which one is drawn, or None
            for torch's default generator. The pixel fill always draws from it. torch.compile takes
            no torch.Generator.
        sample_index: (B,) global indices (any int64) that key the draws, so that a sample's box
            depends on neither batch nor rank. Default: 0 … B − 1.
        out: an earlier result of a call with the same arguments' shapes, dtypes and devices, whose
            tensors are overwritten and returned. No argument may then require grad.
        backend: force a backend; see :func:`sanm_kernels.use_backend`.

    Returns:
        MaskedForward. Differentiable are `targets_*` in targets, `images_*` in images, and `logits`
        and `loss` in features, weight and bias; positions, boxes, and the targets inside the loss
        are constants.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or values.
        RuntimeError: a forced backend cannot run, or `out` was given where a gradient is needed.
    """
    config = _config(config)
    weight = bias = None
    if classifier is not None:
        if not isinstance(classifier, tuple | list) or len(classifier) != 2:
            raise TypeError(
                f"classifier: expected a pair (weight, bias), got {type(classifier).__name__}"
            )
        weight, bias = classifier
        validate.is_tensor(weight, "classifier")
    if out is not None and not isinstance(out, MaskedForward):
        raise TypeError(f"out: expected a MaskedForward, got {type(out).__name__}")
    height, width, num_classes, settings = _check(
        features,
        targets,
        clean_prob,
        images,
        weight,
        bias,
        size,
        config,
        num_classes,
        draws,
        sample_index,
    )
    device = features.device
    clean_prob = validate.detached(validate.row(clean_prob))
    seed: Tensor | None = None
    if draws is None or (config.fill == "pixel" and images is not None):
        seed = _seed(generator, device)

    arguments = (
        validate.detached(features),  # boxes and statistics are constants
        targets if targets.dim() == 2 else validate.int64(targets),
        clean_prob if clean_prob.dtype is torch.float32 else clean_prob.to(torch.float32),
        None if draws is None else validate.detached(draws),
        seed,
        None if sample_index is None else validate.int64(sample_index),
        images,
        height,
        width,
        num_classes,
        settings,
    )

    def classify(boxes: Tensor, new_targets: Tensor) -> tuple[Tensor, ...]:
        """Logits and loss of the max view, which is the first."""
        view = boxes[0], validate.detached(new_targets)[0]
        given = (features, *view, weight, bias, height, width)
        return tuple(call("masked_classifier", device, backend, *given)[:2])

    if out is not None:
        head = {} if weight is None else {"features": features, "weight": weight, "bias": bias}
        results.write(out, config, arguments, head, device, backend)
        if head:
            given = out.buffers[len(OUTPUTS) :]
            with torch.no_grad():
                for buffer, x in zip(given, classify(*out.buffers[3:5]), strict=True):
                    buffer.copy_(x)
        return out
    outputs = call("masked_forward", device, backend, *arguments)
    if weight is not None:
        outputs = (*outputs, *classify(*outputs[3:5]))
    return results.unpack(config, outputs, images is not None)


@validate.by_kinds(MaskConfig)
def _check(
    features: Tensor,
    targets: Tensor,
    clean_prob: Tensor,
    images: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    size: Sequence[int] | None,
    config: MaskConfig,
    num_classes: int | None,
    draws: Tensor | None,
    sample_index: Tensor | None,
) -> tuple[int, int, int, list[float]]:
    """The arguments of masked_forward fit each other → height, width, K, settings."""
    _check_features(features)
    device, batch = features.device, features.shape[0]
    clean_prob = validate.quality(clean_prob)
    validate.length(clean_prob, "clean_prob", batch, "the batch of features")
    validate.same_device(clean_prob, "clean_prob", device, "features")
    if weight is not None:
        _check_classifier(weight, bias, features, config)
    num_classes = _check_targets(targets, num_classes, weight, batch, device)

    channels = 0
    if images is not None:
        validate.floating(images, "images", 4, shape="(B, Cin, H, W)")
        validate.same_device(images, "images", device, "features")
        validate.length(images, "images", batch, "the batch of features")
        _non_empty(images, "images")
        if size is not None and _size(size) != tuple(images.shape[2:]):
            raise ValueError(
                f"size: expected the images' {tuple(images.shape[2:])} or None, got {size}"
            )
        channels, height, width = images.shape[1:]
    elif size is None:
        raise ValueError("size: expected (H, W) of the image where images is not given, got None")
    else:
        height, width = _size(size)

    settings = _settings(config)
    values = len(settings.fill_value)
    if channels and config.fill == "constant" and values not in (1, channels):
        raise ValueError(
            f"config: expected fill_value of 1 or {channels} numbers for images of "
            f"{channels} channels, got {values}"
        )
    if sample_index is not None:
        validate.integer(sample_index, "sample_index")
        validate.length(sample_index, "sample_index", batch, "the batch of features")
        validate.same_device(sample_index, "sample_index", device, "features")
    if draws is not None:
        _check_draws(draws, batch, config, channels, device)
    return height, width, num_classes, settings.numbers()


def _config(config: MaskConfig | None) -> MaskConfig:
    if config is None:
        return _PAPER
    if not isinstance(config, MaskConfig):
        raise TypeError(f"config: expected a MaskConfig or None, got {type(config).__name__}")
    return config


def _settings(config: MaskConfig) -> Settings:
    value = config.fill_value
    return Settings(
        views=("max" in config.views) + 2 * ("min" in config.views),
        shared=config.shared_draws,
        centered=config.position == "center",
        quantize=config.quantize,
        clamp=config.drop == "clamped",
        fill=FILLS.index(config.fill),
        area_scale=config.area_scale,
        ratio_low=config.ratio_low,
        ratio_high=config.ratio_high,
        ratio_gamma=config.ratio_gamma,
        aspect_low=config.aspect_low,
        aspect_high=config.aspect_high,
        fill_value=value if isinstance(value, tuple) else (float(value),),
    )


@validate.by_kinds()
def _check_features(features: Tensor) -> None:
    validate.floating(features, "features", 4, shape="(B, C, h, w)")
    _non_empty(features, "features")


def _non_empty(x: Tensor, name: str) -> None:
    if 0 in x.shape[1:]:
        raise ValueError(
            f"{name}: expected no empty dimension but the batch, got shape {list(x.shape)}"
        )


def _size(size: Sequence[int]) -> tuple[int, int]:
    try:
        height, width = map(validate.plain, size)
    except (TypeError, ValueError):
        raise ValueError(f"size: expected (H, W), got {size!r}") from None
    for side in (height, width):
        if isinstance(side, bool) or not isinstance(side, (int, torch.SymInt)):
            raise TypeError(f"size: expected two integers, got {size!r}")
        if not 1 <= side < 2**31:
            raise ValueError(f"size: expected two integers ≥ 1 and < 2³¹, got {size!r}")
    return height, width


def _check_targets(
    targets: Tensor,
    num_classes: int | None,
    weight: Tensor | None,
    batch: int,
    device: torch.device,
) -> int:
    """Targets are (B, K) floats or (B,) integers → K."""
    validate.is_tensor(targets, "targets")
    validate.same_device(targets, "targets", device, "features")
    if num_classes is not None:
        num_classes = validate.whole(num_classes, "num_classes", 2, 2**31)
    if targets.dim() == 1:
        validate.integer(targets, "targets")
        if num_classes is None and weight is not None:
            num_classes = weight.shape[0]
        if num_classes is None:
            raise ValueError(
                "num_classes: expected the number of classes where targets are "
                "class indices, got None"
            )
        classes = num_classes
    else:
        validate.floating(targets, "targets", 2, shape="(B, K), or (B,) class indices")
        classes = targets.shape[1]
        if num_classes is not None and num_classes != classes:
            raise ValueError(
                f"num_classes: expected {classes}, the columns of targets, or None, "
                f"got {num_classes}"
            )
    validate.length(targets, "targets", batch, "the batch of features")
    if classes < 2:
        raise ValueError(f"targets: expected at least 2 classes, got {classes}")
    if weight is not None and weight.shape[0] != classes:
        raise ValueError(
            f"classifier: expected a weight of {classes} rows, as targets have "
            f"classes, got shape {list(weight.shape)}"
        )
    return classes


def _check_classifier(
    weight: Tensor, bias: Tensor | None, features: Tensor, config: MaskConfig
) -> None:
    if "max" not in config.views:
        raise ValueError(
            "classifier: expected a config whose views include 'max', whose box "
            f"hides the features, got {config.views}"
        )
    validate.floating(weight, "classifier", 2, shape="(K, C) for its weight")
    validate.same_device(weight, "classifier", features.device, "features")
    if weight.shape[1] != features.shape[1]:
        raise ValueError(
            f"classifier: expected a weight of {features.shape[1]} columns, as "
            f"features have channels, got shape {list(weight.shape)}"
        )
    if bias is not None:
        validate.floating(bias, "classifier", 1, shape="(K,) for its bias")
        validate.same_device(bias, "classifier", features.device, "features")
        validate.length(bias, "classifier", weight.shape[0], "the bias, one per row of the weight")


def _check_draws(
    draws: Tensor, batch: int, config: MaskConfig, channels: int, device: torch.device
) -> None:
    validate.floating(draws, "draws", 2, shape="(B, D)")
    validate.same_device(draws, "draws", device, "features")
    validate.length(draws, "draws", batch, "the batch of features")
    if draws.dtype != torch.float64:
        raise TypeError(f"draws: expected torch.float64, got {draws.dtype}")
    expected = config.num_draws(channels)
    if draws.shape[1] != expected and not (channels == 0 and draws.shape[1] > expected):
        raise ValueError(
            f"draws: expected {expected} columns (config.num_draws({channels})), "
            f"got {draws.shape[1]}"
        )


def _seed(generator: torch.Generator | int | Tensor | None, device: torch.device) -> Tensor:
    """The seed as a 0-d int64 tensor on `device`, without waiting for the device."""
    if isinstance(generator, Tensor):
        if generator.dtype != torch.int64 or generator.dim() != 0:
            raise TypeError(
                "generator: expected a 0-d int64 tensor as seed, got "
                f"{generator.dtype} of shape {list(generator.shape)}"
            )
        validate.same_device(generator, "generator", device, "features")
        return generator
    generator = validate.plain(generator)
    if isinstance(generator, int) and not isinstance(generator, bool):
        if not 0 <= generator < 2**63:
            raise ValueError(f"generator: expected a seed in [0, 2⁶³), got {generator}")
        return torch.full((), generator, dtype=torch.int64, device=device)  # a fill, not a copy
    if generator is None:
        return torch.randint(0, 2**63 - 1, (), device=device)
    if isinstance(generator, torch.Generator):
        return torch.randint(0, 2**63 - 1, (), device=generator.device, generator=generator).to(
            device, non_blocking=True
        )
    raise TypeError(
        f"generator: expected a torch.Generator, a seed or None, got {type(generator).__name__}"
    )
