"""A checkpoint on the hub: its index from bounded range reads, its bytes on demand, and what published digests save.

All traffic goes through huggingface_hub's own client, so HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE and its other
settings work as its users expect. A snapshot in the local hub cache is used before the network.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.header import parse_header, read_header
from checks.checkpoint.hub_failures import (
    OTHER_ENDPOINT,
    AddressExpired,
    BodyCut,
    FileMissing,
    HubOffline,
    HubRefused,
    HubTimedOut,
    HubUnreachable,
    Patience,
    RangeIgnored,
    patiently,
    sense,
)
from checks.checkpoint.index import (
    INDEX_NAME,
    LARGEST_JSON,
    SINGLE_NAME,
    CheckpointIndex,
    Shard,
    TensorInfo,
    build_index,
    is_plain_file_name,
    shards_of_weight_map,
    shards_without_index,
    shown,
)
from checks.checkpoint.local import BLOBS, LocalSource, read_local_index

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo, RepoSibling
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
HEADERS_AT_ONCE = 8

# Statuses with which a signed address, which the hub redirected to before, says that its time is over.
ADDRESS_EXPIRED = (400, 401, 403, 404, 410)

PATIENT = Patience()


def resolve_revision(repo: str, revision: str | None, patience: Patience = PATIENT) -> str:
    """Which commit does a branch or tag name now? A full commit sha is returned as it is, None is the default branch.

    When the hub cannot be reached, what the local hub cache last saw there. Raises CheckpointUnavailable otherwise.
    """
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    try:
        commit = _Repository(repo, revision, patience).commit()
    except (HubOffline, HubTimedOut, HubUnreachable):
        snapshot = _cached_snapshot(repo, revision)
        if snapshot is None:
            raise
        commit = snapshot.name
    if not COMMIT.fullmatch(commit):
        raise HubRefused(f"{repo}: expected a commit sha for {revision}, found {shown(commit)}; name the commit itself")
    return commit


def read_hub_index(repo: str, revision: str | None, patience: Patience = PATIENT) -> CheckpointIndex:
    """What does a checkpoint on the hub hold? Reads headers only, from the local hub cache if it has the checkpoint.

    The index records the commit sha, and the SHA-256 that the hub publishes for each shard. Raises
    CheckpointUnavailable, by a subclass of its own for each way in which the hub can fail.
    """
    from huggingface_hub import is_offline_mode

    commit = resolve_revision(repo, revision, patience)
    try:
        return _read_cached_index(repo, commit, only_source=is_offline_mode())
    except CheckpointUnavailable as error:
        if is_offline_mode():
            raise HubOffline(
                f"{repo}@{commit[:12]}: HF_HUB_OFFLINE is set and the local hub cache does not have it ({error}); "
                f"unset it, or fetch it before with `hf download {repo} --revision {commit}`"
            ) from error
    repository = _Repository(repo, commit, patience)
    files = repository.files()
    where = repository.name
    if INDEX_NAME in files:
        listed = shards_of_weight_map(repository.read_whole(files[INDEX_NAME]), f"{where}/{INDEX_NAME}")
        absent = sorted(listed.keys() - files.keys())
        if absent:
            raise FileMissing(f"{where}/{INDEX_NAME}: lists {absent[0]}, which is absent; name a revision that has it")
    else:
        listed = shards_without_index(files, where)
    with ThreadPoolExecutor(HEADERS_AT_ONCE) as pool:
        shards = list(pool.map(repository.read_shard, [files[name] for name in listed]))
    return build_index(repo, shards, listed, commit)


def read_published_shards(repo: str, revision: str | None, patience: Patience = PATIENT) -> CheckpointIndex:
    """The shards of a checkpoint with their published digests, and no tensors: no file is opened, gated or not.

    Beside an index file only numbered shards count, if there are any: which others it lists cannot be seen.
    """
    commit = resolve_revision(repo, revision, patience)
    repository = _Repository(repo, commit, patience)
    files = repository.files()
    numbered = [name for name in files if re.search(r"-\d{5}-of-\d{5}\.safetensors$", name)]
    names = numbered if INDEX_NAME in files and numbered else shards_without_index(files, repository.name)
    return CheckpointIndex(repo, {name: files[name] for name in sorted(names)}, {}, commit)


def open_source(index: CheckpointIndex, patience: Patience = PATIENT) -> LocalSource | HubSource:
    """Where the bytes of an index come from: its directory, or the hub."""
    return HubSource(index, patience) if index.directory is None else LocalSource(index.directory)


class HubSource:
    """Reads the shards of one hub checkpoint, each piece by one range request. Threads may share it."""

    def __init__(self, index: CheckpointIndex, patience: Patience = PATIENT) -> None:
        self._shards = index.shards
        self._repository = _Repository(index.origin, index.revision, patience)

    @property
    def transferred(self) -> int:
        """Bytes of files received so far, repeated ones included; HTTP headers are not."""
        return self._repository.transferred

    def read_into(self, shard: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of `shard` from `start`. Raises CheckpointUnavailable when that fails."""
        self._repository.read_into(self._shards[shard], start, buffer)

    def close(self) -> None:
        """Nothing to close: the connections are huggingface_hub's, which shares them."""


