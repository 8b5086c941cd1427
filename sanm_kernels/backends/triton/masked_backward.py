"""Gradients of masked_forward: in the targets, the images, and the one-pass classifier's inputs.

- Targets: t' = t + constants, but where the drop is t[j*] itself (clamped), t'[j*] = 0 and every
  other target holds t[j*]/(K − 1), so j* gets the mean of the others' gradients instead of its own.
- Images: a pixel outside a view's box passes its gradient on; with the mean fill each pixel of a
  channel also gets 1/(H·W) of what arrives inside the box.
- Classifier: d = (softmax·Σt' − t')·grad_loss/B + grad_logits; dW = dᵀ·z, dF = (d·W) ⊗ v/Σv.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sanm_kernels.backends.triton import numeric, painting
from sanm_kernels.backends.triton.launch import (
    implements,
    launch,
    launch_tuned,
    power_of_2,
    triton_dtype,
    wide,
)
from sanm_kernels.ops.masked_forward import Spec
from sanm_kernels.reference.masked_forward import is_channels_last
from sanm_kernels.reference.precision import accumulate_dtype


@triton.jit(do_not_specialize=["B", "K", "S"])
def modulate_backward_kernel(
    grad,  # (S, B, K)
    targets,  # (B, K)
    ratio,  # (S, B) float32
    result,  # (B, K), written
    B, K, S, g_s, g_b, g_k, t_b, t_k,
    CLAMP: tl.constexpr, CLASSES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Program b: row b."""
    b = tl.program_id(0).to(tl.int64)
    best, top = painting.first_argmax(targets + b * t_b, K, t_k, CLASSES, ACC)
    extra = tl.zeros((), ACC)  # what j* gets on top of its own gradients
    for s in range(0, S):
        row = grad + s * g_s + b * g_b
        total = tl.zeros((), ACC)
        for first in range(0, K, CLASSES):
            k = first + tl.arange(0, CLASSES)
            total += tl.sum(tl.load(row + k * g_k, mask=k < K, other=0.0).to(ACC), 0)
        own = tl.load(row + top * g_k).to(ACC)
        if CLAMP:
            emptied = best < tl.load(ratio + s * B + b)
            others = (total - own) / (K - 1)
            extra += tl.where(emptied, others - own, 0.0)
    for first in range(0, K, CLASSES):
        k = first + tl.arange(0, CLASSES)
        value = tl.zeros((CLASSES,), ACC)
        for s in range(0, S):
            g = tl.load(grad + s * g_s + b * g_b + k * g_k, mask=k < K, other=0.0)
            value += g.to(ACC)
        value += tl.where(k == top, extra, 0.0)
        tl.store(result + b * K + k, numeric.cast(value, result.dtype.element_ty), mask=k < K)


@implements("modulate_backward")
def modulate_backward(grad: Tensor, targets: Tensor, ratio: Tensor, clamp: bool) -> Tensor:
    """Gradient of the targets (B, K) from that of the modulated ones (S, B, K)."""
    sets, batch, classes = grad.shape
    result = targets.new_empty(targets.shape)

    def go(config: dict[str, int]) -> None:
        launch(
            modulate_backward_kernel, (batch,), grad, targets, ratio.contiguous(), result, batch,
            classes, sets, *grad.stride(), *targets.stride(), CLAMP=clamp,
            CLASSES=min(power_of_2(classes), config["TILE"]),
            ACC=triton_dtype(accumulate_dtype(targets)), num_warps=config["num_warps"],
        )  # fmt: skip

    launch_tuned("rows", classes, grad, go)
    return result


