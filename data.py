"""Data: class splits, readers of every format and text features. Everything ends as one checked `Data` value.

    python data.py ntu RAW_DIR OUT_DIR      NTU RGB+D .skeleton files → a dataset folder
    python data.py pku RAW_DIR OUT_DIR      PKU-MMD skeletons, labels and cross-subject file → a dataset folder

Shapes: N samples; C classes; F recorded frames; T frames; V joints; M persons; L tokens; D text width. Class ids are 0-based,
skeletons in metres.
"""
import hashlib
import json
import os
import re
import shutil
import signal
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from zsar import (FEATURES, GRAPHS, InputError, Parser, command_line, load_array, prepare_folder, read_json, resampled_bodies, save,
                  save_table, synthetic)

TEXT_DIR = Path(__file__).resolve().parent / "text"

@dataclass
class Data:
    """One dataset under one split, checked: everything that training and testing may read.

    Either `skeletons` (N, 3, T, V, M) in metres or ready `features` (N, 256) is given, the other is None.
    `train`, `seen_test`, `unseen_test` are row numbers; no training row has an unseen class.
    `text` holds one array (C, 1+L, D) a prompt, as a rule label then description: row 0 pooled, rows 1.. tokens, zero rows padding.
    """
    name: str
    source: str               # one of FORMATS, or "synthetic set"
    split: str
    skeletons: np.ndarray
    features: np.ndarray
    labels: np.ndarray        # (N,) int64
    classes: list             # C names
    text: list
    seen: np.ndarray          # class ids, sorted
    unseen: np.ndarray
    val: np.ndarray           # seen classes to hold out when something is chosen; see `validation`
    train: np.ndarray
    seen_test: np.ndarray
    unseen_test: np.ndarray

# ---------------------------------------------------------------------------------------------------- splits
# name: (dataset, unseen classes, validation classes held out of the seen ones when anything is tuned); methods.md section 6
SPLITS = {
    "55_5": ("ntu60", "10 11 19 26 56", "21 16 31 25 48"),
    "48_12": ("ntu60", "3 5 9 12 15 40 42 47 51 56 58 59", "22 8 17 54 33 50 39 30 4 46 13 10"),
    "110_10": ("ntu120", "4 13 37 43 49 65 88 95 99 106", "96 83 74 77 72 76 61 5 32 10"),
    "96_24": ("ntu120", "5 9 11 16 18 20 22 29 35 39 45 49 59 68 70 81 84 87 93 94 104 113 114 119",
              "17 10 1 103 105 58 108 4 48 83 97 66 92 86 79 89 53 100 47 27 98 3 19 63"),
    "40_20": ("ntu60", "0 12 13 14 15 16 17 22 23 26 29 30 31 35 36 42 43 48 56 57", ""),
    "30_30": ("ntu60", "0 1 2 6 7 8 10 12 13 15 16 18 20 21 25 26 27 31 32 33 39 42 45 47 48 51 52 55 58 59", ""),
    "80_40": ("ntu120", "11 12 18 22 23 26 28 34 37 38 42 44 46 47 48 57 59 64 66 70 73 74 75 83 86 90 92 93 95 96 102 104"
              " 107 108 110 112 115 116 118 119", ""),
    "60_60": ("ntu120", "0 1 4 6 7 8 9 17 18 21 23 25 26 28 30 32 33 34 37 38 39 40 41 42 44 45 50 51 52 53 56 61 62 65 67"
              " 68 69 70 74 77 78 81 83 87 89 90 91 92 94 95 96 97 100 101 109 111 114 115 116 118", ""),
    "smie_1": ("ntu60", "4 19 31 47 51", ""), "smie_2": ("ntu60", "12 29 32 44 59", ""),
    "smie_3": ("ntu60", "7 20 28 39 58", ""), "smie_4": ("ntu120", "3 18 26 38 41 60 87 99 102 110", ""),
    "smie_5": ("ntu120", "5 12 14 15 17 42 67 82 100 119", ""), "smie_6": ("ntu120", "6 20 27 33 42 55 71 97 104 118", ""),
    "smie_7": ("pku51", "1 9 20 34 50", ""), "smie_8": ("pku51", "3 14 29 31 49", ""),
    "smie_9": ("pku51", "2 15 39 41 43", ""),
}
_NTU60_TRAIN = [1, 2, 4, 5, 8, 9, *range(13, 20), 25, 27, 28, 31, 34, 35, 38]
TRAIN_SUBJECTS = {"ntu60": _NTU60_TRAIN, "ntu120": _NTU60_TRAIN + [  # cross-subject protocol
    45, 46, 47, 49, 50, *range(52, 60), 70, 74, 78, *range(80, 87), 89, *range(91, 96), 97, 98, 100, 103]}
