"""PIIP: equal to a second writing of it in float64, published counts and costs, bad configurations and pictures refused."""

from __future__ import annotations

import copy
import dataclasses
import re
import threading

import pytest
import reference
import torch
from tiny import PATCH, branch, pyramid, shaken

from mmkit import create_model
from mmkit.errors import CheckpointError, InputError
from mmkit.vision.piip import (
    PIIP,
    BranchConfig,
    PIIPConfig,
    PIIPFeaturePyramid,
    compare,
    config_from_official,
    meta_model,
    piip_flops,
    piip_h6b,
    piip_lh6b,
    published_pyramid,
)

CONFIGS = {
    "four branches": pyramid((8, 16, 24, 32)),
    "narrower and narrower": PIIPConfig(
        (branch(8, 64, 4, 4), branch(16, 32), branch(24, 32)), num_heads=4, value_ratio=1.0
    ),
    "windows, zero tokens": PIIPConfig((branch(12), branch(20, window=2), branch(28, window=(3, 0))), num_heads=2),
    "windows, zero keys": PIIPConfig((branch(8), branch(20, window=3, pad_keys=True)), num_heads=2, num_points=3),
    "no feed-forward": pyramid(cffn=False),
    "to the larger only": pyramid(direction="to_larger"),
    "to the smaller only": pyramid(direction="to_smaller"),
    "plain attention": pyramid(attention="normal"),
    "no projection, no norms": PIIPConfig((branch(8, 64), branch(16, 32)), num_heads=4, proj=False, norm=False),
    "plain, no projection": PIIPConfig((branch(8, 64), branch(16, 32)), num_heads=4, proj=False, attention="normal"),
}


def with_groups(config: PIIPConfig) -> PIIPConfig:
    """The groups that a model finds, written down for the reference."""
    model = PIIPFeaturePyramid(config)
    parts = [dataclasses.replace(b, interaction_indexes=g) for b, g in zip(config.branches, model.groups, strict=True)]
    return dataclasses.replace(config, branches=tuple(parts))


@pytest.mark.parametrize("name", CONFIGS)
def test_equal_to_a_second_writing_in_float64(name: str) -> None:
    config = with_groups(CONFIGS[name])
    model = shaken(PIIPFeaturePyramid(config)).double()
    size = config.branches[-1].img_size
    picture = torch.randn(3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    heads = [m.blocks[0].attn.num_heads for m in model.backbones]
    with torch.no_grad():
        want = reference.branches(model.state_dict(), picture, config, heads, PATCH)
        got = model.forward_branches(picture[None])
    for tokens, (x, grid) in zip(got, want, strict=True):
        assert tokens.grid == grid
        torch.testing.assert_close(tokens.x[0], x, atol=1e-10, rtol=1e-8)


def test_a_fresh_pyramid_leaves_every_branch_as_it_is_alone() -> None:
    for attention in ("deform", "normal"):
        for token in (True, False):
            settings = {} if token else {"settings": {"class_token": False}}
            made = {"patch_size": PATCH, "embed_dim": 32, "depth": 2, "num_heads": 2, **settings.get("settings", {})}
            if not token:
                made["global_pool"] = "avg"
            parts = tuple(BranchConfig("timm:vit_tiny_patch16_224", s, settings=made) for s in (8, 16, 24))
            model = PIIPFeaturePyramid(PIIPConfig(parts, num_heads=4, attention=attention)).eval()
            x = torch.randn(2, 3, 24, 24)
            with torch.no_grad():
                got = model.forward_branches(x)
                alone = [m.forward_features(p) for m, p in zip(model.backbones, model.pictures(x), strict=True)]
            for tokens, want in zip(got, alone, strict=True):
                assert torch.equal(tokens.joined(), want)


def test_units_run_from_the_small_end() -> None:
    model = shaken(PIIP(pyramid(), 5)).double()
    x = torch.randn(1, 3, 24, 24, dtype=torch.float64)
    after: dict[str, torch.Tensor] = {}

    def first_branch(k, before, tokens):
        after.setdefault("x1", tokens[0].x.clone())

    with torch.no_grad():
        model.forward_branches(x, first_branch)
        want = after.pop("x1")
        model.backbones[2].patch_embed.proj.bias.add_(1.0)  # only branch 3 sees another picture
        model.forward_branches(x, first_branch)
    assert (after["x1"] - want).abs().max() > 1e-6  # it reached branch 1 through 2 within the first interaction


def test_gates_learn_first_then_what_is_behind_them() -> None:
    model = PIIP(pyramid(), 5)
    x, y = torch.randn(4, 3, 24, 24), torch.arange(4)
    unit = model.interactions[0].interaction_units_12.branch2to1_injector
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    torch.nn.functional.cross_entropy(model(x), y).backward()
    assert unit.ca_gamma.grad.abs().max() > 0
    assert unit.attn.sampling_offsets.weight.grad.abs().max() == 0
    optimizer.step()
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    assert unit.ca_gamma.grad.abs().max() > 0
    assert unit.attn.sampling_offsets.weight.grad.abs().max() > 0


def test_frozen_branches_stay_bit_identical() -> None:
    model = PIIP(pyramid(), 5)
    model.freeze_branches()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 24, 24)).square().sum().backward()
        optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert not [key for key in changed if key.startswith("branch")]
    assert {"cls_head.weight", "interactions.1.interaction_units_23.branch1to2_injector.ca_gamma"} <= changed


