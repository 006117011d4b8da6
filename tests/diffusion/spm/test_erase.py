"""`erase` with its three methods, training and resuming, what a pipeline tells its denoiser, closed-form edits, wrong input."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from mmkit.adapters import apply_adapter, attached_adapters, load_adapter
from mmkit.backbones import create_backbone, save_backbone
from mmkit.diffusion import TextToImagePipeline
from mmkit.diffusion.spm import (
    EraseConfig,
    Pair,
    SPMTrainer,
    UCEConfig,
    closed_form_edit,
    differences,
    directions,
    edit,
    erase,
    expand_prompts,
    scene_keep,
    scene_phrases,
    scene_templates,
)
from mmkit.diffusion.spm.calls import Calls, rows_of
from mmkit.diffusion.spm.uce import fill
from mmkit.errors import InputError

TINY = EraseConfig(max_steps=2, rollin_steps=3, anchors=2, lr=1e-2, warmup_steps=0, anchor_weight=1.0)
QUIET: dict[str, Any] = {"progress": False}


def drawn(draw: TextToImagePipeline, prompt: str = "a cat") -> torch.Tensor:
    (image,) = draw.run([prompt], [3], 2, 3.0, options={"output_type": "latent"})
    return image


def test_three_methods_leave_adapters_that_come_off_and_fold(sd: Any, tmp_path: Path) -> None:
    draw = TextToImagePipeline(sd)
    weights = {k: v.clone() for k, v in draw.denoiser.state_dict().items()}
    base = drawn(draw)
    for method in ("spm", "esd", "uce"):
        config = (
            None
            if method == "uce"
            else EraseConfig(**{**vars(TINY), "anchor_kind": "none" if method == "esd" else None})
        )
        done = erase(
            draw, ["a cat", "snoopy"], method, keep=["a dog"], config=config, output_dir=tmp_path / method, **QUIET
        )
        assert list(done.adapters) == (["a cat", "snoopy"] if method == "spm" else [method])
        erased = drawn(draw)
        assert not torch.equal(erased, base)
        assert all(torch.equal(v, weights[k]) for k, v in draw.denoiser.state_dict().items()), "the base stays"
        for adapter in done.adapters.values():
            adapter.merge()
        torch.testing.assert_close(drawn(draw), erased, atol=1e-4, rtol=1e-4)
        for adapter in reversed(done.adapters.values()):
            adapter.detach()
        for name in done.adapters:
            load_adapter(draw.denoiser, tmp_path / method / name.replace(" ", "_") / "adapter", name=name)
        torch.testing.assert_close(drawn(draw), erased, atol=1e-5, rtol=1e-5)
        for adapter in attached_adapters(draw.denoiser).values():
            adapter.detach()
    assert torch.equal(drawn(draw), base)
    assert all(torch.equal(v, weights[k]) for k, v in draw.denoiser.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gaussian", "released"])
def test_a_cancelled_run_goes_on_as_if_it_had_not_been(sd: Any, tmp_path: Path, kind: str) -> None:
    config = EraseConfig(**{**vars(TINY), "max_steps": 4, "anchor_kind": kind})

    def train(folder: Path | None, stop_after: int = 99) -> dict[str, torch.Tensor]:
        torch.manual_seed(7)
        trainer = SPMTrainer(sd, "van gogh", config=config, surrogate="art")
        count: list[int] = []
        trainer.train(
            folder, on_step=lambda info: count.append(info.step), should_stop=lambda: len(count) >= stop_after, **QUIET
        )
        state = {k: v.clone() for k, v in trainer.adapter.state_dict().items()}
        trainer.adapter.detach()
        return state

    whole = train(None)
    train(tmp_path, stop_after=2)
    resumed = train(tmp_path)
    assert all(torch.equal(v, resumed[k]) for k, v in whole.items())


@pytest.mark.slow
def test_a_step_moves_the_concept_and_anchors_hold_the_rest(sd: Any) -> None:
    with torch.no_grad():
        for block in [m for m in sd.unet.modules() if type(m).__name__ == "BasicTransformerBlock"]:
            block.attn2.to_v.weight.mul_(30)  # random weights hardly heed the text
    config = EraseConfig(**{**vars(TINY), "max_steps": 20, "lr": 3e-2})
    trainer = SPMTrainer(sd, "snoopy", keep=["a dog", "red art"], config=config)
    with torch.no_grad():
        before = trainer.loss(sd.unet, torch.tensor([5]))[1]
    trainer.train(**QUIET)
    with torch.no_grad():
        after = trainer.loss(sd.unet, torch.tensor([5]))[1]
    assert before["anchoring"] == 0
    assert after["erasing"] < 0.8 * before["erasing"]
    assert after["anchoring"] < 0.3 * before["erasing"]


def test_what_else_a_prompt_says_is_not_pushed_away(sd: Any) -> None:
    config = EraseConfig(**{**vars(TINY), "own_anchors": 1.0})
    trainer = SPMTrainer(
        sd, ["cat", "snoopy"], keep=["a dog"], templates=["{}", "a red {}"], surrogate="dog", config=config
    )
    loss = trainer.loss
    prompts = ["cat", "a red cat", "snoopy", "a red snoopy"]
    assert loss.texts == [*prompts, *["dog", "a red dog"] * 2, *prompts, "", "a dog"]
    assert loss._own(2, torch.Generator()) == [12, 13, 13, 13], (
        "the empty prompt and those to keep, in pictures of their own"
    )
    assert loss(sd.unet, torch.tensor([5]))[1]["anchoring"] == 0, "a fresh membrane changes nothing"
    with torch.no_grad():
        for p in trainer.adapter.parameters():
            p.add_(0.3)
    assert loss(sd.unet, torch.tensor([5]))[1]["anchoring"] > 0


def test_words_that_leave_the_concept_open_learn_what_it_learns(sd: Any) -> None:
    trainer = SPMTrainer(sd, "snoopy", superclass=["dog"], surrogate="cat", templates=["{}", "a {}"], config=TINY)
    asked, positives = ["snoopy", "a snoopy", "dog", "a dog"], ["snoopy", "a snoopy"] * 2
    assert trainer.loss.texts == [*asked, *["cat", "a cat"] * 2, *positives, ""]
    assert trainer.adapter.config.concepts == ("snoopy", "dog"), "transport opens for both"
    with torch.no_grad():
        block = next(m for m in sd.unet.modules() if type(m).__name__ == "BasicTransformerBlock")
        block.attn2.to_v.weight.mul_(30)  # random weights hardly heed the text
    trainer.loss.prompts, trainer.loss.config = trainer.loss.prompts[2:3], TINY  # "dog" alone
    trainer.loss.texts = ["dog", "cat", "snoopy", ""]
    trainer.loss.condition = trainer.loss.calls.condition(trainer.loss.texts)
    seen: list[list[str]] = []
    told = trainer.loss.told
    trainer.loss.told = lambda index: (seen.append([trainer.loss.texts[i] for i in index]), told(index))[1]  # type: ignore[method-assign]
    trainer.loss(sd.unet, torch.tensor([5]))
    assert seen[:2] == [["snoopy", "cat"], ["dog"]], "the frozen model is asked for the concept and what replaces it"
    with pytest.raises(InputError, match="at once"):
        SPMTrainer(sd, "snoopy", superclass=["dog"], keep=["dog"], config=TINY)


def test_membranes_begin_with_the_nearest_of_their_rank_to_a_closed_form_edit(sd: Any) -> None:
    draw = TextToImagePipeline(sd)
    base = drawn(draw, "snoopy")
    edited = erase(draw, "snoopy", "uce", surrogate="cat", keep=["a dog"])
    want = drawn(draw, "snoopy")
    edited.adapters["uce"].detach()
    config = EraseConfig(**{**vars(TINY), "start": "uce"})
    trainer = SPMTrainer(draw, "snoopy", surrogate="cat", keep=["a dog"], config=config)
    assert not torch.equal(want, base)
    torch.testing.assert_close(drawn(draw, "snoopy"), want, atol=1e-5, rtol=1e-4)  # one row: rank one says it all
    trainer.adapter.detach()

    change = closed_form_edit(draw, ["snoopy", "van gogh", "art"], [], "cat", ["{}", "a {}"])
    path = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
    for rank in (1, 2):
        adapter = apply_adapter(sd.unet, "spm", rank=rank, alpha=0.5)
        assert fill(adapter, change) == [p for p in adapter.own_paths if "attn2.to_k" in p or "attn2.to_v" in p]
        site = adapter.site(path)
        made = site.alpha / site.rank * (site.lora_up.weight @ site.lora_down.weight)
        up, down = change[path]
        left = torch.linalg.svdvals(up @ down)[rank:].norm()
        assert float((up @ down - made).norm()) == pytest.approx(float(left), rel=1e-4, abs=1e-6)
        adapter.detach()
    with pytest.raises(InputError, match="cross-attention"):
        SPMTrainer(draw, "snoopy", config=config, settings={"targets": ("*attn1.to_q",)})
    assert not attached_adapters(sd.unet)


def test_several_words_for_one_concept(sd: Any) -> None:
    done = erase(sd, {"dogs": ["snoopy", "a dog"], "art": "van gogh"}, config=TINY, **QUIET)
    assert {k: a.config.concepts for k, a in done.adapters.items()} == {
        "dogs": ("snoopy", "a dog"),
        "art": ("van gogh",),
    }
    for word in ({"dogs": []}, {"": "cat"}, {"cat": [3]}):
        with pytest.raises(InputError):
            erase(sd, word, **QUIET)


def test_prompts_of_the_drawn_world(pipe: Any) -> None:
    draw = TextToImagePipeline(pipe)
    for word in ("circle", "red", "striped", "white"):
        prompts = [t.replace("{}", p) for t in scene_templates(word) for p in scene_phrases(word)]
        assert not [p for p in prompts if draw.unknown_words(p) or not {*scene_phrases(word)} & {*p.split()}]
        keep = scene_keep([word], 40, held_out=["star"])
        assert len(set(keep)) == 40
        assert not [k for k in keep if {*scene_phrases(word), "star", "stars"} & {*k.split()}]
    assert expand_prompts("art")[1] == "painting by {}"
    for bad in (lambda: scene_templates("dragon"), lambda: scene_keep(["plain"]), lambda: expand_prompts("song")):
        with pytest.raises(InputError):
            bad()


def test_what_a_pipeline_tells_its_denoiser(sd: Any, pipe: Any) -> None:
    calls = Calls(TextToImagePipeline(sd))
    told = calls.condition(["a cat", "snoopy"])
    assert torch.equal(told["encoder_hidden_states"], sd.encode_prompt(["a cat", "snoopy"], "cpu", 1, False)[0])
    assert torch.equal(rows_of(told, [1], 2)["encoder_hidden_states"], told["encoder_hidden_states"][1:])
    early, t = calls.rolled_in(["a cat"], [5], 4, 0, 3.0)
    late, later = calls.rolled_in(["a cat"], [5], 4, 3, 3.0)
    assert early.shape == late.shape == (1, 4, 8, 8)
    assert float(later) < float(t)
    by_diffusers: list[torch.Tensor] = []
    sd(
        "a cat", num_inference_steps=4, guidance_scale=3.0, negative_prompt="", generator=torch.Generator().manual_seed(5),
        callback_on_step_end=lambda p, i, t, kw: by_diffusers.append(kw["latents"]) or {}, output_type="latent",
    )  # fmt: skip
    torch.testing.assert_close(late, by_diffusers[2], atol=1e-6, rtol=1e-5)

    pixart = Calls(TextToImagePipeline(pipe))  # masks, a variance of no pixel, no autoencoder
    told = pixart.condition(["a red circle", "two blue stars"])
    latents, t = pixart.rolled_in(["a red circle"] * 2, [1, 2], 3, 2, 3.0)
    assert pixart.answer(latents, t, told).shape == latents.shape == (2, 3, 24, 24)


@pytest.mark.parametrize("method", ["spm", "uce"])
def test_the_model_of_drawn_scenes(pipe: Any, method: str) -> None:
    done = erase(pipe, "circle", method, keep=["a blue square", ""], config=TINY if method == "spm" else None, **QUIET)
    (adapter,) = done.adapters.values()
    with torch.no_grad():
        for site in adapter.sites.values():
            assert torch.isfinite(site.lora_up.weight).all()
    adapter.check()


def test_closed_form_by_its_definition() -> None:
    torch.manual_seed(0)
    weight, concept, guide, kept = torch.randn(5, 6), torch.randn(2, 6), torch.randn(2, 6), torch.randn(1, 6)

    def new(config: UCEConfig, pairs: list[Pair]) -> torch.Tensor:
        return weight.double() + differences(weight, pairs, config) @ directions(pairs, [kept], config)

    w, c, g, k = (x.double() for x in (weight, concept, guide, kept))
    config = UCEConfig(lamb=0.3, erase_scale=0.7, preserve_scale=2.0)
    a = 0.3 * w + 0.7 * (g @ w.T).T @ c + 2.0 * (k @ w.T).T @ k
    b = 0.3 * torch.eye(6).double() + 0.7 * c.T @ c + 2.0 * k.T @ k
    torch.testing.assert_close(new(config, [Pair(concept, guide)]), a @ b.inverse(), atol=1e-10, rtol=1e-10)
    apart = [Pair(concept[i : i + 1], guide[i : i + 1]) for i in (1, 0)]
    torch.testing.assert_close(new(config, apart), a @ b.inverse(), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(new(config, [Pair(concept, concept)]), w)
    strong = new(UCEConfig(erase_scale=1e6), [Pair(concept, guide)])
    torch.testing.assert_close(strong @ c.T, w @ g.T, atol=1e-3, rtol=1e-3)
    firm = new(UCEConfig(preserve_scale=1e6), [Pair(concept, guide)])
    torch.testing.assert_close(firm @ k.T, w @ k.T, atol=1e-3, rtol=1e-3)


def test_edits_of_more_rows_than_the_width() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    pairs = [Pair(torch.randn(9, 4), torch.randn(9, 4))]
    config = UCEConfig(tokens="aligned")
    want = model[0].weight.double() + differences(model[0].weight, pairs, config) @ directions(pairs, [], config)
    adapter = edit(model, {"0": pairs}, {}, config)
    assert adapter.config.rank == 4
    model(torch.randn(2, 4))
    adapter.merge()
    torch.testing.assert_close(model[0].weight.double(), want, atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="width 5"):
        edit(model, {"0": [Pair(torch.ones(1, 5), torch.ones(1, 5))]}, {})


def test_wrong_input_leaves_the_model_alone(sd: Any, pipe: Any) -> None:
    bad: list[tuple[str, Any, dict[str, Any]]] = [
        ("No concept", [], {}),
        ("none of them empty", " ", {}),
        ("at once", "cat", {"keep": ["Cat"]}),
        ("templates", "cat", {"templates": ("a photo",)}),
        ("has 9 tokens", "a photo of a red cat dog", {}),
        ("one of", "cat", {"method": "magic"}),
        ("is text", "cat", {"surrogate": None}),
        ("not for method", "cat", {"method": "uce", "config": TINY}),
        ("needs prompts", "cat", {"config": EraseConfig(anchor_kind="prompts")}),
        ("layers", "cat", {"method": "esd", "settings": {"layers": "some"}}),
    ]
    for message, concepts, settings in bad:
        with pytest.raises(InputError, match=message):
            erase(sd, concepts, **settings, **QUIET)
    with pytest.raises(InputError, match="does not know"):
        erase(pipe, "dragon", **QUIET)
    for settings in ({"lamb": 0.0}, {"technique": "x"}, {"tokens": "first"}):
        with pytest.raises(InputError):
            UCEConfig(**settings)
    for settings in (
        {"anchor_kind": "x"},
        {"batch_size": 0},
        {"rollin_steps": 1},
        {"own_anchors": 1.5},
        {"start": "x"},
    ):
        with pytest.raises(InputError):
            EraseConfig(**settings)
    assert attached_adapters(sd.unet) == attached_adapters(pipe.transformer) == {}


def command(output: Path, *words: str) -> Any:
    from typer.testing import CliRunner

    from mmkit.cli import app

    return CliRunner().invoke(app, ["erase", *words, "--output", str(output)])


@pytest.mark.slow
def test_what_is_erased_names_no_place_outside_the_output(
    sd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TextToImagePipeline, "unknown_words", lambda self, prompt: [])  # a larger model knows all words
    sd.save_pretrained(tmp_path / "sd")
    done = command(tmp_path / "out", "../a/b", "a cat", " a cat ", "--model", str(tmp_path / "sd"), "--steps", "1")
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "sd"]
    names = {"a_cat", "a_cat_lora.safetensors", "_a_b", "_a_b_lora.safetensors", "before_after.png"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names
    with pytest.raises(InputError, match="'a cat' and 'a_cat' would both be written to 'a_cat'"):
        erase(sd, ["a cat", "a_cat"], config=TINY, output_dir=tmp_path / "two", **QUIET)
    assert not (tmp_path / "two").exists()
    assert not attached_adapters(sd.unet)


def test_an_interrupted_command_says_how_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmkit.diffusion.spm.training import EraseLoss

    real, out = EraseLoss.__call__, tmp_path / "out"

    def once(self: Any, model: Any, batch: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return real(self, model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(EraseLoss, "__call__", once)
        ended = command(out, "red", "--steps", "2")
    assert ended.exit_code == 128 + signal.SIGTERM, ended.output
    assert "Interrupted after 1 steps" in ended.output
    assert "Run the same command again" in " ".join(ended.output.split())
    other = " ".join(command(out, "red", "--steps", "2", "--seed", "4").output.split())
    assert "--seed: 0 is now 4" in other
    assert "--restart to start over, or another --output" in other
    again = command(out, "red", "--steps", "2")
    assert again.exit_code == 0, again.output


def test_what_cannot_be_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmkit.diffusion.spm.training.SPMTrainer.train", lambda *a, **k: pytest.fail("trained"))
    monkeypatch.setattr("mmkit.diffusion.spm.erasing.closed_form_edit", lambda *a, **k: pytest.fail("solved"))
    (tmp_path / "file").write_text("x")
    saved = save_backbone(create_backbone("tiny_vit", num_classes=2), tmp_path / "saved")
    before = sorted(tmp_path.rglob("*"))
    for output, words, told in (
        (tmp_path / "file", ("red",), "a part of the path is a file"),
        (saved, ("red", "--method", "uce"), "would no longer be as it was saved"),
        (tmp_path / "out", ("red", "--method", "esd", "--keep", "a blue circle"), "--keep means nothing for esd"),
    ):
        failed = command(output, *words)
        assert failed.exit_code == 1
        assert told in " ".join(failed.output.split())
        assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(InputError, match="seed must be a whole number"):
        TextToImagePipeline()("a red circle", seed=2**70)


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    def run(*words: str) -> Any:
        return command(tmp_path / "out", *words)

    done = run("circle", "--steps", "2", "--evaluate")
    assert done.exit_code == 0, done.output
    assert "circle: drawn when asked for" in done.output
    for name in ("circle/adapter/mmkit.json", "circle_lora.safetensors", "before_after.png"):
        assert (tmp_path / "out" / name).exists()
    for words, message in (
        (("dragon",), "no concept 'dragon'"),
        (("red", "blue", "--method", "uce"), "one concept"),
        (("red", "--method", "uce", "--steps", "3"), "--steps"),
        (("red", "--clip", "ViT-B-32"), "--clip"),
        (("red", "--evaluate", "--model", str(tmp_path)), "--evaluate"),
    ):
        failed = run(*words)
        assert failed.exit_code == 1
        assert message in failed.output
