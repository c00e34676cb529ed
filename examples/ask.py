"""Ask a trained model: an adapter folder, a merged folder or a base model.

python examples/ask.py runs/mine/final "What is the capital of Japan?" "And of Italy?" \\
    --system "Be brief."
python examples/ask.py merged --samples prompts.txt
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import utils
from parts.base import LOADING_ERRORS, Origin, base_json
from parts.causal import generate_greedily
from parts.flag_types import integer
from parts.masks import decode_answer, find_frame
from parts.messages import Drop
from parts.scores import answer_of
from parts.template import Chat, stored_stops
from parts.tokenizer import load_tokenizer
from utils import InputError

import torch
from transformers import AutoModelForCausalLM


def parse_args(argv=None):
    """Parse and check the command line; `questions` holds those of --samples, too."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("model", help="folder or hub id; of an adapter the base is found by itself")
    add("questions", nargs="*", metavar="question")
    add("--samples", type=Path, metavar="FILE", help="more questions, one a line")
    add("--system", metavar="TEXT", help="system turn [the --system_prompt of the training]")
    tokens = {"type": integer(1), "default": 256, "metavar": "N"}
    add("--max_new_tokens", **tokens, help="longest answer, in tokens [256]")
    args = parser.parse_args(argv)
    if args.samples and not args.samples.is_file():
        parser.error(f"--samples {args.samples} is no file")
    if args.samples:
        try:
            lines = args.samples.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            parser.error(f"--samples {args.samples} is no UTF-8 ({error}): save it as such")
        args.questions += [line for line in lines if line.strip()]
    if not args.questions:
        parser.error("there is nothing to ask: pass questions, or --samples FILE")
    return args


def find_origin(source):
    """Return the base.Origin of a model: of an adapter its base, and the adapter."""
    stored = Path(source) / "adapter_config.json"
    if not stored.is_file():
        return Origin(source)
    return Origin(utils.read_json(stored)["base_model_name_or_path"], adapter=source)


def read_run(source):
    """Return (Chat, system prompt) of a model as it was trained: thinking, stops, template."""
    origin = find_origin(source)
    tokenizer = load_tokenizer(origin)
    run = utils.recorded_flags(base_json(origin, "training_config.json") or {})
    stops = stored_stops(base_json(origin, "generation_config.json"), tokenizer)
    chat = Chat(tokenizer, run.get("enable_thinking") == "true", stops)
    return chat, run.get("system_prompt")


def load_model(source):
    """Load a model in its file's dtype, an adapter on its base, onto the GPU if there is one."""
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
    except LOADING_ERRORS as error:
        raise InputError(f"{source} cannot be loaded: {utils.reason(error)}") from None
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def prompt_of(chat, system, question):
    """Return the token ids that a model is asked by."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    try:
        return chat.ids(chat.render(chat.prepare(messages), True))
    except Drop as drop:
        raise InputError(f"{question!r} cannot be asked: {drop}.") from None


def main(argv=None):
    """Print the greedy answer to each question, read as an evaluation does; return the answers."""
    args = parse_args(argv)
    utils.quiet_libraries()
    chat, system = read_run(args.model)
    system = system if args.system is None else args.system
    frame = find_frame(chat)
    model = load_model(args.model)
    answers = []
    for question in args.questions:
        prompt = prompt_of(chat, system, question)
        ids, stopped = generate_greedily(model, [prompt], chat.stop_ids, args.max_new_tokens)[0]
        answers.append(answer_of(decode_answer(chat.tokenizer, ids, frame)))
        asked = f"{question}\n-> " if len(args.questions) > 1 else ""
        print(asked + answers[-1], flush=True)
        if not stopped:
            print(f"note      no stop token within {len(ids)} tokens", flush=True)
    return answers


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
