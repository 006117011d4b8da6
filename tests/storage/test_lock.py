"""One run per folder: a living process is respected, a dead one is not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mmkit.errors import InputError, StorageError
from mmkit.storage import folder_lock, new_folder
from mmkit.storage.lock import LOCK

HOLD = """
import sys
from mmkit.storage import folder_lock
with folder_lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.slow
def test_a_folder_in_use_is_refused_and_taken_over_after_kill_9(tmp_path: Path) -> None:
    process = holder(tmp_path / "run")
    with (
        pytest.raises(InputError, match=rf"in use by another run \(process {process.pid} on "),
        folder_lock(tmp_path / "run"),
    ):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "run" / LOCK).exists()
    with folder_lock(tmp_path / "run"):
        pass
    assert not (tmp_path / "run" / LOCK).exists()


@pytest.mark.slow
def test_of_many_who_find_a_dead_lock_one_wins(tmp_path: Path) -> None:
    process = holder(tmp_path)
    process.kill()
    process.wait()
    script = HOLD.replace("sys.stdin.read()", "import time; time.sleep(1.5)")
    started = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(4)
    ]
    held = [b"held" in p.communicate()[0] for p in started]
    assert held.count(True) >= 1
    assert all(p.returncode == 0 for p, h in zip(started, held, strict=True) if h)


def test_a_lock_of_another_machine_names_the_file_to_delete(tmp_path: Path) -> None:
    owner = {"pid": 7, "host": "elsewhere", "boot": "another", "since": "2026-01-01 00:00:00"}
    (tmp_path / LOCK).write_text(json.dumps(owner))
    with pytest.raises(InputError, match=rf"process 7 on elsewhere.*delete .*{LOCK}"), folder_lock(tmp_path):
        pass
    (tmp_path / LOCK).unlink()
    with folder_lock(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "{", "[1]", "[" * 4096, '{"pid": 1}'])
def test_a_torn_lock_file_is_stale(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK).write_text(
        content if content != '{"pid": 1}' else json.dumps({"pid": 1, "host": os.uname().nodename})
    )
    with folder_lock(tmp_path):
        pass


def test_threads_exclude_each_other_and_one_thread_may_enter_again(tmp_path: Path) -> None:
    errors: list[Exception] = []

    def other() -> None:
        try:
            with folder_lock(tmp_path):
                pass
        except InputError as error:
            errors.append(error)

    with folder_lock(tmp_path), folder_lock(tmp_path):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert "another thread" in str(errors[0])


def test_a_lock_beside_a_folder_that_is_replaced_whole_stays(tmp_path: Path) -> None:
    with folder_lock(tmp_path / "new" / "thing", beside=True) as folder:
        for _ in range(2):
            with new_folder(folder, "thing") as draft:
                (draft / "a.txt").write_text("x")
        with pytest.raises(InputError, match="another thread"), ThreadPoolExecutor(1) as other:
            other.submit(lambda: folder_lock(folder, beside=True).__enter__()).result()
        assert os.listdir(folder.parent) != ["thing"]
    assert os.listdir(tmp_path / "new") == ["thing"]
    with folder_lock(tmp_path / "none" / "thing", beside=True):
        pass
    assert os.listdir(tmp_path) == ["new"]


def test_a_folder_made_for_nothing_is_removed(tmp_path: Path) -> None:
    with folder_lock(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="is a file"), folder_lock(tmp_path / "file"):
        pass
