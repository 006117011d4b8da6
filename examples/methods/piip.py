"""PIIP: what two branches of a pyramid tell each other about one picture, and what the pyramid costs.

python examples/methods/piip.py pyramid.png
"""

import sys

import mmkit
from mmkit.data.drawn.scans import sample_picture
from mmkit.vision.piip import PIIP, BranchConfig, PIIPConfig, compare


def main(picture: str = "piip.png") -> None:
    """Count first, then look."""
    sizes = PIIPConfig((BranchConfig("tiny_vit", 64), BranchConfig("tiny_vit", 128)), num_heads=8)
    for name, (macs, _) in compare(PIIP(sizes, num_classes=10)).items():
        print(f"{name}: {macs / 1e9:.2f} G multiply-adds")
    found = mmkit.pipeline("semantic-segmentation")(sample_picture(seed=3)[0])  # the bundled pyramid knows nuclei
    found.plot().save(picture)


if __name__ == "__main__":
    main(*sys.argv[1:2])
