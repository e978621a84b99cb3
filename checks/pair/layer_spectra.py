"""Singular values of a model's attention products, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from checks.checkpoint.canonical import CanonicalModel, latent_key_value, latent_query
from checks.checkpoint.template import component_config, stated_count

if TYPE_CHECKING:
    from torch import Tensor

    from checks.statistics.spectrum import SpectrumComparison


def layer_spectra(model: CanonicalModel, config: Mapping[str, Any]) -> list[Tensor]:
    """`spectrum_features` of every layer with attention, in order; norms folded, so that no basis hides in them.

    Heads come from config.json; where it does not state them, or rows do not divide, all rows count as one head.
    Multi-head latent attention: the products that make queries and keys and values of the residual stream, as one head.
    Raises CheckpointUnavailable.
    """
    found = [model.once(layer_spectrum, layer, *_heads(model, config)) for layer in model.layers]
    return [features for features in found if features is not None]


def visit_spectra(model: CanonicalModel, layer: int | None, config: Mapping[str, Any]) -> None:
    """Takes what `layer_spectra` wants of a layer while it is at hand."""
    if layer is not None:
        model.once(layer_spectrum, layer, *_heads(model, config))


def layer_spectrum(model: CanonicalModel, layer: int, heads: int, key_heads: int) -> Tensor | None:
    """`spectrum_features` of one layer; None without attention that is read here."""
    from checks.statistics.spectrum import attention_spectrum, product_singular_values, spectrum_features

    if all(model.has(part, layer) for part in ("q_a", "q_b", "kv_a", "kv_b")):
        products = [latent_query(model, layer), latent_key_value(model, layer)]
        return spectrum_features(*(_own_singular_values(product) for product in products))
    if not all(model.has(part, layer) for part in ("q", "k", "v", "o")):
        return None
    q, k, v, o = (model.folded(part, layer) for part in ("q", "k", "v", "o"))
    fits = heads > 0 and key_heads > 0 and heads % key_heads == 0
    fits = fits and all(side.shape[0] % heads == 0 for side in (q, o.T))
    fits = fits and all(side.shape[0] % key_heads == 0 for side in (k, v))
    fits = fits and q.shape[0] // heads == k.shape[0] // key_heads
    fits = fits and o.shape[1] // heads == v.shape[0] // key_heads
    if fits:
        return spectrum_features(
            attention_spectrum(q, k, heads, key_heads), attention_spectrum(o.T, v, heads, key_heads)
        )
    if q.shape == k.shape and o.T.shape == v.shape:
        return spectrum_features(product_singular_values(q, k), product_singular_values(o.T, v))
    return None


def _heads(model: CanonicalModel, config: Mapping[str, Any]) -> tuple[int, int]:
    """Heads of queries and of keys that config.json states; 0 where it does not."""
    own = component_config(config, model.component) or config
    heads = stated_count(own, "heads", 0)
    return heads, stated_count(own, "key_heads", heads)


def compare_layer_spectra(
    candidate: tuple[CanonicalModel, Mapping[str, Any]], reference: tuple[CanonicalModel, Mapping[str, Any]]
) -> SpectrumComparison:
    """The spectra of two models (each with its config.json) over depth. Raises CheckpointUnavailable."""
    from checks.statistics.spectrum import compare_spectra

    return compare_spectra(layer_spectra(*candidate), layer_spectra(*reference))


def _own_singular_values(matrix: Tensor) -> Tensor:
    import torch

    small = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    squares: Tensor = torch.linalg.eigvalsh(small.double() @ small.double().T)
    return squares.clamp(min=0).sqrt().flip(0)
