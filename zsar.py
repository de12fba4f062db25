"""From skeleton to feature, from scores to figures: all that the methods share.

In the order that data meets it: joint graphs; the common frame; augmentation; the encoders ST-GCN and
Shift-GCN; the ridge baseline; zero-shot and generalized figures. Nothing here reads a file or prints.

Shapes: N, B samples; C classes (in the encoder: channels, as its paper has it); T frames; V joints; M
persons; K candidate classes; P prompts a class; D text width.
"""
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

FEATURES = 256  # width of an encoded skeleton


# ----------------------------------------------------------------------------------------------- joint graphs
class JointGraph(NamedTuple):
    """A skeleton layout, joints 0-based."""
    edges: tuple        # ((child, parent), ...)
    centre: int         # the joint from which hop distances are counted
    root: tuple         # the joints whose mean is the spine base
    shoulders: tuple    # (left, right)


NTU25 = JointGraph(
    edges=((0, 1), (1, 20), (2, 20), (3, 2), (4, 20), (5, 4), (6, 5), (7, 6), (8, 20), (9, 8), (10, 9),
           (11, 10), (12, 0), (13, 12), (14, 13), (15, 14), (16, 0), (17, 16), (18, 17), (19, 18), (21, 22),
           (22, 7), (23, 24), (24, 11)),
    centre=20, root=(0,), shoulders=(4, 8))
KINECT20 = JointGraph(
    edges=((0, 1), (1, 2), (3, 2), (4, 2), (5, 4), (6, 5), (7, 6), (8, 2), (9, 8), (10, 9), (11, 10),
           (12, 0), (13, 12), (14, 13), (15, 14), (16, 0), (17, 16), (18, 17), (19, 18)),
    centre=2, root=(0,), shoulders=(4, 8))
COCO17 = JointGraph(
    edges=((15, 13), (13, 11), (16, 14), (14, 12), (11, 5), (12, 6), (9, 7), (7, 5), (10, 8), (8, 6),
           (5, 0), (6, 0), (1, 0), (3, 1), (2, 0), (4, 2)),
    centre=0, root=(11, 12), shoulders=(5, 6))
OPENPOSE18 = JointGraph(
    edges=((4, 3), (3, 2), (7, 6), (6, 5), (13, 12), (12, 11), (10, 9), (9, 8), (11, 5), (8, 2), (5, 1),
           (2, 1), (0, 1), (15, 0), (14, 0), (17, 15), (16, 14)),
    centre=1, root=(8, 11), shoulders=(5, 2))
GRAPHS = {25: NTU25, 20: KINECT20, 17: COCO17, 18: OPENPOSE18}  # by V; 25 is Kinect v2, 20 is Kinect v1


def adjacency(edges, num_joints, centre):
    """The normalised adjacency in the three subsets of ST-GCN's "spatial configuration" partitioning.

    edges: pairs of joints, undirected; centre: the joint that hop distances d(·) are counted from.
    → float32 (3, V, V), where [k, v, w] weighs source joint v in target joint w: A·D⁻¹ with self-loops, split
    into subset 0: v = w; 1: neighbours with d(v) ≥ d(w); 2: neighbours with d(v) < d(w).
    Source: Yan et al., AAAI 2018, A_j of the spatial configuration.
    """
    A = np.eye(num_joints)                                              # (V, V)
    for v, w in edges:
        A[v, w] = A[w, v] = 1
    reached = [np.linalg.matrix_power(A, n)[centre] > 0 for n in range(num_joints)]     # within n hops
    hops = np.argmax(reached, 0)                                        # (V,): d(·)
    A /= A.sum(0)
    self_loop = np.eye(num_joints, dtype=bool)
    nearer = hops[:, None] < hops[None, :]                              # (V, V): d(v) < d(w)
    subsets = [self_loop, ~self_loop & ~nearer, nearer]
    return torch.tensor(np.stack([A * subset for subset in subsets]), dtype=torch.float32)


