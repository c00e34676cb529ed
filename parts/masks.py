"""What is learnt of a conversation: for each answer the prompt that inference sees, and its tokens.

Where an answer begins is never guessed from the text: the template renders the conversation up to
the answer, as at inference, and with it, and the answer is what the second has more. `chat` is a
template.Chat. A sample is (ids, [(start, end) of each supervised span]).
"""

import json
import os
from dataclasses import dataclass

from parts.messages import Drop, functions_of
from parts.scores import answer_of
from parts.template import LEFT_OUT
from parts.trials import ANSWER, QUESTION, THOUGHT, as_message, is_whole, limited_trial

SNOWMAN = "\u2603"  # stands in an answer's place; no template writes it
TOO_LONG = "answers that do not fit into --max_length with their prompt"


@dataclass(frozen=True)
class Rules:
    """Which answers are learnt from, and what becomes of those that are too long."""

    max_length: int  # tokens of a prompt with its answer
    overlong: str = "drop"  # or "truncate_prompt", "error"
    train_turns: str = "all"  # or "last"


# ---------------------------------------------------------------- one answer


def turn(chat, messages, i, tools=None):
    """Return (prompt ids, answer ids) of messages[i]: what inference sees, and has to say.

    The answer ends in its stop token. Raises Drop where the template refuses the turn or does not
    render it whole: nothing is learnt from half a conversation.
    """
    before = messages[:i]
    answer = messages[i]
    if not any(message["role"] in ("user", "tool") for message in before):
        raise Drop("answers that no question precedes")
    if chat.leaves_out(messages[: i + 1], tools):
        raise Drop(LEFT_OUT)
    prompt = chat.render(before, True, tools)  # what a server would make of the same messages
    full = chat.render([*before, answer], False, tools)
    refuse_changes(messages[: i + 1], prompt, full)
    prompt_ids = chat.ids(prompt)
    if full.startswith(prompt):
        answer_ids = answer_behind(chat, prompt, prompt_ids, full[len(prompt) :], answer)
    else:
        answer_ids = answer_elsewhere(chat, prompt, prompt_ids, full, answer, before, tools)
    # some templates cut an answer, leave its thoughts out, or end it in the middle
    said = [answer["content"], answer.get("reasoning_content", ""), *called(answer)]
    if not is_whole(chat.tokenizer.decode(answer_ids), said):
        raise Drop(
            "rows with an answer or reasoning that the template does not render whole "
            "(--enable_thinking false leaves reasoning out)"
        )
    return prompt_ids, answer_ids


def refuse_changes(messages, prompt, full):
    """Raise Drop if the prompt of the last of `messages` is not what they say.

    prompt, full: how the template renders them without that answer, and with it.
    """
    # not what was answered before: Qwen3 and others leave the thoughts of past turns out
    asked = [each["content"] for each in messages[:-1] if each["role"] in ("user", "system")]
    if not is_whole(prompt, asked):
        raise Drop("rows with a turn that the template leaves out or changes")
    if any(text in full for text in quoted_arguments(messages)):
        raise Drop(
            "rows with a tool call whose arguments are a text, which the template quotes: "
            "write them as a JSON object"
        )


def answer_behind(chat, prompt, prompt_ids, rest, answer):
    """Return the answer's ids where the template goes on from the prompt with the text `rest`."""
    text = with_stop(chat, rest, answer)
    ids = chat.ids(prompt + text)
    if ids[: len(prompt_ids)] == prompt_ids:
        return ids[len(prompt_ids) :]
    return chat.ids(text)  # tokens would merge across the border, which they cannot at inference


def answer_elsewhere(chat, prompt, prompt_ids, full, answer, before, tools):
    """Return the answer's ids where the template changes the end of a prompt once it is answered.

    With a snowman in the answer's place a third render shows where answers begin; two would share
    the beginning of an answer that begins as the prompt ends. Where the last question is the same
    in all three, only the prompt ends in a scaffold, as DeepSeek's does:

        prompt    <user>What is 2+2?<assistant><think>
        full      <user>What is 2+2?<assistant>It is four.<end>
        snowman   <user>What is 2+2?<assistant>\u2603<end>
    """
    last = before[-1]["content"].strip()
    snowman = chat.render([*before, as_message("assistant", SNOWMAN)], False, tools)
    ids = chat.ids(with_stop(chat, full, answer))
    shared = os.path.commonprefix([prompt_ids, ids, chat.ids(snowman)])
    if is_whole(chat.tokenizer.decode(shared), [last]):
        scaffold = prompt_ids[len(shared) :]
        answer_ids = ids[len(shared) :]
        return answer_ids[overlap(scaffold, answer_ids) :]  # its end may be in the answer, too
    start = end_of_question(prompt, full, snowman, last)
    if start is None:
        raise Drop("rows whose prompt the template renders differently once the answer is there")
    return answer_behind(chat, prompt, prompt_ids, full[start:], answer)


