"""examples/teacher_scores.py: what a teacher scores, what is kept, how it goes on after a kill."""

import json
import re
import shlex
import shutil

from conftest import (
    CHATML,
    DOCUMENTS,
    SENTENCES,
    TOPICS,
    chat_tokenizer,
    train_tokenizer,
    write_jsonl,
)
from examples import teacher_scores
from parts.pairs import Columns, read_examples
from parts.rows import read_rows
from utils import InputError

import pytest
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
)

# in full, as the model card has it: not taken from the script
CARD = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n',
    "<Instruct>: Given a web search query, retrieve relevant passages that answer the query\n<Query>: {}\n<Document>: {}",
    "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
)
DECODER = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # scores that differ
}


def pair_tokenizer():
    """The encoder's tokenizer, with a template for pairs."""
    special = {
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
    }
    tokenizer = train_tokenizer(special, "[CLS] $A [SEP]")
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    return tokenizer


@pytest.fixture(scope="session")
def cross_encoder(tmp_path_factory):
    """A BERT with one label, positions up to 128."""
    folder = str(tmp_path_factory.mktemp("cross_encoder"))
    pair_tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=600,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=128,
        num_labels=1,
        initializer_range=0.2,
        pad_token_id=3,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def save_judge(folder, words=("yes", "no")):
    """Write a Qwen3 whose tokenizer knows ChatML and has a token for each of these words."""
    special = ["<|im_start|>", "<|endoftext|>", "<think>", "</think>"]
    texts = SENTENCES + [*words] * 50 + [text.replace("yes", "") for text in CARD[:2]] * 20
    chat_tokenizer(CHATML, "<|im_end|>", None, special, texts).save_pretrained(folder)
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(vocab_size=640, head_dim=16, **DECODER)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def judge(tmp_path_factory):
    """The language model of save_judge."""
    return save_judge(tmp_path_factory.mktemp("judge"))


def long_text(words):
    return " and the ".join(TOPICS[i % 16] for i in range(words))


ROWS = [
    {"query": f"where is the {a}", "pos": [f"the {a} stands behind {long_text(1 + i)}"], "id": i}
    | {"neg": [f"no {a} here", long_text(1 + 3 * i), TOPICS[i - 1]][: i % 4]}
    for i, a in enumerate(TOPICS)
]


def naive_score(folder, query, document, max_length=512):
    """The logit of one pair, by plain calls of transformers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if json.loads((folder / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        before, body, after = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (CARD[0], CARD[1].format(query, document), CARD[2])
        )
        body = body[: max_length - len(before) - len(after)]
        logits = model(input_ids=torch.tensor([before + body + after])).logits[0, -1]
        yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
        return (logits[yes] - logits[no]).item()
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    inputs = tokenizer(
        query, document, truncation="only_second", max_length=max_length, return_tensors="pt"
    )
    return model(**inputs).logits[0, 0].item()


@pytest.fixture
def score(tmp_path, cross_encoder):
    """Score rows of a file, or a list of them; returns the output's rows."""

    def run(rows, *flags, model=cross_encoder):
        source = tmp_path / "pairs.jsonl"
        if rows is not None:
            write_jsonl(source, rows)
        output = tmp_path / "scored.jsonl"
        argv = [str(source), str(output), "--model_name", str(model), *map(str, flags)]
        teacher_scores.main(argv)
        return [json.loads(line) for line in output.read_text().splitlines()]

    return run


def checked_scores(rows, scored, folder, **options):
    """Compare each score with the naive one; returns all."""
    found = []
    for row, cells in zip(rows, scored, strict=True):
        assert {name: cells[name] for name in row} == row
        for texts, scores in (("pos", "pos_scores"), ("neg", "neg_scores")):
            assert len(cells[scores]) == len(row[texts])
            for text, each in zip(row[texts], cells[scores], strict=True):
                assert each == pytest.approx(
                    naive_score(folder, row["query"], text, **options), abs=1e-4
                )
                found.append(each)
    assert max(found) - min(found) > 0.1  # else any score would do
    return found


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize("kind", ["cross_encoder", "judge"])
def test_scores_in_batches_are_those_of_one_pair_alone(kind, request, tmp_path, score):
    folder = tmp_path.parent / request.getfixturevalue(kind)
    scored = score(ROWS[:6], "--batch_size", 4, model=folder)
    found = checked_scores(ROWS[:6], scored, folder)
    assert len(set(found)) == len(found)