BUNDLED_TEXT = {"ntu60": ("ntu120", 60), "ntu120": ("ntu120", 120), "pku51": ("pku51", 51)}  # dataset: (files, classes)

def list_splits():
    """Lines that name every published split with its dataset, its numbers of classes and its source."""
    yield f"{'split':<10}{'dataset':<9}{'seen':>5}{'unseen':>8}{'validation':>12}  source"
    for name, (dataset, unseen, val) in SPLITS.items():
        source, unseen, val = "SMIE" if "smie" in name else "SynSE" if val else "PURLS", len(unseen.split()), len(val.split())
        yield f"{name:<10}{dataset:<9}{BUNDLED_TEXT[dataset][1] - unseen:>5}{unseen:>8}{val or '-':>12}  {source}"

def _published_split(dataset, name, where):
    names = [n for n, (d, _, _) in SPLITS.items() if d == dataset]
    if name not in names:
        raise InputError(f"{where}: unknown split {name!r} for {dataset}; choose one of: {', '.join(names)}")
    return [[int(i) for i in ids.split()] for ids in SPLITS[name][1:]]

def _folder_split(path, name, num_classes, has_training):
    """One entry of splits.json → unseen, validation and seen ids, test subjects (None: training.npy says it)."""
    splits = read_json(path)
    if not all(isinstance(s, dict) for s in splits.values()):
        raise InputError(f'{path}: must be {{"NAME": {{"unseen": [...], "test_subjects": [...]}}}}')
    if name not in splits:
        raise InputError(f"{path}: has no split {name!r}; choose one of: {', '.join(splits)}")
    entry, where = splits[name], f"{path}: split {name!r}"
    for key in ("unseen", "val", "seen"):
        ids = entry.setdefault(key, [])
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < num_classes for i in ids):
            raise InputError(f"{where}: {key!r} must be a list of class ids from 0 to {num_classes - 1}")
        if len(set(ids)) < len(ids):
            raise InputError(f"{where}: {key!r} names a class twice: {sorted(i for i in set(ids) if ids.count(i) > 1)}")
    unseen, tests = entry["unseen"], entry.get("test_subjects")
    if not unseen:
        raise InputError(f"{where}: 'unseen' lists no class; name those to recognise without training")
    both = sorted({*entry["val"], *entry["seen"]} & {*unseen})
    if both:
        raise InputError(f"{where}: class {both[0]} is unseen, and 'val' or 'seen' names it for training; take it out of one")
    if not (tests is None and has_training) and (not isinstance(tests, list) or not all(type(i) is int for i in tests)):
        raise InputError(f"{where}: 'test_subjects' must list the subjects whose samples are for testing")
    return unseen, entry["val"], entry["seen"] or None, tests

# ---------------------------------------------------------------------------------------------------- text
def read_text(path, num_classes=None):
    """Read one prompt's text features, (C, 1+L, D) or (C, D) → float32 (C, 1+L, D). Raises InputError if they do not fit."""
    text = load_array(path, "float", "(C, D)", "(C, 1+L, D)")
    if num_classes and len(text) != num_classes:
        raise InputError(f"{path}: has text for {len(text)} classes, the dataset has {num_classes}; embed its classes.txt")
    text = text.astype(np.float32).reshape(len(text), -1, text.shape[-1])
    if not text[:, 0].any(1).all():
        raise InputError(f"{path}: the pooled vector of class {int(text[:, 0].any(1).argmin())} is all zero; embed it again")
    return text

