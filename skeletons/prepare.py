"""Turn a downloaded set of skeletons into a dataset folder.

    python skeletons/prepare.py SOURCE OUT

SOURCE is NTU RGB+D or PKU-MMD as recorded, CTR-GCN's .npz, pyskl's .pkl or 2s-AGCN's folder.

Shapes: N samples; C classes; F recorded frames; V joints; M persons. Class ids are 0-based, skeletons in
metres.
"""
import math
import os
import pickle
import re
import signal
import sys
import time
import zipfile
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import (TRAIN_SUBJECTS, InputError, Parser, bundled_classes, check_joints, command_line, files_in,
                  new_folder, note, ntu_people, people_of, pieces, read_array, reading, reason, resampled,
                  text_of, write_table)
from zsar import NTU25, torsos_of

NTU_NAME = re.compile(r"S(\d{3})C(\d{3})P(\d{3})R\d{3}A(\d{3})", re.ASCII)
PKU_NAME = re.compile(r"\w+-[LMR]\b", re.ASCII)
PKU_FILE = re.compile(r"cross.*(subject|view).*\.txt|\w+-[LMR]\.txt", re.I)
COLUMNS = ("labels", "training", "subjects", "cameras", "setups")      # of a sample's row; 0 where unknown
ARCHIVES = (".zip", ".7z", ".rar", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".001")
KNOWN = ("give CTR-GCN's .npz, pyskl's .pkl, or a folder with NTU's .skeleton files, PKU-MMD's .txt files or "
         "2s-AGCN's train_data_joint.npy")


def _ntu_row(name, protocol="xsub"):
    """The row of COLUMNS that the name of an NTU recording gives. Raises ValueError."""
    parts = NTU_NAME.match(name)
    if not parts or not 1 <= int(parts[4]) <= 120:
        raise ValueError(f"{name} is not SsssCcccPpppRrrrAaaa with an action from 1 to 120")
    setup, camera, subject, action = map(int, parts.groups())
    trains = {"xsub": subject in TRAIN_SUBJECTS, "xview": camera > 1, "xset": setup % 2 == 0}
    return action - 1, trains[protocol], subject, camera, setup


def _ntu_sample(protocol, path):
    try:
        return path.name, ntu_people(path), _ntu_row(path.name, protocol)
    except (OSError, ValueError) as e:
        return path.name, reason(e), None