def end_of_question(prompt, full, snowman, last):
    """Return where the answer begins in `full`, whose last question ends as that of the prompt.

    As with Mistral-Nemo, where only a last question holds the system text:

        prompt    [INST]Be brief. What is 2+2?[/INST]
        full      [INST]What is 2+2?[/INST]It is four.</s>
        snowman   [INST]What is 2+2?[/INST]\u2603</s>

    Returns None where `full` has another end of `last`, the question, or more between the two.
    """
    if not last or last not in prompt:
        return None
    end = prompt[prompt.rfind(last) :]  # What is 2+2?[/INST]
    head = os.path.commonprefix([full, snowman])  # [INST]What is 2+2?[/INST]
    at = head.rfind(end)
    start = at + len(end)
    return None if at < 0 or head[start:].strip() else start


def with_stop(chat, text, answer):
    """Return text up to the stop of the answer that it renders; one is appended without any.

    No further than the first stop behind the answer's words or its last call: there inference
    ends. What is left out so is found missing.
    """
    said = [part for part in (answer["content"], *called(answer)[-1:]) if part.strip()]
    text = min((chat.ended(text, part) for part in said or [""]), key=len)
    return text if text.endswith(tuple(chat.stops)) else text + chat.end


def called(message):
    """Return the names of the functions that a turn calls."""
    return [function.get("name", "") for function in functions_of(message)]


def quoted_arguments(messages):
    """Return the arguments of tool calls that are texts, quoted as templates quote them."""
    quoted = []
    for message in messages:
        for function in functions_of(message):
            arguments = function.get("arguments")
            if isinstance(arguments, str):
                quoted.append(json.dumps(arguments, ensure_ascii=False))
                quoted.append(json.dumps(arguments, ensure_ascii=True))
    return quoted


def overlap(one, other):
    """Return how many items at the end of one list are those at the beginning of the other."""
    for size in range(min(len(one), len(other)), 0, -1):
        if one[-size:] == other[:size]:
            return size
    return 0


# ---------------------------------------------------------------- prompts that are too long


def fitting_turn(chat, messages, i, tools, rules):
    """Return (prompt ids, answer ids, whether the prompt was cut); Drop for too many tokens."""
    prompt, answer = turn(chat, messages, i, tools)
    if len(prompt) + len(answer) <= rules.max_length:
        return prompt, answer, False
    if rules.overlong != "truncate_prompt":
        raise Drop(TOO_LONG)
    short = shortened(chat, messages, i, tools, rules.max_length)
    prompt, answer = turn(chat, short, i, tools)
    return prompt, answer, True


