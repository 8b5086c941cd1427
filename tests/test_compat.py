"""The drop-in functions: recorded results from `random.seed`, side effects, kinds of arguments."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_accurate

import sanm_kernels as sk
from sanm_kernels import compat, dropin

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.npz"))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_recorded_results_from_the_random_seed(backend, path):
    case = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(path).items()}
    images, target_mask = case["images"].clone(), case["targets"].clone()
    random.seed(int(case["seed"]))
    with sk.use_backend(backend):
        img, img_min, returned = compat.attention_erase_map(
            images, case["features"], case["clean_prob"], target_mask
        )
    assert returned is target_mask and torch.equal(target_mask, case["targets_out"])
    assert torch.equal(img, case["images_max"]) and torch.equal(img_min, case["images_min"])
    assert torch.equal(images, case["images"])
    state = random.getstate()
    random.seed(int(case["seed"]))
    drawn = [[random.random() for _ in range(8)] for _ in range(len(images))]
    assert random.getstate() == state
    assert torch.equal(torch.tensor(drawn, dtype=torch.float64), case["draws"])


def test_a_refused_call_changes_nothing():
    images, target_mask = torch.rand(2, 3, 8, 8), torch.rand(2, 4)
    before = target_mask.clone()
    with pytest.raises(ValueError, match="clean_prob"):
        compat.attention_erase_map(
            images, torch.rand(2, 5, 2, 2), torch.tensor([0.5, 1.5]), target_mask
        )
    assert torch.equal(target_mask, before)


def test_column_of_qualities_and_any_channel_count():
    images, features = torch.rand(3, 1, 10, 14), torch.rand(3, 6, 2, 3)
    random.seed(1)
    a = compat.attention_erase_map(images, features, torch.rand(3, 1), torch.rand(3, 4))
    assert a[0].shape == images.shape


def test_clothing1m_is_what_was_meant():
    images, features, q = torch.rand(4, 3, 32, 32), torch.randn(4, 16, 7, 7), torch.rand(4)
    random.seed(3)
    ratio_max, ratio_min, img, img_min = compat.attention_erase_map_clothing1m(images, features, q)
    config = sk.MaskConfig.official_clothing1m()
    random.seed(3)
    draws = torch.tensor(
        [[random.random() for _ in range(config.num_draws(3))] for _ in q], dtype=torch.float64
    )
    expected = sk.masked_forward(
        features,
        torch.zeros(4, dtype=torch.long),
        q,
        images=images,
        config=config,
        num_classes=2,
        draws=draws,
    )
    for a, b in (
        (ratio_max, expected.ratio_max),
        (ratio_min, expected.ratio_min),
        (img, expected.images_max),
        (img_min, expected.images_min),
    ):
        assert torch.equal(a, b)
    assert not torch.equal(ratio_max, ratio_min)
    assert ((ratio_max >= 0.06) & (ratio_max <= 0.23)).all()
    hidden = (img != images).any(1).double().mean((1, 2))
    torch.testing.assert_close(hidden, ratio_max.double(), atol=0.03, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_semi_loss(dtype):
    x, u = (torch.randn(n, 7).to(dtype).requires_grad_() for n in (5, 6))
    tx, tu = (torch.softmax(torch.randn(n, 7), 1) for n in (5, 6))
    lx, lu, weight = compat.SemiLoss()(x, tx, u, tu, 14.0, 10)
    assert weight == pytest.approx(25 * 4 / 16)
    (lx + weight * lu).backward()

    def plain(kind):
        a, b = (v.detach().to(kind).requires_grad_() for v in (x, u))
        one = -(F.log_softmax(a, 1) * tx.to(kind)).sum(1).mean()
        two = ((torch.softmax(b, 1) - tu.to(kind)) ** 2).mean()
        (one + weight * two).backward()
        return one.detach(), two.detach(), a.grad, b.grad

    eager_dtype = torch.promote_types(dtype, torch.float32)
    for got, exact, eager in zip(
        (lx.detach(), lu.detach(), x.grad, u.grad),
        plain(torch.float64),
        plain(eager_dtype),
        strict=True,
    ):
        assert_accurate(got, exact, eager.to(got.dtype))


@pytest.mark.parametrize("targets", ["cut", "apart"])
@pytest.mark.parametrize("cut", ["rows", "swapped", "gap", "columns", "detached", "copied"])
def test_semi_loss_of_slices(cut, targets, monkeypatch):
    """Read where they are if the two are what one tensor was cut into; the same results anyhow."""
    logits = torch.randn(11, 6, requires_grad=True)
    t = torch.softmax(torch.randn(11, 6), 1)
    whole = []
    call = dropin.call
    monkeypatch.setattr(dropin, "call", lambda *a: whole.append(a[3] is x._base) or call(*a))

    def split(z, t):
        if cut == "swapped":
            return z[4:], t[4:], z[:4], t[:4]
        if cut == "columns":
            return z[:, :3], t[:, :3], z[:, 3:], t[:, 3:]
        end = 10 if cut == "gap" else 11
        return z[:4], t[:4], z[4:end], t[4:end]

    x, tx, u, tu = split(logits * 1.0, t)
    if targets == "apart":
        tx, tu = tx.clone(), tu.clone()
    if cut == "detached":
        u = u.detach()
    if cut == "copied":
        x, u = x * 1.0, u * 1.0
    lx, lu, _ = compat.SemiLoss()(x, tx, u, tu, 14.0, 10)
    assert whole == [cut == "rows"]
    a, ta, b, tb = split(logits, t)
    one = -(F.log_softmax(a, 1) * ta).sum(1).mean()
    two = ((torch.softmax(b.detach() if cut == "detached" else b, 1) - tb) ** 2).mean()
    torch.testing.assert_close((lx, lu), (one, two))
    got, expected = (torch.autograd.grad(p + 3 * q, logits)[0] for p, q in ((lx, lu), (one, two)))
    torch.testing.assert_close(got, expected)


def test_criteria_are_differentiated_once_and_transformed():
    z, t = torch.randn(9, 3, requires_grad=True), torch.softmax(torch.randn(9, 3), 1)

    def loss(z):
        lx, lu, weight = compat.SemiLoss()(z[:4], t[:4], z[4:], t[4:], 14.0, 10)
        return lx + weight * lu + compat.NegEntropy()(z)

    gradient = torch.autograd.grad(loss(z), z, create_graph=True)[0]
    torch.testing.assert_close(torch.func.grad(loss)(z.detach()), gradient.detach())
    with pytest.raises(RuntimeError, match="masked_loss can be differentiated once, not twice"):
        gradient.sum().backward()
    with pytest.raises(NotImplementedError, match="masked_loss has no forward-mode derivative"):
        torch.func.jvp(loss, (z.detach(),), (t,))


def test_semi_loss_of_slices_names_wrong_rows():
    z, t = torch.randn(9, 3), torch.softmax(torch.randn(9, 3), 1)
    with pytest.raises(ValueError, match="targets"):
        compat.SemiLoss()(z[:4], t[:5], z[4:], t[5:], 14.0, 10)


@pytest.mark.parametrize(("epoch", "expected"), [(0, 0), (10, 0), (18, 12.5), (26, 25), (300, 25)])
def test_ramp(epoch, expected):
    z, t = torch.zeros(1, 2), torch.tensor([[0.5, 0.5]])
    assert compat.SemiLoss()(z, t, z, t, epoch, 10)[2] == expected
    assert compat.SemiLoss(lambda_u=2, rampup_length=0)(z, t, z, t, epoch, 10)[2] == 2


def test_neg_entropy():
    z = torch.randn(6, 5, requires_grad=True)
    got = compat.NegEntropy()(z)
    p = torch.softmax(z, 1)
    torch.testing.assert_close(got, (p * p.log()).sum(1).mean())
    got.backward()
    assert z.grad.abs().sum() > 0


def same(a, b):
    """All tensors of two results are equal."""
    a, b = ([x for x in r if isinstance(x, torch.Tensor)] for r in (a, b))
    return len(a) == len(b) > 0 and all(map(torch.equal, a, b))


def test_qualities_may_be_a_column_everywhere():
    q, logits = torch.rand(4), torch.randn(4, 5)
    features, targets, images = (
        torch.randn(4, 6, 3, 3),
        torch.softmax(logits, 1),
        torch.rand(4, 3, 9, 9),
    )
    results = [
        (
            *sk.masked_forward(features, targets, w, images=images, generator=0).buffers,
            sk.refine_targets([logits], labels=torch.arange(4), clean_prob=w),
        )
        for w in (q, q[:, None])
    ]
    assert same(*results)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_numpy_scalars_are_numbers(kind):
    z, q = torch.randn(6, 5), torch.rand(6)
    t, order = torch.softmax(torch.randn(6, 5), 1), torch.randperm(6)
    maps, labels = torch.randn(6, 4, 2, 2), torch.arange(6) % 5

    def calls(real, whole):
        config = sk.MaskConfig(
            ratio_low=real(0.25), ratio_high=real(0.5), ratio_gamma=real(0.125),
            area_scale=whole(1), fill_value=real(0.5),
        )  # fmt: skip
        options = {"config": config, "size": (whole(8), whole(9)), "generator": whole(3)}
        weights = {"unlabeled_weight": real(25), "prior_weight": real(1)}
        fit = {"seed": whole(3), "max_iter": whole(5), "tol": real(0.25), "reg_covar": real(0.5)}
        sk.set_cpu_cache_limit(whole(sk.set_cpu_cache_limit(whole(64))))
        return (
            *sk.masked_forward(maps, labels, q, num_classes=whole(5), **options).buffers,
            *sk.masked_loss(z, t, mix=(real(0.25), order), num_labeled=whole(3), **weights),
            sk.mixup_views([z], real(0.25), order, rows=whole(4)),
            sk.refine_targets([z], temperature=real(0.5)),
            *sk.fit_label_quality(z[:, 0], **fit),
        )

    assert same(calls(float, int), calls(kind, np.int64))
