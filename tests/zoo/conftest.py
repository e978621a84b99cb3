"""Fixtures of the lineage zoo: tiny models that are not trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.zoo.build import prepare
from tests.zoo.weights import Weights, read_weights

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "mixtral": {"tie_word_embeddings": False, "num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Weights]:
    """Makes random weights of a tiny model of a shape (llama, qwen2, mixtral), gains and biases random as well."""

    def make(shape: str, seed: int = 0, **changes: Any) -> Weights:
        prepare()
        config = AutoConfig.for_model(
            shape,
            **{
                "vocab_size": 96,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 3,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "max_position_embeddings": 64,
                **SHAPES[shape],
                **changes,
            },
        )
        directory = tmp_path_factory.mktemp("tiny")
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)  # type: ignore[no-untyped-call, unused-ignore]
        generator = torch.Generator().manual_seed(seed)

        def draw(name: str, tensor: torch.Tensor) -> torch.Tensor:
            noise = torch.randn(tensor.shape, generator=generator)
            return 1 + 0.2 * noise if name.endswith("norm.weight") else 0.2 * noise

        return read_weights(directory).map(draw)

    return make
