"""Gaussian mixture masks on the attention of a pretrained timm ViT, as an adapter. See `mmkit.vision.gmm.masks`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mmkit.adapters import hooks
from mmkit.adapters.core import Adapter, AdapterConfig, register_adapter
from mmkit.adapters.sites import match_targets
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
        path, backbone = _find_backbone(model)
        prefix = f"{path}." if path else ""
        candidates = {
            p: m for p, m in hooks.named_plain_modules(model) if p.startswith(prefix) and _is_timm_attention(m)
        }
        names = list(candidates) if config.targets is None else match_targets(config.targets, list(candidates))
        if not names:
            hint = (
                nearest(str(config.targets), candidates) if candidates else NO_ATTENTION.format(type(backbone).__name__)
            )
            raise InputError(f"'gmm' matches no attention with targets={config.targets!r}. {hint}")
        for name in names:
            attention: Any = candidates[name]
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
        _, backbone = _find_backbone(model)
        reader = GridReader()
        hooks.add_hook(backbone.patch_embed, self, reader)
        for path in self.mask_paths:
            module = hooks.unwrap(hooks.get_module(model, path))
            present = module.__dict__.get("forward")
            if present is not None and not isinstance(present, MaskedForward):
                raise InputError(
                    f"The attention at {path!r} is already replaced by another adapter; detach that one first."
                )
            hooks.override_forward(MaskedForward(self, module, self.mask(path), reader, self.config.attn_backend))

    @property
    def mask_paths(self) -> list[str]:
        """Paths of the masked attention modules."""
        return [p for p in self.site_paths if p not in self._saved]

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
    "The {} has no timm ViT attention (timm.layers.Attention); Swin, BEiT, EVA and rope models have attention of their own. "
    "Use a 'vit_*' or 'deit_*' model."
)


def _is_timm_attention(module: nn.Module) -> bool:
    from timm.models.vision_transformer import Attention

    return type(module).forward is Attention.forward


def _find_backbone(model: nn.Module) -> tuple[str, Any]:
    for path, module in hooks.named_plain_modules(model):
        if hasattr(getattr(module, "patch_embed", None), "grid_size"):
            return path, module
    raise InputError(
        f"'gmm' needs a timm vision transformer with a patch grid (`patch_embed.grid_size`), which a "
        f"{type(model).__name__} has not."
    )


def _grid_size(backbone: Any) -> tuple[int, int]:
    grid = backbone.patch_embed.grid_size
    if grid is None:
        raise InputError(
            "The backbone was built without img_size, so its patch grid is unknown; pass img_size= to create it."
        )
    return check_grid(tuple(grid))


class GridReader:
    """Hook on the patch embedding: remembers the patch grid of the batch that is passing through."""

    def __init__(self) -> None:
        self.grid: tuple[int, int] | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """timm gives `(B, rows, columns, C)` with `dynamic_img_size`, else `(B, N, C)` on the fixed grid."""
        self.grid = (output.shape[1], output.shape[2]) if output.dim() == 4 else tuple(module.grid_size)  # type: ignore[arg-type]


class MaskedForward(hooks.ForwardOverride):
    """timm's attention with masked logits, computed by calling the module's own layers."""

    def __init__(self, owner: Any, module: nn.Module, mask: GaussianMixtureMask, reader: GridReader, backend: str):
        super().__init__(owner, module)
        self.mask, self.reader, self.backend = mask, reader, backend

    def run(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """`(B, N, C)` -> `(B, N, C)`; several gmm adapters on one attention multiply."""
        m: Any = self.module
        if is_causal:
            raise InputError("'gmm' masks act in both directions and cannot be combined with is_causal=True.")
        factor: Tensor | None = None
        layer: hooks.ForwardOverride | None = self
        while isinstance(layer, MaskedForward):
            if layer.owner.enabled:
                matrix = layer.current_matrix(x.shape[1])
                if layer.mask.mode == "bias":
                    attn_mask = sum_masks(matrix.to(x.dtype), attn_mask, x.dtype)
                else:
                    factor = matrix if factor is None else factor * matrix
            layer = layer.previous
        if factor is None:
            return type(m).forward(m, x, attn_mask=attn_mask)
        B, N, _ = x.shape
        q, k, v = m.qkv(x).reshape(B, N, 3, m.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
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
        out = out.transpose(1, 2).reshape(B, N, -1)
        out = m.norm(out) if getattr(m, "norm", None) is not None else out
        if getattr(m, "gate", None) is not None:
            out = out * m.gate(x).sigmoid()
        return m.proj_drop(m.proj(out))

    def current_matrix(self, tokens: int) -> Tensor:
        """The mask `(num_heads, N, N)` for the batch that is passing through."""
        m: Any = self.module
        if self.mask.training != m.training:
            self.mask.train(m.training)
        if self.reader.grid is not None and self.reader.grid != self.mask.grid:
            self.mask.set_grid(self.reader.grid)
        self.mask.check(m.num_heads, tokens)
        return self.mask.matrix()
