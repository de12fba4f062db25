import ast
import contextlib
import csv
import fnmatch
import json
import math
import multiprocessing.forkserver
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import train
import zsar
from test_zsar import (ROOT, assert_same_weights, least, person, remove, result_of, run_main, save, script,
                       small_folder, spoil, weights_of, with_value, without_times, write, write_skeleton)

__all__ = ["small_folder"]                                                # a fixture


# -------------------------------------------------------------------------- train.py: one run from end to end
@pytest.fixture(scope="session")
def tiny_folder(small_folder, tmp_path_factory):
    """The small folder with every fourth frame and few tokens: an encoder trains on it in half a second."""
    folder = tmp_path_factory.mktemp("data") / "tiny"
    shutil.copytree(small_folder, folder)
    spoil("skeletons.npy", lambda x: x[:, :, ::4])(folder)
    spoil("text_label.npy", lambda text: text[:, :3])(folder)
    spoil("text_description.npy", lambda text: text[:, :4])(folder)
    return folder


@pytest.fixture
def light_folder(tiny_folder, tmp_path):
    """A copy of the tiny folder that tests may spoil, with random ready features in place of skeletons."""
    folder = tmp_path / "mine"
    shutil.copytree(tiny_folder, folder, ignore=lambda *_: ["skeletons.npy"])
    save("features.npy", np.random.default_rng(0).random((96, 256), dtype=np.float32))(folder)
    return folder


