"""SANM in an ordinary PyTorch training loop, on digits with half of the training labels wrong.

Trains one network by cross-entropy on the labels as they are, and the same with SANM. What SANM
adds to the loop are the lines below `if sanm`.
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import sanm_kernels as sk
from sanm_train import SANM, Batch

WARMUP = 3  # epochs before the losses tell right labels from wrong ones
# The paper's ratios hide one to six of 64 pixels; digits bear more.
CONFIG = sk.MaskConfig.paper().replace(ratio_low=0.1, ratio_high=0.2, ratio_gamma=0.2)


def noisy_digits() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Training images (1347, 1, 8, 8), their labels, which of these are wrong; test images, labels.

    Every second label, in random order, is replaced by one of the nine others.
    """
    digits = load_digits()
    images = torch.tensor(digits.images[:, None] / 8 - 1, dtype=torch.float32)
    parts = train_test_split(
        images, torch.tensor(digits.target), stratify=digits.target, random_state=0
    )
    images, test_images, labels, test_labels = parts
    generator = torch.Generator().manual_seed(0)
    wrong = torch.randperm(len(labels), generator=generator) % 2 == 0
    shift = torch.randint(1, 10, labels.shape, generator=generator)
    return images, (labels + wrong * shift) % 10, wrong, test_images, test_labels


def small_cnn() -> nn.Module:
    """A classifier of 8×8 images. Its module "0" gives the last feature map (B, 64, 4, 4)."""
    layers: list[nn.Module] = []
    for channels, width, stride in ((1, 16, 1), (16, 32, 2), (32, 64, 1), (64, 64, 1)):
        layers += [nn.Conv2d(channels, width, 3, stride, 1), nn.BatchNorm2d(width), nn.ReLU()]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    return nn.Sequential(nn.Sequential(*layers), *head)


def train(epochs: int, sanm: bool) -> float:
    """Train a network with or without SANM; its test accuracy."""
    torch.manual_seed(0)
    images, labels, wrong, test_images, test_labels = noisy_digits()
    clean_prob = torch.ones(len(labels))
    model: nn.Module = small_cnn()
    if sanm:
        model = SANM(model, feature_layer="0", config=CONFIG, image_shape=(1, 8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)

    for epoch in range(epochs):
        if sanm and epoch >= WARMUP:
            model.eval()
            with torch.no_grad():
                losses = sk.sample_loss(model(images), labels)
            clean_prob = sk.fit_label_quality(losses).clean_prob
        model.train()
        for index in torch.randperm(len(labels)).split(64):
            if sanm:
                batch = Batch(images[index], labels[index], clean_prob[index], index)
                loss = model.losses(batch).total
            else:
                loss = F.cross_entropy(model(images[index]), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    if sanm:
        right, mistaken = clean_prob[~wrong].mean(), clean_prob[wrong].mean()
        print(f"label quality: right labels {right:.2f}, wrong labels {mistaken:.2f}")
    model.eval()
    with torch.no_grad():
        return (model(test_images).argmax(1) == test_labels).float().mean().item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    epochs = parser.parse_args().epochs
    print(f"without SANM: {train(epochs, sanm=False):.1%} of the test digits right")
    print(f"with SANM: {train(epochs, sanm=True):.1%} of the test digits right")
