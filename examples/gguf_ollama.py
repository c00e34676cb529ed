"""Turn a folder that merge.py wrote into a GGUF for llama.cpp and Ollama, every step of it proven.

git clone --depth 1 https://github.com/ggml-org/llama.cpp
pip install llama-cpp-python sentencepiece
python examples/gguf_ollama.py --model_path MERGED --llama_cpp llama.cpp --output_path GGUF

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
MAX_TOKENS = 512  # of a compared sequence
LAST_POSITIONS = 64  # of each, which are compared
# worst figures let through: f16 differs by rounding; a quantised model below these is another model
LIMITS = {
    "f16": {"kl": 1e-3, "top1": 0.97, "cosine": 0.999},
    "quantised": {"kl": 2.0, "top1": 0.5, "cosine": 0.9},
}
PROMPTS = (
    "What is the capital of Japan? Answer in one word."
    "¦日本の首都はどこですか。一言で答えてください。¦17 + 25 = ?"
    "¦中国的首都是哪里?用一个词回答。¦한국의 수도는 어디입니까? 한 단어로."
    "¦Quelle est la capitale de la France ?"
).split("¦")
PIECES = (  # of texts that tokenizers disagree on: compared each alone and before each
    "a¦ ¦   ¦\n¦\n\n¦\t¦\r\n¦1¦1234567¦3.14¦日本語のテキスト。¦カタカナ¦中文,¦한국어¦naïve Łódź"
    "¦Привет¦Ελληνικά¦שלום¦مرحبا¦ชาวโลก¦हिन्दी¦🙂¦👩‍👩‍👧¦I'm we'LL¦def f(x):\n    return x ** 2"
    "¦{'k': ['\\n']}¦https://a.b/c_d?e=%2¦...!?¦---¦“–”"
).split("¦")
# llama.cpp's WordPiece does not decompose Hangul and drops Hindi's vowels
WORDPIECE_FAILS = re.compile("[\u0900-\u097f가-힣]")
OLLAMAS_SAMPLING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}  # where a base names none


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
    # fmt: off
    parser.add_argument("--model_path", type=Path, required=True, metavar="DIR",
                        help="what merge.py wrote")
    parser.add_argument("--llama_cpp", type=Path, required=True, metavar="DIR",
                        help="llama.cpp checkout, built or not")
    parser.add_argument("--output_path", type=Path, required=True, metavar="DIR",
                        help="folder for GGUF and Modelfile")
    parser.add_argument("--quantize", default="q4_k_m", type=str.lower, choices=QUANTIZE,
                        help="[q4_k_m] f16: no quantisation")
    parser.add_argument("--samples", type=Path, metavar="FILE",
                        help="prompts, one a line, as trained on [6 questions]")
    parser.add_argument("--overwrite", action="store_true",
                        help="replace what an earlier call wrote")
    # fmt: on
    return parser.parse_args(argv)


# ---------------------------------------------------------------- the merged folder


def read_json(path):
    """Return the parsed file, or {} where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def trained_with(folder):
    """Return {flag: value} of the training, {} of a model that was not trained here."""
    return merge.flags_of(read_json(folder / "training_config.json"))


def check_inputs(args):
    """Raise InputError on what must not go on; return what it is.

    (base model, whether this is an embedding model, prompts)
    """
    folder = args.model_path
    out = args.output_path
    script = args.llama_cpp / "convert_hf_to_gguf.py"
    report = read_json(folder / "merge_report.json")
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
    free = not out.exists() or not any(out.iterdir())
    need(args.overwrite or free, f"{out} is not empty. Pass --overwrite.")
    pooled = (folder / "modules.json").exists()
    is_causal = read_json(folder / "config.json")["architectures"][0].endswith("ForCausalLM")
    embedding = pooled or not is_causal
    need(
        pooled or not embedding,
        f"{folder} has no modules.json, without which llama.cpp does not pool. Merge again.",
    )
    for package in ["llama-cpp-python", "sentence-transformers"][: 1 + embedding]:
        module = package.removesuffix("-python").replace("-", "_")
        need(importlib.util.find_spec(module), f"{package} is missing. Run pip install {package}")
    lines = args.samples.read_text(encoding="utf-8").splitlines() if args.samples else PROMPTS
    return report.get("base"), embedding, [line for line in lines if line.strip()]


