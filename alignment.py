"""DVTA, Dual Visual-Text Alignment (arXiv 2409.14336; methods.md section 3). Below it, what stands beside every method: the ridge
baseline, the ensemble, and the figures that scores give.

In DVTA a skeleton feature is projected into the text space (VisualProjector); cross-attention mixes each class's prompts for that
skeleton (SemanticDescriptionEnhancement); the two are compared by cosine (Direct Alignment, DA) and by a learned metric
(Augmented Alignment, AA: MetricHead). Shapes: N, B samples; C classes; K candidates; P prompts a class; D text width.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

PAIRS_AT_ONCE = 2048  # (skeleton, text) pairs in one piece of work: 13 MB at D = 768, which stays in cache and is reused

class VisualProjector(nn.Module):
    """Skeleton features (N, 256) → the text space (N, D). Source: DVTA, Direct Alignment; methods.md section 3."""

    def __init__(self, text_width, feature_width=256):
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
    """SDE: cross-attention, the skeleton as query, a class's prompts as keys and values. Source: DVTA; methods.md section 3.

    The text feature is per sample: every skeleton sees its own mix of label and description. `attend=False` is the paper's
    ablation without SDE: the mix is the plain mean of the prompts.
    """

    def __init__(self, text_width, attend=True):
        super().__init__()
        self.fc = nn.Linear(text_width, text_width)
        self.attend = attend

    def mix(self, v, prompts):                                            # (N, D), (N, K, P, D) or (1, K, P, D)
        """How much of each prompt each skeleton sees, for K classes: weights (N, K, P) that sum to 1 over the prompts."""
        logits = torch.einsum("nd,nkpd->nkp", v, prompts)                 # unscaled
        return (logits if self.attend else torch.zeros_like(logits)).softmax(-1)

    def forward(self, v, prompts):                                        # (N, D), (N, P, D): sample n with its own class
        a = self.mix(v, prompts.unsqueeze(1)).squeeze(1)                  # (N, P)
        return self.fc(torch.einsum("np,npd->nd", a, prompts))            # (N, D)

class MetricHead(nn.Module):
    """The deep metric E(v, t) = LeakySigmoid(MLP([v; t])), MLP 2D→2D→768→1. Source: DVTA, Augmented Alignment; section 3.

    The first layer is linear in [v; t], so it is computed once a skeleton (`v_half`) and once a text (`t_half`) and the
    halves are added for each pair: the same function as on concatenated pairs, at a third of the work.
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
        h = (v_half + t_half).relu_()                                     # (N, K, 2D), in place: it is the largest tensor
        z = self.fc2(self.fc1(h.flatten(0, 1)).relu_()).view(h.shape[:2])   # (N, K)
        # exp sees no positive z: its unused branch would overflow and poison the gradient
        return torch.where(z > 0, torch.sigmoid(z), self.ALPHA * torch.exp(self.ALPHA * z.clamp(max=0)))

