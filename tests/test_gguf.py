"""examples/gguf_ollama.py: what it refuses, what it compares, the Modelfile; with LLAMA_CPP=DIR also real GGUFs."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import contracts
from conftest import CHATML, ROOT, chat_tokenizer
from examples import gguf_ollama
from examples.gguf_ollama import InputError

import huggingface_hub
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertModel,
    Mamba2Config,
    Mamba2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

# ---------------------------------------------------------------- what is refused


@pytest.fixture
def merged(tiny_chat, tmp_path):
    """Return make(base folder, **report): a copy of it as merge.py would leave it, verified."""

    def make(base=tiny_chat, **report):
        folder = tmp_path / "merged"
        shutil.copytree(base, folder)
        (folder / "merge_report.json").write_text(
            json.dumps({"verified": True, "base": str(base)} | report)
        )
        return folder

    return make


@pytest.fixture
def llama_cpp(tmp_path, monkeypatch):
    """A checkout of llama.cpp whose converter only writes b"f16", and no llama-quantize anywhere."""
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    (folder / "convert_hf_to_gguf.py").write_text(
        "import os, sys\nassert os.environ['PYTHONPATH'].startswith(sys.path[0] + '/gguf-py')\n"
        "open(sys.argv[sys.argv.index('--outfile') + 1], 'w').write('f16')\n"
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    return folder


def flags(model, llama_cpp, *more):
    return ["--model_path", str(model), "--llama_cpp", str(llama_cpp), *map(str, more)]


def test_unproven_merges_and_missing_parts_are_refused_before_any_work(
    merged, llama_cpp, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        gguf_ollama, "load", lambda folder: pytest.fail("loaded a model that it must refuse")
    )
    folder, out, full = merged(verified=False), tmp_path / "out", tmp_path / "full"
    full.mkdir()
    (full / "note.txt").write_text("mine")

    def refused(sentence, *more, llama=llama_cpp):
        with pytest.raises(InputError, match=sentence):
            gguf_ollama.main(flags(folder, llama, "--output_path", out, *more))
        assert not out.exists()

    refused('lacks "verified": true')
    (folder / "merge_report.json").write_text('{"verified": "yes"}')  # only true is true
    refused('lacks "verified": true')
    (folder / "merge_report.json").unlink()
    refused("not written by merge.py")
    (folder / "merge_report.json").write_text('{"verified": true}')
    refused("convert_hf_to_gguf.py", llama=tmp_path / "nowhere")
    refused("is not empty", "--output_path", full)
    monkeypatch.setattr(gguf_ollama.importlib.util, "find_spec", lambda name: None)
    refused("pip install llama-cpp-python")


def test_an_encoder_without_pooling_is_refused(merged, llama_cpp, tiny_bert, tmp_path):
    with pytest.raises(InputError, match="no modules.json"):
        gguf_ollama.main(flags(merged(tiny_bert), llama_cpp, "--output_path", tmp_path / "out"))


def test_the_command_ends_with_one_sentence(tiny_chat, tmp_path):
    command = [
        sys.executable,
        str(ROOT / "examples/gguf_ollama.py"),
        *flags(tiny_chat, tmp_path, "--output_path", "x"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert done.stderr.startswith(f"error: {tiny_chat} has no merge_report.json")


def test_every_flag_is_read():
    declared = {option.dest for option in contracts.options_of(gguf_ollama)}
    source = (ROOT / "examples/gguf_ollama.py").read_text(encoding="utf-8")
    assert len(declared) == 6 and declared <= contracts.flags_read(source)


@pytest.mark.parametrize(
    "record",
    [
        {"flags": {"max_length": 128, "enable_thinking": "false", "lr": 1}},  # older runs
        {
            "flags": {"max_length": 2048, "enable_thinking": "auto", "lr": 1},
            "settled": {"max_length": 128, "enable_thinking": "false"},
        },
    ],
)
def test_what_a_run_settled_counts(record, tmp_path):
    (tmp_path / "training_config.json").write_text(json.dumps(record))
    settled = {"max_length": 128, "enable_thinking": "false", "lr": 1}
    assert gguf_ollama.trained_with(tmp_path) == settled


# ---------------------------------------------------------------- answers


class FakeModel:
    """Generates what `replies` says for prompts of 1, 2, ... tokens."""

    device = "cpu"

    def __init__(self, eos, replies):
        self.generation_config = SimpleNamespace(eos_token_id=eos)
        self.replies = iter(replies)

    def generate(self, ids, **options):
        assert options["do_sample"] is False
        return torch.cat([ids, torch.tensor([next(self.replies)])], 1)


def chat_of(tokenizer):
    return partial(tokenizer.apply_chat_template, tokenize=False, enable_thinking=False)


def test_answers_without_a_stop_token_are_reported_and_none_with_one_is_refused(tiny_chat):
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat)
    answers, sequences, stops = gguf_ollama.answer(
        FakeModel([1, 2], [[9, 2], [9, 9]]), tokenizer, chat_of(tokenizer), ["one", "two"]
    )
    assert ([each["stopped"] for each in answers], stops) == ([True, False], [1, 2])
    prompt = tokenizer("<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    assert sequences[0] == [*prompt, 9, 2]
    with pytest.raises(
        InputError, match=r"None of 2 answers stops .* \[7\]"
    ):  # an integer, as most configs have it
        gguf_ollama.answer(
            FakeModel(7, [[9, 2], [9, 9]]), tokenizer, chat_of(tokenizer), ["one", "two"]
        )
    with pytest.raises(InputError, match=r"None of 1 answers stops .* \[None\]"):
        gguf_ollama.answer(FakeModel(None, [[9]]), tokenizer, chat_of(tokenizer), ["one"])


# ---------------------------------------------------------------- figures


def test_kl_top1_and_what_is_retained_are_the_hand_worked_numbers():
    merged = torch.tensor([[0.5, 0.5], [0.8, 0.2]]).log()
    other = torch.tensor([[0.25, 0.75], [0.8, 0.2]]).log()
    figures = gguf_ollama.compare("q4_k_m", merged, None, other)
    assert figures["kl"] == pytest.approx(
        (0.5 * 0.693147 - 0.5 * 0.405465) / 2, abs=1e-5
    )  # ln 2, ln 1.5
    assert figures == {"kl": figures["kl"], "top1": 0.5}
    base = merged - torch.tensor([[3.0, 0.0], [0.0, 4.0]])  # d, of length 5
    other = base + torch.tensor([[3.0, 2.0], [0.0, 3.0]])  # e: <e,d> = 9 + 12, |e - d|^2 = 4 + 1
    figures = gguf_ollama.compare("q4_k_m", merged, base, merged) | gguf_ollama.compare(
        "q8_0", merged, base, other
    )
    assert figures["retained"] == pytest.approx(21 / 25)
    assert figures["residual"] == pytest.approx((5 / 25) ** 0.5)


def test_cosine_is_that_of_the_worst_text():
    merged = torch.eye(2)
    other = torch.tensor([[1.0, 0.0], [0.28, 0.96]])
    assert gguf_ollama.compare("q4_k_m", merged, None, other) == {"cosine": pytest.approx(0.96)}
    with pytest.raises(
        InputError, match="f16 GGUF is not the merged model: cosine 0.96, limit 0.999"
    ):
        gguf_ollama.compare("f16", merged, None, other)


@pytest.mark.parametrize(
    "noise, kind, passes", [(0.0, "f16", 1), (0.2, "f16", 0), (0.2, "q4_0", 1), (9.0, "q4_0", 0)]
)
def test_another_model_is_refused(noise, kind, passes):
    torch.manual_seed(0)
    logits = torch.randn(50, 20) * 3
    merged, other = (x.log_softmax(-1) for x in (logits, logits + noise * torch.randn(50, 20)))
    with (
        contextlib.nullcontext()
        if passes
        else pytest.raises(InputError, match=f"{kind} GGUF is not the merged")
    ):
        gguf_ollama.compare(kind, merged, None, other)


def test_nan_and_missing_parts_are_refused():
    merged = torch.full((2, 2), 0.5).log()
    with pytest.raises(InputError, match="kl nan"):
        gguf_ollama.compare("q4_k_m", merged, None, torch.full((2, 2), torch.nan))
    with pytest.raises(InputError, match="update llama.cpp"):
        gguf_ollama.compare("q4_k_m", merged, None, merged[:, :1])


# ---------------------------------------------------------------- tokens


class FakeGguf:
    """The tokenizer itself as a GGUF, with one fault."""

    def __init__(self, tokenizer, *wrong, eos=None, bos=None, model="gpt2"):
        self.tokenizer, self.wrong, self.bos = tokenizer, wrong, bos
        self.eos, self.metadata = eos, {"tokenizer.ggml.model": model}

    def tokenize(self, text, add_bos=True, special=False):
        text = text.decode() if special else text.decode().replace("<|", "< |")
        for part in self.wrong:
            text = text.replace(part, "x")
        ids = self.tokenizer(text, add_special_tokens=add_bos)["input_ids"]
        return [self.bos] * (add_bos and self.bos is not None) + ids

    def token_eos(self):
        return self.tokenizer.eos_token_id if self.eos is None else self.eos

    def token_bos(self):
        return -1 if self.bos is None else self.bos


@pytest.mark.parametrize(
    "wrong", ["\n\n", "   ", "\t", "1234567", "日", "한", "ש", "🙂", "<|endoftext|>", "mine"]
)
def test_one_text_that_is_split_otherwise_is_enough(tiny_chat, wrong):
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat)
    check = partial(
        gguf_ollama.check_tokens, tokenizer=tokenizer, chat=chat_of(tokenizer), texts=["mine"]
    )
    count, adds_bos, warnings = check(FakeGguf(tokenizer), stops=[tokenizer.eos_token_id])
    assert count > 800 and (adds_bos, warnings) == (False, [])
    with pytest.raises(InputError, match="other token ids") as error:
        check(FakeGguf(tokenizer, wrong), stops=[tokenizer.eos_token_id])
    assert repr(wrong)[1:-1] in str(error.value) and 1 <= str(error.value).count(" became ") <= 3


def test_stop_tokens_and_bos_must_be_those_of_the_model(tiny_chat):
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat)
    check = partial(
        gguf_ollama.check_tokens, tokenizer=tokenizer, chat=chat_of(tokenizer), texts=[]
    )
    with pytest.raises(InputError, match=r"stops at token 5, generation_config.json at \[0, 6\]"):
        check(FakeGguf(tokenizer, eos=5), stops=[0, 6])
    with pytest.raises(InputError, match="adds a BOS that the chat template has not"):
        check(FakeGguf(tokenizer, bos=4), stops=[tokenizer.eos_token_id])
    tokenizer = chat_tokenizer("<s>" + CHATML, "<|im_end|>", "<s>", ["<s>", "<|im_start|>"])
    gguf = FakeGguf(tokenizer, bos=tokenizer.bos_token_id)
    found = gguf_ollama.check_tokens(
        gguf, tokenizer, chat_of(tokenizer), [], [tokenizer.eos_token_id]
    )
    assert found[1:] == (True, [])


def test_wordpiece_may_fail_on_korean_and_hindi_alone(minilm):
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    check = partial(
        gguf_ollama.check_tokens, tokenizer=tokenizer, chat=None, texts=["plain"], stops=None
    )
    assert check(FakeGguf(tokenizer, model="bert"))[2] == []
    assert "Korean" in check(FakeGguf(tokenizer, "한", model="bert"))[2][0]
    with pytest.raises(InputError):
        check(FakeGguf(tokenizer, "한", "plain", model="bert"))
    with pytest.raises(InputError):
        check(FakeGguf(tokenizer, "한", model="gpt2"))


# ---------------------------------------------------------------- conversion and quantisation


def test_the_converter_runs_with_its_own_gguf_package(llama_cpp, tmp_path):
    gguf_ollama.write_gguf("f16", llama_cpp, Path("MODEL"), tmp_path / "unproven-f16.gguf")
    assert (tmp_path / "unproven-f16.gguf").read_text() == "f16"


@pytest.mark.parametrize(
    "fault, cure", [("import sentencepiece_", "pip install sentencepiece"), ("1 / 0", "update it")]
)
def test_a_failing_converter_is_quoted(llama_cpp, tmp_path, fault, cure):
    (llama_cpp / "convert_hf_to_gguf.py").write_text(f"print('out')\n{fault}\n")
    with pytest.raises(InputError, match=cure) as error:
        gguf_ollama.write_gguf("f16", llama_cpp, Path("MODEL"), tmp_path / "unproven-f16.gguf")
    assert ("ZeroDivisionError" in str(error.value)) == (fault == "1 / 0")


@pytest.mark.skipif(sys.platform == "win32", reason="the program is a shell script")
@pytest.mark.parametrize("place", ["llama.cpp/build/bin", "."])
def test_a_built_llama_quantize_is_used(llama_cpp, tmp_path, place):
    program = tmp_path / place / "llama-quantize"
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text('#!/bin/sh\necho "$1 $2 $3" > "$2"\n')
    program.chmod(0o755)
    gguf_ollama.write_gguf("q5_k_m", llama_cpp, Path("MODEL"), tmp_path / "unproven-q5_k_m.gguf")
    written = (tmp_path / "unproven-q5_k_m.gguf").read_text().split()
    assert written == [
        str(tmp_path / "model-f16.gguf"),
        str(tmp_path / "unproven-q5_k_m.gguf"),
        "Q5_K_M",
    ]
    program.write_text("#!/bin/sh\necho no such type >&2\nexit 3\n")
    with pytest.raises(InputError, match="no such type"):
        gguf_ollama.write_gguf("q5_k_m", llama_cpp, Path("MODEL"), tmp_path / "x.gguf")


class FakeLlamaCpp:
    """The few names of llama-cpp-python that are used; a GGUF is the model folder with noise of its kind's size."""

    LLAMA_FTYPE_MOSTLY_Q4_K_M = 15

    def __init__(self, folder, f16=1e-3, q4_k_m=0.03, code=0, bos=None):
        self.folder, self.noise, self.code, self.bos = (
            folder,
            {"f16": f16, "q4_k_m": q4_k_m},
            code,
            bos,
        )

    def llama_model_quantize_default_params(self):
        return SimpleNamespace()

    def llama_model_quantize(self, source, target, params):
        assert (Path(source.decode()).read_text(), params.ftype) == ("f16", 15)
        Path(target.decode()).write_text("q4_k_m")
        return self.code

    def Llama(self, path, n_ctx, embedding, logits_all, verbose):
        gguf = FakeGguf(AutoTokenizer.from_pretrained(self.folder), bos=self.bos)
        model = AutoModelForCausalLM.from_pretrained(self.folder)
        noise = self.noise[Path(path).read_text()]

        @torch.no_grad()
        def evaluate(ids):
            logits = model(torch.tensor([ids])).logits[0]
            torch.manual_seed(0)
            gguf.scores = (logits + noise * torch.randn(logits.shape)).numpy()

        gguf.eval, gguf.reset = evaluate, lambda: None
        return gguf


