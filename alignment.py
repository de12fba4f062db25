"""DVTA, Dual Visual-Text Alignment (arXiv 2409.14336; Pattern Recognition 171, 2026).

A skeleton feature is projected into the text space (VisualProjector); cross-attention mixes each class's
prompts for that skeleton (SemanticDescriptionEnhancement, SDE); the two are compared by cosine (Direct
Alignment, DA) and by a learned metric (Augmented Alignment, AA: MetricHead).

Shapes: N, B samples; C classes; K candidates; P prompts a class; D text width.
"""
import torch
import torch.nn.functional as F
from torch import nn

FEATURES = 256        # channels of a skeleton feature
# (skeleton, text) pairs in one piece of work, at D = 768: 13 MB, which stay in a CPU's cache; on CUDA 3 GiB
PAIRS_AT_ONCE = {"cpu": 1 << 11, "cuda": 1 << 19}


class VisualProjector(nn.Module):
    """Skeleton features (N, 256) → the text space (N, D). Source: DVTA, Direct Alignment; the result is v."""

    def __init__(self, text_width, feature_width=FEATURES):
        super().__init__()
        self.fc0 = nn.Linear(feature_width, feature_width)
        self.fc1 = nn.Linear(feature_width, 384)
        self.fc2 = nn.Linear(384, 512)
        self.fc3 = nn.Linear(512, text_width)

    def forward(self, x):                                                 # (N, 256)
        h = F.relu(self.fc0(x) + x)                                       # the only residual
        h = F.relu(self.fc1(h))                                           # (N, 384)
        h = F.relu(self.fc2(h))                                           # (N, 512)
        return self.fc3(h)                                                # (N, D)


class SemanticDescriptionEnhancement(nn.Module):
    """SDE: cross-attention, the skeleton as query, a class's prompts as keys and values.

    Source: DVTA, t̃ and t. The text feature is per sample: every skeleton sees its own mix of label and
    description. `attend=False` is the paper's ablation without SDE: the mix is the plain mean of the prompts.
    """

    def __init__(self, text_width, attend=True):
        super().__init__()
        self.fc = nn.Linear(text_width, text_width)
        self.attend = attend

    def mix(self, v, prompts):                                          # (N, D), (N, K, P, D) or (1, K, P, D)
        """How much each skeleton sees of each prompt of K classes: weights (N, K, P), sum 1 over P."""
        logits = torch.einsum("nd,nkpd->nkp", v, prompts)                 # unscaled
        return (logits if self.attend else torch.zeros_like(logits)).softmax(-1)

    def forward(self, v, prompts):                            # (N, D), (N, P, D): sample n with its own class
        a = self.mix(v, prompts.unsqueeze(1)).squeeze(1)                  # (N, P)
        return self.fc(torch.einsum("np,npd->nd", a, prompts))            # (N, D)


