"""Train and test a zero-shot method, from data to figures; then label new sequences.

    python train.py --method dvta --split 55_5                           the embedded synthetic set
    python train.py --method tdsm --split 22_6_a --data path/to/folder   your data (README, "Your data")
    python train.py predict --run runs/... --data path/to/folder         labels, among any classes
    torchrun --nproc-per-node=8 train.py --method tdsm --split 55_5 --seeds 8        a seed on each of 8 GPUs

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
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import zsar
from alignment import DVTA
from data import (SYNTHETIC_NOTE, InputError, Parser, check_bodies, command_line, fingerprint, list_splits,
                  make_folder, note, pieces, read_data, read_lines, read_sequences, read_tensors, read_text,
                  read_validation, reading, reason, validation_of, write_features, write_file, write_json,
                  write_table)
from diffusion import STEPS, TDSM
from zsar import (FEATURES, FRAMES, STGCN, JointGraph, Ridge, ShiftGCN, augmented,
                  recalibrate_batch_norm, to_common_frame)

# ---------------------------------------------------------------------------------------------------- presets
# For NTU and PKU: the published settings of DVTA and TDSM. For other, smaller data, and for every encoder:
# chosen on validation classes, never on unseen ones (docs/notes.md).
# A training takes its "epochs", but at least "min_steps" and at most "max_steps".
# "warm_up": a share of the steps, or a number; then the rate falls as a cosine to 0, or by ten at epochs
# "decay_at". "epochwise": set the rate once an epoch; "keep_last": train on an epoch's last, smaller batch.
# "fused": PyTorch's fused optimiser on a CPU too. What the method itself is built with stands under "model".
ENCODER = {"name": "stgcn", "frame": "first", "epochs": 30, "min_steps": 1, "max_steps": None,
           "batch_size": 16, "optimizer": "adamw", "fused": False, "lr": 3e-3, "weight_decay": 0.01,
           "warm_up": 0.15, "decay_at": [], "epochwise": False, "keep_last": False,
           "augment": True, "label_smoothing": 0.1,
           "all_classes": False}        # an output for each class of the dataset, not for the seen ones only
PUBLISHED_ENCODERS = {  # ST-GCN as in SMIE, whose features DVTA used; and Shift-GCN's own
    "stgcn": ENCODER | {"frame": "smie", "epochs": 150, "batch_size": 128, "optimizer": "adam", "lr": 5e-3,
                        "weight_decay": 0.0, "warm_up": 0.0, "epochwise": True, "keep_last": True,
                        "augment": False, "label_smoothing": 0.0, "all_classes": True},
    "shiftgcn": ENCODER | {"name": "shiftgcn", "frame": "shiftgcn", "epochs": 140, "batch_size": 64,
                           "optimizer": "sgd", "lr": 0.1, "weight_decay": 1e-4, "warm_up": 0.0,
                           "decay_at": [60, 80, 100], "augment": False, "label_smoothing": 0.0},
}
RIDGE = {"model": {"penalty": 1000.0}}          # solved in closed form, without a training loop
DVTA_PAPER = {"epochs": 100, "min_steps": 1, "max_steps": None, "batch_size": 128, "optimizer": "adamw",
              "fused": False, "lr": 1e-6, "weight_decay": 0.0, "warm_up": 0.15, "decay_at": [],
              "epochwise": True, "keep_last": True,
              "model": {"sde": True, "only": None, "standardise": False, "centre": False}}
DVTA_SMALL = DVTA_PAPER | {"epochs": 7, "min_steps": 150, "max_steps": 1000, "batch_size": 64, "lr": 1e-4,
                           "epochwise": False, "keep_last": False,
                           "model": DVTA_PAPER["model"] | {"standardise": True, "centre": True}}
TDSM_PAPER = {"epochs": 0, "min_steps": 50_000, "max_steps": 50_000, "batch_size": 256, "optimizer": "adamw",
              "fused": True, "lr": 1e-4, "weight_decay": 0.01, "warm_up": 100.0, "decay_at": [],
              "epochwise": False, "keep_last": False,
              "model": {"width": 768, "depth": 12, "heads": 12, "triplet_weight": 1.0, "margin": 1.0,
                        "prediction": "epsilon", "noises": 3, "timestep": 25, "conditions": "both",
                        "standardise": False, "scale": 1.0, "unit_text": True, "centre": False,
                        "num_tokens": 0}}       # raised to the number of tokens that the text has
TDSM_SMALL = TDSM_PAPER | {"epochs": 18, "min_steps": 500, "max_steps": 4000, "batch_size": 64, "lr": 1e-3,
                           "weight_decay": 3.0, "warm_up": 0.15,
                           "model": TDSM_PAPER["model"] | {
                               "width": 128, "depth": 2, "heads": 2, "prediction": "sample", "noises": 10,
                               "conditions": "pooled", "standardise": True, "scale": 0.25, "centre": True}}
PAPER = {"encoder": ENCODER, "ridge": RIDGE, "dvta": DVTA_PAPER, "tdsm": TDSM_PAPER}
SMALL = PAPER | {"dvta": DVTA_SMALL, "tdsm": TDSM_SMALL}
PRESETS = {
    "ntu60": PAPER,
    "ntu120": PAPER | {"dvta": DVTA_PAPER | {"lr": 5e-6}},
    "pku51": PAPER | {"dvta": DVTA_PAPER | {"lr": 1e-5}},
    "synthetic": SMALL | {"encoder": ENCODER | {"epochs": 9, "augment": False, "label_smoothing": 0.0}},
    "other": SMALL,
}
METHODS = {"dvta": DVTA, "tdsm": TDSM, "ridge": Ridge}
CHOICES = {"name": ("stgcn", "shiftgcn"), "frame": FRAMES, "optimizer": ("adam", "adamw", "sgd"),
           "only": (None, "da", "aa"), "prediction": ("epsilon", "sample", "v_prediction"),
           "conditions": ("both", "pooled", "tokens"), "timestep": range(STEPS)}
MODEL_KEYS = ("method", "settings", "fast", "width", "state", "classes", "seen", "unseen", "gamma", "text",
              "encoder")        # of model.pt
CHECKPOINT_SECONDS, CHECKPOINT_SHARE = 60, 0.05      # at least so long apart, at most that share of the time
UNFINISHED = "unfinished_run"   # a folder in each of a run's own until it is finished, with the checkpoints
VALIDATION_NOTE = "γ or settings are chosen on classes that these features' encoder has seen; use --val-data"


# --------------------------------------------------------------------------------------- options and settings
def run_arguments(argv):
    """Read the command line of a run. Raises InputError on a wrong one."""
    parser = Parser(prog="train.py", allow_abbrev=False,
                    description="Train and test a zero-shot method. To label: train.py predict --help")
    add, task = parser.add_argument, parser.add_mutually_exclusive_group()
    length = parser.add_mutually_exclusive_group()
    add("--list", action="store_true", help="show the published splits, or with --data those of a folder")
    add("--method", choices=METHODS)
    add("--split", help="55_5, 48_12, ... or a name in the folder's splits.json")
    add("--data", default="synthetic", help="a dataset folder or published arrays (default: synthetic set)")
    add("--text", type=Path, nargs="+", default=(), metavar="FILE", help="text features, a file a prompt")
    task.add_argument("--gzsl", action="store_true", help="also generalized figures, γ from a validation run")
    task.add_argument("--validate", action="store_true", help="test on the validation classes")
    add("--val-data", type=Path, metavar="FOLDER", help="validation folder published beside ready features")
    add("--allow-lying", action="store_true", help="accept skeletons that do not stand upright")
    add("--out", type=Path, help="folder for results (default: runs/DATASET_SPLIT_METHOD_seedN...)")
    add("--export", type=Path, metavar="FOLDER",
        help="also write the encoder's features as published codes read them; with --gzsl or --validate "
             "FOLDER_val, too, of an encoder that has not seen the validation classes")
    add("--force", action="store_true", help="overwrite a finished run, and exported features")
    add("--seed", type=int, default=0)
    add("--seeds", type=int, choices=range(1, 101), metavar="1..100", default=1,
        help="how many, from --seed on; torchrun's processes share them")
    add("--device", choices=["cuda", "cpu"], help="default: cuda if available")
    add("--fp32", action="store_true", help="on CUDA: no bfloat16, no TF32, no torch.compile")
    add("--encoder", choices=CHOICES["name"], default="stgcn", help="default: stgcn")
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
    if args.export and args.seeds > 1:
        parser.error("--export is for one seed; leave out --seeds")
    if args.val_data and not (args.gzsl or args.validate):
        parser.error("--val-data is for --gzsl or --validate; give one of them")
    flags = {"epochs": args.epochs, "steps": args.steps, "batch_size": args.batch_size, "lr": args.lr,
             "encoder.epochs": args.encoder_epochs}
    args.set = [f"{name}={value}" for name, value in flags.items() if value is not None] + args.set
    args.command = "python train.py " + shlex.join(argv)
    return args


def choose_settings(args, data):
    """The preset, changed by the command line → {"encoder": {...}, "ridge": {...}, METHOD: {...}}."""
    preset = PRESETS[data.preset]
    encoder = preset["encoder"] | {"name": args.encoder}
    if args.encoder_preset == "published":
        encoder = PUBLISHED_ENCODERS[args.encoder]
    settings = copy.deepcopy({"encoder": encoder, "ridge": RIDGE, args.method: preset[args.method]})
    for assignment in args.set:
        name, _, text = assignment.partition("=")
        part = settings["encoder" if name.startswith("encoder.") else args.method]
        change_setting(part, name, text)
    model = settings[args.method]["model"]
    if "heads" in model and model["width"] % model["heads"]:
        raise InputError(f"width={model['width']}: is not a multiple of heads={model['heads']}; change one")
    if "num_tokens" in model:
        model["num_tokens"] = max(model["num_tokens"], *(text.shape[1] - 1 for text in data.text))
    return settings


def change_setting(part, name, text):
    """Set NAME=TEXT in a part of the settings. Raises InputError."""
    key, model = name.removeprefix("encoder."), part.get("model", {})
    if key == "epochs" and key in part:                         # nothing else bounds the training then
        part |= {key: parsed_setting(name, text, 1), "min_steps": 1, "max_steps": None}
    elif key == "steps" and "epochs" in part:                   # short for all three
        steps = parsed_setting(name, text, 1)
        part |= {"epochs": 0, "min_steps": steps, "max_steps": steps}
    elif key in model:
        model[key] = parsed_setting(name, text, model[key])
    elif key in part and key != "model":
        part[key] = parsed_setting(name, text, part[key])
    else:
        known = ", ".join(sorted({*part, *model} - {"model"}))
        raise InputError(f"{name}: is not a setting; choose one of: {known}")


def parsed_setting(name, text, default):
    """The value in NAME=TEXT, of the type of the setting's default. Raises InputError."""
    key, default = name.removeprefix("encoder."), 1 if default is None else default
    try:
        value = json.loads(text, parse_int=float if type(default) is float else int)
    except ValueError:
        value = text
    if key in CHOICES:
        is_valid, form = value in CHOICES[key], f"one of {', '.join(map(json.dumps, CHOICES[key]))}"
    elif type(default) is list:
        is_valid, form = type(value) is list and all(type(v) is int for v in value), "a list of whole numbers"
    else:
        least, form = int(type(default) is int), f"a value like {json.dumps(default)}"
        is_valid = type(value) is type(default) and least <= value < math.inf
    if not is_valid:
        raise InputError(f"{name}={text}: is invalid; use {form}")
    return value


