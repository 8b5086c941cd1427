"""DivideMix with SANM's masking (no reconstruction, for brevity) on digits with wrong labels."""

import argparse
import random
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import train_test_split
from slow_functions import NegEntropy, SemiLoss, attention_erase_map
from torch import Tensor, nn

from sanm_kernels import compat

CLASSES, HALF, TEMPERATURE, LAMBDA_U = 10, 32, 0.5, 25
CE = nn.CrossEntropyLoss(reduction="none")
MISTAKEN_FOR = torch.tensor([0, 1, 7, 8, 4, 6, 5, 1, 8, 9])  # asymmetric noise: 2→7, 3→8, 5↔6, 7→1


class Net(nn.Module):
    """Gives logits (B, 10) and the last feature map (B, 64, 4, 4) of images (B, 3, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels, width, stride in ((3, 16, 1), (16, 32, 2), (32, 64, 1), (64, 64, 1)):
            layers += [nn.Conv2d(channels, width, 3, stride, 1), nn.BatchNorm2d(width), nn.ReLU()]
        self.convs, self.linear = nn.Sequential(*layers), nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.convs(x)
        return self.linear(features.mean((2, 3))), features


def noisy_digits(noise: str, rate: float) -> list[Tensor]:
    """Images and labels to train on, the share `rate` of them redrawn; the same to test on."""
    x, y = load_digits(return_X_y=True)
    x = torch.tensor(x / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8).repeat(1, 3, 1, 1)
    x, test_x, y, test_y = train_test_split(x, torch.tensor(y), stratify=y, random_state=0)
    drawn = MISTAKEN_FOR[y] if noise == "asym" else (y + torch.randint(1, 10, y.shape)) % CLASSES
    return [x, torch.where(torch.rand(len(y)) < rate, drawn, y), test_x, test_y]


def shifted(x: Tensor) -> Tensor:
    """Every image moved by up to a pixel."""
    matrix = torch.eye(2, 3).repeat(len(x), 1, 1)
    matrix[:, :, 2] = torch.rand(len(x), 2) / 2 - 0.25
    return F.grid_sample(x + 1, F.affine_grid(matrix, x.shape, False), align_corners=False) - 1


def update(optimizer: torch.optim.Optimizer, *parts: Tensor) -> None:
    """A step along the sum of `parts`, each of which is noted."""
    optimizer.zero_grad()
    sum(parts).backward()
    optimizer.step()
    losses.append([part.item() for part in parts])


def warm_up(net: Net, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, noise: str) -> None:
    net.train()
    for index in torch.randperm(len(y)).split(HALF):
        logits, _ = net(shifted(x[index]))
        parts = [F.cross_entropy(logits, y[index])]
        if noise == "asym":  # keeps the network from being certain of what it confuses
            parts.append(NegEntropy()(logits))
        update(optimizer, *parts)


@torch.no_grad()
def clean_probability(net: Net, x: Tensor, y: Tensor) -> Tensor:
    """The posterior (N,) of the mixture's component with the smaller losses."""
    each = CE(net.eval()(x)[0], y)
    each = ((each - each.min()) / (each.max() - each.min())).reshape(-1, 1)
    mixture = GaussianMixture(2, max_iter=10, tol=1e-2, reg_covar=5e-4).fit(each)
    return torch.tensor(mixture.predict_proba(each)[:, mixture.means_.argmin()]).float()


@torch.no_grad()
def guess(net: Net, other: Net, views: list[Tensor], y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Sharpened targets of a batch, its first half labelled, and the first view's feature map."""
    (first, features), (second, _) = net(views[0]), net(views[1])
    p = (first.softmax(1) + second.softmax(1)) / 2
    refined = w[:HALF, None] * F.one_hot(y[:HALF], CLASSES) + (1 - w[:HALF, None]) * p[:HALF]
    others = [other(view[HALF:])[0].softmax(1) for view in views]
    guessed = (2 * p[HALF:] + others[0] + others[1]) / 4
    targets = torch.cat([refined, guessed]) ** (1 / TEMPERATURE)
    return targets / targets.sum(1, keepdim=True), features


def halves(kinds: list[Tensor]) -> Tensor:
    """The labelled half of every kind of view, then the unlabelled halves."""
    return torch.cat([kind[:HALF] for kind in kinds] + [kind[HALF:] for kind in kinds])


def train(net: Net, other: Net, optimizer, x: Tensor, y: Tensor, w: Tensor, epoch: int) -> list:
    """One epoch of `net`; w (N,) is the other network's. Returns the seconds of each masking."""
    net.train()
    other.eval()
    seconds = []
    labeled, unlabeled = (w > 0.5).nonzero()[:, 0], (w <= 0.5).nonzero()[:, 0]
    batches = labeled[torch.randperm(len(labeled))].split(HALF)[:-1]
    for step, batch in enumerate(batches):
        index = torch.cat([batch, unlabeled[torch.randint(len(unlabeled), (HALF,))]])
        views = [shifted(x[index]) for _ in range(4)]
        targets, features = guess(net, other, views[:2], y[index], w[index])

        start = time.perf_counter()
        *hidden, softened = attention_erase_map(views[0], features, w[index], targets.clone())
        seconds.append(time.perf_counter() - start)
        inputs = halves([*views[2:], *hidden])
        labels = halves([targets, targets, softened, softened])
        lam = 0.5 + abs(np.random.beta(4, 4) - 0.5)
        partner, n = torch.randperm(len(inputs)), len(inputs) // 2
        labels = lam * labels + (1 - lam) * labels[partner]
        logits, _ = net(lam * inputs + (1 - lam) * inputs[partner])
        loss_x, loss_u, weight = SemiLoss(LAMBDA_U)(
            logits[:n],
            labels[:n],
            logits[n:],
            labels[n:],
            epoch + step / len(batches),
            args.warm_up,
        )
        prior = -(CLASSES * logits.softmax(1).mean(0)).log().mean()
        update(optimizer, loss_x, weight * loss_u, prior)
    return seconds


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--patch", action="store_true", help="let sanm_kernels compute")
parser.add_argument("--epochs", type=int, default=16)
parser.add_argument("--warm-up", type=int, default=6)
parser.add_argument("--losses", action="store_true", help="print the losses of every step")
parser.add_argument("--noise", choices=("sym", "asym"), default="sym")
parser.add_argument("--rate", type=float, default=0.5)
args = parser.parse_args()
if args.patch:  # the switch, in one line
    compat.patch(sys.modules[__name__])
random.seed(0)
np.random.seed(0)
torch.manual_seed(0)
x, y, test_x, test_y = noisy_digits(args.noise, args.rate)
nets, seconds, losses = [Net(), Net()], [], []
optimizers = [torch.optim.SGD(net.parameters(), 0.02, 0.9, weight_decay=5e-4) for net in nets]
for epoch in range(args.epochs):
    if epoch < args.warm_up:
        for net, optimizer in zip(nets, optimizers, strict=True):
            warm_up(net, optimizer, x, y, args.noise)
        continue
    quality = [clean_probability(net, x, y) for net in nets]
    for k in (0, 1):
        seconds += train(nets[k], nets[1 - k], optimizers[k], x, y, quality[1 - k], epoch)
with torch.no_grad():
    hits = sum(net.eval()(test_x)[0].softmax(1) for net in nets).argmax(1) == test_y
print(f"{hits.float().mean():.1%} of the test digits right")
each = f", {1e3 * np.median(seconds):.2f} ms each" if seconds else ""
print(f"masking: {len(seconds)} calls{each}")
if args.losses:
    print(*(" ".join(f"{part:.9g}" for part in step) for step in losses), sep="\n")
