"""Train and test a zero-shot method from the command line, from data to figures; then label new sequences with it.

    python train.py --method dvta --split 55_5                              the embedded synthetic set
    python train.py --method tdsm --split 55_5                              the other method, on the same encoder
    python train.py --method dvta --split 22_6_a --data path/to/folder      your data (README, "Your own data")
    python train.py --list                                                  the published splits
    python train.py predict --run runs/... --data path/to/folder            labels, among any classes

Steps: read the data; train the ST-GCN encoder on seen classes, or take it from the cache; train the method on its features;
score the unseen test samples; write result.json. (methods.md section 6 is the protocol.)
"""
import argparse
import inspect
import json
import math
import pickle
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import zsar
from alignment import DVTA, Ridge
from data import FORMATS, find_format, list_splits, load_samples, read_data, read_lines, read_ntu, read_text, validation
from diffusion import STEPS, TDSM
from zsar import InputError, Parser, command_line, fingerprint, pieces, prepare_folder, preprocess, random_batches, save, save_table, seeded, warm_up_cosine

# Everything that is tuned stands here. For NTU and PKU: the published settings of DVTA and TDSM (methods.md sections 3, 4); their
# encoder's are not published. For synthetic and other, small data: chosen on validation classes, never on unseen ones (README).
ENCODER = {"epochs": 30, "batch_size": 16, "lr": 3e-3}
RIDGE = {"penalty": 300}
DVTA_PAPER = {"epochs": 100, "batch_size": 128, "lr": 1e-6, "sde": True, "only": None}
DVTA_SMALL = DVTA_PAPER | {"epochs": 30, "batch_size": 32, "lr": 3e-4}
TDSM_PAPER = {"width": 768, "depth": 12, "heads": 12, "steps": 50_000, "batch_size": 256, "lr": 1e-4, "lam": 1.0,
              "prediction": "epsilon", "noises": 3, "timestep": 25, "conditions": "both", "standardise": True, "fp32": False}
TDSM_SMALL = TDSM_PAPER | {"width": 128, "depth": 2, "heads": 2, "steps": 300, "batch_size": 64, "lr": 3e-4}
PRESETS = {
    "ntu60": {"encoder": ENCODER, "ridge": RIDGE, "dvta": DVTA_PAPER, "tdsm": TDSM_PAPER},
    "ntu120": {"encoder": ENCODER, "ridge": RIDGE, "dvta": DVTA_PAPER | {"lr": 5e-6}, "tdsm": TDSM_PAPER},
    "pku51": {"encoder": ENCODER, "ridge": RIDGE, "dvta": DVTA_PAPER | {"lr": 1e-5}, "tdsm": TDSM_PAPER},
    "synthetic": {"encoder": ENCODER | {"epochs": 9}, "ridge": RIDGE, "dvta": DVTA_SMALL | {"epochs": 3, "lr": 1e-4},
                  "tdsm": TDSM_SMALL},
    "other": {"encoder": ENCODER, "ridge": RIDGE, "dvta": DVTA_SMALL, "tdsm": TDSM_SMALL},
}
WARM_UP = 0.15        # of all steps, for encoder and DVTA: 15 of the paper's 100 epochs
TDSM_WARM_UP = 100    # steps
SYNTHETIC_NOTE = "SYNTHETIC DATA: made motions, not recordings. These figures say nothing about NTU RGB+D."

def main(argv=None):
    """The command line: train and test, or `predict`."""
    argv = sys.argv[1:] if argv is None else argv
    command_line(lambda: predict(predict_arguments(argv[1:])) if argv[:1] == ["predict"] else run(parse_arguments(argv)))

