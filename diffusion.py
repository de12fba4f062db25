"""TDSM: Triplet Diffusion for Skeleton-Text Matching (arXiv 2411.10745, ICCV 2025).

Nothing is generated: a denoiser learns to predict the noise in a skeleton feature given a text, and the class
whose text explains the noise best is the answer. In reading order: noise_schedule, CrossDiT, TDSM.

Shapes: N, B samples; F channels of a skeleton feature, TDSM's one skeleton token; C classes; G conditions,
each one timestep and one text; n noised features under each condition; L text tokens; D width; E text
channels (label and description side by side).
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

STEPS = 50               # of the forward process
TIME_CHANNELS = 256      # channels of the sinusoidal timestep embedding
MEMORY_BUDGET = {"cpu": 1 << 26, "cuda": 1 << 32}  # bytes for a chunk of `scores`; on a CPU, to stay in cache


def noise_schedule(steps=STEPS):
    """ᾱ_t = Π(1−β), β_t = linspace(√0.00085, √0.012)², t = 0..steps-1 → (steps,). Source: TDSM."""
    beta = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, steps, dtype=torch.float64) ** 2
    return (1 - beta).cumprod(0).float()


def timestep_embedding(t):
    """Timesteps (G,) → (G, 256): cos, then sin, of t·10000^(−i/128) for i = 0..127. Source: TDSM."""
    half = TIME_CHANNELS // 2
    frequency = torch.exp(-math.log(10000) / half * torch.arange(half, device=t.device))   # (128,)
    angle = t[:, None].float() * frequency                                # (G, 128)
    return torch.cat([angle.cos(), angle.sin()], -1)


# --------------------------------------------------------------------------------------------------- denoiser
class Condition(NamedTuple):
    """All that depends only on the timestep and the text, computed once for all features under it."""
    text: torch.Tensor     # (G, 1, L, D) embedded tokens
    modulation: list       # per block: the skeleton's (6, G, 1, 1, D), the text's (6 or in the last 2, ...)
    final: torch.Tensor    # (2, G, 1, 1, D)


class Modulation(nn.Module):
    """adaLN: conditioning vector (G, D) → shifts, scales and gates (chunks, G, 1, 1, D), initially zero."""

    def __init__(self, D, chunks):
        super().__init__()
        self.fc, self.chunks = nn.Linear(D, chunks * D), chunks

    def forward(self, c):                                                 # (G, D)
        return self.fc(F.silu(c)).unflatten(-1, (self.chunks, 1, 1, -1)).movedim(1, 0)


def modulated_norm(x, shift, scale):                                      # (G, n, L, D), (G, 1, 1, D) twice
    """LayerNorm without affine, then adaLN's shift and scale."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Stream(nn.Module):
    """One stream's own weights in a block; the two streams meet only in the attention. Source: TDSM."""

    def __init__(self, D, heads):
        super().__init__()
        self.heads = heads
        self.modulation = Modulation(D, 6)
        self.qkv = nn.Linear(D, 3 * D)
        self.out = nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(approximate="tanh"), nn.Linear(4 * D, D))

    def project(self, x, modulation):                                     # (G, n, L, D)
        """Queries, keys and values → list of 3 (G, n, heads, L, D/heads)."""
        shift, scale = modulation[:2]
        return split_heads(self.qkv(modulated_norm(x, shift, scale)), 3, self.heads)

    def update(self, x, attended, modulation):                            # (G, n, L, D) twice
        """The gated residual of the attention, then that of the MLP."""
        _, _, gate, shift, scale, mlp_gate = modulation
        x = torch.addcmul(x, gate, self.out(attended))                    # x + gate · out, in one pass
        return torch.addcmul(x, mlp_gate, self.mlp(modulated_norm(x, shift, scale)))


class KeysValues(nn.Module):
    """The text stream of the last block: only keys and values, since its output is never read."""

    def __init__(self, D, heads):
        super().__init__()
        self.heads = heads
        self.modulation = Modulation(D, 2)
        self.kv = nn.Linear(D, 2 * D)

    def project(self, x, modulation):                                     # (G, n, L, D)
        """Keys and values → list of 2 (G, n, heads, L, D/heads)."""
        return split_heads(self.kv(modulated_norm(x, *modulation)), 2, self.heads)


