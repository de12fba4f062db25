"""Draw a finished run, several runs side by side, or one skeleton sequence. Pictures need matplotlib.

    python docs/plot.py RUN                       figures.png in the run's folder
    python docs/plot.py RUN RUN ...               comparison.png in the first run's folder; several seeds, too
    python docs/plot.py --table RUN RUN ...       print the means of seeds and splits, as in the README
    python docs/plot.py --data SOURCE --row N     SOURCE_rowN.png in the current folder

--out FILE.png is another place for the picture.
"""
import sys
import warnings
from pathlib import Path

import numpy as np

try:
    from matplotlib.figure import Figure
    from matplotlib.font_manager import fontManager, get_font
    from matplotlib.text import Text
except ImportError:
    Figure = None

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import (InputError, Parser, command_line, files_in, graph_beside, note, read_json, read_ntu,
                  write_file)
from zsar import GRAPHS, KINECT20, NTU25, to_common_frame, wilson_interval


def main():
    """The command line."""
    parser = Parser(prog="docs/plot.py", description="Draw finished runs, or one skeleton sequence.")
    add = parser.add_argument
    add("runs", type=Path, nargs="*", metavar="RUN", help="the folder of a finished run")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--table", action="store_true", help="print a table of runs: methods, splits, seeds")
    form.add_argument("--out", type=Path, metavar="FILE.png", help="where to write the picture")
    add("--data", type=Path, help="a folder with skeletons.npy or .skeleton files, or one such file")
    add("--row", type=int, default=0, help="the sequence to draw (default: 0)")
    add("--force", action="store_true", help="overwrite an existing picture")
    args = parser.parse_args()
    if bool(args.runs) == bool(args.data) or args.table and args.data:
        parser.error("give either runs or --data, of which there is no --table")
    if args.out and args.out.suffix != ".png":
        parser.error(f"--out {args.out}: a picture is a .png file")
    if args.table:
        return print("\n".join(table_lines(args.runs)))
    if Figure is None:
        raise InputError("matplotlib is missing; pip install -e '.[plot]'")
    path, figure = draw_sequence(args.data, args.row) if args.data else draw_runs(args.runs)
    path = args.out or path
    if path.exists() and not args.force:
        raise InputError(f"{path}: exists already; give --force to overwrite it")
    set_fonts(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")              # a note said it once
        write_file(path, lambda f: figure.savefig(f, format="png", bbox_inches="tight"))
    print(f"written: {path}")


def set_fonts(figure):
    """Draw all text literally ("$" is not mathematics), in installed fonts that have its letters."""
    texts, families = figure.findobj(Text), []
    missing = {ord(letter) for text in texts for letter in text.get_text() if letter.isprintable()}
    regular = [font for font in fontManager.ttflist if Path(font.fname).exists()
               and (font.style, font.weight, font.stretch) == ("normal", 400, "normal")
               and "LastResort" not in font.fname]              # it has a box for each letter
    for font in sorted(regular, key=lambda font: font.name != "DejaVu Sans"):
        found = missing and missing & get_font(font.fname).get_charmap().keys()
        if found:
            families.append(font.name)
            missing -= found
    for text in texts:
        text.set(parse_math=False, fontfamily=families)
    if missing:
        letters = "".join(map(chr, sorted(missing)))
        note(f"no installed font has {letters}; install one, such as Noto Sans CJK for Chinese")


# ------------------------------------------------------------------------------------------------------- runs
def read_results(folders):
    """The results of runs, of one seed or of several → [(label, result), ...]."""
    results = []
    for folder in folders:
        run = read_json(folder / "result.json")
        for result in run.get("seeds", [run]):
            if not {"method", "seed", "split", "dataset", "note", "figures", "history"} <= result.keys():
                raise InputError(f"{folder / 'result.json'}: another version wrote it; train again")
            results.append((f"{result['method']}, seed {result['seed']}\n{folder.name}", result))
    return results


def table_lines(folders):
    """Yield a Markdown table of runs: each figure's mean over splits, as mean ± deviation over seeds.

    For zero-shot accuracy the mean of each split follows.
    """
    results = [result for _, result in read_results(folders)]
    if len({result["dataset"] for result in results}) > 1:
        raise InputError("--table: the runs are of different datasets; give those of one")
    splits, seeds = ({result[key]: None for result in results} for key in ("split", "seed"))
    found = {(name, result["split"], result["seed"]): figures
             for result in results for name, figures in result["figures"].items()}
    yield from (f"{note}\n" for note in {result["note"] for result in results} - {None})
    yield f"| | ZSL ({', '.join(splits)}) | seen | unseen | harmonic | AUSUC |\n|---|---|---|---|---|---|"
    for name in sorted({name for name, _, _ in found}, key=lambda name: (name == "ridge", name)):
        missing = [f"{split}, seed {seed}" for split in splits for seed in seeds
                   if "ausuc" not in found.get((name, split, seed), {})]
        if missing:
            raise InputError(f"--table: {name} has no generalized figures of split {missing[0]}; add the run")
        cells = []
        for key in ("acc", "seen", "unseen", "harmonic", "ausuc"):
            each = np.array([[found[name, split, seed][key] for split in splits] for seed in seeds])
            scale, form = (1, ".3f") if key == "ausuc" else (100, ".1f")
            deviation = f" ± {scale * each.mean(1).std(ddof=1):{form}}" if len(seeds) > 1 else ""
            cells.append(f"{scale * each.mean():{form}}{deviation}")
            if key == "acc":
                cells[0] += f" ({', '.join(f'{100 * mean:.1f}' for mean in each.mean(0))})"
        yield f"| {name} | {' | '.join(cells)} |"
    yield f"| chance | {100 * np.mean([figures['chance'] for figures in found.values()]):.1f} | | | | |"


def draw_runs(folders):
    """Draw one result, or a comparison of several → the picture's path, the figure."""
    results = read_results(folders)
    if len({result["data_sha256"] for _, result in results}) > 1:
        raise InputError("these runs differ in data, text or split; compare runs on the same task")
    if len(results) > 1:
        return folders[0] / "comparison.png", draw_comparison(results)
    return folders[0] / "figures.png", draw_run(results[0][1])


def draw_run(result):
    """Confusion and accuracy of each unseen class; below them the seen-unseen curve and the training."""
    figures, history = result["figures"], result["history"]
    zsl, ridge = figures[result["method"]], figures["ridge"]
    classes, confusion = result["unseen_classes"], np.array(zsl["confusion"])   # K names, (K, K)
    counts = confusion.sum(1)                                   # (K,)
    size, kind = 0.25 * len(classes), "validation" if result["validate"] else "unseen"
    figure = Figure((13 + size, 6.5 + size), layout="constrained")              # inches
    figure.suptitle(f"{result['note'] or ''}\n{result['method']} on {result['dataset']}, split "
                    f"{result['split']}, seed {result['seed']}: {zsl['acc']:.1%} among the {kind} classes, "
                    f"ridge {ridge['acc']:.1%}, chance {zsl['chance']:.1%}".strip())
    top, bottom = figure.subfigures(2, 1, height_ratios=[2.5 + size, 4])
    matrix, bars = top.subplots(1, 2, sharey=True, width_ratios=[5 + size, 3])
    matrix.imshow(confusion / np.maximum(counts, 1)[:, None], cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, column in np.argwhere(confusion):
        colour = "white" if confusion[row, column] > counts[row] / 2 else "black"
        matrix.text(column, row, confusion[row, column], size=8, color=colour, ha="center", va="center")
    matrix.set_xticks(range(len(classes)), range(1, len(classes) + 1))
    matrix.set_yticks(range(len(classes)), [f"{name}  {k}" for k, name in enumerate(classes, start=1)])
    matrix.set(title="samples of each class, by predicted class", xlabel="predicted class")
    for k in np.flatnonzero(counts):
        draw_bar(bars, k, confusion[k, k] / counts[k], wilson_interval(confusion[k, k], counts[k]))
    bars.set(title="accuracy, 95 % interval", xlim=(0, 1))
    generalized, loss, test = bottom.subplots(1, 3)
    draw_generalized(generalized, reversed(figures.items()))
    for ax, key, title in ((loss, "loss", "training loss"),
                           (test, "acc_on_test", "accuracy on the TEST set (nothing is chosen by it)")):
        ax.plot([point["epoch"] for point in history], [point[key] for point in history], ".-")
        ax.set(title=title, xlabel="epoch")
    test.set_ylim(0, 1)
    return figure


def draw_bar(ax, row, acc, interval):
    """A bar with its interval, and both in figures beside it; the x axis goes from 0 to 1."""
    ax.barh(row, acc, 0.7, color="skyblue")
    ax.plot(interval, [row, row], color="black", linewidth=1, marker="|")
    ax.text(1.02, row, f"{acc:.1%} [{interval[0]:.1%}, {interval[1]:.1%}]", va="center")


def draw_generalized(ax, curves):
    """Seen-unseen curves of [(name, figures), ...], with a point at the chosen γ."""
    ax.set(title="no seen-unseen curve: trained without --gzsl", xlim=(0, 1), ylim=(0, 1),
           xlabel="accuracy of unseen classes", ylabel="accuracy of seen classes")
    for name, figures in curves:
        if "curve" in figures:
            _, seen, unseen = np.array(figures["curve"]).T
            label = f"{name}: AUSUC {figures['ausuc']:.3f}, harmonic mean {figures['harmonic']:.1%}"
            curve, = ax.plot(unseen, seen, label=label)
            ax.plot(figures["unseen"], figures["seen"], "o", color=curve.get_color())
            ax.set_title("among all classes, for every γ; •: the chosen γ")
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2))