class MetricHead(nn.Module):
    """The deep metric E(v, t) = LeakySigmoid(MLP([v; t])), MLP 2D→2D→768→1.

    Source: DVTA, Augmented Alignment. The first layer is linear in [v; t], so it is computed once a skeleton
    (`v_half`) and once a text (`t_half`) and the halves are added for each pair: the same function as on
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
        h = (v_half + t_half).relu_()                         # (N, K, 2D), in place: it is the largest tensor
        z = self.fc2(self.fc1(h.flatten(0, 1)).relu_()).view(h.shape[:2])   # (N, K)
        # exp sees no positive z: its unused branch would overflow and poison the gradient
        return torch.where(z > 0, torch.sigmoid(z), self.ALPHA * torch.exp(self.ALPHA * z.clamp(max=0)))


class DVTA(nn.Module):
    """Dual Visual-Text Alignment. Source: arXiv 2409.14336.

    text: the prompts of all classes, a list of tensors (C, 1+L, D) whose row 0 is the pooled sentence vector.
    An unseen class is only another row; training reads the rows of the labels that it is given, no others.
    seen: class ids (S,), those of training. x: training features (n, 256). From them come the statistics for
    `standardise` (features with mean 0 and deviation 1 a channel) and `centre` (prompts minus their mean over
    the seen classes); they are kept in the weights. Neither is in the paper: README, "Deviations".
    Ablations: `sde=False` takes the mean of the prompts; `only="da"` or `"aa"` leaves the other alignment
    out. AA is trained on detached v and t, so AA alone learns a metric on the projector's initial weights.
    """

    def __init__(self, text, seen=None, x=None, sde=True, only=None, standardise=False, centre=False,
                 weight_decay=0.0):
        super().__init__()
        prompts = torch.stack([F.normalize(t[:, 0].float(), dim=-1) for t in text], 1)
        self.register_buffer("prompts", prompts, persistent=False)        # (C, P, D)
        D = prompts.shape[-1]
        self.register_buffer("x_mean", torch.zeros(FEATURES))
        self.register_buffer("x_std", torch.ones(FEATURES))
        self.register_buffer("prompt_mean", torch.zeros(prompts.shape[1:]))   # (P, D)
        if standardise and x is not None:
            self.x_mean, self.x_std = x.mean(0), x.std(0, correction=0)
            self.x_std[self.x_std < 1e-6] = 1                             # a dead channel stays as it is
        if centre and seen is not None:
            self.prompt_mean = prompts[seen].mean(0)
        self.centre, self.weight_decay = centre, weight_decay
        self.projector = VisualProjector(D)
        self.sde = SemanticDescriptionEnhancement(D, attend=sde)
        self.head = MetricHead(D)
        self.tau_da = nn.Parameter(torch.tensor(0.1))
        self.tau_aa = nn.Parameter(torch.tensor(0.1))
        self.da, self.aa = only != "aa", only != "da"

    def optimizer(self, lr):
        """The paper's Adam; with a weight decay, AdamW."""
        return torch.optim.AdamW(self.parameters(), lr, weight_decay=self.weight_decay)

    def unit_features(self, x):
        """Features (N, 256), standardised where asked for, then each of length 1."""
        return F.normalize((x - self.x_mean) / self.x_std, dim=-1)

    def class_prompts(self, classes):
        """The prompts of classes (K,), centred where asked for, each of length 1 → (K, P, D)."""
        prompts = self.prompts[classes]
        return F.normalize(prompts - self.prompt_mean, dim=-1) if self.centre else prompts

    def loss(self, x, y, share=slice(None), gather=lambda rows: rows):
        """Features x (B, 256), class ids y (B,) → the scalar loss on all B² pairs of skeleton and text.

        Of several processes each computes b rows of the pairs, its `share` of the batch, and `gather` brings
        the rows of all together, with their gradients; one process has b = B.
        """
        v = self.projector(self.unit_features(x[share]))                  # (b, D)
        t = self.sde(v, self.class_prompts(y[share]))      # (b, D) text of sample j's class, seen by sample j
        t = gather(t)                                                     # (B, D)
        Z = 0                                                     # (b, B) similarity of skeleton i and text j
        if self.da:
            Z = Z + F.normalize(v, dim=-1) @ F.normalize(t, dim=-1).T / self.tau_da
        if self.aa:
            v, t = v.detach(), t.detach()                                 # AA's gradient does not reach DA
            v_half = self.head.v_half(v)[:, None]                         # (b, 1, 2D)
            t_half = self.head.t_half(t)[None]                            # (1, B, 2D)
            E = torch.cat([self.head(part, t_half) for part in v_half.split(_skeletons_at_once(t))])
            Z = Z + E / self.tau_aa                                       # (b, B)
        Z = gather(Z)                                                     # (B, B)
        G = 10 * (y[:, None] == y).to(v.dtype)                            # (B, B)
        return (row_loss(Z, G) + row_loss(Z.T, G)) / 2

    @torch.no_grad()
    def scores(self, x, classes):
        """Features x (N, 256), candidate class ids (K,) → scores (N, K), higher is better.

        The attention weights sum to 1, so linear layers of the mixed text are mixes of linear layers of the
        prompts: those are computed once a class, not once a sample.
        """
        prompts = self.class_prompts(classes)                             # (K, P, D)
        projected = self.sde.fc(prompts)                                  # (K, P, D)
        head_half = self.head.t_half(projected)                           # (K, P, 2D)
        v_all = self.projector(self.unit_features(x))                     # (N, D)
        out = []
        for v in v_all.split(_skeletons_at_once(prompts)):
            a = self.sde.mix(v, prompts[None])                            # (n, K, P)
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


def _skeletons_at_once(texts):                                            # (K, ...)
    """How many skeletons go with those K texts in one piece of work."""
    return max(1, PAIRS_AT_ONCE[texts.device.type] // len(texts))


def row_loss(Z, G):
    """KL(softmax(G_i) ‖ softmax(Z_i)), mean over the rows i of similarities Z and targets G (B, B)."""
    return F.kl_div(Z.log_softmax(-1), G.softmax(-1), reduction="batchmean")
