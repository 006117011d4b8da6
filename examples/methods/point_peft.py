"""Point-PEFT: three new classes from five scans each, on a frozen point cloud transformer.

python examples/methods/point_peft.py cloud.png
"""

import sys

import mmkit
from mmkit import load_weights
from mmkit.data.drawn.shapes import ProceduralShapes
from mmkit.pointcloud.point_peft import adapt_few_shot


def main(picture: str = "point_peft.png", steps: int = 60) -> None:
    """Teach, test on scans that were not shown, and look at one cloud's parts."""
    few, unseen = (ProceduralShapes(s, "scan", 5, 256, ("chair", "mug", "plane")) for s in ("few", "unseen"))
    examples = {kind: [few[i + 3 * j][0] for j in range(5)] for i, kind in enumerate(few.classes)}
    taught = adapt_few_shot(load_weights("point_mae_nano"), examples, steps=steps)
    right = sum(int(taught.predict(cloud[None]).argmax()) == int(label) for cloud, label in unseen)
    print(f"{right} of {len(unseen)} unseen scans right, {taught.adapter.num_parameters()} parameters")
    mmkit.pipeline("point-cloud-segmentation")(unseen[0][0]).plot().save(picture)


if __name__ == "__main__":
    main(*sys.argv[1:2])
