"""Labelled data sets from folders, CSV files and zips; splits; what is wrong is said by path."""

from __future__ import annotations

import os
import subprocess
import sys
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


def test_what_a_killed_process_had_unpacked_goes(folder, tmp_path):
    name = 'Path(sys.argv[1], temporary_name(), "data").mkdir(parents=True)'
    script = f"import sys; from pathlib import Path; from mmkit.storage import temporary_name; {name}"
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "here")], check=True)
    assert len(os.listdir(tmp_path / "here")) == 1
    extract_zip(pack(folder, tmp_path / "a.zip"), tmp_path / "here" / "out")
    assert os.listdir(tmp_path / "here") == ["out"]


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


# ------------------------------------------------------------------------------------------------ folders as people keep them


def classes(root: Path, names: str = "a b", count: int = 2) -> None:
    for name in names.split():
        for i in range(count):
            picture(root / name / f"{i}.png")


@pytest.mark.parametrize(
    "train,val,test",
    [
        ("train", "val", "test"),
        ("Training", "valid", "testing"),
        ("train_set", "validation_set", "test_set"),
        ("train-images", "eval", "Test Data"),
        ("train2017", "dev", "test1"),
        ("birds_train", "birds-val", "birds test"),
    ],
)
def test_splits_under_every_usual_name(tmp_path, train, val, test):
    for name in (train, val, test):
        classes(tmp_path / name)
    data = open_dataset(tmp_path)
    assert data.class_names == ["a", "b"]
    assert data.left_out == []
    assert [len(data.split(s)) for s in ("train", "val", "test", "validation")] == [4, 4, 4, 4]


@pytest.mark.parametrize("extra", ["extra", "unlabelled pictures", "docs"])
def test_splits_beside_other_folders_are_splits_and_the_others_are_named(tmp_path, extra):
    for name in ("train", "test"):
        classes(tmp_path / name)
    if extra == "docs":
        (tmp_path / extra).mkdir()
    else:
        picture(tmp_path / extra / "0.png")
    with pytest.warns(UserWarning, match=f"'{extra}' holds (1 pictures in no split|no pictures)"):
        data = open_dataset(tmp_path)
    assert (data.class_names, set(data.splits)) == (["a", "b"], {"train", "test"})


@pytest.mark.parametrize("name", ["test", "test_set", "val"])
def test_an_unlabelled_split_is_left_out_and_named(tmp_path, name):
    classes(tmp_path / "train")
    picture(tmp_path / name / "0.png")
    with pytest.warns(UserWarning, match=f"'{name}' holds 1 pictures without classes"):
        data = open_dataset(tmp_path)
    assert (data.class_names, set(data.splits)) == (["a", "b"], {"train"})
    assert [len(part) for part in split_dataset(data, 0.5)] == [2, 2]


def test_class_folders_beside_a_test_folder_are_the_training_part(tmp_path):
    classes(tmp_path)
    classes(tmp_path / "test", count=1)
    data = open_dataset(tmp_path)
    assert data.class_names == ["a", "b"]
    assert sorted(data.splits) == ["test"] * 2 + ["train"] * 4


def test_splits_inside_every_class_folder_are_splits(tmp_path):
    for name in ("cup", "plate"):
        classes(tmp_path / name, "train test", 3)
    data = open_dataset(tmp_path)
    assert data.class_names == ["cup", "plate"]
    assert [len(data.split(s)) for s in ("train", "test")] == [6, 6]


def test_a_class_called_train_is_a_class(tmp_path):
    classes(tmp_path, "bus car train")
    assert open_dataset(tmp_path).class_names == ["bus", "car", "train"]


def test_train_and_test_without_classes_are_never_two_classes(tmp_path):
    classes(tmp_path, "train test")
    with pytest.raises(InputError, match="no class folders"):
        open_dataset(tmp_path)


def test_a_class_without_training_pictures_is_named(tmp_path):
    classes(tmp_path / "train")
    classes(tmp_path / "test", "a b c")
    with pytest.warns(UserWarning, match="class 'c' has no training pictures"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    "hidden", [".ipynb_checkpoints", ".thumbnails", "@eaDir", "__MACOSX", ".trash", "$RECYCLE.BIN", "lost+found"]
)
def test_hidden_and_system_folders_never_count(tmp_path, hidden):
    classes(tmp_path / "train")
    for place in ("", "train", "train/a"):
        picture(tmp_path / place / hidden / "0.png")
        picture(tmp_path / place / hidden / "a" / "0.png")
    picture(tmp_path / "train" / "a" / "._0.png")
    data = open_dataset(tmp_path)
    assert (data.class_names, len(data), data.left_out) == (["a", "b"], 4, [])
    archive = pack(tmp_path, tmp_path.parent / "hidden.zip")
    assert len(open_dataset(archive)) == 4


def test_links_are_followed_once_and_circles_end(tmp_path):
    classes(tmp_path / "elsewhere")
    root = tmp_path / "set"
    classes(root, "c")
    (root / "a").symlink_to(tmp_path / "elsewhere" / "a")
    (root / "b").symlink_to(tmp_path / "elsewhere" / "b")
    (root / "a0").symlink_to(root / "c")  # sorts before c, which keeps its pictures
    (root / "c" / "up").symlink_to(root)
    with pytest.warns(UserWarning, match="a0 leads to a folder that is listed already"):
        data = open_dataset(root)
    assert data.class_counts() == {"a": 2, "b": 2, "c": 2}