# ------------------------------------------------------------------------------------------- the common frame
FRAMES = ("first", "smie", "shiftgcn")      # of to_common_frame


def to_common_frame(skeletons, graph, frame="first"):
    """Move and turn each sequence so that it no longer depends on where a person stands and faces.

    skeletons: (N, 3, T, V, M) metres → float32, same shape. Absent persons (all zero) stay zero.
    frame "first", ours: the main actor's spine base in the first frame becomes the origin. A turn about the
    vertical and then a tilt bring the line of the shoulders, right to left, to the +x axis, so that no body
    ends upside down.
    "smie", that of SMIE's ST-GCN features: in every frame each person's centre joint becomes the origin, and
    a turn about the vertical brings the line of the shoulders, left to right, above the +x axis. The
    published code turns by the same angle, but takes its sign from the sum over the sequence.
    "shiftgcn", that of published Shift-GCN features: in every frame the main actor's spine middle becomes the
    origin. Of the main actor's first frame, the bone from the spine base to the spine middle goes to +z, then
    the line of the shoulders, left to right, to +x. The published code moves a person who comes late to the
    first frame; ours does not.
    """
    x = np.asarray(skeletons, dtype=np.float32)
    present = x.any((1, 3))[:, None, :, None, :]                        # (N, 1, T, 1, M)
    first = present[:, 0, :, 0, 0].argmax(1)                            # (N,) main actor's first frame
    pose = x[np.arange(len(x)), :, first, :, 0]                         # (N, 3, V)
    left, right = graph.shoulders
    if frame == "first":
        origin = pose[:, :, list(graph.root)].mean(2)[:, :, None, None, None]
        rotation = _rotation_to_x(pose[:, :, left] - pose[:, :, right])                     # (N, 3, 3)
    elif frame == "smie":
        origin = x[:, :, :, [graph.centre]]                             # (N, 3, T, 1, M)
        line = (x[:, :, :, right] - x[:, :, :, left]).transpose(0, 2, 3, 1)                 # (N, T, M, 3)
        turns = _rotation_to_x((line * [1, 0, 1]).reshape(-1, 3)).reshape(*line.shape, 3)   # (N, T, M, 3, 3)
        x = np.einsum("ntmij,njtvm->nitvm", turns, (x - origin) * present, optimize=True)
        return x.astype(np.float32)
    else:
        middle = dict(graph.edges).get(graph.root[0], graph.centre)
        origin = x[:, :, :, [middle], :1]                               # (N, 3, T, 1, 1)
        bone = pose[:, :, middle] - pose[:, :, list(graph.root)].mean(2)
        upwards = _shortest_rotation(bone, [0, 0, 1])                   # (N, 3, 3)
        line = np.einsum("nij,nj->ni", upwards, pose[:, :, right] - pose[:, :, left])
        rotation = _shortest_rotation(line, [1, 0, 0]) @ upwards
    return np.einsum("nij,njtvm->nitvm", rotation, (x - origin) * present, optimize=True).astype(np.float32)


def torsos_of(skeletons, graph):
    """How long and how upright the main actor's torso is, from the spine base to between the shoulders.

    skeletons (N, 3, T, V, M) → lengths (N,) in their unit, 0 without a body, and the height of the
    shoulders above the spine base in torso lengths (N,); both are means over the frames.
    """
    x = np.asarray(skeletons[..., 0], dtype=np.float32)                 # (N, 3, T, V)
    torso = x[..., list(graph.shoulders)].mean(3) - x[..., list(graph.root)].mean(3)            # (N, 3, T)
    length = np.linalg.norm(torso, axis=1)                              # (N, T)
    frames = np.maximum((length > 0).sum(1), 1)                         # (N,)
    return length.sum(1) / frames, (torso[:, 1] / np.maximum(length, 1e-9)).sum(1) / frames


