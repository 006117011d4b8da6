"""Medical segmentation without folder rules: a picture or a volume goes in, a mask with measures comes out.

`mmkit.pipeline("medical-segmentation")` takes pictures (2D networks) and NIfTI files or arrays (3D networks), runs the network over
overlapping windows weighted by a Gaussian (as nnU-Net does, arXiv 1809.10486), and keeps the voxel spacing. Nothing here is a
medical device.
"""

from __future__ import annotations

import itertools
import os
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from mmkit.data.images import ImageLike, load_image
from mmkit.errors import InputError
from mmkit.pipelines import Pipeline
from mmkit.storage import atomic_write, write_json

VOLUME_SUFFIXES = (".nii", ".nii.gz")
MAX_VOXELS = 256_000_000
"""Largest volume that is read: a small file can otherwise claim gigabytes of memory."""

COLOURS = (
    (0, 0, 0),
    (230, 75, 53),
    (0, 160, 135),
    (243, 155, 22),
    (60, 84, 180),
    (145, 91, 178),
    (126, 97, 72),
    (77, 187, 213),
)
"""Colour of each class, background first; further classes start again after the background."""

_WINDOW = {2: 256, 3: 64}


@dataclass
class Volume:
    """A 3D image: `data` float32 (X, Y, Z), `spacing` in mm per axis, `affine` (4, 4) voxel to world."""

    data: np.ndarray
    spacing: tuple[float, float, float]
    affine: np.ndarray


def is_volume(source: Any) -> bool:
    """Whether `source` is a volume rather than a picture: a NIfTI path, a `Volume`, or an array (X, Y, Z) with Z > 4."""
    if isinstance(source, (str, os.PathLike)):
        return str(source).lower().endswith(VOLUME_SUFFIXES)
    return isinstance(source, Volume) or (isinstance(source, np.ndarray) and source.ndim >= 3 and source.shape[-1] > 4)


def load_volume(
    source: str | os.PathLike[str] | np.ndarray | Volume, spacing: Sequence[float] = (1.0, 1.0, 1.0)
) -> Volume:
    """Read a volume.

    Args:
        source: a `.nii` or `.nii.gz` file, an array (X, Y, Z), or a `Volume`. A fourth axis of length one is dropped.
        spacing: mm per voxel of an array; files carry their own.

    Raises:
        InputError: unreadable or truncated, not 3D, too large, empty, or with NaN or infinite voxels.
    """
    if isinstance(source, Volume):
        name, data, affine = "the volume", source.data, source.affine
    elif isinstance(source, np.ndarray):
        name, data = "the array", source
        if len(spacing) != 3 or not all(0 < s < float("inf") for s in spacing):
            raise InputError(f"spacing must be three positive numbers, not {spacing!r}.")
        affine = np.diag([*spacing, 1.0])
    else:
        name = str(source)
        data, affine = _read_nifti(Path(source).expanduser())
    while data.ndim > 3 and data.shape[-1] == 1:
        data = data[..., 0]
    if data.ndim != 3:
        raise InputError(
            f"{name} must have three axes (X, Y, Z), not shape {data.shape}; pass one time point or channel."
        )
    if data.size == 0 or data.size > MAX_VOXELS:
        raise InputError(f"{name} has {data.size} voxels {data.shape}; between 1 and {MAX_VOXELS} are accepted.")
    if data.dtype.kind not in "uifb":
        raise InputError(f"{name} holds {data.dtype} values; voxels must be real numbers.")
    data = np.ascontiguousarray(data, dtype=np.float32)
    if not np.isfinite(data).all():
        bad = int((~np.isfinite(data)).sum())
        raise InputError(f"{name} has {bad} NaN or infinite voxels; replace them first (numpy.nan_to_num).")
    if isinstance(source, Volume):
        return Volume(data, source.spacing, affine)
    axes = np.sqrt((affine[:3, :3] ** 2).sum(0))
    return Volume(data, (float(axes[0]), float(axes[1]), float(axes[2])), affine)


def _read_nifti(path: Path) -> tuple[np.ndarray, np.ndarray]:
    import nibabel

    if not path.is_file():
        raise InputError(f"{path} does not exist or is not a file.")
    try:
        file = nibabel.load(path)
        if np.prod(file.shape) > MAX_VOXELS:  # type: ignore[attr-defined]
            raise InputError(f"{path} claims {file.shape} voxels; at most {MAX_VOXELS} are accepted.")  # type: ignore[attr-defined]
        affine = file.affine  # type: ignore[attr-defined]
        return np.asanyarray(file.dataobj), np.eye(4) if affine is None else affine  # type: ignore[attr-defined]
    except (
        nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError, OSError, EOFError, ValueError,
        OverflowError, zlib.error,
    ) as error:  # fmt: skip
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read as a NIfTI volume, or is truncated: {error}") from error


