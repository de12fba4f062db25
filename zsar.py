"""What every method shares: files, skeletons, the synthetic motions, the ST-GCN encoder, the training loop.

Shapes: N samples; C classes (in STGCN: channels, as its paper has it); T frames; V joints; M persons; K candidates; D width.
"""
import argparse
import csv
import hashlib
import io
import json
import math
import os
import signal
import sys
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

FEATURES = 256  # width of an encoded skeleton

# ---------------------------------------------------------------------------------------------------- files and command line
class InputError(Exception):
    """Bad input from the user. Its one line says what is wrong, in which file, and what to do."""

class Diverged(InputError):
    """A training's loss is no longer finite."""

class Parser(argparse.ArgumentParser):
    """Reads a command line; a wrong one raises InputError."""

    def error(self, message):
        raise InputError(f"{message}; python {self.prog} --help lists the options")

def command_line(command):
    """Run a command. Bad input gives one line on standard error and exit status 2, Ctrl-C one line and 130."""
    try:
        command()
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as e:
        print(f"interrupted{e}", file=sys.stderr)
        sys.exit(130)

def prepare_folder(path):
    """Make a folder that results can be written to → its Path. Raises InputError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"{path}: no folder can be made there ({e.strerror}); choose another place") from None
    return path

def save(path, write):
    """Write a file beside its place and rename it, so that no half-written file is ever seen. Raises InputError."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")              # two runs may save the same encoder
    try:
        with open(part, "wb") as f:
            write(f)
        os.replace(part, path)
    except (OSError, RuntimeError) as e:                                  # torch.save tells of a full disk by a RuntimeError
        part.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({getattr(e, 'strerror', 0) or 'disk full?'}); free space or choose another place") from None

def save_json(path, value):
    """Write a value as a .json file, like `save`."""
    save(path, lambda f: f.write((json.dumps(value, indent=1) + "\n").encode()))

def read_json(path):
    """The object in a .json file, as a dict. Raises InputError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("must be an object: {...}")
        return value
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: cannot be read as JSON ({e}); see the README for its form") from None

def load(path):
    """Read what this program saved with torch.save, never unpickling objects, to the CPU. Raises InputError."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:                                                     # a damaged file may raise nearly anything
        raise InputError(f"{path}: is missing, damaged or no file of this program; name another, or remove it") from None

def save_table(path, rows):
    """Write rows, the first the header, as a .csv file, like `save`."""
    table = io.StringIO()
    csv.writer(table).writerows(rows)
    save(path, lambda f: f.write(table.getvalue().encode()))

def load_array(path, kind, *shapes, mmap=False):
    """Read one .npy file, never unpickling, of a kind ("float", "int", "bool") and one of the shapes, such as "(N, 3, T, V, M)",
    whose numbers are fixed sizes. Raises InputError if it is missing, broken, pickled, or something else."""
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
    if array.dtype.kind not in {"float": "f", "int": "iu", "bool": "b"}[kind]:
        raise InputError(f"{path}: dtype is {array.dtype}, must be {kind}; convert it with .astype")
    fits = lambda sizes: len(sizes) == array.ndim and all(not s.isdigit() or int(s) == n for s, n in zip(sizes, array.shape))
    if 0 in array.shape or not any(fits(shape.strip("()").rstrip(",").split(", ")) for shape in shapes):
        raise InputError(f"{path}: shape is {array.shape}, must be {' or '.join(shapes)}")
    for first, rows in pieces(array) if kind == "float" else ():
        bad = ~np.isfinite(rows).reshape(len(rows), -1).all(1)
        if bad.any():
            raise InputError(f"{path}: NaN or infinity in row {first + int(bad.argmax())}; mend or drop that row")
    return array

def pieces(array, rows=1024):
    """The array's rows, 1024 at a time, each with the number of the first. A memory-mapped array is read as a plain file: pages
    once touched in a map would stay in memory."""
    for first in range(0, len(array), rows):
        part = array[first:first + rows]
        if isinstance(array, np.memmap) and array.flags.c_contiguous:
            offset = array.offset + first * array.strides[0]
            part = np.fromfile(array.filename, array.dtype, part.size, offset=offset).reshape(part.shape)
        yield first, part

def fingerprint(*arrays):
    """SHA-256 of arrays' types, shapes and values, and of what is no array as JSON, in hex digits."""
    h = hashlib.sha256()
    for array in arrays:
        array = array if isinstance(array, np.ndarray) else np.frombuffer(json.dumps(array).encode(), np.uint8)
        h.update(f"{array.dtype} {array.shape} ".encode())
        for _, part in pieces(array):
            h.update(np.ascontiguousarray(part))
    return h.hexdigest()

