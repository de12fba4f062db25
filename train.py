"""Train and test a zero-shot method, from data to figures; then label new sequences.

    python train.py --method dvta --split 55_5                           the embedded synthetic set
    python train.py --method tdsm --split 22_6_a --data path/to/folder   your data (README, "Your data")
    python train.py predict --run runs/... --data path/to/folder         labels, among any classes
    torchrun --nproc-per-node=8 train.py --method tdsm --split 55_5      the first on eight GPUs

The flow: read_data → Data → encode → features → train_methods → unseen_figures → report.
"""
import ast
import contextlib
import copy
import itertools
import json
import math
import os
import re
import shlex
import shutil
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import zsar
from alignment import DVTA
from data import (InputError, Parser, check_bodies, command_line, fingerprint, list_splits, make_folder, note,
                  pieces, read_data, read_lines, read_sequences, read_tensors, read_text, read_validation,
                  validation_of, write_file, write_json, write_table)
from diffusion import STEPS, TDSM
from zsar import (FEATURES, FRAMES, STGCN, JointGraph, Ridge, ShiftGCN, augmented,
                  recalibrate_batch_norm, to_common_frame)

# ---------------------------------------------------------------------------------------------------- presets
# For NTU and PKU: the published settings of DVTA and TDSM. For other, smaller data, and for every encoder:
# chosen on validation classes, never on unseen ones (docs/notes.md).
# A training takes "epochs", or "steps" where there are none; [least, most] steps bound its epochs.
# "warm_up": a share of the steps, or a number; then the rate falls as a cosine to 0, or by ten at epochs
# "decay_at". "epochwise": set the rate once an epoch; "keep_last": train on an epoch's last, smaller batch.
# What the method itself is built with stands under "model".
ENCODER = {"name": "stgcn", "frame": "first", "epochs": 30, "steps": None, "batch_size": 16,
           "optimizer": "adamw", "lr": 3e-3, "weight_decay": 0.01, "warm_up": 0.15, "decay_at": [],
           "epochwise": False, "keep_last": False, "augment": True, "label_smoothing": 0.1,
           "all_classes": False}        # an output for each class of the dataset, not for the seen ones only
PUBLISHED_ENCODERS = {  # ST-GCN as in SMIE, whose features DVTA used; and Shift-GCN's own
    "stgcn": ENCODER | {"frame": "smie", "epochs": 150, "batch_size": 128, "optimizer": "adam", "lr": 5e-3,
                        "weight_decay": 0.0, "warm_up": 0.0, "epochwise": True, "keep_last": True,
                        "augment": False, "label_smoothing": 0.0, "all_classes": True},
    "shiftgcn": ENCODER | {"name": "shiftgcn", "frame": "shiftgcn", "epochs": 140, "batch_size": 64,
                           "optimizer": "sgd", "lr": 0.1, "weight_decay": 1e-4, "warm_up": 0.0,
                           "decay_at": [60, 80, 100], "augment": False, "label_smoothing": 0.0},
}
RIDGE = {"model": {"penalty": 1000.0}}
DVTA_PAPER = {"epochs": 100, "steps": None, "batch_size": 128, "optimizer": "adamw", "lr": 1e-6,
              "weight_decay": 0.0, "warm_up": 0.15, "epochwise": True, "keep_last": True,
              "model": {"sde": True, "only": None, "standardise": False, "centre": False}}
DVTA_SMALL = DVTA_PAPER | {"epochs": 7, "steps": [150, 1000], "batch_size": 64, "lr": 1e-4,
                           "epochwise": False, "keep_last": False,
                           "model": DVTA_PAPER["model"] | {"standardise": True, "centre": True}}
TDSM_PAPER = {"epochs": None, "steps": 50_000, "batch_size": 256, "optimizer": "adamw", "lr": 1e-4,
              "weight_decay": 0.01, "warm_up": 100.0, "epochwise": False, "keep_last": False,
              "model": {"width": 768, "depth": 12, "heads": 12, "triplet_weight": 1.0, "margin": 1.0,
                        "prediction": "epsilon", "noises": 3, "timestep": 25, "conditions": "both",
                        "standardise": False, "scale": 1.0, "unit_text": True, "centre": False}}
TDSM_SMALL = TDSM_PAPER | {"epochs": 18, "steps": [500, 4000], "batch_size": 64, "lr": 1e-3,
                           "weight_decay": 3.0, "warm_up": 0.15,
                           "model": TDSM_PAPER["model"] | {
                               "width": 128, "depth": 2, "heads": 2, "prediction": "sample", "noises": 10,
                               "conditions": "pooled", "standardise": True, "scale": 0.25, "centre": True}}
PAPER = {"encoder": ENCODER, "ridge": RIDGE, "dvta": DVTA_PAPER, "tdsm": TDSM_PAPER}
SMALL = {"encoder": ENCODER, "ridge": RIDGE, "dvta": DVTA_SMALL, "tdsm": TDSM_SMALL}
PRESETS = {
    "ntu60": PAPER,
    "ntu120": PAPER | {"dvta": DVTA_PAPER | {"lr": 5e-6}},
    "pku51": PAPER | {"dvta": DVTA_PAPER | {"lr": 1e-5}},
    "synthetic": SMALL | {"encoder": ENCODER | {"epochs": 9, "augment": False, "label_smoothing": 0.0}},
    "other": SMALL,
}
CHOICES = {"name": ("stgcn", "shiftgcn"), "frame": FRAMES, "optimizer": ("adam", "adamw", "sgd"),
           "only": (None, "da", "aa"), "prediction": ("epsilon", "sample", "v_prediction"),
           "conditions": ("both", "pooled", "tokens"), "timestep": range(STEPS)}
