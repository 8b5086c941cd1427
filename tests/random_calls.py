"""Random calls of the public functions, each made from its number alone.

From number SMALL on calls are small, for backends that are interpreted or emulated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from inputs import DTYPES, LAYOUTS, TRITON_DEVICE, lay_out
from torch import Tensor
from torch.utils._pytree import tree_leaves

import sanm_kernels as sk
from sanm_kernels.config import DROPS, FILLS, POSITIONS

SMALL = 1_000_000
INDICES = (torch.int64, torch.int32, torch.int16)


@dataclass
class Call:
    """A call of a public function.

    Attributes:
        function: its name in sanm_kernels.
        inputs: tensors by name, among them the leaves that gradients are taken for, which require
            grad; possibly in lists.
        run: (inputs, backend) → what the function returns.
        same: prefixes of the outputs that every backend gives the same bits of.
        exact: whether the call in float64 makes the same decisions, so that all outputs can be
            measured against it; otherwise the statistics alone.
        roundings: what tolerances.assert_accurate allows on top.
        narrow: everything is summed in float32, also what has gradients in float64.
        wrong: the argument that has a wrong value; then the call raises ValueError.
    """

    number: int
    function: str = ""
    inputs: dict[str, Any] = field(default_factory=dict)
    run: Callable[[dict[str, Any], str], Any] = lambda inputs, backend: None
    same: tuple[str, ...] = ()
    exact: bool = True
    roundings: float = 16.0
    narrow: bool = False
    wrong: str = ""


class Maker:
    """Random choices for one call."""

    def __init__(self, number: int) -> None:
        self.small = number >= SMALL
        self.g = torch.Generator().manual_seed(number)
        self.call = Call(number)
        self.spoiling = self.chance(0.05)

    def integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.g))

    def chance(self, probability: float) -> bool:
        return self.real(0, 1) < probability

    def real(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=self.g, dtype=torch.float64))

    def choice(self, options: Sequence[Any]) -> Any:
        return options[self.integer(0, len(options) - 1)]

    def size(self, high: int, small: int) -> int:
        """From 1 on, small sizes more often."""
        high = small if self.small else high
        return max(1, round(high ** self.real(0, 1)))

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.g)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.g)

    def permutation(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self.g)

    def indices(self, high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=self.g)

    def rows(self, n: int, K: int) -> Tensor:
        """Rows (n, K) that sum to 1: soft, one-hot, uniform, or with ties."""
        t = torch.softmax(self.normal(n, K) * self.choice([0.5, 2, 8]), 1)
        if self.chance(0.2):
            t = torch.nn.functional.one_hot(t.argmax(1), K).float()
        elif self.chance(0.1):
            t = torch.full_like(t, 1 / K)
        return t

    def logits(self, n: int, K: int) -> Tensor:
        z = self.normal(n, K) * self.choice([0.1, 1, 4, 12, 60])  # e⁻⁸⁷ is where float32 ends
        if self.chance(0.1):
            z = z.round()  # ties
        if n and K > 2 and self.chance(0.1):
            z[self.integer(0, n - 1), self.integer(1, K - 1)] = -math.inf
        if n and self.chance(0.05):
            z[self.integer(0, n - 1)] = self.choice([math.nan, math.inf, -math.inf])
        if n and self.chance(0.05):
            z[self.integer(0, n - 1), self.integer(0, K - 1)] = self.choice([math.nan, math.inf])
        return z

    def classes(self, high: int, small: int) -> int:
        """Rarely very many."""
        return self.integer(20_000, 200_000) if self.rare(0.01) else self.size(high, small)

    def rare(self, probability: float) -> bool:
        """What would take too long where kernels are interpreted or emulated."""
        return not self.small and self.chance(probability)

    def give(
        self,
        x: Tensor,
        dtypes: Sequence[torch.dtype] = DTYPES,
        *,
        grad: bool = False,
        layouts: Sequence[str] = LAYOUTS,
    ) -> Tensor:
        """x in one of the dtypes and layouts, possibly as a leaf."""
        x = lay_out(x.to(self.choice(dtypes)), self.choice(layouts))
        return x.requires_grad_(grad and x.is_floating_point())

    def spoil(self, x: Tensor, values: Sequence[float], name: str) -> Tensor:
        """x, in which one element may get one of these wrong values."""
        if not self.spoiling or self.call.wrong or x.numel() == 0 or self.chance(0.3):
            return x
        self.call.wrong = name
        x = x.clone()
        x.view(-1)[self.integer(0, x.numel() - 1)] = self.choice(values)
        return x


def yardstick(x: Tensor) -> float:
    """How much less exact a row's sums are, where those in float64 are all there is to compare."""
    return max(1.0, x.shape[-1] ** 0.5 / 16) if x.dtype == torch.float64 else 1.0


