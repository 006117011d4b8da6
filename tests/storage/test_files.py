"""Single files: whole or not at all, one sentence when the disk refuses, nothing left behind."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmkit.errors import CheckpointError, InputError, MMKitError, StorageError
from mmkit.storage import atomic_write, new_folder, open_folder, read_json, write_json, write_safetensors
from mmkit.storage.files import absolute, check_writable, clean, expanded, temporaries, temporary_name


def refuse(code: int):  # type: ignore[no-untyped-def]
    def fail(*args: object, **options: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.ENOSPC, "disk is full"), (errno.EROFS, "read-only"), (errno.EACCES, "no permission"), (errno.EIO, "Input")],
)
def test_what_the_disk_refuses_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, code, words) -> None:  # type: ignore[no-untyped-def]
    write_json(tmp_path / "a.json", 1)
    monkeypatch.setattr("os.fsync", refuse(code))
    with pytest.raises(StorageError, match=words) as info:
        write_json(tmp_path / "a.json", 2)
    assert str(tmp_path / "a.json") in str(info.value)
    assert isinstance(info.value, MMKitError)
    assert isinstance(info.value, OSError)
    assert "\n" not in str(info.value)
    assert read_json(tmp_path / "a.json") == 1
    assert os.listdir(tmp_path) == ["a.json"]


def test_names_that_cannot_be_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for name, words in (("n" * 300, "too long"), ("file/below.json", "is a file"), ("folder", "is a folder")):
        with pytest.raises(StorageError, match=words):
            write_json(tmp_path / name, 1)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_paths_that_nobody_meant_are_one_sentence(tmp_path: Path) -> None:
    for path, words in (
        ("", "path is empty"),
        ("a\0b", "null character"),
        (None, "not NoneType"),
        (b"x.json", "not bytes"),
        (3, "not int"),
    ):
        for use in (expanded, absolute, lambda p: write_json(p, 1)):
            with pytest.raises(InputError, match=words):
                use(path)  # type: ignore[arg-type]
    assert expanded("~/x") == Path.home() / "x"
    assert expanded(Path("a")) == Path("a")
    assert expanded("~no_such_user/x") == Path("~no_such_user/x"), "a file may be called so"


def test_no_file_is_written_into_a_folder_that_was_saved_whole(tmp_path: Path) -> None:
    with new_folder(tmp_path / "saved", "thing", keep=("run",)) as draft:
        write_json(draft / "a.json", 1)
    for inside in ("b.json", "a.json", "deep/b.json"):
        for write in (check_writable, lambda p: write_json(p, 2)):
            with pytest.raises(InputError, match="holds a thing and would no longer be as it was saved"):
                write(tmp_path / "saved" / inside)
    write_json(tmp_path / "saved" / "run" / "c.json", 3)
    assert open_folder(tmp_path / "saved", "thing")
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == ["a.json", "mmkit.json", "run"]


def test_whether_a_file_could_be_written_is_told_beforehand_and_nothing_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for name, words in (
        ("n" * 300, "too long"),
        ("file/a", "is a file"),
        ("file/a/b", "is a file"),
        ("folder", "folder of that name"),
    ):
        with pytest.raises(StorageError, match=words):
            check_writable(tmp_path / name)
    for name in ("file", "new", "new/deep/a.txt", "folder/a.txt"):
        assert check_writable(tmp_path / name) == tmp_path / name
    if os.path.isdir("/proc/self") and not os.access("/proc/self", os.W_OK):
        with pytest.raises(StorageError, match="no permission"):
            check_writable("/proc/self/a/b.txt")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="file size limits")
def test_a_full_disk_met_by_safetensors_is_the_same_error(tmp_path: Path) -> None:
    script = (
        "import resource, signal, sys, torch\n"
        "from mmkit.storage import write_safetensors\n"
        "from mmkit.errors import StorageError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n    write_safetensors(sys.argv[1], {'a': torch.zeros(9000)})\n"
        "except StorageError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "a.safetensors")], capture_output=True, text=True, check=True
    )
    assert "cannot be written" in done.stdout
    assert os.listdir(tmp_path) == []


def test_the_umask_of_the_process_is_never_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0o027)
    try:
        monkeypatch.setattr("os.umask", lambda mask: pytest.fail("umask belongs to the whole process"))
        write_json(tmp_path / "a.json", 1)
        write_safetensors(tmp_path / "a.safetensors", {"a": torch.zeros(2)})
    finally:
        monkeypatch.undo()
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {0o640}


def test_the_longest_name_that_the_system_takes_can_be_written(tmp_path: Path) -> None:
    name = "n" * 250 + ".json"
    write_json(tmp_path / name, 1)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.slow
def test_left_overs_of_killed_processes_are_cleaned_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from mmkit.storage.files import temporary_name\n"
        "Path(sys.argv[1], temporary_name()).touch(); Path(sys.argv[1], temporary_name(), 'deep').mkdir(parents=True)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)  # it ended without removing them
    dead, _ = sorted(temporaries(tmp_path), key=Path.is_dir)
    alive = tmp_path / temporary_name()
    alive.touch()
    (tmp_path / ".mmkit-other.tmp").touch()  # not one of ours
    clean(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([alive.name, ".mmkit-other.tmp"])
    assert not dead.exists()
    other = tmp_path / "other"
    other.mkdir()
    dead = other / dead.name
    dead.touch()
    write_json(other / "a.json", 1)  # the first write into a folder cleans it
    assert os.listdir(other) == ["a.json"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", 1)

    def interrupted() -> None:
        with atomic_write(tmp_path / "a.json") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert read_json(tmp_path / "a.json") == 1
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b"", b"[" * 100_000])
def test_damaged_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.json"):
        read_json(tmp_path / "a.json")
    with pytest.raises(CheckpointError, match="not a readable"):
        read_json(tmp_path)


@pytest.mark.parametrize("content", ['[{"name": "a"}]', "[1]", '[{"nam": "a"}]', "{", "null"])
def test_a_damaged_list_of_bundled_weights_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    from mmkit import weights

    (tmp_path / "manifest.json").write_text(content)
    monkeypatch.setattr(weights, "MANIFEST", tmp_path / "manifest.json")
    weights._manifest.cache_clear()
    try:
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            weights.list_weights()
    finally:
        monkeypatch.undo()
        weights._manifest.cache_clear()