def run(args):
    """One experiment, or one for each of several seeds and what they have in common."""
    if args.list:
        return print("\n".join(list_splits()))
    device, data = pick_device(args.device), read_data(args.data, args.split, args.text)
    val = validation(data) if args.gzsl else None
    settings, given = choose_settings(args, data)
    seeds = range(args.seed, args.seed + args.seeds)
    label = f"seed{args.seed}" if args.seeds == 1 else f"seeds{seeds[0]}-{seeds[-1]}"
    out = args.out or Path("runs", "_".join([data.name, data.split, args.method, label, *(f"{k}-{v}" for k, v in given.items())]))
    if (out / "result.json").exists() and not args.force:
        raise InputError(f"{out}: holds a finished run; give --force to overwrite it, or another --out")
    each = [experiment(args, data, val, settings, seed, device, out / f"seed{seed}" if args.seeds > 1 else out, out.parent / "encoders")
            for seed in seeds]
    if args.seeds > 1:
        keys = [("zsl", "acc"), ("ridge", "acc"), *(("gzsl", key) for key in ("seen", "unseen", "harmonic", "ausuc") if args.gzsl)]
        values = {" ".join(key): [result[key[0]][key[1]] for result in each] for key in keys}
        summary = {key: zsar.spread(v) for key, v in values.items()}
        result = {"arguments": args.command, "summary": summary, "seeds": each}
        save(out / "result.json", lambda f: f.write((json.dumps(result, indent=1) + "\n").encode()))
        print(f"\n{args.method}, seeds {seeds[0]} to {seeds[-1]}: mean ± standard deviation [95 % interval of the mean], each seed")
        for key, v in summary.items():
            print(f"  {key:<14}{v['mean']:6.1%} ± {v['std']:.1%}  [{v['ci95'][0]:.1%}, {v['ci95'][1]:.1%}]  ",
                  *(f"{value:.1%}" for value in values[key]))
        print(f"written: {out / 'result.json'}")

def experiment(args, data, val, settings, seed, device, out, cache):
    """Data → encoder → method → figures → files in the folder `out` → what result.json says."""
    prepare_folder(out)
    synthetic = data.source == "synthetic set"
    if synthetic:
        print(SYNTHETIC_NOTE)
    print(f"{args.method} on {data.name} ({data.source}), split {data.split}: {len(data.seen)} seen and {len(data.unseen)} unseen "
          f"classes; samples: {len(data.train)} training, {len(data.seen_test)} seen test, {len(data.unseen_test)} unseen test; "
          f"seed {seed}; {device}")
    features, encoder = encode(data, settings["encoder"], seed, device, cache)                    # (N, 256)
    text = [torch.as_tensor(t, device=device) for t in data.text]         # [(C, 1+L, D), ...]
    x, y = features[data.train], torch.as_tensor(data.labels[data.train], device=device)          # (n, 256), (n,)

    def test(model):
        unseen = torch.as_tensor(data.unseen, device=device)
        return zsar.zsl_figures(model.scores(features[data.unseen_test], unseen), data.labels[data.unseen_test], data.unseen)

    def note_best(model, epoch):                                          # for the report: it chooses nothing
        acc = test(model)["acc"]
        if acc > best["acc"]:
            best.update(acc=acc, epoch=epoch)

    best = {"acc": -1.0, "epoch": None}
    baseline, _ = train("ridge", text, x, y, settings["ridge"], seed)
    model, train_seconds = train(args.method, text, x, y, settings[args.method], seed, note_best)
    start = time.perf_counter()
    figures, ridge = test(model), test(baseline)
    result = {
        "method": args.method, "dataset": data.name, "source": data.source, "split": data.split, "synthetic": synthetic,
        "note": SYNTHETIC_NOTE if synthetic else None, "seed": seed, "device": str(device), "zsl": figures, "best_on_test": best,
        "ridge": {key: ridge[key] for key in ("acc", "ci95", "per_class")}, "gzsl": None,
        "encoder": {key: encoder[key] for key in ("seen_test_acc", "cached", "file")},
        "seconds": {"encoder": encoder["seconds"], "train": train_seconds, "test": time.perf_counter() - start},
        "arguments": [*args.command, "--seeds", "1", "--seed", str(seed)],
        "config": {"unseen": data.unseen.tolist(), "encoder": settings["encoder"], args.method: settings[args.method]},
        "data_sha256": fingerprint(data.labels, *data.text, data.features if data.skeletons is None else data.skeletons),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}}
    if args.gzsl:
        gzsl = generalized({"ridge": baseline, args.method: model}, data, val, features, text, settings, seed, cache)
        result |= {"gzsl": gzsl[args.method], "ridge": result["ridge"] | {"gzsl": gzsl["ridge"]}}
    trained = {"method": args.method, "settings": settings[args.method], "state": model.state_dict(), "classes": data.classes,
               "text": text, "encoder": encoder["state"], "shape": data.skeletons is not None and list(data.skeletons.shape[2:])}
    save(out / "model.pt", lambda f: torch.save(trained, f))
    save(out / "result.json", lambda f: f.write((json.dumps(result, indent=1) + "\n").encode()))
    print_table(result, data)
    print(f"written: {out / 'result.json'}, {out / 'model.pt'}")
    if synthetic:
        print(SYNTHETIC_NOTE)
    return result

