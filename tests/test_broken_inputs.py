"""Every broken file, folder and model ends in one sentence, before anything expensive."""

import json
import shutil
from pathlib import Path

import train_embed_lora
from conftest import write_jsonl
from utils import InputError

import pytest
from transformers import AutoTokenizer

GOOD = {"query": "q", "pos": ["p"], "neg": ["n"]}


def put(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def two(row):
    """Two rows, the second one broken."""
    return json.dumps(GOOD) + "\n" + (row if isinstance(row, str) else json.dumps(row)) + "\n"


BROKEN_FILES = {  # name: (content, what the message says)
    "a.jsonl": (
        two('{"query": "q", "pos": ["p"'),
        "a.jsonl, line 2: no valid JSON (Expecting ',' delimiter, column 27)",
    ),
    "b.jsonl": (two("[1, 2]"), "b.jsonl, line 2: a list, not a JSON object"),
    "c.jsonl": ("", "c.jsonl holds no rows"),
    "d.jsonl": (
        '{"query": "q", "answers": "p"}\n',
        'd.jsonl, line 1: no positive (fields: "query", "answers")',
    ),
    "d2.jsonl": (
        '{"frage": "q", "antwort": "p"}\n',
        'd2.jsonl, line 1: no query and no positive (fields: "frage", "antwort"). Rename them to '
        '"question" and "answer", or 質問 and 回答, or pass --query_column NAME --positive_column',
    ),
    "d3.csv": (
        "Wo?,Im Regal.\nWann?,Jetzt.\n",
        '(fields: "Wo?", "Im Regal."; does the first line name the columns?). Rename them to',
    ),
    "d4.csv": (
        f"query,{'x' * 99}\nWann?,Jetzt.\n",
        f'no positive (fields: "query", "{"x" * 60}..."; does the first line name the columns?)',
    ),
    "e.jsonl": (
        '{"text": "q", "pos": "p"}\n',
        'no query (fields: "text", "pos"). Rename one to "query"',
    ),
    "f.jsonl": (
        '{"query": "q", "positive": "p", "answer": "a"}\n',
        "2 columns could be the positive: positive, answer",
    ),
    "g.jsonl": (
        '{"query": 17, "positive": 3, "negative": 4}\n',
        "g.jsonl, line 1: query is the int 17, an id rather than a text",
    ),
    "h.jsonl": (two({"query": "q2", "pos": [12, 13]}), "h.jsonl, line 2: pos is the int 12, an id"),
    "i.jsonl": ('{"query": "q", "pos": ["p"]}\n', "1 rows are left to train on"),
    "j.jsonl": ('{"query": "", "pos": ["p"]}\n' * 3, "0 rows are left to train on"),
    "k.csv": (
        "query,positive\nq,p\nq,p,extra\n",
        "k.csv, line 3: not the 2 columns of the first line",
    ),
    "l.csv": ("query,positive\nq\n", "l.csv, line 2: not the 2 columns of the first line"),
    "l2.tsv": ('query\tpositive\nq\t"open\nq2\tp2\n', "l2.tsv, line 2: unexpected end of data"),
    "l3.csv": ("query,positive\n17,23\n18,24\n", "every query is a number, ids rather than texts"),
    "m.json": ('{"query": "q"', "m.json, line 1: no valid JSON"),
    "n.json": ('[{"query": "q", "pos": "p"}, 3]', "n.json, row 2: a int, not a JSON object"),
    "o.parquet": ("not parquet", "o.parquet is no parquet file"),
    "o2.csv": (b"PK\x03\x04\xff", "o2.csv is an Excel workbook, or an archive, and no text. In"),
    "o3.xlsx": (b"PK\x03\x04\xff", ".parquet. In Excel, save it as CSV UTF-8."),
    "p2.txt": ("q\tp\n", ".parquet. If it is a table, rename it to .tsv or .csv, else convert it"),
    "p.txt": ("q\tp\n", "p.txt is none of .jsonl, .json, .csv, .tsv, .parquet"),
    "r.jsonl": (b'{"query": "\xff\xfe"}\n', "r.jsonl is not UTF-8 (byte 11)"),
    "r2.csv": (
        "query,positive,query\nq,p,other\n",
        'r2.csv, line 1: 2 columns or keys are called "query"',
    ),
    "r3.jsonl": (
        two('{"query": "q", "pos": "p", "pos": "r"}'),
        'r3.jsonl, line 2: 2 columns or keys are called "pos"',
    ),
    "r4.json": (
        '[{"query": "q", "pos": "p"}, {"query": "q", "query": "r"}]',
        "r4.json, row 2: 2 columns or keys are",
    ),
    "r5.jsonl": (
        two({"query": "q2", "pos": [{"docid": "7"}]}),
        "r5.jsonl, line 2: pos is {'docid': '7'}, an id rather than a text",
    ),
    "r6.jsonl": (
        two({"query": "q2", "pos": {"text": ["p"]}}),
        "r6.jsonl, line 2: pos has the list ['p'] where a text",
    ),
    "r7.csv": (
        "query,positive\nq,\"['a', 'b']\"\n",
        "r7.csv, line 2: positive is ['a', 'b'], a list as Python",
    ),
    "r8.jsonl": (
        two({"query": "q2", "pos": "p", "prompt": ["a", "b"]}),
        "r8.jsonl, line 2: 2 prompts in one row",
    ),
    "r9.jsonl": (
        two({"query": "q2", "pos": "p", "prompt": 3}),
        "r9.jsonl, line 2: prompt is the int 3",
    ),
    "ra.jsonl": (
        '{"query": "q", "pos": "p", "score": 1}\n{"query": "q", "pos": "r", "score": 0.25}\n',
        "ra.jsonl, line 2: score is 0.25, one of 2 different numbers. Write 1",
    ),
    "rb.csv": (
        "query,answer,label,score\nq,p,1,0\nr,s,0,1\n",
        "2 columns could be the label: label, score",
    ),
    "rc.jsonl": (
        '{"query": "q", "pos": ["p", "r"], "label": [1, 0]}\n',
        "rc.jsonl, line 1: label is a list of labels",
    ),
    "rd.jsonl": ('{"query": "q", "pos": "p", "label": 0}\n' * 3, "0 rows are left to train on"),
    "s.jsonl": (two({"query": ["q", "r"], "pos": ["p"]}), "s.jsonl, line 2: 2 queries in one row"),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_broken_files_are_named_before_a_model_is_loaded(name, tmp_path, monkeypatch):
    content, sentence = BROKEN_FILES[name]
    monkeypatch.setattr(
        train_embed_lora, "load", lambda *_, **__: pytest.fail("the model was loaded")
    )
    with pytest.raises(InputError) as error:
        train_embed_lora.main(
            ["--train_file", put(tmp_path, name, content), "--output_dir", str(tmp_path / "out")]
        )
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def break_model(folder, name, content):
    if content is None:
        (Path(folder) / name).unlink()
    else:
        (Path(folder) / name).write_text(content)


BROKEN_FOLDERS = {
    "missing file": (["--train_file", "nowhere.jsonl"], "nowhere.jsonl is not there"),
    "missing glob": (["--train_file", "no*where.jsonl"], "no*where.jsonl is not there"),
    "missing dev": (["--dev_file", "dev=nowhere"], "nowhere is not there"),
    "no such column": (["--query_column", "frage"], "no column frage"),
    "same positive": (
        ["--train_file", "SAME", "--dev_size", "0"],
        "has no gradient: they have nothing to tell apart",
    ),
    "dev twice": (["--dev_file", "DATA", "--dev_file", "DATA"], "it is given twice. Drop one."),
    "no BEIR": (["--dev_file", "EMPTY"], "is no BEIR folder: no corpus.jsonl, queries.jsonl"),
    "missing model": (
        ["--model_name", "./nowhere"],
        "--model_name ./nowhere: neither a folder here nor a hub model",
    ),
    "unknown hub model": (
        ["--model_name", "no/such-model"],
        "no connection to the hub: HF_HUB_OFFLINE is set, and --model_name no/such-model is",
    ),
    "empty model": (["--model_name", "EMPTY"], "neither a folder here nor a hub model"),
    "unknown architecture": (
        ["--model_name", 'MODEL:config.json:{"model_type": "nonsense"}'],
        "neither a folder here nor a hub model",
    ),
    "remote code": (
        [
            "--model_name",
            'MODEL:config.json:{"model_type": "mine", "auto_map": {"AutoModel": "m.M"}}',
        ],
        "brings Python code of its own",
    ),
    "encoder-decoder": (
        ["--model_name", 'MODEL:config.json:{"model_type": "t5"}'],
        "is an encoder-decoder",
    ),
    "no weights": (["--model_name", "MODEL:model.safetensors"], "cannot be loaded"),
    "a dense layer": (
        ["--model_name", 'MODEL:modules.json:[{"type": "x.Transformer"}, {"type": "x.Dense"}]'],
        "has a Dense layer behind its pooling",
    ),
    "wrong targets": (
        ["--target_modules", "q_proj"],
        "Linear layers here: dense, key, query, value",
    ),
    "dimension": (
        ["--matryoshka_dims", "4096"],
        "--matryoshka_dims 4096 exceeds the model's 64 dimensions",
    ),
    "hub data": (
        ["--train_file", "--dataset_name", "no/such-data"],
        "no connection to the hub: HF_HUB_OFFLINE is set, and --dataset_name no/such-data is",
    ),
    "no checkpoint": (["--resume_from_checkpoint", "nowhere"], "nowhere is no complete checkpoint"),
    "empty dev": (["--dev_file", "BLANK"], "holds no query with a relevant document"),
    "missing corpus": (["--dev_corpus", "nowhere.jsonl"], "nowhere.jsonl is not there"),
    "a folder as corpus": (["--dev_corpus", "EMPTY"], "is a folder, not a file of documents"),
    "corpus of rows": (["--dev_corpus", "DATA"], 'no text (fields: "query", "pos", "neg")'),
    "full folder": (["--output_dir", "DATA_FOLDER"], "is not empty. Pass another, --overwrite"),
    "a file for a folder": (["--output_dir", "DATA"], "is a file. Name a folder"),
    "unknown metric": (
        ["--metric_for_best", "f1"],
        "--metric_for_best f1 is not measured. Choose one of accuracy@1",
    ),
    "no such report": (["--report_to", "mlflow"], "mlflow: it is not installed"),
}


@pytest.mark.parametrize("case", BROKEN_FOLDERS)
def test_broken_folders_and_models_end_in_a_sentence(case, tmp_path, tiny_bert, pairs):
    flags, sentence = BROKEN_FOLDERS[case]
    (tmp_path / "empty").mkdir()
    named = {
        "EMPTY": str(tmp_path / "empty"),
        "DATA": pairs,
        "DATA_FOLDER": str(Path(pairs).parent),
    }
    named["BLANK"] = write_jsonl(tmp_path / "blank.jsonl", [{"query": "", "pos": ["p"]}])
    named["SAME"] = write_jsonl(
        tmp_path / "same.jsonl", [{"query": f"q{i}", "pos": ["b"]} for i in range(40)]
    )
    flags = [named.get(flag, flag) for flag in flags]
    for i, flag in enumerate(flags):
        if flag.startswith("MODEL:"):
            flags[i] = shutil.copytree(tiny_bert, str(tmp_path / "model"))
            break_model(flags[i], *(flag.split(":", 2)[1:] + [None])[:2])
    base = [
        "--model_name",
        tiny_bert,
        "--train_file",
        pairs,
        "--output_dir",
        str(tmp_path / "out"),
        "--report_to",
        "none",
    ]
    if "--dataset_name" in flags:
        base, flags = base[:2] + base[4:], flags[1:]
    with pytest.raises(InputError) as error:
        train_embed_lora.main([*base, *flags])
    assert sentence in str(error.value)


# ---------------------------------------------------------------- of conversations

BAD_FILES = {
    "truncated JSON": (
        '{"messages": [{"role": "user", "content": "x"}, {"role": "assis\n',
        "line 1: no valid JSON",
    ),
    "no rows": ("", "holds no rows"),
    "a list a line": ("[1, 2]\n", "line 1: a list, not a JSON object"),
    "all answers empty": ('{"prompt": "x", "completion": "  "}\n', "no row is left to train on"),
    "nobody answers": (
        '{"messages": [{"role": "user", "content": "x"}]}\n',
        "no row is left to train on",
    ),
    "nobody asks": (
        '{"messages": [{"role": "assistant", "content": "x"}]}\n',
        "no row is left to train on",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_ends_in_a_sentence(name, run_sft, tmp_path):
    text, sentence = BAD_FILES[name]
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(InputError, match=sentence):
        run_sft(data=str(tmp_path / "bad.jsonl"))


# flags beside good data, what is said
BAD_FLAGS = {
    "unknown metric": (
        ["--metric_for_best", "pos_f1"],
        "pos_f1 is not measured. Choose one of loss, token_accuracy. More",
    ),
    "everything over-long": (
        ["--max_length", 12],
        r"all 58 responses were cut away by --max_length 12. Raise it: the longest row",
    ),
    "first over-long": (
        ["--max_length", 30, "--overlong", "error"],
        "line .*: longer than --max_length 30",
    ),
    "all dropped by regex": (["--drop_regex", "."], "no row is left to train on"),
    "dev file without rows": (["--dev_file", "EMPTY"], "holds no row to evaluate on"),
    "no template file": (
        ["--chat_template", "nowhere.jinja"],
        "--chat_template nowhere.jinja cannot be read",
    ),
    "template with an error": (
        ["--chat_template", "BROKEN"],
        "the chat template cannot render a simple conversation",
    ),
    "template without answers": (
        ["--chat_template", "MUTE"],
        "the chat template cannot render a simple conversation",
    ),
    "template refusing every row": (
        ["--chat_template", "REFUSES"],
        "no row has a token to learn from",
    ),
    "not a causal model": (["--model_name", "BERT"], "Choose a causal language model"),
    "adapter of another base": (["--init_adapter", "NO_ADAPTER"], SystemExit),
    "unreachable endpoint": (
        ["--eval_only", "--endpoint", "http://127.0.0.1:9"],
        "gives no answer",
    ),
}


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flag_ends_in_a_sentence(name, run_sft, tmp_path, tiny_bert, tiny_chat):
    flags, sentence = BAD_FLAGS[name]
    files = {"EMPTY": write_jsonl(tmp_path / "empty.jsonl", [{"prompt": "x", "completion": ""}])}
    files["BERT"] = str(tmp_path / "bert")
    shutil.copytree(tiny_bert, tmp_path / "bert")
    AutoTokenizer.from_pretrained(tiny_chat).save_pretrained(tmp_path / "bert")
    files["NO_ADAPTER"] = str(tmp_path)
    for key, text in (
        ("BROKEN", "{% for m in messages %}"),
        ("MUTE", "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"),
        (
            "REFUSES",
            "{% for m in messages %}{% if 'QUESTION' not in messages[0].content %}{{ raise_exception('no finding') }}"
            "{% endif %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}",
        ),
    ):
        (tmp_path / f"{key}.jinja").write_text(text)
        files[key] = str(tmp_path / f"{key}.jinja")
    flags = [files.get(flag, flag) for flag in flags]
    if sentence is SystemExit:
        with pytest.raises(SystemExit) as exit:
            run_sft(*flags)
        assert exit.value.code == 2
    else:
        with pytest.raises(InputError, match=sentence):
            run_sft(*flags)
