"""Writing video files that browsers play."""

from __future__ import annotations

import os
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mmkit.errors import InputError
from mmkit.storage import atomic_write
from mmkit.storage.files import expanded
from mmkit.video.frames import check_fps
from mmkit.video.io import VideoReader

_WEBM = (".webm", ".mp4")
_PLAYED = {"h264": (".mp4", ".m4v", ".mov"), "vp8": (".webm",), "vp9": _WEBM, "av1": _WEBM, "libdav1d": _WEBM}
"""Codec -> suffixes of the containers in which every browser plays it."""


def write_video(
    path: str | os.PathLike[str],
    frames: np.ndarray[Any, Any] | Tensor | Iterable[np.ndarray[Any, Any]],
    *,
    fps: float = 25.0,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    faststart: bool = True,
) -> Path:
    """Write frames as a video that browsers play (H.264, yuv420p); odd sizes lose their last row or column.

    Args:
        path: its suffix chooses the container (.mp4, .mkv, .webm with `codec="libvpx"`, ...).
        frames: uint8 `(T, H, W, 3)`, RGB, an array, a tensor, or an iterable of `(H, W, 3)` arrays.
        fps: frames per second.
        codec, options: the encoder and its options; the default is CRF 18.
        faststart: put the index of an MP4 first, so that it plays while loading and a cut file stays readable.

    Raises:
        InputError: no frames, wrong type or shape, or a codec that does not exist here.
    """
    import av

    path = expanded(path)
    if isinstance(frames, Tensor):
        frames = frames.cpu().numpy()
    if not isinstance(frames, Iterable):
        raise InputError(f"frames are an array (T, H, W, 3) or several of (H, W, 3), not {type(frames).__name__}.")
    check_fps(fps)
    fps = float(fps)
    rate = Fraction(fps).limit_denominator(1001) if fps >= 1 else 1 / Fraction(1 / fps).limit_denominator(1001)
    with atomic_write(path) as temporary:
        try:
            kind = _container_format(path)
            extra = {"movflags": "+faststart"} if faststart and kind in ("mp4", "mov") else {}
            with av.open(os.fspath(temporary), "w", format=kind, options=extra) as container:
                try:
                    stream: Any = container.add_stream(codec, rate=rate, options=_encoder(codec, options))
                except ValueError as error:  # no such codec, or none for this container
                    raise InputError(f"{path} cannot be written with codec {codec!r}: {error}.") from error
                shape = None
                for frame in frames:
                    frame = np.asarray(frame)
                    if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8 or min(frame.shape[:2]) < 2:
                        raise InputError(
                            f"Frames must be uint8 (H, W, 3) of at least 2x2, not {frame.dtype} {frame.shape}."
                        )
                    if shape is None:
                        shape = frame.shape
                        stream.height, stream.width = frame.shape[0] // 2 * 2, frame.shape[1] // 2 * 2
                        stream.pix_fmt = "yuv420p"
                    elif frame.shape != shape:
                        raise InputError(f"All frames must have one size: {shape} came first, then {frame.shape}.")
                    even = np.ascontiguousarray(frame[: stream.height, : stream.width])
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
                if shape is None:
                    raise InputError("There are no frames to write.")
                container.mux(stream.encode(None))
        except av.error.FFmpegError as error:
            raise InputError(f"{path} cannot be written with codec {codec!r}: {error}.") from error
    return path


def plays_in_browser(path: str | os.PathLike[str]) -> bool:
    """Whether browsers play this file as it is. Raises `VideoDecodeError` when it cannot be read."""
    with VideoReader(path, tolerance=1.0) as reader:
        return Path(path).suffix.lower() in _PLAYED.get(reader.codec, ())


def browser_copy(path: str | os.PathLike[str], folder: str | os.PathLike[str], *, short_side: int = 480) -> Path:
    """`path` itself when browsers play it, else a copy in `folder` that they do, frame by frame the same but smaller.

    Browsers play H.264 in MP4, and VP8, VP9 and AV1 in WebM; not AVI, MPEG-4 part 2, or most of what old cameras write.

    Raises:
        VideoDecodeError: the file cannot be read.
    """
    path = Path(path)
    if plays_in_browser(path):
        return path
    with VideoReader(path, tolerance=1.0) as reader:
        size = min(short_side, reader.height, reader.width)
        frames = (frame for _, frame in reader.stream(range(len(reader)), size=size))
        return write_video(Path(folder) / f"{path.stem}.mp4", frames, fps=min(max(reader.fps, 1.0), 120.0))


def _container_format(path: Path) -> str:
    known = {".mkv": "matroska", ".webm": "webm", ".avi": "avi", ".mov": "mov", ".mp4": "mp4", ".m4v": "mp4"}
    if path.suffix.lower() not in known:
        raise InputError(f"{path}: write videos as one of {sorted(known)}.")
    return known[path.suffix.lower()]


def _encoder(codec: str, options: dict[str, str] | None) -> dict[str, str]:
    return dict(options) if options is not None else ({"crf": "18", "preset": "veryfast"} if codec == "libx264" else {})
