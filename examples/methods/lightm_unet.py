"""LightM-UNet: nuclei in a drawn micrograph, counted and outlined, without nvcc.

python examples/methods/lightm_unet.py nuclei.png
"""

import sys

import mmkit
from mmkit.data.drawn.scans import sample_picture


def main(picture: str = "lightm_unet.png") -> None:
    """Segment, measure, save; .nii.gz and .json work as well."""
    cells, truth = sample_picture(seed=7)
    result = mmkit.pipeline("medical-segmentation", "lightm_unet_nuclei")(cells)
    for measure in result.measures():
        print(measure)
    print(f"Dice {2 * (result.mask & truth).sum() / (result.mask.sum() + truth.sum()):.3f}")
    result.plot().save(picture)


if __name__ == "__main__":
    main(*sys.argv[1:2])
