"""The prompt bank: same bits at any capacity, in any order, from two threads; few prompts kept."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from patchbloom.engine.config import ExpandConfig
from patchbloom.engine.coreset.coreset import open_coreset, write_coreset
from patchbloom.engine.expand import prompts as prompts_module
from patchbloom.engine.expand.expander import Expander
from patchbloom.engine.expand.prompt_bank import GROUP, PromptBank, open_prompt_bank
from patchbloom.engine.expand.prompts import TextEmbeddings, encode_prompts
from patchbloom.export.models import ModelParts, ModelSource, find_model, load_parts
from patchbloom.export.modules import PromptProjector
from patchbloom.train.prior.model import new_parts, save_parts
from torch import Tensor

PROMPTS = 43


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    parts = new_parts(32, folder / "words", unet_channels=(16, 32, 64), vae_channels=(8, 16, 16))
    save_parts(parts, folder / "model")
    return find_model(folder / "model")


@dataclass
class Banks:
    """Opens banks of the same prompts."""

    parts: ModelParts
    text: TextEmbeddings

    def open(self, capacity: int) -> PromptBank:
        return PromptBank(self.parts, self.text, conditioning_px=32, capacity=capacity)


@pytest.fixture(scope="module")
def banks(model: ModelSource, request: pytest.FixtureRequest) -> Banks:
    device, precision = request.param
    parts = load_parts(model, precision=precision, device=device)
    names = [f"A photo of a thing {number}" for number in range(PROMPTS)]
    return Banks(parts, encode_prompts(model, names, device=device, dtype=parts.unet.dtype))


on_every_device = pytest.mark.parametrize(
    "banks",
    [
        ("cpu", "fp32"),
        ("cpu", "bf16"),
        pytest.param(("cuda", "fp16"), marks=pytest.mark.gpu),
    ],
    indirect=True,
    ids=str,
)


def asked_at_random(calls: int) -> list[np.ndarray]:
    """Calls for 8 prompts, with repeats within and between calls."""
    rng = np.random.default_rng(0)
    return [rng.choice(rng.permutation(PROMPTS)[:7], 8) for _ in range(calls)]


def count_projected(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that logs the size of every projected group of prompts."""
    projected: list[int] = []
    project = PromptProjector.forward

    def forward(self: PromptProjector, *given: Tensor) -> Any:
        projected.append(len(given[0]))
        return project(self, *given)

    monkeypatch.setattr(PromptProjector, "forward", forward)
    return projected


@on_every_device
def test_the_same_bits_with_any_room(banks: Banks, monkeypatch: pytest.MonkeyPatch):
    whole = banks.open(PROMPTS)
    assert whole.resident
    assert whole.weights_bytes == 0
    projected = count_projected(monkeypatch)
    for capacity in (7, 8, 20, PROMPTS - 1):
        few = banks.open(capacity)
        assert not few.resident
        assert few.kept_bytes * PROMPTS == whole.kept_bytes * capacity
        before = len(projected)
        for classes_G in asked_at_random(60):
            expected = whole.of(classes_G)
            for found, right in zip(few.of(classes_G), expected, strict=True):
                assert torch.equal(found, right)
        assert len(projected) - before > PROMPTS / GROUP  # prompts were dropped and projected again
    assert set(projected) == {GROUP}
    added_GD, kv_GP = whole.of(np.arange(PROMPTS))
    assert len(added_GD.unique(dim=0)) == len(kv_GP.unique(dim=0)) == PROMPTS


@pytest.mark.parametrize("banks", [("cpu", "fp32")], indirect=True)
def test_a_cycle_finds_the_share_that_fits(banks: Banks):
    """Least recently used would find none."""
    bank, found, seen = banks.open(30), 0, []
    for _ in range(5):
        for each in range(PROMPTS):
            held = set(bank._rows)
            found += each in held
            bank.of(np.array([each]))
            seen.append(len(bank._rows))
    assert max(seen) == 30
    assert found >= 4 * 29
    bank.of(np.array([1, 2]))
    recent = [each for each in bank._rows if each not in (0, 1, 2)][-1]
    missing = next(each for each in range(PROMPTS) if each not in bank._rows)
    bank.of(np.array([missing, 1, 2]))
    assert recent not in bank._rows
    assert {missing, 1, 2} <= set(bank._rows)


@on_every_device
def test_two_threads_ask_one_bank(banks: Banks):
    whole, few = banks.open(PROMPTS), banks.open(9)

    def ask(calls: list[np.ndarray]) -> list[bool]:
        device = whole.of(calls[0])[1].device
        stream = torch.cuda.Stream() if device.type == "cuda" else None
        with torch.cuda.stream(stream):
            return [torch.equal(few.of(each)[1], whole.of(each)[1]) for each in calls]

    calls = asked_at_random(80)
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(ask, [calls, calls[::-1]]))
    assert answers == [[True] * 80] * 2


