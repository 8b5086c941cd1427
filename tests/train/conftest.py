"""Shared pieces of the training front end's tests: tiny runs on few samples."""

from __future__ import annotations

import contextlib
import resource
import signal
import sys
from types import ModuleType, SimpleNamespace

import pytest

from sanm_train import TrainConfig, config


@pytest.fixture(scope="session", autouse=True)
def on_the_cpu():
    """Where these tests train, also on a machine with a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "_device", lambda: "cpu")
        yield


@pytest.fixture
def tiny():
    """A maker of configurations that train in about a second."""

    def make(**settings):
        return TrainConfig(**{"epochs": 2, "warmup": 1, "limit": 130, "batch_size": 32, **settings})

    return make


@pytest.fixture
def files_of_at_most():
    """In `with files_of_at_most(size):` writing more fails, as on a full disk."""

    @contextlib.contextmanager
    def limited(size):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)

    return limited


@pytest.fixture
def torchvision(monkeypatch):
    """A module that stands for torchvision: knows names, and gives networks what it was asked."""
    from sanm_train.models import PreActResNet18

    def get_model(name, weights, **asked):
        model = PreActResNet18(3, asked["num_classes"], width=4)
        model.asked = {"name": name, "weights": weights, **asked}
        return model

    module = ModuleType("torchvision")
    module.models = SimpleNamespace(
        list_models=lambda: ["resnet50", "resnet18", "vit_b_16"], get_model=get_model
    )
    monkeypatch.setitem(sys.modules, "torchvision", module)
    return module
