"""Draw a finished run, several runs side by side, or one skeleton sequence. Needs matplotlib.

    python docs/plot.py RUN                       figures.png in the run's folder
    python docs/plot.py RUN RUN ...               comparison.png in the first run's folder
    python docs/plot.py --data FOLDER --row N     FOLDER_rowN.png in the current folder

A run of several seeds is a comparison, too. FOLDER contains skeletons.npy or .skeleton files; a single file
of either kind also works.
"""
import itertools
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import InputError, Parser, command_line, read_graph, read_json, read_ntu, write_file
from zsar import GRAPHS, to_common_frame, wilson_interval

try:
    import matplotlib
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure
except ImportError:
    matplotlib = None

BLUE, ORANGE, SKY = "#0072B2", "#E69F00", "#56B4E9"             # Okabe and Ito: they differ in grey, too
LINES = ((BLUE, "-"), (ORANGE, "--"), ("#009E73", "-."), ("#CC79A7", ":"), (SKY, (0, (6, 2))))
SIDES = ((0, "black", 1), (1, BLUE, 3), (-1, ORANGE, 3))        # neither, left, right: colour and width
LIMBS = {25: (12, 16), 20: (12, 16), 17: (1, 2), 18: (15, 14)}  # V: left and right hip, or eye
RESULT_KEYS = {"method", "dataset", "split", "seed", "note", "data_sha256", "unseen_classes", "zsl", "gzsl",
               "ridge", "history"}


def main():
    """The command line."""
    parser = Parser(prog="docs/plot.py", description="Draw finished runs, or one skeleton sequence.")
    add = parser.add_argument
    add("runs", type=Path, nargs="*", metavar="RUN", help="the folder of a finished run")
    add("--data", type=Path, help="a folder with skeletons.npy or .skeleton files, or one such file")
    add("--row", type=int, default=0, help="the sequence to draw (default: 0)")
    add("--svg", action="store_true", help="write an .svg file as well")
    add("--force", action="store_true", help="overwrite existing pictures")
    args = parser.parse_args()
    if bool(args.runs) == bool(args.data):
        parser.error("give either runs or --data")
    if matplotlib is None:
        raise InputError("matplotlib is missing; pip install -e '.[plot]'")
    matplotlib.rcParams.update({"font.size": 9, "text.parse_math": False})      # a class name may contain $
    stem, figure = draw_sequence(args.data, args.row) if args.data else draw_runs(args.runs)
    save(figure, [Path(f"{stem}.{kind}") for kind in ("png", "svg")[:1 + args.svg]], args.force)


def save(figure, paths, force):
    """Write a figure to each path. Raises InputError where a file exists, unless `force`."""
    for path in paths:
        if path.exists() and not force:
            raise InputError(f"{path}: exists already; give --force to overwrite it")
    for path in paths:
        write_file(path, lambda f: figure.savefig(f, format=path.suffix[1:]))
        print(f"written: {path}")


# ------------------------------------------------------------------------------------------------------- runs
def draw_runs(folders):
    """Draw one result, or a comparison of several → the picture's path without suffix, the figure."""
    results = []                                                # [(label, result), ...]
    for folder in folders:
        for result in read_results(folder / "result.json"):
            label = f"{result['method']}, seed {result['seed']}"
            results.append((f"{label}\n{folder.name}" if len(folders) > 1 else label, result))
    if len({result["data_sha256"] for _, result in results}) > 1:
        names = " and ".join(map(str, folders))
        raise InputError(f"{names}: data, text or split differ; compare runs on the same task")
    if len(results) > 1:
        return folders[0] / "comparison", draw_comparison(results)
    return folders[0] / "figures", draw_run(results[0][1])


def read_results(path):
    """The results in a result.json: one, or one for each seed. Raises InputError."""
    run = read_json(path)
    results = run.get("seeds", [run])
    for result in results:
        if not RESULT_KEYS <= set(result):
            raise InputError(f"{path}: not the result of a finished run; name another folder")
    return results


