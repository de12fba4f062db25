"""Build the benchmark Kinect81, a dataset folder, out of public recordings.

    python skeletons/kinect81.py OUT

It has 4,118 sequences of 81 actions by 100 people: 25 NTU joints, one person, 32 frames, float16. The
recordings belong to their authors; cite those whose data you use, and respect their terms. Nothing is
bundled: GitHub's archives of six repositories (some 430 MB) are downloaded at fixed commits, and kept.

  set           recorded by                      repository                                   terms
  MSR-Action3D  Li et al., CVPRW 2010            ahmedhamdy2121/CV_Action_Recognition_2015    none stated
  UTKinect      Xia et al., CVPRW 2012           ahmedhamdy2121/CV_Action_Recognition_2015    none stated
  UTD-MHAD      Chen et al., ICIP 2015           woo-chia-wei/kinect-sequence-classification  cite
  NW-UCLA       Wang et al., CVPR 2014           zjyyjz556/ctrgcn                             non-commercial
  Kinder-Gator  Aloba et al., Eurographics 2018  hayeesha/Kinder-Gator                        none stated
  MSRC-12       Fothergill et al., CHI 2012      corazza/pose                                 cite
  PRECOG        Jardim et al., 2016              DavidJardim/precog_dataset_16                MIT

Files of MSRC-12 of 4 MiB and more are skipped (there is one), as in the published set.

Shapes: N sequences; F recorded frames; V joints. 20 joints are Kinect v1's, in its order, in metres.
"""
import argparse
import io
import json
import math
import re
import shutil
import struct
import sys
import urllib.request
import zipfile
import zlib
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import (TEXT_DIR, InputError, Parser, command_line, make_folder, new_folder, note, read_lines,
                  reading, write_file)

FRAMES = 32                   # of a sequence
CAP = 90                      # sequences of a class, at most
UNSEEN = 10                   # classes of a split, and as many for validation

COMMITS = {  # repository: the commit that is read
    "ahmedhamdy2121/CV_Action_Recognition_2015": "7eb289d2b1a52a2d196880e676759300a2b685df",
    "woo-chia-wei/kinect-sequence-classification": "65e9b13950d7971c8d1e49e960f6796bd0dc9257",
    "zjyyjz556/ctrgcn": "99850735b2e33cb69cd760fdd7590ce03f93f4ea",
    "hayeesha/Kinder-Gator": "2c0362357c848d7ce7b2f296fe359f5085efc71a",
    "corazza/pose": "d480ab327de810810ee52cf5e1d4ac7666c6e6dc",
    "DavidJardim/precog_dataset_16": "1ff2c9de2559664b2845d992ed60024a173e2eae",
}


def _numbered(names):
    """Class names divided by semicolons → {1: name, 2: name, ...}."""
    return dict(enumerate(" ".join(names.split()).split("; "), start=1))


MSR_ACTION3D = _numbered("""
    wave one hand; wave one arm horizontally; hammer; catch an object; punch; throw; draw an x in the air;
    draw a tick in the air; draw a circle in the air; clap hands; wave hands; side boxing; bow; kick forward;
    kick to the side; run in place; swing a tennis racket; serve in tennis; golf swing; pick up and throw""")
UTD_MHAD = _numbered("""
    swipe to the left; swipe to the right; wave one hand; clap hands; throw; cross the arms over the chest;
    shoot a basketball; draw an x in the air; draw a circle in the air; draw a circle in the air;
    draw a triangle in the air; bowl with the right hand; punch; swing a baseball bat from the right;
    swing a tennis racket; curl both arms; serve in tennis; push; knock on a door with the right hand;
    catch an object; pick up and throw; run in place; walk in place; stand up; sit down; lunge forward;
    squat down""")
NW_UCLA = {1: "pick up", 2: "pick up", 3: "drop trash", 4: "walk", 5: "sit down", 6: "stand up",
           8: "put on a jacket", 9: "take off a jacket", 11: "throw", 12: "carry"}
