"""Damaged and hostile inputs for everything that reads: seeds that are sound, ways to damage them, and the readers.

Every input is a function of (target, seed, number), so that a failure can be made again: `damaged(target, number)`.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import logging
import random
import resource
import shutil
import signal
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmkit.errors import MMKitError

MAX_SECONDS = 5.0
MAX_MEMORY = 1_500_000_000
"""Bytes by which the process may grow while one target runs."""
ODD_VALUES: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, 10**30, -1e308, 1e308, float("nan"), float("inf"), "", "0", "x" * 5000, "../../etc/passwd",
    "/dev/zero", "~", "\0", "\ud800", "__import__('os')", "https://example.com/x", "hf-hub:x/y", [], {}, [[]], [None], {"a": {}},
]  # fmt: skip


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
        name: of the target.
        seeds: folder -> sound inputs: files, or folders.
        read: the damaged input, and an empty folder to write into.
        damage: how the input in place is changed.
        share: of all inputs of a run.
    """

    name: str
    seeds: Callable[[Path], list[Path]]
    read: Callable[[Path, Path], object]
    damage: Callable[[Path, random.Random], None]
    share: float


@dataclass
class Outcome:
    """What a run over one target showed."""

    counts: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    grown: int = 0
    failures: list[str] = field(default_factory=list)


def run(target: Target, count: int, seed: int = 0) -> Outcome:
    """Read `count` damaged inputs; whatever is no `MMKitError`, takes too long, or leaves something behind, is a failure."""
    outcome = Outcome()
    with tempfile.TemporaryDirectory() as temporary, contextlib.chdir(temporary), _silence():
        root = Path(temporary)
        (root / "seeds").mkdir()
        seeds = target.seeds(root / "seeds")
        target.read(
            _copy(seeds[0], root / "sound"), _empty(root / "written")
        )  # libraries are loaded, the seed is sound
        before = _peak_memory()
        for number in range(count):
            rng = random.Random(f"{target.name} {seed} {number}")
            place = _copy(rng.choice(seeds), root / "input")
            target.damage(place, rng)
            _attempt(target, place, _empty(root / "written"), number, outcome)
        outcome.grown = _peak_memory() - before
    if outcome.grown > MAX_MEMORY:
        outcome.failures.append(f"{target.name}: memory grew by {outcome.grown / 1e6:.0f} MB")
    return outcome


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Libraries have much to say about damaged files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _attempt(target: Target, place: Path, written: Path, number: int, outcome: Outcome) -> None:
    start = time.process_time()
    try:
        with _deadline():
            target.read(place, written)
        outcome.counts["read"] += 1
    except MMKitError:
        outcome.counts["refused"] += 1
        left = sorted(str(p.relative_to(written)) for p in written.rglob("*"))
        if left:
            outcome.failures.append(f"{target.name} {number}: refused, but left {left[:5]}")
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        outcome.counts["failed"] += 1
        outcome.failures.append(f"{target.name} {number}: {type(error).__name__}: {str(error)[:200]}")
    outcome.slowest = max(outcome.slowest, time.process_time() - start)


@contextlib.contextmanager
def _deadline() -> Iterator[None]:
    """An error when the CPU time of the process passes `MAX_SECONDS`: a busy machine is no hang."""

    def late(number: int, frame: Any) -> None:
        raise TimeoutError(f"more than {MAX_SECONDS} s")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _copy(source: Path, target: Path) -> Path:
    """A fresh copy of a seed, with its suffixes."""
    for old in target.parent.glob(f"{target.name}*"):
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    target = target.with_name(target.name + "".join(source.suffixes))
    return Path(shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target))


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


# ------------------------------------------------------------------------------------------------------------- damage


