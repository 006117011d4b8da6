"""The Fine-tune lab without a browser: plan, train, stop, sessions, endpoints, and bad zips."""

from __future__ import annotations

import html
import re
import threading
import time
import zipfile
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
from gradio_client import Client, handle_file
from PIL import Image

import mmkit
from mmkit.apps import finetune as lab, finetune_view as view, finetune_work as work
from mmkit.errors import InputError

TINY = "Tiny ViT, 32 px, pre-trained (comes with mmkit)"


@pytest.fixture
def visitor():
    visitors = []

    def make():
        visitors.append(SimpleNamespace(session_hash=f"test-{len(visitors)}-{time.monotonic_ns()}"))
        return visitors[-1]

    yield make
    for one in visitors:
        work.forget(one)


@pytest.fixture
def pictures(tmp_path):
    """A zip with two easy classes, 8 pictures each."""
    rng = np.random.default_rng(0)
    path = tmp_path / "pictures.zip"
    with zipfile.ZipFile(path, "w") as target:
        for name, level in (("dark <b>", 40), ("light", 200)):
            for i in range(8):
                noise = rng.integers(-30, 30, (24, 24, 3)) + level
                Image.fromarray(noise.astype(np.uint8)).save(tmp_path / "one.png")
                target.write(tmp_path / "one.png", f"{name}/{i}.png")
    return path


def _train(visitor, archive, method="linear_probe", epochs=2, resume=False):
    source = work.UPLOAD if archive else work.DIGITS
    lab.begin(visitor)
    return list(lab.train(source, archive and str(archive), TINY, method, epochs, None, 8, 0, "Never", resume, visitor))


@pytest.mark.parametrize("method", list(lab.METHODS))
def test_plan_counts_what_the_adapter_trains(method):
    from mmkit.data import load_digits

    prepared = work.build_model(load_digits((0, 1)), "tiny_vit", method)
    sites = view.trained_sites(prepared)
    assert sum(n for _, n in sites) == prepared.trainable_parameters
    drawn = view.model_map(prepared)
    assert f"{prepared.trainable_parameters:,}" in view.plan_figures(prepared)
    assert ("frozen" in drawn) == (method != "full")


def test_random_backbones_build():
    from mmkit.data import load_digits

    for name, _ in work.BACKBONES.values():
        assert work.build_model(load_digits((0, 1)), name, "ssf").trainable_parameters > 0


@pytest.mark.slow
def test_train_try_merge_and_download(visitor, pictures, tmp_path):
    one, other = visitor(), visitor()
    status, *_, shown, download, runs, _, merge_button, _ = _train(one, pictures)[-1]
    assert "finished" in status
    assert "held-back pictures are right" in status
    assert len(shown) == 4
    assert merge_button["visible"]
    assert len(runs) == 1
    with zipfile.ZipFile(download["value"]) as saved:
        assert {
            "adapter_config.json",
            "adapter_model.safetensors",
            "report.json",
            "report.html",
            "run.toml",
            "mmkit.json",
        } == set(saved.namelist())
        saved.extractall(tmp_path / "adapter")
    picture = Image.new("RGB", (24, 24), (210, 205, 200))
    scores = lab.classify(picture, one)
    again = mmkit.pipeline("image-classification", tmp_path / "adapter")(picture)
    assert again.label == max(scores, key=scores.get)
    assert again.scores[0] == pytest.approx(max(scores.values()), abs=1e-5)
    text, merged = lab.merge(one)
    assert "on 4 of 4 pictures" in text
    with zipfile.ZipFile(merged["value"]) as saved:
        assert set(saved.namelist()) == {"config.json", "model.safetensors", "mmkit.json"}
    with pytest.raises(gr.Error, match="Nothing is trained yet"):
        lab.classify(picture, other)  # another visitor sees nothing of it
    assert lab.classify(None, other) is None


@pytest.mark.slow
def test_stop_ends_within_a_step_and_keeps_what_was_learned(visitor):
    one = visitor()
    lab.begin(one)
    steps = lab.train(work.DIGITS, None, TINY, "linear_probe", 50, None, 8, 0, "Never", False, one)
    while not re.search(r"step \d+ of 9000", next(steps)[0]):
        pass
    lab.stop_training(one)
    start = time.monotonic()
    status = list(steps)[-1][0]
    assert re.search("stopped after [1-9][0-9]* steps", status)
    assert time.monotonic() - start < 8  # saving and the merge check included
    assert not _training_threads()


@pytest.mark.slow
def test_leaving_the_page_ends_the_training(visitor):
    one = visitor()
    lab.begin(one)
    steps = lab.train(work.DIGITS, None, TINY, "linear_probe", 50, None, 8, 0, "Never", False, one)
    next(steps), next(steps)
    steps.close()
    assert not _training_threads()
    lab.stop_training(one)
    waiting = lab.train(work.DIGITS, None, TINY, "linear_probe", 50, None, 8, 0, "Never", False, one)
    assert "stopped after" in list(waiting)[-1][0]  # stopped while it was still waiting


@pytest.mark.slow
def test_the_last_run_can_be_continued_and_given_more_epochs(visitor, pictures):
    one = visitor()
    with pytest.raises(gr.Error, match="no run to continue"):
        _train(one, pictures, resume=True)
    first = _train(one, pictures, epochs=1)[-1][0]
    steps = int(re.search(r"after (\d+) steps", first)[1])
    assert f"after {3 * steps} steps" in _train(one, pictures, epochs=3, resume=True)[-1][0]
    with pytest.raises(gr.Error, match=r"The page holds a run that differs\. Adapter: .*untick"):
        _train(one, pictures, method="ssf", epochs=3, resume=True)
    assert f"after {steps} steps" in _train(one, pictures, epochs=1)[-1][0]


