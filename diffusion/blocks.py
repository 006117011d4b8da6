"""The transformer blocks of denoisers, in the models of diffusers and in facebookresearch/DiT: where adapters act."""

from __future__ import annotations

from torch import nn

from mmkit.adapters import hooks

_BLOCK_LISTS = {  # class name -> the lists of blocks, in the order in which they run
    "DiTTransformer2DModel": ("transformer_blocks",),
    "PixArtTransformer2DModel": ("transformer_blocks",),
    "SD3Transformer2DModel": ("transformer_blocks",),
    "FluxTransformer2DModel": ("transformer_blocks", "single_transformer_blocks"),
    "Flux2Transformer2DModel": ("transformer_blocks", "single_transformer_blocks"),
    "QwenImageTransformer2DModel": ("transformer_blocks",),
    "ZImageTransformer2DModel": ("noise_refiner", "context_refiner", "layers"),
    "SanaTransformer2DModel": ("transformer_blocks",),
    "Lumina2Transformer2DModel": ("noise_refiner", "context_refiner", "layers"),
    "DiT": ("blocks",),  # facebookresearch/DiT and its kin
}
_UNETS = ("UNet2DConditionModel",)
_MODULATION = ("adaLN_modulation", "img_mod", "txt_mod")


def supported() -> list[str]:
    """Names of the classes whose blocks are known."""
    return [*_BLOCK_LISTS, *_UNETS]


def blocks_of(model: nn.Module) -> list[str]:
    """Paths of all blocks, in the order in which they run; empty for a model that is not known."""
    found: list[str] = []
    for path, module in hooks.named_plain_modules(model):
        names = {cls.__name__ for cls in type(module).__mro__}
        prefix = f"{path}." if path else ""
        for name in names & set(_BLOCK_LISTS):
            lists = [(k, module._modules.get(k)) for k in _BLOCK_LISTS[name]]
            found += [f"{prefix}{k}.{i}" for k, blocks in lists if blocks is not None for i in range(len(blocks))]  # type: ignore[arg-type]
        if names & set(_UNETS):
            inner = [p for p, m in module.named_modules() if type(m).__name__ == "BasicTransformerBlock"]
            order = ("down_blocks", "mid_block", "up_blocks")
            found += [prefix + p for part in order for p in inner if p.startswith(f"{part}.")]
    return found


def is_inner_linear(path: str, modulation: bool) -> bool:
    """Whether the layer at `path` inside a block belongs to attention or MLP, or with `modulation` to the modulation."""
    parts = path.split(".")
    if "emb" in parts:
        return False  # a copy of the timestep embedder
    return modulation or not any(part.startswith("norm") or part in _MODULATION for part in parts)
