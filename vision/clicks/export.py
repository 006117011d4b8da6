"""Taking click models elsewhere: ClickNet as two ONNX files, SqueezeSAM as one without the prompt painting, and int8 weight files.

The official order of SqueezeSAM, convolution, activation, norm, cannot be fused by int8 tools (the norm follows the activation), so int8
here is weight-only: symmetric per output channel, computed in float. Models built with `norm_first=True` suit full int8 tools.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkit.errors import CheckpointError
from mmkit.storage import load_state, read_tensors, write_safetensors
from mmkit.storage.exports import Answers, write_onnx
from mmkit.storage.files import expanded
from mmkit.storage.folders import new_folder
from mmkit.vision.clicks.clicknet import STRIDES, ClickNet, View
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
    return expanded(path)


class ClickEncoder(nn.Module):
    """The half of a `ClickNet` that sees a picture once."""

    def __init__(self, model: ClickNet):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """`(B, 4, S, S)` of `ClickNet.preprocess` to the features at `STRIDES`, `(B, C, S / stride, S / stride)`."""
        return tuple(self.model.encode(image).features)


class ClickDecoder(nn.Module):
    """The half of a `ClickNet` that answers a prompt."""

    def __init__(self, model: ClickNet):
        super().__init__()
        self.model = model

    def forward(
        self, image: Tensor, half: Tensor, fourth: Tensor, eighth: Tensor, sixteenth: Tensor, last: Tensor,
        points: Tensor, labels: Tensor, previous: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The image again, its features, and points, labels and previous logits of N prompts: see `ClickNet.decode`."""
        seen = F.avg_pool2d(image, 2)
        features = [half, fourth, eighth, sixteenth, last]
        view = View(features, seen[:, :3], F.avg_pool2d(seen[:, :3], 2), seen[:, 3:])
        return self.model.decode(view, points, labels, previous)


def export_clicknet(model: ClickNet, path: str | os.PathLike[str]) -> Path:
    """Write a folder with `encoder.onnx`, which sees a picture once, and `decoder.onnx`, which answers clicks and boxes.

    encoder: "image" `(B, 4, S, S)`, S the model's `img_size`: RGB in -1..1, scaled so that the longer side is S, at the upper left; the
    fourth channel is 1 there and all are 0 elsewhere. It gives "stride2" to "stride32".

    decoder: "image", "stride2" to "stride32", "points" `(N, P, 2)` x, y in the square's pixels, "labels" int64 `(N, P)`: 1 inside, 0
    outside, 2 and 3 corners of a box, -1 nothing; "previous" `(N, 1, S / 2, S / 2)`: the logits that were shown, NaN where there were
    none. It gives "masks" `(N, M, S / 2, S / 2)`, logits that are positive inside, and "iou" `(N, M)`, the model's own estimates.

    Both are compared with the model, for several numbers of prompts and points. Cropping for a closer look (what
    `InteractiveSegmenter` does from the first mask on) stays with the caller: the crop is another image for the encoder.

    Returns:
        The folder. Raises what `write_onnx` and `mmkit.storage.folders.new_folder` raise; nothing is written then.
    """
    strides, rows = [f"stride{s}" for s in STRIDES], [_prompted(model, *shape) for shape in ((2, 3), (1, 1), (3, 5))]
    encoder, decoder = ClickEncoder(model), ClickDecoder(model)
    with torch.no_grad():
        answers: Answers = [(row, list(decoder(*row))) for row in rows]
    facts = {"img_size": model.img_size, "num_masks": model.num_masks}
    folder = expanded(path)
    with new_folder(folder, "click model for onnxruntime", facts) as draft:
        write_onnx(encoder, [rows[0][0]], draft / "encoder.onnx", inputs=["image"], outputs=strides)
        write_onnx(
            decoder, rows[0], draft / "decoder.onnx", inputs=["image", *strides, "points", "labels", "previous"],
            outputs=["masks", "iou"], answers=answers, dynamic_axes=[(0,)] * 6 + [(0, 1), (0, 1), (0,)],
        )  # fmt: skip
    return folder


def _prompted(model: ClickNet, count: int, points: int) -> list[Tensor]:
    """What the decoder reads, for `count` prompts of `points` points, of every kind; the first has no mask before it."""
    size = model.img_size
    generator = torch.Generator().manual_seed(count)
    image = torch.rand(count, 4, size, size, generator=generator) * 2 - 1
    image[:, 3] = 1
    image[..., -size // 8 :, :] = 0
    at = torch.rand(count, points, 2, generator=generator) * size
    labels = torch.tensor([1, 0, -1, 2, 3]).repeat(count, 1)[:, :points]
    previous = torch.randn(count, 1, size // 2, size // 2, generator=generator)
    previous[0] = torch.nan
    with torch.no_grad():
        return [image, *ClickEncoder(model)(image), at, labels, previous]
