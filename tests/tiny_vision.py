"""Tiny random models for images and text of real Transformers classes, and batches with images for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from tests.tiny import RECURRENT_SIZES, TINY, tiny_tokenizer

MODELS: dict[str, tuple[type, type]] = {
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
    "gemma3": (Gemma3Config, Gemma3ForConditionalGeneration),
}

#: with linear attention in the text part: `tests.families.test_hybrid` holds it to a bound of its own
HYBRIDS: dict[str, tuple[type, type]] = {
    "qwen3_5": (Qwen3_5Config, Qwen3_5ForConditionalGeneration),
    "qwen3_5_moe": (Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration),
}

#: ids of the tokens that `tiny_processor` adds to `tests.tiny.tiny_tokenizer`'s 320
VISION_START, VISION_END, IMAGE, VIDEO = 320, 321, 322, 323
_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]

_TEXT = {**{name: value for name, value in TINY.items() if name != "tie_word_embeddings"}, "vocab_size": 328}
_TOWER = {"hidden_size": 32, "depth": 2, "num_heads": 2, "patch_size": 4, "out_hidden_size": 64}
_QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
#: four tokens an image of 16 x 16 pixels
_SIGLIP = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4, "vision_use_head": False,
}  # fmt: skip


def _mrope(section: Sequence[int]) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [*section]}}


def tiny_vision_config(kind: str, **text: Any) -> Any:
    """The config of `tiny_vision_model`; keyword arguments override those of the text part."""
    if kind == "qwen2_vl":
        sizes = {
            "embed_dim": 32,
            "hidden_size": 64,
            "depth": 2,
            "num_heads": 2,
            "patch_size": 4,
            "mlp_ratio": 2,
        }
        return Qwen2VLConfig(
            text_config={**_TEXT, **_mrope((2, 3, 3)), **text}, vision_config=sizes, **_QWEN_IDS
        )
    if kind == "qwen2_5_vl":
        tower = {**_TOWER, "intermediate_size": 48, "window_size": 16, "fullatt_block_indexes": [1]}
        return Qwen2_5_VLConfig(
            text_config={**_TEXT, **_mrope((2, 3, 3)), **text}, vision_config=tower, **_QWEN_IDS
        )
    if kind == "qwen3_vl":
        tower = {
            **_TOWER, "intermediate_size": 48, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
        }  # fmt: skip
        return Qwen3VLConfig(
            text_config={**_TEXT, "num_hidden_layers": 3, **_mrope((4, 2, 2)), **text},
            vision_config=tower,
            **_QWEN_IDS,
        )
    if kind in HYBRIDS:
        experts = {
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 128,
        }  # fmt: skip
        sizes = RECURRENT_SIZES if kind == "qwen3_5" else {**RECURRENT_SIZES, **experts}
        text_config = {**_TEXT, **sizes, **_mrope((2, 1, 1)), **text}
        text_config["rope_parameters"]["partial_rotary_factor"] = 0.5
        tower = {**_TOWER, "intermediate_size": 48, "num_position_embeddings": 64}
        return HYBRIDS[kind][0](text_config=text_config, vision_config=tower, **_QWEN_IDS)
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}
    return Gemma3Config(
        text_config={**_TEXT, **layers, "query_pre_attn_scalar": 24, **text},
        vision_config=_SIGLIP,
        mm_tokens_per_image=4,
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )


def tiny_vision_model(kind: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **text: Any) -> Any:
    """A random model, in eval mode, with weights larger than Transformers' own, so that a wrong formula shows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (MODELS | HYBRIDS)[kind][1](tiny_vision_config(kind, **text))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("norm.weight") and "language_model" in name:
                    parameter.uniform_(0.5, 1.5).sub_(1.0 if kind == "gemma3" else 0.0)
                elif name.endswith("bias"):
                    parameter.normal_(0.0, 0.1)
                elif "norm" not in name:
                    parameter.normal_(0.0, 0.08)
    return model.to(dtype).eval()


class QwenProcessor(Qwen2_5_VLProcessor):
    """Transformers' own without the part for videos, which needs torchvision."""

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None, **kwargs: Any
    ) -> None:
        self.image_token, self.image_token_id = _TOKENS[2], IMAGE
        self.video_token, self.video_token_id = _TOKENS[3], VIDEO
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class _Registered(PretrainedConfig):
    model_type = "tiny_qwen_processor"


