"""What comes from the Hugging Face Hub, and in one sentence why it does not.

`fetch` brings files of a repository into the cache; `explained` surrounds whatever else loads from there. What stands
in the way becomes one ValueError with its remedy: a gated repository wants its license accepted and a login, offline
mode its variable unset or the files fetched before. diffusers often answers with an error of its own, which calls a
gated repository "not a valid model identifier", so the reason is looked for among all errors that led to the last one.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from huggingface_hub import get_cached_repo_tree, snapshot_download
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError

from arcflow.system.files import digest


def fetch(repository: str, patterns: Sequence[str]) -> Path:
    """A local copy of a repository, with those of its files that match a pattern."""
    with explained(repository):
        return Path(snapshot_download(repository, allow_patterns=list(patterns)))


def folders(repository: str, files: Sequence[str]) -> list[str]:
    """Folders of a fetched repository that hold all files of these names, whether they were fetched too or not."""
    try:
        paths = {PurePosixPath(entry.path) for entry in get_cached_repo_tree(repository)}
    except CachedRepoTreeNotFoundError:  # fetched by an older huggingface_hub
        return []
    found = {path.parent for path in paths if all(path.parent / file in paths for file in files)}
    return sorted(str(folder) for folder in found if folder.name)


def content_of(file: Path) -> str:
    """SHA-256 of a file. A large one in the Hub's cache is a link to a file that is called so, and is not read."""
    stored = file.resolve()
    named = stored.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", stored.name)
    return stored.name if named else digest(stored)


@contextmanager
def explained(name: str) -> Iterator[None]:
    """What keeps the block from loading `name`, a folder or a repository, becomes a ValueError with a remedy."""
    try:
        yield
    except (OSError, HTTPError, SafetensorError) as error:
        raise ValueError(_sentence(name, error)) from error


def _sentence(name: str, error: BaseException) -> str:
    errors = list(_with_causes(error))

    def met(kind: type[BaseException]) -> bool:
        return any(isinstance(one, kind) for one in errors)

    if met(GatedRepoError):  # which is a RepositoryNotFoundError
        return (
            f"{name!r} is gated on the Hugging Face Hub: expected an account that may read it. Accept its license at "
            f"https://huggingface.co/{name} and run `hf auth login`."
        )
    if met(RepositoryNotFoundError):
        return (
            f"no folder {name!r} here and no such repository on the Hugging Face Hub, or it is private: expected "
            f"owner/name. Check the spelling, or give a local folder; for a private one run `hf auth login`."
        )
    if met(OfflineModeIsEnabled):
        return (
            f"{name!r} is not completely in the cache: expected it there, for HF_HUB_OFFLINE is set. Unset "
            f"that, or run `hf download {name}` once without it."
        )
    if met(LocalEntryNotFoundError):
        return (
            f"no folder {name!r} here, it is not completely in the cache, and the Hugging Face Hub cannot be reached. "
            f"Check the connection and try again, or give a local folder."
        )
    said = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    if met(SafetensorError):
        return f"{name!r} has a file that is truncated or damaged ({said}). Copy or fetch it again."
    return (
        f"{name!r} cannot be loaded ({said}): expected a whole folder, or owner/name on the Hugging Face Hub. Check "
        f"the spelling and the connection."
    )


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    """An error and all that led to it."""
    yield error
    for before in {error.__cause__, error.__context__}:
        if before:
            yield from _with_causes(before)
