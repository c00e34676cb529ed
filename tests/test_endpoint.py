"""An OpenAI-compatible server: what it is sent, what becomes of replies, what a failure leaves."""

import json
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import utils
from conftest import write_jsonl
from parts import endpoint
from parts.answers import write_predictions
from parts.chats import Example
from parts.endpoint import Endpoint, ask, ask_all

import pytest


class Server:
    """Answers the user's last text with reply(text) -> (code, bytes).

    Notes requests, and how many came at once.
    """

    def __init__(self, reply):
        seen = self
        self.bodies, self.now, self.most, self.lock = [], 0, 0, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with seen.lock:
                    seen.bodies.append(body)
                    seen.now += 1
                    seen.most = max(seen.most, seen.now)
                code, data = reply(body["messages"][-1]["content"])
                with seen.lock:
                    seen.now -= 1
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        class Threading(ThreadingHTTPServer):
            request_queue_size = 64

            def handle_error(self, *_):  # a client that went away
                pass

        self.server = Threading(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"


def completion(content, reason="stop", **more):
    choice = {"message": {"role": "assistant", "content": content, **more}, "finish_reason": reason}
    return 200, json.dumps({"choices": [choice]}).encode()


@pytest.fixture
def serve(monkeypatch):
    """Return start(reply) -> (Server, Endpoint); without pauses between tries."""
    monkeypatch.setattr(endpoint, "PAUSES", (0, 0))
    servers = []

    def start(reply):
        servers.append(Server(reply))
        return servers[-1], Endpoint(servers[-1].url, "mine", thinking=False, max_new_tokens=40)

    yield start
    for server in servers:
        server.server.shutdown()
        server.server.server_close()


def make_examples(count):
    examples = []
    for i in range(count):
        messages = [
            {"role": "user", "content": f"{i}"},
            {"role": "assistant", "content": f"answer {i}"},
        ]
        examples.append(Example(f"rows.jsonl, line {i + 1}", messages))
    return examples


def written(tmp_path):
    """Return the lines of the predictions file."""
    lines = (tmp_path / "out/predictions-dev-0.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# ---------------------------------------------------------------- what is sent


def test_eight_are_asked_at_once_and_the_file_has_the_order_of_the_rows(serve, tmp_path):
    def reply(text):
        time.sleep(0.3 if text == "0" else 0.05)  # the first comes back last
        seen.append([line["where"] for line in written(tmp_path)])
        return completion(f"<think>hm</think>answer {text}")

    seen = []
    server, asked = serve(reply)
    answers = ask_all(asked, tmp_path / "out", "dev-0", make_examples(24))
    assert answers == [(f"<think>hm</think>answer {i}", True) for i in range(24)]
    assert server.most == 8 and len(server.bodies) == 24
    assert 0 < max(map(len, seen)) < 24  # lines stand in the file while others are asked
    assert "rows.jsonl, line 1" not in seen[10]
    write_predictions(tmp_path / "out", "dev-0", make_examples(24), answers)
    assert [line["where"] for line in written(tmp_path)] == [
        f"rows.jsonl, line {i + 1}" for i in range(24)
    ]
    assert [line["prediction"] for line in written(tmp_path)] == [f"answer {i}" for i in range(24)]


CALLS = [{"role": "user", "content": "Rain?", "weight": 0},
         {"role": "assistant", "content": "<think>\nhm\n</think>\n\nLet me see.",
          "reasoning_content": "hm", "thinking": "hm", "weight": 0,
          "tool_calls": [{"id": "mine", "type": "function",
                          "function": {"name": "f", "arguments": {"city": "Köln"}}},
                         {"name": "g", "arguments": '{"x": 1}'}, {"function": {"name": "h"}}]},
         {"role": "tool", "content": "yes", "tool_call_id": "mine"},
         {"role": "tool", "name": "g", "content": "1"},
         {"role": "tool", "content": "2"}, {"role": "user", "content": "So?"}]  # fmt: skip


@pytest.mark.parametrize("thinking", [False, True])
def test_messages_are_sent_as_openai_takes_them(serve, thinking):
    server, asked = serve(lambda text: completion("Yes."))
    tools = [{"name": "f", "parameters": {}}, {"type": "function", "function": {"name": "g"}}]
    messages = [*CALLS, {"role": "assistant", "content": "Yes."}]
    ask(replace(asked, thinking=thinking), Example("line 1", messages, tools))
    (body,) = server.bodies
    assert body["tools"] == [
        {"type": "function", "function": {"name": "f", "parameters": {}}},
        tools[1],
    ]
    assert body["chat_template_kwargs"] == {"enable_thinking": thinking}
    question, answer, *results, last = body["messages"]
    assert question == {"role": "user", "content": "Rain?"} and last == {
        "role": "user",
        "content": "So?",
    }
    calls = answer.pop("tool_calls")
    assert [call["function"] for call in calls] == [
        {"name": "f", "arguments": '{"city": "Köln"}'}, {"name": "g", "arguments": '{"x": 1}'},
        {"name": "h", "arguments": "{}"}]  # fmt: skip
    assert calls[0]["id"] == "mine" and {call["type"] for call in calls} == {"function"}
    assert [result["tool_call_id"] for result in results] == [call["id"] for call in calls]
    assert len({call["id"] for call in calls}) == 3 and results[1]["name"] == "g"
    if thinking:
        assert answer == {
            "role": "assistant",
            "content": CALLS[1]["content"],
            "reasoning_content": "hm",
        }
    else:  # as a model is trained: without it
        assert answer == {"role": "assistant", "content": "Let me see."}


# ---------------------------------------------------------------- what comes back


@pytest.mark.parametrize(
    "reply, expected",
    [
        (completion("Yes."), ("Yes.", True)),
        (completion("Ye", "length"), ("Ye", False)),
        (completion("Ye", None), ("Ye", False)),
        (completion(None, "tool_calls", tool_calls=[{"function": {"name": "f"}}]), ("", True)),
        (completion("", "function_call"), ("", True)),
        (completion("日本 🙂"), ("日本 🙂", True)),
    ],
)
def test_replies_are_read(serve, reply, expected):
    server, asked = serve(lambda text: reply)
    assert ask(asked, make_examples(1)[0]) == expected


BAD = {
    "a number": (completion(5), "content that is the int 5, not a text"),
    "parts": (completion([{"type": "text", "text": "x"}]), "content that is the list"),
    "half an emoji": (completion("so \ud83d"), r"half a character in .so .ud83d"),
    "half an emoji in bytes": (
        (200, b'{"choices": [{"message": {"content": "\xf0\x9f'),
        "what is no JSON",
    ),
    "an error": ((200, b'{"error": {"message": "no room"}}'), "no choices.*no room"),
    "no choice": ((200, b'{"choices": []}'), "no choices"),
    "no message": ((200, b'{"choices": [5]}'), "no choices"),
    "a list": ((200, b"[]"), "no choices"),
    "nothing": ((200, b""), "what is no JSON: ''"),
    "a web page": ((200, b"<html>"), "what is no JSON: '<html>'"),
    "deep": ((200, b"[" * 100_000), "what is no JSON"),
    "a broken server": ((500, b"out of\nmemory"), "answers 500: out of memory"),
    "too many": ((429, b"slowly"), "answers 429: slowly"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_replies_are_asked_for_three_times_and_end_in_a_sentence(serve, name):
    reply, sentence = BAD[name]
    server, asked = serve(lambda text: reply)
    with pytest.raises(utils.InputError, match=sentence) as error:
        ask(asked, make_examples(1)[0])
    assert len(server.bodies) == 3 and "asked 3 times, last for rows.jsonl, line 1" in str(
        error.value
    )
    assert "\n" not in str(error.value)


def test_a_refused_request_is_not_sent_again(serve):
    server, asked = serve(lambda text: (400, b"no such model"))
    with pytest.raises(utils.InputError, match="answers 400: no such model"):
        ask(asked, make_examples(1)[0])
    assert len(server.bodies) == 1


def test_a_server_that_comes_back_is_asked_again(serve):
    replies = iter([(503, b"loading"), (200, b"{"), completion("Yes.")])
    server, asked = serve(lambda text: next(replies))
    assert ask(asked, make_examples(1)[0]) == ("Yes.", True)


def test_a_failure_keeps_the_answers_that_came(serve, tmp_path):
    def reply(text):
        time.sleep(0.02)
        return completion(f"answer {text}") if int(text) < 19 else (404, b"gone")

    server, asked = serve(reply)
    with pytest.raises(
        utils.InputError,
        match="answers 404: gone. (19|2.) of 40 answers are in .*predictions-dev-0",
    ):
        ask_all(asked, tmp_path / "out", "dev-0", make_examples(40))
    assert {line["prediction"] for line in written(tmp_path)} == {f"answer {i}" for i in range(19)}
    assert len(server.bodies) < 40  # those that had not begun were not asked


def test_ctrl_c_waits_for_nobody(serve, tmp_path, monkeypatch):
    def reply(text):
        if text != "0":
            ended.wait(20)
        return completion("Yes.")

    def interrupt(*_):
        raise KeyboardInterrupt

    ended = threading.Event()
    server, asked = serve(reply)
    monkeypatch.setattr(endpoint.tqdm, "update", interrupt)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        ask_all(asked, tmp_path / "out", "dev-0", make_examples(20))
    assert time.monotonic() - start < 5
    ended.set()


def test_a_mistake_of_ours_is_no_hang(serve, tmp_path, monkeypatch):
    server, asked = serve(lambda text: completion("Yes."))
    monkeypatch.setattr(endpoint, "as_request", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ask_all(asked, tmp_path / "out", "dev-0", make_examples(20))


def test_a_server_that_is_too_slow_is_not_asked_again(serve, monkeypatch):
    monkeypatch.setattr(endpoint, "ANSWER_SECONDS", 0.2)
    server, asked = serve(lambda text: time.sleep(0.5) or completion("Yes."))
    with pytest.raises(utils.InputError, match="gave no answer within"):
        ask(asked, make_examples(1)[0])
    assert len(server.bodies) == 1


def test_an_endpoint_is_an_address(run_sft, tmp_path, capsys):
    data = write_jsonl(tmp_path / "dev.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(SystemExit):
        run_sft("--eval_only", "--endpoint", "localhost:8080", "--dev_file", data, data=None)
    assert "write it as http://localhost:8080" in capsys.readouterr().err


def test_a_dry_run_asks_nothing(run_sft, serve, tmp_path):
    server, asked = serve(lambda text: completion("b"))
    data = write_jsonl(tmp_path / "dev.jsonl", [{"prompt": "a", "completion": "b"}])
    run_sft("--eval_only", "--endpoint", server.url, "--dev_file", data, "--dry_run", data=None)
    assert not server.bodies and not (tmp_path / "out").exists()
    report = run_sft("--eval_only", "--endpoint", server.url, "--dev_file", data, data=None)
    assert report["metrics"]["exact_match"] == 1