def normalise(x: Tensor) -> Tensor:
    """Zero mean and unit standard deviation over all pixels of one image (C, ...); a constant image becomes zeros."""
    return (x - x.mean()) / x.std(correction=0).clamp(min=1e-6)


def load_labels(source: str | os.PathLike[str] | np.ndarray, num_classes: int) -> np.ndarray:
    """A label map as uint8 (H, W) or (X, Y, Z): a NIfTI file, a PNG of class or object numbers, or an array.

    With two classes every value above zero counts as foreground, so that object numbers can be used. Raises `InputError` for
    unreadable files and for values that are no class.
    """
    if isinstance(source, np.ndarray):
        labels = source
    elif is_volume(source):
        labels = load_volume(source).data
    else:
        try:
            with Image.open(Path(source).expanduser()) as picture:
                labels = np.asarray(picture)
        except (OSError, ValueError, SyntaxError) as error:
            raise InputError(f"{source} cannot be read as a label picture: {error}") from error
        labels = labels[..., 0] if labels.ndim == 3 else labels
    if num_classes == 2:
        return (labels > 0).astype(np.uint8)
    if labels.min() < 0 or labels.max() >= num_classes or (labels != np.round(labels)).any():
        raise InputError(
            f"Labels must be whole numbers 0..{num_classes - 1}, found {labels.min():g}..{labels.max():g}."
        )
    return labels.astype(np.uint8)


def dice(predicted: np.ndarray, truth: np.ndarray, label: int) -> float:
    """Dice overlap of one class in 0..1; 1 when it is absent from both. Raises `InputError` when shapes differ."""
    if predicted.shape != truth.shape:
        raise InputError(f"The label map has shape {truth.shape}, the image {predicted.shape}; they must be equal.")
    a, b = predicted == label, truth == label
    total = int(a.sum() + b.sum())
    return 2 * int((a & b).sum()) / total if total else 1.0


def _starts(size: int, window: int, overlap: float) -> list[int]:
    """Evenly spaced window starts that cover `size` with at least `overlap`."""
    count = 1 + int(np.ceil((size - window) / max(1.0, window * (1 - overlap)))) if size > window else 1
    return [round(x) for x in np.linspace(0, size - window, count)]


def _gaussian(window: Sequence[int], device: torch.device) -> Tensor:
    weight = torch.ones(1, device=device)
    for size in window:
        x = torch.arange(size, device=device) - (size - 1) / 2
        weight = weight.unsqueeze(-1) * torch.exp(-0.5 * (x / (size / 8)) ** 2)
    return weight[0].clamp(min=1e-3)