def test_a_decoder_with_one_label_is_read_at_its_last_token(tmp_path, score):
    folder = tmp_path / "decoder"
    tokenizer = pair_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=600, num_labels=1, **DECODER)  # without a padding token
    LlamaForSequenceClassification(config).save_pretrained(folder)
    checked_scores(ROWS[:4], score(ROWS[:4], model=folder), folder)
    saved = json.loads((folder / "tokenizer_config.json").read_text())
    del saved["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(saved))
    (tmp_path / "scored.jsonl").unlink()
    with pytest.raises(InputError, match="no padding token"):
        score(ROWS[:4], model=folder)


@pytest.mark.parametrize("kind, max_length", [("cross_encoder", 40), ("judge", 160)])
def test_documents_are_cut_and_nothing_else(kind, max_length, request, tmp_path, score, capsys):
    folder = tmp_path.parent / request.getfixturevalue(kind)
    query = " ".join(["where is the lamp"] * 6)  # of more than half of the cross-encoder's tokens
    rows = [{"query": query, "pos": [long_text(60)], "neg": [long_text(61), "lamp"]}]
    rows.append({"query": "where", "pos": ["needle", "ocean ocean"], "neg": []})
    scored = score(rows, "--max_length", max_length, model=folder)
    checked_scores(rows, scored, folder, max_length=max_length)
    # equal up to where they are cut
    assert scored[0]["pos_scores"][0] == pytest.approx(scored[0]["neg_scores"][0], abs=1e-4)
    said = capsys.readouterr().out
    assert "5 pairs, 2 of them up to --max_length" in said
    seen = re.search(r"sees      '(.*)'\n", said)[1]
    assert seen.count("Ġlamp") == 6 or query in seen
    assert seen.endswith("\\n<think>\\n\\n</think>\\n\\n" if kind == "judge" else "[SEP]")


def test_a_query_that_leaves_no_room_is_refused_before_scoring(
    score, cross_encoder, judge, tmp_path
):
    rows = [*ROWS[:2], {"query": long_text(40), "pos": ["a lamp"]}]
    for model, max_length in ((cross_encoder, 40), (judge, 160)):
        with pytest.raises(InputError, match=r"pairs.jsonl, line 3: .*Raise it by \d+ or more"):
            score(rows, "--max_length", max_length, model=model)
        with pytest.raises(InputError, match=r"line 1: .*Raise it by"):
            score(rows, "--max_length", 1, model=model)
        assert not (tmp_path / "scored.jsonl").exists()


def test_cosines_of_our_own_run_are_those_of_sentence_transformers(score, run_embed, tmp_path):
    run_embed("--max_steps", 2, "--dev_size", 0, "--query_prefix", "Q: ", "--lr", 0.01)
    folder = str(tmp_path / "out/final")
    model = SentenceTransformer(folder)
    for flag in (["--instruction", "find"], ["--dtype", "float32"]):
        with pytest.raises(InputError, match=f"an embedding model, .*: drop {flag[0]}"):
            score(ROWS, *flag, model=folder)
    found = score(ROWS, model=folder)
    for row in found:
        query = model.encode_query(row["query"], normalize_embeddings=True)
        for texts, scores in ((row["pos"], "pos_scores"), (row["neg"], "neg_scores")):
            expected = [
                float(query @ model.encode_document(text, normalize_embeddings=True))
                for text in texts
            ]
            assert row[scores] == pytest.approx(expected, abs=1e-4)
    assert any(abs(row["pos_scores"][0]) < 0.99 for row in found)


def test_an_instruction_replaces_the_cards(score, judge, capsys):
    score(ROWS[:1], "--instruction", "Find the lamp", model=judge)
    assert "user\\n<Instruct>: Find the lamp\\n<Query>: where" in capsys.readouterr().out


def test_a_pair_is_scored_once(score, monkeypatch):
    pairs = []
    encode = teacher_scores.CrossEncoder.encode

    def keep(self, asked):
        pairs.extend(asked)
        return encode(self, asked)

    monkeypatch.setattr(teacher_scores.CrossEncoder, "encode", keep)
    monkeypatch.setattr(teacher_scores, "ROWS_AT_ONCE", 2)
    row = {"query": "a lamp", "pos": ["lamp", " lamp "], "neg": ["lamp", "oven"]}
    scored = score([row, row, row, row | {"query": "an oven"}])
    expected = [(query, text) for query in ("a lamp", "an oven") for text in ("lamp", "oven")]
    assert sorted(pairs[1:]) == expected  # the first is the trial's
    assert scored[0] == scored[2]
    assert len({*scored[0]["pos_scores"], scored[0]["neg_scores"][0]}) == 1


# ---------------------------------------------------------------- rows


def test_lists_of_scores_stay_beside_their_texts(score, tmp_path):
    rows = [
        {"query": "lamp", "pos": "a lamp", "neg": None, "more": {"é": [1, None]}},
        {"query": "lamp", "pos": ["", "a lamp", " \u200b"], "neg": [None, {"title": "a", "text": "lamp"}]},
        {"query": "lamp", "pos": '["a lamp", "oven"]', "neg": []},
        {"query": " ", "pos": ["a lamp"], "neg": ["oven"]},
        {"query": "lamp \ud83d", "pos": ["a lamp"], "id": "\ud83d"},
    ]  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scored = score(None)
    assert [
        {name: cells[name] for name in row} for row, cells in zip(rows, scored, strict=True)
    ] == rows
    lamp = scored[0]["pos_scores"][0]
    assert scored[0] == rows[0] | {"pos_scores": [lamp], "neg_scores": []}
    assert scored[1]["pos_scores"] == [None, lamp, None]
    assert scored[1]["neg_scores"] == [None, lamp]
    assert scored[2]["pos_scores"][0] == lamp != scored[2]["pos_scores"][1]
    assert scored[3]["pos_scores"] == scored[3]["neg_scores"] == [None]
    assert scored[4]["pos_scores"] != [lamp]


def test_a_trainer_reads_the_output(score, tmp_path):
    more = [
        {"query": "lamp", "pos": ["", "a lamp"], "neg": ["oven", " ", "cup"]},
        {"query": "oven", "pos": "an oven", "neg": None},
        {"query": "cup", "pos": [["a cup"], "mug"], "neg": ""},
    ]
    scored = score(ROWS + more)
    examples, drops = read_examples(read_rows(tmp_path / "scored.jsonl"), Columns(), None)
    assert not drops
    for example, cells in zip(examples, scored, strict=True):
        assert cells["query"] == example.query
        numbers = [number for number in cells["pos_scores"] + cells["neg_scores"] if number]
        assert [example.scores[text] for text in example.pos + example.neg] == numbers


def test_other_columns_are_read_by_flags_or_name(score, tmp_path):
    row = {"anchor": "lamp", "right": "a lamp", "negative_1": "oven", "negative_2": "cup"}
    cells, other = score([row, row | {"negative_1": None}], "--positive_column", "right")
    assert len(cells["pos_scores"]) == 1 and len(cells["neg_scores"]) == 2
    assert cells["neg_scores"][0] != cells["neg_scores"][1]
    assert other["neg_scores"] == [None, cells["neg_scores"][1]]
    (tmp_path / "scored.jsonl").unlink()
    (cells,) = score([{"query": "lamp", "docs": ["a lamp", "oven"], "labels": [1, 0]}])
    assert len(cells["pos_scores"]) == 2 and cells["neg_scores"] == []


def test_a_column_that_late_rows_alone_have_is_scored(score):
    rows = [{"query": "q", "pos": ["p"]}] * 1000 + [{"query": "q", "pos": ["p"], "neg": ["n"]}]
    assert len(score(rows)[-1]["neg_scores"]) == 1


def test_rows_with_all_scores_are_kept(score, capsys):
    rows = [
        {"query": "lamp", "pos": ["a lamp"], "pos_scores": [99], "neg": ["", "x"], "neg_scores": [None, -1e3]},
        {"query": "lamp", "pos": ["a lamp"], "pos_scores": [99], "neg": ["oven"], "neg_scores": [None]},
        {"query": "lamp", "pos": ["a lamp"], "pos_scores": [99, 98], "neg": [], "neg_scores": []},
        {"query": "lamp", "pos": ["a lamp"], "pos_scores": [float("nan")], "neg_scores": []},
        {"query": "lamp", "pos": ["a lamp"], "pos_scores": [True], "neg_scores": []},
        {"query": "lamp", "pos": ["a lamp"], "pos_scores": [99]},
    ]  # fmt: skip
    scored = score(rows)
    assert scored[0] == rows[0]
    assert list(scored[1]) == list(rows[1])  # each column where it was
    lamp = scored[1]["pos_scores"]
    assert -90 < lamp[0] < 90
    assert [cells["pos_scores"] for cells in scored[2:]] == [lamp] * 4
    assert "6 rows, 0 of them in" in capsys.readouterr().out


def test_rows_that_are_none_are_refused_by_line(score, tmp_path):
    for row, sentence in (
        ({"query": ["a", "b"], "pos": ["c"]}, "line 2: 2 queries in one row"),
        ({"query": "a", "pos": [7]}, "line 2: pos is the int 7, an id rather than a text"),
    ):
        with pytest.raises(InputError, match=sentence):
            score([ROWS[0], row])
    with pytest.raises(InputError, match="line 1: no positive"):
        score([{"query": "a", "docs": "b"}])
    (tmp_path / "pairs.jsonl").write_text('{"query": "a", "pos": ["b"]}\n{"query"\n')
    with pytest.raises(InputError, match="line 2: no valid JSON"):
        score(None)
    assert not (tmp_path / "scored.jsonl").exists()


# ---------------------------------------------------------------- models that are no teachers


def test_models_without_one_score_are_refused(score, cross_encoder, judge, tiny_bert, tmp_path):
    folder = tmp_path / "model"

    def refused(sentence, *flags, model=folder):
        with pytest.raises(InputError, match=sentence):
            score(ROWS[:1], *flags, model=model)
        assert not (tmp_path / "scored.jsonl").exists()

    refused("BertModel in its config.json, neither", model=tiny_bert)
    refused("drop --instruction", "--instruction", "Find it", model=cross_encoder)
    refused("neither a folder here nor a hub model", model=tmp_path / "nowhere")
    BertForSequenceClassification(BertConfig.from_pretrained(cross_encoder, num_labels=3)).save_pretrained(folder)  # fmt: skip
    pair_tokenizer().save_pretrained(folder)
    refused("has 3 labels, and a score is the logit of one")
    shutil.copytree(cross_encoder, folder, dirs_exist_ok=True)
    AutoTokenizer.from_pretrained(judge).save_pretrained(folder)
    refused("no token between query and document")
    refused('has no token "yes"', model=save_judge(tmp_path / "other", words=("hm", "no")))


def test_a_classifier_without_its_head_is_refused(score, cross_encoder, tmp_path):
    folder = tmp_path / "headless"
    shutil.copytree(cross_encoder, folder)
    model = AutoModelForSequenceClassification.from_pretrained(cross_encoder)
    weights = {name: each for name, each in model.state_dict().items() if "classifier" not in name}
    model.save_pretrained(folder, state_dict=weights)
    with pytest.raises(InputError, match="not in its files and would be random"):
        score(ROWS[:1], model=folder)


def test_a_logit_that_is_no_number_is_refused(score, cross_encoder, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(cross_encoder, folder)
    model = AutoModelForSequenceClassification.from_pretrained(cross_encoder)
    model.classifier.bias.data.fill_(float("nan"))
    model.save_pretrained(folder)
    with pytest.raises(InputError, match=r"line \d: the teacher's logit is nan. Fetch .* again.$"):
        score(ROWS[:2], model=folder)
    assert (tmp_path / "scored.jsonl").read_bytes() == b""


def test_memory_that_runs_out_is_told_in_a_sentence(score, monkeypatch):
    def run_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(teacher_scores.CrossEncoder, "logits", run_out)
    monkeypatch.setattr(teacher_scores, "check_loaded", lambda *_: None)
    with pytest.raises(InputError, match="memory ran out with 3 pairs at once"):
        score(ROWS[:2], "--batch_size", 9)


# ---------------------------------------------------------------- kill and go on


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 4 rows: 16 rows and one more are five."""
    monkeypatch.setattr(teacher_scores, "ROWS_AT_ONCE", 4)
    again = {"query": ROWS[0]["query"], "pos": ROWS[0]["pos"], "neg": ["never seen"]}
    kept = {"query": "a", "pos": ["b"], "neg": ["c"], "pos_scores": [2], "neg_scores": [1]}
    return [*ROWS[:8], kept, *ROWS[8:15], again]


def test_after_a_kill_the_same_bytes_are_written(small_blocks, score, tmp_path, monkeypatch):
    output = tmp_path / "scored.jsonl"
    score(small_blocks)
    whole = output.read_bytes()
    lines = whole.splitlines(keepends=True)
    calls = []
    score_pairs = teacher_scores.score_pairs
    monkeypatch.setattr(
        teacher_scores,
        "score_pairs",
        lambda *args, **more: calls.append(args[2]) or score_pairs(*args, **more),
    )
    for left, blocks in (
        (b"", 5),
        (lines[0][:9], 5),
        (b"".join(lines[:5]), 4),
        (b"".join(lines[:11]) + lines[11][:-1], 3),  # the line break alone is missing
        (b"".join(lines[:16]) + b'{"query": "\xc3', 1),
        (whole, 0),
    ):
        output.write_bytes(left)
        calls.clear()
        score(None)
        assert output.read_bytes() == whole
        assert len(calls) == blocks
    output.write_bytes(b"".join(lines[:16]))
    score(None)
    assert list(calls[-1]) == [(ROWS[0]["query"], "never seen")]  # the positive's score is known


def test_an_interrupted_run_leaves_what_it_scored(small_blocks, score, tmp_path, monkeypatch):
    score(small_blocks)
    output = tmp_path / "scored.jsonl"
    whole = output.read_bytes()
    output.unlink()
    logits, calls = teacher_scores.logits_of, []

    def stop(*batch):
        calls.append(batch)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return logits(*batch)

    monkeypatch.setattr(teacher_scores, "logits_of", stop)
    with pytest.raises(KeyboardInterrupt):
        score(None)
    assert output.read_bytes() == b"".join(whole.splitlines(keepends=True)[:12])
    score(None)
    assert output.read_bytes() == whole


def test_an_output_of_something_else_is_refused(small_blocks, score, tmp_path, judge):
    score(small_blocks)
    output = tmp_path / "scored.jsonl"
    whole = output.read_bytes()

    def refused(sentence, rows, *flags, **more):
        before = output.read_bytes()
        with pytest.raises(InputError, match=sentence):
            score(rows, *flags, **more)
        assert output.read_bytes() == before

    refused("begun with --model_name .* and this is", small_blocks, model=judge)
    refused("begun with --max_length 512, and this is 64", small_blocks, "--max_length", 64)
    refused("has 17 rows, the input 3", small_blocks[:3])
    refused(r"scored.jsonl, line 1 is not .*pairs.jsonl, line 1", small_blocks[::-1])
    output.write_bytes(whole.replace(b'"neg_scores": [-', b'"neg_scores": [null, -', 1))
    refused("line [234] is not .* with scores", small_blocks)
    output.write_bytes(b"\n".join(whole.splitlines()[:3]) + b"\n\n{}\n")
    refused("empty lines", small_blocks)
    for broken in (b"{}\n" * 4 + b"{", b"{}\n{"):  # of a whole block and of less
        output.write_bytes(broken)
        refused("line 1 is not", small_blocks)
    (tmp_path / "scored.teacher.json").unlink()
    refused("is there, without", small_blocks)


# ---------------------------------------------------------------- the command line


def test_documented_commands_parse(capsys):
    text = DOCUMENTS + teacher_scores.__doc__
    commands = re.findall(
        r"^\s*python examples/teacher_scores\.py (.*)$", text.replace("\\\n", " "), re.M
    )
    assert len(commands) >= 3
    for command in commands:
        teacher_scores.parse_args(shlex.split(command, comments=True))
    for files in ("a.csv b.jsonl", "a.jsonl b.json", "a.jsonl ./a.jsonl"):
        with pytest.raises(SystemExit):
            teacher_scores.parse_args([*files.split(), "--model_name", "x"])
    said = capsys.readouterr().err
    assert "is none of .jsonl" in said and "is no .jsonl" in said and "over itself" in said
