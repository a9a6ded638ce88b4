"""`train prior`: its folder opens as SDXL, its maths is the sampler's, a stop loses nothing."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionXLImg2ImgPipeline
from patchbloom.engine.data.crops import to_pixels
from patchbloom.kernels.pixels import upsample_patches
from patchbloom.train.config import PriorConfig
from patchbloom.train.prior import loop as prior_loop
from patchbloom.train.prior import losses as prior_phases
from patchbloom.train.prior import training as prior
from patchbloom.train.prior.linear_start import norm_groups, start_linear
from patchbloom.train.prior.losses import (
    Conditioning,
    Denoising,
    LatentBank,
    SampledSteps,
    denoiser_loss,
    few_step_loss,
    guidance_loss,
)
from patchbloom.train.prior.model import (
    POSTERIOR_STD,
    new_parts,
    prompt_embeddings,
    save_parts,
    separate_prompts,
)
from patchbloom.train.prior.training import PriorTraining
from patchbloom.train.teacher.teacher import Teacher
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import avg_pool2d, interpolate

TINY = PriorConfig(
    image_size=32,
    width=32,
    vae_steps=3,
    vae_batch=4,
    unet_steps=3,
    unet_batch=4,
    guidance_steps=2,
    few_step_steps=2,
    substeps=2,
)


def _training(out: Path, device: str = "cpu", **changes: Any) -> PriorTraining:
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 256, (8, 32, 32, 3), generator=generator, dtype=torch.uint8)
    labels = torch.tensor([0] * 7 + [1])
    config = replace(TINY, **changes)
    names = ["disc", "ring"]
    return PriorTraining(config, pixels, labels, names, out, lambda line: None, device)


def _weights(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.glob("[!.]*/*.safetensors")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prior") / "model"
    return _training(out).run(data="noise", command="train prior")


def test_the_folder_opens_in_diffusers_and_says_how_it_was_made(trained: Path) -> None:
    pipeline = StableDiffusionXLImg2ImgPipeline.from_pretrained(trained)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        prompt=["A photo of a disc"] * 2,
        image=torch.rand(2, 3, 32, 32),
        strength=0.8,
        num_inference_steps=5,
        guidance_scale=0.0,
        output_type="np",
    ).images
    assert images.shape == (2, 32, 32, 3)
    card = json.loads((trained / "model_card.json").read_text())
    assert card["class_names"] == ["disc", "ring"]
    assert card["phases"]["few_step"]["steps"] == 2
    assert card["config"]["guidance"] == 3.0
    with Image.open(trained / "samples.png") as sheet:
        assert sheet.size == (14 * 32, 2 * 32)


def test_the_card_says_what_a_teacher_recognises(trained: Path, tmp_path: Path) -> None:
    class SumOfRed(torch.nn.Module):
        def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
            red_B = images_BCHW[:, 0].sum((1, 2))
            return torch.stack((red_B, -red_B), 1)

    teacher = Teacher(SumOfRed(), architecture="red", class_ids=["disc", "ring"], size_px=32)
    shutil.copytree(trained, tmp_path / "model")
    training = _training(tmp_path / "model")  # already finished: nothing is trained
    training.pixels_NHWC[:7, ..., 0], training.pixels_NHWC[7:, ..., 0] = 250, 240
    training.run(data="noise", command="train prior", teacher=teacher)
    now, before = _weights(tmp_path / "model"), _weights(trained)  # other pixels, other scales
    changed = {name for name in before if now[name] != before[name]}
    assert changed == {"vae/diffusion_pytorch_model.safetensors"}
    card = json.loads((tmp_path / "model" / "model_card.json").read_text())["recognised"]
    assert card["images_per_class"] == 50
    assert card["teacher"]["architecture"] == "red"
    assert card["percent"]["real"] == {"mean": 50.0, "by_class": [100.0, 0.0]}
    assert list(card["percent"]) == ["real", "reconstructed", "from_images", "from_noise"]
    for of in card["percent"].values():
        assert of["mean"] == pytest.approx(sum(of["by_class"]) / 2, abs=0.06)


def test_latents_have_unit_variance_and_the_posterior_its_width(trained: Path) -> None:
    training = _training(trained.parent / "other")
    training.train_vae()
    bank = training.encode_bank()
    assert len(bank.labels_N) == 8 * 4
    whole = bank.latents_NChw[:8].float()
    zeros_C = torch.zeros(TINY.latent_channels)
    torch.testing.assert_close(whole.mean((0, 2, 3)), zeros_C, atol=2e-3, rtol=0)
    assert float(whole.var((0, 2, 3)).mean()) == pytest.approx(1, abs=4e-3)
    moments = training.parts.vae.encode(torch.zeros(1, 3, 32, 32)).latent_dist
    torch.testing.assert_close(moments.std, torch.full_like(moments.std, POSTERIOR_STD))


@pytest.mark.parametrize("stopped_in", ["vae", "denoiser", "few_step"])
def test_a_stopped_run_goes_on_to_the_same_weights(
    trained: Path, stopped_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = prior_loop.write_checkpoint

    class StoppedError(Exception):
        pass

    def write_then_stop(path: Path, *content: Any) -> None:
        real(path, *content)
        if path.stem == stopped_in:
            raise StoppedError

    monkeypatch.setattr(prior_loop, "CHECKPOINT_EVERY_S", -1.0)
    monkeypatch.setattr(prior_loop, "write_checkpoint", write_then_stop)
    with pytest.raises(StoppedError):
        _training(tmp_path / "model").run(data="noise", command="train prior")
    monkeypatch.undo()
    resumed = _training(tmp_path / "model").run(data="noise", command="train prior")
    assert _weights(resumed) == _weights(trained)


def _without_gradient(loss: torch.Tensor) -> torch.Tensor:
    """The same loss with a NaN gradient."""
    return loss + (loss * 0).sqrt()


@pytest.mark.parametrize(
    ("spoilt_step", "spoil", "message"),
    [
        (1, lambda loss: loss * torch.nan, "loss is nan at step 1 of 2"),
        (2, _without_gradient, "weights are not finite after 2 steps"),
    ],
)
def test_a_prior_that_diverges_is_never_installed(
    trained: Path,
    spoilt_step: int,
    spoil: Callable[[torch.Tensor], torch.Tensor],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "model"
    shutil.copytree(trained, out)
    (out / ".work" / "few_step.safetensors").unlink()
    steps = 0

    def spoilt(*given: Any, **named: Any) -> torch.Tensor:
        nonlocal steps
        steps += 1
        loss = few_step_loss(*given, **named)
        return spoil(loss) if steps == spoilt_step else loss

    monkeypatch.setattr(prior, "few_step_loss", spoilt)
    with pytest.raises(ValueError, match=f"diverged in phase few_step, its {message}.*--seed"):
        _training(out).run(data="other", command="train prior")
    assert steps == spoilt_step
    monkeypatch.undo()
    if spoilt_step == 2:  # its checkpoint was written
        with pytest.raises(ValueError, match=message):
            _training(out).run(data="other", command="train prior")
    assert _weights(out) == _weights(trained)
    assert json.loads((out / "model_card.json").read_text())["data"] == "noise"


def test_a_wider_one_in_bf16_without_crops(tmp_path: Path) -> None:
    wider = {"width": 64, "vae_width": 24, "vae_factor": 2, "latent_channels": 6}
    training = _training(tmp_path / "model", **wider, precision="bf16", crops=0, steps=1)
    folder = training.run(data="noise", command="train prior")
    pipeline = StableDiffusionXLImg2ImgPipeline.from_pretrained(folder)
    assert pipeline.unet.config.block_out_channels == [64, 64, 128]
    assert pipeline.vae.config.block_out_channels == [24, 48]
    assert pipeline.unet.config.in_channels == pipeline.vae.config.latent_channels == 6
    assert all(
        math.isfinite(loss) for phase in training.phases.values() for _, loss in phase["losses"]
    )
    assert len(training.encode_bank().labels_N) == 8 * 2


@pytest.mark.gpu
def test_a_gpu_trains_it(tmp_path: Path) -> None:
    folder = _training(tmp_path / "model", device="cuda").run(data="noise", command="train prior")
    assert StableDiffusionXLImg2ImgPipeline.from_pretrained(folder) is not None


@pytest.mark.filterwarnings("ignore:.*Disabling autocast")
def test_every_loss_stays_on_the_device_of_its_bank(tmp_path: Path) -> None:
    """Fake CUDA tensors without data: one left on the CPU raises."""
    parts = new_parts(32, tmp_path, unet_channels=(16, 32, 64), vae_channels=(8, 16, 32))
    steps = prior_phases.sampled_steps(parts.scheduler, 5)
    fake = FakeTensorMode()

    def on_gpu(tensor: torch.Tensor) -> torch.Tensor:
        told = fake.from_tensor(tensor)
        with fake:
            return told.detach().to("cuda")

    for module in (*parts.unet.modules(), *parts.vae.modules()):
        for name, weight in list(module._parameters.items()):
            if weight is not None:
                module._parameters[name] = torch.nn.Parameter(on_gpu(weight))
    shapes = [(8, 4, 8, 8), (8,), (8, 6)]
    latents, classes, time_ids = (on_gpu(torch.zeros(shape)) for shape in shapes)
    prompts = [on_gpu(torch.zeros(shape)) for shape in [(3, 77, 64), (3, 32)]]
    images, sigmas = on_gpu(torch.zeros(2, 3, 32, 32)), on_gpu(torch.ones(1000))
    visited = SampledSteps(*map(on_gpu, steps))
    draw = torch.Generator()
    with fake:
        bank = LatentBank(latents, latents, classes.long(), time_ids)
        task = Denoising(bank, Conditioning(*prompts), sigmas, batch=4, half=True)
        losses = [
            prior_phases.vae_loss(parts.vae, images, draw),
            denoiser_loss(parts.unet, draw, task),
            guidance_loss(parts.unet, draw, task, parts.unet, 3.0),
            few_step_loss(parts.unet, draw, task, parts.unet, visited, 2),
        ]
    assert [str(loss.device) for loss in losses] == ["cuda:0"] * 4


def test_latents_are_scaled_by_what_their_channels_show(tmp_path: Path) -> None:
    """Reconstructions stay the same; a channel that hardly shows gets a small variance."""
    torch.manual_seed(1)
    vae = new_parts(32, tmp_path, latent_channels=6).vae
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        vae.post_quant_conv.weight[:, 3] *= 1e-2
        means = vae.encode(images).latent_dist.mean
        before = vae.decode(means).sample
        prior_phases.balance_channels(vae, means)
        balanced = vae.encode(images).latent_dist.mean
        torch.testing.assert_close(vae.decode(balanced).sample, before, atol=1e-4, rtol=1e-4)
    variance_C = balanced.var((0, 2, 3))
    assert float(variance_C.mean()) == pytest.approx(1, abs=1e-3)
    assert float(variance_C[3] / variance_C.median()) == pytest.approx(1e-2, rel=0.7)
    torch.testing.assert_close(balanced.mean((0, 2, 3)), torch.zeros(6), atol=1e-4, rtol=0)
    prior_phases.balance_channels(vae, means[:1])
    assert vae.quant_conv.weight.isfinite().all()


@pytest.mark.parametrize(
    ("widths", "channels"), [((8, 16), 4), ((16, 32), 12), ((8, 16, 32), 8), ((16, 32, 64), 16)]
)
def test_an_autoencoder_begins_linear(tmp_path: Path, widths: tuple[int, ...], channels: int):
    """Standard principal components in, the mean colour of every block out, whatever the image."""
    torch.manual_seed(1)
    groups, factor = norm_groups(widths[0]), 2 ** (len(widths) - 1)
    sizes = {"vae_channels": widths, "latent_channels": channels, "vae_groups": groups}
    vae = new_parts(32, tmp_path, **sizes).vae
    tints, coarse = torch.rand(200, 3, 1, 1), torch.rand(200, 3, 8, 8)
    images = interpolate(coarse, 32, mode="bicubic").clamp(0, 1) * tints * 2 - 1
    images += torch.randn(images.shape) * 0.02
    start_linear(vae, images)
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mean
        decoded = vae.decode(latents).sample
        (mixed,) = vae.encode(images[:100].lerp(images[100:], 0.5)).latent_dist.mean[None]
    torch.testing.assert_close(mixed, latents[:100].lerp(latents[100:], 0.5), atol=0.15, rtol=0)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(channels), atol=0.02, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(channels), atol=0.05, rtol=0)
    means = interpolate(avg_pool2d(images, factor), 32)
    assert (decoded - means).square().mean().sqrt() < 0.03


def test_the_denoiser_learns_to_sharpen_patches(tmp_path: Path) -> None:
    """From any start its target leads to sharp latents, and low noise starts are hardly blurred."""
    torch.manual_seed(0)
    training = _training(tmp_path / "model")
    bank = training.encode_bank()
    patches = to_pixels(
        interpolate(training._images(slice(8)), 16, mode="bilinear", antialias=True)
    )
    as_shown = upsample_patches(patches.contiguous(), 32)
    torch.testing.assert_close(bank.enlarged_NChw[:7], training._encode(as_shown)[:7].half())

    sharp, enlarged = torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2)
    one = LatentBank(sharp, enlarged, torch.zeros(1, dtype=torch.int64), torch.zeros(1, 6))
    task = Denoising(one, training.conditioning, training.sigmas, batch=4000, half=False)
    for t, most in ((999, 1.0), (400, 1.0), (50, float(training.sigmas[50]) / 0.5)):
        draw = torch.Generator().manual_seed(t)
        noisy, target = task.draw(torch.full((4000,), t), draw)
        sigma = noisy.sigmas_B[:, None, None, None]
        torch.testing.assert_close(
            noisy.states_B4hw - sigma * target, 0 * target, atol=1e-4, rtol=0
        )
        blurred = (noisy.states_B4hw / sigma).mean((1, 2, 3)) * noisy.sigmas_B
        assert float(blurred.mean()) == pytest.approx(most * 0.4, abs=0.02 + float(sigma[0]) * 0.05)
    assert (
        _training(tmp_path / "none", patch_factor=1)
        .encode_bank()
        .enlarged_NChw.equal(
            _training(tmp_path / "none", patch_factor=1).encode_bank().latents_NChw
        )
    )


def test_sampled_steps_are_the_schedulers_own() -> None:
    """Every Euler-ancestral step of diffusers with a known epsilon lands on our sigma_down."""
    scheduler = EulerAncestralDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
    )
    steps = prior_phases.sampled_steps(scheduler, 5)
    assert steps.timesteps_S.tolist() == [999, 799, 599, 399, 199]
    scheduler.set_timesteps(5)
    state, eps = torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2)
    for k, t in enumerate(scheduler.timesteps):
        generator = torch.Generator().manual_seed(k)
        after = scheduler.step(eps, t, state, generator=generator).prev_sample
        noise = torch.randn(state.shape, generator=torch.Generator().manual_seed(k))
        high, low = scheduler.sigmas[k], scheduler.sigmas[k + 1]
        up = (low**2 - steps.sigmas_down_S[k] ** 2).clamp(min=0).sqrt()
        expected = state + eps * (steps.sigmas_down_S[k] - high) + up * noise
        torch.testing.assert_close(after, expected)


def test_timesteps_of_sigmas_invert_the_table() -> None:
    table = prior_phases.sigma_table(
        EulerAncestralDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
        )
    )
    for t in (0, 1, 199, 598, 999):
        assert float(prior_phases._timestep_of(table[t : t + 1], table)) == pytest.approx(
            t, abs=0.01
        )


@pytest.mark.parametrize("classes", [1, 9, 300])
def test_prompts_are_told_apart(tmp_path: Path, classes: int) -> None:
    """Pooled states of names of the same length: far apart, of mean 0 and root mean square 3."""
    torch.manual_seed(0)
    parts = new_parts(32, tmp_path / "tokenizer")
    prompts = [f"A photo of a {chr(97 + n // 26)}{chr(97 + n % 26)}t" for n in range(classes)]
    separate_prompts(parts, [*prompts, ""])
    _, pooled = prompt_embeddings(parts, [*prompts, ""])
    torch.testing.assert_close(pooled.mean(0), torch.zeros(32), atol=1e-3, rtol=0)
    assert float(pooled.square().mean()) == pytest.approx(9, abs=1e-2)
    gaps = torch.pdist(pooled)
    assert float(gaps.min()) > 3  # the root mean square gap is 24
    if classes < 32:
        torch.testing.assert_close(gaps, gaps.mean().expand_as(gaps), atol=0.2, rtol=0)


def test_every_prompt_has_its_own_embedding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    parts = new_parts(32, tmp_path / "tokenizer")
    states, pooled = prompt_embeddings(
        parts, ["A photo of a disc", "A photo of a ring", "", "épée"]
    )
    assert states.shape == (4, 77, 64)
    assert pooled.shape == (4, 32)
    gaps = torch.cdist(pooled, pooled) + 10 * torch.eye(4)
    assert float(gaps.min()) > 0.1
    ids = parts.tokenizer("naïve Ünïcode ☂").input_ids
    assert parts.tokenizer.unk_token_id not in ids[1:-1]
    save_parts(parts, tmp_path / "model")
    size = sum(p.stat().st_size for p in (tmp_path / "model").rglob("*.safetensors"))
    assert size < 12e6
