"""From disk to one checked `Data` value: gates that read files, splits, text, folder layouts, raw recordings.

    python data.py ntu RAW_DIR OUT_DIR   NTU RGB+D .skeleton files → a dataset folder
    python data.py pku RAW_DIR OUT_DIR   PKU-MMD skeletons, labels and cross-subject file → a dataset folder

Whatever is wrong with a file raises InputError, whose one line says what, in which file, and what to do.

Shapes: N samples; C classes; F recorded frames; T frames; V joints; M persons; L tokens; D text width;
P performers. Class ids are 0-based, skeletons in metres.
"""
import os
import signal

if __name__ == "__main__":                                      # Ctrl-C while PyTorch loads: one line too
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"interrupted\n"), os._exit(130)))

import argparse
import contextlib
import csv
import hashlib
import io
import json
import re
import shutil
import sqlite3
import stat
import sys
import threading
import time
import warnings
import zipfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from zsar import FEATURES, GRAPHS, torso_lengths

TEXT_DIR = Path(__file__).resolve().parent / "text"


@dataclass
class Data:
    """One dataset under one split, checked: everything that training and testing may read.

    Either `skeletons` (N, 3, T, V, M) in metres or ready `features` (N, 256) is given, the other is None.
    `train`, `seen_test`, `unseen_test` are row numbers; no training row has an unseen class.
    """
    name: str                 # of the dataset
    preset: str               # whose settings fit: "ntu60", "ntu120", "pku51", "synthetic" or "other"
    source: str               # one of FORMATS, or "synthetic set"
    split: str
    skeletons: np.ndarray
    features: np.ndarray
    labels: np.ndarray        # (N,) int64
    classes: list             # C names
    text: list               # an array (C, 1+L, D) a prompt: row 0 pooled, rows 1.. tokens, zero rows padding
    seen: np.ndarray          # class ids, sorted
    unseen: np.ndarray
    val: np.ndarray           # seen classes to hold out when something is chosen; see `validation`
    train: np.ndarray
    seen_test: np.ndarray
    unseen_test: np.ndarray
    notes: list               # lines that the user should read


# ----------------------------------------------------------------------------------------------------- errors
class InputError(Exception):
    """Bad input from the user. Its one line says what is wrong, in which file, and what to do."""


class Parser(argparse.ArgumentParser):
    """Reads a command line; a wrong one raises InputError."""

    def error(self, message):
        """Raise the message instead of printing the usage and exiting."""
        raise InputError(f"{message}; python {self.prog} --help lists the options")


class _Output(io.TextIOBase):
    """A stream that never raises: what a terminal cannot show becomes "?", what nobody reads goes nowhere."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        """Write and flush."""
        encoding = self.stream.encoding or "utf-8"
        try:
            self.stream.write(text.encode(encoding, "replace").decode(encoding))
            self.stream.flush()
        except OSError:                                         # `| head -1` has gone, or the disk is full
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def command_line(command):
    """Run a command. Bad input: one line on standard error, exit status 2; Ctrl-C: one line, 130.

    No output raises, and libraries do not warn: their lines would stand before that one.
    """
    with contextlib.ExitStack() as stack:
        for stream, redirect in ((sys.stdout, contextlib.redirect_stdout),
                                 (sys.stderr, contextlib.redirect_stderr)):
            if stream:
                stack.enter_context(redirect(_Output(stream)))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        try:
            command()
        except KeyboardInterrupt as e:
            _stop(f"interrupted{e}", 130)
        except (InputError, OSError, MemoryError) as e:
            _stop(f"error: {str(e) or 'out of memory'}", 2)
        except RuntimeError as e:
            if "memory" not in str(e):                          # PyTorch's word for it
                raise
            _stop(f"error: {e}; choose a smaller --batch-size, --width or --depth", 2)


def note(text):
    """One line that the user should read, on standard error."""
    print(" ".join(f"note: {text}".splitlines()), file=sys.stderr)


def _stop(message, status):
    print(" ".join(message.splitlines()), file=sys.stderr)
    sys.exit(status)


# ---------------------------------------------------------------------------------------------- reading files
def regular_file(path):
    """The path, if a regular file is there: reading a FIFO or a device might never end. Raises InputError."""
    try:
        if stat.S_ISREG(os.stat(path).st_mode):
            return path
        reason = "is no regular file"
    except FileNotFoundError:
        reason = "no such file"
    except (OSError, ValueError) as e:                          # ValueError: a NUL in the path
        reason = f"cannot be read ({getattr(e, 'strerror', None) or e})"
    raise InputError(f"{path}: {reason}; the README says what is needed there")


def read_json(path):
    """The object in a .json file, as a dict. Raises InputError, for a key twice too."""
    regular_file(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_without_duplicates)
        if not isinstance(value, dict):
            raise ValueError("must be an object: {...}")
        return value
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{path}: cannot be read as JSON ({e}); see the README for its form") from None


def _without_duplicates(pairs):
    """A JSON object's pairs as a dict. Raises ValueError."""
    twice = _twice(key for key, _ in pairs)
    if twice:
        raise ValueError(f"{twice[0]!r} stands there twice")
    return dict(pairs)


def _twice(values):
    """Those that are there more than once."""
    return [value for value, count in Counter(values).items() if count > 1]


def read_lines(path):
    """The class names in a text file, one a line. Raises InputError."""
    regular_file(path)
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as e:
        reason = e.__class__.__name__
        raise InputError(f"{path}: cannot be read ({reason}); it must hold one class name a line") from None
    if not lines or "" in lines:
        raise InputError(f"{path}: has an empty line; it must hold one class name a line, by id")
    twice = _twice(lines)
    if twice:
        raise InputError(f"{path}: names {twice[0]!r} twice; give each class a name of its own")
    return lines


def read_tensors(path, keys):
    """The dict, with those keys at least, that this program saved with torch.save; never unpickled.

    → on the CPU. Its container's checksums must hold and its numbers be finite. Raises InputError.
    """
    regular_file(path)
    try:
        if not checksums_hold(path):
            raise ValueError
        value = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(value, dict) and not set(keys) - set(value):
            if all(tensor.isfinite().all() for tensor in _tensors(value)):
                return value
        raise ValueError
    except Exception:                                           # a damaged file may raise nearly anything
        raise InputError(f"{path}: is damaged or no file of this version of the program; "
                         f"name another, or remove it") from None


def checksums_hold(path):
    """Whether a .pt or .npz file is there and whole, by the checksums in its container."""
    try:
        if not path.is_file():
            return False
        with zipfile.ZipFile(path) as container:
            return container.testzip() is None
    except Exception:                                           # a damaged file may raise nearly anything
        return False


def _tensors(value):
    """All tensors in nested dicts and lists."""
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


@contextlib.contextmanager
def parts_of(path):
    """Uses what was read from a file: where its parts do not fit each other, raises InputError."""
    try:
        yield
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as e:
        raise InputError(f"{path}: its parts do not fit each other ({e}); name another, or remove it"
                         ) from None


