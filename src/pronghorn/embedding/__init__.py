"""Embedding models: contrastive training of decoders and encoders, vectors of texts, sentence-transformers' folders."""

from pronghorn.embedding.model import FastEmbeddingModel, embedder_of

__all__ = ["FastEmbeddingModel", "embedder_of"]
