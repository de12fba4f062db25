"""Train and test a zero-shot method from the command line, from data to figures; then label new sequences.

    python train.py --method dvta --split 55_5                           the embedded synthetic set
    python train.py --method tdsm --split 55_5                           the other method, on the same encoder
    python train.py --method dvta --split 22_6_a --data path/to/folder   your data (README, "Your data")
    python train.py predict --run runs/... --data path/to/folder         labels, among any classes
    python train.py plot runs/...                                        pictures of a result
    torchrun --nproc-per-node=8 train.py --method tdsm --split 55_5      the same on eight GPUs

Steps: read the data; train the ST-GCN encoder on seen classes, or take it from the cache; train the method on
its features; score the unseen test samples; write result.json. README, "Protocol", says why each is as it is.
"""
import os
import signal

if __name__ == "__main__":                                      # Ctrl-C while PyTorch loads: one line too
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"interrupted\n"), os._exit(130)))

import argparse
import contextlib
import inspect
import itertools
import math
import platform
import re
import shlex
import shutil
import sys
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import alignment
import diffusion
import zsar
from alignment import DVTA
from data import (FORMATS, Data, InputError, Parser, command_line, find_format, fingerprint, list_splits,
                  measured_torsos, note, odd_torsos, parts_of, pieces, prepare_folder, read_data, read_json,
                  read_lines, read_ntu, read_samples, read_sequence, read_tensors, read_text, validation,
                  write_file, write_json, write_table)
from diffusion import STEPS, TDSM
from zsar import FEATURES, GRAPHS, STGCN, Ridge, ShiftGCN, to_common_frame

# ---------------------------------------------------------------------------------------------------- presets
# Everything that is tuned stands here. For NTU and PKU: the published settings of DVTA and TDSM. For
# synthetic and other, small data, and for every encoder: chosen on validation classes, never on unseen ones
# (README, "Figures").
# A training takes "epochs", or "steps" where there are none; [least, most] steps bound its epochs.
# "warm_up": a share of the steps, or a number; then the rate falls as a cosine to 0, or by ten at epochs
# "decay_at".
ENCODER = {"encoder": "stgcn", "epochs": 30, "steps": None, "batch_size": 16, "optimizer": "adamw",
           "lr": 3e-3, "weight_decay": 0.01, "warm_up": 0.15, "decay_at": [], "augment": True,
           "label_smoothing": 0.1, "fp32": False}
ENCODER_ON_CUDA = {"batch_size": 256}   # not measured; the rate is within the published 5e-3 at batch 128
MANY_SAMPLES = 64 * 256                 # that training must have for it: fewer make too few steps an epoch
ENCODED_AT_ONCE = {"cpu": 32, "cuda": 512}      # samples; on a CPU, to stay in cache
PLAIN_ENCODER = ENCODER | {"warm_up": 0, "augment": False, "label_smoothing": 0.0}
PUBLISHED_ENCODERS = {  # SMIE's, whose splits and features DVTA and TDSM use; and Shift-GCN's own
    "stgcn": PLAIN_ENCODER | {"epochs": 150, "batch_size": 128, "optimizer": "adam", "lr": 5e-3,
                              "weight_decay": 0.0},
    "shiftgcn": PLAIN_ENCODER | {"encoder": "shiftgcn", "epochs": 140, "batch_size": 64, "optimizer": "sgd",
                                 "lr": 0.1, "weight_decay": 1e-4, "decay_at": [60, 80, 100]},
}
RIDGE = {"penalty": 1000, "fp32": False}
DVTA_PAPER = {"epochs": 100, "steps": None, "batch_size": 128, "lr": 1e-6, "weight_decay": 0.0,
              "warm_up": 0.15, "standardise": False, "centre": False, "sde": True, "only": None,
              "fp32": False}
DVTA_SMALL = DVTA_PAPER | {"epochs": 7, "steps": [150, 1000], "batch_size": 64, "lr": 1e-4,
                           "standardise": True, "centre": True}
TDSM_PAPER = {"epochs": None, "steps": 50_000, "batch_size": 256, "lr": 1e-4, "weight_decay": 0.01,
              "warm_up": 100, "width": 768, "depth": 12, "heads": 12, "lam": 1.0, "prediction": "epsilon",
              "noises": 3, "timestep": 25, "conditions": "both", "standardise": False, "scale": 1.0,
              "unit_text": True, "centre": False, "fp32": False}
TDSM_SMALL = TDSM_PAPER | {"epochs": 18, "steps": [500, 4000], "batch_size": 64, "lr": 1e-3, "warm_up": 0.15,
                           "width": 128, "depth": 2, "heads": 2, "prediction": "sample",
                           "conditions": "pooled", "noises": 10, "standardise": True, "scale": 0.25,
                           "centre": True, "weight_decay": 3.0}
NOT_OF_THE_MODEL = ("epochs", "steps", "batch_size", "lr", "warm_up", "fp32")   # but of its training
PRESETS = {
    "ntu60": {"encoder": ENCODER, "ridge": RIDGE, "dvta": DVTA_PAPER, "tdsm": TDSM_PAPER},
    "ntu120": {"encoder": ENCODER, "ridge": RIDGE, "dvta": DVTA_PAPER | {"lr": 5e-6}, "tdsm": TDSM_PAPER},
    "pku51": {"encoder": ENCODER, "ridge": RIDGE, "dvta": DVTA_PAPER | {"lr": 1e-5}, "tdsm": TDSM_PAPER},
    "synthetic": {"encoder": ENCODER | {"epochs": 9, "augment": False, "label_smoothing": 0.0},
                  "ridge": RIDGE, "dvta": DVTA_SMALL, "tdsm": TDSM_SMALL},
    "other": {"encoder": ENCODER, "ridge": RIDGE, "dvta": DVTA_SMALL, "tdsm": TDSM_SMALL},
}
CHECKPOINT_SECONDS = 60
MODEL_KEYS = {"method", "settings", "state", "classes", "text", "encoder", "shape"}     # of model.pt
RUN_FILES = ("result.json", "model.pt")
UNFINISHED = "unfinished_run"   # the folder, in a run's own, of what is needed until it is finished
SYNTHETIC_NOTE = "SYNTHETIC DATA: made motions, not recordings. These figures say nothing about NTU RGB+D."


