"""Embedding models: contrastive training of decoders and encoders, vectors of texts, sentence-transformers' folders."""

from pronghorn.embedding.config import EmbeddingConfig
from pronghorn.embedding.model import FastEmbeddingModel, embedder_of
from pronghorn.embedding.trainer import EmbeddingTrainer

__all__ = ["EmbeddingConfig", "EmbeddingTrainer", "FastEmbeddingModel", "embedder_of"]
