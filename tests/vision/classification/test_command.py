"""`mmkit finetune`: every setting by name, from a file as well, several methods and folds, a look before, and a report that is safe."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

from mmkit.backbones import create_backbone, save_backbone
from mmkit.cli import app
from mmkit.cli.finetune import fit_fields
from mmkit.data import fold_dataset, open_dataset
from mmkit.errors import CheckpointError, InputError
from mmkit.storage.settings import read_settings, settings_text
from mmkit.training import FitConfig
from mmkit.vision.classification import prepare, train_prepared

NASTY = "<script>document.title='ran'<"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    for name, colour, count in (("cat", (200, 40, 40), 10), (NASTY, (40, 40, 200), 5)):
        (root / name).mkdir(parents=True)
        for i in range(count):
            noise = np.random.default_rng(i).integers(-90, 90, (32, 32, 3)) + np.array(colour)
            Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(root / name / f"{i}.png")
    return root


def run(pictures: Path | None, output: Path | None, *more: object) -> tuple[int, str]:
    fixed: list[object] = ["--data", pictures, "--backbone", "tiny_vit"] if pictures else []
    fixed += ["--output", output] if output else []
    found = CliRunner().invoke(app, [str(a) for a in ("finetune", *fixed, *more)])
    assert not found.exception or isinstance(found.exception, SystemExit), found.exception
    return found.exit_code, " ".join(re.sub(r"[│╭╮╰╯─]", " ", found.output).split())


PROBE = ("--adapter", "linear_probe", "--epochs", 1)


def test_every_setting_of_fit_is_an_option_with_its_own_words():
    assert {*fit_fields(), "resume", "seed"} == {f.name for f in dataclasses.fields(FitConfig)}
    assert all(told for _, told in fit_fields().values())


def test_a_run_writes_its_settings_and_they_are_taken_back(pictures: Path, tmp_path: Path):
    out = tmp_path / "out"
    more = (
        "--adapter",
        "lora",
        "--set",
        "r=2",
        "--class-weights",
        "balanced",
        "--auto-augment",
        "rand-m3",
        "--epochs",
        1,
    )
    code, told = run(pictures, out, *more, "--patience", 3, "--ema-decay", 0.9, "--no-progress")
    assert code == 0, told
    saved = tomllib.loads((out / "run.toml").read_text())
    assert saved["settings"] == {"r": 2}
    assert {"adapter": "lora", "class_weights": "balanced", "patience": 3, "ema_decay": 0.9}.items() <= saved.items()
    code, told = run(None, None, "--config", out / "run.toml")
    assert code == 0, told
    assert "had ended before" in told, "the very same run"
    code, told = run(None, None, "--config", out / "run.toml", "--sampling", "balanced", "--erase", 0.5)
    assert code == 1, "the command line wins, and the run is another"
    assert "--sampling: None is now 'balanced'" in told
    assert "--erase: None is now 0.5" in told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("epoch = 3", "'epoch'. Did you mean 'epochs'"),
        ("epochs = 'many'", "for '--epochs'"),
        ("epochs = true", "epochs = True is not one value"),
        ("pretrained = 1", "pretrained = 1 is not true or false"),
        ("epochs = [1]", "is not one value"),
        ('output = ""', "output is empty. Leave it out"),
        ("epochs 3", "is no TOML"),
        ("settings = 3", "settings must be a table"),
        ("set_ = 'r=2'", "there is no setting 'set_'"),
        ("help = true", "there is no setting 'help'"),
        ("[settings]\n'a=b' = 3", "'a=b' in [settings] is no name of a setting"),
        ("[settings]\n'' = 3", "'' in [settings] is no name of a setting"),
        ('{"epochs": 3}', "Settings are lines of NAME = VALUE"),
    ],
)
def test_a_settings_file_that_cannot_be_meant_is_refused(pictures: Path, tmp_path: Path, text: str, told: str):
    (tmp_path / "run.toml").write_text(text)
    code, output = run(pictures, tmp_path / "out", "--config", tmp_path / "run.toml")
    assert code == 2
    assert told in output
    assert not (tmp_path / "out").exists()


def test_settings_come_back_from_toml_as_they_were(tmp_path: Path):
    values = {"a": 'q"\\\n\x7f\u2028😀', "b": 1e-7, "c": True, "d": [1, 2.5, "x"], "none": None, "t": {"k k": {"z": 1}}}
    (tmp_path / "x.toml").write_text(settings_text(values, "heading"), encoding="utf-8")
    assert read_settings(tmp_path / "x.toml") == {k: v for k, v in values.items() if v is not None}


def test_a_settings_file_may_begin_as_windows_begins_them(tmp_path: Path):
    (tmp_path / "x.toml").write_text("epochs = 3\n", encoding="utf-8-sig")
    assert read_settings(tmp_path / "x.toml") == {"epochs": 3}


def test_what_is_no_run_of_pictures_is_said(pictures: Path, tmp_path: Path):
    video = tmp_path / "video"
    (video / "model").mkdir(parents=True)
    (video / "run.toml").write_text("task = 'video-classification'")
    for line, told in (
        (("merge", pictures), "holds no image classifier: neither adapter_config.json nor config.json"),
        (("export", pictures), "holds no image classifier"),
        (("merge", video), "is a result of --task video-classification, which holds the whole model"),
    ):
        found = CliRunner().invoke(app, [*map(str, line), "--output", str(tmp_path / "out.onnx")])
        assert found.exit_code == 1
        assert told in " ".join(found.output.split())
        assert not (tmp_path / "out.onnx").exists()
    told = CliRunner().invoke(app, ["info", str(pictures)])
    assert told.exit_code == 1
    assert "holds neither an adapter" in told.output
    with pytest.raises(CheckpointError, match=r"holds no model: it has no config\.json\. Give a folder"):
        create_backbone(pictures)


def test_options_that_exclude_each_other_or_mean_nothing_are_refused(pictures: Path, tmp_path: Path):
    code, told = run(pictures, tmp_path / "out", *PROBE, "--dry-run", "--find-lr")
    assert code == 1
    assert "--dry-run and --find-lr exclude each other" in told
    for more, words in (
        (("--epochs", "3"), "--epochs means nothing without --headless"),
        (("--restart",), "--restart means nothing without --headless"),
        (("--headless", "--port", "80"), "--port means nothing with --headless"),
    ):
        found = CliRunner().invoke(app, ["demo", *more])
        assert found.exit_code == 1
        assert words in " ".join(found.output.split())
    model = save_backbone(create_backbone("tiny_vit", num_classes=2), tmp_path / "model")
    with pytest.raises(InputError, match="pretrained means nothing"):
        create_backbone(model, pretrained=True)
    with pytest.raises(InputError, match="exclude each other"):
        create_backbone("tiny_vit", model / "model.safetensors", pretrained=True)


def test_an_empty_path_is_no_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`--output "$UNSET"`: every place of every command where a path can stand."""
    monkeypatch.chdir(tmp_path)
    commands, asked = [((), get_command(app))], 0
    while commands:
        names, command = commands.pop()
        commands += [((*names, name), below) for name, below in getattr(command, "commands", {}).items()]
        if hasattr(command, "commands"):
            continue
        hints = get_type_hints(command.callback)
        flags = [p.opts[0] for p in command.params if Path in (hints.get(p.name), *get_args(hints.get(p.name)))]
        for line in [(f, "") for f in flags if f[0] == "-"] + [(f"{f}=",) for f in flags if f[0] == "-"] + [("",)]:
            found = CliRunner().invoke(app, [*names, *line])
            told = " ".join(re.sub(r"[│╭╮╰╯─]", " ", found.output).split())
            assert (found.exit_code, " is empty: an unset variable?" in told) == (2, True), (names, line, told)
            asked += 1
    assert asked > 40
    assert not any(tmp_path.iterdir())
    assert (
        "no concept 'mouse'" in CliRunner().invoke(app, ["erase", "mouse", "--surrogate", ""]).output
    )  # a text may be empty