def read_array(path, kind, *shapes, limit=1e6, unit="", mmap=False):
    """Read one .npy file, never unpickling, of a kind ("float", "int", "bool") and one of the shapes.

    A shape is like "(N, 3, T, V, M)"; its numbers are fixed sizes. All floats must lie within ± limit, of a
    unit that the message names.
    → float32, int64 or bool; with `mmap`, not read into memory, in the file's own precision.
    Raises InputError if the file is missing, broken, pickled, or something else.
    """
    regular_file(path)
    try:                                           # mapped: a header that promises too much allocates nothing
        array = np.lib.format.open_memmap(path, mode="r")
        spare = os.path.getsize(path) - array.offset - array.nbytes
    except Exception as e:                                      # a damaged header may raise nearly anything
        if "Python objects" in str(e):
            raise InputError(f"{path}: holds pickled objects, which are never loaded; "
                             f"save it as a plain numeric array") from None
        raise InputError(f"{path}: is no readable .npy file ({e}); write it with numpy.save") from None
    if array.size and spare:
        raise InputError(f"{path}: holds {spare} bytes more than its header says; write it with numpy.save")
    if array.dtype.kind not in {"float": "f", "int": "iu", "bool": "b"}[kind]:
        raise InputError(f"{path}: dtype is {array.dtype}, must be {kind}; convert it with .astype")
    if 0 in array.shape or not any(_fits(array.shape, shape) for shape in shapes):
        raise InputError(f"{path}: shape is {array.shape}, must be {' or '.join(shapes)}")
    if kind == "float":
        _refuse_beyond(path, array, limit, unit)
    return array if mmap else np.array(array, {"float": np.float32, "int": np.int64, "bool": bool}[kind])


def _fits(shape, pattern):
    """Whether a shape is like a pattern such as "(N, 3, T, V, M)"."""
    sizes = pattern.strip("()").rstrip(",").split(", ")
    if len(sizes) != len(shape):
        return False
    return all(int(size) == n for size, n in zip(sizes, shape) if size.isdigit())


def _refuse_beyond(path, array, limit, unit):
    for first, rows in pieces(array):
        with np.errstate(invalid="ignore", over="ignore"):
            bad = ~(np.abs(rows) < limit)                       # NaN too
        if bad.any():
            row = first + int(bad.reshape(len(rows), -1).any(1).argmax())
            raise InputError(f"{path}: {rows[bad][0]} in row {row}, must be a number within "
                             f"±{limit:g}{unit}; mend or drop that row")


def pieces(array, rows=1024):
    """The array's rows, 1024 at a time, each piece with the number of its first row.

    A memory-mapped array is read as a plain file: pages once touched in a map would stay in memory.
    """
    for first in range(0, len(array), rows):
        part = array[first:first + rows]
        if isinstance(array, np.memmap) and array.flags.c_contiguous:
            offset = array.offset + first * array.strides[0]
            part = np.fromfile(array.filename, array.dtype, part.size, offset=offset).reshape(part.shape)
        yield first, part


def fingerprint(*values):
    """SHA-256, in hex digits, of arrays' types, shapes and numbers, and of what is no array as JSON."""
    h = hashlib.sha256()
    for array in values:
        if not isinstance(array, np.ndarray):
            array = np.frombuffer(json.dumps(array).encode(), np.uint8)
        h.update(f"{array.dtype} {array.shape} ".encode())
        for _, part in pieces(array):
            h.update(np.ascontiguousarray(part))
    return h.hexdigest()


# ---------------------------------------------------------------------------------------------- writing files
def prepare_folder(path):
    """Make a folder that results can be written to → its Path. Raises InputError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as e:                          # ValueError: a NUL in the path
        reason = getattr(e, "strerror", None) or e
        raise InputError(f"{path}: no folder can be made there ({reason}); choose another place") from None
    return path


def write_file(path, write):
    """Let write(f) write a file beside its place, then rename it: no half-written file is ever seen.

    Raises InputError, and leaves an older file as it was, if that fails.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")    # two runs may write the same encoder
    try:
        with open(part, "wb") as f:
            write(f)
        os.replace(part, path)
    except (OSError, RuntimeError, ValueError) as e:       # torch.save tells of a full disk by a RuntimeError
        if part.exists():                                       # ValueError: a NUL in the path
            part.unlink()
        reason = getattr(e, "strerror", None) or "disk full?"
        raise InputError(f"{path}: cannot be written ({reason}); "
                         f"free space or choose another place") from None


def write_json(path, value):
    """Write a value as a .json file, like `write_file`."""
    write_file(path, lambda f: f.write((json.dumps(value, indent=1) + "\n").encode()))


def write_table(path, rows):
    """Write rows, the first the header, as a .csv file, like `write_file`."""
    table = io.StringIO()
    csv.writer(table).writerows(rows)
    write_file(path, lambda f: f.write(table.getvalue().encode(errors="replace")))


# ----------------------------------------------------------------------------------------------------- splits
class Split(NamedTuple):
    """Which classes training must not see. Lists of class ids; an empty one takes its default."""
    name: str
    unseen: list
    val: list = []         # held out of the seen ones when anything is chosen; default: drawn by a fixed seed
    seen: list = []           # default: all but the unseen ones
    test_subjects: list = None   # default: the dataset's own protocol says which samples are for testing


# name: (dataset, unseen classes, validation classes)
SPLITS = {
    # SynSE (Gupta et al., ICIP 2021)
    "55_5": ("ntu60", "10 11 19 26 56", "21 16 31 25 48"),
    "48_12": ("ntu60", "3 5 9 12 15 40 42 47 51 56 58 59", "22 8 17 54 33 50 39 30 4 46 13 10"),
    "110_10": ("ntu120", "4 13 37 43 49 65 88 95 99 106", "96 83 74 77 72 76 61 5 32 10"),
    "96_24": ("ntu120", "5 9 11 16 18 20 22 29 35 39 45 49 59 68 70 81 84 87 93 94 104 113 114 119",
              "17 10 1 103 105 58 108 4 48 83 97 66 92 86 79 89 53 100 47 27 98 3 19 63"),
    # PURLS
    "40_20": ("ntu60", "0 12 13 14 15 16 17 22 23 26 29 30 31 35 36 42 43 48 56 57", ""),
    "30_30": ("ntu60", "0 1 2 6 7 8 10 12 13 15 16 18 20 21 25 26 27 31 32 33 39 42 45 47 48 51 52 55 58 59",
              ""),
    "80_40": ("ntu120", "11 12 18 22 23 26 28 34 37 38 42 44 46 47 48 57 59 64 66 70 73 74 75 83 86 90 92 93 "
              "95 96 102 104 107 108 110 112 115 116 118 119", ""),
    "60_60": ("ntu120", "0 1 4 6 7 8 9 17 18 21 23 25 26 28 30 32 33 34 37 38 39 40 41 42 44 45 50 51 52 53 "
              "56 61 62 65 67 68 69 70 74 77 78 81 83 87 89 90 91 92 94 95 96 97 100 101 109 111 114 115 116 "
              "118", ""),
    # SMIE
    "smie_1": ("ntu60", "4 19 31 47 51", ""),
    "smie_2": ("ntu60", "12 29 32 44 59", ""),
    "smie_3": ("ntu60", "7 20 28 39 58", ""),
    "smie_4": ("ntu120", "3 18 26 38 41 60 87 99 102 110", ""),
    "smie_5": ("ntu120", "5 12 14 15 17 42 67 82 100 119", ""),
    "smie_6": ("ntu120", "6 20 27 33 42 55 71 97 104 118", ""),
    "smie_7": ("pku51", "1 9 20 34 50", ""),
    "smie_8": ("pku51", "3 14 29 31 49", ""),
    "smie_9": ("pku51", "2 15 39 41 43", ""),
}
_NTU60_TRAIN = [1, 2, 4, 5, 8, 9, *range(13, 20), 25, 27, 28, 31, 34, 35, 38]
_NTU120_MORE = [45, 46, 47, 49, 50, *range(52, 60), 70, 74, 78, *range(80, 87), 89, *range(91, 96), 97, 98,
                100, 103]
