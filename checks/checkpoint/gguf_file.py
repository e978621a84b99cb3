"""A GGUF file as a checkpoint: its tensors under the names of the original checkpoint, dequantised by the gguf library.

llama.cpp's converter renames tensors, stacks the experts of a layer and changes a few values; all of that is undone
here, so that a GGUF file compares with the checkpoint that it was made from. Only architectures are read whose changes
are known: for these transformers 5.23 (modeling_gguf_pytorch_utils.py) gives the same tensors, which is tested.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.gguf_header import check_gguf_header
from checks.checkpoint.header import LONGEST_NAME
from checks.checkpoint.index import is_plain_text, shown
from checks.checkpoint.opened_file import OpenedFile
from checks.checkpoint.roles import Role, role_of
from checks.checkpoint.template import LARGEST_COUNT, RoleAssignment, assign_roles, follows_template

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Change = Callable[["np.ndarray[Any, Any]"], "np.ndarray[Any, Any]"]

# general.architecture → model type; "llama" is also what Mistral and Mixtral are called.
MODEL_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen2moe": "qwen2_moe",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "gpt2": "gpt2",
    "phi3": "phi3",
}
_SIZES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "expert_count": "num_experts",
}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a GGUF file under its original name. Its values are given as float32."""

    name: str
    stored: Any  # of the gguf library
    expert: int | None  # which matrix of the stack that is stored
    shape: tuple[int, ...]
    role: Role
    dtype: str = "F32"

    @property
    def stored_name(self) -> str:
        """Its name in the file."""
        return str(self.stored.name)