@pytest.fixture
def rehearsal(merged, llama_cpp, tmp_path, monkeypatch):
    """Return (start(*flags, **of the fake llama_cpp), merged folder, base folder): a run that needs no llama.cpp."""
    folder, base = merged(), tmp_path / "base"
    shutil.copytree(folder, base)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.model.layers[0].mlp.down_proj.weight.data += 0.3
    model.save_pretrained(base)
    (folder / "merge_report.json").write_text(json.dumps({"verified": True, "base": str(base)}))
    settings = json.loads((folder / "generation_config.json").read_text())
    eos = AutoTokenizer.from_pretrained(folder).eos_token_id
    settings["eos_token_id"] = [
        eos,
        *(i for i in range(640) if i != eos),
    ]  # what a random model writes ends the answer
    (folder / "generation_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr(gguf_ollama.importlib.util, "find_spec", lambda name: True)

    def start(*more, **fake):
        monkeypatch.setitem(sys.modules, "llama_cpp", FakeLlamaCpp(folder, **fake))
        return gguf_ollama.main(
            flags(folder, llama_cpp, "--output_path", tmp_path / "out", "--overwrite", *more)
        )

    return start, folder, base


def test_a_whole_run_proves_each_file_and_reports(rehearsal, tmp_path, capsys):
    start, out = rehearsal[0], tmp_path / "out"
    (tmp_path / "samples.txt").write_text("one\n\ntwo\n")
    report = start("--samples", tmp_path / "samples.txt", "--quantize", "q4_k_m")
    names = ["Modelfile", "gguf_report.json", "model-f16.gguf", "model-q4_k_m.gguf"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert [(each["prompt"], each["stopped"]) for each in report["answers"]] == [
        ("one", True),
        ("two", True),
    ]
    f16, q4 = (report["figures"][kind] for kind in ("f16", "q4_k_m"))
    assert f16["kl"] < 1e-5 < q4["kl"] < 0.05 and f16["residual"] < 0.1 < q4["residual"]
    assert f16["retained"] == pytest.approx(1, abs=0.02)
    assert json.loads((out / "gguf_report.json").read_text())["figures"] == report["figures"]
    assert "ollama create NAME" in capsys.readouterr().out and report["warnings"] == []


@pytest.mark.parametrize(
    "kind, left",
    [("f16", ["unproven-f16.gguf"]), ("q4_k_m", ["model-f16.gguf", "unproven-q4_k_m.gguf"])],
)
def test_a_gguf_that_fails_its_proof_keeps_its_name(rehearsal, tmp_path, kind, left):
    with pytest.raises(InputError, match=f"The {kind} GGUF is not the merged model"):
        rehearsal[0](**{kind: 50.0})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == left


def test_a_run_warns_of_noise_and_of_a_base_that_is_not_here(rehearsal):
    start, folder, _ = rehearsal
    assert [
        "over half of what the fine-tune changed" in text for text in start(q4_k_m=0.2)["warnings"]
    ] == [True]
    (folder / "merge_report.json").write_text('{"verified": true, "base": "owner/name"}')
    report = start(q4_k_m=0.2)
    assert ["base owner/name is no such folder" in text for text in report["warnings"]] == [True]
    assert report["figures"]["q4_k_m"].keys() == {"kl", "top1"}


def in_the_cache(folder, cache):
    """Put a model into a hub cache as owner/name."""
    snapshot = cache / "models--owner--name/snapshots/abc"
    shutil.copytree(folder, snapshot)
    (cache / "models--owner--name/refs").mkdir()
    (cache / "models--owner--name/refs/main").write_text("abc")
    return snapshot


def test_a_base_of_the_hub_is_found_in_the_cache(rehearsal, tmp_path, monkeypatch):
    start, folder, base = rehearsal
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = in_the_cache(base, tmp_path / "hub")
    (folder / "merge_report.json").write_text('{"verified": true, "base": "owner/name"}')
    report = start("--quantize", "f16")
    assert report["warnings"] == [] and report["figures"]["f16"]["retained"] == pytest.approx(
        1, abs=0.02
    )
    find = partial(gguf_ollama.find_base, folder)
    assert find("owner/name", None) == snapshot and find(str(base), None) == base
    for name, revision in (
        ("owner/name", "v2"),
        ("owner/other", None),
        ("/no/folder", None),
        (None, None),
    ):
        with pytest.raises(InputError, match=f"base {name} is no such folder"):
            find(name, revision)
    config = json.loads((snapshot / "config.json").read_text())
    (snapshot / "config.json").write_text(json.dumps(config | {"vocab_size": 700}))
    with pytest.raises(InputError, match="owner/name has a vocabulary of another size"):
        find("owner/name", None)
    (snapshot / "modules.json").write_text("[]")
    with pytest.raises(InputError, match="owner/name is another kind of model"):
        find("owner/name", None)


def test_one_model_is_in_memory_at_a_time(rehearsal, llama_cpp, monkeypatch):
    start, folder, base = rehearsal
    living, counts = weakref.WeakSet(), []

    def counted(make):
        def load(*args, **options):
            counts.append(len(living))
            model = make(*args, **options)
            if model:
                living.add(model)
            return model

        return load

    monkeypatch.setattr(gguf_ollama, "load", counted(gguf_ollama.load))
    monkeypatch.setattr(FakeLlamaCpp, "Llama", counted(FakeLlamaCpp.Llama))
    monkeypatch.setattr(
        gguf_ollama, "write_gguf", counted(gguf_ollama.write_gguf)
    )  # the converter loads it, too
    start()
    assert counts == [0] * 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_model_in_the_dtype_of_its_file_gives_the_outputs_of_float32(tiny_chat, tmp_path, dtype):
    AutoModelForCausalLM.from_pretrained(tiny_chat).to(dtype).save_pretrained(tmp_path)
    inputs = [[5, 6, 7, 8, 9], [10, 11]]
    expected = gguf_ollama.outputs(
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval(), inputs
    )
    model = gguf_ollama.load(tmp_path)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    assert torch.equal(gguf_ollama.outputs(model, inputs), expected)
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    hooks = [
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    ]
    assert not any(hooks)
    native = model(torch.tensor(inputs[:1])).logits[0].float().log_softmax(-1)
    assert torch.equal(native, expected[:5]) == (
        dtype == torch.float32
    )  # which is what the conversion is for


def test_a_model_whose_blocks_cannot_be_widened_alone_is_widened_whole():
    shape = dict(
        vocab_size=90,
        hidden_size=32,
        num_hidden_layers=1,
        num_heads=4,
        head_dim=16,
        n_groups=1,
        state_size=8,
    )
    model = Mamba2ForCausalLM(Mamba2Config(**shape)).to(torch.bfloat16).eval()
    found = gguf_ollama.outputs(model, [[5, 6, 7]])
    assert torch.equal(found, gguf_ollama.outputs(model.float(), [[5, 6, 7]]))


def test_embeddings_in_the_dtype_of_their_file_are_those_of_float32(tiny_bert, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    BertModel.from_pretrained(tiny_bert).to(torch.bfloat16).save_pretrained(tmp_path / "bert")
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / "bert")
    sentence_transformers.SentenceTransformer(str(tmp_path / "bert")).save(str(tmp_path / "model"))
    texts, exact = ["where is the apple", "a lamp"], {"dtype": torch.float32}
    reference = sentence_transformers.SentenceTransformer(
        str(tmp_path / "model"), model_kwargs=exact
    )
    model = gguf_ollama.load(tmp_path / "model")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    found = gguf_ollama.outputs(model, texts)
    assert (
        found.dtype == torch.float32
        and (found - gguf_ollama.outputs(reference, texts)).abs().max() < 1e-6
    )


@pytest.mark.parametrize(
    "trained, opening", [("true", ""), ("false", "<think>\n\n</think>\n\n"), (None, None)]
)
def test_the_model_is_asked_as_it_was_trained(
    rehearsal, tmp_path, monkeypatch, capsys, trained, opening
):
    start, folder, _ = rehearsal
    (folder / "chat_template.jinja").write_text(NO_THINKING)
    flags = {"enable_thinking": trained} if trained else {}
    (folder / "training_config.json").write_text(json.dumps({"flags": flags}))
    seen, answer = [], gguf_ollama.answer

    def caught(*args):
        seen.append(args)
        if trained != "true":
            raise StopIteration
        return answer(*args)

    monkeypatch.setattr(gguf_ollama, "answer", caught)
    with contextlib.suppress(StopIteration):
        start("--quantize", "f16")
    _, _, chat, _, max_new_tokens = seen[0]
    end = "<think>\n\n</think>\n\n" if opening is None else opening
    prompt = chat([{"role": "user", "content": "x"}], add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n" + end
    assert max_new_tokens == (1024 if trained == "true" else 256)
    if trained == "true":
        assert "</think>" not in (tmp_path / "out/Modelfile").read_text()
        assert "--chat-template-kwargs '{\"enable_thinking\": true}'" in capsys.readouterr().out


def test_a_bos_that_llama_cpp_adds_is_not_in_the_template_too(rehearsal, tmp_path):
    start, folder, _ = rehearsal
    tokenizer = chat_tokenizer(
        "{{ bos_token }}" + CHATML, "<|im_end|>", "<s>", ["<s>", "<|im_start|>"]
    )
    tokenizer.save_pretrained(folder)
    for bos, first in {
        None: "{{ if not .System }}<s>{{ end }}",
        tokenizer.bos_token_id: "",
    }.items():
        start(bos=bos)
        assert f'TEMPLATE """{first}{{{{ range' in (tmp_path / "out/Modelfile").read_text()


def test_a_quantisation_that_fails_is_reported(rehearsal):
    with pytest.raises(InputError, match="llama.cpp could not write"):
        rehearsal[0](code=1)


# ---------------------------------------------------------------- Modelfile


def render_go(template, messages):
    """Evaluate as much of Go's text/template as a Modelfile of ours has; Ollama's .System is the system messages."""
    parts = re.split(r"{{ (.*?) }}", template)  # text, action, text, ...

    def block(i, message):
        """Return the text from part i up to its end or else, and the index of that."""
        out = ""
        while i < len(parts):
            if i % 2 == 0:
                out, i = out + parts[i], i + 1
            elif parts[i].startswith(("end", "else")):
                break
            elif parts[i] == ".Content":
                out, i = out + message["content"], i + 1
            elif parts[i] == "range .Messages":
                texts = [block(i + 1, each) for each in messages]
                out, i = out + "".join(text for text, _ in texts), texts[0][1] + 1
            else:
                text, i = choose(i, message)
                out += text
        return out, i

    def choose(i, message):
        """Return the text of the first branch whose condition holds, and the index after its end."""
        chosen = ""
        while parts[i] != "end":
            condition = parts[i].removeprefix("else ")
            text, following = block(i + 1, message)
            if condition == "if not .System":
                holds = not any(each["role"] == "system" and each["content"] for each in messages)
            else:
                holds = condition == f'if eq .Role "{message["role"]}"'
            chosen, i = text if holds and not chosen else chosen, following
        return chosen, i + 1

    text, i = block(0, None)
    assert i == len(parts)
    return text


LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content TRIM }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
DEFAULT = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n{% endif %}"
    + CHATML
)
NO_THINKING = CHATML.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
)
PHI = CHATML.replace(
    "{% endif %}", "{% else %}{{ eos_token }}{% endif %}"
)  # ends differently without a prompt
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('no system role') }}{% endif %}{% endfor %}"
)
ENDS = "{{ .Content }}<|im_end|>\n{{ "
GO_CHATML = (
    f'{{{{ range .Messages }}}}{{{{ if eq .Role "user" }}}}<|im_start|>user\n{ENDS}else if eq .Role "assistant" }}}}'
    f'<|im_start|>assistant\n{ENDS}else if eq .Role "system" }}}}<|im_start|>system\n{ENDS}end }}}}{{{{ end }}}}'
    "<|im_start|>assistant\n"
)
STRIPS, NO_SYSTEM = "strips contents", "knows no system messages"


