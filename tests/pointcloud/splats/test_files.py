"""Splat files: bytes as the specifications say, round trips within what a format rounds, and hostile files."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import struct
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from mmkit.errors import InputError
from mmkit.pointcloud.gaussians import NAMES
from mmkit.pointcloud.splat_spz import _pack_rotations, _unpack_rotations
from mmkit.pointcloud.splats import FORMATS, GaussianModel, load_splats, save_splats, splat_info


def scene(n: int = 40, degree: int = 2, mode: str = "classic") -> GaussianModel:
    """Gaussians of ordinary sizes."""
    g = torch.Generator().manual_seed(n)
    k = (degree + 1) ** 2
    tensors = {
        "means": 3 * torch.randn(n, 3, generator=g), "scales": torch.randn(n, 3, generator=g) - 3,
        "quats": torch.nn.functional.normalize(torch.randn(n, 4, generator=g), dim=1), "opacities": 2 * torch.randn(n, generator=g),
        "sh0": torch.rand(n, 1, 3, generator=g) - 0.5, "shN": 0.3 * torch.randn(n, k - 1, 3, generator=g),
    }  # fmt: skip
    return GaussianModel.from_tensors(tensors, rasterize_mode=mode)


TOLERANCE = {  # means, log scales, |1 - |q.q'||, opacities in 0..1, first and higher harmonics
    ".ply": (0, 0, 1e-6, 0, 0, 0),
    ".glb": (0, 1e-5, 1e-6, 1e-6, 0, 0),
    ".spz": (2e-4, 1 / 32 + 1e-5, 2e-5, 0.0021, 0.0132, 0.07),
    ".sog": (2e-3, 0.05, 2e-4, 0.0021, 0.01, 0.12),
    ".splat": (0, 1e-5, 1e-3, 0.0021, 0.0071, None),
}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("degree, mode", [(0, "classic"), (1, "antialiased"), (3, "classic")])
def test_round_trips(tmp_path, suffix: str, degree: int, mode: str) -> None:
    model = scene(degree=degree, mode=mode)
    back = load_splats(save_splats(model, tmp_path / f"x{suffix.upper()}"))
    means, scales, quats, opacities, first, higher = TOLERANCE[suffix]
    order = torch.cdist(model.means, back.means).argmin(1)  # some formats sort
    assert order.unique().numel() == len(model) == len(back)
    got, want = {k: v[order] for k, v in back.tensors().items()}, model.tensors()
    assert (got["means"] - want["means"]).abs().max() <= means
    assert (got["scales"] - want["scales"]).abs().max() <= scales
    assert (1 - (torch.nn.functional.normalize(got["quats"], dim=1) * want["quats"]).sum(1).abs()).abs().max() <= quats
    assert (got["opacities"].sigmoid() - want["opacities"].sigmoid()).abs().max() <= opacities
    assert (got["sh0"] - want["sh0"]).abs().max() <= first
    if higher is None:
        assert back.sh_degree == 0
    elif degree:
        assert (got["shN"] - want["shN"]).abs().max() <= higher
    if suffix != ".splat":
        assert back.rasterize_mode == mode
    again = load_splats(save_splats(back, tmp_path / f"y{suffix}"))
    if suffix in (".ply", ".spz"):  # what was rounded once stays as it is
        assert all(torch.allclose(again.tensors()[k], back.tensors()[k], atol=1e-5) for k in NAMES)


def test_ply_bytes(tmp_path) -> None:
    model = scene(2, 1)
    data = save_splats(model, tmp_path / "x.ply").read_bytes()
    header, body = data.split(b"end_header\n")
    names = [line.split()[-1].decode() for line in header.splitlines() if line.startswith(b"property float ")]
    assert names == [
        *"xyz", "nx", "ny", "nz", *(f"f_dc_{i}" for i in range(3)), *(f"f_rest_{i}" for i in range(9)), "opacity",
        *(f"scale_{i}" for i in range(3)), *(f"rot_{i}" for i in range(4)),
    ]  # fmt: skip
    row = dict(zip(names, np.frombuffer(body, "<f4").reshape(2, -1)[1].tolist(), strict=True))
    assert row["f_rest_4"] == model.shN[1, 1, 1].item()  # channel by channel: green's second
    assert row["rot_0"] == model.quats[1, 0].item()
    assert row["opacity"] == model.opacities[1].item()


def test_splat_bytes(tmp_path) -> None:
    model = GaussianModel.from_tensors(
        {
            "means": torch.tensor([[1.0, 2, 3]]), "scales": torch.tensor([[0.5, 1.0, 2.0]]).log(), "quats": torch.tensor([[1.0, 0, 0, 0]]),
            "opacities": torch.zeros(1), "sh0": torch.zeros(1, 1, 3), "shN": torch.zeros(1, 0, 3),
        }
    )  # fmt: skip
    data = save_splats(model, tmp_path / "x.splat").read_bytes()
    assert data[:12] == struct.pack("<3f", 1, 2, 3)
    np.testing.assert_allclose(np.frombuffer(data[12:24], "<f4"), [0.5, 1, 2], rtol=1e-6)
    assert list(data[24:]) == [128, 128, 128, 128, 255, 128, 128, 128]


def test_spz_bytes(tmp_path) -> None:
    model = GaussianModel.from_tensors(
        {
            "means": torch.tensor([[1.0, 2, -3]]), "scales": torch.full((1, 3), -5.0), "quats": torch.tensor([[1.0, 0, 0, 0]]),
            "opacities": torch.zeros(1), "sh0": torch.full((1, 1, 3), 1.0), "shN": torch.zeros(1, 3, 3),
        }
    )  # fmt: skip
    data = gzip.decompress(save_splats(model, tmp_path / "x.spz").read_bytes())
    assert struct.unpack("<IIIBBBB", data[:16]) == (0x5053474E, 3, 1, 1, 12, 0, 0)
    assert data[16:25] == b"".join(
        struct.pack("<i", int(v * 4096))[:3] for v in (1, -2, 3)
    )  # y and z turned: right, up, back
    assert list(data[25:32]) == [128, 166, 166, 166, 80, 80, 80]  # alpha, 255 (0.15 + 0.5), 16 (-5 + 10)
    (rotation,) = struct.unpack("<I", data[32:36])
    assert rotation >> 30 in (0, 1, 2, 3)
    assert len(data) == 16 + 9 + 1 + 3 + 3 + 4 + 9
    assert set(data[36:]) == {128}


def test_spz_rotations_keep_ten_bits() -> None:
    q = torch.nn.functional.normalize(torch.randn(2000, 4, generator=torch.Generator().manual_seed(0)), dim=1).numpy()
    back = _unpack_rotations(_pack_rotations(q))
    assert np.abs(1 - np.abs((q * back).sum(1))).max() < 5e-6
    assert (_pack_rotations(np.float32([[0, 0, 0, -1]])) >> 30).item() == 2  # x, y, z, w: z is the largest
    assert (_pack_rotations(np.float32([[0.8, -0.6, 0, 0]]))).item() == (3 << 30) | (1 << 29) | (434 << 20)


def test_spz_version_2_is_read(tmp_path) -> None:
    header = struct.pack("<IIIBBBB", 0x5053474E, 2, 1, 0, 12, 1, 0)
    body = b"\x00\x10\x00" + b"\x00" * 6 + bytes([255, 128, 128, 128, 160, 160, 160, 128, 128, 128])
    (tmp_path / "x.spz").write_bytes(gzip.compress(header + body))
    model = load_splats(tmp_path / "x.spz")
    assert model.rasterize_mode == "antialiased"
    torch.testing.assert_close(model.means.data, torch.tensor([[1.0, 0, 0]]))
    assert model.scales.abs().max() == 0


def test_sog_members(tmp_path) -> None:
    model = scene(10, 1)
    with zipfile.ZipFile(save_splats(model, tmp_path / "x.sog")) as bundle:
        meta = json.loads(bundle.read("meta.json"))
        assert (meta["version"], meta["count"], meta["shN"]["bands"]) == (2, 10, 1)
        assert len(meta["scales"]["codebook"]) == len(meta["sh0"]["codebook"]) == 256
        quats = np.asarray(Image.open(io.BytesIO(bundle.read("quats.webp"))))
        assert set(quats.reshape(-1, 4)[:10, 3].tolist()) <= {252, 253, 254, 255}
        low, high = (
            np.asarray(Image.open(io.BytesIO(bundle.read(f"means_{x}.webp")))).reshape(-1, 3)[:10] for x in "lu"
        )
    n = np.array(meta["means"]["mins"]) + (low + 256.0 * high) / 65535 * (
        np.array(meta["means"]["maxs"]) - meta["means"]["mins"]
    )
    means = np.sign(n) * np.expm1(np.abs(n))
    assert np.abs(np.sort(means[:, 0]) - np.sort(model.means[:, 0].detach().numpy())).max() < 1e-3


def test_glb_structure(tmp_path) -> None:
    data = save_splats(scene(5, 1), tmp_path / "x.glb").read_bytes()
    assert struct.unpack("<4sII", data[:12]) == (b"glTF", 2, len(data))
    size, kind = struct.unpack("<I4s", data[12:20])
    tree = json.loads(data[20 : 20 + size])
    assert kind == b"JSON"
    assert size % 4 == 0
    primitive = tree["meshes"][0]["primitives"][0]
    assert primitive["mode"] == 0
    assert primitive["extensions"]["KHR_gaussian_splatting"]["kernel"] == "ellipse"
    names = {k.removeprefix("KHR_gaussian_splatting:") for k in primitive["attributes"]}
    assert names == {
        "POSITION",
        "ROTATION",
        "SCALE",
        "OPACITY",
        "SH_DEGREE_0_COEF_0",
        *(f"SH_DEGREE_1_COEF_{i}" for i in range(3)),
    }
    accessor = tree["accessors"][primitive["attributes"]["KHR_gaussian_splatting:SCALE"]]
    view = tree["bufferViews"][accessor["bufferView"]]
    start = 20 + size + 8 + view["byteOffset"]
    scales = np.frombuffer(data[start : start + view["byteLength"]], "<f4").reshape(-1, 3)
    np.testing.assert_allclose(scales, scene(5, 1).scales.exp().detach().numpy(), rtol=1e-5)


@pytest.mark.slow
def test_turned_scenes_look_the_same() -> None:
    from mmkit.pointcloud.splats import orbit

    model = scene(60, 3)
    turn = torch.linalg.matrix_exp(torch.tensor([[0, -0.7, 0.2], [0.7, 0, 0.4], [-0.2, -0.4, 0]]))
    camera = orbit(torch.zeros(3), 12.0, [20], width=40, height=40)
    moved = model.transform(turn, torch.tensor([1.0, -2, 0.5]), 1.5)
    view = torch.eye(4)
    view[:3, :3], view[:3, 3] = camera.viewmats[0, :3, :3] @ turn.T, 0
    position = 1.5 * turn @ camera.positions[0] + torch.tensor([1.0, -2, 0.5])
    view[:3, 3] = -view[:3, :3] @ position
    before, after = (
        m.render(type(camera)(v[None], camera.Ks, 40, 40))[0] for m, v in ((model, camera.viewmats[0]), (moved, view))
    )
    assert (before - after).abs().max() < 1e-4


@pytest.mark.parametrize("suffix", FORMATS)
def test_empty_scenes(tmp_path, suffix: str) -> None:
    path = save_splats(GaussianModel(0), tmp_path / f"x{suffix}")
    assert len(load_splats(path)) == 0
    assert splat_info(path)["gaussians"] == 0


@pytest.mark.parametrize("suffix", FORMATS)
def test_truncated_and_flipped_files_are_messages(tmp_path, suffix: str) -> None:
    data = save_splats(scene(30, 1), tmp_path / f"x{suffix}").read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / f"y{suffix}"
    for cut in (0, 1, 10, len(data) // 3, len(data) - 1):
        cut += suffix == ".splat" and cut % 32 == 0  # a file of whole rows is a smaller scene
        path.write_bytes(data[:cut])
        with pytest.raises(InputError, match="not a readable"):
            load_splats(path)
    for _ in range(25):
        damaged = bytearray(data)
        for place in rng.integers(0, min(len(data), 600), 4):
            damaged[place] = rng.integers(256)
        path.write_bytes(bytes(damaged))
        with contextlib.suppress(InputError):  # nothing else may come out
            load_splats(path)


def _zip(meta: object) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as bundle:
        bundle.writestr("meta.json", json.dumps(meta))
    return buffer.getvalue()


def _glb(tree: object) -> bytes:
    text = json.dumps(tree).encode()
    text += b" " * (-len(text) % 4)
    return struct.pack("<4sIII4s", b"glTF", 2, 20 + len(text), len(text), b"JSON") + text


_PROPERTIES = [
    "x",
    "y",
    "z",
    "opacity",
    "f_dc_0",
    "f_dc_1",
    "f_dc_2",
    "scale_0",
    "scale_1",
    "scale_2",
    "rot_0",
    "rot_1",
    "rot_2",
    "rot_3",
]
_HEADER = "ply\nformat binary_little_endian 1.0\nelement vertex 1000000000\n{}end_header\n".format(
    "".join(f"property float {p}\n" for p in _PROPERTIES)
).encode()
_SPLATS = "KHR_gaussian_splatting"
_HUGE = {
    "scenes": [{"nodes": [0]}], "nodes": [{"mesh": 0}], "buffers": [{}], "bufferViews": [{"buffer": 0, "byteLength": 0}],
    "meshes": [{"primitives": [{"attributes": {f"{_SPLATS}:SH_DEGREE_0_COEF_0": 0}, "extensions": {_SPLATS: {}}}]}],
    "accessors": [{"bufferView": 0, "componentType": 5126, "count": 10**9, "type": "VEC3"}],
}  # fmt: skip
_LOOP = {"scenes": [{"nodes": [0]}], "nodes": [{"children": [0]}], "extensionsUsed": ["KHR_gaussian_splatting"]}


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("x.ply", _HEADER, "claims 1000000000"),
        ("x.ply", b"ply\nformat ascii 1.0\nelement vertex 1\nend_header\n", "binary_little_endian"),
        ("x.ply", b"ply\nformat binary_little_endian 1.0\nelement vertex 1\nproperty float x\nend_header\n0000", "point cloud or mesh"),
        ("x.ply", b"ply\nformat binary_little_endian 1.0\nelement chunk 1\nend_header\n", "compressed PLY"),
        ("x.spz", gzip.compress(struct.pack("<IIIBBBB", 0x5053474E, 3, 10**9, 0, 12, 0, 0)), "claims 1000000000"),
        ("x.spz", gzip.compress(struct.pack("<IIIBBBB", 0x5053474E, 9, 1, 0, 12, 0, 0)), "version 9"),
        ("x.spz", struct.pack("<II", 0x5053474E, 4), "SPZ 4"),
        ("x.sog", _zip({"version": 2, "count": 10**9}), "claims 1000000000"),
        ("x.sog", _zip({"version": 1}), "only 2"),
        ("x.sog", _zip([1]), "only 2"),
        ("x.sog", _zip({"version": 2, "count": 5, "means": {"files": ["../../etc/passwd"]}}), "has no"),
        ("x.glb", _glb(_HUGE), "claims 1000000000"),
        ("x.glb", _glb(_LOOP), "circle"),
        ("x.glb", _glb({"scenes": [{"nodes": []}]}), "a mesh"),
        ("x.splat", b"1" * 33, "multiple of 32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_hostile_files(tmp_path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message):
        load_splats(tmp_path / name)


def test_other_bad_input(tmp_path) -> None:
    with pytest.raises(InputError, match="Did you mean"):
        load_splats(tmp_path / "x.plyy")
    with pytest.raises(InputError, match="does not exist"):
        load_splats(tmp_path / "none.ply")
    with (tmp_path / "vast.splat").open("wb") as file:
        file.truncate(5 * 10**9)  # takes no space
    with pytest.raises(InputError, match="the limit is 4 GB"):
        load_splats(tmp_path / "vast.splat")
    model = scene(3)
    with torch.no_grad():
        model.means[0, 0] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        save_splats(model, tmp_path / "x.ply")
    assert not (tmp_path / "x.ply").exists()
    with torch.no_grad():
        model.means[0, 0] = 1e9
    with pytest.raises(InputError, match="scale the scene down"):
        save_splats(model, tmp_path / "x.spz")


@pytest.mark.parametrize("suffix", [".glb", ".splat"])
def test_sizes_that_a_format_cannot_hold_are_refused(tmp_path, suffix) -> None:
    model = scene()
    model.scales.data[3, 1] = 100.0
    with pytest.raises(InputError, match="scales reach 100"):
        save_splats(model, tmp_path / f"a{suffix}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [2**40, 0.5, np.nan])
def test_labels_that_a_file_cannot_hold_are_refused(tmp_path, wrong) -> None:
    with pytest.raises(InputError, match="32 bits"):
        save_splats(scene(3), tmp_path / "a.ply", labels=np.array([0, 1, wrong]))
