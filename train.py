"""Train and test a zero-shot method from the command line, from data to figures.

    python train.py --method dvta --split 55_5                              the embedded synthetic set
    python train.py --method tdsm --split 55_5                              the other method, on the same encoder
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

import diffusion
import zsar
from alignment import DVTA
from data import InputError, preprocess, read_data
from diffusion import TDSM

# Everything that is tuned stands here. For NTU and PKU: the published settings of DVTA and TDSM (methods.md sections 3, 4); their
# encoder's are not published. For synthetic and other, small data: chosen on validation classes, never on unseen ones (README).
ENCODER = {"epochs": 30, "batch_size": 64, "lr": 3e-3}
SMALL_ENCODER = ENCODER | {"batch_size": 16}
RIDGE = {"penalty": 300}
DVTA_PAPER = {"epochs": 100, "batch_size": 128, "lr": 1e-6, "sde": True, "only": None}
DVTA_SMALL = DVTA_PAPER | {"epochs": 30, "batch_size": 32, "lr": 3e-4}
TDSM_PAPER = {"width": 768, "depth": 12, "heads": 12, "steps": 50_000, "batch_size": 256, "lr": 1e-4, "triplet": True,
              "prediction": "epsilon", "noises": 3, "timestep": 25, "conditions": "both", "standardise": True, "fp32": False}
TDSM_SMALL = TDSM_PAPER | {"width": 128, "depth": 2, "heads": 2, "steps": 300, "batch_size": 64, "lr": 3e-4}
PRESETS = {
    "ntu60": {"encoder": ENCODER, "ridge": RIDGE, "dvta": DVTA_PAPER, "tdsm": TDSM_PAPER},
    "ntu120": {"encoder": ENCODER, "ridge": RIDGE, "dvta": DVTA_PAPER | {"lr": 5e-6}, "tdsm": TDSM_PAPER},
    "pku51": {"encoder": ENCODER, "ridge": RIDGE, "dvta": DVTA_PAPER | {"lr": 1e-5}, "tdsm": TDSM_PAPER},
    "synthetic": {"encoder": SMALL_ENCODER | {"epochs": 9}, "ridge": RIDGE, "dvta": DVTA_SMALL | {"epochs": 3, "lr": 1e-4},
                  "tdsm": TDSM_SMALL},
    "other": {"encoder": SMALL_ENCODER, "ridge": RIDGE, "dvta": DVTA_SMALL, "tdsm": TDSM_SMALL},
}
WARM_UP = 0.15        # of all steps, for encoder and DVTA: 15 of the paper's 100 epochs
TDSM_WARM_UP = 100    # steps
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
    settings, given = choose_settings(args, data)
    out = prepare_folder(args.out or Path("runs") / run_name(args, data, given))
    if data.synthetic:
        print(SYNTHETIC_NOTE)
    print(f"{args.method} on {data.name}, split {data.split}: {len(data.seen)} seen and {len(data.unseen)} unseen classes; samples: "
          f"{len(data.train)} training, {len(data.seen_test)} seen test, {len(data.unseen_test)} unseen test; {device}")

    features, encoder = encode(data, settings["encoder"], args.seed, device, cache=out.parent / "encoders")   # (N, 256)
    labels = torch.as_tensor(data.labels, device=device)                  # (N,)
    text = [torch.as_tensor(t, device=device) for t in data.text]         # [(C, 1+L, D), ...]
    x, y = features[data.train], labels[data.train]

    def test(model):
        unseen = torch.as_tensor(data.unseen, device=device)
        return zsar.zsl_figures(model.scores(features[data.unseen_test], unseen), data.labels[data.unseen_test], data.unseen)

    best = {"acc": -1.0, "epoch": None}

    def note_best(model, epoch):                                          # for the report: it chooses nothing
        acc = test(model)["acc"]
        if acc > best["acc"]:
            best.update(acc=acc, epoch=epoch)

    ridge, ridge_seconds = train_ridge(text, x, y, settings["ridge"])
    ridge_figures = test(ridge)
    with seeded(args.seed, device):
        if args.method == "ridge":
            model, train_seconds = ridge, ridge_seconds
            note_best(model, None)
        elif args.method == "dvta":
            model, train_seconds = train_dvta(text, x, y, settings["dvta"], args.seed, note_best)
        else:
            model, train_seconds = train_tdsm(text, x, y, settings["tdsm"], args.seed, note_best)
    start = time.perf_counter()
    figures = test(model)

    result = {
        "method": args.method, "dataset": data.name, "synthetic": data.synthetic, "split": data.split, "seed": args.seed,
        "device": str(device), "zsl": figures, "best_on_test": best,
        "ridge": {"acc": ridge_figures["acc"], "per_class": ridge_figures["per_class"]},
        "encoder": {key: encoder[key] for key in ("seen_test_acc", "cached", "file")},
        "seconds": {"encoder": encoder["seconds"], "train": train_seconds, "test": time.perf_counter() - start},
        "config": {"data": str(args.data), "unseen": data.unseen.tolist(), "encoder": settings["encoder"],
                   args.method: settings[args.method]},
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
    parser = argparse.ArgumentParser(description="Zero-shot skeleton action recognition: train and test a method.",
                                     epilog="Settings left out come from the dataset's preset in train.py.")
    parser.add_argument("--method", required=True, choices=["dvta", "tdsm", "ridge"])
    parser.add_argument("--split", required=True, help="55_5, 48_12, ... or a name in the folder's splits.json")
    parser.add_argument("--data", default="synthetic", help="a dataset folder (default: the embedded synthetic set)")
    parser.add_argument("--out", type=Path, help="folder for results (default: runs/DATASET_SPLIT_METHOD_seedN...)")
    parser.add_argument("--seed", type=number(int, 0), default=0)
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
    parser.add_argument("--encoder-epochs", type=number(int, 1))

    method = parser.add_argument_group("settings of a method")
    method.add_argument("--epochs", type=number(int, 1), help="dvta")
    method.add_argument("--steps", type=number(int, 1), help="tdsm")
    method.add_argument("--batch-size", type=number(int, 2), help="dvta, tdsm")
    method.add_argument("--lr", type=number(float, 1e-12), help="dvta, tdsm")
    for name in ("width", "depth", "heads"):
        method.add_argument(f"--{name}", type=number(int, 1), help="tdsm: of the denoiser")

    ablation = parser.add_argument_group("ablations of the papers")
    ablation.add_argument("--no-sde", dest="sde", action="store_const", const=False, help="dvta: the mean of the prompts")
    ablation.add_argument("--only", choices=["da", "aa"], help="dvta: one alignment alone")
    ablation.add_argument("--no-triplet", dest="triplet", action="store_const", const=False, help="tdsm: λ = 0")
    ablation.add_argument("--prediction", choices=["epsilon", "sample", "v_prediction"], help="tdsm: what is predicted")
    ablation.add_argument("--noises", type=number(int, 1), help="tdsm: noises averaged in a score")
    ablation.add_argument("--timestep", type=number(int, 0), help="tdsm: of inference, 0 to 49")
    ablation.add_argument("--conditions", choices=["both", "pooled", "tokens"], help="tdsm: what of the text it sees")
    ablation.add_argument("--no-standardise", dest="standardise", action="store_const", const=False, help="tdsm: features as they are")
    ablation.add_argument("--fp32", action="store_const", const=True, help="tdsm on CUDA: no bfloat16, no torch.compile")

    def error(message):
        raise InputError(f"{message}; python train.py --help lists the options")

    parser.error = error
    return parser.parse_args(argv)


def number(kind, least):
    """An argument type: an int or float from `least` up to 2⁶³."""
    def parse(text):
        value = kind(text)
        if not least <= value < 2 ** 63:
            raise argparse.ArgumentTypeError(f"{text} is out of range, from {least} to 2⁶³")
        return value
    parse.__name__ = kind.__name__                                        # argparse names it in its message
    return parse


def pick_device(name):
    """"cuda", "cpu" or None (cuda if there is one) → torch.device. Raises InputError for cuda where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch finds no CUDA device here; use --device cpu, or install a CUDA build of torch")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def choose_settings(args, data):
    """The dataset's preset, changed by what the command line gives → {"encoder": {...}, METHOD: {...}}, and what it gave."""
    settings = dict(PRESETS.get(data.name, PRESETS["other"]))
    names = {name for method in ("dvta", "tdsm") for name in settings[method]}
    given = {name: value for name, value in vars(args).items() if name in names and value is not None}
    strange = given.keys() - settings[args.method].keys()
    if strange:
        raise InputError(f"--method {args.method} has no setting {', '.join(sorted(strange))}; leave it out")
    settings[args.method] = chosen = settings[args.method] | given
    if args.encoder_epochs:
        settings["encoder"] = settings["encoder"] | {"epochs": args.encoder_epochs}
    if args.method == "tdsm" and chosen["width"] % chosen["heads"]:
        raise InputError(f"--width {chosen['width']} cannot be shared by {chosen['heads']} heads; choose a multiple")
    if args.method == "tdsm" and chosen["timestep"] >= diffusion.STEPS:
        raise InputError(f"--timestep {chosen['timestep']}: the diffusion has timesteps 0 to {diffusion.STEPS - 1}")
    return settings, given


