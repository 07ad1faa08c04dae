"""Rows with images to batches: what they may look like, what is trained on, and what is refused."""

import base64
import io

import pytest
import torch
from datasets import Dataset

pytest.importorskip("PIL")

from PIL import Image

from pronghorn import VisionDataCollator
from pronghorn.data.budgets import Budgets
from pronghorn.data.images import has_images, messages_and_images, open_image
from pronghorn.data.rows import IGNORED
from pronghorn.engine import bind
from pronghorn.errors import (
    ImageUnreadable,
    NothingSupervised,
    RowInvalid,
    SequenceTooLong,
    TokenizerProblem,
)
from tests.tiny import tiny_tokenizer
from tests.tiny_vision import (
    IMAGE,
    VISION_END,
    VISION_START,
    chat_rows,
    tiny_image,
    tiny_processor,
    tiny_vision_model,
)

KINDS = ("qwen2_5_vl", "gemma3")


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def stock(kind):
    return tiny_vision_model(kind)


@pytest.fixture(scope="module")
def bound(kind):
    model = tiny_vision_model(kind)
    bind(model, strict=True)
    return model


@pytest.fixture(scope="module")
def processor(kind):
    return tiny_processor(kind)


def test_rows_are_what_the_processor_makes_of_each(kind, stock, processor):
    rows = chat_rows()
    batch = VisionDataCollator(stock, processor)(rows)
    for index, row in enumerate(rows):
        images = [part["image"] for part in row["messages"][0]["content"] if part["type"] == "image"]
        text = processor.apply_chat_template(row["messages"])
        alone = processor(
            text=[text], images=[images] if images else None, add_special_tokens=False, return_tensors="pt"
        )
        kept = batch["attention_mask"][index].bool()
        assert torch.equal(batch["input_ids"][index, kept], alone["input_ids"][0])
        labels, ids = batch["labels"][index], batch["input_ids"][index]
        of_images = (ids == IMAGE) | (ids == VISION_START) | (ids == VISION_END)
        assert torch.equal(labels != IGNORED, kept & ~of_images)
        assert torch.equal(labels[labels != IGNORED], ids[labels != IGNORED])
    assert batch["real_tokens"] == int(batch["attention_mask"].sum())


def test_a_stream_holds_the_same(stock, bound, processor):
    rows = chat_rows()
    padded, stream = (VisionDataCollator(model, processor)(rows) for model in (stock, bound))
    kept = padded["attention_mask"].bool()
    lengths = kept.sum(1).tolist()
    assert list(stream["document_lengths"]) == lengths and stream["max_length_q"] == max(lengths)
    assert torch.equal(stream["input_ids"][0], padded["input_ids"][kept])
    assert torch.equal(stream["pixel_values"], padded["pixel_values"])
    labels = padded["labels"].clone()
    labels[:, 0] = IGNORED  # nothing predicts a document's first token
    assert torch.equal(stream["labels"][0], labels[kept])
    assert torch.equal(stream["loss_rows"] + 1, (stream["labels"][0] != IGNORED).nonzero().squeeze(1))
    places = torch.cat([torch.arange(n) for n in lengths])
    positions = stream["position_ids"]
    assert torch.equal(positions.reshape(-1, positions.shape[-1])[0], places)
    if positions.dim() == 3:  # an image is as far as it is high or wide, not as many places as it has tokens
        assert positions.shape[0] == 4 and positions[1:, 0, lengths[0] - 1].max() < lengths[0] - 1


def test_batches_without_images_are_those_of_text(bound, processor):
    collator = VisionDataCollator(bound, processor)
    collator.budgets = Budgets(None)
    batch = collator([chat_rows()[2]])
    assert set(batch) <= {
        "input_ids", "labels", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
        "loss_rows", "document_lengths", "supervised", "real_tokens",
    }  # fmt: skip
    assert batch["input_ids"].shape[1] % 128 == 0 and batch["position_ids"].dim() == 2


def test_answers_alone(bound, processor):
    batch = VisionDataCollator(bound, processor, responses_only=True)(chat_rows())
    said = processor.tokenizer.decode(batch["labels"][batch["labels"] != IGNORED])
    assert said == "Grass.<|im_end|>The fastest.<|im_end|>A pronghorn.<|im_end|>"
    assert batch["supervised"] == int((batch["labels"] != IGNORED).sum())


