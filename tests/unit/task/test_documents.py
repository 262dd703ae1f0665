"""Documents become windows of tokens: every token after the first is scored once, with the library's own loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ray_soup.errors import RecipeError
from ray_soup.io.progress import drain
from ray_soup.recipe import Data
from ray_soup.task.data import Examples, load_sources
from ray_soup.task.leaks import check_leaks
from ray_soup.task.models import build
from ray_soup.task.objective import IGNORED, OBJECTIVES
from ray_soup.task.tokenized import check_data
from ray_soup.task.windows import Document, windows
from tests.unit.task.language_models import (
    CHATML,
    MARKED,
    TEXTS,
    bert_for,
    byte_tokenizer,
    gpt2,
    llama,
    saved,
    sum_and_count,
)

MODELS: dict[str, Callable[[], nn.Module]] = {"llama": llama, "tied": lambda: llama(tied=True), "gpt2": gpt2}
CHAT = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "Six: 6."},
]
# An item of a function's dataset for each row of TEXTS
TEXT_ROWS = [{"text": text} for text in TEXTS]


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text("\n".join(map(json.dumps, rows)))
    return file


def load(spec: str, file: Path | str) -> Examples:
    built = build(spec)
    targets = OBJECTIVES[built.objective].targets
    data = Data(fit=str(file))
    check_data(data, targets, built.objective)
    return drain(load_sources(data, built.preprocess, targets=targets))["fit"]


def rows_of(examples: Examples) -> list[tuple[list[int], list[int]]]:
    """Token ids and targets of each example, without padding."""
    ends = zip(examples.images, examples.labels, examples.lengths, strict=True)
    return [(ids[0, :end].tolist(), targets[:end].tolist()) for ids, targets, end in ends]


def scored_texts(examples: Examples, tokenizer: Any) -> list[str]:
    """What is scored of each document."""
    found: dict[int, list[int]] = {}
    for group, (_, targets) in zip(examples.groups, rows_of(examples), strict=True):
        found.setdefault(int(group), []).extend(t for t in targets if t != IGNORED)
    return [tokenizer.decode(ids) for ids in found.values()]


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(llama(), byte_tokenizer(template=MARKED), tmp_path_factory.mktemp("model") / "m")


@given(st.integers(0, 40), st.integers(2, 12), st.integers(1, 11))
def test_every_token_after_the_first_is_the_target_of_one_place_which_is_before_it(n: int, length: int, stride: int) -> None:
    stride = min(stride, length - 1)
    ids = np.arange(n, dtype=np.int32)
    found = list(windows(Document(ids, ids.astype(np.int64)), length, stride))
    targets = [(window[place], target) for window, row in found for place, target in enumerate(row) if target != IGNORED]
    assert [after for _, after in targets] == list(range(1, n))
    assert all(before + 1 == after for before, after in targets)
    assert all(1 < len(window) <= length for window, _ in found)
    assert all(window[0] % stride == 0 for window, _ in found)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", ["", "?length=33", "?length=32&stride=20"])
def test_the_loss_of_each_document_is_that_of_the_library(tmp_path: Path, name: str, options: str) -> None:
    """One window holds a document, or windows as `model(labels=...)` scores them; for batches of 1, 3 and all."""
    model, words = MODELS[name](), byte_tokenizer()
    spec = saved(model, words, tmp_path / "m") + options
    examples = load(spec, write(tmp_path / "d.jsonl", TEXT_ROWS))
    length = int(options.partition("length=")[2].partition("&")[0] or 512)
    stride = int(options.partition("stride=")[2] or length - 1)
    expected = {}
    for number, text in enumerate(TEXTS):
        ids, done, total = words(text)["input_ids"], 1, np.zeros(2)
        for first in range(0, len(ids), stride):
            window = ids[first : first + length]
            labels = [token if first + place >= done else -100 for place, token in enumerate(window)]
            total += sum_and_count(model, window, labels)
            done = max(done, first + length)
        if total[1]:
            assert total[1] == len(ids) - 1
            expected[number] = total
    built, objective = build(spec), OBJECTIVES["causal_lm"]()
    built.model.load_state_dict(model.state_dict())
    for size in (1, 3, len(examples)):
        found: dict[int, np.ndarray] = {}
        for rows in np.array_split(np.arange(len(examples)), -(-len(examples) // size)):
            inputs, targets = examples.batch(rows, torch.device("cpu"))
            with torch.inference_mode():
                outputs = built.model.eval()(inputs)
            pairs = zip(objective.losses(outputs, targets).tolist(), objective.weights(targets).tolist(), strict=True)
            for group, pair in zip(examples.groups[rows].tolist(), pairs, strict=True):
                found[group] = found.get(group, np.zeros(2)) + pair
        assert found.keys() == expected.keys()
        for number, total in expected.items():
            assert found[number] == pytest.approx(total, rel=1e-5)


def test_bytes_are_those_of_the_documents_in_utf_8(tmp_path: Path, spec: str) -> None:
    examples = load(f"{spec}?length=16", write(tmp_path / "d.jsonl", TEXT_ROWS))
    for number, text in enumerate(TEXTS):
        assert examples.bytes[examples.groups == number].sum() == pytest.approx(len(text.encode()))
    assert examples.notes[0].startswith(f"data.fit: 7 documents (`text`) in {len(examples)} windows of up to 16 tokens; ")
    assert examples.notes[0].endswith(" 1 have nothing to score and were left out.")
    assert examples.where(len(examples) - 1) == "row 6"


@pytest.mark.slow
def test_all_kinds_of_files_give_the_same_examples(tmp_path: Path, spec: str) -> None:
    import datasets

    write(tmp_path / "a.jsonl", TEXT_ROWS)
    (tmp_path / "b.json").write_text(json.dumps(TEXT_ROWS, ensure_ascii=False, indent=1), encoding="utf-8")
    write(tmp_path / "c.parquet", TEXT_ROWS)
    datasets.Dataset.from_list(TEXT_ROWS).save_to_disk(tmp_path / "d")
    (tmp_path / "e").mkdir()
    write(tmp_path / "e" / "1.parquet", TEXT_ROWS[:3])
    write(tmp_path / "e" / "2.parquet", TEXT_ROWS[3:])
    sources = [*(str(tmp_path / name) for name in ("a.jsonl", "b.json", "c.parquet", "d", "e", "e/*.parquet"))]
    sources.append("tests.unit.task.test_documents:dataset")
    first, *others = (load(f"{spec}?length=16", source) for source in sources)
    for other in others:
        for name in ("images", "labels", "groups", "bytes", "lengths"):
            np.testing.assert_array_equal(getattr(first, name), getattr(other, name))
    assert others[3].where(len(first) - 1) == "row 3 of 2.parquet"


def dataset() -> list[dict[str, Any]]:
    return TEXT_ROWS


# Forms of rows


def test_only_the_completion_is_scored(tmp_path: Path, spec: str) -> None:
    rows = [{"prompt": "Translate: cat", "completion": " = Katze"}, {"prompt": "2 + 2", "completion": " is 4 €."}]
    examples, words = load(spec, write(tmp_path / "d.parquet", rows)), byte_tokenizer()
    assert scored_texts(examples, words) == [" = Katze", " is 4 €."]
    assert examples.bytes.tolist() == [8, 10]
    for (ids, _), row in zip(rows_of(examples), rows, strict=True):
        assert ids == words(row["prompt"] + row["completion"])["input_ids"]


@pytest.mark.parametrize(("template", "end"), [(MARKED, "</s>"), (CHATML, "</s>\n")])
@pytest.mark.parametrize("form", ["messages", "prompt"])
def test_only_what_the_assistant_wrote_is_scored(tmp_path: Path, template: str, end: str, form: str) -> None:
    words = byte_tokenizer(template=template)
    spec = saved(llama(), words, tmp_path / "m")
    row = {"messages": CHAT} if form == "messages" else {"prompt": CHAT[:3], "completion": CHAT[3:]}
    examples = load(spec, write(tmp_path / "d.jsonl", [row]))
    (ids, _), *none = rows_of(examples)
    assert not none
    assert ids == words.apply_chat_template(CHAT, tokenize=True, return_dict=True)["input_ids"]
    wanted = f"It is 4.{end}Six: 6.{end}" if form == "messages" else f"Six: 6.{end}"
    assert scored_texts(examples, words) == [wanted]
    assert examples.bytes.sum() == len(wanted.replace("</s>", "").encode())


def test_tokens_are_scored_where_labels_and_masks_say_so(tmp_path: Path, spec: str) -> None:
    rows = [
        {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
        {"input_ids": [5, 6, 7, 8]},
        {"input_ids": [5, 6, 7, 8], "completion_mask": [0, 0, 0, 1]},
        {"input_ids": [9, 9, 5, 6, 7], "attention_mask": [0, 0, 1, 1, 1]},
        {"input_ids": [5, 6, 7, 9], "labels": [5, 6, 7, -100], "attention_mask": [1, 1, 1, 0], "position_ids": [0, 1, 2, 3]},
    ]
    found = rows_of(load(spec, write(tmp_path / "d.jsonl", rows)))
    assert found == [
        ([5, 6, 7, 8], [-100, 7, 8, -100]),
        ([5, 6, 7, 8], [6, 7, 8, -100]),
        ([5, 6, 7, 8], [-100, -100, 8, -100]),
        ([5, 6, 7], [6, 7, -100]),
        ([5, 6, 7], [6, 7, -100]),
    ]


def test_the_labels_of_arrays_are_moved_as_the_library_moves_them(tmp_path: Path, spec: str) -> None:
    ids = np.random.default_rng(0).integers(2, 300, (4, 9))
    labels = np.where(np.arange(9) < 3, -100, ids)
    np.savez(tmp_path / "d.npz", input_ids=ids, attention_mask=np.ones_like(ids), labels=labels)
    examples = load(spec, tmp_path / "d.npz")
    built, objective = build(spec), OBJECTIVES["causal_lm"]()
    inputs, targets = examples.batch(np.arange(4), torch.device("cpu"))
    with torch.inference_mode():
        outputs = built.model.eval()(inputs)
    total = objective.losses(outputs, targets).sum() / objective.weights(targets).sum()
    own = nn.functional.cross_entropy(outputs[:, :-1].flatten(0, 1), torch.from_numpy(labels)[:, 1:].flatten())
    assert total.item() == pytest.approx(own.item(), rel=1e-6)


FAULTS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "no column": ([{"body": "a"}], r"has the columns body; expected `input_ids`; `messages`; `prompt` and `completion`"),
    "null": ([{"text": "a b"}, {"text": None}], r"row 1: `text` is 'None'; expected a string"),
    "number": ([{"text": 3}], r"row 0: `text` is '3'"),
    "surrogate": ([{"text": "\ud800"}], r"row 0: `text` is not valid Unicode"),
    "boundary": ([{"prompt": "1 squ", "completion": "ared is 1."}], r"row 0: the tokens of `prompt` are not those that"),
    "lengths": ([{"input_ids": [5, 6], "labels": [5]}], r"row 0: `labels` has 1 entries and `input_ids` 2"),
    "vocabulary": ([{"input_ids": [5, 999]}], r"row 0 has the token 999; the model has embeddings for 0 to 319"),
    "nested": ([{"input_ids": [[5, 6]]}], r"row 0: `input_ids` is int64 \[1, 2\]; expected a list of integers"),
    "positions": ([{"input_ids": [5, 6, 7], "position_ids": [0, 1, 0]}], r"row 0: `position_ids` is not what the model"),
    "padding": ([{"input_ids": [5, 6], "labels": [5, 6], "attention_mask": [1, 0]}], r"`labels` scores padding"),
    "holes": ([{"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1]}], r"`attention_mask` has zeros between ones"),
    "no role": ([{"messages": [{"content": "a"}]}], r"row 0: found .* expected a list of messages, each with `role`"),
    "nothing": ([{"input_ids": [5, 6], "labels": [-100, -100]}], r"none of its 1 rows has a token to score"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_rows_that_cannot_be_scored_right_are_refused(tmp_path: Path, spec: str, fault: str) -> None:
    rows, said = FAULTS[fault]
    with pytest.raises(RecipeError, match=said):
        load(spec, write(tmp_path / "d.jsonl", rows))


def test_a_chat_template_whose_prefixes_differ_is_refused(tmp_path: Path) -> None:
    template = "{{ messages | length }}" + CHATML
    spec = saved(llama(), byte_tokenizer(template=template), tmp_path / "m")
    with pytest.raises(RecipeError, match=r"row 0: the chat template does not render the first messages alone as"):
        load(spec, write(tmp_path / "d.jsonl", [{"messages": CHAT}]))
    without = saved(llama(), byte_tokenizer(), tmp_path / "n")
    with pytest.raises(RecipeError, match=r"row 0: .*chat_template"):
        load(without, write(tmp_path / "d.jsonl", [{"messages": CHAT}]))


def test_damaged_json_is_refused_with_its_line(tmp_path: Path, spec: str) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "a b"}\n{"text": \n')
    with pytest.raises(RecipeError, match=r"d\.jsonl cannot be read as JSON after 1 lines"):
        load(spec, tmp_path / "d.jsonl")
    (tmp_path / "e.jsonl").write_text('["a"]\n')
    with pytest.raises(RecipeError, match=r"a list instead of an object"):
        load(spec, tmp_path / "e.jsonl")


# Models


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("?length=999", "length is 999; the model takes at most 512 tokens"),
        ("?length=1", "length is 1; a token is predicted from those before it"),
        ("?length=16&stride=16", "stride is 16 and length 16; the next window must begin before"),
        ("?classes=3", "has the unknown option 'classes'"),
        ("?attn_implementation=fast", "expected eager, sdpa, flash_attention_2 or flex_attention"),
    ],
)
def test_options_that_do_not_fit_are_refused(spec: str, options: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        build(spec + options)


def test_a_model_that_sees_later_tokens_is_refused(tmp_path: Path) -> None:
    """Also where they change its outputs by little more than rounding in bfloat16 does."""
    spec = saved(bert_for("LMHeadModel", std=0.02), None, tmp_path / "m")
    for options in ("", "?dtype=bfloat16"):
        with pytest.raises(RecipeError, match=r"is BertLMHeadModel, and its outputs depend on later tokens"):
            build(spec + options)
    assert build(saved(bert_for("LMHeadModel", is_decoder=True), None, tmp_path / "n")).objective == "causal_lm"


def test_rows_of_a_masked_language_model_are_scored_as_the_library_scores_them(tmp_path: Path) -> None:
    model, random = bert_for("ForMaskedLM"), np.random.default_rng(0)
    spec, rows = saved(model, None, tmp_path / "m"), []
    for count in (5, 12, 40):
        ids = random.integers(5, 300, count)
        rows.append({"input_ids": ids.tolist(), "labels": np.where(np.arange(count) % 3 == 1, ids, -100).tolist()})
    _same_losses(spec, model, load(spec, write(tmp_path / "d.jsonl", rows)), rows)
    with pytest.raises(RecipeError, match=r"expected `input_ids` and `labels`, for a model of the kind masked_lm"):
        load(spec, write(tmp_path / "e.jsonl", TEXT_ROWS))
    with pytest.raises(RecipeError, match=r"row 0: 65 tokens; the model takes at most 64"):
        load(spec, write(tmp_path / "f.jsonl", [{"input_ids": [5] * 65, "labels": [5] * 65}]))


def test_tags_belong_to_the_first_token_of_each_word(tmp_path: Path) -> None:
    model, words = bert_for("ForTokenClassification", num_labels=3), byte_tokenizer()
    spec, rows, expected = saved(model, words, tmp_path / "m"), [], []
    for text, tags in (("John lives in Berlin", [1, 0, 0, 2]), ("no", [0]), ("word " * 70, [1] * 70)):
        rows.append({"tokens": text.split(), "ner_tags": tags})
        found = words(text.split(), is_split_into_words=True, truncation=True, max_length=64)
        places = found.word_ids()
        first = [w is not None and w not in places[:k] for k, w in enumerate(places)]
        labels = [tags[w] if new else -100 for w, new in zip(places, first, strict=True)]
        expected.append({"input_ids": found["input_ids"], "labels": labels})
    examples = load(spec, write(tmp_path / "d.parquet", rows))
    assert rows_of(examples) == [(row["input_ids"], row["labels"]) for row in expected]
    assert examples.notes == (
        "data.fit: 3 rows (`tokens` and `ner_tags`); 1 have more than 64 tokens, and the words after these are not scored.",
    )
    _same_losses(spec, model, examples, expected)


WORDS = ["John", "lives", "in", "Berlin"]
FORMS = {
    "Sequence": lambda names: {"feature": {"names": names, "_type": "ClassLabel"}, "_type": "Sequence"},
    "List": lambda names: {"feature": {"names": names, "_type": "ClassLabel"}, "length": -1, "_type": "List"},
    "list": lambda names: [{"names": names, "_type": "ClassLabel"}],
}
"""How versions of the library `datasets` write that a column has lists of labels."""


def named_tags(file: Path, tags: list[int], names: list[str] | None, form: str = "List") -> str:
    """Write a row of words with tags, and the names of the tags as `datasets` does."""
    table = pa.Table.from_pylist([{"tokens": WORDS, "ner_tags": tags}])
    features = {"info": {"features": {"ner_tags": FORMS[form](names)}}} if names else {}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), file)
    return str(file)


def tagger(folder: Path, names: list[str] | None) -> str:
    more = {} if names is None else {"id2label": dict(enumerate(names))}
    return saved(bert_for("ForTokenClassification", num_labels=3, **more), byte_tokenizer(), folder)


def scored(examples: Examples) -> list[int]:
    return [int(target) for target in examples.labels[0] if target != IGNORED]


@pytest.mark.parametrize("form", FORMS)
def test_tags_are_matched_to_the_labels_of_the_model_by_name(tmp_path: Path, form: str) -> None:
    spec = tagger(tmp_path / "m", ["O", "B-PER", "B-LOC"])
    data = Data(
        fit=named_tags(tmp_path / "a.parquet", [1, 2, 2, 0], ["B-LOC", "B-PER", "O", "B-ORG"], form),
        select=named_tags(tmp_path / "b.parquet", [1, 0, 0, 2], ["O", "B-PER", "B-LOC"], form),
        test=named_tags(tmp_path / "c.parquet", [1, 0, 0, 2], None),
    )
    found = drain(load_sources(data, build(spec).preprocess, targets="units"))
    assert [scored(found[name]) for name in ("fit", "select", "test")] == [[1, 0, 0, 2]] * 3
    assert found["fit"].notes[-1] == (
        "data.fit: labels were renumbered by name, to those of model: B-LOC: 0 -> 2, O: 2 -> 0."
    )
    assert all("renumbered" not in note for name in ("select", "test") for note in found[name].notes)


def test_a_tag_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    spec = tagger(tmp_path / "m", ["O", "B-PER", "B-LOC"])
    data = Data(fit=named_tags(tmp_path / "a.parquet", [0, 1, 1, 2], ["B-ORG", "O", "B-LOC"]))
    said = r"data\.fit: .*its class 'B-ORG' \(label 0\) is not a class of model \(id2label .*0=O, 1=B-PER, 2=B-LOC"
    with pytest.raises(RecipeError, match=said):
        drain(load_sources(data, build(spec).preprocess, targets="units"))


def test_tags_of_two_sources_are_matched_by_name_where_the_model_names_none(tmp_path: Path) -> None:
    preprocess = build(tagger(tmp_path / "m", None)).preprocess
    fit = named_tags(tmp_path / "a.parquet", [1, 0, 0, 2], ["O", "B-PER", "B-LOC"])
    data = Data(fit=fit, test=named_tags(tmp_path / "b.parquet", [0, 2, 2, 1], ["B-PER", "B-LOC", "O"]))
    found = drain(load_sources(data, preprocess, targets="units"))
    assert scored(found["fit"]) == scored(found["test"]) == [1, 0, 0, 2]
    assert "labels were renumbered by name, to those of data.fit" in found["test"].notes[-1]
    other = Data(fit=fit, test=named_tags(tmp_path / "c.parquet", [0, 1, 1, 2], ["B-PER", "O", "B-ORG"]))
    with pytest.raises(RecipeError, match=r"data\.test: .*its class 'B-ORG' .* is not a class of data\.fit"):
        drain(load_sources(other, preprocess, targets="units"))


def _same_losses(spec: str, model: nn.Module, examples: Examples, rows: list[dict[str, Any]]) -> None:
    """The loss of each row is the library's own, alone and in a batch."""
    built = build(spec)
    built.model.load_state_dict(model.state_dict())
    objective = OBJECTIVES[built.objective]()
    inputs, targets = examples.batch(np.arange(len(rows)), torch.device("cpu"))
    with torch.inference_mode():
        found = objective.losses(built.model.eval()(inputs), targets) / objective.weights(targets)
        for loss, row in zip(found.tolist(), rows, strict=True):
            ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
            assert loss == pytest.approx(model(input_ids=ids, labels=labels).loss.item(), rel=1e-5)