def run_name(args, data, given):
    """The default folder name of a run: one for each setting that is not the preset's."""
    return "_".join([data.name, data.split, args.method, f"seed{args.seed}", *(f"{k}-{v}" for k, v in given.items())])


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
    code = [inspect.getsource(part) for part in (zsar, preprocess, train_encoder, settle_batch_norm, fit_epochs, fit, random_batches,
                                                 warm_up_cosine)]
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

    def losses(rows):
        return {"loss": F.cross_entropy(encoder.classify(x[rows]), y[rows])}

    fit_epochs("encoder", encoder, losses, optimizer, train, settings, seed)
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

    Dropout changes the variance that the next BatchNorm sees in training, so the running statistics of training do not fit
    inference. (README, "Deviations")
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
def train_ridge(text, x, y, settings):
    """The ridge baseline on features x (n, 256) and class ids y (n,) → the model and the seconds it took."""
    start = time.perf_counter()
    model = zsar.Ridge(text, settings["penalty"]).to(x.device)
    model.fit(x, y)
    return model, time.perf_counter() - start


def train_dvta(text, x, y, settings, seed, note_best):
    """DVTA with Adam on features x (n, 256) and class ids y (n,) → the model and the seconds of its training steps."""
    only = settings["only"]
    model = DVTA(text, sde=settings["sde"], da=only != "aa", aa=only != "da").to(x.device)
    optimizer = torch.optim.Adam(model.parameters(), settings["lr"])

    def losses(rows):
        return {"loss": model.loss(x[rows], y[rows])}

    rows = torch.arange(len(x), device=x.device)
    return model, fit_epochs("dvta", model, losses, optimizer, rows, settings, seed, note_best)