@dataclass(frozen=True)
class Run:
    """What one training is told."""
    command: str
    method: str               # a key of METHODS
    settings: dict            # {"encoder": {...}, "ridge": {...}, METHOD: {...}}
    seed: int
    validate: bool            # whether the unseen classes are validation classes
    device: torch.device
    fast: bool                # on CUDA: bfloat16, TF32 and torch.compile
    folder: Path              # of its results
    encoders: Path            # the folder of trained encoders that runs share
    code: dict                # {"encoder" or METHOD: the code that its training reaches}

    @property
    def unfinished(self):
        """The folder of checkpoints, in the run's own until it is finished."""
        return self.folder / UNFINISHED

    @property
    def precision(self):
        """The precision of the run, to print."""
        return "bfloat16 and TF32" if self.fast else "float32"


# ------------------------------------------------------------------------------------ one run from end to end
def main(argv=None):
    """The command line: train and test, or `predict`."""
    argv = sys.argv[1:] if argv is None else argv
    command_line(lambda: predict(argv[1:]) if argv[:1] == ["predict"] else run_seeds(run_arguments(argv)))


def run_seeds(args):
    """An experiment for each seed, and their mean. The processes of torchrun share out the seeds.

    Each is bit for bit that of one process, on a CPU with as many threads: torchrun sets OMP_NUM_THREADS=1.
    """
    if args.list:
        folder = None if args.data == "synthetic" else Path(args.data)
        return print("\n".join(list_splits(folder)))
    rank, count = 0, 1
    if "TORCHELASTIC_RUN_ID" in os.environ:                     # torchrun started several processes
        rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device, errors = pick_device(args.device, args.fp32), sys.stderr
    if rank:                                                    # the first process speaks for all
        sys.stdout = sys.stderr = open(os.devnull, "w")
    if count > args.seeds:
        raise InputError(f"--seeds {args.seeds}: there are {count} processes; give a seed to each, or start "
                         f"fewer")
    runs, data, val = make_runs(args, device)
    out = runs[0].folder.parent if len(runs) > 1 else runs[0].folder
    folders, exports = {out, *(run.folder for run in runs)}, export_folders(args, data, val)
    tested, chosen_on = (val, None) if args.validate else (data, val)
    with contextlib.nullcontext() if rank else claimed(out, folders, args.force):
        sys.stderr = errors
        if count > 1:
            dist.init_process_group("gloo", timeout=timedelta(days=30))
            dist.barrier()                                      # train only when all folders are claimed
        results = [experiment(run, tested, chosen_on) for run in runs[rank::count]]
        if count > 1:
            shares = [None] * count
            dist.all_gather_object(shares, results)
            results = sorted(itertools.chain(*shares), key=lambda result: result["seed"])
        if rank:
            return
        if len(runs) > 1:
            write_json(out / "result.json", {"command": args.command, "note": results[0]["note"],
                                             "summary": report_seeds(results), "seeds": results})
        for folder, part in exports.items():
            export(runs[0], part, folder, args.force)
    print(f"written: {out / 'result.json'}")
    if results[0]["note"]:
        print(results[0]["note"])


