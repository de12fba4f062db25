"""From disk to checked `Data`: files, splits, text, dataset folders, an NTU recording, the synthetic set.

A mistake in a file raises InputError, whose one line names the file, the fact and the remedy.

Shapes: N samples; C classes; F recorded frames; T frames; V joints; M persons; L tokens; D text width;
P performers. Class ids are 0-based, skeletons in metres.
"""
import argparse
import csv
import hashlib
import io
import json
import operator
import os
import re
import sys
import tempfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from zsar import GRAPHS, JointGraph, torsos_of

TEXT_DIR = Path(__file__).resolve().parent / "text"


@dataclass(frozen=True, kw_only=True)
class Data:
    """One dataset under one split, checked: every training row is of a seen class."""
    name: str                 # of the dataset
    preset: str               # whose settings fit: "ntu60", "ntu120", "pku51", "synthetic" or "other"
    source: str               # one of FORMATS, or SYNTHETIC
    split: str                # its name
    skeletons: np.ndarray     # (N, 3, T, V, M) in metres, or None where there are features
    graph: JointGraph         # of the skeletons, or None
    features: np.ndarray      # (N, F), or None where there are skeletons
    labels: np.ndarray        # (N,) int64
    classes: list             # C names
    text: list                # an array (C, 1+L, D) for each prompt: row 0 pooled, then tokens, zero padding
    seen: np.ndarray          # class ids, sorted
    unseen: np.ndarray        # class ids, sorted
    val: np.ndarray           # seen classes to hold out when something is chosen; see `validation_of`
    train: np.ndarray         # row numbers
    seen_test: np.ndarray     # row numbers
    unseen_test: np.ndarray   # row numbers
    sha256: str               # fingerprint of the samples, labels and classes
    notes: list               # lines that the user should read


# ----------------------------------------------------------------------------------------------------- errors
class InputError(Exception):
    """A mistake in the user's input. Its one line names the file, the fact and the remedy."""


class Parser(argparse.ArgumentParser):
    """A parser that raises InputError when the command line is wrong."""

    def error(self, message):
        raise InputError(f"{message}; python {self.prog} --help lists the options")


def command_line(command):
    """Run a command. Bad input prints one line on standard error and exits with 2, Ctrl-C with 130."""
    for stream in (sys.stdout, sys.stderr):                     # a terminal may lack a letter
        if hasattr(stream, "reconfigure"):                      # not in a notebook
            stream.reconfigure(errors="replace")
    try:
        return command()
    except InputError as e:
        status, line = 2, f"error: {e}"
    except KeyboardInterrupt:
        status, line = 130, "interrupted; repeat the command to resume"
    print(" ".join(line.splitlines()), file=sys.stderr)
    sys.exit(status)


def note(text):
    """Print one line that the user should read, on standard error."""
    print(" ".join(f"note: {text}".splitlines()), file=sys.stderr)


# ---------------------------------------------------------------------------------------------- reading files
@contextmanager
def reading(path, remedy, form=""):
    """Turn any exception while a file is read into an InputError that ends in the remedy."""
    try:
        yield
    except InputError:                                          # has its own
        raise
    except Exception as e:                                      # a damaged file may raise nearly anything
        raise InputError(f"{path}: cannot be read{form} ({reason(e)}); {remedy}") from None


def reason(error):
    """The first line of an exception's message, without the path that an OSError repeats."""
    return str(getattr(error, "strerror", None) or error).partition("\n")[0]


def text_of(path):
    """A file's text in UTF-8, with or without a byte order mark, or UTF-16. Raises OSError, ValueError."""
    content = path.read_bytes()
    return content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")


def read_lines(path):
    """The class names in a text file, one per line."""
    with reading(path, "write one class name per line and save it as UTF-8"):
        return [line.strip() for line in text_of(path).strip().splitlines()]


def read_json(path):
    """The object in a .json file, as a dict."""
    with reading(path, "the README shows its form", " as JSON"):
        return dict(json.loads(text_of(path)))


def read_tensors(path, keys, remedy="remove it"):
    """A dict that torch.save wrote, with at least these keys, on the CPU; pickled code never runs."""
    with reading(path, remedy):
        value = torch.load(path, map_location="cpu", weights_only=True)
        missing = sorted(set(keys) - set(value))
        if missing:
            raise ValueError(f"it lacks {', '.join(missing)}; another version wrote it")
    return value


def read_array(path, kind, *shapes, mmap=False):
    """The numbers in FILE.npy, or FILE.npz/NAME, of a kind ("float", "int", "bool") and one of the shapes.

    In a shape such as "(N, 3, T, V, M)" a letter is any size except 0. Floats must be finite. Nothing is
    unpickled. → float32, int64 or bool; with `mmap`, memory-mapped in the file's own precision.
    """
    codes, dtype = {"float": ("f", np.float32), "int": ("iu", np.int64), "bool": ("b", bool)}[kind]
    patterns = [re.sub("[A-Z]", "[1-9][0-9]*", re.escape(shape)) for shape in shapes]
    with reading(path, "write plain numbers with numpy.save", " as a .npy array"):
        if path.parent.suffix == ".npz":
            array = np.load(path.parent, allow_pickle=False)[path.name]
        else:
            array = np.lib.format.open_memmap(path, mode="r")
    if array.dtype.kind not in codes or not re.fullmatch("|".join(patterns), str(array.shape)):
        raise InputError(f"{path}: is {array.dtype} {array.shape}, must be {kind} {' or '.join(shapes)}")
    for first, rows in pieces(array) if kind == "float" else ():
        is_finite = np.abs(rows).max(tuple(range(1, rows.ndim))) <= np.finfo(np.float32).max          # (n,)
        if not is_finite.all():
            raise InputError(f"{path}: row {first + is_finite.argmin()} is not finite in float32; correct or "
                             f"drop it")
    return array if mmap else np.array(array, dtype)


def pieces(array, rows=1024):
    """Yield the array's rows in pieces, each with the number of its first row."""
    for first in range(0, len(array), rows):
        yield first, array[first:first + rows]


