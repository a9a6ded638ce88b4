"""Computes the JSON files of tests/golden, one function per file.

The files are what the first version with this test wrote. `python tests/golden_cases.py` rewrites
them: only after an intended change of a format. It leaves the archives alone (golden_fixtures.py).
Placeholders replace machine-dependent values, in the files and here.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from label_cases import LabelBlock, codec_of
from patchbloom.engine.builds.build import describe
from patchbloom.engine.builds.catalogue import spec_of
from patchbloom.engine.cli import main as engine_main
from patchbloom.engine.config import ExpandConfig
from patchbloom.engine.coreset.coreset import open_coreset
from patchbloom.engine.expand.backends import CompiledBackend
from patchbloom.engine.expand.expander import Expander
from patchbloom.engine.expand.naming import describe_mixup
from patchbloom.engine.labels.file import LabelLayout
from patchbloom.export.bundle import find_bundles, open_bundle
from patchbloom.export.bundle_key import build_command, bundle_name
from patchbloom.export.config import BackendName, EngineSpec
from patchbloom.export.engines import engine_key, exporter
from patchbloom.export.models import find_model
from patchbloom.train.cli import main as train_main
from patchbloom.train.commands.planning import make_plan
from patchbloom.train.config import StudentConfig
from patchbloom.train.labels.hard import HardLabels
from patchbloom.train.labels.recording import RecordedLabels
from patchbloom.train.labels.targets import OnlineLabels
from patchbloom.train.labels.views import describe_views
from patchbloom.train.loader import ExpandedLoader
from patchbloom.train.methods.open import Doped, Refreshed
from patchbloom.train.methods.pools import SharedImages
from patchbloom.train.methods.source import Expansions, Mosaics, RealImages, UpsampledPatches
from patchbloom.train.methods.t2i_coreset import describe_rounds
from patchbloom.train.methods.whole_images import StoredImages
from patchbloom.train.networks import build_network
from patchbloom.train.options import TrainStudent
from patchbloom.train.prior.training import PriorTraining
from patchbloom.train.run.folder import RunFolder
from patchbloom.train.run.progress import Report
from patchbloom.train.run.world import ALONE
from patchbloom.train.teacher.teacher import Teacher

GOLDEN = Path(__file__).resolve().parent / "golden"
SMALL = (
    *("--data", "data", "--model", "sdxl-tiny", "--backend", "eager", "--device", "cpu"),
    *("--recipe", "small", "--image-size", "32", "--factor", "2", "--seeds", "1"),
    *("--teacher", "convnet-d3-w4", "--student", "convnet-d3-w4", "--teacher-epochs", "1"),
    *("--epochs", "2", "--steps", "2", "--rho", "0.5", "--engine-batch", "3"),
    *("--dsco.iterations", "1", "--dsco.pivot-rows", "4"),
)
METHODS = ("dace", "rded", "random", "upsample", "t2i", "dsco")
RUNS: dict[str, tuple[str, ...]] = {
    "all": ("--method", *METHODS, "--dope", "1", "--prompts", "prompts.json"),
    "dense": ("--method", "dace", "--refresh", "0.5", "--mixup-weight", "beta:0.5", "--no-ceiling"),
    "topk": (
        *("--method", "upsample", "--codec", "topk", "--top-k", "1", "--cutmix", "on"),
        "--no-ceiling",
    ),
    "pca": (
        *("--method", "rded", "--codec", "pca", "--components", "2", "--labels", "stored"),
        "--no-ceiling",
    ),
    "hard": ("--method", "random", "--targets", "hard", "--cutmix", "on", "--no-ceiling"),
}
"""Whole runs by folder name."""
STOPPED: dict[str, tuple[str, ...]] = {
    "stopped": (
        *("--method", "upsample", "--cutmix", "on", "--no-ceiling", "--overlap", "off"),
        *("--epochs", "6", "--seeds", "2"),
    ),
    "stopped-teacher": ("--method", "random", "--no-ceiling", "--teacher-epochs", "3"),
}
"""Runs interrupted while they trained students, or the teacher."""
CORESETS = (
    *("dense/coreset", "topk/coreset", "pca/coreset", "hard/coreset"),
    *("all/coreset-t2i-doped", "all/coreset-dsco", "all/coreset-upsample-doped"),
)
"""Their coresets: one per codec, two without labels, whole images, schemas 1 and 2."""
ENGINE = ("--backend", "ort", "--device", "cpu", "--size", "32", "--batch", "2")
STAGES: dict[str, tuple[str, ...]] = {
    **RUNS,
    "noise": ("--method", "dace", "--start", "noise"),
    "no mixup": ("--method", "dace", "--no-mixup", "--seed", "3"),
    "fixed weight": ("--method", "dace", "--mixup-weight", "0.50", "--precision", "bf16"),
    "vae precision": ("--method", "dace", "t2i", "--vae-precision", "bf16", "--prompt", "{name}!"),
    "diverse": ("--method", "upsample", "--select", "k-center", "--candidates", "2"),
    "native": ("--method", "rded", "--scoring", "native", "--factor", "1", "--ipc", "2"),
    "variants": (
        *("--method", "t2i", "--variants", "1", "--ipc", "2", "--generate-size", "32"),
        *("--codec", "topk", "--top-k", "1"),
    ),
    "budget": ("--method", "t2i", "--budget-seconds", "5", "--dope", "2"),
    "data-free": ("--method", "dsco", "--dsco.data-free", "--targets", "hard", "--dope", "1"),
    "online": ("--method", "random", "dace", "--labels", "online"),
    "of RDED": ("--method", "rded", "--recipe", "rded", "--batch", "4", "--learning-rate", "0.1"),
    "of DACE": ("--method", "dace", "--recipe", "dace", "--student-precision", "bf16"),
    "named": ("--method", "random", "--class-names", "names.json", "--accumulate", "2"),
}
"""Options whose stage settings are frozen; nothing is run."""

_HASH = re.compile(r"[0-9a-f]{64}")
_RATE = re.compile(r"at [\d.]+ images/s")
_MEASURED = {
    *("accuracy", "accuracies", "ceiling", "share_of_ceiling", "seconds", "images_per_s"),
    *("loss", "losses", "margin"),
}
"""Keys of measured numbers."""
_EXACT_HASHES = {
    *("weights_sha256", "model.weights_sha256", "t2i.weights_sha256", "dsco.weights_sha256"),
    *("--data", "data_sha256", "--coreset", "classes", "files"),
}
"""Keys of hashes that depend on neither trained weights nor a PNG encoder."""


def frozen(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_bytes())


def unpack(archive: str, folder: Path) -> None:
    """Unpack a golden archive and the commands' data into `folder`."""
    with tarfile.open(GOLDEN / f"{archive}.tar.xz") as tar:
        tar.extractall(folder, filter="data")
    put_data(folder)


