"""The trainer's data: what is supervised, streams, dictionaries, formatting functions, response markers."""

from __future__ import annotations

import peft
import pytest
import torch
from datasets import Dataset, DatasetDict

from pronghorn import train_on_responses_only
from pronghorn.errors import NothingSupervised, PronghornError, TokenizerProblem
from pronghorn.training import SFTTrainer
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.runs import adapter_model, chats, losses, settings, trainer

PARTS = {"instruction_part": "<|im_start|>user\n", "response_part": "<|im_start|>assistant\n"}


def trained_texts(row) -> list[str]:
    """Supervised stretches of a prepared row."""
    tokenizer = tiny_tokenizer()
    ids = [
        token if label != -100 else None for token, label in zip(row["input_ids"], row["labels"], strict=True)
    ]
    stretches, current = [], []
    for token in [*ids, None]:
        if token is not None:
            current.append(token)
        elif current:
            stretches.append(tokenizer.decode(current))
            current = []
    return stretches


def test_assistant_only_loss(tmp_path):
    run = trainer(tmp_path, assistant_only_loss=True, rows=chats(3))
    assert run.args.assistant_only_loss
    assert trained_texts(run.train_dataset[0]) == ["because <|im_end|>"]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("parts", [PARTS, {}], ids=["given", "found"])
def test_responses_only_by_markers(tmp_path, packing, parts):
    rows = Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": "one?"},
                    {"role": "assistant", "content": f"first {i}"},
                    {"role": "user", "content": "two?"},
                    {"role": "assistant", "content": "\nsecond"},
                ]
            }
            for i in range(3)
        ]
    )
    run = trainer(tmp_path, rows=rows, packing=packing, max_length=500, eval_dataset={"held": rows})
    assert train_on_responses_only(run, **parts) is run
    # Between markers lies the newline behind a turn, too; the template's spans end with the turn.
    end = "<|im_end|>\n" if parts else "<|im_end|>"
    expected = [f"first {i}{end}" if k else f"\nsecond{end}" for i in range(3) for k in (1, 0)]
    for dataset in (run.train_dataset, run.eval_dataset["held"]):
        assert len(dataset) == (1 if packing else 3)
        found = [text for row in dataset for text in trained_texts(row)]
        assert found == expected
    run.train()


def test_response_markers_that_do_not_occur(tmp_path):
    run = trainer(tmp_path)
    with pytest.raises(NothingSupervised, match="response marker"):
        train_on_responses_only(run, "### User", "### Assistant")
    with pytest.raises(ValueError, match="both"):
        train_on_responses_only(run, instruction_part="x")


def test_rows_that_are_not_of_the_chat_template(tmp_path):
    run = trainer(tmp_path, rows=[{"text": "plain"}] * 2)
    with pytest.raises(NothingSupervised, match="after an answer's beginning"):
        train_on_responses_only(run)
    with pytest.raises(TokenizerProblem):
        train_on_responses_only(run, tokenizer=tiny_tokenizer(chat_template=False))


def test_the_function_alone():
    ids = tiny_tokenizer()("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n")["input_ids"]
    mask = train_on_responses_only(None, tokenizer=tiny_tokenizer(), return_function=True)
    assert trained_texts({"input_ids": ids, **mask({"input_ids": ids})}) == ["b<|im_end|>"]


def test_streams(tmp_path):
    whole = trainer(tmp_path / "a", rows=chats(8), max_steps=2)
    stream = trainer(tmp_path / "b", rows=chats(8).to_iterable_dataset(), max_steps=2)
    packed = trainer(
        tmp_path / "c", rows=chats(8).to_iterable_dataset(), max_steps=2, packing=True, max_length=128
    )
    for run in (whole, stream, packed):
        run.train()
        assert len(losses(run)) == 2


def test_evaluation_rows_packed_or_not(tmp_path):
    held = chats(6)
    packed = trainer(tmp_path / "a", packing=True, max_length=200, eval_dataset=held)
    plain = trainer(tmp_path / "b", packing=True, max_length=200, eval_dataset=held, eval_packing=False)
    only = trainer(tmp_path / "c", max_length=200, eval_dataset=held, eval_packing=True)
    assert len(packed.eval_dataset) == len(only.eval_dataset) < len(plain.eval_dataset) == 6
    assert "seq_lengths" not in only.train_dataset.column_names
    expected = packed.evaluate()["eval_loss"]
    for run in (plain, only):
        assert run.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_formatting_function_and_lists_of_rows(tmp_path):
    run = trainer(
        tmp_path,
        rows=[{"q": "a?", "a": "b"}, {"q": "c?", "a": "d"}],
        formatting_func=lambda row: row["q"] + row["a"],
    )
    assert tiny_tokenizer().decode(run.train_dataset[1]["input_ids"]) == "c?d<|end|>"


