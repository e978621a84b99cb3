"""Fixtures of the suite's own tests: small checkpoints, claims about them, and judged cases."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import hypothesis
import pytest
import torch
import yaml
from filelock import FileLock
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from checks.catalog.architecture import from_config
from checks.checkpoint.model import Model
from checks.claim.discovery import discovered_checks
from checks.claim.model import ModelSource
from checks.evidence.judge import ContradictingEvidence, Judge, JudgeContext
from checks.evidence.record import Evidence
from checks.pair.forward_probes import forward_probes
from checks.pair.pair import Pair
from tests.claim_runs import INDEPENDENT, ExampleClaim
from tests.loopback_hub import LoopbackHub

hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("suite")

# As the plugin does; on a busy machine torch's threads wait for each other most of the time.
torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parents[1]
EXAMPLES = REPOSITORY / "examples" / "checkpoints"

Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test asks a hub on the internet, and waits for it; `hub` is one on this machine."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # for the processes that a test starts
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def loaded_once() -> None:
    """Loads what an in-process run of pytest would load, and forget: none of these can be loaded a second time."""
    for name in ("numpy.fft", "scipy.optimize", "scipy.special"):
        importlib.import_module(name)
    model = Model(ModelSource("base", path=str(EXAMPLES / "base")), None, ("",))
    pair = Pair(model, model)
    pair.comparison()  # numba's registries are loaded with the first compiled function
    forward_probes(model, model, pair.canonical)  # transformers loads its parts as they are used


@pytest.fixture
def pytester(loaded_once: None, pytester: pytest.Pytester) -> pytest.Pytester:
    """Runs pytest in this process, which has loaded before what such a run must not load."""
    return pytester


@pytest.fixture
def repository() -> Path:
    """The root of the repository."""
    return REPOSITORY


@pytest.fixture
def examples() -> Path:
    """The trained checkpoints of the repository: base, independent, derived."""
    return EXAMPLES


@pytest.fixture(scope="session")
def small_zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small half of the lineage zoo; a model's directory is `small_zoo / "llama_rotated"`. Takes half a minute."""
    from tests.zoo.build import build  # loads transformers

    # The workers of a run share it: one builds, the others wait and find nothing missing.
    shared = "PYTEST_XDIST_WORKER" in os.environ
    output = tmp_path_factory.getbasetemp().parent / "zoo" if shared else tmp_path_factory.mktemp("zoo")
    with FileLock(f"{output}.lock"):
        build(output, ("small",), quiet=True)
    torch.use_deterministic_algorithms(False)
    return output / "small"


@pytest.fixture
def base() -> Tensors:
    """The tensors of the base model."""
    return load_file(EXAMPLES / "base" / "model.safetensors")


@pytest.fixture
def independent() -> Tensors:
    """The tensors of the model that was trained independently of the base."""
    return load_file(EXAMPLES / "independent" / "model.safetensors")


@pytest.fixture
def llama_config() -> Callable[..., dict[str, Any]]:
    """Makes a small Llama configuration."""

    def make(**changes: Any) -> dict[str, Any]:
        config: dict[str, Any] = {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 64,
            "intermediate_size": 176,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": 256,
            "hidden_act": "silu",
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
        }
        return {**config, **changes}

    return make