def read_lines(path):
    """The class names in a text file, one a line. Raises InputError."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: cannot be read ({e.__class__.__name__}); it must hold one class name a line") from None
    if not lines or "" in lines:
        raise InputError(f"{path}: has an empty line; it must hold one class name a line, in the order of the ids")
    return lines

def bundled_classes(dataset):
    """The class names of "ntu60", "ntu120" or "pku51", in dataset order."""
    stem, count = BUNDLED_TEXT[dataset]
    return read_lines(TEXT_DIR / f"{stem}_classes.txt")[:count]

def bundled_text(dataset):
    """The bundled text features [label, description] of "ntu60", "ntu120" or "pku51", float32 (C, 1+L, 768) each."""
    stem, count = BUNDLED_TEXT[dataset]
    return [read_text(TEXT_DIR / f"{stem}_{prompt}.npy")[:count] for prompt in ("label", "description")]

# ---------------------------------------------------------------------------------------------------- datasets
PUBLISHED = {  # format: data and label files of the training, the unseen test and, where there are any, the seen test samples
    "SynSE / SA-DVAE / TDSM features": (("train", "train_label"), ("ztest", "z_label"), ("gtest", "g_label")),
    "SMIE / DVTA skeletons": (("seen_train_data", "seen_train_label"), ("unseen_data", "unseen_label"),
                              ("seen_test_data", "seen_test_label")),
}
FORMATS = {"dataset folder with skeletons": "skeletons", "dataset folder with features": "features",
           **{name: parts[0][0] for name, parts in PUBLISHED.items()}}    # the .npy file that tells each

def read_data(source, split, text_files=()):
    """Read `source`, "synthetic" or a folder in one of FORMATS, under the split of that name → Data. Raises InputError.

    text_files: text features to use in place of the folder's own or the bundled ones, one file a prompt.
    """
    if str(source) == "synthetic":
        return _synthetic_data(split, text_files)
    layout = find_format(Path(source), FORMATS)
    return (_read_published if layout in PUBLISHED else _read_folder)(Path(source), split, layout, text_files)

def find_format(folder, formats):
    """Which one of some formats the folder has, by the file that tells it. Raises InputError for none and for two."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give a dataset folder, or --data synthetic")
    found = [name for name in formats if (folder / f"{FORMATS[name]}.npy").exists()]
    if not found:
        looked_for = ", ".join(f"{FORMATS[name]}.npy ({name})" for name in formats)
        raise InputError(f"{folder}: fits no format; looked for {looked_for}; raw recordings go through python data.py first")
    if len(found) > 1:
        raise InputError(f"{folder}: holds two formats, {' and '.join(found)}; keep one")
    return found[0]

def load_samples(path, layout):
    """Skeletons (N, 3, T, V, M), memory-mapped, with a V that has a joint graph, or features (N, 256). Raises InputError."""
    if "features" in layout:
        return load_array(path, "float", f"(N, {FEATURES})")
    skeletons = load_array(path, "float", "(N, 3, T, V, M)", mmap=True)
    if skeletons.shape[3] not in GRAPHS:
        raise InputError(f"{path}: has {skeletons.shape[3]} joints; joint graphs exist for V = {', '.join(map(str, GRAPHS))}")
    return skeletons

def _load_labels(path, num_samples, num_classes):
    labels = load_array(path, "int", f"({num_samples},)")
    outside = (labels < 0) | (labels >= num_classes)
    if outside.any():
        raise InputError(f"{path}: label {labels[outside][0]} in row {int(outside.argmax())} is outside the text's rows, "
                         f"0 to {num_classes - 1}; labels are 0-based rows of classes.txt")
    return labels.astype(np.int64)

