"""DVTA, Dual Visual-Text Alignment (arXiv 2409.14336; Pattern Recognition 171, 2026).

A skeleton feature is projected into the text space (VisualProjector); cross-attention mixes each class's
prompts for that skeleton (SemanticDescriptionEnhancement, SDE); the two are compared by cosine (Direct
Alignment, DA) and by a learned metric (Augmented Alignment, AA: MetricHead).

Shapes: N, B samples; F channels of a skeleton feature; C classes; K candidates; P prompts a class; D text
width.
"""
import torch
import torch.nn.functional as F
from torch import nn

# (skeleton, text) pairs in a chunk of `scores`: at D = 768, 13 MB, to stay in a CPU's cache, or 3 GiB on CUDA
PAIRS_AT_ONCE = {"cpu": 1 << 11, "cuda": 1 << 19}


class VisualProjector(nn.Module):
    """Skeleton features (N, F) → v in the text space (N, D). Source: DVTA, Direct Alignment."""

    def __init__(self, feature_width, text_width):
        super().__init__()
        self.fc0 = nn.Linear(feature_width, feature_width)
        self.fc1 = nn.Linear(feature_width, 384)
        self.fc2 = nn.Linear(384, 512)
        self.fc3 = nn.Linear(512, text_width)

    def forward(self, x):                                                 # (N, F)
        h = F.relu(self.fc0(x) + x)                                       # the only residual
        h = F.relu(self.fc1(h))                                           # (N, 384)
        h = F.relu(self.fc2(h))                                           # (N, 512)
        return self.fc3(h)                                                # (N, D)


class SemanticDescriptionEnhancement(nn.Module):
    """SDE: cross-attention with the skeleton as query, a class's prompts as keys and values.

    Source: DVTA, t̃ and t. Each skeleton sees its own mixture of label and description, so the text feature
    is one per sample. `attend=False` is the paper's ablation without SDE: equal weights.
    """

    def __init__(self, text_width, attend=True):
        super().__init__()
        self.fc = nn.Linear(text_width, text_width)
        self.attend = attend

    def attention(self, v, prompts):                            # (N, D), (N, K, P, D) or (1, K, P, D)
        """The weight of each of K classes' prompts for each skeleton → (N, K, P), sum 1 over P."""
        logits = torch.einsum("nd,nkpd->nkp", v, prompts)                 # unscaled
        return (logits if self.attend else torch.zeros_like(logits)).softmax(-1)

    def forward(self, v, prompts):                      # (N, D), (N, P, D): sample n with its own class
        a = self.attention(v, prompts.unsqueeze(1)).squeeze(1)            # (N, P)
        return self.fc(torch.einsum("np,npd->nd", a, prompts))            # (N, D)


class MetricHead(nn.Module):
    """The deep metric E(v, t) = LeakySigmoid(MLP([v; t])), MLP 2D→2D→768→1.

    Source: DVTA, Augmented Alignment. The first layer is linear in [v; t]: `v_half` computes its half once
    per skeleton, `t_half` once per text, and each pair adds the two. This is the same function as on
    concatenated pairs, at a third of the work.
    """
    ALPHA = 0.01

    def __init__(self, text_width):
        super().__init__()
        self.fc0 = nn.Linear(2 * text_width, 2 * text_width)
        self.fc1 = nn.Linear(2 * text_width, 768)
        self.fc2 = nn.Linear(768, 1)

    def v_half(self, v):                                                  # (..., D) → (..., 2D)
        """The visual half of the first layer, with its bias."""
        return F.linear(v, self.fc0.weight.chunk(2, dim=1)[0], self.fc0.bias)

    def t_half(self, t):                                                  # (..., D) → (..., 2D)
        """The text half of the first layer."""
        return F.linear(t, self.fc0.weight.chunk(2, dim=1)[1])

    def forward(self, v_half, t_half):                                    # (N, 1, 2D), (1 or N, K, 2D)
        h = (v_half + t_half).relu_()                         # (N, K, 2D), in place: the largest tensor
        z = self.fc2(self.fc1(h.flatten(0, 1)).relu_()).view(h.shape[:2])   # (N, K)
        # the clamp keeps exp from overflowing where z > 0, which would make the gradient NaN
        return torch.where(z > 0, torch.sigmoid(z), self.ALPHA * torch.exp(self.ALPHA * z.clamp(max=0)))


