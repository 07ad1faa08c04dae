"""The layout that cuDNN is told: plans are interpreted here, so offsets, lengths and strides are checked on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pronghorn.kernels.attention import AttentionCall, Documents, cudnn_ragged, flash, per_document
from pronghorn.kernels.attention.cudnn_plans import Geometry, bucket
from tests.kernels.attention_reference import Case, assert_as_good


class Interpreted:
    """Stands in for `PLANS`: a "plan" is its geometry, run document by document through the offsets it is given."""

    def __init__(self, refused: tuple[str, ...] = ()) -> None:
        self.geometries: list[Geometry] = []
        self.refused = refused

    def get(self, stage: str, geometry: Geometry, build: object) -> Geometry | None:
        self.geometries.append(geometry)
        return None if stage in self.refused else geometry

    def run(self, g: Geometry, tensors: dict[str, Tensor], device: torch.device) -> None:
        call = AttentionCall(g.scale, g.window, "eager")
        for number, length in enumerate(self.lengths(g, tensors)):
            assert length <= g.longest
            view = Document(g, tensors, number, length)
            q, k, v = (view.of(name, heads, row) for name, heads, row in g_inputs(g))
            docs = Documents(torch.tensor([0, length], dtype=torch.int32), length, (length,))
            o, stats = (view.of(name, g.heads, row) for name, row in (("o", g.out_row), ("stats", g.heads)))
            if "do" not in tensors:
                out, lse = per_document.eager_forward(q, k, v, docs, call)
                o.copy_(out)
                stats.copy_(lse[..., None])
                continue
            dout = view.of("do", g.heads, g.out_row, offset="o")
            grads = per_document.eager_backward(dout, q, k, v, o, stats.squeeze(-1), docs, call)
            view.of("dq", g.heads, g.out_row, offset="o").copy_(grads[0])
            view.of("dk", g.kv_heads, g.kv_row).copy_(grads[1])
            view.of("dv", g.kv_heads, g.kv_row, offset="dk").copy_(grads[2])

    def lengths(self, g: Geometry, tensors: dict[str, Tensor]) -> list[int]:
        if g.dense:
            assert not any(name.endswith("offset") or name == "lengths" for name in tensors)
            return [g.longest] * g.documents
        assert tensors["lengths"].shape == (g.documents, 1, 1, 1)
        assert tensors["lengths"].dtype == torch.int32
        found: list[int] = tensors["lengths"].flatten().tolist()
        return found


def g_inputs(g: Geometry) -> tuple[tuple[str, int, int], ...]:
    return ("q", g.heads, g.q_row), ("k", g.kv_heads, g.k_row), ("v", g.kv_heads, g.v_row)


class Document:
    """One document's rows in each tensor, found as cuDNN finds them: base pointer, offset in elements, strides."""

    def __init__(self, g: Geometry, tensors: dict[str, Tensor], number: int, length: int) -> None:
        self.g, self.tensors, self.number, self.length = g, tensors, number, length

    def of(self, name: str, heads: int, row: int, offset: str | None = None) -> Tensor:
        tensor = self.tensors[name]
        width = 1 if name == "stats" else self.g.head_dim
        if self.g.dense:
            begin = self.number * self.length * row
            return tensor.as_strided(
                (self.length, heads, width), (row, width, 1), tensor.storage_offset() + begin
            )
        offsets = self.tensors[f"{offset or name}_offset"]
        assert offsets.dtype == torch.int64
        assert offsets.shape == (self.g.documents + 1, 1, 1, 1)
        begin, end = offsets.flatten()[self.number : self.number + 2].tolist()
        assert end - begin == self.length * row
        return tensor.as_strided(
            (self.length, heads, width), (row, width, 1), tensor.storage_offset() + begin
        )


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> Interpreted:
    found = Interpreted()
    monkeypatch.setattr(cudnn_ragged, "PLANS", found)
    return found


CASES = [
    pytest.param(Case((7, 0, 30, 1, 2), 4, 2, 16), id="mixed"),
    pytest.param(Case((7, 30), 4, 1, 16, window=5), id="window"),
    pytest.param(Case((7, 30), 2, 2, 16, sinks=True), id="sinks"),
    pytest.param(Case((128, 128, 128), 4, 2, 16), id="one length"),
    pytest.param(Case((128, 128), 2, 1, 16, window=40), id="one length, window"),
]


@pytest.mark.parametrize(
    "lengths,longest,dense",
    [
        ((256, 256, 256), 256, True),
        ((256,), 256, True),
        ((256, 256, 0), 256, False),
        ((256, 255), 256, False),
        ((200, 200), 200, False),  # would be rounded up: a plan for every length there is
        ((256, 256), 512, False),  # the longest is said to be longer than it is
        ((64, 64), 64, False),
    ],
)
def test_which_batches_have_one_length(
    lengths: tuple[int, ...], longest: int, dense: bool, plans: Interpreted
) -> None:
    case = Case(lengths, 2, 2, 16)
    inputs = [x.detach().float() for x in case.inputs(torch.float32, torch.device("cpu"))]
    docs = Documents(torch.tensor((0, *lengths)).cumsum(0).to(torch.int32), longest)
    cudnn_ragged.forward(*inputs[:3], docs, AttentionCall(0.25, None, "cudnn"))
    assert plans.geometries[0].dense is dense


def test_offsets_beyond_32_bits_stay_ragged() -> None:
    assert cudnn_ragged._is_dense(1, 2**19, 2**19, 2**11)
    assert not cudnn_ragged._is_dense(1, 2**20, 2**20, 2**11)


