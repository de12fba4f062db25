"""Every test: `pytest test_zsar.py`. With ZSAR_DATA=path/to/kinect28 the real-data tests run too."""
import ast
import contextlib
import csv
import fnmatch
import importlib.util
import inspect
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
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

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
    text = [prompt[:12] for prompt in data.bundled_text("ntu60")]
    skeletons, labels, subjects = data.synthetic((text[0][:, 0] + text[1][:, 0]) / 2, 4, 2, 16)
    arrays = {"skeletons": skeletons, "labels": labels, "subjects": subjects, "text_label": text[0],
              "text_description": text[1]}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
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
    train.main(least(folder, out, *options, "--force", method=method, split=split))
    return result_of(out), weights_of(out)


def least(folder, out, *options, method="dvta", split="9_3"):
    """A command line with the least of everything."""
    sizes = {"ridge": [], "dvta": ["--epochs", "2"],
             "tdsm": "--steps 4 --batch-size 16 --set width=16 depth=2 heads=2".split()}
    command = ["--method", method, "--split", split, "--data", str(folder), "--out", str(out)]
    return command + ["--device", "cpu", "--encoder-epochs", "2", *sizes[method], *map(str, options)]


def result_of(run):
    """The result.json of a run's folder."""
    return json.loads((run / "result.json").read_text())


def without_times(result):
    """A result without what differs from run to run: times, and where the encoder came from."""
    encoder = result["encoder"] | {"cached": None, "file": None}
    return result | {"seconds": None, "command": None, "encoder": encoder}


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


def spoil(name, change):
    """→ a function that changes one array of a folder."""
    return lambda folder: np.save(folder / name, change(np.load(folder / name)))


def with_value(index, value):
    def change(array):
        array[index] = value
        return array
    return change


def write(name, content):
    """→ a function that overwrites a file of a folder."""
    content = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(content)


def remove(name):
    """→ a function that removes one file of a folder."""
    return lambda folder: (folder / name).unlink()


def save(name, array):
    """→ a function that puts an array into a folder."""
    return lambda folder: np.save(folder / name, array)


def person(frames, motion, seed=0, joints=25):
    """A person (3, frames, joints) who stands upright, torso 0.5 m; `motion`: how far each joint moves."""
    rng, graph = np.random.default_rng(seed), zsar.GRAPHS[joints]
    pose = rng.uniform(-0.2, 0.2, (3, 1, joints)) + np.array([0, 1, 3])[:, None, None]
    pose[1, 0] = np.linspace(0.2, 1.8, joints)
    pose[1, 0, list(graph.root)], pose[1, 0, list(graph.shoulders)] = 1, 1.5
    pose[0, 0, list(graph.shoulders)] = 0.2, -0.2
    turns = np.linspace(0, 2 * np.pi, frames)[:, None] + rng.uniform(0, 6, joints)      # (frames, joints)
    return pose + motion * np.stack([np.sin(turns), np.cos(turns), np.sin(2 * turns)])


def write_skeleton(path, x, ids=None):
    """Write x (3, F, V, M) as an NTU .skeleton file; a person all zero in a frame is absent there.

    ids: (F, M) body ids; by default one for each person.
    """
    after_position = "277.4 191.8 1036.3 519.2 -0.2 0.03 0.97 -0.06 2"
    lines = [str(x.shape[1])]
    for t, frame in enumerate(x.transpose(1, 3, 2, 0)):                   # (M, V, 3)
        present = [m for m, body in enumerate(frame) if body.any()]
        lines.append(str(len(present)))
        for m in present:
            body_id = 72057594037931101 + (m if ids is None else ids[t][m])
            lines += [f"{body_id} 0 1 0 1 1 0 -0.06 -0.27 2", str(x.shape[2])]
            lines += [" ".join(repr(float(v)) for v in joint) + f" {after_position}" for joint in frame[m]]
    path.write_text("\n".join(lines) + "\n")