# ---------------------------------------------------------------------------------------------------- joint graphs
class JointGraph(NamedTuple):
    """A skeleton layout, joints 0-based."""
    edges: tuple        # ((child, parent), ...)
    centre: int         # the joint from which hop distances are counted
    root: tuple         # the joints whose mean is the spine base
    shoulders: tuple    # (left, right)

NTU25 = JointGraph((
    (0, 1), (1, 20), (2, 20), (3, 2), (4, 20), (5, 4), (6, 5), (7, 6), (8, 20), (9, 8), (10, 9), (11, 10), (12, 0), (13, 12), (14, 13),
    (15, 14), (16, 0), (17, 16), (18, 17), (19, 18), (21, 22), (22, 7), (23, 24), (24, 11)), centre=20, root=(0,), shoulders=(4, 8))
KINECT20 = JointGraph((
    (0, 1), (1, 2), (3, 2), (4, 2), (5, 4), (6, 5), (7, 6), (8, 2), (9, 8), (10, 9), (11, 10), (12, 0), (13, 12), (14, 13), (15, 14),
    (16, 0), (17, 16), (18, 17), (19, 18)), centre=2, root=(0,), shoulders=(4, 8))
COCO17 = JointGraph((
    (15, 13), (13, 11), (16, 14), (14, 12), (11, 5), (12, 6), (9, 7), (7, 5), (10, 8), (8, 6), (5, 0), (6, 0), (1, 0), (3, 1), (2, 0),
    (4, 2)), centre=0, root=(11, 12), shoulders=(5, 6))
OPENPOSE18 = JointGraph((
    (4, 3), (3, 2), (7, 6), (6, 5), (13, 12), (12, 11), (10, 9), (9, 8), (11, 5), (8, 2), (5, 1), (2, 1), (0, 1), (15, 0), (14, 0),
    (17, 15), (16, 14)), centre=1, root=(8, 11), shoulders=(5, 2))
GRAPHS = {25: NTU25, 20: KINECT20, 17: COCO17, 18: OPENPOSE18}            # chosen by V; 25 is Kinect v2, 20 is Kinect v1

def adjacency(edges, num_joints, centre):
    """The normalised adjacency in the three subsets of ST-GCN's "spatial configuration" → float32 (3, V, V), where [k, v, w] weighs
    source joint v in target joint w. Undirected edges plus self-loops, columns normalised (A·D⁻¹); subset 0: v = w; 1: neighbours
    no nearer to the centre than w; 2: nearer ones. Source: Yan et al., AAAI 2018; methods.md section 2."""
    A = np.eye(num_joints)                                                # (V, V)
    for v, w in edges:
        A[v, w] = A[w, v] = 1
    hops = np.full(num_joints, -1)                                        # (V,) hop distance to the centre
    hops[centre], frontier = 0, [centre]
    for v in frontier:                                                    # breadth first
        for w in np.flatnonzero((A[v] > 0) & (hops < 0)):
            hops[w] = hops[v] + 1
            frontier.append(w)
    A /= A.sum(0)
    self_loop = np.eye(num_joints, dtype=bool)
    nearer = hops[:, None] < hops[None, :]                                # (V, V): d(v) < d(w)
    subsets = [self_loop, ~self_loop & ~nearer, nearer]
    return torch.tensor(np.stack([A * s for s in subsets]), dtype=torch.float32)

