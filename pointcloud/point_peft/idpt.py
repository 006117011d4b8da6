"""IDPT: one prompt token, computed from the cloud itself, joins the sequence before a late block. arXiv 2304.07221 (ICCV 2023).

The prompt network reads the group tokens without their positions: edge convolutions among neighbours in feature space, then the
maximum. The classifier's head, a new one, reads the prompt beside the class token and the groups' maximum.

Deviations from the official code (zyh16143998882/ICCV23-IDPT): the backbone is really frozen, also its batch statistics; the unused
norms of the small prompt networks are not created; `train_prompt_pos=True` also trains the prompt's position, which the release
leaves at its random start (it is stored with the adapter in either case). The release clips gradients by the norm over all
parameters, frozen ones included; `fit` clips by that of the trained ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mmkit.adapters import Adapter, AdapterConfig, Edit, current_context, hooks, register_adapter
from mmkit.errors import InputError, NotMergeableError
from mmkit.pointcloud.point_peft.adapter import require_point_model
from mmkit.pointcloud.point_peft.model import classifier_head

NETS = {"dgcnn": 3, "dgcnn_light2": 2, "dgcnn_light": 1, "mlp": 0, "transformer": 0}
"""Prompt networks, with their number of edge convolutions."""

FEATURES = {"all": 3, "promptcls": 2, "pointcls": 2, "promptonly": 1}
"""What the head reads, with the number of vectors: class token, prompt, maximum; the first two; first and last; the prompt."""


@dataclass(frozen=True)
class IDPTConfig(AdapterConfig):
    """Settings of IDPT.

    Attributes:
        prompt_layer: the block before which the prompt joins; negative ones count from the end.
        prompt_net: one of `NETS`. k: neighbours in feature space.
        clip_k: with fewer groups than k take all of them, instead of refusing.
        feature: one of `FEATURES`.
        train_prompt_pos: train the position of the prompt.
    """

    prompt_layer: int = -1
    prompt_net: str = "dgcnn"
    k: int = 20
    clip_k: bool = False
    feature: str = "all"
    train_prompt_pos: bool = False
    modules_to_save: tuple[str, ...] = ("cls",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt_net not in NETS or self.feature not in FEATURES or self.k < 1:
            raise InputError(
                f"IDPTConfig: prompt_net is one of {tuple(NETS)}, feature one of {tuple(FEATURES)}, k at least 1; got "
                f"{self.prompt_net!r}, {self.feature!r}, {self.k}."
            )


class EdgeConv(nn.Module):
    """x_i -> max over its k neighbours j of LeakyReLU(BN(W [x_j - x_i, x_i])); (B, G, D) -> the same.

    W is applied to x_j and x_i apart, once per token instead of once per edge: the same numbers.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.conv, self.bn = nn.Linear(2 * dim, dim, bias=False), nn.BatchNorm1d(dim)

    def forward(self, x: Tensor, k: int) -> Tensor:
        near = feature_neighbours(x, k)
        to, own = self.conv.weight.chunk(2, 1)
        rows = torch.arange(len(x), device=x.device)[:, None, None]
        edges = F.linear(x, to)[rows, near] + F.linear(x, own - to).unsqueeze(2)
        edges = self.bn(edges.flatten(0, 2)).unflatten(0, edges.shape[:3])
        return F.leaky_relu(edges.amax(2), 0.2)


def feature_neighbours(x: Tensor, k: int) -> Tensor:
    """(B, G, k): the nearest tokens in feature space, each itself included."""
    with torch.autocast(x.device.type, enabled=False):
        y = x.detach() if x.dtype == torch.float64 else x.detach().float()
        square = y.square().sum(-1)
        return (2 * y @ y.transpose(1, 2) - square.unsqueeze(2) - square.unsqueeze(1)).topk(k, -1)[1]


class InstancePromptNet(nn.Module):
    """Group tokens (B, G, D), and their positions for "transformer", -> one prompt (B, 1, D)."""

    def __init__(self, dim: int, kind: str = "dgcnn", k: int = 20, num_heads: int = 6, drop_path: float = 0.0):
        super().__init__()
        self.kind, self.k = kind, k
        if kind == "transformer":
            self.block = Block(dim, num_heads, qkv_bias=False, drop_path=drop_path, norm_layer=nn.LayerNorm)
            return
        self.edges = nn.ModuleList([EdgeConv(dim) for _ in range(NETS[kind])])
        self.conv, self.bn = nn.Linear(max(1, NETS[kind]) * dim, dim, bias=False), nn.BatchNorm1d(dim)

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        if self.kind == "transformer":
            return self.block(x + pos).amax(1, keepdim=True)
        found = []
        for edge in self.edges:
            x = edge(x, min(self.k, x.shape[1]))
            found.append(x)
        y = self.conv(torch.cat(found, -1) if found else x)
        y = F.leaky_relu(self.bn(y.flatten(0, 1)).unflatten(0, y.shape[:2]), 0.2)
        return y.amax(1, keepdim=True)


class PromptSite(nn.Module):
    """The prompt network, and the position that the prompt gets."""

    def __init__(self, net: InstancePromptNet, dim: int, train_pos: bool):
        super().__init__()
        self.net = net
        self.prompt_pos = nn.Parameter(torch.empty(1, 1, dim), requires_grad=train_pos)
        nn.init.trunc_normal_(self.prompt_pos, std=0.02)


