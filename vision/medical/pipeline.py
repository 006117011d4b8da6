"""Medical segmentation without folder rules: a picture or a volume goes in, a mask with measures comes out.

`mmkit.pipeline("medical-segmentation")` takes pictures (2D networks) and NIfTI files or arrays (3D networks), runs the network over
overlapping windows weighted by a Gaussian (as nnU-Net does, arXiv 1809.10486), and keeps the voxel spacing. The network sees
volumes with their axes to the right, front and top (RAS); the answer lies as the file does. Nothing here is a medical device.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from mmkit.backbones.model import Model, open_model
from mmkit.data.images import ImageLike, check_channels, check_mask_classes, load_image
from mmkit.errors import CheckpointError, InputError
from mmkit.pipelines import Pipeline
from mmkit.storage import new_folder, read_json, write_json
from mmkit.storage.files import expanded
from mmkit.vision.medical.familiar import Familiarity
from mmkit.vision.medical.result import SegmentationResult
from mmkit.vision.medical.volumes import Volume, from_ras, is_volume, load_volume, normalize, ras
from mmkit.vision.medical.windows import fitting, sliding_window

_WINDOW = {2: 256, 3: 64}
_EXTRA = "segmentation.json"  # beside the weights: what bundled ones have in the manifest


class MedicalSegmentationPipeline(Pipeline):
    """Segments pictures with 2D networks and volumes with 3D ones.

    Args:
        model: a `UNet`, a `LightMUNet`, any module with `spatial_dims`, `in_chans` and `num_classes`, a folder written by
            `save_pretrained`, or a bundled name. Default: nuclei in microscopy pictures.
        class_names: background first; default from the bundled weights, else "class 1", ...
        familiarity: tells inputs that are unlike the training data, see `Familiarity.measure`; default from the bundled weights.
        window: window size, one number or one per axis, rounded up to what the network needs. Give the size of the training
            patches: norms over a larger field see other statistics. Default: that of the bundled weights, else 256 (2D) or 64 (3D).
        touching: objects of a class touch each other, as cells do, and are to be counted one by one; default from the bundled weights,
            else False.

    Example:
        >>> import mmkit
        >>> from mmkit.data.drawn.scans import sample_picture
        >>> result = mmkit.pipeline("medical-segmentation")(sample_picture(7)[0])
        >>> (nuclei,) = result.measures()
        >>> nuclei["class"], nuclei["objects"] > 10
        ('nucleus', True)
        >>> result.warning
        ''
    """

    task: ClassVar[str] = "medical-segmentation"
    default_weights: ClassVar[str] = "unet_nuclei"

    def __init__(
        self,
        model: nn.Module | str | os.PathLike[str] | None = None,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        class_names: Sequence[str] | None = None,
        window: int | Sequence[int] | None = None,
        familiarity: Familiarity | None = None,
        touching: bool | None = None,
    ):
        self.class_names: tuple[str, ...] = tuple(class_names or ())
        self.familiarity, self.touching = familiarity, touching
        self.window = [] if window is None else [window] if isinstance(window, int) else list(window)
        super().__init__(model, device=device, dtype=dtype)
        missing = [k for k in ("spatial_dims", "in_chans", "num_classes") if not hasattr(self.model, k)]
        if missing:
            raise InputError(
                f"{type(self.model).__name__} lacks the attribute(s) {', '.join(missing)}; set them on it."
            )
        self.dims, self.channels = int(self.model.spatial_dims), int(self.model.in_chans)  # type: ignore[arg-type]
        count = int(self.model.num_classes)  # type: ignore[arg-type]
        check_mask_classes(count)
        self.class_names = self.class_names or ("background", *(f"class {i}" for i in range(1, count)))
        if len(self.class_names) != count:
            raise InputError(f"The network has {count} classes, but {len(self.class_names)} names were given.")
        sizes = self.window or [_WINDOW[self.dims]]
        sizes = sizes * self.dims if len(sizes) == 1 else sizes
        if len(sizes) != self.dims or min(sizes) < 1:
            raise InputError(f"window must be one positive size or {self.dims} of them, not {window!r}.")
        self.multiple = int(getattr(self.model, "multiple", 1))
        self.window = [-(-s // self.multiple) * self.multiple for s in sizes]

    def load(self, model: str | os.PathLike[str]) -> nn.Module:
        """A folder of `save_pretrained`, the model's or ours, or bundled weights; with their class names and window."""
        from mmkit.backbones import load_weights
        from mmkit.weights import weight_entry

        folder = expanded(model)
        network: nn.Module
        if folder.is_dir():
            network = open_model(folder)
            extra = read_json(folder / _EXTRA) if (folder / _EXTRA).is_file() else {}
        else:
            network, extra = load_weights(str(model)), weight_entry(str(model)).extra
        try:
            self.class_names = self.class_names or tuple(extra.get("class_names", ()))
            self.window = self.window or list(extra.get("window", ()))
            if self.familiarity is None and extra.get("familiarity"):
                self.familiarity = Familiarity.from_dict(extra["familiarity"])
            self.touching = extra.get("touching") if self.touching is None else self.touching
        except (AttributeError, TypeError, KeyError, ValueError) as error:
            raise CheckpointError(f"{folder / _EXTRA} is damaged: {error!r}. Save the folder again.") from error
        return network

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write a folder that a pipeline opens with the same network and all that this one knows of it.

        Raises `InputError` when the network is no model of mmkit, or the folder holds anything else.
        """
        if not isinstance(self.model, Model):
            raise InputError(f"{type(self.model).__name__} is no model of mmkit; save it as its library does.")
        known = self.familiarity and self.familiarity.to_dict()
        with new_folder(folder, kind="model") as draft:
            self.model.save_pretrained(draft)
            told = {
                "class_names": self.class_names,
                "window": self.window,
                "familiarity": known,
                "touching": self.touching,
            }
            write_json(draft / _EXTRA, told)

    def example(self) -> tuple[torch.Tensor, ...]:
        """A window in numbers, (1, C, H, W) or (1, C, D, H, W)."""
        return (torch.zeros(1, self.channels, *self.window),)

    def metadata(self) -> dict[str, str]:
        """Class names, the window, and how pixels become the input."""
        told = "zero mean and unit standard deviation over all pixels of the image; logits (B, K, ...) come out, background first"
        axes = ", volumes with their axes to the right, front and top" if self.dims == 3 else ""
        return {
            "class_names": json.dumps(self.class_names),
            "window": json.dumps(self.window),
            "preprocessing": told + axes,
        }

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
        window = fitting(self.window, x.shape[1:], self.multiple)

        def run(batch: Tensor) -> Tensor:
            if not tta:
                return self.model(batch)
            axes = range(2, batch.dim())
            flips = [c for n in range(self.dims + 1) for c in itertools.combinations(axes, n)]
            # in single precision, which a network in half precision does not answer in: 1e-8 would be 0 there
            each = [self.model(batch.flip(f)).flip(f).float().softmax(1) for f in flips]
            return torch.stack(each).mean(0).clamp(min=1e-8).log()

        options: dict[str, Any] = {"overlap": overlap, "batch_size": batch_size}
        found = sliding_window(run, x, window, progress=progress, on_progress=on_progress, **options)
        best, number = found.max(0)
        mask, score = number.to(torch.uint8).cpu().numpy(), best.cpu().numpy()
        if affine is not None:
            mask, score = (np.ascontiguousarray(from_ras(a, affine)) for a in (mask, score))
        return SegmentationResult(
            mask,
            score,
            shown,
            self.class_names,
            tuple(float(s) for s in spacing),
            affine,
            time.perf_counter() - start,
            None if self.familiarity is None else self.familiarity.distance(x),
            bool(self.touching),
        )

    def unlike(self, image: ImageLike | Volume) -> float | None:
        """How far an input is from the training data, over the limit: above 1 is unlike it. `None`: the weights do not tell.

        Raises `InputError` for what the call refuses.
        """
        return None if self.familiarity is None else self.familiarity.distance(self._prepare(image, (1.0, 1.0, 1.0))[1])

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
            tensor = torch.from_numpy(np.ascontiguousarray(ras(volume.data, volume.affine)))[None]
            return volume.data, self._to_input(tensor), volume.spacing, volume.affine
        if is_volume(image):
            raise InputError("This network segments pictures; for a volume choose a network with spatial_dims=3.")
        check_channels(self.channels)
        picture = load_image(image)
        array = np.array(picture if self.channels == 3 else picture.convert("L"))
        tensor = torch.from_numpy(array).float().reshape(*array.shape[:2], self.channels).permute(2, 0, 1)
        return np.array(picture), self._to_input(tensor), (1.0, 1.0), None

    def _to_input(self, x: Tensor) -> Tensor:
        return normalize(x).to(self.device, self.dtype)