def _read_texts(folder, dataset, num_classes, files):
    """The text files that the user names, or else the folder's own, or else the bundled ones of a known dataset."""
    own = [folder / "text_label.npy", folder / "text_description.npy"]
    published = sorted(folder.glob(f"{dataset}_*embeddings.npy"), key=lambda path: len(path.name))   # "..._des_..." second
    files = files or (own if not dataset or own[0].exists() or own[1].exists() else published)
    text = [read_text(path, num_classes) for path in files] or bundled_text(dataset)
    for path, prompt in zip(files, text):
        if prompt.shape[-1] != text[0].shape[-1]:
            raise InputError(f"{path}: width {prompt.shape[-1]} differs from the {text[0].shape[-1]} of {files[0]}; embed both alike")
    return text

def _read_folder(folder, split, layout, text_files):
    """A dataset folder (README, "Your own data")."""
    samples, classes = load_samples(folder / f"{FORMATS[layout]}.npy", layout), read_lines(folder / "classes.txt")
    labels, one_each = _load_labels(folder / "labels.npy", len(samples), len(classes)), f"({len(samples)},)"
    dataset = next((d for d in BUNDLED_TEXT if classes == bundled_classes(d)), None)
    text = _read_texts(folder, dataset, len(classes), text_files)
    tests, has_training, name = None, (folder / "training.npy").exists(), dataset or folder.resolve().name
    if (folder / "splits.json").exists() or not (has_training and dataset or dataset in TRAIN_SUBJECTS):
        unseen, val, seen, tests = _folder_split(folder / "splits.json", split, len(classes), has_training)
    else:
        (unseen, val), seen = _published_split(dataset, split, folder), None
    if tests is None and has_training:
        training = load_array(folder / "training.npy", "bool", one_each)
    else:
        subjects = load_array(folder / "subjects.npy", "int", one_each)
        training = np.isin(subjects, TRAIN_SUBJECTS[dataset]) if tests is None else ~np.isin(subjects, tests)
    return _partition(folder, split, unseen, val, training, samples, labels, classes, text, name, layout, seen)

def _read_published(folder, split, layout, text_files):
    """A folder for one split, as published codes have it. (methods.md section 7)"""
    if split not in SPLITS:
        raise InputError(f"{folder}: unknown split {split!r}; python train.py --list shows them all")
    dataset = SPLITS[split][0]
    classes, (unseen, val) = bundled_classes(dataset), map(sorted, _published_split(dataset, split, folder))
    samples, labels = [], []                                              # of each part
    for i, (data_name, label_name) in enumerate(PUBLISHED[layout]):
        path, label_path = folder / f"{data_name}.npy", folder / f"{label_name}.npy"
        if i == 2 and not path.exists():
            break
        x = load_samples(path, layout)
        y = _load_labels(label_path, len(x), len(classes))
        is_unseen = np.isin(y, unseen)
        if i == 0 and is_unseen.any() or i == 1 and np.unique(y).tolist() != unseen:
            raise InputError(f"{label_path}: its classes {np.unique(y).tolist()} do not fit split {split}, whose unseen ones are "
                             f"{unseen}; choose the folder's own split")
        if i and x.shape[1:] != samples[0].shape[1:]:
            raise InputError(f"{path}: shape is {x.shape}, that of the training samples {samples[0].shape}")
        keep = ~is_unseen if i == 2 else slice(None)                      # gtest may hold the unseen test samples once more
        samples.append(x[keep])
        labels.append(y[keep])
    training = np.repeat([True, False, False][:len(labels)], [len(y) for y in labels])
    return _partition(folder, split, unseen, val, training, np.concatenate(samples), np.concatenate(labels), classes,
                      _read_texts(folder, dataset, len(classes), text_files), dataset, layout)

def _synthetic_data(split, text_files):
    """The embedded default: NTU-60's classes, text and splits with made skeletons; odd performers train."""
    text = bundled_text("ntu60")
    unseen, val = _published_split("ntu60", split, "synthetic")
    skeletons, labels, subjects = synthetic((text[0][:, 0] + text[1][:, 0]) / 2)
    return _partition("synthetic", split, unseen, val, subjects % 2 == 1, skeletons, labels, bundled_classes("ntu60"),
                      _read_texts(TEXT_DIR, "ntu60", 60, text_files), "synthetic", "synthetic set")

