"""A fine-tuned model for others: what they read from the file answers as the original does, or nothing is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from mmkit.cli import app
from mmkit.data import load_digits
from mmkit.errors import CheckpointError, InputError, MMKitError, NotMergeableError
from mmkit.vision.classification import export, exporting, load_finetuned, prepare, train_prepared


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    digits, found = load_digits((0, 1)).subset(range(24)), {}
    for method, settings in (("lora", {"r": 2}), ("ssf", {}), ("gmm", {})):
        found[method] = tmp_path_factory.mktemp("runs") / method
        prepared = prepare(digits, "tiny_vit", method, settings=settings)
        train_prepared(prepared, output_dir=found[method], epochs=1, lr=0.02, progress=False)
    return found


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def answers(run: Path, pictures: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return load_finetuned(run)(pictures)


@pytest.mark.slow
def test_onnx_takes_any_number_of_pictures_and_says_how_they_are_prepared(runs, pictures, tmp_path: Path):  # type: ignore[no-untyped-def]
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    done = CliRunner().invoke(app, ["export", str(runs["lora"]), "--output", str(tmp_path / "m.onnx")])
    assert done.exit_code == 0, done.output
    assert "differ from the original's by" in done.output
    session = ort.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": pictures.numpy()})[0]
    np.testing.assert_allclose(found, answers(runs["lora"], pictures).numpy(), atol=1e-4)
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["class_names"]) == ["0", "1"]
    assert json.loads(about["input_size"]) == [3, 32, 32]


def test_torch_export_and_timm_read_what_was_folded(runs, pictures, tmp_path: Path):  # type: ignore[no-untyped-def]
    import timm

    export(runs["ssf"], "torch-export", tmp_path / "m.pt2")
    expected = answers(runs["ssf"], pictures)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.export.load(str(tmp_path / "m.pt2")).module()(pictures), expected, atol=1e-4, rtol=0
        )
        export(runs["ssf"], "timm", tmp_path / "timm")
        again = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
        torch.testing.assert_close(again(pictures), expected, atol=1e-4, rtol=0)


def test_peft_reads_its_own(runs, pictures, tmp_path: Path):  # type: ignore[no-untyped-def]
    import peft

    from mmkit import create_backbone

    export(runs["lora"], "peft", tmp_path / "peft")
    base = create_backbone("tiny_vit", num_classes=2).eval()
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "peft")).eval()
    with torch.no_grad():
        found = loaded.base_model.model(pictures)
    torch.testing.assert_close(found, answers(runs["lora"], pictures), atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="peft knows lora and its relatives"):
        export(runs["ssf"], "peft", tmp_path / "other")


@pytest.mark.parametrize("format", ["torch-export", "timm", "peft"])
def test_what_answers_otherwise_is_not_written(runs, tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    def other(model, info):  # type: ignore[no-untyped-def]
        x = torch.zeros(1, *info.input_size)
        return [([x], [model(x).detach() + 1])]

    monkeypatch.setattr(exporting, "_answers", other)
    with pytest.raises(MMKitError, match="no rounding; nothing was written"):
        export(runs["lora"], format, tmp_path / "out.pt2")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_said(runs, tmp_path: Path):  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match="Did you mean 'onnx'"):
        export(runs["ssf"], "onx", tmp_path / "x")
    with pytest.raises(InputError, match=r"end in \.pt2"):
        export(runs["ssf"], "torch-export", tmp_path / "x.pt")
    with pytest.raises(NotMergeableError, match="cannot be folded"):
        export(runs["gmm"], "torch-export", tmp_path / "x.pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "extra", [3, {"backbone": 5}, {"backbone": {"name": 7}}, {"backbone": {"name": "tiny_vit", "overrides": 5}},
              {"backbone": {"name": "tiny_vit", "overrides": {"num_classes": 5}}}, {"class_names": 7}],
)  # fmt: skip
def test_a_folder_that_says_nonsense_of_its_backbone_is_damaged(runs, tmp_path: Path, extra: object) -> None:  # type: ignore[no-untyped-def]
    run = shutil.copytree(runs["ssf"], tmp_path / "run")
    manifest = json.loads((run / "mmkit.json").read_text())
    (run / "mmkit.json").write_text(json.dumps(manifest | {"extra": extra}))
    with pytest.raises(CheckpointError, match="damaged"):
        load_finetuned(run)


def test_a_run_is_not_spoilt_by_what_is_made_of_it(runs) -> None:  # type: ignore[no-untyped-def]
    for format, name in (("torch-export", "model.pt2"), ("timm", "model")):
        with pytest.raises(InputError, match="Choose a place beside it"):
            export(runs["ssf"], format, runs["ssf"] / name)
    assert load_finetuned(runs["ssf"])
