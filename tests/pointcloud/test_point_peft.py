"""Point transformers and their adapters: published counts, independence of the batch, retrieval, files, bad input, few shots."""

from __future__ import annotations

import numpy as np
import point_reference
import pytest
import torch
from torch import Tensor

import mmkit
from mmkit import apply_adapter, load_adapter, save_adapter
from mmkit.adapters import forward_context
from mmkit.backbones.model import load_official_checkpoint
from mmkit.data.drawn.shapes import SHAPES, ProceduralShapes, drawn_scan
from mmkit.errors import CheckpointError, InputError, NotMergeableError
from mmkit.pointcloud.point_peft import (
    FeatureMemoryBank,
    PointCloudClassificationPipeline,
    PointCloudSegmentationPipeline,
    PointMAE,
    PointMAEForPretraining,
    adapt_few_shot,
    point_bert,
    point_mae,
    point_mae_nano,
    point_mae_nano_parts,
    point_mae_nano_pretraining,
    point_mae_scan,
)
from mmkit.pointcloud.point_peft.pointgst import PointGSTConfig, eigenbasis, graph_basis
from mmkit.storage import write_safetensors

METHODS = [
    ("point_peft", {"bank_size": 12}),
    ("point_peft", {"num_prompts": 0, "freeze_bn": False}),
    ("point_peft", {"geometry": False, "tune_bias": False}),
    ("pointgst", {"rank": 4, "local": 5}),
    ("idpt", {"k": 4}),
    ("idpt", {"prompt_net": "transformer", "feature": "promptonly", "prompt_layer": 0}),
]


def tiny(**settings) -> PointMAE:
    torch.manual_seed(0)
    small = {
        "embed_dim": 24,
        "depth": 4,
        "num_heads": 2,
        "num_groups": 12,
        "group_size": 6,
        "tokenizer_widths": (8, 12, 16),
    }
    return PointMAE(**{"num_classes": 5, **small, **settings}).eval()


def clouds(n: int = 4, points: int = 80, seed: int = 0) -> Tensor:
    x = torch.randn(n, points, 3, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=-1).amax(1)[:, None, None]


def adapted(method: str, settings: dict, seed: int = 1):
    model = tiny()
    adapter = apply_adapter(model, method, **settings)
    if settings.get("bank_size"):
        with adapter.disabled():
            adapter.set_bank(FeatureMemoryBank.build(model, [clouds(settings["bank_size"], seed=9)]))
    torch.manual_seed(seed)
    with torch.no_grad():
        for _, p in adapter.trainable_parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.eval()
    return model, adapter


def count(model) -> int:
    return sum(p.numel() for p in model.parameters())


def test_published_parameter_counts():
    assert count(point_mae_scan()) == 22_093_327
    assert count(point_mae()) == 22_099_752
    assert count(point_mae(num_classes=0)) == 21_825_792
    assert count(PointMAEForPretraining()) == 29_006_432
    assert count(point_bert(num_classes=0)) - count(point_mae(num_classes=0)) == 256 * 384 + 384 - 128 * 513
    wanted = {"point_peft": (773_017, 779_442), "pointgst": (622_831, 629_256), "idpt": (1_696_783, 1_703_208)}
    for method, figures in wanted.items():
        settings = {"index_mode": "official"} if method == "point_peft" else {}
        for classes, figure in zip((15, 40), figures, strict=True):
            model = point_mae(num_classes=classes)
            assert apply_adapter(model, method, **settings).num_parameters() == figure
    model = point_mae(num_classes=15)  # without what is never used
    assert apply_adapter(model, "point_peft", bank_size=12).num_parameters() == 773_017 - 62_268 - 30


def strange(config: dict, method: str, settings: dict):
    """A model and an adapter in float64 with all weights and statistics far from their start."""
    model = tiny(**config).double()
    adapter = apply_adapter(model, method, **settings).double()
    with torch.no_grad():
        for module in (model, adapter):
            for p in module.parameters():
                p.add_(0.3 * torch.randn_like(p))
            for key, value in module.state_dict().items():
                if key.endswith(("running_mean", "running_var")):
                    value.copy_(torch.rand_like(value) + 0.5)
    model.eval()
    return model, adapter