def draw_run(result):
    """Confusion and accuracy of each unseen class; below them the seen-unseen curve and the training."""
    classes, K = result["unseen_classes"], len(result["unseen_classes"])
    kind = "validation" if result.get("validate") else "unseen"
    confusion = np.array(result["zsl"]["confusion"])            # (K, K)
    width, height = max(7, 0.27 * K), max(2.4, 0.22 * K)        # inches
    size = (width + 6 + 0.08 * max(map(len, classes)), height + 6)
    figure = Figure(size, layout="constrained")
    figure.suptitle(f"{result['note'] or ''}\n{result['method']} on {result['dataset']}, "
                    f"split {result['split']}, seed {result['seed']}: {result['zsl']['acc']:.1%} among the "
                    f"{kind} classes, ridge {result['ridge']['acc']:.1%}, chance {1 / K:.1%}".strip())
    top, bottom = figure.subfigures(2, 1, height_ratios=[height + 1, 4])
    matrix, bars = top.subplots(1, 2, sharey=True, width_ratios=[width, 3])
    draw_confusion(matrix, classes, confusion)
    for k, (hits, count) in enumerate(zip(confusion.diagonal(), confusion.sum(1))):
        if count:
            draw_bar(bars, k, hits / count, wilson_interval(hits, count))
    bars.set(title="accuracy, 95 % interval", xlim=(0, 1))
    generalized, loss, test = bottom.subplots(1, 3)
    curves = [(result["method"], result["gzsl"])]
    if result["method"] != "ridge":
        curves.append(("ridge", result["ridge"]["gzsl"]))
    draw_generalized(generalized, curves)
    for ax, key in ((loss, "loss"), (test, "acc_on_test")):
        ax.plot([point["epoch"] for point in result["history"]], [point[key] for point in result["history"]],
                color=BLUE, marker=".")
    loss.set(title="training loss", xlabel="epoch")
    test.set(title="accuracy on the TEST set\n(nothing is chosen by it)", xlabel="epoch", ylim=(0, 1))
    return figure


def draw_confusion(ax, classes, confusion):
    """How many samples of each true class, a row, were classified as each class, a column."""
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    ax.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, column in np.argwhere(confusion):
        colour = "white" if share[row, column] > 0.5 else "black"
        ax.text(column, row, confusion[row, column], size=7, color=colour, ha="center", va="center",
                in_layout=False)
    numbers = range(1, len(classes) + 1)                        # names would not fit under the columns
    ax.set_xticks(range(len(classes)), numbers)
    ax.set_yticks(range(len(classes)), [f"{name}  {number}" for name, number in zip(classes, numbers)])
    ax.set(title="samples of each class, by predicted class", xlabel="predicted class")


def draw_bar(ax, row, acc, interval):
    """A bar with its interval, and both in figures beside it."""
    ax.barh(row, acc, 0.7, color=SKY)
    ax.plot(interval, [row, row], color="black", linewidth=1, marker="|")
    ax.text(1.02, row, f"{acc:.1%} [{interval[0]:.1%}, {interval[1]:.1%}]", va="center",
            transform=ax.get_yaxis_transform())


def draw_generalized(ax, curves):
    """Seen-unseen curves, with a point at the chosen γ, of [(name, generalized figures or None), ...]."""
    for mean in (0.2, 0.4, 0.6, 0.8):
        seen = np.linspace(mean / (2 - mean), 1, 100)
        ax.plot(mean * seen / (2 * seen - mean), seen, color="0.8", linewidth=1)
        ax.text(1.01, seen[0], f"{mean:.0%}", size=7, color="0.4", va="center")
    ax.set(title="among all classes, for every γ; •: the chosen γ\ngrey: equal harmonic means",
           xlabel="accuracy of unseen classes", ylabel="accuracy of seen classes", xlim=(0, 1), ylim=(0, 1))
    curves = [(name, figures) for name, figures in curves if figures]
    if not curves:
        return ax.set_title("no seen-unseen curve: trained without --gzsl")
    for (name, figures), (colour, dashes) in zip(curves, itertools.cycle(LINES)):
        _, seen, unseen = np.array(figures["curve"]).T
        label = f"{name}: AUSUC {figures['ausuc']:.3f}, harmonic mean {figures['harmonic']:.1%}"
        ax.plot(unseen, seen, color=colour, linestyle=dashes, label=label)
        ax.plot(figures["unseen"], figures["seen"], color=colour, marker="o", markeredgecolor="black")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2))


def draw_comparison(results):
    """Accuracy, ridge and chance of results on the same task, [(label, result), ...]; seen-unseen curves."""
    first = results[0][1]
    figure = Figure((13, 4 + 0.6 * len(results)), layout="constrained")
    figure.suptitle(f"{first['note'] or ''}\n{first['dataset']}, split {first['split']}".strip())
    bars, generalized = figure.subplots(1, 2)
    for row, (_, result) in enumerate(results):
        draw_bar(bars, row, result["zsl"]["acc"], result["zsl"]["ci95"])
        bars.vlines(result["ridge"]["acc"], row - 0.5, row + 0.5, color="black", linestyle="--")
    bars.axvline(first["zsl"]["chance"], color="black", linestyle=":")
    bars.set_yticks(range(len(results)), [label for label, _ in results])
    bars.invert_yaxis()
    bars.set(title="accuracy among the unseen classes, 95 % interval\n"
             "dashed: ridge, same encoder; dotted: chance", xlim=(0, 1))
    draw_generalized(generalized, [(label, result["gzsl"]) for label, result in results])
    return figure


