"""A chat template: conversations become text, by what trial conversations show of it."""

import contextlib
import itertools
import json
import re
from pathlib import Path

from parts.messages import THINKING, Drop
from parts.pieces import Pieces
from parts.trials import (
    ANSWER,
    find_own_system,
    find_stops,
    limited_trial,
    shows_tools,
    takes_no_system,
    takes_objects,
    try_tool_use,
    try_turns,
)
from utils import InputError, note, reason

from jinja2 import TemplateError

# for tokenizers without a chat template; BOS stands where the tokenizer itself would put one
PLAIN_TEMPLATE = """{{ BOS }}{% for message in messages %}{% if message.role == 'system' %}\
{{ message.content }}

{% elif message.role == 'user' %}### User:
{{ message.content }}

{% elif message.role == 'assistant' %}### Assistant:
{{ message.content }}{{ eos_token }}

{% else %}{{ raise_exception('the plain template has no ' + message.role + ' turns') }}{% endif %}\
{% endfor %}{% if add_generation_prompt %}### Assistant:
{% endif %}"""

LEFT_OUT = (
    "answers that are, or stand behind, a tool call or tool turn that the chat template leaves out"
)
# a template is a program, and runs on whatever a row holds
TEMPLATE_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
    MemoryError,
    SyntaxError,
)


