"""The main job: fine-tune, save, load elsewhere, merge, predict; through Python and through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import mmkit
from mmkit.adapters import attached_adapters
from mmkit.backbones import create_backbone, save_backbone
from mmkit.cli import app
from mmkit.data import load_digits
from mmkit.errors import CheckpointError, InputError
from mmkit.vision.classification import finetune, finetune_methods, load_finetuned, prepare, train_prepared


@pytest.fixture(scope="module")
def few_digits():  # type: ignore[no-untyped-def]
    digits = load_digits((0, 1, 2))
    return digits.subset(range(0, len(digits), 3))


def test_plan_before_training_says_what_is_trained(few_digits) -> None:  # type: ignore[no-untyped-def]
    about = prepare(few_digits, "tiny_vit", adapter="ssf").describe()
    assert about["trainable_parameters"] < 0.05 * about["total_parameters"]
    assert "blocks.0.attn.qkv" in about["sites"]
    assert about["class_names"] == ["0", "1", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ssf", "lora", "full"])
def test_result_is_saved_loaded_and_merged(few_digits, method: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    prepared = prepare(few_digits, "tiny_vit", adapter=method)
    result = train_prepared(prepared, output_dir=tmp_path / "run", epochs=2, progress=False)
    assert result.accuracy > 0.6  # chance is 0.33
    images = torch.stack([prepared.val[i][0] for i in range(8)])
    with torch.no_grad():
        expected = prepared.model.eval()(images)
        model = load_finetuned(tmp_path / "run")
        assert torch.equal(model(images), expected)
        for adapter in attached_adapters(model).values():
            adapter.merge()
        torch.testing.assert_close(model(images), expected, atol=5e-5, rtol=1e-4)
    classify = mmkit.pipeline("image-classification", tmp_path / "run")
    picture = Image.fromarray(few_digits.images[0])
    answer = classify(picture, top_k=2)
    assert answer.labels[0] in "012"
    assert sum(answer.scores) <= 1.0001
    assert answer.plot().size[0] > 300
    assert json.loads(answer.save(tmp_path / "a.json").read_text())["labels"] == answer.labels
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["accuracy"] == result.accuracy
    assert (report["merge_error"] is None) == (method == "full")


def test_a_random_backbone_travels_with_its_adapter(few_digits, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    small = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2}
    prepared = prepare(few_digits, "vit_tiny_patch16_224", "bitfit", overrides=small)
    train_prepared(prepared, output_dir=tmp_path / "run", epochs=1, progress=False)
    images = torch.stack([prepared.val[i][0] for i in range(4)])
    with torch.no_grad():
        torch.testing.assert_close(
            load_finetuned(tmp_path / "run")(images), prepared.model.eval()(images), atol=1e-6, rtol=0
        )


def test_a_backbone_folder_is_found_from_anywhere(few_digits, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    save_backbone(create_backbone("tiny_vit"), "photos")
    prepared = prepare(few_digits, "photos", "bitfit")
    assert not prepared.keep_backbone
    train_prepared(prepared, output_dir="run", epochs=1, progress=False)
    monkeypatch.chdir(tmp_path)
    images = torch.stack([prepared.val[i][0] for i in range(4)])
    with torch.no_grad():
        assert torch.equal(load_finetuned("work/run")(images), prepared.model.eval()(images))


def test_names_that_do_not_exist(few_digits, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match="ssf"):
        prepare(few_digits, "tiny_vit", adapter="sssf")
    with pytest.raises(InputError, match="tiny_vit"):
        prepare(few_digits, "tinyvit")
    with pytest.raises(InputError):
        load_finetuned(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_finetuned(tmp_path / "empty")
    assert "full" in finetune_methods()


def test_one_class_is_refused() -> None:
    with pytest.raises(InputError, match="two classes"):
        finetune(load_digits((3,)), "tiny_vit")


def test_pipeline_refuses_bad_input() -> None:
    classify = mmkit.pipeline("image-classification")
    with pytest.raises(InputError, match="NaN"):
        classify(np.full((8, 8, 3), np.nan))
    with pytest.raises(InputError, match="top_k"):
        classify(np.zeros((8, 8, 3), np.uint8), top_k=0)
    with pytest.raises(InputError, match="does not exist"):
        classify("no_such_picture.png")
    with pytest.raises(InputError, match="Did you mean"):
        mmkit.pipeline("image-classificatoin")
    with pytest.raises(InputError, match="device"):
        mmkit.pipeline("image-classification", device="tpu-ish")


@pytest.fixture
def folder_of_images(tmp_path: Path, few_digits) -> Path:  # type: ignore[no-untyped-def]
    root = tmp_path / "images"
    for i, (image, label) in enumerate(zip(few_digits.images, few_digits.labels, strict=True)):
        if i < 60:
            (root / f"digit_{label}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(root / f"digit_{label}" / f"{i}.png")
    return root


@pytest.mark.slow
def test_command_line_from_folder_to_prediction(folder_of_images: Path, tmp_path: Path) -> None:
    call = CliRunner().invoke
    out, merged = str(tmp_path / "out"), str(tmp_path / "merged")
    done = call(
        app, ["finetune", "--data", str(folder_of_images), "--backbone", "tiny_vit", "--epochs", "1", "--output", out]
    )
    assert done.exit_code == 0, done.output
    assert "trains" in done.output
    assert call(app, ["merge", out, "--output", merged]).exit_code == 0
    picture = str(next(folder_of_images.rglob("*.png")))
    first = call(app, ["predict", picture, "--model", out])
    second = call(app, ["predict", picture, "--model", merged])
    assert first.exit_code == 0
    assert first.output == second.output
    assert "digit_" in first.output
    assert "ssf" in call(app, ["info", out]).output
    for what in ("adapters", "models", "tasks", "weights", "apps"):
        assert call(app, ["list", what]).exit_code == 0


def test_command_line_errors_are_one_line(tmp_path: Path) -> None:
    for args in (
        ["finetune", "--data", str(tmp_path / "none")],
        ["list", "adaptors"],
        ["merge", str(tmp_path), "--output", str(tmp_path / "x")],
        ["predict", str(tmp_path / "none.png")],
    ):
        result = CliRunner().invoke(app, args)
        assert result.exit_code == 1, args
        assert "Error:" in result.output
        assert "Traceback" not in result.output


def test_the_picture_of_a_result_stays_small_for_long_strips() -> None:
    from PIL import Image

    from mmkit.vision.classification.result import ImageClassification

    shown = ImageClassification(["a"], [1.0], Image.new("RGB", (1_000_000, 1))).plot()
    assert shown.size[0] * shown.size[1] < 1_000_000
