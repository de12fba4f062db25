"""Train and test a zero-shot method from the command line, from data to figures; then label new sequences with it.

    python train.py --method dvta --split 55_5                              the embedded synthetic set
    python train.py --method tdsm --split 55_5                              the other method, on the same encoder
    python train.py --method dvta --split 22_6_a --data path/to/folder      your data (README, "Your own data")
    python train.py predict --run runs/... --data path/to/folder            labels, among any classes

Steps: read the data; train the ST-GCN encoder on seen classes, or take it from the cache; train the method on its features;
score the unseen test samples; write result.json. (methods.md section 6 is the protocol.)
"""
import argparse
import contextlib
import inspect
import platform
import shlex
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import alignment
import diffusion
import zsar
from alignment import DVTA, Ensemble, Ridge, among_all_classes, best_gamma, gzsl_figures, print_summary, print_table, unseen_figures
from data import FORMATS, find_format, list_splits, load_samples, read_data, read_lines, read_ntu, read_text, validation
from diffusion import STEPS, TDSM
from zsar import (Diverged, InputError, Parser, command_line, fingerprint, fit, load, pieces, prepare_folder, preprocess, read_json, save,
                  save_json, save_table)

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
UNFINISHED = "unfinished_run"   # the folder, in a run's own, of what is needed until it is finished
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
    val = validation(data) if args.gzsl or args.tune else None
    settings, given = choose_settings(args, data)
    seeds = range(args.seed, args.seed + args.seeds)
    label = (f"seed{args.seed}" if args.seeds == 1 else f"seeds{seeds[0]}-{seeds[-1]}") + "_tuned" * args.tune
    out = args.out or Path("runs", "_".join([data.name, data.split, args.method, label, *(f"{k}-{v}" for k, v in given.items())]))
    folders = [out / f"seed{seed}" if args.seeds > 1 else out for seed in seeds]
    samples, parts = data.features if data.skeletons is None else data.skeletons, (data.train, data.seen_test, data.unseen_test, data.val)
    data_sha256 = fingerprint(samples, data.labels, *data.text, *parts)
    each = [describe(args, data, settings, device, data_sha256, seed, "--seeds", "1", "--seed", str(seed)) for seed in seeds]
    if args.seeds > 1:
        together = describe(args, data, settings, device, data_sha256, list(seeds))
        claim(out, together, args)
    finished = [claim(folder, one, args) for folder, one in zip(folders, each)]                   # all, before the first training
    try:
        results = [result or experiment(args, one, data, val, settings, device, folder, out.parent / "encoders")
                   for result, one, folder in zip(finished, each, folders)]
    except KeyboardInterrupt:
        again = shlex.join([*args.command, "--out", str(out), "--resume"])
        raise KeyboardInterrupt(f"; to go on: python train.py {again}") from None
    if args.seeds > 1:
        print(f"\n{args.method}, seeds {seeds[0]} to {seeds[-1]}: mean ± standard deviation [95 % interval of the mean], each seed")
        finish(out, together | {"summary": print_summary(results), "seeds": results})

def describe(args, data, settings, device, data_sha256, seed, *more):
    """What is known of a run before it starts, for result.json, and a hash of it. `more`: arguments that repeat this run alone."""
    synthetic = data.source == "synthetic set"
    about = {"method": args.method, "dataset": data.name, "source": data.source, "split": data.split, "synthetic": synthetic,
             "note": SYNTHETIC_NOTE if synthetic else None, "seed": seed, "device": str(device), "data_sha256": data_sha256,
             "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
             "config": {"unseen": data.unseen.tolist(), **{name: settings[name] for name in ("encoder", *args.method.split("+"))}}}
    return about | {"run_sha256": fingerprint([about, args.gzsl, args.tune]), "arguments": [*args.command, *more]}

def claim(out, about, args):
    """Make `out` the folder of the run that `about` describes → its result if it is finished, else None. Raises InputError if a run
    is there that is neither this one, to be resumed, nor to be overwritten."""
    prepare_folder(out)
    if args.force:
        try:
            for name in ("result.json", "model.pt"):
                (out / name).unlink(missing_ok=True)
            shutil.rmtree(out / UNFINISHED, ignore_errors=True)
        except OSError as e:
            raise InputError(f"{out}: cannot be overwritten ({e.strerror}); choose another --out") from None
    for path, kind in ((out / "result.json", "a finished"), (out / UNFINISHED / "run.json", "an unfinished")):
        if path.exists():
            held = read_json(path)
            same = held.get("run_sha256") == about["run_sha256"]
            if not (args.resume and same):
                how = "; give --resume to go on with it," if same else ", not this one; give"
                raise InputError(f"{out}: holds {kind} run{how} --force to overwrite it, or another --out")
            print(f"{out}: holds {kind} run")
            return held if kind == "a finished" else None
    save_json(prepare_folder(out / UNFINISHED) / "run.json", about)

