"""`mmkit finetune --task segmentation`: images and masks from a folder to a folder that answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import mmkit
from mmkit.cli import app
from mmkit.data.drawn.scans import sample_picture, sample_volume
from mmkit.errors import CheckpointError, InputError, RunDiffersError
from mmkit.vision.medical import MedicalSegmentationPipeline, UNet, find_pairs, finetune
from mmkit.vision.medical.metrics import confusion, mean_dice, overlaps

QUICK = {"max_steps": 2, "progress": False, "batch_size": 2}


def draw(folder: Path, count: int, first: int = 0, masks: str = "masks") -> Path:
    """Small drawn micrographs with 0/255 masks."""
    for part in ("images", masks):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        image, labels = sample_picture(i, 48)
        Image.fromarray(image).save(folder / "images" / f"{i}.png")
        Image.fromarray(labels * 255).save(folder / masks / f"{i}.png")
    return folder


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    return draw(tmp_path / "cells", 8)


def run(*words: object) -> tuple[int, str]:
    found = CliRunner().invoke(app, ["finetune", *map(str, words)])
    assert not found.exception or isinstance(found.exception, SystemExit), found.exception
    return found.exit_code, " ".join(found.output.split())


def test_a_folder_of_pictures_and_masks_becomes_a_folder_that_answers(cells: Path, tmp_path: Path):
    (cells / "classes.txt").write_text("background\n<b>nucleus\n")
    out = tmp_path / "out"
    words = ("--task", "segmentation", "--data", cells, "--output", out, "--steps", 3, "--val", 0.25, "--no-progress")
    code, told = run(*words, "--dry-run")
    assert code == 0, told
    assert "6 training examples and 2 held back, of 2 classes: background, <b>nucleus." in told
    assert not out.exists()
    code, told = run(*words, "--set", "patch=32", "--set", "touching=true")
    assert code == 0, told
    assert "Mean Dice" in told
    report = json.loads((out / "report.json").read_text())
    (row,) = report["per_class"]
    assert row["class"] == "<b>nucleus"
    assert row["pixels"] > 0
    assert report["best"]["dice"] == pytest.approx(report["dice"]), (
        "the weights that are saved are those that were best"
    )
    assert len(report["worst"]) == 2
    page = (out / "report.html").read_text()
    assert "<b>nucleus" not in page
    assert "&lt;b&gt;nucleus" in page
    assert page.count("data:image/webp") == 2
    assert "Dice, %" in page
    assert "<script" not in page
    ask = mmkit.pipeline("medical-segmentation", out / "model")
    assert ask.class_names == ("background", "<b>nucleus")
    assert ask.window == [32, 32]
    assert ask.touching is True
    assert ask.unlike(cells / "images" / "0.png") <= 1 < ask.unlike(np.full((64, 64, 3), 255, np.uint8))
    tables = []
    for row in report["worst"]:
        name = Path(row["file"]).name
        truth = np.asarray(Image.open(cells / "masks" / name)) // 255
        tables.append(confusion(ask(cells / "images" / name).mask, truth.astype(int), 2))
        assert mean_dice(tables[-1]) == pytest.approx(row["dice"], abs=1e-3), "it answers as the training did"
    assert mean_dice(sum(tables)) == pytest.approx(report["dice"], abs=1e-3)
    assert "--lr:" in run("--config", out / "run.toml", "--lr", 0.5)[1]
    code, told = run("--config", out / "run.toml", "--no-progress")
    assert code == 0, told
    (out / "model" / "segmentation.json").write_text("[]")
    (out / "model" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"would be lost: mine\.txt"):
        finetune(cells, output_dir=out, **QUICK)
    (out / "model" / "mine.txt").unlink()
    with pytest.raises(CheckpointError, match=r"changed: segmentation\.json"):
        mmkit.pipeline("medical-segmentation", out / "model")


def test_training_goes_on_where_it_stopped(cells: Path, tmp_path: Path):
    whole = finetune(cells, settings={"patch": 16}, output_dir=tmp_path / "a", **QUICK | {"max_steps": 4})
    assert whole.folder == tmp_path / "a"
    finetune(cells, settings={"patch": 16}, output_dir=tmp_path / "b", **QUICK | {"max_steps": 4, "max_seconds": 1e-9})
    again = finetune(cells, settings={"patch": 16}, output_dir=tmp_path / "b", **QUICK | {"max_steps": 4})
    assert again.fit.losses == whole.fit.losses
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_splits_of_the_folder_count_and_starts_get_a_new_head(tmp_path: Path):
    draw(tmp_path / "d" / "train", 2)
    draw(tmp_path / "d" / "val", 1, 5, masks="labels")
    for split, i in (("train", 0), ("train", 1), ("val", 5)):
        folder = "labels" if split == "val" else "masks"
        labels = sample_picture(i, 48)[1].astype(np.uint16) * 2
        labels[0, 0] = 1
        Image.fromarray(labels).save(tmp_path / "d" / split / folder / f"{i}.png")  # 16 bits
    probe = finetune(tmp_path / "d", "unet_nuclei", "linear_probe", **QUICK)
    assert probe.class_names == ("background", "class 1", "class 2")
    start = mmkit.load_weights("unet_nuclei").state_dict()
    moved = {k for k, v in probe.model.state_dict().items() if k not in start or not torch.equal(v, start[k])}
    assert moved == {"head.weight", "head.bias"}
    assert probe.fit.trainable_parameters == sum(p.numel() for p in probe.model.head.parameters())
    light = finetune(tmp_path / "d", "lightm_unet_nuclei", **QUICK)
    assert light.model.num_classes == 3
    with pytest.raises(InputError, match=r"Start from .*unet_nuclei"):
        finetune(tmp_path / "d", "unet", "linear_probe")
    with pytest.raises(InputError, match="segments volumes of 1 channel"):
        finetune(tmp_path / "d", "unet_hippocampus")
    with pytest.raises(InputError, match="Did you mean"):
        finetune(tmp_path / "d", "unet_nuclee")


def test_volumes_train_lying_as_they_like(tmp_path: Path):
    import nibabel

    for part in ("images", "labels"):
        (tmp_path / "scans" / part).mkdir(parents=True)
    for i in range(4):
        image, labels = sample_volume(i, (24, 20, 18))
        affine = np.diag([-1.0, 2.0, 1.0, 1.0]) if i % 2 else np.eye(4)
        for part, data in (("images", image), ("labels", labels.astype(np.float32))):
            nibabel.Nifti1Image(data, affine).to_filename(tmp_path / "scans" / part / f"{i}.nii.gz")
    found = finetune(tmp_path / "scans", "lightm_unet", output_dir=tmp_path / "out", **QUICK)
    assert [row["class"] for row in found.per_class] == ["class 1", "class 2"]
    result = mmkit.pipeline("medical-segmentation", tmp_path / "out" / "model")(tmp_path / "scans/images/1.nii.gz")
    assert result.mask.shape == (24, 20, 18)
    assert result.spacing == (1, 2, 1)
    nibabel.Nifti1Image(labels, np.diag([1.0, 1.0, 3.0, 1.0])).to_filename(tmp_path / "scans/labels/2.nii.gz")
    with pytest.raises(InputError, match="lies otherwise in space"):
        finetune(tmp_path / "scans")
    image[0, 0, 0] = np.nan
    nibabel.Nifti1Image(image, np.eye(4)).to_filename(tmp_path / "scans/images/0.nii.gz")
    with pytest.raises(InputError, match=r"0\.nii\.gz has 1 NaN"):
        finetune(tmp_path / "scans")


def palette(folder: Path) -> None:
    mask = Image.open(folder / "masks" / "0.png").point(lambda v: v // 255)
    mask.putpalette([0, 0, 0, 200, 30, 30])
    mask.save(folder / "masks" / "0.png")


def numbers(folder: Path) -> None:
    Image.fromarray(np.arange(48 * 48, dtype=np.uint16).reshape(48, 48)).save(folder / "masks" / "0.png")


def jpeg(folder: Path) -> None:
    Image.open(folder / "masks" / "0.png").save(folder / "masks" / "0.jpg")
    (folder / "masks" / "0.png").unlink()


def named(*names: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "classes.txt").write_text("\n".join(names)) and None


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda f: (f / "masks" / "3.png").unlink(), "lacks the mask of 1 of 8 images: 3.png"),
        (lambda f: [p.unlink() for p in (f / "images").iterdir()], "holds no pictures"),
        (lambda f: (f / "masks").rename(f / "truth"), "holds no masks/"),
        (lambda f: [p.unlink() for p in (f / "images").iterdir() if p.stem != "0"], "at least two images"),
        (lambda f: Image.new("L", (48, 40)).save(f / "masks" / "3.png"), "48 x 48 .* but .* 40 x 48"),
        (lambda f: (f / "images" / "3.png").write_bytes(b"no picture"), "3.png cannot be read as a picture"),
        (lambda f: Image.new("RGB", (48, 48)).save(f / "images" / "3.jpg"), "have the same name"),
        (lambda f: [Image.new("L", (48, 48)).save(p) for p in (f / "masks").iterdir()], "nothing but 0"),
        (jpeg, "JPEG may change the numbers"),
        (numbers, "numbers up to 2303"),
        (named("background", "a", "b"), "anything but background. 255 is ignored; classes are numbered 0, 1, 2"),
        (named("a", "b"), "the first is called background"),
        (named("nucleus"), "names 1 classes"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_on_is_said_before_anything_is_written(
    cells: Path, tmp_path: Path, spoil: Callable[[Path], object], told: str
):
    spoil(cells)
    with pytest.raises(InputError, match=told):
        finetune(cells, output_dir=tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists()


def test_splits_may_lie_in_the_folders_too(tmp_path: Path):
    for split, first in (("train", 0), ("valid", 4)):
        draw(tmp_path / split, 3, first)
        for part in ("images", "masks"):
            (tmp_path / "d" / part).mkdir(parents=True, exist_ok=True)
            (tmp_path / split / part).rename(tmp_path / "d" / part / split)
    pairs = find_pairs(tmp_path / "d")
    assert [image.stem for image, _ in pairs.train] == ["0", "1", "2"]
    assert [mask.stem for _, mask in pairs.held or []] == ["4", "5", "6"]
    (tmp_path / "d/images/train").rename(tmp_path / "d/images/site a")
    (tmp_path / "d/masks/train").rename(tmp_path / "d/masks/site a")
    pairs = find_pairs(tmp_path / "d")
    assert pairs.held is None
    assert len(pairs.train) == 6, "folders that are no splits are all for training"


def test_masks_of_every_usual_kind_are_read_alike(cells: Path, tmp_path: Path):
    pairs = find_pairs(cells)
    wanted = pairs.case(pairs.train[0])[1]
    for change in (palette, jpeg):
        folder = draw(tmp_path / change.__name__, 8)
        change(folder)
        named("background", "nucleus")(folder)
        pairs = find_pairs(folder)
        assert torch.equal(pairs.case(pairs.train[0])[1], wanted)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"patsh": 16}, "Did you mean 'patch'"),
        ({"patch": [16]}, "2 of them, not"),
        ({"patch": "large"}, "not 'large'"),
        ({"touching": 1}, "touching is true or false"),
        ({"mirror": [2]}, "axes in 0..1"),
        ({"turn": True, "patch": [16, 32]}, "first two sizes are equal"),
    ],
)
def test_settings_that_mean_nothing_are_told(cells: Path, settings: dict[str, object], told: str):
    with pytest.raises(InputError, match=told):
        finetune(cells, settings=settings, **QUICK)


def test_overlaps_are_those_of_the_definition_and_ignore_classes_that_are_nowhere():
    truth, answer = np.array([0, 1, 1, 1]), np.array([0, 0, 1, 1])
    dice, iou = overlaps(confusion(answer, truth, 3))
    assert dice[:2] == pytest.approx([2 / 3, 4 / 5])
    assert iou[:2] == pytest.approx([1 / 2, 2 / 3])
    assert np.isnan(dice[2])
    assert mean_dice(confusion(answer, truth, 3)) == pytest.approx(4 / 5)


def test_a_pipeline_is_saved_with_what_it_knows_and_foreign_networks_are_refused(tmp_path: Path):
    bundled = mmkit.pipeline("medical-segmentation")
    bundled.save_pretrained(tmp_path / "copy")
    again = mmkit.pipeline("medical-segmentation", tmp_path / "copy")
    picture = sample_picture(3, 96)[0]
    assert np.array_equal(again(picture).mask, bundled(picture).mask)
    assert again.class_names == bundled.class_names
    assert again.unlike(picture) == bundled.unlike(picture)
    UNet().save_pretrained(tmp_path / "plain")  # knows no names
    assert mmkit.pipeline("medical-segmentation", tmp_path / "plain").class_names == ("background", "class 1")
    foreign = torch.nn.Conv2d(3, 2, 1)
    foreign.spatial_dims, foreign.in_chans, foreign.num_classes = 2, 3, 2
    with pytest.raises(InputError, match="no model of mmkit"):
        MedicalSegmentationPipeline(foreign).save_pretrained(tmp_path / "foreign")


@pytest.fixture
def streets(tmp_path: Path) -> Path:
    """Three classes, the lower quarter of each mask ignored."""
    folder = draw(tmp_path / "streets", 8)
    for path in (folder / "masks").iterdir():
        labels = np.asarray(Image.open(path)) // 255
        labels[:24] *= 2
        labels[36:] = 255
        Image.fromarray(labels).save(path)
    return folder


def test_ignored_pixels_count_nowhere_and_are_told(streets: Path, tmp_path: Path):
    out = tmp_path / "out"
    words = (
        "--task",
        "segmentation",
        "--data",
        streets,
        "--output",
        out,
        "--steps",
        2,
        "--set",
        "patch=32",
        "--no-progress",
    )
    code, told = run(*words, "--dry-run")
    assert code == 0, told
    assert (
        "of 3 classes: background, class 1, class 2. 25.0 % (held back: 25.0 %) of the pixels are ignored: 255 in the masks."
        in told
    )
    assert run(*words)[0] == 0
    report = json.loads((out / "report.json").read_text())
    ask = mmkit.pipeline("medical-segmentation", out / "model")
    for row in report["worst"]:
        name = Path(row["file"]).name
        truth = np.asarray(Image.open(streets / "masks" / name)).astype(int)
        known = truth != 255
        own = confusion(ask(streets / "images" / name).mask[known], truth[known], 3)
        assert mean_dice(own) == pytest.approx(row["dice"], abs=1e-3)
    assert sum(row["pixels"] for row in report["per_class"]) < 2 * 36 * 48, "of 2 images, without what is ignored"
    assert "25.0 %" in (out / "report.html").read_text()
    assert "ignored" not in run("--task", "segmentation", "--data", draw(tmp_path / "plain", 4), "--dry-run")[1]


def test_a_run_beyond_the_memory_is_the_same_and_goes_on(
    streets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    options = {
        "settings": {"patch": 16},
        **QUICK | {"max_steps": 4},
        "class_weights": "balanced",
        "sampling": "balanced",
    }
    whole = finetune(streets, output_dir=tmp_path / "a", **options)
    real = type(find_pairs(streets)).cases
    monkeypatch.setattr("mmkit.vision.medical.pairs.Pairs.cases", lambda self: real(self, kept=20_000))
    finetune(streets, output_dir=tmp_path / "b", **options | {"max_seconds": 1e-9})
    again = finetune(streets, output_dir=tmp_path / "b", **options)
    assert again.fit.losses == whole.fit.losses
    assert again.dice == whole.dice
    (streets / "masks" / "5.png").write_bytes((streets / "masks" / "4.png").read_bytes())
    with pytest.raises(InputError, match="holds a run that differs"):
        finetune(streets, output_dir=tmp_path / "b", **options)


def test_a_changed_setting_of_the_loss_is_told_by_its_name_alone(streets: Path, tmp_path: Path):
    finetune(streets, settings={"patch": 16}, output_dir=tmp_path / "a", **QUICK)
    for name, value in (
        ("label_smoothing", 0.1),
        ("class_weights", "balanced"),
        ("sampling", "balanced"),
        ("cutmix", 0.5),
    ):
        with pytest.raises(RunDiffersError) as told:
            finetune(streets, settings={"patch": 16}, output_dir=tmp_path / "a", **QUICK, **{name: value})
        assert list(told.value.changes) == [name]


def exported(*words: object) -> tuple[int, str]:
    found = CliRunner().invoke(app, ["export", *map(str, words)])
    assert not found.exception or isinstance(found.exception, SystemExit), found.exception
    return found.exit_code, " ".join(found.output.split())


@pytest.mark.slow
def test_a_result_is_exported_and_answers_as_the_pipeline_does(cells: Path, tmp_path: Path):
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    finetune(cells, settings={"patch": 32}, output_dir=tmp_path / "out", **QUICK)
    code, told = exported(tmp_path / "out", "--output", tmp_path / "m.onnx")
    assert code == 0, told
    assert "differ from the original's by" in told
    assert "It takes B x 3 x 32 x 32." in told
    session = ort.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    given = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    ask = mmkit.pipeline("medical-segmentation", tmp_path / "out" / "model")
    with torch.no_grad():
        wanted = ask.model(given)
    (found,) = session.run(None, {session.get_inputs()[0].name: given.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), wanted, atol=1e-4, rtol=1e-4)
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["class_names"]) == ["background", "class 1"]
    assert json.loads(about["window"]) == [32, 32]
    assert exported(tmp_path / "out" / "model", "--format", "torch-export", "--output", tmp_path / "m.pt2")[0] == 0
    with torch.no_grad():
        torch.testing.assert_close(
            torch.export.load(str(tmp_path / "m.pt2")).module()(given), wanted, atol=1e-4, rtol=1e-4
        )


def test_what_cannot_be_exported_is_said_and_nothing_is_written(cells: Path, tmp_path: Path):
    finetune(cells, settings={"patch": 16}, output_dir=tmp_path / "out", **QUICK)
    for words, told in (
        (("--format", "timm", "--output", "m"), "goes to onnx or torch-export, not to 'timm'"),
        (("--output", "m.pt2"), "ends in .onnx, not 'm.pt2'"),
        (("--output", "m.onnx", "--pretrained"), "--pretrained means nothing for a result of --task segmentation"),
    ):
        code, output = exported(tmp_path / "out", *[tmp_path / w if w.startswith("m") else w for w in words])
        assert code == 1
        assert told in output
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("m.")] == []
