"""Time what docs/notes.md quotes: ratios of two ways on a CPU, or the speed of a GPU.

    python docs/benchmark.py            each saving against the plain way
    python docs/benchmark.py cuda       training steps and scores at the papers' sizes

Needs pytest, since the plain TDSM is in test_zsar.py.
"""
import sys
import time
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from alignment import DVTA, MetricHead
from diffusion import TDSM
from test_zsar import PlainTDSM
from zsar import NTU25, STGCN, GraphConv, ShiftGCN, TemporalShift

PAPER = train.PRESETS["ntu60"]
CPU_SIZES = {"dvta_batch": 128, "tdsm": {"width": 256, "depth": 4, "heads": 4}, "tdsm_batch": 64,
             "skeletons": train.ENCODER["batch_size"], "rounds": 15}
GPU_SIZES = {"dvta_batch": 128, "tdsm": {"width": 768, "depth": 12, "heads": 12}, "tdsm_batch": 256,
             "skeletons": 256, "scored": 10_000, "rounds": 10}


def random_task(text_rows, samples, device="cpu"):
    """Two prompts of 60 classes, features and labels."""
    text = [torch.randn(60, text_rows, 768, device=device) for _ in range(2)]
    return text, torch.randn(samples, 256, device=device), torch.randint(60, (samples,), device=device)


def training_step(model, x, y, settings):
    """→ a function that does one training step."""
    optimizer = train.make_optimizer(model, settings)

    def step():
        optimizer.zero_grad(set_to_none=True)
        model(x, y)[0].backward()
        optimizer.step()
    return step


def encoder_step(encoder, x, fast=False):
    """→ a function that does one training step of an encoder, augmentation included."""
    model = train.EncoderTraining(encoder, train.ENCODER, fast)
    return training_step(model, x, torch.randint(60, (len(x),), device=x.device), train.ENCODER)


def seconds_of(work):
    """How long work() takes."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


# -------------------------------------------------------------------------------------------- ratios on a CPU
def benchmark_cpu(sizes):
    """Print the ratio of each saving."""
    rounds = sizes["rounds"]
    text, x, y = random_task(1, sizes["dvta_batch"])
    split = DVTA(text, 256)
    whole = changed(split, MetricHead, concatenated_pairs)
    whole.head.v_half = whole.head.t_half = lambda half: half
    steps = [training_step(model, x, y, PAPER["dvta"]) for model in (split, whole)]
    print_ratio("DVTA training step, split / concatenated", steps, rounds)
    text, x, y = random_task(36, sizes["tdsm_batch"])
    models = [kind(text, 256, **sizes["tdsm"]) for kind in (TDSM, PlainTDSM)]
    for model in models:
        model.fit_statistics(x, y.unique())
    steps = [training_step(model, x, y, PAPER["tdsm"]) for model in models]
    print_ratio("TDSM training step, with / without the savings", steps, rounds)
    scores = [partial(model.scores, x, torch.arange(20)) for model in models]
    print_ratio("TDSM scores, with / without the savings", scores, max(1, rounds // 5))
    x = torch.randn(sizes["skeletons"], 3, 32, 25, 1)
    first = STGCN(NTU25, 25, 60)
    last = changed(first, GraphConv, convolution_first)
    steps = [encoder_step(encoder, x) for encoder in (first, last)]
    print_ratio("ST-GCN training step, joints summed first / last", steps, rounds)
    x = torch.randn(sizes["skeletons"], 3, 64, 25, 2)
    shifting = ShiftGCN(25, 2, 60)
    still = changed(shifting, TemporalShift, lambda shift, x: x[..., ::shift.stride])
    steps = [encoder_step(encoder, x) for encoder in (shifting, still)]
    print_ratio("Shift-GCN training step, with / without temporal shifts", steps, rounds)


def print_ratio(name, works, rounds):
    """Print the ratio of the times of two works, which run alternately."""
    seconds = np.array([[seconds_of(work) for work in works] for _ in range(rounds)])       # (rounds, 2)
    print(f"{name}: {np.median(seconds[:, 0] / seconds[:, 1]):.2f} (median of {rounds} pairs)")


def changed(model, kind, forward):
    """A copy of a model, in which modules of that kind compute forward(module, ...) instead."""
    model = deepcopy(model)
    for module in model.modules():
        if isinstance(module, kind):
            module.forward = partial(forward, module)
    return model


def concatenated_pairs(head, v, t):                                       # (b, 1, D), (1, K, D)
    """MetricHead's forward on B² concatenations [v; t], without the split of its first layer."""
    pairs = torch.cat(torch.broadcast_tensors(v, t), -1)                  # (b, K, 2D)
    z = head.fc2(F.relu(head.fc1(F.relu(head.fc0(pairs)))))[..., 0]
    return torch.where(z > 0, torch.sigmoid(z), head.ALPHA * torch.exp(head.ALPHA * z.clamp(max=0)))


def convolution_first(conv, x):                                           # (N, C_in, T, V)
    """GraphConv's forward as the paper writes it: to 3·C_out channels, then the sums over joints."""
    N, _, T, V = x.shape
    y = conv.conv(x).view(N, len(conv.A), -1, T, V)                       # (N, 3, C_out, T, V)
    return torch.einsum("nkctv,kvw->nctw", y, conv.A * conv.edge_importance)


# --------------------------------------------------------------------------------------------- speed of a GPU
def benchmark_gpu(device, sizes):
    """Print the times of methods and encoders, in the precision of training."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    fast, rounds = device.type == "cuda", sizes["rounds"]
    print(torch.cuda.get_device_name(device) if fast else "CPU", torch.__version__)
    text, x, y = random_task(36, sizes["tdsm_batch"], device)
    tdsm = train.build(TDSM, text, 256, sizes["tdsm"], fast).to(device)
    tdsm.fit_statistics(x, y.unique())
    print_time("TDSM training step", training_step(tdsm, x, y, PAPER["tdsm"]), len(x), rounds)
    x = torch.randn(sizes["scored"], 256, device=device)
    scores = partial(tdsm.scores, x, torch.arange(60, device=device))
    print_time("TDSM scores among 60 classes", scores, len(x), 1)
    text, x, y = random_task(1, sizes["dvta_batch"], device)
    dvta = train.build(DVTA, text, 256, {}, fast).to(device)
    print_time("DVTA training step", training_step(dvta, x, y, PAPER["dvta"]), len(x), rounds)
    x = torch.randn(sizes["skeletons"], 3, 64, 25, 2, device=device)
    for name in ("stgcn", "shiftgcn"):
        encoder = train.build_encoder(name, NTU25, 2, 60).to(device)
        print_time(f"{name} training step", encoder_step(encoder, x, fast), len(x), rounds)


def print_time(name, work, samples, rounds):
    """Print the median time of work(), after a warm-up, and on a GPU the most memory so far."""
    warm_up = min(rounds, 3)
    seconds = [seconds_of(work) for _ in range(warm_up + rounds)][warm_up:]
    memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if torch.cuda.is_available() else ""
    print(f"{name}, {samples} samples: {1e3 * np.median(seconds):.3g} ms{memory}")


if __name__ == "__main__":
    if sys.argv[1:] == ["cuda"]:
        benchmark_gpu(torch.device("cuda"), GPU_SIZES)
    else:
        benchmark_cpu(CPU_SIZES)
