"""`mmkit finetune --task`: clips and clouds from a folder to an answer, with the same words and the same report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import mmkit
from mmkit.cli import app
from mmkit.cli.finetune import TASKS, fit_fields


def run(task: str, data: Path, output: Path, *more: object) -> tuple[int, str]:
    words = ["finetune", "--task", task, "--data", data, "--output", output, "--epochs", 1, "--no-progress", *more]
    found = CliRunner().invoke(app, [str(w) for w in words])
    assert not found.exception or isinstance(found.exception, SystemExit), found.exception
    return found.exit_code, " ".join(found.output.split())


def check_report(folder: Path, count: int) -> None:
    report = json.loads((folder / "report.json").read_text())
    assert report["answers"]["n"] == count
    assert report["accuracy"] is not None
    page = (folder / "report.html").read_text()
    assert "<script" not in page
    assert "Curves" in page


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    from mmkit.data.drawn.motion import drawn_motion
    from mmkit.video import write_video

    for label in (0, 1):
        found, _ = drawn_motion(5, torch.Generator().manual_seed(label), num_frames=8, label=label)
        for i, clip in enumerate((found * 255).byte().permute(0, 1, 3, 4, 2)):
            write_video(tmp_path / "clips" / ("left", "right")[label] / f"{i}.mp4", clip.contiguous(), fps=8)
    return tmp_path / "clips"


@pytest.mark.slow
def test_clips(clips: Path, tmp_path: Path):
    code, told = run("video-classification", clips, tmp_path / "out", "--val", 0.4, "--batch-size", 4)
    assert code == 0, told
    assert "parameters trained in" in told
    check_report(tmp_path / "out", 4)
    answer = mmkit.pipeline("video-classification", tmp_path / "out" / "model")(
        clips / "left" / "0.mp4", top_k=2, progress=False
    )
    assert set(answer.labels) == {"left", "right"}
    found = CliRunner().invoke(app, ["finetune", "--config", str(tmp_path / "out" / "run.toml"), "--lr", "0.5"])
    assert found.exit_code == 1
    assert "--lr:" in found.output
    code, told = run("video-classification", clips, tmp_path / "other", "--dry-run", "--lr", 0.25)
    assert code == 0, told
    assert "8 training examples and 2 held back, of 2 classes: left, right." in told
    assert "lr=0.25" in told
    damaged = clips / "left" / "1.mp4"
    damaged.write_bytes(damaged.read_bytes()[:200])
    code, told = run("video-classification", clips, tmp_path / "other")
    assert code == 1
    assert "1 of 10 videos cannot be used" in told
    assert "1.mp4" in told
    assert not (tmp_path / "other").exists()
    code, told = run("video-classification", clips, tmp_path / "other", "--adapter", "lora")
    assert code == 1
    assert "Known: zeroi2v, linear_probe, full" in told


@pytest.fixture
def clouds(tmp_path: Path) -> Path:
    from mmkit.data.drawn.shapes import drawn_shape

    rng = np.random.default_rng(0)
    for name in ("chair", "bottle"):
        (tmp_path / "clouds" / name).mkdir(parents=True)
        for i in range(6):
            np.save(tmp_path / "clouds" / name / f"{i}.npy", drawn_shape(rng, name, 300)[0])
    return tmp_path / "clouds"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["point_peft", "ssf", "full"])
def test_clouds(clouds: Path, tmp_path: Path, method: str):
    out = tmp_path / "out"
    words = ("point-cloud-classification", clouds, out, "--adapter", method, "--val", 0.34)
    code, planned = run(*words, "--dry-run")
    assert code == 0, planned
    assert not out.exists()
    code, told = run(*words)
    assert code == 0, told
    check_report(out, 4)
    assert f"{json.loads((out / 'report.json').read_text())['trainable_parameters']:,} of " in planned
    adapter = {} if method == "full" else {"adapter": out / "adapter"}
    classify = mmkit.pipeline("point-cloud-classification", out / "model", **adapter)
    report = json.loads((out / "report.json").read_text())["answers"]
    wrong = {row["file"]: row["answer"] for row in report["most_wrong"]}
    answer = classify(np.load(clouds / "chair" / "0.npy"))
    assert answer.label in ("chair", "bottle")
    for file, label in wrong.items():
        assert classify(np.load(clouds / file)).label == label, "the folder answers as the training did"


def test_what_is_no_folder_of_examples_is_said(tmp_path: Path):
    (tmp_path / "a").mkdir()
    for task in ("video-classification", "point-cloud-classification"):
        code, told = run(task, tmp_path, tmp_path / "out")
        assert code == 1, told
        code, told = run(task, tmp_path, tmp_path / "out", "--folds", 3)
        assert "--folds means nothing" in told
    assert not (tmp_path / "out").exists()


REFUSED = {
    "image-classification": {"steps_per_epoch"},
    "segmentation": {"steps_per_epoch", "mixup"},
    "video-classification": {"steps_per_epoch", "cutmix"},
    "point-cloud-classification": {"steps_per_epoch", "mixup", "cutmix", "mixup_prob"},
    "text-to-image": {*fit_fields()} - {"max_steps", "batch_size", "lr", "ema_decay", "progress"},
}
VALUES = {
    "schedule": "constant", "optimizer": "sgd", "mixed_precision": "bf16", "class_weights": "balanced", "sampling": "balanced",
    "monitor": "-loss", "device": "cpu", "mixup_prob": 0.5, "ema_decay": 0.5, "label_smoothing": 0.2,
}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_every_option_acts_or_is_refused_by_its_name_before_anything_is_read(task: str, tmp_path: Path):
    refused = set()
    for name, (kind, _) in fit_fields().items():
        option = f"--{name.replace('_', '-')}"
        words = (
            [f"--no-{option[2:]}" if name == "progress" else option] if kind is bool else [option, VALUES.get(name, 1)]
        )
        found = CliRunner().invoke(
            app,
            [
                "finetune",
                "--task",
                task,
                "--data",
                str(tmp_path / "nowhere"),
                "--output",
                str(tmp_path / "out"),
                *map(str, words),
            ],
        )
        told = " ".join(found.output.split())
        assert found.exit_code == 1, (option, told)
        assert "loss_fn" not in told, option
        if f"{option} means nothing for --task {task}" in told:
            refused.add(name)
        else:
            assert "nowhere" in told, (option, told)
    assert refused == REFUSED[task]
    assert not (tmp_path / "out").exists()


LOSS_OPTIONS = {
    "label_smoothing": 0.3,
    "class_weights": "balanced",
    "sampling": "balanced",
    "mixup": 0.8,
    "cutmix": 0.8,
}


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    from PIL import Image

    from mmkit.data.drawn.scans import sample_picture

    for part in ("images", "masks"):
        (tmp_path / "cells" / part).mkdir(parents=True)
    for i in range(6):
        image, labels = sample_picture(i, 48)
        Image.fromarray(image).save(tmp_path / "cells" / "images" / f"{i}.png")
        Image.fromarray(labels * 255).save(tmp_path / "cells" / "masks" / f"{i}.png")
    return tmp_path / "cells"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "data"),
    [("segmentation", "masks"), ("video-classification", "clips"), ("point-cloud-classification", "clouds")],
)
def test_options_of_the_loss_act_on_the_training(task: str, data: str, request: pytest.FixtureRequest, tmp_path: Path):
    folder = request.getfixturevalue(data)
    first = sorted(p for p in folder.iterdir() if p.is_dir())[0]
    if task != "segmentation":
        for path in sorted(first.iterdir())[:3]:
            path.unlink()  # classes of unequal size
    losses = {}
    for name, value in {"": "", **LOSS_OPTIONS}.items():
        if name in REFUSED[task]:
            continue
        words = ["--steps", 2, "--batch-size", 4, *([f"--{name.replace('_', '-')}", value] if name else [])]
        code, told = run(task, folder, tmp_path / f"out{name}", "--val", 0, *words)
        assert code == 0, told
        losses[name] = json.loads((tmp_path / f"out{name}" / "report.json").read_text())["history"][-1]["train_loss"]
    assert len(set(losses.values())) == len(losses), losses


def test_what_cannot_act_is_said_in_python_too(masks: Path, tmp_path: Path):
    from mmkit.errors import InputError
    from mmkit.vision.medical import finetune

    with pytest.raises(InputError, match="mixup means nothing here"):
        finetune(tmp_path / "nowhere", mixup=0.5)
    with pytest.raises(InputError, match="nowhere is not a folder"):
        finetune(tmp_path / "nowhere", mixup=0.0)  # as run.toml has it
    with pytest.raises(InputError, match="batch_size of two or more"):
        finetune(masks, cutmix=0.5, batch_size=1)
    with pytest.raises(InputError, match="monitor is one of dice"):
        finetune(masks, monitor="accuracy")


@pytest.mark.parametrize(
    ("task", "method"),
    [
        ("video-classification", "full"),
        ("video-classification", "linear_probe"),
        ("point-cloud-classification", "full"),
        ("text-to-image", "full"),
    ],
)
def test_settings_of_a_method_without_any_are_refused(task: str, method: str, tmp_path: Path):
    words = [
        "finetune",
        "--task",
        task,
        "--data",
        str(tmp_path),
        "--adapter",
        method,
        "--set",
        "r=8",
        "--output",
        str(tmp_path / "out"),
    ]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 1
    assert f"{method} has no settings; r cannot be set" in " ".join(found.output.split())