def render_with(template, strip_bos=True):
    tokenizer = chat_tokenizer(template, "</s>", "<s>", ["<s>"])
    chat = chat_of(tokenizer)
    return lambda messages, **flag: chat(messages, **flag).removeprefix("<s>" if strip_bos else "")


@pytest.mark.parametrize(
    "template, notes",
    [
        (CHATML, []),
        (LLAMA3.replace("TRIM", ""), []),
        (LLAMA3.replace("TRIM", "| trim"), [STRIPS]),
        (GEMMA, [NO_SYSTEM, STRIPS]),
        (DEFAULT, []),
        (NO_THINKING, []),
        (PHI, []),
        (MISTRAL, [NO_SYSTEM]),
    ],
    ids="chatml llama3 llama3-trim gemma default-system no-thinking phi mistral".split(),
)
@pytest.mark.parametrize("strip_bos", [True, False])
def test_ollama_sends_what_the_chat_template_renders(template, notes, strip_bos):
    render = render_with(template, strip_bos)  # whether the GGUF adds it by itself
    go, found = gguf_ollama.find_template(render)
    assert [note for note, text in zip(notes, found, strict=True) if note in text] == notes
    chats = ["user", "user assistant user assistant user"] + ["system user assistant user"] * (
        NO_SYSTEM not in notes
    )
    for roles in chats:
        messages = [
            {"role": r, "content": f"{i} é\n{{{{ .Content }}}} ü"}
            for i, r in enumerate(roles.split())
        ]
        assert render_go(go, messages) == render(messages, add_generation_prompt=True)


