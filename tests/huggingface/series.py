"""What one series of transformers says of exported models: a program without megagrow, run once for each series.

    PYTHONPATH=.venv/hf4 python tests/huggingface/series.py MODEL... < texts.json

Prints JSON: the version, and for each directory what it gives for the texts and the token ids of the request.
"""

import json
import sys
from typing import Any

import torch
import transformers


def describe(directory: str, asked: dict[str, Any]) -> dict[str, Any]:
    """Encodings, decoded texts, stop tokens, logits of the given ids, and what is generated after each text."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, torch_dtype=torch.float32).eval()
    said: dict[str, Any] = {"class": type(model).__name__, "parameters": model.num_parameters()}
    said |= {name: getattr(model.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    said["generation"] = [getattr(model.generation_config, name) for name in ("eos_token_id", "pad_token_id")]
    with torch.no_grad():
        said["logits"] = model(torch.tensor(asked["ids"])).logits.tolist() if asked["ids"] else []
    if asked["texts"]:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        said["encoded"] = [tokenizer(text)["input_ids"] for text in asked["texts"]]
        said["decoded"] = [tokenizer.decode(ids) for ids in said["encoded"]]
        said["eos_token"] = tokenizer.eos_token
        said["template"] = tokenizer.chat_template
    said["generated"] = [
        model.generate(torch.tensor([ids]), max_new_tokens=60, do_sample=False)[0].tolist()
        for ids in asked.get("prompts", [])
    ]
    return said


def main() -> None:
    """Answer the request on standard input for all directories."""
    asked = json.load(sys.stdin)
    answers = {directory: describe(directory, asked) for directory in sys.argv[1:]}
    print(json.dumps({"version": transformers.__version__, "models": answers}))


if __name__ == "__main__":
    main()
