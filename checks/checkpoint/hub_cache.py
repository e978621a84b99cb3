"""What the local hub cache holds, as huggingface_hub lays it out. Nothing here opens the network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.hub_repository import SHA256
from checks.checkpoint.index import INDEX_NAME, SINGLE_NAME, CheckpointIndex
from checks.checkpoint.local import BLOBS, read_local_index


def cached_snapshot(repo: str, revision: str | None) -> Path | None:
    """The directory of a revision in the local hub cache, complete or not."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[]))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def read_cached_index(repo: str, commit: str, only_source: bool) -> CheckpointIndex:
    """The index of a snapshot in the local hub cache. Raises CheckpointUnavailable when that is absent or incomplete.

    Without an index file and a single file, a snapshot does not tell whether it is complete: then only if it has to do.
    """
    snapshot = cached_snapshot(repo, commit)
    if snapshot is None:
        raise CheckpointUnavailable("it has no such snapshot")
    if not only_source and not any((snapshot / name).exists() for name in (INDEX_NAME, SINGLE_NAME)):
        raise CheckpointUnavailable(f"{snapshot}: may be incomplete")
    index = read_local_index(snapshot)
    shards = {
        name: replace(shard, published_sha256=_digest_in_cache(snapshot / name)) for name, shard in index.shards.items()
    }
    return replace(index, origin=repo, revision=commit, shards=shards)


def cached_file(repo: str, commit: str, name: str) -> Path | None:
    """Where the local hub cache has a file of a commit; None when it does not have it."""
    found = _looked_up(repo, commit, name)
    return Path(found) if isinstance(found, str) else None


def is_known_absent(repo: str, commit: str, name: str) -> bool:
    """Does the local hub cache know that the commit has no such file?

    It remembers each file that was asked for in vain, and the listing of a repository that was downloaded.
    """
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, HFValidationError

    found = _looked_up(repo, commit, name)
    if found is not None:
        return not isinstance(found, str)
    try:
        return name not in {file.path for file in get_cached_repo_tree(repo, revision=commit)}
    except (CachedRepoTreeNotFoundError, HFValidationError):
        return False


def _looked_up(repo: str, commit: str, name: str) -> object:
    """A path as text, None, or the mark that huggingface_hub keeps for a file that is not there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return try_to_load_from_cache(repo, name, revision=commit)
    except HFValidationError:
        return None


def _digest_in_cache(file: Path) -> str | None:
    """The cache links a file of git LFS to a blob that is named by its published SHA-256."""
    if not file.is_symlink():
        return None
    blob = file.readlink()
    return blob.name if blob.parent.name == BLOBS and SHA256.fullmatch(blob.name) else None
