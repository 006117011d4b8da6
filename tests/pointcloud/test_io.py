"""Cloud files: round trips, formats of other programs, damaged files, data sets in the layouts they are published in."""

from __future__ import annotations

import json
import struct

import h5py
import laspy
import numpy as np
import plyfile
import pytest
import torch
import trimesh

from mmkit.errors import InputError
from mmkit.pointcloud import (
    Augment,
    PointCloud,
    choose_points,
    modelnet40,
    read_point_cloud,
    scanobjectnn,
    shapenetpart,
    unit_sphere,
    write_point_cloud,
)
from mmkit.pointcloud.point_peft.pipeline import load_cloud

RNG = np.random.default_rng(0)
FAR = np.array([5e5, 4e6, 100])
XYZ = RNG.normal(size=(40, 3)).astype(np.float32)
FULL = PointCloud(
    XYZ, RNG.integers(0, 256, (40, 3)).astype(np.uint8), RNG.normal(size=(40, 3)).astype(np.float32), np.arange(40) % 3
)


@pytest.mark.parametrize("suffix", [".ply", ".npy", ".npz", ".xyz", ".txt"])
def test_what_is_written_is_read_back(tmp_path, suffix):
    cloud = read_point_cloud(write_point_cloud(FULL, tmp_path / f"a{suffix}"))
    assert np.allclose(cloud.xyz, XYZ, atol=1e-6 if suffix in (".ply", ".npy", ".npz") else 1e-5)
    if suffix in (".ply", ".npz"):
        assert np.array_equal(cloud.rgb, FULL.rgb)
        assert np.array_equal(cloud.normals, FULL.normals)
        assert np.array_equal(cloud.labels, FULL.labels)


@pytest.mark.parametrize("suffix", [".obj", ".stl", ".off", ".glb", ".ply"])
def test_meshes_are_sampled_on_their_surface(tmp_path, suffix):
    path = tmp_path / f"box{suffix}"
    trimesh.creation.box((2, 1, 1)).export(path)
    cloud = read_point_cloud(path, 500)
    assert len(cloud) == 500
    assert np.allclose(np.abs(cloud.xyz / (1, 0.5, 0.5)).max(1), 1, atol=1e-5)
    assert np.array_equal(cloud.xyz, read_point_cloud(path, 500).xyz)
    assert not np.array_equal(cloud.xyz, read_point_cloud(path, 500, seed=1).xyz)


def test_an_off_file_with_the_counts_on_its_first_line(tmp_path):
    path = tmp_path / "a.off"
    path.write_text("OFF3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n")
    assert read_point_cloud(path, 50).xyz[:, 2].max() == 0


def test_an_obj_file_without_faces_is_a_cloud(tmp_path):
    path = tmp_path / "a.obj"
    path.write_text("".join(f"v {x} {y} {z}\n" for x, y, z in XYZ))
    assert np.allclose(read_point_cloud(path).xyz, XYZ, atol=1e-5)


def pcd(kind: str) -> bytes:
    rgb = (FULL.rgb.astype(np.uint32) << (16, 8, 0)).sum(1).astype("<u4")
    head = "# .PCD v0.7\nVERSION 0.7\nFIELDS x y z rgb\nSIZE 4 4 4 4\nTYPE F F F U\nCOUNT 1 1 1 1\n"
    head += f"WIDTH 40\nHEIGHT 1\nPOINTS 40\nDATA {kind}\n"
    if kind == "ascii":
        return (head + "".join(f"{x} {y} {z} {c}\n" for (x, y, z), c in zip(XYZ, rgb, strict=True))).encode()
    rows = np.empty(40, [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("rgb", "<u4")])
    rows["x"], rows["y"], rows["z"], rows["rgb"] = *XYZ.T, rgb
    if kind == "binary":
        return head.encode() + rows.tobytes()
    data = b"".join(np.ascontiguousarray(rows[n]).tobytes() for n in rows.dtype.names)
    packed = b"".join(bytes([len(data[i : i + 32]) - 1]) + data[i : i + 32] for i in range(0, len(data), 32))
    return head.encode() + struct.pack("<II", len(packed), len(data)) + packed


@pytest.mark.parametrize("kind", ["ascii", "binary", "binary_compressed"])
def test_pcd(tmp_path, kind):
    path = tmp_path / "a.pcd"
    path.write_bytes(pcd(kind))
    cloud = read_point_cloud(path)
    assert np.allclose(cloud.xyz, XYZ, atol=1e-6)
    assert np.array_equal(cloud.rgb, FULL.rgb)
    path.write_bytes(pcd(kind)[:-200])
    with pytest.raises(InputError):
        read_point_cloud(path)