def make_runs(args, device):
    """A Run for each seed, the Data, and that of the validation classes, or None."""
    # read at start, in case a file is edited later
    code = code_reached({"encoder": ["train_encoder"],
                         args.method: ["train_method", METHODS[args.method].__name__]})
    data, val = read_inputs(args)
    out = args.out or default_folder(args, data)
    first = Run(args.command, args.method, choose_settings(args, data), args.seed, args.validate, device,
                fast=device.type == "cuda" and not args.fp32, folder=out, encoders=out.parent / "encoders",
                code=code)
    if args.seeds == 1:
        return [first], data, val
    seeds = range(args.seed, args.seed + args.seeds)
    return [replace(first, seed=seed, folder=out / f"seed{seed}") for seed in seeds], data, val


def read_inputs(args):
    """The Data, and that of the validation classes where they are tested or choose γ, or None."""
    data = read_data(args.data, args.split, args.text, args.allow_lying)
    val = None
    if args.gzsl or args.validate:
        val = read_validation(data, args.val_data) if args.val_data else validation_of(data)
    notes = data.notes
    if val and data.skeletons is None and not args.val_data:
        notes = [*notes, VALIDATION_NOTE]
    if "sde" in PRESETS[data.preset][args.method]["model"] and len(data.text) == 1:
        notes = [*notes, "the text has one prompt a class, so the SDE has nothing to mix"]
    for line in notes:
        note(line)
    for path, part in ((args.data, data), (args.val_data, val)):
        if args.gzsl and not len(part.seen_test):
            raise InputError(f"{path}: has no seen test samples, which --gzsl needs; leave it out")
    return replace(data, notes=notes), replace(val, notes=notes) if val else None


