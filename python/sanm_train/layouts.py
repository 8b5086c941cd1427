"""How a layer's output is a feature map: channels first, channels last or tokens; by shapes alone.

What cannot be told is refused: the message follows "feature_layer … gave (B, …), ".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

LAYOUTS = ("auto", "BCHW", "BHWC", "BNC")
#: How far h : w may be from the image's. Rounding makes 2 × 1 cells of 3 : 2.
FAR = 2.0
#: Class and register tokens that may precede the image's; more are no grid's remainder.
MOST_EXTRA = 8


class Layout(NamedTuple):
    """How a layer's output is a map of `grid` = (h, w) cells; `extra` tokens come before it."""

    kind: str
    grid: tuple[int, int]
    extra: int = 0

    def read(self, x: Tensor) -> Tensor:
        """`x` as (B, C, h, w), a view of it."""
        if self.kind == "BHWC":
            return x.permute(0, 3, 1, 2)
        if self.kind == "BNC":
            return x[:, self.extra :].transpose(1, 2).unflatten(2, self.grid)
        return x


def layout_of(
    shape: Sequence[int],
    image: tuple[int, int],
    layout: str = "auto",
    grid: tuple[int, int] | None = None,
    widths: frozenset[int] = frozenset(),
    patch: int | None = None,
) -> Layout:
    """How an output of `shape` (B, …) is a feature map of images of `image` = (H, W) pixels.

    layout and grid are the user's; widths are those of the classifier's input, which the map's
    channels agree with where it is pooled and classified; patch is the side of what tokens stand
    for, where the model says.

    Raises:
        ValueError: there is no telling, or it is no map that masks can be found on. The message is
            what follows the name of the layer and the shape.
    """
    if layout == "auto" and len(shape) == 4:
        return _either(shape, image, grid, widths)
    if len(shape) != (3 if layout in ("auto", "BNC") else 4):
        kinds = {"auto": "(B, C, h, w), (B, h, w, C) or tokens (B, N, C)"}
        wanted = kinds.get(layout, f"{layout}: four dimensions" if layout != "BNC" else "(B, N, C)")
        raise ValueError(f"which is not {wanted}; name a layer before the pooling, or give to_map=")
    if len(shape) == 3:
        if layout == "auto" and shape[1] in widths and shape[2] not in widths:
            raise ValueError(
                f"of which the classifier's width, {shape[1]}, is the second dimension and not, as "
                "in tokens (B, N, C), the last; give to_map="
            )
        return _checked(_tokens(shape[1], image, grid, patch), image, grid)
    h, w = shape[1:3] if layout == "BHWC" else shape[2:]
    return _checked(Layout(layout, (h, w)), image, grid)


def _either(
    shape: Sequence[int],
    image: tuple[int, int],
    grid: tuple[int, int] | None,
    widths: frozenset[int],
) -> Layout:
    """(B, C, h, w) or (B, h, w, C), by the width of the classifier and the image's aspect."""
    _, a, b, c = shape
    if (b, c) == (1, 1) or (a, b) == (1, 1):
        raise ValueError(_one_cell())
    both = {Layout("BCHW", (b, c)): a, Layout("BHWC", (a, b)): c}
    fit = [x for x in both if _aspect(x.grid, image) <= FAR and _inside(x.grid, image)]
    fit = [x for x in fit if grid is None or x.grid == tuple(grid)]
    wide = [x for x, channels in both.items() if channels in widths]
    seen = f"for images of {image[0]} × {image[1]} pixels"
    seen += f" and a classifier of width {_either_of(widths)}" if widths else ""
    if not fit:
        raise ValueError(
            f"{seen}: neither {b} × {c} nor {a} × {b} cells have the image's aspect or are fewer "
            "than its pixels" + (f", or grid={tuple(grid)}" if grid else "") + "; name another "
            "layer, or give to_map="
        )
    if len(fit) == 2:
        close = [x for x in fit if x in wide] if len(wide) == 1 else []
        close = close or [x for x in fit if _to_a_cell(x.grid, image)]
        if len(close) == 1:
            return close[0]
    elif not wide or fit[0] in wide:
        return fit[0]
    raise ValueError(
        f"{seen} can be (B, C, h, w) or (B, h, w, C); say which: layout='BCHW' or layout='BHWC'"
    )


def _tokens(
    number: int, image: tuple[int, int], grid: tuple[int, int] | None, patch: int | None
) -> Layout:
    """The grid of `number` tokens: as given, that of the patches, or the one of the image's aspect
    that leaves fewest for class and registers, which come first."""
    if grid is not None:
        extra = number - grid[0] * grid[1]
        if not 0 <= extra <= MOST_EXTRA:
            raise ValueError(
                f"whose {number} tokens are not those of grid={tuple(grid)} and up to {MOST_EXTRA} "
                "for class and registers"
            )
        return Layout("BNC", (grid[0], grid[1]), extra)
    H, W = image
    if patch is not None and 0 <= number - (H // patch) * (W // patch) <= MOST_EXTRA:
        cells = (H // patch, W // patch)
        return Layout("BNC", cells, number - cells[0] * cells[1])
    options = {(H // p, W // p) for p in range(1, max(image) + 1)}  # patches of p × p pixels
    options |= {(-(-H // p), -(-W // p)) for p in range(1, max(image) + 1)}  # with padding
    options |= {(h, h * W // H) for h in range(1, number + 1) if h * W % H == 0}
    found = [(number - h * w, h, w) for h, w in options if h * w > 0 and h * w <= number]
    found = [x for x in found if x[0] <= MOST_EXTRA and _aspect(x[1:], image) <= FAR]
    if not found:
        raise ValueError(
            f"whose {number} tokens do not form a grid of the aspect of {H} × {W} pixels with "
            f"up to {MOST_EXTRA} for class and registers; say grid=(h, w)"
        )
    extra, h, w = min(found, key=lambda x: (x[0], _aspect(x[1:], image)))
    return Layout("BNC", (h, w), extra)


def _checked(found: Layout, image: tuple[int, int], grid: tuple[int, int] | None) -> Layout:
    h, w = found.grid
    if grid is not None and (h, w) != tuple(grid):
        raise ValueError(f"which as {found.kind} has {h} × {w} cells, not grid={tuple(grid)}")
    if h * w == 1:
        raise ValueError(_one_cell())
    if _aspect(found.grid, image) > FAR:
        raise ValueError(
            f"which as {found.kind} has {h} × {w} cells, far from the aspect of the image's "
            f"{image[0]} × {image[1]} pixels; give another layout=, or resize the map in to_map="
        )
    return found


def _one_cell() -> str:
    return (
        "a map of one cell: its peak and its trough are always the same place, so both masked "
        "views would be alike; name an earlier layer, or train on larger images"
    )


def _aspect(grid: Sequence[int], image: tuple[int, int]) -> float:
    """How many times h : w is the image's, or the other way round."""
    ratio = grid[0] * image[1] / max(1, grid[1] * image[0])
    return max(ratio, 1 / ratio) if ratio else float("inf")


def _inside(grid: tuple[int, int], image: tuple[int, int]) -> bool:
    return grid[0] <= image[0] and grid[1] <= image[1]


def _to_a_cell(grid: tuple[int, int], image: tuple[int, int]) -> bool:
    (h, w), (H, W) = grid, image
    return abs(h - w * H / W) < 1 or abs(w - h * W / H) < 1


def _either_of(widths: frozenset[int]) -> str:
    return " or ".join(map(str, sorted(widths)))


def shape_text(shape: Sequence[int]) -> str:
    return f"({', '.join(['B', *map(str, shape[1:])])})"