def generalized(models, data, val, features, text, settings, seed, cache):
    """Generalized zero-shot figures of each model, γ chosen in a validation run: another encoder and other models, trained
    without the validation classes, and without any test sample."""
    print(f"validation run for γ: {len(val.seen)} seen and {len(val.unseen)} validation classes, {len(val.train)} training samples")
    val_features, _ = encode(val, settings["encoder"], seed, features.device, cache)

    def scored(model, task, x):                                           # all test samples of a task among all its classes
        rows, classes = np.concatenate([task.seen_test, task.unseen_test]), np.union1d(task.seen, task.unseen)
        return model.scores(x[rows], torch.as_tensor(classes, device=x.device)), task.labels[rows], classes, task.seen

    x, y = val_features[val.train], torch.as_tensor(val.labels[val.train], device=features.device)
    gzsl = {}
    for name, model in models.items():
        gamma = zsar.best_gamma(*scored(train(name, text, x, y, settings[name], seed)[0], val, val_features))
        gzsl[name] = zsar.gzsl_figures(*scored(model, data, features), gamma)
    return gzsl

def predict(args):
    """A trained run and new sequences → the best of any classes for each, in predictions.csv."""
    device, path = pick_device(args.device), args.run / "model.pt"
    try:
        trained = torch.load(path, map_location=device, weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError):
        raise InputError(f"{path}: is missing, damaged or no model of this program; --run names a finished run's folder") from None
    names, text = candidates(trained, args.classes)
    samples, features = new_samples(args.data, trained, device)           # names of N samples, (N, 256)
    model = build(trained["method"], text, trained["settings"], state=trained["state"]).to(device)
    top, order = model.scores(features, torch.arange(len(names), device=device)).topk(min(5, len(names)))   # (N, 5) each
    rows = [(sample, names[k[0]], f"{s[0]:.6g}", f"{s[0] - s[1]:.6g}" if len(s) > 1 else "", " | ".join(names[i] for i in k))
            for sample, s, k in zip(samples, top.tolist(), order.tolist())]
    out = args.out or args.run / "predictions.csv"
    save_table(out, [("sample", "class", "score", "margin", "top5"), *rows])
    print(f"{trained['method']}: {len(rows)} sequences among {len(names)} classes")
    widths = [max(map(len, column)) for column in zip(*rows[:10])]
    print(*(f"  {sample:<{widths[0]}}  {name:<{widths[1]}}  margin {margin}" for sample, name, _, margin, _ in rows[:10]), sep="\n")
    print(f"written: {out}")

