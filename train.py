"""Train and test a zero-shot method from the command line, from data to figures.

    python train.py --method dvta --split 55_5                              the embedded synthetic set
    python train.py --method dvta --split 22_6_a --data path/to/folder      your data (README, "Your own data")

Steps: read the data; train the ST-GCN encoder on seen classes, or take it from the cache; train the method on its features;
score the unseen test samples; print a table and write result.json. (methods.md section 6 is the protocol.)
"""
import argparse
import contextlib
import hashlib
import inspect
import json
import math
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import zsar
from alignment import DVTA
from data import InputError, preprocess, read_data

# Everything that is tuned stands here. For NTU and PKU: DVTA's published settings (methods.md section 3); their encoder's are not
# published. For synthetic and other, small data: chosen on validation classes, never on unseen ones (README, "Figures").
ENCODER = {"epochs": 30, "batch_size": 64, "lr": 3e-3}
PRESETS = {
    "ntu60": {"encoder": ENCODER, "dvta": {"epochs": 100, "batch_size": 128, "lr": 1e-6}},
    "ntu120": {"encoder": ENCODER, "dvta": {"epochs": 100, "batch_size": 128, "lr": 5e-6}},
    "pku51": {"encoder": ENCODER, "dvta": {"epochs": 100, "batch_size": 128, "lr": 1e-5}},
    "synthetic": {"encoder": {"epochs": 9, "batch_size": 16, "lr": 3e-3}, "dvta": {"epochs": 3, "batch_size": 32, "lr": 1e-4}},
    "other": {"encoder": {"epochs": 30, "batch_size": 16, "lr": 3e-3}, "dvta": {"epochs": 30, "batch_size": 32, "lr": 3e-4}},
}
RIDGE = {"lam": 300}
WARM_UP = 0.15        # of all steps: 15 of the paper's 100 epochs
SYNTHETIC_NOTE = "SYNTHETIC DATA: made motions, not recordings. These figures say nothing about NTU RGB+D."


def main(argv=None):
    """The command line. Bad input gives one line on standard error and exit status 2."""
    try:
        run(parse_arguments(argv))
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


def run(args):
    """Data → encoder → method → figures → files."""
    device = pick_device(args.device)
    data = read_data(args.data, args.split)
    settings = choose_settings(args, data)
    out = prepare_folder(args.out or Path("runs") / run_name(args, data))
    if data.synthetic:
        print(SYNTHETIC_NOTE)
    print(f"{args.method} on {data.name}, split {data.split}: {len(data.seen)} seen and {len(data.unseen)} unseen classes; "
          f"samples: {len(data.train)} training, {len(data.seen_test)} seen test, {len(data.unseen_test)} unseen test; {device}")

    features, encoder = encode(data, settings["encoder"], args.seed, device, cache=out.parent / "encoders")   # (N, 256)
    labels = torch.as_tensor(data.labels, device=device)                  # (N,)
    text = [torch.as_tensor(t, device=device) for t in data.text]         # [(C, 1+L, D), ...]
    x, y = features[data.train], labels[data.train]

    def test(model):
        unseen = torch.as_tensor(data.unseen, device=device)
        return zsar.zsl_figures(model.scores(features[data.unseen_test], unseen), data.labels[data.unseen_test], data.unseen)

    ridge = zsar.Ridge(text, settings["ridge"]["lam"]).to(device)
    start = time.perf_counter()
    ridge.fit(x, y)
    ridge_seconds, ridge_figures = time.perf_counter() - start, test(ridge)

    if args.method == "ridge":
        model, train_seconds, best = ridge, ridge_seconds, {"acc": ridge_figures["acc"], "epoch": None}
    else:
        with seeded(args.seed, device):
            model = DVTA(text, sde=not args.no_sde, da=args.only != "aa", aa=args.only != "da").to(device)
            train_seconds, best = train_method(model, x, y, settings["dvta"], args.seed, test)
    start = time.perf_counter()
    figures = test(model)

    result = {
        "method": args.method, "dataset": data.name, "synthetic": data.synthetic, "split": data.split, "seed": args.seed,
        "device": str(device), "zsl": figures, "best_on_test": best,
        "ridge": {"acc": ridge_figures["acc"], "per_class": ridge_figures["per_class"]},
        "encoder": {key: encoder[key] for key in ("seen_test_acc", "cached", "file")},
        "seconds": {"encoder": encoder["seconds"], "train": train_seconds, "test": time.perf_counter() - start},
        "config": {"data": str(args.data), "unseen": data.unseen.tolist(), "no_sde": args.no_sde, "only": args.only,
                   "encoder": settings["encoder"], args.method: settings[args.method]},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}}
    if data.synthetic:
        result["note"] = SYNTHETIC_NOTE
    save(out / "model.pt", lambda f: torch.save({"method": args.method, "config": result["config"],
                                                 "state": model.state_dict()}, f))
    save(out / "result.json", lambda f: f.write((json.dumps(result, indent=1) + "\n").encode()))
    print_table(result, data)
    print(f"written: {out / 'result.json'}, {out / 'model.pt'}")
    if data.synthetic:
        print(SYNTHETIC_NOTE)