def _read_cached_index(repo: str, commit: str, only_source: bool) -> CheckpointIndex:
    """The index of a snapshot in the local hub cache. Raises CheckpointUnavailable when that is absent or incomplete.

    Without an index file and a single file, a snapshot does not tell whether it is complete: then only if it has to do.
    """
    snapshot = _cached_snapshot(repo, commit)
    if snapshot is None:
        raise CheckpointUnavailable("it has no such snapshot")
    if not only_source and not any((snapshot / name).exists() for name in (INDEX_NAME, SINGLE_NAME)):
        raise CheckpointUnavailable(f"{snapshot}: may be incomplete")
    index = read_local_index(snapshot)
    shards = {
        name: replace(shard, published_sha256=_digest_in_cache(snapshot / name)) for name, shard in index.shards.items()
    }
    return replace(index, origin=repo, revision=commit, shards=shards)


def _digest_in_cache(file: Path) -> str | None:
    """The cache links a file of git LFS to a blob that is named by its published SHA-256."""
    if not file.is_symlink():
        return None
    blob = file.readlink()
    return blob.name if blob.parent.name == BLOBS and SHA256.fullmatch(blob.name) else None


def _cached_snapshot(repo: str, revision: str | None) -> Path | None:
    """The directory of a revision in the local hub cache, complete or not. No network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[]))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


class _Repository:
    """One revision of one repository: its listing, and byte ranges of its files."""

    def __init__(self, repo: str, revision: str | None, patience: Patience) -> None:
        from huggingface_hub import HfApi

        self._repo = repo
        self._revision = revision
        self._patience = patience
        # huggingface_hub reads HF_ENDPOINT when it is imported; what is set now is what its user means.
        self._api = HfApi(endpoint=os.environ.get("HF_ENDPOINT", "").rstrip("/") or None)
        self.name = f"{repo}@{revision[:12]}" if revision else repo
        self.transferred = 0
        self._lock = threading.Lock()
        self._locations: dict[str, str] = {}  # file → the signed address that the hub last sent us to

    def commit(self) -> str:
        """The full commit sha of this revision."""
        return str(self._info(files_metadata=False).sha)

    def files(self) -> dict[str, Shard]:
        """The files in the repository's root, with the sizes and digests that the hub publishes."""
        siblings = self._info(files_metadata=True).siblings or []
        with sense(self.name):
            files = [self._published(sibling) for sibling in siblings if is_plain_file_name(sibling.rfilename)]
        return {file.name: file for file in files}

    def read_shard(self, file: Shard) -> tuple[Shard, list[TensorInfo]]:
        """A shard and the tensors in its header, by one range request, or two if the header is long."""
        where = f"{self.name}/{file.name}"
        header = read_header(lambda start, stop: self._read(file, start, stop), file.size, file.name, where)
        return file, parse_header(header, file.size, file.name, where)

    def read_whole(self, file: Shard) -> bytes:
        """A small file."""
        if file.size > LARGEST_JSON:
            raise HubRefused(
                f"{self.name}/{file.name}: has {file.size} bytes, expected {LARGEST_JSON} at most; correct the revision"
            )
        return self._read(file, 0, file.size)

    def read_into(self, file: Shard, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `start` of a file. A broken transfer goes on where it broke."""
        size = buffer.nbytes
        where = f"{self.name}/{file.name}"
        if not 0 <= start <= start + size <= file.size:
            raise CheckpointUnavailable(
                f"{where}: bytes {start} to {start + size} are asked for, expected a range within its {file.size}; "
                "read its index again"
            )
        if not size:
            return
        view = buffer.cast("B")
        done = 0

        def attempt() -> None:
            nonlocal done
            for piece in self._pieces(file, start + done, start + size):
                view[done : done + len(piece)] = piece
                done += len(piece)
            if done < size:
                raise BodyCut(
                    f"{where}: the transfer ended at byte {start + done}, expected {start + size}; the file on the "
                    "hub or the connection is broken: try again later"
                )

        patiently(attempt, where, self._api.endpoint, self._patience)

    def _read(self, file: Shard, start: int, stop: int) -> bytes:
        buffer = bytearray(stop - start)
        self.read_into(file, start, memoryview(buffer))
        return bytes(buffer)

    def _published(self, sibling: RepoSibling) -> Shard:
        lfs = sibling.lfs
        size, digest = (sibling.size, None) if lfs is None else (lfs.size, lfs.sha256)
        if type(size) is not int or size < 0:
            raise HubRefused(
                f"{self.name}/{sibling.rfilename}: the hub states no size ({shown(size)}); set HF_ENDPOINT to a hub "
                "that does"
            )
        return Shard(sibling.rfilename, size, digest if digest and SHA256.fullmatch(digest) else None)

    def _info(self, files_metadata: bool) -> ModelInfo:
        def attempt() -> ModelInfo:
            with sense(self.name):
                return self._api.model_info(
                    self._repo, revision=self._revision, files_metadata=files_metadata, timeout=self._timeout
                )

        return patiently(attempt, self.name, self._api.endpoint, self._patience)

    @property
    def _timeout(self) -> float:
        from huggingface_hub import constants

        return self._patience.timeout or constants.HF_HUB_DOWNLOAD_TIMEOUT

    def _pieces(self, file: Shard, start: int, stop: int) -> Iterator[bytes]:
        """The bytes of one range request as they arrive, never more than asked for."""
        from huggingface_hub import get_session, hf_hub_url, hf_raise_for_status
        from huggingface_hub.utils import build_hf_headers, httpx  # type: ignore[attr-defined]

        where = f"{self.name}/{file.name}"
        with sense(where):
            address = hf_hub_url(self._repo, file.name, revision=self._revision, endpoint=self._api.endpoint)
            signed = self._locations.get(file.name)
            token = None if signed is None or _origin(signed) == _origin(address) else False
            headers = build_hf_headers(token=token, library_name="from-scratch")
        headers |= {"range": f"bytes={start}-{stop - 1}", "accept-encoding": "identity"}
        with get_session().stream("GET", signed or address, headers=headers, timeout=self._timeout) as response:
            if signed is not None and response.status_code in ADDRESS_EXPIRED:
                self._locations.pop(file.name, None)
                raise AddressExpired(f"{where}: the hub's address of the file expired again; try again later")
            with sense(where):
                hf_raise_for_status(response)
            _check_range(response, start, stop, file.size, where)
            if response.history:
                self._locations[file.name] = str(response.url)
            left = stop - start
            try:
                for piece in response.iter_raw():
                    with self._lock:
                        self.transferred += len(piece)
                    left -= len(piece)
                    if left < 0:
                        raise RangeIgnored(f"{where}: the server sent more than it announced; {OTHER_ENDPOINT}")
                    yield piece
            except (httpx.RemoteProtocolError, httpx.ReadError) as error:
                raise BodyCut(
                    f"{where}: the connection broke {left} bytes before byte {stop} ({error}); try again later"
                ) from error


def _origin(address: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(address)
    return parts.scheme, parts.hostname, parts.port


def _check_range(response: httpx.Response, start: int, stop: int, size: int, where: str) -> None:
    """Is what comes the asked range of the file that the hub listed, as it is? Nothing of the body was read yet."""
    answer = re.fullmatch(r"bytes (\d{1,20})-(\d{1,20})/(\d{1,20}|\*)", response.headers.get("content-range", ""))
    if response.headers.get("content-encoding", "identity") != "identity":
        raise RangeIgnored(f"{where}: the server sends it compressed, expected it as it is; {OTHER_ENDPOINT}")
    if response.status_code == 206 and answer is not None and int(answer[1]) == start and int(answer[2]) < stop:
        found = size if answer[3] == "*" else int(answer[3])
    elif response.status_code == 200 and (start, stop) == (0, size):
        found = int(response.headers.get("content-length", size))  # all of it, as asked for
    else:
        sent = shown(response.headers.get("content-range", "all"))
        raise RangeIgnored(
            f"{where}: asked for bytes {start} to {stop}, the server sends {sent} with status {response.status_code}; "
            f"{OTHER_ENDPOINT}"
        )
    if found != size:
        raise HubRefused(f"{where}: has {found} bytes, expected {size} as the hub lists; try again later")
