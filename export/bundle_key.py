"""The key of a bundle, with its name, its command line, and the differences between two keys.

A key is plain JSON, made by engines.engine_key: everything that a built engine depends on. It holds
backend, model, hashes of the weights and of our exporting code, library versions, GPU name and SM
count, flags, and the fields of EngineSpec. Graphs that were only exported have the
backend "onnx", and `exported_for` names the backend that they are for.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from .config import TrtLibraryName
from .documents import Positive
from .durable import json_sha256

BUNDLE_NAME = re.compile(r"[^.].*-\d+px-\d+x\d+-[0-9a-f]{12}")
"""Names that bundle_name makes; other folders are neither listed nor removed."""
GRAPHS_ONLY = "onnx"


class BundleKey(BaseModel):
    """The fields of every version's keys that commands read."""

    model: str
    weights: str
    backend: str
    device: str
    precision: str
    size_px: Positive
    batch: Positive
    images_per_prompt: Positive
    weights_sha256: str = ""
    exported_for: str = ""
    gpu: str | None = None
    libraries: dict[str, str] = {}
    trt_library: TrtLibraryName | None = None
    targets: list[str] = []


def bundle_name(key: Mapping[str, Any]) -> str:
    """A readable folder name that ends in a hash of the whole key."""
    runs_on = "-".join(key.get("targets", ())) or key["device"]
    readable = [key["model"], key["backend"], runs_on, key["precision"]]
    # The name of a local folder, made short, visible and safe for a path.
    readable[0] = re.sub(r"[^\w.-]+", "-", readable[0])[:64].strip(".-") or "model"
    if key["weights"] == "random":
        readable[0] += "-random"
    shape = f"{key['size_px']}px-{batch_shape(key)}"
    return "-".join([*readable, shape, json_sha256(key)[:12]])


def batch_shape(key: Mapping[str, Any]) -> str:
    """G prompts × n images, as "4x8"."""
    return f"{key['batch'] // key['images_per_prompt']}x{key['images_per_prompt']}"


def build_command(key: Mapping[str, Any], model: str | None = None, place: str = "") -> str:
    """The command line that builds a key's engine.

    `model`: its folder, if it is a local one; `place`: what bundle.bundles_option gives.
    """
    backend = key.get("exported_for", key["backend"])
    command = f"engine build --model {shlex.quote(model or key['model'])} --backend {backend}"
    if key["weights"] == "random":
        command += " --weights random"
    if key["backend"] == GRAPHS_ONLY:
        command += " --export-only"
    for option in (
        *("size_px", "batch", "min_batch", "images_per_prompt"),
        *("precision", "vae_precision", "opset", "device"),
    ):
        if key.get(option) is not None:
            name = option.removesuffix("_px").replace("_", "-")
            command += f" --{name} {key[option]}"
    if key.get("calibration") and key["weights"] != "random":
        command += " --calibrate RUN"
    if targets := key.get("targets"):
        command += f" --for {' '.join(targets)}"
    elif library := key.get("trt_library"):
        command += f" --trt-library {library}"
    return command + place


def why_not(found: Mapping[str, Any], needed: Mapping[str, Any]) -> list[str]:
    """The fields in which two keys differ, as "libraries.torch 2.11 (here 2.12)".

    A bundle may hold plans for more targets than are needed.
    """
    before, now = _flat(found), _flat(needed)
    if set(now.get("targets") or ()) <= set(before.get("targets") or ()):
        before["targets"] = now.get("targets")
    return [
        f"{field} {_short(field, before.get(field))} (here {_short(field, now.get(field))})"
        for field in sorted(before.keys() | now.keys())
        if before.get(field) != now.get(field)
    ]


def _flat(key: Mapping[str, Any]) -> dict[str, Any]:
    flat = {}
    for field, value in key.items():
        inner = value if isinstance(value, Mapping) else {}
        flat |= {f"{field}.{name}": entry for name, entry in inner.items()} or {field: value}
    return flat


def _short(field: str, value: Any) -> str:
    return str(value)[:12] if field.endswith("sha256") else str(value)
