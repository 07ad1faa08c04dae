"""Text parts of models for images and text: the bound model against Transformers and PEFT in fp64."""

import copy
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("PIL")

from pronghorn.blocks import LEVELS
from pronghorn.engine import bind, binding_of
from tests.families.parity import (
    TARGETS,
    add_adapter,
    assert_same,
    bound_copy,
    packed_batch,
    quantise_4bit,
    relative_error,
    run,
)
from tests.tiny_vision import IMAGE as IMAGE_TOKEN
from tests.tiny_vision import MODELS, tiny_vision_model, vision_batch

KINDS = sorted(MODELS)
#: as in test_parity.py: Transformers' norms and angles are fp32 whatever the model is
EXACT = 5e-6
IMAGE = (2, 2)
WIDE = (2, 3)
#: rows of text, of one image, of several, and without one among them
ROWS = {
    "text": [(9,), (14,)],
    "one-row": [(3, IMAGE, 6)],
    "images": [(3, IMAGE, 6), (2, IMAGE, 4, IMAGE, 5), (7,)],
}
TEXT_TARGETS = rf".*language_model.*\.({'|'.join(TARGETS)})"
#: every linear layer but the head, also of the tower
ALL_TARGETS = r".*(language_model|visual|vision_tower)\.(?!.*(embed|norm|patch|head|act)).*(proj|qkv|fc\d)"


def rows_of(kind, rows):
    """Qwen's images come in several shapes, Gemma's in one."""
    wide = [[WIDE if part == IMAGE and i else part for i, part in enumerate(row)] for row in rows]
    return vision_batch(kind, rows if kind == "gemma3" else wide, dtype=torch.float64)


def stream_of(model, batch):
    """The rows as one stream, with what the wrapper makes of them on the way: positions and token types."""
    kept = batch["attention_mask"].bool()
    stream = packed_batch(batch)
    if "token_type_ids" in batch:
        stream["token_type_ids"] = batch["token_type_ids"][kept][None]
    elif "pixel_values" in batch:
        names = ("image_grid_thw", "mm_token_type_ids", "attention_mask")
        wrapper = model.get_base_model().model
        positions, _ = wrapper.get_rope_index(batch["input_ids"], **{n: batch[n] for n in names})
        stream["position_ids"] = torch.cat([stream["position_ids"][None], positions[:, kept][:, None]])
    return stream | {n: batch[n] for n in ("pixel_values", "image_grid_thw") if n in batch}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def stock(kind):
    return add_adapter(tiny_vision_model(kind, dtype=torch.float64), target_modules=TEXT_TARGETS)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_rows_match_stock_at_every_save_level(kind, stock, rows):
    batch = rows_of(kind, rows)
    expected = run(stock, batch)
    fast = bound_copy(stock)
    assert len(expected.gradients) == 2 * 7 * len(binding_of(fast).layers)
    for level in LEVELS:
        binding_of(fast).set_save_levels(level)
        assert_same(run(fast, batch), expected, EXACT)
    assert not binding_of(fast)._told, "some call ran the stock decoder"


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_a_stream_matches_rows(kind, stock, rows):
    batch = rows_of(kind, rows)
    fast = bound_copy(stock)
    assert_same(run(fast, stream_of(stock, batch), logits=False), run(stock, batch, logits=False), EXACT)
    assert not binding_of(fast)._told


def test_padding_on_the_left_changes_nothing_else(kind, stock):
    batch = rows_of(kind, ROWS["images"])
    shift = [int((row == 0).sum()) for row in batch["attention_mask"]]
    for name in ("input_ids", "attention_mask", "labels", "token_type_ids", "mm_token_type_ids"):
        if name in batch:
            batch[name] = torch.stack([row.roll(n) for row, n in zip(batch[name], shift, strict=True)])
    fast = bound_copy(stock)
    without = {n: x for n, x in batch.items() if n != "labels"}
    kept = batch["attention_mask"].bool()
    with torch.no_grad():
        actual, expected = (m(**without, use_cache=False).logits[kept] for m in (fast, stock))
    assert relative_error(actual, expected) < EXACT


