"""SANM in the loop of timm's training script: its optimisers, schedules, scaler, averaged weights.
Lines that end with `# SANM` are added or changed."""

import timm.utils
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch.utils.data import DataLoader

from digits import CONFIG, noisy_digits, options, report, small_cnn
from sanm_train import SANM, Indexed, LabelQualityTracker  # SANM

epochs, seed = vars(options(__doc__)).values()
train, test, wrong = noisy_digits(seed)
loader = DataLoader(Indexed(train), batch_size=64, shuffle=True)  # SANM
model = SANM(small_cnn(), "0", config=CONFIG, image_shape=(1, 8, 8))  # SANM
quality = LabelQualityTracker(len(train), warmup=10)  # SANM
optimizer = create_optimizer_v2(model, opt="sgd", lr=0.02, momentum=0.9, weight_decay=5e-4)
schedule, epochs = create_scheduler_v2(
    optimizer, sched="step", num_epochs=epochs, decay_epochs=round(0.75 * epochs), warmup_epochs=0
)
loss_scaler = timm.utils.NativeScaler(device="cpu")
averaged = timm.utils.ModelEmaV3(model, decay=0.99)

for epoch in range(epochs):
    losses_m = timm.utils.AverageMeter()
    model.train()
    quality.refit()  # SANM
    for images, labels, index in loader:  # SANM
        losses = quality.losses(model, images, labels, index)  # SANM
        optimizer.zero_grad()
        loss_scaler(losses.total, optimizer, parameters=model.parameters())  # SANM
        averaged.update(model)
        losses_m.update(losses.total.item(), len(images))
    schedule.step(epoch + 1, losses_m.avg)

report(averaged.module, test, quality.clean_prob, wrong)