def fingerprint(*values):
    """SHA-256, in hex digits, of arrays (type, shape and numbers) and of other values as JSON."""
    h = hashlib.sha256()
    for array in values:
        if not isinstance(array, np.ndarray):
            array = np.frombuffer(json.dumps(array).encode(), np.uint8)
        h.update(f"{array.dtype} {array.shape} ".encode())
        for _, part in pieces(array):
            h.update(np.ascontiguousarray(part))
    return h.hexdigest()


# ---------------------------------------------------------------------------------------------- writing files
def make_folder(path):
    """Make a folder, with its parents → its Path."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"{path}: cannot be made ({reason(e)}); choose another place") from None
    return path


def write_file(path, write, option="--out"):
    """Let write(f) write a temporary file beside `path`, then rename it, so `path` is never half-written.

    option: of the command line, which chooses another place.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")    # two runs may write the same encoder
    try:
        with open(part, "wb") as f:
            write(f)
        os.replace(part, path)
    except OSError as e:
        raise InputError(f"{path}: cannot be written ({reason(e)}); give another {option}") from None
    finally:
        with suppress(OSError):
            part.unlink()


@contextmanager
def new_folder(path, force=False):
    """Yield a folder to fill, then rename it to `path`, or with `force` move its files into that folder."""
    if path.exists() and not force:
        raise InputError(f"{path}: exists already; choose another place, or remove it")
    try:
        temporary = tempfile.TemporaryDirectory(prefix=f"{path.name}.", dir=make_folder(path.parent))
    except OSError as e:
        raise InputError(f"{path}: cannot be written ({reason(e)}); choose another place") from None
    with temporary as work:
        made = make_folder(Path(work, "made"))
        yield made
        if not path.exists():
            return os.replace(made, path)
        for file in made.iterdir():
            os.replace(file, path / file.name)


def write_json(path, value):
    """Write a value as a .json file, by `write_file`."""
    write_file(path, lambda f: f.write((json.dumps(value, indent=1) + "\n").encode()))


def write_table(path, rows):
    """Write rows, of which the first is the header, as a .csv file, by `write_file`."""
    table = io.StringIO()
    csv.writer(table).writerows(rows)
    write_file(path, lambda f: f.write(table.getvalue().encode(errors="replace")))


# ----------------------------------------------------------------------------------------------------- splits
class Split(NamedTuple):
    """Which classes training must not see. Lists of class ids; an empty list means its default."""
    name: str
    unseen: list
    val: list = []                # seen classes to hold out when something is chosen; default: drawn
    seen: list = []               # default: all but the unseen classes
    test_subjects: list = None    # default: the test side of the dataset's own protocol


# name: (who published it, dataset, unseen classes, validation classes)
SPLITS = {
    "55_5": ("SynSE", "ntu60", "10 11 19 26 56", "21 16 31 25 48"),
    "48_12": ("SynSE", "ntu60", "3 5 9 12 15 40 42 47 51 56 58 59", "22 8 17 54 33 50 39 30 4 46 13 10"),
    "110_10": ("SynSE", "ntu120", "4 13 37 43 49 65 88 95 99 106", "96 83 74 77 72 76 61 5 32 10"),
    "96_24": ("SynSE", "ntu120",
              "5 9 11 16 18 20 22 29 35 39 45 49 59 68 70 81 84 87 93 94 104 113 114 119",
              "17 10 1 103 105 58 108 4 48 83 97 66 92 86 79 89 53 100 47 27 98 3 19 63"),
    "40_20": ("PURLS", "ntu60", "0 12 13 14 15 16 17 22 23 26 29 30 31 35 36 42 43 48 56 57", ""),
    "30_30": ("PURLS", "ntu60",
              "0 1 2 6 7 8 10 12 13 15 16 18 20 21 25 26 27 31 32 33 39 42 45 47 48 51 52 55 58 59", ""),
    "80_40": ("PURLS", "ntu120",
              "11 12 18 22 23 26 28 34 37 38 42 44 46 47 48 57 59 64 66 70 73 74 75 83 86 90 92 93 95 96 102 "
              "104 107 108 110 112 115 116 118 119", ""),
    "60_60": ("PURLS", "ntu120",
              "0 1 4 6 7 8 9 17 18 21 23 25 26 28 30 32 33 34 37 38 39 40 41 42 44 45 50 51 52 53 56 61 62 "
              "65 67 68 69 70 74 77 78 81 83 87 89 90 91 92 94 95 96 97 100 101 109 111 114 115 116 118", ""),
    "smie_1": ("SMIE", "ntu60", "4 19 31 47 51", ""),
    "smie_2": ("SMIE", "ntu60", "12 29 32 44 59", ""),
    "smie_3": ("SMIE", "ntu60", "7 20 28 39 58", ""),
    "smie_4": ("SMIE", "ntu120", "3 18 26 38 41 60 87 99 102 110", ""),
    "smie_5": ("SMIE", "ntu120", "5 12 14 15 17 42 67 82 100 119", ""),
    "smie_6": ("SMIE", "ntu120", "6 20 27 33 42 55 71 97 104 118", ""),
    "smie_7": ("SMIE", "pku51", "1 9 20 34 50", ""),
    "smie_8": ("SMIE", "pku51", "3 14 29 31 49", ""),
    "smie_9": ("SMIE", "pku51", "2 15 39 41 43", ""),
    "sadvae_1": ("SA-DVAE", "ntu60", "0 8 15 28 46", ""),
    "sadvae_2": ("SA-DVAE", "ntu60", "15 19 23 47 50", ""),
    "sadvae_3": ("SA-DVAE", "ntu60", "29 37 38 45 55", ""),
    "sadvae_4": ("SA-DVAE", "ntu120", "0 4 6 7 24 37 54 59 97 113", ""),
    "sadvae_5": ("SA-DVAE", "ntu120", "63 79 86 92 98 100 103 110 111 117", ""),
    "sadvae_6": ("SA-DVAE", "ntu120", "9 14 17 44 60 75 81 89 108 110", ""),
    "sadvae_7": ("SA-DVAE", "pku51", "10 19 27 38 48", ""),
    "sadvae_8": ("SA-DVAE", "pku51", "0 9 17 30 42", ""),
    "sadvae_9": ("SA-DVAE", "pku51", "18 24 31 43 45", ""),
    "46_5": ("STAR", "pku51", "1 9 20 34 50", ""),
    "39_12": ("STAR", "pku51", "3 7 11 15 19 21 25 31 33 36 43 48", ""),
    "star_3": ("STAR", "pku51", "4 12 16 22 36", ""),
}
# NTU's cross-subject protocol; NTU-60 has subjects 1 to 40
TRAIN_SUBJECTS = [1, 2, 4, 5, 8, 9, *range(13, 20), 25, 27, 28, 31, 34, 35, 38, 45, 46, 47, 49, 50,
                  *range(52, 60), 70, 74, 78, *range(80, 87), 89, *range(91, 96), 97, 98, 100, 103]
