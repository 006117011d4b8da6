"""What the texts say of the bundled weights is what the benchmarks measured."""

from __future__ import annotations

import json
from pathlib import Path

from mmkit.weights import weight_entry

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"


def results(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def readme() -> str:
    return " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def test_the_share_of_objects_out_of_reach_is_said() -> None:
    rows = results("interactive_quality")["rows"]
    for name, texts in (
        ("clicknet-photo", (weight_entry("clicknet-photo").summary, readme())),
        ("random walker", (readme(),)),
    ):
        row = rows[f"coco test objects: {name}"]
        shares = [f"{100 * row[key] / row['objects']:.0f} %" for key in ("NoF@85", "NoF@90")]
        assert all(share in text for share in shares for text in texts)
        assert all(f"Of {row['objects']} everyday objects" in text for text in texts)


def test_grabcut_stands_beside_the_click_model() -> None:
    rows = results("interactive_grabcut")["rows"]
    one = {name: f"{100 * row['mIoU@1']:.0f}" for name, row in rows.items()}
    ours = [f"{one[f'{kind}: clicknet-photo']} % with" for kind in ("coco test objects", "pets test")]
    theirs = " and ".join([one["coco test objects: GrabCut"], one["pets test: GrabCut"]])
    for text in (weight_entry("clicknet-photo").summary, readme()):
        assert all(share in text for share in ours)
        assert theirs in text.replace(" % and", " and")


def test_otsu_stands_beside_the_nuclei_model() -> None:
    found = results("medical")["bundled"]
    assert f"Dice {found['dice']:.3f} on {found['test']} test pictures" in readme()
    assert f"Otsu's threshold alone reaches {found['otsu_dice']:.3f}" in readme()
    warned = {name: row["warned of"] for name, row in found["warning"].items()}
    assert warned.pop("nuclei test pictures") <= 0.05
    assert min(warned.values()) >= 0.95
    assert f"{100 * min(warned.values()):.0f} to {100 * max(warned.values()):.0f} % of photographs" in readme()


def test_the_motion_default_says_what_it_cannot_do() -> None:
    summary = weight_entry("video_motion").summary
    assert "a bright object over darker, still ground" in summary
    assert "Pictures that move as a whole" in summary
    assert "over darker, still ground, not where a whole picture moves" in readme()
