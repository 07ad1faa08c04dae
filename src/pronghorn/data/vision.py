"""Chat rows with images to one batch: rendered and tokenised by the model's own processor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pronghorn.data.answers import answer_finder
from pronghorn.data.budgets import Budgets
from pronghorn.data.collator import Collator
from pronghorn.data.images import messages_and_images, open_image
from pronghorn.data.rows import IGNORED
from pronghorn.data.templates import ChatRenderer
from pronghorn.engine import base_causal_lm, binding_of
from pronghorn.errors import NothingSupervised, PronghornError, RowInvalid, SequenceTooLong, TokenizerProblem

#: Where configs keep the ids of tokens that stand for images, or around them.
_IMAGE_TOKENS = (
    "image_token_id", "image_token_index", "video_token_id", "vision_start_token_id", "vision_end_token_id",
    "boi_token_index", "boi_token_id", "eoi_token_index", "eoi_token_id",
)  # fmt: skip
#: Tensors of a processor that have a number for each token; the others have one for each image or part of one.
_PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


def share_template(processor: Any) -> None:
    """Give a processor's tokenizer the chat template where only the processor has it: rows of text are rendered with
    the tokenizer's."""
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is not None and not getattr(tokenizer, "chat_template", None):
        tokenizer.chat_template = getattr(processor, "chat_template", None)


