"""AdamW over flat storage: torch's numbers, torch's states, and torch's own way where something else is asked."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from pronghorn.training.flat_adamw import FlatAdamW, clip_flat_
from tests.training.runs import adapter_model, trainer

FUSED = {"optim": "adamw_torch_fused", "learning_rate": 1e-2, "weight_decay": 0.1, "max_grad_norm": 0.05}


def made_for(folder: Path, model: Any = None, *, flat: bool = True, **options: Any) -> Any:
    """A trainer; without `flat` one with torch's optimizer and clipping."""
    made = trainer(folder, model=adapter_model() if model is None else model, **FUSED | options)
    if not flat:
        create = made.create_optimizer

        def torchs(*args: Any, **kwargs: Any) -> Any:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(FlatAdamW, "like", lambda optimizer, flats: optimizer)
                return create(*args, **kwargs)

        made.create_optimizer = torchs
        made._clip_grad_norm = lambda model: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    return made


def run(folder: Path, *, steps: int = 4, **options: Any) -> Any:
    made = made_for(folder, max_steps=steps, **options)
    made.train()
    return made


def inner(made: Any) -> Any:
    return getattr(made.optimizer, "optimizer", made.optimizer)


def weights(made: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in made.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}])
def test_as_torchs(options: dict[str, Any], tmp_path: Path) -> None:
    ours, torchs = run(tmp_path / "a", **options), run(tmp_path / "b", flat=False, **options)
    assert type(inner(ours)) is FlatAdamW and type(inner(torchs)) is torch.optim.AdamW
    assert len(inner(ours)._held) == 1
    for (name, found), (_, want) in zip(weights(ours).items(), weights(torchs).items(), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-7, msg=name)
    norms = [
        [entry["grad_norm"] for entry in made.state.log_history if "loss" in entry] for made in (ours, torchs)
    ]
    torch.testing.assert_close(*map(torch.tensor, norms), rtol=1e-5, atol=0)
    states = [inner(made).state_dict()["state"] for made in (ours, torchs)]
    assert states[0].keys() == states[1].keys()
    for key, want in states[1].items():
        for name in ("step", "exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(states[0][key][name], want[name], rtol=1e-4, atol=1e-9)


def test_one_tensor_is_updated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    real = torch._fused_adamw_

    def fused(params: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append([p.numel() for p in params])
        return real(params, *args, **kwargs)

    monkeypatch.setattr(torch, "_fused_adamw_", fused)
    made = run(tmp_path, steps=2)
    assert seen == [[made._steps._step._flat[0].values.numel()]] * 2


def test_what_is_not_flat_is_updated_too(tmp_path: Path) -> None:
    model = adapter_model()
    norm = model.base_model.model.model.norm.weight
    norm.requires_grad_(True)
    before = norm.detach().clone()
    made = run(tmp_path, model=model)
    assert made._steps.whole_gradient() is None and len(inner(made)._held) == 1
    assert not torch.equal(before, norm)


@pytest.mark.parametrize("order", [("ours", "torchs"), ("torchs", "ours")])
def test_states_of_one_are_the_others(order: tuple[str, str], tmp_path: Path) -> None:
    """A checkpoint of torch's goes on with ours, and the other way round."""
    first = run(tmp_path / "1", flat=order[0] == "ours", steps=3, save_strategy="steps", save_steps=3)
    folder = str(tmp_path / "1" / "checkpoint-3")
    found = {}
    for kind in order:
        model = copy.deepcopy(first.model)
        made = made_for(tmp_path / kind, model, flat=kind == "ours", max_steps=5)
        made.train(resume_from_checkpoint=folder)
        found[kind] = made
    assert len(inner(found["ours"])._held) == 1
    for (name, one), (_, two) in zip(
        weights(found["ours"]).items(), weights(found["torchs"]).items(), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("how", ["not flat any more", "in two groups"])
def test_steps_are_counted_on(how: str, tmp_path: Path) -> None:
    """Where storage is no longer flat, every parameter goes on from as many steps as there were."""
    made = run(tmp_path, steps=3)
    optimizer = inner(made)
    flat = made._steps._step._flat[0]
    group = optimizer.param_groups[0]
    for p, buffer in made._steps._step._gradients:
        p.grad = buffer
    if how == "in two groups":
        moved = group["params"].pop()
        optimizer.add_param_group({**group, "params": [moved]})
    else:
        optimizer._flats = list
    optimizer.step()
    assert not optimizer._held
    assert {float(optimizer.state[p]["step"]) for p in flat.parameters} == {4.0}


def stepped(made: Any) -> set[float]:
    """One more step of the optimizer alone; the counts of steps afterwards."""
    for p, buffer in made._steps._step._gradients:
        p.grad = buffer
    inner(made).step()
    return {float(own["step"]) for own in inner(made).state_dict()["state"].values()}


def test_states_loaded_from_itself(tmp_path: Path) -> None:
    made = run(tmp_path, steps=2)
    inner(made).load_state_dict(inner(made).state_dict())
    assert stepped(made) == {3.0} and stepped(made) == {4.0} and len(inner(made)._held) == 1


def test_states_that_were_moved(tmp_path: Path) -> None:
    """Off and back again, as offloading does it: same tensors, other memory."""
    made = run(tmp_path, steps=2)
    own = next(iter(inner(made).state.values()))
    own["exp_avg"].data = own["exp_avg"].clone()
    own["exp_avg"].fill_(0.25)
    assert stepped(made) == {3.0}
    held = inner(made)._held[0]
    again = next(iter(inner(made).state.values()))["exp_avg"]
    assert again.data_ptr() == held.views[0][0].data_ptr() and again.min() > 0.1


def test_states_of_some_that_begin_anew(tmp_path: Path) -> None:
    made = run(tmp_path, steps=2)
    optimizer = inner(made)
    optimizer.state.pop(next(iter(optimizer.state)))
    assert stepped(made) == {1.0, 3.0} and not optimizer._held
    assert stepped(made) == {2.0, 4.0}


@pytest.mark.parametrize("option", ["amsgrad", "fused"])
def test_a_group_that_takes_another_way(option: str, tmp_path: Path) -> None:
    made = run(tmp_path, steps=2)
    for group in inner(made).param_groups:
        group[option] = option == "amsgrad"
    if option == "amsgrad":
        for own in inner(made).state.values():
            own["max_exp_avg_sq"] = torch.zeros_like(own["exp_avg_sq"])
    assert stepped(made) == {3.0} and not inner(made)._held


def test_a_copy_is_torchs(tmp_path: Path) -> None:
    made = run(tmp_path, steps=2)
    copied = copy.deepcopy(inner(made))
    for group in copied.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    copied.step()
    assert {float(own["step"]) for own in copied.state.values()} == {3.0}


def test_an_optimizer_of_the_callers_stays(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=1, **FUSED)
    own = torch.optim.AdamW([p for p in made.model.parameters() if p.requires_grad], lr=1e-3, fused=True)
    made.optimizer = own
    made.train()
    assert inner(made) is own


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_other_optimizers_stay(optim: str, tmp_path: Path) -> None:
    made = run(tmp_path, optim=optim, steps=1)
    assert type(inner(made)) in (torch.optim.AdamW, torch.optim.SGD)


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping(max_norm: float, device: torch.device) -> None:
    gradient = torch.randn(5000, generator=torch.Generator().manual_seed(0)).to(device)
    want = gradient.clone().requires_grad_()
    want.grad = gradient.clone()
    norm = torch.nn.utils.clip_grad_norm_([want], max_norm)
    found = clip_flat_(gradient, max_norm)
    torch.testing.assert_close(found, norm)
    torch.testing.assert_close(gradient, want.grad)
