"""Golden cases of Point-MAE and Point-PEFT: classifier, pre-training, and the adapter in its official and aligned forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from mmkit.adapters import apply_adapter, forward_context
from mmkit.backbones.model import load_official_checkpoint
from mmkit.pointcloud.point_peft import FeatureMemoryBank, PointMAE, PointMAEForPretraining, load_official_adapter
from mmkit.pointcloud.point_peft.official import own_key


def run(case: Path, meta: dict[str, Any]) -> None:
    """Check one case folder; everything follows from `meta["config"]`."""
    cfg = meta["config"]
    kind = _pretraining if "transformer_config" in cfg else _point_peft if "adapter_config" in cfg else _classifier
    kind(case, meta, load_file(case / "inputs.safetensors"), load_file(case / "outputs.safetensors"))


def build(cfg: dict[str, Any]) -> PointMAE:
    """The classifier of an official configuration."""
    return PointMAE(
        num_classes=cfg["cls_dim"], embed_dim=cfg["trans_dim"], depth=cfg["depth"], num_heads=cfg["num_heads"],
        num_groups=cfg["num_group"], group_size=cfg["group_size"], drop_path_rate=cfg["drop_path_rate"],
    )  # fmt: skip


def check_blocks(model: PointMAE, points: Tensor, want: dict[str, Tensor], close: dict[str, float]) -> Tensor:
    """Compare the output of every block; returns the logits."""
    seen: list[Tensor] = []
    handles = [block.register_forward_hook(lambda _m, _a, out: seen.append(out)) for block in model.blocks]
    logits = model(points)
    for handle in handles:
        handle.remove()
    for i, tokens in enumerate(seen[-len(model.blocks) :]):
        torch.testing.assert_close(tokens, want[f"block{i}"], **close)
    return logits


def check_gradients(params: dict[str, nn.Parameter], want: dict[str, Tensor], name: Any, rel: float = 1e-3) -> None:
    """Compare the norm of every gradient the case knows."""
    keys = [k.removeprefix("gradnorm/") for k in want if k.startswith("gradnorm/")]
    assert keys
    for key in keys:
        gradient = params[name(key)].grad
        assert gradient is not None, key
        assert gradient.norm().item() == pytest.approx(want[f"gradnorm/{key}"].item(), rel=rel, abs=1e-6), key


def _classifier(case: Path, meta: dict[str, Any], inputs: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    close = meta["tolerance"]
    model = build(meta["config"])
    assert sum(p.numel() for p in model.parameters()) == meta["params"]
    load_official_checkpoint(model, case / "weights.safetensors")
    neighborhood, center = model.group(inputs["points"])
    torch.testing.assert_close(neighborhood, want["neighborhood"], **close)
    torch.testing.assert_close(center, want["center"], **close)
    torch.testing.assert_close(model.embed(neighborhood), want["group_tokens"], **close)
    logits = check_blocks(model, inputs["points"], want, close)
    torch.testing.assert_close(logits, want["logits"], **close)
    loss = F.cross_entropy(logits, inputs["labels"])
    torch.testing.assert_close(loss, want["ce_loss"], **close)
    loss.backward()
    check_gradients(dict(model.named_parameters()), want, own_key)


def _pretraining(case: Path, meta: dict[str, Any], inputs: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    close, cfg = meta["tolerance"], meta["config"]
    t = cfg["transformer_config"]
    model = PointMAEForPretraining(
        embed_dim=t["trans_dim"], depth=t["depth"], num_heads=t["num_heads"], num_groups=cfg["num_group"],
        group_size=cfg["group_size"], drop_path_rate=t["drop_path_rate"], mask_ratio=t["mask_ratio"],
        decoder_depth=t["decoder_depth"], decoder_num_heads=t["decoder_num_heads"],
    )  # fmt: skip
    assert sum(p.numel() for p in model.parameters()) == meta["params"]
    load_official_checkpoint(model, case / "weights.safetensors")
    points, mask = inputs["points"], inputs["mask"].bool()
    groups = model.group(points)
    torch.testing.assert_close(model.visible_tokens(*groups, mask), want["encoder_visible"], **close)
    torch.testing.assert_close(model.global_feature(points), want["global_feature"], **close)
    torch.testing.assert_close(model(points, mask)[0], want["rebuild_points"], **close)
    torch.testing.assert_close(model.loss(points, mask, "l1"), want["loss_cdl1"], **close)
    loss = model.loss(points, mask)
    torch.testing.assert_close(loss, want["loss_cdl2"], **close)
    loss.backward()
    check_gradients(dict(model.named_parameters()), want, own_key)
    classifier = PointMAE(5, **{k: v for k, v in model.config.items() if not k.startswith(("decoder", "mask"))})
    load_official_checkpoint(classifier, case / "weights.safetensors")  # a pre-training file starts a classifier
    torch.testing.assert_close(classifier.global_feature(points), want["global_feature"], **close)


def _point_peft(case: Path, meta: dict[str, Any], inputs: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    close, cfg = meta["tolerance"], meta["config"]
    points, query = inputs["points"], {"point_query": inputs["cp_feat"]}

    def adapted(**settings: Any) -> Any:
        model = build(cfg)
        adapter = apply_adapter(
            model, "point_peft", num_prompts=meta["num_prompt_tokens"], prompt_depth=6,
            adapter_dim=cfg["adapter_config"]["adapter_dim"], index_mode="official", **settings,
        )  # fmt: skip
        load_official_adapter(adapter, case / "weights.safetensors")
        return model.eval(), adapter

    model, adapter = adapted(bank_size=inputs["memory_bank"].shape[1])
    assert adapter.num_parameters() == meta["trainable_params"]
    adapter.set_bank(FeatureMemoryBank(inputs["memory_bank"], normalized=True))
    found, prior = adapter.recall(inputs["cp_feat"])
    assert torch.equal(found.index, want["bank_topk_idx"].long())
    torch.testing.assert_close(prior, want["cache_prompt"], **close)
    with forward_context(store=query):
        logits = check_blocks(model, points, want, close)
    torch.testing.assert_close(logits, want["logits"], **close)
    loss = F.cross_entropy(logits, inputs["labels"])
    torch.testing.assert_close(loss, want["ce_loss"], **close)
    loss.backward()
    params = {k.replace(".delta", ".bias"): p for k, p in adapter.trainable_parameters()}
    keys = [own_key(k.removeprefix("gradnorm/")) for k in want if k.startswith("gradnorm/")]
    own = adapter.official_keys(keys)
    check_gradients(params, want, lambda key: own.get(own_key(key), own_key(key)), rel=2e-3)
    for row in range(len(points)):
        with torch.no_grad(), forward_context(store={"point_query": inputs["cp_feat"][row : row + 1]}):
            torch.testing.assert_close(model(points[row : row + 1]), want[f"logits_alone_{row}"], **close)

    aligned = build(cfg)
    other = apply_adapter(
        aligned, "point_peft", num_prompts=meta["num_prompt_tokens"], prompt_depth=6,
        adapter_dim=cfg["adapter_config"]["adapter_dim"], bank_size=inputs["memory_bank"].shape[1],
    )  # fmt: skip
    aligned.load_state_dict(model.state_dict())
    other.load_state_dict({k: v for k, v in adapter.state_dict().items() if k in other.state_dict()})
    with torch.no_grad(), forward_context(store=query):
        torch.testing.assert_close(aligned.eval()(points), want["aligned/logits"], **close)
    with torch.no_grad():
        torch.testing.assert_close(adapted()[0](points), want["logits_no_cache"], **close)
