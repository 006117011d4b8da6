"""The video-classification pipeline: a path in, labels and times out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mmkit
from mmkit.data.drawn.motion import BACKWARDS, MOTIONS, drawn_motion
from mmkit.data.drawn.sprites import motion_cases
from mmkit.errors import InputError
from mmkit.video import ClipTransform, UniformSampler, VideoClassifier, VideoDecodeError, read_frames, write_video
from mmkit.video.zeroi2v import right_answers


def tiny(**options: object) -> VideoClassifier:
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 4}
    settings = {"backbone_args": args, "zeroi2v": {}, "num_frames": 4, **options}
    model = VideoClassifier("timm:vit_tiny_patch16_224", 3, **settings)  # type: ignore[arg-type]
    torch.nn.init.normal_(model.head.weight, std=3.0)
    return model


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (100, 6, 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    return write_video(tmp_path / "clip.mp4", frames, fps=25)


def test_one_answer_equals_the_model_on_the_sampled_frames(clip: Path, tmp_path: Path) -> None:
    model = tiny(class_names=["a", "b", "c"]).eval()
    result = mmkit.pipeline("video-classification", model)(clip, top_k=2)
    frames = read_frames(clip, UniformSampler(4), size=32).tensor()
    with torch.no_grad():
        want = model(ClipTransform(32, model.mean, model.std)(frames)[0][None]).softmax(-1)[0]
    assert result.scores[0] == pytest.approx(want.max().item(), abs=1e-6)
    assert result.label == "abc"[int(want.argmax())]
    assert len(result.labels) == 2
    assert (result.num_frames, result.duration) == (100, pytest.approx(4.0))
    saved = json.loads(result.save(tmp_path / "r.json").read_text())
    assert saved["top"][0]["label"] == result.label
    assert result.plot().size == (900, 400)


def test_windows_cover_the_video_and_equal_single_reads(clip: Path) -> None:
    pipe = mmkit.pipeline("video-classification", tiny())
    result = pipe(clip, window=1.0, hop=0.5, num_crops=3)
    starts = [s["start"] for s in result.segments()]
    assert starts == pytest.approx([0, 0.5, 1, 1.5, 2, 2.5, 3], abs=0.021)
    assert result.segments()[-1]["end"] == pytest.approx(4.0)
    part = pipe(clip, window=1.0)
    assert np.allclose(pipe(clip, window=1.0, hop=1.0).windows[2].scores, part.windows[2].scores)
    assert not np.allclose(pipe(clip, window=1.0, backwards=True).windows[0].scores, part.windows[0].scores, atol=1e-7)


def test_model_folders_bad_files_and_bad_arguments(clip: Path, tmp_path: Path) -> None:
    model = tiny()
    model.merge().save_pretrained(tmp_path / "m")
    pipe = mmkit.pipeline("video-classification", tmp_path / "m")
    assert np.allclose(pipe(clip).scores, mmkit.pipeline("video-classification", model)(clip).scores)
    (tmp_path / "bad.mp4").write_text("no")
    with pytest.raises(VideoDecodeError, match=r"bad\.mp4"):
        pipe(tmp_path / "bad.mp4")
    for options in ({"top_k": 0}, {"window": 0}, {"window": 1.0, "hop": -1}, {"num_crops": 2}):
        with pytest.raises(InputError):
            pipe(clip, **options)
    with pytest.raises(InputError, match="VideoClassifier"):
        mmkit.pipeline("video-classification", torch.nn.Identity())(clip)


def test_one_frame_and_rate_aware_stride(tmp_path: Path) -> None:
    one = write_video(tmp_path / "one.mp4", np.zeros((1, 20, 30, 3), np.uint8))
    assert len(mmkit.pipeline("video-classification", tiny(stride=4))(one, window=2.0).windows) == 1


def test_comparing_forms() -> None:
    found = mmkit.pipeline("video-classification", tiny()).compare_merged(rounds=2)
    assert found["difference"] < 1e-4
    assert found["parameters"]["merged"] < found["parameters"]["unmerged"]
    with pytest.raises(InputError, match="merged already"):
        mmkit.pipeline("video-classification", tiny().merge()).compare_merged()


def test_the_bundled_default_sees_motion_and_its_reverse(tmp_path: Path) -> None:
    pipe = mmkit.pipeline("video-classification")
    generator = torch.Generator().manual_seed(5)
    clips, labels = drawn_motion(40, generator, size=32)
    with torch.no_grad():
        x = (clips - 0.5) / 0.25
        forwards, reverse = pipe.model(x).argmax(-1), pipe.model(x.flip(1)).argmax(-1)
    assert (forwards == labels).float().mean() >= 0.85
    assert (reverse == torch.tensor(BACKWARDS)[labels]).float().mean() >= 0.85
    large, _ = drawn_motion(1, generator, size=96, num_frames=16, label=1)
    path = write_video(tmp_path / "right.mp4", (large[0] * 255).byte().permute(0, 2, 3, 1).contiguous(), fps=8)
    assert pipe(path).label == MOTIONS[1]


def test_the_bundled_default_sees_dark_objects_slow_ones_and_panning() -> None:
    """Clips of another generator than the training's, over a drawn ground where no photograph is at hand."""
    model = mmkit.load_weights("video_motion")
    noise = np.random.default_rng(0).integers(0, 255, (12, 12, 3), dtype=np.uint8)
    photo = [Image.fromarray(noise).resize((200, 200), Image.Resampling.BICUBIC)]
    for name, least in (
        ("dark on bright", 0.8),
        ("bright on dark", 0.8),
        ("on a photograph", 0.6),
        ("whole photograph", 0.6),
    ):
        assert right_answers(model, motion_cases(name, 40, photo)).mean() >= least, name


def test_an_answer_from_a_damaged_video_says_so(data_dir):
    with pytest.warns(UserWarning, match=r"corrupted\.mp4 is damaged"):
        result = mmkit.pipeline("video-classification")(data_dir / "video_misc" / "corrupted.mp4")
    assert result.num_corrupt > 0
    assert "damaged" in result.damage
    sound = mmkit.pipeline("video-classification")(data_dir / "video_misc" / "demo.mp4")
    assert (sound.num_corrupt, sound.damage) == (0, "")
