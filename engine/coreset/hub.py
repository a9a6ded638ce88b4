"""Coresets and publications on the Hugging Face hub: hf:USER/NAME[@REVISION][/coreset-METHOD].

A name may stand where a folder does. The hub's client downloads into its own cache, which answers
when the hub does not. From there the files that the manifest names are checked and copied to
hf:USER/NAME@COMMIT in our cache, so that the path of an opened coreset says its revision. Nothing
is unpickled. An upload is one commit, or none.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field

from ...export.documents import Inside, parse_json
from ...export.durable import cache_folder, full_disk_explained, replacing
from ...export.hub import HUB, DownloadError
from ...export.terminal import say
from ..errors import CoresetError
from .manifest import MANIFEST, file_entry
from .schema import File

_NAME = re.compile(rf"{HUB}([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/(coreset-[\w.-]+))?", re.ASCII)
_OURS = "expected a coreset, or what `train publish --to hf:USER/NAME` uploads"
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
_COMMIT = re.compile("[0-9a-f]{40}")
_BY_THE_HUB = ".gitattributes"  # in every repository, from its creation


class _Listed(BaseModel):
    kind: Annotated[str, Field(alias="schema", pattern=r"^patchbloom\.(coreset|published)/")]
    files: dict[Inside, File]


def fetched(folder: Path, *, whole: bool = False) -> Path:
    """`folder`, or for a name on the hub the folder of its copy here.

    The copy is of one coreset, or with `whole` of all that was published. Raises CoresetError for a
    name or content that does not fit, DownloadError for what the hub refuses or cannot give.
    """
    if not (name := str(folder)).startswith(HUB):
        return folder
    repository, revision, inside = _parsed(name)
    first = _manifest(name, repository, revision, f"{inside}{MANIFEST}")
    snapshot = first.parents[inside.count("/")]  # of the hub's cache, named by its commit
    files = _listed(first, name)
    coresets = [
        path.parent.name for path in map(Path, files) if path.match(f"coreset-*/{MANIFEST}")
    ]
    if coresets and not whole:
        if len(coresets) > 1:
            raise CoresetError(
                f"{name} holds {', '.join(coresets)}: name one, as {name}/{coresets[0]}"
            )
        return fetched(Path(f"{HUB}{repository}@{snapshot.name}/{coresets[0]}"))
    copy = cache_folder() / f"{HUB}{repository}@{snapshot.name}" / inside
    if (copy / MANIFEST).is_file() and (copy / MANIFEST).read_bytes() == first.read_bytes():
        return copy
    _copy(name, repository, snapshot.name, inside, files, copy)
    return copy


def _copy(
    name: str, repository: str, commit: str, inside: str, files: dict[str, dict], copy: Path
) -> None:
    """Download the files, and write `copy`, when each has the size and hash of the manifest."""
    from huggingface_hub import snapshot_download

    size_bytes = sum(entry["bytes"] for entry in files.values())
    say(f"downloading {size_bytes / 1e6:.2f} MB of {HUB}{repository}@{commit}/{inside}".rstrip("/"))
    tops = sorted({file.partition("/")[:2] for file in (*files, MANIFEST)})
    patterns = [escape(inside + top) + ("/*" if under else "") for top, under in tops]
    with _explained(name):
        snapshot = snapshot_download(
            repository, repo_type="dataset", revision=commit, allow_patterns=patterns
        )
    with (
        suppress(FileExistsError),  # another process was faster
        full_disk_explained(copy, size_bytes, "set XDG_CACHE_HOME to a folder"),
        replacing(copy, copy.exists()) as new,
    ):
        for file in (*files, MANIFEST):
            arrived = Path(snapshot, inside, file)
            if not arrived.is_file():
                raise CoresetError(f"{name} lacks {file}, which its {MANIFEST} names: {_OURS}")
            if file != MANIFEST and (found := file_entry(arrived)) != files[file]:
                arrived.resolve().unlink()  # else the hub's client keeps it
                raise CoresetError(
                    f"{name}: {file}: expected sha256 {files[file]['sha256'][:16]}…, got "
                    f"{found['sha256'][:16]}…: try again; if that does not help, somebody changed "
                    "the repository"
                )
            (new / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(arrived, new / file)


def published_before(name: str, overwrite: bool) -> tuple[str | None, set[str]]:
    """Commit and files of the repository that an upload replaces; None and no files for a new one.

    Raises CoresetError unless it is empty or, with `overwrite`, holds a publication and nothing
    else; DownloadError for what the hub refuses.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    repository, revision, inside = _parsed(name)
    if revision or inside:
        raise CoresetError(f"--to {name}: expected hf:USER/NAME alone: a commit gets its own name")
    if get_token() is None:
        raise DownloadError(f"--to {name} needs a token that may write: {_LOG_IN}")
    with _explained(name):
        try:
            info = HfApi().dataset_info(repository)
        except RepositoryNotFoundError:
            return None, set()
    files = {each.rfilename for each in info.siblings or ()} - {_BY_THE_HUB}
    if files and not overwrite:
        raise CoresetError(
            f"{name} is not empty: choose another --to, or --overwrite to replace a publication"
        )
    if files:
        others = files - {*_listed(_manifest(name, repository, info.sha, MANIFEST), name), MANIFEST}
        if others:
            raise CoresetError(
                f"{name}: {min(others)} is not part of a publication, and --overwrite replaces "
                "nothing else: choose another --to"
            )
    return info.sha, files