TRAIN_SUBJECTS = {"ntu60": _NTU60_TRAIN, "ntu120": _NTU60_TRAIN + _NTU120_MORE}     # cross-subject protocol
# dataset: (stem of its files, number of classes)
BUNDLED_TEXT = {"ntu60": ("ntu120", 60), "ntu120": ("ntu120", 120), "pku51": ("pku51", 51)}


def list_splits():
    """Lines that name every published split with its dataset, its numbers of classes and its source."""
    yield f"{'split':<10}{'dataset':<9}{'seen':>5}{'unseen':>8}{'validation':>12}  source"
    for name, (dataset, unseen, val) in SPLITS.items():
        unseen, val = len(unseen.split()), len(val.split())
        source = "SMIE" if "smie" in name else "SynSE" if val else "PURLS"
        seen = BUNDLED_TEXT[dataset][1] - unseen
        yield f"{name:<10}{dataset:<9}{seen:>5}{unseen:>8}{val or '-':>12}  {source}"


def _published_split(dataset, name, where):
    names = [n for n, (d, _, _) in SPLITS.items() if d == dataset]
    if name not in names:
        raise InputError(f"{where}: unknown split {name!r} for {dataset}; choose one of: {', '.join(names)}")
    _, unseen, val = SPLITS[name]
    return Split(name, [int(i) for i in unseen.split()], [int(i) for i in val.split()])


def _folder_split(path, name, num_classes, has_training):
    """One entry of splits.json → Split; without test subjects if there is a training.npy to say it."""
    splits = read_json(path)
    if not all(isinstance(entry, dict) for entry in splits.values()):
        raise InputError(f'{path}: must be {{"NAME": {{"unseen": [...], "test_subjects": [...]}}}}')
    if name not in splits:
        raise InputError(f"{path}: has no split {name!r}; choose one of: {', '.join(splits)}")
    entry, where = splits[name], f"{path}: split {name!r}"
    strange = sorted(entry.keys() - {"unseen", "val", "seen", "test_subjects"})
    if strange:
        raise InputError(f"{where}: unknown key {strange[0]!r}; it has 'unseen', 'val', 'seen', "
                         f"'test_subjects'")
    unseen, val, seen = (_class_ids(entry, key, num_classes, where) for key in ("unseen", "val", "seen"))
    if len(unseen) < 2:
        raise InputError(f"{where}: 'unseen' lists {len(unseen)} classes; "
                         f"name at least two to be told apart without training")
    both = sorted({*val, *seen} & {*unseen})
    if both:
        raise InputError(f"{where}: class {both[0]} is unseen, and 'val' or 'seen' names it for training; "
                         f"take it out of one")
    if seen and set(val) - set(seen):
        raise InputError(f"{where}: 'val' names class {min(set(val) - set(seen))}, which is not in 'seen'; "
                         f"validation classes are seen ones")
    tests = entry.get("test_subjects")
    is_list = isinstance(tests, list) and all(type(i) is int and abs(i) < 2 ** 63 for i in tests)
    if not is_list and not (tests is None and has_training):
        raise InputError(f"{where}: 'test_subjects' must list the subjects whose samples are for testing")
    return Split(name, unseen, val, seen, tests)


def _class_ids(entry, key, num_classes, where):
    """The list of class ids under a key, [] if there is none."""
    ids = entry.get(key, [])
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < num_classes for i in ids):
        raise InputError(f"{where}: {key!r} must be a list of class ids from 0 to {num_classes - 1}")
    twice = sorted(_twice(ids))
    if twice:
        raise InputError(f"{where}: {key!r} names a class twice: {twice}")
    return ids


# ------------------------------------------------------------------------------------------------------- text
def read_text(path, classes=None):
    """Read one prompt's text features, (C, 1+L, D) or (C, D) → float32 (C, 1+L, D).

    Raises InputError if they do not fit the names of the classes, one has none, or two have the same.
    """
    text = read_array(path, "float", "(C, D)", "(C, 1+L, D)")
    if classes and len(text) != len(classes):
        raise InputError(f"{path}: has text for {len(text)} classes, the dataset has {len(classes)}; "
                         f"embed its classes.txt")
    text = text.reshape(len(text), -1, text.shape[-1])
    length = np.linalg.norm(text[:, 0].astype(np.float64), axis=1)             # (C,)
    if length.min() < 1e-6:
        raise InputError(f"{path}: the pooled vector of class {length.argmin()} is zero; embed it again")
    unit = np.round(text[:, 0] / length[:, None], 4) + 0.0                      # + 0.0: −0 is 0
    _, first, which = np.unique(unit, axis=0, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[which.ravel()] != np.arange(len(text)))        # classes like an earlier one
    if len(again):
        pair = first[which.ravel()[again[0]]], again[0]
        names = f" ({classes[pair[0]]}, {classes[pair[1]]})" if classes else ""
        raise InputError(f"{path}: classes {pair[0]} and {pair[1]}{names} have the same text, so nothing can "
                         f"tell them apart; describe each")
    return text


def bundled_classes(dataset):
    """The class names of "ntu60", "ntu120" or "pku51", in dataset order."""
    stem, count = BUNDLED_TEXT[dataset]
    return read_lines(TEXT_DIR / f"{stem}_classes.txt")[:count]


def bundled_text(dataset):
    """The bundled text [label, description] of "ntu60", "ntu120" or "pku51", float32 (C, 1+L, 768) each."""
    stem, count = BUNDLED_TEXT[dataset]
    return [read_text(TEXT_DIR / f"{stem}_{prompt}.npy")[:count] for prompt in ("label", "description")]


def _read_texts(folder, dataset, classes, files):
    """The files that the user names, else the folder's own, else the bundled ones of a known dataset."""
    own = [folder / "text_label.npy", folder / "text_description.npy"]
    published = [path for path in _published_texts(folder, dataset) if path.exists()]
    if not files:
        files = own if not dataset or own[0].exists() or own[1].exists() else published
    if not files:
        return bundled_text(dataset)
    text = [read_text(path, classes) for path in files]
    for path, prompt in zip(files, text):
        if prompt.shape[-1] != text[0].shape[-1]:
            raise InputError(f"{path}: width {prompt.shape[-1]} differs from the {text[0].shape[-1]} of "
                             f"{files[0]}; embed both alike")
    return text