class GgufFile:
    """The tensors of one GGUF file. It stands where a Checkpoint does as source of a CanonicalModel.

    `opened`: the file of that path, if it is open already. This very file is read, whatever the path leads to later.
    Raises CheckpointUnavailable for a file that is damaged, split, or of an architecture that is not read, and without
    the library.
    """

    def __init__(self, path: Path, opened: OpenedFile | None = None) -> None:
        self.path = path
        try:
            import gguf
        except ImportError as error:
            raise CheckpointUnavailable(
                f"{path}: reading GGUF needs the gguf library: pip install 'from-scratch[gguf]'"
            ) from error
        self._library: Any = gguf
        self._opened = OpenedFile(path) if opened is None else opened
        try:
            with self._opened.binary() as file:
                check_gguf_header(path, file)
                self._reader = self._library.GGUFReader(file)  # numpy maps an open file as well as one that is named
            self.architecture = str(self._field("general.architecture"))
            split = self._field("split.count")
        except (ValueError, KeyError, IndexError, TypeError, OverflowError, OSError) as error:
            raise CheckpointUnavailable(f"{path}: is no GGUF file that can be read ({error})") from error
        if isinstance(split, int) and split > 1:
            raise CheckpointUnavailable(f"{path}: one of {split} parts; join them with `llama-gguf-split --merge`")
        if self.architecture not in MODEL_TYPES:
            raise CheckpointUnavailable(
                f"{path}: what GGUF changes in {self.architecture[:80]!r} models is not known here, only in "
                f"{', '.join(sorted(MODEL_TYPES))}; give the safetensors checkpoint"
            )
        self.config: Mapping[str, Any] = self._config()
        named: dict[str, tuple[Any, int | None]] = {}
        for name, stored in self._named():
            if name in named or not is_plain_text(name, LONGEST_NAME):
                raise CheckpointUnavailable(
                    f"{path}: {shown(name)} is no name of a tensor, or stands for two; download the file again"
                )
            named[name] = stored
        shapes = {name: self._shape(stored, expert) for name, (stored, expert) in named.items()}
        self.roles: RoleAssignment = assign_roles(shapes, self.config)
        self.tensors: Mapping[str, GgufTensor] = {
            name: GgufTensor(name, stored, expert, shapes[name], self.roles.roles.get(name) or role_of(name))
            for name, (stored, expert) in named.items()
        }

    @property
    def where(self) -> str:
        """The file, for people."""
        return str(self.path)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """One tensor as float32 with its original values, or rows of it. Raises CheckpointUnavailable."""
        self._opened.require_whole()
        import numpy as np
        import torch

        tensor = self.tensors[name]
        restore, block = self._changes(tensor)
        data: np.ndarray[Any, Any] = tensor.stored.data if tensor.expert is None else tensor.stored.data[tensor.expert]
        if rows is not None and block is not None and data.ndim == len(tensor.shape):
            first, last, _ = rows.indices(tensor.shape[0])
            begin, last = first // block * block, max(first, last)
            data, rows = data[begin : -(-last // block) * block], slice(first - begin, last - begin)
        try:
            values = self._library.dequantize(np.ascontiguousarray(data), tensor.stored.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise CheckpointUnavailable(
                f"{self.path}: {tensor.stored_name} is stored as {tensor.stored.tensor_type.name}, which the gguf "
                f"library does not read ({error})"
            ) from error
        values = np.array(values, dtype=np.float32)  # a copy: plain floats are a view of the file
        found = torch.from_numpy(values if restore is None else np.ascontiguousarray(restore(values)))
        found = found.reshape(-1, *tensor.shape[1:])
        return found if rows is None else found[rows]

    def _field(self, key: str) -> Any:
        found = self._reader.fields.get(key)
        return None if found is None else found.contents()

    def _config(self) -> dict[str, Any]:
        """What config.json would say, as far as roles and layouts need it."""
        found: dict[str, Any] = {"model_type": MODEL_TYPES[self.architecture]}
        for key, name in _SIZES.items():
            value = self._field(f"{self.architecture}.{key}")
            if type(value) is int and 0 <= value <= 2**31:
                found[name] = value
        if self.architecture == "llama" and found.get("num_experts"):
            found["model_type"] = "mixtral"
        found["tie_word_embeddings"] = all(one.name != "output.weight" for one in self._reader.tensors)
        return found

    def _named(self) -> Iterator[tuple[str, tuple[Any, int | None]]]:
        """Every tensor under its original name; one that has none keeps its own."""
        is_known = follows_template(self.config)
        for stored in self._reader.tensors:
            steps = stored.name.split(".")
            layer = steps[1] if steps[0] == "blk" and len(steps) > 2 else None
            base = ".".join(["blk", "0", *steps[2:]] if layer else steps)
            module, _, leaf = base.rpartition(".")
            for original in self._originals.get(module, ()):
                name = f"{original.replace('.0.', f'.{layer}.', 1) if layer else original}.{leaf}"
                if is_known(name):
                    yield name, (stored, None)
                    break
                front, middle, back = name.partition(".experts.")
                if middle and len(stored.shape) == 3 and is_known(f"{front}.experts.0.{back}"):
                    for expert in range(min(int(stored.shape[2]), LARGEST_COUNT)):
                        yield f"{front}.experts.{expert}.{back}", (stored, expert)
                    break
            else:
                yield str(stored.name), (stored, None)

    @cached_property
    def _originals(self) -> Mapping[str, list[str]]:
        """The names that a module of layer 0 may have had, by its name in GGUF."""
        architectures = {name: key for key, name in self._library.MODEL_ARCH_NAMES.items()}
        found: dict[str, list[str]] = {}
        for original, (_, name) in self._library.get_tensor_name_map(
            architectures[self.architecture], 1
        ).mapping.items():
            found.setdefault(name, []).append(original)
        return found

    def _changes(self, tensor: GgufTensor) -> tuple[Change | None, int | None]:
        """What gives a tensor's original values back (None where they are as they were), and how many rows of it have
        to be read together (None for all).
        """
        stored, heads = tensor.stored_name, self.config.get("num_attention_heads", 0)
        if self.architecture == "llama" and (".attn_q." in stored or ".attn_k." in stored):
            count = heads if ".attn_q." in stored else self.config.get("num_key_value_heads", heads)
            half = tensor.shape[0] // (2 * count) if count else 0
            if not half or tensor.shape[0] % (2 * count):
                raise CheckpointUnavailable(f"{self.path}: {stored} {list(tensor.shape)} does not fit {count} heads")
            # Rotated rows stand in pairs; in the original the first halves of a head precede the second ones.
            return lambda values: values.reshape(-1, half, 2, *values.shape[1:]).swapaxes(1, 2), 2 * half
        if self.architecture.startswith("gemma") and stored.endswith("norm.weight"):
            return lambda values: values - 1, 1
        if self._is_turned(stored):
            return lambda values: values.T, None
        return None, 1

    def _is_turned(self, stored: str) -> bool:
        """Is a matrix [out, in] here and [in, out] in the original?"""
        turned = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")
        return self.architecture == "gpt2" and stored.endswith(turned)

    def _shape(self, stored: Any, expert: int | None) -> tuple[int, ...]:
        """A tensor's original shape; GGUF counts dimensions from the last one."""
        shape = tuple(int(size) for size in reversed(stored.shape.tolist()))
        shape = shape if expert is None else shape[1:]
        if stored.name.endswith("ffn_gate_inp_shexp.weight") and len(shape) == 1:
            return (1, *shape)
        return shape[::-1] if self._is_turned(stored.name) else shape
