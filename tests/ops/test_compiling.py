"""Kernels that another process compiles first."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

from mmkit.ops import compiling


def test_kernels_compiled_ahead_are_waited_for(tmp_path, monkeypatch):
    other = tmp_path / "python"
    other.write_text(f'#!/bin/sh\nwhile [ ! -e "{tmp_path}/go" ]; do sleep 0.01; done\necho points\nexit 1\n')
    other.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(other))
    monkeypatch.setattr(compiling, "_ahead", {})
    monkeypatch.setattr(compiling.importlib, "import_module", lambda name: name)
    compiling.compile_ahead()
    with ThreadPoolExecutor(1) as pool:
        kernels = pool.submit(compiling.cpu_kernels, "points")
        assert not compiling._ahead["points"].is_set()
        assert not kernels.done()
        (tmp_path / "go").touch()
        assert kernels.result(60) == "mmkit.ops.points.cpu"
    assert compiling.cpu_kernels("gaussian") == "mmkit.ops.gaussian.cpu"  # compiled here: the other process has failed