@triton.jit(do_not_specialize=["B", "H", "W", "V"])
def views_backward_kernel(
    grad,  # (V·B, Cin, H, W)
    boxes,  # (V, B, 4) int32
    result,  # (B, Cin, H, W), contiguous or channels_last, written
    B, H, W, V, g_b, g_c, g_h, g_w, r_b, r_c, r_h, r_w,
    MEAN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Program (b, c): channel c of sample b."""
    b, c = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    inside_sum = tl.zeros((), ACC)
    if MEAN:
        for v in range(0, V):
            g = grad + (v * B + b) * g_b + c * g_c
            box = boxes + (v * B + b) * 4
            hidden_sum = tl.zeros((ROWS, COLUMNS), ACC)
            for y0 in range(0, H, ROWS):
                y = (y0 + tl.arange(0, ROWS)[:, None]).to(tl.int64)
                for x0 in range(0, W, COLUMNS):
                    x = (x0 + tl.arange(0, COLUMNS)[None, :]).to(tl.int64)
                    hidden = (y >= tl.load(box)) & (y < tl.load(box + 2))
                    hidden &= (x >= tl.load(box + 1)) & (x < tl.load(box + 3))
                    value = tl.load(g + y * g_h + x * g_w, mask=hidden, other=0.0)
                    hidden_sum += value.to(ACC)
            inside_sum += tl.sum(tl.sum(hidden_sum, 1), 0) / (H.to(ACC) * W.to(ACC))
    for y0 in range(0, H, ROWS):
        y = (y0 + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        for x0 in range(0, W, COLUMNS):
            x = (x0 + tl.arange(0, COLUMNS)[None, :]).to(tl.int64)
            inside = (y < H) & (x < W)
            total = tl.zeros((ROWS, COLUMNS), ACC)
            for v in range(0, V):
                box = boxes + (v * B + b) * 4
                hidden = (y >= tl.load(box)) & (y < tl.load(box + 2))
                hidden &= (x >= tl.load(box + 1)) & (x < tl.load(box + 3))
                offsets = (v * B + b) * g_b + c * g_c + y * g_h + x * g_w
                value = tl.load(grad + offsets, mask=inside & (hidden == 0), other=0.0)
                total += value.to(ACC)
            if MEAN:
                total += inside_sum
            offsets = b * r_b + c * r_c + y * r_h + x * r_w
            tl.store(result + offsets, numeric.cast(total, result.dtype.element_ty), mask=inside)


@implements("masked_views_backward")
def masked_views_backward(grad: Tensor, boxes: Tensor, mean_fill: bool) -> Tensor:
    """Gradient of the images (B, Cin, H, W) from that of the views (V·B, Cin, H, W)."""
    views, batch = boxes.shape[:2]
    _, channels, height, width = grad.shape
    result = torch.empty_like(grad[:batch])

    def go(config: dict[str, int]) -> None:
        columns = min(power_of_2(width), 256)
        launch(
            views_backward_kernel, (batch, channels), grad, boxes.contiguous(), result, batch,
            height, width, views, *grad.stride(), *result.stride(), MEAN=mean_fill,
            ROWS=max(min(config["TILE"] // columns, power_of_2(height)), 1), COLUMNS=columns,
            ACC=triton_dtype(accumulate_dtype(grad)), num_warps=config["num_warps"],
        )  # fmt: skip

    launch_tuned("pixels", height * width, grad, go)
    return result


@triton.jit(do_not_specialize=["B", "K"])
def logits_backward_kernel(
    grad_logits,  # (B, K) or None
    grad_loss,  # () or None
    logits,  # (B, K) in ACC
    targets,  # (B, K)
    result,  # (B, K) in ACC, written
    B, K, g_b, g_k, t_b, t_k, CLASSES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Program b: d = (softmax·Σt' − t')·grad_loss/B + grad_logits of row b."""
    b = tl.program_id(0).to(tl.int64)
    z = logits + b * K
    top = -float("inf")
    mass = tl.zeros((), ACC)
    for first in range(0, K, CLASSES):
        k = first + tl.arange(0, CLASSES)
        top = tl.maximum(top, tl.max(tl.load(z + k, mask=k < K, other=-float("inf")), 0))
        mass += tl.sum(tl.load(targets + b * t_b + k * t_k, mask=k < K, other=0.0).to(ACC), 0)
    total = tl.zeros((), ACC)
    for first in range(0, K, CLASSES):
        k = first + tl.arange(0, CLASSES)
        total += tl.sum(tl.exp(tl.load(z + k, mask=k < K, other=-float("inf")) - top), 0)
    for first in range(0, K, CLASSES):
        k = first + tl.arange(0, CLASSES)
        d = tl.zeros((CLASSES,), ACC)
        if grad_loss is not None:
            p = tl.exp(tl.load(z + k, mask=k < K, other=-float("inf")) - top) / total
            t = tl.load(targets + b * t_b + k * t_k, mask=k < K, other=0.0).to(ACC)
            d = (p * mass - t) * (tl.load(grad_loss) / B)
        if grad_logits is not None:
            d += tl.load(grad_logits + b * g_b + k * g_k, mask=k < K, other=0.0)
        tl.store(result + b * K + k, d, mask=k < K)


@triton.jit(do_not_specialize=["C", "n"])
def features_backward_kernel(
    pooled_grad,  # (B, C) in ACC: d·W
    visible,  # (B, h·w) in ACC: v/Σv
    result,  # (B, C, h, w), contiguous or channels_last, written
    C, n, r_b, r_c, r_p,
    CELLS: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program (b, block of channels): dF[c, p] = dz[c]·v[p]/Σv."""
    b = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    dz = tl.load(pooled_grad + b * C + c, mask=c < C, other=0.0)
    if WIDE:
        c = c.to(tl.int64)
    for first in range(0, n, CELLS):
        p = first + tl.arange(0, CELLS)
        v = tl.load(visible + b * n + p, mask=p < n, other=0.0)
        offsets = c[:, None] * r_c + p[None, :] * r_p
        inside = (c < C)[:, None] & (p < n)[None, :]
        value = numeric.cast(dz[:, None] * v[None, :], result.dtype.element_ty)
        tl.store(result + b * r_b + offsets, value, mask=inside)


@implements("classifier_backward")
def classifier_backward(
    grad_logits: Tensor | None,
    grad_loss: Tensor | None,
    features: Tensor,
    weight: Tensor,
    logits: Tensor,
    targets: Tensor,
    pooled: Tensor,
    visible: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of features (B, C, h, w), weight (K, C) and bias (K,) in the one-pass mode."""
    batch, channels, h, w = features.shape
    classes = logits.shape[1]
    d = torch.empty_like(logits)
    acc = triton_dtype(logits.dtype)

    def residual(config: dict[str, int]) -> None:
        launch(
            logits_backward_kernel, (batch,), grad_logits, grad_loss, logits, targets, d, batch,
            classes, *(0, 0) if grad_logits is None else grad_logits.stride(), *targets.stride(),
            CLASSES=min(power_of_2(classes), config["TILE"]), ACC=acc,
            num_warps=config["num_warps"],
        )  # fmt: skip

    launch_tuned("rows", classes, logits, residual)
    dz = d @ weight.to(d.dtype)
    spec = Spec(tuple(features.shape), features.dtype, is_channels_last(features))
    df = spec.empty(features.device)

    def outer(config: dict[str, int]) -> None:
        cells = min(power_of_2(h * w), 256)
        block = max(min(config["TILE"] // cells, power_of_2(channels)), 1)
        launch(
            features_backward_kernel, (batch, -(-channels // block)), dz, visible, df, channels,
            h * w, df.stride(0), df.stride(1), channels if spec.channels_last else 1,
            CELLS=cells, CHANNELS=block, WIDE=wide(df[:1]), num_warps=config["num_warps"],
        )  # fmt: skip

    launch_tuned("pixels", channels * h * w, features, outer)
    return df, (d.T @ pooled).to(weight.dtype), d.sum(0)
