"""Erase two concepts from the bundled text-to-image model, one membrane each, and compare the same seeds: a minute on one core.

    python examples/erase_concepts.py --output runs/erased

For a model of your own give `erase` a diffusers pipeline or its folder, the phrases, and prompts that must stay as they are:
`erase("my_pipeline/", "snoopy", keep=["a dog", "a beagle"], templates=expand_prompts("object"), output_dir="runs/snoopy")`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mmkit.diffusion import TextToImagePipeline
from mmkit.diffusion.spm import ConceptEraser, erase, export_lora, scene_rates, scene_recipe

PROMPTS = ["a red circle", "a blue circle", "a red square", "a green triangle", "a yellow ring", "two purple stars"]


def main() -> None:
    """Train, measure, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", nargs="+", default=["circle", "red"])
    parser.add_argument("--output", type=Path, default=Path("runs/erased"))
    parser.add_argument("--steps", type=int, help="of training; default: what each concept wants")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    draw = TextToImagePipeline()
    draw(PROMPTS, seed=1).save(args.output / "before.png")
    for word in args.concepts:
        more = {} if args.steps is None else {"max_steps": args.steps}
        done = erase(draw, **scene_recipe(word, **more), output_dir=args.output)
        export_lora(done.adapters[word], args.output / f"{word}_lora.safetensors")  # read by load_lora
        print(f"{word}: {scene_rates(draw, word)}.")

    careful = ConceptEraser(draw.pipe, calibrate=True)  # every prompt with its own strengths
    for prompt in PROMPTS:
        opened = ", ".join(f"{name} {value:.2f}" for name, value in careful.permeability(prompt).items())
        print(f"{prompt}: {opened}")
    careful(PROMPTS, seed=1).save(args.output / "after.png")


if __name__ == "__main__":
    main()