def find_base(model_path, name, revision):
    """Return the folder of the base, of a hub id that in the hub's cache.

    Raises InputError if there is none that can be compared with the merged model.
    """
    try:
        folder = merge.find_base(name or "", revision, cached_only=True)
    except merge.InputError:
        raise InputError(f"its base {name} is no such folder, nor one in the hub's cache") from None
    pooled = [(each / "modules.json").exists() for each in (folder, model_path)]
    need(pooled[0] == pooled[1], f"its base {name} is another kind of model")
    sizes = [read_json(each / "config.json").get("vocab_size") for each in (folder, model_path)]
    need(sizes[0] == sizes[1], f"its base {name} has a vocabulary of another size")
    return folder


# ---------------------------------------------------------------- outputs


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
    stored = {}
    hooks = []

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
    stops = stops if isinstance(stops, list) else [stops]
    answers = []
    sequences = []
    for prompt in prompts:
        text = chat([{"role": "user", "content": prompt}], add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([ids], device=model.device)
        mask = torch.ones_like(ids)
        output = model.generate(
            ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False
        )[0].tolist()
        reply = tokenizer.decode(output[ids.shape[1] :], skip_special_tokens=True)
        stopped = output[-1] in stops
        answers.append({"prompt": prompt, "answer": reply, "stopped": stopped})
        end = "" if stopped else " (no stop token)"
        print(f"answer    {prompt} -> {reply!r}{end}", flush=True)
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
            logits = model(torch.tensor([ids], device=model.device)).logits
            logits = logits[0, -LAST_POSITIONS:].cpu()
        else:
            model.reset()
            model.eval(ids)
            logits = torch.tensor(model.scores[: len(ids)][-LAST_POSITIONS:])
        rows.append(logits)
    return torch.cat(rows).log_softmax(-1)


# ---------------------------------------------------------------- proofs


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
    cure = "Pass a larger --quantize."
    if kind == "f16":
        cure = "Update llama.cpp and llama-cpp-python."
    for name, value in figures.items():
        limit = limits[name]
        good = value <= limit if name == "kl" else value >= limit  # of NaN neither
        need(
            good,
            f"The {kind} GGUF is not the merged model: {name} {value:.3g}, limit {limit:g}. {cure}",
        )
    if base is None:
        return figures
    d = merged - base
    e = other - base
    size = (d * d).sum(1).double().sum()
    along = (e * d).sum(1).double().sum()
    noise = ((e - d) ** 2).sum(1).double().sum()
    return figures | {"retained": (along / size).item(), "residual": (noise / size).sqrt().item()}


def token_cases(tokenizer, chats, texts):
    """Return the texts whose tokens are compared, each once."""
    special = []
    for token in tokenizer.all_special_tokens:
        special += [token, f"a{token}b", f"a {token}\nb"]
    pairs = [a + b for a in PIECES for b in PIECES]
    return list(dict.fromkeys([*PIECES, *pairs, *texts, *special, *chats]))


def check_tokens(llm, tokenizer, chat, texts, stops):
    """Compare a GGUF's token ids and end of answer with the tokenizer's.

    stops: None for an embedding model. Returns (texts compared, whether llama.cpp adds BOS,
    warnings); raises InputError naming three differences.
    """
    embedding = stops is None
    chats = []
    if not embedding:
        turns = [{"role": role, "content": "日本 1"} for role in ("user", "assistant", "user")]
        chats.append(chat(turns, add_generation_prompt=True))
    cases = token_cases(tokenizer, chats, texts)
    other = {}
    for text in cases:  # what is pooled has CLS, SEP or EOS around it
        ours = tokenizer(text, add_special_tokens=embedding)["input_ids"]
        theirs = llm.tokenize(text.encode(), add_bos=embedding, special=True)
        if ours != theirs:
            other[text] = f"\n  {text!r}: {ours} became {theirs}"
    is_wordpiece = llm.metadata["tokenizer.ggml.model"] == "bert"
    if other and is_wordpiece and all(WORDPIECE_FAILS.search(text) for text in other):
        warning = "llama.cpp splits Korean and Hindi otherwise than this tokenizer: do not use them"
        return len(cases), False, [warning]
    need(
        not other,
        f"The GGUF gives other token ids in {len(other)} of {len(cases)} texts. Update llama.cpp, "
        f"and merge with the base's tokenizer.{''.join([*other.values()][:3])}",
    )
    adds_bos = not embedding and llm.tokenize(b"a")[0] == llm.token_bos()
    check_ends(llm, tokenizer, chats, stops, adds_bos)
    return len(cases), adds_bos, []


def check_ends(llm, tokenizer, chats, stops, adds_bos):
    """Raise InputError unless llama.cpp begins a chat and ends an answer as the model does."""
    need(
        not adds_bos or chats[0].startswith(tokenizer.bos_token or "\0"),
        "llama.cpp adds a BOS that the chat template has not. Set add_bos_token false in the "
        "tokenizer.",
    )
    need(
        stops is None or llm.token_eos() in stops,
        f"The GGUF stops at token {llm.token_eos()}, generation_config.json at {stops}. Correct "
        "eos_token.",
    )


# ---------------------------------------------------------------- conversion


def write_gguf(kind, llama_cpp, model_path, path):
    """Convert the model with llama.cpp's script, or quantise model-f16.gguf.

    By llama-quantize where it is built, else by llama-cpp-python.
    """
    source = path.with_name("model-f16.gguf")
    if kind == "f16":
        script = llama_cpp / "convert_hf_to_gguf.py"
        command = [sys.executable, script, model_path, "--outtype", "f16", "--outfile", path]
    else:
        places = [f"{llama_cpp}/build/bin", os.environ.get("PATH", "")]
        program = shutil.which("llama-quantize", path=os.pathsep.join(places))
        if not program:
            return quantise_in_python(kind, source, path)
        command = [program, source, path, kind.upper()]
    # llama.cpp's own gguf package, which the released one lags behind
    packages = f"{llama_cpp}/gguf-py{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = os.environ | {"PYTHONPATH": packages}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    last = "\n  ".join(done.stderr.strip().splitlines()[-6:])
    cure = "If it lacks this model, update it"
    if "sentencepiece" in last:
        cure = "Run pip install sentencepiece"
    need(done.returncode == 0, f"llama.cpp could not write {path}. {cure}.\n  {last}")


def quantise_in_python(kind, source, path):
    """Quantise a GGUF with llama-cpp-python."""
    llama_cpp = importlib.import_module("llama_cpp")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), params)
    need(code == 0, f"llama.cpp could not write {path}. Pass another --quantize.")