def draw_comparison(results):
    """Accuracy, ridge and chance of results on the same task, [(label, result), ...]; seen-unseen curves."""
    first = results[0][1]
    figure = Figure((16, 4 + 0.6 * len(results)), layout="constrained")
    figure.suptitle(f"{first['note'] or ''}\n{first['dataset']}, split {first['split']}".strip())
    bars, generalized = figure.subplots(1, 2)
    figures = [(label, result["figures"][result["method"]]) for label, result in results]
    for row, (_, zsl) in enumerate(figures):
        draw_bar(bars, row, zsl["acc"], zsl["ci95"])
        ridge = results[row][1]["figures"]["ridge"]
        bars.vlines(ridge["acc"], row - 0.5, row + 0.5, color="black", linestyle="--")
    bars.axvline(figures[0][1]["chance"], color="black", linestyle=":")
    bars.set_yticks(range(len(results)), [label for label, _ in results])
    bars.invert_yaxis()
    bars.set(title="accuracy, 95 % interval; dashed: ridge; dotted: chance", xlim=(0, 1))
    draw_generalized(generalized, figures)
    return figure


# --------------------------------------------------------------------------------------------------- sequence
def draw_sequence(source, row):
    """Draw a sequence as recorded and in the common frame → the picture's path, the figure."""
    path, x, graph = read_sequence(source, row)                 # (3, T, V, M)
    absent = ~x.any((0, 2))[:, None]                            # (T, 1, M)
    common = to_common_frame(x[None], graph)[0]
    frames = np.linspace(0, x.shape[1] - 1, 8).astype(int)
    figure = Figure((14, 10), layout="constrained")
    sides = "left side blue, right side orange"
    if graph not in GRAPHS.values():
        sides = "what hangs from the left shoulder blue, from the right orange, other joints black"
    figure.suptitle(f"{path.name}, row {row}: {sides}; metres expected")
    views = ((x, 0, "as recorded: x to the right, y up"),
             (common, 0, "in the common frame: x to the right, y up"),
             (common, 2, "from the side: z to the right; if toes point left, left and right are exchanged"))
    for strip, (skeleton, across, title) in zip(figure.subfigures(3), views):
        strip.suptitle(title)
        skeleton = np.where(absent, np.nan, skeleton)           # NaN is not drawn
        for ax, frame in zip(strip.subplots(1, 8, sharex=True, sharey=True), frames):
            pose = skeleton[[across, 1], frame]                 # (2, V, M)
            for bone in graph.edges:
                ax.plot(*pose[:, bone], color=colour_of(bone[0], graph))
            ax.set(title=f"frame {frame}", aspect="equal", xticks=[])
    return Path(f"{source.resolve().stem}_row{row}.png"), figure


