"""The modules call the functions with what they hold."""

from __future__ import annotations

import torch
from inputs import example

import sanm_kernels as sk
from sanm_kernels import modules


def test_masking_module_is_the_function():
    f, t, q, x = example()
    config = sk.MaskConfig.official_cifar()
    module = modules.AdversarialMasking(config)
    a = module(f, t, q, images=x, generator=3)
    b = sk.masked_forward(f, t, q, images=x, generator=3, config=config)
    assert torch.equal(a.images_masked, b.images_masked) and "corner" in repr(module)
    assert modules.AdversarialMasking().config == sk.MaskConfig.paper()


def test_criteria_are_the_functions():
    z, t = torch.randn(6, 4), torch.softmax(torch.randn(6, 4), 1)
    module = modules.MaskedCriterion(prior_weight=1.0, confidence_weight=0.5, reduction="sum")
    a = module(z, t, num_labeled=2, unlabeled_weight=3.0)
    b = sk.masked_loss(
        z,
        t,
        num_labeled=2,
        unlabeled_weight=3.0,
        prior_weight=1.0,
        confidence_weight=0.5,
        reduction="sum",
    )
    assert torch.equal(a.total, b.total) and "prior_weight=1.0" in repr(module)
    y, x = torch.rand(4, 3, 8, 8), torch.rand(2, 3, 8, 8)
    boxes = torch.tensor([[[0, 0, 3, 3]] * 2] * 2, dtype=torch.int32)
    masked = modules.ReconstructionCriterion("masked")
    expected = sk.reconstruction_loss(y, x, boxes=boxes, region="masked")
    assert torch.equal(masked(y, x, boxes=boxes), expected)
    assert not torch.equal(modules.ReconstructionCriterion()(y, x), expected)
