"""The SANM wrapper: hooks, masked views, losses."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import sanm_kernels as sk
from sanm_train.models import SmallCNN
from sanm_train.sanm import SANM, Batch, SANMLosses


def batch(size: int = 6, classes: int = 10) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(
        torch.randn(size, 1, 8, 8, generator=generator),
        torch.randint(classes, (size,), generator=generator),
        torch.rand(size, generator=generator),
        torch.arange(size),
    )


def test_forward_is_the_plain_model():
    model = SmallCNN().eval()
    images = batch().images
    assert torch.equal(SANM(model)(images), model(images))


def test_nothing_is_kept_after_a_call_and_copies_share_nothing():
    sanm = SANM(SmallCNN(), image_shape=(1, 8, 8))
    sanm.losses(batch(), generator=0).total.backward()
    assert sanm.reader.tap.found is None
    with pytest.raises(RuntimeError):
        sanm.forward_features(torch.zeros(2, 3, 8, 8))  # wrong channels: the model itself fails
    assert sanm.reader.tap.found is None and not sanm.reader.tap.on

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


def test_losses_equal_their_definition():
    torch.manual_seed(0)
    config = sk.MaskConfig.paper().replace(ratio_low=0.1, ratio_high=0.2)
    sanm = SANM(SmallCNN(), image_shape=(1, 8, 8), config=config).eval()
    images, labels, quality, index = batch()[:4]
    losses = sanm.losses((images, labels, quality, index), generator=5)  # a plain tuple will do
    masked = losses.masked
    views = torch.cat([masked.images_max, masked.images_min])
    logits = sanm(torch.cat([images, views]))
    one_hot = F.one_hot(labels, 10).float()
    targets = torch.cat([one_hot, masked.targets_max, masked.targets_min])
    expected = -(targets * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(losses.classification, expected)
    torch.testing.assert_close(losses.sample_loss, sk.sample_loss(sanm(images), labels).detach())
    assert not losses.sample_loss.requires_grad
    rebuilt = sanm.decoder(sanm.forward_features(views)[1])
    expected = sum(F.mse_loss(part, images) for part in rebuilt.chunk(2))
    torch.testing.assert_close(losses.reconstruction, expected)
    torch.testing.assert_close(losses.total, losses.classification + 0.02 * losses.reconstruction)
    assert not torch.equal(masked.images_max, images)
    again = sanm.mask(
        images, labels, quality, num_classes=10, generator=5, sample_index=index
    )  # fmt: skip
    assert torch.equal(masked.box_max, again.box_max)


def test_losses_where_nothing_is_hidden():
    """Of the images alone; and every parameter has a gradient, also the decoder's."""
    torch.manual_seed(0)
    sanm = SANM(SmallCNN(), image_shape=(1, 8, 8)).eval()
    data = batch()._replace(masked=False)
    losses = sanm(data)
    logits, features = sanm.forward_features(data.images)
    cross_entropy = F.cross_entropy(logits, data.targets)
    torch.testing.assert_close(losses.classification, cross_entropy)
    rebuilt = F.mse_loss(sanm.decoder(features), data.images)
    torch.testing.assert_close(losses.total, cross_entropy + 0.02 * rebuilt)
    torch.testing.assert_close(losses.sample_loss, sk.sample_loss(logits, data.targets).detach())
    assert losses.masked is None and torch.equal(losses.logits, logits)
    soft = sanm(data._replace(targets=F.one_hot(data.targets, 10).float()))
    torch.testing.assert_close(soft.total, losses.total)
    with pytest.raises(ValueError, match="look like multi-hot targets"):
        sanm(data._replace(targets=torch.ones(6, 10)))
    losses.total.backward()
    assert all(p.grad is not None for p in sanm.parameters())


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


def test_forward_of_a_batch_is_the_losses():
    sanm = SANM(SmallCNN(), image_shape=(1, 8, 8)).eval()
    called, asked = sanm(batch(), generator=3), sanm.losses(batch(), generator=3)
    assert isinstance(called, SANMLosses) and torch.equal(called.total, asked.total)
    assert torch.equal(sanm(batch().images), called.logits)