@pytest.mark.parametrize("separate", [True, False])
def test_heads_hold_num_classes_and_any_size(separate: bool) -> None:
    model = shaken(PIIP(pyramid(), 7, separate_head=separate, pool="avg"))
    assert model(torch.randn(2, 3, 24, 48)).shape == (2, 7)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(1, 3, 24, 24)).isfinite().all()


def test_a_folder_brings_the_model_back(tmp_path) -> None:
    model = shaken(PIIP(pyramid(), 3, class_names=("a", "b", "c")))
    model.save_pretrained(tmp_path / "m")
    again = PIIP.from_pretrained(tmp_path / "m")
    x = torch.randn(1, 3, 24, 24)
    assert torch.equal(model(x), again(x))
    assert again.backbone_info.class_names == ("a", "b", "c")


@pytest.mark.slow
def test_exports_as_one_graph() -> None:
    model = shaken(PIIP(pyramid(), 3))
    x = torch.randn(1, 3, 24, 24)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x), atol=1e-5, rtol=1e-4)


# --- published numbers -----------------------------------------------------------------------------------------------------


def published(models: str, sizes: tuple[int, ...], window: int = 0) -> PIIP:
    config = published_pyramid(
        models, sizes, layer_scale=models != "sbl" or window > 0, window=window, class_token=window == 0
    )
    return meta_model(config, separate_head=window == 0)


def test_tsb_has_the_published_parameters_and_cost() -> None:
    model = published("tsb", (368, 192, 128))
    assert sum(p.numel() for p in model.parameters()) == 144_031_416
    assert sum(p.numel() for p in model.interactions.parameters()) == 29_722_176
    assert piip_flops(model).total == pytest.approx(17.4e9, rel=0.005)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes, params, cost", [((320, 160, 96), 488_795_832, 39.0), ((384, 192, 128), 488_925_880, 61.2)]
)
def test_sbl_has_the_published_parameters_and_cost(sizes, params, cost) -> None:
    model = published("sbl", sizes)
    assert sum(p.numel() for p in model.parameters()) == params
    assert sum(p.numel() for p in model.interactions.parameters()) == 76_010_112
    assert piip_flops(model).total == pytest.approx(cost * 1e9, rel=0.005)
    if sizes[0] == 384:
        costs = compare(model)
        assert costs["pyramid"][0] < 0.35 * costs["single branch"][0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "models, sizes, window, cost",
    [
        ("tsb", (1120, 896, 448), 14, 243),
        ("tsb", (1568, 1120, 672), 14, 453),
        ("sbl", (1120, 672, 448), 28, 727),
        ("sbl", (1568, 896, 672), 28, 1464),
        ("tsbl", (1568, 1120, 672, 448), 28, 861),
    ],
)
def test_detection_pyramids_have_the_published_cost(models, sizes, window, cost) -> None:
    assert piip_flops(published(models, sizes, window)).total == pytest.approx(cost * 1e9, rel=0.005)


