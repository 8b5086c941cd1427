"""masked_forward and activation_stats (sections 1 to 4 of the method), one program per sample.

A program sums E over the channels of its sample (the only read of the feature map), finds peak and
trough (`activation`), draws ratio and boxes, modulates the targets and paints the views
(`painting`): one launch. A few samples with large feature maps or images are split over several
programs each: a first launch sums E over slices of the channels, and in the second every program
computes the boxes redundantly from those partial sums and paints its share of the image.

Gradients: t' = t + constants, except where the drop is t[j*] itself (clamped): there t'[j*] = 0 and
every other target gains t[j*]/(K − 1), so j* gets the mean of the others' gradients instead of its
own. A pixel outside a view's box gets the view's gradient; with the mean fill each pixel of a
channel also gets 1/(H·W) of the sum of the gradients inside the box.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sanm_kernels.backends.triton import activation, numeric, painting, tiles
from sanm_kernels.backends.triton.launch import (
    configuration,
    implements,
    launch,
    power_of_2,
    triton_dtype,
    wide,
)
from sanm_kernels.ops.masked_forward import INPUTS, OUTPUTS, empty_outputs, split_out
from sanm_kernels.reference.masked_forward import (
    CONSTANT,
    MEAN,
    UNIFORM,
    Settings,
    is_channels_last,
)
from sanm_kernels.reference.precision import accumulate_dtype

#: Programs that occupy a large GPU; with fewer samples than that, samples are split.
BUSY = 264
#: Elements of a sample's image or map below which splitting is not worth a second launch.
SPLIT = 1 << 16

_SIZES = [
    "B", "C", "h", "w", "H", "W", "K", "SLICES", "BITS", "draw_count", "fill_stride", "rows_each",
    "room", "f_b", "width", "size", "x_b", "planes", "step", "length",
]  # fmt: skip


@triton.jit(do_not_specialize=["n", "C", "channels", "slice", "room", "f_b", "width", "size"])
def energy_kernel(
    features,  # (B, C, h, w), samples dense
    partial,  # (B, SLICES, room) in ACC, of which the first n are written
    n, C, channels, slice, room, f_b, width, size,
    CHANNELS_FIRST: tl.constexpr, GROUP: tl.constexpr, VECTOR: tl.constexpr,
    MAP_ROWS: tl.constexpr, MAP_COLUMNS: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program (b, s): Σ F² over the channels of slice s; slices are `slice` vectors apart."""
    b, s, slices = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    f = features + (b * f_b + s.to(tl.int64) * slice) * VECTOR
    count = tl.minimum(channels, C - s * channels)
    activation.energy(f, partial + (b * slices + s) * room, n, count, width,
                      tl.minimum(slice, size - s * slice), CHANNELS_FIRST, GROUP, VECTOR, MAP_ROWS,
                      MAP_COLUMNS, ACC, WIDE)  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def masked_forward_kernel(
    features,  # (B, C, h, w), samples dense, or with SLICES > 0 partial energies (B, SLICES, room)
    workspace,  # (B·programs, room) in ACC: each program's energy map
    targets,  # (B, K) floats or (B,) int64, or None
    clean_prob,  # (B,) float32
    draws,  # (B, draw_count) float64 or None
    seed,  # () int64 or None
    sample_index,  # (B,) int64 or None
    images,  # (B, Cin, H, W), samples dense, or None
    fills,  # float64: (1 or Cin,) of CONSTANT; workspace (B·programs, Cin) of MEAN, (·, V·Cin) of
    #         UNIFORM; else None
    stats,  # (5, B) in ACC
    positions,  # (2, B, 2) int32
    ratio,  # (S, B) float32
    boxes,  # (V, B, 4) int32
    all_boxes,  # workspace (B·programs, V, 4) int32: each program's boxes
    new_targets,  # (S, B, K)
    views,  # (V·B, Cin, H, W), dense in the same order
    B, C, h, w, H, W, K, SLICES, BITS, draw_count, fill_stride, rows_each, room, f_b, width, size,
    x_b, planes, step, length, t_b, t_k, q_b, i_b,
    ratio_low: tl.float64, ratio_high: tl.float64, ratio_gamma: tl.float64,
    aspect_low: tl.float64, aspect_high: tl.float64, area_scale: tl.float64,
    VIEWS: tl.constexpr, SHARED: tl.constexpr, CENTERED: tl.constexpr, QUANTIZE: tl.constexpr,
    CLAMP: tl.constexpr, FILL: tl.constexpr, SPLIT_MAP: tl.constexpr, SOFT: tl.constexpr,
    CHANNELS_FIRST: tl.constexpr, GROUP: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    ACC: tl.constexpr, TARGET_ACC: tl.constexpr, CELLS: tl.constexpr, MAP_ROWS: tl.constexpr,
    MAP_COLUMNS: tl.constexpr, SEGMENTS: tl.constexpr, LOCATE_COLUMNS: tl.constexpr,
    CLASSES: tl.constexpr, MEANS: tl.constexpr, NOISE_ROWS: tl.constexpr,
    NOISE_COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, VECTOR: tl.constexpr, IMAGE_VECTOR: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program (b, part): all of sample b up to the boxes; its rows of the image."""
    b, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    own = b * tl.num_programs(1) + part
    n = h * w
    e = workspace + own * room
    if SPLIT_MAP:
        for first in range(0, n, CELLS):
            p = first + tl.arange(0, CELLS)
            total = tl.zeros((CELLS,), ACC)
            for s in range(0, SLICES):
                total += tl.load(features + (b * SLICES + s) * room + p, mask=p < n, other=0.0)
            tl.store(e + p, total, mask=p < n)
    else:
        activation.energy(features + b * f_b * VECTOR, e, n, C, width, size, CHANNELS_FIRST, GROUP,
                          VECTOR, MAP_ROWS, MAP_COLUMNS, ACC, WIDE)  # fmt: skip
    tl.debug_barrier()  # E is written, and read by other threads below
    high, low, mean, std, entropy, finite = activation.statistics(e, n, CELLS, ACC)
    peak, trough = activation.locate(e, finite, h, w, H, W, BITS, QUANTIZE, SEGMENTS,
                                      LOCATE_COLUMNS)  # fmt: skip
    if part == 0:
        tl.store(stats + b, high)
        tl.store(stats + B + b, low)
        tl.store(stats + 2 * B + b, mean)
        tl.store(stats + 3 * B + b, std)
        tl.store(stats + 4 * B + b, entropy)
        tl.store(positions + b * 2, peak // W)
        tl.store(positions + b * 2 + 1, peak % W)
        tl.store(positions + (B + b) * 2, trough // W)
        tl.store(positions + (B + b) * 2 + 1, trough % W)

    if targets is not None:  # else activation_stats
        COUNT: tl.constexpr = 2 if VIEWS == 3 else 1
        q = tl.load(clean_prob + b * q_b)
        index = b
        if sample_index is not None:
            index = tl.load(sample_index + b * i_b)
        key = index * 0
        if seed is not None:
            key = tl.load(seed)
        given = draws
        if draws is not None:
            given = draws + b * draw_count
        number = tl.zeros((), tl.int32)
        mine = all_boxes + own * (4 * COUNT)
        for view in tl.static_range(COUNT):
            own_draw = 0 if SHARED else view
            r, height, width = painting.size(
                painting.draw(given, number + 2 * own_draw, index, key),
                painting.draw(given, number + 2 * own_draw + 1, index, key),
                q, H, W, ratio_low, ratio_high, ratio_gamma, aspect_low, aspect_high, area_scale,
            )  # fmt: skip
            position = peak
            if (VIEWS == 2) or (view == 1):
                position = trough
            y = painting.corner(position // W, height, H, CENTERED)
            x = painting.corner(position % W, width, W, CENTERED)
            tl.store(mine + 4 * view, y)
            tl.store(mine + 4 * view + 1, x)
            tl.store(mine + 4 * view + 2, y + height)
            tl.store(mine + 4 * view + 3, x + width)
            if part == 0:
                box = boxes + (view * B + b) * 4
                tl.store(box, y)
                tl.store(box + 1, x)
                tl.store(box + 2, y + height)
                tl.store(box + 3, x + width)
                if (view == 0) or (not SHARED):
                    tl.store(ratio + own_draw * B + b, r)
                    painting.modulate(targets + b * t_b, new_targets + (own_draw * B + b) * K,
                                      r, K, t_k, SOFT, CLAMP, CLASSES, TARGET_ACC)  # fmt: skip
        if images is not None:
            image = images + b * x_b * IMAGE_VECTOR
            fill = fills
            fill_view = 0
            if FILL == 1:
                count = COUNT * planes * step
                fill = fills + own * count
                fill_view = planes * step
                painting.uniforms(fill, given, number + 2 * (1 if SHARED else COUNT), count, index,
                                  key, 32)  # fmt: skip
            if FILL == 2:
                fill = fills + own * (planes * step)
                painting.means(image, fill, planes, step, H * length, IMAGE_VECTOR, MEANS, WIDE)
            tl.debug_barrier()  # boxes and fills are written
            first = part * rows_each
            last = tl.minimum(first + rows_each, H)
            volume = (planes * H).to(tl.int64) * (length * IMAGE_VECTOR)
            view_0 = views + b * volume
            painting.paint(
                image, view_0, B * volume, mine, fill, fill_stride, fill_view, first, last, planes,
                H, length * IMAGE_VECTOR, step, VIEWS, FILL, CHANNELS_LAST, ROWS, COLUMNS, WIDE,
            )  # fmt: skip
            if FILL == 3:
                tl.debug_barrier()  # the copies are written; other threads overwrite the boxes
                painting.noise(
                    view_0, B * volume, mine, index, key, first, last, planes, H,
                    length * IMAGE_VECTOR, step, VIEWS, NOISE_ROWS, NOISE_COLUMNS, WIDE,
                )  # fmt: skip


@functools.lru_cache(64)
def _constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Fill values as a tensor, cached so that they are copied to the device once."""
    return torch.tensor(values, dtype=torch.float64, device=device)


def _samples(
    features: Tensor,
    height: int,
    width: int,
    settings: Settings,
    stats: Tensor,
    positions: Tensor,
    given: dict[str, Any],
    out: dict[str, Tensor],
) -> None:
    """Launches energy_kernel (if samples are split) and masked_forward_kernel."""
    batch, channels, h, w = features.shape
    acc = accumulate_dtype(features)
    cells, device = h * w, features.device
    images, targets = given.get("images"), given.get("targets")
    image_channels = 1 if images is None else images.shape[1]
    image_size = 0 if images is None else images[:1].numel()
    parts = 1
    if 0 < batch < BUSY and max(channels * cells, image_size) >= SPLIT:
        parts = min(-(-BUSY // batch), 16)
    map_last = is_channels_last(features[:1])
    features = tiles.dense(features, map_last)
    channels_last = images is not None and is_channels_last(images)
    if images is not None:
        images = tiles.dense(images, channels_last)
    # The map as a matrix: a row is `group` channels, or all channels of a cell.
    v = tiles.vector(features, rows=channels if map_last else 0)
    group = 1 if map_last else tiles.group(cells, v)
    length = channels if map_last else group * cells
    room = cells if group == 1 else (1 + group) * cells
    draws, sample_index = given.get("draws"), given.get("sample_index")
    if draws is not None:
        draws = draws.contiguous()
    fills, fill_stride = None, 1
    if images is not None and settings.fill == CONSTANT:
        fills = _constants(tuple(settings.fill_value), device)
        fill_stride = int(len(settings.fill_value) > 1)
    elif images is not None and settings.fill in (MEAN, UNIFORM):
        count = image_channels * (settings.view_count if settings.fill == UNIFORM else 1)
        fills = torch.empty(batch * parts, count, dtype=torch.float64, device=device)
    workspace = torch.empty(batch * parts, room, dtype=acc, device=device)
    all_boxes = torch.empty(batch * parts, settings.view_count, 4, dtype=torch.int32, device=device)
    soft = targets is not None and targets.is_floating_point()
    classes = given.get("num_classes", 2)
    target_acc = accumulate_dtype(targets) if targets is not None and soft else torch.float32
    clean_prob = given.get("clean_prob")
    segments = power_of_2(h + 1)

    config = configuration("masked_forward", channels * cells)
    source, slices = features, 0
    tile, warps = config["TILE"], config["num_warps"]
    columns = min(power_of_2(length), 64 if map_last else 1024, tile)
    rows = power_of_2(cells if map_last else -(-channels // group))
    tile_map = {
        "CHANNELS_FIRST": not map_last,
        "GROUP": group,
        "VECTOR": v,
        "MAP_ROWS": max(min(rows, tile // columns), 1),
        "MAP_COLUMNS": columns,
        "ACC": triton_dtype(acc),
        "WIDE": wide(features[:1], None if images is None else images[:1]),
        "num_warps": warps,
    }
    if parts > 1:
        unit = v if map_last else group
        each = -(-channels // (parts * unit)) * unit
        slices = -(-channels // each)
        source = torch.empty(batch, slices, room, dtype=acc, device=device)
        launch(energy_kernel, (batch, slices), features, source, cells, channels, each,
               each * (1 if map_last else cells) // v, room, features.stride(0) // v,
               length // v, channels * cells // v, **tile_map)  # fmt: skip
    walk = tiles.Walk(0, 0, 0, 1, {"VECTOR": 1, "ROWS": 1, "COLUMNS": 1})
    if images is not None:  # two views need twice the registers: tiles are limited in bytes
        walk = tiles.walk(tile * 2 // images.element_size(), channels_last, images)
    noise = min(walk.tile["COLUMNS"], 32)
    launch(
        masked_forward_kernel, (batch, parts), source, workspace, targets, clean_prob,
        draws, given.get("seed"), sample_index, images, fills, stats, positions,
        out.get("ratio"), out.get("boxes"), all_boxes, out.get("new_targets"),
        out.get("views"), batch, channels, h, w, height, width, classes, slices,
        height.bit_length(), 0 if draws is None else draws.shape[1], fill_stride,
        -(-height // parts), room, features.stride(0) // v, length // v, channels * cells // v,
        0 if images is None else images.stride(0) // walk.vector, *walk.sizes,
        *(0, 0) if targets is None else (targets.stride(0), targets.stride(-1)),
        0 if clean_prob is None else clean_prob.stride(0),
        0 if sample_index is None else sample_index.stride(0),
        settings.ratio_low, settings.ratio_high, settings.ratio_gamma, settings.aspect_low,
        settings.aspect_high, settings.area_scale,
        VIEWS=settings.views, SHARED=settings.shared, CENTERED=settings.centered,
        QUANTIZE=settings.quantize, CLAMP=settings.clamp,
        FILL=settings.fill if images is not None else CONSTANT, SPLIT_MAP=parts > 1,
        SOFT=soft, CHANNELS_LAST=channels_last, TARGET_ACC=triton_dtype(target_acc),
        CELLS=min(power_of_2(cells), 1024), SEGMENTS=segments,
        LOCATE_COLUMNS=max(min(power_of_2(width), 128 * warps // segments), 1),
        CLASSES=min(power_of_2(classes), 1024), NOISE_ROWS=64 * warps // noise,
        NOISE_COLUMNS=noise, MEANS=max(tile // 2, power_of_2(walk.step * walk.vector)),
        ROWS=walk.tile["ROWS"], COLUMNS=walk.tile["COLUMNS"], IMAGE_VECTOR=walk.vector,
        **tile_map,
    )  # fmt: skip


_NOTHING = Settings(3, True, True, False, True, CONSTANT, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, [0.0])


@implements("activation_stats")
def activation_stats(
    features: Tensor, height: int, width: int, quantize: bool
) -> tuple[Tensor, Tensor]:
    """features (B, C, h, w) → statistics (5, B) and peak and trough (2, B, 2) int32."""
    batch = features.shape[0]
    stats = features.new_empty(5, batch, dtype=accumulate_dtype(features))
    positions = features.new_empty(2, batch, 2, dtype=torch.int32)
    settings = _NOTHING._replace(quantize=quantize)
    _samples(features, height, width, settings, stats, positions, {}, {})
    return stats, positions


@implements("masked_forward_out")
def forward_out(*arguments: Any) -> None:
    """masked_forward into given buffers."""
    inputs, buffers = split_out(arguments)
    given = dict(zip(INPUTS, inputs, strict=True))
    out = dict(zip(OUTPUTS, buffers, strict=True))
    settings = Settings.of(given["settings"])
    features = given["features"]
    height, width = given["height"], given["width"]
    _samples(features, height, width, settings, out["stats"], out["positions"], given, out)


@implements("masked_forward")
def forward(*arguments: Any) -> tuple[Tensor, ...]:
    """All of masked_forward; arguments and results as in `ops/masked_forward.py`."""
    buffers = empty_outputs(*arguments)
    forward_out(*arguments, *buffers, None)
    return buffers


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
    extra = tl.zeros((), ACC)  # added to the gradient of t[j*]
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

    config = configuration("rows", classes)
    launch(
        modulate_backward_kernel, (batch,), grad, targets, ratio.contiguous(), result, batch,
        classes, sets, *grad.stride(), *targets.stride(), CLAMP=clamp,
        CLASSES=min(power_of_2(classes), config["TILE"]),
        ACC=triton_dtype(accumulate_dtype(targets)), num_warps=config["num_warps"],
    )  # fmt: skip
    return result


@triton.jit(do_not_specialize=["B", "H", "W", "step", "width", "g_b"])
def hidden_means_kernel(
    grad,  # (V·B, Cin, H, W), samples dense
    boxes,  # (V, B, 4) int32
    means,  # (B, Cin) in ACC, written
    B, H, W, step, width, g_b,
    VIEWS: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ACC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program (b, c): the sum of the gradients inside the boxes of sample b, channel c, / (H·W)."""
    b, c = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = width * VECTOR
    plane = tl.where(step > 1, 0, c)
    mean = tl.zeros((), ACC)
    for v in tl.static_range(VIEWS):
        g = grad + (v * B + b) * g_b * VECTOR
        y0, y1, j0, j1 = tiles.box(boxes + (v * B + b) * 4, step)
        total = tl.zeros((ROWS, COLUMNS), ACC)
        for left in range(j0 // VECTOR * VECTOR, j1, COLUMNS):
            j = left + tl.arange(0, COLUMNS)[None, :]
            own = tiles.within(j, j0, j1) & (j % step == c - plane)
            for top in range(y0, y1, ROWS):
                y = top + tl.arange(0, ROWS)[:, None]
                at = tiles.offset(plane * H + y, length, WIDE) + j
                read = (y < y1) & tiles.meets(j, j0, j1, VECTOR)
                value = tl.load(g + at, mask=read, other=0.0).to(ACC)
                total += tl.where(own, value, 0.0)
        mean += tl.sum(tl.sum(total, 1), 0) / (H.to(ACC) * W.to(ACC))
    tl.store(means + b * tl.num_programs(1) + c, mean)


@triton.jit(do_not_specialize=["B", "H", "planes", "step", "width", "rows_each", "g_b"])
def views_backward_kernel(
    grad,  # (V·B, Cin, H, W), samples dense
    boxes,  # (V, B, 4) int32
    means,  # (B, Cin) in ACC with the mean fill, else None
    result,  # (B, Cin, H, W), dense in the same order, written
    B, H, planes, step, width, rows_each, g_b,
    VIEWS: tl.constexpr, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program (b, part): its rows of each plane of sample b."""
    b, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = width * VECTOR
    last = tl.minimum(part * rows_each + rows_each, H)
    out = result + b * (planes * H) * length
    for left in range(0, length, COLUMNS):
        j = left + tl.arange(0, COLUMNS)[None, :]
        for plane in range(0, planes):
            if means is not None:
                c = plane
                if CHANNELS_LAST:
                    c = j % step
                mean = tl.load(means + b * (planes * step) + c)
            for top in range(part * rows_each, last, ROWS):
                y = top + tl.arange(0, ROWS)[:, None]
                at = tiles.offset(plane * H + y, length, WIDE) + j
                exists = (y < last) & (j < length)
                total = tl.zeros((ROWS, COLUMNS), ACC)
                for v in tl.static_range(VIEWS):
                    sample = v * B + b
                    y0, y1, j0, j1 = tiles.box(boxes + sample * 4, step)
                    value = tl.load(grad + sample * g_b * VECTOR + at, mask=exists, other=0.0)
                    hidden = tiles.within(y, y0, y1) & tiles.within(j, j0, j1)
                    total += tl.where(hidden, 0.0, value.to(ACC))
                if means is not None:
                    total += mean
                tl.store(out + at, numeric.cast(total, result.dtype.element_ty), mask=exists)


@implements("masked_views_backward")
def masked_views_backward(grad: Tensor, boxes: Tensor, mean_fill: bool) -> Tensor:
    """Gradient of the images (B, Cin, H, W) from that of the views (V·B, Cin, H, W)."""
    views, batch = boxes.shape[:2]
    _, channels, height, width = grad.shape
    result = torch.empty_like(grad[:batch])
    last = is_channels_last(result)
    grad, out, boxes = tiles.dense(grad, last), tiles.dense(result, last), boxes.contiguous()
    acc = accumulate_dtype(grad)
    means = grad.new_empty(batch, channels, dtype=acc) if mean_fill else None

    config = configuration("pixels", channels * height * width)
    walk = tiles.walk(config["TILE"], last, grad, out)
    meta = {"VIEWS": views, "ACC": triton_dtype(acc), "WIDE": wide(out[:1]),
            "num_warps": config["num_warps"], **walk.tile}  # fmt: skip
    stride = grad.stride(0) // walk.vector
    if means is not None:
        launch(hidden_means_kernel, (batch, channels), grad, boxes, means, batch, height, width,
               *walk.sizes[1:], stride, **meta)  # fmt: skip
    parts = tiles.parts(height, walk)
    launch(
        views_backward_kernel, (batch, parts.programs), grad, boxes, means, out, batch, height,
        *walk.sizes, parts.rows, stride, CHANNELS_LAST=last, **meta,
    )  # fmt: skip
    return out if out is result else result.copy_(out)