def test_lazy_decoder_and_a_user_s_own():
    sanm = SANM(SmallCNN())
    assert sanm.decoder is None
    with pytest.warns(UserWarning, match="an optimiser made before does not train it"):
        sanm.losses(batch(), generator=0)
    assert sanm.decoder.image_shape == (1, 8, 8)
    own = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(64, 1, 1))
    sanm = SANM(SmallCNN(), decoder=own, image_shape=(1, 8, 8))
    sanm.losses(batch(), generator=0)
    assert sanm.decoder is own


@pytest.mark.parametrize(
    "context", [torch.autocast("cpu", torch.bfloat16), torch.inference_mode()], ids=["amp", "inf"]
)
def test_a_decoder_built_by_a_batch_is_the_model_s_kind(context):
    sanm = SANM(SmallCNN().double())
    with context:
        sanm.losses(batch()._replace(images=batch().images.double()), generator=0)
    assert {p.dtype for p in sanm.decoder.parameters()} == {torch.float64}
    assert not any(p.is_inference() for p in sanm.decoder.parameters())


def test_half_a_model_gets_half_a_decoder():
    sanm = SANM(SmallCNN().bfloat16(), image_shape=(1, 8, 8))
    losses = sanm(batch()._replace(images=batch().images.bfloat16()), generator=0)
    losses.total.backward()
    assert {p.dtype for p in sanm.decoder.parameters()} == {torch.bfloat16}


ROWS = torch.eye(10)[:6]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (ROWS + ROWS.roll(1, 1), "sum of 2 in row 0: these look like multi-hot targets of a multi"),
        (torch.zeros(6, 10, dtype=torch.long), "look like multi-hot"),
        (ROWS * 0.7, "sum of 0.7 in row 0; divide each row by its sum"),
        (2 * ROWS - ROWS.roll(1, 1), "sum of 1 in row 0; divide"),
        (ROWS.long(), "targets: expected float"),
        (torch.full((6,), 10), r"targets: expected indices in \[0, 10\)"),
        (torch.rand(6), "targets: expected an integer dtype"),
    ],
)
def test_targets_are_checked(targets, message):
    sanm = SANM(SmallCNN(), image_shape=(1, 8, 8))
    with pytest.raises((ValueError, TypeError), match=message):
        sanm(batch()._replace(targets=targets))


def test_soft_targets_are_taken():
    sanm = SANM(SmallCNN(), image_shape=(1, 8, 8)).eval()
    hard = sanm(batch(), generator=0)
    soft = sanm(batch()._replace(targets=F.one_hot(batch().targets, 10).float()), generator=0)
    torch.testing.assert_close(soft.total, hard.total)
    sanm(batch()._replace(targets=torch.rand(6, 10).softmax(1).half().float()))  # rounding is fine


def test_wrapping_the_wrong_way_round_is_refused():
    with pytest.raises(
        ValueError, match=r"wrap the other way round, DistributedDataParallel\(SANM\(model"
    ):
        SANM(nn.DataParallel(SmallCNN()), "module.features")
    with pytest.raises(RuntimeError, match="a process for each device"):
        SANM(SmallCNN())._replicate_for_data_parallel()  # DataParallel does, on several devices


@pytest.mark.parametrize("to_map", [None, torch.exp], ids=["", "to_map"])  # exp saves its result
def test_losses_under_checkpointing(to_map):
    """Without reentry all is as without; with it the map has no gradient, which is said."""

    class Checkpointed(SmallCNN):
        reentrant = False

        def forward(self, x):
            features = checkpoint(self.features, x, use_reentrant=self.reentrant)
            return self.linear(features.mean((2, 3)))

    plain = SANM(SmallCNN(), image_shape=(1, 8, 8), to_map=to_map)
    sanm = SANM(Checkpointed(), image_shape=(1, 8, 8), to_map=to_map)
    sanm.load_state_dict(plain.state_dict())
    for one in (plain, sanm):
        one(batch(), generator=0).total.backward()
    for a, b in zip(plain.parameters(), sanm.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    Checkpointed.reentrant = True
    images = batch().images.requires_grad_()
    with pytest.raises(RuntimeError, match="gave a map without gradient"):
        sanm(batch()._replace(images=images))
    sanm.model.features.requires_grad_(False)
    sanm.model.reentrant = False
    sanm(batch(), generator=0).total.backward()  # a frozen backbone is nothing wrong
