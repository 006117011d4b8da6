"""What each of the bundled weights can do: one table with a baseline beside every score, its range, its size and what it costs.

    python benchmarks/defaults.py --data data                      # all of them: about ten CPU minutes
    python benchmarks/defaults.py --data data --only tiny_vit      # these only; the other rows stay

Scores are measured here on data that the training never saw. Where another benchmark measured one at greater length, the row is read from
its file or from the manifest, and says so. The range holds the score in 95 of 100 samples of that size: Wilson's for shares of right
answers, else from 2000 bootstrap samples. CPU milliseconds are for one input, forward only, on one thread; the first row of every run is a
MobileNetV2 on a picture of 224 pixels, to compare with, because the machine may be busy.
"""

from __future__ import annotations

import argparse
import csv
import math
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from interactive import results_file
from torch import Tensor, nn

import mmkit
from mmkit import create_backbone, load_weights
from mmkit.backbones import image_info
from mmkit.data import ImageTransform, load_image, open_dataset
from mmkit.data.drawn.motion import MOTIONS
from mmkit.data.drawn.pictures import ProceduralImages
from mmkit.data.drawn.sprites import CASES, motion_cases
from mmkit.data.licenses import permissive_pictures
from mmkit.storage import read_json, write_json
from mmkit.vision.classification import probe_answers
from mmkit.vision.medical import (
    Case,
    average_precision,
    dice,
    drawn_cases,
    hippocampus_cases,
    nuclei_cases,
    nuclei_instances,
    nuclei_kinds,
    sliding_window,
    split_touching,
)
from mmkit.weights import list_weights, weight_entry

RESULTS = Path(__file__).parent / "results"
RESULT = RESULTS / "defaults.json"
Row = dict[str, Any]


# ---------------------------------------------------------------------------------------------------------- ranges


