"""Labelled data sets from folders, CSV files and zips; splits; what is wrong is said by path."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmkit.data import extract_zip, open_dataset, split_dataset, stratified_split
from mmkit.errors import InputError


def picture(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (value, value, value)).save(path)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, count in (("10", 5), ("2", 7), ("cat", 3)):
        for i in range(count):
            picture(tmp_path / "set" / name / f"{i}.png", i)
    return tmp_path / "set"


def pack(folder: Path, target: Path, prefix: str = "") -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, prefix + path.relative_to(folder).as_posix())
    return target


def test_folder_per_class(folder):
    (folder / ".hidden").mkdir()
    (folder / "cat" / "notes.txt").write_text("no picture")
    data = open_dataset(folder)
    assert data.class_names == ["2", "10", "cat"]
    assert data.class_counts() == {"2": 7, "10": 5, "cat": 3}
    image, label = data[7]
    assert (image.size, image.mode, label) == ((4, 4), "RGB", 1)
    assert data.describe(7) == str(folder / "10" / "0.png")
    changed = data.with_transform(lambda im: np.asarray(im).mean())
    assert changed[8] == (1.0, 1)
    assert data.transform is None


def test_split_folders_are_honoured(folder, tmp_path):
    root = tmp_path / "both"
    for part, n in (("train", 3), ("validation", 2), ("test", 1)):
        for name in ("a", "b"):
            for i in range(n):
                picture(root / part / name / f"{i}.png")
    data = open_dataset(root)
    assert data.class_names == ["a", "b"]
    train, val = split_dataset(data)
    assert (len(train), len(val), len(data.split("test"))) == (6, 4, 2)
    with pytest.raises(InputError, match="no 'train' examples"):
        open_dataset(folder).split("train")


@pytest.mark.parametrize(
    "text",
    [
        "path,label\n2/0.png,x\ncat/1.png,y\n",
        "\ufefffilename;extra;class\n2/0.png;1;x\n\ncat/1.png;2;y\n",
        "2/0.png,x\ncat/1.png,y\n",
        "label\timage\nx\t2/0.png\ny\tcat/1.png\n",
    ],
)
def test_csv_dialects(folder, text):
    (folder / "list.csv").write_text(text, encoding="utf-8")
    data = open_dataset(folder / "list.csv")
    assert (data.class_names, data.labels, data.splits) == (["x", "y"], [0, 1], None)


def test_csv_with_splits_as_index_of_a_folder(folder):
    lines = ["path,label,split", *(f"2/{i}.png,{'ab'[i % 2]},{'train' if i < 4 else 'valid'}" for i in range(6))]
    (folder / "index.csv").write_text("\n".join(lines))
    train, val = split_dataset(open_dataset(folder))
    assert (len(train), len(val), val.splits) == (4, 2, ["val", "val"])


@pytest.mark.parametrize(
    "text,message",
    [
        ("", "empty"),
        ("a,b\n1,2\n", "expected path,label"),
        ("path,label\n", "lists no pictures"),
        ("path,label\n2/0.png,\n", "row 2: path or label is missing"),
        ("path,label,split\n2/0.png,a,later\n", "unknown split 'later'"),
        ("path,label\n2/0.png,a\nnone.png,b\n", "none.png does not exist"),
        ("path,label,split\n2/0.png,a,train\n2/1.png,b,\n", "have none"),
    ],
)
def test_bad_csv(folder, text, message):
    (folder / "index.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        open_dataset(folder)


def test_corrupt_files_by_path(folder):
    bad = folder / "cat" / "9.png"
    bad.write_bytes((folder / "cat" / "0.png").read_bytes()[:40])
    with pytest.raises(InputError, match=r"1 of 16 pictures.*\n.*cat/9\.png"):
        open_dataset(folder)
    with pytest.warns(UserWarning, match=r"cat/9\.png"):
        data = open_dataset(folder, on_error="skip")
    assert len(data) == 15
    assert [p for p, _ in data.skipped] == [bad]
    late = open_dataset(folder, verify=False)
    with pytest.raises(InputError, match=r"cat/9\.png cannot be read"):
        late[15]
    with pytest.raises(InputError, match="on_error"):
        open_dataset(folder, on_error="ignore")


def test_skipping_a_whole_class_is_noticed(tmp_path):
    picture(tmp_path / "a" / "0.png")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "0.png").write_text("broken")
    with pytest.warns(UserWarning, match="cannot be used"), pytest.raises(InputError, match="only the class 'a'"):
        open_dataset(tmp_path, on_error="skip")


def test_empty_single_class_and_loose_pictures(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no pictures in sub-folders"):
        open_dataset(tmp_path)
    picture(tmp_path / "loose.png")
    with pytest.raises(InputError, match="1 pictures but no sub-folders"):
        open_dataset(tmp_path)
    picture(tmp_path / "only" / "a.png")
    with pytest.raises(InputError, match="only the class 'only'"):
        open_dataset(tmp_path)
    assert open_dataset(tmp_path, min_classes=1).class_names == ["only"]
    with pytest.raises(InputError, match="neither a folder nor"):
        open_dataset(tmp_path / "loose.png")


def test_zip_with_and_without_a_top_folder(folder, tmp_path):
    for prefix in ("", "my photos/"):
        archive = pack(folder, tmp_path / f"{len(prefix)}.zip", prefix)
        with zipfile.ZipFile(archive, "a") as more:
            more.writestr("__MACOSX/2/._0.png", b"junk")
        data = open_dataset(archive)
        assert data.class_counts() == {"2": 7, "10": 5, "cat": 3}
    target = tmp_path / "unpacked"
    assert open_dataset(archive, extract_to=target).paths[0].is_relative_to(target)


def hostile(tmp_path: Path, name: str, **info) -> Path:
    archive = tmp_path / "hostile.zip"
    with zipfile.ZipFile(archive, "w") as out:
        out.writestr("a/0.png", b"x")
        entry = zipfile.ZipInfo(name)
        for key, value in info.items():
            setattr(entry, key, value)
        out.writestr(entry, b"target")
    return archive


@pytest.mark.parametrize("name", ["../x.png", "a/../../x.png", "/tmp/x.png", "..\\x.png", "C:/x.png", "C:\\x.png"])
def test_zip_slip(tmp_path, name):
    archive = hostile(tmp_path, name)
    target = tmp_path / "deep" / "out"
    with pytest.raises(InputError, match="outside the folder; nothing was unpacked"):
        extract_zip(archive, target)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["deep", "hostile.zip"] or not target.exists()
    assert not list(tmp_path.rglob("x.png"))
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".out")]
    with pytest.raises(InputError, match="outside"):
        open_dataset(archive)


def test_zip_links_bombs_and_limits(tmp_path, folder):
    with pytest.raises(InputError, match="link"):
        extract_zip(hostile(tmp_path, "a/link.png", create_system=3, external_attr=0o120777 << 16), tmp_path / "o")
    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("a/0.png", b"\0" * 5_000_000)
    assert bomb.stat().st_size < 10_000
    with pytest.raises(InputError, match="unpacks to 5 MB; the limit is 1 MB"):
        open_dataset(bomb, max_bytes=1_000_000)
    with pytest.raises(InputError, match="15 files; the limit is 10"):
        open_dataset(pack(folder, tmp_path / "many.zip"), max_files=10)
    (tmp_path / "not.zip").write_text("hello")
    with pytest.raises(InputError, match="not a readable zip"):
        open_dataset(tmp_path / "not.zip")
    assert not (tmp_path / "o").exists()


def test_zip_that_lies_about_its_size(tmp_path):
    bomb = tmp_path / "liar.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("a/0.png", b"\0" * 3_000_000)
    content = bomb.read_bytes().replace((3_000_000).to_bytes(4, "little"), (100).to_bytes(4, "little"))
    bomb.write_bytes(content)
    with pytest.raises(InputError, match=r"not a readable zip|unpacks to more"):
        extract_zip(bomb, tmp_path / "out", max_bytes=1000)
    assert not (tmp_path / "out").exists()


def test_truncated_zip_leaves_nothing(folder, tmp_path):
    archive = pack(folder, tmp_path / "cut.zip")
    content = bytearray(archive.read_bytes())
    content[60:90] = b"\xff" * 30
    archive.write_bytes(bytes(content))
    with pytest.raises(InputError):
        extract_zip(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_csv_in_a_zip_cannot_read_outside(tmp_path):
    picture(tmp_path / "secret.png")
    root = tmp_path / "z"
    picture(root / "a.png")
    (root / "index.csv").write_text(f"path,label\na.png,x\n{tmp_path}/secret.png,y\n")
    with pytest.raises(InputError, match="outside the zip"):
        open_dataset(pack(root, tmp_path / "z.zip"))
    assert len(open_dataset(root)) == 2  # the user's own list may


def test_stratified_split_is_deterministic(folder):
    data = open_dataset(folder)
    train, val = split_dataset(data, val=0.3, seed=4)
    again = split_dataset(open_dataset(folder), val=0.3, seed=4)
    assert (train.paths, val.paths) == (again[0].paths, again[1].paths)
    assert val.paths != split_dataset(data, val=0.3, seed=5)[1].paths
    assert not set(train.paths) & set(val.paths)
    assert len(train) + len(val) == 15
    assert val.class_counts() == {"2": 2, "10": 2, "cat": 1}
    # fixed once and for all: a split must not change with versions
    assert stratified_split([0] * 6 + [1] * 4, 0.34, seed=1) == ([0, 2, 3, 5, 6, 7, 8], [1, 4, 9])
    assert stratified_split([0, 1], 0.5) == ([0, 1], [])
    with pytest.raises(InputError, match="between 0 and 1"):
        split_dataset(data, val=1.5)
    with pytest.raises(InputError, match="too few"):
        split_dataset(data.subset([0, 7]), val=0.5)


def test_real_clothing(data_dir):
    data = open_dataset(data_dir / "cls_clothing")
    assert len(data.class_names) == 10
    assert [len(part) for part in split_dataset(data)] == [400, 120]
    assert len(data.split("test")) == 120
