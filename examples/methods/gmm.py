"""Gaussian mixture masks: how far one attention head of a small ViT looks, and what it looks at with and without its mask.

python examples/methods/gmm.py masks.png
"""

import sys

import numpy as np

import mmkit
from mmkit.data.drawn.pictures import draw


def main(picture: str = "gmm.png") -> None:
    """Look at head 2 of layer 1, with a mask twice as wide."""
    explorer = mmkit.pipeline("mask-explorer")
    view = explorer(draw("star", np.random.default_rng(0)), layer=1, head=2, sigma_scale=2.0)
    view.plot().save(picture)


if __name__ == "__main__":
    main(*sys.argv[1:2])