class JointBlock(nn.Module):
    """A skeleton stream and a text stream with separate weights and one joint attention, as in MM-DiT.

    In the first block the text is still the same for all features, n = 1, so its q, k and v are computed once
    per condition.
    """

    def __init__(self, D, heads, last):
        super().__init__()
        self.skeleton = Stream(D, heads)
        self.text = KeysValues(D, heads) if last else Stream(D, heads)

    def forward(self, x, text, modulation):                               # (G, n, 1, D), (G, n or 1, L, D)
        skeleton_modulation, text_modulation = modulation
        q, k, v = self.skeleton.project(x, skeleton_modulation)            # (G, n, heads, 1, D/heads) each
        *text_q, text_k, text_v = self.text.project(text, text_modulation) # the last block has no text_q
        attended = joint_attention([q, *text_q], [k, text_k], [v, text_v])
        attended, *text_attended = attended.tensor_split([1], 2)          # (G, n, 1, D), (G, n, L, D)
        x = self.skeleton.update(x, attended, skeleton_modulation)
        if text_q:
            text = self.text.update(text, *text_attended, text_modulation)
        return x, text


def split_heads(x, parts, heads):                                         # (G, n, L, parts·D)
    """Split into projections and each of them into heads → list of `parts` (G, n, heads, L, D/heads)."""
    return [part.transpose(2, 3) for part in x.unflatten(-1, (parts, heads, -1)).unbind(3)]


def joint_attention(q, k, v):                                # lists over streams of (G, n, heads, L, D/heads)
    """softmax(QKᵀ/√d)V over the tokens of both streams → (G, n, L of the queries, D)."""
    G, n = q[0].shape[:2]

    def join(parts):                                                      # → (G·n, heads, 1 + L, D/heads)
        return torch.cat([part.expand(G, n, -1, -1, -1) for part in parts], 3).flatten(0, 1)

    q, k, v = join(q), join(k), join(v)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).unflatten(0, (G, n))