def put_data(folder: Path) -> None:
    """Write the commands' images, prompts and class names to `folder`."""
    shutil.copytree(GOLDEN / "data", folder / "data")
    for name in ("prompts.json", "names.json"):
        shutil.copy(GOLDEN / name, folder)


def masked(value: Any, *path: str) -> Any:
    """`value` with placeholders for everything machine-dependent."""
    key = path[-1] if path else ""
    if isinstance(value, dict):
        return {k: masked(v, *path, k) for k, v in _without_machine(value).items()}
    if isinstance(value, list):
        if key == "top_left_height_width":
            return "CHOSEN"
        return [masked(each, *path) for each in value]
    if isinstance(value, str):
        if _HASH.fullmatch(value):
            exact = key in _EXACT_HASHES or path[-2:] == ("data", "sha256")
            return value if exact else "SHA256"
        return "CHOSEN" if key == "image" else _RATE.sub("at RATE images/s", value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        if _MEASURED & set(path):
            return "MEASURED"
        if _is_size_of_png(path):
            return "BYTES"
    return value


def _without_machine(value: dict[str, Any]) -> dict[str, Any]:
    """Mask the machine, library versions and time of a provenance."""
    if not isinstance(value.get("versions"), dict):
        return value
    hidden = {key: "MACHINE" for key in ("time", "device", "threads") if key in value}
    return {**value, **hidden, "versions": dict.fromkeys(value["versions"], "VERSION")}


def _is_size_of_png(path: tuple[str, ...]) -> bool:
    """Whether it is the size of a PNG in a manifest, or a summary's sum of such sizes."""
    if path[-1] == "bytes":
        return path[-2].endswith(".png")
    return path[0] == "bytes" and path[-1] not in ("labels", "generator")


def header(path: Path) -> dict[str, Any]:
    """Tensor names, dtypes, shapes and offsets of a safetensors file; its metadata, masked."""
    with path.open("rb") as stream:
        told = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
    metadata = {k: masked(json.loads(v)) for k, v in told.pop("__metadata__", {}).items()}
    return {"tensors": told, "metadata": metadata}


def _files(folder: Path) -> list[Path]:
    """All files of a folder that the first version wrote too."""
    newer = folder / "images.safetensors"
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != newer)