# Documents as a whole


def test_a_document_in_two_sources_is_a_leak_whatever_they_are_padded_to(tmp_path: Path, spec: str) -> None:
    write(tmp_path / "fit.jsonl", TEXT_ROWS[:2])
    write(tmp_path / "test.jsonl", [{"text": "new " * 9}, TEXT_ROWS[1]])
    data = Data(fit=str(tmp_path / "fit.jsonl"), test=str(tmp_path / "test.jsonl"))
    with pytest.raises(RecipeError, match=r"share examples .* row 1 of .*test\.jsonl is row 1 of .*fit\.jsonl"):
        drain(check_leaks(data, build(f"{spec}?length=8").preprocess, "units"))


def test_the_windows_of_a_document_have_one_digest(tmp_path: Path, spec: str) -> None:
    preprocess = build(f"{spec}?length=8").preprocess
    data = Data(fit=str(write(tmp_path / "d.jsonl", TEXT_ROWS)))
    digests = drain(check_leaks(data, preprocess, "units"))["fit"]
    groups = drain(load_sources(data, preprocess, targets="units"))["fit"].groups
    pairs = set(zip(groups.tolist(), digests.tolist(), strict=True))
    assert len(pairs) == len({group for group, _ in pairs}) == len({digest for _, digest in pairs}) == 6


