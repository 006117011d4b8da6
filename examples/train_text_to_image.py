"""Train and bundle the text-to-image model of the drawn world and its judge, on one core in about an hour.

    python examples/train_text_to_image.py --work scenes --bundle

Two stages, each resumable: the judge (a classifier), and the denoiser with its text encoder, the painter. Everything is drawn by
`mmkit.data.drawn`: scenes with captions, and heaps of ellipses on which the judge learns to see no shape. Called again, the command
goes on where it stopped; `--only judge` runs one stage.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from mmkit.data.drawn.scenes import ATTRIBUTES, caption, draw_scenes, random_scenes
from mmkit.training import FitConfig, FitResult, fit
from mmkit.weights import WeightEntry, bundle

PICTURES = 15_000
"""Scenes that the painter learns from."""


class Drawn(IterableDataset[tuple[Tensor, ...]]):
    """Examples that a function draws in chunks, without end."""

    def __init__(self, draw, seed: int) -> None:  # type: ignore[no-untyped-def]
        self.draw, self.seed = draw, seed

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            yield from zip(*self.draw(256, generator), strict=True)


def ellipses(batch: int, generator: torch.Generator, size: int = 32, count: int = 14) -> Tensor:
    """Heaps of ellipses `(B, 3, size, size)` in random colors, with a little noise: edges and flat parts like in photographs."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(batch, *shape, generator=generator) * (high - low) + low

    axis = torch.linspace(-1, 1, size)
    picture = uniform(0, 1, 3, 1, 1).expand(-1, -1, size, size)
    for _ in range(count):
        x, y = axis[None, None, :] - uniform(-1, 1, 1, 1), axis[None, :, None] - uniform(-1, 1, 1, 1)
        angle = uniform(0, 3.2, 1, 1)
        u, v = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
        level = (u / uniform(0.1, 0.9, 1, 1)).square() + (v / uniform(0.1, 0.9, 1, 1)).square()
        cover = ((1 - level) * uniform(1, 8, 1, 1)).clamp(0, 1)[:, None]
        picture = picture * (1 - cover) + (uniform(0, 1, 3, 1, 1) + x[:, None] * uniform(-0.2, 0.2, 3, 1, 1)) * cover
    return (picture + torch.randn(picture.shape, generator=generator) * uniform(0, 0.04, 1, 1, 1)).clamp(0, 1)


