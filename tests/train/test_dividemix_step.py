"""One step of `sanm-dividemix` against section 7 of the method written down in plain torch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from sanm_kernels.reference import draws
from sanm_train import Batch
from sanm_train.train import build as build_run

HALF, SIDE, CLASSES = 16, 8, 10
TEMPERATURE, WARMUP, EPOCH = 0.5, 1, 5.25


def sharpen(p):
    p = p ** (1 / TEMPERATURE)
    return p / p.sum(1, keepdim=True)


def boxes_and_ratio(features, quality, config, uniform):
    """Both views' boxes (B, 4), y0, x0, y1, x1, and the ratio (B,) that they share."""
    energy = features.pow(2).sum(1)
    energy = energy / energy.flatten(1).norm(dim=1)[:, None, None]
    up = F.interpolate(energy[:, None], (SIDE, SIDE), mode="bilinear")[:, 0].flatten(1)
    area = config.ratio_low + (config.ratio_high - config.ratio_low) * uniform[:, 0]
    aspect = config.aspect_low + (config.aspect_high - config.aspect_low) * uniform[:, 1]
    ratio = area + config.ratio_gamma * (1 - quality.double())
    pixels = config.area_scale * ratio * SIDE * SIDE
    size = torch.stack([(pixels * aspect).sqrt(), (pixels / aspect).sqrt()], 1)
    size = size.round().long().clamp(1, SIDE)
    boxes = []
    for extreme in (up == up.max(1, keepdim=True).values, up == up.min(1, keepdim=True).values):
        place = extreme.int().argmax(1)  # the first of ties
        corner = torch.stack([place // SIDE, place % SIDE], 1)
        if config.position == "center":
            corner = corner - size // 2
        corner = torch.minimum(corner.clamp_min(0), SIDE - size)
        boxes.append(torch.cat([corner, corner + size], 1))
    return boxes, ratio.float()


def released_step(networks, k, views, labels, quality, config, state, lam_u):
    """Targets, boxes, masked views and losses of the step; views (6, 2B, C, H, W) are two for
    guessing, two auto- and two strongly augmented ones, the labelled half first."""
    network, other = networks[k], networks[1 - k]
    x, u = views[:, :HALF], views[:, HALF:]
    with torch.no_grad():
        z, features_u = network.forward_features(u[0])
        guesses = [z, network(u[1]), other(u[0]), other(u[1])]
        p_u = sharpen(torch.stack([z.softmax(1) for z in guesses]).mean(0))
        z, features_x = network.forward_features(x[0])
        p_x = torch.stack([z.softmax(1), network(x[1]).softmax(1)]).mean(0)
        q = quality[:HALF, None]
        p_x = sharpen(q * F.one_hot(labels[:HALF], CLASSES) + (1 - q) * p_x)
    targets, features = torch.cat([p_x, p_u]), torch.cat([features_x, features_u])

    source = torch.Generator()
    source.set_state(state)
    seed = torch.randint(0, 2**63 - 1, (), generator=source)
    uniform = draws.uniforms(config.num_draws(views.shape[2]), torch.arange(2 * HALF), seed)
    boxes, ratio = boxes_and_ratio(features, quality, config, uniform)
    rows = torch.arange(2 * HALF)
    largest = targets.argmax(1)
    drop = ratio if config.drop == "unclamped" else torch.minimum(ratio, targets[rows, largest])
    modulated = targets + drop[:, None] / (CLASSES - 1)
    modulated[rows, largest] = targets[rows, largest] - drop
    masked = []
    for v, box in enumerate(boxes):
        view = views[0].clone()
        for i, (y0, x0, y1, x1) in enumerate(box.tolist()):
            fill = uniform[i, 2 + v].float() if config.fill == "uniform" else 0.0
            view[i, :, y0:y1, x0:x1] = fill
        masked.append(view)
    logits, maps = network.forward_features(torch.cat(masked))
    del logits
    rebuilt = network.reconstruct(maps, views.shape[2:]).chunk(2)
    reconstruction = sum(F.mse_loss(r, views[0]) for r in rebuilt)

    kinds = [*views[2:], *masked]
    soft = [targets] * 4 + [modulated] * 2
    images = torch.cat([kind[:HALF] for kind in kinds] + [kind[HALF:] for kind in kinds])
    soft = torch.cat([t[:HALF] for t in soft] + [t[HALF:] for t in soft])
    lam = float(torch.distributions.Beta(4.0, 4.0).sample())
    lam = max(lam, 1 - lam)
    order = torch.randperm(len(images), generator=source)
    z = network(lam * images + (1 - lam) * images[order])
    soft = lam * soft + (1 - lam) * soft[order]
    first = len(kinds) * HALF
    l_x = -(soft[:first] * z[:first].log_softmax(1)).sum(1).mean()
    l_u = (z[first:].softmax(1) - soft[first:]).pow(2).mean()
    mean = z.softmax(1).mean(0)
    prior = (torch.full_like(mean, 1 / CLASSES) * (1 / CLASSES / mean).log()).sum()
    total = l_x + lam_u * l_u + prior + config.reconstruction_weight * reconstruction
    return {
        "targets": targets,
        "modulated": modulated,
        "boxes": boxes,
        "masked": masked,
        "loss": total,
        "labeled": l_x,
        "unlabeled": l_u,
        "prior": prior,
        "reconstruction": reconstruction,
    }


class Given:
    """An augmentation whose views are these tensors, one after the other."""

    def __init__(self, views):
        self.views = iter(views)

    def auto(self, images):
        return next(self.views)

    strong = auto


@pytest.mark.parametrize("mask", ["paper", "official-cifar"])
@pytest.mark.parametrize("frozen", [False, True], ids=["training", "frozen"])
def test_step_is_the_released_one(tiny, monkeypatch, mask, frozen):
    settings = {"weak_views": 2, "strong_views": 2, "warmup": WARMUP, "ramp": 16.0}
    made = build_run(tiny(recipe="sanm-dividemix", mask=mask, **settings)).recipe
    torch.manual_seed(3)
    views = torch.rand(6, 2 * HALF, 1, SIDE, SIDE)
    labels, quality = torch.randint(CLASSES, (2 * HALF,)), torch.rand(2 * HALF)
    index = torch.arange(2 * HALF)
    batch = Batch(views[0], labels, quality, index, index)
    for network in made.networks:
        # On 256 levels rounding decides where the peak is; the golden cases hold that to the bit.
        network.mask_config = network.mask_config.replace(quantize=False)
    networks = copy.deepcopy(made.networks)
    for pair in (made.networks, networks):
        pair[0].eval()
        pair[1].train(not frozen)
    made.divided = [True, True]
    monkeypatch.setattr(made, "augment", Given(views))
    found = {}

    def recorded(name, whole):
        def call(*arguments, **options):
            found[name] = whole(*arguments, **options)
            return found[name]

        return call

    monkeypatch.setattr(made, "guess", recorded("guess", made.guess))
    network = made.networks[1]
    monkeypatch.setattr(network, "mask", recorded("mask", network.mask))

    state = made.generator.get_state()
    torch.manual_seed(11)
    losses = made.loss(network, batch, EPOCH)
    losses["loss"].backward()
    torch.manual_seed(11)
    lam_u = made.config.unlabeled_weight * (EPOCH - WARMUP) / 16
    wanted = released_step(networks, 1, views, labels, quality, network.mask_config, state, lam_u)
    wanted["loss"].backward()

    masked = found["mask"]
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found["guess"][0], wanted["targets"], **close)
    for k, name in enumerate(("max", "min")):
        assert torch.equal(getattr(masked, f"box_{name}").long(), wanted["boxes"][k])
        torch.testing.assert_close(getattr(masked, f"targets_{name}"), wanted["modulated"], **close)
        assert torch.equal(getattr(masked, f"images_{name}"), wanted["masked"][k])
    for name, value in losses.items():
        torch.testing.assert_close(value.detach(), wanted[name].detach(), **close)
    gradients = {}
    for theirs, ours in zip(networks, made.networks, strict=True):
        for (name, a), b in zip(theirs.named_parameters(), ours.parameters(), strict=True):
            if a.grad is None:  # of the network that only guesses
                assert b.grad is None and theirs is networks[0]
                continue
            gradients[name] = ((a.grad - b.grad).norm() / a.grad.norm().clamp_min(1e-3)).item()
        for (name, a), b in zip(theirs.named_buffers(), ours.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)
    off = (found["guess"][0] - wanted["targets"]).abs().max()
    print(f"targets {off:.1e}, gradients {max(gradients.values()):.1e} of their norm")
    assert max(gradients.values()) < 1e-4, gradients
    batches = [b for n, b in network.named_buffers() if n.endswith("num_batches_tracked")]
    assert batches and all(int(b) == (0 if frozen else 6) for b in batches)