def damage_bytes(path: Path, rng: random.Random) -> None:
    """Flip, cut, repeat, insert, or set numbers, a few times; sometimes nothing but noise."""
    data = bytearray(path.read_bytes())
    if rng.random() < 0.02:
        data = bytearray(rng.randbytes(rng.randrange(200)))
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(data) + 1) if rng.random() < 0.5 else rng.randrange(min(len(data), 128) + 1)
        length = rng.choice((1, 2, 4, 8, 100))
        how = rng.randrange(6)
        if how == 0:
            data[at : at + length] = bytes(b ^ (1 << rng.randrange(8)) for b in data[at : at + length])
        elif how == 1:
            del data[at:]
        elif how == 2:
            del data[at : at + length]
        elif how == 3:
            data[at:at] = data[at : at + length] * rng.choice((1, 2, 50))
        elif how == 4:
            data[at : at + length] = rng.randbytes(length)
        else:
            size = rng.choice((1, 2, 4, 8))
            value = rng.choice((0, 1, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1))
            data[at : at + size] = (value % 256**size).to_bytes(size, rng.choice(("little", "big")))
    path.write_bytes(data)


def damage_text(path: Path, rng: random.Random) -> None:
    """Put odd values and signs between the lines and cells, or damage the bytes."""
    if rng.random() < 0.4:
        return damage_bytes(path, rng)
    lines = path.read_text().split("\n")
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(lines))
        cells = lines[at].split(",")
        cells[rng.randrange(len(cells))] = rng.choice(
            [str(v) for v in ODD_VALUES] + ['"', ";", "\t", " " * 3000, "1" * 3000, "\r"]
        )
        lines[at] = ",".join(cells)
        if rng.random() < 0.2:
            lines[at:at] = lines[at : at + 1] * rng.choice((1, 300))
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))


def damage_json(path: Path, rng: random.Random) -> None:
    """Replace, add or take away values anywhere in the tree, or damage the bytes."""
    if rng.random() < 0.2:
        return damage_bytes(path, rng)
    value = json.loads(path.read_text())
    for _ in range(rng.choice((1, 1, 2, 5))):
        value = _damaged_value(value, rng)
    text = json.dumps(value)
    path.write_text("[" * 100_000 if rng.random() < 0.01 else text)


def _damaged_value(value: Any, rng: random.Random) -> Any:
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return rng.choice(ODD_VALUES)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key, how = rng.choice(keys), rng.random()
    if how < 0.1:
        del value[key]
    elif how < 0.2 and isinstance(value, dict):
        value[rng.choice(["", "x", "pretrained", "checkpoint_path", *map(str, keys)])] = rng.choice(ODD_VALUES)
    else:
        value[key] = _damaged_value(value[key], rng)
    return value


def damage_folder(path: Path, rng: random.Random) -> None:
    """Damage one file of a folder, most often a JSON file, or take it away."""
    files = sorted(p for p in path.rglob("*") if p.is_file())
    file = rng.choice([p for p in files if p.suffix == ".json"] if rng.random() < 0.7 else files)
    if rng.random() < 0.05:
        file.unlink()
    elif file.suffix == ".json":
        damage_json(file, rng)
    else:
        damage_bytes(file, rng)
    manifest = path / "mmkit.json"
    if rng.random() < 0.7 and manifest.exists() and file != manifest:
        manifest.unlink()  # else every change is found by its digest, and the readers see nothing


# ------------------------------------------------------------------------------------------------------------ targets


def image_seeds(folder: Path) -> list[Path]:
    """Small pictures of every format and of unusual modes."""
    noise = np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)
    picture = Image.fromarray(noise)
    exif = Image.Exif()
    exif[0x0112] = 6
    modes = {
        "grey.png": picture.convert("L"),
        "palette.png": picture.convert("P"),
        "alpha.png": picture.convert("RGBA"),
    }
    modes |= {
        "palette.gif": picture.convert("P"),
        "cmyk.jpg": picture.convert("CMYK"),
        "float.tif": picture.convert("F"),
    }
    modes |= {f"rgb.{s}": picture for s in ("png", "jpg", "bmp", "webp", "avif", "tif", "ppm")}
    modes["deep.png"] = Image.fromarray(np.arange(768, dtype=np.uint16).reshape(24, 32) * 80)
    for name, image in modes.items():
        image.save(folder / name, **({"exif": exif} if name in ("rgb.jpg", "rgb.png", "rgb.webp") else {}))
    picture.save(folder / "lzw.tif", compression="tiff_lzw")
    picture.save(folder / "two.mpo", save_all=True, append_images=[picture])
    picture.save(folder / "two.gif", save_all=True, append_images=[picture.rotate(90)])
    return sorted(folder.iterdir())


