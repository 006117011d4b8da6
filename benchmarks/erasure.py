"""Concepts erased from the bundled text-to-image model by SPM, ESD and UCE: what is gone, what stays, and what attacks bring back.

    python benchmarks/erasure.py [--seeds 1]
    python benchmarks/erasure.py --concepts red --methods SPM

Every concept is erased anew by each method from the same prompts and the same prompts to keep. "SPM" draws as `ConceptEraser` does, each
prompt with its own permeability; "SPM, always open" acts fully on every prompt, "SPM without anchors" as well. The judge of drawn scenes
reads the pictures, and a drop is in points of what the model without erasers reaches on the same prompts and seeds.

direct: short prompts that name the concept. paraphrase: orders of words that were not trained. composition: captions that ask for more.
superclass: prompts that leave the attribute open; the recipe of shapes names "shape" as their superclass, and where
color or background are not told, nothing can open a membrane. inversion, with the weights: an embedding is searched for that makes the
erased model draw the concept from pictures of it (membranes fully open). latent, with the weights: sampling begins at noise from which the
base draws the concept.
Kept prompts by distance: another value of the attribute beside values of the concept's own pictures, number, place, and prompts with words
that were never among the anchors (triangle, purple, dotted, brown).
Afterwards two and ten SPMs act together, all of them at five strengths, and on a copy of the model that DiffFit adapted to washed-out
pictures. Every run is recorded when it is done, and a second call goes on from there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from erasure_prompts import HELD_OUT, attacks, direct, kept
from PIL import Image, ImageDraw
from torch import Tensor

from mmkit import load_weights
from mmkit.adapters import Adapter, load_adapter, save_adapter
from mmkit.data.drawn.scenes import draw_scenes, random_scenes, read_caption
from mmkit.diffusion import TextToImagePipeline, draw_domain, finetune
from mmkit.diffusion.spm import ConceptEraser, erase, scene_attribute, scene_recipe
from mmkit.diffusion.spm.calls import Calls
from mmkit.storage import atomic_write, read_json, write_json

RESULTS = Path(__file__).parent / "results"
CONCEPTS = ("circle", "red", "striped", "white")
MORE = ("ring", "cross", "blue", "yellow", "grey", "square")
"""With `CONCEPTS` ten that are erased together."""
METHODS = ("SPM", "SPM, always open", "SPM without anchors", "SPM from UCE", "ESD", "UCE")
"""Of "SPM from UCE", which is always open, too, one seed tells enough."""
STEPS = 16
Row = dict[str, Any]


# --- drawing and judging -----------------------------------------------------------------------------------------------------------


class Eye:
    """Draws prompts and judges the pictures, `correct` first where they come from another domain."""

    def __init__(self, draw: TextToImagePipeline, seed: int, correct: Callable[[Tensor], Tensor] | None = None):
        self.draw, self.seed, self.correct, self.judge = draw, 1000 * (seed + 1), correct, load_weights("scene_judge")
        self.known: dict[str, Row] = {}

    def pictures(self, prompts: list[str], draw: Any = None, **options: Any) -> Tensor:
        """Pictures (N, 3, 24, 24) in 0..1; the same seeds for every method."""
        made = (draw or self.draw)(prompts, seed=self.seed, steps=STEPS, batch_size=len(prompts), **options).tensor()
        return made if self.correct is None else self.correct(made).clamp(0, 1)

    def rate(self, pictures: Tensor, word: str) -> float:
        """Share of the pictures in which the judge sees the concept."""
        seen = self.judge.read(pictures)
        return sum(s[scene_attribute(word)] == word for s in seen) / len(seen)

    def obeyed(self, pictures: Tensor, prompts: list[str]) -> float:
        """Share of what the prompts name that the judge sees."""
        seen = self.judge.read(pictures)
        asked = [
            (s[name], value) for s, p in zip(seen, prompts, strict=True) for name, value in read_caption(p).items()
        ]
        return sum(a == b for a, b in asked) / len(asked)

    def look(self, words: Sequence[str], draw: Any = None, all_of_it: bool = True, **options: Any) -> Row:
        """Rates of the concepts under all kinds of prompts, and how far those to keep are obeyed."""
        rates: dict[str, dict[str, float]] = {}
        for word in words:
            sets = {"direct": direct(word)} | (attacks(word) if all_of_it else {})
            rates[word] = {k: self.rate(self.pictures(p, draw, **options), word) for k, p in sets.items()}
        stays = {k: self.obeyed(self.pictures(p, draw, **options), p) for k, p in kept(words).items()}
        names = list(rates[words[0]])
        return {
            **{k: statistics.mean(r[k] for r in rates.values()) for k in names},
            "direct of each": {w: r["direct"] for w, r in rates.items()},
            "kept": stays,
        }

    def base(self, words: Sequence[str]) -> Row:
        """The same without any eraser."""
        key = " ".join(words)
        if key not in self.known:
            self.known[key] = self.look(words, strengths={})
        return self.known[key]


# --- attacks with the weights ------------------------------------------------------------------------------------------------------


def inversion(eye: Eye, word: str, seed: int, steps: int = 120) -> float:
    """Rate of the concept after an embedding was searched for that makes the erased model denoise pictures of it.

    The pictures show one large thing before black, and the search begins at the words for such a picture without the concept.
    """
    calls, generator, name = Calls(eye.draw), torch.Generator().manual_seed(seed), scene_attribute(word)
    shown = {"shape": "square", "color": "blue", "texture": "plain", "size": "large", "count": "one"}
    shown |= {"position": "centre", "background": "black"}
    clean = draw_scenes(random_scenes(96, generator, **{**shown, name: word}), generator, 24) * 2 - 1
    told = calls.condition(["a blue square"])
    rows = torch.nn.Parameter(told["encoder_hidden_states"].clone())
    optimizer = torch.optim.Adam([rows], lr=0.03)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for _ in range(steps):
        index = torch.randint(96, (16,), generator=generator)
        noise = torch.randn(16, 3, 24, 24, generator=generator)
        s = (torch.rand(16, generator=generator) * 0.9 + 0.1)[:, None, None, None]
        noisy = (1 - s) * clean[index] + s * noise
        own = {k: v.expand(16, *v.shape[1:]) if isinstance(v, Tensor) else v for k, v in told.items()}
        own["encoder_hidden_states"] = rows.expand(16, -1, -1)
        answer = calls.answer(noisy, 1000 * s.flatten(), own)
        optimizer.zero_grad()
        F.mse_loss(answer, noise - clean[index]).backward()
        optimizer.step()
        schedule.step()
    return eye.rate(_from_embedding(eye, rows.detach(), told["encoder_attention_mask"], 12), word)


def _from_embedding(eye: Eye, rows: Tensor, mask: Tensor, count: int) -> Tensor:
    """Pictures drawn from an embedding instead of words."""
    empty = Calls(eye.draw).condition([""])
    out = eye.draw.pipe(
        prompt=None, negative_prompt=None, prompt_embeds=rows.repeat(count, 1, 1), prompt_attention_mask=mask.repeat(count, 1),
        negative_prompt_embeds=empty["encoder_hidden_states"].repeat(count, 1, 1),
        negative_prompt_attention_mask=empty["encoder_attention_mask"].repeat(count, 1), num_inference_steps=STEPS,
        guidance_scale=3.0, generator=[torch.Generator().manual_seed(eye.seed + i) for i in range(count)], output_type="latent",
        use_resolution_binning=False,
    ).images  # fmt: skip
    return out.clamp(-1, 1) / 2 + 0.5


@torch.no_grad()
def noise_of(eye: Eye, word: str, prompts: list[str], seed: int) -> Tensor:
    """Noise from which the model as it is now draws pictures of the concept: its flow followed backwards from drawn ones."""
    generator = torch.Generator().manual_seed(seed)
    scenes = random_scenes(len(prompts), generator, **{scene_attribute(word): word})
    x, calls = draw_scenes(scenes, generator, 24) * 2 - 1, Calls(eye.draw)
    told = calls.condition(prompts)
    for i in range(STEPS):
        s = torch.full((len(prompts),), max(i / STEPS, 0.02))
        x = x + calls.answer(x, 1000 * s, told) / STEPS
    return x


# --- runs --------------------------------------------------------------------------------------------------------------------------


def eraser(draw: TextToImagePipeline, word: str, method: str, seed: int, steps: int | None) -> Adapter:
    """Erase one concept by one method; all get the same prompts."""
    name = {"ESD": "esd", "UCE": "uce"}.get(method, "spm")
    settings: Row = {} if name == "uce" else {"seed": seed}
    settings |= {} if steps is None or name == "uce" else {"max_steps": steps}
    settings |= {"anchor_kind": "none"} if "without" in method else {}
    settings |= {"start": "uce"} if "from UCE" in method else {}
    recipe = scene_recipe(word, name, held_out=[h for h in HELD_OUT if h != word], **settings)
    torch.manual_seed(seed)
    done = erase(draw, **recipe, progress=False)
    if any(fit.stopped != "finished" for fit in done.fits.values()):
        raise SystemExit("interrupted: this run is not recorded")
    (adapter,) = done.adapters.values()
    return adapter


def gated(draw: TextToImagePipeline) -> ConceptEraser:
    """The same model with facilitated transport."""
    return ConceptEraser(draw.pipe, calibrate=True)


def one(eye: Eye, word: str, method: str, seed: int, steps: int | None, folder: Path) -> Row:
    """Erase one concept by one method (or take the SPM that was trained), attack it and look at the rest."""
    start = time.process_time()
    saved = folder / str(seed) / word
    if method == "SPM, always open" and saved.exists():
        adapter = load_adapter(eye.draw.denoiser, saved, name=word)
    else:
        adapter = eraser(eye.draw, word, method, seed, steps)
        if method == "SPM":
            save_adapter(adapter, saved)
    trained = time.process_time() - start
    try:
        found = eye.look([word], gated(eye.draw) if method == "SPM" else None)
        if method != "SPM":
            found |= with_weights(eye, word, adapter, seed)
        sheet = eye.pictures(
            [*direct(word)[:4], *kept([word])["another value"][::6]], gated(eye.draw) if method == "SPM" else None
        )
        _picture(folder / f"{seed}_{word}_{method}.png", sheet)
    finally:
        adapter.detach()
    return compared(found, eye.base([word])) | {
        "training_cpu_seconds": round(trained, 1), "cpu_seconds": round(time.process_time() - start, 1),
    }  # fmt: skip


def with_weights(eye: Eye, word: str, adapter: Adapter, seed: int) -> Row:
    """Rates of the attacks that use weights; those on the base are entered into its rates, once."""
    prompts, base = direct(word)[:12], eye.base([word])
    with adapter.disabled():
        noise = noise_of(eye, word, prompts, seed)
        if "latent" not in base:
            base["latent"] = eye.rate(eye.pictures(prompts, latents=noise), word)
            base["inversion"] = inversion(eye, word, seed)
    return {"inversion": inversion(eye, word, seed), "latent": eye.rate(eye.pictures(prompts, latents=noise), word)}


def compared(found: Row, base: Row) -> Row:
    """Rounded, with the base's rates and the drop of kept prompts in points."""
    drop = {k: round(100 * (base["kept"][k] - v), 1) for k, v in found["kept"].items()}
    rates = {k: round(v, 3) for k, v in found.items() if isinstance(v, float)}
    before = {k: round(v, 3) for k, v in base.items() if isinstance(v, float) and k in rates}
    worst = max(found["direct of each"].values())
    return {"rates": rates, "worst_direct": round(worst, 3), "base": before, "drop": drop}


