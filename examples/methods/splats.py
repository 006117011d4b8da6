"""Gaussian splats: a scene from 24 pictures with known cameras, seen from where no picture was taken.

python examples/methods/splats.py view.png
"""

import sys
import tempfile

import numpy as np
from PIL import Image

import mmkit
from mmkit.pointcloud.splats import FitConfig, drawn_scene, fit_images, save_splats


def main(picture: str = "splats.png", steps: int = 1000) -> None:
    """Half a minute on one core; colors beside depths."""
    fitted, held_out = drawn_scene(24, 96).split()
    result = fit_images(fitted, FitConfig(steps=steps, start_gaussians=1500), held_out=held_out)
    print(len(result.model), "Gaussians;", result.scores)
    with tempfile.TemporaryDirectory() as folder:
        view = mmkit.pipeline("novel-view", save_splats(result.model, f"{folder}/scene.ply"))(azimuth=40, elevation=25)
    parts = (view.plot(), view.depth_image())
    Image.fromarray(np.concatenate([np.asarray(part.convert("RGB")) for part in parts], axis=1)).save(picture)


if __name__ == "__main__":
    main(*sys.argv[1:2])