# Texts with one label each


def texts_and_model(name: str, folder: Path) -> tuple[str, nn.Module, Any]:
    """A classifier of 16 tokens and its tokenizer."""
    import transformers

    words = byte_tokenizer()
    words.pad_token = "</s>"
    more = {"max_position_embeddings": 16, "num_labels": 3, "pad_token_id": 1}
    torch.manual_seed(0)
    if name == "roberta":  # its first position is 2, so that 18 embeddings are for 16 tokens
        config: Any = transformers.RobertaConfig(
            vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            initializer_range=0.2, **{**more, "max_position_embeddings": 18},
        )  # fmt: skip
        model: nn.Module = transformers.RobertaForSequenceClassification(config)
    elif name == "llama":
        words.padding_side = "left"  # as many language models are saved
        config = transformers.LlamaConfig(
            vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            initializer_range=0.2, **more,
        )  # fmt: skip
        model = transformers.LlamaForSequenceClassification(config)
    else:
        model = bert_for("ForSequenceClassification", num_labels=3)
        words.model_max_length = 16
    return saved(model.eval(), words, folder), model, words


@pytest.mark.parametrize("name", ["bert", "roberta", "llama"])
def test_a_text_has_the_logits_of_the_library_alone_and_in_a_batch(tmp_path: Path, name: str) -> None:
    """Without an option texts are cut at the limit of the model, or of its tokenizer, and padded to the longest."""
    spec, model, words = texts_and_model(name, tmp_path / "m")
    texts = [text for text in TEXTS if text]
    file = write(tmp_path / "d.parquet", [{"text": text, "label": k % 3} for k, text in enumerate(texts)])
    examples = load(spec, file)
    cut = sum(len(words(text)["input_ids"]) > 16 for text in texts)
    share = f"data.fit: {cut} of 6 texts ({cut / 6:.1%}) were cut at 16 tokens."
    assert examples.notes == (f"{share} The option `length` of the model changes this.",)
    built = build(spec)
    built.model.load_state_dict(model.state_dict())
    inputs, labels = examples.batch(np.arange(6), torch.device("cpu"))
    assert labels.tolist() == [0, 1, 2, 0, 1, 2]
    short = examples.batch(np.array([1, 2]), torch.device("cpu"))[0]
    assert short.shape[2] == max(len(words(texts[k], truncation=True, max_length=16)["input_ids"]) for k in (1, 2))
    with torch.inference_mode():
        found = built.model.eval()(inputs)
        for text, logits in zip(texts, found, strict=True):
            alone = words([text], truncation=True, max_length=16, return_tensors="pt")
            alone = {key: alone[key] for key in ("input_ids", "attention_mask")}
            torch.testing.assert_close(logits, model(**alone).logits[0], rtol=1e-5, atol=1e-5)
    assert not load(f"{spec}?length=16", write(tmp_path / "e.parquet", [{"text": "a", "label": 0}])).notes
