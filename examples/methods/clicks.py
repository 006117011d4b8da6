"""Clicks: three clicks, then a box, on a photograph; SAM 2, SqueezeSAM or any function can stand behind the same session.

python examples/methods/clicks.py mask.png
"""

import sys

import numpy as np
from PIL import Image

import mmkit


def main(picture: str = "clicks.png") -> None:
    """Click on what a public-domain photograph shows (Grace Hopper, of matplotlib's sample data)."""
    import matplotlib.cbook

    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        photo = Image.open(file).convert("RGB")
    segmenter = mmkit.pipeline("interactive-segmentation")
    segmenter.set_image(photo)
    person = segmenter.add_click(250, 180)
    segmenter.add_click(260, 520)  # the jacket as well
    mask = segmenter.add_click(60, 60, positive=False)  # not the flag
    print(f"{person.binary.mean():.0%} of the picture after one click, {mask.binary.mean():.0%} after three")
    (cap,) = segmenter.predict_many([{"box": (120, 20, 400, 130)}])
    shown = [np.asarray(m.plot().convert("RGB")) for m in (person, mask, cap)]
    Image.fromarray(np.concatenate(shown, axis=1)).resize((900, 351)).save(picture)


if __name__ == "__main__":
    main(*sys.argv[1:2])
