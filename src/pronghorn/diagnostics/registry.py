"""All of the doctor's checks, in the order they are shown. Nothing is imported for the list itself."""

from __future__ import annotations

from pronghorn.diagnostics.checks import Check

_HERE = "pronghorn.diagnostics."


def _group(group: str, module: str, names: dict[str, str]) -> list[Check]:
    return [Check(group, name, f"{_HERE}{module}:{function}") for name, function in names.items()]


CHECKS: list[Check] = [
    *_group(
        "versions",
        "version_checks",
        {
            "package versions": "package_versions",
            "torch build": "torch_build",
            "NVIDIA driver": "nvidia_driver",
            "GPU architecture": "gpu_architecture",
            "Triton": "triton_version",
            "bitsandbytes": "bitsandbytes_library",
        },
    ),
    *_group(
        "kernels",
        "kernel_checks",
        {
            "RMSNorm": "rms_norm",
            "LayerNorm": "layer_norm",
            "rotary embedding": "rope",
            "rotary embedding with head norms": "rope_with_norms",
            "heads of latent attention": "latent_heads",
            "gradients of q, k, v side by side": "joined_gradients",
            "gated linear unit": "glu",
            "gated linear unit with adapters": "glu_with_adapters",
            "gated linear unit in its products": "glu_in_products",
            "products with an adapter inside": "adapted_products",
            "LoRA products": "lora_products",
            "linear cross-entropy": "cross_entropy",
            "dropout": "dropout",
            "fast_linear_forward": "fast_linear",
        },
    ),
    *_group(
        "kernels",
        "mixture_checks",
        {"experts' products": "products", "experts' gated units": "unit", "routing to experts": "routing"},
    ),
    *_group(
        "kernels",
        "recurrent_checks",
        {
            "short convolution": "short_conv",
            "gated attention output": "gated_output",
            "gated delta rule": "delta_rule",
            "gated delta rule, one token": "delta_step",
        },
    ),
    *_group(
        "kernels",
        "decode_checks",
        {
            "products of few rows": "few_rows",
            "all between two attentions": "between_attentions",
            "all between two steps": "between_steps",
            "attention to a cache in blocks": "paged_attention",
            "a prompt's keys and values in it": "prompts_cache",
            "writes to weights": "written_weights",
        },
    ),
    *_group(
        "quantised",
        "quantised_checks",
        {
            "4-bit weights": "four_bit",
            "fp8 rows": "fp8_rows",
            "fp8 weights": "fp8_weights",
            "int8 rows": "int8_rows",
            "int8 products": "int8_products",
        },
    ),
    *_group(
        "attention",
        "attention_checks",
        {f"attention '{name}'": name for name in ("cudnn", "flash", "cpu", "sdpa", "eager", "flex")},
    ),
    *_group(
        "training",
        "training_checks",
        {
            "LoRA step": "lora_step",
            "captured step": "captured_step",
            "bitsandbytes 4-bit": "bitsandbytes_four_bit",
            "fp8 products": "fp8_products",
        },
    ),
    *_group(
        "machine",
        "machine_checks",
        {
            "disk": "disk",
            "host memory": "host_memory",
            "pinned memory": "pinned_memory",
            "host to GPU and back": "host_link",
            "GPU to GPU": "peer_link",
        },
    ),
]