# -------------------------------------------------------------------------------------------- many processes
class Processes(NamedTuple):
    """The processes that share a training, and which this is; one alone passes everything through.

    All hold the same weights and draw the same batch. Each computes a share of it, and the gradients are
    averaged, so that the mean of the processes' losses must be the batch's.
    """
    rank: int = 0
    count: int = 1

    def share(self, size):
        """This process's rows of a batch, a slice."""
        return slice(self.rank * size // self.count, (self.rank + 1) * size // self.count)

    def weighed(self, means, size):
        """Means over this share of a batch, {name: scalar}, so that the processes' mean is the batch's."""
        share = self.share(size)
        weight = self.count * (share.stop - share.start) / size
        return {name: weight * mean for name, mean in means.items()}

    def gather(self, size, rows):
        """The rows (b, n) of this share of a batch → those of all (size, n), with their gradients."""
        if self.count == 1:
            return rows
        share = self.share(size)
        return _SumOverProcesses.apply(F.pad(rows, (0, 0, share.start, size - share.stop)))

    def average(self, tensors):
        """Set tensors to their means over the processes, in one message."""
        if self.count == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        means = (flat / self.count).split([tensor.numel() for tensor in tensors])
        for tensor, mean in zip(tensors, means):
            tensor.copy_(mean.view_as(tensor))

    def any(self, flag):
        """Whether a flag stands in any process; each waits for all."""
        flags = torch.tensor([float(bool(flag))])
        self.average([flags])
        return flags.item() > 0

    def first(self, work):
        """What work() returns in the first process, which alone does it while the others wait."""
        told = [work() if self.rank == 0 else None]
        if self.count > 1:
            dist.broadcast_object_list(told, device=torch.device("cpu"))
        return told[0]


class _SumOverProcesses(torch.autograd.Function):
    """The sum of the processes' tensors. Each has a gradient of that sum, and theirs add up too."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return _SumOverProcesses.forward(None, gradient.contiguous())


def in_each_process(work):
    """Do work(Processes) in each process that torchrun started.

    The first one alone prints. Of those that fail, the first to do so tells why; torchrun ends the others.
    """
    store, rank, count = next(dist.rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    patience = timedelta(days=30)                               # while the first one trains an encoder

    def joined():
        try:
            dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=patience)
            out, err = (None, None) if rank else (sys.stdout, sys.stderr)
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                work(Processes(rank, count))
            dist.destroy_process_group()
        except (Exception, KeyboardInterrupt) as e:
            signal.signal(signal.SIGINT, signal.SIG_IGN)        # torchrun passes Ctrl-C on, so it comes twice
            if store.add("failed", 1) > 1:
                with contextlib.suppress(RuntimeError):         # the teller was killed
                    store.wait(["told"], timedelta(seconds=10))
                os._exit(1)
            if isinstance(e, RuntimeError) and "onnection" in str(e):
                raise InputError("another process of torchrun's was killed; --resume goes on") from None
            raise

    try:
        command_line(joined)
    finally:
        store.set("told", "")


# ------------------------------------------------------------------------------------ one run from end to end
@dataclass(frozen=True)
class Run:
    """What one run is, known before it starts."""
    method: str               # "dvta", "tdsm" or "ridge"
    settings: dict            # {"encoder": {...}, "ridge": {...}, "dvta": {...}, "tdsm": {...}}
    seed: int
    device: torch.device
    folder: Path              # for its results
    cache: Path               # for encoders, which runs share
    gzsl: bool
    tune: bool
    about: dict               # what result.json says of all that
    processes: Processes = Processes()      # that share it


@dataclass
class Task:
    """A zero-shot task on the device: what a method is trained and tested with."""
    data: Data
    features: torch.Tensor    # (N, 256) of every sample
    text: list                # of every class, [(C, 1+L, D), ...], a tensor a prompt
    encoder: dict             # {"state", "seen_test_acc", "cached", "file", "seconds"}


def main(argv=None):
    """The command line: train and test, `predict` or `plot`; in each process where torchrun started it."""
    command = partial(_command, sys.argv[1:] if argv is None else argv)
    if "TORCHELASTIC_RUN_ID" in os.environ:                     # torchrun's
        in_each_process(command)
    else:
        command_line(lambda: command(Processes()))


def _command(argv, processes):
    """What the command line asks for."""
    if argv[:1] == ["predict"]:
        processes.first(lambda: predict(predict_arguments(argv[1:])))
    elif argv[:1] == ["plot"]:
        processes.first(lambda: plot(plot_arguments(argv[1:])))
    else:
        run(parse_arguments(argv), processes)


def run(args, processes):
    """One experiment, or one for each of several seeds and what they have in common."""
    if args.list:
        return print("\n".join(list_splits()))
    data = read_data(args.data, args.split, args.text)
    for line in data.notes:
        note(line)
    val = validation(data) if args.gzsl or args.tune else None
    runs, together = plan_runs(args, data, processes)
    several = len(runs) > 1
    out = runs[0].folder.parent if several else runs[0].folder

    folders = [(out, together)] * several + [(one.folder, one.about) for one in runs]

    def claim_all():                                            # before the first training; all or none
        held = [claim(folder, about, args) for folder, about in folders]
        for (folder, about), result in zip(folders, held):
            if not result:
                write_json(prepare_folder(folder / UNFINISHED) / "run.json", about)
        return held[several:]

    finished = processes.first(claim_all)
    try:
        results = [result or experiment(one, data, val) for result, one in zip(finished, runs)]
    except KeyboardInterrupt:
        again = shlex.join([*args.command, "--out", str(out), "--resume"])
        start = f"torchrun --nproc-per-node={processes.count}" if processes.count > 1 else "python"
        raise KeyboardInterrupt(f"; to go on: {start} train.py {again}") from None
    if several and processes.rank == 0:
        finish(out, together | {"summary": report_seeds(results), "seeds": results})


def experiment(run, data, val):
    """The protocol for one seed, from data to figures, into the run's folder → what result.json says.

    data: the task itself; val: its validation task, or None where nothing is to be chosen.
    """
    _introduce(run, data)
    task = encode(run, data)
    val_task = encode(run, val, "validation run") if val else None
    tuned = tune(run, val_task) if run.tune else None
    run = _with_settings(run, tuned["chosen"]) if tuned else run
    models, log = train_both(run, task, watch=True)
    start = time.perf_counter()
    zsl = {name: unseen_figures(model, task) for name, model in models.items()}
    log["test_seconds"] = time.perf_counter() - start
    gzsl = generalized_figures(run, models, task, val_task) if run.gzsl else dict.fromkeys(models)
    if run.processes.rank == 0:
        trained = trained_of(run, task, models[run.method])
        write_file(run.folder / "model.pt", lambda f: torch.save(trained, f))
    result = result_of(run, task, zsl, gzsl, log) | {"tuned": tuned}
    report(result, data)
    if run.processes.rank == 0:
        finish(run.folder, result)
    return result


def _introduce(run, data):
    """Say what is about to be done."""
    if run.about["synthetic"]:
        print(SYNTHETIC_NOTE)
    print(f"{run.method} on {data.name} ({data.source}), split {data.split}: "
          f"{len(data.seen)} seen and {len(data.unseen)} unseen classes; "
          f"samples: {len(data.train)} training, {len(data.seen_test)} seen test, "
          f"{len(data.unseen_test)} unseen test; "
          f"seed {run.seed}; {run.device}, {run.about['precision']}")


def _with_settings(run, changes):
    """The run with other settings of its method."""
    return replace(run, settings=run.settings | {run.method: run.settings[run.method] | changes})


def result_of(run, task, zsl, gzsl, log):
    """What result.json says of a finished run."""
    ridge = {key: zsl["ridge"][key] for key in ("acc", "ci95", "per_class")}
    return run.about | {
        "config": run.about["config"] | {run.method: run.settings[run.method]},
        "unseen_classes": [task.data.classes[c] for c in task.data.unseen],
        "zsl": zsl[run.method],
        "gzsl": gzsl[run.method],
        "ridge": ridge | {"gzsl": gzsl["ridge"]},
        "best_on_test": log["best"],
        "history": thinned(log["history"]),
        "encoder": {key: task.encoder[key] for key in ("seen_test_acc", "cached", "file")},
        "seconds": {"encoder": task.encoder["seconds"], "train": log["seconds"],
                    "test": log["test_seconds"]},
    }


def thinned(history):
    """Up to 200 points of a training's history, evenly, the last among them, by name."""
    some = np.unique(np.linspace(0, len(history) - 1, min(200, len(history))).astype(int))
    return [dict(zip(("epoch", "loss", "acc_on_test"), history[i])) for i in some]


def trained_of(run, task, model):
    """What model.pt holds: the weights of method and encoder with all that `predict` needs."""
    skeletons, encoder, shape = task.data.skeletons, None, None
    if skeletons is not None:
        encoder = {"name": run.settings["encoder"]["encoder"], "state": task.encoder["state"]}
        shape = list(skeletons.shape[2:])                       # [T, V, M]
    return {"method": run.method, "settings": run.settings[run.method], "state": model.state_dict(),
            "classes": task.data.classes, "text": task.text, "encoder": encoder, "shape": shape}


# ---------------------------------------------------------------------------------------------------- encoder
def encode(run, data, name=None):
    """Data → the Task with features of every sample.

    Skeletons go through an ST-GCN trained on the training samples, cached under a key made of all that it
    depends on. `name` is that of a run within the run, which introduces itself.
    """
    if name:
        print(f"{name}: {len(data.seen)} seen and {len(data.unseen)} validation classes, "
              f"{len(data.train)} training samples")
    start = time.perf_counter()
    text = [torch.as_tensor(t, device=run.device) for t in data.text]
    if data.skeletons is None:
        features = torch.tensor(data.features, dtype=torch.float32, device=run.device)
        encoder = {"state": None, "seen_test_acc": None, "cached": False, "file": None, "seconds": 0.0}
        return Task(data, features, text, encoder)
    key = training_key((zsar, train_encoder, build_encoder, encoder_optimizer), run.settings["encoder"], run,
                       data.skeletons, data.labels, data.seen, data.train, data.seen_test)
    path = run.cache / f"{key}.pt"
    cached = run.processes.first(path.exists)
    if cached:
        print(f"encoder: from {path}")
    else:
        _train_encoder_into(path, run, data, run.folder / UNFINISHED / f"encoder-{key}.pt")
    saved = read_encoder(path, run.settings["encoder"]["encoder"], data.skeletons)
    if saved["seen_test_acc"] is not None:
        print(f"encoder: {saved['seen_test_acc']:.1%} on seen test samples, {len(data.seen)} classes")
    features = saved.pop("features").detach().to(run.device)
    seconds = time.perf_counter() - start
    return Task(data, features, text, saved | {"cached": cached, "file": str(path), "seconds": seconds})


def read_encoder(path, name, skeletons):
    """What `train_encoder` gave for these skeletons, from the cache, its parts checked. Raises InputError."""
    saved = read_tensors(path, ("state", "features", "seen_test_acc"))
    with parts_of(path):
        features, accuracy = saved["features"], saved["seen_test_acc"]
        if (features.shape, features.dtype) != ((len(skeletons), FEATURES), torch.float32):
            raise ValueError(f"features {tuple(features.shape)} of {features.dtype}")
        if accuracy is not None and not (type(accuracy) is float and 0 <= accuracy <= 1):
            raise ValueError(f"accuracy {accuracy}")
        with torch.device("meta"):                              # shapes alone
            rebuild_encoder({"name": name, "state": saved["state"]}, *skeletons.shape[3:])
    return saved


def _train_encoder_into(path, run, data, checkpoint):
    """Write what `train_encoder` gives. On a CPU, without SyncBatchNorm, the first process works alone."""
    def train_and_write(run):
        saved = train_encoder(run, data, checkpoint)
        if run.processes.rank == 0:
            write_file(prepare_folder(path.parent) / path.name, lambda f: torch.save(saved, f))

    if run.device.type == "cuda":
        train_and_write(run)
        run.processes.any(False)                                # until it is written
    else:
        run.processes.first(lambda: train_and_write(replace(run, processes=Processes())))


def train_encoder(run, data, checkpoint):
    """Train an encoder with cross-entropy on the training samples, then encode all samples.

    → {"state": weights, "features": (N, 256), "seen_test_acc": accuracy among the seen classes, or None
    without such samples}.
    """
    (V, M), settings, device = data.skeletons.shape[3:], run.settings["encoder"], run.device
    x = _room_for(data.skeletons.shape, device)                 # (N, 3, T, V, M)
    for first, part in pieces(data.skeletons):
        x[first:first + len(part)] = torch.from_numpy(to_common_frame(part, GRAPHS[V]))
    y = torch.as_tensor(np.searchsorted(data.seen, data.labels), device=device)  # (N,) among the seen classes
    train = torch.as_tensor(data.train, device=device)
    with seeded(run.seed, device):
        encoder = build_encoder(settings["encoder"], V, M, len(data.seen)).to(device)
        if run.processes.count > 1:
            encoder = nn.SyncBatchNorm.convert_sync_batchnorm(encoder)
        optimizer, classify = encoder_optimizer(encoder, settings), encoder.classify
        if device.type == "cuda" and not settings["fp32"]:
            classify = fast_classify(encoder, compiled=run.processes.count == 1)    # not with SyncBatchNorm

        def losses(rows):
            batch, share = zsar.batch_of(x, rows), run.processes.share(len(rows))
            if settings["augment"]:
                batch = zsar.augmented(batch)
            smoothing = settings["label_smoothing"]
            loss = F.cross_entropy(classify(batch[share]), y[rows][share], label_smoothing=smoothing)
            return run.processes.weighed({"loss": loss}, len(rows))

        advice = (f"its skeletons reach {x.norm(p=math.inf):.3g} m, its learning rate is {settings['lr']:g}; "
                  f"mend them, or choose the other --encoder-preset")
        fit(Training("encoder", encoder, optimizer, settings, train, run.seed, checkpoint, advice,
                     processes=run.processes), losses)
    zsar.settle_batch_norm(encoder, x, train)
    features = encode_all(encoder, x)
    with torch.no_grad():
        hit = encoder.classifier(features[data.seen_test]).argmax(1) == y[data.seen_test]
    accuracy = hit.float().mean().item() if len(hit) else None
    return {"state": encoder.state_dict(), "features": features, "seen_test_acc": accuracy}


def _room_for(shape, device):
    """An empty float32 array: on the device, or pinned on the host, if it took over half of what is free."""
    if device.type == "cuda" and 4 * math.prod(shape) > torch.cuda.mem_get_info(device)[0] / 2:
        return torch.empty(shape, pin_memory=True)
    return torch.empty(shape, device=device)


def build_encoder(name, num_joints, num_persons, num_classes):
    """An encoder, "stgcn" or "shiftgcn", for skeletons of V joints and M persons."""
    if name == "shiftgcn":
        return ShiftGCN(num_joints, num_persons, num_classes)
    return STGCN(GRAPHS[num_joints], num_joints, num_classes)


def rebuild_encoder(saved, num_joints, num_persons):
    """A trained encoder, {"name", "state"}, from its weights."""
    name, state = saved["name"], saved["state"]
    encoder = build_encoder(name, num_joints, num_persons, len(state["classifier.bias"]))
    encoder.load_state_dict(state)
    return encoder.eval()


def fast_classify(encoder, compiled):
    """An encoder's `classify` as training on CUDA does it: in bfloat16, compiled."""
    if isinstance(encoder, STGCN):                              # Shift-GCN has a layout of its own
        encoder.to(memory_format=torch.channels_last)
    classify = torch.compile(encoder.classify) if compiled else encoder.classify

    def in_bfloat16(x):                                         # (N, 3, T, V, M) → (N, classes) float32
        with torch.autocast(x.device.type, torch.bfloat16):
            return classify(x).float()

    return in_bfloat16


def encoder_optimizer(encoder, settings):
    """The optimiser of an encoder's settings; SGD with Nesterov's momentum of 0.9."""
    lr, weight_decay = settings["lr"], settings["weight_decay"]
    if settings["optimizer"] == "sgd":
        return torch.optim.SGD(encoder.parameters(), lr, 0.9, nesterov=True, weight_decay=weight_decay)
    optimizer = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings["optimizer"]]
    return optimizer(encoder.parameters(), lr, weight_decay=weight_decay)


