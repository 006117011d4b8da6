"""What may answer, how, and in which files: random and headless models, precision, the bundled photo model, `mmkit predict`."""

from __future__ import annotations

import copy
import csv
import io
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import mmkit
from mmkit import __version__
from mmkit.adapters import apply_adapter
from mmkit.backbones import create_backbone, image_info, save_backbone
from mmkit.cli import app
from mmkit.data import list_pictures
from mmkit.errors import CheckpointError, InputError
from mmkit.storage import write_safetensors
from mmkit.vision.classification import ImageClassificationPipeline
from mmkit.weights import weight_entry

SMALL = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2}


def picture(value: int = 90) -> np.ndarray:
    return np.full((40, 40, 3), value, np.uint8)


def predict(*args: object):  # type: ignore[no-untyped-def]
    return CliRunner().invoke(app, ["predict", "--model", "tiny_vit", *map(str, args)])


# --- random and headless models


def test_a_name_with_random_weights_is_refused_unless_asked_for() -> None:
    with pytest.raises(InputError, match=r"random weights.*allow_random=True"):
        mmkit.pipeline("image-classification", "test_vit")
    with pytest.warns(UserWarning, match="random weights"):
        classify = mmkit.pipeline("image-classification", "test_vit", allow_random=True)
    assert len(classify(picture()).labels) == 5


def test_an_embedding_gets_no_softmax() -> None:
    for model in (
        create_backbone("tiny_vit", num_classes=0),
        create_backbone("vit_tiny_patch16_224", **SMALL, num_classes=0),
    ):
        with pytest.raises(InputError, match=r"no classifier.*embedding"):
            ImageClassificationPipeline(model, allow_random=True)