@torch.inference_mode()
def sliding_window(
    model: Callable[[Tensor], Tensor],
    image: Tensor,
    window: Sequence[int],
    *,
    overlap: float = 0.5,
    batch_size: int = 4,
    progress: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Class probabilities of `image`, averaged over overlapping windows with Gaussian weights.

    Args:
        model: (B, C, *window) -> logits (B, K, *window).
        image: (C, *spatial); an axis shorter than the window is padded by repeating the border.
        window: size per axis.
        overlap: of neighbouring windows, 0 up to below 1.
        batch_size: windows per forward pass.
        progress: show a bar with the remaining time when it takes longer than two seconds.
        on_progress: called with (windows done, windows in total); may raise to cancel.

    Returns:
        (K, *spatial) float32 probabilities on the image's device.

    Raises:
        InputError: overlap or batch size out of range, or logits that are not finite (half precision overflowed).
    """
    if not 0 <= overlap < 1:
        raise InputError(f"overlap must lie in 0..1 (1 excluded), not {overlap}.")
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, not {batch_size}.")
    size = list(image.shape[1:])
    margins = [max(0, w - s) for w, s in zip(window, size, strict=True)]
    if any(margins):
        image = F.pad(image[None], [m for x in reversed(margins) for m in (0, x)], mode="replicate")[0]
    weight = _gaussian(window, image.device)
    places = list(itertools.product(*(_starts(s, w, overlap) for s, w in zip(image.shape[1:], window, strict=True))))
    cuts = [tuple(slice(a, a + w) for a, w in zip(place, window, strict=True)) for place in places]
    total: Tensor | None = None
    norm = torch.zeros(image.shape[1:], device=image.device)
    done = 0
    with tqdm(total=len(cuts), desc="windows", delay=2, disable=not progress, leave=False) as bar:
        for first in range(0, len(cuts), batch_size):
            part = cuts[first : first + batch_size]
            logits = model(torch.stack([image[(slice(None), *cut)] for cut in part])).float()
            if not torch.isfinite(logits).all():
                raise InputError(
                    "The network's output is not finite: half precision overflowed, or the weights are damaged. Use dtype='float32'."
                )
            total = torch.zeros(logits.shape[1], *image.shape[1:], device=image.device) if total is None else total
            for cut, value in zip(part, logits.softmax(1), strict=True):
                total[(slice(None), *cut)] += value * weight
                norm[cut] += weight
            done += len(part)
            bar.update(len(part))
            if on_progress is not None:
                on_progress(done, len(cuts))
    assert total is not None
    return (total / norm)[(slice(None), *(slice(0, s) for s in size))]


@dataclass
class SegmentationResult:
    """What the pipeline found.

    Attributes:
        mask: uint8 class per pixel, (H, W) or (X, Y, Z).
        probability: float32 probability of the chosen class, same shape.
        image: the input as shown: uint8 (H, W, 3) or float32 (X, Y, Z).
        classes: class names, background first.
        spacing: pixel size per axis: mm for volumes, ones for pictures.
        affine: voxel-to-world matrix of a volume, else None.
        seconds: time of the prediction.
    """

    mask: np.ndarray
    probability: np.ndarray
    image: np.ndarray
    classes: tuple[str, ...]
    spacing: tuple[float, ...]
    affine: np.ndarray | None
    seconds: float

    def measures(self, truth: np.ndarray | None = None) -> list[dict[str, Any]]:
        """Per class but the background: pixels, share of the image, size (px or mm3), separate objects, mean probability.

        With `truth` (a label map of the mask's shape) also the Dice overlap. Raises `InputError` when shapes differ.
        """
        from scipy.ndimage import label

        size_name = "volume_mm3" if self.mask.ndim == 3 else "area_px"
        rows = []
        for number, name in enumerate(self.classes[1:], 1):
            where = self.mask == number
            count = int(where.sum())
            row: dict[str, Any] = {"class": name, "pixels": count, "percent": round(100 * count / where.size, 3)}
            row[size_name] = round(count * float(np.prod(self.spacing)), 2)
            row["objects"] = int(label(where)[1])
            row["mean_probability"] = round(float(self.probability[where].mean()), 4) if count else None
            if truth is not None:
                row["dice"] = round(dice(self.mask, truth, number), 4)
            rows.append(row)
        return rows

    def best_slice(self, axis: int = 2) -> int:
        """The slice of a volume with the largest segmented area along `axis`; the middle one when nothing was found."""
        area = (self.mask > 0).sum(tuple(a for a in range(self.mask.ndim) if a != axis))
        return int(area.argmax()) if area.any() else self.mask.shape[axis] // 2

    def overlay(
        self, opacity: float = 0.5, index: int | None = None, axis: int = 2, labels: np.ndarray | None = None
    ) -> Image.Image:
        """The picture, or one slice of the volume, with the classes in colour.

        Args:
            opacity: of the colour, 0..1.
            index, axis: which slice of a volume; default: the one with the largest area. Slices are shown with the first
                remaining axis to the right and the second upwards.
            labels: another label map of the same shape to paint instead (the truth).

        Raises:
            InputError: an axis the volume does not have.
        """
        if axis not in (0, 1, 2):
            raise InputError(f"axis must be 0, 1 or 2, not {axis!r}.")
        labels = self.mask if labels is None else labels
        if self.mask.ndim == 2:
            base = self.image.astype(np.float32)
        else:
            index = self.best_slice(axis) if index is None else min(max(int(index), 0), self.mask.shape[axis] - 1)
            low, high = np.percentile(self.image, (0.5, 99.5))
            grey = np.clip((_slice(self.image, index, axis) - low) / max(high - low, 1e-6), 0, 1) * 255
            base, labels = np.repeat(grey[..., None], 3, -1), _slice(labels, index, axis)
        colours = np.array([_colour(i) for i in range(len(self.classes))], np.float32)[labels]
        alpha = np.where(labels[..., None] > 0, float(opacity), 0.0)
        return Image.fromarray((base * (1 - alpha) + colours * alpha + 0.5).astype(np.uint8))

    def plot(self) -> Image.Image:
        """The overlay at half opacity."""
        return self.overlay()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the result and return its path.

        `.png`: class numbers as a coloured palette picture (2D only); `.nii` or `.nii.gz`: the mask with spacing and affine;
        anything else: a folder with the mask, `overlay.png` and `measures.json`. Raises `InputError` for a suffix that
        does not fit.
        """
        path = Path(path).expanduser()
        name = path.name.lower()
        if name.endswith(VOLUME_SUFFIXES):
            self._save_nifti(path, ".nii.gz" if name.endswith(".gz") else ".nii")
        elif name.endswith(".png"):
            if self.mask.ndim != 2:
                raise InputError("A volume's mask cannot be a PNG; save it as .nii.gz or into a folder.")
            picture = Image.fromarray(self.mask)
            picture.putpalette([v for i in range(len(self.classes)) for v in _colour(i)])
            with atomic_write(path) as temporary:
                picture.save(temporary, format="PNG")
        elif path.suffix:
            raise InputError(
                f"Cannot save to {path.name!r}: use .png, .nii, .nii.gz or a folder name without a suffix."
            )
        else:
            self.save(path / ("mask.png" if self.mask.ndim == 2 else "mask.nii.gz"))
            with atomic_write(path / "overlay.png") as temporary:
                self.overlay().save(temporary, format="PNG")
            write_json(path / "measures.json", {"spacing": list(self.spacing), "classes": self.measures()})
        return path

    def _save_nifti(self, path: Path, suffix: str) -> None:
        import nibabel

        flat = self.mask.ndim == 2
        data = self.mask.T[:, ::-1, None] if flat else self.mask
        affine = np.eye(4) if self.affine is None else self.affine
        with atomic_write(path) as temporary:
            named = temporary.with_name(temporary.name + suffix)  # nibabel chooses the format by the suffix
            try:
                nibabel.save(nibabel.Nifti1Image(data, affine), named)
                os.replace(named, temporary)
            finally:
                named.unlink(missing_ok=True)


def _colour(label: int) -> tuple[int, int, int]:
    return COLOURS[0] if label == 0 else COLOURS[1 + (label - 1) % (len(COLOURS) - 1)]


def _slice(data: np.ndarray, index: int, axis: int) -> np.ndarray:
    return np.take(data, index, axis).T[::-1]


class MedicalSegmentationPipeline(Pipeline):
    """Segments pictures with 2D networks and volumes with 3D ones.

    Args:
        model: a `LightMUNet`, any module with `spatial_dims`, `in_channels` and `out_channels`, a folder written by
            `save_pretrained`, or a bundled name. Default: nuclei in microscopy pictures.
        classes: class names, background first; default from the bundled weights, else "class 1", ...
        window: window size, one number or one per axis, rounded up to what the network needs. Give the size of the training
            patches: norms over a larger field see other statistics. Default: that of the bundled weights, else 256 (2D) or 64 (3D).

    Example:
        >>> result = mmkit.pipeline("medical-segmentation")("cells.png")
        >>> result.measures()[0]["objects"]
    """

    task: ClassVar[str] = "medical-segmentation"
    default_weights: ClassVar[str] = "lightm_unet_nuclei"

    def __init__(
        self,
        model: nn.Module | str | os.PathLike[str] | None = None,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        classes: Sequence[str] | None = None,
        window: int | Sequence[int] | None = None,
    ):
        self.classes: tuple[str, ...] = tuple(classes or ())
        self.window = [] if window is None else [window] if isinstance(window, int) else list(window)
        super().__init__(model, device=device, dtype=dtype)
        missing = [k for k in ("spatial_dims", "in_channels", "out_channels") if not hasattr(self.model, k)]
        if missing:
            raise InputError(
                f"{type(self.model).__name__} lacks the attribute(s) {', '.join(missing)}; set them on it."
            )
        self.dims, self.channels = int(self.model.spatial_dims), int(self.model.in_channels)  # type: ignore[arg-type]
        count = int(self.model.out_channels)  # type: ignore[arg-type]
        self.classes = self.classes or ("background", *(f"class {i}" for i in range(1, count)))
        if len(self.classes) != count:
            raise InputError(f"The network has {count} classes, but {len(self.classes)} names were given.")
        sizes = self.window or [_WINDOW[self.dims]]
        sizes = sizes * self.dims if len(sizes) == 1 else sizes
        if len(sizes) != self.dims or min(sizes) < 1:
            raise InputError(f"window must be one positive size or {self.dims} of them, not {window!r}.")
        self.multiple = int(getattr(self.model, "multiple", 1))
        self.window = [-(-s // self.multiple) * self.multiple for s in sizes]

    def load(self, model: str | os.PathLike[str]) -> nn.Module:
        """A folder written by `save_pretrained`, or bundled weights with their class names and window."""
        from mmkit.backbones import load_weights
        from mmkit.vision.medical.model import LightMUNet
        from mmkit.weights import weight_entry

        if Path(model).expanduser().is_dir():
            return LightMUNet.from_pretrained(model)
        entry = weight_entry(str(model))
        self.classes = self.classes or tuple(entry.extra.get("classes", ()))
        self.window = self.window or list(entry.extra.get("window", ()))
        return load_weights(str(model))

    def __call__(
        self,
        image: ImageLike | Volume,
        *,
        spacing: Sequence[float] = (1.0, 1.0, 1.0),
        overlap: float = 0.5,
        tta: bool = False,
        batch_size: int = 4,
        progress: bool = True,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> SegmentationResult:
        """Segment one picture or volume.

        Args:
            image: what `load_image` takes (2D networks), or a NIfTI path, array (X, Y, Z) or `Volume` (3D networks).
            spacing: mm per voxel of an array; files carry their own.
            overlap: of neighbouring windows.
            tta: average over all mirrorings (4 times the work in 2D, 8 times in 3D).
            batch_size, progress, on_progress: see `sliding_window`.

        Raises:
            InputError: unreadable input, a picture for a 3D network or the reverse, NaN voxels, a non-finite output.
        """
        start = time.perf_counter()
        shown, x, spacing, affine = self._prepare(image, spacing)
        window = [min(w, -(-s // self.multiple) * self.multiple) for w, s in zip(self.window, x.shape[1:], strict=True)]

        def run(batch: Tensor) -> Tensor:
            if not tta:
                return self.model(batch)
            axes = range(2, batch.dim())
            flips = [c for n in range(self.dims + 1) for c in itertools.combinations(axes, n)]
            return (
                torch.stack([self.model(batch.flip(f)).flip(f).softmax(1) for f in flips]).mean(0).clamp(min=1e-8).log()
            )

        options: dict[str, Any] = {"overlap": overlap, "batch_size": batch_size}
        found = sliding_window(run, x, window, progress=progress, on_progress=on_progress, **options)
        probability, mask = found.max(0)
        return SegmentationResult(
            mask.to(torch.uint8).cpu().numpy(),
            probability.cpu().numpy(),
            shown,
            self.classes,
            tuple(float(s) for s in spacing),
            affine,
            time.perf_counter() - start,
        )

    def _prepare(
        self, image: Any, spacing: Sequence[float]
    ) -> tuple[np.ndarray, Tensor, Sequence[float], np.ndarray | None]:
        """What is shown, the network's input (C, ...), the spacing and the affine."""
        if self.dims == 3:
            if isinstance(image, (str, os.PathLike)) and not is_volume(image):
                raise InputError(f"This network segments volumes: pass a .nii or .nii.gz file, not {str(image)!r}.")
            if not isinstance(image, (str, os.PathLike, np.ndarray, Volume)):
                raise InputError(
                    f"This network segments volumes (a NIfTI file or an array), not {type(image).__name__}."
                )
            volume = load_volume(image, spacing)
            if self.channels != 1:
                raise InputError(f"The network takes {self.channels} channels; a volume has one.")
            tensor = torch.from_numpy(volume.data)[None]
            return volume.data, self._to_input(tensor), volume.spacing, volume.affine
        if is_volume(image):
            raise InputError("This network segments pictures; for a volume choose a network with spatial_dims=3.")
        if self.channels not in (1, 3):
            raise InputError(f"The network takes {self.channels} channels; pictures have 1 (grey) or 3 (RGB).")
        picture = load_image(image)
        array = np.array(picture if self.channels == 3 else picture.convert("L"))
        tensor = torch.from_numpy(array).float().reshape(*array.shape[:2], self.channels).permute(2, 0, 1)
        return np.array(picture), self._to_input(tensor), (1.0, 1.0), None

    def _to_input(self, x: Tensor) -> Tensor:
        return normalise(x).to(self.device, self.dtype)
