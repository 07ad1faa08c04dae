"""GGUF files for llama.cpp and Ollama."""

from pronghorn.export.gguf.adapter import save_gguf_adapter
from pronghorn.export.gguf.save import save_gguf

__all__ = ["save_gguf", "save_gguf_adapter"]