# ---------------------------------------------------------------------------------------------------- skeletons
def resampled_bodies(bodies, num_frames, frames):
    """Recorded bodies, each {frame: 3·V numbers, all x, all y, all z} → (3, frames, V, 2) float32, main actor first: of the bodies
    in at least 12 frames (or, if none is, in as many as the longest), the two with the most motion, the joints' summed variance.
    Time is resampled linearly; where a body comes or goes it is as in its nearer frame, where it is absent, zeros. Raises
    ValueError if nobody is there. (methods.md section 7)"""
    tracks = [(list(body), np.array(list(body.values())).reshape(len(body), 3, -1)) for body in bodies if body]
    if not all((np.abs(xyz) < 1000).all() for _, xyz in tracks):          # NaN neither
        raise ValueError("a coordinate is no number below 1000 m")
    tracks = [(present, xyz) for present, xyz in tracks if xyz.any()]
    if not tracks:
        raise ValueError("no body")
    longest = max(len(present) for present, _ in tracks)
    tracks = [track for track in tracks if len(track[0]) >= min(12, longest)]                     # shorter ones are mostly ghosts
    tracks.sort(key=lambda track: -track[1].var(0).sum())
    at = np.linspace(0, num_frames - 1, frames)
    before, after = np.floor(at).astype(int), np.ceil(at).astype(int)
    out = np.zeros((frames, 3, tracks[0][1].shape[-1], 2), np.float32)
    for m, (present, xyz) in enumerate(tracks[:2]):
        whole, there = np.zeros((num_frames, *xyz.shape[1:])), np.zeros(num_frames)
        whole[present], there[present] = xyz, 1
        w0, w1 = (1 + before - at) * there[before], (at - before) * there[after]                  # (frames,) each
        mixed = w0[:, None, None] * whole[before] + w1[:, None, None] * whole[after]
        out[..., m] = mixed / np.maximum(w0 + w1, 1e-9)[:, None, None]
    return out.swapaxes(0, 1)

def preprocess(skeletons, graph):
    """Move and turn each sequence to a common frame: (N, 3, T, V, M) metres → float32, same shape. The main actor's spine base in
    the first frame goes to the origin; the line of the shoulders, right to left, goes to the +x axis, by a turn about the vertical
    and then a tilt, so that nobody ends upside down. Absent persons stay zero."""
    x = np.asarray(skeletons, dtype=np.float32)
    present = x.any((1, 3))                                               # (N, T, M)
    first = present[:, :, 0].argmax(1)                                    # (N,) main actor's first frame
    pose = x[np.arange(len(x)), :, first, :, 0]                           # (N, 3, V)
    origin = pose[:, :, list(graph.root)].mean(2)                         # (N, 3)
    left, right = graph.shoulders
    dx, dy, dz = (pose[:, :, left] - pose[:, :, right]).T                 # (N,) each
    turn, tilt = np.arctan2(dz, dx), np.arctan2(dy, np.hypot(dx, dz))
    ct, st, cr, sr, zero = np.cos(turn), np.sin(turn), np.cos(tilt), np.sin(tilt), np.zeros_like(turn)
    rotation = np.array([[cr * ct, sr, cr * st], [-sr * ct, cr, -sr * st], [-st, zero, ct]]).transpose(2, 0, 1)   # (N, 3, 3)
    x = (x - origin[:, :, None, None, None]) * present[:, None, :, None, :]
    return np.einsum("nij,njtvm->nitvm", rotation, x, optimize=True).astype(np.float32)

# ---------------------------------------------------------------------------------------------------- synthetic motions
# Offset of each NTU joint from its parent in a standing body, metres; x to the body's left, y up, z from the front to the back.
_PARENT = [-1, 0, 20, 2, 20, 4, 5, 6, 20, 8, 9, 10, 0, 12, 13, 14, 0, 16, 17, 18, 1, 22, 7, 24, 11]
_ARM = [(.17, -.03, 0), (.04, -.26, 0), (.02, -.24, -.03), (0, -.08, -.01)]
_LEG = [(.09, -.04, 0), (.01, -.42, 0), (0, -.40, .01), (.01, -.06, -.12)]
_HAND = [(.02, -.05, 0), (-.03, -.03, -.02)]
_RIGHT = (-1, 1, 1)   # mirrors a left limb
_OFFSET = np.concatenate([[(0, 0, 0), (0, .25, 0), (0, .07, 0), (0, .14, -.01)], _ARM, np.multiply(_ARM, _RIGHT), _LEG,
                          np.multiply(_LEG, _RIGHT), [(0, .24, 0)], _HAND, np.multiply(_HAND, _RIGHT)])
# The joint angles that move: (joint, axis), axis 0 bends about x, 1 twists about y, 2 leans about z.
_ANGLES = [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (8, 0), (8, 1), (8, 2), (5, 0), (5, 1), (9, 0), (9, 1),
           (12, 0), (12, 2), (16, 0), (16, 2), (13, 0), (17, 0)]

def _rotations(angles):
    """Euler angles (..., 3) in radians → rotation matrices (..., 3, 3), R = R_z R_y R_x."""
    (cx, cy, cz), (sx, sy, sz) = np.moveaxis(np.cos(angles), -1, 0), np.moveaxis(np.sin(angles), -1, 0)
    rows = ((cz * cy, cz * sy * sx - sz * cx, cz * sy * cx + sz * sx), (sz * cy, sz * sy * sx + cz * cx, sz * sy * cx - cz * sx),
            (-sy, cy * sx, cy * cx))
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

    labels, subjects, _ = np.indices((len(text), performers, repeats)).reshape(3, -1)
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