@torch.no_grad()
def encode_all(encoder, x):
    """Skeletons in the common frame (N, 3, T, V, M) → features (N, 256), on the encoder's device."""
    device = encoder.classifier.weight.device
    features = torch.empty(len(x), FEATURES, device=device)     # a list would pin memory between blocks
    size = ENCODED_AT_ONCE[device.type]
    for part, rows in zip(x.split(size), features.split(size)):
        rows.copy_(encoder(part.to(device, non_blocking=True)))
    return features


# ----------------------------------------------------------------------------------------------------- method
def build(method, text, settings, seen=None, x=None):
    """A method's model on the text of all classes, to train on seen classes (S,) and features x (n, 256)."""
    options = {key: value for key, value in settings.items() if key not in NOT_OF_THE_MODEL}
    if method == "dvta":
        return DVTA(text, seen, x, **options)
    if method == "ridge":
        return Ridge(text, **options)
    return TDSM(text, seen, x, fp32=settings.get("fp32", False), **options)


def rebuild(method, text, settings, state):
    """A trained method's model, from its weights."""
    if method == "tdsm":                                        # as many tokens as in training
        settings = settings | {"num_tokens": len(state["denoiser.position"])}
    model = build(method, text, settings)
    model.load_state_dict(state)
    return model.eval()


def train_both(run, task, watch=False):
    """Train ridge and the run's method → {name: model}, and the log of `train_method`."""
    ridge, log = train_method(run, "ridge", task)
    if run.method == "ridge":
        return {"ridge": ridge}, log
    model, log = train_method(run, run.method, task, watch)
    return {run.method: model, "ridge": ridge}, log


def train_method(run, name, task, watch=False):
    """Train a method on the task's training samples → its model and {"seconds", "best", "history"}.

    watch: note the best accuracy on the test set.
    """
    device, settings = run.device, run.settings[name]
    x = task.features[task.data.train]                          # (n, 256)
    y = torch.as_tensor(task.data.labels[task.data.train], device=device)   # (n,)
    key = training_key((zsar, alignment, diffusion, build, train_method), [name, settings], run,
                       x.cpu().numpy(), y.cpu().numpy(), *task.data.text)
    with seeded(run.seed, device):
        model = build(name, task.text, settings, y.unique(), x).to(device)
        if name == "ridge":
            model.fit(x, y)
            return model, {"seconds": 0.0, "best": None, "history": []}
        if name == "tdsm" and x.is_cuda and not settings["fp32"]:
            model.compile_training()

        def losses(rows):
            size, share = len(rows), run.processes.share(len(rows))
            if name == "tdsm":                                  # e⁺ and e⁻ beside the loss, to be told
                return run.processes.weighed(model.losses(x[rows], y[rows], share), size)
            return {"loss": model.loss(x[rows], y[rows], share, partial(run.processes.gather, size))}

        def accuracy():
            return unseen_figures(model, task)["acc"]

        rows, optimizer = torch.arange(len(x), device=device), model.optimizer(settings["lr"])
        checkpoint = run.folder / UNFINISHED / f"{name}-{key}.pt"
        advice = f"its features reach {x.norm(p=math.inf):.3g}; mend them, or lower the learning rate (--lr)"
        training = Training(name, model, optimizer, settings, rows, run.seed, checkpoint, advice,
                            processes=run.processes)
        return model, fit(training, losses, accuracy if watch else None)


def tune(run, val_task):
    """Nine trainings around the settings, tested on the validation classes.

    → {"chosen": learning rate and length, "grid": all}.
    """
    settings, rows = run.settings[run.method], []
    for scale in (1, 0.5, 2):                                   # the first wins a tie
        for rate in (1, 1 / 3, 3):
            row = _scaled_length(settings, scale) | {"lr": rate * settings["lr"]}
            try:
                model, _ = train_method(_with_settings(run, row), run.method, val_task)
                rows.append(row | {"acc": unseen_figures(model, val_task)["acc"]})
            except Diverged:
                rows.append(row | {"acc": 0.0})
    rows = run.processes.first(lambda: rows)                    # on CUDA, the others' might differ by a bit
    best = max(rows, key=lambda row: row["acc"])
    print(f"\ntuning {run.method}: accuracy among the {len(val_task.data.unseen)} validation classes")
    for row in rows:
        mark = "   <- chosen" if row is best else ""
        length = f"{row['epochs']} epochs" if row["epochs"] else f"{row['steps']} steps"
        print(f"  {length:>12}  lr {row['lr']:.2e}  {row['acc']:6.1%}{mark}")
    return {"chosen": {key: best[key] for key in ("epochs", "steps", "lr")}, "grid": rows}


def _scaled_length(settings, scale):
    """The settings' length times a scale: epochs and steps, or the bounds of steps."""
    epochs, steps = settings["epochs"], settings["steps"]
    if epochs:
        epochs = max(1, round(scale * epochs))
    if isinstance(steps, list):
        steps = [max(1, round(scale * bound)) for bound in steps]
    elif steps:
        steps = max(1, round(scale * steps))
    return {"epochs": epochs, "steps": steps}


def unseen_figures(model, task):
    """Zero-shot figures: the unseen test samples among the unseen classes."""
    data = task.data
    unseen = torch.as_tensor(data.unseen, device=task.features.device)
    scores = model.scores(task.features[data.unseen_test], unseen)
    return zsar.zsl_figures(scores, data.labels[data.unseen_test], data.unseen)