def _published_texts(folder, dataset):
    """Where published codes keep the text of labels and of descriptions, beside their features."""
    return [folder / f"{dataset}_embeddings.npy", folder / f"{dataset}_des_embeddings.npy"]


def _other_texts(folder, dataset):
    """A line that names text arrays beside the features which nobody reads."""
    others = sorted(path.name for path in folder.glob("*embeddings.npy")
                    if path not in _published_texts(folder, dataset))
    if not others:
        return []
    return [f"{folder}: {', '.join(others)} left alone; --text chooses text features"]


# -------------------------------------------------------------------------------------------- dataset folders
PUBLISHED = {  # format: data and label files of training, unseen test and, if there, seen test samples
    "SynSE / SA-DVAE / TDSM features": (("train", "train_label"), ("ztest", "z_label"), ("gtest", "g_label")),
    "SMIE / DVTA skeletons": (("seen_train_data", "seen_train_label"), ("unseen_data", "unseen_label"),
                              ("seen_test_data", "seen_test_label")),
}
FORMATS = {  # format: the .npy file that tells it
    "dataset folder with skeletons": "skeletons",
    "dataset folder with features": "features",
    **{name: parts[0][0] for name, parts in PUBLISHED.items()},
}


TORSO = (0.05, 3)     # metres that a torso can have


class _Pool(NamedTuple):
    """All samples of one source, before the protocol divides them."""
    name: str                 # of the dataset
    preset: str               # as of Data
    source: str               # as of Data
    samples: np.ndarray       # skeletons (N, 3, T, V, M) or features (N, 256)
    torsos: np.ndarray        # (N,) lengths in metres, 0 without a body; 1 for features
    labels: np.ndarray        # (N,)
    training: np.ndarray      # (N,) bool: on the training side of the protocol
    classes: list
    text: list
    notes: list               # as of Data


def read_data(source, split, text_files=()):
    """Read `source`, "synthetic" or a folder in one of FORMATS, under the split of that name → Data.

    text_files: text features to use in place of the folder's own or the bundled ones, one file a prompt.
    Raises InputError.
    """
    if str(source) == "synthetic":
        return divide(*_synthetic_pool(split, text_files), where="synthetic")
    folder = Path(source)
    layout = find_format(folder, FORMATS)
    read_pool = _published_pool if layout in PUBLISHED else _folder_pool
    return divide(*read_pool(folder, split, layout, text_files), where=folder)


def find_format(folder, formats):
    """The one of some formats that the folder has, by its files. Raises InputError for none and for two."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give a dataset folder, or --data synthetic")
    found = [name for name in formats if (folder / f"{FORMATS[name]}.npy").exists()]
    if not found:
        looked_for = ", ".join(f"{FORMATS[name]}.npy ({name})" for name in formats)
        raise InputError(f"{folder}: fits no format; looked for {looked_for}; "
                         f"raw recordings go through python data.py first")
    if len(found) > 1:
        raise InputError(f"{folder}: holds two formats, {' and '.join(found)}; keep one")
    return found[0]


def read_samples(path, layout):
    """Skeletons (N, 3, T, V, M), memory-mapped, with a V that has a joint graph, or features (N, 256).

    → the samples, and the lengths of their torsos (N,) in metres: 0 without a body, 1 for features. Raises
    InputError, also for what cannot be metres.
    """
    if "features" in layout:
        features = read_array(path, "float", f"(N, {FEATURES})")
        return features, np.ones(len(features))
    skeletons = _read_skeletons(path, limit=1000)
    return skeletons, measured_torsos(path, skeletons)


def _read_skeletons(path, limit):
    skeletons = read_array(path, "float", "(N, 3, T, V, M)", limit=limit, unit=" m", mmap=True)
    num_joints = skeletons.shape[3]
    if num_joints not in GRAPHS:
        known = ", ".join(map(str, GRAPHS))
        raise InputError(f"{path}: has {num_joints} joints; joint graphs exist for V = {known}")
    return skeletons


def measured_torsos(path, skeletons):
    """The torsos' lengths of sequences (N, 3, T, V, M) → (N,). Raises InputError for what is not metres."""
    graph = GRAPHS[skeletons.shape[3]]
    torsos = np.concatenate([torso_lengths(part, graph) for _, part in pieces(skeletons)])      # (N,)
    if not torsos.any():
        raise InputError(f"{path}: no sequence has a body: all joints of the first person lie in one point")
    if len(skeletons) > 1 and all((part == skeletons[:1]).all() for _, part in pieces(skeletons)):
        raise InputError(f"{path}: all sequences are the same; record them anew")
    median = np.median(torsos[torsos > 0])
    if not TORSO[0] <= median <= TORSO[1]:
        raise InputError(f"{path}: the median torso, spine base to shoulders, is {median:.3g} m long, must "
                         f"be {TORSO[0]} to {TORSO[1]}; are these millimetres? Give metres")
    return torsos


def odd_torsos(torsos):
    """A line for sequences without a body, and one for those that cannot be metres."""
    empty, odd = (torsos == 0).sum(), ((torsos > 0) & ((torsos < TORSO[0]) | (torsos > TORSO[1]))).sum()
    if empty:
        yield f"{empty} of {len(torsos)} sequences have no body, or not as their first person"
    if odd:
        yield f"{odd} of {len(torsos)} sequences have a torso outside {TORSO[0]} to {TORSO[1]} m"


def read_sequence(folder, row):
    """One sequence as it was recorded, even in millimetres: of a folder's (training) skeletons, or .skeleton
    files in the order of their names. → its name, (3, T, V, M) float32. Raises InputError.
    """
    samples = files = sorted(folder.glob("*.skeleton"))
    if not files:
        layout = find_format(folder, [name for name in FORMATS if "skeletons" in name])
        path = folder / f"{FORMATS[layout]}.npy"
        samples = _read_skeletons(path, limit=1e6)
    if row >= len(samples):
        raise InputError(f"{folder}: has no row {row}; choose one from 0 to {len(samples) - 1}")
    if files:
        with parts_of(files[row]):
            return files[row].name, read_ntu(files[row], 64)
    return f"{path.name}, row {row}", np.array(samples[row], np.float32)


def _read_labels(path, num_samples, num_classes):
    labels = read_array(path, "int", f"({num_samples},)")
    outside = (labels < 0) | (labels >= num_classes)
    if outside.any():
        row = int(outside.argmax())
        raise InputError(f"{path}: label {labels[row]} in row {row} is outside the text's rows, "
                         f"0 to {num_classes - 1}; labels are 0-based rows of classes.txt")
    return labels