# ---------------------------------------------------------------------------------------------------- command line
def parse_arguments(argv=None):
    """Read the command line. Raises InputError on a wrong one."""
    parser = argparse.ArgumentParser(description="Zero-shot skeleton action recognition: train and test a method.")
    parser.add_argument("--method", required=True, choices=["dvta", "ridge"])
    parser.add_argument("--split", required=True, help="55_5, 48_12, ... or a name in the folder's splits.json")
    parser.add_argument("--data", default="synthetic", help="a dataset folder (default: the embedded synthetic set)")
    parser.add_argument("--out", type=Path, help="folder for results (default: runs/DATASET_SPLIT_METHOD_seedN)")
    parser.add_argument("--seed", type=number(int, 0), default=0)
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
    parser.add_argument("--epochs", type=number(int, 1), help="of the method; default by dataset, as for the next three")
    parser.add_argument("--batch-size", type=number(int, 2))
    parser.add_argument("--lr", type=number(float, 1e-12))
    parser.add_argument("--encoder-epochs", type=number(int, 1))
    parser.add_argument("--no-sde", action="store_true", help="DVTA ablation: the mean of the prompts instead of SDE")
    parser.add_argument("--only", choices=["da", "aa"], help="DVTA ablation: one alignment alone")

    def error(message):
        raise InputError(f"{message}; python train.py --help lists the options")

    parser.error = error
    args = parser.parse_args(argv)
    if args.method == "ridge" and (args.no_sde or args.only or args.epochs or args.batch_size or args.lr):
        error("ridge has a closed form: --epochs, --batch-size, --lr, --no-sde and --only are for --method dvta")
    return args


def number(kind, least):
    """An argument type: an int or float from `least` up to 2⁶³."""
    def parse(text):
        value = kind(text)
        if not least <= value < 2 ** 63:
            raise argparse.ArgumentTypeError(f"{text} is out of range, at least {least}")
        return value
    parse.__name__ = kind.__name__                                        # argparse names it in its message
    return parse