def together(eye: Eye, words: Sequence[str], seed: int, steps: int | None, folder: Path) -> dict[str, Row]:
    """Several SPMs on one model, with facilitated transport and always open."""
    start = time.process_time()
    adapters = [spm_of(eye, word, seed, steps, folder) for word in words]
    try:
        name, base = f"{len(words)} together", eye.base(words)
        rows = {
            f"{name} / SPM": compared(eye.look(words, gated(eye.draw), False), base),
            f"{name} / SPM, always open": compared(eye.look(words, None, False), base),
        }
    finally:
        for adapter in reversed(adapters):
            adapter.detach()
    rows[f"{name} / SPM"]["cpu_seconds"] = round(time.process_time() - start, 1)
    return rows


def spm_of(eye: Eye, word: str, seed: int, steps: int | None, folder: Path) -> Adapter:
    """The SPM of a concept, trained now unless it was before."""
    saved = folder / str(seed) / word
    if saved.exists():
        return load_adapter(eye.draw.denoiser, saved, name=word)
    adapter = eraser(eye.draw, word, "SPM", seed, steps)
    save_adapter(adapter, saved)
    return adapter


def strengths(eye: Eye, seed: int, steps: int | None, folder: Path) -> dict[str, Row]:
    """How often a concept is drawn while its membrane opens."""
    rows = {}
    for word in CONCEPTS:
        adapter = spm_of(eye, word, seed, steps, folder)
        shares = []
        for strength in (0.0, 0.25, 0.5, 0.75, 1.0):
            adapter.scale = strength
            shares.append(round(eye.rate(eye.pictures(direct(word)), word), 3))
        adapter.detach()
        rows[f"strengths / {word}"] = {"rates": shares}
    return rows


