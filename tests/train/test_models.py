"""Networks and decoder."""

from __future__ import annotations

import pytest
import torch

from sanm_train.decoders import Decoder, LinearDecoder
from sanm_train.models import PreActResNet18, ResNet18, ResNet20, SmallCNN, classifier
from sanm_train.sanm import SANM

SIZES = [
    ((8, 4, 4), (3, 32, 32)),
    ((8, 4, 4), (1, 8, 8)),
    ((5, 7, 7), (3, 50, 61)),
    ((8, 3, 5), (4, 29, 17)),
    ((3, 1, 1), (2, 9, 6)),
    ((4, 6, 2), (1, 6, 2)),
    ((4, 8, 8), (1, 5, 7)),
]


@pytest.mark.parametrize(
    ("make", "map_shape", "image_shape"),
    [
        *((Decoder, *sizes) for sizes in SIZES),
        (LinearDecoder, (8, 4, 4), (3, 32, 32)),
        (LinearDecoder, (3, 7, 4), (2, 56, 32)),
        (LinearDecoder, (1, 1, 1), (1, 2, 2)),
    ],
)
def test_every_decoder_output_depends_on_the_map(make, map_shape, image_shape):
    """A directional derivative along a random direction is nonzero at every single output."""
    torch.manual_seed(0)
    decoder = make(map_shape, image_shape).double()
    features, direction = torch.randn(2, 2, *map_shape, dtype=torch.double)
    decoder(features)  # gives the batch norms statistics
    output, slope = torch.func.jvp(decoder.eval(), (features,), (direction,))
    assert output.shape == (2, *image_shape)
    assert slope.abs().min() > 1e-9


def test_decoder_names_the_shape_it_was_built_for():
    with pytest.raises(ValueError, match=r"features must be \(B, 8, 4, 4\).*got \(2, 8, 5, 4\)"):
        Decoder((8, 4, 4), (1, 8, 8))(torch.zeros(2, 8, 5, 4))
    with pytest.raises(ValueError, match="must be positive"):
        Decoder((8, 0, 4), (1, 8, 8))
    with pytest.raises(ValueError, match=r"features must be \(B, 8, 4, 4\).*got \(2, 8, 5, 4\)"):
        LinearDecoder((8, 4, 4), (1, 8, 8))(torch.zeros(2, 8, 5, 4))
    for image in ((1, 12, 12), (1, 8, 16), (1, 4, 4), (1, 2, 2)):
        with pytest.raises(ValueError, match="image_shape must be map_shape's sides times 2, 4, 8"):
            LinearDecoder((8, 4, 4), image)


def test_linear_decoder_is_the_released_one():
    """Three transposed convolutions and no more: affine in the map, four times the cells each."""
    torch.manual_seed(0)
    sanm = SANM(PreActResNet18(width=4), decoder=LinearDecoder, image_shape=(3, 32, 32))
    decoder = sanm.decoder
    assert isinstance(decoder, LinearDecoder)
    assert [type(m) for m in decoder.stages] == [torch.nn.ConvTranspose2d] * 3
    a, b = torch.randn(2, 5, 32, 4, 4)
    torch.testing.assert_close(decoder(a + b), decoder(a) + decoder(b) - decoder(a - a))
    own = Decoder((32, 4, 4), (3, 32, 32))
    assert SANM(PreActResNet18(width=4), decoder=own).decoder is own


@pytest.mark.parametrize(
    ("model", "image", "features"),
    [
        (SmallCNN(), (1, 8, 8), (64, 4, 4)),
        (PreActResNet18(num_classes=7), (3, 32, 32), (512, 4, 4)),
        (ResNet18(num_classes=7), (3, 32, 32), (512, 4, 4)),
        (ResNet20(1), (1, 28, 28), (64, 7, 7)),
    ],
)
def test_feature_maps(model, image, features):
    sanm = SANM(model, image_shape=image)
    logits, found = sanm.forward_features(torch.randn(2, *image))
    assert found.shape == (2, *features)
    assert logits.shape == (2, classifier(model).out_features)
    assert sanm.decoder(found).shape == (2, *image)


def test_resnets_are_the_published_ones():
    """Parameters of ResNet-20 without those of its projections (He et al., 2016: 0.27 million)."""
    projections = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    assert sum(p.numel() for p in ResNet20().parameters()) - projections == 269_722
    keys = ResNet18().state_dict()
    assert sum(p.numel() for p in ResNet18().parameters()) == 11_173_962
    assert {key.partition(".")[0] for key in keys} == {"encoder", "linear"}
    for key in (
        "conv1.weight",
        "bn1.running_mean",
        "layer4.1.bn2.bias",
        "layer2.0.shortcut.1.weight",
    ):
        assert f"encoder.{key}" in keys