def identical(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit, where all NaN count as one."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def features_of(m: Maker, shape: tuple[int, ...], exact: bool) -> Tensor:
    """A feature map, possibly with ties, zeros and rows that are not finite.

    An exact one has multiples of 1/8 whose energy is the same in any order of summation.
    """
    f = m.normal(*shape) * m.choice([0.5, 1, 3])
    if m.chance(0.6):
        f = f.relu()
    if exact:
        f = (f * 8).round().clamp(-63, 63) / 8
    elif m.chance(0.2):
        f = (f * 2).round() / 2
    if m.chance(0.15):
        f[m.integer(0, shape[0] - 1)] = m.choice([0.0, 1.0, math.inf, math.nan])
    return f


def random_config(m: Maker) -> sk.MaskConfig:
    if m.chance(0.3):
        presets = ("paper", "official_cifar", "official_clothing1m")
        return getattr(sk.MaskConfig, m.choice(presets))()
    if m.chance(0.1):  # sides below a pixel, beyond the image, and both
        aspects = sorted((10 ** m.real(-6, 6), 10 ** m.real(-6, 6)))
        return sk.MaskConfig(
            position=m.choice(POSITIONS),
            area_scale=10 ** m.real(-30, 6),
            views=m.choice([("max", "min"), ("max",), ("min",)]),
            ratio_low=0.0,
            ratio_high=m.choice([0.0, 1e-40, 1.0]),
            ratio_gamma=0.0,
            aspect_low=aspects[0],
            aspect_high=aspects[1],
        )
    low = m.real(0, 0.6) if m.chance(0.7) else 0.0
    high = low + m.real(0, 0.3)
    aspect = m.real(0.3, 1.5)
    return sk.MaskConfig(
        position=m.choice(POSITIONS),
        area_scale=m.choice([0.01, 0.5, 1.0, 3.0]),
        views=m.choice([("max", "min"), ("max", "min"), ("max",), ("min",)]),
        shared_draws=m.chance(0.5),
        quantize=m.chance(0.5),
        fill=m.choice(FILLS),
        fill_value=m.choice([0.0, 0.3, -1.7]),
        ratio_low=low,
        ratio_high=high,
        ratio_gamma=m.choice([0.0, 0.03, 1 - high]),
        aspect_low=aspect,
        aspect_high=aspect + m.choice([0.0, 0.45]),
        drop=m.choice(DROPS),
    )


def map_shape(m: Maker) -> tuple[int, int, int, int]:
    return m.integer(1, 5), m.size(1500, 60), m.size(20, 6), m.size(20, 6)


def activation_stats(m: Maker) -> None:
    shape, exact = map_shape(m), m.small or m.chance(0.3)
    f = features_of(m, shape, exact)
    # other strides are copied, which for half types is not the same copy on each backend
    layouts = LAYOUTS if exact else LAYOUTS[:2]
    size = m.size(60, 30), m.size(60, 30)
    config = random_config(m)
    m.call.inputs = {"features": m.give(f, DTYPES if exact else DTYPES[:3], layouts=layouts)}
    m.call.run = lambda x, backend: sk.activation_stats(
        x["features"], size, config=config, backend=backend
    )
    m.call.same, m.call.roundings = ("peak", "trough", "max", "min"), 32.0


def masked_forward(m: Maker) -> None:
    B, C, h, w = map_shape(m)
    H, W, channels, K = m.size(60, 30), m.size(60, 30), m.choice([1, 3, 3, 4]), m.size(200, 40) + 1
    if not m.small and m.chance(0.01):  # large results take another way to memory
        H, W = m.integer(200, 260), m.integer(200, 260)
    config = random_config(m)
    one_pass = "max" in config.views and m.chance(0.4)
    images = not one_pass or m.chance(0.3)
    exact = m.small or one_pass or m.chance(0.5)
    f = features_of(m, (B, C, h, w), exact)
    if one_pass:
        f = torch.where(f.isfinite(), f, 0)
    soft = m.chance(0.7)
    targets = (
        m.spoil(m.rows(B, K), [math.nan, math.inf], "targets")
        if soft
        else m.spoil(m.indices(K, B), [-1, K], "targets")
    )
    given: dict[str, Any] = {
        "features": m.give(f, DTYPES if exact else DTYPES[:3], grad=one_pass,
                           layouts=LAYOUTS if exact else LAYOUTS[:2]),
        "targets": m.give(targets, DTYPES if soft else INDICES, grad=exact and m.chance(0.7)),
        "clean_prob": m.give(m.spoil(m.uniform(B), [1.5, -0.1, math.nan], "clean_prob")),
    }  # fmt: skip
    if images:
        # a mean in float64 is not rounded further, so that other orders of summation show
        dtypes = DTYPES[:3] if config.fill == "mean" and not exact else DTYPES
        x = m.uniform(B, channels, H, W)
        given["images"] = m.give(x, dtypes, grad=exact and m.chance(0.7))
    if one_pass:
        weight = m.give(m.normal(K, C) / C**0.5, grad=True)
        bias = m.give(m.normal(K), grad=True) if m.chance(0.6) else None
        given["classifier"] = (weight, bias)
    if m.chance(0.5):
        given["sample_index"] = m.give(m.indices(2**50, B), [torch.int64])
    if m.chance(0.3):
        uniforms = m.uniform(B, config.num_draws(channels if images else 0)).double()
        uniforms = m.spoil(uniforms, [1.0, -0.5, math.nan], "draws")
        given["draws"] = m.give(uniforms, [torch.float64])
    options: dict[str, Any] = {"config": config, "generator": m.integer(0, 2**62)}
    options |= {"num_classes": None if soft else K, "size": None if images else (H, W)}
    again = m.chance(0.1)
    if images and again and m.spoiling and not m.call.wrong:
        m.call.wrong = "out"

    def run(x: dict[str, Any], backend: str) -> sk.MaskedForward:
        result = sk.masked_forward(**x, **options, backend=backend)
        if again:  # into tensors that hold something else
            with torch.no_grad():
                into = sk.masked_forward(**x, **options | {"generator": 1}, backend=backend)
                if m.call.wrong == "out":  # it is written to while it is read
                    x = x | {"images": into.images_masked[: len(x["images"])]}
                sk.masked_forward(**x, **options, out=into, backend=backend)
            for a, b in zip(result.buffers, into.buffers, strict=True):
                assert identical(a, b), "out= gives other results"
        return result

    m.call.inputs, m.call.run, m.call.exact = given, run, exact
    m.call.narrow = one_pass and given["features"].dtype != torch.float64
    m.call.same = (
        "stats.peak",
        "stats.trough",
        "stats.max",
        "stats.min",
        "ratio",
        "box",
        "targets",
    )
    if not (images and config.fill == "mean" and given["images"].dtype == torch.float64):
        m.call.same += ("images",)
    m.call.roundings = 32.0


def masked_loss(m: Maker) -> None:
    n, K = m.size(150, 12), m.size(150, 40) + 1
    if m.chance(0.05):
        n = 0
    if m.rare(0.02):
        n, K = m.integer(1, 3), m.integer(20_000, 200_000)
    integers = INDICES if K < 2**15 else INDICES[:2]
    mix, soft, labeled = m.chance(0.5), m.chance(0.6), m.integer(0, n)
    M = n + (m.integer(0, 5) if mix else 0)
    if soft:
        targets = m.rows(M, K)
        if n and M % 2 == 0 and m.chance(0.4):  # expanded, as the targets of several views are
            half = m.give(targets[: M // 2])
            targets = half[None].expand(2, M // 2, K)
        else:
            targets = m.give(targets)
    else:
        targets = m.indices(K, M).where(m.uniform(M) < 0.8, -100)
        if m.spoiling and n and m.chance(0.3):  # one-hot rows of integers
            m.call.wrong, targets = "targets", (targets[:, None] == torch.arange(K)).long()
        targets = m.give(m.spoil(targets, [-1, K], "targets"), integers)
    given: dict[str, Any] = {"logits": m.give(m.logits(n, K), grad=True), "targets": targets}
    if m.chance(0.6):
        given["ratio"] = m.give(m.spoil(m.uniform(M), [1.5, -0.1, math.nan], "ratio"))
    if m.chance(0.3):
        pi = torch.softmax(m.normal(K), 0)
        given["prior"] = m.give(m.spoil(pi, [1.5, -0.1, math.nan], "prior"))
    if mix:
        partner = m.spoil(m.permutation(M)[:n], [-1, M], "mix permutation")
        given["permutation"] = m.give(partner, INDICES)
    reduction = m.choice(["mean", "mean", "sum", "none"])
    lam = m.choice([0.0, 1.0, m.real(0, 1)])
    options: dict[str, Any] = {"num_labeled": labeled, "reduction": reduction}
    options |= {"unlabeled_weight": m.choice([0.0, 25.0]), "drop": m.choice(DROPS)}
    if reduction != "none":
        options |= {"prior_weight": m.choice([0.0, 1.0]), "confidence_weight": m.real(-1, 1)}

    def run(x: dict[str, Any], backend: str) -> sk.MaskedLoss:
        x = dict(x)
        permutation = x.pop("permutation", None)
        pair = None if permutation is None else (lam, permutation)
        return sk.masked_loss(**x, mix=pair, **options, backend=backend)

    m.call.inputs, m.call.run = given, run
    m.call.roundings = 32.0 if given["logits"].dtype == torch.float64 else 16.0
    m.call.roundings *= yardstick(given["logits"])


def reconstruction_loss(m: Maker) -> None:
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


def mixup_views(m: Maker) -> None:
    sizes = [m.integer(0, 4) for _ in range(m.integer(1, 5))]
    shape = m.choice([(), (m.size(50, 30),), (m.size(50, 30), m.size(50, 30)), None, None, None])
    if shape is None:
        shape = m.choice([1, 3, 5]), m.size(40, 15), m.size(40, 15)
    if not m.small and m.chance(0.02):
        shape = (3, m.integer(170, 200), m.integer(170, 200))
    dtype, layout = [m.choice(DTYPES)], [m.choice(LAYOUTS)]
    views = [m.give(m.normal(b, *shape), dtype, grad=True, layouts=layout) for b in sizes]
    if m.chance(0.1):  # the same memory
        views, sizes = views[:1] * len(views), sizes[:1] * len(sizes)
    total, lam = sum(sizes), m.choice([0.0, 1.0, m.real(0, 1)])
    rows = m.integer(0, total)
    partner = m.permutation(total)
    if rows and m.spoiling:
        m.call.wrong, i = "permutation", m.integer(0, rows - 1)
        partner[i] = m.choice([-1, total] + [int(partner[:rows][i - 1])] * (rows > 1))
    m.call.inputs = {"views": views, "permutation": m.give(partner, INDICES)}
    m.call.run = lambda x, backend: sk.mixup_views(
        x["views"], lam, x["permutation"], rows=rows, backend=backend
    )
    m.call.same = ("result", "d ")


def refine_targets(m: Maker) -> None:
    B, K, V = m.size(100, 10), m.classes(150, 40), m.integer(1, 5)
    B, integers = (B, INDICES) if K < 1000 else (2, INDICES[:2])
    dtype = [m.choice(DTYPES)]
    given: dict[str, Any] = {"logits": [m.give(m.logits(B, K), dtype) for _ in range(V)]}
    if m.chance(0.7):
        soft = m.chance(0.5)
        labels = m.rows(B, K) if soft else m.spoil(m.indices(K, B), [-1, K], "labels")
        given["labels"] = m.give(labels, DTYPES if soft else integers)
        given["clean_prob"] = m.give(m.spoil(m.uniform(B), [1.5, -0.1, math.nan], "clean_prob"))
    temperature = m.choice([0.5, 0.5, 1.0, m.real(0.1, 2)])
    if m.chance(0.1) and not m.call.wrong:  # where p's order alone counts, or nothing of it
        z = m.give((3 * m.normal(B, K)).round(), dtype)
        given, temperature = {"logits": [z]}, 10.0 ** m.choice([-300, -20, -12, -8, 8, 300])
    m.call.inputs, m.call.roundings = given, 16.0 * yardstick(given["logits"][0])
    m.call.run = lambda x, backend: sk.refine_targets(**x, temperature=temperature, backend=backend)


def sample_loss(m: Maker) -> None:
    B, K = m.size(200, 20), m.classes(1000, 100)
    B, integers = (B, INDICES) if K < 2000 else (2, INDICES[:2])
    labels = m.spoil(m.indices(K, B), [-1, K], "labels")
    m.call.inputs = {
        "logits": m.give(m.logits(B, K), grad=True),
        "labels": m.give(labels, integers),
    }
    m.call.roundings *= yardstick(m.call.inputs["logits"])
    m.call.run = lambda x, backend: sk.sample_loss(**x, backend=backend)


def fit_label_quality(m: Maker) -> None:
    n = m.integer(0, 3) if m.chance(0.1) else m.size(3000, 300)
    if not m.small and m.chance(0.05):
        n = m.integer(8192, 12000)  # where the CPU kernel fits a histogram
    wrong, epochs = m.uniform(n) < m.real(0.2, 0.8), m.integer(0, 6)
    low = 0.3 * m.normal(n).exp()
    x = torch.where(wrong, 3 + m.real(0.1, 1) * m.normal(n), low).abs()
    if m.chance(0.2):
        x = (x * 4).round() / 4
    if m.chance(0.05):
        x = torch.full_like(x, 0.75)
    past = torch.stack([x * (e + 1) + 0.1 * m.normal(n) for e in range(epochs)]) if epochs else None
    dtype = [m.choice(DTYPES)]
    given = {"losses": m.give(m.spoil(x, [math.nan, math.inf, -math.inf], "losses"), dtype)}
    if past is not None:
        given["history"] = m.give(past, dtype)
    options = {"seed": m.integer(0, 2**32 - 1), "max_iter": m.choice([1, 10, 10, 30])}
    options |= {"tol": m.choice([0.0, 1e-3, 1e-2]), "normalize": m.chance(0.7)}
    options |= {"reg_covar": m.choice([5e-4, 5e-4, 0.05, 1e-6])}
    m.call.inputs, m.call.same = given, ("n_iter", "converged", "degenerate")
    m.call.run = lambda x, backend: sk.fit_label_quality(**x, **options, backend=backend)


#: How often each function is called.
SHARES = {
    masked_forward: 38,
    activation_stats: 10,
    masked_loss: 18,
    reconstruction_loss: 8,
    mixup_views: 8,
    refine_targets: 6,
    sample_loss: 6,
    fit_label_quality: 6,
}
FUNCTIONS = [make.__name__ for make in SHARES]


def random_call(number: int) -> Call:
    """The call of this number."""
    m = Maker(number)
    make = m.choice([make for make, share in SHARES.items() for _ in range(share)])
    m.call.function = make.__name__
    make(m)
    if not m.call.wrong and m.chance(0.1):
        m.call.run = repeated(m.call.run, m.choice([torch.float64, torch.bfloat16, torch.float16]))
    return m.call


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether floating point differs by rounding at most, and integers not at all."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    return torch.allclose(a, b, rtol=16 * torch.finfo(a.dtype).eps, atol=1e-5, equal_nan=True)


def repeated(
    run: Callable[[dict[str, Any], str], Any], default: torch.dtype
) -> Callable[[dict[str, Any], str], Any]:
    """The call with another default dtype, then in two threads at once: all give the same."""

    def thrice(inputs: dict[str, Any], backend: str) -> Any:
        usual = torch.get_default_dtype()
        results = [run(inputs, backend)]
        try:
            torch.set_default_dtype(default)
            results.append(run(inputs, backend))
        finally:
            torch.set_default_dtype(usual)
        # Triton's interpreter changes its language, for all threads, while a kernel runs
        with ThreadPoolExecutor(1 if (backend, TRITON_DEVICE) == ("triton", "cpu") else 2) as pool:
            results += pool.map(lambda _: run(inputs, backend), range(2))
        # of a classifier the products are torch's, and as deterministic as those
        same = identical if inputs.get("classifier") is None else alike
        for other in results[1:]:
            for a, b in zip(tree_leaves(results[0]), tree_leaves(other), strict=True):
                assert a is b is None or (a.dtype == b.dtype and same(a, b)), "not the same"
        return results[0]

    return thrice