def test_completion_only_follows_trl(tmp_path):
    rows = [{"prompt": "a?", "completion": " b"}] * 4
    assert trained_texts(trainer(tmp_path / "a", rows=rows).train_dataset[0]) == [" b<|end|>"]
    full = trainer(tmp_path / "b", rows=rows, completion_only_loss=False)
    assert trained_texts(full.train_dataset[0]) == ["a? b<|end|>"]


def test_token_rows_go_straight_through(tmp_path):
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8], "source": "x"}] * 4
    run = trainer(tmp_path, rows=rows)
    assert run.train_dataset[0] == {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8], "rows": [0]}


def test_chat_rows_without_a_chat_template(tmp_path):
    with pytest.raises(TokenizerProblem, match="PH104"):
        SFTTrainer(
            model=adapter_model(), args=settings(tmp_path), train_dataset=chats(2),
            processing_class=tiny_tokenizer(chat_template=False),
        )  # fmt: skip


def test_rows_without_an_answer(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "?"}]}]
    with pytest.raises(NothingSupervised, match="PH302"):
        trainer(tmp_path, rows=rows, assistant_only_loss=True)


def test_predict_takes_rows_of_every_kind(tmp_path):
    """As `evaluate` does, never packed: one prediction for each row, in their order."""
    run = trainer(tmp_path, packing=True, max_length=200, eval_dataset=chats(6), eval_packing=False)
    raw, ready = run.predict(chats(6)), run.predict(run.eval_dataset)
    lengths = [len(row["input_ids"]) for row in run.eval_dataset]
    assert raw.predictions.shape == (6, max(lengths), 320)
    assert [int((row != -100).sum()) for row in raw.label_ids] == [length - 1 for length in lengths]
    for done in (raw, ready):
        assert done.metrics["test_loss"] == pytest.approx(run.evaluate()["eval_loss"], rel=1e-5)


@pytest.mark.parametrize(
    "rows, message",
    [
        (["one", "two"], "a row is str"),
        ("rows.jsonl", "not the name 'rows.jsonl'"),
        (
            DatasetDict(train=Dataset.from_list([{"text": "one"}])),
            r"several data sets: train.*data\['train'\]",
        ),
        ([{"input_ids": [5, 6, 900]}], "input_ids holds 900 and the model has tokens 0 to 319"),
        ([{"text": "one"}, {"text": None}], r"'text' is empty \(null\), not text \(row 1"),
    ],
)
def test_data_that_is_none(tmp_path, rows, message):
    with pytest.raises(PronghornError, match=message):
        trainer(tmp_path, rows=rows)


@pytest.mark.parametrize("method", [peft.PromptTuningConfig, peft.PrefixTuningConfig])
def test_virtual_tokens_stand_before_each_row(tmp_path, method):
    """PEFT puts them before rows; before a stream, all documents but the first would be without."""
    curves = []
    for size in (4, 1):
        torch.manual_seed(0)
        model = peft.get_peft_model(tiny_model("llama"), method(task_type="CAUSAL_LM", num_virtual_tokens=4))
        run = trainer(
            tmp_path / str(size), model=model, rows=chats(4), max_steps=2,
            per_device_train_batch_size=size, gradient_accumulation_steps=4 // size,
        )  # fmt: skip
        assert next(iter(run.get_train_dataloader()))["input_ids"].shape[0] == size
        run.train()
        curves.append(losses(run))
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


def test_a_stream_with_more_tokens_than_its_documents_is_refused():
    model = adapter_model()
    batch = {"cu_seq_lens_q": torch.tensor([0, 3], dtype=torch.int32), "max_length_q": 3}
    with pytest.raises(ValueError, match="documents of 3 tokens in a stream of 5"):
        model(input_ids=torch.arange(5)[None], use_cache=False, document_lengths=(3,), **batch)
