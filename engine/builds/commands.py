"""`engine build|verify|list|info|remove|doctor`: run, print the result, return it as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...export.bundle import default_bundles_folder, find_bundles, named_bundle
from ...export.terminal import visible
from ..console import print_fields, print_table
from ..options import (
    EngineBuild,
    EngineDoctor,
    EngineInfo,
    EngineList,
    EngineRemove,
    EngineVerify,
)
from .catalogue import engine_info, list_engines, remove_engines
from .doctor import check_any_works, examine, show_examination

EngineCommand = EngineBuild | EngineVerify | EngineList | EngineInfo | EngineRemove | EngineDoctor


def run_engine_command(command: EngineCommand) -> dict[str, Any]:
    """Run the command, and print its result unless only JSON is requested."""
    bundles = (command.bundles or default_bundles_folder()).expanduser()
    match command:
        case EngineBuild():
            from .build import build_engine  # torch

            result, show = build_engine(command, bundles), _show_build
        case EngineVerify():
            return _verify(command, bundles)
        case EngineList():
            result, show = list_engines(bundles), _show_list
        case EngineInfo():
            result, show = engine_info(bundles, command.name), print_fields
        case EngineRemove():
            result, show = remove_engines(bundles, command.names, command.all), _show_removed
        case EngineDoctor():
            result, show = examine(bundles), show_examination
    if not command.json:
        show(result)
    if isinstance(command, EngineDoctor):
        check_any_works(result)
    return result


def _verify(command: EngineVerify, bundles: Path) -> dict[str, Any]:
    if command.names in ((), ("all",)):
        folders = find_bundles(bundles)
    else:
        folders = [named_bundle(bundles, name) for name in command.names]

    def show(result: dict[str, Any]) -> None:
        if not command.json:
            name = visible(result["engine"])
            print(f"{name}: {result['files']} files, {_mb(result['bytes'])}, all right")
            _show_parity(result)

    verified = []
    if folders:
        from .build import verify_engines  # torch

        verified = verify_engines(folders, show)
    return {"bundles": str(bundles), "verified": verified}


def _show_build(result: dict[str, Any]) -> None:
    state = f"built in {result['seconds']:.0f} s" if result["built"] else "already built"
    print(f"{visible(result['engine'])}: {state}, {_mb(result['bytes'])}")
    _show_parity(result)
    if result["built"]:
        print(f"peak memory: host {_mb(result['peak_host_bytes'])}", end="")
        gpu_bytes = result.get("peak_gpu_bytes")
        print(f", GPU {_mb(gpu_bytes)}" if gpu_bytes else "")
    print(f"in {visible(result['folder'])}")


def _show_parity(result: dict[str, Any]) -> None:
    parity = result.get("parity") or result.get("graph_parity")
    if parity is None:
        print(result["not_run"])
        return
    if "not_run" in result:
        print("the graphs, run by ONNX Runtime on the CPU in fp32:")
    rows = [["graph", "99.99 % abs", "limit", "max abs", "relative L2", "PSNR"]]
    for graph, measured in parity.items():
        psnr = f"{measured['psnr_db']:.1f} dB" if "psnr_db" in measured else ""
        names = ("high_abs", "limit", "max_abs", "relative_l2")
        numbers = [f"{measured[name]:.2e}" if name in measured else "" for name in names]
        rows.append([graph, *numbers, psnr])
    print_table(rows)
    if "not_run" in result:
        print(result["not_run"])


def _show_list(result: dict[str, Any]) -> None:
    rows = [["engine", "model", "backend", "on", "precision", "px", "batch", "MB", "built", "fits"]]
    for engine in result["engines"]:
        on = engine.get("gpu") or " ".join(engine.get("targets") or [engine.get("device", "")])
        first = [engine.get(name, "") for name in ("model", "backend")]
        shape = [str(engine.get(name, "")) for name in ("precision", "size_px", "batch")]
        built = (engine.get("built_at") or "")[:16].replace("T", " ")
        fits = f"no: {', '.join(engine['misfit'])}" if engine["misfit"] else "yes"
        if engine.get("targets") and not engine["ran_on"]:
            fits += "; not yet run"
        size_mb = f"{engine['bytes'] / 1e6:.1f}"
        rows.append([engine["engine"], *first, on, *shape, size_mb, built, fits])
    if len(rows) > 1:
        print_table(rows)
    count = len(rows) - 1
    print(f"{count or 'no'} engine{'' if count == 1 else 's'}, {_mb(result['bytes'])}", end="")
    print(f", in {visible(result['bundles'])}")


def _show_removed(result: dict[str, Any]) -> None:
    for name in result["removed"]:
        print(f"removed {visible(name)}")
    print(f"{result['freed_bytes']:,} bytes freed in {visible(result['bundles'])}")


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB"
