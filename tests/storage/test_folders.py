"""Folders: whole or not at all, one kind, every digest checked, put back after a crash at any place."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mmkit.errors import CheckpointError, InputError, StorageError
from mmkit.storage import folders, new_folder, open_folder, write_json
from mmkit.storage.exports import write_program

WRITE = """
import os, signal, sys
from mmkit.storage import new_folder, write_json
target, value, stop = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
calls, real = 0, os.replace
def replace(*args):
    global calls
    calls += 1
    if calls == stop:
        os.kill(os.getpid(), signal.SIGKILL)
    real(*args)
os.replace = replace
with new_folder(target, "thing", {"value": value}, keep=("training",)) as draft:
    write_json(draft / "a.json", value)
    write_json(draft / "sub" / "b.json", value)
"""


def write(target: Path, value: int = 1, kind: str = "thing", **options: object) -> Path:
    with new_folder(target, kind, {"value": value}, **options) as draft:  # type: ignore[arg-type]
        write_json(draft / "a.json", value)
        write_json(draft / "sub" / "b.json", value)
    return target


def values(target: Path) -> set[int]:
    manifest = open_folder(target, "thing")
    assert manifest is not None
    return {manifest["value"], *(json.loads((target / n).read_text()) for n in ("a.json", "sub/b.json"))}


def test_a_folder_says_what_it_holds_with_a_digest_of_every_file(tmp_path: Path) -> None:
    manifest = open_folder(write(tmp_path / "out"))
    assert manifest is not None
    assert (manifest["kind"], manifest["value"]) == ("thing", 1)
    assert sorted(manifest["files"]) == ["a.json", "sub/b.json"]
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_of_the_same_kind_is_replaced_whole(tmp_path: Path) -> None:
    target = write(tmp_path / "out")
    with new_folder(target, "thing") as draft:
        write_json(draft / "c.json", 2)
        assert values(target) == {1}  # untouched until the new one is complete
    assert sorted(os.listdir(target)) == ["c.json", "mmkit.json"]


def test_what_is_kept_moves_along(tmp_path: Path) -> None:
    target = tmp_path / "out"
    (target / "training").mkdir(parents=True)
    (target / "training" / "state.json").write_text("1")
    for value in (1, 2):
        write(target, value, keep=("training",))
        assert values(target) == {value}
        assert (target / "training" / "state.json").read_text() == "1"


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kill -9")
@pytest.mark.parametrize("stop", range(1, 7))
def test_kill_9_before_any_rename_leaves_one_whole_folder(tmp_path: Path, stop: int) -> None:
    """The renames are: three files into the draft, the old folder aside, the new one in, what is kept into it."""
    target = tmp_path / "out"
    write(target, 1)
    (target / "training").mkdir()
    (target / "training" / "state.json").write_text("1")
    done = subprocess.run([sys.executable, "-c", WRITE, str(target), "2", str(stop)], check=False)
    assert done.returncode == -signal.SIGKILL
    if stop == 5:
        assert not target.exists()  # the worst place: the old one aside, the new one not in yet
    if stop < 6:
        manifest = json.loads((target / "mmkit.json").read_text()) if target.exists() else {"value": 1}
        assert manifest["value"] == 1
    from mmkit.storage.folders import recover

    recover(target)
    assert (target / "training" / "state.json").read_text() == "1"
    if stop == 6:
        assert values(target) == {2}
    else:
        (target / "training" / "state.json").unlink()
        (target / "training").rmdir()
        assert values(target) == {1}
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("stop", range(1, 6))
def test_a_refused_rename_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    target, calls, real = write(tmp_path / "out"), iter(range(1, 100)), os.replace

    def replace(*args: str) -> None:
        if next(calls) == stop:
            raise OSError(28, "No space left on device")
        real(*args)

    monkeypatch.setattr("os.replace", replace)
    with pytest.raises(StorageError, match="disk is full"):
        write(target, 2)
    assert values(target) == {1}
    assert os.listdir(tmp_path) == ["out"]


def test_strangers_and_other_kinds_are_refused_by_name(tmp_path: Path) -> None:
    target = write(tmp_path / "out")
    with pytest.raises(InputError, match="holds a thing, not an adapter"):
        write(target, kind="adapter")
    write(target, kind="thing", replaces=("adapter",))
    (target / "photo.jpg").write_text("x")
    with pytest.raises(InputError, match=r"photo\.jpg"):
        write(target)
    with pytest.raises(CheckpointError, match=r"not written with it: photo\.jpg"):
        open_folder(target)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").write_text("x")
    with pytest.raises(InputError, match=r"me\.jpg"):
        write(tmp_path / "photos")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        write(tmp_path / "file")
    assert sorted(os.listdir(tmp_path)) == ["file", "out", "photos"]


def test_a_reader_compares_every_file(tmp_path: Path) -> None:
    target = write(tmp_path / "out")
    with pytest.raises(CheckpointError, match="holds a thing; expected an adapter or a backbone"):
        open_folder(target, ("adapter", "backbone"))
    (target / "README.md").write_text("about it")
    (target / ".DS_Store").write_text("x")
    open_folder(target, "thing")
    (target / "sub" / "b.json").write_text("3")
    with pytest.raises(CheckpointError, match=r"changed: sub/b\.json"):
        open_folder(target)
    (target / "sub" / "b.json").unlink()
    with pytest.raises(CheckpointError, match=r"missing: sub/b\.json"):
        open_folder(target)
    (target / "mmkit.json").write_text('{"kind": "thing", "files": {}, "format": 99}')
    with pytest.raises(CheckpointError, match="Upgrade"):
        open_folder(target)
    for damaged in ("{", "[]", '{"kind": 1}', '{"kind": "thing"}', '{"kind": "thing", "files": {}}'):
        (target / "mmkit.json").write_text(damaged)
        with pytest.raises(CheckpointError, match=r"mmkit\.json"):
            open_folder(target)


def test_a_folder_that_is_replaced_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "out", 1)
    real, replaced = folders.sha256_file, iter([2])

    def digest(path: Path) -> str:
        if path.name != "mmkit.json" and ".tmp" not in str(path) and (value := next(replaced, None)):
            write(tmp_path / "out", value)
        return real(path)

    monkeypatch.setattr(folders, "sha256_file", digest)
    manifest = open_folder(tmp_path / "out", "thing")
    assert manifest is not None
    assert manifest["value"] == 2


def test_folders_of_others_have_no_manifest(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert open_folder(tmp_path, required=False) is None
    with pytest.raises(CheckpointError, match="does not exist"):
        open_folder(tmp_path)


def test_writers_called_on_a_draft_add_to_it(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out", "thing") as draft:
        write(draft, 5)
        write(draft / "inner", 6, kind="backbone")
    assert values(tmp_path / "out") == {5}
    assert open_folder(tmp_path / "out" / "inner", "backbone")["value"] == 6  # type: ignore[index]
    assert "inner/mmkit.json" in open_folder(tmp_path / "out")["files"]  # type: ignore[index]
    assert os.listdir(tmp_path) == ["out"]


def test_the_working_directory_is_not_pulled_from_under_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="working directory"):
        write(Path("."))
    write(Path("out"))
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(InputError, match="working directory"):
        write(tmp_path / "out")


@pytest.mark.parametrize("change", [{"files": 3}, {"kind": ["x"]}, {"kept": 3}])
def test_a_manifest_someone_edited_is_told(tmp_path: Path, change: dict[str, object]) -> None:
    with new_folder(tmp_path / "a", "thing") as draft:
        write_json(draft / "a.json", 1)
    manifest = json.loads((tmp_path / "a/mmkit.json").read_text())
    (tmp_path / "a/mmkit.json").write_text(json.dumps(manifest | change))
    with pytest.raises(CheckpointError, match=r"mmkit\.json"):
        open_folder(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"mmkit\.json"), new_folder(tmp_path / "a", "thing"):
        pass


def test_names_no_path_can_have_are_told_and_every_other_is_taken(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="null character"), new_folder(f"{tmp_path}/a\0b", "thing"):
        pass
    with pytest.raises(InputError, match="is not a folder"):
        open_folder(tmp_path / ("n" * 300))
    with new_folder(f"{tmp_path}/a\udcff", "thing") as draft:  # a name that is no UTF-8
        write_json(draft / "a.json", 1)
    assert open_folder(f"{tmp_path}/a\udcff", "thing")


def test_a_run_that_changes_its_files_meanwhile_is_no_stranger(tmp_path: Path, monkeypatch) -> None:
    """Each listing finds the checkpoint of another step: what is kept must be told from the same listing."""
    step, real = iter(range(100)), folders._files

    def files(folder):
        for old in folder.glob("training/step_*"):
            old.rename(old.with_name(f"step_{next(step)}"))
        return real(folder)

    (tmp_path / "out" / "training").mkdir(parents=True)
    (tmp_path / "out" / "training" / "step_x").write_text("weights")
    monkeypatch.setattr(folders, "_files", files)
    with new_folder(tmp_path / "out", "thing", keep=("training",)) as draft:
        write_json(draft / "a.json", 1)
    assert open_folder(tmp_path / "out", "thing")


def test_nothing_is_written_into_what_was_saved_whole(tmp_path: Path) -> None:
    saved = write(tmp_path / "saved")
    for inside in (saved / "new", saved / "sub" / "new"):
        with pytest.raises(InputError, match="Choose a place beside it"):
            write(inside)
        with pytest.raises(InputError, match="Choose a place beside it"):
            folders.check_no_saved(inside)
    with pytest.raises(InputError, match="Choose a place beside it"):
        write_program(nn.Linear(3, 2), [torch.randn(2, 3)], saved / "model.pt2")
    assert open_folder(saved)
    kept = write(tmp_path / "run", keep=("training",))
    assert open_folder(write(kept / "training" / "best"))
    assert open_folder(kept)
