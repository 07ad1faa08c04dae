"""A GGUF file, opened by stock Transformers (and by llama.cpp where it is installed), is the trained model."""

import logging

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, TokenType, dequantize, quants
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

from pronghorn.errors import ExportDiffers, NotExportable, PackageMissing, SaveFailed, UnknownArgument
from pronghorn.export import save_gguf, save_gguf_adapter
from pronghorn.export.gguf import file as gguf_file
from pronghorn.export.gguf import llama_cpp
from pronghorn.export.gguf import save as gguf_save
from pronghorn.export.gguf.architecture import interleave
from pronghorn.export.gguf.methods import ALIASES, BY_LLAMA_CPP, NATIVE, Method, resolve
from pronghorn.export.gguf.rope import rope_factors
from pronghorn.loading import FastLanguageModel
from tests.export.test_merged import KINDS, logits, trained
from tests.tiny import CHAT_TEMPLATE, save_tiny, tiny_model, tiny_tokenizer

#: Most mean KL divergence of a tiny random model, in nats: about ten times what a right file shows. A forgotten
#: adapter is at 0.5, a wrong permutation or head beyond 1.
CLOSE = {"f32": 1e-6, "f16": 1e-5, "bf16": 3e-4, "q8_0": 3e-3, "q5_1": 5e-2, "q4_0": 0.2}


def fields(path):
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


def tensors(path):
    return {tensor.name: tensor for tensor in GGUFReader(path).tensors}


def weight(path, name):
    found = tensors(path)[name]
    return torch.from_numpy(dequantize(found.data, found.tensor_type).copy())


def export(model, folder, method="f32", **arguments):
    return save_gguf(model, tiny_tokenizer(), folder, method, **arguments)


@pytest.mark.parametrize("method", CLOSE)
def test_every_format_is_as_close_as_its_bits(tmp_path, method):
    done = export(trained(tiny_model("llama")), tmp_path / "out", method)
    assert all(item.divergence < CLOSE[method] for item in done.checks[0].comparisons)
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors(done.files[0]).items()}
    assert kinds["blk.0.ffn_down.weight"] == method.upper()
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["output.weight"] == ("Q8_0" if method.startswith(("q4", "q5")) else method.upper())
    assert fields(done.files[0])["general.file_type"] == Method(method).file_type


def test_stock_transformers_opens_it_with_nothing_but_the_folder(tmp_path):
    model = trained(tiny_model("llama"))
    done = export(model, tmp_path / "out")
    folder, name = done.folder, done.files[0].name
    again = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    text = "What does it eat?<|im_end|>\nGrass, 1234."
    assert tokenizer(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]
    assert tokenizer.chat_template == CHAT_TEMPLATE
    ours, _ = FastLanguageModel.from_pretrained(str(done.folder), dtype="float32")
    torch.testing.assert_close(logits(ours), logits(model), atol=1e-5, rtol=1e-5)


