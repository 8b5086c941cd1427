"""Exported programs and compiled graphs: sizes that a trace does not know, and wrong values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inputs import BACKENDS, each
from torch import Tensor
from torch.utils._pytree import tree_leaves

import sanm_kernels as sk


def masked_loss(z: Tensor, t: Tensor, other: Tensor, permutation: Tensor, backend: str) -> Any:
    n = z.shape[0]
    options = {"unlabeled_weight": 2.0, "prior_weight": 0.5, "backend": backend}
    return (
        sk.masked_loss(z, t, num_labeled=n // 2, mix=(0.3, permutation), **options),
        sk.masked_loss(z, t.argmax(1), num_labeled=other.shape[0], **options),
        sk.masked_loss(z, t, num_labeled=n // 3, reduction="none", backend=backend).total,
    )


def mixup_views(a: Tensor, b: Tensor, other: Tensor, permutation: Tensor, backend: str) -> Any:
    return (
        sk.mixup_views([a, b], 0.3, permutation, rows=a.shape[0] // 2, backend=backend),
        sk.mixup_views([a, b], 0.3, permutation, rows=other.shape[0], backend=backend),
    )


def arguments(function: Any, n: int, other: int) -> tuple[Tensor, ...]:
    if function is masked_loss:
        rows = torch.randn(n, 5), torch.softmax(torch.randn(n, 5), 1)
    else:
        rows = torch.randn(n, 3, 4, 4), torch.randn(n, 3, 4, 4)
    return *rows, torch.randn(other, 1), torch.randperm(2 * n if function is mixup_views else n)


class Program(torch.nn.Module):
    def __init__(self, function: Any, backend: str) -> None:
        super().__init__()
        self.function, self.backend = function, backend

    def forward(self, *x: Tensor) -> Any:
        return self.function(*x, self.backend)


def exported(function: Any, backend: str, strict: bool) -> torch.nn.Module:
    batch, other = torch.export.Dim("batch", min=4, max=512), torch.export.Dim("other", max=512)
    mixed = 2 * batch if function is mixup_views else batch
    shapes = ({0: batch}, {0: batch}, {0: other}, {0: mixed})
    program = torch.export.export(
        Program(function, backend), arguments(function, 8, 3), dynamic_shapes=(shapes,),
        strict=strict,
    )  # fmt: skip
    return program.module()


@each(function=[masked_loss, mixup_views], backend=BACKENDS, strict=[False, True])
def test_a_part_of_a_batch_of_any_size_is_exported(function, backend, strict):
    program = exported(function, backend, strict)
    for n, other in ((8, 3), (13, 9), (5, 2)):
        x = arguments(function, n, other)
        expected = tree_leaves(function(*x, backend))
        assert all(map(torch.equal, tree_leaves(program(*x)), expected))


def message(run: Any, *x: Any) -> str:
    with pytest.raises(ValueError) as error:
        run(*x)
    return str(error.value)


@each(function=[masked_loss, mixup_views], backend=BACKENDS, strict=[False, True])
def test_a_wrong_number_is_an_error_when_an_exported_program_runs(function, backend, strict):
    x = arguments(function, 5, 11)
    expected = message(function, *x, backend)
    assert "expected a number in [0, " in expected and "got 11" in expected
    assert message(exported(function, backend, strict), *x) == expected


@each(backend=BACKENDS, name=["labels", "ratio", "clean_prob", "permutation", "boxes", "losses"])
def test_a_wrong_value_in_a_compiled_graph_is_the_same_error(backend, name):
    z, soft = torch.randn(4, 3).requires_grad_(), torch.softmax(torch.randn(4, 3), 1)
    images = torch.rand(4, 3, 8, 8)
    wrong: dict[str, Any] = {
        "labels": lambda y: sk.sample_loss(z, y, backend=backend),
        "ratio": lambda r: sk.masked_loss(z, soft, ratio=r, backend=backend).total,
        "clean_prob": lambda q: (
            sk.masked_forward(
                images, soft, q, size=(8, 8), generator=0, backend=backend
            ).targets_max
        ),
        "permutation": lambda p: sk.mixup_views([images], 0.3, p, backend=backend),
        "boxes": lambda b: sk.reconstruction_loss(
            images, images, boxes=b, region="masked", backend=backend
        ),
        "losses": lambda x: sk.fit_label_quality(x, backend=backend).clean_prob,
    }
    values = {
        "labels": torch.tensor([0, 1, 3, 2]),
        "ratio": torch.tensor([0.1, 0.2, -0.5, 0.1]),
        "clean_prob": torch.tensor([0.1, 0.2, 1.5, 0.1]),
        "permutation": torch.tensor([0, 1, 4, 2]),
        "boxes": torch.tensor([0, 0, 9, 4]).expand(1, 4, 4),
        "losses": torch.tensor([0.1, 0.2, torch.nan, 0.1]),
    }
    expected = message(wrong[name], values[name])
    assert name in expected
    compiled = torch.compile(wrong[name], fullgraph=True, backend="aot_eager")
    assert message(compiled, values[name]) == expected
