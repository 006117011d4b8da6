"""A pyramid written a second time, in float64 and from the paper's formulas alone, to hold ours against; no module of ours is used."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]


def linear(s: State, name: str, x: Tensor) -> Tensor:
    y = x @ s[f"{name}.weight"].T
    return y + s[f"{name}.bias"] if f"{name}.bias" in s else y


def layer_norm(s: State, name: str, x: Tensor, eps: float = 1e-6) -> Tensor:
    if f"{name}.weight" not in s:
        return x
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * s[f"{name}.weight"] + s[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Multi-head attention of (N, d) on (M, d), one head after another."""
    out = []
    for a, b, c in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        out.append((a @ b.T / math.sqrt(a.shape[-1])).softmax(-1) @ c)
    return torch.cat(out, -1)


def block(s: State, name: str, x: Tensor, grid: tuple[int, int], heads: int, window: int, pad_keys: bool) -> Tensor:
    """A vision transformer's block on (N, d) tokens."""
    y = layer_norm(s, f"{name}.norm1", x)
    if window:
        attended = windowed(s, f"{name}.attn", y, grid, heads, window, pad_keys)
    else:
        q, k, v = linear(s, f"{name}.attn.qkv", y).chunk(3, -1)
        attended = attend(q, k, v, heads)
    x = x + linear(s, f"{name}.attn.proj", attended) * s.get(f"{name}.ls1.gamma", 1.0)
    y = linear(s, f"{name}.mlp.fc2", gelu(linear(s, f"{name}.mlp.fc1", layer_norm(s, f"{name}.norm2", x))))
    return x + y * s.get(f"{name}.ls2.gamma", 1.0)


def windowed(s: State, name: str, x: Tensor, grid: tuple[int, int], heads: int, window: int, pad_keys: bool) -> Tensor:
    height, width = grid
    out = torch.zeros_like(x)
    for top in range(0, height, window):
        for left in range(0, width, window):
            inside = [
                i * width + j for i in range(top, top + window) for j in range(left, left + window) if i < height and j < width
            ]  # fmt: skip
            missing = window * window - len(inside)
            q, k, v = linear(s, f"{name}.qkv", x[inside]).chunk(3, -1)
            extra = torch.zeros(missing, q.shape[-1], dtype=x.dtype)
            filling = [extra, extra] if pad_keys else linear(s, f"{name}.qkv", extra).chunk(3, -1)[1:]
            out[inside] = attend(q, torch.cat([k, filling[0]]), torch.cat([v, filling[1]]), heads)
    return out


def sample(maps: Tensor, x: float, y: float) -> Tensor:
    """Bilinear value of (H, W, d) at a place in cells, zero outside; cell centres are at whole numbers."""
    total = torch.zeros(maps.shape[-1], dtype=maps.dtype)
    for i in (math.floor(y), math.floor(y) + 1):
        for j in (math.floor(x), math.floor(x) + 1):
            if 0 <= i < maps.shape[0] and 0 <= j < maps.shape[1]:
                total = total + (1 - abs(y - i)) * (1 - abs(x - j)) * maps[i, j]
    return total


