"""Whole runs on a small drawn room: reruns, resuming, lost cameras, labels, files, the pipeline and the command."""

from __future__ import annotations

import dataclasses
import errno
import json
import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import mmkit
from mmkit.backbones import create_backbone, save_backbone
from mmkit.cli import app
from mmkit.errors import BackendUnavailableError, CheckpointError, InputError, InterruptedRun, StorageError
from mmkit.pointcloud.slam import (
    HierSLAM,
    HierSLAMConfig,
    SemanticTree,
    SyntheticRoom,
    ate_rmse,
    evaluate,
    gicp_available,
    load_official,
    save_official,
)  # fmt: skip
from mmkit.pointcloud.slam.keyframes import Keyframe
from mmkit.pointcloud.slam.loops import close_loop, move, searched
from mmkit.pointcloud.slam.poses import angle, inverse, matrix, split
from mmkit.pointcloud.slam.tracking import photometric
from mmkit.pointcloud.splats import load_splats

pytestmark = pytest.mark.slow  # renders, so compiles the rasteriser
FAST = {
    "map_every": 2,
    "keyframe_every": 2,
    "window": 4,
    "map_iters": 6,
    "first_map_iters": 20,
    "track_iters": 5,
    "leaf_from_iter": 2,
}


def settings(**changes) -> HierSLAMConfig:
    return HierSLAMConfig.preset("cpu_small", **{"tracker": "photometric", **FAST, **changes})


class Recorded:
    """Frames drawn once, as a sequence."""

    def __init__(self, room: SyntheticRoom):
        self.frames = list(room)
        self.tree, self.poses, self.clean = room.tree, room.poses, room.clean

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int):
        return self.frames[index]


@pytest.fixture(scope="module")
def room() -> Recorded:
    return Recorded(SyntheticRoom(frames=9, width=64, height=48))


@pytest.fixture(scope="module")
def done(room) -> HierSLAM:
    slam = HierSLAM(settings(), room.tree)
    slam.run(room, progress=False)
    return slam


def same(a: HierSLAM, b: HierSLAM) -> None:
    assert torch.equal(a.trajectory(), b.trajectory())
    for name, value in a.map.tensors().items():
        assert torch.equal(value, b.map.tensors()[name]), name
    assert a.head is not None
    assert b.head is not None
    assert torch.equal(a.head.weight, b.head.weight)


def test_a_run_follows_the_camera_and_knows_the_labels(done, room):
    figures = evaluate(done, room, reference=room.clean)
    assert figures["ate_rmse"] < 0.02
    assert figures["psnr"] > 26
    assert figures["depth_l1"] < 0.05
    assert figures["miou"] > 0.5
    assert figures["miou_visible_subset"] >= figures["miou_per_frame"]
    assert figures["lost"] == 0
    assert done.bytes()["map"] == len(done.map) * (48 + 4 * 9)
    still = HierSLAM(settings(tracker="constant"), room.tree)
    still.run(room, progress=False)
    assert evaluate(still, room, every=4)["ate_rmse"] > 3 * figures["ate_rmse"]


def test_a_rerun_is_the_same_and_an_interrupted_run_ends_the_same(done, room, tmp_path):
    def stop(slam, step):
        if step.index == 5:
            raise KeyboardInterrupt

    part = HierSLAM(settings(), room.tree)
    with pytest.raises(KeyboardInterrupt):
        part.run(room, output=tmp_path / "run", save_every=2, progress=False, callbacks=[stop])
    again = HierSLAM(settings(), room.tree)
    steps = again.run(room, output=tmp_path / "run", progress=False)
    assert [s.index for s in steps] == [6, 7, 8]
    same(done, again)
    loaded = HierSLAM.load(tmp_path / "run")
    same(done, loaded)
    assert loaded.run(room, progress=False) == []


