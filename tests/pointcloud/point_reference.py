"""Point-MAE and Point-PEFT written a second time, cloud by cloud, in float64 and from the papers' formulas alone; nothing of ours is used.

`s` is the state of the model; `own` that of the adapter. A cloud is (N, 3), tokens are (G, D).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

State = dict[str, Tensor]


def linear(s: State, name: str, x: Tensor) -> Tensor:
    y = x @ s[f"{name}.weight"].T
    return y + s[f"{name}.bias"] if f"{name}.bias" in s else y


def layer_norm(s: State, name: str, x: Tensor) -> Tensor:
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return x * s[f"{name}.weight"] + s[f"{name}.bias"]


def batch_norm(s: State, name: str, x: Tensor) -> Tensor:
    x = (x - s[f"{name}.running_mean"]) / (s[f"{name}.running_var"] + 1e-5).sqrt()
    return x * s[f"{name}.weight"] + s[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def attend(qkv: Tensor, heads: int, scale: float) -> Tensor:
    """(N, 3 d) -> (N, d), one head after another."""
    q, k, v = (t.chunk(heads, -1) for t in qkv.chunk(3, -1))
    return torch.cat([(a @ b.T * scale).softmax(-1) @ c for a, b, c in zip(q, k, v, strict=True)], -1)


def grouped(x: Tensor, groups: int, size: int, skip_origin: bool) -> tuple[list[int], list[list[int]]]:
    """Farthest points from the first one on, and the nearest of each."""
    nearest, chosen = torch.full((len(x),), math.inf, dtype=x.dtype), [0]
    if skip_origin:
        nearest[x.square().sum(-1) <= 1e-3] = -1
    while len(chosen) < groups:
        nearest = torch.minimum(nearest, (x - x[chosen[-1]]).square().sum(-1))
        chosen.append(int(nearest.argmax()))
    return chosen, [(x - x[c]).square().sum(-1).argsort()[:size].tolist() for c in chosen]


def tokens(s: State, x: Tensor, centres: list[int], members: list[list[int]]) -> Tensor:
    """A small PointNet on every group."""
    found = []
    for c, m in zip(centres, members, strict=True):
        f = batch_norm(s, "encoder.first_conv.1", linear(s, "encoder.first_conv.0", x[m] - x[c])).relu()
        f = linear(s, "encoder.first_conv.3", f)
        f = torch.cat([f.amax(0).expand_as(f), f], -1)
        f = batch_norm(s, "encoder.second_conv.1", linear(s, "encoder.second_conv.0", f)).relu()
        found.append(linear(s, "encoder.second_conv.3", f).amax(0))
    found = torch.stack(found)
    return linear(s, "reduce_dim", found) if "reduce_dim.weight" in s else found


def position(s: State, x: Tensor) -> Tensor:
    return linear(s, "pos_embed.2", gelu(linear(s, "pos_embed.0", x)))


def halves(s: State, name: str, x: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Tokens after the attention of a block, and what its MLP makes of them."""
    qkv = linear(s, f"{name}.attn.qkv", layer_norm(s, f"{name}.norm1", x))
    x = x + linear(s, f"{name}.attn.proj", attend(qkv, heads, (x.shape[-1] / heads) ** -0.5))
    return x, linear(s, f"{name}.mlp.fc2", gelu(linear(s, f"{name}.mlp.fc1", layer_norm(s, f"{name}.norm2", x))))


def global_feature(s: State, t: Tensor, pos: Tensor, depth: int, heads: int) -> Tensor:
    """The frozen encoder without a class token."""
    for i in range(depth):
        t, f = halves(s, f"blocks.{i}", t + pos, heads)
        t = t + f
    return layer_norm(s, "norm", t).amax(0)


def bottleneck(own: State, name: str, z: Tensor) -> Tensor:
    u = linear(own, f"{name}.down", z)
    return linear(own, f"{name}.up", u * torch.sigmoid(1.702 * u))


def prior(own: State, query: Tensor, count: int) -> Tensor:
    """The query, the mean of what the bank finds, and what it finds."""
    bank = own["group.bank"].T
    value, index = (bank @ (query / query.norm())).sort(descending=True)
    value, index = value[: count - 2], index[: count - 2]
    return torch.cat([query[None], value.softmax(0)[None] @ bank[index], bank[index]])


