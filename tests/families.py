"""Chat templates of the families, and what is supervised in them, from their documentation."""

import json

from conftest import chat_tokenizer
from parts.template import Chat

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN25 = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Qwen.<|im_end|>\n{% endif %}"
    + CHATML
)  # brings a system turn of its own
QWEN3 = (  # history loses its thinking; without thinking the prompt holds an empty block
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% set content = m.content %}"
    "{% set thought = m.reasoning_content or '' %}{% if m.role == 'assistant' and '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}"
    "{{ content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}<|start_header_id|>{{ m.role }}"
    "<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (  # ends whole conversations, but not prompts, in a second token
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
DEEPSEEK = (  # only the prompt opens a thinking block
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}"
    "<|Assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
DEEPSEEK_CLOSED = DEEPSEEK.replace("<think>\n", "<think></think>").replace(
    "<|Assistant|>{{ m", "<|Assistant|></think>{{ m"
)
GLM = (  # no end-of-turn token
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
COHERE = (  # an answer is always followed by the next prompt
    "{% for m in messages %}<|turn|>{{ m.role }}: {{ m.content }}<|end|>{% endfor %}<|turn|>assistant: "
)
NEMO = (  # strict about tool calls; the system text stands in a user turn, where that is the last one
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}{{ bos_token }}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ system + '\n\n' if system and loop.last }}"
    "{{ m.content }}[/INST]{% elif m.tool_calls is defined %}[TOOL_CALLS]{% for c in m.tool_calls %}"
    "{% if c.id | length != 9 %}{{ raise_exception('Tool call IDs should have length 9!') }}{% endif %}"
    "{{ c.function | tojson }}{% endfor %}{{ eos_token }}{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}"
    "[/TOOL_RESULTS]{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
R1_DISTILL = (  # calls have a type; a turn that calls ends twice
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% endif %}"
    "{% if m.role == 'assistant' and m.tool_calls %}<|Assistant|>{% for c in m.tool_calls %}"
    "{{ '<|call|>' + c.type + ' ' + c.function.name + '\n' + c.function.arguments | tojson }}{% endfor %}"
    "{{ eos_token }}{% endif %}{% if m.role == 'assistant' %}<|Assistant|>{{ m.content }}{{ eos_token }}{% endif %}"
    "{% if m.role == 'tool' %}<|output|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n</think>{% endif %}"
)
FIRST_CALL = CHATML.replace(  # gpt-oss renders one call of a turn
    "{{ m.content }}",
    "{{ m.content }}{% if m.tool_calls %}<call>{{ m.tool_calls[0].function | tojson }}{% endif %}",
)
NO_TOOL_TURNS = CHATML.replace(
    "{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}"
)  # Phi-3.5
MERGING = (
    "{% for m in messages %}{{ m.role }}: a{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: a{% endif %}"
)
Q1, A1, Q2, A2 = "What is 2+2?", "It is four.", "And 3+3?", '{"six": [6]}'
Q25_SYSTEM = "<|im_start|>system\nYou are Qwen.<|im_end|>\n"
EMPTY = "<think>\n\n</think>\n\n"

