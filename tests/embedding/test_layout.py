"""Folders in sentence-transformers' layout: read, written, saved and loaded again with the same vectors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pronghorn.embedding import FastEmbeddingModel, embedder_of
from pronghorn.embedding.layout import Layout, model_folder, read_layout, write_layout
from pronghorn.embedding.tokens import end_with_token, tokenize
from pronghorn.errors import (
    AdapterMismatch,
    CheckpointCorrupt,
    ExportDiffers,
    TokenizerProblem,
    UnknownArgument,
    UnsupportedCheckpoint,
)
from pronghorn.loading import FastLanguageModel
from tests.embedding.models import TEXTS, embedder, save_embedder
from tests.tiny import tiny_tokenizer

FULL = Layout("cls", True, {"query": "find: ", "document": ""}, "query", 77)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    for layout in (FULL, Layout("last", False), Layout("mean")):
        write_layout(tmp_path, layout, 32)
        assert read_layout(tmp_path) == layout
        shutil.rmtree(tmp_path / "1_Pooling")
    assert read_layout(tmp_path / "nothing") is None


def test_newer_and_older_ways_of_writing_it(tmp_path: Path) -> None:
    write_layout(tmp_path, FULL, 32)
    pooling = tmp_path / "1_Pooling" / "config.json"
    pooling.write_text('{"embedding_dimension": 32, "pooling_mode": "lasttoken", "include_prompt": true}')
    found = read_layout(tmp_path)
    assert found is not None and found.pooling == "last"
    modules = json.loads((tmp_path / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "0_Transformer").mkdir()
    (tmp_path / "sentence_bert_config.json").rename(tmp_path / "0_Transformer" / "sentence_bert_config.json")
    assert model_folder(tmp_path) == tmp_path / "0_Transformer"
    found = read_layout(tmp_path)
    assert found is not None and found.max_seq_length == 77


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "pools by pooling_mode_max_tokens"),
        ("1_Pooling/config.json", {"pooling_mode": ["cls", "mean"]}, "pools by cls, mean"),
        ("1_Pooling/config.json", {"pooling_mode": "mean", "include_prompt": False}, "prompt's tokens out"),
        (
            "modules.json",
            [{"type": "a.Transformer"}, {"type": "b.Dense", "path": "2_Dense"}],
            "a step 'Dense'",
        ),
        ("modules.json", [{"type": "a.StaticEmbedding"}], "a step 'StaticEmbedding'"),
    ],
)
def test_what_is_not_computed_here_is_refused(tmp_path: Path, file: str, content: object, says: str) -> None:
    write_layout(tmp_path, FULL, 32)
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(UnsupportedCheckpoint, match=says):
        read_layout(tmp_path)
    if file != "modules.json":
        assert read_layout(tmp_path, "mean") is not None  # as its fix says
    (tmp_path / "modules.json").write_text("{")
    with pytest.raises(CheckpointCorrupt, match=r"modules\.json"):
        read_layout(tmp_path)


@pytest.mark.parametrize(("kind", "pooling", "longest"), [("qwen3", "last", 256), ("roberta", "mean", 79)])
def test_saved_and_loaded_again_it_gives_the_same_vectors(
    tmp_path: Path, kind: str, pooling: str, longest: int
) -> None:
    model = embedder(tmp_path / "base", kind)
    layout = embedder_of(model).layout
    # RoBERTa's table of 80 positions holds 79 tokens behind its padding's.
    assert (layout.pooling, layout.normalize, layout.max_seq_length) == (pooling, True, longest)
    expected = model.encode([*TEXTS, "long " * 200])
    model.save_pretrained_merged(tmp_path / "merged", verify=False)  # what stands there is replaced
    model.save_embedding_adapter(tmp_path / "lora")
    for folder in (
        model.save_pretrained_merged(tmp_path / "merged"),
        model.save_embedding_adapter(tmp_path / "lora"),
    ):
        again, _ = FastEmbeddingModel.from_pretrained(folder, dtype="float32")
        assert embedder_of(again).layout == layout
        assert np.abs(again.encode([*TEXTS, "long " * 200]) - expected).max() < 1e-6
    assert hasattr(again, "peft_config") and not hasattr(again, "save_pretrained_gguf")


def test_sentence_transformers_gives_the_same_vectors(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    for kind in ("qwen3", "bert"):
        model = embedder(tmp_path / kind, kind)
        expected = model.encode(TEXTS)
        for folder in (
            model.save_pretrained_merged(tmp_path / f"{kind}-merged"),
            model.save_embedding_adapter(tmp_path / f"{kind}-lora"),
        ):
            theirs = library.SentenceTransformer(
                str(folder), device="cpu", model_kwargs={"dtype": torch.float32}
            )
            assert np.abs(theirs.encode(TEXTS) - expected).max() < 1e-6
            theirs.save(str(tmp_path / f"{folder.name}-theirs"))
            again, _ = FastEmbeddingModel.from_pretrained(tmp_path / f"{folder.name}-theirs", dtype="float32")
            assert np.abs(again.encode(TEXTS) - expected).max() < 1e-6


def test_an_export_that_gives_other_vectors_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pronghorn.embedding import saving

    model = embedder(tmp_path / "base", "llama")
    monkeypatch.setattr(saving, "plan_merge", lambda _: _without_adapters(model))
    with pytest.raises(ExportDiffers, match="a vector has a cosine of"):
        model.save_pretrained_merged(tmp_path / "merged")
    assert (tmp_path / "merged" / "export.failed.txt").is_file()


def _without_adapters(model):
    from pronghorn.export.merge import plan_merge

    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.merged_adapters.append("default")  # as if it were in the weight already
    plan = plan_merge(model)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.merged_adapters.clear()
    return plan


def test_texts_end_with_a_token_whose_vector_is_theirs() -> None:
    tokenizer = tiny_tokenizer(chat_template=False)
    plain = tokenizer("grass")["input_ids"]
    end_with_token(tokenizer)
    assert tokenizer("grass")["input_ids"] == [*plain, tokenizer.eos_token_id]
    end_with_token(tokenizer)  # once is enough
    ids = tokenize(tokenizer, ["grass " * 50], 7)[0].tolist()
    assert len(ids) == 7 and ids[-1] == tokenizer.eos_token_id
    tokenizer = tiny_tokenizer(chat_template=False)
    tokenizer.eos_token = None
    with pytest.raises(TokenizerProblem, match="ends texts"):
        end_with_token(tokenizer)


def test_prompts_and_poolings_by_name(tmp_path: Path) -> None:
    folder = save_embedder(tmp_path, "llama")
    write_layout(folder, Layout("mean", False, {"query": "find: "}, None, 60), 64)
    model, _ = FastEmbeddingModel.from_pretrained(folder, dtype="float32")
    prompted = model.encode("grass", prompt_name="query")
    assert np.abs(prompted - model.encode("find: grass")).max() < 1e-6
    assert np.abs(prompted - model.encode("grass", prompt="find: ")).max() < 1e-6
    assert abs(np.linalg.norm(prompted) - 1) > 1e-3  # as the folder says
    with pytest.raises(UnknownArgument, match="no prompt 'querry'") as caught:
        model.encode("grass", prompt_name="querry")
    assert "'query'" in caught.value.fix
    with pytest.raises(UnknownArgument, match="pooling='lst'"):
        FastEmbeddingModel.from_pretrained(folder, pooling="lst")
    with pytest.raises(UnknownArgument, match="no argument 'poling'"):
        FastEmbeddingModel.from_pretrained(folder, poling="last")


def test_what_is_no_embedding_model_is_told(tmp_path: Path) -> None:
    folder = save_embedder(tmp_path / "base", "llama")
    model, _ = FastLanguageModel.from_pretrained(str(folder), dtype="float32")
    with pytest.raises(UnknownArgument, match="is no embedding model"):
        FastEmbeddingModel.get_peft_model(model)
    FastLanguageModel.get_peft_model(model, r=2).save_pretrained(tmp_path / "lora")
    with pytest.raises(AdapterMismatch, match="trained on a language model"):
        FastEmbeddingModel.from_pretrained(tmp_path / "lora")