def pick_device(name):
    """"cuda", "cpu" or None (cuda if there is one) → torch.device. Raises InputError for cuda where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch finds no CUDA device here; use --device cpu, or install a CUDA build of torch")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def choose_settings(args, data):
    """The preset of the dataset with what the command line overrides → {"encoder": ..., "dvta": ..., "ridge": ...}."""
    preset = PRESETS.get(data.name, PRESETS["other"])
    given = {"epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr}
    return {"encoder": preset["encoder"] | ({"epochs": args.encoder_epochs} if args.encoder_epochs else {}),
            "dvta": preset["dvta"] | {key: value for key, value in given.items() if value}, "ridge": RIDGE}


def run_name(args, data):
    """The default folder name of a run."""
    ablation = ("_no-sde" if args.no_sde else "") + (f"_only-{args.only}" if args.only else "")
    return f"{data.name}_{data.split}_{args.method}{ablation}_seed{args.seed}"


# ---------------------------------------------------------------------------------------------------- encoder
def encode(data, settings, seed, device, cache):
    """Features (N, 256) of every sample on the device, and {"seen_test_acc", "cached", "file", "seconds"}.

    Ready features are taken as they are. Skeletons go through an ST-GCN trained on the training samples, then frozen; it is
    cached under a key made from everything that it depends on.
    """
    start = time.perf_counter()
    if data.skeletons is None:
        features = torch.tensor(data.features, dtype=torch.float32, device=device)
        return features, {"seen_test_acc": None, "cached": False, "file": None, "seconds": 0.0}
    path = cache / f"{encoder_key(data, settings, seed, device)}.pt"
    cached = path.exists()
    if cached:
        saved = torch.load(path, map_location=device, weights_only=True)
        print(f"encoder: from {path}")
    else:
        with seeded(seed, device):
            saved = train_encoder(data, settings, seed, device)
        prepare_folder(cache)
        save(path, lambda f: torch.save(saved, f))
    if saved["seen_test_acc"] is not None:
        print(f"encoder: {saved['seen_test_acc']:.1%} on seen test samples, {len(data.seen)} classes")
    return saved["features"], {"seen_test_acc": saved["seen_test_acc"], "cached": cached, "file": str(path),
                               "seconds": time.perf_counter() - start}


def encoder_key(data, settings, seed, device):
    """A hash of all that the encoder's weights and features depend on: samples, rows, labels, settings, seed, code, library."""
    h = hashlib.sha256()
    for i in range(0, len(data.skeletons), 1024):
        h.update(np.ascontiguousarray(data.skeletons[i:i + 1024]))
    for array in (data.labels, data.seen, data.train, data.seen_test):
        h.update(array.astype(np.int64))
        h.update(b"|")
    code = [inspect.getsource(part) for part in (zsar, preprocess, train_encoder, fit)]
    h.update(json.dumps([data.skeletons.shape, str(data.skeletons.dtype), settings, seed, device.type, torch.__version__,
                         *code]).encode())
    return h.hexdigest()[:16]


def train_encoder(data, settings, seed, device):
    """Train an ST-GCN with cross-entropy on the training samples (methods.md section 2), then encode all samples.

    → {"state": weights, "features": (N, 256), "seen_test_acc": accuracy among the seen classes, None without such samples}
    """
    N, _, T, V, M = data.skeletons.shape
    graph = zsar.GRAPHS[V]
    x = torch.empty(data.skeletons.shape, device=device)                  # (N, 3, T, V, M)
    for i in range(0, N, 1024):                                           # in pieces: the file may be larger than memory
        x[i:i + 1024] = torch.from_numpy(preprocess(data.skeletons[i:i + 1024], graph))
    y = torch.as_tensor(np.searchsorted(data.seen, data.labels), device=device)   # (N,) place among the seen classes
    train = torch.as_tensor(data.train, device=device)
    encoder = zsar.STGCN(graph, V, len(data.seen)).to(device)
    optimizer = torch.optim.AdamW(encoder.parameters(), settings["lr"])

    def loss(rows):
        return F.cross_entropy(encoder.classify(x[rows]), y[rows])

    fit("encoder", encoder, loss, optimizer, train, settings, seed)
    settle_batch_norm(encoder, x, train)
    encoder.eval()
    with torch.no_grad():
        features = torch.cat([encoder(part) for part in x.split(256)])    # (N, 256)
        hit = encoder.classifier(features[data.seen_test]).argmax(1) == y[data.seen_test]
    return {"state": encoder.state_dict(), "features": features,
            "seen_test_acc": hit.float().mean().item() if len(hit) else None}


@torch.no_grad()
def settle_batch_norm(encoder, x, train):
    """Measure every BatchNorm's mean and variance again on the training samples, with dropout off.

    Dropout raises the variance that the next BatchNorm sees in training; with the running statistics of training, a short
    run loses a third of its accuracy at test time.
    """
    encoder.eval()
    for module in encoder.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None                                        # a plain average over the batches
            module.train()
    for rows in train.tensor_split(math.ceil(len(train) / 256)):          # of equal size, for they weigh the same
        encoder(x[rows])