def read_image(path: Path, written: Path) -> None:
    from mmkit.data import load_image

    image = load_image(path)
    assert image.mode == "RGB"
    assert image.size[0] * image.size[1] <= 64_000_000


def table_seeds(folder: Path) -> list[Path]:
    """Tables and lists as they are kept, beside the pictures that they name."""
    rows = [(f"{i}.png", "ab"[i % 2], "train" if i < 4 else "test") for i in range(6)]
    for name, _, _ in rows:
        (folder.parent / name).touch()
    (folder / "table.csv").write_text("path,label,split\n" + "".join(f"{a},{b},{c}\n" for a, b, c in rows))
    (folder / "times.csv").write_text(
        "path,label,start,end\n" + "".join(f"{a},{i},0.5,{i}\n" for i, (a, _, _) in enumerate(rows))
    )
    (folder / "list.csv").write_text("".join(f"{a} {i}\n" for i, (a, _, _) in enumerate(rows)))
    return sorted(folder.iterdir())


def read_table(path: Path, written: Path) -> None:
    from mmkit.data import open_dataset
    from mmkit.video import VideoClassificationDataset as Videos

    errors = []
    for read in (lambda p: open_dataset(p, verify=False), Videos.from_csv, Videos.from_list):
        try:
            read(path)
        except MMKitError as error:
            errors.append(error)
    if len(errors) == 3:
        raise errors[0]


