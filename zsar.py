"""From skeleton to feature, from scores to figures: what every method stands on.

In the order that data meets it: joint graphs; the common frame; the ST-GCN encoder; the ridge baseline;
zero-shot and generalized figures. Arrays in, arrays out: nothing here reads a file or prints.

Shapes: N, B samples; C classes (in the encoder: channels, as its paper has it); T frames; V joints; M
persons; K candidate classes; P prompts a class; D text width.
"""
import math
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
    limbs: tuple        # ((left, right), ...): where the other parts that have a side begin, hips or eyes


NTU25 = JointGraph(
    edges=((0, 1), (1, 20), (2, 20), (3, 2), (4, 20), (5, 4), (6, 5), (7, 6), (8, 20), (9, 8), (10, 9),
           (11, 10), (12, 0), (13, 12), (14, 13), (15, 14), (16, 0), (17, 16), (18, 17), (19, 18), (21, 22),
           (22, 7), (23, 24), (24, 11)),
    centre=20, root=(0,), shoulders=(4, 8), limbs=((12, 16),))
KINECT20 = JointGraph(
    edges=((0, 1), (1, 2), (3, 2), (4, 2), (5, 4), (6, 5), (7, 6), (8, 2), (9, 8), (10, 9), (11, 10),
           (12, 0), (13, 12), (14, 13), (15, 14), (16, 0), (17, 16), (18, 17), (19, 18)),
    centre=2, root=(0,), shoulders=(4, 8), limbs=((12, 16),))
COCO17 = JointGraph(
    edges=((15, 13), (13, 11), (16, 14), (14, 12), (11, 5), (12, 6), (9, 7), (7, 5), (10, 8), (8, 6),
           (5, 0), (6, 0), (1, 0), (3, 1), (2, 0), (4, 2)),
    centre=0, root=(11, 12), shoulders=(5, 6), limbs=((1, 2),))
OPENPOSE18 = JointGraph(
    edges=((4, 3), (3, 2), (7, 6), (6, 5), (13, 12), (12, 11), (10, 9), (9, 8), (11, 5), (8, 2), (5, 1),
           (2, 1), (0, 1), (15, 0), (14, 0), (17, 15), (16, 14)),
    centre=1, root=(8, 11), shoulders=(5, 2), limbs=((15, 14),))
GRAPHS = {25: NTU25, 20: KINECT20, 17: COCO17, 18: OPENPOSE18}  # by V; 25 is Kinect v2, 20 is Kinect v1


def sides(graph):
    """The side of each joint, (V,) int: 1 left, -1 right, 0 neither."""
    side = np.zeros(len(graph.edges) + 1, int)
    for left, right in (graph.shoulders, *graph.limbs):
        side[left], side[right] = 1, -1
    for _ in graph.edges:                                               # outwards, at least a joint a round
        for child, parent in graph.edges:
            side[child] = side[child] or side[parent]
    return side


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
    hops = _hop_distances(A, centre)                                    # (V,)
    A /= A.sum(0)
    self_loop = np.eye(num_joints, dtype=bool)
    nearer = hops[:, None] < hops[None, :]                              # (V, V): d(v) < d(w)
    subsets = [self_loop, ~self_loop & ~nearer, nearer]
    return torch.tensor(np.stack([A * subset for subset in subsets]), dtype=torch.float32)


def _hop_distances(A, centre):
    """Hop distances (V,) from the centre, breadth first."""
    hops = np.full(len(A), -1)
    hops[centre], queue = 0, [centre]
    for v in queue:
        for w in np.flatnonzero((A[v] > 0) & (hops < 0)):
            hops[w] = hops[v] + 1
            queue.append(w)
    return hops


