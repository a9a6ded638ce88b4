"""A researcher's script: a rule and a student of one's own, pictures, an accuracy."""

import patchbloom
from torch import nn, optim


def most_contrast(seen, losses, count):
    return seen.std(axis=(1, 2, 3)).argsort()[::-1][:count]


core = patchbloom.select("data", ipc=1, rule=most_contrast, out="mine")
core.show().save("patches.png")
for rho in (0.4, 0.8):
    for number, image in enumerate(core.expand("star", 0, variants=8, rho=rho)):
        image.save(f"star-{rho}-{number}.png")
core.close()
layers = [nn.Conv2d(3, 16, 5, 2), nn.ReLU(), nn.Conv2d(16, 32, 5, 2), nn.ReLU()]
student = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, len(core)))
optimizer = optim.AdamW(student.parameters(), lr=3e-3)
with core.loader(batch=20, epochs=2, targets="hard", backend="eager") as loader:
    for _ in range(loader.epochs):
        for images, labels in loader:
            loss = nn.functional.cross_entropy(student(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
accuracy = patchbloom.evaluate(student, "data", size_px=64)
print(f"{accuracy:.1f} % with {core.bytes()['patches']} bytes of patches")
