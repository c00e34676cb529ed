"""Tokens kept from run to run: what they depend on, and how much room they take."""

import linecache
import os
import textwrap

from conftest import CHATML, chat_tokenizer, make_chats, train_tokenizer
from parts.chats import read_example
from parts.masks import Rules
from parts.run import start
from parts.samples import tokenise
from parts.template import Chat
from parts.texts import TextRules, Texts
from parts.token_cache import TOKEN_CACHE_BYTES, cached_map, tokens_key, trim_token_cache

import datasets
import pytest
import transformers

RULES = Rules(max_length=1024, overlong="drop", train_turns="all")
SPECIAL = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The token cache, empty."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    (tmp_path / "lora_tokens").mkdir()
    return tmp_path / "lora_tokens"


def fill(folder, sizes):
    """Write files, the last used first."""
    for i, size in enumerate(sizes):
        (folder / f"{i}.arrow").write_bytes(bytes(size))
        os.utime(folder / f"{i}.arrow", (1e9 - i, 1e9 - i))


@pytest.mark.parametrize(
    "limit, left",
    [
        (60, [0, 1, 2]),
        (59, [0, 1]),
        (30, [0, 1]),
        (29, [0]),
        (9, []),
        (TOKEN_CACHE_BYTES, [0, 1, 2]),
    ],
)
def test_what_was_used_longest_ago_goes_first(folder, limit, left):
    fill(folder, [10, 20, 30])
    trim_token_cache(limit)
    assert sorted(path.name for path in folder.iterdir()) == [f"{i}.arrow" for i in left]


def test_a_run_trims_the_cache_when_it_starts(folder, tmp_path, monkeypatch):
    assert TOKEN_CACHE_BYTES == 10 * 2**30
    fill(folder, [10, 20, 30])
    monkeypatch.setattr(trim_token_cache, "__defaults__", (35,))
    start(tmp_path / "out", None, False, 42)
    assert sorted(path.name for path in folder.iterdir()) == ["0.arrow", "1.arrow"]


def test_a_cache_that_is_not_there_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "nowhere"))
    trim_token_cache()


def test_use_is_what_counts_and_files_of_many_workers_too(folder):
    def doubled(batch):
        calls.append(1)
        return {"y": [2 * x for x in batch["x"]]}

    calls = []
    for _ in range(2):
        assert cached_map({"x": [1, 2]}, doubled, "key", 0)["y"] == [2, 4]
        (file,) = folder.iterdir()
        os.utime(file, (1, 1))
    assert len(calls) == 1  # the second time they were read
    cached_map({"x": [1, 2]}, doubled, "key", 0)
    assert file.stat().st_mtime > 1e9
    other = file.with_name(f"{file.stem}_00000_of_00002.arrow")
    other.write_bytes(b"")
    os.utime(other, (1, 1))
    cached_map({"x": [1, 2]}, doubled, "key", 0)
    assert other.stat().st_mtime > 1e9


@pytest.fixture
def tokenised(folder):
    """Tokenise a few texts as both trainers do; returns how many results the cache holds."""
    examples = [read_example("x", row, None) for row in make_chats(3)]
    pieces = train_tokenizer(SPECIAL, "[CLS] $A [SEP]")
    speaker = chat_tokenizer(CHATML, "<|im_end|>", None, ["<|im_start|>"])

    def run():
        texts = Texts()
        texts.add("", "where is it?", True)
        texts.tokenise(pieces, TextRules("", "", 8, 8), 0)
        tokenise(examples, Chat(speaker, False, []), RULES, False, 0)
        return len(list(folder.iterdir()))

    return run


def test_the_same_tokens_are_made_once(tokenised):
    assert [tokenised(), tokenised()] == [2, 2]


@pytest.mark.parametrize("library", ["tokenizers", "transformers"])
def test_another_version_of_a_library_makes_its_own_tokens(tokenised, library, monkeypatch):
    assert tokenised() == 2
    monkeypatch.setattr(f"parts.token_cache.{library}.__version__", "0.0.1")
    assert tokenised() == 4


def test_another_source_text_makes_its_own_tokens(tokenised, monkeypatch):
    getlines = linecache.getlines
    assert tokenised() == 2
    monkeypatch.setattr(linecache, "getlines", lambda file: [*getlines(file), "# changed\n"])
    assert tokenised() == 4


def test_the_source_of_a_function_is_that_of_its_file_or_cell(tmp_path):
    tokenizer = train_tokenizer(SPECIAL, None)
    source = textwrap.dedent("""
        SEPARATOR = "-"


        def split(text):
            return text.split(SEPARATOR)
    """)
    spaces, found = {}, []
    for text in (source, source.replace('"-"', '"+"')):
        (tmp_path / "cell.py").write_text(text)
        exec(compile(text, str(tmp_path / "cell.py"), "exec"), spaces)
        found.append(tokens_key(tokenizer, spaces["split"])[-1])
    assert found[0] == source.splitlines(keepends=True)
    assert found[0] != found[1]  # what the function itself does not show
    exec(compile(source, "<string>", "exec"), spaces)
    unseen = [tokens_key(tokenizer, spaces["split"]) for _ in range(2)]
    assert unseen[0] != unseen[1]  # what cannot be seen may have changed
    together = tokens_key(tokenizer, tokenise, Chat.render)
    files = [function.__code__.co_filename for function in (tokenise, Chat.render)]
    assert files[0] != files[1]
    assert together[-2:] == [linecache.getlines(file) for file in files]


def test_a_slow_tokenizer_is_known_by_its_vocabulary(tmp_path):
    keys = []
    for words in ("a b c", "a b d", "a b d"):
        (tmp_path / "vocab.txt").write_text(
            "\n".join(["[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]", *words.split()])
        )
        tokenizer = transformers.models.bert_japanese.BertJapaneseTokenizer(
            str(tmp_path / "vocab.txt"),
            word_tokenizer_type="basic",
            subword_tokenizer_type="character",
        )
        assert not tokenizer.is_fast
        keys.append(tokens_key(tokenizer, tokenise))
    assert keys[0] != keys[1] and keys[1] == keys[2]