def _partition(where, split, unseen, val, training, samples, labels, classes, text, name, source, seen=None):
    """Apply the protocol of methods.md section 6: training (N,) says which samples are on its training side → Data."""
    seen = np.unique(seen or np.setdiff1d(np.arange(len(classes)), unseen))
    is_seen, is_unseen = np.isin(labels, seen), np.isin(labels, unseen)   # (N,)
    rows = {"training": np.flatnonzero(is_seen & training), "seen test": np.flatnonzero(is_seen & ~training),
            "unseen test": np.flatnonzero(is_unseen & ~training)}
    for part in ("training", "unseen test"):
        if not len(rows[part]):
            raise InputError(f"{where}: split {split!r} leaves no {part} samples; check its classes and subjects")
    drawn = np.random.default_rng(0).permutation(seen)[:min(len(unseen), len(seen) // 5)]         # where none are published
    skeletons, features = (None, samples) if samples.ndim == 2 else (samples, None)
    return Data(name, source, split, skeletons, features, labels, classes, text, seen, np.unique(unseen),
                np.intersect1d(val or drawn, seen), *rows.values())

def validation(data):
    """The task one level down, for choosing γ and settings: the validation classes play the unseen ones, and of all samples only
    training ones are in it, a fifth of the other classes' held out as seen test samples. Raises InputError."""
    is_val = np.isin(data.labels[data.train], data.val)                   # (n,)
    held_out = ~is_val & (np.random.default_rng(0).random(len(is_val)) < 0.2)
    parts = [data.train[rows] for rows in (~is_val & ~held_out, held_out, is_val)]
    if not all(map(len, [*parts, data.seen_test])):
        raise InputError(f"split {data.split!r}: has no seen test samples, or too few for training without the validation classes "
                         f"{data.val.tolist()}")
    return replace(data, seen=np.setdiff1d(data.seen, data.val), unseen=data.val, train=parts[0], seen_test=parts[1], unseen_test=parts[2])

# ---------------------------------------------------------------------------------------------------- raw recordings
PART_FILES = 64       # files to one part of a preparation: what an interruption loses
NTU_NAME = re.compile(r"S(\d{3})C(\d{3})P(\d{3})R\d{3}A(\d{3})\.skeleton")

def read_ntu(path, frames):
    """One NTU .skeleton file → (3, frames, 25, 2) float32. Raises ValueError, with the reason, for a broken one. (section 7)"""
    fields, bodies, at = path.read_text(encoding="ascii").split(), {}, 1
    try:
        num_frames = int(fields[0])
        for frame in range(num_frames):
            num_bodies, at = int(fields[at]), at + 1
            for _ in range(num_bodies):                                   # 10 fields, the joint count, 12 fields a joint
                if int(fields[at + 10]) != 25:
                    raise ValueError(f"{fields[at + 10]} joints in frame {frame}, must be 25")
                joints = fields[at + 11:at + 311]
                if len(joints) < 300:
                    raise IndexError
                bodies.setdefault(fields[at], {})[frame] = list(map(float, joints[::12] + joints[1::12] + joints[2::12]))
                at += 311
    except IndexError:
        raise ValueError("is truncated") from None
    if at != len(fields):
        raise ValueError(f"goes on after its {num_frames} frames")
    return resampled_bodies(bodies.values(), num_frames, frames)

def ntu_samples(path, frames):
    """One NTU file → its (skeleton, (label, subject, camera, setup)). Raises ValueError."""
    name = NTU_NAME.fullmatch(path.name)
    if not name or not 1 <= int(name[4]) <= 120:
        raise ValueError("its name is not SsssCcccPpppRrrrAaaa.skeleton with an action from 1 to 120")
    setup, camera, subject, action = map(int, name.groups())
    yield read_ntu(path, frames), (action - 1, subject, camera, setup)

def pku_samples(path, frames):
    """One PKU-MMD video, Skeleton/NAME.txt, cut by Label/NAME.txt → of each segment (skeleton, (label, is training)), or the
    reason why it is none. Raises ValueError for the whole video."""
    training, validation = pku_videos(path.parent.parent)
    if path.stem not in training + validation:
        raise ValueError("is in neither list of the cross-subject file")
    lines = [line.split() for line in path.read_text(encoding="ascii").splitlines()]
    if any(len(line) != 150 for line in lines):
        raise ValueError("must hold 150 numbers a line")
    video = np.array(lines, dtype=np.float64).reshape(-1, 2, 25, 3).swapaxes(2, 3).reshape(-1, 2, 75)
    for i, line in enumerate((path.parent.parent / "Label" / path.name).read_text(encoding="ascii").splitlines(), start=1):
        try:
            action, start, end = map(int, line.split(",")[:3])
            if not (1 <= action <= 51 and 0 <= start < end <= len(video)):
                raise ValueError(f"action {action}, frames {start} to {end} of {len(video)}")
            bodies = [{t: x for t, x in enumerate(video[start:end, body]) if x.any()} for body in range(2)]
            yield resampled_bodies(bodies, end - start, frames), (action - 1, path.stem in training)
        except ValueError as e:
            yield f"label line {i}: {e}"

def pku_videos(raw):
    """The cross-subject file's two lists of names, training and validation videos. Raises InputError."""
    try:
        text = next(raw.rglob("cross*subject*.txt")).read_text()
        training, validation = filter(None, (re.findall(r"\d{4}-[LMR]", line) for line in text.splitlines()))
    except (StopIteration, OSError, ValueError):
        raise InputError(f"{raw}: must hold a cross-subject.txt, a line of training and a line of validation videos") from None
    return training, validation

RAW = {  # kind: (files, their reader, columns of a sample's row)
    "ntu": ("*.skeleton", ntu_samples, ("labels", "subjects", "cameras", "setups")),
    "pku": ("Skeleton/*.txt", pku_samples, ("labels", "training")),
}

def prepare(kind, raw, out, frames=64, protocol="xsub", jobs=os.cpu_count()):
    """Read the raw recordings of a kind into a dataset folder, samples in the order of the file names. Raises InputError.

    The work goes in parts of 64 files, kept beside OUT, so that an interrupted preparation goes on where it was; only a whole
    folder gets the name OUT. `protocol`, for ntu: which samples are for training, by subject, camera (view) or setup.
    """
    raw, out = Path(raw), Path(out)
    if out.exists():
        if not (out / "skeletons.npy").exists():
            raise InputError(f"{out}: is there and is no prepared folder; choose another")
        return print(f"{out}: is prepared already and left alone")
    files = sorted(raw.rglob(RAW[kind][0]), key=lambda path: (path.name, path))
    if not files:
        raise InputError(f"{raw}: holds no {RAW[kind][0]}; give the folder of the raw {kind} recordings")
    stamps = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]        # other files: other parts
    key = hashlib.sha256(json.dumps([kind, frames, stamps]).encode()).hexdigest()[:8]
    work = prepare_folder(out.with_name(f"{out.name}.{key}.part"))
    parts = {work / f"{i:06}.npz": files[i:i + PART_FILES] for i in range(0, len(files), PART_FILES)}
    todo = [part for part in parts if not part.exists()]
    pool = (ProcessPoolExecutor(jobs, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN))   # Ctrl-C is for us
            if min(jobs, len(todo)) > 1 else ThreadPoolExecutor(1))
    start = shown = time.perf_counter()
    try:
        for i, _ in enumerate(pool.map(_read_part, [kind] * len(todo), [parts[p] for p in todo], [frames] * len(todo), todo)):
            if time.perf_counter() - shown > 2 or i == len(todo) - 1:
                shown, left = time.perf_counter(), sum(len(parts[p]) for p in todo[i + 1:])
                rate = sum(len(parts[p]) for p in todo[:i + 1]) / (shown - start)
                print(f"{len(files) - left}/{len(files)} files  {rate:.0f} files/s  {left / rate:.0f} s left", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
    _assemble(kind, work, parts, protocol)
    os.replace(work, out)
    print(f"written: {out}")

def _read_part(kind, files, frames, part):
    """Read some files into one .npz of skeletons, rows, the number of persons, and the names skipped with the reason."""
    samples, skipped = [], []
    for file in files:
        try:
            for sample in RAW[kind][1](file, frames):
                skipped.append((file.name, sample)) if isinstance(sample, str) else samples.append(sample)
        except (OSError, ValueError) as e:
            skipped.append((file.name, getattr(e, "strerror", None) or str(e)))
    skeletons = np.array([x for x, _ in samples], np.float32).reshape(-1, 3, frames, 25, 2)
    rows = np.array([row for _, row in samples], np.int64).reshape(-1, len(RAW[kind][2]))
    save(part, lambda f: np.savez(f, skeletons=skeletons, rows=rows, persons=1 + skeletons[..., 1].any(),
                                  skipped=np.array(skipped, str).reshape(-1, 2)))

def _assemble(kind, work, parts, protocol):
    """Join the parts, one in memory at a time, into a dataset folder, and remove them."""
    def member(part, name):
        with np.load(part, allow_pickle=False) as arrays:
            return arrays[name]

    rows, skipped = (np.concatenate([member(part, name) for part in parts]) for name in ("rows", "skipped"))
    if not len(rows):
        shutil.rmtree(work)
        raise InputError(f"no recording could be read; the first, {skipped[0][0]}: {skipped[0][1]}")
    columns = dict(zip(RAW[kind][2], rows.T))
    dataset = "pku51"
    if kind == "ntu":
        dataset = "ntu120" if columns["labels"].max() >= 60 or columns["setups"].max() > 17 else "ntu60"
        columns["training"] = (np.isin(columns["subjects"], TRAIN_SUBJECTS[dataset]) if protocol == "xsub" else
                               columns["cameras"] > 1 if protocol == "xview" else columns["setups"] % 2 == 0)
    persons = max(int(member(part, "persons")) for part in parts)
    shape = (len(rows), *member(next(iter(parts)), "skeletons").shape[1:-1], persons)

    def write_skeletons(f):
        np.lib.format.write_array_header_1_0(f, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for part in parts:
            f.write(np.ascontiguousarray(member(part, "skeletons")[..., :persons]))

    save_table(work / "skipped.csv", [("file", "reason"), *skipped])
    save(work / "classes.txt", lambda f: f.write("\n".join(bundled_classes(dataset)).encode()))
    for name, column in columns.items():
        save(work / f"{name}.npy", lambda f: np.save(f, column.astype(bool) if name == "training" else column))
    save(work / "skeletons.npy", write_skeletons)
    for part in parts:
        part.unlink()
    print(f"{len(rows)} samples, {len(skipped)} skipped (skipped.csv)")

def main():
    """The command line: prepare raw recordings."""
    parser = Parser(prog="data.py", description="Turn raw recordings into a dataset folder for train.py.")
    parser.add_argument("kind", choices=RAW)
    parser.add_argument("raw", help="the folder of the recordings")
    parser.add_argument("out", help="the dataset folder to write")
    parser.add_argument("--frames", type=int, default=64, help="to resample to, 2 to 1000 (default: 64)")
    parser.add_argument("--protocol", choices=["xsub", "xview", "xset"], default="xsub", help="ntu: what is for training")
    args = parser.parse_args()
    if not 2 <= args.frames <= 1000:
        parser.error(f"--frames {args.frames} is out of range, from 2 to 1000")
    if args.kind == "pku" and args.protocol != "xsub":
        parser.error("--protocol: pku has the cross-subject protocol alone")
    prepare(**vars(args))

if __name__ == "__main__":
    command_line(main)
