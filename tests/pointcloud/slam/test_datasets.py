"""Sequences of every layout, written here as their makers write them; and what is wrong with people's data."""

from __future__ import annotations

import json
import os
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

import mmkit
from mmkit.data.drawn.rooms import DrawnRoom, flipped_labels, noisy, value_noise
from mmkit.errors import InputError
from mmkit.pointcloud.slam import RGBDFrame, RGBDSequence, RGBDVideo, SyntheticRoom, TUMDataset, open_sequence
from mmkit.pointcloud.slam.datasets import pose_of_line, straightened

W, H, N = 32, 24, 4
DATA = Path(os.environ.get("MMKIT_DATA_DIR", "../shared/data"))


def picture(i: int, w: int = W, h: int = H) -> Image.Image:
    return Image.fromarray(np.random.default_rng(i).integers(0, 256, (h, w, 3), np.uint8))


def depth(path: Path, scale: float, metres: float = 2.0, w: int = W, h: int = H) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.full((h, w), round(metres * scale), np.uint16)
    values[0, 0], values[0, 1] = 0, 65535
    Image.fromarray(values).save(path)


def save(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def labels(path: Path) -> None:
    save(path, Image.fromarray(np.full((H, W), 3, np.uint8)))


def shifted(i: int) -> np.ndarray:
    pose = np.eye(4)
    pose[0, 3] = 0.1 * i
    return pose


def replica(root: Path) -> None:
    for i in range(N):
        save(root / "results" / f"frame{i:06d}.jpg", picture(i))
        depth(root / "results" / f"depth{i:06d}.png", 6553.5)
        labels(root / "semantic_class" / f"semantic_class_{i}.png")
    (root / "traj.txt").write_text("\n".join(" ".join(map(str, shifted(i).ravel())) for i in range(N)))
    (root / "info_semantic_tree.json").write_text(json.dumps({"0_void": [{"0": "a"}], "3_wall": [{"1": "b"}]}))


def scannet(root: Path) -> None:
    for i in range(N):
        save(root / "color" / f"{i}.jpg", picture(i, 2 * W, 2 * H))
        depth(root / "depth" / f"{i}.png", 1000)
        (root / "pose").mkdir(exist_ok=True)
        np.savetxt(root / "pose" / f"{i}.txt", shifted(i) if i != 1 else np.full((4, 4), -np.inf))
    (root / "intrinsic").mkdir()
    np.savetxt(
        root / "intrinsic" / "intrinsic_color.txt",
        np.diag([80, 80, 1, 1.0]) + np.array([[0, 0, W, 0], [0, 0, H, 0], [0] * 4, [0] * 4]),
    )


def seven(root: Path) -> None:
    for i in range(N):
        save(root / f"frame-{i:06d}.color.png", picture(i))
        depth(root / f"frame-{i:06d}.depth.png", 1000)
        np.savetxt(root / f"frame-{i:06d}.pose.txt", shifted(i))


def tum(root: Path) -> None:
    lines: dict[str, list[str]] = {"rgb": ["# time file"], "depth": [], "groundtruth": []}
    for i in range(N):
        save(root / "rgb" / f"{i}.png", picture(i))
        depth(root / "depth" / f"{i}.png", 5000)
        lines["rgb"].append(f"{i / 10} rgb/{i}.png")
        lines["depth"].append(f"{i / 10 + 0.01} depth/{i}.png")
        lines["groundtruth"].append(f"{i / 10 + 0.02} {0.1 * i} 0 0 0 0 0 1")
    lines["rgb"].append("0.301 rgb/3.png")  # faster than 32 a second
    lines["rgb"].append("9.0 rgb/3.png")  # without a partner
    for name, text in lines.items():
        (root / f"{name}.txt").write_text("\n".join(text))


def own(root: Path) -> None:
    for i in range(N):
        save(root / "color" / f"{9 + i}.png", picture(i))
        depth(root / "depth" / f"{9 + i}.png", 500)
        labels(root / "labels" / f"{9 + i}.png")
    (root / "camera.json").write_text(json.dumps({"fx": 40, "fy": 40, "cx": 16, "cy": 12, "depth_scale": 500}))
    rows = [f"{0.1 * i} 0 0 0 0 0 1" for i in range(N)]
    rows[2] = "nan 0 0 0 0 0 1"
    (root / "pose.txt").write_text("\n".join(rows))
    (root / "tree.json").write_text(json.dumps({"3_wall": [{"0": "a"}], "4_floor_lamp": [{"1": "b"}]}))


LAYOUTS = {"replica": replica, "scannet": scannet, "seven": seven, "tum": tum, "own": own}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_told_apart_and_read(name, tmp_path):
    root = tmp_path / "freiburg3_desk"  # whose lens is straight
    LAYOUTS[name](root)
    sequence = open_sequence(root)
    assert len(sequence) == N
    frame = sequence[N - 1]
    assert frame.depth.shape == (H, W)
    assert frame.color.shape == (H, W, 3)
    assert frame.depth[5, 5] == pytest.approx(2.0, abs=1e-3)
    assert frame.depth[0, :2].tolist() == [0, 0]
    assert frame.pose is not None
    assert frame.pose[0, 3] == pytest.approx(0.1 * (N - 1))
    if name in ("replica", "own"):
        assert sequence.tree is not None
        assert frame.labels is not None
        assert int(frame.labels[4, 4]) == 3
    if name == "replica":
        assert frame.K[0, 2] == 600
    if name == "scannet":  # pictures of twice the depths' size
        assert frame.K[0].tolist() == [40, 0, W / 2]
    truth = sequence.trajectory()
    assert truth is not None
    lost = ~truth.isfinite().all(2).all(1)
    assert lost.tolist() == [i == {"scannet": 1, "own": 2}.get(name) for i in range(N)]
    assert len(open_sequence(root, every=2)) == 2
    with pytest.raises(IndexError):
        sequence[N]


def test_pictures_are_in_order_of_their_numbers(tmp_path):
    own(tmp_path)
    for hidden in ("._9.png", ".thumbnail.png"):  # what systems leave beside pictures
        (tmp_path / "color" / hidden).write_bytes(b"not a picture")
    assert [c.stem for c in open_sequence(tmp_path).colors] == ["9", "10", "11", "12"]


def test_small_frames_are_the_same_view(tmp_path):
    own(tmp_path)
    frame = open_sequence(tmp_path, longest=16)[0]
    assert frame.depth.shape == (12, 16)
    assert frame.K[:2].tolist() == [[20, 0, 8], [0, 20, 6]]


def test_missing_and_uneven_data_are_told(tmp_path):
    with pytest.raises(InputError, match="not a folder"):
        open_sequence(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"camera\.json"):
        open_sequence(tmp_path)
    own(tmp_path)
    (tmp_path / "depth" / "10.png").unlink()
    with pytest.raises(InputError, match="4 pictures, 3 depth pictures, 4 poses"):
        open_sequence(tmp_path)
    depth(tmp_path / "depth" / "10.png", 500)
    (tmp_path / "pose.txt").write_text("0 0 0 0 0 0 1\n")
    with pytest.raises(InputError, match="1 poses"):
        open_sequence(tmp_path)
    (tmp_path / "pose.txt").unlink()
    assert open_sequence(tmp_path).trajectory() is None
    (tmp_path / "pose.txt").write_text("\n".join(["0 0 0 0 1"] * 4))
    with pytest.raises(InputError, match="16 numbers"):
        open_sequence(tmp_path)
    (tmp_path / "camera.json").write_text('{"fx": 3}')
    with pytest.raises(InputError, match="depth_scale"):
        open_sequence(tmp_path)


def test_a_missing_depth_is_no_other_frames_depth_when_frames_are_thinned(tmp_path):
    own(tmp_path)
    (tmp_path / "depth" / "10.png").unlink()
    with pytest.raises(InputError, match="4 pictures, 3 depth pictures"):
        open_sequence(tmp_path, every=2)
    depth(tmp_path / "depth" / "10.png", 500)
    thin = open_sequence(tmp_path, every=2)
    assert [thin[i].name for i in range(len(thin))] == ["9.png", "11.png"]
    assert thin[0].pose is not None
    assert thin[1].pose is None
    with pytest.raises(InputError, match="every must be at least 1"):
        open_sequence(tmp_path, every=0)


@pytest.mark.parametrize(
    ("layout", "file", "text", "told"),
    [
        ("replica", "cam_params.json", "{", "must hold a camera"),
        ("replica", "cam_params.json", "[]", "must hold a camera"),
        ("replica", "cam_params.json", '{"camera": {"fx": null}}', "must hold a camera"),
        ("replica", "cam_params.json", '{"camera": {"fx": 0}}', "is no camera"),
        ("replica", "cam_params.json", '{"camera": {"scale": NaN}}', "depth_scale must be above 0"),
        ("scannet", "intrinsic/intrinsic_color.txt", "80 0 16", "must hold a 3 x 3 or 4 x 4 matrix"),
        ("scannet", "intrinsic/intrinsic_color.txt", "", "must hold a 3 x 3 or 4 x 4 matrix"),
        ("seven", "camera-intrinsics.txt", "nan 0 1\n0 4 5\n0 0 1", "is no camera"),
        ("own", "camera.json", "[" * 100_000, "must hold fx, fy, cx, cy"),
        ("own", "camera.json", '{"fx": -1, "fy": 40, "cx": 1, "cy": 1}', "is no camera"),
        ("own", "camera.json", '{"fx": 1, "fy": 40, "cx": 1, "cy": 1, "distortion": null}', "distortion is a list"),
        ("own", "camera.json", '{"fx": 1, "fy": 40, "cx": 1, "cy": 1, "distortion": "wide"}', "distortion is a list"),
    ],
)
def test_a_damaged_camera_is_told(layout, file, text, told, tmp_path):
    LAYOUTS[layout](tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(InputError, match=told):
        open_sequence(tmp_path)


def test_damaged_pictures_are_told(tmp_path):
    own(tmp_path)
    (tmp_path / "depth" / "9.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"9\.png"):
        open_sequence(tmp_path)[0]
    save(tmp_path / "depth" / "9.png", picture(0))
    with pytest.raises(InputError, match="one channel"):
        open_sequence(tmp_path)[0]
    save(tmp_path / "color" / "10.png", picture(0, 20, 40))
    with pytest.raises(InputError, match="shapes differ"):
        open_sequence(tmp_path)[1]
    sequence = open_sequence(tmp_path)
    (tmp_path / "color" / "11.png").unlink()
    with pytest.raises((InputError, OSError), match=r"11\.png"):
        sequence[2]
    with pytest.raises(InputError, match="no frames"):
        RGBDSequence([], [], np.eye(3))


def test_tum_names_its_lens_and_damaged_lists(tmp_path):
    tum(tmp_path)
    assert TUMDataset(tmp_path).distortion[0] == pytest.approx(0.2624)
    (tmp_path / "depth.txt").write_text("once upon a time\n")
    with pytest.raises(InputError, match=r"depth\.txt"):
        open_sequence(tmp_path)


def test_a_lens_is_straightened():
    K = torch.tensor([[40.0, 0, 16], [0, 40, 12], [0, 0, 1]])
    frame = RGBDFrame(
        torch.from_numpy(np.array(picture(0))), torch.rand(H, W, generator=torch.Generator().manual_seed(0)), K
    )
    assert straightened(frame, (0, 0, 0)) is frame
    bent = straightened(frame, (0.5, 0.0, 0.0, 0.0, 0.0))
    assert bent.depth[12, 16] == frame.depth[12, 16]  # the middle stays
    x = (31.5 - 16) / 40
    r = x * x + (0.5 / 40) ** 2
    seen = 16 + 40 * x * (1 + 0.5 * r)
    assert seen > 32  # so the margin looks beside the picture
    assert bent.depth[12, 31] == 0


def test_frames_say_what_is_wrong_with_them():
    color, far, K = torch.zeros(4, 5, 3, dtype=torch.uint8), torch.ones(4, 5), torch.eye(3)
    for change, message in (
        ({"color": color.float()}, "uint8"), ({"color": color[:3]}, "uint8"), ({"depth": -far}, "negative"),
        ({"depth": far * torch.nan}, "finite"),
        ({"K": torch.zeros(3, 3)}, "focal"), ({"labels": torch.zeros(2, 2)}, "labels"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            RGBDFrame(**{"color": color, "depth": far, "K": K, **change})


def test_a_drawn_room_is_what_its_poses_and_depths_say():
    room = SyntheticRoom(frames=12, width=80, height=60, noise=False)
    a, b = room[0], room[8]
    rows, columns = torch.meshgrid(torch.arange(60), torch.arange(80), indexing="ij")
    x = torch.stack([(columns + 0.5 - 40) / 64, (rows + 0.5 - 30) / 64, torch.ones(60, 80)], -1) * a.depth[..., None]
    world = x.double() @ a.pose[:3, :3].T + a.pose[:3, 3]
    local = (world - b.pose[:3, 3]) @ b.pose[:3, :3]
    u, v = (64 * local[..., 0] / local[..., 2] + 40).long(), (64 * local[..., 1] / local[..., 2] + 30).long()
    inside = (u >= 0) & (u < 80) & (v >= 0) & (v < 60)
    assert inside.float().mean() > 0.5
    seen = b.depth[v[inside], u[inside]]
    same = (seen - local[..., 2][inside]).abs() < 0.08
    assert same.float().mean() > 0.9  # the rest is hidden
    assert (b.labels[v[inside], u[inside]] == a.labels[inside])[same].float().mean() > 0.97
    step = torch.linalg.inv(room.poses[4]) @ room.poses[5]
    assert 0.005 < step[:3, 3].norm() < 0.03
    assert room.tree.level_sizes == (3, 3, 3)
    assert SyntheticRoom(num_classes=60, objects=54).tree.levels == 4


def test_a_drawn_room_is_the_same_again_and_noise_is_a_cameras():
    one, two = SyntheticRoom(frames=3, width=64, height=48), SyntheticRoom(frames=3, width=64, height=48)
    assert torch.equal(one[2].depth, two[2].depth)
    assert torch.equal(one[2].color, two[2].color)
    assert not torch.equal(one[2].depth, SyntheticRoom(frames=3, width=64, height=48, seed=1)[2].depth)
    clean, seen = one.clean(1), one[1]
    holes = seen.depth == 0
    assert 0.003 < holes.float().mean() < 0.03
    error = (seen.depth - clean.depth)[~holes]
    assert 0.0005 < error.std() < 0.01
    assert torch.allclose((seen.depth * 1000).round(), seen.depth * 1000, atol=2e-3)
    flipped = flipped_labels(clean.labels.numpy(), 24, 0.2, np.random.default_rng(0))
    assert 0.1 < (flipped != clean.labels.numpy()).mean() < 0.3
    with pytest.raises(ValueError, match="7 classes"):
        DrawnRoom(num_classes=3)
    with pytest.raises(InputError, match="16 x 16"):
        SyntheticRoom(width=8)
    assert noisy(np.zeros((2, 2, 3)), np.ones((2, 2)), np.random.default_rng(0))[1].shape == (2, 2)


def test_the_rooms_noise_is_the_same_on_every_platform():
    u, v = np.array([0.3, -7.2, 1000.5]), np.array([1.7, 2.2, -3.3])
    got = value_noise(u, v, np.array([5, 5, 9], np.uint64))
    assert got.tolist() == pytest.approx([0.6182660043945313, 0.5206070066795349, 0.4344056940078734], abs=1e-12)


def test_poses_of_lines():
    pose = pose_of_line(np.array([1, 2, 3, 0, 0, 0, 2.0]))
    assert pose.tolist() == [[1, 0, 0, 1], [0, 1, 0, 2], [0, 0, 1, 3], [0, 0, 0, 1]]


def film(path: Path, frames: int = N) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "5"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(frames):
            frame = Image.new("RGB", (64, 48), (40 * i, 100, 200 - 40 * i))
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())


def test_a_film_with_depths_is_a_sequence(tmp_path):
    own(tmp_path)
    film(tmp_path / "walk.mp4")
    sequence = RGBDVideo(tmp_path / "walk.mp4", tmp_path / "depth")
    assert len(sequence) == N
    reds = [int(sequence[i].color[10, 10, 0]) for i in (0, 2, 3, 1)]  # going back starts it again
    assert reds == pytest.approx([0, 80, 120, 40], abs=12)
    assert sequence[0].depth.shape == (H, W)
    thin = RGBDVideo(tmp_path / "walk.mp4", tmp_path / "depth", every=2)
    assert [int(thin[i].color[10, 10, 0]) for i in range(len(thin))] == pytest.approx([0, 80], abs=12)
    (tmp_path / "depth" / "9.png").unlink()
    with pytest.raises(InputError, match="4 pictures, 3 depth pictures"):
        RGBDVideo(tmp_path / "walk.mp4", tmp_path / "depth")
    (tmp_path / "bad.mp4").write_bytes(b"no film")
    for name, message in (("bad.mp4", "not a readable film"), ("none.mp4", "does not exist")):
        with pytest.raises(InputError, match=message):
            RGBDVideo(tmp_path / name, tmp_path / "depth")
    with pytest.raises(InputError, match="as `depth`"):
        mmkit.pipeline("semantic-slam")(tmp_path / "walk.mp4")


@pytest.mark.skipif(not (DATA / "rgbd_7scenes").is_dir(), reason="needs MMKIT_DATA_DIR")
def test_real_recordings_are_read():
    assert len(open_sequence(DATA / "rgbd_7scenes")) == 120
    frame = open_sequence(DATA / "rgbd_7scenes", longest=160)[7]
    assert frame.K[0, 0] == pytest.approx(585 / 4)
    assert float((frame.depth > 0).float().mean()) > 0.5
    tum5 = open_sequence(DATA / "rgbd_tum5")
    assert len(tum5) == 5
    assert 0.5 < float(tum5[0].depth[tum5[0].depth > 0].median()) < 6