# A reader is a generator. It first yields its dataset, if known, its numbers of samples and files, and the
# names of its recordings, or None if they have none; then each sample: its name, people (M, F, V, 3) and row
# of COLUMNS, or its name, the reason to skip it, and None.
def _read_ntu(source, protocol):
    """NTU RGB+D as recorded: .skeleton files at any depth, one of each name."""
    files = {path.name: path for path in files_in(source, ".skeleton")}
    yield None, len(files), len(files), files.keys()
    jobs = min(os.cpu_count() or 1, 61, len(files) or 1)        # Windows waits for at most 63 processes
    with Pool(jobs, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:    # only the parent sees Ctrl-C
        yield from pool.imap(partial(_ntu_sample, protocol or "xsub"), files.values(), chunksize=16)


def _read_pku(source, protocol):
    """PKU-MMD as it unpacks: skeletons, labels and the split file, by name and content, at any depth."""
    word, texts = {"xview": "view", "xset": "set"}.get(protocol, "subject"), files_in(source, ".txt")
    splits = [path for path in texts if re.match(f"cross.*{word}", path.name, re.I)]
    if len(splits) != 1:
        fact = "occurs more than once; keep one" if splits else "is missing; add it"
        raise InputError(f"{source}: cross-{word}.txt {fact}, or set --protocol")
    with reading(splits[0], "download it again"):
        lists = [PKU_NAME.findall(line) for line in text_of(splits[0]).splitlines()]
        train, test = filter(None, lists)                       # two headings have no names
    skeletons, labels = {}, {}                                  # {video: path}
    for path in (path for path in texts if path.stem in train + test):
        with reading(path, "unpack it again"), open(path, "rb") as f:
            files = skeletons if len(f.readline().split()) > 4 else labels
        files[path.stem] = path
    videos = sorted(skeletons.keys() & labels)
    num_samples = sum(len(labels[name].read_bytes().split()) for name in videos)
    yield "pku51", num_samples, 1 + 2 * len(videos), videos
    for name in videos:
        try:
            video = np.loadtxt(skeletons[name], ndmin=2)        # (F, 150)
            if video.shape[1] != 150:
                raise ValueError(f"has {video.shape[1]} numbers a line, must be 150: 2 bodies of 25 joints")
            segments = re.findall(r"\S.*", text_of(labels[name]))                           # no blank lines
        except (OSError, ValueError) as e:
            yield skeletons[name].name, reason(e), None
            continue
        video = video.reshape(-1, 2, 25, 3)                     # (F, M, V, 3)
        for i, segment in enumerate(segments, start=1):
            yield f"{skeletons[name].name}, label line {i}", *_pku_sample(video, segment, name in train)


def _pku_sample(video, segment, trains):
    """Cut the sample of a label line out of its video → people and row, or a reason and None."""
    try:
        action, start, end = (int(float(field)) for field in segment.split(",")[:3])
        if not (1 <= action <= 51 and start <= end <= len(video)):
            raise ValueError(f"action {action}, frames {start} to {end} of {len(video)}")
        bodies = video[max(start, 1) - 1:end].swapaxes(0, 1)    # (M, n, V, 3); 1-based, the end included
        tracks = [(np.flatnonzero(body.any((1, 2))), body[body.any((1, 2))]) for body in bodies]
        return people_of(tracks), (action - 1, trains, 0, 0, 0)
    except ValueError as e:
        return str(e), None


def _read_ctrgcn(source, protocol):
    """CTR-GCN's .npz of NTU, its rows (F, 150), or PKU-MMD's with the same keys, its rows (3, F, V, M)."""
    own = {"xsub": "xsub|csub|cs(?!et)", "xview": "xview|cv", "xset": "xset|cset"}        # in file names
    if protocol and not re.search(own[protocol], source.stem, re.I):
        raise InputError(f"{source}: its name does not say protocol {protocol}; leave out --protocol")
    labels = {}
    for part in ("train", "test"):
        y = np.vstack(list(_rows_of_member(source, f"y_{part}.npy")))           # one-hot (N, C) or ids (N, 1)
        labels[part] = y.argmax(1) if y.shape[1] > 1 else y[:, 0].astype(int)
    datasets = {60: "ntu60", 120: "ntu120", 51: "pku51", 1: "pku51"}
    if y.shape[1] not in datasets:
        raise InputError(f"{source}: its labels have {y.shape[1]} columns, must be {[*datasets]}; for other "
                         f"classes make a dataset folder")
    yield datasets[y.shape[1]], sum(map(len, labels.values())), 1, None
    for part in ("train", "test"):
        rows = zip(_rows_of_member(source, f"x_{part}.npy"), labels[part], strict=True)
        with reading(source / f"x_{part}.npy", "give samples (F, 150) or (3, F, 25, M), and a label each"):
            for n, (x, label) in enumerate(rows):
                people = x.transpose(3, 1, 2, 0) if x.ndim > 2 else x.reshape(len(x), 2, -1, 3).swapaxes(0, 1)
                yield f"x_{part} row {n}", people, (label, part == "train", 0, 0, 0)


def _rows_of_member(path, name):
    """Yield the rows of an array in an .npz one at a time, since it may exceed the memory."""
    with (reading(path / name, "give an intact .npz with x_train, y_train, x_test, y_test"),
          zipfile.ZipFile(path) as archive, archive.open(name) as f):
        np.lib.format.read_magic(f)
        shape, column_major, dtype = np.lib.format.read_array_header_1_0(f)
        if column_major:
            raise ValueError("is not in row order")
        for _ in range(shape[0]):
            row = f.read(math.prod(shape[1:]) * dtype.itemsize)
            yield np.frombuffer(row, dtype).reshape(shape[1:])


def _read_pickle(path, admitted=""):
    """Unpickle lists, dicts, strings, numbers and classes whose names fit a pattern; run no other code."""
    class PlainUnpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if re.fullmatch(admitted, f"{module}.{name}"):
                return super().find_class(module, name)
            raise ValueError(f"it names {module}.{name}, which could run code")

    with open(path, "rb") as f:
        return PlainUnpickler(f).load()


def _read_pyskl(source, protocol):
    """pyskl's .pkl of 3-D annotations: ntu60_3danno.pkl and the like."""
    protocol = protocol or "xsub"
    form = (f'must be {{"split": {{"{protocol}_train": names, "{protocol}_val": names}}, '
            f'"annotations": [{{"frame_dir": name, "label": 0, "keypoint": (M, F, 25, 3)}}, ...]}}')
    remedy = "try another --protocol, or make a dataset folder"
    with reading(source, remedy, f" as {protocol} of 3-D skeletons"):
        content = _read_pickle(source, r"_codecs\.encode|numpy\.(ndarray|dtype|_?core\.(numeric\._frombuffer|"
                                       r"multiarray\.(_reconstruct|scalar)))")
        try:
            split, annotations = content["split"], content["annotations"]
            trains = dict.fromkeys(split[f"{protocol}_val"], False)
            trains |= dict.fromkeys(split[f"{protocol}_train"], True)
            samples = [(entry["frame_dir"], entry["keypoint"], entry["label"]) for entry in annotations
                       if entry["frame_dir"] in trains]
        except (LookupError, TypeError):
            raise ValueError(form) from None
        yield None, len(samples), 1, [name for name, _, _ in samples]
        for name, people, label in samples:
            people = np.asarray(people)
            if people.ndim != 4:
                raise ValueError(form)
            if people.shape[-1] != 3:
                raise ValueError("holds 2-D poses in pixels")
            yield name, people, (label, trains[name], *_ntu_row(name)[2:])


def _read_agcn(source, protocol):
    """2s-AGCN's, MS-G3D's and Shift-GCN's folder: train_data_joint.npy, train_label.pkl and those of val."""
    samples = []
    for part in ("train", "val"):
        x = read_array(source / f"{part}_data_joint.npy", "float", "(N, 3, T, 25, M)", mmap=True)
        path, trains = source / f"{part}_label.pkl", part == "train"
        with reading(path, f"give the one that belongs to {part}_data_joint.npy", " as names and labels"):
            columns = _read_pickle(path)
            if [len(column) for column in columns] != [len(x), len(x)]:
                raise ValueError(f"must be a list of {len(x)} names and a list of {len(x)} labels")
            stray = [name for name in columns[0] if protocol and _ntu_row(name, protocol)[1] != trains]
            if stray:
                raise ValueError(f"{stray[0]} is on the other side of {protocol}; leave out --protocol")
            samples += [(name, sequence, (label, trains, *_ntu_row(name)[2:]))
                        for name, label, sequence in zip(*columns, x)]
    yield None, len(samples), 4, [name for name, _, _ in samples]
    for name, sequence, row in samples:
        people = sequence.transpose(3, 1, 2, 0)                 # each person may be repeated up to T frames
        main = people[0]                                        # (T, V, 3)
        starts = np.flatnonzero((main[1:] == main[:1]).all((1, 2))) + 1
        period = next((p for p in starts if (main[p:] == main[:-p]).all()), None)
        yield name, people[:, :period], row


READERS = {
    "ntu": _read_ntu, "pku": _read_pku, "ctrgcn": _read_ctrgcn, "pyskl": _read_pyskl, "agcn": _read_agcn}


def kind_of(source):
    """The key of READERS for a file or folder, by its content."""
    names = [path.name for path in files_in(source, "")] if source.is_dir() else [source.name]
    fits = {"ntu": files_in(source, ".skeleton"), "agcn": (source / "train_data_joint.npy").exists(),
            "pku": source.is_dir() and any(PKU_FILE.fullmatch(name) for name in names),
            "ctrgcn": source.suffix.lower() == ".npz", "pyskl": source.suffix.lower() == ".pkl"}
    kinds = [kind for kind, fit in fits.items() if fit]
    if len(kinds) > 1:
        raise InputError(f"{source}: holds {' and '.join(kinds)}; --kind chooses one")
    if kinds:
        return kinds[0]
    archives = [name for name in names if name.lower().endswith(ARCHIVES)]
    fact = f"holds {', '.join((archives or names or ['nothing'])[:3])}"
    if not source.is_dir():
        fact = "is an archive" if archives else "is not a file in a known form"
    raise InputError(f"{source}: {fact}; {'unpack the archives' if archives else KNOWN}")


def prepare(source, out, frames=64, protocol=None, kind=None, exclude=None):
    """Read a downloaded set into a dataset folder, a sample at a time. Only a complete folder gets its name.

    protocol: "xsub", "xview" or "xset"; kind: a key of READERS; exclude: a file of names to leave out.
    """
    source, out = Path(source), Path(out)
    if not source.exists():
        raise InputError(f"{source}: does not exist; check the path")
    with new_folder(out) as folder:
        samples = READERS[kind or kind_of(source)](source, protocol)
        dataset, total, num_files, recordings = next(samples)
        num_ignored = len(files_in(source, "")) - num_files     # below 0 where the source is a file
        if total and num_ignored > 0:
            note(f"{source}: ignored {num_ignored} other files")
        excluded = _excluded(exclude, source, recordings) if exclude else ()
        samples = (sample for sample in samples if sample[0].partition(".")[0] not in excluded)
        rows, skipped = _write_skeletons(source, samples, total, frames, folder)
        if not rows:
            fact = "correct " + ": ".join(skipped[0]) if skipped else "it holds none, or all were excluded"
            raise InputError(f"{source}: no recording could be read; {fact}")
        columns = dict(zip(COLUMNS, np.array(rows, np.int64).T))
        dataset = dataset or ("ntu120" if columns["labels"].max() >= 60 else "ntu60")
        classes, labels = bundled_classes(dataset), columns["labels"]
        if not 0 <= labels.min() <= labels.max() < len(classes):
            raise InputError(f"{source}: labels are from {labels.min()} to {labels.max()}, must be "
                             f"{dataset}'s from 0 to {len(classes) - 1}; make a dataset folder")
        for name, column in columns.items():
            if name in ("labels", "training") or column.any():
                np.save(folder / f"{name}.npy", column.astype(bool) if name == "training" else column)
        (folder / "classes.txt").write_bytes("\n".join(classes).encode())
        write_table(folder / "skipped.csv", [("file", "reason"), *skipped])
    print(f"{len(rows)} samples, {len(skipped)} skipped (skipped.csv)\nwritten: {out}")


def _excluded(path, source, recordings):
    """The recordings of a source that a list names, in any notation. Raises InputError if it has none."""
    with reading(path, "write one name per line"):
        text = text_of(path)
    if recordings is None:
        raise InputError(f"{path}: the samples of {source} have no names; leave out --exclude")
    listed = {*PKU_NAME.findall(text), *(name[0] for name in NTU_NAME.finditer(text))}
    excluded = listed & {name.partition(".")[0] for name in recordings}
    if not excluded:
        raise InputError(f"{path}: names no recording of {source}; write names like S001C001P001R001A001 or "
                         f"0002-L")
    note(f"{path}: {len(excluded)} of {len(listed)} listed recordings left out")
    return excluded


def _write_skeletons(source, samples, total, frames, folder):
    """Write the samples' skeletons.npy → their rows, and (name, reason) of those that could not be read.

    Raises InputError if a sample's label is not the action in its name.
    """
    rows, skipped, stream_path, start = [], [], folder.parent / "skeletons", time.perf_counter()
    with open(stream_path, "wb") as stream:
        for n, (name, people, row) in enumerate(samples, start=1):
            if row and NTU_NAME.match(name) and row[0] != _ntu_row(name)[0]:
                raise InputError(f"{source}: {name} has label {row[0]}; must be {_ntu_row(name)[0]}")
            try:
                if row is None:
                    raise ValueError(people)
                check_joints(people.shape[2])
                stream.write(resampled(people, frames).tobytes())
                rows.append(row)
            except ValueError as e:
                skipped.append((name, str(e)))
            if n % 1000 == 0:
                rate = n / (time.perf_counter() - start)
                print(f"{n}/{total}  {rate:.0f} a second  {(total - n) / rate:.0f} s left", flush=True)
    if rows:                                                    # now the number of persons is known
        skeletons = np.memmap(stream_path, np.float32, "r+", shape=(len(rows), 3, frames, 25, 2))
        _stand_up(skeletons)
        np.save(folder / "skeletons.npy", skeletons[..., :1 + skeletons[..., 1].any()])
    return rows, skipped


def _stand_up(skeletons):
    """Turn (N, 3, T, V, M) in place where z points up, as 2s-AGCN's script writes sets."""
    heights = []                                                # of the median torso, along y and z
    for axes in ([0, 1, 2], [0, 2, 1]):
        parts = [torsos_of(part[:, axes], NTU25)[1] for _, part in pieces(skeletons)]
        heights.append(np.median(np.concatenate(parts)))
    if heights[1] > max(heights[0], 0.5):
        note("the torsos stand along z; turned (x, y, z) into (x, z, -y)")
        for _, part in pieces(skeletons):
            part[:, 1], part[:, 2] = part[:, 2].copy(), 0 - part[:, 1]


# ------------------------------------------------------------------------------------------- the command line
def main():
    """The command line: prepare a downloaded set."""
    parser = Parser(prog="skeletons/prepare.py", description=f"Make a dataset folder; for SOURCE, {KNOWN}.")
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--frames", type=int, default=64,
                        help="to resample to, 2 to 1000 (default: 64, the best of those tried with published "
                             "encoders; 300 is not their form)")
    parser.add_argument("--protocol", choices=["xsub", "xview", "xset"], help="default: xsub, or the set's")
    parser.add_argument("--exclude", type=Path, metavar="FILE", help="names of recordings to leave out")
    parser.add_argument("--kind", choices=READERS, help="where the source holds two of them")
    args = parser.parse_args()
    if not 2 <= args.frames <= 1000:
        parser.error(f"--frames {args.frames} is out of range, from 2 to 1000")
    prepare(**vars(args))


if __name__ == "__main__":
    command_line(main)
