"""Exceptions as other libraries raise them, where that can be had without a GPU, and the texts of the others."""

from __future__ import annotations

import errno

import pytest
import torch
from torch import nn

from pronghorn import errors
from pronghorn.diagnostics.catalogue import error_classes
from pronghorn.diagnostics.explanations import EXPLANATIONS
from pronghorn.diagnostics.translate import RULES, translate, translate_text


def raised(action) -> BaseException:
    with pytest.raises(Exception) as caught:
        action()
    return caught.value


def corrupt_safetensors(folder):
    from safetensors.torch import load_file

    path = folder / "model.safetensors"
    path.write_bytes(b"\xff" * 64)
    load_file(path)


def optimizer_of_other_weights(folder):
    two, one = (torch.optim.AdamW(nn.Linear(2, 2, bias=bias).parameters()) for bias in (True, False))
    one.load_state_dict(two.state_dict())


def missing_head(folder):
    model = nn.ModuleDict({"lm_head": nn.Linear(2, 2, bias=False)})
    model.load_state_dict({})


def larger_head(folder):
    model = nn.ModuleDict({"lm_head": nn.Linear(2, 3, bias=False)})
    model.load_state_dict({"lm_head.weight": torch.zeros(5, 2)})


def other_rank(folder):
    model = nn.ModuleDict({"q_proj_lora_A": nn.Linear(2, 3, bias=False)})
    model.load_state_dict({"q_proj_lora_A.weight": torch.zeros(5, 2)})


def no_chat_template(folder):
    from tests.tiny import tiny_tokenizer

    tiny_tokenizer(chat_template=False).apply_chat_template([{"role": "user", "content": "x"}])


def refused_roles(folder):
    from tests.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('Conversation roles must alternate user/assistant') }}"
    tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


def no_padding(folder):
    from tests.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer(["a", "bb bb"], padding=True)


def no_tokenizer(folder):
    from transformers import AutoTokenizer, LlamaConfig

    LlamaConfig().save_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)


def unknown_model_type(folder):
    from transformers import AutoConfig

    (folder / "config.json").write_text('{"model_type": "quaternion"}')
    AutoConfig.from_pretrained(folder)


def full_disk(folder):
    raise OSError(errno.ENOSPC, "No space left on device", "out/model.safetensors")


REAL = [
    (lambda folder: torch.ones(2, 2).half() @ torch.ones(2, 2), "PH206", "two dtypes"),
    (lambda folder: nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2).bfloat16()), "PH206", "dtypes"),
    (lambda folder: nn.Embedding(4, 2)(torch.tensor([4])), "PH307", "token id"),
    (
        lambda folder: nn.functional.cross_entropy(torch.zeros(1, 4), torch.tensor([9])),
        "PH307",
        "9 is no token",
    ),
    (corrupt_safetensors, "PH102", "SafetensorError"),
    (optimizer_of_other_weights, "PH604", "optimizer"),
    (missing_head, "PH105", "lm_head.weight is missing"),
    (larger_head, "PH105", "lm_head.weight is [5, 2] in the checkpoint and [3, 2] in the model"),
    (other_rank, "PH604", "q_proj_lora_A.weight"),
    (no_chat_template, "PH104", "no chat template"),
    (refused_roles, "PH306", "refuses a conversation"),
    (no_padding, "PH104", "padding"),
    (no_tokenizer, "PH104", "no tokenizer"),
    (unknown_model_type, "PH103", "quaternion"),
    (full_disk, "PH601", "No space left"),
    (lambda folder: __import__("no_such_package"), "PH403", "no_such_package"),
    (lambda folder: torch.multinomial(torch.tensor([float("nan"), 1.0]), 1), "PH701", "no numbers"),
]


@pytest.mark.parametrize("action,code,named", REAL, ids=[str(i) for i in range(len(REAL))])
def test_what_libraries_raise(action, code, named, tmp_path):
    found = translate(raised(lambda: action(tmp_path)))
    assert found is not None and found.code == code
    assert named in str(found) and found.fix