def test_a_signal_ends_a_run_with_its_state_saved_and_its_folder_is_its_own(done, room, tmp_path):
    def stop(slam, step):
        if step.index == 4:
            again = HierSLAM(settings(), room.tree)
            with pytest.raises(InputError, match="in use by another"), ThreadPoolExecutor(1) as other:
                other.submit(again.run, room, output=tmp_path / "run", progress=False).result()
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(InterruptedRun, match=r"after 6 steps; the state is saved in .*run") as caught:
        HierSLAM(settings(), room.tree).run(room, output=tmp_path / "run", progress=False, callbacks=[stop])
    assert caught.value.number == signal.SIGTERM
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    again = HierSLAM(settings(), room.tree)
    assert [s.index for s in again.run(room, output=tmp_path / "run", progress=False)] == [6, 7, 8]
    same(done, again)
    saved = save_backbone(create_backbone("tiny_vit", num_classes=2), tmp_path / "saved")
    with pytest.raises(InputError, match="holds a backbone, not a slam"):
        HierSLAM(settings(), room.tree).run(
            room, output=saved, progress=False, callbacks=[lambda *a: pytest.fail("ran")]
        )


def test_a_run_goes_on_with_its_own_recording_only(room, tmp_path):
    first = HierSLAM(settings(map_iters=1), room.tree)
    first.run([room[i] for i in range(4)], output=tmp_path / "run", progress=False)
    for strange in ([room[1], *(room[i] for i in range(1, 6))], [*(room[i] for i in (0, 1, 2)), room[4], room[5]]):
        with pytest.raises(InputError, match="another recording"):
            HierSLAM(settings(map_iters=1), room.tree).run(strange, output=tmp_path / "run", progress=False)
    again = HierSLAM(settings(map_iters=1), room.tree)
    assert len(again.run([room[i] for i in range(5)], output=tmp_path / "run", progress=False)) == 1
    assert len(HierSLAM.load(tmp_path / "run")) == 5


@pytest.mark.skipif(not gicp_available(), reason="needs small_gicp")
def test_geometry_tracks_and_resumes_as_well(room, tmp_path):
    config = settings(tracker="auto", scan_every=2, gicp_voxel=0.05, refine_iters=2)
    whole = HierSLAM(config, room.tree)
    whole.run(room, progress=False)
    assert whole.tracker == "gicp"
    assert evaluate(whole, room, every=4)["ate_rmse"] < 0.01
    part = HierSLAM(config, room.tree)
    for i in range(5):
        part.step(room[i])
    part.save(tmp_path / "half")
    again = HierSLAM.load(tmp_path / "half")
    again.run(room, progress=False)
    same(whole, again)


def test_the_tracker_that_is_missing_names_the_command(monkeypatch):
    monkeypatch.setattr("mmkit.pointcloud.slam.gicp.gicp_available", lambda: False)
    with pytest.raises(BackendUnavailableError, match="mmkit\\[slam\\]"):
        HierSLAM(settings(tracker="gicp"))
    assert HierSLAM(settings(tracker="auto")).tracker == "photometric"


