"""Ask a trained model one question: an adapter folder, a merged folder or a base model.

python examples/ask.py runs/mine/final "What is the capital of Japan?" --system "Be brief."
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("model", help="folder or hub id; of an adapter the base is found by itself")
parser.add_argument("question")
parser.add_argument("--system", help="system turn")
parser.add_argument("--max_new_tokens", type=int, default=256)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval()  # peft puts an adapter on its base
model.to("cuda" if torch.cuda.is_available() else "cpu")
messages = [{"role": "system", "content": args.system}] if args.system else []
messages.append({"role": "user", "content": args.question})
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, enable_thinking=False, return_tensors="pt", return_dict=True
)
with torch.no_grad():
    output = model.generate(**inputs.to(model.device), max_new_tokens=args.max_new_tokens, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