def test_pictures_come_in_natural_order(tmp_path):
    for i in (10, 9, 1, 2):
        picture(tmp_path / "a" / f"frame {i}.png")
        picture(tmp_path / f"class{i}" / "0.png")
    data = open_dataset(tmp_path)
    assert [p.stem for p in data.paths[:4]] == ["frame 1", "frame 2", "frame 9", "frame 10"]
    assert data.class_names == ["a", "class1", "class2", "class9", "class10"]


@pytest.mark.parametrize("other", ["cat", "café"])
def test_classes_that_differ_only_in_case_or_accents_are_noticed(tmp_path, other):
    twin = "Cat" if other == "cat" else "cafe\u0301"
    for name in (twin, other):
        picture(tmp_path / name / "0.png")
    with pytest.warns(UserWarning, match="differ only in case"):
        assert len(open_dataset(tmp_path).class_names) == 2


def test_what_is_left_out_is_counted_and_named(tmp_path):
    classes(tmp_path)
    (tmp_path / "empty").mkdir()
    picture(tmp_path / "loose.png")
    for name in ("a/x.psd", "a/y.PSD", "b/readme.txt"):
        (tmp_path / name).write_text("")
    with pytest.warns(UserWarning, match="other files") as caught:
        data = open_dataset(tmp_path)
    text = str(caught[0].message)
    for part in ("3 other files (.psd 2, .txt 1)", "'empty' holds no pictures", "1 pictures lie outside", "loose.png"):
        assert part in text
    assert len(data.left_out) == 3
    archive = pack(tmp_path, tmp_path.parent / "left.zip")
    with pytest.warns(UserWarning, match=r"2 other files in the zip \(\.psd\)"):
        open_dataset(archive)


@pytest.mark.parametrize("text", ["id,breed\n1,dog\n", "image,label\ngone.png,x\n", "", "path,label\n"])
def test_a_stray_table_is_no_obstacle(tmp_path, text):
    classes(tmp_path)
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.warns(UserWarning, match=r"not used as an index: .*metadata\.csv"):
        assert open_dataset(tmp_path).class_counts() == {"a": 2, "b": 2}
    (tmp_path / "metadata.csv").rename(tmp_path / "index.csv")
    with pytest.raises(InputError):
        open_dataset(tmp_path)


def test_pictures_that_an_index_does_not_list_are_counted(tmp_path):
    classes(tmp_path)
    (tmp_path / "index.csv").write_text("path,label\na/0.png,x\nb/0.png,y\n")
    with pytest.warns(UserWarning, match="2 pictures are not listed in index.csv"):
        open_dataset(tmp_path)


def test_unlabelled_test_rows_do_not_stop_training(tmp_path):
    classes(tmp_path)
    (tmp_path / "index.csv").write_text(
        "path,label,split\na/0.png,a,train\na/1.png,b,train\nb/0.png,,test\nb/1.png,,test\n"
    )
    with pytest.warns(UserWarning, match="2 test rows of .* have no label"):
        data = open_dataset(tmp_path)
    assert (len(data), data.splits) == (2, ["train", "train"])


def test_class_order_is_the_same_from_folders_and_tables(tmp_path):
    names = ["10", "2", "Zebra", "a", "x10", "x9"]
    classes(tmp_path / "set", " ".join(names), 1)
    rows = "\n".join(f"set/{name}/0.png,{name}" for name in names)
    (tmp_path / "list.csv").write_text(f"path,label\n{rows}\n")
    table = open_dataset(tmp_path / "list.csv").class_names
    assert open_dataset(tmp_path / "set").class_names == table == ["2", "10", "Zebra", "a", "x9", "x10"]


@pytest.mark.parametrize(
    "content", [b"path,label\n" + b"x" * 200_000 + b",a\n", b"\xff\xfe\x00", b"path,label\n\x00,b\n"]
)
def test_damaged_tables_are_said(tmp_path, content):
    (tmp_path / "list.csv").write_bytes(content)
    with pytest.raises(InputError):
        open_dataset(tmp_path / "list.csv")


def test_a_table_in_utf_16_is_read(tmp_path):
    classes(tmp_path)
    (tmp_path / "list.csv").write_text("path;label\na/0.png;é\nb/0.png;y\n", encoding="utf-16")
    assert open_dataset(tmp_path / "list.csv").class_names == ["y", "é"]


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "~nobody-of-this-name/set"])
def test_names_that_no_file_can_have_are_missing_files(name):
    with pytest.raises(InputError, match=r"does not exist|null character"):
        open_dataset(name)
    with pytest.raises(InputError, match=r"does not exist|null character"):
        extract_zip(name, "out")


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    import os

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    classes(tmp_path)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match="cannot be listed: Permission denied"):
        open_dataset(tmp_path)


def test_listing_opens_no_file_and_makes_no_path_objects(tmp_path):
    import time

    for c in range(10):
        (tmp_path / f"c{c}").mkdir()
        for i in range(500):
            (tmp_path / f"c{c}" / f"{i}.jpg").touch()
    start = time.process_time()
    data = open_dataset(tmp_path, verify=False)
    assert time.process_time() - start < 0.3  # 0.3 s is the limit for ten times as many
    assert len(data) == 5000
    assert data.paths[11].name == "11.jpg"