def contents(folder: Path) -> dict[str, Any]:
    """Every JSON and safetensors file of a folder, masked."""
    named = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    return {
        name: header(path)
        if path.suffix == ".safetensors"
        else masked(json.loads(path.read_bytes()))
        for name, path in named.items()
        if path.suffix in (".safetensors", ".json")
    }


def names(folder: Path) -> list[str]:
    """Sorted relative paths of a run's files; TensorBoard's get one fixed name."""
    relative = (path.relative_to(folder) for path in _files(folder))
    return sorted(
        {
            "tensorboard/EVENTS" if path.parts[0] == "tensorboard" else path.as_posix()
            for path in relative
        }
    )


def told_scalars(folder: Path) -> list[list[Any]]:
    """Tag and step of every scalar in a run's log, in order."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [[line["tag"], line["step"]] for line in lines if "tag" in line]


def run_all() -> None:
    """Write the data to the current folder and run RUNS there."""
    put_data(Path())
    for name, options in RUNS.items():
        assert train_main([*SMALL, "--out", name, *options]) == 0


@contextmanager
def elsewhere() -> Iterator[Path]:
    """Change into an empty temporary folder."""
    with TemporaryDirectory() as folder, chdir(folder):
        yield Path(folder)


def runs() -> dict[str, Any]:
    """Files and scalars of every run in RUNS."""
    with elsewhere():
        run_all()
        return {name: run_of(Path(name)) for name in RUNS}


def run_of(folder: Path) -> dict[str, Any]:
    """Files and scalars of one run."""
    return {
        "names": names(folder),
        "contents": contents(folder),
        "scalars": told_scalars(folder),
    }


def stages() -> dict[str, Any]:
    """Stage settings for all STAGES; nothing is trained."""
    with elsewhere():
        put_data(Path())
        return {name: _stages_of(options) for name, options in STAGES.items()}


def _stages_of(options: tuple[str, ...]) -> dict[str, Any]:
    asked: dict[str, Any] = {}

    def stage(self: RunFolder, name: str, config: Any, work: Any, **_: bool) -> Any:
        asked[name] = json.loads(json.dumps(config))
        if name == "coreset":
            return {method: {"patches_sha256": f"patches of {method}"} for method in METHODS}
        if name.startswith("doping-"):
            return {"doped_sha256": f"images of {name}"}
        return {"sha256": f"of the {name}"}

    with patch.object(RunFolder, "stage", stage):
        assert train_main(["student", *SMALL, "--out", "run", "--overwrite", *options]) == 0
    return asked


def prior() -> dict[str, Any]:
    """Settings that `train prior` writes before it trains."""

    def stop(training: Any, **_: Any) -> None:
        raise KeyboardInterrupt

    with elsewhere(), patch.object(PriorTraining, "run", stop):
        put_data(Path())
        assert (
            train_main(["prior", "--data", "data", "--out", "model", "--image-size", "32"]) == 130
        )
        return json.loads(Path("model/.work/settings.json").read_bytes())


def coresets() -> dict[str, Any]:
    """Output of `engine coreset` for the golden coresets, and their labels."""
    with elsewhere() as folder:
        unpack("runs", folder)
        return {name: _coreset(name) for name in CORESETS}


def _coreset(name: str) -> dict[str, Any]:
    said = {each: _engine("coreset", each, name, "--json") for each in ("info", "verify")}
    coreset = open_coreset(name)
    stored = coreset.soft_labels()
    if stored is None:
        return said
    first = range(0, stored.samples, 5)
    rows = [stored.probabilities(epoch, first) for epoch in range(stored.epochs)]
    with ExpandedLoader(
        name, batch=5, class_indices=True, seed=3, backend="eager", device="cpu"
    ) as loader:
        images, labels, classes = next(iter(loader))
    said |= {"images": list(images.shape), "classes": classes.tolist()}
    return said | {"probabilities": torch.cat([*rows, labels]).tolist()}


def _engine(*arguments: str) -> dict[str, Any]:
    """JSON result of `engine …`."""
    told = StringIO()
    with redirect_stdout(told):
        assert engine_main(list(arguments)) == 0
    return json.loads(told.getvalue().splitlines()[-1])


def students_elsewhere() -> dict[str, Any]:
    """Files and scalars of students trained from each golden coreset folder alone."""
    with elsewhere() as folder:
        unpack("runs", folder)
        return {name: _students(name, f"students-{n}") for n, name in enumerate(CORESETS)}


def _students(coreset: str, out: str) -> dict[str, Any]:
    given = ("--coreset", coreset, "--out", out, "--data", "data", "--seeds", "1", "--epochs", "1")
    own = ("--student", "convnet-d3-w4", "--batch", "4") if coreset in _UNLABELLED else ()
    assert train_main(["student", *given, "--backend", "eager", "--device", "cpu", *own]) == 0
    return {"contents": contents(Path(out)), "scalars": told_scalars(Path(out))}


_UNLABELLED = ("hard/coreset", "all/coreset-dsco")


def engines() -> dict[str, Any]:
    """Engine keys, names and build commands, and the golden engine's info."""
    model, cpu = find_model("sdxl-tiny"), EngineSpec(size_px=64)
    ranged = EngineSpec(
        size_px=32, batch=8, min_batch=4, images_per_prompt=2, precision="fp16", opset=23
    )
    cuda = EngineSpec(size_px=64, device="cuda")
    keys = {
        **{f"{each}, fp32": engine_key(each, model, cpu, tokens=77) for each in COMPILED},
        **{f"{each}, ranged": engine_key(each, model, ranged, tokens=77) for each in COMPILED},
        **{
            f"{each}, graphs": engine_key(each, model, ranged, tokens=77, export_only=True)
            for each in COMPILED[:2]
        },
    }
    keys = {name: masked_key(key) for name, key in keys.items()}
    with elsewhere() as folder:
        unpack("engine", folder)
        (bundle,) = find_bundles(folder / "bundles")
        info = _engine("info", bundle.name, "--bundles", "bundles", "--json")
        del info["misfit"]  # between the versions there and here
        info["command"] = info["command"].partition(" --bundles ")[0]  # this test's own folder
        opened = open_bundle(Path("bundles") / bundle.name)
        backend = CompiledBackend(opened, spec_of(opened.key))
        said = {"info": info, "describe": describe(opened), "backend": backend.describe()}
    return {
        "keys": keys,
        "names": {name: bundle_name(key) for name, key in keys.items()},
        "commands": {name: build_command(key) for name, key in keys.items()},
        "flags on cuda": {
            each: masked_key({"flags": exporter(each).flags(cuda)})["flags"] for each in COMPILED
        },
        "golden": said,
    }


