"""Dev sets: what is held out, BEIR folders, leaks, and what held-out queries are searched in."""

from types import SimpleNamespace

import train_embed_lora
from conftest import TOPICS, make_rows, write_jsonl
from parts import dev_sets as room
from parts.dev_sets import (
    HELD_OUT,
    DevSet,
    dev_from_beir,
    dev_from_examples,
    evaluations_of,
    filled,
    mixed,
    read_data,
    spare_documents,
)
from parts.pairs import Columns, Example
from parts.retrieval import retrieval_metrics
from parts.rows import text_id
from parts.splits import Sizes, Source
from parts.texts import Texts
from utils import InputError

import pytest
import torch
from accelerate import Accelerator
from sentence_transformers import SentenceTransformer


def read(train_file, dev_file=None, seed=42, corpus=None, **sizes):
    """Return what a training file, a [NAME=]PATH of a dev set, and a corpus of texts make."""
    source = Source([str(train_file)], dev_file and [str(dev_file)])
    sizes = Sizes(seed, HELD_OUT, **sizes)
    return read_data(source, sizes, Columns(), None, max_negs=1, corpus=corpus)


def test_labels_are_read_from_tables_and_tell_dev_documents_apart(tmp_path):
    (tmp_path / "dev.csv").write_text("query,document,label\n" + "q,a,0\nq,b,1\nr,a,1\nr,c,\n")
    train = write_jsonl(tmp_path / "train.jsonl", make_rows(8))
    dev = read(train, tmp_path / "dev.csv")[1][""]
    assert pairs_of(dev) == {("q", "b"), ("r", "a")} and sorted(dev.corpus.values()) == ["a", "b"]