def test_a_repeating_pcd_is_decompressed(tmp_path):
    from mmkit.pointcloud.pcd import _lzf

    assert _lzf(bytes([2, 1, 2, 3, (4 << 5) | 0, 2]), 9) == bytes([1, 2, 3] * 3)


@pytest.mark.parametrize("suffix", [".las", ".laz"])
def test_surveys_keep_their_precision(tmp_path, suffix):
    header = laspy.LasHeader(point_format=3, version="1.2")
    header.offsets, header.scales = [5e5, 4e6, 0], [1e-4] * 3
    las = laspy.LasData(header)
    las.x, las.y, las.z = (XYZ + FAR).T.astype(np.float64)
    las.red = las.green = las.blue = np.full(40, 256 * 77)
    las.write(tmp_path / f"a{suffix}")
    cloud = read_point_cloud(tmp_path / f"a{suffix}")
    assert np.allclose(cloud.xyz + cloud.meta["offset"], XYZ + FAR, atol=1e-3)
    assert (cloud.rgb == 77).all()


def test_tables_of_text(tmp_path):
    for name, text in (
        ("a.csv", "x,y,z\n1,2,3\n4,5,6\n"),
        ("a.pts", "2\n1 2 3 0 0 0\n4 5 6 0 0 0\n"),
        ("a.txt", "1 2 3 0 0 1 7\n4 5 6 0 1 0 8\n"),
    ):
        (tmp_path / name).write_text(text)
        cloud = read_point_cloud(tmp_path / name)
        assert cloud.xyz.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert cloud.labels.tolist() == [7, 8]


def test_files_with_several_clouds(tmp_path):
    np.save(tmp_path / "a.npy", np.stack([XYZ, XYZ + 1]))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["data"], file["label"] = np.stack([XYZ, XYZ + 1]), np.array([[0], [1]])
    for name in ("a.npy", "a.h5"):
        assert np.array_equal(read_point_cloud(tmp_path / name, index=1).xyz, XYZ + 1)
    with pytest.raises(InputError, match="no number 2"):
        read_point_cloud(tmp_path / "a.npy", index=2)


@pytest.mark.parametrize(
    "suffix", [".ply", ".pcd", ".obj", ".stl", ".off", ".glb", ".npy", ".npz", ".h5", ".las", ".laz", ".xyz"]
)
@pytest.mark.parametrize("content", [b"", b"\x00\xff" * 200, b"ply\nformat ascii 1.0\nelement vertex 9\n"])
def test_damaged_files_are_told_by_name(tmp_path, suffix, content):
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError):
        read_point_cloud(path)


def test_pickles_missing_files_and_unknown_suffixes_are_refused(tmp_path, caplog):
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
    for path, message in (
        (tmp_path / "a.npy", "a.npy"),
        (tmp_path / "no.ply", "does not exist"),
        ("a.pkl", "read from .*ply"),
    ):
        with pytest.raises(InputError, match=message):
            read_point_cloud(path)
    with pytest.raises(InputError, match="written as"):
        write_point_cloud(XYZ, tmp_path / "a.obj")
    holes = XYZ.copy()
    holes[3] = np.nan
    np.save(tmp_path / "holes.npy", holes)
    cloud = read_point_cloud(tmp_path / "holes.npy")
    assert len(cloud) == 39
    assert cloud.meta["dropped"] == 1
    assert "left out" in caplog.text
    np.save(tmp_path / "none.npy", holes * np.nan)
    with pytest.raises(InputError, match="finite"):
        read_point_cloud(tmp_path / "none.npy")


def test_points_are_chosen_and_large_clouds_thinned_with_a_notice(monkeypatch, caplog):
    from mmkit.pointcloud import transforms

    chosen = choose_points(XYZ, 10)
    assert len(set(chosen.tolist())) == 10
    assert len(choose_points(XYZ, 60)) == 60
    monkeypatch.setattr(transforms, "MAX_POINTS", 1000)
    big = RNG.normal(size=(5000, 3)).astype(np.float32)
    assert len(set(choose_points(big, 50).tolist())) == 50
    assert "thinned" in caplog.text
    unit = unit_sphere(big)
    assert np.linalg.norm(unit, axis=1).max() == pytest.approx(1)


def test_every_cloud_is_augmented_by_itself():
    x = torch.from_numpy(XYZ).expand(3, -1, -1)
    for setting in ({"rotate": "y"}, {"rotate": "so3"}):
        y = Augment(**setting)(x, torch.Generator().manual_seed(0))
        assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1), atol=1e-5)
        assert (y[0] - y[1]).abs().max() > 0.1
    assert torch.allclose(Augment("y")(x)[..., 1], x[..., 1])
    y = Augment(scale=(0.5, 0.6))(x) / x
    assert y.min() > 0.49
    assert y.max() < 0.61
    y = Augment(dropout=0.5)(x, torch.Generator().manual_seed(1))
    assert ((y == x).all(-1) | (y == x[:, :1]).all(-1)).all()
    assert Augment(jitter=0.1, shift=0.2)(x).shape == x.shape
    with pytest.raises(InputError):
        Augment("z")


