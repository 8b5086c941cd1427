"""Models of torchvision, timm and transformers, with random weights: each map is the one that a
reader of the model's code would permute by hand, called plainly, compiled, and under DDP."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from inputs import extended
from torch import Tensor, nn

import sanm_kernels as sk
from sanm_train import SANM, Batch

SIDE, K = 64, 5


class Entry(NamedTuple):
    """`build` makes the model; `layer` is named by hand; `by_hand` makes (B, C, h, w) of its output
    (a tensor, or the first of a tuple); `default` is the layer that is proposed."""

    library: str
    build: Callable[[], nn.Module]
    layer: str
    by_hand: Callable[[Tensor], Tensor]
    default: str


def as_it_is(x: Tensor) -> Tensor:
    return x


def channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def tokens(side: int, extra: int) -> Callable[[Tensor], Tensor]:
    def by_hand(x: Tensor) -> Tensor:
        return x[:, extra:].transpose(1, 2).reshape(len(x), -1, side, side)

    return by_hand


def torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchvision

        return getattr(torchvision.models, name)(num_classes=K, **options)

    return build


def timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=K, **options)

    return build


def features_only() -> nn.Module:
    import timm

    return timm.create_model("resnet18", features_only=True)


def transformers(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{name}Config")(num_labels=K, **options)
        return getattr(transformers, f"{name}ForImageClassification")(config)

    return build


SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "image_size": SIDE,
}  # fmt: skip
ZOO = {
    "torchvision resnet18": Entry(
        "torchvision", torchvision("resnet18"), "layer4", as_it_is, "layer4"
    ),
    "torchvision resnet50": Entry(
        "torchvision", torchvision("resnet50"), "layer4", as_it_is, "layer4"
    ),
    "torchvision convnext_tiny": Entry(
        "torchvision", torchvision("convnext_tiny"), "features", as_it_is, "features"
    ),
    "torchvision swin_t": Entry(
        "torchvision", torchvision("swin_t"), "norm", channels_last, "permute"
    ),
    "torchvision efficientnet_b0": Entry(
        "torchvision", torchvision("efficientnet_b0"), "features", as_it_is, "features"
    ),
    "torchvision vgg11": Entry(
        "torchvision", torchvision("vgg11"), "avgpool", as_it_is, "avgpool"
    ),
    "torchvision vit": Entry(
        "torchvision",
        torchvision(
            "VisionTransformer", image_size=SIDE, patch_size=16, num_layers=2, num_heads=2,
            hidden_dim=32, mlp_dim=64,
        ),
        "encoder.ln", tokens(4, 1), "encoder",
    ),
    "timm resnet18": Entry("timm", timm("resnet18"), "layer4", as_it_is, "layer4"),
    "timm convnext_atto": Entry("timm", timm("convnext_atto"), "stages", as_it_is, "norm_pre"),
    "timm swin_tiny": Entry(
        "timm", timm("swin_tiny_patch4_window7_224", img_size=SIDE, window_size=2), "norm",
        channels_last, "norm",
    ),
    "timm efficientnet_b0": Entry(
        "timm", timm("efficientnet_b0"), "bn2", as_it_is, "bn2"
    ),
    "timm vit_tiny": Entry(
        "timm", timm("vit_tiny_patch16_224", img_size=SIDE), "norm", tokens(4, 1), "norm"
    ),
    "timm deit_tiny_distilled": Entry(
        "timm", timm("deit_tiny_distilled_patch16_224", img_size=SIDE), "norm", tokens(4, 2), "norm"
    ),
    "timm vit with registers": Entry(
        "timm", timm("vit_tiny_patch16_224", img_size=SIDE, reg_tokens=4), "norm", tokens(4, 5),
        "norm",
    ),
    "transformers ResNet": Entry(
        "transformers",
        transformers("ResNet", hidden_sizes=[32, 64], depths=[1, 1], embedding_size=16),
        "resnet.encoder.stages.1", as_it_is, "resnet.encoder.stages.1",
    ),
    "transformers ConvNext": Entry(
        "transformers", transformers("ConvNext", hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]),
        "convnext.encoder.stages.3", as_it_is, "convnext.encoder.stages.3",
    ),
    "transformers Swin": Entry(
        "transformers",
        transformers("Swin", image_size=SIDE, embed_dim=12, depths=[1, 1, 1], num_heads=[1, 2, 4],
                     window_size=2),
        "swin.layernorm", tokens(4, 0), "swin.layernorm",
    ),
    "transformers ViT": Entry(
        "transformers", transformers("ViT", **SMALL), "vit.layernorm", tokens(4, 1),
        "vit.layernorm",
    ),
    "transformers Dinov2 with registers": Entry(
        "transformers", transformers("Dinov2WithRegisters", patch_size=8, **SMALL),
        "dinov2_with_registers.layernorm", tokens(8, 5), "dinov2_with_registers.layernorm",
    ),
}  # fmt: skip


@pytest.fixture
def group(tmp_path) -> Iterator[None]:
    """A process group of one process, which is enough for DDP."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def output_of(model: nn.Module, layer: str, images: Tensor) -> Tensor:
    found: list[Any] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda m, i, o: found.append(o))
    model(images)  # with gradients: without, attention may take another path and round otherwise
    handle.remove()
    return (found[0][0] if isinstance(found[0], tuple) else found[0]).detach()