# --------------------------------------------------------------------------------------------------- sequence
def draw_sequence(source, row):
    """Draw one sequence of a source → the picture's path without suffix, the figure."""
    name, x, graph = read_sequence(source, row)                 # (3, T, V, M)
    if not np.isfinite(x).all():
        raise InputError(f"{source}: row {row} is not finite; correct or drop it")
    common = to_common_frame(x[None], graph)[0]
    figure = Figure((14, 10), layout="constrained")
    figure.suptitle(f"{name}: left side blue, right side orange")
    views = figure.subplots(3)
    draw_poses(views[0], x, graph, "as recorded: x to the right, y up")
    draw_poses(views[1], common, graph, "in the common frame: x to the right, y up")
    draw_poses(views[2], common, graph, "in the common frame, from the side: z to the right; where toes "
               "point left, left and right are exchanged", across=2)
    folder = source.resolve()
    return Path(f"{folder.name if folder.is_dir() else folder.stem}_row{row}"), figure


def read_sequence(source, row):
    """One sequence as recorded, in any unit → its name, (3, T, V, M), its joint graph. Raises InputError."""
    files = [source] if source.suffix == ".skeleton" else sorted(source.rglob("*.skeleton"))
    path, graph = source, GRAPHS[25]
    if source.is_dir():
        names = "skeletons.npy", "seen_train_data.npy"
        path = next((source / name for name in names if (source / name).exists()), source / names[0])
    samples = files or open_skeletons(path)
    if not 0 <= row < len(samples):
        raise InputError(f"{source}: has no row {row}; choose one from 0 to {len(samples) - 1}")
    if not files:
        own = path.parent / "graph.json"
        graph = read_graph(own) if own.exists() else GRAPHS.get(samples.shape[3])
        if not graph:
            raise InputError(f"{path}: has {samples.shape[3]} joints; give a graph.json beside it")
        return f"{path.name}, row {row}", np.array(samples[row], np.float32), graph
    try:
        return files[row].name, read_ntu(files[row], 64), graph
    except (OSError, ValueError) as e:
        raise InputError(f"{files[row]}: cannot be read ({e}); choose another file") from None


def open_skeletons(path):
    """The skeletons in an .npy file, in any unit → (N, 3, T, V, M), memory-mapped. Raises InputError."""
    try:
        x = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: cannot be read ({e}); give a file or folder of skeletons") from None
    if x.ndim != 5 or x.shape[1] != 3:
        raise InputError(f"{path}: shape is {x.shape}, must be (N, 3, T, V, M)")
    return x


def draw_poses(ax, x, graph, title, across=0):
    """Eight poses of (3, T, V, M) along time, side by side; `across`: the coordinate drawn to the right."""
    ax.set_title(title, loc="left")
    frames = np.unique(np.linspace(0, x.shape[1] - 1, 8).astype(int))
    present = x.any((0, 2))[frames]                             # (8, M)
    if not present.any():
        return ax.set(xticks=[], yticks=[], xlabel="nobody is present")
    poses = x[[across, 1]].transpose(1, 3, 2, 0)[frames][present]               # (n, V, 2), of those present
    width, height = np.ptp(poses, (0, 1))
    step = max(1.15 * width, 0.6 * height, 1e-6)
    middle = poses[..., 0].min() + width / 2 + step * np.arange(len(frames))
    poses[..., 0] += step * np.nonzero(present)[0][:, None]
    bones = np.array(graph.edges)                               # (V - 1, 2), from the outer joint inwards
    side = sides(graph)[bones[:, 0]]                            # (V - 1,)
    for which, colour, thickness in SIDES:
        lines = poses[:, bones[side == which]].reshape(-1, 2, 2)
        ax.add_collection(LineCollection(lines, colors=colour, linewidths=thickness))
    for border in middle[1:] - step / 2:
        ax.axvline(border, color="0.8", linewidth=1)
    ax.set_xticks(middle, frames)
    ax.autoscale_view()
    ax.set(aspect="equal", xlabel="frame", ylabel="y (metres expected)")


def sides(graph):
    """The side of each joint (V,): 1 left, -1 right, 0 neither; known for the arms, and for LIMBS."""
    num_joints = len(graph.edges) + 1
    side = np.zeros(num_joints, int)
    for left, right in (graph.shoulders, LIMBS.get(num_joints, graph.shoulders)):
        side[left], side[right] = 1, -1
    for _ in graph.edges:                                       # each round reaches at least one joint more
        for child, parent in graph.edges:
            side[child] = side[child] or side[parent]
    return side


if __name__ == "__main__":
    command_line(main)