# ---------------------------------------------------------------------------------------------------- encoder
class GraphConv(nn.Module):
    """Spatial graph convolution: y[n,c,t,w] = Σ_k Σ_v x[n,k,c,t,v] (A_k ∘ E_k)[v,w]. (methods.md section 2)"""

    def __init__(self, c_in, c_out, A):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out * len(A), 1)
        self.register_buffer("A", A, persistent=False)                    # (3, V, V)
        self.edge_importance = nn.Parameter(torch.ones_like(A))           # (3, V, V)

    def forward(self, x):                                                 # (N, C_in, T, V)
        N, _, T, V = x.shape
        x = self.conv(x).view(N, len(self.A), -1, T, V)                   # (N, 3, C_out, T, V)
        return torch.einsum("nkctv,kvw->nctw", x, self.A * self.edge_importance)

class Block(nn.Module):
    """One ST-GCN block: graph convolution over joints, 9-frame convolution over time, residual. (methods.md section 2)"""

    def __init__(self, c_in, c_out, A, stride=1, first=False):
        super().__init__()
        self.spatial = nn.Sequential(GraphConv(c_in, c_out, A), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))
        self.temporal = nn.Sequential(nn.Conv2d(c_out, c_out, (9, 1), (stride, 1), (4, 0)), nn.BatchNorm2d(c_out),
                                      nn.Dropout(0.0 if first else 0.5))
        self.has_residual = not first
        same_shape = c_in == c_out and stride == 1
        self.residual = nn.Identity() if first or same_shape else nn.Sequential(
            nn.Conv2d(c_in, c_out, 1, (stride, 1)), nn.BatchNorm2d(c_out))

    def forward(self, x):                                                 # (N, C_in, T, V)
        y = self.temporal(self.spatial(x))                                # (N, C_out, T/stride, V)
        return F.relu_(y + self.residual(x) if self.has_residual else y)

class STGCN(nn.Module):
    """ST-GCN, the small variant used for zero-shot work: skeletons (N, 3, T, V, M) in metres → features (N, 256), or logits
    (N, classes) by `classify`, for training with cross-entropy on seen classes. The mean over persons includes an absent, all-zero
    person: the field's convention. Source: Yan et al., AAAI 2018; methods.md section 2."""
    BLOCKS = ((16, 1), (16, 1), (16, 1), (16, 1), (32, 2), (32, 1), (32, 1), (64, 2), (64, 1), (FEATURES, 1))

    def __init__(self, graph, num_joints, num_classes):
        super().__init__()
        A = adjacency(graph.edges, num_joints, graph.centre)              # (3, V, V)
        self.input_norm = nn.BatchNorm1d(num_joints * 3)
        blocks, c_in = [], 3
        for c_out, stride in self.BLOCKS:
            blocks.append(Block(c_in, c_out, A, stride, first=not blocks))
            c_in = c_out
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(FEATURES, num_classes)

    def forward(self, x):                                                 # (N, 3, T, V, M)
        N, C, T, V, M = x.shape
        x = x.permute(0, 4, 3, 1, 2).reshape(N * M, V * C, T)
        x = self.input_norm(x).view(N * M, V, C, T).permute(0, 2, 3, 1)   # (N·M, 3, T, V)
        x = self.blocks(x.contiguous())                                   # (N·M, 256, T/4, V)
        return x.mean((2, 3)).view(N, M, -1).mean(1)                      # (N, 256)

    def classify(self, x):                                                # (N, 3, T, V, M) → (N, classes)
        return self.classifier(self(x))