MODEL_KEYS = ("method", "settings", "state", "classes", "text", "encoder")      # of model.pt
CHECKPOINT_SECONDS = 60
UNFINISHED = "unfinished_run"   # a folder in each of a run's own until it is finished, with the checkpoints
VALIDATION_NOTE = "γ or settings are chosen on classes that these features' encoder has seen; use --val-data"
SYNTHETIC_NOTE = "SYNTHETIC DATA, not recordings: these figures say nothing about NTU RGB+D."


# ------------------------------------------------------------------------------------ one run from end to end
def main(argv=None):
    """The command line: train and test, or `predict`."""
    argv = sys.argv[1:] if argv is None else argv
    command_line(lambda: predict(argv[1:]) if argv[:1] == ["predict"] else run(run_arguments(argv)))


def run(args):
    """One experiment, or one for each of several seeds and their mean."""
    if args.list:
        return print("\n".join(list_splits()))
    args.code = encoder_code()                                  # now: the files may be edited during the run
    args.device, args.rank = pick_device(args), 0
    if "TORCHELASTIC_RUN_ID" in os.environ:                     # torchrun started several processes
        backend = "cpu:gloo,cuda:nccl" if args.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=30))    # while the first one trains DVTA
        args.rank = dist.get_rank()
    if args.rank:                                               # only the first process prints
        sys.stdout = open(os.devnull, "w")
    data, val = read_tasks(args)
    settings = choose_settings(args, data.preset)
    out, seeds = args.out or default_folder(args, data), range(args.seed, args.seed + args.seeds)
    folders = [out / f"seed{seed}" for seed in seeds] if args.seeds > 1 else [out]
    args.encoders, args.unfinished = out.parent / "encoders", out / UNFINISHED      # runs share encoders
    if args.rank == 0:
        claim({out, *folders}, args.force)
    results = []
    for seed, folder in zip(seeds, folders):
        args.seed, args.out = seed, folder
        results.append(experiment(args, data, val, settings))
    if args.rank:
        return
    if args.seeds > 1:
        write_json(out / "result.json", {"command": args.command, "note": results[0]["note"],
                                         "summary": report_seeds(results), "seeds": results})
    for folder in {out, *folders}:
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    print(f"written: {out / 'result.json'}")
    if results[0]["note"]:
        print(results[0]["note"])


def read_tasks(args):
    """The task to train and test on, and its validation task for choosing γ, or None → Data twice."""
    data = read_data(args.data, args.split, args.text, args.allow_lying)
    val = None
    if args.gzsl or args.validate:
        val = read_validation(data, args.val_data) if args.val_data else validation_of(data)
    if val and data.skeletons is None and not args.val_data:
        data.notes.append(VALIDATION_NOTE)
    if args.method == "dvta" and len(data.text) == 1:
        data.notes.append("the text has one prompt a class, so the SDE has nothing to mix")
    for line in data.notes if args.rank == 0 else ():
        note(line)
    for path, task in ((args.data, data), (args.val_data, val)):
        if args.gzsl and not len(task.seen_test):
            raise InputError(f"{path}: has no seen test samples, which --gzsl needs; leave it out")
    return (val, None) if args.validate else (data, val)


def experiment(args, data, val, settings):
    """The protocol for one seed, from data to figures, into the run's folder → what result.json holds."""
    method, warning = args.method, SYNTHETIC_NOTE if data.source == "synthetic set" else None
    if warning:
        print(warning)
    print(introduction(args, data, args.validate))
    start = time.perf_counter()
    features, encoder = encode(args, data, settings["encoder"])
    seconds = time.perf_counter() - start
    models, log = train_methods(args, data, features, settings, watch=not args.validate)
    if val:
        print(f"validation run, to choose γ: {introduction(args, val, True)}")
        val_features, _ = encode(args, val, settings["encoder"])
        val_models, _ = train_methods(args, val, val_features, settings)
    if args.rank:
        return None
    zsl, gzsl = {}, {}
    for name, model in models.items():
        zsl[name], gzsl[name] = unseen_figures(model, features, data), None
        if val:
            gamma = zsar.best_gamma(*among_all_classes(val_models[name], val_features, val))
            gzsl[name] = zsar.gzsl_figures(*among_all_classes(model, features, data), gamma)
    if method == "tdsm":
        zsl[method]["noise_std"] = noise_spread(models[method], features, data)
    result = {
        "command": args.command, "method": method, "dataset": data.name, "source": data.source,
        "split": data.split, "seed": args.seed, "validate": args.validate, "settings": settings,
        "note": warning, "notes": data.notes,
        "unseen": data.unseen.tolist(), "unseen_classes": [data.classes[c] for c in data.unseen],
        "samples": {part: len(getattr(data, part)) for part in ("train", "seen_test", "unseen_test")},
        "data_sha256": fingerprint(data.sha256, *data.text, data.train, data.seen_test, data.unseen_test),
        "device": str(args.device), "precision": precision_of(args),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__},
        "zsl": zsl[method], "gzsl": gzsl[method], "ridge": zsl["ridge"] | {"gzsl": gzsl["ridge"]},
        "best_on_test": log["best"], "history": log["history"],
        "encoder": {key: encoder[key] for key in ("seen_test_acc", "cached", "file")},
        "seconds": {"encoder": seconds, "train": log["seconds"]},
    }
    trained = {"method": method, "settings": settings[method], "state": models[method].state_dict(),
               "classes": data.classes, "text": [torch.as_tensor(t) for t in data.text], "encoder": encoder}
    write_file(args.out / "model.pt", lambda f: torch.save(trained, f))     # all that `predict` needs
    report(result)
    write_json(args.out / "result.json", result)
    return result