def test_modelnet40(tmp_path):
    (tmp_path / "shape_names.txt").write_text("chair\ntable\n")
    with h5py.File(tmp_path / "ply_data_train0.h5", "w") as file:
        file["data"], file["label"] = np.stack([XYZ, XYZ]), np.array([[1], [0]])
    data = modelnet40(tmp_path, num_points=20)
    points, label = data[0]
    assert points.shape == (20, 3)
    assert data.class_names[label] == "table"
    (tmp_path / "modelnet40_shape_names.txt").write_text("night_stand\n")
    (tmp_path / "modelnet40_test.txt").write_text("night_stand_0001\n")
    (tmp_path / "night_stand").mkdir()
    np.savetxt(tmp_path / "night_stand" / "night_stand_0001.txt", np.hstack([XYZ, XYZ]), delimiter=",")
    assert modelnet40(tmp_path, "test")[0][1] == 0
    with pytest.raises(InputError, match="neither"):
        modelnet40(tmp_path / "night_stand")


def test_scanobjectnn(tmp_path):
    (tmp_path / "main_split").mkdir()
    with h5py.File(tmp_path / "main_split" / "training_objectdataset.h5", "w") as file:
        file["data"], file["label"] = np.stack([XYZ, XYZ]), np.array([4, 0])
    data = scanobjectnn(tmp_path, variant="obj_bg", num_points=30)
    assert np.array_equal(data[0][0], XYZ[:30])
    assert data.class_names[data[0][1]] == "chair"
    with pytest.raises(InputError, match="missing"):
        scanobjectnn(tmp_path)
    with pytest.raises(InputError, match="variant"):
        scanobjectnn(tmp_path, variant="x")


def test_shapenetpart(tmp_path):
    (tmp_path / "synsetoffset2category.txt").write_text("Airplane\t02691156\nMug\t03797390\n")
    (tmp_path / "train_test_split").mkdir()
    listing = ["shape_data/03797390/a1"]
    (tmp_path / "train_test_split" / "shuffled_test_file_list.json").write_text(json.dumps(listing))
    (tmp_path / "03797390").mkdir()
    np.savetxt(tmp_path / "03797390" / "a1.txt", np.hstack([XYZ, XYZ, np.full((40, 1), 36)]))
    points, label, parts = shapenetpart(tmp_path, "test")[0]
    assert label == 1
    assert (parts == 36).all()
    assert points.shape == (40, 3)


# --- what a file says reaches the cloud


def test_survey_coordinates_keep_their_detail_in_every_format(tmp_path):
    far = XYZ.astype(np.float64) + FAR
    np.savetxt(tmp_path / "a.xyz", far, fmt="%.6f")
    np.save(tmp_path / "a.npy", far)
    rows = np.rec.fromarrays(far.T, names="x,y,z")
    plyfile.PlyData([plyfile.PlyElement.describe(rows, "vertex")]).write(tmp_path / "a.ply")
    for name in ("a.xyz", "a.npy", "a.ply"):
        cloud = read_point_cloud(tmp_path / name)
        assert np.allclose(cloud.xyz + cloud.meta["offset"], far, atol=1e-5)
    assert "offset" not in read_point_cloud(write_point_cloud(XYZ, tmp_path / "near.xyz")).meta


def test_coordinates_beyond_float32_are_left_out(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[1e300, 0, 0], [1, 2, 3], [4, 5, 6]]))
    cloud = read_point_cloud(tmp_path / "a.npy")
    assert cloud.xyz.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert cloud.meta["dropped"] == 1
    np.save(tmp_path / "words.npy", np.array([["a", "b", "c"]]))
    with pytest.raises(InputError, match="not points"):
        read_point_cloud(tmp_path / "words.npy")


@pytest.mark.parametrize("n", [3, 40])
def test_one_of_several_clouds_comes_with_its_own_colors_and_labels(tmp_path, n):
    arrays = {
        "xyz": RNG.random((n, 40, 3)),
        "rgb": RNG.integers(0, 256, (n, 40, 3)).astype(np.uint8),
        "labels": RNG.integers(0, 9, (n, 40)),
    }
    np.savez(tmp_path / "a.npz", **arrays)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for key, value in arrays.items():
            file[key] = value
    for name in ("a.npz", "a.h5"):
        cloud = read_point_cloud(tmp_path / name, index=2)
        assert np.array_equal(cloud.rgb, arrays["rgb"][2])
        assert np.array_equal(cloud.labels, arrays["labels"][2])
    with h5py.File(tmp_path / "b.h5", "w") as file:  # a class for each cloud is no label of points
        file["data"], file["labels"] = arrays["xyz"], np.arange(n)
    assert read_point_cloud(tmp_path / "b.h5").labels is None
    with pytest.raises(InputError, match=f"holds {n} clouds"):
        read_point_cloud(tmp_path / "b.h5", index=n)


