"""The SANM wrapper: hooks, masked views, losses."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sanm_kernels as sk
from sanm_train.models import SmallCNN
from sanm_train.sanm import SANM, Batch


def batch(size: int = 6, classes: int = 10) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(
        torch.randn(size, 1, 8, 8, generator=generator),
        torch.randint(classes, (size,), generator=generator),
        torch.rand(size, generator=generator),
        torch.arange(size),
    )


def hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) for m in module.modules())


def test_forward_is_the_plain_model():
    model = SmallCNN().eval()
    images = batch().images
    assert torch.equal(SANM(model)(images), model(images))


def test_hooks_do_not_outlive_the_call():
    sanm = SANM(SmallCNN(), image_shape=(1, 8, 8))
    sanm.losses(batch(), generator=0).total.backward()
    assert hooks(sanm) == 0
    with pytest.raises(RuntimeError):
        sanm.forward_features(torch.zeros(2, 3, 8, 8))  # wrong channels: the model itself fails
    assert hooks(sanm) == 0

    twin = copy.deepcopy(sanm).eval()
    pickled = pickle.loads(pickle.dumps(sanm)).eval()
    twin.load_state_dict(sanm.state_dict())
    sanm.eval()
    logits, features = sanm.forward_features(batch().images)
    for other in (twin, pickled):
        assert torch.equal(other.forward_features(batch().images)[1], features)
    with torch.no_grad():
        twin.model.linear.bias.add_(1)
    assert torch.equal(sanm(batch().images), logits)


def test_feature_layer_by_module_and_by_name():
    model = SmallCNN().eval()
    by_module = SANM(model, model.features[3]).forward_features(batch().images)[1]
    by_name = SANM(model, "features.3").forward_features(batch().images)[1]
    assert torch.equal(by_module, by_name)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(64, 3), nn.Linear(64, 3)

    def forward(self, x):
        return self.used(x.flatten(1))


def test_feature_layer_errors():
    with pytest.raises(ValueError, match="no module 'feature'; nearest: 'features'"):
        SANM(SmallCNN(), "feature")
    with pytest.raises(ValueError, match="name the module that gives the last feature map"):
        SANM(Unused())
    with pytest.raises(ValueError, match="this Linear is no part of the model"):
        SANM(Unused(), nn.Linear(1, 1))
    images = torch.zeros(2, 1, 8, 8)
    with pytest.raises(RuntimeError, match="'unused' was not run"):
        SANM(Unused(), "unused").forward_features(images)
    with pytest.raises(ValueError, match=r"'used' must give a feature map .* got \(2, 3\)"):
        SANM(Unused(), "used").forward_features(images)


def test_losses_equal_their_definition():
    torch.manual_seed(0)
    config = sk.MaskConfig.paper().replace(ratio_low=0.1, ratio_high=0.2)
    sanm = SANM(SmallCNN(), image_shape=(1, 8, 8), config=config).eval()
    images, labels, quality, index, _ = batch()
    losses = sanm.losses((images, labels, quality, index), generator=5)  # a plain tuple will do
    masked = losses.masked
    views = torch.cat([masked.images_max, masked.images_min])
    logits = sanm(torch.cat([images, views]))
    one_hot = F.one_hot(labels, 10).float()
    targets = torch.cat([one_hot, masked.targets_max, masked.targets_min])
    expected = -(targets * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(losses.classification, expected)
    rebuilt = sanm.decoder(sanm.forward_features(views)[1])
    expected = sum(F.mse_loss(part, images) for part in rebuilt.chunk(2))
    torch.testing.assert_close(losses.reconstruction, expected)
    torch.testing.assert_close(losses.total, losses.classification + 0.02 * losses.reconstruction)
    assert not torch.equal(masked.images_max, images)
    again = sanm.mask(
        images, labels, quality, num_classes=10, generator=5, sample_index=index
    )  # fmt: skip
    assert torch.equal(masked.box_max, again.box_max)


@pytest.mark.parametrize("views", [("max",), ("min",), ("max", "min")])
def test_losses_reach_every_parameter(views):
    sanm = SANM(
        SmallCNN(), image_shape=(1, 8, 8), config=sk.MaskConfig.paper().replace(views=views)
    )
    sanm.losses(batch(), generator=0).total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in sanm.parameters())


def test_no_modulation_leaves_targets_alone():
    sanm = SANM(SmallCNN(), image_shape=(1, 8, 8), modulate=False).eval()
    losses = sanm.losses(batch(), generator=0)
    masked, labels = losses.masked, batch().targets
    views = torch.cat([batch().images, masked.images_max, masked.images_min])
    expected = F.cross_entropy(sanm(views), labels.repeat(3))
    torch.testing.assert_close(losses.classification, expected)


def test_random_box_ignores_the_network():
    torch.manual_seed(0)
    sanm = SANM(SmallCNN(), random_box=True)
    features = torch.zeros(400, 64, 4, 4)
    masked = sanm.mask(
        torch.zeros(400, 1, 8, 8), torch.zeros(400, dtype=torch.long), features=features,
        num_classes=10, generator=0,
    )  # fmt: skip
    peaks = masked.stats.peak[:, 0] * 8 + masked.stats.peak[:, 1]
    assert len(peaks.unique()) > 55  # of 64 pixels


def test_random_boxes_come_from_the_generator():
    sanm, images = SANM(SmallCNN(), random_box=True), torch.rand(50, 1, 8, 8)
    targets = torch.zeros(50, dtype=torch.int32)
    batch = Batch(images, targets, torch.rand(50))
    boxes = [
        sanm.losses(batch, generator=g).masked.box_max
        for g in (5, torch.tensor(5), 6, torch.Generator().manual_seed(1))
    ]
    again = sanm.losses(batch, generator=torch.Generator().manual_seed(1)).masked.box_max
    assert torch.equal(boxes[0], boxes[1]) and torch.equal(boxes[3], again)
    assert not torch.equal(boxes[0], boxes[2])


def test_lazy_decoder_and_a_user_s_own():
    sanm = SANM(SmallCNN())
    assert sanm.decoder is None
    sanm.losses(batch(), generator=0)
    assert sanm.decoder.image_shape == (1, 8, 8)
    own = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(64, 1, 1))
    sanm = SANM(SmallCNN(), decoder=own, image_shape=(1, 8, 8))
    sanm.losses(batch(), generator=0)
    assert sanm.decoder is own