def scenes_and_labels(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Examples for the judge: one in five is no scene, and has "none" as shape and color and no other answer."""
    size = (24, 24, 32, 48)[int(torch.randint(4, (), generator=generator))]
    scenes = random_scenes(batch, generator)
    labels = torch.stack([getattr(scenes, name) for name in ATTRIBUTES], 1)
    labels[scenes.count > 0, 5] = -1  # several objects lie around the centre
    pictures = draw_scenes(scenes, generator, size)
    bad = batch // 5
    heaps = ellipses(bad, generator, size, count=6)
    empty = draw_scenes(random_scenes(bad, generator), generator, size)[:, :, :1, :1].expand(-1, -1, size, size)
    soft = F.interpolate(F.avg_pool2d(pictures[:bad], size // 4), (size, size), mode="bilinear")
    kinds = torch.stack([heaps, empty, soft])[torch.randint(3, (bad,), generator=generator), torch.arange(bad)]
    pictures = torch.cat([kinds, pictures[bad:]])
    labels[:bad] = -1
    labels[:bad, 0], labels[:bad, 1] = len(ATTRIBUTES["shape"]), len(ATTRIBUTES["color"])
    gain = 1 + 0.1 * torch.randn(batch, 1, 1, 1, generator=generator)
    noise = torch.randn(pictures.shape, generator=generator) * 0.06 * torch.rand(batch, 1, 1, 1, generator=generator)
    blurred = torch.rand(batch, 1, 1, 1, generator=generator) < 0.3
    pictures = torch.where(blurred, F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1), pictures)
    pictures = F.interpolate((pictures * gain + noise).clamp(0, 1), (32, 32), mode="bilinear", antialias=True)
    order = torch.randperm(batch, generator=generator)
    return pictures[order], labels[order]


def train_judge(work: Path, seed: int) -> tuple[nn.Module, dict[str, float]]:
    """Train the judge; returns it, weights rounded, with how often it is right on fresh scenes."""
    from mmkit.diffusion.judge import SceneJudge, judge_loss

    torch.manual_seed(seed)
    judge = SceneJudge()
    config = FitConfig(
        max_steps=500,
        batch_size=64,
        lr=4e-3,
        warmup_steps=40,
        seed=seed,
        checkpoint_every=100,
        ema_decay=0.98,
        device="cpu",
    )
    result = fit(judge, Drawn(scenes_and_labels, seed), loss_fn=judge_loss, config=config, output_dir=work / "judge")
    require_end(result)
    return judge, read_rates(judge, seed)


def require_end(result: FitResult) -> None:
    """Leave after Ctrl-C or SIGTERM: half a training is neither measured nor bundled."""
    if result.stopped == "interrupted":
        raise SystemExit(f"Interrupted after {result.steps} steps; the same command goes on.")


def read_rates(judge: nn.Module, seed: int) -> dict[str, float]:
    """How often the judge is right on fresh scenes, its weights rounded as they are stored."""
    from mmkit.diffusion.judge import HEADS

    pictures, labels = scenes_and_labels(2000, torch.Generator().manual_seed(seed + 1000))
    with torch.no_grad():
        logits = half(judge)(pictures)
    reads = {}
    for i, name in enumerate(HEADS):
        told = labels[:, i] >= 0
        reads[name] = round(float((logits[name].argmax(1) == labels[:, i])[told].float().mean()), 3)
    reads["shape_always_the_commonest"] = round(float(labels[:, 0].bincount().max() / len(labels)), 3)
    print(reads)
    return reads


def captioned_pictures(tokenizer, pictures: int, seed: int) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    """Drawn scenes (N, 3, 24, 24) as bytes, and for each three captions as word numbers (N, 3, L)."""
    generator = torch.Generator().manual_seed(seed)
    drawn, ids = [], []
    for _ in range(0, pictures, 500):
        scenes = random_scenes(500, generator)
        drawn.append((draw_scenes(scenes, generator, 24) * 255).round().byte())
        told = [caption(scenes, generator, detail) for detail in (0.25, 0.5, 0.75)]
        ids.append(torch.stack([tokenizer(t, padding="max_length", return_tensors="pt").input_ids for t in told], 1))
    return torch.cat(drawn), torch.cat(ids)


class Captioned(IterableDataset[tuple[Tensor, Tensor]]):
    """Pictures in random order, each with one of its captions; one caption in ten is empty, for guidance."""

    def __init__(self, pictures: Tensor, ids: Tensor, empty: Tensor, seed: int) -> None:
        self.pictures, self.ids, self.empty, self.seed = pictures, ids, empty, seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            order = torch.randperm(len(self.pictures), generator=generator)
            which = torch.randint(self.ids.shape[1], order.shape, generator=generator)
            dropped = torch.rand(len(order), generator=generator) < 0.1
            words = torch.where(dropped[:, None], self.empty, self.ids[order, which])
            for i, row in zip(order.tolist(), words, strict=True):
                yield self.pictures[i], row


def train_painter(work: Path, seed: int, steps: int, minutes: float | None) -> tuple[nn.Module, int]:
    """Train denoiser and text encoder together; returns them with the steps taken."""
    from mmkit.diffusion.objective import Objective
    from mmkit.diffusion.scenes import scene_painter, scenes_pipeline

    torch.manual_seed(seed)
    painter = scene_painter()
    pipe = scenes_pipeline(painter)
    pictures, ids = captioned_pictures(pipe.tokenizer, PICTURES, seed)
    empty = pipe.tokenizer("", padding="max_length", return_tensors="pt").input_ids[0]
    objective = Objective.of(pipe.scheduler)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        clean, words = batch[0] / 127.5 - 1, batch[1]
        noise, t = torch.randn_like(clean), objective.timesteps(len(clean))
        answer = model(objective.noised(clean, noise, t), t, words[:, : int((words != 0).sum(1).max())])
        return (answer - objective.target(clean, noise, t)).square().mean()

    print(f"{sum(p.numel() for p in painter.parameters()):,} parameters", flush=True)
    config = FitConfig(
        max_steps=steps, batch_size=64, lr=2e-3, warmup_steps=100, weight_decay=0.01, seed=seed, checkpoint_every=200,
        ema_decay=0.996, device="cpu", max_seconds=None if minutes is None else 60 * minutes,
    )  # fmt: skip
    result = fit(
        painter, Captioned(pictures, ids, empty, seed), loss_fn=loss, config=config, output_dir=work / "painter"
    )
    require_end(result)
    return painter.eval(), result.steps


def obedience(pipe: Any, judge: Any, count: int, seed: int) -> dict[str, float]:
    """How often pictures show what their captions ask for, beside pictures drawn for them and pictures of other captions."""
    from mmkit.data.drawn.scenes import asked_scenes, read_caption
    from mmkit.diffusion import TextToImagePipeline

    generator = torch.Generator().manual_seed(seed)
    told = caption(random_scenes(2 * count, generator), generator)
    prompts = [text for text in told if {"shape", "color"} <= read_caption(text).keys()][:count]
    made = TextToImagePipeline(pipe)(prompts, seed=seed, batch_size=50).tensor()
    drawn = draw_scenes(asked_scenes(prompts, generator), generator, made.shape[-1])
    score = {f"{k}_right": v for k, v in judge.obedience(made, prompts).items()}
    score |= {f"{k}_of_drawn": v for k, v in judge.obedience(drawn, prompts).items() if k in ("shape", "color")}
    score |= {
        f"{k}_by_chance": v for k, v in judge.obedience(made.roll(1, 0), prompts).items() if k in ("shape", "color")
    }
    return {k: round(v, 3) for k, v in score.items()}


def half(model: Any) -> Any:
    """The model with its weights rounded as they are stored, for measuring."""
    model.load_state_dict({k: v.half().float() if v.is_floating_point() else v for k, v in model.state_dict().items()})
    return model.eval()


def main() -> None:
    """Run the stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("scenes"), help="folder for checkpoints")
    parser.add_argument("--only", choices=("judge", "painter"), help="run one stage; the painter alone is not measured")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=12_000, help="of the text-to-image model")
    parser.add_argument("--minutes", type=float, help="stop its training after so many, with what it has learned")
    parser.add_argument("--bundle", action="store_true", help="write both into mmkit/weights")
    args = parser.parse_args()
    command = f"python examples/train_text_to_image.py --steps {args.steps} --seed {args.seed} --bundle"
    common = {"config": {}, "license": "Apache-2.0", "seed": args.seed, "command": command}
    if args.only != "painter":
        judge, reads = train_judge(args.work, args.seed)
        if args.bundle:
            bundle(WeightEntry(model="scene_judge", score=reads, **JUDGE, **common), judge.state_dict())
    if args.only != "judge":
        painter, steps = train_painter(args.work, args.seed, args.steps, args.minutes)
    if args.only is None:
        from mmkit.diffusion.scenes import scenes_pipeline

        obeys = obedience(scenes_pipeline(half(painter)), judge, 500, args.seed + 2000)
        print(obeys)
        if args.bundle:
            data = f"{PICTURES:,} captioned scenes drawn by mmkit.data.drawn.scenes, {steps} steps of 64; 500 other captions to test"
            entry = WeightEntry(model="scene_painter", score=obeys, data=data, **PAINTER, **common)
            bundle(entry, painter.state_dict())


JUDGE: dict[str, Any] = {
    "name": "scene_judge",
    "summary": "Reads shape, color, texture, size, count, position and background off a drawn scene, or says that there is no clear shape. "
    "It knows nothing else: it measures text-to-image models of that world.",
    "data": "32,000 scenes drawn by mmkit.data.drawn.scenes at 24, 32 and 48 pixels, a fifth of them heaps of ellipses, blurs and empty "
    "grounds; 2,000 others of 48 pixels to test",
}
PAINTER: dict[str, Any] = {
    "name": "text_to_image_scenes",
    "summary": "Draws 24 x 24 pixel scenes of the words it knows: one to three circles, squares, triangles, crosses, rings or stars in six "
    "colors, plain, striped or dotted, small or large, on four grounds. A demonstration on which adapters show what they do; it knows "
    "nothing of the world, and one shape in twenty comes out wrong.",
}


if __name__ == "__main__":
    main()
