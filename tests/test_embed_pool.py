"""What held-out queries are searched in: their own documents, and training documents that are wrong for all of them."""

from types import SimpleNamespace

import train_embed_lora
import train_sft_lora
import utils
from conftest import make_rows, write_jsonl
from train_embed_lora import (
    DevSet,
    Example,
    Texts,
    by_query,
    dev_from_examples,
    evaluations_of,
    filled,
    parse_args,
    read_data,
    retrieval_metrics,
    spare_documents,
)

import pytest
import torch
from accelerate import Accelerator


def test_a_tenth_of_at_most_1000_queries_is_held_out_unless_a_flag_says_how_many(tmp_path):
    rows = [{"query": f"q{i}", "pos": [f"p{i}"]} for i in range(10400)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    for flags, queries in (([], 1000), (["--dev_size", "0.1"], 1040)):
        examples, dev_sets, counts = read_data(parse_args(["--train_file", path, *flags]))
        assert len(dev_sets[""].queries) == counts["dev"]["dev"]["queries"] == queries, flags
        assert len(examples) == 10400 - queries
    examples = [Example(f"q{i // 3}", [f"p{i}"], []) for i in range(60)]
    for flags, most, rows in (
        ("", 2, 6),
        ("--dev_size 0.5", 2, 30),
        ("--dev_sample_limit 9", 2, 9),
        ("", 9, 12),
    ):
        args = parse_args(["--train_file", "x", *flags.split()])
        held = utils.hold_out(examples, by_query, args, "query", 0.2, most=most)[1]
        assert len(held[""]) == rows, flags


def test_sft_still_holds_a_fifth_out(tmp_path):
    rows = [{"prompt": f"{i}?", "response": f"answer {i}"} for i in range(6000)]
    args = train_sft_lora.parse_args(["--train_file", write_jsonl(tmp_path / "rows.jsonl", rows)])
    assert train_sft_lora.read_data(args)[2]["dev"] == {"dev": 1200}


def test_no_known_positive_of_a_dev_query_is_spare():
    dev = DevSet({"q1": ("where?", None), "q2": ("who?", None)}, {"d1": "here", "d2": "nobody"}, {})
    trained = [
        Example(
            "other", ["fine", "HERE "], ["nobody", "Fine", "Where?"]
        ),  # two of the corpus, one twice, a query
        Example("like where", ["where?"], ["good"]),
        Example("third", ["like  Where", "at home"], []),
    ]
    rest = [*trained, Example("WHO?", ["at home"], ["bad"])]
    assert sorted(spare_documents(dev, trained, rest, 0)) in (["Fine", "good"], ["fine", "good"])
    assert (
        len(spare_documents(dev, trained, [], 0)) == 4
    )  # nothing known of "at home" and "like  Where"


def test_a_querys_own_text_in_its_pool_is_known():
    dev = dev_from_examples(
        [Example("a", ["b"], []), Example("b", ["A ", "c"], []), Example("d", ["D"], ["e"])]
    )
    ids = {text: name for name, text in dev.corpus.items()}
    own = {dev.queries[query][0]: name for query, name in dev.own.items()}
    assert own == {"a": ids["A "], "b": ids["b"]}  # "d" is its own positive


def test_spare_documents_depend_on_the_seed_alone():
    examples = [Example(f"q{i}", [f"p{i}"], []) for i in range(50)]
    draws = [spare_documents(DevSet({}, {}, {}), examples, examples, seed) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert sorted(draws[0]) == sorted(draws[2]) == sorted(f"p{i}" for i in range(50))


def tokenised(lengths):
    """Texts that have these numbers of tokens."""
    texts = Texts()
    for text in lengths:
        texts.add("", text, False)
    texts.values = torch.zeros(sum(lengths.values()))
    texts.offsets = torch.tensor([0, *lengths.values()]).cumsum(0)
    return texts


def test_the_corpus_is_filled_up_to_the_room_and_the_limit(monkeypatch):
    args = parse_args(["--train_file", "x"])
    args.doc_prefix = ""
    dev = DevSet({"q": ("q", None)}, {"d0": "own"}, {"q": {"d0"}}, spare=["a", "b", "c"])
    texts = tokenised({"own": 9, "a": 5, "b": 3, "c": 2})
    for room, expected in (
        (100, "abc"),
        (10, "abc"),
        (9, "ab"),
        (8, "ab"),
        (7, "a"),
        (4, ""),
        (-3, ""),
    ):
        full = filled(dev, texts, args, room)
        assert sorted(full.corpus.values()) == sorted(["own", *expected])
        assert full.corpus["d0"] == "own" and full.relevant == dev.relevant
    monkeypatch.setattr(train_embed_lora, "MAX_POOL", 3)
    assert sorted(filled(dev, texts, args, 100).corpus.values()) == ["a", "b", "own"]
    assert dev.corpus == {"d0": "own"}


def test_equal_scores_do_not_favour_the_held_out_documents():
    own = {f"d{i:09d}": f"own {i}" for i in range(50)}
    spare = [f"spare {i}" for i in range(450)]
    args = parse_args(["--train_file", "x"])
    args.doc_prefix = ""
    dev = DevSet({}, own, {}, spare=spare)
    full = filled(dev, tokenised(dict.fromkeys([*own.values(), *spare], 1)), args, 450)
    column = {name: i for i, name in enumerate(sorted(full.corpus))}
    relevant = [{column[name]} for name in own]
    collapsed = retrieval_metrics(torch.ones(50, 4), torch.ones(500, 4), relevant)
    assert collapsed["recall@10"] < 0.1  # by chance 0.02; 0.2 if the 50 stood first


@pytest.fixture
def embedded(monkeypatch):
    """Caught while a run lasts: the numbers of texts and tokens of each embed(), and the trainer that is proven."""
    calls, trainers, prove = [], [], utils.prove
    embed = train_embed_lora.EmbedTrainer.embed

    def counted(trainer, sequences):
        calls.append((len(sequences), sum(map(len, sequences))))
        return embed(trainer, sequences)

    monkeypatch.setattr(train_embed_lora.EmbedTrainer, "embed", counted)
    monkeypatch.setattr(
        utils, "prove", lambda trainer, *rest: trainers.append(trainer) or prove(trainer, *rest)
    )
    return calls, trainers


def test_all_evaluations_embed_at_most_half_as_many_tokens_as_the_training(
    run_embed, tmp_path, embedded, capsys
):
    calls, trainers = embedded
    data = write_jsonl(tmp_path / "rows.jsonl", make_rows(400))
    report = run_embed("--max_steps", 24, "--eval_every", 9, data=data)
    size = report["data"]["dev"]["dev"]
    said = capsys.readouterr().out
    assert (
        f"pool      dev: {size['corpus']} documents, " in said
        and "4 evaluations embed 50% as many tokens" in said
    )
    evaluated = [tokens for texts, tokens in calls if texts in size.values()]
    assert len(evaluated) == 8  # queries and documents, four times
    assert size["corpus"] > 100
    share = sum(evaluated) / trainers[0].real_tokens
    assert 0.45 < share < 0.51  # of steps drawn otherwise
    assert report["plan"]["evaluation_share"] == pytest.approx(share, rel=0.03)


def test_the_report_counts_the_tokens_of_all_processes(run_embed, embedded, monkeypatch):
    monkeypatch.setattr(
        Accelerator, "reduce", lambda self, tensor, *_: 2 * tensor
    )  # two that do the same
    report, trainer = run_embed("--max_steps", 2), embedded[1][0]
    seconds = report["seconds"] - trainer.evaluation_seconds
    assert report["tokens_per_second"] == pytest.approx(2 * trainer.real_tokens / seconds)
    assert report["padded_per_real_token"] == pytest.approx(
        trainer.padded_tokens / trainer.real_tokens
    )


def test_evaluations_are_those_of_the_epochs_too():
    plan = SimpleNamespace(eval_steps=5, total_steps=22, steps_per_epoch=11)
    assert evaluations_of(SimpleNamespace(save_on_epoch_end=0), plan) == 6  # 0, 5, 10, 15, 20, 22
    assert evaluations_of(SimpleNamespace(save_on_epoch_end=1), plan) == 7  # 11


def test_a_dev_file_is_never_filled_and_a_small_pool_is_noted(run_embed, tmp_path, capsys):
    dev = write_jsonl(
        tmp_path / "dev.jsonl", [{"query": f"dev {i}", "pos": [f"found {i}"]} for i in range(8)]
    )
    report = run_embed("--dry_run", "--dev_file", dev, "--max_steps", 200, "--eval_every", 0)
    assert report["data"]["dev"]["dev"] == {"queries": 8, "corpus": 8}
    assert (
        "note      dev: 8 documents to search in hardly tell models apart: take more dev rows\n"
        in (capsys.readouterr().out)
    )
    report = run_embed("--dry_run", "--max_steps", 200, "--eval_every", 100)
    assert report["data"]["dev"]["dev"]["corpus"] > 100  # the same rows held out: all documents
    said = capsys.readouterr().out
    assert "hardly tell models apart" not in said and "makes room" not in said
    run_embed("--dry_run", "--max_steps", 5)
    assert "take more dev rows, or evaluate less often (--eval_every)" in capsys.readouterr().out
