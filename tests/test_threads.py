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
from inputs import more
from maker import SMALL, identical
from random_calls import random_call

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


#: Calls that read indices, boxes, draws or losses, which another thread spoils and mends meanwhile.
CHANGED = """
import sys, threading, time, torch, sanm_kernels as sk
from sanm_kernels import backends
assert backends.load("cpu") is None
ops = torch.ops.sanm_kernels
n, K = 4000, 5
z, rows, losses = torch.randn(n, K), torch.rand(n, 1, 4, 4), torch.rand(9000)
features, images, clean = torch.rand(500, 4, 2, 2), torch.rand(500, 3, 8, 8), torch.rand(500)
labels, permutation = torch.arange(n) % K, torch.arange(n).flip(0)
draws, boxes = torch.rand(500, 2).double(), torch.tensor([0, 0, 2, 2]).repeat(1, n, 1)
small, half = boxes.int(), torch.tensor([0.5]).double()
watched = {x: x.clone() for x in (labels, permutation, draws, boxes, small, losses)}
calls = {
    "sample_loss": lambda: sk.sample_loss(z, labels),
    "masked_loss": lambda: sk.masked_loss(
        z.requires_grad_(), labels, mix=(0.5, permutation)).total.backward(),
    "masked_loss, soft": lambda: sk.masked_loss(z.detach(), z.detach().softmax(1),
                                                mix=(0.5, permutation)),
    "mixup_views": lambda: sk.mixup_views([rows], 0.5, permutation),
    "mixup_views_backward": lambda: ops.mixup_views_backward.cpu(rows, half, permutation, [n]),
    "refine_targets": lambda: sk.refine_targets(z.detach(), labels=labels,
                                                clean_prob=torch.ones(n)),
    "reconstruction_loss": lambda: sk.reconstruction_loss(rows, rows, boxes=boxes,
                                                          region="masked"),
    "masked_views_backward": lambda: ops.masked_views_backward.cpu(rows, small, True),
    "masked_forward": lambda: sk.masked_forward(
        features, labels[:500], clean, images=images, num_classes=K, draws=draws),
    "fit_label_quality": lambda: sk.fit_label_quality(losses),
    "fit_label_quality, few": lambda: sk.fit_label_quality(losses[:n]),
}
over = False
def spoil():
    k = 0
    while not over:
        k += 1
        for x in watched:
            far = (float("nan"), -1e300) if x.is_floating_point() else (-(2**31), 2**30)
            x.fill_(far[k % 2])
        for x, right in watched.items():
            x.copy_(right)
        time.sleep(0.0005)
thread = threading.Thread(target=spoil)
thread.start()
ran = raised = 0
end = time.monotonic() + 2
while time.monotonic() < end:
    try:
        calls[sys.argv[1]]()
        ran += 1
    except ValueError:
        raised += 1
    except RuntimeError as error:  # autograd's: what it saved was changed
        assert "modified by an inplace operation" in str(error), error
        raised += 1
over = True
thread.join()
print("sound", ran, raised)
"""


@needs_library
@pytest.mark.parametrize(
    "call",
    [
        "sample_loss",
        "masked_loss",
        "mixup_views",
        "masked_forward",
        *more(
            "masked_loss, soft", "mixup_views_backward", "refine_targets", "reconstruction_loss",
            "masked_views_backward", "fit_label_quality", "fit_label_quality, few",
        ),
    ],
)  # fmt: skip
def test_what_another_thread_changes_meanwhile_ends_no_process(call):
    """The call raises, or takes indices as they were when it read them."""
    done = subprocess.run(
        [sys.executable, "-c", CHANGED, call], cwd=ROOT, capture_output=True, text=True,
        timeout=180, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    said, ran, raised = done.stdout.split()
    assert said == "sound" and int(ran) + int(raised) > 50