KINDER_GATOR = {  # how a file's name begins: its class; the first that fits, or else the words of the name
    "Raise-your-arm": "raise one arm to the side", "Raise-your-": "raise one hand",
    "Wave-your-": "wave one hand", "Bend-your": "raise one leg with the knee bent",
    "Put-your-hands-on-your-hips-and-twist": "put the hands on the hips and twist",
    "Put-your": "put the hands on the hips and lean to the side", "Touch": "touch the toes",
    "Do-a": "lunge forward", "Do-two": "do jumping jacks", "Lift-your": "lift one leg to the side",
    "Walk": "walk in place", "Run": "run in place", "Jump": "jump", "Kick": "kick forward", "Throw": "throw",
    "Climb": "climb a ladder", "Push": "push a button in front",
    "Signal-someone-to-come": "beckon someone to come here",
    "Draw-the-letter-X": "draw an x in the air", "Draw-the": "draw the letter {letter} in the air",
    "Draw-a": "{words} in the air", "Make": "make the letter {letter} with the body",
    "Swipe-across-an-imaginary-screen-in-front-of-you-from-right": "swipe to the left",
    "Swipe": "swipe to the right", "Fly-like-a-b": "flap the arms like a flying bird",
    "Fly": "spread the arms and fly like an airplane",
}
MSRC_12 = _numbered("""
    lift the outstretched arms; squat down; swipe to the right; put on night vision goggles;
    wind up both arms in circles; shoot a pistol with both hands; bow; throw;
    raise both hands to the head to protest; reach over the shoulder to change weapon;
    beat both arms up and down to the music; kick forward""")
PRECOG = _numbered("""
    punch; punch; kick forward; kick forward; kick to the side; kick to the side;
    strike with the back of the fist; strike with the elbow""")


# ---------------------------------------------------------------------------------------------------- readers
# A reader is a generator over an open archive: class name, performer, joints (F, 20, 3) of each recording.
def _msr_action3d(archive):
    order = np.array([7, 4, 3, 20, 1, 8, 10, 12, 2, 9, 11, 13, 5, 14, 16, 18, 6, 15, 17, 19]) - 1
    for name, content in _files(archive, r"real_world_coordinates/a(\d+)_s(\d+)_e"):
        joints = _numbers(content).reshape(-1, 20, 4)           # x, y, z, confidence
        yield MSR_ACTION3D[int(name[1])], int(name[2]), joints[:, order, :3]


def _utkinect(archive):
    """One file lists what each video shows: "s01_e01", then lines like "walk: 252 390"."""
    index = next(path for path in archive.namelist() if path.endswith("UTKinect/joints/actionLabel.txt"))
    for line in archive.read(index).decode().split("\n"):
        if video := re.match(r"s(\d\d)_e\d+$", line.strip()):
            performer = int(video[1])
            content = archive.read(index.replace("actionLabel", f"joints_{video[0]}"))
            rows = _numbers(content).reshape(-1, 61)            # frame number, 20 joints
        elif segment := re.match(r"(\w+):\s*(\d+)\s+(\d+)", line.strip()):
            shown = (rows[:, 0] >= int(segment[2])) & (rows[:, 0] <= int(segment[3]))
            name = re.sub("[A-Z]", r" \g<0>", segment[1]).lower()                           # from "sitDown"
            yield name, performer, rows[shown, 1:].reshape(-1, 20, 3)


def _utd_mhad(archive):
    order = [3, 2, 1, 0, *range(4, 20)]
    for name, content in _files(archive, r"Skeleton/a(\d+)_s(\d+)_t\d+_skeleton\.mat$"):
        joints = _matlab_array(content).transpose(2, 0, 1)      # from (20, 3, F)
        yield UTD_MHAD[int(name[1])], int(name[2]), joints[:, order]


