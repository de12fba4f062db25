"""Every test: `pytest test_zsar.py`. With ZSAR_DATA=path/to/kinect28 the real-data tests run too.

`python test_zsar.py` runs the benchmarks instead and prints their ratios; `python test_zsar.py cuda` measures
a GPU, `python test_zsar.py ddp` two processes.
"""
import csv
import ctypes
import fnmatch
import inspect
import itertools
import json
import math
import multiprocessing.forkserver
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import alignment
import data
import diffusion
import train
import zsar
from alignment import DVTA, MetricHead
from diffusion import TDSM, CrossDiT

ROOT = Path(__file__).resolve().parent


# --------------------------------------------------------------------------------------- fixtures and helpers
@pytest.fixture(scope="session")
def small_folder(tmp_path_factory):
    """A dataset folder with synthetic skeletons: 12 classes, 4 performers, 2 repeats, 16 frames."""
    folder = tmp_path_factory.mktemp("small")
    label_text, description_text = (text[:12] for text in data.bundled_text("ntu60"))
    pooled = (label_text[:, 0] + description_text[:, 0]) / 2
    x, labels, subjects = data.synthetic(pooled, performers=4, repeats=2, frames=16)
    np.save(folder / "skeletons.npy", x)
    np.save(folder / "labels.npy", labels)
    np.save(folder / "subjects.npy", subjects)
    np.save(folder / "text_label.npy", label_text)
    np.save(folder / "text_description.npy", description_text)
    (folder / "classes.txt").write_text("\n".join(data.bundled_classes("ntu60")[:12]) + "\n")
    splits = {"9_3": {"unseen": [1, 5, 8], "val": [2, 3], "test_subjects": [2, 4]},
              "10_2": {"unseen": [1, 5], "test_subjects": [2, 4]},
              "9_3_val5": {"unseen": [1, 5, 8], "val": [2, 3, 6, 9, 11], "test_subjects": [2, 4]}}
    (folder / "splits.json").write_text(json.dumps(splits))
    return folder


@pytest.fixture
def features_folder(small_folder, tmp_path):
    """A copy of the small folder that tests may spoil, with random ready features in place of skeletons."""
    folder = tmp_path / "mine"
    shutil.copytree(small_folder, folder, ignore=lambda *_: ["skeletons.npy"])
    np.save(folder / "features.npy", np.random.default_rng(0).random((96, 256), dtype=np.float32))
    return folder


def run_main(folder, out, *options, method="dvta", split="9_3"):
    """Train in this process with the least of everything; → result.json and the weights."""
    train.main(least(folder, out, *options, method=method, split=split))
    return result_of(out), weights_of(out)


def least(folder, out, *options, method="dvta", split="9_3"):
    """A command line with the least of everything."""
    sizes = {"ridge": "", "dvta": "--epochs 2",
             "tdsm": "--steps 4 --width 16 --depth 2 --heads 2 --batch-size 16"}
    command = ["--method", method, "--split", split, "--data", str(folder), "--out", str(out)]
    command += ["--device", "cpu", "--encoder-epochs", "2", *sizes[method].split(), *map(str, options)]
    return command if "--resume" in options else [*command, "--force"]


def result_of(run):
    """The result.json of a run's folder."""
    return json.loads((run / "result.json").read_text())


def without_times(result):
    """A result without what differs from run to run: times, and where the encoder came from."""
    encoder = result["encoder"] | {"cached": None, "file": None}
    return result | {"seconds": None, "result_sha256": None, "encoder": encoder}