# name: (template, eos, other special tokens, thinking, generation_config's stops), the two turns as (prompt, answer),
# whether they share a sample, the stop tokens
FAMILIES = {
    "chatml": (
        (CHATML, "<|im_end|>", "<|im_start|> <|endoftext|>", False, ["<|endoftext|>"]),
        f"<|im_start|>user\n{Q1}<|im_end|>\n<|im_start|>assistant\n",
        f"{A1}<|im_end|>",
        f"<|im_start|>user\n{Q1}<|im_end|>\n<|im_start|>assistant\n{A1}<|im_end|>\n<|im_start|>user\n{Q2}<|im_end|>\n"
        "<|im_start|>assistant\n",
        f"{A2}<|im_end|>",
        True,
        ["<|im_end|>", "<|endoftext|>"],
    ),
    "qwen2.5": (
        (QWEN25, "<|im_end|>", "<|im_start|>", False, []),
        f"{Q25_SYSTEM}<|im_start|>user\n{Q1}<|im_end|>\n<|im_start|>assistant\n",
        f"{A1}<|im_end|>",
        f"{Q25_SYSTEM}<|im_start|>user\n{Q1}<|im_end|>\n<|im_start|>assistant\n{A1}<|im_end|>\n<|im_start|>user\n{Q2}"
        "<|im_end|>\n<|im_start|>assistant\n",
        f"{A2}<|im_end|>",
        True,
        ["<|im_end|>"],
    ),
    "base model, whose own eos is another": (
        (CHATML, "<|endoftext|>", "<|im_start|> <|im_end|>", False, ["<|endoftext|>"]),
        f"<|im_start|>user\n{Q1}<|im_end|>\n<|im_start|>assistant\n",
        f"{A1}<|im_end|>",
        f"<|im_start|>user\n{Q1}<|im_end|>\n<|im_start|>assistant\n{A1}<|im_end|>\n<|im_start|>user\n{Q2}<|im_end|>\n"
        "<|im_start|>assistant\n",
        f"{A2}<|im_end|>",
        True,
        ["<|endoftext|>", "<|im_end|>"],
    ),
    "qwen3": (
        (QWEN3, "<|im_end|>", "<|im_start|>", False, []),
        f"<|im_start|>user\n{Q1}<|im_end|>\n<|im_start|>assistant\n{EMPTY}",
        f"{A1}<|im_end|>",
        f"<|im_start|>user\n{Q1}<|im_end|>\n<|im_start|>assistant\n{A1}<|im_end|>\n<|im_start|>user\n{Q2}<|im_end|>\n"
        f"<|im_start|>assistant\n{EMPTY}",
        f"{A2}<|im_end|>",
        False,
        ["<|im_end|>"],
    ),
    "qwen3 thinking": (
        (QWEN3, "<|im_end|>", "<|im_start|>", True, []),
        f"<|im_start|>user\n{Q1}<|im_end|>\n<|im_start|>assistant\n",
        f"<think>\nadd them\n</think>\n\n{A1}<|im_end|>",
        f"<|im_start|>user\n{Q1}<|im_end|>\n<|im_start|>assistant\n{A1}<|im_end|>\n<|im_start|>user\n{Q2}<|im_end|>\n"
        "<|im_start|>assistant\n",
        f"<think>\nadd again\n</think>\n\n{A2}<|im_end|>",
        False,
        ["<|im_end|>"],
    ),
    "llama 3": (
        (
            LLAMA3,
            "<|eot_id|>",
            "<|begin_of_text|> <|start_header_id|> <|end_header_id|>",
            False,
            [],
        ),
        f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{Q1}<|eot_id|><|start_header_id|>assistant"
        "<|end_header_id|>\n\n",
        f"{A1}<|eot_id|>",
        f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{Q1}<|eot_id|><|start_header_id|>assistant"
        f"<|end_header_id|>\n\n{A1}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{Q2}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        f"{A2}<|eot_id|>",
        True,
        ["<|eot_id|>"],
    ),
    "gemma": (
        (GEMMA, "<eos>", "<bos> <start_of_turn> <end_of_turn>", False, ["<eos>", "<end_of_turn>"]),
        f"<bos><start_of_turn>user\n{Q1}<end_of_turn>\n<start_of_turn>model\n",
        f"{A1}<end_of_turn>",
        f"<bos><start_of_turn>user\n{Q1}<end_of_turn>\n<start_of_turn>model\n{A1}<end_of_turn>\n<start_of_turn>user\n{Q2}"
        "<end_of_turn>\n<start_of_turn>model\n",
        f"{A2}<end_of_turn>",
        True,
        ["<eos>", "<end_of_turn>"],
    ),
    "mistral": (
        (MISTRAL, "</s>", "<s> [INST] [/INST]", False, []),
        f"<s>[INST] {Q1} [/INST]",
        f"{A1}</s>",
        f"<s>[INST] {Q1} [/INST]{A1}</s>[INST] {Q2} [/INST]",
        f"{A2}</s>",
        True,
        ["</s>"],
    ),
    "phi 3": (
        (PHI3, "<|endoftext|>", "<|user|> <|assistant|> <|end|>", False, []),
        f"<|user|>\n{Q1}<|end|>\n<|assistant|>\n",
        f"{A1}<|end|>",
        f"<|user|>\n{Q1}<|end|>\n<|assistant|>\n{A1}<|end|>\n<|user|>\n{Q2}<|end|>\n<|assistant|>\n",
        f"{A2}<|end|>",
        True,
        ["<|endoftext|>", "<|end|>"],
    ),
    "deepseek": (
        (DEEPSEEK, "<|eos|>", "<|bos|> <|User|> <|Assistant|>", False, []),
        f"<|bos|><|User|>{Q1}<|Assistant|><think>\n",
        f"{A1}<|eos|>",
        f"<|bos|><|User|>{Q1}<|Assistant|>{A1}<|eos|><|User|>{Q2}<|Assistant|><think>\n",
        f"{A2}<|eos|>",
        False,
        ["<|eos|>"],
    ),
    "deepseek, thinking closed": (
        (DEEPSEEK_CLOSED, "<|eos|>", "<|bos|> <|User|> <|Assistant|>", False, []),
        f"<|bos|><|User|>{Q1}<|Assistant|><think></think>",
        f"{A1}<|eos|>",
        f"<|bos|><|User|>{Q1}<|Assistant|></think>{A1}<|eos|><|User|>{Q2}<|Assistant|><think></think>",
        f"{A2}<|eos|>",
        False,
        ["<|eos|>"],
    ),
    "no end-of-turn token, the base stops at the next user": (
        (GLM, "<|endoftext|>", "<|user|> <|assistant|>", False, ["<|endoftext|>", "<|user|>"]),
        f"<|user|>\n{Q1}<|assistant|>\n",
        f"{A1}<|user|>",
        f"<|user|>\n{Q1}<|assistant|>\n{A1}<|user|>\n{Q2}<|assistant|>\n",
        f"{A2}<|user|>",
        True,
        ["<|endoftext|>", "<|user|>"],
    ),
    "no end-of-turn token, the base says nothing": (
        (GLM, "<|endoftext|>", "<|user|> <|assistant|>", False, []),
        f"<|user|>\n{Q1}<|assistant|>\n",
        f"{A1}<|endoftext|>",
        f"<|user|>\n{Q1}<|assistant|>\n{A1}<|user|>\n{Q2}<|assistant|>\n",
        f"{A2}<|endoftext|>",
        False,
        ["<|endoftext|>", "<|user|>"],
    ),
    "the next prompt follows every answer": (
        (COHERE, "<|end|>", "<|turn|>", False, []),
        f"<|turn|>user: {Q1}<|end|><|turn|>assistant: ",
        f"{A1}<|end|>",
        f"<|turn|>user: {Q1}<|end|><|turn|>assistant: {A1}<|end|><|turn|>user: {Q2}<|end|><|turn|>assistant: ",
        f"{A2}<|end|>",
        False,  # in history the space before an answer is part of its first token
        ["<|end|>"],
    ),
    "no template": (
        (None, "<|eos|>", "", False, []),
        f"### User:\n{Q1}\n\n### Assistant:\n",
        f"{A1}<|eos|>",
        f"### User:\n{Q1}\n\n### Assistant:\n{A1}<|eos|>\n\n### User:\n{Q2}\n\n### Assistant:\n",
        f"{A2}<|eos|>",
        True,
        ["<|eos|>"],
    ),
}