@contextlib.contextmanager
def seeded(seed):
    """Seed the random draws of a block; the caller's random state is restored afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


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
def test_every_graph_is_one_tree_with_normalised_columns(num_joints):
    graph = zsar.GRAPHS[num_joints]
    A = zsar.adjacency(graph.edges, num_joints, graph.centre)
    torch.testing.assert_close(A.sum((0, 1)), torch.ones(num_joints))
    assert len(graph.edges) == num_joints - 1
    assert (torch.linalg.matrix_power((A.sum(0) > 0).double(), num_joints) > 0).all()


def test_ntu_joint_tree():
    pairs = ("1-2 2-21 3-21 4-3 5-21 6-5 7-6 8-7 9-21 10-9 11-10 12-11 13-1 14-13 15-14 16-15 17-1 18-17 "
             "19-18 20-19 22-23 23-8 24-25 25-12")
    from_zero = [tuple(int(j) - 1 for j in pair.split("-")) for pair in pairs.split()]
    assert list(zsar.NTU25.edges) == from_zero


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
    x, graph = np.random.default_rng(3).normal(size=(4, 3, 5, num_joints, 2)), zsar.GRAPHS[num_joints]
    y = zsar.to_common_frame(x, graph)
    left, right = graph.shoulders
    shoulders = y[:, :, 0, left, 0] - y[:, :, 0, right, 0]                # (N, 3)
    np.testing.assert_allclose(y[:, :, 0, list(graph.root), 0].mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(shoulders[:, 1:], 0, atol=1e-5)
    assert (shoulders[:, 0] > 0).all()
    cos, sin = math.cos(2.5), math.sin(2.5)
    turn = np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])
    moved = np.einsum("ij,njtvm->nitvm", turn, x) + np.array([1, -2, 3])[:, None, None, None]
    np.testing.assert_allclose(zsar.to_common_frame(moved, graph), y, atol=1e-4)
    x_lengths, y_lengths = (np.linalg.norm(z[:, :, :, 1:] - z[:, :, :, :1], axis=1) for z in (x, y))
    np.testing.assert_allclose(x_lengths, y_lengths, atol=1e-4)           # a rigid motion


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
    assert torch.isfinite(both).all()
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
    A = zsar.adjacency(zsar.NTU25.edges, 25, 20)
    x = torch.rand(1, 4, 6, 25)
    for first in (True, False):
        block = zsar.STGCNBlock(4, 4, A, first=first).eval()
        block.temporal[1].weight.data.zero_()                             # only the residual is left
        torch.testing.assert_close(block(x), 0 * x if first else x)


def plain_temporal_shift(x, delta, stride):
    """Shift-GCN's temporal shift of x (B·V, C, T), by loops."""
    BV, C, T = x.shape
    y = torch.zeros(BV, C, -(-T // stride), dtype=x.dtype)
    for c, h in itertools.product(range(C), range(y.shape[2])):
        at = stride * h + delta[c].item() + (0.5 if stride == 2 else 0.0)
        for frame, weight in ((math.floor(at), 1 - at % 1), (math.floor(at) + 1, at % 1)):
            if 0 <= frame < T:
                y[:, c, h] += weight * x[:, c, frame]
    return y


@pytest.mark.parametrize("stride, frames", [(1, 6), (2, 6), (2, 7), (1, 1), (2, 1)])
def test_temporal_shift_against_loops_in_float64(stride, frames):
    shift, step = zsar.TemporalShift(5, stride).double(), 1e-6
    shift.delta.data = torch.tensor([-0.7, 0.0, 0.4, 2.6, -9.3], dtype=torch.float64)
    x = torch.randn(3, 5, frames, dtype=torch.float64, requires_grad=True)
    y = shift(x)
    torch.testing.assert_close(y, plain_temporal_shift(x.detach(), shift.delta, stride))
    # the gradient of x by finite differences, that of δ is 0.01·sign
    weight = torch.randn_like(y)
    gradient, of_delta = torch.autograd.grad((y * weight).sum(), [x, shift.delta])
    for index in ((0, 0, 0), (2, 2, min(3, frames - 1)), (1, 3, frames - 1)):
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
    straight = torch.einsum("bvct,dc->bvdt", x, convolution.weight[:, :, 0])
    straight = straight + convolution.bias[:, None]
    mean, var = straight.mean((0, 1, 3)), straight.var((0, 1, 3), correction=0)
    y = y + (straight - mean[:, None]) / (var[:, None] + norm.eps).sqrt()
    torch.testing.assert_close(shift(x.view(B * V, C, T)), y.view(B * V, C_out, T).clamp(min=0))
    same = zsar.SpatialShift(C, C, V).double().eval()                  # no change of channels: plus the input
    same.weight.data.zero_()
    torch.testing.assert_close(same(x.view(B * V, C, T)), x.view(B * V, C, T).clamp(min=0))


def test_shiftgcn_norms_all_joints_of_all_persons_and_means_over_persons(tmp_path):
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
    # the state, with its statistics, makes a round trip
    torch.save(encoder.state_dict(), tmp_path / "state.pt")
    again = zsar.ShiftGCN(5, 2, 3).eval()
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(again(x), encoder(x))


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
    encoder = zsar.STGCN(zsar.NTU25, 25, 3)
    x, rows = torch.randn(6, 3, 8, 25, 1) * 2 + 5, torch.tensor([0, 2, 3])
    zsar.recalibrate_batch_norm(encoder, x, rows)
    norm, values = encoder.input_norm, x[rows].permute(0, 4, 3, 1, 2).reshape(3, 75, 8)
    torch.testing.assert_close(norm.running_mean, values.mean((0, 2)))
    torch.testing.assert_close(norm.running_var, values.var((0, 2)))
    assert not encoder.training
    assert not encoder.blocks[3].temporal[2].training                     # dropout was and stays off
    # two classes, one after the other
    x = torch.randn(96, 3, 8, 25, 1)
    x[48:] += 9
    zsar.recalibrate_batch_norm(encoder, x, torch.arange(96))
    torch.testing.assert_close(norm.running_var, torch.full((75,), 1 + 4.5 ** 2), rtol=0.1, atol=0)


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
A = math.sqrt(3 / 2)   # scores -1, 0, 1 in any order have deviation 1/A: standardised, they are -A, 0, A


def gzsl_case():
    """Five samples, seen classes 0 and 1, unseen class 2; margins 2A, A (never right), -A | -A, 2A."""
    scores = torch.tensor([[1., 0, -1], [1, -1, 0], [0, -1, 1], [-1, 0, 1], [1, 0, -1]])
    labels, classes, seen = np.array([0, 1, 0, 2, 2]), np.array([0, 1, 2]), np.array([0, 1])
    return scores, labels, classes, seen


def test_ridge_against_the_plain_formula():
    g, classes = torch.Generator().manual_seed(1), torch.tensor([4, 1])
    text, x, y = random_text(), torch.randn(40, 256, generator=g), torch.randint(0, 4, (40,), generator=g)
    ridge = zsar.Ridge(text, torch.arange(4), x, penalty=3.0)
    ridge.fit(x, y)
    pooled = [prompt[:, 0].double() for prompt in text]
    P = np.concatenate([p / p.norm(dim=1, keepdim=True) for p in pooled], 1)
    X = (x.numpy() - x.numpy().mean(0)) / x.numpy().std(0)
    W = np.linalg.inv(X.T @ X + 3.0 * np.eye(256)) @ X.T @ (P[y] - P[y].mean(0))
    predicted, candidates = X @ W, P[classes] - P[y].mean(0)
    expected = [[p @ c / np.linalg.norm(p) / np.linalg.norm(c) for c in candidates] for p in predicted]
    np.testing.assert_allclose(ridge.scores(x, classes), expected, atol=1e-4)


def test_z_scores_by_hand():
    scores = zsar.z_scores(torch.tensor([[10., 20, 30], [-1, 1, 0], [5, 5, 5]]))
    expected = torch.tensor([[-A, 0, A], [-A, A, 0], [0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(scores, expected)


def test_zsl_figures_by_hand():
    scores = torch.tensor([[9., 1, 1], [1, 9, 1], [9, 1, 1], [1, 9, 1]])
    figures = zsar.zsl_figures(scores, np.array([4, 4, 4, 7]), np.array([4, 7, 8]))       # class 8: no sample
    z2 = 1.96 ** 2                                                        # Wilson's: of 4 samples, 3 hits
    middle, half = (3 + z2 / 2) / (4 + z2), math.sqrt(z2 * (3 / 4 + z2 / 4)) / (4 + z2)
    assert figures.pop("ci95") == pytest.approx([middle - half, middle + half])
    assert figures == {"acc": 0.75, "per_class": (2 / 3 + 1) / 2, "chance": 1 / 3, "n": 4,
                       "class_acc": [2 / 3, 1.0, None], "confusion": [[2, 1, 0], [0, 1, 0], [0, 0, 0]]}
    low, high = zsar.wilson_interval(np.array([0, 18, 9]), np.array([18, 18, 18]))
    np.testing.assert_allclose(low, [0, 18 / (18 + z2), 0.290307], atol=1e-6)
    np.testing.assert_allclose(high, [z2 / (18 + z2), 1, 0.709693], atol=1e-6)


def test_gzsl_figures_by_hand():
    gamma, seen, unseen = zsar.seen_unseen_curve(*gzsl_case())
    np.testing.assert_allclose(gamma, [-np.inf, -A, A, 2 * A])
    np.testing.assert_allclose(seen, [2 / 3, 1 / 3, 1 / 3, 0], atol=1e-12)
    np.testing.assert_allclose(unseen, [0, 1 / 2, 1 / 2, 1])
    # H = 0.4 from -A to A and from A to 2A: the first
    assert zsar.best_gamma(*gzsl_case()) == pytest.approx(0, abs=1e-9)
    figures = zsar.gzsl_figures(*gzsl_case(), gamma=0.0)
    curve = np.round([[-A, 1 / 3, 0.5], [A, 1 / 3, 0.5], [2 * A, 0, 1]], 6)
    np.testing.assert_allclose(figures.pop("curve"), curve, atol=1e-9)
    ausuc = (2 / 3 + 1 / 3) / 2 * 0.5 + (1 / 3 + 0) / 2 * 0.5
    expected = {"seen": 1 / 3, "unseen": 0.5, "harmonic": 0.4, "gamma": 0, "ausuc": ausuc}
    assert figures == pytest.approx(expected)
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
    with seeded(seed):
        return DVTA(random_text(), torch.arange(4), torch.zeros(1, 256), **switches)


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
    h = torch.cat([v.detach(), t.detach()])
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
        for i in range(B):
            target = [math.exp(10.0 * bool(y[i] == y[j])) for j in range(B)]
            soft = [z.exp() for z in rows[i]]
            for j in range(B):
                p, q = target[j] / sum(target), soft[j] / sum(soft)
                loss = loss + p * (math.log(p) - q.log()) / B
    return loss / 2


@pytest.mark.parametrize("switches", [{}, {"sde": False}, {"only": "da"}, {"only": "aa"}], ids=str)
def test_dvta_loss_gradients_and_scores_against_loops_in_float64(switches, monkeypatch):
    monkeypatch.setitem(alignment.PAIRS_AT_ONCE, "cpu", 8)                # several chunks
    model = random_dvta(**switches).double()
    model.head.fc2.weight.data *= 30                                      # so that z takes both signs
    g = torch.Generator().manual_seed(2)
    x, y = torch.randn(6, 256, generator=g, dtype=torch.float64), torch.tensor([0, 3, 0, 1, 2, 3])
    loss, plain = model(x, y), plain_dvta_loss(model, x, y)
    torch.testing.assert_close(loss, plain)
    parameters, zero = list(model.parameters()), torch.zeros(())
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    plain_gradients = torch.autograd.grad(plain, parameters, allow_unused=True)
    for fast, slow in zip(gradients, plain_gradients):
        torch.testing.assert_close(zero if fast is None else fast, zero if slow is None else slow)
    classes = torch.tensor([4, 0, 2])
    vs = [plain_projector(model, row).detach() for row in x]
    expected = torch.stack([torch.stack([plain_dvta_pair(model, v, c, v) for c in classes]) for v in vs])
    torch.testing.assert_close(model.scores(x, classes), expected.detach())


def test_no_gradient_passes_from_aa_to_da():
    model = random_dvta(only="aa")
    model(torch.randn(8, 256), torch.arange(8) % 5).backward()
    of_da = [*model.projector.parameters(), *model.sde.parameters(), model.tau_da]
    of_aa = [*model.head.parameters(), model.tau_aa]
    assert all(p.grad is None or not p.grad.any() for p in of_da)
    assert all(p.grad is not None and p.grad.any() for p in of_aa)


def test_leaky_sigmoid_on_both_sides():
    head, one = MetricHead(1), torch.zeros(1, 1, 2)
    head.fc2.weight.data.zero_()
    by_hand = {2.0: 1 / (1 + math.exp(-2)), -50.0: 0.01 * math.exp(-0.5), 1e5: 1.0, 0.0: 0.01}
    for z, expected in by_hand.items():
        head.fc2.bias.data.fill_(z)
        value = head(one, one)
        assert value.item() == pytest.approx(expected)
        assert torch.autograd.grad(value.sum(), head.fc2.bias)[0].isfinite().all()


def test_dvta_inputs_at_scale_against_the_plain_formulas():
    text, seen, x = random_text(), torch.tensor([0, 2, 3]), 5 * torch.randn(40, 256) + 3
    model = DVTA(text, seen, x, standardise=True, centre=True)
    plain = DVTA(text, seen, x)                                      # the paper's: lengths of 1, nothing else
    z = (x - x.mean(0)) / x.std(0, correction=0)
    torch.testing.assert_close(model.unit_features(x), z / z.norm(dim=1, keepdim=True))
    torch.testing.assert_close(plain.unit_features(x), x / x.norm(dim=1, keepdim=True))
    for p, prompt in enumerate(text):
        pooled = prompt[:, 0] / prompt[:, 0].norm(dim=1, keepdim=True)
        centred = pooled - (pooled[0] + pooled[2] + pooled[3]) / 3
        expected = centred / centred.norm(dim=1, keepdim=True)
        torch.testing.assert_close(model.class_prompts(torch.tensor([4, 1]))[:, p], expected[[4, 1]])
        torch.testing.assert_close(plain.class_prompts(torch.arange(5))[:, p], pooled)


# ----------------------------------------------------------------------------------------------- diffusion.py
def random_tdsm(seed=0, text=None, x=None, width=8, depth=3, heads=2, **switches):
    """A small TDSM whose every weight is random: adaLN and output weights are non-zero too."""
    with seeded(seed):
        x = 3 * torch.randn(30, 256) + 1 if x is None else x
        text = text or random_text()
        model = TDSM(text, torch.arange(4), x, width=width, depth=depth, heads=heads, **switches)
        for p in model.parameters():
            p.data += 0.2 * torch.randn_like(p)
    return model


def small_methods(x, text=None, **at_scale):
    """A fitted ridge, a DVTA and a TDSM for features x (N, F) and five classes."""
    text, seen = text or random_text(), torch.arange(4)
    ridge = zsar.Ridge(text, seen, x, penalty=3.0)
    ridge.fit(x, torch.arange(len(x)) % 4)
    return ridge, DVTA(text, seen, x, **at_scale), random_tdsm(text=text, x=x, **at_scale)


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
        rows = [plain_linear(projection, plain_norm(row) * (1 + mt[1]) + mt[0]).view(-1, D) for row in text]
        queries = [q] if last else [q] + [row[0] for row in rows]
        keys, values = [k] + [row[-2] for row in rows], [v] + [row[-1] for row in rows]
        attended = plain_attention(queries, keys, values, heads)
        x = plain_update(block.skeleton, x, attended[0], mx)
        if not last:
            text = [plain_update(block.text, row, a, mt) for row, a in zip(text, attended[1:])]
    shift, scale = plain_linear(net.final_modulation.fc, condition).view(2, D)
    return plain_linear(net.x_out, plain_norm(x) * (1 + scale) + shift)


class PlainCrossDiT(CrossDiT):
    """The same mathematics as one writes it first: explicit softmax, a whole last block, no row shared."""

    def __init__(self, features, text_channels, num_tokens, width, depth, heads):
        super().__init__(features, text_channels, num_tokens, width, depth, heads)
        self.blocks[-1].text = diffusion.Stream(width, heads)

    def forward(self, x, t, tokens, pooled):                              # (B, F), (B,), (B, L, E), (B, E)
        text, modulations, final = self.condition(t, torch.arange(len(x)), tokens, pooled)
        x = self.x_in(x)[:, None, None]                                   # (B, 1, 1, D), beside (B, 1, L, D)
        for block, (mx, mt) in zip(self.blocks, modulations):
            qkv = zip(block.skeleton.attend(x, mx), block.text.attend(text, mt))
            q, k, v = (torch.cat(parts, 3) for parts in qkv)              # (B, 1, heads, 1 + L, D/heads)
            attended = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v
            attended = attended.transpose(2, 3).flatten(3)                # (B, 1, 1 + L, D)
            x = block.skeleton.update(x, attended[:, :, :1], mx)
            text = block.text.update(text, attended[:, :, 1:], mt)
        return self.x_out(diffusion.modulated_norm(x, *final))[:, 0, 0]   # (B, F)


class PlainTDSM(TDSM):
    """TDSM on the plain denoiser, with a loop over classes and noises."""

    def __init__(self, text, seen, x, width, depth, heads):
        super().__init__(text, seen, x, width, depth, heads)
        self.denoiser = PlainCrossDiT(256, self.tokens.shape[2], self.tokens.shape[1], width, depth, heads)

    def take_weights(self, model):
        """The weights of a TDSM; the last block's idle text weights stay random."""
        state, last = model.state_dict(), f"denoiser.blocks.{len(model.denoiser.blocks) - 1}.text."
        for kind in ("weight", "bias"):
            modulation = self.get_parameter(f"{last}modulation.fc.{kind}")
            keys_values = state.pop(f"{last}kv.{kind}")
            modulation.data[:len(keys_values)] = state.pop(f"{last}modulation.fc.{kind}")
            self.get_parameter(f"{last}qkv.{kind}").data[-len(keys_values):] = keys_values
        assert not self.load_state_dict(state, strict=False).unexpected_keys

    def triplet_loss(self, x, y, wrong, t, noise):
        noisy, target = self.noised(self.standardised(x), noise, t)
        right, other = ((self.denoiser(noisy, t, self.tokens[c], self.pooled[c]) - target).square().mean(1)
                        for c in (y, wrong))
        triplet = ((right - other + self.margin).clamp(min=0) * (y != wrong)).mean()
        return right.mean() + self.triplet_weight * triplet, right.mean(), other.mean()

    @torch.no_grad()
    def scores(self, x, classes):
        t, out = torch.full((len(x),), self.timestep), torch.zeros(len(x), len(classes), dtype=x.dtype)
        for k, c in enumerate(classes):
            tokens, pooled = self.tokens[c].expand(len(x), -1, -1), self.pooled[c].expand(len(x), -1)
            for noise in self.noises:
                noisy, target = self.noised(self.standardised(x), noise, t)
                out[:, k] -= (self.denoiser(noisy, t, tokens, pooled) - target).square().mean(1)
        return out


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


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_a_perfect_prediction_has_no_error(prediction, monkeypatch):
    model = random_tdsm(prediction=prediction, triplet_weight=0.0)
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
    x_t, weight = torch.randn(2, 3, 256, dtype=torch.float64)
    t, classes = torch.tensor([0, 25, 49]), torch.tensor([1, 4, 1])
    fast = net(x_t[:, None], net.condition(t, classes, model.tokens, model.pooled))[:, 0]
    rows = zip(x_t, t.tolist(), model.tokens[classes], model.pooled[classes])
    slow = torch.stack([plain_denoiser(net, *row) for row in rows])
    torch.testing.assert_close(fast, slow)
    gradients = (torch.autograd.grad((y * weight).sum(), parameters) for y in (fast, slow))
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


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


def test_the_last_block_has_no_idle_text_weights():
    model = random_tdsm()
    assert not hasattr(model.denoiser.blocks[-1].text, "mlp")
    assert model.denoiser.blocks[-1].text.kv.out_features == 2 * 8
    model(torch.randn(6, 256), torch.tensor([0, 1, 2, 3, 0, 1])).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


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


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_triplet_loss_against_the_formula(prediction, exact_timesteps):
    model = random_tdsm(prediction=prediction).double()
    x, noise = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
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
    expected = total, sum(right) / 5, sum(other) / 5
    torch.testing.assert_close(model.triplet_loss(x, y, wrong, t, noise), expected)


@pytest.mark.parametrize("prediction, unit", [("epsilon", 1), ("sample", 0.0625), ("v_prediction", 1)])
def test_the_triplet_term(prediction, unit):
    """Its margin is in units of the target's variance; descending it lowers e⁺ and pushes e⁻ up."""
    model = random_tdsm(prediction=prediction, scale=0.25, margin=100.0, triplet_weight=2.0)
    x, noise = torch.randn(2, 4, 256, generator=torch.Generator().manual_seed(5))
    y, t, parameters = torch.arange(4), torch.tensor([3, 20, 30, 49]), list(model.denoiser.parameters())
    loss, right, other = model.triplet_loss(x, y, (y + 1) % 4, t, noise)     # violated by every sample
    torch.testing.assert_close(loss - right, 2 * (right - other + 100 * unit))
    pull, push, term = (torch.autograd.grad(e, parameters, retain_graph=True)
                        for e in (right, other, (loss - right) / 2))
    for both, a, b in zip(term, pull, push):
        torch.testing.assert_close(both, a - b, rtol=1e-3, atol=1e-4)
    assert torch.equal(model.triplet_loss(x, y, y, t, noise)[0], right)      # y′ = y: no term
    model.margin = -100.0 / unit                                             # kept by every sample
    assert torch.equal(model.triplet_loss(x, y, (y + 1) % 4, t, noise)[0], right)


def test_tdsm_scores_against_loops_over_classes_noises_and_samples(exact_timesteps, monkeypatch):
    model = random_tdsm().double()
    x, classes, a = torch.randn(5, 256, dtype=torch.float64), torch.tensor([4, 0, 2]), model.alpha_bar[25]
    expected = torch.zeros(5, 3, dtype=torch.float64)
    for (n, row), (k, c), noise in itertools.product(enumerate(x), enumerate(classes), model.noises):
        x_t = a.sqrt() * (row - model.x_mean) / model.x_std + (1 - a).sqrt() * noise
        predicted = plain_denoiser(model.denoiser, x_t, 25, model.tokens[c], model.pooled[c]).detach()
        expected[n, k] -= ((predicted - noise) ** 2).mean()
    torch.testing.assert_close(model.scores(x, classes), expected)
    # whatever the batch, the order of the classes, the other candidates, the memory
    torch.testing.assert_close(model.scores(x[3:4], classes), expected[3:4])
    torch.testing.assert_close(model.scores(x, classes[[2, 0, 1]]), expected[:, [2, 0, 1]])
    torch.testing.assert_close(model.scores(x, classes[1:2]), expected[:, 1:2])
    for budget, samples in ((1, 1), (60_000, 4)):
        monkeypatch.setitem(diffusion.MEMORY_BUDGET, "cpu", budget)
        assert model.samples_per_chunk(3) == samples
        torch.testing.assert_close(model.scores(x, classes), expected)


def test_all_savings_against_the_plain_way():
    """A whole last block, explicit attention, no reuse over classes: the same loss, gradients and scores."""
    model = random_tdsm().double()
    plain = PlainTDSM(random_text(), torch.arange(4), torch.zeros(2, 256), width=8, depth=3, heads=2).double()
    plain.take_weights(model)
    x, noise = torch.randn(2, 6, 256, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    y, wrong = torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([1, 1, 3, 0, 2, 0])
    t, gradients = torch.tensor([0, 9, 20, 30, 40, 49]), []
    loss, plain_loss = (m.triplet_loss(x, y, wrong, t, noise)[0] for m in (model, plain))
    torch.testing.assert_close(loss, plain_loss)
    torch.testing.assert_close(model.scores(x, torch.arange(5)), plain.scores(x, torch.arange(5)))
    for m, value in ((model, loss), (plain, plain_loss)):
        compared = [p for name, p in m.named_parameters() if ".2.text" not in name]     # not the idle weights
        gradients.append(torch.autograd.grad(value, compared))
    for fast, slow in zip(*gradients):
        torch.testing.assert_close(fast, slow)


def test_tdsm_condition_switches():
    x, text, other = torch.randn(3, 256), random_text(), random_text(seed=9)
    other_tokens = [torch.cat([a[:, :1], b[:, 1:]], 1) for a, b in zip(text, other)]
    other_pooled = [torch.cat([b[:, :1], a[:, 1:]], 1) for a, b in zip(text, other)]
    for conditions, sees in (("both", [True, True]), ("pooled", [False, True]), ("tokens", [True, False])):
        scores = [random_tdsm(text=prompts, conditions=conditions).scores(x, torch.arange(5))
                  for prompts in (text, other_tokens, other_pooled)]
        assert [not torch.equal(scores[0], changed) for changed in scores[1:]] == sees


def test_tdsm_standardises_with_training_statistics_kept_in_the_weights():
    x = 5 * torch.randn(40, 256) + 3
    x[:, 7] = 2.0                                                         # a constant channel
    model = random_tdsm(x=x)
    z = model.standardised(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(256), atol=1e-5, rtol=0)
    assert torch.isfinite(z).all()
    assert z[:, :7].std(0, correction=0).sub(1).abs().max() < 1e-4
    assert {"x_mean", "x_std", "noises"} <= model.state_dict().keys()
    assert torch.equal(random_tdsm(x=x, standardise=False).standardised(x), x)
    torch.testing.assert_close(random_tdsm(x=x, scale=0.25).standardised(x), z / 4)


def test_tdsm_text_at_scale_against_the_plain_formulas():
    seen = torch.tensor([0, 2, 3])
    of_length_1 = [F.normalize(prompt, dim=-1) * 1.003 for prompt in random_text()]   # stored in float16, say
    of_length_1[0][:, 2] = 0                                              # padding
    small = {"x": torch.zeros(1, 256), "width": 8, "depth": 1, "heads": 1, "unit_text": True}
    model = TDSM(of_length_1, seen, **small, centre=True)
    for p, prompt in enumerate(of_length_1):
        channels = slice(12 * p, 12 * p + 12)
        torch.testing.assert_close(model.tokens[..., channels].norm(dim=-1) > 0, prompt[:, 1:].any(-1))
        assert model.tokens[:, 0, channels].square().mean(-1).sub(1).abs().max() < 1e-5
        at_scale = prompt[:, 0] / prompt[:, 0].norm(dim=-1, keepdim=True) * math.sqrt(12)
        centred = at_scale - (at_scale[0] + at_scale[2] + at_scale[3]) / 3
        expected = centred / centred.norm(dim=-1, keepdim=True) * math.sqrt(12)
        torch.testing.assert_close(model.pooled_vectors()[:, channels], expected)
    longer = [30 * prompt for prompt in of_length_1]                      # CLIP's: as it is
    model = TDSM(longer, seen, **small)
    assert torch.equal(model.pooled_vectors(), torch.cat([prompt[:, 0] for prompt in longer], -1))
    assert torch.equal(model.tokens, torch.cat([prompt[:, 1:] for prompt in longer], -1))


def test_statistics_are_kept_in_the_weights():
    """A trained model on the text of other classes, and no training data at hand, scores as before."""
    x, other, at_scale = torch.randn(40, 256) + 1, random_text(seed=3), {"standardise": True, "centre": True}
    whole = [torch.cat(pair) for pair in zip(random_text(), other)]
    trained, rebuilt = small_methods(x, whole, **at_scale), small_methods(x[:1] * 0, other, **at_scale)
    for model, again in zip(trained, rebuilt):
        again.load_state_dict(model.state_dict())
        torch.testing.assert_close(again.scores(x, torch.arange(5)), model.scores(x, torch.arange(5, 10)))


def test_a_channel_dead_in_training_stays_harmless():
    """One that is constant in training and moves at test by little is not blown up."""
    x = torch.randn(40, 256)
    x[:, 7] = 2.0
    moved = x.clone()
    moved[:, 7] += 1e-3
    for model in small_methods(x, standardise=True):
        scores = [model.scores(part, torch.arange(5)) for part in (x, moved)]
        torch.testing.assert_close(*scores, atol=0.01, rtol=0.01)


@pytest.mark.parametrize("width", [64, 512])
def test_methods_take_features_of_any_width(width):
    x, y = torch.randn(40, width), torch.arange(40) % 4
    ridge, *trained = small_methods(x)
    for model in (ridge, *trained):
        assert model.scores(x, torch.arange(5)).shape == (40, 5)
    for model in trained:
        model(x, y).backward()
        assert all(p.grad is not None for p in model.parameters())


def test_tdsms_forward_draws_a_batch_and_keeps_its_errors():
    model, x, y = random_tdsm(), torch.randn(6, 256), torch.tensor([0, 1, 2, 3, 0, 1])
    with seeded(1):
        loss = model(x, y)
    with seeded(1):
        t, wrong = torch.randint(50, (6,)), torch.randint(4, (6,))        # seen classes are 0 to 3
        expected, right, other = model.triplet_loss(x, y, wrong, t, torch.randn(6, 256))
    assert torch.equal(loss, expected)
    assert torch.equal(model.log["e+"], right) and torch.equal(model.log["e-"], other)
    assert not any(value.requires_grad for value in model.log.values())


# -------------------------------------------------------------------------------- what CUDA needs, on a CPU
def small_models():
    """A small one of each method and encoder."""
    ridge, dvta, _ = small_methods(torch.randn(30, 256), standardise=True, centre=True)
    return {"ridge": ridge, "dvta": dvta, "tdsm": random_tdsm(depth=2, centre=True, unit_text=True),
            "stgcn": zsar.STGCN(zsar.NTU25, 25, 4), "shiftgcn": zsar.ShiftGCN(25, 2, 4)}


@pytest.fixture
def shallow_encoders(monkeypatch):
    """Encoders of two blocks."""
    monkeypatch.setattr(zsar.STGCN, "BLOCKS", ((8, 1), (zsar.FEATURES, 2)))
    monkeypatch.setattr(zsar.ShiftGCN, "UNITS", ((8, 1), (zsar.FEATURES, 2)))


@pytest.mark.parametrize("name", ["dvta", "tdsm", "stgcn", "shiftgcn", "ridge"])
def test_no_tensor_is_made_on_a_default_device(name, monkeypatch, shallow_encoders):
    """On "meta", where there are only shapes, one tensor of a CPU's would be refused."""
    monkeypatch.setitem(alignment.PAIRS_AT_ONCE, "meta", 8)
    monkeypatch.setitem(diffusion.MEMORY_BUDGET, "meta", 1 << 12)
    model, x = small_models()[name].to("meta"), torch.ones(6, 256, device="meta")
    y, skeletons = torch.arange(6, device="meta") % 4, torch.ones(6, 3, 8, 25, 2, device="meta")
    if name == "ridge":
        model.fit(x, y)
    elif name in ("dvta", "tdsm"):
        model(x, y).backward()
    else:
        F.cross_entropy(model.classify(zsar.augmented(skeletons)), y).backward()
    assert all(p.grad is None or p.grad.is_meta for p in model.parameters())
    if hasattr(model, "scores"):
        scores = model.scores(x, torch.arange(5, device="meta"))
        assert scores.is_meta and scores.shape == (6, 5)


@pytest.mark.parametrize("name", ["dvta", "tdsm", "stgcn", "shiftgcn"])
def test_a_compiled_training_step_is_the_plain_one(name, shallow_encoders):
    """In one graph, without a break: values and gradients."""
    torch.manual_seed(0)
    model = small_models()[name]
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
        value = value[0] if name == "tdsm" else value.square().sum()
        results.append([value, *torch.autograd.grad(value, list(model.parameters()))])
    for fast, plain in zip(*results):
        torch.testing.assert_close(fast, plain)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["stgcn", "shiftgcn"])
def test_encoders_in_bfloat16(name):
    torch.manual_seed(0)
    model, x = small_models()[name].eval(), torch.randn(2, 3, 8, 25, 1 + (name == "shiftgcn"))
    whole = model.classify(x)
    if name == "stgcn":
        model.to(memory_format=torch.channels_last)                       # as in training on CUDA
    with torch.autocast("cpu", torch.bfloat16):
        half = model.classify(x)
    assert half.dtype == torch.bfloat16
    half = half.float()
    assert not torch.equal(half, whole)
    assert F.cosine_similarity(half, whole).min() > 0.999
    half.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# ------------------------------------------------------------------------------- helpers of the tests of data


def save_bodies(change=lambda x: x, graph=zsar.NTU25):
    """→ a function that puts changed skeletons of real size in place of a folder's features."""
    def spoiler(folder):
        (folder / "features.npy").unlink()
        np.save(folder / "skeletons.npy", change(bodies(96, graph)))
    return spoiler


def bodies(count, graph=zsar.NTU25):
    """Skeletons (count, 3, 4, V, 1) of a random pose each; their torsos are upright and 0.5 m long."""
    x = np.random.default_rng(0).normal(size=(count, 3, 4, len(graph.edges) + 1, 1)).astype(np.float32)
    x[:, :, :, list(graph.root)] = 0
    x[:, :, :, list(graph.shoulders)] = np.array([0, 0.5, 0], np.float32)[:, None, None, None]
    return x


def split_file(**entry):
    """→ a function that overwrites the split, with these entries changed."""
    return write("splits.json", json.dumps({"9_3": {"unseen": [1, 5, 8], "test_subjects": [2, 4]} | entry}))


def one_line_of(command, capsys, status=2):
    """Run a command that fails → its line on standard error, the only thing that it prints."""
    with pytest.raises(SystemExit) as stop:
        command()
    printed = capsys.readouterr()
    assert stop.value.code == status and printed.out == "" and printed.err.count("\n") == 1, printed
    return printed.err


def predictions_of(run, folder, *options):
    """The rows of predictions.csv of a run for the samples at a path."""
    train.main(["predict", "--run", str(run), "--data", str(folder), "--device", "cpu", "--force", *options])
    with open(run / "predictions.csv", newline="") as f:
        header, *rows = csv.reader(f)
    assert header == ["sample", "class", "score", "margin", "top5"]
    return rows


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


# ------------------------------------------------------------------------- data.py: reading and writing files
def test_the_fingerprint_is_of_the_values(features_folder, tmp_path):
    a = np.arange(12.0).reshape(4, 3)
    np.save(tmp_path / "a.npy", a)
    memory_mapped, column_major = np.load(tmp_path / "a.npy", mmap_mode="r"), a.T.copy().T
    assert data.fingerprint(a) == data.fingerprint(memory_mapped) == data.fingerprint(column_major)
    others = [a.reshape(3, 4), a.astype(np.float32), a[::-1], a[:3]]
    assert len({data.fingerprint(b) for b in (a, *others)}) == 5
    hashes = set()
    for name, index in (("features.npy", (0, 0)), ("text_description.npy", (3, 2, 1)), ("labels.npy", 0)):
        hashes.add(run_main(features_folder, tmp_path / "run", method="ridge")[0]["data_sha256"])
        spoil(name, with_value(index, 2))(features_folder)
    hashes.add(run_main(features_folder, tmp_path / "run", method="ridge")[0]["data_sha256"])
    assert len(hashes) == 4


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_and_foreign_tensors_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng, path = np.random.default_rng(0), tmp_path / "x.pt"
    torch.save({"a": torch.arange(500.0), "b": 1}, path)
    assert data.read_tensors(path, "ab")["a"][499] == 499
    damaged = [path.read_bytes()[:n] for n in (0, 100, 1500)]
    damaged += [rng.integers(0, 256, rng.integers(1, 60), dtype=np.uint8).tobytes() for _ in range(100)]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(data.InputError, match="x.pt: cannot be read .*; name another, or remove it$"):
            data.read_tensors(path, "ab")
    for value, message in (({"a": Evil(), "b": 1}, "cannot be read"), (7, "cannot be read"),
                           ({"a": 1}, "lacks b, so another"), ([1], "lacks a, b, so")):
        torch.save(value, path)
        with pytest.raises(data.InputError, match=f"^[^\n]*x.pt: {message}[^\n]*$"):
            data.read_tensors(path, "ab")
    assert not (tmp_path / "evil").exists()
    with pytest.raises(data.InputError, match="y.pt: cannot be read .No such file"):
        data.read_tensors(tmp_path / "y.pt", "ab")


def test_a_failed_write_leaves_the_old_file_and_no_part(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")

    def full_disk(f):
        f.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        data.write_file(path, full_disk)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["result.json"]
    data.write_json(path, {"a": [1]})
    assert result_of(tmp_path) == {"a": [1]} and os.listdir(tmp_path) == ["result.json"]
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
    for array in (mapped, np.ascontiguousarray(x)):
        firsts, parts = zip(*data.pieces(array))
        assert firsts == (0, 1024, 2048)
        np.testing.assert_array_equal(np.concatenate(parts), x)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_says_so(features_folder):
    (features_folder / "x.pt").touch()
    for name in ("features.npy", "classes.txt", "splits.json", "text_label.npy", "x.pt"):
        (features_folder / name).chmod(0)
        with pytest.raises(data.InputError, match=rf"{name}: cannot be read .*\(Permission denied\)"):
            data.read_data(features_folder, "9_3")
            data.read_tensors(features_folder / "x.pt", "a")
        (features_folder / name).chmod(0o644)


# ----------------------------------------------------------------------- data.py: the terminal and its errors
def test_the_command_line_catches_two_exceptions(capsys):
    def command(error=None):
        if error:
            raise error

    assert data.command_line(command) is None
    for error, status, line in ((data.InputError("a\nb"), 2, "error: a b\n"),
                                (KeyboardInterrupt(), 130, "interrupted; ")):
        printed = one_line_of(lambda: data.command_line(lambda: command(error)), capsys, status)
        assert printed.startswith(line)
    for error in (MemoryError(), OSError(28, "No space left"), RuntimeError("a defect"), ValueError("x")):
        with pytest.raises(type(error)) as raised:
            data.command_line(lambda: command(error))
        assert raised.value is error
    data.note("a\nb")
    assert capsys.readouterr().err == "note: a b\n"


# -------------------------------------------------------------------------------------- data.py: splits, text
NEW_SPLITS = """sadvae_1 ntu60 0 8 15 28 46 / sadvae_2 ntu60 15 19 23 47 50 / sadvae_3 ntu60 29 37 38 45 55
 / sadvae_4 ntu120 0 4 6 7 24 37 54 59 97 113 / sadvae_5 ntu120 63 79 86 92 98 100 103 110 111 117
 / sadvae_6 ntu120 9 14 17 44 60 75 81 89 108 110 / sadvae_7 pku51 10 19 27 38 48
 / sadvae_8 pku51 0 9 17 30 42 / sadvae_9 pku51 18 24 31 43 45 / 46_5 pku51 1 9 20 34 50
 / 39_12 pku51 3 7 11 15 19 21 25 31 33 36 43 48 / star_3 pku51 4 12 16 22 36"""


def test_published_splits_are_sound():
    counts = {"ntu60": 60, "ntu120": 120, "pku51": 51}
    for name, (_, dataset, unseen, val) in data.SPLITS.items():
        unseen, val = [int(i) for i in unseen.split()], [int(i) for i in val.split()]
        assert len({*unseen, *val}) == len(unseen) + len(val)
        assert max(unseen + val) < counts[dataset] and len(unseen) > 1
        if name[0].isdigit():
            seen_count, unseen_count = map(int, name.split("_"))
            assert len(unseen) == unseen_count
            assert seen_count + unseen_count == counts[dataset]
            assert len(val) in (0, unseen_count)
    for line in NEW_SPLITS.split(" / "):
        name, dataset, *unseen = line.split()
        source = "STAR" if name in ("46_5", "39_12", "star_3") else "SA-DVAE"
        assert data.SPLITS[name] == (source, dataset, " ".join(unseen), "")
    thirds = [set(data.SPLITS[name][2].split()) for name in ("star_3", "smie_8", "smie_9")]
    assert len(set.union(*thirds)) == 15
    assert len(set(data.TRAIN_SUBJECTS)) == 53 and sum(s <= 40 for s in data.TRAIN_SUBJECTS) == 20


def test_the_list_of_splits(capsys):
    train.main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 29
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    assert list(rows) == list(data.SPLITS)
    assert rows["55_5"] == ["ntu60", "55", "5", "5", "SynSE"]
    assert rows["smie_9"] == ["pku51", "46", "5", "-", "SMIE"]
    assert rows["sadvae_4"] == ["ntu120", "110", "10", "-", "SA-DVAE"]
    assert rows["39_12"] == ["pku51", "39", "12", "-", "STAR"]


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


def test_one_prompt_is_enough(features_folder, tmp_path, capsys):
    for name in ("text_label.npy", "text_description.npy"):               # pooled vectors only
        spoil(name, lambda text: text[:, 0])(features_folder)
    assert [t.shape for t in data.read_data(features_folder, "9_3").text] == [(12, 1, 768)] * 2
    (features_folder / "text_description.npy").unlink()
    spoil("text_label.npy", lambda text: text[:, :16])(features_folder)
    d = data.read_data(features_folder, "9_3")
    np.testing.assert_array_equal(d.text, [np.load(features_folder / "text_label.npy")[:, None]])
    result, _ = run_main(features_folder, tmp_path / "run")
    line = "the text has one prompt a class, so the SDE has nothing to mix"
    assert result["notes"] == [line] and f"note: {line}\n" in capsys.readouterr().err


def test_named_text_must_fit(features_folder, tmp_path):
    a, b, c = (tmp_path / f"{name}.npy" for name in "abc")
    for path, shape in ((a, (12, 8)), (b, (12, 9)), (c, (11, 8))):
        np.save(path, np.random.default_rng(0).normal(size=shape))
    assert [t.shape for t in data.read_data(features_folder, "9_3", [a, a]).text] == [(12, 1, 8)] * 2
    for files, message in (([a, b], "b.npy: width 9 differs from the 8 of"), ([c], "text for 11 classes")):
        with pytest.raises(data.InputError, match=message):
            data.read_data(features_folder, "9_3", files)


# ----------------------------------------------------------------------------------- data.py: dataset folders
def test_split_of_a_folder(small_folder):
    d = data.read_data(small_folder, "9_3")
    assert d.unseen.tolist() == [1, 5, 8]
    assert d.seen.tolist() == [0, 2, 3, 4, 6, 7, 9, 10, 11]
    unseen, tests = (np.isin(np.load(small_folder / f"{name}.npy"), values)
                     for name, values in (("labels", (1, 5, 8)), ("subjects", (2, 4))))
    for rows, expected in ((d.train, ~unseen & ~tests), (d.seen_test, ~unseen & tests),
                           (d.unseen_test, unseen & tests)):
        assert rows.tolist() == np.flatnonzero(expected).tolist()
    val = data.validation(d)
    assert val.unseen.tolist() == d.val.tolist() == [2, 3]
    assert val.seen.tolist() == [0, 4, 6, 7, 9, 10, 11]
    rows = np.concatenate([val.train, val.seen_test, val.unseen_test])
    assert sorted(rows) == d.train.tolist()                               # only training samples, each once
    assert set(d.labels[val.unseen_test]) == {2, 3}
    assert not {2, 3} & {*d.labels[val.train], *d.labels[val.seen_test]}
    assert len(val.seen_test) < len(val.train) / 2
    # none named: as many as unseen ones, of the seen
    drawn, again = (data.read_data(small_folder, "10_2") for _ in range(2))
    assert len(drawn.val) == 2 and set(drawn.val) <= set(drawn.seen)
    assert again.val.tolist() == drawn.val.tolist()


def test_seen_classes_and_training_rows_may_be_named(features_folder):
    splits = {"val": {"unseen": [2, 3], "seen": [0, 4, 6], "test_subjects": [2]}, "rows": {"unseen": [2, 3]}}
    write("splits.json", json.dumps(splits))(features_folder)
    d = data.read_data(features_folder, "val")
    assert set(d.labels[d.train]) == set(d.labels[d.seen_test]) == {0, 4, 6}
    assert set(d.labels[d.unseen_test]) == {2, 3}
    remove("subjects.npy")(features_folder)
    training = np.arange(96) % 3 > 0
    save("training.npy", training)(features_folder)
    d = data.read_data(features_folder, "rows")
    unseen = np.isin(d.labels, [2, 3])
    assert d.train.tolist() == np.flatnonzero(training & ~unseen).tolist()
    assert d.unseen_test.tolist() == np.flatnonzero(~training & unseen).tolist()


@pytest.mark.parametrize("option", ["--gzsl", "--validate"])
def test_one_validation_class_is_too_few_to_choose_by(option, features_folder, tmp_path, capsys):
    split_file(val=[2])(features_folder)
    assert data.read_data(features_folder, "9_3").val.tolist() == [2]     # no harm where nothing is chosen
    out = tmp_path / "out" / "run"
    line = one_line_of(lambda: run_main(features_folder, out, option, method="ridge"), capsys)
    assert "mine: split '9_3' has the validation classes [2]; too few to choose by" in line
    assert not (tmp_path / "out").exists()


def test_an_ntu_folder_takes_bundled_text_splits_and_subjects(tmp_path):
    arrays = {"features": np.random.default_rng(0).random((120, 256), dtype=np.float32),
              "labels": np.repeat(np.arange(60), 2), "subjects": np.tile([1, 3], 60)}     # 1 trains, 3 tests
    for name, array in arrays.items():
        save(f"{name}.npy", array)(tmp_path)
    write("classes.txt", "\n".join(data.bundled_classes("ntu60")))(tmp_path)
    d = data.read_data(tmp_path, "55_5")
    assert d.name == d.preset == "ntu60" and d.unseen.tolist() == [10, 11, 19, 26, 56]
    assert len(d.train) == 55 and len(d.seen_test) == 55 and len(d.unseen_test) == 5
    np.testing.assert_array_equal(d.text[1], data.bundled_text("ntu120")[1][:60])
    with pytest.raises(data.InputError, match="unknown split '110_10' for ntu60; choose one of: 55_5, 48_12"):
        data.read_data(tmp_path, "110_10")


def test_presets_follow_the_classes_not_the_folder(features_folder, tmp_path):
    args = train.run_arguments(["--method", "dvta", "--split", "9_3"])
    for name in ("ntu60", "synthetic"):
        features_folder = features_folder.rename(tmp_path / name)
        settings = train.choose_settings(args, data.read_data(features_folder, "9_3"))
        assert settings["dvta"] == train.DVTA_SMALL and settings["encoder"] == train.ENCODER


# ------------------------------------------------------- data.py: published folders of skeletons and features
FEATURES = data.FEATURES_FORMAT
UNSEEN = [10, 11, 19, 26, 56]                                             # of the split 55_5


def write_published(folder, kind=FEATURES, width=256, unseen=UNSEEN, without=(), classes=60, seed=0):
    """A published folder: three training samples a seen class, three test samples a class.

    without: classes that neither the encoder nor its folder knows.
    """
    rng = np.random.default_rng(seed)
    known = np.setdiff1d(range(classes), without)
    labels_of_parts = np.repeat(np.setdiff1d(known, unseen), 3), np.repeat(unseen, 3), np.repeat(known, 3)
    folder.mkdir()
    for (x_name, y_name), labels in zip(data.PUBLISHED[kind], labels_of_parts):
        x = rng.normal(size=(len(labels), width)).astype(np.float32)
        if kind != FEATURES:                                              # of standing bodies
            x = bodies(len(labels), zsar.NTU25).repeat(2, -1)
        np.save(folder / f"{x_name}.npy", x)
        np.save(folder / f"{y_name}.npy", labels)
    return folder


def as_npz(folder, path):
    """The arrays of a published features folder as Flora's .npz."""
    theirs = [name for pair in data.FLORA for name in pair]
    ours = [name for pair in data.PUBLISHED[FEATURES] for name in pair]
    np.savez(path, **{a: np.load(folder / f"{b}.npy") for a, b in zip(theirs, ours)})
    return path


def assert_same_data(a, b):
    for name in ("features", "labels", "train", "seen_test", "unseen_test", "seen", "unseen", "val"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    for name in ("name", "preset", "source", "split", "classes"):
        assert getattr(a, name) == getattr(b, name)
    assert all(np.array_equal(s, t) for s, t in zip(a.text, b.text, strict=True))


@pytest.mark.parametrize("kind", data.PUBLISHED)
def test_a_published_folder_runs(kind, tmp_path, capsys):
    folder = write_published(tmp_path / "data", kind)
    result, _ = run_main(folder, tmp_path / "run", "--encoder-epochs", 1, method="ridge", split="55_5")
    printed = capsys.readouterr().out
    assert f"ntu60 ({kind}), split 55_5: 55 seen and 5 unseen" in printed
    assert "samples: 165 training, 165 seen test, 15 unseen" in printed
    assert result["source"] == kind and result["dataset"] == "ntu60" and result["zsl"]["n"] == 15
    d = data.read_data(folder, "55_5")
    assert len(d.train) == len(d.seen_test) == 165 and d.val.tolist() == [16, 21, 25, 31, 48]
    assert d.text[0].shape == (60, 15, 768)
    (train_name, _), (_, unseen_labels), seen_test = data.PUBLISHED[kind]
    for name in seen_test:
        remove(f"{name}.npy")(folder)
    assert len(data.read_data(folder, "55_5").seen_test) == 0
    message = r"its classes .* do not fit split smie_1, whose unseen ones are \[4, 19, 31, 47, 51\]"
    with pytest.raises(data.InputError, match=message):
        data.read_data(folder, "smie_1")
    if kind != FEATURES:
        spoil(f"{train_name}.npy", lambda x: 1000 * x)(folder)
        with pytest.raises(data.InputError, match="data: .*are these millimetres"):
            data.read_data(folder, "55_5")
    spoil(f"{unseen_labels}.npy", with_value(slice(0, 3), 11))(folder)
    message = r"its classes \[11, 19, 26, 56\] do not fit split 55_5, .*\[10, 11, 19, 26, 56\]"
    with pytest.raises(data.InputError, match=message):
        data.read_data(folder, "55_5")


def test_the_labels_say_a_split_that_nobody_published(tmp_path):
    folder = write_published(tmp_path / "SHIFT_NTU60_mine", unseen=[1, 2, 3])
    d = data.read_data(folder, "whatever")
    assert (d.name, d.preset, d.split) == ("ntu60", "ntu60", "whatever")
    assert d.unseen.tolist() == [1, 2, 3] and d.seen.tolist() == [0, *range(4, 60)]
    assert (len(d.train), len(d.seen_test), len(d.unseen_test)) == (171, 171, 9)
    assert len(d.val) == 3 and set(d.val) <= set(d.seen)
    for name, classes, dataset in (("ntu120_x", 120, "ntu120"), ("my_pku_r", 51, "pku51")):
        d = data.read_data(write_published(tmp_path / name, unseen=[1, 2], classes=classes), "x")
        assert d.name == dataset and d.classes == data.bundled_classes(dataset)
    anonymous, mine = folder.rename(tmp_path / "mine"), tmp_path / "mine.npy"
    np.save(mine, np.random.default_rng(0).normal(size=(60, 20)))

    def refused(message, *text):
        with pytest.raises(data.InputError, match=message):
            data.read_data(anonymous, "whatever", text)

    refused("mine: is of an unknown dataset; choose a published --split")
    write("classes.txt", "\n".join(f"move {i}" for i in range(60)))(anonymous)
    refused("text_label.npy: no such file; embed classes.txt")
    d = data.read_data(anonymous, "whatever", [mine])
    assert (d.name, d.preset, d.classes[7]) == ("mine", "other", "move 7")
    assert [t.shape for t in d.text] == [(60, 1, 20)] and d.unseen.tolist() == [1, 2, 3]
    spoil("train_label.npy", with_value(0, 3))(anonymous)                 # an unseen class in training
    refused(r"mine: .*classes \[1, 2, 3\], of which .* have \[3\]; there", mine)


def test_floras_npz_is_the_same_data_as_the_folder(tmp_path):
    folder = write_published(tmp_path / "data")
    path = as_npz(folder, tmp_path / "flora.npz")
    assert_same_data(data.read_data(path, "55_5"), data.read_data(folder, "55_5"))
    run_main(path, tmp_path / "run", method="ridge", split="55_5")
    with np.load(path) as archive:
        arrays = dict(archive)
    np.savez(tmp_path / "ntu60.npz", **{k: a for k, a in arrays.items() if not k.startswith("gzsl")})
    assert len(data.read_data(tmp_path / "ntu60.npz", "x").seen_test) == 0
    del arrays["zsl_label"]
    for damage, name in ((lambda: np.savez(path, **arrays), "zsl_label"),
                         (lambda: path.write_bytes(b"PK"), "train_data")):
        damage()
        with pytest.raises(data.InputError, match=f"flora.npz/{name}: cannot be read"):
            data.read_data(path, "55_5")


def test_published_features_in_other_shapes_and_under_other_names(tmp_path):
    folder = write_published(tmp_path / "data")
    before = data.read_data(folder, "55_5")
    for name in ("train", "ztest", "gtest"):
        spoil(f"{name}.npy", lambda x: x[:, :, None, None])(folder)
    spoil("train_label.npy", lambda y: y[:, None])(folder)
    (folder / "ztest.npy").rename(folder / "test.npy")                    # as DVTA's folders have it
    (folder / "z_label.npy").rename(folder / "test_label.npy")
    assert_same_data(data.read_data(folder, "55_5"), before)
    spoil("test.npy", lambda x: x[:, :100])(folder)
    with pytest.raises(data.InputError, match=r"test.npy: shape is \(15, 100\), that of the training"):
        data.read_data(folder, "55_5")


@pytest.mark.parametrize("method", ["dvta", "tdsm", "ridge"])
def test_features_of_another_width_go_all_the_way_through(method, tmp_path, capsys):
    folder, run = write_published(tmp_path / "data", width=384), tmp_path / "run"
    np.save(folder / "text_label.npy", np.random.default_rng(0).normal(size=(60, 3, 16)))
    result, weights = run_main(folder, run, method=method, split="55_5")
    assert result["zsl"]["n"] == 15 and len(weights["x_mean"]) == 384
    rows = predictions_of(run, folder / "ztest.npy")                      # N rows, among all 60 classes
    assert [row[0] for row in rows] == [f"row {n}" for n in range(15)]
    assert {row[1] for row in rows} <= set(data.bundled_classes("ntu60"))
    np.save(tmp_path / "narrow.npy", np.ones((2, 256), np.float32))
    capsys.readouterr()
    line = one_line_of(lambda: predictions_of(run, tmp_path / "narrow.npy"), capsys)
    assert "narrow.npy: has features of width 256; this run takes features of width 384" in line


def test_text_beside_published_features_and_named_text(tmp_path):
    folder, mine = write_published(tmp_path / "data"), tmp_path / "mine.npy"
    label, description = np.random.default_rng(1).normal(size=(2, 60, 32)).astype(np.float32)
    np.save(folder / "ntu60_embeddings.npy", label)
    np.save(folder / "ntu60_cont_embeddings.npy", description)
    d = data.read_data(folder, "55_5")
    assert d.notes == [] and np.array_equal([t[:, 0] for t in d.text], [label, description])
    np.save(folder / "ntu60_des_embeddings.npy", 2 * description + label)
    np.save(mine, label[:, :20])
    d = data.read_data(folder, "55_5")
    assert d.notes == [f"{folder}: ntu60_cont_embeddings.npy not used; --text chooses text features"]
    assert np.array_equal([t[:, 0] for t in d.text], [label, 2 * description + label])
    for method, layer, width in (("dvta", "sde.fc", 32), ("tdsm", "denoiser.text_in", 2 * 32)):
        for options, expected in (([], width), (["--text", mine], 20)):
            result, weights = run_main(folder, tmp_path / "run", *options, method=method, split="55_5")
            assert weights[f"{layer}.weight"].shape[1] == expected
            assert all(str(option) in result["command"] for option in options)
    pku = write_published(tmp_path / "pku", unseen=[1, 9, 20, 34, 50], classes=51)
    np.save(pku / "pku_embeddings.npy", label[:51])
    for split in ("46_5", "smie_7"):                                      # the same classes
        text = data.read_data(pku, split).text
        assert len(text) == 1 and np.array_equal(text[0][:, 0], label[:51])
    np.save(pku / "pku_des_embeddings.npy", description[:51])
    d = data.read_data(pku, "46_5")
    assert d.name == "pku51" and np.array_equal([t[:, 0] for t in d.text], [label[:51], description[:51]])
    spoil("pku_des_embeddings.npy", lambda t: t[:50])(pku)
    with pytest.raises(data.InputError, match="pku_des_embeddings.npy: has text for 50 classes, the dataset"):
        data.read_data(pku, "46_5")


def validation_folder(path, **changes):
    """The validation folder beside write_published's: its encoder has seen no validation class."""
    return write_published(path, **{"unseen": [16, 21, 25, 31, 48], "without": UNSEEN, "seed": 5} | changes)


def test_gamma_on_ready_features_comes_from_the_validation_folder(tmp_path, capsys):
    folder, val = write_published(tmp_path / "data"), validation_folder(tmp_path / "val")
    gammas, note = [], f"note: {train.VALIDATION_NOTE}\n"
    for options in ([], ["--val-data", val], ["--val-data", as_npz(val, tmp_path / "val.npz")]):
        result, _ = run_main(folder, tmp_path / "run", "--gzsl", *options, method="ridge", split="55_5")
        assert result["notes"] == ([] if options else [train.VALIDATION_NOTE])
        assert (note in capsys.readouterr().err) == (not options)
        gammas.append(result["gzsl"]["gamma"])
    d = data.read_data(folder, "55_5")
    task = data.validation(d, val)
    np.testing.assert_array_equal(task.features[task.unseen_test], np.load(val / "ztest.npy"))
    np.testing.assert_array_equal(task.features[task.train], np.load(val / "train.npy"))
    assert task.unseen.tolist() == [16, 21, 25, 31, 48]
    assert task.seen.tolist() == sorted({*range(60)} - {*task.unseen} - {*UNSEEN})
    assert len(task.seen_test) == 150 and not np.isin(task.labels, UNSEEN).any()
    x, y, text = torch.tensor(task.features), torch.tensor(task.labels), [torch.tensor(t) for t in d.text]
    model = train.build("ridge", text, train.RIDGE, torch.tensor(task.seen), x[task.train])
    model.fit(x[task.train], y[task.train])
    expected = zsar.best_gamma(*train.among_all_classes(model, x, task))
    assert gammas[1] == gammas[2] == pytest.approx(expected) != pytest.approx(gammas[0])
    for options, num_train in (([], 121), (["--val-data", val], 150)):
        result, _ = run_main(folder, tmp_path / "run", "--validate", *options, method="ridge", split="55_5")
        assert result["unseen"] == [16, 21, 25, 31, 48] and result["zsl"]["n"] == 15
        assert result["samples"]["train"] == num_train
        assert result["notes"] == ([] if options else [train.VALIDATION_NOTE])
        assert "50 seen and 5 validation classes" in capsys.readouterr().out


BAD_VALIDATION = {  # what is wrong: (how to change the validation folder, what the one line must say)
    "an unseen class": ({"without": UNSEEN[1:]}, "the unseen classes [10]; it must be the validation folder"),
    "the test folder": ({"unseen": UNSEEN, "without": ()}, f"the unseen classes {UNSEEN}; it must be"),
    "another width": ({"width": 384}, "val: has width 384 and"),
    "one class": ({"unseen": [16]}, "have the classes [16]"),
    "skeletons": ({"kind": data.SKELETONS_FORMAT}, "val: has no known format; looked for train.npy"),
    "no seen test samples": ({}, "seen test samples"),
}


@pytest.mark.parametrize("case", BAD_VALIDATION)
def test_bad_validation_folders_are_refused(case, tmp_path, capsys):
    changes, message = BAD_VALIDATION[case]
    folder, val = write_published(tmp_path / "data"), validation_folder(tmp_path / "val", **changes)
    if case == "no seen test samples":
        (val / "gtest.npy").unlink()
    command = least(folder, tmp_path / "run", "--gzsl", "--val-data", val, method="ridge", split="55_5")
    line = one_line_of(lambda: train.main(command), capsys)
    assert message in line and "val" in line and not (tmp_path / "run").exists()


def test_a_validation_folder_is_for_ready_features(small_folder, tmp_path):
    with pytest.raises(data.InputError, match="it must be the validation folder of features like those"):
        data.validation(data.read_data(small_folder, "9_3"),
                        validation_folder(tmp_path / "val", unseen=[2, 3], without=[1, 5, 8], classes=12))


# ---------------------------------------------------------------------------- data.py: layouts and own joints
def graph_file(graph):
    """→ a function that writes a graph.json."""
    return write("graph.json", json.dumps(graph._asdict()))


def test_the_readmes_graph_of_33_joints_goes_all_the_way_through(features_folder, tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    write("graph.json", re.search(r'\{"edges": \[\[0,.*?\}', readme, re.S)[0])(features_folder)
    graph = data.read_graph(features_folder / "graph.json")               # MediaPipe's
    assert len(graph.edges) == 32 and (graph.root, graph.shoulders) == ((23, 24), (11, 12))
    save_bodies(graph=graph)(features_folder)
    assert data.read_data(features_folder, "9_3").graph == graph
    result, _ = run_main(features_folder, tmp_path / "run", "--encoder-epochs", 1, method="ridge")
    assert result["zsl"]["n"] == 12 and result["encoder"]["seen_test_acc"] is not None
    assert data.read_tensors(tmp_path / "run" / "model.pt", ())["encoder"]["graph"] == tuple(graph)
    shutil.copy(features_folder / "skeletons.npy", tmp_path / "new.npy")
    assert len(predictions_of(tmp_path / "run", tmp_path / "new.npy")) == 96      # with the graph in model.pt
    (features_folder / "graph.json").unlink()
    with pytest.raises(data.InputError, match="skeletons.npy: has 33 joints; give a graph.json, .* 25, 20,"):
        data.read_data(features_folder, "9_3")


@pytest.mark.parametrize("num_joints", [20, 17, 18])
def test_other_skeletons_go_all_the_way_through(features_folder, num_joints, tmp_path):
    save_bodies(graph=zsar.GRAPHS[num_joints])(features_folder)
    result, _ = run_main(features_folder, tmp_path / "run", "--encoder-epochs", 1, method="ridge")
    assert result["zsl"]["n"] == 12 and result["encoder"]["seen_test_acc"] is not None
    assert len(predictions_of(tmp_path / "run", features_folder)) == 96


BODY25 = np.array([1.6, 1.5, 1.5, 1.2, 1, 1.5, 1.2, 1, 1, 1, 0.5, 0.1, 1, 0.5, 0.1, *[1.7] * 4, *[0] * 6])


HUMAN36M = np.array([1, 1, 0.5, 0.1, 1, 0.5, 0.1, 1.2, 1.5, 1.6, 1.7, 1.5, 1.2, 1, 1.5, 1.2, 1])


def standing(x, height):
    """Skeletons of the first joints at these heights."""
    x = x[:, :, :, :len(height)].copy()
    x[:, 1] = height[:, None]
    return x


def test_a_folders_graph_outranks_the_built_in_one(features_folder, tmp_path):
    """BODY_25: standing in its own order, upside down in Kinect's. Another graph is another encoder."""
    pairs = ("0-1 2-1 3-2 4-3 5-1 6-5 7-6 8-1 9-8 10-9 11-10 12-8 13-12 14-13 22-11 23-22 24-11 19-14 20-19 "
             "21-14 15-0 16-0 17-15 18-16")
    edges = tuple(tuple(map(int, pair.split("-"))) for pair in pairs.split())
    graph, features = zsar.JointGraph(edges, 1, (8,), (5, 2)), []
    save_bodies(lambda x: standing(x, BODY25))(features_folder)
    with pytest.raises(data.InputError, match="mine: bodies do not stand, .* -?[0-9.]+ torso"):
        data.read_data(features_folder, "9_3")
    graph_file(graph)(features_folder)
    assert data.read_data(features_folder, "9_3").graph == graph
    for centre in (1, 8):                                                 # hops are counted from it
        graph_file(graph._replace(centre=centre))(features_folder)
        result, _ = run_main(features_folder, tmp_path / "run", "--encoder-epochs", 1, method="ridge")
        features.append(data.read_tensors(result["encoder"]["file"], ())["features"])
        assert not result["encoder"]["cached"]
    assert not torch.equal(*features)


BAD_GRAPHS = {  # what is wrong: (changes to the graph of NTU's joints, what the error must say)
    "two parts": ({"edges": [*zsar.NTU25.edges[:-1], [23, 24]]}, "joint 23 is not in the tree; 24 edges"),
    "an edge twice": ({"edges": [[1, 20], *zsar.NTU25.edges[1:]]}, "joint 0 is not in the tree"),
    "too few edges": ({"edges": zsar.NTU25.edges[:-1]}, "joint 23 is not in the tree; 23 edges must"),
    "a negative joint": ({"edges": [*zsar.NTU25.edges[:-1], [-1, 11]]}, "joint -1 is not in the tree"),
    "no such centre": ({"centre": 25}, "joint 0 is not in the tree; 24 edges must join the joints 0 to 24"),
    "no such shoulder": ({"shoulders": [4, 77]}, "joint 77 is not in the tree"),
    "one shoulder": ({"shoulders": [4]}, 'must be {"edges": [[child, parent], ...]'),
    "a number as root": ({"root": 0}, 'must be {"edges"'),
    "other skeletons": ({"edges": zsar.KINECT20.edges, "centre": 2}, "has 25 joints, graph.json joins 20"),
}


@pytest.mark.parametrize("case", BAD_GRAPHS)
def test_bad_graphs_name_the_joint(case, features_folder):
    changes, message = BAD_GRAPHS[case]
    save_bodies()(features_folder)
    value = zsar.NTU25._asdict() | changes
    write("graph.json", json.dumps(value))(features_folder)
    where = "skeletons.npy" if case == "other skeletons" else "graph.json"
    with pytest.raises(data.InputError, match=re.escape(f"{features_folder / where}: ")) as error:
        data.read_data(features_folder, "9_3")
    assert message in str(error.value)


NOT_STANDING = {  # what is wrong: how standing people come out of it
    "y down": lambda x: x * np.array([1, -1, 1])[:, None, None, None],
    "z up": lambda x: x[:, [0, 2, 1]],
    "joints and time exchanged": lambda x: np.tile(x, (1, 1, 2, 1, 1))[:, :, :25].swapaxes(2, 3),
    "Human3.6M as COCO": lambda x: standing(x, HUMAN36M),
}


@pytest.mark.parametrize("case", NOT_STANDING)
def test_bodies_that_do_not_stand_are_refused(case, features_folder, small_folder):
    remove("features.npy")(features_folder)
    save("skeletons.npy", NOT_STANDING[case](np.load(small_folder / "skeletons.npy")))(features_folder)
    with pytest.raises(data.InputError) as error:
        data.read_data(features_folder, "9_3")
    for part in (f"{features_folder}: bodies do not stand, their shoulders are", "--allow-lying",
                 "another joint layout, y down, z up, or are axes exchanged?",
                 f"python docs/plot.py --data {features_folder} --row 0"):
        assert part in str(error.value)
    assert len(data.read_data(features_folder, "9_3", lying=True).train) == 36


def test_lying_people_are_allowed_on_request(features_folder, small_folder, tmp_path, capsys):
    upright = np.load(small_folder / "skeletons.npy")
    lying, run = upright[:, [1, 0, 2]], tmp_path / "run"
    np.save(features_folder / "skeletons.npy", lying)
    (features_folder / "features.npy").unlink()
    line = one_line_of(lambda: run_main(features_folder, run, method="ridge"), capsys)
    assert "bodies do not stand" in line and not run.exists()
    options = "--allow-lying", "--encoder-epochs", 1
    result, _ = run_main(features_folder, run, *options, method="ridge")
    assert result["zsl"]["n"] == 12 and result["notes"] == []
    capsys.readouterr()
    assert "do not stand" in one_line_of(lambda: predictions_of(run, features_folder), capsys)
    assert len(predictions_of(run, features_folder, "--allow-lying")) == 96
    np.save(features_folder / "skeletons.npy", np.concatenate([lying[:40], upright[40:]]))
    assert data.read_data(features_folder, "9_3").notes == []             # the median stands


# --------------------------------------------------------------------------------------- data.py: bad folders


def start_token(text):
    """As raw CLIP output: row 0 is that of the start token, the same for all."""
    text[:, 0] = text[0, 0]
    return text


UNREADABLE = "cannot be read as a .npy array"
SPLIT = "splits.json: split '9_3'"
BAD_INPUT = {  # what is wrong: (how to spoil the folder, what the one line must name)
    "no folder": (shutil.rmtree, ["mine: cannot be read (No such file or directory); give a dataset"]),
    "no format": (remove("features.npy"),
                  ["mine: has no known format; looked for skeletons.npy (", "features.npy (", "train.npy (",
                   "seen_train_data.npy (SMIE", "python data.py"]),
    "two formats": (save("train.npy", np.zeros(1)),
                    ["mine: holds two formats, dataset folder with features and SynSE"]),
    "no labels": (remove("labels.npy"), [f"labels.npy: {UNREADABLE} (No such file"]),
    "no text": (lambda f: [remove(f"text_{name}.npy")(f) for name in ("label", "description")],
                ["text_label.npy: no such file; embed classes.txt with text/embed.py"]),
    "no classes": (remove("classes.txt"), ["classes.txt: cannot be read (No such file"]),
    "no splits": (remove("splits.json"), ["splits.json: cannot be read as JSON (No such file"]),
    "empty file": (write("features.npy", ""), [f"features.npy: {UNREADABLE} (EOF"]),
    "pickled labels": (save("labels.npy", np.array([{}] * 96, dtype=object)),
                       [f"labels.npy: {UNREADABLE} (Array can't be memory-mapped: Python objects"]),
    "a bare pickle": (write("labels.npy", b"\x80\x04]\x94."), [f"labels.npy: {UNREADABLE} (EOF"]),
    "truncated array": (lambda f: os.truncate(f / "features.npy", 5000),
                        [f"features.npy: {UNREADABLE} (mmap"]),
    "no rows": (save("features.npy", np.zeros((0, 256))), ["features.npy: shape is (0, 256), must be"]),
    "feature shape": (spoil("features.npy", lambda a: a[:, 0]),
                      ["features.npy: shape is (96,), must be (N, 3, T, V, M) or (N, F) or (N, F, 1, 1)"]),
    "feature dtype": (spoil("features.npy", lambda a: a.astype(int)),
                      ["features.npy: dtype is int64, must be float; convert"]),
    "label dtype": (spoil("labels.npy", lambda a: a.astype(float)),
                    ["labels.npy: dtype is float64, must be int"]),
    "label count": (spoil("labels.npy", lambda a: a[:-1]), ["labels.npy: shape is (95,), must be (96,)"]),
    "skeleton shape": (save_bodies(lambda x: x[:, 0]),
                       ["skeletons.npy: shape is (96, 4, 25, 1), must be (N, 3, T, V, M)"]),
    "unknown joints": (save_bodies(lambda x: x[:, :, :, :24]),
                       ["skeletons.npy: has 24 joints; give a graph.json", "25, 20, 17, 18"]),
    "NaN": (save_bodies(with_value((95, 2, 3, 24, 0), np.nan)),
            ["skeletons.npy: nan in row 95 is not a finite"]),
    "too large for float32": (spoil("features.npy", lambda a: with_value((7, 3), 1e300)(a.astype(float))),
                              ["features.npy: 1e+300 in row 7 is not a finite float32; correct or drop"]),
    "minus infinity in text": (spoil("text_description.npy", with_value((2, 1, 0), -np.inf)),
                               ["text_description.npy: -inf in row 2"]),
    "farther than 100 m": (save_bodies(with_value((95, 2, 3, 24, 0), -101)),
                           ["mine: coordinates reach 101 in row 95, more than 100 m; are these millimetres"]),
    "nobody at all": (save_bodies(lambda x: 0 * x), ["mine: no sequence has a body"]),
    "decimetres": (save_bodies(lambda x: 10 * x), ["mine: the median torso", "5 m long, must be 0.05 to 3"]),
    "too small": (save_bodies(lambda x: 0.01 * x), ["mine: the median torso", "is 0.005 m long"]),
    "upside down": (save_bodies(lambda x: -x), ["mine: bodies do not stand, their shoulders are -1.00"]),
    "not the first person": (save_bodies(lambda x: np.concatenate([0 * x, x], -1)),
                             ["mine: no sequence has a body; all joints of the first person"]),
    "dead features": (spoil("features.npy", lambda a: a * np.float32(1e-8)),
                      ["mine: all features for training are the same"]),
    "one seen class": (split_file(seen=[0]), ["mine: split '9_3' leaves one class to train on"]),
    "label too high": (spoil("labels.npy", with_value(5, 13)),
                       ["labels.npy: label 13 in row 5", "0 to 11; Labels are 0-based"]),
    "label below 0": (spoil("labels.npy", with_value(5, -1)), ["labels.npy: label -1 in row 5"]),
    "labels from 1": (spoil("labels.npy", lambda a: a + 1),
                      ["labels.npy: label 12 in row 88 is not from 0 to 11; are labels 1-based?"]),
    "text of other classes": (spoil("text_label.npy", lambda a: a[:11]),
                              ["text_label.npy: has text for 11 classes", "the dataset has 12"]),
    "text of other width": (spoil("text_label.npy", lambda a: a[..., :512]),
                            ["text_description.npy: width 768", "512"]),
    "empty text": (spoil("text_label.npy", with_value((4, 0), 0)),
                   ["text_label.npy: the pooled vector of class 4 is zero"]),
    "text shape": (spoil("text_label.npy", lambda a: a[:, 0, 0]), ["text_label.npy: shape is (12,)"]),
    "the same text": (spoil("text_label.npy", lambda a: a[[*range(10), 4, 11]]),
                      ["text_label.npy: classes 4 and 10 (", ") have the same text"]),
    "the start token": (spoil("text_description.npy", start_token),
                        ["text_description.npy: classes 0 and 1 (", "same text in row 0", "start token"]),
    "class name twice": (write("classes.txt", "a\nb\nc\nb\n"), ["classes.txt: names 'b' twice"]),
    "empty class name": (write("classes.txt", "a\n\nb\n"), ["classes.txt: has an empty line; give each"]),
    "class names of Windows": (write("classes.txt", "h\xf6her\nb".encode("cp1252")),
                               ["classes.txt: cannot be read ('utf-8' codec", "save it as UTF-8"]),
    "training dtype": (lambda f: [write("splits.json", '{"9_3": {"unseen": [1, 5]}}')(f),
                                  save("training.npy", np.ones(96, int))(f)],
                       ["training.npy: dtype is int64, must be bool"]),
    "split unknown": (write("splits.json", '{"a": {}, "b": {}}'),
                      ["splits.json: has no split '9_3'", "a, b"]),
    "not JSON": (write("splits.json", '{"9_3": '), ["splits.json: cannot be read as JSON"]),
    "split is a list": (write("splits.json", "[1]"),
                        ["splits.json: cannot be read as JSON (must be an object: {...})"]),
    "split holds a list": (write("splits.json", '{"9_3": [1]}'), [f"{SPLIT}: must be", '"test_subjects"']),
    "class twice": (split_file(unseen=[1, 5, 5]), [f"{SPLIT}: 'unseen' is [1, 5, 5]; list", "once each"]),
    "unseen and val": (split_file(val=[5]), [f"{SPLIT}: class 5 is unseen, and 'val' or 'seen' names it"]),
    "unseen class in training": (split_file(seen=[0, 2, 5]),
                                 [f"{SPLIT}: class 5 is unseen, and 'val' or 'seen' names it"]),
    "class outside": (split_file(unseen=[12]), [f"{SPLIT}: 'unseen' is [12]; list class ids, 0 to 11"]),
    "one unseen class": (split_file(unseen=[3]), [f"{SPLIT}: 'unseen' lists 1 classes"]),
    "unknown key": (split_file(unsen=[3]), [f"{SPLIT}: must be", 'optional keys are "val" and "seen"']),
    "val is not seen": (split_file(seen=[0, 2, 3], val=[4]),
                        [f"{SPLIT}: 'val' names class 4, not in 'seen'; add it"]),
    "no test subjects": (split_file(test_subjects=None), [f"{SPLIT}: 'test_subjects' must list"]),
    "nested test subjects": (split_file(test_subjects=[[2, 4]]), [f"{SPLIT}: 'test_subjects' must list"]),
    "nothing to test": (split_file(test_subjects=[9]), ["mine: split '9_3' leaves no unseen test samples"]),
    "nothing to train on": (split_file(test_subjects=[1, 2, 3, 4]),
                            ["mine: split '9_3' leaves no training samples"]),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_2(case, features_folder, tmp_path, capsys):
    spoiler, fragments = BAD_INPUT[case]
    spoiler(features_folder)
    line = one_line_of(lambda: run_main(features_folder, tmp_path / "out" / "run"), capsys)
    assert line.startswith("error: ") and all(fragment in line for fragment in fragments), line
    assert str(features_folder) in line
    assert not (tmp_path / "out").exists()                                # nothing half-written


ODDITIES = {  # what may be meant: (how to change the folder, the one line)
    "strangers": (split_file(test_subjects=[2, 4, 77]), "tests subjects [77], who have no samples"),
    "an untested class": (spoil("labels.npy", lambda a: np.where(a == 5, 6, a)),
                          "no test samples of unseen classes: "),
    "labels from 1, the last class absent": (
        spoil("labels.npy", lambda a: np.maximum(a, 1)),
        "class 0, Drink water, has no sample, but the last class has; are labels 1-based?"),
    "a confidence": (save_bodies(lambda x: np.stack([x[:, 0], x[:, 1], x[:, 2] % 1], 1)),
                     "the third channel lies within 0 to 1, the others do not; is it a confidence?"),
    "some in decimetres": (save_bodies(lambda x: np.concatenate([x[:90], 10 * x[90:]])),
                           "6 of 96 sequences have a torso outside 0.05 to 3 m"),
    "nobody in two": (save_bodies(with_value([0, 5], 0)), "2 of 96 sequences have no first person"),
}


@pytest.mark.parametrize("case", ODDITIES)
def test_oddities_are_one_note(case, features_folder):
    assert data.read_data(features_folder, "9_3").notes == []
    change, note = ODDITIES[case]
    change(features_folder)
    notes = data.read_data(features_folder, "9_3").notes
    assert len(notes) == 1 and note in notes[0] and str(features_folder) in notes[0]


def test_an_empty_class_0_of_ready_features_is_one_note(tmp_path):
    folder = write_published(tmp_path / "ntu60", without=[0])
    notes = data.read_data(folder, "mine").notes
    assert len(notes) == 1 and "class 0, Drink water, has no sample" in notes[0]
    spoil("train_label.npy", lambda y: y + 1)(folder)                     # 60 is beyond the last id
    with pytest.raises(data.InputError, match=r"train_label.npy: label 60 in row .*are labels 1-based\?"):
        data.read_data(folder, "mine")


def test_sequences_without_a_body_are_not_trained_on(features_folder):
    save_bodies(with_value([0, 2, 8], 0))(features_folder)
    d = data.read_data(features_folder, "9_3")
    for name, values in (("labels", [0, 0, 0]), ("subjects", [1, 1, 2])):
        assert np.load(features_folder / f"{name}.npy")[[0, 1, 2]].tolist() == values
    assert 0 not in d.train and 1 in d.train                              # of a training subject
    assert 2 in d.seen_test                                               # a test sample stays one


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("name", ["features.npy", "splits.json", "graph.json"])
def test_a_folder_on_random_edits(name, features_folder):
    """Fuzz: 100 random edits of a file end in one line, or in data that can be trained on."""
    rng, outcomes, path = np.random.default_rng(0), {"read": 0, "refused": 0}, features_folder / name
    for text in ("text_label.npy", "text_description.npy"):
        spoil(text, lambda text: text[:, 0, :8])(features_folder)
    if name == "graph.json":
        save_bodies()(features_folder)
        graph_file(zsar.NTU25)(features_folder)
    good = path.read_bytes()
    for _ in range(100):
        content, in_header = bytearray(good), name != "features.npy" or rng.random() < 0.5
        start = 0 if in_header else int(rng.integers(len(good) - 200))
        part = content[start:start + 400]                                 # the header is short
        edit_at_random(part, rng)
        content[start:start + 400] = part
        path.write_bytes(content)
        try:
            d = data.read_data(features_folder, "9_3")
            assert d.features is None or np.isfinite(d.features).all()
            assert len(d.train) and len(d.unseen) > 1
            outcomes["read"] += 1
        except data.InputError as e:
            assert "\n" not in str(e) and str(features_folder) in str(e)
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 3, outcomes


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
    for child, parent in enumerate(data._PARENT[1:], start=1):
        length = np.linalg.norm(x[:, :, :, child, 0] - x[:, :, :, parent, 0], axis=1)     # (N, T)
        assert length.std(1).max() < 0.03                                 # only sensor noise, 0.5 to 1.5 cm


def test_the_default_synthetic_set():
    d = data.read_data("synthetic", "55_5")
    assert d.source == "synthetic set" and d.notes == []
    assert d.skeletons.shape == (2160, 3, 32, 25, 1)
    assert len(d.classes) == 60
    assert len(d.train) == len(d.seen_test) == 990
    assert len(d.unseen_test) == 90 and d.val.tolist() == [16, 21, 25, 31, 48]


# ---------------------------------------------------------------------------------------------- text/embed.py
def test_embed_script_on_a_wrong_command(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for arguments, message in ((["M", "a.txt", "a.npy"], "pip install transformers"), (["M"], "usage: ")):
        monkeypatch.setattr(sys, "argv", ["embed.py", *arguments])
        line = one_line_of(lambda: runpy.run_path(str(ROOT / "text/embed.py"), run_name="__main__"), capsys)
        assert message in line


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
    with seeded(0):
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
    for name in ("text_encoder", "tokenizer"):                            # a folder of diffusers
        shutil.copytree(tmp_path / "model", tmp_path / "sd" / name)
    (tmp_path / "short.txt").write_bytes(b"\xef\xbb\xbfd\ne\n")
    done = script("text/embed.py", tmp_path / "sd", "short.txt", "short.npy", "--rows", 35, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    short = np.load(tmp_path / "short.npy").astype(np.float32)
    assert short.shape == (2, 1 + 35, 16)
    np.testing.assert_allclose(short[0], text[1], atol=5e-3)


# ------------------------------------------------------------------------------ data.py: downloaded skeletons
NAMES = ["S001C001P001R001A001", "S001C002P003R001A013", "S002C003P001R002A060", "S003C001P009R002A002",
         "S003C002P002R001A007"]
ROWS = [(0, True, 1, 1, 1), (12, False, 3, 2, 1), (59, True, 1, 3, 2), (1, True, 9, 1, 3), (6, True, 2, 2, 3)]


def recordings():
    """Five recordings of 20 frames, (3, 20, 25, 1 or 2); the second holds two persons, the mover second."""
    x = [person(20, 0.1, seed=i)[..., None] for i in range(5)]
    mover = person(20, 0.4, seed=9)[..., None] + np.array([1, 0, 0])[:, None, None, None]
    return [x[0], np.concatenate([x[1], mover], -1), *x[2:]]


@pytest.fixture
def raw_ntu(tmp_path):
    """The recordings as .skeleton files, the first in a folder within."""
    folder = tmp_path / "raw"
    (folder / "nested").mkdir(parents=True)
    for i, (name, x) in enumerate(zip(NAMES, recordings())):
        write_skeleton((folder / "nested" if i == 0 else folder) / f"{name}.skeleton", x)
    return folder


def skipped_in(out):
    """The lines of skipped.csv as [file, reason]."""
    lines = (out / "skipped.csv").read_text().splitlines()
    return [line.split(",", 1) for line in lines[1:]]


def track(frames, seed=0, motion=0.1, wide=1.0):
    """A track of these of 100 frames: a person of that seed, made `wide` times as wide."""
    xyz = person(100, motion, seed).transpose(1, 2, 0)[list(frames)] * [wide, 1, 1]
    return list(frames), xyz


def sprawling(start, stop):
    """A track of 60 frames, in some of them very wide; it hardly moves otherwise."""
    frames, xyz = track(range(60), 2, motion=0.01)
    xyz[start:stop, :, 0] *= 20
    return frames, xyz


ALL = range(60)
LATE = track(range(20, 60), 1, motion=0.6)
MOVER, STILL = track(ALL, 1, motion=0.6), track(ALL, 1, motion=0.3)
ACTOR, OTHER = track(ALL), track(ALL, 2)
CHAIR, GHOST = track(ALL, 5, motion=2, wide=9), track(range(10, 21), 4, motion=3)
TRACKS = {  # what the tracker saw: (its tracks, the main actor's frames, the second actor's)
    "an id that changes once": ([track(range(30)), track(range(30, 60))], ACTOR, None),
    "twice": ([track(range(20)), track(range(20, 40)), track(range(40, 60))], ACTOR, None),
    "with a gap": ([track(range(30)), track(range(35, 60))], track([*range(30), *range(35, 60)]), None),
    "in another order": ([track(range(20, 40)), track(range(20)), track(range(40, 60))], ACTOR, None),
    "lost, then the old id": ([track([*range(20), *range(40, 60)]), track(range(20, 40))], ACTOR, None),
    "one of two changes": ([track(range(25), 2), MOVER, track(range(25, 60), 2)], MOVER, OTHER),
    "a third person": ([track(range(25), 2), MOVER, track(range(25, 60), 2), track(ALL, 3, motion=0.01)],
                       MOVER, OTHER),
    "a chair": ([CHAIR, ACTOR], ACTOR, None),
    "11 frames": ([GHOST, ACTOR], ACTOR, None),
    "a chair and 11 frames": ([CHAIR, track(range(10, 21), 4), ACTOR], ACTOR, None),
    "12 frames are a person": ([track(range(10, 22), 4), ACTOR], ACTOR, track(range(10, 22), 4)),
    "the only one": ([track(range(10, 15))], track(range(10, 15)), None),
    "all are wide": ([CHAIR, track(ALL, 6, motion=0.01, wide=9)], CHAIR, None),
    "partly wide: motion counts elsewhere": ([sprawling(0, 30), STILL], STILL, sprawling(0, 30)),
    "wide in 75 % of the frames": ([sprawling(0, 45), STILL], STILL, None),
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
    if case.startswith("partly wide"):                                    # over all frames it moves the most
        assert np.var(tracks[0][1], (0, 1)).sum() > np.var(STILL[1], (0, 1)).sum()


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
    spawn = "import multiprocessing\nmultiprocessing.set_start_method('spawn', force=True)\n"
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "sitecustomize.py").write_text(spawn)
    (raw_ntu / "S001C001P001R001A002.skeleton").write_text("")
    for name in ("S001C001P001R001A003", "S001C001P001R001A004"):
        shutil.copy(raw_ntu / f"{NAMES[2]}.skeleton", raw_ntu / f"{name}.skeleton")
    (raw_ntu / "notes.txt").write_text("x")
    missing, out = tmp_path / "start" / "missing.txt", tmp_path / "out"
    missing.write_text("S001C001P001R001A003\nS001C001P001R001A004.skeleton\nS099C001P001R001A001\n")
    command = [sys.executable, ROOT / "data.py", raw_ntu, "out", "--frames", "20", "--exclude", missing]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path,
                          env=os.environ | {"PYTHONPATH": str(tmp_path / "start")})
    assert done.returncode == 0, done.stderr
    assert "5 samples, 1 skipped" in done.stdout
    assert done.stderr == f"note: {raw_ntu}: 1 other files are not read\n"
    assert {p.name for p in out.iterdir()} == {
        "cameras.npy", "classes.txt", "labels.npy", "setups.npy", "skeletons.npy", "skipped.csv",
        "subjects.npy", "training.npy"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "raw", "start"]
    x = np.load(out / "skeletons.npy", mmap_mode="r")
    assert isinstance(x, np.memmap) and x.shape == (5, 3, 20, 25, 2) and x.dtype == np.float32
    expected = recordings()
    for n, row in enumerate(x):
        np.testing.assert_allclose(row[..., 0], expected[n][..., -1], rtol=1e-6)    # the mover is the first
    np.testing.assert_allclose(x[1, ..., 1], expected[1][..., 0], rtol=1e-6)
    assert not x[[0, 2, 3, 4], ..., 1].any()
    for column, name in enumerate(data.COLUMNS):
        assert np.load(out / f"{name}.npy").tolist() == [row[column] for row in ROWS]
    assert data.read_lines(out / "classes.txt") == data.bundled_classes("ntu60")
    assert skipped_in(out) == [["S001C001P001R001A002.skeleton", "is truncated"]]
    with pytest.raises(data.InputError, match="out: exists already"):
        data.prepare(raw_ntu, out)
    for protocol, training in (("xview", [False, True, True, False, True]),
                               ("xset", [False, False, True, False, False])):
        data.prepare(raw_ntu, tmp_path / protocol, frames=8, protocol=protocol, exclude=missing)
        assert np.load(tmp_path / protocol / "training.npy").tolist() == training


def test_ntu_recordings_with_changing_ids_hold_one_person(tmp_path):
    x, path, read = person(60, 0.1)[..., None], tmp_path / f"{NAMES[0]}.skeleton", []
    for changes in ([], [30], [30, 45]):
        write_skeleton(path, x, [[7 * sum(t >= change for change in changes)] for t in range(60)])
        read.append(data.read_ntu(path, 64))
        np.testing.assert_array_equal(read[-1], read[0])
    assert read[0][..., 0].any((0, 2)).all()


def test_encodings_suffixes_and_links(raw_ntu, tmp_path):
    path, elsewhere, out = raw_ntu / f"{NAMES[1]}.skeleton", tmp_path / "elsewhere", tmp_path / "out"
    expected, text = data.read_ntu(path, 20), path.read_text()
    for content in ("\ufeff" + text, text.encode("utf-16"), text.replace("\n", "\r\n")):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        np.testing.assert_array_equal(data.read_ntu(path, 20), expected)
    path.rename(path.with_suffix(".SKELETON"))
    (raw_ntu / "nested" / "up").symlink_to(raw_ntu)                       # a link to a folder above
    shutil.move(raw_ntu / "nested", elsewhere)
    (raw_ntu / "nested").symlink_to(elsewhere)
    data.prepare(raw_ntu, out, frames=20)
    assert np.load(out / "labels.npy").tolist() == [row[0] for row in ROWS]
    np.testing.assert_array_equal(np.load(out / "skeletons.npy")[1], expected)


def with_coordinate(new):
    """→ a function that changes one coordinate of a .skeleton file, its word 14."""
    return lambda text: text.replace(text.split()[14], new, 1)


BROKEN = {  # kind: (what happens to a good file, the reason)
    "empty": (lambda text: "", "is truncated"),
    "truncated": (lambda text: text[:len(text) // 2], "is truncated"),
    "last number gone": (lambda text: text.rsplit(None, 1)[0], "is truncated"),
    "not a number": (with_coordinate("x.y"), "could not convert string to float: 'x.y'"),
    "not a count": (lambda text: text.replace("20\n1\n", "20\none\n", 1), "invalid literal for int"),
    "NaN": (with_coordinate("nan"), "a coordinate is not finite, or exceeds 100 m"),
    "far away": (with_coordinate("1e30"), "a coordinate is not finite, or exceeds 100 m"),
    "joint count": (lambda text: text.replace("\n25\n", "\n24\n", 1), "24 joints in frame 0, must be 25"),
    "more than its frames": (lambda text: text + "1\n", "continues after its 20 frames"),
    "nobody": (lambda text: "3\n0\n0\n0\n", "no body"),
    "no frames": (lambda text: "0\n", "no body"),
}


def test_every_broken_file_is_skipped_with_its_reason(raw_ntu, tmp_path):
    good = (raw_ntu / f"{NAMES[2]}.skeleton").read_text()
    changes = enumerate(BROKEN.values(), start=1)
    texts = {f"S004C001P001R001A{i:03}": change(good) for i, (change, _) in changes}
    expected = dict(zip(texts, (reason for _, reason in BROKEN.values())))
    for name in ("S004C001P001R001A121", "holiday"):
        texts[name], expected[name] = good, "its name is not SsssCcccPpppRrrrAaaa"
    for name, text in texts.items():
        (raw_ntu / f"{name}.skeleton").write_text(text)
    (raw_ntu / "S004C001P001R001A100.skeleton").symlink_to("nowhere")
    expected["S004C001P001R001A100"] = "No such file or directory"
    data.prepare(raw_ntu, tmp_path / "out", frames=10)
    skipped = {Path(name).stem: reason for name, reason in skipped_in(tmp_path / "out")}
    assert skipped.keys() == expected.keys()
    assert all(expected[name] in reason for name, reason in skipped.items()), skipped
    assert len(np.load(tmp_path / "out" / "labels.npy")) == 5


# --------------------------------------------------------------------------- data.py: published forms of NTU
def as_people(x):
    """A recording (3, F, V, M) as a published preparation orders it: the main actor first, (M, F, V, 3)."""
    return x.transpose(3, 1, 2, 0)[::-1]


def write_pyskl(path, protocol=None, **changes):
    annotations = [{"frame_dir": name, "label": np.int64(row[0]), "total_frames": np.float32(20),
                    "keypoint": as_people(x).astype(np.float16)} | changes
                   for name, row, x in zip(NAMES, ROWS, recordings())]
    split = {"xsub_train": [n for n, row in zip(NAMES, ROWS) if row[1]],
             "xsub_val": [n for n, row in zip(NAMES, ROWS) if not row[1]], "xview_train": NAMES[1:3]}
    path.write_bytes(pickle.dumps({"split": split, "annotations": annotations}, protocol))
    return path


def write_ctrgcn(path):
    """CTR-GCN's file: the origin at joint 2 of the first frame, one-hot labels."""
    x, y = np.zeros((5, 300, 2, 25, 3), np.float32), np.zeros((5, 60))
    for n, (recording, row) in enumerate(zip(recordings(), ROWS)):
        people = as_people(recording).swapaxes(0, 1)                      # (20, M, V, 3)
        x[n, :20, :people.shape[1]] = people - people[0, 0, 1]
        y[n, row[0]] = 1
    x, trains = x.reshape(5, 300, 150), np.array([row[1] for row in ROWS])
    np.savez(path, x_train=x[trains], y_train=y[trains], x_test=x[~trains], y_test=y[~trains])
    return path


def write_agcn(folder, fill):
    """2s-AGCN's folder; `fill` repeats sequences up to 300 frames instead of zeros."""
    folder.mkdir()
    for part, trains in (("train", True), ("val", False)):
        rows = [row for row in range(5) if ROWS[row][1] == trains]
        x = np.zeros((len(rows), 3, 300, 25, 2), np.float32)
        for n, row in enumerate(rows):
            people = as_people(recordings()[row]).transpose(3, 1, 2, 0)           # (3, 20, V, M)
            x[n, :, :300 if fill else 20, :, :people.shape[3]] = np.tile(people, (1, 15 if fill else 1, 1, 1))
        np.save(folder / f"{part}_data_joint.npy", x)
        labels = [NAMES[row] for row in rows], [ROWS[row][0] for row in rows]
        (folder / f"{part}_label.pkl").write_bytes(pickle.dumps(labels))
    return folder


def prepared(source, out, **options):
    """→ the arrays of a prepared folder, samples in the order of their labels."""
    data.prepare(source, out, frames=20, **options)
    order = np.argsort(np.load(out / "labels.npy"))
    return {path.stem: np.load(path)[order] for path in out.glob("*.npy")}


@pytest.mark.parametrize("form", ["pyskl", "ctrgcn", "agcn zeros", "agcn repeated"])
def test_one_recording_in_every_form_is_the_same_skeleton(form, raw_ntu, tmp_path):
    raw = prepared(raw_ntu, tmp_path / "raw_out")
    source = {"pyskl": lambda: write_pyskl(tmp_path / "ntu60_3danno.pkl"),
              "ctrgcn": lambda: write_ctrgcn(tmp_path / "NTU60_CS.npz"),
              "agcn zeros": lambda: write_agcn(tmp_path / "xsub", fill=False),
              "agcn repeated": lambda: write_agcn(tmp_path / "xsub", fill=True)}[form]()
    other = prepared(source, tmp_path / "out")
    x, expected = other["skeletons"], raw["skeletons"]
    assert x.shape == expected.shape == (5, 3, 20, 25, 2)
    if form == "ctrgcn":                                                  # the origin at joint 2
        assert set(other) == {"skeletons", "labels", "training"}
        expected = (expected - expected[:, :, :1, 1:2, :1]) * expected.any((1, 3), keepdims=True)
    else:
        assert all(np.array_equal(other[name], raw[name]) for name in data.COLUMNS)
    np.testing.assert_allclose(x, expected, atol=2e-3 if form == "pyskl" else 1e-5)
    assert np.array_equal(other["labels"], raw["labels"])
    assert np.array_equal(other["training"], raw["training"])
    assert data.read_lines(tmp_path / "out" / "classes.txt") == data.bundled_classes("ntu60")


def test_a_large_npz_is_read_in_pieces(tmp_path):
    """PKU-MMD's takes less memory than its samples; those of training are several pieces and a rest."""
    out, x = tmp_path / "out", np.random.default_rng(0).normal(size=(2500, 3, 4, 25, 2)).astype(np.float32)
    y, trains = np.arange(2500)[:, None] % 51, np.arange(2500) < 2400
    arrays = {"x_train": x[trains], "y_train": y[trains], "x_test": x[~trains], "y_test": y[~trains]}
    np.savez_compressed(tmp_path / "pkuv1_xsub.npz", **arrays)
    tracemalloc.start()
    data.prepare(tmp_path / "pkuv1_xsub.npz", out, frames=4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(np.load(out / "skeletons.npy"), x)
    assert np.array_equal(np.load(out / "labels.npy"), y[:, 0])
    assert np.array_equal(np.load(out / "training.npy"), trains)
    assert data.read_lines(out / "classes.txt") == data.bundled_classes("pku51")
    assert peak < x.nbytes


class Evil:
    """A pickle of it runs a command when it is loaded carelessly."""

    def __reduce__(self):
        return os.system, ("touch evil",)


def test_pickles_never_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pyskl, agcn = Path("x.pkl"), write_agcn(Path("agcn"), fill=False)
    code = r"names (posix|nt)\.system, which could run code"
    values = [Evil(), {"split": {}, "annotations": [Evil()]}, np.array([Evil()], object), np.arange(3)]
    for i, value in enumerate(values):
        for source, path in ((pyskl, pyskl), (agcn, agcn / "val_label.pkl")):
            path.write_bytes(pickle.dumps(value))
            plain = source == agcn and i >= 2                             # 2s-AGCN's have no arrays
            reason = r"names numpy\._?core.*_reconstruct" if plain else code if i < 3 else "no annotations"
            with pytest.raises(data.InputError, match=f"{path.name}.*{reason}"):
                data.prepare(source, "out")
    assert not Path("evil").exists()
    forms = [prepared(write_pyskl(pyskl, protocol), Path(f"out{protocol}")) for protocol in range(2, 6)]
    assert all(np.array_equal(form[name], forms[0][name]) for form in forms for name in form)


# ------------------------------------------------------------------------------------------- data.py: PKU-MMD
def write_pku(raw, name, video, labels, folders=("Data/PKU_Skeleton_Renew", "Label/Train_Label_PKU_final")):
    """Write a PKU-MMD video (frames, 2, 25, 3) and the lines of its labels, with blank last lines."""
    frames = [" ".join(map(repr, frame)) for frame in video.reshape(len(video), -1).tolist()]
    for folder, lines in zip(folders, (frames, labels)):
        (raw / folder).mkdir(parents=True, exist_ok=True)
        (raw / folder / f"{name}.txt").write_text("\n".join(lines) + "\n\n")


@pytest.fixture
def raw_pku(tmp_path):
    """Two PKU-MMD videos of 60 frames, two segments each; a second person in the first of 0003-M only."""
    raw, video = tmp_path / "pku", np.zeros((60, 2, 25, 3))
    video[:, 0] = person(60, 0.3).transpose(1, 2, 0)
    write_pku(raw, "0002-L", video, ["5,1,20,2", "51.0,31.0,60.0,1.0"])
    video[:20, 1] = person(20, 0.1, seed=1).transpose(1, 2, 0)
    write_pku(raw, "0003-M", video, ["1,0,20,2", "2,21,40,2"])
    (raw / "Split").mkdir()
    for name, lists in (("subject", ("0002-L, 0004-R", "0003-M")), ("view", ("0003-M", "0002-L,"))):
        text = f"Training videos:\n{lists[0]}, \nValidation videos:\n{lists[1]}\n"
        (raw / "Split" / f"cross-{name}.txt").write_text(text)
    return raw


def test_pku_preparation(raw_pku, tmp_path):
    out, view, actor = tmp_path / "out", tmp_path / "view", person(60, 0.3)
    data.prepare(raw_pku, out, frames=20)
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
    data.prepare(raw_pku, view, frames=20, protocol="xview")
    assert np.load(view / "training.npy").tolist() == [False, False, True, True]


def test_pku_phase_2_and_flat_folders(tmp_path):
    raw, out, video = tmp_path / "pku", tmp_path / "out", np.zeros((30, 2, 25, 3))
    video[:, 0] = person(30, 0.3).transpose(1, 2, 0)
    write_pku(raw, "A01N01-L", video, ["7,1,30,1"], ("Skeleton", "Label"))
    lists = "Training videos:\nA02N01-M\nTesting videos:\nA01N01-L, A01N02-R\n"
    (raw / "cross_subject_v2.txt").write_text(lists)
    data.prepare(raw, out, frames=30)
    assert np.load(out / "labels.npy").tolist() == [6] and np.load(out / "training.npy").tolist() == [False]
    np.testing.assert_allclose(np.load(out / "skeletons.npy")[0, ..., 0], person(30, 0.3), rtol=1e-6)


def test_broken_pku_videos_and_segments_are_skipped(raw_pku, tmp_path):
    video, split = np.ones((30, 150)), raw_pku / "Split" / "cross-subject.txt"
    labels = ["1,1,20,2", "52,1,20,2", "3,10,31,2", "3,9,8,2", "x,1,20,2", "7,1", "1,3,3,1"]
    write_pku(raw_pku, "0004-R", video, labels)
    write_pku(raw_pku, "0007-L", video, ["1,1,20,2"])
    write_pku(raw_pku, "0008-L", video[:, 1:], ["1,1,20,2"])
    write_pku(raw_pku, "0009-L", video, [])
    split.write_text(split.read_text().replace("0003-M", "0003-M, 0008-L, 0009-L"))
    data.prepare(raw_pku, tmp_path / "out", frames=10)
    expected = [
        ("0004-R.txt, label line 2", "action 52"),
        ("0004-R.txt, label line 3", "action 3, frames 10 to 31 of 30"),
        ("0004-R.txt, label line 4", "frames 9 to 8"),
        ("0004-R.txt, label line 5", "could not convert"),
        ("0004-R.txt, label line 6", "not enough values"),
        ("0007-L.txt", "is in neither list"),
        ("0008-L.txt", "150 numbers a line"),
        ("0009-L.txt", "its label file names no segment"),
    ]
    with open(tmp_path / "out" / "skipped.csv") as f:
        skipped = list(csv.reader(f))[1:]
    assert [name for name, _ in skipped] == [name for name, _ in expected]
    assert all(part in reason for (_, reason), (_, part) in zip(skipped, expected)), skipped
    assert np.load(tmp_path / "out" / "labels.npy").tolist() == [4, 50, 0, 1, 0, 0]


# --------------------------------------------------------------------------------------- data.py: bad sources
def two_kinds(folder):
    write_agcn(folder / "both", fill=False)
    write_skeleton(folder / "both" / f"{NAMES[0]}.skeleton", recordings()[0])


BAD_SOURCES = {  # command: (what to make first, what the one line must say)
    "nowhere out": (None, "nowhere: no such file or folder"),
    "empty out": (lambda f: (f / "empty").mkdir(), "empty: is not a known set; give a folder of .skeleton"),
    "both out": (two_kinds, "both: holds ntu and agcn; say which with --kind"),
    "raw raw": (None, "raw: exists already"),
    "raw out --frames 1": (None, "--frames 1 is out of range"),
    "raw out --kind avi": (None, "invalid choice: 'avi'"),
    "raw": (None, "required: out"),
    "broken out": (lambda f: ((f / "broken").mkdir(), write(f"{NAMES[0]}.skeleton", "x")(f / "broken")),
                   f"no recording could be read; correct the first, {NAMES[0]}.skeleton: invalid literal"),
    "twice out": (lambda f: (shutil.copytree(f / "raw", f / "twice"),
                             shutil.copy(f / "raw" / f"{NAMES[1]}.skeleton", f / "twice" / "nested")),
                  f"twice: holds two recordings {NAMES[1]}.skeleton; keep one"),
    "pku out --protocol xset": (None, "PKU-MMD has one for the protocols xsub and xview"),
    "pku/Data out --kind pku": (None, "Data: holds 0 files cross-subject.txt"),
    "pku/Split out": (None, "Split: holds 0 skeleton and 0 label files"),
    "NTU60_CS.npz out --protocol xview": (lambda f: write_ctrgcn(f / "NTU60_CS.npz"),
                                          "is of the protocol xsub; leave out --protocol xview"),
    "x.npz out": (lambda f: np.savez(f / "x.npz", a=np.ones(3)), "x.npz/y_train.npy: cannot be read"),
    "half.npz out": (lambda f: (f / "half.npz").write_bytes(write_ctrgcn(f / "a.npz").read_bytes()[:-200]),
                     "half.npz/y_train.npy: cannot be read"),
    "agcn out --protocol xview": (lambda f: write_agcn(f / "agcn", False), "agcn: is of the protocol xsub"),
    "a.pkl out": (lambda f: (f / "a.pkl").write_bytes(pickle.dumps(Evil())), "which could run code"),
    "empty out --kind ntu": (lambda f: (f / "empty").mkdir(), "empty: holds no .skeleton files"),
    "raw out --exclude all.txt": (lambda f: (f / "all.txt").write_text("\n".join(NAMES)), "all were excluded"),
    "b.pkl out": (lambda f: (f / "b.pkl").write_bytes(pickle.dumps([1])), "b.pkl: has no annotations under"),
    "c.pkl out --protocol xset": (lambda f: write_pyskl(f / "c.pkl"),
                                  "its splits are: xsub_train, xsub_val, xview_train"),
    "d.pkl out": (lambda f: write_pyskl(f / "d.pkl", keypoint=np.ones((1, 20, 17, 2)), keypoint_score=1),
                  "d.pkl: holds 2-D poses in pixels"),
}


@pytest.mark.parametrize("command", BAD_SOURCES)
def test_a_bad_source_is_one_line_and_exit_2(command, raw_ntu, raw_pku, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make, message = BAD_SOURCES[command]
    if make:
        make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["data.py", *command.split()])
    assert message in one_line_of(lambda: data.command_line(data.main), capsys)
    assert sorted(tmp_path.rglob("*")) == before                          # nothing half-written


# ------------------------------------------------------------------------------------------ published recipes
def two_persons():
    """Two sequences (2, 3, 6, 25, 2); of the first, the second person is absent in the last frames."""
    x = np.random.default_rng(0).normal(size=(2, 3, 6, 25, 2)).astype(np.float32)
    x[0, :, 4:, :, 1] = 0
    return x


def test_smies_frame_against_loops_in_float64():
    x = two_persons()
    y = zsar.to_common_frame(x, zsar.NTU25, "smie")
    for n, t, m in itertools.product(range(2), range(6), range(2)):
        pose = x[n, :, t, :, m].astype(np.float64)                        # (3, V)
        if not pose.any():
            assert not y[n, :, t, :, m].any()
            continue
        pose = pose - pose[:, 20:21]                                      # joint 21, between the shoulders
        line = pose[:, 8] - pose[:, 4]                                    # left to right
        angle = math.atan2(line[2], line[0])
        c, s = math.cos(angle), math.sin(angle)
        expected = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]]) @ pose
        np.testing.assert_allclose(y[n, :, t, :, m], expected, atol=1e-5)
        line = y[n, :, t, 8, m] - y[n, :, t, 4, m]
        assert line[0] > 0 and abs(line[2]) < 1e-5


def test_shiftgcns_frame_against_loops_in_float64():
    x = two_persons()
    y = zsar.to_common_frame(x, zsar.NTU25, "shiftgcn")

    def onto(line, axis):                                                 # turn about the common normal
        normal, line = np.cross(line, axis), line / np.linalg.norm(line)
        normal, angle = normal / np.linalg.norm(normal), math.acos(line @ axis)
        c, s = math.cos(angle), math.sin(angle)
        K = np.cross(np.eye(3), normal)                                   # K @ v is normal × v
        return c * np.eye(3) + s * K + (1 - c) * np.outer(normal, normal)

    for n in range(2):
        pose = x[n, :, 0, :, 0].astype(np.float64)
        upwards = onto(pose[:, 1] - pose[:, 0], np.array([0, 0, 1.0]))
        sideways = onto(upwards @ (pose[:, 8] - pose[:, 4]), np.array([1.0, 0, 0]))
        for t, m in itertools.product(range(6), range(2)):
            if not x[n, :, t, :, m].any():
                assert not y[n, :, t, :, m].any()
                continue
            expected = sideways @ upwards @ (x[n, :, t, :, m] - x[n, :, t, 1:2, 0])
            np.testing.assert_allclose(y[n, :, t, :, m], expected, atol=1e-5)
        line = y[n, :, 0, 8, 0] - y[n, :, 0, 4, 0]
        np.testing.assert_allclose(line / np.linalg.norm(line), [1, 0, 0], atol=1e-5)
        assert not y[n, :, :, 1, 0].any()


def test_every_parameter_of_the_published_shiftgcn_has_its_weight_decay():
    settings = train.PUBLISHED_ENCODERS["shiftgcn"]
    encoder = zsar.ShiftGCN(25, 2, 60)
    optimizer = train.make_optimizer(train.EncoderTraining(encoder, settings, fast=False), settings)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert optimizer.defaults["nesterov"] and optimizer.defaults["momentum"] == 0.9
    counts = {1e-3: 0, 0: 0, 1e-4: 0}
    for name, parameter in encoder.named_parameters():
        part = re.sub(r"units\.\d\.", "", name)
        expected = {"spatial.weight": 1e-3, "spatial.mask": 0}.get(part, 1e-4)
        assert math.isclose(decay[id(parameter)], expected), name
        counts[expected] += 1
    assert counts[1e-3] == counts[0] == 10 and len(decay) == sum(counts.values())
    assert abs(encoder.classifier.weight.std() / (2 / 60) ** 0.5 - 1) < 0.05
    assert encoder.units[0].temporal[2].bias.any() and not encoder.units[4].residual[0].bias.any()


def test_the_spread_over_other_noises(light_folder, tmp_path, capsys):
    result, _ = run_main(light_folder, tmp_path / "run", method="tdsm")
    trained = torch.load(tmp_path / "run" / "model.pt", weights_only=True)
    model = train.rebuild("tdsm", trained["text"], trained["settings"], trained["state"])
    d, accuracies = data.read_data(light_folder, "9_3"), []
    fixed = model.noises.clone()
    for seed in range(10):
        model.noises = torch.randn(fixed.shape, generator=torch.Generator().manual_seed(seed))
        accuracies.append(train.unseen_figures(model, torch.as_tensor(d.features), d)["acc"])
    assert result["zsl"]["noise_std"] == pytest.approx(statistics.stdev(accuracies))
    assert "other noises    ± " in capsys.readouterr().out
    assert result["samples"] == {"train": 36, "seen_test": 36, "unseen_test": 12}


def test_a_text_of_one_prompt_leaves_the_sde_nothing_to_mix(light_folder, tmp_path):
    (light_folder / "text_description.npy").unlink()
    for method, note in (("dvta", True), ("ridge", False)):
        result, _ = run_main(light_folder, tmp_path / method, method=method)
        assert any("nothing to mix" in line for line in result["notes"]) == note


# -------------------------------------------------------------------------- train.py: one run from end to end
@pytest.fixture(scope="session")
def tiny_folder(small_folder, tmp_path_factory):
    """The small folder with every fourth frame and few tokens: an encoder trains on it in half a second."""
    folder = tmp_path_factory.mktemp("data") / "tiny"
    shutil.copytree(small_folder, folder)
    spoil("skeletons.npy", lambda x: x[:, :, ::4])(folder)
    spoil("text_label.npy", lambda text: text[:, :3])(folder)
    spoil("text_description.npy", lambda text: text[:, :4])(folder)
    return folder


@pytest.fixture
def light_folder(tiny_folder, tmp_path):
    """A copy of the tiny folder that tests may spoil, with random ready features in place of skeletons."""
    folder = tmp_path / "mine"
    shutil.copytree(tiny_folder, folder, ignore=lambda *_: ["skeletons.npy"])
    save("features.npy", np.random.default_rng(0).random((96, 256), dtype=np.float32))(folder)
    return folder


@contextlib.contextmanager
def ends_in_one_line(capsys, *parts, status=2):
    """The block must end the program with that status and one line on standard error with those parts."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        yield
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if not line.startswith("note: ")]
    assert stop.value.code == status
    assert len(errors) == 1 and all(part in errors[0] for part in parts), errors


def test_the_command_line(tiny_folder, tmp_path, monkeypatch, capsys):
    options = "--epochs 2 --encoder-epochs 1 --device cpu --batch-size 8".split()
    command = ["--method", "dvta", "--split", "9_3", "--data", str(tiny_folder), *options]
    done = script("train.py", *command, folder=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "SYNTHETIC" not in done.stdout
    for part in ("encoder step 2/2, epoch 1  loss ", "dvta step 8/8, epoch 2  loss ", "ridge baseline",
                 "chance", "best on test", "Eat meal/snack",
                 "samples: 36 training, 36 seen test, 12 unseen test; seed 0; cpu, float32"):
        assert part in done.stdout
    monkeypatch.chdir(tmp_path)
    run = Path("runs/tiny_9_3_dvta_seed0_epochs-2_batch_size-8_encoder.epochs-1")
    result = result_of(run)
    assert {"command", "dataset", "seed", "device", "notes", "versions", "data_sha256"} <= result.keys()
    assert result["command"] == "python train.py " + shlex.join(command)
    assert result["method"] == "dvta" and result["split"] == "9_3" and result["note"] is None
    zsl, best = result["zsl"], result["best_on_test"]
    assert zsl["n"] == sum(map(sum, zsl["confusion"])) == 12
    assert zsl["chance"] == 1 / 3 and 0 <= zsl["acc"] <= 1
    assert best["acc"] >= zsl["acc"] and best["epoch"] in (1, 2)
    assert [point["epoch"] for point in result["history"]] == [1, 2]
    assert 0 <= result["encoder"]["seen_test_acc"] <= 1
    assert result["seconds"].keys() == {"encoder", "train"}
    assert result["settings"].keys() == {"encoder", "ridge", "dvta"}
    assert result["settings"]["dvta"]["batch_size"] == 8 and result["settings"]["encoder"]["epochs"] == 1
    assert {path.name for path in run.iterdir()} == {"result.json", "model.pt"}
    with ends_in_one_line(capsys, f"{run}: holds a finished run; give --force"):
        train.main(command)
    with ends_in_one_line(capsys, "choose one of: 9_3, 10_2"):
        train.main([*command, "--split", "6_6"])
    monkeypatch.setattr(sys, "argv", ["train.py", "--list"])
    train.main()
    assert "55_5" in capsys.readouterr().out


def test_a_synthetic_run_says_so(tmp_path, monkeypatch, capsys):
    whole = data.synthetic                                                # a small part of the set, for time
    monkeypatch.setattr(data, "synthetic", lambda text: whole(text, performers=2, repeats=1, frames=4))
    command = "--method ridge --split 55_5 --encoder-epochs 1 --device cpu".split()
    train.main([*command, "--out", str(tmp_path / "run")])
    lines, result = capsys.readouterr().out.splitlines(), result_of(tmp_path / "run")
    assert lines[0] == lines[-1] == result["note"]
    assert "SYNTHETIC" in lines[0] and "say nothing about NTU" in lines[0]
    assert result["dataset"] == "synthetic"


def test_a_generalized_run(light_folder, tmp_path, capsys):
    result, _ = run_main(light_folder, tmp_path / "out" / "run", "--gzsl")
    d = data.read_data(light_folder, "9_3")
    for gzsl in (result["gzsl"], result["ridge"]["gzsl"]):
        assert gzsl.keys() == {"seen", "unseen", "harmonic", "gamma", "ausuc", "curve"}
        assert 0 <= gzsl["ausuc"] <= 1
        hits = gzsl["seen"] * len(d.seen_test)
        assert hits == pytest.approx(round(hits))
        assert gzsl["harmonic"] == pytest.approx(zsar.harmonic_mean(gzsl["seen"], gzsl["unseen"]))
    captured = capsys.readouterr()
    assert "validation run, to choose γ: dvta on mine" in captured.out
    assert "7 seen and 2 validation classes" in captured.out
    assert captured.out.count("AUSUC") == 2
    assert f"note: {train.VALIDATION_NOTE}\n" == captured.err             # ready features
    assert result["notes"] == [train.VALIDATION_NOTE]
    assert result["encoder"] == {"seen_test_acc": None, "cached": False, "file": None}
    assert not (tmp_path / "out" / "encoders").exists()
    plain, _ = run_main(light_folder, tmp_path / "plain")
    assert plain["gzsl"] is None and plain["notes"] == [] and plain["zsl"] == result["zsl"]


def test_generalized_figures_need_seen_test_samples(tmp_path, capsys):
    folder = write_published(tmp_path / "ntu60")
    result, _ = run_main(folder, tmp_path / "run", "--gzsl", method="ridge", split="55_5")
    assert 0 < result["gzsl"]["ausuc"] < 1
    for name in ("gtest", "g_label"):
        remove(f"{name}.npy")(folder)
    with ends_in_one_line(capsys, "ntu60: has no seen test samples, which --gzsl needs"):
        run_main(folder, tmp_path / "run", "--gzsl", method="ridge", split="55_5")


def test_several_seeds(tiny_folder, tmp_path, capsys):
    many, few_epochs = tmp_path / "many", ["--encoder-epochs", 1]
    train.main(least(tiny_folder, many, *few_epochs, "--seed", 3, "--seeds", 2, "--gzsl", method="tdsm"))
    printed, result = capsys.readouterr().out, result_of(many)
    one, weights = run_main(tiny_folder, tmp_path / "one", *few_epochs, "--seed", 4, "--gzsl", method="tdsm")
    first, second = result["seeds"]
    assert (first["seed"], second["seed"]) == (3, 4)
    assert second["zsl"] == one["zsl"] and second["gzsl"] == one["gzsl"]
    assert second == result_of(many / "seed4")
    assert_same_weights(weights_of(many / "seed4"), weights)
    name = "denoiser.position"
    assert not torch.equal(weights_of(many / "seed3")[name], weights[name])
    assert not first["encoder"]["cached"] and Path(first["encoder"]["file"]).exists()
    assert first["seconds"]["encoder"] > 0
    summary = result["summary"]
    assert summary.keys() == {f"{method} {figure}" for method in ("tdsm", "ridge")
                              for figure in ("acc", "seen", "unseen", "harmonic", "ausuc")}
    assert summary["tdsm acc"]["each"] == [run["zsl"]["acc"] for run in result["seeds"]]
    ridge_ausuc = [run["ridge"]["gzsl"]["ausuc"] for run in result["seeds"]]
    assert summary["ridge ausuc"]["mean"] == pytest.approx(np.mean(ridge_ausuc))
    assert summary["ridge ausuc"]["std"] == pytest.approx(np.std(ridge_ausuc, ddof=1))
    assert "tdsm, seeds 3 to 4: mean ± standard deviation" in printed
    assert {path.name for path in many.iterdir()} == {"seed3", "seed4", "result.json"}
    assert len(list((tmp_path / "encoders").iterdir())) == 4              # each seed's, each validation run's


def encoders_of(folder):
    """The encoders of a cache, by the number of classes that each was trained on."""
    encoders = [torch.load(path, weights_only=True) for path in folder.iterdir()]
    return {len(encoder["state"]["classifier.bias"]): encoder for encoder in encoders}


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
                assert result["zsl"] == other_result["zsl"] and result["history"] == other_result["history"]
                continue
            assert result["zsl"] != other_result["zsl"]
            assert result["gzsl"]["gamma"] == other_result["gzsl"]["gamma"]
            assert result["gzsl"]["curve"] != other_result["gzsl"]["curve"]
    encoders, other_encoders = (encoders_of(tmp_path / name / "encoders") for name in "ab")
    assert encoders.keys() == other_encoders.keys() == {9, 4}             # of the run, of the validation run
    assert len(list((tmp_path / "a" / "encoders").iterdir())) == 2        # that of --validate is the same
    for num_classes, encoder in encoders.items():
        other = other_encoders[num_classes]
        assert_same_weights(encoder["state"], other["state"])
        assert not torch.equal(encoder["features"], other["features"])


def test_validate_is_a_run_whose_unseen_classes_are_the_validation_ones(light_folder, tmp_path, capsys):
    """The same figures as on a folder of the training samples only, without the unseen classes."""
    d = data.read_data(light_folder, "9_3")
    val, folder = data.validation(d), tmp_path / "other"
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
        assert result["zsl"]["n"] == 8 and result["validate"] and not expected["validate"]
        for key in ("zsl", "ridge", "unseen_classes"):
            assert result[key] == expected[key]
        for key in weights:                                               # gradients are summed otherwise
            torch.testing.assert_close(weights[key], same[key], rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------- train.py: encoder, method
def test_the_encoder_cache_hits_and_misses(tiny_folder, tmp_path):
    folder, graph = tmp_path / "data", zsar.NTU25
    shutil.copytree(tiny_folder, folder)

    def cached(*options, method="ridge", split="9_3"):
        options = ["--encoder-epochs", 1, *options]
        result, _ = run_main(folder, tmp_path / "runs" / "x", *options, method=method, split=split)
        return result["encoder"]["cached"]

    assert not cached()
    assert cached()
    assert cached(method="tdsm")                                          # a second method reuses it
    assert cached("--set", "margin=2", "noises=1", method="tdsm")         # whatever the method's settings
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
    for moved in ((21, 22), (21, 7)):                                     # the thumb's parent
        edges = [(22, 7) if edge == (22, 7) else moved if edge == (21, 22) else edge for edge in graph.edges]
        write("graph.json", json.dumps(graph._asdict() | {"edges": edges}))(folder)
        assert cached() == (moved == (21, 22))                            # the graph as it was built in
    assert len(list((tmp_path / "runs" / "encoders").iterdir())) == 8


def test_published_training_of_the_encoders(tiny_folder, tmp_path, monkeypatch):
    """Training without augmentation, cache, generalized figures and predict."""
    monkeypatch.setattr(train, "augmented", None)                         # a call would fail
    for name, settings in train.PUBLISHED_ENCODERS.items():
        options = ["--encoder", name, "--encoder-preset", "published", "--encoder-epochs", 1, "--gzsl"]
        run = tmp_path / name
        result, _ = run_main(tiny_folder, run, *options, method="ridge")
        assert result["settings"]["encoder"] == settings | {"epochs": 1}
        assert settings["name"] == name and not settings["augment"]
        assert 0 <= result["encoder"]["seen_test_acc"] <= 1
        again, _ = run_main(tiny_folder, run, *options, method="ridge")
        assert again["encoder"]["cached"]
        assert again["zsl"] == result["zsl"] and again["gzsl"] == result["gzsl"]
        trained = torch.load(run / "model.pt", weights_only=True)["encoder"]
        assert ("units.0.spatial.mask" in trained["state"]) == (name == "shiftgcn")
        assert len(trained["state"]["classifier.bias"]) == (12 if settings["all_classes"] else 9)
        assert trained["frame"] == settings["frame"] == {"stgcn": "smie", "shiftgcn": "shiftgcn"}[name]
        rows, classes = predictions_of(run, tiny_folder), data.read_data(tiny_folder, "9_3").classes
        assert len(rows) == 96 and all(row[1] in classes for row in rows)
    adam = train.make_optimizer(torch.nn.Linear(1, 1), train.PUBLISHED_ENCODERS["stgcn"])
    assert (type(adam), adam.defaults["weight_decay"]) == (torch.optim.Adam, 0.0)


def write_code(module, folder, *edits):
    """Write a module's source without comments and with these edits into a folder → its path.

    edit: "STGCN.forward", which gets one statement more, or "Ridge.fit:doc", which gets another docstring.
    """
    tree = ast.parse((ROOT / f"{module.__name__}.py").read_text(encoding="utf-8"))
    for edit in edits:
        node, (where, _, doc) = tree, edit.partition(":")
        for name in where.split("."):
            node = next(n for n in node.body if getattr(n, "name", None) == name
                        or isinstance(n, ast.Assign) and getattr(n.targets[0], "id", None) == name)
        if isinstance(node, ast.Assign):
            node.value = ast.Constant("another value")
        elif doc:
            node.body[0] = ast.Expr(ast.Constant("Another docstring."))
        else:
            node.body.append(ast.Pass())
    path = folder / f"{module.__name__}.py"
    path.write_text(f"# a comment\n{ast.unparse(ast.fix_missing_locations(tree))}\n", encoding="utf-8")
    return path


ENCODER_EDITS = {  # module: (edits of no matter to an encoder's training, edits that each matter)
    zsar: (["STGCN:doc", "Ridge.fit", "best_gamma"],
           ["STGCN.forward", "GraphConv.forward", "ShiftUnit.forward", "augmented", "to_common_frame",
            "recalibrate_batch_norm", "FEATURES"]),
    train: (["fit:doc", "report", "PRESETS"],
            ["fit", "lr_factor", "make_optimizer", "random_batches", "EncoderTraining.forward",
             "encode_all"]),
}


@pytest.mark.parametrize("module", ENCODER_EDITS, ids=["zsar", "train"])
def test_code_that_an_encoder_depends_on(module, tmp_path, monkeypatch):
    code, (harmless, edits) = train.encoder_code(), ENCODER_EDITS[module]
    monkeypatch.setattr(module, "__file__", str(write_code(module, tmp_path, *harmless)))
    assert train.encoder_code() == code
    for edit in edits:
        write_code(module, tmp_path, edit)
        assert train.encoder_code() != code, edit


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
    while not process.stdout.readline().startswith("encoder step"):
        assert process.poll() is None
    (code / "zsar.py").write_text("def broken(:")
    (code / "train.py").write_text("")
    (code / "diffusion.py").unlink()
    printed, error = process.communicate()
    assert process.returncode == 0 and error == ""
    assert "encoder step 8/8" in printed and "tdsm step 1/4" in printed
    first = result_of(out)["encoder"]
    for edit, same in (("augmented", False), ("Ridge.fit", True)):
        monkeypatch.setattr(zsar, "__file__", str(write_code(zsar, code, edit)))
        result, _ = run_main(tiny_folder, out, "--encoder-epochs", 4, method="ridge")
        assert (result["encoder"] == first | {"cached": True}) == same
        assert (result["encoder"]["file"] == first["file"]) == result["encoder"]["cached"] == same


def no_compiler(x):
    raise RuntimeError("Cannot find a working triton installation\nmore")


@pytest.mark.parametrize("where", ["at once", "in the first call"])
def test_without_a_compiler_functions_run_as_they_are(where, monkeypatch, capsys):
    tries = []

    def torch_compile(function):
        tries.append(function)
        if where == "at once":
            no_compiler(None)
        return no_compiler

    monkeypatch.setattr(torch, "compile", torch_compile)
    double = train.compiled(lambda x: 2 * x)
    assert [double(3), double(4), double(5)] == [6, 8, 10]
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and len(tries) == 1
    assert error.startswith("note: ") and "RuntimeError: Cannot find a working triton installation" in error


def test_errors_of_a_compiled_function_itself(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    divide = train.compiled(lambda x: 1 / x)
    for _ in range(2):                                                    # as the first call, and later
        with pytest.raises(ZeroDivisionError):
            divide(0)
        assert divide(2) == 0.5
    assert capsys.readouterr().err == ""
    with pytest.raises(RuntimeError, match="triton"):
        train.compiled(no_compiler)(1)


# -------------------------------------------------------------------------------- train.py: the training loop
@pytest.mark.parametrize("epochs, steps, expected", [
    (3, None, 30), (None, 7, 7), (3, [10, 20], 20), (3, [50, 90], 50), (3, [10, 90], 30)])
def test_the_length_of_a_training(epochs, steps, expected):
    assert train.num_steps({"epochs": epochs, "steps": steps}, per_epoch=10) == expected


def test_warm_up_then_cosine():
    settings = {"warm_up": 0.15, "epochwise": False}
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
        with train.seeded(0, torch.device("cpu")):
            super().__init__(4, 1)
        self.calls, self.breaks_at, self.log = [], None, {}

    def forward(self, x, y):
        self.calls.append(y.tolist())
        if len(self.calls) == self.breaks_at:
            raise KeyboardInterrupt
        self.log = {"more": self.bias.sum().detach()}
        return super().forward(x).square().mean()


def samples_of(count):
    """count samples of 4 features, with their row numbers for labels."""
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(0)), torch.arange(count)


def test_learning_rates_of_the_published_encoders(tmp_path, monkeypatch):
    """Shift-GCN's falls by ten at epochs 60, 80, 100; ST-GCN's as a cosine, set once an epoch."""
    real, rates = train.make_optimizer, {}
    for name, settings in train.PUBLISHED_ENCODERS.items():
        rates[name] = []

        def make_optimizer(model, settings):
            optimizer = real(model, settings)
            optimizer.register_step_post_hook(lambda o, *_: rates[name].append(o.param_groups[0]["lr"]))
            return optimizer

        monkeypatch.setattr(train, "make_optimizer", make_optimizer)
        samples = samples_of(2 * settings["batch_size"])                  # two steps an epoch
        train.fit(Line(), samples, samples[1], settings, tmp_path / f"{name}.pt")
    expected = [0.1] * 120 + [0.01] * 40 + [0.001] * 40 + [0.0001] * 80
    assert rates["shiftgcn"] == pytest.approx(expected)
    cosine = [0.005 * 0.5 * (1 + math.cos(math.pi * (step // 2) / 150)) for step in range(300)]
    assert rates["stgcn"] == pytest.approx(cosine)


LINE = {"epochs": 3, "steps": None, "batch_size": 4, "optimizer": "adam", "lr": 0.1, "weight_decay": 0.0,
        "warm_up": 0.0, "epochwise": False, "keep_last": False}


@pytest.mark.parametrize("keep_last, sizes", [(False, [4, 4]), (True, [4, 4, 2])])
def test_each_epoch_is_a_new_order_of_the_training_rows(keep_last, sizes, tmp_path):
    model, rows = Line(), torch.arange(0, 20, 2)
    log = train.fit(model, samples_of(20), rows, LINE | {"keep_last": keep_last}, tmp_path / "line-x.pt")
    epochs = [model.calls[first:first + len(sizes)] for first in range(0, len(model.calls), len(sizes))]
    assert len(epochs) == 3 and all([len(batch) for batch in epoch] == sizes for epoch in epochs)
    seen = [sum(epoch, []) for epoch in epochs]
    assert all(set(s) <= set(rows.tolist()) and len(set(s)) == sum(sizes) for s in seen)
    assert seen[0] != seen[1] != seen[2]
    assert [point["epoch"] for point in log["history"]] == [1, 2, 3] and not model.training


def test_the_caller_keeps_their_random_state():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    with train.seeded(0, torch.device("cpu")):
        torch.rand(3)
    assert torch.equal(torch.rand(1), expected)


def test_a_diverging_loss_is_one_line(light_folder, tmp_path, capsys):
    parts = "dvta step ", "the loss is not finite; lower the learning rate (--lr"
    with ends_in_one_line(capsys, *parts):
        run_main(light_folder, tmp_path / "out", "--lr", "1e30", "--epochs", 9)
    assert not (tmp_path / "out" / "result.json").exists()
    run_main(light_folder, tmp_path / "out")                           # the remedy, in the same folder


def test_the_history_is_that_of_an_uninterrupted_training(tmp_path, monkeypatch):
    """Broken in the middle of an epoch, the epoch's mean loss still counts every step of it."""
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", -1)

    def trained(name, breaks_at=None):
        model = Line()
        model.breaks_at = breaks_at
        log = train.fit(model, samples_of(10), torch.arange(10), LINE | {"batch_size": 2}, tmp_path / name,
                        test=lambda: round(model.bias.item(), 6))
        return log["history"], log["best"], model.state_dict(), model.calls

    history, best, weights, calls = trained("whole.pt")
    with pytest.raises(KeyboardInterrupt):
        trained("broken.pt", breaks_at=8)
    resumed = trained("broken.pt")
    assert resumed[:2] == (history, best)
    assert_same_weights(resumed[2], weights)
    assert resumed[3] == calls[7:] and len(calls) == 15
    assert [point["epoch"] for point in history] == [1, 2, 3]
    assert all(math.isfinite(point["loss"]) for point in history)
    assert best["acc"] == max(point["acc_on_test"] for point in history)


# ----------------------------------------------------------------------- train.py: the run's folder, resuming
@pytest.fixture(scope="session")
def forked(tmp_path_factory):
    """→ a function that runs another in a process of its own; → the process, its two files of output.

    The process need not load PyTorch again: it is forked from one that has.
    """
    context, folder = multiprocessing.get_context("forkserver"), tmp_path_factory.mktemp("forked")
    context.set_forkserver_preload([__name__, "torch._dynamo"])            # an optimiser imports that
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


def killed(forked, command, pattern, count):
    """Train in another process, killed when it writes the count-th file of a pattern → its output."""
    process, printed, error = forked(train_until_killed, command, pattern, count)
    process.join()
    assert process.exitcode == -signal.SIGKILL, error.read_text()
    return printed.read_text()


def train_until_killed(command, pattern=None, left=0):
    """Train with a checkpoint at every step, up to the `left`-th file of a pattern."""
    train.CHECKPOINT_SECONDS, real = -1, os.replace

    def replace(part, path):
        nonlocal left
        left -= fnmatch.fnmatch(os.path.basename(path), pattern or "")
        if pattern and not left:                                          # written, and not yet renamed
            sys.stdout.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        real(part, path)

    os.replace = replace
    train.main(command)


def test_a_run_killed_in_each_phase_is_the_same_in_the_end(tiny_folder, tmp_path, forked, capsys):
    """kill -9 in both encoders' training, in TDSM's, at the end: the same command gives the same bits."""
    options = ["--steps", 9, "--gzsl"]
    whole, weights = run_main(tiny_folder, tmp_path / "whole" / "run", *options, method="tdsm")
    out = tmp_path / "killed" / "run"
    command = least(tiny_folder, out, *options, method="tdsm")
    kills = [  # the file it is killed at, at which time, where the next one then resumes
        ("encoder-*.pt", 3, "encoder: resuming at step 2 of 4, from "),
        ("tdsm-*.pt", 4, "tdsm: resuming at step 3 of 9, from "),
        ("encoder-*.pt", 2, "encoder: resuming at step 1 of 2, from "),   # the validation run's
        ("model.pt", 1, "tdsm: resuming at step 9 of 9, from "),
        ("result.json", 1, "tdsm: resuming at step 9 of 9, from "),
    ]
    resumes = ""
    for pattern, count, next_resumes in kills:
        assert resumes in killed(forked, command, pattern, count)
        resumes = next_resumes
        assert not (out / "result.json").exists()
        assert (out / "model.pt").exists() == (pattern == "result.json")
        files = list((tmp_path / "killed").rglob("*.pt"))
        assert files and all(torch.load(path, weights_only=True) for path in files)
    capsys.readouterr()
    train.main(command)
    assert capsys.readouterr().out.count(resumes) == 2
    assert without_times(result_of(out)) == without_times(whole)
    assert result_of(out)["seconds"]["train"] > 0
    assert_same_weights(weights_of(out), weights)
    assert {path.name for path in out.iterdir() if path.suffix != ".part"} == {"result.json", "model.pt"}
    encoders, others = (sorted((tmp_path / name / "encoders").glob("*.pt")) for name in ("whole", "killed"))
    assert [path.name for path in encoders] == [path.name for path in others]
    for path, other in zip(encoders, others):
        one, two = (torch.load(p, weights_only=True) for p in (path, other))
        assert_same_weights(one["state"], two["state"])
        assert torch.equal(one["features"], two["features"])


def test_ctrl_c_is_one_line_and_the_same_command_resumes(light_folder, tmp_path, forked, capsys):
    out, again = tmp_path / "run", tmp_path / "again"
    options = {"method": "tdsm"}
    command = least(light_folder, out, "--steps", 60, **options)
    process, printed, error = forked(train_until_killed, command)
    while "tdsm step 6/60" not in printed.read_text():
        assert process.is_alive(), error.read_text()
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 130
    error = error.read_text()
    assert error.count("\n") == 1 and error.startswith("interrupted; the same command")
    checkpoint, = (out / train.UNFINISHED).glob("tdsm-*.pt")
    step = torch.load(checkpoint, weights_only=True)["log"]["step"]
    assert 5 <= step < 60
    assert not (out / "result.json").exists()
    train.main(command)
    assert f"tdsm: resuming at step {step} of 60" in capsys.readouterr().out
    result, weights = run_main(light_folder, again, "--steps", 60, **options)
    assert "resuming" not in capsys.readouterr().out
    assert without_times(result_of(out)) == without_times(result)
    assert_same_weights(weights_of(out), weights)


def test_several_seeds_killed_in_the_second(light_folder, tmp_path, forked, capsys):
    options = ["--seeds", 2, "--epochs", 3]
    out, whole = tmp_path / "run", tmp_path / "whole"
    train.main(least(light_folder, whole, *options))
    command = least(light_folder, out, *options)
    killed(forked, command, "dvta-*.pt", 6)                                       # three of the first seed
    assert (out / "seed0" / "result.json").exists()
    assert not (out / "seed1" / "result.json").exists() and not (out / "result.json").exists()
    capsys.readouterr()
    train.main(command)
    printed = capsys.readouterr().out
    assert "dvta: resuming at step 3 of 3" in printed and "dvta: resuming at step 2 of 3" in printed
    assert result_of(out)["summary"] == result_of(whole)["summary"]
    for seed in ("seed0", "seed1"):
        assert_same_weights(weights_of(out / seed), weights_of(whole / seed))
        assert without_times(result_of(out / seed)) == without_times(result_of(whole / seed))
    assert not list(out.rglob(train.UNFINISHED))


def test_a_finished_run_is_overwritten_with_force_only(light_folder, tmp_path, capsys):
    out = tmp_path / "run"
    run = least(light_folder, out, method="ridge")
    train.main(run)
    written = {path: path.read_bytes() for path in out.iterdir()}
    for change in ("", "--seeds 2", "--seed 1 --gzsl --set penalty=1", "--split 10_2"):
        with ends_in_one_line(capsys, f"{out}: holds a finished run; give --force to overwrite it"):
            train.main([*run, *change.split()])
        assert {path: path.read_bytes() for path in out.iterdir()} == written
    train.main([*run, "--force", "--set", "penalty=1"])
    assert result_of(out)["settings"]["ridge"]["model"]["penalty"] == 1.0
    assert (out / "model.pt").read_bytes() != written[out / "model.pt"]
    # several seeds take all their folders, or none
    train.main(least(light_folder, tmp_path / "many" / "seed1", method="ridge"))
    with ends_in_one_line(capsys, "seed1: holds a finished run"):
        train.main(least(light_folder, tmp_path / "many", "--seeds", 2, method="ridge"))
    assert [path.name for path in (tmp_path / "many").iterdir()] == ["seed1"]


def test_a_run_leaves_the_files_of_others_alone(light_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("checkpoints").mkdir()
    for path in ("film.mkv.part", "checkpoints/mine.pt", "model.pt"):
        Path(path).write_text("mine")
    command = least(light_folder, ".", method="ridge")
    with ends_in_one_line(capsys, "give --force to overwrite it, or another --out"):
        train.main(command)
    assert Path("model.pt").read_text() == "mine"
    Path("model.pt").unlink()
    train.main(command)
    assert Path("film.mkv.part").read_text() == Path("checkpoints/mine.pt").read_text() == "mine"
    assert result_of(Path("."))["zsl"]["n"] == 12


def test_other_settings_in_the_folder_of_an_unfinished_run_start_from_scratch(light_folder, tmp_path, forked,
                                                                             capsys):
    out, unfinished = tmp_path / "run", tmp_path / "unfinished"
    killed(forked, least(light_folder, unfinished, method="tdsm"), "tdsm-*.pt", 3)

    def resumes(*options):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(unfinished, out)
        capsys.readouterr()
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


def test_names_that_become_paths(light_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, path in (("../../x", "..-..-x"), ("a\nü b", "a---b")):
        write("splits.json", json.dumps({name: {"unseen": [1, 5, 8], "test_subjects": [2, 4]}}))(light_folder)
        train.main(["--method", "ridge", "--split", name, "--data", str(light_folder), "--device", "cpu"])
        assert Path("runs", f"mine_{path}_ridge_seed0", "result.json").exists()
    assert len([*Path("runs").iterdir()]) == 2


def test_a_damaged_checkpoint_or_encoder_is_one_line(tiny_folder, tmp_path, capsys):
    command = least(tiny_folder, tmp_path / "run", "--encoder-epochs", 1, "--force", method="ridge")
    train.main(command)
    encoder = next((tmp_path / "encoders").iterdir())
    checkpoint = tmp_path / "run" / train.UNFINISHED / f"encoder-{encoder.name}"

    def damaged(path, *parts):
        with ends_in_one_line(capsys, f"{path}: ", *parts):
            train.main(command)

    encoder.write_bytes(encoder.read_bytes()[:1000])
    damaged(encoder, "cannot be read", "remove it")
    torch.save({"state": {}}, encoder)
    damaged(encoder, "lacks features, seen_test_acc")
    encoder.unlink()
    checkpoint.write_bytes(b"PK")
    damaged(checkpoint, "cannot be read")
    checkpoint.unlink()
    train.main(command)                                                   # the remedy


# --------------------------------------------------------------------------------- train.py: many processes
def train_as_one_of_two(rank, port, commands, log_path):
    """Train in one of two processes, as torchrun starts them, and log weights and features to a file."""
    os.environ.update(TORCHELASTIC_RUN_ID="test", WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    log, dist = {"before": [], "after": [], "end": [], "features": []}, torch.distributed

    def noting(function, before=None, after=None):
        def weights(model):
            return {key: p.detach().clone() for key, p in model.named_parameters()}

        def call(model, *rest):
            log.get(before, []).append(before and weights(model))
            result = function(model, *rest)
            log[after].append(result[0] if after == "features" else weights(model))
            return result

        return call

    init = dist.init_process_group
    dist.init_process_group = lambda *args, **kwargs: dist.is_initialized() or init(*args, **kwargs)
    train.DistributedDataParallel = noting(train.DistributedDataParallel, "before", "after")
    train.fit, train.encode = noting(train.fit, after="end"), noting(train.encode, after="features")
    for command in commands:
        train.main(command)
    torch.save(log, log_path)


def test_two_processes(tiny_folder, tmp_path, forked):
    """The encoder and TDSM train in both, from the same weights to the same; DVTA trains in the first."""
    commands = [least(tiny_folder, tmp_path / method, "--encoder-epochs", 1, method=method)
                for method in ("tdsm", "dvta")]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    logs = [tmp_path / f"{rank}.pt" for rank in range(2)]
    started = [forked(train_as_one_of_two, rank, port, commands, log) for rank, log in enumerate(logs)]
    for process, _, error in started:
        process.join()
        assert process.exitcode == 0, error.read_text()
    lines = [line for _, printed, _ in started for line in printed.read_text().splitlines()]
    for line in ("tdsm on tiny", "dvta on tiny", "tdsm step 4/4", "dvta step 2/2", "encoder step 2/2",
                 f"written: {tmp_path / 'tdsm' / 'result.json'}"):
        assert sum(part.startswith(line) for part in lines) == 1, line
    first, second = (torch.load(log, weights_only=True) for log in logs)
    assert len(first["before"]) == len(second["before"]) == 2             # the encoder, TDSM
    for before, other, after, other_after in zip(first["before"], second["before"], first["after"],
                                                 second["after"]):
        assert any(not torch.equal(before[key], other[key]) for key in before)    # each has its own seed
        assert_same_weights(after, other_after)
        assert_same_weights(after, before)                                # the first one's
    assert (len(first["end"]), len(second["end"])) == (3, 2)
    for start, end, other in zip(first["after"], first["end"], second["end"]):
        assert_same_weights(end, other)
        assert any(not torch.equal(start[key], end[key]) for key in end)
    assert torch.equal(first["features"][0], second["features"][0])
    tdsm = weights_of(tmp_path / "tdsm")
    assert_same_weights(first["end"][1], {key: tdsm[key] for key in first["end"][1]})
    result, weights = run_main(tiny_folder, tmp_path / "one", "--encoder-epochs", 1)       # on that encoder
    assert result["encoder"]["cached"]
    assert without_times(result_of(tmp_path / "dvta")) == without_times(result)
    assert_same_weights(weights_of(tmp_path / "dvta"), weights)


# ------------------------------------------------------------------------------------------ train.py: predict
@pytest.fixture(scope="session")
def finished_runs(tiny_folder, tmp_path_factory):
    """A run of each method on the tiny folder: {method: (folder, result)}."""
    out, runs = tmp_path_factory.mktemp("runs"), {}
    more = {"dvta": (), "tdsm": ("--steps", 30, "--lr", 0.01), "ridge": ()}   # few steps leave near ties
    for method, options in more.items():
        result, _ = run_main(tiny_folder, out / method, *options, method=method)
        runs[method] = out / method, result
    return runs


@pytest.mark.parametrize("method", ["dvta", "tdsm", "ridge"])
def test_predict_among_classes_named_only_now(method, finished_runs, tiny_folder, tmp_path, capsys):
    """The split's unseen classes, in another order and by text alone, give the figures of the run itself."""
    run, result = finished_runs[method]
    d = data.read_data(tiny_folder, "9_3")
    order, names = [8, 1, 5], ["zeta", "alpha, beta", "gamma"]
    files = tmp_path / "new_label.npy", tmp_path / "new_description.npy"
    for path, text in zip(files, d.text):
        np.save(path, text[order])
    files[0].with_suffix(".txt").write_text("\n".join(names))
    rows = predictions_of(run, tiny_folder, "--classes", *map(str, files))
    hits = [rows[n][1] == names[order.index(d.labels[n])] for n in d.unseen_test]
    assert sum(hits) / len(hits) == pytest.approx(result["zsl"]["acc"])
    assert [row[0] for row in rows] == [f"row {n}" for n in range(96)]
    for _, name, _, margin, top5 in rows:
        best_first = top5.split(" | ")
        assert float(margin) >= 0
        assert best_first[0] == name
        assert set(best_first) == set(names)
    assert f"{method}: 96 sequences among 3 classes" in capsys.readouterr().out


def test_predict_of_skeleton_files(finished_runs, tiny_folder, tmp_path, capsys):
    """In a folder, in folders below, under any name, or a single one; broken ones are skipped with a note."""
    (run, _), x, raw = finished_runs["tdsm"], np.load(tiny_folder / "skeletons.npy"), tmp_path / "raw"
    (raw / "deep" / "er").mkdir(parents=True)
    paths = [raw / "a.skeleton", raw / "deep" / "b.skeleton", raw / "deep" / "er" / "c.SKELETON"]
    for n, path in enumerate(paths):
        write_skeleton(path, x[n])
    (raw / "z.skeleton").write_text("3\n")
    all_rows = predictions_of(run, tiny_folder)
    capsys.readouterr()
    rows, one = predictions_of(run, raw), predictions_of(run, paths[1])
    assert "1 of 4 files skipped; z.skeleton: " in capsys.readouterr().err
    assert [row[0] for row in rows + one] == [path.name for path in [*paths, paths[1]]]
    for row, other in zip(rows + one, [*all_rows[:3], all_rows[1]]):
        assert row[1] == other[1]
        assert float(row[2]) == pytest.approx(float(other[2]), rel=1e-4)
    assert len(rows[0][4].split(" | ")) == 5
    assert rows[0][1] in data.bundled_classes("ntu60")[:12]               # seen and unseen classes


def test_predict_of_arrays(finished_runs, tiny_folder, light_folder, tmp_path, capsys):
    """A .npy of skeletons or features, by itself: ztest.npy of a published folder among them."""
    (run, _), features_run = finished_runs["ridge"], tmp_path / "run"
    x, features = np.load(tiny_folder / "skeletons.npy"), np.load(light_folder / "features.npy")
    np.save(tmp_path / "some.npy", x[5:9].astype(np.float16))
    np.save(tmp_path / "two.npy", np.concatenate([x[5:9], x[5:9]], 4))    # a person more than in training
    all_rows = predictions_of(run, tiny_folder)
    for name in ("some.npy", "two.npy"):
        rows = predictions_of(run, tmp_path / name)
        assert [row[:2] for row in rows] == [[f"row {n}", all_rows[n + 5][1]] for n in range(4)]
    run_main(light_folder, features_run, method="ridge")
    whole = predictions_of(features_run, light_folder)[7:10]
    np.save(tmp_path / "ztest.npy", features[7:10, :, None, None])
    rows = predictions_of(features_run, tmp_path / "ztest.npy")
    assert [(row[1], row[4]) for row in rows] == [(row[1], row[4]) for row in whole]
    assert [float(row[2]) for row in rows] == pytest.approx([float(row[2]) for row in whole])
    with ends_in_one_line(capsys, "has skeletons of 25 joints; this run takes features of width 256"):
        predictions_of(features_run, tiny_folder)


def test_predict_overwrites_nothing_unasked(finished_runs, tiny_folder, tmp_path, capsys):
    out, folder = tmp_path / "labels.npy", tmp_path / "folder"
    out.write_text("mine")
    folder.mkdir()
    command = ["predict", "--run", str(finished_runs["ridge"][0]), "--data", str(tiny_folder), "--out"]
    with ends_in_one_line(capsys, f"{out}: exists already; give another --out, or --force"):
        train.main([*command, str(out)])
    assert out.read_text() == "mine"
    train.main([*command, str(out), "--force"])
    assert out.read_text().startswith("sample,class,score")
    for force in ([], ["--force"]):
        with ends_in_one_line(capsys, f"{folder}: "):
            train.main([*command, str(folder), *force])
    assert not list(folder.iterdir())


def test_predict_with_one_file_for_both_prompts_and_one_class(finished_runs, tiny_folder, tmp_path):
    np.save(tmp_path / "one.npy", np.ones((1, 768), np.float32))
    rows = predictions_of(finished_runs["dvta"][0], tiny_folder, "--classes", str(tmp_path / "one.npy"))
    assert {(row[1], row[3], row[4]) for row in rows} == {("class 0", "", "class 0")}


def people(change=lambda x: x, joints=25):
    """→ a function that puts changed skeletons in place of a folder's features."""
    def spoiler(folder):
        x = np.stack([person(4, 0.1, seed, joints) for seed in range(5)])[..., None]
        remove("features.npy")(folder)
        save("skeletons.npy", change(x.astype(np.float32)))(folder)
    return spoiler


def class_text(*shape, names=None):
    """→ a function that writes t.npy, the text of new classes, beside a folder."""
    def spoiler(folder):
        save("t.npy", np.random.default_rng(0).normal(size=shape).astype(np.float32))(folder.parent)
        if names:
            write("t.txt", names)(folder.parent)
    return spoiler


def nothing(folder):
    """What is wrong is not the folder."""


BAD_PREDICTIONS = {  # what is wrong: (what to give, how to spoil the folder, what the one line must name)
    "no run": ("--run nowhere", nothing, "nowhere/model.pt: "),
    "no model": ("--run bad", nothing, "bad/model.pt: cannot be read"),
    "code in a model": ("--run code", nothing, "code/model.pt: cannot be read"),
    "earlier version": ("--run old", nothing, "old/model.pt: lacks classes, encoder, settings, text"),
    "no data": ("--data nowhere", nothing, "error: nowhere: "),
    "another file": ("--data mine/classes.txt", nothing, "mine/classes.txt: "),
    "no samples": ("", remove("features.npy"), "mine: has no known format; looked for skeletons.npy"),
    "feature width": ("", spoil("features.npy", lambda a: a[:, :100]),
                      "has features of width 100; this run takes features of width 256 or skeletons"),
    "infinite": ("", spoil("features.npy", with_value((3, 3), np.inf)), "features.npy: "),
    "millimetres": ("", people(lambda x: 1000 * x), "millimetres"),
    "nobody": ("", people(np.zeros_like), "mine: no sequence has a body"),
    "y down": ("", people(lambda x: x * np.float32([1, -1, 1])[:, None, None, None]), "y down"),
    "joints": ("", people(joints=20), "has skeletons of 20 joints; this run takes"),
    "only broken files": ("", write("a.skeleton", "x"), "mine: none of its 1 .skeleton files could be read"),
    "the same text": ("--classes t.npy", lambda folder: save("t.npy", np.ones((3, 768)))(folder.parent),
                      "t.npy: classes 0 and 1 have the same text"),
    "text width": ("--classes t.npy", class_text(3, 512), "t.npy: shape is (3, 1, 512); the run needs"),
    "too many tokens": ("--classes t.npy", class_text(3, 40, 768), "up to 4"),
    "other names": ("--classes t.npy", class_text(3, 768, names="a\nb"),
                    "t.txt: names 2 classes, t.npy has 3"),
    "three prompts": ("--classes t.npy t.npy t.npy", class_text(3, 768), "the run has 2 prompts"),
    "no such option": ("--plot", nothing, "--plot"),
}


@pytest.mark.parametrize("case", BAD_PREDICTIONS)
def test_bad_predictions_are_one_line_and_exit_2(case, finished_runs, light_folder, tmp_path, monkeypatch,
                                                 capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("bad", "old", "code"):
        Path(name).mkdir()
    Path("bad/model.pt").write_bytes(b"no model")
    torch.save({"method": "ridge", "state": {}}, "old/model.pt")
    torch.save({key: Evil() for key in train.MODEL_KEYS}, "code/model.pt")
    options, spoiler, message = BAD_PREDICTIONS[case]
    spoiler(light_folder)
    run, _ = finished_runs["ridge"]
    command = ["predict", "--run", str(run), "--data", str(light_folder), "--out", "p.csv"]
    with ends_in_one_line(capsys, message):
        train.main([*command, *options.split()])
    assert not Path("p.csv").exists() and not Path("evil").exists()


def test_predict_of_bodies_that_are_absent_or_lie(finished_runs, light_folder, capsys):
    run, _ = finished_runs["ridge"]
    people(with_value([1], 0))(light_folder)
    assert len(predictions_of(run, light_folder)) == 5
    error = capsys.readouterr().err
    assert error == f"note: {light_folder}: 1 of 5 sequences have no first person\n"
    spoil("skeletons.npy", lambda x: x[:, [1, 0, 2]])(light_folder)
    with ends_in_one_line(capsys, "--allow-lying"):
        predictions_of(run, light_folder)
    assert len(predictions_of(run, light_folder, "--allow-lying")) == 5


# --------------------------------------------------------------------------------- train.py: the command line
BAD_OPTIONS = {  # options: what the one line must name
    "--data synthetic --split nowhere": "nowhere",
    "--epochs 0": "epochs=0",
    "--epochs 2.5": "--epochs",
    "--epochs 2 --steps 2": "not allowed with",
    "--batch-size 0": "batch_size=0",
    "--lr nan": "lr=nan",
    "--lr -1": "lr=-1",
    "--seeds 0": "--seeds",
    "--no-sde": "--no-sde",
    "--out mine/labels.npy/run": "cannot be made (Not a directory)",
    "--set sde=maybe": "sde=maybe: does not fit; it must be",
    "--set sde=1": "sde=1: does not fit",
    "--set batch_size=1.5": "batch_size=1.5: does not fit",
    "--set lr": "lr=: does not fit",
    "--method tdm": "invalid choice: 'tdm'",
    "--batch-size x": "--batch-size",
    "--set optimizer=lion": "must be one of \"adam\", \"adamw\", \"sgd\"",
    "--method tdsm --set noises=0": "noises=0: does not fit",
    "--set only=text": "only=text: does not fit; it must be one of",
    "--set encoder.name=resnet": "encoder.name=resnet: does not fit; it must be one of",
    "--set width=64": "width: is not a setting; choose one of: batch_size, centre, ",
    "--set model=1": "model: is not a setting",
    "--set encoder.sde=true": "encoder.sde: is not a setting; choose one of: all_classes, augment, ",
    "--method ridge --set sde=false": "sde: is not a setting; choose one of: penalty",
    "--method ridge --steps 3": "steps: is not a setting",
    "--method tdsm --set width=65 heads=4": "width=65: is not a multiple of heads=4",
    "--method tdsm --set timestep=50": "timestep=50: must be from 0 to 49",
    "--gzsl --validate": "--gzsl chooses γ on the validation classes, --validate tests on them; give one",
}


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_bad_options_are_one_line_and_exit_2(options, light_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["--method", "dvta", "--split", "9_3", "--data", str(light_folder)]
    with ends_in_one_line(capsys, BAD_OPTIONS[options]):
        train.main([*command, *options.split()])
    assert not Path("runs").exists()


def test_settings_on_the_command_line(light_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["--method", "dvta", "--split", "9_3", "--data", str(light_folder), "--device", "cpu",
               "--lr", "0.001", "--set", "only=da", "sde=false", "steps=3",
               "--set", "optimizer=sgd", "encoder.augment=false", "encoder.label_smoothing=0", "warm_up=2"]
    train.main(command)
    name = ("mine_9_3_dvta_seed0_lr-0.001_only-da_sde-false_steps-3_optimizer-sgd_encoder.augment-false_"
            "encoder.label_smoothing-0_warm_up-2")
    result, preset = result_of(Path("runs") / name), train.PRESETS["other"]
    assert result["settings"]["dvta"] == preset["dvta"] | {
        "lr": 0.001, "epochs": None, "steps": 3, "optimizer": "sgd", "warm_up": 2.0,
        "model": preset["dvta"]["model"] | {"only": "da", "sde": False}}
    assert result["settings"]["encoder"] == preset["encoder"] | {"augment": False, "label_smoothing": 0.0}
    assert result["settings"]["ridge"] == preset["ridge"]
    assert type(result["settings"]["encoder"]["label_smoothing"]) is float
    train.main([*command, "--set", "only=null", "sde=true", "--out", "last"])     # the last one counts
    again = result_of(Path("last"))["settings"]["dvta"]["model"]
    assert again["only"] is None and again["sde"] is True
    assert preset == train.PRESETS["other"] and preset["dvta"]["model"]["sde"]        # as it was


@pytest.mark.parametrize("method, setting", [("dvta", "sde=false"), ("tdsm", "conditions=both"),
                                             ("ridge", "penalty=1")])
def test_a_setting_reaches_the_model(method, setting, light_folder, tmp_path):
    (_, weights), (_, others) = (run_main(light_folder, tmp_path / "run", *options, method=method)
                                 for options in ([], ["--set", setting]))
    assert weights.keys() != others.keys() or any(not torch.equal(weights[k], others[k]) for k in weights)


def test_a_run_repeated_by_its_command(light_folder, tmp_path):
    out, texts = tmp_path / "out with space", light_folder.glob("text_*.npy")
    options = ["--lr", 3e-4, "--seed", 5, "--gzsl", "--text", *texts, "--set", "only=da", "sde=false"]
    result, weights = run_main(light_folder, out, *options)
    program, script_name, *command = shlex.split(result["command"])
    assert (program, script_name) == ("python", "train.py") and "only=da" in command
    train.main(command)                                                   # it has --force
    assert without_times(result_of(out)) == without_times(result)
    assert_same_weights(weights_of(out), weights)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none(light_folder, tmp_path, capsys):
    with ends_in_one_line(capsys, "--device cuda: PyTorch finds 0 CUDA devices"):
        run_main(light_folder, tmp_path / "out", "--device", "cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("method, options", [("tdsm", []), ("dvta", ["--fp32"]),
                                             ("ridge", ["--encoder", "shiftgcn"])], ids=str)
def test_a_run_on_cuda(method, options, small_folder, tmp_path):
    options = ["--device", "cuda", "--gzsl", *options]
    result, _ = run_main(small_folder, tmp_path / "run", *options, method=method)
    assert result["precision"] == ("float32" if "--fp32" in options else "bfloat16 and TF32")
    assert result["device"] == "cuda:0" and 0 <= result["encoder"]["seen_test_acc"] <= 1
    rows = predictions_of(tmp_path / "run", small_folder)
    assert len(rows) == 96


def test_precision(light_folder, tmp_path):
    result, weights = run_main(light_folder, tmp_path / "plain", method="tdsm")
    again, same = run_main(light_folder, tmp_path / "fp32", "--fp32", method="tdsm")
    assert result["precision"] == again["precision"] == "float32"
    assert not result["settings"]["tdsm"]["model"]["fp32"] and again["settings"]["tdsm"]["model"]["fp32"]
    assert_same_weights(weights, same)                                    # a CPU has float32 either way
    args = train.run_arguments(["--method", "dvta", "--split", "9_3"])
    for device, fp32, precision in (("cuda", False, "bfloat16 and TF32"), ("cuda", True, "float32"),
                                    ("cpu", False, "float32")):
        args.device, args.fp32 = torch.device(device), fp32
        assert train.precision_of(args) == precision


def test_setup_lists_every_module():
    text = (ROOT / "setup.py").read_text()
    modules = {path.stem for path in ROOT.glob("*.py")} - {"setup", "test_zsar"}
    assert modules and all(f'"{module}"' in text for module in modules)


# -------------------------------------------------------------------------------------------------- real data
@pytest.mark.skipif("ZSAR_DATA" not in os.environ, reason="set ZSAR_DATA=path/to/kinect28")
class TestKinect28:
    FOLDER = Path(os.environ.get("ZSAR_DATA", "."))

    @pytest.mark.parametrize("split", ["22_6_a", "22_6_b", "22_6_c", "22_6_d", "22_6_e"])
    def test_splits(self, split):
        d = data.read_data(self.FOLDER, split)
        assert (len(d.seen), len(d.unseen), d.skeletons.shape) == (22, 6, (765, 3, 64, 25, 1))
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
        x, labels, subjects = (np.load(self.FOLDER / f"{name}.npy")
                               for name in ("skeletons", "labels", "subjects"))
        raw.mkdir()
        for n in range(len(x)):                                           # names in the order of the rows
            name = f"S{1 + n // 100:03}C{1 + n % 100:03}P{subjects[n]:03}R001A{labels[n] + 1:03}"
            write_skeleton(raw / f"{name}.skeleton", x[n])
        data.prepare(raw, out)
        np.testing.assert_allclose(np.load(out / "skeletons.npy"), x, atol=1e-5)
        assert np.array_equal(np.load(out / "labels.npy"), labels)
        for name in ("classes.txt", "splits.json", "text_label.npy", "text_description.npy", "subjects.npy"):
            shutil.copy(self.FOLDER / name, out / name)
        (out / "training.npy").unlink()
        (result, weights), (again, weights_again) = (
            run_main(folder, tmp_path / name / "run", "--encoder-epochs", 1, method="ridge", split="22_6_a")
            for folder, name in ((self.FOLDER, "0"), (out, "1")))
        assert result["zsl"] == again["zsl"] and result["zsl"]["n"] == 83 and result["zsl"]["chance"] == 1 / 6
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


# ------------------------------------------------------------------------------------------------------- docs
def load_script(name):
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def plot():
    """docs/plot.py as a module."""
    pytest.importorskip("matplotlib")
    return load_script("plot")


def texts_of(figure):
    """All text of a figure, one string."""
    Text = importlib.import_module("matplotlib.text").Text
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def write_result(folder, **changes):
    """A run's folder with a result.json: three unseen classes, the second without samples → the folder."""
    generalized = {"seen": 0.6, "unseen": 0.3, "harmonic": 0.4, "ausuc": 0.25,
                   "curve": [[0.0, 0.8, 0.1], [1.0, 0.6, 0.3], [2.0, 0.0, 0.5]]}
    zsl = {"acc": 0.625, "ci95": [0.25, 0.875], "chance": 1 / 3,
           "confusion": [[3, 1, 0], [0, 0, 0], [2, 0, 2]]}
    history = [{"epoch": epoch, "loss": 3 / epoch, "acc_on_test": 0.1 * epoch} for epoch in (1, 2)]
    result = {"method": "dvta", "dataset": "synthetic", "split": "55_5", "seed": 0, "note": "SYNTHETIC DATA",
              "validate": False, "data_sha256": "f0", "unseen_classes": ["walk", "jump", "run"], "zsl": zsl,
              "gzsl": generalized, "ridge": {"acc": 0.4, "gzsl": generalized}, "history": history}
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
    ridge = write_result(tmp_path / "ridge", method="ridge", note=None, history=[], validate=True)
    text = texts_of(plot.draw_runs([ridge])[1])
    assert "among the validation classes" in text and text.count("ridge: AUSUC") == 1
    assert "SYNTHETIC" not in text
    plain = write_result(tmp_path / "plain", gzsl=None, ridge={"acc": 0.4, "gzsl": None})
    assert "without --gzsl" in texts_of(plot.draw_runs([plain])[1])


def test_the_comparison_of_a_run_and_one_of_two_seeds(plot, tmp_path):
    first, seeds = write_result(tmp_path / "first"), write_result(tmp_path / "seeds")
    results = [result_of(seeds) | {"method": "tdsm", "seed": seed} for seed in (7, 8)]
    (seeds / "result.json").write_text(json.dumps({"seeds": results}))
    path, figure = plot.draw_runs([first, seeds])
    assert path == first / "comparison.png"
    text, bars = texts_of(figure), figure.axes[0]
    for part in ("dvta, seed 0\nfirst", "tdsm, seed 7\nseeds", "tdsm, seed 8\nseeds", "62.5% [25.0%, 87.5%]"):
        assert part in text
    assert text.count("AUSUC") == 3
    assert [bar.get_width() for bar in bars.patches] == [0.625] * 3
    assert [ridge.get_segments()[0][0][0] for ridge in bars.collections] == [0.4] * 3


@pytest.mark.parametrize("source", ["skeletons.npy", "seen_train_data.npy", "1.skeleton"])
@pytest.mark.parametrize("is_folder", [True, False])
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
}


@pytest.mark.parametrize("options", BAD_PLOTS)
def test_bad_plots_are_one_line_and_exit_2(options, plot, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (write_result(Path("run")) / "figures.png").write_text("mine")
    write_result(Path("other"), data_sha256="f1")
    np.save("labels.npy", np.arange(5))
    np.save("mediapipe.npy", np.ones((1, 3, 4, 33, 1)))
    Path("chain").mkdir()
    np.save("chain/skeletons.npy", np.ones((1, 3, 4, 25, 1)))
    graph = {"edges": [[1, 0], [2, 1]], "centre": 1, "root": [1], "shoulders": [0, 2]}
    Path("chain/graph.json").write_text(json.dumps(graph))
    Path("a.skeleton").write_text("3\n")
    monkeypatch.setattr(sys, "argv", ["plot.py", *options.split()])
    error = one_line_of(lambda: plot.command_line(plot.main), capsys)
    assert error.startswith("error: ") and BAD_PLOTS[options] in error
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
