"""Turn a folder that merge.py wrote into a GGUF for llama.cpp and Ollama, every step of it proven.

git clone --depth 1 https://github.com/ggml-org/llama.cpp
pip install llama-cpp-python sentencepiece
python examples/gguf_ollama.py --model_path MERGED --llama_cpp llama.cpp --output_path GGUF \\
  --quantize q4_k_m

GGUF gets model-f16.gguf, model-q4_k_m.gguf, Modelfile and gguf_report.json; unproven-*.gguf did not
pass. One model is in memory at a time, in the dtype of its file.
Shapes: P positions, V vocabulary, N texts, D embedding.
"""

import argparse
import contextlib
import gc
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import merge

import torch
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer

QUANTIZE = "f16 q8_0 q6_k q5_k_m q5_k_s q4_k_m q4_k_s q4_0 q3_k_m q2_k".split()
MAX_NEW_TOKENS = {False: 256, True: 1024}  # of an answer, without and with thinking
MAX_TOKENS, LAST_POSITIONS = 512, 64  # of a compared sequence; compared in each
# worst figures let through: f16 differs by rounding; a quantised model below these is another model
LIMITS = {
    "f16": {"kl": 1e-3, "top1": 0.97, "cosine": 0.999},
    "quantised": {"kl": 2.0, "top1": 0.5, "cosine": 0.9},
}
PROMPTS = (
    "What is the capital of Japan? Answer in one word."
    "¦日本の首都はどこですか。一言で答えてください。¦17 + 25 = ?¦中国的首都是哪里?用一个词回答。"
    "¦한국의 수도는 어디입니까? 한 단어로.¦Quelle est la capitale de la France ?"
).split("¦")
PIECES = (  # of texts that tokenizers disagree on: compared each alone and before each
    "a¦ ¦   ¦\n¦\n\n¦\t¦\r\n¦1¦1234567¦3.14¦日本語のテキスト。¦カタカナ¦中文,¦한국어"
    "¦naïve Łódź¦Привет¦Ελληνικά¦שלום"
    "¦مرحبا¦ชาวโลก¦हिन्दी¦🙂¦👩‍👩‍👧¦I'm we'LL¦def f(x):\n    return x ** 2"
    "¦{'k': ['\\n']}¦https://a.b/c_d?e=%2¦...!?¦---¦“–”"
).split("¦")
# llama.cpp's does not decompose Hangul and drops Hindi's vowels
WORDPIECE_FAILS = re.compile("[\u0900-\u097f가-힣]")


class InputError(ValueError):
    """A flag, file or folder is wrong, or a proof failed: shown without a traceback, exit 1."""


def need(true, sentence):
    """Raise InputError(sentence) unless `true`."""
    if not true:
        raise InputError(sentence)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--model_path", type=Path, required=True, metavar="DIR", help="what merge.py wrote"
    )
    parser.add_argument(
        "--llama_cpp",
        type=Path,
        required=True,
        metavar="DIR",
        help="llama.cpp checkout, built or not",
    )
    parser.add_argument(
        "--output_path",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder for GGUF and Modelfile",
    )
    parser.add_argument(
        "--quantize",
        default="q4_k_m",
        type=str.lower,
        choices=QUANTIZE,
        help="[q4_k_m] f16: no quantisation",
    )
    parser.add_argument(
        "--samples",
        type=Path,
        metavar="FILE",
        help="prompts, one a line, as trained on [6 questions]",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what an earlier call wrote"
    )
    return parser.parse_args(argv)


