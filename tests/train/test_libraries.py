"""Networks of other libraries by name."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from inputs import extended
from real_formats import tag
from torch import nn

from sanm_train import SANM, TrainConfig, train
from sanm_train.cli import main
from sanm_train.errors import ConfigError
from sanm_train.models import MODELS, SmallCNN
from sanm_train.train import load_run


def test_torchvision_gets_names_classes_and_fresh_weights(torchvision):
    model = MODELS.build("torchvision:resnet18", 3, 7, (64, 64))
    assert model.asked == {"name": "resnet18", "weights": None, "num_classes": 7}
    assert MODELS.build("torchvision:vit_b_16", 3, 7, (64, 64)).asked["image_size"] == 64
    with pytest.raises(ConfigError, match="take 3 channels, images have 1"):
        MODELS.build("torchvision:resnet18", 1, 7, (64, 64))
    with pytest.raises(ConfigError, match="has no 'resnet_50'; did you mean 'resnet50'"):
        TrainConfig(model="torchvision:resnet_50")


def test_timm_gets_channels_and_classes_and_sizes_where_they_are_fixed(monkeypatch):
    module = ModuleType("timm")
    module.list_models = lambda: ["resnet18", "vit_tiny"]
    module.get_pretrained_cfg = lambda name: SimpleNamespace(fixed_input_size=name == "vit_tiny")
    module.create_model = lambda name, **asked: asked
    monkeypatch.setitem(sys.modules, "timm", module)
    asked = {"pretrained": False, "in_chans": 1, "num_classes": 7}
    assert MODELS.build("timm:resnet18", 1, 7, (64, 64)) == asked
    assert MODELS.build("timm:vit_tiny", 1, 7, (64, 64)) == asked | {"img_size": (64, 64)}


class Vit:
    model_type = "vit"


def test_hugging_face_configurations_by_type_and_from_a_folder(monkeypatch, tmp_path):
    module = ModuleType("transformers")
    module.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING = {Vit: None}
    module.AutoConfig = SimpleNamespace(
        for_model=lambda name, **asked: SimpleNamespace(name=name, image_size=224, **asked),
        from_pretrained=lambda path, **asked: SimpleNamespace(name=path, **asked),
    )
    module.AutoModelForImageClassification = SimpleNamespace(from_config=vars)
    monkeypatch.setitem(sys.modules, "transformers", module)
    asked = {"num_labels": 7, "num_channels": 1}
    vit = MODELS.build("hf:vit", 1, 7, (64, 64))
    assert vit == asked | {"name": "vit", "image_size": 64}
    (tmp_path / "config.json").write_text("{}")
    own = MODELS.build(f"hf:{tmp_path}", 1, 7, (64, 64))
    assert own == asked | {"name": str(tmp_path), "local_files_only": True}
    with pytest.raises(ConfigError, match="transformers has no 'bit'; did you mean 'vit'"):
        MODELS.ready("hf:bit")


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("timm:resnet18", "timm"),
        ("torchvision:resnet50", "torchvision"),
        ("hf:vit", "transformers"),
    ],
)
def test_a_library_that_is_not_installed_is_named(name, package, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["train", "--model", name, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert f"needs {package}, which is not installed: pip install {package}" in error
    assert error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_photos_say_what_their_default_network_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    for split in ("train", "test"):
        tag(tmp_path / split / "a/1.png", 1)
    with pytest.raises(ConfigError, match=r"needs torchvision, .*as timm:resnet50 of timm"):
        TrainConfig(dataset="folder", data_root=str(tmp_path))


def of_a_user(in_channels, num_classes):
    return SmallCNN(in_channels, num_classes, width=4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere:build", "model: nowhere:build cannot be imported: ModuleNotFoundError"),
        ("test_libraries:nothing", "cannot be imported: AttributeError"),
        ("test_libraries:__name__", "must be a function, got str"),
        (
            "resnet",
            r"must be one of .*small-cnn, python, timm:NAME, .*package.module:function; got",
        ),
        ("timm:NAME", "has no 'NAME'|needs timm"),
    ],
)
def test_networks_that_cannot_be_found(name, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "test_libraries", sys.modules[__name__])
    with pytest.raises(ConfigError, match=message):
        TrainConfig(model=name)


def test_a_run_with_any_function_s_network(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "test_libraries", sys.modules[__name__])
    train(tiny(model="test_libraries:of_a_user", epochs=1), tmp_path)
    (first, _) = load_run(tmp_path).recipe.networks
    assert first.model.linear.in_features == 16 and first.feature_layer == "features"


def test_the_feature_layer_can_be_named(tiny):
    recipe = train(tiny(recipe="sanm-ce", epochs=1, feature_layer="features.8")).recipe
    assert recipe.networks[0].feature_layer == "features.8"
    with pytest.raises(ValueError, match="the model has no module 'feature'"):
        train(tiny(recipe="sanm-ce", feature_layer="feature"))


@extended
@pytest.mark.parametrize(
    ("name", "map_shape"),
    [
        ("timm:resnet18", (512, 2, 2)),
        ("timm:vit_tiny_patch16_224", (192, 4, 4)),
        ("torchvision:resnet18", (512, 2, 2)),
        ("hf:resnet", (2048, 2, 2)),
        ("hf:convnext", (768, 2, 2)),
    ],
)
def test_the_libraries_themselves(name, map_shape):
    package = {"hf": "transformers"}.get(name.partition(":")[0], name.partition(":")[0])
    pytest.importorskip(package, reason=f"{package} is not installed")
    model: nn.Module = MODELS.build(name, 3, 7, (64, 64))
    with pytest.warns(UserWarning, match="feature_layer: taking"):
        sanm = SANM(model, image_shape=(3, 64, 64)).eval()
    logits, features = sanm.forward_features(torch.randn(2, 3, 64, 64))
    assert logits.shape == (2, 7) and features.shape == (2, *map_shape)
