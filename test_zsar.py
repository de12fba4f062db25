"""Every test: `pytest test_zsar.py`. With ZSAR_DATA=path/to/kinect28 the real-data tests run too."""
import contextlib
import csv
import dataclasses
import fnmatch
import importlib
import inspect
import io
import itertools
import json
import math
import multiprocessing.forkserver
import os
import pickle
import re
import runpy
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
import urllib.error
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.optimizer import register_optimizer_step_post_hook

import alignment
import data
import diffusion
import train
import zsar
from alignment import DVTA, MetricHead
from diffusion import TDSM, CrossDiT

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "skeletons"))
kinect81, prepare = map(importlib.import_module, ("kinect81", "prepare"))


# --------------------------------------------------------------------------------------- fixtures and helpers
@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A dataset folder of synthetic skeletons: 12 classes, 4 performers, 2 repeats, 4 frames, few tokens."""
    folder = tmp_path_factory.mktemp("data") / "tiny"
    folder.mkdir()
    label, description = (prompt[:12] for prompt in data.bundled_text("ntu60"))
    skeletons, labels, subjects = data.synthetic((label[:, 0] + description[:, 0]) / 2, 4, 2, 16)
    arrays = {"skeletons": skeletons[:, :, ::4], "labels": labels, "subjects": subjects,
              "text_label": label[:, :3], "text_description": description[:, :4]}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    (folder / "classes.txt").write_text("\n".join(data.bundled_classes("ntu60")[:12]) + "\n")
    splits = {"9_3": {"unseen": [1, 5, 8], "val": [2, 3], "test_subjects": [2, 4]},
              "10_2": {"unseen": [1, 5], "test_subjects": [2, 4]},
              "9_3_val5": {"unseen": [1, 5, 8], "val": [2, 3, 6, 9, 11], "test_subjects": [2, 4]}}
    (folder / "splits.json").write_text(json.dumps(splits))
    return folder


@pytest.fixture
def light_folder(tiny_folder, tmp_path):
    """A copy of the tiny folder that tests may spoil, with random ready features in place of skeletons."""
    folder = tmp_path / "mine"
    shutil.copytree(tiny_folder, folder, ignore=lambda *_: ["skeletons.npy"])
    np.save(folder / "features.npy", np.random.default_rng(0).random((96, 256), dtype=np.float32))
    return folder


def run_main(folder, out, *options, method="dvta", split="9_3"):
    """Train in this process with the least of everything; → result.json and the weights."""
    train.main(least(folder, out, *options, "--force", method=method, split=split))
    return result_of(out), weights_of(out)


def least(folder, out, *options, method="dvta", split="9_3"):
    sizes = {"ridge": [], "dvta": ["--epochs", "2"],
             "tdsm": "--steps 4 --batch-size 16 --set width=16 depth=2 heads=2".split()}
    command = ["--method", method, "--split", split, "--data", str(folder), "--out", str(out)]
    return command + ["--device", "cpu", "--encoder-epochs", "2", *sizes[method], *map(str, options)]


def result_of(run):
    return json.loads((run / "result.json").read_text())


def figures_of(run):
    """The figures of a run's method, of its folder or its result."""
    result = run if isinstance(run, dict) else result_of(run)
    return result["figures"][result["method"]]


def without_times(result):
    """A result without what differs from run to run: times, and where the encoder came from."""
    encoder = result["encoder"] | {"cached": None, "file": None}
    return result | {"seconds": None, "command": None, "encoder": encoder}


def weights_of(run):
    return torch.load(run / "model.pt", weights_only=True)["state"]