def read_json(path):
    """Return the parsed file, or {} where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def trained_with(folder):
    """Return the flags of the training, {} of a model that was not trained here."""
    record = read_json(folder / "training_config.json")
    return record.get("flags", {}) | record.get("settled", {})


def check_inputs(args):
    """Return (base model, whether this is an embedding model, prompts); raises InputError."""
    folder, out, script = (
        args.model_path,
        args.output_path,
        args.llama_cpp / "convert_hf_to_gguf.py",
    )
    report, pooled = read_json(folder / "merge_report.json"), (folder / "modules.json").exists()
    need(
        report,
        f"{folder} has no merge_report.json, so it was not written by merge.py. Merge with "
        "merge.py.",
    )
    need(
        report.get("verified") is True,
        f'{folder}/merge_report.json lacks "verified": true. Use merge.py --verify full.',
    )
    need(script.exists(), f"There is no {script}. Point --llama_cpp at a checkout of llama.cpp.")
    need(
        args.overwrite or not out.exists() or not any(out.iterdir()),
        f"{out} is not empty. Pass --overwrite.",
    )
    embedding = pooled or not read_json(folder / "config.json")["architectures"][0].endswith(
        "ForCausalLM"
    )
    need(
        pooled or not embedding,
        f"{folder} has no modules.json, without which llama.cpp does not pool. Merge again.",
    )
    for package in ["llama-cpp-python", "sentence-transformers"][: 1 + embedding]:
        module = package.removesuffix("-python").replace("-", "_")
        need(importlib.util.find_spec(module), f"{package} is missing. Run pip install {package}")
    lines = args.samples.read_text(encoding="utf-8").splitlines() if args.samples else PROMPTS
    return report.get("base"), embedding, [line for line in lines if line.strip()]


def find_base(args, name, flags):
    """Return the folder of the base, of a hub id that in the hub's cache.

    Raises InputError if there is no base that the model can be compared with.
    """
    try:
        folder = merge.find_base(name or "", flags.get("model_revision"), cached_only=True)
    except merge.InputError:
        raise InputError(f"its base {name} is no such folder, nor one in the hub's cache") from None
    pooled = [(each / "modules.json").exists() for each in (folder, args.model_path)]
    need(pooled[0] == pooled[1], f"its base {name} is another kind of model")
    sizes = [
        read_json(each / "config.json").get("vocab_size") for each in (folder, args.model_path)
    ]
    need(sizes[0] == sizes[1], f"its base {name} has a vocabulary of another size")
    return folder


def load(folder):
    """Return a causal LM, or where there is a modules.json a SentenceTransformer, in its dtype."""
    if (Path(folder) / "modules.json").exists():
        module = importlib.import_module("sentence_transformers")
        return module.SentenceTransformer(str(folder), model_kwargs={"dtype": "auto"})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def blocks_of(module):
    """Yield (module, its weights) so that each weight is in one.

    Blocks of layers are whole, other modules have their own weights.
    """
    yield module, list(module.parameters(recurse=False))
    for child in module.children():
        if isinstance(module, torch.nn.ModuleList):
            yield child, list(child.parameters())
        else:
            yield from blocks_of(child)


@contextlib.contextmanager
def in_float32(model):
    """Let a model compute in float32: a block's weights are converted while it runs, and put back.

    The rounding of 16-bit activations would be taken for a difference between model and GGUF.
    """
    stored, hooks = {}, []

    def widen(weights, *_):
        stored.update((weight, weight.data) for weight in weights)
        for weight in weights:
            weight.data = weight.data.float()

    def restore(weights, *_):
        for weight in weights:
            weight.data = stored.pop(weight)

    for module, weights in blocks_of(model):
        if weights:
            hooks.append(module.register_forward_pre_hook(partial(widen, weights)))
            hooks.append(module.register_forward_hook(partial(restore, weights)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        restore(list(stored))


def answer(model, tokenizer, chat, prompts, max_new_tokens=MAX_NEW_TOKENS[False]):
    """Answer greedily; returns (answers, their token ids, stop ids).

    Raises InputError if no answer stops.
    """
    stops = model.generation_config.eos_token_id
    stops, answers, sequences = stops if isinstance(stops, list) else [stops], [], []
    for prompt in prompts:
        text = chat([{"role": "user", "content": prompt}], add_generation_prompt=True)
        ids = torch.tensor(
            [tokenizer(text, add_special_tokens=False)["input_ids"]], device=model.device
        )
        options = {
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": max_new_tokens,
            "do_sample": False,
        }
        output = model.generate(ids, **options)[0].tolist()
        reply = tokenizer.decode(output[ids.shape[1] :], skip_special_tokens=True)
        answers.append({"prompt": prompt, "answer": reply, "stopped": output[-1] in stops})
        print(
            f"answer    {prompt} -> {reply!r}" + " (no stop token)" * (output[-1] not in stops),
            flush=True,
        )
        sequences.append(output[:MAX_TOKENS])
    need(
        any(each["stopped"] for each in answers),
        f"None of {len(answers)} answers stops within {max_new_tokens} tokens at eos_token_id "
        f"{stops} of generation_config.json. Was that trained on?",
    )
    return answers, sequences, stops


@torch.no_grad()
def outputs(model, inputs):
    """Return log-probabilities (P, V) at the last positions of token ids, or of texts embeddings.

    Embeddings (N, D) have length 1.
    """
    if not isinstance(model, torch.nn.Module):
        return raw_outputs(model, inputs)
    try:
        with in_float32(model):
            return raw_outputs(model, inputs)
    except RuntimeError:  # Mamba 2 casts its states to the dtype that a weight has at rest
        return raw_outputs(model.float(), inputs)


def raw_outputs(model, inputs):
    """Return outputs() of a model as it is, torch's or llama.cpp's."""
    ours = isinstance(model, torch.nn.Module)
    if isinstance(inputs[0], str):
        rows = model.encode(inputs, prompt="") if ours else model.embed(inputs)
        return torch.nn.functional.normalize(torch.as_tensor(rows))
    rows = []
    for ids in inputs:
        if ours:
            rows.append(
                model(torch.tensor([ids], device=model.device)).logits[0, -LAST_POSITIONS:].cpu()
            )
        else:
            model.reset()
            model.eval(ids)
            rows.append(torch.tensor(model.scores[: len(ids)][-LAST_POSITIONS:]))
    return torch.cat(rows).log_softmax(-1)


def compare(kind, merged, base, other):
    """Return a GGUF's figures; raises InputError if it is another model than the merged one.

    Of embeddings (N, D) the lowest cosine; of log-probabilities (P, V) kl, the mean of
    KL(merged || other) in nats, and top1, the share of equal argmax. With d = merged - base,
    e = other - base: retained <e,d>/|d|^2, residual |e-d|/|d|.
    """
    need(
        merged.shape == other.shape,
        f"GGUF outputs are {[*other.shape]}, not {[*merged.shape]}: update llama.cpp.",
    )
    if merged.max() > 0:  # no log-probabilities
        figures = {"cosine": (merged * other).sum(1).min().item()}
    else:
        kl = (merged.exp() * (merged - other)).sum(1).mean().item()
        figures = {"kl": kl, "top1": (merged.argmax(1) == other.argmax(1)).float().mean().item()}
    limits = LIMITS.get(kind, LIMITS["quantised"])
    cure = (
        "Update llama.cpp and llama-cpp-python." if kind == "f16" else "Pass a larger --quantize."
    )
    for name, value in figures.items():
        good = value <= limits[name] if name == "kl" else value >= limits[name]  # of NaN neither
        need(
            good,
            f"The {kind} GGUF is not the merged model: {name} {value:.3g}, limit "
            f"{limits[name]:g}. {cure}",
        )
    if base is not None:
        d, e = merged - base, other - base
        dd, ed, rest = (products.sum(1).double().sum() for products in (d * d, e * d, (e - d) ** 2))
        figures |= {"retained": (ed / dd).item(), "residual": (rest / dd).sqrt().item()}
    return figures


def check_tokens(llm, tokenizer, chat, texts, stops):
    """Compare a GGUF's token ids and end of answer with the tokenizer's.

    stops: None for an embedding model. Returns (texts compared, whether llama.cpp adds BOS,
    warnings); raises InputError naming three differences.
    """
    embedding, turns = (
        stops is None,
        [{"role": role, "content": "日本 1"} for role in ("user", "assistant", "user")],
    )
    special = [
        text
        for token in tokenizer.all_special_tokens
        for text in (token, f"a{token}b", f"a {token}\nb")
    ]
    chats = [] if embedding else [chat(turns, add_generation_prompt=True)]
    cases = dict.fromkeys(
        [*PIECES, *(a + b for a in PIECES for b in PIECES), *texts, *special, *chats]
    )
    for text in cases:  # what is pooled has CLS, SEP or EOS around it
        ours = tokenizer(text, add_special_tokens=embedding)["input_ids"]
        cases[text] = ours, llm.tokenize(text.encode(), add_bos=embedding, special=True)
    other = {text: f"\n  {text!r}: {a} became {b}" for text, (a, b) in cases.items() if a != b}
    if (
        llm.metadata["tokenizer.ggml.model"] == "bert"
        and other
        and all(map(WORDPIECE_FAILS.search, other))
    ):
        return (
            len(cases),
            False,
            ["llama.cpp splits Korean and Hindi otherwise than this tokenizer: do not use them"],
        )
    found = f"The GGUF gives other token ids in {len(other)} of {len(cases)} texts"
    need(
        not other,
        f"{found}. Update llama.cpp, and merge with the base's tokenizer."
        + "".join([*other.values()][:3]),
    )
    adds_bos = not embedding and llm.tokenize(b"a")[0] == llm.token_bos()
    wanted = not adds_bos or chats[0].startswith(tokenizer.bos_token or "\0")
    need(
        wanted,
        "llama.cpp adds a BOS that the chat template has not. Set add_bos_token false in the "
        "tokenizer.",
    )
    ends = embedding or llm.token_eos() in stops
    need(
        ends,
        f"The GGUF stops at token {llm.token_eos()}, generation_config.json at {stops}. Correct "
        "eos_token.",
    )
    return len(cases), adds_bos, []


def write_gguf(kind, args, path):
    """Convert the model with llama.cpp's script, or quantise model-f16.gguf.

    Quantising takes llama-quantize, or without it llama-cpp-python.
    """
    source, places = (
        path.with_name("model-f16.gguf"),
        [f"{args.llama_cpp}/build/bin", os.environ.get("PATH", "")],
    )
    program = shutil.which("llama-quantize", path=os.pathsep.join(places))
    if kind != "f16" and not program:
        llama_cpp = importlib.import_module("llama_cpp")
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
        code = llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), params)
        return need(code == 0, f"llama.cpp could not write {path}. Pass another --quantize.")
    convert = [
        sys.executable,
        args.llama_cpp / "convert_hf_to_gguf.py",
        args.model_path,
        "--outtype",
        "f16",
    ]
    command = (
        [*convert, "--outfile", path] if kind == "f16" else [program, source, path, kind.upper()]
    )
    environment = os.environ | {
        "PYTHONPATH": f"{args.llama_cpp}/gguf-py{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    }
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    last = "\n  ".join(done.stderr.strip().splitlines()[-6:])
    cure = (
        "Run pip install sentencepiece"
        if "sentencepiece" in last
        else "If it lacks this model, update it"
    )
    need(done.returncode == 0, f"llama.cpp could not write {path}. {cure}.\n  {last}")


def find_template(render):
    """Return (Ollama's Go template equal to render(messages), notes); raises InputError."""

    def cut(roles, generate=True):
        marks = [f"mark{i}{role}mark" for i, role in enumerate(roles.split())]
        messages = [
            {"role": role, "content": mark} for role, mark in zip(roles.split(), marks, strict=True)
        ]
        text = render(messages, add_generation_prompt=generate)
        need(
            re.findall(r"mark\d\w+?mark", text) == marks,
            f"in {roles} it moves or leaves out a turn",
        )
        return re.split(r"mark\d\w+?mark", text)

    head, between, again, tail = cut("user assistant user")
    user_end = os.path.commonprefix([tail, cut("user", generate=False)[-1]])
    assistant_end = os.path.commonprefix([again, cut("user assistant", generate=False)[-1]])
    user, generation = again.removeprefix(assistant_end), tail.removeprefix(user_end)
    default = head.removesuffix(user)  # what stands there without a system message
    turns = {"user": (user, user_end), "assistant": (between.removeprefix(user_end), assistant_end)}
    notes, chats = [], ["user", "user assistant user", "user assistant user assistant user"]
    try:
        before, after, _ = cut("system user")
        turns["system"] = before, after.removesuffix(user)
        chats += [f"system {chat}" for chat in chats]
    except TemplateError:
        notes.append("the model knows no system messages: TEMPLATE leaves them out")
    plain = "".join([default, generation, *sum(turns.values(), ())]).replace("\n", "")
    need(
        plain.isprintable() and not re.search('[{}]|"""', plain),
        "it has characters that a Modelfile cannot hold",
    )
    contents = [
        "Hi",
        "a\n\n  b <b>&amp;</b>",
        '{"a": "{{ x }} {% y %}"}',
        "日本語 🙂\tx",
        "it's \\n",
        "-",
    ]
    for roles in chats:
        messages = [
            {"role": role, "content": text}
            for role, text in zip(roles.split(), contents, strict=False)
        ]
        ours = (
            "".join(turns[m["role"]][0] + m["content"] + turns[m["role"]][1] for m in messages)
            + generation
        )
        same = (
            render(messages, add_generation_prompt=True)
            == ("" if "system" in roles else default) + ours
        )
        need(same, f"in {roles} it is no prefix and suffix for each role")
    if " x \n" + user_end not in render(
        [{"role": "user", "content": " x \n"}], add_generation_prompt=False
    ):
        notes.append(
            "the model's own template strips contents, and Ollama's does not: send no blanks "
            "around them"
        )
    go = [
        f'if eq .Role "{role}" }}}}{start}{{{{ .Content }}}}{end}{{{{ '
        for role, (start, end) in turns.items()
    ]
    go = "{{ range .Messages }}{{ " + "else ".join(go) + "end }}{{ end }}" + generation
    return ("{{ if not .System }}" + default + "{{ end }}" if default else "") + go, notes


def write_modelfile(args, tokenizer, render, stops):
    """Write Ollama's Modelfile; returns warnings.

    stops: ids that end an answer, None for an embedding model.
    """
    folder, lines, notes = args.model_path, [f"FROM ./model-{args.quantize}.gguf"], []
    if stops:
        try:
            template, notes = find_template(render)
            lines.append(f'TEMPLATE """{template}"""')
            if "strftime_now" in tokenizer.chat_template:
                notes.append(
                    "the model's own template writes the date of the day, and TEMPLATE for ever "
                    "that of today"
                )
        except (InputError, TemplateError) as error:
            notes = [
                f"no TEMPLATE in Modelfile, as Ollama cannot express the model's: {error}. Use "
                "llama-server"
            ]
        config, generation = (
            read_json(folder / "config.json"),
            read_json(folder / "generation_config.json"),
        )
        flags = trained_with(folder)
        wanted = max(4096, flags.get("max_length") or 0)
        values = {
            "num_ctx": min(wanted, config.get("max_position_embeddings", 4096)),
            "temperature": 0,
        }
        # a base's values are for the answers that it gives: Qwen3's for those with thinking
        if generation.get("do_sample") and flags.get("enable_thinking") != "false":
            sampled = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}  # Ollama's defaults differ
            values |= {name: generation.get(name) or value for name, value in sampled.items()}
        values["repeat_penalty"] = generation.get("repetition_penalty") or 1.0
        lines += [f'PARAMETER stop "{tokenizer.decode([stop])}"' for stop in stops]
        lines += [f"PARAMETER {name} {value}" for name, value in values.items()]
    (args.output_path / "Modelfile").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return notes


