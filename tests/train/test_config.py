"""Settings: YAML files, presets, what overrides what, and the message for each mistake."""

from __future__ import annotations

import copy
import dataclasses
import os
import pickle
import re
from dataclasses import asdict, dataclass

import pytest
import torch
import yaml

from sanm_train import MODELS, TrainConfig, config
from sanm_train.config import PRESETS, read_preset
from sanm_train.errors import ConfigError
from sanm_train.settings import fitting, settings_of
from sanm_train.train import CONFIG

DEVICE = config._device  # not that of conftest.py
NAMES = list(yaml.safe_load(PRESETS.read_text()))


def write(path, text: str):
    file = path / "settings.yaml"
    file.write_text(text)
    return file


def test_every_setting_survives_writing_and_reading(tmp_path):
    config = TrainConfig(lr=1e-5, ratio_low=0.01, confidence_weight=None, modulate=False, seed=3)
    config.write(tmp_path / CONFIG)
    assert TrainConfig.read(tmp_path / CONFIG) == config
    saved = yaml.safe_load((tmp_path / CONFIG).read_text())
    assert list(saved) == [entry.name for entry in dataclasses.fields(config)]


def test_options_over_file_over_preset_over_defaults(tmp_path):
    file = write(tmp_path, "lr: 1e-3\nepochs: 5\nbatch_size: 32\n")
    config = TrainConfig.read(file, "digits", epochs=7)
    assert (config.lr, config.epochs, config.batch_size, config.momentum) == (0.001, 7, 32, 0.9)
    assert isinstance(config.lr, float)
    assert TrainConfig.read(write(tmp_path, "lr: 1\n")).lr == 1.0


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_is_valid(name, torchvision):
    settings = read_preset(name)
    settings |= {"dataset": "digits", "noise": "symmetric"}  # needs no files
    TrainConfig.read(None, None, **fitting(settings, TrainConfig.chosen(settings)))


