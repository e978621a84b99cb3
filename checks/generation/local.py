"""A checkpoint directory as a text model: transformers' own classes, greedy decoding, never code of the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from checks.checkpoint.index import shown
from checks.checkpoint.transformers_models import free_memory, quiet, transformers_library
from checks.generation.text_model import LocalModelUnavailable, NotOffered, bounded, kept

TOGETHER = 16  # texts of one length that run at once

# Weights, activations and the cache of a short text need little more than the weights.
MEMORY_FOR_WEIGHTS = 1.2

# What transformers raises over a checkpoint that it cannot run, beside what safetensors raises.
_FAILURES = (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError, MemoryError)


class LocalTextModel:
    """Runs a checkpoint with transformers. Nothing is padded: padding would change the last digits.

    directory: config.json, safetensors and tokenizer files. device: asked for when the model is loaded, since choosing
    imports torch.
    """

    def __init__(self, directory: Path, name: str, device: Callable[[], str] = lambda: "cpu") -> None:
        self.directory = directory
        self.name = name
        self._device = device
        self._model: Any = None
        self._tokenizer: Any = None

    @property
    def description(self) -> dict[str, Any]:
        """What answered and how it was asked."""
        return {"model": self.name, "runs": "locally, transformers", "decoding": "greedy"}

    def complete(self, text: str, tokens: int) -> str:
        """The greedy continuation of `text`. Raises LocalModelUnavailable."""
        return self.complete_all([text], tokens)[0]

    def complete_all(self, texts: Sequence[str], tokens: int) -> list[str]:
        """The greedy continuation of each text; those of equal length in tokens run together.

        The same texts make the same batches, so that copies of a model answer alike. Raises LocalModelUnavailable.
        """
        self._load()
        of_length: dict[int, list[int]] = {}
        with self._explained("its tokenizer cannot be used"):
            rows = [self._tokenizer(text)["input_ids"] for text in texts]
        for index, row in enumerate(rows):
            of_length.setdefault(len(row), []).append(index)
        answers = [""] * len(texts)
        for alike in of_length.values():
            for start in range(0, len(alike), TOGETHER):
                chosen = alike[start : start + TOGETHER]
                made = self._generate([rows[index] for index in chosen], tokens)
                for index, answer in zip(chosen, made, strict=True):
                    answers[index] = answer
        return answers

    def reply(self, message: str, tokens: int) -> str:
        """The greedy reply by the checkpoint's chat template. Raises NotOffered without one, LocalModelUnavailable."""
        self._load()
        if not self._tokenizer.chat_template:
            raise NotOffered(f"{self.name}: the tokenizer has no chat template, so that the model has no form of chat")
        with self._explained("its chat template cannot be used"):
            text = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": message}], add_generation_prompt=True, tokenize=False
            )
            ids = self._tokenizer(str(text), add_special_tokens=False)["input_ids"]
        return self._generate([ids], tokens)[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._model = self._tokenizer = None

    def _generate(self, rows: Sequence[Sequence[int]], tokens: int) -> list[str]:
        """The text that follows each row of token ids, all of one length."""
        import torch

        with self._explained("it cannot be run"), torch.inference_mode():
            ids = torch.tensor(rows, dtype=torch.long, device=self._model.device)
            if not ids.shape[1]:
                raise ValueError("the tokenizer makes no token of the prompt")
            made = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=bounded(tokens),
                do_sample=False,
                num_beams=1,
            )
            return [kept(str(self._tokenizer.decode(one, skip_special_tokens=True))) for one in made[:, ids.shape[1] :]]

    def _load(self) -> None:
        if self._model is not None:
            return
        if not (self.directory / "config.json").is_file() or not any(self.directory.glob("*.safetensors")):
            raise LocalModelUnavailable(
                f"{self.name}: {self.directory} has no config.json beside safetensors; behavior.model without an "
                "endpoint is a checkpoint directory"
            )
        device = self._device()
        with self._explained("transformers cannot load it"), quiet():
            self._require_memory(device)
            library = transformers_library()

            safe = {"trust_remote_code": False, "local_files_only": True}
            tokenizer = library.AutoTokenizer.from_pretrained(self.directory, **safe)
            model, loading = library.AutoModelForCausalLM.from_pretrained(
                self.directory, use_safetensors=True, dtype="auto", output_loading_info=True, **safe
            )
            # transformers fills gaps with random weights, whose answers would be nobody's.
            gaps = sorted(map(str, [*loading["missing_keys"], *loading["mismatched_keys"]]))
            if gaps:
                raise ValueError(f"{len(gaps)} weights are missing or of another shape, first {gaps[0]}")
            # Of the checkpoint's decoding only the end of text counts: penalties or sampling would hide the model.
            ends = model.generation_config.eos_token_id
            ends = ends if ends is not None else tokenizer.eos_token_id
            first = ends[0] if isinstance(ends, list) else ends
            pad = 0 if first is None else first
            model.generation_config = library.GenerationConfig(eos_token_id=ends, pad_token_id=pad)
            self._model = model.to(device).eval()
            self._tokenizer = tokenizer

    def _require_memory(self, device: str) -> None:
        wanted = MEMORY_FOR_WEIGHTS * sum(path.stat().st_size for path in self.directory.glob("*.safetensors"))
        free = free_memory(device)
        if free is not None and wanted > free:
            raise ValueError(
                f"its weights need about {wanted / 1e9:.1f} GB on {device} and {free / 1e9:.1f} GB are free; serve it "
                "elsewhere and give behavior.endpoint"
            )

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Failures of transformers as LocalModelUnavailable."""
        from jinja2 import TemplateError
        from safetensors import SafetensorError

        try:
            yield
        except (*_FAILURES, SafetensorError, TemplateError) as error:
            raise LocalModelUnavailable(
                f"{self.name}: {what} ({type(error).__name__}: {shown(str(error))}); serve it elsewhere and give "
                "behavior.endpoint, or leave out behavior"
            ) from error