def _rotation_to_x(line):
    """Lines (N, 3) → rotations (N, 3, 3) that bring them to the +x axis: a turn about y, then a tilt."""
    dx, dy, dz = line.T                                                 # (N,) each
    turn, tilt = np.arctan2(dz, dx), np.arctan2(dy, np.hypot(dx, dz))
    ct, st, cr, sr, zero = np.cos(turn), np.sin(turn), np.cos(tilt), np.sin(tilt), np.zeros_like(turn)
    rows = [[cr * ct, sr, cr * st],
            [-sr * ct, cr, -sr * st],
            [-st, zero, ct]]
    return np.array(rows).transpose(2, 0, 1)


def _shortest_rotation(line, axis):
    """Lines (N, 3) → the smallest rotations (N, 3, 3) that bring them to a unit axis. Source: Rodrigues."""
    unit = line / np.maximum(np.linalg.norm(line, axis=1, keepdims=True), 1e-9)             # (N, 3)
    wx, wy, wz = np.cross(unit, axis).T                                 # (N,) each: sin · the rotation's axis
    cos, zero = unit @ np.asarray(axis, float), np.zeros_like(wx)
    K = np.array([[zero, -wz, wy], [wz, zero, -wx], [-wy, wx, zero]]).transpose(2, 0, 1)    # (N, 3, 3)
    return np.eye(3) + K + K @ K / np.maximum(1 + cos, 1e-9)[:, None, None]


# ----------------------------------------------------------------------------------------------- the encoders
@torch.no_grad()
def augmented(x):
    """Vary skeletons in the common frame at random: (B, 3, T, V, M) → same shape.

    Each sequence is turned about the vertical by up to 0.5 rad, scaled by up to 10 %, cropped to 75 to 100 %
    of its time and resampled to T frames; each joint gets noise of 1 cm. Absent persons stay zero.
    """
    B, _, T, V, M = x.shape
    present = (x != 0).any(3, keepdim=True).any(1, keepdim=True)        # (B, 1, T, 1, M)
    x = x + 0.01 * torch.randn_like(x) * present
    turn, size, fraction, start = torch.rand(4, B, device=x.device)         # (B,) each, uniform in 0..1
    turn, size, fraction = turn - 0.5, 0.9 + 0.2 * size, 0.75 + 0.25 * fraction
    cos, sin, zero, one = turn.cos(), turn.sin(), torch.zeros_like(turn), torch.ones_like(turn)
    rotation = torch.stack([cos, zero, sin, zero, one, zero, -sin, zero, cos], -1).view(B, 3, 3)
    x = torch.einsum("bij,bjtvm->bitvm", size[:, None, None] * rotation, x)
    return _resampled_part(x, start * (1 - fraction), fraction)


def _resampled_part(x, start, fraction):
    """Part of each sequence, (B, 3, T, V, M): `start` and length are (B,) fractions of its time."""
    T = x.shape[2]
    time = torch.linspace(0, 1, T, device=x.device)                     # (T,)
    position = (start[:, None] + fraction[:, None] * time) * (T - 1)    # (B, T)
    before = position.long().clamp(max=max(T - 2, 0))                   # (B, T)
    after = (before + 1).clamp(max=T - 1)
    weight = (position - before)[:, None, :, None, None]                      # (B, 1, T, 1, 1)

    def frames(index):                                                  # (B, T) → (B, 3, T, V, M)
        return x.gather(2, index[:, None, :, None, None].expand(x.shape))

    return frames(before) * (1 - weight) + frames(after) * weight