def test_a_random_classifier_on_a_trained_trunk_is_said_until_it_is_trained() -> None:
    model = create_backbone("tiny_vit", num_classes=2)
    assert image_info(model).fresh == ("head",)
    with pytest.warns(UserWarning, match=r"classifier \(head\).*random"):
        ImageClassificationPipeline(model)
    data = [(torch.randn(3, 32, 32), i % 2) for i in range(8)]
    mmkit.fit(model, data, config=mmkit.FitConfig(epochs=1, batch_size=4, progress=False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ImageClassificationPipeline(model)


# --- precision, and the caller's module


def test_auto_precision_is_that_of_the_file_or_module(tmp_path: Path) -> None:
    folder = save_backbone(create_backbone("tiny_vit").bfloat16(), tmp_path / "half")
    assert mmkit.pipeline("image-classification", folder).dtype == torch.bfloat16
    assert mmkit.pipeline("image-classification", folder, dtype="float32").dtype == torch.float32
    assert mmkit.pipeline("image-classification", create_backbone("tiny_vit").double()).dtype == torch.float64
    assert mmkit.pipeline("image-classification", "tiny_vit").dtype == torch.float32


@pytest.mark.parametrize("adapted", [False, True])
def test_a_pipeline_leaves_the_callers_module_as_it_is(adapted: bool) -> None:
    model = create_backbone("tiny_vit").train()
    model.blocks[0].eval()
    adapter = apply_adapter(model, "ssf") if adapted else None
    modes = [m.training for m in model.modules()]
    before = copy.deepcopy(model.state_dict())
    for dtype in ("auto", "float64"):
        classify = ImageClassificationPipeline(model, dtype=dtype)
        assert not any(m.training for m in classify.model.modules())
        assert abs(sum(classify(picture(), top_k=44).scores) - 1) < 1e-4
    assert [m.training for m in model.modules()] == modes
    after = model.state_dict()
    assert all(torch.equal(after[k], v) and after[k].dtype == v.dtype for k, v in before.items())
    if adapter is not None:
        assert {p.dtype for p in adapter.parameters()} == {torch.float32}


def test_a_module_in_eval_mode_is_used_and_not_copied() -> None:
    model = create_backbone("tiny_vit").eval()
    assert ImageClassificationPipeline(model).model is model


# --- the backbone that knows photos


def test_the_default_is_trained_on_photos_and_names_them() -> None:
    classify = mmkit.pipeline("image-classification")
    info = classify.info
    assert (info.name, info.input_size, info.crop_pct) == ("mmkit:mobilenetv2", (3, 224, 224), 0.875)
    assert info.mean == info.std == (0.5, 0.5, 0.5)
    assert len(set(info.class_names)) == 1000
    data = pytest.importorskip("skimage.data")
    assert "cat" in classify(data.chelsea()).label
    coffee = classify(data.coffee())
    assert coffee.label == "espresso"
    assert coffee.scores[0] > 0.9


@pytest.mark.parametrize("name", ["mobilenetv2", "mobilenetv2_100"])
def test_the_size_that_was_asked_for_is_the_size_that_is_fed(name):
    assert image_info(create_backbone(name, img_size=160)).input_size == (3, 160, 160)


def test_the_architectures_name_means_the_bundled_weights_but_not_for_a_file_of_ones_own(tmp_path: Path) -> None:
    bundled = create_backbone("mobilenetv2_100")
    assert image_info(bundled).name == "mmkit:mobilenetv2"
    assert weight_entry("mobilenetv2_100").license == "Apache-2.0"
    plain = create_backbone("timm:mobilenetv2_100")
    assert image_info(plain).trained is False
    write_safetensors(tmp_path / "own.safetensors", plain.state_dict())
    own = create_backbone("mobilenetv2_100", tmp_path / "own.safetensors").eval()
    assert image_info(own).mean == image_info(plain).mean
    x = torch.rand(1, 3, 65, 65)
    with torch.no_grad():
        assert torch.equal(own(x), plain.eval()(x))
        assert not torch.equal(own(x), bundled.eval()(x))


def test_the_bundled_network_keeps_its_padding_and_names_in_a_folder(tmp_path: Path) -> None:
    model = create_backbone("mobilenetv2").eval()
    again = create_backbone(save_backbone(model, tmp_path / "m")).eval()
    x = torch.rand(1, 3, 65, 65)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert image_info(again).class_names == image_info(model).class_names


def test_statistics_of_the_bundled_network_fit_what_it_sees() -> None:
    model = create_backbone("mobilenetv2").train()
    data = pytest.importorskip("skimage.data")
    views = mmkit.pipeline("image-classification").transform
    x = torch.stack([views(p) for p in (data.chelsea(), data.coffee(), data.rocket(), data.astronaut(), data.cat())])
    seen: list[torch.Tensor] = []
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.register_forward_hook(
                lambda m, a, _: seen.append((a[0].var((0, 2, 3)) / (m.running_var + m.eps)).log().median())
            )
    with torch.no_grad():
        model.eval()(x)
    assert torch.stack(seen).abs().max() < 1.2  # folded, they would be off by factors of a hundred


# --- mmkit predict


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for i, name in enumerate(("p2.png", "p10.png", "more/q.jpg")):
        Image.fromarray(picture(60 + 40 * i)).save(folder / name)
    (folder / "bad.png").write_bytes(b"not a picture")
    (folder / "notes.txt").write_text("x")
    (folder / ".hidden.png").write_bytes(b"")
    return folder


def test_pictures_of_files_folders_wildcards_and_zips_are_listed_in_order(photos: Path, tmp_path: Path) -> None:
    archive = shutil.make_archive(str(tmp_path / "z"), "zip", photos)
    named = [name for name, _ in list_pictures([photos, f"{photos}/*.png", archive, tmp_path / "none.png"])]
    inside = ["bad.png", "p2.png", "p10.png", "more/q.jpg"]
    assert named == [
        *(f"{photos}/{n}" for n in inside),
        *(f"{photos}/{n}" for n in inside[:3]),
        *(f"{archive}/{n}" for n in inside),
        f"{tmp_path}/none.png",
    ]
    for empty in (tmp_path / "photos" / "x*.png", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(InputError, match="holds no pictures"):
            list_pictures([empty])


def test_one_bad_file_costs_a_line_and_only_nothing_readable_fails(photos: Path) -> None:
    done = predict(photos, photos / "none.png", "--batch-size", 2, "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert len([line for line in done.stdout.splitlines() if " %" in line]) == 3
    assert "2 of 5 pictures could not be read" in done.stderr
    assert done.stderr.count(str(photos / "bad.png")) >= 1
    assert predict(photos / "bad.png").exit_code == 1


def test_answers_as_json_and_csv(photos: Path, tmp_path: Path) -> None:
    archive = shutil.make_archive(str(tmp_path / "z"), "zip", photos)
    rows = json.loads(predict(archive, "--json", "--top-k", 2).stdout)
    assert [Path(r["file"]).name for r in rows] == ["bad.png", "p2.png", "p10.png", "q.jpg"]
    assert rows[0]["error"].startswith(f"{archive}/bad.png cannot be read")
    assert "mmkit-data" not in rows[0]["error"]
    assert len(rows[1]["labels"]) == len(rows[1]["scores"]) == 2
    table = list(csv.DictReader(io.StringIO(predict(archive, "--csv", "--top-k", 2).stdout)))
    assert [t["label"] for t in table[1:]] == [r["labels"][0] for r in rows[1:]]
    assert float(table[1]["score_2"]) == rows[1]["scores"][1]
    assert table[0]["error"] == rows[0]["error"]
    assert predict(archive, "--json", "--csv").exit_code == 1


def test_backbone_alone_is_the_model_and_beside_an_adapter_its_place(photos: Path) -> None:
    alone = CliRunner().invoke(app, ["predict", str(photos / "p2.png"), "--backbone", "tiny_vit"])
    assert alone.stdout == predict(photos / "p2.png").stdout
    refused = predict(photos / "p2.png", "--backbone", "mobilenetv2")
    assert refused.exit_code == 1
    assert "means nothing" in refused.stderr


def test_random_weights_need_the_word_in_the_command(photos: Path) -> None:
    command = ["predict", str(photos / "p2.png"), "--model", "test_vit"]
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 1
    assert "--allow-random" in refused.stderr
    with pytest.warns(UserWarning, match="random"):
        assert CliRunner().invoke(app, [*command, "--allow-random"]).exit_code == 0


@pytest.mark.parametrize("name", ["vit_small_patch16_224.augreg_in21k", "resnet10t"])
def test_offline_one_sentence_names_the_file_and_what_to_do_with_it(name: str, photos: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for command in (
        ["predict", str(photos / "p2.png"), "--model", name, "--pretrained"],
        ["finetune", "--data", str(photos), "--backbone", name, "--pretrained", "--skip-bad"],
    ):
        if command[0] == "finetune":
            (photos / "more" / "a").mkdir()
            (photos / "more" / "b").mkdir()
            for i, folder in enumerate("aabb"):
                Image.fromarray(picture()).save(photos / "more" / folder / f"{i}.png")
            command[2] = str(photos / "more")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            done = CliRunner().invoke(app, command)
        assert done.exit_code == 1, done.output
        last = done.stderr.strip().splitlines()[-1]
        assert f"https://huggingface.co/timm/{name}" in last
        assert "model.safetensors" in last
        assert "--checkpoint FILE" in last


def test_open_clip_takes_a_tag_behind_a_dot() -> None:
    with pytest.raises(InputError, match="no weights 'openay'"):
        create_backbone("open_clip:ViT-B-32.openay", pretrained=True)


def test_a_whole_model_takes_no_other_backbone(tmp_path: Path, photos: Path) -> None:
    folder = save_backbone(create_backbone("tiny_vit"), tmp_path / "whole")
    with pytest.raises(InputError, match="takes no other backbone"):
        ImageClassificationPipeline(folder, backbone="tiny_vit")
    with pytest.raises(CheckpointError):
        ImageClassificationPipeline("test_vit", checkpoint_path=folder / "config.json")


def test_the_version_is_an_option_too() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"mmkit {__version__}\n"


# --- what cannot be answered


@pytest.mark.parametrize("batch_size", [0, -1, 1.5])
def test_a_batch_of_no_pictures_is_told(batch_size) -> None:
    answer = mmkit.pipeline("image-classification", create_backbone("tiny_vit", num_classes=2))
    for images in (picture(), [picture(), picture()]):
        with pytest.raises(InputError, match="batch_size must be a whole number of at least 1"):
            answer(images, batch_size=batch_size)
    with pytest.raises(InputError, match="top_k must be a whole number of at least 1"):
        answer(picture(), top_k=1.5)


def test_answers_that_are_no_numbers_are_no_answers() -> None:
    model = create_backbone("tiny_vit", num_classes=2).eval()
    with torch.no_grad():
        list(model.parameters())[-1].fill_(float("nan"))
    with pytest.raises(InputError, match="answer holds NaN or infinite values"):
        mmkit.pipeline("image-classification", model)(picture())