class CrossDiT(nn.Module):
    """The denoiser: noised skeleton features, under (timestep, text) conditions → predictions.

    `condition` computes all that depends only on timestep and text, `forward` the rest. Training has one
    feature under each condition; inference has thousands, so `condition` runs once per class.
    Source: TDSM.
    """

    def __init__(self, feature_width, text_channels, num_tokens, width=768, depth=12, heads=12):
        super().__init__()
        self.x_in = nn.Linear(feature_width, width)
        self.text_in = nn.Linear(text_channels, width)
        self.position = nn.Parameter(torch.empty(num_tokens, width))
        self.time_mlp = nn.Sequential(nn.Linear(TIME_CHANNELS, width), nn.SiLU(), nn.Linear(width, width))
        self.pooled_mlp = nn.Sequential(nn.Linear(text_channels, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(JointBlock(width, heads, last=i == depth - 1) for i in range(depth))
        self.final_modulation = Modulation(width, 2)
        self.x_out = nn.Linear(width, feature_width)
        self.initialise()

    def initialise(self):
        """Xavier for linears; zero for biases, adaLN and the output, so the first prediction is zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Modulation):
                nn.init.zeros_(module.fc.weight)
            if isinstance(module, KeysValues):                       # as in a whole (D, 3D) projection
                bound = (6 / (4 * module.kv.in_features)) ** 0.5
                nn.init.uniform_(module.kv.weight, -bound, bound)
        nn.init.zeros_(self.x_out.weight)
        nn.init.normal_(self.position, std=0.02)
        for layer in self.time_mlp[::2]:
            nn.init.normal_(layer.weight, std=0.02)

    def condition(self, t, text_of_condition, tokens, pooled):            # (G,), (G,), (S, L, E), (S, E)
        """Timesteps t (G,), each with one of S texts, its row number (G,) → Condition."""
        time = self.time_mlp(timestep_embedding(t).to(pooled.dtype))      # (G, D)
        c = time + self.pooled_mlp(pooled)[text_of_condition]             # (G, D)
        text = self.text_in(tokens) + self.position          # (S, L, D): embedded once per text
        text = text.index_select(0, text_of_condition)[:, None]           # (G, 1, L, D)
        modulation = [(block.skeleton.modulation(c), block.text.modulation(c)) for block in self.blocks]
        return Condition(text, modulation, self.final_modulation(c))

    def forward(self, x, condition):                                      # (G, n, F)
        # under autocast linear layers give bfloat16, but the residual streams stay as precise as x
        x, text = self.x_in(x).to(x.dtype)[:, :, None], condition.text    # (G, n, 1, D), (G, 1, L, D)
        for block, modulation in zip(self.blocks, condition.modulation):
            x, text = block(x, text, modulation)
        return self.x_out(modulated_norm(x, *condition.final)).squeeze(2)                       # (G, n, F)


# ----------------------------------------------------------------------------------------------------- method
class TDSM(nn.Module):
    """Triplet Diffusion for Skeleton-Text Matching. Source: arXiv 2411.10745.

    text: the prompts of all classes, a list of tensors (C, 1+L, D), row 0 pooled; an unseen class is another
        row.
    feature_width: F.
    timestep, noises: the step t* of a score, and how many noises it averages.
    triplet_weight, margin: λ and τ of the triplet term, τ in units of the target's variance, 1 in the paper.
    prediction: "epsilon", "sample" or "v_prediction".
    conditions: "both", "pooled" or "tokens".
    standardise: features at mean 0 and deviation 1 per channel, as ε has unit variance.
    scale: a factor on them. The smaller it is, the more the noise hides and the text must explain.
    unit_text: where pooled vectors have length 1, as Sentence-BERT's do, scale every text vector to length
        √D, as the paper's CLIP vectors have. CLIP's own vectors are left as they are.
    centre: pooled vectors minus their mean over the seen classes, at their former length.
    num_tokens: pad the text to at least this many tokens; a trained model needs its own number.
    Not in the paper: standardise, scale, unit_text, centre. The statistics and the noises are kept in the
    model's state.
    """
    COMPILED = "triplet_loss"       # what torch.compile takes on CUDA; random draws stay outside

    def __init__(self, text, feature_width, width=768, depth=12, heads=12, timestep=25, noises=3,
                 triplet_weight=1.0, margin=1.0, prediction="epsilon", conditions="both", standardise=True,
                 scale=1.0, unit_text=False, centre=False, num_tokens=0):
        super().__init__()
        tokens, pooled = text_conditions(text, num_tokens, unit_text)     # (C, L, E), (C, E)
        if conditions == "pooled":
            tokens = torch.zeros_like(tokens[:, :1])
        if conditions == "tokens":
            pooled = torch.zeros_like(pooled)
        self.register_buffer("tokens", tokens, persistent=False)
        self.register_buffer("pooled", pooled, persistent=False)
        self.register_buffer("pooled_mean", torch.zeros(pooled.shape[1]))
        self.register_buffer("seen", torch.arange(len(pooled)), persistent=False)       # (S,)
        self.register_buffer("alpha_bar", noise_schedule(), persistent=False)
        self.register_buffer("noises", torch.randn(noises, feature_width))      # fixed, shared by all samples
        self.register_buffer("x_mean", torch.zeros(feature_width))
        self.register_buffer("x_std", torch.ones(feature_width))
        self.denoiser = CrossDiT(feature_width, tokens.shape[2], tokens.shape[1], width, depth, heads)
        self.timestep, self.prediction, self.scale = timestep, prediction, scale
        self.triplet_weight, self.margin = triplet_weight, margin
        self.target_variance = scale ** 2 if prediction == "sample" else 1.0      # of a feature, of ε
        self.num_prompts, self.standardise, self.centre = len(text), standardise, centre

    def fit_statistics(self, x, seen):
        """Measure training features x (n, F). Wrong texts are drawn from the seen class ids (S,)."""
        self.seen = seen
        if self.standardise:
            self.x_mean, self.x_std = x.mean(0), x.std(0, correction=0)
            self.x_std[self.x_std < 1e-6] = 1                             # a constant channel stays as it is
        if self.centre:
            self.pooled_mean = self.pooled[seen].mean(0)

    def pooled_vectors(self):
        """The pooled vectors of all classes, centred if that is set → (C, E)."""
        if not self.centre:
            return self.pooled
        whole = self.pooled.unflatten(-1, (self.num_prompts, -1))         # (C, P, D)
        centred = whole - self.pooled_mean.unflatten(-1, (self.num_prompts, -1))
        return (F.normalize(centred, dim=-1) * whole.norm(dim=-1, keepdim=True)).flatten(-2)

    def noised(self, x, noise, t):
        """x_t = √ᾱ_t x + √(1−ᾱ_t) ε, and the denoiser's target; x and noise (..., F), t (...)."""
        x, noise = torch.broadcast_tensors(x, noise)
        signal, sigma = self.alpha_bar[t].sqrt()[..., None], (1 - self.alpha_bar[t]).sqrt()[..., None]
        target = {"epsilon": noise, "sample": x, "v_prediction": signal * noise - sigma * x}[self.prediction]
        return signal * x + sigma * noise, target

    def forward(self, x, y):
        """Features x (B, F) and class ids y (B,) → the loss, and its parts, mean e⁺ and e⁻.

        Timesteps, wrong texts and noises are random.
        """
        t = torch.randint(len(self.alpha_bar), y.shape, device=y.device)                        # (B,)
        wrong = self.seen[torch.randint(len(self.seen), y.shape, device=y.device)]              # (B,)
        loss, right, other = self.triplet_loss(x, y, wrong, t, torch.randn_like(x))
        return loss, {"e+": right.detach(), "e-": other.detach()}

    def triplet_loss(self, x, y, wrong, t, noise):
        """The triplet diffusion loss of features x under their right and under wrong texts.

        x (B, F), classes y and wrong classes (B,), timesteps t (B,), noise (B, F) → loss, mean e⁺, mean e⁻
        (scalars). Both texts see the same noise and timestep; where wrong = y the triplet term is 0.
        """
        noisy, target = self.noised(self.standardised(x), noise, t)       # (B, F) twice
        texts = torch.cat([y, wrong])                                     # (2B,): a condition each, G = 2B
        condition = self.denoiser.condition(t.repeat(2), texts, self.tokens, self.pooled_vectors())
        predicted = self.denoiser(noisy.repeat(2, 1)[:, None], condition)[:, 0]                     # (2B, F)
        error = (predicted.to(x.dtype) - target.repeat(2, 1)).square().mean(1)                  # (2B,)
        right, other = error.chunk(2)                                     # e⁺, e⁻ (B,)
        margin = self.margin * self.target_variance
        triplet = (right - other + margin).clamp(min=0) * (y != wrong)                          # (B,)
        return right.mean() + self.triplet_weight * triplet.mean(), right.mean(), other.mean()

    @torch.no_grad()
    def scores(self, x, classes):
        """Features x (N, F), candidate class ids (K,) → scores (N, K), higher is better.

        A score is minus the sum over the noises of the mean squared error. Classes × noises × samples form
        one large batch, in chunks that fit MEMORY_BUDGET.
        """
        t = torch.full_like(classes, self.timestep)                       # (K,)
        noisy, target = self.noised(self.standardised(x)[:, None], self.noises, self.timestep)
        noisy, target = noisy.flatten(0, 1), target.flatten(0, 1)         # (N·noises, F) twice
        rows = self.samples_per_chunk(len(classes)) * len(self.noises)
        text_of_condition = torch.arange(len(classes), device=x.device)
        tokens, pooled = self.tokens[classes], self.pooled_vectors()[classes]
        condition = self.denoiser.condition(t, text_of_condition, tokens, pooled)
        out = []
        for noisy_part, target_part in zip(noisy.split(rows), target.split(rows)):
            predicted = self.denoiser(noisy_part[None], condition)        # (K, n·noises, F)
            error = (predicted.to(x.dtype) - target_part).square().mean(-1)        # (K, n·noises)
            out.append(-error.view(len(classes), -1, len(self.noises)).sum(-1).T)             # (n, K)
        return torch.cat(out)

    def samples_per_chunk(self, classes):
        """How many samples fit MEMORY_BUDGET: a row holds 1+L tokens of some 16·D floats."""
        row = (1 + self.tokens.shape[1]) * 16 * self.denoiser.x_in.out_features * 4
        return max(1, MEMORY_BUDGET[self.alpha_bar.device.type] // (row * classes * len(self.noises)))

    def standardised(self, x):
        """Features, standardised if that is set, times `scale`."""
        return self.scale * (x - self.x_mean) / self.x_std


def text_conditions(text, num_tokens=0, unit_text=False):
    """Prompts, a list of (C, 1+L, D), channels side by side → tokens (C, L, E) and pooled vectors (C, E).

    Shorter prompts are padded with zero rows, all to at least `num_tokens`. A prompt that has only a pooled
    row is its own single token. num_tokens, unit_text: see TDSM.
    """
    text = [t.float() for t in text]
    if unit_text:
        text = [_at_unit_scale(t) for t in text]
    pooled = torch.cat([t[:, 0] for t in text], -1)
    tokens = [t[:, 1:] if t.shape[1] > 1 else t for t in text]
    L = max(num_tokens, *(t.shape[1] for t in tokens))
    return torch.cat([F.pad(t, (0, 0, 0, L - t.shape[1])) for t in tokens], -1), pooled


def _at_unit_scale(text):
    """Prompts (C, 1+L, D): where a class's pooled vector has length 1, scale all its vectors to √D."""
    has_length_1 = (text[:, :1].norm(dim=-1, keepdim=True) - 1).abs() < 0.01              # (C, 1, 1)
    return torch.where(has_length_1, F.normalize(text, dim=-1) * text.shape[-1] ** 0.5, text)