DATASETS = {  # name: (stem of its files here, number of classes, its name in published files)
    "ntu60": ("ntu120", 60, "ntu60"), "ntu120": ("ntu120", 120, "ntu120"), "pku51": ("pku51", 51, "pku")}


def list_splits(folder=None):
    """Yield a table of the published splits, or of those for a dataset folder, a line at a time."""
    classes = read_lines(folder / "classes.txt") if folder else []
    own, known = folder and folder / "splits.json", _dataset_of(classes)
    if folder and (own.exists() or not known):
        stem = folder.resolve().stem
        rows = [(_folder_split(own, name), stem, len(classes), own) for name in read_json(own)]
    else:
        rows = [(_published_split(dataset, name, name), dataset, DATASETS[dataset][1], source)
                for name, (source, dataset, _, _) in SPLITS.items() if known in (None, dataset)]
    yield f"{'split':<11}{'dataset':<9}{'seen':>5}{'unseen':>8}{'validation':>12}  source"
    for (name, unseen, val, seen, _), dataset, num_classes, source in rows:
        num_seen = len(seen) or num_classes - len(unseen)
        yield f"{name:<11}{dataset:<9}{num_seen:>5}{len(unseen):>8}{len(val) or '-':>12}  {source}"


def _published_split(dataset, name, where):
    names = [n for n, (_, d, _, _) in SPLITS.items() if d == dataset]
    if name not in names:
        is_part = dataset == "ntu120" and name in SPLITS and SPLITS[name][1] == "ntu60"
        way_out = ", or prepare S001 to S017 alone, which are NTU-60" if is_part else ""
        raise InputError(f"{where}: unknown split {name!r} for {dataset}; choose one of: {', '.join(names)}"
                         f"{way_out}")
    return Split(name, *([int(i) for i in ids.split()] for ids in SPLITS[name][2:]))


def _folder_split(path, name):
    """One entry of splits.json → Split."""
    splits = read_json(path)
    if name not in splits:
        raise InputError(f"{path}: has no split {name!r}; choose one of: {', '.join(splits)}")
    with reading(path, 'write splits like {"NAME": {"unseen": [3, 7], "test_subjects": [2, 4]}}'):
        return Split(name, **{key: [operator.index(i) for i in ids] for key, ids in splits[name].items()})


# ------------------------------------------------------------------------------------------------------- text
def read_text(path, classes=None):
    """One prompt's text in a file, (C, 1+L, D) or (C, D) → float32 (C, 1+L, D), different for each class.

    classes: the names whose text it must be.
    """
    text = read_array(path, "float", "(C, D)", "(C, L, D)")
    if classes and len(text) != len(classes):
        raise InputError(f"{path}: has text for {len(text)} classes, not {len(classes)}; embed classes.txt")
    text = text.reshape(len(text), -1, text.shape[-1])
    pooled = text[:, 0].astype(np.float64)                      # (C, D)
    pooled /= np.maximum(np.linalg.norm(pooled, axis=1, keepdims=True), 1e-6)
    alike = pooled @ pooled.T > 1 - 1e-8                        # (C, C), must be the identity
    wrong = np.argwhere(alike != np.eye(len(text), dtype=bool))
    if len(wrong):
        first, other = wrong[0]
        fact = "is zero" if first == other else f"equals that of class {first}"
        raise InputError(f"{path}: row 0 of class {other} {fact}; put each class's sentence vector there, "
                         f"not CLIP's start token; or prompts are equal, or the model does not know these "
                         f"words")
    return text


def bundled_classes(dataset):
    """The class names of "ntu60", "ntu120" or "pku51", in dataset order."""
    stem, count, _ = DATASETS[dataset]
    return read_lines(TEXT_DIR / f"{stem}_classes.txt")[:count]


def _dataset_of(classes):
    """The dataset that has these class names, or None."""
    return next((dataset for dataset in DATASETS if classes == bundled_classes(dataset)), None)


def bundled_text(dataset):
    """The bundled text [label, description] of "ntu60", "ntu120" or "pku51", float32 (C, 1+L, 768) each."""
    stem, count, _ = DATASETS[dataset]
    return [read_text(TEXT_DIR / f"{stem}_{prompt}.npy")[:count] for prompt in ("label", "description")]


def _read_texts(source, files):
    """The text of all classes: the user's files, those beside the data, or the bundled ones; and notes."""
    dataset, notes = source.dataset, []
    folder = source.where if source.where.is_dir() else source.where.parent
    own = [folder / "text_label.npy", folder / "text_description.npy"]
    stem = DATASETS[dataset][2] if dataset else "unknown"
    published = [folder / f"{stem}{prompt}_embeddings.npy" for prompt in ("", "_des", "_cont")]
    beside = [p for p in own if p.exists()] or [p for p in published if p.exists()]
    if len(beside) == 3 and not files:
        notes = [f"{beside[1]} is used, not {beside[2].name}, which DVTA's code reads; --text chooses"]
    files = files or beside[:2]
    if dataset and not files:
        return bundled_text(dataset), notes
    if not files:
        raise InputError(f"{own[0]}: no such file; embed classes.txt with text/embed.py")
    text = [read_text(path, source.classes) for path in files]
    widths = [prompt.shape[-1] for prompt in text]
    if len(set(widths)) > 1:
        raise InputError(f"{files[-1]}: the prompts have the widths {widths}; embed all with one model")
    return text, notes