COMPILED: tuple[BackendName, ...] = ("ort", "trt", "inductor")


def masked_key(key: dict[str, Any]) -> dict[str, Any]:
    """An engine's key with code and CPU hashes and library versions masked."""
    libraries = dict.fromkeys(key.get("libraries", {}), "VERSION")
    flags = dict(key["flags"])
    for name in flags.keys() & {"cpu_instructions_sha256", "triton"}:
        flags[name] = "MACHINE"
    hidden = {"exporter_sha256": "CODE", "libraries": libraries, "flags": flags}
    return {**key, **{name: hidden[name] for name in hidden if name in key}}


IDS = ("bars", "disc", "triangle")
CONFIG = StudentConfig(
    network="convnet-d3-w4", size_px=32, epochs=2, batch=4, pool=10, temperature=4.0, device="cpu"
)


def teacher() -> Teacher:
    """Every floating-point tensor is 1/8."""
    network = build_network("convnet-d3-w4", len(IDS), 32)
    for value in network.state_dict().values():
        value.fill_(1 / 8 if value.is_floating_point() else 0)
    return Teacher(network, architecture="convnet-d3-w4", class_ids=IDS, size_px=32, accuracy=12.5)


def _patches() -> dict[str, Any]:
    """Two grey patches of each class."""
    return {
        "patches_NHWC": torch.full((6, 16, 16, 3), 99, dtype=torch.uint8),
        "labels_N": torch.arange(3).repeat_interleave(2),
    }


def describes() -> dict[str, Any]:
    """All descriptions that are written into files."""
    with elsewhere():
        put_data(Path())
        said = {"sources": _sources(), "labels": _labels(), "teacher": teacher().describe()}
        return said | {"views": _views(), "mixup": _mixup(), "model": _model()}


def _sources() -> dict[str, Any]:
    upsampled = UpsampledPatches(method="upsample", class_ids=IDS, size_px=32, **_patches())
    images = {"images_NHWC": _patches()["patches_NHWC"], "class_ids": IDS, "samples_per_class": 4}
    stored = StoredImages(method="dsco", **images)
    plan = make_plan(TrainStudent(data="data", out=Path("run"), method=("random",)), Report())
    sources = {
        "RealImages": RealImages(images=plan.train, labels_N=torch.arange(3), size_px=32, seed=5),
        "UpsampledPatches": upsampled,
        "Mosaics": Mosaics(class_ids=IDS, factor=1, seed=7, **_patches()),
        "StoredImages": stored,
        "StoredImages, varied": StoredImages(method="t2i", variants=2, seed=3, **images),
        "Doped": Doped(upsampled, stored),
        "Refreshed": Refreshed(upsampled, 0.3, seed=0),
        "SharedImages": SharedImages(upsampled, ALONE),
    }
    said = {name: source.describe() for name, source in sources.items()}
    generated = describe_rounds(_patches()["patches_NHWC"], [1.0, 0.5])
    return {**said, **_expansions(), "Generated": generated}