def head(s: State, x: Tensor) -> Tensor:
    """Linear layers with batch norms between them, as their numbers in the sequence tell."""
    layers = sorted({int(k.split(".")[1]) for k in s if k.startswith("head.")})
    for i in layers:
        x = batch_norm(s, f"head.{i}", x).relu() if f"head.{i}.running_mean" in s else linear(s, f"head.{i}", x)
        x = x.relu() if len(layers) == 2 and i == 0 else x  # Point-BERT's has no norm
    return x


def point_peft(s: State, own: State, x: Tensor, c: dict, prompts: int, prompt_depth: int) -> Tensor:
    """Logits of one cloud; `c` is the model's configuration."""
    heads, depth = c["num_heads"], c["depth"]
    centres, members = grouped(x, c["num_groups"], c["group_size"], c["skip_origin"])
    t, centre = tokens(s, x, centres, members), x[centres]
    pos = position(s, centre)
    memory = prior(own, global_feature(s, t, pos, depth, heads), prompts) if "group.bank" in own else None
    second, near = grouped(centre, len(centre) // 2, c["group_size"] // 2, c["skip_origin"])
    weight = 1 / ((centre[:, None] - centre[second][None]).square().sum(-1) + 1e-8)
    weight = weight / weight.sum(1, keepdim=True)
    tuned = s | {k: v for k, v in own.items() if k.startswith(("cls.", "head.", "norm."))}
    for k, v in own.items():
        if k.endswith(".delta"):
            tuned[k.replace(".delta", ".bias")] = s[k.replace(".delta", ".bias")] + v
    cls = tuned["cls.token"][0]
    for i in range(depth):
        name = f"blocks.{i}"
        extra = t[:0]
        if i < prompt_depth:
            extra = own[f"{name}.prompts"]
            if memory is not None:
                extra = extra + memory + bottleneck(own, f"{name}.prompt_adapter", memory)
        y, f = halves(tuned, name, torch.cat([cls + tuned["cls.pos"][0], extra, t + pos]), heads)
        y = y + f + 0.7 * bottleneck(own, f"{name}.drop_path2.adapter", f)
        cls, t = y[:1], y[1 + len(extra) :]
        said = []
        for member, middle in zip(near, second, strict=True):
            n = t[member]
            qkv = linear(own, "blocks.qkv", layer_norm(own, "blocks.norm", n))
            n = n + linear(own, "blocks.proj", attend(qkv, 6, (qkv.shape[-1] / 3) ** -0.5))
            said.append(gelu(batch_norm(own, f"{name}.norm", n.amax(0))) + 0.3 * t[middle])
        t = t + 0.3 * weight @ torch.stack(said) * own.get(f"{name}.gate", 1.0)
        y = torch.cat([cls, t])
        y = y + bottleneck(own, f"{name}.out", y)
        cls, t = y[:1], y[1:]
    y = layer_norm(tuned, "norm", torch.cat([cls, t]))
    return head(tuned, torch.cat([y[0], y[1:].amax(0)]))


def spectrum(x: Tensor) -> Tensor:
    """Eigenvectors, as rows, of the graph Laplacian of points (n, 3): the nearer the heavier, the largest component positive."""
    n = len(x)
    d = torch.tensor([[float((x[i] - x[j]).square().sum().sqrt()) for j in range(n)] for i in range(n)], dtype=x.dtype)
    least = min((float(d[i, j]) for i in range(n) for j in range(n) if i != j), default=1.0)
    weight = torch.tensor(
        [[1.0 if i == j else least / float(d[i, j]) for j in range(n)] for i in range(n)], dtype=x.dtype
    )
    root = torch.diag((weight.sum(1) + 1e-6) ** -0.5)
    vectors = torch.linalg.eigh(torch.eye(n, dtype=x.dtype) - root @ weight @ root)[1]
    return torch.stack([v if v[v.abs().argmax()] > 0 else -v for v in vectors.T])


def curve(x: Tensor) -> list[int]:
    """Points along a z-order curve: the bits of y, x and z take turns."""

    def key(p: Tensor) -> str:
        cells = [format(int(float(100 * p[a].float())) % 2**16, "016b") for a in (1, 0, 2)]
        return "".join(bit for bits in zip(*cells, strict=True) for bit in bits)

    return sorted(range(len(x)), key=lambda i: key(x[i]))


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def tuned_head(s: State, own: State) -> State:
    return s | {k: v for k, v in own.items() if k.startswith(("cls.", "head."))}


def pointgst(s: State, own: State, x: Tensor, c: dict, local: int) -> Tensor:
    """Logits of one cloud."""
    centres, members = grouped(x, c["num_groups"], c["group_size"], c["skip_origin"])
    centre, tuned = x[centres], tuned_head(s, own)
    order = curve(centre)
    runs = [order[i : i + local] for i in range(0, len(order), local)]
    whole, parts = spectrum(centre), [spectrum(centre[run]) for run in runs]
    t, pos = torch.cat([tuned["cls.token"][0], tokens(s, x, centres, members)]), position(s, centre)
    pos = torch.cat([tuned["cls.pos"][0], pos])
    for i in range(c["depth"]):
        name = f"blocks.{i}.norm2"
        y, f = halves(tuned, f"blocks.{i}", t + pos, c["num_heads"])
        h = linear(own, f"{name}.down", y)
        z = silu(h)

        def there_and_back(basis: Tensor, u: Tensor, norm: str, name: str = name) -> Tensor:
            u = basis @ u
            return basis.T @ (u + silu(linear(own, f"{name}.adapt1", layer_norm(own, f"{name}.{norm}", u))))

        z[1:] += there_and_back(whole, h[1:], "norm_ly1")
        for run, basis in zip(runs, parts, strict=True):
            z[[1 + r for r in run]] += there_and_back(basis, h[1:][run], "norm_ly2")
        t = y + f + linear(own, f"{name}.up", z)
    t = layer_norm(tuned, "norm", t)
    return head(tuned, torch.cat([t[0], t[1:].amax(0)]))


def leaky(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.2 * x)


def instance_prompt(own: State, x: Tensor, pos: Tensor, kind: str, k: int, heads: int) -> Tensor:
    """One token of the groups' tokens (G, D)."""
    name = "blocks.net"
    if kind == "transformer":
        y, f = halves(own, f"{name}.block", x + pos, heads)
        return (y + f).amax(0)
    found = []
    for stage in range({"dgcnn": 3, "dgcnn_light2": 2, "dgcnn_light": 1, "mlp": 0}[kind]):
        edges = f"{name}.edges.{stage}"
        rows = []
        for one in x:
            near = x[(x - one).square().sum(-1).argsort()[:k]]
            said = linear(own, f"{edges}.conv", torch.cat([near - one, one.expand_as(near)], -1))
            rows.append(leaky(batch_norm(own, f"{edges}.bn", said)).amax(0))
        x = torch.stack(rows)
        found.append(x)
    y = linear(own, f"{name}.conv", torch.cat(found, -1) if found else x)
    return leaky(batch_norm(own, f"{name}.bn", y)).amax(0)


def idpt(s: State, own: State, x: Tensor, c: dict, layer: int, kind: str, k: int, feature: str) -> Tensor:
    """Logits of one cloud."""
    centres, members = grouped(x, c["num_groups"], c["group_size"], c["skip_origin"])
    tuned, heads = tuned_head(s, own), c["num_heads"]
    t, pos = tokens(s, x, centres, members), position(s, x[centres])
    t, pos = torch.cat([tuned["cls.token"][0], t]), torch.cat([tuned["cls.pos"][0], pos])
    for i in range(c["depth"]):
        if i == layer:
            prompt = instance_prompt(own, t[1:], pos[1:], kind, k, heads)
            t, pos = torch.cat([t[:1], prompt[None], t[1:]]), torch.cat([pos[:1], own["blocks.prompt_pos"][0], pos[1:]])
        y, f = halves(tuned, f"blocks.{i}", t + pos, heads)
        t = y + f
    t = layer_norm(tuned, "norm", t)
    parts = {"cls": t[0], "prompt": t[1], "most": t[2:].amax(0)}
    names = {
        "all": ("cls", "prompt", "most"),
        "promptcls": ("cls", "prompt"),
        "pointcls": ("cls", "most"),
        "promptonly": ("prompt",),
    }
    return head(tuned, torch.cat([parts[n] for n in names[feature]]))