def _folder_pool(folder, split_name, layout, text_files):
    """A dataset folder (README, "Your data") → _Pool and Split."""
    samples, torsos = read_samples(folder / f"{FORMATS[layout]}.npy", layout)
    classes = read_lines(folder / "classes.txt")
    labels = _read_labels(folder / "labels.npy", len(samples), len(classes))
    dataset = next((d for d in BUNDLED_TEXT if classes == bundled_classes(d)), None)
    text = _read_texts(folder, dataset, classes, text_files)
    has_training = (folder / "training.npy").exists()
    protocol_is_known = dataset in TRAIN_SUBJECTS or (dataset and has_training)
    if (folder / "splits.json").exists() or not protocol_is_known:
        split = _folder_split(folder / "splits.json", split_name, len(classes), has_training)
    else:
        split = _published_split(dataset, split_name, folder)
    notes = _other_texts(folder, dataset)
    training = _training_side(folder, split, dataset, len(samples), notes)
    name, preset = dataset or folder.resolve().name, dataset or "other"
    return _Pool(name, preset, layout, samples, torsos, labels, training, classes, text, notes), split


def _training_side(folder, split, dataset, num_samples, notes):
    """Which samples are for training (N,): by the split, training.npy, or the published subjects."""
    if split.test_subjects is None and (folder / "training.npy").exists():
        return read_array(folder / "training.npy", "bool", f"({num_samples},)")
    subjects = read_array(folder / "subjects.npy", "int", f"({num_samples},)")
    if split.test_subjects is None:
        return np.isin(subjects, TRAIN_SUBJECTS[dataset])
    nobody = sorted(set(split.test_subjects) - set(subjects.tolist()))
    if nobody:
        notes.append(f"{folder / 'splits.json'}: split {split.name!r} tests subjects {nobody}, who are in no "
                     f"sample")
    return ~np.isin(subjects, split.test_subjects)


def _published_pool(folder, split_name, layout, text_files):
    """A folder for one split, in a layout of published codes → _Pool and Split."""
    if split_name not in SPLITS:
        raise InputError(f"{folder}: unknown split {split_name!r}; python train.py --list shows them all")
    dataset = SPLITS[split_name][0]
    classes, split = bundled_classes(dataset), _published_split(dataset, split_name, folder)
    part_names = ["train", "unseen test", "seen test"]
    samples, torsos, labels, training = [], [], [], []
    for part, (data_name, label_name) in zip(part_names, PUBLISHED[layout]):
        if data_name == "ztest" and not (folder / "ztest.npy").exists():
            data_name, label_name = "test", "test_label"        # as DVTA's folders have it
        path, label_path = folder / f"{data_name}.npy", folder / f"{label_name}.npy"
        if part == "seen test" and not path.exists():
            break
        x, lengths = read_samples(path, layout)
        y = _read_labels(label_path, len(x), len(classes))
        _refuse_other_split(label_path, part, y, split)
        if samples and x.shape[1:] != samples[0].shape[1:]:
            raise InputError(f"{path}: shape is {x.shape}, that of the training samples {samples[0].shape}")
        if part == "seen test":                             # gtest may hold the unseen test samples once more
            keep = ~np.isin(y, split.unseen)
            x, y, lengths = x[keep], y[keep], lengths[keep]
        samples.append(x)
        torsos.append(lengths)
        labels.append(y)
        training.append(np.full(len(y), part == "train"))
    text = _read_texts(folder, dataset, classes, text_files)
    samples, torsos, labels, training = map(np.concatenate, (samples, torsos, labels, training))
    notes = _other_texts(folder, dataset)
    return _Pool(dataset, dataset, layout, samples, torsos, labels, training, classes, text, notes), split


def _refuse_other_split(path, part, labels, split):
    """Raise InputError where a published folder's labels are not those of the split that was named."""
    held, unseen = np.unique(labels).tolist(), sorted(split.unseen)
    fits = {"train": not set(held) & set(unseen), "unseen test": held == unseen, "seen test": True}
    if not fits[part]:
        raise InputError(f"{path}: its classes {held} do not fit split {split.name}, whose unseen ones are "
                         f"{unseen}; choose the folder's own split")


def _synthetic_pool(split_name, text_files):
    """The embedded default: NTU-60's classes, text and splits with made skeletons; odd performers train."""
    text = bundled_text("ntu60")
    split = _published_split("ntu60", split_name, "synthetic")
    skeletons, labels, subjects = synthetic((text[0][:, 0] + text[1][:, 0]) / 2)
    torsos, classes = np.ones(len(labels)), bundled_classes("ntu60")
    text = _read_texts(TEXT_DIR, "ntu60", classes, text_files)
    return _Pool("synthetic", "synthetic", "synthetic set", skeletons, torsos, labels, subjects % 2 == 1,
                 classes, text, []), split


