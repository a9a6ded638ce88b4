"""`train prior`'s folder: what may be resumed or replaced, and a kill at any call."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from patchbloom.engine.data.images import InputError
from patchbloom.export.models import ModelError, find_model
from patchbloom.train.commands import prior as prior_run
from patchbloom.train.config import PriorConfig
from patchbloom.train.options import TrainPrior
from patchbloom.train.prior.model import move_model
from patchbloom.train.run.folder import RunError
from PIL import Image


class BegunError(Exception):
    """Raised in place of the training, which no test here runs."""


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainPrior:
    """Command on three images in two classes; its training ends as soon as it begins."""

    def begin(training: Any, **_: Any) -> None:
        raise BegunError

    monkeypatch.setattr(prior_run.PriorTraining, "run", begin)
    draw = np.random.default_rng(0)
    for name in ("disc/a", "disc/b", "ring/a"):
        path = tmp_path / "data" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    config = PriorConfig(image_size=32)
    data, out = str(tmp_path / "data"), tmp_path / "model"
    return TrainPrior(data=data, out=out, prior=config, device="cpu")


def _begin(command: TrainPrior, **changes: Any) -> None:
    with pytest.raises(BegunError):
        prior_run.run_prior(replace(command, **changes), "train prior")


def _refused(command: TrainPrior, kind: type[ValueError], **changes: Any) -> str:
    with pytest.raises(kind) as caught:
        prior_run.run_prior(replace(command, **changes), "train prior")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _write_model(folder: Path, text: str) -> None:
    """All files that a model needs to open, each with `text` and a configuration's fields in it."""
    fields = {"sample_size": 8, "block_out_channels": [8], "cross_attention_dim": 64}
    fields |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64}
    fields |= {"hidden_size": 32, "projection_dim": 16}
    stems = dict.fromkeys(("unet", "vae"), "diffusion_pytorch_model")
    stems |= dict.fromkeys(("text_encoder", "text_encoder_2"), "model")
    names = [
        f"{part}/{name}" for part in stems for name in ("config.json", f"{stems[part]}.safetensors")
    ]
    for part in ("tokenizer", "tokenizer_2"):
        names += [f"{part}/tokenizer.json", f"{part}/tokenizer_config.json"]
    for name in (*names, "scheduler/scheduler_config.json", "model_card.json", "samples.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"text": text, **fields}))


def _texts(folder: Path) -> set[str]:
    files = [path for path in folder.rglob("*") if path.is_file() and ".work" not in path.parts]
    return {json.loads(path.read_text())["text"] for path in files}


def test_a_model_without_its_training_is_not_resumed_and_stays_until_replaced(
    command: TrainPrior,
) -> None:
    _write_model(command.out, "old")
    error = _refused(command, RunError, resume=True)
    assert "(no .work/settings.json): give --overwrite to replace it, or choose another" in error
    assert "is not empty: --overwrite the model there" in _refused(command, RunError)
    assert not (command.out / ".work").exists()
    _begin(command, overwrite=True)
    (command.out / ".work" / "vae.safetensors").write_text("of the first")
    seeded = replace(command.prior, seed=1)
    assert "--seed 0, now 1: give the same" in _refused(
        command, RunError, resume=True, prior=seeded
    )
    _begin(command, overwrite=True, prior=seeded)
    assert not (command.out / ".work" / "vae.safetensors").exists()
    assert json.loads((command.out / ".work" / "settings.json").read_text())["seed"] == 1
    assert _texts(command.out) == {"old"}
    _begin(command, resume=True, prior=seeded)


def test_images_and_their_latents_must_fit_into_memory(
    command: TrainPrior, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = 3 * 32**2 + 2 * 4 * 2 * 8 * 8**2  # pixels; 4 views, sharp and enlarged, in fp16
    monkeypatch.setattr(prior_run, "MOST_GIB", 2.5 * each / 2**30)
    assert "give a folder of at most 2 images, or a" in _refused(command, ValueError)
    sharp_alone = replace(command.prior, patch_factor=1)
    _begin(command, prior=sharp_alone)


def test_a_training_that_an_older_version_began_is_refused(command: TrainPrior) -> None:
    _begin(command)
    settings = command.out / ".work" / "settings.json"
    told = json.loads(settings.read_text())
    for newer in ("latent_channels", "patch_factor", "vae_factor", "parts"):
        del told[newer]
    settings.write_text(json.dumps({**told, "few_step_steps": 1000}))
    error = _refused(command, RunError, resume=True)
    assert "was begun with the model parts of an older version: give" in error


def test_a_resume_with_other_images_or_names_says_so(command: TrainPrior, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("disc plate\nring hoop\n")
    _begin(command)
    _begin(command, resume=True)
    error = _refused(command, RunError, resume=True, class_names=names)
    assert "was begun with other --class-names: give the same options to --resume" in error
    image = tmp_path / "data" / "disc" / "b.png"
    whole = image.read_bytes()
    image.write_bytes(whole[:-9] + b"x" + whole[-8:])
    error = _refused(command, RunError, resume=True, skip_corrupt=True)
    assert "1 have other content (train/disc/b.png): give the same images" in error
    image.write_bytes(whole)
    _begin(command, resume=True)
    image.unlink()
    error = _refused(command, RunError, resume=True)
    assert "was begun with other images in --data: give the same options to --resume" in error


def test_doubtful_names_are_warned_of(
    command: TrainPrior, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two classes of one prompt, by their folders or by a file of names; numbers for names."""
    data, names = tmp_path / "data", tmp_path / "names.txt"
    _begin(command)
    assert "warning" not in capsys.readouterr().err
    (data / "disc").rename(data / "sea-lion")
    (data / "ring").rename(data / "sea_lion")
    Path(shutil.copytree(data / "sea_lion", data / "00007"))
    _begin(command, overwrite=True)
    told = capsys.readouterr().err
    assert told.count("classes 'sea-lion' and 'sea_lion' share the prompt 'A photo of a sea") == 1
    assert told.count("1 classes have numbers for names, so that the first prompt is 'A ph") == 1
    names.write_text("00007 crane\nsea-lion crane\nsea_lion seal\n")
    _begin(command, overwrite=True, class_names=names)
    told = capsys.readouterr().err
    assert told.count("classes '00007' and 'sea-lion' share the prompt 'A photo of a crane'") == 1
    assert "numbers" not in told


def test_a_pickled_checkpoint_of_an_older_version_is_refused(command: TrainPrior) -> None:
    _begin(command)
    (command.out / ".work" / "vae.pt").write_text("of torch.save")
    error = _refused(command, RunError, resume=True)
    assert "checkpoints (.work/*.pt) are not read: give --overwrite to begin anew" in error
    _begin(command, overwrite=True)
    assert not (command.out / ".work" / "vae.pt").exists()


def test_a_teacher_that_is_not_there_is_told_before_anything_is_written(
    command: TrainPrior,
) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        prior_run.run_prior(replace(command, teacher="nowhere.safetensors"), "train prior")
    assert not command.out.exists()


def test_a_class_without_an_image_that_opens_is_refused_before_training(
    command: TrainPrior, tmp_path: Path
) -> None:
    only = tmp_path / "data" / "ring" / "a.png"
    only.write_bytes(only.read_bytes()[:60])
    error = _refused(command, InputError, skip_corrupt=True)
    assert f"{only.parent}: not one image in it can be decoded: add images or remove" in error
    shutil.copy(tmp_path / "data" / "disc" / "a.png", only.parent / "b.png")
    _begin(command, skip_corrupt=True)  # the refusal left nothing in the way


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("steps", 0), ("steps", 1001), ("vae_batch", 0), ("unet_batch", 0)),
        *(("guidance", float("nan")), ("guidance", float("inf"))),
        *(("seed", -1), ("seed", 2**63), ("width", 48), ("vae_width", 0), ("vae_width", 12)),
    ],
)
def test_what_would_fail_late_is_refused_early(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} {value}: expected "):
        PriorConfig(**{name: value})


class KilledError(Exception):
    """Raised instead of a call that removes or moves something."""


def _move_killed_at(last: int, built: Path, out: Path) -> bool:
    """Kill move_model at the `last`-th such call; return False when it makes fewer."""
    calls = 0

    def counted(real: Callable) -> Callable:
        def call(*given: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == last:
                raise KilledError
            return real(*given, **named)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("unlink", "rmdir", "replace"):
            patch.setattr(os, name, counted(getattr(os, name)))
        try:
            move_model(built, out)
        except KilledError:
            return True
    return False


def test_a_kill_while_a_model_is_replaced_leaves_no_mixture_that_opens(tmp_path: Path) -> None:
    out, built = tmp_path / "model", tmp_path / "model" / ".building"
    found, killed, last = set(), True, 0
    while killed:
        last += 1
        shutil.rmtree(out, ignore_errors=True)
        _write_model(out, "old")
        _write_model(built, "new")
        killed = _move_killed_at(last, built, out)
        shutil.rmtree(built, ignore_errors=True)
        try:
            find_model(out)
            found.add(" and ".join(sorted(_texts(out))))
        except ModelError:
            found.add("nothing that opens")
        _write_model(built, "new")
        move_model(built, out)
        assert _texts(out) == {"new"}
        assert not built.exists()
    assert last > 20
    assert found == {"old", "nothing that opens", "new"}