# `AutoProcessor` finds a class by the name in a checkpoint among those that are registered.
AutoProcessor.register(_Registered, QwenProcessor, exist_ok=True)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_processor(kind: str) -> Any:
    """A processor of the model's kind: images of at most 16 tokens (Gemma 3: 4)."""
    tokenizer = tiny_tokenizer(False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *_TOKENS]})
    if kind == "gemma3":
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer,
            pad_token="<|pad|>",
            bos_token="<|begin|>",
            eos_token="<|end|>",
            extra_special_tokens={
                "boi_token": _TOKENS[0],
                "eoi_token": _TOKENS[1],
                "image_token": _TOKENS[2],
            },
        )
        images = Gemma3ImageProcessorPil(size={"height": 16, "width": 16}, do_pan_and_scan=False)
        template = CHAT_TEMPLATE.replace("IMAGE", _TOKENS[0])
        return Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=4)
    sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    images = Qwen2VLImageProcessorPil(min_pixels=64, max_pixels=1024, **sizes)
    return QwenProcessor(
        images, tokenizer, CHAT_TEMPLATE.replace("IMAGE", "".join([_TOKENS[0], _TOKENS[2], _TOKENS[1]]))
    )


def tiny_llava() -> Any:
    """A model of a kind that no family file covers."""
    tower = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    config = LlavaConfig(
        text_config=LlamaConfig(**_TEXT),
        vision_config=tower,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlavaForConditionalGeneration(config).eval()


def tiny_llava_processor() -> Any:
    """Four tokens an image."""
    tokenizer = tiny_tokenizer(False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *_TOKENS]})
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", image_token=_TOKENS[2],
        chat_template=CHAT_TEMPLATE.replace("IMAGE", _TOKENS[2]), num_additional_image_tokens=1,
    )  # fmt: skip


def tiny_image(width: int = 24, height: int = 16, seed: int = 0) -> Any:
    """A random picture."""
    pixels = torch.randint(
        0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    return Image.fromarray(pixels.numpy())


def chat_rows() -> list[dict[str, Any]]:
    """Rows of one image, of two, and of none, as scripts have them."""

    def row(question: list[Any], answer: str) -> dict[str, Any]:
        parts = [
            {"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p}
            for p in question
        ]
        said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        return {"messages": [{"role": "user", "content": parts}, said]}

    return [
        row([tiny_image(), "What does it eat?"], "Grass."),
        row(["This", tiny_image(16, 16, 1), "or", tiny_image(32, 16, 2), "?"], "The fastest."),
        row(["No picture."], "A pronghorn."),
    ]


def save_tiny_vision(path: str | Path, kind: str, **text: Any) -> Path:
    """Write a tiny checkpoint with its processor to `path` and return it."""
    tiny_vision_model(kind, **text).save_pretrained(path)
    tiny_processor(kind).save_pretrained(path)
    return Path(path)


def vision_batch(
    kind: str, rows: Sequence[Sequence[int | tuple[int, int]]], *, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Padded rows with images, as a processor makes them: a row is of numbers of text tokens and of images, by their
    height and width in tokens (2 x 2 for Gemma 3). A third of the text tokens are unsupervised."""
    generator = torch.Generator().manual_seed(5)
    ids, kinds, pixels, grids = [], [], [], []
    for row in rows:
        tokens, types = [], []
        for part in row:
            if isinstance(part, int):
                tokens += torch.randint(5, 300, (part,), generator=generator).tolist()
                types += [0] * part
                continue
            count = part[0] * part[1]
            tokens += [VISION_START, *[IMAGE] * count, VISION_END]
            types += [0, *[1] * count, 0]
            shape = (3, 16, 16) if kind == "gemma3" else (4 * count, 3 * 2 * 4 * 4)
            pixels.append(torch.randn(shape, generator=generator, dtype=dtype))
            grids.append((1, 2 * part[0], 2 * part[1]))
        ids.append(tokens)
        kinds.append(types)
    width = max(map(len, ids))
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
    input_ids = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    types = torch.tensor([row + [0] * (width - len(row)) for row in kinds])
    dropped = torch.rand(input_ids.shape, generator=generator) < 0.33
    labels = input_ids.masked_fill(dropped | (mask == 0) | (input_ids >= VISION_START), -100)
    labels[:, 0] = -100
    batch = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
    batch["token_type_ids" if kind == "gemma3" else "mm_token_type_ids"] = types
    if pixels:
        batch["pixel_values"] = torch.stack(pixels) if kind == "gemma3" else torch.cat(pixels)
        if kind != "gemma3":
            batch["image_grid_thw"] = torch.tensor(grids)
    return batch