@pytest.mark.parametrize("banks", [("cpu", "fp32")], indirect=True)
def test_a_failed_projection_leaves_no_row_behind(banks: Banks, monkeypatch: pytest.MonkeyPatch):
    whole, few = banks.open(PROMPTS), banks.open(8)
    few.of(np.arange(8))

    def no_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(PromptProjector, "forward", no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            few.of(np.array([3, 20]))
    assert torch.equal(few.of(np.array([3, 20]))[1], whole.of(np.array([3, 20]))[1])


@pytest.mark.parametrize("banks", [("cpu", "fp32")], indirect=True)
def test_budgets(banks: Banks, capsys: pytest.CaptureFixture[str]):
    def opened(budget_bytes: int | None, least: int = 4) -> PromptBank:
        return open_prompt_bank(
            *(banks.parts, banks.text),
            conditioning_px=32,
            least=least,
            budget_bytes=budget_bytes,
        )

    row_bytes = banks.open(PROMPTS)._kv_CP[0].nbytes
    assert opened(None).resident
    assert opened(PROMPTS * row_bytes).resident
    assert opened(PROMPTS * row_bytes, least=70).resident
    assert not capsys.readouterr().err
    few = opened(5 * row_bytes)
    assert few.capacity == 5
    assert "values of 5 of 43 classes are kept" in capsys.readouterr().err
    weights = [each for layer in few._projector.projections for each in layer.parameters()]
    assert 0 < sum(weight.nbytes for weight in weights) <= few.weights_bytes
    assert few.weights_bytes < 0.3 * sum(w.nbytes for w in banks.parts.unet.parameters())
    with pytest.raises(ValueError, match=rf"expected {4 * row_bytes} or more, .* 4 prompts of one"):
        opened(4 * row_bytes - 1)
    with pytest.raises(ValueError, match="at most 5 different prompts in a call, got 6"):
        few.of(np.arange(6))


def test_prompts_are_encoded_in_chunks(model: ModelSource, monkeypatch: pytest.MonkeyPatch):
    """An encoder sees at most CHUNK of them at a time."""
    load, seen = prompts_module.load_text_encoder, []

    def load_watched(*given: Any, **options: Any) -> tuple[Any, Any]:
        tokenizer, encoder = load(*given, **options)
        encoder.register_forward_pre_hook(lambda _, tokens: seen.append(len(tokens[0])))
        return tokenizer, encoder

    names = [f"A photo of a thing {number}" for number in range(70)]
    whole = encode_prompts(model, names, device="cpu")
    monkeypatch.setattr(prompts_module, "load_text_encoder", load_watched)
    monkeypatch.setattr(prompts_module, "CHUNK", 16)
    chunked = encode_prompts(model, names, device="cpu")
    assert seen == [16, 16, 16, 16, 6] * 2
    torch.testing.assert_close(chunked.text_KLD, whole.text_KLD, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(chunked.pooled_KD, whole.pooled_KD, rtol=1e-5, atol=1e-5)
    assert len(chunked.text_KLD.flatten(1).unique(dim=0)) == 70


def test_a_coreset_of_two_thousand_classes(
    model: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With room for 64 prompts, it expands to the same images as with room for all."""
    classes, room = 2000, 64
    ids = [f"c{index:05}" for index in range(classes)]
    write_coreset(
        tmp_path / "coreset",
        patches_NHWC=np.random.default_rng(0).integers(0, 256, (classes, 8, 8, 3), np.uint8),
        class_ids=ids,
        class_names=ids,
        settings={
            "method": "random",
            "seed": 0,
            "image_size_px": 8,
            "factor": 1,
            "patch_px": 8,
            "ipc": 1,
        },
        provenance={},
    )
    coreset = open_coreset(tmp_path / "coreset")
    projected = count_projected(monkeypatch)
    samples = np.random.default_rng(1).permutation(classes)[:160]

    def images(budget_bytes: int | None) -> tuple[PromptBank, Tensor]:
        expander = Expander(
            model,
            ExpandConfig(
                size_px=16,
                steps=1,
                rho=1.0,
                batch=32,
                backend="eager",
                device="cpu",
                prompt_cache_bytes=budget_bytes,
            ),
            patches_NHWC=coreset.patches(),
            labels_N=coreset.labels_N,
            prompts_K=[f"A photo of a {name}" for name in coreset.class_names],
        )
        found = [expander.expand(each, 0) for each in np.split(samples, 5)]
        return expander.prompt_bank, torch.cat(found)

    whole, expected = images(None)
    assert whole.resident
    assert len(projected) == classes / GROUP
    row_bytes = whole.kept_bytes // classes
    projected.clear()
    few, found = images(room * row_bytes)
    assert few.kept_bytes <= (room + 1) * row_bytes
    assert len(projected) == len(samples) / GROUP  # only the requested prompts
    assert torch.equal(found, expected)
