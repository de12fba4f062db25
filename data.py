"""Data: class splits, the dataset folder, text features and the synthetic set. Everything ends as one checked `Data` value.

Shapes: N samples; C classes; T frames; V joints; M persons; L tokens; D text width. Class ids are 0-based, skeletons in metres.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from zsar import FEATURES, GRAPHS

TEXT_DIR = Path(__file__).resolve().parent / "text"


class InputError(Exception):
    """Bad input from the user. Its one line says what is wrong, in which file, and what to do."""


@dataclass
class Data:
    """One dataset under one split, checked: everything that training and testing may read.

    Either `skeletons` (N, 3, T, V, M) in metres or ready `features` (N, 256) is given, the other is None.
    `train`, `seen_test`, `unseen_test` are row numbers; no training row has an unseen class.
    `text` holds one array (C, 1+L, D) a prompt, label then description: row 0 pooled, rows 1.. tokens, zero rows padding.
    """
    name: str
    split: str
    synthetic: bool
    skeletons: np.ndarray
    features: np.ndarray
    labels: np.ndarray        # (N,) int64
    classes: list             # C names
    text: list                # [label, description]
    seen: np.ndarray          # class ids, sorted
    unseen: np.ndarray
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
TRAIN_SUBJECTS = {  # cross-subject protocol
    "ntu60": _NTU60_TRAIN,
    "ntu120": _NTU60_TRAIN + [45, 46, 47, 49, 50, *range(52, 60), 70, 74, 78, *range(80, 87), 89, *range(91, 96), 97, 98, 100,
                              103],
}
BUNDLED_TEXT = {"ntu60": ("ntu120", 60), "ntu120": ("ntu120", 120), "pku51": ("pku51", 51)}  # dataset: (files, classes)


def _published_split(dataset, name, where):
    names = [n for n, (d, _, _) in SPLITS.items() if d == dataset]
    if name not in names:
        raise InputError(f"{where}: unknown split {name!r} for {dataset}; choose one of: {', '.join(names)}")
    return [int(i) for i in SPLITS[name][1].split()]


def _class_ids(entry, key, where, num_classes):
    ids = entry.get(key, [])
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < num_classes for i in ids):
        raise InputError(f"{where}: {key!r} must be a list of class ids from 0 to {num_classes - 1}")
    if len(set(ids)) < len(ids):
        raise InputError(f"{where}: {key!r} names a class twice: {sorted(i for i in set(ids) if ids.count(i) > 1)}; "
                         "name each once")
    return ids


def _folder_split(path, name, num_classes, subjects):
    """One entry of splits.json → unseen ids, seen ids, and which samples are from training subjects."""
    try:
        splits = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: cannot be read as JSON ({e}); see the README for its form") from None
    if not isinstance(splits, dict) or not all(isinstance(s, dict) for s in splits.values()):
        raise InputError(f'{path}: must be {{"NAME": {{"unseen": [...], "test_subjects": [...]}}}}')
    if name not in splits:
        raise InputError(f"{path}: has no split {name!r}; choose one of: {', '.join(splits)}")
    entry, where = splits[name], f"{path}: split {name!r}"
    unseen = _class_ids(entry, "unseen", where, num_classes)
    if not unseen:
        raise InputError(f"{where}: 'unseen' lists no class; name those to recognise without training")
    val = _class_ids(entry, "val", where, num_classes)
    if set(val) & set(unseen):
        raise InputError(f"{where}: names a class twice, as unseen and as validation: {sorted(set(val) & set(unseen))}; "
                         "validation classes are held out of the seen ones")
    seen = _class_ids(entry, "seen", where, num_classes) or [c for c in range(num_classes) if c not in unseen]
    both = sorted(set(seen) & set(unseen))
    if both:
        raise InputError(f"{where}: class {both[0]} is unseen and has training samples, for 'seen' lists it too; "
                         "take it out of one")
    test_subjects = entry.get("test_subjects")
    if not isinstance(test_subjects, list) or not all(type(i) is int for i in test_subjects):
        raise InputError(f"{where}: 'test_subjects' must list the subjects whose samples are for testing")
    return unseen, seen, ~np.isin(subjects, test_subjects)


# ---------------------------------------------------------------------------------------------------- files
def load_array(path, mmap=False):
    """Read one .npy file, never unpickling. Raises InputError if it is missing, broken or pickled."""
    try:
        array = np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; see the README for what a dataset folder holds") from None
    except (OSError, ValueError, EOFError) as e:
        if "pickle" in str(e) or "Python objects" in str(e):
            raise InputError(f"{path}: holds pickled objects, which are never loaded; save it as a plain numeric array") from None
        raise InputError(f"{path}: is no readable .npy file ({e}); write it with numpy.save") from None
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path}: is an .npz archive; write one array with numpy.save")
    return array


def _check_array(array, path, kind, shape):
    """Check dtype ("float" or "int") and shape, a string such as "(N, 3, T, V, M)" whose numbers are fixed sizes."""
    if array.dtype.kind not in {"float": "f", "int": "iu"}[kind]:
        raise InputError(f"{path}: dtype is {array.dtype}, must be {kind}; convert it with .astype")
    sizes = shape.strip("()").rstrip(",").split(", ")
    if array.ndim != len(sizes) or any(s.isdigit() and int(s) != n for s, n in zip(sizes, array.shape)) or 0 in array.shape:
        raise InputError(f"{path}: shape is {array.shape}, must be {shape}")
    if kind == "float":
        for i in range(0, len(array), 1024):  # in pieces: a memory-mapped array may be larger than memory
            bad = ~np.isfinite(array[i:i + 1024]).reshape(len(array[i:i + 1024]), -1).all(1)
            if bad.any():
                raise InputError(f"{path}: NaN or infinity in row {i + int(bad.argmax())}; mend or drop that row")


def read_text(path, num_classes):
    """Read one prompt's text features, (C, 1+L, D) or (C, D) → float32 (C, 1+L, D). Raises InputError if they do not fit."""
    text = load_array(path)
    _check_array(text, path, "float", "(C, D)" if text.ndim == 2 else "(C, 1+L, D)")
    if len(text) != num_classes:
        raise InputError(f"{path}: has text for {len(text)} classes, the dataset has {num_classes}; "
                         "embed its classes.txt with text/embed.py")
    text = text.astype(np.float32).reshape(num_classes, -1, text.shape[-1])
    if not text[:, 0].any(1).all():
        raise InputError(f"{path}: the pooled vector of class {int(text[:, 0].any(1).argmin())} is all zero; embed it again")
    return text


