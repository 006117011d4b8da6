"""What a data set costs: the index of 50,000 files, and decoding with the transform, beside torchvision's ImageFolder and timm.

    python benchmarks/data_pipeline.py

CPU time of the process, both sides in turns within one run, medians. Pictures are drawn, so that nothing has to be downloaded.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
import timm
import torchvision
from PIL import Image
from timm.data import create_transform
from torchvision.datasets import ImageFolder

from mmkit.data import ImageTransform, open_dataset
from mmkit.data.drawn.pictures import class_names, draw
from mmkit.storage import write_json

RESULTS = Path(__file__).parent / "results" / "data_pipeline.json"
SETTINGS = {"interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 0.9}


def cpu_seconds(run: Callable[[], object]) -> float:
    """CPU time of one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def interleaved(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> dict[str, float]:
    """Median CPU seconds of both, and the median of `theirs / ours` (above 1: we are faster), measured in turns."""
    pairs = []
    for i in range(rounds):
        first, second = (ours, theirs) if i % 2 else (theirs, ours)
        times = cpu_seconds(first), cpu_seconds(second)
        pairs.append(times if i % 2 else times[::-1])
    mine, other = zip(*pairs, strict=True)
    return {
        "ours": round(statistics.median(mine), 4),
        "theirs": round(statistics.median(other), 4),
        "theirs_over_ours": round(statistics.median(b / a for a, b in pairs), 3),
    }


def index(folder: Path, files: int, rounds: int) -> dict[str, float]:
    """Listing `files` empty files in 100 classes."""
    for c in range(100):
        (folder / f"class {c}").mkdir(parents=True)
        for i in range(files // 100):
            (folder / f"class {c}" / f"picture_{i}.jpg").touch()
    return interleaved(lambda: open_dataset(folder, verify=False), lambda: ImageFolder(str(folder)), rounds)


def decode(folder: Path, size: tuple[int, int], count: int, rounds: int) -> dict[str, float]:
    """Decoding JPEG photos of `size` (width, height) and preparing them for 224 pixels."""
    for c in range(2):
        (folder / str(c)).mkdir(parents=True)
        for i in range(count // 2):
            drawn = draw(class_names()[c], np.random.default_rng((c, i)), max(size))
            Image.fromarray(np.asarray(drawn)).resize(size).save(folder / str(c) / f"{i}.jpg", quality=90)
    ours = open_dataset(folder, verify=False, transform=ImageTransform(224, **SETTINGS))
    theirs = ImageFolder(str(folder), create_transform((3, 224, 224), **SETTINGS))
    assert (ours[0][0] - theirs[0][0]).abs().max() == 0

    def read(data: object) -> Callable[[], object]:
        return lambda: [data[i] for i in range(count)]  # type: ignore[index]

    return interleaved(read(ours), read(theirs), rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=50_000)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        table = {f"index of {args.files} files": index(folder / "index", args.files, args.rounds)}
        for size in ((256, 192), (640, 480), (1600, 1200)):
            count = args.count if max(size) < 1000 else args.count // 8 * 2
            name = f"decode and prepare {count} JPEG of {size[0]}x{size[1]}"
            table[name] = decode(folder / f"{size[0]}", size, count, args.rounds)
    versions = {"pillow": PIL.__version__, "torchvision": torchvision.__version__, "timm": timm.__version__}
    write_json(RESULTS, {"cpu_seconds": table, "python": platform.python_version(), **versions})
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
