"""Method t2i: prompts by class id, images generated once, their variants and their number."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cli_cases import runner
from patchbloom.engine.config import ExpandConfig
from patchbloom.engine.coreset.coreset import Coreset, open_coreset
from patchbloom.engine.data.names import read_prompts
from patchbloom.engine.expand.expander import Expander
from patchbloom.engine.expand.prompts import class_prompts, encode_prompts
from patchbloom.export.models import find_model
from patchbloom.train import cli
from patchbloom.train.commands import pipeline
from patchbloom.train.coreset_options import RenderOptions
from patchbloom.train.loader import ExpandedLoader
from patchbloom.train.methods import t2i_coreset as generated
from patchbloom.train.methods.method import Making
from patchbloom.train.methods.t2i_coreset import generate_rounds
from patchbloom.train.methods.variants import Variants, augment, draw_variants
from patchbloom.train.methods.whole_images import StoredImages
from patchbloom.train.run.world import ALONE
from patchbloom.train.students.from_manifest import open_recorded_source
from run_processes import write_inputs
from student_cases import CONFIG, Silent

IDS = ("n01440764", "n02102040", "red_fox")
NAMES = ("tench", "springer", "fox")
SHORT = (
    *("--backend", "eager", "--teacher", "convnet-d3-w8", "--teacher-epochs", "1", "--epochs", "2"),
    *("--student", "convnet-d3-w8", "--seeds", "1", "--no-ceiling"),
)
PDA = ("--method", "t2i", "--ipc", "5", "--variants", "4")
UNCHANGED: dict[str, Any] = {
    "mirrored_P": False,
    "upturned_P": False,
    "contrast_P": 1.0,
    "brightness_P": 0.0,
    "angle_P": 0.0,
    "gamma_P": 1.0,
}

Train = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Options with data and a model of random weights, both of 32 px."""
    return write_inputs(tmp_path_factory.mktemp("given"))


@pytest.fixture
def train(capsys: pytest.CaptureFixture[str], given: tuple[str, ...]) -> Train:
    run = runner(capsys)
    return lambda *arguments: run(*arguments, *given).told


@pytest.fixture(scope="module")
def whole(given: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run: one generated image per class, four variants of it, two epochs."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert cli.main([*given, *SHORT, *PDA, "--out", str(out)]) == 0
    return out


def pngs(coreset: Coreset) -> dict[str, str]:
    """{patch: sha256}."""
    files = coreset.manifest["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".png")}


@pytest.mark.parametrize(
    "text",
    [
        "red_fox\ta {name} in snow\nn01440764 a fish\n",
        '{"red_fox": "a {name} in snow", "n01440764": "a fish"}',
    ],
)
def test_own_prompts_go_by_class_id_and_the_others_by_template(tmp_path: Path, text: str) -> None:
    path = tmp_path / "prompts"
    path.write_text(text)
    own = read_prompts(path, IDS)
    assert own == {"n01440764": "a fish", "red_fox": "a {name} in snow"}
    prompts = class_prompts(NAMES, "the {name}", class_ids=IDS, own=own)
    assert prompts == ("a fish", "the springer", "a fox in snow")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("red_fox a fox\nred_fox a fox\n", "'red_fox' is given twice: keep one of them"),
        ('{"red_fox": "a fox", "red_fox": "b"}', "'red_fox' is given twice: keep one of them"),
        ("redfox a fox\n", r"ids of the 3 classes \(n01440764, .*\), got 'redfox': correct it"),
        ("", "it is empty: expected a prompt for one class or more"),
        ("red fox a fox\n", r"got 'red': correct it \(a tab ends an id with spaces\)"),
        ("red_fox\n", "expected a line 'id prompt', got 'red_fox'"),
        ('{"red_fox": ["a", "b"]}', "'red_fox': expected a prompt, got"),
        (None, "no such file"),
    ],
)
def test_prompts_that_cannot_be_meant_are_refused(
    tmp_path: Path, text: str | None, told: str
) -> None:
    path = tmp_path / "prompts"
    if text is not None:
        path.write_text(text)
    with pytest.raises((ValueError, OSError), match=f"--prompts .*{told}"):
        read_prompts(path, IDS)