class VisionDataCollator:
    """Rows `{"messages": [...]}` with images to the batch that a model for images and text is trained on.

    A bound model gets one stream of documents without padding, any other one padded rows. Trained on are all tokens but
    those that stand for images; or the assistant's answers only.

    Args:
        model: the model, or the PEFT model around it.
        processor: its tokenizer and image processor in one, as `FastVisionModel.from_pretrained` gives it.
        max_length: longer rows are cut there, but not where an image follows; None takes the trainer's.
        responses_only: train on answers only, found by the chat template's own marks; or a function that says of each
            token id of a row whether it belongs to one.
        formatting_func: makes of a row one with messages.
        max_side: larger images are shrunk until neither side has more pixels, before the processor sees them.

    Raises:
        TokenizerProblem: the processor has no part for images, or no chat template.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        max_length: int | None = None,
        responses_only: bool | Callable[[Sequence[int]], list[bool]] = False,
        formatting_func: Callable[[Any], Any] | None = None,
        max_side: int | None = None,
    ) -> None:
        if getattr(processor, "image_processor", None) is None or not hasattr(processor, "tokenizer"):
            raise TokenizerProblem(
                f"{type(processor).__name__} reads no images: a processor is needed, not a tokenizer",
                fix="use what FastVisionModel.from_pretrained returned, or transformers.AutoProcessor",
            )
        self.model, self.processor = model, processor
        self.max_length, self.max_side = max_length, max_side
        self.formatting_func = formatting_func
        share_template(processor)
        self.renderer = ChatRenderer(
            processor.tokenizer, chat_template=getattr(processor, "chat_template", None)
        )
        _ = self.renderer.template  # or there is none
        self.find_answers = responses_only if callable(responses_only) else None
        if responses_only is True:
            self.find_answers = answer_finder(processor.tokenizer)
        #: what the trainer sets: whether a bound model gets one stream, and sizes that it is rounded up to
        self.flat = True
        self.budgets: Budgets | None = None
        found = (getattr(base_causal_lm(model).config, name, None) for name in _IMAGE_TOKENS)
        self._image_tokens = torch.tensor(sorted({int(token) for token in found if token is not None}))

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        read = [self._read(row, number) for number, row in enumerate(rows)]
        inputs = self._processed([text for text, _ in read], [images for _, images in read])
        labels = self._labels(inputs)
        binding = binding_of(self.model)
        if self.flat and binding is not None and binding.bound and binding.family.reads_images:
            return self._flat(inputs, labels)
        return {**inputs, "labels": labels, "real_tokens": int(inputs["attention_mask"].sum())}

    # --- rows ---------------------------------------------------------------------------------------------------

    def _read(self, row: Any, number: int) -> tuple[str, list[Any]]:
        """A row's text, with one mark for each image, and its images."""
        where = f"row {number + 1} of the batch"
        try:
            row = row if self.formatting_func is None else self.formatting_func(row)
            messages, sources = messages_and_images(row)
            text = self.renderer.text(messages)
        except RowInvalid as error:
            error.where = error.where or where
            raise
        mark = getattr(self.processor, "image_token", None)
        if mark is not None and text.count(mark) != len(sources):
            raise RowInvalid(
                f"the text has {text.count(mark)} places for an image ({mark}) and the row {len(sources)} images",
                where=where,
                fix=f"give each image as a part of a message, and leave '{mark}' out of texts",
            )
        return text, [self._shrunk(open_image(source, where)) for source in sources]

    def _shrunk(self, image: Any) -> Any:
        if self.max_side is not None and max(image.size) > self.max_side:
            image = image.copy()
            image.thumbnail((self.max_side, self.max_side))
        return image

    def _processed(self, texts: list[str], images: list[list[Any]]) -> dict[str, Tensor]:
        """The processor's tensors, padded on the right and cut to `max_length`."""
        try:
            inputs = self.processor(
                text=texts,
                images=images if any(images) else None,
                padding=True,
                padding_side="right",
                add_special_tokens=False,
                return_tensors="pt",
            )
        except PronghornError:
            raise
        except (ValueError, TypeError, IndexError, RuntimeError, StopIteration) as error:
            raise RowInvalid(
                f"the processor refuses a batch: {type(error).__name__}: {' '.join(str(error).split())[:300]}",
                fix="check the images and the chat template of these rows",
            ) from error
        return self._cut(dict(inputs))

    def _cut(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        ids, limit = inputs["input_ids"], self.max_length
        if limit is None or ids.shape[1] <= limit:
            return inputs
        beyond = torch.isin(ids[:, limit:], self._image_tokens) & inputs["attention_mask"][:, limit:].bool()
        if beyond.any():
            row = int(beyond.any(1).nonzero()[0])
            count = int(inputs["attention_mask"][row].sum())
            raise SequenceTooLong(
                f"an image goes beyond max_length={limit}: the row has {count} tokens",
                where=f"row {row + 1} of the batch",
                fix="raise max_length, or give smaller images (VisionDataCollator(..., max_side=512))",
            )
        return {n: x[:, :limit] if n in _PER_TOKEN else x for n, x in inputs.items()}

    # --- batches ------------------------------------------------------------------------------------------------

    def _labels(self, inputs: dict[str, Tensor]) -> Tensor:
        ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
        kept = real & ~torch.isin(ids, self._image_tokens)
        if self.find_answers is not None:
            for row, mine in enumerate(real):
                kept[row, mine] &= torch.tensor(self.find_answers(ids[row, mine].tolist()), dtype=torch.bool)
        labels = ids.masked_fill(~kept, IGNORED)
        if not (labels[:, 1:] != IGNORED).any():
            raise NothingSupervised(
                "no row of a batch has a token to train on",
                fix="check that the rows end with an answer of the assistant's within max_length",
            )
        return labels

    def _flat(self, inputs: dict[str, Tensor], labels: Tensor) -> dict[str, Any]:
        """One stream (`data.collator.Collator`); images and their shapes lie in the order of their tokens."""
        ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
        images = {n: x for n, x in inputs.items() if n not in _PER_TOKEN}
        stream = Collator(self.processor.tokenizer.pad_token_id, budgets=self.budgets)
        rows = zip(ids, labels, real, strict=True)
        batch = stream([{"input_ids": i[mine].numpy(), "labels": x[mine].numpy()} for i, x, mine in rows])
        if not images:
            return batch
        per_token = {n: inputs[n] for n in ("token_type_ids", "mm_token_type_ids") if n in inputs}
        wrapper = base_causal_lm(self.model).model
        if hasattr(wrapper, "get_rope_index"):
            kinds = {"mm_token_type_ids": per_token.pop("mm_token_type_ids", None)}
            grids = {n: x for n, x in images.items() if not n.startswith("pixel_values")}
            positions, _ = wrapper.get_rope_index(
                ids, attention_mask=inputs["attention_mask"], **kinds, **grids
            )
            # Transformers' order: the place in the document, then time, height and width; padding is text.
            places = batch["position_ids"]
            of_images = places.expand(positions.shape[0], -1).clone()
            of_images[:, : int(real.sum())] = positions[:, real]
            batch["position_ids"] = torch.cat([places, of_images])[:, None]
        filled = batch["input_ids"].shape[1]
        return {**batch, **images, **{n: _filled(x[real], filled) for n, x in per_token.items()}}


def _filled(types: Tensor, count: int) -> Tensor:
    """Types of tokens [1, count], text where there are no more."""
    return torch.nn.functional.pad(types, (0, count - types.shape[0]))[None]
