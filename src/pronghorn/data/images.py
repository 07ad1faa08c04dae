"""Chat rows with images: messages as a processor's template takes them, and the pictures in their order."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from pronghorn.data.rows import CHAT_COLUMNS, as_message
from pronghorn.data.templates import Message
from pronghorn.errors import ImageUnreadable, RowInvalid

_IMAGE_COLUMNS = ("images", "image")
_EXAMPLE = "{'messages': [{'role': 'user', 'content': [{'type': 'image', 'image': ...}, ...]}, ...]}"


def has_images(row: Any) -> bool:
    """Whether a row brings pictures, in a column of its own or inside its messages."""
    if not isinstance(row, Mapping):
        return False
    if any(row.get(name) is not None for name in _IMAGE_COLUMNS):
        return True
    columns = (*CHAT_COLUMNS, "prompt", "completion")
    messages = [m for name in columns if isinstance(row.get(name), list) for m in row[name]]
    contents = [
        m["content"] for m in messages if isinstance(m, Mapping) and isinstance(m.get("content"), list)
    ]
    return any(
        _kind(part) == "image" for content in contents for part in content if isinstance(part, Mapping)
    )


def messages_and_images(row: Any) -> tuple[list[Message], list[Any]]:
    """The messages of a row, each image a part `{'type': 'image'}`, and what the images are made of, in their order.

    An image is given in its part or, for parts without one, in the row's column `images`.

    Raises:
        RowInvalid: the row has no messages, a part of another kind, or not as many images as places for them.
    """
    raw = _raw_messages(row)
    beside = _beside(row)
    messages, images, empty = [], [], 0
    for message in raw:
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, list):
            messages.append(as_message(message))
            continue
        parts = []
        for part in content:
            part, image = _part(part)
            parts.append(part)
            if part["type"] == "image":
                empty += image is None
                images.append(image)
        messages.append({**as_message({**message, "content": "-"}), "content": parts})
    if empty != len(beside):
        raise RowInvalid(
            f"{empty} image parts have no image of their own, and the row brings {len(beside)} beside the messages",
            fix="give each image in its part, {'type': 'image', 'image': ...}, or as many in the column 'images'",
        )
    waiting = iter(beside)
    return messages, [next(waiting) if image is None else image for image in images]


def _raw_messages(row: Any) -> list[Any]:
    if isinstance(row, list):
        return row
    if isinstance(row, Mapping):
        for name in CHAT_COLUMNS:
            if isinstance(row.get(name), list) and row[name]:
                return list(row[name])
        pair = row.get("prompt"), row.get("completion")
        if all(isinstance(part, list) for part in pair):
            return [*pair[0], *pair[1]]  # type: ignore[misc]
    found = (
        f"it has {', '.join(map(str, row))}" if isinstance(row, Mapping) else f"it is {type(row).__name__}"
    )
    raise RowInvalid(f"the row has no messages: {found}", fix=f"give rows such as {_EXAMPLE}")


def _beside(row: Any) -> list[Any]:
    """The images in a column of their own."""
    columns = (
        [row[name] for name in _IMAGE_COLUMNS if row.get(name) is not None]
        if isinstance(row, Mapping)
        else []
    )
    if not columns:
        return []
    return list(columns[0]) if isinstance(columns[0], list | tuple) else [columns[0]]


def _kind(part: Mapping[str, Any]) -> str:
    kind = part.get("type")
    if kind is None:
        kind = "image" if part.get("image") is not None else "text"
    return "image" if kind in ("image", "image_url") else str(kind)


def _part(part: Any) -> tuple[dict[str, Any], Any]:
    """A part of a message without empty keys (a table's rows have all keys), and its image."""
    if isinstance(part, str):
        return {"type": "text", "text": part}, None
    kind = _kind(part) if isinstance(part, Mapping) else type(part).__name__
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}, None
    if kind != "image":
        raise RowInvalid(
            f"a message has a part of type '{kind}' that is neither text nor an image",
            fix="give parts {'type': 'text', 'text': ...} and {'type': 'image', 'image': ...}",
        )
    image = next(
        (part[name] for name in ("image", "image_url", "url", "path") if part.get(name) is not None), None
    )
    if isinstance(image, Mapping) and "url" in image:
        image = image["url"]
    return {"type": "image"}, image


def open_image(source: Any, where: str = "") -> Any:
    """A picture in RGB from a PIL image, an array, a path, an address, a data URI, or a file's bytes (also as the
    dictionary that `datasets` keeps).

    Raises:
        ImageUnreadable: it cannot be opened.
    """
    from PIL import Image
    from transformers.image_utils import load_image

    try:
        if isinstance(source, Mapping):
            source = source["bytes"] if source.get("bytes") is not None else source["path"]
        if isinstance(source, bytes | bytearray):
            source = Image.open(io.BytesIO(source))
        elif hasattr(source, "__array__") and not isinstance(source, Image.Image):
            source = Image.fromarray(source.__array__())
        elif hasattr(source, "__fspath__"):
            source = source.__fspath__()
        return load_image(source)
    except Exception as error:  # Pillow, httpx and base64 raise classes of their own
        shown = f"'{source[:80]}'" if isinstance(source, str) else f"a {type(source).__name__}"
        raise ImageUnreadable(
            f"an image cannot be opened: {shown}: {' '.join(str(error).split())[:200] or type(error).__name__}",
            where=where,
            fix="check the path or the file; leave the row out where the picture is damaged",
        ) from error
