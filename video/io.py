"""Reading and writing video files: any container people have, one sequential pass, bounded memory, clear errors.

PyAV decodes. `torchcodec` can be asked for by name where it is installed; both return the same frames for an index.
Public frame arrays are uint8 `(T, H, W, 3)`, RGB, upright (the display matrix applied: turned and mirrored).
"""

from __future__ import annotations

import bisect
import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from mmkit.data.images import SUFFIXES, load_image
from mmkit.data.listing import PathList, list_folder
from mmkit.errors import InputError
from mmkit.ops.backends import choose_backend
from mmkit.storage.files import expanded
from mmkit.video.frames import Clip, Placement, VideoDecodeError, check_fps, is_cover_art, resize, to_rgb

logger = logging.getLogger("mmkit.video")
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".flv", ".wmv", ".ogv", ".3gp")
# Only real video containers in one local file: FFmpeg would also "play" text, pictures and play lists that name URLs.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,asf,ogg,gif,h264,hevc,m4v,ivf,dv,mxf"
_OPEN_OPTIONS = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}
_NO_TIMESTAMPS = {"avi", "h264", "hevc", "m4v", "mpegvideo", "dv"}  # presentation times there are FFmpeg's guesses
MAX_PIXELS = 64_000_000
"""Largest frame that is decoded, in pixels."""
MAX_BYTES = 8_000_000_000
"""Largest clip that `read` returns."""
_SEEK_GAIN = 60  # frames that a seek must at least skip: a seek costs about one group of pictures


def _pyav_problem(device: torch.device) -> str | None:
    try:
        import av  # noqa: F401
    except ImportError as error:
        return f"{error}; pip install 'av>=14'"
    return None


def _torchcodec_problem(device: torch.device) -> str | None:
    try:
        import torchcodec.decoders  # noqa: F401
    except (
        ImportError,
        RuntimeError,
        OSError,
    ) as error:  # package, FFmpeg libraries, or a matching torch build missing
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return f"{first}; pip install torchcodec and install FFmpeg's shared libraries"
    return None


_PROBLEMS = {"pyav": _pyav_problem, "torchcodec": _torchcodec_problem}


def backends() -> dict[str, str]:
    """Decoder name -> "available" or why it cannot be used here."""
    return {name: problem(torch.device("cpu")) or "available" for name, problem in _PROBLEMS.items()}


def _opened(path: str) -> Any:
    """PyAV's container. Titles in another encoding than UTF-8 do not matter; PyAV 19 has no argument for that any more and reads on."""
    import av

    lenient: dict[str, Any] = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "ignore"}
    return av.open(path, options=dict(_OPEN_OPTIONS), **lenient)