# ---------------------------------------------------------------- the Modelfile


MARK = re.compile(r"mark\d\w+?mark")  # stands for the content of a turn
CONTENTS = (  # of chats in which both templates must agree
    "Hi",
    "a\n\n  b <b>&amp;</b>",
    '{"a": "{{ x }} {% y %}"}',
    "日本語 🙂\tx",
    "it's \\n",
    "-",
)


def between_turns(render, roles, generate=True):
    """Return what a template writes before, between and after turns of these roles."""
    roles = roles.split()
    marks = [f"mark{i}{role}mark" for i, role in enumerate(roles)]
    messages = []
    for role, mark in zip(roles, marks, strict=True):
        messages.append({"role": role, "content": mark})
    text = render(messages, add_generation_prompt=generate)
    need(MARK.findall(text) == marks, f"in {' '.join(roles)} it moves or leaves out a turn")
    return MARK.split(text)


def find_template(render):
    """Return (Ollama's Go template equal to render(messages), notes); InputError if none is."""
    head, between, again, tail = between_turns(render, "user assistant user")
    after_user = between_turns(render, "user", generate=False)[-1]
    after_assistant = between_turns(render, "user assistant", generate=False)[-1]
    user_end = os.path.commonprefix([tail, after_user])
    assistant_end = os.path.commonprefix([again, after_assistant])
    user = again.removeprefix(assistant_end)
    generation = tail.removeprefix(user_end)
    default = head.removesuffix(user)  # what stands there without a system message
    # what stands before and behind the content of a role
    turns = {"user": (user, user_end), "assistant": (between.removeprefix(user_end), assistant_end)}
    notes = []
    chats = ["user", "user assistant user", "user assistant user assistant user"]
    try:
        before, after, _ = between_turns(render, "system user")
        turns["system"] = before, after.removesuffix(user)
        chats += [f"system {chat}" for chat in chats]
    except TemplateError:
        notes.append("the model knows no system messages: TEMPLATE leaves them out")
    check_turns(render, chats, turns, default, generation)
    blanks = [{"role": "user", "content": " x \n"}]
    if " x \n" + user_end not in render(blanks, add_generation_prompt=False):
        notes.append(
            "the model's own template strips contents, and Ollama's does not: send no blanks "
            "around them"
        )
    return write_go(turns, default, generation), notes


