"""Every test: `pytest test_zsar.py`. With ZSAR_DATA=path/to/kinect28 the real-data tests run too."""
import contextlib
import csv
import importlib.util
import inspect
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
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
    def spoiler(folder):
        np.save(folder / name, change(np.load(folder / name)))
    return spoiler


def with_value(index, value):
    def change(array):
        array[index] = value
        return array
    return change


def write(name, content):
    """→ a function that overwrites a file of a folder."""
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
    first, later = zsar.STGCNBlock(4, 4, A, first=True).eval(), zsar.STGCNBlock(4, 4, A).eval()
    x = torch.rand(1, 4, 6, 25)
    for block in (first, later):                                          # silence the branch:
        block.temporal[1].weight.data.zero_()                             # only the residual is left
    assert first(x).abs().max() == 0
    torch.testing.assert_close(later(x), x)


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
    shift = zsar.TemporalShift(5, stride).double()
    shift.delta.data = torch.tensor([-0.7, 0.0, 0.4, 2.6, -9.3], dtype=torch.float64)
    x = torch.randn(3, 5, frames, dtype=torch.float64, requires_grad=True)
    y = shift(x)
    torch.testing.assert_close(y, plain_temporal_shift(x.detach(), shift.delta, stride))
    # the gradient of x by finite differences, that of δ is 0.01·sign
    weight = torch.randn_like(y)
    gradient, of_delta = torch.autograd.grad((y * weight).sum(), [x, shift.delta])
    step = 1e-6
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
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(again.eval()(x), encoder.eval()(x))


def test_shiftgcn_norms_all_joints_of_all_persons_and_means_over_persons():
    encoder = zsar.ShiftGCN(5, 2, 3)
    x = torch.randn(4, 3, 6, 5, 2) * 3 + 1
    encoder(x)
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
    g = torch.Generator().manual_seed(0)
    pose, frames = torch.randn(200, 3, 25, 1, generator=g), torch.arange(9)
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
    ridge = zsar.Ridge(text, torch.arange(4), x, penalty=3.0)
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
    ridge = zsar.Ridge(random_text(), torch.arange(4), x, penalty=3.0)
    ridge.fit(x, y)
    dvta = DVTA(random_text(), torch.arange(4), x, standardise=True)
    tdsm = random_tdsm(x=x)
    for model in (ridge, dvta, tdsm):
        scores = [model.scores(part, torch.arange(5)) for part in (x, moved)]
        torch.testing.assert_close(*scores, atol=0.01, rtol=0.01)


