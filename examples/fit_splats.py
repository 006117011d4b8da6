"""Fit the drawn still life and, with --bundle, make it the scene that `mmkit.pipeline("novel-view")` shows by default.

python examples/fit_splats.py --output still_life.ply
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mmkit.pointcloud.splats import FitConfig, GaussianModel, drawn_scene, fit_images, save_splats
from mmkit.pointcloud.splats.training import measure
from mmkit.weights import WeightEntry, bundle

NAME = "splat_still_life"


def main() -> None:
    """Fit, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("still_life.ply"))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--state", type=Path, help="folder that lets an interrupted fit continue")
    parser.add_argument("--bundle", action="store_true")
    args = parser.parse_args()
    fitted, held = drawn_scene(24, 128).split()
    config = FitConfig(
        steps=args.steps, start_gaussians=1500, max_gaussians=5000, sh_degree=1, ssim=0.0, rate=4.0, noise=0.3
    )
    result = fit_images(fitted, config, held_out=held, output_dir=args.state)
    print(f"{len(result.model)} Gaussians, {result.seconds:.0f} s, held out: {result.scores}")
    save_splats(result.model, args.output)
    if args.bundle:
        tensors = {k: v.half().float() for k, v in result.model.tensors().items()}
        rounded = GaussianModel.from_tensors(tensors)
        score = {f"held-out {k}": round(v, 3) for k, v in measure(rounded, held).items()}
        entry = WeightEntry(
            name=NAME, model="GaussianModel", config={"num_gaussians": len(rounded), "sh_degree": 1},
            summary="A still life of five balls on a disc as Gaussians; a scene to look at, not a network.", license="Apache-2.0",
            command=f"python examples/fit_splats.py --steps {args.steps} --bundle",
            data="24 pictures of 128 pixels by mmkit.data.drawn.solids", seed=0, score=score,
        )  # fmt: skip
        print(bundle(entry, tensors))


if __name__ == "__main__":
    main()
