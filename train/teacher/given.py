"""The teacher that `--teacher` names: a file, torchvision:NAME, timm:NAME, or what a function
returns."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from ...engine.data.names import doubtful_order, imagenet_names
from ...engine.errors import reason
from ...engine.expand.backends import resolve_device
from ...export.documents import AboveZero, Finite, Side, check_document
from ...export.durable import file_sha256
from ...export.terminal import say
from ..config import TIMM, TORCHVISION, teacher_file
from ..networks import build_network, call_network, timm_config, torchvision_name
from ..plugins import is_function
from ..run.checkpoint import (
    CheckpointError,
    Tensors,
    read_tensors,
    restoring,
)
from .normalisation import IMAGENET, Normalisation
from .teacher import SCHEMA, Teacher

_THREE = Field(min_length=3, max_length=3)


class _Normalisation(BaseModel):
    mean: Annotated[list[Finite], _THREE]
    std: Annotated[list[AboveZero], _THREE]


class _Metadata(BaseModel):
    architecture: str
    class_ids: list[str]
    size_px: Side
    normalisation: _Normalisation
    accuracy: Finite | None


def teacher_id(source: str) -> str:
    """The content hash of a file; another name unchanged."""
    path = Path(source).expanduser()
    return f"sha256:{file_sha256(path)}" if path.is_file() else source


def load_teacher(
    spec: str | nn.Module,
    class_ids: Sequence[str],
    *,
    network: str | None = None,
    size_px: int | None = None,
    device: str = "auto",
) -> Teacher:
    """The teacher that `--teacher` names, for the data set's classes in their order.

    `spec` is a file that `train teacher` wrote; a state dict saved by torch (read with
    weights_only) of the architecture `network`, trained at `size_px` with ImageNet's normalisation
    on the classes in the order of its `class_ids`, or without them of the folder names; or
    torchvision:NAME or timm:NAME, trained on ImageNet-1k: the class ids must be among its 1000
    WordNet ids; or package.module:function, which is called with (number of classes, `size_px`) and
    returns a trained module. A module is copied; it takes images of `size_px`, in training mode or
    not, with ImageNet's normalisation or that of its attribute `normalisation`, (mean, std).

    Raises CheckpointError for classes or weights that do not fit, FileNotFoundError for a missing
    file.
    """
    on = resolve_device(device)  # pyright: ignore[reportArgumentType]
    if isinstance(spec, nn.Module):
        if size_px is None:
            raise ValueError("a teacher that is a module needs its size_px")
        return _module_teacher(spec, type(spec).__name__, class_ids, size_px, on)
    path = teacher_file(spec)
    if path is None and is_function(spec):
        if size_px is None:
            raise ValueError(f"teacher {spec}: a function needs the size of its images")
        return _function_teacher(spec, class_ids, size_px, on)
    if path is None:
        load = _timm_teacher if spec.startswith(TIMM) else _torchvision_teacher
        return load(spec, class_ids, on)
    if path.suffix == ".safetensors":
        return _own_teacher(path, class_ids, on)
    if network is None or size_px is None:
        raise ValueError(f"teacher {path}: a state dict needs its network and its size_px")
    return _state_dict_teacher(path, class_ids, network, size_px, on)


def _module_teacher(
    module: nn.Module, architecture: str, class_ids: Sequence[str], size_px: int, device: str
) -> Teacher:
    own = getattr(module, "normalisation", IMAGENET)
    try:
        mean, std = (own.mean, own.std) if isinstance(own, Normalisation) else own
        read = _Normalisation(mean=[float(v) for v in mean], std=[float(v) for v in std])
    except (TypeError, ValueError):
        raise CheckpointError(
            f"teacher {architecture}: expected (mean, std) as its normalisation, three numbers "
            f"each and std above 0, got {own!r:.60}"
        ) from None
    return Teacher(
        copy.deepcopy(module),
        architecture=architecture,
        class_ids=class_ids,
        size_px=size_px,
        normalisation=Normalisation((*read.mean,), (*read.std,)),  # pyright: ignore[reportArgumentType]
        device=device,
    )


def _function_teacher(spec: str, class_ids: Sequence[str], size_px: int, device: str) -> Teacher:
    """The seed makes random weights, if there are any, equal on all ranks and in every session."""
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = call_network(spec, len(class_ids), size_px)
    except ValueError as error:
        raise CheckpointError(f"teacher {spec}: {error}") from error
    teacher = _module_teacher(module, spec, class_ids, size_px, device)
    try:
        found = [*teacher.logits(torch.zeros(2, 3, size_px, size_px, dtype=torch.float32)).shape]
    except Exception as error:  # a function's network may raise anything
        raise CheckpointError(
            f"teacher {spec}: cannot take images of {size_px} px ({reason(error)})"
        ) from error
    if found != [2, len(class_ids)]:
        raise CheckpointError(
            f"teacher {spec}: expected logits [2, {len(class_ids)}] of two images, got {found}"
        )
    return teacher


def _own_teacher(path: Path, class_ids: Sequence[str], device: str) -> Teacher:
    tensors, metadata = read_tensors(path)
    if metadata.get("schema") != SCHEMA:
        raise CheckpointError(
            f"{path} is not a file of `train teacher`: expected schema {SCHEMA}, "
            f"got {metadata.get('schema')}"
        )
    check_document(metadata, f"teacher {path}", CheckpointError, "give another one", _Metadata)
    if is_function(metadata["architecture"]):  # a file must not choose code to run
        raise CheckpointError(f"teacher {path}: its architecture is a function: give that instead")
    _require_classes(path, metadata["class_ids"], class_ids)
    sizes = metadata["architecture"], len(class_ids), metadata["size_px"]
    own = metadata["normalisation"]
    with restoring(path), torch.device("meta"):  # where a network of absurd width takes no memory
        spare = build_network(*sizes)
    _load_state(path, spare, tensors, assign=True)
    module = build_network(*sizes)
    _load_state(path, module, tensors)
    return Teacher(
        module,
        architecture=metadata["architecture"],
        class_ids=class_ids,
        size_px=metadata["size_px"],
        normalisation=Normalisation(tuple(own["mean"]), tuple(own["std"])),
        accuracy=metadata["accuracy"],
        device=device,
    )


def _require_classes(path: Path, known: Sequence[str], wanted: Sequence[str]) -> None:
    if len(known) != len(wanted):
        raise CheckpointError(
            f"teacher {path}: expected {len(wanted)} classes, as the data has, got {len(known)}: "
            "use a teacher trained on these classes"
        )
    for index, (have, want) in enumerate(zip(known, wanted, strict=True)):
        if have != want:
            raise CheckpointError(
                f"teacher {path}: class {index} is {have!r}, but {want!r} in the data: "
                "use a teacher trained on these classes in this order"
            )


def _state_dict_teacher(
    path: Path, class_ids: Sequence[str], network: str, size_px: int, device: str
) -> Teacher:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types, from zip to unpickling errors
        raise CheckpointError(
            f"teacher {path}: expected a state dict of tensors and nothing else "
            f"({error!r:.150}): save it with torch.save(network.state_dict(), path)"
        ) from None
    columns = _columns(path, state, class_ids)
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"teacher {path}: expected a state dict, got {type(state).__name__}")
    state = {name.removeprefix("module."): value for name, value in state.items()}
    module = build_network(network, len(class_ids), size_px)
    _load_state(path, module, state)
    return Teacher(
        module,
        architecture=network,
        class_ids=class_ids,
        size_px=size_px,
        columns=columns,
        device=device,
    )


def _columns(path: Path, saved: Any, class_ids: Sequence[str]) -> list[int] | None:
    """Place of each class among the `class_ids` of a file by torch; None for a file without them.

    Such a file's order is then that of the folders, which is doubtful when they are numbers.
    """
    known = saved.get("class_ids") if isinstance(saved, dict) else None
    if isinstance(known, list | tuple):
        places = {str(class_id): index for index, class_id in enumerate(known)}
        if not len(known) == len(places) == len(class_ids) or places.keys() != set(class_ids):
            raise CheckpointError(
                f"teacher {path}: expected class_ids to be the {len(class_ids)} class folders of "
                "the data, in the order of the network's outputs: save them so, or leave them out"
            )
        return [places[class_id] for class_id in class_ids]
    if doubtful_order(class_ids):
        say(
            f"warning: teacher {path} does not say the order of its classes, which is taken to be "
            f"{', '.join(class_ids[:3])}, … as text is sorted: for another order save it by "
            "torch.save({'state_dict': network.state_dict(), 'class_ids': [...]}, path)"
        )
    return None


def _load_state(path: Path, module: nn.Module, state: Tensors, assign: bool = False) -> None:
    try:
        module.load_state_dict(state, assign=assign)
    except RuntimeError as error:
        reasons = " ".join(str(error).split("\n\t")[1:2]) or str(error)
        raise CheckpointError(
            f"teacher {path}: its weights do not fit the network or the number of classes: "
            f"{reasons}"
        ) from None


def imagenet_columns(spec: str, class_ids: Sequence[str]) -> list[int]:
    """Indices of the classes among the outputs of torchvision:NAME or timm:NAME, no download.

    Raises ValueError for an unknown name or weights of other classes than ImageNet-1k's,
    CheckpointError for class ids that are none of these.
    """
    if spec.startswith(TIMM):
        _require_imagenet(spec)
    else:
        torchvision_name(spec, "teacher")
    position = {class_id: index for index, class_id in enumerate(imagenet_names())}
    strangers = [class_id for class_id in class_ids if class_id not in position]
    if strangers:
        raise CheckpointError(
            f"teacher {spec} knows ImageNet-1k's classes by their WordNet ids; {strangers[0]!r} is "
            "none: train a teacher on this data (leave out --teacher), or give a file"
        )
    return [position[class_id] for class_id in class_ids]


def _torchvision_teacher(spec: str, class_ids: Sequence[str], device: str) -> Teacher:
    import torchvision

    columns, name = imagenet_columns(spec, class_ids), spec.removeprefix(TORCHVISION)
    weights: Any = torchvision.models.get_model_weights(name)["DEFAULT"]
    try:
        network = torchvision.models.get_model(name, weights=weights)
    except Exception as error:  # torch raises half a dozen types, from pickle's to tarfile's
        folder = Path(torch.hub.get_dir(), "checkpoints")
        if (kept := folder / Path(weights.url).name).is_file():
            raise CheckpointError(
                f"teacher {spec}: {kept} cannot be read ({error!r:.150}): remove it, and it is "
                "downloaded again"
            ) from None
        raise CheckpointError(
            f"teacher {spec}: the download of {weights.url} failed ({error}): try again, or put "
            f"the file into {folder}"
        ) from None
    transforms = weights.transforms()
    return Teacher(
        network,
        architecture=spec,
        class_ids=class_ids,
        size_px=transforms.crop_size[0],
        normalisation=Normalisation(tuple(transforms.mean), tuple(transforms.std)),
        columns=columns,
        device=device,
    )


def _require_imagenet(spec: str) -> None:
    from timm.data import ImageNetInfo, infer_imagenet_subset

    config = timm_config(spec, "teacher")
    known = infer_imagenet_subset(config.to_dict()) if config.has_weights else None
    if known is None or ImageNetInfo(known).label_names() != [*imagenet_names()]:
        raise ValueError(
            f"teacher {spec}: expected pretrained weights of ImageNet-1k's 1000 classes, got "
            f"{config.num_classes if config.has_weights else 'none'}: give another tag, as NAME.TAG"
        )


def _timm_teacher(spec: str, class_ids: Sequence[str], device: str) -> Teacher:
    import timm
    from huggingface_hub.constants import HF_HUB_CACHE

    columns, config = imagenet_columns(spec, class_ids), timm_config(spec, "teacher")
    try:
        network = timm.create_model(spec.removeprefix(TIMM), pretrained=True)
    except Exception as error:  # of many types, from the hub's to safetensors'
        place, name = Path(torch.hub.get_dir(), "checkpoints"), f"the file {config.url}"
        if config.hf_hub_id:
            place, name = HF_HUB_CACHE, f"models--{config.hf_hub_id.replace('/', '--')}"
            name = f"{name}, which `hf download {config.hf_hub_id}` makes elsewhere,"
        raise CheckpointError(
            f"teacher {spec}: its weights cannot be loaded ({reason(error)}): try again, or put "
            f"{name} into {place}"
        ) from None
    return Teacher(
        network,
        architecture=spec,
        class_ids=class_ids,
        size_px=config.input_size[1],
        normalisation=Normalisation(config.mean, config.std),
        columns=columns,
        device=device,
    )