def _nw_ucla(archive):
    for name, content in _files(archive, r"all_sqe/a(\d+)_s(\d+)_e\d+_v\d+\.json$"):
        yield NW_UCLA[int(name[1])], int(name[2]), np.array(json.loads(content)["skeletons"], np.float64)


def _kinder_gator(archive):
    for name, content in _files(archive, r"POSE-p(\d+)_\d+-(.*)-\d+\.csv$"):
        lines = content.decode().split("\n")[1:]
        rows = [line.split(",")[1:61] for line in lines if line.count(",") >= 61]
        words, letter = name[2].replace("-", " ").lower(), name[2].split("-")[-1]
        form = next((form for start, form in KINDER_GATOR.items() if name[2].startswith(start)), words)
        joints = np.array(rows, np.float64).reshape(-1, 20, 3)
        yield form.format(words=words, letter=letter), int(name[1]), joints


def _msrc_12(archive):
    """A tag marks the moment of a gesture, which extends half-way to its neighbours, but at most 2 s."""
    for name, content in _files(archive, r"/P\d_\d_\d+A?_p(\d+)\.csv$"):
        if len(content) >= 4 << 20:
            continue
        rows = _numbers(content).reshape(-1, 81)                # time in µs; x, y, z, state of 20 joints
        times, joints = rows[:, 0], rows[:, 1:].reshape(-1, 20, 4)[..., :3]
        stem = name.string[:-len(".csv")].lower()
        path = next(path for path in archive.namelist() if path.lower() == f"{stem}.tagstream")
        lines = archive.read(path).decode().split("\n")[1:]     # "782192016878;G1  lift outstretched arms"
        tags = [line.split(";") for line in lines if ";" in line]
        moments = [(int(tick) * 1000 + 49875 / 2) / 49875 for tick, _ in tags]              # in µs
        edges = [-np.inf, *((a + b) / 2 for a, b in zip(moments, moments[1:])), np.inf]
        for (_, tag), moment, start, end in zip(tags, moments, edges, edges[1:]):
            start, end = max(moment - 2e6, start), min(moment + 2e6, end)
            gesture = joints[(times >= start) & (times < end)]
            if (np.abs(gesture).sum((1, 2)) > 0).sum() >= 15:   # frames with a body
                yield MSRC_12[int(re.search(r"\d+", tag)[0])], int(name[1]), gesture


def _precog(archive):
    """Each row of a file has 20 joints "x y z" and the action, 0 between two actions."""
    for name, content in _files(archive, r"CSV/Seq\d+_(\d+)\.csv$"):
        lines = content.decode("utf-8", "replace").strip().split("\n")[1:]
        rows = [line.strip().split(";") for line in lines]
        actions = np.array([int(row[20]) for row in rows])
        joints = np.array([[joint.split() for joint in row[:20]] for row in rows], np.float64)
        cuts = [0, *(np.flatnonzero(np.diff(actions)) + 1), len(rows)]
        for start, end in zip(cuts, cuts[1:]):
            if actions[start] and end - start >= 8:
                yield PRECOG[actions[start]], int(name[1]), joints[start:end]


def _files(archive, pattern):
    """The match and the content of each file whose path the pattern finds, sorted by path."""
    for path in sorted(archive.namelist()):
        if match := re.search(pattern, path):
            yield match, archive.read(path)


def _numbers(content):
    return np.array(content.decode().split(), np.float64)


def _matlab_array(content):
    """The one array of doubles in a MATLAB 5 file, which is a header of 128 bytes and one element."""
    kind, size = struct.unpack("<II", content[128:136])
    is_compressed = kind == 15
    element = zlib.decompress(content[136:136 + size]) if is_compressed else content[128:]
    rank = struct.unpack("<I", element[28:32])[0] // 4
    shape = struct.unpack(f"<{rank}i", element[32:32 + 4 * rank])
    start = 32 + (4 * rank + 7) // 8 * 8                        # of the array's name; parts take 8 n bytes
    _, short_length, length = struct.unpack("<HHI", element[start:start + 8])
    start += 8 if short_length else 8 + (length + 7) // 8 * 8   # of the numbers, after 8 bytes more
    return np.frombuffer(element, "<f8", math.prod(shape), start + 8).reshape(shape, order="F")