def test_the_go_template_is_written_as_a_person_would():
    assert gguf_ollama.find_template(render_with(CHATML))[0] == GO_CHATML
    start = "{{ if not .System }}<|im_start|>system\nBe good.<|im_end|>\n{{ end }}"
    assert gguf_ollama.find_template(render_with(DEFAULT))[0] == start + GO_CHATML
    assert (
        gguf_ollama.find_template(render_with(NO_THINKING))[0]
        == GO_CHATML + "<think>\n\n</think>\n\n"
    )


LOOP = "{% for m in messages %}"


@pytest.mark.parametrize(
    "template, why",
    [
        (
            CHATML.replace(LOOP, "{% for m in messages[-1:] %}"),
            "moves or leaves out a turn",
        ),  # forgets history
        (CHATML.replace(LOOP, "{% for m in messages | reverse %}"), "moves or leaves out a turn"),
        (
            CHATML.replace("{{ m.content }}", "{{ m.content }}{% if loop.last %} /no{% endif %}"),
            "no prefix and suffix",
        ),
        (
            CHATML.replace("{{ m.content }}", "{{ m.content | replace('\\n', ' ') }}"),
            "no prefix and suffix",
        ),
        (
            CHATML.replace("{{ m.content }}", "{{ loop.index }}: {{ m.content }}"),
            "no prefix and suffix",
        ),
        (
            "{% set s = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' %}"
            + CHATML.replace(LOOP, "{% for m in messages if m.role != 'system' %}").replace(
                "{{ m.content }}", "{{ s if loop.first }}{{ m.content }}"
            ),
            "system user",  # folds the system text into the question
        ),
        (CHATML.replace("<|im_end|>", "{{ '{}' }}"), "characters that a Modelfile cannot hold"),
        (CHATML.replace("<|im_end|>", '"""'), "characters that a Modelfile cannot hold"),
        (
            CHATML.replace("<|im_end|>", "\u3000"),
            "characters that a Modelfile cannot hold",
        ),  # Ollama's parser drops it
    ],
    ids="last-turn reversed marks-the-last rewrites numbers folds braces quotes unprintable".split(),
)
def test_other_chat_templates_are_refused(template, why):
    with pytest.raises(InputError, match=why):
        gguf_ollama.find_template(render_with(template))


