"""Tables of papers as plans for `train reproduce`: cells, recipe, published numbers. Torch-free.

A cell is one row at one coreset: METHOD-ipcN-STUDENT. A row that only the paper has names its own
method. Papers report the best epoch or do not say which one; we report the last.

Source: DACE, arXiv 2412.04668, whose tables print RDED, G-VBSM and GLaD too; the accuracies of
teachers are those of RDED's published ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of `train`: one method, IPC and student on one coreset."""

    name: str
    row: str
    """The row of the table that it belongs to: its name without the coreset."""
    teacher: str
    """Network of the teacher, which all cells of a plan with this network share."""
    words: tuple[str, ...]
    """Its options of `train`, without paths."""


@dataclass(frozen=True, kw_only=True)
class PaperPlan:
    """One table of a paper."""

    source: str
    """The paper and its table, and the gaps that were filled."""
    data: str
    """The images that --data must hold."""
    sets: tuple[str, ...]
    """Sets that the paper has numbers for, each a column."""
    words: tuple[str, ...]
    """Options of `train` that all cells share."""
    methods: Mapping[str, tuple[str, ...]]
    """Options of `train` by the name that a row begins with."""
    ipcs: tuple[int, ...] = (1,)
    students: tuple[str, ...] = ("resnet18",)
    teacher: str | None = None
    """Default: the network of the student."""
    accuracies: Mapping[str, str]
    """Published percent, mean or mean±std, by row: for every IPC one for each set, - for none. {}
    in a row's name stands for ipcN; METHOD-ipcN-mean is the mean over students, teacher-NETWORK the
    teacher's."""

    @property
    def published(self) -> dict[str, dict[str, list[float]]]:
        """(mean,) or (mean, std) by row and set."""
        found: dict[str, dict[str, list[float]]] = {}
        for row, text in self.accuracies.items():
            for (ipc, name), each in zip(product(self.ipcs, self.sets), text.split(), strict=False):
                if each != "-":
                    numbers = [float(number) for number in each.split("±")]
                    found.setdefault(row.format(f"ipc{ipc}"), {})[name] = numbers
        return found

    def cells(self, coresets: int = 1) -> tuple[Cell, ...]:
        """All cells, each for as many coresets, which are selected with the seeds 0, 1, …"""
        return tuple(
            Cell(
                name=f"{row}-seed{k}" if k else row,
                row=row,
                teacher=self.teacher or student,
                words=(
                    *(*self.words, *self.methods[method], "--ipc", str(ipc), "--student", student),
                    *("--teacher", self.teacher or student, "--no-ceiling", "--seed", str(k)),
                ),
            )
            for method, ipc, student in product(self.methods, self.ipcs, self.students)
            for row in (f"{method}-ipc{ipc}-{student}",)
            for k in range(coresets)
        )


_NETTE = (
    "ImageNet-1k's own images of the ten classes, in train/CLASS and val/CLASS (50 validation "
    "images each). The public Imagenette and ImageWoof archives split them otherwise: name the "
    "split when you quote a number"
)
_CIFAR = "image files of the set's training and test split, in train/CLASS and test/CLASS, 32 px"
_RDED, _DACE = ("--method", "rded"), ("--method", "dace")
_R1_AND_R2 = {"rded": (*_RDED, "--factor", "1"), "dace": (*_DACE, "--factor", "2")}
_BOTH = ("ImageNette", "ImageWoof")

