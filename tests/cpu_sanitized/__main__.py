"""``python -m cpu_sanitized [address|thread [ISA]]``: build the library, print its folder."""

import sys

import torch

from cpu_sanitized import library
from sanm_kernels.backends.cpu import RUNS

best = RUNS.get(torch.backends.cpu.get_cpu_capability(), ("baseline",))[0]
sanitize, isa = [*sys.argv[1:], *("address", best)[len(sys.argv) - 1 :]]
print(library(sanitize, isa).parent)
