"""Video data sets: the formats people have, reproducible draws, broken files."""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
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


# --- as people keep them


def empty_videos(root: Path, *names: str) -> Path:
    """Files with the right names; nothing is decoded when a data set is made."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def test_numeric_labels_keep_their_number_from_every_source(tmp_path: Path) -> None:
    rows = [(str(empty_videos(tmp_path, "v.mp4") / "v.mp4"), k) for k in range(12)]
    (tmp_path / "l.csv").write_text("path,label\n" + "".join(f"{p},{k}\n" for p, k in rows))
    (tmp_path / "k.csv").write_text(
        "label,youtube_id,time_start,time_end\n" + "".join(f"{k},v,0,1\n" for k in range(12))
    )
    empty_videos(tmp_path, "v_000000_000001.mp4", *(f"set/{k}/v.mp4" for k in range(12)))
    (tmp_path / "l.txt").write_text("".join(f"{p} {k}\n" for p, k in rows))
    V = VideoClassificationDataset
    for data in (
        V.from_samples(rows),
        V.from_samples([(p, str(k)) for p, k in rows]),
        V.from_csv(tmp_path / "l.csv"),
        V.from_list(tmp_path / "l.txt"),
        V.from_kinetics_csv(tmp_path / "k.csv", tmp_path),
        V.from_folder(tmp_path / "set"),
    ):
        assert [s.label for s in data.samples] == list(range(12))
        assert data.class_names == [str(k) for k in range(12)]
    (tmp_path / "l.csv").write_text(f"path,label\n{rows[0][0]},5\n{rows[0][0]},3\n")
    assert [s.label for s in V.from_csv(tmp_path / "l.csv").samples] == [5, 3]


def test_splits_of_a_folder_share_their_classes(tmp_path: Path) -> None:
    root = empty_videos(
        tmp_path, "training/run/1.mp4", "training/jump/1.mp4", "validation_set/run/1.mp4", "extra/x.mp4", "docs/a.txt"
    )
    with pytest.warns(UserWarning, match=r"'docs' holds no videos.*'extra' holds 1 videos in no split"):
        val = VideoClassificationDataset.from_folder(root, "val")
    assert (val.class_names, [s.label for s in val.samples]) == (["jump", "run"], [1])
    with pytest.raises(InputError, match="has the splits"):
        VideoClassificationDataset.from_folder(root)
    with pytest.raises(InputError, match="split='test' was asked for"):
        VideoClassificationDataset.from_folder(root, "test")


def test_hidden_files_never_count_and_order_is_natural(tmp_path: Path) -> None:
    root = empty_videos(tmp_path, "a/10.mp4", "a/9.mp4", "b/1.mp4", "a/._9.mp4", "a/@eaDir/9.mp4", ".trash/a/1.mp4")
    data = VideoClassificationDataset.from_folder(root)
    assert [Path(s.path).name for s in data.samples] == ["9.mp4", "10.mp4", "1.mp4"]


def test_folders_of_frames_are_videos(tmp_path: Path) -> None:
    for label in ("run", "jump"):
        for clip in (10, 2):
            for i in (1, 2, 10):
                (tmp_path / label / f"clip{clip}").mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (40, 40), (i, clip, 0)).save(tmp_path / label / f"clip{clip}" / f"{i}.png")
    data = VideoClassificationDataset.from_folder(tmp_path, **OPTIONS)
    assert [(Path(s.path).name, s.label) for s in data.samples] == [
        ("clip2", 0),
        ("clip10", 0),
        ("clip2", 1),
        ("clip10", 1),
    ]
    assert data[0][0].shape == (4, 3, 32, 32)


@pytest.mark.parametrize(
    "text",
    ["path,label,start\nv.mp4,a,soon\n", "path,label,end\nv.mp4,a,nan\n", "path,label\nv.mp4,999999999\n", "\0", ""],
)
def test_damaged_tables_are_input_errors(tmp_path: Path, text: str) -> None:
    (tmp_path / "l.csv").write_text(text)
    empty_videos(tmp_path, "v.mp4")
    with pytest.raises(InputError):
        VideoClassificationDataset.from_csv(tmp_path / "l.csv", tmp_path)


@pytest.mark.parametrize(
    "labels,items",
    [
        ("{}", "{}"),
        ('{"a": "x"}', "[]"),
        ('{"a": "3"}', "[]"),
        ('{"a": "0"}', "[1]"),
        ('{"a": "0"}', '[{"id": 1}]'),
        ("[" * 99999, ""),
    ],
)
def test_damaged_annotations_are_input_errors(tmp_path: Path, labels: str, items: str) -> None:
    (tmp_path / "labels.json").write_text(labels)
    (tmp_path / "items.json").write_text(items)
    with pytest.raises(InputError):
        VideoClassificationDataset.from_ssv2_json(tmp_path / "items.json", tmp_path / "labels.json", tmp_path)


def test_a_list_with_an_endless_line_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_text("a" + " " * 100_000 + "b\n")
    with pytest.raises(InputError, match="expected 'path label'"):
        VideoClassificationDataset.from_list(tmp_path / "l.txt")


def test_strips_are_not_resized_to_gigabytes() -> None:
    with pytest.raises(InputError, match="million pixels"):
        ClipTransform(224)(torch.zeros(2, 3, 1, 10_000, dtype=torch.uint8))
