"""A gated repository read from a mirror: only while the mirror holds the very shards of the original."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.files import LARGEST_SMALL_FILE
from checks.checkpoint.hub import HubFiles
from checks.checkpoint.hub_failures import RepositoryGated
from checks.checkpoint.index import ByteSource, CheckpointIndex, may_read_from_mirror


@dataclass(frozen=True)
class Mirror:
    """A repository that is said to hold the same weights; `open` resolves its commit."""

    repo: str
    open: Callable[[], HubFiles]


class MirroredFiles:
    """The files of a repository of the hub, from a mirror where the repository's own terms keep us out.

    The hub publishes size and digest of each file of a gated repository too. Shards come from the first mirror whose
    shards all have the same; another file only if its content has the digest of the original's.
    """

    def __init__(self, original: HubFiles, mirrors: Sequence[Mirror]) -> None:
        self._original = original
        self._mirrors = mirrors
        self._chosen: HubFiles | None = None

    @property
    def where(self) -> str:
        """The repository and its commit, and the mirror that was read in its place."""
        by = f" (from its mirror {self._chosen.where})" if self._chosen else ""
        return f"{self._original.where}{by}"

    @property
    def provenance(self) -> Mapping[str, str]:
        """The repository that the claim names, and the mirror that was read in its place."""
        read = {} if self._chosen is None else {"mirror": f"{self._chosen.repo}@{self._chosen.commit}"}
        return {**self._original.provenance, **read}

    def index(self) -> CheckpointIndex:
        """See CheckpointFiles."""
        if self._chosen is None:
            try:
                return self._original.index()
            except RepositoryGated as error:
                self._chosen = self._equal_mirror(error)
        return self._chosen.index()

    def source(self) -> ByteSource:
        """See CheckpointFiles."""
        self.index()
        return (self._chosen or self._original).source()

    def small_file(self, name: str, largest: int = LARGEST_SMALL_FILE) -> bytes | None:
        """See CheckpointFiles. Raises RepositoryGated when no mirror has the original's file."""
        try:
            return self._original.small_file(name, largest)
        except RepositoryGated as error:
            self._chosen = self._chosen or self._equal_mirror(error)
            content = self._chosen.small_file(name, largest)
            if content is not None and self._original.repository.is_published(name, content):
                return content
            raise RepositoryGated(f"{error}; its mirror {self._chosen.where} does not have the same {name}") from error

    def config(self) -> bytes | None:
        """See CheckpointFiles. The mirror's own may say other things of the same weights, whose shapes are checked."""
        try:
            return self._original.config()
        except RepositoryGated as error:
            self._chosen = self._chosen or self._equal_mirror(error)
            return self._chosen.config()

    def _equal_mirror(self, gated: RepositoryGated) -> HubFiles:
        """The first mirror that holds the very shards of the original. Raises RepositoryGated, with why none does."""
        refusals = []
        for mirror in self._mirrors:
            try:
                files = mirror.open()
                if may_read_from_mirror(self._original.published_shards(), files.index()):
                    return files
            except CheckpointUnavailable as error:
                refusals.append(str(error))
            else:
                refusals.append(f"{files.where} does not publish the same shards")
        raise RepositoryGated(f"{gated}; not read from a mirror: {'; '.join(refusals)}") from gated
