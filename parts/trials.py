"""Trial conversations: what a chat template writes around a turn, and what it leaves out.

`chat` is a template.Chat, of which little more than its render() is known here.
"""

import contextlib
import itertools
import json
import os
import re
import signal
import threading
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from parts.messages import Drop
from utils import InputError, reason

QUESTION = "QUESTION-ONE"
ANSWER = "ANSWER-ONE"
THOUGHT = "THOUGHT-ONE"
FOLLOW_UP = "QUESTION-TWO"
FUNCTION = "trial_function"
TOOL = {
    "type": "function",
    "function": {
        "name": FUNCTION,
        "description": "A trial.",
        "parameters": {
            "type": "object",
            "required": ["place"],
            "properties": {"place": {"type": "string", "description": "Where."}},
        },
    },
}
# a template comes with a base from anywhere, and may never end
TRIAL_SECONDS = 10
TRIAL_BYTES = 2**30


def as_message(role, content, **more):
    """Return one turn in the form that chat templates take."""
    return {"role": role, "content": content, **more}


def trial_call(arguments, i=0):
    """Return the i-th tool call of a trial, with what the strictest templates, Mistral's, want."""
    call_id = f"call0000{i}"  # nine letters and digits
    function = {"name": FUNCTION, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


@contextlib.contextmanager
def limited_trial():
    """Run trial conversations in TRIAL_SECONDS and TRIAL_BYTES more memory; raises InputError.

    Without an alarm (outside the main thread, on Windows) nothing is limited, and without /proc
    memory is not.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number, frame):
        raise InputError(
            f"the chat template takes more than {TRIAL_SECONDS} s for a conversation of three "
            "turns. Pass another with --chat_template."
        )

    import resource  # not on Windows

    limits = resource.getrlimit(resource.RLIMIT_AS)
    size = Path("/proc/self/statm")
    if size.exists():
        pages = int(size.read_text().split()[0])
        ceiling = pages * resource.getpagesize() + TRIAL_BYTES
        known = [limit for limit in limits if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_AS, (min([ceiling, *known]), limits[1]))
    handler = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, TRIAL_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)


# ---------------------------------------------------------------- the turns


@dataclass(frozen=True)
class Trial:
    """What a template writes around an answer, ANSWER-ONE in these renders:

    prompt   <user>QUESTION-ONE <assistant> <think>
    alone    <user>QUESTION-ONE <assistant> </think> ANSWER-ONE <end> <eos>
    longer   <user>QUESTION-ONE <assistant> ANSWER-ONE <end> <user>QUESTION-TWO <end>
    """

    alone: str
    longer: str
    scaffold: str  # what only the prompt of an answer has: <think>
    opening: str  # what only an answer has before its text: </think>
    tail: str  # behind an answer that is the last: <end> <eos>
    before: str  # all that precedes an answer in a longer conversation
    after: str  # all that follows it there


def try_turns(chat):
    """Return the Trial of a template; raises InputError if it cannot render one."""
    user = as_message("user", QUESTION)
    answer = as_message("assistant", ANSWER)
    try:
        prompt = chat.render([user], True)  # what inference sees
        alone = chat.render([user, answer], False)
        longer = chat.render([user, answer, as_message("user", FOLLOW_UP)], False)
        before, after = longer.split(ANSWER)
    except (Drop, ValueError) as error:
        raise InputError(
            f"the chat template cannot render a simple conversation: {reason(error)}. Pass "
            "another with --chat_template."
        ) from None
    shared = os.path.commonprefix([prompt, alone])
    opening, _, tail = alone[len(shared) :].partition(ANSWER)
    return Trial(alone, longer, prompt[len(shared) :], opening, tail, before, after)


def find_stops(trial, special, eos, base_stops):
    """Return (the tokens that end an answer, the one to append where the template writes none).

    They are the tokenizer's EOS, or None, those of the base's generation_config, and the special
    token that follows an answer when the conversation goes on.
    """
    known = [eos, *base_stops] if eos else base_stops
    following = following_token(trial, special, known)
    stops = list(dict.fromkeys([*known, following] if following else known))
    if not stops:
        raise InputError(
            "neither the tokenizer nor the template has a token that ends an answer. Choose a base "
            "with an EOS token, or pass --chat_template."
        )
    if not following:
        return stops, stops[0]
    # a token that also opens a user turn (GLM's <|user|>) closes an answer only where the base
    # says so
    closes = following in base_stops or following not in trial.before
    return stops, following if closes else stops[0]


def following_token(trial, special, known):
    """Return the special token right behind an answer that is not the last, if it ends answers."""
    after = trial.after.lstrip()
    following = next((token for token in special if after.startswith(token)), None)
    if not following:
        return None
    if following not in trial.tail and any(stop in trial.tail for stop in known):
        return None  # gpt-oss: <|end|> closes a channel, <|return|> the answer
    if following in trial.opening:
        return None  # Kimi K3: <|close|> closes the thinking, too
    return following


def find_own_system(trial, chat):
    """Return the system text that the template itself adds (Qwen2.5's "You are Qwen."), or None."""
    head = chat.without_special(trial.before.split(QUESTION)[0])  # before the first question
    between = chat.without_special(trial.after.split(FOLLOW_UP)[0])  # and before any later one
    # both end in the name of the role; what the first has more is said once
    own = head.removesuffix(common_suffix(between, head)).strip()
    return own if re.search(r"\w", own) else None  # not of brackets alone


def takes_no_system(chat):
    """Tell whether the template refuses system turns, or leaves them out."""
    turns = [as_message("system", "SYSTEM"), as_message("user", QUESTION)]
    rendered = chat.rendered(turns, True)  # Gemma 2's refuses them
    return rendered is None or "SYSTEM" not in rendered


# ---------------------------------------------------------------- tools


def takes_objects(chat):
    """Tell whether tool calls are to bring their arguments as an object, else as JSON text."""
    arguments = {"place": "HERE"}
    rendered = []
    for form in (arguments, json.dumps(arguments)):
        call = as_message("assistant", "", tool_calls=[trial_call(form)])
        rendered.append(chat.rendered([as_message("user", QUESTION), call], False))
    as_object, as_text = rendered
    if as_object is None or as_text is None:  # it refuses one of them
        return as_object is not None
    return str(arguments) not in as_object  # Python's quotes make no JSON


def shows_tools(chat):
    """Tell whether the template renders the definitions of tools."""
    rendered = chat.rendered([as_message("user", QUESTION)], True, [TOOL])
    return rendered is None or FUNCTION in rendered


def try_tool_use(chat):
    """Return {shape of an assistant turn: (whether its calls are rendered, whether results are)}.

    A shape is (whether the turn has text, 0, 1 or 2 and more calls, whether the row has tools).
    """
    shapes = itertools.product((False, True), (0, 1, 2), (False, True))
    return {shape: shows(chat, *shape) for shape in shapes}


def shows(chat, text, calls, tools):
    """Return whether the template renders the calls of a turn, and whether the results behind it.

    What the template refuses counts as rendered: where it refuses a row too, its own words say why.
    """
    places = [f"PLACE-{i}" for i in range(calls)]
    turn = as_message("assistant", ANSWER if text else "")
    if calls:
        made = [trial_call({"place": place}, i) for i, place in enumerate(places)]
        turn["tool_calls"] = [chat.readable(call) for call in made]
    results = []
    for i in range(max(calls, 1)):  # calls may stand in a text, and have results, too
        call_id = trial_call({}, i)["id"]
        results.append(as_message("tool", f"RESULT-{i}", name=FUNCTION, tool_call_id=call_id))
    trial = [as_message("user", QUESTION), turn]
    definitions = [TOOL] if tools else None
    called = chat.rendered(trial, False, definitions)
    answered = chat.rendered([*trial, *results], True, definitions)
    shows_calls = called is None or is_whole(called, places)
    said = [result["content"] for result in results]
    shows_results = answered is None or is_whole(answered, said)
    return shows_calls, shows_results


# ---------------------------------------------------------------- what of a text was rendered


def common_suffix(one, other):
    """Return the longest end that two texts share."""
    return os.path.commonprefix([one[::-1], other[::-1]])[::-1]


def squeezed(text):
    """Return text without what templates and tokenizers change.

    That is white space and Unicode's compatibility forms.
    """
    return "".join(unicodedata.normalize("NFKC", text).split())


def is_whole(rendered, texts):
    """Tell whether every text is in what a template rendered, white space and the like aside."""
    if stand_in_order(rendered, texts):  # nearly always, and the faster way
        return True
    rendered = squeezed(rendered)
    return all(squeezed(text) in rendered for text in texts)


def stand_in_order(rendered, texts):
    """Tell whether texts, but for white space around them, are in `rendered` in their order."""
    end = 0
    for text in texts:
        text = text.strip()
        start = rendered.find(text, end)
        if start < 0:
            return False
        end = start + len(text)
    return True
