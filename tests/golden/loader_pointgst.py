"""Golden cases of PointGST: the adapter alone, and the classifier, both with the published basis handed in."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from mmkit.adapters import apply_adapter, forward_context
from mmkit.pointcloud.point_peft import PointMAE, load_official_adapter
from mmkit.pointcloud.point_peft.official import own_key
from mmkit.pointcloud.point_peft.pointgst import SpectralAdapter, analysis_matrices, eigenbasis, z_order_keys


def run(case: Path, meta: dict[str, Any]) -> None:
    """Check one case folder; everything follows from `meta["config"]`."""
    tensors = [load_file(case / f"{n}.safetensors") for n in ("inputs", "outputs")]
    (_classifier if "model" in meta["config"] else _adapter)(case, meta, *tensors)


def _matrices(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The stored basis as the adapter takes it, its z-order checked."""
    runs = list(inputs["basis/sub_U"].unbind(1))
    order = inputs["basis/idx0"].long()
    assert torch.equal(order.argsort(1), inputs["basis/idx1"].long())
    return analysis_matrices(inputs["basis/U"], runs, order, "official")


def _same_basis(inputs: dict[str, Tensor], center: Tensor) -> None:
    """Keys and order equal; eigenvectors equal up to their signs."""
    key = z_order_keys(center)
    assert torch.equal(key, inputs["basis/key"].long())
    order = inputs["basis/idx0"].long()
    assert torch.equal(key.gather(1, order), key.sort(1)[0])
    local = inputs["basis/sub_U"].shape[-1]
    cut = center.gather(1, order.unsqueeze(-1).expand(-1, -1, 3)).reshape(-1, local, 3)
    for points, want in ((center, inputs["basis/U"]), (cut, inputs["basis/sub_U"].flatten(0, 1))):
        own = eigenbasis(points, sign="raw", scale="batch")[0]
        overlap = (own * want).sum(1).abs()
        torch.testing.assert_close(overlap, torch.ones_like(overlap), atol=1e-3, rtol=0)


def _adapter(case: Path, meta: dict[str, Any], inputs: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    close, cfg = meta["tolerance"], meta["config"]
    _same_basis(inputs, inputs["center"])
    torch.testing.assert_close(eigenbasis(inputs["center"], "raw", "batch")[1], want["eigenvalues"], atol=1e-5, rtol=0)
    site = SpectralAdapter(cfg["dim"], cfg["rank"])
    weights = load_file(case / "weights.safetensors")
    site.load_state_dict({k: v.float() for k, v in weights.items()})
    tokens = inputs["tokens"].requires_grad_()
    seen: dict[str, Tensor] = {}
    for name, module in (("x_f", site.norm_ly1), ("sub_x_f", site.norm_ly2), ("before_up", site.up)):
        module.register_forward_pre_hook(lambda _m, args, name=name: seen.update({name: args[0]}))
    out = site(tokens, *_matrices(inputs))
    torch.testing.assert_close(out, want["out"], **close)
    for name, value in seen.items():
        torch.testing.assert_close(value.reshape(want[name].shape), want[name], **close)
    (out * inputs["cotangent"]).sum().backward()
    torch.testing.assert_close(tokens.grad, want["grad_tokens"], **close)
    for name, p in site.named_parameters():
        torch.testing.assert_close(p.grad, want[f"grad/{name}"], **close)


def _classifier(case: Path, meta: dict[str, Any], inputs: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    base = _base()

    close, cfg = meta["tolerance"], meta["config"]["model"]
    model: PointMAE = base.build(cfg)
    adapter = apply_adapter(
        model, "pointgst", rank=cfg["rank"], local=cfg["local"], basis="official", sign="raw", scale="batch"
    )
    load_official_adapter(adapter, case / "weights.safetensors")
    assert adapter.num_parameters() == meta["trainable_params"]
    neighborhood, center = model.group(inputs["points"])
    torch.testing.assert_close(center, want["center"], **close)
    torch.testing.assert_close(neighborhood, want["neighborhood"], **close)
    torch.testing.assert_close(model.embed(neighborhood), want["group_tokens"], **close)
    _same_basis(inputs, center)
    with forward_context(store={"graph_basis": _matrices(inputs)}):
        logits = base.check_blocks(model, inputs["points"], want, close)
    torch.testing.assert_close(logits, want["logits"], **close)
    loss = F.cross_entropy(logits, inputs["labels"])
    torch.testing.assert_close(loss, want["ce_loss"], **close)
    loss.backward()
    params = dict(adapter.trainable_parameters())
    base.check_gradients(params, want, lambda key: own_key(key).replace(".gft_adapter.", ".norm2."), rel=2e-3)


def _base() -> Any:
    """The loader of the base model's cases, which lies beside this file."""
    spec = importlib.util.spec_from_file_location("loader_point_peft", Path(__file__).with_name("loader_point_peft.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