def divide(pool, split, where):
    """Apply the protocol: training rows are seen classes of training subjects, test rows the others'.

    `where` names the source in an error. A sequence without a body is not trained on; as a test sample it
    stays. → Data. Raises InputError if a part is left without samples.
    """
    seen = np.unique(split.seen or np.setdiff1d(np.arange(len(pool.classes)), split.unseen))
    is_seen, is_unseen = np.isin(pool.labels, seen), np.isin(pool.labels, split.unseen)     # (N,)
    train = np.flatnonzero(is_seen & pool.training & (pool.torsos > 0))
    seen_test = np.flatnonzero(is_seen & ~pool.training)
    unseen_test = np.flatnonzero(is_unseen & ~pool.training)
    for part, rows in (("training", train), ("unseen test", unseen_test)):
        if not len(rows):
            raise InputError(f"{where}: split {split.name!r} leaves no {part} samples; "
                             f"check its classes and subjects")
    if len(np.unique(pool.labels[train])) < 2:
        raise InputError(f"{where}: split {split.name!r} leaves one class to train on; give it more")
    notes = pool.notes + _oddities(pool, split, train, unseen_test, where)
    drawn = np.random.default_rng(0).permutation(seen)[:min(len(split.unseen), len(seen) // 5)]
    skeletons, features = (None, pool.samples) if pool.samples.ndim == 2 else (pool.samples, None)
    return Data(name=pool.name, preset=pool.preset, source=pool.source, split=split.name,
                skeletons=skeletons, features=features,
                labels=pool.labels, classes=pool.classes, text=pool.text,
                seen=seen, unseen=np.unique(split.unseen), val=np.intersect1d(split.val or drawn, seen),
                train=train, seen_test=seen_test, unseen_test=unseen_test, notes=notes)


def _oddities(pool, split, train, unseen_test, where):
    """Lines on what may be meant, and may be a mistake. Raises InputError where all features are the same."""
    notes = [f"{where}: {line}" for line in odd_torsos(pool.torsos)]
    if pool.samples.ndim == 2:
        dead = pool.samples[train].std(0) < 1e-6                # (256,)
        if dead.all():
            raise InputError(f"{where}: all features for training are the same; encode them again")
        if dead.any():
            notes.append(f"{where}: {dead.sum()} of {FEATURES} features never change in training")
    untested = [pool.classes[c] for c in sorted(set(split.unseen) - set(pool.labels[unseen_test].tolist()))]
    if untested:
        notes.append(f"{where}: no test samples of unseen classes: {', '.join(untested)}")
    return notes


def validation(data):
    """The task one level down, for choosing γ and settings: the validation classes play the unseen ones.

    Of all samples only training ones are in it; a fifth of the other classes' are held out as seen test
    samples.
    → Data. Raises InputError.
    """
    is_val = np.isin(data.labels[data.train], data.val)         # (n,)
    held_out = ~is_val & (np.random.default_rng(0).random(len(is_val)) < 0.2)
    train, seen_test, unseen_test = data.train[~is_val & ~held_out], data.train[held_out], data.train[is_val]
    if not all(map(len, [train, seen_test, unseen_test, data.seen_test])):
        raise InputError(f"{data.name}: split {data.split!r} has no seen test samples, or too few for "
                         f"training without the validation classes {data.val.tolist()}")
    return replace(data, seen=np.setdiff1d(data.seen, data.val), unseen=data.val,
                   train=train, seen_test=seen_test, unseen_test=unseen_test)


# --------------------------------------------------------------------------------------------- raw recordings
PREPARATION = 1       # version of what a prepared folder and its parts hold
PART_FILES = 64       # files to one part of a preparation: what an interruption loses
LARGEST_FILE = 1 << 26   # bytes; a recording has some 1e6
LEAST_FRAMES = 12     # that a body must be there for: shorter ones are mostly ghosts
NTU_NAME = re.compile(r"S(\d{3})C(\d{3})P(\d{3})R\d{3}A(\d{3})\.skeleton", re.ASCII)


def resampled_bodies(bodies, num_frames, frames):
    """Recorded bodies → one skeleton (3, frames, V, 2) float32, main actor first.

    A body is {frame: 3·V numbers, all x, all y, all z}. Of the bodies in at least 12 frames (or, if none is,
    in as many as the longest), the two with the most motion, the joints' summed variance. Time is resampled
    linearly; where a body comes or goes it is as in its nearer frame, where it is absent, zeros. Raises
    ValueError if nobody is there.
    """
    tracks = []                                                 # [(the frames where it is, (n, 3, V)), ...]
    for body in bodies:
        if body:
            tracks.append((list(body), np.array(list(body.values())).reshape(len(body), 3, -1)))
    if not all((np.abs(xyz) < 1000).all() for _, xyz in tracks):                            # NaN neither
        raise ValueError("a coordinate is no number below 1000 m")
    tracks = [(present, xyz) for present, xyz in tracks if xyz.any()]
    if not tracks:
        raise ValueError("no body")
    longest = max(len(present) for present, _ in tracks)
    tracks = [track for track in tracks if len(track[0]) >= min(LEAST_FRAMES, longest)]
    tracks.sort(key=lambda track: -track[1].var(0).sum())
    out = np.zeros((3, frames, tracks[0][1].shape[-1], 2), np.float32)
    for m, (present, xyz) in enumerate(tracks[:2]):
        out[..., m] = _resampled(present, xyz, num_frames, frames)
    return out


def _resampled(present, xyz, num_frames, frames):
    """One body's positions (n, 3, V) in the n frames where it is present → (3, frames, V)."""
    at = np.linspace(0, num_frames - 1, frames)                 # (frames,) positions in the recording
    before, after = np.floor(at).astype(int), np.ceil(at).astype(int)
    whole, there = np.zeros((num_frames, *xyz.shape[1:])), np.zeros(num_frames)
    whole[present], there[present] = xyz, 1
    w0, w1 = (1 + before - at) * there[before], (at - before) * there[after]               # (frames,) weights
    mixed = w0[:, None, None] * whole[before] + w1[:, None, None] * whole[after]
    return (mixed / np.maximum(w0 + w1, 1e-9)[:, None, None]).swapaxes(0, 1)


def _recording(path):
    """The text of a raw file. Raises OSError, and ValueError for what cannot be one."""
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise ValueError("is no regular file")
    if about.st_size > LARGEST_FILE:
        raise ValueError(f"is too large: over {LARGEST_FILE >> 20} MB")
    return path.read_text(encoding="ascii")


def read_ntu(path, frames):
    """One NTU .skeleton file → (3, frames, 25, 2) float32. Raises OSError, ValueError, with the reason."""
    fields = _recording(path).split()
    try:
        bodies, num_frames, end = _ntu_bodies(fields)
    except IndexError:
        raise ValueError("is truncated") from None
    if end != len(fields):
        raise ValueError(f"goes on after its {num_frames} frames")
    return resampled_bodies(bodies.values(), num_frames, frames)


def _ntu_bodies(fields):
    """The fields of an NTU file → {body id: {frame: 75 numbers}}, its frames, the field it ends at."""
    num_frames, bodies, at = int(fields[0]), {}, 1
    for frame in range(num_frames):
        num_bodies, at = int(fields[at]), at + 1
        for _ in range(num_bodies):                            # 10 fields, the joint count, 12 fields a joint
            if int(fields[at + 10]) != 25:
                raise ValueError(f"{fields[at + 10]} joints in frame {frame}, must be 25")
            joints = fields[at + 11:at + 311]
            if len(joints) < 300:
                raise IndexError
            xyz = list(map(float, joints[::12] + joints[1::12] + joints[2::12]))
            bodies.setdefault(fields[at], {})[frame] = xyz
            at += 311
    return bodies, num_frames, at


def ntu_samples(path, frames):
    """One NTU file → its (skeleton, (label, subject, camera, setup)). Raises ValueError."""
    name = NTU_NAME.fullmatch(path.name)
    if not name or not 1 <= int(name[4]) <= 120:
        raise ValueError("its name is not SsssCcccPpppRrrrAaaa.skeleton with an action from 1 to 120")
    setup, camera, subject, action = map(int, name.groups())
    yield read_ntu(path, frames), (action - 1, subject, camera, setup)


def pku_samples(path, frames):
    """One PKU-MMD video, Skeleton/NAME.txt, cut by Label/NAME.txt → a sample of each segment.

    A sample is (skeleton, (label, is training)). A segment that is none gives the reason, a str, instead.
    Raises ValueError for the whole video.
    """
    training, validation = _pku_videos(path.parent.parent)
    if path.stem not in training + validation:
        raise ValueError("is in neither list of the cross-subject file")
    lines = [line.split() for line in _recording(path).splitlines()]
    if any(len(line) != 150 for line in lines):
        raise ValueError("must hold 150 numbers a line")
    video = np.array(lines, dtype=np.float64).reshape(-1, 2, 25, 3).swapaxes(2, 3).reshape(-1, 2, 75)
    segments = _recording(path.parent.parent / "Label" / path.name).splitlines()
    if not segments:
        yield "its label file names no segment"
    for i, segment in enumerate(segments, start=1):
        try:
            action, start, end = map(int, segment.split(",")[:3])
            yield _pku_skeleton(video, action, start, end, frames), (action - 1, path.stem in training)
        except ValueError as e:
            yield f"label line {i}: {e}"


def _pku_skeleton(video, action, start, end, frames):
    """Frames `start` to `end` of a video (F, 2, 75) → (3, frames, 25, 2). Raises ValueError."""
    if not (1 <= action <= 51 and 0 <= start < end <= len(video)):
        raise ValueError(f"action {action}, frames {start} to {end} of {len(video)}")
    bodies = [{t: xyz for t, xyz in enumerate(video[start:end, body]) if xyz.any()} for body in range(2)]
    return resampled_bodies(bodies, end - start, frames)


def _pku_videos(raw):
    """The cross-subject file's two lists of names, training and validation videos. Raises InputError."""
    try:
        path, = raw.rglob("cross*subject*.txt")
        lists = [re.findall(r"\d{4}-[LMR]", line) for line in _recording(path).splitlines()]
        training, validation = [names for names in lists if names]
        if set(training) & set(validation):
            raise ValueError
    except (OSError, ValueError):
        raise InputError(f"{raw}: must hold one cross-subject.txt, a line of training and a line of other, "
                         f"validation videos") from None
    return training, validation


RAW = {  # kind: (files, their reader, columns of a sample's row)
    "ntu": ("*.skeleton", ntu_samples, ("labels", "subjects", "cameras", "setups")),
    "pku": ("Skeleton/*.txt", pku_samples, ("labels", "training")),
}


def prepare(kind, raw, out, frames=64, protocol="xsub", jobs=os.cpu_count()):
    """Read the raw recordings of a kind into a dataset folder, samples in the order of the file names.

    The work goes in parts of 64 files, kept beside OUT, so that an interrupted preparation goes on where it
    was; only a whole folder gets the name OUT. `protocol`, for ntu: which samples are for training, by
    subject, camera (view) or setup. Raises InputError.
    """
    raw, out = Path(raw), Path(out)
    files = sorted(raw.rglob(RAW[kind][0]), key=lambda path: (path.name, path))
    if not files:
        raise InputError(f"{raw}: holds no {RAW[kind][0]}; give the folder of the raw {kind} recordings")
    twice = _twice(path.name for path in files)
    if twice:
        raise InputError(f"{raw}: holds two recordings {twice[0]}; keep one")
    recordings = fingerprint([_stamp(path, raw) for path in files])
    request = {"kind": kind, "frames": frames, "protocol": protocol, "recordings": recordings,
               "version": PREPARATION}
    if os.path.lexists(out):                                    # a link to nowhere too
        return _refuse_other_request(out, request)
    beside = Path(os.path.abspath(out))
    work = prepare_folder(beside.with_name(f"{beside.name}.{fingerprint([request])[:8]}.part"))
    with _only_one(work / "lock") as lock:
        parts = {work / f"{i:06}.npz": files[i:i + PART_FILES] for i in range(0, len(files), PART_FILES)}
        _read_parts(kind, parts, frames, jobs)
        _join_parts(kind, work, parts, protocol)
        sizes = {path.name: path.stat().st_size for path in work.glob("*.npy")}
        write_json(work / "prepared.json", request | {"sizes": sizes})
        lock.unlink()
        os.replace(work, out)
    print(f"written: {out}")


def _stamp(path, raw):
    """What tells one recording from another: its place under the raw folder, its size and its time."""
    try:
        about = path.stat()
        return [str(path.relative_to(raw)), about.st_size, about.st_mtime_ns]
    except OSError:                                             # a dangling link
        return [str(path.relative_to(raw)), None, None]


@contextlib.contextmanager
def _only_one(path):
    """Keep others from the same preparation meanwhile, by a lock that ends with its process → its file.

    Raises InputError.
    """
    lock = sqlite3.connect(path, timeout=0)                     # has such a lock on every system
    try:
        lock.execute("PRAGMA journal_mode = OFF")
        lock.execute("BEGIN EXCLUSIVE")
        yield path
    except sqlite3.Error as e:
        raise InputError(f"{path}: cannot be had ({e}); if another preparation is at work, wait for it"
                         ) from None
    finally:
        lock.close()


def _refuse_other_request(out, request):
    """Raise InputError unless `out` was prepared by the same request, and is whole."""
    if not (out / "prepared.json").exists():
        raise InputError(f"{out}: is there and is no prepared folder; choose another")
    held = read_json(out / "prepared.json")
    other = [key for key in request if held.get(key) != request[key]]
    if other:
        raise InputError(f"{out}: was prepared otherwise, with other {' and '.join(other)}; choose another")
    with parts_of(out / "prepared.json"):
        for name, size in held["sizes"].items():
            if regular_file(out / name).stat().st_size != size:
                raise InputError(f"{out / name}: is not as it was prepared; remove {out}, and start again")
    print(f"{out}: is prepared already and left alone")


def _read_parts(kind, parts, frames, jobs):
    """Read the parts that are not there yet, on all cores, and tell how it goes. Raises InputError."""
    num_files = sum(map(len, parts.values()))
    todo = [part for part in parts if not checksums_hold(part)]
    start = shown = time.perf_counter()
    with _workers(min(jobs, len(todo))) as map_in_order:
        work = map_in_order(partial(_read_part, kind, frames), todo, [parts[part] for part in todo])
        for i, _ in enumerate(work, start=1):
            if time.perf_counter() - shown > 2 or i == len(todo):
                shown = time.perf_counter()
                rate = sum(len(parts[part]) for part in todo[:i]) / (shown - start)
                left = sum(len(parts[part]) for part in todo[i:])
                print(f"{num_files - left}/{num_files} files  {rate:.0f} files/s  {left / rate:.0f} s left",
                      flush=True)


@contextlib.contextmanager
def _workers(jobs):
    """A `map` on as many processes, which end with it and with this process. Raises InputError."""
    if jobs < 2:
        yield map
        return
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), _end_with_parent)

    def start_and_map(*arguments):                              # workers are born deaf to Ctrl-C
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return pool.map(*arguments)
        finally:
            signal.signal(signal.SIGINT, handler)

    try:
        yield start_and_map
    except BaseException as e:
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would tear the clean-up
        for worker in active_children():
            worker.terminate()
        pool.shutdown(cancel_futures=True)
        signal.signal(signal.SIGINT, handler)
        if isinstance(e, BrokenProcessPool):
            raise InputError("a reading process was killed, for want of memory?; the same command goes on"
                             ) from None
        raise
    pool.shutdown()


