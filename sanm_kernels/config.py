"""Every switch of the method as one field, and the three named presets."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Iterable
from dataclasses import dataclass

POSITIONS = ("center", "corner")
FILLS = ("constant", "uniform", "mean", "pixel")
DROPS = ("clamped", "unclamped")
VIEWS = ("max", "min")
#: Of area_scale and of aspects: with it no box's side leaves float32 on the way.
_MOST = 1_000_000


@dataclass(frozen=True)
class MaskConfig:
    """How activation maps become boxes, masked views and modulated targets.

    The defaults are the semantics of the paper (Tu et al., CVPR 2023); see also
    :meth:`official_cifar` and :meth:`official_clothing1m`. Instances are immutable:
    derive variants with :meth:`replace`.

    Attributes:
        position: ``"center"`` puts the box's centre on the peak, ``"corner"`` its top-left corner.
        area_scale: κ; a box covers κ·r·H·W pixels.
        views: which masked views are made, any non-empty subset of ``("max", "min")``.
        shared_draws: one draw of area and aspect serves both views (so both have one ratio and
            one set of modulated targets); otherwise each view draws its own.
        quantize: find peak and trough after quantising the upsampled map to 256 levels.
        fill: what a box is filled with. ``"constant"``: `fill_value`; ``"uniform"``: one U(0,1)
            per sample, view and channel; ``"mean"``: the sample's channel mean; ``"pixel"``:
            N(0,1) per element.
        fill_value: the constant, one number or one per channel.
        ratio_low, ratio_high, ratio_gamma: r = a + γ·(1 − q) with a ~ U(low, high).
        aspect_low, aspect_high: the box's aspect s ~ U(low, high).
        drop: ``"clamped"``: the label loses min(r, t[j*]), so no target is negative;
            ``"unclamped"``: it loses r.
        reconstruction_weight: weight of the reconstruction loss in training; no kernel reads it.

    Raises:
        TypeError, ValueError: a field has the wrong type or is out of range; the message names it.
    """

    position: str = "center"
    area_scale: float = 1.0
    views: tuple[str, ...] = ("max", "min")
    shared_draws: bool = True
    quantize: bool = False
    fill: str = "constant"
    fill_value: float | tuple[float, ...] = 0.0
    ratio_low: float = 0.02
    ratio_high: float = 0.07
    ratio_gamma: float = 0.03
    aspect_low: float = 0.8
    aspect_high: float = 1.25
    drop: str = "clamped"
    reconstruction_weight: float = 0.02

    def __post_init__(self) -> None:
        _one_of("position", self.position, POSITIONS)
        _one_of("fill", self.fill, FILLS)
        _one_of("drop", self.drop, DROPS)
        if isinstance(self.views, str) or not isinstance(self.views, Iterable):
            raise TypeError(f"views: expected a tuple such as ('max', 'min'), got {self.views!r}")
        given = tuple(self.views)
        if not given or not all(view in VIEWS for view in given):
            raise ValueError(
                f"views: expected at least one of 'max' and 'min', and no other, got {given!r}"
            )
        object.__setattr__(self, "views", tuple(view for view in VIEWS if view in given))
        for name in ("shared_draws", "quantize"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected a bool, got {getattr(self, name)!r}")
        object.__setattr__(self, "fill_value", _fill_value(self.fill_value))
        for name in (
            "area_scale",
            "ratio_low",
            "ratio_high",
            "ratio_gamma",
            "aspect_low",
            "aspect_high",
            "reconstruction_weight",
        ):
            v = _plain(getattr(self, name))
            object.__setattr__(self, name, v)
            if isinstance(v, bool) or not isinstance(v, (int, float)):
                raise TypeError(f"{name}: expected a number, got {v!r}")
            if not math.isfinite(v) or v < 0:
                raise ValueError(f"{name}: expected a finite number ≥ 0, got {v!r}")
        if not 0 < self.area_scale <= _MOST:
            raise ValueError(
                f"area_scale: expected a number in (0, {_MOST}], got {self.area_scale}"
            )
        if not self.ratio_low <= self.ratio_high:
            raise ValueError(
                f"ratio_low: expected at most ratio_high = {self.ratio_high}, got {self.ratio_low}"
            )
        if self.ratio_high + self.ratio_gamma > 1:
            raise ValueError(
                "ratio_high: expected ratio_high + ratio_gamma ≤ 1, "
                f"got {self.ratio_high} + {self.ratio_gamma}"
            )
        if not 1 / _MOST <= self.aspect_low <= self.aspect_high <= _MOST:
            raise ValueError(
                f"aspect_low: expected 1/{_MOST} ≤ aspect_low ≤ aspect_high ≤ {_MOST}, "
                f"got {self.aspect_low} and {self.aspect_high}"
            )

    @classmethod
    def paper(cls) -> MaskConfig:
        """What the paper describes: centred box of area r·H·W, zero fill, clamped label drop."""
        return cls()

    @classmethod
    def official_cifar(cls) -> MaskConfig:
        """What the released CIFAR script computes, quirks included."""
        return cls(
            position="corner", area_scale=0.5, quantize=True, fill="uniform", drop="unclamped"
        )

    @classmethod
    def official_clothing1m(cls) -> MaskConfig:
        """The released Clothing1M constants: larger ratios, and each view draws its own box."""
        return cls(
            position="corner",
            area_scale=1.0,
            shared_draws=False,
            quantize=True,
            fill="uniform",
            ratio_low=0.06,
            ratio_high=0.13,
            ratio_gamma=0.1,
            drop="unclamped",
            reconstruction_weight=0.3,
        )

    def __setstate__(self, state: dict[str, object]) -> None:
        """From a pickle or a copy: validated too."""
        self.__dict__.update(state)
        self.__post_init__()

    def replace(self, **changes: object) -> MaskConfig:
        """A copy with the given fields changed, validated anew."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    @property
    def draw_sets(self) -> int:
        """(area, aspect) pairs that a sample draws, 1 if the views share them and else one each."""
        return 1 if self.shared_draws else len(self.views)

    def num_draws(self, channels: int) -> int:
        """Uniform draws per sample for images of `channels` channels (0: no images).

        Their order: area and aspect of each draw set, then with the uniform fill the first view's
        channels, then the second's.
        """
        fills = len(self.views) * channels if self.fill == "uniform" else 0
        return 2 * self.draw_sets + fills


def _plain(value: object) -> object:
    """A number of another library, such as a NumPy scalar, as Python's."""
    if isinstance(value, (int, float)) or not isinstance(value, numbers.Real):
        return value
    return float(value)


def _fill_value(value: object) -> float | tuple[float, ...]:
    value = _plain(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return _finite(value)
    try:
        numbers = () if isinstance(value, (str, bool)) else tuple(map(float, value))  # type: ignore[call-overload]
    except (TypeError, ValueError):
        numbers = ()
    if not numbers:
        raise TypeError(f"fill_value: expected a number, or one per channel, got {value!r}")
    return tuple(_finite(number) for number in numbers)


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"fill_value: expected finite numbers, got {value!r}")
    return value


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