@torch.no_grad()
def settle_batch_norm(encoder, x, train):
    """Measure every BatchNorm's mean and variance again on the training samples, with dropout off: dropout changes the variance that
    the next BatchNorm sees in training, so training's statistics do not fit inference. (README, "Deviations")"""
    encoder.eval()
    for module in encoder.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None                                        # a plain average over the batches
            module.train()
    batches = -(-len(train) // 32)
    for i in range(batches):                                              # strided: rows may lie in the order of the classes
        encoder(x[train[i::batches]])
    encoder.eval()

# ---------------------------------------------------------------------------------------------------- training
WARM_UP = 0.15            # of all steps, where there are epochs: 15 of DVTA's 100
STEPS_WARM_UP = 100       # steps, where only steps are counted: TDSM's
CHECKPOINT_SECONDS = 60

def fit(name, model, losses, optimizer, rows, settings, seed, checkpoint, test=None):
    """Minimise losses(batch of rows)["loss"] for some epochs or steps, with warm-up then cosine to 0.

    Rows come in a new random order each epoch, without the last, smaller batch. A line is printed after each epoch, or each 20th of
    the steps, and `test()` gives an accuracy then. The file `checkpoint` is written each minute, on Ctrl-C and at the end; where
    there is one, training goes on from it, to the same weights bit by bit on a CPU as without the break.
    → {"seconds": of the steps, "best": {"acc", "epoch"} of the tests or None}. Raises Diverged.
    """
    batch_size = min(settings["batch_size"], len(rows))
    per_epoch = len(rows) // batch_size
    if "epochs" in settings:
        label, steps, unit, every = f"{name} epoch", settings["epochs"] * per_epoch, per_epoch, per_epoch
    else:
        label, steps, unit, every = f"{name} step", settings["steps"], 1, max(1, settings["steps"] // 20)
    warm_up = WARM_UP * steps if "epochs" in settings else min(STEPS_WARM_UP, steps // 2)
    batches, done, log = random_batches(rows, batch_size, torch.Generator().manual_seed(seed)), 0, {"seconds": 0.0, "best": None}
    if checkpoint.exists():
        saved = load(checkpoint)
        done, log = saved["step"], saved["log"]
        model.load_state_dict(saved["model"])
        print(f"{label} {done // unit}/{steps // unit}: from {checkpoint}", flush=True)
    if 0 < done < steps:
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["random"])
        if rows.is_cuda:
            torch.cuda.set_rng_state(saved["random_cuda"], rows.device)
        for _ in range(done):                                             # the order of the data goes on too
            next(batches)
        del saved
    prepare_folder(checkpoint.parent)
    sums, since, start, saved_at, interrupted = 0, 0, time.perf_counter(), time.perf_counter(), []
    handler = signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))                   # Ctrl-C waits, lest it tear a step
    try:
        model.train()
        for step in range(done + 1, steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = settings["lr"] * warm_up_cosine(step - 1, warm_up, steps)
            values = losses(next(batches))
            optimizer.zero_grad(set_to_none=True)
            values["loss"].backward()
            optimizer.step()
            sums, since = sums + torch.stack([value.detach() for value in values.values()]), since + 1
            if step % every == 0 or step == steps:
                means = dict(zip(values, (sums / since).tolist()))        # waits for the device
                log["seconds"] += time.perf_counter() - start
                if not math.isfinite(means["loss"]):
                    raise Diverged(f"{label} {step // unit}: the loss is no longer finite; lower the learning rate (--lr)")
                rate, text = step / log["seconds"], "  ".join(f"{key} {value:.4f}" for key, value in means.items())
                print(f"{label} {step // unit}/{steps // unit}  {text}  {rate:.3g} steps/s  {log['seconds']:.1f} s, "
                      f"{(steps - step) / rate:.0f} s left", flush=True)
                model.eval()
                if test:
                    log["best"] = max(log["best"] or {"acc": -1.0}, {"acc": test(), "epoch": step / per_epoch}, key=lambda f: f["acc"])
                model.train()
                sums, since, start = 0, 0, time.perf_counter()
            if step == steps or interrupted or time.perf_counter() - saved_at > CHECKPOINT_SECONDS:
                log["seconds"] += time.perf_counter() - start
                state = {"step": step, "log": log, "model": model.state_dict()}
                if step < steps:
                    state |= {"optimizer": optimizer.state_dict(), "random": torch.get_rng_state(),
                              "random_cuda": torch.cuda.get_rng_state(rows.device) if rows.is_cuda else None}
                save(checkpoint, lambda f: torch.save(state, f))
                start = saved_at = time.perf_counter()
            if interrupted:
                raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGINT, handler)
    model.eval()
    return log

def random_batches(rows, batch_size, generator):
    """Batches of rows without end: epoch after epoch in new random orders, each without its last, smaller batch."""
    while True:
        order = torch.randperm(len(rows), generator=generator).to(rows.device)
        yield from rows[order].split(batch_size)[:len(rows) // batch_size]

def warm_up_cosine(step, warm_up, steps):
    """The learning rate's factor at step 0.. of `steps`: linear warm-up, then half a cosine to 0."""
    return (step + 1) / (warm_up + 1) if step < warm_up else 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))