# -------------------------------------------------------------------------------------------- dataset folders
FEATURES_FORMAT, SKELETONS_FORMAT = "SynSE / SA-DVAE / TDSM features", "SMIE / DVTA skeletons"
PUBLISHED = {  # format: data and label files of training, unseen test and, optionally, seen test samples
    FEATURES_FORMAT: (("train", "train_label"), ("ztest", "z_label"), ("gtest", "g_label")),
    SKELETONS_FORMAT: (("seen_train_data", "seen_train_label"), ("unseen_data", "unseen_label"),
                       ("seen_test_data", "seen_test_label")),
}
FLORA = (("train_data", "train_label"), ("zsl_data", "zsl_label"), ("gzsl_data", "gzsl_label"))    # one .npz
FORMATS = {  # format: the .npy file by which it is recognised
    "dataset folder with skeletons": "skeletons", "dataset folder with features": "features",
    FEATURES_FORMAT: "train", SKELETONS_FORMAT: "seen_train_data"}
SYNTHETIC = "synthetic set"
SYNTHETIC_NOTE = "SYNTHETIC DATA, not recordings: these figures say nothing about NTU RGB+D."
LARGEST = 100         # metres; no joint is farther from the origin


@dataclass(frozen=True, kw_only=True)
class Source:
    """The samples that a reader finds, which a split divides."""
    where: Path               # its folder or file
    format: str               # one of FORMATS, or SYNTHETIC
    dataset: str              # the key of DATASETS whose classes these are, or None
    classes: list             # C names
    samples: np.ndarray       # skeletons (N, 3, T, V, M) or features (N, F)
    labels: np.ndarray        # (N,) int64
    training: np.ndarray      # (N,) bool: on the training side of the protocol


def read_data(source, split, text_files=(), lying=False):
    """`source`, "synthetic", a folder in one of FORMATS or Flora's .npz, under the split of that name → Data.

    text_files: in place of the folder's own or the bundled text, one a prompt; lying: as for check_bodies.
    """
    path = Path(source)
    layouts = [FEATURES_FORMAT] if path.suffix == ".npz" else [
        layout for layout, stem in FORMATS.items() if (path / f"{stem}.npy").exists()]
    if str(source) == "synthetic":
        found, named_split = _read_synthetic(split)
    elif layouts:
        read = _read_published if layouts[0] in PUBLISHED else _read_folder
        found, named_split = read(path, layouts[0], split)
    else:
        raise InputError(f"{path}: is not a folder with skeletons.npy, features.npy or published arrays; "
                         f"see \"Your data\" in the README")
    text, notes = _read_texts(found, text_files)
    data = divide(found, named_split, text, lying)
    return replace(data, notes=notes + data.notes)


def read_samples(path):
    """Skeletons (N, 3, T, V, M), memory-mapped, or ready features, float32 (N, F)."""
    samples = read_array(path, "float", "(N, 3, T, V, M)", "(N, F)", "(N, F, 1, 1)", mmap=True)
    return samples if samples.ndim == 5 else np.array(samples, np.float32).reshape(samples.shape[:2])


def graph_beside(folder, samples):
    """The graph of skeletons (N, 3, T, V, M): the folder's graph.json, or the built-in one of V joints."""
    own = folder / "graph.json"
    if samples.ndim == 2:
        return None
    return read_graph(own) if own.exists() else GRAPHS.get(samples.shape[3])


def read_graph(path):
    """The joint graph in a graph.json, which must be one tree."""
    with reading(path, 'write {"edges": [[child, parent], ...], "centre": 1, "root": [0], '
                       '"shoulders": [left, right]}'):
        value = json.loads(text_of(path))
        edges = tuple((int(child), int(parent)) for child, parent in value["edges"])
        (left, right), (hip, *hips) = map(int, value["shoulders"]), map(int, value["root"])
        graph = JointGraph(edges, int(value["centre"]), (hip, *hips), (left, right))
    connected = {graph.centre}
    for _ in edges:                                             # each round adds the neighbours
        connected |= {joint for edge in edges if connected & set(edge) for joint in edge}
    stray = {*range(len(edges) + 1), *graph.root, *graph.shoulders} - connected
    if stray:
        raise InputError(f"{path}: joint {min(stray)} is not in the tree; {len(edges)} edges must join the "
                         f"joints 0 to {len(edges)} to the centre, joint {graph.centre}")
    return graph


def check_bodies(where, skeletons, graph, lying=False):
    """Check that bodies are in metres, y up, in the graph's order → which rows have a body (N,), and notes.

    lying: bodies need not stand upright.
    """
    V = skeletons.shape[3]
    if not graph or len(graph.edges) + 1 != V:
        raise InputError(f"{where}: has {V} joints; give a graph.json of {V} joints (built in: {[*GRAPHS]})")
    measured = [(*torsos_of(part, graph), part.min((2, 3, 4)), part.max((2, 3, 4)))
                for _, part in pieces(skeletons)]
    torsos, upright, low, high = map(np.concatenate, zip(*measured))        # (N,) twice, (N, 3) twice
    has_body, farthest, notes = torsos > 0, np.maximum(-low, high).max(1), []
    if not has_body.any():
        raise InputError(f"{where}: no sequence has a body; all joints of the first person lie in one point")
    torso, height = np.median(torsos[has_body]), np.median(upright[has_body])
    if farthest.max() > LARGEST or not 0.05 <= torso <= 3:
        raise InputError(f"{where}: the median torso is {torso:.3g} m long, row {farthest.argmax()} reaches "
                         f"{farthest.max():.4g} m; are these millimetres or pixels? Give metres")
    if height < 0.5 and not lying:
        raise InputError(f"{where}: bodies do not stand, their shoulders are {height:.2f} torso lengths "
                         f"above the spine base; is it another joint layout, y down, z up, or are axes "
                         f"exchanged? If y points down, negate x and y (half a turn); see python "
                         f"docs/plot.py --data {where} --row 0, or give --allow-lying")
    zeros, low, high = _share_of_zeros(skeletons), low.min(0), high.max(0)      # a number, (3,) twice
    if zeros > 0.001:
        notes.append(f"{where}: {zeros:.1%} of the joints are 0, 0, 0 in frames that show the first person; "
                     f"interpolate them")
    if low[2] >= 0 and high[2] <= 1 and (low.min() < 0 or high.max() > 1):
        notes.append(f"{where}: the third channel alone is from 0 to 1; is it a confidence? Give 3-D data")
    if not has_body.all():
        notes.append(f"{where}: {(~has_body).sum()} of {len(has_body)} sequences have no first person")
    return has_body, notes


