"""SSF: scale and shift the output of every affine layer. arXiv 2210.08823 (NeurIPS 2022), dongzelian/SSF.

`y' = y * scale + shift`, one pair per output channel of each linear, convolution and normalisation layer of the backbone; the
head is left alone. Linear in y, so it folds exactly into the layer it follows.

Deviations from the official code:
- The channel axis follows from the module's type instead of from matching sizes, which picks the wrong axis when a picture's
  width equals the number of channels (`official_axis=True` restores that).
- The official ConvNeXt carries timm 0.6's `LayerNorm2d`, which divides by C - 1 instead of C when its input is not contiguous;
  that is every `downsample` norm behind a block, 5 % of the features at C = 8. Later timm divides by C throughout, and so does
  this adapter (`official_norm=True` restores it). `load_official_checkpoint` sets both flags for ConvNeXt.
- A ConvNeXt with `head_norm_first` runs `norm_pre` once; the official code runs it twice.
- `init_std=0` gives an exact identity at the start (official: 0.02, the default).

Two official sites follow an `nn.Identity` (ViT with average pooling: `norm`; ConvNeXt: `norm_pre`). They are kept for fidelity
and cannot be merged; `identity_sites=False` leaves them out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmkit.adapters import hooks
from mmkit.adapters.api import register_adapter
from mmkit.adapters.bitfit import along
from mmkit.adapters.config import AdapterConfig, Edit
from mmkit.adapters.sites import SiteAdapter
from mmkit.adapters.trial import channel_axis
from mmkit.errors import NotMergeableError
from mmkit.storage import load_state, read_tensors


@dataclass(frozen=True)
class SSFConfig(AdapterConfig):
    """Settings of SSF.

    Attributes:
        init_std: scale ~ N(1, init_std^2), shift ~ N(0, init_std^2); 0 starts as an exact identity. At least 0.
        identity_sites: also act at the official sites that no affine layer precedes; these cannot be merged.
        official_axis: scale the last axis whenever its size equals the number of channels, as the official code does. A site
            behind a convolution can then not be merged.
        official_norm: while attached, every `LayerNorm2d` of the model uses the unbiased variance on inputs that are not
            contiguous, as the official ConvNeXt does. A model with such a norm can then not be merged.
    """

    init_std: float = 0.02
    identity_sites: bool = True
    official_axis: bool = False
    official_norm: bool = False


class ScaleShift(nn.Module):
    """`y * scale + shift` along axis `axis` of y, computed in y's dtype."""

    def __init__(self, dim: int, axis: int, init_std: float, official_axis: bool = False):
        super().__init__()
        self.axis = axis
        self.official_axis = official_axis
        self.scale = nn.Parameter(torch.empty(dim).normal_(1.0, init_std) if init_std else torch.ones(dim))
        self.shift = nn.Parameter(torch.empty(dim).normal_(0.0, init_std) if init_std else torch.zeros(dim))

    def forward(self, y: Tensor, args: Any = ()) -> Tensor:
        """(..., dim) or (B, dim, ...) -> the same shape and dtype."""
        scale, shift = self.scale.to(y.dtype), self.shift.to(y.dtype)
        axis = -1 if self.official_axis and y.shape[-1] == scale.numel() else self.axis
        return torch.addcmul(along(shift, axis, y.dim()), y, along(scale, axis, y.dim()))