def wilson(right: int, number: int) -> tuple[float, float]:
    """The 95 % range of a share, `right` of `number`."""
    share, z = right / number, 1.96
    middle = (share + z * z / (2 * number)) / (1 + z * z / number)
    half = z * math.sqrt(share * (1 - share) / number + z * z / (4 * number**2)) / (1 + z * z / number)
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % range of a mean, from 2000 samples with replacement."""
    rng = np.random.default_rng(0)
    means = np.asarray(values)[rng.integers(len(values), size=(2000, len(values)))].mean(1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def share(
    data: str, right: int, number: int, baseline: str, base: float, measure: str = "accuracy", **more: Any
) -> Row:
    """A row for a share of right answers."""
    found = {
        "data": data,
        "n": number,
        "measure": measure,
        "baseline": baseline,
        "baseline_score": round(float(base), 4),
    }
    return {**found, "score": round(right / number, 4), "range": wilson(right, number), **more}


def mean(data: str, values: Sequence[float], baseline: str, base: float, measure: str, **more: Any) -> Row:
    """A row for a mean over examples."""
    found = {
        "data": data,
        "n": len(values),
        "measure": measure,
        "baseline": baseline,
        "baseline_score": round(float(base), 4),
    }
    return {**found, "score": round(float(np.mean(values)), 4), "range": bootstrap(values), **more}


def milliseconds(call: Callable[[], Any], times: int = 5) -> float:
    """CPU milliseconds of a call, the median of some."""
    found = []
    with torch.no_grad():
        call()
        for _ in range(times):
            start = time.process_time()
            call()
            found.append(1000 * (time.process_time() - start))
    return round(statistics.median(found), 2)


# -------------------------------------------------------------------------------------------------------- pictures


def drawn_answers(model: nn.Module, names: Sequence[str], size: int, number: int, seed: int) -> tuple[int, int]:
    """How many of freshly drawn pictures of these classes a model names, and of how many."""
    info = image_info(model)
    transform = ImageTransform(size, info.mean, info.std)
    right = total = 0
    pictures = ProceduralImages(number, size, seed)
    with torch.no_grad():
        for image, label in pictures:
            if (name := pictures.class_names[label]) in names:
                right += names[int(model(transform(image)[None]).argmax())] == name
                total += 1
    return right, total


def tiny_vit(data: Path) -> list[Row]:
    """A linear probe on photographs, and the drawn classes it was trained on."""
    clothes = open_dataset(data / "cls_clothing")
    right = {}
    for name, build in {
        "trained": lambda: create_backbone("tiny_vit", img_size=64),
        "random": lambda: create_backbone(
            weight_entry("tiny_vit").model, **{**weight_entry("tiny_vit").config, "img_size": 64}
        ),
    }.items():
        torch.manual_seed(0)
        model = build().eval()
        seen = clothes.with_transform(ImageTransform(64, (0.5,) * 3, (0.5,) * 3, crop_pct=0.9))
        right[name] = probe_answers(model, seen.split("train"), seen.split("test"))
    large, small = create_backbone("tiny_vit", img_size=64).eval(), create_backbone("tiny_vit").eval()
    cost = milliseconds(lambda: large(torch.zeros(1, 3, 64, 64)))
    names = weight_entry("tiny_vit").extra["class_names"]
    drawn = drawn_answers(small, names, 32, 1100, 777)
    number, random = len(right["trained"]), right["random"].double().mean().item()
    return [
        share(
            "photos of clothes, 64 px, linear probe",
            int(right["trained"].sum()),
            number,
            "random weights",
            random,
            cpu_ms=cost,
        ),
        share("drawn pictures, 44 classes", *drawn, "chance", 1 / len(names)),
    ]


def gmm_vit_drawn(_: Path) -> list[Row]:
    """Freshly drawn shapes and textures."""
    model, entry = load_weights("gmm_vit_drawn"), weight_entry("gmm_vit_drawn")
    names, size = entry.extra["class_names"], entry.config["img_size"]
    transform = ImageTransform(size, entry.extra["mean"], entry.extra["std"])
    pictures = ProceduralImages(1100, size, 777)
    asked = [
        (transform(image), names.index(name)) for image, k in pictures if (name := pictures.class_names[k]) in names
    ]
    with torch.no_grad():
        right = sum(int(model(x[None]).argmax()) == y for x, y in asked)
    cost = milliseconds(lambda: model(asked[0][0][None]))
    return [share("drawn pictures, 20 classes", right, len(asked), "chance", 1 / len(names), cpu_ms=cost)]


def mobilenetv2(_: Path) -> list[Row]:
    """The linear probe of `benchmarks/photos.py`."""
    runs = [r for r in read_json(RESULTS / "photos.json")["runs"] if r["method"] == "linear_probe"]
    accuracy, number = statistics.mean(r["accuracy"] for r in runs), 120
    model = create_backbone("mobilenetv2").eval()
    cost = milliseconds(lambda: model(torch.zeros(1, 3, 224, 224)))
    row = share("photos of clothes, 224 px, linear probe", round(accuracy * number), number, "chance", 0.1, cpu_ms=cost)
    return [{**row, "source": "photos.json"}]


# --------------------------------------------------------------------------------------------------------- medical


def otsu(image: Tensor) -> np.ndarray:
    """Nuclei by a threshold on the grey picture: whatever side of it is the smaller, uint8 (H, W)."""
    from skimage.filters import threshold_otsu

    grey = image.mean(0).numpy()
    inside = grey > threshold_otsu(grey)
    return (~inside if inside.mean() > 0.5 else inside).astype(np.uint8)


def window_masks(name: str, cases: list[Case]) -> tuple[list[np.ndarray], float]:
    """Masks of normalised pictures, and CPU milliseconds for one of 256 pixels."""
    model = load_weights(name)
    masks = [sliding_window(model, x, (256, 256), progress=False).argmax(0).numpy() for x, _ in cases]
    return masks, milliseconds(lambda: model(cases[0][0][None, :, :256, :256]), 3)


def piip_masks(folder: Path) -> tuple[list[np.ndarray], float]:
    """Masks of the test pictures by the pipeline of pyramids, and CPU milliseconds for one of 256 pixels."""
    segment = mmkit.pipeline("semantic-segmentation", "piip_nuclei")
    with open(folder / "index.csv", newline="", encoding="utf-8") as file:
        names = [row["id"] for row in csv.DictReader(file) if row["split"] == "test"]
    photos = [load_image(folder / f"images/{name}.png") for name in names]
    masks = [(segment(photo, size=max(photo.size)).mask > 0).astype(np.uint8) for photo in photos]
    return masks, milliseconds(lambda: segment(photos[-1], size=256), 3)


def nuclei(name: str) -> Callable[[Path], list[Row]]:
    """Rows for one network: Dice of all pictures and of each kind, and AP50 of the parted nuclei."""

    def rows(data: Path) -> list[Row]:
        folder = data / "med_nuclei"
        cases, kinds, single = (f(folder, "test") for f in (nuclei_cases, nuclei_kinds, nuclei_instances))
        masks, cost = piip_masks(folder) if name == "piip_nuclei" else window_masks(name, cases)
        simple = [otsu(x) for x, _ in cases]
        score, base = (
            [dice(m, y.numpy(), 1) for m, (_, y) in zip(made, cases, strict=True)] for made in (masks, simple)
        )
        found, told = (
            [average_precision(split_touching(m), y) for m, y in zip(made, single, strict=True)]
            for made in (masks, simple)
        )
        listed = [mean("nuclei", score, "Otsu", np.mean(base), "Dice", cpu_ms=cost)]
        for kind, text in (("fluorescence", "nuclei, fluorescence"), ("brightfield_colour", "nuclei, stained tissue")):
            chosen = [i for i, k in enumerate(kinds) if k == kind]
            listed.append(mean(text, [score[i] for i in chosen], "Otsu", np.mean([base[i] for i in chosen]), "Dice"))
        return [*listed, mean("single nuclei", found, "Otsu, parted alike", np.mean(told), "AP50")]

    return rows


def per_volume(masks: Sequence[np.ndarray], cases: Sequence[Case]) -> list[float]:
    """Mean Dice of classes 1 and 2 of each volume."""
    return [(dice(m, y.numpy(), 1) + dice(m, y.numpy(), 2)) / 2 for m, (_, y) in zip(masks, cases, strict=True)]


def volumes(name: str, model: nn.Module, cases: list[Case]) -> tuple[list[float], float]:
    """Dice of each volume, and CPU milliseconds of one."""
    window = weight_entry(name).extra["window"]
    masks = [sliding_window(model, x, window, progress=False).argmax(0).numpy() for x, _ in cases]
    return per_volume(masks, cases), milliseconds(lambda: sliding_window(model, cases[0][0], window, progress=False), 3)


def unet_hippocampus(data: Path) -> list[Row]:
    """MRI of the hippocampus, beside the place where it mostly lies: the majority of the training labels, scaled to the crop."""
    train, test = (hippocampus_cases(data / "med_hippocampus", split) for split in ("train", "test"))
    score, cost = volumes("unet_hippocampus", load_weights("unet_hippocampus"), test)
    atlas = []
    for image, _ in test:
        one_hot = [torch.stack([(y == k).float() for k in range(3)])[None] for _, y in train]
        scaled = [nn.functional.interpolate(y, image.shape[1:], mode="trilinear") for y in one_hot]
        atlas.append(torch.stack(scaled).mean(0)[0].argmax(0).numpy())
    base = float(np.mean(per_volume(atlas, test)))
    return [mean("hippocampus MRI, 2 parts", score, "where it mostly lies", base, "Dice", cpu_ms=cost)]


def lightm_unet_blobs(_: Path) -> list[Row]:
    """Drawn volumes, beside the two thresholds that are best on them."""
    test = drawn_cases(range(10))
    score, cost = volumes("lightm_unet_blobs", load_weights("lightm_unet_blobs"), test)
    levels = np.linspace(0.5, 3, 11)
    best = [
        max(np.mean([dice((s * x[0].numpy() > t) * 1, y.numpy() == k, 1) for x, y in test]) for t in levels)
        for s, k in ((1, 1), (-1, 2))
    ]
    return [mean("drawn volumes, 2 classes", score, "best thresholds", float(np.mean(best)), "Dice", cpu_ms=cost)]


# ------------------------------------------------------------------------------------------------ motion, 3D, words


def video_motion(data: Path) -> list[Row]:
    """Clips of a generator that the training does not use, over photographs that it does not use."""
    from mmkit.video.zeroi2v import right_answers

    model: Any = load_weights("video_motion")
    photos = [load_image(path) for path in permissive_pictures(data / "seg_more")]
    rows = []
    for name in CASES:
        right = right_answers(model, motion_cases(name, 300, photos))
        rows.append(share(f"clips: {name}", int(right.sum()), len(right), "chance", 1 / len(model.class_names)))
    rows[0]["cpu_ms"] = milliseconds(lambda: model(torch.zeros(1, model.num_frames, 3, model.img_size, model.img_size)))
    assert set(MOTIONS) <= set(model.class_names)
    return rows


def points(name: str) -> Callable[[Path], list[Row]]:
    """Rows for a network on drawn clouds and scans, beside always giving the commonest answer."""

    def rows(_: Path) -> list[Row]:
        from mmkit.data.drawn.shapes import ProceduralShapes

        model, listed = load_weights(name), []
        for domain in ("clean", "scan"):
            samples: Any = ProceduralShapes("test", domain, 25, 256, parts=name == "point_parts")
            asked = [(torch.from_numpy(s[0]), np.ravel(s[-1])) for s in (samples[i] for i in range(len(samples)))]
            with torch.no_grad():
                right = [(model(x[None]).argmax(1).numpy().ravel() == y).mean() for x, y in asked]
            commonest = Counter(np.concatenate([y for _, y in asked]).tolist()).most_common(1)[0][1] / sum(
                len(y) for _, y in asked
            )
            listed.append(mean(f"drawn clouds, {domain}", right, "always the commonest", commonest, "accuracy"))
        return [{**listed[0], "cpu_ms": milliseconds(lambda: model(asked[0][0][None]))}, *listed[1:]]

    return rows


def splat_still_life(_: Path) -> list[Row]:
    """Views that the fit did not see, beside one color."""
    from mmkit.pointcloud.splats import GaussianModel, drawn_scene
    from mmkit.weights import load_tensors

    fitted, held = drawn_scene(24, 128).split()
    model = GaussianModel.from_tensors(load_tensors("splat_still_life"))
    color = fitted.images.float().mean((0, 1, 2)) / 255
    ours, plain = [], []
    for i in range(len(held)):
        want = held.images[i].float() / 255
        got = model.render(held.camera[i], backgrounds=torch.zeros(1, 3))[0][0].clamp(0, 1)
        ours.append(-10 * math.log10((got - want).square().mean().item()))
        plain.append(-10 * math.log10((color - want).square().mean().item()))
    cost = milliseconds(lambda: model.render(held.camera[0], backgrounds=torch.zeros(1, 3)))
    return [mean("unseen views of the scene", ours, "one color", float(np.mean(plain)), "PSNR, dB", cpu_ms=cost)]


def from_manifest(
    name: str, data: str, number: int, key: str, baseline: str, base_key: str, call: Callable[[], Callable[[], Any]]
) -> Any:
    """A row whose shares of right answers the training script measured on data that it did not train on."""

    def rows(_: Path) -> list[Row]:
        score = weight_entry(name).score
        row = share(data, round(score[key] * number), number, baseline, score[base_key], cpu_ms=milliseconds(call(), 3))
        return [{**row, "score": score[key], "source": "manifest"}]

    return rows


def clicks(name: str) -> Callable[[Path], list[Row]]:
    """Overlap after one click, and objects that reach 85 % within 20 clicks, from `benchmarks/interactive.py`, beside its random walker."""

    def rows(_: Path) -> list[Row]:
        source = results_file("quality", name)
        file = read_json(source)
        found, firsts, listed = file["rows"], file["first clicks"], []
        picture = np.random.default_rng(0).integers(0, 255, (480, 640, 3), np.uint8)
        segmenter = mmkit.pipeline("interactive-segmentation", name)
        cost = milliseconds(lambda: segmenter(picture, [(320, 240)]))
        for kind, text in (
            ("coco test objects", "everyday objects"),
            ("bsds regions", "regions"),
            ("pets test", "pets"),
        ):
            own, base = found[f"{kind}: {name}"], found[f"{kind}: random walker"]
            listed.append(mean(f"{text}, one click", firsts[kind], "random walker", base["mIoU@1"], "overlap"))
            reached = 1 - base["NoF@85"] / base["objects"]
            listed.append(
                share(
                    f"{text}, 85 % in 20 clicks",
                    own["objects"] - own["NoF@85"],
                    own["objects"],
                    "random walker",
                    reached,
                    "reached",
                )
            )
        return [{**row, "source": source.name} | ({} if i else {"cpu_ms": cost}) for i, row in enumerate(listed)]

    return rows


def painter() -> Callable[[], Any]:
    draw = mmkit.pipeline("text-to-image")
    return lambda: draw(["a large red circle"], seed=0)


def judge() -> Callable[[], Any]:
    model = load_weights("scene_judge")
    return lambda: model(torch.zeros(1, 3, 48, 48))


def encoder() -> Callable[[], Any]:
    model: Any = load_weights("point_mae_nano")
    return lambda: model.global_feature(torch.rand(1, 256, 3))


MEASURED: dict[str, Callable[[Path], list[Row]]] = {
    "mobilenetv2": mobilenetv2,
    "tiny_vit": tiny_vit,
    "gmm_vit_drawn": gmm_vit_drawn,
    "unet_nuclei": nuclei("unet_nuclei"),
    "lightm_unet_nuclei": nuclei("lightm_unet_nuclei"),
    "piip_nuclei": nuclei("piip_nuclei"),
    "unet_hippocampus": unet_hippocampus,
    "lightm_unet_blobs": lightm_unet_blobs,
    "video_motion": video_motion,
    "point_shapes": points("point_shapes"),
    "point_parts": points("point_parts"),
    "point_mae_nano": from_manifest(
        "point_mae_nano", "drawn scans, SVM on features", 640, "svm_scan", "untrained", "svm_scan_untrained", encoder
    ),
    "splat_still_life": splat_still_life,
    "scene_judge": from_manifest(
        "scene_judge", "drawn scenes, shape", 2000, "shape", "always the commonest", "shape_always_the_commonest", judge
    ),
    "text_to_image_scenes": from_manifest(
        "text_to_image_scenes",
        "captions, asked shape drawn",
        500,
        "shape_right",
        "another caption's",
        "shape_by_chance",
        painter,
    ),
}
"""Weights -> what measures them; those that `benchmarks/interactive.py` measured are added by name."""


def measured() -> dict[str, Callable[[Path], list[Row]]]:
    """`MEASURED` and the click models."""
    names = [n for n in list_weights() if weight_entry(n).model.startswith("clicknet")]
    return {**MEASURED, **{name: clicks(name) for name in names}}


# ----------------------------------------------------------------------------------------------------------- table


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    lines = [
        "| weights | MB | measured on | n | baseline | score | 95 % range | CPU ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["weights"] for row in rows):
        for i, row in enumerate(r for r in rows if r["weights"] == name):
            unit = (lambda v: f"{v:.1f}") if "dB" in row["measure"] else (lambda v: f"{100 * v:.1f}")
            text = {"accuracy": "%", "reached": "%"}.get(row["measure"], row["measure"])
            head = (f"`{name}`", f"{row['mb']:.2f}") if not i else ("", "")
            low, high = row["range"]
            cost = f"{row['cpu_ms']:.1f}" if "cpu_ms" in row else ""
            cells = (
                *head,
                row["data"],
                str(row["n"]),
                f"{unit(row['baseline_score'])} ({row['baseline']})",
                f"**{unit(row['score'])}** {text}",
                f"{unit(low)} to {unit(high)}",
                cost,
            )
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--only", nargs="+", choices=list_weights(), help="measure these weights; other rows stay")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kept = [r for r in (read_json(RESULT)["rows"] if RESULT.exists() else []) if r["weights"] in list_weights()]
    for name in args.only or measured():
        entry = weight_entry(name)
        found = measured()[name](args.data)
        common = {"weights": name, "sha256": entry.sha256, "mb": round(entry.path.stat().st_size / 1e6, 2)}
        kept = [r for r in kept if r["weights"] != name] + [{**common, **row} for row in found]
        for row in found:
            print(name, row, flush=True)
        order = list(measured())
        kept.sort(key=lambda r: order.index(r["weights"]))
        machine = {"python": platform.python_version(), "torch": torch.__version__, "threads": 1}
        write_json(RESULT, {"machine": machine, "rows": kept})  # after each: an interrupted run keeps what it measured
    RESULT.with_suffix(".md").write_text(table(kept), encoding="utf-8")
    print(table(kept))


if __name__ == "__main__":
    main()