# ---------------------------------------------------------------------------------------------------- command line
def parse_arguments(argv):
    """Read the command line. Raises InputError on a wrong one."""
    parser = Parser(prog="train.py", allow_abbrev=False, description="Train and test a zero-shot method. To label sequences: train.py predict --help")
    parser.add_argument("--list", action="store_true", help="show the published splits")
    parser.add_argument("--method", choices=["dvta", "tdsm", "ridge"])
    parser.add_argument("--split", help="55_5, 48_12, ... or a name in the folder's splits.json")
    parser.add_argument("--data", default="synthetic", help="a dataset folder (default: the embedded synthetic set)")
    parser.add_argument("--text", type=Path, nargs="+", default=(), metavar="FILE", help="text features of all classes, a file a prompt")
    parser.add_argument("--gzsl", action="store_true", help="also figures over seen and unseen classes, from a validation run")
    parser.add_argument("--out", type=Path, help="folder for results (default: runs/DATASET_SPLIT_METHOD_seedN...)")
    parser.add_argument("--config", type=Path, metavar="RESULT.json", help="repeat that run; other options given change it")
    parser.add_argument("--force", action="store_true", help="overwrite a finished run")
    parser.add_argument("--seed", type=number(int, 0), default=0)
    parser.add_argument("--seeds", type=int, choices=range(1, 11), metavar="1..10", default=1, help="how many, from --seed on")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
    parser.add_argument("--encoder-epochs", type=number(int, 1))
    method = parser.add_argument_group("settings of a method")
    for name, kind, least, of in (("epochs", int, 1, "dvta"), ("steps", int, 1, "tdsm"), ("batch-size", int, 2, "dvta, tdsm"),
                                  ("lr", float, 1e-12, "dvta, tdsm"), ("width", int, 1, "tdsm"), ("depth", int, 1, "tdsm"),
                                  ("heads", int, 1, "tdsm")):
        method.add_argument(f"--{name}", type=number(kind, least), help=of)
    ablation = parser.add_argument_group("ablations of the papers")
    ablation.add_argument("--no-sde", dest="sde", action="store_const", const=False, help="dvta: the mean of the prompts")
    ablation.add_argument("--only", choices=["da", "aa"], help="dvta: one alignment alone")
    ablation.add_argument("--no-triplet", dest="lam", action="store_const", const=0.0, help="tdsm: λ = 0")
    ablation.add_argument("--prediction", choices=["epsilon", "sample", "v_prediction"], help="tdsm: what is predicted")
    ablation.add_argument("--noises", type=number(int, 1), help="tdsm: noises averaged in a score")
    ablation.add_argument("--timestep", type=number(int, 0), help="tdsm: of inference, 0 to 49")
    ablation.add_argument("--conditions", choices=["both", "pooled", "tokens"], help="tdsm: what of the text it sees")
    ablation.add_argument("--no-standardise", dest="standardise", action="store_const", const=False, help="tdsm: features as is")
    ablation.add_argument("--fp32", action="store_const", const=True, help="tdsm on CUDA: no bfloat16, no torch.compile")
    args, command = parser.parse_args(argv), argv
    if args.config:
        try:
            command = [*map(str, json.loads(args.config.read_text())["arguments"]), *argv]        # of two, the later option counts
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise InputError(f"{args.config}: is no result.json of a run ({e.__class__.__name__})") from None
        args = parser.parse_args(command)
    where = Parser(add_help=False, allow_abbrev=False)                    # what says where, not what, is no part of the command
    for option in ("--out", "--config", "--force"):
        where.add_argument(option, nargs="?")
    args.command = where.parse_known_args(command)[1]
    return args if args.list or args.method and args.split else parser.error("--method and --split are needed")

def predict_arguments(argv):
    """Read the command line of `predict`. Raises InputError on a wrong one."""
    parser = Parser(prog="train.py predict", description="Label sequences with a trained run, among any classes.")
    parser.add_argument("--run", type=Path, required=True, help="the folder of a finished run")
    parser.add_argument("--data", type=Path, required=True, help="a folder with skeletons.npy, features.npy or .skeleton files")
    parser.add_argument("--classes", type=Path, nargs="+", default=(), metavar="FILE", help="text features of the classes to choose from")
    parser.add_argument("--out", type=Path, help="default: predictions.csv in the run's folder")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
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
    settings["encoder"] = settings["encoder"] | ({"epochs": args.encoder_epochs} if args.encoder_epochs else {})
    if args.method == "tdsm" and chosen["width"] % chosen["heads"]:
        raise InputError(f"--width {chosen['width']} cannot be shared by {chosen['heads']} heads; choose a multiple")
    if args.method == "tdsm" and chosen["timestep"] >= STEPS:
        raise InputError(f"--timestep {chosen['timestep']}: the diffusion has timesteps 0 to {STEPS - 1}")
    return settings, given

