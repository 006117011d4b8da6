"""Golden cases of IDPT: the prompt network alone, and the classifier."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from mmkit.adapters import apply_adapter
from mmkit.pointcloud.point_peft import PointMAE, load_official_adapter
from mmkit.pointcloud.point_peft.idpt import feature_neighbours
from mmkit.pointcloud.point_peft.official import own_key, plain_keys


def run(case: Path, meta: dict[str, Any]) -> None:
    """Check one case folder; everything follows from `meta["config"]`."""
    tensors = [load_file(case / f"{n}.safetensors") for n in ("inputs", "outputs")]
    (_classifier if "model" in meta["config"] else _network)(case, meta, *tensors)


def _network(case: Path, meta: dict[str, Any], inputs: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    close, cfg = meta["tolerance"], meta["config"]
    model = PointMAE(3, cfg["dim"], 2, 2, cfg["num_group"], 4)
    adapter = apply_adapter(model, "idpt", prompt_net=cfg["module"], k=cfg["k"])
    site = adapter.site("blocks").eval()
    state = plain_keys({f"blocks.cls.{k}": v for k, v in load_file(case / "weights.safetensors").items()})
    for leave in (".bn", ".conv"):  # norms lie in the file under two names: either will do
        some = {
            k: v for k, v in state.items() if not (leave in k and k.replace(".bn", ".conv") != k) or leave == ".conv"
        }
        names = adapter.official_keys(some)
        values = {own.removeprefix("blocks."): some[k] for k, own in names.items() if own}
        site.load_state_dict({**values, "prompt_pos": site.prompt_pos})
    tokens = inputs["tokens"].requires_grad_()
    if "knn1" in want:
        assert torch.equal(feature_neighbours(tokens, cfg["k"]).sort(-1)[0], want["knn1"].long())
    seen: list[Tensor] = []
    for edge in getattr(site.net, "edges", ()):
        edge.register_forward_hook(lambda _m, _a, out: seen.append(out))
    prompt = site.net(tokens, torch.zeros_like(tokens))
    torch.testing.assert_close(prompt, want["prompt"], **close)
    for n, value in enumerate(seen, 1):
        torch.testing.assert_close(value, want[f"conv{n}_max"], **close)
    (prompt * inputs["cotangent"]).sum().backward()
    torch.testing.assert_close(tokens.grad, want["grad_tokens"], **close)
    params = {f"blocks.{k}": p for k, p in site.named_parameters()}
    keys = [k.removeprefix("grad/") for k in want if k.startswith("grad/")]
    names = adapter.official_keys([f"blocks.cls.{k}" for k in keys])
    for key in keys:
        gradient = params[names[f"blocks.cls.{key}"]].grad
        torch.testing.assert_close(gradient, want[f"grad/{key}"].reshape(gradient.shape), **close)


def _classifier(case: Path, meta: dict[str, Any], inputs: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    base = _base()

    close, cfg = meta["tolerance"], meta["config"]["model"]
    model: PointMAE = base.build(cfg)
    adapter = apply_adapter(
        model, "idpt", prompt_layer=cfg["prompt_layer"], prompt_net=cfg["prompt_module"], feature=cfg["cls_type"]
    )
    unused = 2 * cfg["trans_dim"] if cfg["prompt_module"] in ("dgcnn_light", "mlp") else 0
    assert adapter.num_parameters() + unused == meta["trainable_params"]
    load_official_adapter(adapter, case / "weights.safetensors")
    seen: list[Tensor] = []
    adapter.site("blocks").net.register_forward_hook(lambda _m, _a, out: seen.append(out))
    adapter.site("head").register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    logits = base.check_blocks(model, inputs["points"], want, close)
    torch.testing.assert_close(logits, want["logits"], **close)
    torch.testing.assert_close(seen[0], want["prompt"], **close)
    torch.testing.assert_close(seen[1], want["feature"], **close)
    loss = F.cross_entropy(logits, inputs["labels"])
    torch.testing.assert_close(loss, want["ce_loss"], **close)
    loss.backward()
    params = dict(adapter.trainable_parameters())
    keys = [own_key(k.removeprefix("gradnorm/")) for k in want if k.startswith("gradnorm/")]
    names = adapter.official_keys(keys)
    base.check_gradients(params, want, lambda key: names.get(own_key(key), own_key(key)), rel=2e-3)
    norm = torch.stack([p.grad.norm() for p in params.values() if p.grad is not None]).norm()
    assert norm.item() == pytest.approx(want["gradnorm_trained"].item(), rel=1e-3)


def _base() -> Any:
    """The loader of the base model's cases, which lies beside this file."""
    spec = importlib.util.spec_from_file_location("loader_point_peft", Path(__file__).with_name("loader_point_peft.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
