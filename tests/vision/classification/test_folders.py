"""Fine-tuning folders tell the truth: only the same run is continued, and what is read back is what was trained together."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mmkit.adapters import attached_adapters
from mmkit.backbones import create_backbone, save_backbone
from mmkit.cli import app
from mmkit.data import load_digits, open_dataset
from mmkit.errors import CheckpointError, InputError, RunDiffersError, StorageError
from mmkit.storage import open_folder
from mmkit.vision.classification import demo
from mmkit.vision.classification.preparing import prepare
from mmkit.vision.classification.report import report_table
from mmkit.vision.classification.saving import load_finetuned, save_run
from mmkit.vision.classification.training import finetune, train_prepared

QUICK = {"backbone": "tiny_vit", "adapter": "linear_probe", "epochs": 1, "lr": 0.05}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    for name, colour in {"cat": (200, 40, 40), "dog": (40, 40, 200)}.items():
        (root / name).mkdir(parents=True)
        for i in range(8):
            noise = np.random.default_rng(i).integers(-20, 20, (32, 32, 3)) + np.array(colour)
            Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(root / name / f"{i}.png")
    return root


def command(*args: object):  # type: ignore[no-untyped-def]
    return CliRunner().invoke(app, [str(a) for a in args])


def train(pictures: Path, output: Path, *more: object):  # type: ignore[no-untyped-def]
    fixed = ("--backbone", "tiny_vit", "--adapter", "linear_probe", "--lr", 0.05)
    return command("finetune", "--data", pictures, "--output", output, *fixed, *(more or ("--epochs", 1)))


def trained(folder: Path) -> dict[str, torch.Tensor]:
    return attached_adapters(load_finetuned(folder))["default"].state_dict()


def class_names(folder: Path) -> list[str]:
    return list(load_finetuned(folder).backbone_info.class_names)  # type: ignore[union-attr, arg-type]


# --------------------------------------------------------------------------------------------------- a run is its data


def test_the_command_names_what_differs_and_offers_to_start_over(pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert train(pictures, output).exit_code == 0
    (pictures / "cat").rename(pictures / "zebra")
    refused = train(pictures, output)
    assert refused.exit_code == 1
    told = " ".join(refused.output.split())
    assert "Error:" in told
    assert "--data: class 'cat' is now 'zebra'" in told
    assert "--restart" in told
    assert "resume" not in told
    assert class_names(output) == ["cat", "dog"]
    assert train(pictures, output, "--epochs", 1, "--restart").exit_code == 0
    assert class_names(output) == ["dog", "zebra"]
    assert "lr" not in train(pictures, output).output.split("Error")[-1]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--seed", 1), r"--seed: 0 is now 1"),
        (("--val", 0.5), r"--val: 0\.2 is now 0\.5"),
        (("--batch-size", 4), r"--batch-size: 32 is now 4"),
        (("--augment",), r"--augment: False is now True"),
        (("--adapter", "bitfit"), r"--adapter: 'linear_probe' is now 'bitfit'"),
        (("--adapter", "full"), r"--adapter: 'linear_probe' is now 'full'"),
    ],
)
def test_options_that_decide_the_result_are_named(pictures: Path, tmp_path: Path, more, told: str) -> None:  # type: ignore[no-untyped-def]
    train(pictures, tmp_path / "out")
    refused = train(pictures, tmp_path / "out", "--epochs", 1, *more)
    assert refused.exit_code == 1
    assert re.search(told, " ".join(refused.output.split())), refused.output


def test_corrected_labels_are_another_run(pictures: Path, tmp_path: Path) -> None:
    def write(first: str, second: str) -> None:
        rows = [f"{p.relative_to(pictures)},{first if p.parent.name == 'cat' else second}\n" for p in files]
        (pictures / "index.csv").write_text("path,label\n" + "".join(rows))

    files = sorted(pictures.rglob("*.png"))
    write("a", "b")
    finetune(pictures, **QUICK, output_dir=tmp_path / "out")
    write("b", "a")
    with pytest.raises(RunDiffersError, match=r"data: \w+/\d\.png was 'a' and is now 'b'"):
        finetune(pictures, **QUICK, output_dir=tmp_path / "out", resume=True)
    with pytest.warns(UserWarning, match="holds a finished run that differs"):
        finetune(
            pictures, **QUICK, output_dir=tmp_path / "out"
        )  # "auto": the finished run is replaced, and that is said


def test_an_unfinished_other_run_is_never_replaced_by_itself(pictures: Path, tmp_path: Path) -> None:
    prepared = prepare(pictures, "tiny_vit", "linear_probe")
    train_prepared(prepared, output_dir=tmp_path / "out", epochs=3, progress=False, should_stop=lambda: True)
    (pictures / "cat").rename(pictures / "zebra")
    with pytest.raises(RunDiffersError, match="class 'cat' is now 'zebra'"):
        finetune(pictures, **QUICK, output_dir=tmp_path / "out")
    assert finetune(pictures, **QUICK, output_dir=tmp_path / "out", resume=False).fit.stopped == "finished"


def test_other_weights_to_start_from_are_another_run(pictures: Path, tmp_path: Path) -> None:
    model = create_backbone("tiny_vit")
    save_backbone(model, tmp_path / "a")
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.mul_(1.01)  # type: ignore[union-attr, index]
    save_backbone(model, tmp_path / "b")
    for method in ("linear_probe", "full"):
        options = {"adapter": method, "epochs": 1, "output_dir": tmp_path / method, "resume": True}
        finetune(pictures, "tiny_vit", checkpoint_path=tmp_path / "a" / "model.safetensors", **options)  # type: ignore[arg-type]
        with pytest.raises(RunDiffersError, match="weights"):
            finetune(pictures, "tiny_vit", checkpoint_path=tmp_path / "b" / "model.safetensors", **options)  # type: ignore[arg-type]


def test_a_moved_data_set_and_more_epochs_continue(pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    train(pictures, output)
    first = json.loads((output / "report.json").read_text())
    shutil.move(pictures, tmp_path / "elsewhere")
    assert "had ended before" in train(tmp_path / "elsewhere", output).output
    assert train(tmp_path / "elsewhere", output, "--epochs", 3).exit_code == 0
    longer = json.loads((output / "report.json").read_text())
    assert longer["steps"] == 3 * first["steps"]
    assert longer["history"][0] == first["history"][0]
    assert "--epochs: 3 is now 2" in " ".join(train(tmp_path / "elsewhere", output, "--epochs", 2).output.split())


@pytest.mark.slow
def test_the_demo_continues_and_starts_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "METHODS", ("linear_probe", "bitfit"))
    monkeypatch.setattr(demo, "load_digits", lambda: load_digits((0, 1)).subset(range(60)))
    states = lambda: [p.stat().st_mtime_ns for p in sorted(tmp_path.rglob("state.json"))]  # noqa: E731
    first = demo.run_demo(tmp_path, epochs=1)
    before = states()
    demo.run_demo(tmp_path, epochs=1)
    assert states() == before  # nothing was trained again
    demo.run_demo(tmp_path, epochs=1, resume=False)
    assert states() != before
    assert demo.run_demo(tmp_path, epochs=2)["methods"][0]["steps"] == 2 * first["methods"][0]["steps"]


# ---------------------------------------------------------------------------------------------- one kind, whole, intact


def test_every_file_is_checked_the_backbone_and_the_report_included(tmp_path: Path) -> None:
    small = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2}
    prepared = prepare(load_digits((0, 1)).subset(range(40)), "vit_tiny_patch16_224", "bitfit", overrides=small)
    train_prepared(prepared, output_dir=tmp_path / "out", epochs=1, progress=False)
    manifest = open_folder(tmp_path / "out", "finetuned")
    assert manifest is not None
    assert {"adapter_model.safetensors", "backbone/model.safetensors", "report.json"} <= manifest["files"].keys()
    for name in ("backbone/model.safetensors", "backbone/config.json", "adapter_model.safetensors", "report.json"):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(tmp_path / "out", tmp_path / "copy")
        file = tmp_path / "copy" / name
        file.write_bytes(file.read_bytes()[:-1] + b"?")
        with pytest.raises(CheckpointError, match=rf"changed: {name}"):
            load_finetuned(tmp_path / "copy")


def test_strangers_and_two_kinds_are_refused_by_name(pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    train(pictures, output)
    shutil.copy(output / "adapter_model.safetensors", output / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"not written with it: model\.safetensors"):
        load_finetuned(output)
    assert "model.safetensors" in train(pictures, output).output
    (output / "model.safetensors").unlink()
    (output / "mmkit.json").unlink()  # as an older version wrote it, with a second kind beside
    (output / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json.*config\.json"):
        load_finetuned(output)


def test_full_weights_replace_an_adapter_whole_and_back(pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    for method, file in (
        ("linear_probe", "adapter_config.json"),
        ("full", "config.json"),
        ("bitfit", "adapter_config.json"),
    ):
        finetune(pictures, "tiny_vit", method, epochs=1, output_dir=output, resume=False)
        assert [p.name for p in output.glob("*config.json")] == [file]
        assert class_names(output) == ["cat", "dog"]


def test_a_folder_of_somebody_else_is_refused_before_training(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "love.txt").write_text("x")
    for place, words in (("letters", "love.txt"), ("letters/love.txt", "is a file"), ("n" * 300, "too long")):
        refused = train(pictures, tmp_path / place)
        assert refused.exit_code == 1, refused.output
        assert words in " ".join(refused.output.split()).replace(" ", " ")
        assert "%" not in refused.output.split("Error")[0].split("parameters")[-1]
    assert sorted(os.listdir(tmp_path)) == ["letters", "pictures"]


@pytest.mark.slow
@pytest.mark.parametrize("stop", range(1, 9))
def test_no_crash_pairs_new_tensors_with_old_class_names(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    output = tmp_path / "out"
    finetune(pictures, **QUICK, output_dir=output)
    before = trained(output)
    (pictures / "cat").rename(pictures / "zebra")
    prepared = prepare(pictures, "tiny_vit", "linear_probe")
    train_prepared(prepared, output_dir=tmp_path / "new", epochs=2, lr=0.05, progress=False)
    after = trained(tmp_path / "new")
    calls, real = iter(range(1, 1000)), os.replace

    def replace(*args: str) -> None:
        if next(calls) == stop:
            raise OSError(28, "No space left on device")
        real(*args)

    monkeypatch.setattr("os.replace", replace)
    with contextlib.suppress(StorageError):
        save_run(prepared, output)
    monkeypatch.undo()
    found, names = trained(output), class_names(output)
    expected = before if names == ["cat", "dog"] else after
    assert all(torch.equal(found[k], expected[k]) for k in expected)
    assert sorted(os.listdir(tmp_path)) == ["new", "out", "pictures"]


def test_a_run_that_has_not_ended_is_no_model(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "training").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="has not ended"):
        load_finetuned(tmp_path / "out")


def test_the_output_stays_where_it_was_named(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    prepared = prepare(pictures, "tiny_vit", "linear_probe")
    move = lambda info: os.chdir(tmp_path / "elsewhere")  # noqa: E731
    result = train_prepared(prepared, output_dir="out", epochs=1, progress=False, on_step=move)
    assert result.folder == tmp_path / "out"
    assert class_names(tmp_path / "out") == ["cat", "dog"]
    assert not os.listdir(tmp_path / "elsewhere")


# ------------------------------------------------------------------------------------------------------ best and last


def test_best_and_last_are_named_and_what_they_were_measured_on(pictures: Path, tmp_path: Path) -> None:
    result = finetune(pictures, "tiny_vit", "linear_probe", epochs=2, output_dir=tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["best"], report["last"]) == (result.fit.best_metrics, result.fit.metrics)
    assert report["measured_on"] == "validation"
    assert report_table([report]).split("\n")[0].split()[:4] == ["method", "best", "accuracy", "last"]
    for split in ("train", "test"):
        shutil.copytree(pictures, tmp_path / "split" / split)
    told = train(tmp_path / "split", tmp_path / "other").output
    assert "16 test images" in told
    assert "of the 16 test images" in told


def test_a_test_split_gives_the_final_score_beside_validation_pictures(pictures: Path, tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        shutil.copytree(pictures, tmp_path / "split" / split)
    for i in range(8):  # the test pictures of one class show the other: half of the answers must be wrong there
        shutil.copy(pictures / "dog" / f"{i}.png", tmp_path / "split" / "test" / "cat" / f"{i}.png")
    told = train(tmp_path / "split", tmp_path / "out").output
    assert "16 validation images" in told
    assert "Test accuracy: 50.0 % of 16 images" in told
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["test_accuracy"], report["test_images"], report["measured_on"]) == (0.5, 16, "validation")
    assert open_dataset(tmp_path / "split").splits is not None


# -------------------------------------------------------------------------------------------------------- interruption


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_command_says_so_and_can_be_run_again(
    pictures: Path, tmp_path: Path, number: int, code: int
) -> None:
    args = [
        "finetune",
        "--data",
        str(pictures),
        "--backbone",
        "tiny_vit",
        "--adapter",
        "linear_probe",
        "--epochs",
        "100000",
        "--batch-size",
        "4",
    ]
    args += ["--output", str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, "-m", "mmkit.cli", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    log = tmp_path / "out" / "training" / "log.csv"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 3):
        time.sleep(0.02)
    again = subprocess.run([sys.executable, "-m", "mmkit.cli", *args], capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert f"in use by another run (process {process.pid}" in " ".join(again.stderr.split())
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == code, told
    assert re.search(r"Interrupted after \d+ steps; the state is saved in .*again to continue", " ".join(told.split()))
    assert "Traceback" not in told
    assert not (tmp_path / "out" / "mmkit.json").exists()
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".")]


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_interrupted_before_training_says_so(number: int, code: int) -> None:
    script = (
        "import os, signal, time, mmkit.cli as cli\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's child would ignore it\n"
        f"cli.COMMANDS.get = lambda name: (os.kill(os.getpid(), {int(number)}), time.sleep(60))\n"
        "cli.app(['finetune', '--data', 'x'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stderr.strip() in ("Interrupted.", "Terminated.")


def test_an_output_that_cannot_be_written_is_an_input_error_of_the_library(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        finetune(pictures, **QUICK, output_dir=tmp_path / "file")