class GraphConv(nn.Module):
    """Spatial graph convolution: y[n,c,t,w] = Σ_k Σ_v (conv_k x)[n,c,t,v] (A_k ∘ E_k)[v,w].

    conv_k is the 1×1 convolution of subset k, E the learned edge importance. The sum over joints comes
    first, on C_in channels, then all subsets' convolutions as one: the same function in less time.
    Source: Yan et al., AAAI 2018, with M_j written E.
    """

    def __init__(self, c_in, c_out, A):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out * len(A), 1)                  # conv_k, one after the other
        self.register_buffer("A", A, persistent=False)                  # (3, V, V)
        self.edge_importance = nn.Parameter(torch.ones_like(A))         # (3, V, V)

    def forward(self, x):                                               # (N, C_in, T, V)
        A = self.A * self.edge_importance                               # (3, V, V)
        weight = self.conv.weight.unflatten(0, (len(A), -1))            # (3, C_out, C_in, 1, 1)
        bias = self.conv.bias.view(len(A), -1)                          # (3, C_out)
        x = torch.cat([x @ subset for subset in A], 1)                  # (N, 3·C_in, T, V)
        y = F.conv2d(x, torch.cat(weight.unbind(), 1))                  # (N, C_out, T, V)
        return y + torch.einsum("kc,kvw->cw", bias, A)[:, None]


class STGCNBlock(nn.Module):
    """One ST-GCN block: graph convolution over joints, 9-frame convolution over time, residual.

    The first block has neither residual nor dropout. Source: Yan et al., AAAI 2018.
    """

    def __init__(self, c_in, c_out, A, stride=1, first=False):
        super().__init__()
        self.spatial = nn.Sequential(GraphConv(c_in, c_out, A), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))
        self.temporal = nn.Sequential(nn.Conv2d(c_out, c_out, (9, 1), stride=(stride, 1), padding=(4, 0)),
                                      nn.BatchNorm2d(c_out), nn.Dropout(0.0 if first else 0.5))
        self.has_residual = not first
        if first or (c_in == c_out and stride == 1):
            self.residual = nn.Identity()
        else:
            self.residual = nn.Sequential(nn.Conv2d(c_in, c_out, 1, (stride, 1)), nn.BatchNorm2d(c_out))

    def forward(self, x):                                               # (N, C_in, T, V)
        y = self.temporal(self.spatial(x))                              # (N, C_out, T/stride, V)
        if self.has_residual:
            y = y + self.residual(x)
        return F.relu_(y)


class STGCN(nn.Module):
    """ST-GCN, the small variant used for zero-shot work.

    Skeletons (N, 3, T, V, M) in metres → features (N, 256). `classify` gives logits (N, classes), for
    training with cross-entropy on the seen classes. The mean over persons includes an absent, all-zero
    person: the field's convention. Source: Yan et al., AAAI 2018.
    """
    BLOCKS = ((16, 1), (16, 1), (16, 1), (16, 1), (32, 2), (32, 1), (32, 1), (64, 2), (64, 1), (FEATURES, 1))

    def __init__(self, graph, num_joints, num_classes):
        super().__init__()
        A = adjacency(graph.edges, num_joints, graph.centre)            # (3, V, V)
        self.input_norm = nn.BatchNorm1d(num_joints * 3)
        blocks, c_in = [], 3
        for c_out, stride in self.BLOCKS:
            blocks.append(STGCNBlock(c_in, c_out, A, stride, first=not blocks))
            c_in = c_out
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(FEATURES, num_classes)

    def forward(self, x):                                               # (N, 3, T, V, M)
        N, C, T, V, M = x.shape
        x = x.permute(0, 4, 3, 1, 2).reshape(N * M, V * C, T)
        x = self.input_norm(x).view(N * M, V, C, T).permute(0, 2, 3, 1) # (N·M, 3, T, V)
        x = self.blocks(x.contiguous())                                 # (N·M, 256, T/4, V)
        return x.mean((2, 3)).view(N, M, -1).mean(1)                    # (N, 256)

    def classify(self, x):                                              # (N, 3, T, V, M)
        """Logits (N, classes) of skeletons."""
        return self.classifier(self(x))