def test_z_scores_by_hand():
    scores = zsar.z_scores(torch.tensor([[10., 20, 30], [-1, 1, 0], [5, 5, 5]]))
    expected = torch.tensor([[-A, 0, A], [-A, A, 0], [0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(scores, expected)


def test_zsl_figures_by_hand():
    scores = torch.tensor([[9., 1, 1], [1, 9, 1], [9, 1, 1], [1, 9, 1]])
    classes = np.array([4, 7, 8])                                         # class 8 has no sample
    figures = zsar.zsl_figures(scores, np.array([4, 4, 4, 7]), classes)
    z2 = 1.96 ** 2                                                        # Wilson's: of 4 samples, 3 hits
    middle, half = (3 + z2 / 2) / (4 + z2), math.sqrt(z2 * (3 / 4 + z2 / 4)) / (4 + z2)
    assert figures.pop("ci95") == pytest.approx([middle - half, middle + half])
    assert figures == {"acc": 0.75, "per_class": (2 / 3 + 1) / 2, "chance": 1 / 3, "n": 4,
                       "class_acc": [2 / 3, 1.0, None], "confusion": [[2, 1, 0], [0, 1, 0], [0, 0, 0]]}


def test_the_wilson_interval_by_hand():
    low, high = zsar.wilson_interval(np.array([0, 18, 9]), np.array([18, 18, 18]))
    z2 = 1.96 ** 2
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
    with seeded(seed):
        return DVTA(random_text(), torch.arange(4), torch.zeros(1, 256), **switches)


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


SWITCHES = [{}, {"sde": False}, {"only": "da"}, {"only": "aa"}]


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_dvta_loss_and_gradients_against_loops_in_float64(switches, monkeypatch):
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


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_dvta_scores_against_loops_in_float64(switches, monkeypatch):
    monkeypatch.setitem(alignment.PAIRS_AT_ONCE, "cpu", 8)                # several chunks
    model = random_dvta(**switches).double()
    model.head.fc2.weight.data *= 30
    x, classes = torch.randn(7, 256, dtype=torch.float64), torch.tensor([4, 0, 2])
    expected = torch.zeros(7, 3, dtype=torch.float64)
    for n in range(7):
        v = plain_projector(model, x[n])
        for k, c in enumerate(classes):
            expected[n, k] = plain_dvta_score(model, v, c, v)
    torch.testing.assert_close(model.scores(x, classes), expected.detach())


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
    with seeded(seed):
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
        self.denoiser = PlainCrossDiT(256, self.tokens.shape[2], self.tokens.shape[1], width, depth, heads)

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
        triplet = ((right - other + self.margin).clamp(min=0) * (y != wrong)).mean()
        return right.mean() + self.triplet_weight * triplet, right.mean(), other.mean()

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
    last_text = model.denoiser.blocks[-1].text
    assert not hasattr(last_text, "mlp")
    assert last_text.kv.out_features == 2 * 8
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


def test_the_triplet_term():
    model, plain, g = random_tdsm(), random_tdsm(triplet_weight=0.0), torch.Generator().manual_seed(5)
    x, noise = torch.randn(4, 256, generator=g), torch.randn(4, 256, generator=g)
    y, t = torch.arange(4), torch.tensor([3, 20, 30, 49])
    wrong = (y + 1) % 4
    # y′ = y: no term
    assert torch.equal(model.triplet_loss(x, y, y, t, noise)[0], plain.triplet_loss(x, y, y, t, noise)[0])
    model.margin = 100.0                                                     # violated by every sample
    loss, right, other = model.triplet_loss(x, y, wrong, t, noise)
    torch.testing.assert_close(loss - right, right - other + 100.0)
    # descending the term lowers e⁺ and pushes e⁻ up
    parameters = list(model.denoiser.parameters())
    pull, push = (torch.autograd.grad(e, parameters, retain_graph=True) for e in (right, other))
    term = torch.autograd.grad(loss - right, parameters)
    for both, a, b in zip(term, pull, push):
        torch.testing.assert_close(both, a - b, rtol=1e-3, atol=1e-4)
    model.margin = -100.0                                                    # kept by every sample
    assert torch.equal(model.triplet_loss(x, y, wrong, t, noise)[0], right)


@pytest.mark.parametrize("prediction, unit", [("epsilon", 1), ("sample", 0.0625), ("v_prediction", 1)])
def test_the_margin_is_in_units_of_the_targets_variance(prediction, unit):
    model, g = random_tdsm(prediction=prediction, scale=0.25, margin=100.0), torch.Generator().manual_seed(5)
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
        assert model.samples_per_chunk(3) == samples
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
    raw = TDSM(random_text(), torch.arange(4), x, width=8, depth=1, heads=1, standardise=False)
    assert torch.equal(raw.standardised(x), x)
    small = TDSM(random_text(), torch.arange(4), x, width=8, depth=1, heads=1, scale=0.25)
    torch.testing.assert_close(small.standardised(x), z / 4)


def test_tdsm_text_at_scale_against_the_plain_formulas():
    seen = torch.tensor([0, 2, 3])
    of_length_1 = [F.normalize(prompt, dim=-1) * 1.003 for prompt in random_text()]   # stored in float16, say
    of_length_1[0][:, 2] = 0                                              # padding
    small = {"x": torch.zeros(1, 256), "width": 8, "depth": 1, "heads": 1}
    model = TDSM(of_length_1, seen, **small, unit_text=True, centre=True)
    for p, prompt in enumerate(of_length_1):
        channels = slice(12 * p, 12 * p + 12)
        torch.testing.assert_close(model.tokens[..., channels].norm(dim=-1) > 0, prompt[:, 1:].any(-1))
        assert model.tokens[:, 0, channels].square().mean(-1).sub(1).abs().max() < 1e-5
        at_scale = prompt[:, 0] / prompt[:, 0].norm(dim=-1, keepdim=True) * math.sqrt(12)
        centred = at_scale - (at_scale[0] + at_scale[2] + at_scale[3]) / 3
        expected = centred / centred.norm(dim=-1, keepdim=True) * math.sqrt(12)
        torch.testing.assert_close(model.pooled_vectors()[:, channels], expected)
    longer = [30 * prompt for prompt in of_length_1]                      # CLIP's: as it is
    model = TDSM(longer, seen, **small, unit_text=True)
    assert torch.equal(model.pooled_vectors(), torch.cat([prompt[:, 0] for prompt in longer], -1))
    assert torch.equal(model.tokens, torch.cat([prompt[:, 1:] for prompt in longer], -1))


def test_statistics_are_kept_in_the_weights():
    """A trained model on the text of other classes, and no training data at hand, scores as before."""
    x, y, seen, other = torch.randn(40, 256) + 1, torch.arange(40) % 4, torch.arange(4), random_text(seed=3)
    whole = [torch.cat([mine, theirs]) for mine, theirs in zip(random_text(), other)]
    at_scale = {"standardise": True, "centre": True}
    methods = ((zsar.Ridge, {"penalty": 1.0}), (DVTA, at_scale),
               (TDSM, at_scale | {"width": 8, "depth": 1, "heads": 1}))
    for method, settings in methods:
        model = method(whole, seen, x, **settings)
        if method is zsar.Ridge:
            model.fit(x, y)
        rebuilt = method(other, torch.tensor([0]), torch.zeros(1, 256), **settings)
        rebuilt.load_state_dict(model.state_dict())
        expected = model.scores(x, torch.arange(5, 10))
        torch.testing.assert_close(rebuilt.scores(x, torch.arange(5)), expected)


@pytest.mark.parametrize("width", [64, 512])
def test_methods_take_features_of_any_width(width):
    x, y, classes = torch.randn(40, width), torch.arange(40) % 4, torch.arange(5)
    ridge = zsar.Ridge(random_text(), torch.arange(4), x, penalty=1.0)
    ridge.fit(x, y)
    dvta = DVTA(random_text(), torch.arange(4), x)
    tdsm = TDSM(random_text(), torch.arange(4), x, width=8, depth=2, heads=2)
    for model in (ridge, dvta, tdsm):
        assert model.scores(x, classes).shape == (40, 5)
    for model in (dvta, tdsm):
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
    x, text = torch.randn(30, 256), random_text()
    return {"dvta": DVTA(text, torch.arange(4), x, standardise=True, centre=True),
            "tdsm": random_tdsm(centre=True, unit_text=True),
            "stgcn": zsar.STGCN(zsar.NTU25, 25, 4),
            "shiftgcn": zsar.ShiftGCN(25, 2, 4)}


def loss_on_meta(model):
    """The loss of a method or an encoder on a batch of six that has no numbers."""
    x, y = torch.ones(6, 256, device="meta"), torch.arange(6, device="meta") % 4
    if hasattr(model, "scores"):
        return model(x, y)
    x = torch.ones(6, 3, 8, 25, 2, device="meta")
    return F.cross_entropy(model.classify(zsar.augmented(x)), y)


@pytest.mark.parametrize("name", ["dvta", "tdsm", "stgcn", "shiftgcn", "ridge"])
def test_no_tensor_is_made_on_a_default_device(name, monkeypatch):
    """On "meta", where there are only shapes, one tensor of a CPU's would be refused."""
    monkeypatch.setitem(alignment.PAIRS_AT_ONCE, "meta", 8)
    monkeypatch.setitem(diffusion.MEMORY_BUDGET, "meta", 1 << 12)
    if name == "ridge":
        model = zsar.Ridge(random_text(), torch.arange(4), torch.zeros(1, 256), 1.0).to("meta")
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
        step, batch = model, (x, y)
    elif name == "tdsm":
        step, batch = model.triplet_loss, (x, y, y.flip(0), 9 * y, torch.randn(6, 256))
    else:
        model.eval()                                                      # dropout would draw again
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


# ------------------------------------------------------------------------------ data.py: downloaded skeletons
NAMES = ["S001C001P001R001A001", "S001C002P003R001A013", "S002C003P001R002A060", "S003C001P009R002A002",
         "S003C002P002R001A007"]
ROWS = [(0, True, 1, 1, 1), (12, False, 3, 2, 1), (59, True, 1, 3, 2), (1, True, 9, 1, 3), (6, True, 2, 2, 3)]


def recordings():
    """Five recordings of 20 frames, (3, 20, 25, 1 or 2); the second holds two persons, the mover second."""
    x = [person(20, 0.1, seed=i)[..., None] for i in range(5)]
    x[1] = np.concatenate([x[1], person(20, 0.4, seed=9)[..., None] + np.array([1, 0, 0])[:, None, None, None]], -1)
    return x


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


# ------------------------------------------------------------------------------- bodies become people
def track(start, stop, seed=0, motion=0.1, wide=1.0):
    """A track of the frames from start to stop: a person of that seed, made `wide` times as wide."""
    xyz = person(100, motion, seed).transpose(1, 2, 0)[start:stop].copy()
    xyz[..., 0] *= wide
    return list(range(start, stop)), xyz


def joined(*tracks):
    return np.concatenate([xyz for _, xyz in tracks])


@pytest.mark.parametrize("tracks", [
    [track(0, 30), track(30, 60)],
    [track(0, 20), track(20, 40), track(40, 60)],
    [track(0, 30), track(35, 60)],                                        # nobody for five frames
    [track(20, 40), track(0, 20), track(40, 60)],
], ids=["once", "twice", "with a gap", "in another order"])
def test_a_person_whose_id_changes_is_one_person(tracks):
    people = data.people_of(tracks)
    whole = joined(*sorted(tracks, key=lambda t: t[0][0]))
    np.testing.assert_array_equal(people[0], whole)                       # frames without a body are dropped
    assert not people[1].any()


def test_a_person_lost_and_found_under_the_old_id():
    """0-19 and 40-59 under one id, 20-39 under another: all the same person."""
    outer = track(0, 60)
    frames = [*range(20), *range(40, 60)]
    people = data.people_of([(frames, outer[1][frames]), track(20, 40)])
    np.testing.assert_array_equal(people[0], outer[1])
    assert not people[1].any()


def test_two_people_of_whom_one_changes():
    mover, first, second = track(0, 60, 1, motion=0.6), track(0, 25, 2), track(25, 60, 2)
    people = data.people_of([first, mover, second])
    np.testing.assert_array_equal(people[0], mover[1])                    # the one with the most motion
    np.testing.assert_array_equal(people[1], joined(first, second))
    third = track(0, 60, 3, motion=0.01)
    np.testing.assert_array_equal(data.people_of([first, mover, second, third]), people)


def test_ghosts_are_dropped():
    actor = track(0, 60)
    chair = track(0, 60, 5, motion=2, wide=9)
    assert (np.ptp(chair[1][..., 0], axis=1) > 0.8 * np.ptp(chair[1][..., 1], axis=1)).all()
    for ghosts in ([chair], [track(10, 21, 4, motion=3)], [chair, track(10, 21, 4)]):
        people = data.people_of([*ghosts, actor])
        np.testing.assert_array_equal(people[0], actor[1])
        assert not people[1].any()
    assert data.people_of([track(10, 22, 4), actor])[1].any()             # 12 frames are a person
    assert len(data.people_of([track(10, 15)])[0]) == 5                   # the only one, however short
    people = data.people_of([chair, track(0, 60, 6, motion=0.01, wide=9)])      # all are wide: the most motion
    np.testing.assert_array_equal(people[0], chair[1])


def test_the_motion_of_a_partly_wide_body_is_that_of_its_plausible_frames():
    still, sprawling = track(0, 60, 1, motion=0.3), track(0, 60, 2, motion=0.01)
    sprawling[1][:30, :, 0] *= 20
    assert data._motion(sprawling[1]) > data._motion(still[1]) > data._motion(sprawling[1][30:])
    people = data.people_of([sprawling, still])
    np.testing.assert_array_equal(people[0], still[1])
    np.testing.assert_array_equal(people[1], sprawling[1])
    sprawling[1][30:45, :, 0] *= 20                                       # 75 % of the frames
    assert not data.people_of([sprawling, still])[1].any()


def test_a_late_main_actor_changes_places():
    late, early = track(20, 60, 1, motion=0.6), track(0, 60, 2)
    people = data.people_of([late, early])
    np.testing.assert_array_equal(people[0], early[1])
    np.testing.assert_array_equal(people[1][20:], late[1])
    assert not people[1][:20].any()


def test_resampling_by_hand():
    ramp = np.arange(4.0)[:, None, None] + np.ones((4, 25, 3))            # 1 2 3 4
    people = np.stack([ramp, np.where(np.arange(4)[:, None, None] < 2, ramp, 0)])
    x = data.resampled(people, 7)                                         # (3, 7, 25, 2)
    assert x[0, :, 0, 0].tolist() == [1, 1.5, 2, 2.5, 3, 3.5, 4]
    assert x[0, :, 0, 1].tolist() == [1, 1.5, 2, 2, 0, 0, 0]              # as in the nearer frame, then absent
    gap = np.concatenate([people, 0 * people[:, :2], people], 1)
    assert data.resampled(gap, 8)[1, :, 3, 0].tolist() == [1, 2, 3, 4, 1, 2, 3, 4]
    assert data.resampled(people[:1], 4).shape == (3, 4, 25, 2)
    for bad, reason in ((0 * people, "no body"), (people * np.nan, "not finite"), (people * 1e4, "exceeds")):
        with pytest.raises(ValueError, match=reason):
            data.resampled(bad, 4)


# ------------------------------------------------------------------------------------------ NTU, raw
def test_ntu_preparation(raw_ntu, tmp_path):
    (raw_ntu / "S001C001P001R001A002.skeleton").write_text("")
    (raw_ntu / "notes.txt").write_text("x")
    done = script("data.py", raw_ntu, "out", "--frames", 20, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "5 samples, 1 skipped" in done.stdout
    assert done.stderr == f"note: {raw_ntu}: 1 other files are not read\n"
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {
        "cameras.npy", "classes.txt", "labels.npy", "setups.npy", "skeletons.npy", "skipped.csv",
        "subjects.npy", "training.npy"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "raw"]
    x = np.load(out / "skeletons.npy", mmap_mode="r")
    assert isinstance(x, np.memmap) and x.shape == (5, 3, 20, 25, 2) and x.dtype == np.float32
    expected = recordings()
    for n, row in enumerate(x):
        np.testing.assert_allclose(row[..., 0], expected[n][..., -1], rtol=1e-6)  # the mover is the main actor
    np.testing.assert_allclose(x[1, ..., 1], expected[1][..., 0], rtol=1e-6)
    assert not x[[0, 2, 3, 4], ..., 1].any()
    for column, name in enumerate(data.COLUMNS):
        assert np.load(out / f"{name}.npy").tolist() == [row[column] for row in ROWS]
    assert data.read_lines(out / "classes.txt") == data.bundled_classes("ntu60")
    assert skipped_in(out) == [["S001C001P001R001A002.skeleton", "is truncated"]]
    with pytest.raises(data.InputError, match="out: exists already"):
        data.prepare(raw_ntu, out)


@pytest.mark.parametrize("protocol, training", [("xview", [False, True, True, False, True]),
                                                ("xset", [False, False, True, False, False])])
def test_ntu_protocols(raw_ntu, tmp_path, protocol, training):
    data.prepare(raw_ntu, tmp_path / "out", frames=8, protocol=protocol)
    assert np.load(tmp_path / "out" / "training.npy").tolist() == training


def test_ntu_recordings_with_changing_ids_hold_one_person(tmp_path):
    x = person(60, 0.1)[..., None]
    for n in range(3):
        ids = [[7 * (t >= 30) + 9 * (t >= 45) * (n == 2)] for t in range(60)]
        write_skeleton(tmp_path / f"{NAMES[n]}.skeleton", x, ids if n else None)
    whole, *changed = (data.read_ntu(tmp_path / f"{NAMES[n]}.skeleton", 64) for n in range(3))
    assert whole[..., 0].any((0, 2)).all()
    for skeleton in changed:
        np.testing.assert_array_equal(skeleton, whole)


def test_encodings_suffixes_and_links(raw_ntu, tmp_path):
    path = raw_ntu / f"{NAMES[1]}.skeleton"
    expected, text = data.read_ntu(path, 20), path.read_text()
    for content in (b"\xef\xbb\xbf" + text.encode(), text.encode("utf-16"), text.replace("\n", "\r\n").encode()):
        path.write_bytes(content)
        np.testing.assert_array_equal(data.read_ntu(path, 20), expected)
    path.rename(path.with_suffix(".SKELETON"))
    (raw_ntu / "nested" / "up").symlink_to(raw_ntu)                       # a link to a folder above
    shutil.move(raw_ntu / "nested", tmp_path / "elsewhere")
    (raw_ntu / "nested").symlink_to(tmp_path / "elsewhere")
    data.prepare(raw_ntu, tmp_path / "out", frames=20)
    assert np.load(tmp_path / "out" / "labels.npy").tolist() == [row[0] for row in ROWS]
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "skeletons.npy")[1], expected)


def with_coordinate(new):
    """→ a function that changes one coordinate of a .skeleton file, its word 14."""
    return lambda text: text.replace(text.split()[14], new, 1)


BROKEN = {  # kind: (what happens to a good file, the reason)
    "empty": (lambda text: "", "is truncated"),
    "truncated": (lambda text: text[:len(text) // 2], "is truncated"),
    "last number gone": (lambda text: text.rsplit(None, 1)[0], "is truncated"),
    "not a number": (with_coordinate("x.y"), "could not convert string to float: 'x.y'"),
    "not a count": (lambda text: text.replace("20\n1\n", "20\none\n", 1), "invalid literal for int"),
    "NaN": (with_coordinate("nan"), "a coordinate is not finite, or exceeds 1000 m"),
    "far away": (with_coordinate("1e30"), "a coordinate is not finite, or exceeds 1000 m"),
    "joint count": (lambda text: text.replace("\n25\n", "\n24\n", 1), "24 joints in frame 0, must be 25"),
    "more than its frames": (lambda text: text + "1\n", "continues after its 20 frames"),
    "nobody": (lambda text: "3\n0\n0\n0\n", "no body"),
    "no frames": (lambda text: "0\n", "no body"),
}


def test_every_broken_file_is_skipped_with_its_reason(raw_ntu, tmp_path):
    good = (raw_ntu / f"{NAMES[2]}.skeleton").read_text()
    for i, (spoil, _) in enumerate(BROKEN.values()):
        (raw_ntu / f"S004C001P001R001A{i + 1:03}.skeleton").write_text(spoil(good))
    (raw_ntu / "S004C001P001R001A121.skeleton").write_text(good)
    (raw_ntu / "holiday.skeleton").write_text(good)
    (raw_ntu / "S004C001P001R001A100.skeleton").symlink_to("nowhere")
    data.prepare(raw_ntu, tmp_path / "out", frames=10)
    reasons = dict(skipped_in(tmp_path / "out"))
    for i, (_, reason) in enumerate(BROKEN.values()):
        assert reason in reasons[f"S004C001P001R001A{i + 1:03}.skeleton"]
    for name in ("S004C001P001R001A121.skeleton", "holiday.skeleton"):
        assert "its name is not SsssCcccPpppRrrrAaaa" in reasons[name]
    assert reasons["S004C001P001R001A100.skeleton"] == "No such file or directory"
    assert len(reasons) == len(BROKEN) + 3
    assert len(np.load(tmp_path / "out" / "labels.npy")) == 5


# ------------------------------------------------------------------------------- the forms of NTU
def as_people(x):
    """A recording (3, F, V, M) as a published preparation orders it: the main actor first, (M, F, V, 3)."""
    return x.transpose(3, 1, 2, 0)[::-1]


def write_pyskl(path, **changes):
    annotations = [{"frame_dir": name, "label": row[0], "total_frames": 20,
                    "keypoint": as_people(x).astype(np.float16)}
                   for name, row, x in zip(NAMES, ROWS, recordings())]
    for entry in annotations:
        entry.update(changes)
    split = {"xsub_train": [n for n, row in zip(NAMES, ROWS) if row[1]],
             "xsub_val": [n for n, row in zip(NAMES, ROWS) if not row[1]], "xview_train": NAMES[1:3]}
    path.write_bytes(pickle.dumps({"split": split, "annotations": annotations}))
    return path


def write_ctrgcn(path, width=60):
    x, y = np.zeros((5, 300, 150), np.float32), np.zeros((5, width))
    for n, (recording, row) in enumerate(zip(recordings(), ROWS)):
        people = as_people(recording)
        people = np.concatenate([people, np.zeros_like(people)])[:2]
        shown = people.any((2, 3), keepdims=True)
        people = (people - people[0, 0, 1]) * shown                       # the origin at joint 2
        x[n, :20] = people.swapaxes(0, 1).reshape(20, 150)
        y[n, row[0]] = 1
    trains = np.array([row[1] for row in ROWS])
    np.savez(path, x_train=x[trains], y_train=y[trains], x_test=x[~trains], y_test=y[~trains])
    return path


def write_agcn(folder, fill):
    """2s-AGCN's folder; `fill` repeats sequences up to 300 frames instead of zeros."""
    folder.mkdir()
    trains = np.array([row[1] for row in ROWS])
    for part, rows in (("train", np.flatnonzero(trains)), ("val", np.flatnonzero(~trains))):
        x = np.zeros((len(rows), 3, 300, 25, 2), np.float32)
        for n, row in enumerate(rows):
            people = as_people(recordings()[row]).transpose(3, 1, 2, 0)           # (3, 20, V, M)
            x[n, :, :20, :, :people.shape[3]] = people
            if fill:
                x[n] = np.tile(x[n, :, :20], (1, 15, 1, 1))
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
    if form == "ctrgcn":                                                  # their origin is joint 2, first frame
        assert set(other) == {"skeletons", "labels", "training"}
        expected = (expected - expected[:, :, :1, 1:2, :1]) * expected.any((1, 3), keepdims=True)
    else:
        assert all(np.array_equal(other[name], raw[name]) for name in data.COLUMNS)
    np.testing.assert_allclose(x, expected, atol=2e-3 if form == "pyskl" else 1e-5)
    assert np.array_equal(other["labels"], raw["labels"])
    assert np.array_equal(other["training"], raw["training"])
    assert data.read_lines(tmp_path / "out" / "classes.txt") == data.bundled_classes("ntu60")


def test_a_large_npz_is_read_in_pieces(tmp_path):
    x = np.arange(600 * 4, dtype=np.float32).reshape(600, 4)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", x=x)
        parts = list(data._rows_of_member(tmp_path / "x.npz", "x.npy"))
        assert [len(part) for part in parts] == [256, 256, 88]
        np.testing.assert_array_equal(np.concatenate(parts), x)
    whole = (tmp_path / "x.npz").read_bytes()
    for content in (whole[:len(whole) // 2], whole[:-200], b"x"):
        (tmp_path / "x.npz").write_bytes(content)
        with pytest.raises(data.InputError, match="x.npz: x.npy cannot be read"):
            list(data._rows_of_member(tmp_path / "x.npz", "x.npy"))


def test_pku_as_npz(tmp_path):
    x = np.stack([data.resampled(as_people(r), 64) for r in recordings()])        # (5, 3, 64, 25, 2)
    np.savez(tmp_path / "pkuv1_xsub.npz", x_train=x[:3], y_train=np.array([[4], [50], [0]]), x_test=x[3:],
             y_test=np.array([[1], [2]]))
    data.prepare(tmp_path / "pkuv1_xsub.npz", tmp_path / "out", frames=64)
    np.testing.assert_allclose(np.load(tmp_path / "out" / "skeletons.npy"), x, rtol=1e-5)
    assert np.load(tmp_path / "out" / "labels.npy").tolist() == [4, 50, 0, 1, 2]
    assert np.load(tmp_path / "out" / "training.npy").tolist() == [True, True, True, False, False]
    assert data.read_lines(tmp_path / "out" / "classes.txt") == data.bundled_classes("pku51")


class Evil:
    """A pickle of it runs a command when it is loaded carelessly."""

    def __reduce__(self):
        return os.system, ("touch evil",)


def test_pickles_never_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.pkl"
    for value in (Evil(), {"split": {}, "annotations": [Evil()]}, np.array([Evil()], object)):
        path.write_bytes(pickle.dumps(value))
        for arrays in (False, True):
            with pytest.raises(data.InputError, match=r"names (posix|nt)\.system, which could run code|names numpy"):
                data._read_pickle(path, arrays)
    path.write_bytes(pickle.dumps(np.arange(3)))
    with pytest.raises(data.InputError, match=r"names numpy\._?core.*_reconstruct"):
        data._read_pickle(path)
    for protocol in range(2, 6):
        for value in (np.arange(6, dtype=np.float16).reshape(2, 3), np.float32(2), np.int64(7)):
            path.write_bytes(pickle.dumps({"a": [value]}, protocol))
            assert np.array_equal(data._read_pickle(path, arrays=True)["a"][0], value)
    assert not (tmp_path / "evil").exists()


# ------------------------------------------------------------------------------------------------ PKU
def write_pku(raw, name, video, labels, folders=("Data/PKU_Skeleton_Renew", "Label/Train_Label_PKU_final")):
    """Write a PKU-MMD video (frames, 150) and the lines of its labels, with blank last lines."""
    frames = [" ".join(map(repr, frame)) for frame in video.tolist()]
    for folder, lines in zip(folders, (frames, labels)):
        (raw / folder).mkdir(parents=True, exist_ok=True)
        (raw / folder / f"{name}.txt").write_text("\n".join(lines) + "\n\n")


@pytest.fixture
def raw_pku(tmp_path):
    """Two PKU-MMD videos of 60 frames, two segments each; a second person in the first of 0003-M only."""
    raw, video = tmp_path / "pku", np.zeros((60, 2, 25, 3))
    video[:, 0] = person(60, 0.3).transpose(1, 2, 0)
    write_pku(raw, "0002-L", video.reshape(60, 150), ["5,1,20,2", "51.0,31.0,60.0,1.0"])
    video[:20, 1] = person(20, 0.1, seed=1).transpose(1, 2, 0)
    write_pku(raw, "0003-M", video.reshape(60, 150), ["1,0,20,2", "2,21,40,2"])
    (raw / "Split").mkdir()
    for name, lists in (("subject", ("0002-L, 0004-R", "0003-M")), ("view", ("0003-M", "0002-L,"))):
        text = f"Training videos:\n{lists[0]}, \nValidation videos:\n{lists[1]}\n"
        (raw / "Split" / f"cross-{name}.txt").write_text(text)
    return raw


def test_pku_preparation(raw_pku, tmp_path):
    data.prepare(raw_pku, tmp_path / "out", frames=20)
    x = np.load(tmp_path / "out" / "skeletons.npy")
    assert x.shape == (4, 3, 20, 25, 2)
    assert np.load(tmp_path / "out" / "labels.npy").tolist() == [4, 50, 0, 1]
    assert np.load(tmp_path / "out" / "training.npy").tolist() == [True, True, False, False]
    actor = person(60, 0.3)
    np.testing.assert_allclose(x[0, ..., 0], actor[:, :20], rtol=1e-6)    # frames 1 to 20, both included
    np.testing.assert_allclose(x[1, :, [0, 19], :, 0], actor[:, [30, 59]].swapaxes(0, 1), rtol=1e-6)
    np.testing.assert_allclose(x[2, ..., 0], actor[:, :20], rtol=1e-6)    # 0 is the first frame
    np.testing.assert_allclose(x[2, ..., 1], person(20, 0.1, seed=1), rtol=1e-6)
    np.testing.assert_allclose(x[3, ..., 0], actor[:, 20:40], rtol=1e-6)
    assert not x[[0, 1, 3], ..., 1].any()
    assert data.read_lines(tmp_path / "out" / "classes.txt") == data.bundled_classes("pku51")
    data.prepare(raw_pku, tmp_path / "view", frames=20, protocol="xview")
    assert np.load(tmp_path / "view" / "training.npy").tolist() == [False, False, True, True]


def test_pku_phase_2_and_flat_folders(tmp_path):
    video = np.zeros((30, 2, 25, 3))
    video[:, 0] = person(30, 0.3).transpose(1, 2, 0)
    write_pku(tmp_path / "pku", "A01N01-L", video.reshape(30, 150), ["7,1,30,1"], ("Skeleton", "Label"))
    lists = "Training videos:\nA02N01-M\nTesting videos:\nA01N01-L, A01N02-R\n"
    (tmp_path / "pku" / "cross_subject_v2.txt").write_text(lists)
    data.prepare(tmp_path / "pku", tmp_path / "out", frames=30)
    assert np.load(tmp_path / "out" / "labels.npy").tolist() == [6]
    assert np.load(tmp_path / "out" / "training.npy").tolist() == [False]
    x = np.load(tmp_path / "out" / "skeletons.npy")
    np.testing.assert_allclose(x[0, ..., 0], person(30, 0.3), rtol=1e-6)


def test_broken_pku_videos_and_segments_are_skipped(raw_pku, tmp_path):
    video = np.ones((30, 150))
    labels = ["1,1,20,2", "52,1,20,2", "3,10,31,2", "3,9,8,2", "x,1,20,2", "7,1", "1,3,3,1"]
    write_pku(raw_pku, "0004-R", video, labels)
    write_pku(raw_pku, "0007-L", video, ["1,1,20,2"])
    lists = (raw_pku / "Split" / "cross-subject.txt").read_text()
    (raw_pku / "Split" / "cross-subject.txt").write_text(lists.replace("0003-M", "0003-M, 0008-L, 0009-L"))
    write_pku(raw_pku, "0008-L", video[:, 1:], ["1,1,20,2"])
    write_pku(raw_pku, "0009-L", video, [])
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
    import csv
    with open(tmp_path / "out" / "skipped.csv") as f:
        skipped = list(csv.reader(f))[1:]
    assert [name for name, _ in skipped] == [name for name, _ in expected]
    for (_, reason), (_, part) in zip(skipped, expected):
        assert part in reason
    assert np.load(tmp_path / "out" / "labels.npy").tolist() == [4, 50, 0, 1, 0, 0]


# --------------------------------------------------------------------------------- bad sources
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
    "broken out": (lambda f: ((f / "broken").mkdir(), (f / "broken" / f"{NAMES[0]}.skeleton").write_text("x")),
                   f"no recording could be read; correct the first, {NAMES[0]}.skeleton: invalid literal"),
    "twice out": (lambda f: (shutil.copytree(f / "raw", f / "twice"),
                             shutil.copy(f / "raw" / f"{NAMES[1]}.skeleton", f / "twice" / "nested")),
                  f"twice: holds two recordings {NAMES[1]}.skeleton; keep one"),
    "pku out --protocol xset": (None, "PKU-MMD has one for the protocols xsub and xview"),
    "pku/Data out --kind pku": (None, "Data: holds 0 files cross-subject.txt"),
    "pku/Split out": (None, "Split: holds 0 skeleton and 0 label files"),
    "NTU60_CS.npz out --protocol xview": (lambda f: write_ctrgcn(f / "NTU60_CS.npz"),
                                          "NTU60_CS.npz: is of the protocol xsub; leave out --protocol xview"),
    "x.npz out": (lambda f: np.savez(f / "x.npz", a=np.ones(3)), "x.npz: y_train.npy cannot be read"),
    "agcn out --protocol xview": (lambda f: write_agcn(f / "agcn", fill=False), "agcn: is of the protocol xsub"),
    "a.pkl out": (lambda f: (f / "a.pkl").write_bytes(pickle.dumps(Evil())), "a.pkl: cannot be read as a pickle"),
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
    with pytest.raises(SystemExit) as stop:
        data.command_line(data.main)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1 and message in error, error
    assert sorted(tmp_path.rglob("*")) == before                          # nothing half-written


def test_preparation_under_spawn(raw_ntu, tmp_path):
    """As on Windows and macOS, worker processes start afresh."""
    code = ("import multiprocessing, sys, data\nif __name__ == '__main__':\n"
            "    multiprocessing.set_start_method('spawn')\n    data.prepare(*sys.argv[1:], frames=8)\n")
    (tmp_path / "start.py").write_text(code)
    done = subprocess.run([sys.executable, tmp_path / "start.py", raw_ntu, tmp_path / "out"],
                          capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert len(np.load(tmp_path / "out" / "labels.npy")) == 5
