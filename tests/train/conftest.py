"""Shared pieces of the training front end's tests: tiny runs on few samples."""

from __future__ import annotations

import pytest

from sanm_train import TrainConfig


@pytest.fixture
def tiny():
    """A maker of configurations that train in about a second."""

    def make(**settings):
        return TrainConfig(**{"epochs": 2, "warmup": 1, "limit": 130, "batch_size": 32, **settings})

    return make
