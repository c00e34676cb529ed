"""An OpenAI-compatible server's answers: what it is sent, what is made of its replies."""

import http.client
import itertools
import json
import os
import queue
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass

from parts.answers import label_of, measure, prediction_line, predictions_file, write_predictions
from parts.messages import THINKING
from utils import InputError, reason, shows_bars

from tqdm.auto import tqdm

REQUESTS_AT_ONCE = 8
ANSWER_SECONDS = 8 * 600  # a server with one slot lets the others wait
PAUSES = (1, 2)  # seconds before the second and the third try
STOPPED = ("stop", "tool_calls", "function_call")  # finish_reasons; "length" is none of them
NOT_REFUSED = (408, 429)  # too slow, too many at once: asking again may help


class NoAnswer(Exception):
    """A server gave no answer that can be used; the message says what. Asking again may help."""


@dataclass(frozen=True)
class Endpoint:
    """A server, and how it is asked."""

    url: str
    model: str  # its name there
    thinking: bool
    max_new_tokens: int


def measure_endpoint(dev_sets, folder, endpoint):
    """Return what measure finds with the answers of a server, which are written into `folder`."""

    def answer(name, prompts, examples):
        return ask_all(endpoint, folder, label_of(name, 0), examples)

    def written(name, examples, answers):
        write_predictions(folder, label_of(name, 0), examples, answers)  # now in the rows' order

    return measure(dev_sets, None, answer, written)


# ---------------------------------------------------------------- what is sent


def as_openai(messages, thinking):
    """Return messages as OpenAI's API takes them.

    Arguments are text there; each call has an id, and so has its result.
    """
    asked, waiting = [], []  # waiting: ids of calls without a result yet
    numbers = itertools.count(1)
    for message in messages:
        known = ("role", "content", "name", "tool_call_id")
        sent = {name: message[name] for name in known if name in message}
        if message["role"] == "assistant" and not thinking:  # as in Chat.prepare
            sent["content"] = THINKING.sub("", message["content"])
        if thinking and "reasoning_content" in message:
            sent["reasoning_content"] = message["reasoning_content"]
        if message.get("tool_calls"):
            sent["tool_calls"] = []
            for call in message["tool_calls"]:
                call = as_openai_call(call, f"call{next(numbers):05}")
                sent["tool_calls"].append(call)
                waiting.append(call["id"])
        if message["role"] == "tool" and waiting:
            sent.setdefault("tool_call_id", waiting[0])
            waiting.pop(0)
        asked.append(sent)
    return asked


def as_openai_call(call, default_id):
    """Return a tool call as OpenAI's API takes it."""
    function = call.get("function", call)
    arguments = function.get("arguments", {})
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {
        "id": call.get("id") or default_id,
        "type": "function",
        "function": {"name": function.get("name"), "arguments": arguments},
    }


def as_openai_tool(tool):
    """Return the definition of a tool as OpenAI's API takes it."""
    is_bare = isinstance(tool, dict) and "function" not in tool
    return {"type": "function", "function": tool} if is_bare else tool


def as_request(endpoint, example):
    """Return the body of the request for the last answer of an Example."""
    body = {
        "model": endpoint.model,
        "messages": as_openai(example.messages[: example.last], endpoint.thinking),
        "temperature": 0,
        "max_tokens": endpoint.max_new_tokens,
        "chat_template_kwargs": {"enable_thinking": endpoint.thinking},
    }
    if example.tools:
        body["tools"] = [as_openai_tool(tool) for tool in example.tools]
    return body


# ---------------------------------------------------------------- what comes back


def post(url, body):
    """Send JSON and return the JSON that comes back.

    Raises NoAnswer, or InputError where asking again would not help.
    """
    try:
        code, text = send(url, body)
    except TimeoutError:
        minutes = ANSWER_SECONDS // 60
        raise InputError(
            f"{url} gave no answer within {minutes} minutes. Is the server busy?"
        ) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise NoAnswer(
            f"--endpoint {url} gives no answer: {reason(error)}. Is the server up?"
        ) from None
    if code >= 400:
        said = " ".join(text.split())[:200] or http.client.responses.get(code, "nothing")
        is_refused = code < 500 and code not in NOT_REFUSED
        error = InputError if is_refused else NoAnswer
        raise error(f"{url} answers {code}: {said}")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise NoAnswer(f"{url} answers with what is no JSON: {text[:200]!r}") from None