def introduction(args, data, validates):
    """What is about to be done, as a line to print."""
    unseen = "validation" if validates else "unseen"
    return (f"{args.method} on {data.name} ({data.source}), split {data.split}: "
            f"{len(data.seen)} seen and {len(data.unseen)} {unseen} classes; "
            f"samples: {len(data.train)} training, {len(data.seen_test)} seen test, "
            f"{len(data.unseen_test)} {unseen} test; seed {args.seed}; {args.device}, {precision_of(args)}")


# ---------------------------------------------------------------------------------------------------- encoder
def encode(args, data, settings):
    """Features (N, 256) of every sample, from an encoder that is trained or cached → also a dict on it."""
    if data.skeletons is None:
        features = torch.as_tensor(data.features, dtype=torch.float32, device=args.device)
        return features, {"state": None, "seen_test_acc": None, "cached": False, "file": None}
    key = fingerprint([settings, args.seed, args.device.type, precision_of(args), torch.__version__,
                       args.code, data.sha256, data.graph], data.seen, data.train)[:16]
    path = args.encoders / f"{key}.pt"
    cached = path.exists()
    if cached:
        print(f"encoder: from {path}")
        encoder = read_tensors(path, ("state", "features", "seen_test_acc"))
    else:
        encoder = train_encoder(args, data, settings, args.unfinished / f"encoder-{key}.pt")
        if args.rank == 0:
            write_file(make_folder(path.parent) / path.name, lambda f: torch.save(encoder, f))
    if len(data.seen_test):
        print(f"encoder: {encoder['seen_test_acc']:.1%} on seen test samples, {len(data.seen)} classes")
    return encoder.pop("features").to(args.device), encoder | {"cached": cached, "file": str(path)}


def encoder_code():
    """The code that an encoder's training reaches, without docstrings: {name: its syntax tree as text}."""
    nodes = {}
    for file in (zsar.__file__, __file__):
        for node in ast.parse(Path(file).read_text(encoding="utf-8")).body:
            name = ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else getattr(node, "name", "")
            nodes[name] = node
    code, names = {}, ["train_encoder"]
    for name in names:                                          # grows with the names that the code uses
        if name in nodes and name not in code:
            for node in ast.walk(nodes[name]):
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
                    node.body[:1] = []
                elif isinstance(node, ast.Name):
                    names.append(node.id)
            code[name] = ast.dump(nodes[name])
    return code


def train_encoder(args, data, settings, checkpoint):
    """Train an encoder on the training samples, encode all → all that the cache and `predict` need of it."""
    x = torch.empty(data.skeletons.shape, device=args.device)   # (N, 3, T, V, M)
    for first, part in pieces(data.skeletons):
        x[first:first + len(part)] = torch.from_numpy(to_common_frame(part, data.graph, settings["frame"]))
    classes = np.arange(len(data.classes)) if settings["all_classes"] else data.seen
    y = torch.as_tensor(np.searchsorted(classes, data.labels), device=x.device)         # (N,) output numbers
    seen = torch.as_tensor(np.searchsorted(classes, data.seen), device=x.device)        # (S,) output numbers
    rows = torch.as_tensor(data.train, device=x.device)
    with seeded(args.seed + args.rank, x.device):
        encoder = build_encoder(settings["name"], data.graph, x.shape[4], len(classes)).to(x.device)
        if settings["all_classes"]:                             # as SMIE initialises it
            nn.init.xavier_normal_(encoder.classifier.weight)
            nn.init.zeros_(encoder.classifier.bias)
        model = EncoderTraining(encoder, settings, fast=x.is_cuda and not args.fp32)
        fit(model, (x, y), rows, settings, checkpoint)
    recalibrate_batch_norm(encoder, x, rows)
    features = encode_all(encoder, x)
    with torch.no_grad():
        best = encoder.classifier(features[data.seen_test])[:, seen].argmax(1)
    hits = (seen[best] == y[data.seen_test]).float()
    return {"name": settings["name"], "frame": settings["frame"], "graph": tuple(data.graph),
            "shape": list(x.shape[2:]), "state": encoder.state_dict(), "features": features,
            "seen_test_acc": float(hits.mean()) if len(hits) else None}