SETS = {  # name: repository, reader, what is added to its performers' numbers, least number of frames
    "MSR-Action3D": ("ahmedhamdy2121/CV_Action_Recognition_2015", _msr_action3d, 0, 5),
    "UTKinect": ("ahmedhamdy2121/CV_Action_Recognition_2015", _utkinect, 100, 3),
    "UTD-MHAD": ("woo-chia-wei/kinect-sequence-classification", _utd_mhad, 1000, 5),
    "NW-UCLA": ("zjyyjz556/ctrgcn", _nw_ucla, 2000, 5),
    "Kinder-Gator": ("hayeesha/Kinder-Gator", _kinder_gator, 3000, 5),
    "MSRC-12": ("corazza/pose", _msrc_12, 4000, 5),
    "PRECOG": ("DavidJardim/precog_dataset_16", _precog, 5000, 5),
}


# --------------------------------------------------------------------------------- from archives to sequences
def fetch(repository, archives):
    """The path of a repository's archive in the folder, downloaded where that has none or a broken one."""
    commit = COMMITS[repository]
    path = archives / f"{repository.replace('/', '+')}-{commit[:8]}.zip"
    if zipfile.is_zipfile(path):
        return path
    url = f"https://codeload.github.com/{repository}/zip/{commit}"
    make_folder(archives)
    with reading(url, "try again, or fetch this commit by hand and save it there", f" into {path}"):
        with urllib.request.urlopen(url, timeout=60) as response:       # seconds without a byte
            content = response.read()
        if not zipfile.is_zipfile(io.BytesIO(content)):
            raise ValueError("what arrived is not a whole .zip file")
        write_file(path, lambda f: f.write(content), "--archives")
    print(f"{repository}: {len(content) / 1e6:.1f} MB", flush=True)
    return path


def read_set(name, path):
    """The class name, subject and sequence (FRAMES, 25, 3) float16 of each recording in a set's archive."""
    repository, read, first_subject, shortest = SETS[name]
    remedy = f"remove it and try again, or fetch {repository} at commit {COMMITS[repository]} by hand"
    found = []
    with reading(path, remedy), zipfile.ZipFile(path) as archive:
        for class_name, performer, joints in read(archive):
            joints = joints[np.isfinite(joints).all((1, 2))]
            joints = joints[np.abs(joints).sum((1, 2)) > 0]     # (F, 20, 3), frames with a body
            if len(joints) >= shortest:                         # by way of 64 frames, as in the published set
                joints = resampled(to_ntu(joints), 64, np.float64).astype(np.float32)
                sequence = resampled(joints, FRAMES, np.float32).astype(np.float16)
                found.append((class_name, first_subject + performer, sequence))
    if not found:
        raise InputError(f"{path}: holds no recording of {name}; {remedy}")
    print(f"{name}: {len(found)} sequences", flush=True)
    return found


def to_ntu(joints):
    """Kinect v1's joints (F, 20, 3) → NTU RGB+D's (F, 25, 3), float32; a thumb is at its hand."""
    ntu = np.zeros((len(joints), 25, 3), np.float32)
    ntu[:, :20] = joints
    shoulders, head = joints[:, 2], joints[:, 3]
    ntu[:, 20], ntu[:, 2] = shoulders, shoulders + .33 * (head - shoulders)                 # 2: the neck
    for tip, thumb, hand, wrist in ((21, 22, 7, 6), (23, 24, 11, 10)):
        ntu[:, tip] = joints[:, hand] + .5 * (joints[:, hand] - joints[:, wrist])
        ntu[:, thumb] = joints[:, hand]
    return ntu