def _read_lines(path):
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: cannot be read ({e.__class__.__name__}); it must hold one class name a line") from None
    if not lines or "" in lines:
        raise InputError(f"{path}: has an empty line; it must hold one class name a line, in the order of the ids")
    return lines


def bundled_classes(dataset):
    """The class names of "ntu60", "ntu120" or "pku51", in dataset order."""
    stem, count = BUNDLED_TEXT[dataset]
    return _read_lines(TEXT_DIR / f"{stem}_classes.txt")[:count]


def bundled_text(dataset):
    """The bundled text features [label, description] of "ntu60", "ntu120" or "pku51", float32 (C, 1+L, 768) each."""
    stem, count = BUNDLED_TEXT[dataset]
    total = BUNDLED_TEXT[stem][1]
    return [read_text(TEXT_DIR / f"{stem}_{prompt}.npy", total)[:count] for prompt in ("label", "description")]


# ---------------------------------------------------------------------------------------------------- datasets
def read_data(source, split):
    """Read `source`, "synthetic" or a dataset folder, under the split of that name → Data. Raises InputError."""
    return synthetic_data(split) if str(source) == "synthetic" else read_folder(Path(source), split)


def read_folder(folder, split):
    """Read a dataset folder (README, "Your own data") under the split of that name → Data. Raises InputError."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give a dataset folder, or --data synthetic")
    files = {name: folder / f"{name}.npy" for name in ("skeletons", "features", "labels", "subjects", "text_label",
                                                       "text_description")}
    if files["skeletons"].exists() == files["features"].exists():
        raise InputError(f"{folder}: must hold either skeletons.npy or features.npy, "
                         f"and holds {'both' if files['features'].exists() else 'neither'}")
    skeletons = features = None
    if files["skeletons"].exists():
        skeletons = load_array(files["skeletons"], mmap=True)
        _check_array(skeletons, files["skeletons"], "float", "(N, 3, T, V, M)")
        if skeletons.shape[3] not in GRAPHS:
            raise InputError(f"{files['skeletons']}: has {skeletons.shape[3]} joints; joint graphs exist for V = "
                             f"{', '.join(map(str, GRAPHS))}")
    else:
        features = load_array(files["features"])
        _check_array(features, files["features"], "float", f"(N, {FEATURES})")
    num_samples = len(features if skeletons is None else skeletons)
    labels, subjects = load_array(files["labels"]), load_array(files["subjects"])
    _check_array(labels, files["labels"], "int", f"({num_samples},)")
    _check_array(subjects, files["subjects"], "int", f"({num_samples},)")

    classes = _read_lines(folder / "classes.txt")
    outside = (labels < 0) | (labels >= len(classes))
    if outside.any():
        raise InputError(f"{files['labels']}: label {labels[outside][0]} in row {int(outside.argmax())} is outside the text's rows, "
                         f"0 to {len(classes) - 1}; labels are 0-based rows of classes.txt")
    dataset = next((d for d in BUNDLED_TEXT if classes == bundled_classes(d)), None)
    if dataset and not files["text_label"].exists() and not files["text_description"].exists():
        text = bundled_text(dataset)
    else:
        text = [read_text(files[f"text_{prompt}"], len(classes)) for prompt in ("label", "description")]
        if text[0].shape[-1] != text[1].shape[-1]:
            raise InputError(f"{files['text_description']}: width {text[1].shape[-1]} differs from text_label.npy's "
                             f"{text[0].shape[-1]}; embed both with one model")

    if (folder / "splits.json").exists() or dataset not in TRAIN_SUBJECTS:
        unseen, seen, from_train_subject = _folder_split(folder / "splits.json", split, len(classes), subjects)
    else:
        unseen = _published_split(dataset, split, folder)
        seen = [c for c in range(len(classes)) if c not in unseen]
        from_train_subject = np.isin(subjects, TRAIN_SUBJECTS[dataset])
    return _partition(folder, dataset or folder.resolve().name, split, False, skeletons, features, labels, classes, text,
                      seen, unseen, from_train_subject)


def _partition(where, name, split, synthetic, skeletons, features, labels, classes, text, seen, unseen, from_train_subject):
    """Apply the cross-subject protocol of methods.md section 6 → Data."""
    is_seen, is_unseen = np.isin(labels, seen), np.isin(labels, unseen)   # (N,)
    rows = {"training": np.flatnonzero(is_seen & from_train_subject),
            "seen test": np.flatnonzero(is_seen & ~from_train_subject),
            "unseen test": np.flatnonzero(is_unseen & ~from_train_subject)}
    for part in ("training", "unseen test"):
        if not len(rows[part]):
            raise InputError(f"{where}: split {split!r} leaves no {part} samples; check its classes and subjects")
    return Data(name, split, synthetic, skeletons, features, labels.astype(np.int64), classes, text,
                np.unique(seen), np.unique(unseen), *rows.values())


def preprocess(skeletons, graph):
    """Move and turn each sequence to a common frame: (N, 3, T, V, M) metres → float32, same shape.

    The main actor's spine base in the first frame goes to the origin; the line of the shoulders, right to left, goes to the
    +x axis, by a turn about the vertical and then a tilt, so that nobody ends upside down. Absent persons stay zero.
    """
    x = np.asarray(skeletons, dtype=np.float32)
    present = x.any((1, 3))                                               # (N, T, M)
    first = present[:, :, 0].argmax(1)                                    # (N,) main actor's first frame
    pose = x[np.arange(len(x)), :, first, :, 0]                           # (N, 3, V)
    origin = pose[:, :, list(graph.root)].mean(2)                         # (N, 3)
    left, right = graph.shoulders
    dx, dy, dz = (pose[:, :, left] - pose[:, :, right]).T                 # (N,) each
    turn, tilt = np.arctan2(dz, dx), np.arctan2(dy, np.hypot(dx, dz))
    ct, st, cr, sr, zero = np.cos(turn), np.sin(turn), np.cos(tilt), np.sin(tilt), np.zeros_like(turn)
    rotation = np.array([[cr * ct, sr, cr * st],
                         [-sr * ct, cr, -sr * st],
                         [-st, zero, ct]]).transpose(2, 0, 1)             # (N, 3, 3)
    x = (x - origin[:, :, None, None, None]) * present[:, None, :, None, :]
    return np.einsum("nij,njtvm->nitvm", rotation, x, optimize=True).astype(np.float32)


# ---------------------------------------------------------------------------------------------------- synthetic set
# Offset of each NTU joint from its parent in a standing body, metres; x to the body's left, y up, z from the front to the back.
_PARENT = [-1, 0, 20, 2, 20, 4, 5, 6, 20, 8, 9, 10, 0, 12, 13, 14, 0, 16, 17, 18, 1, 22, 7, 24, 11]
_ARM = [(.17, -.03, 0), (.04, -.26, 0), (.02, -.24, -.03), (0, -.08, -.01)]
_LEG = [(.09, -.04, 0), (.01, -.42, 0), (0, -.40, .01), (.01, -.06, -.12)]
_THUMB, _TIP = (-.03, -.03, -.02), (.02, -.05, 0)


def _mirror(offset):
    return (-offset[0], offset[1], offset[2])


_OFFSET = np.array([(0, 0, 0), (0, .25, 0), (0, .07, 0), (0, .14, -.01), *_ARM, *map(_mirror, _ARM), *_LEG, *map(_mirror, _LEG),
                    (0, .24, 0), _TIP, _THUMB, _mirror(_TIP), _mirror(_THUMB)])
# The joint angles that move: (joint, axis), axis 0 bends about x, 1 twists about y, 2 leans about z.
_ANGLES = [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (8, 0), (8, 1), (8, 2), (5, 0), (5, 1), (9, 0), (9, 1),
           (12, 0), (12, 2), (16, 0), (16, 2), (13, 0), (17, 0)]


def _rotations(angles):
    """Euler angles (..., 3) in radians → rotation matrices (..., 3, 3), R = R_z R_y R_x."""
    (cx, cy, cz), (sx, sy, sz) = np.moveaxis(np.cos(angles), -1, 0), np.moveaxis(np.sin(angles), -1, 0)
    rows = [[cz * cy, cz * sy * sx - sz * cx, cz * sy * cx + sz * sx],
            [sz * cy, sz * sy * sx + cz * cx, sz * sy * cx - cz * sx],
            [-sy, cy * sx, cy * cx]]
    return np.stack([np.stack(row, -1) for row in rows], -2)


def synthetic(text, performers=12, repeats=3, frames=32, seed=0):
    """Made skeletons whose motion is a smooth function of their class's text, so that transfer to unseen classes is possible.

    text (C, D): one vector a class. Its 6 leading principal components go through fixed random maps to the pose, amplitude
    and phase of 21 joint angles, to a frequency and to a hop; forward kinematics turns the angles into joints with constant
    bone lengths. Each performer has a body size, posture, tempo, amplitude, facing and sensor noise of their own.
    → skeletons (N, 3, frames, 25, 1) in metres, labels (N,), subjects (N,) from 1; N = C·performers·repeats.
    """
    rng, components, num_angles = np.random.default_rng(seed), 6, len(_ANGLES)
    u, _, vt = np.linalg.svd((text - text.mean(0)).astype(np.float64), full_matrices=False)
    u, vt = u[:, :components], vt[:components]
    sign = np.sign(vt[np.arange(len(vt)), np.abs(vt).argmax(1)])          # an SVD leaves the signs open
    z = u * sign * np.sqrt(len(text))                                     # (C, 6), unit variance

    def random_map(width):                                                # (C, width), each in -1..1
        return np.tanh(z @ rng.normal(0, len(vt) ** -0.5, (len(vt), width)))

    pose, amplitude, phase = 0.8 * random_map(num_angles), 0.8 * random_map(num_angles), random_map(num_angles)
    cycles, hop = 2 * 2 ** (0.35 * random_map(1)), 0.15 * random_map(1).clip(min=0)

    labels, subjects, _ = (a.ravel() for a in np.meshgrid(np.arange(len(text)), np.arange(performers), np.arange(repeats),
                                                          indexing="ij"))
    N, P = len(labels), performers
    size = rng.uniform(0.88, 1.12, (P, 1)) * rng.uniform(0.95, 1.05, (P, 25))
    posture = rng.normal(0, 0.06, (P, num_angles))
    tempo, vigour = rng.uniform(0.85, 1.15, P), rng.uniform(0.8, 1.2, P)
    facing, noise = rng.uniform(-0.6, 0.6, P), rng.uniform(0.005, 0.015, P)

    pace = tempo[subjects] * rng.normal(1, 0.05, N)                       # (N,)
    start = rng.uniform(-0.08, 0.08, (N, 1))
    turns = cycles[labels] * (np.linspace(0, 1, frames) * pace[:, None] + start)                  # (N, T)
    swing = (amplitude[labels] * vigour[subjects, None] * rng.normal(1, 0.1, (N, num_angles)))    # (N, angles)
    rest = pose[labels] + posture[subjects] + rng.normal(0, 0.06, (N, num_angles))                # (N, angles)
    wave = np.sin(2 * np.pi * turns[:, :, None] + phase[labels][:, None])                         # (N, T, angles)
    angles = np.zeros((N, frames, 25, 3))
    joints, axes = np.array(_ANGLES).T
    angles[:, :, joints, axes] = rest[:, None] + swing[:, None] * wave
    angles[:, :, 0, 1] = (facing[subjects] + rng.normal(0, 0.1, N))[:, None]

    root = np.array([0, 0, 3]) + rng.normal(0, 0.2, (N, 1, 3)) + np.zeros((N, frames, 3))         # 3 m from the camera
    root[:, :, 1] += hop[labels] * np.abs(np.sin(np.pi * turns))
    xyz = _forward_kinematics(angles, root, (_OFFSET * size[:, :, None])[subjects])               # (N, T, 25, 3)
    xyz += rng.normal(size=xyz.shape) * noise[subjects][:, None, None, None]
    return xyz.transpose(0, 3, 1, 2)[..., None].astype(np.float32), labels, subjects + 1


def _forward_kinematics(angles, root, offset):
    """Joint angles (N, T, V, 3), root positions (N, T, 3) and bone offsets (N, V, 3) → joint positions (N, T, V, 3)."""
    rotation, xyz = _rotations(angles), np.zeros(angles.shape)            # (N, T, V, 3, 3): local, made global from the root on
    xyz[:, :, 0] = root
    for joint in (1, 20, 2, 3, 4, 5, 6, 7, 22, 21, 8, 9, 10, 11, 24, 23, 12, 13, 14, 15, 16, 17, 18, 19):  # parents first
        parent = _PARENT[joint]
        rotation[:, :, joint] = rotation[:, :, parent] @ rotation[:, :, joint]
        xyz[:, :, joint] = xyz[:, :, parent] + np.einsum("ntij,nj->nti", rotation[:, :, parent], offset[:, joint])
    return xyz


def synthetic_data(split):
    """The embedded default: NTU-60's classes, text and splits with made skeletons; odd performers train → Data."""
    text = bundled_text("ntu60")
    unseen = _published_split("ntu60", split, "synthetic")
    skeletons, labels, subjects = synthetic((text[0][:, 0] + text[1][:, 0]) / 2)
    seen = [c for c in range(60) if c not in unseen]
    return _partition("synthetic", "synthetic", split, True, skeletons, None, labels, bundled_classes("ntu60"), text,
                      seen, unseen, subjects % 2 == 1)