def upload(
    folder: Path, name: str, before: tuple[str | None, set[str]], *, private: bool, message: str
) -> str:
    """Make the folder the content of the repository, by one commit; returns that commit's sha.

    `before`: as published_before returned it. Raises DownloadError for what the hub refuses, which
    includes a repository that somebody changed meanwhile.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    repository, commit, files = _parsed(name)[0], *before
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    added = [CommitOperationAdd(to, path) for to, path in paths.items() if path.is_file()]
    gone = [CommitOperationDelete(old) for old in sorted(files - {*paths})]
    with _explained(name):
        api = HfApi()
        if commit is None:
            api.create_repo(repository, repo_type="dataset", private=private or None)
        return api.create_commit(
            repository,
            [*gone, *added],
            repo_type="dataset",
            commit_message=message,
            parent_commit=commit,
        ).oid


def _parsed(name: str) -> tuple[str, str | None, str]:
    """Repository, revision and folder, which is empty or ends in a slash."""
    if (found := _NAME.fullmatch(name)) is None:
        raise CoresetError(f"{name}: expected hf:USER/NAME[@REVISION][/coreset-METHOD]")
    return found[1], found[2], f"{found[3]}/" if found[3] else ""


def _manifest(name: str, repository: str, revision: str | None, file: str) -> Path:
    """The file in the hub's cache, in a folder named by its commit."""
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    kept = try_to_load_from_cache(repository, file, revision=revision, repo_type="dataset")
    if isinstance(kept, str) and revision is not None and _COMMIT.fullmatch(revision):
        return Path(kept)
    try:
        with _explained(name):
            HfApi().dataset_info(repository, revision=revision)  # fails at once, not after 23 s
            return Path(hf_hub_download(repository, file, repo_type="dataset", revision=revision))
    except DownloadError as error:
        if not isinstance(kept, str) or _status(error.__cause__) is not None:
            raise
        say(f"{error}; taken as it was downloaded before")
        return Path(kept)


def _listed(manifest: Path, name: str) -> dict[str, dict]:
    """Size and sha256 of each file that the manifest names."""
    place = f"{name}, {MANIFEST}"
    return parse_json(manifest.read_bytes(), place, CoresetError, _OURS, _Listed)["files"]


def _status(error: BaseException | None) -> int | None:
    """The status code of the hub's answer; None where the hub gave none."""
    return getattr(getattr(error, "response", None), "status_code", None)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Raise DownloadError, one line with a way out, for whatever the hub's client raises."""
    from huggingface_hub import constants
    from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

    try:
        yield
    except Exception as error:
        status = _status(error)
        reason = " ".join(str(error.__cause__ or error).split())[:200] or type(error).__name__
        hub = f"the hub at {constants.ENDPOINT}"
        if isinstance(error, RevisionNotFoundError):
            told = f"{hub} has no such revision: give one of its commits, branches or tags"
        elif isinstance(error, EntryNotFoundError) and status is not None:
            told = f"it has no {MANIFEST}: {_OURS}"
        elif status in (401, 403, 404):
            told = (
                f"{hub} has no such data set, or not for you ({status}): check the name, {_LOG_IN}"
            )
        elif status == 412:
            told = "it was changed meanwhile: look at it, and publish again"
        elif status is None and "license" in reason:
            told = f"{reason}: give --data-licence another identifier, or a text with a space"
        else:
            told = f"{hub} did not answer as expected ({reason}): try again"
        raise DownloadError(f"{name}: {told}") from error