PLANS: dict[str, PaperPlan] = {
    "imagenette-table1": PaperPlan(
        source="DACE, Table 1, ImageNette",
        data=f"ImageNette: {_NETTE}",
        sets=("ImageNette",),
        words=("--recipe", "dace"),
        methods={"rded": _RDED, "dace": _DACE},
        ipcs=(1, 10, 50),
        accuracies={
            "teacher-resnet18": "90.0",
            "rded-{}-resnet18": "35.8±1.0 61.4±0.4 80.4±0.4",
            "dace-{}-resnet18": "51.4 73.6 87.6",
        },
    ),
    "woof": PaperPlan(
        source="DACE, Table 1, ImageWoof",
        data=f"ImageWoof, ten breeds of dogs: {_NETTE}",
        sets=("ImageWoof",),
        words=("--recipe", "dace"),
        methods={"rded": _RDED, "dace": _DACE},
        ipcs=(1, 10, 50),
        accuracies={
            "teacher-resnet18": "75.0",
            "rded-{}-resnet18": "17.9±1.0 44.4±1.8 71.7±0.3",
            "dace-{}-resnet18": "25.0 47.6 77.1",
        },
    ),
    "tiny": PaperPlan(
        source="DACE, Table 1, Tiny-ImageNet: RDED with r = 1, DACE with r = 2 (32 px patches). "
        "Labels are not stored: at IPC 50 they would take gigabytes",
        data="Tiny-ImageNet: 200 classes of 64 px, in train/CLASS and val/CLASS (its validation "
        "images come in one folder with a list: sort them by class first)",
        sets=("Tiny-ImageNet",),
        words=("--recipe", "dace", "--image-size", "64", "--labels", "online"),
        methods=_R1_AND_R2,
        ipcs=(1, 10, 50),
        accuracies={
            "rded-{}-resnet18": "9.7±0.4 41.9±0.2 58.2±0.1",
            "dace-{}-resnet18": "19.4 46.2 53.4",
        },
    ),
    "cifar10": PaperPlan(
        source="DACE, Table 2, CIFAR-10, ConvNet-3 of width 128; RDED's recipe with r = 1, "
        "where upsample shows the images of rded",
        data=f"CIFAR-10: {_CIFAR}",
        sets=("CIFAR-10",),
        words=("--recipe", "rded", "--image-size", "32", "--factor", "1"),
        methods={name: ("--method", name) for name in ("rded", "random", "upsample", "herding")},
        ipcs=(1, 10, 50),
        students=("convnet-d3",),
        accuracies={
            "teacher-convnet-d3": "82.2",
            "rded-{}-convnet-d3": "23.5 50.2 68.4",
            "G-VBSM-{}-convnet-d3": "- 46.5 54.3",
            "DACE-{}-convnet-d3": "38.2 64.56 73.9",
        },
    ),
    "cifar100": PaperPlan(
        source="DACE, Table 2, CIFAR-100, teacher and student alike: RDED with r = 1, DACE with "
        "r = 2 (16 px patches)",
        data=f"CIFAR-100: {_CIFAR}",
        sets=("CIFAR-100",),
        words=("--recipe", "dace", "--image-size", "32", "--labels", "online"),
        methods=_R1_AND_R2,
        ipcs=(1, 10, 50),
        students=("convnet-d3", "resnet18"),
        accuracies={
            "rded-{}-convnet-d3": "19.6 48.1 57.0",
            "dace-{}-convnet-d3": "42.63 49.0 53.5",
            "rded-{}-resnet18": "11.0 42.6 62.6",
            "dace-{}-resnet18": "31.2 57.7 62.2",
        },
    ),
    "ablation": PaperPlan(
        source="DACE, Table 4. rho 0.5 of 5 steps is 2 UNet calls, as is the 0.4 of its text",
        data=f"ImageNette or ImageWoof: {_NETTE}",
        sets=_BOTH,
        words=("--recipe", "dace"),
        methods={
            "rded": _RDED,
            "text-only": (*_DACE, "--start", "noise"),
            "rho0.5": (*_DACE, "--rho", "0.5", "--no-mixup"),
            "rho0.8": (*_DACE, "--rho", "0.8", "--no-mixup"),
            "mixup": (*_DACE, "--rho", "0.8"),
        },
        accuracies={
            "rded-{}-resnet18": "35.8 17.9",
            "text-only-{}-resnet18": "35.1 19.6",
            "rho0.5-{}-resnet18": "39.5 19.5",
            "rho0.8-{}-resnet18": "47.7 21.6",
            "mixup-{}-resnet18": "51.4 25.0",
        },
    ),
    "patch-size": PaperPlan(
        source="DACE, Figure 5, which prints no numbers: those of r = 2 are Table 1's. Here only "
        "factors that divide 224 px",
        data=f"ImageNette or ImageWoof: {_NETTE}",
        sets=_BOTH,
        words=("--recipe", "dace"),
        methods={
            f"{method[1]}-r{r}": (*method, "--factor", str(r))
            for method, r in product((_RDED, _DACE), (2, 4, 7, 8))
        },
        accuracies={
            "rded-r2-{}-resnet18": "35.8±1.0 17.9±1.0",
            "dace-r2-{}-resnet18": "51.4 25.0",
        },
    ),
    "cross-arch": PaperPlan(
        source="DACE, Table 5: 128 px, a ConvNet as teacher (its depth is not stated; 5 here)",
        data=f"ImageNette or ImageWoof: {_NETTE}",
        sets=_BOTH,
        words=("--recipe", "dace", "--image-size", "128"),
        methods={"dace": _DACE},
        students=("vgg11", "vit-s", "alexnet", "resnet18"),
        teacher="convnet-d5",
        accuracies={
            "dace-{}-mean": "30.79 19.74",
            "MTT+GLaD-{}-mean": "30.4 17.1",
            "DC+GLaD-{}-mean": "31.0 17.8",
        },
    ),
    "cross-arch-cifar10": PaperPlan(
        source="DACE, Table 6: a ConvNet as teacher (depth 3 here); its IPC is not stated, 1 here",
        data=f"CIFAR-10: {_CIFAR}",
        sets=("CIFAR-10",),
        words=("--recipe", "dace", "--image-size", "32"),
        methods={"dace": _DACE},
        students=("alexnet", "resnet18", "vit-s"),
        teacher="convnet-d3",
        accuracies={
            "dace-{}-alexnet": "31.3",
            "dace-{}-resnet18": "36.0",
            "dace-{}-vit-s": "21.9",
            "dace-{}-mean": "29.7",
        },
    ),
}