def test_rows_are_held_out_by_query_before_train_is_limited(tmp_path):
    rows = [{"query": f"q{i % 50}", "pos": [f"p{i}"]} for i in range(200)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    examples, dev_sets, counts = read(path, dev_size=0.2)
    dev = dev_sets[""]
    assert len(dev.queries) == 10 and sum(map(len, dev.relevant.values())) == 40
    held = {query for query, _ in dev.queries.values()}
    assert not held & {example.query for example in examples}
    assert len(examples) == 160
    examples, dev_sets, counts = read(path, train=30, dev=8)
    assert len(examples) == counts["train_rows"] == 30
    held = sum(map(len, dev_sets[""].relevant.values()))
    assert 8 <= held <= 11  # whole queries, of up to four rows


def test_training_queries_in_the_dev_set_are_dropped(tmp_path):
    train = write_jsonl(
        tmp_path / "train.jsonl", [{"query": f"Q{i}", "pos": [f"p{i}"]} for i in range(10)]
    )
    dev = write_jsonl(
        tmp_path / "dev.jsonl", [{"query": "q3", "pos": ["p"]}, {"query": "q30", "pos": ["x"]}]
    )
    examples, dev_sets, counts = read(train, f"mine={dev}")
    assert len(examples) == 9 and list(dev_sets) == ["mine"]
    assert counts["dropped"] == {"training rows whose query is in a dev set": 1}


def pairs_of(dev):
    return {
        (dev.queries[q][0], dev.corpus[d])
        for q, documents in dev.relevant.items()
        for d in documents
    }


def test_a_pair_and_its_mirror_image_are_held_out_together(tmp_path):
    pairs = [(f"how {i}", f"in which way {i}") for i in range(30)]
    pairs += [(f"in which way {i}", f"so {i}") for i in range(5)]
    rows = [{"query": a, "pos": [b]} for a, b in pairs + [(b.upper(), a) for a, b in pairs]]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    examples, dev_sets, counts = read(path, dev_size=0.5)
    assert not counts["dropped"]  # each row is measured or trained
    held = {frozenset(map(text_id, pair)) for pair in pairs_of(dev_sets[""])}
    trained = {frozenset(map(text_id, (e.query, e.pos[0]))) for e in examples}
    assert len(held) >= 15 and len(held) + len(trained) == len(pairs) and not held & trained


def test_a_pair_of_the_dev_file_is_not_trained_the_other_way_round(tmp_path):
    rows = [
        {"query": "b ", "pos": ["x", "A"]},
        {"query": "b", "pos": ["c"]},
        {"query": "c", "pos": ["n"]},
    ]
    rows += [{"query": "d", "pos": ["a"]}]
    train = write_jsonl(tmp_path / "train.jsonl", rows)
    dev = write_jsonl(tmp_path / "dev.jsonl", [{"query": "a", "pos": ["b"], "neg": ["d", "n"]}])
    examples, _, counts = read(train, dev)
    assert {(e.query, *e.pos) for e in examples} == {("b", "c"), ("c", "n"), ("d", "a")}
    assert counts["dropped"] == {"training rows that are a pair of a dev set turned round": 1}


def test_a_query_with_many_rows_is_never_held_out(tmp_path, capsys):
    rows = [{"query": "q", "pos": [f"p{i}"]} for i in range(60)]
    rows += [{"query": f"q{i}", "pos": [f"p{i}"]} for i in range(40)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    for seed in range(5):
        examples, dev_sets, _ = read(path, seed=seed, dev_size=0.2)
        held = {query for query, _ in dev_sets[""].queries.values()}
        assert len(held) == 20 and "q" not in held
        assert len(examples) == 80
    said = (
        "1 groups of rows with one query are never held out: each has more than a fifth of the 20 "
        "rows wanted"
    )
    assert f"{said} (the largest: 60 rows)" in capsys.readouterr().out


def test_dev_pool_is_every_positive_and_negative_once():
    dev = dev_from_examples(
        [Example("q", ["a", "b"], ["c"]), Example("q", ["d"], ["a"]), Example("r", ["c"], [])]
    )
    assert sorted(dev.corpus.values()) == ["a", "b", "c", "d"]
    gold = {
        text: {dev.corpus[key] for key in dev.relevant[name]}
        for name, (text, _) in dev.queries.items()
    }
    assert gold == {"q": {"a", "b", "d"}, "r": {"c"}}


def beir(folder, **files):
    (folder / "qrels").mkdir(parents=True)
    write_jsonl(
        folder / "corpus.jsonl",
        [{"_id": "10", "title": "T", "text": "x"}, {"_id": "9", "title": "", "text": "y"}],
    )
    write_jsonl(
        folder / "queries.jsonl",
        [{"_id": "1", "text": "first"}, {"_id": "2", "text": "no relevant one"}],
    )
    (folder / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\n1\t10\t1\n1\t9\t0\n")
    return folder


def test_beir_folder(tmp_path):
    dev = dev_from_beir(beir(tmp_path / "beir"))
    assert dev == DevSet({"1": ("first", None)}, {"10": "T x", "9": "y"}, {"1": {"10"}})


@pytest.mark.parametrize(
    "qrels, relevant",
    [
        (
            "query-id\tcorpus-id\tscore\n1\t10\t1.0\n1\t9\t0.0\n2\t9\t-2\n2\t10\t0.5\n",
            {"1": {"10"}, "2": {"10"}},
        ),
        ("1\t10\t1\n1\t9\t0\n2\t9\t2\n", {"1": {"10"}, "2": {"9"}}),
        ("1\t10\n2\t9\n", {"1": {"10"}, "2": {"9"}}),
        ("q\td\n1\t10\n2\t9\n", {"1": {"10"}, "2": {"9"}}),
    ],
)
def test_beir_judgements_count_above_zero_and_need_no_header(tmp_path, qrels, relevant):
    folder = beir(tmp_path / "beir")
    (folder / "qrels/test.tsv").write_text(qrels)
    assert dev_from_beir(folder).relevant == relevant


@pytest.mark.parametrize(
    "qrels, sentence",
    [
        ("", "lines of 0 columns. Write query id"),
        ("1\n", "lines of 1 columns. Write query id"),
        ("query\tdoc\tscore\n1\t10\thigh\n", "test.tsv, line 2: .*a score that is no number"),
        ("1\t10\t1\n1\t9\n", "test.tsv, line 2: not the 3 columns"),
        ("7\t10\t1\n1\t9\t1\n", "test.tsv, line 1: 7 is in no file of"),
        ("1\t11\t0\n", "test.tsv, line 1: 11 is in no file of"),
    ],
)
def test_broken_judgements_are_named(tmp_path, qrels, sentence):
    folder = beir(tmp_path / "beir")
    (folder / "qrels/test.tsv").write_text(qrels)
    with pytest.raises(InputError, match=sentence):
        dev_from_beir(folder)


def test_no_known_positive_of_a_dev_query_is_spare():
    dev = DevSet({"q1": ("where?", None), "q2": ("who?", None)}, {"d1": "here", "d2": "nobody"}, {})
    trained = [
        # two of the corpus, one twice, a query
        Example("other", ["fine", "HERE "], ["nobody", "Fine", "Where?"]),
        Example("like where", ["where?"], ["good"]),
        Example("third", ["like  Where", "at home"], []),
    ]
    rest = [*trained, Example("WHO?", ["at home"], ["bad"])]
    assert sorted(spare_documents(dev, trained, rest, 0)) in (["Fine", "good"], ["fine", "good"])
    # nothing known of "at home" and "like  Where"
    assert len(spare_documents(dev, trained, [], 0)) == 4


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
    dev = DevSet({"q": ("q", None)}, {"d0": "own"}, {"q": {"d0"}}, spare=["a", "b", "c"])
    texts = tokenised({"own": 9, "a": 5, "b": 3, "c": 2})
    cases = ((100, "abc"), (10, "abc"), (9, "ab"), (8, "ab"), (7, "a"), (4, ""), (-3, ""))
    for tokens, expected in cases:
        full = filled(dev, texts, "", tokens, 42)
        assert sorted(full.corpus.values()) == sorted(["own", *expected])
        assert full.corpus["d0"] == "own" and full.relevant == dev.relevant
    monkeypatch.setattr(room, "MAX_POOL", 3)
    assert sorted(filled(dev, texts, "", 100, 42).corpus.values()) == ["a", "b", "own"]
    assert dev.corpus == {"d0": "own"}


def test_equal_scores_do_not_favour_the_held_out_documents():
    own = {f"d{i:09d}": f"own {i}" for i in range(50)}
    spare = [f"spare {i}" for i in range(450)]
    dev = DevSet({}, own, {}, spare=spare)
    full = filled(dev, tokenised(dict.fromkeys([*own.values(), *spare], 1)), "", 450, 42)
    column = {name: i for i, name in enumerate(sorted(full.corpus))}
    relevant = [{column[name]} for name in own]
    collapsed = retrieval_metrics(torch.ones(50, 4), torch.ones(500, 4), relevant)
    assert collapsed["recall@10"] < 0.1  # by chance 0.02; 0.2 if the 50 stood first


def test_more_ids_stand_anywhere_among_its_own():
    own = {"d000000000": "own", "d000000001": "other"}
    places = []
    for seed in range(400):
        corpus = mixed(own, [f"more {i}" for i in range(8)], seed)
        assert len(corpus) == 10 and corpus.items() >= own.items()
        places += [sorted(corpus).index(name) for name in own]
    counts = [places.count(place) for place in range(10)]
    assert 40 < min(counts) and max(counts) < 130  # 80 each by chance
    assert mixed({}, ["a", "b"], 0).keys() == {"-0000000", "-0000001"}


# ---------------------------------------------------------------- --dev_corpus


def test_documents_of_the_corpus_stand_in_the_way_where_no_row_makes_them_right(tmp_path, capsys):
    train = [{"query": f"q{i}", "pos": [f"p{i}"]} for i in range(5)]
    # leaks, which are left out of training, tell what is right all the same
    train += [{"query": "WHO?", "pos": ["a friend"]}, {"query": "his wife", "pos": ["who?"]}]
    train = write_jsonl(tmp_path / "train.jsonl", train)
    rows = [{"query": "who?", "pos": ["him"], "neg": ["a chair"]}, {"query": "r", "pos": ["him"]}]
    rows += [{"query": "s", "pos": ["a pen"]}]
    dev = write_jsonl(tmp_path / "dev.jsonl", rows)
    corpus = ["wrong", "A friend", "His wife", "Who?", "HIM", "a chair ", "p0", "q1", "Wrong"]
    dev = read(train, dev, corpus=corpus)[1][""]
    added = {text for name, text in dev.corpus.items() if not name.startswith("d") or "-" in name}
    assert added == {"wrong", "p0", "q1"}
    assert sorted(dev.corpus.values()) == ["a chair", "a pen", "him", "p0", "q1", "wrong"]
    assert pairs_of(dev) == {("who?", "him"), ("r", "him"), ("s", "a pen")}
    said = capsys.readouterr().out
    assert "corpus    dev: 3 of 9 documents of --dev_corpus stand in the way (" in said


def test_rows_of_another_dev_set_or_of_queries_not_drawn_tell_what_is_right(tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", make_rows(8))
    one = [{"query": f"q{i}", "pos": [f"p{i}"]} for i in range(9)]
    one += [{"query": f"twin {i}", "pos": [f"q{i}"]} for i in range(9)]
    files = [f"one={write_jsonl(tmp_path / 'one.jsonl', one)}"]
    two = [{"query": f"Q{i}", "pos": [f"also {i}"]} for i in range(9)]
    files.append(f"two={write_jsonl(tmp_path / 'two.jsonl', two)}")
    corpus = [f"{kind} {i}" for kind in ("also", "twin", "wrong") for i in range(9)]
    sizes = Sizes(42, HELD_OUT, dev=6)
    source = Source([train], files)
    dev_sets = read_data(source, sizes, Columns(), None, max_negs=1, corpus=corpus)[1]
    right = 0
    for dev in dev_sets.values():
        texts = set(dev.corpus.values())
        assert len(dev.queries) == 6 and texts >= {f"wrong {i}" for i in range(9)}
        for i in range(9):
            if f"q{i}" in {text.lower() for text, _ in dev.queries.values()}:
                right += 1
                assert f"twin {i}" not in texts
                assert f"also {i}" not in texts or "two" in dev_sets and dev is dev_sets["two"]
    assert right >= 6


def test_the_corpus_joins_held_out_rows_in_place_of_the_trainings(run_embed, tmp_path, capsys):
    files = [write_jsonl(tmp_path / "a.jsonl", [{"text": f"way {i}"} for i in range(70)])]
    files.append(write_jsonl(tmp_path / "b.jsonl", [{"text": f"way {i}"} for i in range(60, 90)]))
    flags = ["--dry_run", "--max_steps", 200, "--eval_every", 0]
    run_embed(*flags, "--dev_corpus", *files)
    said = capsys.readouterr().out
    assert "corpus    dev: 90 of 90 documents" in said and "the training's" not in said
    own = read(tmp_path / "pairs.jsonl")[1][""]
    held = read(tmp_path / "pairs.jsonl", corpus=[f"way {i}" for i in range(90)])[1][""]
    assert not held.spare and own.spare
    assert held.corpus.items() >= own.corpus.items()
    assert len(held.corpus) == len(own.corpus) + 90
    assert f"pool      dev: {len(held.corpus)} documents; " in said


def test_a_corpus_beyond_the_limit_is_taken_whole(run_embed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(room, "MAX_POOL", 20)
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"text": f"way {i}"} for i in range(200)])
    report = run_embed("--dry_run", "--max_steps", 1, "--dev_corpus", corpus)
    assert report["data"]["dev"]["dev"]["corpus"] > 200
    said = capsys.readouterr().out
    share = int(said.split("evaluations embed ")[1].partition("%")[0])
    assert share > 100 and share == round(100 * report["plan"]["evaluation_share"])


def test_metrics_are_those_of_a_naive_loop_over_the_larger_pool(run_embed, tmp_path, tiny_bert):
    rows = [{"query": f"the {a} {i}", "pos": [f"look at {a} {i}"]} for i, a in enumerate(TOPICS)]
    dev = write_jsonl(tmp_path / "dev.jsonl", rows)
    corpus = [f"the {a} with a {b}" for a in TOPICS for b in TOPICS]
    file = write_jsonl(tmp_path / "corpus.jsonl", [{"text": text} for text in corpus])
    flags = ["--max_steps", 1, "--dev_file", dev]
    alone = run_embed(*flags, out=tmp_path / "alone")
    report = run_embed(*flags, "--dev_corpus", file)
    base = SentenceTransformer(tiny_bert, device="cpu")
    documents = [row["pos"][0] for row in rows] + corpus
    scores = torch.tensor(base.encode([row["query"] for row in rows], normalize_embeddings=True))
    scores = scores @ torch.tensor(base.encode(documents, normalize_embeddings=True)).T
    ranks = torch.tensor([(row > row[i] + 1e-6).sum() for i, row in enumerate(scores)])
    before = report["metrics"]["before"]
    for k in (1, 3, 10):
        assert before[f"recall@{k}"] == pytest.approx((ranks < k).double().mean().item())
    reciprocal = torch.where(ranks < 100, 1 / (ranks + 1.0), 0).mean().item()  # one is relevant
    assert before["map@100"] == pytest.approx(reciprocal, abs=1e-6)
    assert 0.1 < before["recall@10"] < alone["metrics"]["before"]["recall@10"]


def test_resume_refuses_another_corpus(run_embed, tmp_path):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"text": f"way {i}"} for i in range(20)])
    flags = ["--max_steps", 2, "--save_best", 0, "--dev_corpus", corpus]
    run_embed(*flags)
    (tmp_path / "out/training_summary_report.json").unlink()
    assert run_embed(*flags, "--resume_from_checkpoint")["steps"] == 2
    (tmp_path / "out/training_summary_report.json").unlink()
    write_jsonl(tmp_path / "corpus.jsonl", [{"text": f"way {i}"} for i in range(21)])
    with pytest.raises(InputError, match="data_fingerprint was .* and is"):
        run_embed(*flags, "--resume_from_checkpoint")