def finish(out, result):
    """Write result.json, and remove what only an unfinished run needs."""
    save_json(out / "result.json", result)
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    for part in out.glob("*.part"):                                       # of a run that was killed
        part.unlink(missing_ok=True)
    print(f"written: {out / 'result.json'}")

def experiment(args, about, data, val, settings, device, out, cache):
    """Data → encoder → method → figures → files in the folder `out` → what result.json says."""
    methods, settings, seed = args.method.split("+"), dict(settings), about["seed"]
    if about["synthetic"]:
        print(SYNTHETIC_NOTE)
    print(f"{args.method} on {data.name} ({data.source}), split {data.split}: {len(data.seen)} seen and {len(data.unseen)} unseen classes; "
          f"samples: {len(data.train)} training, {len(data.seen_test)} seen test, {len(data.unseen_test)} unseen test; seed {seed}; {device}")
    features, encoder = encode(data, settings["encoder"], seed, device, out, cache)               # (N, 256)
    text = [torch.as_tensor(t, device=device) for t in data.text]         # [(C, 1+L, D), ...]
    if val:
        print(f"validation run: {len(val.seen)} seen and {len(val.unseen)} validation classes, {len(val.train)} training samples")
        val_features, _ = encode(val, settings["encoder"], seed, device, out, cache)
    tuned = {name: tune(name, val, val_features, text, settings[name], seed, out) for name in methods if args.tune}
    settings |= {name: settings[name] | choice["chosen"] for name, choice in tuned.items()}
    models, logs = train_all(args.method, data, features, text, settings, seed, out, final=True)
    start = time.perf_counter()
    figures, gzsl = {name: unseen_figures(model, data, features) for name, model in models.items()}, dict.fromkeys(models)
    seconds = {"encoder": encoder["seconds"], "train": sum(log["seconds"] for log in logs.values()), "test": time.perf_counter() - start}
    if args.gzsl:
        val_models, _ = train_all(args.method, val, val_features, text, settings, seed, out)
        for name, model in models.items():
            gamma = best_gamma(*among_all_classes(val_models[name], val, val_features))
            gzsl[name] = gzsl_figures(*among_all_classes(model, data, features), gamma)
    beside = {name: {key: figures[name][key] for key in ("acc", "ci95", "per_class")} | {"gzsl": gzsl[name]}
              for name in models if name != args.method or name == "ridge"}
    result = about | {
        "config": about["config"] | {name: settings[name] for name in methods}, "tuned": tuned,
        "zsl": figures[args.method], "gzsl": gzsl[args.method], **beside, "best_on_test": logs.get(args.method, {}).get("best"),
        "encoder": {key: encoder[key] for key in ("seen_test_acc", "cached", "file")}, "seconds": seconds}
    trained = {"method": args.method, "settings": {name: settings[name] for name in methods}, "classes": data.classes, "text": text,
               "states": {name: models[name].state_dict() for name in methods}, "keys": {name: logs[name]["key"] for name in methods},
               "encoder": encoder["state"], "shape": data.skeletons is not None and list(data.skeletons.shape[2:])}
    print_table(result, data)
    save(out / "model.pt", lambda f: torch.save(trained, f))
    finish(out, result)
    if about["synthetic"]:
        print(SYNTHETIC_NOTE)
    return result

def tune(method, val, features, text, settings, seed, out):
    """Nine trainings around the settings, tested on the validation classes → {"chosen": learning rate and length, "grid": all}."""
    length, rows = "steps" if "steps" in settings else "epochs", []
    for scale, rate in ((scale, rate) for scale in (1, 0.5, 2) for rate in (1, 1 / 3, 3)):        # the first wins a tie
        rows.append({length: max(1, round(scale * settings[length])), "lr": rate * settings["lr"]})
        try:
            model, _ = train(method, val, features, text, settings | rows[-1], seed, out)
            rows[-1]["acc"] = unseen_figures(model, val, features)["acc"]
        except Diverged:
            rows[-1]["acc"] = 0.0
    best = max(rows, key=lambda row: row["acc"])
    print(f"\ntuning {method}: accuracy among the {len(val.unseen)} validation classes")
    for row in rows:
        print(f"  {row[length]:>6} {length}  lr {row['lr']:.2e}  {row['acc']:6.1%}" + "   <- chosen" * (row is best))
    return {"chosen": {key: best[key] for key in (length, "lr")}, "grid": rows}