def send(url, body):
    """Send JSON; return (the status code, the text) of the reply."""
    key = os.environ.get("OPENAI_API_KEY", "-")
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        reply = urllib.request.urlopen(request, timeout=ANSWER_SECONDS)
    except urllib.error.HTTPError as error:
        reply = error  # a reply as well, whose text says what is wrong
    with reply:
        return reply.code, reply.read().decode(errors="replace")


def read_reply(reply, url):
    """Return (text, whether it stopped) of a chat completion; raises NoAnswer for what is none."""
    try:
        choice = reply["choices"][0]
        content = choice["message"].get("content")
        finish = choice.get("finish_reason")
    except (LookupError, TypeError, AttributeError):
        said = json.dumps(reply)[:200]
        raise NoAnswer(f"{url} answers with no choices[0].message: {said}") from None
    if content is not None and not isinstance(content, str):
        raise NoAnswer(
            f"{url} answers with a content that is the {type(content).__name__} "
            f"{json.dumps(content)[:60]}, not a text"
        )
    content = content or ""  # a tool call has none
    if content != content.encode(errors="replace").decode():
        said = json.dumps(content)[:200]
        raise NoAnswer(f"{url} answers with half a character in {said}: that is no Unicode text")
    return content, finish in STOPPED


# ---------------------------------------------------------------- asking


def completions_url(url):
    """Return the address to post to, of a server's that may be given with or without its path."""
    url = url.rstrip("/").removesuffix("/chat/completions")
    return f"{url}/chat/completions" if url.endswith("/v1") else f"{url}/v1/chat/completions"


def ask(endpoint, example):
    """Ask for the last answer of an Example: (text, whether it stopped).

    Raises InputError after 3 tries.
    """
    url = completions_url(endpoint.url)
    body = as_request(endpoint, example)
    for seconds in (*PAUSES, None):
        try:
            return read_reply(post(url, body), url)
        except NoAnswer as error:
            if seconds is None:
                tries = f"asked {len(PAUSES) + 1} times, last for {example.where}"
                raise InputError(f"{error} ({tries})") from None
            time.sleep(seconds)


def ask_in_threads(endpoint, examples):
    """Ask for the last answers of Examples, several at once; yield (i, answer or what went wrong).

    After a failure only those under way are waited for. The threads are daemons: Ctrl-C waits for
    nobody.
    """
    waiting = iter(range(len(examples)))  # shared: each thread takes the next
    came = queue.SimpleQueue()

    def work():
        for i in waiting:
            try:
                came.put((i, ask(endpoint, examples[i])))
            except Exception as error:  # any: a thread that died of one would be waited for
                came.put((i, error))
                list(waiting)  # takes the rest from the others
        came.put(None)

    for _ in range(REQUESTS_AT_ONCE):
        threading.Thread(target=work, daemon=True).start()
    for _ in range(REQUESTS_AT_ONCE):
        yield from iter(came.get, None)  # until one more thread has ended


def ask_all(endpoint, folder, name, examples):
    """Ask for the last answers of Examples: [(text, whether it stopped)].

    Each is written to predictions-<name>.jsonl as it comes. Raises InputError if one fails.
    """
    path = predictions_file(folder, name)
    answers, failures = {}, []
    bar = tqdm(
        total=len(examples),
        desc=f"asking {name}",
        unit="row",
        leave=False,
        disable=not shows_bars(),
    )
    with path.open("w", encoding="utf-8") as file, bar:
        for i, answer in ask_in_threads(endpoint, examples):
            if isinstance(answer, Exception):
                failures.append(answer)
                continue
            answers[i] = answer
            file.write(prediction_line(examples[i], *answer))
            file.flush()
            bar.update()
    for failure in failures:
        if not isinstance(failure, InputError):
            raise failure
        kept = f" {len(answers)} of {len(examples)} answers are in {path}." if answers else ""
        raise InputError(f"{str(failure).rstrip('.')}.{kept}")
    return [answers[i] for i in range(len(examples))]
