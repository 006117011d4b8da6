"""One contract for everything a pipeline returns: `plot()` is a picture, `save(path)` does what the suffix says, or nothing."""

from __future__ import annotations

import dataclasses
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmkit.diffusion import TextToImage
from mmkit.errors import InputError
from mmkit.pointcloud.point_peft import CloudClassification, CloudSegmentation
from mmkit.pointcloud.slam import SlamResult
from mmkit.pointcloud.splats import GaussianModel, ViewResult, orbit
from mmkit.registry import TASKS
from mmkit.results import Result, chart_text
from mmkit.video import VideoClassification
from mmkit.video.zeroi2v import Window
from mmkit.vision.classification import ImageClassification
from mmkit.vision.clicks import Mask
from mmkit.vision.gmm import MaskView
from mmkit.vision.medical import SegmentationResult
from mmkit.vision.piip import DenseFeatures, PyramidView, Reads, SegmentedPicture


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8))


def segmentation(*shape: int) -> SegmentationResult:
    mask = np.zeros(shape, np.uint8)
    mask[2:6] = 1
    image = np.asarray(picture()) if len(shape) == 2 else np.linspace(0, 1, mask.size, dtype=np.float32).reshape(shape)
    return SegmentationResult(
        mask=mask,
        score=np.full(shape, 0.75, np.float32),
        image=image,
        class_names=("background", "cell"),
        spacing=(1.0,) * len(shape),
        affine=None,
        seconds=0.1,
    )


def view() -> MaskView:
    grid = np.linspace(-1, 1, 6).reshape(2, 3)
    line = np.arange(4.0)
    scores = {name: {"a": 0.5, "b": 0.5} for name in ("trained", "edited", "no mask")}
    return MaskView(picture(), (0, 1), grid, grid, abs(grid), abs(grid), line, line, line, scores)


def pyramid_view() -> PyramidView:
    make = np.random.default_rng(3)
    maps = [make.normal(size=(h, w, 4)).astype(np.float32) for h, w in ((3, 4), (6, 8))]
    reads = Reads((3, 4), (6, 8), make.random((12, 2, 4, 2)), np.full((12, 2, 4), 0.25))
    costs = {"pyramid": (1e9, 10), "single branch": (3e9, 8)}
    return PyramidView(
        picture(), (24, 32), (1.0, 1.0), maps, [m + 1 for m in maps], {"larger reads smaller": reads}, costs
    )


def video() -> VideoClassification:
    scores = np.array([0.25, 0.75])
    return VideoClassification(
        labels=("b", "a"),
        scores=(0.75, 0.25),
        windows=(Window(0.0, 1.0, scores), Window(1.0, 2.0, scores)),
        class_names=("a", "b"),
        strip=np.zeros((3, 8, 8, 3), np.uint8),
        strip_seconds=np.arange(3.0),
        path="clip.mp4",
        duration=2.0,
        num_frames=50,
        fps=25.0,
    )


def cloud_class() -> CloudClassification:
    points = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
    scores = np.array([0.25, 0.75], np.float32)
    return CloudClassification(
        ("a", "b"), scores, points, np.arange(30) % 3 + 1, np.full(3, 1 / 3, np.float32), ((4, 0.5),)
    )


def cloud_parts() -> CloudSegmentation:
    points = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
    return CloudSegmentation(("clutter", "leg"), points, np.arange(30) % 2, np.full(30, 0.5, np.float32))


def new_view() -> ViewResult:
    camera = orbit(torch.zeros(3), 2.0, [0], width=32, height=24)
    plane = np.linspace(0, 1, 24 * 32, dtype=np.float32).reshape(24, 32)
    return ViewResult(np.stack([plane] * 3, -1), plane, plane, camera)


def run_of_slam() -> SlamResult:
    poses = np.eye(4)[None].repeat(4, 0)
    poses[:, 0, 3] = np.arange(4)
    points = torch.rand(30, 3, generator=torch.Generator().manual_seed(0))
    tracked = np.array([True, True, False, True])
    return SlamResult(
        poses, tracked, GaussianModel.from_points(points, points), np.arange(30), poses + 0.0, {"psnr": float("nan")}
    )


RESULTS = {
    "cloud class": cloud_class,
    "cloud parts": cloud_parts,
    "image classification": lambda: ImageClassification(["cat", "dog"], [0.9, 0.1], picture()),
    "mask": lambda: Mask(np.random.default_rng(1).normal(size=(24, 32)).astype(np.float32), float("nan"), picture()),
    "mask view": view,
    "new view": new_view,
    "segmented picture": lambda: segmentation(24, 32),
    "segmented volume": lambda: segmentation(8, 9, 10),
    "slam": run_of_slam,
    "text to image": lambda: TextToImage([picture(), picture()], ["a", "b"], [0, 1], {"steps": 2}, 0.1),
    "video classification": video,
    "dense features": lambda: DenseFeatures(
        {"branch1": np.random.default_rng(2).normal(size=(3, 4, 8)).astype(np.float32)}, picture(), (24, 32)
    ),
    "pyramid view": pyramid_view,
    "segmented picture of a pyramid": lambda: SegmentedPicture(
        np.eye(24, 32, dtype=np.uint8), np.full((24, 32), 0.5, np.float32), picture(), ("background", "cell")
    ),
}


