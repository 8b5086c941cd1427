"""The public losses: `sample_loss`, `masked_loss`, `reconstruction_loss`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sanm_kernels import validate
from sanm_kernels.backends import call
from sanm_kernels.config import DROPS
from sanm_kernels.reference.precision import accumulate_dtype


class MaskedLoss(NamedTuple):
    """What :func:`masked_loss` returns; all differentiable in the logits.

    Attributes:
        total: the weighted sum of the parts, (); (n,) with ``reduction="none"``.
        labeled: L_x, ().
        unlabeled: L_u, ().
        prior: P, the prior penalty, ().
        confidence: N, the confidence penalty, ().
        per_sample: every row's own loss (n,): its cross-entropy where labelled, the mean squared
            error of its probabilities elsewhere, 0 where ignored.
    """

    total: Tensor
    labeled: Tensor
    unlabeled: Tensor
    prior: Tensor
    confidence: Tensor
    per_sample: Tensor


@validate.public
def sample_loss(logits: Tensor, labels: Tensor, *, backend: str | None = None) -> Tensor:
    """Per-sample cross-entropy l_i = −log softmax(z_i)[y_i], from which label quality is fitted.

    Args:
        logits: (B, K), any floating dtype and strides.
        labels: (B,) integers in [0, K).
        backend: force a backend; see :func:`sanm_kernels.use_backend`.

    Returns:
        (B,) losses in nats, float32 (float64 for float64 logits), differentiable in `logits`.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or values.
    """
    _check_sample_loss(logits, labels)
    labels = validate.int64(labels)
    loss: Tensor = call("sample_loss", logits.device, backend, logits, labels)[0]
    return loss


@validate.by_kinds()
def _check_sample_loss(logits: Tensor, labels: Tensor) -> None:
    validate.floating(logits, "logits", 2, shape="(B, K)")
    validate.integer(labels, "labels")
    validate.same_device(labels, "labels", logits.device, "logits")
    validate.length(labels, "labels", logits.shape[0], "the rows of logits")
    if logits.shape[1] == 0:
        raise ValueError(f"logits: expected at least one class, got shape {list(logits.shape)}")


@validate.public
def masked_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    ratio: Tensor | None = None,
    mix: tuple[float | Tensor, Tensor] | None = None,
    num_labeled: int | None = None,
    unlabeled_weight: float | Tensor = 0.0,
    prior: Tensor | None = None,
    prior_weight: float | Tensor = 0.0,
    confidence_weight: float | Tensor = 0.0,
    drop: str = "clamped",
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str | None = None,
) -> MaskedLoss:
    """The training loss (section 5 of the method) with targets modulated and mixed on the fly.

    Row i of the logits is compared with the target t_i = λ·t'_i + (1 − λ)·t'_π(i), where t' are the
    targets after the modulation of section 4; neither t' nor t is written to memory. With
    p = softmax(logits), the first n_x rows labelled and the other n − n_x unlabelled::

        L_x = −(1/n_x) Σ_i Σ_k t_ik log p_ik
        L_u = (1/((n − n_x)·K)) Σ_i Σ_k (p_ik − t_ik)²
        P = Σ_k π_k log(π_k / p̄_k), p̄ the mean of p over all n rows
        N = (1/n) Σ_i Σ_k p_ik log p_ik
        total = L_x + unlabeled_weight·L_u + prior_weight·P + confidence_weight·N

    A part over no rows is 0, and a part of weight 0 adds nothing to the total even if infinite.
    A class whose logit is −∞ costs nothing where its target is 0.

    Args:
        logits: (n, K), K ≥ 2, any floating dtype and strides.
        targets: (…, K) floats with one to three leading dimensions of any strides, so an
            ``expand``-ed tensor is not copied; read as M rows in row-major order. Their values
            are not checked. Or integers (…) in [0, K), M in all: each row's target is then
            one-hot. M = n without `mix`, M ≥ n with it. No gradient flows to them.
        ratio: None, or r in [0, 1] for the label modulation, one per target row: (M,) or shaped
            like the targets' leading dimensions.
        mix: None, or (λ, permutation): λ in [0, 1] as the weights below, and (≥ n,) integers in
            [0, M).
        num_labeled: n_x, how many rows are labelled; all by default.
        unlabeled_weight, prior_weight, confidence_weight: λ_u, ρ and ν, numbers or tensors ();
            may change from call to call, also under ``torch.compile``. Kernels read a tensor on
            the logits' device when they run, so that a CUDA graph follows it; its value is not
            checked. A number is an argument of the launch, which a graph that is captured by hand
            keeps.
        prior: π (K,) in [0, 1]; uniform by default.
        drop: ``"clamped"``, a label loses min(r, t[j*]), or ``"unclamped"``, it loses r.
        ignore_index: integer targets of this value mark rows that count in neither L_x nor L_u,
            nor do rows mixed with them; P and N are still over all rows.
        reduction: ``"mean"`` as above; ``"sum"``: L_x and L_u are the sums of their rows' losses
            (`per_sample`) instead of the means, P and N unchanged; ``"none"``: `total` is (n,),
            `per_sample` times each row's weight (1 or `unlabeled_weight`), the other parts are as
            with ``"mean"``, and `prior_weight` and `confidence_weight` must be 0.
        backend: force a backend; see :func:`sanm_kernels.use_backend`.

    Returns:
        :class:`MaskedLoss`, in float32 (float64 for float64 logits). The gradient has the dtype
        of the logits.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or values.
    """
    lam: float | Tensor = 1.0
    permutation = None
    if mix is not None:
        if not isinstance(mix, (tuple, list)) or len(mix) != 2:
            raise TypeError(f"mix: expected a pair (lam, permutation), got {type(mix).__name__}")
        lam, permutation = mix
    num_labeled, clamp, ignore_index = _check_masked_loss(
        logits,
        targets,
        ratio,
        mix is not None,
        permutation,
        num_labeled,
        prior,
        drop,
        ignore_index,
        reduction,
    )
    device = logits.device
    lam = validate.scheduled(lam, "mix lam", device, 0, 1)
    unlabeled_weight = validate.scheduled(unlabeled_weight, "unlabeled_weight", device)
    prior_weight = validate.scheduled(prior_weight, "prior_weight", device)
    confidence_weight = validate.scheduled(confidence_weight, "confidence_weight", device)
    if reduction == "none" and not all(
        isinstance(x, (int, float)) and x == 0 for x in (prior_weight, confidence_weight)
    ):
        raise ValueError(
            "reduction: 'none' needs prior_weight = confidence_weight = 0, "
            f"got {prior_weight} and {confidence_weight}"
        )
    if not targets.is_floating_point():
        targets = validate.int64(targets if targets.dim() == 1 else targets.reshape(-1))
    if permutation is not None:
        permutation = validate.int64(permutation)
    dtype = accumulate_dtype(logits)
    if ratio is not None:
        ratio = validate.of_dtype(ratio if ratio.dim() == 1 else ratio.reshape(-1), dtype)
    if prior is not None:
        prior = validate.of_dtype(prior, dtype)
    scalars = validate.scalars(logits, lam, unlabeled_weight, prior_weight, confidence_weight)
    outputs = call(
        "masked_loss",
        device,
        backend,
        logits,
        targets,
        ratio,
        permutation,
        prior,
        scalars,
        num_labeled,
        clamp,
        ignore_index,
        reduction != "sum",
    )
    if reduction != "none":
        return MaskedLoss._make(outputs[:6])
    per_sample = outputs[5]
    labeled_rows = torch.arange(logits.shape[0], device=device) < num_labeled
    total = torch.where(labeled_rows, per_sample, scalars[1] * per_sample)
    return MaskedLoss(total, *outputs[1:6])


@validate.by_kinds()
def _check_masked_loss(
    logits: Tensor,
    targets: Tensor,
    ratio: Tensor | None,
    mixed: bool,
    permutation: Tensor | None,
    num_labeled: int | None,
    prior: Tensor | None,
    drop: str,
    ignore_index: int,
    reduction: str,
) -> tuple[int, bool, int]:
    """The number of labelled rows, whether labels lose at most what they have, `ignore_index`."""
    validate.floating(logits, "logits", 2, shape="(n, K)")
    n, K = logits.shape
    if K < 2:
        raise ValueError(f"logits: expected at least two classes, got shape {list(logits.shape)}")
    given = validate.is_tensor(targets, "targets").shape
    validate.same_device(targets, "targets", logits.device, "logits")
    if targets.is_floating_point():
        validate.floating(targets, "targets")
        if not 2 <= targets.dim() <= 4 or given[-1] != K:
            raise ValueError(
                f"targets: expected shape (…, {K}) with 1 to 3 leading dimensions, "
                f"or integers, got {list(given)}"
            )
        leading = given[:-1]
    else:
        leading = given
        validate.integer(targets, "targets", targets.dim())
        if targets.dim() > 1 and leading[-1] == K and targets.numel() >= n * K > 0:
            raise ValueError(
                "targets: expected class indices, or floats for rows of classes, got integers of "
                f"shape {list(leading)}: one-hot rows are passed as floats"
            )
    available = math.prod(leading)  # numel() would fix symbolic sizes
    if available < n or (not mixed and available != n):
        raise ValueError(
            f"targets: expected {'at least ' if mixed else ''}{n} rows (one per row of "
            f"logits), got {available} in shape {list(given)}"
        )
    if ratio is not None:
        validate.floating(ratio, "ratio")
        validate.same_device(ratio, "ratio", logits.device, "logits")
        if ratio.shape not in ((available,), leading):
            raise ValueError(
                f"ratio: expected shape {[available]}, one per target row, got {list(ratio.shape)}"
            )
    if mixed:
        validate.permutation(permutation, "mix permutation", n, logits.device, "logits")
    rows = n if num_labeled is None else validate.count(num_labeled, "num_labeled", n)
    if prior is not None:
        validate.floating(prior, "prior", 1, shape="(K,)")
        validate.same_device(prior, "prior", logits.device, "logits")
        validate.length(prior, "prior", K, "the classes")
    clamp = validate.one_of(drop, "drop", DROPS) == "clamped"
    ignore_index = validate.whole(ignore_index, "ignore_index")
    validate.one_of(reduction, "reduction", ("mean", "sum", "none"))
    return rows, clamp, ignore_index


@validate.public
def reconstruction_loss(
    reconstruction: Tensor,
    images: Tensor,
    *,
    boxes: Tensor | Sequence[Tensor] | None = None,
    region: str = "image",
    backend: str | None = None,
) -> Tensor:
    """L_r = Σ_v MSE(reconstruction_v, images) over V masked views (section 5 of the method).

    Args:
        reconstruction: (V·B, C, H, W), the views' reconstructions stacked in order.
        images: (B, C, H, W), any floating dtype; a constant: no gradient flows to it.
        boxes: the hidden boxes, y0, x0, y1, x1 half open: integers (V, B, 4), or a sequence of V
            tensors (B, 4). Needed for ``region="masked"``, unused otherwise.
        region: ``"image"``: each view's error is averaged over all elements; ``"masked"``: over
            those inside the view's boxes only (a view whose boxes are all empty counts 0).
        backend: force a backend; see :func:`sanm_kernels.use_backend`.

    Returns:
        The loss (), float32 (float64 for a float64 reconstruction), differentiable in
        `reconstruction`; 0 for an empty batch.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or values, such as a
            box that is not inside the image.
    """
    validate.floating(reconstruction, "reconstruction", 4, shape="(V·B, C, H, W)")
    validate.floating(images, "images", 4, shape="(B, C, H, W)")
    validate.same_device(images, "images", reconstruction.device, "reconstruction")
    N, B = reconstruction.shape[0], images.shape[0]
    if reconstruction.shape[1:] != images.shape[1:] or (N % B if B else N):
        raise ValueError(
            f"reconstruction: expected shape {['V·B', *images.shape[1:]]} with "
            f"B = {B} like images, got {list(reconstruction.shape)}"
        )
    if validate.one_of(region, "region", ("image", "masked")) == "image":
        boxes = None
    elif boxes is None:
        raise ValueError("boxes: expected the hidden boxes, which region='masked' needs, got None")
    if boxes is not None:
        if not isinstance(boxes, Tensor):
            parts = [
                validate.integer(b, "boxes", 2, shape="(B, 4)")
                for b in validate.tensors(
                    boxes, "boxes", "a tensor (V, B, 4) or a sequence of them"
                )
            ]
            if any(b.shape != parts[0].shape or b.device != parts[0].device for b in parts):
                raise ValueError(
                    "boxes: expected tensors of one shape on one device, got shapes "
                    f"{[list(b.shape) for b in parts]}"
                )
            boxes = torch.stack(parts)
        boxes = validate.integer(boxes, "boxes", 3, shape="(V, B, 4)").contiguous()
        validate.same_device(boxes, "boxes", reconstruction.device, "reconstruction")
        V = N // B if B else boxes.shape[0]
        if boxes.shape != (V, B, 4):
            raise ValueError(f"boxes: expected shape {[V, B, 4]}, got {list(boxes.shape)}")
    loss: Tensor = call(
        "reconstruction_loss", reconstruction.device, backend, reconstruction, images, boxes
    )
    return loss