def test_a_beir_folder_keeps_its_corpus(tmp_path, capsys):
    train = write_jsonl(tmp_path / "train.jsonl", make_rows(8))
    folder = beir(tmp_path / "beir")
    dev = read(train, folder, corpus=["more"])[1][""]
    assert dev == dev_from_beir(folder)
    said = "note      dev: a BEIR folder keeps its own corpus, without --dev_corpus\n"
    assert said in capsys.readouterr().out


def test_a_corpus_that_changes_nothing_is_noted(tmp_path, capsys):
    three = write_jsonl(tmp_path / "three.jsonl", make_rows(3))
    assert read(three, corpus=["more"])[1] == {}
    assert "note      --dev_corpus is not used: no rows are held out" in capsys.readouterr().out
    train = write_jsonl(tmp_path / "train.jsonl", make_rows(8))
    dev = write_jsonl(tmp_path / "dev.jsonl", [{"query": "q", "pos": ["p"]}])
    read(train, dev, corpus=["P", "Q"])
    assert "note      dev: --dev_corpus adds no document to the pool\n" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--eval_strategy", "no"], ["--dev_size", 0]])
def test_a_corpus_without_evaluations_is_refused(embed_argv, flags, capsys):
    with pytest.raises(SystemExit) as error:
        train_embed_lora.main(embed_argv("--dev_corpus", "corpus.jsonl", *flags))
    assert error.value.code == 2
    said = "--dev_corpus is searched in evaluations, and there are none: drop it"
    assert said in capsys.readouterr().err