def _training_threads():
    return [t for t in threading.enumerate() if t.name == "mmkit-training"]


def test_sessions_are_bounded(visitor):
    first = visitor()
    stop = work.session_of(first).stop
    for _ in range(work.KEPT_SESSIONS):
        work.session_of(visitor())
    assert first.session_hash not in work.SESSIONS
    assert stop.is_set()


def _zip(path, names):
    with zipfile.ZipFile(path, "w") as target:
        for name in names:
            target.writestr(name, b"x")
    return path


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["../x/1.png", "b/1.png"], "points outside"),
        ([], "no pictures"),
        (["a/1.png", "b/1.png"], "cannot be read|unreadable|classes|pictures"),
        (["1.png"], "sub-folder"),
    ],
)
def test_bad_zips_are_explained_without_server_paths(visitor, tmp_path, names, message):
    archive = _zip(tmp_path / "bad.zip", names)
    summary, *_, button = lab.show_plan(work.UPLOAD, str(archive), TINY, "ssf", visitor())
    assert re.search(message, html.unescape(summary))
    assert not button["interactive"]
    assert str(tmp_path) not in summary
    assert "mmkit-studio" not in summary


def test_one_class_no_zip_and_no_upload(visitor, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    with zipfile.ZipFile(tmp_path / "one.zip", "w") as target:
        target.write(tmp_path / "1.png", "only/1.png")
        target.write(tmp_path / "1.png", "only/2.png")
    (tmp_path / "text.zip").write_text("no zip")
    for archive, message in (
        (tmp_path / "one.zip", "at least 2"),
        (tmp_path / "text.zip", "not a zip"),
        (None, "Upload"),
    ):
        summary = lab.show_plan(work.UPLOAD, archive and str(archive), TINY, "ssf", visitor())[0]
        assert message in summary


def test_unknown_names_are_refused():
    from mmkit.data import load_digits

    data = load_digits((0, 1))
    with pytest.raises(InputError, match="tiny_vit"):
        work.build_model(data, "tiny_vitt", "ssf")
    with pytest.raises(InputError, match="Unknown backbone"):
        work.build_model(data, "/etc", "ssf")
    with pytest.raises(InputError, match="ssf"):
        work.build_model(data, "tiny_vit", "sfs")


def test_headline_and_curve_tell_of_the_epoch_that_is_kept():
    points = [(1.0, 0.5), (2.0, 0.9), (3.0, 0.9), (4.0, 0.7)]
    chart = view.accuracy_curve([("1: SSF", points)], "my.zip")
    assert "<em>best 90.0 %</em>" in chart
    assert "my.zip" in chart
    assert view.best_epoch(points) == 1  # the first of the best, as the training keeps it
    ring = re.search(r'<circle cx="([\d.]+)"[^>]*r="6"', chart)
    line = re.search(r'd="M([^"]+)" fill="none"', chart)[1].split("L")
    assert line[1].split()[0] == ring[1]


def test_runs_on_other_pictures_have_a_chart_of_their_own(visitor, pictures, tmp_path):
    other = tmp_path / "other.zip"
    other.write_bytes(pictures.read_bytes())
    one = visitor()
    charts = [_train(one, archive, epochs=1)[-1][2] for archive in (pictures, other, pictures)]
    legends = [re.findall(r"</i>(\d): Linear probe", chart) for chart in charts]
    assert legends == [["1"], ["2"], ["1", "3"]]
    assert [row[1] for row in view.runs_table(work.session_of(one).runs)] == [
        "pictures.zip",
        "other.zip",
        "pictures.zip",
    ]


def test_automatic_takes_what_suits_the_pictures(visitor, tmp_path, pictures):
    photos = tmp_path / "photos.zip"
    with zipfile.ZipFile(photos, "w") as target:
        for name in ("a", "b"):
            for i in range(3):
                Image.new("RGB", (300, 200), (40 * i, 90, 20)).save(tmp_path / "one.jpg")
                target.write(tmp_path / "one.jpg", f"{name}/{i}.jpg")
    for archive, name in ((photos, "MobileNetV2"), (pictures, "Tiny ViT")):
        summary = lab.show_plan(work.UPLOAD, str(archive), work.AUTOMATIC, "ssf", visitor())[0]
        assert f"Automatic takes {name}" in summary


def test_names_from_a_zip_are_escaped():
    assert "<b>" not in view.strip([(Image.new("RGB", (4, 4)), "dark <b>")])


@pytest.mark.slow
def test_endpoints_need_no_session(launch, pictures, tmp_path):
    client = Client(launch(), verbose=False, download_files=str(tmp_path))
    plan = client.predict(backbone="tiny_vit", adapter="bitfit", api_name="/finetune_plan")
    assert plan["trainable_parameters"] < plan["total_parameters"] / 10
    report, adapter = client.predict(handle_file(pictures), "tiny_vit", "ssf", 2, 0, api_name="/finetune_train")
    assert report["stopped"] == "finished"
    assert report["class_names"] == ["dark <b>", "light"]
    assert "adapter_model.safetensors" in zipfile.ZipFile(adapter).namelist()
    with pytest.raises(Exception, match="Unknown adapter"):
        client.predict(backbone="tiny_vit", adapter="bitfitt", api_name="/finetune_plan")
    public = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert {name for name in public if "finetune" in name} == {"/finetune_plan", "/finetune_train"}
