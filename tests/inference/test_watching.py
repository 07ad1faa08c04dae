"""Numbers that tell whether weights have been written to, by CPU and by other devices' way."""

from __future__ import annotations

import pytest
import torch

from pronghorn.inference import watching
from pronghorn.inference.watching import Watch, _norms_and_maxima, _sums_of


@pytest.mark.parametrize("numbers_of", [_sums_of, _norms_and_maxima])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_writes_are_seen(numbers_of, dtype):
    stored = torch.randn(81, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    tensors = [stored[:40].view(4, 10), stored[41:].view(5, 8)]  # the second one begins between two words
    before = numbers_of(tensors)
    assert numbers_of(tensors) == before
    tensors[1].neg_()
    negated = numbers_of(tensors)
    assert negated != before
    tensors[1].mul_(1.01)
    assert numbers_of(tensors) not in (before, negated)
    tensors[0][0, 0] = float("nan")
    assert numbers_of(tensors) == numbers_of(tensors), "what is no number has not changed either"


def test_of_large_weights_a_part_is_read(monkeypatch):
    """An optimizer's step that torch does not count is seen by it; what is small is read whole."""
    for name, value in (("WHOLE", 1000), ("WINDOW", 4), ("EVERY", 64)):
        monkeypatch.setattr(watching, name, value)
    model = torch.nn.Sequential(torch.nn.Linear(50, 40), torch.nn.Linear(40, 3))
    large, small = model[0].weight, model[1].weight
    part = watching.part_of(large)
    assert part.shape == (2000 // 64, 4) and part.data_ptr() == large.data_ptr()
    assert watching.part_of(small) is small
    watch = Watch(model)
    assert not watch.changed()
    optimizer = torch.optim.SGD([large], lr=1e-3, fused=True)
    large.grad = torch.ones_like(large)
    version = large._version
    optimizer.step()
    assert large._version == version, "counted by torch: nothing is shown here"
    assert watch.changed()
    watch = Watch(model)
    small.data[2, 39] += 1
    assert watch.changed()


def test_a_row_of_a_large_embedding_is_not_passed_by():
    embedding = torch.nn.Embedding(4200, watching.EVERY)
    assert embedding.weight.numel() > watching.WHOLE
    for row in (0, 77, 4199):
        watch = Watch(embedding)
        embedding.weight.data[row] += 1
        assert watch.changed()


def test_all_of_a_gpu_are_read_at_once(monkeypatch):
    monkeypatch.setattr(watching, "WHOLE", 1000)
    monkeypatch.setattr(watching, "EVERY", 64)
    tensors = [torch.randn(50, 40), torch.randn(7, 2).bfloat16(), torch.randn(100)]
    read = watching._AtOnce(tensors)

    def numbers():
        read.begin()
        return read.wait()

    before = numbers()
    assert numbers() == before
    tensors[0].data[3] *= 1.001
    changed = numbers()
    assert changed != before
    tensors[1].data[6, 1] = 0.0
    assert numbers() not in (before, changed)
    tensors[2].untyped_storage().resize_(0)
    assert numbers() is None, "what is not there is not read"


def test_what_may_be_trained_now_is_seen():
    model = torch.nn.Linear(4, 4).requires_grad_(False)
    watch = Watch(model)
    model.weight.data.mul_(2)
    assert not watch.changed(), "frozen: written to by nobody who does not count it"
    model.requires_grad_(True)
    assert watch.changed()
