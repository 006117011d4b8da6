"""Taking SqueezeSAM elsewhere: int8 weight files and an exported program of the network without the prompt painting.

The official order convolution, activation, norm cannot be fused by int8 tools (the norm follows the activation), so int8 here is
weight-only: symmetric per output channel, computed in float. Models built with `norm_first=True` suit full int8 tools.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from mmkit.errors import CheckpointError
from mmkit.storage import load_state, read_tensors, write_safetensors
from mmkit.storage.exports import write_onnx
from mmkit.vision.clicks.model import SqueezeSAM

_SCALE = ".int8_scale"


def quantize_weights(model: SqueezeSAM) -> dict[str, Tensor]:
    """The state dict with every convolution and linear weight as int8 and a float16 scale per output channel.

    Returns:
        Tensors by key; `<key>.int8_scale` beside each int8 weight. Everything else is float16, integers stay.
    """
    weights = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    out: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        if key in weights:
            flat = value.float().flatten(1)
            scale = (flat.abs().amax(dim=1) / 127).clamp(min=6e-8).half()
            out[key] = (flat / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8).view_as(value)
            out[key + _SCALE] = scale
        else:
            out[key] = value.half() if value.is_floating_point() else value
    return out


def save_int8(model: SqueezeSAM, path: str | os.PathLike[str]) -> Path:
    """Write the weights as int8 safetensors with the configuration in the header: a quarter of the float32 file."""
    path = Path(path)
    write_safetensors(path, quantize_weights(model), {"squeeze_sam_config": json.dumps(model.config)})
    return path


def load_int8(path: str | os.PathLike[str]) -> SqueezeSAM:
    """Build the model a `save_int8` file describes, with its weights decoded to float32.

    Raises:
        CheckpointError: unreadable, or not such a file.
    """
    stored = read_tensors(path, allow_pickle_format=False)
    from safetensors import safe_open

    with safe_open(os.fspath(path), "pt") as file:
        config = (file.metadata() or {}).get("squeeze_sam_config")
    if config is None:
        raise CheckpointError(f"{path} was not written by save_int8: its header holds no SqueezeSAM configuration.")
    model = SqueezeSAM(**json.loads(config))
    state = {}
    for key, value in stored.items():
        if key.endswith(_SCALE):
            continue
        if key + _SCALE in stored:
            scale = stored[key + _SCALE].float()
            value = value.float() * scale.view(-1, *[1] * (value.ndim - 1))
        state[key] = value.float() if value.is_floating_point() else value
    load_state(model, state, source=str(path))
    return model.eval()


class FusedNetwork(nn.Module):
    """`forward_fused` of a model without late fusion as a plain module: fused input to low-resolution logits and IoU."""

    def __init__(self, model: SqueezeSAM):
        super().__init__()
        self.model = model

    def forward(self, fused: Tensor) -> tuple[Tensor, Tensor]:
        """`(N, in_chans, S, S)` to logits `(N, M + 1, s, s)` and IoU `(N, M + 1)`."""
        return self.model.forward_fused(fused)


def export_program(model: SqueezeSAM, *, dynamic_batch: bool = True) -> torch.export.ExportedProgram:
    """`torch.export` of the network without the prompt painting; the batch axis counts prompts."""
    example = torch.zeros(2, model.in_chans, model.img_size, model.img_size)
    shapes = ({0: torch.export.Dim("prompts", min=1, max=64)},) if dynamic_batch else None
    return torch.export.export(FusedNetwork(model).eval(), (example,), dynamic_shapes=shapes)


def export_onnx(model: SqueezeSAM, path: str | os.PathLike[str]) -> Path:
    """Write the same network as an ONNX file with inputs "fused" and outputs "logits", "iou"; see `mmkit.storage.exports.write_onnx`."""
    example = torch.zeros(2, model.in_chans, model.img_size, model.img_size)
    write_onnx(FusedNetwork(model), [example], path, inputs=["fused"], outputs=["logits", "iou"])
    return Path(path).expanduser()