def _share_of_zeros(skeletons):
    """The share of the first person's joints that are at 0, 0, 0 in frames that show them.

    The joint that is there most often does not count: centred data have their origin in it.
    """
    zeros, shown = 0, 0                                         # (V,) frames, and how many frames there are
    for _, part in pieces(skeletons):
        is_zero = ~part[..., 0].any(1)                          # (n, T, V)
        is_zero = is_zero[~is_zero.all(2)]                      # (frames, V)
        zeros, shown = zeros + is_zero.sum(0), shown + len(is_zero)
    return (zeros.sum() - zeros.max()) / (shown * (len(zeros) - 1))


# A reader → its Source and Split.
def _read_folder(path, layout, split_name):
    """A dataset folder (README, "Your data")."""
    samples, classes = read_samples(path / f"{FORMATS[layout]}.npy"), read_lines(path / "classes.txt")
    column = f"({len(samples)},)"
    labels = read_array(path / "labels.npy", "int", column)
    dataset = _dataset_of(classes)
    if (path / "splits.json").exists() or not dataset:
        split = _folder_split(path / "splits.json", split_name)
    else:
        split = _published_split(dataset, split_name, path)
    if split.test_subjects is None and (path / "training.npy").exists():
        training = read_array(path / "training.npy", "bool", column)
    else:
        subjects, tests = read_array(path / "subjects.npy", "int", column), split.test_subjects or ()
        if split.test_subjects is None and dataset in ("ntu60", "ntu120"):
            tests = np.setdiff1d(subjects, TRAIN_SUBJECTS)
        training = ~np.isin(subjects, tests)
    return Source(where=path, format=layout, dataset=dataset, classes=classes, samples=samples,
                  labels=labels, training=training), split


def _read_published(path, layout, split_name):
    """A folder or Flora's .npz of published codes, whose labels say the split.

    The dataset is that of the published split, or that of classes.txt, or the one in the path's name.
    """
    samples, labels, training, split = _published_samples(path, layout, split_name)
    folder = path if path.is_dir() else path.parent
    own, about, dataset = folder / "classes.txt", folder / "README.txt", None
    if split_name in SPLITS:
        dataset = SPLITS[split_name][1]
        published = _published_split(dataset, split_name, path)
        if sorted(published.unseen) != split.unseen:
            raise InputError(f"{path}: its unseen classes are {split.unseen}, those of {split_name} are "
                             f"{sorted(published.unseen)}; choose another split")
        split = split._replace(val=published.val)
    elif not own.exists():
        name = path.resolve().name.lower()
        dataset = next((d for d, (_, _, stem) in DATASETS.items() if stem in name), None)
    if not dataset and not own.exists():
        raise InputError(f"{path}: is of an unknown dataset; choose a published --split, or a name with "
                         f"ntu60, ntu120 or pku in it, or add classes.txt")
    classes = bundled_classes(dataset) if dataset else read_lines(own)
    if about.exists() and SYNTHETIC_NOTE.encode() in about.read_bytes():        # of write_features
        layout = SYNTHETIC
    return Source(where=path, format=layout, dataset=dataset or _dataset_of(classes), classes=classes,
                  samples=samples, labels=labels, training=training), split


def _published_samples(path, layout, split_name):
    """The training, unseen test and, if present, seen test samples of a published folder or Flora's .npz.

    → samples, labels (N,), which rows are for training (N,), and the Split of their classes.
    """
    names, suffix = (FLORA, "") if path.is_file() else (PUBLISHED[layout], ".npy")
    with reading(path, "give a folder or .npz of published samples"):
        stored = np.load(path) if path.is_file() else os.listdir(path)
    if "test.npy" in stored and "ztest.npy" not in stored:      # as in DVTA's folders
        names = names[0], ("test", "test_label"), names[2]
    if f"{names[2][0]}{suffix}" not in stored:
        names = names[:2]
    parts = []
    for x_name, y_name in names:
        x = read_samples(path / f"{x_name}{suffix}")
        y = read_array(path / f"{y_name}{suffix}", "int", f"({len(x)},)", f"({len(x)}, 1)").reshape(-1)
        parts.append((x, y))
    seen, unseen = (np.unique(y).tolist() for _, y in parts[:2])
    # gtest may repeat the unseen test samples
    parts[2:] = [(x[~np.isin(y, unseen)], y[~np.isin(y, unseen)]) for x, y in parts[2:]]
    with reading(path, "encode all parts alike"):
        samples, labels = map(np.concatenate, zip(*parts))
    training = np.arange(len(labels)) < len(parts[0][1])
    return samples, labels, training, Split(split_name, unseen, seen=seen)


def _read_synthetic(split_name):
    """The embedded default: NTU-60's classes, text and splits with generated skeletons."""
    split, (label, description) = _published_split("ntu60", split_name, "synthetic"), bundled_text("ntu60")
    skeletons, labels, subjects = synthetic((label[:, 0] + description[:, 0]) / 2)
    return Source(where=TEXT_DIR, format=SYNTHETIC, dataset="ntu60", classes=bundled_classes("ntu60"),
                  samples=skeletons, labels=labels, training=subjects % 2 == 1), split


