"""Label quality by global sample index: epochs, ranks, padding, states, wrong calls."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F
from inputs import extended
from ranks import run_ranks
from torch.utils.data import DataLoader, TensorDataset

import sanm_kernels as sk
from sanm_train import SANM, Batch, Indexed, LabelQualityTracker
from sanm_train.models import SmallCNN

N = 101


def two_groups(size: int = N, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    losses = 0.2 * torch.rand(size, generator=generator)
    losses[::3] += 3
    return losses


def test_it_is_the_mixture_over_the_epoch_s_losses():
    quality, losses = LabelQualityTracker(N, warmup=1), two_groups()
    index = torch.randperm(N)
    assert torch.equal(quality[index], torch.ones(N))
    quality.refit()  # before the first epoch
    for part in index.split(10):
        quality.update(part, losses[part])
    assert torch.equal(quality[index], torch.ones(N))  # until the epoch is over
    quality.refit()
    wanted = sk.fit_label_quality(losses).clean_prob
    assert torch.equal(quality[index], wanted[index])
    assert quality[torch.arange(0, N, 3)].max() < 0.1 and quality[torch.tensor([1, 2])].min() > 0.9
    quality.refit()  # nothing new
    assert torch.equal(quality[index], wanted[index]) and quality.epochs == 1


def test_losses_are_the_model_s_and_noted():
    torch.manual_seed(0)
    sanm = SANM(SmallCNN(), image_shape=(1, 8, 8)).eval()
    quality, index = LabelQualityTracker(N, warmup=0), torch.tensor([7, 3, 9])
    quality.clean_prob = torch.rand(N)
    images, labels = torch.rand(3, 1, 8, 8), torch.arange(3)
    losses = quality.losses(lambda batch: sanm(batch, generator=1), images, labels, index)
    wanted = sanm(Batch(images, labels, quality.clean_prob[index], index), generator=1)
    assert torch.equal(losses.total, wanted.total)
    assert torch.equal(
        quality.noted[index], F.cross_entropy(losses.logits, labels, reduction="none")
    )
    assert int((quality.noted > -torch.inf).sum()) == 3
    aside = quality.losses(sanm, images, labels, None)  # samples that are not trained on
    assert aside.masked is None and torch.equal(aside.logits, losses.logits)
    assert int((quality.noted > -torch.inf).sum()) == 3


def test_nothing_is_hidden_in_the_warm_up():
    torch.manual_seed(0)
    sanm = SANM(SmallCNN(), image_shape=(1, 8, 8))
    quality, index = LabelQualityTracker(N, warmup=2), torch.tensor([7, 3, 9])
    images, labels = torch.rand(3, 1, 8, 8), torch.arange(3)
    for epoch in range(4):
        quality.refit()
        losses = quality.losses(sanm, images, labels, index)
        assert (losses.masked is None) == (epoch < 2)
        quality.update(torch.arange(N), two_groups())


def test_positions_come_with_the_samples():
    pairs = Indexed([("a", 0), ("b", 1)])
    assert len(pairs) == 2 and pairs[1] == ("b", 1, 1)
    assert Indexed([{"labels": 4}])[0] == {"labels": 4, "index": 0}


@extended
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_positions_come_from_workers(start):
    """Those of the whole set, whichever worker reads a sample and in whichever order."""
    images, labels = torch.rand(37, 1, 2, 2), torch.randint(5, (37,))
    loader = DataLoader(
        Indexed(TensorDataset(images, labels)), 4, shuffle=True, num_workers=2,
        multiprocessing_context=start, persistent_workers=True,
    )  # fmt: skip
    for _ in range(2):
        seen = []
        for x, y, index in loader:
            assert torch.equal(x, images[index]) and torch.equal(y, labels[index])
            seen += index.tolist()
        assert sorted(seen) == list(range(37)) and seen != sorted(seen)


def test_warmup_and_samples_that_are_left_out():
    quality, losses = LabelQualityTracker(N, warmup=2), two_groups()
    first = torch.arange(N - 11)  # drop_last
    quality.update(first, losses[first])
    quality.refit()
    assert torch.equal(quality.clean_prob, torch.ones(N))
    quality.update(first[:50], losses[:50] + 0.01)
    quality.refit()
    seen = losses[first] + 0.01 * (first < 50)
    assert torch.equal(quality[first], sk.fit_label_quality(seen).clean_prob)
    assert torch.equal(quality[torch.arange(N - 11, N)], torch.ones(11))
    quality.update(torch.arange(N), losses)
    quality.update(torch.tensor([4]), torch.tensor([2.5]))  # again: the last one counts
    quality.refit()
    assert quality.history[-1, 4] == 2.5


def test_history_for_much_noise():
    quality = LabelQualityTracker(N, warmup=1, average_losses=True)
    rows = torch.rand(7, N) + 0.8 * (torch.arange(N) % 3 == 0)
    for row in rows:
        quality.update(torch.arange(N), row)
        quality.refit()
    wanted = sk.fit_label_quality(rows[-1], history=rows[2:-1]).clean_prob
    assert torch.equal(quality.clean_prob, wanted)
    assert not torch.equal(wanted, sk.fit_label_quality(rows[-1]).clean_prob)


def test_state():
    quality = LabelQualityTracker(N, warmup=1, average_losses=True)
    for seed in range(3):
        quality.update(torch.arange(N), two_groups(seed=seed))
        quality.refit()
    file = io.BytesIO()
    torch.save(quality.state_dict(), file)
    file.seek(0)
    again = LabelQualityTracker(N, warmup=1, average_losses=True)
    again.load_state_dict(torch.load(file, weights_only=True))
    for one in (quality, again):
        one.update(torch.arange(N), two_groups(seed=9))
        one.refit()
    assert torch.equal(quality.clean_prob, again.clean_prob) and again.epochs == 4
    with pytest.raises(ValueError, match="state: expected that of 7 samples, got 101"):
        LabelQualityTracker(7).load_state_dict(quality.state_dict())


def test_losses_of_one_kind_are_all_clean():
    quality = LabelQualityTracker(N, warmup=1)
    quality.update(torch.arange(N), torch.ones(N))
    with pytest.warns(UserWarning, match="all labels count as clean for now"):
        quality.refit()
    assert torch.equal(quality.clean_prob, torch.ones(N))


@pytest.mark.parametrize(
    ("index", "loss", "message"),
    [
        (torch.arange(4), torch.tensor(1.0), r"loss: expected the loss of each sample, \(4,\)"),
        (torch.arange(4), torch.rand(3), "reduction='none'"),
        (torch.arange(4), [1.0] * 4, "loss: expected a tensor of floats .* got list"),
        (torch.rand(4), torch.rand(4), "index: expected a tensor of integers .* torch.float32"),
        (range(4), torch.rand(4), "index: expected a tensor of integers .* got range"),
        (torch.arange(98, 102), torch.rand(4), "set of 101 samples, got 98 to 101"),
        (torch.arange(-1, 3), torch.rand(4), "got -1 to 2"),
    ],
)
def test_wrong_updates(index, loss, message):
    with pytest.raises((TypeError, ValueError), match=message):
        LabelQualityTracker(N).update(index, loss)


@pytest.mark.parametrize("size", [0, -1, None, True, 2.0])
def test_wrong_sizes(size):
    with pytest.raises(ValueError, match="num_samples: expected the length of the training set"):
        LabelQualityTracker(size)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_losses_that_are_not_finite(bad):
    quality = LabelQualityTracker(N)
    quality.update(torch.tensor([3, 17]), torch.tensor([1.0, bad]))
    with pytest.raises(FloatingPointError, match="the loss of sample 17 is not finite"):
        quality.refit()


RANKS = """
import torch
from sanm_train import LabelQualityTracker, distributed
from torch.utils.data import DistributedSampler