def deformable(
    s: State, name: str, q: Tensor, f: Tensor, gq: tuple[int, int], gf: tuple[int, int], heads: int, points: int
) -> Tensor:
    """Deformable attention, place by place."""
    value = linear(s, f"{name}.value_proj", f)
    offsets = linear(s, f"{name}.sampling_offsets", q).view(len(q), heads, points, 2)
    weights = linear(s, f"{name}.attention_weights", q).view(len(q), heads, points).softmax(-1)
    maps = value.view(*gf, heads, -1)
    rows = []
    for n in range(len(q)):
        centre = ((n % gq[1] + 0.5) / gq[1] * gf[1] - 0.5, (n // gq[1] + 0.5) / gq[0] * gf[0] - 0.5)
        row = []
        for m in range(heads):
            looks = [
                weights[n, m, k] * sample(maps[:, :, m], centre[0] + float(offsets[n, m, k, 0]), centre[1] + float(offsets[n, m, k, 1]))
                for k in range(points)
            ]  # fmt: skip
            row.append(torch.stack(looks).sum(0))
        rows.append(torch.cat(row))
    return linear(s, f"{name}.output_proj", torch.stack(rows))


def inject(s: State, name: str, q: Tensor, f: Tensor, gq: Any, gf: Any, config: Any) -> Tensor:
    a, b = layer_norm(s, f"{name}.query_norm", q), layer_norm(s, f"{name}.feat_norm", f)
    if config.attention == "deform":
        attended = deformable(s, f"{name}.attn", a, b, gq, gf, config.num_heads, config.num_points)
    else:
        queries, keys, values = (linear(s, f"{name}.attn.{w}", t) for w, t in (("wq", a), ("wk", b), ("wv", b)))
        attended = linear(s, f"{name}.attn.proj", attend(queries, keys, values, config.num_heads))
    q = q + s[f"{name}.ca_gamma"] * attended
    if f"{name}.cffn_gamma" not in s:
        return q
    h = linear(s, f"{name}.ffn.fc1", layer_norm(s, f"{name}.ffn_norm", q))
    return q + s[f"{name}.cffn_gamma"] * linear(
        s, f"{name}.ffn.fc2", gelu(depthwise(s, f"{name}.ffn.dwconv.dwconv", h, gq))
    )


def depthwise(s: State, name: str, x: Tensor, grid: tuple[int, int]) -> Tensor:
    kernel, maps, out = s[f"{name}.weight"][:, 0], x.view(*grid, -1), torch.zeros_like(x).view(*grid, -1)
    for i in range(grid[0]):
        for j in range(grid[1]):
            for u in range(3):
                for v in range(3):
                    if 0 <= i + u - 1 < grid[0] and 0 <= j + v - 1 < grid[1]:
                        out[i, j] += kernel[:, u, v] * maps[i + u - 1, j + v - 1]
    return (out + s[f"{name}.bias"]).view(x.shape)


def shrink(x: Tensor, height: int, width: int) -> Tensor:
    """Bilinear resize of (C, H, W) without blur."""
    rows = []
    for i in range(height):
        for j in range(width):
            y = min(max((i + 0.5) * x.shape[1] / height - 0.5, 0), x.shape[1] - 1)
            z = min(max((j + 0.5) * x.shape[2] / width - 0.5, 0), x.shape[2] - 1)
            rows.append(sample(x.permute(1, 2, 0), z, y))
    return torch.stack(rows).view(height, width, -1).permute(2, 0, 1)


def branches(state: State, picture: Tensor, config: Any, heads: list[int], patch: int) -> list[tuple[Tensor, Any]]:
    """Patch tokens (N, d) and grid of every branch for one picture (C, H, W)."""
    sizes = [b.img_size for b in config.branches]
    found: list[list[Any]] = []
    for n, size in enumerate(sizes, 1):
        small = shrink(picture, picture.shape[1] * size // sizes[-1], picture.shape[2] * size // sizes[-1])
        grid = (small.shape[1] // patch, small.shape[2] // patch)
        pieces = small.view(3, grid[0], patch, grid[1], patch).permute(1, 3, 0, 2, 4).flatten(2).flatten(0, 1)
        weight = state[f"branch{n}.patch_embed.proj.weight"]
        x = pieces @ weight.flatten(1).T + state[f"branch{n}.patch_embed.proj.bias"] + state[f"branch{n}.pos_embed"][0]
        found.append([x, grid])
    for k in range(len(config.branches[0].interaction_indexes)):
        for n, branch in enumerate(config.branches, 1):
            first, last = branch.interaction_indexes[k]
            for b in range(first, last + 1):
                x, grid = found[n - 1]
                found[n - 1][0] = block(
                    state, f"branch{n}.blocks.{b}", x, grid, heads[n - 1], branch.window_of(b), branch.pad_keys
                )
        for n in range(len(found) - 1, 0, -1):
            (a, ga), (b, gb) = found[n - 1], found[n]
            unit = f"interactions.{k}.interaction_units_{n}{n + 1}"
            fa = linear(state, f"{unit}.branch1to2_proj", a) if f"{unit}.branch1to2_proj.weight" in state else a
            fb = linear(state, f"{unit}.branch2to1_proj", b) if f"{unit}.branch2to1_proj.weight" in state else b
            if config.direction != "to_smaller":
                found[n - 1][0] = inject(state, f"{unit}.branch2to1_injector", a, fb, ga, gb, config)
            if config.direction != "to_larger":
                found[n][0] = inject(state, f"{unit}.branch1to2_injector", b, fa, gb, ga, config)
    return [(x, grid) for x, grid in found]
