"""The public functions that make targets and mixed batches: `refine_targets`, `mixup_views`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sanm_kernels import validate
from sanm_kernels.backends import call


@validate.public
def mixup_views(
    views: Sequence[Tensor],
    lam: float | Tensor,
    permutation: Tensor,
    *,
    rows: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Mix the rows of several views: out_i = λ·v_i + (1 − λ)·v_π(i), v their stack (section 7).

    The stack itself, ``torch.cat(views)``, is never made.

    Args:
        views: tensors (b_i, …) of one trailing shape, dtype and device; M = Σ b_i rows.
        lam: λ in [0, 1], a number or a tensor (), as the weights of :func:`masked_loss`.
        permutation: π, integers (≥ rows,); the first `rows` entries are distinct and in [0, M).
        rows: how many mixed rows are wanted; all M by default.
        backend: force a backend; see :func:`sanm_kernels.use_backend`.

    Returns:
        (rows, …) in the views' dtype (computed in float32 for the half types), channels_last if
        all views are; differentiable in every view.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or values.
    """
    views = validate.tensors(views, "views", "a sequence of tensors")
    rows = _check_mixup_views(views, permutation, rows)
    device = views[0].device
    share = validate.scalars(views[0], validate.scheduled(lam, "lam", device, 0, 1))
    mixed: Tensor = call(
        "mixup_views", device, backend, views, share, validate.int64(permutation), rows
    )
    return mixed


@validate.by_kinds()
def _check_mixup_views(views: list[Tensor], permutation: Tensor, rows: int | None) -> int:
    """How many rows are wanted."""
    first = validate.floating(views[0], "views[0]")
    if first.dim() == 0:
        raise ValueError("views[0]: expected shape (b, …), got []")
    for i, view in enumerate(views[1:], 1):
        if view.dtype != first.dtype:
            raise TypeError(f"views[{i}]: expected {first.dtype} like views[0], got {view.dtype}")
        if view.dim() == 0 or view.shape[1:] != first.shape[1:]:
            raise ValueError(
                f"views[{i}]: expected shape {['b', *first.shape[1:]]} like views[0], "
                f"got {list(view.shape)}"
            )
        validate.same_device(view, f"views[{i}]", first.device, "views[0]")
    total = sum(view.shape[0] for view in views)
    rows = total if rows is None else validate.count(rows, "rows", total)
    validate.permutation(permutation, "permutation", rows, first.device, "views")
    return rows


@validate.public
def refine_targets(
    logits: Tensor | Sequence[Tensor],
    *,
    labels: Tensor | None = None,
    clean_prob: Tensor | None = None,
    temperature: float | Tensor = 0.5,
    backend: str | None = None,
) -> Tensor:
    """Targets guessed from predictions, blended with the labels, sharpened (section 7.2).

    p = the mean of softmax over the given logits, then q·label + (1 − q)·p where labels are given,
    then p^(1/T) / Σ p^(1/T).

    Args:
        logits: (B, K), or a sequence of them: the predictions of several views and networks.
        labels: None, or integers (B,) in [0, K), or soft labels (B, K), rows of
            values in [0, 1] that sum to 1; the sum is not checked.
        clean_prob: q (B,) or (B, 1) in [0, 1]; given exactly when `labels` are.
        temperature: T > 0, a number or a tensor (), as the weights of :func:`masked_loss`; 1
            leaves p as it is.
        backend: force a backend; see :func:`sanm_kernels.use_backend`.

    Returns:
        (B, K), rows summing to 1, float32 (float64 for float64 logits), without a gradient.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or values.
    """
    rows = validate.tensors(logits, "logits", "a tensor or a sequence of tensors")
    _check_refine_targets(rows, labels, clean_prob)
    device = rows[0].device
    if labels is not None and clean_prob is not None:
        soft = labels.is_floating_point()
        labels = validate.detached(labels) if soft else validate.int64(labels)
        clean_prob = validate.detached(validate.row(clean_prob))
    temperature = validate.scheduled(temperature, "temperature", device, 0)
    if not isinstance(temperature, Tensor) and temperature == 0:
        raise ValueError("temperature: expected a number > 0, got 0")
    refined: Tensor = call(
        "refine_targets",
        device,
        backend,
        [validate.detached(z) for z in rows],
        labels,
        clean_prob,
        validate.scalars(rows[0], 1 / temperature),
    )
    return refined


@validate.by_kinds()
def _check_refine_targets(
    rows: list[Tensor], labels: Tensor | None, clean_prob: Tensor | None
) -> None:
    first = validate.floating(rows[0], "logits", 2, shape="(B, K)")
    for i, z in enumerate(rows[1:], 1):
        if z.dtype != first.dtype:
            raise TypeError(f"logits[{i}]: expected {first.dtype} like logits[0], got {z.dtype}")
        if z.shape != first.shape:
            raise ValueError(
                f"logits[{i}]: expected shape {list(first.shape)} like logits[0], "
                f"got {list(z.shape)}"
            )
        validate.same_device(z, f"logits[{i}]", first.device, "logits[0]")
    B, K = first.shape
    if K == 0:
        raise ValueError(f"logits: expected at least one class, got shape {list(first.shape)}")
    if (labels is None) != (clean_prob is None):
        missing = "labels" if labels is None else "clean_prob"
        raise ValueError(f"{missing}: expected labels and clean_prob both or neither, got None")
    if labels is not None and clean_prob is not None:
        validate.is_tensor(labels, "labels")
        validate.same_device(labels, "labels", first.device, "logits")
        if labels.is_floating_point():
            validate.floating(labels, "labels", 2, shape="(B,) integers or (B, K)")
            if labels.shape != first.shape:
                raise ValueError(
                    f"labels: expected shape {list(first.shape)} like logits, "
                    f"got {list(labels.shape)}"
                )
        else:
            validate.integer(labels, "labels")
            validate.length(labels, "labels", B, "the rows of logits")
        clean_prob = validate.quality(clean_prob)
        validate.same_device(clean_prob, "clean_prob", first.device, "logits")
        validate.length(clean_prob, "clean_prob", B, "the rows of logits")