@pytest.mark.slow
def test_pyramids_on_internvit_have_the_published_parameters_and_cost() -> None:
    with torch.device("meta"):
        detector, segmenter, three = piip_h6b(), piip_h6b((512, 256), proj=False, norm=False), piip_lh6b()
    cost = piip_flops(detector)
    assert (cost.params, round(cost.params / 1e6)) == (6_872_337_770, 6872)
    assert cost.total == pytest.approx(11_080e9, rel=0.005)
    for size, published_cost in ((192, 1663), (256, 2354), (384, 4374), (512, 7308)):
        assert piip_flops(segmenter.at((size, 512))).total == pytest.approx(published_cost * 1e9, rel=0.005)
    assert detector.groups[1][:5] == ((0, 1), (2, 3), (4, 5), (6, 7), (8, 10))
    assert three.groups == [
        ((0, 11), (12, 23), (24, 35), (36, 47)),
        ((0, 7), (8, 15), (16, 23), (24, 31)),
        ((0, 5), (6, 11), (12, 17), (18, 23)),
    ]
    assert not [k for k in three.state_dict() if "_proj.weight" in k and "units" in k and "attn" not in k]


def test_the_counted_cost_is_that_of_a_forward_pass() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = PIIPConfig((branch(8, 64, 4, 4), branch(16, 32), branch(24, 32)), num_heads=4, attention="normal")
    model = meta_model(config, num_classes=5).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(
            torch.zeros(1, 3, 24, 48, device="meta")
        )  # on meta, attention runs as the products that the counter knows
    assert piip_flops(model, (24, 48)).total == counter.get_total_flops() / 2


# --- bad input ---------------------------------------------------------------------------------------------------------------


def groups(*ends: tuple[int, int]) -> BranchConfig:
    return branch(24, depth=4, interaction_indexes=ends)


@pytest.mark.parametrize(
    "config, words",
    [
        (lambda: PIIPConfig((branch(24),)), "2, 3 or 4 branches"),
        (lambda: PIIPConfig((branch(24), branch(8))), "smallest picture to the largest"),
        (lambda: pyramid(attention="cross"), "attention must be one of"),
        (lambda: pyramid((8, 18)), "no multiple of its patches of 4. Use 16 or 20"),
        (lambda: pyramid(num_heads=5), "num_heads=5 must divide"),
        (lambda: PIIPConfig((branch(8, 32), branch(16, 64))), "widest model to the narrowest"),
        (lambda: PIIPConfig((branch(8, interaction_indexes=((0, 1),)), groups((0, 1), (2, 3)))), "same number"),
        (lambda: PIIPConfig((branch(8, interaction_indexes=((0, 0), (1, 1))), groups((0, 1), (2, 5)))), "blocks 0 to 3"),
        (lambda: PIIPConfig((branch(8, interaction_indexes=((0, 0), (1, 1))), groups((0, 1), (3, 3)))), "follow each other"),
        (lambda: PIIPConfig((branch(8, interaction_indexes=((0, 0), (1, 1))), groups((0, 1), (2, 2)))), "end at 2"),
        (lambda: pyramid((8, 16), branchs=3), "has no setting"),
        (lambda: PIIPConfig((branch(8), BranchConfig("timm:naflexvit_base_patch16_gap", 32))), "NaFlexVit"),
        (lambda: PIIPConfig((branch(8), BranchConfig("timm:resnet18", 32))), "cannot be a branch"),
        (lambda: PIIPConfig((branch(8), branch(16, window=(2,)))), "2 blocks, but 1 window"),
        (
            lambda: PIIPConfig((branch(8), branch(16, window=2, settings={"class_token": True, "global_pool": "token"}))),
            "without class or register tokens",
        ),
    ],
)  # fmt: skip
def test_configurations_that_do_not_fit_are_refused(config, words: str) -> None:
    if "branchs" in words or words == "has no setting":
        with pytest.raises(InputError, match=words):
            PIIPConfig.of({"branches": [], "branchs": 3})
        return
    with pytest.raises(InputError, match=words), torch.device("meta"):
        PIIP(config(), 3)