class OfficialNorm2d(hooks.Action):
    """timm 0.6's `LayerNorm2d`: on an input that is not contiguous, the variance over channels is divided by C - 1."""

    def __init__(self, norm: nn.Module):
        self.norm = norm

    def run(self, below: hooks.Below, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        (x,) = args
        if x.is_contiguous():
            return below(x)
        norm: Any = self.norm
        variance, mean = torch.var_mean(x, dim=1, correction=1, keepdim=True)
        y = (x - mean) * torch.rsqrt(variance + norm.eps)
        if norm.weight is not None:
            y = y * norm.weight.view(-1, 1, 1)
        return y if norm.bias is None else y + norm.bias.view(-1, 1, 1)


@register_adapter("ssf")
class SSF(SiteAdapter):
    """Scale and shift adapter; see the module docstring."""

    config_class = SSFConfig

    def is_site(self, path: str, module: nn.Module) -> bool:
        return path in self._identities or channel_axis(module) is not None

    def default_sites(self, model: nn.Module, candidates: dict[str, nn.Module]) -> list[str]:
        left_out = re.compile(  # not official sites
            r"(^|\.)(fc_norm|q_norm|k_norm)$|^(layers|stages)\.\d+\.downsample\."
        )
        return [p for p in super().default_sites(model, candidates) if p in self._identities or not left_out.search(p)]

    def make_site(self, path: str, module: nn.Module) -> nn.Module:
        dim_axis = channel_axis(module)
        if dim_axis is None:  # an official site behind an Identity: ConvNeXt's is (B, C, H, W), ViT's (B, N, C)
            dim_axis = self._identity_dim, 1 if path == "norm_pre" else -1
        return ScaleShift(*dim_axis, self.config.init_std, self.config.official_axis)

    def build(self, model: nn.Module) -> None:
        self._identities = _official_identity_sites(model) if self.config.identity_sites else []
        self._identity_dim = int(getattr(model, "num_features", 0))
        super().build(model)

    def install(self, model: nn.Module) -> None:
        if self.config.official_norm:
            for path, module in _norms_2d(model):
                self.link(model, path, OfficialNorm2d(module), slot="official_norm")
        super().install(model)

    def starts_as_identity(self) -> bool:
        return self.config.init_std == 0 and not self.config.official_norm

    def merge_edits(self, model: nn.Module) -> list[Edit]:
        edits = super().merge_edits(model)
        norms = [path for path, _ in _norms_2d(model)] if self.config.official_norm else []
        if norms:
            raise NotMergeableError(
                f"official_norm changes {norms}, and weights cannot express that: keep it attached.", norms
            )
        return edits

    def fold(self, site: nn.Module, module: nn.Module) -> dict[str, Tensor]:
        if isinstance(module, nn.Identity):
            raise NotMergeableError("an Identity has nothing to fold into")
        if site.official_axis and site.axis != -1:
            raise NotMergeableError("official_axis can make this site act on another axis than the layer's channels")
        pair: Any = site
        scale, shift = pair.scale.detach().double(), pair.shift.detach().double()
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if weight is None:  # a norm without affine parameters gets them
            return {"weight": scale, "bias": shift}
        w = weight.detach().double()
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        if transposed and module.groups > 1:
            raise NotMergeableError("a grouped transposed convolution mixes its output channels in one weight")
        out = {"weight": w * along(scale, 1 if transposed else 0, w.dim())}
        if isinstance(module, nn.RMSNorm):
            raise NotMergeableError("RMSNorm has no bias to take the shift")
        out["bias"] = shift if bias is None else bias.detach().double() * scale + shift
        return out


def _norms_2d(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(path, m) for path, m in hooks.named_plain_modules(model) if type(m).__name__ == "LayerNorm2d"]


def _official_identity_sites(model: nn.Module) -> list[str]:
    """`norm` of an average-pooling ViT and `norm_pre` of a ConvNeXt, when they are Identities."""
    names = []
    if hasattr(model, "blocks") and hasattr(model, "fc_norm") and isinstance(getattr(model, "norm", None), nn.Identity):
        names.append("norm")
    if hasattr(model, "stages") and isinstance(getattr(model, "norm_pre", None), nn.Identity):
        names.append("norm_pre")
    return names


def load_official_checkpoint(
    model: nn.Module,
    path: Any,
    *,
    name: str = "default",
    official_axis: bool | None = None,
    official_norm: bool | None = None,
) -> SSF:
    """Load a checkpoint of dongzelian/SSF (backbone, head and `ssf_*` vectors) into a timm ViT, Swin or ConvNeXt.

    The backbone's tensors go into `model`, the vectors into an `SSF` adapter that is attached and returned. Swin's
    `downsample` is moved one stage up (timm >= 0.9 builds it at the start of the next stage).

    Args:
        model: the timm model of the checkpoint's architecture.
        path: `.safetensors`, `.pth` or `.pt`.
        name: the adapter's name on the model.
        official_axis: see `SSFConfig`; `None` sets it for ConvNeXt, the one official backbone with (B, C, H, W) inside.
        official_norm: likewise.

    Raises:
        CheckpointError: keys are missing, unexpected or misshapen; the model is unchanged.
    """
    state = {_timm_key(k, model): v for k, v in read_tensors(path).items()}
    convnext = hasattr(model, "stem")
    config = SSFConfig(
        official_axis=convnext if official_axis is None else official_axis,
        official_norm=convnext if official_norm is None else official_norm,
    )
    adapter = SSF(config, name=name).attach(model)
    try:
        vectors = {}
        for key in [k for k in state if re.search(r"ssf_(scale|shift)_[12]$", k)]:
            owner, kind, index = re.fullmatch(r"(?:(.*)\.)?ssf_(scale|shift)_([12])", key).groups()  # type: ignore[union-attr]
            vectors[f"{_site_of(owner or '', int(index), model)}.{kind}"] = state.pop(key)
        load_state(adapter, vectors, source=str(path))
        buffers = {k for k, _ in model.named_buffers()}
        load_state(model, state, source=str(path), ignore=tuple(buffers))
    except BaseException:
        adapter.detach()
        raise
    return adapter


def _timm_key(key: str, model: nn.Module) -> str:
    if hasattr(model, "layers"):  # Swin
        key = re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", key)
        if key.startswith("head.") and not key.startswith("head.fc."):
            key = key.replace("head.", "head.fc.", 1)
    if hasattr(model, "stem"):  # ConvNeXt
        key = re.sub(r"^stem\.(proj|norm)\.", lambda m: f"stem.{'01'[m[1] == 'norm']}.", key)
        key = re.sub(r"downsample\.(norm|proj)\.", lambda m: f"downsample.{'01'[m[1] == 'proj']}.", key)
    return key


def _site_of(owner: str, index: int, model: nn.Module) -> str:
    """The module an official `ssf_*_<index>` vector belongs to; `owner` is the module that holds it."""
    leaf = owner.rpartition(".")[2]
    convnext = hasattr(model, "stem")
    if owner == "":
        return "norm_pre" if convnext else "norm"
    table = {
        "attn": ("qkv", "proj"),
        "mlp": ("fc1", "fc2"),
        "patch_embed": ("proj", "norm"),
        "stem": ("0", "1"),
    }
    names = table.get(leaf, ("conv_dw", "norm") if convnext else ("norm1", "norm2"))
    return f"{owner}.{names[index - 1]}"
