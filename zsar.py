"""What every method shares: joint graphs, the ST-GCN skeleton encoder, the ridge baseline and the zero-shot figures.

Shapes: N samples; C classes (in STGCN: channels, as its paper has it); T frames; V joints; M persons; K candidates; D width.
"""
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

FEATURES = 256  # width of an encoded skeleton


# ---------------------------------------------------------------------------------------------------- joint graphs
class JointGraph(NamedTuple):
    """A skeleton layout, joints 0-based. `root` are the joints whose mean is the spine base."""
    name: str
    edges: tuple        # ((child, parent), ...)
    centre: int         # the joint from which hop distances are counted
    root: tuple
    shoulders: tuple    # (left, right)


NTU25 = JointGraph("NTU, Kinect v2", (
    (0, 1), (1, 20), (2, 20), (3, 2), (4, 20), (5, 4), (6, 5), (7, 6), (8, 20), (9, 8), (10, 9), (11, 10), (12, 0),
    (13, 12), (14, 13), (15, 14), (16, 0), (17, 16), (18, 17), (19, 18), (21, 22), (22, 7), (23, 24), (24, 11)),
    centre=20, root=(0,), shoulders=(4, 8))
KINECT20 = JointGraph("Kinect v1", (
    (0, 1), (1, 2), (3, 2), (4, 2), (5, 4), (6, 5), (7, 6), (8, 2), (9, 8), (10, 9), (11, 10), (12, 0), (13, 12),
    (14, 13), (15, 14), (16, 0), (17, 16), (18, 17), (19, 18)),
    centre=2, root=(0,), shoulders=(4, 8))
COCO17 = JointGraph("COCO", (
    (15, 13), (13, 11), (16, 14), (14, 12), (11, 5), (12, 6), (9, 7), (7, 5), (10, 8), (8, 6), (5, 0), (6, 0), (1, 0),
    (3, 1), (2, 0), (4, 2)),
    centre=0, root=(11, 12), shoulders=(5, 6))
OPENPOSE18 = JointGraph("OpenPose", (
    (4, 3), (3, 2), (7, 6), (6, 5), (13, 12), (12, 11), (10, 9), (9, 8), (11, 5), (8, 2), (5, 1), (2, 1), (0, 1),
    (15, 0), (14, 0), (17, 15), (16, 14)),
    centre=1, root=(8, 11), shoulders=(5, 2))
GRAPHS = {25: NTU25, 20: KINECT20, 17: COCO17, 18: OPENPOSE18}  # chosen by V


def adjacency(edges, num_joints, centre):
    """The normalised adjacency in the three subsets of ST-GCN's "spatial configuration" → float32 (3, V, V).

    Entry [k, v, w] weighs source joint v in target joint w. Undirected edges plus self-loops, columns normalised (A·D⁻¹);
    subset 0: v = w; 1: neighbours no nearer to the centre than w; 2: neighbours nearer to the centre than w.
    Source: Yan et al., AAAI 2018; methods.md section 2.
    """
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
        self.spatial = nn.Sequential(GraphConv(c_in, c_out, A), nn.BatchNorm2d(c_out), nn.ReLU())
        self.temporal = nn.Sequential(nn.Conv2d(c_out, c_out, (9, 1), (stride, 1), (4, 0)), nn.BatchNorm2d(c_out),
                                      nn.Dropout(0.0 if first else 0.5))
        self.has_residual = not first
        same_shape = c_in == c_out and stride == 1
        self.residual = nn.Identity() if first or same_shape else nn.Sequential(
            nn.Conv2d(c_in, c_out, 1, (stride, 1)), nn.BatchNorm2d(c_out))

    def forward(self, x):                                                 # (N, C_in, T, V)
        y = self.temporal(self.spatial(x))                                # (N, C_out, T/stride, V)
        return F.relu(y + self.residual(x) if self.has_residual else y)


class STGCN(nn.Module):
    """ST-GCN, the small variant used for zero-shot work: skeletons (N, 3, T, V, M) in metres → features (N, 256).

    `forward` gives features; `classify` gives logits (N, classes) for training with cross-entropy on seen classes.
    The mean over persons includes an absent, all-zero person: the field's convention.
    Source: Yan et al., AAAI 2018; methods.md section 2.
    """
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


# ---------------------------------------------------------------------------------------------------- baseline
class Ridge(nn.Module):
    """Ridge regression from features to class text, scored by cosine: the baseline that every method must beat.

    W = (XᵀX + λI)⁻¹XᵀT from standardised features X (N, 256) to centred class text T (N, P·D), the P prompts side by side;
    statistics come from the training samples only. Closed form. Source: methods.md section 5.
    text: the prompts of all classes, a list of tensors (C, 1+L, D) whose row 0 is the pooled sentence vector.
    """

    def __init__(self, text, lam):
        super().__init__()
        prompts = torch.cat([F.normalize(t[:, 0].float(), dim=-1) for t in text], -1)
        self.register_buffer("prompts", prompts, persistent=False)        # (C, P·D)
        self.lam = lam
        self.register_buffer("x_mean", torch.zeros(FEATURES))
        self.register_buffer("x_std", torch.ones(FEATURES))
        self.register_buffer("t_mean", torch.zeros(prompts.shape[1]))
        self.register_buffer("W", torch.zeros(FEATURES, prompts.shape[1]))

    @torch.no_grad()
    def fit(self, x, y):
        """Solve for W from features x (N, 256) and class ids y (N,)."""
        self.x_std, self.x_mean = torch.std_mean(x, 0, correction=0)
        self.x_std = self.x_std.clamp(min=1e-6)                           # a constant feature says nothing, whatever its scale
        X, T = (x - self.x_mean) / self.x_std, self.prompts[y]
        self.t_mean = T.mean(0)
        X, T = X.double(), (T - self.t_mean).double()
        ridge = self.lam * torch.eye(FEATURES, dtype=torch.float64, device=x.device)
        self.W = torch.linalg.solve(X.T @ X + ridge, X.T @ T).float()

    @torch.no_grad()
    def scores(self, x, classes):
        """Features x (N, 256), candidate class ids (K,) → cosines (N, K)."""
        predicted = (x - self.x_mean) / self.x_std @ self.W               # (N, P·D)
        return F.normalize(predicted, dim=-1) @ F.normalize(self.prompts[classes] - self.t_mean, dim=-1).T


# ---------------------------------------------------------------------------------------------------- figures
def zsl_figures(scores, labels, classes):
    """Zero-shot figures from scores (N, K), true class ids (N,) and the candidates' ids (K,), all among the candidates.

    → {"acc": overall accuracy, "per_class": mean over the classes' accuracies, "chance": 1/K, "n": N,
       "class_acc": K accuracies (None for a class without samples), "confusion": K×K counts, [true][predicted]};
    accuracies are fractions. (methods.md section 6)
    """
    K = len(classes)
    position = {int(c): k for k, c in enumerate(classes)}
    true = np.array([position[int(c)] for c in labels])                   # (N,)
    predicted = np.asarray(scores.argmax(1).cpu())
    confusion = np.bincount(true * K + predicted, minlength=K * K).reshape(K, K)
    count = confusion.sum(1)
    class_acc = [float(confusion[k, k] / count[k]) if count[k] else None for k in range(K)]
    return {"acc": float(confusion.trace() / len(true)), "per_class": float(np.mean([a for a in class_acc if a is not None])),
            "chance": 1 / K, "n": len(true), "class_acc": class_acc, "confusion": confusion.tolist()}
