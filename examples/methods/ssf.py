"""SSF: a small ViT learns handwritten digits by scales and shifts, which then fold into its weights.

python examples/methods/ssf.py digits.png
"""

import sys

import numpy as np
import torch
from PIL import Image

from mmkit import FitConfig, apply_adapter, create_backbone, fit
from mmkit.data import load_digits
from mmkit.data.transforms import ImageTransform


def main(picture: str = "ssf.png", epochs: int = 6) -> None:
    """Train, fold, and show what was read in 40 pictures it has not seen; wrong ones in red."""
    torch.manual_seed(0)
    model = create_backbone("tiny_vit", num_classes=10)
    adapter = apply_adapter(model, "ssf", modules_to_save=("head",))
    digits = load_digits().with_transform(ImageTransform(32))
    train, unseen = digits.subset(range(1000)), digits.subset(range(1500, 1540))
    config = FitConfig(epochs=epochs, batch_size=64, lr=2e-2, progress=False)
    print(fit(model, train, unseen, config=config, adapter=adapter).metrics, adapter.num_parameters(), "parameters")
    adapter.merge()  # the same network as before, with other weights
    images = torch.stack([image for image, _ in unseen])
    labels = np.array([label for _, label in unseen])
    with torch.no_grad():
        wrong = model.eval()(images).argmax(1).numpy() != labels
    low, high = images.amin(), images.amax()
    shown = (255 * (images - low) / (high - low)).byte().permute(0, 2, 3, 1).numpy()
    shown[wrong, ..., 1:] //= 3
    rows = [np.concatenate(list(row), axis=1) for row in shown.reshape(4, 10, *shown.shape[1:])]
    Image.fromarray(np.concatenate(rows)).resize((640, 256), Image.Resampling.NEAREST).save(picture)


if __name__ == "__main__":
    main(*sys.argv[1:2])
