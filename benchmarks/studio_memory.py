"""Memory of the studio over an hour's worth of mixed use, without the pauses: what it holds at the start, meanwhile, and at the end.

    python benchmarks/studio_memory.py                # 8 rounds, more than one visitor asks for in an hour
    python benchmarks/studio_memory.py --rounds 3

Each round is a new visitor who asks every page for something, with pictures of other sizes each time, and trains once. "At the start"
is before the first call, when kernels are compiled as on a machine that is new to mmkit and the models of all pages are loaded. The end
is taken after the sweeper's next round. Processes that the studio starts count.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from mmkit.data.drawn.scans import sample_picture
from mmkit.data.drawn.shapes import SHAPES, drawn_scan
from mmkit.storage import write_json

sys.path.insert(0, str(Path(__file__).parent))
from studio_attack import Studio, ask, file_data, picture, upload, zipped

RESULTS = Path(__file__).parent / "results"
SWEEP_SECONDS = 5
SERVER = f"""
from mmkit.apps import launch_studio, limits
limits.SWEEP_SECONDS = {SWEEP_SECONDS}
launch_studio()
"""


def use(one: httpx.Client, number: int) -> Iterator[tuple[str, bool, str]]:
    """(endpoint, whether it answered, what it said) of one visitor's round."""
    side = 200 + 60 * (number % 7)
    photo = upload(one, "photo.png", picture(side, number % 200))
    yield "segment", *ask(one, "segment", photo, {"points": [[side / 2, side / 2]], "labels": [1]}, None)
    yield "gmm_explore", *ask(one, "gmm_explore", photo, 1, 1, 4, 4, 1, 1, "This head")
    look = ("The large model reads the fine map", 0.5, 0.5)
    yield "piip_look", *ask(one, "piip_look", photo, 128, 256, 1, *look)
    scan = upload(one, "scan.png", png(sample_picture(number, 160 + 32 * (number % 5))[0]))
    yield "segment_medical", *ask(one, "segment_medical", scan, None, None)
    done, text = ask(one, "video_draw", "any direction")
    yield "video_draw", done, text
    clip = file_data(json.loads(text)[0]["path"], "a.mp4")
    yield "video_classify", *ask(one, "video_classify", clip, 2, "Forwards", "Adapters separate")
    points = io.BytesIO()
    np.save(points, drawn_scan(np.random.default_rng(number), SHAPES[number % len(SHAPES)], 2048)[0])
    yield "classify_cloud", *ask(one, "classify_cloud", upload(one, "cloud.npy", points.getvalue()))
    yield "render_splats", *ask(one, "render_splats", None, 20 * number % 180, 25, 1)
    prompts = f"a red circle\na {('blue', 'green')[number % 2]} star"
    yield (
        "diffusion_adapt",
        *ask(one, "diffusion_adapt", "Night", None, "", "DiffFit", 25, prompts, number, seconds=600),
    )
    yield "map_recording", *ask(one, "map_recording", None, 6 + number % 3, 8)
    word = ("circle", "red", "striped")[number % 3]
    yield "erasure_erase", *ask(one, "erasure_erase", "", word, 60, prompts, number, True, seconds=600)
    members = {f"{c}/{i}.png": picture(96 + 16 * (number % 4), 100 * c + i) for c in (0, 1) for i in range(6)}
    train = (upload(one, "a.zip", zipped(members)), "mobilenetv2", "ssf") if number % 2 else (None, "tiny_vit", "ssf")
    yield "finetune_train", *ask(one, "finetune_train", *train, 1, number, seconds=600)


def png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    result = measure(args.rounds, report=lambda line: print(line, flush=True))
    write_json(RESULTS / "studio_memory.json", result)
    (RESULTS / "studio_memory.md").write_text(markdown(result), encoding="utf-8")
    print(markdown(result))


def measure(rounds: int, report: Any = str) -> dict[str, Any]:
    """Resident memory in MB at the start, after each round, and after the sweeper's last one."""
    with tempfile.TemporaryDirectory() as name:
        os.environ["NUMBA_CACHE_DIR"] = f"{name}/kernels"  # empty
        studio, calls, failed = Studio(Path(name), SERVER), 0, []
        try:
            if not studio.loaded.wait(600):
                raise SystemExit("The studio did not load its models within ten minutes.")
            start, after = studio.memory(), []
            for number in range(rounds):
                for endpoint, done, text in use(studio.visitor(), number):
                    calls += 1
                    if not done:
                        failed.append(f"{endpoint}: {text[:200]}")
                after.append(round(studio.memory()))
                report(f"round {number + 1}: {after[-1]} MB, {calls} calls, failed: {failed}")
            time.sleep(3 * SWEEP_SECONDS)
            end = studio.memory()
        finally:
            studio.process.terminate()
            studio.process.wait(20)
    return {"calls": calls, "failed": failed, "start_mb": round(start), "after_rounds_mb": after, "end_mb": round(end)}


def markdown(result: dict[str, Any]) -> str:
    rows = result["after_rounds_mb"]
    return (
        "| calls | at the start, MB | after the first round | most | at the end | grown |\n|---|---|---|---|---|---|\n"
        f"| {result['calls']} | {result['start_mb']} | {rows[0]} | {max(rows)} | {result['end_mb']} "
        f"| {result['end_mb'] - result['start_mb']} |\n\nWritten by `python benchmarks/studio_memory.py`.\n"
    )


if __name__ == "__main__":
    main()