@pytest.mark.parametrize("wide", [False, True], ids=["contiguous", "columns of a buffer"])
@pytest.mark.parametrize("case", CASES)
def test_layout(case: Case, wide: bool, plans: Interpreted) -> None:
    exact = case.inputs(torch.float32, torch.device("cpu"))
    low = [x.detach().float().requires_grad_() for x in exact]
    dout = torch.randn(low[0].shape, generator=torch.Generator().manual_seed(2))
    inputs = list(low)
    if wide:
        buffer = torch.cat([x.detach().flatten(1) for x in low[:3]], dim=1)
        columns = buffer.split([x[0].numel() for x in low[:3]], dim=1)
        inputs[:3] = [c.view(x.shape) for c, x in zip(columns, low, strict=False)]
    ours = case.ours("cudnn", inputs, dout, case.documents(torch.device("cpu")))
    assert_as_good(ours, case.truth(low, dout), case.truth(exact, dout))
    assert plans.geometries[0].window == case.window
    forward, backward = plans.geometries
    assert wide == (forward.q_row > case.heads * case.head_dim)
    assert (backward.q_row, backward.k_row, backward.v_row) == (backward.out_row, *[backward.kv_row] * 2)


def test_a_window_of_a_whole_document_is_none(plans: Interpreted) -> None:
    case = Case((7, 30), 2, 2, 16, window=30)
    inputs = [x.detach().float() for x in case.inputs(torch.float32, torch.device("cpu"))]
    case.ours("cudnn", inputs, torch.ones_like(inputs[0]), case.documents(torch.device("cpu")))
    assert plans.geometries[0].window is None


@pytest.mark.parametrize("refused", [("forward",), ("backward",), ("forward", "backward")], ids="-".join)
def test_flash_takes_the_place_of_a_missing_plan(
    refused: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either pass alone, with its statistics in the other's layout."""

    def forward(
        q: Tensor, k: Tensor, v: Tensor, docs: Documents, call: AttentionCall
    ) -> tuple[Tensor, Tensor]:
        out, lse = per_document.cpu_forward(q, k, v, docs, call)
        return out, lse.t().contiguous()

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: object
    ) -> object:
        assert lse.is_contiguous()
        return per_document.cpu_backward(dout, q, k, v, out, lse.t(), *rest)

    monkeypatch.setattr(cudnn_ragged, "PLANS", Interpreted(refused))
    monkeypatch.setattr(flash, "forward", forward)
    monkeypatch.setattr(flash, "backward", backward)
    case = Case((7, 0, 30), 4, 2, 16)
    exact = case.inputs(torch.float32, torch.device("cpu"))
    low = [x.detach().float().requires_grad_() for x in exact]
    dout = torch.randn(low[0].shape, generator=torch.Generator().manual_seed(2))
    ours = case.ours("cudnn", low, dout, case.documents(torch.device("cpu")))
    assert_as_good(ours, case.truth(low, dout), case.truth(exact, dout))


@pytest.mark.parametrize("room", [2 * 4 * 4 * 128**2, 2 * 4 * 4 * 128**2 - 1], ids=["fits", "does not fit"])
def test_determinism_that_costs_too_much_is_flash_attentions(
    room: int, plans: Interpreted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three documents count as four, 30 tokens as 128."""
    ran = []

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: object
    ) -> object:
        ran.append(lse.shape)
        return per_document.cpu_backward(dout, q, k, v, out, lse.t(), *rest)

    monkeypatch.setattr(flash, "backward", backward)
    monkeypatch.setattr(cudnn_ragged, "MOST_PAIR_BYTES", room)
    case = Case((7, 0, 30), 4, 2, 16)
    inputs = [x.detach().float() for x in case.inputs(torch.float32, torch.device("cpu"))]
    dout = torch.randn_like(inputs[0])
    docs = case.documents(torch.device("cpu"))
    plain = case.ours("cudnn", inputs, dout, docs)
    assert not ran
    torch.use_deterministic_algorithms(True)
    try:
        ours = case.ours("cudnn", inputs, dout, docs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert bool(ran) == (room < 2 * 4 * 4 * 128**2)
    for name, value in plain.items():
        torch.testing.assert_close(ours[name], value)


def test_buckets_hold_what_they_are_for_and_are_few() -> None:
    for number in (1, 2, 3, 63, 64, 65, 1000, 1023, 1025, 8192, 8193, 100_000):
        documents, longest, tokens = bucket(number, number, number)
        assert number <= documents < 2 * number + 1
        assert number <= longest <= max(128, 2 * number)
        assert number <= tokens <= number + max(1024, number // 4)
    assert len({bucket(40, length, 8192) for length in range(100, 5000)}) <= 7
    assert len({bucket(40, 512, tokens)[2] for tokens in range(8193, 16385)}) == 4


def test_documents_derive_once() -> None:
    docs = Documents(torch.tensor([0, 3, 3, 10], dtype=torch.int32), 7)
    assert docs.document_of_token(10).tolist() == [0] * 3 + [2] * 7
    cu, lengths = docs.padded(5)
    assert cu.tolist() == [0, 3, 3, 10, 10, 10]
    assert lengths.tolist() == [3, 0, 7, 0, 0]
    offsets = docs.element_offsets(4, 1 << 40)
    assert offsets.flatten().tolist() == [x << 40 for x in (0, 3, 3, 10, 10)]
    assert docs.element_offsets(4, 1 << 40) is offsets