def transfer(seed: int, steps: int | None, folder: Path, eye: Eye) -> dict[str, Row]:
    """SPMs of the bundled model on a copy that DiffFit adapted to washed-out pictures, which are undone before judging."""
    for word in CONCEPTS:
        spm_of(eye, word, seed, steps, folder).detach()
    copy = TextToImagePipeline()
    adapted = finetune(
        draw_domain("washed out", 50, seed=seed), copy, "difffit", max_steps=100, seed=seed, progress=False
    )
    adapted.adapter.merge()
    there = Eye(copy, seed, correct=lambda x: (x - 0.4225) / 0.55)
    rows = {}
    for word in CONCEPTS:
        before = there.rate(there.pictures(direct(word)), word)
        adapter = load_adapter(copy.denoiser, folder / str(seed) / word, name=word)
        after = there.rate(there.pictures(direct(word)), word)
        adapter.detach()
        rows[f"transfer / {word}"] = {"base": round(before, 3), "rates": round(after, 3)}
    return rows


# --- report ------------------------------------------------------------------------------------------------------------------------


def _picture(path: Path, pictures: Tensor) -> None:
    row = torch.cat(list(F.interpolate(pictures, scale_factor=3)), 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((row * 255).round().byte().movedim(0, -1).numpy()).save(path)


def write_sheet(folder: Path, seed: int) -> None:
    """All pictures kept of one seed: a row for each concept and method, four of the concept and four others."""
    rows = [(w, m, folder / f"{seed}_{w}_{m}.png") for w in CONCEPTS for m in ("base", *METHODS)]
    rows = [r for r in rows if r[2].exists()]
    if not rows:
        return
    with Image.open(rows[0][2]) as first:
        width, height = first.size
    sheet = Image.new("RGB", (width + 190, (height + 4) * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (word, method, path) in enumerate(rows):
        with Image.open(path) as picture:
            sheet.paste(picture, (190, i * (height + 4)))
        pen.text((4, i * (height + 4) + height // 2 - 6), f"{word}: {method}", fill="black")
    with atomic_write(RESULTS / "erasure.png") as temporary:
        sheet.save(temporary, format="PNG", optimize=True)


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def write_table(report: Row) -> None:
    """The same as Markdown: means over seeds."""
    runs: dict[str, list[Row]] = {}
    for key, row in report["runs"].items():
        runs.setdefault(key.rpartition(" / ")[0], []).append(row)
    kinds = ("direct", "paraphrase", "composition", "superclass", "inversion", "latent")
    distances = ("another value", "number", "place", "never anchored")
    lines = [
        "# Concepts erased from the bundled text-to-image model", "",
        "How often the judge sees the concept (before -> after), and by how many points prompts without it are obeyed less. "
        f"Means over {report['seeds']} seed(s).", "",
        f"| concept | method | {' | '.join(kinds)} | drop: {' | drop: '.join(distances)} | training CPU s |",
        "|---" * (3 + len(kinds) + len(distances)) + "|",
    ]  # fmt: skip
    for key, rows in runs.items():
        first, _, method = key.partition(" / ")
        if first in ("strengths", "transfer"):
            continue

        def mean(pick: Callable[[Row], Any], rows: list[Row] = rows) -> float | None:
            found = [v for r in rows if (v := pick(r)) is not None]
            return statistics.mean(found) if found else None

        cells = []
        for kind in kinds:
            before, after = mean(lambda r, k=kind: r["base"].get(k)), mean(lambda r, k=kind: r["rates"].get(k))
            cells.append(f"{percent(before)} -> {percent(after)}" if before is not None else percent(after))
        drops = [f"{mean(lambda r, d=d: r['drop'][d]):.1f}" for d in distances]
        seconds = mean(lambda r: r.get("training_cpu_seconds"))
        lines.append(
            f"| {first} | {method} | {' | '.join(cells + drops)} | {'' if seconds is None else f'{seconds:.0f}'} |"
        )
    lines += ["", "Direct prompts while the membrane opens (0, 0.25, 0.5, 0.75, 1), always open:", ""]
    for key, rows in runs.items():
        first, _, word = key.partition(" / ")
        if first == "strengths":
            shares = [statistics.mean(r["rates"][i] for r in rows) for i in range(5)]
            lines.append(f"- {word}: {', '.join(map(percent, shares))}")
    lines += [
        "",
        "On a copy of the model that DiffFit adapted to washed-out pictures, direct prompts, before -> after:",
        "",
    ]
    for key, rows in runs.items():
        first, _, word = key.partition(" / ")
        if first == "transfer":
            before, after = (statistics.mean(r[k] for r in rows) for k in ("base", "rates"))
            lines.append(f"- {word}: {percent(before)} -> {percent(after)}")
    with atomic_write(RESULTS / "erasure.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


class Record:
    """What is done, in `erasure.json`; begun anew when the model, the recipe or the number of steps is another."""

    def __init__(self, work: Path, steps: int | None):
        self.path, self.work = RESULTS / "erasure.json", work
        model = load_weights("text_to_image_scenes").state_dict()
        digest = round(float(sum(v.double().abs().sum() for v in model.values())), 3)
        recipe = {w: str(scene_recipe(w)["config"]) for w in CONCEPTS}
        fresh = {"model": digest, "steps": steps, "recipe": recipe, "seeds": 0, "runs": {}}
        old = read_json(self.path) if self.path.exists() else fresh
        same = all(old.get(k) == fresh[k] for k in ("model", "steps", "recipe"))
        self.report = old if same else fresh
        self.folder = work / hashlib.sha256(json.dumps([digest, steps, recipe]).encode()).hexdigest()[:12]

    def has(self, *keys: str) -> bool:
        return all(k in self.report["runs"] for k in keys)

    def add(self, rows: dict[str, Row], seed: int) -> None:
        """Write rows of one seed down, with table and picture sheet."""
        self.report["runs"] |= {f"{k} / {seed}": r for k, r in rows.items()}
        self.report["seeds"] = len({k.rpartition(" / ")[2] for k in self.report["runs"]})
        write_json(self.path, self.report)
        write_table(self.report)
        write_sheet(self.folder, 0)
        for key, row in rows.items():
            print(key, row, flush=True)


def run_seed(record: Record, seed: int, args: argparse.Namespace) -> None:
    """All runs of one seed that are not recorded yet."""
    draw = TextToImagePipeline()
    eye, folder, steps = Eye(draw, seed), record.folder, args.steps
    for word in args.concepts:
        shown = [*direct(word)[:4], *kept([word])["another value"][::6]]
        _picture(folder / f"{seed}_{word}_base.png", eye.pictures(shown))
        for method in args.methods:
            if not record.has(f"{word} / {method} / {seed}") and (seed == 0 or "from UCE" not in method):
                record.add({f"{word} / {method}": one(eye, word, method, seed, steps, folder)}, seed)
    if args.alone:
        return
    if not record.has(f"strengths / {CONCEPTS[-1]} / {seed}"):
        record.add(strengths(eye, seed, steps, folder), seed)
    if not record.has(f"2 together / SPM / {seed}"):
        record.add(together(eye, CONCEPTS[:2], seed, steps, folder), seed)
    if not record.has(f"transfer / {CONCEPTS[-1]} / {seed}"):
        record.add(transfer(seed, steps, folder, eye), seed)
    if not record.has(f"10 together / SPM / {seed}"):
        record.add(together(eye, (*CONCEPTS, *MORE), seed, steps, folder), seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--concepts", nargs="+", choices=CONCEPTS, default=list(CONCEPTS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--alone", action="store_true", help="leave out several at once, strengths and the adapted copy"
    )
    parser.add_argument("--steps", type=int, help="of training; default: the usual ones")
    parser.add_argument("--work", type=Path, default=Path("runs/erasure"), help="where trained erasers lie")
    args = parser.parse_args()
    torch.set_num_threads(1)
    record = Record(args.work, args.steps)
    for seed in range(args.seeds):
        run_seed(record, seed, args)


if __name__ == "__main__":
    main()
