"""A scene of Gaussians from pictures with known cameras: fit it, save it, film it.

python examples/splat_from_pictures.py            # a drawn still life
python examples/splat_from_pictures.py FOLDER     # a COLMAP model, transforms.json, or pictures with a trajectory
"""

import sys
from pathlib import Path

from mmkit.pointcloud.splats import FitConfig, drawn_scene, fit_images, load_posed_images, save_splats, turntable


def main(folder: str | None = None, config: FitConfig | None = None, output: Path = Path()) -> None:
    """Fit, save, film."""
    pictures = load_posed_images(folder, longest=256) if folder else drawn_scene(24, 128)
    fitted, held_out = pictures.split()  # every eighth picture is kept to judge by
    result = fit_images(fitted, config, held_out=held_out)  # about a minute for the still life
    print(f"{len(result.model)} Gaussians; PSNR of pictures it has not seen: {result.scores['psnr']:.1f} dB")
    print(
        save_splats(result.model, output / "scene.ply")
    )  # .splat, .spz, .sog and .glb are smaller or for other viewers
    print(turntable(result.model, output / "scene.mp4"))


if __name__ == "__main__":
    main(*sys.argv[1:2])