# ---------------------------------------------------------------------------------------------------- encoder
def encode(data, settings, seed, device, cache):
    """Features (N, 256) of every sample on the device, and {"state", "seen_test_acc", "cached", "file", "seconds"}.
    Skeletons go through an ST-GCN trained on the training samples, cached under a key made from all that it depends on."""
    start = time.perf_counter()
    if data.skeletons is None:
        features = torch.tensor(data.features, dtype=torch.float32, device=device)
        return features, {"state": None, "seen_test_acc": None, "cached": False, "file": None, "seconds": 0.0}
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
    return saved.pop("features"), saved | {"cached": cached, "file": str(path), "seconds": time.perf_counter() - start}

def encoder_key(data, settings, seed, device):
    """A hash of all that the encoder's weights and features depend on: samples, rows, labels, settings, seed, code, library."""
    code = [inspect.getsource(part) for part in (zsar, train_encoder, fit)]
    rest = json.dumps([settings, seed, device.type, torch.__version__, *code]).encode()
    return fingerprint(data.skeletons, data.labels, data.seen, data.train, data.seen_test, np.frombuffer(rest, np.uint8))[:16]

def train_encoder(data, settings, seed, device):
    """Train an ST-GCN with cross-entropy on the training samples (methods.md section 2), then encode all samples → {"state": weights,
    "features": (N, 256), "seen_test_acc": accuracy among the seen classes, None without such samples}."""
    N, _, T, V, M = data.skeletons.shape
    graph = zsar.GRAPHS[V]
    x = torch.empty(data.skeletons.shape, device=device)                  # (N, 3, T, V, M)
    for first, part in pieces(data.skeletons):
        x[first:first + len(part)] = torch.from_numpy(preprocess(part, graph))
    y = torch.as_tensor(np.searchsorted(data.seen, data.labels), device=device)   # (N,) place among the seen classes
    train = torch.as_tensor(data.train, device=device)
    encoder = zsar.STGCN(graph, V, len(data.seen)).to(device)
    optimizer = torch.optim.AdamW(encoder.parameters(), settings["lr"])
    losses = lambda rows: {"loss": F.cross_entropy(encoder.classify(x[rows]), y[rows])}
    fit("encoder", encoder, losses, optimizer, train, settings, seed)
    zsar.settle_batch_norm(encoder, x, train)
    with torch.no_grad():
        features = torch.empty(N, zsar.FEATURES, device=device)           # filled in cache-sized pieces; a list of them would
        for part, rows in zip(x.split(32), features.split(32)):           # stay between large freed blocks and pin the memory
            rows.copy_(encoder(part))
        hit = encoder.classifier(features[data.seen_test]).argmax(1) == y[data.seen_test]
    return {"state": encoder.state_dict(), "features": features,
            "seen_test_acc": hit.float().mean().item() if len(hit) else None}

# ---------------------------------------------------------------------------------------------------- training
def build(method, text, settings, seen=None, x=None, state=None):
    """A method's model on the text of all classes: to be trained on the seen classes (S,) and features x (n, 256), or with the
    weights of one that was."""
    options = {key: value for key, value in settings.items() if key not in ("epochs", "steps", "batch_size", "lr")}
    if method == "tdsm":
        model = TDSM(text, seen, x, num_tokens=len(state["denoiser.position"]) if state else 0, **options)
    else:
        model = (DVTA if method == "dvta" else Ridge)(text, **options)
    if state:
        model.load_state_dict(state)
    return model