class DVTA(nn.Module):
    """Dual Visual-Text Alignment. Source: arXiv 2409.14336; methods.md section 3.

    text: the prompts of all classes, a list of tensors (C, 1+L, D) whose row 0 is the pooled sentence vector. An unseen
    class is only another row; training reads the rows of the labels that it is given, no others.
    Ablations: `sde=False` takes the mean of the prompts; `only="da"` or `"aa"` leaves the other alignment out. AA is trained
    on detached v and t, so AA alone learns a metric on the projector's initial weights.
    """

    def __init__(self, text, sde=True, only=None):
        super().__init__()
        prompts = torch.stack([F.normalize(t[:, 0].float(), dim=-1) for t in text], 1)
        self.register_buffer("prompts", prompts, persistent=False)        # (C, P, D)
        D = prompts.shape[-1]
        self.projector = VisualProjector(D)
        self.sde = SemanticDescriptionEnhancement(D, attend=sde)
        self.head = MetricHead(D)
        self.tau_da = nn.Parameter(torch.tensor(0.1))
        self.tau_aa = nn.Parameter(torch.tensor(0.1))
        self.da, self.aa = only != "aa", only != "da"

    def optimizer(self, lr):
        """The paper's."""
        return torch.optim.Adam(self.parameters(), lr)

    def loss(self, x, y):
        """Features x (B, 256) and class ids y (B,) → the scalar loss on all B² pairs of a skeleton and a text."""
        v = self.projector(F.normalize(x, dim=-1))                        # (B, D)
        t = self.sde(v, self.prompts[y])                                  # (B, D) text of sample j's class, seen by sample j
        Z = 0                                                             # (B, B) similarity of skeleton i and text j
        if self.da:
            Z = Z + F.normalize(v, dim=-1) @ F.normalize(t, dim=-1).T / self.tau_da
        if self.aa:
            v, t = v.detach(), t.detach()                                 # AA's gradient does not reach DA
            v_half, t_half = self.head.v_half(v)[:, None], self.head.t_half(t)[None]   # (B, 1, 2D), (1, B, 2D)
            E = torch.cat([self.head(part, t_half) for part in v_half.split(skeletons_at_once(len(t)))])
            Z = Z + E / self.tau_aa
        G = 10 * (y[:, None] == y).to(v.dtype)                            # (B, B)
        return (row_loss(Z, G) + row_loss(Z.T, G)) / 2

    @torch.no_grad()
    def scores(self, x, classes):
        """Features x (N, 256), candidate class ids (K,) → scores (N, K), higher is better.

        The attention weights sum to 1, so linear layers of the mixed text are mixes of linear layers of the prompts: those
        are computed once a class, not once a sample.
        """
        prompts = self.prompts[classes]                                   # (K, P, D)
        projected = self.sde.fc(prompts)                                  # (K, P, D)
        head_half = self.head.t_half(projected)                           # (K, P, 2D)
        v_all = self.projector(F.normalize(x, dim=-1))                    # (N, D)
        out = []
        for v in v_all.split(skeletons_at_once(len(prompts))):
            a = self.sde.mix(v, prompts[None])                            # (n, K, P)
            score = 0                                                     # (n, K)
            if self.da:
                t = torch.einsum("nkp,kpd->nkd", a, projected)            # (n, K, D)
                score = score + torch.einsum("nd,nkd->nk", F.normalize(v, dim=-1), F.normalize(t, dim=-1)) / self.tau_da
            if self.aa:
                t_half = torch.einsum("nkp,kpd->nkd", a, head_half)       # (n, K, 2D)
                score = score + self.head(self.head.v_half(v)[:, None], t_half) / self.tau_aa
            out.append(score)
        return torch.cat(out)

