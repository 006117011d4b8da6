"""The main job in one command: adapt the bundled ViT to real handwritten digits four ways, compare, save, reload, merge."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmkit.data import load_digits
from mmkit.errors import InterruptedRun, MMKitError
from mmkit.storage import atomic_write, write_json
from mmkit.storage.files import absolute
from mmkit.vision.classification.preparing import prepare
from mmkit.vision.classification.report import report_table
from mmkit.vision.classification.saving import load_finetuned
from mmkit.vision.classification.training import FinetuneResult, train_prepared

METHODS = ("linear_probe", "ssf", "lora", "full")


def run_demo(
    output_dir: str | os.PathLike[str] = "runs/demo", *, epochs: int = 6, seed: int = 0, resume: bool = True
) -> dict[str, Any]:
    """Train, print one table, write `report.json`, `curves.png` and the best adapter under `output_dir`.

    Then the best adapter that folds into the weights is loaded by a fresh process, merged there, and the predictions of all three
    are compared. Raises `MMKitError` when they disagree.

    Args:
        output_dir: created when missing.
        epochs: passes over the 1438 training digits, for each method.
        seed: of the split, the start and the order.
        resume: continue what `output_dir` holds of the same demo; `False` starts over.

    Returns:
        What `report.json` holds.
    """
    folder = absolute(output_dir)
    digits = load_digits()
    print(
        f"{len(digits)} real handwritten digits, 10 classes. Backbone: bundled tiny ViT, which has seen no handwriting.\n"
    )
    results: list[FinetuneResult] = []
    for method in METHODS:
        prepared = prepare(digits, "tiny_vit", method, seed=seed)
        print(f"{method}: {prepared.trainable_parameters:,} trainable parameters")
        run = train_prepared(
            prepared, output_dir=folder / method, epochs=epochs, batch_size=64, seed=seed, resume=resume
        )
        if run.fit.stopped == "interrupted":
            raise InterruptedRun(run.fit.steps, run.fit.signal, folder / method / "training")
        results.append(run)
    reports = [r.report for r in results]
    print("\n" + report_table(reports))
    print(f"Accuracy: of the {len(prepared.val)} digits held back; the epoch that is best on them is kept.\n")
    _plot(results, folder / "curves.png")

    best = max((r for r in results if r.merge_error is not None), key=lambda r: r.accuracy or 0.0)
    check = _reload_in_fresh_process(best)
    summary = {"methods": reports, "best": best.report["method"], "fresh_process": check}
    write_json(folder / "report.json", summary)
    print(
        f"Best adapter: {best.report['method']}. A fresh process loaded it from {best.folder} and merged it: "
        f"{check['same_predictions']} of {check['images']} predictions agree with training, loaded and merged "
        f"(largest logit difference {check['loaded_error']:.1e} loaded, {check['merged_error']:.1e} merged)."
    )
    print(f"Written: {folder}/report.json, {folder}/curves.png and one folder per method.")
    if check["same_predictions"] != check["images"]:
        raise MMKitError("The reloaded or merged adapter does not predict what it did in training; please report this.")
    return summary


def _reload_in_fresh_process(best: FinetuneResult) -> dict[str, Any]:
    """Hand logits and pictures of the validation set to another interpreter and let it compare."""
    model = best.prepared.model
    images = torch.stack([best.prepared.val[i][0] for i in range(len(best.prepared.val))])
    device = next(model.parameters()).device
    with torch.no_grad():
        logits = torch.cat([model.eval()(chunk.to(device)).cpu() for chunk in images.split(128)])
    assert best.folder is not None
    with tempfile.TemporaryDirectory() as temporary:
        exchange = Path(temporary) / "logits.npz"
        np.savez(exchange, images=images.numpy(), logits=logits.numpy())
        out = subprocess.run(
            [sys.executable, "-m", "mmkit.vision.classification.demo", str(best.folder), str(exchange)],
            capture_output=True,
            text=True,
            check=False,
        )
    if out.returncode:
        raise MMKitError(f"The fresh process failed:\n{out.stderr[-2000:]}")
    return json.loads(out.stdout.strip().splitlines()[-1])


def _compare(folder: str, exchange: str) -> dict[str, Any]:
    """What the fresh process does: load, predict, merge, predict."""
    from mmkit.adapters import attached_adapters

    with np.load(exchange) as data:
        images, expected = torch.from_numpy(data["images"]), torch.from_numpy(data["logits"])
    model = load_finetuned(folder)
    loaded = _predict(model, images)
    attached_adapters(model)["default"].merge()
    merged = _predict(model, images)
    same = (loaded.argmax(1) == expected.argmax(1)) & (merged.argmax(1) == expected.argmax(1))
    return {
        "images": len(images),
        "same_predictions": int(same.sum()),
        "loaded_error": float((loaded - expected).abs().max()),
        "merged_error": float((merged - expected).abs().max()),
    }


def _predict(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(chunk) for chunk in images.split(128)])


def _plot(results: list[FinetuneResult], path: Path) -> None:
    """Validation accuracy by epoch, one line per method."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for r in results:
        history = [h for h in r.fit.history if "accuracy" in h]
        label = f"{r.report['method']}  ({r.report['trainable_parameters']:,} parameters)"
        axes.plot([h["epoch"] for h in history], [100 * h["accuracy"] for h in history], marker="o", ms=3, label=label)
    axes.set(xlabel="epoch", ylabel="validation accuracy [%]", title="Bundled tiny ViT adapted to handwritten digits")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


if __name__ == "__main__":
    print(json.dumps(_compare(sys.argv[1], sys.argv[2])))