def train(method, text, x, y, settings, seed, note_best=lambda model, epoch: None):
    """Train a method on features x (n, 256) and class ids y (n,) → the model and the seconds of its training steps."""
    start = time.perf_counter()
    with seeded(seed, x.device):
        model = build(method, text, settings, y.unique(), x).to(x.device)
        if method == "ridge":
            model.fit(x, y)
            note_best(model, None)
            return model, time.perf_counter() - start
        if method == "dvta":
            optimizer = torch.optim.Adam(model.parameters(), settings["lr"])
            losses = lambda rows: {"loss": model.loss(x[rows], y[rows])}
        else:
            optimizer = torch.optim.AdamW(model.parameters(), settings["lr"], weight_decay=0.01, fused=True)
            losses = lambda rows: dict(zip(("loss", "e+", "e-"), model.losses(x[rows], y[rows])))
            if x.is_cuda and not settings["fp32"]:
                model.compile_training()
        return model, fit(method, model, losses, optimizer, torch.arange(len(x), device=x.device), settings, seed, note_best)

def fit(name, model, losses, optimizer, rows, settings, seed, note_best=lambda model, epoch: None):
    """Minimise losses(batch of rows)["loss"] for some epochs or steps, with warm-up then cosine to 0 → seconds of the steps.
    Rows come in a new random order each epoch, without the last, smaller batch. After each epoch, or each 20th of the steps,
    there is a line and a call of `note_best(model, epoch)`. Raises InputError if the loss diverges."""
    batch_size = min(settings["batch_size"], len(rows))
    per_epoch = len(rows) // batch_size
    if "epochs" in settings:
        label, steps, unit, every = f"{name} epoch", settings["epochs"] * per_epoch, per_epoch, per_epoch
    else:
        label, steps, unit, every = f"{name} step", settings["steps"], 1, max(1, settings["steps"] // 20)
    warm_up = WARM_UP * steps if "epochs" in settings else min(TDSM_WARM_UP, steps // 2)
    batches = random_batches(rows, batch_size, torch.Generator().manual_seed(seed))
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
        if step % every == 0 or step == steps:
            means = dict(zip(values, (sums / since).tolist()))            # waits for the device
            seconds += time.perf_counter() - start
            if not math.isfinite(means["loss"]):
                raise InputError(f"{label} {step // unit}: the loss is no longer finite; lower the learning rate (--lr)")
            print(f"{label} {step // unit}/{steps // unit}  " + "  ".join(f"{key} {value:.4f}" for key, value in means.items())
                  + f"  {step / seconds:.3g} steps/s  {seconds:.1f} s, {seconds / step * (steps - step):.0f} s left", flush=True)
            model.eval()
            note_best(model, step / per_epoch)
            model.train()
            start, sums, since = time.perf_counter(), 0, 0
    model.eval()
    return seconds

# ---------------------------------------------------------------------------------------------------- prediction
def candidates(trained, files):
    """The names of the K classes to choose from, and their text, a list of (K, 1+L, D): the run's own, or those of the files.
    One file serves all prompts of the run. The names stand beside FILE.npy in FILE.txt, one a line. Raises InputError."""
    if not files:
        return trained["classes"], trained["text"]
    text, theirs = [torch.tensor(read_text(path)) for path in files], trained["text"]
    if len(text) not in (1, len(theirs)):
        raise InputError(f"--classes: {len(text)} files; the run has {len(theirs)} prompts: give a file each or one for all")
    K, D, rows = len(text[0]), theirs[0].shape[-1], max(2, *(t.shape[1] for t in theirs))
    for path, prompt in zip(files, text):
        if len(prompt) != K or prompt.shape[-1] != D or prompt.shape[1] > rows:
            raise InputError(f"{path}: shape is {tuple(prompt.shape)}; the run needs ({K}, up to {rows}, {D}): embed with its model")
    names_file = files[0].with_suffix(".txt")
    names = read_lines(names_file) if names_file.exists() else [f"class {k}" for k in range(K)]
    if len(names) != K:
        raise InputError(f"{names_file}: names {len(names)} classes, {files[0]} has {K}; give a line each")
    return names, text * (len(theirs) // len(text))

def new_samples(folder, trained, device):
    """The samples in a folder, .skeleton files or rows of an array → their N names and features (N, 256). Raises InputError."""
    files = sorted(folder.glob("*.skeleton"))
    layout = list(FORMATS)[0] if files else find_format(folder, list(FORMATS)[:2])
    if "features" in layout:
        features = torch.as_tensor(load_samples(folder / "features.npy", layout), dtype=torch.float32, device=device)
        return [f"row {n}" for n in range(len(features))], features
    if not trained["encoder"]:
        raise InputError(f"{folder}: holds skeletons, and the run was trained on ready features; give such features")
    (T, V, M), names, read = trained["shape"], [], []
    if files:
        for path in files:
            try:
                read.append(read_ntu(path, T))
                names.append(path.name)
            except (OSError, ValueError) as e:
                print(f"skipped: {path.name}: {e}", file=sys.stderr)
        if not read:
            raise InputError(f"{folder}: none of its {len(files)} .skeleton files could be read")
    skeletons = np.stack(read) if files else load_samples(folder / "skeletons.npy", layout)       # (N, 3, T', V, M')
    if skeletons.shape[3] != V:
        raise InputError(f"{folder}: has {skeletons.shape[3]} joints, the run's encoder was trained on {V}")
    encoder = zsar.STGCN(zsar.GRAPHS[V], V, len(trained["encoder"]["classifier.bias"])).to(device).eval()
    encoder.load_state_dict(trained["encoder"])
    features = torch.empty(len(skeletons), zsar.FEATURES, device=device)
    for first, part in pieces(skeletons, 32):
        part = np.pad(part, [(0, 0)] * 4 + [(0, max(0, M - part.shape[4]))])[..., :M]   # as many persons as in training
        with torch.no_grad():
            features[first:first + 32] = encoder(torch.from_numpy(preprocess(part, zsar.GRAPHS[V])).to(device))
    return names or [f"row {n}" for n in range(len(skeletons))], features

# ---------------------------------------------------------------------------------------------------- output
def print_table(result, data):
    """The figures as a person reads them."""
    zsl, ridge, best, method = result["zsl"], result["ridge"], result["best_on_test"], result["method"]
    rows = [(method, zsl, result["gzsl"]), ("ridge baseline", ridge, ridge.get("gzsl"))][:1 if method == "ridge" else 2]
    print(f"\nzero-shot accuracy on {zsl['n']} samples of {len(data.unseen)} unseen classes")
    for name, f, _ in rows:
        print(f"  {name:<20}{f['acc']:7.1%}   95 % [{f['ci95'][0]:.1%}, {f['ci95'][1]:.1%}]   mean per class {f['per_class']:.1%}"
              + "   <- the result" * (f is zsl))
    print(f"  {'chance':<20}{zsl['chance']:7.1%}")
    if method != "ridge":
        print(f"  {'best on test':<20}{best['acc']:7.1%}   epoch {best['epoch']:g}: chosen on the test set; no result")
    for name, _, g in rows if result["gzsl"] else ():
        print(f"  {name:<20}seen {g['seen']:.1%}  unseen {g['unseen']:.1%}  harmonic {g['harmonic']:.1%}  AUSUC {g['ausuc']:.3f}"
              f"   among all classes, γ {g['gamma']:.3f}")
    print("per class")
    for c, counts, acc in zip(data.unseen, zsl["confusion"], zsl["class_acc"]):
        line, likeliest = f"  {data.classes[c]:<36}{sum(counts):5d} samples", data.unseen[int(np.argmax(counts))]
        if acc is not None:
            line += f" {acc:7.1%}" + ("" if likeliest == c else f"   mostly taken for {data.classes[likeliest]}")
        print(line)

if __name__ == "__main__":
    main()
