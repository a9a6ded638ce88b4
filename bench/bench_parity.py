"""Parity of our pictures with those of diffusers' own img2img pipeline, over batches.

    python bench/bench_parity.py --model sdxl-tiny --backends eager ort inductor --batches 1 3 32 70

Every backend is opened at every batch and makes as many pictures, from the same latents and noise,
as diffusers makes in one call. Wrong prompts and a wrong timestep must fail the same gate
(bench/pictures.py). Nothing is timed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers_peer import open_pipeline
from measure import environment, publish, run_program
from patchbloom.export.models import find_model
from pictures import (
    TOLERANCE,
    Errors,
    compare,
    expander_cases,
    make_coreset,
    open_expander,
    pipeline_pictures,
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Parity with diffusers."""

    model: str = "sdxl-tiny"
    """Name or folder of a model."""
    backends: tuple[str, ...] = ("eager", "ort", "inductor")
    """Backends to compare: eager, ort, inductor; append -bf16 for bf16."""
    batches: tuple[int, ...] = (1, 3, 32, 70)
    """Engine batches; a batch makes as many pictures."""
    size: int = 64
    """Image size in px; patches are half as large."""
    classes: int = 10
    threads: int = 2
    json: bool = False
    """Print the row as the last line."""
    record: bool = True
    """Append the row to bench/results/."""


def main(options: Options) -> None:
    """Compare, print a table, publish the row."""
    torch.set_num_threads(options.threads)
    model = find_model(options.model)
    pipeline = open_pipeline(model.folder)
    if options.classes < 2:
        raise ValueError(f"--classes {options.classes}: expected 2 or more, to confuse prompts")
    per_class = -(-max(options.batches) // options.classes)
    coreset = make_coreset(
        classes=options.classes,
        patches_per_class=per_class,
        side_px=options.size // 2,
        seed=0,
    )
    errors: dict[str, dict[int, Errors]] = {}
    print("backend        batch   max abs  relative L2     PSNR  wrong timestep  wrong prompt")
    for name in options.backends:
        for batch in options.batches:
            expander = open_expander(
                name, model, coreset, device="cpu", size_px=options.size, batch=batch
            )
            samples = torch.arange(batch) * 7 % len(coreset.labels_N)
            expected = pipeline_pictures(pipeline, coreset, samples, expander.config)
            cases = expander_cases(expander, coreset, samples)
            found = compare(name, cases, expected, expander.config.precision)
            errors.setdefault(name, {})[batch] = found
            same = found["same"]
            print(
                f"{name:14} {batch:5}  {same['max_abs']:8.1e}  {same['relative_l2']:11.1e}  "
                f"{same['psnr_db']:4.0f} dB  {found['wrong_timestep']['max_abs']:14.2f}  "
                f"{found['wrong_prompt']['max_abs']:12.2f}",
                flush=True,
            )
            expander.close()
    row = environment() | {
        "benchmark": "parity",
        "model": options.model,
        "size_px": options.size,
        "steps": expander.config.steps,
        "rho": expander.config.rho,
        "tolerance": TOLERANCE,
        "errors": errors,
    }
    publish(row, record=options.record, as_json=options.json)


if __name__ == "__main__":
    run_program(main, Options)
