"""Hier-SLAM: the path of a depth camera through a drawn room, and a map of it with labels.

python examples/methods/hier_slam.py path.png
"""

import sys

import numpy as np
from PIL import Image

import mmkit
from mmkit.pointcloud.slam import SyntheticRoom


def main(picture: str = "hier_slam.png", frames: int = 12) -> None:
    """Follow, report, and show the last frame beside what the map says is there."""
    room = SyntheticRoom(frames=frames, width=96, height=72)
    result = mmkit.pipeline("semantic-slam")(room)
    print({key: round(result.report[key], 3) for key in ("ate_rmse", "psnr", "miou")})
    seen = result.slam.render(result.slam.poses[-1], room[frames - 1].K, (96, 72))
    palette = np.random.default_rng(3).integers(60, 255, (256, 3))
    shown = (room[frames - 1].color, 255 * seen.rgb.clamp(0, 1), palette[seen.labels.numpy() % 256])
    row = np.concatenate([np.asarray(part).astype(np.uint8) for part in shown], axis=1)
    Image.fromarray(row).resize((864, 216), Image.Resampling.NEAREST).save(picture)


if __name__ == "__main__":
    main(*sys.argv[1:2])
