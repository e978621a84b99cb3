"""Which tensors of a checkpoint make up one weight, and its values as float32, whatever format they are stored in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.roles import Role
from checks.checkpoint.template import RoleAssignment

if TYPE_CHECKING:
    from torch import Tensor

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_EIGHT_BITS = frozenset({"F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "I8"})
_UNREAD = "which is not read here: give an unquantised release, or one in FP8, compressed-tensors, GPTQ, AWQ or MXFP4"


class StoredTensor(Protocol):
    """What is known of a tensor from its header."""

    @property
    def role(self) -> Role:
        """What it is."""

    @property
    def dtype(self) -> str:
        """Its safetensors dtype."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""


class TensorSource(Protocol):
    """A checkpoint as far as its canonical form needs it: Checkpoint, or GgufFile."""

    @property
    def where(self) -> str:
        """Where it lies, for people."""

    @property
    def config(self) -> Mapping[str, Any]:
        """Its config.json."""

    @property
    def roles(self) -> RoleAssignment:
        """The roles of all tensors."""

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Every tensor by its name."""

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """One tensor, or the rows of it, on the CPU in its stored dtype. Raises CheckpointUnavailable."""


@dataclass(frozen=True)
class StoredWeight:
    """One weight as a checkpoint stores it: a plain tensor, or numbers of few bits with what belongs to them."""

    name: str  # of the tensor with the values
    form: str  # plain, scaled, packed, gptq, awq, mxfp4 or fp4
    shape: tuple[int, ...]  # of the values, from headers; the columns of a packed one may count its padding
    beside: Mapping[str, str] = field(default_factory=dict)  # weight_scale, zero_point, … → name of that tensor

    @property
    def has_plain_rows(self) -> bool:
        """Can a slice of the first axis be read by itself?"""
        return self.form in ("plain", "scaled", "mxfp4")

    @property
    def is_oriented(self) -> bool:
        """Are the values [..., out, in] whatever the model's own layout is?"""
        return self.form not in ("plain", "scaled")