def shortened(chat, messages, i, tools, max_length):
    """Return messages whose turn i fits, the longest user text cut from the middle.

    Raises Drop if it cannot be made to fit.
    """
    while (excess := sum(map(len, turn(chat, messages, i, tools))) - max_length) > 0:
        asked = [j for j in range(i) if messages[j]["role"] in ("user", "tool")]
        j = max(asked, key=lambda j: len(messages[j]["content"]))
        text = messages[j]["content"]
        tokens = max(1, len(chat.ids(text)))
        share = 1 - (excess + 4) / tokens  # 4 for the dots
        # characters of each end; fewer each time, the dots included, or it would not end where a
        # character is many tokens
        keep = min(int(len(text) * share) // 2, len(text) // 2 - 4)
        if keep < 8:
            raise Drop("rows too long for --max_length even with the prompt shortened")
        short = {**messages[j], "content": f"{text[:keep]} ... {text[-keep:]}"}
        messages = [*messages[:j], short, *messages[j + 1 :]]
    return messages


# ---------------------------------------------------------------- all answers of a row


def samples(chat, messages, tools, rules):
    """Return (samples, [why a turn was dropped], how many prompts were shortened).

    Turns whose sequence goes on where the one before stopped share a sample; else each turn is a
    sample of its own, for then a trained sequence is what inference would have seen.
    """
    found = []
    drops = []
    cut = 0
    turns = turns_to_learn(messages, rules.train_turns)
    if len(turns) > 1:  # most pieces of all turns in one call of the tokenizer, which remembers
        chat.ids(chat.rendered(messages, False, tools) or "")
    for i in turns:
        try:
            prompt, answer, was_cut = fitting_turn(chat, messages, i, tools, rules)
        except Drop as drop:
            drops.append(str(drop))
            continue
        cut += was_cut
        ids = prompt + answer
        spans = []
        # not where history is rendered otherwise than it was learnt: without thoughts, say
        if found and starts_with(ids, found[-1][0]):
            _, spans = found.pop()
        found.append((ids, [*spans, (len(prompt), len(ids))]))
    return found, drops, cut


def turns_to_learn(messages, train_turns):
    """Return the indices of the answers to learn from: those of weight 0 are context alone."""
    turns = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and message.get("weight", 1) != 0:
            turns.append(i)
    return turns[-1:] if train_turns == "last" else turns


def starts_with(ids, others):
    """Tell whether ids begin with all of the others."""
    return ids[: len(others)] == others


def pair(chat, messages, rejected, tools, rules):
    """Return ([sample of the chosen answer, of the rejected one], [], prompts shortened), or Drop.

    Both have the same prompt, shortened so that the longer one fits.
    """
    i = len(messages) - 1
    sides = [messages, [*messages[:-1], rejected]]
    turns = [turn(chat, side, i, tools) for side in sides]
    sizes = [len(prompt) + len(answer) for prompt, answer in turns]
    cut = 0
    if max(sizes) > rules.max_length:
        if rules.overlong != "truncate_prompt":
            raise Drop(TOO_LONG)
        longer = sides[sizes.index(max(sizes))]
        before = shortened(chat, longer, i, tools, rules.max_length)[:-1]
        turns = [turn(chat, [*before, side[-1]], i, tools) for side in sides]
        cut = 1
    (prompt, chosen), (other_prompt, worse) = turns
    # answers may differ in white space alone, which the template trims
    if prompt != other_prompt or chosen == worse:
        raise Drop("pairs that the template renders with equal answers or different prompts")
    found = []
    for answer in (chosen, worse):
        ids = prompt + answer
        found.append((ids, [(len(prompt), len(ids))]))
    return found, [], cut


def encode_row(chat, messages, tools, rejected, rules):
    """Return what samples() or pair() gives for a row; ([], [the reason], 0) for a dropped one."""
    try:
        if rejected:
            *messages, rejected = chat.prepare([*messages, rejected])
            return pair(chat, messages, rejected, tools, rules)
        return samples(chat, chat.prepare(messages), tools, rules)
    except Drop as drop:
        return [], [str(drop)], 0


# ---------------------------------------------------------------- generated answers


@dataclass(frozen=True)
class Frame:
    """What a template writes around an answer besides its stop token, and so a model, too."""

    marks: list  # one of them precedes an answer: gpt-oss' "<|channel|>final<|message|>", say
    prefix: str  # where no mark does: words that count at the very start alone
    end: str  # stands behind it: Command A's "</text>"; "" for nothing


def trial_answers(chat):
    """Yield (ids, (text before it, ANSWER, text behind it)) of answers with and without reasoning.

    The ids are what a model has to generate, without the stop token; forms that the template
    refuses are left out.
    """
    plain = as_message("assistant", ANSWER)
    reasoned = as_message("assistant", ANSWER, reasoning_content=THOUGHT, thinking=THOUGHT)
    inline = as_message("assistant", f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}")
    for answer in (plain, reasoned, inline):
        try:
            _, ids = turn(chat, [as_message("user", QUESTION), answer], 1)
        except Drop:
            continue
        stop = next((t for t, token in enumerate(ids) if token in chat.stop_ids), None)
        text = chat.tokenizer.decode(ids[:stop], clean_up_tokenization_spaces=False)
        if ANSWER in text:  # not if the tokenizer changes texts, as one does that lowers case
            yield ids[:stop], text.partition(ANSWER)


def find_frame(chat):
    """Return the Frame around the answers of a template.

    Returns None where decoding without special tokens takes away all that is around them.
    """
    with limited_trial():
        trials = list(trial_answers(chat))
    plainly = [answer_of(decode_answer(chat.tokenizer, ids, None)) for ids, _ in trials]
    if all(text == ANSWER for text in plainly):
        return None
    marks = []
    prefix = ""
    for _, (before, _, _) in trials:
        # what separates an answer from thoughts is a mark, of special tokens or not
        _, thought, mark = before.rpartition(THOUGHT)
        if thought or any(token in mark for token in chat.special):
            mark = mark.strip()
            if mark and mark not in marks:
                marks.append(mark)
        else:  # plain words (functionary's "all\n"), which an answer may hold as well
            prefix = mark
    _, (_, _, end) = trials[0]
    return Frame(marks, prefix, end.strip())


def decode_answer(tokenizer, ids, frame):
    """Decode generated ids, their stop token left out; of a template with a Frame what is in it.

    That is what follows the last of its marks and precedes its end. Text without a mark is returned
    as it is.
    """
    is_plain = frame is None
    text = tokenizer.decode(ids, skip_special_tokens=is_plain, clean_up_tokenization_spaces=False)
    if is_plain:
        return text
    starts = [text.rfind(mark) + len(mark) for mark in frame.marks if mark in text]
    text = text[max(starts) :] if starts else text.removeprefix(frame.prefix)
    return text.partition(frame.end)[0] if frame.end else text