# ------------------------------------------------------------------------------------------- the common frame
def to_common_frame(skeletons, graph):
    """Move and turn each sequence so that where a person stands and faces is forgotten.

    skeletons: (N, 3, T, V, M) metres → float32, same shape. The main actor's spine base in the first frame
    goes to the origin; the line of the shoulders, right to left, goes to the +x axis, by a turn about the
    vertical and then a tilt, so that nobody ends upside down. Absent persons (all zero) stay zero. README,
    "Deviations", has the papers' frames.
    """
    x = np.asarray(skeletons, dtype=np.float32)
    present = x.any((1, 3))                                             # (N, T, M)
    first = present[:, :, 0].argmax(1)                                  # (N,) main actor's first frame
    pose = x[np.arange(len(x)), :, first, :, 0]                         # (N, 3, V)
    origin = pose[:, :, list(graph.root)].mean(2)                       # (N, 3)
    left, right = graph.shoulders
    rotation = _rotation_to_x(pose[:, :, left] - pose[:, :, right])     # (N, 3, 3)
    x = (x - origin[:, :, None, None, None]) * present[:, None, :, None, :]
    return np.einsum("nij,njtvm->nitvm", rotation, x, optimize=True).astype(np.float32)


def torso_lengths(skeletons, graph):
    """The main actor's distance from the spine base to between the shoulders, its mean over frames.

    skeletons (N, 3, T, V, M) → (N,) in their unit, 0 where there is no body.
    """
    x = np.asarray(skeletons[..., 0], dtype=np.float32)                 # (N, 3, T, V)
    torso = x[..., list(graph.shoulders)].mean(3) - x[..., list(graph.root)].mean(3)            # (N, 3, T)
    length = np.linalg.norm(torso, axis=1)                              # (N, T)
    return length.sum(1) / np.maximum((length > 0).sum(1), 1)


def _rotation_to_x(line):
    """Lines (N, 3) → rotations (N, 3, 3) that bring them to the +x axis: a turn about y, then a tilt."""
    dx, dy, dz = line.T                                                 # (N,) each
    turn, tilt = np.arctan2(dz, dx), np.arctan2(dy, np.hypot(dx, dz))
    ct, st, cr, sr, zero = np.cos(turn), np.sin(turn), np.cos(tilt), np.sin(tilt), np.zeros_like(turn)
    rows = [[cr * ct, sr, cr * st],
            [-sr * ct, cr, -sr * st],
            [-st, zero, ct]]
    return np.array(rows).transpose(2, 0, 1)


# ------------------------------------------------------------------------------------------------ the encoder
@torch.no_grad()
def augmented(x):
    """Skeletons in the common frame as others might have recorded them: (B, 3, T, V, M) → same shape.

    Each sequence is turned about the vertical by up to 0.5 rad, scaled by up to 10 %, cropped to 75 to 100 %
    of its time, which is resampled to T frames, and each joint moved by noise of 1 cm. Absent persons stay
    zero.
    """
    B, _, T, V, M = x.shape
    present = (x != 0).any(3, keepdim=True).any(1, keepdim=True)        # (B, 1, T, 1, M)
    x = x + 0.01 * torch.randn_like(x) * present
    turn, size, part, start = torch.rand(4, B, device=x.device)         # (B,) each, uniform in 0..1
    turn, size, part = turn - 0.5, 0.9 + 0.2 * size, 0.75 + 0.25 * part
    cos, sin, zero, one = turn.cos(), turn.sin(), torch.zeros_like(turn), torch.ones_like(turn)
    rotation = torch.stack([cos, zero, sin, zero, one, zero, -sin, zero, cos], -1).view(B, 3, 3)
    x = torch.einsum("bij,bjtvm->bitvm", size[:, None, None] * rotation, x)
    return _resampled_part(x, start * (1 - part), part)


def _resampled_part(x, start, part):
    """A part of each sequence from `start` on, both (B,) in fractions of its time → (B, 3, T, V, M)."""
    T = x.shape[2]
    at = (start[:, None] + part[:, None] * torch.linspace(0, 1, T, device=x.device)) * (T - 1)      # (B, T)
    before = at.long().clamp(max=max(T - 2, 0))                         # (B, T)
    after = (before + 1).clamp(max=T - 1)
    weight = (at - before)[:, None, :, None, None]                      # (B, 1, T, 1, 1)

    def frames(index):                                                  # (B, T) → (B, 3, T, V, M)
        return x.gather(2, index[:, None, :, None, None].expand(x.shape))

    return frames(before) * (1 - weight) + frames(after) * weight


