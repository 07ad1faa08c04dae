"""Chat templates by name, each checked against a tokenizer's special tokens before it is put on."""

from pronghorn.data.chat_templates.choose import get_chat_template
from pronghorn.data.chat_templates.compose import without_generation_blocks
from pronghorn.data.chat_templates.registry import TEMPLATES, ChatTemplate, find_template

__all__ = ["TEMPLATES", "ChatTemplate", "find_template", "get_chat_template", "without_generation_blocks"]