def test_metadata(tmp_path):
    done = export(tiny_model("qwen3", max_position_embeddings=512), tmp_path / "animal", "q8_0", verify=False)
    found = fields(done.files[0])
    expected = {
        "general.architecture": "qwen3",
        "general.name": "animal",
        "qwen3.block_count": 2,
        "qwen3.context_length": 512,
        "qwen3.embedding_length": 64,
        "qwen3.feed_forward_length": 128,
        "qwen3.attention.head_count": 4,
        "qwen3.attention.head_count_kv": 2,
        "qwen3.attention.key_length": 16,
        "qwen3.attention.value_length": 16,
        "qwen3.rope.freq_base": 10000.0,
        "qwen3.vocab_size": 320,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    assert {name: found.get(name) for name in expected} == expected
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 320
    assert {tokens.index(name) for name in ("<|im_start|>", "<|im_end|>")} == {3, 4}
    assert types[3] == TokenType.CONTROL and types[tokens.index("a")] == TokenType.NORMAL
    size = len(tiny_tokenizer())
    assert tokens[size:] == [f"[PAD{index}]" for index in range(size, 320)]
    assert set(types[size:]) <= {TokenType.UNUSED}


def test_q_and_k_are_interleaved_for_llama_and_not_for_qwen(tmp_path):
    for family, changed in (("llama", True), ("mistral", True), ("qwen2", False)):
        model = tiny_model(family)
        done = export(model, tmp_path / family, verify=False)
        attention = model.model.layers[1].self_attn
        for name, heads in (("q", 4), ("k", 2)):
            stored = getattr(attention, f"{name}_proj").weight
            written = weight(done.files[0], f"blk.1.attn_{name}.weight")
            assert torch.equal(written, interleave(stored, heads) if changed else stored)
            assert torch.equal(written, stored) is not changed
        assert torch.equal(weight(done.files[0], "blk.1.attn_v.weight"), attention.v_proj.weight)
    rows = interleave(torch.arange(8.0)[:, None], 2)[:, 0]
    assert rows.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("source", ["nf4", "8bit", "int8", "bf16"])
def test_other_storages_are_dequantised_and_merged(tmp_path, source):
    path = save_tiny(tmp_path / "base", "llama")
    how = {
        "nf4": {"load_in_4bit": True},
        "8bit": {"load_in_8bit": True},
        "bf16": {},
        "int8": {"load_in_int8": True},
    }[source]
    dtype = "bfloat16" if source == "bf16" else "float32"
    model, tokenizer = FastLanguageModel.from_pretrained(str(path), dtype=dtype, **how)
    model = trained(model)
    done = model.save_pretrained_gguf(str(tmp_path / "out"), tokenizer, quantization_method="f32")
    assert done.checks[0].passed and done.checks[0].adapted == 14
    # A bf16 model adds its adapter in bf16; 2⁻⁹ a product is some 1e-4 nats here.
    limit = {"bf16": 2e-3, "int8": 0.02}.get(source, CLOSE["f32"])  # int8 rounds what it multiplies, too
    assert all(item.divergence < limit for item in done.checks[0].comparisons)


@pytest.mark.parametrize("kind", ["dora", "lora_bias", "embeddings", "some layers"])
def test_other_adapters(tmp_path, kind):
    done = export(trained(tiny_model("qwen2"), **KINDS[kind]), tmp_path / "out", "f32")
    assert all(item.divergence < CLOSE["f32"] for item in done.checks[0].comparisons)


def test_llama_3_rope_is_written_as_factors(tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model = trained(tiny_model("llama", rope_parameters=rope, max_position_embeddings=512))
    done = export(model, tmp_path / "out")
    factors = weight(done.files[0], "rope_freqs.weight")
    # By hand: frequency 1 turns 10 times in 64 positions and stays; 10000^-7/8 turns 0.003 times and is divided by 8.
    assert factors.shape == (8,) and factors[0] == 1 and torch.isclose(factors[-1], torch.tensor(8.0))
    assert ((factors >= 1) & (factors <= 8.0001)).all()
    assert torch.equal(factors, rope_factors(model.get_base_model().config, 16)["rope_freqs.weight"])
    # llama.cpp computes with them; Transformers' reader does not know them and is given the live config.
    assert all(item.divergence < CLOSE["f32"] for item in done.checks[0].comparisons)


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_other_rope_scalings(tmp_path, kind):
    rope = {
        "rope_type": kind,
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model = tiny_model("qwen2", rope_parameters=rope)
    done = export(model, tmp_path / "out")
    found = fields(done.files[0])
    assert found["qwen2.rope.scaling.type"] == kind and found["qwen2.rope.scaling.factor"] == 4.0
    if kind == "yarn":
        assert found["qwen2.rope.scaling.original_context_length"] == 64
    assert all(item.divergence < 1e-4 for item in done.checks[0].comparisons)


def test_quantised_bytes_are_those_of_the_reference_and_in_rows_of_blocks():
    weights = torch.randn(7, 96, generator=torch.Generator().manual_seed(0))
    for kind in (GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0):
        whole = quants.quantize(weights.numpy(), kind)
        assert (gguf_file.encode(weights, kind, "w") == whole).all()
    bf16 = gguf_file.encode(weights, GGMLQuantizationType.BF16, "w")
    assert torch.equal(torch.from_numpy(bf16.copy()).view(torch.bfloat16), weights.to(torch.bfloat16))


def test_quantising_in_parts_changes_nothing(monkeypatch):
    weights = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    whole = gguf_file.encode(weights, GGMLQuantizationType.Q8_0, "w")
    monkeypatch.setattr(gguf_file, "_AT_A_TIME", 640)
    assert (gguf_file.encode(weights, GGMLQuantizationType.Q8_0, "w") == whole).all()


def test_a_weight_beyond_float16_is_refused_and_nothing_is_left(tmp_path):
    model = trained(tiny_model("llama"))
    with torch.no_grad():
        model.base_model.model.model.layers[1].mlp.up_proj.lora_B["default"].weight.mul_(1e6)
    with pytest.raises(SaveFailed, match=r"blk\.1\.ffn_up\.weight .* float16"):
        export(model, tmp_path / "out", "f16", verify=False)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_nothing_and_keeps_what_was_there(tmp_path, monkeypatch):
    model = tiny_model("llama")
    done = export(model, tmp_path / "out", "q8_0", verify=False)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    encode, calls = gguf_file.encode, []

    def fail(*arguments):
        calls.append(1)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(gguf_file, "encode", fail)
    with pytest.raises(KeyboardInterrupt):
        export(trained(model), tmp_path / "out", ["q8_0", "f16"], verify=False)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert done.files[0].name in before


def test_other_files_of_the_folder_stay(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "out")
    export(model, tmp_path / "out", "f16", verify=False)
    export(model, tmp_path / "out", "q8_0", verify=False)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "config.json", "out.F16.gguf", "out.Q8_0.gguf", "Modelfile"} <= names


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    from collections import namedtuple

    from pronghorn.export import folder

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: usage(10, 9, 100_000))
    with pytest.raises(SaveFailed, match="too full"):
        export(tiny_model("llama"), tmp_path / "out", ["f32", "q8_0"], verify=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("broken", ["permutation", "adapter", "rope"])
def test_the_gate_finds_what_is_wrong_keeps_it_and_marks_it(tmp_path, monkeypatch, broken):
    model = trained(tiny_model("llama"))
    if broken == "permutation":
        monkeypatch.setattr("pronghorn.export.gguf.architecture.interleave", lambda tensor, heads: tensor)
    elif broken == "adapter":
        plan = gguf_save.plan_merge

        def planned(given, dtype):
            right = plan(given, dtype)
            q = given.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.detach()
            for place, entry in enumerate(right.entries):
                if entry.name == "model.layers.0.self_attn.q_proj.weight":
                    right.entries[place] = type(entry)(entry.name, entry.shape, entry.dtype, lambda: q)
            return right

        monkeypatch.setattr(gguf_save, "plan_merge", planned)
    else:
        real = gguf_save.add_architecture

        def wrong(writer, dialect, rows):
            real(writer, dialect, rows)
            writer.kv_data[0]["llama.embedding_length"].value = 32

        monkeypatch.setattr(gguf_save, "add_architecture", wrong)
    with pytest.raises(ExportDiffers) as raised:
        export(model, tmp_path / "out", "f16")
    assert raised.value.code == "PH611"
    mark = tmp_path / "out" / "out.F16.gguf.failed.txt"
    assert mark.is_file() and (tmp_path / "out" / "out.F16.gguf").is_file()
    monkeypatch.undo()
    export(model, tmp_path / "out", "f16")
    assert not mark.exists()


def test_an_adapter_that_changes_nothing_is_said(tmp_path, caplog):
    model = FastLanguageModel.get_peft_model(tiny_model("llama"), r=4)
    with caplog.at_level(logging.WARNING, "pronghorn"):
        export(model, tmp_path / "out")
    assert "14 of 14 adapters change nothing" in caplog.text


@pytest.mark.parametrize("given, name", [*ALIASES.items(), *((name.upper(), name) for name in NATIVE)])
def test_names_of_formats(given, name):
    assert resolve(given, torch.bfloat16) == [Method(name)]


def test_every_format_has_limits_and_a_file_type():
    for name in (*NATIVE, *BY_LLAMA_CPP):
        method = Method(name)
        assert 0 < method.limits.divergence <= 3 and 0 < method.limits.lost < 1
        assert 0 <= method.file_type < 64 and method.bytes_of(1024) >= 256
    assert resolve("not_quantized", torch.bfloat16) == [Method("bf16")]
    assert resolve(["q8_0", "fast_quantized", "f16"], torch.float32) == [Method("q8_0"), Method("f16")]


def test_a_wrong_format_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(UnknownArgument, match=r"'q8_O' does not exist.*did you mean 'q8_0'"):
        export(tiny_model("llama"), tmp_path / "out", "q8_O")
    with pytest.raises(UnknownArgument, match="empty"):
        export(tiny_model("llama"), tmp_path / "out", [])
    assert not list(tmp_path.iterdir())


def test_k_quants_without_llama_cpp_name_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(llama_cpp, "unavailable", lambda: "the package llama-cpp-py-sync is not installed")
    with pytest.raises(PackageMissing, match=r"q4_k_m.*pip install llama-cpp-py-sync.*q8_0"):
        export(tiny_model("llama"), tmp_path / "out", ["q8_0", "q4_k_m"])
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(llama_cpp.unavailable() is not None, reason="llama.cpp's binding is not here")
def test_k_quants_by_llama_cpp(tmp_path):
    model = trained(tiny_model("llama", hidden_size=256, intermediate_size=256, head_dim=64))
    done = export(model, tmp_path / "out", ["q4_k_m", "q6_k"])
    assert sorted(path.name for path in done.folder.glob("*.gguf")) == ["out.Q4_K_M.gguf", "out.Q6_K.gguf"]
    assert tensors(done.files[0])["blk.0.ffn_up.weight"].tensor_type.name == "Q4_K"
    assert [item.reader for item in done.checks[0].comparisons] == ["transformers", "llama.cpp"]


def test_without_gguf_or_a_tokenizer(tmp_path, monkeypatch):
    with pytest.raises(NotExportable, match="pass the tokenizer"):
        save_gguf(tiny_model("llama"), None, tmp_path / "out")
    monkeypatch.setattr(gguf_save, "find_spec", lambda name: None)
    with pytest.raises(PackageMissing, match="pip install gguf"):
        export(tiny_model("llama"), tmp_path / "out")


def test_what_llama_cpp_computes_otherwise_is_refused(tmp_path):
    small = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(NotExportable, match="'gpt2'"):
        export(small, tmp_path / "out")
    with pytest.raises(NotExportable, match="'minicpm3' cannot be written as GGUF"):
        export(tiny_model("minicpm3"), tmp_path / "out")
    with pytest.raises(NotExportable, match="hidden_act='gelu'"):
        export(tiny_model("llama", hidden_act="gelu"), tmp_path / "out")
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(NotExportable, match="dynamic"):
        export(tiny_model("llama", rope_parameters=dynamic), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_the_format_swallows_is_found(tmp_path):
    """A base on the format's own steps, and changes below half a step."""
    model = tiny_model("llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "layers" in name:
                kind = GGMLQuantizationType.Q8_0
                parameter.copy_(torch.from_numpy(dequantize(quants.quantize(parameter.numpy(), kind), kind)))
    adapted = FastLanguageModel.get_peft_model(model, r=4)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 2e-4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ExportDiffers, match=r"14 of 14 adapted weights lost their adapter"):
        export(adapted, tmp_path / "out", "q8_0")
    assert export(adapted, tmp_path / "exact", "f32").checks[0].passed


@pytest.mark.parametrize("kind", ["lora", "rslora", "patterns", "some layers"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_an_adapter_as_gguf_lora(tmp_path, family, kind):
    base = tiny_model(family)
    model = trained(base, **KINDS[kind])
    file = save_gguf_adapter(model, tmp_path / "out").files[0]
    assert file == tmp_path / "out" / "out.lora.gguf" and [p.name for p in file.parent.iterdir()] == [
        file.name
    ]
    found = fields(file)
    assert found["general.type"] == "adapter" and found["adapter.type"] == "lora"
    alpha, count = found["adapter.lora.alpha"], 0
    for name, module in model.get_base_model().named_modules():
        if not hasattr(module, "lora_A") or "default" not in module.lora_A:
            continue
        count += 1
        part = name.rsplit(".", 1)[1]
        names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
        names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
        stem = f"blk.{name.split('.')[2]}.{names[part]}.weight"
        a, b = weight(file, f"{stem}.lora_a"), weight(file, f"{stem}.lora_b")
        heads = {"q_proj": 4, "k_proj": 2}.get(part) if family == "llama" else None
        expected = module.get_delta_weight("default")
        expected = interleave(expected, heads) if heads else expected
        # llama.cpp: alpha / rank * B @ A, the rank read off B
        torch.testing.assert_close(alpha / b.shape[1] * b @ a, expected, atol=1e-6, rtol=1e-5)
    assert len(tensors(file)) == 2 * count > 0


def test_adapters_without_a_gguf_form(tmp_path):
    for kind in ("dora", "head"):
        with pytest.raises(NotExportable, match="GGUF LoRA"):
            save_gguf_adapter(trained(tiny_model("llama"), **KINDS[kind]), tmp_path / "out")
    with pytest.raises(NotExportable, match="no adapter"):
        save_gguf_adapter(tiny_model("llama"), tmp_path / "out")
    path = save_tiny(tmp_path / "base", "llama")
    model, tokenizer = FastLanguageModel.from_pretrained(str(path), dtype="float32")
    model = trained(model)
    done = model.save_pretrained_gguf(str(tmp_path / "lora"), tokenizer, save_method="lora")
    assert [file.name for file in done.files] == ["lora.lora.gguf"]
    with pytest.raises(UnknownArgument, match="'merged' or 'lora'"):
        model.save_pretrained_gguf(str(tmp_path / "x"), tokenizer, save_method="loar")


def test_a_binding_that_does_not_load_is_said_once(tmp_path, monkeypatch, caplog):
    def fail():
        raise RuntimeError("libllama.so: version `GLIBC_2.38' not found (required by libllama.so)")

    llama_cpp.unavailable.cache_clear()
    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: True)
    monkeypatch.setattr(llama_cpp, "_library", fail)
    with caplog.at_level(logging.WARNING, "pronghorn"):
        done = export(tiny_model("llama"), tmp_path / "out", ["f32", "f16"])
    llama_cpp.unavailable.cache_clear()
    assert caplog.text.count("does not load here: it needs GLIBC_2.38") == 1
    assert [item.reader for item in done.checks[1].comparisons] == ["transformers"]