def resampled(joints, frames, dtype):
    """Joints (F, V, 3) → (frames, V, 3), linear in time, with weights of a dtype."""
    at = np.linspace(0, len(joints) - 1, frames)                # (frames,) positions in the recording
    before = np.floor(at).astype(int)
    after = np.minimum(before + 1, len(joints) - 1)
    weight = (at - before).astype(dtype)[:, None, None]
    return joints[before] * (1 - weight) + joints[after] * weight


def capped(labels, subjects):
    """The rows (N,) to keep: at most CAP sequences of a class, evenly from its performers."""
    random, kept = np.random.RandomState(0), []
    for label in range(labels.max() + 1):
        rows = np.flatnonzero(labels == label)
        if len(rows) > CAP:
            rows = random.permutation(rows)
            who = subjects[rows]
            times_before = [(who[:n] == who[n]).sum() for n in range(len(who))]         # of its performer
            rows = rows[np.argsort(times_before, kind="stable")[:CAP]]
        kept.extend(rows)
    return np.sort(kept)


def splits_of(num_classes, subjects):
    """Three random splits, as splits.json holds them; every other performer is a test subject."""
    splits, test_subjects = {}, sorted(set(subjects.tolist()))[1::2]
    for seed, letter in enumerate("abc", start=100):
        classes = np.random.RandomState(seed).permutation(num_classes).tolist()
        splits[f"{num_classes - UNSEEN}_{UNSEEN}_{letter}"] = {
            "unseen": sorted(classes[:UNSEEN]), "val": sorted(classes[UNSEEN:2 * UNSEEN]),
            "test_subjects": test_subjects}
    return splits


# ------------------------------------------------------------------------------------------- the command line
def build(out, archives):
    """Read the recordings into a dataset folder. Only a complete one gets its name.

    archives: the folder where downloads are kept.
    """
    with new_folder(out) as folder:
        paths = {repository: fetch(repository, archives) for repository in COMMITS}
        found = [row for name in SETS for row in read_set(name, paths[SETS[name][0]])]
        names, subjects, sequences = map(np.array, zip(*found))     # (N,), (N,), (N, FRAMES, 25, 3)
        classes, labels = np.unique(names, return_inverse=True)
        kept = capped(labels, subjects)
        classes, labels, subjects = classes.tolist(), labels[kept], subjects[kept]
        skeletons = sequences[kept].transpose(0, 3, 1, 2)[..., None]            # (N, 3, FRAMES, 25, 1)
        np.save(folder / "skeletons.npy", skeletons)
        np.save(folder / "labels.npy", labels)
        np.save(folder / "subjects.npy", subjects)
        (folder / "classes.txt").write_bytes(("\n".join(classes) + "\n").encode())
        (folder / "splits.json").write_bytes(json.dumps(splits_of(len(classes), subjects)).encode())
        has_text = classes == read_lines(TEXT_DIR / "kinect81_classes.txt")
        for prompt in ("label", "description") if has_text else ():
            shutil.copyfile(TEXT_DIR / f"kinect81_{prompt}.npy", folder / f"text_{prompt}.npy")
    if not has_text:
        note(f"{out}: its classes are not the benchmark's 81, whose text is bundled; embed its classes.txt "
             f"with text/embed.py")
    print(f"{len(labels)} sequences, {len(classes)} classes, {len(set(subjects))} people\nwritten: {out}\n"
          f"The recordings belong to their authors; cite those whose data you use (--help lists them).")


def main():
    """The command line: build the benchmark."""
    parser = Parser(prog="skeletons/kinect81.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--archives", type=Path, default=Path("archives"), metavar="FOLDER",
                        help="where downloads are kept (default: archives, in the current folder)")
    build(**vars(parser.parse_args()))


if __name__ == "__main__":
    command_line(main)
