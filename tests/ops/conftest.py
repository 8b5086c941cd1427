"""The `backend` of tests that run wherever a GPU backend's kernels do: on a GPU, or emulated."""

from __future__ import annotations

import pytest
from inputs import GPU_DEVICES

from sanm_kernels.backends import load
from sanm_kernels.reference import checks


@pytest.fixture(params=GPU_DEVICES)
def backend(request: pytest.FixtureRequest) -> str:
    """Each GPU backend that can run here; a test that parametrizes `backend` itself has its own."""
    if GPU_DEVICES[request.param] is None:
        pytest.skip(load(request.param) or "not here")
    return str(request.param)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values are not checked, as on a GPU, also where kernels run on CPU tensors."""
    monkeypatch.setattr(checks, "enabled", lambda x: False)