def test_a_look_before_training_writes_nothing(pictures: Path, tmp_path: Path):
    code, told = run(pictures, tmp_path / "out", "--adapter", "ssf,linear_probe", "--dry-run", "--color-jitter", 0.4)
    assert code == 0, told
    assert "12 training and 3 validation images" in told
    assert "cat 8" in told
    assert "blocks.0.attn.qkv" in told
    assert "color_jitter=0.4" in told
    assert "linear_probe trains" in told
    code, told = run(pictures, tmp_path / "out", "--adapter", "linear_probe", "--find-lr", "--batch-size", 4)
    assert code == 0, told
    assert 1e-7 < float(re.search(r"Train with --lr (\S+)", told)[1]) < 1  # type: ignore[index]
    assert not (tmp_path / "out").exists()


def test_without_pictures_held_back(pictures: Path, tmp_path: Path):
    code, told = run(pictures, tmp_path / "out", *PROBE, "--val", 0)
    assert code == 0, told
    assert "15 training images" in told
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["accuracy"] is None
    assert report["answers"] is None
    assert report["merge_error"] is not None
    code, told = run(pictures, tmp_path / "other", *PROBE, "--val", 0, "--patience", 2)
    assert code == 1
    assert "patience needs validation data" in told


@pytest.mark.slow
def test_methods_and_folds_side_by_side(pictures: Path, tmp_path: Path):
    out = tmp_path / "out"
    code, told = run(pictures, out, "--adapter", "linear_probe,bitfit", "--epochs", 1, "--folds", 2, "--lr", 0.01)
    assert code == 0, told
    assert "±" in told
    for method in ("linear_probe", "bitfit"):
        report = json.loads((out / method / "report.json").read_text())
        assert report["answers"]["n"] == 15, "every picture was held back once"
        assert report["accuracy"] == pytest.approx(np.mean(report["folds"]))
        assert (out / method / "fold_2" / "adapter_model.safetensors").is_file()
    page = (out / "report.html").read_text()
    assert "linear_probe" in page
    assert "bitfit" in page
    assert read_settings(out / "run.toml")["folds"] == 2
    before = json.loads((out / "linear_probe" / "report.json").read_text())
    code, again = run(None, None, "--config", out / "run.toml")
    assert code == 0, again
    assert json.loads((out / "linear_probe" / "report.json").read_text())["folds"] == before["folds"]
    code, told = run(pictures, out, "--adapter", "ssf,ssf")
    assert code == 1
    assert "each method once" in told


