"""Generating text from a loaded model: plain, streamed, and as a conversation."""

from pronghorn.inference.chat import Conversation, load_for_chat
from pronghorn.inference.generate import Sampling, generate

__all__ = ["Conversation", "Sampling", "generate", "load_for_chat"]