def divide(source, split, text, lying=False):
    """Apply the protocol: training rows are seen classes of the training side, test rows the rest → Data.

    A sequence without a body is not trained on, but remains a test sample.
    """
    where, samples, labels, has_body, notes = source.where, source.samples, source.labels, True, []
    preset = "synthetic" if source.format == SYNTHETIC else source.dataset or "other"
    graph, is_features = graph_beside(where, samples), samples.ndim == 2
    if not is_features:
        has_body, notes = check_bodies(where, samples, graph, lying)
    seen, unseen = _checked_classes(source, split)
    if 0 not in labels and len(source.classes) - 1 in labels:
        notes.append(f"{where}: class 0 has no sample, but the last class has; are labels 1-based?")
    is_seen, is_unseen = np.isin(labels, seen), np.isin(labels, unseen)     # (N,)
    train = np.flatnonzero(is_seen & source.training & has_body)
    seen_test, unseen_test = (np.flatnonzero(rows & ~source.training) for rows in (is_seen, is_unseen))
    num_trained = len(np.unique(labels[train]))
    if min(num_trained, len(unseen)) < 2 or not len(unseen_test):
        raise InputError(f"{where}: split {split.name!r} leaves {num_trained} classes to train on, "
                         f"{len(unseen)} unseen and {len(unseen_test)} test samples of these; choose other "
                         f"classes, or test_subjects")
    most = max(len(seen) // 5, 2 if len(seen) >= 4 else 0)      # nothing can be chosen on one class
    drawn = np.random.default_rng(0).permutation(seen)[:min(len(split.unseen), most)]
    return Data(name=where.resolve().stem if preset == "other" else preset, preset=preset,
                source=source.format, split=split.name, skeletons=None if is_features else samples,
                graph=graph, features=samples if is_features else None, labels=labels,
                classes=source.classes, text=text, seen=seen, unseen=unseen,
                val=np.intersect1d(split.val or drawn, seen), train=train, seen_test=seen_test,
                unseen_test=unseen_test, sha256=fingerprint(samples, labels, source.classes), notes=notes)


def _checked_classes(source, split):
    """The split's seen and unseen class ids, sorted. They and the labels must be among the C classes."""
    where, labels, C = source.where, source.labels, len(source.classes)
    outside = np.flatnonzero((labels < 0) | (labels >= C))
    if len(outside):
        raise InputError(f"{where}: label {labels[outside[0]]} in row {outside[0]} is not from 0 to {C - 1}; "
                         f"are labels 1-based? They must be 0-based rows of classes.txt")
    unseen = np.unique(split.unseen)
    seen = np.unique(split.seen or np.setdiff1d(np.arange(C), unseen))
    stray = {*seen, *unseen} - {*range(C)} or {*seen} & {*unseen}
    if stray:
        raise InputError(f"{where}: split {split.name!r} has class {min(stray)}, which is not from 0 to "
                         f"{C - 1}, or both seen and unseen; correct it")
    return seen, unseen


def validation_of(data):
    """Data to choose γ and settings on: among the training samples, the validation classes become unseen.

    A fifth of the other classes' samples are held out as seen test samples.
    """
    is_val = np.isin(data.labels[data.train], data.val)         # (n,)
    held_out = ~is_val & (np.random.default_rng(0).random(len(is_val)) < 0.2)
    train, unseen_test = data.train[~is_val & ~held_out], data.train[is_val]
    if not len(train) or len(np.unique(data.labels[unseen_test])) < 2:
        raise InputError(f"{data.name}: split {data.split!r} has the validation classes {data.val.tolist()}; "
                         f"too few to choose by, or all that are seen; name others as 'val'")
    return replace(data, seen=np.setdiff1d(data.seen, data.val), unseen=data.val,
                   train=train, seen_test=data.train[held_out], unseen_test=unseen_test)


def read_validation(data, path):
    """The same from a published features folder, whose encoder has not seen the validation classes."""
    samples, labels, training, split = _published_samples(path, FEATURES_FORMAT, data.split)
    known = sorted({*split.unseen, *split.seen} & {*data.unseen.tolist()})
    if data.features is None or samples.shape[1:] != data.features.shape[1:] or known:
        raise InputError(f"{path}: has shape {samples.shape} and the unseen classes {known}; give "
                         f"features as wide as those of --data, without unseen classes")
    source = Source(where=path, format=data.source, dataset=None, classes=data.classes, samples=samples,
                    labels=labels, training=training)
    return replace(divide(source, split, data.text), name=data.name, preset=data.preset, notes=data.notes)


def write_features(folder, data, features, about, force=False):
    """Write features (N, F) of all samples as a published folder, with text, classes.txt and README.txt.

    about: the README's lines; force: overwrite the files of that name in the folder.
    """
    tests = np.concatenate([data.seen_test, data.unseen_test])
    with new_folder(folder, force) as made:
        parts = zip(PUBLISHED[FEATURES_FORMAT], (data.train, data.unseen_test, tests))
        for (x_name, y_name), rows in parts:
            np.save(made / f"{x_name}.npy", features[rows])
            np.save(made / f"{y_name}.npy", data.labels[rows])
        for name, prompt in zip(("label", "description"), data.text):
            np.save(made / f"text_{name}.npy", prompt)
        for name, lines in (("classes", data.classes), ("README", about)):
            (made / f"{name}.txt").write_bytes(("\n".join(lines) + "\n").encode())


def read_sequences(path, frames):
    """New samples to label, from .skeleton files (a folder or one file), a dataset folder or a .npy file.

    → their names, and skeletons (N, 3, T, V, M) or features (N, F); files are resampled to `frames`.
    """
    files = [path] if path.suffix.lower() == ".skeleton" else files_in(path, ".skeleton")
    if not files:
        if path.is_dir():
            path = path / ("skeletons.npy" if (path / "skeletons.npy").exists() else "features.npy")
        samples = read_samples(path)
        return [f"row {n}" for n in range(len(samples))], samples
    names, skeletons, skipped = [], [], []
    for file in files:
        try:
            skeletons.append(read_ntu(file, frames))
            names.append(file.name)
        except (OSError, ValueError) as e:
            skipped.append(f"{file.name}: {reason(e)}")
    if not names:
        raise InputError(f"{path}: none of its {len(files)} .skeleton files could be read; {skipped[0]}")
    if skipped:
        note(f"{path}: {len(skipped)} of {len(files)} files skipped; {'; '.join(skipped[:3])}")
    return names, np.stack(skeletons)


# ------------------------------------------------------------------------------------------ an NTU recording
def people_of(tracks):
    """The tracks of a recording's bodies → the two people in them, (2, F, V, 3), zeros where absent.

    A track is (frame numbers (n,), joints (n, V, 3)). The tracker may lose a person and find them under a new
    id, and may take furniture for people. So short tracks and wide ones are dropped. Each of the others, by
    falling motion, joins the main actor's track, or the second actor's, whichever first has no body in its
    frames. Source: the rules of CTR-GCN, the order of persons of pyskl, behind published NTU features.
    Raises ValueError without a body.
    """
    tracks = [(frames, xyz) for frames, xyz in tracks if xyz.any()]
    if not tracks:
        raise ValueError("no body")
    longest = max(tracks, key=lambda track: len(track[0]))
    ranked = []                                                 # (is noise, −motion, frame numbers, joints)
    for frames, xyz in [track for track in tracks if len(track[0]) > 11] or [longest]:
        wide = np.ptp(xyz[..., 0], axis=1) > 0.8 * np.ptp(xyz[..., 1], axis=1)          # (n,)
        noise = wide.mean() > 0.69754
        plausible = xyz if noise else xyz[~wide]
        motion = min(part.reshape(-1, 3).var(0).sum() for part in (xyz, plausible))
        ranked.append((noise, -motion, frames, xyz))
    ranked.sort(key=lambda track: track[:2])
    main, second = {}, {}                                       # {frame number: joints (V, 3)}
    for _, _, frames, xyz in [track for track in ranked if not track[0]] or ranked[:1]:
        person = next((p for p in (main, second) if p.keys().isdisjoint(frames)), {})
        person.update(zip(frames, xyz))
    shown = sorted(main.keys() | second.keys())                 # drops frames without a person
    people = (main, second) if shown[0] in main else (second, main)
    absent = np.zeros_like(longest[1][0])
    return np.array([[person.get(frame, absent) for frame in shown] for person in people])


def resampled(people, frames):
    """People (M, F, V, 3), zeros where absent → a skeleton (3, frames, V, 2), float32, linear in time.

    Where a person appears or leaves, the nearer frame counts. Frames without a person are dropped. Raises
    ValueError without a body, or if a coordinate cannot be in metres.
    """
    people = np.asarray(people, np.float64)[:2]
    if not (np.abs(people) < LARGEST).all():                    # also rejects NaN
        raise ValueError(f"a coordinate is not finite, or exceeds {LARGEST} m")
    people = people[:, people.any((0, 2, 3))]
    if not people.size:
        raise ValueError("no body")
    position = np.linspace(0, people.shape[1] - 1, frames)      # (frames,) in the recording
    before, after = np.floor(position).astype(int), np.ceil(position).astype(int)
    present = people.any((2, 3))                                # (M, F)
    w0 = (1 + before - position) * present[:, before]           # (M, frames)
    w1 = (position - before) * present[:, after]                # (M, frames)
    mixed = w0[..., None, None] * people[:, before] + w1[..., None, None] * people[:, after]
    mixed /= np.maximum(w0 + w1, 1e-9)[..., None, None]         # (M, frames, V, 3)
    skeleton = mixed.transpose(3, 1, 2, 0).astype(np.float32)
    return np.pad(skeleton, [(0, 0), (0, 0), (0, 0), (0, 2 - len(people))])


def read_ntu(path, frames):
    """One NTU .skeleton file → (3, frames, 25, 2) float32. Raises OSError or ValueError with the reason."""
    return resampled(ntu_people(path), frames)


def check_joints(count):
    """Raise ValueError unless it is the number of NTU's joints."""
    if count != 25:
        raise ValueError(f"has {count} joints, must be 25; make a dataset folder with graph.json")


def ntu_people(path):
    """The two people of an NTU .skeleton file, (2, F, 25, 3). Raises OSError or ValueError, as read_ntu."""
    fields, tracks, position = text_of(path).split(), {}, 1     # {body id: {frame: 75 numbers}}
    try:
        for frame in range(int(fields[0])):
            num_bodies, position = int(fields[position]), position + 1
            for _ in range(num_bodies):                         # 11 fields, then 12 for each of 25 joints
                check_joints(int(fields[position + 10]))
                joints = fields[position + 11:position + 311]
                xyz = list(map(float, joints[::12] + joints[1::12] + joints[2::12]))
                tracks.setdefault(fields[position], {})[frame] = xyz
                position += 311
    except IndexError:
        raise ValueError("is truncated") from None
    if position != len(fields):
        raise ValueError(f"does not end after its {fields[0]} frames")
    return people_of([(list(track), np.array(list(track.values())).reshape(-1, 3, 25).swapaxes(1, 2))
                      for track in tracks.values()])


def files_in(source, suffix):
    """The files in a folder with a suffix in upper or lower case, at any depth, through links, by name."""
    found = [Path(folder, name) for folder, _, names in os.walk(source, followlinks=True)
             for name in names if name.lower().endswith(suffix)]
    return sorted(found, key=lambda path: (path.name, path))


# ------------------------------------------------------------------------------------------ the synthetic set
# Offset of each NTU joint from its parent in a standing body, metres: x to its right, y up, z front to back.
_PARENT = [-1, 0, 20, 2, 20, 4, 5, 6, 20, 8, 9, 10, 0, 12, 13, 14, 0, 16, 17, 18, 1, 22, 7, 24, 11]
_ARM = [(-.17, -.03, 0), (-.04, -.26, 0), (-.02, -.24, -.03), (0, -.08, -.01)]
_LEG = [(-.09, -.04, 0), (-.01, -.42, 0), (0, -.40, .01), (-.01, -.06, -.12)]
_HAND = [(-.02, -.05, 0), (.03, -.03, -.02)]
_RIGHT = (-1, 1, 1)   # mirrors a left limb
_OFFSET = np.concatenate([
    [(0, 0, 0), (0, .25, 0), (0, .07, 0), (0, .14, -.01)], _ARM, np.multiply(_ARM, _RIGHT),
    _LEG, np.multiply(_LEG, _RIGHT), [(0, .24, 0)], _HAND, np.multiply(_HAND, _RIGHT)])
# The joint angles that move: (joint, axis), axis 0 bends about x, 1 twists about y, 2 leans about z.
_ANGLES = [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (8, 0), (8, 1), (8, 2),
           (5, 0), (5, 1), (9, 0), (9, 1), (12, 0), (12, 2), (16, 0), (16, 2), (13, 0), (17, 0)]


def synthetic(text, performers=12, repeats=3, frames=32, seed=0):
    """Generate skeletons whose motion is a smooth function of their class's text, so that it transfers.

    text (C, D): one vector a class. Its 6 leading principal components go through fixed random maps to the
    pose, amplitude and phase of 21 joint angles, to a frequency and to a hop; forward kinematics turns the
    angles into joints. → skeletons (N, 3, frames, 25, 1) in metres, labels (N,), 1-based subjects (N,).
    """
    rng, num_angles = np.random.default_rng(seed), len(_ANGLES)
    u, _, vt = np.linalg.svd((text - text.mean(0)).astype(np.float64), full_matrices=False)
    sign = np.sign(vt[np.arange(len(vt)), np.abs(vt).argmax(1)])                # an SVD does not fix the sign
    z = (u * sign)[:, :6] * np.sqrt(len(text))                  # (C, 6), of unit variance

    def random_map(width):                                      # (C, width), each in -1..1
        return np.tanh(z @ rng.normal(0, z.shape[1] ** -0.5, (z.shape[1], width)))

    # each class
    pose, amplitude = 0.8 * random_map(num_angles), 0.8 * random_map(num_angles)
    phase = random_map(num_angles)
    cycles, hop = 2 * 2 ** (0.35 * random_map(1)), 0.15 * random_map(1).clip(min=0)
    # each performer
    labels, subjects, _ = np.indices((len(text), performers, repeats)).reshape(3, -1)
    N, P = len(labels), performers
    size = rng.uniform(0.88, 1.12, (P, 1)) * rng.uniform(0.95, 1.05, (P, 25))
    posture = rng.normal(0, 0.06, (P, num_angles))
    tempo, vigour = rng.uniform(0.85, 1.15, P), rng.uniform(0.8, 1.2, P)
    facing, noise = rng.uniform(-0.6, 0.6, P), rng.uniform(0.005, 0.015, P)
    # each sample
    pace = tempo[subjects] * rng.normal(1, 0.05, N)             # (N,)
    start = rng.uniform(-0.08, 0.08, (N, 1))
    turns = cycles[labels] * (np.linspace(0, 1, frames) * pace[:, None] + start)            # (N, T)
    swing = amplitude[labels] * vigour[subjects, None] * rng.normal(1, 0.1, (N, num_angles))
    rest = pose[labels] + posture[subjects] + rng.normal(0, 0.06, (N, num_angles))          # (N, angles)
    wave = np.sin(2 * np.pi * turns[:, :, None] + phase[labels][:, None])                   # (N, T, angles)
    angles = np.zeros((N, frames, 25, 3))
    joints, axes = np.array(_ANGLES).T
    angles[:, :, joints, axes] = rest[:, None] + swing[:, None] * wave
    angles[:, :, 0, 1] = (facing[subjects] + rng.normal(0, 0.1, N))[:, None]
    root = np.zeros((N, frames, 3)) + [0, 0, 3] + rng.normal(0, 0.2, (N, 1, 3))          # 3 m from the camera
    root[:, :, 1] += hop[labels] * np.abs(np.sin(np.pi * turns))
    xyz = _forward_kinematics(angles, root, (_OFFSET * size[:, :, None])[subjects])         # (N, T, 25, 3)
    xyz += rng.normal(size=xyz.shape) * noise[subjects][:, None, None, None]
    return xyz.transpose(0, 3, 1, 2)[..., None].astype(np.float32), labels, subjects + 1


def _forward_kinematics(angles, root, offset):
    """Angles (N, T, V, 3), roots (N, T, 3), bone offsets (N, V, 3) → joint positions (N, T, V, 3)."""
    (cx, cy, cz), (sx, sy, sz) = np.moveaxis(np.cos(angles), -1, 0), np.moveaxis(np.sin(angles), -1, 0)
    rows = ((cz * cy, cz * sy * sx - sz * cx, cz * sy * cx + sz * sx),          # R_z R_y R_x
            (sz * cy, sz * sy * sx + cz * cx, sz * sy * cx - cz * sx),
            (-sy, cy * sx, cy * cx))
    rotation = np.stack([np.stack(row, -1) for row in rows], -2)       # (N, T, V, 3, 3), local, then global
    xyz = np.zeros(angles.shape)
    xyz[:, :, 0] = root
    for joint in (1, 20, *range(2, 20), 22, 21, 24, 23):       # parents first
        parent = _PARENT[joint]
        rotation[:, :, joint] = rotation[:, :, parent] @ rotation[:, :, joint]
        bone = np.einsum("ntij,nj->nti", rotation[:, :, parent], offset[:, joint])
        xyz[:, :, joint] = xyz[:, :, parent] + bone
    return xyz