def experiment(run, data, val):
    """The protocol for one seed, from data to figures, into the run's folder → what result.json holds."""
    warning, started = SYNTHETIC_NOTE if data.source == "synthetic set" else None, time.perf_counter()
    if warning:
        print(warning)
    print(introduction(run, data, "validation" if run.validate else "unseen"))
    features, encoder = encode(run, data)
    seconds = time.perf_counter() - started
    models, log = train_methods(run, data, features, watch=not run.validate)
    gammas = choose_gammas(run, val) if val else {}
    figures = {name: unseen_figures(model, features, data) for name, model in models.items()}
    for name, gamma in gammas.items():
        figures[name] |= zsar.gzsl_figures(*among_all_classes(models[name], features, data), gamma)
    if "noises" in run.settings[run.method]["model"]:
        figures[run.method]["noise_std"] = noise_spread(models[run.method], features, data)
    result = {
        "command": run.command, "method": run.method, "dataset": data.name, "source": data.source,
        "split": data.split, "seed": run.seed, "validate": run.validate, "settings": run.settings,
        "note": warning, "notes": data.notes,
        "unseen": data.unseen.tolist(), "unseen_classes": [data.classes[c] for c in data.unseen],
        "samples": {part: len(getattr(data, part)) for part in ("train", "seen_test", "unseen_test")},
        "data_sha256": fingerprint(data.sha256, *data.text, data.train, data.seen_test, data.unseen_test),
        "device": str(run.device), "precision": run.precision,
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__},
        "figures": figures, "best_on_test": log["best"], "history": log["history"],
        "encoder": {key: encoder[key] for key in ("seen_test_acc", "cached", "file")},
        "seconds": {"encoder": seconds, "train": log["seconds"]},
    }
    trained = {"method": run.method, "settings": run.settings[run.method], "fast": run.fast,
               "width": features.shape[1], "state": models[run.method].state_dict(), "classes": data.classes,
               "seen": data.seen.tolist(), "unseen": data.unseen.tolist(), "gamma": gammas.get(run.method),
               "text": [torch.as_tensor(t) for t in data.text], "encoder": encoder}
    write_file(run.folder / "model.pt", lambda f: torch.save(trained, f))   # all that `predict` needs
    report(result)
    write_json(run.folder / "result.json", result)
    return result


def export_folders(args, data, val):
    """The folders to export features to → {folder: the Data of its encoder}. Raises InputError."""
    if not args.export:
        return {}
    if data.skeletons is None:
        raise InputError(f"{args.data}: has features already; --export needs skeletons")
    if len(data.text) > 2:
        raise InputError(f"--export: the text has {len(data.text)} prompts a class; give one or two")
    folders = {args.export: data} | ({args.export.with_name(f"{args.export.name}_val"): val} if val else {})
    for folder in folders:
        if folder.exists() and not args.force:
            raise InputError(f"{folder}: exists already; give another --export, or --force to overwrite it")
    return folders


def export(run, data, folder, force):
    """Write the features of the run's encoder for all samples, in the form of published features."""
    features, encoder = encode(run, data)
    accuracy = encoder["seen_test_acc"]
    about = [SYNTHETIC_NOTE] * (data.source == "synthetic set") + [
        f"dataset: {data.name}, split {data.split}, unseen classes {data.unseen.tolist()}",
        f"seen classes: {data.seen.tolist()}",
        f"encoder: seed {run.seed}" + ("" if accuracy is None else f", {accuracy:.1%} on seen test samples"),
        f"settings: {json.dumps(run.settings['encoder'])}",
        f"command: {run.command}"]
    write_features(folder, data, features.cpu().numpy(), about, force)
    print(f"written: {folder}")


def introduction(run, data, kind):
    """One line that describes the run, whose unseen classes are of a kind: "unseen" or "validation"."""
    return (f"{run.method} on {data.name} ({data.source}), split {data.split}: "
            f"{len(data.seen)} seen and {len(data.unseen)} {kind} classes; "
            f"samples: {len(data.train)} training, {len(data.seen_test)} seen test, "
            f"{len(data.unseen_test)} {kind} test; seed {run.seed}; {run.device}, {run.precision}")


# ---------------------------------------------------------------------------------------------------- encoder
def encode(run, data):
    """Features (N, 256) of every sample, from an encoder that is trained or cached → also a dict on it."""
    if data.skeletons is None:
        features = torch.as_tensor(data.features, dtype=torch.float32, device=run.device)
        return features, {"state": None, "seen_test_acc": None, "cached": False, "file": None}
    key = fingerprint([run.settings["encoder"], run.seed, run.device.type, run.precision, torch.__version__,
                       run.code["encoder"], data.sha256, data.graph], data.seen, data.train)[:16]
    path = run.encoders / f"{key}.pt"
    cached = path.exists()
    if cached:
        print(f"encoder: from {path}")
        encoder = read_tensors(path, ("state", "features", "seen_test_acc"))
    else:
        encoder = train_encoder(run, data, run.unfinished / f"encoder-{key}.pt")
        write_file(make_folder(path.parent) / path.name, lambda f: torch.save(encoder, f))
    if len(data.seen_test):
        print(f"encoder: {encoder['seen_test_acc']:.1%} on seen test samples, {len(data.seen)} classes")
    return encoder.pop("features").to(run.device), encoder | {"cached": cached, "file": str(path)}