def test_a_prompt_that_would_be_cut_off_is_refused() -> None:
    model = find_model("sdxl-tiny")
    long = "disc " * 76
    with pytest.raises(ValueError, match="expected at most 77 tokens, the model's limit"):
        encode_prompts(model, ["a disc", long], device="cpu")


def test_variants_have_the_published_frequencies_and_ranges() -> None:
    count = 20_000
    drawn = draw_variants(3, torch.arange(count), 1)
    for done_P, probability in (
        (drawn.mirrored_P, 0.8),
        (drawn.upturned_P, 0.8),
        (drawn.contrast_P != 1, 0.5),
        (drawn.angle_P != 0, 0.8),
        (drawn.gamma_P != 1, 0.5),
    ):
        five_sigma = 5 * math.sqrt(probability * (1 - probability) / count)
        assert float(done_P.double().mean()) == pytest.approx(probability, abs=five_sigma)
    assert torch.equal(drawn.contrast_P != 1, drawn.brightness_P != 0)
    for values_P, centre, half in (
        (drawn.contrast_P, 1, 0.2),
        (drawn.brightness_P, 0, 0.2),
        (drawn.angle_P, 0, 60),
        (drawn.gamma_P, 1, 0.2),
    ):
        spread_M = (values_P[values_P != centre] - centre) / half  # uniform in (-1, 1)
        assert 0.99 < float(spread_M.abs().max()) <= 1
        assert float(spread_M.mean()) == pytest.approx(0, abs=5 / math.sqrt(3 * len(spread_M)))
        assert float(spread_M.std()) == pytest.approx(1 / math.sqrt(3), rel=0.02)
    flags = torch.stack([drawn.mirrored_P, drawn.upturned_P, drawn.angle_P != 0]).double()
    assert float((torch.corrcoef(flags) - torch.eye(3)).abs().max()) < 0.04


def test_a_variant_is_what_the_formulas_say() -> None:
    """Each part alone, on an image that is not square, against arithmetic per pixel."""
    image_HWC = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)

    def varied(**changed: Any) -> np.ndarray:
        parts = {key: torch.tensor([v]) for key, v in {**UNCHANGED, **changed}.items()}
        return augment(torch.from_numpy(image_HWC)[None], Variants(**parts))[0].numpy()

    np.testing.assert_array_equal(varied(), image_HWC)
    np.testing.assert_array_equal(varied(mirrored_P=True), image_HWC[:, ::-1])
    np.testing.assert_array_equal(varied(upturned_P=True), image_HWC[::-1])
    np.testing.assert_array_equal(varied(angle_P=180.0), image_HWC[::-1, ::-1])
    toned = np.clip(image_HWC / 255 * 1.17 - 0.11, 0, 1) * 255
    assert np.abs(varied(contrast_P=1.17, brightness_P=-0.11) - toned).max() <= 0.5
    bent = (image_HWC / 255) ** 0.83 * 255
    assert np.abs(varied(gamma_P=0.83) - bent).max() <= 0.5
    turned = varied(angle_P=37.0).astype(float)
    for y, x in np.ndindex(8, 6):
        assert np.abs(turned[y, x] - _sampled(image_HWC, y, x, math.radians(37))).max() <= 0.51


def _sampled(image_HWC: np.ndarray, y: int, x: int, angle: float) -> np.ndarray:
    """Pixel of the image rotated about its centre: bilinear, reflected at the outermost pixels."""
    last = np.array(image_HWC.shape[:2]) - 1
    dy, dx = (y, x) - last / 2
    down = math.cos(angle) * dy - math.sin(angle) * dx
    right = math.cos(angle) * dx + math.sin(angle) * dy
    at = last / 2 + np.array([down, right])
    value = np.zeros(3)
    for step in np.ndindex(2, 2):
        corner = np.floor(at).astype(int) + step
        weight = np.prod(1 - np.abs(at - corner))
        value += weight * image_HWC[tuple(last - np.abs(last - corner % (2 * last)))]
    return value


