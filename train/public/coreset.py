"""A coreset in Python: its patches, its expansions, its loader."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from patchbloom.engine.coreset.coreset import Coreset as Folder
from patchbloom.engine.coreset.coreset import open_coreset
from patchbloom.engine.coreset.hub import fetched
from patchbloom.engine.coreset.manifest import PATCHES, coreset_folder, image_files
from patchbloom.engine.coreset.sheet import coreset_sheet
from patchbloom.engine.data.crops import to_pixels
from patchbloom.engine.errors import CoresetError
from patchbloom.engine.expand.expander import VARIED, Expander
from patchbloom.export.config import BackendName
from patchbloom.train.coreset_options import RenderOptions, check_names
from patchbloom.train.loader import ExpandedLoader
from patchbloom.train.methods.open import own_part
from patchbloom.train.methods.source import Expansions
from patchbloom.train.students.from_manifest import default_views, open_recorded_source
from PIL import Image


@dataclass(frozen=True, repr=False, eq=False)
class Coreset(Folder):
    """An opened coreset: a mapping from classes to their patches.

    `open` and `select` return it. It keeps the model that `expand` opened; `close`, or leaving it
    as a context manager, frees the model.

    >>> core = patchbloom.open("runs/demo/coreset")
    >>> core
    Coreset('runs/demo/coreset': dace, 10 classes × 4 patches of 32 px; images of 64 px, sdxl-tiny)
    >>> len(core["star"]), core["star"][0].size
    (4, (32, 32))
    >>> "star" in core, len(core)
    (True, 10)
    """

    options: RenderOptions = field(default_factory=RenderOptions)
    """The model's options: its precision, device, engine."""
    backend: BackendName | None = None
    """The model's backend. Default: in `expand` eager, which builds nothing; in `loader` auto."""

    def __repr__(self) -> str:
        settings, model = self.settings, self.manifest["model"]
        maker = f", {model['name']}" if model else ""
        return (
            f"Coreset({str(self.folder)!r}: {settings['method']}, {len(self)} classes × "
            f"{self.manifest['classes'][0][PATCHES]} patches of {settings['patch_px']} px; "
            f"images of {settings['image_size_px']} px{maker})"
        )

    def __len__(self) -> int:
        """The number of classes."""
        return len(self.class_ids)

    def __iter__(self) -> Iterator[str]:
        """The classes' folder names."""
        return iter(self.class_ids)

    def __getitem__(self, name: str) -> list[Image.Image]:
        """The patches of a class, given by its folder's name or its own."""
        entry = self.manifest["classes"][self._index(name)]
        files = image_files(PATCHES, entry["id"], entry[PATCHES])
        return [Image.open(self.folder / file).convert("RGB") for file in files]

    def _index(self, name: str) -> int:
        names = self.class_ids if name in self.class_ids else self.class_names
        check_names([name], names, f"{self.folder}: class")
        return names.index(name)

    def show(self, patches_per_class: int = 10) -> Image.Image:
        """One picture with a row of patches per class, as `engine coreset show` draws it.

        >>> core.show().save("sheet.png")
        """
        return coreset_sheet(self, patches_per_class)

    def expand(
        self, name: str, patch: int, *, variants: int = 1, epoch: int = 0, **changes: Any
    ) -> list[Image.Image]:
        """Images that the model makes of one patch: those of `variants` epochs, from `epoch` on.

        A student sees the same images, to rounding. `changes` are rho, steps, mixup, mixup_weight,
        start ("image" or "noise") and seed; they cost nothing. All variants are made in one call of
        the model where they fit. The default backend, eager, builds nothing and pads nothing;
        another, named in `open`, runs an engine at its own batch, which `engine_batch` sets.

        Raises ValueError for a class, patch or change that does not exist and for a coreset without
        a model; the first call raises ExpandedLoader's errors about the model.

        >>> images = core.expand("star", 0, variants=8, rho=0.4)
        >>> len(images), images[0].size
        (8, (64, 64))
        """
        check_names(changes, VARIED, "expand: option")
        index = self._index(name)
        each = self.manifest["classes"][index][PATCHES]
        if not 0 <= patch < each:
            raise ValueError(f"patch {patch}: expected 0 to {each - 1}, the patches of a class")
        if variants < 1 or epoch < 0:
            raise ValueError(
                f"variants {variants}, epoch {epoch}: expected 1 or more, and 0 or more"
            )
        expander = self._opened[0].varied(**changes)
        made = expander.variants(index * each + patch, range(epoch, epoch + variants))
        return [Image.fromarray(image) for image in to_pixels(made).cpu().numpy()]

    @cached_property
    def _opened(self) -> tuple[Expander, weakref.finalize]:
        """The model, and what frees it at the latest with this object."""
        folder = Folder(self.folder, self.manifest)  # not self, which could then never be freed
        config = default_views(folder, device=self.options.device)
        with ExitStack() as opened:
            source = opened.enter_context(
                open_recorded_source(folder, self.options, self.backend or "eager", config)
            )
            own = own_part(source)
            if not isinstance(own, Expansions):
                raise CoresetError(
                    f"{self.folder}: expected a coreset that a model expands, got one of method "
                    f"{self.settings['method']}: make one with patchbloom.select(…, model=NAME)"
                )
            return own.expander, weakref.finalize(self, opened.pop_all().close)

    def loader(self, **options: Any) -> ExpandedLoader:
        """Batches of fresh images and labels, epoch after epoch: see ExpandedLoader.

        `batch` is required. Labels are those stored, those of a `teacher` (a module, a file,
        torchvision:NAME), or with targets="hard" the classes.

        >>> with core.loader(batch=20, targets="hard") as loader:
        ...     images, labels = next(iter(loader))
        >>> tuple(images.shape), tuple(labels.shape)
        ((20, 3, 64, 64), (20, 10))
        """
        own = asdict(self.options) | ({"backend": self.backend} if self.backend else {})
        return ExpandedLoader(self, **{**own, **options})

    def close(self) -> None:
        """Free the model; the next `expand` opens it again."""
        if "_opened" in self.__dict__:
            self.__dict__.pop("_opened")[1]()

    def __enter__(self) -> Coreset:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open(folder: str | Path, *, backend: BackendName | None = None, **options: Any) -> Coreset:
    """Open a coreset folder, or that of a run; every file is compared with its hash.

    hf:USER/NAME[@REVISION][/coreset-METHOD] is one on the Hugging Face hub. It is downloaded once;
    `folder` of what is returned ends in the name with the commit, and opens the same content for
    ever. Without a network the last download is opened. OSError where the hub gives none.
    backend: see Coreset. options: the fields of train.coreset_options.RenderOptions: model,
    precision, device, engine_batch, … Raises ValueError, one clear line, for a folder that is no
    coreset or was changed, and for an option that does not exist.

    >>> core = patchbloom.open("runs/demo/coreset", device="cpu")
    >>> core.close()
    """
    check_names(options, RenderOptions.__dataclass_fields__, "open: option")
    opened = open_coreset(coreset_folder(fetched(Path(folder).expanduser())))
    return Coreset(opened.folder, opened.manifest, RenderOptions(**options), backend)
