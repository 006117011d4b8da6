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
        ("squeezesam-photo", (weight_entry("squeezesam-photo").summary, readme())),
        ("random walker", (readme(),)),
    ):
        row = rows[f"coco test objects: {name}"]
        shares = [f"{100 * row[key] / row['objects']:.0f} %" for key in ("NoF@85", "NoF@90")]
        assert all(share in text for share in shares for text in texts)
        assert all(f"Of {row['objects']} everyday objects" in text for text in texts)


def test_grabcut_stands_beside_the_click_model() -> None:
    rows = results("interactive_grabcut")["rows"]
    one = {name: f"{100 * row['mIoU@1']:.0f}" for name, row in rows.items()}
    ours = [f"{one[f'{kind}: squeezesam-photo']} % with" for kind in ("coco test objects", "pets test")]
    theirs = " and ".join([one["coco test objects: GrabCut"], one["pets test: GrabCut"]])
    for text in (weight_entry("squeezesam-photo").summary, readme()):
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


def test_the_ways_to_adapt_a_diffusion_model_stand_as_measured() -> None:
    table = (RESULTS / "difffit.md").read_text(encoding="utf-8").split("## In short")[1].split("##")[0]
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len(lines) > 5
    assert all(line in (ROOT / "README.md").read_text(encoding="utf-8") for line in lines)
    longer = results("difffit_150")["rows"]["washed out"]["DiffFit"]["gap"]
    assert f"In 150 steps DiffFit closes {100 * longer:.0f} % of the gap of the washed-out style" in readme()


def test_what_slam_reaches_is_what_was_measured() -> None:
    rows = results("slam")
    room, scenes, alone = (
        rows[name]
        for name in (
            "drawn room: cpu_small",
            "7-Scenes, 120 frames: cpu_small",
            "7-Scenes, 120 frames: small_gicp alone",
        )
    )
    said = (
        f"is off by {100 * room['ate_rmse']:.2f} cm, at {room['psnr']:.1f} dB and a mIoU of {room['miou']:.2f}, in "
        f"{room['cpu_seconds']:.0f} CPU seconds; on 120 frames of 7-Scenes by {100 * scenes['ate_rmse']:.1f} cm, where small_gicp alone is "
        f"off by {100 * alone['ate_rmse']:.1f};"
    )
    assert said in readme()
    assert rows["640 x 480: cpu_live"]["tracking_fps"] > 30
