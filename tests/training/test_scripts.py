"""Examples and benchmarks train with `fit`, as users are told to."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
OWN_LOOPS = {
    "fit_overhead.py",  # the loop that fit is compared with
    "erasure.py",  # an attack searches a word; nothing is trained that fit could save
}


def test_no_script_has_a_training_loop_of_its_own():
    scripts = [p for folder in ("examples", "benchmarks") for p in sorted((ROOT / folder).glob("*.py"))]
    own = [p.name for p in scripts if re.search(r"\boptimi[sz]er\.step\(\)", p.read_text(encoding="utf-8"))]
    assert set(own) == OWN_LOOPS