def check_turns(render, chats, turns, default, generation):
    """Raise InputError unless render() is these texts around each content, in all chats."""
    plain = "".join([default, generation, *sum(turns.values(), ())]).replace("\n", "")
    need(
        plain.isprintable() and not re.search('[{}]|"""', plain),
        "it has characters that a Modelfile cannot hold",
    )
    for roles in chats:
        messages = []
        ours = "" if "system" in roles else default
        for role, content in zip(roles.split(), CONTENTS, strict=False):
            messages.append({"role": role, "content": content})
            before, after = turns[role]
            ours += before + content + after
        same = render(messages, add_generation_prompt=True) == ours + generation
        need(same, f"in {roles} it is no prefix and suffix for each role")


def write_go(turns, default, generation):
    """Return a Go template of {role: (text before, text behind its content)}."""
    branches = []
    for role, (before, after) in turns.items():
        condition = f'if eq .Role "{role}"'
        branches.append(condition + " }}" + before + "{{ .Content }}" + after + "{{ ")
    by_role = "else ".join(branches)
    go = "{{ range .Messages }}{{ " + by_role + "end }}{{ end }}" + generation
    return ("{{ if not .System }}" + default + "{{ end }}" if default else "") + go


def parameters_of(folder):
    """Return {name: value} of what Ollama should run the model with."""
    config = read_json(folder / "config.json")
    generation = read_json(folder / "generation_config.json")
    trained = trained_with(folder)
    wanted = max(4096, trained.get("max_length") or 0)
    values = {
        "num_ctx": min(wanted, config.get("max_position_embeddings", 4096)),
        "temperature": 0,
    }
    # a base's values are for the answers that it gives: Qwen3's for those with thinking
    if generation.get("do_sample") and trained.get("enable_thinking") != "false":
        for name, default in OLLAMAS_SAMPLING.items():
            values[name] = generation.get(name) or default
    values["repeat_penalty"] = generation.get("repetition_penalty") or 1.0
    return values


def write_modelfile(folder, out, kind, tokenizer, render, stops):
    """Write Ollama's Modelfile for the model in `folder` to `out`; returns warnings.

    stops: ids that end an answer, None for an embedding model.
    """
    lines = [f"FROM ./model-{kind}.gguf"]
    notes = []
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
        lines += [f'PARAMETER stop "{tokenizer.decode([stop])}"' for stop in stops]
        lines += [f"PARAMETER {name} {value}" for name, value in parameters_of(folder).items()]
    (out / "Modelfile").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return notes


# ---------------------------------------------------------------- main


# ---------------------------------------------------------------- main


def reference_outputs(model_path, base, trained, inputs):
    """Return (outputs of the base or None, warnings that say why there are none)."""
    try:
        folder = find_base(model_path, base, trained.get("model_revision"))
    except InputError as error:
        return None, [f"what is left of the fine-tune is not measured: {error}"]
    return outputs(load(folder), inputs), []