class DVTA(nn.Module):
    """Dual Visual-Text Alignment. Source: arXiv 2409.14336.

    text: the prompts of all classes, a list of tensors (C, 1+L, D) whose row 0 is the pooled sentence vector.
        An unseen class is another row; training reads only the rows of its labels.
    feature_width: F.
    sde=False: weight the prompts equally. only="da" or "aa": leave the other alignment out. These are the
        paper's ablations. AA trains on detached v and t, so only="aa" learns a metric on the projector's
        initial weights.
    standardise: features at mean 0 and deviation 1 per channel. centre: prompts minus their mean over the
        seen classes. Neither is in the paper. The statistics are kept in the model's state.
    """
    COMPILED = None         # the function that torch.compile takes on CUDA, where the method runs in bfloat16

    def __init__(self, text, feature_width, sde=True, only=None, standardise=False, centre=False):
        super().__init__()
        prompts = torch.stack([F.normalize(t[:, 0].float(), dim=-1) for t in text], 1)
        self.register_buffer("prompts", prompts, persistent=False)        # (C, P, D)
        D = prompts.shape[-1]
        self.register_buffer("x_mean", torch.zeros(feature_width))
        self.register_buffer("x_std", torch.ones(feature_width))
        self.register_buffer("prompt_mean", torch.zeros(prompts.shape[1:]))   # (P, D)
        self.standardise, self.centre = standardise, centre
        self.projector = VisualProjector(feature_width, D)
        self.sde = SemanticDescriptionEnhancement(D, attend=sde)
        self.head = MetricHead(D)
        self.tau_da = nn.Parameter(torch.tensor(0.1))
        self.tau_aa = nn.Parameter(torch.tensor(0.1))
        self.da, self.aa = only != "aa", only != "da"

    def fit_statistics(self, x, seen):
        """Measure training features x (n, F) and the prompts of the seen class ids (S,), before training."""
        if self.standardise:
            self.x_mean, self.x_std = x.mean(0), x.std(0, correction=0)
            self.x_std[self.x_std < 1e-6] = 1                             # a constant channel stays as it is
        if self.centre:
            self.prompt_mean = self.prompts[seen].mean(0)

    def unit_features(self, x):
        """Features (N, F), standardised if that is set, each then of length 1."""
        return F.normalize((x - self.x_mean) / self.x_std, dim=-1)

    def class_prompts(self, classes):
        """The prompts of classes (K,), centred if that is set, each of length 1 → (K, P, D)."""
        prompts = self.prompts[classes]
        return F.normalize(prompts - self.prompt_mean, dim=-1) if self.centre else prompts

    def forward(self, x, y):
        """Features x (B, F), class ids y (B,) → the loss over all B² pairs of skeleton and text, and {}."""
        v = self.projector(self.unit_features(x))                         # (B, D)
        t = self.sde(v, self.class_prompts(y))            # (B, D) text of sample j's class, seen by sample j
        Z = 0                                                     # (B, B) similarity of skeleton i and text j
        if self.da:
            Z = Z + F.normalize(v, dim=-1) @ F.normalize(t, dim=-1).T / self.tau_da
        if self.aa:
            v, t = v.detach(), t.detach()                                 # AA's gradient does not reach DA
            v_half = self.head.v_half(v)[:, None]                         # (B, 1, 2D)
            t_half = self.head.t_half(t)[None]                            # (1, B, 2D)
            Z = Z + self.head(v_half, t_half) / self.tau_aa
        G = 10 * (y[:, None] == y).to(v.dtype)                            # (B, B)
        return (row_loss(Z, G) + row_loss(Z.T, G)) / 2, {}

    @torch.no_grad()
    def scores(self, x, classes):
        """Features x (N, F), candidate class ids (K,) → scores (N, K), higher is better.

        The attention weights sum to 1, so a linear layer of the mixed prompts equals the mixture of that
        layer of each prompt. It is computed once per class, not once per sample.
        """
        prompts = self.class_prompts(classes)                             # (K, P, D)
        projected = self.sde.fc(prompts)                                  # (K, P, D)
        head_half = self.head.t_half(projected)                           # (K, P, 2D)
        v_all = self.projector(self.unit_features(x))                     # (N, D)
        skeletons_at_once = max(1, PAIRS_AT_ONCE[x.device.type] // len(classes))
        out = []
        for v in v_all.split(skeletons_at_once):
            a = self.sde.attention(v, prompts[None])                      # (n, K, P)
            score = 0                                                     # (n, K)
            if self.da:
                t = torch.einsum("nkp,kpd->nkd", a, projected)            # (n, K, D)
                cosine = torch.einsum("nd,nkd->nk", F.normalize(v, dim=-1), F.normalize(t, dim=-1))
                score = score + cosine / self.tau_da
            if self.aa:
                t_half = torch.einsum("nkp,kpd->nkd", a, head_half)       # (n, K, 2D)
                score = score + self.head(self.head.v_half(v)[:, None], t_half) / self.tau_aa
            out.append(score)
        return torch.cat(out)


def row_loss(Z, G):
    """KL(softmax(G_i) ‖ softmax(Z_i)), mean over the rows i of similarities Z and targets G (B, B)."""
    return F.kl_div(Z.log_softmax(-1), G.softmax(-1), reduction="batchmean")
