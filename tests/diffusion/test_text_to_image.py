"""Pictures from prompts, fine-tuning on captioned pictures, and the folders they come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import mmkit
from mmkit.adapters import apply_adapter, save_adapter
from mmkit.cli import app
from mmkit.diffusion import DOMAINS, Denoiser, Objective, TextToImagePipeline, draw_domain, finetune, open_captions
from mmkit.errors import CheckpointError, InputError, TrainingError


def test_seeds_and_batches(pipe: Any) -> None:
    draw = mmkit.pipeline("text-to-image", pipe)
    shares: list[float] = []
    four = draw(["a red circle", "two blue stars"], num_images=2, seed=5, steps=2, on_progress=shares.append)
    assert [len(four.images), four.seeds, four.prompts[1]] == [4, [5, 6, 7, 8], "a red circle"]
    assert shares[-1] == 1.0
    apart = draw(["a red circle", "two blue stars"], num_images=2, seed=5, steps=2, batch_size=1)
    for a, b in zip(four.images, apart.images, strict=True):
        assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1  # another batch rounds otherwise
    assert four.images[0].size == (24, 24)
    assert draw.unknown_words("a red dragon") == ["dragon"]


def test_results_are_saved_as_a_captioned_folder(pipe: Any, tmp_path: Path) -> None:
    import zipfile

    result = TextToImagePipeline(pipe)("a star", num_images=2, steps=2)
    for name in ("sheet.png", "all.zip", "seeds.json"):
        assert result.save(tmp_path / name).stat().st_size > 50
    zipfile.ZipFile(tmp_path / "all.zip").extractall(tmp_path / "all")
    again = open_captions(tmp_path / "all")
    assert again.captions == ["a star", "a star"]
    assert again.tensor(32).shape == (2, 3, 32, 32)


def test_plain_diffusers_reads_what_is_saved(pipe: Any, tmp_path: Path) -> None:
    import diffusers

    pipe.save_pretrained(tmp_path / "p")
    plain = diffusers.PixArtAlphaPipeline.from_pretrained(tmp_path / "p", local_files_only=True, vae=None)
    settings = {
        "output_type": "latent",
        "use_resolution_binning": False,
        "num_inference_steps": 2,
        "clean_caption": False,
    }
    made = [p("a cyan ring", generator=torch.Generator().manual_seed(1), **settings).images for p in (pipe, plain)]
    assert torch.equal(*made)
    ours = TextToImagePipeline(tmp_path / "p")("a cyan ring", seed=1, steps=2)
    theirs = TextToImagePipeline(pipe)("a cyan ring", seed=1, steps=2)
    assert np.array_equal(ours.images[0], theirs.images[0])


def test_adapters_by_name_and_strength(pipe: Any, tmp_path: Path) -> None:
    adapter = apply_adapter(pipe.transformer, "difffit", name="made")
    torch.manual_seed(1)
    for p in adapter.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    save_adapter(adapter, tmp_path / "a")
    adapter.detach()
    draw = TextToImagePipeline(pipe)
    base = np.asarray(draw("a star", steps=2).images[0], int)
    draw.load_adapter("style", tmp_path / "a")
    full, half, none = (
        np.asarray(draw("a star", steps=2, strengths=s).images[0], int) for s in ({"style": 1.0}, {"style": 0.5}, {})
    )
    assert np.array_equal(none, base)
    assert 0 < np.abs(half - base).mean() < np.abs(full - base).mean() * 1.5
    assert np.array_equal(np.asarray(draw("a star", steps=2).images[0], int), full), (
        "the call left the strengths as they were"
    )
    with pytest.raises(InputError, match="style"):
        draw("a star", strengths={"stile": 1.0})


def test_what_cannot_be_drawn_is_said(pipe: Any, tmp_path: Path) -> None:
    draw = TextToImagePipeline(pipe)
    for call in (
        {"prompts": []},
        {"prompts": "a star", "steps": 0},
        {"prompts": "a star", "steps": 1},
        {"prompts": "a star", "num_images": -1},
        {"prompts": "x", "colour": 1},
    ):
        with pytest.raises(InputError):
            draw(**call)
    with pytest.raises(CheckpointError, match="model_index"):
        TextToImagePipeline(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(CheckpointError):
        TextToImagePipeline(tmp_path)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_objectives_are_those_of_the_schedulers(kind: str) -> None:
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    scheduler = (
        FlowMatchEulerDiscreteScheduler() if kind == "flow" else DDIMScheduler(prediction_type=kind, clip_sample=False)
    )
    objective = Objective.of(scheduler)
    assert objective.kind == kind
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 4, 4, 3, 3)
    if kind == "flow":
        t = scheduler.timesteps[[100, 800, 5, 999]]
        want = scheduler.scale_noise(clean, t, noise)
        scheduler.set_timesteps(7)
        step = scheduler.timesteps[:1]
        start = objective.noised(clean, noise, step.expand(4))
        for s in scheduler.timesteps:  # a perfect answer leads back to the clean sample
            start = scheduler.step(objective.target(clean, noise, s.expand(4)), s, start).prev_sample
        torch.testing.assert_close(start, clean, atol=1e-4, rtol=1e-4)
    else:
        t = torch.tensor([1, 500, 900, 20])
        want = scheduler.add_noise(clean, noise, t)
        scheduler.set_timesteps(10)
        target = objective.target(clean[:1], noise[:1], torch.tensor([500]))
        found = scheduler.step(
            target, 500, objective.noised(clean[:1], noise[:1], torch.tensor([500]))
        ).pred_original_sample
        torch.testing.assert_close(found, clean[:1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(objective.noised(clean, noise, t), want, atol=1e-5, rtol=1e-5)


def test_finetune_lowers_the_loss_continues_and_saves(pipe: Any, tmp_path: Path) -> None:
    pictures, captions = draw_domain("washed out", 24, seed=3)
    common: dict[str, Any] = {
        "output_dir": tmp_path / "run",
        "batch_size": 8,
        "progress": False,
        "sample_every": 10,
        "samples": ["a star"],
    }
    part = finetune(
        (pictures, captions),
        pipe,
        "difffit",
        max_steps=10,
        should_stop=iter([False] * 4 + [True] * 99).__next__,
        **common,
    )
    assert part.fit.stopped == "cancelled"
    part.adapter.detach()
    done = finetune((pictures, captions), pipe, "difffit", max_steps=10, **common)
    assert (done.fit.steps, done.fit.stopped) == (10, "finished")
    assert done.fit.losses[-1] < done.fit.losses[0]
    assert done.trained < 0.03 * done.total
    assert (tmp_path / "run" / "samples" / "step_000010.png").is_file()
    assert (tmp_path / "run" / "latents.safetensors").is_file()
    size = (done.folder / "adapter_model.safetensors").stat().st_size
    assert size < 0.05 * 4 * done.total
    want = np.asarray(done.pipeline("a star", steps=2).images[0], int)
    done.adapter.detach()
    again = TextToImagePipeline(pipe)
    again.load_adapter("washed", done.folder)
    assert np.array_equal(np.asarray(again("a star", steps=2).images[0], int), want)


@pytest.mark.parametrize("method", ["difffit", "full"])
def test_a_dry_run_leaves_the_model_as_it_was(pipe: Any, tmp_path: Path, method: str) -> None:
    before = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    flags = [p.requires_grad for p in pipe.transformer.parameters()]
    looked = finetune(draw_domain("night", 8), pipe, method, output_dir=tmp_path / "run", dry_run=True)
    assert (looked.fit.stopped, looked.adapter, looked.folder) == ("dry run", None, None)
    assert looked.summary() == looked.plan
    assert (looked.trained == looked.total) == (method == "full")
    after = pipe.transformer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert [p.requires_grad for p in pipe.transformer.parameters()] == flags
    assert not (tmp_path / "run").exists()


def test_captions_are_left_out_for_guidance_and_pictures_are_encoded_once(pipe: Any, tmp_path: Path) -> None:
    from mmkit.diffusion.training import DenoisingLoss, _encoded

    denoiser = Denoiser(pipe)
    conditions = denoiser.encode_captions(["a star", "two blue rings", *denoiser.empty_captions(1)])

    def loss(drop: float, captions: list[int]) -> torch.Tensor:
        torch.manual_seed(0)
        with torch.no_grad():
            return DenoisingLoss(conditions, drop)(denoiser, (torch.ones(2, 3, 24, 24), torch.tensor(captions)))

    assert torch.equal(loss(1.0, [0, 1]), loss(0.0, [2, 2]))
    assert not torch.equal(loss(0.0, [0, 1]), loss(0.0, [2, 2]))

    pictures = torch.rand(3, 3, 24, 24)
    first = _encoded(denoiser, pictures, tmp_path)
    denoiser.encode_pictures = None  # type: ignore[method-assign, assignment]
    assert torch.equal(_encoded(denoiser, pictures, tmp_path), first)
    with pytest.raises(TypeError):
        _encoded(denoiser, pictures + 1, tmp_path)  # others are encoded anew


def test_the_command_adapts_to_a_folder_of_classes(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "model")
    for i in range(4):
        path = tmp_path / "photos" / ("red", "blue")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40 + 9 * i, 30), path.parent.name).save(path)  # mixed sizes
    words = ["finetune", "--task", "text-to-image", "--data", str(tmp_path / "photos"), "--backbone", str(tmp_path / "model"),
             "--steps", "2", "--output", str(tmp_path / "run")]  # fmt: skip
    look = CliRunner().invoke(app, [*words, "--dry-run"])
    assert look.exit_code == 0, look.output
    assert "3 training examples and 1 held back, of 2 captions." in look.output
    assert not (tmp_path / "run").exists()
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "difffit trained" in done.output
    told = done.output.split("difffit trained ")[1].split(" parameters")[0]
    assert f"{told} parameters would be trained. Nothing was written." in look.output
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    refused = CliRunner().invoke(app, [*words, "--augment"])
    assert (refused.exit_code, "--augment means nothing" in refused.output) == (1, True)
    nothing = CliRunner().invoke(app, ["finetune", "--task", "text-to-images", "--data", str(tmp_path)])
    assert "text-to-image" in nothing.output


def test_the_bundled_model_draws_what_is_asked() -> None:
    draw, judge = mmkit.pipeline("text-to-image"), mmkit.load_weights("scene_judge")
    prompts = [f"a large {color} {shape}" for color in ("red", "cyan") for shape in ("circle", "square", "triangle")]
    right = judge.obedience(draw(prompts, seed=1).tensor(), prompts)  # type: ignore[operator]
    assert right["color"] >= 0.8, right
    assert right["shape"] >= 0.6, (
        "three in four are right of all captions, measured when it was trained (see the manifest)"
    )


@pytest.mark.slow
def test_difffit_closes_most_of_the_gap_to_all_weights(tmp_path: Path) -> None:
    loss, share = {}, {}
    for name, method, steps, lr in (
        ("base", "bitfit", 1, 1e-12),
        ("difffit", "difffit", 30, None),
        ("full", "full", 30, None),
    ):
        done = finetune(
            draw_domain("washed out", 80, seed=1), None, method, max_steps=steps, batch_size=16, lr=lr, val=0.2,
            output_dir=tmp_path / name, progress=False,
        )  # fmt: skip
        loss[name], share[name] = done.fit.metrics["loss"], done.trained / done.total
    assert loss["base"] - loss["difffit"] > 0.5 * (loss["base"] - loss["full"]) > 0.05, loss
    assert (share["difffit"] < 0.02, share["full"]) == (True, 1)
    assert TextToImagePipeline(done.folder)("a star", steps=2).images, "what all weights became is an ordinary folder"


def test_a_loss_of_nan_names_the_step(pipe: Any) -> None:
    pipe.transformer.proj_out.weight.data[0, 0] = float("nan")
    with pytest.raises(TrainingError, match="step 1"):
        finetune(draw_domain("night", 8), pipe, "difffit", max_steps=2, batch_size=4, progress=False)


def test_other_denoisers_are_trained_alike() -> None:
    from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel, FluxTransformer2DModel

    class Parts:
        vae_scale_factor, device = 2, torch.device("cpu")

        def __init__(self, transformer: Any) -> None:
            self.transformer, self.scheduler = transformer, DDIMScheduler()
            self.vae = AutoencoderKL(block_out_channels=(8, 16), latent_channels=4, norm_num_groups=4,
                                     down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip

    dit = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8, patch_size=2,
        num_embeds_ada_norm=3,
    )  # fmt: skip
    denoiser = Denoiser(Parts(dit))
    latents = denoiser.encode_pictures(torch.rand(2, 3, 16, 16))
    assert (denoiser.size, latents.shape) == (16, (2, 4, 8, 8))
    condition = denoiser.encode_captions([1, -1])
    assert condition["class_labels"].tolist() == [1, 3]
    denoiser.loss(latents, condition, torch.randn_like(latents), torch.tensor([3, 9])).sum().backward()
    flux = FluxTransformer2DModel(
        num_layers=1, num_single_layers=0, attention_head_dim=16, num_attention_heads=2, axes_dims_rope=(4, 4, 8)
    )
    with pytest.raises(InputError, match="SD3Transformer2DModel"):
        Denoiser(Parts(flux))


def test_folders_of_captioned_pictures(tmp_path: Path) -> None:
    def picture(path: Path, size: tuple[int, int] = (40, 30)) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, "red").save(path)

    picture(tmp_path / "a" / "red_cars" / "1.png")
    picture(tmp_path / "a" / "dogs" / "2.jpg", (20, 60))
    found = open_captions(tmp_path / "a")
    assert found.captions == ["a picture of a dogs", "a picture of a red cars"]
    assert found.tensor(16).shape == (2, 3, 16, 16)  # mixed sizes
    picture(tmp_path / "b" / "1.png")
    with pytest.raises(InputError, match=r"1 of 1 pictures .* no caption, such as \['1.png'\]"):
        open_captions(tmp_path / "b")
    (tmp_path / "b" / "1.txt").write_text("a red field\n")
    assert open_captions(tmp_path / "b").captions == ["a red field"]
    for row, message in (
        ({"file_name": "1.png"}, "entry 1"), ({"file_name": "../x.png", "text": "x"}, "no '../x.png'"), ("x", "entry 1")
    ):  # fmt: skip
        (tmp_path / "b" / "metadata.jsonl").write_text(json.dumps(row))
        with pytest.raises(InputError, match=message):
            open_captions(tmp_path / "b")
    (tmp_path / "b" / "metadata.jsonl").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        open_captions(tmp_path / "b")
    (tmp_path / "c").mkdir()
    for empty in (tmp_path / "c", tmp_path / "nowhere"):
        with pytest.raises(InputError):
            open_captions(empty)


def test_domains_stay_in_range_and_differ() -> None:
    plain = torch.rand(2, 3, 8, 8)
    for name, change in DOMAINS.items():
        changed = change(plain)
        assert changed.min() >= -1e-6, name
        assert changed.max() <= 1 + 1e-6, name
        assert (changed - plain).abs().mean() > 0.05, name
    with pytest.raises(InputError, match="washed out"):
        draw_domain("washed", 2)
