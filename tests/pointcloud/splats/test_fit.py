"""Fitting, surgery, readers and views of splat scenes, on small drawn pictures."""

from __future__ import annotations

import json
import math
import os
import runpy
import signal
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import mmkit
from mmkit.backbones import create_backbone, save_backbone
from mmkit.cli import app
from mmkit.errors import CheckpointError, InputError, InterruptedRun, RunDiffersError
from mmkit.pointcloud.similarity import ssim
from mmkit.pointcloud.splats import (
    FitConfig,
    GaussianModel,
    drawn_scene,
    fit_images,
    load_posed_images,
    load_splats,
    look_at,
    orbit,
    save_splats,
    turntable,
)  # fmt: skip
from mmkit.pointcloud.splats.training import measure

pytestmark = pytest.mark.slow  # renders, so compiles the rasteriser
SMALL = FitConfig(steps=24, start_gaussians=200, max_gaussians=260, refine_every=5, rate=6.0)


class _Stop(Exception):
    pass


def test_a_fit_learns_and_an_interrupted_one_ends_the_same(tmp_path) -> None:
    posed = drawn_scene(6, 32)
    whole = fit_images(posed, SMALL, progress=False)
    assert sum(whole.losses[-6:]) < 0.7 * sum(whole.losses[:6])
    assert 200 < len(whole.model) <= 260

    def stop(step: int, loss: float, model: GaussianModel) -> None:
        if step == 13:
            raise _Stop

    with pytest.raises(_Stop):
        fit_images(posed, SMALL, output_dir=tmp_path, save_every=12, progress=False, on_step=stop)
    resumed = fit_images(posed, SMALL, output_dir=tmp_path, save_every=12, progress=False)
    assert resumed.losses == whole.losses
    assert all(torch.equal(v, whole.model.tensors()[k]) for k, v in resumed.model.tensors().items())
    with pytest.raises(RunDiffersError, match=r"pictures: \[6, 32, .*\] is now \[5, 32"):
        fit_images(drawn_scene(5, 32), SMALL, output_dir=tmp_path, progress=False)


def test_a_signal_ends_a_fit_with_its_state_saved_and_a_damaged_one_is_told(tmp_path) -> None:
    posed, state = drawn_scene(6, 32), tmp_path / "state"
    whole = fit_images(posed, SMALL, progress=False)

    def stop(step: int, loss: float, model: GaussianModel) -> None:
        if step == 7:
            signal.raise_signal(signal.SIGTERM)
        if step == 8:
            with pytest.raises(InputError, match="in use by another"), ThreadPoolExecutor(1) as other:
                other.submit(fit_images, posed, SMALL, output_dir=state, progress=False).result()

    with pytest.raises(InterruptedRun, match=r"after 8 steps; the state is saved in .*state") as caught:
        fit_images(posed, SMALL, output_dir=state, progress=False, on_step=stop)
    assert caught.value.number == signal.SIGTERM
    assert [p.name for p in state.iterdir()] == ["fit.safetensors"]
    again = fit_images(posed, SMALL, output_dir=state, progress=False)
    assert again.losses == whole.losses
    content = (state / "fit.safetensors").read_bytes()
    for damaged in (b"", content[:-5], content.replace(b"random", b"rANdom"), content.replace(b"about", b"abOUt")):
        (state / "fit.safetensors").write_bytes(damaged)
        with pytest.raises(CheckpointError, match="Delete it to start over"):
            fit_images(posed, SMALL, output_dir=state, progress=False)
    saved = save_backbone(create_backbone("tiny_vit", num_classes=2), tmp_path / "saved")
    with pytest.raises(InputError, match="holds a backbone, no run"):
        fit_images(posed, SMALL, output_dir=saved, progress=False)
    assert [p.name for p in saved.iterdir() if p.name == "fit.safetensors"] == []


@pytest.mark.slow
def test_a_longer_fit_shows_the_scene_from_new_places() -> None:
    config = FitConfig(steps=300, start_gaussians=1500, max_gaussians=3000, rate=6.0, sh_degree=1)
    result = fit_images(drawn_scene(16, 64), config, held_out=drawn_scene(6, 64, between=True), progress=False)
    assert result.scores["psnr"] > 23  # 24.8 on the machine this was written on; a black picture has 7.8