def conversation():
    return [
        {"role": "user", "content": Q1},
        {"role": "assistant", "content": A1, "reasoning_content": "add them"},
        {"role": "user", "content": Q2},
        {"role": "assistant", "content": A2, "reasoning_content": "add again"},
    ]


def make_chat(template, eos, special, thinking, stops):
    bos = next(
        (
            token
            for token in special.split()
            if token in ("<s>", "<bos>", "<|bos|>", "<|begin_of_text|>")
        ),
        None,
    )
    return Chat(chat_tokenizer(template, eos, bos, special.split()), thinking, stops)


STRICT = {
    "nemo": (
        (NEMO, "</s>", "<s> [INST] [/INST] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS]", False, []),
        '[TOOL_CALLS]{"name": "weather", "arguments": {"city": "Paris"}}</s>',
    ),
    "r1 distill": (
        (R1_DISTILL, "<|eos|>", "<|bos|> <|User|> <|Assistant|> <|call|> <|output|>", False, []),
        '<|call|>function weather\n{"city": "Paris"}<|eos|>',
    ),
}


def call(city="Paris", **changes):
    function = {"name": "weather", "arguments": json.dumps({"city": city})} | changes
    return {"id": "a1B2c3D4e", "type": "function", "function": function}


def tool_conversation(calls, text=""):
    return [
        *conversation()[:2],
        {"role": "user", "content": "How is the weather?"},
        {"role": "assistant", "content": text} | ({"tool_calls": calls} if calls else {}),
        *(
            {"role": "tool", "content": "rain", "tool_call_id": "a1B2c3D4e"}
            for _ in calls or [None]
        ),
        {"role": "assistant", "content": "It rains."},
    ]