def test_every_way_to_give_an_image(tmp_path):
    image = tiny_image()
    file = io.BytesIO()
    image.save(file, "PNG")
    (tmp_path / "a.png").write_bytes(file.getvalue())
    uri = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    ways = [
        image, str(tmp_path / "a.png"), tmp_path / "a.png", file.getvalue(), {"bytes": file.getvalue(), "path": None},
        uri, torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(16, 24, 3).numpy(),
    ]  # fmt: skip
    assert all(open_image(way).tobytes() == image.tobytes() for way in ways)
    question = {"type": "text", "text": "?"}
    by_address = {"type": "image_url", "image_url": {"url": uri}}
    for row in (
        {"messages": [{"role": "user", "content": [{"type": "image", "image": image}, question]}]},
        {"conversations": [{"from": "human", "content": [by_address, question]}]},
        {"messages": [{"role": "user", "content": [{"type": "image"}, question]}], "images": [image]},
        {
            "prompt": [{"role": "user", "content": [{"type": "image"}, question]}],
            "completion": [],
            "image": image,
        },
        [{"role": "user", "content": [{"type": "image", "image": image, "text": None}, "?"]}],
    ):
        messages, images = messages_and_images(row)
        assert messages == [{"role": "user", "content": [{"type": "image"}, question]}]
        assert open_image(images[0]).tobytes() == image.tobytes()
        assert isinstance(row, list) or has_images(row)
    assert not has_images({"messages": [{"role": "user", "content": [question]}]}) and not has_images("text")


def test_rows_of_a_table(bound, processor):
    """Where every part has every key, and images are files' bytes."""
    file = io.BytesIO()
    tiny_image().save(file, "PNG")
    row = chat_rows()[0]
    row["messages"][0]["content"][0]["image"] = {"bytes": file.getvalue(), "path": None}
    row["messages"][0]["content"][0]["text"] = None
    table = Dataset.from_list([row])
    ours, given = (VisionDataCollator(bound, processor)(rows) for rows in ([table[0]], chat_rows()[:1]))
    assert torch.equal(ours["input_ids"], given["input_ids"])
    assert torch.equal(ours["pixel_values"], given["pixel_values"])


def test_large_images_are_shrunk_and_long_rows_cut(bound, processor, kind):
    row = {
        "messages": [{"role": "user", "content": [{"type": "image", "image": tiny_image(64, 64)}, "a " * 40]}]
    }
    whole = VisionDataCollator(bound, processor)([row])
    small = VisionDataCollator(bound, processor, max_side=16)([row])
    fewer = {"qwen2_5_vl": 12, "gemma3": 0}[kind]
    assert whole["input_ids"].shape[1] - small["input_ids"].shape[1] == fewer
    cut = VisionDataCollator(bound, processor, max_length=40)([row])
    assert cut["input_ids"].shape[1] == 40 and torch.equal(cut["input_ids"], whole["input_ids"][:, :40])
    assert torch.equal(cut["pixel_values"], whole["pixel_values"])
    with pytest.raises(SequenceTooLong, match="goes beyond max_length=5"):
        VisionDataCollator(bound, processor, max_length=5)([row])


def test_what_is_refused(bound, processor, tmp_path):
    collator = VisionDataCollator(bound, processor)
    (tmp_path / "damaged.png").write_bytes(b"\x89PNG\r\n no picture")

    def asking(*parts):
        return [{"messages": [{"role": "user", "content": list(parts)}]}]

    picture = {"type": "image", "image": tiny_image()}
    for path in ("nowhere.png", str(tmp_path / "damaged.png")):
        with pytest.raises(ImageUnreadable, match=r"row 2 of the batch") as refusal:
            collator([chat_rows()[0], *asking({"type": "image", "image": path})])
        assert path in str(refusal.value)
    with pytest.raises(RowInvalid, match="1 image parts have no image of their own, and the row brings 0"):
        collator(asking({"type": "image"}, "?"))
    with pytest.raises(RowInvalid, match="2 places for an image"):
        collator(asking(picture, f"{processor.image_token} ?"))
    with pytest.raises(RowInvalid, match="no messages: it has question"):
        collator([{"question": "?"}])
    with pytest.raises(RowInvalid, match="'video'"):
        collator(asking({"type": "video", "video": "a.mp4"}))
    with pytest.raises(NothingSupervised):
        VisionDataCollator(bound, processor, responses_only=True)(asking(picture, "?"))
    with pytest.raises(TokenizerProblem, match="reads no images"):
        VisionDataCollator(bound, tiny_tokenizer())


def test_a_row_may_be_made_first(bound, processor):
    picture = tiny_image()

    def row_of(sample):
        question = [{"type": "image", "image": sample["photo"]}, "?"]
        return {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": sample["says"]},
            ]
        }

    collator = VisionDataCollator(bound, processor, formatting_func=row_of)
    batch = collator([{"photo": picture, "says": "Grass."}])
    assert "Grass." in processor.tokenizer.decode(batch["input_ids"][0])
    assert isinstance(picture, Image.Image)