class TemporalShift(nn.Module):
    """Shift each channel along time by its own learned displacement δ_c.

    (B·V, C, T) → (B·V, C, ⌈T/stride⌉). Output frame h reads position stride·h + δ_c, plus 0.5 where the
    stride is 2: linearly between ⌊·⌋ and ⌊·⌋ + 1, zero outside. The gradient of δ is replaced by 0.01·sign
    of itself. Source: Cheng et al., CVPR 2020.
    """

    def __init__(self, channels, stride=1):
        super().__init__()
        self.delta = nn.Parameter(torch.empty(channels).uniform_(-1, 1))
        self.stride = stride

    def forward(self, x):                                               # (B·V, C, T)
        T = x.shape[2]
        position = self.delta[:, None] + (0.5 if self.stride == 2 else 0.0)                 # (C, 1)
        if position.requires_grad:
            position.register_hook(lambda gradient: 0.01 * gradient.sign())
        whole = position.detach().floor()
        fraction = (position - whole).to(x.dtype)                       # (C, 1), from 0 to 1
        earlier = torch.arange(0, T, self.stride, device=x.device) + whole.long()           # (C, ⌈T/stride⌉)
        padded = F.pad(x, (1, 1))                                       # (B·V, C, T + 2): zeros at both ends

        def frames(index):                                              # (C, T') → (B·V, C, T')
            return padded.gather(2, (index + 1).clamp(0, T + 1).expand(len(x), -1, -1))

        return frames(earlier).lerp(frames(earlier + 1), fraction)


class SpatialShift(nn.Module):
    """Shift-GCN's non-local graph convolution: each joint reads from every other through some channels.

    (B·V, C, T) → (B·V, C', T): in-shift, channel c of joint v is read from joint (v + c) mod V; times
    tanh(mask) + 1; linear C→C'; out-shift, channel c of joint v is read from joint (v − c) mod V; BatchNorm
    over all V·C' channels; plus the input or its 1×1 convolution; ReLU. Source: Cheng et al., CVPR 2020.
    """

    def __init__(self, c_in, c_out, num_joints):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(c_in, c_out).normal_(0, c_out ** -0.5))
        self.bias = nn.Parameter(torch.zeros(1, 1, c_out))
        self.mask = nn.Parameter(torch.zeros(1, num_joints, c_in))
        self.norm = nn.BatchNorm1d(num_joints * c_out)
        self.residual = nn.Identity() if c_in == c_out else _conv_norm(c_in, c_out)
        self.register_buffer("shift_in", _joint_shift(num_joints, c_in, 1), persistent=False)       # (V·C,)
        self.register_buffer("shift_out", _joint_shift(num_joints, c_out, -1), persistent=False)    # (V·C',)

    def forward(self, x):                                               # (B·V, C, T)
        V, C, T = *self.mask.shape[1:], x.shape[2]
        y = x.view(-1, V * C, T).index_select(1, self.shift_in)         # (B, V·C, T)
        y = y * (self.mask.tanh() + 1).view(V * C, 1)
        y = F.conv1d(y.view(-1, C, T), self.weight.T[..., None], self.bias.flatten())       # (B·V, C', T)
        y = y.view(-1, len(self.shift_out), T).index_select(1, self.shift_out)              # (B, V·C', T)
        y = self.norm(y).view(len(x), -1, T)                            # (B·V, C', T)
        return F.relu_(y + self.residual(x))


def _joint_shift(num_joints, channels, direction):
    """Row v·C + c of the result names the row of joint (v + direction·c) mod V, channel c → (V·C,)."""
    joint, channel = torch.arange(num_joints)[:, None], torch.arange(channels)
    return ((joint + direction * channel) % num_joints * channels + channel).flatten()


def _conv_norm(c_in, c_out, stride=1):
    """A 1×1 convolution over (B·V, C, T) that takes each stride-th frame, and BatchNorm."""
    return nn.Sequential(nn.Conv1d(c_in, c_out, 1, stride), nn.BatchNorm1d(c_out))


