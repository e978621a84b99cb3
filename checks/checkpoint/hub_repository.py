"""One commit of one repository on the hub: its listing, and byte ranges of its files.

All traffic goes through huggingface_hub's own client, so HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and its other settings
work as its users expect.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.header import parse_header, read_header
from checks.checkpoint.hub_deadline import Progress, answered
from checks.checkpoint.hub_failures import (
    OTHER_ENDPOINT,
    AddressExpired,
    BodyCut,
    HubRefused,
    HubTooSlow,
    Patience,
    RangeIgnored,
    patiently,
    sense,
)
from checks.checkpoint.index import Shard, TensorInfo, is_plain_file_name, shown

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo, RepoSibling
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

SHA256 = re.compile(r"[0-9a-f]{64}")

# Bytes after which a transfer that breaks counts as one that goes on, not as a failed attempt.
PROGRESS = 1 << 20

# Statuses with which a signed address, which the hub redirected to before, says that its time is over.
ADDRESS_EXPIRED = (400, 401, 403, 404, 410)


class HubRepository:
    """One revision of one repository. Its listing is asked for once; threads may share it."""

    def __init__(self, repo: str, revision: str | None, patience: Patience) -> None:
        from huggingface_hub import HfApi

        self._repo = repo
        self._revision = revision
        self._patience = patience
        # huggingface_hub reads HF_ENDPOINT when it is imported; what is set now is what its user means.
        self._api = HfApi(endpoint=os.environ.get("HF_ENDPOINT", "").rstrip("/") or None)
        self.name = f"{repo}@{revision[:12]}" if revision else repo
        self.transferred = 0  # bytes of files received so far, repeated ones included; HTTP headers are not
        self._lock = threading.Lock()
        self._locations: dict[str, str] = {}  # file → the signed address that the hub last sent us to
        self._listing = threading.Lock()
        self._files: dict[str, Shard] | None = None
        self._blobs: dict[str, str | None] = {}  # file → the id of its git blob; None where the hub states none

    def commit(self) -> str:
        """The full commit sha of this revision."""
        return str(self._info(files_metadata=False).sha)

    def files(self) -> dict[str, Shard]:
        """The files in the repository's root, with the sizes and digests that the hub publishes."""
        with self._listing:
            if self._files is None:
                siblings = self._info(files_metadata=True).siblings or []
                with sense(self.name):
                    plain = [sibling for sibling in siblings if is_plain_file_name(sibling.rfilename)]
                    files = {sibling.rfilename: self._published(sibling) for sibling in plain}
                    self._blobs = {sibling.rfilename: sibling.blob_id for sibling in plain}
                self._files = files
            return self._files

    def is_published(self, name: str, content: bytes) -> bool:
        """Is this what the hub publishes under that name, by the SHA-256 of a large file or the git blob of a small?"""
        file = self.files().get(name)
        if file is None:
            return False
        if file.published_sha256 is not None:
            return hashlib.sha256(content).hexdigest() == file.published_sha256
        blob = b"blob %d\0" % len(content) + content
        return hashlib.sha1(blob, usedforsecurity=False).hexdigest() == self._blobs[name]

    def read_shard(self, file: Shard) -> tuple[Shard, list[TensorInfo]]:
        """A shard and the tensors in its header, by one range request, or two if the header is long."""
        where = f"{self.name}/{file.name}"
        header = read_header(lambda start, stop: self._read(file, start, stop), file.size, file.name, where)
        return file, parse_header(header, file.size, file.name, where)

    def read_whole(self, file: Shard, largest: int) -> bytes:
        """A small file. Raises CheckpointUnavailable when it has more than `largest` bytes."""
        if file.size > largest:
            raise HubRefused(
                f"{self.name}/{file.name}: has {file.size} bytes, expected {largest} at most; correct the revision"
            )
        return self._read(file, 0, file.size)

    def read_into(self, file: Shard, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `start` of a file. A broken transfer goes on where it broke.

        A long one may break any number of times, as long as each attempt brings PROGRESS bytes.
        """
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
            begun = done
            try:
                for piece in self._pieces(file, start + done, start + size):
                    view[done : done + len(piece)] = piece
                    done += len(piece)
                if done < size:
                    raise BodyCut(
                        f"{where}: the transfer ended at byte {start + done}, expected {start + size}; the file on the "
                        "hub or the connection is broken: try again later"
                    )
            except (BodyCut, HubTooSlow):
                if done - begun < PROGRESS:
                    raise

        while done < size:
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
        limits = self._limits

        def ask() -> ModelInfo:
            with sense(self.name):
                return self._api.model_info(
                    self._repo, revision=self._revision, files_metadata=files_metadata, timeout=limits.timeout
                )

        def attempt() -> ModelInfo:
            return answered(ask, limits, self.name, lambda _: None)

        return patiently(attempt, self.name, self._api.endpoint, self._patience)

    @property
    def _limits(self) -> Patience:
        """Our patience, with the user's time-out: whoever allows longer pauses allows as long for what trickles."""
        from huggingface_hub import constants

        if self._patience.timeout is not None:
            return self._patience
        pause = float(constants.HF_HUB_DOWNLOAD_TIMEOUT)
        answer, progress_time = max(pause, self._patience.answer), max(pause, self._patience.progress_time)
        return replace(self._patience, timeout=pause, answer=answer, progress_time=progress_time)

    def _pieces(self, file: Shard, start: int, stop: int) -> Iterator[bytes]:
        """The bytes of one range request as they arrive, never more than asked for."""
        from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

        where = f"{self.name}/{file.name}"
        left, limits = stop - start, self._limits
        ask = partial(self._response, file, start, stop, where)
        with closing(answered(ask, limits, where, _close)) as response:
            progress = Progress(limits, where)
            try:
                for piece in response.iter_raw():
                    with self._lock:
                        self.transferred += len(piece)
                    left -= len(piece)
                    if left < 0:
                        raise RangeIgnored(f"{where}: the server sent more than it announced; {OTHER_ENDPOINT}")
                    yield piece
                    if left:
                        progress.add(len(piece))
            except (httpx.RemoteProtocolError, httpx.ReadError) as error:
                raise BodyCut(
                    f"{where}: the connection broke {left} bytes before byte {stop} ({error}); try again later"
                ) from error

    def _response(self, file: Shard, start: int, stop: int, where: str) -> httpx.Response:
        """The answer to one range request, checked, with its body still to come."""
        from huggingface_hub import get_session, hf_hub_url, hf_raise_for_status
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        with sense(where):
            address = hf_hub_url(self._repo, file.name, revision=self._revision, endpoint=self._api.endpoint)
            signed = self._locations.get(file.name)
            token = None if signed is None or _origin(signed) == _origin(address) else False
            headers = build_hf_headers(token=token, library_name="from-scratch")
        headers |= {"range": f"bytes={start}-{stop - 1}", "accept-encoding": "identity"}
        client = get_session()
        request = client.build_request("GET", signed or address, headers=headers, timeout=self._limits.timeout)
        response = client.send(request, stream=True)
        try:
            if signed is not None and response.status_code in ADDRESS_EXPIRED:
                self._locations.pop(file.name, None)
                raise AddressExpired(f"{where}: the hub's address of the file expired again; try again later")
            with sense(where):
                hf_raise_for_status(response)
            _check_range(response, start, stop, file.size, where)
            if response.history:
                self._locations[file.name] = str(response.url)
        except BaseException:
            response.close()
            raise
        return response


def _close(response: httpx.Response) -> None:
    response.close()


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