@pytest.fixture
def embedded(monkeypatch):
    """Caught while a run lasts: the numbers of texts and tokens of each embed(), the trainers."""
    calls, trainers = [], []
    embed = train_embed_lora.EmbedTrainer.embed

    def counted(trainer, sequences):
        calls.append((len(sequences), sum(map(len, sequences))))
        trainers.append(trainer)
        return embed(trainer, sequences)

    monkeypatch.setattr(train_embed_lora.EmbedTrainer, "embed", counted)
    return calls, trainers


def test_all_evaluations_embed_at_most_as_many_tokens_as_the_training(
    run_embed, tmp_path, embedded, capsys
):
    calls, trainers = embedded
    data = write_jsonl(tmp_path / "rows.jsonl", make_rows(400))
    report = run_embed("--max_steps", 24, "--eval_every", 9, data=data)
    size = report["data"]["dev"]["dev"]
    said = capsys.readouterr().out
    assert (
        f"pool      dev: {size['corpus']} documents, " in said
        and "4 evaluations embed 100% as many tokens" in said
    )
    evaluated = [tokens for texts, tokens in calls if texts in size.values()]
    assert len(evaluated) == 8  # queries and documents, four times
    assert size["corpus"] > 100
    share = sum(evaluated) / trainers[0].real_tokens
    assert 0.9 < share < 1.02  # of steps drawn otherwise
    assert report["plan"]["evaluation_share"] == pytest.approx(share, rel=0.03)


def test_the_report_counts_the_tokens_of_all_processes(run_embed, embedded, monkeypatch):
    # two that do the same
    monkeypatch.setattr(Accelerator, "reduce", lambda self, tensor, *_: 2 * tensor)
    report, trainer = run_embed("--max_steps", 2), embedded[1][0]
    seconds = report["seconds"] - trainer.seconds_aside["evaluation"]
    assert report["tokens_per_second"] == pytest.approx(2 * trainer.real_tokens / seconds)
    assert report["padded_per_real_token"] == pytest.approx(
        trainer.padded_tokens / trainer.real_tokens
    )


def test_evaluations_are_those_of_the_epochs_too():
    plan = SimpleNamespace(eval_steps=5, total_steps=22, steps_per_epoch=11, epoch_save_steps=0)
    assert evaluations_of(plan) == 6  # 0, 5, 10, 15, 20, 22
    plan.epoch_save_steps = 11
    assert evaluations_of(plan) == 7  # 11


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
    run_embed("--dry_run", "--max_steps", 5, "--eval_every", 1)
    assert "take more dev rows, or evaluate less often (--eval_every)" in capsys.readouterr().out