class EncoderTraining(nn.Module):
    """An encoder's cross-entropy, called like a method's; `fast`: in bfloat16 and compiled, as on CUDA."""

    def __init__(self, encoder, settings, fast):
        super().__init__()
        self.encoder, self.settings, self.fast = encoder, settings, fast
        self.classify = encoder.classify
        if fast:
            encoder.to(memory_format=torch.channels_last)
        if fast and not dist.is_initialized():                  # SyncBatchNorm is not compiled
            self.classify = compiled(encoder.classify)

    def forward(self, x, y):                                    # (B, 3, T, V, M), (B,) → scalar
        if self.settings["augment"]:
            x = augmented(x)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.fast):
            logits = self.classify(x).float()                   # (B, classes)
        return F.cross_entropy(logits, y, label_smoothing=self.settings["label_smoothing"])


def compiled(function):
    """torch.compile's version of a function, or the function itself where no compiler is found."""
    fast = None

    def call(*args):
        nonlocal fast
        if fast is None:
            try:
                fast = torch.compile(function)
                return fast(*args)                              # compiles only now
            except (ImportError, RuntimeError) as e:            # no Triton, as on Windows, or no C compiler
                reason = f"{type(e).__name__}: {str(e).splitlines()[0]}"
                note(f"torch.compile failed ({reason}); running without it")
                fast = function
        return fast(*args)

    return call


def build_encoder(name, graph, num_persons, num_classes):
    """An encoder, "stgcn" or "shiftgcn", for skeletons of V joints and M persons."""
    num_joints = len(graph.edges) + 1
    if name == "shiftgcn":
        return ShiftGCN(num_joints, num_persons, num_classes)
    return STGCN(graph, num_joints, num_classes)


@torch.no_grad()
def encode_all(encoder, x):
    """Skeletons in the common frame (N, 3, T, V, M) → features (N, 256), on the same device."""
    size = 512 if x.is_cuda else 32                             # on a CPU, to stay in cache
    features = torch.empty(len(x), FEATURES, device=x.device)   # a list would pin memory between blocks
    for part, rows in zip(x.split(size), features.split(size)):
        rows.copy_(encoder(part))
    return features


# ---------------------------------------------------------------------------------------------------- methods
def build(method, text, settings, seen, x):
    """A method's model on the text of all classes, to train on seen classes (S,) and features x (n, 256)."""
    return {"dvta": DVTA, "tdsm": TDSM, "ridge": Ridge}[method](text, seen, x, **settings["model"])


def rebuild(method, text, settings, state):
    """A trained method's model, from its weights, for text of any classes."""
    if method == "tdsm":                                        # as many tokens as in training
        settings = {"model": settings["model"] | {"num_tokens": len(state["denoiser.position"])}}
    seen, x = torch.zeros(1, dtype=torch.long), torch.zeros(1, len(state["x_mean"]))
    model = build(method, text, settings, seen, x)
    model.load_state_dict(state)
    return model.eval()


def train_methods(args, data, features, settings, watch=False):
    """Train ridge and the run's method → {name: model}, and the log of `fit`; watch: test during training."""
    if args.rank and args.method != "tdsm":                     # DVTA and ridge train in the first process
        return {}, None
    device, method = args.device, args.method
    text = [torch.as_tensor(t, device=device) for t in data.text]
    rows = torch.as_tensor(data.train, device=device)           # (n,)
    y = torch.as_tensor(data.labels, device=device)             # (N,)
    x, seen = features[rows], y[rows].unique()                  # (n, 256), (S,)
    ridge = build("ridge", text, settings["ridge"], seen, x).to(device)
    ridge.fit(x, y[rows])
    if method == "ridge":
        return {"ridge": ridge}, {"seconds": 0.0, "best": None, "history": []}
    key = fingerprint([settings[method], args.seed], x.cpu().numpy(), data.labels[data.train], *data.text)
    checkpoint = args.unfinished / f"{method}-{key[:16]}.pt"
    with seeded(args.seed + args.rank, device):
        model = build(method, text, settings[method], seen, x).to(device)
        if method == "tdsm" and device.type == "cuda" and not args.fp32:
            model.triplet_loss = compiled(model.triplet_loss)   # random draws stay outside
        test = (lambda: unseen_figures(model, features, data)["acc"]) if watch else None
        log = fit(model, (features, y), rows, settings[method], checkpoint, test)
    return {method: model, "ridge": ridge}, log


def unseen_figures(model, features, data):
    """Zero-shot figures: the unseen test samples among the unseen classes."""
    unseen = torch.as_tensor(data.unseen, device=features.device)
    scores = model.scores(features[data.unseen_test], unseen)
    return zsar.zsl_figures(scores, data.labels[data.unseen_test], data.unseen)


def noise_spread(model, features, data, draws=10):
    """The standard deviation of a trained TDSM's accuracy over other draws of its scores' noises."""
    fixed, accuracies = model.noises, []
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)
        model.noises = torch.randn(fixed.shape, generator=generator).to(fixed.device)
        accuracies.append(unseen_figures(model, features, data)["acc"])
    model.noises = fixed
    return float(np.std(accuracies, ddof=1))


def among_all_classes(model, features, data):
    """Test samples among all classes → scores (N', C'), labels (N',), classes (C',), the seen ones (S,)."""
    rows, classes = np.concatenate([data.seen_test, data.unseen_test]), np.union1d(data.seen, data.unseen)
    scores = model.scores(features[rows], torch.as_tensor(classes, device=features.device))
    return scores, data.labels[rows], classes, data.seen