def _end_with_parent():
    """In a worker: end when the parent does, even when that was killed."""
    def wait():
        parent_process().join()
        os._exit(1)
    threading.Thread(target=wait, daemon=True).start()


def _read_part(kind, frames, part, files):
    """Read files into one .npz: skeletons, rows, the number of persons, the names skipped with why."""
    samples, skipped = [], []
    for file in files:
        for sample in _samples_or_reasons(kind, file, frames):
            if isinstance(sample, str):
                skipped.append((file.name, sample))
            else:
                samples.append(sample)
    skeletons = np.array([x for x, _ in samples], np.float32).reshape(-1, 3, frames, 25, 2)
    rows = np.array([row for _, row in samples], np.int64).reshape(-1, len(RAW[kind][2]))
    persons = 1 + skeletons[..., 1].any()
    skipped = np.array(skipped, str).reshape(-1, 2)
    write_file(part, lambda f: np.savez(f, skeletons=skeletons, rows=rows, persons=persons, skipped=skipped))


def _samples_or_reasons(kind, file, frames):
    """The samples of one file; for each that cannot be read, a str with the reason."""
    try:
        yield from RAW[kind][1](file, frames)
    except (OSError, ValueError) as e:
        yield getattr(e, "strerror", None) or str(e)


def _join_parts(kind, work, parts, protocol):
    """Join the parts, one in memory at a time, into a dataset folder, and remove them."""
    def member(part, name):
        with np.load(part, allow_pickle=False) as arrays:
            return arrays[name]

    rows, skipped = (np.concatenate([member(part, name) for part in parts]) for name in ("rows", "skipped"))
    if not len(rows):
        shutil.rmtree(work)
        raise InputError(f"no recording could be read; the first, {skipped[0][0]}: {skipped[0][1]}")
    columns, dataset = dict(zip(RAW[kind][2], rows.T)), "pku51"
    if kind == "ntu":
        dataset = "ntu120" if columns["labels"].max() >= 60 or columns["setups"].max() > 17 else "ntu60"
        columns["training"] = _ntu_training(columns, dataset, protocol)
    persons = max(int(member(part, "persons")) for part in parts)
    shape = (len(rows), *member(next(iter(parts)), "skeletons").shape[1:-1], persons)

    def write_skeletons(f):
        np.lib.format.write_array_header_1_0(f, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for part in parts:
            f.write(np.ascontiguousarray(member(part, "skeletons")[..., :persons]))

    write_table(work / "skipped.csv", [("file", "reason"), *skipped])
    write_file(work / "classes.txt", lambda f: f.write("\n".join(bundled_classes(dataset)).encode()))
    for name, column in columns.items():
        column = column.astype(bool) if name == "training" else column
        write_file(work / f"{name}.npy", lambda f: np.save(f, column))
    write_file(work / "skeletons.npy", write_skeletons)
    for path in [*parts, *work.glob("*.part")]:                 # and what a killed preparation left
        path.unlink()
    print(f"{len(rows)} samples, {len(skipped)} skipped (skipped.csv)")


def _ntu_training(columns, dataset, protocol):
    """Which samples are for training (N,), by NTU's cross-subject, cross-view or cross-setup protocol."""
    if protocol == "xsub":
        return np.isin(columns["subjects"], TRAIN_SUBJECTS[dataset])
    if protocol == "xview":
        return columns["cameras"] > 1
    return columns["setups"] % 2 == 0


# ------------------------------------------------------------------------------------------ the synthetic set
# Offset of each NTU joint from its parent in a standing body, metres: x to its right, y up, z front to back.
_PARENT = [-1, 0, 20, 2, 20, 4, 5, 6, 20, 8, 9, 10, 0, 12, 13, 14, 0, 16, 17, 18, 1, 22, 7, 24, 11]
_PARENTS_FIRST = [1, 20, 2, 3, 4, 5, 6, 7, 22, 21, 8, 9, 10, 11, 24, 23, 12, 13, 14, 15, 16, 17, 18, 19]
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
    """Made skeletons whose motion is a smooth function of their class's text, so that it transfers.

    text (C, D): one vector a class. Its 6 leading principal components go through fixed random maps to the
    pose, amplitude and phase of 21 joint angles, to a frequency and to a hop; forward kinematics turns the
    angles into joints with constant bone lengths. Each performer has a body size, posture, tempo, amplitude,
    facing and sensor noise.
    → skeletons (N, 3, frames, 25, 1) in metres, labels (N,), subjects (N,) from 1; N = C·performers·repeats.
    """
    rng, num_angles = np.random.default_rng(seed), len(_ANGLES)
    z = _principal_components(text, 6)                          # (C, 6)

    def random_map(width):                                      # (C, width), each in -1..1
        return np.tanh(z @ rng.normal(0, z.shape[1] ** -0.5, (z.shape[1], width)))

    # what each class does
    pose, amplitude = 0.8 * random_map(num_angles), 0.8 * random_map(num_angles)
    phase = random_map(num_angles)
    cycles, hop = 2 * 2 ** (0.35 * random_map(1)), 0.15 * random_map(1).clip(min=0)
    # what each performer is like
    labels, subjects, _ = np.indices((len(text), performers, repeats)).reshape(3, -1)
    N, P = len(labels), performers
    size = rng.uniform(0.88, 1.12, (P, 1)) * rng.uniform(0.95, 1.05, (P, 25))
    posture = rng.normal(0, 0.06, (P, num_angles))
    tempo, vigour = rng.uniform(0.85, 1.15, P), rng.uniform(0.8, 1.2, P)
    facing, noise = rng.uniform(-0.6, 0.6, P), rng.uniform(0.005, 0.015, P)
    # what happens in each sample
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


def _principal_components(text, count):
    """The leading principal components of vectors (C, D), each of unit variance → (C, count)."""
    u, _, vt = np.linalg.svd((text - text.mean(0)).astype(np.float64), full_matrices=False)
    u, vt = u[:, :count], vt[:count]
    sign = np.sign(vt[np.arange(len(vt)), np.abs(vt).argmax(1)])    # an SVD leaves the signs open
    return u * sign * np.sqrt(len(text))


def _forward_kinematics(angles, root, offset):
    """Angles (N, T, V, 3), roots (N, T, 3), bone offsets (N, V, 3) → joint positions (N, T, V, 3)."""
    rotation = _rotations(angles)                       # (N, T, V, 3, 3): local, made global from the root on
    xyz = np.zeros(angles.shape)
    xyz[:, :, 0] = root
    for joint in _PARENTS_FIRST:
        parent = _PARENT[joint]
        rotation[:, :, joint] = rotation[:, :, parent] @ rotation[:, :, joint]
        bone = np.einsum("ntij,nj->nti", rotation[:, :, parent], offset[:, joint])
        xyz[:, :, joint] = xyz[:, :, parent] + bone
    return xyz


def _rotations(angles):
    """Euler angles (..., 3) in radians → rotation matrices (..., 3, 3), R = R_z R_y R_x."""
    (cx, cy, cz), (sx, sy, sz) = np.moveaxis(np.cos(angles), -1, 0), np.moveaxis(np.sin(angles), -1, 0)
    rows = ((cz * cy, cz * sy * sx - sz * cx, cz * sy * cx + sz * sx),
            (sz * cy, sz * sy * sx + cz * cx, sz * sy * cx - cz * sx),
            (-sy, cy * sx, cy * cx))
    return np.stack([np.stack(row, -1) for row in rows], -2)


# ------------------------------------------------------------------------------------------- the command line
def main():
    """The command line: prepare raw recordings."""
    parser = Parser(prog="data.py", description="Turn raw recordings into a dataset folder for train.py.")
    parser.add_argument("kind", choices=RAW)
    parser.add_argument("raw", help="the folder of the recordings")
    parser.add_argument("out", help="the dataset folder to write")
    parser.add_argument("--frames", type=int, default=64, help="to resample to, 2 to 1000 (default: 64)")
    parser.add_argument("--protocol", choices=["xsub", "xview", "xset"], default="xsub",
                        help="ntu: what is for training")
    args = parser.parse_args()
    if not 2 <= args.frames <= 1000:
        parser.error(f"--frames {args.frames} is out of range, from 2 to 1000")
    if args.kind == "pku" and args.protocol != "xsub":
        parser.error("--protocol: pku has the cross-subject protocol alone")
    prepare(**vars(args))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    command_line(main)