@contextlib.contextmanager
def ends_in_one_line(capsys, *parts, status=2):
    """The block must end the program with that status and one line on standard error with those parts."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        yield
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if not line.startswith("note: ")]
    assert stop.value.code == status
    assert len(errors) == 1 and all(part in errors[0] for part in parts), errors


def test_the_command_line(tiny_folder, tmp_path, monkeypatch, capsys):
    options = "--epochs 2 --encoder-epochs 1 --device cpu --batch-size 8".split()
    command = ["--method", "dvta", "--split", "9_3", "--data", str(tiny_folder), *options]
    done = script("train.py", *command, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "SYNTHETIC" not in done.stdout
    for part in ("encoder step 2/2, epoch 1  loss ", "dvta step 8/8, epoch 2  loss ", "ridge baseline",
                 "chance", "best on test", "Eat meal/snack",
                 "samples: 36 training, 36 seen test, 12 unseen test; seed 0; cpu, float32"):
        assert part in done.stdout
    monkeypatch.chdir(tmp_path)
    run = Path("runs/tiny_9_3_dvta_seed0_epochs-2_batch_size-8_encoder.epochs-1")
    result = result_of(run)
    assert {"command", "dataset", "seed", "device", "notes", "versions", "data_sha256"} <= result.keys()
    assert result["command"] == "python train.py " + shlex.join(command)
    assert result["method"] == "dvta" and result["split"] == "9_3" and result["note"] is None
    zsl, best = result["zsl"], result["best_on_test"]
    assert zsl["n"] == 12 and zsl["chance"] == 1 / 3 and 0 <= zsl["acc"] <= 1
    assert sum(map(sum, zsl["confusion"])) == 12
    assert best["acc"] >= zsl["acc"] and best["epoch"] in (1, 2)
    assert [point["epoch"] for point in result["history"]] == [1, 2]
    assert 0 <= result["encoder"]["seen_test_acc"] <= 1
    assert result["seconds"].keys() == {"encoder", "train"}
    assert result["settings"].keys() == {"encoder", "ridge", "dvta"}
    assert result["settings"]["dvta"]["batch_size"] == 8
    assert result["settings"]["encoder"]["epochs"] == 1
    assert {path.name for path in run.iterdir()} == {"result.json", "model.pt"}
    written = (run / "result.json").read_bytes()
    with ends_in_one_line(capsys, f"{run}: holds a finished run; give --force"):
        train.main(command)
    assert (run / "result.json").read_bytes() == written
    with ends_in_one_line(capsys, "choose one of: 9_3, 10_2"):
        train.main([*command, "--split", "6_6"])
    monkeypatch.setattr(sys, "argv", ["train.py", "--list"])
    train.main()
    assert "55_5" in capsys.readouterr().out


def test_a_synthetic_run_says_so(tmp_path, monkeypatch, capsys):
    whole = data.synthetic                                                # a small part of the set, for time
    monkeypatch.setattr(data, "synthetic", lambda text: whole(text, performers=2, repeats=1, frames=4))
    command = "--method ridge --split 55_5 --encoder-epochs 1 --device cpu".split()
    train.main([*command, "--out", str(tmp_path / "run")])
    lines, result = capsys.readouterr().out.splitlines(), result_of(tmp_path / "run")
    assert lines[0] == lines[-1] == result["note"]
    assert "SYNTHETIC" in lines[0] and "say nothing about NTU" in lines[0]
    assert result["dataset"] == "synthetic"


def test_a_generalized_run(light_folder, tmp_path, capsys):
    result, _ = run_main(light_folder, tmp_path / "run", "--gzsl")
    d = data.read_data(light_folder, "9_3")
    for gzsl in (result["gzsl"], result["ridge"]["gzsl"]):
        assert gzsl.keys() == {"seen", "unseen", "harmonic", "gamma", "ausuc", "curve"}
        assert 0 <= gzsl["ausuc"] <= 1
        hits = gzsl["seen"] * len(d.seen_test)
        assert hits == pytest.approx(round(hits))
        assert gzsl["harmonic"] == pytest.approx(zsar.harmonic_mean(gzsl["seen"], gzsl["unseen"]))
    captured = capsys.readouterr()
    assert "validation run, to choose γ: dvta on mine" in captured.out
    assert "7 seen and 2 validation classes" in captured.out
    assert captured.out.count("AUSUC") == 2
    assert f"note: {train.VALIDATION_NOTE}\n" == captured.err             # ready features
    assert result["notes"] == [train.VALIDATION_NOTE]
    plain, _ = run_main(light_folder, tmp_path / "plain")
    assert plain["gzsl"] is None and plain["notes"] == [] and plain["zsl"] == result["zsl"]


def write_published(folder):
    """Published features for split 55_5: three training samples a seen class, three test samples a class."""
    rng, unseen = np.random.default_rng(0), [10, 11, 19, 26, 56]
    labels = [np.repeat(c, 3) for c in (np.setdiff1d(np.arange(60), unseen), unseen, np.arange(60))]
    folder.mkdir()
    for (x_name, y_name), y in zip(data.PUBLISHED[data.FEATURES_FORMAT], labels):
        save(f"{x_name}.npy", rng.normal(size=(len(y), 256)).astype(np.float32))(folder)
        save(f"{y_name}.npy", y)(folder)
    return folder


def test_generalized_figures_need_seen_test_samples(tmp_path, capsys):
    folder = write_published(tmp_path / "ntu60")
    result, _ = run_main(folder, tmp_path / "run", "--gzsl", method="ridge", split="55_5")
    assert 0 < result["gzsl"]["ausuc"] < 1
    for name in ("gtest", "g_label"):
        remove(f"{name}.npy")(folder)
    with ends_in_one_line(capsys, "ntu60: has no seen test samples, which --gzsl needs"):
        run_main(folder, tmp_path / "run", "--gzsl", method="ridge", split="55_5")


def test_same_seed_same_figures(tiny_folder, tmp_path):
    # three parent folders: no shared cache of encoders
    (a, a_weights), (b, b_weights), (c, c_weights) = (
        run_main(tiny_folder, tmp_path / name / "run", "--seed", seed, "--encoder-epochs", 1)
        for name, seed in ("a0", "b0", "c1"))
    for result in (a, b, c):
        assert not result["encoder"]["cached"]
        assert Path(result["encoder"]["file"]).exists()
        assert result["seconds"]["encoder"] > 0
    assert without_times(a) == without_times(b)
    assert_same_weights(a_weights, b_weights)
    assert (a["seed"], c["seed"]) == (0, 1)
    name = "projector.fc0.weight"
    assert not torch.equal(a_weights[name], c_weights[name])


def test_several_seeds(tiny_folder, tmp_path, capsys):
    many, few_epochs = tmp_path / "many", ["--encoder-epochs", 1]
    train.main(least(tiny_folder, many, *few_epochs, "--seed", 3, "--seeds", 2, "--gzsl", method="tdsm"))
    printed = capsys.readouterr().out
    result = result_of(many)
    one, weights = run_main(tiny_folder, tmp_path / "one", *few_epochs, "--seed", 4, "--gzsl", method="tdsm")
    assert [run["seed"] for run in result["seeds"]] == [3, 4]
    assert result["seeds"][1]["zsl"] == one["zsl"]
    assert result["seeds"][1]["gzsl"] == one["gzsl"]
    assert result["seeds"][1] == result_of(many / "seed4")
    assert_same_weights(weights_of(many / "seed4"), weights)
    summary = result["summary"]
    assert summary.keys() == {f"{method} {figure}" for method in ("tdsm", "ridge")
                              for figure in ("acc", "seen", "unseen", "harmonic", "ausuc")}
    assert summary["tdsm acc"]["each"] == [run["zsl"]["acc"] for run in result["seeds"]]
    ridge_ausuc = [run["ridge"]["gzsl"]["ausuc"] for run in result["seeds"]]
    assert summary["ridge ausuc"]["mean"] == pytest.approx(np.mean(ridge_ausuc))
    assert summary["ridge ausuc"]["std"] == pytest.approx(np.std(ridge_ausuc, ddof=1))
    assert "tdsm, seeds 3 to 4: mean ± standard deviation" in printed
    assert {path.name for path in many.iterdir()} == {"seed3", "seed4", "result.json"}
    # encoder seeds vary with the run's, and validation has its own encoder
    assert len(list((tmp_path / "encoders").iterdir())) == 4


def encoders_of(folder):
    """The encoders of a cache, by the number of classes that each was trained on."""
    encoders = [torch.load(path, weights_only=True) for path in folder.iterdir()]
    return {len(encoder["state"]["classifier.bias"]): encoder for encoder in encoders}


@pytest.fixture
def changed_folder(tiny_folder, tmp_path):
    """The tiny folder with other samples and other text of the unseen classes."""
    changed = tmp_path / "changed"
    shutil.copytree(tiny_folder, changed)
    unseen, rng = [1, 5, 8], np.random.default_rng(0)
    rows = np.isin(np.load(changed / "labels.npy"), unseen)
    spoil("skeletons.npy", with_value(rows, rng.normal(size=(rows.sum(), 3, 4, 25, 1))))(changed)
    for name in ("text_label.npy", "text_description.npy"):
        text = np.load(changed / name)
        save(name, with_value(unseen, rng.normal(size=text[unseen].shape))(text))(changed)
    return changed


def test_nothing_of_the_unseen_classes_reaches_the_weights(tiny_folder, changed_folder, tmp_path):
    """The leak test: other unseen samples and unseen text give bit-identical encoder and method weights."""
    for method in ("dvta", "tdsm", "ridge"):
        options = ["--gzsl"] if method == "ridge" else ["--gzsl", "--lr", 0.003]
        same = {"method": method, "split": "9_3_val5"}
        result, weights = run_main(tiny_folder, tmp_path / "a" / method, *options, **same)
        other_result, other_weights = run_main(changed_folder, tmp_path / "b" / method, *options, **same)
        assert_same_weights(weights, other_weights)
        assert result["zsl"] != other_result["zsl"]                       # the figures did see them
        assert result["gzsl"]["gamma"] == other_result["gzsl"]["gamma"]
        assert result["gzsl"]["curve"] != other_result["gzsl"]["curve"]
        # where settings are chosen, not even the figures see them
        result, weights = run_main(tiny_folder, tmp_path / "a" / method, "--validate", **same)
        other_result, other_weights = run_main(changed_folder, tmp_path / "b" / method, "--validate", **same)
        assert_same_weights(weights, other_weights)
        assert result["zsl"] == other_result["zsl"] and result["history"] == other_result["history"]
    encoders, other_encoders = (encoders_of(tmp_path / name / "encoders") for name in "ab")
    assert encoders.keys() == other_encoders.keys() == {9, 4}             # of the run, of the validation run
    assert len(list((tmp_path / "a" / "encoders").iterdir())) == 2        # that of --validate is the same
    for num_classes, encoder in encoders.items():
        other = other_encoders[num_classes]
        assert_same_weights(encoder["state"], other["state"])
        assert not torch.equal(encoder["features"], other["features"])


def test_validate_is_a_run_whose_unseen_classes_are_the_validation_ones(light_folder, tmp_path, capsys):
    """The same figures as on a folder of the training samples only, without the unseen classes."""
    d = data.read_data(light_folder, "9_3")
    val, folder = data.validation(d), tmp_path / "other"
    folder.mkdir()
    save("features.npy", d.features[d.train])(folder)
    save("labels.npy", np.searchsorted(d.seen, d.labels[d.train]))(folder)    # class ids without the unseen
    save("training.npy", np.isin(d.train, val.train))(folder)
    for name in ("text_label.npy", "text_description.npy"):
        save(name, np.load(light_folder / name)[d.seen])(folder)
    write("classes.txt", "\n".join(d.classes[c] for c in d.seen))(folder)
    unseen = np.searchsorted(d.seen, val.unseen).tolist()
    write("splits.json", json.dumps({"7_2": {"unseen": unseen}}))(folder)
    for method in ("dvta", "tdsm", "ridge"):
        result, weights = run_main(light_folder, tmp_path / method, "--validate", method=method)
        printed = capsys.readouterr().out
        assert "7 seen and 2 validation classes" in printed and "8 validation test" in printed
        assert "of 2 validation classes" in printed and "best on test" not in printed
        expected, same = run_main(folder, tmp_path / f"{method}_2", method=method, split="7_2")
        assert ("best on test" in capsys.readouterr().out) == (method != "ridge")
        assert result["zsl"] == expected["zsl"] and result["zsl"]["n"] == 8
        assert result["ridge"] == expected["ridge"]
        assert result["unseen_classes"] == expected["unseen_classes"]
        assert result["validate"] and not expected["validate"]
        assert result["best_on_test"] is None
        for key in weights:                                               # gradients are summed otherwise
            torch.testing.assert_close(weights[key], same[key], rtol=0, atol=1e-6)


def test_validate_refuses_what_cannot_be_validated(light_folder, tmp_path, capsys):
    with ends_in_one_line(capsys, "--gzsl", "--validate", "give one"):
        run_main(light_folder, tmp_path / "run", "--validate", "--gzsl")
    splits = {"10_2": {"unseen": [1, 5], "val": [2], "test_subjects": [2, 4]}}
    write("splits.json", json.dumps(splits))(light_folder)
    with ends_in_one_line(capsys, "10_2", "validation classes [2]", "too few"):
        run_main(light_folder, tmp_path / "run", "--validate", split="10_2")


# ---------------------------------------------------------------------------------- train.py: encoder, method
def test_the_encoder_cache_hits_and_misses(tiny_folder, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(tiny_folder, folder)

    def cached(*options, method="ridge", split="9_3"):
        out = tmp_path / "runs" / "x"
        options = ["--encoder-epochs", 1, *options]
        return run_main(folder, out, *options, method=method, split=split)[0]["encoder"]["cached"]

    assert not cached()
    assert cached()
    assert cached(method="tdsm")                                          # a second method reuses it
    assert cached("--set", "margin=2", "noises=1", method="tdsm")         # whatever the method's settings
    assert not cached("--seed", 1)
    assert not cached(split="10_2")
    assert not cached("--encoder-epochs", 2)
    assert not cached("--set", "encoder.label_smoothing=0.2")
    spoil("text_label.npy", lambda a: a[::-1])(folder)
    assert cached()                                                       # the encoder never reads text
    spoil("skeletons.npy", with_value((0, 0, 0, 0, 0), 0.25))(folder)
    assert not cached()
    spoil("labels.npy", with_value(0, 2))(folder)
    assert not cached()
    assert len(list((tmp_path / "runs" / "encoders").iterdir())) == 7


def test_another_joint_graph_has_another_encoder(tiny_folder, tmp_path):
    folder, graph = tmp_path / "data", zsar.NTU25
    shutil.copytree(tiny_folder, folder)
    files = []
    for edges in (graph.edges, [(22, 7) if edge == (22, 7) else (21, 7) if edge == (21, 22) else edge
                                for edge in graph.edges]):
        value = {"edges": edges, "centre": graph.centre, "root": graph.root, "shoulders": graph.shoulders}
        write("graph.json", json.dumps(value))(folder)
        result, _ = run_main(folder, tmp_path / "run", "--encoder-epochs", 1, method="ridge")
        files.append(result["encoder"]["file"])
    assert sorted(map(sorted, graph.edges)) != sorted(map(sorted, edges))
    assert files[0] != files[1]


def test_a_run_with_shiftgcn(tiny_folder, tmp_path, capsys):
    """Training, cache, generalized figures and predict; and each encoder has a cache of its own."""
    run = tmp_path / "runs" / "run"
    options = ["--encoder", "shiftgcn", "--encoder-epochs", 1, "--gzsl"]
    result, _ = run_main(tiny_folder, run, *options, method="ridge")
    assert result["settings"]["encoder"]["name"] == "shiftgcn"
    assert "units.0.spatial.mask" in torch.load(run / "model.pt", weights_only=True)["encoder"]["state"]
    again, _ = run_main(tiny_folder, run, *options, method="ridge")
    assert again["encoder"]["cached"] and again["zsl"] == result["zsl"] and again["gzsl"] == result["gzsl"]
    rows, d = predictions_of(run, tiny_folder), data.read_data(tiny_folder, "9_3")
    assert len(rows) == 96 and all(row[1] in d.classes for row in rows)
    other, _ = run_main(tiny_folder, run, "--encoder-epochs", 1, method="ridge")
    assert not other["encoder"]["cached"] and other["settings"]["encoder"]["name"] == "stgcn"


def test_published_training_of_the_encoders(tiny_folder, tmp_path):
    for name, settings in train.PUBLISHED_ENCODERS.items():
        options = ["--encoder", name, "--encoder-preset", "published", "--encoder-epochs", 1]
        run = tmp_path / name
        result, _ = run_main(tiny_folder, run, *options, method="ridge")
        assert result["settings"]["encoder"] == settings | {"epochs": 1}
        assert 0 <= result["encoder"]["seen_test_acc"] <= 1
        trained = torch.load(run / "model.pt", weights_only=True)["encoder"]
        assert len(trained["state"]["classifier.bias"]) == (12 if settings["all_classes"] else 9)
        assert len(predictions_of(run, tiny_folder)) == 96
    encoder = zsar.ShiftGCN(25, 1, 5)
    adam, sgd = (train.make_optimizer(encoder, settings) for settings in train.PUBLISHED_ENCODERS.values())
    assert (type(adam), adam.defaults["weight_decay"]) == (torch.optim.Adam, 0.0)
    assert sgd.defaults["momentum"] == 0.9 and sgd.defaults["nesterov"]
    decays = {name: group["weight_decay"] for (name, _), group in zip(encoder.named_parameters(),
                                                                      sgd.param_groups)}
    assert decays["units.0.spatial.weight"] == pytest.approx(1e-3)
    assert decays["units.0.spatial.mask"] == 0 and decays["classifier.weight"] == 1e-4


def test_an_encoder_without_augmentation(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "augmented", None)                         # a call would fail
    options = ["--set", "encoder.augment=false", "--encoder-epochs", 1]
    result, _ = run_main(tiny_folder, tmp_path / "run", *options, method="ridge")
    assert result["settings"]["encoder"] == train.ENCODER | {"augment": False, "epochs": 1}


def test_ready_features_need_no_encoder(light_folder, tmp_path):
    result, _ = run_main(light_folder, tmp_path / "out" / "run")
    assert result["encoder"] == {"seen_test_acc": None, "cached": False, "file": None}
    assert not (tmp_path / "out" / "encoders").exists()


def write_code(module, folder, edit=""):
    """Write a module's source without comments and with one edit into a folder → its path.

    edit: "STGCN.forward", which gets one statement more, or "Ridge.fit:doc", which gets another docstring.
    """
    tree = node = ast.parse((ROOT / f"{module.__name__}.py").read_text(encoding="utf-8"))
    where, _, doc = edit.partition(":")
    for name in filter(None, where.split(".")):
        node = next(n for n in node.body if getattr(n, "name", None) == name
                    or isinstance(n, ast.Assign) and getattr(n.targets[0], "id", None) == name)
    if isinstance(node, ast.Assign):
        node.value = ast.Constant("another value")
    elif doc:
        node.body[0] = ast.Expr(ast.Constant("Another docstring."))
    elif edit:
        node.body.append(ast.Pass())
    path = folder / f"{module.__name__}.py"
    path.write_text(f"# a comment\n{ast.unparse(ast.fix_missing_locations(tree))}\n", encoding="utf-8")
    return path


ENCODER_EDITS = {  # an edit of the source: does an encoder's training depend on it?
    zsar: {"": False, "STGCN:doc": False, "Ridge.fit": False, "best_gamma": False, "STGCN.forward": True,
           "GraphConv.forward": True, "ShiftUnit.forward": True, "augmented": True, "to_common_frame": True,
           "recalibrate_batch_norm": True, "FEATURES": True},
    train: {"": False, "fit:doc": False, "report": False, "PRESETS": False, "fit": True, "lr_factor": True,
            "make_optimizer": True, "random_batches": True, "EncoderTraining.forward": True,
            "encode_all": True},
}


@pytest.mark.parametrize("module", ENCODER_EDITS, ids=["zsar", "train"])
def test_code_that_an_encoder_depends_on(module, tmp_path, monkeypatch):
    code, counts = train.encoder_code(), {}
    for edit in ENCODER_EDITS[module]:
        monkeypatch.setattr(module, "__file__", str(write_code(module, tmp_path, edit)))
        counts[edit] = train.encoder_code() != code
    assert counts == ENCODER_EDITS[module]


def test_source_files_edited_during_a_run(tiny_folder, tmp_path, monkeypatch):
    """The run ends as if they had not been, and its encoder is kept under the key of the code that ran."""
    code, out = tmp_path / "code", tmp_path / "runs" / "run"
    code.mkdir()
    for name in ("alignment", "data", "diffusion", "train", "zsar"):
        shutil.copy(ROOT / f"{name}.py", code)
    (code / "text").symlink_to(ROOT / "text")
    command = least(tiny_folder, out, "--encoder-epochs", 4, method="tdsm")
    process = subprocess.Popen([sys.executable, code / "train.py", *command], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not process.stdout.readline().startswith("encoder step"):
        assert process.poll() is None
    (code / "zsar.py").write_text("def broken(:")
    (code / "train.py").write_text("")
    (code / "diffusion.py").unlink()
    printed, error = process.communicate()
    assert process.returncode == 0 and error == ""
    assert "encoder step 8/8" in printed and "tdsm step 1/4" in printed
    first = result_of(out)["encoder"]

    def encoder(edit):
        monkeypatch.setattr(zsar, "__file__", str(write_code(zsar, code, edit)))
        return run_main(tiny_folder, out, "--encoder-epochs", 4, method="ridge")[0]["encoder"]

    other = encoder("augmented")                                          # other code
    assert not other["cached"] and other["file"] != first["file"]
    assert encoder("Ridge.fit") == first | {"cached": True}               # for the encoder the same


def no_compiler(x):
    raise RuntimeError("Cannot find a working triton installation\nmore")


@pytest.mark.parametrize("where", ["at once", "in the first call"])
def test_without_a_compiler_functions_run_as_they_are(where, monkeypatch, capsys):
    tries = []

    def torch_compile(function):
        tries.append(function)
        if where == "at once":
            no_compiler(None)
        return no_compiler

    monkeypatch.setattr(torch, "compile", torch_compile)
    double = train.compiled(lambda x: 2 * x)
    assert [double(3), double(4), double(5)] == [6, 8, 10]
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and len(tries) == 1
    assert error.startswith("note: ") and "RuntimeError: Cannot find a working triton installation" in error


def test_errors_of_a_compiled_function_itself(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    divide = train.compiled(lambda x: 1 / x)
    with pytest.raises(ZeroDivisionError):
        divide(0)
    assert divide(2) == 0.5
    with pytest.raises(ZeroDivisionError):
        divide(0)
    assert capsys.readouterr().err == ""
    with pytest.raises(RuntimeError, match="triton"):
        train.compiled(no_compiler)(1)


# -------------------------------------------------------------------------------- train.py: the training loop
@pytest.mark.parametrize("epochs, steps, expected", [
    (3, None, 30), (None, 7, 7), (3, [10, 20], 20), (3, [50, 90], 50), (3, [10, 90], 30)])
def test_the_length_of_a_training(epochs, steps, expected):
    assert train.num_steps({"epochs": epochs, "steps": steps}, per_epoch=10) == expected


def test_warm_up_then_cosine():
    settings = {"warm_up": 0.15, "epochwise": False}
    factors = [train.lr_factor(step, 100, 10, settings) for step in range(101)]
    assert factors[0] == 1 / 16 and factors[14] == 15 / 16 and factors[15] == 1.0
    assert factors[15 + 42] == pytest.approx(0.5 * (1 + math.cos(math.pi * 42 / 85)))
    assert factors[100] == pytest.approx(0)
    steps = np.diff(factors)
    assert (steps[:15] > 0).all()
    assert (steps[15:] < 0).all()
    assert factors == [train.lr_factor(step, 100, 10, settings | {"warm_up": 15.0}) for step in range(101)]
    epochwise = [train.lr_factor(step, 100, 10, settings | {"epochwise": True}) for step in range(100)]
    assert epochwise == np.repeat(factors[:100:10], 10).tolist()


class Line(torch.nn.Linear):
    """A model whose loss is a straight line's mean square; it keeps the rows that it was called with."""

    def __init__(self):
        with train.seeded(0, torch.device("cpu")):
            super().__init__(4, 1)
        self.calls, self.breaks_at, self.log = [], None, {}

    def forward(self, x, y):
        self.calls.append(y.tolist())
        if len(self.calls) == self.breaks_at:
            raise KeyboardInterrupt
        self.log = {"more": self.bias.sum().detach()}
        return super().forward(x).square().mean()


