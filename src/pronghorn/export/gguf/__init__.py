"""GGUF files for llama.cpp and Ollama."""

from pronghorn.export.gguf.adapter import save_gguf_adapter
from pronghorn.export.gguf.save import GgufExport, save_gguf

__all__ = ["GgufExport", "save_gguf", "save_gguf_adapter"]
