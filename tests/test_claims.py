"""What the texts say of the bundled weights is what the benchmarks measured."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmkit.cli import app
from mmkit.storage import sha256_file
from mmkit.weights import FOLDER, list_weights, weight_entry

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"


def results(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def readme() -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return " ".join(re.sub(r"<!-- (=.*?|/) -->", "", text, flags=re.S).split())


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


def test_the_click_model_without_share_alike_pictures_says_what_it_can_do() -> None:
    name = "clicknet-permissive"
    rows, entry = results(f"interactive_quality_{name}")["rows"], weight_entry(name)
    one = {kind: f"{100 * rows[f'{kind}: {name}']['mIoU@1']:.0f} % with" for kind in ("coco test objects", "pets test")}
    for text in (entry.summary, readme().split(f"- **`{name}`**")[1].split("- **")[0]):
        assert all(said in text for said in one.values())
    assert entry.license == "Apache-2.0"
    assert "CC-BY-SA" not in entry.data
    assert "--permissive" in entry.command


def test_the_click_models_are_recorded_with_the_recipes_of_their_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    recipes = importlib.import_module("train_clicknet").RECIPES
    assert set(recipes) == {name for name in list_weights() if name.startswith("clicknet")}
    for name, recipe in recipes.items():
        entry = weight_entry(name)
        assert (entry.command, entry.data, entry.license) == (recipe.command(name), recipe.data, recipe.license)


def test_grabcut_stands_beside_the_click_model() -> None:
    rows = results("interactive_grabcut")["rows"]
    one = {name: f"{100 * row['mIoU@1']:.0f}" for name, row in rows.items()}
    ours = [f"{one[f'{kind}: clicknet-photo']} % with" for kind in ("coco test objects", "pets test")]
    theirs = " and ".join([one["coco test objects: GrabCut"], one["pets test: GrabCut"]])
    for text in (weight_entry("clicknet-photo").summary, readme()):
        assert all(share in text for share in ours)
        assert theirs in text.replace(" % and", " and")


def test_the_warning_of_the_nuclei_models_stands_as_measured() -> None:
    warned = {name: row["warned of"] for name, row in results("medical")["bundled"]["warning"].items()}
    assert warned.pop("nuclei test pictures") <= 0.05
    assert min(warned.values()) >= 0.95
    assert f"{100 * min(warned.values()):.0f} to {100 * max(warned.values()):.0f} % of photographs" in readme()


def test_the_motion_default_says_what_it_cannot_do() -> None:
    assert (
        "Several objects that go different ways and actions are out of its reach"
        in weight_entry("video_motion").summary
    )


def test_every_bundled_file_stands_in_the_table_as_it_is() -> None:
    rows = results("defaults")["rows"]
    assert {row["weights"] for row in rows} == set(list_weights())
    for row in rows:
        entry = weight_entry(row["weights"])
        assert row["sha256"] == entry.sha256 == sha256_file(entry.path), row["weights"]
        assert row["mb"] == round(entry.path.stat().st_size / 1e6, 2)
        assert row["range"][0] <= row["score"] <= row["range"][1] + 1e-9
        assert row["n"] > 0
        assert row["baseline"]
    files = list(FOLDER.glob("*.safetensors"))
    assert {file.stem for file in files} == set(list_weights())
    assert sum(file.stat().st_size for file in files) < 40e6


def test_the_table_says_what_the_scripts_measured() -> None:
    """The manifest's scores, measured when a file was made, beside those of the table, which were measured again."""
    found = {(row["weights"], row["data"]): row["score"] for row in results("defaults")["rows"]}
    for name in ("unet_nuclei", "lightm_unet_nuclei"):
        assert found[name, "nuclei"] == pytest.approx(weight_entry(name).score["dice"], abs=2e-3)
    parts = weight_entry("unet_hippocampus").score.values()
    assert found["unet_hippocampus", "hippocampus MRI, 2 parts"] == pytest.approx(sum(parts) / 2, abs=2e-3)
    for key, score in weight_entry("video_motion").score.items():
        if "backwards" not in key:
            assert found["video_motion", f"clips: {key}"] == pytest.approx(score, abs=0.01)


def test_every_command_of_the_manifest_was_run_a_second_time() -> None:
    found = results("reproduce")
    assert set(found) == set(list_weights())
    for name, row in found.items():
        assert row["score of the bundled file"] == weight_entry(name).score, name
        assert row["same"] == (row["difference"] == 0), name
        assert set(row["score of the bundled file"]) <= set(row["score"]), name


def test_every_license_that_is_not_apache_is_said_in_the_readme_and_all_in_the_list() -> None:
    told = readme().split("## License")[1]
    licenses = {name: weight_entry(name).license for name in list_weights()}
    others = {name: said.split(" ")[0] for name, said in licenses.items() if not said.startswith("Apache-2.0")}
    assert all(f"`{name}`" in told and said in told for name, said in others.items())
    listed = CliRunner().invoke(app, ["list", "weights"]).output
    assert all(f"License: {said}" in listed for said in licenses.values())