class VideoReader:
    """Random access to the frames of one video by one forward pass, also when the file is damaged.

    Opening scans the packets without decoding them: the frame count is right for variable frame rates, for mkv and webm
    (whose headers have none) and for cut files. Use it as a context manager, in the process that opened it.

    Args:
        path: a video file, or a folder of pictures (in natural order; 25 fps unless `fps` says otherwise).
        backend: "auto" and "pyav" use PyAV, which recovers damaged files; "torchcodec" is used when asked for.
        tolerance: largest share of the wanted frames that may be replaced by their nearest decoded neighbour. 0 refuses
            any damage, also a single packet that does not decode; 1 takes whatever can be recovered.
        threads: decoder threads; 0 lets FFmpeg choose, but takes one inside a `DataLoader` worker.
        fps: frame rate of a folder of pictures.

    Raises:
        VideoDecodeError: missing, empty, audio only, not a video, too large, or nothing to read.
        BackendUnavailableError: the backend asked for cannot run here.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        backend: str = "auto",
        tolerance: float = 0.5,
        threads: int = 0,
        fps: float = 25.0,
    ):
        if not 0 <= tolerance <= 1:
            raise InputError(f"tolerance must lie in 0..1, not {tolerance}.")
        if not isinstance(path, (str, os.PathLike)):
            raise InputError(f"A video must be a path, not {type(path).__name__}.")
        self.path = expanded(path)
        self.tolerance = tolerance
        self.num_replaced = 0
        self._bad_packets, self._corrupt_shown = 0, set[int]()
        self._threads = threads or (1 if torch.utils.data.get_worker_info() else 0)
        self._container: Any = None
        self._pictures: Sequence[Path] = ()
        self.backend = choose_backend("video.read", backend, torch.device("cpu"), {"cpu": ("pyav",)}, _PROBLEMS)
        if not os.path.exists(self.path):
            raise VideoDecodeError(f"{self.path} does not exist.")
        if self.path.is_dir():
            self._open_folder(fps)
        elif self.path.is_file():
            self._open_file()
        else:
            raise VideoDecodeError(f"{self.path} is neither a file nor a folder.")

    # -- opening

    def _open_folder(self, fps: float) -> None:
        top = list_folder(self.path, SUFFIXES)
        self._pictures = PathList(os.path.join(top.path, name) for name in top.files)
        if not self._pictures:
            raise VideoDecodeError(f"{self.path} is a folder without pictures ({', '.join(SUFFIXES)}).")
        check_fps(fps)
        self.backend = "pictures"
        self.width, self.height = self._picture_size()
        self.fps = float(fps)
        self.seconds = np.arange(len(self._pictures)) / self.fps
        self.codec = "pictures"

    def _picture_size(self) -> tuple[int, int]:
        """(width, height) of the first picture that can be read; of the first alone where no damage is tolerated."""
        failed = []
        for path in self._pictures if self.tolerance else self._pictures[:1]:
            try:
                return load_image(path).size
            except InputError as error:
                failed.append(error)
        raise VideoDecodeError(str(failed[0])) from failed[0]

    def _open_file(self) -> None:
        import av

        if self.path.stat().st_size == 0:
            raise VideoDecodeError(f"{self.path} is empty (0 bytes).")
        try:
            self._container = _opened(os.fspath(self.path))
        except (av.error.FFmpegError, OSError) as error:
            raise VideoDecodeError(
                f"{self.path} is not a readable video ({_reason(error)}). It may be cut off, damaged or of "
                "another type; save it again or convert it to MP4."
            ) from error
        try:
            self._read_header()
        except BaseException:
            self.close()
            raise

    def _read_header(self) -> None:
        streams = [s for s in self._container.streams.video if not is_cover_art(s)]
        if not streams:
            raise VideoDecodeError(f"{self.path} has no video stream (audio only).")
        self._stream = streams[0]
        context = self._stream.codec_context
        if context is None:
            raise VideoDecodeError(f"{self.path} uses a video codec that this FFmpeg cannot decode.")
        if context.width < 1 or context.height < 1:
            raise VideoDecodeError(f"{self.path} does not tell the size of its frames; it is damaged.")
        if context.width * context.height > MAX_PIXELS:
            raise VideoDecodeError(
                f"{self.path} has frames of {context.width}x{context.height}; the limit is {MAX_PIXELS / 1e6:.0f} "
                "million pixels. Scale it down first."
            )
        context.thread_type = "AUTO"
        context.thread_count = self._threads
        self._scan()
        rate = self._stream.average_rate or self._stream.guessed_rate or Fraction(0)
        span = self.seconds[-1] - self.seconds[0] if len(self.seconds) > 1 else 0.0
        self.fps = float(rate) if rate else ((len(self.seconds) - 1) / span if span > 0 else 25.0)
        self.codec = context.name
        self.width, self.height = context.width, context.height
        if self._first_placement().swapped:
            self.width, self.height = self.height, self.width

    def _scan(self) -> None:
        """Presentation time of every frame, from the packets alone; a demuxing error ends the list."""
        import av

        times: list[int | None] = []
        keys: list[int] = []
        try:
            for packet in self._container.demux(self._stream):
                if packet.size and not packet.is_discard:
                    stamp = packet.pts if packet.pts is not None else packet.dts
                    times.append(stamp)
                    if packet.is_keyframe and stamp is not None:
                        keys.append(stamp)
        except (av.error.FFmpegError, OSError) as error:
            self._bad_packets += 1
            logger.info("%s: the file ends early (%s)", self.path, _reason(error))
        if not times:
            raise VideoDecodeError(f"{self.path} holds no video data that can be read (cut off or damaged).")
        known = sorted({t for t in times if t is not None})
        self._ordinal = len(known) != len(times) or self._container.format.name in _NO_TIMESTAMPS
        base = float(self._stream.time_base or Fraction(1, 25))
        if len(known) != len(times):  # no usable stamps: even spacing
            rate = float(self._stream.average_rate or 25)
            self.seconds = np.arange(len(times)) / rate
        else:
            self.seconds = (np.array(known, dtype=np.float64) - known[0]) * base
        self._pts = known
        self._first_stamp = min(known[0], 0) if known else 0
        self._keys = sorted(keys)

    def _first_placement(self) -> Placement:
        import av

        try:
            self._container.seek(self._first_stamp, stream=self._stream)
            for i, packet in enumerate(self._container.demux(self._stream)):
                try:
                    for frame in packet.decode():
                        return Placement.of(frame)
                except av.error.InvalidDataError:
                    continue
                if i > 200:
                    break
        except (av.error.FFmpegError, OSError) as error:
            logger.info("%s: %s", self.path, _reason(error))
        return Placement()

    # -- facts

    def __len__(self) -> int:
        return len(self.seconds)

    @property
    def duration(self) -> float:
        """Length in seconds, the last frame's own display time included."""
        return float(self.seconds[-1] + 1 / self.fps)

    @property
    def num_corrupt(self) -> int:
        """Packets the decoder refused so far, plus frames read that it marked as damaged."""
        return self._bad_packets + len(self._corrupt_shown)

    def index_at(self, seconds: float) -> int:
        """The frame on screen at `seconds`: the last whose presentation time is not later (clamped to the video)."""
        return min(max(int(np.searchsorted(self.seconds, seconds + 1e-9, side="right")) - 1, 0), len(self) - 1)

    def close(self) -> None:
        """Release the file and the decoder's threads."""
        if self._container is not None:
            self._container.close()
            self._container = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- reading

    def read(self, indices: Sequence[int] | np.ndarray[Any, Any], *, size: int | tuple[int, int] | None = None) -> Clip:
        """The frames with these numbers, in the given order, repeats allowed.

        Args:
            indices: integers in `[0, len(self))`.
            size: `None` keeps the video's size; an int is the wanted short side; `(height, width)` is exact.

        Raises:
            InputError: no index, or one out of range.
            VideoDecodeError: damage beyond `tolerance`.
        """
        wanted = self._check(indices)
        height, width = self.frame_size(size)
        if len(wanted) * height * width * 3 > MAX_BYTES:
            raise InputError(
                f"{self.path}: {len(wanted)} frames of {width}x{height} need more than {MAX_BYTES / 1e9:.0f} GB. "
                "Read them smaller (size=) or one by one (stream)."
            )
        frames = np.empty((len(wanted), height, width, 3), np.uint8)
        slots: dict[int, list[int]] = {}
        for slot, index in enumerate(wanted):
            slots.setdefault(int(index), []).append(slot)
        replaced = 0
        for index, array, state in self._pass(sorted(slots), (height, width)):
            for slot in slots[index]:
                frames[slot] = array
            replaced += state == "replaced"
        self._judge(replaced, len(slots))
        return Clip(
            frames=frames,
            indices=wanted,
            seconds=self.seconds[wanted],
            num_frames=len(self),
            fps=self.fps,
            duration=self.duration,
            num_replaced=replaced,
            num_corrupt=self.num_corrupt,
            path=str(self.path),
            backend=self.backend,
        )

    def stream(
        self, indices: Iterable[int], *, size: int | tuple[int, int] | None = None
    ) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
        """Yield `(index, frame (H, W, 3))` for the distinct `indices` in rising order; holds one frame at a time."""
        wanted = sorted({int(i) for i in self._check(list(indices))})
        replaced = 0
        for index, array, state in self._pass(wanted, self.frame_size(size)):
            replaced += state == "replaced"
            yield index, array
        self._judge(replaced, len(wanted))

    def frame_size(self, size: int | tuple[int, int] | None = None) -> tuple[int, int]:
        """(height, width) that `read` returns for `size`."""
        if size is None:
            return self.height, self.width
        if isinstance(size, int) and size > 0:
            short = min(self.height, self.width)
            size = max(1, round(self.height * size / short)), max(1, round(self.width * size / short))
        if isinstance(size, int) or len(size) != 2 or min(size) < 1 or size[0] * size[1] > MAX_PIXELS:
            raise InputError(f"size must be a positive int or (height, width), not {size!r}.")
        return int(size[0]), int(size[1])

    def _check(self, indices: Sequence[int] | np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        wanted = np.asarray(indices).reshape(-1)
        if wanted.size == 0 or wanted.dtype.kind not in "iu":
            raise InputError(f"Frame indices must be a non-empty list of integers, not {indices!r}.")
        if wanted.min() < 0 or wanted.max() >= len(self):
            raise InputError(
                f"{self.path} has {len(self)} frames; indices {wanted.min()}..{wanted.max()} were asked for."
            )
        return wanted.astype(np.int64)

    def _judge(self, replaced: int, wanted: int) -> None:
        """Refuse damage beyond the tolerance, and never pass over the rest without a word."""
        self.num_replaced += replaced
        damage = (
            f"{self.path} is damaged: {replaced} of {wanted} wanted frames cannot be decoded and {self.num_corrupt} packets or "
            "frames are bad."
        )
        if replaced / wanted > self.tolerance or (self.tolerance == 0 and self.num_corrupt):
            raise VideoDecodeError(f"{damage} Raise tolerance ({self.tolerance}), or repair it.")
        if replaced or self.num_corrupt:
            warnings.warn(f"{damage} Each shows its nearest decoded neighbour, or what is left of it.", stacklevel=3)

    def _pass(self, wanted: list[int], size: tuple[int, int]) -> Iterator[tuple[int, np.ndarray[Any, Any], str]]:
        """Yield `(index, array, "ok" | "replaced")` for sorted distinct indices in one forward pass."""
        if self._pictures:
            yield from self._pass_pictures(wanted, size)
        elif self.backend == "torchcodec":
            yield from self._pass_torchcodec(wanted, size)
        else:
            if self._container is None:
                raise InputError(f"{self.path}: this reader is closed.")
            yield from self._pass_pyav(wanted, size)

    def _pass_pyav(self, wanted: list[int], size: tuple[int, int]) -> Iterator[tuple[int, np.ndarray[Any, Any], str]]:
        places = wanted if self._ordinal else [self._pts[i] for i in wanted]
        at, previous = 0, None
        for place, frame in self._decoded(places[0]):
            while at < len(wanted) and places[at] < place:  # passed without being decoded: take the nearer neighbour
                near = frame if previous is None or place - places[at] < places[at] - previous[0] else previous[1]
                yield wanted[at], to_rgb(near, size), "replaced"
                at += 1
            if at < len(wanted) and places[at] == place:
                if frame.is_corrupt:
                    self._corrupt_shown.add(wanted[at])
                yield wanted[at], to_rgb(frame, size), "ok"
                at += 1
            if at == len(wanted):
                return
            previous = (place, frame)
        if previous is None:
            raise VideoDecodeError(f"{self.path} is damaged: no frame of it can be decoded.")
        for index in wanted[at:]:
            yield index, to_rgb(previous[1], size), "replaced"

    def _decoded(self, first: int) -> Iterator[tuple[int, Any]]:
        """Frames from the last key frame before `first` on, with their place (presentation stamp, or count)."""
        import av

        start = None
        if not self._ordinal:
            i = bisect.bisect_right(self._keys, first) - 1
            if i > 0 and bisect.bisect_left(self._pts, self._keys[i]) >= _SEEK_GAIN:
                start = self._keys[i]
        try:
            self._container.seek(self._first_stamp if start is None else start, stream=self._stream, backward=True)
        except (av.error.FFmpegError, OSError) as error:
            raise VideoDecodeError(f"{self.path} is damaged: it cannot be rewound ({_reason(error)}).") from error
        count, bad = 0, 0
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets, None)
                if packet is None:
                    break
                frames = packet.decode()
            except (av.error.FFmpegError, OSError) as error:
                bad += 1
                self._bad_packets = max(self._bad_packets, bad)
                if bad > max(64, len(self)):  # a demuxer that fails for ever
                    break
                logger.debug("%s: skipped a packet (%s)", self.path, _reason(error))
                continue
            for frame in frames:
                if self._ordinal or frame.pts is not None:
                    yield (count if self._ordinal else frame.pts), frame
                count += 1

    def _pass_pictures(
        self, wanted: list[int], size: tuple[int, int]
    ) -> Iterator[tuple[int, np.ndarray[Any, Any], str]]:
        last: np.ndarray[Any, Any] | None = None
        waiting: dict[int, InputError] = {}  # damaged, before the first that can be read
        for index in wanted:
            try:
                picture = load_image(self._pictures[index])
            except InputError as error:
                if last is None:
                    waiting[index] = error
                else:
                    yield index, last, "replaced"
                continue
            last = np.asarray(picture if picture.size == size[::-1] else picture.resize(size[::-1]))
            for earlier in waiting:
                yield earlier, last, "replaced"
            waiting.clear()
            yield index, last, "ok"
        for problem in waiting.values():
            raise VideoDecodeError(str(problem)) from problem

    def _pass_torchcodec(
        self, wanted: list[int], size: tuple[int, int]
    ) -> Iterator[tuple[int, np.ndarray[Any, Any], str]]:
        from torchcodec.decoders import VideoDecoder

        try:
            decoder = VideoDecoder(os.fspath(self.path), dimension_order="NHWC", num_ffmpeg_threads=self._threads or 1)
            for start in range(0, len(wanted), 16):
                part = wanted[start : start + 16]
                data = decoder.get_frames_at(part).data.numpy()
                for index, frame in zip(part, data, strict=True):
                    yield index, resize(frame, size), "ok"
        except (RuntimeError, ValueError, IndexError) as error:
            raise VideoDecodeError(
                f"{self.path}: torchcodec cannot decode it ({_reason(error)}). backend='pyav' recovers damaged files."
            ) from error


def read_frames(
    path: str | os.PathLike[str],
    indices: Sequence[int] | np.ndarray[Any, Any] | Any,
    *,
    size: int | tuple[int, int] | None = None,
    backend: str = "auto",
    tolerance: float = 0.5,
) -> Clip:
    """Read frames of a video file or a folder of pictures in one pass.

    Args:
        path: the file or folder.
        indices: frame numbers, or a sampler (`mmkit.video.UniformSampler(8)`), asked for one clip.
        size, backend, tolerance: see `VideoReader` and `VideoReader.read`.

    Raises:
        VideoDecodeError: the file cannot be read.

    Example:
        >>> import tempfile
        >>> from mmkit.video import UniformSampler, read_frames, write_video
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write_video(f"{folder}/clip.mp4", np.zeros((30, 48, 64, 3), np.uint8))
        ...     read_frames(path, UniformSampler(8), size=24).frames.shape
        (8, 24, 32, 3)
    """
    with VideoReader(path, backend=backend, tolerance=tolerance) as reader:
        if hasattr(indices, "sample"):
            indices = indices.sample(len(reader), fps=reader.fps).reshape(-1)
        return reader.read(indices, size=size)


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return str(text).splitlines()[0]
