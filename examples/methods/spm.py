"""SPM: a text-to-image model forgets circles, from prompts alone; what else it draws stays. No lock: see docs/methods/erasure.md.

python examples/methods/spm.py forgotten.png
"""

import sys

import numpy as np
from PIL import Image

import mmkit
from mmkit.diffusion.spm import ConceptEraser, erase, scene_rates, scene_recipe

WORDS = ["a red circle", "two blue circles", "a red square", "a yellow ring"]


def main(picture: str = "spm.png", steps: int = 150) -> None:
    """The same words and seeds before (above) and after; each prompt opens the membrane as far as it is near a circle."""
    draw = mmkit.pipeline("text-to-image")
    rows = [draw(WORDS, seed=1).plot(columns=4)]
    erase(draw, **scene_recipe("circle", max_steps=steps))
    print(scene_rates(draw, "circle"))
    careful = ConceptEraser(draw.pipe, calibrate=True)
    rows.append(careful(WORDS, seed=1).plot(columns=4))
    Image.fromarray(np.concatenate([np.asarray(row.convert("RGB")) for row in rows])).save(picture)


if __name__ == "__main__":
    main(*sys.argv[1:2])