def stored_weight(source: TensorSource, name: str) -> StoredWeight:
    """The weight whose values (or packed values) stand in tensor `name`, from headers alone.

    Raises CheckpointUnavailable for a format that is not read, or whose scales are not there.
    """
    tensor = source.tensors[name]
    shape, dtype = tensor.shape, tensor.dtype
    if dtype in FLOATS:
        return StoredWeight(name, "plain", shape)
    beside = _beside(source, name)
    leaf = name.rpartition(".")[2]
    if leaf == "qweight" and dtype == "I32" and {"qzeros", "scales"} <= beside.keys() and len(shape) == 2:
        bits, columns = _gptq_bits(source, name, beside), source.tensors[beside["scales"]].shape[1]
        if shape[1] == columns:
            return StoredWeight(name, "gptq", (columns, shape[0] * 32 // bits), beside)
        if shape[1] * 8 == columns:
            return StoredWeight(name, "awq", (columns, shape[0]), beside)
    elif leaf == "weight_packed" and dtype == "I32" and len(shape) == 2 and _has_shape(source, beside):
        return StoredWeight(name, "packed", (shape[0], shape[1] * 32 // _stated_bits(source, 4)), beside)
    elif dtype == "U8" and leaf.endswith("_blocks") and "scales" in beside and len(shape) > 2:
        return StoredWeight(name, "mxfp4", (*shape[:-2], shape[-2] * shape[-1] * 2), beside)
    elif dtype == "U8" and len(shape) == 2 and (leaf == "weight_packed" or "weight_scale_2" in beside):
        if "weight_scale" in beside:
            return StoredWeight(name, "fp4", (shape[0], shape[1] * 2), beside)
    elif dtype in _EIGHT_BITS and beside.keys() & {"weight_scale_inv", "weight_scale"}:
        return StoredWeight(name, "scaled", shape, beside)
    elif dtype in _EIGHT_BITS and dtype != "I8" and not _quantisation(source):
        return StoredWeight(name, "plain", shape)  # a model that was merely saved in 8 bits
    about = f"quantised by {_quantisation(source).get('quant_method', 'an unknown method')}"
    raise CheckpointUnavailable(
        f"{source.where}: {name} is {dtype} {list(shape)} beside {', '.join(sorted(beside)) or 'no scales'}, {about}, "
        f"{_UNREAD}"
    )


def read_weight(
    source: TensorSource, weight: StoredWeight, rows: slice | None = None, device: str = "cpu", widen: bool = True
) -> Tensor:
    """The values as a float32 tensor of their own on `device`; only `rows` of the first axis are read where possible.

    Without `widen` a plain weight keeps its stored type, for those who throw most of it away.
    Raises CheckpointUnavailable when the tensors cannot be read or do not fit each other.
    """
    direct = rows if weight.has_plain_rows else None
    read = _Reader(source, weight.beside, device)
    try:
        if weight.form == "plain":
            values = read(weight.name, direct)
            return values.float() if widen or values.element_size() == 1 else values
        values = _dequantised(source, weight, read, direct)
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        if type(error).__name__ == "OutOfMemoryError":  # of torch, which counts it as a RuntimeError
            raise
        shapes = ", ".join(f"{one} {list(source.tensors[one].shape)}" for one in (weight.name, *weight.beside.values()))
        raise CheckpointUnavailable(
            f"{source.where}: the tensors of a {weight.form} weight do not fit each other ({error}): {shapes}; "
            "the checkpoint is damaged, or in a variant of the format that is not read here"
        ) from error
    return values if rows is None or direct is not None else values[rows]


@dataclass(frozen=True)
class _Reader:
    """Reads tensors to a device, by name or by what they are to a weight."""

    source: TensorSource
    beside: Mapping[str, str]
    device: str

    def __call__(self, name: str, rows: slice | None = None) -> Tensor:
        return self.source.read(name, rows).to(self.device)

    def optional(self, key: str, rows: slice | None = None) -> Tensor | None:
        return self(self.beside[key], rows) if key in self.beside else None


def _dequantised(source: TensorSource, weight: StoredWeight, read: _Reader, rows: slice | None) -> Tensor:
    """The values of a weight that is not plain."""
    from checks.checkpoint import dequantise

    beside = weight.beside
    if weight.form == "scaled":
        key = "weight_scale_inv" if "weight_scale_inv" in beside else "weight_scale"
        # A grid with as many entries as there are rows is cut like them; one of blocks of rows is not.
        along = source.tensors[beside[key]].shape[:1] == weight.shape[:1]
        some = rows if along else None
        first, total = (rows.start, weight.shape[0]) if rows and not along and len(weight.shape) == 2 else (0, None)
        scale, zero_point = read(beside[key], some), read.optional("weight_zero_point", some)
        return dequantise.scaled(read(weight.name, rows), scale, zero_point, _block(source), first, total)
    if weight.form == "mxfp4":
        return dequantise.mxfp4(read(weight.name, rows), read(beside["scales"], rows))
    if weight.form == "fp4":
        values = dequantise.four_bit_floats(read(weight.name))
        scale = read(beside["weight_scale"])
        group = values.shape[1] // max(scale.shape[-1], 1)
        values = dequantise.scaled(values, scale, block=(1, group))
        if "weight_global_scale" in beside:
            return values / read(beside["weight_global_scale"]).float()
        return values * read(beside["weight_scale_2"]).float() if "weight_scale_2" in beside else values
    if weight.form == "packed":
        shape = [int(size) for size in read(beside["weight_shape"]).tolist()]
        packed = read(weight.name)
        if len(shape) != 2 or shape[0] != packed.shape[0]:
            raise ValueError(f"weight_shape says {shape}")
        bits = next(
            (one for one in (_stated_bits(source, 4), 4, 8, 2) if -(-shape[1] * one // 32) == packed.shape[1]), None
        )
        if bits is None or 32 % bits:
            raise ValueError(f"{shape[1]} columns are not packed with 2, 4 or 8 bits")
        zero_point, group_of = read.optional("weight_zero_point"), read.optional("weight_g_idx")
        return dequantise.pack_quantised(packed, read(beside["weight_scale"]), shape, bits, zero_point, group_of)
    qweight, qzeros, scales = read(weight.name), read(beside["qzeros"]), read(beside["scales"])
    if weight.form == "awq":
        return dequantise.awq(qweight, qzeros, scales)
    offset = 0 if _quantisation(source).get("checkpoint_format") == "gptq_v2" else 1
    return dequantise.gptq(
        qweight, qzeros, scales, read.optional("g_idx"), _gptq_bits(source, weight.name, beside), offset
    )


def _beside(source: TensorSource, name: str) -> dict[str, str]:
    """What stands beside a tensor, by the last step of its name; of a stack of experts as if it were a module."""
    from checks.checkpoint.template import load

    stem, dot, leaf = name.rpartition(".")
    known = load()[0]["companions"]
    found = {one: f"{stem}{dot}{one}" for one in known}
    if leaf.endswith("_blocks"):
        found = {"scales": name.removesuffix("_blocks") + "_scales"}
    elif leaf not in ("weight", "weight_packed", "qweight"):
        found = {one: name + one.removeprefix("weight") for one in known if one.startswith("weight_")}
    return {one: companion for one, companion in found.items() if companion in source.tensors}


def _has_shape(source: TensorSource, beside: Mapping[str, str]) -> bool:
    return {"weight_scale", "weight_shape"} <= beside.keys() and source.tensors[beside["weight_shape"]].shape == (2,)


def _quantisation(source: TensorSource) -> Mapping[str, Any]:
    """What config.json says of the quantisation."""
    for config in (source.config, source.config.get("text_config")):
        found = config.get("quantization_config") if isinstance(config, Mapping) else None
        if isinstance(found, Mapping):
            return found
    return {}


def _weight_settings(source: TensorSource) -> list[Mapping[str, Any]]:
    """The settings of each group of modules in a compressed-tensors configuration."""
    groups = _quantisation(source).get("config_groups")
    groups = groups.values() if isinstance(groups, Mapping) else ()
    weights = [one.get("weights") for one in groups if isinstance(one, Mapping)]
    return [one for one in weights if isinstance(one, Mapping)]


def _stated_bits(source: TensorSource, otherwise: int) -> int:
    stated = {one.get("num_bits") for one in _weight_settings(source)}
    only = stated.pop() if len(stated) == 1 else None
    return only if isinstance(only, int) and only in (2, 4, 8) else otherwise


def _block(source: TensorSource) -> tuple[int, int] | None:
    """The rows and columns that share a scale, as the configuration states them."""
    stated = [_quantisation(source).get("weight_block_size")]
    stated += [one.get("block_structure") for one in _weight_settings(source)]
    for one in stated:
        if isinstance(one, list) and len(one) == 2 and all(type(size) is int and size > 0 for size in one):
            return one[0], one[1]
    return None


def _gptq_bits(source: TensorSource, name: str, beside: Mapping[str, str]) -> int:
    """Bits of one value: zero points are packed as the weights are, and there is one to each scale."""
    zeros, scales = (source.tensors[beside[one]].shape for one in ("qzeros", "scales"))
    bits = zeros[-1] * 32 / scales[-1] if len(zeros) == len(scales) == 2 and scales[-1] else 0
    if bits not in (2, 3, 4, 8):
        raise CheckpointUnavailable(f"{source.where}: {name}: qzeros {list(zeros)} do not fit scales {list(scales)}")
    return int(bits)