@pytest.fixture(params=RESULTS, ids=lambda name: name.replace(" ", "-"))
def result(request: pytest.FixtureRequest) -> Result:
    return RESULTS[request.param]()


def test_every_task_has_its_result_here():
    assert len({type(make()) for make in RESULTS.values()}) == len(TASKS.names())


def test_a_result_is_a_small_dataclass_that_plots_a_picture(result):
    assert isinstance(result, Result)
    assert dataclasses.is_dataclass(result)
    drawn = result.plot()
    assert isinstance(drawn, Image.Image)
    assert drawn.mode == "RGB"
    assert min(drawn.size) > 0


def test_every_suffix_is_written_in_any_case_and_read_back(result, tmp_path):
    for suffix in result.formats():
        for name in (f"out{suffix}", f"UPPER{suffix.upper()}", f"with.dots{suffix.title()}"):
            path = result.save(str(tmp_path / "new folder" / name))
            assert isinstance(path, Path)
            assert path == tmp_path / "new folder" / name
            content = path.read_bytes()
            if suffix == ".json":
                json.loads(content, parse_constant=lambda value: pytest.fail(f"{value} is not JSON"))
            elif suffix.endswith(".png"):
                Image.open(path).load()
            elif suffix == ".npy":
                assert np.array_equal(np.load(path), result.binary)
            elif suffix == ".ply":
                assert content[:4] == b"ply\n"
            elif suffix == ".zip":
                assert zipfile.ZipFile(path).testzip() is None
            elif suffix == ".npz":
                arrays = np.load(path)
                want = getattr(result, "features", {"depth": getattr(result, "depth", None)})
                assert all(np.array_equal(arrays[k], v) for k, v in want.items())
            else:
                assert content[:2] == b"\x1f\x8b" if suffix == ".nii.gz" else content[344:347] == b"n+1"


def swapped(value: object, name: str) -> object:
    if isinstance(value, str):
        return name
    if isinstance(value, tuple | list) and value and all(isinstance(v, str) for v in value):
        return type(value)(f"{name}{i}" for i, _ in enumerate(value))
    return value


@pytest.mark.parametrize("name", ["$\\frac{", "a$b$c", "_part", "clip\udcff", "x" * 2000, "a\nb\0"])
def test_names_of_any_kind_are_drawn_and_written(result, name, tmp_path):
    fields = [f.name for f in dataclasses.fields(result) if f.init]
    named = type(result)(**{f: swapped(getattr(result, f), name) for f in fields})
    assert min(named.plot().size) > 1
    assert named.save(tmp_path / f"ü 日本{next(iter(named.formats()))}").stat().st_size > 0


def test_names_are_no_formulas_and_stay_in_the_legend():
    assert chart_text("a$b$c") == r"a\$b\$c"
    assert chart_text("_part") == " _part"
    assert chart_text("x" * 99) == "x" * 57 + "..."
    assert chart_text("a\n b") == "a b"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_null_in_json(result, bad, tmp_path):
    def spoilt(value: object) -> object:
        if isinstance(value, np.ndarray) and value.dtype.kind == "f":
            return np.full_like(value, bad)
        return bad if isinstance(value, float) else value

    if ".json" in result.formats():
        fields = [f.name for f in dataclasses.fields(result) if f.init]
        path = type(result)(**{f: spoilt(getattr(result, f)) for f in fields}).save(tmp_path / "x.json")
        strange: list[str] = []
        json.loads(path.read_text(), parse_constant=strange.append)
        assert not strange


def test_another_suffix_is_refused_with_the_list_and_nothing_is_written(result, tmp_path):
    for name in ("out", "out.txt", "out.mha", "png", "out.png.bak"):
        with pytest.raises(InputError, match=re.escape(name)) as caught:
            result.save(tmp_path / name)
        assert all(suffix in str(caught.value) for suffix in result.formats())
    assert not list(tmp_path.iterdir())


def test_a_result_that_cannot_be_drawn_leaves_the_old_file_alone(result, tmp_path, monkeypatch):
    for suffix in result.formats():
        path = tmp_path / f"old{suffix}"
        path.write_bytes(b"old")

        def broken(suffix: str = suffix) -> dict:
            def fail() -> bytes:
                raise RuntimeError("cannot draw")

            return {suffix: fail}

        monkeypatch.setattr(result.__class__, "formats", lambda self, make=broken: make())
        with pytest.raises(RuntimeError):
            result.save(path)
        assert path.read_bytes() == b"old"
        assert [f.name for f in tmp_path.iterdir()] == [path.name]
        path.unlink()
        monkeypatch.undo()