def test_folds_hold_back_every_picture_once(pictures: Path):
    data = open_dataset(pictures)
    held = []
    for fold in (1, 2, 3):
        train, val = fold_dataset(data, fold, 3, seed=1)
        assert not set(train.paths) & set(val.paths)
        assert len(train) + len(val) == len(data)
        assert min(val.class_counts().values()) >= 1
        held += list(val.paths)
    assert sorted(held) == sorted(data.paths)
    for bad in ((0, 3), (4, 3), (1, 1), (1, 6)):
        with pytest.raises(InputError, match="fold"):
            fold_dataset(data, *bad)


def test_what_means_nothing_for_a_task_is_refused(pictures: Path, tmp_path: Path):
    for task, more, told in (
        ("text-to-image", ("--augment",), "--augment means nothing"),
        ("text-to-image", ("--mixup", 0.2), "--mixup means nothing for --task text-to-image; it takes"),
        ("segmentation", ("--erase", 0.2), "--erase means nothing"),
        ("segmentaton", (), "no training of 'segmentaton' by command. Did you mean 'segmentation'"),
    ):
        code, output = run(pictures, tmp_path / "out", "--task", task, *more)
        assert code == 1
        assert told in output
    with pytest.raises(InputError, match="no setting 'epoch'"):
        train_prepared(prepare(pictures, "tiny_vit", "linear_probe"), epoch=3)


def test_the_report_counts_right_and_its_page_holds_names_as_text_and_asks_nobody(pictures: Path, tmp_path: Path):
    code, told = run(pictures, tmp_path / "out", *PROBE, "--lr", 1e-6)
    assert code == 0, told
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    answers = report["answers"]
    table = np.array(answers["confusion"])
    assert table.sum() == answers["n"] == 3
    assert np.trace(table) / table.sum() == pytest.approx(report["accuracy"])
    for i, row in enumerate(answers["per_class"]):
        assert row["n"] == table[i].sum()
        assert row["recall"] == pytest.approx(table[i, i] / table[i].sum())
        column = table[:, i].sum()
        assert row["precision"] == (pytest.approx(table[i, i] / column) if column else None)
    assert len(answers["most_wrong"]) == table.sum() - np.trace(table)
    page = (tmp_path / "out" / "report.html").read_text()
    assert NASTY not in page
    assert page.count("<script") == 0
    assert "&lt;script&gt;" in page
    assert not re.search(r"""(?:src|href)=["'](?!data:)|url\(|@import""", page)
    for word in ("mmkit predict", "mmkit merge", "mmkit export", "numbers trained", "Curves"):
        assert word in page


def test_settings_that_no_reader_can_take_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    for content, told in (
        (b"x = " + b"[" * 5000 + b"]" * 5000, "nested too deeply"),
        (b"x = " + b"9" * 5000, "is no TOML"),
        (b"#" * 1_000_001, "above 1 MB"),
    ):
        file.write_bytes(content)
        with pytest.raises(InputError, match=told):
            read_settings(file)


def test_a_mistake_in_the_last_method_is_told_before_the_first_is_trained(pictures: Path, tmp_path: Path) -> None:
    for more, told in (
        (("--adapter", ","), "names no method"),
        (("--adapter", "ssf,nope"), "Unknown adapter 'nope'"),
        (("--adapter", "lora,ssf", "--set", "r=4"), "unexpected keyword argument 'r'"),
        (("--folds", 0), "2 folds or more"),
        (("--seed", 2**64), "seed must be a whole number within"),
        (("--seed", 2**64, "--val", 0), "seed must be a whole number within"),
        (("--set", "r=" + "9" * 5000), "unexpected keyword argument 'r'"),
    ):
        code, said = run(pictures, tmp_path / "out", "--epochs", 1, *more)
        assert code == 1
        assert told in said
        assert not (tmp_path / "out").exists(), more
    assert run(pictures, None, "--dry-run", "--adapter", ",")[0] == 1


def test_names_that_are_no_utf_8(pictures: Path, tmp_path: Path) -> None:
    out = Path(f"{tmp_path}/run\udcff")
    prepared = prepare(pictures, "tiny_vit", "bitfit")
    train_prepared(prepared, output_dir=out, epochs=1, progress=False)
    assert read_settings(out / "run.toml")["output"].endswith("/run?")
    (pictures / "cat").rename(f"{pictures}/c\udcff")
    with pytest.raises(InputError, match="is no UTF-8"):
        open_dataset(pictures)