def test_a_state_of_other_settings_or_another_tree_is_refused(done, room, tmp_path):
    done.save(tmp_path / "run")
    with pytest.raises(InputError, match="map_iters"):
        HierSLAM(settings(map_iters=7), room.tree).run(room, output=tmp_path / "run", progress=False)
    with pytest.raises(InputError, match="another label tree"):
        HierSLAM(settings(), SemanticTree.random(24, 3)).run(room, output=tmp_path / "run", progress=False)
    (tmp_path / "run" / "map.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError):
        HierSLAM.load(tmp_path / "run")
    with pytest.raises(InputError, match="not a folder"):
        HierSLAM.load(tmp_path / "nothing")


def test_a_full_disk_leaves_the_state_before(done, tmp_path, monkeypatch):
    done.save(tmp_path / "run")
    before = (tmp_path / "run" / "map.safetensors").read_bytes()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mmkit.pointcloud.slam.storage.write_json", full)
    with pytest.raises(StorageError, match="disk is full"):
        done.save(tmp_path / "run")
    assert (tmp_path / "run" / "map.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_camera_that_jumps_is_lost_and_found_and_the_map_survives(room):
    slam = HierSLAM(settings(lost_factor=3.0), room.tree)
    slam.run(room.frames[:6], progress=False)
    before = slam.map.tensors()
    elsewhere = SyntheticRoom(frames=9, width=64, height=48, seed=7)[3]
    with pytest.warns(UserWarning, match="tracking is lost"):
        step = slam.step(elsewhere)
    assert not step.tracked
    assert not step.mapped
    assert all(torch.equal(v, slam.map.tensors()[k]) for k, v in before.items())
    back = slam.step(room[5])
    assert back.tracked
    truth = inverse(room.poses[0]) @ room.poses[5]
    assert (slam.poses[-1][:3, 3] - truth[:3, 3]).norm() < 0.05


def test_frames_without_depth_are_lost_or_cannot_begin(room):
    blind = dataclasses.replace(room[1], depth=torch.zeros(48, 64))
    with pytest.raises(InputError, match="no depth at all"):
        HierSLAM(settings(), room.tree).step(blind)
    slam = HierSLAM(settings(), room.tree)
    slam.step(room[0])
    with pytest.warns(UserWarning, match="tracking is lost"):
        assert not slam.step(blind).tracked
    assert slam.step(room[2]).tracked


def test_no_gaussian_comes_from_a_hole_and_bounds_hold(room):
    slam = HierSLAM(settings(max_gaussians=2000, max_new=1500, max_keyframes=4), room.tree)
    steps = slam.run(room, progress=False)
    assert steps[0].added == 1500
    assert len(slam.map) <= 2000
    assert len(slam.keyframes) == 4
    whole = HierSLAM(settings(map_iters=0, first_map_iters=0), room.tree)
    assert whole.step(room[0]).added == int((room[0].depth > 0).sum())


def test_labels_outside_the_tree_are_told_and_not_learned(room):
    strange = dataclasses.replace(room[0], labels=torch.full((48, 64), 77))
    slam = HierSLAM(settings(), room.tree)
    with pytest.warns(UserWarning, match=r"\[77\] are not in the tree"):
        slam.step(strange)
    assert len(slam.map) > 1000


def test_labels_may_come_from_a_segmenter(room):
    bare = dataclasses.replace(room[0], labels=None)
    asked = []

    def ids(color):
        asked.append(color.dtype)
        return room[0].labels

    slam = HierSLAM(settings(first_map_iters=30), room.tree, labeler=ids)
    slam.step(bare)
    assert asked == [torch.uint8]
    view = slam.render(torch.eye(4, dtype=torch.float64), bare.K, (64, 48))
    known = view.labels >= 0
    assert (view.labels == room[0].labels)[known].float().mean() > 0.8
    scores = HierSLAM(
        settings(first_map_iters=0),
        room.tree,
        labeler=lambda c: torch.nn.functional.one_hot(room[0].labels, 24).float(),
    )
    scores.step(bare)
    assert torch.equal(scores.keyframes[0].frame.labels, room[0].labels)
    with pytest.raises(InputError, match="labeler must return"):
        HierSLAM(settings(), room.tree, labeler=lambda c: torch.zeros(3)).step(bare)


def test_codes_may_be_flat_left_out_or_keep_off_the_geometry(room):
    flat = HierSLAM(settings(semantics="flat", first_map_iters=25), room.tree)
    flat.step(room[0])
    assert flat.map.code_dim == 24
    assert flat.head is None
    view = flat.render(torch.eye(4, dtype=torch.float64), room[0].K, (64, 48))
    assert (view.labels == room[0].labels)[view.labels >= 0].float().mean() > 0.8
    none = HierSLAM(settings(), None)
    none.step(room[0])
    assert none.map.code_dim == 0
    assert none.labels() is None
    with pytest.raises(InputError, match="no labels"):
        none.classes(torch.zeros(3))
    means = []
    for weight in (0.0, 5.0):
        apart = HierSLAM(settings(detach_geometry=True, semantic_weight=weight, first_map_iters=5), room.tree)
        apart.step(room[0])
        means.append(apart.map.means.detach())
    assert torch.equal(*means)


def test_a_disturbed_pose_comes_back(done, room):
    pose = done.poses[4]
    q, t = split(inverse(pose))
    turn = torch.tensor([1.0, 0.003, 0.003, 0.0], dtype=torch.float64)  # half a degree
    guess = inverse(matrix(turn, torch.tensor([0.01, 0.0, 0.0], dtype=torch.float64)) @ matrix(q, t))
    own = done.render(pose, room[4].K, (64, 48))
    seen = dataclasses.replace(
        room[4], color=(own.rgb * 255).round().to(torch.uint8), depth=torch.where(own.alpha > 0.99, own.depth, 0.0)
    )
    config = dataclasses.replace(done.config, lr_rotation=4e-4, lr_translation=1e-3)
    found = photometric(done.map, seen, guess, config, iterations=60)
    assert (found.pose[:3, 3] - pose[:3, 3]).norm() < 0.002
    assert angle(found.pose, pose) < 0.1
    after = photometric(done.map, seen, guess, config, iterations=3, official_candidate=True)
    assert not torch.equal(after.pose, guess)


def test_a_map_moves_with_its_poses(done, room, tmp_path):
    slam = HierSLAM.load(done.save(tmp_path / "run"))
    K, size = room[3].K, (64, 48)
    before = slam.render(slam.poses[3], K, size)
    shift = torch.eye(4, dtype=torch.float64)
    shift[0, 3] = 1.0
    move(slam, shift @ slam.trajectory())
    after = slam.render(slam.poses[3], K, size)
    assert (before.rgb - after.rgb).abs().mean() < 1e-3
    assert slam.keyframes[0].view[0, 3] == pytest.approx(-1.0)


@pytest.mark.skipif(not gicp_available(), reason="needs small_gicp")
def test_a_camera_that_moved_far_is_looked_for_and_one_elsewhere_is_lost(room, monkeypatch):
    far = SyntheticRoom(frames=2, width=64, height=48, speed=20.0)  # 26 degrees and 28 cm
    slam = HierSLAM(settings(tracker="gicp", gicp_voxel=0.05, gicp_reach=0.05), None)
    slam.step(far[0])
    looked = []

    def search(*args):
        looked.append(1)
        return searched(*args)

    monkeypatch.setattr("mmkit.pointcloud.slam.loops.searched", search)
    assert slam.step(far[1]).tracked
    assert looked
    truth = inverse(far.poses[0]) @ far.poses[1]
    assert (slam.poses[1][:3, 3] - truth[:3, 3]).norm() < 0.03
    assert angle(slam.poses[1], truth) < 1.0
    slam = HierSLAM(settings(tracker="gicp", gicp_voxel=0.05, lost_factor=3.0), None)
    slam.run(room.frames[:5], progress=False)
    with pytest.warns(UserWarning, match="tracking is lost"):
        assert not slam.step(SyntheticRoom(frames=9, width=64, height=48, seed=7)[3]).tracked


@pytest.mark.skipif(not gicp_available(), reason="needs small_gicp")
def test_an_old_place_seen_again_takes_drift_away(room, tmp_path, monkeypatch):
    monkeypatch.setattr("mmkit.pointcloud.slam.loops.APART", 5)
    slam = HierSLAM(settings(tracker="gicp", scan_every=2, gicp_voxel=0.05, refine_iters=0), room.tree)
    slam.run(room, progress=False)
    before = slam.trajectory()
    drift = matrix(
        torch.tensor([1.0, 0.0, 0.006, 0.0], dtype=torch.float64), torch.tensor([0.04, 0.0, 0.02], dtype=torch.float64)
    )
    slam.poses.append(drift)  # the first frame's place, but for the drift
    slam.tracked.append(True)
    again = Keyframe(len(room), slam._labelled(room[0]), inverse(drift).float())
    slam.keyframes.append(again)
    assert close_loop(slam, again, slam.scans.thin(room[0]))
    assert slam.loops == [(0, len(room))]
    assert slam.poses[-1][:3, 3].norm() < 0.004
    assert angle(slam.poses[-1], torch.eye(4)) < 0.1
    assert torch.equal(slam.poses[0], before[0])
    spread = (slam.trajectory()[:-1, :3, 3] - before[:, :3, 3]).norm(dim=1)
    assert spread[-1] > spread[1]  # later frames take more of the correction
    assert not close_loop(slam, again, slam.scans.thin(room[0]))  # nothing is left to correct
    assert HierSLAM.load(slam.save(tmp_path / "run")).loops == slam.loops


def test_depths_may_come_from_a_source_of_unknown_scale(room):
    rng = np.random.default_rng(0)
    number = iter(range(len(room)))

    def guess(color, K):
        i = next(number)
        scale = 1.0 if i == 0 else rng.uniform(0.8, 1.25)
        return room.clean(i).depth * scale

    blind = [dataclasses.replace(f, depth=torch.zeros(48, 64)) for f in room.frames]
    slam = HierSLAM(settings(), room.tree, depth_source=guess)
    slam.run(blind, progress=False)
    truth = inverse(room.poses[0]) @ torch.stack(room.poses)
    assert ate_rmse(slam.trajectory(), truth, with_scale=True) < 0.02
    with pytest.raises(InputError, match="depth source must return"):
        HierSLAM(settings(), room.tree, depth_source=lambda c, K: torch.zeros(2, 2)).step(blind[0])


def test_poses_may_be_given(room):
    slam = HierSLAM(settings(tracker="given"), room.tree)
    slam.run(room, progress=False)
    assert evaluate(slam, room, every=4)["ate_rmse"] < 1e-6
    with pytest.raises(InputError, match="has no pose"):
        slam.step(dataclasses.replace(room[0], pose=None))


def test_the_map_is_taken_home(done, room, tmp_path):
    path = done.export(tmp_path / "map.ply")
    assert len(load_splats(path)) == len(done.map)
    header, _, body = path.read_bytes().partition(b"end_header\n")
    assert b"property int label" in header
    rows = np.frombuffer(body, np.uint8).reshape(len(done.map), -1)
    ids = rows[:, -4:].copy().view("<i4")[:, 0]
    assert ids.tolist() == done.labels().tolist()
    assert len(load_splats(done.export(tmp_path / "map.splat"))) == len(done.map)
    with pytest.raises(InputError, match="no splat format"):
        done.export(tmp_path / "map.obj")


def test_the_authors_files_are_read_and_written(done, room, tmp_path):
    params = save_official(done, tmp_path / "params.npz", room[0].K, (64, 48))
    assert done.head is not None
    head = {"weight": done.head.weight.detach()[..., None, None], "bias": done.head.bias.detach()}
    torch.save(head, tmp_path / "Semantic.pth")
    slam, about = load_official(params, tmp_path / "Semantic.pth", room.tree)
    assert torch.equal(about.K, room[0].K)
    one, two = (s.render(s.poses[3], room[3].K, (64, 48)) for s in (done, slam))
    assert (one.rgb - two.rgb).abs().max() < 1e-3
    assert (one.labels == two.labels).float().mean() > 0.99
    assert load_official(params)[0].labels() is None
    with pytest.raises(CheckpointError, match="codes of 9"):
        load_official(params, tree=SemanticTree.random(7, 2))
    with pytest.raises(InputError, match="give the tree"):
        load_official(params, tmp_path / "Semantic.pth")
    torch.save({"weight": torch.zeros(5, 9), "bias": torch.zeros(5)}, tmp_path / "Semantic.pth")
    with pytest.raises(CheckpointError, match="head of shape"):
        load_official(params, tmp_path / "Semantic.pth", room.tree)
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(CheckpointError, match="means3D"):
        load_official(tmp_path / "other.npz")
    np.savez(tmp_path / "pickled.npz", means3D=np.array([{}], dtype=object))
    for bad in ("pickled.npz", "none.npz"):
        with pytest.raises(CheckpointError):
            load_official(tmp_path / bad)


def test_settings_that_cannot_be_are_refused():
    for change, message in (
        ({"tracker": "magic"}, "tracker must be"), ({"map_every": 0}, "at least 1"), ({"map_iters": -1}, "negative"),
        ({"resolution": 3}, "16"),
        ({"no_such": 1}, "no setting"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            HierSLAMConfig.preset("cpu_small", **change)
    with pytest.raises(InputError, match="Unknown preset"):
        HierSLAMConfig.preset("cpu_smal")


def test_the_head_learns_in_short_rounds_too(room):
    assert HierSLAM(settings(leaf_from_iter=14), room.tree).loss.leaf_from_iter == 3
    assert HierSLAM(settings(leaf_from_iter=14, map_iters=60), room.tree).loss.leaf_from_iter == 14


def test_the_pipeline_and_its_result(room, tmp_path):
    slam = mmkit.pipeline("semantic-slam", tracker="photometric", **FAST)
    result = slam(Recorded(SyntheticRoom(frames=3, width=64, height=48)), progress=False)
    assert result.report["ate_rmse"] < 0.02
    assert result.report["storage"]["tree_bytes"] == 84
    assert result.plot().mode == "RGB"
    report = json.loads(result.save(tmp_path / "run.json").read_text())
    assert len(report["camera_to_world"]) == 3
    assert len(load_splats(result.save(tmp_path / "map.ply"))) == len(result.splats)
    with pytest.raises(InputError, match="float32"):
        mmkit.pipeline("semantic-slam", dtype="float16")
    with pytest.raises(InputError, match="not a folder"):
        slam(tmp_path / "nowhere")


def test_the_command(tmp_path):
    run = CliRunner()
    small = ["--frames", "3", "--tracker", "photometric", "--track-iters", "2", "--map-iters", "3"]
    result = run.invoke(app, ["slam", "drawn", str(tmp_path / "out"), *small])
    assert result.exit_code == 0, result.output
    assert "ATE" in result.output
    assert {"map.ply", "report.json", "trajectory.png"} <= {p.name for p in (tmp_path / "out").iterdir()}
    other = run.invoke(app, ["slam", "drawn", str(tmp_path / "out"), *small, "--seed", "1"])
    assert "--seed: 0 is now 1. Use the same to continue, --restart to start over" in " ".join(other.output.split())


def test_the_command_says_what_is_wrong_before_the_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(HierSLAM, "step", lambda *a: pytest.fail("mapped"))
    monkeypatch.setattr("mmkit.pointcloud.slam.gicp.gicp_available", lambda: True)
    (tmp_path / "file").write_text("x")
    save_backbone(create_backbone("tiny_vit", num_classes=2), tmp_path / "saved")
    (tmp_path / "walk.mp4").write_bytes(b"x")
    for kind, mode in (("color", "RGB"), ("depth", "I;16")):
        (tmp_path / "data" / kind).mkdir(parents=True)
        Image.new(mode, (32, 24), 900 if mode == "I;16" else 0).save(tmp_path / "data" / kind / "0.png")
    (tmp_path / "data" / "camera.json").write_text('{"fx": 40, "fy": 40, "cx": 16, "cy": 12}')
    balanced = SemanticTree.balanced(["a", "b", "c", "d"], (2, 2))
    balanced.to_json(tmp_path / "tree.json")
    for line, told in (
        ("nowhere out", "not a folder"),
        ("drawn out --every 2", "--every means nothing for the drawn room"),
        ("drawn out --depth x", "--depth means nothing for the drawn room"),
        ("drawn out --tree tree.json", "--tree means nothing for the drawn room"),
        ("data out --frames 3", "--frames means nothing for a recording"),
        ("data out --depth data/depth", "is no film"),
        ("data out --tree tree.json", "holds no label pictures"),
        ("walk.mp4 out", "(--depth)"),
        ("drawn out --tracker given --track-iters 3", "--track-iters means nothing for --tracker given"),
        ("drawn out --track-iters 3", "for the tracker taken here, gicp. Add --tracker photometric"),
        (f"drawn out --seed {2**70}", "seed must be a whole number within"),
        ("drawn file", "a part of the path is a file"),
        ("drawn saved", "would no longer be as it was saved"),
    ):
        result = CliRunner().invoke(app, ["slam", *line.split()])
        assert result.exit_code == 1, line
        assert told in " ".join(result.output.split()), (line, result.output)
        assert not (tmp_path / "out").exists(), line
    with pytest.raises(InputError, match="every and depth are for a folder or a film"):
        mmkit.pipeline("semantic-slam")(every=2)
