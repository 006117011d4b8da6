"""Video data sets: the formats people have, reproducible draws, broken files."""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from mmkit.errors import InputError
from mmkit.video import ClipTransform, UniformSampler, VideoClassificationDataset, VideoDecodeError

OPTIONS: dict[str, Any] = {"sampler": UniformSampler(4), "transform": ClipTransform(32), "short_side": 32}


@pytest.fixture
def folder(tmp_path: Path, clips: Any) -> Path:
    for split, count in (("train", 3), ("val", 1)):
        for label in ("run", "jump"):
            for i in range(count):
                (tmp_path / split / label).mkdir(parents=True, exist_ok=True)
                clips.make(tmp_path / split / label / f"{label} {i}.mp4", 12 + i)
    return tmp_path


def test_folder_per_class(folder: Path) -> None:
    data = VideoClassificationDataset.from_folder(folder, "train", **OPTIONS)
    assert data.class_names == ["jump", "run"]
    assert len(data) == 6
    clip, label = data[0]
    assert clip.shape == (4, 3, 32, 32)
    assert clip.dtype == torch.float32
    assert label == 0
    assert data[5][1] == 1
    with pytest.raises(InputError):
        VideoClassificationDataset.from_folder(folder / "train" / "run")
    with pytest.raises(InputError):
        VideoClassificationDataset.from_folder(folder / "nowhere")


def test_lists_and_tables(folder: Path, tmp_path: Path) -> None:
    rows = [("train/run/run 0.mp4", 1), ("train/jump/jump 1.mp4", 0), ("gone.mp4", 1)]
    file = tmp_path / "list.txt"
    for line in ("{} {}", "{},{}", "{} 12 {}"):
        file.write_text("# made by hand\n" + "\n".join(line.format(*r) for r in rows) + "\n")
        with pytest.warns(UserWarning, match="1 of 3 listed videos are missing"):
            data = VideoClassificationDataset.from_list(file, folder, **OPTIONS)
        assert [s.label for s in data.samples] == [1, 0]
        assert len(data.missing) == 1
    file.write_text("no label here\n")
    with pytest.raises(InputError, match="line 1"):
        VideoClassificationDataset.from_list(file, folder)
    table = tmp_path / "table.csv"
    table.write_text("path,label,start,end,split\ntrain/run/run 0.mp4,run,0.1,0.3,a\ntrain/jump/jump 0.mp4,jump,,,b\n")
    data = VideoClassificationDataset.from_csv(table, folder, class_names=["run", "jump"], **OPTIONS)
    assert [s.label for s in data.samples] == [0, 1]
    assert (data.samples[0].start, data.samples[0].end, data.samples[1].end) == (0.1, 0.3, None)
    assert data[0][0].shape == (4, 3, 32, 32)
    assert len(VideoClassificationDataset.from_csv(table, folder, split="b", **OPTIONS)) == 1
    with pytest.raises(InputError, match="lacks the columns"):
        VideoClassificationDataset.from_kinetics_csv(table, folder)
    with pytest.raises(InputError, match="None of the"):
        VideoClassificationDataset.from_samples([("x.mp4", 0)])


def test_kinetics_and_something_something(tmp_path: Path, clips: Any) -> None:
    clips.make(tmp_path / "abc_000001_000011.mp4", 6)
    (tmp_path / "k.csv").write_text(
        "label,youtube_id,time_start,time_end,split\nriding a bike,abc,1,11,val\nsurfing,def,3,13,val\n"
    )
    with pytest.warns(UserWarning, match="missing"):
        kinetics = VideoClassificationDataset.from_kinetics_csv(tmp_path / "k.csv", tmp_path, **OPTIONS)
    assert kinetics.class_names == ["riding a bike", "surfing"]
    assert len(kinetics) == 1
    clips.make(tmp_path / "7.webm", 6, codec="libvpx", options={"b": "500k"})
    labels = {"Pushing something": "1", "Moving something up": "0"}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    (tmp_path / "a.json").write_text(json.dumps([{"id": "7", "template": "Pushing [something]"}]))
    ssv2 = VideoClassificationDataset.from_ssv2_json(tmp_path / "a.json", tmp_path / "labels.json", tmp_path, **OPTIONS)
    assert ssv2.class_names == ["Moving something up", "Pushing something"]
    assert ssv2[0][1] == 1


def test_items_do_not_depend_on_workers_and_pickle(folder: Path) -> None:
    options = {**OPTIONS, "transform": ClipTransform(32, train=True), "train": True}
    data = VideoClassificationDataset.from_folder(folder, "train", **options)
    plain = torch.stack([data[i][0] for i in range(6)])
    assert torch.equal(plain, torch.stack([pickle.loads(pickle.dumps(data))[i][0] for i in range(6)]))
    loaded = torch.cat([x for x, _ in DataLoader(data, 2, num_workers=1, multiprocessing_context="fork")])
    assert torch.equal(plain, loaded)
    data.set_epoch(1)
    assert not torch.equal(plain, torch.stack([data[i][0] for i in range(6)]))


@pytest.mark.slow
def test_items_do_not_depend_on_spawned_workers(folder: Path) -> None:
    options = {**OPTIONS, "transform": ClipTransform(32, train=True), "train": True}
    data = VideoClassificationDataset.from_folder(folder, "train", **options)
    plain = torch.stack([data[i][0] for i in range(6)])
    loaded = torch.cat([x for x, _ in DataLoader(data, 2, num_workers=1, multiprocessing_context="spawn")])
    assert torch.equal(plain, loaded)


def test_views_come_clip_major(folder: Path) -> None:
    sampler = UniformSampler(4, clips=2)
    data = VideoClassificationDataset.from_folder(
        folder, "val", sampler=sampler, transform=ClipTransform(32, num_crops=3), short_side=None
    )
    views, _ = data[0]
    assert views.shape == (6, 4, 3, 32, 32)
    single = VideoClassificationDataset.from_folder(
        folder, "val", sampler=sampler, transform=ClipTransform(32), short_side=None
    )
    assert torch.equal(single[0][0], views[[1, 4]])  # the centre crop of either clip


def test_broken_videos_are_replaced_once_each_or_raise(folder: Path) -> None:
    for i in range(2):
        (folder / "train" / "run" / f"bad{i}.mp4").write_bytes(b"not a video")
    data = VideoClassificationDataset.from_folder(folder, "train", on_error="replace", **OPTIONS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert all(data[i][0].shape == (4, 3, 32, 32) for i in range(len(data)))
    assert len(data.broken) == 2
    assert sum("Using another video" in str(w.message) for w in caught) == 2
    strict = VideoClassificationDataset.from_folder(folder, "train", **OPTIONS)
    bad = [s.path.endswith("bad0.mp4") for s in strict.samples].index(True)
    with pytest.raises(VideoDecodeError, match="bad0"):
        strict[bad]
    with pytest.raises(InputError):
        VideoClassificationDataset.from_folder(folder, "train", on_error="ignore")