def test_the_example_fits_saves_and_films(tmp_path) -> None:
    example = runpy.run_path(str(Path(__file__).parents[3] / "examples" / "splat_from_pictures.py"))
    example["main"](None, FitConfig(steps=2, start_gaussians=50), tmp_path)
    assert len(load_splats(tmp_path / "scene.ply")) == 50
    assert (tmp_path / "scene.mp4").stat().st_size > 1000


def test_surgery_keeps_moments_with_their_gaussians() -> None:
    model = GaussianModel.from_points(torch.randn(10, 3, generator=torch.Generator().manual_seed(0)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    sum((p * torch.arange(10.0).view(-1, *[1] * (p.dim() - 1))).sum() for p in model.parameters()).backward()
    optimizer.step()
    moments = optimizer.state[model.means]["exp_avg"].clone()
    model.select(torch.tensor([7, 2]), optimizer)
    assert torch.equal(optimizer.state[model.means]["exp_avg"], moments[[7, 2]])
    model.append({n: getattr(model, n)[:1] for n in ("means", "scales", "quats", "opacities", "sh0", "shN")}, optimizer)
    assert len(model) == model.config["num_gaussians"] == 3
    assert optimizer.state[model.means]["exp_avg"][2].abs().sum() == 0
    model.render(orbit(torch.zeros(3), 5.0, [0], width=16, height=16))[0].sum().backward()
    optimizer.step()


class _Doubling:
    """Refines as gsplat's strategies do: puts new parameters and moments where the old ones were."""

    def initialize_state(self) -> dict[str, int]:
        return {"calls": 0}

    def step_pre_backward(self, params, optimizers, state, step, info) -> None:
        info["means2d"].retain_grad()

    def step_post_backward(self, params, optimizers, state, step, info, packed) -> None:
        assert info["means2d"].grad.shape == (1, len(params["means"]), 2)
        state["calls"] += 1
        if step != 1:
            return
        for name, optimizer in optimizers.items():
            old = params[name]
            moments = optimizer.state.pop(old)
            new = torch.nn.Parameter(torch.cat([old, old]).detach())
            kept = {k: v if k == "step" else torch.cat([v, torch.zeros_like(v)]) for k, v in moments.items()}
            optimizer.param_groups[0]["params"], optimizer.state[new], params[name] = [new], kept, new


def test_another_s_strategy_refines() -> None:
    strategy = _Doubling()
    result = fit_images(drawn_scene(3, 24), FitConfig(steps=4, start_gaussians=30), strategy=strategy, progress=False)
    assert len(result.model) == result.model.config["num_gaussians"] == 60
    assert all(p.grad is None and len(p) == 60 for p in result.model.parameters())
    assert not torch.equal(result.model.means[:30], result.model.means[30:])  # the copies' moments began at zero


def test_models_are_folders_too(tmp_path) -> None:
    model = GaussianModel.from_points(torch.randn(10, 3), sh_degree=2, rasterize_mode="antialiased")
    model.save_pretrained(tmp_path / "m")
    back = GaussianModel.from_pretrained(tmp_path / "m")
    assert repr(back) == repr(model)
    assert torch.equal(back.means, model.means)


def test_ssim_is_one_for_equal_pictures_and_scikit_s_otherwise() -> None:
    from skimage.metrics import structural_similarity

    g = torch.Generator().manual_seed(0)
    a = torch.rand(3, 40, 30, generator=g)
    b = (a + 0.2 * torch.randn(3, 40, 30, generator=g)).clamp(0, 1)
    assert ssim(a, a).item() == pytest.approx(1)
    want = structural_similarity(
        a.numpy(),
        b.numpy(),
        channel_axis=0,
        data_range=1,
        gaussian_weights=True,
        use_sample_covariance=False,
        full=True,
    )[1]
    window = (slice(None), slice(6, -6), slice(6, -6))
    ours = ssim(a, b).item()
    assert ours == pytest.approx(want[window].mean(), abs=0.03)


def _write_scene(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Three pictures in a folder; their views and intrinsics."""
    posed = drawn_scene(3, 32)
    (folder / "images").mkdir(parents=True)
    for i, image in enumerate(posed.images):
        Image.fromarray(image.numpy()).save(folder / "images" / f"{i}.png")
    return posed.camera.viewmats, posed.camera.Ks


def test_transforms_json(tmp_path) -> None:
    views, ks = _write_scene(tmp_path)
    flip = torch.diag(torch.tensor([1.0, -1, -1, 1]))
    frames = [
        {"file_path": f"images/{i}", "transform_matrix": (torch.inverse(v) @ flip).tolist()}
        for i, v in enumerate(views)
    ]
    tree = {"camera_angle_x": 2 * math.atan(16 / float(ks[0, 0, 0])), "frames": frames}
    (tmp_path / "transforms.json").write_text(json.dumps(tree))
    posed = load_posed_images(tmp_path)
    torch.testing.assert_close(posed.camera.viewmats, views, atol=1e-5, rtol=0)
    torch.testing.assert_close(posed.camera.Ks, ks, atol=1e-3, rtol=0)
    assert load_posed_images(tmp_path, longest=16).camera.Ks[0, 0, 2] == 8
    (tmp_path / "transforms.json").write_text(json.dumps({**tree, "k1": 0.1}))
    with pytest.raises(InputError, match="distortion"):
        load_posed_images(tmp_path)
    (tmp_path / "transforms.json").write_text('{"frames": [{}]}')
    with pytest.raises(InputError, match="not a usable transforms file"):
        load_posed_images(tmp_path)


@pytest.mark.parametrize("binary", [True, False])
def test_colmap_models(tmp_path, binary: bool) -> None:
    from mmkit.pointcloud.gaussians import quaternion

    views, ks = _write_scene(tmp_path)
    model = tmp_path / "sparse" / "0"
    model.mkdir(parents=True)
    f = float(ks[0, 0, 0])
    rows = [
        (i + 1, quaternion(v[:3, :3].double()).tolist(), v[:3, 3].tolist(), f"{i}.png") for i, v in enumerate(views)
    ]
    if binary:
        (model / "cameras.bin").write_bytes(struct.pack("<QiiQQ4d", 1, 1, 1, 32, 32, f, f, 16, 16))
        images = b"".join(
            struct.pack("<i7di", n, *q, *t, 1) + name.encode() + b"\0" + struct.pack("<Q", 0) for n, q, t, name in rows
        )
        (model / "images.bin").write_bytes(struct.pack("<Q", 3) + images)
        (model / "points3D.bin").write_bytes(struct.pack("<QQ3d3BdQii", 1, 1, 0.5, 1, 2, 255, 0, 51, 0.1, 1, 1, 0))
    else:
        (model / "cameras.txt").write_text(f"# cameras\n1 PINHOLE 32 32 {f} {f} 16 16\n")
        lines = [" ".join(map(str, [n, *q, *t, 1, name])) + "\n\n" for n, q, t, name in rows]
        (model / "images.txt").write_text("# images\n" + "".join(lines))
        (model / "points3D.txt").write_text("1 0.5 1 2 255 0 51 0.1 1 0\n")
    posed = load_posed_images(tmp_path)
    torch.testing.assert_close(posed.camera.viewmats, views, atol=1e-5, rtol=0)
    torch.testing.assert_close(posed.camera.Ks, ks, atol=1e-3, rtol=0)
    torch.testing.assert_close(posed.points, torch.tensor([[0.5, 1, 2]]))
    torch.testing.assert_close(posed.point_colors, torch.tensor([[1, 0, 0.2]]))
    if binary:
        data = (model / "images.bin").read_bytes()
        for damaged in (data[:40], struct.pack("<Q", 10**9) + data[8:]):
            (model / "images.bin").write_bytes(damaged)
            with pytest.raises(InputError):
                load_posed_images(tmp_path)


def test_rgbd_excerpts() -> None:
    root = Path(os.environ.get("MMKIT_DATA_DIR", "../shared/data"))
    if not (root / "rgbd_tum5").is_dir():
        pytest.skip("no RGB-D excerpts in MMKIT_DATA_DIR")
    posed = load_posed_images(root / "rgbd_tum5", longest=80)
    assert len(posed) == 5
    assert posed.points is not None
    x = posed.points @ posed.camera.viewmats[0, :3, :3].T + posed.camera.viewmats[0, :3, 3]
    pixels = (x / x[:, 2:]) @ posed.camera.Ks[0].T
    inside = (x[:, 2] > 0) & (pixels[:, 0] > 0) & (pixels[:, 0] < 80) & (pixels[:, 1] > 0) & (pixels[:, 1] < 60)
    assert inside.float().mean() > 0.5  # other cameras' points lie in the first one's picture
    at = pixels[inside].long()
    assert posed.point_colors is not None
    error = (posed.images[0][at[:, 1], at[:, 0]].float() / 255 - posed.point_colors[inside]).abs().mean(1)
    assert error.median() < 0.12


def test_cameras_that_are_none_are_told(tmp_path) -> None:
    Image.new("RGB", (16, 12)).save(tmp_path / "0.png")
    frame = {"file_path": "0.png", "transform_matrix": np.eye(4).tolist()}
    (tmp_path / "transforms.json").write_text(json.dumps({"w": 0, "h": 12, "fl_x": 20, "frames": [frame]}))
    with pytest.raises(InputError, match="0 x 12 pixels, which no picture has"):
        load_posed_images(tmp_path)
    (tmp_path / "transforms.json").unlink()
    (tmp_path / "cameras.txt").write_text("1 PINHOLE 16 12 20 20 8 6\n")
    (tmp_path / "images.txt").write_text("1 1 0 0 0 0 1 0.png\n\n")
    with pytest.raises(InputError, match=r"not a readable COLMAP model.*is no picture"):
        load_posed_images(tmp_path)
    (tmp_path / "cameras.txt").unlink()
    for damaged in ("[" * 100_000, "[]", '{"fx": {}}'):
        (tmp_path / "camera.json").write_text(damaged)
        with pytest.raises(InputError, match="none of the layouts"):
            load_posed_images(tmp_path)


def test_a_folder_without_any_layout(tmp_path) -> None:
    with pytest.raises(InputError, match="none of the layouts"):
        load_posed_images(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        load_posed_images(tmp_path / "no")
    with pytest.raises(InputError, match="along `up`"):
        look_at(torch.tensor([[0.0, 1, 0]]), torch.zeros(3), torch.tensor([0.0, -1, 0]))


def test_the_pipeline_shows_the_bundled_scene(tmp_path) -> None:
    views = mmkit.pipeline("novel-view")
    result = views(azimuth=40, elevation=30, size=(64, 48))
    assert result.color.shape == (48, 64, 3)
    middle = result.alpha[20:30, 28:36]
    assert middle.min() > 0.9
    assert 1 < result.depth[24, 32] < 8
    assert result.save(tmp_path / "x.npz").stat().st_size > 1000
    assert result.depth_image().size == result.alpha_image().size == (64, 48)
    with pytest.raises(InputError, match="fov"):
        views(fov=200)
    with pytest.raises(InputError, match="no splat file"):
        mmkit.pipeline("novel-view", "nothing")


def test_the_command_converts_renders_and_tells(tmp_path) -> None:
    model = GaussianModel.from_points(torch.randn(30, 3), torch.rand(30, 3))
    save_splats(model, tmp_path / "x.ply")

    def run(*arguments: object) -> str:
        result = CliRunner().invoke(app, ["splat", *map(str, arguments)])
        assert result.exit_code == 0, result.output
        return result.output

    assert "30 Gaussians" in run("convert", tmp_path / "x.ply", tmp_path / "x.spz")
    assert json.loads(run("info", tmp_path / "x.spz"))["gaussians"] == 30
    run("render", tmp_path / "x.spz", tmp_path / "x.png", "--size", 32)
    assert Image.open(tmp_path / "x.png").size == (32, 32)
    run("fit", "drawn", tmp_path / "y.ply", "--steps", 2, "--gaussians", 50)
    assert len(load_splats(tmp_path / "y.ply")) == 50
    wrong = CliRunner().invoke(app, ["splat", "info", str(tmp_path / "z.ply")])
    assert wrong.exit_code == 1
    assert "does not exist" in wrong.output


def test_the_command_says_what_is_wrong_before_the_work(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mmkit.pointcloud.splats.training._Fit.advance", lambda self: pytest.fail("fitted"))
    monkeypatch.setattr("mmkit.pointcloud.splats.result.view", lambda *a: pytest.fail("rendered"))
    monkeypatch.setattr("mmkit.pointcloud.splats.pipeline.view", lambda *a: pytest.fail("rendered"))
    save_splats(GaussianModel.from_points(torch.randn(30, 3), torch.rand(30, 3)), "x.ply")
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.ply").mkdir()
    save_backbone(create_backbone("tiny_vit", num_classes=2), tmp_path / "saved")
    for line, told in (
        ("fit drawn x.txt", "no splat format has this suffix"),
        ("fit drawn folder.ply", "there is a folder of that name"),
        ("fit drawn file/y.ply", "a part of the path is a file"),
        ("fit drawn saved/y.ply", "would no longer be as it was saved"),
        ("fit drawn y.ply --restart", "--restart means nothing without --state"),
        ("fit drawn y.ply --longest 64", "--longest means nothing"),
        ("fit drawn y.ply --state file", "a part of the path is a file"),
        ("fit drawn y.ply --state saved", "holds a backbone, no run"),
        (f"fit drawn y.ply --seed {2**70}", "seed must be a whole number within"),
        ("convert x.ply saved/y.spz", "would no longer be as it was saved"),
        ("render x.ply y.jpg", "a film to .mp4"),
        ("render x.ply folder.ply/y.png --frames 3", "--frames means nothing for a single view"),
        ("render x.ply y.mp4 --azimuth 3", "--azimuth means nothing for a film"),
        ("render x.ply y.mp4 --distance -2", "distance must be above 0"),
        ("render x.ply y.mp4 --elevation nan", "elevation is an angle"),
        ("render x.ply y.png --elevation nan", "elevation is an angle"),
        ("render x.ply y.png --azimuth inf", "azimuth is an angle"),
        ("render x.ply file/y.png", "a part of the path is a file"),
    ):
        result = CliRunner().invoke(app, ["splat", *line.split()])
        assert result.exit_code == 1, line
        assert told in " ".join(result.output.split()), (line, result.output)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.ply", "saved", "x.ply"], line


def test_a_film_of_the_bundled_scene_by_its_name(tmp_path) -> None:
    line = ["splat", "render", "splat_still_life", str(tmp_path / "x.mp4"), "--frames", "2", "--size", "32"]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "x.mp4").stat().st_size > 100


def test_a_film_around_a_scene(tmp_path) -> None:
    import av

    model = GaussianModel.from_points(torch.randn(30, 3), torch.rand(30, 3))
    path = turntable(model, tmp_path / "x.mp4", frames=5, size=32)
    with av.open(str(path)) as film:
        assert sum(1 for _ in film.decode(video=0)) == 5
    with pytest.raises(InputError, match="even"):
        turntable(model, tmp_path / "y.mp4", size=33)
    for fps in (0, -3, 29.97):  # 0 was taken for 24
        with pytest.raises(InputError, match="fps"):
            turntable(model, tmp_path / "y.mp4", frames=2, size=32, fps=fps)
    assert not (tmp_path / "y.mp4").exists()


def test_measure_is_perfect_for_the_scene_s_own_pictures() -> None:
    model = GaussianModel.from_points(torch.randn(50, 3), torch.rand(50, 3))
    posed = drawn_scene(2, 32)
    with torch.no_grad():
        image, _, _ = model.render(posed.camera)
    posed.images = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    assert measure(model, posed)["psnr"] == pytest.approx(100)
    assert np.isclose(measure(model, posed)["ssim"], 1)
