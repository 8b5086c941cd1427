"""SANM on two processes: the parameters of one on the joined batch, whatever wraps it."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from inputs import extended
from ranks import run_ranks
from torch import nn

from sanm_train import SANM, Batch

COMMON = '''
import sanm_kernels as sk
from torch import nn
from sanm_train import SANM, Batch

def network():
    """No batch statistics: these are each rank's own, unless torch's SyncBatchNorm is used."""
    layers = nn.Conv2d(3, 16, 3, 2, 1), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 24, 3, 1, 1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))

def build():
    torch.manual_seed(0)
    config = sk.MaskConfig.paper().replace(reconstruction_weight=1.0)  # so that the decoder moves
    return SANM(network(), "3", config=config, image_shape=(3, 16, 16))

def batch(step, size=12):
    generator = torch.Generator().manual_seed(step)
    return Batch(torch.randn(size, 3, 16, 16, generator=generator),
                 torch.randint(10, (size,), generator=generator),
                 torch.rand(size, generator=generator),
                 torch.randperm(1000, generator=generator)[:size],
                 masked=step != 1)  # an epoch may begin or end a warm-up

def part(batch, rank, ranks):
    parts = (x.chunk(ranks)[rank] for x in batch[:4])
    return Batch(*parts, masked=batch.masked)

def train(model, optimizer, batches, backward=lambda loss: loss.backward()):
    for step, batch in enumerate(batches):
        optimizer.zero_grad()
        backward(model(batch, generator=step).total)
        optimizer.step()

def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
'''
TRAIN = """
rank, ranks = dist.get_rank(), dist.get_world_size()
torch.manual_seed(99 + rank)  # what a rank draws itself is no other's
own = [part(batch(step), rank, ranks) for step in range(4)]
"""
WRAP = {
    "ddp": """
sanm = build()
wrapped = nn.parallel.DistributedDataParallel(sanm)
train(wrapped, sgd(wrapped), own)
""",
    "compiled ddp": """
sanm = build()
wrapped = torch.compile(nn.parallel.DistributedDataParallel(sanm), backend="eager")
train(wrapped, sgd(wrapped), own)
""",
    "fsdp2": """
from torch.distributed.fsdp import fully_shard
sanm = build()
fully_shard(sanm.model[3])
fully_shard(sanm, mesh=dist.init_device_mesh("cpu", (ranks,)))
train(sanm, sgd(sanm), own)
""",
    "accelerate": """
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
sanm = build()
wrapped, optimizer = accelerator.prepare(sanm, sgd(sanm))
train(wrapped, optimizer, own, accelerator.backward)
""",
    "fabric": """
from lightning.fabric import Fabric
fabric = Fabric(accelerator="cpu", devices=ranks, strategy="ddp")
fabric.launch()
sanm = build()
wrapped, optimizer = fabric.setup(sanm, sgd(sanm))
train(wrapped, optimizer, own, fabric.backward)
""",
}
STATE = """
full = lambda x: x.full_tensor() if hasattr(x, "full_tensor") else x
state = {name: full(x.detach()).clone() for name, x in sanm.named_parameters()}
"""


@extended
@pytest.mark.parametrize("how", WRAP)
def test_two_ranks_are_one_process_on_the_joined_batch(how, tmp_path):
    needed = {"accelerate": "accelerate", "fabric": "lightning"}.get(how, "torch")
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    names = {}
    exec("import torch\n" + COMMON, names)
    one = names["build"]()
    before = {name: x.detach().clone() for name, x in one.named_parameters()}
    names["train"](one, names["sgd"](one), [names["batch"](step) for step in range(4)])
    first, second = run_ranks(tmp_path, 2, COMMON + TRAIN + WRAP[how] + STATE, "state")
    assert first["state"].keys() == before.keys()
    worst = {"model": 0.0, "decoder": 0.0}
    for name, parameter in one.named_parameters():
        assert torch.equal(first["state"][name], second["state"][name]), name
        moved = (parameter.detach() - before[name]).abs().max()
        assert moved > 1e-3, name
        error = (first["state"][name] - parameter.detach()).abs().max() / moved
        kind = name.partition(".")[0]
        worst[kind] = max(worst[kind], error.item())
    print(f"{how}: largest difference over how far it moved: {worst}")
    assert max(worst.values()) < 1e-4


WARNS = (
    COMMON
    + """
import warnings
sanm = build()
ddp = nn.parallel.DistributedDataParallel(sanm)

def said(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if "outside of the forward" in str(w.message)]

silent = said(lambda: ddp(batch(0)))
with torch.no_grad():
    silent += said(lambda: sanm.losses(batch(0)))
warned = said(lambda: ddp.module.losses(batch(0))), said(lambda: ddp.module(batch(0)))
try:
    SANM(network(), "3")(batch(0))
    refused = ""
except RuntimeError as error:
    refused = str(error)
"""
)


@extended
def test_losses_past_ddp_warn_and_late_decoders_are_refused(tmp_path):
    for found in run_ranks(tmp_path, 2, WARNS, "silent", "warned", "refused"):
        assert found["silent"] == []
        assert all(
            len(messages) == 1 and "ddp(batch)" in messages[0] for messages in found["warned"]
        )
        assert "image_shape: SANM needs it where several processes train" in found["refused"]


def test_one_process_is_not_warned(recwarn):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    sanm = SANM(net, "0", image_shape=(1, 8, 8))
    sanm.losses(Batch(torch.rand(2, 1, 8, 8), torch.arange(2)), generator=0)
    assert not [w for w in recwarn if "outside of the forward" in str(w.message)]