def predict(args):
    """A trained run and new sequences → the best of any classes for each, in predictions.csv."""
    device, trained = pick_device(args.device), load(args.run / "model.pt")
    if "states" not in trained:
        raise InputError(f"{args.run / 'model.pt'}: is of an earlier version of this program; train it anew")
    names, text = candidates(trained, args.classes)
    samples, features = new_samples(args.data, trained, device)           # names of N samples, (N, 256)
    models = [build(name, text, trained["settings"][name], state=state) for name, state in trained["states"].items()]
    model = (Ensemble(models) if len(models) > 1 else models[0]).to(device)
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
    parser = Parser(prog="train.py", allow_abbrev=False,
                    description="Train and test a zero-shot method. To label sequences: train.py predict --help")
    parser.add_argument("--list", action="store_true", help="show the published splits")
    parser.add_argument("--method", choices=["dvta", "tdsm", "ridge", "dvta+tdsm"], help="dvta+tdsm: the mean of their standardised scores")
    parser.add_argument("--split", help="55_5, 48_12, ... or a name in the folder's splits.json")
    parser.add_argument("--data", default="synthetic", help="a dataset folder (default: the embedded synthetic set)")
    parser.add_argument("--text", type=Path, nargs="+", default=(), metavar="FILE", help="text features of all classes, a file a prompt")
    parser.add_argument("--gzsl", action="store_true", help="also figures over seen and unseen classes, from a validation run")
    parser.add_argument("--tune", action="store_true", help="first choose learning rate and epochs or steps on the validation classes")
    parser.add_argument("--out", type=Path, help="folder for results (default: runs/DATASET_SPLIT_METHOD_seedN...)")
    parser.add_argument("--config", type=Path, metavar="RESULT.json", help="repeat that run; other options given change it")
    there = parser.add_mutually_exclusive_group()
    there.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    there.add_argument("--force", action="store_true", help="overwrite the run in the folder")
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
        stored = read_json(args.config).get("arguments")
        if not isinstance(stored, list):
            raise InputError(f"{args.config}: is no result.json of a run")
        command = [*map(str, stored), *argv]                              # of two, the later option counts
        args = parser.parse_args(command)
    where = Parser(add_help=False, allow_abbrev=False)                    # what says where, not what, is no part of the command
    for option in ("--out", "--config", "--force", "--resume"):
        where.add_argument(option, nargs="?")
    args.command = where.parse_known_args(command)[1]
    if args.tune and args.method == "ridge":
        parser.error("--tune: ridge has no learning rate; leave it out")
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
    settings, methods = dict(PRESETS.get(data.name, PRESETS["other"])), args.method.split("+")
    names = {name for method in ("dvta", "tdsm") for name in settings[method]}
    given = {name: value for name, value in vars(args).items() if name in names and value is not None}
    strange = given.keys() - {name for method in methods for name in settings[method]}
    if strange:
        raise InputError(f"--method {args.method} has no setting {', '.join(sorted(strange))}; leave it out")
    for method in methods:
        settings[method] = settings[method] | {name: value for name, value in given.items() if name in settings[method]}
    settings["encoder"] = settings["encoder"] | ({"epochs": args.encoder_epochs} if args.encoder_epochs else {})
    tdsm = settings["tdsm"]
    if tdsm["width"] % tdsm["heads"]:
        raise InputError(f"--width {tdsm['width']} cannot be shared by {tdsm['heads']} heads; choose a multiple")
    if tdsm["timestep"] >= STEPS:
        raise InputError(f"--timestep {tdsm['timestep']}: the diffusion has timesteps 0 to {STEPS - 1}")
    return settings, given

# ---------------------------------------------------------------------------------------------------- encoder
def encode(data, settings, seed, device, out, cache):
    """Features (N, 256) of every sample on the device, and {"state", "seen_test_acc", "cached", "file", "seconds"}.
    Skeletons go through an ST-GCN trained on the training samples, cached under a key made from all that it depends on."""
    start = time.perf_counter()
    if data.skeletons is None:
        features = torch.tensor(data.features, dtype=torch.float32, device=device)
        return features, {"state": None, "seen_test_acc": None, "cached": False, "file": None, "seconds": 0.0}
    key = training_key((zsar, train_encoder), settings, seed, device, data.skeletons, data.labels, data.seen, data.train, data.seen_test)
    path = cache / f"{key}.pt"
    cached = path.exists()
    if cached:
        saved = load(path)
        print(f"encoder: from {path}")
    else:
        with seeded(seed, device):
            saved = train_encoder(data, settings, seed, device, out / UNFINISHED / f"encoder-{key}.pt")
        save(prepare_folder(cache) / path.name, lambda f: torch.save(saved, f))
    if saved["seen_test_acc"] is not None:
        print(f"encoder: {saved['seen_test_acc']:.1%} on seen test samples, {len(data.seen)} classes")
    return saved.pop("features").to(device), saved | {"cached": cached, "file": str(path), "seconds": time.perf_counter() - start}

