"""Gaussian mixture masks on the attention of a pretrained timm ViT, as an adapter. See `mmkit.vision.gmm.masks`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mmkit.adapters import Adapter, AdapterConfig, current_context, hooks, register_adapter
from mmkit.adapters.targets import match_targets
from mmkit.errors import InputError, nearest
from mmkit.vision.gmm.attention import masked_attention, sum_masks
from mmkit.vision.gmm.masks import GaussianMixtureMask, check_grid


@dataclass(frozen=True)
class GMMConfig(AdapterConfig):
    """Settings of the `gmm` adapter.

    Attributes:
        num_kernels: Gaussians per head; the adapter has `2 * num_kernels * num_heads` scalars per attention.
        mode: "multiply" (the paper's operator) or "bias" (the Gaussians are added to the logits; keeps fused
        attention). attn_backend: "eager" or "flex" (CUDA), see `masked_attention`.
        targets: attention modules, for example "blocks.[0-5].attn"; `None` is all of them.
    """

    num_kernels: int = 5
    mode: str = "multiply"
    attn_backend: str = "eager"


@register_adapter("gmm")
class GMMAdapter(Adapter):
    """Gaussian mixture masks on the attention of a pretrained timm ViT; the output is unchanged until alpha is trained.

    Rows and columns of class and register tokens are never masked. The patch grid is read at every forward pass, so
    `dynamic_img_size` and `set_input_size` work. Masks multiply attention logits, which no weight can absorb:
    `merge()` raises, `bake()` turns them into constants. A model that classifies from its class token ignores the last
    layer's mask, since only patches are masked. `fit` trains alpha and sigma without weight decay at ten times its
    learning rate.
    """

    config_class = GMMConfig
    lr_scale = 10.0
    decays = False

    def build(self, model: nn.Module) -> None:
        config = self.config
        if config.attn_backend not in ("eager", "flex"):
            raise InputError(f"attn_backend must be 'eager' or 'flex', not {config.attn_backend!r}.")
        backbones = _find_backbones(model)
        candidates = {
            p: (m, backbone)
            for path, backbone in backbones.items()
            for p, m in hooks.named_plain_modules(model)
            # `blocks` at one grid: a pyramid such as PiT pools its tokens between its stages
            if hasattr(backbone, "blocks") and p.startswith(f"{path}." if path else "") and _is_timm_attention(m)
        }
        names = list(candidates) if config.targets is None else match_targets(config.targets, candidates)
        left_out = set(match_targets(config.exclude, names))
        names = [n for n in names if n not in left_out]
        if not names:
            kinds = " and ".join(sorted({type(b).__name__ for b in backbones.values()}))
            hint = nearest(str(config.targets), candidates) if candidates else NO_ATTENTION.format(kinds)
            raise InputError(f"'gmm' matches no attention with targets={config.targets!r}. {hint}")
        for name in names:
            attention: Any
            attention, backbone = candidates[name]
            mask = GaussianMixtureMask(
                attention.num_heads,
                _grid_size(backbone),
                config.num_kernels,
                num_prefix_tokens=int(getattr(backbone, "num_prefix_tokens", 0)),
                init="identity",
                mode=config.mode,
            )
            self.add_site(name, mask.to(next(attention.parameters()).device))

    def install(self, model: nn.Module) -> None:
        for path in _find_backbones(model):
            self.link(model, f"{path}.patch_embed" if path else "patch_embed", ReadGrid(), slot="grid")
        for path in self.mask_paths:
            module = hooks.get_module(model, path)
            if any(not isinstance(link.action, MaskedAttention) for link in hooks.links_at(module)):
                raise InputError(
                    f"The attention at {path!r} is already replaced by another adapter; detach that one first."
                )
            self.link(model, path, MaskedAttention(hooks.unwrap(module), self.mask(path), self.config.attn_backend))

    @property
    def mask_paths(self) -> list[str]:
        """Paths of the masked attention modules."""
        return self.own_paths

    def mask(self, path: str) -> GaussianMixtureMask:
        """The mask of the attention at `path`."""
        return self.site(path)  # type: ignore[return-value]

    def bake(self) -> None:
        """Freeze all masks for the present grid; see `GaussianMixtureMask.bake`."""
        for path in self.mask_paths:
            self.mask(path).bake()

    def unbake(self) -> None:
        """Undo `bake()`."""
        for path in self.mask_paths:
            self.mask(path).unbake()


NO_ATTENTION = (
    "The {} has no timm ViT attention (timm.layers.Attention); Swin, BEiT, EVA, PiT and rope models have attention of their own. "
    "Use a 'vit_*' or 'deit_*' model."
)


def _is_timm_attention(module: nn.Module) -> bool:
    from timm.models.vision_transformer import Attention

    return type(module).forward is Attention.forward


def _find_backbones(model: nn.Module) -> dict[str, Any]:
    """The vision transformers in `model` (itself, or several inside it), by path."""
    found: dict[str, Any] = {}
    for path, module in hooks.named_plain_modules(model):
        if hasattr(getattr(module, "patch_embed", None), "grid_size") and not any(
            path.startswith(f"{p}.") for p in found
        ):
            found[path] = module
    if not found:
        raise InputError(
            f"'gmm' needs a timm vision transformer with a patch grid (`patch_embed.grid_size`), which a "
            f"{type(model).__name__} has not."
        )
    return found


def _grid_size(backbone: Any) -> tuple[int, int]:
    grid = backbone.patch_embed.grid_size
    if grid is None:
        raise InputError(
            "The backbone was built without img_size, so its patch grid is unknown; pass img_size= to create it."
        )
    return check_grid(tuple(grid))


class ReadGrid(hooks.Action):
    """At the patch embedding: notes the patch grid of the batch that is passing through in the context of the call."""

    def run(self, below: hooks.Below, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """timm gives `(B, rows, columns, C)` with `dynamic_img_size`, else `(B, N, C)` on the grid it was built for."""
        y = below(*args, **kwargs)
        context = current_context()
        if context is not None:
            context.grid = (y.shape[1], y.shape[2]) if y.dim() == 4 else None
        return y

    def blended(
        self, below: hooks.Below, args: tuple[Any, ...], kwargs: dict[str, Any], strength: hooks.Strength
    ) -> Tensor:
        return self.run(below, args, kwargs)  # nothing to blend: it only looks


class MaskedAttention(hooks.Action):
    """timm's attention with masked logits, computed by calling the module's own layers."""

    def __init__(self, module: nn.Module, mask: GaussianMixtureMask, backend: str):
        self.module, self.mask, self.backend = module, mask, backend
        self.modules = (mask,)

    def run(self, below: hooks.Below, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """`(B, N, C)` -> `(B, N, C)`; several gmm adapters on one attention multiply."""
        return self._attend(*args, **kwargs)

    def _attend(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        m: Any = self.module
        if is_causal:
            raise InputError("'gmm' masks act in both directions and cannot be combined with is_causal=True.")
        factor: Tensor | None = None
        for mask in self._masks_up_to_mine():
            matrix = self._matrix(mask, x.shape[1])
            if mask.mode == "bias":
                attn_mask = sum_masks(matrix.to(x.dtype), attn_mask, x.dtype)
            else:
                factor = matrix if factor is None else factor * matrix
        if factor is None:
            return type(m).forward(m, x, attn_mask=attn_mask)
        q, k, v = m.qkv(x).unflatten(-1, (3, m.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        dropout = m.attn_drop.p if m.training else 0.0
        out = masked_attention(
            m.q_norm(q),
            m.k_norm(k),
            v,
            factor,
            scale=m.scale,
            attn_mask=attn_mask,
            dropout_p=dropout,
            backend=self.backend,
        )
        out = out.transpose(1, 2).flatten(2)
        out = m.norm(out) if getattr(m, "norm", None) is not None else out
        if getattr(m, "gate", None) is not None:
            out = out * m.gate(x).sigmoid()
        return m.proj_drop(m.proj(out))

    def _masks_up_to_mine(self) -> list[GaussianMixtureMask]:
        """The masks of the gmm adapters that act here, the first attached first, up to this one."""
        masks = []
        for link in hooks.links_at(self.module):
            if isinstance(link.action, MaskedAttention) and link.owner.enabled:
                link.reached = True
                masks.append(link.action.mask)
            if link.action is self:
                break
        return masks

    def _matrix(self, mask: GaussianMixtureMask, tokens: int) -> Tensor:
        """The mask `(num_heads, N, N)` for the batch that is passing through."""
        context = current_context()
        extra = 0 if context is None else context.extra_tokens
        if context is not None and context.grid is not None and context.grid != mask.grid:
            mask.set_grid(context.grid)
        mask.check(self.module.num_heads, tokens - extra)  # type: ignore[arg-type]
        matrix = mask.matrix()
        # tokens that another adapter has put in front have no place on the grid, like the class token
        return F.pad(matrix, (extra, 0, extra, 0), value=0.0 if mask.mode == "bias" else 1.0) if extra else matrix