def test_columns_of_text_are_taken_by_their_names(tmp_path):
    for text in ("label,x,y,z\n7,1,2,3\n8,4,5,6\n", '"Label";"X";"Y";"Z"\n7;1;2;3\n8;4;5;6\n'):
        (tmp_path / "a.csv").write_text(text)
        cloud = read_point_cloud(tmp_path / "a.csv")
        assert cloud.xyz.tolist() == [[1, 2, 3], [4, 5, 6]]
        assert cloud.labels.tolist() == [7, 8]
    (tmp_path / "a.txt").write_text("//X Y Z R G B\n1 2 3 1 0 0\n4 5 6 0 200 9\n")
    assert read_point_cloud(tmp_path / "a.txt").rgb.tolist() == [[1, 0, 0], [0, 200, 9]]


def test_intensities_are_no_labels(tmp_path, caplog):
    for last in (".25", "nan"):
        (tmp_path / "a.xyz").write_text(f"1 2 3 0.5\n4 5 6 {last}\n")
        assert read_point_cloud(tmp_path / "a.xyz").labels is None
    assert "left out" in caplog.text


def test_colors_of_every_type_become_bytes(tmp_path):
    wanted = np.array([[0, 51, 255], [1, 2, 3]])
    kinds = {"f4": wanted / 255, "f8": wanted, "u2": wanted * 256, "i4": wanted}
    for kind, values in kinds.items():
        for suffix in (".npz", ".ply"):
            cloud = PointCloud(XYZ[:2], rgb=values.astype(kind))
            assert np.array_equal(read_point_cloud(write_point_cloud(cloud, tmp_path / f"a{suffix}")).rgb, wanted), kind
    header = "ply\nformat ascii 1.0\nelement vertex 2\n" + "".join(f"property float {n}\n" for n in "xyz")
    for kind, body in {
        "ushort": "0 0 0 0 13056 65280\n1 2 3 256 512 768\n",
        "int": "0 0 0 1 0 1\n1 2 3 0 1 0\n",
    }.items():
        colors = "".join(f"property {kind} {n}\n" for n in ("red", "green", "blue"))
        (tmp_path / "b.ply").write_text(f"{header}{colors}end_header\n{body}")
        expected = wanted if kind == "ushort" else [[1, 0, 1], [0, 1, 0]]
        assert np.array_equal(read_point_cloud(tmp_path / "b.ply").rgb, expected)


@pytest.mark.parametrize(
    "cloud",
    [
        np.zeros((5, 2)),
        PointCloud(XYZ, labels=np.arange(3)),
        PointCloud(XYZ, rgb=np.zeros((40, 4), np.uint8)),
        PointCloud(XYZ, labels=np.full(40, 2**40)),
        PointCloud(XYZ, labels=np.full(40, 0.5)),
        PointCloud(XYZ, labels=np.full(40, np.nan)),
    ],
)
def test_what_a_file_cannot_hold_is_refused_before_it_is_written(tmp_path, cloud):
    with pytest.raises(InputError):
        write_point_cloud(cloud, tmp_path / "a.ply")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("settings", [{"num_points": 0}, {"num_points": -1}, {"num_points": 1.5}, {"seed": "a"}])
def test_numbers_of_points_and_seeds_that_are_none_are_told(tmp_path, settings):
    path = write_point_cloud(XYZ, tmp_path / "a.ply")
    with pytest.raises(InputError, match="whole number"):
        read_point_cloud(path, **settings)
    assert len(read_point_cloud(path, 3, seed=-1)) == 3


def test_survey_coordinates_in_memory_keep_their_detail():
    near = np.random.default_rng(0).random((50, 3))
    for far in (near + FAR, torch.from_numpy(near + FAR)):
        assert np.allclose(load_cloud(far), near - near.min(0), atol=1e-6)
    assert np.array_equal(load_cloud(near), near.astype(np.float32))


def test_tensors_of_any_kind_are_clouds_and_no_coordinate_becomes_infinite():
    points = torch.tensor([[0.0, 1, 2], [3, 4, 5]], requires_grad=True)
    for cloud in (points, points.to(torch.bfloat16)):
        assert np.array_equal(load_cloud(cloud), points.detach().numpy())
    with pytest.raises(InputError, match="infinite"):
        load_cloud([[0.0, 0, 0], [1e300, 0, 0]])
    with pytest.raises(InputError, match="complex"):
        load_cloud(np.zeros((4, 3), complex))