def test_presets_have_the_published_constants():
    cifar = read_preset("cifar10-sym90")
    assert (cifar["lr"], cifar["momentum"], cifar["weight_decay"]) == (0.02, 0.9, 5e-4)
    assert (cifar["warmup"], cifar["threshold"], cifar["unlabeled_weight"]) == (10, 0.6, 50)
    assert round(cifar["lr_drop"] * cifar["epochs"]) == 150 and cifar["batch_size"] == 2 * 64
    assert read_preset("cifar100-sym50")["warmup"] == 20
    by_noise = {"sym20": (0, 25), "sym50": (25, 150), "sym80": (25, 150), "sym90": (50, 150)}
    for noise, weights in by_noise.items():
        names = (f"cifar10-{noise}", f"cifar100-{noise}")
        assert tuple(read_preset(name)["unlabeled_weight"] for name in names) == weights
    assert read_preset("cifar10-asym40")["unlabeled_weight"] == 0
    clothing = read_preset("clothing1m")
    assert (clothing["lr"], clothing["weight_decay"], clothing["alpha"]) == (9e-4, 1e-3, 0.5)
    assert clothing["lr_drop"] * clothing["epochs"] == 40 and clothing["batch_size"] == 2 * 32
    mask = TrainConfig(mask=clothing["mask"]).mask_config
    assert (mask.ratio_low, mask.ratio_high, mask.reconstruction_weight) == (0.06, 0.13, 0.3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", r"settings.yaml: there is no setting 'epoch'; did you mean 'epochs'\?"),
        ("lr: fast", r"settings.yaml: lr must be of type float, got 'fast'"),
        ("epochs: 2.5", r"epochs must be of type int, got 2.5"),
        ("epochs: true", r"epochs must be of type int, got True"),
        ("modulate: 1", r"modulate must be of type bool, got 1"),
        ("recipe: 3", r"recipe must be of type str, got 3"),
        ("epochs: null", r"epochs must be of type int, got None"),
        ("- lr", r"must hold settings as 'name: value'"),
        ("lr: [", r"cannot be read as YAML"),
        ("seed: 4294967296", r"seed must be in \[0, 4294967295\], got 4294967296"),
        ("lr: .inf", r"lr must be finite, got inf"),
        ("confidence_weight: -1", r"confidence_weight must be at least 0, got -1"),
        (
            "dataset: cifar10\nnoise: none\nnoise_set: worse_label",
            "noise_set goes with noise file, got noise none",
        ),
        ("noise_set: worse_label", "noise_set is a setting of cifar10, cifar100 only$"),
        (
            "recipe: ce\nalpha: 4.0",
            "settings.yaml: alpha is a setting of dividemix, sanm-divi",
        ),
        ("imports: os", "imports must be a list of names, got 'os'"),
        ("imports: [no_such_module]", "'no_such_module' cannot be imported: ModuleNotFoundError"),
        ("rate: 2", r"rate must be in \[0, 1\], got 2"),
        ("precision: half", r"precision must be one of float32, bfloat16, float16; got 'half'"),
        ("augmentation: crops", r"augmentation must be one of .*did you mean 'crop'"),
    ],
)
def test_mistakes_in_files(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        TrainConfig.read(write(tmp_path, text))
    assert "\n" not in str(error.value)


def test_settings_of_recipe_data_set_and_network_come_with_their_names(tmp_path):
    assert {"elr_weight", "lr"} <= set(asdict(TrainConfig(recipe="elr")))
    assert not {"elr_weight", "alpha"} & set(asdict(TrainConfig(recipe="ce")))
    with pytest.raises(ConfigError, match="elr_weight is a setting of elr, sanm-elr only"):
        TrainConfig(recipe="ce", elr_weight=1.0)
    with pytest.raises(ConfigError, match="no setting 'epoch'; did you mean 'epochs'"):
        TrainConfig(epoch=1)
    # a preset's settings of another recipe are left out
    assert TrainConfig.read(None, "digits", recipe="ce").recipe == "ce"
    config = TrainConfig(recipe="elr", elr_weight=2.0)
    assert dataclasses.replace(config, lr=0.1).elr_weight == 2.0
    assert pickle.loads(pickle.dumps(config)) == config == copy.deepcopy(config)
    with pytest.raises(ConfigError, match="bring settings: make new settings"):
        dataclasses.replace(config, recipe="sanm-dividemix")


def test_defaults_of_data_sets_and_of_the_machine(tmp_path, torchvision, monkeypatch):
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
    photos = TrainConfig(dataset="folder", data_root=str(tmp_path))
    assert (photos.mask, photos.noise, photos.model) == ("paper", "none", "torchvision:resnet50")
    assert (photos.epochs, photos.augmentation) == (80, "photos")
    assert (TrainConfig().mask, TrainConfig().noise) == ("small-images", "symmetric")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(6))
    here = {"dataset": "folder", "data_root": str(tmp_path)}
    assert TrainConfig().threads == 1 and TrainConfig(**here).threads == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert TrainConfig(**here).threads == 1 and TrainConfig(threads=3).threads == 3


@pytest.mark.parametrize("there", [False, True])
def test_a_gpu_is_taken_only_if_kernels_run_on_it(there, monkeypatch):
    monkeypatch.setattr(config, "_device", DEVICE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)

    def zeros(*_, **__):
        assert there
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr(torch, "zeros", zeros)
    assert TrainConfig().device == "cpu"
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: 0)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: 0)
    assert TrainConfig().device == ("cuda" if there else "cpu")


def test_missing_file_and_unknown_preset(tmp_path):
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / 'no.yaml'} cannot be read")):
        TrainConfig.read(tmp_path / "no.yaml")
    with pytest.raises(ConfigError, match="did you mean 'cifar10-sym50'"):
        TrainConfig.read(preset="cifar10-sym-50")


def test_two_parts_cannot_share_the_name_of_a_setting(monkeypatch):
    @dataclass(frozen=True, kw_only=True)
    class Wide(TrainConfig):
        alpha: float = 0.5

    monkeypatch.setitem(MODELS, "wide", lambda **_: None)
    monkeypatch.setitem(MODELS.configs, "wide", Wide)
    assert TrainConfig(recipe="ce", model="wide").alpha == 0.5
    with pytest.raises(ConfigError, match="Wide and DivideMixConfig have both"):
        TrainConfig(model="wide")


def test_a_setting_must_have_a_default():
    @dataclass(frozen=True, kw_only=True)
    class Bare(TrainConfig):
        strength: float

    with pytest.raises(TypeError, match=r"Bare\.strength must have a default"):
        settings_of(Bare)