def weights_of(run):
    """The weights of a run's method, by name."""
    return torch.load(run / "model.pt", weights_only=True)["state"]


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def script(name, *arguments, folder=None):
    """Run a script of this repository from a folder; → the finished process with what it printed."""
    command = [sys.executable, str(ROOT / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


def a_run(folder, **settings):
    """A Run as the command line would make it, with settings of a method."""
    method, = settings
    device, cache = torch.device("cpu"), folder / "encoders"
    return train.Run(method, settings, seed=0, device=device, folder=folder, cache=cache,
                     gzsl=False, tune=False, about={})


def random_text(num_classes=5, width=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(num_classes, 3, width, generator=g) for _ in range(2)]


def spoil(name, change):
    """→ a function that changes one array of a folder."""
    def spoiler(folder):
        np.save(folder / name, change(np.load(folder / name)))
    return spoiler


def with_value(index, value):
    def change(array):
        array[index] = value
        return array
    return change


def write(name, content):
    """→ a function that writes a file of a folder anew."""
    def spoiler(folder):
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return spoiler


def remove(name):
    """→ a function that removes one file of a folder."""
    def spoiler(folder):
        (folder / name).unlink()
    return spoiler


def save(name, array):
    """→ a function that puts an array into a folder."""
    def spoiler(folder):
        np.save(folder / name, array)
    return spoiler


def skeletons(shape=(96, 3, 4, 25, 1), value=0):
    """→ a function that puts skeletons in place of a folder's features: zeros, the last number `value`."""
    def spoiler(folder):
        (folder / "features.npy").unlink()
        x = np.zeros(shape, np.float32)
        x.flat[-1] = value
        np.save(folder / "skeletons.npy", x)
    return spoiler


def save_bodies(change=lambda x: x):
    """→ a function that puts changed skeletons of real size in place of a folder's features."""
    def spoiler(folder):
        (folder / "features.npy").unlink()
        np.save(folder / "skeletons.npy", change(bodies(96)))
    return spoiler


def bodies(count, joints=25):
    """Skeletons (count, 3, 4, joints, 1) of a random pose each, their torso 0.5 m long."""
    x = np.random.default_rng(0).normal(size=(count, 3, 4, joints, 1)).astype(np.float32)
    graph = zsar.GRAPHS[joints]
    x[:, :, :, list(graph.root)] = 0
    x[:, :, :, list(graph.shoulders)] = np.array([0, 0.5, 0], np.float32)[:, None, None, None]
    return x


def write_skeleton(path, x, joints=25):
    """Write x (3, F, V, M) as an NTU .skeleton file; a person all zero in a frame is absent there."""
    after_position = "277.4 191.8 1036.3 519.2 -0.2 0.03 0.97 -0.06 2"
    lines = [str(x.shape[1])]
    for frame in x.transpose(1, 3, 2, 0):                                 # (M, V, 3)
        present = [m for m, body in enumerate(frame) if body.any()]
        lines.append(str(len(present)))
        for m in present:
            lines += [f"{72057594037931101 + m} 0 1 0 1 1 0 -0.06 -0.27 2", str(joints)]
            for joint in frame[m]:
                position = " ".join(repr(float(v)) for v in joint)
                lines.append(f"{position} {after_position}")
    path.write_text("\n".join(lines) + "\n")


def person(frames, motion, seed=0, joints=25):
    """A random walker (3, frames, joints): `motion` scales its steps."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(3, 1, joints)) + motion * rng.normal(size=(3, frames, joints)).cumsum(1)


STRAY_BYTES = [b"-", b"9" * 30, b" ", b"\n", b"nan ", b"1e400 ", b"\x00", b"25\n", b"_1", b"-1\n"]
STRAY_COUNTS = [b"999999999\n1", b"-3\n", b"1\n99999999999\n", b""]


def edit_at_random(text, rng):
    """Change one random place of a bytearray in one of six ways."""
    i, length = int(rng.integers(len(text))), int(rng.integers(1, 40))
    edit = rng.integers(6)
    if edit == 0:
        text[i] = rng.choice(list(b"0123456789.- \xff"))
    elif edit == 1:
        text[i:i + length] = b""
    elif edit == 2:
        text[i:i] = rng.choice(STRAY_BYTES)
    elif edit == 3:
        text[i:i] = text[i // 2:i // 2 + length]
    elif edit == 4:
        del text[max(i, len(text) // 2):]
    else:
        text[:length] = rng.choice(STRAY_COUNTS)


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
def test_every_graph_is_one_tree_with_normalised_columns(num_joints):
    graph = zsar.GRAPHS[num_joints]
    assert len(graph.edges) == num_joints - 1
    A = zsar.adjacency(graph.edges, num_joints, graph.centre)
    torch.testing.assert_close(A.sum((0, 1)), torch.ones(num_joints))
    reach = torch.linalg.matrix_power((A.sum(0) > 0).double(), num_joints)
    assert (reach > 0).all()


def test_ntu_joint_tree():
    pairs = ("1-2 2-21 3-21 4-3 5-21 6-5 7-6 8-7 9-21 10-9 11-10 12-11 13-1 14-13 15-14 16-15 17-1 18-17 "
             "19-18 20-19 22-23 23-8 24-25 25-12")
    from_zero = [tuple(int(j) - 1 for j in pair.split("-")) for pair in pairs.split()]
    assert list(zsar.NTU25.edges) == from_zero


LEFT_AND_RIGHT = {  # V: the layouts' own numbering; whoever is in neither is in the middle
    25: ({4, 5, 6, 7, 21, 22, 12, 13, 14, 15}, {8, 9, 10, 11, 23, 24, 16, 17, 18, 19}),
    20: ({4, 5, 6, 7, 12, 13, 14, 15}, {8, 9, 10, 11, 16, 17, 18, 19}),
    17: ({1, 3, 5, 7, 9, 11, 13, 15}, {2, 4, 6, 8, 10, 12, 14, 16}),
    18: ({5, 6, 7, 11, 12, 13, 15, 17}, {2, 3, 4, 8, 9, 10, 14, 16}),
}


@pytest.mark.parametrize("num_joints", zsar.GRAPHS)
def test_sides_of_every_layout(num_joints):
    side = zsar.sides(zsar.GRAPHS[num_joints])
    assert side.shape == (num_joints,)
    left, right = LEFT_AND_RIGHT[num_joints]
    assert {*np.flatnonzero(side == 1)} == left
    assert {*np.flatnonzero(side == -1)} == right


def test_the_common_frame_by_hand():
    x = np.zeros((1, 3, 2, 25, 2), np.float32)
    x[0, :, 0, 0, 0] = [1, 2, 3]                                          # spine base, first frame
    x[0, :, 0, 4, 0] = [1, 3, 5]                                          # the shoulder line points along +z
    x[0, :, 0, 8, 0] = [1, 3, 3]
    x[0, :, 1, 7, 0] = [2, 2, 3]                                          # left hand: root + 1 m along +x
    y = zsar.to_common_frame(x, zsar.NTU25)
    np.testing.assert_allclose(y[0, :, 0, 0, 0], 0, atol=1e-6)
    np.testing.assert_allclose(y[0, :, 0, 4, 0], [2, 1, 0], atol=1e-6)
    np.testing.assert_allclose(y[0, :, 0, 8, 0], [0, 1, 0], atol=1e-6)
    np.testing.assert_allclose(y[0, :, 1, 7, 0], [0, 0, -1], atol=1e-6)   # turned with the body
    assert not y[0, ..., 1].any()                                         # the absent person stays zero


@pytest.mark.parametrize("num_joints", zsar.GRAPHS)
def test_the_common_frame_forgets_where_a_person_stands_and_faces(num_joints):
    rng, graph = np.random.default_rng(3), zsar.GRAPHS[num_joints]
    x = rng.normal(size=(4, 3, 5, num_joints, 2))
    y = zsar.to_common_frame(x, graph)
    left, right = graph.shoulders
    shoulders = y[:, :, 0, left, 0] - y[:, :, 0, right, 0]                # (N, 3)
    np.testing.assert_allclose(y[:, :, 0, list(graph.root), 0].mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(shoulders[:, 1:], 0, atol=1e-5)
    assert (shoulders[:, 0] > 0).all()
    a = 2.5
    turn = np.array([[math.cos(a), 0, math.sin(a)], [0, 1, 0], [-math.sin(a), 0, math.cos(a)]])
    shift = np.array([1, -2, 3])[:, None, None, None]
    moved = np.einsum("ij,njtvm->nitvm", turn, x) + shift
    np.testing.assert_allclose(zsar.to_common_frame(moved, graph), y, atol=1e-4)
    x_lengths, y_lengths = (np.linalg.norm(z[:, :, :, 1:] - z[:, :, :, :1], axis=1) for z in (x, y))
    np.testing.assert_allclose(x_lengths, y_lengths, atol=1e-4)           # a rigid motion


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


@pytest.mark.parametrize("num_joints", zsar.GRAPHS)
def test_stgcn_shapes(num_joints):
    encoder = zsar.STGCN(zsar.GRAPHS[num_joints], num_joints, num_classes=7)
    x = torch.randn(2, 3, 13, num_joints, 2)
    assert encoder(x).shape == (2, 256)
    assert encoder.classify(x).shape == (2, 7)
    convolutions = [block.temporal[0] for block in encoder.blocks]
    assert [conv.stride[0] for conv in convolutions] == [1, 1, 1, 1, 2, 1, 1, 2, 1, 1]
    assert [conv.out_channels for conv in convolutions] == [16, 16, 16, 16, 32, 32, 32, 64, 64, 256]
    assert [block.temporal[2].p for block in encoder.blocks] == [0.0] + [0.5] * 9


def test_stgcn_counts_a_missing_person_in_the_mean():
    encoder = zsar.STGCN(zsar.NTU25, 25, 3).eval()
    one = torch.randn(2, 3, 8, 25, 1)
    nobody = torch.zeros_like(one)
    both = encoder(torch.cat([one, nobody], -1))
    assert torch.isfinite(both).all()
    torch.testing.assert_close(both, (encoder(one) + encoder(nobody)) / 2)


def test_first_block_has_no_residual():
    A = zsar.adjacency(zsar.NTU25.edges, 25, 20)
    first, later = zsar.Block(4, 4, A, first=True).eval(), zsar.Block(4, 4, A).eval()
    x = torch.rand(1, 4, 6, 25)
    for block in (first, later):                                          # silence the branch:
        block.temporal[1].weight.data.zero_()                             # only the residual is left
    assert first(x).abs().max() == 0
    torch.testing.assert_close(later(x), x)


def plain_temporal_shift(x, delta, stride):
    """Shift-GCN's temporal shift of x (V, C, T, B), by loops."""
    V, C, T, B = x.shape
    y = torch.zeros(V, C, -(-T // stride), B, dtype=x.dtype)
    for c, h in itertools.product(range(C), range(y.shape[2])):
        at = stride * h + delta[c].item() + (0.5 if stride == 2 else 0.0)
        for frame, weight in ((math.floor(at), 1 - at % 1), (math.floor(at) + 1, at % 1)):
            if 0 <= frame < T:
                y[:, c, h] += weight * x[:, c, frame]
    return y


@pytest.mark.parametrize("stride, frames", [(1, 6), (2, 6), (2, 7)])
def test_temporal_shift_against_loops_in_float64(stride, frames):
    shift = zsar.TemporalShift(5, stride).double()
    shift.delta.data = torch.tensor([-0.7, 0.0, 0.4, 2.6, -9.3], dtype=torch.float64)
    x = torch.randn(3, 5, frames, 2, dtype=torch.float64, requires_grad=True)
    y = shift(x)
    torch.testing.assert_close(y, plain_temporal_shift(x.detach(), shift.delta, stride))
    # the gradient of x by finite differences, that of δ is 0.01·sign
    weight = torch.randn_like(y)
    gradient, of_delta = torch.autograd.grad((y * weight).sum(), [x, shift.delta])
    step = 1e-6
    for index in ((0, 0, 0, 0), (2, 2, 3, 1), (1, 3, 5, 0)):
        moved = x.detach().clone()
        moved[index] += step
        slope = ((shift(moved) - y) * weight).sum() / step
        torch.testing.assert_close(gradient[index], slope, rtol=1e-5, atol=1e-5)
    for c in (0, 2, 3):                                                # the others: at a kink, or all outside
        moved = shift.delta.detach().clone()
        moved[c] += step
        slope = ((plain_temporal_shift(x.detach(), moved, stride) - y) * weight).sum()
        assert of_delta[c] == 0.01 * slope.sign()
    assert of_delta[4] == 0


def test_spatial_shift_against_loops_in_float64():
    V, C, C_out, T, B = 5, 7, 6, 2, 3                                     # more channels than joints
    shift = zsar.SpatialShift(C, C_out, V).double()
    shift.mask.data.normal_()
    shift.bias.data.normal_()
    x = torch.randn(V, C, T, B, dtype=torch.float64)
    linear = torch.zeros(V, C_out, T, B, dtype=torch.float64)
    for v, c_out in itertools.product(range(V), range(C_out)):
        linear[v, c_out] += shift.bias[0, 0, c_out]
        for c in range(C):
            read = x[(v + c) % V, c] * (torch.tanh(shift.mask[0, v, c]) + 1)
            linear[v, c_out] += read * shift.weight[c, c_out]
    y = torch.zeros_like(linear)
    for v, c_out in itertools.product(range(V), range(C_out)):
        channel = linear[(v - c_out) % V, c_out]                          # each its own BatchNorm
        y[v, c_out] = (channel - channel.mean()) / (channel.var(correction=0) + 1e-5).sqrt()
    convolution, norm = shift.residual
    straight = torch.einsum("vctb,dc->vdtb", x, convolution.weight[:, :, 0, 0])
    straight = straight + convolution.bias[:, None, None]
    mean, var = straight.mean((0, 2, 3)), straight.var((0, 2, 3), correction=0)
    y = y + (straight - mean[:, None, None]) / (var[:, None, None] + norm.eps).sqrt()
    torch.testing.assert_close(shift(x), y.clamp(min=0))
    same = zsar.SpatialShift(C, C, V).double().eval()                  # no change of channels: plus the input
    same.weight.data.zero_()
    torch.testing.assert_close(same(x), x.clamp(min=0))


@pytest.mark.parametrize("num_joints, persons", [(25, 2), (20, 1), (17, 3), (18, 2)])
def test_shiftgcn_shapes(num_joints, persons):
    encoder = zsar.ShiftGCN(num_joints, persons, num_classes=7)
    x = torch.randn(2, 3, 13, num_joints, persons)
    assert encoder(x).shape == (2, 256)
    assert encoder.classify(x).shape == (2, 7)
    units = encoder.units
    assert [unit.spatial.weight.shape[1] for unit in units] == [64, 64, 64, 64, 128, 128, 128, 256, 256, 256]
    assert [unit.temporal[4].stride for unit in units] == [1, 1, 1, 1, 2, 1, 1, 2, 1, 1]
    assert all(unit.temporal[1].delta.abs().max() <= 1 for unit in units)


def test_a_state_of_shiftgcn_with_its_statistics_round_trips(tmp_path):
    encoder, x = zsar.ShiftGCN(5, 2, 3), torch.randn(4, 3, 6, 5, 2) * 3 + 1
    encoder.classify(x).sum().backward()                                  # moves every BatchNorm's statistics
    torch.save(encoder.state_dict(), tmp_path / "state.pt")
    again = zsar.ShiftGCN(5, 2, 3)
    again.load_state_dict(data.read_tensors(tmp_path / "state.pt", ()))
    assert torch.equal(again.eval()(x), encoder.eval()(x))


def test_shiftgcn_norms_all_joints_of_all_persons_and_means_over_persons():
    encoder = zsar.ShiftGCN(5, 2, 3)
    x = torch.randn(4, 3, 6, 5, 2) * 3 + 1
    encoder(x)
    channels = x.permute(0, 4, 3, 1, 2).reshape(4, 30, 6)                 # person, joint, coordinate
    torch.testing.assert_close(encoder.input_norm.running_mean, 0.1 * channels.mean((0, 2)))
    encoder.eval()
    features, swapped = [], x.clone()
    for m in range(2):
        alone = encoder.input_norm(channels).view(4, 2, 5, 3, 6)[:, m].permute(1, 2, 3, 0)
        features.append(encoder.units(alone.contiguous()).mean((0, 2)).T)
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


def test_settling_batch_norm_measures_the_training_samples():
    encoder = zsar.STGCN(zsar.NTU25, 25, 3)
    x, rows = torch.randn(6, 3, 8, 25, 1) * 2 + 5, torch.tensor([0, 2, 3])
    zsar.settle_batch_norm(encoder, x, rows)
    norm, values = encoder.input_norm, x[rows].permute(0, 4, 3, 1, 2).reshape(3, 75, 8)
    torch.testing.assert_close(norm.running_mean, values.mean((0, 2)))
    torch.testing.assert_close(norm.running_var, values.var((0, 2)))
    assert not encoder.training
    assert not encoder.blocks[3].temporal[2].training                     # dropout was and stays off
    # two classes, one after the other
    x = torch.randn(96, 3, 8, 25, 1)
    x[48:] += 9
    zsar.settle_batch_norm(encoder, x, torch.arange(96))
    torch.testing.assert_close(norm.running_var, torch.full((75,), 1 + 4.5 ** 2), rtol=0.1, atol=0)


def test_augmentation_turns_scales_crops_and_shakes():
    g = torch.Generator().manual_seed(0)
    pose, frames = torch.randn(200, 3, 25, 1, generator=g), torch.arange(9)
    still = pose[:, :, None].expand(-1, -1, 9, -1, -1)
    with train.seeded(0, torch.device("cpu")):
        moved = zsar.augmented(still)
        assert not torch.equal(zsar.augmented(still), moved)              # anew each time
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


def test_augmentation_leaves_absent_persons_absent():
    x = torch.randn(6, 3, 9, 25, 2)
    x[:3, ..., 1] = 0
    augmented = zsar.augmented(x)
    assert not augmented[:3, ..., 1].any() and augmented[3:].all()
    assert zsar.augmented(x[:, :, :1]).shape == (6, 3, 1, 25, 2)          # a single frame


# ------------------------------------------------------------------------------------ zsar.py: ridge, figures
A = math.sqrt(3 / 2)   # scores -1, 0, 1 in any order have deviation 1/A: standardised, they are -A, 0, A


def gzsl_case():
    """Five samples, seen classes 0 and 1, unseen class 2; margins 2A, A (never right), -A | -A, 2A."""
    scores = torch.tensor([[1., 0, -1], [1, -1, 0], [0, -1, 1], [-1, 0, 1], [1, 0, -1]])
    labels, classes, seen = np.array([0, 1, 0, 2, 2]), np.array([0, 1, 2]), np.array([0, 1])
    return scores, labels, classes, seen


def test_ridge_against_the_plain_formula():
    g = torch.Generator().manual_seed(1)
    text, x, y = random_text(), torch.randn(40, 256, generator=g), torch.randint(0, 4, (40,), generator=g)
    ridge = zsar.Ridge(text, penalty=3.0)
    ridge.fit(x, y)
    pooled = [prompt[:, 0].numpy() for prompt in text]
    P = np.concatenate([p / np.linalg.norm(p, axis=1, keepdims=True) for p in pooled], 1).astype(float)
    X = (x.numpy() - x.numpy().mean(0)) / x.numpy().std(0)
    T = P[y] - P[y].mean(0)
    W = np.linalg.inv(X.T @ X + 3.0 * np.eye(256)) @ X.T @ T
    predicted, candidates = X @ W, P[[4, 1]] - P[y].mean(0)
    expected = np.zeros((40, 2))
    for n, k in itertools.product(range(40), range(2)):
        p, c = predicted[n], candidates[k]
        expected[n, k] = p @ c / np.linalg.norm(p) / np.linalg.norm(c)
    np.testing.assert_allclose(ridge.scores(x, torch.tensor([4, 1])), expected, atol=1e-4)


def test_a_channel_dead_in_training_stays_harmless():
    """One that is constant in training and moves at test by little is not blown up."""
    x, y = torch.randn(40, 256), torch.arange(40) % 4
    x[:, 7] = 2.0
    moved = x.clone()
    moved[:, 7] += 1e-3
    ridge = zsar.Ridge(random_text(), penalty=3.0)
    ridge.fit(x, y)
    dvta = DVTA(random_text(), torch.arange(4), x, standardise=True)
    tdsm = random_tdsm(x=x)
    for model in (ridge, dvta, tdsm):
        scores = [model.scores(part, torch.arange(5)) for part in (x, moved)]
        torch.testing.assert_close(*scores, atol=0.01, rtol=0.01)


def test_standardised_scores_by_hand():
    scores = zsar.standardised(torch.tensor([[10., 20, 30], [-1, 1, 0], [5, 5, 5]]))
    expected = torch.tensor([[-A, 0, A], [-A, A, 0], [0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(scores, expected)


def test_zsl_figures_by_hand():
    scores = torch.tensor([[9., 1, 1], [1, 9, 1], [9, 1, 1], [1, 9, 1]])
    classes = np.array([4, 7, 8])                                         # class 8 has no sample
    figures = zsar.zsl_figures(scores, np.array([4, 4, 4, 7]), classes)
    low, high = figures.pop("ci95")
    assert 0.25 <= low < 0.75 and high == 1.0                             # of 4 samples, 3 hits
    assert figures == {"acc": 0.75, "per_class": (2 / 3 + 1) / 2, "chance": 1 / 3, "n": 4,
                       "class_acc": [2 / 3, 1.0, None], "confusion": [[2, 1, 0], [0, 1, 0], [0, 0, 0]]}


def test_the_bootstrap_interval_resamples_the_test_samples():
    hits = np.arange(50) < 35
    scores = torch.tensor(np.stack([hits, ~hits], 1).astype(float))
    figures = zsar.zsl_figures(scores, np.zeros(50, int), np.array([0, 1]))
    rng = np.random.default_rng(1)
    accuracies = [hits[rng.integers(0, 50, 50)].mean() for _ in range(4000)]
    np.testing.assert_allclose(figures["ci95"], np.quantile(accuracies, [0.025, 0.975]), atol=0.021)


def test_the_wilson_interval_by_hand():
    low, high = zsar.wilson_interval(np.array([0, 18, 9]), np.array([18, 18, 18]))
    z2 = 1.96 ** 2
    np.testing.assert_allclose(low, [0, 18 / (18 + z2), 0.290307], atol=1e-6)
    np.testing.assert_allclose(high, [z2 / (18 + z2), 1, 0.709693], atol=1e-6)


def test_spread_by_hand():
    spread = zsar.spread([0.5, 0.7, 0.6])                                 # 2 degrees of freedom: t = 4.303
    half_width = 4.303 * 0.1 / math.sqrt(3)
    assert spread["mean"] == pytest.approx(0.6)
    assert spread["std"] == pytest.approx(0.1)
    assert spread["ci95"] == pytest.approx([0.6 - half_width, 0.6 + half_width])


def test_gzsl_figures_by_hand():
    gamma, seen, unseen = zsar.seen_unseen_curve(*gzsl_case())
    np.testing.assert_allclose(gamma, [-np.inf, -A, A, 2 * A])
    np.testing.assert_allclose(seen, [2 / 3, 1 / 3, 1 / 3, 0], atol=1e-12)
    np.testing.assert_allclose(unseen, [0, 1 / 2, 1 / 2, 1])
    # H = 0.4 from -A to A and from A to 2A: the first
    assert zsar.best_gamma(*gzsl_case()) == pytest.approx(0, abs=1e-9)
    figures = zsar.gzsl_figures(*gzsl_case(), gamma=0.0)
    assert figures["seen"] == pytest.approx(1 / 3)
    assert figures["unseen"] == 0.5
    assert figures["harmonic"] == pytest.approx(0.4)
    assert figures["ausuc"] == pytest.approx((2 / 3 + 1 / 3) / 2 * 0.5 + (1 / 3 + 0) / 2 * 0.5)
    curve = np.round([[-A, 1 / 3, 0.5], [A, 1 / 3, 0.5], [2 * A, 0, 1]], 6)
    np.testing.assert_allclose(figures["curve"], curve, atol=1e-9)
    assert zsar.harmonic_mean(0.3, 0.6) == pytest.approx(0.4)
    assert zsar.harmonic_mean(0.0, 0.0) == 0


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

    def harmonic(gamma):
        return zsar.gzsl_figures(torch.tensor(raw), labels, classes, seen, gamma)["harmonic"]

    best = zsar.best_gamma(torch.tensor(raw), labels, classes, seen)
    assert all(harmonic(best) >= harmonic(gamma) for gamma in rng.normal(size=200))


def test_best_gamma_where_no_gamma_or_every_gamma_is_best():
    labels, classes, seen = np.array([0, 2]), np.array([0, 1, 2]), np.array([0, 1])
    for gap in (-9.0, 9.0):                                               # the unseen always behind, or ahead
        scores = torch.tensor([[0.1, 0.0, 0.2 + gap], [0.0, 0.1, gap - 0.2]])
        assert math.isfinite(zsar.best_gamma(scores, labels, classes, seen))


# ----------------------------------------------------------------------------------------------- alignment.py
def random_dvta(seed=0, **switches):
    with train.seeded(seed, torch.device("cpu")):
        return DVTA(random_text(), **switches)


def plain_dvta_pair(model, v, c, v_for_text):
    """DA and AA by loops, for one skeleton v (D,) and the text of class c, to which v_for_text attends."""
    P = model.prompts[c].double()                                         # (P, D)
    logits = torch.zeros(len(P), dtype=torch.float64)
    if model.sde.attend:
        logits = torch.stack([v_for_text @ p for p in P])
    a = logits.exp() / logits.exp().sum()
    mixed = sum(a[p] * P[p] for p in range(len(P)))
    t = model.sde.fc.weight @ mixed + model.sde.fc.bias
    da = v @ t / v.norm() / t.norm() / model.tau_da
    h = torch.cat([v.detach(), t.detach()])
    h = (model.head.fc0.weight @ h + model.head.fc0.bias).clamp(min=0)
    h = (model.head.fc1.weight @ h + model.head.fc1.bias).clamp(min=0)
    z = (model.head.fc2.weight @ h + model.head.fc2.bias)[0]
    leaky_sigmoid = 1 / (1 + (-z).exp()) if z > 0 else 0.01 * (0.01 * z).exp()
    return da, leaky_sigmoid / model.tau_aa


def plain_dvta_score(model, v, c, v_for_text):
    """The sum of those of DA and AA that the model has."""
    da, aa = plain_dvta_pair(model, v, c, v_for_text)
    return (da if model.da else 0) + (aa if model.aa else 0)


def plain_projector(model, x):
    p, x = model.projector, x / x.norm()
    h = (p.fc0.weight @ x + p.fc0.bias + x).clamp(min=0)
    h = (p.fc1.weight @ h + p.fc1.bias).clamp(min=0)
    h = (p.fc2.weight @ h + p.fc2.bias).clamp(min=0)
    return p.fc3.weight @ h + p.fc3.bias


def plain_dvta_loss(model, x, y):
    B, vs = len(x), [plain_projector(model, row) for row in x]
    Z = [[plain_dvta_score(model, vs[i], y[j], vs[j]) for j in range(B)] for i in range(B)]
    Z_transposed = [[Z[i][j] for i in range(B)] for j in range(B)]
    loss = 0
    for rows in (Z, Z_transposed):
        for i in range(B):
            target = [math.exp(10.0 * bool(y[i] == y[j])) for j in range(B)]
            soft = [z.exp() for z in rows[i]]
            for j in range(B):
                p, q = target[j] / sum(target), soft[j] / sum(soft)
                loss = loss + p * (math.log(p) - q.log()) / B
    return loss / 2


def concatenated(head):
    """The head's forward as the paper writes it: the whole first layer on all B² concatenations [v; t]."""
    def forward(v, t):                                                    # (n, 1, D), (1, B, D)
        n, B, D = v.shape[0], t.shape[1], t.shape[2]
        h = F.relu(head.fc0(torch.cat([v.expand(n, B, D), t.expand(n, B, D)], -1)))
        z = head.fc2(F.relu(head.fc1(h))).squeeze(-1)
        return torch.where(z > 0, torch.sigmoid(z), 0.01 * torch.exp(0.01 * z.clamp(max=0)))
    return forward


def unchanged(half):
    """In place of a head's v_half and t_half where `concatenated` does the whole first layer."""
    return half


SWITCHES = [{}, {"sde": False}, {"only": "da"}, {"only": "aa"}]


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_dvta_loss_and_gradients_against_loops_in_float64(switches):
    model = random_dvta(**switches).double()
    model.head.fc2.weight.data *= 30                                      # so that z takes both signs
    g = torch.Generator().manual_seed(2)
    x, y = torch.randn(6, 256, generator=g, dtype=torch.float64), torch.tensor([0, 3, 0, 1, 2, 3])
    loss, plain = model.loss(x, y), plain_dvta_loss(model, x, y)
    torch.testing.assert_close(loss, plain)
    parameters, zero = list(model.parameters()), torch.zeros(())
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    plain_gradients = torch.autograd.grad(plain, parameters, allow_unused=True)
    for fast, slow in zip(gradients, plain_gradients):
        torch.testing.assert_close(zero if fast is None else fast, zero if slow is None else slow)


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_dvta_scores_against_loops_in_float64(switches, monkeypatch):
    monkeypatch.setitem(alignment.PAIRS_AT_ONCE, "cpu", 8)                # several pieces
    model = random_dvta(**switches).double()
    model.head.fc2.weight.data *= 30
    x, classes = torch.randn(7, 256, dtype=torch.float64), torch.tensor([4, 0, 2])
    expected = torch.zeros(7, 3, dtype=torch.float64)
    for n in range(7):
        v = plain_projector(model, x[n])
        for k, c in enumerate(classes):
            expected[n, k] = plain_dvta_score(model, v, c, v)
    torch.testing.assert_close(model.scores(x, classes), expected.detach())


def test_no_gradient_passes_from_aa_to_da():
    model = random_dvta(only="aa")
    model.loss(torch.randn(8, 256), torch.arange(8) % 5).backward()
    of_da = [*model.projector.parameters(), *model.sde.parameters(), model.tau_da]
    of_aa = [*model.head.parameters(), model.tau_aa]
    assert all(p.grad is None or not p.grad.any() for p in of_da)
    assert all(p.grad is not None and p.grad.any() for p in of_aa)


def test_leaky_sigmoid_on_both_sides():
    head = MetricHead(1)
    head.fc2.weight.data.zero_()
    one = torch.zeros(1, 1, 2)
    by_hand = {2.0: 1 / (1 + math.exp(-2)), -50.0: 0.01 * math.exp(-0.5), 1e5: 1.0, 0.0: 0.01}
    for z, expected in by_hand.items():
        head.fc2.bias.data.fill_(z)
        value = head(one, one)
        assert value.item() == pytest.approx(expected)
        gradient, = torch.autograd.grad(value.sum(), head.fc2.bias)
        assert torch.isfinite(gradient).all()


def test_split_first_layer_equals_concatenation():
    B, D = 80, 768                                                        # more than one piece of pairs
    model = DVTA(random_text(5, D))
    x, y = torch.randn(B, 256), torch.arange(B) % 5
    head = model.head
    split = model.loss(x, y)
    split_gradient, = torch.autograd.grad(split, head.fc0.weight)
    head.forward, head.v_half, head.t_half = concatenated(head), unchanged, unchanged
    plain = model.loss(x, y)
    plain_gradient, = torch.autograd.grad(plain, head.fc0.weight)
    torch.testing.assert_close(split, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(split_gradient, plain_gradient, rtol=1e-5, atol=1e-5)


def test_dvta_inputs_at_scale_against_the_plain_formulas():
    text, seen = random_text(), torch.tensor([0, 2, 3])
    x = 5 * torch.randn(40, 256) + 3
    model = DVTA(text, seen, x, standardise=True, centre=True)
    z = (x - x.mean(0)) / x.std(0, correction=0)
    torch.testing.assert_close(model.unit_features(x), z / z.norm(dim=1, keepdim=True))
    for p, prompt in enumerate(text):
        pooled = prompt[:, 0] / prompt[:, 0].norm(dim=1, keepdim=True)
        centred = pooled - (pooled[0] + pooled[2] + pooled[3]) / 3
        expected = centred / centred.norm(dim=1, keepdim=True)
        torch.testing.assert_close(model.class_prompts(torch.tensor([4, 1]))[:, p], expected[[4, 1]])
    plain = DVTA(text, seen, x)                                      # the paper's: lengths of 1, nothing else
    torch.testing.assert_close(plain.unit_features(x), x / x.norm(dim=1, keepdim=True))
    pooled = text[1][:, 0] / text[1][:, 0].norm(dim=1, keepdim=True)
    torch.testing.assert_close(plain.class_prompts(torch.arange(5))[:, 1], pooled)


# ----------------------------------------------------------------------------------------------- diffusion.py
def random_tdsm(seed=0, text=None, x=None, width=8, depth=3, heads=2, **switches):
    """A small TDSM whose every weight is random: adaLN and output weights are non-zero too."""
    with train.seeded(seed, torch.device("cpu")):
        x = 3 * torch.randn(30, 256) + 1 if x is None else x
        text = text or random_text()
        model = TDSM(text, torch.arange(4), x, width=width, depth=depth, heads=heads, **switches)
        for p in model.parameters():
            p.data += 0.2 * torch.randn_like(p)
    return model


def plain_linear(layer, z):
    return layer.weight @ z + layer.bias


def plain_silu(z):
    return z / (1 + (-z).exp())


def plain_gelu(z):
    return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z ** 3)))


@pytest.fixture
def exact_timesteps(monkeypatch):
    """The timestep embedding in float64, like the plain formulas: its float32 would be all that differs."""
    def embedding(t):
        angle = t[:, None] * 10000 ** (-torch.arange(128, dtype=torch.float64) / 128)
        return torch.cat([angle.cos(), angle.sin()], -1)

    monkeypatch.setattr(diffusion, "timestep_embedding", embedding)


def plain_norm(x):
    return (x - x.mean()) / (x.var(correction=0) + 1e-6).sqrt()


def plain_mlp(layers, z):
    return plain_linear(layers[2], plain_silu(plain_linear(layers[0], z)))


def plain_attention(queries, keys, values, heads):
    """softmax(QKᵀ/√d)V for one row, lists of (D,) vectors, by loops."""
    d, out = len(queries[0]) // heads, []
    for q in queries:
        parts = []
        for h in range(heads):
            part = slice(h * d, (h + 1) * d)
            weights = torch.stack([q[part] @ k[part] / math.sqrt(d) for k in keys]).exp()
            parts.append(sum(w * v[part] for w, v in zip(weights / weights.sum(), values)))
        out.append(torch.cat(parts))
    return out


def plain_update(stream, z, attended, modulation):
    """One row of a stream after its attention: the gated residual, then the gated MLP."""
    _, _, gate, shift, scale, mlp_gate = modulation
    z = z + gate * plain_linear(stream.out, attended)
    hidden = plain_gelu(plain_linear(stream.mlp[0], plain_norm(z) * (1 + scale) + shift))
    return z + mlp_gate * plain_linear(stream.mlp[2], hidden)


def plain_denoiser(net, x_t, t, tokens, pooled):
    """The formulas for one row: x_t (256,), timestep t, tokens (L, E) and pooled (E,) → (256,)."""
    D, heads = net.x_in.out_features, net.blocks[0].skeleton.heads
    angles = [t * 10000 ** (-i / 128) for i in range(128)]
    waves = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
    time_part = plain_mlp(net.time_mlp, torch.tensor(waves, dtype=x_t.dtype))
    condition = plain_silu(time_part + plain_mlp(net.pooled_mlp, pooled))
    x = plain_linear(net.x_in, x_t)
    text = [plain_linear(net.text_in, row) + net.position[i] for i, row in enumerate(tokens)]
    for i, block in enumerate(net.blocks):
        last = i == len(net.blocks) - 1
        mx = plain_linear(block.skeleton.modulation.fc, condition).view(6, D)
        mt = plain_linear(block.text.modulation.fc, condition).view(-1, D)
        q, k, v = plain_linear(block.skeleton.qkv, plain_norm(x) * (1 + mx[1]) + mx[0]).view(3, D)
        projection = block.text.kv if last else block.text.qkv
        modulated = [plain_norm(row) * (1 + mt[1]) + mt[0] for row in text]
        text_qkv = [plain_linear(projection, row).view(-1, D) for row in modulated]
        queries = [q] if last else [q] + [row[0] for row in text_qkv]
        keys, values = [k] + [row[-2] for row in text_qkv], [v] + [row[-1] for row in text_qkv]
        attended = plain_attention(queries, keys, values, heads)
        x = plain_update(block.skeleton, x, attended[0], mx)
        if not last:
            text = [plain_update(block.text, row, a, mt) for row, a in zip(text, attended[1:])]
    shift, scale = plain_linear(net.final_modulation.fc, condition).view(2, D)
    return plain_linear(net.x_out, plain_norm(x) * (1 + scale) + shift)


class PlainCrossDiT(CrossDiT):
    """The same mathematics as one writes it first: explicit softmax, a whole last block, no row shared."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        last = self.blocks[-1]
        last.text = diffusion.Stream(last.skeleton.out.in_features, last.skeleton.heads)

    def forward(self, x, t, tokens, pooled):                              # (B, 256), (B,), (B, L, E), (B, E)
        c = self.time_mlp(diffusion.timestep_embedding(t).to(x.dtype)) + self.pooled_mlp(pooled)
        streams = [self.x_in(x)[:, None], self.text_in(tokens) + self.position]     # (B, 1, D), (B, L, D)
        for block in self.blocks:
            streams = self.block(streams, [block.skeleton, block.text], c)
        shift, scale = self.final_modulation.fc(F.silu(c))[:, None].chunk(2, -1)
        return self.x_out(self.norm(streams[0]) * (1 + scale) + shift)[:, 0]        # (B, 256)

    def norm(self, x):
        return F.layer_norm(x, x.shape[-1:], eps=1e-6)

    def block(self, streams, weights, c):
        modulations = [w.modulation.fc(F.silu(c))[:, None].chunk(6, -1) for w in weights]
        qkv = []
        for x, w, (shift, scale, *_) in zip(streams, weights, modulations):
            B, L, D = x.shape
            projected = w.qkv(self.norm(x) * (1 + scale) + shift).view(B, L, 3, w.heads, D // w.heads)
            qkv.append(projected.permute(2, 0, 3, 1, 4))                  # (3, B, heads, L, D/heads)
        q, k, v = torch.cat(qkv, 3)                                       # (B, heads, 1 + L, D/heads)
        attended = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        attended = attended.transpose(1, 2).flatten(2)                    # (B, 1 + L, D)
        out = []
        for x, a, w, modulation in zip(streams, (attended[:, :1], attended[:, 1:]), weights, modulations):
            _, _, gate, shift, scale, mlp_gate = modulation
            x = x + gate * w.out(a)
            out.append(x + mlp_gate * w.mlp(self.norm(x) * (1 + scale) + shift))
        return out


class PlainTDSM(TDSM):
    """TDSM on the plain denoiser, with a loop over classes and noises."""

    def __init__(self, text, seen, x, width, depth, heads):
        super().__init__(text, seen, x, width, depth, heads)
        self.denoiser = PlainCrossDiT(self.tokens.shape[2], self.tokens.shape[1], width, depth, heads)

    def take_weights(self, model):
        """The weights of a TDSM; the last block's idle text weights stay random."""
        D, last = model.denoiser.x_in.out_features, len(model.denoiser.blocks) - 1
        text, state = self.denoiser.blocks[last].text, model.state_dict()
        for kind in ("weight", "bias"):
            modulation, qkv = getattr(text.modulation.fc, kind), getattr(text.qkv, kind)
            modulation.data[:2 * D] = state.pop(f"denoiser.blocks.{last}.text.modulation.fc.{kind}")
            qkv.data[D:] = state.pop(f"denoiser.blocks.{last}.text.kv.{kind}")
        assert not self.load_state_dict(state, strict=False).unexpected_keys

    def triplet_loss(self, x, y, wrong, t, noise):
        noisy, target = self.noised(self.standardised(x), noise, t)
        texts = torch.cat([y, wrong])
        predicted = self.denoiser(noisy.repeat(2, 1), t.repeat(2), self.tokens[texts], self.pooled[texts])
        right, other = (predicted - target.repeat(2, 1)).square().mean(1).chunk(2)
        triplet = ((right - other + self.tau).clamp(min=0) * (y != wrong)).mean()
        return right.mean() + self.lam * triplet, right.mean(), other.mean()

    @torch.no_grad()
    def scores(self, x, classes):
        n, t, columns = len(x), torch.tensor(self.timestep), []
        for c in classes.tolist():
            tokens, pooled = self.tokens[c].expand(n, -1, -1), self.pooled[c].expand(n, -1)
            total = 0
            for noise in self.noises:
                noisy, target = self.noised(self.standardised(x), noise, t)
                predicted = self.denoiser(noisy, t.expand(n), tokens, pooled)
                total = total - (predicted - target).square().mean(1)
            columns.append(total)
        return torch.stack(columns, 1)


def test_alpha_bar_by_hand():
    # sqrt(beta) runs in 49 equal steps from sqrt(0.00085) = 0.0291548 to sqrt(0.012) = 0.1095445
    alpha_bar = diffusion.noise_schedule()
    assert len(alpha_bar) == 50
    assert alpha_bar[0].item() == pytest.approx(0.99915, abs=1e-6)
    for t in (25, 49):
        roots = [0.0291548 + i * (0.1095445 - 0.0291548) / 49 for i in range(t + 1)]
        assert alpha_bar[t].item() == pytest.approx(math.prod(1 - r * r for r in roots), abs=1e-5)
    assert alpha_bar[25].item() == pytest.approx(0.9341, abs=1e-4)
    assert alpha_bar[49].item() == pytest.approx(0.7638, abs=1e-4)


def test_timestep_embedding_by_hand():
    e = diffusion.timestep_embedding(torch.tensor([0, 3]))
    assert torch.equal(e[0], torch.cat([torch.ones(128), torch.zeros(128)]))
    assert e[1, 0].item() == pytest.approx(math.cos(3))
    assert e[1, 128].item() == pytest.approx(math.sin(3))
    assert e[1, 127].item() == pytest.approx(math.cos(3 * 10000 ** (-127 / 128)))
    assert e[1, 128 + 64].item() == pytest.approx(math.sin(0.03), abs=1e-6)


@pytest.mark.parametrize("depth", [1, 3])
def test_denoiser_and_its_gradients_against_loops_in_float64(depth, exact_timesteps):
    model = random_tdsm(depth=depth).double()
    net, parameters = model.denoiser, list(model.denoiser.parameters())
    x_t, t = torch.randn(3, 256, dtype=torch.float64), torch.tensor([0, 25, 49])
    classes = torch.tensor([1, 4, 1])
    fast = net(x_t[:, None], net.condition(t, classes, model.tokens, model.pooled))[:, 0]
    rows = []
    for i, c in enumerate(classes):
        rows.append(plain_denoiser(net, x_t[i], t[i].item(), model.tokens[c], model.pooled[c]))
    slow = torch.stack(rows)
    torch.testing.assert_close(fast, slow)
    weight = torch.randn(3, 256, dtype=torch.float64)
    fast_gradients = torch.autograd.grad((fast * weight).sum(), parameters)
    slow_gradients = torch.autograd.grad((slow * weight).sum(), parameters)
    for a, b in zip(fast_gradients, slow_gradients):
        torch.testing.assert_close(a, b)


def test_denoiser_starts_at_zero_with_the_papers_initialisation():
    net = CrossDiT(10, 5, width=48, depth=2, heads=4)
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


def test_the_last_block_has_no_idle_text_weights():
    model = random_tdsm()
    last_text = model.denoiser.blocks[-1].text
    assert not hasattr(last_text, "mlp")
    assert last_text.kv.out_features == 2 * 8
    model.loss(torch.randn(6, 256), torch.tensor([0, 1, 2, 3, 0, 1])).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_default_size_is_the_papers():
    papers = {"width": 768, "depth": 12, "heads": 12, "timestep": 25, "noises": 3, "lam": 1.0, "tau": 1.0,
              "prediction": "epsilon"}
    parameters = inspect.signature(TDSM).parameters
    assert {name: parameters[name].default for name in papers} == papers


def test_text_conditions():
    label, description = torch.randn(4, 1 + 2, 5), torch.randn(4, 1 + 6, 5)
    tokens, pooled = diffusion.text_conditions([label, description])
    assert tokens.shape == (4, 6, 10)
    assert torch.equal(pooled, torch.cat([label[:, 0], description[:, 0]], 1))
    assert torch.equal(tokens[:, :2, :5], label[:, 1:])
    assert not tokens[:, 2:, :5].any()
    assert torch.equal(tokens[:, :, 5:], description[:, 1:])
    # pooled only: its own single token
    tokens, pooled = diffusion.text_conditions([label[:, :1], description[:, :1]])
    assert torch.equal(tokens[:, 0], pooled)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_triplet_loss_against_the_formula(prediction, exact_timesteps):
    model = random_tdsm(prediction=prediction).double()
    g = torch.Generator().manual_seed(3)
    x, noise = (torch.randn(5, 256, generator=g, dtype=torch.float64) for _ in range(2))
    y, wrong = torch.tensor([0, 1, 2, 3, 3]), torch.tensor([1, 1, 0, 3, 2])
    t = torch.tensor([0, 10, 25, 40, 49])
    right, other, total = [], [], 0.0
    for i in range(5):
        z, a = (x[i] - model.x_mean) / model.x_std, model.alpha_bar[t[i]]
        velocity = a.sqrt() * noise[i] - (1 - a).sqrt() * z
        target = {"epsilon": noise[i], "sample": z, "v_prediction": velocity}[prediction]
        x_t = a.sqrt() * z + (1 - a).sqrt() * noise[i]
        for c, errors in ((y[i], right), (wrong[i], other)):
            predicted = plain_denoiser(model.denoiser, x_t, t[i].item(), model.tokens[c], model.pooled[c])
            errors.append(((predicted - target) ** 2).sum() / 256)
        total += right[i] / 5
        if y[i] != wrong[i]:
            total += max(torch.tensor(0.0), right[i] - other[i] + 1) / 5
    loss, e_right, e_other = model.triplet_loss(x, y, wrong, t, noise)
    torch.testing.assert_close(loss, total)
    torch.testing.assert_close(e_right, sum(right) / 5)
    torch.testing.assert_close(e_other, sum(other) / 5)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_a_perfect_prediction_has_no_error(prediction, monkeypatch):
    model = random_tdsm(prediction=prediction, lam=0.0)
    x, noise, t = torch.randn(4, 256), torch.randn(4, 256), torch.tensor([0, 20, 30, 49])
    _, target = model.noised(model.standardised(x), noise, t)
    monkeypatch.setattr(model.denoiser, "forward", lambda noisy, condition: target.repeat(2, 1)[:, None])
    y, wrong = torch.arange(4), torch.zeros(4, dtype=torch.long)
    loss, _, _ = model.triplet_loss(x, y, wrong, t, noise)
    assert loss == 0


def test_the_prediction_types_are_one_prediction():
    """x_t and any one of ε, x and v give the other two."""
    x, noise, t = torch.randn(4, 256), torch.randn(4, 256), torch.tensor([0, 20, 30, 49])
    model = random_tdsm()
    target = {}
    for model.prediction in ("epsilon", "sample", "v_prediction"):
        noisy, target[model.prediction] = model.noised(x, noise, t)
    a, v = model.alpha_bar[t][:, None], target["v_prediction"]
    torch.testing.assert_close(a.sqrt() * noisy - (1 - a).sqrt() * v, target["sample"])
    torch.testing.assert_close((1 - a).sqrt() * noisy + a.sqrt() * v, target["epsilon"])


def test_the_triplet_term():
    model, plain, g = random_tdsm(), random_tdsm(lam=0.0), torch.Generator().manual_seed(5)
    x, noise = torch.randn(4, 256, generator=g), torch.randn(4, 256, generator=g)
    y, t = torch.arange(4), torch.tensor([3, 20, 30, 49])
    wrong = (y + 1) % 4
    # y′ = y: no term
    assert torch.equal(model.triplet_loss(x, y, y, t, noise)[0], plain.triplet_loss(x, y, y, t, noise)[0])
    model.tau = 100.0                                                     # violated by every sample
    loss, right, other = model.triplet_loss(x, y, wrong, t, noise)
    torch.testing.assert_close(loss - right, right - other + 100.0)
    # descending the term lowers e⁺ and pushes e⁻ up
    parameters = list(model.denoiser.parameters())
    pull, push = (torch.autograd.grad(e, parameters, retain_graph=True) for e in (right, other))
    term = torch.autograd.grad(loss - right, parameters)
    for both, a, b in zip(term, pull, push):
        torch.testing.assert_close(both, a - b, rtol=1e-3, atol=1e-4)
    model.tau = -100.0                                                    # kept by every sample
    assert torch.equal(model.triplet_loss(x, y, wrong, t, noise)[0], right)


@pytest.mark.parametrize("prediction, unit", [("epsilon", 1), ("sample", 0.0625), ("v_prediction", 1)])
def test_the_margin_is_in_units_of_the_targets_variance(prediction, unit):
    model, g = random_tdsm(prediction=prediction, scale=0.25, tau=100.0), torch.Generator().manual_seed(5)
    x, noise = torch.randn(4, 256, generator=g), torch.randn(4, 256, generator=g)
    y, t = torch.arange(4), torch.tensor([3, 20, 30, 49])
    loss, right, other = model.triplet_loss(x, y, (y + 1) % 4, t, noise)
    torch.testing.assert_close(loss - right, right - other + 100 * unit)


def test_tdsm_scores_against_loops_over_classes_noises_and_samples(exact_timesteps):
    model = random_tdsm().double()
    x, classes = torch.randn(4, 256, dtype=torch.float64), torch.tensor([4, 0, 2])
    expected, a = torch.zeros(4, 3, dtype=torch.float64), model.alpha_bar[25]
    for n in range(4):
        z = (x[n] - model.x_mean) / model.x_std
        for k, c in enumerate(classes):
            for noise in model.noises:
                x_t = a.sqrt() * z + (1 - a).sqrt() * noise
                predicted = plain_denoiser(model.denoiser, x_t, 25, model.tokens[c], model.pooled[c])
                expected[n, k] -= ((predicted - noise) ** 2).mean()
    torch.testing.assert_close(model.scores(x, classes), expected.detach())


def test_tdsm_scores_depend_on_nothing_else(monkeypatch):
    model = random_tdsm().double()
    x, classes = torch.randn(9, 256, dtype=torch.float64), torch.tensor([4, 0, 2])
    scores, order = model.scores(x, classes), [2, 0, 1]
    # the batch, the order of the classes, the other candidates, the memory
    torch.testing.assert_close(model.scores(x[3:4], classes), scores[3:4])
    torch.testing.assert_close(model.scores(x, classes[order]), scores[:, order])
    torch.testing.assert_close(model.scores(x, classes[1:2]), scores[:, 1:2])
    for budget, samples in ((1, 1), (60_000, 4)):
        monkeypatch.setitem(diffusion.MEMORY_BUDGET, "cpu", budget)
        assert model.samples_at_once(3) == samples
        torch.testing.assert_close(model.scores(x, classes), scores)


def without_last_text(model):
    """The parameters of a TDSM of depth 3 but those of the last block's text."""
    return [p for name, p in model.named_parameters() if ".2.text" not in name]


def test_all_savings_against_the_plain_way():
    """A whole last block, explicit attention, no reuse over classes: the same loss, gradients and scores."""
    model = random_tdsm().double()
    plain = PlainTDSM(random_text(), torch.arange(4), torch.zeros(2, 256), width=8, depth=3, heads=2).double()
    plain.take_weights(model)
    g = torch.Generator().manual_seed(4)
    x, noise = (torch.randn(6, 256, generator=g, dtype=torch.float64) for _ in range(2))
    y, wrong = torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([1, 1, 3, 0, 2, 0])
    t = torch.tensor([0, 9, 20, 30, 40, 49])
    loss, plain_loss = (m.triplet_loss(x, y, wrong, t, noise)[0] for m in (model, plain))
    torch.testing.assert_close(loss, plain_loss)
    torch.testing.assert_close(model.scores(x, torch.arange(5)), plain.scores(x, torch.arange(5)))
    gradients = torch.autograd.grad(loss, without_last_text(model))
    plain_gradients = torch.autograd.grad(plain_loss, without_last_text(plain))
    for fast, slow in zip(gradients, plain_gradients):
        torch.testing.assert_close(fast, slow)


def test_tdsm_condition_switches():
    x, classes, text, other = torch.randn(3, 256), torch.arange(5), random_text(), random_text(seed=9)
    other_tokens = [torch.cat([a[:, :1], b[:, 1:]], 1) for a, b in zip(text, other)]
    other_pooled = [torch.cat([b[:, :1], a[:, 1:]], 1) for a, b in zip(text, other)]

    def scores(text, conditions):
        return random_tdsm(text=text, conditions=conditions).scores(x, classes)

    for conditions, sees_tokens, sees_pooled in (("both", True, True),
                                                 ("pooled", False, True),
                                                 ("tokens", True, False)):
        expected = scores(text, conditions)
        assert torch.equal(expected, scores(other_tokens, conditions)) != sees_tokens
        assert torch.equal(expected, scores(other_pooled, conditions)) != sees_pooled


def test_tdsm_standardises_with_training_statistics_kept_in_the_weights():
    x = 5 * torch.randn(40, 256) + 3
    x[:, 7] = 2.0                                                         # a constant channel
    model = TDSM(random_text(), torch.arange(4), x, width=8, depth=1, heads=1)
    z = model.standardised(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(256), atol=1e-5, rtol=0)
    assert torch.isfinite(z).all()
    assert z[:, :7].std(0, correction=0).sub(1).abs().max() < 1e-4
    assert {"x_mean", "x_std", "noises"} <= model.state_dict().keys()
    raw = TDSM(random_text(), torch.arange(4), None, width=8, depth=1, heads=1)
    assert torch.equal(raw.standardised(x), x)
    small = TDSM(random_text(), torch.arange(4), x, width=8, depth=1, heads=1, scale=0.25)
    torch.testing.assert_close(small.standardised(x), z / 4)


def test_tdsm_text_at_scale_against_the_plain_formulas():
    seen = torch.tensor([0, 2, 3])
    of_length_1 = [F.normalize(prompt, dim=-1) * 1.003 for prompt in random_text()]   # stored in float16, say
    of_length_1[0][:, 2] = 0                                              # padding
    model = TDSM(of_length_1, seen, width=8, depth=1, heads=1, unit_text=True, centre=True)
    for p, prompt in enumerate(of_length_1):
        channels = slice(12 * p, 12 * p + 12)
        torch.testing.assert_close(model.tokens[..., channels].norm(dim=-1) > 0, prompt[:, 1:].any(-1))
        assert model.tokens[:, 0, channels].square().mean(-1).sub(1).abs().max() < 1e-5
        at_scale = prompt[:, 0] / prompt[:, 0].norm(dim=-1, keepdim=True) * math.sqrt(12)
        centred = at_scale - (at_scale[0] + at_scale[2] + at_scale[3]) / 3
        expected = centred / centred.norm(dim=-1, keepdim=True) * math.sqrt(12)
        torch.testing.assert_close(model.pooled_vectors()[:, channels], expected)
    longer = [30 * prompt for prompt in of_length_1]                      # CLIP's: as it is
    model = TDSM(longer, seen, width=8, depth=1, heads=1, unit_text=True)
    assert torch.equal(model.pooled_vectors(), torch.cat([prompt[:, 0] for prompt in longer], -1))
    assert torch.equal(model.tokens, torch.cat([prompt[:, 1:] for prompt in longer], -1))


def test_statistics_are_kept_in_the_weights():
    """A trained model on the text of other classes, and no training data at hand, scores as before."""
    x, seen, other = torch.randn(40, 256) + 1, torch.arange(4), random_text(seed=3)
    at_scale = {"standardise": True, "centre": True}
    small = {"width": 8, "depth": 1, "heads": 1}
    for name, settings in (("dvta", at_scale), ("tdsm", at_scale | small)):
        whole = [torch.cat([mine, theirs]) for mine, theirs in zip(random_text(), other)]
        model = train.build(name, whole, settings, seen, x)
        alone = train.rebuild(name, other, settings, model.state_dict())
        expected = model.scores(x, torch.arange(5, 10))
        torch.testing.assert_close(alone.scores(x, torch.arange(5)), expected)


# -------------------------------------------------------------------------------- what CUDA needs, on a CPU
def small_models():
    """A small one of each method and encoder."""
    x, text = torch.randn(30, 256), random_text()
    return {"dvta": DVTA(text, torch.arange(4), x, standardise=True, centre=True),
            "tdsm": random_tdsm(centre=True, unit_text=True),
            "stgcn": train.build_encoder("stgcn", 25, 2, 4),
            "shiftgcn": train.build_encoder("shiftgcn", 25, 2, 4)}


def loss_on_meta(model):
    """The loss of a method or an encoder on a batch of six that has no numbers."""
    x, y = torch.ones(6, 256, device="meta"), torch.arange(6, device="meta") % 4
    if hasattr(model, "loss"):
        return model.loss(x, y)
    x = torch.ones(6, 3, 8, 25, 2, device="meta")
    return F.cross_entropy(model.classify(zsar.augmented(x)), y)


@pytest.mark.parametrize("name", ["dvta", "tdsm", "stgcn", "shiftgcn", "ridge"])
def test_no_tensor_is_made_on_a_default_device(name, monkeypatch):
    """On "meta", where there are only shapes, one tensor of a CPU's would be refused."""
    monkeypatch.setitem(alignment.PAIRS_AT_ONCE, "meta", 8)
    monkeypatch.setitem(diffusion.MEMORY_BUDGET, "meta", 1 << 12)
    if name == "ridge":
        model = zsar.Ridge(random_text(), 1.0).to("meta")
        model.fit(torch.ones(6, 256, device="meta"), torch.arange(6, device="meta") % 4)
    else:
        model = small_models()[name].to("meta")
        loss_on_meta(model).backward()
        assert all(p.grad is None or p.grad.is_meta for p in model.parameters())
    if hasattr(model, "scores"):
        scores = model.scores(torch.ones(7, 256, device="meta"), torch.arange(5, device="meta"))
        assert scores.is_meta and scores.shape == (7, 5)


@pytest.mark.parametrize("name", ["dvta", "tdsm", "stgcn", "shiftgcn"])
def test_a_compiled_training_step_is_the_plain_one(name, monkeypatch):
    """In one graph, without a break: values and gradients."""
    monkeypatch.setattr(zsar.STGCN, "BLOCKS", ((8, 1), (zsar.FEATURES, 2)))
    monkeypatch.setattr(zsar.ShiftGCN, "UNITS", ((8, 1), (zsar.FEATURES, 2)))
    torch.manual_seed(0)
    model = small_models()[name]
    x, y = torch.randn(6, 256), torch.tensor([0, 1, 2, 3, 0, 1])
    if name == "dvta":
        step, batch = model.loss, (x, y)
    elif name == "tdsm":
        step, batch = model.triplet_loss, (x, y, y.flip(0), 9 * y, torch.randn(6, 256))
    else:
        model.eval()                                                      # dropout would draw anew
        step, batch = model.classify, (torch.randn(3, 3, 8, 25, 2),)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")

    def value_and_gradients(step):
        value = step(*batch)
        value = value[0] if name == "tdsm" else value.square().sum()
        return [value, *torch.autograd.grad(value, list(model.parameters()))]

    for fast, plain in zip(value_and_gradients(compiled), value_and_gradients(step)):
        torch.testing.assert_close(fast, plain)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["stgcn", "shiftgcn"])
def test_encoders_in_bfloat16(name):
    torch.manual_seed(0)
    model = small_models()[name].eval()
    x = torch.randn(6, 3, 8, 25, 2)
    whole = model.classify(x)
    half = train.fast_classify(model, compiled=False)(x)
    assert half.dtype == torch.float32 and not torch.equal(half, whole)
    assert F.cosine_similarity(half, whole).min() > 0.999
    half.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# ------------------------------------------------------------------------- data.py: reading and writing files
def test_the_fingerprint_is_of_the_values(small_folder, features_folder, tmp_path):
    a = np.arange(12.0).reshape(4, 3)
    np.save(tmp_path / "a.npy", a)
    memory_mapped, column_major = np.load(tmp_path / "a.npy", mmap_mode="r"), a.T.copy().T
    assert data.fingerprint(a) == data.fingerprint(memory_mapped) == data.fingerprint(column_major)
    others = [a.reshape(3, 4), a.astype(np.float32), a[::-1], a[:3]]
    assert len({data.fingerprint(b) for b in (a, *others)}) == 5
    hashes = [run_main(features_folder, tmp_path / "run", method="ridge")[0]["data_sha256"]]
    for name, index in (("features.npy", (0, 0)), ("text_description.npy", (3, 2, 1)), ("labels.npy", 0)):
        spoil(name, with_value(index, 2))(features_folder)
        hashes.append(run_main(features_folder, tmp_path / "run", method="ridge")[0]["data_sha256"])
    assert len(set(hashes)) == 4


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_files_are_told_whatever_they_raise(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "x.pt"
    for _ in range(300):
        path.write_bytes(rng.integers(0, 256, rng.integers(1, 60), dtype=np.uint8).tobytes())
        with pytest.raises(data.InputError, match="is damaged or no file"):
            data.read_tensors(path, ())


def test_a_failed_write_leaves_the_old_file_and_no_part(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")

    def full_disk(f):
        f.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(data.InputError, match="No space left"):
        data.write_file(path, full_disk)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["result.json"]


def test_a_full_disk_under_torch_save(tmp_path):
    def full_disk(f):
        f.write(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:664]")   # what torch.save makes of it

    with pytest.raises(data.InputError, match="x.pt: cannot be written .disk full"):
        data.write_file(tmp_path / "x.pt", full_disk)
    assert not list(tmp_path.iterdir())


def npy(header, numbers=b""):
    """The bytes of an .npy file with that header."""
    header = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + numbers


SHAPED = "{{'descr': '{}', 'fortran_order': False, 'shape': {}, }}"
BAD_ARRAYS = {  # what is wrong: (the bytes of a file, what the one line must say)
    "a table": (b"1,2,3\n4,5,6\n", "is no readable .npy file"),
    "a zip archive": (b"PK\x03\x04" + bytes(60), "is no readable .npy file"),
    "more than it holds": (npy(SHAPED.format("<f4", "(1000000000, 256)")), "is no readable .npy file"),
    "less than it holds": (npy(SHAPED.format("<f4", "(2,)"), bytes(12)), "holds 4 bytes more than"),
    "a shape beyond all": (npy(SHAPED.format("<f4", f"({10 ** 30},)")), "is no readable .npy file"),
    "a shape below 0": (npy(SHAPED.format("<f4", "(-2,)"), bytes(8)), "is no readable .npy file"),
    "a deep header": (npy("(" * 9000), "is no readable .npy file"),
    "an open header": (npy("{'descr': ("), "is no readable .npy file"),
    "a long header": (npy("{" + " " * 60000 + "}"), "is no readable .npy file"),
    "no such version": (b"\x93NUMPY\x09\x00" + bytes(60), "is no readable .npy file"),
    "a void type": (npy(SHAPED.format("|V4", "(2,)"), bytes(8)), "dtype is |V4, must be float"),
    "complex": (npy(SHAPED.format("<c8", "(1,)"), bytes(8)), "dtype is complex64, must be float"),
    "objects": (npy(SHAPED.format("|O", "(1,)"), bytes(8)), "holds pickled objects"),
    "too large for float32": (npy(SHAPED.format("<f8", "(1,)"), np.array(1e300).tobytes()),
                              "1e+300 in row 0"),
    "minus infinity": (npy(SHAPED.format("<f2", "(1,)"), b"\x00\xfc"), "-inf in row 0"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays(case, tmp_path):
    content, message = BAD_ARRAYS[case]
    path = tmp_path / "x.npy"
    path.write_bytes(content)
    with pytest.raises(data.InputError) as error:
        data.read_array(path, "float", "(N,)")
    assert str(error.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize("dtype", [">f4", ">f8", "<f2", np.longdouble])
def test_floats_of_every_kind_become_float32(dtype, tmp_path):
    np.save(tmp_path / "x.npy", np.array([1.5, -2, 0], dtype))
    x = data.read_array(tmp_path / "x.npy", "float", "(N,)")
    assert type(x) is np.ndarray and x.dtype == np.dtype(np.float32) and x.dtype.isnative
    assert x.tolist() == [1.5, -2, 0]


def test_only_regular_files_are_read(tmp_path):
    """A FIFO without a writer would hang, /dev/zero never end."""
    os.mkfifo(tmp_path / "fifo")
    readers = [data.read_json, data.read_lines, partial(data.read_tensors, keys=()),
               partial(data.read_array, kind="float")]
    for read, path in itertools.product(readers, [tmp_path / "fifo", tmp_path, Path("/dev/zero")]):
        with pytest.raises(data.InputError, match="is no regular file"):
            read(path)
    for read in readers:
        with pytest.raises(data.InputError, match="embedded null byte"):
            read(Path("a\0b"))
    with pytest.raises(data.InputError, match="no folder can be made there .embedded null byte"):
        data.prepare_folder(Path("a\0b"))
    with pytest.raises(data.InputError, match="cannot be written .embedded null byte|cannot be written"):
        data.write_json(Path("a\0b"), {})


def test_tensors_with_flipped_bits_are_refused(tmp_path):
    """Fuzz: a bit flipped anywhere is told, or harms nothing: it was in the container's own slack."""
    path, good = tmp_path / "x.pt", {"a": torch.arange(500.), "b": [torch.ones(3), "name"]}
    torch.save(good, path)
    whole, rng, told = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            value = data.read_tensors(path, "ab")
            assert torch.equal(value["a"], good["a"]) and torch.equal(value["b"][0], good["b"][0])
        except data.InputError:
            told += 1
    assert told > 200


@pytest.mark.parametrize("value", [torch.ones(3), [1], {"a": 1}, {"a": 1, "b": torch.tensor(np.nan)}, "ab"],
                         ids=str)
def test_other_tensors_are_refused(value, tmp_path):
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(data.InputError, match="x.pt: is damaged or no file of this version"):
        data.read_tensors(tmp_path / "x.pt", ["a", "b"])


# ----------------------------------------------------------------------- data.py: the terminal and its errors
def commanded(command, capsys):
    """Run a command of command_line that fails; → its exit status and its one line."""
    with pytest.raises(SystemExit) as stop:
        data.command_line(command)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return stop.value.code, error


def test_the_command_line_fails_in_one_line(capsys):
    def fail(error):
        warnings.warn("of a library")
        raise error
    assert commanded(lambda: fail(data.InputError("a\nb")), capsys) == (2, "error: a b\n")
    assert commanded(lambda: fail(MemoryError()), capsys) == (2, "error: out of memory\n")
    full = OSError(28, "No space left")
    assert commanded(lambda: fail(full), capsys) == (2, "error: [Errno 28] No space left\n")
    assert commanded(lambda: fail(KeyboardInterrupt("; go on")), capsys) == (130, "interrupted; go on\n")
    status, line = commanded(lambda: torch.empty(1 << 60), capsys)
    assert status == 2 and "allocate memory" in line
    with pytest.raises(RuntimeError, match="a defect"):
        data.command_line(lambda: fail(RuntimeError("a defect")))


def test_output_never_raises(features_folder, tmp_path):
    """Nobody reads on, and the terminal has no γ: the run ends well all the same."""
    command = shlex.join([sys.executable, str(ROOT / "train.py"),
                          *least(features_folder, tmp_path / "run", "--gzsl", method="ridge")])
    shell = f"set -o pipefail; {command} | head -1"
    for line, environment in ((shell, {}), (command, {"PYTHONIOENCODING": "ascii"})):
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True,
                              env=os.environ | environment)
        assert (done.returncode, done.stderr) == (0, "")
        assert result_of(tmp_path / "run")["method"] == "ridge"
    assert "among all classes, ? " in done.stdout


@pytest.mark.parametrize("name", ["train.py", "data.py"])
def test_ctrl_c_while_the_libraries_load(name):
    """A module that interrupts its own import stands in for PyTorch's seconds."""
    code = (f"import builtins, os, runpy, signal\nreal = builtins.__import__\n"
            f"def load(name, *rest):\n    if name == 'torch': os.kill(os.getpid(), signal.SIGINT)\n"
            f"    return real(name, *rest)\nbuiltins.__import__ = load\n"
            f"runpy.run_path({str(ROOT / name)!r}, run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


# -------------------------------------------------------------------------------------- data.py: splits, text
def test_published_splits_are_sound():
    counts = {"ntu60": 60, "ntu120": 120, "pku51": 51}
    for name, (dataset, unseen, val) in data.SPLITS.items():
        unseen, val = [int(i) for i in unseen.split()], [int(i) for i in val.split()]
        assert len({*unseen, *val}) == len(unseen) + len(val)
        assert max(unseen + val) < counts[dataset]
        if "smie" not in name:
            seen_count, unseen_count = map(int, name.split("_"))
            assert len(unseen) == unseen_count
            assert seen_count + unseen_count == counts[dataset]
            assert len(val) in (0, unseen_count)
    assert len(data.TRAIN_SUBJECTS["ntu60"]) == 20
    assert len(set(data.TRAIN_SUBJECTS["ntu120"])) == 53


def test_the_list_of_splits(capsys):
    train.main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 17
    assert lines[1].split() == ["55_5", "ntu60", "55", "5", "5", "SynSE"]
    assert lines[-1].split() == ["smie_9", "pku51", "46", "5", "-", "SMIE"]


@pytest.mark.parametrize("dataset, count", [("ntu60", 60), ("ntu120", 120), ("pku51", 51)])
def test_bundled_text(dataset, count):
    names, text = data.bundled_classes(dataset), data.bundled_text(dataset)
    assert len(names) == len(set(names)) == count
    for prompt in text:
        pooled, tokens = prompt[:, 0], prompt[:, 1:]                      # (C, 768), (C, L, 768)
        assert prompt.shape[0] == count and prompt.shape[1] <= 1 + 35 and prompt.shape[2] == 768
        np.testing.assert_allclose(np.linalg.norm(pooled, axis=1), 1, atol=2e-3)
        is_token = tokens.any(-1)                                         # (C, L): tokens first, then padding
        assert is_token[:, 0].all()
        assert not (~is_token[:, :-1] & is_token[:, 1:]).any()
        # the pooled row is the normalised mean of the token rows
        mean = tokens.sum(1)
        mean /= np.linalg.norm(mean, axis=1, keepdims=True)
        np.testing.assert_allclose(mean, pooled, atol=2e-3)
    rows = [names.index("Drink water"), names.index("Reading")]
    label, description = (prompt[rows, 0] for prompt in text)
    likeness = description @ label.T                                      # of each description to each label
    assert likeness[0, 0] > likeness[0, 1]
    assert likeness[1, 1] > likeness[1, 0]


def test_pooled_only_text_is_accepted(features_folder):
    for name in ("text_label.npy", "text_description.npy"):
        spoil(name, lambda text: text[:, 0])(features_folder)
    assert [t.shape for t in data.read_data(features_folder, "9_3").text] == [(12, 1, 768)] * 2


def test_named_text_must_fit(tmp_path):
    a, b, c = (tmp_path / f"{name}.npy" for name in "abc")
    for path, shape in ((a, (60, 8)), (b, (60, 9)), (c, (59, 8))):
        np.save(path, np.random.default_rng(0).normal(size=shape))
    text = data.read_data("synthetic", "55_5", [a, a]).text
    assert [t.shape for t in text] == [(60, 1, 8)] * 2
    for files, message in (([a, b], "b.npy: width 9 differs from the 8 of"), ([c], "text for 59 classes")):
        with pytest.raises(data.InputError, match=message):
            data.read_data("synthetic", "55_5", files)


def test_embed_script_says_that_transformers_is_missing(tmp_path):
    code = ("import sys, runpy\n"
            "sys.modules['transformers'] = None\n"
            "sys.argv = ['embed.py', 'M', 'a.txt', 'a.npy']\n"
            f"runpy.run_path({str(ROOT / 'text' / 'embed.py')!r}, run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "pip install transformers" in done.stderr


def tiny_text_model(folder, kind):
    """A folder with a random Sentence-BERT-like or CLIP text model of width 16, and a tokenizer of letters.
    """
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    letters = ["<pad>", "<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)])
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    sizes = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 2, "max_position_embeddings": 77, "bos_token_id": 2, "eos_token_id": 3,
             "pad_token_id": 0}
    with train.seeded(0, torch.device("cpu")):
        if kind == "clip":
            model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes))
        else:
            model = transformers.BertModel(transformers.BertConfig(**sizes))
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("kind", ["clip", "bert"])
def test_embed_script_on_a_tiny_model(kind, tmp_path):
    model = tiny_text_model(tmp_path / "model", kind)
    (tmp_path / "prompts.txt").write_text("a b c\nd\n" + " ".join("abcdefghij" * 4) + "\n")
    done = script("text/embed.py", tmp_path / "model", "prompts.txt", "text.npy", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "cut at 35 tokens: a b c" in done.stdout
    text = np.load(tmp_path / "text.npy").astype(np.float32)
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


def test_embed_script_takes_three_arguments():
    done = script("text/embed.py", "model")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "usage: " in done.stderr


# ----------------------------------------------------------------------------------- data.py: dataset folders
def write_published(folder, kind, width=256):
    """A published folder for split 55_5: three training samples a seen class, three test samples a class."""
    rng, unseen = np.random.default_rng(0), [10, 11, 19, 26, 56]
    seen = np.setdiff1d(np.arange(60), unseen)
    labels_of_parts = np.repeat(seen, 3), np.repeat(unseen, 3), np.repeat(range(60), 3)
    sample_shape = (width,) if "features" in kind else (3, 6, 25, 2)
    folder.mkdir()
    for (x_name, y_name), labels in zip(data.PUBLISHED[kind], labels_of_parts):
        x = rng.normal(size=(len(labels), *sample_shape)).astype(np.float32)
        np.save(folder / f"{x_name}.npy", x)
        np.save(folder / f"{y_name}.npy", labels)
    return folder


def test_split_of_a_folder(small_folder):
    d = data.read_data(small_folder, "9_3")
    labels, subjects = np.load(small_folder / "labels.npy"), np.load(small_folder / "subjects.npy")
    assert d.unseen.tolist() == [1, 5, 8]
    assert d.seen.tolist() == [0, 2, 3, 4, 6, 7, 9, 10, 11]
    for n in range(len(labels)):
        unseen, tests = labels[n] in (1, 5, 8), subjects[n] in (2, 4)
        assert (n in d.train) == (not unseen and not tests)
        assert (n in d.seen_test) == (not unseen and tests)
        assert (n in d.unseen_test) == (unseen and tests)


def test_seen_classes_may_be_named(features_folder):
    splits = {"val": {"unseen": [2, 3], "seen": [0, 4, 6], "test_subjects": [2]}}
    (features_folder / "splits.json").write_text(json.dumps(splits))
    d = data.read_data(features_folder, "val")
    assert set(d.labels[d.train]) == set(d.labels[d.seen_test]) == {0, 4, 6}
    assert set(d.labels[d.unseen_test]) == {2, 3}


def test_validation_holds_classes_out_of_the_training_samples(small_folder):
    d = data.read_data(small_folder, "9_3")
    val = data.validation(d)
    assert val.unseen.tolist() == d.val.tolist() == [2, 3]
    assert val.seen.tolist() == [0, 4, 6, 7, 9, 10, 11]
    rows = np.concatenate([val.train, val.seen_test, val.unseen_test])
    assert sorted(rows) == d.train.tolist()                               # training samples alone, each once
    assert set(d.labels[val.unseen_test]) == {2, 3}
    assert not {2, 3} & set(d.labels[val.train])
    assert not {2, 3} & set(d.labels[val.seen_test])
    assert len(val.seen_test) < len(val.train) / 2
    # none named: as many as unseen ones, of the seen
    drawn = data.read_data(small_folder, "10_2")
    assert len(drawn.val) == 2 and set(drawn.val) <= set(drawn.seen)
    assert data.read_data(small_folder, "10_2").val.tolist() == drawn.val.tolist()
    assert data.read_data("synthetic", "55_5").val.tolist() == [16, 21, 25, 31, 48]


def test_an_ntu_folder_takes_bundled_text_splits_and_subjects(tmp_path):
    features = np.random.default_rng(0).random((120, 256), dtype=np.float32)
    np.save(tmp_path / "features.npy", features)
    np.save(tmp_path / "labels.npy", np.repeat(np.arange(60), 2))
    np.save(tmp_path / "subjects.npy", np.tile([1, 3], 60))               # performer 1 trains, 3 tests
    (tmp_path / "classes.txt").write_text("\n".join(data.bundled_classes("ntu60")))
    d = data.read_data(tmp_path, "55_5")
    assert d.name == "ntu60"
    assert d.unseen.tolist() == [10, 11, 19, 26, 56]
    assert len(d.train) == 55 and len(d.seen_test) == 55 and len(d.unseen_test) == 5
    np.testing.assert_array_equal(d.text[1], data.bundled_text("ntu120")[1][:60])
    with pytest.raises(data.InputError, match="unknown split '110_10' for ntu60; choose one of: 55_5, 48_12"):
        data.read_data(tmp_path, "110_10")


@pytest.mark.parametrize("kind", data.PUBLISHED)
def test_a_published_folder_runs(kind, tmp_path, capsys):
    folder = write_published(tmp_path / "data", kind)
    result, _ = run_main(folder, tmp_path / "run", method="ridge", split="55_5")
    printed = capsys.readouterr().out
    assert f"ntu60 ({kind}), split 55_5: 55 seen and 5 unseen" in printed
    assert "samples: 165 training, 165 seen test, 15 unseen" in printed
    assert result["source"] == kind and result["dataset"] == "ntu60" and result["zsl"]["n"] == 15
    d = data.read_data(folder, "55_5")
    assert len(d.train) == len(d.seen_test) == 165
    assert d.text[0].shape == (60, 15, 768)
    _, (_, unseen_labels), seen_test = data.PUBLISHED[kind]
    for name in seen_test:
        (folder / f"{name}.npy").unlink()
    assert len(data.read_data(folder, "55_5").seen_test) == 0
    message = r"its classes .* do not fit split smie_1, whose unseen ones are \[4, 19, 31, 47, 51\]"
    with pytest.raises(data.InputError, match=message):
        data.read_data(folder, "smie_1")
    spoil(f"{unseen_labels}.npy", with_value(slice(0, 3), 11))(folder)
    message = r"its classes \[11, 19, 26, 56\] do not fit split 55_5, .*\[10, 11, 19, 26, 56\]"
    with pytest.raises(data.InputError, match=message):
        data.read_data(folder, "55_5")
    with pytest.raises(data.InputError, match="unknown split '54_6'.*--list"):
        data.read_data(folder, "54_6")


def test_published_features_where_the_unseen_samples_are_test_npy(tmp_path):
    folder = write_published(tmp_path / "data", "SynSE / SA-DVAE / TDSM features")
    before = data.read_data(folder, "55_5")
    (folder / "ztest.npy").rename(folder / "test.npy")
    (folder / "z_label.npy").rename(folder / "test_label.npy")
    after = data.read_data(folder, "55_5")
    assert np.array_equal(after.features, before.features)
    assert np.array_equal(after.unseen_test, before.unseen_test)


def test_published_features_of_another_width(tmp_path):
    folder = write_published(tmp_path / "data", "SynSE / SA-DVAE / TDSM features", width=512)
    with pytest.raises(data.InputError, match=r"train.npy: shape is \(165, 512\), must be \(N, 256\)"):
        data.read_data(folder, "55_5")


def text_width(weights, method):
    """The width of the text that a method was trained on, as its weights tell it."""
    if method == "dvta":
        return weights["projector.fc3.weight"].shape[0]
    return weights["denoiser.text_in.weight"].shape[1]


def test_text_beside_published_features_and_named_text(tmp_path):
    folder = write_published(tmp_path / "data", "SynSE / SA-DVAE / TDSM features")
    rng, mine = np.random.default_rng(1), tmp_path / "mine.npy"
    label, description = rng.normal(size=(2, 60, 32)).astype(np.float32)
    np.save(folder / "ntu60_embeddings.npy", label)
    np.save(folder / "ntu60_des_embeddings.npy", description)
    np.save(mine, rng.normal(size=(60, 20)).astype(np.float32))
    np.save(folder / "ntu60_gpt_embeddings.npy", label)                   # somebody's, of whatever kind
    d = data.read_data(folder, "55_5")
    assert d.notes == [f"{folder}: ntu60_gpt_embeddings.npy left alone; --text chooses text features"]
    text = d.text
    assert np.array_equal(text[0][:, 0], label)
    assert np.array_equal(text[1][:, 0], description)
    for method, beside_width in (("dvta", 32), ("tdsm", 2 * 32)):
        _, weights = run_main(folder, tmp_path / method, method=method, split="55_5")
        assert text_width(weights, method) == beside_width
        out = tmp_path / f"{method}_mine"
        result, weights = run_main(folder, out, "--text", mine, method=method, split="55_5")
        assert text_width(weights, method) == 20
        assert str(mine) in result["arguments"]


@pytest.mark.parametrize("num_joints", [20, 17, 18])
def test_other_skeletons_go_all_the_way_through(features_folder, num_joints, tmp_path):
    (features_folder / "features.npy").unlink()
    walkers = [person(8, 0.2, seed=n, joints=num_joints) for n in range(96)]
    np.save(features_folder / "skeletons.npy", np.stack(walkers)[..., None].astype(np.float32))
    result, _ = run_main(features_folder, tmp_path / "run", method="ridge")
    assert result["zsl"]["n"] == 12
    assert result["encoder"]["seen_test_acc"] is not None
    assert len(predictions_of(tmp_path / "run", features_folder)) == 96


# --------------------------------------------------------------------------------------- data.py: bad folders
def split_file(**entry):
    """→ a function that writes the split anew, with these entries changed."""
    return write("splits.json", json.dumps({"9_3": {"unseen": [1, 5, 8], "test_subjects": [2, 4]} | entry}))


def training_rows_of_type_int(folder):
    (folder / "splits.json").write_text(json.dumps({"9_3": {"unseen": [1, 5, 8]}}))
    np.save(folder / "training.npy", np.ones(96, int))


def truncated_features(folder):
    (folder / "features.npy").write_bytes((folder / "features.npy").read_bytes()[:5000])


def pickled(name):
    """→ a function that saves an array of Python objects."""
    return lambda folder: np.save(folder / name, np.array([{}] * 96, dtype=object), allow_pickle=True)


BAD_INPUT = {  # what is wrong: (how to spoil the folder, what the one line must name)
    "no folder": (shutil.rmtree, ["mine: no such folder"]),
    "no format": (remove("features.npy"),
                  ["mine: fits no format; looked for skeletons.npy (", "features.npy (", "train.npy (SynSE",
                   "seen_train_data.npy (SMIE", "python data.py"]),
    "two formats": (save("train.npy", np.zeros(1)),
                    ["mine: holds two formats, dataset folder with features and SynSE"]),
    "two sources": (save("skeletons.npy", np.zeros(1)),
                    ["mine: holds two formats, dataset folder with skeletons and"]),
    "no labels": (remove("labels.npy"), ["labels.npy: no such file"]),
    "no text": (remove("text_label.npy"), ["text_label.npy: no such file"]),
    "no classes": (remove("classes.txt"), ["classes.txt: no such file"]),
    "no splits": (remove("splits.json"), ["splits.json: no such file"]),
    "no samples": (save("features.npy", np.zeros((0, 256), np.float32)), ["features.npy: shape is (0, 256)"]),
    "feature width": (spoil("features.npy", lambda a: a[:, :100]),
                      ["features.npy: shape is (96, 100), must be (N, 256)"]),
    "feature dtype": (spoil("features.npy", lambda a: a.astype(int)),
                      ["features.npy: dtype is int64, must be float"]),
    "label dtype": (spoil("labels.npy", lambda a: a.astype(float)),
                    ["labels.npy: dtype is float64, must be int"]),
    "label count": (spoil("labels.npy", lambda a: a[:-1]), ["labels.npy: shape is (95,), must be (96,)"]),
    "subject count": (spoil("subjects.npy", lambda a: a[:, None]), ["subjects.npy: shape is (96, 1)"]),
    "skeleton shape": (skeletons(shape=(96, 4, 25, 1)),
                       ["skeletons.npy: shape is (96, 4, 25, 1), must be (N, 3, T, V, M)"]),
    "skeleton channels": (skeletons(shape=(96, 2, 4, 25, 1)), ["skeletons.npy: shape is (96, 2, 4, 25, 1)"]),
    "unknown joints": (skeletons(shape=(96, 3, 4, 24, 1)),
                       ["skeletons.npy: has 24 joints", "25, 20, 17, 18"]),
    "NaN in skeletons": (skeletons(value=np.nan),
                         ["skeletons.npy: nan in row 95, must be a number within ±1000 m; mend"]),
    "kilometres away": (skeletons(value=1000), ["skeletons.npy: 1000.0 in row 95, must be"]),
    "nobody at all": (skeletons(), ["skeletons.npy: no sequence has a body"]),
    "one number": (save_bodies(lambda x: np.ones_like(x)), ["skeletons.npy: no sequence has a body"]),
    "millimetres": (save_bodies(lambda x: 100 * x),
                    ["skeletons.npy: the median torso", "are these millimetres"]),
    "too small": (save_bodies(lambda x: 0.01 * x), ["skeletons.npy: the median torso"]),
    "float64 features": (spoil("features.npy", lambda a: a.astype(np.float64) * 1e300),
                         ["features.npy: ", "in row 0, must be"]),
    "the same bodies": (save_bodies(lambda x: x[[0] * 96]), ["skeletons.npy: all sequences are the same"]),
    "not the first person": (save_bodies(lambda x: np.concatenate([0 * x, x], -1)),
                             ["skeletons.npy: no sequence has a body"]),
    "dead features": (spoil("features.npy", lambda a: a * np.float32(1e-8)),
                      ["mine: all features for training are the same"]),
    "one seen class": (split_file(seen=[0]), ["mine: split '9_3' leaves one class to train on"]),
    "the same features": (spoil("features.npy", np.ones_like),
                          ["mine: all features for training are the same"]),
    "NaN in features": (spoil("features.npy", with_value((7, 3), np.nan)),
                        ["features.npy: nan in row 7, must be a number within ±1e+06; mend"]),
    "infinity in text": (spoil("text_description.npy", with_value((2, 1, 0), np.inf)),
                         ["text_description.npy: inf in row 2"]),
    "label too high": (spoil("labels.npy", with_value(5, 12)), ["labels.npy: label 12 in row 5", "0 to 11"]),
    "label below 0": (spoil("labels.npy", with_value(5, -1)), ["labels.npy: label -1 in row 5"]),
    "text of other classes": (spoil("text_label.npy", lambda a: a[:11]),
                              ["text_label.npy: has text for 11 classes", "the dataset has 12"]),
    "text of other width": (spoil("text_label.npy", lambda a: a[..., :512]),
                            ["text_description.npy: width 768", "512"]),
    "empty text": (spoil("text_label.npy", with_value((4, 0), 0)),
                   ["text_label.npy: the pooled vector of class 4"]),
    "text shape": (spoil("text_label.npy", lambda a: a[:, 0, 0]), ["text_label.npy: shape is (12,)"]),
    "text of float64": (save("text_label.npy", np.full((12, 4), 1e300)),
                        ["text_label.npy: 1e+300 in row 0, must be a number"]),
    "the same text": (spoil("text_label.npy", lambda a: a[[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 4, 11]]),
                      ["text_label.npy: classes 4 and 10 (", ") have the same text"]),
    "a multiple": (spoil("text_label.npy", lambda a: a[[0, 1, 2, 3, 0, 5, 6, 7, 8, 9, 10, 11]] * 0.5),
                   ["text_label.npy: classes 0 and 4 ("]),
    "nearly no text": (spoil("text_label.npy", lambda a: a * np.float32(1e-8)),
                       ["text_label.npy: the pooled vector of class"]),
    "one text for all": (spoil("text_label.npy", lambda a: a[[0] * 12]),
                         ["text_label.npy: classes 0 and 1 ("]),
    "class name twice": (write("classes.txt", "a\nb\nc\nb\n"), ["classes.txt: names 'b' twice"]),
    "empty class name": (write("classes.txt", "a\n\nb\n"), ["classes.txt: has an empty line"]),
    "class names in bytes": (write("classes.txt", b"\xff\xfe\n"), ["classes.txt: cannot be read"]),
    "pickled labels": (pickled("labels.npy"), ["labels.npy: holds pickled objects"]),
    "pickled features": (pickled("features.npy"), ["features.npy: holds pickled objects"]),
    "a bare pickle": (write("labels.npy", b"\x80\x04]\x94."), ["labels.npy: is no readable .npy file"]),
    "truncated array": (truncated_features, ["features.npy: is no readable .npy file"]),
    "empty file": (write("labels.npy", b""), ["labels.npy: is no readable .npy file"]),
    "split unknown": (write("splits.json", '{"a": {}, "b": {}}'),
                      ["splits.json: has no split '9_3'", "a, b"]),
    "split is no JSON": (write("splits.json", '{"9_3": '), ["splits.json: cannot be read as JSON"]),
    "training dtype": (training_rows_of_type_int, ["training.npy: dtype is int64, must be bool"]),
    "split is a list": (write("splits.json", "[1]"),
                        ["splits.json: cannot be read as JSON (must be an object: {...})"]),
    "class twice": (split_file(unseen=[1, 5, 5]),
                    ["splits.json: split '9_3': 'unseen' names a class twice: [5]"]),
    "unseen and val": (split_file(val=[5]),
                       ["splits.json: split '9_3': class 5 is unseen, and 'val' or 'seen' names it"]),
    "unseen class in training": (
        split_file(seen=[0, 2, 5]),
        ["splits.json: split '9_3': class 5 is unseen, and 'val' or 'seen' names it"]),
    "class outside": (split_file(unseen=[12]),
                      ["splits.json: split '9_3': 'unseen' must be a list of class ids from 0 to 11"]),
    "no unseen class": (split_file(unseen=[]), ["splits.json: split '9_3': 'unseen' lists 0 classes"]),
    "one unseen class": (split_file(unseen=[3]), ["splits.json: split '9_3': 'unseen' lists 1 classes"]),
    "unknown key": (split_file(unsen=[3]), ["splits.json: split '9_3': unknown key 'unsen'"]),
    "key twice": (write("splits.json", '{"9_3": {}, "9_3": {}}'),
                  ["splits.json:", "'9_3' stands there twice"]),
    "val is not seen": (split_file(seen=[0, 2, 3], val=[4]),
                        ["splits.json: split '9_3': 'val' names class 4, which is not in 'seen'"]),
    "subject beyond int64": (split_file(test_subjects=[2 ** 70]),
                             ["splits.json: split '9_3': 'test_subjects' must list"]),
    "deep JSON": (write("splits.json", "[" * 100_000), ["splits.json: cannot be read as JSON"]),
    "no test subjects": (split_file(test_subjects=None),
                         ["splits.json: split '9_3': 'test_subjects' must list"]),
    "nothing to test": (split_file(test_subjects=[9]), ["mine: split '9_3' leaves no unseen test samples"]),
    "nothing to train on": (split_file(test_subjects=[1, 2, 3, 4]),
                            ["mine: split '9_3' leaves no training samples"]),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_2(case, features_folder, tmp_path, capsys):
    spoiler, fragments = BAD_INPUT[case]
    spoiler(features_folder)
    with pytest.raises(SystemExit) as stop:
        run_main(features_folder, tmp_path / "out" / "run")
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert all(fragment in printed.err for fragment in fragments), printed.err
    assert not (tmp_path / "out").exists()                                # nothing half-written


ODDITIES = {  # what may be meant: (how to change the folder, the one line)
    "constant features": (spoil("features.npy", with_value((slice(None), [3, 7]), 0.5)),
                          "2 of 256 features never change in training"),
    "strangers": (split_file(test_subjects=[2, 4, 77]), "tests subjects [77], who are in no sample"),
    "an untested class": (spoil("labels.npy", lambda a: np.where(a == 5, 6, a)),
                          "no test samples of unseen classes: "),
    "some in millimetres": (save_bodies(lambda x: np.concatenate([x[:90], 100 * x[90:]])),
                            "6 of 96 sequences have a torso outside 0.05 to 3 m"),
    "nobody in two": (save_bodies(with_value([0, 5], 0)), "2 of 96 sequences have no body"),
}


@pytest.mark.parametrize("case", ODDITIES)
def test_oddities_are_one_line_of_warning(case, features_folder):
    change, note = ODDITIES[case]
    change(features_folder)
    notes = data.read_data(features_folder, "9_3").notes
    assert len(notes) == 1 and note in notes[0] and str(features_folder) in notes[0]


def test_sequences_without_a_body_are_not_trained_on(features_folder):
    save_bodies(with_value([0, 2, 8], 0))(features_folder)
    d = data.read_data(features_folder, "9_3")
    assert np.load(features_folder / "labels.npy")[[0, 1, 2]].tolist() == [0, 0, 0]
    assert np.load(features_folder / "subjects.npy")[[0, 1, 2]].tolist() == [1, 1, 2]
    assert 0 not in d.train and 1 in d.train                              # of a training subject
    assert 2 in d.seen_test                                               # a test sample stays one


def test_millimetres_in_a_published_folder(tmp_path):
    folder = write_published(tmp_path / "published", "SMIE / DVTA skeletons")
    spoil("unseen_data.npy", lambda x: 100 * x)(folder)
    with pytest.raises(data.InputError, match="unseen_data.npy: the median torso"):
        data.read_data(folder, "55_5")


def test_presets_follow_the_classes_not_the_folder(features_folder, tmp_path):
    args = train.parse_arguments(["--method", "dvta", "--split", "9_3"])
    for name in ("ntu60", "synthetic"):
        features_folder = features_folder.rename(tmp_path / name)
        settings, _ = train.choose_settings(args, data.read_data(features_folder, "9_3"), torch.device("cpu"))
        assert settings["dvta"] == train.DVTA_SMALL and settings["encoder"] == train.ENCODER


def test_a_folder_on_random_edits(features_folder):
    """Fuzz: 300 random edits each of an array and of splits.json are told in one line, or read as finite."""
    rng = np.random.default_rng(0)
    for name in ("text_label.npy", "text_description.npy"):
        spoil(name, lambda text: text[:, 0, :8])(features_folder)
    for name in ("features.npy", "splits.json"):
        path = features_folder / name
        good, outcomes = path.read_bytes(), {"read": 0, "told": 0}
        for _ in range(300):
            content = bytearray(good)
            start = 0 if name == "splits.json" or rng.random() < 0.5 else int(rng.integers(len(good) - 200))
            part = content[start:start + 400]                             # the header is short
            edit_at_random(part, rng)
            content[start:start + 400] = part
            path.write_bytes(content)
            try:
                d = data.read_data(features_folder, "9_3")
                assert np.isfinite(d.features).all() and len(d.train) and len(d.unseen) > 1
                outcomes["read"] += 1
            except data.InputError as e:
                assert "\n" not in str(e) and str(features_folder) in str(e)
                outcomes["told"] += 1
        path.write_bytes(good)
        assert min(outcomes.values()) > 10, outcomes


# ------------------------------------------------------------------------------------ data.py: raw recordings
NAMES = ["S001C001P001R001A001", "S001C002P003R001A013", "S002C003P001R002A060", "S003C001P009R002A002",
         "S003C002P002R001A007"]


def skipped_in(out):
    """The lines of skipped.csv as [file, reason]."""
    lines = (out / "skipped.csv").read_text().splitlines()
    return [line.split(",", 1) for line in lines[1:]]


@pytest.fixture
def raw_ntu(tmp_path):
    """Five good .skeleton files of 20 frames, the first in a folder within; the second holds two persons."""
    folder = tmp_path / "raw"
    (folder / "nested").mkdir(parents=True)
    for i, name in enumerate(NAMES):
        persons = [person(20, 0.1, seed=i)]
        if i == 1:
            persons.append(person(20, 0.2, seed=9))
        place = folder / "nested" if i == 0 else folder
        write_skeleton(place / f"{name}.skeleton", np.stack(persons, -1))
    return folder


def changed(old, new):
    """→ a function that changes a part of a text where it stands first."""
    return lambda text: text.replace(old, new, 1)


def with_coordinate(new):
    """→ a function that changes one coordinate of a .skeleton file, its word 14."""
    return lambda text: text.replace(text.split()[14], new, 1)


BROKEN = {  # kind: (what happens to a good file, the reason)
    "empty": (lambda text: "", "is truncated"),
    "truncated": (lambda text: text[:len(text) // 2], "is truncated"),
    "last number gone": (lambda text: text.rsplit(None, 1)[0], "is truncated"),
    "not a number": (with_coordinate("x.y"), "could not convert string to float: 'x.y'"),
    "not a count": (changed("20\n1\n", "20\none\n"), "invalid literal for int"),
    "NaN": (with_coordinate("nan"), "a coordinate is no number below 1000 m"),
    "far away": (with_coordinate("1e30"), "a coordinate is no number below 1000 m"),
    "joint count": (changed("\n25\n", "\n24\n"), "24 joints in frame 0, must be 25"),
    "more than its frames": (lambda text: text + "1\n", "goes on after its 20 frames"),
    "nobody": (lambda text: "3\n0\n0\n0\n", "no body"),
    "no frames": (lambda text: "0\n", "no body"),
    "binary": (lambda text: "\xff\xfe" + text, "can't decode byte"),
}


def write_pku(raw, name, video, labels):
    """Write a PKU-MMD video (frames, 150) and the lines of its labels."""
    frames = [" ".join(map(repr, frame)) for frame in video.tolist()]
    for folder, lines in (("Skeleton", frames), ("Label", labels)):
        (raw / folder).mkdir(parents=True, exist_ok=True)
        (raw / folder / f"{name}.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture
def raw_pku(tmp_path):
    """Two PKU-MMD videos of 60 frames, two segments each; a second person in the first of 0003-M alone."""
    raw, video = tmp_path / "pku", np.zeros((60, 2, 25, 3))
    video[:, 0] = person(60, 0.3).transpose(1, 2, 0)
    write_pku(raw, "0002-L", video.reshape(60, 150), ["5,0,20,2", "51,30,60,1"])
    video[:20, 1] = person(20, 0.1, seed=1).transpose(1, 2, 0)
    write_pku(raw, "0003-M", video.reshape(60, 150), ["1,0,20,2", "2,20,40,2"])
    lists = "Training videos:\n0002-L, 0004-R, \nValidation videos:\n0003-M, \n"
    (raw / "cross-subject.txt").write_text(lists)
    return raw


def test_ntu_preparation(raw_ntu, tmp_path, monkeypatch, capsys):
    (raw_ntu / "S001C001P001R001A002.skeleton").write_text("")
    done = script("data.py", "ntu", raw_ntu, "out", "--frames", 20, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for part in ("6/6 files", "files/s", "5 samples, 1 skipped"):
        assert part in done.stdout
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {
        "cameras.npy", "classes.txt", "labels.npy", "prepared.json", "setups.npy", "skeletons.npy",
        "skipped.csv", "subjects.npy", "training.npy"}
    assert [p.name for p in tmp_path.iterdir() if "part" in p.name] == []
    x = np.load(out / "skeletons.npy", mmap_mode="r")
    assert isinstance(x, np.memmap) and x.shape == (5, 3, 20, 25, 2) and x.dtype == np.float32
    np.testing.assert_allclose(x[0, ..., 0], person(20, 0.1, seed=0), rtol=1e-6)
    np.testing.assert_allclose(x[1, ..., 0], person(20, 0.2, seed=9), rtol=1e-6)   # more motion: main actor
    np.testing.assert_allclose(x[1, ..., 1], person(20, 0.1, seed=1), rtol=1e-6)
    assert not x[[0, 2, 3, 4], ..., 1].any()
    columns = {"labels": [0, 12, 59, 1, 6], "subjects": [1, 3, 1, 9, 2], "cameras": [1, 2, 3, 1, 2],
               "setups": [1, 1, 2, 3, 3], "training": [True, False, True, True, True]}
    for column, values in columns.items():
        assert np.load(out / f"{column}.npy").tolist() == values
    assert data.read_lines(out / "classes.txt") == data.bundled_classes("ntu60")
    skipped = (out / "skipped.csv").read_text().splitlines()
    assert skipped == ["file,reason", "S001C001P001R001A002.skeleton,is truncated"]
    d = data.read_data(out, "smie_2")                                     # the published splits apply to it
    assert d.name == "ntu60"
    assert d.train.tolist() == [0, 3, 4]
    assert d.unseen_test.tolist() == [1]
    monkeypatch.chdir(tmp_path)
    data.prepare("ntu", raw_ntu, "out", frames=20)
    assert capsys.readouterr().out == "out: is prepared already and left alone\n"
    with pytest.raises(data.InputError, match="out: was prepared otherwise, with other frames and protocol"):
        data.prepare("ntu", raw_ntu, "out", frames=64, protocol="xview")
    next(raw_ntu.rglob("*A013.skeleton")).unlink()
    with pytest.raises(data.InputError, match="with other recordings; choose"):
        data.prepare("ntu", raw_ntu, "out", frames=20)


@pytest.mark.parametrize("protocol, training", [("xview", [False, True, True, False, True]),
                                                ("xset", [False, False, True, False, False])])
def test_ntu_protocols(raw_ntu, tmp_path, protocol, training):
    data.prepare("ntu", raw_ntu, tmp_path / "out", frames=8, protocol=protocol)
    assert np.load(tmp_path / "out" / "training.npy").tolist() == training


def test_ntu_120_is_told_by_the_ids_found(raw_ntu, tmp_path):
    write_skeleton(raw_ntu / "S018C001P045R001A061.skeleton", person(20, 0.1)[..., None])
    data.prepare("ntu", raw_ntu, tmp_path / "out", frames=8)
    assert data.read_lines(tmp_path / "out" / "classes.txt") == data.bundled_classes("ntu120")
    training = np.load(tmp_path / "out" / "training.npy")
    assert training.tolist() == [True, False, True, True, True, True]     # 45 trains in NTU-120


def test_every_broken_file_is_skipped_with_its_reason(raw_ntu, tmp_path):
    good = (raw_ntu / f"{NAMES[4]}.skeleton").read_text()
    names = {f"S004C001P001R001A{i:03}.skeleton": kind for i, kind in enumerate(BROKEN, start=1)}
    for name, kind in names.items():
        (raw_ntu / name).write_bytes(BROKEN[kind][0](good).encode("latin-1"))
    for name in ("S001.skeleton", "S001C001P001R001A121.skeleton", "S001C001P001R001A000.skeleton"):
        (raw_ntu / name).write_text(good)
    (raw_ntu / "S009C001P001R001A001.skeleton").mkdir()                   # a folder of that name
    data.prepare("ntu", raw_ntu, tmp_path / "out", frames=20)
    skipped = dict(skipped_in(tmp_path / "out"))
    assert len(np.load(tmp_path / "out" / "labels.npy")) == 5
    assert len(skipped) == len(BROKEN) + 4
    for name, kind in names.items():
        assert BROKEN[kind][1] in skipped[name], kind
    for name in ("S001.skeleton", "S001C001P001R001A121.skeleton"):
        assert "its name is not SsssCcccPppp" in skipped[name]
    assert skipped["S009C001P001R001A001.skeleton"] == "is no regular file"


def test_bodies_come_and_go():
    def body(motion, seed, frames):
        return {t: person(30, motion, seed)[:, t].ravel() for t in frames}

    a, b = body(0.1, 1, range(30)), body(0.2, 2, range(10, 25))
    ghost = body(5.0, 3, range(4))                                        # moves most, there too shortly
    x = data.resampled_bodies([a, ghost, b], 30, 30)
    np.testing.assert_allclose(x[..., 0][:, 10:25], person(30, 0.2, 2)[:, 10:25], rtol=1e-5)
    np.testing.assert_allclose(x[..., 1], person(30, 0.1, 1), rtol=1e-5)
    assert not x[:, :10, :, 0].any()
    assert not x[:, 25:, :, 0].any()
    assert data.resampled_bodies([ghost], 30, 30)[:, :4].any()            # unless nobody is there longer


def test_resampling_by_hand():
    body = {t: np.full(75, float(10 * t)) for t in (1, 2, 3)}             # absent in frame 0 of 4
    x = data.resampled_bodies([body], 4, 7)[0, :, 0, 0]                   # at 0, 0.5, 1, 1.5, ... 3
    np.testing.assert_allclose(x, [0, 10, 10, 15, 20, 25, 30])


def test_an_interrupted_preparation_goes_on(raw_ntu, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PART_FILES", 2)                            # three parts
    whole, out, real, read = tmp_path / "whole", tmp_path / "out", data._read_part, []
    data.prepare("ntu", raw_ntu, whole, frames=10, jobs=1)

    def note_and_read(kind, frames, part, files):
        read.append(part)
        real(kind, frames, part, files)

    def stop_at_third(kind, frames, part, files):
        if len(read) == 2:
            raise KeyboardInterrupt
        note_and_read(kind, frames, part, files)

    monkeypatch.setattr(data, "_read_part", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        data.prepare("ntu", raw_ntu, out, frames=10, jobs=1)
    assert len(read) == 2
    assert not out.exists()
    monkeypatch.setattr(data, "_read_part", note_and_read)
    data.prepare("ntu", raw_ntu, out, frames=10, jobs=1)
    assert len(read) == len(set(read)) == 3                               # the first two were not read again
    for path in whole.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_what_a_killed_preparation_leaves_is_mended(raw_ntu, tmp_path, monkeypatch):
    """A damaged part is read again; half-written files do not reach the finished folder."""
    monkeypatch.setattr(data, "PART_FILES", 2)
    whole, out = tmp_path / "whole", tmp_path / "out"
    data.prepare("ntu", raw_ntu, whole, frames=10, jobs=1)
    real = os.replace

    def stop_at_the_end(part, path):
        if Path(path) == out:
            raise KeyboardInterrupt
        real(part, path)

    monkeypatch.setattr(data, "_join_parts", lambda *_: stop_at_the_end(None, out))
    with pytest.raises(KeyboardInterrupt):
        data.prepare("ntu", raw_ntu, out, frames=10, jobs=1)
    monkeypatch.undo()
    monkeypatch.setattr(data, "PART_FILES", 2)
    work, = tmp_path.glob("out.*.part")
    first, second, _ = sorted(work.glob("*.npz"))
    content = bytearray(first.read_bytes())
    content[len(content) // 2] ^= 1
    first.write_bytes(content)
    second.write_bytes(b"")
    (work / "skeletons.npy.77.part").write_bytes(b"half")
    data.prepare("ntu", raw_ntu, out, frames=10, jobs=1)
    for path in whole.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()
    assert len(list(out.iterdir())) == len(list(whole.iterdir()))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "raw", "whole"]


def test_one_preparation_at_a_time(raw_ntu, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "S001C001P001R001A001.skeleton").write_text("x")
    (tmp_path / "out.lock").write_text("of the user")
    with pytest.raises(data.InputError, match="no recording could be read"):
        data.prepare("ntu", raw_ntu.parent / "broken", tmp_path / "out", frames=10, jobs=1)
    data.prepare("ntu", raw_ntu, tmp_path / "out", frames=10, jobs=1)
    assert (tmp_path / "out.lock").read_text() == "of the user"
    with data._only_one(tmp_path / "lock"):
        with pytest.raises(data.InputError, match="lock: cannot be had .database is locked.; if another"):
            with data._only_one(tmp_path / "lock"):
                pass
    with data._only_one(tmp_path / "lock"):
        pass
    assert not list(tmp_path.glob("lock-*"))


def test_recordings_that_stand_there_twice(raw_ntu, raw_pku, tmp_path):
    shutil.copy(raw_ntu / f"{NAMES[1]}.skeleton", raw_ntu / "nested")
    with pytest.raises(data.InputError, match=f"raw: holds two recordings {NAMES[1]}.skeleton; keep one"):
        data.prepare("ntu", raw_ntu, tmp_path / "out", jobs=1)
    lists = (raw_pku / "cross-subject.txt").read_text()
    (raw_pku / "cross-subject.txt").write_text(lists.replace("0004-R", "0003-M"))
    with pytest.raises(data.InputError, match="pku: must hold one cross-subject.txt"):
        data.prepare("pku", raw_pku, tmp_path / "out", jobs=1)
    (raw_pku / "cross-subject.txt").write_text(lists)
    (raw_pku / "cross_subject_v2.txt").write_text(lists)
    with pytest.raises(data.InputError, match="pku: must hold one cross-subject.txt"):
        data.prepare("pku", raw_pku, tmp_path / "out", jobs=1)


def test_a_video_without_segments_is_skipped(raw_pku, tmp_path):
    (raw_pku / "Label" / "0002-L.txt").write_text("")
    data.prepare("pku", raw_pku, tmp_path / "out", frames=20, jobs=1)
    assert skipped_in(tmp_path / "out") == [["0002-L.txt", "its label file names no segment"]]


def test_odd_files_among_the_recordings_are_skipped(raw_ntu, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "LARGEST_FILE", 1 << 20)
    (raw_ntu / "S001C001P001R001A030.skeleton").symlink_to("nowhere")
    (raw_ntu / "S001C001P001R001A031.skeleton").write_bytes(bytes((1 << 20) + 1))
    os.mkfifo(raw_ntu / "S001C001P001R001A032.skeleton")
    (raw_ntu / "S001C001P001R001A033.skeleton").mkdir()
    odd_name = os.fsencode(raw_ntu) + b"/S\xff.skeleton"
    Path(os.fsdecode(odd_name)).write_text("")
    data.prepare("ntu", raw_ntu, tmp_path / "out", frames=10, jobs=1)
    assert len(np.load(tmp_path / "out" / "labels.npy")) == 5
    reasons = {name: reason for name, reason in skipped_in(tmp_path / "out")}
    assert reasons == {
        "S001C001P001R001A030.skeleton": "No such file or directory",
        "S001C001P001R001A031.skeleton": "is too large: over 1 MB",
        "S001C001P001R001A032.skeleton": "is no regular file",
        "S001C001P001R001A033.skeleton": "is no regular file",
        "S?.skeleton": "its name is not SsssCcccPpppRrrrAaaa.skeleton with an action from 1 to 120"}


WORKERS = """
import os, signal, sys, time
import data
def read(part, files):                                                    # of a worker: what a test asks for
    open(part, "w").close()
    if files == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
if __name__ == "__main__":
    def prepare():
        with data._workers(2) as map_in_order:
            list(map_in_order(read, sys.argv[2:], [sys.argv[1]] * 2))
    data.command_line(prepare)
"""


@pytest.fixture
def reading(tmp_path):
    """→ a function that starts two processes reading; → the parent, when both are at work."""
    (tmp_path / "reading.py").write_text(WORKERS)
    started = [tmp_path / "a", tmp_path / "b"]

    def start(how):
        parent = subprocess.Popen([sys.executable, tmp_path / "reading.py", how, *started], text=True,
                                  stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)},
                                  start_new_session=True)
        while how == "waiting" and not all(path.exists() for path in started):
            time.sleep(0.05)
        return parent
    return start


def processes_of(session):
    """How many processes are left in a session."""
    found = subprocess.run(["ps", "-o", "pid=", "-s", str(session)], capture_output=True, text=True)
    return len(found.stdout.split())


@pytest.mark.skipif(not shutil.which("ps"), reason="needs ps")
def test_reading_processes_end_with_their_parent(reading, tmp_path):
    parent = reading("waiting")
    os.killpg(parent.pid, signal.SIGINT)                                  # as a terminal does, twice
    os.killpg(parent.pid, signal.SIGINT)
    assert parent.communicate(timeout=30)[1] == "interrupted\n"
    assert parent.returncode == 130
    (tmp_path / "a").unlink()
    (tmp_path / "b").unlink()
    parent = reading("waiting")
    parent.kill()
    parent.communicate()
    end = time.time() + 10
    while processes_of(parent.pid) and time.time() < end:
        time.sleep(0.05)
    assert not processes_of(parent.pid)


def test_a_killed_reading_process_is_one_line(reading):
    parent = reading("killed")
    error = parent.communicate(timeout=60)[1]
    assert parent.returncode == 2
    assert error == ("error: a reading process was killed, for want of memory?; the same command goes on\n")


def test_a_full_disk_during_a_preparation(raw_ntu, tmp_path, monkeypatch):
    def full_disk(f, **arrays):
        f.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    message = "cannot be written .No space left on device.; free space"
    with pytest.raises(data.InputError, match=message):
        data.prepare("ntu", raw_ntu, tmp_path / "out", frames=10, jobs=1)
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.glob("out.*.part/*")] == ["lock"]


@pytest.mark.parametrize("command, message", [
    ("ntu nowhere out", "nowhere: holds no *.skeleton"),
    ("ntu raw full", "full: is there and is no prepared folder"),
    ("avi raw out", "invalid choice: 'avi'"),
    ("ntu raw out --frames 1", "--frames 1 is out of range"),
    ("pku raw out --protocol xview", "--protocol: pku"),
    ("pku raw out", "raw: holds no Skeleton/*.txt"),
    ("ntu raw", "required: out"),
    ("ntu broken out",
     "no recording could be read; the first, S001C001P001R001A001.skeleton: invalid literal"),
])
def test_bad_preparation_is_one_line_and_exit_2(command, message, raw_ntu, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("full", "broken"):
        Path(name).mkdir()
        Path(name, "S001C001P001R001A001.skeleton").write_text("x")
    monkeypatch.setattr(sys, "argv", ["data.py", *command.split()])
    with pytest.raises(SystemExit) as stop:
        data.command_line(data.main)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1 and message in error
    assert not Path("out").exists()


def test_the_skeleton_reader_on_random_edits(raw_ntu, tmp_path):
    """Fuzz: 600 random edits of a good file are read, or skipped with a reason; nothing else is raised."""
    rng, good = np.random.default_rng(0), (raw_ntu / f"{NAMES[1]}.skeleton").read_bytes()
    path, outcomes = tmp_path / f"{NAMES[1]}.skeleton", {"read": 0, "skipped": 0}
    for n in range(600):
        text = bytearray(good)
        for _ in range(rng.integers(1, 3)):
            edit_at_random(text, rng)
        path.write_bytes(text)
        try:
            (x, row), = data.ntu_samples(path, 12)
            assert x.shape == (3, 12, 25, 2) and np.isfinite(x).all() and x.any()
            assert row == (12, 3, 2, 1)
            outcomes["read"] += 1
        except ValueError as e:
            assert str(e)
            outcomes["skipped"] += 1
    assert min(outcomes.values()) > 50, outcomes


def test_pku_preparation(raw_pku, tmp_path):
    data.prepare("pku", raw_pku, tmp_path / "out", frames=20)
    x = np.load(tmp_path / "out" / "skeletons.npy")
    assert x.shape == (4, 3, 20, 25, 2)
    assert np.load(tmp_path / "out" / "labels.npy").tolist() == [4, 50, 0, 1]
    assert np.load(tmp_path / "out" / "training.npy").tolist() == [True, True, False, False]
    actor = person(60, 0.3)
    np.testing.assert_allclose(x[0, ..., 0], actor[:, :20], rtol=1e-6)
    np.testing.assert_allclose(x[1, :, [0, 19], :, 0], actor[:, [30, 59]].swapaxes(0, 1), rtol=1e-6)
    np.testing.assert_allclose(x[2, ..., 1], person(20, 0.1, seed=1), rtol=1e-6)
    assert not x[[0, 1, 3], ..., 1].any()
    assert data.read_lines(tmp_path / "out" / "classes.txt") == data.bundled_classes("pku51")


def test_broken_pku_videos_and_segments_are_skipped(raw_pku, tmp_path):
    video = np.ones((30, 150))
    labels = ["1,0,20,2", "52,0,20,2", "3,10,31,2", "3,9,9,2", "x,0,20,2", "7,1", "1,2,3,1"]
    write_pku(raw_pku, "0004-R", video, labels)
    write_pku(raw_pku, "0007-L", video, ["1,0,20,2"])
    write_pku(raw_pku, "0008-L", video[:, 1:], ["1,0,20,2"])
    (raw_pku / "Label" / "0003-M.txt").unlink()
    lists = (raw_pku / "cross-subject.txt").read_text()
    (raw_pku / "cross-subject.txt").write_text(lists.replace("0003-M", "0003-M, 0008-L"))
    data.prepare("pku", raw_pku, tmp_path / "out", frames=10)
    expected = [
        ("0003-M.txt", "No such file"),
        ("0004-R.txt", "label line 2: action 52"),
        ("0004-R.txt", "label line 3: action 3, frames 10 to 31 of 30"),
        ("0004-R.txt", "label line 4"),
        ("0004-R.txt", "label line 5"),
        ("0004-R.txt", "label line 6"),
        ("0007-L.txt", "is in neither list"),
        ("0008-L.txt", "150 numbers a line"),
    ]
    skipped = skipped_in(tmp_path / "out")
    assert [name for name, _ in skipped] == [name for name, _ in expected]
    for (_, reason), (_, part) in zip(skipped, expected):
        assert part in reason
    assert np.load(tmp_path / "out" / "labels.npy").tolist() == [4, 50, 0, 0]


def test_pku_without_its_cross_subject_file(raw_pku, tmp_path):
    (raw_pku / "cross-subject.txt").write_text("0002-L\n")
    with pytest.raises(data.InputError, match="must hold one cross-subject.txt"):
        data.prepare("pku", raw_pku, tmp_path / "out", jobs=1)


# --------------------------------------------------------------------------------- data.py: the synthetic set
def test_synthetic_motion_follows_the_text():
    text = np.random.default_rng(0).normal(size=(16, 40))
    text[1] = text[0] + 0.01                                              # class 1 says almost the same
    x, labels, subjects = data.synthetic(text, performers=3, repeats=2, frames=20)
    assert x.shape == (96, 3, 20, 25, 1) and x.dtype == np.float32 and np.isfinite(x).all()
    assert np.bincount(labels).tolist() == [6] * 16
    assert np.bincount(subjects).tolist() == [0, 32, 32, 32]
    again, _, _ = data.synthetic(text, performers=3, repeats=2, frames=20)
    other, _, _ = data.synthetic(text, performers=3, repeats=2, frames=20, seed=1)
    np.testing.assert_array_equal(again, x)
    assert not np.array_equal(other, x)
    y = zsar.to_common_frame(x, zsar.NTU25)
    centre = np.stack([y[labels == c].mean(0) for c in range(16)])
    distance = np.sqrt(((centre[0] - centre) ** 2).mean((1, 2, 3, 4)))
    assert distance[1] < 0.5 * distance[2:].min()


def test_synthetic_bodies_are_not_mirrored():
    """In the common frame left is +x and up is +y, so that toes point to +z."""
    x, _, _ = data.synthetic(np.random.default_rng(0).normal(size=(8, 20)), performers=4, repeats=1, frames=4)
    front = zsar.to_common_frame(x, zsar.NTU25)[:, 2, 0, :, 0]            # (N, V): z in the first frame
    assert (front[:, 15] > front[:, 14]).mean() > 0.75                    # the left toes, its ankle
    assert (front[:, 19] > front[:, 18]).mean() > 0.75


def test_synthetic_bones_keep_their_length():
    text = np.random.default_rng(0).normal(size=(12, 20))
    x = data.synthetic(text, performers=4, repeats=1)[0][..., 0]          # (N, 3, T, V)
    for child, parent in enumerate(data._PARENT[1:], start=1):
        length = np.linalg.norm(x[:, :, :, child] - x[:, :, :, parent], axis=1)     # (N, T)
        assert length.std(1).max() < 0.03                                 # sensor noise alone, 0.5 to 1.5 cm


def test_the_default_synthetic_set():
    start = time.perf_counter()
    d = data.read_data("synthetic", "55_5")
    assert time.perf_counter() - start < 10
    assert d.source == "synthetic set"
    assert d.skeletons.shape == (2160, 3, 32, 25, 1)
    assert len(d.classes) == 60
    assert len(d.train) == len(d.seen_test) == 990
    assert len(d.unseen_test) == 90


# -------------------------------------------------------------------------- train.py: one run from end to end
def test_the_command_line(small_folder, tmp_path):
    options = "--epochs 2 --encoder-epochs 1 --device cpu --batch-size 8".split()
    command = ["--method", "dvta", "--split", "9_3", "--data", str(small_folder), *options]
    done = script("train.py", *command, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "SYNTHETIC" not in done.stdout
    for part in ("encoder epoch 1/1  loss ", "dvta epoch 2/2  loss ", "ridge baseline", "chance",
                 "best on test", "Eat meal/snack"):
        assert part in done.stdout
    run = next((tmp_path / "runs").glob("small*_9_3_dvta_seed0_epochs-2_batch_size-8"))
    result = result_of(run)
    assert {"method", "dataset", "synthetic", "split", "seed", "device", "zsl", "best_on_test", "encoder",
            "seconds", "config", "versions", "data_sha256"} <= result.keys()
    assert result["method"] == "dvta" and result["split"] == "9_3" and not result["synthetic"]
    zsl, best = result["zsl"], result["best_on_test"]
    assert zsl["n"] == 12 and zsl["chance"] == 1 / 3 and 0 <= zsl["acc"] <= 1
    assert sum(map(sum, zsl["confusion"])) == 12
    assert best["acc"] >= zsl["acc"] and best["epoch"] in (1, 2)
    assert 0 <= result["encoder"]["seen_test_acc"] <= 1
    assert result["seconds"].keys() == {"encoder", "train", "test"}
    assert result["config"]["dvta"]["batch_size"] == 8
    assert result["config"]["encoder"]["epochs"] == 1
    assert weights_of(run)["tau_da"].ndim == 0
    written = (run / "result.json").read_bytes()
    finished = script("train.py", *command, folder=tmp_path)
    assert finished.returncode == 2
    assert "holds a finished run; give --resume to go on with it, --force" in finished.stderr
    assert finished.stderr.count("\n") == 1
    assert (run / "result.json").read_bytes() == written
    again = script("train.py", *command, "--split", "6_6", folder=tmp_path)
    assert again.returncode == 2 and again.stdout == ""
    assert "choose one of: 9_3, 10_2" in again.stderr
    assert again.stderr.count("\n") == 1


def test_a_synthetic_run_says_so(tmp_path, monkeypatch, capsys):
    whole = data.synthetic                                                # a tenth of the set, for time
    monkeypatch.setattr(data, "synthetic", lambda text: whole(text, performers=2, repeats=1, frames=8))
    command = "--method ridge --split 55_5 --encoder-epochs 1 --device cpu".split()
    train.main([*command, "--out", str(tmp_path / "run")])
    lines, result = capsys.readouterr().out.splitlines(), result_of(tmp_path / "run")
    assert lines[0] == lines[-1] == result["note"]
    assert "SYNTHETIC" in lines[0] and "say nothing about NTU" in lines[0]
    assert result["synthetic"] is True
    assert result["dataset"] == "synthetic"


def test_a_generalized_run(features_folder, tmp_path, capsys):
    result, _ = run_main(features_folder, tmp_path / "run", "--gzsl")
    d = data.read_data(features_folder, "9_3")
    for gzsl in (result["gzsl"], result["ridge"]["gzsl"]):
        assert gzsl.keys() == {"seen", "unseen", "harmonic", "gamma", "ausuc", "curve"}
        assert 0 <= gzsl["ausuc"] <= 1
        hits = gzsl["seen"] * len(d.seen_test)
        assert hits == pytest.approx(round(hits))
        assert gzsl["harmonic"] == pytest.approx(zsar.harmonic_mean(gzsl["seen"], gzsl["unseen"]))
    printed = capsys.readouterr().out
    assert "validation run: 7 seen and 2 validation classes" in printed
    assert printed.count("AUSUC") == 2
    assert run_main(features_folder, tmp_path / "plain")[0]["gzsl"] is None


def test_generalized_figures_need_seen_test_samples(tmp_path, capsys):
    folder = write_published(tmp_path / "data", "SynSE / SA-DVAE / TDSM features")
    result, _ = run_main(folder, tmp_path / "run", "--gzsl", method="ridge", split="55_5")
    assert 0 < result["gzsl"]["ausuc"] < 1
    for name in ("gtest", "g_label"):
        (folder / f"{name}.npy").unlink()
    with pytest.raises(SystemExit) as stop:
        run_main(folder, tmp_path / "run", "--gzsl", method="ridge", split="55_5")
    assert stop.value.code == 2
    assert "has no seen test samples" in capsys.readouterr().err


def test_same_seed_same_figures(small_folder, tmp_path):
    # three parent folders: no shared cache of encoders
    a, a_weights = run_main(small_folder, tmp_path / "a" / "run", "--seed", 0)
    b, b_weights = run_main(small_folder, tmp_path / "b" / "run", "--seed", 0)
    c, c_weights = run_main(small_folder, tmp_path / "c" / "run", "--seed", 1)
    for result in (a, b, c):
        assert not result["encoder"]["cached"]
        assert result["encoder"]["file"]
        assert result["seconds"]["encoder"] > 0
    assert without_times(a) == without_times(b)
    assert_same_weights(a_weights, b_weights)
    name = "projector.fc0.weight"
    assert not torch.equal(a_weights[name], c_weights[name])


def test_a_run_repeated_from_its_result(features_folder, tmp_path, capsys):
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    texts = [features_folder / "text_label.npy", features_folder / "text_description.npy"]
    options = ["--only", "da", "--lr", 3e-4, "--no-sde", "--seed", 5, "--gzsl", "--text", *texts]
    result, weights = run_main(features_folder, first, *options)
    train.main(["--config", str(first / "result.json"), "--out", str(second)])
    again = result_of(second)
    arguments, again_arguments = result.pop("arguments"), again.pop("arguments")
    assert "--force" not in again_arguments
    assert again_arguments[:5] == arguments[:5]
    assert without_times(again) == without_times(result)
    assert again["encoder"] == result["encoder"]
    assert_same_weights(weights, weights_of(second))
    train.main(["--config", str(first / "result.json"), "--out", str(third), "--seed", "6"])
    assert result_of(third)["seed"] == 6
    bad = tmp_path / "bad.json"
    bad.write_text('{"arguments": ["--method", "gpt"]}')
    with pytest.raises(SystemExit):
        train.main(["--config", str(bad)])
    assert "invalid choice: 'gpt'" in capsys.readouterr().err
    messages = {"{": "cannot be read as JSON", "[]": "must be an object",
                '{"zsl": 1}': "is no result.json of a run"}
    for content, message in messages.items():
        bad.write_text(content)
        with pytest.raises(SystemExit) as stop:
            train.main(["--config", str(bad)])
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert error.count("\n") == 1 and "bad.json: " in error and message in error


def test_several_seeds(small_folder, tmp_path, capsys):
    many, again = tmp_path / "many", tmp_path / "again"
    few_epochs = ["--encoder-epochs", "1", "--epochs", "1"]
    options = [*few_epochs, "--device", "cpu", "--seed", "3", "--seeds", "2", "--gzsl"]
    command = ["--method", "dvta", "--split", "9_3", "--data", str(small_folder), *options]
    train.main([*command, "--out", str(many)])
    result = result_of(many)
    alone, weights = run_main(small_folder, tmp_path / "one", *few_epochs, "--seed", 4, "--gzsl")
    assert [run["seed"] for run in result["seeds"]] == [3, 4]
    assert result["seeds"][1]["zsl"] == alone["zsl"]
    assert result["seeds"][1]["gzsl"] == alone["gzsl"]
    assert_same_weights(weights_of(many / "seed4"), weights)
    summary = result["summary"]
    assert summary.keys() == {f"{method} {figure}" for method in ("dvta", "ridge")
                              for figure in ("acc", "seen", "unseen", "harmonic", "ausuc")}
    assert summary["dvta acc"]["each"] == [run["zsl"]["acc"] for run in result["seeds"]]
    ridge_ausuc = [run["ridge"]["gzsl"]["ausuc"] for run in result["seeds"]]
    assert summary["ridge ausuc"]["mean"] == pytest.approx(np.mean(ridge_ausuc))
    train.main(["--config", str(many / "result.json"), "--out", str(again)])
    assert result_of(again)["summary"] == summary
    assert "dvta, seeds 3 to 4: mean ± standard deviation" in capsys.readouterr().out
    # encoder seeds vary with the run's, and validation has its own encoder
    assert len(list((tmp_path / "encoders").iterdir())) == 4


def encoders_by_classes(folder):
    """The encoders of a cache, by the number of classes that each was trained on."""
    encoders = [torch.load(path, weights_only=True) for path in folder.iterdir()]
    return {len(encoder["state"]["classifier.bias"]): encoder for encoder in encoders}


def test_nothing_of_the_unseen_classes_reaches_the_weights(small_folder, tmp_path):
    """The leak test: other unseen samples and unseen text give bit-identical encoder and method weights."""
    changed = tmp_path / "changed"
    shutil.copytree(small_folder, changed)
    unseen, rng = [1, 5, 8], np.random.default_rng(0)
    x, rows = np.load(changed / "skeletons.npy"), np.isin(np.load(changed / "labels.npy"), unseen)
    x[rows] = rng.normal(size=x[rows].shape)
    np.save(changed / "skeletons.npy", x)
    for name in ("text_label", "text_description"):
        text = np.load(changed / f"{name}.npy")
        text[unseen] = rng.normal(size=text[unseen].shape)
        np.save(changed / f"{name}.npy", text)
    for method in ("dvta", "tdsm", "ridge"):
        options = ["--gzsl"] if method == "ridge" else ["--gzsl", "--tune", "--lr", 0.003]
        same = {"method": method, "split": "9_3_val5"}
        result, weights = run_main(small_folder, tmp_path / "a" / method, *options, **same)
        other_result, other_weights = run_main(changed, tmp_path / "b" / method, *options, **same)
        assert result["tuned"] == other_result["tuned"]                   # every figure of the grid,
        if method != "ridge":                                             # and they differ
            assert len({row["acc"] for row in result["tuned"]["grid"]}) > 1
        assert_same_weights(weights, other_weights)
        assert result["zsl"] != other_result["zsl"]                       # the figures did see them
        assert result["gzsl"]["gamma"] == other_result["gzsl"]["gamma"]
        assert result["gzsl"]["curve"] != other_result["gzsl"]["curve"]
    encoders, other_encoders = (encoders_by_classes(tmp_path / name / "encoders") for name in "ab")
    assert encoders.keys() == other_encoders.keys() == {9, 4}             # of the run, of the validation run
    for num_classes, encoder in encoders.items():
        other = other_encoders[num_classes]
        assert_same_weights(encoder["state"], other["state"])
        assert not torch.equal(encoder["features"], other["features"])


# ---------------------------------------------------------------------------------- train.py: encoder, method
def test_the_encoder_cache_hits_and_misses(small_folder, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(small_folder, folder)

    def cached(*options, **kwargs):
        return run_main(folder, tmp_path / "runs" / "x", *options, **kwargs)[0]["encoder"]["cached"]

    assert not cached()
    assert cached()
    assert cached(method="ridge")                                         # a second method reuses it
    assert cached("--epochs", 1, "--only", "da")                          # whatever the method's settings
    assert not cached("--seed", 1)
    assert not cached(split="10_2")
    assert not cached("--encoder-epochs", 1)
    spoil("text_label.npy", lambda a: a[::-1])(folder)
    assert cached()                                                       # the encoder never reads text
    spoil("skeletons.npy", with_value((0, 0, 0, 0, 0), 0.25))(folder)
    assert not cached()
    spoil("labels.npy", with_value(0, 2))(folder)
    assert not cached()
    assert len(list((tmp_path / "runs" / "encoders").iterdir())) == 6


def test_a_run_with_shiftgcn(small_folder, tmp_path, capsys):
    """Training, cache, generalized figures and predict; and each encoder has a cache of its own."""
    run = tmp_path / "runs" / "run"
    options = ["--encoder", "shiftgcn", "--encoder-epochs", 1, "--gzsl"]
    result, _ = run_main(small_folder, run, *options, method="ridge")
    assert result["config"]["encoder"]["encoder"] == "shiftgcn"
    assert "units.0.spatial.mask" in torch.load(run / "model.pt", weights_only=True)["encoder"]["state"]
    again, _ = run_main(small_folder, run, *options, method="ridge")
    assert again["encoder"]["cached"] and again["zsl"] == result["zsl"] and again["gzsl"] == result["gzsl"]
    rows, d = predictions_of(run, small_folder), data.read_data(small_folder, "9_3")
    assert len(rows) == 96 and all(row[1] in d.classes for row in rows)
    other, _ = run_main(small_folder, run, "--encoder-epochs", 1, method="ridge")
    assert not other["encoder"]["cached"] and other["config"]["encoder"]["encoder"] == "stgcn"


def test_shiftgcn_killed_and_resumed(small_folder, tmp_path, killed):
    options = ["--encoder", "shiftgcn", "--encoder-epochs", 2]
    run_main(small_folder, tmp_path / "whole" / "run", *options, method="ridge")
    out = tmp_path / "killed" / "run"
    done = killed(least(small_folder, out, *options, "--resume", method="ridge"), "encoder-*.pt", 4)
    assert done.returncode == -9, done.stderr
    run_main(small_folder, out, *options, "--resume", method="ridge")
    (encoder,), (resumed,) = (encoders_by_name(tmp_path / name / "encoders").values()
                              for name in ("whole", "killed"))
    assert_same_weights(encoder["state"], resumed["state"])


def test_published_training_of_the_encoders(small_folder, tmp_path):
    for name, settings in train.PUBLISHED_ENCODERS.items():
        options = ["--encoder", name, "--encoder-preset", "published", "--encoder-epochs", 1]
        result, _ = run_main(small_folder, tmp_path / name, *options, method="ridge")
        assert result["config"]["encoder"] == settings | {"epochs": 1}
    encoder = torch.nn.Linear(2, 2)
    adam, sgd = (train.encoder_optimizer(encoder, settings) for settings in train.PUBLISHED_ENCODERS.values())
    assert (type(adam), adam.defaults["weight_decay"]) == (torch.optim.Adam, 0.0)
    assert sgd.defaults["momentum"] == 0.9 and sgd.defaults["nesterov"]
    assert sgd.defaults["weight_decay"] == 1e-4


def test_an_encoder_without_augmentation(small_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(zsar, "augmented", None)                          # a call would fail
    options = ["--no-augment", "--encoder-epochs", 1]
    result, _ = run_main(small_folder, tmp_path / "run", *options, method="ridge")
    assert result["config"]["encoder"] == train.ENCODER | {"augment": False, "epochs": 1}


def test_ready_features_need_no_encoder(features_folder, tmp_path):
    result, _ = run_main(features_folder, tmp_path / "out" / "run")
    assert result["encoder"] == {"seen_test_acc": None, "cached": False, "file": None}
    assert not (tmp_path / "out" / "encoders").exists()


def test_tuning_chooses_on_the_validation_classes_and_trains_once_more(features_folder, tmp_path, capsys):
    options = ["--tune", "--epochs", 4, "--gzsl"]
    result, weights = run_main(features_folder, tmp_path / "tuned", *options, split="9_3_val5")
    grid, chosen = result["tuned"]["grid"], result["tuned"]["chosen"]
    assert [row["epochs"] for row in grid] == [4] * 3 + [2] * 3 + [8] * 3
    assert [row["lr"] for row in grid] == pytest.approx([1e-4, 1e-4 / 3, 3e-4] * 3)
    settings = train.PRESETS["other"]["dvta"] | chosen
    assert result["config"]["dvta"] == settings
    best = max(grid, key=lambda row: row["acc"])
    assert chosen == {key: best[key] for key in ("epochs", "steps", "lr")}
    assert len({row["acc"] for row in grid}) > 1
    printed = capsys.readouterr().out
    assert "tuning dvta: accuracy among the 5 validation classes" in printed
    assert printed.count("<- chosen") == 1
    given = ["--epochs", chosen["epochs"], "--lr", chosen["lr"], "--gzsl"]
    plain, plain_weights = run_main(features_folder, tmp_path / "plain", *given, split="9_3_val5")
    assert_same_weights(weights, plain_weights)
    assert result["zsl"] == plain["zsl"] and result["gzsl"] == plain["gzsl"]
    assert plain["tuned"] is None
    # a row of the grid is a training on the validation task, tested there
    run = a_run(tmp_path / "x", dvta=settings)
    val_task = train.encode(run, data.validation(data.read_data(features_folder, "9_3_val5")))
    model, _ = train.train_method(run, "dvta", val_task)
    assert train.unseen_figures(model, val_task)["acc"] == best["acc"]


def test_tuning_keeps_the_settings_in_a_tie_and_survives_a_divergence(features_folder, tmp_path, monkeypatch):
    real, seen = train.train_method, []

    def diverging(run, name, task):
        seen.append(run.settings[name])
        if run.settings[name]["lr"] > 2e-4:
            raise train.Diverged("the loss is no longer finite")
        return real(run, name, task)

    monkeypatch.setattr(train, "train_method", diverging)
    monkeypatch.setattr(train, "unseen_figures", lambda *_: {"acc": 0.5})
    run = a_run(tmp_path, dvta=train.PRESETS["other"]["dvta"] | {"epochs": 2, "steps": [4, 8]})
    val_task = train.encode(run, data.validation(data.read_data(features_folder, "9_3")))
    tuned = train.tune(run, val_task)
    assert tuned["chosen"] == {"epochs": 2, "steps": [4, 8], "lr": 1e-4}
    assert [row["epochs"] for row in tuned["grid"]] == [2] * 3 + [1] * 3 + [4] * 3
    assert [row["steps"] for row in tuned["grid"]] == [[4, 8]] * 3 + [[2, 4]] * 3 + [[8, 16]] * 3
    assert [row["acc"] for row in tuned["grid"]] == [0.5, 0.5, 0.0] * 3
    assert len(seen) == 9


def test_tuning_ridge_is_refused(features_folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run_main(features_folder, tmp_path / "run", "--tune", method="ridge")
    assert stop.value.code == 2
    assert "--tune: ridge has no learning rate" in capsys.readouterr().err


# -------------------------------------------------------------------------------- train.py: the training loop
@pytest.mark.parametrize("epochs, steps, expected", [
    (3, None, 30), (None, 7, 7), (3, [10, 20], 20), (3, [50, 90], 50), (3, [10, 90], 30)])
def test_the_length_of_a_training(epochs, steps, expected):
    assert train.num_steps({"epochs": epochs, "steps": steps}, per_epoch=10) == expected


def test_warm_up_then_cosine():
    factors = [train.warm_up_cosine(step, 15, 100) for step in range(101)]
    assert factors[0] == 1 / 16 and factors[14] == 15 / 16 and factors[15] == 1.0
    assert factors[15 + 42] == pytest.approx(0.5 * (1 + math.cos(math.pi * 42 / 85)))
    assert factors[100] == pytest.approx(0)
    steps = np.diff(factors)
    assert (steps[:15] > 0).all()
    assert (steps[15:] < 0).all()


def test_learning_rates_of_the_published_encoders(tmp_path):
    """Shift-GCN's falls by ten at epochs 60, 80, 100; ST-GCN's as a cosine without warm-up."""
    rates = {}
    for name, settings in train.PUBLISHED_ENCODERS.items():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)
        rows = torch.arange(2 * settings["batch_size"])                   # two steps an epoch
        training = train.Training("encoder", None, optimizer, settings, rows, 0, tmp_path / "x.pt", "")
        rates[name] = []
        for training.step in range(training.steps):
            training.set_learning_rate()
            rates[name].append(optimizer.param_groups[0]["lr"])
    expected = [0.1] * 120 + [0.01] * 40 + [0.001] * 40 + [0.0001] * 80
    assert rates["shiftgcn"] == pytest.approx(expected)
    cosine = [0.005 * 0.5 * (1 + math.cos(math.pi * step / 300)) for step in range(300)]
    assert rates["stgcn"] == pytest.approx(cosine)


def test_the_caller_keeps_their_random_state():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    with train.seeded(0, torch.device("cpu")):
        torch.rand(3)
    assert torch.equal(torch.rand(1), expected)


def test_a_diverging_loss_is_an_error(features_folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run_main(features_folder, tmp_path / "out", "--lr", "1e18")
    assert stop.value.code == 2
    features = np.load(features_folder / "features.npy")
    train_rows = ~np.isin(np.load(features_folder / "labels.npy"), [1, 5, 8])
    train_rows &= ~np.isin(np.load(features_folder / "subjects.npy"), [2, 4])
    found = f"its features reach {features[train_rows].max():.3g}; mend them, or lower the learning rate"
    assert f"the loss is no longer finite; {found} (--lr)" in capsys.readouterr().err


def test_the_history_is_that_of_an_uninterrupted_training(tmp_path, monkeypatch):
    """Broken in the midst of an epoch, the epoch's mean loss still counts every step of it."""
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", -1)
    settings = {"epochs": 3, "steps": None, "batch_size": 2, "lr": 0.1, "warm_up": 0}
    x = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))

    def trained(name, breaks_at=None):
        torch.manual_seed(0)
        model, calls = torch.nn.Linear(4, 1), []
        optimizer = torch.optim.Adam(model.parameters(), 0.1)

        def losses(rows):
            calls.append(rows)
            if len(calls) == breaks_at:
                raise RuntimeError
            return {"loss": model(x[rows]).square().mean(), "more": model.bias.sum()}

        training = train.Training("dvta", model, optimizer, settings, torch.arange(10), 0, tmp_path / name,
                                  advice="")
        return train.fit(training, losses, test=lambda: round(model.bias.item(), 6))["history"]

    whole = trained("whole.pt")
    with pytest.raises(RuntimeError):
        trained("broken.pt", breaks_at=8)
    assert trained("broken.pt") == whole
    assert [epoch for epoch, _, _ in whole] == [1, 2, 3]
    assert all(math.isfinite(loss) and acc is not None for _, loss, acc in whole)


def test_a_history_is_thinned_to_200_points_with_the_last():
    history = [[epoch, 1 / epoch, None] for epoch in range(1, 1001)]
    points = train.thinned(history)
    assert len(points) == 200
    assert points[0] == {"epoch": 1, "loss": 1.0, "acc_on_test": None}
    assert points[-1]["epoch"] == 1000
    assert len(train.thinned(history[:7])) == 7
    assert train.thinned([]) == []


# ----------------------------------------------------------------------- train.py: the run's folder, resuming
@pytest.fixture(scope="session")
def forks():
    """Other processes, which need not load PyTorch again: they are forked from one that has."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_zsar"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        multiprocessing.forkserver.ensure_running()
    return context


@pytest.fixture
def killed(forks, tmp_path):
    """→ a function that runs a command of train.py in another process, and kills it when it writes a file of
    a pattern for the count-th time; → its exit code and what it printed.
    """
    def run(command, pattern, count):
        printed = [tmp_path / "printed", tmp_path / "errors"]
        process = forks.Process(target=killed_process, args=(command, pattern, count, printed))
        process.start()
        process.join()
        return subprocess.CompletedProcess(command, process.exitcode, *(path.read_text() for path in printed))
    return run


def killed_process(command, pattern, left, printed):
    """What `killed` runs."""
    for number, path in enumerate(printed, 1):
        os.dup2(os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
    train.CHECKPOINT_SECONDS, real = -1, os.replace                       # a checkpoint at every step

    def replace(part, path):
        nonlocal left
        left -= fnmatch.fnmatch(os.path.basename(path), pattern)
        if not left:                                                      # written, and not yet renamed
            os.kill(os.getpid(), signal.SIGKILL)
        real(part, path)

    os.replace = replace
    train.main(command)


def read_whole(path):
    """What a file of a run holds; raises where the file is not whole."""
    return data.read_tensors(path, ()) if path.suffix == ".pt" else data.read_json(path)


def encoders_by_name(folder):
    return {path.name: data.read_tensors(path, ()) for path in folder.iterdir()}


def test_a_run_killed_in_each_phase_is_the_same_in_the_end(small_folder, tmp_path, killed, capsys):
    """kill -9 in both encoders' training, TDSM's, in the test: resumed, the same bits and figures."""
    options = ["--encoder-epochs", 3, "--steps", 9, "--gzsl"]
    whole, weights = run_main(small_folder, tmp_path / "whole" / "run", *options, method="tdsm")
    out = tmp_path / "killed" / "run"
    command = least(small_folder, out, *options, "--resume", method="tdsm")
    kills = [  # the file it is killed at, at which time, what the next one then goes on from
        ("encoder-*.pt", 4, "encoder epoch 1/3: from"),
        ("encoder-*.pt", 5, "encoder epoch 1/3: from"),
        ("tdsm-*.pt", 4, "tdsm step 3/9: from"),
        ("model.pt", 1, "tdsm step 9/9: from"),
    ]
    goes_on = None
    for pattern, count, next_goes_on in kills:
        done = killed(command, pattern, count)
        assert done.returncode == -9, done.stderr
        assert not (out / "result.json").exists(), done.stderr
        assert goes_on is None or goes_on in done.stdout
        goes_on = next_goes_on
        files = [path for path in (tmp_path / "killed").rglob("*") if path.suffix in (".pt", ".json")]
        assert len(files) > 1
        assert all(read_whole(path) for path in files)
    capsys.readouterr()
    result, resumed = run_main(small_folder, out, *options, "--resume", method="tdsm")
    assert goes_on in capsys.readouterr().out
    assert without_times(result) == without_times(whole)
    assert_same_weights(resumed, weights)
    assert {path.name for path in out.iterdir()} == {"result.json", "model.pt"}
    encoders = encoders_by_name(tmp_path / "whole" / "encoders")
    resumed_encoders = encoders_by_name(tmp_path / "killed" / "encoders")
    assert len(encoders) == 2
    assert encoders.keys() == resumed_encoders.keys()
    for name, encoder in encoders.items():
        assert_same_weights(encoder["state"], resumed_encoders[name]["state"])


def test_a_run_killed_before_its_result_is_written(features_folder, tmp_path, killed):
    out = tmp_path / "killed"
    whole, weights = run_main(features_folder, tmp_path / "whole", "--epochs", 3)
    command = least(features_folder, out, "--epochs", 3, "--resume")
    for pattern, count in (("dvta-*.pt", 3), ("result.json", 1)):
        done = killed(command, pattern, count)
        assert done.returncode == -9, done.stderr
    assert "dvta epoch 2/3: from" in done.stdout
    assert (out / "model.pt").exists(), done.stderr
    result, resumed = run_main(features_folder, out, "--epochs", 3, "--resume")
    assert without_times(result) == without_times(whole)
    assert result["best_on_test"]["acc"] > 0
    assert result["seconds"]["train"] > 0
    assert_same_weights(resumed, weights)


def test_ctrl_c_saves_and_says_how_to_go_on(features_folder, tmp_path, monkeypatch):
    options = "--epochs 20 --batch-size 8 --device cpu".split()
    command = ["--method", "dvta", "--split", "9_3", "--data", str(features_folder), *options]
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *command], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not process.stdout.readline().startswith("dvta epoch 3/20"):
        pass
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130
    assert error.count("\n") == 1
    assert error.startswith("interrupted; to go on: python train.py --method dvta")
    monkeypatch.chdir(tmp_path)
    out = next((tmp_path / "runs").glob("mine_*"))
    step = data.read_tensors(next((out / train.UNFINISHED).glob("dvta-*.pt")), ())["step"]
    assert 3 * 4 <= step < 20 * 4
    assert not (out / "result.json").exists()
    train.main(shlex.split(error)[6:])                                    # what it says
    train.main([*command, "--out", "again"])
    assert without_times(result_of(out)) == without_times(result_of(Path("again")))
    assert_same_weights(weights_of(out), weights_of(Path("again")))


def test_several_seeds_interrupted_in_the_second(features_folder, tmp_path, monkeypatch, capsys):
    options = "--epochs 2 --seeds 2 --device cpu".split()
    command = ["--method", "dvta", "--split", "9_3", "--data", str(features_folder), *options]
    out, whole, real = tmp_path / "run", tmp_path / "whole", train.report
    train.main([*command, "--out", str(whole)])

    def interrupted(result, data):
        signal.raise_signal(signal.SIGINT)

    def interrupted_in_the_second(result, data):
        if result["seed"] == 0:
            return real(result, data)
        return interrupted(result, data)

    monkeypatch.setattr(train, "report", interrupted_in_the_second)
    with pytest.raises(SystemExit) as stop:
        train.main([*command, "--out", str(out)])
    assert stop.value.code == 130
    assert (out / "seed0" / "result.json").exists()
    assert not (out / "seed1" / "result.json").exists()
    first = (out / "seed0" / "result.json").read_bytes()
    refusals = [  # what is asked for in this folder, why it is refused
        ([], "holds an unfinished run; give --resume to go on with it, --force to overwrite it"),
        (["--epochs", "3", "--resume"], "holds an unfinished run, not this one; give --force"),
    ]
    for options, message in refusals:
        with pytest.raises(SystemExit) as stop:
            train.main([*command, *options, "--out", str(out)])
        assert stop.value.code == 2
        assert f"{out}: {message}" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setattr(train, "report", real)
    train.main([*command[2:], *command[:2], "--out", str(out), "--resume"])   # the same in another order
    assert (out / "seed0" / "result.json").read_bytes() == first
    assert "seed0: holds a finished run" in capsys.readouterr().out
    assert result_of(out)["summary"] == result_of(whole)["summary"]
    monkeypatch.setattr(train, "report", interrupted)
    with pytest.raises(SystemExit):
        train.main([*command, "--out", str(out), "--force"])
    assert not list(out.rglob("result.json"))                             # nothing old is left
    assert list(out.rglob("model.pt")) == [out / "seed0" / "model.pt"]    # written anew


def test_a_run_folder_is_guarded(features_folder, tmp_path, capsys):
    out = tmp_path / "run"
    run = [option for option in least(features_folder, out, method="ridge") if option != "--force"]
    (out / "checkpoints").mkdir(parents=True)
    (out / "checkpoints" / "mine.pt").write_bytes(b"of the user")
    train.main(run)
    written = (out / "result.json").read_bytes()

    def refused(command, message):
        with pytest.raises(SystemExit) as stop:
            train.main(command)
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert error.count("\n") == 1 and message in error
        assert (out / "result.json").read_bytes() == written
        assert not (out / train.UNFINISHED).exists()

    refused(run, "holds a finished run; give --resume")
    for change in ("--seed 1", "--seeds 2", "--gzsl", "--encoder-epochs 3", "--split 10_2"):
        refused([*run, *change.split(), "--resume"], "holds a finished run, not this one; give --force")
    refused([*run, "--force", "--resume"], "not allowed with")
    other_data = {"features.npy": with_value((0, 0), 0.5), "subjects.npy": with_value(0, 2)}
    for name, change in other_data.items():                               # the same command, other data
        good = np.load(features_folder / name)
        spoil(name, change)(features_folder)
        refused([*run, "--resume"], "holds a finished run, not this one")
        np.save(features_folder / name, good)
    train.main([*run, "--resume"])                                        # nothing to do
    assert (out / "result.json").read_bytes() == written
    spoil("features.npy", with_value((0, 0), 0.5))(features_folder)
    train.main([*run, "--force"])
    assert (out / "result.json").read_bytes() != written
    assert (out / "checkpoints" / "mine.pt").exists()
    (out / "result.json").unlink()
    (out / "result.json").mkdir()
    with pytest.raises(SystemExit) as stop:
        train.main([*run, "--force"])
    assert stop.value.code == 2
    assert "run: cannot be overwritten (Is a directory)" in capsys.readouterr().err


def test_a_run_leaves_the_files_of_others_alone(features_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("film.mkv.part").write_text("mine")
    Path("folder.part").mkdir()
    Path("result.json.9.part").write_text("of a killed run")
    command = [option for option in least(features_folder, ".", method="ridge") if option != "--force"]
    Path("model.pt").write_bytes(b"mine")
    with pytest.raises(SystemExit) as stop:
        train.main(command)
    assert stop.value.code == 2 and "holds a model.pt of no known run" in capsys.readouterr().err
    assert Path("model.pt").read_bytes() == b"mine"
    Path("model.pt").unlink()
    train.main(command)
    assert Path("film.mkv.part").read_text() == "mine" and Path("folder.part").is_dir()
    assert not Path("result.json.9.part").exists()


def half(saved):
    saved["features"] = saved["features"].half()


def a_word(saved):
    saved["seen_test_acc"] = "high"


def no_state(saved):
    saved["state"] = {}


@pytest.mark.parametrize("change", [half, a_word, no_state])
def test_an_encoder_whose_parts_disagree_is_one_line(change, finished_runs, small_folder, tmp_path, capsys):
    encoders = shutil.copytree(finished_runs["ridge"][0].parent / "encoders", tmp_path / "encoders")
    for path in encoders.iterdir():
        saved = torch.load(path, weights_only=True)
        change(saved)
        torch.save(saved, path)
    with pytest.raises(SystemExit) as stop:
        run_main(small_folder, tmp_path / "run", method="ridge")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and ".pt: its parts do not fit each other" in error


def at_half_a_step(saved):
    saved["step"] = 1.5


def beyond_the_end(saved):
    saved["step"] = 10 ** 9


def best_in_words(saved):
    saved["log"]["best"] = {"acc": "high", "epoch": 1}


@pytest.mark.parametrize("change", [at_half_a_step, beyond_the_end, best_in_words])
def test_a_checkpoint_whose_parts_disagree_is_one_line(change, features_folder, tmp_path, monkeypatch,
                                                       capsys):
    def interrupted(training, means, test):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train.Training, "report", interrupted)
    with pytest.raises(SystemExit):
        run_main(features_folder, tmp_path / "run")
    path, = (tmp_path / "run" / train.UNFINISHED).glob("dvta-*.pt")
    saved = torch.load(path, weights_only=True)
    change(saved)
    torch.save(saved, path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_main(features_folder, tmp_path / "run", "--resume")
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1 and f"{path}: its parts do not fit each other" in error


def test_an_edited_result_is_not_taken_for_the_runs_own(features_folder, tmp_path, capsys):
    run_main(features_folder, tmp_path / "run", method="ridge")
    result = result_of(tmp_path / "run")
    result["zsl"]["acc"] = 0.99
    (tmp_path / "run" / "result.json").write_text(json.dumps(result))
    with pytest.raises(SystemExit) as stop:
        run_main(features_folder, tmp_path / "run", "--resume", method="ridge")
    assert stop.value.code == 2
    assert "run/result.json: is not as this run wrote it" in capsys.readouterr().err


def test_several_seeds_claim_all_folders_or_none(features_folder, tmp_path, capsys):
    command = [part for part in least(features_folder, tmp_path / "run", method="ridge") if part != "--force"]
    train.main([*command, "--out", str(tmp_path / "run" / "seed1"), "--seed", "7"])
    with pytest.raises(SystemExit):
        train.main([*command, "--seeds", "2"])
    assert "seed1: holds a finished run, not this one" in capsys.readouterr().err
    assert not list((tmp_path / "run").rglob("run.json"))


def test_class_names_are_part_of_the_data(features_folder, tmp_path, capsys):
    run_main(features_folder, tmp_path / "run", method="ridge")
    names = (features_folder / "classes.txt").read_text().split("\n")
    (features_folder / "classes.txt").write_text("\n".join(names[::-1]).strip())
    with pytest.raises(SystemExit):
        run_main(features_folder, tmp_path / "run", "--resume", method="ridge")
    assert "holds a finished run, not this one" in capsys.readouterr().err


def test_a_config_never_says_where_to(features_folder, tmp_path, monkeypatch, capsys):
    """A result.json that somebody else wrote overwrites nothing."""
    monkeypatch.chdir(tmp_path)
    train.main(least(features_folder, "mine", method="ridge"))
    written = Path("mine/result.json").read_bytes()
    stored = least(features_folder, "mine", method="ridge")
    Path("theirs.json").write_text(json.dumps({"arguments": [*stored, "--config", "theirs.json"]}))
    train.main(["--config", "theirs.json", "--out", "other"])
    Path("bad.json").write_text(json.dumps({"arguments": ["--nonsense"]}))
    with pytest.raises(SystemExit):
        train.main(["--config", "bad.json", "--out", "more"])
    assert "error: bad.json: unrecognized arguments: --nonsense" in capsys.readouterr().err
    assert Path("mine/result.json").read_bytes() == written
    with pytest.raises(SystemExit) as stop:
        train.main(["--config", "theirs.json", "--out", "mine"])
    assert stop.value.code == 2 and "holds a finished run" in capsys.readouterr().err
    assert Path("mine/result.json").read_bytes() == written


def test_names_that_become_paths(features_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["../../x", "a/b", "c\nd", "ü b"]
    splits = {name: {"unseen": [1, 5, 8], "test_subjects": [2, 4]} for name in names}
    (features_folder / "splits.json").write_text(json.dumps(splits))
    for name in names:
        train.main(["--method", "ridge", "--split", name, "--data", str(features_folder), "--device", "cpu"])
    runs = [path.name for path in Path("runs").iterdir()]
    expected = ["..-..-x", "a-b", "c-d", "--b"]
    assert sorted(set(runs) - {"encoders"}) == sorted(f"mine_{name}_ridge_seed0" for name in expected)


def test_a_place_that_cannot_be_written(features_folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        run_main(features_folder, tmp_path / "file" / "run")
    assert stop.value.code == 2
    assert "no folder can be made there" in capsys.readouterr().err


def test_a_damaged_checkpoint_or_encoder_is_one_line(small_folder, tmp_path, capsys):
    run_main(small_folder, tmp_path / "run", method="ridge")
    encoder = next((tmp_path / "encoders").iterdir())
    encoder.write_bytes(encoder.read_bytes()[:1000])
    with pytest.raises(SystemExit) as stop:
        run_main(small_folder, tmp_path / "run", method="ridge")
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1 and f"{encoder}: is damaged" in error
    encoder.unlink()
    checkpoint = tmp_path / "run" / train.UNFINISHED / f"encoder-{encoder.name}"
    checkpoint.write_bytes(b"PK")
    with pytest.raises(SystemExit):
        run_main(small_folder, tmp_path / "run", "--resume", method="ridge")
    assert f"{checkpoint}: is damaged" in capsys.readouterr().err


# --------------------------------------------------------------------------------- train.py: many processes
def torchrun(code, *arguments, processes=2):
    """Run Python code in processes of one core; → the finished torchrun with what they printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(code)
        file.flush()
        return subprocess.run([*command, file.name, *map(str, arguments)], capture_output=True, text=True,
                              cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})


TRAIN = "import sys, train; train.main(sys.argv[1:])"
SHARED = """
import functools, json, signal, sys
import torch
import test_zsar, train

def same_gradients(processes, switches):                                  # of DVTA, in float64, B = 7
    model = test_zsar.random_dvta(**switches).double()
    x, y = torch.randn(7, 256, dtype=torch.float64), torch.tensor([0, 3, 0, 1, 2, 3, 4])
    torch.distributed.broadcast(x, 0)
    gather = functools.partial(processes.gather, 7)
    losses = [model.loss(x, y), model.loss(x, y, processes.share(7), gather)]
    whole, shared = ([g for g in torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
                      if g is not None] for loss in losses)
    processes.average(shared)
    torch.testing.assert_close([losses[1], *shared], [losses[0], *whole])

def work(processes):
    for switches in test_zsar.SWITCHES:
        same_gradients(processes, switches)
    first, second, third = json.loads(sys.argv[1])
    train.run(train.parse_arguments(first), processes)
    real, train.CHECKPOINT_SECONDS = train.Training.report, -1            # a checkpoint at every step

    def interrupted(training, means, test):                               # in the second process alone
        real(training, means, test)
        if processes.rank and training.step == 8:
            signal.raise_signal(signal.SIGINT)

    def failed(training, means, test):                                    # there too
        real(training, means, test)
        if processes.rank and training.step == 8:
            raise train.InputError("of the second process alone")

    train.Training.report = interrupted
    try:
        train.run(train.parse_arguments(second), processes)
    except KeyboardInterrupt as e:
        print(f"interrupted{e}")
    train.Training.report = real
    train.run(train.parse_arguments([*second, "--resume"]), processes)
    train.Training.report = failed
    train.run(train.parse_arguments(third), processes)

train.in_each_process(work)
"""
AGAIN = """
import sys, train

def work(processes):
    for more in ([], ["--split", "nowhere"]):
        train.run(train.parse_arguments([*sys.argv[1:], *more]), processes)

train.in_each_process(work)
"""


def line_beginnings(text):
    """The lines of an output without figures and paths."""
    return [re.split("  |: ", line)[0] for line in text.splitlines()]


def errors_in(text):
    """What a program says of its errors."""
    return [line for line in text.splitlines() if line.startswith("error:")]


@pytest.fixture
def one_thread():
    """As torchrun's processes have it here. An encoder of more threads differs by rounding, which grows."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_two_processes_train_as_one(small_folder, features_folder, tmp_path, one_thread, capsys):
    """Several seeds of TDSM, DVTA; unequal shares; Ctrl-C and an error in one process end both."""
    tdsm = ["--steps", 20, "--batch-size", 15, "--seeds", 2, "--encoder-epochs", 1]
    dvta = ["--epochs", 10, "--batch-size", 17, "--lr", 1e-5, "--resume"]
    one, two = tmp_path / "one", tmp_path / "two"
    train.main(least(small_folder, one / "tdsm", *tdsm, method="tdsm"))
    printed = capsys.readouterr().out
    train.main(least(features_folder, one / "dvta", *dvta))
    commands = [least(small_folder, two / "tdsm", *tdsm, method="tdsm"),
                [part for part in least(features_folder, two / "dvta", *dvta) if part != "--resume"],
                least(features_folder, two / "failed", *dvta)]
    done = torchrun(SHARED, json.dumps(commands))
    assert done.returncode == 1 and errors_in(done.stderr) == ["error: of the second process alone"]
    assert line_beginnings(done.stdout)[:printed.count("\n")] == line_beginnings(printed)
    _, resumed = done.stdout.split("interrupted; to go on: torchrun --nproc-per-node=2 train.py")
    assert "dvta epoch 4/10: from" in resumed
    assert not (two / "failed" / "result.json").exists()
    done = torchrun(AGAIN, *commands[2])                                  # killed by the other's error
    assert "dvta epoch 4/10: from" in done.stdout or "dvta epoch 3/10: from" in done.stdout
    assert len(errors_in(done.stderr)) == 1 and "no split 'nowhere'" in done.stderr
    pairs = [("tdsm/seed0", "tdsm/seed0"), ("tdsm/seed1", "tdsm/seed1"), ("dvta", "dvta"), ("dvta", "failed")]
    for ours, theirs in pairs:
        weights, shared = weights_of(one / ours), weights_of(two / theirs)
        for key, value in weights.items():
            torch.testing.assert_close(shared[key], value, rtol=0, atol=1e-5)
        assert {path.name for path in (two / theirs).iterdir()} == {"result.json", "model.pt"}
        assert (result_of(one / ours)["processes"], result_of(two / theirs)["processes"]) == (1, 2)


# ------------------------------------------------------------------------------------------ train.py: predict
@pytest.fixture(scope="session")
def finished_runs(small_folder, tmp_path_factory):
    """A run of each method on the small folder: {method: (folder, result)}."""
    out, runs = tmp_path_factory.mktemp("runs"), {}
    more = {"dvta": (), "tdsm": ("--steps", 30, "--lr", 0.01), "ridge": ()}   # few steps leave near ties
    for method, options in more.items():
        result, _ = run_main(small_folder, out / method, *options, method=method)
        runs[method] = out / method, result
    return runs


def predictions_of(run, folder, *classes):
    """The rows of predictions.csv of a run for the samples of a folder, among new classes where given."""
    command = ["predict", "--run", str(run), "--data", str(folder), "--device", "cpu", "--force"]
    if classes:
        command += ["--classes", *map(str, classes)]
    train.main(command)
    with open(run / "predictions.csv", newline="") as f:
        header, *rows = csv.reader(f)
    assert header == ["sample", "class", "score", "margin", "top5"]
    return rows


def nothing(folder):
    """What is wrong is not the folder."""


def class_text(*shape):
    """→ a function that writes t.npy, the text of new classes, beside a folder."""
    def writer(folder):
        np.save(folder.parent / "t.npy", np.random.default_rng(0).normal(size=shape).astype(np.float32))
    return writer


def class_text_with_two_names(folder):
    class_text(3, 768)(folder)
    (folder.parent / "t.txt").write_text("a\nb")


BAD_PREDICTIONS = {  # what is wrong: (what to give, how to spoil the folder, what the one line must name)
    "no run": ("--run nowhere", nothing, "nowhere/model.pt: no such file"),
    "no model": ("--run bad", nothing, "bad/model.pt: is damaged or no file"),
    "earlier version": ("--run old", nothing, "old/model.pt: is damaged or no file of this version"),
    "no samples": ("", remove("features.npy"), "mine: fits no format; looked for skeletons.npy"),
    "feature width": ("", spoil("features.npy", lambda a: a[:, :100]),
                      "features.npy: shape is (96, 100), must be (N, 256)"),
    "millimetres": ("", save_bodies(lambda x: 1000 * x[:9]), "skeletons.npy: "),
    "nobody": ("", skeletons(), "skeletons.npy: no sequence has a body"),
    "joints": ("", save_bodies(lambda x: bodies(9, joints=20)),
               "mine: has 20 joints, the run's encoder was trained on 25"),
    "only broken files": ("", write("a.skeleton", "x"), "mine: none of its 1 .skeleton files could be read"),
    "the same text": ("--classes t.npy", lambda folder: np.save(folder.parent / "t.npy", np.ones((3, 768))),
                      "t.npy: classes 0 and 1 have the same text"),
    "text width": ("--classes t.npy", class_text(3, 512), "t.npy: shape is (3, 1, 512); the run needs"),
    "too many tokens": ("--classes t.npy", class_text(3, 40, 768), "up to 29"),
    "other names": ("--classes t.npy", class_text_with_two_names, "t.txt: names 2 classes, t.npy has 3"),
    "three prompts": ("--classes t.npy t.npy t.npy", class_text(3, 768), "the run has 2 prompts"),
}


@pytest.mark.parametrize("method", ["dvta", "tdsm", "ridge"])
def test_predict_among_classes_named_only_now(method, finished_runs, small_folder, tmp_path, capsys):
    """The split's unseen classes, in another order and by text alone, give the figures of the run itself."""
    run, result = finished_runs[method]
    d = data.read_data(small_folder, "9_3")
    order, names = [8, 1, 5], ["zeta", "alpha, beta", "gamma"]
    label_file, description_file = tmp_path / "new_label.npy", tmp_path / "new_description.npy"
    np.save(label_file, d.text[0][order])
    np.save(description_file, d.text[1][order])
    label_file.with_suffix(".txt").write_text("\n".join(names))
    rows = predictions_of(run, small_folder, label_file, description_file)
    hits = [rows[n][1] == names[order.index(d.labels[n])] for n in d.unseen_test]
    assert sum(hits) / len(hits) == pytest.approx(result["zsl"]["acc"])
    assert [row[0] for row in rows] == [f"row {n}" for n in range(96)]
    for _, name, _, margin, top5 in rows:
        best_first = top5.split(" | ")
        assert float(margin) >= 0
        assert best_first[0] == name
        assert set(best_first) == set(names)
    assert f"{method}: 96 sequences among 3 classes" in capsys.readouterr().out


def test_predict_of_skeleton_files(finished_runs, small_folder, tmp_path, capsys):
    run, _ = finished_runs["tdsm"]
    x = np.load(small_folder / "skeletons.npy")
    raw = tmp_path / "raw"
    raw.mkdir()
    for n in range(4):
        write_skeleton(raw / f"mine_{n}.skeleton", x[n])
    (raw / "mine_9.skeleton").write_text("3\n")
    rows, all_rows = predictions_of(run, raw), predictions_of(run, small_folder)
    assert [row[0] for row in rows] == [f"mine_{n}.skeleton" for n in range(4)]
    for row, other in zip(rows, all_rows):
        assert row[1] == other[1]
        assert float(row[2]) == pytest.approx(float(other[2]), rel=1e-4)
    assert "1 of 5 files skipped; mine_9.skeleton: is truncated" in capsys.readouterr().err
    assert len(rows[0][4].split(" | ")) == 5
    assert rows[0][1] in data.bundled_classes("ntu60")[:12]               # seen and unseen classes


def test_predict_overwrites_nothing_unasked(finished_runs, features_folder, small_folder, tmp_path, capsys):
    run, _ = finished_runs["ridge"]
    out = tmp_path / "labels.npy"
    out.write_text("mine")
    command = ["predict", "--run", str(run), "--data", str(small_folder), "--out", str(out)]
    with pytest.raises(SystemExit) as stop:
        train.main(command)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert f"{out}: is there already; give --force" in error
    assert out.read_text() == "mine"
    train.main([*command, "--force"])
    assert out.read_text().startswith("sample,class,score")


def test_predict_with_one_file_for_both_prompts_and_one_class(finished_runs, small_folder, tmp_path):
    np.save(tmp_path / "one.npy", np.ones((1, 768), np.float32))
    rows = predictions_of(finished_runs["dvta"][0], small_folder, tmp_path / "one.npy")
    assert {(row[1], row[3], row[4]) for row in rows} == {("class 0", "", "class 0")}


@pytest.mark.parametrize("case", BAD_PREDICTIONS)
def test_bad_predictions_are_one_line_and_exit_2(case, finished_runs, features_folder, tmp_path, monkeypatch,
                                                 capsys):
    monkeypatch.chdir(tmp_path)
    Path("bad").mkdir()
    Path("bad/model.pt").write_bytes(b"no model")
    Path("old").mkdir()
    torch.save({"method": "ridge", "state": {}}, "old/model.pt")
    options, spoiler, message = BAD_PREDICTIONS[case]
    spoiler(features_folder)
    run, _ = finished_runs["ridge"]
    command = ["predict", "--run", str(run), "--data", str(features_folder), "--out", "p.csv"]
    with pytest.raises(SystemExit) as stop:
        train.main([*command, *options.split()])
    lines = capsys.readouterr().err.splitlines()
    error = [line for line in lines if not line.startswith("skipped: ")]
    assert stop.value.code == 2
    assert len(error) == 1 and message in error[0]
    assert not Path("p.csv").exists()


def leave_out_a_name(trained):
    trained["classes"].pop()


def another_method(trained):
    trained["method"] = "tdsm"


def a_shorter_weight(trained):
    trained["state"]["projector.fc0.weight"] = torch.ones(3)


def no_encoder_name(trained):
    trained["encoder"]["name"] = "shiftgcn"


def no_temperature(trained):
    trained["state"]["tau_da"] *= 0


def a_billion_blocks(trained):
    trained["settings"]["depth"] = 10 ** 9


def a_width_of_many_gigabytes(trained):
    trained["settings"]["width"] = 60_000


BAD_MODELS = {  # what happens to a model.pt: what the one line must name
    leave_out_a_name: "11 class names, text of 12 classes",
    another_method: "its parts do not fit each other",
    a_shorter_weight: "size mismatch for projector.fc0.weight",
    no_encoder_name: "its parts do not fit each other",
    a_billion_blocks: "1000000000 blocks, weights of fewer",
    a_width_of_many_gigabytes: "size mismatch",
}


@pytest.mark.parametrize("change", BAD_MODELS)
def test_a_model_whose_parts_disagree_is_one_line(change, finished_runs, tmp_path, capsys):
    run, _ = finished_runs["tdsm" if change in (a_billion_blocks, a_width_of_many_gigabytes) else "dvta"]
    trained = torch.load(run / "model.pt", weights_only=True)
    change(trained)
    torch.save(trained, tmp_path / "model.pt")
    with pytest.raises(SystemExit) as stop:
        train.main(["predict", "--run", str(tmp_path), "--data", "nowhere"])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith(f"error: {tmp_path}/model.pt: ") and BAD_MODELS[change] in error
    assert error.count("\n") == 1


def test_scores_that_are_no_numbers_are_one_line(finished_runs, features_folder, tmp_path, capsys):
    run, _ = finished_runs["dvta"]
    trained = torch.load(run / "model.pt", weights_only=True)
    no_temperature(trained)
    torch.save(trained, tmp_path / "model.pt")
    with pytest.raises(SystemExit) as stop:
        train.main(["predict", "--run", str(tmp_path), "--data", str(features_folder)])
    assert stop.value.code == 2
    assert "with what is no number; train it anew" in capsys.readouterr().err
    assert not (tmp_path / "predictions.csv").exists()


def test_names_with_a_byte_order_mark(tmp_path):
    (tmp_path / "classes.txt").write_text("wave\nclap\n", encoding="utf-8-sig")
    (tmp_path / "x.json").write_text("{}", encoding="utf-8-sig")
    assert data.read_lines(tmp_path / "classes.txt") == ["wave", "clap"]
    assert data.read_json(tmp_path / "x.json") == {}


def test_predict_tells_of_sequences_without_a_body(finished_runs, features_folder, capsys):
    save_bodies(with_value([1], 0))(features_folder)
    predictions_of(finished_runs["ridge"][0], features_folder)
    line = "1 of 96 sequences have no body, or not as their first person"
    assert capsys.readouterr().err == f"note: {features_folder}: {line}\n"


def test_a_run_on_features_cannot_encode_skeletons(features_folder, small_folder, tmp_path, capsys):
    run_main(features_folder, tmp_path / "run", method="ridge")
    with pytest.raises(SystemExit):
        train.main(["predict", "--run", str(tmp_path / "run"), "--data", str(small_folder)])
    assert "the run was trained on ready features" in capsys.readouterr().err
    assert len(predictions_of(tmp_path / "run", features_folder)) == 96


# ----------------------------------------------------------------------------------------- train.py: pictures
LONGEST_NAMES = sorted(data.bundled_classes("ntu120"), key=len)


def made_result(num_classes, seed=0, method="dvta", gzsl=True, points=20):
    """What a result.json holds, made up: so many unseen classes, NTU-120's of the longest names."""
    rng, K = np.random.default_rng(seed), num_classes
    labels, classes = np.repeat(np.arange(K + 5), 18), np.arange(K + 5)
    scores = torch.tensor(rng.normal(size=(len(labels), K + 5)) + 3 * np.eye(K + 5)[labels])
    zsl = zsar.zsl_figures(scores[labels < K, :K], labels[labels < K], classes[:K])
    generalized = zsar.gzsl_figures(scores, labels, classes, classes[K:], 0.5) if gzsl else None
    history = [[epoch, 3 / epoch, rng.random()] for epoch in range(1, points + 1)]
    return {"method": method, "dataset": "synthetic", "split": "55_5", "data_sha256": "f0", "seed": seed,
            "note": train.SYNTHETIC_NOTE, "unseen_classes": LONGEST_NAMES[-K:],
            "zsl": zsl, "gzsl": generalized,
            "ridge": {"acc": 0.4, "ci95": [0.3, 0.5], "per_class": 0.4, "gzsl": generalized},
            "history": train.thinned(history)}


def write_result(folder, result):
    """A run's folder with this result.json → the folder, as text."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result))
    return str(folder)


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, as a list that fills; `texts_of` tells of one."""
    Text = pytest.importorskip("matplotlib.text").Text
    drawn, draw = [], Text.draw
    for name in ("paint_run", "paint_comparison", "paint_sequence", "paint_predictions"):
        def paint(figure, *shown, real=getattr(train, name)):
            drawn.append(figure)
            figure.boxes = {}
            real(figure, *shown)
        monkeypatch.setattr(train, name, paint)

    def recording(self, renderer):
        if self.get_visible() and self.get_text() and "Agg" in type(renderer).__name__:     # of the .png
            box = self.get_window_extent(renderer).extents                # x0, y0, x1, y1 in pixels
            drawn[-1].boxes[self] = box
        draw(self, renderer)

    monkeypatch.setattr(Text, "draw", recording)
    return drawn


def texts_of(figure):
    """The texts of a figure that are really drawn; asserts that none is cut, NaN or over another."""
    names, boxes = [text.get_text() for text in figure.boxes], np.array(list(figure.boxes.values()))
    size = figure.get_size_inches() * figure.dpi
    assert (boxes[:, :2] > -1).all() and (boxes[:, 2:] < size + 1).all()
    low, high = boxes[:, None], boxes[None]
    shared = np.minimum(low[..., 2:], high[..., 2:]) - np.maximum(low[..., :2], high[..., :2])
    over = np.argwhere(np.triu((shared > 0.5).all(-1), 1))
    assert not len(over), [(names[a], names[b]) for a, b in over]
    assert not any("nan" in re.findall(r"[a-z]+", name.lower()) for name in names)
    for line in figure.findobj(lambda artist: hasattr(artist, "get_xydata")):
        assert np.isfinite(np.asarray(line.get_xydata(), float)).all()
    return names


def svg_text(path):
    """All text of an .svg file."""
    return " ".join(ElementTree.parse(path).getroot().itertext())


@pytest.mark.parametrize("num_classes", [5, 12, 24, 60])
def test_the_picture_of_a_run(num_classes, figures, tmp_path, capsys):
    run, svg = write_result(tmp_path / "run", made_result(num_classes)), num_classes == 60
    train.main(["plot", run, *["--svg"] * svg])
    assert f"written: {run}/figures.png" in capsys.readouterr().out
    png = (tmp_path / "run" / "figures.png").read_bytes()
    assert png.startswith(b"\x89PNG") and 20_000 < len(png) < 2_000_000
    names = texts_of(figures[0])
    assert sum(name.endswith("%]") for name in names) == num_classes
    text = svg_text(tmp_path / "run" / "figures.svg") if svg else " ".join(names)
    for name in LONGEST_NAMES[-num_classes:]:
        assert name in text
    for part in ("SYNTHETIC DATA", "training loss", "accuracy on the TEST set", "AUSUC", "chance"):
        assert part in text


def test_the_picture_of_a_run_shows_its_figures(figures, tmp_path):
    result = made_result(3, gzsl=False, points=0, method="ridge")
    result |= {"note": None, "unseen_classes": ["costs $5 or $6", "x_1^2", "<b> & \\frac"]}
    result["zsl"] |= {"confusion": [[3, 1, 0], [0, 0, 0], [2, 0, 2]], "acc": 0.625, "ci95": [0.25, 0.875]}
    run = write_result(tmp_path / "run", result)
    train.main(["plot", run, "--svg"])
    text = svg_text(tmp_path / "run" / "figures.svg")
    title = "split 55_5, seed 0: 62.5% among the unseen classes, ridge 40.0%, chance 33.3%"
    for part in (*result["unseen_classes"], title, "75.0% [30.1%, 95.4%]", "50.0% [15.0%, 85.0%]",
                 "run without --gzsl"):
        assert part in text
    assert "SYNTHETIC" not in text
    bars = figures[0].axes[1].patches
    assert [bar.get_width() for bar in bars] == [0.75, 0.5]               # none for a class without samples


@pytest.mark.parametrize("gzsl", [True, False])
def test_the_comparison_of_runs(gzsl, figures, tmp_path, capsys):
    """Runs of three methods, and the folder of two seeds."""
    results = [made_result(5, seed, method, gzsl) for seed, method in enumerate(("dvta", "tdsm", "ridge"))]
    runs = [write_result(tmp_path / result["method"], result) for result in results]
    seeds = [made_result(5, seed, "dvta", gzsl) for seed in (7, 8)]
    runs.append(write_result(tmp_path / "seeds", {"seeds": seeds}))
    train.main(["plot", *runs])
    assert f"written: {runs[0]}/comparison.png" in capsys.readouterr().out
    names = texts_of(figures[0])
    for result in (*results, *seeds):
        low, high = result["zsl"]["ci95"]
        assert f"{result['method']}, seed {result['seed']}" in names
        assert f"{result['zsl']['acc']:.1%} [{low:.1%}, {high:.1%}]" in names
    assert {"ridge, same encoder", "chance"} <= {*names}
    assert sum("AUSUC" in name for name in names) == 5 * gzsl
    other = write_result(tmp_path / "other", made_result(5) | {"data_sha256": "f1"})
    with pytest.raises(SystemExit) as stop:
        train.main(["plot", runs[0], other])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error == f"error: {runs[0]} or {other}: other data, text or split; compare runs on the same\n"


def test_pictures_of_real_runs(finished_runs, figures, tmp_path):
    for method, (run, result) in finished_runs.items():
        write_result(tmp_path / method, result)
        assert result["unseen_classes"] == [data.bundled_classes("ntu60")[c] for c in (1, 5, 8)]
        history = result["history"]
        assert len(history) == {"dvta": 2, "tdsm": 30, "ridge": 0}[method]
        if history:
            assert result["best_on_test"]["acc"] == max(point["acc_on_test"] for point in history)
            assert history[-1]["acc_on_test"] == result["zsl"]["acc"]
    train.main(["plot", str(tmp_path / "dvta")])
    assert "Eat meal/snack  1" in texts_of(figures[0])
    train.main(["plot", *(str(tmp_path / method) for method in finished_runs)])
    assert "tdsm, seed 0" in texts_of(figures[1])


def test_a_picture_overwrites_nothing_unasked(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run = write_result(tmp_path / "run", made_result(3, gzsl=False, points=1))
    png, svg = tmp_path / "run" / "figures.png", tmp_path / "run" / "figures.svg"
    svg.write_text("mine")
    with pytest.raises(SystemExit) as stop:
        train.main(["plot", run, "--svg"])
    assert stop.value.code == 2
    assert f"{svg}: is there already; give --force" in capsys.readouterr().err
    assert not png.exists() and svg.read_text() == "mine"
    png.write_text("mine")
    train.main(["plot", run, "--force"])
    assert png.read_bytes().startswith(b"\x89PNG") and svg.read_text() == "mine"


def damaged(*path, value):
    """→ a function that puts another value into a result, at a path of keys."""
    def change(result):
        *there, last = path
        for key in there:
            result = result[key]
        result[last] = value
    return change


DAMAGED_RESULTS = {
    "no classes": lambda result: result.pop("unseen_classes"),
    "no history": lambda result: result.pop("history"),
    "an earlier version": lambda result: result.pop("ridge"),
    "a row too few": damaged("zsl", "confusion", value=[[1, 2, 3], [1, 2, 3]]),
    "rows of many lengths": damaged("zsl", "confusion", 0, value=[1]),
    "accuracy a word": damaged("zsl", "acc", value="high"),
    "history of numbers": damaged("history", value=[1, 2]),
    "a curve of pairs": damaged("gzsl", "curve", value=[[0, 1], [1, 0]]),
    "no gamma's point": lambda result: result["gzsl"].pop("seen"),
    "seeds no list": damaged("seeds", value=3),
}


@pytest.mark.parametrize("case", DAMAGED_RESULTS)
def test_a_damaged_result_is_one_line_and_exit_2(case, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    result = made_result(3)
    DAMAGED_RESULTS[case](result)
    run = write_result(tmp_path / "run", result)
    with pytest.raises(SystemExit) as stop:
        train.main(["plot", run])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"error: {run}: its parts do not fit each other (")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["result.json"]


BAD_PLOTS = {  # options: what the one line must name
    "": "either name runs, or --data and --row",
    "run --data folder --row 0": "either name runs, or --data and --row",
    "run --row 0": "either name runs, or --data and --row",
    "--data folder": "either name runs, or --data and --row",
    "--data folder --row -1": "--row",
    "--data folder --row 96": "folder: has no row 96; choose one from 0 to 95",
    "--data features --row 0": "features: fits no format; looked for skeletons.npy",
    "--data nowhere --row 0": "nowhere: no such folder",
    "--data raw --row 1": "raw/b.skeleton: its parts do not fit each other (is truncated)",
    "--data raw --row 2": "raw: has no row 2; choose one from 0 to 1",
    "nowhere": "nowhere/result.json: no such file",
}


@pytest.mark.parametrize("options", BAD_PLOTS)
def test_bad_plots_are_one_line_and_exit_2(options, small_folder, features_folder, tmp_path, monkeypatch,
                                           capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    Path("folder").symlink_to(small_folder)
    Path("features").symlink_to(features_folder)
    Path("raw").mkdir()
    write_skeleton(Path("raw/a.skeleton"), np.load(small_folder / "skeletons.npy")[0])
    Path("raw/b.skeleton").write_text("3\n")
    with pytest.raises(SystemExit) as stop:
        train.main(["plot", *options.split()])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1 and BAD_PLOTS[options] in error
    assert not list(tmp_path.glob("*.png"))


def test_without_matplotlib(finished_runs, small_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run = write_result(tmp_path / "run", made_result(3))
    table = tmp_path / "p.csv"
    predict = ["predict", "--run", str(finished_runs["ridge"][0]), "--data", str(small_folder), "--plot"]
    for command in (["plot", run], [*predict, "--out", str(table)]):
        with pytest.raises(SystemExit) as stop:
            train.main(command)
        assert stop.value.code == 2
        assert capsys.readouterr().err == "error: matplotlib is missing; pip install -e '.[plot]'\n"
    assert not table.exists()


def test_matplotlib_is_imported_where_pictures_are_drawn_alone():
    sources = [path.read_text() for path in ROOT.glob("*.py") if path.name != "test_zsar.py"]
    in_all = sum(len(re.findall(r"(?:import|from) matplotlib", source)) for source in sources)
    assert in_all == inspect.getsource(train.load_matplotlib).count("import matplotlib") == 2


def test_the_picture_of_a_sequence(figures, small_folder, tmp_path, monkeypatch):
    """Three strips of eight poses; of the bones, the left ones are blue, the right ones orange."""
    LineCollection = pytest.importorskip("matplotlib.collections").LineCollection
    monkeypatch.chdir(tmp_path)
    train.main(["plot", "--data", str(small_folder), "--row", "3", "--svg"])
    name = f"{small_folder.name}_row3"
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    text = svg_text(tmp_path / f"{name}.svg")
    for part in ("skeletons.npy, row 3", "as recorded", "in the common frame", "left", "right"):
        assert part in text
    texts_of(figures[0])
    x = np.load(small_folder / "skeletons.npy")[3]                        # (3, 16, 25, 1)
    recorded = figures[0].axes[0].findobj(LineCollection)
    assert [len(lines.get_segments()) for lines in recorded] == [8 * 4, 8 * 10, 8 * 10]
    assert [lines.get_label() for lines in recorded] == ["middle", "left", "right"]
    bone = recorded[1].get_segments()[0]                                  # (4, 20) of frame 0
    np.testing.assert_allclose(bone, [x[:2, 0, 4, 0], x[:2, 0, 20, 0]], atol=1e-6)
    front, side = (ax.findobj(LineCollection)[1].get_segments()[0] for ax in figures[0].axes[1:])
    common = zsar.to_common_frame(x[None], zsar.NTU25)[0]
    np.testing.assert_allclose(front, common[:2, 0, [4, 20], 0].T, atol=1e-6)
    np.testing.assert_allclose(side, common[[2, 1], 0][:, [4, 20], 0].T, atol=1e-6)


@pytest.mark.parametrize("num_joints", zsar.GRAPHS)
def test_the_picture_of_two_persons_of_whom_one_comes_late(num_joints, figures, tmp_path, monkeypatch):
    x = np.zeros((2, 3, 10, num_joints, 2), np.float16)
    x[0, ..., 0] = person(10, 0.05, joints=num_joints)
    x[0, :, 5:, :, 1] = 1000 * person(5, 0.05, seed=1, joints=num_joints)              # in millimetres
    (tmp_path / "d").mkdir()
    np.save(tmp_path / "d" / "skeletons.npy", x)
    monkeypatch.chdir(tmp_path)
    train.main(["plot", "--data", "d", "--row", "0"])
    texts_of(figures[0])
    lines = figures[0].axes[0].collections
    assert sum(len(part.get_segments()) for part in lines) == (8 + 4) * (num_joints - 1)
    assert np.abs(np.diff(figures[0].axes[0].get_ylim())) > 100           # so one sees the millimetres


def test_the_picture_of_nobody(figures, tmp_path, monkeypatch):
    np.save(tmp_path / "skeletons.npy", np.zeros((1, 3, 10, 17, 2), np.float32))
    monkeypatch.chdir(tmp_path)
    train.main(["plot", "--data", ".", "--row", "0"])
    assert texts_of(figures[0]).count("nobody is there") == 3


def test_sequences_of_every_kind_of_folder(small_folder, tmp_path):
    x = np.load(small_folder / "skeletons.npy")
    name, one = data.read_sequence(small_folder, 95)
    assert name == "skeletons.npy, row 95"
    np.testing.assert_array_equal(one, x[95])
    folder = write_published(tmp_path / "published", "SMIE / DVTA skeletons")
    name, one = data.read_sequence(folder, 2)
    assert name == "seen_train_data.npy, row 2"
    np.testing.assert_array_equal(one, np.load(folder / "seen_train_data.npy")[2])
    for n in (1, 0):
        write_skeleton(tmp_path / f"{n}.skeleton", x[n])
    name, one = data.read_sequence(tmp_path, 1)
    assert name == "1.skeleton" and one.shape == (3, 64, 25, 2)
    np.testing.assert_allclose(one[:, [0, -1], :, 0], x[1][:, [0, -1], :, 0], atol=1e-5)


def test_the_picture_of_predictions(finished_runs, figures, small_folder, tmp_path, capsys):
    run, _ = finished_runs["dvta"]
    out = tmp_path / "p.csv"
    command = ["predict", "--run", str(run), "--data", str(small_folder), "--out", str(out), "--plot"]
    train.main(command)
    assert f"written: {out}\nwritten: {tmp_path / 'p.png'}" in capsys.readouterr().out
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    texts_of(figures[0])
    with open(out, newline="") as f:
        rows = list(csv.reader(f))[1:11]
    bars = [ax for ax in figures[0].axes if ax.patches]
    for ax, row in zip(bars, rows, strict=True):
        assert [label.get_text() for label in ax.get_yticklabels()] == row[4].split(" | ")
        assert [bar.get_width() for bar in ax.patches] == sorted((b.get_width() for b in ax.patches),
                                                                 reverse=True)
    assert len(figures[0].axes) == 20
    out.unlink()
    with pytest.raises(SystemExit):
        train.main(command)
    assert "p.png: is there already; give --force" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main([*command, "--out", str(tmp_path / "x.png")])
    assert "x.png: is where --plot draws" in capsys.readouterr().err
    assert not out.exists()


def test_the_picture_of_predictions_of_features_and_of_one_class(figures, tmp_path):
    scores = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    names, samples = LONGEST_NAMES[-7:], ["row 0", "row 1", "row 2"]
    train.draw([tmp_path / "p.png"], train.paint_predictions, "title", samples, scores, names, None)
    assert len(figures[0].axes) == 3
    assert {*samples} <= {*texts_of(figures[0])}
    train.draw([tmp_path / "p.png"], train.paint_predictions, "title", samples, scores[:, :1], ["a"], None)
    assert texts_of(figures[1]).count("a") == 3


# --------------------------------------------------------------------------------- train.py: the command line
BAD_OPTIONS = {  # options: what the one line must name
    "--data synthetic --split nowhere": "synthetic: unknown split 'nowhere' for ntu60; choose one of: 55_5",
    "--epochs 0": "--epochs",
    "--batch-size 1": "--batch-size",
    "--seed -1": "--seed",
    "--lr nan": "--lr",
    "--method tdm": "--method",
    "--batch-size x": "--batch-size",
    "--method ridge --no-sde": "--method ridge has no setting sde",
    "--method ridge --no-triplet": "--method ridge has no setting lam",
    "--width 64": "--method dvta has no setting width",
    "--method tdsm --width 65 --heads 4": "--width 65 cannot be shared by 4 heads",
    "--method tdsm --timestep 50": "timesteps 0 to 49",
    "--method tdsm --width 1000000000": "GiB, the cpu has",
    "--method tdsm --depth 1000000000": "--depth 1000000000, --noises 10: some",
    "--method tdsm --noises 1000000000000": "--noises 1000000000000: some",
}


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_bad_options_are_one_line_and_exit_2(options, features_folder, capsys):
    command = ["--method", "dvta", "--split", "9_3", "--data", str(features_folder)]
    with pytest.raises(SystemExit) as stop:
        train.main([*command, *options.split()])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1 and BAD_OPTIONS[options] in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none(features_folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run_main(features_folder, tmp_path / "out", "--device", "cuda")
    assert stop.value.code == 2
    assert "--device cuda: PyTorch finds no CUDA device" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("method, options", [("tdsm", []), ("dvta", ["--fp32"]),
                                             ("ridge", ["--encoder", "shiftgcn"])], ids=str)
def test_a_run_on_cuda(method, options, small_folder, tmp_path, monkeypatch):
    """With the whole set on the device, then pinned on the host: the encoder sees the same samples."""
    figures = []
    for room in (None, torch.empty):
        if room:
            monkeypatch.setattr(train, "_room_for", lambda shape, device: room(shape, pin_memory=True))
        out = tmp_path / str(room is None) / "run"
        result, _ = run_main(small_folder, out, "--device", "cuda", *options, method=method)
        figures.append(result["encoder"]["seen_test_acc"])
        assert result["precision"] == ("float32" if "--fp32" in options else "bfloat16 and TF32")
    assert abs(figures[0] - figures[1]) < 0.2


def test_precision_is_said_and_a_run_option(features_folder, tmp_path):
    for method in ("dvta", "tdsm", "ridge"):
        result, weights = run_main(features_folder, tmp_path / method, method=method)
        again, same = run_main(features_folder, tmp_path / f"{method}_fp32", "--fp32", method=method)
        assert result["precision"] == again["precision"] == "float32"
        assert again["config"][method]["fp32"] and again["config"]["encoder"]["fp32"]
        assert not result["config"][method]["fp32"] and not result["config"]["encoder"]["fp32"]
        assert_same_weights(weights, same)                                # a CPU has float32 either way
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert train.precision_of(cuda, None) == "bfloat16 and TF32"
    assert train.precision_of(cuda, True) == train.precision_of(cpu, None) == "float32"


@pytest.mark.parametrize("device, options, batch_size", [
    ("cuda", "", 256), ("cpu", "", 16), ("cuda", "--encoder shiftgcn", 256),
    ("cuda", "--encoder-preset published", 128)])
def test_the_encoders_batch_on_cuda(device, options, batch_size, small_folder, monkeypatch):
    args = train.parse_arguments(["--method", "dvta", "--split", "9_3", *options.split()])
    task = data.read_data(str(small_folder), "9_3", ())
    assert train.choose_settings(args, task, torch.device("cuda"))[0]["encoder"]["batch_size"] != 256
    monkeypatch.setattr(train, "MANY_SAMPLES", len(task.train))
    settings, _ = train.choose_settings(args, task, torch.device(device))
    assert settings["encoder"]["batch_size"] == batch_size


def test_setup_lists_every_module():
    text = (ROOT / "setup.py").read_text()
    modules = {path.stem for path in ROOT.glob("*.py")} - {"setup", "test_zsar"}
    assert all(f'"{module}"' in text for module in modules)


# -------------------------------------------------------------------------------------------------- real data
@pytest.mark.skipif("ZSAR_DATA" not in os.environ, reason="set ZSAR_DATA=path/to/kinect28")
class TestKinect28:
    FOLDER = Path(os.environ.get("ZSAR_DATA", "."))

    @pytest.mark.parametrize("split", ["22_6_a", "22_6_b", "22_6_c", "22_6_d", "22_6_e"])
    def test_splits(self, split):
        d = data.read_data(self.FOLDER, split)
        assert len(d.seen) == 22 and len(d.unseen) == 6
        assert d.skeletons.shape == (765, 3, 64, 25, 1)
        subjects = np.load(self.FOLDER / "subjects.npy")
        assert not {*subjects[d.train]} & {*subjects[d.unseen_test]}
        assert len(d.train) + len(d.seen_test) == np.isin(d.labels, d.seen).sum()

    def test_preprocessed_people_stand_upright(self):
        d = data.read_data(self.FOLDER, "22_6_a")
        x = zsar.to_common_frame(d.skeletons, zsar.NTU25)[:, :, 0, :, 0]  # (N, 3, V), first frame
        assert ((x[:, 1, 3] - x[:, 1, 0]) > 0.2).mean() > 0.97            # the head above the spine base

    def test_skeleton_files_and_back(self, tmp_path):
        """All sequences as .skeleton files, prepared, are the same folder, with the same figures."""
        raw, out = tmp_path / "raw", tmp_path / "kinect28"
        x, labels = np.load(self.FOLDER / "skeletons.npy"), np.load(self.FOLDER / "labels.npy")
        subjects = np.load(self.FOLDER / "subjects.npy")
        raw.mkdir()
        for n in range(len(x)):                                           # names in the order of the rows
            name = f"S{1 + n // 100:03}C{1 + n % 100:03}P{subjects[n]:03}R001A{labels[n] + 1:03}"
            write_skeleton(raw / f"{name}.skeleton", x[n])
        data.prepare("ntu", raw, out)
        np.testing.assert_allclose(np.load(out / "skeletons.npy"), x, atol=1e-5)
        assert np.array_equal(np.load(out / "labels.npy"), labels)
        assert np.array_equal(np.load(out / "subjects.npy"), subjects)
        for name in ("classes.txt", "splits.json", "text_label.npy", "text_description.npy"):
            shutil.copy(self.FOLDER / name, out / name)

        def run(folder, name):
            options = {"method": "ridge", "split": "22_6_a"}
            return run_main(folder, tmp_path / name / "run", "--encoder-epochs", 1, **options)

        (result, weights), (again, weights_again) = run(self.FOLDER, "0"), run(out, "1")
        assert result["zsl"] == again["zsl"]
        assert result["zsl"]["n"] == 83
        assert result["zsl"]["chance"] == 1 / 6
        assert 1 / 22 < result["encoder"]["seen_test_acc"] == again["encoder"]["seen_test_acc"]
        assert_same_weights(weights, weights_again)


KINECT81 = Path(os.environ.get("ZSAR_DATA", ".")).resolve().parent / "kinect81"


@pytest.fixture(scope="module")
def ready_features(tmp_path_factory):
    """A folder of ready features: each joint's mean place, its spread and its speed; the rest is dead."""
    folder = tmp_path_factory.mktemp("kinect81") / "features"
    shutil.copytree(KINECT81, folder, ignore=lambda *_: ["skeletons.npy"])
    x = zsar.to_common_frame(np.load(KINECT81 / "skeletons.npy"), zsar.NTU25)[..., 0]   # (N, 3, T, V)
    numbers = [x.mean(2), x.std(2), np.abs(np.diff(x, axis=2)).mean(2)]                 # (N, 3, V) each
    features = np.concatenate([part.reshape(len(x), -1) for part in numbers], 1)        # (N, 225)
    np.save(folder / "features.npy", np.pad(features, [(0, 0), (0, 256 - 225)]))
    return folder


@pytest.mark.skipif(not KINECT81.exists(), reason="kinect81 must lie beside ZSAR_DATA")
class TestKinect81:
    @pytest.mark.parametrize("split, unseen_test", [("71_10_a", 276), ("71_10_b", 232), ("71_10_c", 272)])
    def test_splits(self, split, unseen_test):
        d = data.read_data(KINECT81, split)
        assert (len(d.seen), len(d.unseen), len(d.val), len(d.unseen_test)) == (71, 10, 10, unseen_test)
        assert d.skeletons.shape == (4118, 3, 32, 25, 1)
        subjects = np.load(KINECT81 / "subjects.npy")
        assert not {*subjects[d.train]} & {*subjects[d.unseen_test]}

    @pytest.mark.parametrize("method, steps", [("ridge", 0), ("dvta", 40), ("tdsm", 200)])
    def test_every_method_is_above_chance_on_features(self, method, steps, ready_features, tmp_path):
        command = ["--method", method, "--split", "71_10_a", "--data", str(ready_features), "--device", "cpu"]
        length = ["--steps", str(steps)] if steps else []
        train.main([*command, *length, "--out", str(tmp_path / "run")])
        result = result_of(tmp_path / "run")
        assert result["zsl"]["n"] == 276 and result["zsl"]["chance"] == 0.1
        assert result["zsl"]["acc"] > 0.2


# ------------------------------------------------------------------------------------------------- benchmarks
def benchmark_dvta_step(rounds=15):
    """A training step at B = 128, D = 768: the split first layer and B² concatenations, run alternately."""
    model = DVTA(random_text(60, 768))
    optimizer = torch.optim.Adam(model.parameters(), 1e-5)
    x, y = torch.randn(128, 256), torch.randint(0, 60, (128,))
    head, seconds = model.head, {"split": [], "concatenated": []}
    ways = {"split": (head.forward, head.v_half, head.t_half, alignment.PAIRS_AT_ONCE["cpu"]),
            "concatenated": (concatenated(head), unchanged, unchanged, 128 ** 2)}
    for _ in range(rounds):
        for way, parts in ways.items():
            head.forward, head.v_half, head.t_half, alignment.PAIRS_AT_ONCE["cpu"] = parts
            start = time.perf_counter()
            optimizer.zero_grad()
            model.loss(x, y).backward()
            optimizer.step()
            seconds[way].append(time.perf_counter() - start)
    ratio = np.median(np.array(seconds["split"]) / np.array(seconds["concatenated"]))
    print(f"DVTA training step, split / concatenated: {ratio:.2f} (median of {rounds} pairs)")


def benchmark_tdsm():
    """Width 256, depth 4, L = 35: a step at batch 64, 200 samples × 20 classes × 3 noises, alternately."""
    g = torch.Generator().manual_seed(0)
    text = [torch.randn(60, 36, 768, generator=g) for _ in range(2)]
    x, y = torch.randn(200, 256, generator=g), torch.randint(0, 60, (200,), generator=g)
    models, optimizers = {}, {}
    for kind in (TDSM, PlainTDSM):
        models[kind] = kind(text, torch.arange(60), x, width=256, depth=4, heads=4)
        # the plain way has PyTorch's default AdamW, ours the fused one, as in train.py
        optimizers[kind] = torch.optim.AdamW(models[kind].parameters(), 1e-4, fused=kind is TDSM)

    def step(kind):
        optimizers[kind].zero_grad()
        models[kind].loss(x[:64], y[:64]).backward()
        optimizers[kind].step()

    def scores(kind):
        models[kind].scores(x, torch.arange(20))

    for name, work, rounds in (("training step", step, 15), ("scores", scores, 3)):
        seconds = {TDSM: [], PlainTDSM: []}
        for _ in range(rounds):
            for kind in seconds:
                start = time.perf_counter()
                work(kind)
                seconds[kind].append(time.perf_counter() - start)
        ratio = np.median(np.array(seconds[TDSM]) / np.array(seconds[PlainTDSM]))
        print(f"TDSM {name}, with / without the savings: {ratio:.2f} (median of {rounds} pairs)")


def convolution_first(self, x):                                           # (N, C_in, T, V)
    """GraphConv's forward as the paper writes it: to 3·C_out channels, then the sums over joints."""
    N, _, T, V = x.shape
    y = self.conv(x).view(N, len(self.A), -1, T, V)                       # (N, 3, C_out, T, V)
    return torch.einsum("nkctv,kvw->nctw", y, self.A * self.edge_importance)


def benchmark_stgcn_step(rounds=9):
    """A training step of ST-GCN, 16 sequences of 32 frames: joints summed first, and last, alternately."""
    x, y = torch.randn(16, 3, 32, 25, 1), torch.randint(0, 60, (16,))
    encoder = zsar.STGCN(zsar.NTU25, 25, 60)
    seconds = {zsar.GraphConv.forward: [], convolution_first: []}
    for _ in range(rounds):
        for zsar.GraphConv.forward, taken in seconds.items():
            encoder.zero_grad()
            start = time.perf_counter()
            F.cross_entropy(encoder.classify(x), y).backward()
            taken.append(time.perf_counter() - start)
    zsar.GraphConv.forward, _ = seconds
    ratio = np.median(np.divide(*seconds.values()))
    print(f"ST-GCN training step, joints summed first / last: {ratio:.2f} (median of {rounds} pairs)")


class NoTemporalShift(torch.nn.Module):
    """What is left of a temporal shift without the shift: its stride."""

    def __init__(self, stride):
        super().__init__()
        self.stride = stride

    def forward(self, x):                                                 # (V, C, T, B)
        return x[:, :, ::self.stride]


def benchmark_shiftgcn_step(rounds=9):
    """A training step of Shift-GCN and of the same network without its shifts, alternately.

    On NTU's shape and the preset's batch. glibc is told to keep what is freed: in a training it nearly does;
    two networks in turn make it give memory back and take it anew, up to 400 MB a step, which would be half
    of the difference.
    """
    if sys.platform == "linux":
        for parameter, size in ((-1, 2 ** 31 - 1), (-3, 2 ** 30)):        # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(parameter, size)
    batch_size = train.ENCODER["batch_size"]
    x, y = torch.randn(batch_size, 3, 64, 25, 2), torch.randint(0, 60, (batch_size,))
    shifting, still = zsar.ShiftGCN(25, 2, 60), zsar.ShiftGCN(25, 2, 60)
    for unit in still.units:
        unit.temporal[1], unit.temporal[4] = NoTemporalShift(1), NoTemporalShift(unit.temporal[4].stride)

    def step(encoder):
        encoder.zero_grad()
        F.cross_entropy(encoder.classify(x), y).backward()

    seconds, read_rows = {shifting: [], still: []}, zsar.ReadRows.apply
    for _ in range(rounds):
        for encoder in seconds:
            zsar.ReadRows.apply = read_rows if encoder is shifting else lambda rows, order, inverse: rows
            start = time.perf_counter()
            step(encoder)
            seconds[encoder].append(time.perf_counter() - start)
    zsar.ReadRows.apply = read_rows
    ratio = np.median(np.array(seconds[shifting]) / np.array(seconds[still]))
    print(f"Shift-GCN training step, with / without the shifts: {ratio:.2f} (median of {rounds} pairs)")


def benchmark_ntu_preparation(num_files=4000):
    """`python data.py ntu` on 70-frame one-body files: files a second and the most memory of one process."""
    with tempfile.TemporaryDirectory() as folder:
        raw, out = Path(folder, "raw"), Path(folder, "out")
        raw.mkdir()
        write_skeleton(raw / "S001C001P001R001A001.skeleton", person(70, 0.05)[..., None])
        text = (raw / "S001C001P001R001A001.skeleton").read_text()
        for n in range(1, num_files):
            name = f"S{1 + n // 1000:03}C001P001R{n % 1000:03}A001"
            (raw / f"{name}.skeleton").write_text(text)
        start = time.perf_counter()
        script("data.py", "ntu", raw, out).check_returncode()
        rate = num_files / (time.perf_counter() - start)
    print(f"NTU preparation: {rate:.0f} files/s, {os.cpu_count()} cores, start included; {most_memory()}")


def benchmark_memory(num_samples=20_000):
    """The memory of reading a folder of NTU-60's shape and size and training an encoder for an epoch."""
    with tempfile.TemporaryDirectory() as folder:
        folder, rng = Path(folder), np.random.default_rng(0)
        shape = (num_samples, 3, 64, 25, 2)
        x = np.lib.format.open_memmap(folder / "skeletons.npy", "w+", np.float32, shape)
        for n in range(num_samples):
            x[n, ..., 0] = rng.normal(size=(3, 64, 25))
        del x
        training = np.arange(num_samples) % 20 == 0                       # on all, an epoch takes an hour
        np.save(folder / "training.npy", training)
        np.save(folder / "labels.npy", np.arange(num_samples) % 60)
        (folder / "classes.txt").write_text("\n".join(data.bundled_classes("ntu60")))
        command = ["--method", "ridge", "--split", "55_5", "--data", folder, "--out", folder / "run"]
        script("train.py", *command, "--encoder-epochs", 1).check_returncode()
    print(f"encoder on {num_samples} sequences of 64 frames and 2 persons: {most_memory()}")


def most_memory():
    """The most memory that any child process so far had resident, as text."""
    return f"at most {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20:.2f} GiB a process"


def benchmark_bfloat16_answers():
    """How many of a trained TDSM's answers bfloat16 changes, on the synthetic set, on a CPU."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        command = ["--method", "tdsm", "--split", "55_5", "--device", "cpu", "--out", run]
        script("train.py", *command).check_returncode()
        trained = torch.load(run / "model.pt", weights_only=True)
        encoder, = Path(folder, "encoders").iterdir()
        x = torch.load(encoder, weights_only=True)["features"]
    model = train.rebuild("tdsm", trained["text"], trained["settings"], trained["state"])
    classes = torch.arange(len(trained["classes"]))
    answers = model.scores(x, classes).argmax(1)
    model.precision = lambda: torch.autocast("cpu", torch.bfloat16)
    changed = (model.scores(x, classes).argmax(1) != answers).float().mean()
    print(f"TDSM's answers that bfloat16 changes: {changed:.2%} of {len(x)}, among {len(classes)} classes")


def benchmark_two_processes():
    """TDSM's steps a second in two processes and in one; each has a core, or a GPU where there are two."""
    device = "cuda" if torch.cuda.device_count() > 1 else "cpu"
    options = f"--steps 40 --width 256 --depth 4 --heads 4 --batch-size 64 --device {device}"
    rates = {}
    with tempfile.TemporaryDirectory() as folder:
        folder, rng = Path(folder), np.random.default_rng(0)
        np.save(folder / "features.npy", rng.normal(size=(640, 256)).astype(np.float32))
        np.save(folder / "labels.npy", np.arange(640) % 60)
        np.save(folder / "training.npy", np.arange(640) % 4 > 0)
        (folder / "classes.txt").write_text("\n".join(data.bundled_classes("ntu60")))
        for count in (1, 2):
            command = ["--method", "tdsm", "--split", "55_5", "--data", folder, "--out", folder / str(count)]
            done = torchrun(TRAIN, *command, *options.split(), processes=count)
            done.check_returncode()
            rates[count] = float(re.findall("([^ ]+) steps/s", done.stdout)[-1])
    print(f"TDSM on {device}, batch 64: {rates[1]:.3g} steps/s in one process, {rates[2]:.3g} in two: "
          f"efficiency {rates[2] / rates[1] / 2:.0%}")


# ----------------------------------------------------------------------------------- the benchmark of a GPU
class Sizes(NamedTuple):
    """Of what the benchmark of a GPU measures."""
    matrix: int               # rows and columns
    tdsm: dict                # the denoiser
    batch: int                # TDSM's
    pairs: int                # DVTA's batch, B
    skeletons: int            # the encoders' batch, of NTU's shape
    scored: int               # samples
    rounds: int


PAPER_SIZES = Sizes(8192, {"width": 768, "depth": 12, "heads": 12}, 256, 128, 256, 10_000, 10)
TOY_SIZES = Sizes(16, {"width": 16, "depth": 2, "heads": 2}, 3, 4, 2, 5, 1)


def measured(work, device, rounds):
    """The median seconds of a piece of work, after some to warm up, and the GPU's memory as text."""
    def synchronise():
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    seconds, memory, warm_up = [], "", min(rounds, 3)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(warm_up + rounds):
        synchronise()
        start = time.perf_counter()
        work()
        synchronise()
        seconds.append(time.perf_counter() - start)
    if device.type == "cuda":
        memory = f", {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
    return float(np.median(seconds[warm_up:])), memory


def set_tf32(allowed):
    """As `train.pick_device` does; on a CPU nothing."""
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def training_step(model, optimizer, x, y):
    """→ a function that does a step of a method's training."""
    def step():
        optimizer.zero_grad(set_to_none=True)
        model.loss(x, y).backward()
        optimizer.step()
    return step


def gpu_matrix_rates(device, sizes):
    """Products of square matrices → the bfloat16 rate in FLOP/s."""
    n, rates = sizes.matrix, {}
    for name, dtype, tf32 in (("float32", torch.float32, False), ("TF32", torch.float32, True),
                              ("bfloat16", torch.bfloat16, True)):
        set_tf32(tf32)
        a, b = torch.randn(2, n, n, device=device).to(dtype)
        seconds, _ = measured(lambda: a @ b, device, sizes.rounds)
        rates[name] = 2 * n ** 3 / seconds
    text = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in rates.items())
    print(f"matrix product, n = {n}, TFLOP/s: {text}")
    return rates["bfloat16"]


def gpu_tdsm(device, sizes, bfloat16_rate):
    """TDSM's step, in FLOP/s and against the plain way in float32 without torch.compile; its scores."""
    text = [torch.randn(60, 36, 768, device=device) for _ in range(2)]
    x, y = torch.randn(sizes.batch, 256, device=device), torch.randint(60, (sizes.batch,), device=device)
    model, seen = TDSM(text, torch.arange(60, device=device), **sizes.tdsm).to(device), torch.arange(60)
    with FlopCounterMode(display=False) as counter:
        model.loss(x, y).backward()
    operations = counter.get_total_flops()
    if device.type == "cuda":
        model.compile_training()
    seconds, memory = measured(training_step(model, model.optimizer(1e-4), x, y), device, sizes.rounds)
    rate = operations / seconds
    print(f"TDSM training step, batch {sizes.batch}: {1e3 * seconds:.3g} ms, {rate / 1e12:.3g} TFLOP/s, "
          f"{rate / bfloat16_rate:.0%} of the matrix rate{memory}")
    print(f"  50,000 steps take {50_000 * seconds / 60:.3g} min")
    set_tf32(False)
    plain = PlainTDSM(text, seen.to(device), torch.randn(2, 256, device=device), **sizes.tdsm).to(device)
    slow, memory = measured(training_step(plain, plain.optimizer(1e-4), x, y), device, sizes.rounds)
    set_tf32(True)
    print(f"  float32, not compiled, without the savings: {1e3 * slow:.3g} ms, {slow / seconds:.3g} times "
          f"that{memory}")
    gpu_scores("TDSM", model, device, sizes)


def gpu_scores(name, model, device, sizes):
    """The scores of many samples among 60 classes."""
    x, classes = torch.randn(sizes.scored, 256, device=device), torch.arange(60, device=device)
    seconds, memory = measured(lambda: model.scores(x, classes), device, 1)
    print(f"{name} scores, {len(x)} samples x 60 classes: {seconds:.3g} s{memory}")


def gpu_dvta(device, sizes):
    """DVTA's step against B² concatenations; its scores."""
    text = [torch.randn(60, 1, 768, device=device) for _ in range(2)]
    x, y = torch.randn(sizes.pairs, 256, device=device), torch.randint(60, (sizes.pairs,), device=device)
    model = DVTA(text).to(device)
    gpu_scores("DVTA", model, device, sizes)
    step = training_step(model, model.optimizer(1e-5), x, y)
    seconds, memory = measured(step, device, sizes.rounds)
    head = model.head
    head.forward, head.v_half, head.t_half = concatenated(head), unchanged, unchanged
    slow, _ = measured(step, device, sizes.rounds)
    print(f"DVTA training step, B = {sizes.pairs}: {1e3 * seconds:.3g} ms, split / concatenated "
          f"{seconds / slow:.2f}{memory}")


def gpu_encoder(name, device, sizes):
    """An encoder's training, augmentation and all, on NTU's shape."""
    x, y = torch.randn(sizes.skeletons, 3, 64, 25, 2, device=device), torch.arange(sizes.skeletons) % 60
    encoder, y = train.build_encoder(name, 25, 2, 60).to(device), y.to(device)
    optimizer = train.encoder_optimizer(encoder, train.ENCODER)
    classify = train.fast_classify(encoder, compiled=device.type == "cuda")

    def step():
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(classify(zsar.augmented(x)), y).backward()
        optimizer.step()

    seconds, memory = measured(step, device, sizes.rounds)
    print(f"{name} training, batch {sizes.skeletons}: {sizes.skeletons / seconds:.0f} samples/s{memory}")


def benchmark_gpu(device, sizes):
    """What `python test_zsar.py cuda` prints."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, PyTorch {torch.__version__}")
    bfloat16_rate = gpu_matrix_rates(device, sizes)
    gpu_tdsm(device, sizes, bfloat16_rate)
    gpu_dvta(device, sizes)
    gpu_encoder("stgcn", device, sizes)
    gpu_encoder("shiftgcn", device, sizes)


def test_the_benchmark_of_a_gpu_at_toy_size(capsys):
    benchmark_gpu(torch.device("cpu"), TOY_SIZES)
    assert len(capsys.readouterr().out.splitlines()) == 10


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_the_benchmark_of_a_gpu_where_there_is_none():
    done = script("test_zsar.py", "cuda")
    assert done.returncode == 2
    assert done.stderr == "error: PyTorch finds no CUDA device here; the benchmark cuda needs one\n"


def benchmarks():
    """What was asked for on the command line. Raises InputError."""
    which = data.Parser(prog="test_zsar.py")
    which.add_argument("which", nargs="?", choices=["cpu", "cuda", "ddp"], default="cpu")
    chosen = which.parse_args().which
    if chosen == "cuda" and not torch.cuda.is_available():
        raise data.InputError("PyTorch finds no CUDA device here; the benchmark cuda needs one")
    if chosen == "cuda":
        benchmark_gpu(torch.device("cuda"), PAPER_SIZES)
    elif chosen == "ddp":
        benchmark_two_processes()
    else:
        benchmark_ntu_preparation()
        benchmark_memory()
        benchmark_dvta_step()
        benchmark_tdsm()
        benchmark_stgcn_step()
        benchmark_shiftgcn_step()
        benchmark_bfloat16_answers()


if __name__ == "__main__":
    data.command_line(benchmarks)