def _expansions() -> dict[str, Any]:
    """Expansions of the shipped model, eager; library versions masked."""
    config = ExpandConfig(size_px=32, steps=2, rho=0.5, batch=2, backend="eager", device="cpu")
    expander = Expander(find_model("sdxl-tiny"), config, prompts_K=IDS, **_patches())
    source = Expansions(expander=expander, labels_N=_patches()["labels_N"], class_ids=IDS)
    versions = dict.fromkeys(("torch", "diffusers"), "VERSION")
    said = {
        "Expansions": source.describe(),
        "Expansions, refreshed": Refreshed(source, 0.5, seed=0).describe(),
        "Expander": {**expander.describe(), **versions},
        "Expander, varied": {
            **expander.varied(mixup_weight="0.25", rho=1.0).describe(),
            **versions,
        },
    }
    expander.close()
    return said


def _labels() -> dict[str, Any]:
    source = UpsampledPatches(method="upsample", class_ids=IDS, size_px=32, **_patches())
    said = {
        "OnlineLabels": OnlineLabels(teacher(), 4.0).describe(),
        "HardLabels": HardLabels(source, CONFIG).describe(),
        "LabelBlock, none": LabelBlock(codec="none", temperature=2).describe(),
    }
    for codec, k in (("dense", 0), ("topk", 1), ("pca", 2)):
        kept = codec_of(codec, k)
        path = Path(f"{codec}.partial")
        recorded = RecordedLabels(*(teacher(), source, CONFIG, path, Report()), codec=kept)
        logits = torch.arange(36.0).reshape(2, 6, 3) % 7
        block = LabelBlock(codec=codec, logits=logits, settings={"a": 1}, k=k)
        layout = LabelLayout(codec=kept, epochs=2, samples=6, classes=3)
        said |= {
            f"RecordedLabels, {codec}": recorded.describe(),
            f"RecordedBlock, {codec}": recorded.block().describe(),
            f"recording, {codec}": json.loads(Path(f"{path}.json").read_bytes()),
            f"LabelBlock, {codec}": block.describe(),
            f"LabelLayout, {codec}": [
                layout.describe(),
                layout.bytes,
                layout.header()[8:].decode(),
            ],
        }
    return said


def _views() -> dict[str, Any]:
    configs = {
        "cutmix": CONFIG,
        "in groups": StudentConfig(device="cpu", group=2, pool=100, batch=30),
        "no cutmix": StudentConfig(device="cpu", cutmix=False, group=2, flip=False, seed=9),
        "half": CONFIG.at("bf16"),
    }
    return {
        name: {"views": describe_views(config), "recipe": config.recipe()}
        for name, config in configs.items()
    }


def _mixup() -> dict[str, Any]:
    weights = ("uniform", "beta:1", "beta:1.0", "beta:0.20", "0.50", "0", "1", "-0")
    said = {each: ExpandConfig(size_px=8, mixup_weight=each) for each in weights}
    said["none"] = ExpandConfig(size_px=8, mixup=False, mixup_weight="0.5")
    said["noise"] = ExpandConfig(size_px=8, start="noise")
    return {name: describe_mixup(config) for name, config in said.items()}


def _model() -> dict[str, Any]:
    """The manifest's model entry of each method that runs a model."""
    asked = TrainStudent(
        data="data",
        out=Path("run"),
        model="sdxl-tiny",
        method=("dace", "t2i", "dsco"),
        device="cpu",
        prompts=Path("prompts.json"),
        mixup_weight="0.5",
    )
    plan = make_plan(asked, Report())
    return {
        "dace": plan.describe_model("dace"),
        "t2i": plan.describe_generator("t2i"),
        "dsco": plan.describe_generator("dsco"),
    }


FILES: dict[str, Callable[[], Any]] = {
    "describes": describes,
    "stages": stages,
    "prior": prior,
    "runs": runs,
    "coresets": coresets,
    "elsewhere": students_elsewhere,
    "engines": engines,
}
"""The golden JSON files by name."""


def write(name: str) -> None:
    text = json.dumps(FILES[name](), indent=1, sort_keys=True, ensure_ascii=False)
    (GOLDEN / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    for asked in sys.argv[1:] or FILES:
        write(asked)