class ShiftUnit(nn.Module):
    """One unit of Shift-GCN: spatial shift, temporal shift, residual. Source: Cheng et al., CVPR 2020."""

    def __init__(self, c_in, c_out, num_joints, stride=1, first=False):
        super().__init__()
        self.spatial = SpatialShift(c_in, c_out, num_joints)
        self.temporal = nn.Sequential(
            nn.BatchNorm1d(c_out), TemporalShift(c_out), nn.Conv1d(c_out, c_out, 1), nn.ReLU(inplace=True),
            TemporalShift(c_out, stride), nn.BatchNorm1d(c_out))
        self.has_residual = not first
        same_shape = c_in == c_out and stride == 1
        self.residual = nn.Identity() if first or same_shape else _conv_norm(c_in, c_out, stride)

    def forward(self, x):                                               # (B·V, C, T)
        y = self.temporal(self.spatial(x))                              # (B·V, C', ⌈T/stride⌉)
        if self.has_residual:
            y = y + self.residual(x)
        return F.relu_(y)


class ShiftGCN(nn.Module):
    """Shift-GCN, non-local shift, joint stream: skeletons (N, 3, T, V, M) in metres → features (N, 256).

    `classify` gives logits (N, classes). Source: Cheng et al., CVPR 2020. Inside, tensors are (B·V, C, T)
    with B = N·M, so that every layer is one-dimensional over time.

    A published checkpoint maps onto it by dropping the last axis of its convolutions, of length 1, and by
    renaming, i = 1..10, j = i − 1, k = 0, 1:
        data_bn                   input_norm
        l{i}.gcn1.Linear_weight   units.{j}.spatial.weight
        l{i}.gcn1.Linear_bias     units.{j}.spatial.bias
        l{i}.gcn1.Feature_Mask    units.{j}.spatial.mask
        l{i}.gcn1.bn              units.{j}.spatial.norm
        l{i}.gcn1.down.{k}        units.{j}.spatial.residual.{k}
        l{i}.tcn1.bn              units.{j}.temporal.0
        l{i}.tcn1.shift_in.ypos   units.{j}.temporal.1.delta
        l{i}.tcn1.temporal_linear units.{j}.temporal.2
        l{i}.tcn1.shift_out.ypos  units.{j}.temporal.4.delta
        l{i}.tcn1.bn2             units.{j}.temporal.5
        l{i}.residual.conv        units.{j}.residual.0
        l{i}.residual.bn          units.{j}.residual.1
        fc                        classifier
    """
    UNITS = ((64, 1), (64, 1), (64, 1), (64, 1), (128, 2), (128, 1), (128, 1), (256, 2), (256, 1),
             (FEATURES, 1))

    def __init__(self, num_joints, num_persons, num_classes):
        super().__init__()
        self.input_norm = nn.BatchNorm1d(num_persons * num_joints * 3)
        units, c_in = [], 3
        for c_out, stride in self.UNITS:
            units.append(ShiftUnit(c_in, c_out, num_joints, stride, first=not units))
            c_in = c_out
        self.units = nn.Sequential(*units)
        self.classifier = nn.Linear(FEATURES, num_classes)
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv1d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
                if ".temporal." not in name:                            # there PyTorch's default stays
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.classifier.weight, 0, (2 / num_classes) ** 0.5)

    def forward(self, x):                                               # (N, 3, T, V, M)
        N, C, T, V, M = x.shape
        x = x.permute(0, 4, 3, 1, 2).reshape(N, M * V * C, T)
        x = self.input_norm(x).view(N * M * V, C, T)                    # (B·V, 3, T)
        x = self.units(x).mean(2)                                       # (B·V, 256)
        return x.view(N, M * V, -1).mean(1)                             # (N, 256): over joints and persons

    def classify(self, x):                                              # (N, 3, T, V, M)
        """Logits (N, classes) of skeletons."""
        return self.classifier(self(x))


