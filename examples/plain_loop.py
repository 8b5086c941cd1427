"""SANM in an ordinary PyTorch training loop. Lines that end with `# SANM` are added or changed."""

from torch.utils.data import DataLoader

from digits import CONFIG, noisy_digits, options, report, sgd, small_cnn
from sanm_train import SANM, Indexed, LabelQualityTracker  # SANM

epochs, seed = vars(options(__doc__)).values()
train, test, wrong = noisy_digits(seed)
loader = DataLoader(Indexed(train), batch_size=64, shuffle=True)  # SANM
model = SANM(small_cnn(), "0", config=CONFIG, image_shape=(1, 8, 8))  # SANM
quality = LabelQualityTracker(len(train), warmup=10)  # SANM
optimizer, schedule = sgd(model, epochs)

for _ in range(epochs):
    model.train()
    quality.refit()  # SANM
    for images, labels, index in loader:  # SANM
        losses = quality.losses(model, images, labels, index)  # SANM
        optimizer.zero_grad()
        losses.total.backward()  # SANM
        optimizer.step()
    schedule.step()

report(model, test, quality.clean_prob, wrong)
