"""glTF 2.0 with KHR_gaussian_splatting, as one binary file (.glb) of float accessors.

The extension stores linear scales, opacities in 0..1, rotations xyzw and one accessor per harmonic. Splats keep their numbers; a
node turns them half around x into glTF's axes (y up), and on reading the transforms of nodes are applied.
"""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmkit.errors import InputError
from mmkit.ops.gaussian.reference import rotation
from mmkit.pointcloud.gaussians import NAMES, GaussianModel
from mmkit.pointcloud.splat_arrays import as_arrays, as_model, check_count, deviations, logit, sigmoid

NAME = "KHR_gaussian_splatting"
_TURN = [1.0, 0.0, 0.0, 0.0]  # xyzw
_WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4}
_COMPONENTS = {5120: "<i1", 5121: "<u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
_SMALLEST = 1e-7  # opacities are kept this far from 0 and 1


def write(model: GaussianModel) -> bytes:
    """One node, one primitive of points."""
    arrays = as_arrays(model)
    alphas = sigmoid(arrays["opacities"])
    values: dict[str, np.ndarray] = {
        "POSITION": arrays["means"], f"{NAME}:ROTATION": np.roll(arrays["quats"], -1, axis=1),
        f"{NAME}:SCALE": deviations(arrays["scales"]), f"{NAME}:OPACITY": alphas[:, None],
        f"{NAME}:SH_DEGREE_0_COEF_0": arrays["sh0"][:, 0],
    }  # fmt: skip
    values |= {_coefficient(i): arrays["shN"][:, i - 1] for i in range(1, (model.sh_degree + 1) ** 2)}
    accessors: list[dict[str, Any]] = []
    views: list[dict[str, int]] = []
    attributes: dict[str, int] = {}
    binary = b""
    kinds = {width: kind for kind, width in _WIDTHS.items()}
    for name, array in values.items():
        content = array.astype("<f4").tobytes()
        attributes[name] = len(accessors)
        views.append({"buffer": 0, "byteOffset": len(binary), "byteLength": len(content), "target": 34962})
        accessor: dict[str, Any] = {
            "bufferView": len(accessors), "componentType": 5126, "count": len(array), "type": kinds[array.shape[1]]
        }  # fmt: skip
        if name == "POSITION" and len(array):
            accessor |= {"min": array.min(0).tolist(), "max": array.max(0).tolist()}
        accessors.append(accessor)
        binary += content
    splats = {
        "kernel": "ellipse",
        "colorSpace": "srgb_rec709_display",
        "sortingMethod": "cameraDistance",
        "projection": "perspective",
    }
    primitive = {"mode": 0, "attributes": attributes, "extensions": {NAME: splats}}
    tree = {
        "asset": {"version": "2.0", "generator": "mmkit"}, "extensionsUsed": [NAME], "scene": 0, "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0, "rotation": _TURN, "extras": {"rasterize_mode": model.rasterize_mode}}],
        "meshes": [{"primitives": [primitive]}], "accessors": accessors, "bufferViews": views, "buffers": [{"byteLength": len(binary)}],
    }  # fmt: skip
    if not len(model):  # glTF knows no empty accessors
        tree = {k: tree[k] for k in ("asset", "extensionsUsed", "scene", "scenes")} | {
            "nodes": [{"extras": {"gaussians": 0}}]
        }
    text = json.dumps(tree, separators=(",", ":")).encode()
    chunks = [(b"JSON", text + b" " * (-len(text) % 4)), (b"BIN\0", binary)]
    body = b"".join(struct.pack("<I4s", len(content), kind) + content for kind, content in chunks if content)
    return struct.pack("<4sII", b"glTF", 2, 12 + len(body)) + body


def _coefficient(i: int) -> str:
    degree = int(i**0.5)
    return f"{NAME}:SH_DEGREE_{degree}_COEF_{i - degree * degree}"


def _chunks(data: bytes) -> tuple[dict[str, Any], bytes]:
    if len(data) < 20 or data[:4] != b"glTF":
        raise InputError("it does not begin as a binary glTF file.")
    _, version, length = struct.unpack_from("<4sII", data)
    if version != 2 or length > len(data):
        raise InputError(f"its header says version {version} and {length} bytes; it has {len(data)}.")
    found: dict[bytes, bytes] = {}
    at = 12
    while at + 8 <= length:
        size, kind = struct.unpack_from("<I4s", data, at)
        if at + 8 + size > length:
            raise InputError("a chunk reaches beyond its end.")
        found.setdefault(kind, data[at + 8 : at + 8 + size])
        at += 8 + size
    try:
        tree = json.loads(found.get(b"JSON", b""))
    except (ValueError, RecursionError) as error:
        raise InputError(f"its JSON is damaged ({error}).") from error
    if not isinstance(tree, dict):
        raise InputError("its JSON is not an object.")
    return tree, found.get(b"BIN\0", b"")


class _File:
    """A parsed file; whatever is wrong inside becomes one kind of error."""

    def __init__(self, data: bytes):
        self.tree, self.binary = _chunks(data)

    def accessor(self, index: int) -> np.ndarray:
        """(count, width) numbers, normalised integers as -1..1 or 0..1."""
        row = self.tree["accessors"][index]
        if "sparse" in row or "bufferView" not in row:
            raise InputError("sparse and compressed accessors are not read.")
        view = self.tree["bufferViews"][row["bufferView"]]
        if self.tree["buffers"][view.get("buffer", 0)].get("uri") is not None:
            raise InputError("buffers in other files are not read; pack it as one .glb.")
        kind, width, n = np.dtype(_COMPONENTS[row["componentType"]]), _WIDTHS[row["type"]], int(row["count"])
        stride = int(view.get("byteStride") or kind.itemsize * width)
        start, size = int(view.get("byteOffset", 0)), int(view["byteLength"])
        offset = int(row.get("byteOffset", 0))
        if min(start, size, offset, n) < 0 or stride < kind.itemsize * width or start + size > len(self.binary):
            raise InputError("a view reaches outside its buffer.")
        check_count(n, size - offset + stride - kind.itemsize * width, stride)
        values = np.ndarray((n, width), kind, self.binary, start + offset, (stride, kind.itemsize)).astype(np.float64)
        if row.get("normalized") and kind.kind != "f":
            values = np.maximum(values / np.iinfo(kind).max, -1.0)
        return values

    def primitives(self) -> list[tuple[dict[str, Any], np.ndarray, dict[str, Any]]]:
        """Splat primitives of the scene with the matrices of their nodes and the nodes' extras."""
        nodes = self.tree.get("nodes", [])
        scenes = self.tree.get("scenes") or [{"nodes": list(range(len(nodes)))}]
        todo = [(i, np.eye(4)) for i in scenes[self.tree.get("scene", 0)].get("nodes", [])]
        found, visits = [], 0
        while todo:
            index, above = todo.pop()
            visits += 1
            if visits > 10_000:
                raise InputError("its nodes form a circle.")
            node = nodes[index]
            matrix = above @ _matrix(node)
            todo += [(child, matrix) for child in node.get("children", [])]
            if "mesh" in node:
                for primitive in self.tree["meshes"][node["mesh"]]["primitives"]:
                    if NAME in primitive.get("extensions", {}):
                        found.append((primitive, matrix, node.get("extras") or {}))
        return found


def _matrix(node: dict[str, Any]) -> np.ndarray:
    if "matrix" in node:
        return np.asarray(node["matrix"], np.float64).reshape(4, 4).T
    x, y, z, w = node.get("rotation", (0, 0, 0, 1))
    out = np.eye(4)
    turn = rotation(torch.tensor([w, x, y, z], dtype=torch.float64)).numpy()
    out[:3, :3] = turn * np.asarray(node.get("scale", (1, 1, 1)), np.float64)
    out[:3, 3] = node.get("translation", (0, 0, 0))
    return out


def read(data: bytes) -> GaussianModel:
    """All splats of the scene, in our axes."""
    try:
        file = _File(data)
        parts = [_read_primitive(file, *found) for found in file.primitives()]
    except InputError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(f"its structure is damaged ({type(error).__name__}: {error}).") from error
    if not parts:
        if NAME in file.tree.get("extensionsUsed", []):
            return GaussianModel(0)
        raise InputError(f"it has no primitive with {NAME}: a mesh, not splats.")
    if len({(p.sh_degree, p.rasterize_mode) for p in parts}) > 1:
        raise InputError("its primitives have harmonics of different degrees; join them one by one.")
    together: dict[str, Tensor] = {name: torch.cat([getattr(p, name).data for p in parts]) for name in NAMES}
    return GaussianModel.from_tensors(together, rasterize_mode=parts[0].rasterize_mode)


def _read_primitive(
    file: _File, primitive: dict[str, Any], matrix: np.ndarray, extras: dict[str, Any]
) -> GaussianModel:
    attributes, extension = primitive["attributes"], primitive["extensions"][NAME]
    if extension.get("extensions"):
        raise InputError(f"it is compressed ({', '.join(extension['extensions'])}), which is not read.")
    if extension.get("kernel", "ellipse") != "ellipse" or primitive.get("mode", 0) != 0:
        raise InputError(
            f"its kernel is {extension.get('kernel')!s:.40} on mode {primitive.get('mode')}; ellipses on points are read."
        )
    degree = next(d for d in (3, 2, 1, 0) if _coefficient(d * d) in attributes)
    if degree == 0 and _coefficient(0) not in attributes:
        raise InputError("it has no first harmonic.")
    coefficients = [file.accessor(attributes[_coefficient(i)]) for i in range((degree + 1) ** 2)]
    columns = {
        "means": file.accessor(attributes["POSITION"]), "quats": np.roll(file.accessor(attributes[f"{NAME}:ROTATION"]), 1, axis=1),
        "scales": np.log(np.maximum(file.accessor(attributes[f"{NAME}:SCALE"]), 1e-30)),
        "opacities": logit(file.accessor(attributes[f"{NAME}:OPACITY"])[:, 0], _SMALLEST), "sh0": coefficients[0][:, None],
    }  # fmt: skip
    n = len(columns["means"])
    if any(len(x) != n for x in (*columns.values(), *coefficients)):
        raise InputError("its attributes have different lengths.")
    columns["shN"] = np.stack(coefficients[1:], 1) if degree else np.zeros((n, 0, 3))
    mode = "antialiased" if extras.get("rasterize_mode") == "antialiased" else "classic"
    model = as_model(mode, **columns)
    matrix = np.diag([1.0, -1.0, -1.0, 1.0]) @ matrix
    scale = float(np.cbrt(np.linalg.det(matrix[:3, :3])))
    turn = matrix[:3, :3] / scale if scale > 0 else np.zeros((3, 3))
    if not np.allclose(turn @ turn.T, np.eye(3), atol=1e-4):
        raise InputError("a node mirrors it or scales its axes differently, which Gaussians do not survive.")
    if np.allclose(matrix, np.eye(4), atol=1e-12):
        return model
    return model.transform(torch.from_numpy(turn), torch.from_numpy(matrix[:3, 3]), scale)
