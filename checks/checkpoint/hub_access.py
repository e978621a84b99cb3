"""The hub as one run sees it: which commit each branch names, agreed once, and every repository opened once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial

from checks.catalog import entry as catalog
from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.files import CheckpointFiles
from checks.checkpoint.hub import COMMIT, PATIENT, HubFiles, resolve_revision
from checks.checkpoint.hub_failures import HubOffline, HubTimedOut, HubUnreachable, Patience
from checks.checkpoint.mirror import Mirror, MirroredFiles
from checks.claim.model import ModelSource

ASKED_AT_ONCE = 8


@dataclass(frozen=True)
class Revisions:
    """Which commit each branch or tag names in this run, by `org/name@branch`, and why one could not be found out."""

    commits: Mapping[str, str] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)

    def as_plain(self) -> dict[str, dict[str, str]]:
        """What xdist can hand to its workers."""
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Mapping[str, str]]) -> Revisions:
        """What `as_plain` returned."""
        return cls(**plain)

    def where(self, source: ModelSource) -> str:
        """Where a model's weights are, with the commit that its branch names in this run."""
        if source.path is not None or source.where not in self.commits:
            return source.where
        return f"{source.repo}@{self.commits[source.where]}"


def resolve_revisions(sources: Iterable[ModelSource], offline: bool, patience: Patience = PATIENT) -> Revisions:
    """Which commits do the branches of these models, and of their mirrors, name now? One request for each.

    A failure is kept, not raised: it concerns one model. A hub that cannot be reached is not asked again and again.
    """
    wanted = {
        _key(repo, revision): (repo, revision)
        for source in sources
        if source.path is None and source.repo is not None
        for repo, revision in [(source.repo, source.revision), *mirrors_of(source)]
        if not is_commit(revision)
    }
    unreachable: list[CheckpointUnavailable] = []

    def resolve(repo: str, revision: str | None) -> str | CheckpointUnavailable:
        if unreachable:
            try:
                return resolve_revision(repo, revision, patience, offline=True)
            except HubOffline:
                return HubUnreachable(f"{_key(repo, revision)}: not asked for, after {unreachable[0]}")
        try:
            return resolve_revision(repo, revision, patience, offline)
        except CheckpointUnavailable as error:
            if isinstance(error, HubUnreachable | HubTimedOut):
                unreachable.append(error)
            return error

    if not wanted:
        return Revisions()
    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        answers = dict(zip(wanted, pool.map(resolve, *zip(*wanted.values(), strict=True)), strict=True))
    return Revisions(
        {key: answer for key, answer in answers.items() if isinstance(answer, str)},
        {key: str(answer) for key, answer in answers.items() if isinstance(answer, CheckpointUnavailable)},
    )


def is_commit(revision: str | None) -> bool:
    """Is this a full commit sha, which names the same files for ever?"""
    return revision is not None and COMMIT.fullmatch(revision) is not None


def mirrors_of(source: ModelSource) -> list[tuple[str, str | None]]:
    """Repository and revision of the catalogue's mirrors of a model, if the model is read from the catalogue's own."""
    entry = catalog.load(source.catalog_key) if source.catalog_key else None
    if entry is None or source.repo != entry.repo:
        return []
    parts = [mirror.partition("@") for mirror in entry.mirrors]
    return [(repo, revision or None) for repo, _, revision in parts]


class HubAccess:
    """Opens the models of a run. What the controller resolved is used; anything else is resolved once, when opened."""

    def __init__(self, offline: bool = False, revisions: Revisions | None = None, patience: Patience = PATIENT) -> None:
        self.offline = offline
        self._patience = patience
        agreed = revisions or Revisions()
        self._commits = dict(agreed.commits)
        self._failures = dict(agreed.failures)
        self._opened: dict[tuple[str, str], HubFiles] = {}

    def commit(self, repo: str, revision: str | None) -> str:
        """The commit that a branch or tag names in this run. Raises CheckpointUnavailable, the same way every time."""
        key = _key(repo, revision)
        if key not in self._commits and key not in self._failures:
            try:
                self._commits[key] = resolve_revision(repo, revision, self._patience, self.offline)
            except CheckpointUnavailable as error:
                self._failures[key] = str(error)
        if key in self._failures:
            raise CheckpointUnavailable(self._failures[key])
        return self._commits[key]

    def files(self, source: ModelSource) -> CheckpointFiles:
        """The files of a model that is named by a repository. Raises CheckpointUnavailable."""
        assert source.repo is not None
        original = self._open(source.repo, source.revision)
        mirrors = [Mirror(repo, partial(self._open, repo, revision)) for repo, revision in mirrors_of(source)]
        return MirroredFiles(original, mirrors) if mirrors else original

    def _open(self, repo: str, revision: str | None) -> HubFiles:
        commit = self.commit(repo, revision)
        if (repo, commit) not in self._opened:
            self._opened[repo, commit] = HubFiles(repo, commit, self._patience, self.offline)
        return self._opened[repo, commit]


def _key(repo: str, revision: str | None) -> str:
    """As ModelSource.where writes it."""
    return f"{repo}@{revision}" if revision else repo
