"""Time what docs/notes.md quotes: ratios of two ways on a CPU, or the speed of a GPU.

    python docs/benchmark.py            each saving against the plain way that the tests compare it with
    python docs/benchmark.py cuda       training steps and scores at the papers' sizes

Needs pytest, for the plain ways live in test_zsar.py.
"""
import sys
import time
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
import zsar
from alignment import DVTA
from data import InputError, Parser, command_line
from diffusion import TDSM
from test_zsar import PlainTDSM


def main():
    """The command line."""
    parser = Parser(prog="docs/benchmark.py", description="Time this program on a CPU or a GPU.")
    parser.add_argument("which", nargs="?", choices=["cpu", "cuda"], default="cpu")
    which = parser.parse_args().which
    if which == "cpu":
        benchmark_cpu()
    elif torch.cuda.is_available():
        benchmark_gpu(torch.device("cuda"), PAPER_SIZES)
    else:
        raise InputError("cuda: PyTorch finds no CUDA device; leave it out to time the CPU")


def training_step(loss, optimizer):
    """→ a function that does one training step on loss(), a scalar."""
    def step():
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()
    return step


# -------------------------------------------------------------------------------------------- ratios on a CPU
def benchmark_cpu(rounds=15):
    """Print every ratio."""
    dvta_step(rounds)
    tdsm_step_and_scores(rounds)
    stgcn_step(rounds)
    shiftgcn_step(rounds)


def print_ratio(name, first, second, rounds):
    """Print the ratio of the times of first() and second(), which run alternately."""
    seconds = np.empty((rounds, 2))
    for pair in seconds:
        for i, work in enumerate((first, second)):
            start = time.perf_counter()
            work()
            pair[i] = time.perf_counter() - start
    print(f"{name}: {np.median(seconds[:, 0] / seconds[:, 1]):.2f} (median of {rounds} pairs)")


def random_task(text_rows, samples, device="cpu"):
    """Two prompts of 60 classes, the seen classes, features and labels."""
    text = [torch.randn(60, text_rows, 768, device=device) for _ in range(2)]
    seen = torch.arange(60, device=device)
    return text, seen, torch.randn(samples, 256, device=device), torch.randint(60, (samples,), device=device)


def concatenated_pairs(head, v, t):                                       # (b, 1, D), (1, K, D)
    """MetricHead's forward on B² concatenations [v; t], without the split of its first layer."""
    pairs = torch.cat(torch.broadcast_tensors(v, t), -1)                  # (b, K, 2D)
    z = head.fc2(F.relu(head.fc1(F.relu(head.fc0(pairs)))))[..., 0]
    return torch.where(z > 0, torch.sigmoid(z), head.ALPHA * torch.exp(head.ALPHA * z.clamp(max=0)))


def dvta_step(rounds):
    """DVTA's step at B = 128: the head's first layer split, and on B² concatenations."""
    text, seen, x, y = random_task(1, 128)
    split = DVTA(text, seen, x)
    plain = deepcopy(split)
    plain.head.forward = partial(concatenated_pairs, plain.head)
    plain.head.v_half = plain.head.t_half = lambda half: half
    steps = [training_step(partial(model, x, y), torch.optim.Adam(model.parameters(), 1e-5))
             for model in (split, plain)]
    print_ratio("DVTA training step, split / concatenated", *steps, rounds)


