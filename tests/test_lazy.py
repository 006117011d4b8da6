"""Large libraries that put another module in their place, as diffusers and transformers do."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from mmkit.lazy import library

SOURCE = """
import sys, time, types
time.sleep(0.3)
whole = types.ModuleType(__name__)
whole.__spec__, whole.name = __spec__, "whole"
sys.modules[__name__] = whole
"""


def test_threads_that_need_a_library_at_once_all_get_the_whole_one(tmp_path, monkeypatch):
    (tmp_path / "swapping.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(lambda _: library("swapping").name, range(4))) == ["whole"] * 4
    finally:
        sys.modules.pop("swapping", None)


def test_the_command_line_is_there_before_torch_is():
    """Ctrl-C while large libraries load ends in one line only if they load inside a command; and --help is quick."""
    code = (
        "import sys, mmkit.cli\n"
        "print([m for m in ('torch', 'timm', 'PIL', 'numpy', 'diffusers', 'gradio') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