def write_modelfile(folder, template, tmp_path, stops=(1, 2), **files):
    """Return the lines of the Modelfile of a tiny model with this template and these settings, and the warnings."""
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    tokenizer = chat_tokenizer(template, "<|im_end|>", "<s>", ["<s>", "<|end|>"])
    stops = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|end|>"]) if stops else None
    chat = chat_of(tokenizer)
    notes = gguf_ollama.write_modelfile(folder, tmp_path, "q6_k", tokenizer, chat, stops)
    return (tmp_path / "Modelfile").read_text(), notes


def test_modelfile_says_what_the_model_was_trained_with(merged, tmp_path):
    folder = merged()
    text, notes = write_modelfile(folder, CHATML, tmp_path)
    assert notes == [] and text == (
        f'FROM ./model-q6_k.gguf\nTEMPLATE """{GO_CHATML}"""\nPARAMETER stop "<|im_end|>"\nPARAMETER stop "<|end|>"\n'
        "PARAMETER num_ctx 256\nPARAMETER temperature 0\nPARAMETER repeat_penalty 1.0\n"
    )
    trained, positions = {"flags": {"max_length": 6000}}, {"max_position_embeddings": 8192}
    text, _ = write_modelfile(folder, CHATML, tmp_path, config=positions)
    assert "PARAMETER num_ctx 4096\n" in text
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "repetition_penalty": 1.05}
    text, _ = write_modelfile(
        folder, CHATML, tmp_path, training_config=trained, generation_config=sampling
    )
    wanted = {"num_ctx 6000", "temperature 0.6", "top_k 50", "top_p 0.95", "repeat_penalty 1.05"}
    assert {line.removeprefix("PARAMETER ") for line in text.splitlines()} >= wanted


