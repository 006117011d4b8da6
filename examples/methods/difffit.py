"""DiffFit: a text-to-image model takes on a style by 18 thousand numbers; the same words and seeds before and after.

python examples/methods/difffit.py night.png
"""

import sys
import tempfile

import numpy as np
from PIL import Image

import mmkit
from mmkit.diffusion import draw_domain, finetune

WORDS = ["a large red circle", "two blue stars on a white background", "a yellow ring", "a striped green square"]


def main(picture: str = "difffit.png", steps: int = 150) -> None:
    """Twenty seconds on one core; half of the strength is between the two."""
    draw = mmkit.pipeline("text-to-image")
    rows = [draw(WORDS, seed=3).plot(columns=4)]
    with tempfile.TemporaryDirectory() as folder:
        finetune(draw_domain("night", 40), adapter="difffit", max_steps=steps, output_dir=folder)
        draw.load_adapter("night", f"{folder}/adapter")
    rows += [draw(WORDS, seed=3, strengths={"night": share}).plot(columns=4) for share in (0.5, 1.0)]
    Image.fromarray(np.concatenate([np.asarray(row.convert("RGB")) for row in rows])).save(picture)


if __name__ == "__main__":
    main(*sys.argv[1:2])
