"""The texts of a run: tokenised once, cut where the flags say, shown as the model sees them."""

import utils
from conftest import make_rows, write_jsonl
from parts.texts import TextRules, Texts, note_cut_texts, note_full_texts

import pytest
from transformers import AutoTokenizer


def test_texts_are_tokenised_once_and_cached(tiny_bert, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    call = type(tokenizer).__call__
    calls = []

    def counted(self, given, **flags):
        calls.append(given)
        return call(self, given, **flags)

    for _ in range(2):
        texts = Texts()
        places = [
            texts.add("Q: ", "where is it", True),
            texts.add("", "lamp " * 50, False),
            texts.add("Q: ", "where is it", True),
        ]
        with monkeypatch.context() as patched:
            patched.setattr(type(tokenizer), "__call__", counted)
            texts.tokenise(tokenizer, TextRules("", "", 20, 10), 0)
        assert places == [0, 1, 0]
        assert texts[0].tolist() == tokenizer("Q: where is it")["input_ids"]
        assert len(texts[1]) == 10 and texts[1][-1] == tokenizer.sep_token_id
        assert calls == [["Q: where is it"], ["lamp " * 50]]  # the second time none


@pytest.mark.parametrize(
    "query_max_len, passage_max_len, note",
    [
        (6, 20, "2 queries are cut at --query_max_len 6, but"),
        (7, 20, "1 queries are cut at --query_max_len 7, but"),
        (8, 20, None),
        (20, 5, "1 documents are cut at --passage_max_len 5, but"),
        (20, 6, None),
        (5, 5, None),
    ],
)
def test_texts_cut_at_the_shorter_of_two_lengths_are_noted(
    tiny_bert, query_max_len, passage_max_len, note, monkeypatch
):
    notes = []
    monkeypatch.setattr(utils, "NOTES", notes)
    tokenizer, texts = AutoTokenizer.from_pretrained(tiny_bert), Texts()
    for count, is_query in ((4, True), (5, True), (6, True), (4, False)):
        texts.add("", "?" * count, is_query)  # so many tokens, and [CLS] and [SEP]
    rules = TextRules("", "", query_max_len, passage_max_len)
    texts.tokenise(tokenizer, rules, 0)
    note_cut_texts(texts, rules, tokenizer)
    assert not notes if note is None else notes[0].startswith(note)


@pytest.mark.parametrize(
    "query_max_len, passage_max_len, expected",
    [
        (7, 7, ["50% of the queries reach --max_length 7, where texts are cut"]),
        (6, 6, ["100% of the queries reach --max_length 6, where texts are cut"]),
        (
            8,
            4,
            [
                "50% of the queries reach --query_max_len 8, where texts are cut",
                "100% of the documents reach --passage_max_len 4, where texts are cut",
            ],
        ),
        (9, 9, []),
    ],
)
def test_texts_that_reach_their_length_are_noted(
    tiny_bert, query_max_len, passage_max_len, expected, monkeypatch
):
    notes = []
    monkeypatch.setattr(utils, "NOTES", notes)
    texts = Texts()
    for count, is_query in ((4, True), (6, True), (3, False)):
        texts.add("", "?" * count, is_query)  # so many tokens, and [CLS] and [SEP]
    rules = TextRules("", "", query_max_len, passage_max_len)
    texts.tokenise(AutoTokenizer.from_pretrained(tiny_bert), rules, 0)
    note_full_texts(texts, rules)
    assert notes == expected


def test_per_row_prompt_replaces_the_query_prefix(tmp_path, embed_trainer):
    data = write_jsonl(
        tmp_path / "bge.jsonl",
        [{**row, "prompt": "Find it: "} for row in make_rows(20)[:10]] + make_rows(20)[10:],
    )
    trainer = embed_trainer(
        "--query_prefix", "Q: ", "--doc_prefix", "D: ", "--dev_size", 0, data=data
    )
    queries = {text for text, is_query in trainer.data_collator.texts.index if is_query}
    assert sum(text.startswith("Find it: where") for text in queries) == 10
    assert sum(text.startswith("Q: where") for text in queries) == 10
    assert all(
        text.startswith("D: ")
        for text, is_query in trainer.data_collator.texts.index
        if not is_query
    )


def test_a_language_that_the_base_cannot_read_is_noted(tmp_path, minilm, run_embed, capsys):
    rows = [
        {"query": f"序列号{i}在哪里？", "pos": [f"序列号印在电池下方的贴纸上{i}。"]}
        for i in range(8)
    ]
    run_embed("--dry_run", model=minilm, data=write_jsonl(tmp_path / "zh.jsonl", rows))
    assert "of all tokens are [UNK]: the base cannot read these texts" in capsys.readouterr().out
    rows = [{"query": f"where is number {i}?", "pos": [f"It is on sticker {i}."]} for i in range(8)]
    run_embed("--dry_run", model=minilm, data=write_jsonl(tmp_path / "en.jsonl", rows))
    assert "[UNK]" not in capsys.readouterr().out