@pytest.fixture
def llama_tensors(llama_config: Callable[..., dict[str, Any]]) -> Callable[..., Tensors]:
    """Makes random tensors with the names and shapes of a small Llama; one seed, one model."""

    def make(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Tensors:
        config = llama_config(**changes)
        generator = torch.Generator().manual_seed(seed)
        width, wide, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
        keys = config["num_key_value_heads"] * config["head_dim"]
        queries = config["num_attention_heads"] * config["head_dim"]

        def normal(*shape: int) -> torch.Tensor:
            return (0.02 * torch.randn(*shape, generator=generator)).to(dtype)

        def gains() -> torch.Tensor:
            return (1 + 0.05 * torch.randn(width, generator=generator)).to(dtype)

        tensors = {"model.embed_tokens.weight": normal(vocabulary, width), "model.norm.weight": gains()}
        tensors["lm_head.weight"] = normal(vocabulary, width)
        for layer in range(config["num_hidden_layers"]):
            start = f"model.layers.{layer}."
            tensors |= {
                f"{start}input_layernorm.weight": gains(),
                f"{start}post_attention_layernorm.weight": gains(),
                f"{start}self_attn.q_proj.weight": normal(queries, width),
                f"{start}self_attn.k_proj.weight": normal(keys, width),
                f"{start}self_attn.v_proj.weight": normal(keys, width),
                f"{start}self_attn.o_proj.weight": normal(width, queries),
                f"{start}mlp.gate_proj.weight": normal(wide, width),
                f"{start}mlp.up_proj.weight": normal(wide, width),
                f"{start}mlp.down_proj.weight": normal(width, wide),
            }
        return tensors

    return make


@pytest.fixture
def save_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Writes tensors as a checkpoint directory: one file, or `shards` files with an index."""

    def save(
        name: str, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None = None, shards: int = 1
    ) -> Path:
        directory = tmp_path / name
        directory.mkdir(parents=True, exist_ok=True)
        if config is not None:
            (directory / "config.json").write_text(json.dumps(config))
        contiguous = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}
        if shards == 1:
            save_file(contiguous, directory / "model.safetensors")
            return directory
        weight_map = {}
        for shard in range(shards):
            file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
            part = dict(list(contiguous.items())[shard::shards])
            save_file(part, directory / file)
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        return directory

    return save


@pytest.fixture
def open_pair(llama_config: Callable[..., dict[str, Any]]) -> Callable[..., Pair]:
    """Opens two checkpoint directories as a pair."""

    def source(path: Path) -> ModelSource:
        file = path / "config.json"
        architectures = from_config(json.loads(file.read_text())) if file.is_file() else {}
        return ModelSource(name=path.name, path=str(path), architectures=architectures)

    def make(candidate: Path, reference: Path, prefix: str = "", reference_prefix: str = "") -> Pair:
        return Pair(Model(source(candidate), None, (prefix,)), Model(source(reference), None, (reference_prefix,)))

    return make


@pytest.fixture
def judged() -> Callable[..., Evidence]:
    """Runs one check on a pair (or a candidate) and returns the evidence it recorded, whatever the outcome."""

    def run(check: str, subject: Any, calibrated_cases: int = 1, disclosed: bool = False, **arguments: Any) -> Evidence:
        context = JudgeContext(
            case_id=check,
            claim="test",
            place="claims/test.yaml:1",
            reference="reference",
            disclosed=disclosed,
            calibrated_cases=calibrated_cases,
        )
        judge = Judge(check, context)
        found = discovered_checks()[check]
        subjects = {"pair" if found.takes_pair else "candidate": subject}
        with contextlib.suppress(ContradictingEvidence, pytest.skip.Exception):
            found.function(**subjects, judge=judge, **arguments)
        assert judge.evidence is not None, f"{check} did not judge"
        return judge.evidence

    return run


@pytest.fixture
def write_claim(tmp_path: Path) -> Callable[..., Path]:
    """Writes a claim file: keyword arguments over a minimal claim, or text as it stands."""

    def write(text: str | None = None, name: str = "claim.yaml", **content: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        claim = {"claim": "test", "statement": "A model was trained from scratch.", "nearest": 0, **content}
        path.write_text(text if text is not None else yaml.safe_dump(claim, sort_keys=False), encoding="utf-8")
        return path

    return write


@pytest.fixture
def example(pytester: pytest.Pytester) -> Callable[..., Path]:
    """Writes a claim about the trained checkpoints, given as text."""

    def write(text: str = INDEPENDENT, name: str = "claims/small.yaml", **values: str) -> Path:
        path = pytester.path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text.format(**{"examples": str(EXAMPLES), "candidate": "independent", **values}))
        return path

    return write


@pytest.fixture
def example_claim(pytester: pytest.Pytester) -> ExampleClaim:
    """A claim of pytester's directory that is written and run."""
    return ExampleClaim(pytester)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    """A running loopback hub to which HF_ENDPOINT points, an empty hub cache, and no token."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", os.environ.get("NO_PROXY", "") + ",127.0.0.1")
    # huggingface_hub reads the environment when it is imported: in another process, such as a worker.
    home = tmp_path / "hf-home"
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    loopback = LoopbackHub()
    monkeypatch.setenv("HF_ENDPOINT", loopback.endpoint)
    huggingface_hub.close_session()
    yield loopback
    huggingface_hub.close_session()
    loopback.close()