def skeletons_at_once(texts):
    """How many skeletons go with that many texts in one piece of work."""
    return max(1, PAIRS_AT_ONCE // texts)

def row_loss(Z, G):
    """KL(softmax(G_i) ‖ softmax(Z_i)), mean over the rows i of (B, B) similarities Z and targets G. (methods.md section 3)"""
    return F.kl_div(Z.log_softmax(-1), G.softmax(-1), reduction="batchmean")

# ---------------------------------------------------------------------------------------------------- baseline
class Ridge(nn.Module):
    """Ridge regression from features to class text, scored by cosine: the baseline that every method must beat.

    W = (XᵀX + penalty·I)⁻¹XᵀT from standardised features X (N, 256) to centred class text T (N, P·D), the P prompts side by side;
    statistics come from the training samples only. Closed form. Source: methods.md section 5.
    text: the prompts of all classes, a list of tensors (C, 1+L, D) whose row 0 is the pooled sentence vector.
    """

    def __init__(self, text, penalty):
        super().__init__()
        prompts = torch.cat([F.normalize(t[:, 0].float(), dim=-1) for t in text], -1)
        self.register_buffer("prompts", prompts, persistent=False)        # (C, P·D)
        self.penalty = penalty
        self.register_buffer("x_mean", torch.zeros(256))
        self.register_buffer("x_std", torch.ones(256))
        self.register_buffer("t_mean", torch.zeros(prompts.shape[1]))
        self.register_buffer("W", torch.zeros(256, prompts.shape[1]))

    @torch.no_grad()
    def fit(self, x, y):
        """Solve for W from features x (N, 256) and class ids y (N,)."""
        self.x_std, self.x_mean = torch.std_mean(x, 0, correction=0)
        self.x_std = self.x_std.clamp(min=1e-6)                           # a constant feature says nothing, whatever its scale
        X, T = (x - self.x_mean) / self.x_std, self.prompts[y]
        self.t_mean = T.mean(0)
        X, T = X.double(), (T - self.t_mean).double()
        ridge = self.penalty * torch.eye(256, dtype=torch.float64, device=x.device)
        self.W = torch.linalg.solve(X.T @ X + ridge, X.T @ T).float()

    @torch.no_grad()
    def scores(self, x, classes):
        """Features x (N, 256), candidate class ids (K,) → cosines (N, K)."""
        predicted = (x - self.x_mean) / self.x_std @ self.W               # (N, P·D)
        return F.normalize(predicted, dim=-1) @ F.normalize(self.prompts[classes] - self.t_mean, dim=-1).T

# ---------------------------------------------------------------------------------------------------- ensemble
def standardised(scores):
    """Each sample's scores (N, K) with mean 0 and deviation 1, for methods score on different scales → (N, K) float64."""
    std, mean = torch.std_mean(scores.double(), 1, correction=0, keepdim=True)
    return (scores - mean) / std.clamp(min=1e-12)

class Ensemble(nn.Module):
    """Trained methods as one: the mean of their standardised scores. In none of the papers; README, "Figures"."""

    def __init__(self, members):
        super().__init__()
        self.members = nn.ModuleList(members)

    def scores(self, x, classes):                                         # (N, 256), (K,) → (N, K)
        return sum(standardised(member.scores(x, classes)) for member in self.members) / len(self.members)

# ---------------------------------------------------------------------------------------------------- figures
def zsl_figures(scores, labels, classes):
    """Zero-shot figures from scores (N, K), true class ids (N,) and the candidates' ids (K,), all among the candidates.

    → {"acc": overall accuracy, "ci95": its 95 % bootstrap interval over the test samples, "per_class": mean over the classes'
       accuracies, "chance": 1/K, "n": N, "class_acc": K accuracies (None for a class without samples), "confusion": K×K counts,
       [true][predicted]}; accuracies are fractions. (methods.md section 6)
    """
    K, position = len(classes), {int(c): k for k, c in enumerate(classes)}
    true = np.array([position[int(c)] for c in labels])                   # (N,)
    confusion = np.bincount(true * K + np.asarray(scores.argmax(1).cpu()), minlength=K * K).reshape(K, K)
    count = confusion.sum(1)
    class_acc = [float(confusion[k, k] / count[k]) if count[k] else None for k in range(K)]
    acc = float(confusion.trace() / len(true))
    resampled = np.random.default_rng(0).binomial(len(true), acc, 10_000) / len(true)   # hits among N drawn with replacement
    return {"acc": acc, "ci95": np.quantile(resampled, [0.025, 0.975]).tolist(), "chance": 1 / K, "n": len(true), "class_acc": class_acc,
            "per_class": float(np.mean([a for a in class_acc if a is not None])), "confusion": confusion.tolist()}

def spread(values):
    """Figures of n seeds → {"mean", "std" (n − 1 in it), "ci95": the mean's 95 % interval by Student's t, "each"}, n from 2 to 10."""
    t = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)[len(values) - 2]         # quantile 0.975
    mean, std = float(np.mean(values)), float(np.std(values, ddof=1))
    return {"mean": mean, "std": std, "ci95": [mean + sign * t * std / math.sqrt(len(values)) for sign in (-1, 1)], "each": values}

def seen_unseen_curve(scores, labels, classes, seen):
    """Calibrated stacking, argmax of standardised score − γ·[class is seen], for every γ.

    scores (N, K), true class ids (N,), the candidates' ids (K,), the seen ones among them → γ ascending from −∞, and the accuracies
    of seen and of unseen samples from that γ up to the next, (n,) each. Source: Chao et al., ECCV 2016; methods.md section 6.
    """
    scores, is_seen, of_seen = standardised(scores).cpu().numpy(), np.isin(classes, seen), np.isin(labels, seen)
    margin = scores[:, is_seen].max(1) - scores[:, ~is_seen].max(1)       # (N,): a seen class is chosen where γ < margin
    gamma = np.concatenate([[-np.inf], np.unique(margin)])
    seen_right, unseen_right = (np.sort(margin[of & (classes[side][scores[:, side].argmax(1)] == labels)])
                                for of, side in ((of_seen, is_seen), (~of_seen, ~is_seen)))
    seen_acc = (len(seen_right) - np.searchsorted(seen_right, gamma, side="right")) / of_seen.sum()
    return gamma, seen_acc, np.searchsorted(unseen_right, gamma, side="right") / (~of_seen).sum()

def harmonic_mean(a, b):
    """2ab/(a + b), and 0 where both are 0."""
    return 2 * a * b / np.maximum(a + b, 1e-12)

def best_gamma(scores, labels, classes, seen):
    """The γ of the highest harmonic mean, amid its interval; arguments as of `seen_unseen_curve`."""
    gamma, seen_acc, unseen_acc = seen_unseen_curve(scores, labels, classes, seen)
    best = int(harmonic_mean(seen_acc, unseen_acc).argmax())
    return float(gamma[best:best + 2].mean() if best else gamma[1] - 1)

