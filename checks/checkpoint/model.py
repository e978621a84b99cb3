"""One model of a pair: what is known without its weights, and its weights once something asks for them."""

from __future__ import annotations

from pathlib import Path

from checks.catalog import entry as catalog
from checks.catalog.architecture import Architecture
from checks.catalog.entry import CatalogEntry
from checks.checkpoint.checkpoint import Checkpoint
from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.files import LARGEST_SMALL_FILE, CheckpointFiles
from checks.checkpoint.gguf_files import GgufCheckpoint, GgufFiles, local_files
from checks.checkpoint.hub_access import HubAccess
from checks.claim.model import ModelSource


class Model:
    """A candidate or a reference, or one component of it. Weights are opened on first use and a failure is kept."""

    def __init__(
        self, source: ModelSource, component: str | None, prefixes: tuple[str, ...], hub: HubAccess | None = None
    ) -> None:
        self.source = source
        self.component = component
        self.prefixes = prefixes
        self._hub = hub or HubAccess()
        self._files: CheckpointFiles | None = None
        self._checkpoint: Checkpoint | CheckpointUnavailable | None = None

    @property
    def name(self) -> str:
        """The model's name in cases."""
        return self.source.name

    @property
    def architecture(self) -> Architecture | None:
        """The component's architecture from the catalogue or its config.json; None when unknown."""
        return self.source.architecture(self.component)

    @property
    def catalog_entry(self) -> CatalogEntry | None:
        """What the catalogue knows of the model."""
        return catalog.load(self.source.catalog_key) if self.source.catalog_key else None

    def unverified_keys(self) -> list[str]:
        """Keys of the catalogue's row for this component that rest on no primary source."""
        entry = self.catalog_entry
        if entry is None or self.architecture is None:
            return []
        name = next((one for one, row in entry.components.items() if row == self.architecture), None)
        if name is None:
            return []  # the configuration is the model's own, not the catalogue's row
        starts = ("architecture.", f"components.{name}.architecture.")
        return sorted(
            path.rpartition(".")[2]
            for path, figure in entry.figures.items()
            if figure.unverified and path.startswith(starts)
        )

    @property
    def checkpoint(self) -> Checkpoint:
        """The opened weights. Raises CheckpointUnavailable, the same way every time."""
        if self._checkpoint is None:
            try:
                files = self._open()
                kind = GgufCheckpoint if isinstance(files, GgufFiles) else Checkpoint
                self._checkpoint = kind(files, self.prefixes)
            except CheckpointUnavailable as error:
                self._checkpoint = error
        if isinstance(self._checkpoint, CheckpointUnavailable):
            raise type(self._checkpoint)(str(self._checkpoint))
        return self._checkpoint

    def release(self) -> None:
        """Let go of the tensors that are held, and hold none from now on."""
        if isinstance(self._checkpoint, Checkpoint):
            self._checkpoint.held.limit = 0
            self._checkpoint.held.clear()

    def open_other(self, source: ModelSource) -> Checkpoint:
        """Another checkpoint that the claim names, from where this one would come. Raises CheckpointUnavailable."""
        return Model(source, self.component, self.prefixes, self._hub).checkpoint

    def small_file(self, name: str, largest: int = LARGEST_SMALL_FILE) -> bytes | None:
        """A small file beside the weights (tokenizer.json, …), of at most `largest` bytes; None if there is none.

        Asks for no weights. Raises CheckpointUnavailable when that cannot be told, and for a name that leads elsewhere.
        """
        return self._open().small_file(name, largest)

    def _open(self) -> CheckpointFiles:
        """The claim's path, else the hub repository: from the local hub cache, or by range reads."""
        if self._files is None:
            if self.source.path is not None:
                self._files = local_files(Path(self.source.path))
            elif self.source.repo is not None:
                self._files = self._hub.files(self.source)
            else:
                raise CheckpointUnavailable(
                    f"{self.source.name}: no path and no repository is known; give the claim a path"
                )
        return self._files