def samples_of(count):
    """count samples of 4 features, with their row numbers for labels."""
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(0)), torch.arange(count)


def test_learning_rates_of_the_published_encoders(tmp_path, monkeypatch):
    """Shift-GCN's falls by ten at epochs 60, 80, 100; ST-GCN's as a cosine, set once an epoch."""
    real, rates = train.make_optimizer, {}
    for name, settings in train.PUBLISHED_ENCODERS.items():
        rates[name] = []

        def make_optimizer(model, settings):
            optimizer = real(model, settings)
            optimizer.register_step_post_hook(lambda o, *_: rates[name].append(o.param_groups[0]["lr"]))
            return optimizer

        monkeypatch.setattr(train, "make_optimizer", make_optimizer)
        samples = samples_of(2 * settings["batch_size"])                  # two steps an epoch
        train.fit(Line(), samples, samples[1], settings, tmp_path / f"{name}.pt")
    expected = [0.1] * 120 + [0.01] * 40 + [0.001] * 40 + [0.0001] * 80
    assert rates["shiftgcn"] == pytest.approx(expected)
    cosine = [0.005 * 0.5 * (1 + math.cos(math.pi * (step // 2) / 150)) for step in range(300)]
    assert rates["stgcn"] == pytest.approx(cosine)


LINE = {"epochs": 3, "steps": None, "batch_size": 4, "optimizer": "adam", "lr": 0.1, "weight_decay": 0.0,
        "warm_up": 0.0, "epochwise": False, "keep_last": False}


@pytest.mark.parametrize("keep_last, sizes", [(False, [4, 4]), (True, [4, 4, 2])])
def test_each_epoch_is_a_new_order_of_the_training_rows(keep_last, sizes, tmp_path):
    model, rows = Line(), torch.arange(0, 20, 2)
    log = train.fit(model, samples_of(20), rows, LINE | {"keep_last": keep_last}, tmp_path / "line-x.pt")
    epochs = [model.calls[first:first + len(sizes)] for first in range(0, len(model.calls), len(sizes))]
    assert len(epochs) == 3 and all([len(batch) for batch in epoch] == sizes for epoch in epochs)
    seen = [sum(epoch, []) for epoch in epochs]
    assert all(set(s) <= set(rows.tolist()) and len(set(s)) == sum(sizes) for s in seen)
    assert seen[0] != seen[1] != seen[2]
    assert [point["epoch"] for point in log["history"]] == [1, 2, 3] and not model.training


def test_the_caller_keeps_their_random_state():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    with train.seeded(0, torch.device("cpu")):
        torch.rand(3)
    assert torch.equal(torch.rand(1), expected)


def test_a_diverging_loss_is_one_line(light_folder, tmp_path, capsys):
    parts = "dvta step ", "the loss is not finite; lower the learning rate (--lr"
    with ends_in_one_line(capsys, *parts):
        run_main(light_folder, tmp_path / "out", "--lr", "1e30", "--epochs", 9)
    assert not (tmp_path / "out" / "result.json").exists()
    run_main(light_folder, tmp_path / "out")                           # the remedy, in the same folder


def test_the_history_is_that_of_an_uninterrupted_training(tmp_path, monkeypatch):
    """Broken in the middle of an epoch, the epoch's mean loss still counts every step of it."""
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", -1)

    def trained(name, breaks_at=None):
        model = Line()
        model.breaks_at = breaks_at
        log = train.fit(model, samples_of(10), torch.arange(10), LINE | {"batch_size": 2}, tmp_path / name,
                        test=lambda: round(model.bias.item(), 6))
        return log["history"], log["best"], model.state_dict(), model.calls

    history, best, weights, calls = trained("whole.pt")
    with pytest.raises(KeyboardInterrupt):
        trained("broken.pt", breaks_at=8)
    resumed = trained("broken.pt")
    assert resumed[:2] == (history, best)
    assert_same_weights(resumed[2], weights)
    assert resumed[3] == calls[7:] and len(calls) == 15
    assert [point["epoch"] for point in history] == [1, 2, 3]
    assert all(math.isfinite(point["loss"]) for point in history)
    assert best["acc"] == max(point["acc_on_test"] for point in history)


# ----------------------------------------------------------------------- train.py: the run's folder, resuming
@pytest.fixture(scope="session")
def forks():
    """Other processes, which need not load PyTorch again: they are forked from one that has."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        multiprocessing.forkserver.ensure_running()
    return context


@pytest.fixture
def killed(forks, tmp_path):
    """→ a function that runs a command of train.py in another process, and kills it when it
    writes a file of a pattern for the count-th time; → what it printed.
    """
    def run(command, pattern, count):
        printed = tmp_path / "printed"
        process = forks.Process(target=killed_process, args=(command, pattern, count, printed))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL, printed.read_text()
        return printed.read_text()
    return run


def killed_process(command, pattern, left, printed):
    """What `killed` runs."""
    for number in (1, 2):
        os.dup2(os.open(printed, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_APPEND), number)
    train.CHECKPOINT_SECONDS, real = -1, os.replace                       # a checkpoint at every step

    def replace(part, path):
        nonlocal left
        left -= fnmatch.fnmatch(os.path.basename(path), pattern)
        if not left:                                                      # written, and not yet renamed
            sys.stdout.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        real(part, path)

    os.replace = replace
    train.main(command)


def assert_same_encoders(folder, other):
    assert {path.name for path in folder.iterdir()} == {path.name for path in other.iterdir()}
    for path in folder.iterdir():
        one, two = (torch.load(p, weights_only=True) for p in (path, other / path.name))
        assert_same_weights(one["state"], two["state"])
        assert torch.equal(one["features"], two["features"])


def test_a_run_killed_in_each_phase_is_the_same_in_the_end(tiny_folder, tmp_path, killed, capsys):
    """kill -9 in both encoders' training, in TDSM's, at the end: the same command gives the same bits."""
    options = ["--steps", 9, "--gzsl"]
    whole, weights = run_main(tiny_folder, tmp_path / "whole" / "run", *options, method="tdsm")
    out = tmp_path / "killed" / "run"
    command = least(tiny_folder, out, *options, method="tdsm")
    kills = [  # the file it is killed at, at which time, where the next one then resumes
        ("encoder-*.pt", 3, "encoder: resuming at step 2 of 4, from "),
        ("tdsm-*.pt", 4, "tdsm: resuming at step 3 of 9, from "),
        ("encoder-*.pt", 2, "encoder: resuming at step 1 of 2, from "),   # the validation run's
        ("model.pt", 1, "tdsm: resuming at step 9 of 9, from "),
    ]
    resumes = None
    for pattern, count, next_resumes in kills:
        printed = killed(command, pattern, count)
        assert resumes is None or resumes in printed
        resumes = next_resumes
        assert not (out / "result.json").exists() and not (out / "model.pt").exists()
        files = list((tmp_path / "killed").rglob("*.pt"))
        assert files and all(torch.load(path, weights_only=True) for path in files)
    capsys.readouterr()
    train.main(command)
    assert capsys.readouterr().out.count(resumes) == 2
    assert without_times(result_of(out)) == without_times(whole)
    assert_same_weights(weights_of(out), weights)
    assert {path.name for path in out.iterdir() if path.suffix != ".part"} == {"result.json", "model.pt"}
    assert_same_encoders(tmp_path / "whole" / "encoders", tmp_path / "killed" / "encoders")


def test_a_run_killed_before_its_result_is_written(light_folder, tmp_path, killed):
    out = tmp_path / "killed"
    whole, weights = run_main(light_folder, tmp_path / "whole")
    command = least(light_folder, out)
    killed(command, "dvta-*.pt", 2)
    assert "dvta: resuming at step 1 of 2" in killed(command, "result.json", 1)
    assert (out / "model.pt").exists() and not (out / "result.json").exists()
    train.main(command)
    result = result_of(out)
    assert without_times(result) == without_times(whole)
    assert len(result["history"]) == 2
    assert result["seconds"]["train"] > 0
    assert_same_weights(weights_of(out), weights)


def test_ctrl_c_is_one_line_and_the_same_command_resumes(light_folder, tmp_path, monkeypatch, capsys):
    code = "import train; train.CHECKPOINT_SECONDS = -1; train.main()"
    command = ["--method", "tdsm", "--split", "9_3", "--data", str(light_folder), "--device", "cpu",
               "--steps", "60", "--set", "width=16"]
    process = subprocess.Popen([sys.executable, "-c", code, *command], cwd=tmp_path, text=True,
                               env=os.environ | {"PYTHONPATH": str(ROOT)},
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not process.stdout.readline().startswith("tdsm step 6/60"):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130
    assert error.count("\n") == 1 and error.startswith("interrupted; the same command")
    monkeypatch.chdir(tmp_path)
    out = Path("runs/mine_9_3_tdsm_seed0_steps-60_width-16")
    checkpoint, = (out / train.UNFINISHED).glob("tdsm-*.pt")
    step = torch.load(checkpoint, weights_only=True)["log"]["step"]
    assert 5 <= step < 60
    assert not (out / "result.json").exists()
    train.main(command)
    assert f"tdsm: resuming at step {step} of 60" in capsys.readouterr().out
    train.main([*command, "--out", "again"])
    assert "resuming" not in capsys.readouterr().out
    assert without_times(result_of(out)) == without_times(result_of(Path("again")))
    assert_same_weights(weights_of(out), weights_of(Path("again")))


def test_several_seeds_killed_in_the_second(light_folder, tmp_path, killed, capsys):
    options = ["--seeds", 2]
    out, whole = tmp_path / "run", tmp_path / "whole"
    train.main(least(light_folder, whole, *options, method="tdsm"))
    command = least(light_folder, out, *options, method="tdsm")
    killed(command, "tdsm-*.pt", 7)                                       # four of the first seed
    assert (out / "seed0" / "result.json").exists()
    assert not (out / "seed1" / "result.json").exists() and not (out / "result.json").exists()
    capsys.readouterr()
    train.main(command)
    printed = capsys.readouterr().out
    assert "tdsm: resuming at step 4 of 4" in printed and "tdsm: resuming at step 2 of 4" in printed
    assert result_of(out)["summary"] == result_of(whole)["summary"]
    for seed in ("seed0", "seed1"):
        assert_same_weights(weights_of(out / seed), weights_of(whole / seed))
        assert without_times(result_of(out / seed)) == without_times(result_of(whole / seed))
    assert not list(out.rglob(train.UNFINISHED))


def test_a_finished_run_is_overwritten_with_force_only(light_folder, tmp_path, capsys):
    out = tmp_path / "run"
    run = least(light_folder, out, method="ridge")
    train.main(run)
    written = {path: path.read_bytes() for path in out.iterdir()}
    for change in ("", "--seed 1", "--seeds 2", "--gzsl", "--set penalty=1", "--split 10_2"):
        with ends_in_one_line(capsys, f"{out}: holds a finished run; give --force to overwrite it"):
            train.main([*run, *change.split()])
        assert {path: path.read_bytes() for path in out.iterdir()} == written
    train.main([*run, "--force", "--set", "penalty=1"])
    assert result_of(out)["settings"]["ridge"]["model"]["penalty"] == 1.0
    assert (out / "model.pt").read_bytes() != written[out / "model.pt"]
    # several seeds take all their folders, or none
    train.main(least(light_folder, tmp_path / "many" / "seed1", method="ridge"))
    with ends_in_one_line(capsys, "seed1: holds a finished run"):
        train.main(least(light_folder, tmp_path / "many", "--seeds", 2, method="ridge"))
    assert [path.name for path in (tmp_path / "many").iterdir()] == ["seed1"]


def test_a_run_leaves_the_files_of_others_alone(light_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("film.mkv.part").write_text("mine")
    Path("checkpoints").mkdir()
    Path("checkpoints/mine.pt").write_bytes(b"mine")
    Path("model.pt").write_bytes(b"a stranger's")
    command = least(light_folder, ".", method="ridge")
    with ends_in_one_line(capsys, "give --force to overwrite it, or another --out"):
        train.main(command)
    assert Path("model.pt").read_bytes() == b"a stranger's"
    Path("model.pt").unlink()
    train.main(command)
    assert Path("film.mkv.part").read_text() == "mine"
    assert Path("checkpoints/mine.pt").read_bytes() == b"mine"
    assert result_of(Path("."))["zsl"]["n"] == 12


def test_other_settings_in_the_folder_of_an_unfinished_run_start_from_scratch(light_folder, tmp_path, killed,
                                                                             capsys):
    out, unfinished = tmp_path / "run", tmp_path / "unfinished"
    killed(least(light_folder, unfinished, method="tdsm"), "tdsm-*.pt", 3)
    one_text = ["--text", light_folder / "text_label.npy"]

    def resumes(*options):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(unfinished, out)
        capsys.readouterr()
        train.main(least(light_folder, out, *options, method="tdsm"))
        return "resuming at step 2 of 4" in capsys.readouterr().out

    assert resumes()
    for change in (["--lr", 0.01], ["--seed", 1], ["--set", "margin=2"], ["--steps", 5], one_text):
        assert not resumes(*change)
    spoil("features.npy", lambda x: x + 0.1 * (np.arange(256) == 3))(light_folder)    # other data
    assert not resumes()
    _, fresh = run_main(light_folder, tmp_path / "fresh", method="tdsm")
    assert_same_weights(weights_of(out), fresh)


def test_names_that_become_paths(light_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["../../x", "a/b", "c\nd", "ü b"]
    splits = {name: {"unseen": [1, 5, 8], "test_subjects": [2, 4]} for name in names}
    write("splits.json", json.dumps(splits))(light_folder)
    for name in names:
        train.main(["--method", "ridge", "--split", name, "--data", str(light_folder), "--device", "cpu"])
    runs = [path.name for path in Path("runs").iterdir()]
    expected = ["..-..-x", "a-b", "c-d", "--b"]
    assert sorted(runs) == sorted(f"mine_{name}_ridge_seed0" for name in expected)


def test_a_place_that_cannot_be_written(light_folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with ends_in_one_line(capsys, f"{tmp_path}/file/run", "cannot be made (Not a directory)"):
        run_main(light_folder, tmp_path / "file" / "run")


def test_a_damaged_checkpoint_or_encoder_is_one_line(tiny_folder, tmp_path, capsys):
    command = least(tiny_folder, tmp_path / "run", "--encoder-epochs", 1, "--force", method="ridge")
    train.main(command)
    encoder = next((tmp_path / "encoders").iterdir())
    encoder.write_bytes(encoder.read_bytes()[:1000])
    with ends_in_one_line(capsys, f"{encoder}: cannot be read", "remove it"):
        train.main(command)
    torch.save({"state": {}}, encoder)
    with ends_in_one_line(capsys, f"{encoder}: lacks features, seen_test_acc"):
        train.main(command)
    encoder.unlink()
    checkpoint = tmp_path / "run" / train.UNFINISHED / f"encoder-{encoder.name}"
    checkpoint.write_bytes(b"PK")
    with ends_in_one_line(capsys, f"{checkpoint}: cannot be read"):
        train.main(command)
    checkpoint.unlink()
    train.main(command)                                                   # the remedy


# --------------------------------------------------------------------------------- train.py: many processes
SHARED = """
import json, os, sys
import torch
import torch.distributed as dist
import train

init, encode, fit, parallel = dist.init_process_group, train.encode, train.fit, train.DistributedDataParallel
log = {"before": [], "after": [], "end": [], "features": [], "rows": []}

def note_weights(name, model):
    log[name].append({key: p.detach().clone() for key, p in model.named_parameters()})

def noted_parallel(model):
    note_weights("before", model)
    shared = parallel(model)
    note_weights("after", model)
    return shared

def noted_fit(model, *rest):
    result = fit(model, *rest)
    note_weights("end", model)
    return result

def noted_encode(*args):
    result = encode(*args)
    log["features"].append(result[0])
    return result

dist.init_process_group = lambda *args, **kwargs: dist.is_initialized() or init(*args, **kwargs)
train.DistributedDataParallel, train.fit, train.encode = noted_parallel, noted_fit, noted_encode
for command in json.loads(sys.argv[1]):
    train.main(command)
torch.save(log, f"{sys.argv[2]}/{os.environ['RANK']}.pt")
"""


def test_two_processes(tiny_folder, tmp_path):
    """torchrun: the encoder and TDSM train in both, from the same weights to the same; DVTA in the first."""
    (tmp_path / "shared.py").write_text(SHARED)
    tdsm = least(tiny_folder, tmp_path / "tdsm", "--encoder-epochs", 1, method="tdsm")
    dvta = least(tiny_folder, tmp_path / "dvta", "--encoder-epochs", 1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               tmp_path / "shared.py", json.dumps([tdsm, dvta]), tmp_path]
    done = subprocess.run(command, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for line in ("tdsm on tiny", "dvta on tiny", "tdsm step 4/4", "dvta step 2/2", "encoder step 2/2",
                 f"written: {tmp_path / 'tdsm' / 'result.json'}"):
        assert sum(part.startswith(line) for part in lines) == 1, line
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert len(first["before"]) == len(second["before"]) == 2             # the encoder, TDSM
    for before, other, after, other_after in zip(first["before"], second["before"], first["after"],
                                                 second["after"]):
        assert any(not torch.equal(before[key], other[key]) for key in before)    # each has its own seed
        assert_same_weights(after, other_after)
        assert_same_weights(after, before)                                # the first one's
    assert (len(first["end"]), len(second["end"])) == (3, 2)
    for start, end, other in zip(first["after"], first["end"], second["end"]):
        assert_same_weights(end, other)
        assert any(not torch.equal(start[key], end[key]) for key in end)
    assert torch.equal(first["features"][0], second["features"][0])
    for key, weights in first["end"][1].items():
        assert torch.equal(weights_of(tmp_path / "tdsm")[key], weights)
    result, weights = run_main(tiny_folder, tmp_path / "alone", "--encoder-epochs", 1)     # on that encoder
    assert result["encoder"]["cached"]
    assert without_times(result_of(tmp_path / "dvta")) == without_times(result)
    assert_same_weights(weights_of(tmp_path / "dvta"), weights)


# ------------------------------------------------------------------------------------------ train.py: predict
@pytest.fixture(scope="session")
def finished_runs(tiny_folder, tmp_path_factory):
    """A run of each method on the tiny folder: {method: (folder, result)}."""
    out, runs = tmp_path_factory.mktemp("runs"), {}
    more = {"dvta": (), "tdsm": ("--steps", 30, "--lr", 0.01), "ridge": ()}   # few steps leave near ties
    for method, options in more.items():
        result, _ = run_main(tiny_folder, out / method, *options, method=method)
        runs[method] = out / method, result
    return runs


def predictions_of(run, samples, *classes):
    """The rows of predictions.csv of a run for samples, among new classes where given."""
    command = ["predict", "--run", str(run), "--data", str(samples), "--device", "cpu", "--force"]
    if classes:
        command += ["--classes", *map(str, classes)]
    train.main(command)
    with open(run / "predictions.csv", newline="") as f:
        header, *rows = csv.reader(f)
    assert header == ["sample", "class", "score", "margin", "top5"]
    return rows


@pytest.mark.parametrize("method", ["dvta", "tdsm", "ridge"])
def test_predict_among_classes_named_only_now(method, finished_runs, tiny_folder, tmp_path, capsys):
    """The split's unseen classes, in another order and by text alone, give the figures of the run itself."""
    run, result = finished_runs[method]
    d = data.read_data(tiny_folder, "9_3")
    order, names = [8, 1, 5], ["zeta", "alpha, beta", "gamma"]
    files = tmp_path / "new_label.npy", tmp_path / "new_description.npy"
    for path, text in zip(files, d.text):
        np.save(path, text[order])
    files[0].with_suffix(".txt").write_text("\n".join(names))
    rows = predictions_of(run, tiny_folder, *files)
    hits = [rows[n][1] == names[order.index(d.labels[n])] for n in d.unseen_test]
    assert sum(hits) / len(hits) == pytest.approx(result["zsl"]["acc"])
    assert [row[0] for row in rows] == [f"row {n}" for n in range(96)]
    for _, name, _, margin, top5 in rows:
        best_first = top5.split(" | ")
        assert float(margin) >= 0
        assert best_first[0] == name
        assert set(best_first) == set(names)
    assert f"{method}: 96 sequences among 3 classes" in capsys.readouterr().out


def test_predict_of_skeleton_files(finished_runs, tiny_folder, tmp_path, capsys):
    """In a folder, in folders below, under any name, or a single one; broken ones are skipped with a note."""
    run, _ = finished_runs["tdsm"]
    x = np.load(tiny_folder / "skeletons.npy")
    raw = tmp_path / "raw"
    (raw / "deep" / "er").mkdir(parents=True)
    paths = [raw / "a.skeleton", raw / "deep" / "b.skeleton", raw / "deep" / "er" / "c.SKELETON"]
    for n, path in enumerate(paths):
        write_skeleton(path, x[n])
    (raw / "z.skeleton").write_text("3\n")
    all_rows = predictions_of(run, tiny_folder)
    capsys.readouterr()
    rows = predictions_of(run, raw)
    assert "1 of 4 files skipped; z.skeleton: " in capsys.readouterr().err
    assert [row[0] for row in rows] == [path.name for path in paths]
    one, = predictions_of(run, paths[1])
    assert one[:2] == rows[1][:2]
    for row, other in zip([*rows, one], [*all_rows[:3], all_rows[1]]):
        assert row[1] == other[1]
        assert float(row[2]) == pytest.approx(float(other[2]), rel=1e-4)
    assert len(rows[0][4].split(" | ")) == 5
    assert rows[0][1] in data.bundled_classes("ntu60")[:12]               # seen and unseen classes


def test_predict_of_arrays(finished_runs, tiny_folder, light_folder, tmp_path, capsys):
    """A .npy of skeletons or features, by itself: ztest.npy of a published folder among them."""
    run, _ = finished_runs["ridge"]
    x = np.load(tiny_folder / "skeletons.npy")
    np.save(tmp_path / "some.npy", x[5:9].astype(np.float16))
    np.save(tmp_path / "two.npy", np.concatenate([x[5:9], x[5:9]], 4))    # a person more than in training
    all_rows = predictions_of(run, tiny_folder)
    for name in ("some.npy", "two.npy"):
        rows = predictions_of(run, tmp_path / name)
        assert [row[0] for row in rows] == ["row 0", "row 1", "row 2", "row 3"]
        assert [row[1] for row in rows] == [row[1] for row in all_rows[5:9]]
    run_main(light_folder, tmp_path / "run", method="ridge")
    whole = predictions_of(tmp_path / "run", light_folder)
    features = np.load(light_folder / "features.npy")
    np.save(tmp_path / "ztest.npy", features[7:10, :, None, None])
    rows = predictions_of(tmp_path / "run", tmp_path / "ztest.npy")
    assert [(row[1], row[4]) for row in rows] == [(row[1], row[4]) for row in whole[7:10]]
    assert [float(row[2]) for row in rows] == pytest.approx([float(row[2]) for row in whole[7:10]])
    with ends_in_one_line(capsys, "holds skeletons, but the run was trained on ready features"):
        predictions_of(tmp_path / "run", tiny_folder)


def test_predict_overwrites_nothing_unasked(finished_runs, tiny_folder, tmp_path, capsys):
    run, _ = finished_runs["ridge"]
    out = tmp_path / "labels.npy"
    out.write_text("mine")
    command = ["predict", "--run", str(run), "--data", str(tiny_folder), "--device", "cpu", "--out"]
    with ends_in_one_line(capsys, f"{out}: exists already; give another --out, or --force"):
        train.main([*command, str(out)])
    assert out.read_text() == "mine"
    train.main([*command, str(out), "--force"])
    assert out.read_text().startswith("sample,class,score")
    (tmp_path / "folder").mkdir()
    for force in ([], ["--force"]):
        with ends_in_one_line(capsys, f"{tmp_path / 'folder'}: "):
            train.main([*command, str(tmp_path / "folder"), *force])
    assert not list((tmp_path / "folder").iterdir())


def test_predict_with_one_file_for_both_prompts_and_one_class(finished_runs, tiny_folder, tmp_path):
    np.save(tmp_path / "one.npy", np.ones((1, 768), np.float32))
    rows = predictions_of(finished_runs["dvta"][0], tiny_folder, tmp_path / "one.npy")
    assert {(row[1], row[3], row[4]) for row in rows} == {("class 0", "", "class 0")}


def people(change=lambda x: x, joints=25):
    """→ a function that puts changed skeletons in place of a folder's features."""
    def spoiler(folder):
        x = np.stack([person(4, 0.1, seed, joints) for seed in range(5)])[..., None]
        remove("features.npy")(folder)
        save("skeletons.npy", change(x.astype(np.float32)))(folder)
    return spoiler


def class_text(*shape, names=None):
    """→ a function that writes t.npy, the text of new classes, beside a folder."""
    def spoiler(folder):
        save("t.npy", np.random.default_rng(0).normal(size=shape).astype(np.float32))(folder.parent)
        if names:
            write("t.txt", names)(folder.parent)
    return spoiler


def nothing(folder):
    """What is wrong is not the folder."""


BAD_PREDICTIONS = {  # what is wrong: (what to give, how to spoil the folder, what the one line must name)
    "no run": ("--run nowhere", nothing, "nowhere/model.pt: "),
    "no model": ("--run bad", nothing, "bad/model.pt: cannot be read"),
    "code in a model": ("--run code", nothing, "code/model.pt: cannot be read"),
    "earlier version": ("--run old", nothing, "old/model.pt: lacks classes, encoder, settings, shape, text"),
    "no data": ("--data nowhere", nothing, "error: nowhere: "),
    "another file": ("--data mine/classes.txt", nothing, "mine/classes.txt: "),
    "no samples": ("", remove("features.npy"), "mine: has no known format; looked for skeletons.npy"),
    "feature width": ("", spoil("features.npy", lambda a: a[:, :100]),
                      "has features of width 100, but the run was trained on 256"),
    "infinite": ("", spoil("features.npy", with_value((3, 3), np.inf)), "features.npy: "),
    "millimetres": ("", people(lambda x: 1000 * x), "millimetres"),
    "nobody": ("", people(np.zeros_like), "mine: no sequence has a body"),
    "y down": ("", people(lambda x: x * np.float32([1, -1, 1])[:, None, None, None]), "y down"),
    "joints": ("", people(joints=20), "has 20 joints, but the run's encoder was trained on 25"),
    "only broken files": ("", write("a.skeleton", "x"), "mine: none of its 1 .skeleton files could be read"),
    "the same text": ("--classes t.npy", lambda folder: save("t.npy", np.ones((3, 768)))(folder.parent),
                      "t.npy: classes 0 and 1 have the same text"),
    "text width": ("--classes t.npy", class_text(3, 512), "t.npy: shape is (3, 1, 512); the run needs"),
    "too many tokens": ("--classes t.npy", class_text(3, 40, 768), "up to 4"),
    "other names": ("--classes t.npy", class_text(3, 768, names="a\nb"),
                    "t.txt: names 2 classes, t.npy has 3"),
    "three prompts": ("--classes t.npy t.npy t.npy", class_text(3, 768), "the run has 2 prompts"),
    "no such option": ("--plot", nothing, "--plot"),
    "no such folder": ("--out nowhere/p.csv", nothing, "nowhere"),
}


class Evil:
    def __reduce__(self):
        return os.mkdir, ("was_run",)


@pytest.mark.parametrize("case", BAD_PREDICTIONS)
def test_bad_predictions_are_one_line_and_exit_2(case, finished_runs, light_folder, tmp_path, monkeypatch,
                                                 capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("bad", "old", "code"):
        Path(name).mkdir()
    Path("bad/model.pt").write_bytes(b"no model")
    torch.save({"method": "ridge", "state": {}}, "old/model.pt")
    torch.save({key: Evil() for key in train.MODEL_KEYS}, "code/model.pt")
    options, spoiler, message = BAD_PREDICTIONS[case]
    spoiler(light_folder)
    run, _ = finished_runs["ridge"]
    command = ["predict", "--run", str(run), "--data", str(light_folder), "--out", "p.csv"]
    with ends_in_one_line(capsys, message):
        train.main([*command, *options.split()])
    assert not Path("p.csv").exists() and not Path("was_run").exists()


def test_predict_tells_of_sequences_without_a_body(finished_runs, light_folder, capsys):
    people(with_value([1], 0))(light_folder)
    rows = predictions_of(finished_runs["ridge"][0], light_folder)
    assert len(rows) == 5
    error = capsys.readouterr().err
    assert error == f"note: {light_folder}: 1 of 5 sequences have no first person\n"


def test_predict_takes_lying_people_when_told(finished_runs, light_folder, capsys):
    people(lambda x: x[:, [1, 0, 2]])(light_folder)
    run, _ = finished_runs["ridge"]
    with ends_in_one_line(capsys, "--allow-lying"):
        predictions_of(run, light_folder)
    command = ["predict", "--run", str(run), "--data", str(light_folder), "--device", "cpu", "--force"]
    train.main([*command, "--allow-lying"])
    assert "5 sequences among 12 classes" in capsys.readouterr().out


# --------------------------------------------------------------------------------- train.py: the command line
BAD_OPTIONS = {  # options: what the one line must name
    "--data synthetic --split nowhere": "nowhere",
    "--epochs 0": "epochs=0",
    "--epochs 2.5": "--epochs",
    "--epochs 2 --steps 2": "not allowed with",
    "--batch-size 0": "batch_size=0",
    "--batch-size x": "--batch-size",
    "--lr nan": "lr=nan",
    "--lr -1": "lr=-1",
    "--seeds 0": "--seeds",
    "--method tdm": "--method",
    "--no-sde": "--no-sde",
    "--set sde=maybe": "sde=maybe: does not fit; it must be",
    "--set sde=1": "sde=1: does not fit",
    "--set batch_size=1.5": "batch_size=1.5: does not fit",
    "--set lr": "lr=: does not fit",
    "--set only=text": "only=text: does not fit; it must be one of",
    "--set optimizer=lion": "must be one of ('adam', 'adamw', 'sgd')",
    "--set encoder.name=resnet": "encoder.name=resnet: does not fit; it must be one of",
    "--set width=64": "width: is not a setting; choose one of: batch_size, centre, ",
    "--set model=1": "model: is not a setting",
    "--set encoder.sde=true": "encoder.sde: is not a setting; choose one of: all_classes, augment, ",
    "--set lr=1 sde=false nope=2": "nope: is not a setting",
    "--method ridge --set sde=false": "sde: is not a setting; choose one of: penalty",
    "--method ridge --steps 3": "steps: is not a setting",
    "--method tdsm --set width=65 heads=4": "width=65: is not a multiple of heads=4",
    "--method tdsm --set timestep=50": "timestep=50: must be from 0 to 49",
    "--method tdsm --set noises=0": "noises=0: does not fit",
    "--gzsl --validate": "--validate",
}


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_bad_options_are_one_line_and_exit_2(options, light_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["--method", "dvta", "--split", "9_3", "--data", str(light_folder)]
    with ends_in_one_line(capsys, BAD_OPTIONS[options]):
        train.main([*command, *options.split()])
    assert not Path("runs").exists()


def test_settings_on_the_command_line(light_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["--method", "dvta", "--split", "9_3", "--data", str(light_folder), "--device", "cpu",
               "--lr", "0.001", "--set", "only=da", "sde=false", "steps=3",
               "--set", "optimizer=sgd", "encoder.warm_up=2", "encoder.label_smoothing=0", "warm_up=0.5"]
    train.main(command)
    name = ("mine_9_3_dvta_seed0_lr-0.001_only-da_sde-false_steps-3_optimizer-sgd_encoder.warm_up-2_"
            "encoder.label_smoothing-0_warm_up-0.5")
    result, preset = result_of(Path("runs") / name), train.PRESETS["other"]
    assert result["settings"]["dvta"] == preset["dvta"] | {
        "lr": 0.001, "epochs": None, "steps": 3, "optimizer": "sgd", "warm_up": 0.5,
        "model": preset["dvta"]["model"] | {"only": "da", "sde": False}}
    assert result["settings"]["encoder"] == preset["encoder"] | {"warm_up": 2.0, "label_smoothing": 0.0}
    assert result["settings"]["ridge"] == preset["ridge"]
    assert type(result["settings"]["encoder"]["label_smoothing"]) is float
    train.main([*command, "--set", "only=null", "sde=true", "--out", "last"])     # the last one counts
    again = result_of(Path("last"))["settings"]["dvta"]["model"]
    assert again["only"] is None and again["sde"] is True
    assert preset == train.PRESETS["other"] and preset["dvta"]["model"]["sde"]        # as it was


@pytest.mark.parametrize("method, setting", [
    ("dvta", "sde=false"), ("tdsm", "triplet_weight=0"), ("tdsm", "conditions=both"), ("ridge", "penalty=1")])
def test_a_setting_reaches_the_model(method, setting, light_folder, tmp_path):
    (_, weights), (_, others) = (run_main(light_folder, tmp_path / "run", *options, method=method)
                                 for options in ([], ["--set", setting]))
    same = weights.keys() == others.keys() and all(torch.equal(weights[key], others[key]) for key in weights)
    assert not same


def test_a_run_repeated_by_its_command(light_folder, tmp_path):
    out, texts = tmp_path / "out with space", light_folder.glob("text_*.npy")
    options = ["--lr", 3e-4, "--seed", 5, "--gzsl", "--text", *texts, "--set", "only=da", "sde=false"]
    result, weights = run_main(light_folder, out, *options)
    program, script_name, *command = shlex.split(result["command"])
    assert (program, script_name) == ("python", "train.py") and "only=da" in command
    train.main(command)                                                   # it has --force
    assert without_times(result_of(out)) == without_times(result)
    assert_same_weights(weights_of(out), weights)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none(light_folder, tmp_path, capsys):
    with ends_in_one_line(capsys, "--device cuda: PyTorch finds no CUDA device"):
        run_main(light_folder, tmp_path / "out", "--device", "cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("method, options", [("tdsm", []), ("dvta", ["--fp32"]),
                                             ("ridge", ["--encoder", "shiftgcn"])], ids=str)
def test_a_run_on_cuda(method, options, small_folder, tmp_path):
    options = ["--device", "cuda", "--gzsl", *options]
    result, _ = run_main(small_folder, tmp_path / "run", *options, method=method)
    assert result["precision"] == ("float32" if "--fp32" in options else "bfloat16 and TF32")
    assert result["device"] == "cuda:0" and 0 <= result["encoder"]["seen_test_acc"] <= 1
    rows = predictions_of(tmp_path / "run", small_folder)
    assert len(rows) == 96


def test_precision(light_folder, tmp_path):
    result, weights = run_main(light_folder, tmp_path / "plain", method="tdsm")
    again, same = run_main(light_folder, tmp_path / "fp32", "--fp32", method="tdsm")
    assert result["precision"] == again["precision"] == "float32"
    assert not result["settings"]["tdsm"]["model"]["fp32"] and again["settings"]["tdsm"]["model"]["fp32"]
    assert_same_weights(weights, same)                                    # a CPU has float32 either way
    args = train.run_arguments(["--method", "dvta", "--split", "9_3"])
    for device, fp32, precision in (("cuda", False, "bfloat16 and TF32"), ("cuda", True, "float32"),
                                    ("cpu", False, "float32")):
        args.device, args.fp32 = torch.device(device), fp32
        assert train.precision_of(args) == precision


def test_setup_lists_every_module():
    text = (ROOT / "setup.py").read_text()
    modules = {path.stem for path in ROOT.glob("*.py")} - {"setup", "test_zsar", "tests_train", "tests_data"}
    assert modules and all(f'"{module}"' in text for module in modules)


# -------------------------------------------------------------------------------------------------- real data
@pytest.mark.skipif("ZSAR_DATA" not in os.environ, reason="set ZSAR_DATA=path/to/kinect28")
class TestKinect28:
    FOLDER = Path(os.environ.get("ZSAR_DATA", "."))

    @pytest.mark.parametrize("split", ["22_6_a", "22_6_b", "22_6_c", "22_6_d", "22_6_e"])
    def test_splits(self, split):
        d = data.read_data(self.FOLDER, split)
        assert len(d.seen) == 22 and len(d.unseen) == 6
        assert d.skeletons.shape == (765, 3, 64, 25, 1)
        subjects = np.load(self.FOLDER / "subjects.npy")
        assert not {*subjects[d.train]} & {*subjects[d.unseen_test]}
        assert len(d.train) + len(d.seen_test) == np.isin(d.labels, d.seen).sum()

    def test_preprocessed_people_stand_upright(self):
        d = data.read_data(self.FOLDER, "22_6_a")
        x = zsar.to_common_frame(d.skeletons, zsar.NTU25)[:, :, 0, :, 0]  # (N, 3, V), first frame
        assert ((x[:, 1, 3] - x[:, 1, 0]) > 0.2).mean() > 0.97            # the head above the spine base

    def test_skeleton_files_and_back(self, tmp_path):
        """All sequences as .skeleton files, prepared, are the same folder, with the same figures."""
        raw, out = tmp_path / "raw", tmp_path / "kinect28"
        x, labels = np.load(self.FOLDER / "skeletons.npy"), np.load(self.FOLDER / "labels.npy")
        subjects = np.load(self.FOLDER / "subjects.npy")
        raw.mkdir()
        for n in range(len(x)):                                           # names in the order of the rows
            name = f"S{1 + n // 100:03}C{1 + n % 100:03}P{subjects[n]:03}R001A{labels[n] + 1:03}"
            write_skeleton(raw / f"{name}.skeleton", x[n])
        data.prepare(raw, out)
        np.testing.assert_allclose(np.load(out / "skeletons.npy"), x, atol=1e-5)
        assert np.array_equal(np.load(out / "labels.npy"), labels)
        for name in ("classes.txt", "splits.json", "text_label.npy", "text_description.npy", "subjects.npy"):
            shutil.copy(self.FOLDER / name, out / name)
        (out / "training.npy").unlink(missing_ok=True)

        def run(folder, name):
            options = {"method": "ridge", "split": "22_6_a"}
            return run_main(folder, tmp_path / name / "run", "--encoder-epochs", 1, **options)

        (result, weights), (again, weights_again) = run(self.FOLDER, "0"), run(out, "1")
        assert result["zsl"] == again["zsl"]
        assert result["zsl"]["n"] == 83
        assert result["zsl"]["chance"] == 1 / 6
        assert 1 / 22 < result["encoder"]["seen_test_acc"] == again["encoder"]["seen_test_acc"]
        assert_same_weights(weights, weights_again)


KINECT81 = Path(os.environ.get("ZSAR_DATA", ".")).resolve().parent / "kinect81"


@pytest.fixture(scope="module")
def ready_features(tmp_path_factory):
    """A folder of ready features: each joint's mean place, its spread and its speed; the rest is dead."""
    folder = tmp_path_factory.mktemp("kinect81") / "features"
    shutil.copytree(KINECT81, folder, ignore=lambda *_: ["skeletons.npy"])
    x = zsar.to_common_frame(np.load(KINECT81 / "skeletons.npy"), zsar.NTU25)[..., 0]   # (N, 3, T, V)
    numbers = [x.mean(2), x.std(2), np.abs(np.diff(x, axis=2)).mean(2)]                 # (N, 3, V) each
    features = np.concatenate([part.reshape(len(x), -1) for part in numbers], 1)        # (N, 225)
    np.save(folder / "features.npy", np.pad(features, [(0, 0), (0, 256 - 225)]))
    return folder


@pytest.mark.skipif(not KINECT81.exists(), reason="kinect81 must lie beside ZSAR_DATA")
class TestKinect81:
    @pytest.mark.parametrize("split, unseen_test", [("71_10_a", 276), ("71_10_b", 232), ("71_10_c", 272)])
    def test_splits(self, split, unseen_test):
        d = data.read_data(KINECT81, split)
        assert (len(d.seen), len(d.unseen), len(d.val), len(d.unseen_test)) == (71, 10, 10, unseen_test)
        assert d.skeletons.shape == (4118, 3, 32, 25, 1)
        subjects = np.load(KINECT81 / "subjects.npy")
        assert not {*subjects[d.train]} & {*subjects[d.unseen_test]}

    @pytest.mark.parametrize("method, steps", [("ridge", 0), ("dvta", 40), ("tdsm", 200)])
    def test_every_method_is_above_chance_on_features(self, method, steps, ready_features, tmp_path):
        command = ["--method", method, "--split", "71_10_a", "--data", str(ready_features), "--device", "cpu"]
        length = ["--steps", str(steps)] if steps else []
        train.main([*command, *length, "--out", str(tmp_path / "run")])
        result = result_of(tmp_path / "run")
        assert result["zsl"]["n"] == 276 and result["zsl"]["chance"] == 0.1
        assert result["zsl"]["acc"] > 0.2