@pytest.mark.parametrize(
    "shape, words",
    [
        ((1, 3, 24, 30), "no whole number of patches of 4. Make both sides multiples of 12"),
        ((1, 3, 0, 24), "smaller than a patch"),
        ((1, 1, 24, 24), r"floating \(B, 3, H, W\)"),
        ((3, 24, 24), r"floating \(B, 3, H, W\)"),
    ],
)
def test_pictures_that_do_not_fit_are_refused(shape, words: str) -> None:
    model = PIIP(pyramid(), 3)
    with pytest.raises(InputError, match=words):
        model(torch.zeros(shape))


def test_other_fits_take_other_pictures() -> None:
    for fit in ("nearest", "floor"):
        model = shaken(PIIP(pyramid(grid_fit=fit), 3))
        grids = [t.grid for t in model.forward_branches(torch.zeros(1, 3, 24, 28))]
        assert grids[-1] == (6, 7)
        assert grids[0] == (2, 2)
    with pytest.raises(InputError, match="smaller than a patch"):
        model(torch.zeros(1, 3, 8, 8))


def test_files_that_do_not_fit_are_refused(tmp_path) -> None:
    from mmkit.backbones.model import load_official_checkpoint
    from mmkit.storage import write_safetensors

    plain = pyramid((8, 16))
    normed = dataclasses.replace(
        plain, branches=(dataclasses.replace(plain.branches[0], qk_norm="layer"), plain.branches[1])
    )
    state = PIIPFeaturePyramid(normed).state_dict()
    write_safetensors(tmp_path / "a.safetensors", state)
    with pytest.raises(CheckpointError, match="qk_norm='layer'"):
        load_official_checkpoint(PIIPFeaturePyramid(plain), tmp_path / "a.safetensors")
    load_official_checkpoint(PIIPFeaturePyramid(normed), tmp_path / "a.safetensors")
    write_safetensors(
        tmp_path / "b.safetensors", {"branch1.clip_model.x": torch.zeros(1), **PIIPFeaturePyramid(plain).state_dict()}
    )
    with pytest.raises(CheckpointError, match="another layout"):
        load_official_checkpoint(PIIPFeaturePyramid(plain), tmp_path / "b.safetensors")
    with pytest.raises(InputError, match="branches 1 to 2"):
        PIIPFeaturePyramid(plain).load_branch(3, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError):
        PIIPFeaturePyramid(plain).load_branch(1, tmp_path / "a.safetensors")