@pytest.mark.parametrize(
    "trained, sampled", [("false", False), ("true", True), (None, True), ("auto", True)]
)
def test_sampling_is_that_of_the_base_unless_it_was_trained_without_thinking(
    merged, tmp_path, trained, sampled
):
    base = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20}
    settings = {"generation_config": base}
    if trained:
        settings["training_config"] = {"flags": {"enable_thinking": trained}}
    text, _ = write_modelfile(merged(), CHATML, tmp_path, **settings)
    found = dict(
        line.split()[1:] for line in text.splitlines() if re.match("PARAMETER (t|top_.)", line)
    )
    values = {"temperature": "0.6", "top_k": "20", "top_p": "0.95"}
    assert found == (values if sampled else {"temperature": "0"})


def test_modelfile_without_a_template_says_so(merged, tmp_path):
    folder = merged()
    text, notes = write_modelfile(
        folder, CHATML.replace(LOOP, "{% for m in messages[-1:] %}"), tmp_path
    )
    assert "TEMPLATE" not in text and 'PARAMETER stop "<|im_end|>"' in text
    assert len(notes) == 1 and notes[0].startswith("no TEMPLATE in Modelfile")
    text, notes = write_modelfile(folder, "{{ raise_exception('never') }}", tmp_path)
    assert "TEMPLATE" not in text and "never" in notes[0]
    _, notes = write_modelfile(folder, "{{ strftime_now('%Y') }}" + CHATML, tmp_path)
    assert len(notes) == 1 and "the date" in notes[0]
    assert write_modelfile(folder, CHATML, tmp_path, stops=None) == ("FROM ./model-q6_k.gguf\n", [])