def read_template(path):
    """Return the Jinja template in a file."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--chat_template {path} cannot be read: {reason(error)}") from None


def plain_template(tokenizer):
    """Return PLAIN_TEMPLATE with the BOS that this tokenizer puts; InputError without an EOS."""
    if not tokenizer.eos_token:
        raise InputError(
            "the tokenizer has neither a chat template nor an EOS token, so that no "
            "answer could end. Pass --chat_template, or choose another base."
        )
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("a")["input_ids"][0] == bos
    return PLAIN_TEMPLATE.replace("BOS", "bos_token" if adds_bos else "''")


def stored_stops(generation_config, tokenizer):
    """Return the tokens at which a generation_config.json stops; none where that is None."""
    ids = (generation_config or {}).get("eos_token_id") or []
    return tokenizer.convert_ids_to_tokens(ids if isinstance(ids, list) else [ids])


def special_tokens(tokenizer):
    """Return the texts of special tokens, the longest first: a shorter one may begin a longer.

    Those around thoughts are left out: some tokenizers call them special, and answers hold them.
    """
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    special = {*added, *tokenizer.all_special_tokens} - {"<think>", "</think>"}
    return sorted(special, key=len, reverse=True)


def without_thinking(messages):
    """Return messages without their reasoning; raises Drop where an answer is nothing else."""
    kept = []
    for message in messages:
        plain = dict(message)
        plain.pop("reasoning_content", None)
        plain.pop("thinking", None)
        if plain["role"] == "assistant":
            plain["content"] = THINKING.sub("", plain["content"])
            if not plain["content"].strip() and not plain.get("tool_calls"):
                raise Drop(
                    "rows with a response of thinking alone, which --enable_thinking false "
                    "leaves out"
                )
        kept.append(plain)
    return kept


def folded(messages):
    """Return messages with the text of their system turn, the first, before that of a later one."""
    system, *rest = messages
    # not of a greeting, into whose mouth it would be put
    i = next(i for i, message in enumerate(rest) if message["role"] != "assistant")
    text = f"{system['content']}\n\n{rest[i]['content']}"
    return [*rest[:i], {**rest[i], "content": text}, *rest[i + 1 :]]


class Chat:
    """How conversations become tokens: a tokenizer's chat template, and what trials show about it.

    thinking: what the template is told. base_stops: tokens at which the base's generation_config
    stops. A tokenizer without a template gets a plain one. Raises InputError for a template that
    cannot render a conversation or end an answer.
    """

    def __init__(self, tokenizer, thinking, base_stops):
        self.tokenizer = tokenizer
        self.thinking = thinking
        if not tokenizer.chat_template:
            tokenizer.chat_template = plain_template(tokenizer)
        self.special = special_tokens(tokenizer)
        self.special_pattern = re.compile("|".join(map(re.escape, self.special)) or "(?!)")
        self.pieces = Pieces(tokenizer)
        with limited_trial():
            self.try_out([stop for stop in base_stops if stop])

    def try_out(self, base_stops):
        """Learn from trial conversations what the template writes around a turn, or InputError."""
        trial = try_turns(self)
        self.pieces.check(trial.longer)
        self.tail = trial.tail  # all that stands behind the last answer
        self.scaffold = trial.scaffold  # what only an answer's prompt has ("<think>\n", say)
        eos = self.tokenizer.eos_token
        # the tokens that end an answer, and the one to append where the template writes none
        self.stops, self.end = find_stops(trial, self.special, eos, base_stops)
        self.stop_ids = self.tokenizer.convert_tokens_to_ids(self.stops)
        # the one that the template itself writes, or None
        ended = self.ended(trial.alone, ANSWER)
        self.emits = next((stop for stop in self.stops if ended.endswith(stop)), None)
        self.own_system = find_own_system(trial, self)  # a text that it adds by itself, or None
        self.folds_system = takes_no_system(self)
        self.takes_objects = takes_objects(self)  # as arguments of calls
        self.shows_tools = shows_tools(self)
        self.tool_use = try_tool_use(self)

    # ------------------------------------------------------------ messages to text

    def prepare(self, messages):
        """Return messages as this template takes them; Drop for special tokens inside a text."""
        for message in messages:
            # it would be read as what it stands for: the end of a turn, or the start of another
            found = self.special_pattern.search(message["content"])
            if found:
                raise Drop(f"rows whose text holds the special token {found[0]}")
        if not self.thinking:
            messages = without_thinking(messages)
        messages = [self.with_readable_calls(message) for message in messages]
        if self.folds_system and messages[0]["role"] == "system":
            return folded(messages)
        return messages

    def with_readable_calls(self, message):
        """Return a message whose tool calls are readable()."""
        if "tool_calls" not in message:  # some templates ask for it by its name alone
            return message
        return {**message, "tool_calls": [self.readable(call) for call in message["tool_calls"]]}

    def readable(self, call):
        """Return a call with its arguments as an object, or as JSON where objects are refused."""
        function = call.get("function", call)
        arguments = function.get("arguments") or {}
        is_text = isinstance(arguments, str)  # OpenAI's form
        if self.takes_objects and is_text:  # which a template would quote once more
            with contextlib.suppress(ValueError):  # no JSON: dropped where the template quotes it
                arguments = json.loads(arguments)
        elif not self.takes_objects and not is_text:
            arguments = json.dumps(arguments, ensure_ascii=False)
        function = {**function, "arguments": arguments}
        return {**call, "function": function} if "function" in call else function

    def render(self, messages, prompt, tools=None):
        """Render messages, and with `prompt` the header of the answer to come.

        Raises Drop where the template fails.
        """
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                tokenize=False,
                add_generation_prompt=prompt,
                enable_thinking=self.thinking,  # most templates do not know it, and do not mind
            )
        except TEMPLATE_ERRORS as error:
            why = reason(error) or type(error).__name__
            raise Drop(f"rows that the chat template refuses ({why})") from None

    def rendered(self, messages, prompt, tools=None):
        """Return what render() gives, or None where the template refuses the messages."""
        try:
            return self.render(messages, prompt, tools)
        except Drop:
            return None

    def leaves_out(self, messages, tools):
        """Tell whether the template leaves out a tool call or tool turn of these messages.

        It may depend on whether the turn that calls has text, on whether it has one call or
        several, and on whether the row has tools.
        """
        has_tools = bool(tools)
        # of a tool turn before any answer; later ones follow the answer that called
        _, shows_results = self.tool_use[True, 0, has_tools]
        for message in messages:
            if message["role"] == "assistant":
                has_text = bool(message["content"].strip())
                calls = min(len(message.get("tool_calls", ())), 2)
                shows_calls, shows_results = self.tool_use[has_text, calls, has_tools]
                if not shows_calls:
                    return True
            elif message["role"] == "tool" and not shows_results:
                return True
        return False

    # ------------------------------------------------------------ rendered text

    def tokenised(self, text):
        """Return the ids of rendered text; of several texts a list for each."""
        return self.pieces.tokenised(text)

    def ids(self, text):
        """Return tokenised(text), with what was tokenised before remembered."""
        return self.pieces.ids(text)

    def without_special(self, text):
        """Return text without its special tokens."""
        return self.special_pattern.sub("", text)

    def ended(self, text, answer):
        """Return text, rendered messages, up to the first stop behind the last `answer` in it."""
        words = text.removesuffix(self.tail)  # an answer "a" is in the "assistant" behind it, too
        words = self.special_pattern.sub(blanked, words)  # and "d" in <|end|>
        said = answer.strip()
        start = max(words.rfind(said), 0) + len(said)
        ends = []
        for stop in self.stops:  # whichever comes first, as at inference
            at = text.find(stop, start)
            if at >= 0:
                ends.append(at + len(stop))
        # where the template writes none, a stop is appended, to the words and not to a line break
        return text[: min(ends)] if ends else text.rstrip()


def blanked(found):
    """Return as many characters that no text holds as a match has."""
    return "\0" * len(found[0])


# ---------------------------------------------------------------- what is odd about a template


def note_oddities(chat, own_template, stops, examples, dev_examples):
    """Tell the user what this template does to rows that one would not expect.

    own_template: whether the tokenizer or the user brought it. stops: the base's own. Without
    examples to train on the dev sets, {name: Examples}, are looked at for tools.
    """
    for text in oddities_of_ends(chat, own_template, stops):
        note(text)
    for text in oddities_of_prompts(chat, examples):
        note(text)
    seen = examples or itertools.chain(*dev_examples.values())
    with_tools = sum(bool(example.tools) for example in seen)
    if with_tools and not chat.shows_tools:
        note(
            f"the chat template leaves out the tool definitions of {with_tools} rows: nothing in "
            "their prompts says what can be called"
        )


def oddities_of_ends(chat, own_template, stops):
    """Yield what is odd about the ends of answers."""
    if not own_template:
        yield (
            "the tokenizer has no chat template: a plain one (### User: / ### Assistant:) is used, "
            "and saved with it; an instruct model has its own"
        )
    if chat.emits is None:
        yield f"the chat template ends no answer: {chat.end} is appended to each"
    elif own_template and stops and chat.emits not in stops:
        yield (
            f"the base's generation_config does not stop at {chat.emits}: it looks like a base "
            "model, which may never have been trained on that token, nor can LoRA. Prefer the "
            f"instruct model, or pass a --chat_template that ends answers in {stops[0]}"
        )


def oddities_of_prompts(chat, examples):
    """Yield what is odd about the prompts of answers."""
    if chat.scaffold:
        yield (
            f"the prompt of an answer ends in {chat.scaffold!r}, which the template leaves out of "
            "history: answers are learnt right behind it, where inference starts"
        )
    if chat.folds_system:
        yield "the chat template takes no system turn: its text is put before the first user turn"
    lacks_system = any(example.messages[0]["role"] != "system" for example in examples)
    if chat.own_system and lacks_system:
        yield (
            f"to rows without a system turn the chat template adds by itself: {chat.own_system!r}"
        )
