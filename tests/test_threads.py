"""Calls from several Python threads at once, also the first of a process, and after a fork."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from differential import run
from random_calls import SMALL, identical, random_call

import sanm_kernels as sk
from sanm_kernels import backends

ROOT = Path(__file__).resolve().parent.parent
needs_library = pytest.mark.skipif(
    backends.load("cpu") is not None, reason=str(backends.load("cpu"))
)
#: Large enough to be shared between two of torch's threads, and for memory that is kept.
WORK = """
import torch, sanm_kernels as sk
torch.manual_seed(0)
features, images = torch.randn(8, 256, 7, 7), torch.rand(8, 3, 80, 80)
logits, labels, clean = torch.randn(2000, 100), torch.randint(0, 100, (2000,)), torch.rand(8)
def work():
    masked = sk.masked_forward(
        features, labels[:8], clean, images=images, num_classes=100, generator=3
    )
    losses = sk.sample_loss(logits, labels)
    quality = sk.fit_label_quality(losses)
    return [masked.images_masked, masked.targets_max, losses, quality.clean_prob]
def same(a, b):
    return all(map(torch.equal, a, b))
"""


def run_python(code: str, threads: int) -> str:
    """What a new process prints; it has a minute, so that a hanging one fails."""
    done = subprocess.run(
        [sys.executable, "-c", WORK + code], cwd=ROOT, capture_output=True, text=True, timeout=180,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_library)])
def test_two_threads_at_once_give_the_bits_of_one(backend):
    """Forward and backward of every function, the same inputs in both threads, in another order."""
    calls = [random_call(number) for number in range(SMALL, SMALL + 60)]
    calls = [call for call in calls if not call.wrong]
    assert len({call.function for call in calls}) == 8
    barrier = threading.Barrier(2)

    def work(order):
        barrier.wait()
        return {i: run(calls[i], backend) for i in order for _ in range(3)}

    threads = torch.get_num_threads()
    try:
        for number in (1, 2):  # torch's own, on which its matrix products depend
            torch.set_num_threads(number)
            alone = [run(call, backend) for call in calls]
            with ThreadPoolExecutor(2) as pool:
                orders = range(len(calls)), reversed(range(len(calls)))
                together = list(pool.map(work, orders))
            for results, (i, expected) in itertools.product(together, enumerate(alone)):
                assert results[i].keys() == expected.keys()
                for name, value in expected.items():
                    got = results[i][name]
                    equal = got is value if value is None else identical(got, value)
                    assert equal, (calls[i].number, number, name)
    finally:
        torch.set_num_threads(threads)


def test_the_first_calls_may_come_from_several_threads_at_once():
    code = """
import threading
from concurrent.futures import ThreadPoolExecutor
barrier = threading.Barrier(8)
def first(_):
    barrier.wait()
    return work()
results = list(ThreadPoolExecutor(8).map(first, range(8)))
print(all(same(results[0], r) for r in results) and same(results[0], work()))
"""
    assert run_python(code, 1) == "True\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_process_gives_the_same_bits():
    """The child has one thread, as torch's data loaders see to.

    With more, torch's own operators hang in a child whose parent has used OpenMP's threads.
    """
    code = """
import os
before = work()
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    os._exit(0 if same(before, work()) else 1)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(torch.get_num_threads(), status, same(before, work()))
"""
    assert run_python(code, 2) == "2 0 True\n"


def test_data_loaders_may_call_the_kernels():
    code = """
from torch.utils.data import DataLoader, Dataset
class Losses(Dataset):
    def __len__(self):
        return 6
    def __getitem__(self, i):
        return sk.sample_loss(logits[i::6][:300], labels[i::6][:300])
work()
rows = torch.stack(list(DataLoader(Losses(), batch_size=None, num_workers=2)))
print(torch.equal(rows, torch.stack([Losses()[i] for i in range(6)])))
"""
    assert run_python(code, 2) == "True\n"


@needs_library
def test_blocks_that_force_a_backend_may_overlap():
    """As those of two threads do: each takes back what it forced, not what came last."""
    early, late = sk.use_backend("reference"), sk.use_backend("cpu")
    early.__enter__()
    late.__enter__()
    early.__exit__(None, None, None)
    assert backends.forced(None) == "cpu"
    late.__exit__(None, None, None)
    assert backends.forced(None) is None