def test_a_dino_detector_of_four_branches_from_the_authors_settings(tmp_path) -> None:
    """Names, windows, settings that one class shares and the three maps of the DINO detectors."""
    from mmkit.backbones.model import load_official_checkpoint
    from mmkit.storage import write_safetensors

    def part(size: int, **more):
        plain = {
            "real_size": size,
            "pretrain_img_size": 32,
            "depth": 2,
            "embed_dim": 32,
            "num_heads": 2,
            "mlp_ratio": 1,
            "qkv_bias": True,
        }
        return {
            **plain,
            "init_scale": 1.0,
            "interaction_indexes": [[0, 0], [1, 1]],
            "pretrained": "deit",
            "drop_path_rate": 0.0,
            **more,
        }

    config = {
        "deform_num_heads": 4, "deform_ratio": 0.5, "with_cffn": True, "interact_attn_type": "deform", "is_dino": True,
        "branch1": part(32), "branch2": part(64, use_flash_attn=True, window_attn=True, window_size=3),
        "branch3": part(96, window_attn=[True, False], window_size=[2, -1]), "branch4": part(128, num_heads=4),
    }  # fmt: skip
    settings = config_from_official(config)
    branches = settings["pyramid"]["branches"]
    assert [(b["window"], b["pad_keys"]) for b in branches] == [
        (0, True),
        ([3, 3], False),
        ([2, 0], True),
        ([2, 0], True),
    ]
    assert branches[3]["settings"]["num_heads"] == 2  # the authors' class builds branch 4 as branch 3
    assert config_from_official(config, own_branch4=True)["pyramid"]["branches"][3]["settings"]["num_heads"] == 4

    whole = shaken(PIIPFeaturePyramid(**{**settings, "out_indices": (0, 1, 2, 3)}))
    theirs = {_official_key(k): v for k, v in whole.state_dict().items() if not k.startswith("fpn1.")}
    write_safetensors(
        tmp_path / "dino.safetensors",
        {**theirs, "bbox_head.x": torch.zeros(1)},
    )
    model = load_official_checkpoint(PIIPFeaturePyramid(**settings), tmp_path / "dino.safetensors").eval()
    x = torch.randn(1, 3, 128, 64)
    with torch.no_grad():
        got, want = list(model(x).values()), list(whole(x).values())
    assert [tuple(m.shape[2:]) for m in got] == [(16, 8), (8, 4), (4, 2)]
    for a, b in zip(got, want[1:], strict=True):
        assert torch.equal(a, b)


def _official_key(key: str) -> str:
    """The name that the authors' detector gives a tensor of ours."""
    key = re.sub(r"^merge\.branches\.(\d)\.", lambda m: f"merge_branch{int(m[1]) + 1}.", key)
    key = re.sub(r"^merge\.weights\.(\d)$", lambda m: f"w{int(m[1]) + 1}", key)
    return "backbone." + re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", key)


def test_llava_gates_have_another_name() -> None:
    model = PIIPFeaturePyramid(pyramid((8, 16)))
    theirs = {
        k.replace("ca_gamma", "ca_weight").replace("cffn_gamma", "cffn_weight"): v
        for k, v in model.state_dict().items()
    }
    assert any("ca_weight" in k for k in theirs)
    assert set(model.official_state(theirs)) == set(model.state_dict())


def test_names_build_models() -> None:
    model = create_model("piip", pyramid=dataclasses.asdict(pyramid((8, 16))), num_classes=4)
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 4)


def test_without_gradients_two_lanes_say_what_one_thread_says() -> None:
    model, x, seen = shaken(PIIP(CONFIGS["four branches"], 5)), torch.randn(2, 3, 32, 32), set[str]()
    for module in model.modules():
        module.register_forward_hook(lambda *_: seen.add(threading.current_thread().name))
    for module in model.interactions:
        module._forward_hooks.clear()  # lanes call their units one by one: a hook on the whole keeps to one thread

    def answer(threads: int) -> torch.Tensor:
        seen.clear()
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(threads)
            return model(x).detach()
        finally:
            torch.set_num_threads(before)

    with torch.no_grad():
        want = answer(1)
        assert seen == {"MainThread"}
        for _ in range(3):
            assert torch.equal(answer(2), want)
        assert any(name.startswith("mmkit-piip") for name in seen)
        model.branch2.blocks[1].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            answer(2)
        model.branch2.blocks[1]._forward_hooks.clear()
        model.train()
        answer(2)
        assert seen == {"MainThread"}
        model.eval()
    answer(2)
    assert seen == {"MainThread"}
