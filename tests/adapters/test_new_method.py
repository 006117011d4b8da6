"""The guide's promise: a new method of the SSF kind is one file, one registry line, one contract row."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with an installed package whose only file is the guide's example, known by one entry point."""
    (source,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/guides/new_adapter.md").read_text(encoding="utf-8"), re.S
    )
    site = tmp_path / "site"
    site.mkdir()
    (site / "gain.py").write_text(source, encoding="utf-8")
    info = site / "gain-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gain\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mmkit.adapters]\ngain = gain:Gain\n")
    return site


def _run(package: Path, *command: str, cwd: Path) -> str:
    path = os.pathsep.join([str(package), *filter(None, [os.environ.get("PYTHONPATH")])])
    out = subprocess.run(
        [sys.executable, *command], cwd=cwd, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert out.returncode == 0, out.stdout[-3000:] + out.stderr[-2000:]
    return out.stdout


@pytest.mark.slow
def test_a_method_of_another_package_is_listed_and_found_by_name(package: Path, tmp_path: Path) -> None:
    code = (
        "import mmkit, torch; model = mmkit.create_backbone('tiny_vit', num_classes=3); x = torch.randn(2, 3, 32, 32)\n"
        "assert 'gain' in mmkit.list_adapters(); before = model.eval()(x)\n"
        "adapter = mmkit.apply_adapter(model, 'gain'); assert torch.equal(model(x), before)\n"
        "print(len(adapter.site_paths))"
    )
    assert int(_run(package, "-c", code, cwd=tmp_path)) > 4


@pytest.mark.slow
def test_with_one_row_it_passes_the_whole_contract(package: Path, tmp_path: Path) -> None:
    tests = tmp_path / "tests"
    tests.mkdir()
    rows = (ROOT / "tests" / "adapters" / "contract.py").read_text(encoding="utf-8")
    changed = rows.replace("ROWS = [", 'ROWS = [\n    Row("gain", families=("vit", "clip")),', 1)
    assert changed != rows
    (tests / "contract.py").write_text(changed, encoding="utf-8")
    for name in ("adapters/test_contract.py", "adapters/denoisers.py", "conftest.py"):
        (tests / Path(name).name).write_text((ROOT / "tests" / name).read_text(encoding="utf-8"), encoding="utf-8")
    options = ("-q", "-k", "gain", "-p", "no:cacheprovider", "--rootdir", str(tests), "-m", "slow or not slow")
    out = _run(package, "-m", "pytest", *options, str(tests), cwd=tests)
    assert int(re.search(r"(\d+) passed", out)[1]) > 12  # type: ignore[index]