# ---------------------------------------------------------------- llama.cpp itself: LLAMA_CPP=DIR of its source


@pytest.fixture
def real():
    """The source folder of llama.cpp; skips where it or llama-cpp-python is missing."""
    pytest.importorskip("llama_cpp")
    if "LLAMA_CPP" not in os.environ:
        pytest.skip("LLAMA_CPP names no source folder of llama.cpp")
    return Path(os.environ["LLAMA_CPP"])


@pytest.fixture
def qwen_tokenizer(real, monkeypatch):
    """Qwen2's own tokenizer, from the vocabulary in llama.cpp's source: its converter refuses unknown ones."""
    monkeypatch.syspath_prepend(str(real / "gguf-py"))
    gguf = pytest.importorskip("gguf")
    from transformers import Qwen2TokenizerFast

    fields = gguf.GGUFReader(real / "models/ggml-vocab-qwen2.gguf").fields

    def strings(name):
        return [bytes(fields[name].parts[i]).decode() for i in fields[name].data]

    kinds = [
        int(fields["tokenizer.ggml.token_type"].parts[i][0])
        for i in fields["tokenizer.ggml.token_type"].data
    ]
    vocabulary = {token: i for i, (token, kind) in enumerate(zip(strings("tokenizer.ggml.tokens"), kinds, strict=True))
                  if kind == 1}  # fmt: skip
    merges = [tuple(pair.split(" ")) for pair in strings("tokenizer.ggml.merges")]
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None}
    added = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2TokenizerFast(
        vocab=vocabulary, merges=merges, additional_special_tokens=added, **ends
    )
    tokenizer.chat_template = DEFAULT
    return tokenizer


