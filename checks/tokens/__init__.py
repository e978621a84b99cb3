"""Vocabularies of tokenizers, read from the bytes of their files and brought to one form."""

from checks.tokens.files import read_vocabulary, vocabulary_of
from checks.tokens.vocabulary import Vocabulary, shared_tokens

__all__ = ["Vocabulary", "read_vocabulary", "shared_tokens", "vocabulary_of"]