def source(images: int, variants: int, shown: int, size_px: int = 10) -> StoredImages:
    """Two classes of `images` different images, with `shown` samples per class and epoch."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (2 * images, size_px, size_px, 3), generator=generator)
    return StoredImages(
        method="t2i",
        images_NHWC=pixels.to(torch.uint8),
        class_ids=("a", "b"),
        samples_per_class=shown,
        variants=variants,
        seed=7,
    )


@pytest.mark.parametrize(
    ("images", "variants", "shown", "epochs"),
    [(2, 4, 10, 1), (2, 4, 40, 1), (1, 0, 4, 1), (3, 0, 8, 3), (3, 1, 4, 3)],
)
def test_generated_times_augmented_is_shown_evenly(
    images: int, variants: int, shown: int, epochs: int
) -> None:
    """One of 1 + variants showings is the image itself, over as many epochs as make this even."""
    shows = source(images, variants, shown)
    assert shows.samples == len(shows.labels_N) == 2 * shown
    originals = [i.numpy().tobytes() for i in shows.images_NHWC]
    seen = dict.fromkeys(originals, 0)
    others = set()
    for epoch in range(epochs):
        pixels = (shows.render(torch.arange(2 * shown), epoch) + 1).mul(127.5).round()
        for image_CHW, label in zip(pixels, shows.labels_N.tolist(), strict=True):
            found = image_CHW.to(torch.uint8).permute(1, 2, 0).contiguous().numpy().tobytes()
            if found in seen:
                seen[found] += 1
                assert originals.index(found) // images == label
            else:
                others.add(found)
    each = epochs * shown // (images * (1 + variants))
    assert each * images * (1 + variants) == epochs * shown
    assert set(seen.values()) == {each}
    assert len(others) == 2 * (epochs * shown - each * images)  # no variant repeats


def test_a_variant_is_a_function_of_seed_sample_and_epoch() -> None:
    shows = source(2, 4, 100, size_px=9)
    every = torch.arange(200)
    images = shows.render(every, 3)
    order = torch.randperm(200, generator=torch.manual_seed(0))
    assert torch.equal(shows.render(order, 3), images[order])
    assert torch.equal(torch.cat([shows.render(s, 3) for s in every.split(7)]), images)
    varied = (every % 10) >= 2
    for other in (shows.render(every, 4), replace(shows, seed=8).render(every, 3)):
        same = (other == images).flatten(1).all(1)
        assert bool(same[~varied].all())
        assert not same[varied].any()
    assert torch.equal(replace(shows, variants=0).render(every, 3)[~varied], images[~varied])


def _killed() -> float:
    raise RuntimeError("no seconds are left")


class Clocked:
    """Ten classes; every call takes the next of `seconds`, on a fake clock."""

    samples = 10

    def __init__(self, *seconds: float) -> None:
        self.now, self._seconds = 100.0, iter(seconds)
        self.asked: list[tuple[list[int], int]] = []

    def render(self, samples_P: torch.Tensor, epoch: int) -> torch.Tensor:
        self.now += next(self._seconds, None) or _killed()
        self.asked.append((samples_P.tolist(), epoch))
        value_P = (samples_P + 10 * epoch).float() / 127.5 - 1
        return value_P[:, None, None, None].expand(-1, 3, 4, 4)

    def monotonic(self) -> float:
        return self.now


def making(count: int | None, budget_s: float | None) -> Making:
    plan: Any = SimpleNamespace(generated=count, budget_seconds=budget_s, image_size=4)
    return Making(plan=plan, world=ALONE, report=Silent(), teacher=_killed)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seconds", "budget_s", "made"),
    [
        ((3, 1, 1, 1, 1, 1, 1, 9), 6.5, 4),  # a slow first round (warm-up) predicts nothing
        ((1, 1, 1, 9), 3.0, 3),
        ((2, 2, 2, 9), 2.0, 1),
        ((1, 1, 1, 3, 9), 8.0, 4),
    ],
)
def test_a_budget_buys_the_first_rounds_that_fit(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    seconds: tuple[float, ...],
    budget_s: float,
    made: int,
) -> None:
    def rounds(clocked: Any, count: int | None, budget_s: float | None, together: int, **config):
        monkeypatch.setattr(generated.time, "monotonic", clocked.monotonic)
        asked = making(count, budget_s)
        return generate_rounds(asked, clocked, tmp_path, config, together=together)

    killed = Clocked(*seconds[: made // 2])
    with pytest.raises(RuntimeError, match="no seconds are left"):
        rounds(killed, None, budget_s, 16)
    resumed = Clocked(*seconds[made // 2 :])
    bought_NHWC, taken = rounds(resumed, None, budget_s, 16)
    assert [epoch for _, epoch in resumed.asked] == list(range(made // 2, made))
    assert taken == list(seconds[:made])
    of_class_3 = bought_NHWC.view(10, made, -1)[3, :, 0]
    assert of_class_3.tolist() == [3 + 10 * number for number in range(made)]
    clocked = Clocked(*[1.0] * 40)
    counted_NHWC, _ = rounds(clocked, made, None, 4, other="settings")
    assert torch.equal(counted_NHWC, bought_NHWC)
    assert clocked.asked[:3] == [([0, 1, 2, 3], 0), ([4, 5, 6, 7], 0), ([8, 9], 0)]


def test_a_budget_without_a_round_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clocked: Any = Clocked(3.0)
    monkeypatch.setattr(generated.time, "monotonic", clocked.monotonic)
    with pytest.raises(ValueError, match=r"--budget-seconds 2: one image of each class takes 3 s"):
        generate_rounds(making(None, 2.0), clocked, tmp_path, {}, together=16)


def test_a_run_stores_what_the_model_makes_of_noise(whole: Path, given: tuple[str, ...]) -> None:
    coreset = open_coreset(whole / "coreset")
    settings = coreset.settings
    assert (settings["ipc"], settings["generated"], settings["variants"]) == (5, 1, 4)
    assert (settings["factor"], settings["patch_px"], settings["image_size_px"]) == (1, 32, 32)
    assert settings["samples_per_class"] == 20  # ipc · r², as many steps as the other methods
    assert settings["generator"]["evals"] == settings["generator"]["steps"] == 1
    assert len(pngs(coreset)) == 10
    config = ExpandConfig(size_px=32, steps=1, start="noise", batch=10, images_per_prompt=1)
    expander = Expander(
        find_model(given[3]),
        replace(config, backend="eager", device="cpu"),
        patches_NHWC=None,
        labels_N=torch.arange(10),
        prompts_K=class_prompts(coreset.class_names),
    )
    made = expander.expand(torch.arange(10), epoch=0)
    expander.close()
    kept = coreset.patches().permute(0, 3, 1, 2).float() / 127.5 - 1
    assert float((kept - made.clamp(-1, 1)).abs().max()) <= 0.5 / 127.5 + 1e-6
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["settings"]["t2i"]["variants"] == 4
    assert summary["evals_per_image"] == {"t2i": 0}
    sizes = summary["bytes"]["t2i"]
    assert sizes["generator"] == 0
    assert sizes["with_generator"] == sizes["with_labels"]
    assert "t2i: 1 generated images per class, each with 4 variants: IPC 5" in summary["notes"][1]
    assert len(list((whole / "pictures").glob("rendered-t2i.png"))) == 1


def test_a_loader_shows_samples_and_not_patches(whole: Path) -> None:
    with ExpandedLoader(whole / "coreset", batch=64, class_indices=True, device="cpu") as loader:
        assert len(loader) == 4
        batches = list(loader)
    classes = torch.cat([classes_B for _, _, classes_B in batches])
    assert torch.bincount(classes).tolist() == [20] * 10


def test_more_images_begin_with_fewer_and_a_budget_with_both(
    train: Train, whole: Path, tmp_path: Path
) -> None:
    outs = {}
    teacher = ("--teacher", whole / "teacher" / "teacher.safetensors")
    for name, options in {"count": ("--ipc", "2"), "budget": ("--budget-seconds", "3")}.items():
        out = tmp_path / name
        result = train("coreset", *SHORT, *teacher, "--method", "t2i", *options, "--out", out)
        outs[name] = open_coreset(out / "coreset")
        assert result["coresets"]["t2i"]["generated"] == outs[name].settings["generated"]
    few, one = pngs(outs["count"]), pngs(open_coreset(whole / "coreset"))
    assert len(few) == 20
    assert one.items() <= few.items()
    bought = outs["budget"]
    assert bought.settings["generated"] == bought.settings["ipc"] >= 2
    assert bought.settings["samples_per_class"] == 4
    assert len(pngs(bought)) == 10 * bought.settings["generated"]
    assert few.items() <= pngs(bought).items()
    assert bought.manifest["provenance"]["generation"]["budget_s"] == 3
    content = json.dumps({**bought.manifest, "provenance": None})
    assert "budget" not in content


def test_other_sizes_are_made_and_kept_at_the_image_size(
    train: Train, whole: Path, tmp_path: Path
) -> None:
    teacher = ("--teacher", whole / "teacher" / "teacher.safetensors", "--image-size", "32")
    options = ("coreset", *SHORT, *teacher, "--method", "t2i", "--out", tmp_path / "run")
    assert (
        "--generate-size 50: expected a multiple of 4"
        in (train(*options, "--generate-size", "50")["error"])
    )
    train(*options, "--generate-size", "48")
    coreset = open_coreset(tmp_path / "run" / "coreset")
    assert coreset.settings["generator"]["generate_size"] == 48
    assert coreset.patches().shape == (10, 32, 32, 3)
    assert pngs(coreset).keys() == pngs(open_coreset(whole / "coreset")).keys()
    assert not pngs(coreset).items() & pngs(open_coreset(whole / "coreset")).items()


def test_a_stopped_generation_resumes_and_a_finished_one_is_not_paid_again(
    train: Train, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"

    def stopped(*_: object, **__: object) -> None:
        raise OSError("as if killed")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_coreset", stopped)
        assert "as if killed" in train(*SHORT, *PDA, "--out", out)["error"]
    train("coreset", *SHORT, *PDA, "--out", out)
    monkeypatch.setattr(generated, "generate_rounds", stopped)
    result = train(*SHORT, *PDA, "--out", out, "--resume")
    then = json.loads((whole / "summary.json").read_text())
    assert result["content_sha256"] == then["content_sha256"]
    assert result["accuracy"] == then["accuracy"]
    name = "students/t2i-seed0.safetensors"
    assert (out / name).read_bytes() == (whole / name).read_bytes()
    for options, told in (
        (("--steps", "2"), "was run with t2i's --steps = 1, now asked for 2"),
        (("--prompt", "{name}"), "was run with --prompt = A photo of a {name}, now asked for {nam"),
        (("--variants", "0"), "was run with --variants = 4, now asked for 0"),
    ):
        assert told in train(*SHORT, *PDA, *options, "--out", out, "--resume")["error"]


def test_a_prompt_of_its_own_changes_its_class_alone(
    train: Train, given: tuple[str, ...], whole: Path, tmp_path: Path
) -> None:
    """In t2i's stored images, and in those that dace renders from its manifest."""
    (tmp_path / "prompts").write_text('{"ring": "blue {name}s, many of them"}')
    options = ("coreset", *SHORT, "--teacher", whole / "teacher" / "teacher.safetensors")
    both = ("--method", "dace", "t2i", "--out", tmp_path / "run", "--prompts", tmp_path / "prompts")
    train(*options, *both, "--rho", "1")
    own, plain = open_coreset(tmp_path / "run" / "coreset-t2i"), open_coreset(whole / "coreset")
    changed = {name for name, sha256 in pngs(own).items() if pngs(plain)[name] != sha256}
    assert changed == {"patches/ring/000000.png"}
    dace = open_coreset(tmp_path / "run" / "coreset")
    prompts = {"ring": "blue {name}s, many of them"}
    assert dace.manifest["model"]["prompts"] == own.settings["generator"]["prompts"] == prompts
    assert "prompts" not in plain.settings["generator"]
    rows = torch.arange(0, 40, 4)
    images = []
    for opened in (dace, _without_own_prompts(dace)):
        use = RenderOptions(model=given[3], device="cpu")
        with open_recorded_source(opened, use, "eager", replace(CONFIG, device="cpu")) as renders:
            images.append(renders.render(rows, 0))
    differs = (images[0] != images[1]).flatten(1).any(1)
    assert [dace.class_ids[row] for row in differs.nonzero()[:, 0].tolist()] == ["ring"]


def _without_own_prompts(coreset: Coreset) -> Coreset:
    model = {key: v for key, v in coreset.manifest["model"].items() if key != "prompts"}
    return Coreset(coreset.folder, {**coreset.manifest, "model": model})
