"""Turn a list of prompts, one a line, into the text features that zsar reads.

    python text/embed.py MODEL classes.txt text_label.npy
    python text/embed.py MODEL descriptions.txt text_description.npy

MODEL is a folder with a Sentence-BERT model (or its name on the Hugging Face hub). The bundled arrays were made with
all-mpnet-base-v2. The output is float16 (C, 1+L, D): row 0 is the pooled sentence vector, the mean over the tokens,
L2-normalised; rows 1.. are the token vectors, and zero rows are padding. L is what the longest prompt needs, at most 35.

This script alone needs the package `transformers`; nothing in zsar imports it.
"""
import os
import sys

import numpy as np
import torch

MAX_TOKENS = 35  # TDSM reads 35 text tokens (methods.md section 4)


def embed(model_path, prompts):
    """Encode C prompts with a Sentence-BERT model → float16 (C, 1+L, D), and the prompts that were cut at 35 tokens."""
    from transformers import AutoModel, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModel.from_pretrained(model_path).eval()
    cut = [p for p in prompts if len(tokenizer(p)["input_ids"]) > MAX_TOKENS]
    batch = tokenizer(prompts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    with torch.inference_mode():
        tokens = model(**batch).last_hidden_state                         # (C, L, D)
    mask = batch["attention_mask"].unsqueeze(-1)                          # (C, L, 1): 0 on padding
    tokens = tokens * mask
    pooled = torch.nn.functional.normalize(tokens.sum(1) / mask.sum(1), dim=-1)
    return torch.cat([pooled.unsqueeze(1), tokens], 1).half().numpy(), cut


def main():
    """The command line: MODEL PROMPTS.txt OUT.npy. Exit status 2 and one line on bad input."""
    if len(sys.argv) != 4:
        fail("usage: python text/embed.py MODEL PROMPTS.txt OUT.npy")
    model_path, prompts_file, out_file = sys.argv[1:]
    try:
        import transformers  # noqa: F401
    except ImportError:
        fail("text/embed.py needs the package transformers: pip install transformers")
    try:
        with open(prompts_file, encoding="utf-8") as f:
            prompts = [line.strip() for line in f.read().splitlines()]
    except (OSError, UnicodeDecodeError) as e:
        fail(f"{prompts_file}: cannot be read ({e}); give a text file with one prompt a line")
    if not prompts or "" in prompts:
        fail(f"{prompts_file}: has an empty line; one prompt a line, in the order of the class ids")
    try:
        features, cut = embed(model_path, prompts)
    except (OSError, ValueError) as e:
        fail(f"{model_path}: no Sentence-BERT model could be loaded ({str(e).splitlines()[0]})")
    for p in cut:
        print(f"cut at {MAX_TOKENS} tokens: {p}")
    try:
        with open(out_file + ".part", "wb") as f:
            np.save(f, features)
        os.replace(out_file + ".part", out_file)
    except OSError as e:
        fail(f"{out_file}: cannot be written ({e.strerror}); choose another place")
    print(f"{out_file}: {features.shape[0]} prompts, {features.shape[1] - 1} token rows, width {features.shape[2]}")


def fail(message):
    """Print one line on standard error and exit with status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
