"""GGUF files for llama.cpp and Ollama."""

from pronghorn.export.gguf.save import GgufExport, save_gguf

__all__ = ["GgufExport", "save_gguf"]
