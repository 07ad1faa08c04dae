"""The parity check itself: it passes on the real engine and fails on a wrong one."""

from __future__ import annotations

import pytest
import torch

from benchmarks import parity, verify
from benchmarks.verify import (
    DRAWS,
    FAMILIES,
    SIZES,
    Case,
    Draw,
    Outcome,
    Verdict,
    check,
    family_config,
    judge,
    kind_of,
    main,
)

LEVELS = ("all", "none")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "nf4"])
def test_parity_holds_on_the_cpu(precision: str) -> None:
    if precision == "nf4":
        pytest.importorskip("bitsandbytes")
    verdicts = check(Case("qwen2", "tiny", precision), "cpu", LEVELS)
    assert [verdict.level for verdict in verdicts] == list(LEVELS)
    assert not any(verdict.failures for verdict in verdicts)
    if precision != "fp32":
        assert verdicts[0].stock_error > 1e-3, "the stock bf16 model's own error is what ours is held to"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_config_of_each_size(family: str) -> None:
    for size in SIZES:
        assert family_config(family, size).model_type == family


@pytest.mark.parametrize("family", ["gemma2", "phi3", "qwen3_next"])
def test_parity_holds_for_other_layers(family: str) -> None:
    (verdict,) = check(Case(family, "tiny", "fp32"), "cpu", ("attention",))
    assert not verdict.failures


def test_a_wrong_gradient_is_named() -> None:
    names = [f"layers.{i}.mlp.up_proj.lora_A.default.weight" for i in range(3)]
    truth = Outcome(2.0, {name: torch.ones(8) for name in names})
    stock = Outcome(2.0, {name: torch.full((8,), 1.01) for name in names})
    ours = Outcome(2.0, {name: torch.full((8,), 1.011) for name in names})
    case = Case("llama", "tiny", "bf16")
    assert not judge(case, "all", [Draw(ours, stock, truth)]).failures
    ours.gradients[names[1]] = torch.full((8,), 1.02)
    verdict = judge(case, "all", [Draw(ours, stock, truth)])
    assert verdict.worst == names[1]
    assert names[1] in verdict.failures[0]


def test_missing_gradients_nans_and_losses_fail() -> None:
    truth = Outcome(2.0, {"q_proj.lora_A": torch.ones(4), "q_proj.lora_B": torch.ones(4)})
    case = Case("llama", "tiny", "bf16")
    stock = Outcome(2.0, {name: gradient * 1.01 for name, gradient in truth.gradients.items()})
    missing = Outcome(2.0, {"q_proj.lora_A": torch.ones(4)})
    assert "first q_proj.lora_B" in judge(case, "all", [Draw(missing, stock, truth)]).failures[0]
    broken = Outcome(2.0, {name: gradient * float("nan") for name, gradient in truth.gradients.items()})
    assert judge(case, "all", [Draw(broken, stock, truth)]).failures
    for loss in (2.1, float("nan")):
        lost = Outcome(loss, truth.gradients)
        assert "loss" in judge(case, "all", [Draw(lost, stock, truth)]).failures[0]


def test_one_red_draw_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise of one draw passes in the end; what is in every draw does not."""
    name = "up_proj.lora_A"
    truth = Outcome(2.0, {name: torch.ones(8)})
    stock = Outcome(2.0, {name: torch.full((8,), 1.01)})

    def draws(errors: list[float]) -> Verdict:
        def given(case: Case, device: str, levels: tuple[str, ...], number: int) -> dict[str, Draw]:
            ours = Outcome(2.0, {name: torch.full((8,), 1.0 + errors[number])})
            return {level: Draw(ours, stock, truth) for level in levels}

        monkeypatch.setattr(verify, "draw_levels", given)
        (verdict,) = check(Case("llama", "tiny", "bf16"), "cpu", ("all",))
        return verdict

    once = draws([0.017] + [0.008] * (DRAWS - 1))
    assert not once.failures and once.draws == DRAWS
    always = draws([0.013] * DRAWS)
    assert always.failures and always.worst_ratio == pytest.approx(1.3, rel=1e-3)
    assert draws([0.009] * DRAWS).draws == 1


def test_kind() -> None:
    assert kind_of("base_model.model.model.layers.3.mlp.up_proj.lora_A.default.weight") == "up_proj.lora_A"
    assert kind_of("layers.0.linear_attn.in_proj_qkv.lora_B.default.weight") == "in_proj_qkv.lora_B"


def test_both_kinds_of_attention_are_quantised() -> None:
    pytest.importorskip("bitsandbytes")
    (verdict,) = check(Case("qwen3_5_text", "tiny", "nf4"), "cpu", ("none",))
    assert not verdict.failures


def test_command(capsys, tmp_path) -> None:
    arguments = [
        "--families",
        "llama",
        "--sizes",
        "tiny",
        "--precisions",
        "fp32",
        "--levels",
        "all",
        "--device",
        "cpu",
    ]
    record = tmp_path / "parity.json"
    assert main([*arguments, "--out", str(tmp_path / "verify.csv"), "--record", str(record)]) == 0
    assert parity.state("exact", "CPU, 2 threads", record, wanted=((" llama ", " fp32 all "),)) == "green"
    assert "parity holds: 1 combinations" in capsys.readouterr().out
    assert (tmp_path / "verify.csv").read_text().splitlines()[1].startswith("llama tiny fp32,all")