def code_reached(entries):
    """The code that trainings reach, {training: names of functions and classes} → {training: {name: code}}.

    Code is a syntax tree as text, without comments and docstrings.
    """
    nodes, code = {}, {training: {} for training in entries}    # nodes: {name: what the files define by it}
    modules = dict.fromkeys([__name__, *(kind.__module__ for kind in METHODS.values())])
    for path in (Path(sys.modules[name].__file__) for name in modules):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            name = ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else getattr(node, "name", "")
            nodes.setdefault(name, ast.Module([], [])).body.append(node)
    for node in itertools.chain(*map(ast.walk, nodes.values())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            node.body[:1] = []
    for training, names in entries.items():
        for name in (names := [*names]):                        # grows with the names that the code uses
            if name in nodes and name not in code[training]:
                names += [node.id for node in ast.walk(nodes[name]) if isinstance(node, ast.Name)]
                code[training][name] = ast.dump(nodes[name])
    return code


def train_encoder(run, data, checkpoint):
    """Train an encoder on the training samples, encode all → all that the cache and `predict` need of it."""
    settings = run.settings["encoder"]
    x = torch.empty(data.skeletons.shape, device=run.device)    # (N, 3, T, V, M)
    for first, rows in pieces(data.skeletons):
        x[first:first + len(rows)] = torch.from_numpy(to_common_frame(rows, data.graph, settings["frame"]))
    classes = np.arange(len(data.classes)) if settings["all_classes"] else data.seen
    y = torch.as_tensor(np.searchsorted(classes, data.labels), device=x.device)         # (N,) output numbers
    seen = torch.as_tensor(np.searchsorted(classes, data.seen), device=x.device)        # (S,) output numbers
    rows = torch.as_tensor(data.train, device=x.device)         # (n,)
    with seeded(run.seed, x.device):
        encoder = build_encoder(settings["name"], data.graph, x.shape[4], len(classes)).to(x.device)
        if settings["all_classes"]:                             # as SMIE initialises it
            nn.init.xavier_normal_(encoder.classifier.weight)
            nn.init.zeros_(encoder.classifier.bias)
        fit(EncoderTraining(encoder, settings, run.fast), (x, y), rows, settings, checkpoint)
    recalibrate_batch_norm(encoder, x, rows)
    features = encode_all(encoder, x)
    with torch.no_grad():
        predicted = encoder.classifier(features[data.seen_test])[:, seen].argmax(1)
    hits = (seen[predicted] == y[data.seen_test]).float()
    return {"name": settings["name"], "frame": settings["frame"], "graph": tuple(data.graph),
            "shape": list(x.shape[2:]), "state": encoder.state_dict(), "features": features,
            "seen_test_acc": float(hits.mean()) if len(hits) else None}


class EncoderTraining(nn.Module):
    """An encoder's cross-entropy, called like a method's; `fast`: in bfloat16 and compiled, on CUDA."""

    def __init__(self, encoder, settings, fast):
        super().__init__()
        self.encoder, self.settings, self.classify = encoder, settings, encoder.classify
        if fast:
            self.classify = in_bfloat16(compiled(encoder.classify))

    def forward(self, x, y):                                    # (B, 3, T, V, M), (B,)
        if self.settings["augment"]:
            x = augmented(x)
        logits = self.classify(x).float()                       # (B, classes)
        return F.cross_entropy(logits, y, label_smoothing=self.settings["label_smoothing"]), {}


def in_bfloat16(function):
    """The function with its matrix products in bfloat16, on CUDA."""
    return torch.autocast("cuda", torch.bfloat16)(function)


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
                is_missing = re.search("triton|compile", str(e), re.I)
                if isinstance(e, torch.cuda.OutOfMemoryError) or not is_missing:
                    raise
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
def build(kind, text, feature_width, settings, fast):
    """A method's model, of a class in METHODS, on the text of all classes; `fast`: as on the `Run`."""
    model = kind(text, feature_width, **settings)
    if fast and kind.COMPILED:
        setattr(model, kind.COMPILED, compiled(getattr(model, kind.COMPILED)))
        model.forward, model.scores = in_bfloat16(model.forward), in_bfloat16(model.scores)
    return model


def train_methods(run, data, features, watch=False):
    """Train the run's method and ridge → {name: model}, and the method's log; watch: test during training."""
    text = [torch.as_tensor(t, device=run.device) for t in data.text]
    y = torch.as_tensor(data.labels, device=run.device)         # (N,)
    samples, models, logs = (features[data.train], y[data.train]), {}, {}       # x (n, F), y (n,)
    for name in dict.fromkeys((run.method, "ridge")):
        test = (lambda model: unseen_figures(model, features, data)["acc"]) if watch else None
        models[name], logs[name] = train_method(run, name, METHODS[name], text, samples, test)
    return models, logs[run.method]


def train_method(run, name, kind, text, samples, test):
    """Train a method of a class in METHODS on samples x (n, F), y (n,) → the model, the log of `fit`."""
    settings, (x, y) = run.settings[name], samples
    with seeded(run.seed, run.device):
        model = build(kind, text, x.shape[1], settings["model"], run.fast).to(run.device)
        model.fit_statistics(x, y.unique())
        if "epochs" not in settings:                            # it is solved in closed form
            model.fit(x, y)
            return model, {"seconds": 0.0, "best": None, "history": []}
        arrays = [tensor.cpu().numpy() for tensor in (x, y, *text)]
        key = fingerprint([settings, run.seed, run.precision, run.code[name]], *arrays)[:16]
        rows, checkpoint = torch.arange(len(y), device=y.device), run.unfinished / f"{name}-{key}.pt"
        return model, fit(model, samples, rows, settings, checkpoint, test)


def choose_gammas(run, val):
    """The validation run, on its Data → {name: the γ with the highest harmonic mean there}."""
    print(f"validation run, to choose γ: {introduction(run, val, 'validation')}")
    features, _ = encode(run, val)
    models, _ = train_methods(run, val, features)
    return {name: zsar.best_gamma(*among_all_classes(model, features, val)) for name, model in models.items()}


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
    epoch, or each 20th of a limited number of steps, it prints a line, and test(model) gives an accuracy.
    """
    name, (x, y) = checkpoint.name.partition("-")[0], samples
    batch_size = min(settings["batch_size"], len(rows))
    per_epoch = (len(rows) + settings["keep_last"] * (batch_size - 1)) // batch_size
    steps = num_steps(settings, per_epoch)
    report_every = max(1, steps // 20) if settings["max_steps"] else per_epoch
    optimizer = make_optimizer(model, settings)
    step, seconds, best, history, sums = 0, 0.0, None, [], torch.zeros(())
    if checkpoint.exists():
        step, seconds, best, history, sums = load_checkpoint(checkpoint, model, optimizer)
        print(f"{name}: resuming at step {step} of {steps}, from {checkpoint}", flush=True)
    started, due = time.perf_counter() - seconds, time.perf_counter() + CHECKPOINT_SECONDS
    sums = sums.to(y.device)
    model.train()
    for batch in itertools.islice(random_batches(rows, batch_size, per_epoch), step, steps):
        for group in optimizer.param_groups:
            group["lr"] = settings["lr"] * lr_factor(step, steps, per_epoch, settings)
        loss, parts = model(x[batch], y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step, parts = step + 1, {"loss": loss.detach(), **parts}
        sums = sums + torch.stack(list(parts.values()))
        if step % report_every == 0 or step == steps:
            sums /= (step - 1) % report_every + 1
            means, epoch = dict(zip(parts, sums.tolist())), step / per_epoch           # waits for the device
            sums, seconds = torch.zeros_like(sums), time.perf_counter() - started
            print_progress(f"{name} step {step}/{steps}, epoch {epoch:.3g}", means, step, steps, seconds)
            acc = test(model) if test else None
            history.append({"epoch": epoch, "loss": means["loss"], "acc_on_test": acc})
            if test and (best is None or acc > best["acc"]):
                best = {"acc": acc, "epoch": epoch}
        if step == steps or time.perf_counter() > due:
            begun = time.perf_counter()
            save_checkpoint(checkpoint, model, optimizer, (step, begun - started, best, history, sums))
            ended = time.perf_counter()
            due = ended + max(CHECKPOINT_SECONDS, (ended - begun) / CHECKPOINT_SHARE)
    model.eval()
    return {"seconds": seconds, "best": best, "history": history}


def print_progress(place, means, step, steps, seconds):
    """One line on a training: where it is, its mean losses, its speed. Raises InputError if it diverged."""
    if not math.isfinite(means["loss"]):
        raise InputError(f"{place}: the loss is not finite; lower the learning rate (--lr, or encoder.lr)")
    rate, left = step / seconds, (steps - step) * seconds / step
    losses = "  ".join(f"{key} {mean:.4f}" for key, mean in means.items())
    print(f"{place}  {losses}  {rate:.3g} steps/s  {seconds:.1f} s, {left:.0f} s left", flush=True)


def save_checkpoint(path, model, optimizer, progress):
    """Write all that a killed training needs to resume; progress: step, seconds, best, history, sums."""
    state = {"progress": progress, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "random": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["random_cuda"] = torch.cuda.get_rng_state()
    write_file(make_folder(path.parent) / path.name, lambda f: torch.save(state, f))


def load_checkpoint(path, model, optimizer):
    """Restore what `save_checkpoint` wrote → the progress. Raises InputError."""
    saved = read_tensors(path, ("progress", "model", "optimizer", "random"))
    with reading(path, "another version wrote it; remove it"):
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["random"])
    if "random_cuda" in saved:
        torch.cuda.set_rng_state(saved["random_cuda"])
    return saved["progress"]


def random_batches(rows, batch_size, per_epoch):
    """Batches of rows (B,) without end: epoch after epoch in new random orders, `per_epoch` in each.

    Its random numbers are its own, since a resumed training skips batches without a step.
    """
    generator = torch.Generator().manual_seed(torch.initial_seed())
    while True:
        order = torch.randperm(len(rows), generator=generator).to(rows.device)
        yield from rows[order].split(batch_size)[:per_epoch]


def num_steps(settings, per_epoch):
    """The number of training steps: the epochs', within the limits that are set."""
    return min(max(settings["epochs"] * per_epoch, settings["min_steps"]), settings["max_steps"] or math.inf)


def lr_factor(step, steps, per_epoch, settings):
    """The learning rate's factor at a step, from 0: linear warm-up, then half a cosine to 0; or decays."""
    if settings["epochwise"]:
        step = step // per_epoch * per_epoch
    if settings["decay_at"]:
        return 0.1 ** sum(step >= epoch * per_epoch for epoch in settings["decay_at"])
    warm_up = settings["warm_up"]
    warm_up = min(warm_up if warm_up >= 1 else warm_up * steps, steps // 2)
    if step < warm_up:
        return (step + 1) / (warm_up + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


def make_optimizer(model, settings):
    """The optimiser of a training's settings; "sgd" is Shift-GCN's, with Nesterov's momentum of 0.9."""
    lr, weight_decay, groups = settings["lr"], settings["weight_decay"], {}
    fused = settings["fused"] or next(model.parameters()).is_cuda or None       # False would rule out foreach
    if settings["optimizer"] == "sgd":
        for name, parameter in model.named_parameters():
            factor = {"spatial.weight": 10, "spatial.mask": 0}.get(".".join(name.split(".")[-2:]), 1)
            group = groups.setdefault(factor, {"params": [], "weight_decay": factor * weight_decay})
            group["params"].append(parameter)
        return torch.optim.SGD(list(groups.values()), lr, 0.9, nesterov=True, fused=fused)
    optimizer = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings["optimizer"]]
    return optimizer(model.parameters(), lr, weight_decay=weight_decay, fused=fused)


@contextlib.contextmanager
def seeded(seed, device):
    """Seed what layers draw from (initial weights, dropout), and restore the caller's random state after."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


# ----------------------------------------------------------------------------------- device, the run's folder
def pick_device(name, fp32):
    """The device of that name, or cuda if available; each process has its own. Raises InputError."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    index, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if index >= count:
        raise InputError(f"--device cuda: PyTorch finds {count} CUDA devices; use --device cpu, fewer "
                         f"processes, or a CUDA build of torch")
    torch.cuda.set_device(index)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not fp32
    return torch.device("cuda", index)


def default_folder(args, data):
    """runs/DATASET_SPLIT_METHOD_seedN, and all else on the command line that changes a result."""
    seeds = f"seed{args.seed}" if args.seeds == 1 else f"seeds{args.seed}-{args.seed + args.seeds - 1}"
    source = Path(args.data).resolve().stem
    parts = [data.name, *[source] * (source != data.name), data.split, args.method, seeds]
    parts += [name for name in ("gzsl", "validate", "fp32") if getattr(args, name)]
    if (args.encoder, args.encoder_preset) != ("stgcn", "ours"):
        parts.append(f"{args.encoder}-{args.encoder_preset}")
    parts += [path.stem for path in (*args.text, args.val_data) if path]
    return Path("runs", re.sub(r"[^A-Za-z0-9_.-]", "-", "_".join(parts + args.set)))


@contextlib.contextmanager
def claimed(out, folders, force):
    """Lock a run's folder `out` and make all its folders for the block; their checkpoints go if it succeeds.

    The lock ends with its process. Windows and some file systems have none. Raises InputError.
    """
    path = make_folder(out) / f"{UNFINISHED}.lock"
    try:
        file = open(path, "w")
    except OSError as e:
        raise InputError(f"{out}: cannot be written ({reason(e)}); give another --out") from None
    with file:
        try:
            if hasattr(os, "lockf"):
                os.lockf(file.fileno(), os.F_TLOCK, 0)
        except BlockingIOError:
            raise InputError(f"{out}: another process is training there; wait for it, or give another "
                             f"--out") from None
        except OSError:
            pass
        try:
            claim(folders, force)
            yield
            for folder in folders:
                shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
        finally:
            path.unlink(missing_ok=True)


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
def report(result):
    """Print a readable report."""
    figures, best, names = result["figures"], result["best_on_test"], result["unseen_classes"]
    zsl, kind = figures[result["method"]], "validation" if result["validate"] else "unseen"
    print(f"\nzero-shot accuracy on {zsl['n']} samples of {len(names)} {kind} classes")
    for name, f in figures.items():
        label, mark = (name, "   <- the result") if name == result["method"] else ("ridge baseline", "")
        print(f"  {label:<16}{f['acc']:7.1%}   95 % [{f['ci95'][0]:.1%}, {f['ci95'][1]:.1%}]   "
              f"mean per class {f['per_class']:.1%}{mark}")
    print(f"  {'chance':<16}{zsl['chance']:7.1%}")
    if "noise_std" in zsl:
        print(f"  {'other noises':<16}± {zsl['noise_std']:.1%}, standard deviation over ten draws")
    if best:
        print(f"  {'best on test':<16}{best['acc']:7.1%}   epoch {best['epoch']:g}: "
              f"chosen on the test set; not a result")
    for name, f in figures.items() if "gamma" in zsl else ():
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
    for name, figures in first["figures"].items():
        for key in [key for key in ("acc", "seen", "unseen", "harmonic", "ausuc") if key in figures]:
            each = [result["figures"][name][key] for result in results]
            mean, std = float(np.mean(each)), float(np.std(each, ddof=1))
            summary[f"{name} {key}"] = {"mean": mean, "std": std, "each": each}
            print(f"  {name} {key:<14} {mean:6.1%} ± {std:.1%}   {'  '.join(f'{v:.1%}' for v in each)}")
    return summary


# ------------------------------------------------------------------------------------------------- prediction
def predict(argv):
    """Predict the best-matching class of each new sequence, among any classes, into predictions.csv."""
    parser = Parser(prog="train.py predict", description="Label sequences with a trained run.")
    add = parser.add_argument
    add("--run", type=Path, required=True, help="the folder of a finished run")
    add("--data", type=Path, required=True,
        help="a folder with skeletons.npy, features.npy or .skeleton files, or one such file")
    among = parser.add_mutually_exclusive_group()
    among.add_argument("--classes", type=Path, nargs="+", default=(), metavar="FILE",
                       help="text of other classes, a .npy for each prompt or one for all; their names are "
                            "read from the .txt beside the first, one a line (new.npy: new.txt)")
    among.add_argument("--unseen", action="store_true", help="only the run's unseen classes")
    add("--out", type=Path, help="default: predictions.csv in the run's folder")
    add("--force", action="store_true", help="overwrite that file")
    add("--allow-lying", action="store_true", help="accept skeletons that do not stand upright")
    add("--device", choices=["cuda", "cpu"], help="default: cuda if available")
    args = parser.parse_args(argv)
    out = args.out or args.run / "predictions.csv"
    if out.is_dir() or out.exists() and not args.force:
        raise InputError(f"{out}: exists already; give another --out, or --force to overwrite a file")
    make_folder(out.parent)
    trained = read_model(args.run)
    device = pick_device(args.device, fp32=not trained["fast"])
    names, text, gammas = candidates(trained, args)
    with reading(args.run / "model.pt", "another version wrote it; train again"):
        encoder = restored_encoder(trained["encoder"])
        model = build(METHODS[trained["method"]], text, trained["width"], trained["settings"]["model"],
                      fast=trained["fast"] and device.type == "cuda")
        check_rows(model, trained, args.classes, text)
        model.load_state_dict(trained["state"])
    samples, features = new_samples(args, trained, encoder, device)     # N names, (N, F)
    scores = model.to(device).eval().scores(features, torch.arange(len(names), device=device))      # (N, K)
    if gammas.any():
        scores = zsar.z_scores(scores) - gammas.to(device)              # as in the generalized figures
    top_scores, order = scores.topk(min(5, len(names)))                 # (N, up to 5) each
    rows = [("sample", "class", "score", "margin", "top5")]
    for sample, best, ids in zip(samples, top_scores.tolist(), order.tolist()):
        margin = f"{best[0] - best[1]:.6g}" if len(best) > 1 else ""
        rows.append((sample, names[ids[0]], f"{best[0]:.6g}", margin, " | ".join(names[k] for k in ids)))
    write_table(out, rows)
    calibration = f", γ {trained['gamma']:.3f} from the validation run" if gammas.any() else ""
    print(f"{trained['method']}: {len(samples)} sequences among {len(names)} classes{calibration}")
    for sample, name, _, margin, _ in rows[1:11]:
        print(f"  {sample:<24}  {name:<36}  margin {margin}")
    print(f"written: {out}")


def read_model(run):
    """What `predict` needs of a finished run, from its model.pt. Raises InputError."""
    seeds = sorted((path.parent.name for path in run.glob("seed*/model.pt")), key=lambda name: int(name[4:]))
    if seeds and not (run / "model.pt").exists():
        raise InputError(f"{run}: holds the seeds {', '.join(seeds)}; name one of them, such as "
                         f"{run / seeds[0]}")
    return read_tensors(run / "model.pt", MODEL_KEYS, "name another --run, or train again")


def candidates(trained, args):
    """The K classes to choose from: their names, their text and γ where a class is seen (K,), else 0.

    They are those of the files, or the run's. Raises InputError.
    """
    if args.classes:
        names, text = new_classes(trained["text"], args.classes)
        return names, text, torch.zeros(len(names))
    seen, unseen, gamma = trained["seen"], trained["unseen"], trained["gamma"]
    classes = sorted(unseen if args.unseen else {*seen, *unseen})
    if gamma is None and not args.unseen:
        note("the run has no γ, so seen classes are favoured; train with --gzsl, or predict with --unseen")
    is_seen = torch.tensor([c in seen for c in classes], dtype=torch.float64)           # (K,)
    names = [trained["classes"][c] for c in classes]
    return names, [prompt[classes] for prompt in trained["text"]], (gamma or 0.0) * is_seen


def new_classes(trained_text, files):
    """Names and text of the K classes in files, a file for each of the run's prompts or one for all."""
    text = [torch.tensor(read_text(path)) for path in files]            # (K, 1+L, D) each
    names_file, K, D = files[0].with_suffix(".txt"), len(text[0]), trained_text[0].shape[2]
    names = read_lines(names_file) if names_file.exists() else [f"class {k}" for k in range(K)]
    if not names_file.exists():
        note(f"{names_file}: does not exist, so classes are called by number; write one name per line there")
    if len(names) != K:
        raise InputError(f"{names_file}: names {len(names)} classes, {files[0]} has {K}; give one line each")
    if len(text) not in (1, len(trained_text)):
        raise InputError(f"--classes: names {len(text)} files, the run has {len(trained_text)} prompts a "
                         f"class; give a file for each prompt, or one for all")
    for path, prompt in zip(files, text):
        if len(prompt) != K:
            raise InputError(f"{path}: has {len(prompt)} classes, {files[0]} has {K}; embed the same classes")
        if prompt.shape[2] != D:
            raise InputError(f"{path}: has vectors of width {prompt.shape[2]}, the run's have {D}; embed "
                             f"with the model that the run's text was embedded with")
    if all(prompt.shape[1] == 1 for prompt in trained_text):            # the method has read no tokens
        text = [prompt[:, :1] for prompt in text]
    return names, text * (len(trained_text) // len(text))


def restored_encoder(saved):
    """The trained encoder that `encode` describes, or None where the run was on ready features."""
    if saved["state"] is None:
        return None
    if saved["frame"] not in FRAMES:
        raise ValueError(f"unknown frame {saved['frame']!r}")
    num_classes = len(saved["state"]["classifier.bias"])
    encoder = build_encoder(saved["name"], JointGraph(*saved["graph"]), saved["shape"][2], num_classes)
    encoder.load_state_dict(saved["state"])
    return encoder


def check_rows(model, trained, files, text):
    """Raise InputError where the new text has more tokens than the trained method can read."""
    state, rows = trained["state"], max(prompt.shape[1] for prompt in trained["text"]) - 1
    too_long = [path for path, prompt in zip(files, text) if prompt.shape[1] > 1 + rows]
    if too_long and any(value.shape != state[key].shape for key, value in model.state_dict().items()):
        raise InputError(f"{too_long[0]}: has more than the {rows} token rows that the run was trained with; "
                         f"embed with --rows {rows}")


def new_samples(args, trained, encoder, device):
    """The new samples' N names and features (N, F). Raises InputError."""
    width, saved = trained["width"], trained["encoder"]
    T, V, M = saved["shape"] if encoder else (64, 0, 0)         # a run on ready features has none
    names, x = read_sequences(args.data, T)
    has = f"features of width {x.shape[1]}" if x.ndim == 2 else f"skeletons of {x.shape[3]} joints"
    accepted = [f"features of width {width}"] + [f"skeletons of {V} joints"] * (V > 0)
    if has not in accepted:
        raise InputError(f"{args.data}: has {has}; this run takes {' or '.join(accepted)}")
    if x.ndim == 2:
        return names, torch.tensor(x, dtype=torch.float32, device=device)
    graph = JointGraph(*saved["graph"])
    for line in check_bodies(args.data, x, graph, args.allow_lying)[1]:
        note(line)
    encoder.to(device).eval()
    absent, features = max(0, M - x.shape[4]), []               # as many persons as in training
    for _, rows in pieces(x, 32):
        rows = np.pad(rows, [(0, 0)] * 4 + [(0, absent)])[..., :M]
        rows = torch.from_numpy(to_common_frame(rows, graph, saved["frame"]))
        features.append(encode_all(encoder, rows.to(device)))
    return names, torch.cat(features)


if __name__ == "__main__":
    main()
