"""Models for other programs: the files answer as the models do, and what cannot be said is refused with nothing written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import mmkit
from mmkit.errors import InputError
from mmkit.storage.exports import write_onnx, write_program

ONNX = ("image-classification", "mask-explorer", "semantic-segmentation", "video-classification")


class Half(nn.Module):
    """Counts rows; exported, it goes by the number it was shown."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * float(np.asarray(x.detach()).shape[0])


@pytest.mark.slow
@pytest.mark.parametrize("task", ONNX)
def test_a_pipeline_writes_its_model_for_onnxruntime(task: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    pipeline = mmkit.pipeline(task)
    file = pipeline.export(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (example,) = pipeline.example()
    given = torch.rand(2, *example.shape[1:], generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted = pipeline.model(given)
    (found,) = session.run(None, {session.get_inputs()[0].name: given.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), wanted, atol=2e-4, rtol=1e-3)
    assert list(tmp_path.iterdir()) == [file]


def test_programs_of_torch_come_back(tmp_path: Path) -> None:
    pipeline = mmkit.pipeline("mask-explorer")
    file = pipeline.export(tmp_path / "model.pt2")
    given = torch.rand(5, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(file).module()(given), pipeline.model(given))


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="depends on what was given"):
        mmkit.pipeline("point-cloud-classification").export(tmp_path / "clouds.onnx")
    with pytest.raises(InputError, match=r"\.onnx or \.pt2"):
        mmkit.pipeline("mask-explorer").export(tmp_path / "model.pth")
    for write, name in ((write_onnx, "half.onnx"), (write_program, "half.pt2")):
        with pytest.raises(InputError):
            write(Half(), [torch.randn(1, 3)], tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_what_answers_otherwise_is_not_kept(tmp_path: Path) -> None:
    model, given = nn.Linear(3, 2), torch.randn(2, 3)
    with torch.no_grad():
        other = [([given], [model(given) + 0.01])]
    with pytest.raises(InputError, match="no rounding; nothing was written"):
        write_program(model, [given], tmp_path / "x.pt2", answers=other)
    assert not list(tmp_path.iterdir())
    assert model.training, "its mode stays"
    assert write_program(model, [given], tmp_path / "x.pt2") < 1e-6


@pytest.mark.parametrize("write", [write_onnx, write_program])
def test_a_file_of_another_kind_is_not_written_over(write, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_text("precious")
    with pytest.raises(InputError, match="must end in"):
        write(nn.Linear(3, 2), [torch.randn(2, 3)], weights)
    assert weights.read_text() == "precious"