def tdsm_step_and_scores(rounds):
    """TDSM at width 256, depth 4: a step at batch 64; scores of 64 samples x 20 classes x 3 noises."""
    text, seen, x, y = random_task(36, 64)
    steps, scores = [], []
    for kind in (TDSM, PlainTDSM):
        model = kind(text, seen, x, width=256, depth=4, heads=4)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=kind is TDSM)
        steps.append(training_step(partial(model, x, y), optimizer))
        scores.append(partial(model.scores, x, seen[:20]))
    print_ratio("TDSM training step, with / without the savings", *steps, rounds)
    print_ratio("TDSM scores, with / without the savings", *scores, max(1, rounds // 5))


def encoder_step(encoder, frames, persons):
    """→ a function that does a step of an encoder on the preset's batch."""
    size = train.ENCODER["batch_size"]
    x, y = torch.randn(size, 3, frames, 25, persons), torch.randint(0, 60, (size,))
    return training_step(lambda: F.cross_entropy(encoder.classify(x), y),
                         train.make_optimizer(encoder, train.ENCODER))


def convolution_first(conv, x):                                           # (N, C_in, T, V)
    """GraphConv's forward as the paper writes it: to 3·C_out channels, then the sums over joints."""
    N, _, T, V = x.shape
    y = conv.conv(x).view(N, len(conv.A), -1, T, V)                       # (N, 3, C_out, T, V)
    return torch.einsum("nkctv,kvw->nctw", y, conv.A * conv.edge_importance)


def stgcn_step(rounds):
    """ST-GCN's step: the sums over joints before the convolution, and after it."""
    joints_first = zsar.STGCN(zsar.GRAPHS[25], 25, 60)
    joints_last = deepcopy(joints_first)
    for module in joints_last.modules():
        if isinstance(module, zsar.GraphConv):
            module.forward = partial(convolution_first, module)
    steps = [encoder_step(encoder, 32, 1) for encoder in (joints_first, joints_last)]
    print_ratio("ST-GCN training step, joints summed first / last", *steps, rounds)


class Stride(nn.Module):
    """A temporal shift without the shift: every stride-th frame."""

    def __init__(self, stride):
        super().__init__()
        self.stride = stride

    def forward(self, x):                                                 # (rows, C, T)
        return x[..., ::self.stride]


def shiftgcn_step(rounds):
    """Shift-GCN's step on NTU's shape, and that of the same network without its temporal shifts."""
    shifting = zsar.ShiftGCN(25, 2, 60)
    still = deepcopy(shifting)
    for unit in still.units:
        unit.temporal[1], unit.temporal[4] = Stride(1), Stride(unit.temporal[4].stride)
    steps = [encoder_step(encoder, 64, 2) for encoder in (shifting, still)]
    print_ratio("Shift-GCN training step, with / without temporal shifts", *steps, rounds)


# --------------------------------------------------------------------------------------------- speed of a GPU
class Sizes(NamedTuple):
    """What the benchmark of a GPU measures."""
    tdsm: dict                # the denoiser
    tdsm_batch: int
    dvta_batch: int
    skeletons: int            # batch of the encoders, in NTU's shape
    scored: int               # samples
    rounds: int


PAPER_SIZES = Sizes({"width": 768, "depth": 12, "heads": 12}, 256, 128, 256, 10_000, 10)
TOY_SIZES = Sizes({"width": 16, "depth": 2, "heads": 2}, 3, 4, 2, 5, 1)


def benchmark_gpu(device, sizes):
    """Print the speed of methods and encoders, with TF32 allowed, as in training."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, PyTorch {torch.__version__}")
    gpu_tdsm(device, sizes)
    gpu_dvta(device, sizes)
    gpu_encoder("stgcn", device, sizes)
    gpu_encoder("shiftgcn", device, sizes)


def measure(work, device, rounds):
    """The median seconds of work(), after a warm-up, and the GPU's peak memory as text."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, warm_up = [], min(rounds, 3)
    for _ in range(warm_up + rounds):
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        seconds.append(time.perf_counter() - start)
    memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device.type == "cuda" else ""
    return float(np.median(seconds[warm_up:])), memory


def gpu_tdsm(device, sizes):
    """TDSM's step, and its scores among 60 classes."""
    text, seen, x, y = random_task(36, sizes.tdsm_batch, device)
    model = TDSM(text, seen, x, **sizes.tdsm).to(device)
    if device.type == "cuda":
        model.triplet_loss = train.compiled(model.triplet_loss)
    optimizer = train.make_optimizer(model, train.PRESETS["ntu60"]["tdsm"])
    seconds, memory = measure(training_step(lambda: model(x, y), optimizer), device, sizes.rounds)
    print(f"TDSM training step, batch {len(x)}: {1e3 * seconds:.3g} ms{memory}; "
          f"50,000 steps take {50_000 * seconds / 60:.3g} min")
    x = torch.randn(sizes.scored, 256, device=device)
    seconds, memory = measure(lambda: model.scores(x, seen), device, 1)
    print(f"TDSM scores, {len(x)} samples x 60 classes: {seconds:.3g} s{memory}")


def gpu_dvta(device, sizes):
    """DVTA's step."""
    text, seen, x, y = random_task(1, sizes.dvta_batch, device)
    model = DVTA(text, seen, x).to(device)
    optimizer = train.make_optimizer(model, train.PRESETS["ntu60"]["dvta"])
    seconds, memory = measure(training_step(lambda: model(x, y), optimizer), device, sizes.rounds)
    print(f"DVTA training step, batch {len(x)}: {1e3 * seconds:.3g} ms{memory}")


def gpu_encoder(name, device, sizes):
    """An encoder's training, augmentation included, on NTU's shape."""
    x = torch.randn(sizes.skeletons, 3, 64, 25, 2, device=device)
    y = torch.randint(60, (sizes.skeletons,), device=device)
    encoder = train.build_encoder(name, zsar.NTU25, 2, 60).to(device)
    model = train.EncoderTraining(encoder, train.ENCODER, fast=device.type == "cuda")
    optimizer = train.make_optimizer(model, train.ENCODER)
    seconds, memory = measure(training_step(lambda: model(x, y), optimizer), device, sizes.rounds)
    print(f"{name} training, batch {len(x)}: {len(x) / seconds:.0f} samples/s{memory}")


if __name__ == "__main__":
    command_line(main)