class _Prompt(hooks.Action):
    """In place of the plain run through the blocks: the prompt joins before one of them and is taken out behind the last."""

    def __init__(self, adapter: IDPT, site: PromptSite):
        self.adapter, self.site = adapter, site
        self.modules = (site,)

    def run(self, below: hooks.Below, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, pos, context = args[0], args[1], current_context()
        if context is None or kwargs.get("collect") or len(args) > 2:
            raise InputError("IDPT is a method for classifiers: call the whole model.")
        group: Any = hooks.get_module(self.adapter.model, "group")
        if x.shape[1] == group.num_groups:  # a global feature: there is no class token
            return below(*args, **kwargs)
        blocks: Any = hooks.get_module(self.adapter.model, "blocks")
        at = self.adapter.prompt_layer(len(blocks))
        for i, block in enumerate(blocks):
            if i == at:
                dtype = self.site.prompt_pos.dtype
                prompt = self.site.net(x[:, 1:].to(dtype), pos[:, 1:].to(dtype)).to(x.dtype)
                x = torch.cat([x[:, :1], prompt, x[:, 1:]], 1)
                pos = torch.cat([pos[:, :1], self.site.prompt_pos.expand(len(x), -1, -1).to(pos.dtype), pos[:, 1:]], 1)
            x = block(x + pos)
        context.store[self.adapter.key] = x[:, 1]
        return torch.cat([x[:, :1], x[:, 2:]], 1)


class _Head(hooks.Action):
    """In place of the head: one that also reads the prompt."""

    def __init__(self, adapter: IDPT, site: nn.Module):
        self.adapter, self.site = adapter, site
        self.modules = (site,)

    def run(self, below: hooks.Below, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        context = current_context()
        if context is None or self.adapter.key not in context.store:
            raise InputError("IDPT's head needs the prompt: call the whole model.")
        first, most = args[0].chunk(2, -1)
        prompt = self.adapter.model.norm(context.store[self.adapter.key])  # type: ignore[operator]
        parts = {
            "all": [first, prompt, most],
            "promptcls": [first, prompt],
            "pointcls": [first, most],
            "promptonly": [prompt],
        }
        feature = torch.cat(parts[self.adapter.config.feature], -1)
        return self.site(feature.to(next(self.site.parameters()).dtype)).to(feature.dtype)


@register_adapter("idpt")
class IDPT(Adapter):
    """The adapter; see the module. It goes on a `PointMAE` (or Point-BERT) classifier."""

    config_class = IDPTConfig
    tasks = ("point-cloud-classification",)

    @property
    def key(self) -> tuple[str, str]:
        """Where the prompt of a call lies in the context's store."""
        return self.method, self.name

    def starts_as_identity(self) -> bool:
        return False  # the head is a new one

    def prompt_layer(self, depth: int) -> int:
        """The block, 0-based, before which the prompt joins. Raises `InputError` when there is no such block."""
        at = self.config.prompt_layer + (depth if self.config.prompt_layer < 0 else 0)
        if not 0 <= at < depth:
            raise InputError(f"prompt_layer={self.config.prompt_layer} is none of the {depth} blocks.")
        return at

    def build(self, model: nn.Module) -> None:
        root, config = require_point_model(model, self.method), self.config
        self.prompt_layer(len(root.blocks))
        groups = root.group.num_groups
        if groups < config.k and not config.clip_k and NETS[config.prompt_net]:
            raise InputError(
                f"IDPT looks for {config.k} neighbours among {groups} groups: lower k, or set clip_k=True."
            )
        if not getattr(root, "num_classes", 0):
            raise InputError("IDPT adapts a classifier: build the model with num_classes=N.")
        rate = getattr(root.blocks[0].drop_path1, "drop_prob", 0.0)
        net = InstancePromptNet(root.embed_dim, config.prompt_net, config.k, root.blocks[0].attn.num_heads, rate)
        self.add_site("blocks", PromptSite(net, root.embed_dim, config.train_prompt_pos))
        width = FEATURES[config.feature] * root.embed_dim
        self.add_site("head", classifier_head(root.config["head"], width, root.num_classes))
        self.to(next(model.parameters()).device)

    def install(self, model: nn.Module) -> None:
        self.link(model, "blocks", _Prompt(self, self.site("blocks")))  # type: ignore[arg-type]
        self.link(model, "head", _Head(self, self.site("head")))

    def merge_edits(self, model: nn.Module) -> list[Edit]:
        raise NotMergeableError("IDPT adds a token that depends on the cloud: keep the adapter attached.")

    def official_keys(self, keys: Iterable[str]) -> dict[str, str]:
        """What tensors of an official file (as `official.plain_keys` names them) are called in this adapter.

        Norms of the prompt network stand there under two names; either is enough.
        """
        stages = NETS[self.config.prompt_net]
        found = {}
        for key in keys:
            own = key.replace("blocks.cls.", "blocks.net.")
            for n in range(1, stages + 1):
                own = own.replace(f".conv{n}.0.", f".edges.{n - 1}.conv.").replace(
                    f".conv{n}.1.", f".edges.{n - 1}.bn."
                )
                own = own.replace(f".bn{n}.", f".edges.{n - 1}.bn.")
            own = own.replace(".conv5.0.", ".conv.").replace(".conv5.1.", ".bn.").replace(".bn5.", ".bn.")
            if key == "prompt_pos":
                own = "blocks.prompt_pos"
            if key == "prompt_pos" or key.startswith(("blocks.cls.", "head.")):
                found[key] = own
        for key in found:  # with one convolution or none, bn5 is another norm, which is never used
            if stages < 2 and ".bn5." in key and key.replace(".bn5.", ".conv5.1.") in found:
                found[key] = ""
        return found
