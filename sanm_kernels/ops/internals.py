"""The names of torch that are not public, all of them, and what is used where one is missing.

They save time in each call and change no result. torch.compile's mark has no other form: a test
compares it with what torch.compiler.assume_constant_result sets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad

F = TypeVar("F", bound=Callable[..., Any])

#: The context in which a kernel is called where nothing is to be recorded.
below_autograd: Callable[[], Any] = getattr(torch._C, "_AutoDispatchBelowAutograd", torch.no_grad)
#: Whether a transform of torch.func runs; if unknown, calls go the way that suits both.
transforms_active: Callable[[], bool] = getattr(
    torch._C, "_are_functorch_transforms_active", lambda: True
)
#: The context of a GPU, by its index. torch's own takes a tenth of the public one's time.
device_guard: Callable[[int], Any] = getattr(torch.cuda, "_DeviceGuard", torch.cuda.device)

if hasattr(forward_ad, "_current_level"):

    def forward_mode_active() -> bool:
        """Whether some tensors may have a tangent."""
        return forward_ad._current_level >= 0

else:

    def forward_mode_active() -> bool:
        return True


def constant(function: F) -> F:
    """Let torch.compile call `function` when it traces and keep the result.

    What `torch.compiler.assume_constant_result` does, without importing the compiler, which takes
    seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
