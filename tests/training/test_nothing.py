"""Runs that train nothing, and runs whose output folder cannot be written: told before anything is done."""

from __future__ import annotations

import pytest
import torch

from pronghorn.errors import SaveFailed, UnknownArgument
from tests.training.runs import adapter_model, trainer


@pytest.mark.parametrize(("name", "options"), [("max_steps", {}), ("num_train_epochs", {"max_steps": -1})])
def test_nothing_is_trained_and_that_is_said(tmp_path, caplog, name, options) -> None:
    model = adapter_model()
    before = [p.clone() for p in model.parameters()]
    result = trainer(tmp_path, model, **{**options, name: 0}).train()
    assert result.global_step == 0 and f"{name}=0: nothing is trained" in caplog.text
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_an_output_folder_that_cannot_be_written_is_told_before_training(tmp_path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(SaveFailed, match=r"PH601.*run's output") as caught:
        trainer(tmp_path / "taken" / "run", adapter_model())
    assert "taken" in str(caught.value.where)


def test_a_model_whose_parameters_are_all_frozen(tmp_path) -> None:
    model = adapter_model().requires_grad_(False)
    with pytest.raises(UnknownArgument, match="no parameter of the model is to be trained"):
        trainer(tmp_path, model).train()
