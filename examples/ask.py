"""Ask a trained model: an adapter folder, a merged folder or a base model.

python examples/ask.py runs/mine/final "What is the capital of Japan?" "And of Italy?" --system "Be brief."
python examples/ask.py merged --samples prompts.txt
"""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))
import utils
from train_sft_lora import Chat, Drop, answer_of, decode_answer, generate_greedily, stored_stops

import torch
from transformers import AutoModelForCausalLM


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", help="folder or hub id; of an adapter the base is found by itself")
    parser.add_argument("questions", nargs="*", metavar="question")
    parser.add_argument("--samples", type=Path, metavar="FILE", help="more questions, one a line")
    parser.add_argument(
        "--system", metavar="TEXT", help="system turn [the --system_prompt of the training]"
    )
    more = {"type": utils.integer(1), "default": 256, "metavar": "N"}
    parser.add_argument("--max_new_tokens", **more, help="longest answer, in tokens [256]")
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


def read_run(source):
    """Return (Chat, system prompt) of a model as it was trained: thinking, stop tokens, template."""
    stored = Path(source) / "adapter_config.json"
    base = utils.read_json(stored)["base_model_name_or_path"] if stored.is_file() else source
    place = SimpleNamespace(
        init_adapter=source if stored.is_file() else None,
        model_name=base,
        model_revision=None,
        trust_remote_code=False,
    )
    tokenizer = utils.load_tokenizer(place)
    flags = (utils.base_json(place, "training_config.json") or {}).get("flags", {})
    chat = Chat(tokenizer, flags.get("enable_thinking") == "true", stored_stops(place, tokenizer))
    return chat, flags.get("system_prompt")


def load_model(source):
    """Load a model in its file's dtype, an adapter on its base, onto the GPU if there is one."""
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
    except utils.LOADING_ERRORS as error:
        raise utils.InputError(f"{source} cannot be loaded: {utils.reason(error)}") from None
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def main(argv=None):
    """Print the greedy answer to each question, as an evaluation during the training would read it; return them."""
    args, answers = parse_args(argv), []
    utils.quiet_libraries()
    chat, system = read_run(args.model)
    system = system if args.system is None else args.system
    model = load_model(args.model)
    for question in args.questions:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": question})
        try:
            prompt = chat.ids(chat.render(chat.prepare(messages), True))
        except Drop as drop:
            raise utils.InputError(f"{question!r} cannot be asked: {drop}.") from None
        ids, stopped = generate_greedily(model, [prompt], chat.stop_ids, args.max_new_tokens)[0]
        answers.append(answer_of(decode_answer(chat.tokenizer, ids, chat.frame)))
        asked = f"{question}\n-> " if len(args.questions) > 1 else ""
        print(asked + answers[-1], flush=True)
        if not stopped:
            print(f"note      no stop token within {len(ids)} tokens", flush=True)
    return answers


if __name__ == "__main__":
    try:
        main()
    except utils.InputError as error:
        sys.exit(f"error: {error}")