def train_answers(tokenizer, folder, text):
    """Train a Qwen3 of 2 layers of 256 to answer everything with `text`, and write it as merge.py would."""
    torch.manual_seed(0)
    eos = tokenizer.convert_tokens_to_ids("<|im_end|>")
    shape = dict(
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )
    config = Qwen3Config(
        vocab_size=151936,
        intermediate_size=256,
        max_position_embeddings=512,
        eos_token_id=eos,
        **shape,
    )
    model = Qwen3ForCausalLM(config)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    chat = chat_of(tokenizer)
    for prompt in ["Hi", "日本", "¿Qué?", "한국어", "1 + 1"] * 8:
        prefix = chat([{"role": "user", "content": prompt}], add_generation_prompt=True)
        start, ids = (
            len(tokenizer(prefix)["input_ids"]),
            tokenizer(prefix + text + "<|im_end|>")["input_ids"],
        )
        labels = torch.tensor([[-100] * start + ids[start:]])
        model(torch.tensor([ids]), labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_real_gguf_is_proven_and_that_of_another_model_refused(
    real, qwen_tokenizer, tmp_path, capsys
):
    base = train_answers(qwen_tokenizer, tmp_path / "base", "no")
    folder = train_answers(qwen_tokenizer, tmp_path / "merged", "yes")
    (folder / "merge_report.json").write_text(json.dumps({"verified": True, "base": str(base)}))
    report = gguf_ollama.main(flags(folder, real, "--output_path", tmp_path / "out"))
    print(report["figures"])
    assert {each["answer"] for each in report["answers"]} == {"yes"} and report["warnings"] == []
    f16, q4 = (report["figures"][kind] for kind in ("f16", "q4_k_m"))
    assert f16["kl"] < 1e-4 and f16["top1"] > 0.99 and f16["retained"] == pytest.approx(1, abs=0.01)
    assert q4["kl"] < 0.5 and f16["residual"] < q4["residual"] < 0.5
    assert "Be good." in (tmp_path / "out/Modelfile").read_text()
    sequences = [
        qwen_tokenizer("<|im_start|>assistant\n" + text)["input_ids"] for text in ("yes", "no")
    ]
    llama = sys.modules["llama_cpp"].Llama(
        str(tmp_path / "out/model-f16.gguf"), logits_all=True, verbose=False
    )
    other, gguf = (
        gguf_ollama.outputs(gguf_ollama.load(base), sequences),
        gguf_ollama.outputs(llama, sequences),
    )
    with pytest.raises(InputError, match="f16 GGUF is not the merged model"):
        gguf_ollama.compare("f16", other, None, gguf)
    gguf_ollama.compare("f16", gguf_ollama.outputs(gguf_ollama.load(folder), sequences), None, gguf)


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_a_real_embedding_gguf_pools_like_sentence_transformers(
    real, merged, minilm, tmp_path, kind
):
    folder, base = merged(minilm), tmp_path / "base"
    shutil.copytree(minilm, base)
    (folder / "merge_report.json").write_text(json.dumps({"verified": True, "base": str(base)}))
    model = BertModel.from_pretrained(folder)
    torch.manual_seed(0)
    for parameter in model.encoder.parameters():
        parameter.data += 0.05 * parameter.data.std(unbiased=False) * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    report = gguf_ollama.main(
        flags(folder, real, "--output_path", tmp_path / "out", "--quantize", kind)
    )
    print(report["figures"])
    assert (
        report["figures"]["f16"]["cosine"] > 0.9999
        and 0.98 < report["figures"]["f16"]["retained"] < 1.02
    )
    assert report["figures"][kind]["cosine"] > 0.99
    assert ["Korean" in text for text in report["warnings"]] == [True]
    assert (tmp_path / "out/Modelfile").read_text() == f"FROM ./model-{kind}.gguf\n"
