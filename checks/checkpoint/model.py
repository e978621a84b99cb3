"""One model of a pair: what is known without its weights, and its weights once something asks for them."""

from __future__ import annotations

from pathlib import Path

from checks.catalog import entry as catalog
from checks.catalog.architecture import Architecture
from checks.catalog.entry import CatalogEntry
from checks.checkpoint.checkpoint import Checkpoint
from checks.checkpoint.errors import CheckpointUnavailable
from checks.claim.model import ModelSource


class Model:
    """A candidate or a reference, or one component of it. Weights are opened on first use and a failure is kept."""

    def __init__(self, source: ModelSource, component: str | None, prefixes: tuple[str, ...]) -> None:
        self.source = source
        self.component = component
        self.prefixes = prefixes
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
                self._checkpoint = Checkpoint(locate(self.source), self.prefixes)
            except CheckpointUnavailable as error:
                self._checkpoint = error
        if isinstance(self._checkpoint, CheckpointUnavailable):
            raise CheckpointUnavailable(str(self._checkpoint))
        return self._checkpoint


def locate(source: ModelSource) -> Path:
    """The directory that holds a model's weights: the claim's path, or the local hub cache.

    Raises CheckpointUnavailable when neither has them; nothing is downloaded.
    """
    if source.path is not None:
        return Path(source.path)
    if source.repo is None:
        raise CheckpointUnavailable(f"{source.name}: no path and no repository is known; give the claim a path")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source.repo, revision=source.revision, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError) as error:
        at = f" --revision {source.revision}" if source.revision else ""
        raise CheckpointUnavailable(
            f"{source.name}: {source.where} is not in the local hub cache; fetch it with "
            f"`hf download {source.repo}{at} --include '*.safetensors*' --include config.json`, or give a path"
        ) from error
