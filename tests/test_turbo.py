"""The Expander against diffusers' pipeline, and what its images depend on."""

from __future__ import annotations

import dataclasses
import gc
import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers_peer as peer
import numpy as np
import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from patchbloom.engine.config import ExpandConfig
from patchbloom.engine.expand import backends
from patchbloom.engine.expand import expander as turbo_module
from patchbloom.engine.expand import prompts as prompts_module
from patchbloom.engine.expand.batches import images_per_prompt, plan_batches
from patchbloom.engine.expand.expander import Expander
from patchbloom.engine.expand.schedule import make_schedule
from patchbloom.export import graphs
from patchbloom.export.config import EngineSpec
from patchbloom.export.models import (
    ModelSource,
    Unavailable,
    find_model,
    weights_sha256,
)
from patchbloom.export.modules import LatentDecoder, PromptProjector
from patchbloom.kernels.noise import Draw, normal, uniform
from patchbloom.train.batching import fitting_batch
from patchbloom.train.prior.model import new_parts, save_parts
from torch import Tensor

TOLERANCE = 1e-4
COMPILE = pytest.param("compile", marks=pytest.mark.slow)
SEED, EPOCH = 11, 3
PROMPTS = ("A photo of a disc", "A photo of a star", "A photo of a cross")
LABELS_N = np.repeat(np.arange(3), 4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """Like sdxl-tiny but smaller, with random weights scaled so that prompts matter."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    parts = new_parts(32, folder / "spelling", unet_channels=(16, 32, 64), vae_channels=(8, 16, 32))
    for name, weight in parts.unet.named_parameters():
        if "attn2" in name or "add_embedding" in name:
            weight.data.mul_(4.0)
    save_parts(parts, folder / "model")
    return find_model(folder / "model")


@pytest.fixture(scope="module")
def patches() -> Tensor:
    draws = uniform(0, Draw.ORDER, torch.arange(12), 0, 16 * 16 * 3)
    return (draws * 255).round().to(torch.uint8).view(12, 16, 16, 3)


@pytest.fixture(scope="module")
def expander(
    model: ModelSource, patches: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Expander]:
    """Makes Expanders; equal settings return the same one."""
    made: dict[tuple, Expander] = {}
    bundles = tmp_path_factory.mktemp("bundles")

    def make(prompts: tuple[str, ...] = PROMPTS, **settings: object) -> Expander:
        fields = {"size_px": 32, "batch": 8, "seed": SEED, "backend": "eager", "device": "cpu"}
        fields |= settings
        key = (prompts, *sorted(fields.items()))
        if key not in made:
            made[key] = Expander(
                model,
                ExpandConfig(bundles=bundles, **fields),  # type: ignore[arg-type]
                patches_NHWC=patches,
                labels_N=LABELS_N,
                prompts_K=prompts,
            )
        return made[key]

    return make


@pytest.fixture(scope="module")
def diffusers_images(model: ModelSource) -> Callable[..., Tensor]:
    """Images of diffusers' img2img pipeline from latents, with our noise of `samples`."""
    pipeline = peer.open_pipeline(model.folder)

    def make(samples: Tensor, latents: Tensor, *, steps: int, rho: float) -> Tensor:
        with peer.noise_of_ours(pipeline, samples, seed=SEED, epoch=EPOCH):
            return peer.run_pipeline(
                pipeline,
                prompts_of(samples),
                image=latents,
                strength=rho,
                num_inference_steps=steps,
            )

    return make


def prompts_of(samples: Tensor) -> list[str]:
    return [PROMPTS[LABELS_N[sample]] for sample in samples]


def max_error(images: Tensor, reference: Tensor) -> float:
    return float((images - reference).abs().max())


SAMPLES = torch.tensor([7, 0, 3, 11, 4, 5, 8])


@pytest.mark.parametrize("rho", [0.4, 0.8, 1.0])
@pytest.mark.parametrize("steps", [1, 4, 5])
@pytest.mark.parametrize("backend", ["eager", COMPILE, "ort"])
def test_equals_diffusers(expander, diffusers_images, backend, steps, rho):
    if int(steps * rho) == 0:
        with pytest.raises(ValueError, match="rounds to 0 evaluations: rho must be at least 1"):
            expander(steps=steps, rho=rho, backend=backend)
        return
    ours = expander(steps=steps, rho=rho, mixup=False, backend=backend)
    reference = diffusers_images(SAMPLES, ours.latents()[SAMPLES], steps=steps, rho=rho)
    assert ours.schedule.evals == int(steps * rho)
    assert float(reference.std()) > 0.05
    assert max_error(ours.expand(SAMPLES, EPOCH), reference) <= TOLERANCE


@pytest.mark.parametrize(
    ("posterior", "law"),
    [("mean", "uniform"), ("sample", "uniform"), ("mean", "beta:0.5"), ("mean", "0.3")],
)
def test_mixup_follows_the_formula(expander, diffusers_images, posterior, law):
    ours = expander(posterior=posterior).varied(mixup_weight=law)
    bank = ours.latents(EPOCH)
    first = torch.from_numpy(LABELS_N[SAMPLES] * 4)
    draw = uniform(SEED, Draw.MIXUP_PARTNER, SAMPLES, EPOCH, 1)[:, 0]
    partner = first + (draw * 4).floor().long().clamp(max=3)
    weight = uniform(SEED, Draw.MIXUP_WEIGHT, SAMPLES, EPOCH, 1).view(-1, 1, 1, 1)
    quantile = {"beta:0.5": lambda u: (u * torch.pi / 2).sin() ** 2, "0.3": lambda u: 0 * u + 0.3}
    weight = quantile.get(law, lambda u: u)(weight)
    mixed = weight * bank[SAMPLES] + (1 - weight) * bank[partner]
    reference = diffusers_images(SAMPLES, mixed, steps=5, rho=0.8)
    assert max_error(ours.expand(SAMPLES, EPOCH), reference) <= TOLERANCE


@pytest.mark.parametrize("steps", [1, 4])
def test_start_from_noise_equals_text_to_image(expander, model, steps):
    from diffusers import StableDiffusionXLPipeline

    parts = peer.open_pipeline(model.folder).components
    pipeline = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    with peer.noise_of_ours(pipeline, SAMPLES, seed=SEED, epoch=EPOCH):
        reference = peer.run_pipeline(
            pipeline, prompts_of(SAMPLES), height=32, width=32, num_inference_steps=steps
        )
    images = expander(start="noise", steps=steps).expand(SAMPLES, EPOCH)
    assert max_error(images, reference) <= TOLERANCE


@pytest.mark.parametrize("backend", ["eager", COMPILE, "ort"])
def test_wrong_prompt_and_wrong_timestep_fail_the_same_gate(expander, backend):
    right = expander(mixup=False, backend=backend)
    images = right.expand(SAMPLES, EPOCH)
    swapped = expander((PROMPTS[1], PROMPTS[2], PROMPTS[0]), mixup=False, backend=backend)
    assert max_error(swapped.expand(SAMPLES, EPOCH), images) > 10 * TOLERANCE
    timesteps = right._timesteps_1
    try:
        right._timesteps_1 = [t - 50 for t in timesteps]
        assert max_error(right.expand(SAMPLES, EPOCH), images) > 10 * TOLERANCE
    finally:
        right._timesteps_1 = timesteps


@pytest.mark.parametrize("backend", ["eager", COMPILE, "ort"])
def test_an_image_does_not_depend_on_order_or_neighbours(expander, backend):
    ours = expander(backend=backend)
    whole = ours.expand(range(12), EPOCH)
    order = torch.tensor([5, 11, 0, 8, 3, 7, 1, 10, 2, 9, 6, 4])
    assert torch.equal(ours.expand(order, EPOCH), whole[order])
    for sample in range(12):
        assert torch.equal(ours.expand([sample], EPOCH)[0], whole[sample])
    assert torch.equal(ours.expand([3, 3, 9], EPOCH), whole[[3, 3, 9]])


@pytest.mark.parametrize(
    ("backend", "batch"), [("eager", 1), ("eager", 3), ("eager", 70), ("ort", 3)]
)
def test_engine_batches_agree(expander, backend, batch):
    whole = expander(backend=backend).expand(range(12), EPOCH)
    assert (
        max_error(expander(backend=backend, batch=batch).expand(range(12), EPOCH), whole)
        <= TOLERANCE
    )


def test_encoder_and_decoder_run_in_parts(model, patches, monkeypatch):
    config = ExpandConfig(size_px=32, batch=12, seed=SEED, backend="eager", device="cpu")
    coreset = {"patches_NHWC": patches, "labels_N": LABELS_N, "prompts_K": PROMPTS}
    whole = Expander(model, config, **coreset)
    monkeypatch.setattr(graphs, "VAE_ELEMENTS", 5 * 16 * 32**2)
    decoded = []
    decode = LatentDecoder.forward
    monkeypatch.setattr(
        LatentDecoder, "forward", lambda self, x: decoded.append(len(x)) or decode(self, x)
    )
    parts, samples = Expander(model, config, **coreset), np.arange(12)
    assert max_error(parts.expand(samples, EPOCH), whole.expand(samples, EPOCH)) <= TOLERANCE
    assert max_error(parts.latents(), whole.latents()) <= TOLERANCE
    assert decoded == [4, 4, 4, 12]


def test_a_compiled_session_runs_in_parts():
    """The last image fills up the last part; the session overwrites its result."""
    result = torch.empty(4, 3)

    def run(values_BCHW: Tensor) -> Tensor:
        assert len(values_BCHW) == 4
        return result.copy_(values_BCHW.flatten(1)[:, :3] * 2)

    values = torch.randn(10, 3, 1, 1)
    assert torch.equal(backends._in_parts(run, values, 4), values.flatten(1) * 2)


def test_regions_are_compiled_once_for_a_shape(expander, monkeypatch):
    """Traced whole by torch.compile, without Inductor's minute of C++."""
    right, real = expander().expand(SAMPLES, EPOCH), torch.compile

    def trace(forward: Any, *, options: dict, **given: Any) -> Any:
        return real(forward, backend="aot_eager", **given)

    monkeypatch.setattr(torch, "compile", trace)
    torch._dynamo.reset()
    counted = torch._dynamo.utils.counters["stats"]
    counted.clear()
    first = expander(backend="compile")
    assert max_error(first.expand(SAMPLES, EPOCH), right) <= TOLERANCE
    shapes = counted["unique_graphs"]
    networks = (getattr(first.backend, f"_{name}") for name in ("encoder", "denoiser", "decoder"))
    modules = [each for network in networks for each in network.modules()]
    regions = [each for each in modules if "forward" in vars(each)]
    blocks = [each for each in regions if isinstance(each, BasicTransformerBlock)]
    assert len({(each.attn1.heads, each.norm1.normalized_shape) for each in blocks}) < len(blocks)
    assert 0 < shapes < len(regions)
    again = expander(backend="compile", seed=SEED + 1)
    again.expand(SAMPLES, EPOCH)
    assert counted["unique_graphs"] == shapes


def test_auto_prefers_a_stored_engine(expander, model, monkeypatch):
    """It would run eagerly without one."""
    monkeypatch.setattr(backends, "choose_backend", lambda spec: "eager")
    stored = expander(backend="ort")
    config = dataclasses.replace(stored.config, backend="auto")
    counts_K = np.bincount(LABELS_N)
    assert backends.plan_engine(model, config, counts_K) == ("ort", stored.spec)
    trt = dataclasses.replace(config, backend="auto", trt_library="rtx")
    assert backends.plan_engine(model, trt, counts_K)[0] == "ort"
    other = dataclasses.replace(config, batch=6)
    name, spec = backends.plan_engine(model, other, counts_K)
    assert (name, spec.batch) == ("eager", 6)


def test_seed_and_epoch_make_other_images(expander):
    images = expander().expand(SAMPLES, EPOCH)
    assert max_error(expander().expand(SAMPLES, EPOCH + 1), images) > 0.05
    assert max_error(expander(seed=SEED + 1).expand(SAMPLES, EPOCH), images) > 0.05


@pytest.mark.parametrize(("precision", "limit"), [("fp16", 0.05), ("bf16", 0.3)])
def test_half_precision_stays_near(expander, precision, limit):
    images = expander(precision=precision).expand(SAMPLES, EPOCH)
    assert images.dtype == torch.float32
    assert 0 < max_error(images, expander().expand(SAMPLES, EPOCH)) < limit


def test_images_of_nan_are_refused(expander, monkeypatch):
    ours = expander()
    decode = ours.backend.decode

    def overflow(latents_BCHW: Tensor) -> Tensor:
        images_BCHW = decode(latents_BCHW).clone()
        images_BCHW[1, 0, 0, 0] = torch.nan
        return images_BCHW

    monkeypatch.setattr(ours.backend, "decode", overflow)
    with pytest.raises(ValueError, match="makes NaN in fp32: use --vae-precision"):
        ours.expand(SAMPLES, EPOCH)


def test_samples_are_checked(expander):
    ours = expander()
    with pytest.raises(ValueError, match=r"samples must lie in \[0, 12\)"):
        ours.expand([12], EPOCH)
    assert ours.expand([], EPOCH).shape == (0, 3, 32, 32)


def test_posterior_sample_is_mean_plus_noise(expander, patches):
    mean, sampled = expander().latents(), expander(posterior="sample")
    noise = normal(SEED, Draw.POSTERIOR, torch.arange(12), EPOCH, (4, 8, 8))
    std = (sampled.latents(EPOCH) - mean) / noise
    other = (sampled.latents(EPOCH + 1) - mean) / normal(
        SEED, Draw.POSTERIOR, torch.arange(12), EPOCH + 1, (4, 8, 8)
    )
    assert float(std.min()) > 0
    torch.testing.assert_close(std, other, rtol=1e-2, atol=1e-3)


def test_bad_coresets_are_refused(model, patches):
    config = ExpandConfig(size_px=32, backend="eager", device="cpu")

    def open_with(**changes: object) -> Expander:
        fields = {"patches_NHWC": patches, "labels_N": LABELS_N, "prompts_K": PROMPTS}
        return Expander(model, config, **(fields | changes))  # type: ignore[arg-type]

    with pytest.raises(ValueError, match="one prompt per class"):
        open_with(prompts_K=PROMPTS[:2])
    with pytest.raises(ValueError, match="sorted"):
        open_with(labels_N=LABELS_N[::-1])
    with pytest.raises(TypeError, match="expected uint8"):
        open_with(patches_NHWC=patches.float())
    with pytest.raises(ValueError, match="11 patches but 12 labels"):
        open_with(patches_NHWC=patches[:11])
    with pytest.raises(ValueError, match="multiple of 4 px"):
        Expander(
            model,
            dataclasses.replace(config, size_px=30),
            patches_NHWC=patches,
            labels_N=LABELS_N,
            prompts_K=PROMPTS,
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_and_trt_are_refused_where_there_is_none(expander):
    with pytest.raises(Unavailable, match="no CUDA GPU here"):
        expander(device="cuda")
    with pytest.raises(Unavailable, match="the trt backend needs an NVIDIA GPU"):
        expander(backend="trt")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_torch_cannot_use_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert backends.resolve_device("auto") == "cpu"
    monkeypatch.setattr(backends, "gpus_of_driver", lambda: 1)
    monkeypatch.setattr(backends, "driver_version", lambda: "470.1")
    with pytest.raises(
        Unavailable, match=r"GPU with driver 470\.1, but torch .* update the driver"
    ):
        backends.resolve_device("auto")
    assert backends.resolve_device("cpu") == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert backends.resolve_device("auto") == "cpu"


def test_schedule_is_the_papers():
    config = {
        "_class_name": "EulerAncestralDiscreteScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "timestep_spacing": "trailing",
    }
    schedule = make_schedule(config, steps=5, rho=0.8)
    assert schedule.timesteps == (799, 599, 399, 199)
    assert schedule.sigmas_up[-1] == 0
    assert schedule.sigmas_down[-1] == 0
    assert schedule.model_scales[0] == pytest.approx(0.193, abs=1e-3)
    assert make_schedule(config, steps=5, rho=0.5) == make_schedule(config, steps=5, rho=0.4)


@pytest.mark.parametrize(("steps", "rho"), [(1, 0.5), (3, 0.1), (7, 0.1), (2, 0.25), (6, 0.01)])
def test_what_a_refused_rho_is_told_works(steps: int, rho: float):
    config = {"timestep_spacing": "trailing"}
    with pytest.raises(ValueError, match="rounds to 0 evaluations") as refused:
        make_schedule(config, steps=steps, rho=rho)
    enough = [float(word.rstrip(",")) for word in str(refused.value).split() if word[0].isdigit()]
    assert enough[:2] == [rho, steps]
    assert make_schedule(config, steps=steps, rho=enough[-2]).evals == 1
    assert make_schedule(config, steps=int(enough[-1]), rho=rho).evals == 1
    with pytest.raises(ValueError, match="rounds to 0 evaluations"):
        make_schedule(config, steps=int(enough[-1]) - 1, rho=rho)


def test_plans_cover_every_sample_once():
    labels = np.repeat(np.arange(4), [4, 8, 0, 12]).astype(np.int64)
    assert images_per_prompt(16, np.bincount(labels)) == 4
    samples = np.random.default_rng(0).permutation(24)[:13].astype(np.int64)
    for prompts, images in ((4, 4), (8, 2), (1, 8), (5, 1)):
        found = np.full(13, -1)
        spec = EngineSpec(size_px=32, batch=prompts * images, images_per_prompt=images)
        for plan in plan_batches(samples, labels, spec):
            assert plan.samples_B.shape == (prompts * images,)
            assert np.array_equal(labels[plan.samples_B], np.repeat(plan.classes_G, images))
            kept = plan.targets_B >= 0
            assert np.all(found[plan.targets_B[kept]] == -1)
            found[plan.targets_B[kept]] = plan.samples_B[kept]
        assert np.array_equal(found, samples)


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_calls_that_are_dealt_to_ranks_are_made_again(ranks: int):
    labels = np.repeat(np.arange(4), [4, 8, 0, 12]).astype(np.int64)
    samples = np.random.default_rng(1).permutation(24)[:17].astype(np.int64)
    for prompts, images in ((2, 4), (4, 1), (1, 2), (3, 2)):
        spec = EngineSpec(size_px=32, batch=prompts * images, images_per_prompt=images)
        calls = list(plan_batches(samples, labels, spec))
        for rank in range(ranks):
            own = calls[rank::ranks]
            at = [call.targets_B[call.targets_B >= 0] for call in own]
            again = plan_batches(samples[np.concatenate([*at, []]).astype(int)], labels, spec)
            for call, repeated in zip(own, again, strict=True):
                assert np.array_equal(call.samples_B, repeated.samples_B)  # padding, too
                assert np.array_equal(call.classes_G, repeated.classes_G)


def test_varied_settings_share_the_networks(expander):
    ours = expander()
    other = ours.varied(rho=0.4, mixup=False)
    assert other.backend is ours.backend
    same = expander(rho=0.4, mixup=False)
    assert torch.equal(other.expand(SAMPLES, EPOCH), same.expand(SAMPLES, EPOCH))
    whole = ours.varied(rho=0.4, mixup_weight="1")
    assert torch.equal(whole.expand(SAMPLES, EPOCH), same.expand(SAMPLES, EPOCH))
    with pytest.raises(ValueError, match="cannot vary size_px"):
        ours.varied(size_px=64)


def test_description_names_the_images(expander, model):
    described = expander(backend="ort").describe()
    assert described["weights_sha256"] == weights_sha256(model)
    assert described["evals"] == 4
    assert described["backend"] == "ort"
    assert json.loads(json.dumps(described)) == described
    assert expander(start="noise", steps=1).describe()["rho"] is None
    assert "mixup_weight" not in described
    assert expander(mixup_weight="beta:0.50").describe()["mixup_weight"] == "beta:0.5"


def test_what_does_not_change_is_computed_once(expander, model, patches, monkeypatch):
    """Text encoders are freed before the UNet is loaded; expanding encodes nothing again."""
    alive: list[weakref.ref] = []
    load_encoder, load_networks = prompts_module.load_text_encoder, turbo_module.load_parts

    def load_text(*arguments, **options):
        tokenizer, encoder = load_encoder(*arguments, **options)
        alive.append(weakref.ref(encoder))
        return tokenizer, encoder

    def load_parts(*arguments, **options):
        gc.collect()
        assert [reference() for reference in alive] == [None, None]
        return load_networks(*arguments, **options)

    monkeypatch.setattr(prompts_module, "load_text_encoder", load_text)
    monkeypatch.setattr(turbo_module, "load_parts", load_parts)
    ours = Expander(
        model,
        ExpandConfig(size_px=32, batch=8, backend="eager", device="cpu"),
        patches_NHWC=patches,
        labels_N=LABELS_N,
        prompts_K=PROMPTS,
    )
    calls = []
    denoise = ours.backend.denoise
    monkeypatch.setattr(ours.backend, "encode_moments", None)
    monkeypatch.setattr(PromptProjector, "forward", None)
    monkeypatch.setattr(ours.backend, "denoise", lambda *a: (calls.append(a), denoise(*a))[1])
    ours.expand(range(12), 0)
    assert len(calls) == 2 * 4  # two batches of 8 hold 12 samples; 4 evaluations each
    assert calls[0][3].shape[0] == 2  # keys and values of 2 prompts for 8 images


def test_bench_reports_no_speed_without_the_same_pictures(model, tmp_path):
    bench = Path(__file__).parents[1] / "bench" / "bench_expand.py"
    options = ["--backends", "diffusers", "eager", "--batch", "4", "--images", "4", "--size", "32"]
    options += ["--classes", "2", "--patches-per-class", "4", "--rounds", "1", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, bench, "--model", model.folder, "--no-record", "--json", *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["images_per_s"].keys() == {"diffusers", "eager"}
    assert row["precision"] == {"diffusers": "fp32", "eager": "fp32"}
    errors = {case: error["max_abs"] for case, error in row["errors"]["eager"].items()}
    assert errors["same"] <= TOLERANCE < min(errors["wrong_prompt"], errors["wrong_timestep"])


@pytest.mark.parametrize(
    ("samples", "batch"), [(40, 20), (400, 25), (32, 32), (148, 32), (31, 31), (7, 7), (74, 32)]
)
def test_the_engine_batch_divides_an_epoch_where_it_can(samples: int, batch: int) -> None:
    assert fitting_batch(samples) == batch