def training_key(code, settings, seed, device, *arrays):
    """A hash of all that trained weights depend on: code, library, settings, seed, and arrays."""
    return fingerprint(*arrays, [settings, seed, device.type, torch.__version__, *map(inspect.getsource, code)])[:16]

def train_encoder(data, settings, seed, device, checkpoint):
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
    losses = lambda rows: {"loss": F.cross_entropy(encoder.classify(x[rows]), y[rows])}
    fit("encoder", encoder, losses, torch.optim.AdamW(encoder.parameters(), settings["lr"]), train, settings, seed, checkpoint)
    zsar.settle_batch_norm(encoder, x, train)
    with torch.no_grad():
        features = torch.empty(N, zsar.FEATURES, device=device)           # filled in cache-sized pieces; a list of them would
        for part, rows in zip(x.split(32), features.split(32)):           # stay between large freed blocks and pin the memory
            rows.copy_(encoder(part))
        hit = encoder.classifier(features[data.seen_test]).argmax(1) == y[data.seen_test]
    return {"state": encoder.state_dict(), "features": features, "seen_test_acc": hit.float().mean().item() if len(hit) else None}

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

@contextlib.contextmanager
def seeded(seed, device):
    """Seed the generators that layers draw from (initial weights, dropout), and put the caller's state back after."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield

def train_all(method, data, features, text, settings, seed, out, final=False):
    """Train ridge and the method, or an ensemble's members → {name: model}, {name: log of `train`}. Where it is the run's final
    training, the best accuracy on the test set is noted, and members may come from runs of their own beside the ensemble's."""
    models, logs, members = {}, {}, method.split("+")
    for name in dict.fromkeys(["ridge", *members]):                       # each once
        alone = Path(str(out).replace(method, name), "model.pt") if final and len(members) > 1 else None
        models[name], logs[name] = train(name, data, features, text, settings[name], seed, out, final and not alone, alone)
    if len(members) > 1:
        models[method] = Ensemble([models[name] for name in members])
    return models, logs

def train(method, data, features, text, settings, seed, out, watch=False, alone=None):
    """Train a method on the training samples → the model and {"key", "seconds", "best"}; or take it from `alone`, the model.pt of a
    run with the same training. `watch`: note the best accuracy on the test set."""
    x, y = features[data.train], torch.as_tensor(data.labels[data.train], device=features.device)   # (n, 256), (n,)
    key = training_key((zsar, alignment, diffusion, build, train), [method, settings], seed, x.device, x.cpu().numpy(), y.cpu().numpy(),
                       *data.text)
    log = {"key": key, "seconds": 0.0, "best": None}
    with seeded(seed, x.device):
        model = build(method, text, settings, y.unique(), x).to(x.device)
        if method == "ridge":
            model.fit(x, y)
            return model, log
        if alone and alone.exists() and (trained := load(alone)).get("keys", {}).get(method) == key:
            model.load_state_dict(trained["states"][method])
            print(f"{method}: from {alone}")
            return model.eval(), log
        if method == "tdsm" and x.is_cuda and not settings["fp32"]:
            model.compile_training()
        losses = model.losses if method == "tdsm" else lambda x, y: {"loss": model.loss(x, y)}
        rows, checkpoint = torch.arange(len(x), device=x.device), out / UNFINISHED / f"{method}-{key}.pt"
        accuracy = (lambda: unseen_figures(model, data, features)["acc"]) if watch else None
        return model, log | fit(method, model, lambda rows: losses(x[rows], y[rows]), model.optimizer(settings["lr"]), rows, settings,
                                seed, checkpoint, accuracy)

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
    for path in files:
        try:
            read.append(read_ntu(path, T))
            names.append(path.name)
        except (OSError, ValueError) as e:
            print(f"skipped: {path.name}: {e}", file=sys.stderr)
    if files and not read:
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

if __name__ == "__main__":
    main()