def gzsl_figures(scores, labels, classes, seen, gamma):
    """Generalized zero-shot figures at a γ → {"seen", "unseen", "harmonic", "gamma", "ausuc", "curve"}, accuracies as fractions.

    "ausuc" is the area under the seen–unseen curve, which needs no γ; "curve" has up to 200 of its points [γ, seen, unseen].
    """
    gammas, seen_acc, unseen_acc = seen_unseen_curve(scores, labels, classes, seen)
    S, U = (acc[np.searchsorted(gammas, gamma, side="right") - 1] for acc in (seen_acc, unseen_acc))
    area = np.sum(np.diff(unseen_acc) * (seen_acc[1:] + seen_acc[:-1]) / 2)
    some = np.unique(np.linspace(1, len(gammas) - 1, 200).astype(int))
    return {"seen": float(S), "unseen": float(U), "harmonic": float(harmonic_mean(S, U)), "gamma": gamma, "ausuc": float(area),
            "curve": np.stack([gammas, seen_acc, unseen_acc], 1)[some].round(6).tolist()}

def unseen_figures(model, data, features):
    """Zero-shot figures: the unseen test samples among the unseen classes."""
    unseen = torch.as_tensor(data.unseen, device=features.device)
    return zsl_figures(model.scores(features[data.unseen_test], unseen), data.labels[data.unseen_test], data.unseen)

def among_all_classes(model, data, features):
    """What the generalized figures need: all test samples' scores (N, C') among all classes, their class ids, the ids of those
    classes and of the seen ones."""
    rows, classes = np.concatenate([data.seen_test, data.unseen_test]), np.union1d(data.seen, data.unseen)
    return model.scores(features[rows], torch.as_tensor(classes, device=features.device)), data.labels[rows], classes, data.seen

def compared(result):
    """The figures of the method, an ensemble's members and ridge in a result → {name: zero-shot and generalized ones}."""
    names = [name for name in ("dvta", "tdsm", "ridge") if name in result and name != result["method"]]
    return {name: part | (part["gzsl"] or {}) for name, part in
            [(result["method"], result["zsl"] | {"gzsl": result["gzsl"]}), *((name, result[name]) for name in names)]}

def print_table(result, data):
    """The figures as a person reads them."""
    zsl, best, figures = result["zsl"], result["best_on_test"], compared(result)
    print(f"\nzero-shot accuracy on {zsl['n']} samples of {len(data.unseen)} unseen classes")
    for name, f in figures.items():
        name_is = "ridge baseline" if name == "ridge" else name
        print(f"  {name_is:<16}{f['acc']:7.1%}   95 % [{f['ci95'][0]:.1%}, {f['ci95'][1]:.1%}]   mean per class {f['per_class']:.1%}"
              + "   <- the result" * (name == result["method"]))
    print(f"  {'chance':<16}{zsl['chance']:7.1%}")
    if best:
        print(f"  {'best on test':<16}{best['acc']:7.1%}   epoch {best['epoch']:g}: chosen on the test set; no result")
    for name, f in figures.items() if result["gzsl"] else ():
        print(f"  {name:<16}seen {f['seen']:.1%}  unseen {f['unseen']:.1%}  harmonic {f['harmonic']:.1%}  AUSUC {f['ausuc']:.3f}"
              f"   among all classes, γ {f['gamma']:.3f}")
    print("per class")
    for c, counts, acc in zip(data.unseen, zsl["confusion"], zsl["class_acc"]):
        line, likeliest = f"  {data.classes[c]:<36}{sum(counts):5d} samples", data.unseen[int(np.argmax(counts))]
        if acc is not None:
            line += f" {acc:7.1%}" + ("" if likeliest == c else f"   mostly taken for {data.classes[likeliest]}")
        print(line)

def print_summary(results):
    """Results of several seeds → {"METHOD FIGURE": spread}, printed too."""
    headlines = ("acc", "seen", "unseen", "harmonic", "ausuc")
    seeds = [{f"{name} {key}": f[key] for name, f in compared(result).items() for key in headlines if key in f} for result in results]
    summary = {key: spread([seed[key] for seed in seeds]) for key in seeds[0]}
    for key, s in summary.items():
        mean, std, low, high, *each = (f"{v:.3f}" if "ausuc" in key else f"{v:.1%}" for v in (s["mean"], s["std"], *s["ci95"], *s["each"]))
        print(f"  {key:<20}{mean:>6} ± {std}  [{low}, {high}]  ", *each)
    return summary
