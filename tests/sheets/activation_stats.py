"""activation_stats."""

from __future__ import annotations

from typing import Any

from maker import DTYPES, LAYOUTS, Maker

import sanm_kernels as sk
from sheets import Inputs, Operation, Sheet
from sheets.masked_forward import features_of, inputs, map_shape, random_config


def _run(x: Inputs, **options: Any) -> Inputs:
    stats = sk.activation_stats(x["features"], (20, 21), **options)
    return {name: getattr(stats, name) for name in ("max", "min", "mean", "std", "entropy")}


def _random(m: Maker) -> None:
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


SHEET = Sheet(
    {
        "activation_stats": Operation(
            "activation_stats",
            inputs,
            _run,
            (),
            ("features",),
            {"B": 128, "C": 512, "h": 4, "H": 32, "K": 10},
        )
    },
    random=_random,
    share=10,
    compiled=[{"B": 64, "C": 512, "h": 7, "H": 8, "K": 10}],
)