N = 101
quality = LabelQualityTracker(N, warmup=1, average_losses=True)
for epoch in range(3):
    generator = torch.Generator().manual_seed(epoch)
    losses = 0.2 * torch.rand(N, generator=generator)
    losses[::3] += 3
    sampler = DistributedSampler(range(N), seed=7, drop_last=False)  # pads: 101 on 2 or 3 ranks
    sampler.set_epoch(epoch)
    index = torch.tensor(list(sampler))
    quality.update(index, losses[index])
    quality.refit()
result = quality.clean_prob
bad = torch.tensor([torch.nan if distributed.rank() == 1 else 1.0])  # on one rank alone
quality.update(torch.tensor([distributed.rank()]), bad)
try:
    quality.refit()
    error = ""
except FloatingPointError as e:
    error = str(e)
"""


@extended
def test_any_number_of_ranks_has_the_same_quality(tmp_path):
    one = LabelQualityTracker(N, warmup=1, average_losses=True)
    for epoch in range(3):
        one.update(torch.arange(N), two_groups(seed=epoch))
        one.refit()
    for ranks in (2, 3):
        for found in run_ranks(tmp_path, ranks, RANKS, "result", "error"):
            assert torch.equal(found["result"], one.clean_prob)  # padded samples count once
            assert found["error"] == "the loss of sample 1 is not finite"