def generalized_figures(run, models, task, val_task):
    """Generalized figures of each model, γ from its like on the validation task → {name: figures}."""
    val_models, _ = train_both(run, val_task)
    figures = {}
    for name, model in models.items():
        gamma = zsar.best_gamma(*among_all_classes(val_models[name], val_task))
        figures[name] = zsar.gzsl_figures(*among_all_classes(model, task), gamma)
    return figures


def among_all_classes(model, task):
    """What the generalized figures need, of all test samples among all classes.

    → scores (N', C'), their class ids (N',), the ids of those classes (C',), and of the seen ones.
    """
    data = task.data
    rows, classes = np.concatenate([data.seen_test, data.unseen_test]), np.union1d(data.seen, data.unseen)
    scores = model.scores(task.features[rows], torch.as_tensor(classes, device=task.features.device))
    return scores, data.labels[rows], classes, data.seen


# ------------------------------------------------------------------------------------------ the training loop
class Diverged(InputError):
    """A training's loss is no longer finite."""


@dataclass
class Training:
    """One training and how far it is; its checkpoint holds all that a killed run needs to go on."""
    LOG = ("seconds", "best", "history", "sums", "since")       # what the checkpoint keeps beside the weights
    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    settings: dict            # "epochs", "steps", "batch_size" and "lr"
    rows: torch.Tensor        # (n,) training rows, on the device
    seed: int                 # of the order of the rows
    checkpoint: Path
    advice: str               # what to do if it diverges
    step: int = 0             # steps done
    seconds: float = 0.0      # that they took
    best: dict = None         # {"acc", "epoch"} of the tests
    history: list = None      # [epoch, loss, acc of the test or None] of each report
    sums: torch.Tensor = None  # of the losses since the last report
    since: int = 0            # over how many steps
    processes: Processes = Processes()      # that share each batch

    def __post_init__(self):
        self.history, self.sums = [], torch.zeros((), device=self.rows.device)
        self.batch_size = min(self.settings["batch_size"], len(self.rows))
        if self.batch_size < self.processes.count:
            raise InputError(f"{self.name}: a batch of {self.batch_size} cannot be shared by "
                             f"{self.processes.count} processes; start fewer")
        self.per_epoch = len(self.rows) // self.batch_size
        self.steps = num_steps(self.settings, self.per_epoch)
        warm_up = self.settings["warm_up"]
        self.warm_up = min(warm_up if warm_up >= 1 else warm_up * self.steps, self.steps // 2)
        if self.settings["steps"]:
            self.label, self.unit, self.every = f"{self.name} step", 1, max(1, self.steps // 20)
        else:
            self.label, self.unit, self.every = f"{self.name} epoch", self.per_epoch, self.per_epoch

    def set_learning_rate(self):
        """That of the next step."""
        decay_at = self.settings.get("decay_at")                # encoders alone have it
        if decay_at:
            factor = 0.1 ** sum(self.step >= epoch * self.per_epoch for epoch in decay_at)
        else:
            factor = warm_up_cosine(self.step, self.warm_up, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings["lr"] * factor

    def write(self):
        """Write the checkpoint, in the first process. A finished training needs no optimiser any more."""
        if self.processes.rank:
            return
        log = {key: getattr(self, key) for key in self.LOG}
        state = {"step": self.step, "log": log, "model": self.model.state_dict()}
        if self.step < self.steps:
            state |= {"optimizer": self.optimizer.state_dict(), "random": torch.get_rng_state()}
            if self.rows.is_cuda:
                state["random_cuda"] = torch.cuda.get_rng_state(self.rows.device)
        write_file(self.checkpoint, lambda f: torch.save(state, f))

    def restore(self):
        """Go on from the checkpoint, if there is one."""
        if not self.checkpoint.exists():
            return
        saved = read_tensors(self.checkpoint, ("step", "log", "model"))
        with parts_of(self.checkpoint):
            self.step = range(self.steps + 1).index(saved["step"])
            for key in self.LOG:
                setattr(self, key, saved["log"][key])
            self.best = self.best and {key: float(self.best[key]) for key in ("acc", "epoch")}
            self.sums = self.sums.to(self.rows.device)
            self.model.load_state_dict(saved["model"])
            if self.step < self.steps:
                self.optimizer.load_state_dict(saved["optimizer"])
                torch.set_rng_state(saved["random"])
                if self.rows.is_cuda:
                    torch.cuda.set_rng_state(saved["random_cuda"], self.rows.device)
        print(f"{self.place()}: from {self.checkpoint}", flush=True)

    def place(self):
        """Where it is, as people count: "dvta epoch 2/30"."""
        return f"{self.label} {self.step // self.unit}/{self.steps // self.unit}"

    def report(self, means, test):
        """Print a line of progress; keep history and best accuracy on the test set. Raises Diverged."""
        if not math.isfinite(means["loss"]):
            raise Diverged(f"{self.place()}: the loss is no longer finite; {self.advice}")
        rate = self.step / self.seconds
        text = "  ".join(f"{key} {value:.4f}" for key, value in means.items())
        print(f"{self.place()}  {text}  {rate:.3g} steps/s  {self.seconds:.1f} s, "
              f"{(self.steps - self.step) / rate:.0f} s left", flush=True)
        epoch, acc = self.step / self.per_epoch, None
        if test:
            self.model.eval()
            acc = test()
            self.model.train()
            if self.best is None or acc > self.best["acc"]:
                self.best = {"acc": acc, "epoch": epoch}
        self.history.append([epoch, means["loss"], acc])


def fit(training, losses, test=None):
    """Minimise losses(batch of rows)["loss"], with warm-up then cosine to 0.

    Rows come in a new random order each epoch, without the last, smaller batch. A line is printed after each
    epoch, or each 20th of the steps, and `test()` gives an accuracy then. The checkpoint is written each
    minute, on Ctrl-C and at the end; where there is one, training goes on from it, on a CPU to the same
    weights bit by bit as without the break.
    → {"seconds": of the steps, "best": {"acc", "epoch"} of the tests or None, "history": as of Training}.
    Raises Diverged.
    """
    model, optimizer, processes = training.model, training.optimizer, training.processes
    prepare_folder(training.checkpoint.parent)
    training.restore()
    batches = random_batches(training.rows, training.batch_size, training.seed)
    for _ in range(training.step):                              # the order of the data goes on too
        next(batches)
    written = time.perf_counter()
    with postponed_ctrl_c() as interrupted:
        model.train()
        start = time.perf_counter()
        while training.step < training.steps:
            training.set_learning_rate()
            values = losses(next(batches))                      # {"loss": scalar, ...}
            optimizer.zero_grad(set_to_none=True)
            values["loss"].backward()
            processes.average([p.grad for p in model.parameters() if p.grad is not None])
            optimizer.step()
            training.step += 1
            training.sums = training.sums + torch.stack([value.detach() for value in values.values()])
            training.since += 1
            last = training.step == training.steps
            if last or training.step % training.every == 0:
                processes.average([training.sums])
                means = dict(zip(values, (training.sums / training.since).tolist()))    # waits for the device
                training.seconds += time.perf_counter() - start
                training.report(means, test)
                training.sums, training.since = torch.zeros_like(training.sums), 0
                start = time.perf_counter()
            last = last or processes.any(interrupted)
            if last or time.perf_counter() - written > CHECKPOINT_SECONDS:
                training.seconds += time.perf_counter() - start
                training.write()
                start = written = time.perf_counter()
            if last and processes.any(interrupted):             # all wait until the checkpoint is written
                raise KeyboardInterrupt
    model.eval()
    return {"seconds": training.seconds, "best": training.best, "history": training.history}


@contextlib.contextmanager
def postponed_ctrl_c():
    """Ctrl-C waits, lest it tear a step → a list, empty until then."""
    asked = []
    handler = signal.signal(signal.SIGINT, lambda *_: asked.append(True))
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, handler)


def random_batches(rows, batch_size, seed):
    """Batches without end: epoch after epoch in new random orders, without the last, smaller batch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator).to(rows.device)
        yield from rows[order].split(batch_size)[:len(rows) // batch_size]


def num_steps(settings, per_epoch):
    """How long a training is: its epochs, at least and at most some steps; or, without epochs, its steps."""
    epochs, steps = settings["epochs"], settings["steps"]
    if not epochs:
        return steps
    least, most = steps or (1, math.inf)
    return min(max(epochs * per_epoch, least), most)


def warm_up_cosine(step, warm_up, steps):
    """The learning rate's factor at step 0.. of `steps`: linear warm-up, then half a cosine to 0."""
    if step < warm_up:
        return (step + 1) / (warm_up + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


@contextlib.contextmanager
def seeded(seed, device):
    """Seed what layers draw from (initial weights, dropout); the caller's random state comes back after."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def training_key(code, settings, run, *arrays):
    """A hash of all that trained weights depend on: code, library, settings, seed, device, and arrays."""
    loop = (Training, fit, random_batches, num_steps, warm_up_cosine)
    sources = [inspect.getsource(part) for part in (*code, *loop)]
    return fingerprint(*arrays, [settings, run.seed, run.device.type, torch.__version__, *sources])[:16]


# ------------------------------------------------------------------------------------------- the run's folder
def plan_runs(args, data, processes):
    """A Run for each seed, and what result.json says of several together."""
    device = pick_device(args.device, args.fp32)
    settings, given = choose_settings(args, data, device)
    if args.method == "tdsm":
        _refuse_too_large(settings["tdsm"], data, device)
    seeds = range(args.seed, args.seed + args.seeds)
    out = args.out or _default_folder(args, data, given)
    about, runs = describe(args, data, settings, device) | {"processes": processes.count}, []
    for seed in seeds:
        folder = out / f"seed{seed}" if args.seeds > 1 else out
        alone = _identified(about, args, seed, "--seeds", "1", "--seed", str(seed))
        runs.append(Run(args.method, settings, seed, device, folder, cache=out.parent / "encoders",
                        gzsl=args.gzsl, tune=args.tune, about=alone, processes=processes))
    return runs, _identified(about, args, list(seeds))


def _default_folder(args, data, given):
    """runs/DATASET_SPLIT_METHOD_seedN, and each setting that was given."""
    seeds = f"seed{args.seed}" if args.seeds == 1 else f"seeds{args.seed}-{args.seed + args.seeds - 1}"
    tuned = "_tuned" if args.tune else ""
    settings = [f"{name}-{value}" for name, value in given.items()]
    if (args.encoder, args.encoder_preset) != ("stgcn", "ours"):
        settings.append(f"{args.encoder}-{args.encoder_preset}")
    name = "_".join([data.name, data.split, args.method, seeds + tuned, *settings])
    return Path("runs", re.sub(r"[^A-Za-z0-9_.-]", "-", name))  # a split may have any name


def describe(args, data, settings, device):
    """What is known of a run before it starts, whatever its seed, for result.json."""
    samples = data.features if data.skeletons is None else data.skeletons
    parts = (data.train, data.seen_test, data.unseen_test, data.val)
    synthetic = data.source == "synthetic set"
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    return {
        "method": args.method, "dataset": data.name, "source": data.source, "split": data.split,
        "synthetic": synthetic, "note": SYNTHETIC_NOTE if synthetic else None, "device": str(device),
        "precision": precision_of(device, args.fp32),
        "data_sha256": fingerprint(samples, data.labels, *data.text, *parts, data.classes),
        "versions": versions,
        "config": {"unseen": data.unseen.tolist(), "encoder": settings["encoder"],
                   args.method: settings[args.method]},
    }


def _identified(about, args, seed, *more):
    """A run's description with its seed, a hash of all it depends on, and the command that repeats it."""
    about = about | {"seed": seed}
    run_sha256 = fingerprint([about, args.gzsl, args.tune])
    return about | {"run_sha256": run_sha256, "arguments": [*args.command, *more]}


def claim(out, about, args):
    """Clear `out` for the run that `about` describes → its result if it is finished there, else None.

    Raises InputError if a run is there that is neither this one, to be resumed, nor to be overwritten.
    """
    prepare_folder(out)
    if args.force:
        _clear(out)
    for path, kind in ((out / "result.json", "a finished"), (out / UNFINISHED / "run.json", "an unfinished")):
        if not path.exists():
            continue
        held = read_json(path)
        same = held.get("run_sha256") == about["run_sha256"]
        if not (args.resume and same):
            how = "; give --resume to go on with it," if same else ", not this one; give"
            raise InputError(f"{out}: holds {kind} run{how} --force to overwrite it, or another --out")
        print(f"{out}: holds {kind} run")
        if kind == "an unfinished":
            return None
        if held.pop("result_sha256", None) != fingerprint([held]):
            raise InputError(f"{path}: is not as this run wrote it; give --force to overwrite it")
        return held
    if (out / "model.pt").exists():
        raise InputError(f"{out}: holds a model.pt of no known run; give --force to overwrite it, "
                         f"or another --out")
    return None


def _clear(out):
    """Remove the run in a folder, and nothing else. Raises InputError."""
    try:
        for name in RUN_FILES:
            (out / name).unlink(missing_ok=True)
        if (out / UNFINISHED).is_dir():                         # rmtree would wait for a FIFO
            shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    except OSError as e:
        raise InputError(f"{out}: cannot be overwritten ({e.strerror}); choose another --out") from None


def finish(out, result):
    """Write result.json, with a hash of itself, and remove what only an unfinished run needs."""
    write_json(out / "result.json", result | {"result_sha256": fingerprint([result])})
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    for name in RUN_FILES:
        for part in out.glob(f"{name}.*.part"):                 # of a run that was killed
            part.unlink(missing_ok=True)
    print(f"written: {out / 'result.json'}")
    if result["synthetic"]:
        print(SYNTHETIC_NOTE)


# ------------------------------------------------------------------------------------------------- the report
def _compared(result):
    """The figures of the method and of ridge in a result → {name: zero-shot and generalized ones}."""
    parts = {result["method"]: result["zsl"] | {"gzsl": result["gzsl"]}}
    if result["method"] != "ridge":
        parts["ridge"] = result["ridge"]
    return {name: part | (part["gzsl"] or {}) for name, part in parts.items()}


def report(result, data):
    """The figures as a person reads them."""
    zsl, best = result["zsl"], result["best_on_test"]
    print(f"\nzero-shot accuracy on {zsl['n']} samples of {len(data.unseen)} unseen classes")
    for name, f in _compared(result).items():
        label = "ridge baseline" if name == "ridge" else name
        low, high = f["ci95"]
        mark = "   <- the result" if name == result["method"] else ""
        print(f"  {label:<16}{f['acc']:7.1%}   95 % [{low:.1%}, {high:.1%}]   "
              f"mean per class {f['per_class']:.1%}{mark}")
    print(f"  {'chance':<16}{zsl['chance']:7.1%}")
    if best:
        print(f"  {'best on test':<16}{best['acc']:7.1%}   epoch {best['epoch']:g}: "
              f"chosen on the test set; no result")
    if result["gzsl"]:
        _report_generalized(result)
    _report_classes(zsl, data)


def _report_generalized(result):
    """A line a method: the figures among all classes."""
    for name, f in _compared(result).items():
        print(f"  {name:<16}seen {f['seen']:.1%}  unseen {f['unseen']:.1%}  harmonic {f['harmonic']:.1%}  "
              f"AUSUC {f['ausuc']:.3f}   among all classes, γ {f['gamma']:.3f}")


def _report_classes(zsl, data):
    """A line an unseen class: its samples, its accuracy, and what it is mostly taken for."""
    print("per class")
    for c, counts, acc in zip(data.unseen, zsl["confusion"], zsl["class_acc"]):
        line = f"  {data.classes[c]:<36}{sum(counts):5d} samples"
        likeliest = data.unseen[int(np.argmax(counts))]
        if acc is not None:
            line += f" {acc:7.1%}"
            if likeliest != c:
                line += f"   mostly taken for {data.classes[likeliest]}"
        print(line)


def report_seeds(results):
    """Results of several seeds → {"METHOD FIGURE": spread}, printed too."""
    first, last = results[0], results[-1]
    print(f"\n{first['method']}, seeds {first['seed']} to {last['seed']}: "
          f"mean ± standard deviation [95 % interval of the mean], each seed")
    summary = {}
    for name, figures in _compared(first).items():
        for key in ("acc", "seen", "unseen", "harmonic", "ausuc"):
            if key in figures:
                summary[f"{name} {key}"] = zsar.spread([_compared(result)[name][key] for result in results])
    for key, s in summary.items():
        form = ".3f" if "ausuc" in key else ".1%"
        low, high = (format(v, form) for v in s["ci95"])
        each = " ".join(format(v, form) for v in s["each"])
        print(f"  {key:<20}{format(s['mean'], form):>6} ± {format(s['std'], form)}  [{low}, {high}]   {each}")
    return summary


# ------------------------------------------------------------------------------------------------- prediction
def predict(args):
    """A trained run and new sequences → the best of any classes for each, in predictions.csv."""
    out = args.out or args.run / "predictions.csv"
    picture = out.with_suffix(".png")
    if args.plot:
        load_matplotlib()
    if args.plot and out == picture:
        raise InputError(f"--out {out}: is where --plot draws; give the table another name")
    refuse_overwriting([out, picture] if args.plot else [out], args.force)
    trained = read_trained(args.run / "model.pt")
    device = pick_device(args.device, trained["settings"].get("fp32"))
    names, text = candidates(trained, args.classes)
    samples, features, skeletons = new_samples(args.data, trained, device)  # names of N samples, (N, 256)
    model = rebuild(trained["method"], text, trained["settings"], trained["state"]).to(device)
    scores = model.scores(features, torch.arange(len(names), device=device))    # (N, K)
    if not scores.isfinite().all():
        raise InputError(f"{args.run / 'model.pt'}: scores {args.data} with what is no number; train it anew")
    rows = [_prediction(sample, s, names) for sample, s in zip(samples, scores)]
    write_table(out, [("sample", "class", "score", "margin", "top5"), *rows])
    print(f"{trained['method']}: {len(rows)} sequences among {len(names)} classes")
    widths = [max(map(len, column)) for column in zip(*rows[:10])]
    for sample, name, _, margin, _ in rows[:10]:
        print(f"  {sample:<{widths[0]}}  {name:<{widths[1]}}  margin {margin}")
    print(f"written: {out}")
    if args.plot:
        title, result = f"{args.run.resolve().name} on {args.data}", args.run / "result.json"
        if result.exists() and read_json(result).get("synthetic"):
            title = f"{title}; the run was trained on\n{SYNTHETIC_NOTE}"
        draw([picture], paint_predictions, title, samples, scores, names, skeletons)


def refuse_overwriting(paths, force):
    """Raise InputError where one of the files is there, unless it may be overwritten."""
    for path in paths:
        if path.exists() and not force:
            raise InputError(f"{path}: is there already; give --force to overwrite it, or move it")


def read_trained(path):
    """A run's model.pt, its parts checked against each other → dict of MODEL_KEYS. Raises InputError."""
    trained = read_tensors(path, MODEL_KEYS)
    with parts_of(path):
        names, text, encoder = trained["classes"], trained["text"], trained["encoder"]
        if not all(isinstance(name, str) for name in names) or any(len(names) != len(part) for part in text):
            raise ValueError(f"{len(names)} class names, text of {len(text[0])} classes")
        parts = trained["method"], text, trained["settings"], trained["state"]
        if trained["settings"].get("depth", 0) > len(trained["state"]):
            raise ValueError(f"{trained['settings']['depth']} blocks, weights of fewer")
        with torch.device("meta"):                              # shapes alone, in no memory
            rebuild(*parts)
        model = rebuild(*parts)
        model.scores(torch.zeros(1, FEATURES), torch.arange(len(names)))
        if encoder:
            frames, *joints_and_persons = trained["shape"]
            if not all(type(size) is int and size > 0 for size in trained["shape"]):
                raise ValueError(f"shape {trained['shape']}")
            with torch.device("meta"):                          # shapes alone
                rebuild_encoder(encoder, *joints_and_persons)
    return trained


def _prediction(sample, scores, names):
    """A sample's name and scores (K,) → its row of predictions.csv."""
    top, order = scores.topk(min(5, len(names)))
    best = [names[k] for k in order.tolist()]
    margin = f"{(top[0].item() - top[1].item()):.6g}" if len(top) > 1 else ""
    return sample, best[0], f"{top[0].item():.6g}", margin, " | ".join(best)


def candidates(trained, files):
    """The names of the K classes to choose from, and their text, a list of (K, 1+L, D).

    They are the run's, or those of the files. One file serves all prompts of the run. The names stand beside
    FILE.npy in FILE.txt, one a line. Raises InputError.
    """
    if not files:
        return trained["classes"], trained["text"]
    text, theirs = [torch.tensor(read_text(path)) for path in files], trained["text"]
    if len(text) not in (1, len(theirs)):
        raise InputError(f"--classes: {len(text)} files; the run has {len(theirs)} prompts: "
                         f"give a file each or one for all")
    K, D, rows = len(text[0]), theirs[0].shape[-1], max(2, *(t.shape[1] for t in theirs))
    for path, prompt in zip(files, text):
        if len(prompt) != K or prompt.shape[-1] != D or prompt.shape[1] > rows:
            raise InputError(f"{path}: shape is {tuple(prompt.shape)}; the run needs "
                             f"({K}, up to {rows}, {D}): embed with its model")
    names_file = files[0].with_suffix(".txt")
    names = read_lines(names_file) if names_file.exists() else [f"class {k}" for k in range(K)]
    if len(names) != K:
        raise InputError(f"{names_file}: names {len(names)} classes, {files[0]} has {K}; give a line each")
    return names, text * (len(theirs) // len(text))


def new_samples(folder, trained, device):
    """The samples in a folder, .skeleton files or rows of an array → their N names, features, and themselves.

    Features are (N, 256), skeletons (N, 3, T, V, M), or None where features are given. Raises InputError.
    """
    files = sorted(folder.glob("*.skeleton"))
    layout = list(FORMATS)[0] if files else find_format(folder, list(FORMATS)[:2])
    if "features" in layout:
        features, _ = read_samples(folder / "features.npy", layout)
        return _row_names(features), torch.as_tensor(features, dtype=torch.float32, device=device), None
    if not trained["encoder"]:
        raise InputError(f"{folder}: holds skeletons, and the run was trained on ready features; "
                         f"give such features")
    T, V, M = trained["shape"]
    if files:
        names, skeletons = _read_skeleton_files(folder, files, T)
        torsos = measured_torsos(folder, skeletons)
    else:
        skeletons, torsos = read_samples(folder / "skeletons.npy", layout)      # (N, 3, T', V, M')
        names = _row_names(skeletons)
    for line in odd_torsos(torsos):
        note(f"{folder}: {line}")
    if skeletons.shape[3] != V:
        raise InputError(f"{folder}: has {skeletons.shape[3]} joints, the run's encoder was trained on {V}")
    encoder = rebuild_encoder(trained["encoder"], V, M).to(device)
    features = torch.empty(len(skeletons), FEATURES, device=device)
    for first, part in pieces(skeletons, 32):
        absent = max(0, M - part.shape[4])                      # as many persons as in training
        part = np.pad(part, [(0, 0)] * 4 + [(0, absent)])[..., :M]
        part = torch.from_numpy(to_common_frame(part, GRAPHS[V])).to(device)
        features[first:first + 32] = encode_all(encoder, part)
    return names, features, skeletons


def _row_names(array):
    """Names for the rows of an array."""
    return [f"row {n}" for n in range(len(array))]


def _read_skeleton_files(folder, files, frames):
    """The .skeleton files of a folder → names, skeletons (N, 3, frames, 25, 2). Broken ones are told."""
    names, read, skipped = [], [], []
    for path in files:
        try:
            read.append(read_ntu(path, frames))
            names.append(path.name)
        except (OSError, ValueError) as e:
            skipped.append(f"{path.name}: {getattr(e, 'strerror', None) or e}")
    if not read:
        raise InputError(f"{folder}: none of its {len(files)} .skeleton files could be read; {skipped[0]}")
    if skipped:
        note(f"{folder}: {len(skipped)} of {len(files)} files skipped; {'; '.join(skipped[:3])}")
    return names, np.stack(read)


# --------------------------------------------------------------------------------------------------- pictures
BLUE, ORANGE, SKY = "#0072B2", "#E69F00", "#56B4E9"             # Okabe and Ito's, which differ in grey too
LINES = ((BLUE, "-"), (ORANGE, "--"), ("#009E73", "-."), ("#CC79A7", ":"), (SKY, (0, (6, 2))))
SIDES = ((0, "middle", "black", 1), (1, "left", BLUE, 3), (-1, "right", ORANGE, 3))     # of a drawn body
LETTERS = {"font.size": 9, "svg.fonttype": "none", "text.parse_math": False}            # text, also with $


def plot(args):
    """`plot`: finished runs, or one sequence as it was recorded, as a picture. Raises InputError."""
    if args.data:
        stem, paint = Path(f"{args.data.resolve().name}_row{args.row}"), paint_sequence
        source, shown = args.data, read_sequence(args.data, args.row)
    else:
        source, shown = " or ".join(map(str, args.runs)), []
        with parts_of(source):
            for folder in args.runs:
                result = read_json(folder / "result.json")
                shown += result.get("seeds", [result])
            if len({result["data_sha256"] for result in shown}) > 1:
                raise InputError(f"{source}: other data, text or split; compare runs on the same")
        stem, paint = args.runs[0] / "figures", paint_run
        if len(shown) > 1:
            stem, paint = args.runs[0] / "comparison", paint_comparison
    paths = [Path(f"{stem}.{kind}") for kind in ("png", "svg")[:1 + args.svg]]
    refuse_overwriting(paths, args.force)
    with parts_of(source):
        draw(paths, paint, *shown)


def load_matplotlib():
    """matplotlib, which pictures alone need. Raises InputError where it is missing."""
    try:
        import matplotlib.collections
        import matplotlib.figure
    except ImportError:
        raise InputError("matplotlib is missing; pip install -e '.[plot]'") from None
    return matplotlib


def draw(paths, paint, *shown):
    """Let paint(figure, *shown) draw, without a screen, and write the figure as .png or .svg."""
    matplotlib = load_matplotlib()
    with matplotlib.rc_context(LETTERS):
        figure = matplotlib.figure.Figure(layout="constrained")
        paint(figure, *shown)
        for path in paths:
            write_file(path, lambda f: figure.savefig(f, format=path.suffix[1:], dpi=100))
            print(f"written: {path}")


def paint_run(figure, result):
    """A run: confusion and accuracy of each unseen class; below them the seen–unseen curve, the training."""
    classes, K = result["unseen_classes"], len(result["unseen_classes"])
    confusion = np.array(result["zsl"]["confusion"], float).reshape(K, K)
    hits, count = confusion.diagonal(), confusion.sum(1)
    width, height = max(7, 0.27 * K), max(2.4, 0.22 * K)
    figure.set_size_inches(width + 6 + 0.08 * max(map(len, classes)), height + 6)
    figure.suptitle(f"{result['note'] or ''}\n{_name(result)}: {result['zsl']['acc']:.1%} among the unseen "
                    f"classes, ridge {result['ridge']['acc']:.1%}, chance {1 / K:.1%}".strip())
    above, below = figure.subfigures(2, 1, height_ratios=[height + 1, 4])
    matrix, bars = above.subplots(1, 2, sharey=True, width_ratios=[width, 3])
    _paint_confusion(matrix, classes, confusion)
    for k in np.flatnonzero(count):
        _paint_bar(bars, k, hits[k] / count[k], zsar.wilson_interval(hits[k], count[k]))
    bars.set(title="accuracy, 95 % interval", xlim=(0, 1))
    generalized, loss, test = below.subplots(1, 3)
    figures = _compared(result)
    _paint_generalized(generalized, {name: f["gzsl"] for name, f in figures.items() if f["gzsl"]})
    epochs, losses, accs = np.array([list(point.values()) for point in result["history"]]).reshape(-1, 3).T
    loss.plot(epochs, losses, color=BLUE, marker=".")
    test.plot(epochs, accs, color=BLUE, marker=".")
    loss.set(title="training loss", xlabel="epoch")
    test.set(title="accuracy on the TEST set:\nto look at, it chooses nothing", xlabel="epoch", ylim=(0, 1))


def _name(result):
    """What a result is of."""
    return f"{result['method']} on {result['dataset']}, split {result['split']}, seed {result['seed']}"


def _paint_confusion(ax, classes, confusion):
    """How many samples of each class, a row, were taken for each, a column."""
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    ax.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, column in np.argwhere(confusion):
        colour = "white" if share[row, column] > 0.5 else "black"
        ax.text(column, row, f"{confusion[row, column]:.0f}", size=7, color=colour, ha="center", va="center",
                in_layout=False)
    numbers = range(1, len(classes) + 1)                        # names would not fit under the columns
    ax.set_xticks(range(len(classes)), numbers)
    ax.set_yticks(range(len(classes)), [f"{name}  {number}" for name, number in zip(classes, numbers)])
    ax.set(title="samples of each class, and what they were taken for", xlabel="taken for class")


def _paint_bar(ax, row, acc, ends):
    """A bar with its interval, and both in figures beside it."""
    ax.barh(row, acc, 0.7, color=SKY)
    ax.plot(ends, [row, row], color="black", linewidth=1, marker="|")
    ax.text(1.02, row, f"{acc:.1%} [{ends[0]:.1%}, {ends[1]:.1%}]", va="center",
            transform=ax.get_yaxis_transform())


def _paint_generalized(ax, figures):
    """Seen–unseen curves with the chosen γ's points, of {name: generalized figures}."""
    for mean in (0.2, 0.4, 0.6, 0.8):
        seen = np.linspace(mean / (2 - mean), 1, 100)
        ax.plot(mean * seen / (2 * seen - mean), seen, color="0.8", linewidth=1)
        ax.text(1.01, seen[0], f"{mean:.0%}", size=7, color="0.4", va="center")
    for (name, f), (colour, dashes) in zip(figures.items(), itertools.cycle(LINES)):
        _, seen, unseen = np.array(f["curve"]).T
        label = f"{name}: AUSUC {f['ausuc']:.3f}, harmonic mean {f['harmonic']:.1%}"
        ax.plot(unseen, seen, color=colour, linestyle=dashes, label=label)
        ax.plot(f["unseen"], f["seen"], color=colour, marker="o", markeredgecolor="black")
    ax.set(title="among all classes, for every γ; •: the chosen γ\ngrey: equal harmonic means",
           xlabel="accuracy of unseen classes", ylabel="accuracy of seen classes", xlim=(0, 1), ylim=(0, 1))
    if figures:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2))
    else:
        ax.set_title("no seen–unseen curve: run without --gzsl")


def paint_comparison(figure, *results):
    """Results on the same data side by side: accuracy, ridge and chance; the seen–unseen curves."""
    names = [f"{result['method']}, seed {result['seed']}" for result in results]
    figure.set_size_inches(13, 4 + 0.4 * len(results))
    first = results[0]
    figure.suptitle(f"{first['note'] or ''}\n{first['dataset']}, split {first['split']}".strip())
    ax, generalized = figure.subplots(1, 2)
    for row, result in enumerate(results):
        _paint_bar(ax, row, result["zsl"]["acc"], result["zsl"]["ci95"])
        ax.vlines(result["ridge"]["acc"], row - 0.5, row + 0.5, color="black", linestyle="--",
                  label=None if row else "ridge, same encoder")
    ax.axvline(first["zsl"]["chance"], color="black", linestyle=":", label="chance")
    ax.set_yticks(range(len(results)), names)
    ax.invert_yaxis()
    ax.set(title="zero-shot accuracy, 95 % interval", xlim=(0, 1))
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    _paint_generalized(generalized, {name: r["gzsl"] for name, r in zip(names, results) if r["gzsl"]})


def paint_sequence(figure, name, x):
    """A sequence (3, T, V, M) as recorded, then in the common frame from the front and from the side."""
    common = to_common_frame(x[None], GRAPHS[x.shape[2]])[0]
    figure.set_size_inches(14, 10)
    figure.suptitle(name)
    axes = figure.subplots(3)
    _paint_poses(axes[0], x, "as recorded: x to the right, y up")
    _paint_poses(axes[1], common, "in the common frame: x to the right, y up")
    _paint_poses(axes[2], common, "in the common frame, from the side: z to the right, where toes point; if "
                 "they point to the left, left and right are exchanged", across=2)
    figure.legend(*axes[2].get_legend_handles_labels(), loc="outside lower center", ncols=3)


def _paint_poses(ax, x, title, across=0):
    """Eight poses of (3, T, V, M) along time, side by side; `across`: the coordinate to the right."""
    ax.set_title(title, loc="left")
    graph = GRAPHS[x.shape[2]]
    bones, side = np.array(graph.edges), zsar.sides(graph)      # (V - 1, 2), (V,)
    frames = np.unique(np.linspace(0, x.shape[1] - 1, 8).astype(int))
    present = x.any((0, 2))[frames]                             # (8, M)
    if not present.any():
        return ax.set(xticks=[], yticks=[], xlabel="nobody is there")
    poses = x[[across, 1]].transpose(1, 3, 2, 0)[frames][present]           # (n, V, 2), of who is there
    width, height = np.ptp(poses, (0, 1))
    step = max(1.15 * width, 0.6 * height, 1e-6)
    middle = poses[..., 0].min() + width / 2 + step * np.arange(len(frames))
    ax.set_xticks(middle, frames)
    for border in middle[1:] - step / 2:
        ax.axvline(border, color="0.8", linewidth=1)
    poses[..., 0] += step * np.nonzero(present)[0][:, None]
    for which, name, colour, thickness in SIDES:
        lines = poses[:, bones[side[bones[:, 0]] == which]].reshape(-1, 2, 2)
        ax.add_collection(load_matplotlib().collections.LineCollection(
            lines, colors=colour, linewidths=thickness, label=name))
    ax.autoscale_view()
    ax.set(aspect="equal", xlabel="frame", ylabel="metres expected")


def paint_predictions(figure, title, samples, scores, names, skeletons):
    """The first ten of N sequences: poses, and as bars the scores (N, K) of the best five of K classes.

    samples, names: those of sequences and classes; skeletons: (N, 3, T, V, M) or None.
    """
    best, order = zsar.standardised(scores[:10]).cpu().topk(min(5, len(names)))     # (n, 5) each
    columns = 1 if skeletons is None else 2
    figure.set_size_inches(8 * columns - 3 + 0.08 * max(map(len, names)), 2 + 1.6 * len(best))
    figure.suptitle(title)
    axes = figure.subplots(len(best), columns, squeeze=False)
    for n, bars in enumerate(axes[:, -1]):
        ranks = range(len(order[n]))
        bars.barh(ranks, best[n].tolist(), color=[SKY if rank else BLUE for rank in ranks])
        bars.set_yticks(ranks, [names[k] for k in order[n]])
        bars.invert_yaxis()
        bars.set_title(samples[n], loc="left")
        if columns == 2:
            x = to_common_frame(skeletons[n:n + 1], GRAPHS[skeletons.shape[3]])[0]
            _paint_poses(axes[n, 0], x, f"{samples[n]}, in the common frame: left blue, right orange")
    bars.set_xlabel(f"score: standard deviations above the mean of the {len(names)} classes")


# ------------------------------------------------------------------------------------------- the command line
def parse_arguments(argv):
    """Read the command line. Raises InputError on a wrong one."""
    parser = Parser(prog="train.py", allow_abbrev=False, description="Train and test a zero-shot method. "
                    "To label sequences: train.py predict --help")
    _add_run_options(parser)
    _add_settings(parser.add_argument_group("settings of a method"))
    _add_ablations(parser.add_argument_group("ablations of the papers"))
    args, command = parser.parse_args(argv), _what_is_run(argv)
    if args.config:
        stored = read_json(args.config).get("arguments")
        if not isinstance(stored, list):
            raise InputError(f"{args.config}: is no result.json of a run")
        stored = _what_is_run(map(str, stored))                 # where to counts only when typed
        if args.epochs or args.steps:
            stored = _without(stored, ("--epochs", "--steps"))
        try:
            args = parser.parse_args([*stored, *argv])          # of two, the later option counts
        except InputError as e:
            raise InputError(f"{args.config}: {e}") from None
        command = [*stored, *command]
    args.command = command
    if args.tune and args.method == "ridge":
        parser.error("--tune: ridge has no learning rate; leave it out")
    if not args.list and not (args.method and args.split):
        parser.error("--method and --split are needed")
    return args


def _what_is_run(command):
    """A command line without what says where to, and without what only tells: --out, --config, --list ..."""
    return _without(command, ("--out", "--config"), ("--force", "--resume", "--list", "--help", "-h"))


def _without(command, options, flags=()):
    """A command line without some options and flags."""
    parser = Parser(add_help=False, allow_abbrev=False)
    for option in options:
        parser.add_argument(option)
    for flag in flags:
        parser.add_argument(flag, action="store_true")
    return parser.parse_known_args(list(command))[1]


def _add_run_options(parser):
    """What is run, on what, and where the results go."""
    add = parser.add_argument
    add("--list", action="store_true", help="show the published splits")
    add("--method", choices=["dvta", "tdsm", "ridge"])
    add("--split", help="55_5, 48_12, ... or a name in the folder's splits.json")
    add("--data", default="synthetic", help="a dataset folder (default: the embedded synthetic set)")
    add("--text", type=Path, nargs="+", default=(), metavar="FILE",
        help="text features of all classes, a file a prompt")
    add("--gzsl", action="store_true",
        help="also figures over seen and unseen classes, from a validation run")
    add("--tune", action="store_true",
        help="first choose learning rate and epochs or steps on the validation classes")
    add("--out", type=Path, help="folder for results (default: runs/DATASET_SPLIT_METHOD_seedN...)")
    add("--config", type=Path, metavar="RESULT.json", help="repeat that run; other options given change it")
    there = parser.add_mutually_exclusive_group()
    there.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    there.add_argument("--force", action="store_true", help="overwrite the run in the folder")
    add("--seed", type=_number(int, 0), default=0)
    add("--seeds", type=int, choices=range(1, 11), metavar="1..10", default=1,
        help="how many, from --seed on")
    add("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
    add("--fp32", action="store_const", const=True, help="on CUDA: no bfloat16, no TF32, no torch.compile")
    add("--encoder", choices=["stgcn", "shiftgcn"], default="stgcn", help="default: stgcn")
    add("--encoder-preset", choices=["ours", "published"], default="ours",
        help="how the encoder is trained (default: ours)")
    add("--encoder-epochs", type=_number(int, 1))


def _add_settings(group):
    """Settings that change a preset."""
    length = group.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=_number(int, 1), help="dvta, tdsm")
    length.add_argument("--steps", type=_number(int, 1), help="dvta, tdsm: in place of epochs")
    group.add_argument("--batch-size", type=_number(int, 2), help="dvta, tdsm")
    group.add_argument("--lr", type=_number(float, 1e-12), help="dvta, tdsm")
    group.add_argument("--width", type=_number(int, 1), help="tdsm")
    group.add_argument("--depth", type=_number(int, 1), help="tdsm")
    group.add_argument("--heads", type=_number(int, 1), help="tdsm")


def _add_ablations(group):
    """Settings that take a part of a method away."""
    add = group.add_argument
    add("--no-sde", dest="sde", action="store_const", const=False, help="dvta: the mean of the prompts")
    add("--only", choices=["da", "aa"], help="dvta: one alignment alone")
    add("--no-triplet", dest="lam", action="store_const", const=0.0, help="tdsm: λ = 0")
    add("--prediction", choices=["epsilon", "sample", "v_prediction"], help="tdsm: what is predicted")
    add("--noises", type=_number(int, 1), help="tdsm: noises averaged in a score")
    add("--timestep", type=_number(int, 0), help="tdsm: of inference, 0 to 49")
    add("--conditions", choices=["both", "pooled", "tokens"], help="tdsm: what of the text it sees")
    add("--no-standardise", dest="standardise", action="store_const", const=False,
        help="dvta, tdsm: features as they are")
    add("--no-centre", dest="centre", action="store_const", const=False,
        help="dvta, tdsm: prompts as they are")
    add("--no-unit-text", dest="unit_text", action="store_const", const=False,
        help="tdsm: text at the scale it has")
    add("--no-augment", dest="augment", action="store_const", const=False,
        help="encoder: training sequences as they are")


def predict_arguments(argv):
    """Read the command line of `predict`. Raises InputError on a wrong one."""
    parser = Parser(prog="train.py predict",
                    description="Label sequences with a trained run, among any classes.")
    add = parser.add_argument
    add("--run", type=Path, required=True, help="the folder of a finished run")
    add("--data", type=Path, required=True,
        help="a folder with skeletons.npy, features.npy or .skeleton files")
    add("--classes", type=Path, nargs="+", default=(), metavar="FILE",
        help="text features of the classes to choose from")
    add("--out", type=Path, help="default: predictions.csv in the run's folder")
    add("--plot", action="store_true",
        help="also draw the first ten sequences with their best classes, into a .png beside the table")
    add("--force", action="store_true", help="overwrite these files")
    add("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
    return parser.parse_args(argv)


def plot_arguments(argv):
    """Read the command line of `plot`. Raises InputError on a wrong one."""
    parser = Parser(prog="train.py plot", description="Draw runs, or one sequence. Needs matplotlib.")
    add = parser.add_argument
    add("runs", type=Path, nargs="*", metavar="RUN",
        help="a finished run's folder: figures.png there; of several: comparison.png in the first")
    add("--data", type=Path, help="a folder with skeletons: FOLDER_rowN.png in the current folder")
    add("--row", type=_number(int, 0), help="which of its sequences, from 0")
    add("--svg", action="store_true", help="also as .svg")
    add("--force", action="store_true", help="overwrite the pictures")
    args = parser.parse_args(argv)
    if bool(args.runs) == bool(args.data) or (args.row is None) == bool(args.data):
        parser.error("either name runs, or --data and --row")
    return args


def _number(kind, least):
    """An argument type: an int or float from `least` up to 2⁶³."""
    def parse(text):
        value = kind(text)
        if not least <= value < 2 ** 63:
            raise argparse.ArgumentTypeError(f"{text} is out of range, from {least} to 2⁶³")
        return value
    parse.__name__ = kind.__name__                              # argparse names it in its message
    return parse


def pick_device(name, fp32):
    """The device of that name, or None: cuda if there is one; of torchrun's processes each has a GPU.

    There float32 products are TF32's, which drops 13 of 23 bits, unless fp32. Raises InputError where there
    is no such device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch finds no CUDA device here; use --device cpu, "
                         "or install a CUDA build of torch")
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not fp32
    if device.type == "cuda" and dist.is_initialized():
        device, count = torch.device("cuda", int(os.environ["LOCAL_RANK"])), torch.cuda.device_count()
        if device.index >= count:
            raise InputError(f"torchrun started more processes than there are GPUs, {count}; "
                             f"start fewer, or give --device cpu")
        torch.cuda.set_device(device)
    return device


def precision_of(device, fp32):
    """In what numbers a run computes, to be said: on CUDA bfloat16 in TDSM and encoders' training."""
    if device.type == "cuda" and not fp32:
        return "bfloat16 and TF32"
    return "float32"


def choose_settings(args, data, device):
    """The preset, changed by the command line → {"encoder": {...}, METHOD: {...}}, and what was given.

    Raises InputError where a setting is none of the method's or does not fit.
    """
    settings = dict(PRESETS[data.preset])
    known, given = settings[args.method], {}
    for name, value in vars(args).items():
        if value is not None and (name in settings["dvta"] or name in settings["tdsm"]):
            given[name] = value
    strange = sorted(set(given) - set(known))
    if strange:
        raise InputError(f"--method {args.method} has no setting {', '.join(strange)}; leave it out")
    settings[args.method] = known | given
    if args.epochs or args.steps:                               # the other of the two no longer counts
        settings[args.method] |= {"epochs": args.epochs, "steps": args.steps}
    if device.type == "cuda" and len(data.train) >= MANY_SAMPLES:
        settings["encoder"] = settings["encoder"] | ENCODER_ON_CUDA
    settings["encoder"] = _encoder_settings(args, settings["encoder"])
    tdsm = settings["tdsm"]
    if tdsm["width"] % tdsm["heads"]:
        raise InputError(f"--width {tdsm['width']} cannot be shared by {tdsm['heads']} heads; "
                         f"choose a multiple")
    if tdsm["timestep"] >= STEPS:
        raise InputError(f"--timestep {tdsm['timestep']}: the diffusion has timesteps 0 to {STEPS - 1}")
    return settings, given


def _refuse_too_large(tdsm, data, device):
    """Raise InputError where a denoiser and its training, or its noised test samples, exceed the memory."""
    per_block = 4 * 4 * 36 * tdsm["width"] ** 2 + 100_000       # weight, gradient, AdamW's two; the modules
    per_noise = 2 * 4 * FEATURES * (len(data.unseen_test) + len(data.seen_test))
    needed = tdsm["depth"] * per_block + tdsm["noises"] * per_noise
    there = math.inf
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf"):                                # not on Windows
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise InputError(f"--width {tdsm['width']}, --depth {tdsm['depth']}, --noises {tdsm['noises']}: some "
                         f"{needed >> 30:,} GiB, the {device.type} has {there / 2 ** 30:.0f}; choose less")


def _encoder_settings(args, preset):
    """The encoder's settings: the dataset's preset or the published one, changed by the command line."""
    settings = preset | {"encoder": args.encoder}
    if args.encoder_preset == "published":
        settings = PUBLISHED_ENCODERS[args.encoder]
    if args.encoder_epochs:
        settings = settings | {"epochs": args.encoder_epochs, "steps": None}
    if args.augment is not None:
        settings = settings | {"augment": args.augment}
    if args.fp32:
        settings = settings | {"fp32": True}
    return settings


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