def assert_same_weights(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def contents_of(folder):
    """The bytes of a folder's files, at any depth, and False for folders, by path."""
    return {str(path.relative_to(folder)): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


# each of these returns a function that changes a folder
def spoil(name, change):
    return lambda folder: np.save(folder / name, change(np.load(folder / name)))


def write(name, content):
    content = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(content)


def remove(name):
    return lambda folder: (folder / name).unlink()


def save(name, array):
    return lambda folder: np.save(folder / name, array)


def with_value(index, value):
    """→ a function that sets part of an array, for `spoil`."""
    def change(array):
        array[index] = value
        return array
    return change


def person(frames, motion, seed=0):
    """A person (3, frames, 25) who stands upright, torso 0.5 m; `motion`: how far each joint moves."""
    rng = np.random.default_rng(seed)
    pose = rng.uniform(-0.2, 0.2, (3, 1, 25)) + np.array([0, 1, 3])[:, None, None]
    pose[1, 0] = np.linspace(0.2, 1.8, 25)
    pose[1, 0, [0, 4, 8]] = 1, 1.5, 1.5                                   # spine base and shoulders
    pose[0, 0, [4, 8]] = -0.2, 0.2                                        # they face the camera
    pose[:, 0, 1] = (pose[:, 0, 0] + pose[:, 0, [4, 8]].mean(1)) / 2      # the spine's middle
    turns = np.linspace(0, 2 * np.pi, frames)[:, None] + rng.uniform(0, 6, 25)          # (frames, 25)
    return pose + motion * np.stack([np.sin(turns), np.cos(turns), np.sin(2 * turns)])


def write_skeleton(path, x):
    """Write x (3, F, V, M) as an NTU .skeleton file; a person all zero in a frame is absent there."""
    after_position = "277.4 191.8 1036.3 519.2 -0.2 0.03 0.97 -0.06 2"
    lines = [str(x.shape[1])]
    for frame in x.transpose(1, 3, 2, 0):                                 # (M, V, 3)
        present = [m for m, body in enumerate(frame) if body.any()]
        lines.append(str(len(present)))
        for m in present:
            lines += [f"{72057594037931101 + m} 0 1 0 1 1 0 -0.06 -0.27 2", str(x.shape[2])]
            lines += [" ".join(repr(float(v)) for v in joint) + f" {after_position}" for joint in frame[m]]
    path.write_text("\n".join(lines) + "\n")


def seeded(seed):
    """Seed the random draws of a block; the caller's random state is restored afterwards."""
    return train.seeded(seed, torch.device("cpu"))


def random_text(num_classes=5, width=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(num_classes, 3, width, generator=g) for _ in range(2)]


# -------------------------------------------------------------------- zsar.py: joint graphs, the common frame
def test_adjacency_of_a_chain_by_hand():
    # 0 - 1 - 2 - 3 with centre 1: hop distances 1 0 1 2; column sums with self-loops 2 3 3 2
    A = zsar.adjacency([(0, 1), (1, 2), (2, 3)], 4, centre=1)
    h, t = 1 / 2, 1 / 3
    self_loops = [[h, 0, 0, 0], [0, t, 0, 0], [0, 0, t, 0], [0, 0, 0, h]]
    no_nearer = [[0, t, 0, 0], [0, 0, 0, 0], [0, t, 0, 0], [0, 0, t, 0]]      # 0→1, 2→1, 3→2
    nearer = [[0, 0, 0, 0], [h, 0, t, 0], [0, 0, 0, h], [0, 0, 0, 0]]         # 1→0, 1→2, 2→3
    torch.testing.assert_close(A, torch.tensor([self_loops, no_nearer, nearer]))


@pytest.mark.parametrize("num_joints", zsar.GRAPHS)
def test_every_graph_is_one_tree(num_joints):
    graph = zsar.GRAPHS[num_joints]
    is_near = zsar.adjacency(graph.edges, num_joints, graph.centre).sum(0) > 0
    assert len(graph.edges) == num_joints - 1
    assert (torch.linalg.matrix_power(is_near.double(), num_joints) > 0).all()


def test_ntu_joint_tree():
    pairs = ("1-2 2-21 3-21 4-3 5-21 6-5 7-6 8-7 9-21 10-9 11-10 12-11 13-1 14-13 15-14 16-15 17-1 18-17 "
             "19-18 20-19 22-23 23-8 24-25 25-12")
    from_zero = [tuple(int(j) - 1 for j in pair.split("-")) for pair in pairs.split()]
    assert list(zsar.NTU25.edges) == from_zero


@pytest.mark.parametrize("num_joints", zsar.GRAPHS)
def test_the_common_frame_against_the_plain_formula(num_joints):
    x, graph = np.random.default_rng(3).normal(size=(4, 3, 5, num_joints, 2)), zsar.GRAPHS[num_joints]
    x[0, ..., 1] = 0                                                      # the second person is absent
    x[1, :, :2, :, 0] = 0                                                 # the first one comes later
    left, right = graph.shoulders
    for before, after in zip(x, zsar.to_common_frame(x, graph), strict=True):           # (3, T, V, M)
        present = before.any((0, 2))                                      # (T, M)
        pose = before[:, present[:, 0].argmax(), :, 0]                    # (3, V)
        shoulders = pose[:, left] - pose[:, right]
        forward = np.cross(shoulders, [0, 1, 0])                          # horizontal
        axes = np.stack([shoulders, np.cross(forward, shoulders), forward])
        axes /= np.linalg.norm(axes, axis=1, keepdims=True)
        moved = before - pose[:, list(graph.root)].mean(1)[:, None, None, None]
        expected = np.einsum("ij,jtvm->itvm", axes, moved) * present[:, None]
        np.testing.assert_allclose(after, expected, atol=1e-5)


@pytest.mark.parametrize("num_joints, persons", [(25, 2), (20, 1), (17, 3), (18, 2)])
def test_encoder_shapes(num_joints, persons):
    stgcn = zsar.STGCN(zsar.GRAPHS[num_joints], num_joints, num_classes=7)
    shiftgcn = zsar.ShiftGCN(num_joints, persons, num_classes=7)
    x = torch.randn(2, 3, 13, num_joints, persons)
    for encoder in (stgcn, shiftgcn):
        assert encoder(x).shape == (2, 256) and encoder.classify(x).shape == (2, 7)
    convolutions, units = [block.temporal[0] for block in stgcn.blocks], shiftgcn.units
    strides = [1, 1, 1, 1, 2, 1, 1, 2, 1, 1]
    assert [conv.stride[0] for conv in convolutions] == strides
    assert [conv.out_channels for conv in convolutions] == [16, 16, 16, 16, 32, 32, 32, 64, 64, 256]
    assert [block.temporal[2].p for block in stgcn.blocks] == [0.0] + [0.5] * 9
    assert [unit.spatial.weight.shape[1] for unit in units] == [64] * 4 + [128] * 3 + [256] * 3
    assert [unit.temporal[4].stride for unit in units] == strides
    assert all(unit.temporal[1].delta.abs().max() <= 1 for unit in units)
    one = x[..., :1]                                                      # a missing person counts
    nobody = torch.zeros_like(one)
    both = stgcn.eval()(torch.cat([one, nobody], -1))
    torch.testing.assert_close(both, (stgcn(one) + stgcn(nobody)) / 2)


# --------------------------------------------------------------------------------------- zsar.py: the encoder
def test_graph_convolution_against_loops():
    A = zsar.adjacency([(0, 1), (1, 2), (2, 3)], 4, centre=1)
    conv = zsar.GraphConv(2, 3, A).double()
    conv.edge_importance.data = torch.rand(3, 4, 4, dtype=torch.float64)
    x = torch.randn(2, 2, 5, 4, dtype=torch.float64)
    weight, bias = conv.conv.weight.view(3, 3, 2), conv.conv.bias.view(3, 3)
    y = torch.zeros(2, 3, 5, 4, dtype=torch.float64)
    for n, c, t, w in itertools.product(range(2), range(3), range(5), range(4)):
        for k, v in itertools.product(range(3), range(4)):
            message = weight[k, c] @ x[n, :, t, v] + bias[k, c]
            y[n, c, t, w] += message * A[k, v, w] * conv.edge_importance[k, v, w]
    torch.testing.assert_close(conv(x), y)


def test_first_block_has_no_residual():
    A, x = zsar.adjacency(zsar.NTU25.edges, 25, 20), torch.rand(25, 4, 6)
    for first in (True, False):
        block = zsar.STGCNBlock(4, 4, A, first=first).eval()              # (N, C, T, V)
        unit = zsar.ShiftUnit(4, 4, 25, first=first).eval()               # (B·V, C, T)
        block.temporal[1].weight.data.zero_()                             # only the residual is left
        unit.temporal[5].weight.data.zero_()
        image = x.permute(1, 2, 0)[None]
        torch.testing.assert_close(block(image), 0 * image if first else image)
        torch.testing.assert_close(unit(x), 0 * x if first else x)


def plain_temporal_shift(x, delta, stride):
    """Shift-GCN's temporal shift of x (B·V, C, T), by loops."""
    BV, C, T = x.shape
    y = torch.zeros(BV, C, -(-T // stride), dtype=x.dtype)
    for c, h in itertools.product(range(C), range(y.shape[2])):
        at = stride * h + delta[c] + (0.5 if stride == 2 else 0.0)
        before = math.floor(at.item())
        for frame, weight in ((before, before + 1 - at), (before + 1, at - before)):
            if 0 <= frame < T:
                y[:, c, h] += weight * x[:, c, frame]
    return y


@pytest.mark.parametrize("stride, frames", [(1, 6), (2, 6), (2, 7), (1, 1), (2, 1)])
def test_temporal_shift_against_loops_in_float64(stride, frames):
    shift = zsar.TemporalShift(5, stride).double()
    shift.delta.data = torch.tensor([-0.7, 0.0, 0.4, 2.6, -9.3], dtype=torch.float64)
    x = torch.randn(3, 5, frames, dtype=torch.float64, requires_grad=True)
    y, plain = shift(x), plain_temporal_shift(x, shift.delta, stride)
    torch.testing.assert_close(y, plain)
    weight = torch.randn_like(y)
    of_x, of_delta = torch.autograd.grad((y * weight).sum(), [x, shift.delta])
    plain_of_x, plain_of_delta = torch.autograd.grad((plain * weight).sum(), [x, shift.delta])
    torch.testing.assert_close(of_x, plain_of_x)
    assert torch.equal(of_delta, 0.01 * plain_of_delta.sign())            # 0 for the last: it reads outside


def test_spatial_shift_against_loops_in_float64():
    V, C, C_out, T, B = 5, 7, 6, 2, 3                                     # more channels than joints
    shift = zsar.SpatialShift(C, C_out, V).double()
    shift.mask.data.normal_()
    shift.bias.data.normal_()
    x = torch.randn(B, V, C, T, dtype=torch.float64)
    linear = torch.zeros(B, V, C_out, T, dtype=torch.float64)
    for v, c_out in itertools.product(range(V), range(C_out)):
        linear[:, v, c_out] += shift.bias[0, 0, c_out]
        for c in range(C):
            read = x[:, (v + c) % V, c] * (torch.tanh(shift.mask[0, v, c]) + 1)
            linear[:, v, c_out] += read * shift.weight[c, c_out]
    y = torch.zeros_like(linear)
    for v, c_out in itertools.product(range(V), range(C_out)):
        channel = linear[:, (v - c_out) % V, c_out]                       # each its own BatchNorm
        y[:, v, c_out] = (channel - channel.mean()) / (channel.var(correction=0) + 1e-5).sqrt()
    convolution, norm = shift.residual
    straight = torch.einsum("bvct,dc->bvdt", x, convolution.weight[:, :, 0]) + convolution.bias[:, None]
    mean, var = straight.mean((0, 1, 3)), straight.var((0, 1, 3), correction=0)
    y = y + (straight - mean[:, None]) / (var[:, None] + norm.eps).sqrt()
    torch.testing.assert_close(shift(x.view(B * V, C, T)), y.view(B * V, C_out, T).clamp(min=0))
    same = zsar.SpatialShift(C, C, V).double().eval()                  # no change of channels: plus the input
    same.weight.data.zero_()
    torch.testing.assert_close(same(x.view(B * V, C, T)), x.view(B * V, C, T).clamp(min=0))


def test_shiftgcn_norms_all_joints_of_all_persons_and_means_over_persons():
    encoder, x = zsar.ShiftGCN(5, 2, 3), torch.randn(4, 3, 6, 5, 2) * 3 + 1
    encoder.classify(x).sum().backward()
    channels = x.permute(0, 4, 3, 1, 2).reshape(4, 30, 6)                 # person, joint, coordinate
    torch.testing.assert_close(encoder.input_norm.running_mean, 0.1 * channels.mean((0, 2)))
    encoder.eval()
    features = []
    for m in range(2):
        person = encoder.input_norm(channels).view(4, 2, 5, 3, 6)[:, m].reshape(20, 3, 6)
        features.append(encoder.units(person).mean(2).view(4, 5, -1).mean(1))
    torch.testing.assert_close(encoder(x), sum(features) / 2)


def test_a_published_shiftgcn_checkpoint_is_mapped_by_renaming():
    """The table in the docstring names every parameter and statistic, each once."""
    table = [line.split() for line in zsar.ShiftGCN.__doc__.splitlines() if line.startswith(" " * 8)]
    published_name = {}
    for (published, ours), i, k in itertools.product(table, range(1, 11), range(2)):
        published_name[ours.format(j=i - 1, k=k)] = published.format(i=i, k=k)
    assert len(set(published_name.values())) == len(published_name)
    for name in zsar.ShiftGCN(25, 2, 60).state_dict():
        parts = [ours for ours in published_name if name == ours or name.startswith(f"{ours}.")]
        assert len(parts) == 1, name


def test_recalibrated_batch_norm_measures_the_training_samples():
    encoder, rows = zsar.STGCN(zsar.NTU25, 25, 3), torch.arange(0, 96, 2)
    x = torch.randn(96, 3, 8, 25, 1) * 2 + 5
    x[48:] += 9                                                           # two classes, one after the other
    zsar.recalibrate_batch_norm(encoder, x, rows)
    norm, batches = encoder.input_norm, [x[rows[i::2]] for i in range(2)]             # both with both classes
    values = [batch.permute(0, 4, 3, 1, 2).reshape(24, 75, 8) for batch in batches]
    torch.testing.assert_close(norm.running_mean, sum(batch.mean((0, 2)) for batch in values) / 2)
    torch.testing.assert_close(norm.running_var, sum(batch.var((0, 2)) for batch in values) / 2)
    last = encoder.blocks[9].temporal[1]
    before = last.running_var.clone()
    zsar.recalibrate_batch_norm(encoder, x, rows)                         # without dropout nothing is random
    assert torch.equal(last.running_var, before) and not encoder.training


def test_augmentation_turns_scales_crops_and_shakes():
    pose, frames = torch.randn(200, 3, 25, 1, generator=torch.Generator().manual_seed(0)), torch.arange(9)
    still = pose[:, :, None].expand(-1, -1, 9, -1, -1)
    with seeded(0):
        moved = zsar.augmented(still)
        assert not torch.equal(zsar.augmented(still), moved)              # other draws each time
    mean = moved.mean(2)                                                 # (200, 3, 25, 1): noise averages out
    size = (mean[:, 1] * pose[:, 1]).sum((1, 2)) / pose[:, 1].square().sum((1, 2))  # a turn leaves the height
    assert 0.89 < size.min() < 0.92 and 1.08 < size.max() < 1.11
    torch.testing.assert_close(mean[:, 1], size[:, None, None] * pose[:, 1], atol=0.03, rtol=0)
    before, after = (torch.complex(xyz[:, 2], xyz[:, 0]) for xyz in (pose, mean))    # from above
    turn = (after * before.conj()).sum((1, 2)).angle()
    assert -0.51 < turn.min() < -0.45 and 0.45 < turn.max() < 0.51
    back = torch.exp(-1j * turn)[:, None, None] * after / size[:, None, None]
    torch.testing.assert_close(back, before, atol=0.04, rtol=0)
    assert 0.005 < (moved - mean[:, :, None]).std() < 0.012               # 1 cm, less where frames are mixed
    clock = still * 0 + frames[:, None, None]                             # each number is its frame's
    time = zsar._resampled_part(clock, torch.full((200,), 0.1), torch.full((200,), 0.75))[:, 0, :, 0, 0]
    expected = np.interp(0.1 * 8 + 0.75 * np.arange(9), frames, frames)
    np.testing.assert_allclose(time, np.tile(expected, (200, 1)), atol=1e-5)
    x = torch.randn(6, 3, 9, 25, 2)
    x[:3, ..., 1] = 0                                                     # absent persons stay absent
    augmented = zsar.augmented(x)
    assert not augmented[:3, ..., 1].any() and augmented[3:].all()
    assert zsar.augmented(x[:, :, :1]).shape == (6, 3, 1, 25, 2)          # a single frame


# ------------------------------------------------------------------------------------ zsar.py: ridge, figures
def test_ridge_against_the_plain_formula():
    g, classes = torch.Generator().manual_seed(1), torch.tensor([4, 1])
    text, x, y = random_text(), torch.randn(40, 256, generator=g), torch.randint(0, 4, (40,), generator=g)
    x[:, 7] = 2.0                                                         # a constant channel
    ridge = zsar.Ridge(text, 256, penalty=3.0)
    ridge.fit_statistics(x, y.unique())
    ridge.fit(x, y)
    pooled = [prompt[:, 0].double() for prompt in text]
    P = np.concatenate([p / p.norm(dim=1, keepdim=True) for p in pooled], 1)
    std = x.numpy().std(0)
    X = (x.numpy() - x.numpy().mean(0)) / np.where(std > 0, std, 1)
    W = np.linalg.inv(X.T @ X + 3.0 * np.eye(256)) @ X.T @ (P[y] - P[y].mean(0))
    predicted, candidates = X @ W, P[classes] - P[y].mean(0)
    expected = [[p @ c / np.linalg.norm(p) / np.linalg.norm(c) for c in candidates] for p in predicted]
    np.testing.assert_allclose(ridge.scores(x, classes), expected, atol=1e-4)


def test_zsl_figures_by_hand():
    scores = torch.tensor([[9., 1, 1], [1, 9, 1], [9, 1, 1], [1, 9, 1]])
    figures = zsar.zsl_figures(scores, np.array([4, 4, 4, 7]), np.array([4, 7, 8]))       # class 8: no sample
    z2 = 1.96 ** 2                                                        # Wilson's: of 4 samples, 3 hits
    middle, half = (3 + z2 / 2) / (4 + z2), math.sqrt(z2 * (3 / 4 + z2 / 4)) / (4 + z2)
    assert figures.pop("ci95") == pytest.approx([middle - half, middle + half])
    assert figures == {"acc": 0.75, "per_class": (2 / 3 + 1) / 2, "chance": 1 / 3, "n": 4,
                       "class_acc": [2 / 3, 1.0, None], "confusion": [[2, 1, 0], [0, 1, 0], [0, 0, 0]]}


def test_gzsl_figures_by_hand():
    A = math.sqrt(3 / 2)                                                  # standardised, -1, 0, 1: -A, 0, A
    scores = torch.tensor([[1., 0, -1], [1, -1, 0], [0, -1, 1], [-1, 0, 1], [1, 0, -1]])
    case = scores, np.array([0, 1, 0, 2, 2]), np.array([0, 1, 2]), np.array([0, 1])       # class 2 is unseen
    # margins of samples of seen classes 2A, A (never right), -A; of the unseen class -A, 2A
    # H = 0.4 from -A to A and from A to 2A: the first
    assert zsar.best_gamma(*case) == pytest.approx(0, abs=1e-9)
    figures = zsar.gzsl_figures(*case, gamma=0.0)
    curve = np.round([[-A, 1 / 3, 0.5], [A, 1 / 3, 0.5], [2 * A, 0, 1]], 6)
    np.testing.assert_allclose(figures.pop("curve"), curve, atol=1e-9)
    ausuc = (2 / 3 + 1 / 3) / 2 * 0.5 + (1 / 3 + 0) / 2 * 0.5
    expected = {"seen": 1 / 3, "unseen": 0.5, "harmonic": 0.4, "gamma": 0, "ausuc": ausuc}
    assert figures == pytest.approx(expected)
    assert zsar.harmonic_mean(0.0, 0.0) == 0
    assert not zsar.z_scores(torch.full((1, 3), 5.0)).any()               # equal scores
    hopeless = torch.tensor([[1.0, 0, 9], [3, 4, 5]])                     # no γ is right about both samples
    assert math.isfinite(zsar.best_gamma(hopeless, np.array([0, 2]), *case[2:]))


def test_the_gzsl_curve_is_calibrated_stacking():
    rng = np.random.default_rng(0)
    raw, labels = rng.normal(size=(40, 7)), rng.integers(0, 7, 40)
    classes, seen = np.arange(7), np.array([0, 2, 3, 6])
    raw[np.arange(40), labels] += 1
    z = (raw - raw.mean(1, keepdims=True)) / raw.std(1, keepdims=True)
    of_seen = np.isin(labels, seen)
    for gamma in rng.normal(size=20):
        right = (z - gamma * np.isin(classes, seen)).argmax(1) == labels
        rescaled = torch.tensor(5 * raw + 3)                              # whatever the scale of the scores
        figures = zsar.gzsl_figures(rescaled, labels, classes, seen, gamma)
        assert figures["seen"] == pytest.approx(right[of_seen].mean())
        assert figures["unseen"] == pytest.approx(right[~of_seen].mean())
    best = zsar.best_gamma(torch.tensor(raw), labels, classes, seen)
    harmonic = [zsar.gzsl_figures(torch.tensor(raw), labels, classes, seen, gamma)["harmonic"]
                for gamma in (best, *rng.normal(size=200))]
    assert harmonic[0] == max(harmonic)


# ----------------------------------------------------------------------------------------------- alignment.py
def plain_linear(layer, z):
    return layer.weight @ z + layer.bias


def plain_dvta_pair(model, v, c, v_for_text):
    """DA + AA by loops, for one skeleton v (D,) and the text of class c, to which v_for_text attends."""
    P = model.prompts[c].double()                                         # (P, D)
    logits = torch.zeros(len(P), dtype=torch.float64)
    if model.sde.attend:
        logits = torch.stack([v_for_text @ p for p in P])
    a = logits.exp() / logits.exp().sum()
    t = plain_linear(model.sde.fc, sum(a[p] * P[p] for p in range(len(P))))
    da = v @ t / v.norm() / t.norm() / model.tau_da
    h = torch.cat([v.detach(), t.detach()])                               # AA's gradient does not reach DA
    for layer in (model.head.fc0, model.head.fc1):
        h = plain_linear(layer, h).clamp(min=0)
    z = plain_linear(model.head.fc2, h)[0]
    leaky_sigmoid = 1 / (1 + (-z).exp()) if z > 0 else 0.01 * (0.01 * z).exp()
    return (da if model.da else 0) + (leaky_sigmoid / model.tau_aa if model.aa else 0)


def plain_projector(model, x):
    p, x = model.projector, x / x.norm()
    h = (plain_linear(p.fc0, x) + x).clamp(min=0)
    for layer in (p.fc1, p.fc2):
        h = plain_linear(layer, h).clamp(min=0)
    return plain_linear(p.fc3, h)


def plain_dvta_loss(model, x, y):
    B, vs = len(x), [plain_projector(model, row) for row in x]
    Z = [[plain_dvta_pair(model, vs[i], y[j], vs[j]) for j in range(B)] for i in range(B)]
    loss = 0
    for rows in (Z, list(zip(*Z))):
        for i, row in enumerate(rows):
            p, q = (10 * (y == y[i]).double()).exp(), torch.stack(row).exp()
            p, q = p / p.sum(), q / q.sum()
            loss = loss + (p * (p.log() - q.log())).sum() / B
    return loss / 2


@pytest.mark.parametrize("switches", [{}, {"sde": False}, {"only": "da"}, {"only": "aa"}], ids=str)
def test_dvta_loss_gradients_and_scores_against_loops_in_float64(switches, monkeypatch):
    monkeypatch.setitem(alignment.PAIRS_AT_ONCE, "cpu", 8)                # several chunks
    with seeded(0):
        model = DVTA(random_text(), 256, **switches).double()
    model.head.fc2.weight.data *= 30                                      # so that z takes both signs
    g = torch.Generator().manual_seed(2)
    x, y = torch.randn(6, 256, generator=g, dtype=torch.float64), torch.tensor([0, 3, 0, 1, 2, 3])
    (loss, parts), plain = model(x, y), plain_dvta_loss(model, x, y)
    assert parts == {}
    torch.testing.assert_close(loss, plain)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
    torch.testing.assert_close(gradients, torch.autograd.grad(plain, parameters, materialize_grads=True))
    classes = torch.tensor([4, 0, 2])
    vs = [plain_projector(model, row).detach() for row in x]
    expected = torch.stack([torch.stack([plain_dvta_pair(model, v, c, v) for c in classes]) for v in vs])
    torch.testing.assert_close(model.scores(x, classes), expected.detach())


def test_leaky_sigmoid_on_both_sides():
    head, one = MetricHead(1), torch.zeros(1, 1, 2)
    head.fc2.weight.data.zero_()
    by_hand = {2.0: 1 / (1 + math.exp(-2)), -50.0: 0.01 * math.exp(-0.5), 1e5: 1.0, 0.0: 0.01}
    for z, expected in by_hand.items():
        head.fc2.bias.data.fill_(z)
        value = head(one, one)
        assert value.item() == pytest.approx(expected)
        assert torch.autograd.grad(value.sum(), head.fc2.bias)[0].isfinite().all()


# ----------------------------------------------------------------------------------------------- diffusion.py
def random_tdsm(kind=TDSM, text=None, x=None, seed=0, width=8, depth=3, heads=2, **switches):
    """A small TDSM whose every weight is random: adaLN and output weights are non-zero too."""
    with seeded(seed):
        x = 3 * torch.randn(30, 256) + 1 if x is None else x
        text = text or random_text()
        model = kind(text, 256, width=width, depth=depth, heads=heads, **switches)
        model.fit_statistics(x, torch.arange(4))
        for p in model.parameters():
            p.data += 0.2 * torch.randn_like(p)
    return model


def small_models(x, text=None, seed=0):
    """A fitted ridge, a DVTA and a TDSM for features x (N, F) and five classes, and two encoders."""
    text, seen, at_scale = text or random_text(), torch.arange(4), {"standardise": True, "centre": True}
    ridge, dvta = zsar.Ridge(text, 256, penalty=3.0), DVTA(text, 256, **at_scale)
    for model in (ridge, dvta):
        model.fit_statistics(x, seen)
    ridge.fit(x, torch.arange(len(x)) % 4)
    return {"ridge": ridge, "dvta": dvta, "tdsm": random_tdsm(text=text, x=x, seed=seed, depth=2, **at_scale),
            "stgcn": zsar.STGCN(zsar.NTU25, 25, 4), "shiftgcn": zsar.ShiftGCN(25, 2, 4)}


def plain_norm(x):
    return (x - x.mean()) / (x.var(correction=0) + 1e-6).sqrt()


def plain_mlp(layers, z):
    return plain_linear(layers[2], F.silu(plain_linear(layers[0], z)))


def plain_attention(queries, keys, values, heads):
    """softmax(QKᵀ/√d)V for one row, lists of (D,) vectors, by loops."""
    out = []
    for q in queries:
        parts = []
        for part in torch.arange(len(q)).view(heads, -1):                 # the channels of a head
            weights = torch.stack([q[part] @ k[part] / math.sqrt(len(part)) for k in keys]).exp()
            parts.append(sum(w * v[part] for w, v in zip(weights / weights.sum(), values)))
        out.append(torch.cat(parts))
    return out


def plain_update(stream, z, attended, modulation):
    """One row of a stream after its attention: the gated residual, then the gated MLP."""
    _, _, gate, shift, scale, mlp_gate = modulation
    z = z + gate * plain_linear(stream.out, attended)
    h = plain_linear(stream.mlp[0], plain_norm(z) * (1 + scale) + shift)
    gelu = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h ** 3)))
    return z + mlp_gate * plain_linear(stream.mlp[2], gelu)


def plain_denoiser(net, x_t, t, tokens, pooled):
    """The formulas for one row: x_t (256,), timestep t (), tokens (L, E) and pooled (E,) → (256,)."""
    D, heads = net.x_in.out_features, net.blocks[0].skeleton.heads
    waves = diffusion.timestep_embedding(t[None])[0].to(x_t.dtype)
    condition = F.silu(plain_mlp(net.time_mlp, waves) + plain_mlp(net.pooled_mlp, pooled))
    x = plain_linear(net.x_in, x_t)
    text = [plain_linear(net.text_in, row) + net.position[i] for i, row in enumerate(tokens)]
    for i, block in enumerate(net.blocks):
        last = i == len(net.blocks) - 1
        mx = plain_linear(block.skeleton.modulation.fc, condition).view(6, D)
        mt = plain_linear(block.text.modulation.fc, condition).view(-1, D)
        q, k, v = plain_linear(block.skeleton.qkv, plain_norm(x) * (1 + mx[1]) + mx[0]).view(3, D)
        projection = block.text.kv if last else block.text.qkv
        rows = [plain_linear(projection, plain_norm(row) * (1 + mt[1]) + mt[0]).view(-1, D) for row in text]
        queries = [q] if last else [q] + [row[0] for row in rows]
        keys, values = [k] + [row[-2] for row in rows], [v] + [row[-1] for row in rows]
        attended = plain_attention(queries, keys, values, heads)
        x = plain_update(block.skeleton, x, attended[0], mx)
        if not last:
            text = [plain_update(block.text, row, a, mt) for row, a in zip(text, attended[1:])]
    shift, scale = plain_linear(net.final_modulation.fc, condition).view(2, D)
    return plain_linear(net.x_out, plain_norm(x) * (1 + scale) + shift)


def plain_error(model, x, t, noise, c):
    """The mean squared error for one feature x (256,), noised to timestep t (), under the text of class c."""
    z, a = model.scale * (x - model.x_mean) / model.x_std, model.alpha_bar[t]
    targets = {"epsilon": noise, "sample": z, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * z}
    x_t = a.sqrt() * z + (1 - a).sqrt() * noise
    predicted = plain_denoiser(model.denoiser, x_t, t, model.tokens[c], model.pooled_vectors()[c])
    return ((predicted - targets[model.prediction]) ** 2).sum() / 256


class PlainCrossDiT(CrossDiT):
    """Without the savings: a whole last block, explicit attention, the text embedded for each row again."""

    def __init__(self, features, text_channels, num_tokens, width, depth, heads):
        super().__init__(features, text_channels, num_tokens, width, depth, heads)
        self.blocks[-1].text = diffusion.Stream(width, heads)

    def condition(self, t, text_of_condition, tokens, pooled):
        tokens, pooled = tokens[text_of_condition], pooled[text_of_condition]
        return super().condition(t, torch.arange(len(t)), tokens, pooled)

    def forward(self, x, condition):
        with sdpa_kernel(SDPBackend.MATH):                                # softmax(QKᵀ/√d)V in steps
            return super().forward(x, condition)


class PlainTDSM(TDSM):
    """TDSM on the plain denoiser, with a loop over classes and noises and a condition for each sample."""

    def __init__(self, text, feature_width, width, depth, heads, **settings):
        super().__init__(text, feature_width, width, depth, heads, **settings)
        self.denoiser = PlainCrossDiT(256, self.tokens.shape[2], self.tokens.shape[1], width, depth, heads)

    @torch.no_grad()
    def scores(self, x, classes):
        t, out = torch.full((len(x),), self.timestep), torch.zeros(len(x), len(classes), dtype=x.dtype)
        for (k, c), noise in itertools.product(enumerate(classes), self.noises):
            noisy, target = self.noised(self.standardised(x), noise, t)
            condition = self.denoiser.condition(t, c.expand(len(x)), self.tokens, self.pooled)
            out[:, k] -= (self.denoiser(noisy[:, None], condition)[:, 0] - target).square().mean(1)
        return out


def test_alpha_bar_by_hand():
    first, last = math.sqrt(0.00085), math.sqrt(0.012)                    # of β's roots, in 49 equal steps
    expected = np.cumprod([1 - (first + i * (last - first) / 49) ** 2 for i in range(50)])
    np.testing.assert_allclose(diffusion.noise_schedule(), expected, rtol=0, atol=1e-6)


def test_timestep_embedding_by_hand():
    angles = [3 * 10000 ** (-i / 128) for i in range(128)]
    waves = [math.cos(angle) for angle in angles] + [math.sin(angle) for angle in angles]
    embedding = diffusion.timestep_embedding(torch.tensor([3]))
    torch.testing.assert_close(embedding, torch.tensor([waves]), rtol=1e-6, atol=1e-7)


def test_denoiser_starts_at_zero_with_the_papers_initialisation():
    net = CrossDiT(256, 10, 5, width=48, depth=2, heads=4)
    condition = net.condition(torch.tensor([7]), torch.tensor([0]), torch.randn(1, 5, 10), torch.randn(1, 10))
    assert net(torch.randn(1, 4, 256), condition).abs().max() == 0
    adaln = [m.fc for m in net.modules() if isinstance(m, diffusion.Modulation)]
    assert len(adaln) == 5
    assert not any(layer.weight.any() for layer in [*adaln, net.x_out])
    assert not any(m.bias.any() for m in net.modules() if isinstance(m, torch.nn.Linear))
    keys_values = net.blocks[-1].text.kv.weight.abs().max()               # as thirds of a (D, 3D) projection
    assert 0.95 * math.sqrt(6 / (4 * 48)) < keys_values <= math.sqrt(6 / (4 * 48))
    bound = math.sqrt(6 / (48 + 192))
    assert 0.95 * bound < net.blocks[0].text.mlp[0].weight.abs().max() <= bound
    assert net.time_mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert net.position.std().item() == pytest.approx(0.02, rel=0.3)


def test_default_size_is_the_papers():
    papers = {"width": 768, "depth": 12, "heads": 12, "timestep": 25, "noises": 3, "triplet_weight": 1.0,
              "margin": 1.0, "prediction": "epsilon"}
    parameters = inspect.signature(TDSM).parameters
    assert {name: parameters[name].default for name in papers} == papers


def test_text_conditions():
    label, description = torch.randn(4, 1 + 2, 5), torch.randn(4, 1 + 6, 5)
    tokens, pooled = diffusion.text_conditions([label, description])
    padded = torch.cat([label[:, 1:], torch.zeros(4, 4, 5)], 1)
    assert torch.equal(tokens, torch.cat([padded, description[:, 1:]], 2))
    assert torch.equal(pooled, torch.cat([label[:, 0], description[:, 0]], 1))
    tokens, pooled = diffusion.text_conditions([label[:, :1], description[:, :1]])
    assert torch.equal(tokens, pooled[:, None])                           # pooled only: its own single token


@pytest.mark.parametrize("switches", [
    {"prediction": "epsilon", "depth": 1},
    {"prediction": "sample", "scale": 0.25, "triplet_weight": 2.0},
    {"prediction": "v_prediction", "centre": True},
], ids=str)
def test_triplet_loss_and_its_gradients_against_loops_in_float64(switches):
    model = random_tdsm(**switches).double()
    x, noise = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    y, wrong = torch.tensor([0, 1, 2, 3, 3]), torch.tensor([1, 1, 0, 3, 2])
    t, parameters = torch.tensor([0, 10, 25, 40, 49]), list(model.parameters())
    unit = 0.0625 if model.prediction == "sample" else 1                  # the variance of the target
    right, other = (torch.stack([plain_error(model, *row) for row in zip(x, t, noise, classes)])
                    for classes in (y, wrong))
    kept_by_some = (other - right)[y != wrong].mean().item() / unit
    for model.margin in (1.0, kept_by_some, -100.0 / unit):               # the last is kept by all
        loss = model.triplet_loss(x, y, wrong, t, noise)
        triplet = ((right - other + model.margin * unit).clamp(min=0) * (y != wrong)).mean()
        expected = right.mean() + model.triplet_weight * triplet, right.mean(), other.mean()
        torch.testing.assert_close(loss, expected)
        gradients = [torch.autograd.grad(e[0], parameters, retain_graph=True) for e in (loss, expected)]
        torch.testing.assert_close(*gradients)


def test_tdsm_scores_against_loops_over_classes_noises_and_samples(monkeypatch):
    model = random_tdsm(scale=0.25, centre=True).double()
    x, classes, t = torch.randn(5, 256, dtype=torch.float64), torch.tensor([4, 0, 2]), torch.tensor(25)
    expected = torch.zeros(5, 3, dtype=torch.float64)
    for (n, row), (k, c), noise in itertools.product(enumerate(x), enumerate(classes), model.noises):
        expected[n, k] -= plain_error(model, row, t, noise, c).detach()
    torch.testing.assert_close(model.scores(x, classes), expected)
    # whatever the batch, the other candidates, the memory
    torch.testing.assert_close(model.scores(x[3:4], classes[1:2]), expected[3:4, 1:2])
    for budget, samples in ((1, 1), (60_000, 4)):
        monkeypatch.setitem(diffusion.MEMORY_BUDGET, "cpu", budget)
        assert model.samples_per_chunk(3) == samples
        torch.testing.assert_close(model.scores(x, classes), expected)


def test_all_savings_against_the_plain_way():
    """A whole last block, explicit attention, no reuse over classes: the same loss, gradients and scores."""
    model, plain = random_tdsm().double(), random_tdsm(PlainTDSM).double()
    state, last = plain.state_dict(), "denoiser.blocks.2.text."
    for kind in ("weight", "bias"):
        state[f"{last}kv.{kind}"] = state[f"{last}qkv.{kind}"][8:]
        state[f"{last}modulation.fc.{kind}"] = state[f"{last}modulation.fc.{kind}"][:16]
    assert not model.load_state_dict(state, strict=False).missing_keys
    x, noise = torch.randn(2, 6, 256, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    y, wrong = torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([1, 1, 3, 0, 2, 0])
    t, results = torch.tensor([0, 9, 20, 30, 40, 49]), []
    for m in (model, plain):
        loss = m.triplet_loss(x, y, wrong, t, noise)[0]
        compared = [p for name, p in m.named_parameters() if ".2.text" not in name]     # not the idle weights
        results.append([loss, m.scores(x, torch.arange(5)), *torch.autograd.grad(loss, compared)])
    torch.testing.assert_close(*results)


def test_tdsm_condition_switches():
    x, text, other = torch.randn(3, 256), random_text(), random_text(seed=9)
    other_tokens = [torch.cat([a[:, :1], b[:, 1:]], 1) for a, b in zip(text, other)]
    other_pooled = [torch.cat([b[:, :1], a[:, 1:]], 1) for a, b in zip(text, other)]
    for conditions, sees in (("both", [True, True]), ("pooled", [False, True]), ("tokens", [True, False])):
        scores = [random_tdsm(text=prompts, conditions=conditions).scores(x, torch.arange(5))
                  for prompts in (text, other_tokens, other_pooled)]
        assert [not torch.equal(scores[0], changed) for changed in scores[1:]] == sees


def test_features_at_scale_against_the_plain_formulas():
    training = 5 * torch.randn(40, 256) + 3
    training[:, 7] = 2.0                                                  # constant in training,
    x = training.clone()
    x[:, 7] += 1e-3                                                       # at test it moves by little
    z = (x - training.mean(0)) / training.std(0, correction=0)
    z[:, 7] = 1e-3                                                        # and is not blown up
    torch.testing.assert_close(random_tdsm(x=training).standardised(x), z)
    torch.testing.assert_close(random_tdsm(x=training, scale=0.25).standardised(x), z / 4)
    assert torch.equal(random_tdsm(x=training, standardise=False).standardised(x), x)
    for standardise, expected in ((True, z), (False, x)):
        model = DVTA(random_text(), 256, standardise=standardise)
        model.fit_statistics(training, torch.arange(4))
        torch.testing.assert_close(model.unit_features(x), expected / expected.norm(dim=1, keepdim=True))


def test_text_at_scale_against_the_plain_formulas():
    of_length_1 = [F.normalize(prompt, dim=-1) * 1.003 for prompt in random_text()]   # stored in float16, say
    of_length_1[0][:, 2] = 0                                              # padding
    longer = [30 * prompt for prompt in of_length_1]                      # CLIP's: left as it is by TDSM
    small = {"width": 8, "depth": 1, "heads": 1, "unit_text": True}
    tdsm, of_clip = TDSM(of_length_1, 256, **small, centre=True), TDSM(longer, 256, **small)
    dvta, as_it_is = DVTA(longer, 256, centre=True), DVTA(longer, 256)
    for model in (tdsm, of_clip, dvta, as_it_is):
        model.fit_statistics(torch.zeros(1, 256), torch.tensor([0, 2, 3]))
    for p, prompt in enumerate(of_length_1):
        pooled = prompt[:, 0] / prompt[:, 0].norm(dim=-1, keepdim=True)
        centred = pooled - (pooled[0] + pooled[2] + pooled[3]) / 3
        expected = centred / centred.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(dvta.class_prompts(torch.tensor([4, 1]))[:, p], expected[[4, 1]])
        torch.testing.assert_close(as_it_is.class_prompts(torch.arange(5))[:, p], pooled)
        channels = slice(12 * p, 12 * p + 12)
        torch.testing.assert_close(tdsm.pooled_vectors()[:, channels], expected * math.sqrt(12))
        tokens = F.normalize(prompt[:, 1:], dim=-1) * math.sqrt(12)
        torch.testing.assert_close(tdsm.tokens[..., channels], tokens)
    assert torch.equal(of_clip.pooled_vectors(), torch.cat([prompt[:, 0] for prompt in longer], -1))
    assert torch.equal(of_clip.tokens, torch.cat([prompt[:, 1:] for prompt in longer], -1))


def test_statistics_are_kept_in_the_weights():
    """A trained model on the text of other classes, and no training data at hand, scores as before."""
    x, other = torch.randn(40, 256) + 1, random_text(seed=3)
    whole = [torch.cat(pair) for pair in zip(random_text(), other)]
    trained, rebuilt = small_models(x, whole), small_models(x[:1] * 0, other, seed=1)
    for name in ("ridge", "dvta", "tdsm"):
        rebuilt[name].load_state_dict(trained[name].state_dict())
        expected = trained[name].scores(x, torch.arange(5, 10))
        torch.testing.assert_close(rebuilt[name].scores(x, torch.arange(5)), expected)


def test_tdsms_forward_draws_a_batch_and_returns_its_errors():
    model, x, y = random_tdsm(), torch.randn(6, 256), torch.tensor([0, 1, 2, 3, 0, 1])
    with seeded(1):
        loss, parts = model(x, y)
    with seeded(1):
        t, wrong = torch.randint(50, (6,)), torch.randint(4, (6,))        # seen classes are 0 to 3
        expected, right, other = model.triplet_loss(x, y, wrong, t, torch.randn(6, 256))
    assert torch.equal(loss, expected)
    assert torch.equal(parts["e+"], right) and torch.equal(parts["e-"], other)
    assert not any(value.requires_grad for value in parts.values())


# -------------------------------------------------------------------------------- what CUDA needs, on a CPU
@pytest.fixture
def shallow_encoders(monkeypatch):
    monkeypatch.setattr(zsar.STGCN, "BLOCKS", ((8, 1), (zsar.FEATURES, 2)))
    monkeypatch.setattr(zsar.ShiftGCN, "UNITS", ((8, 1), (zsar.FEATURES, 2)))


@pytest.mark.parametrize("name", ["dvta", "tdsm", "stgcn", "shiftgcn", "ridge"])
def test_no_tensor_is_made_on_a_default_device(name, monkeypatch, shallow_encoders):
    """On "meta", where there are only shapes, one tensor of a CPU's would be refused."""
    monkeypatch.setitem(alignment.PAIRS_AT_ONCE, "meta", 8)
    monkeypatch.setitem(diffusion.MEMORY_BUDGET, "meta", 1 << 12)
    model, x = small_models(torch.randn(30, 256))[name].to("meta"), torch.ones(6, 256, device="meta")
    y, skeletons = torch.arange(6, device="meta") % 4, torch.ones(6, 3, 8, 25, 2, device="meta")
    if hasattr(model, "fit_statistics"):
        model.fit_statistics(x, y[:4])
    if name == "ridge":
        model.fit(x, y)
    elif name in ("dvta", "tdsm"):
        model(x, y)[0].backward()
    else:
        F.cross_entropy(model.classify(zsar.augmented(skeletons)), y).backward()
    if hasattr(model, "scores"):
        scores = model.scores(x, torch.arange(5, device="meta"))
        assert scores.is_meta and scores.shape == (6, 5)


@pytest.mark.parametrize("name", ["dvta", "tdsm", "stgcn", "shiftgcn"])
def test_a_compiled_training_step_is_the_plain_one(name, shallow_encoders):
    """In one graph, without a break: values and gradients."""
    torch.manual_seed(0)
    model = small_models(torch.randn(30, 256))[name]
    x, y = torch.randn(6, 256), torch.tensor([0, 1, 2, 3, 0, 1])
    step, batch = model, (x, y)
    if name == "tdsm":
        step, batch = model.triplet_loss, (x, y, y.flip(0), 9 * y, torch.randn(6, 256))
    elif name != "dvta":
        model.eval()                                                      # dropout would draw again
        step, batch = model.classify, (torch.randn(3, 3, 8, 25, 2),)
    compiled, results = torch.compile(step, fullgraph=True, backend="aot_eager"), []
    for run in (compiled, step):
        value = run(*batch)
        value = value[0] if name in ("dvta", "tdsm") else value.square().sum()
        results.append([value, *torch.autograd.grad(value, list(model.parameters()))])
    torch.testing.assert_close(*results)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["stgcn", "shiftgcn"])
def test_encoders_in_bfloat16(name):
    torch.manual_seed(0)
    model = small_models(torch.randn(30, 256))[name].eval()
    x = torch.randn(2, 3, 8, 25, 1 + (name == "shiftgcn"))
    whole = model.classify(x)
    with torch.autocast("cpu", torch.bfloat16):
        half = model.classify(x)
    assert half.dtype == torch.bfloat16
    half = half.float()
    assert F.cosine_similarity(half, whole).min() > 0.999
    half.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_tdsms_residual_streams_are_float32_under_autocast():
    """Linear layers give bfloat16; the streams between the blocks stay as they come."""
    model, streams = small_models(torch.randn(30, 256))["tdsm"], []
    for block in model.denoiser.blocks:
        block.register_forward_hook(lambda block, inputs, outputs: streams.extend([*inputs[:2], *outputs]))
    x, y = torch.randn(6, 256), torch.arange(6) % 4
    with seeded(0), torch.autocast("cpu", torch.bfloat16):
        half = model(x, y)[0]
        scores = model.scores(x, torch.arange(5))
    assert len(streams) == 2 * 2 * 4 and {stream.dtype for stream in streams} == {torch.float32}
    with seeded(0):
        torch.testing.assert_close(half, model(x, y)[0], rtol=0.02, atol=0.02)
    torch.testing.assert_close(scores, model.scores(x, torch.arange(5)), rtol=0.05, atol=0.05)


# ------------------------------------------------------------------------------- helpers of the tests of data
def bodies(count, graph=zsar.NTU25):
    """Skeletons (count, 3, 4, V, 1) of a random pose each; their torsos are upright and 0.5 m long."""
    x = np.random.default_rng(0).normal(size=(count, 3, 4, len(graph.edges) + 1, 1)).astype(np.float32)
    x[:, :, :, list(graph.root)] = 0
    x[:, :, :, list(graph.shoulders)] = np.array([0, 0.5, 0], np.float32)[:, None, None, None]
    return x


def save_bodies(change=lambda x: x, graph=zsar.NTU25):
    """→ a function that adds changed skeletons of real size to a folder, where they outrank features."""
    return save("skeletons.npy", change(bodies(96, graph)))


def split_file(**entry):
    """→ a function that overwrites the split, with these entries changed."""
    return write("splits.json", json.dumps({"9_3": {"unseen": [1, 5, 8], "test_subjects": [2, 4]} | entry}))


def assert_refused(message, *arguments):
    """read_data must raise an InputError that matches a pattern."""
    with pytest.raises(data.InputError, match=message):
        data.read_data(*arguments)


@contextlib.contextmanager
def ends_in_one_line(capsys, message, status=2, silent=True):
    """The block must exit with that status and one line, beside notes, which has the message's parts, divided
    by …; silent: it prints nothing else.
    """
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        yield
    printed = capsys.readouterr()
    errors = [line for line in printed.err.splitlines() if not line.startswith("note: ")]
    assert stop.value.code == status and len(errors) == 1 and not (silent and printed.out), printed
    assert all(part in errors[0] for part in message.split("…")), errors


def predictions_of(run, folder, *options):
    """The rows of predictions.csv of a run for the samples at a path."""
    train.main(["predict", "--run", str(run), "--data", str(folder), "--device", "cpu", "--force", *options])
    with open(run / "predictions.csv", newline="") as f:
        header, *rows = csv.reader(f)
    assert header == ["sample", "class", "score", "margin", "top5"]
    return rows


# ------------------------------------------------------------------------- data.py: reading and writing files
def test_the_fingerprint_is_of_the_values(light_folder, tmp_path):
    a, hashes = np.arange(12.0).reshape(4, 3), set()
    np.save(tmp_path / "a.npy", a)
    memory_mapped, column_major = np.load(tmp_path / "a.npy", mmap_mode="r"), a.T.copy().T
    assert data.fingerprint(a) == data.fingerprint(memory_mapped) == data.fingerprint(column_major)
    others = [a.reshape(3, 4), a.astype(np.float32), a[::-1], a[:3]]
    assert len({data.fingerprint(b) for b in (a, *others)}) == 5
    for change in (spoil("features.npy", np.copy), spoil("features.npy", with_value((0, 0), 2)),
                   spoil("text_description.npy", with_value((3, 2, 1), 2)),
                   spoil("labels.npy", with_value(0, 2))):
        change(light_folder)
        hashes.add(run_main(light_folder, tmp_path / "run", method="ridge")[0]["data_sha256"])
    assert len(hashes) == 4


def test_damaged_and_foreign_tensors_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, error = tmp_path / "x.pt", "x.pt: cannot be read .{}[^\n]*; remove it$"
    for value, reason in (({"a": Evil(), "b": 1}, ""), (7, ""), ({"a": 1}, "it lacks b;"),
                          ([1], "it lacks a, b;")):
        torch.save(value, path)
        with pytest.raises(data.InputError, match=error.format(reason)):
            data.read_tensors(path, "ab")
    assert not (tmp_path / "evil").exists()
    torch.save({"a": torch.arange(500.0), "b": 1}, path)
    assert data.read_tensors(path, "ab")["a"][499] == 499
    for size in (1500, 100, 0):
        os.truncate(path, size)
        with pytest.raises(data.InputError, match=error.format("")):
            data.read_tensors(path, "ab")


@pytest.mark.parametrize("write_half", [lambda f: f.write(b"x" * 9999),
                                        lambda f: torch.save(torch.ones(9999), f)])
def test_a_failed_write_is_one_line_and_leaves_the_old_file_and_no_part(write_half, tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")
    (tmp_path / f"result.json.{os.getpid()}.part").symlink_to("/dev/full")      # as on a full disk
    with pytest.raises(data.InputError, match=r"result.json: cannot be written \(No space left on device\)"):
        data.write_file(path, write_half)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["result.json"]
    with pytest.raises(data.InputError, match=r"json/a: cannot be written \(Not a directory\); .*--out"):
        data.write_file(path / "a", write_half)
    with pytest.raises(data.InputError, match="result.json/run: cannot be made .Not a directory.; choose"):
        data.make_folder(path / "run")


@pytest.mark.parametrize("dtype", [">f4", ">f8", "<f2", np.longdouble])
def test_floats_of_every_kind_become_float32(dtype, tmp_path):
    x = np.asfortranarray(np.random.default_rng(0).normal(size=(2100, 3)).astype(dtype))
    np.save(tmp_path / "x.npy", x)
    read = data.read_array(tmp_path / "x.npy", "float", "(N, 3)")
    assert type(read) is np.ndarray and read.dtype == np.dtype(np.float32) and read.dtype.isnative
    np.testing.assert_array_equal(read, x.astype(np.float32))
    mapped = data.read_array(tmp_path / "x.npy", "float", "(N, 3)", mmap=True)
    assert isinstance(mapped, np.memmap) and mapped.dtype == x.dtype      # with the precision of the file
    firsts, parts = zip(*data.pieces(mapped))
    assert firsts == (0, 1024, 2048)
    np.testing.assert_array_equal(np.concatenate(parts), x)


# ----------------------------------------------------------------------- data.py: the terminal and its errors
def test_the_command_line_catches_two_exceptions(capsys):
    def fail(error):
        raise error

    assert data.command_line(lambda: 7) == 7
    for error, status, line in ((data.InputError("a\nb"), 2, "error: a b"),
                                (KeyboardInterrupt(), 130, "interrupted; repeat the command to resume")):
        with ends_in_one_line(capsys, line, status=status):
            data.command_line(lambda: fail(error))
    for error in (MemoryError(), OSError(28, "No space left"), RuntimeError("a defect"), ValueError("x")):
        with pytest.raises(type(error)) as raised:
            data.command_line(lambda: fail(error))
        assert raised.value is error
    data.note("a\nb")
    assert capsys.readouterr().err == "note: a b\n"


# -------------------------------------------------------------------------------------- data.py: splits, text
def test_published_splits_are_sound():
    counts, lines = {"ntu60": 60, "ntu120": 120, "pku51": 51}, list(data.list_splits())[1:]
    for (name, (source, dataset, unseen, val)), line in zip(data.SPLITS.items(), lines, strict=True):
        unseen, val = [int(i) for i in unseen.split()], [int(i) for i in val.split()]
        seen_count, unseen_count = str(counts[dataset] - len(unseen)), str(len(unseen))
        assert len({*unseen, *val}) == len(unseen) + len(val)
        assert max(unseen + val) < counts[dataset] and len(unseen) > 1
        assert len(val) in (0, len(unseen))
        assert not name[0].isdigit() or name == f"{seen_count}_{unseen_count}"
        assert line.split() == [name, dataset, seen_count, unseen_count, str(len(val) or "-"), source]
    # of every class id, as compared with the papers; it changes with a new split
    assert data.fingerprint(data.SPLITS).startswith("fb6825e877738435")
    assert len(set(data.TRAIN_SUBJECTS)) == 53 and sum(s <= 40 for s in data.TRAIN_SUBJECTS) == 20


@pytest.mark.parametrize("dataset, count", [("ntu60", 60), ("ntu120", 120), ("pku51", 51)])
def test_bundled_text(dataset, count):
    names, text = data.bundled_classes(dataset), data.bundled_text(dataset)
    assert len(names) == len(set(names)) == count
    for prompt in text:
        pooled, tokens = prompt[:, 0], prompt[:, 1:]                      # (C, 768), (C, L, 768)
        assert prompt.shape[0] == count and prompt.shape[1] <= 1 + 35 and prompt.shape[2] == 768
        np.testing.assert_allclose(np.linalg.norm(pooled, axis=1), 1, atol=2e-3)
        is_token = tokens.any(-1)                                         # (C, L): tokens first, then padding
        assert is_token[:, 0].all() and not (~is_token[:, :-1] & is_token[:, 1:]).any()
        mean = tokens.sum(1)                                              # gives the pooled row
        np.testing.assert_allclose(mean / np.linalg.norm(mean, axis=1, keepdims=True), pooled, atol=2e-3)
    label, description = (prompt[[names.index("Drink water"), names.index("Reading")], 0] for prompt in text)
    likeness = description @ label.T                                      # of each description to each label
    assert likeness[0, 0] > likeness[0, 1] and likeness[1, 1] > likeness[1, 0]


def test_pooled_vectors_and_one_prompt_are_enough(light_folder):
    for name in ("text_label.npy", "text_description.npy"):
        spoil(name, lambda text: text[:, 0])(light_folder)
    assert [t.shape for t in data.read_data(light_folder, "9_3").text] == [(12, 1, 768)] * 2
    remove("text_description.npy")(light_folder)
    label = np.load(light_folder / "text_label.npy")
    np.testing.assert_array_equal(data.read_data(light_folder, "9_3").text, [label[:, None]])


# ----------------------------------------------------------------------------------- data.py: dataset folders
def test_split_of_a_folder(tiny_folder):
    d = data.read_data(tiny_folder, "9_3")
    assert d.unseen.tolist() == [1, 5, 8]
    assert d.seen.tolist() == [0, 2, 3, 4, 6, 7, 9, 10, 11]
    unseen = np.isin(np.load(tiny_folder / "labels.npy"), [1, 5, 8])
    tests = np.isin(np.load(tiny_folder / "subjects.npy"), [2, 4])
    assert d.train.tolist() == np.flatnonzero(~unseen & ~tests).tolist()
    assert d.seen_test.tolist() == np.flatnonzero(~unseen & tests).tolist()
    assert d.unseen_test.tolist() == np.flatnonzero(unseen & tests).tolist()
    val = data.validation_of(d)
    assert val.unseen.tolist() == d.val.tolist() == [2, 3]
    assert val.seen.tolist() == [0, 4, 6, 7, 9, 10, 11]
    rows = np.concatenate([val.train, val.seen_test, val.unseen_test])
    assert sorted(rows) == d.train.tolist()                               # only training samples, each once
    assert set(d.labels[val.unseen_test]) == {2, 3}
    assert not {2, 3} & {*d.labels[val.train], *d.labels[val.seen_test]}
    assert len(val.seen_test) < len(val.train) / 2


def test_at_least_two_validation_classes_are_drawn_where_four_are_seen(light_folder):
    """Of the first of one permutation of the seen classes; as many as unseen ones, up to a fifth."""
    for num_seen, unseen, count in ((9, [9, 10, 11], 2), (10, [10, 11], 2), (4, [9, 10, 11], 2),
                                    (3, [9, 10], 0)):
        split_file(unseen=unseen, seen=[*range(num_seen)])(light_folder)
        d = data.read_data(light_folder, "9_3")
        assert d.val.tolist() == sorted(np.random.default_rng(0).permutation(num_seen)[:count])


def test_seen_classes_and_training_rows_may_be_named(light_folder):
    splits = {"val": {"unseen": [2, 3], "seen": [0, 4, 6], "test_subjects": [2]}, "rows": {"unseen": [2, 3]}}
    write("splits.json", json.dumps(splits))(light_folder)
    d = data.read_data(light_folder, "val")
    assert set(d.labels[d.train]) == set(d.labels[d.seen_test]) == {0, 4, 6}
    assert set(d.labels[d.unseen_test]) == {2, 3}
    remove("subjects.npy")(light_folder)
    training = np.arange(96) % 3 > 0
    save("training.npy", training)(light_folder)
    d = data.read_data(light_folder, "rows")
    unseen = np.isin(d.labels, [2, 3])
    assert d.train.tolist() == np.flatnonzero(training & ~unseen).tolist()
    assert d.unseen_test.tolist() == np.flatnonzero(~training & unseen).tolist()
    save("training.npy", training.astype(int))(light_folder)
    assert_refused(r"training.npy: is int64 \(96,\), must be bool \(96,\)", light_folder, "rows")


@pytest.mark.parametrize("option", ["--gzsl", "--validate"])
def test_one_validation_class_is_too_few_to_choose_by(option, light_folder, tmp_path, capsys):
    split_file(val=[2])(light_folder)
    assert data.read_data(light_folder, "9_3").val.tolist() == [2]        # no harm where nothing is chosen
    with ends_in_one_line(capsys, "mine: split '9_3' has the validation classes [2]; too few to choose by"):
        run_main(light_folder, tmp_path / "out" / "run", option, method="ridge")
    assert not (tmp_path / "out").exists()


def test_an_ntu_folder_takes_bundled_text_splits_and_subjects(tmp_path):
    save("features.npy", np.random.default_rng(0).random((120, 256)))(tmp_path)
    save("labels.npy", np.repeat(np.arange(60), 2))(tmp_path)
    save("subjects.npy", np.tile([1, 3], 60))(tmp_path)                   # 1 trains, 3 tests
    write("classes.txt", "\n".join(data.bundled_classes("ntu60")))(tmp_path)
    d = data.read_data(tmp_path, "55_5")
    assert d.name == d.preset == "ntu60" and d.unseen.tolist() == [10, 11, 19, 26, 56]
    assert len(d.train) == 55 and len(d.seen_test) == 55 and len(d.unseen_test) == 5
    np.testing.assert_array_equal(d.text[1], data.bundled_text("ntu120")[1][:60])
    assert_refused("unknown split '110_10' for ntu60; choose one of: 55_5, 48_12, [^S]*$", tmp_path, "110_10")
    write("classes.txt", "\n".join(data.bundled_classes("ntu120")))(tmp_path)
    way_out = "unknown split '55_5' for ntu120; choose one of: 110_10, .*, or prepare S001 to S017 alone"
    assert_refused(way_out, tmp_path, "55_5")


def test_presets_follow_the_classes_not_the_folder(light_folder, tmp_path):
    args = train.run_arguments(["--method", "dvta", "--split", "9_3"])
    for name in ("ntu60", "synthetic"):
        light_folder = light_folder.rename(tmp_path / name)
        settings = train.choose_settings(args, data.read_data(light_folder, "9_3"))
        assert settings["dvta"] == train.DVTA_SMALL and settings["encoder"] == train.ENCODER


def test_data_is_complete_and_immutable(tiny_folder, light_folder):
    for folder, absent in ((tiny_folder, {"features"}), (light_folder, {"skeletons", "graph"})):
        d = data.read_data(folder, "9_3")
        assert {name for name, value in vars(d).items() if value is None} == absent
        with pytest.raises(dataclasses.FrozenInstanceError):
            d.split = "10_2"
    with pytest.raises(TypeError, match="missing"):
        data.Data(name="mine", preset="other")


# ------------------------------------------------------- data.py: published folders of skeletons and features
FEATURES = data.FEATURES_FORMAT
UNSEEN, VAL = [10, 11, 19, 26, 56], [16, 21, 25, 31, 48]                  # of the split 55_5


def write_published(folder, kind=FEATURES, width=256, unseen=UNSEEN, without=(), classes=60):
    """A published folder: three training samples a seen class, three test samples a class.

    without: classes that neither the encoder nor its folder knows.
    """
    rng, known = np.random.default_rng(unseen), np.setdiff1d(range(classes), without)
    labels_of_parts = np.repeat(np.setdiff1d(known, unseen), 3), np.repeat(unseen, 3), np.repeat(known, 3)
    folder.mkdir()
    for (x_name, y_name), labels in zip(data.PUBLISHED[kind], labels_of_parts):
        features = rng.normal(size=(len(labels), width)).astype(np.float32)
        x = features if kind == FEATURES else bodies(len(labels)).repeat(2, -1)
        save(f"{x_name}.npy", x)(folder)
        save(f"{y_name}.npy", labels)(folder)
    return folder


def as_npz(folder, path):
    """The arrays of a published features folder as Flora's .npz."""
    names = zip(sum(data.FLORA, ()), sum(data.PUBLISHED[FEATURES], ()))
    np.savez(path, **{theirs: np.load(folder / f"{ours}.npy") for theirs, ours in names})
    return path


@pytest.mark.parametrize("kind", data.PUBLISHED)
def test_a_published_folder_runs(kind, tmp_path, capsys):
    folder = write_published(tmp_path / "data", kind)
    result, _ = run_main(folder, tmp_path / "run", "--encoder-epochs", 1, method="ridge", split="55_5")
    printed = capsys.readouterr().out
    assert f"ntu60 ({kind}), split 55_5: 55 seen and 5 unseen" in printed
    assert "samples: 165 training, 165 seen test, 15 unseen" in printed
    assert result["source"] == kind and result["dataset"] == "ntu60"
    assert figures_of(result)["n"] == 15
    d = data.read_data(folder, "55_5")
    assert d.val.tolist() == VAL and d.text[0].shape == (60, 15, 768)
    if kind != FEATURES:                                                  # --val-data is for ready features
        val = write_published(tmp_path / "val", unseen=VAL, without=UNSEEN)
        with pytest.raises(data.InputError, match="give features as wide as those of --data"):
            data.read_validation(d, val)
    for name in data.PUBLISHED[kind][2]:
        remove(f"{name}.npy")(folder)
    assert len(data.read_data(folder, "55_5").seen_test) == 0
    assert_refused(r"its unseen classes are \[10, 11, 19, 26, 56\], "
                   r"those of smie_1 are \[4, 19, 31, 47, 51\]; choose", folder, "smie_1")


def test_the_labels_say_a_split_that_nobody_published(tmp_path):
    folder = write_published(tmp_path / "SHIFT_NTU60_mine", unseen=[1, 2, 3])
    d = data.read_data(folder, "any")
    assert (d.name, d.preset, d.split) == ("ntu60", "ntu60", "any")
    assert d.unseen.tolist() == [1, 2, 3] and d.seen.tolist() == [0, *range(4, 60)]
    assert (len(d.train), len(d.seen_test), len(d.unseen_test)) == (171, 171, 9)
    assert len(d.val) == 3 and set(d.val) <= set(d.seen)
    for name, classes, dataset in (("ntu120_x", 120, "ntu120"), ("my_pku_r", 51, "pku51")):
        d = data.read_data(write_published(tmp_path / name, unseen=[1, 2], classes=classes), "x")
        assert d.name == dataset and d.classes == data.bundled_classes(dataset)
    anonymous, mine = folder.rename(tmp_path / "mine"), tmp_path / "mine.npy"
    np.save(mine, np.random.default_rng(0).normal(size=(60, 20)))
    assert_refused("mine: is of an unknown dataset; choose a published --split", anonymous, "any")
    write("classes.txt", "\n".join(f"move {i}" for i in range(60)))(anonymous)
    d = data.read_data(anonymous, "any", [mine])
    assert (d.name, d.preset, d.classes[7]) == ("mine", "other", "move 7")
    assert [t.shape for t in d.text] == [(60, 1, 20)] and d.unseen.tolist() == [1, 2, 3]
    named = data.read_data(shutil.copytree(anonymous, tmp_path / "ntu60_mine"), "any", [mine])
    assert (named.preset, named.classes[7]) == ("other", "move 7")        # classes.txt outranks the name
    spoil("train_label.npy", with_value(0, 3))(anonymous)                 # an unseen class in training
    assert_refused("mine: split 'any' has class 3, .* or both seen and unseen", anonymous, "any", [mine])


def test_floras_npz_is_the_same_data_as_the_folder(tmp_path):
    folder = write_published(tmp_path / "data")
    path = as_npz(folder, tmp_path / "flora.npz")
    np.testing.assert_equal(vars(data.read_data(path, "55_5")), vars(data.read_data(folder, "55_5")))
    arrays = dict(np.load(path))
    np.savez(tmp_path / "ntu60.npz", **{k: a for k, a in arrays.items() if not k.startswith("gzsl")})
    assert len(data.read_data(tmp_path / "ntu60.npz", "x").seen_test) == 0
    del arrays["zsl_label"]
    np.savez(path, **arrays)
    assert_refused("flora.npz/zsl_label: cannot be read", path, "55_5")
    path.write_bytes(b"PK")
    assert_refused("flora.npz: cannot be read", path, "55_5")


def test_published_features_in_other_shapes_and_under_other_names(tmp_path):
    folder = write_published(tmp_path / "data")
    before = data.read_data(folder, "55_5")
    for name in ("train", "ztest", "gtest"):
        spoil(f"{name}.npy", lambda x: x[:, :, None, None])(folder)
    spoil("train_label.npy", lambda y: y[:, None])(folder)
    (folder / "ztest.npy").rename(folder / "test.npy")                    # as DVTA's folders have it
    (folder / "z_label.npy").rename(folder / "test_label.npy")
    np.testing.assert_equal(vars(data.read_data(folder, "55_5")), vars(before))
    spoil("test.npy", lambda x: x[:, :100])(folder)
    assert_refused("data: cannot be read .*; encode all parts alike", folder, "55_5")


@pytest.mark.parametrize("method", ["dvta", "tdsm", "ridge"])
def test_features_of_another_width_go_all_the_way_through(method, tmp_path):
    folder, run = write_published(tmp_path / "data", width=384), tmp_path / "run"
    save("text_label.npy", np.random.default_rng(0).normal(size=(60, 3, 16)))(folder)
    result, weights = run_main(folder, run, method=method, split="55_5")
    assert figures_of(result)["n"] == 15 and len(weights["x_mean"]) == 384
    rows = predictions_of(run, folder / "ztest.npy")                      # among all 60 classes
    assert len(rows) == 15 and {row[1] for row in rows} <= set(data.bundled_classes("ntu60"))


def test_text_beside_published_features_and_named_text(tmp_path):
    folder, mine = write_published(tmp_path / "data"), tmp_path / "mine.npy"
    pku = write_published(tmp_path / "pku", unseen=[1, 9, 20, 34, 50], classes=51)
    label, description = np.random.default_rng(1).normal(size=(2, 60, 32)).astype(np.float32)

    def assert_text(folder, split, *expected):
        d = data.read_data(folder, split)
        np.testing.assert_array_equal([t[:, 0] for t in d.text], expected)
        return d

    save("ntu60_embeddings.npy", label)(folder)
    save("ntu60_cont_embeddings.npy", description)(folder)
    assert assert_text(folder, "55_5", label, description).notes == []
    save("ntu60_des_embeddings.npy", 2 * description + label)(folder)
    one_note, = assert_text(folder, "55_5", label, 2 * description + label).notes
    assert "ntu60_des_embeddings.npy is used, not ntu60_cont_embeddings.npy, which DVTA's code" in one_note
    np.save(mine, label[:, :20])
    _, weights = run_main(folder, tmp_path / "run", "--text", mine, method="tdsm", split="55_5")
    assert weights["denoiser.text_in.weight"].shape[1] == 20
    save("pku_embeddings.npy", label[:51])(pku)
    assert assert_text(pku, "smie_7", label[:51]).name == "pku51"
    save("pku_des_embeddings.npy", description[:51])(pku)
    assert_text(pku, "46_5", label[:51], description[:51])                # the same classes as smie_7


def test_gamma_on_ready_features_comes_from_the_validation_folder(tmp_path):
    folder = write_published(tmp_path / "data")
    val = write_published(tmp_path / "val", unseen=VAL, without=UNSEEN)
    gammas = []
    for options, notes, num_train in (([], [train.VALIDATION_NOTE], 121), (["--val-data", val], [], 150)):
        result, _ = run_main(folder, tmp_path / "run", "--gzsl", *options, method="ridge", split="55_5")
        assert result["notes"] == notes
        gammas.append(result["figures"]["ridge"]["gamma"])
        result, _ = run_main(folder, tmp_path / "run", "--validate", *options, method="ridge", split="55_5")
        assert result["unseen"] == VAL and figures_of(result)["n"] == 15
        assert result["notes"] == notes and result["samples"]["train"] == num_train
    d = data.read_data(folder, "55_5")
    task = data.read_validation(d, val)
    np.testing.assert_equal(vars(data.read_validation(d, as_npz(val, tmp_path / "val.npz"))), vars(task))
    np.testing.assert_array_equal(task.features[task.unseen_test], np.load(val / "ztest.npy"))
    np.testing.assert_array_equal(task.features[task.train], np.load(val / "train.npy"))
    assert task.unseen.tolist() == VAL and task.seen.tolist() == sorted({*range(60)} - {*VAL, *UNSEEN})
    assert len(task.seen_test) == 150 and not np.isin(task.labels, UNSEEN).any()
    x, y, text = torch.tensor(task.features), torch.tensor(task.labels), [torch.tensor(t) for t in d.text]
    model = zsar.Ridge(text, 256, **train.RIDGE["model"])
    model.fit_statistics(x[task.train], None)
    model.fit(x[task.train], y[task.train])
    expected = zsar.best_gamma(*train.among_all_classes(model, x, task))
    assert gammas[1] == pytest.approx(expected) != pytest.approx(gammas[0])


BAD_VALIDATION = {  # what is wrong: (how to change the validation folder, what the one line must say)
    "an unseen class": ({"without": UNSEEN[1:]}, "val: …the unseen classes [10]; give features"),
    "the test folder": ({"unseen": UNSEEN, "without": ()}, f"val: …the unseen classes {UNSEEN}; give"),
    "another width": ({"width": 384}, "val: has shape (315, 384) and"),
    "no gtest in val": ({}, "val: has no seen test samples, which --gzsl needs"),
    "no gtest in data": ({}, "data: has no seen test samples, which --gzsl needs"),
}


@pytest.mark.parametrize("case", BAD_VALIDATION)
def test_bad_validation_folders_are_refused(case, tmp_path, capsys):
    changes, message = BAD_VALIDATION[case]
    folder = write_published(tmp_path / "data")
    val = write_published(tmp_path / "val", **{"unseen": VAL, "without": UNSEEN} | changes)
    if case.startswith("no gtest"):
        remove("gtest.npy")(tmp_path / case.split()[-1])
    with ends_in_one_line(capsys, message):
        run_main(folder, tmp_path / "run", "--gzsl", "--val-data", val, method="ridge", split="55_5")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------- data.py: layouts and own joints
@pytest.mark.parametrize("num_joints", [20, 17, 18, 33])
def test_other_skeletons_go_all_the_way_through(num_joints, light_folder, tmp_path):
    """Those of 33 joints have MediaPipe's graph."""
    graph, run = zsar.GRAPHS.get(num_joints), tmp_path / "run"
    if not graph:
        shutil.copy(ROOT / "docs" / "mediapipe.json", light_folder / "graph.json")
        graph = data.read_graph(light_folder / "graph.json")
        assert len(graph.edges) == 32 and (graph.root, graph.shoulders) == ((23, 24), (11, 12))
    save_bodies(graph=graph)(light_folder)
    assert data.read_data(light_folder, "9_3").graph == graph
    result, _ = run_main(light_folder, run, "--encoder-epochs", 1, method="ridge")
    assert figures_of(result)["n"] == 12 and result["encoder"]["seen_test_acc"] is not None
    assert data.read_tensors(run / "model.pt", ["encoder"])["encoder"]["graph"] == tuple(graph)
    shutil.copy(light_folder / "skeletons.npy", tmp_path / "new.npy")
    assert len(predictions_of(run, tmp_path / "new.npy")) == 96           # with the graph in model.pt


def test_a_folders_graph_outranks_the_built_in_one(light_folder, tmp_path):
    """NTU's joints in reverse do not stand in NTU's own order. Another graph is another encoder."""
    edges, features = [(24 - child, 24 - parent) for child, parent in zsar.NTU25.edges], []
    graph = zsar.JointGraph(tuple(edges), 4, (24,), (20, 16))
    save_bodies(graph=graph)(light_folder)
    assert_refused("mine: bodies do not stand, .* -?[0-9.]+ torso", light_folder, "9_3")
    for centre in (4, 8):                                                 # hops are counted from it
        graph = graph._replace(centre=centre)
        write("graph.json", json.dumps(graph._asdict()))(light_folder)
        assert data.read_data(light_folder, "9_3").graph == graph
        result, _ = run_main(light_folder, tmp_path / "run", "--encoder-epochs", 1, method="ridge")
        features.append(data.read_tensors(result["encoder"]["file"], ())["features"])
        assert not result["encoder"]["cached"]
    assert not torch.equal(*features)


def test_lying_people_are_allowed_on_request(light_folder, tmp_path, capsys):
    run, options = tmp_path / "out" / "run", ["--allow-lying", "--encoder-epochs", 1]
    save_bodies(lambda x: x[:, [1, 0, 2]])(light_folder)
    with ends_in_one_line(capsys, f"error: {light_folder}: bodies do not stand"):
        run_main(light_folder, run, method="ridge")
    assert not (tmp_path / "out").exists()                                # nothing half-written
    result, _ = run_main(light_folder, run, *options, method="ridge")
    assert figures_of(result)["n"] == 12 and result["notes"] == []
    spoil("skeletons.npy", lambda x: np.concatenate([x[:40], x[40:, [1, 0, 2]]]))(light_folder)
    assert data.read_data(light_folder, "9_3").notes == []                # the median stands


# --------------------------------------------------------------------------------------- data.py: bad folders
def bad_array(name, change, message):
    return spoil(f"{name}.npy", change), f"{name}.npy: {message}"


def bad_graph(message, **changes):
    """A graph.json beside skeletons of NTU's joints: their graph with changes."""
    def spoiler(folder):
        save_bodies()(folder)
        write("graph.json", json.dumps(zsar.NTU25._asdict() | changes))(folder)
    return spoiler, message


EDGES = zsar.NTU25.edges
BAD_INPUT = {  # what is wrong: (how to spoil the folder, what the one line must name, in parts divided by …)
    "no format": (remove("features.npy"),
                  "mine: is not a folder with skeletons.npy, features.npy or published…README"),
    "no text": (lambda folder: [path.unlink() for path in folder.glob("text_*")],
                "text_label.npy: no such file; embed classes.txt with text/embed.py"),
    "no splits": (remove("splits.json"), "splits.json: cannot be read as JSON (No such file"),
    "pickled labels": (save("labels.npy", np.array([{}] * 96, dtype=object)),
                       "labels.npy: cannot be read as a .npy array (Array can't be memory-mapped: Python"),
    "no rows": bad_array("features", lambda a: a[:0], "is float32 (0, 256), must be float (N, 3,"),
    "feature shape": bad_array("features", lambda a: a[:, 0],
                               "is float32 (96,), must be float (N, 3, T, V, M) or (N, F) or (N, F, 1, 1)"),
    "label dtype": bad_array("labels", lambda a: a.astype(float), "is float64 (96,), must be int (96,)"),
    "text shape": bad_array("text_label", lambda a: a[:, 0, 0], "is float32 (12,), must be"),
    "too large for float32": bad_array("features", lambda a: with_value((7, 3), -1e300)(a.astype(float)),
                                       "row 7 is not finite in float32; correct or drop"),
    "label below 0": (spoil("labels.npy", with_value(5, -1)), "mine: label -1 in row 5 is not from 0 to 11"),
    "labels from 1": (spoil("labels.npy", lambda a: a + 1),
                      "mine: label 12 in row 88 is not from 0 to 11; are labels 1-based?"),
    "text of other classes": bad_array("text_label", lambda a: a[:11],
                                       "has text for 11 classes, not 12; embed"),
    "text of other width": (spoil("text_label.npy", lambda a: a[..., :512]),
                            "text_description.npy: the prompts have the widths [512, 768]; embed"),
    "empty text": bad_array("text_label", with_value((4, 0), 0), "row 0 of class 4 is zero"),
    "the same row 0": bad_array("text_label", lambda a: with_value((10, 0), 2 * a[4, 0])(a),
                                "row 0 of class 10 equals that of class 4…start token"),
    "class names of Windows": (write("classes.txt", b"h\xf6her\nb"),
                               "classes.txt: cannot be read ('utf-8' codec…save it as UTF-8"),
    # skeletons
    "unknown joints": (save_bodies(lambda x: x[:, :, :, :24]),
                       "mine: has 24 joints; give a graph.json of 24 joints (built in: [25, 20, 17, 18])"),
    "NaN": (save_bodies(with_value((95, 2, 3, 24, 0), np.nan)),
            "skeletons.npy: row 95 is not finite"),
    "farther than 100 m": (save_bodies(with_value((95, 2, 3, 24, 0), -101)),
                           "mine: …row 95 reaches 101 m; are these millimetres or pixels?"),
    "decimetres": (save_bodies(lambda x: 10 * x), "mine: the median torso is 5 m long"),
    "too small": (save_bodies(lambda x: 0.01 * x), "mine: the median torso is 0.005 m long"),
    "y down": (save_bodies(lambda x: x * np.float32([1, -1, 1])[:, None, None, None]),
               "mine: bodies do not stand, their shoulders are -1.00…another joint layout, y down, z up, or "
               "are axes exchanged?…negate x and y (half a turn)…python docs/plot.py --data…--row 0…"
               "--allow-lying"),
    "not the first person": (save_bodies(lambda x: np.concatenate([0 * x, x], -1)),
                             "mine: no sequence has a body; all joints of the first person"),
    # splits
    "split unknown": (write("splits.json", '{"a": {}, "b": {}}'), "splits.json: has no split '9_3'…a, b"),
    "split is a list": (write("splits.json", "[1]"), "splits.json: cannot be read as JSON (cannot convert"),
    "class outside": (split_file(unseen=[3, 12]), "mine: split '9_3' has class 12, which is not from 0 to"),
    "nested classes": (split_file(unseen=[[1], 5]), "splits.json: cannot be read ('list' object"),
    "one unseen class": (split_file(unseen=[3]), "mine: split '9_3' leaves 11 classes to train on, 1 unseen"),
    "unseen and seen": (split_file(seen=[0, 2, 5]), "mine: split '9_3' has class 5…both seen"),
    "unknown key": (split_file(unsen=[3]), "splits.json: cannot be read (…unsen…write splits like"),
    "nothing to test": (split_file(test_subjects=[9]), "mine: split '9_3' leaves 9 classes…and 0 test"),
    "one seen class": (split_file(seen=[0]), "mine: split '9_3' leaves 1 classes to train on"),
    # graph.json
    "two parts": bad_graph("graph.json: joint 23 is not in the tree; 24 edges must join the joints 0 to 24",
                           edges=[*EDGES[:-1], [23, 24]]),
    "no such shoulder": bad_graph("graph.json: joint 77 is not in the tree", shoulders=[4, 77]),
    "one shoulder": bad_graph('graph.json: cannot be read (…write {"edges"', shoulders=[4]),
    "graph of 20 joints": bad_graph("mine: has 25 joints; give a graph.json of 25 joints",
                                    edges=zsar.KINECT20.edges, centre=2),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_2(case, light_folder, capsys):
    spoiler, message = BAD_INPUT[case]
    spoiler(light_folder)
    with ends_in_one_line(capsys, f"error: {light_folder.parent}…{message}"):
        data.command_line(lambda: data.read_data(light_folder, "9_3"))


ODDITIES = {  # what may be meant: (how to change the folder, the one line)
    "labels from 1, the last class absent": (
        spoil("labels.npy", lambda a: np.maximum(a, 1)),
        "class 0 has no sample, but the last class has; are labels 1-based?"),
    "a confidence": (save_bodies(lambda x: np.stack([x[:, 0], x[:, 1], x[:, 2] % 1], 1)),
                     "the third channel alone is from 0 to 1; is it a confidence?"),
    "joints not detected": (
        save_bodies(lambda x: x * (np.random.default_rng(1).random((96, 1, 4, 25, 1)) > 0.15)),
        "15.0% of the joints are 0, 0, 0 in frames that show the first person; interpolate them"),
    "nobody in two": (save_bodies(with_value([0, 5], 0)), "2 of 96 sequences have no first person"),
}


@pytest.mark.parametrize("case", ODDITIES)
def test_oddities_are_one_note(case, light_folder):
    assert data.read_data(light_folder, "9_3").notes == []
    change, note = ODDITIES[case]
    change(light_folder)
    notes = data.read_data(light_folder, "9_3").notes
    assert len(notes) == 1 and note in notes[0] and str(light_folder) in notes[0]


@pytest.mark.parametrize("frames", [slice(None), slice(1)], ids=["every frame", "the first frame"])
def test_the_origin_may_be_a_joint(frames, light_folder):
    """As in sets of 2s-AGCN and CTR-GCN. Frames without the first person do not count."""
    x = bodies(96) + np.float32([1, 2, 3])[:, None, None, None]
    x[:, :, frames] -= x[:, :, frames, 1:2]
    x[::2, :, 3] = 0
    save("skeletons.npy", x)(light_folder)
    assert data.read_data(light_folder, "9_3").notes == []
    x[:, :, 1, [5, 9]] = 0
    save("skeletons.npy", x)(light_folder)
    share = 2 / 24 / 3.5                                                  # in one of 3.5 frames on average
    assert f" {share:.1%} of the joints are 0, 0, 0 in" in data.read_data(light_folder, "9_3").notes[0]


def test_sequences_without_a_body_are_not_trained_on(light_folder):
    save_bodies(with_value([0, 2, 8], 0))(light_folder)
    d = data.read_data(light_folder, "9_3")
    assert 0 not in d.train and 1 in d.train                              # of a training subject
    assert 2 in d.seen_test                                               # a test sample stays one


# --------------------------------------------------------------------------------- data.py: the synthetic set
def test_synthetic_motion_follows_the_text():
    text = np.random.default_rng(0).normal(size=(16, 40))
    text[1] = text[0] + 0.01                                              # class 1 says almost the same
    x, labels, subjects = data.synthetic(text, performers=3, repeats=2, frames=20)
    assert x.shape == (96, 3, 20, 25, 1) and x.dtype == np.float32 and np.isfinite(x).all()
    assert np.bincount(labels).tolist() == [6] * 16
    assert np.bincount(subjects).tolist() == [0, 32, 32, 32]
    again, other = (data.synthetic(text, performers=3, repeats=2, frames=20, seed=seed)[0] for seed in (0, 1))
    np.testing.assert_array_equal(again, x)
    assert not np.array_equal(other, x)
    y = zsar.to_common_frame(x, zsar.NTU25)
    centre = np.stack([y[labels == c].mean(0) for c in range(16)])
    distance = np.sqrt(((centre[0] - centre) ** 2).mean((1, 2, 3, 4)))
    assert distance[1] < 0.5 * distance[2:].min()
    front = y[:, 2, 0, :, 0]                                              # (N, V): z in the first frame
    assert (front[:, 15] > front[:, 14]).mean() > 0.75                    # not mirrored: left toes, ankle
    assert (front[:, 19] > front[:, 18]).mean() > 0.75
    for child, parent in EDGES:
        length = np.linalg.norm(x[:, :, :, child, 0] - x[:, :, :, parent, 0], axis=1)     # (N, T)
        assert length.std(1).max() < 0.03                                 # only sensor noise, 0.5 to 1.5 cm


def test_the_default_synthetic_set():
    d = data.read_data("synthetic", "55_5")
    assert d.source == "synthetic set" and d.notes == [] and len(d.classes) == 60
    assert d.skeletons.shape == (2160, 3, 32, 25, 1)
    assert len(d.train) == len(d.seen_test) == 990 and len(d.unseen_test) == 90
    assert d.val.tolist() == VAL


# ---------------------------------------------------------------------------------------------- text/embed.py
def embed(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["embed.py", *arguments])
    runpy.run_path(str(ROOT / "text/embed.py"), run_name="__main__")


def test_embed_script_on_a_wrong_command(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for arguments, message in ((["M", "a.txt", "a.npy"], "pip install transformers"), (["M"], "usage: ")):
        with ends_in_one_line(capsys, message):
            embed(monkeypatch, *arguments)


def tiny_text_model(folder, kind):
    """A folder with a random BERT or CLIP text model of width 16, and a tokenizer of letters."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.disable_progress_bar()
    folder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    transformers.BertTokenizer.from_pretrained(folder).save_pretrained(folder)
    sizes = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 2, "max_position_embeddings": 32 if kind == "short" else 77,
             "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    picture = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
               "image_size": 32, "patch_size": 16}
    with seeded(0):
        if kind == "clip":
            model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes))
        elif kind == "siglip":
            config = transformers.SiglipConfig(text_config=sizes, vision_config=picture)
            model = transformers.SiglipModel(config)
        else:
            model = transformers.BertModel(transformers.BertConfig(**sizes))
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("kind", ["clip", "bert"])
def test_embed_script_on_a_tiny_model(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = tiny_text_model(Path("model"), kind)
    Path("prompts.txt").write_text("a b c\nd\n" + " ".join("abcdefghij" * 4) + "\n")
    embed(monkeypatch, "model", "prompts.txt", "text.npy")
    assert "cut at 35 tokens: a b c" in capsys.readouterr().err
    text = np.load("text.npy").astype(np.float32)
    assert text.shape == (3, 1 + 35, 16)
    ids = torch.tensor([[2, 7, 3] + [0] * 32])                            # "d"
    with torch.inference_mode():
        output = model(ids) if kind == "clip" else model(ids[:, :3])
    tokens = output.last_hidden_state[0].numpy()
    np.testing.assert_allclose(text[1, 1:1 + len(tokens)], tokens, atol=5e-3)
    if kind == "clip":                                                    # as the model gives them
        np.testing.assert_allclose(text[1, 0], output.pooler_output[0], atol=5e-3)
        assert text[1, 4:].any(1).all()
    else:
        assert not text[1, 4:].any()
        np.testing.assert_allclose(np.linalg.norm(text[:, 0], axis=1), 1, atol=1e-3)
    for name in ("text_encoder", "tokenizer"):                            # a folder of diffusers
        shutil.copytree("model", Path("sd", name))
    Path("short.txt").write_bytes(b"\xef\xbb\xbfd\ne\n")
    embed(monkeypatch, "sd", "short.txt", "short.npy", "--rows", "35")
    short = np.load("short.npy").astype(np.float32)
    assert short.shape == (2, 1 + 35, 16)
    np.testing.assert_allclose(short[0], text[1], atol=5e-3)
    capsys.readouterr()
    embed(monkeypatch, "model", "prompts.txt", "cut.npy", "--rows", "3")
    assert "cut at 3 tokens: a b c\n" in capsys.readouterr().err          # "d" has 3, with both ends
    np.testing.assert_allclose(np.load("cut.npy"), text[:, :4], atol=5e-3)


POOLINGS = {  # files of a model: how it pools, or what the one line says
    "mean": {"1_Pooling/config.json": {"pooling_mode": "mean"}},
    "cls": {"1_Pooling/config.json": {"embedding_dimension": 16, "pooling_mode": "cls"}},
    "cls, before version 6": {"1_Pooling/config.json": {
        "word_embedding_dimension": 16, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}},
    "mean, before version 6": {"1_Pooling/config.json": {
        "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}},
    "makes a sentence vector by ['lasttoken']": {"1_Pooling/config.json": {"pooling_mode": "lasttoken"}},
    "by ['mean', 'cls']": {"1_Pooling/config.json": {
        "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}},
    "by ['pooling_mode_mean_sqrt_len_tokens']": {"1_Pooling/config.json": {
        "pooling_mode_mean_tokens": False, "pooling_mode_mean_sqrt_len_tokens": True}},
    "mean, as no file says": {},
    "by ['mean', 'Dense']": {"modules.json": [
        {"type": f"sentence_transformers.models.{name}"} for name in ("Transformer", "Pooling", "Dense")]},
}


@pytest.mark.parametrize("pooling", POOLINGS)
def test_embed_script_pools_as_the_model_says(pooling, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = tiny_text_model(Path("model"), "bert")
    Path("model/1_Pooling").mkdir()
    for name, value in POOLINGS[pooling].items():
        Path("model", name).write_text(json.dumps(value))
    Path("prompts.txt").write_text("d\na b c\n")
    if "by [" in pooling:
        with ends_in_one_line(capsys, f"model: is not a Sentence-BERT or CLIP text model…{pooling}"):
            embed(monkeypatch, "model", "prompts.txt", "text.npy")
        return
    embed(monkeypatch, "model", "prompts.txt", "text.npy")
    with torch.inference_mode():
        tokens = model(torch.tensor([[2, 7, 3]])).last_hidden_state[0]    # "d"
    is_noted = "note: model: 1_Pooling/config.json is not found, so the mean" in capsys.readouterr().err
    assert is_noted == (pooling == "mean, as no file says")
    pooled = tokens[0] if pooling.startswith("cls") else tokens.mean(0)
    np.testing.assert_allclose(np.load("text.npy")[0, 0], pooled / pooled.norm(), atol=1e-3)


def test_embed_script_counts_the_words_that_a_model_does_not_know(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny_text_model(Path("model"), "bert")
    for prompts, expected in (("a b\nc", []), ("坐下 a\n起立", ["4 of 5"])):     # a character is a token
        Path("prompts.txt").write_text(prompts)
        capsys.readouterr()
        embed(monkeypatch, "model", "prompts.txt", "text.npy")
        printed = capsys.readouterr().err
        assert re.findall("note: the model does not know (.*) tokens; .* multilingual", printed) == expected


@pytest.mark.parametrize("kind, message", [("short", "it has 32 positions, and 35 are needed"),
                                           ("siglip", "it is a siglip, of text and more")])
def test_embed_script_refuses_foreign_models(kind, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny_text_model(Path("model"), kind)
    Path("prompts.txt").write_text("a b c\nd")
    with ends_in_one_line(capsys, f"model: is not a Sentence-BERT or CLIP text model…{message}"):
        embed(monkeypatch, "model", "prompts.txt", "text.npy")
    assert not Path("text.npy").exists()


# --------------------------------------------------------------------------- prepare.py: downloaded skeletons
NAMES = ["S001C001P001R001A001", "S001C002P003R001A013", "S002C003P001R002A060", "S003C001P009R002A002",
         "S003C002P002R001A007"]
ROWS = [(0, True, 1, 1, 1), (12, False, 3, 2, 1), (59, True, 1, 3, 2), (1, True, 9, 1, 3), (6, True, 2, 2, 3)]


def recordings():
    """Five recordings (5, 3, 20, 25, 2), the main actor first; only the second holds two persons."""
    x = np.zeros((5, 3, 20, 25, 2), np.float32)
    x[..., 0] = [person(20, 0.02, seed=i) for i in range(5)]
    x[1, ..., 0], x[1, ..., 1] = person(20, 0.08, seed=9), x[1, ..., 0] + 1
    return x


@pytest.fixture
def raw_ntu(tmp_path):
    """The recordings as .skeleton files, the main actor last, the first file in a folder within."""
    folder = tmp_path / "raw"
    (folder / "nested").mkdir(parents=True)
    for i, (name, x) in enumerate(zip(NAMES, recordings())):
        write_skeleton((folder / "nested" if i == 0 else folder) / f"{name}.skeleton", x[..., ::-1])
    return folder


def assert_skipped(out, expected):
    """skipped.csv must name these files, {name: a part of the reason}."""
    with open(out / "skipped.csv", newline="") as f:
        skipped = dict(list(csv.reader(f))[1:])
    assert skipped.keys() == expected.keys()
    assert all(expected[name] in reason for name, reason in skipped.items()), skipped


def track(frames, seed=0, motion=0.1, wide=1):
    """A track of these of 100 frames: a person of that seed, made `wide` times as wide."""
    xyz = person(100, motion, seed).transpose(1, 2, 0)[list(frames)]      # (n, V, 3)
    xyz[..., 0] *= np.reshape(wide, (-1, 1))
    return list(frames), xyz


ALL = range(60)
LATE = track(range(20, 60), 1, motion=0.6)
MOVER, STILL = track(ALL, 1, motion=0.6), track(ALL, 1, motion=0.3)
ACTOR, OTHER = track(ALL), track(ALL, 2)
CHAIR, SPRAWLER = track(ALL, 5, motion=2, wide=9), track(ALL, 2, motion=0.01, wide=[20] * 30 + [1] * 30)
TRACKS = {  # what the tracker saw: (its tracks, the main actor's frames, the second actor's)
    "an id that changes twice": ([track(range(20)), track(range(20, 40)), track(range(40, 60))], ACTOR, None),
    "with a gap": ([track(range(30)), track(range(35, 60))], track([*range(30), *range(35, 60)]), None),
    "in another order": ([track(range(20, 40)), track(range(20)), track(range(40, 60))], ACTOR, None),
    "lost, then the old id": ([track([*range(20), *range(40, 60)]), track(range(20, 40))], ACTOR, None),
    "one of two changes": ([track(range(25), 2), MOVER, track(range(25, 60), 2)], MOVER, OTHER),
    "a third person": ([OTHER, MOVER, track(ALL, 3, motion=0.01)], MOVER, OTHER),
    "a chair": ([CHAIR, ACTOR], ACTOR, None),
    "11 frames are noise": ([track(range(10, 21), 4), ACTOR], ACTOR, None),
    "12 frames are a person": ([track(range(10, 22), 4), ACTOR], ACTOR, track(range(10, 22), 4)),
    "the only one": ([track(range(10, 15))], track(range(10, 15)), None),
    "all are wide": ([CHAIR, track(ALL, 6, motion=0.01, wide=9)], CHAIR, None),
    "partly wide: motion counts elsewhere": ([SPRAWLER, STILL], STILL, SPRAWLER),
    "wide in 75 % of the frames": ([track(ALL, 2, 0.01, wide=[20] * 45 + [1] * 15), STILL], STILL, None),
    "a late main actor": ([LATE, OTHER], OTHER, LATE),
}


@pytest.mark.parametrize("case", TRACKS)
def test_tracks_become_people(case):
    tracks, *expected = TRACKS[case]
    people = data.people_of(tracks)
    shown = sorted(set().union(*(who[0] for who in expected if who)))     # frames without a body are dropped
    assert people.shape == (2, len(shown), 25, 3)
    for found, who in zip(people, expected):
        frames, xyz = who or ([], np.zeros((0, 25, 3)))
        np.testing.assert_array_equal(found[np.isin(shown, frames)], xyz)
        assert not found[~np.isin(shown, frames)].any()


def test_resampling_by_hand():
    ramp = np.arange(4.0)[:, None, None] + np.ones((4, 25, 3))            # 1 2 3 4
    people = np.stack([ramp, np.where(np.arange(4)[:, None, None] < 2, ramp, 0)])
    x = data.resampled(people, 7)                                         # (3, 7, 25, 2)
    assert x[0, :, 0, 0].tolist() == [1, 1.5, 2, 2.5, 3, 3.5, 4]
    assert x[0, :, 0, 1].tolist() == [1, 1.5, 2, 2, 0, 0, 0]              # as in the nearer frame; absent
    gap = np.concatenate([people, 0 * people[:, :2], people], 1)
    assert data.resampled(gap, 8)[1, :, 3, 0].tolist() == [1, 2, 3, 4, 1, 2, 3, 4]
    assert data.resampled(people[:1], 4).shape == (3, 4, 25, 2)
    for bad, reason in ((0 * people, "no body"), (people * np.nan, "not finite"), (people * 1e4, "exceeds")):
        with pytest.raises(ValueError, match=reason):
            data.resampled(bad, 4)


def test_ntu_preparation(raw_ntu, tmp_path):
    """The whole command; worker processes are spawned, as on Windows and macOS."""
    start, out, names = tmp_path / "start", tmp_path / "out", tmp_path / "start" / "excluded.txt"
    start.mkdir()
    write("sitecustomize.py", "import multiprocessing as m\nm.set_start_method('spawn')\n")(start)
    write("S001C001P001R001A002.skeleton", "")(raw_ntu)
    write("notes.txt", "x")(raw_ntu)
    for name in ("S001C001P001R001A003", "S001C001P001R001A004"):
        shutil.copy(raw_ntu / f"{NAMES[2]}.skeleton", raw_ntu / f"{name}.skeleton")
    names.write_text("S001C001P001R001A003\nS001C001P001R001A004.skeleton\nS099C001P001R001A001\n")
    script, options = ROOT / "skeletons" / "prepare.py", ["--frames", "20", "--exclude", names]
    command = [sys.executable, script, raw_ntu, "out", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path,
                          env=os.environ | {"PYTHONPATH": str(start)})
    assert done.returncode == 0, done.stderr
    assert "5 samples, 1 skipped" in done.stdout
    assert done.stderr == (f"note: {raw_ntu}: ignored 1 other files\n"
                           f"note: {names}: 2 of 3 listed recordings left out\n")
    files = {"classes.txt", "skeletons.npy", "skipped.csv", *(f"{name}.npy" for name in prepare.COLUMNS)}
    assert {path.name for path in out.iterdir()} == files
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "raw", "start"]
    x = np.load(out / "skeletons.npy", mmap_mode="r")
    assert isinstance(x, np.memmap) and x.shape == (5, 3, 20, 25, 2) and x.dtype == np.float32
    np.testing.assert_array_equal(x, recordings())
    for column, name in enumerate(prepare.COLUMNS):
        assert np.load(out / f"{name}.npy").tolist() == [row[column] for row in ROWS]
    assert data.read_lines(out / "classes.txt") == data.bundled_classes("ntu60")
    assert_skipped(out, {"S001C001P001R001A002.skeleton": "is truncated"})
    for protocol, training in (("xview", [False, True, True, False, True]),
                               ("xset", [False, False, True, False, False])):
        prepare.prepare(raw_ntu, tmp_path / protocol, frames=8, protocol=protocol, exclude=names)
        assert np.load(tmp_path / protocol / "training.npy").tolist() == training


def test_encodings_suffixes_and_links(raw_ntu, tmp_path):
    path, elsewhere, out = raw_ntu / f"{NAMES[1]}.skeleton", tmp_path / "elsewhere", tmp_path / "out"
    expected, text = data.read_ntu(path, 20), path.read_text()
    for encoded in (text.encode("utf-8-sig"), text.encode("utf-16"), text.replace("\n", "\r\n").encode()):
        path.write_bytes(encoded)
        np.testing.assert_array_equal(data.read_ntu(path, 20), expected)
    path.rename(path.with_suffix(".SKELETON"))
    shutil.move(raw_ntu / "nested", elsewhere)
    (raw_ntu / "nested").symlink_to(elsewhere)
    prepare.prepare(raw_ntu, out, frames=20)
    assert np.load(out / "labels.npy").tolist() == [row[0] for row in ROWS]
    np.testing.assert_array_equal(np.load(out / "skeletons.npy")[1], expected)


def test_every_broken_file_is_skipped_with_its_reason(raw_ntu, tmp_path):
    good = (raw_ntu / f"{NAMES[2]}.skeleton").read_text()
    number = good.split()[14]
    broken = {  # file: (its content, the reason)
        "S004C001P001R001A001.skeleton": (good[:len(good) // 2], "is truncated"),
        "S004C001P001R001A002.skeleton": (good.rsplit(None, 1)[0], "does not end after its 20 frames"),
        "S004C001P001R001A003.skeleton": (good + "1\n", "does not end after its 20 frames"),
        "S004C001P001R001A004.skeleton": (good.replace(number, "x.y", 1), "could not convert string"),
        "S004C001P001R001A005.skeleton": (good.replace(number, "1e30", 1), "is not finite, or exceeds 100 m"),
        "S004C001P001R001A006.skeleton": ("3\n0\n0\n0\n", "no body"),
        "S004C001P001R001A121.skeleton": (good, "S004C001P001R001A121.skeleton is not SsssCcccPppp"),
        "holiday.skeleton": (good, "holiday.skeleton is not SsssCcccPpppRrrrAaaa"),
    }
    for name, (content, _) in broken.items():
        write(name, content)(raw_ntu)
    (raw_ntu / "S004C001P001R001A100.skeleton").symlink_to("nowhere")
    prepare.prepare(raw_ntu, tmp_path / "out", frames=10)
    expected = {name: reason for name, (_, reason) in broken.items()}
    assert_skipped(tmp_path / "out", expected | {"S004C001P001R001A100.skeleton": "No such file"})
    assert len(np.load(tmp_path / "out" / "labels.npy")) == 5


# ------------------------------------------------------------------------- prepare.py: published forms of NTU
RECORDINGS = NAMES, ROWS, recordings()


def write_pyskl(path, samples=RECORDINGS, protocol=None, **changes):
    """pyskl's pickle of samples (names, rows, skeletons (N, 3, T, V, M)), in a pickle protocol."""
    names, rows, _ = samples
    annotations = []
    for name, row, sequence in zip(*samples):
        people = sequence.transpose(3, 1, 2, 0)[:1 + sequence[..., 1:].any()].astype(np.float16)
        annotations.append({"frame_dir": name, "label": np.int64(row[0]), "total_frames": np.float32(20),
                            "keypoint": people} | changes)                # (1 or 2, F, V, 3)
    split = {"xsub_train": [n for n, row in zip(names, rows) if row[1]],
             "xsub_val": [n for n, row in zip(names, rows) if not row[1]], "xview_train": names[1:3]}
    path.write_bytes(pickle.dumps({"split": split, "annotations": annotations}, protocol))
    return path


def centred(x):
    """x (N, 3, T, V, M) with the origin at joint 2 of the first frame; who is absent stays zero."""
    return (x - x[:, :, :1, 1:2, :1]) * x.any((1, 3), keepdims=True)


def of_two(x):
    """x (N, 3, T, V, M) with M made 2."""
    return np.pad(x, [(0, 0)] * 4 + [(0, 2 - x.shape[4])])


def write_ctrgcn(path, samples=RECORDINGS):
    """CTR-GCN's file: centred, up to 300 frames, with one-hot labels."""
    _, rows, x = samples
    x = np.pad(of_two(centred(x)), [(0, 0), (0, 0), (0, 300 - x.shape[2]), (0, 0), (0, 0)])
    x = x.transpose(0, 2, 4, 3, 1).reshape(len(x), 300, -1)
    return write_npz(path, x, np.eye(60)[[row[0] for row in rows]], rows)


def write_pku_npz(path, samples=RECORDINGS):
    """PKU-MMD's file in the same key names: centred and turned, z up, with class ids."""
    _, rows, x = samples
    return write_npz(path, of_two(z_up(x)), np.array([row[:1] for row in rows]), rows)


def write_npz(path, x, y, rows):
    trains = np.array([row[1] for row in rows])
    np.savez_compressed(path, x_train=x[trains], y_train=y[trains], x_test=x[~trains], y_test=y[~trains])
    return path


def z_up(x):
    """x (N, 3, T, V, M) as 2s-AGCN's script writes it; test_published_frames has the formulas."""
    return zsar.to_common_frame(x, zsar.NTU25, "shiftgcn")


def write_agcn(folder, samples=RECORDINGS, fill=False):
    """2s-AGCN's folder; `fill` repeats sequences up to 300 frames instead of zeros."""
    names, rows, x = samples
    frames = x.shape[2]
    x = np.tile(of_two(z_up(x)), (1, 1, -(-300 // frames), 1, 1))[:, :, :300]
    x[:, :, frames:] *= fill
    folder.mkdir()
    for part, trains in (("train", True), ("val", False)):
        members = [n for n, row in enumerate(rows) if row[1] == trains]
        labels = [names[n] for n in members], [rows[n][0] for n in members]
        save(f"{part}_data_joint.npy", x[members])(folder)
        write(f"{part}_label.pkl", pickle.dumps(labels))(folder)
    return folder


def prepared(source, out, frames=20, **options):
    """→ the arrays of a prepared folder, samples in the order of their labels."""
    prepare.prepare(source, out, frames=frames, **options)
    order = np.argsort(np.load(out / "labels.npy"))
    return {path.stem: np.load(path)[order] for path in out.glob("*.npy")}


def assert_same_bodies(x, expected, atol):
    """Skeletons (N, 3, T, V, M) must stand, and have the same joints and sides, wherever they face."""
    def shape(x):                                                         # no turn or shift changes these
        limbs = x[..., [4, 8, 15], 0] - x[..., [0], 0]                    # (N, 3, T, 3): shoulders, left foot
        volume = np.linalg.det(limbs.transpose(0, 2, 1, 3))               # (N, T), its sign the handedness
        return volume, np.linalg.norm(x[:, :, :, :, None] - x[:, :, :, None], axis=1)   # (N, T, V, V, M)

    for found, right in zip(shape(x), shape(expected)):
        np.testing.assert_allclose(found, right, atol=atol)
    assert np.median(zsar.torsos_of(x, zsar.NTU25)[1]) > 0.5


FORMS = {  # (how to write it, its name, options)
    "pyskl 2": (write_pyskl, "ntu60_3danno.pkl", {"protocol": 2}),
    "pyskl 5": (write_pyskl, "ntu60_3danno.PKL", {"protocol": 5}),
    "ctrgcn": (write_ctrgcn, "NTU60_CS.npz", {}),
    "agcn zeros": (write_agcn, "xsub", {"fill": False}),
    "agcn repeated": (write_agcn, "xsub", {"fill": True}),
    "pku": (write_pku_npz, "pkuv1_xsub.npz", {}),
}


@pytest.mark.parametrize("form", FORMS)
def test_one_recording_in_every_form_is_the_same_skeleton(form, tmp_path, capsys):
    write_form, name, options = FORMS[form]
    order = [n for n in np.argsort(np.array(ROWS)[:, 0]) if form != "pku" or ROWS[n][0] < 51]
    names, rows, expected = [NAMES[n] for n in order], [ROWS[n] for n in order], recordings()[order]
    source = write_form(tmp_path / name, (names, rows, expected), **options)
    other = prepared(source, tmp_path / "out")
    x, columns = other.pop("skeletons"), dict(zip(prepare.COLUMNS, np.array(rows).T))
    assert_same_bodies(x, expected, 5e-3 if write_form == write_pyskl else 1e-4)
    turned = write_form in (write_agcn, write_pku_npz)
    assert ("turned (x, y, z) into (x, z, -y)" in capsys.readouterr().err) == turned
    if form == "ctrgcn":                                                  # the origin at joint 2
        expected = centred(expected)
    if not turned:
        np.testing.assert_allclose(x, expected, atol=2e-3 if write_form == write_pyskl else 1e-5)
    if form in ("ctrgcn", "pku"):
        columns = {name: columns[name] for name in ("labels", "training")}
    np.testing.assert_equal(other, columns)
    write("splits.json", '{"odd": {"unseen": [12, 13]}}')(tmp_path / "out")
    d = data.read_data(tmp_path / "out", "odd")
    assert d.notes == [] and d.labels[d.unseen_test] == [12]
    assert d.classes == data.bundled_classes("pku51" if form == "pku" else "ntu60")


def test_the_second_person_may_be_repeated_after_fewer_frames(tmp_path):
    """As 2s-AGCN's script does, person by person; the main actor's frames count."""
    source = write_agcn(tmp_path / "xsub", fill=True)
    expected = prepared(source, tmp_path / "before")["skeletons"]
    spoil("val_data_joint.npy", lambda x: np.stack(
        [x[..., 0], np.tile(x[:, :, :15, :, 1], (1, 1, 20, 1))], -1))(source)
    x = prepared(source, tmp_path / "after")["skeletons"]
    np.testing.assert_array_equal(x[..., 0], expected[..., 0])
    np.testing.assert_array_equal(x[:, :, :15, :, 1], expected[:, :, :15, :, 1])


LISTS = {  # how a list of two present and two absent recordings is written
    "lines": "Missing skeletons:\n{}\n{}\n{}\n{}\n",
    "commas": "{},{}, {};{}",
    "quotes": "'{}', '{}', \"{}\", '{}'",
    "JSON": '{{"missing": ["{}", "{}", "{}", "{}"]}}',
    "videos": "{}_rgb.avi {}_rgb.avi {}_depth.zip {}.skeleton.txt",
    "Windows": "C:\\ntu\\{}.skeleton\r\nC:\\ntu\\{}.skeleton\r\n..\\{}.SKELETON\r\n_{}_",
}


@pytest.mark.parametrize("notation", LISTS)
def test_lists_of_recordings_to_exclude(notation, tmp_path, capsys):
    absent = ["S099C001P001R001A001", "S001C001P001R001A120"]
    (tmp_path / "list").write_text(LISTS[notation].format(*NAMES[:2], *absent))
    for source in (write_pyskl(tmp_path / "a.pkl"), write_agcn(tmp_path / "agcn")):
        capsys.readouterr()
        arrays = prepared(source, tmp_path / f"{source.name}_out", exclude=tmp_path / "list")
        assert arrays["labels"].tolist() == [1, 6, 59]
        assert f"note: {tmp_path}/list: 2 of 4 listed recordings left out\n" in capsys.readouterr().err


def test_a_large_npz_is_read_in_pieces(tmp_path):
    """PKU-MMD's takes less memory than its samples. Without second persons M is 1."""
    out, x = tmp_path / "out", np.random.default_rng(0).normal(size=(2500, 3, 4, 25, 2)).astype(np.float32)
    x[..., 1] = 0
    y, trains = np.arange(2500)[:, None] % 51, np.arange(2500) < 2400
    source = tmp_path / "pkuv1_xsub.npz"
    np.savez(source, x_train=x[trains], y_train=y[trains], x_test=x[~trains], y_test=y[~trains])
    tracemalloc.start()
    prepare.prepare(source, out, frames=4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    for name, array in (("skeletons", x[..., :1]), ("labels", y[:, 0]), ("training", trains)):
        np.testing.assert_array_equal(np.load(out / f"{name}.npy"), array)
    assert data.read_lines(out / "classes.txt") == data.bundled_classes("pku51")
    assert peak < x.nbytes


# ---------------------------------------------------------------------------------------- prepare.py: PKU-MMD
def write_pku(raw, name, video, labels, folders=("Data/PKU_Skeleton_Renew", "Label/Train_Label_PKU_final")):
    """Write a PKU-MMD video (frames, 2, 25, 3) and the lines of its labels, with blank last lines."""
    frames = [" ".join(map(repr, frame)) for frame in video.reshape(len(video), -1).tolist()]
    for folder, lines in zip(folders, (frames, labels)):
        (raw / folder).mkdir(parents=True, exist_ok=True)
        (raw / folder / f"{name}.txt").write_text("\n".join(lines) + "\n\n")


@pytest.fixture
def raw_pku(tmp_path):
    """A PKU-MMD video of each phase, of 60 frames with two segments; a second person in the third segment."""
    raw, video = tmp_path / "pku", np.zeros((60, 2, 25, 3))
    video[:, 0] = person(60, 0.3).transpose(1, 2, 0)
    write_pku(raw, "0002-L", video, ["5,1,20,2", "51.0,31.0,60.0,1.0"])
    video[:20, 1] = person(20, 0.1, seed=1).transpose(1, 2, 0)
    write_pku(raw, "A01N01-M", video, ["1,0,20,2", "2,21,40,2"], ("Skeleton", "Label"))
    (raw / "Split").mkdir()
    write("Split/cross-subject.txt", "Training videos:\n0002-L, 0004-R, \nValidation videos:\nA01N01-M")(raw)
    write("cross_view_v2.txt", "Training videos:\nA01N01-M\nTesting videos:\n0002-L, A01N02-R\n")(raw)
    return raw


def test_pku_preparation(raw_pku, tmp_path):
    out, view, actor = tmp_path / "out", tmp_path / "view", person(60, 0.3)
    prepare.prepare(raw_pku, out, frames=20)
    x = np.load(out / "skeletons.npy")
    assert x.shape == (4, 3, 20, 25, 2)
    assert np.load(out / "labels.npy").tolist() == [4, 50, 0, 1]
    assert np.load(out / "training.npy").tolist() == [True, True, False, False]
    np.testing.assert_allclose(x[0, ..., 0], actor[:, :20], rtol=1e-6)    # frames 1 to 20, both included
    np.testing.assert_allclose(x[1, :, [0, 19], :, 0], actor[:, [30, 59]].swapaxes(0, 1), rtol=1e-6)
    np.testing.assert_allclose(x[2, ..., 0], actor[:, :20], rtol=1e-6)    # 0 is the first frame
    np.testing.assert_allclose(x[2, ..., 1], person(20, 0.1, seed=1), rtol=1e-6)
    np.testing.assert_allclose(x[3, ..., 0], actor[:, 20:40], rtol=1e-6)
    assert not x[[0, 1, 3], ..., 1].any()
    assert data.read_lines(out / "classes.txt") == data.bundled_classes("pku51")
    (tmp_path / "list").write_text('["0002-L.avi", "0003-M.avi"]')
    prepare.prepare(raw_pku, tmp_path / "fewer", frames=20, exclude=tmp_path / "list")
    assert np.load(tmp_path / "fewer" / "labels.npy").tolist() == [0, 1]
    prepare.prepare(raw_pku, view, frames=20, protocol="xview")
    assert np.load(view / "training.npy").tolist() == [False, False, True, True]


def test_broken_pku_videos_and_segments_are_skipped(raw_pku, tmp_path, capsys):
    video, split = np.ones((30, 150)), raw_pku / "Split" / "cross-subject.txt"
    reasons = {  # of each line of a label file; none of a good one
        "1,1,20,2": None, "52,1,20,2": "action 52", "3,10,31,2": "action 3, frames 10 to 31 of 30",
        "3,9,8,2": "frames 9 to 8", "x,1,20,2": "could not convert", "7,1": "not enough values",
        "1,3,3,1": None}
    write_pku(raw_pku, "0004-R", video, reasons)
    write_pku(raw_pku, "0007-L", video, ["1,1,20,2"])                     # in neither list
    write_pku(raw_pku, "0008-L", video[:, 1:], ["1,1,20,2"])
    split.write_text(split.read_text().replace("A01N01-M", "A01N01-M, 0008-L"))
    prepare.prepare(raw_pku, tmp_path / "out", frames=10)
    assert capsys.readouterr().err == f"note: {raw_pku}: ignored 3 other files\n"
    places = [f"0004-R.txt, label line {i}" for i in range(1, 8)]
    expected = {place: reason for place, reason in zip(places, reasons.values()) if reason}
    assert_skipped(tmp_path / "out", expected | {"0008-L.txt": "has 149 numbers a line, must be 150"})
    assert np.load(tmp_path / "out" / "labels.npy").tolist() == [4, 50, 0, 0, 0, 1]


# ------------------------------------------------------------------------------------ prepare.py: bad sources
class Evil:
    """A pickle of it runs a command when it is loaded carelessly."""

    def __reduce__(self):
        return os.system, ("touch evil",)


def make_folder(folder, name):
    (folder / name).mkdir()
    return folder


OTHER_JOINTS = "no recording could be read…has {} joints, must be 25; make a dataset folder with graph.json"
BAD_SOURCES = {  # command: (what to make first, what the one line must say)
    "nowhere.pkl out": (None, "nowhere.pkl: does not exist; check the path"),
    "ntu.tar.gz out": (write("ntu.tar.gz", "x"), "ntu.tar.gz: is an archive; unpack the archives"),
    "zips out": (lambda f: write("zips/s001.ZIP", "x")(make_folder(f, "zips")),
                 "zips: holds s001.ZIP; unpack the archives"),
    "texts out": (lambda f: write("texts/S001C001P001R001A001.skeleton.txt", "x")(make_folder(f, "texts")),
                  "texts: holds S001C001P001R001A001.skeleton.txt; give CTR-GCN's .npz, pyskl's"),
    "empty out": (lambda f: make_folder(f, "empty"), "empty: holds nothing; give CTR-GCN's .npz"),
    "a.mat out": (write("a.mat", "x"), "a.mat: is not a file in a known form; give CTR-GCN's .npz, "),
    "both out": (lambda f: write("a.skeleton", "")(write_agcn(f / "both")),
                 "both: holds ntu and agcn; …--kind chooses one"),
    "raw raw": (None, "raw: exists already"),
    "raw /proc/out": (None, "/proc/out: cannot be written (No such file or directory); choose another"),
    "raw out --frames 1": (None, "--frames 1 is out of range"),
    "raw out --kind avi": (None, "invalid choice: 'avi'"),
    "pku out --protocol xset": (None, "pku: cross-set.txt is missing; add it, or set --protocol"),
    "pku out": (remove("pku/Split/cross-subject.txt"), "pku: cross-subject.txt is missing; add it"),
    "one out": (lambda f: (f / "pku" / "Skeleton").rename(f / "one"), "one: cross-subject.txt is missing"),
    "pku out --exclude all.txt": (write("all.txt", "\n".join(NAMES)),
                                  "all.txt: names no recording of pku; write"),
    "NTU60_CS.npz out --protocol xview": (lambda f: write_ctrgcn(f / "NTU60_CS.npz"),
                                          "its name does not say protocol xview; leave out"),
    "x.npz out": (lambda f: np.savez(f / "x.npz", a=np.ones(3)), "x.npz/y_train.npy: cannot be read"),
    "xsub out --protocol xview": (lambda f: write_agcn(f / "xsub"), "is on the other side of xview; leave"),
    "empty out --kind ntu": (lambda f: (f / "empty").mkdir(), "empty: no recording could be read"),
    "raw out --exclude other.txt": (write("other.txt", "0002-L\nS001C001P001R001A009"),
                                    "other.txt: names no recording of raw; write names like S001C"),
    "NTU60_CS.npz out --exclude raw/all.txt": (
        lambda f: [write_ctrgcn(f / "NTU60_CS.npz"), write("raw/all.txt", NAMES[0])(f)],
        "all.txt: the samples of NTU60_CS.npz have no names; leave out"),
    "raw out --exclude all.txt": (write("all.txt", "\n".join(NAMES)), "all were excluded"),
    "xsub out": (lambda f: write("val_label.pkl", pickle.dumps(np.arange(3)))(write_agcn(f / "xsub")),
                 "val_label.pkl…names numpy…_reconstruct, which could run code"),
    "four out": (lambda f: write("val_label.pkl", pickle.dumps((NAMES, [1], [2])))(write_agcn(f / "four")),
                 "val_label.pkl: cannot be read as names and labels (must be a list of 1 names and a list of "
                 "1…; give the one that"),
    "few out": (lambda f: write("train_label.pkl", pickle.dumps((NAMES, [1])))(write_agcn(f / "few")),
                "train_label.pkl: cannot be read as…(must be a list of 4 names and a list of 4 labels"),
    "a.pkl out": (write("a.pkl", pickle.dumps({"split": {}, "annotations": [Evil()]})),
                  "a.pkl: cannot be read…names…system, which could run code"),
    "c.pkl out --protocol xset": (lambda f: write_pyskl(f / "c.pkl"),
                                  'c.pkl: cannot be read as xset of 3-D skeletons (must be {"split": {"xset_'
                                  "…; try another"),
    "e.pkl out": (write("e.pkl", pickle.dumps((NAMES, [0, 12, 59, 1, 6]))),
                  'e.pkl: …(must be {"split": {"xsub_train": names, "xsub_val": names}, "annotations": [{'),
    "f.pkl out": (lambda f: write_pyskl(f / "f.pkl", keypoint=np.ones((20, 25, 3))),
                  '"keypoint": (M, F, 25, 3)'),
    "20.npz out": (lambda f: write_ctrgcn(f / "20.npz", (NAMES, ROWS, recordings()[:, :, :, :20])),
                   OTHER_JOINTS.format(20)),
    "17 out": (lambda f: write_skeleton(make_folder(f, "17") / "17" / f"{NAMES[0]}.skeleton",
                                        recordings()[0, :, :, :17]), OTHER_JOINTS.format(17)),
    "a.npz out": (lambda f: write_npz(f / "a.npz", np.ones((5, 300, 100)), np.eye(60)[:5], ROWS),
                  "a.npz/x_train.npy: cannot be read…; give samples (F, 150) or (3, F, 25, M)"),
    "few.npz out": (lambda f: np.savez(f / "few.npz", x_train=np.ones((2, 9, 150)), y_train=np.eye(60)[:1],
                                       x_test=np.ones((1, 9, 150)), y_test=np.eye(60)[:1]),
                    "few.npz/x_train.npy: cannot be read (zip() …shorter…25, M), and a label each"),
    "55.npz out": (lambda f: write_npz(f / "55.npz", np.ones((5, 300, 150)), np.eye(55)[:5], ROWS),
                   "55.npz: its labels have 55 columns, must be [60, 120, 51, 1]; for other classes make"),
    "51.npz out": (lambda f: write_npz(f / "51.npz", np.ones((5, 3, 9, 25, 2)), np.full((5, 1), 51), ROWS),
                   "51.npz: labels are from 51 to 51, must be pku51's from 0 to 50; make a dataset folder"),
    "one.pkl out": (lambda f: write_pyskl(f / "one.pkl", label=1),
                    f"one.pkl: {NAMES[0]} has label 1; must be 0"),
    "d.pkl out": (lambda f: write_pyskl(f / "d.pkl", keypoint=np.ones((1, 20, 17, 2)), keypoint_score=1),
                  "d.pkl: …holds 2-D poses in pixels"),
}


@pytest.mark.parametrize("command", BAD_SOURCES)
def test_a_bad_source_is_one_line_and_exit_2(command, raw_ntu, raw_pku, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make, message = BAD_SOURCES[command]
    if make:
        make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["prepare.py", *command.split()])
    with ends_in_one_line(capsys, message):
        data.command_line(prepare.main)
    assert sorted(tmp_path.rglob("*")) == before                          # nothing half-written, no code ran


# ------------------------------------------------------------------------------------------ published recipes
def smie_pose(x, t, m):
    """Person m of x (3, T, V, M) in frame t, in SMIE's common frame, (3, V): each pose by itself."""
    pose = x[:, t, :, m] - x[:, t, 20:21, m]                              # joint 21, between the shoulders
    line = pose[:, 8] - pose[:, 4]                                        # left to right
    angle = math.atan2(line[2], line[0])
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]]) @ pose


def shiftgcn_pose(x, t, m):
    """The same in Shift-GCN's common frame: turned as the first person's first pose."""
    def onto(line, axis):                                                 # turn about the common normal
        normal, line = np.cross(line, axis), line / np.linalg.norm(line)
        normal, angle = normal / np.linalg.norm(normal), math.acos(line @ axis)
        c, s = math.cos(angle), math.sin(angle)
        K = np.cross(np.eye(3), normal)                                   # K @ v is normal × v
        return c * np.eye(3) + s * K + (1 - c) * np.outer(normal, normal)

    first = x[:, 0, :, 0]
    upwards = onto(first[:, 1] - first[:, 0], np.array([0, 0, 1.0]))
    sideways = onto(upwards @ (first[:, 8] - first[:, 4]), np.array([1.0, 0, 0]))
    return sideways @ upwards @ (x[:, t, :, m] - x[:, t, 1:2, 0])


@pytest.mark.parametrize("frame, plain", [("smie", smie_pose), ("shiftgcn", shiftgcn_pose)])
def test_published_frames_against_loops_in_float64(frame, plain):
    x = np.random.default_rng(0).normal(size=(2, 3, 6, 25, 2)).astype(np.float32)
    x[0, :, 4:, :, 1] = 0                                                 # the second person leaves
    y = zsar.to_common_frame(x, zsar.NTU25, frame)
    for n, t, m in itertools.product(range(2), range(6), range(2)):
        if x[n, :, t, :, m].any():
            np.testing.assert_allclose(y[n, :, t, :, m], plain(x[n].astype(np.float64), t, m), atol=1e-5)
        else:
            assert not y[n, :, t, :, m].any()


def test_the_published_shiftgcns_optimiser_against_the_plain_rule():
    """Nesterov's momentum in float64: g + 0.9 b, where b is the decayed sum of the gradients g."""
    settings, encoder = train.PUBLISHED_ENCODERS["shiftgcn"], zsar.ShiftGCN(5, 1, 60).double()
    assert abs(encoder.classifier.weight.std() / (2 / 60) ** 0.5 - 1) < 0.05
    assert encoder.units[0].temporal[2].bias.any() and not encoder.units[4].residual[0].bias.any()
    optimizer = train.make_optimizer(train.EncoderTraining(encoder, settings, fast=False), settings)
    assert len(optimizer.param_groups) == 3
    parameters = dict(encoder.named_parameters())
    plain, sums = {name: p.detach().clone() for name, p in parameters.items()}, dict.fromkeys(parameters, 0)
    for _ in range(3):
        for name, p in parameters.items():
            kind = re.sub(r"units\.\d\.", "", name)
            decay = {"spatial.weight": 1e-3, "spatial.mask": 0}.get(kind, 1e-4)
            p.grad = torch.randn_like(p)
            gradient = p.grad + decay * plain[name]
            sums[name] = 0.9 * sums[name] + gradient
            plain[name] -= 0.1 * (gradient + 0.9 * sums[name])
        optimizer.step()
    torch.testing.assert_close(parameters, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_optimisers_are_fused_on_cuda(optimizer, monkeypatch):
    made = []
    for name in ("Adam", "AdamW", "SGD"):
        monkeypatch.setattr(torch.optim, name, lambda *args, **options: made.append(options["fused"]))
    for is_cuda in (True, False):
        parameter = SimpleNamespace(is_cuda=is_cuda)
        model = SimpleNamespace(parameters=lambda: iter([parameter]),
                                named_parameters=lambda: iter([("fc.weight", parameter)]))
        for fused in (False, True):
            train.make_optimizer(model, LINE | {"optimizer": optimizer, "fused": fused})
    assert made == [True, True, None, True]                               # None: PyTorch chooses


def test_the_spread_over_other_noises(light_folder, tmp_path, capsys):
    result, _ = run_main(light_folder, tmp_path / "run", method="tdsm")
    trained = torch.load(tmp_path / "run" / "model.pt", weights_only=True)
    model = TDSM(trained["text"], 256, **trained["settings"]["model"])
    model.load_state_dict(trained["state"])
    d, accuracies = data.read_data(light_folder, "9_3"), []
    assert train.unseen_figures(model, torch.as_tensor(d.features), d)["acc"] == figures_of(result)["acc"]
    for seed in range(10):
        model.noises = torch.randn(model.noises.shape, generator=torch.Generator().manual_seed(seed))
        accuracies.append(train.unseen_figures(model, torch.as_tensor(d.features), d)["acc"])
    assert figures_of(result)["noise_std"] == pytest.approx(statistics.stdev(accuracies))
    assert "other noises    ± " in capsys.readouterr().out
    assert result["samples"] == {"train": 36, "seen_test": 36, "unseen_test": 12}


def test_a_text_of_one_prompt_leaves_the_sde_nothing_to_mix(light_folder, tmp_path):
    (light_folder / "text_description.npy").unlink()
    for method, note in (("dvta", True), ("ridge", False)):
        result, _ = run_main(light_folder, tmp_path / method, method=method)
        assert any("nothing to mix" in line for line in result["notes"]) == note


# -------------------------------------------------------------------------- train.py: one run from end to end
def test_the_command_line(tiny_folder, shallow_encoders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = "--epochs 2 --encoder-epochs 1 --device cpu --batch-size 8".split()
    command = ["--method", "dvta", "--split", "9_3", "--data", str(tiny_folder), *options]
    monkeypatch.setattr(sys, "argv", ["train.py", *command])
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    printed = capsys.readouterr()
    assert printed.err == "" and "SYNTHETIC" not in printed.out
    for part in ("encoder step 2/2, epoch 1  loss ", "dvta step 8/8, epoch 2  loss ", "ridge baseline",
                 "chance", "best on test", "Eat meal/snack",
                 "samples: 36 training, 36 seen test, 12 unseen test; seed 0; cpu, float32"):
        assert part in printed.out
    run = Path("runs/tiny_9_3_dvta_seed0_epochs-2_batch_size-8_encoder.epochs-1")
    assert {path.name for path in run.iterdir()} == {"result.json", "model.pt"}
    result = result_of(run)
    assert {"dataset", "seed", "device", "versions", "data_sha256"} <= result.keys()
    assert result["command"] == "python train.py " + shlex.join(command)
    assert (result["method"], result["split"], result["precision"]) == ("dvta", "9_3", "float32")
    assert result["note"] is None and result["notes"] == []
    zsl, best = figures_of(result), result["best_on_test"]
    assert zsl["n"] == sum(map(sum, zsl["confusion"])) == 12
    assert zsl["chance"] == 1 / 3 and 0 <= zsl["acc"] <= 1
    assert best["acc"] >= zsl["acc"] and best["epoch"] in (1, 2)
    assert [point["epoch"] for point in result["history"]] == [1, 2]
    assert result["seconds"].keys() == {"encoder", "train"}
    assert result["settings"].keys() == {"encoder", "ridge", "dvta"}


def test_a_synthetic_run_says_so(shallow_encoders, tmp_path, monkeypatch, capsys):
    """So does a run on its exported features."""
    whole, out = data.synthetic, tmp_path / "55_5"                        # a part of the set, for time
    monkeypatch.setattr(data, "synthetic", lambda text: whole(text, performers=2, repeats=3, frames=4))
    options = ["--gzsl", "--encoder-epochs", 1]
    result, _ = run_main("synthetic", tmp_path / "a", *options, "--export", out, method="ridge", split="55_5")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == lines[-1] == result["note"]
    assert "SYNTHETIC" in lines[0] and "say nothing about NTU" in lines[0]
    again, _ = run_main(out, tmp_path / "b", *options, "--val-data", tmp_path / "55_5_val", method="ridge",
                        split="55_5")
    assert again["note"] == result["note"] and again["dataset"] == result["dataset"] == "synthetic"
    assert again["figures"] == result["figures"] and again["settings"] == result["settings"]


def test_a_generalized_run(light_folder, tmp_path, capsys):
    result, _ = run_main(light_folder, tmp_path / "out" / "run", "--gzsl")
    generalized = {"seen", "unseen", "harmonic", "gamma", "ausuc", "curve"}
    assert result["figures"].keys() == {"dvta", "ridge"}
    for figures in result["figures"].values():
        assert figures.keys() > generalized and 0 < figures["ausuc"] < 1
    printed = capsys.readouterr()
    for part in ("validation run, to choose γ: dvta on mine", "7 seen and 2 validation classes"):
        assert part in printed.out
    assert printed.out.count("AUSUC") == 2
    assert f"note: {train.VALIDATION_NOTE}\n" == printed.err              # ready features
    assert result["encoder"] == {"seen_test_acc": None, "cached": False, "file": None}
    assert not (tmp_path / "out" / "encoders").exists()
    plain, _ = run_main(light_folder, tmp_path / "plain")
    zsl = {key: value for key, value in figures_of(result).items() if key not in generalized}
    assert plain["notes"] == [] and figures_of(plain) == zsl


def encoders_of(run):
    """The encoders in the cache beside a run, ordered by how many classes each was trained on."""
    files = sorted((run.parent / "encoders").iterdir())
    encoders = [torch.load(path, weights_only=True) | {"file": path.name} for path in files]
    return sorted(encoders, key=lambda encoder: len(encoder["state"]["classifier.bias"]))


def test_nothing_of_the_unseen_classes_reaches_the_weights(tiny_folder, tmp_path):
    """The leak test: other unseen samples and unseen text give bit-identical encoder and method weights."""
    changed, unseen, rng = tmp_path / "changed", [1, 5, 8], np.random.default_rng(0)
    shutil.copytree(tiny_folder, changed)
    rows = np.isin(np.load(changed / "labels.npy"), unseen)
    spoil("skeletons.npy", with_value(rows, rng.normal(size=(rows.sum(), 3, 4, 25, 1))))(changed)
    for name in ("text_label.npy", "text_description.npy"):
        text = np.load(changed / name)
        save(name, with_value(unseen, rng.normal(size=text[unseen].shape))(text))(changed)
    for method in ("dvta", "tdsm", "ridge"):
        options = [] if method == "ridge" else ["--lr", 0.003]
        for task in ("--gzsl", "--validate"):
            (result, weights), (other_result, other_weights) = (
                run_main(folder, tmp_path / name / method, task, *options, method=method, split="9_3_val5")
                for folder, name in ((tiny_folder, "a"), (changed, "b")))
            assert_same_weights(weights, other_weights)
            if task == "--validate":                                      # not even the figures see them
                assert result["figures"] == other_result["figures"]
                assert result["history"] == other_result["history"]
                continue
            figures, others = figures_of(result), figures_of(other_result)
            assert figures["gamma"] == others["gamma"]
            assert figures["confusion"] != others["confusion"] and figures["curve"] != others["curve"]
    encoders, others = (encoders_of(tmp_path / name / "run") for name in "ab")
    sizes = [len(encoder["state"]["classifier.bias"]) for encoder in encoders]
    assert sizes == [4, 9]                                                # --validate's is that of --gzsl
    for encoder, other in zip(encoders, others, strict=True):
        assert_same_weights(encoder["state"], other["state"])
        assert not torch.equal(encoder["features"], other["features"])


def test_validate_is_a_run_whose_unseen_classes_are_the_validation_ones(light_folder, tmp_path, capsys):
    """The same figures as on a folder of the training samples only, without the unseen classes."""
    d = data.read_data(light_folder, "9_3")
    val, folder = data.validation_of(d), tmp_path / "other"
    unseen = np.searchsorted(d.seen, val.unseen).tolist()
    folder.mkdir()
    arrays = {"features": d.features[d.train], "training": np.isin(d.train, val.train),
              "labels": np.searchsorted(d.seen, d.labels[d.train]),       # class ids without the unseen
              "text_label": d.text[0][d.seen], "text_description": d.text[1][d.seen]}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    write("classes.txt", "\n".join(d.classes[c] for c in d.seen))(folder)
    write("splits.json", json.dumps({"7_2": {"unseen": unseen}}))(folder)
    for method in ("dvta", "tdsm", "ridge"):
        result, weights = run_main(light_folder, tmp_path / method, "--validate", method=method)
        printed = capsys.readouterr().out
        for part in ("7 seen and 2 validation classes", "8 validation test", "of 2 validation classes"):
            assert part in printed
        assert "best on test" not in printed and result["best_on_test"] is None
        expected, same = run_main(folder, tmp_path / f"{method}_2", method=method, split="7_2")
        assert ("best on test" in capsys.readouterr().out) == (method != "ridge")
        assert figures_of(result)["n"] == 8 and result["validate"] and not expected["validate"]
        for key in ("figures", "unseen_classes"):
            assert result[key] == expected[key]
        for key in weights:                                               # gradients are summed otherwise
            torch.testing.assert_close(weights[key], same[key], rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------- train.py: encoder, method
def test_the_encoder_cache_hits_and_misses(tiny_folder, shallow_encoders, tmp_path):
    folder, graph = tmp_path / "data", zsar.NTU25
    shutil.copytree(tiny_folder, folder)

    def cached(*options, method="ridge", split="9_3"):
        options = ["--encoder-epochs", 1, *options]
        result, _ = run_main(folder, tmp_path / "runs" / "x", *options, method=method, split=split)
        return result["encoder"]["cached"]

    assert not cached()
    assert cached()
    assert cached("--set", "margin=2", "noises=1", method="tdsm")         # any method, whatever its settings
    assert not cached("--seed", 1)
    assert not cached("--encoder", "shiftgcn")
    assert not cached(split="10_2")
    assert not cached("--set", "encoder.label_smoothing=0.2")
    spoil("text_label.npy", lambda a: a[::-1])(folder)
    assert cached()                                                       # the encoder never reads text
    spoil("skeletons.npy", with_value((0, 0, 0, 0, 0), 0.25))(folder)
    assert not cached()
    spoil("labels.npy", with_value(0, 2))(folder)
    assert not cached()
    for thumb, hit in (((21, 22), True), ((21, 7), False)):               # built in, and another parent
        edges = [thumb if edge == (21, 22) else edge for edge in graph.edges]
        write("graph.json", json.dumps(graph._asdict() | {"edges": edges}))(folder)
        assert cached() == hit
    assert len(list((tmp_path / "runs" / "encoders").iterdir())) == 8


def test_published_training_of_the_encoders(tiny_folder, shallow_encoders, tmp_path, monkeypatch):
    """Training without augmentation, generalized figures and predict."""
    monkeypatch.setattr(train, "augmented", None)                         # a call would fail
    d = data.read_data(tiny_folder, "9_3")
    for name, settings in train.PUBLISHED_ENCODERS.items():
        options = ["--encoder", name, "--encoder-preset", "published", "--encoder-epochs", 1, "--gzsl"]
        run = tmp_path / name
        result, _ = run_main(tiny_folder, run, *options, method="ridge")
        assert result["settings"]["encoder"] == settings | {"epochs": 1}
        assert settings["name"] == name and not settings["augment"]
        trained = torch.load(run / "model.pt", weights_only=True)["encoder"]
        features = torch.load(trained["file"], weights_only=True)["features"][d.seen_test]
        logits = F.linear(features, *(trained["state"][f"classifier.{part}"] for part in ("weight", "bias")))
        outputs = d.seen if settings["all_classes"] else np.arange(9)     # those of the seen classes
        hits = d.seen[logits[:, outputs].argmax(1)] == d.labels[d.seen_test]
        assert trained["seen_test_acc"] == result["encoder"]["seen_test_acc"] == pytest.approx(hits.mean())
        assert ("units.0.spatial.mask" in trained["state"]) == (name == "shiftgcn")
        assert logits.shape == (36, 12 if settings["all_classes"] else 9)
        assert trained["frame"] == settings["frame"] == {"stgcn": "smie", "shiftgcn": "shiftgcn"}[name]
        rows = predictions_of(run, tiny_folder)
        assert len(rows) == 96 and all(row[1] in d.classes for row in rows)
    adam = train.make_optimizer(torch.nn.Linear(1, 1), train.PUBLISHED_ENCODERS["stgcn"])
    assert (type(adam), adam.defaults["weight_decay"]) == (torch.optim.Adam, 0.0)


def write_code(module, folder, *places):
    """Write a module's source with a word inserted after each of these texts into a folder → its path."""
    source = (ROOT / f"{module.__name__}.py").read_text(encoding="utf-8")
    for place in places:
        assert place in source
        source = source.replace(place, f"{place}edited, ")
    path = folder / f"{module.__name__}.py"
    path.write_text(source, encoding="utf-8")
    return path


ENCODER, TDSM_TRAINING = ["train_encoder"], ["train_method", "TDSM"]
REACHED_CODE = {  # of what, in which module: (entries, places of no matter to a training, places that matter)
    "an encoder in zsar": (
        ENCODER, ["\n# ---", 'class STGCN(nn.Module):\n    """', "class Ridge(", "def best_gamma("],
        ["class STGCN(", "class GraphConv(", "class ShiftUnit(", "def forward(", "def augmented(",
         "def to_common_frame(", "def recalibrate_batch_norm(", "\nFEATURES = "]),
    "an encoder in train": (
        ENCODER, ["\n# ---", 'class EncoderTraining(nn.Module):\n    """', "def main(", "\nPRESETS = "],
        ["def fit(", "optimizer.step(", "def lr_factor(", "def make_optimizer(", "def random_batches(",
         "def forward(", "def encode_all("]),
    "a method in diffusion": (
        TDSM_TRAINING, ["\n# ---", 'class TDSM(nn.Module):\n    """'],
        ["class TDSM(", "class CrossDiT(", "def triplet_loss(", "def split_heads(", "\nSTEPS = "]),
    "a method in train": (
        TDSM_TRAINING, ["\n# ---", "def report(", "def encode(", "def experiment(", "\nPRESETS = "],
        ["def train_method(", "def build(", "def fit(", "optimizer.step(", "def lr_factor("]),
    "a method in zsar": (TDSM_TRAINING, ["class STGCN(", "class Ridge(", "def zsl_figures("], []),
}


@pytest.mark.parametrize("case", REACHED_CODE)
def test_code_that_a_training_reaches(case, tmp_path, monkeypatch):
    entries, harmless, others = REACHED_CODE[case]
    module, code = sys.modules[case.split()[-1]], train.code_reached({"x": entries})
    monkeypatch.setattr(module, "__file__", str(write_code(module, tmp_path, *harmless)))
    assert train.code_reached({"x": entries}) == code
    for place in others:
        write_code(module, tmp_path, place)
        assert train.code_reached({"x": entries}) != code, place


def test_source_files_edited_during_a_run(tiny_folder, tmp_path, monkeypatch):
    """The run ends as if they had not been, and its encoder is kept under the key of the code that ran."""
    code, out = tmp_path / "code", tmp_path / "runs" / "run"
    code.mkdir()
    for name in ("alignment", "data", "diffusion", "train", "zsar"):
        shutil.copy(ROOT / f"{name}.py", code)
    (code / "text").symlink_to(ROOT / "text")
    command = least(tiny_folder, out, "--encoder-epochs", 4, method="tdsm")
    process = subprocess.Popen([sys.executable, code / "train.py", *command], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert any(line.startswith("encoder step") for line in process.stdout), process.stderr.read()
    (code / "zsar.py").write_text("def broken(:")
    (code / "train.py").write_text("")
    (code / "diffusion.py").unlink()
    printed, (_, error) = process.stdout.read(), process.communicate()
    assert process.returncode == 0 and error == ""
    assert "encoder step 8/8" in printed and "tdsm step 1/4" in printed
    first = result_of(out)["encoder"]
    for place, same in (("def augmented(", False), ("class Ridge(", True)):
        monkeypatch.setattr(zsar, "__file__", str(write_code(zsar, code, place)))
        result, _ = run_main(tiny_folder, out, "--encoder-epochs", 4, method="ridge")
        assert (result["encoder"] == first | {"cached": True}) == same
        assert (result["encoder"]["file"] == first["file"]) == result["encoder"]["cached"] == same


@pytest.mark.parametrize("where", ["at once", "in the first call"])
def test_without_a_compiler_functions_run_as_they_are(where, monkeypatch, capsys):
    tries = []

    def fast(x):
        tries.append(x)
        raise RuntimeError("Cannot find a working triton installation\nmore")

    monkeypatch.setattr(torch, "compile", fast if where == "at once" else lambda function: fast)
    double = train.compiled(lambda x: 2 * x)
    assert [double(x) for x in range(5)] == [0, 2, 4, 6, 8]
    assert len(tries) == 1                                                # none after the failure
    note = "note: .*RuntimeError: Cannot find a working triton installation.*\n"         # one line
    assert re.fullmatch(note, capsys.readouterr().err)


@pytest.mark.parametrize("error", [ZeroDivisionError("by zero"), RuntimeError("Expected one of cpu, cuda"),
                                   torch.OutOfMemoryError("no memory in compiled code")], ids=repr)
def test_errors_of_a_compiled_function_itself(error, monkeypatch, capsys):
    """They are not taken for the lack of a compiler."""
    def fast(x):
        if x == 0:
            raise error
        return x

    monkeypatch.setattr(torch, "compile", lambda function: fast)
    call = train.compiled(lambda x: "slow")
    for _ in range(2):                                                    # in the first call, and later
        with pytest.raises(type(error)):
            call(0)
        assert call(2) == 2
    assert capsys.readouterr().err == ""


# -------------------------------------------------------------------------------- train.py: the training loop
@pytest.mark.parametrize("epochs, least, most, expected", [
    (3, 1, None, 30), (0, 7, 7, 7), (3, 10, 20, 20), (3, 50, 90, 50), (3, 10, 90, 30)])
def test_the_length_of_a_training(epochs, least, most, expected):
    settings = {"epochs": epochs, "min_steps": least, "max_steps": most}
    assert train.num_steps(settings, per_epoch=10) == expected


def test_warm_up_then_cosine():
    settings = {"warm_up": 0.15, "epochwise": False, "decay_at": []}
    factors = [train.lr_factor(step, 100, 10, settings) for step in range(101)]
    assert factors[0] == 1 / 16 and factors[14] == 15 / 16 and factors[15] == 1.0
    assert factors[15 + 42] == pytest.approx(0.5 * (1 + math.cos(math.pi * 42 / 85)))
    assert factors[100] == pytest.approx(0)
    steps = np.diff(factors)
    assert (steps[:15] > 0).all() and (steps[15:] < 0).all()
    assert factors == [train.lr_factor(step, 100, 10, settings | {"warm_up": 15.0}) for step in range(101)]
    assert train.DVTA_PAPER["keep_last"] and train.PUBLISHED_ENCODERS["stgcn"]["keep_last"]
    epochwise = [train.lr_factor(step, 100, 10, train.DVTA_PAPER) for step in range(100)]
    assert epochwise == np.repeat(factors[:100:10], 10).tolist()


class Line(torch.nn.Linear):
    """A model whose loss is a straight line's mean square; it keeps the rows that it was called with."""

    def __init__(self):
        super().__init__(4, 1)
        self.calls = []

    def forward(self, x, y):
        self.calls.append(y.tolist())
        return super().forward(x).square().mean(), {}


LINE = {"epochs": 3, "min_steps": 1, "max_steps": None, "batch_size": 4, "optimizer": "adam", "fused": False,
        "lr": 0.1, "weight_decay": 0.0, "warm_up": 0.0, "decay_at": [], "epochwise": False,
        "keep_last": False}


def samples_of(count):
    """count samples of 4 features, with their row numbers for labels."""
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(0)), torch.arange(count)


@pytest.mark.parametrize("name, expected", [
    ("shiftgcn", [0.1] * 120 + [0.01] * 40 + [0.001] * 40 + [0.0001] * 80),     # by ten at epochs 60, 80, 100
    ("stgcn", [0.0025 * (1 + math.cos(math.pi * (step // 2) / 150)) for step in range(300)])])
def test_learning_rates_of_the_published_encoders(name, expected, tmp_path):
    rates, settings = [], train.PUBLISHED_ENCODERS[name]
    samples = samples_of(2 * settings["batch_size"])                      # two steps an epoch
    hook = register_optimizer_step_post_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    train.fit(Line(), samples, samples[1], settings, tmp_path / "line.pt")
    hook.remove()
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("keep_last, sizes", [(False, [4, 4]), (True, [4, 4, 2])])
def test_each_epoch_is_a_new_order_of_the_training_rows(keep_last, sizes, tmp_path):
    model, rows = Line(), torch.arange(0, 20, 2)
    log = train.fit(model, samples_of(20), rows, LINE | {"keep_last": keep_last}, tmp_path / "line-x.pt")
    assert [len(batch) for batch in model.calls] == 3 * sizes
    batches = iter(model.calls)
    epochs = [sum((next(batches) for _ in sizes), []) for _ in range(3)]
    assert all(set(s) <= set(rows.tolist()) and len(set(s)) == sum(sizes) for s in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [point["epoch"] for point in log["history"]] == [1, 2, 3] and not model.training


def test_checkpoints_take_a_twentieth_of_the_time_at_most(tmp_path, monkeypatch):
    """A step takes 1 s here, a checkpoint 10 s: the first after a minute, the next 200 s after the last."""
    clock, written, model = [0.0], [], Line()

    def save(path, model, optimizer, progress):
        written.append((clock[0], *progress[:2]))
        clock[0] += 10

    def forward(x, y):
        clock[0] += 1
        return Line.forward(model, x, y)

    monkeypatch.setattr(train.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(train, "save_checkpoint", save)
    model.forward = forward
    train.fit(model, samples_of(4), torch.arange(4), LINE | {"epochs": 300}, tmp_path / "line-x.pt")
    assert written == [(61, 61, 61), (272, 262, 272), (320, 300, 320)]    # the clock, the step, seconds


def test_the_caller_keeps_their_random_state():
    before = torch.get_rng_state()
    with train.seeded(0, torch.device("cpu")):
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)


# ----------------------------------------------------------------------- train.py: the run's folder, resuming
@pytest.fixture(scope="session")
def forked(tmp_path_factory):
    """→ a function that runs another in a process of its own; → the process, its two files of output.

    The process need not load PyTorch again: it is forked from one that has.
    """
    context, folder = multiprocessing.get_context("forkserver"), tmp_path_factory.mktemp("forked")
    context.set_forkserver_preload([__name__, "torch._dynamo"])           # an optimiser imports that
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        multiprocessing.forkserver.ensure_running()

    def start(function, *args):
        files = [Path(tempfile.mkstemp(dir=folder)[1]) for _ in range(2)]
        process = context.Process(target=with_output_in, args=(files, function, *args))
        process.start()
        return process, *files

    return start


def with_output_in(files, function, *args):
    for number, path in enumerate(files, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    function(*args)


def stopped(forked, command, pattern, count, sign=signal.SIGKILL):
    """Train in another process, stopped as it writes the count-th file of a pattern → what it printed."""
    process, printed, error = forked(train_until_stopped, command, pattern, count, sign)
    process.join()
    assert process.exitcode == (130 if sign == signal.SIGINT else -sign), error.read_text()
    if sign == signal.SIGINT:                                             # one line
        assert re.fullmatch("interrupted; repeat the command to resume\n", error.read_text())
    return printed.read_text()


def train_until_stopped(command, pattern, left, sign):
    """Train with a checkpoint at every step, and send a signal to oneself at the `left`-th file."""
    train.CHECKPOINT_SECONDS, train.CHECKPOINT_SHARE, real = -1, math.inf, os.replace
    signal.signal(signal.SIGINT, signal.default_int_handler)              # `nohup … &` leaves it ignored

    def replace(part, path):
        nonlocal left
        left -= fnmatch.fnmatch(os.path.basename(path), pattern)
        if not left:                                                      # written, and not yet renamed
            sys.stdout.flush()
            os.kill(os.getpid(), sign)
        real(part, path)

    os.replace = replace
    train.main(command)


def test_a_run_stopped_in_each_phase_is_the_same_in_the_end(tiny_folder, tmp_path, forked, capsys):
    """kill -9 in both encoders' training, in TDSM's, at the end; Ctrl-C: the same command, the same bits."""
    options = ["--gzsl", "--set", "epochs=3", "batch_size=9"]             # TDSM: 4 steps an epoch
    whole, weights = run_main(tiny_folder, tmp_path / "whole" / "run", *options, method="tdsm")
    assert "resuming" not in capsys.readouterr().out
    out = tmp_path / "stopped" / "run"
    command = least(tiny_folder, out, *options, method="tdsm")
    stops = [  # the file it is stopped at, at which time, how, where the next one then resumes
        ("encoder-*.pt", 3, signal.SIGKILL, "encoder: resuming at step 2 of 4, from "),
        ("tdsm-*.pt", 4, signal.SIGKILL, "tdsm: resuming at step 3 of 12, from "),
        ("tdsm-*.pt", 4, signal.SIGINT, "tdsm: resuming at step 6 of 12, from "),
        ("encoder-*.pt", 2, signal.SIGKILL, "encoder: resuming at step 1 of 2, from "),  # in validation
        ("model.pt", 1, signal.SIGKILL, "tdsm: resuming at step 12 of 12, from "),
        ("result.json", 1, signal.SIGKILL, "tdsm: resuming at step 12 of 12, from "),
    ]
    resumes = ""
    for pattern, count, sign, next_resumes in stops:
        assert resumes in stopped(forked, command, pattern, count, sign)
        resumes = next_resumes
        assert not (out / "result.json").exists()
        assert (out / "model.pt").exists() == (pattern == "result.json")
        files = list((tmp_path / "stopped").rglob("*.pt"))
        assert files and all(torch.load(path, weights_only=True) for path in files)
    train.main(command)
    printed, best = capsys.readouterr().out, whole["best_on_test"]["acc"]
    assert resumes in printed and "tdsm: resuming at step 6 of 6, from " in printed     # validation's
    assert best == max(point["acc_on_test"] for point in whole["history"])
    assert without_times(result_of(out)) == without_times(whole)
    assert result_of(out)["seconds"]["train"] > 0
    assert_same_weights(weights_of(out), weights)
    assert {path.name for path in out.iterdir() if path.suffix != ".part"} == {"result.json", "model.pt"}
    for one, two in zip(encoders_of(tmp_path / "whole" / "run"), encoders_of(out), strict=True):
        assert one["file"] == two["file"] and torch.equal(one["features"], two["features"])
        assert_same_weights(one["state"], two["state"])


def test_several_seeds(tiny_folder, shallow_encoders, tmp_path, forked, capsys):
    many, out, options = tmp_path / "many", tmp_path / "stopped", ["--gzsl", "--encoder-epochs", 1]
    train.main(least(tiny_folder, many, *options, "--seed", 3, "--seeds", 2, method="tdsm"))
    assert "tdsm, seeds 3 to 4: mean ± standard deviation" in capsys.readouterr().out
    assert {path.name for path in many.iterdir()} == {"seed3", "seed4", "result.json"}
    assert len(list((tmp_path / "encoders").iterdir())) == 4              # each seed's, each validation run's
    result = result_of(many)
    summary, (first, second) = result["summary"], result["seeds"]
    assert not first["encoder"]["cached"] and first["seconds"]["encoder"] > 0
    one, weights = run_main(tiny_folder, tmp_path / "one", *options, "--seed", 4, method="tdsm")
    assert second == result_of(many / "seed4")
    assert without_times(second) == without_times(one)
    assert_same_weights(weights_of(many / "seed4"), weights)
    assert not torch.equal(weights_of(many / "seed3")["denoiser.position"], weights["denoiser.position"])
    assert summary.keys() == {f"{method} {figure}" for method in ("tdsm", "ridge")
                              for figure in ("acc", "seen", "unseen", "harmonic", "ausuc")}
    assert summary["tdsm acc"]["each"] == [figures_of(run)["acc"] for run in result["seeds"]]
    each = [run["figures"]["ridge"]["ausuc"] for run in result["seeds"]]
    mean, std = pytest.approx(statistics.mean(each)), pytest.approx(statistics.stdev(each))
    assert summary["ridge ausuc"] == {"mean": mean, "std": std, "each": each}
    # the same, stopped in the second seed
    command = least(tiny_folder, out, *options, "--seed", 3, "--seeds", 2, method="tdsm")
    stopped(forked, command, "tdsm-*.pt", 11)                             # eight of the first seed
    assert (out / "seed3" / "result.json").exists()
    assert not (out / "seed4" / "result.json").exists() and not (out / "result.json").exists()
    train.main(command)
    printed = capsys.readouterr().out
    assert "tdsm: resuming at step 4 of 4" in printed and "tdsm: resuming at step 2 of 4" in printed
    assert result_of(out)["summary"] == summary
    for seed in ("seed3", "seed4"):
        assert_same_weights(weights_of(out / seed), weights_of(many / seed))
        assert without_times(result_of(out / seed)) == without_times(result_of(many / seed))


def test_a_finished_run_is_overwritten_with_force_only(light_folder, tmp_path, monkeypatch, capsys):
    """A folder may also hold the files of others, which stay as they are."""
    monkeypatch.chdir(tmp_path)
    Path("checkpoints").mkdir()
    for path in ("film.mkv.part", "checkpoints/mine.pt", "model.pt"):
        Path(path).write_text("mine")
    run = least(light_folder, ".", method="ridge")

    def refused(folder, *command):
        before = contents_of(tmp_path)
        with ends_in_one_line(capsys, f"{folder}: holds a finished run; give --force to overwrite it, or"):
            train.main(command)
        assert contents_of(tmp_path) == before

    refused(".", *run)                                                    # somebody's model.pt
    Path("model.pt").unlink()
    train.main(run)
    written = contents_of(tmp_path)
    refused(".", *run, "--set", "penalty=1")
    refused(".", *run, "--seeds", "2")
    train.main([*run, "--force", "--set", "penalty=1"])
    assert result_of(Path())["settings"]["ridge"]["model"]["penalty"] == 1.0
    changed = contents_of(tmp_path).items() - written.items()
    assert {path for path, _ in changed} == {"model.pt", "result.json"}
    # several seeds take all their folders, or none
    train.main(least(light_folder, "many/seed1", method="ridge"))
    many = least(light_folder, "many", "--seeds", 2, method="ridge")
    refused("many/seed1", *many)
    Path("many", train.UNFINISHED).mkdir()                                # of a run with other seeds
    refused("many/seed1", *many)


def test_a_run_started_twice_at_once_is_refused(light_folder, tmp_path, forked, capsys):
    out = tmp_path / "run"
    command = least(light_folder, out, "--force", method="tdsm")
    first, *_ = forked(train_until_stopped, command, "tdsm-*.pt", 2, signal.SIGSTOP)
    try:
        while len(list(out.rglob("tdsm-*"))) < 2:                         # a checkpoint, and half of the next
            assert first.is_alive()
            time.sleep(0.05)
        before = sorted(tmp_path.rglob("*"))
        with ends_in_one_line(capsys, f"{out}: another process is training there; wait for it, or give"):
            train.main(command)
        assert sorted(tmp_path.rglob("*")) == before
    finally:
        first.kill()                                                      # a killed one locks nothing
        first.join()
    train.main(command)
    assert "tdsm: resuming at step 1 of 4" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"result.json", "model.pt"}


def test_other_settings_start_from_scratch_in_an_unfinished_run(light_folder, tmp_path, forked, capsys):
    out, unfinished = tmp_path / "run", tmp_path / "unfinished"
    stopped(forked, least(light_folder, unfinished, method="tdsm"), "tdsm-*.pt", 3)

    def resumes(*options):
        shutil.copytree(unfinished, out, dirs_exist_ok=True)
        train.main(least(light_folder, out, *options, method="tdsm"))
        return "resuming at step 2 of 4" in capsys.readouterr().out

    assert resumes()
    one_text = ["--text", light_folder / "text_label.npy"]
    for change in (["--lr", 0.01], ["--seed", 1], ["--set", "margin=2"], one_text):
        assert not resumes(*change)
    spoil("features.npy", lambda x: x + 0.1 * (np.arange(256) == 3))(light_folder)    # other data
    assert not resumes()
    _, fresh = run_main(light_folder, tmp_path / "fresh", method="tdsm")
    assert_same_weights(weights_of(out), fresh)


def test_a_checkpoint_of_another_version_is_one_line(light_folder, tmp_path, forked, capsys):
    command = least(light_folder, tmp_path / "run", method="tdsm")
    stopped(forked, command, "tdsm-*.pt", 3)
    checkpoint, = tmp_path.rglob("tdsm-*.pt")
    saved = torch.load(checkpoint, weights_only=True)
    saved["model"]["other"] = saved["model"].pop("denoiser.position")
    torch.save(saved, checkpoint)
    with ends_in_one_line(capsys, f"{checkpoint}: cannot be read (…another version wrote it; remove it",
                          silent=False):
        train.main(command)


def test_a_damaged_checkpoint_or_encoder_is_one_line(tiny_folder, shallow_encoders, tmp_path, capsys):
    command = least(tiny_folder, tmp_path / "run", "--encoder-epochs", 1, "--force", method="ridge")
    train.main(command)
    encoder, = (tmp_path / "encoders").iterdir()
    checkpoint = tmp_path / "run" / train.UNFINISHED / f"encoder-{encoder.name}"
    keys = {encoder: "features, seen_test_acc", checkpoint: "model, optimizer, progress, random"}
    for path, lacks in keys.items():
        torch.save({"state": {}}, path)
        with ends_in_one_line(capsys, f"{path}: cannot be read (it lacks {lacks};…remove it", silent=False):
            train.main(command)
        path.unlink()                                                     # the remedy
    train.main(command)


# --------------------------------------------------------------------------------- train.py: many processes
def train_in_two_processes(forked, command, *stop):
    """Start both as torchrun does; stop: the file at which the second one is killed, and at which time."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return [forked(train_as_one_of_two, rank, port, command, *stop) for rank in range(2)]


def train_as_one_of_two(rank, port, command, *stop):
    os.environ.update(TORCHELASTIC_RUN_ID="test", WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if rank and stop:
        train_until_stopped(command, *stop, signal.SIGKILL)
    else:
        train.main(command)


def test_two_processes_share_out_the_seeds(tiny_folder, tmp_path, forked):
    """Each seed is the training of one process, bit for bit, also when one is killed and all run again."""
    options = ["--seeds", 3, "--seed", 1, "--encoder-epochs", 1, "--gzsl"]
    one, two = tmp_path / "one" / "run", tmp_path / "two" / "run"
    train.main(least(tiny_folder, one, *options, method="tdsm"))
    command = least(tiny_folder, two, *options, method="tdsm")
    (first, _, _), (second, _, _) = train_in_two_processes(forked, command, "tdsm-*.pt", 3)
    second.join()
    first.kill()                                                          # as torchrun does when one fails
    assert second.exitcode == -signal.SIGKILL
    assert not (two / "seed2" / "result.json").exists() and not (two / "result.json").exists()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}       # the same bits
    done = subprocess.run([*launcher, ROOT / "train.py", *command], capture_output=True, text=True,
                          env=environment)
    assert done.returncode == 0, done.stderr
    starts = {"tdsm on tiny": 2, "tdsm, seeds 1 to 3: mean": 1, f"written: {two / 'result.json'}": 1}
    for start, count in starts.items():                                   # the first process has two seeds
        assert sum(line.startswith(start) for line in done.stdout.splitlines()) == count
    assert result_of(two)["summary"] == result_of(one)["summary"]
    for seed in ("seed1", "seed2", "seed3"):
        assert without_times(result_of(two / seed)) == without_times(result_of(one / seed))
        assert_same_weights(weights_of(two / seed), weights_of(one / seed))
        assert not (two / seed / train.UNFINISHED).exists()
    assert [without_times(result) for result in result_of(two)["seeds"]] == [
        without_times(result) for result in result_of(one)["seeds"]]


@pytest.mark.parametrize("options, message, count", [
    ([], "--seeds 1: there are 2 processes; give a seed to each", 1),     # printed by the first process
    (["--seeds", 2, "--split", "nine"], "has no split 'nine'", 1),
    (["--seeds", 2, "--lr", "1e30", "--epochs", 9], "the loss is not finite; lower", 2)], ids=str)
def test_a_mistake_in_two_processes(options, message, count, light_folder, tmp_path, forked):
    processes = train_in_two_processes(forked, least(light_folder, tmp_path / "run", *options))
    for rank, (process, _, error) in enumerate(processes):
        process.join()
        errors = [line for line in error.read_text().splitlines() if line.startswith("error: ")]
        assert process.exitcode == 2
        assert len(errors) == (rank < count) and all(message in line for line in errors)


# ------------------------------------------------------------------------------------------ train.py: predict
MORE_STEPS = {"dvta": (), "tdsm": ("--steps", 30, "--lr", 0.01), "ridge": ()}     # few leave near ties


@pytest.fixture(scope="session")
def finished_runs(tiny_folder, tmp_path_factory):
    """A generalized run of each method on the tiny folder, with exported features: {method: its folder}."""
    out = tmp_path_factory.mktemp("runs")
    for method, more in MORE_STEPS.items():
        options = ["--gzsl", "--export", out / f"{method}_features", *more]
        run_main(tiny_folder, out / method, *options, method=method)
    return {method: out / method for method in MORE_STEPS}


@pytest.mark.parametrize("method", ["dvta", "tdsm", "ridge"])
def test_predict_among_classes_named_only_now(method, finished_runs, tiny_folder, tmp_path, capsys):
    """The split's unseen classes, in another order and by text alone, give the figures of the run itself."""
    run, d = finished_runs[method], data.read_data(tiny_folder, "9_3")
    order, names = [8, 1, 5], ["zeta", "alpha, beta", "gamma"]
    one, *files = (tmp_path / f"{name}.npy" for name in ("one", "new_label", "new_description"))
    for path, text in zip(files, d.text):
        np.save(path, text[order])
    files[0].with_suffix(".txt").write_text("\n".join(names))
    rows = predictions_of(run, tiny_folder, "--classes", *map(str, files))
    hits = [rows[n][1] == names[order.index(d.labels[n])] for n in d.unseen_test]
    assert sum(hits) / len(hits) == pytest.approx(figures_of(run)["acc"])
    assert [row[0] for row in rows] == [f"row {n}" for n in range(96)]
    for _, name, _, margin, top5 in rows:
        best_first = top5.split(" | ")
        assert float(margin) >= 0 and best_first[0] == name and set(best_first) == set(names)
    assert f"{method}: 96 sequences among 3 classes" in capsys.readouterr().out
    np.save(one, np.ones((1, 768), np.float32))                           # a class, a file for both prompts
    rows = predictions_of(run, tiny_folder, "--classes", str(one))
    assert {(row[1], row[3], row[4]) for row in rows} == {("class 0", "", "class 0")}


def test_predict_of_skeleton_files(finished_runs, tiny_folder, tmp_path, capsys):
    """In a folder, in folders below, under any name, or a single one; broken ones are skipped with a note."""
    run, x, raw = finished_runs["tdsm"], np.load(tiny_folder / "skeletons.npy"), tmp_path / "raw"
    (raw / "deep" / "er").mkdir(parents=True)
    paths = [raw / "a.skeleton", raw / "deep" / "b.skeleton", raw / "deep" / "er" / "c.SKELETON"]
    for n, path in enumerate(paths):
        write_skeleton(path, x[n])
    (raw / "z.skeleton").write_text("3\n")
    all_rows = predictions_of(run, tiny_folder)
    rows = predictions_of(run, raw) + predictions_of(run, paths[1])
    assert "1 of 4 files skipped; z.skeleton: " in capsys.readouterr().err
    assert [row[0] for row in rows] == [path.name for path in [*paths, paths[1]]]
    for row, other in zip(rows, [*all_rows[:3], all_rows[1]], strict=True):
        assert row[1] == other[1]
        assert float(row[2]) == pytest.approx(float(other[2]), rel=1e-4)
    assert len(rows[0][4].split(" | ")) == 5


def test_predict_of_arrays(finished_runs, tiny_folder, light_folder, tmp_path, capsys):
    """A .npy of skeletons or features, by itself: ztest.npy of a published folder among them."""
    run, features_run = finished_runs["ridge"], tmp_path / "run"
    x, features = np.load(tiny_folder / "skeletons.npy"), np.load(light_folder / "features.npy")
    np.save(tmp_path / "some.npy", x[5:9].astype(np.float16))
    np.save(tmp_path / "two.npy", np.concatenate([x[5:9], x[:4]], 4))      # a person more than in training
    all_rows = predictions_of(run, tiny_folder)
    for name in ("some.npy", "two.npy"):
        rows = predictions_of(run, tmp_path / name)
        assert [row[:2] for row in rows] == [[f"row {n}", all_rows[n + 5][1]] for n in range(4)]
    run_main(light_folder, features_run, method="ridge")
    capsys.readouterr()
    whole = predictions_of(features_run, light_folder)[7:10]
    assert "note: the run has no γ, so seen classes are favoured; train" in capsys.readouterr().err
    np.save(tmp_path / "ztest.npy", features[7:10, :, None, None])
    rows = predictions_of(features_run, tmp_path / "ztest.npy")
    assert [(row[1], row[4]) for row in rows] == [(row[1], row[4]) for row in whole]
    assert [float(row[2]) for row in rows] == pytest.approx([float(row[2]) for row in whole])
    with ends_in_one_line(capsys, "has skeletons of 25 joints; this run takes features of width 256"):
        predictions_of(features_run, tiny_folder)


def test_predict_cuts_text_that_the_method_does_not_read(finished_runs, light_folder, tmp_path, capsys):
    """DVTA and TDSM's pooled condition read no tokens; a run on pooled text never has; else they must fit."""
    new, pooled, pooled_run, token_run = (tmp_path / name for name in ("new.npy", "pooled.npy", "a", "b"))
    np.save(new, NEW_TEXT)                                                # 39 token rows
    np.save(pooled, NEW_TEXT[:, 0])
    options = ["--set", "conditions=both"]
    run_main(light_folder, token_run, *options, method="tdsm")
    for name in ("text_label.npy", "text_description.npy"):
        spoil(name, lambda text: text[:, 0])(light_folder)
    run_main(light_folder, pooled_run, *options, method="tdsm")
    for run in (pooled_run, *finished_runs.values()):
        one, two = (predictions_of(run, light_folder, "--classes", str(path)) for path in (new, pooled))
        assert one == two
    for files in ([new], [pooled, new]):                                  # names the file at fault
        with ends_in_one_line(capsys, f"error: {new}: has more than the 3 token rows that the…--rows 3"):
            predictions_of(token_run, light_folder, "--classes", *map(str, files))


@pytest.mark.parametrize("method", ["dvta", "tdsm", "ridge"])
def test_predict_applies_the_gamma_of_the_run(method, finished_runs, tiny_folder, capsys):
    """On the very test samples it has the run's generalized accuracies; --unseen, the zero-shot one."""
    run, d = finished_runs[method], data.read_data(tiny_folder, "9_3")
    figures = figures_of(run)

    def accuracy(rows, samples):
        return np.mean([rows[n][1] == d.classes[d.labels[n]] for n in samples])

    rows = predictions_of(run, tiny_folder)
    printed = capsys.readouterr()
    assert f"{method}: 96 sequences among 12 classes, γ {figures['gamma']:.3f} from the val" in printed.out
    assert printed.err == ""
    assert accuracy(rows, d.unseen_test) == pytest.approx(figures["unseen"])
    assert accuracy(rows, d.seen_test) == pytest.approx(figures["seen"])
    assert accuracy(predictions_of(run, tiny_folder, "--unseen"), d.unseen_test) == figures["acc"]
    assert "γ" not in capsys.readouterr().out


def test_predict_of_bodies_that_are_absent_or_lie(finished_runs, tmp_path, capsys):
    run, new = finished_runs["ridge"], tmp_path / "new.npy"
    np.save(new, with_value([1], 0)(bodies(5)[:, [1, 0, 2]]))
    assert len(predictions_of(run, new, "--allow-lying")) == 5
    assert f"note: {new}: 1 of 5 sequences have no first person\n" in capsys.readouterr().err


OTHER_VERSIONS = {  # how another version's model.pt differs: the run, the change
    "a renamed layer": ("dvta", lambda saved: saved["state"].update(other=saved["state"].popitem()[1])),
    "a layer more": ("tdsm", lambda saved: saved["state"].popitem()),
    "a setting that is gone": ("tdsm", lambda saved: saved["settings"]["model"].update(gone=1)),
    "settings in another form": ("ridge", lambda saved: saved.update(settings={})),
    "a method that is gone": ("ridge", lambda saved: saved.update(method="gone")),
    "no encoder on ready features": ("ridge", lambda saved: saved.update(encoder=None)),
    "an encoder without a frame": ("ridge", lambda saved: saved["encoder"].pop("frame")),
    "an encoder's frame that is gone": ("ridge", lambda saved: saved["encoder"].update(frame="gone")),
    "an encoder's layer": ("ridge", lambda saved: saved["encoder"]["state"].popitem()),
}


@pytest.mark.parametrize("case", OTHER_VERSIONS)
def test_predict_with_a_model_of_another_version(case, finished_runs, light_folder, tmp_path, capsys):
    method, change = OTHER_VERSIONS[case]
    saved = torch.load(finished_runs[method] / "model.pt", weights_only=True)
    change(saved)
    torch.save(saved, tmp_path / "model.pt")
    with ends_in_one_line(capsys, "model.pt: cannot be read (…another version wrote it; train again"):
        predictions_of(tmp_path, light_folder)


def test_new_classes_are_named_by_the_txt_beside(finished_runs, light_folder, tmp_path, capsys):
    new = tmp_path / "new.npy"
    np.save(new, NEW_TEXT[:, 0])

    def names():
        rows = predictions_of(finished_runs["dvta"], light_folder, "--classes", str(new))
        return sorted(rows[0][4].split(" | "))

    assert names() == ["class 0", "class 1", "class 2"]
    assert f"note: {tmp_path / 'new.txt'}: does not exist, so classes" in capsys.readouterr().err
    new.with_suffix(".txt").write_text("坐下\nb\nc")
    assert names() == ["b", "c", "坐下"]
    assert not capsys.readouterr().err


NEW_TEXT = np.random.default_rng(0).normal(size=(3, 40, 768)).astype(np.float32)
BAD_PREDICTIONS = {  # options: (an array for their file or None, what the one line must name)
    "--run old": (None, "old/model.pt: cannot be read (it lacks classes, encoder…--run, or train again"),
    "--data nowhere": (None, "error: nowhere: "),
    "--data raw": (None, "raw: none of its 1 .skeleton files could be read; a.skeleton: invalid literal"),
    "--data narrow.npy": (np.ones((2, 100)),
                          "has features of width 100; this run takes features of width 256 or skeletons"),
    "--data lying.npy": (bodies(5)[:, [1, 0, 2]], "--allow-lying"),
    "--data 20.npy": (bodies(5, zsar.GRAPHS[20]), "has skeletons of 20 joints; this run takes"),
    "--classes same.npy": (np.ones((3, 768)), "same.npy: row 0 of class 1 equals that…or the model does"),
    "--classes width.npy": (NEW_TEXT[:, 0, :512],
                            "width.npy: has vectors of width 512, the run's have 768; embed with the model"),
    "--classes t.npy": (NEW_TEXT[:, 0], "t.txt: names 2 classes, t.npy has 3"),
    "--classes a.npy a.npy a.npy": (NEW_TEXT[:, 0], "names 3 files, the run has 2 prompts a class; give"),
    "--classes two.npy mine/text_label.npy": (NEW_TEXT[:2, 0], "label.npy: has 12 classes, two.npy has 2"),
    "--classes t.npy --unseen": (NEW_TEXT[:, 0], "--unseen: not allowed with argument --classes"),
    "--run seeds": (None, "seeds: holds the seeds seed2, seed10; name one of them, such as seeds/seed2"),
    "--out mine/labels.npy": (None, "mine/labels.npy: exists already; give another --out, or --force"),
    "--out mine --force": (None, "mine: exists already"),
    "--out /proc/p.csv": (None, "/proc/p.csv: cannot be written (No such file or directory); give another"),
}


@pytest.mark.parametrize("options", BAD_PREDICTIONS)
def test_bad_predictions_are_one_line(options, finished_runs, light_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("old", "raw"):
        Path(name).mkdir()
    torch.save({"method": "ridge", "state": {}}, "old/model.pt")
    for seed in (10, 2):
        Path(f"seeds/seed{seed}").mkdir(parents=True)
        shutil.copy(finished_runs["ridge"] / "model.pt", f"seeds/seed{seed}")
    Path("raw/a.skeleton").write_text("x")
    Path("t.txt").write_text("a\nb")
    array, message = BAD_PREDICTIONS[options]
    if array is not None:
        np.save(options.split()[1], array)
    before = contents_of(tmp_path)
    command = ["predict", "--run", str(finished_runs["ridge"]), "--data", "mine", "--out", "p.csv"]
    with ends_in_one_line(capsys, message):
        train.main([*command, *options.split()])
    assert contents_of(tmp_path) == before


# --------------------------------------------------------------------------------- train.py: the command line
BAD_OPTIONS = {  # options: what the one line must name
    "--epochs 0": "epochs=0",
    "--epochs 2 --steps 2": "not allowed with",
    "--lr -1": "lr=-1",
    "--seeds 0": "--seeds",
    "--device cuda": "--device cuda: PyTorch finds 0 CUDA devices",
    "--out mine/labels.npy/run": "cannot be made (Not a directory)",
    "--set sde=maybe": "sde=maybe: is invalid; use",
    "--set batch_size=1.5": "batch_size=1.5: is invalid",
    "--method tdm": "invalid choice: 'tdm'",
    "--set encoder.name=resnet": 'encoder.name=resnet: is invalid; use one of "stgcn", "shiftgcn"',
    "--set width=64": "width: is not a setting; choose one of: batch_size, centre, ",
    "--set model=1": "model: is not a setting",
    "--set encoder.sde=true": "encoder.sde: is not a setting; choose one of: all_classes, augment, ",
    "--method ridge --steps 3": "steps: is not a setting; choose one of: penalty",
    "--method tdsm --set width=65 heads=4": "width=65: is not a multiple of heads=4",
    "--method tdsm --set timestep=50": "timestep=50: is invalid; use one of 0, 1, 2",
    "--gzsl --validate": "--validate: not allowed with argument --gzsl",
}


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_bad_options_are_one_line_and_exit_2(options, light_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    command = ["--method", "dvta", "--split", "9_3", "--data", str(light_folder)]
    with ends_in_one_line(capsys, BAD_OPTIONS[options]):
        train.main([*command, *options.split()])
    assert not Path("runs").exists()


def test_settings_on_the_command_line(light_folder, tmp_path, monkeypatch):
    """They reach the run and its folder's name; the command in result.json gives the same run again."""
    monkeypatch.chdir(tmp_path)
    folder = light_folder.rename("my data")
    split = {"unseen": [1, 5, 8], "val": [2, 3], "test_subjects": [2, 4]}
    write("splits.json", json.dumps({"../../a\nü": split}))(folder)
    train.main(["--method", "dvta", "--split", "../../a\nü", "--data", "my data", "--device", "cpu",
                "--seed", "5", "--gzsl", "--lr", "0.001",
                "--text", str(folder / "text_label.npy"), str(folder / "text_description.npy"),
                "--set", "only=da", "sde=false", "steps=3",
                "--set", "optimizer=sgd", "encoder.augment=false", "encoder.label_smoothing=0", "warm_up=2"])
    out, = Path("runs").iterdir()
    assert out.name == ("my-data_..-..-a--_dvta_seed5_gzsl_text_label_text_description_lr-0.001_only-da_"
                        "sde-false_steps-3_optimizer-sgd_encoder.augment-false_encoder.label_smoothing-0_"
                        "warm_up-2")
    result, weights, preset = result_of(out), weights_of(out), train.PRESETS["other"]
    assert result["settings"]["dvta"] == preset["dvta"] | {
        "lr": 0.001, "epochs": 0, "min_steps": 3, "max_steps": 3, "optimizer": "sgd", "warm_up": 2.0,
        "model": preset["dvta"]["model"] | {"only": "da", "sde": False}}
    assert result["settings"]["encoder"] == preset["encoder"] | {"augment": False, "label_smoothing": 0.0}
    assert result["settings"]["ridge"] == preset["ridge"]
    assert type(result["settings"]["encoder"]["label_smoothing"]) is float
    program, script_name, *command = shlex.split(result["command"])
    assert (program, script_name) == ("python", "train.py")
    train.main([*command, "--force"])
    assert without_times(result_of(out)) == without_times(result)
    assert_same_weights(weights_of(out), weights)
    train.main([*command, "--set", "only=null", "sde=true", "--out", "last"])     # the last one counts
    again = result_of(Path("last"))["settings"]["dvta"]["model"]
    assert again["only"] is None and again["sde"] is True
    assert preset == train.PRESETS["other"] and preset["dvta"]["model"]["sde"]        # as it was


@pytest.mark.parametrize("method", ["dvta", "tdsm", "ridge"])
def test_exported_features_give_the_figures_of_the_run_that_wrote_them(method, finished_runs, tiny_folder,
                                                                       tmp_path):
    run, d = finished_runs[method], data.read_data(tiny_folder, "9_3")
    result, out, val = result_of(run), *(run.with_name(f"{method}_features{end}") for end in ("", "_val"))
    options = ["--gzsl", "--val-data", val, *MORE_STEPS[method]]
    again, weights = run_main(out, tmp_path / "run", *options, method=method)
    assert again["figures"] == result["figures"] and again["history"] == result["history"]
    assert_same_weights(weights, weights_of(run))
    names = {f"{part}.npy" for pair in data.PUBLISHED[FEATURES] for part in pair}
    for folder in (out, val):
        assert {path.name for path in folder.iterdir()} == names | {
            "classes.txt", "README.txt", "text_label.npy", "text_description.npy"}
    lines = (out / "README.txt").read_text(encoding="utf-8").splitlines()
    starts = ("dataset: tiny, split 9_3, unseen classes [1, 5, 8]", "seen classes: [0, 2, 3, 4",
              f"encoder: seed 0, {result['encoder']['seen_test_acc']:.1%} on seen test samples",
              'settings: {"name": "stgcn"', "command: python train.py --method")
    for line, start in zip(lines, starts, strict=True):
        assert line.startswith(start)
    features = torch.load(result["encoder"]["file"], weights_only=True)["features"]
    np.testing.assert_array_equal(np.load(out / "train.npy"), features[d.train])
    np.testing.assert_array_equal(np.load(out / "z_label.npy"), d.labels[d.unseen_test])
    assert set(np.load(out / "g_label.npy")) == set(range(12)) and set(np.load(val / "z_label.npy")) == {2, 3}
    assert not {1, 2, 3, 5, 8} & set(np.load(val / "train_label.npy"))


@pytest.mark.usefixtures("shallow_encoders")
def test_export_refuses_what_it_would_overwrite(tiny_folder, light_folder, tmp_path, capsys):
    out = tmp_path / "shared_val"
    out.mkdir()
    (out / "train.npy").write_text("mine")
    (out / "other").write_text("mine")
    command = least(tiny_folder, tmp_path / "run", "--encoder-epochs", 1, "--export", tmp_path / "shared",
                    method="ridge")
    prompts = "label", "description", "label"
    three = ["--text", *(str(light_folder / f"text_{prompt}.npy") for prompt in prompts)]
    for options, message in ((["--gzsl"], "shared_val: exists already; give another --export, or --force"),
                             (three, "--export: the text has 3 prompts a class; give one or two"),
                             (["--seeds", "2"], "--export is for one seed")):
        with ends_in_one_line(capsys, message):
            train.main([*command, *options])
        assert not (tmp_path / "run").exists()
    with ends_in_one_line(capsys, f"{light_folder}: has features already; --export needs skeletons"):
        train.main([*command, "--data", str(light_folder), "--export", str(tmp_path / "new")])
    train.main([*command, "--validate", "--force"])
    assert len(np.load(out / "train.npy")) == len(np.load(out / "train_label.npy"))
    assert (out / "other").read_text() == "mine" and (tmp_path / "shared" / "train.npy").exists()


def test_the_list_of_a_folders_own_splits(tiny_folder, tmp_path, capsys):
    train.main(["--list", "--data", str(tiny_folder)])
    head, *lines = capsys.readouterr().out.splitlines()
    path = str(tiny_folder / "splits.json")
    assert [line.split() for line in lines] == [["9_3", "tiny", "9", "3", "2", path],
                                                ["10_2", "tiny", "10", "2", "-", path],
                                                ["9_3_val5", "tiny", "9", "3", "5", path]]
    train.main(["--list"])
    assert capsys.readouterr().out.splitlines()[0] == head
    with ends_in_one_line(capsys, "nowhere/classes.txt: cannot be read (No such file"):
        train.main(["--list", "--data", "nowhere"])


def test_what_changes_a_result_is_in_the_folders_name(tmp_path):
    folders, features = {}, write_published(tmp_path / "shift_5_r")
    d = data.read_data(features, "55_5")
    for options in ([], ["--gzsl"], ["--validate"], ["--gzsl", "--val-data", "v/shift_val_5_r"], ["--fp32"],
                    ["--text", "a/clip.npy"], ["--seed", "1"], ["--seeds", "2"], ["--encoder", "shiftgcn"],
                    ["--encoder-preset", "published"], ["--lr", "0.1"], ["--set", "sde=false"]):
        command = ["--method", "dvta", "--split", "55_5", "--data", str(features), *options]
        folders[" ".join(options)] = train.default_folder(train.run_arguments(command), d).name
    assert len({*folders.values()}) == len(folders)
    assert folders[""] == "ntu60_shift_5_r_55_5_dvta_seed0"
    assert folders["--text a/clip.npy"] == "ntu60_shift_5_r_55_5_dvta_seed0_clip"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("method, options", [("tdsm", []), ("dvta", ["--fp32"]),
                                             ("ridge", ["--encoder", "shiftgcn"])], ids=str)
def test_a_run_on_cuda(method, options, tiny_folder, tmp_path):
    options = ["--device", "cuda", "--gzsl", *options]
    result, _ = run_main(tiny_folder, tmp_path / "run", *options, method=method)
    assert result["precision"] == ("float32" if "--fp32" in options else "bfloat16 and TF32")
    assert result["device"] == "cuda:0" and 0 <= result["encoder"]["seen_test_acc"] <= 1
    assert len(predictions_of(tmp_path / "run", tiny_folder)) == 96


@pytest.mark.parametrize("device, options, precision", [
    ("cuda", [], "bfloat16 and TF32"), ("cuda", ["--fp32"], "float32"), ("cpu", [], "float32")])
def test_precision(device, options, precision, light_folder):
    command = ["--method", "tdsm", "--split", "9_3", "--data", str(light_folder), *options]
    (run,), _, _ = train.make_runs(train.run_arguments(command), torch.device(device))
    assert run.precision == precision and run.fast == (precision != "float32")


@pytest.mark.parametrize("name", ["dvta", "tdsm", "ridge"])
def test_what_a_fast_run_changes_in_a_method(name, monkeypatch):
    """TDSM's loss is compiled, its loss and scores run in bfloat16; the others stay as they are."""
    compiled, kind = [], train.METHODS[name]
    monkeypatch.setattr(train, "compiled", lambda function: compiled.append(function.__name__) or function)
    monkeypatch.setattr(train, "in_bfloat16", torch.autocast("cpu", torch.bfloat16))
    settings = train.PRESETS["other"][name]["model"]
    plain, fast = (train.build(kind, random_text(), 256, settings, fast) for fast in (False, True))
    fast.load_state_dict(plain.state_dict())
    x = torch.randn(6, 256)
    if name == "tdsm":
        for model in (plain, fast):
            model.denoiser.x_out.weight.data.fill_(0.01)
    scores = [model.scores(x, torch.arange(5)) for model in (plain, fast)]
    assert compiled == (["triplet_loss"] if name == "tdsm" else [])
    assert torch.equal(*scores) == (name != "tdsm")
    torch.testing.assert_close(*scores, rtol=0.05, atol=0.05)


def test_setup_lists_every_module():
    text = (ROOT / "setup.py").read_text()
    modules = {path.stem for path in ROOT.glob("*.py")} - {"setup", "test_zsar"}
    assert modules and all(f'"{module}"' in text for module in modules)


# -------------------------------------------------------------------------------------------------- real data
KINECT28 = Path(os.environ.get("ZSAR_DATA", ".")).resolve()
KINECT81 = KINECT28.parent / "kinect81"
needs_kinect28 = pytest.mark.skipif("ZSAR_DATA" not in os.environ, reason="set ZSAR_DATA=path/to/kinect28")
KINECT81_SOURCES = KINECT28.parent / "kinect81_sources"
needs_kinect81 = pytest.mark.skipif(not KINECT81.exists(), reason="kinect81 must lie beside ZSAR_DATA")
needs_kinect81_sources = pytest.mark.skipif(not KINECT81_SOURCES.exists(),
                                            reason="kinect81_sources must lie beside ZSAR_DATA")


@pytest.mark.parametrize("folder, name, shape, num_classes, unseen_test", [
    pytest.param(KINECT28, "22_6", (765, 64), [22, 6, 4], [83, 85, 79, 73, 83], marks=needs_kinect28),
    pytest.param(KINECT81, "71_10", (4118, 32), [71, 10, 10], [276, 232, 272], marks=needs_kinect81)])
def test_splits_of_real_data(folder, name, shape, num_classes, unseen_test):
    """No one who trains is among the unseen test samples."""
    for letter, count in zip("abcde", unseen_test):
        d, subjects = data.read_data(folder, f"{name}_{letter}"), np.load(folder / "subjects.npy")
        assert not {*subjects[d.train]} & {*subjects[d.unseen_test]}
        assert len(d.train) + len(d.seen_test) == np.isin(d.labels, d.seen).sum()
        assert [len(d.seen), len(d.unseen), len(d.val)] == num_classes
        assert len(d.unseen_test) == count and d.skeletons.shape == (shape[0], 3, shape[1], 25, 1)


@needs_kinect28
def test_forty_real_sequences_in_five_forms_are_the_same(tmp_path):
    """Each form is prepared, trained on for an epoch and predicted. Each sequence has its own label."""
    x, raw = np.load(KINECT28 / "skeletons.npy")[::19][:40, :, ::4].astype(np.float32), tmp_path / "raw"
    names = [f"S001C001P{1 + 2 * (n % 2):03}R001A{n + 1:03}" for n in range(40)]        # 1 trains, 3 tests
    samples = names, [prepare._ntu_row(name) for name in names], x
    raw.mkdir()
    for name, sequence in zip(names, x):
        write_skeleton(raw / f"{name}.skeleton", sequence)
    for source in (raw, write_pyskl(tmp_path / "a.pkl", samples), write_ctrgcn(tmp_path / "cs.npz", samples),
                   write_pku_npz(tmp_path / "pku.npz", samples), write_agcn(tmp_path / "agcn", samples)):
        out = tmp_path / f"{source.name}_out"
        arrays = prepared(source, out, frames=16)
        assert arrays["labels"].tolist() == [*range(40)]
        assert arrays["training"].tolist() == [True, False] * 20
        assert_same_bodies(arrays["skeletons"], x, 2e-3 if source.suffix == ".pkl" else 1e-4)
        assert np.median(zsar.torsos_of(arrays["skeletons"], zsar.NTU25)[1]) > 0.9
        write("splits.json", '{"odd": {"unseen": [1, 3, 5]}}')(out)
        result, _ = run_main(out, tmp_path / "run", "--encoder-epochs", 1, method="ridge", split="odd")
        assert result["notes"] == [] and figures_of(result)["n"] == 3
        assert len(predictions_of(tmp_path / "run", out)) == 40


@needs_kinect28
def test_a_run_on_real_skeletons(tmp_path):
    """On every eighth frame, its encoder is better than chance after one epoch."""
    folder = tmp_path / "kinect28"
    shutil.copytree(KINECT28, folder)
    spoil("skeletons.npy", lambda x: x[:, :, ::8])(folder)
    result, _ = run_main(folder, tmp_path / "run", "--encoder-epochs", 1, method="ridge", split="22_6_a")
    assert figures_of(result)["n"] == 83 and figures_of(result)["chance"] == 1 / 6
    assert result["encoder"]["seen_test_acc"] > 1 / 22


@needs_kinect81
def test_every_method_is_above_chance_on_kinect81(tmp_path):
    """On ready features: each joint's mean place, its spread and its speed; the rest is dead."""
    folder = tmp_path / "features"
    shutil.copytree(KINECT81, folder, ignore=lambda *_: ["skeletons.npy"])
    x = zsar.to_common_frame(np.load(KINECT81 / "skeletons.npy"), zsar.NTU25)[..., 0]   # (N, 3, T, V)
    numbers = [x.mean(2), x.std(2), np.abs(np.diff(x, axis=2)).mean(2)]                 # (N, 3, V) each
    features = np.concatenate([part.reshape(len(x), -1) for part in numbers], 1)        # (N, 225)
    np.save(folder / "features.npy", np.pad(features, [(0, 0), (0, 256 - 225)]))
    for options in ("--method ridge", "--method dvta --steps 14 --batch-size 32 --lr 0.001",
                    "--method tdsm --steps 100 --batch-size 32 --lr 0.003 --set width=32 depth=1 noises=2"):
        train.main([*options.split(), "--split", "71_10_a", "--data", str(folder), "--device", "cpu",
                    "--out", str(tmp_path / "run"), "--force"])
        zsl = figures_of(tmp_path / "run")
        assert zsl["n"] == 276 and zsl["chance"] == 0.1
        assert zsl["acc"] > 0.2, options


# ----------------------------------------------------------- kinect81.py: the benchmark out of its archives
@needs_kinect81_sources
def test_kinect81_out_of_miniature_archives(tmp_path, monkeypatch, capsys):
    """The same bytes as from the script that made the published set; with text where it fits the classes."""
    zips, theirs, ours, with_text = KINECT81_SOURCES / "zips", *(tmp_path / name for name in "abc")
    monkeypatch.setattr(sys, "argv", ["rebuild.py", str(theirs), "--zips", str(zips)])
    runpy.run_path(str(KINECT81_SOURCES / "rebuild.py"), run_name="__main__")
    monkeypatch.setattr(kinect81.urllib.request, "urlopen", None)         # no download is necessary
    kinect81.build(ours, zips)
    expected, printed = contents_of(theirs), capsys.readouterr()
    assert contents_of(ours) == expected and len(expected) == 5
    assert "42 sequences, 23 classes, 19 people" in printed.out and "cite those" in printed.out
    assert printed.err.startswith(f"note: {ours}: its classes are not the benchmark's 81")
    text = {"label.npy": b"1", "description.npy": b"2"}
    for name, content in {**text, "classes.txt": expected["classes.txt"]}.items():
        write(f"kinect81_{name}", content)(tmp_path)
    monkeypatch.setattr(kinect81, "TEXT_DIR", tmp_path)
    kinect81.build(with_text, zips)
    assert contents_of(with_text) == expected | {f"text_{name}": content for name, content in text.items()}
    assert capsys.readouterr().err == ""


@needs_kinect81
def test_bundled_text_and_splits_are_those_of_kinect81():
    for name in ("classes", "descriptions"):
        bundled, published = data.TEXT_DIR / f"kinect81_{name}.txt", KINECT81 / f"{name}.txt"
        assert bundled.read_bytes() == published.read_bytes()
    for name in ("label", "description"):
        bundled, published = data.TEXT_DIR / f"kinect81_{name}.npy", KINECT81 / f"text_{name}.npy"
        assert (np.load(bundled).dtype, np.load(bundled).shape) == (np.float16, (81, 768))
        pooled = data.read_text(bundled, data.read_lines(KINECT81 / "classes.txt"))[:, 0]
        np.testing.assert_array_equal(pooled, data.read_text(published)[:, 0])
    splits = kinect81.splits_of(81, np.load(KINECT81 / "subjects.npy"))
    assert json.dumps(splits) == (KINECT81 / "splits.json").read_text()


def zip_of(name, content):
    """The bytes of a .zip file that holds one file, not compressed."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(name, content)
    return stream.getvalue()


RECORDING = zip_of("x/real_world_coordinates/a01_s01_e01", "0.5 " * 800)
BAD_DOWNLOADS = {  # what arrives: parts of the message
    "nothing": (urllib.error.URLError("no network"),
                "/ahmedhamdy2121/CV_Action_Recognition_2015/zip/7eb289d2b1a…: cannot be read into…archives/"
                "ahmedhamdy2121+CV_Action_Recognition_2015-7eb289d2.zip (<urlopen error no network>); try "
                "again, or fetch this commit by hand and save it there"),
    "a part": (RECORDING[:-30], "CV_Action_Recognition_2015…(what arrived is not a whole .zip file); try"),
    "damage": (RECORDING.replace(b"0.5", b"0.6", 1), "2015-7eb289d2.zip: cannot be read (Bad CRC-32…); "
               "remove it and try again, or fetch ahmedhamdy2121/CV_Action_Recognition_2015 at"),
    "other files": (zip_of("README", ""), "2015-7eb289d2.zip: holds no recording of MSR-Action3D; remove it"),
}


@pytest.mark.parametrize("case", BAD_DOWNLOADS)
def test_a_bad_download_is_one_line_and_exit_2(case, tmp_path, monkeypatch, capsys):
    content, message = BAD_DOWNLOADS[case]

    def arrive(url, timeout):
        if isinstance(content, Exception):
            raise content
        return io.BytesIO(content)

    monkeypatch.setattr(kinect81.urllib.request, "urlopen", arrive)
    monkeypatch.setattr(sys, "argv", ["kinect81.py", f"{tmp_path}/out", "--archives", f"{tmp_path}/archives"])
    with ends_in_one_line(capsys, message, silent=False):
        data.command_line(kinect81.main)
    kept = [path.name for path in (tmp_path / "archives").iterdir()]
    assert os.listdir(tmp_path) == ["archives"] and all(name.endswith(".zip") for name in kept)
    assert len(kept) == (6 if case in ("damage", "other files") else 0)


def test_a_broken_archive_is_downloaded_again(tmp_path, monkeypatch):
    path = tmp_path / "corazza+pose-d480ab32.zip"
    path.write_bytes(RECORDING[:-30])
    monkeypatch.setattr(kinect81.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(RECORDING))
    assert kinect81.fetch("corazza/pose", tmp_path) == path
    assert contents_of(tmp_path) == {path.name: RECORDING}


# ------------------------------------------------------------------------------------------------------- docs
def load_script(name):
    return SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / f"{name}.py")))


@pytest.fixture(scope="module")
def plot():
    pytest.importorskip("matplotlib")
    return load_script("plot")


def texts_of(figure):
    """All text of a figure, one string."""
    Text = pytest.importorskip("matplotlib.text").Text
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def write_result(folder, **changes):
    """A run's folder with a result.json: three unseen classes, the second without samples → the folder."""
    generalized = {"seen": 0.6, "unseen": 0.3, "harmonic": 0.4, "ausuc": 0.25,
                   "curve": [[0.0, 0.8, 0.1], [1.0, 0.6, 0.3], [2.0, 0.0, 0.5]]}
    zsl = {"acc": 0.625, "ci95": [0.25, 0.875], "chance": 1 / 3,
           "confusion": [[3, 1, 0], [0, 0, 0], [2, 0, 2]], **generalized}
    history = [{"epoch": epoch, "loss": 3 / epoch, "acc_on_test": 0.1 * epoch} for epoch in (1, 2)]
    result = {"method": "dvta", "dataset": "synthetic", "split": "55_5", "seed": 0, "note": "SYNTHETIC DATA",
              "validate": False, "data_sha256": "f0", "unseen_classes": ["walk", "jump", "run"],
              "figures": {"dvta": zsl, "ridge": zsl | {"acc": 0.4}}, "history": history}
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps(result | changes))
    return folder


def test_the_picture_of_a_run_shows_its_figures(plot, tmp_path):
    run = write_result(tmp_path / "run")
    path, figure = plot.draw_runs([run])
    assert path == run / "figures.png"
    for part in ("SYNTHETIC DATA", "seed 0: 62.5% among the unseen classes, ridge 40.0%, chance 33.3%",
                 "walk", "75.0% [30.1%, 95.4%]", "50.0% [15.0%, 85.0%]",
                 "dvta: AUSUC 0.250, harmonic mean 40.0%", "ridge: AUSUC"):
        assert part in texts_of(figure)
    matrix, bars, generalized, loss, test = figure.axes
    assert [text.get_text() for text in matrix.texts] == ["3", "1", "2", "2"]
    assert [bar.get_width() for bar in bars.patches] == [0.75, 0.5]       # none for a class without samples
    assert [[0.1, 0.8], [0.3, 0.6], [0.5, 0.0]] in [line.get_xydata().tolist() for line in generalized.lines]
    assert loss.lines[0].get_xydata().tolist() == [[1, 3], [2, 1.5]]
    assert test.lines[0].get_xydata().tolist() == [[1, 0.1], [2, 0.2]]
    figures = result_of(run)["figures"]
    ridge = write_result(tmp_path / "ridge", method="ridge", note=None, history=[], validate=True,
                         figures={"ridge": figures["ridge"]})
    text = texts_of(plot.draw_runs([ridge])[1])
    assert "among the validation classes" in text and text.count("ridge: AUSUC") == 1
    assert "SYNTHETIC" not in text
    zsl_keys = "acc", "ci95", "chance", "confusion"
    zsl = {name: {key: f[key] for key in zsl_keys} for name, f in figures.items()}
    plain = write_result(tmp_path / "plain", figures=zsl)
    assert "without --gzsl" in texts_of(plot.draw_runs([plain])[1])


def test_the_table_of_runs_by_hand(tmp_path, monkeypatch, capsys):
    """Means over splits, deviations over seeds; no picture is drawn."""
    plot, runs = load_script("plot"), []
    for split, accs in (("a", (0.5, 0.7)), ("b", (0.3, 0.3))):
        folder = tmp_path / split
        result = result_of(write_result(folder, split=split))
        figures = result["figures"]
        seeds = [result | {"seed": seed, "figures": figures | {"dvta": figures["dvta"] | {"acc": acc}}}
                 for seed, acc in enumerate(accs)]
        (folder / "result.json").write_text(json.dumps({"seeds": seeds}))
        runs.append(folder)
    monkeypatch.setattr(sys, "argv", ["plot.py", "--table", *map(str, runs)])
    plot.main()
    assert capsys.readouterr().out.splitlines() == [
        "SYNTHETIC DATA", "",
        "| | ZSL (a, b) | seen | unseen | harmonic | AUSUC |", "|---|---|---|---|---|---|",
        "| dvta | 45.0 ± 7.1 (60.0, 30.0) | 60.0 ± 0.0 | 30.0 ± 0.0 | 40.0 ± 0.0 | 0.250 ± 0.000 |",
        "| ridge | 40.0 ± 0.0 (40.0, 40.0) | 60.0 ± 0.0 | 30.0 ± 0.0 | 40.0 ± 0.0 | 0.250 ± 0.000 |",
        "| chance | 33.3 | | | | |"]
    write_result(tmp_path / "c", split="c")
    for other, message in (("c", "--table: dvta has no generalized figures of split c, seed 1; add the run"),
                           ("d", "the runs are of different datasets")):
        if other == "d":
            write_result(tmp_path / "d", dataset="other")
        monkeypatch.setattr(sys, "argv", ["plot.py", "--table", *map(str, runs), str(tmp_path / other)])
        with ends_in_one_line(capsys, message, silent=False):
            plot.command_line(plot.main)


def test_the_comparison_of_a_run_and_one_of_two_seeds(plot, tmp_path):
    first, seeds = write_result(tmp_path / "first"), write_result(tmp_path / "seeds")
    figures = result_of(seeds)["figures"]
    results = [result_of(seeds) | {"method": "tdsm", "seed": seed,
                                   "figures": {"tdsm": figures["dvta"], "ridge": figures["ridge"]}}
               for seed in (7, 8)]
    (seeds / "result.json").write_text(json.dumps({"seeds": results}))
    path, figure = plot.draw_runs([first, seeds])
    assert path == first / "comparison.png"
    text, bars = texts_of(figure), figure.axes[0]
    for part in ("dvta, seed 0\nfirst", "tdsm, seed 7\nseeds", "tdsm, seed 8\nseeds", "62.5% [25.0%, 87.5%]"):
        assert part in text
    assert text.count("AUSUC") == 3
    assert [bar.get_width() for bar in bars.patches] == [0.625] * 3
    assert [ridge.get_segments()[0][0][0] for ridge in bars.collections] == [0.4] * 3


@pytest.mark.parametrize("source, is_folder", [("skeletons.npy", True), ("seen_train_data.npy", True),
                                               ("1.skeleton", True), ("a.npy", False), ("1.skeleton", False)])
def test_the_picture_of_a_sequence_not_in_metres(source, is_folder, plot, tmp_path):
    """Three strips of eight poses, from the front and from the side; the second person comes late."""
    folder, graph, x = tmp_path / "a", zsar.GRAPHS[25], np.zeros((2, 3, 64, 25, 2), np.float32)
    unit = 30 if source == "1.skeleton" else 1000                         # no .skeleton has numbers from 100
    x[1, ..., 0], x[1, :, 32:, :, 1] = unit * person(64, 0.05), unit * person(32, 0.05, seed=1)
    folder.mkdir()
    if source == "1.skeleton":
        write_skeleton(folder / source, x[1])
        (folder / "0.skeleton").write_text("0")
    else:
        np.save(folder / source, x)
    row = 0 if source == "1.skeleton" and not is_folder else 1
    path, figure = plot.draw_sequence(folder if is_folder else folder / source, row)
    assert path == Path(f"{'a' if is_folder else Path(source).stem}_row{row}.png")
    assert "left side blue, right side orange" in figure.get_suptitle()
    common = zsar.to_common_frame(x[1:], graph)[0]
    strips = np.reshape(figure.axes, (3, 8))
    for strip, (view, across) in zip(strips, ((x[1], 0), (common, 0), (common, 2))):
        for ax, frame in zip(strip, (0, 9, 18, 27, 36, 45, 54, 63)):
            pose = view[[across, 1], frame]                               # (2, V, M)
            bones = pose[:, np.array(graph.edges)].transpose(1, 3, 2, 0)  # (24, M, 2 joints, 2 coordinates)
            if frame < 32:
                bones[:, 1] = np.nan                                      # the second person is absent
            drawn = np.reshape([line.get_xydata() for line in ax.lines], bones.shape)
            np.testing.assert_allclose(drawn, bones, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_joints", zsar.GRAPHS)
def test_as_many_joints_are_left_as_right(num_joints, plot):
    colours = [plot.colour_of(joint, zsar.GRAPHS[num_joints]) for joint in range(num_joints)]
    assert colours.count("C0") == colours.count("C1") == {25: 10, 20: 8, 17: 6, 18: 6}[num_joints]
    left, right = zsar.GRAPHS[num_joints].shoulders
    assert (colours[left], colours[right]) == ("C0", "C1")


def test_sides_of_an_own_graph_are_those_of_its_shoulders(plot, tmp_path):
    """BODY_25's legs hang from the mid-hip; its joints 12 and 16 are not Kinect's."""
    edges = [[0, 1], [2, 1], [3, 2], [4, 3], [5, 1], [6, 5], [7, 6], [8, 1], [9, 8], [10, 9], [11, 10],
             [12, 8], [13, 12], [14, 13], [15, 0], [16, 0], [17, 15], [18, 16], [19, 14], [20, 19], [21, 14],
             [22, 11], [23, 22], [24, 11]]
    graph = {"edges": edges, "centre": 1, "root": [8], "shoulders": [5, 2]}
    write("graph.json", json.dumps(graph))(tmp_path)
    save("skeletons.npy", bodies(1))(tmp_path)
    colours = [plot.colour_of(joint, data.read_graph(tmp_path / "graph.json")) for joint in range(25)]
    sides = {"C0": [5, 6, 7], "C1": [2, 3, 4]}
    assert {side: [j for j in range(25) if colours[j] == side] for side in sides} == sides
    for source in (tmp_path, tmp_path / "skeletons.npy"):
        caption = plot.draw_sequence(source, 0)[1].get_suptitle()
        assert "left shoulder blue, from the right orange, other joints black" in caption


BAD_PLOTS = {  # options: what the one line says
    "": "give either runs or --data",
    "run --data a": "give either runs or --data",
    "run": "run/figures.png: exists already; give --force to overwrite it",
    "nowhere": "nowhere/result.json: ",
    "run other": "these runs differ in data, text or split",
    "--data run": "run: row 0 cannot be read",
    "--data labels.npy": "labels.npy: shape of a row is (), must be (3, T, V, M)",
    "--data mediapipe.npy": "mediapipe.npy: has 33 joints; give a graph.json",
    "--data chain": "chain/skeletons.npy: has 25 joints; give a graph.json of as many beside it",
    "--data mediapipe.npy --row 1": "mediapipe.npy: row 1 cannot be read (index 1 is out of bounds",
    "--data a.skeleton": "a.skeleton: row 0 cannot be read (is truncated)",
    "run --out /proc/a.png": "/proc/a.png: cannot be written (No such file or directory); give another --out",
    "run --out run/figures.png": "run/figures.png: exists already",
    "run --out run/figures.pdf": "--out run/figures.pdf: a picture is a .png file",
    "run --out a.png --table": "--table: not allowed with argument --out",
    "--data labels.npy --table": "give either runs or --data, of which there is no --table",
    "old": "old/result.json: another version wrote it; train again",
    "old --table": "old/result.json: another version wrote it; train again",
}


@pytest.mark.parametrize("options", BAD_PLOTS)
def test_bad_plots_are_one_line_and_exit_2(options, plot, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (write_result(Path("run")) / "figures.png").write_text("mine")
    write_result(Path("other"), data_sha256="f1")
    Path("old").mkdir()
    Path("old/result.json").write_text('{"method": "dvta", "zsl": {}}')
    np.save("labels.npy", np.arange(5))
    np.save("mediapipe.npy", np.ones((1, 3, 4, 33, 1)))
    Path("chain").mkdir()
    np.save("chain/skeletons.npy", np.ones((1, 3, 4, 25, 1)))
    graph = {"edges": [[1, 0], [2, 1]], "centre": 1, "root": [1], "shoulders": [0, 2]}
    Path("chain/graph.json").write_text(json.dumps(graph))
    Path("a.skeleton").write_text("3\n")
    monkeypatch.setattr(sys, "argv", ["plot.py", *options.split()])
    with ends_in_one_line(capsys, f"error: …{BAD_PLOTS[options]}"):
        plot.command_line(plot.main)
    assert [path.read_text() for path in Path().glob("**/*.png")] == ["mine"]


@pytest.mark.parametrize("options, picture", [("run", "run/figures.png"), ("--data nan.npy", "nan_row0.png")])
def test_pictures_are_overwritten_with_force(options, picture, plot, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_result(Path("run"))
    np.save("nan.npy", np.full((1, 3, 4, 25, 1), np.nan))                 # an empty picture
    Path(picture).write_text("mine")
    monkeypatch.setattr(sys, "argv", ["plot.py", *options.split(), "--force"])
    plot.main()
    assert Path(picture).read_bytes().startswith(b"\x89PNG")


def test_names_are_drawn_as_they_are(plot, tmp_path, monkeypatch, capsys, recwarn):
    """"$" is not mathematics; a letter that DejaVu Sans lacks comes from another font, or a note names it."""
    manager, fonts = pytest.importorskip("matplotlib.font_manager"), {}   # {family: its letters}
    for font in manager.fontManager.ttflist:
        if (font.style, font.weight) == ("normal", 400) and "Last" not in font.name:
            fonts[font.name] = {*map(chr, manager.get_font(font.fname).get_charmap())}
    other = min(letter for letter in fonts["STIXGeneral"] - fonts["DejaVu Sans"] if letter.isprintable())
    missing = "".join(sorted({*"坐下"}.difference(*fonts.values())))
    run = write_result(tmp_path / "run", unseen_classes=["pay $1 and $2", f"write {other}", "坐下坐下"])
    monkeypatch.setattr(sys, "argv", ["plot.py", str(run), "--out", str(tmp_path / "a.png")])
    plot.main()
    notes = [f"note: no installed font has {missing}; install one, such as Noto Sans CJK for Chinese"]
    assert capsys.readouterr().err.splitlines() == notes * bool(missing) and not recwarn.list
    assert (tmp_path / "a.png").exists() and not (run / "figures.png").exists()
    figure = plot.draw_run(plot.read_results([run])[0][1])
    plot.set_fonts(figure)
    Text = pytest.importorskip("matplotlib.text").Text
    labels = [text for text in figure.findobj(Text) if "pay $1 and $2" in text.get_text()]
    assert labels and not any(text.get_parse_math() for text in labels)
    assert any(other in fonts[name] for name in labels[0].get_fontfamily()[1:])


def test_the_benchmark(capsys):
    """All timings at toy size; the plain ways of the ratios compute the same as ours."""
    benchmark = load_script("benchmark")
    sizes = {"dvta_batch": 4, "tdsm": {"width": 16, "depth": 2, "heads": 2}, "tdsm_batch": 3, "skeletons": 2,
             "scored": 5, "rounds": 1}
    benchmark.benchmark_gpu(torch.device("cpu"), sizes)
    benchmark.benchmark_cpu(sizes)
    names = ["CPU", "TDSM training step", "TDSM scores", "DVTA training step", "stgcn training",
             "shiftgcn training", "DVTA training step, split", "TDSM training step, with",
             "TDSM scores, with", "ST-GCN training step", "Shift-GCN training step"]
    for line, name in itertools.zip_longest(capsys.readouterr().out.splitlines(), names):
        assert line.startswith(name)
    conv = zsar.GraphConv(3, 4, zsar.adjacency(zsar.NTU25.edges, 25, 20))
    x = torch.randn(2, 3, 5, 25)
    torch.testing.assert_close(benchmark.convolution_first(conv, x), conv(x))
    head, v, t = MetricHead(6), torch.randn(3, 1, 6), torch.randn(1, 2, 6)
    torch.testing.assert_close(benchmark.concatenated_pairs(head, v, t), head(head.v_half(v), head.t_half(t)))