def train_tdsm(text, x, y, settings, seed, note_best):
    """TDSM with AdamW on features x (n, 256) and class ids y (n,) → the model and the seconds of its training steps."""
    model = TDSM(text, y.unique(), x if settings["standardise"] else None, width=settings["width"], depth=settings["depth"],
                 heads=settings["heads"], timestep=settings["timestep"], noises=settings["noises"],
                 lam=1.0 if settings["triplet"] else 0.0, prediction=settings["prediction"], conditions=settings["conditions"],
                 fp32=settings["fp32"]).to(x.device)
    optimizer = torch.optim.AdamW(model.parameters(), settings["lr"], weight_decay=0.01, fused=True)
    if x.is_cuda and not settings["fp32"]:
        model.compile_training()

    def losses(rows):
        return dict(zip(("loss", "e+", "e-"), model.losses(x[rows], y[rows])))

    rows, steps, per_epoch = torch.arange(len(x), device=x.device), settings["steps"], max(1, len(x) // settings["batch_size"])
    return model, fit("tdsm step", model, losses, optimizer, rows, settings["batch_size"], steps, min(TDSM_WARM_UP, steps // 2),
                      seed, report_every=max(1, steps // 20), unit=1, after=lambda step: note_best(model, step / per_epoch))


def fit_epochs(name, model, losses, optimizer, rows, settings, seed, note_best=lambda model, epoch: None):
    """`fit` for a number of epochs, with a line and a `note_best(model, epoch)` after each → seconds."""
    per_epoch = max(1, len(rows) // settings["batch_size"])
    steps = settings["epochs"] * per_epoch
    return fit(f"{name} epoch", model, losses, optimizer, rows, settings["batch_size"], steps, WARM_UP * steps, seed,
               report_every=per_epoch, unit=per_epoch, after=lambda step: note_best(model, step // per_epoch))


def fit(label, model, losses, optimizer, rows, batch_size, steps, warm_up, seed, report_every, unit, after):
    """Minimise losses(batch of rows)["loss"] for some steps, with warm-up then cosine to 0 → seconds of the training steps.

    Rows come in a new random order each epoch, without the last, smaller batch. Every `report_every` steps there is a line, with
    the step number in `unit`s, and a call of `after(step)`. Raises InputError if the loss diverges.
    """
    batches = random_batches(rows, min(batch_size, len(rows)), torch.Generator().manual_seed(seed))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_up_cosine(step, warm_up, steps))
    seconds, start, sums, since = 0.0, time.perf_counter(), 0, 0
    model.train()
    for step in range(1, steps + 1):
        values = losses(next(batches))
        optimizer.zero_grad(set_to_none=True)
        values["loss"].backward()
        optimizer.step()
        schedule.step()
        sums, since = sums + torch.stack([value.detach() for value in values.values()]), since + 1
        if step % report_every == 0 or step == steps:
            means = dict(zip(values, (sums / since).tolist()))            # waits for the device
            seconds += time.perf_counter() - start
            if not math.isfinite(means["loss"]):
                raise InputError(f"{label} {step // unit}: the loss is no longer finite; lower the learning rate (--lr)")
            print(f"{label} {step // unit}/{steps // unit}  " + "  ".join(f"{key} {value:.4f}" for key, value in means.items())
                  + f"  {step / seconds:.3g} steps/s  {seconds:.1f} s, {seconds / step * (steps - step):.0f} s left", flush=True)
            model.eval()
            after(step)
            model.train()
            start, sums, since = time.perf_counter(), 0, 0
    model.eval()
    return seconds


def random_batches(rows, batch_size, generator):
    """Batches of rows without end: epoch after epoch in new random orders, each without its last, smaller batch."""
    while True:
        order = torch.randperm(len(rows), generator=generator).to(rows.device)
        yield from rows[order].split(batch_size)[:len(rows) // batch_size]


def warm_up_cosine(step, warm_up, steps):
    """The learning rate's factor at step 0.. of `steps`: linear warm-up, then half a cosine to 0."""
    return (step + 1) / (warm_up + 1) if step < warm_up else 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


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
        print(f"  {'best on test':<20}{best['acc']:7.1%}   epoch {best['epoch']:g}: chosen on the test set, as the papers do; no result")
    print("per class")
    for k, c in enumerate(data.unseen):
        counts = zsl["confusion"][k]
        line = f"  {data.classes[c]:<36}{sum(counts):5d} samples"
        if sum(counts):
            likeliest = int(np.argmax(counts))
            line += f" {zsl['class_acc'][k]:7.1%}"
            line += "" if likeliest == k else f"   mostly taken for {data.classes[data.unseen[likeliest]]}"
        print(line)


if __name__ == "__main__":
    main()