def test_adapters_on_the_vision_tower_get_their_gradients(kind):
    stock = add_adapter(tiny_vision_model(kind, dtype=torch.float64), target_modules=ALL_TARGETS)
    batch = rows_of(kind, ROWS["images"])
    expected = run(stock, batch, logits=False)
    towers = [name for name in expected.gradients if "language_model" not in name]
    assert len(towers) >= 8 and all(expected.gradients[name].abs().max() > 0 for name in towers)
    fast = bound_copy(stock, "none")
    assert_same(run(fast, batch, logits=False), expected, EXACT)
    assert_same(run(fast, stream_of(stock, batch), logits=False), expected, EXACT)


def test_full_finetuning_matches(kind):
    stock = tiny_vision_model(kind, dtype=torch.float64)
    batch = rows_of(kind, ROWS["images"])
    expected = run(stock, batch, logits=False)
    assert len(expected.gradients) > 0.9 * len(list(stock.parameters()))
    actual = run(bound_copy(stock), batch, logits=False)
    for outcome in (
        actual,
        expected,
    ):  # a bias of keys moves no softmax: its gradient is nothing but rounding
        outcome.gradients = {n: g for n, g in outcome.gradients.items() if not n.endswith("k_proj.bias")}
    assert_same(actual, expected, EXACT)


def test_four_bits_match(kind):
    pytest.importorskip("bitsandbytes")
    stock = tiny_vision_model(kind)
    quantise_4bit(SimpleNamespace(model=stock.model.language_model), True)
    stock = add_adapter(stock, target_modules=TEXT_TARGETS)
    batch = {n: x.float() if x.is_floating_point() else x for n, x in rows_of(kind, ROWS["images"]).items()}
    # fp32 throughout: a few hundred roundings of 2⁻²⁴ in each of two or three layers
    assert_same(run(bound_copy(stock), batch, logits=False), run(stock, batch, logits=False), 5e-5)


def test_what_lies_over_a_module_sends_the_call_to_the_stock_decoder(kind, stock):
    """With masks and positions as Transformers makes them."""
    batch = rows_of(kind, ROWS["images"])
    fast = bound_copy(stock)
    seen = []
    layer = binding_of(fast).layers[0]
    layer.mlp.register_forward_hook(lambda *_: seen.append(True))
    for rows in (batch, stream_of(stock, batch)):
        assert_same(run(fast, rows, logits=False), run(stock, batch, logits=False), EXACT)
    assert seen and "stock decoder" in " ".join(binding_of(fast)._told)


def test_binding_is_taken_off_and_survives_a_copy(kind, stock):
    batch = rows_of(kind, ROWS["images"])
    fast = copy.deepcopy(bound_copy(stock))
    assert binding_of(fast).model is fast.get_base_model()
    expected = run(stock, batch, logits=False)
    assert_same(run(fast, batch, logits=False), expected, EXACT)
    binding_of(fast).undo()
    assert binding_of(fast) is None and "forward" not in fast.get_base_model().__dict__
    assert torch.equal(run(fast, batch, logits=False).loss, expected.loss)
    assert bind(fast).bound


def test_images_of_gemma_are_seen_both_ways():
    """The mask matters in these tests: without token types the stock model says something else."""
    stock = tiny_vision_model("gemma3", dtype=torch.float64)
    batch = vision_batch("gemma3", ROWS["images"], dtype=torch.float64)
    causal = {name: x for name, x in batch.items() if name != "token_type_ids"}
    with torch.no_grad():
        losses = [
            model(**b, use_cache=False).loss for model in (stock, bind_copy(stock)) for b in (batch, causal)
        ]
    assert abs(losses[0] - losses[1]) > 1e-4
    for ours, theirs in zip(losses[2:], losses[:2], strict=True):
        assert relative_error(ours, theirs) < EXACT


def test_images_that_were_embedded_before_are_seen_both_ways_too():
    stock = tiny_vision_model("gemma3", dtype=torch.float64)
    batch = vision_batch("gemma3", ROWS["images"], dtype=torch.float64)
    with torch.no_grad():
        features = stock.model.get_image_features(batch.pop("pixel_values"), return_dict=True).pooler_output
        embeds = stock.model.get_input_embeddings()(batch["input_ids"])
        places = (batch.pop("input_ids") == IMAGE_TOKEN)[..., None]
        batch["inputs_embeds"] = embeds.masked_scatter(places, features.to(embeds.dtype))
        ours, theirs = (model(**batch, use_cache=False).loss for model in (bind_copy(stock), stock))
    assert relative_error(ours, theirs) < EXACT


def bind_copy(model):
    fast = copy.deepcopy(model)
    bind(fast, strict=True)
    return fast