def embedded_texts(prompts):
    """Return the texts on which an embedding model is compared."""
    texts = [text for text in prompts + PIECES if text.strip()]
    return [text[:100] for text in texts if not WORDPIECE_FAILS.search(text)]


def write_and_prove(kind, args, inputs, merged, before, check=None):
    """Write one GGUF, under its name once it is proven; return (figures, what check(llm) says)."""
    path = args.output_path / f"unproven-{kind}.gguf"
    write_gguf(kind, args.llama_cpp, args.model_path, path)
    embedding = isinstance(inputs[0], str)
    llm = importlib.import_module("llama_cpp").Llama(
        str(path), n_ctx=MAX_TOKENS, embedding=embedding, logits_all=not embedding, verbose=False
    )
    checked = check(llm) if check else None
    figures = compare(kind, merged, before, outputs(llm, inputs))
    llm = None
    gc.collect()
    said = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    print(f"{kind:<9} {said}", flush=True)
    path.rename(args.output_path / f"model-{kind}.gguf")
    return figures, checked


def warnings_of_answers(answers):
    """Return a warning for each answer that did not end."""
    endless = [each["prompt"] for each in answers if not each["stopped"]]
    return [f"no stop token in the answer to {prompt}" for prompt in endless]


def warnings_of_noise(kind, figures):
    """Return a warning where quantising hides the fine-tune."""
    if figures[kind].get("residual", 0) <= 0.5:
        return []
    return [f"{kind} adds noise of over half of what the fine-tune changed: larger kinds add less"]


def write_report(out, report):
    """Write gguf_report.json, and print its warnings."""
    text = json.dumps(report, indent=2, ensure_ascii=False, default=str)
    (out / "gguf_report.json").write_bytes(text.encode())
    for warning in report["warnings"]:
        print(f"warning   {warning}")


def say_next(out, kind, embedding, thinking):
    """Print the commands that run the model."""
    how = "--embeddings"
    if not embedding:
        setting = json.dumps({"enable_thinking": thinking})
        how = f"--jinja --chat-template-kwargs '{setting}'"
    print(f"next      ollama create NAME -f {out}/Modelfile")
    print(f"          llama-server -m {out}/model-{kind}.gguf {how}")


def main(argv=None):
    """Answer, convert, compare, quantise, compare again, write the Modelfile.

    Returns gguf_report.json's content.
    """
    args = parse_args(argv)
    base, embedding, prompts = check_inputs(args)
    folder = args.model_path
    trained = trained_with(folder)
    thinking = trained.get("enable_thinking") == "true"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = load(folder)
    chat = partial(tokenizer.apply_chat_template, tokenize=False, enable_thinking=thinking)
    if embedding:
        answers, inputs, stops = [], embedded_texts(prompts), None
    else:
        answers, inputs, stops = answer(model, tokenizer, chat, prompts, MAX_NEW_TOKENS[thinking])
    merged = outputs(model, inputs)
    model = None
    gc.collect()  # one model at a time
    before, warnings = reference_outputs(folder, base, trained, inputs)
    gc.collect()
    args.output_path.mkdir(parents=True, exist_ok=True)
    check = partial(check_tokens, tokenizer=tokenizer, chat=chat, texts=prompts, stops=stops)
    f16, (cases, adds_bos, notes) = write_and_prove("f16", args, inputs, merged, before, check)
    figures = {"f16": f16}
    if args.quantize != "f16":
        figures[args.quantize], _ = write_and_prove(args.quantize, args, inputs, merged, before)
    bos = tokenizer.bos_token if adds_bos else ""  # Ollama adds it

    def render(messages, **more):
        return chat(messages, **more).removeprefix(bos)

    notes += warnings_of_noise(args.quantize, figures)
    notes += write_modelfile(folder, args.output_path, args.quantize, tokenizer, render, stops)
    report = {"flags": vars(args), "token_cases": cases, "figures": figures, "answers": answers}
    report["warnings"] = warnings_of_answers(answers) + warnings + notes
    write_report(args.output_path, report)
    say_next(args.output_path, args.quantize, embedding, thinking)
    return report


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError, merge.InputError) as error:
        sys.exit(f"error: {error}")