@pytest.mark.parametrize(
    "config, settings",
    [
        (
            {"embed_dim": 12, "depth": 3, "num_heads": 3, "num_groups": 14, "head": "point_mae", "skip_origin": False},
            {},
        ),
        ({"depth": 5, "head": "point_bert", "tokenizer_dim": 10}, {"num_prompts": 5, "bank_size": 7, "adapter_dim": 3}),
        ({"depth": 1, "num_groups": 7, "head": "linear"}, {"prompt_depth": 1, "bank_size": 9, "local_dim": 24}),
        ({"depth": 2, "group_size": 9}, {"num_prompts": 3, "prompt_depth": 2, "bank_size": 4, "init": "zero"}),
    ],
)
def test_a_second_writing_agrees(config, settings):
    model, adapter = strange(config, "point_peft", settings)
    if settings.get("bank_size"):
        adapter.set_bank(FeatureMemoryBank(torch.randn(model.embed_dim, settings["bank_size"]).double()))
    x = clouds(2).double() * 1.3
    state, own = dict(model.state_dict()), dict(adapter.state_dict())
    prompts = adapter.config.num_prompts, settings.get("prompt_depth", config["depth"] // 2)
    with torch.no_grad():
        want = torch.stack([point_reference.point_peft(state, own, c, model.config, *prompts) for c in x])
        torch.testing.assert_close(model(x), want, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    "config, settings",
    [
        ({"embed_dim": 12, "depth": 3, "num_heads": 3, "num_groups": 14, "head": "point_mae"}, {"rank": 5, "local": 4}),
        ({"depth": 5, "head": "point_bert", "skip_origin": False}, {"rank": 3, "local": 6}),
        ({"depth": 1, "num_groups": 7, "head": "linear"}, {"rank": 24, "local": 32}),
        ({"depth": 2, "num_groups": 30, "group_size": 9}, {"rank": 1, "local": 1}),
    ],
)
def test_a_second_writing_of_the_spectral_adapter_agrees(config, settings):
    model, adapter = strange(config, "pointgst", settings)
    x = clouds(2).double() * 1.3
    state, own = dict(model.state_dict()), dict(adapter.state_dict())
    with torch.no_grad():
        want = torch.stack([point_reference.pointgst(state, own, c, model.config, settings["local"]) for c in x])
        torch.testing.assert_close(model(x), want, atol=1e-4, rtol=1e-4)  # the graph is made in float32
        assert (model(x)[0] - want[1]).abs().max() > 0.05


@pytest.mark.parametrize(
    "config, settings",
    [
        ({"embed_dim": 12, "depth": 3, "num_heads": 3, "num_groups": 14, "head": "point_mae"}, {"k": 5}),
        (
            {"depth": 5, "head": "point_bert"},
            {"k": 12, "prompt_layer": 0, "prompt_net": "dgcnn_light2", "feature": "promptcls"},
        ),
        ({"depth": 1, "num_groups": 7, "head": "linear"}, {"k": 3, "prompt_net": "dgcnn_light", "feature": "pointcls"}),
        ({"depth": 2, "group_size": 9}, {"prompt_net": "mlp", "feature": "promptonly"}),
        ({"depth": 4, "skip_origin": False}, {"prompt_layer": 1, "prompt_net": "transformer", "feature": "all"}),
        ({"depth": 3, "num_groups": 6}, {"k": 20, "clip_k": True, "prompt_layer": -2}),
    ],
)
def test_a_second_writing_of_instance_prompts_agrees(config, settings):
    model, adapter = strange(config, "idpt", settings)
    x = clouds(2).double() * 1.3
    state, own = dict(model.state_dict()), dict(adapter.state_dict())
    c = adapter.config
    told = adapter.prompt_layer(len(model.blocks)), c.prompt_net, c.k, c.feature
    with torch.no_grad():
        want = torch.stack([point_reference.idpt(state, own, cloud, model.config, *told) for cloud in x])
        torch.testing.assert_close(model(x), want, atol=1e-9, rtol=1e-9)
        assert (model(x)[0] - want[1]).abs().max() > 0.05


@pytest.mark.parametrize("method, settings", METHODS)
def test_other_samples_of_the_batch_do_not_matter(method, settings):
    model, _ = adapted(method, settings)
    x, others = clouds(4), clouds(4, seed=5)
    with torch.no_grad():
        together = model(x)
        mixed = model(torch.cat([x[:1], others[1:]]))
        assert torch.equal(together[0], mixed[0])
        for i in range(4):
            torch.testing.assert_close(model(x[i : i + 1])[0], together[i], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method, settings", METHODS)
def test_adapters_come_off_come_back_and_train_alone(method, settings, tmp_path):
    base = tiny()
    model, adapter = adapted(method, settings)
    x = clouds()
    with torch.no_grad():
        before, after = base(x), model(x)
        assert (before - after).abs().max() > 1e-3
        with adapter.disabled():
            assert torch.equal(model(x), before)
        adapter.scale = 0.0
        assert torch.equal(model(x), before)
        adapter.scale = 1.0
    save_adapter(adapter, tmp_path / "a")
    other = tiny()
    load_adapter(other, tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(other.eval()(x), after)
    with pytest.raises(NotMergeableError):
        adapter.merge()
    frozen = {k: v.clone() for k, v in model.state_dict().items()}
    optimiser = torch.optim.AdamW(
        adapter.trainable_parameters() and [p for _, p in adapter.trainable_parameters()], 1e-3
    )
    model.train()
    for _ in range(3):
        optimiser.zero_grad()
        model(x).square().mean().backward()
        optimiser.step()
    assert all(torch.equal(v, frozen[k]) for k, v in model.state_dict().items())
    unused = [n for n, p in adapter.trainable_parameters() if p.grad is None]
    assert not unused
    adapter.detach()
    with torch.no_grad():
        assert torch.equal(model.eval()(x), before)


def test_zero_start_is_the_base_model():
    x = clouds()
    for method, settings in (("point_peft", {"init": "zero", "num_prompts": 0}), ("pointgst", {"rank": 4})):
        model = tiny()
        before = model(x)
        apply_adapter(model, method, **settings)
        assert torch.equal(model(x), before)


def test_the_bank_finds_itself_and_can_be_told_not_to(tmp_path):
    model, adapter = adapted("point_peft", {"bank_size": 12})
    x = clouds(12, seed=9)
    with adapter.disabled():
        bank = FeatureMemoryBank.build(model, x.split(5))
    found = adapter.retrieved(x)
    assert found.index[:, 0].tolist() == list(range(12))
    torch.testing.assert_close(found.weight.sum(1), torch.ones(12))
    with forward_context(store={"bank_index": torch.arange(12)}):
        assert (adapter.retrieved(x).index != torch.arange(12)[:, None]).all()
    query = torch.randn(3, 24)
    order = torch.randperm(12)
    a, b = bank.query(query, 5), FeatureMemoryBank(bank.features[:, order]).query(query, 5)
    assert torch.equal(a.index, order[b.index])
    torch.testing.assert_close(a.feature, b.feature)
    bank.save(tmp_path / "bank.safetensors")
    assert torch.equal(FeatureMemoryBank.load(tmp_path / "bank.safetensors").features, bank.features)
    for bad in (torch.randn(7, 12), torch.randn(24, 9)):
        with pytest.raises(InputError, match="bank"):
            adapter.set_bank(FeatureMemoryBank(bad))
    with pytest.raises(InputError, match="width"):
        bank.query(torch.randn(3, 7), 2)
    apply_adapter(empty := tiny(), "point_peft", bank_size=12)
    with pytest.raises(InputError, match="empty"):
        empty(x)


def test_tokeniser_statistics_stay_or_follow_as_told():
    for freeze in (True, False):
        model = tiny()
        adapter = apply_adapter(model, "point_peft", freeze_bn=freeze)
        model.train()
        model(clouds() * 3)
        moved = [k for k in adapter.state_dict() if "running_mean" in k and k.startswith("encoder.")]
        assert len(moved) == (0 if freeze else 2)
        if not freeze:
            state = tiny().state_dict()
            assert (adapter.state_dict()[moved[0]] - state[moved[0]]).abs().max() > 1e-4
            assert torch.equal(model.state_dict()[moved[0]], state[moved[0]])


def test_the_order_of_points_does_not_matter_but_the_pose_does():
    model, _ = adapted("point_peft", {"bank_size": 12})
    x = clouds(1)
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(79)])
    with torch.no_grad():
        torch.testing.assert_close(model(x[:, order]), model(x), atol=1e-5, rtol=1e-5)
        assert (model(x[..., [1, 0, 2]]) - model(x)).abs().max() > 1e-3


def test_graph_bases_are_orthogonal_and_have_one_sign():
    center = torch.rand(3, 13, 3, generator=torch.Generator().manual_seed(0))
    for matrix in graph_basis(center, PointGSTConfig(local=5)):  # runs of 5, 5 and 3
        torch.testing.assert_close(matrix @ matrix.transpose(1, 2), torch.eye(13).expand(3, -1, -1), atol=1e-5, rtol=0)
    vectors, values = eigenbasis(center)
    assert (vectors.gather(1, vectors.abs().argmax(1, keepdim=True)) > 0).all()
    assert (values.diff(dim=1) >= 0).all()
    alone = eigenbasis(center[1:2])[0]
    torch.testing.assert_close(alone[0], vectors[1])
    doubled = torch.cat([center[:, :6], center[:, :6]], 1)  # equal centres
    assert torch.isfinite(eigenbasis(doubled)[0]).all()
    assert torch.isfinite(eigenbasis(torch.zeros(1, 4, 3))[0]).all()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: tiny()(clouds(points=8)), "at least 12 points"),
        (lambda: tiny()(torch.full((1, 80, 3), torch.nan)), "NaN"),
        (lambda: tiny()(torch.zeros(80, 3)), "B, N, 3"),
        (lambda: PointMAE(5, embed_dim=25, num_heads=2), "multiple"),
        (lambda: PointMAE(5, head="mlp"), "head"),
        (lambda: apply_adapter(tiny(), "idpt", k=20), "neighbours among 12"),
        (lambda: apply_adapter(tiny(), "idpt", prompt_layer=9), "none of the 4 blocks"),
        (lambda: apply_adapter(tiny(), "pointgst", basis="x"), "basis"),
        (lambda: apply_adapter(tiny(), "point_peft", bank_size=5), "num_prompts=7"),
        (lambda: apply_adapter(torch.nn.Linear(3, 3), "point_peft", modules_to_save=()), "point cloud"),
        (lambda: PointMAEForPretraining(mask_ratio=1.0), "mask_ratio"),
        (lambda: FeatureMemoryBank(torch.full((3, 3), torch.nan)), "finite"),
        (lambda: adapt_few_shot(tiny(), {"a": [np.zeros((80, 3))]}), "two classes"),
    ],
)
def test_bad_input_is_told(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_equal_points_and_few_distinct_ones_are_answered():
    x = torch.zeros(1, 80, 3)
    x[:, :5] = clouds(1, 5)
    for method, settings in METHODS:
        model, _ = adapted(method, settings)
        assert torch.isfinite(model(x)).all()


def test_models_are_saved_loaded_and_built_by_name(tmp_path):
    model = tiny(class_names=list("abcde"))
    model.save_pretrained(tmp_path / "m")
    again = PointMAE.from_pretrained(tmp_path / "m")
    assert torch.equal(again(clouds()), model(clouds()))
    assert again.class_names == tuple("abcde")
    assert PointCloudClassificationPipeline(tmp_path / "m").class_names == tuple("abcde")
    assert count(mmkit.create_model("point_mae_nano", num_classes=3)) < 250_000
    pre = point_mae_nano_pretraining()
    x = clouds(2, 256)
    assert torch.equal(pre.eval().global_feature(x), pre.classifier(4).eval().global_feature(x))
    write_safetensors(tmp_path / "w.safetensors", {"base_model.cls_token": torch.zeros(1, 1, 24)})
    with pytest.raises(CheckpointError, match="missing"):
        load_official_checkpoint(model, tmp_path / "w.safetensors")


def test_drawn_shapes_come_from_their_seed_alone():
    for domain in ("clean", "scan"):
        data = ProceduralShapes("train", domain, 2, 200, parts=True)
        points, label, parts = data[17]
        again = ProceduralShapes("train", domain, 5, 200, parts=True)[17]
        assert np.array_equal(points, again[0])
        assert SHAPES[label] == "table"
        assert points.shape == (200, 3)
        assert parts.shape == (200,)
        assert np.linalg.norm(points, axis=1).max() == pytest.approx(1, abs=1e-5)
        assert not np.array_equal(points, ProceduralShapes("test", domain, 2, 200)[17][0])
    with pytest.raises(InputError, match="chair"):
        ProceduralShapes(classes=("chairs",))


def test_pipelines_answer_one_by_one():
    cloud = drawn_scan(np.random.default_rng(0), "mug", 900)[0]
    pipe = PointCloudClassificationPipeline(tiny(), num_points=80)
    alone, together = pipe(cloud), pipe([cloud[::-1].copy(), cloud])[1]
    assert np.array_equal(alone.probabilities, together.probabilities)
    assert alone.probabilities.sum() == pytest.approx(1, abs=1e-5)
    assert alone.attention.shape == (12,)
    assert alone.attention.sum() == pytest.approx(1, abs=1e-4)
    assert set(alone.groups) <= set(range(1, 13))
    parts = PointCloudSegmentationPipeline(point_mae_nano_parts(num_parts=4))(cloud)
    assert parts.labels.shape == (900,)
    assert sum(r["points"] for r in parts.measures()) == 900
    for bad, message in ((cloud[:5], "at least 12"), (cloud * np.nan, "NaN"), (np.zeros((0, 3)), "N >= 1")):
        with pytest.raises(InputError, match=message):
            pipe(bad)
    with pytest.raises(InputError, match="needs a point cloud model"):
        PointCloudClassificationPipeline(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("settings", [{"num_prompts": 6, "bank_size": 8}, {"num_prompts": 0}])
def test_segmenters_can_be_adapted(settings):
    torch.manual_seed(0)
    model = point_mae_nano_parts(num_parts=4)
    adapter = apply_adapter(model, "point_peft", modules_to_save=("norm", "head"), **settings)
    if "bank_size" in settings:
        adapter.set_bank(FeatureMemoryBank(torch.randn(64, 8)))
    model.train()
    model(clouds(2, 256)).square().mean().backward()
    assert all(p.grad is not None for _, p in adapter.trainable_parameters())


@pytest.mark.slow
def test_pretraining_learns_to_draw_groups():
    torch.manual_seed(0)
    data = ProceduralShapes("train", "clean", 4, 256)
    x = torch.from_numpy(np.stack([data[i][0] for i in range(64)]))
    model = point_mae_nano_pretraining()
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3)
    first = None
    for _ in range(60):
        loss = model.loss(x)
        first = first or loss.item()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.3 * first


@pytest.mark.slow
def test_a_few_examples_teach_new_classes():
    kinds = ("chair", "lamp", "plane")
    data = {k: ProceduralShapes("few", "clean", 7, 256, (k,)) for k in kinds}
    examples = {k: [data[k][i][0] for i in range(4)] for k in kinds}
    learned = adapt_few_shot(point_mae_nano(), examples, steps=15)
    test = np.stack([data[k][i][0] for k in kinds for i in range(4, 7)])
    assert (learned.predict(test).argmax(1) == np.repeat(range(3), 3)).mean() > 0.6