def read_sequence(source, row):
    """One sequence as recorded, in any unit → its file, (3, T, V, M), its graph. Raises InputError."""
    files = [source] if source.suffix.lower() == ".skeleton" else files_in(source, ".skeleton")
    names = "skeletons.npy", "seen_train_data.npy"
    path = next((source / name for name in names if (source / name).exists()), source)
    try:
        if files:
            return files[row], read_ntu(files[row], 64), NTU25
        x = np.array(np.lib.format.open_memmap(path, mode="r")[row], np.float32)
    except (OSError, ValueError, IndexError) as e:
        raise InputError(f"{source}: row {row} cannot be read ({e}); choose another row or source") from None
    if x.ndim != 4 or len(x) != 3:
        raise InputError(f"{path}: shape of a row is {x.shape}, must be (3, T, V, M)")
    graph = graph_beside(path.parent, x[None])
    if not graph or len(graph.edges) + 1 != x.shape[2]:
        raise InputError(f"{path}: has {x.shape[2]} joints; give a graph.json of as many beside it")
    return path, x, graph


def colour_of(joint, graph):
    """Blue for a joint of the left arm or leg, orange for one of the right, black for others.

    Of a graph that is not built in, only the shoulders' sides are known.
    """
    parents, colours = dict(graph.edges), dict(zip(graph.shoulders, ("C0", "C1")))
    if graph in (NTU25, KINECT20):                              # the legs do not hang from the shoulders
        colours |= {12: "C0", 16: "C1"}
    while joint in parents and joint not in colours:
        joint = parents[joint]
    return colours.get(joint, "black")


if __name__ == "__main__":
    command_line(main)