def main(argv=None):
    """Answer, convert, compare, quantise, compare again, write the Modelfile; return the report."""
    args = parse_args(argv)
    base, embedding, prompts = check_inputs(args)
    folder, out, figures, answers, stops = args.model_path, args.output_path, {}, [], None
    trained = trained_with(folder)
    thinking = trained.get("enable_thinking") == "true"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load(folder)
    chat = partial(tokenizer.apply_chat_template, tokenize=False, enable_thinking=thinking)
    inputs = [
        text[:100] for text in prompts + PIECES if text.strip() and not WORDPIECE_FAILS.search(text)
    ]
    if not embedding:
        answers, inputs, stops = answer(model, tokenizer, chat, prompts, MAX_NEW_TOKENS[thinking])
    warnings = [
        f"no stop token in the answer to {each['prompt']}"
        for each in answers
        if not each["stopped"]
    ]
    merged = outputs(model, inputs)
    model = None
    gc.collect()  # one model at a time
    try:
        before = outputs(load(find_base(args, base, trained)), inputs)
    except InputError as error:
        before = None
        warnings.append(f"what is left of the fine-tune is not measured: {error}")
    gc.collect()
    out.mkdir(parents=True, exist_ok=True)
    options = {
        "n_ctx": MAX_TOKENS,
        "embedding": embedding,
        "logits_all": not embedding,
        "verbose": False,
    }
    for kind in dict.fromkeys(["f16", args.quantize]):
        path = out / f"unproven-{kind}.gguf"
        write_gguf(kind, args, path)
        llm = importlib.import_module("llama_cpp").Llama(str(path), **options)
        if kind == "f16":
            cases, adds_bos, notes = check_tokens(llm, tokenizer, chat, prompts, stops)
        figures[kind] = compare(kind, merged, before, outputs(llm, inputs))
        llm = None
        gc.collect()
        print(
            f"{kind:<9} "
            + ", ".join(f"{name} {value:.4g}" for name, value in figures[kind].items()),
            flush=True,
        )
        path = path.rename(out / f"model-{kind}.gguf")
    if figures[args.quantize].get("residual", 0) > 0.5:
        notes.append(
            f"{args.quantize} adds noise of over half of what the fine-tune changed: larger kinds "
            "add less"
        )
    bos = tokenizer.bos_token if adds_bos else ""  # Ollama adds it
    warnings += notes + write_modelfile(
        args, tokenizer, lambda m, **flag: chat(m, **flag).removeprefix(bos), stops
    )
    report = {
        "flags": vars(args),
        "token_cases": cases,
        "figures": figures,
        "answers": answers,
        "warnings": warnings,
    }
    (out / "gguf_report.json").write_bytes(
        json.dumps(report, indent=2, ensure_ascii=False, default=str).encode()
    )
    print("".join(f"warning   {text}\n" for text in warnings), end="")
    setting = json.dumps({"enable_thinking": thinking})
    flags = "--embeddings" if embedding else f"--jinja --chat-template-kwargs '{setting}'"
    print(
        f"next      ollama create NAME -f {out}/Modelfile\n          llama-server -m {path} {flags}"
    )
    return report


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