# ---------------------------------------------------------------- answers in a frame

TEXT = '{"a": "all , is \'t", "b": [1]}'


HARMONY = (  # gpt-oss: an answer stands in a channel of its own, behind that of the thoughts
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}"
    "{% if m.thinking %}<|channel|>analysis<|message|>{{ m.thinking }}<|end|><|start|>assistant{% endif %}"
    "<|channel|>final<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{% else %}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


RECIPIENT = (  # functionary: words, no special tokens, say to whom
    "{% for m in messages %}<|h|>{{ m.role }}<|e|>{% if m.role == 'assistant' %}>>>all\n{% endif %}"
    "{{ m.content }}<|eot|>{% endfor %}{% if add_generation_prompt %}<|h|>assistant<|e|>>>>{% endif %}"
)


SEED = (  # Seed-OSS: thoughts between special tokens
    "{% for m in messages %}<bos>{{ m.role }}\n"
    "{% if m.reasoning_content %}<s:think>{{ m.reasoning_content }}</s:think>\n{% endif %}"
    "{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
)


PARTS = (  # Kimi K3: the tag that ends an answer ends the thinking, too
    "{% for m in messages %}<open>{{ m.role }}<sep>{% if m.role == 'assistant' %}<open>think<sep>{{ m.thinking or '' }}"
    "<close>think<sep><open>response<sep>{{ m.content }}<close>response<sep>{% else %}{{ m.content }}<close>{% endif %}"
    "<eom>{% endfor %}{% if add_generation_prompt %}<open>assistant<sep><open>think<sep>{% endif %}"
)


COMMAND = (  # Command A: an answer has a beginning and an end
    "{% for m in messages %}<turn>{{ m.role }}{% if m.role == 'assistant' %}<text>{{ m.content }}</text><eot>"
    "{% else %}{{ m.content }}<eot>{% endif %}{% endfor %}{% if add_generation_prompt %}<turn>assistant{% endif %}"
)


FRAMED = {  # template, EOS, other special tokens, [(generated before the stop token, its answer)]
    "gpt-oss": (HARMONY, "<|return|>", "<|start|> <|channel|> <|message|> <|end|>", [
        (f"<|channel|>final<|message|>{TEXT}", TEXT),
        (f"<|channel|>analysis<|message|>final? {{}}<|end|><|start|>assistant<|channel|>final<|message|>{TEXT}", TEXT),
        ("<|channel|>final<|message|>1<|end|><|start|>assistant<|channel|>final<|message|>2", "2"),  # the last one
        ('<|channel|>analysis<|message|>{"a": 1}', '<|channel|>analysis<|message|>{"a": 1}')]),  # no answer yet
    "functionary": (RECIPIENT, "<|eot|>", "<|h|> <|e|>", [
        (f"all\n{TEXT}", TEXT),
        ("all\nall is all\nwell", "all is all\nwell"),
        ("allow all\nof it", "allow all\nof it")]),
    "seed-oss": (SEED, "<eos>", "<bos> <s:think> </s:think>", [
        (TEXT, TEXT), (f"<s:think>hm</s:think>\n{TEXT}", TEXT), (f"<s:think>{TEXT}", f"<s:think>{TEXT}")]),
    "kimi k3": (PARTS, "<eom>", "<open> <close> <sep>", [
        (f"<close>think<sep><open>response<sep>{TEXT}<close>response<sep>", TEXT),
        (f"hm<close>think<sep><open>response<sep>{TEXT}<close>response<sep>", TEXT),
        (f"<close>think<sep><open>response<sep>{TEXT}", TEXT)]),  # cut off
    "command a": (COMMAND, "<eot>", "<turn> <text> </text>", [(f"<text>{TEXT}</text>", TEXT)]),
    "special </think>": (FAMILIES["qwen3"][0][0], "<|im_end|>", "<|im_start|> <think> </think>", [
        (TEXT, TEXT), (f"<think>\nhm\n</think>\n\n{TEXT}", TEXT), (f"hm</think>{TEXT}", TEXT)]),
}  # fmt: skip
