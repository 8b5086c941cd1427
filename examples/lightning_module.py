"""SANM as a `lightning.LightningModule`, on the digits and the network of plain_loop.py.

Works on one device and with DDP (`--devices 2`): then every rank takes the losses of its share of
the training set, and one mixture is fitted to all of them. Does not work with strategies that cut
parameters into shards (FSDP, DeepSpeed stage 3), since label quality runs the network outside of
`training_step`, nor with training sets that have no length.
"""

import argparse

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import sanm_kernels as sk
from plain_loop import CONFIG, WARMUP, noisy_digits, small_cnn
from sanm_train import SANM, Batch


class SANMClassifier(L.LightningModule):
    """A classifier trained with SANM.

    Batches to train on are (images, labels, index), index being the samples' positions in the
    training set; those to validate on are (images, labels).

    Args:
        network: maps images (B, C, H, W) to logits (B, K).
        feature_layer: the name of its module that gives the last feature map.
        image_shape: (C, H, W).
        warmup: epochs in which every label counts as right.
    """

    def __init__(
        self,
        network: nn.Module,
        feature_layer: str,
        image_shape: tuple[int, int, int],
        warmup: int = WARMUP,
    ) -> None:
        super().__init__()
        self.sanm = SANM(network, feature_layer, config=CONFIG, image_shape=image_shape)
        self.warmup = warmup

    def forward(self, images: Tensor) -> Tensor:
        return self.sanm(images)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)

    def on_train_epoch_start(self) -> None:
        """Refit the label quality of all training samples to their losses in eval mode."""
        data = self.trainer.train_dataloader.dataset
        if self.current_epoch < self.warmup:
            self.clean_prob = torch.ones(len(data), device=self.device)
            return
        own = slice(self.global_rank, None, self.trainer.world_size)  # each sample on one rank
        loader = DataLoader(Subset(data, range(len(data))[own]), batch_size=512)
        self.sanm.eval()
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            losses = [
                sk.sample_loss(self(images.to(self.device, self.dtype)), labels.to(self.device))
                for images, labels, _ in loader
            ]
        self.sanm.train()
        group = dist.group.WORLD if self.trainer.world_size > 1 else None
        fit = sk.fit_label_quality(torch.cat(losses), process_group=group)
        clean_prob = torch.zeros(len(data), device=self.device)
        clean_prob[own] = fit.clean_prob
        self.clean_prob = self.trainer.strategy.reduce(clean_prob, reduce_op="sum")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels, index = batch
        loss = self.sanm.losses(Batch(images, labels, self.clean_prob[index], index)).total
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        hits = (self(images).argmax(1) == labels).float()
        self.log("val_accuracy", hits.mean(), sync_dist=True, batch_size=len(hits))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--precision", default="32-true")
    arguments = parser.parse_args()
    L.seed_everything(0, verbose=False)

    images, labels, wrong, test_images, test_labels = noisy_digits()
    train = TensorDataset(images, labels, torch.arange(len(labels)))
    trainer = L.Trainer(
        max_epochs=arguments.epochs,
        accelerator=arguments.accelerator,
        devices=arguments.devices,
        precision=arguments.precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = SANMClassifier(small_cnn(), feature_layer="0", image_shape=(1, 8, 8))
    trainer.fit(
        model,
        DataLoader(train, batch_size=64, shuffle=True),
        DataLoader(TensorDataset(test_images, test_labels), batch_size=512),
    )
    if trainer.is_global_zero:
        quality = model.clean_prob.cpu()
        right, mistaken = quality[~wrong].mean(), quality[wrong].mean()
        print(f"label quality: right labels {right:.2f}, wrong labels {mistaken:.2f}")
        print(f"validation accuracy: {trainer.callback_metrics['val_accuracy']:.1%}")


if __name__ == "__main__":
    main()