TEXTS = [
    ("RuntimeError: CUDA error: invalid configuration argument\nCUDA kernel errors might be ...", "PH506"),
    ("ImportError: /x/_C.so: undefined symbol: _ZN2at4_ops5zeros4callE", "PH506"),
    ("CUDA driver version is insufficient for CUDA runtime version", "PH506"),
    ("RuntimeError: The NVIDIA driver on your system is too old (found version 11040).", "PH506"),
    ("AssertionError: Torch not compiled with CUDA enabled", "PH506"),
    ("OSError: libcudart.so.12: cannot open shared object file: No such file", "PH506"),
    ("ImportError: cannot import name 'AttrsDescriptor' from 'triton.compiler.compiler' (/x.py)", "PH506"),
    ("CUDA error: no kernel image is available for execution on the device", "PH507"),
    ("type fp8e4nv not supported in this architecture", "PH507"),
    ("CUDA error: an illegal memory access was encountered", "PH508"),
    ("CUDA error: device-side assert triggered", "PH307"),
    ("expected scalar type Half but found Float", "PH206"),
    ("ValueError: Attempting to unscale FP16 gradients.", "PH206"),
    ("Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cuda:1!", "PH207"),
    ("module must have its parameters and buffers on device cuda:0 (device_ids[0]) but found one of them", "PH207"),
    ("ValueError: You can't train a model that has been loaded with `device_map='auto'` in any distributed mode.",
     "PH207"),
    ("torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp", "PH702"),
    ("Expected to have finished reduction in the prior iteration before starting a new one.", "PH702"),
    ("OSError: You are trying to access a gated repo.\nMake sure to have access to it at https://x", "PH106"),
    ("huggingface_hub.errors.RepositoryNotFoundError: 401 Client Error.", "PH101"),
    ("requests.exceptions.ConnectionError: HTTPSConnectionPool(host='huggingface.co', port=443): Max retries exceeded",
     "PH107"),
    ("OSError: We couldn't connect to 'https://huggingface.co' to load the files", "PH107"),
    ("OSError: x does not appear to have a file named config.json", "PH101"),
    ("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory", "PH501"),
    ("KeyError: 'lm_head.weight'", "PH105"),
]  # fmt: skip


@pytest.mark.parametrize("text,code", TEXTS, ids=[f"{code}-{i}" for i, (_, code) in enumerate(TEXTS)])
def test_texts(text, code):
    found = translate_text(text)
    assert found is not None and found.code == code
    assert "{" not in str(found) and "()" not in str(found) and found.fix


def test_out_of_memory_tells_what_was_there():
    text = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB of which 1.12 GiB is "
        "free. Process 4711 has 9.50 GiB memory in use. Including non-PyTorch memory, this process has 12.91 GiB "
        "memory in use. Of the allocated memory 12.00 GiB is allocated by PyTorch"
    )
    found = translate(torch.OutOfMemoryError(text))
    assert isinstance(found, errors.OutOfMemory)
    assert found.message == (
        "the GPU's memory did not suffice: 2.00 GiB more were needed, 1.12 GiB of GPU 0's 23.64 GiB were free; this "
        "process held 12.91 GiB, other processes 9.50 GiB"
    )
    assert "memory_budget" in found.fix


def test_causes_are_looked_at_and_own_errors_stay():
    error = ValueError("the step failed")
    error.__cause__ = RuntimeError("CUDA error: an illegal memory access was encountered")
    assert isinstance(translate(error), errors.GpuFault)
    own = errors.RowInvalid("no role")
    assert translate(own) is own


@pytest.mark.parametrize("text", ["ValueError: x must be positive", "", "half of the rows", "some error"])
def test_what_is_not_known_stays_unknown(text):
    assert translate_text(text) is None
    assert translate(ValueError(text)) is None


def test_codes_in_a_pasted_line():
    found = translate_text("pronghorn: [PH401] unknown key 'x' (run.yaml, line 2). Fix: leave it out")
    assert isinstance(found, errors.ConfigInvalid)


def test_every_rule_can_be_reached():
    """No rule stands behind one that takes all its texts: each is the first for some text above."""
    import re

    seen = set()
    said = [text for text, _ in TEXTS]
    for action, _, _ in REAL:
        try:
            action(__import__("pathlib").Path(__import__("tempfile").mkdtemp()))
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    said += ["OutOfMemoryError: CUDA out of memory", "PTX was compiled with an unsupported toolchain",
             "\"addmm_impl_cpu_\" not implemented for 'Half'", "needs trust_remote_code=True",
             "ignore_mismatched_sizes", "size mismatch for x.weight",
             "weights are newly initialized: ['lm_head.weight']",
             "This requires the following packages: tiktoken"]  # fmt: skip
    for text in said:
        for number, rule in enumerate(RULES):
            if re.search(rule.pattern, text, re.IGNORECASE | re.DOTALL | re.MULTILINE):
                seen.add(number)
                break
    unreached = [RULES[n].pattern[:60] for n in range(len(RULES)) if n not in seen]
    assert not unreached


def test_every_error_is_explained_in_both_languages():
    for kind in error_classes():
        assert kind.code in EXPLANATIONS, f"write an entry for {kind.code} in diagnostics/explanations"
        found = EXPLANATIONS[kind.code]
        for text in (found.cause, found.fix, *found.zh):
            assert text.strip()
        for text in found.zh:
            assert any("一" <= letter <= "鿿" for letter in text)
        assert "\n" not in found.example
    assert set(EXPLANATIONS) == {kind.code for kind in error_classes()}


def test_examples_mean_their_code():
    for code, found in EXPLANATIONS.items():
        meant = translate_text(found.example)
        assert meant is not None and meant.code == code, code
