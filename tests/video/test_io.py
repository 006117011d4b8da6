"""Video files: the right frames, damaged files recovered or refused, bounded memory, no leaks."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from mmkit.errors import BackendUnavailableError, InputError
from mmkit.video import UniformSampler, VideoDecodeError, VideoReader, backends, check_videos, read_frames, write_video
from mmkit.video.encode import browser_copy

FORMATS = [
    ("a.mp4", {}),
    ("gop.mp4", {"options": {"g": "250", "bf": "3", "crf": "18"}}),
    ("short_gop.mp4", {"options": {"g": "8", "crf": "18"}}),
    ("a.mkv", {}),
    ("a.webm", {"codec": "libvpx", "options": {"b": "1M"}}),
    ("a.avi", {"codec": "mpeg4", "options": {"b": "2M"}}),
]


@pytest.mark.parametrize(("name", "options"), FORMATS)
def test_every_index_gives_its_own_frame(tmp_path: Path, clips: Any, name: str, options: dict[str, Any]) -> None:
    path = clips.make(tmp_path / name, 200, **options)
    with VideoReader(path) as reader:
        assert len(reader) == 200
        for indices in ([0, 59, 30, 30, 1], [199, 170, 100], list(range(0, 200, 7)), [150], [63, 64, 127, 128]):
            clip = reader.read(indices)
            assert clips.numbers(clip.frames) == indices
            assert clip.num_replaced == 0
            assert clip.seconds == pytest.approx(np.array(indices) / 25, abs=0.0011)


def test_stream_yields_distinct_frames_in_order(tmp_path: Path, clips: Any) -> None:
    with VideoReader(clips.make(tmp_path / "a.mp4")) as reader:
        found = {i: clips.numbers(f[None])[0] for i, f in reader.stream([40, 3, 3, 12])}
    assert list(found) == [3, 12, 40]
    assert all(k == v for k, v in found.items())


def test_variable_frame_rate_keeps_indices_and_times(tmp_path: Path, clips: Any) -> None:
    path, stamps = tmp_path / "vfr.mp4", [0, 1, 2, 10, 11, 30, 31, 60]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = 96, 48, "yuv420p"
        for stamp, array in zip(stamps, clips.numbered(8), strict=True):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame.pts, frame.time_base = stamp, Fraction(1, 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with VideoReader(path) as reader:
        assert reader.seconds == pytest.approx(np.array(stamps) / 30, abs=1e-3)
        assert clips.numbers(reader.read([7, 3, 5]).frames) == [7, 3, 5]
        assert [reader.index_at(t) for t in (0.0, 0.05, 0.5, 1.01, 99.0)] == [0, 1, 4, 5, 7]


def test_a_title_in_another_encoding_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "caf@"
        stream = container.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 32
        frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        for packet in (*stream.encode(frame), *stream.encode()):
            container.mux(packet)
    written = path.read_bytes()
    assert b"caf@" in written
    path.write_bytes(written.replace(b"caf@", b"caf\xe9"))  # Latin-1
    with VideoReader(path) as reader:
        assert len(reader) == 1


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_rotation_metadata_is_applied(tmp_path: Path, turn: int) -> None:
    frames = np.zeros((4, 64, 96, 3), np.uint8)
    frames[:, :20, :30] = 255  # bright top-left corner as stored
    plain = write_video(tmp_path / "plain.mp4", frames)
    path = tmp_path / "turned.mp4"
    path.write_bytes(_with_rotation(plain.read_bytes(), turn))
    with VideoReader(path) as reader:
        clip = reader.read([0, 3])
        assert (reader.height, reader.width) == clip.frames.shape[1:3] == ((96, 64) if turn != 180 else (64, 96))
        small = reader.read([0], size=32).frames
    expected = np.rot90(frames[0], {90: 1, 180: 2, 270: 3}[turn])  # display matrix: counter-clockwise
    assert np.abs(clip.frames[0].astype(int) - expected).mean() < 8
    assert small.shape[1:3] == ((48, 32) if turn != 180 else (32, 48))


def _with_rotation(data: bytes, turn: int) -> bytes:
    """Put a display matrix into the track header of an MP4."""
    cos, sin = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[turn]
    return _with_matrix(data, (cos, -sin, sin, cos))


def _with_matrix(data: bytes, directions: tuple[int, int, int, int]) -> bytes:
    """Where the stored x axis points on the screen, and the stored y axis."""
    at = data.index(b"tkhd") + 4 + 40
    xx, xy, yx, yy = (v << 16 for v in directions)
    values = [xx, xy, 0, yx, yy, 0, 0, 0, 1 << 30]
    return data[:at] + b"".join(int(v).to_bytes(4, "big", signed=True) for v in values) + data[at + 36 :]


@pytest.mark.parametrize(
    "directions", [(a, 0, 0, d) for a in (1, -1) for d in (1, -1)] + [(0, b, c, 0) for b in (1, -1) for c in (1, -1)]
)
def test_display_matrices_turn_and_mirror(tmp_path: Path, directions: tuple[int, int, int, int]) -> None:
    stored = np.zeros((4, 64, 96, 3), np.uint8)
    stored[:, :32, :48], stored[:, :32, 48:], stored[:, 32:, :48] = 60, 120, 180
    plain = write_video(tmp_path / "plain.mp4", stored)
    path = tmp_path / "placed.mp4"
    path.write_bytes(_with_matrix(plain.read_bytes(), directions))
    shown = read_frames(path, [0]).frames[0]
    xx, xy, yx, yy = directions
    for y in (10, 53):
        for x in (10, 85):  # the pixel as stored, around the centre, moved as the matrix says
            u, v = xx * (x - 48) + yx * (y - 32), xy * (x - 48) + yy * (y - 32)
            row, column = v + shown.shape[0] // 2, u + shown.shape[1] // 2
            assert abs(int(shown[row, column, 0]) - int(stored[0, y, x, 0])) < 12


# --- damaged files


def _cut(path: Path, share: float, name: str) -> Path:
    data = path.read_bytes()
    out = path.with_name(name)
    out.write_bytes(data[: int(len(data) * share)])
    return out


def _noisy(n: int = 120) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 255, (96, 160, 3), np.uint8)
    return np.stack([np.roll(base, i * 2, 1) for i in range(n)])


def test_cut_and_damaged_files_are_recovered_or_refused(tmp_path: Path) -> None:
    frames = _noisy()
    front = write_video(tmp_path / "front.mp4", frames, options={"crf": "28", "g": "30"})
    webm = write_video(tmp_path / "a.webm", frames, codec="libvpx", options={"b": "1M", "g": "30"})
    end = write_video(tmp_path / "end.mp4", frames, options={"crf": "28", "g": "30"}, faststart=False)
    middle = tmp_path / "middle.mp4"
    data = bytearray(end.read_bytes())
    rng = np.random.default_rng(1)
    for at in rng.integers(len(data) // 3, 2 * len(data) // 3, 300):
        data[at] ^= 0xFF
    middle.write_bytes(bytes(data))
    for path in (_cut(front, 0.5, "cut.mp4"), _cut(webm, 0.5, "cut.webm"), middle):
        started = time.monotonic()
        clip = read_frames(path, UniformSampler(16))
        assert clip.frames.shape == (16, 96, 160, 3)
        assert time.monotonic() - started < 5
    with VideoReader(middle) as reader:
        assert reader.read(range(len(reader))).num_corrupt > 0
    with VideoReader(middle, tolerance=0) as reader, pytest.raises(VideoDecodeError, match="damaged"):
        reader.read(range(len(reader)))
    with pytest.raises(VideoDecodeError, match=r"cut_end\.mp4"):
        VideoReader(_cut(end, 0.5, "cut_end.mp4"))


@pytest.mark.parametrize("share", [0.02, 0.2, 0.4, 0.6, 0.8, 0.95, 0.999])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_truncation_anywhere_never_crashes_or_returns_too_few(tmp_path: Path, share: float, suffix: str) -> None:
    whole = write_video(tmp_path / f"w{suffix}", _noisy(60), options={"crf": "28", "g": "20"})
    path = _cut(whole, share, f"cut{suffix}")
    try:
        clip = read_frames(path, UniformSampler(8), size=64)
    except VideoDecodeError:
        return  # the error's text is checked above
    assert clip.frames.shape == (8, 64, 107, 3)


def test_a_file_that_cannot_be_rewound_is_an_error_of_its_own(tmp_path: Path, clips: Any) -> None:
    class Stuck:
        """The container of a file whose index points nowhere."""

        def seek(self, *args: Any, **kwargs: Any) -> None:
            raise av.error.EOFError(1, "End of file")

        def close(self) -> None:
            pass

    reader = VideoReader(clips.make(tmp_path / "a.mp4", 10))
    reader.close()
    reader._container = Stuck()
    with reader, pytest.raises(VideoDecodeError, match="rewound"):
        reader.read([3])


def test_files_that_are_no_videos_are_named_in_one_error(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("hello\n" * 500)
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n")
    (tmp_path / "picture.mp4").write_bytes(b"\xff\xd8\xff\xe0" + b"\0" * 300)
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    (tmp_path / "folder").mkdir()
    for name in ("empty.mp4", "text.mp4", "list.m3u8", "picture.mp4", "sound.mp4", "missing.mp4", "folder"):
        with pytest.raises(VideoDecodeError, match=name):
            VideoReader(tmp_path / name)
    assert len(check_videos([tmp_path / "empty.mp4", tmp_path / "sound.mp4"])) == 2


def test_real_files_including_the_corrupted_one(data_dir: Path) -> None:
    for path in sorted((data_dir / "video_misc").iterdir()):
        clip = read_frames(path, UniformSampler(8), size=64)
        assert clip.frames.shape[0] == 8
        assert min(clip.frames.shape[1:3]) == 64
        assert clip.frames.std() > 5
        assert (clip.num_corrupt > 0) == (path.stem == "corrupted")
    with pytest.raises(VideoDecodeError):
        read_frames(data_dir / "video_misc" / "corrupted.mp4", UniformSampler(8), tolerance=0)


def test_a_damaged_stream_that_decodes_partly_says_so(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", _noisy(), options={"crf": "28", "g": "30"}, faststart=False)
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng(1)
    for at in rng.integers(len(data) // 3, 2 * len(data) // 3, 300):
        data[at] ^= 0xFF
    path.write_bytes(bytes(data))
    for take in (VideoReader.read, lambda reader, wanted: list(reader.stream(wanted))):
        with (
            VideoReader(path) as reader,
            pytest.warns(UserWarning, match=r"a\.mp4 is damaged.*packets or frames are bad"),
        ):
            take(reader, range(len(reader)))
        assert reader.num_corrupt > 0


def test_reading_the_same_damage_twice_counts_it_once(data_dir: Path) -> None:
    with VideoReader(data_dir / "video_misc" / "corrupted.mp4") as reader, pytest.warns(UserWarning, match="damaged"):
        assert reader.read(range(50)).num_corrupt == reader.read(range(50)).num_corrupt


def test_frame_folders_are_in_natural_order_without_hidden_files(tmp_path: Path) -> None:
    for i in (10, 9, 1, 2):
        Image.new("RGB", (8, 6), (i, i, i)).save(tmp_path / f"frame{i}.png")
    for hidden in ("._frame1.png", "@eaDir", ".thumbnails"):
        (tmp_path / hidden).mkdir()
    with VideoReader(tmp_path) as reader:
        assert reader.read(range(4)).frames[:, 0, 0, 0].tolist() == [1, 2, 9, 10]


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(VideoDecodeError, match="neither a file nor a folder"):
        VideoReader(tmp_path / "pipe.mp4")
    for name in ("a\0b.mp4", "x" * 5000, "~nobody-of-this-name/a.mp4"):
        with pytest.raises(InputError, match=r"does not exist|null character"):
            VideoReader(name)


def test_a_clip_too_large_for_memory_is_refused(tmp_path: Path, clips: Any) -> None:
    with VideoReader(clips.make(tmp_path / "a.mp4", 10)) as reader, pytest.raises(InputError, match="more than 8 GB"):
        reader.read([0] * 200, size=(4000, 8000))


@pytest.mark.parametrize(("name", "options"), FORMATS)
def test_a_file_that_browsers_do_not_play_gets_a_copy_that_they_do(
    tmp_path: Path, clips: Any, name: str, options: dict[str, Any]
) -> None:
    path = clips.make(tmp_path / name, 30, **options)
    copy = browser_copy(path, tmp_path / "copies")
    assert (copy == path) == (path.suffix in (".mp4", ".webm"))
    with VideoReader(copy) as reader:
        assert reader.codec in ("h264", "vp8")
        assert clips.numbers(reader.read(range(30)).frames) == list(range(30))


# --- odd input


def test_one_frame_odd_sizes_and_more_frames_than_there_are(tmp_path: Path, clips: Any) -> None:
    one = clips.make(tmp_path / "one.mp4", 1)
    assert read_frames(one, UniformSampler(8)).indices.tolist() == [0] * 8
    odd = write_video(tmp_path / "odd.mp4", np.full((3, 33, 55, 3), 90, np.uint8))
    assert read_frames(odd, [0, 1, 2]).frames.shape == (3, 32, 54, 3)
    with VideoReader(odd) as reader:
        for bad in ([3], [-1], [], [0.5]):
            with pytest.raises(InputError):
                reader.read(bad)
        with pytest.raises(InputError):
            reader.read([0], size=0)
    with pytest.raises(InputError, match="closed"):
        reader.read([0])


def test_a_folder_of_pictures_reads_like_a_video(tmp_path: Path, clips: Any) -> None:
    from PIL import Image

    for i, frame in enumerate(clips.numbered(5)):
        Image.fromarray(frame).save(tmp_path / f"img_{i:05d}.png")
    clip = read_frames(tmp_path, [4, 0, 2])
    assert clips.numbers(clip.frames) == [4, 0, 2]


def test_writing_leaves_nothing_behind_on_errors(tmp_path: Path) -> None:
    for frames in ([], np.zeros((2, 8, 8), np.uint8), np.zeros((2, 8, 8, 3), np.float32)):
        with pytest.raises(InputError):
            write_video(tmp_path / "x.mp4", frames)
    with pytest.raises(InputError):
        write_video(tmp_path / "x.xyz", np.zeros((2, 8, 8, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []


def test_backends_report_and_refuse(tmp_path: Path, clips: Any) -> None:
    path = clips.make(tmp_path / "a.mp4", 30)
    state = backends()
    assert state["pyav"] == "available"
    if state["torchcodec"] == "available":
        a, b = (read_frames(path, [1, 20, 7], backend=n).frames.astype(int) for n in ("pyav", "torchcodec"))
        assert np.abs(a - b).max() <= 1
    else:
        with pytest.raises(BackendUnavailableError, match="pip install torchcodec"):
            VideoReader(path, backend="torchcodec")
    with pytest.raises(InputError, match="unknown backend"):
        VideoReader(path, backend="decord")


# --- cost


def test_opening_many_times_leaks_no_files_threads_or_memory(tmp_path: Path, clips: Any) -> None:
    path = clips.make(tmp_path / "a.mp4", 10)

    def state() -> tuple[int, int, int]:
        files, threads = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return files, threads, pages * resource.getpagesize()

    for _ in range(30):
        read_frames(path, [0, 9])
    files, threads, memory = state()
    for _ in range(250):
        read_frames(path, [0, 9])
    after = state()
    assert after[0] <= files
    assert after[1] <= threads
    assert after[2] - memory < 30e6


@pytest.mark.slow
def test_large_frames_need_little_more_than_the_clip(tmp_path: Path) -> None:
    code = (
        "import resource, sys\n"
        "from mmkit.video import VideoReader\n"
        "import av, PIL.Image\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "r = VideoReader(sys.argv[1], threads=1); r.read([0], size=64); before = peak()\n"
        "clip = r.read(list(range(12)))\n"
        "print((peak() - before) / clip.frames.nbytes)\n"
    )
    frame = np.zeros((2160, 3840, 3), np.uint8)
    frame[::64] = 200
    path = write_video(tmp_path / "4k.mp4", (np.roll(frame, i, 0) for i in range(12)), options={"preset": "ultrafast"})
    result = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 1.5


@pytest.mark.parametrize("fps", [1e-4, 0.0015, 0.5, 29.97])
def test_slow_videos_have_the_frame_rate_that_was_asked_for(tmp_path: Path, fps: float) -> None:
    with VideoReader(write_video(tmp_path / "a.mp4", np.zeros((3, 16, 16, 3), np.uint8), fps=fps)) as reader:
        assert reader.fps == pytest.approx(fps)
        assert reader.seconds.tolist() == pytest.approx([0, 1 / fps, 2 / fps], rel=1e-3)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("a.mp4", {"fps": f}) for f in (float("inf"), float("nan"), 1e12, 1e-12, "a")]
    + [("a.mp4", {"codec": "nope"}), ("a.mp4", {"codec": "libvpx"}), ("a.webm", {}), ("a.mp4", {"frames": None})],
)
def test_what_cannot_be_written_is_an_error_of_ours(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        write_video(tmp_path / name, **{"frames": np.zeros((3, 16, 16, 3), np.uint8), **settings})
    assert not list(tmp_path.iterdir())


def test_damaged_pictures_at_the_start_of_a_folder_are_tolerated_like_others(tmp_path: Path, clips: Any) -> None:
    for i, frame in enumerate(clips.numbered(6)):
        Image.fromarray(frame).save(tmp_path / f"{i}.png")
    for i in (0, 1):
        (tmp_path / f"{i}.png").write_bytes(b"no picture")
    with VideoReader(tmp_path) as reader:
        with pytest.warns(UserWarning, match="2 of 4"):
            clip = reader.read([1, 0, 2, 3])
        assert clips.numbers(clip.frames) == [2, 2, 2, 3]
        assert clip.num_replaced == 2
        with pytest.raises(VideoDecodeError, match=r"0\.png"):
            reader.read([0, 1])
    with pytest.raises(VideoDecodeError, match=r"0\.png"):
        VideoReader(tmp_path, tolerance=0)
    for fps in (float("inf"), "a"):
        with pytest.raises(InputError, match="fps"):
            VideoReader(tmp_path, fps=fps)  # type: ignore[arg-type]