# ------------------------------------------------------------------------------------------ the training loop
def fit(model, samples, rows, settings, checkpoint, test=None):
    """Minimise model(x, y) over random batches of the training rows (n,) of all samples, x and y → the log.

    It resumes from the checkpoint if there is one, on a CPU to the same bits as without the break. After each
    epoch, or each 20th of the steps, it prints a line, and test() gives an accuracy.
    """
    name, (x, y) = checkpoint.name.partition("-")[0], samples
    parallel, rows, batch_size = share_of_process(model, rows, min(settings["batch_size"], len(rows)))
    per_epoch = (len(rows) + settings["keep_last"] * (batch_size - 1)) // batch_size
    steps = num_steps(settings, per_epoch)
    every = max(1, steps // 20) if settings["steps"] else per_epoch
    optimizer = make_optimizer(model, settings)
    log = {"step": 0, "seconds": 0.0, "best": None, "history": [], "sums": torch.zeros(())}
    if checkpoint.exists():
        log = load_checkpoint(checkpoint, model, optimizer)
        print(f"{name}: resuming at step {log['step']} of {steps}, from {checkpoint}", flush=True)
    written, started = time.perf_counter(), time.perf_counter() - log["seconds"]
    model.train()
    for batch in itertools.islice(random_batches(rows, batch_size, per_epoch), log["step"], steps):
        for group in optimizer.param_groups:
            group["lr"] = settings["lr"] * lr_factor(log["step"], steps, per_epoch, settings)
        loss = parallel(x[batch], y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log["step"] += 1
        parts = {"loss": loss.detach(), **getattr(model, "log", {})}
        log["sums"] = log["sums"].to(y.device) + torch.stack(list(parts.values()))
        last = log["step"] == steps
        if last or log["step"] % every == 0:
            since_report = (log["step"] - 1) % every + 1
            means = dict(zip(parts, (log["sums"] / since_report).tolist()))     # waits for the device
            log["sums"], log["seconds"] = torch.zeros_like(log["sums"]), time.perf_counter() - started
            print_progress(name, log, means, steps, per_epoch)
            epoch, acc = log["step"] / per_epoch, test() if test else None
            log["history"].append({"epoch": epoch, "loss": means["loss"], "acc_on_test": acc})
            if test and (log["best"] is None or acc > log["best"]["acc"]):
                log["best"] = {"acc": acc, "epoch": epoch}
        if last or time.perf_counter() - written > CHECKPOINT_SECONDS:
            written = time.perf_counter()
            save_checkpoint(checkpoint, model, optimizer, log | {"seconds": written - started})
    model.eval()
    return log


def print_progress(name, log, means, steps, per_epoch):
    """One line on a training: where it is, its mean losses, its speed. Raises InputError if it diverged."""
    place = f"{name} step {log['step']}/{steps}, epoch {log['step'] / per_epoch:.3g}"
    if not math.isfinite(means["loss"]):
        raise InputError(f"{place}: the loss is not finite; lower the learning rate (--lr, or encoder.lr)")
    rate, text = log["step"] / log["seconds"], "  ".join(f"{key} {mean:.4f}" for key, mean in means.items())
    print(f"{place}  {text}  {rate:.3g} steps/s  {log['seconds']:.1f} s, "
          f"{(steps - log['step']) / rate:.0f} s left", flush=True)


def save_checkpoint(path, model, optimizer, log):
    """Write all that a killed training needs to resume."""
    if dist.is_initialized() and dist.get_rank():
        return
    state = {"log": log, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "random": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["random_cuda"] = torch.cuda.get_rng_state()
    write_file(make_folder(path.parent) / path.name, lambda f: torch.save(state, f))


def load_checkpoint(path, model, optimizer):
    """Restore what `save_checkpoint` wrote → the log. Raises InputError."""
    saved = read_tensors(path, ("log", "model", "optimizer", "random"))
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    if dist.is_initialized() and dist.get_rank():               # the others keep random draws of their own
        return saved["log"]
    torch.set_rng_state(saved["random"])
    if "random_cuda" in saved:
        torch.cuda.set_rng_state(saved["random_cuda"])
    return saved["log"]


def random_batches(rows, batch_size, per_epoch):
    """Batches of rows (B,) without end: epoch after epoch in new random orders, `per_epoch` in each."""
    generator = torch.Generator().manual_seed(torch.initial_seed())
    while True:
        order = torch.randperm(len(rows), generator=generator).to(rows.device)
        yield from rows[order].split(batch_size)[:per_epoch]


def num_steps(settings, per_epoch):
    """How long a training is: its epochs, at least and at most some steps; or, without epochs, its steps."""
    if not settings["epochs"]:
        return settings["steps"]
    least, most = settings["steps"] or (1, math.inf)
    return min(max(settings["epochs"] * per_epoch, least), most)


def lr_factor(step, steps, per_epoch, settings):
    """The learning rate's factor at a step, from 0: linear warm-up, then half a cosine to 0; or decays."""
    if settings["epochwise"]:
        step = step // per_epoch * per_epoch
    if settings.get("decay_at"):                                # only encoders have it
        return 0.1 ** sum(step >= epoch * per_epoch for epoch in settings["decay_at"])
    warm_up = settings["warm_up"]
    warm_up = min(warm_up if warm_up >= 1 else warm_up * steps, steps // 2)
    if step < warm_up:
        return (step + 1) / (warm_up + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


def make_optimizer(model, settings):
    """The optimiser of a training's settings; "sgd" is Shift-GCN's, with Nesterov's momentum of 0.9."""
    lr, weight_decay = settings["lr"], settings["weight_decay"]
    if settings["optimizer"] == "sgd":
        factors, groups = {"spatial.weight": 10, "spatial.mask": 0}, []         # of the weight decay
        for name, parameter in model.named_parameters():
            factor = factors.get(".".join(name.split(".")[-2:]), 1)
            groups.append({"params": [parameter], "weight_decay": factor * weight_decay})
        return torch.optim.SGD(groups, lr, 0.9, nesterov=True)
    optimizer = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings["optimizer"]]
    return optimizer(model.parameters(), lr, weight_decay=weight_decay, fused=isinstance(model, TDSM))


@contextlib.contextmanager
def seeded(seed, device):
    """Seed what layers draw from (initial weights, dropout), and restore the caller's random state after."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


# --------------------------------------------------------------------------------------- devices, processes
def pick_device(args):
    """The device that was asked for, or cuda if there is one; each process has its own. Raises InputError."""
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    index, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if index >= count:
        raise InputError(f"--device cuda: PyTorch finds {count} CUDA devices; use --device cpu, fewer "
                         f"processes, or a CUDA build of torch")
    torch.cuda.set_device(index)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not args.fp32
    return torch.device("cuda", index)


def precision_of(args):
    """The precision of a run; on CUDA, TDSM and the encoders train in bfloat16."""
    return "bfloat16 and TF32" if args.device.type == "cuda" and not args.fp32 else "float32"


def share_of_process(model, rows, batch_size):
    """The model, training rows and batch size of this process; DVTA compares all pairs of a batch in one."""
    if not dist.is_initialized() or isinstance(model, DVTA):
        return model, rows, batch_size
    rank, count = dist.get_rank(), dist.get_world_size()
    if rows.is_cuda:                                            # it exists only there
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    rows = rows[:len(rows) // count * count][rank::count]
    return DistributedDataParallel(model), rows, max(1, batch_size // count)


# ------------------------------------------------------------------------------------------- the run's folder
def default_folder(args, data):
    """runs/DATASET_SPLIT_METHOD_seedN, and each setting that was given."""
    seeds = f"seed{args.seed}" if args.seeds == 1 else f"seeds{args.seed}-{args.seed + args.seeds - 1}"
    parts = [data.name, data.split, args.method, seeds, *["validate"] * args.validate]
    if (args.encoder, args.encoder_preset) != ("stgcn", "ours"):
        parts.append(f"{args.encoder}-{args.encoder_preset}")
    return Path("runs", re.sub(r"[^A-Za-z0-9_.-]", "-", "_".join(parts + args.set)))


def claim(folders, force):
    """Make a run's folders. Raises InputError where a finished run is, unless it may be overwritten."""
    files = [folder / name for folder in folders for name in ("result.json", "model.pt")]
    for path in files:
        if path.exists() and not force and not (path.parent / UNFINISHED).exists():
            raise InputError(f"{path.parent}: holds a finished run; give --force to overwrite it, or another "
                             f"--out")
    for folder in folders:
        make_folder(folder / UNFINISHED)
    for path in files:
        path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------- the report
def compared(result):
    """The figures of the method and of ridge in a result → {name: zero-shot and generalized ones}."""
    method, ridge = result["zsl"] | (result["gzsl"] or {}), result["ridge"] | (result["ridge"]["gzsl"] or {})
    return {result["method"]: method, "ridge": ridge}


def report(result):
    """Print the figures as a person reads them."""
    zsl, best, names = result["zsl"], result["best_on_test"], result["unseen_classes"]
    kind = "validation" if result["validate"] else "unseen"
    print(f"\nzero-shot accuracy on {zsl['n']} samples of {len(names)} {kind} classes")
    for name, f in compared(result).items():
        label, mark = (name, "   <- the result") if name == result["method"] else ("ridge baseline", "")
        print(f"  {label:<16}{f['acc']:7.1%}   95 % [{f['ci95'][0]:.1%}, {f['ci95'][1]:.1%}]   "
              f"mean per class {f['per_class']:.1%}{mark}")
    print(f"  {'chance':<16}{zsl['chance']:7.1%}")
    if "noise_std" in zsl:
        print(f"  {'other noises':<16}± {zsl['noise_std']:.1%}, standard deviation over ten draws")
    if best:
        print(f"  {'best on test':<16}{best['acc']:7.1%}   epoch {best['epoch']:g}: "
              f"chosen on the test set; not a result")
    for name, f in compared(result).items() if result["gzsl"] else ():
        print(f"  {name:<16}seen {f['seen']:.1%}  unseen {f['unseen']:.1%}  harmonic {f['harmonic']:.1%}"
              f"  AUSUC {f['ausuc']:.3f}   among all classes, γ {f['gamma']:.3f}")
    print("per class")
    for name, counts, acc in zip(names, zsl["confusion"], zsl["class_acc"]):
        likeliest, share = names[np.argmax(counts)], "" if acc is None else f" {acc:7.1%}"
        taken_for = f"   mostly taken for {likeliest}" if share and likeliest != name else ""
        print(f"  {name:<36}{sum(counts):5d} samples{share}{taken_for}")


def report_seeds(results):
    """Results of several seeds → {"METHOD FIGURE": {"mean", "std", "each"}}, printed too."""
    first, last = results[0], results[-1]
    print(f"\n{first['method']}, seeds {first['seed']} to {last['seed']}: mean ± standard deviation, each")
    summary = {}
    for name, figures in compared(first).items():
        for key in [key for key in ("acc", "seen", "unseen", "harmonic", "ausuc") if key in figures]:
            each = [compared(result)[name][key] for result in results]
            mean, std = float(np.mean(each)), float(np.std(each, ddof=1))
            summary[f"{name} {key}"] = {"mean": mean, "std": std, "each": each}
            print(f"  {name} {key:<14} {mean:6.1%} ± {std:.1%}   {'  '.join(f'{v:.1%}' for v in each)}")
    return summary


# ------------------------------------------------------------------------------------------------- prediction
def predict(argv):
    """Name the best of any classes for each new sequence, with a trained run, in predictions.csv."""
    parser = Parser(prog="train.py predict", description="Label sequences with a trained run.")
    add = parser.add_argument
    add("--run", type=Path, required=True, help="the folder of a finished run")
    add("--data", type=Path, required=True,
        help="a folder with skeletons.npy, features.npy or .skeleton files, or one such file")
    add("--classes", type=Path, nargs="+", default=(), metavar="FILE", help="text of other classes")
    add("--out", type=Path, help="default: predictions.csv in the run's folder")
    add("--force", action="store_true", help="overwrite that file")
    add("--allow-lying", action="store_true", help="accept skeletons that do not stand upright")
    add("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
    parser.set_defaults(fp32=False)
    args = parser.parse_args(argv)
    out = args.out or args.run / "predictions.csv"
    if out.is_dir() or out.exists() and not args.force:
        raise InputError(f"{out}: exists already; give another --out, or --force to overwrite a file")
    make_folder(out.parent)
    trained, device = read_tensors(args.run / "model.pt", MODEL_KEYS), pick_device(args)
    names, text = candidates(trained, args.classes)
    samples, features = new_samples(args, trained, device)              # N names, (N, F)
    model = rebuild(trained["method"], text, trained["settings"], trained["state"]).to(device)
    scores = model.scores(features, torch.arange(len(names), device=device))    # (N, K)
    top, order = scores.topk(min(5, len(names)))                        # (N, up to 5) each
    rows = [("sample", "class", "score", "margin", "top5")]
    for sample, best, ids in zip(samples, top.tolist(), order.tolist()):
        margin = f"{best[0] - best[1]:.6g}" if len(best) > 1 else ""
        rows.append((sample, names[ids[0]], f"{best[0]:.6g}", margin, " | ".join(names[k] for k in ids)))
    write_table(out, rows)
    print(f"{trained['method']}: {len(samples)} sequences among {len(names)} classes")
    for sample, name, _, margin, _ in rows[1:11]:
        print(f"  {sample:<24}  {name:<36}  margin {margin}")
    print(f"written: {out}")


def candidates(trained, files):
    """Names and text of the K classes to choose from, the run's or those of the files. Raises InputError."""
    if not files:
        return trained["classes"], trained["text"]
    theirs, text = trained["text"], [torch.tensor(read_text(path)) for path in files]
    names_file, K = files[0].with_suffix(".txt"), len(text[0])
    names = read_lines(names_file) if names_file.exists() else [f"class {k}" for k in range(K)]
    if len(names) != K:
        raise InputError(f"{names_file}: names {len(names)} classes, {files[0]} has {K}; give one line each")
    D, rows = theirs[0].shape[2], max(2, *(t.shape[1] for t in theirs))
    fits = [t.shape[::2] == (K, D) and t.shape[1] <= rows for t in text]
    if len(text) not in (1, len(theirs)) or not all(fits):
        raise InputError(f"{files[0]}: shape is {tuple(text[0].shape)}, of {len(text)} files; the run needs "
                         f"1 or {len(theirs)} of shape ({K}, up to {rows}, {D}), embedded with its model")
    return names, text * (len(theirs) // len(text))             # one file serves all prompts


def new_samples(args, trained, device):
    """The new samples' N names and features (N, F). Raises InputError."""
    encoder, width = trained["encoder"], len(trained["state"]["x_mean"])
    T, V, M = encoder.get("shape", (64, 0, 0))                  # a run on ready features has none
    names, x = read_sequences(args.data, T)
    has = f"features of width {x.shape[1]}" if x.ndim == 2 else f"skeletons of {x.shape[3]} joints"
    accepted = [f"features of width {width}"] + [f"skeletons of {V} joints"] * (V > 0)
    if has not in accepted:
        raise InputError(f"{args.data}: has {has}; this run takes {' or '.join(accepted)}")
    if x.ndim == 2:
        return names, torch.tensor(x, dtype=torch.float32, device=device)
    graph, state = JointGraph(*encoder["graph"]), encoder["state"]
    for line in check_bodies(args.data, x, graph, args.allow_lying)[1]:
        note(line)
    model = build_encoder(encoder["name"], graph, M, len(state["classifier.bias"])).to(device).eval()
    model.load_state_dict(state)
    absent, features = max(0, M - x.shape[4]), []               # as many persons as in training
    for _, part in pieces(x, 32):
        part = np.pad(part, [(0, 0)] * 4 + [(0, absent)])[..., :M]
        part = torch.from_numpy(to_common_frame(part, graph, encoder["frame"]))
        features.append(encode_all(model, part.to(device)))
    return names, torch.cat(features)


# ------------------------------------------------------------------------------------------- the command line
def run_arguments(argv):
    """Read the command line of a run. Raises InputError on a wrong one."""
    parser = Parser(prog="train.py", allow_abbrev=False,
                    description="Train and test a zero-shot method. To label: train.py predict --help")
    add, task = parser.add_argument, parser.add_mutually_exclusive_group()
    length = parser.add_mutually_exclusive_group()
    add("--list", action="store_true", help="show the published splits")
    add("--method", choices=["dvta", "tdsm", "ridge"])
    add("--split", help="55_5, 48_12, ... or a name in the folder's splits.json")
    add("--data", default="synthetic", help="a dataset folder or published arrays (default: synthetic set)")
    add("--text", type=Path, nargs="+", default=(), metavar="FILE", help="text features, a file a prompt")
    task.add_argument("--gzsl", action="store_true", help="also generalized figures, γ from a validation run")
    task.add_argument("--validate", action="store_true", help="test on the validation classes")
    add("--val-data", type=Path, metavar="FOLDER", help="validation folder published beside ready features")
    add("--allow-lying", action="store_true", help="accept skeletons that do not stand upright")
    add("--out", type=Path, help="folder for results (default: runs/DATASET_SPLIT_METHOD_seedN...)")
    add("--force", action="store_true", help="overwrite the finished run in the folder")
    add("--seed", type=int, default=0)
    add("--seeds", type=int, choices=range(1, 11), metavar="1..10", default=1, help="from --seed on")
    add("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
    add("--fp32", action="store_true", help="on CUDA: no bfloat16, no TF32, no torch.compile")
    add("--encoder", choices=["stgcn", "shiftgcn"], default="stgcn", help="default: stgcn")
    add("--encoder-preset", choices=["ours", "published"], default="ours", help="default: ours")
    add("--encoder-epochs", type=int)
    length.add_argument("--epochs", type=int, help="length of the method's training")
    length.add_argument("--steps", type=int, help="in place of epochs")
    add("--batch-size", type=int, help="of the method's training")
    add("--lr", type=float, help="learning rate of the method's training")
    add("--set", nargs="+", default=[], action="extend", metavar="NAME=VALUE",
        help="other settings in the method's preset, or in the encoder's: encoder.NAME=VALUE")
    args = parser.parse_args(argv)
    if not args.list and not (args.method and args.split):
        parser.error("--method and --split are needed")
    if args.val_data and not (args.gzsl or args.validate):
        parser.error("--val-data is for --gzsl or --validate; give one of them")
    flags = {"epochs": args.epochs, "steps": args.steps, "batch_size": args.batch_size, "lr": args.lr,
             "encoder.epochs": args.encoder_epochs}
    args.set = [f"{name}={value}" for name, value in flags.items() if value is not None] + args.set
    args.command = "python train.py " + shlex.join(argv)
    return args


def choose_settings(args, preset):
    """The preset, changed by the command line → {"encoder": {...}, "ridge": {...}, METHOD: {...}}."""
    encoder = PRESETS[preset]["encoder"] | {"name": args.encoder}
    if args.encoder_preset == "published":
        encoder = PUBLISHED_ENCODERS[args.encoder]
    settings = copy.deepcopy({"encoder": encoder, "ridge": RIDGE, args.method: PRESETS[preset][args.method]})
    for assignment in args.set:
        name, _, text = assignment.partition("=")
        key = name.removeprefix("encoder.")
        part = settings[args.method if key == name else "encoder"]
        model = part.get("model", {})
        table = model if key in model else part
        if key == "model" or key not in table:
            known = ", ".join(sorted({*part, *model} - {"model"}))
            raise InputError(f"{name}: is not a setting; choose one of: {known}")
        if key in ("epochs", "steps"):                          # the other of the two no longer counts
            table |= {"epochs": None, "steps": None, key: 1}
        table[key] = parsed_setting(name, text, table[key])
    if args.method == "tdsm":
        model = settings["tdsm"]["model"]
        model["fp32"] = args.fp32
        width, heads = model["width"], model["heads"]
        if width % heads:
            raise InputError(f"width={width}: is not a multiple of heads={heads}; change one")
    return settings


def parsed_setting(name, text, default):
    """The value in NAME=TEXT, of the type of the setting's default. Raises InputError."""
    key = name.removeprefix("encoder.")
    try:
        value = json.loads(text, parse_int=float if type(default) is float else int)
    except ValueError:
        value = text
    if key in CHOICES:
        fits, must = value in CHOICES[key], f"one of {', '.join(map(json.dumps, CHOICES[key]))}"
    elif type(default) is list:
        fits, must = type(value) is list and all(type(v) is int for v in value), "a list of whole numbers"
    else:
        least, must = int(type(default) is int), f"like {json.dumps(default)}"
        fits = type(value) is type(default) and least <= value < math.inf
    if not fits:
        raise InputError(f"{name}={text}: does not fit; it must be {must}")
    return value


if __name__ == "__main__":
    main()