def varied(model: nn.Module) -> nn.Module:
    """With scales and offsets of its norms that are not all alike: else a map after a LayerNorm has
    mean 0 over the channels, and its peak is rounding."""
    for module in model.modules():
        if "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return model


@extended
@pytest.mark.parametrize("name", ZOO)
def test_the_map_is_the_one_permuted_by_hand(name, group):
    entry = ZOO[name]
    if importlib.util.find_spec(entry.library) is None:
        pytest.skip(f"{entry.library} is not installed")
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = varied(entry.build()).eval()
    images = torch.randn(2, 3, SIDE, SIDE)
    batch = Batch(images, torch.arange(2), torch.ones(2), torch.arange(2))
    features = entry.by_hand(output_of(model, entry.layer, images))
    wanted = sk.masked_forward(
        features, batch.targets, batch.clean_prob, images=images, num_classes=K, generator=0,
        sample_index=batch.sample_index,
    )  # fmt: skip

    def same(sanm: nn.Module) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            losses = sanm(batch, generator=0)
        assert torch.equal(losses.masked.box_max, wanted.box_max)
        assert torch.equal(losses.masked.box_min, wanted.box_min)
        losses.total.backward()

    with pytest.warns(UserWarning, match=f"feature_layer: taking '{entry.default}'"):
        default = SANM(model, image_shape=(3, SIDE, SIDE)).eval()
    assert default.forward_features(images)[1].shape == features.shape
    if entry.default.startswith(entry.layer) or entry.layer.startswith(entry.default):
        same(default)
    named = SANM(model, entry.layer, image_shape=(3, SIDE, SIDE)).eval()
    torch.testing.assert_close(named.forward_features(images)[1], features)
    same(named)
    same(nn.parallel.DistributedDataParallel(named, find_unused_parameters=True))
    same(torch.compile(named, backend="eager"))
    same(SANM(torch.compile(model, backend="eager"), entry.layer).eval())


@extended
@pytest.mark.parametrize(
    ("library", "build", "layer", "message"),
    [
        (
            "torchvision",
            torchvision("resnet18"),
            "layer4",
            r"map of one cell.*'layer3' \(B, 256, 2",
        ),
        (
            "torchvision",
            torchvision("resnet18"),
            "avgpool",
            r"map of one cell.*'layer3' \(B, 256, 2",
        ),
        ("timm", features_only, "layer3", r"which returned list of \(1, 64, 16, 16\)"),
    ],
)
def test_what_is_refused(library, build, layer, message):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    with pytest.raises(ValueError, match=message):
        SANM(build(), layer, image_shape=(3, 32, 32))
