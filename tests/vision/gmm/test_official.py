"""Official checkpoints of all five backbones, against a plain functional form of each network in float64.

The functions below read and name weights as the authors' files do, and share no code with the package. Values and gradients
must agree after loading such a file through `load_official_checkpoint`.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from timm.scheduler import CosineLRScheduler

from mmkit.backbones.model import create_model, load_official_checkpoint
from mmkit.errors import CheckpointError
from mmkit.storage import write_safetensors


class Weights(dict):
    """An official state dict that makes up each tensor when it is first asked for; `frozen` holds the base masks."""

    def __init__(self, kernels=5):
        super().__init__()
        self.kernels, self.frozen = kernels, {}

    def __call__(self, key, *shape, scale=0.4, shift=0.0):
        if key not in self:
            self[key] = (shift + scale * torch.randn(shape)).double().requires_grad_()
        return self[key]

    def linear(self, x, key, width, bias=True):
        weight = self(f"{key}.weight", width, x.shape[-1], scale=x.shape[-1] ** -0.5)
        return F.linear(x, weight, self(f"{key}.bias", width) if bias else None)

    def conv(self, x, key, width, size, groups=1, **options):
        weight = self(f"{key}.weight", width, x.shape[1] // groups, size, size)
        return F.conv2d(x, weight, self(f"{key}.bias", width), groups=groups, **options)

    def norm(self, x, key):
        width = x.shape[-1]
        return F.layer_norm(x, (width,), self(f"{key}.weight", width, shift=1.0), self(f"{key}.bias", width))

    def mask(self, kind, key, heads, side, base):
        """The factor on the logits; `base` is where the network keeps the frozen base mask of this grid."""
        at = torch.arange(side * side)
        d2 = ((at[:, None] % side - at % side) ** 2 + (at[:, None] // side - at // side) ** 2).double()
        self.frozen[base] = torch.exp(-d2 / 2).float()[None, None]
        if kind == "elm":
            return self(f"{key}.mask", side**2, side**2)
        if kind == "none":
            return torch.ones(())
        self.frozen[f"{key}.mask"] = self.frozen[base]
        shape = (self.kernels, heads, 1, 1)
        alpha, sigma = self(f"{key}.alpha", *shape, scale=1.0), self(f"{key}.sigma", *shape, scale=2.0, shift=3.0)
        return (alpha * torch.exp(-d2 / (2 * (sigma**2 + 1e-5)))).sum(0)


def split(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join(x):
    return x.transpose(1, 2).flatten(2)


def feed_forward(w, x, key, hidden, names=("net.0", "net.3")):
    return w.linear(F.gelu(w.linear(x, f"{key}.{names[0]}", hidden)), f"{key}.{names[1]}", x.shape[-1])


def plain_attention(w, x, key, heads, head_dim, mask, prefix=0):
    q, k, v = (
        split(part, heads) for part in w.linear(x, f"{key}.to_qkv", 3 * heads * head_dim, bias=False).chunk(3, -1)
    )
    logits = q @ k.mT * head_dim**-0.5
    masked = logits.clone()
    masked[..., prefix:, prefix:] = logits[..., prefix:, prefix:] * mask
    out = join(masked.softmax(-1) @ v)
    return out if heads == 1 and head_dim == x.shape[-1] else w.linear(out, f"{key}.to_out.0", x.shape[-1])


def patches(w, images, patch, dim):
    """The linear embedding: pixels of a patch in (row, column, channel) order."""
    b, c, height, width = images.shape
    x = images.reshape(b, c, height // patch, patch, width // patch, patch).permute(0, 2, 4, 3, 5, 1)
    return w.linear(x.reshape(b, -1, patch * patch * c), "to_patch_embedding.1", dim)


def head(w, x, classes):
    return w.linear(w.norm(x, "mlp_head.0"), "mlp_head.1", classes)


def vit(w, images, c):
    x = patches(w, images, c["patch_size"], c["embed_dim"])
    side, prefix = c["img_size"] // c["patch_size"], int(c["mask"] == "none")
    if prefix:
        x = torch.cat([w("cls_token", 1, 1, c["embed_dim"]).expand(len(x), -1, -1), x], 1)
    x = x + w("pos_embedding", 1, *x.shape[1:])
    for i in range(c["depth"]):
        key = f"transformer.layers.{i}"
        mask = w.mask(c["mask"], f"{key}.0.fn.mask", c["num_heads"], side, "mask")
        y = w.norm(x, f"{key}.0.norm")
        x = x + plain_attention(w, y, f"{key}.0.fn", c["num_heads"], c["head_dim"], mask)
        x = x + feed_forward(w, w.norm(x, f"{key}.1.norm"), f"{key}.1.fn", 2 * c["embed_dim"])
    return head(w, x[:, 0] if prefix else x.mean(1), c["num_classes"])


def cait_layer(w, x, key, c, mask, context=None):
    heads, inner = c["num_heads"], c["num_heads"] * c["head_dim"]
    y = w.norm(x, f"{key}.0.fn.norm")
    q = split(w.linear(y, f"{key}.0.fn.fn.to_q", inner, bias=False), heads)
    source = y if context is None else context
    k, v = (split(t, heads) for t in w.linear(source, f"{key}.0.fn.fn.to_kv", 2 * inner, bias=False).chunk(2, -1))
    logits = q @ k.mT * c["head_dim"] ** -0.5 * mask
    for when in ("pre", "post"):
        logits = torch.einsum("bhij,hg->bgij", logits, w(f"{key}.0.fn.fn.mix_heads_{when}_attn", heads, heads))
        logits = logits.softmax(-1) if when == "pre" else logits
    y = w.linear(join(logits @ v), f"{key}.0.fn.fn.to_out.0", x.shape[-1])
    x = x + w(f"{key}.0.scale", 1, 1, x.shape[-1]) * y
    y = feed_forward(w, w.norm(x, f"{key}.1.fn.norm"), f"{key}.1.fn.fn", c["mlp_dim"])
    return x + w(f"{key}.1.scale", 1, 1, x.shape[-1]) * y


def cait(w, images, c):
    x = patches(w, images, c["patch_size"], c["embed_dim"])
    x = x + w("pos_embedding", 1, *x.shape[1:])
    for i in range(c["depth"]):
        key = f"patch_transformer.layers.{i}"
        side = c["img_size"] // c["patch_size"]
        x = cait_layer(w, x, key, c, w.mask(c["mask"], f"{key}.0.fn.fn.mask", c["num_heads"], side, "mask"))
    token = w("cls_token", 1, 1, c["embed_dim"]).expand(len(x), -1, -1)
    for i in range(c["cls_depth"]):
        token = cait_layer(w, token, f"cls_transformer.layers.{i}", c, torch.ones(()), context=x)
    return head(w, token[:, 0], c["num_classes"])


def pit(w, images, c):
    dim, patch = c["embed_dim"], c["patch_size"]
    x = w.conv(images, "to_patch_embedding.0", dim, patch, stride=patch)
    side = x.shape[-1]
    x = torch.cat([w("cls_token", 1, 1, dim).expand(len(x), -1, -1), x.flatten(2).mT], 1)
    x = x + w("pos_embedding", 1, *x.shape[1:])
    for stage, (depth, heads) in enumerate(zip(c["depths"], c["num_heads"], strict=True)):
        if stage:
            key, grid = f"layers.{2 * stage - 1}", x[:, 1:].mT.unflatten(2, (side, side))
            grid = w.conv(grid, f"{key}.downsample.net.0", 2 * dim, 3, groups=dim, stride=2, padding=1)
            grid = w.conv(grid, f"{key}.downsample.net.1", 2 * dim, 1)
            x = torch.cat([w.linear(x[:, :1], f"{key}.cls_ff", 2 * dim), grid.flatten(2).mT], 1)
            side, dim = grid.shape[-1], 2 * dim
        for i in range(depth):
            key = f"layers.{2 * stage}.layers.{i}"
            mask = w.mask(c["mask"], f"{key}.0.fn.mask", heads, side, f"layers.{2 * stage}.mask")
            y = w.norm(x, f"{key}.0.norm")
            x = x + plain_attention(w, y, f"{key}.0.fn", heads, c["head_dim"], mask, prefix=1)
            x = x + feed_forward(w, w.norm(x, f"{key}.1.norm"), f"{key}.1.fn", 2 * dim)
    return head(w, x[:, 0], c["num_classes"])


def window_attention(w, x, key, heads, window, shift, kind, bias=True):
    """Attention of every pixel to those of its (cyclically shifted) window, written for single pixels of a square map."""
    _, side, _, dim = x.shape
    q, k, v = (split(t, heads) for t in w.linear(x.flatten(1, 2), f"{key}.qkv", 3 * dim, bias).chunk(3, -1))
    logits = q @ k.mT * (dim // heads) ** -0.5
    rolled = (torch.arange(side) - shift) % side  # where a row lies after the roll
    row, column = rolled.repeat_interleave(side), rolled.repeat(side)
    inner = (row % window) * window + column % window
    mask = w.mask(kind, f"{key}.mask", heads, window, "mask")
    mask = mask[..., inner[:, None], inner] if mask.dim() else mask
    table = w(f"{key}.relative_position_bias_table", (2 * window - 1) ** 2, heads)
    dy, dx = (row % window)[:, None] - row % window, (column % window)[:, None] - column % window
    bias = table[(dy + window - 1) * (2 * window - 1) + dx + window - 1].permute(2, 0, 1)
    same = (row[:, None] // window == row // window) & (column[:, None] // window == column // window)
    wrapped = torch.arange(side) < shift  # rows that the roll carried to the other end
    wy, wx = wrapped.repeat_interleave(side), wrapped.repeat(side)
    apart = (wy[:, None] != wy) | (wx[:, None] != wx)
    logits = logits * mask + bias - 100.0 * apart
    weights = logits.masked_fill(~same, -math.inf).softmax(-1)
    return w.linear(join(weights @ v), f"{key}.proj", dim).unflatten(1, (side, side))


def swin(w, images, c):
    dim, patch = c["embed_dim"], c["patch_size"]
    x = w.conv(images, "patch_embed.proj", dim, patch, stride=patch).flatten(2).mT
    x = w.norm(x, "patch_embed.norm") if c.get("patch_norm", True) else x
    x = x + w("absolute_pos_embed", 1, *x.shape[1:])
    side = math.isqrt(x.shape[1])
    x = x.unflatten(1, (side, side))
    for stage, (depth, heads) in enumerate(zip(c["depths"], c["num_heads"], strict=True)):
        for i in range(depth):
            key, window = f"layers.{stage}.blocks.{i}", min(c["window_size"], side)
            shift = c["window_size"] // 2 if i % 2 and side > c["window_size"] else 0
            y = w.norm(x, f"{key}.norm1")
            x = x + window_attention(w, y, f"{key}.attn", heads, window, shift, c["mask"], c.get("qkv_bias", True))
            x = x + feed_forward(w, w.norm(x, f"{key}.norm2"), f"{key}.mlp", 2 * x.shape[-1], ("fc1", "fc2"))
            w.frozen[f"{key}.attn.relative_position_index"] = torch.zeros(window**2, window**2, dtype=torch.long)
            if shift:
                w.frozen[f"{key}.attn_mask"] = torch.zeros((side // window) ** 2, window**2, window**2)
        if stage < len(c["depths"]) - 1:
            x = torch.cat([x[:, y::2, z::2] for z in (0, 1) for y in (0, 1)], -1)
            x = w.norm(x, f"layers.{stage}.downsample.norm")
            x = w.linear(x, f"layers.{stage}.downsample.reduction", x.shape[-1] // 2, bias=False)
            side //= 2
    return w.linear(w.norm(x, "norm").mean((1, 2)), "head", c["num_classes"])


def t2t_attention(w, x, key, heads, width, mask, bias=False):
    y = w.norm(x, f"{key}.norm1")
    q, k, v = (split(t, heads) for t in w.linear(y, f"{key}.attn.qkv", 3 * width, bias).chunk(3, -1))
    weights = (q @ k.mT * (x.shape[-1] // heads) ** -0.5 * mask).softmax(-1)
    return w.linear(join(weights @ v), f"{key}.attn.proj", width) + (v[:, 0] if heads == 1 else y)


def t2t(w, images, c):
    x, names = images, ("fc1", "fc2")
    for i in range(2 if c["img_size"] == 64 else 1):
        x = F.unfold(x, 3, padding=1, stride=2).mT
        key, side = f"tokens_to_token.attention{i + 1}", math.isqrt(x.shape[1])
        mask = w.mask(c["mask"], f"{key}.attn.mask", 1, side, f"{key}.mask")
        x = t2t_attention(w, x, key, 1, c["token_dim"], mask)
        x = x + feed_forward(w, w.norm(x, f"{key}.norm2"), f"{key}.mlp", c["token_dim"], names)
        x = x.mT.unflatten(2, (side, side))
    x = w.linear(F.unfold(x, 3, padding=1, stride=2).mT, "tokens_to_token.project", c["embed_dim"])
    side = math.isqrt(x.shape[1])
    rate = 10000.0 ** (-torch.arange(0, c["embed_dim"], 2).double() / c["embed_dim"])
    angle = torch.arange(x.shape[1]).double()[:, None] * rate
    w.frozen["pos_embed"] = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[None].float()
    x = x + w.frozen["pos_embed"]
    for i in range(c["depth"]):
        key = f"blocks.{i}"
        mask = w.mask(c["mask"], f"{key}.attn.mask", c["num_heads"], side, "mask")
        x = x + t2t_attention(w, x, key, c["num_heads"], c["embed_dim"], mask, c.get("qkv_bias", False))
        x = x + feed_forward(w, w.norm(x, f"{key}.norm2"), f"{key}.mlp", 2 * c["embed_dim"], names)
    for suffix in ("weight", "bias"):  # unused by the official network
        w.frozen[f"tokens_to_token.norm.{suffix}"] = torch.ones(9 * c["token_dim"])
    w.frozen["cls_token"] = torch.zeros(1, 1, c["embed_dim"])
    return w.linear(w.norm(x, "norm").mean(1), "head", c["num_classes"])


VIT = {"img_size": 24, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3, "head_dim": 5}
CAIT = {
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 10,
    "depth": 2,
    "cls_depth": 2,
    "num_heads": 3,
    "head_dim": 4,
    "mlp_dim": 14,
}
PIT = {"img_size": 28, "patch_size": 4, "embed_dim": 6, "depths": [1, 2, 1], "num_heads": [1, 2, 3], "head_dim": 6}
SWIN = {"img_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 3], "num_heads": [2, 4], "window_size": 4}
T2T = {"img_size": 16, "embed_dim": 12, "depth": 2, "num_heads": 3, "token_dim": 6}
CASES = [
    ("gmm_vit", vit, VIT, 3),
    ("gmm_vit", vit, {**VIT, "depth": 11, "in_chans": 1}, 1),
    ("gmm_vit", vit, {**VIT, "num_heads": 1, "head_dim": 12}, 5),
    ("gmm_vit", vit, {**VIT, "img_size": 64, "patch_size": 4, "depth": 1}, 2),
    ("gmm_vit", vit, {**VIT, "mask": "elm"}, 5),
    ("gmm_vit", vit, {**VIT, "mask": "none"}, 5),
    ("gmm_cait", cait, CAIT, 4),
    ("gmm_cait", cait, {**CAIT, "depth": 12, "cls_depth": 1, "num_heads": 1}, 2),
    ("gmm_cait", cait, {**CAIT, "mask": "elm"}, 5),
    ("gmm_cait", cait, {**CAIT, "mask": "none"}, 5),
    ("gmm_pit", pit, PIT, 2),
    ("gmm_pit", pit, {**PIT, "mask": "elm"}, 5),
    ("gmm_pit", pit, {**PIT, "mask": "none"}, 5),
    ("gmm_swin", swin, SWIN, 3),
    ("gmm_swin", swin, {**SWIN, "window_size": 2, "depths": [2, 2, 2], "num_heads": [1, 2, 4], "in_chans": 2}, 2),
    ("gmm_swin", swin, {**SWIN, "mask": "none", "window_size": 6, "img_size": 24, "depths": [2, 2]}, 5),
    ("gmm_swin", swin, {**SWIN, "qkv_bias": False, "patch_norm": False}, 1),
    ("gmm_t2t", t2t, T2T, 3),
    ("gmm_t2t", t2t, {**T2T, "qkv_bias": True}, 1),
    ("gmm_t2t", t2t, {**T2T, "img_size": 64, "depth": 1}, 2),
    ("gmm_t2t", t2t, {**T2T, "mask": "elm"}, 5),
    ("gmm_t2t", t2t, {**T2T, "img_size": 64, "depth": 1, "mask": "none"}, 5),
]


def official_case(reference, settings, kernels):
    """(settings, images, official state dict, logits and gradients of the reference)."""
    torch.manual_seed(0)
    settings = {"num_classes": 4, "mask": "gmm", "in_chans": 3, **settings}
    images = torch.randn(2, settings["in_chans"], settings["img_size"], settings["img_size"]).double()
    weights = Weights(kernels)
    logits = reference(weights, images, settings)
    logits.square().sum().backward()
    return settings, images, weights, logits.detach()


def file_content(weights):
    return {**{k: v.detach().float() for k, v in weights.items()}, **weights.frozen}


@pytest.mark.parametrize(("name", "reference", "settings", "kernels"), CASES)
def test_values_and_gradients_equal_the_plain_form(name, reference, settings, kernels, tmp_path):
    settings, images, weights, expected = official_case(reference, settings, kernels)
    path = tmp_path / "checkpoint.pth"
    torch.save(file_content(weights), path)
    model = load_official_checkpoint(create_model(name, num_kernels=kernels, **settings), path).double()
    logits = model(images)
    torch.testing.assert_close(logits, expected, atol=1e-9, rtol=1e-9)
    logits.square().sum().backward()
    gradients = model.official_state({k: v.grad for k, v in weights.items()})
    own = dict(model.named_parameters())
    for key, gradient in gradients.items():
        torch.testing.assert_close(own[key].grad, gradient, atol=1e-9, rtol=1e-7, msg=lambda m, key=key: f"{key}: {m}")
    assert {k for k, p in own.items() if p.grad is not None} == set(gradients)


@pytest.mark.parametrize("name", ["gmm_vit", "gmm_swin"])
def test_both_file_layouts_of_a_training_run_load(name, tmp_path):
    """checkpoint.pth and best.pth hold the model beside optimiser and schedule; the last file is the bare state dict."""
    reference, settings = (vit, VIT) if name == "gmm_vit" else (swin, SWIN)
    settings, images, weights, expected = official_case(reference, settings, 3)
    content = file_content(weights)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    schedule = CosineLRScheduler(optimizer, t_initial=100, lr_min=1e-6, warmup_t=10, warmup_lr_init=1e-6)
    torch.save(
        {
            "model_state_dict": content,
            "epoch": 7,
            "optimizer_state_dict": optimizer.state_dict(),
            "scheduler": schedule.state_dict(),
        },
        tmp_path / "best.pth",
    )
    torch.save(content, tmp_path / "bare.pth")
    torch.save({f"module.{k}": v for k, v in content.items()}, tmp_path / "parallel.pth")
    write_safetensors(tmp_path / "converted.safetensors", content)
    for path in tmp_path.iterdir():
        model = load_official_checkpoint(create_model(name, num_kernels=3, **settings), path)
        torch.testing.assert_close(model.double()(images), expected, atol=1e-9, rtol=1e-9)


def test_a_file_that_does_not_fit_names_the_keys_and_loads_nothing(tmp_path):
    settings, _, weights, _ = official_case(vit, VIT, 3)
    path = tmp_path / "best.pth"
    content = file_content(weights)
    for change, words in (
        ({}, "another shape.*alpha"),  # other number of Gaussians
        ({"mask": torch.ones(36, 36)}, "unexpected.*mask"),  # not the frozen base mask, which has four dimensions
        ({"extra.weight": torch.ones(1)}, "unexpected.*extra"),
    ):
        torch.save({**content, **change}, path)
        model = create_model("gmm_vit", num_kernels=3 if change else 4, **settings)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(CheckpointError, match=f"(?s){words}"):
            load_official_checkpoint(model, path)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    torch.save({k: v for k, v in content.items() if not k.endswith("sigma")}, path)
    with pytest.raises(CheckpointError, match=r"missing.*sigma"):
        load_official_checkpoint(create_model("gmm_vit", num_kernels=3, **settings), path)