def archive_seeds(folder: Path) -> list[Path]:
    """Zips of class folders: stored, deflated, and with other compressions."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    kinds = {
        "stored": zipfile.ZIP_STORED,
        "deflated": zipfile.ZIP_DEFLATED,
        "bz2": zipfile.ZIP_BZIP2,
        "lzma": zipfile.ZIP_LZMA,
    }
    for name, kind in kinds.items():
        with zipfile.ZipFile(folder / f"{name}.zip", "w", kind) as archive:
            for member in ("a/0.png", "a/1.png", "b/0.png", "notes.txt"):
                archive.writestr(member, buffer.getvalue())
    return sorted(folder.iterdir())


def read_archive(path: Path, written: Path) -> None:
    from mmkit.data import extract_zip

    extract_zip(path, written / "out", max_files=100, max_bytes=10_000_000)


def video_seeds(folder: Path) -> list[Path]:
    """Short clips in four containers."""
    from mmkit.video import write_video

    frames = np.random.default_rng(0).integers(0, 255, (12, 6, 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    for name, codec in (("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.avi", "mpeg4"), ("a.webm", "libvpx")):
        write_video(folder / name, frames, codec=codec, options={"g": "6"})
    return sorted(folder.iterdir())


def read_video(path: Path, written: Path) -> None:
    from mmkit.video import VideoReader

    with VideoReader(path) as reader:
        clip = reader.read([0, len(reader) // 2, len(reader) - 1], size=32)
    assert len(clip) == 3


def volume_seeds(folder: Path) -> list[Path]:
    """NIfTI files, packed or not, of several types."""
    import nibabel

    for i, dtype in enumerate((np.uint8, np.int16, np.float32, np.float64)):
        data = np.random.default_rng(i).integers(0, 100, (9, 8, 7)).astype(dtype)
        affine = np.array([[0, -2, 0, 1], [3, 0, 0, 2], [0, 0, 1, 3], [0, 0, 0, 1.0]])
        for kind, version in ((nibabel.Nifti1Image, 1), (nibabel.Nifti2Image, 2)):
            nibabel.save(kind(data, affine), folder / f"{i}{version}.nii")
    for path in sorted(folder.iterdir())[::2]:
        (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    return sorted(folder.iterdir())


def damage_volume(path: Path, rng: random.Random) -> None:
    """Also below the compression, where the checksum would hide the rest."""
    if path.suffix == ".gz" and rng.random() < 0.6:
        path.write_bytes(gzip.decompress(path.read_bytes()))
        damage_bytes(path, rng)
        path.write_bytes(gzip.compress(path.read_bytes()))
    else:
        damage_bytes(path, rng)


def read_volume(path: Path, written: Path) -> None:
    from mmkit.vision.medical import load_labels, load_volume, ras

    volume = load_volume(path)
    assert np.isfinite(volume.data).all()
    ras(volume.data, volume.affine)
    load_labels(path, 2)


def tensor_seeds(folder: Path) -> list[Path]:
    """Weight files in both formats."""
    import torch
    from safetensors.torch import save_file

    state = {"a.weight": torch.randn(3, 4), "b": torch.arange(5), "c": torch.randn(2, 2).half()}
    save_file(state, folder / "a.safetensors", {"format": "pt"})
    torch.save({"state_dict": state}, folder / "a.pth")
    torch.save(state, folder / "b.bin", _use_new_zipfile_serialization=False)
    return sorted(folder.iterdir())


def read_tensor_file(path: Path, written: Path) -> None:
    from mmkit.storage import read_tensors

    read_tensors(path)


def folder_seeds(folder: Path) -> list[Path]:
    """Folders of every kind that mmkit writes and reads; the suffix tells which."""
    import torch

    from mmkit.adapters import apply_adapter, save_adapter
    from mmkit.backbones import create_backbone, save_backbone
    from mmkit.data import load_digits
    from mmkit.video import VideoClassifier
    from mmkit.vision.classification import finetune
    from mmkit.vision.medical import lightm_unet_2d_tiny

    torch.manual_seed(0)
    for name in ("ssf", "lora"):
        model = create_backbone("tiny_vit", num_classes=2)
        save_adapter(apply_adapter(model, name), folder / f"a.{name}")
    digits = load_digits((0, 1)).subset(range(0, 360, 20))
    finetune(digits, "tiny_vit", "linear_probe", epochs=1, output_dir=folder / "a.finetuned")
    save_backbone(create_backbone("resnet10t", num_classes=2), folder / "a.backbone")
    lightm_unet_2d_tiny(in_chans=1, num_classes=2).save_pretrained(folder / "a.medical")
    settings = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 4}
    VideoClassifier("timm:vit_tiny_patch16_224", 2, backbone_args=settings, zeroi2v={}, num_frames=4).save_pretrained(
        folder / "a.video"
    )
    return sorted(folder.iterdir())


def read_folder(path: Path, written: Path) -> None:
    """Through the door of its kind."""
    from mmkit.adapters import load_adapter
    from mmkit.backbones import create_backbone
    from mmkit.storage.runs import load_trained
    from mmkit.video import VideoClassifier
    from mmkit.vision.classification import load_finetuned
    from mmkit.vision.medical import LightMUNet

    kind = path.suffix[1:]
    if kind in ("ssf", "lora"):
        load_adapter(create_backbone("tiny_vit", num_classes=2), path)
    elif kind == "finetuned":
        load_finetuned(path)
        load_trained(path / "training", create_backbone("tiny_vit", num_classes=2))
    elif kind == "backbone":
        create_backbone(path)
    elif kind == "medical":
        LightMUNet.from_pretrained(path)
    else:
        VideoClassifier.from_pretrained(path)


COMMANDS = {
    "finetune": [
        "--data",
        "--backbone",
        "--adapter",
        "--output",
        "--checkpoint",
        "--epochs",
        "--lr",
        "--batch-size",
        "--val",
    ],
    "merge": ["", "--output", "--backbone"],
    "predict": ["", "--model", "--top-k", "--backbone", "--device", "--batch-size", "--checkpoint"],
    "list": [""],
    "info": [""],
}


def command_seeds(folder: Path) -> list[Path]:
    """A command line in a file."""
    (folder / "line.json").write_text(json.dumps(["list", "adapters"]))
    return [folder / "line.json"]


def damage_command(path: Path, rng: random.Random) -> None:
    """A command with odd values for some of its options. No data set that exists: nothing here is meant to train."""
    name = rng.choice(list(COMMANDS))
    odd = [str(v) for v in ODD_VALUES if "\ud800" not in str(v)] + [
        "tiny_vit",
        "ssf",
        "weights",
        "full",
        "nowhere",
        "1e-3",
        "-0",
    ]
    line = [name]
    for option in COMMANDS[name]:
        if rng.random() < 0.7:
            value = "nowhere" if option == "--data" and rng.random() < 0.5 else rng.choice(odd)
            line += [option, value] if option else [value]
    if rng.random() < 0.1:
        line.insert(rng.randrange(1, len(line) + 1), rng.choice(["--help", "--nonsense", "--", "-x"]))
    path.write_text(json.dumps(line))


def read_command(path: Path, written: Path) -> None:
    from typer.testing import CliRunner

    from mmkit.cli import app

    line = json.loads(path.read_text())
    with contextlib.chdir(written):
        result = CliRunner().invoke(app, line)
        for left in written.iterdir():
            raise AssertionError(f"{line} left {left.name}")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code in (0, 1, 2), result.exit_code
    assert "Traceback" not in result.output


def cloud_seeds(folder: Path) -> list[Path]:
    """Points, meshes and splats in the formats that are read."""
    import torch
    import trimesh

    from mmkit.pointcloud.io import PointCloud, write_point_cloud
    from mmkit.pointcloud.splats import GaussianModel, save_splats

    rng = np.random.default_rng(0)
    xyz = rng.normal(size=(40, 3)).astype(np.float32)
    cloud = PointCloud(xyz, rng.integers(0, 255, (40, 3), np.uint8), xyz.copy(), rng.integers(0, 4, 40))
    paths = [write_point_cloud(cloud, folder / f"cloud{suffix}") for suffix in (".npy", ".ply", ".npz", ".xyz")]
    mesh = trimesh.creation.icosphere(subdivisions=1)
    for suffix in (".obj", ".stl", ".off", ".glb"):
        paths.append(folder / f"mesh{suffix}")
        mesh.export(paths[-1])
    scene = GaussianModel.from_points(torch.from_numpy(xyz), torch.from_numpy(cloud.rgb).float() / 255)
    return paths + [
        save_splats(scene, folder / f"scene{suffix}") for suffix in (".ply", ".splat", ".spz", ".sog", ".glb")
    ]


def read_cloud(path: Path, written: Path) -> None:
    from mmkit.pointcloud.io import read_point_cloud
    from mmkit.pointcloud.splats import load_splats

    either = path.suffix in (".ply", ".glb") and path.stat().st_size % 2
    (load_splats if either or path.suffix in (".splat", ".spz", ".sog") else read_point_cloud)(path)


TARGETS = [
    Target("images", image_seeds, read_image, damage_bytes, 0.2),
    Target("clouds", cloud_seeds, read_cloud, damage_bytes, 0.1),
    Target("tables", table_seeds, read_table, damage_text, 0.15),
    Target("archives", archive_seeds, read_archive, damage_bytes, 0.15),
    Target("videos", video_seeds, read_video, damage_bytes, 0.1),
    Target("volumes", volume_seeds, read_volume, damage_volume, 0.1),
    Target("weights", tensor_seeds, read_tensor_file, damage_bytes, 0.1),
    Target("folders", folder_seeds, read_folder, damage_folder, 0.05),
    Target("commands", command_seeds, read_command, damage_command, 0.05),
]