class GraphConv(nn.Module):
    """Spatial graph convolution: y[n,c,t,w] = Σ_k Σ_v (conv_k x)[n,c,t,v] (A_k ∘ E_k)[v,w].

    conv_k is a 1×1 convolution a subset, E the learned edge importance. The sum over joints comes first, on
    C_in channels, then all subsets' convolutions as one: the same function in less time.
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


class Block(nn.Module):
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
            blocks.append(Block(c_in, c_out, A, stride, first=not blocks))
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


class ReadRows(torch.autograd.Function):
    """Rows of x in another order, and back: autograd alone would add them up one by one."""

    @staticmethod
    def forward(ctx, x, order, inverse):                                # (R, n), (R,) twice → (R, n)
        """x[order]; `inverse` undoes the order."""
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, gradient):                                        # (R, n)
        """The gradient's rows in x's order."""
        return gradient.index_select(0, ctx.saved_tensors[0]), None, None


class FractionalShift(torch.autograd.Function):
    """Frames read at stride·h + δ_c, linearly between neighbours, zero outside.

    The gradient of δ is replaced by 0.01·sign of itself. Backward is a shift too: input frame q went to the
    output frames that read it as their earlier or later neighbour.
    """

    @staticmethod
    def forward(ctx, x, delta, stride):                           # (V, C, T, B), (C,) → (V, C, ⌈T/stride⌉, B)
        """The shifted frames."""
        whole = delta.floor().long()[:, None]                           # (C, 1)
        part = delta[:, None] - whole                                   # (C, 1)
        weights = torch.stack([1 - part, part], -1)                     # (C, 1, 2)
        ctx.save_for_backward(x, whole, weights)
        ctx.stride = stride
        earlier = torch.arange(0, x.shape[2], stride, device=x.device) + whole                  # (C, T')
        return _sum_of_frames(x, torch.stack([earlier, earlier + 1], -1), weights)

    @staticmethod
    def backward(ctx, gradient):                                        # (V, C, T', B)
        """Gradients of x and of δ."""
        x, whole, weights = ctx.saved_tensors
        since = torch.arange(x.shape[2], device=x.device) - whole       # (C, T)
        readers = _whole_quotient(torch.stack([since, since - 1], -1), ctx.stride)              # (C, T, 2)
        minus_plus = torch.arange(-1, 2, 2, device=x.device)            # −1 and 1
        step = _sum_of_frames(gradient, readers, minus_plus)            # (V, C, T, B)
        slope = step.mul_(x).sum((0, 2, 3))                             # (C,); step is not needed again
        return _sum_of_frames(gradient, readers, weights), 0.01 * slope.sign(), None


def _whole_quotient(number, divisor):
    """number / divisor where it is whole, else −1, which is no frame."""
    return torch.where(number % divisor == 0, number // divisor, -1)


def _sum_of_frames(x, frames, weights):
    """Two frames of each channel, weighted and added in one pass; a frame that is not there counts as zero.

    x (V, C, T, B), frames (C, T', 2), weights that broadcast to (C, T', 2) → (V, C, T', B).
    """
    V, C, T, B = x.shape
    first = T * torch.arange(V * C, dtype=torch.int32, device=x.device).view(V, C, 1, 1)
    rows = first + frames.clamp(0, T - 1).int()                         # (V, C, T', 2), of x as (V·C·T, B)
    weights = (weights * ((frames >= 0) & (frames < T))).to(x.dtype).expand(rows.shape)
    y = F.embedding_bag(rows.view(-1, 2), x.reshape(-1, B), mode="sum",                 # (V·C·T', B)
                        per_sample_weights=weights.reshape(-1, 2))
    return y.view(V, C, -1, B)


class TemporalShift(nn.Module):
    """Each channel moved along time by its own learned displacement δ_c.

    (V, C, T, B) → (V, C, ⌈T/stride⌉, B). Output frame h reads position stride·h + δ_c, plus 0.5 where the
    stride is 2. Source: Cheng et al., CVPR 2020.
    """

    def __init__(self, channels, stride=1):
        super().__init__()
        self.delta = nn.Parameter(torch.empty(channels).uniform_(-1, 1))
        self.stride = stride

    def forward(self, x):                                               # (V, C, T, B)
        offset = 0.5 if self.stride == 2 else 0.0
        return FractionalShift.apply(x, self.delta + offset, self.stride)


class SpatialShift(nn.Module):
    """Shift-GCN's non-local graph convolution: each joint reads from every other through some channels.

    (V, C, T, B) → (V, C', T, B): in-shift, channel c of joint v is read from joint (v + c) mod V; times
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
        for name, channels in (("shift_in", c_in), ("unshift_out", c_out)):
            self.register_buffer(name, _joint_shift(num_joints, channels, 1), persistent=False)  # (V·C,)
        for name, channels in (("unshift_in", c_in), ("shift_out", c_out)):
            self.register_buffer(name, _joint_shift(num_joints, channels, -1), persistent=False)

    def forward(self, x):                                               # (V, C, T, B)
        V, C, T, B = x.shape
        y = ReadRows.apply(x.view(V * C, T * B), self.shift_in, self.unshift_in).view(V, C, T * B)
        weight = (self.mask.tanh() + 1).view(V, C, 1) * self.weight     # (V, C, C'): the mask is a part of it
        y = torch.baddbmm(self.bias.view(1, -1, 1), weight.mT, y)       # (V, C', T·B)
        y = ReadRows.apply(y.view(-1, T * B), self.shift_out, self.unshift_out)             # (V·C', T·B)
        y = self.norm(y[None]).view(V, -1, T, B)
        return F.relu_(y + self.residual(x))


def _joint_shift(num_joints, channels, direction):
    """Row v·C + c of the result names the row of joint (v + direction·c) mod V, channel c → (V·C,)."""
    joint, channel = torch.arange(num_joints)[:, None], torch.arange(channels)
    return ((joint + direction * channel) % num_joints * channels + channel).flatten()


def _conv_norm(c_in, c_out, stride=1):
    """A 1×1 convolution over (V, C, T, B) that takes each stride-th frame, and BatchNorm."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, 1, (stride, 1)), nn.BatchNorm2d(c_out))


class ShiftUnit(nn.Module):
    """One unit of Shift-GCN: spatial shift, temporal shift, residual. Source: Cheng et al., CVPR 2020."""

    def __init__(self, c_in, c_out, num_joints, stride=1, first=False):
        super().__init__()
        self.spatial = SpatialShift(c_in, c_out, num_joints)
        self.temporal = nn.Sequential(
            nn.BatchNorm2d(c_out), TemporalShift(c_out), nn.Conv2d(c_out, c_out, 1), nn.ReLU(inplace=True),
            TemporalShift(c_out, stride), nn.BatchNorm2d(c_out))
        self.has_residual = not first
        same_shape = c_in == c_out and stride == 1
        self.residual = nn.Identity() if first or same_shape else _conv_norm(c_in, c_out, stride)

    def forward(self, x):                                               # (V, C, T, B)
        y = self.temporal(self.spatial(x))                              # (V, C', T/stride, B)
        if self.has_residual:
            y = y + self.residual(x)
        return F.relu_(y)


class ShiftGCN(nn.Module):
    """Shift-GCN, non-local shift, joint stream: skeletons (N, 3, T, V, M) in metres → features (N, 256).

    `classify` gives logits (N, classes). Source: Cheng et al., CVPR 2020. Inside, tensors are (V, C, T, B)
    with B = N·M: joints as the batch of the convolutions, samples last, so that every shift copies whole
    rows.

    A published checkpoint is mapped onto it by renaming, i = 1..10, j = i − 1, k = 0, 1:
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
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
                nn.init.zeros_(module.bias)

    def forward(self, x):                                               # (N, 3, T, V, M)
        N, C, T, V, M = x.shape
        x = x.permute(0, 4, 3, 1, 2).reshape(N, M * V * C, T)
        x = self.input_norm(x).view(N * M, V, C, T).permute(1, 2, 3, 0) # (V, 3, T, B)
        x = self.units(x.contiguous())                                  # (V, 256, T/4, B)
        return x.mean((0, 2)).T.view(N, M, -1).mean(1)                  # (N, 256)

    def classify(self, x):                                              # (N, 3, T, V, M)
        """Logits (N, classes) of skeletons."""
        return self.classifier(self(x))


def batch_of(x, rows):
    """x[rows] on the device of the rows, though x may be on the host, too large for that device."""
    if x.device == rows.device:
        return x[rows]
    return x[rows.to(x.device)].pin_memory().to(rows.device, non_blocking=True)


@torch.no_grad()
def settle_batch_norm(encoder, x, train):
    """Measure every BatchNorm's mean and variance again on the training samples, with dropout off.

    Dropout changes the variance that the next BatchNorm sees in training, so training's statistics do not fit
    inference (README, "Deviations"). x: all skeletons (N, 3, T, V, M); train: the training rows. The encoder
    is in eval mode after.
    """
    encoder.eval()
    for module in encoder.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None                                      # a plain average over the batches
            module.train()
    batches = -(-len(train) // 32)
    for i in range(batches):                                            # strided: rows may lie in class order
        encoder(batch_of(x, train[i::batches]))
    encoder.eval()


# ----------------------------------------------------------------------------------------------- the baseline
class Ridge(nn.Module):
    """Ridge regression from features to class text, scored by cosine: the baseline to beat.

    W = (XᵀX + penalty·I)⁻¹XᵀT from standardised features X (N, 256) to centred class text T (N, P·D), the P
    prompts side by side; statistics come from the training samples only. Closed form; in neither paper.
    text: the prompts of all classes, a list of tensors (C, 1+L, D) whose row 0 is the pooled sentence vector.
    """

    def __init__(self, text, penalty):
        super().__init__()
        prompts = torch.cat([F.normalize(t[:, 0].float(), dim=-1) for t in text], -1)
        self.register_buffer("prompts", prompts, persistent=False)      # (C, P·D)
        self.penalty = penalty
        self.register_buffer("x_mean", torch.zeros(FEATURES))
        self.register_buffer("x_std", torch.ones(FEATURES))
        self.register_buffer("t_mean", torch.zeros(prompts.shape[1]))
        self.register_buffer("W", torch.zeros(FEATURES, prompts.shape[1]))

    @torch.no_grad()
    def fit(self, x, y):
        """Solve for W from features x (N, 256) and class ids y (N,)."""
        self.x_std, self.x_mean = torch.std_mean(x, 0, correction=0)
        self.x_std[self.x_std < 1e-6] = 1                               # a dead channel stays as it is
        X, T = (x - self.x_mean) / self.x_std, self.prompts[y]
        self.t_mean = T.mean(0)
        X, T = X.double(), (T - self.t_mean).double()
        ridge = self.penalty * torch.eye(FEATURES, dtype=torch.float64, device=x.device)
        self.W = torch.linalg.solve(X.T @ X + ridge, X.T @ T).float()

    @torch.no_grad()
    def scores(self, x, classes):
        """Features x (N, 256), candidate class ids (K,) → cosines (N, K)."""
        predicted = (x - self.x_mean) / self.x_std @ self.W             # (N, P·D)
        candidates = self.prompts[classes] - self.t_mean                # (K, P·D)
        return F.normalize(predicted, dim=-1) @ F.normalize(candidates, dim=-1).T


# ------------------------------------------------------------------------------------------ zero-shot figures
def zsl_figures(scores, labels, classes):
    """Zero-shot figures from scores (N, K), true class ids (N,) and the candidates' ids (K,).

    All true classes are among the candidates.
    → {"acc": overall accuracy, "ci95": its 95 % bootstrap interval over the test samples, "per_class": mean
    over the
       classes' accuracies, "chance": 1/K, "n": N, "class_acc": K accuracies (None for a class without
       samples), "confusion": K×K counts, [true][predicted]}; accuracies are fractions.
    """
    K, position = len(classes), {int(c): k for k, c in enumerate(classes)}
    true = np.array([position[int(c)] for c in labels])                 # (N,)
    predicted = np.asarray(scores.argmax(1).cpu())                      # (N,)
    confusion = np.bincount(true * K + predicted, minlength=K * K).reshape(K, K)
    count = confusion.sum(1)
    class_acc = [float(confusion[k, k] / count[k]) if count[k] else None for k in range(K)]
    acc = float(confusion.trace() / len(true))
    hits = np.random.default_rng(0).binomial(len(true), acc, 10_000)  # among N drawn with replacement
    return {"acc": acc, "ci95": np.quantile(hits / len(true), [0.025, 0.975]).tolist(),
            "per_class": float(np.mean([a for a in class_acc if a is not None])),
            "chance": 1 / K, "n": len(true), "class_acc": class_acc, "confusion": confusion.tolist()}


def wilson_interval(hits, count):
    """The 95 % interval of `hits` (K,) among `count` (K,) samples, some each → lower, upper ends, (K,) each.

    Unlike a bootstrap's it has a width where all are hits or none. Source: Wilson, JASA 1927.
    """
    z2 = 1.96 ** 2
    middle = (hits + z2 / 2) / (count + z2)
    half = np.sqrt(z2 * (hits * (count - hits) / count + z2 / 4)) / (count + z2)
    return middle - half, middle + half


STUDENT_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 1 to 9 degrees


def spread(values):
    """Figures of n seeds, n from 2 to 10 → {"mean", "std" (n − 1 in it), "ci95" of the mean, "each"}."""
    n, mean, std = len(values), float(np.mean(values)), float(np.std(values, ddof=1))
    half = STUDENT_975[n - 2] * std / math.sqrt(n)
    return {"mean": mean, "std": std, "ci95": [mean - half, mean + half], "each": values}


# ---------------------------------------------------------------------------------------- generalized figures
def standardised(scores):
    """Each sample's scores (N, K) with mean 0 and deviation 1 → (N, K) float64.

    Methods score on different scales; so γ means the same for each.
    """
    std, mean = torch.std_mean(scores.double(), 1, correction=0, keepdim=True)
    return (scores - mean) / std.clamp(min=1e-12)


def seen_unseen_curve(scores, labels, classes, seen):
    """Calibrated stacking, argmax of standardised score − γ·[class is seen], for every γ.

    scores (N, K), true class ids (N,), the candidates' ids (K,), the seen ones among them.
    → γ ascending from −∞, and the accuracies of seen and of unseen samples from that γ up to the next, (n,)
    each.
    Source: Chao et al., ECCV 2016.
    """
    scores = standardised(scores).cpu().numpy()
    is_seen, of_seen = np.isin(classes, seen), np.isin(labels, seen)    # (K,), (N,)
    seen_scores, unseen_scores = scores[:, is_seen], scores[:, ~is_seen]
    margin = seen_scores.max(1) - unseen_scores.max(1)               # (N,): seen is chosen where γ < margin
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
    """The γ of the highest harmonic mean, amid its interval; arguments as of `seen_unseen_curve`."""
    gamma, seen_acc, unseen_acc = seen_unseen_curve(scores, labels, classes, seen)
    best = int(harmonic_mean(seen_acc, unseen_acc).argmax())
    if best == 0:                                                       # its interval has no lower end
        return float(gamma[1] - 1)
    return float(gamma[best:best + 2].mean())


def gzsl_figures(scores, labels, classes, seen, gamma):
    """Generalized zero-shot figures at a γ; the other arguments as of `seen_unseen_curve`.

    → {"seen", "unseen": accuracies, "harmonic": their harmonic mean, "gamma", "ausuc", "curve"}, fractions.
    "ausuc" is the area under the seen–unseen curve, which needs no γ; "curve" has up to 200 of its points [γ,
    seen, unseen].
    """
    gammas, seen_acc, unseen_acc = seen_unseen_curve(scores, labels, classes, seen)
    at = np.searchsorted(gammas, gamma, side="right") - 1
    S, U = seen_acc[at], unseen_acc[at]
    area = np.sum(np.diff(unseen_acc) * (seen_acc[1:] + seen_acc[:-1]) / 2)
    some = np.unique(np.linspace(1, len(gammas) - 1, 200).astype(int))
    curve = np.stack([gammas, seen_acc, unseen_acc], 1)[some].round(6)
    return {"seen": float(S), "unseen": float(U), "harmonic": float(harmonic_mean(S, U)), "gamma": gamma,
            "ausuc": float(area), "curve": curve.tolist()}