@torch.no_grad()
def recalibrate_batch_norm(encoder, x, train):
    """Re-estimate every BatchNorm's mean and variance on the training samples, with dropout off.

    Dropout changes the variance that the next BatchNorm sees in training, so the statistics of training do
    not fit inference. In neither paper, and done for published recipes too. x: all skeletons
    (N, 3, T, V, M); train: the training rows. Leaves the encoder in eval mode.
    """
    encoder.eval()
    for module in encoder.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None                                      # a plain average over the batches
            module.train()
    batches = -(-len(train) // 32)
    for i in range(batches):                                            # strided: rows may lie in class order
        encoder(x[train[i::batches]])
    encoder.eval()


# ----------------------------------------------------------------------------------------------- the baseline
class Ridge(nn.Module):
    """Ridge regression from features to class text, scored by cosine: the baseline to beat.

    W = (XᵀX + penalty·I)⁻¹XᵀT from standardised features X (n, F) to centred class text T (n, P·D), the P
    prompts side by side. In neither paper.
    text: the prompts of all classes, a list of tensors (C, 1+L, D) whose row 0 is the pooled sentence vector.
    feature_width: F.
    """
    COMPILED = None         # nothing for torch.compile

    def __init__(self, text, feature_width, penalty):
        super().__init__()
        prompts = torch.cat([F.normalize(t[:, 0].float(), dim=-1) for t in text], -1)
        self.register_buffer("prompts", prompts, persistent=False)      # (C, P·D)
        self.penalty = penalty
        self.register_buffer("x_mean", torch.zeros(feature_width))
        self.register_buffer("x_std", torch.ones(feature_width))
        self.register_buffer("t_mean", torch.zeros(prompts.shape[1]))
        self.register_buffer("W", torch.zeros(feature_width, prompts.shape[1]))

    def fit_statistics(self, x, seen):
        """Measure training features x (n, F); the text of the seen classes is centred in `fit`, by sample."""
        self.x_std, self.x_mean = torch.std_mean(x, 0, correction=0)
        self.x_std[self.x_std < 1e-6] = 1                               # a constant channel stays as it is

    @torch.no_grad()
    def fit(self, x, y):
        """Solve for W from features x (n, F) and class ids y (n,)."""
        X, T = (x - self.x_mean) / self.x_std, self.prompts[y]
        self.t_mean = T.mean(0)
        X, T = X.double(), (T - self.t_mean).double()
        ridge = self.penalty * torch.eye(X.shape[1], dtype=torch.float64, device=x.device)
        self.W = torch.linalg.solve(X.T @ X + ridge, X.T @ T).float()

    @torch.no_grad()
    def scores(self, x, classes):
        """Features x (N, F), candidate class ids (K,) → cosines (N, K)."""
        predicted = (x - self.x_mean) / self.x_std @ self.W             # (N, P·D)
        candidates = self.prompts[classes] - self.t_mean                # (K, P·D)
        return F.normalize(predicted, dim=-1) @ F.normalize(candidates, dim=-1).T


# ------------------------------------------------------------------------------------------ zero-shot figures
def zsl_figures(scores, labels, classes):
    """Zero-shot figures from scores (N, K), true class ids (N,) and the candidates' ids (K,), sorted.

    All true classes are among the candidates.
    → {"acc": overall accuracy, "ci95": its 95 % Wilson interval, "per_class": mean over the classes'
       accuracies, "chance": 1/K, "n": N, "class_acc": K accuracies (None for a class without samples),
       "confusion": K×K counts, [true][predicted]}; accuracies are fractions.
    """
    K, true = len(classes), np.searchsorted(classes, labels)            # (N,) columns of scores
    predicted = scores.argmax(1).cpu().numpy()                          # (N,)
    confusion = np.bincount(true * K + predicted, minlength=K * K).reshape(K, K)
    count, hits = confusion.sum(1), confusion.diagonal()                # (K,) each
    class_acc = [float(h / n) if n else None for h, n in zip(hits, count)]
    low, high = wilson_interval(hits.sum(), len(true))
    return {"acc": float(hits.sum() / len(true)), "ci95": [float(low), float(high)],
            "per_class": float(np.mean([acc for acc in class_acc if acc is not None])),
            "chance": 1 / K, "n": len(true), "class_acc": class_acc, "confusion": confusion.tolist()}


def wilson_interval(hits, count):
    """The 95 % interval of the accuracy for `hits` correct out of `count` samples → lower, upper end.

    Both may be arrays. The interval has a width even where all or none are right.
    Source: Wilson, JASA 1927.
    """
    z2 = 1.96 ** 2
    middle = (hits + z2 / 2) / (count + z2)
    half = np.sqrt(z2 * (hits * (count - hits) / count + z2 / 4)) / (count + z2)
    return middle - half, middle + half


# ---------------------------------------------------------------------------------------- generalized figures
def z_scores(scores):
    """Each sample's scores (N, K) at mean 0 and deviation 1 → (N, K) float64.

    Methods score on different scales; after this, γ means the same for each.
    """
    std, mean = torch.std_mean(scores.double(), 1, correction=0, keepdim=True)
    return (scores - mean) / std.clamp(min=1e-12)


def seen_unseen_curve(scores, labels, classes, seen):
    """Calibrated stacking, argmax of z-score − γ·[class is seen], for every γ.

    scores (N, K), true class ids (N,), the candidates' ids (K,), the seen ones among them.
    → γ ascending from −∞, and the accuracies of seen and of unseen samples from each γ up to the next, (n,)
    each. Source: Chao et al., ECCV 2016.
    """
    scores = z_scores(scores).cpu().numpy()
    is_seen, of_seen = np.isin(classes, seen), np.isin(labels, seen)    # (K,), (N,)
    seen_scores, unseen_scores = scores[:, is_seen], scores[:, ~is_seen]
    margin = seen_scores.max(1) - unseen_scores.max(1)                  # (N,): seen wins where γ < margin
    seen_right = of_seen & (classes[is_seen][seen_scores.argmax(1)] == labels)
    unseen_right = ~of_seen & (classes[~is_seen][unseen_scores.argmax(1)] == labels)
    gamma = np.concatenate([[-np.inf], np.unique(margin)])
    still_seen = seen_right.sum() - np.searchsorted(np.sort(margin[seen_right]), gamma, side="right")
    now_unseen = np.searchsorted(np.sort(margin[unseen_right]), gamma, side="right")
    return gamma, still_seen / of_seen.sum(), now_unseen / (~of_seen).sum()


def harmonic_mean(a, b):
    """2ab/(a + b), and 0 where both are 0."""
    return 2 * a * b / np.maximum(a + b, 1e-12)


def best_gamma(scores, labels, classes, seen):
    """The γ with the highest harmonic mean, the middle of its interval; arguments of `seen_unseen_curve`."""
    gamma, seen_acc, unseen_acc = seen_unseen_curve(scores, labels, classes, seen)
    best = int(harmonic_mean(seen_acc, unseen_acc).argmax())
    if best == 0:                                                       # its interval has no lower end
        return float(gamma[1] - 1)
    return float(gamma[best:best + 2].mean())


def gzsl_figures(scores, labels, classes, seen, gamma):
    """Generalized zero-shot figures at a given γ; the other arguments of `seen_unseen_curve`.

    → {"seen", "unseen": accuracies, "harmonic": their harmonic mean, "gamma", "ausuc", "curve"}, fractions.
    "ausuc" is the area under the seen–unseen curve, which needs no γ; "curve" has up to 200 of its points [γ,
    seen, unseen].
    """
    gammas, seen_acc, unseen_acc = seen_unseen_curve(scores, labels, classes, seen)
    position = np.searchsorted(gammas, gamma, side="right") - 1
    S, U = seen_acc[position], unseen_acc[position]
    area = np.sum(np.diff(unseen_acc) * (seen_acc[1:] + seen_acc[:-1]) / 2)
    points = np.unique(np.linspace(1, len(gammas) - 1, 200).astype(int))
    curve = np.stack([gammas, seen_acc, unseen_acc], 1)[points].round(6)
    return {"seen": float(S), "unseen": float(U), "harmonic": float(harmonic_mean(S, U)), "gamma": gamma,
            "ausuc": float(area), "curve": curve.tolist()}
