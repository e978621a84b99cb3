"""A checkpoint on the hub: its index from bounded range reads, its bytes on demand, and what published digests save.

A snapshot in the local hub cache is used before the network, and nothing else where there is to be no network.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.files import (
    CONFIG_NAME,
    LARGEST_SMALL_FILE,
    checked_name,
    local_source,
    read_local_file,
)
from checks.checkpoint.hub_cache import cached_file, cached_snapshot, is_known_absent, read_cached_index
from checks.checkpoint.hub_failures import (
    FileMissing,
    HubOffline,
    HubRefused,
    HubTimedOut,
    HubUnreachable,
    Patience,
)
from checks.checkpoint.hub_repository import HubRepository
from checks.checkpoint.index import (
    INDEX_NAME,
    LARGEST_JSON,
    CheckpointIndex,
    build_index,
    shards_of_weight_map,
    shards_without_index,
    shown,
)
from checks.checkpoint.local import LocalSource

COMMIT = re.compile(r"[0-9a-f]{40}")
# Names of branches and tags. The local hub cache has a file for each, and no name may lead to another.
REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9_][A-Za-z0-9_./+-]*")
HEADERS_AT_ONCE = 8

PATIENT = Patience()


def resolve_revision(repo: str, revision: str | None, patience: Patience = PATIENT, offline: bool | None = None) -> str:
    """Which commit does a branch or tag name now? A full commit sha is returned as it is, None is the default branch.

    When the hub cannot be reached or is not to be asked (`offline`; None: as HF_HUB_OFFLINE says), what the local hub
    cache last saw there. Raises CheckpointUnavailable otherwise.
    """
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    if revision is not None and not REVISION.fullmatch(revision):
        raise HubRefused(f"{repo}: {shown(revision)} is no branch, tag or commit; correct the revision in the claim")
    try:
        if is_offline(offline):
            raise _not_cached(repo, revision)
        commit = HubRepository(repo, revision, patience).commit()
    except (HubOffline, HubTimedOut, HubUnreachable):
        snapshot = cached_snapshot(repo, revision)
        if snapshot is None:
            raise
        commit = snapshot.name
    if not COMMIT.fullmatch(commit):
        raise HubRefused(f"{repo}: expected a commit sha for {revision}, found {shown(commit)}; name the commit itself")
    return commit


def read_hub_index(
    repo: str, revision: str | None, patience: Patience = PATIENT, offline: bool | None = None
) -> CheckpointIndex:
    """What does a checkpoint on the hub hold? Reads headers only, from the local hub cache if it has the checkpoint.

    The index records the commit sha, and the SHA-256 that the hub publishes for each shard. Raises
    CheckpointUnavailable, by a subclass of its own for each way in which the hub can fail.
    """
    return HubFiles(repo, resolve_revision(repo, revision, patience, offline), patience, offline).index()


def is_offline(offline: bool | None = None) -> bool:
    """Is there to be no network, by whoever calls or by HF_HUB_OFFLINE?"""
    from huggingface_hub import is_offline_mode

    return bool(offline) or is_offline_mode()


class HubSource:
    """Reads the shards of one hub checkpoint, each piece by one range request. Threads may share it."""

    def __init__(
        self, index: CheckpointIndex, patience: Patience = PATIENT, repository: HubRepository | None = None
    ) -> None:
        self._shards = index.shards
        # A repository that is open already knows the addresses to which the hub sends for its files.
        self._repository = repository or HubRepository(index.origin, index.revision, patience)

    @property
    def transferred(self) -> int:
        """Bytes of files received so far, repeated ones and a shared repository's included; HTTP headers are not."""
        return self._repository.transferred

    def read_into(self, shard: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of `shard` from `start`. Raises CheckpointUnavailable when that fails."""
        self._repository.read_into(self._shards[shard], start, buffer)

    def close(self) -> None:
        """Nothing to close: the connections are huggingface_hub's, which shares them."""


class HubFiles:
    """The files of one commit of one repository, from the local hub cache or by range reads.

    The hub is asked once for the listing and each header; what failed fails again with the same words.
    """

    def __init__(self, repo: str, commit: str, patience: Patience = PATIENT, offline: bool | None = None) -> None:
        self.repo = repo
        self.commit = commit
        self._patience = patience
        self._offline = offline
        self._index: CheckpointIndex | CheckpointUnavailable | None = None

    @property
    def where(self) -> str:
        """The repository and its commit, for people."""
        return f"{self.repo}@{self.commit[:12]}"

    @property
    def provenance(self) -> Mapping[str, str]:
        """Repository and commit, for the record."""
        return {"repository": self.repo, "revision": self.commit}

    @cached_property
    def repository(self) -> HubRepository:
        """The repository as the hub shows it. Opens no connection yet."""
        return HubRepository(self.repo, self.commit, self._patience)

    def index(self) -> CheckpointIndex:
        """See CheckpointFiles."""
        if self._index is None:
            try:
                self._index = self._read_index()
            except CheckpointUnavailable as error:
                self._index = error
        if isinstance(self._index, CheckpointUnavailable):
            raise type(self._index)(str(self._index)) from self._index.__cause__
        return self._index

    def source(self) -> LocalSource | HubSource:
        """See CheckpointFiles."""
        index = self.index()
        if index.directory is not None:
            return local_source(index.directory)
        return HubSource(index, self._patience, self.repository)

    def small_file(self, name: str, largest: int = LARGEST_SMALL_FILE) -> bytes | None:
        """See CheckpointFiles."""
        name = checked_name(name, self.where)
        cached = cached_file(self.repo, self.commit, name)
        if cached is not None:
            return read_local_file(cached.parent, name, largest)
        if is_known_absent(self.repo, self.commit, name):
            return None
        if is_offline(self._offline):
            raise _not_cached(self.repo, self.commit, f"its {name}")
        file = self.repository.files().get(name)
        return None if file is None else self.repository.read_whole(file, largest)

    def config(self) -> bytes | None:
        """See CheckpointFiles. Without network and in no cache it is as if there were none: weights can be compared."""
        try:
            return self.small_file(CONFIG_NAME)
        except HubOffline:
            return None

    def published_shards(self) -> CheckpointIndex:
        """The shards with their published digests, and no tensors: no file is opened, gated or not.

        Beside an index file only numbered shards count, if there are any: which others it lists cannot be seen.
        Raises CheckpointUnavailable.
        """
        files = self.repository.files()
        numbered = [name for name in files if re.search(r"-\d{5}-of-\d{5}\.safetensors$", name)]
        names = numbered if INDEX_NAME in files and numbered else shards_without_index(files, self.where)
        return CheckpointIndex(self.repo, {name: files[name] for name in sorted(names)}, {}, self.commit)

    def _read_index(self) -> CheckpointIndex:
        offline = is_offline(self._offline)
        try:
            return read_cached_index(self.repo, self.commit, only_source=offline)
        except CheckpointUnavailable as error:
            if offline:
                raise _not_cached(self.repo, self.commit, because=f" ({error})") from error
        files = self.repository.files()
        if INDEX_NAME in files:
            text = self.repository.read_whole(files[INDEX_NAME], LARGEST_JSON)
            listed = shards_of_weight_map(text, f"{self.where}/{INDEX_NAME}")
            absent = sorted(listed.keys() - files.keys())
            if absent:
                raise FileMissing(
                    f"{self.where}/{INDEX_NAME}: lists {absent[0]}, which is absent; name a revision that has it"
                )
        else:
            listed = shards_without_index(files, self.where)
        with ThreadPoolExecutor(HEADERS_AT_ONCE) as pool:
            shards = list(pool.map(self.repository.read_shard, [files[name] for name in listed]))
        return build_index(self.repo, shards, listed, self.commit)


def _not_cached(repo: str, revision: str | None, what: str = "it", because: str = "") -> HubOffline:
    at = f"@{revision[:12]}" if revision else ""
    # What stands in a claim goes into a command that someone may run.
    option = f" --revision {shlex.quote(revision)}" if revision else ""
    return HubOffline(
        f"{repo}{at}: there is to be no network (--offline or HF_HUB_OFFLINE), and the local hub cache does not have "
        f"{what}{because}; run with network, give a path, or fetch it before with `hf download {shlex.quote(repo)}"
        f"{option} --include '*.safetensors*' --include '*.json'`"
    )