# ---------------------------------------------------------------------------------------------------- training
def train_method(model, x, y, settings, seed, test):
    """Train a method on features x (n, 256) and class ids y (n,) with Adam → seconds, and the best-on-test figure.

    `test(model)` gives ZSL figures after each epoch; they are reported and choose nothing: the last epoch is the headline.
    """
    optimizer = torch.optim.Adam(model.parameters(), settings["lr"])
    best = {"acc": -1.0, "epoch": 0}

    def loss(rows):
        return model.loss(x[rows], y[rows])

    def after_epoch(epoch):
        acc = test(model)["acc"]
        if acc > best["acc"]:
            best.update(acc=acc, epoch=epoch)

    rows = torch.arange(len(x), device=x.device)
    return fit("dvta", model, loss, optimizer, rows, settings, seed, after_epoch), best


def fit(name, model, loss, optimizer, rows, settings, seed, after_epoch=lambda epoch: None):
    """Minimise loss(batch of rows) for settings["epochs"] epochs, with warm-up then cosine to 0 → seconds in training steps.

    Each epoch takes the rows in a new random order and drops the last, smaller batch. Raises InputError if the loss diverges.
    """
    epochs, batch_size = settings["epochs"], min(settings["batch_size"], len(rows))
    steps = len(rows) // batch_size                                       # an epoch
    total, generator, seconds = epochs * steps, torch.Generator().manual_seed(seed), 0.0
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_up_cosine(step, total))
    for epoch in range(1, epochs + 1):
        start = time.perf_counter()
        model.train()
        order = torch.randperm(len(rows), generator=generator).to(rows.device)
        losses = torch.zeros(steps, device=rows.device)
        for step, batch in enumerate(rows[order[:steps * batch_size]].view(steps, batch_size)):
            value = loss(batch)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            schedule.step()
            losses[step] = value.detach()
        mean = losses.mean().item()
        if not math.isfinite(mean):
            raise InputError(f"{name}: the loss is no longer finite in epoch {epoch}; lower the learning rate (--lr)")
        seconds += time.perf_counter() - start
        model.eval()
        after_epoch(epoch)
        print(f"{name} epoch {epoch}/{epochs}  loss {mean:.4f}  {seconds:.1f} s, "
              f"{seconds / epoch * (epochs - epoch):.0f} s left", flush=True)
    return seconds


def warm_up_cosine(step, total):
    """The learning rate's factor: linear warm-up over the first WARM_UP of all steps, then half a cosine to 0."""
    warm = WARM_UP * total
    return (step + 1) / (warm + 1) if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / (total - warm)))


@contextlib.contextmanager
def seeded(seed, device):
    """Seed the generators that layers draw from (initial weights, dropout), and put the caller's state back after."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


# ---------------------------------------------------------------------------------------------------- output
def prepare_folder(path):
    """Make a folder that results can be written to → its Path. Raises InputError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"{path}: no folder can be made there ({e.strerror}); choose another --out") from None
    return path


def save(path, write):
    """Write a file beside its place and rename it, so that no half-written file is ever seen."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as f:
            write(f)
        os.replace(part, path)
    except OSError as e:
        part.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({e.strerror}); free space or choose another --out") from None


def print_table(result, data):
    """The figures as a person reads them."""
    zsl, best, method = result["zsl"], result["best_on_test"], result["method"]
    print(f"\nzero-shot accuracy on {zsl['n']} samples of {len(data.unseen)} unseen classes")
    print(f"  {method:<20}{zsl['acc']:7.1%}   mean per class {zsl['per_class']:6.1%}   <- the result")
    if method != "ridge":
        print(f"  {'ridge baseline':<20}{result['ridge']['acc']:7.1%}   mean per class {result['ridge']['per_class']:6.1%}")
    print(f"  {'chance':<20}{zsl['chance']:7.1%}")
    if method != "ridge":
        print(f"  {'best on test':<20}{best['acc']:7.1%}   epoch {best['epoch']}: chosen on the test set, as the papers do; no result")
    print("per class")
    for k, c in enumerate(data.unseen):
        counts = zsl["confusion"][k]
        line = f"  {data.classes[c]:<36}{sum(counts):5d} samples"
        if sum(counts):
            likeliest = int(np.argmax(counts))
            line += f" {zsl['class_acc'][k]:7.1%}" + ("" if likeliest == k else f"   mostly taken for {data.classes[data.unseen[likeliest]]}")
        print(line)


if __name__ == "__main__":
    main()
