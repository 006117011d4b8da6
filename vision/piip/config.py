"""What a pyramid is made of: one `BranchConfig` per branch, largest model first, and how the branches talk to each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from mmkit.errors import InputError, nearest

ATTENTION = ("deform", "normal")
DIRECTIONS = ("both", "to_larger", "to_smaller")
GRID_FITS = ("exact", "floor", "nearest")


def _known(cls: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(cls)]
    for name in values:
        if name not in names:
            raise InputError(f"{cls.__name__} has no setting {name!r}. {nearest(name, names)}")
    return dict(values)


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{name} must be one of {choices}, not {value!r}.")


@dataclass(frozen=True)
class BranchConfig:
    """One branch: a backbone, and the resolution at which it sees the picture.

    Attributes:
        backbone: a name for `mmkit.create_backbone`: "vit_small_patch16_224", "tiny_vit", "transformers:dinov3_vit", ...
        img_size: side in pixels at which this branch sees the picture; only the ratios between branches matter when it runs.
        interaction_indexes: first and last block, both included, of each group; `None` shares the blocks out evenly over as many
            groups as the shallowest branch has blocks.
        settings: passed to the backbone's constructor ("depth", "embed_dim", "init_values", ...).
        class_token: `False` drops class and register tokens after the embedding.
        window: attention within squares of this many tokens, for all blocks or one number per block; 0 is global.
        pad_keys: how maps are filled up to whole windows: zero tokens (the released detectors), or zero keys (`True`).
        qk_norm: "layer" or "rms": InternViT's norms of queries and keys over the full width; "" for none.
        official_positions: class tokens get no position and positions are resized without antialiasing, as in the authors' code.
        drop_path_rate: of every block alike, as the authors do; `None` leaves it to the backbone.
    """

    backbone: str
    img_size: int
    interaction_indexes: tuple[tuple[int, int], ...] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    class_token: bool = True
    window: int | tuple[int, ...] = 0
    pad_keys: bool = False
    qk_norm: str = ""
    official_positions: bool = False
    drop_path_rate: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.img_size, bool) or not isinstance(self.img_size, int) or self.img_size < 1:
            raise InputError(f"img_size must be a positive whole number of pixels, not {self.img_size!r}.")
        _choice("qk_norm", self.qk_norm, ("", "layer", "rms"))
        if self.interaction_indexes is not None:
            pairs = tuple((int(group[0]), int(group[-1])) for group in self.interaction_indexes)
            object.__setattr__(self, "interaction_indexes", pairs)
        if isinstance(self.window, (list, tuple)):
            object.__setattr__(self, "window", tuple(max(int(w), 0) for w in self.window))

    @property
    def windowed(self) -> bool:
        """Whether any block attends within windows."""
        return any(self.window) if isinstance(self.window, tuple) else self.window > 0

    def window_of(self, block: int) -> int:
        """The window of one block, 0 for global attention."""
        return self.window[block] if isinstance(self.window, tuple) else max(self.window, 0)


@dataclass(frozen=True)
class PIIPConfig:
    """A pyramid. Branches run from the largest model on the smallest picture to the smallest model on the largest picture.

    Attributes:
        branches: 2 to 4 `BranchConfig`s, or dicts of their settings.
        attention: "deform", or "normal": plain cross-attention, whose cost grows with the product of the token counts.
        num_heads, num_points, value_ratio: of the deformable attention (heads also of the plain one).
        cffn, cffn_ratio: whether a convolutional feed-forward follows, and its hidden width over the branch's.
        proj: project features to the width of the branch that reads them.
        norm: LayerNorms before the attention and the feed-forward.
        drop_path_rate: of that feed-forward.
        direction: "both", or one way only: "to_larger" models, "to_smaller" models.
        antialias: blur when pictures are made smaller; the authors do not.
        grid_fit: what happens when a branch's picture is no whole number of patches: "exact" is an error, "nearest" makes the
            smaller pictures the nearest whole number, "floor" cuts them as the official detectors do.
    """

    branches: tuple[BranchConfig, ...]
    attention: str = "deform"
    num_heads: int = 16
    num_points: int = 4
    value_ratio: float = 0.5
    cffn: bool = True
    cffn_ratio: float = 0.25
    proj: bool = True
    norm: bool = True
    drop_path_rate: float = 0.0
    direction: str = "both"
    antialias: bool = False
    grid_fit: str = "exact"

    def __post_init__(self) -> None:
        branches = tuple(
            b if isinstance(b, BranchConfig) else BranchConfig(**_known(BranchConfig, b)) for b in self.branches
        )
        object.__setattr__(self, "branches", branches)
        if not 2 <= len(branches) <= 4:
            raise InputError(f"A pyramid has 2, 3 or 4 branches, not {len(branches)}.")
        sizes = [b.img_size for b in branches]
        if sizes != sorted(sizes):
            raise InputError(
                f"Branches go from the smallest picture to the largest, largest model first; the sizes are {sizes}."
            )
        _choice("attention", self.attention, ATTENTION)
        _choice("direction", self.direction, DIRECTIONS)
        _choice("grid_fit", self.grid_fit, GRID_FITS)

    @classmethod
    def of(cls, value: Self | Mapping[str, Any]) -> Self:
        """A config as it is, or made from a dict. Raises `InputError` for unknown or impossible settings."""
        return value if isinstance(value, cls) else cls(**_known(cls, value))  # type: ignore[arg-type]
