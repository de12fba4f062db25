import csv
import json
import os
import re
import runpy
import shutil
import sys
import time

import numpy as np
import pytest
import torch

import data
import train
import zsar
from test_zsar import (  # noqa: F401
    ROOT, Evil, features_folder, least, person, remove, run_main, save, script, seeded, small_folder,
    spoil, with_value, write)


# ------------------------------------------------------------------------------- helpers of the tests of data
def skeletons(shape=(96, 3, 4, 25, 1), value=0):
    """→ a function that puts skeletons in place of a folder's features: zeros, the last number `value`."""
    def spoiler(folder):
        (folder / "features.npy").unlink()
        x = np.zeros(shape, np.float32)
        x.flat[-1] = value
        np.save(folder / "skeletons.npy", x)
    return spoiler


def save_bodies(change=lambda x: x, graph=zsar.NTU25):
    """→ a function that puts changed skeletons of real size in place of a folder's features."""
    def spoiler(folder):
        (folder / "features.npy").unlink()
        np.save(folder / "skeletons.npy", change(bodies(96, graph)))
    return spoiler


def bodies(count, graph=zsar.NTU25):
    """Skeletons (count, 3, 4, V, 1) of a random pose each; their torsos are upright and 0.5 m long."""
    x = np.random.default_rng(0).normal(size=(count, 3, 4, len(graph.edges) + 1, 1)).astype(np.float32)
    x[:, :, :, list(graph.root)] = 0
    x[:, :, :, list(graph.shoulders)] = np.array([0, 0.5, 0], np.float32)[:, None, None, None]
    return x


def split_file(**entry):
    """→ a function that overwrites the split, with these entries changed."""
    return write("splits.json", json.dumps({"9_3": {"unseen": [1, 5, 8], "test_subjects": [2, 4]} | entry}))


def one_line_of(command, capsys, status=2):
    """Run a command that fails → its line on standard error, the only thing that it prints."""
    with pytest.raises(SystemExit) as stop:
        command()
    printed = capsys.readouterr()
    assert stop.value.code == status and printed.out == "" and printed.err.count("\n") == 1, printed
    return printed.err


def predictions_of(run, folder, *options):
    """The rows of predictions.csv of a run for the samples at a path."""
    train.main(["predict", "--run", str(run), "--data", str(folder), "--device", "cpu", "--force", *options])
    with open(run / "predictions.csv", newline="") as f:
        header, *rows = csv.reader(f)
    assert header == ["sample", "class", "score", "margin", "top5"]
    return rows


STRAY_BYTES = [b"-", b"9" * 30, b" ", b"\n", b"nan ", b"1e400 ", b"\x00", b"25\n", b"_1", b"-1\n"]
STRAY_COUNTS = [b"999999999\n1", b"-3\n", b"1\n99999999999\n", b""]


def edit_at_random(text, rng):
    """Change one random place of a bytearray in one of six ways."""
    i, length = int(rng.integers(len(text))), int(rng.integers(1, 40))
    edit = rng.integers(6)
    if edit == 0:
        text[i] = rng.choice(list(b"0123456789.- \xff"))
    elif edit == 1:
        text[i:i + length] = b""
    elif edit == 2:
        text[i:i] = rng.choice(STRAY_BYTES)
    elif edit == 3:
        text[i:i] = text[i // 2:i // 2 + length]
    elif edit == 4:
        del text[max(i, len(text) // 2):]
    else:
        text[:length] = rng.choice(STRAY_COUNTS)


# ------------------------------------------------------------------------- data.py: reading and writing files
def test_the_fingerprint_is_of_the_values(features_folder, tmp_path):
    a = np.arange(12.0).reshape(4, 3)
    np.save(tmp_path / "a.npy", a)
    memory_mapped, column_major = np.load(tmp_path / "a.npy", mmap_mode="r"), a.T.copy().T
    assert data.fingerprint(a) == data.fingerprint(memory_mapped) == data.fingerprint(column_major)
    others = [a.reshape(3, 4), a.astype(np.float32), a[::-1], a[:3]]
    assert len({data.fingerprint(b) for b in (a, *others)}) == 5
    hashes = [run_main(features_folder, tmp_path / "run", method="ridge")[0]["data_sha256"]]
    for name, index in (("features.npy", (0, 0)), ("text_description.npy", (3, 2, 1)), ("labels.npy", 0)):
        spoil(name, with_value(index, 2))(features_folder)
        hashes.append(run_main(features_folder, tmp_path / "run", method="ridge")[0]["data_sha256"])
    assert len(set(hashes)) == 4


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_and_foreign_tensors_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng, path = np.random.default_rng(0), tmp_path / "x.pt"
    torch.save({"a": torch.arange(500.0), "b": 1}, path)
    assert data.read_tensors(path, "ab")["a"][499] == 499
    damaged = [path.read_bytes()[:n] for n in (0, 100, 1500)]
    damaged += [rng.integers(0, 256, rng.integers(1, 60), dtype=np.uint8).tobytes() for _ in range(100)]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(data.InputError, match="x.pt: cannot be read .*; name another, or remove it$"):
            data.read_tensors(path, "ab")
    torch.save({"a": Evil(), "b": 1}, path)
    with pytest.raises(data.InputError, match="x.pt: cannot be read") as error:
        data.read_tensors(path, "ab")
    assert "\n" not in str(error.value) and not (tmp_path / "evil").exists()
    for value, message in ((7, "cannot be read"), ({"a": 1}, "lacks b, so another"), ([1], "lacks a, b, so")):
        torch.save(value, path)
        with pytest.raises(data.InputError, match=f"x.pt: {message}"):
            data.read_tensors(path, "ab")
    with pytest.raises(data.InputError, match="y.pt: cannot be read .No such file"):
        data.read_tensors(tmp_path / "y.pt", "ab")


def test_a_failed_write_leaves_the_old_file_and_no_part(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")

    def full_disk(f):
        f.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        data.write_file(path, full_disk)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["result.json"]
    data.write_json(path, {"a": [1]})
    assert json.loads(path.read_text()) == {"a": [1]} and os.listdir(tmp_path) == ["result.json"]
    with pytest.raises(data.InputError, match="result.json/run: cannot be made .Not a directory.; choose"):
        data.make_folder(path / "run")


def npy(header, numbers=b""):
    """The bytes of an .npy file with that header."""
    header = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + numbers


SHAPED = "{{'descr': '{}', 'fortran_order': False, 'shape': {}, }}"
BAD_ARRAYS = {  # what is wrong: (the bytes of a file, what the one line must say)
    "empty": (b"", "cannot be read as a .npy array (No data left"),
    "a table": (b"1,2,3\n4,5,6\n", "cannot be read as a .npy array"),
    "a zip archive": (b"PK\x03\x04" + bytes(60), "cannot be read as a .npy array"),
    "cut off": (npy(SHAPED.format("<f4", "(100, 256)"), bytes(60)), "cannot be read as a .npy array (mmap"),
    "an open header": (npy("{'descr': ("), "cannot be read as a .npy array"),
    "complex": (npy(SHAPED.format("<c8", "(1,)"), bytes(8)), "dtype is complex64, must be float; convert"),
    "whole numbers": (npy(SHAPED.format("<i8", "(1,)"), bytes(8)), "dtype is int64, must be float; convert"),
    "objects": (npy(SHAPED.format("|O", "(1,)"), bytes(8)),
                "cannot be read as a .npy array (it holds pickled objects, which are never loaded)"),
    "two-dimensional": (npy(SHAPED.format("<f4", "(1, 2)"), bytes(8)), "shape is (1, 2), must be (N,)"),
    "no rows": (npy(SHAPED.format("<f4", "(0,)")), "shape is (0,), must be (N,)"),
    "too large for float32": (npy(SHAPED.format("<f8", "(1,)"), np.array(1e300).tobytes()),
                              "1e+300 in row 0 is not a finite float32; correct or drop that row"),
    "minus infinity": (npy(SHAPED.format("<f2", "(2,)"), b"\x00\x00\x00\xfc"), "-inf in row 1 is not"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays(case, tmp_path):
    content, message = BAD_ARRAYS[case]
    path = tmp_path / "x.npy"
    path.write_bytes(content)
    with pytest.raises(data.InputError) as error:
        data.read_array(path, "float", "(N,)")
    assert str(error.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize("dtype", [">f4", ">f8", "<f2", np.longdouble])
def test_floats_of_every_kind_become_float32(dtype, tmp_path):
    np.save(tmp_path / "x.npy", np.array([1.5, -2, 0], dtype))
    x = data.read_array(tmp_path / "x.npy", "float", "(N,)")
    assert type(x) is np.ndarray and x.dtype == np.dtype(np.float32) and x.dtype.isnative
    assert x.tolist() == [1.5, -2, 0]


def test_mapped_arrays_keep_their_precision_and_order(tmp_path):
    x = np.asfortranarray(np.random.default_rng(0).normal(size=(2100, 3)).astype(np.float16))
    np.save(tmp_path / "x.npy", x)
    mapped = data.read_array(tmp_path / "x.npy", "float", "(N, 3)", mmap=True)
    assert isinstance(mapped, np.memmap) and mapped.dtype == np.float16
    for array in (mapped, np.ascontiguousarray(x)):
        firsts, parts = zip(*data.pieces(array))
        assert firsts == (0, 1024, 2048)
        np.testing.assert_array_equal(np.concatenate(parts), x)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_says_so(features_folder):
    for name in ("features.npy", "classes.txt", "splits.json", "text_label.npy"):
        (features_folder / name).chmod(0)
        with pytest.raises(data.InputError, match=rf"{name}: cannot be read .*\(Permission denied\)"):
            data.read_data(features_folder, "9_3")
        (features_folder / name).chmod(0o644)
    with pytest.raises(data.InputError, match=r"x.pt: cannot be read \(Permission denied\)"):
        (features_folder / "x.pt").touch(0)
        data.read_tensors(features_folder / "x.pt", "a")


# ----------------------------------------------------------------------- data.py: the terminal and its errors
def test_the_command_line_catches_two_exceptions(capsys):
    def fail(error):
        raise error

    assert data.command_line(lambda: None) is None
    line = one_line_of(lambda: data.command_line(lambda: fail(data.InputError("a\nb"))), capsys)
    assert line == "error: a b\n"
    line = one_line_of(lambda: data.command_line(lambda: fail(KeyboardInterrupt())), capsys, status=130)
    assert line.startswith("interrupted; ")
    for error in (MemoryError(), OSError(28, "No space left"), RuntimeError("a defect"), ValueError("x")):
        with pytest.raises(type(error)) as raised:
            data.command_line(lambda: fail(error))
        assert raised.value is error
    data.note("a\nb")
    assert capsys.readouterr().err == "note: a b\n"


# -------------------------------------------------------------------------------------- data.py: splits, text
NEW_SPLITS = """sadvae_1 ntu60 0 8 15 28 46 / sadvae_2 ntu60 15 19 23 47 50 / sadvae_3 ntu60 29 37 38 45 55
 / sadvae_4 ntu120 0 4 6 7 24 37 54 59 97 113 / sadvae_5 ntu120 63 79 86 92 98 100 103 110 111 117
 / sadvae_6 ntu120 9 14 17 44 60 75 81 89 108 110 / sadvae_7 pku51 10 19 27 38 48
 / sadvae_8 pku51 0 9 17 30 42 / sadvae_9 pku51 18 24 31 43 45 / 46_5 pku51 1 9 20 34 50
 / 39_12 pku51 3 7 11 15 19 21 25 31 33 36 43 48 / star_3 pku51 4 12 16 22 36"""


def test_published_splits_are_sound():
    counts = {"ntu60": 60, "ntu120": 120, "pku51": 51}
    for name, (_, dataset, unseen, val) in data.SPLITS.items():
        unseen, val = [int(i) for i in unseen.split()], [int(i) for i in val.split()]
        assert len({*unseen, *val}) == len(unseen) + len(val)
        assert max(unseen + val) < counts[dataset] and len(unseen) > 1
        if name[0].isdigit():
            seen_count, unseen_count = map(int, name.split("_"))
            assert len(unseen) == unseen_count
            assert seen_count + unseen_count == counts[dataset]
            assert len(val) in (0, unseen_count)
    for line in NEW_SPLITS.split(" / "):
        name, dataset, *unseen = line.split()
        source = "STAR" if name in ("46_5", "39_12", "star_3") else "SA-DVAE"
        assert data.SPLITS[name] == (source, dataset, " ".join(unseen), "")
    thirds = [set(data.SPLITS[name][2].split()) for name in ("star_3", "smie_8", "smie_9")]
    assert len(set.union(*thirds)) == 15
    assert len(set(data.TRAIN_SUBJECTS)) == 53 and sum(s <= 40 for s in data.TRAIN_SUBJECTS) == 20


def test_the_list_of_splits(capsys):
    train.main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 29
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    assert list(rows) == list(data.SPLITS)
    assert rows["55_5"] == ["ntu60", "55", "5", "5", "SynSE"]
    assert rows["smie_9"] == ["pku51", "46", "5", "-", "SMIE"]
    assert rows["sadvae_4"] == ["ntu120", "110", "10", "-", "SA-DVAE"]
    assert rows["39_12"] == ["pku51", "39", "12", "-", "STAR"]


@pytest.mark.parametrize("dataset, count", [("ntu60", 60), ("ntu120", 120), ("pku51", 51)])
def test_bundled_text(dataset, count):
    names, text = data.bundled_classes(dataset), data.bundled_text(dataset)
    assert len(names) == len(set(names)) == count
    for prompt in text:
        pooled, tokens = prompt[:, 0], prompt[:, 1:]                      # (C, 768), (C, L, 768)
        assert prompt.shape[0] == count and prompt.shape[1] <= 1 + 35 and prompt.shape[2] == 768
        np.testing.assert_allclose(np.linalg.norm(pooled, axis=1), 1, atol=2e-3)
        is_token = tokens.any(-1)                                         # (C, L): tokens first, then padding
        assert is_token[:, 0].all()
        assert not (~is_token[:, :-1] & is_token[:, 1:]).any()
        # the pooled row is the normalised mean of the token rows
        mean = tokens.sum(1)
        mean /= np.linalg.norm(mean, axis=1, keepdims=True)
        np.testing.assert_allclose(mean, pooled, atol=2e-3)
    rows = [names.index("Drink water"), names.index("Reading")]
    label, description = (prompt[rows, 0] for prompt in text)
    likeness = description @ label.T                                      # of each description to each label
    assert likeness[0, 0] > likeness[0, 1]
    assert likeness[1, 1] > likeness[1, 0]


def test_pooled_only_text_is_accepted(features_folder):
    for name in ("text_label.npy", "text_description.npy"):
        spoil(name, lambda text: text[:, 0])(features_folder)
    assert [t.shape for t in data.read_data(features_folder, "9_3").text] == [(12, 1, 768)] * 2


def test_one_prompt_is_enough(features_folder, tmp_path, capsys):
    (features_folder / "text_description.npy").unlink()
    spoil("text_label.npy", lambda text: text[:, :3, :16])(features_folder)
    d = data.read_data(features_folder, "9_3")
    np.testing.assert_array_equal(d.text, [np.load(features_folder / "text_label.npy")])
    result, _ = run_main(features_folder, tmp_path / "run")
    line = "the text has one prompt a class, so the SDE has nothing to mix"
    assert result["notes"] == [line] and f"note: {line}\n" in capsys.readouterr().err


def test_named_text_must_fit(features_folder, tmp_path):
    a, b, c = (tmp_path / f"{name}.npy" for name in "abc")
    for path, shape in ((a, (12, 8)), (b, (12, 9)), (c, (11, 8))):
        np.save(path, np.random.default_rng(0).normal(size=shape))
    assert [t.shape for t in data.read_data(features_folder, "9_3", [a, a]).text] == [(12, 1, 8)] * 2
    for files, message in (([a, b], "b.npy: width 9 differs from the 8 of"), ([c], "text for 11 classes")):
        with pytest.raises(data.InputError, match=message):
            data.read_data(features_folder, "9_3", files)


# ----------------------------------------------------------------------------------- data.py: dataset folders
def test_split_of_a_folder(small_folder):
    d = data.read_data(small_folder, "9_3")
    labels, subjects = np.load(small_folder / "labels.npy"), np.load(small_folder / "subjects.npy")
    assert d.unseen.tolist() == [1, 5, 8]
    assert d.seen.tolist() == [0, 2, 3, 4, 6, 7, 9, 10, 11]
    for n in range(len(labels)):
        unseen, tests = labels[n] in (1, 5, 8), subjects[n] in (2, 4)
        assert (n in d.train) == (not unseen and not tests)
        assert (n in d.seen_test) == (not unseen and tests)
        assert (n in d.unseen_test) == (unseen and tests)


def test_seen_classes_and_training_rows_may_be_named(features_folder):
    splits = {"val": {"unseen": [2, 3], "seen": [0, 4, 6], "test_subjects": [2]}, "rows": {"unseen": [2, 3]}}
    (features_folder / "splits.json").write_text(json.dumps(splits))
    d = data.read_data(features_folder, "val")
    assert set(d.labels[d.train]) == set(d.labels[d.seen_test]) == {0, 4, 6}
    assert set(d.labels[d.unseen_test]) == {2, 3}
    (features_folder / "subjects.npy").rename(features_folder / "unused.npy")
    training = np.arange(96) % 3 > 0
    np.save(features_folder / "training.npy", training)
    d = data.read_data(features_folder, "rows")
    assert d.train.tolist() == [n for n in range(96) if training[n] and d.labels[n] not in (2, 3)]
    assert d.unseen_test.tolist() == [n for n in range(96) if not training[n] and d.labels[n] in (2, 3)]


def test_validation_holds_classes_out_of_the_training_samples(small_folder):
    d = data.read_data(small_folder, "9_3")
    val = data.validation(d)
    assert val.unseen.tolist() == d.val.tolist() == [2, 3]
    assert val.seen.tolist() == [0, 4, 6, 7, 9, 10, 11]
    rows = np.concatenate([val.train, val.seen_test, val.unseen_test])
    assert sorted(rows) == d.train.tolist()                               # training samples alone, each once
    assert set(d.labels[val.unseen_test]) == {2, 3}
    assert not {2, 3} & set(d.labels[val.train])
    assert not {2, 3} & set(d.labels[val.seen_test])
    assert len(val.seen_test) < len(val.train) / 2
    # none named: as many as unseen ones, of the seen
    drawn = data.read_data(small_folder, "10_2")
    assert len(drawn.val) == 2 and set(drawn.val) <= set(drawn.seen)
    assert data.read_data(small_folder, "10_2").val.tolist() == drawn.val.tolist()


@pytest.mark.parametrize("option", ["--gzsl", "--validate"])
def test_one_validation_class_is_too_few_to_choose_by(option, features_folder, tmp_path, capsys):
    split_file(val=[2])(features_folder)
    assert data.read_data(features_folder, "9_3").val.tolist() == [2]     # no harm where nothing is chosen
    out = tmp_path / "out" / "run"
    line = one_line_of(lambda: run_main(features_folder, out, option, method="ridge"), capsys)
    assert "mine: split '9_3' has the validation classes [2]; too few to choose by" in line
    assert not (tmp_path / "out").exists()


def test_an_ntu_folder_takes_bundled_text_splits_and_subjects(tmp_path):
    features = np.random.default_rng(0).random((120, 256), dtype=np.float32)
    np.save(tmp_path / "features.npy", features)
    np.save(tmp_path / "labels.npy", np.repeat(np.arange(60), 2))
    np.save(tmp_path / "subjects.npy", np.tile([1, 3], 60))               # performer 1 trains, 3 tests
    (tmp_path / "classes.txt").write_text("\n".join(data.bundled_classes("ntu60")))
    d = data.read_data(tmp_path, "55_5")
    assert d.name == d.preset == "ntu60"
    assert d.unseen.tolist() == [10, 11, 19, 26, 56]
    assert len(d.train) == 55 and len(d.seen_test) == 55 and len(d.unseen_test) == 5
    np.testing.assert_array_equal(d.text[1], data.bundled_text("ntu120")[1][:60])
    with pytest.raises(data.InputError, match="unknown split '110_10' for ntu60; choose one of: 55_5, 48_12"):
        data.read_data(tmp_path, "110_10")


def test_presets_follow_the_classes_not_the_folder(features_folder, tmp_path):
    args = train.run_arguments(["--method", "dvta", "--split", "9_3"])
    for name in ("ntu60", "synthetic"):
        features_folder = features_folder.rename(tmp_path / name)
        settings = train.choose_settings(args, data.read_data(features_folder, "9_3"))
        assert settings["dvta"] == train.DVTA_SMALL and settings["encoder"] == train.ENCODER


# ------------------------------------------------------- data.py: published folders of skeletons and features
FEATURES = data.FEATURES_FORMAT
UNSEEN = [10, 11, 19, 26, 56]                                             # of the split 55_5


def write_published(folder, kind=FEATURES, width=256, unseen=UNSEEN, without=(), classes=60, seed=0):
    """A published folder: three training samples a seen class, three test samples a class.

    without: classes that neither the encoder nor its folder knows.
    """
    rng = np.random.default_rng(seed)
    known = np.setdiff1d(range(classes), without)
    labels_of_parts = np.repeat(np.setdiff1d(known, unseen), 3), np.repeat(unseen, 3), np.repeat(known, 3)
    folder.mkdir()
    for (x_name, y_name), labels in zip(data.PUBLISHED[kind], labels_of_parts):
        x = rng.normal(size=(len(labels), width)).astype(np.float32)
        if kind != FEATURES:                                              # of standing bodies
            x = bodies(len(labels), zsar.NTU25).repeat(2, -1)
        np.save(folder / f"{x_name}.npy", x)
        np.save(folder / f"{y_name}.npy", labels)
    return folder


def as_npz(folder, path):
    """The arrays of a published features folder as Flora's .npz."""
    theirs = [name for pair in data.FLORA for name in pair]
    ours = [name for pair in data.PUBLISHED[FEATURES] for name in pair]
    np.savez(path, **{a: np.load(folder / f"{b}.npy") for a, b in zip(theirs, ours)})
    return path


def assert_same_data(a, b):
    for name in ("features", "labels", "train", "seen_test", "unseen_test", "seen", "unseen", "val"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    for name in ("name", "preset", "source", "split", "classes"):
        assert getattr(a, name) == getattr(b, name)
    assert all(np.array_equal(s, t) for s, t in zip(a.text, b.text, strict=True))


@pytest.mark.parametrize("kind", data.PUBLISHED)
def test_a_published_folder_runs(kind, tmp_path, capsys):
    folder = write_published(tmp_path / "data", kind)
    result, _ = run_main(folder, tmp_path / "run", "--encoder-epochs", 1, method="ridge", split="55_5")
    printed = capsys.readouterr().out
    assert f"ntu60 ({kind}), split 55_5: 55 seen and 5 unseen" in printed
    assert "samples: 165 training, 165 seen test, 15 unseen" in printed
    assert result["source"] == kind and result["dataset"] == "ntu60" and result["zsl"]["n"] == 15
    d = data.read_data(folder, "55_5")
    assert len(d.train) == len(d.seen_test) == 165 and d.val.tolist() == [16, 21, 25, 31, 48]
    assert d.text[0].shape == (60, 15, 768)
    _, (_, unseen_labels), seen_test = data.PUBLISHED[kind]
    for name in seen_test:
        (folder / f"{name}.npy").unlink()
    assert len(data.read_data(folder, "55_5").seen_test) == 0
    message = r"its classes .* do not fit split smie_1, whose unseen ones are \[4, 19, 31, 47, 51\]"
    with pytest.raises(data.InputError, match=message):
        data.read_data(folder, "smie_1")
    spoil(f"{unseen_labels}.npy", with_value(slice(0, 3), 11))(folder)
    message = r"its classes \[11, 19, 26, 56\] do not fit split 55_5, .*\[10, 11, 19, 26, 56\]"
    with pytest.raises(data.InputError, match=message):
        data.read_data(folder, "55_5")


def test_the_labels_say_a_split_that_nobody_published(tmp_path):
    folder = write_published(tmp_path / "SHIFT_NTU60_mine", unseen=[1, 2, 3])
    d = data.read_data(folder, "whatever")
    assert (d.name, d.preset, d.split) == ("ntu60", "ntu60", "whatever")
    assert d.unseen.tolist() == [1, 2, 3] and d.seen.tolist() == [0, *range(4, 60)]
    assert (len(d.train), len(d.seen_test), len(d.unseen_test)) == (171, 171, 9)
    assert len(d.val) == 3 and set(d.val) <= set(d.seen)
    for name, classes, dataset in (("ntu120_x", 120, "ntu120"), ("my_pku_r", 51, "pku51")):
        d = data.read_data(write_published(tmp_path / name, unseen=[1, 2], classes=classes), "x")
        assert d.name == dataset and d.classes == data.bundled_classes(dataset)
    anonymous = folder.rename(tmp_path / "mine")
    with pytest.raises(data.InputError, match="mine: is of an unknown dataset; choose a published --split"):
        data.read_data(anonymous, "whatever")
    (anonymous / "classes.txt").write_text("\n".join(f"move {i}" for i in range(60)))
    with pytest.raises(data.InputError, match="text_label.npy: no such file; embed classes.txt"):
        data.read_data(anonymous, "whatever")
    mine = tmp_path / "mine.npy"
    np.save(mine, np.random.default_rng(0).normal(size=(60, 20)))
    d = data.read_data(anonymous, "whatever", [mine])
    assert (d.name, d.preset, d.classes[7]) == ("mine", "other", "move 7")
    assert [t.shape for t in d.text] == [(60, 1, 20)] and d.unseen.tolist() == [1, 2, 3]
    spoil("train_label.npy", with_value(0, 3))(anonymous)                 # an unseen class in training
    with pytest.raises(data.InputError, match=r"mine: .*classes \[1, 2, 3\], of which .* have \[3\]; there"):
        data.read_data(anonymous, "whatever", [mine])


def test_floras_npz_is_the_same_data_as_the_folder(tmp_path):
    folder = write_published(tmp_path / "data")
    path = as_npz(folder, tmp_path / "flora.npz")
    assert_same_data(data.read_data(path, "55_5"), data.read_data(folder, "55_5"))
    run_main(path, tmp_path / "run", method="ridge", split="55_5")
    with np.load(path) as archive:
        arrays = dict(archive)
    np.savez(tmp_path / "ntu60.npz", **{k: a for k, a in arrays.items() if not k.startswith("gzsl")})
    assert len(data.read_data(tmp_path / "ntu60.npz", "x").seen_test) == 0
    del arrays["zsl_label"]
    np.savez(path, **arrays)
    with pytest.raises(data.InputError, match="flora.npz/zsl_label: cannot be read"):
        data.read_data(path, "55_5")
    path.write_bytes(b"PK")
    with pytest.raises(data.InputError, match="flora.npz/train_data: cannot be read"):
        data.read_data(path, "55_5")


def test_published_features_in_other_shapes_and_under_other_names(tmp_path):
    folder = write_published(tmp_path / "data")
    before = data.read_data(folder, "55_5")
    for name in ("train", "ztest", "gtest"):
        spoil(f"{name}.npy", lambda x: x[:, :, None, None])(folder)
    spoil("train_label.npy", lambda y: y[:, None])(folder)
    assert_same_data(data.read_data(folder, "55_5"), before)
    (folder / "ztest.npy").rename(folder / "test.npy")                    # as DVTA's folders have it
    (folder / "z_label.npy").rename(folder / "test_label.npy")
    assert_same_data(data.read_data(folder, "55_5"), before)
    spoil("test.npy", lambda x: x[:, :100])(folder)
    with pytest.raises(data.InputError, match=r"test.npy: shape is \(15, 100\), that of the training"):
        data.read_data(folder, "55_5")


@pytest.mark.parametrize("method", ["dvta", "tdsm", "ridge"])
def test_features_of_another_width_go_all_the_way_through(method, tmp_path, capsys):
    folder, run = write_published(tmp_path / "data", width=384), tmp_path / "run"
    np.save(folder / "text_label.npy", np.random.default_rng(0).normal(size=(60, 3, 16)))
    result, weights = run_main(folder, run, method=method, split="55_5")
    assert result["zsl"]["n"] == 15 and len(weights["x_mean"]) == 384
    rows = predictions_of(run, folder / "ztest.npy")                      # N rows, among all 60 classes
    assert [row[0] for row in rows] == [f"row {n}" for n in range(15)]
    assert {row[1] for row in rows} <= set(data.bundled_classes("ntu60"))
    np.save(tmp_path / "narrow.npy", np.ones((2, 256), np.float32))
    capsys.readouterr()
    line = one_line_of(lambda: predictions_of(run, tmp_path / "narrow.npy"), capsys)
    assert "narrow.npy: has features of width 256, but the run was trained on 384" in line


def text_width(weights, method):
    """The width of the text that a method was trained on, as its weights tell it."""
    if method == "dvta":
        return weights["projector.fc3.weight"].shape[0]
    return weights["denoiser.text_in.weight"].shape[1]


def test_text_beside_published_features_and_named_text(tmp_path):
    folder = write_published(tmp_path / "data")
    rng, mine = np.random.default_rng(1), tmp_path / "mine.npy"
    label, description = rng.normal(size=(2, 60, 32)).astype(np.float32)
    np.save(folder / "ntu60_embeddings.npy", label)
    np.save(folder / "ntu60_cont_embeddings.npy", description)
    d = data.read_data(folder, "55_5")
    assert d.notes == [] and np.array_equal([t[:, 0] for t in d.text], [label, description])
    np.save(folder / "ntu60_des_embeddings.npy", 2 * description + label)
    np.save(mine, rng.normal(size=(60, 20)).astype(np.float32))
    d = data.read_data(folder, "55_5")
    assert d.notes == [f"{folder}: ntu60_cont_embeddings.npy not used; --text chooses text features"]
    assert np.array_equal([t[:, 0] for t in d.text], [label, 2 * description + label])
    for method, beside_width in (("dvta", 32), ("tdsm", 2 * 32)):
        _, weights = run_main(folder, tmp_path / method, method=method, split="55_5")
        assert text_width(weights, method) == beside_width
        out = tmp_path / f"{method}_mine"
        result, weights = run_main(folder, out, "--text", mine, method=method, split="55_5")
        assert text_width(weights, method) == 20
        assert str(mine) in result["command"]


def test_text_beside_published_features_of_pku(tmp_path):
    folder = write_published(tmp_path / "data", unseen=[1, 9, 20, 34, 50], classes=51)
    label, description = np.random.default_rng(1).normal(size=(2, 51, 8)).astype(np.float32)
    np.save(folder / "pku_embeddings.npy", label)
    for split in ("46_5", "smie_7"):                                      # the same classes
        text = data.read_data(folder, split).text
        assert len(text) == 1 and np.array_equal(text[0][:, 0], label)
    np.save(folder / "pku_des_embeddings.npy", description)
    d = data.read_data(folder, "46_5")
    assert d.name == "pku51" and np.array_equal([t[:, 0] for t in d.text], [label, description])
    spoil("pku_des_embeddings.npy", lambda t: t[:50])(folder)
    with pytest.raises(data.InputError, match="pku_des_embeddings.npy: has text for 50 classes, the dataset"):
        data.read_data(folder, "46_5")


def validation_folder(path, **changes):
    """The validation folder beside write_published's: its encoder has seen no validation class."""
    return write_published(path, **{"unseen": [16, 21, 25, 31, 48], "without": UNSEEN, "seed": 5} | changes)


def test_gamma_on_ready_features_comes_from_the_validation_folder(tmp_path, capsys):
    folder, val = write_published(tmp_path / "data"), validation_folder(tmp_path / "val")
    gammas, note = [], f"note: {train.VALIDATION_NOTE}\n"
    for options in ([], ["--val-data", val], ["--val-data", as_npz(val, tmp_path / "val.npz")]):
        result, _ = run_main(folder, tmp_path / "run", "--gzsl", *options, method="ridge", split="55_5")
        assert result["notes"] == ([] if options else [train.VALIDATION_NOTE])
        assert (note in capsys.readouterr().err) == (not options)
        gammas.append(result["gzsl"]["gamma"])
    d = data.read_data(folder, "55_5")
    task = data.validation(d, val)
    np.testing.assert_array_equal(task.features[task.unseen_test], np.load(val / "ztest.npy"))
    np.testing.assert_array_equal(task.features[task.train], np.load(val / "train.npy"))
    assert task.unseen.tolist() == [16, 21, 25, 31, 48]
    assert task.seen.tolist() == sorted({*range(60)} - {*task.unseen} - {*UNSEEN})
    assert len(task.seen_test) == 150 and not np.isin(task.labels, UNSEEN).any()
    x, y, text = torch.tensor(task.features), torch.tensor(task.labels), [torch.tensor(t) for t in d.text]
    model = train.build("ridge", text, train.RIDGE, torch.tensor(task.seen), x[task.train])
    model.fit(x[task.train], y[task.train])
    expected = zsar.best_gamma(*train.among_all_classes(model, x, task))
    assert gammas[1] == gammas[2] == pytest.approx(expected) != pytest.approx(gammas[0])


def test_validate_on_ready_features_uses_the_validation_folder(tmp_path, capsys):
    folder, val = write_published(tmp_path / "data"), validation_folder(tmp_path / "val")
    for options, num_train in (([], 121), (["--val-data", val], 150)):
        result, _ = run_main(folder, tmp_path / "run", "--validate", *options, method="ridge", split="55_5")
        assert result["unseen"] == [16, 21, 25, 31, 48] and result["zsl"]["n"] == 15
        assert result["samples"]["train"] == num_train
        assert result["notes"] == ([] if options else [train.VALIDATION_NOTE])
        assert "50 seen and 5 validation classes" in capsys.readouterr().out


def test_gamma_needs_seen_test_samples_in_the_validation_folder(tmp_path, capsys):
    folder, val = write_published(tmp_path / "data"), validation_folder(tmp_path / "val")
    (val / "gtest.npy").unlink()
    command = least(folder, tmp_path / "run", "--gzsl", "--val-data", val, method="ridge", split="55_5")
    line = one_line_of(lambda: train.main(command), capsys)
    assert "val" in line and "seen test samples" in line and not (tmp_path / "run").exists()


BAD_VALIDATION = {  # what is wrong: (how to change the validation folder, what the one line must say)
    "an unseen class": ({"without": UNSEEN[1:]}, "the unseen classes [10]; it must be the validation folder"),
    "the test folder": ({"unseen": UNSEEN, "without": ()}, f"the unseen classes {UNSEEN}; it must be"),
    "another width": ({"width": 384}, "val: has width 384 and"),
    "one class": ({"unseen": [16]}, "have the classes [16]"),
    "skeletons": ({"kind": data.SKELETONS_FORMAT}, "val: has no known format; looked for train.npy"),
}


@pytest.mark.parametrize("case", BAD_VALIDATION)
def test_bad_validation_folders_are_refused(case, tmp_path, capsys):
    changes, message = BAD_VALIDATION[case]
    folder, val = write_published(tmp_path / "data"), validation_folder(tmp_path / "val", **changes)
    command = least(folder, tmp_path / "run", "--gzsl", "--val-data", val, method="ridge", split="55_5")
    line = one_line_of(lambda: train.main(command), capsys)
    assert message in line and not (tmp_path / "run").exists()


def test_a_validation_folder_is_for_ready_features(small_folder, tmp_path):
    with pytest.raises(data.InputError, match="it must be the validation folder of features like those"):
        data.validation(data.read_data(small_folder, "9_3"),
                        validation_folder(tmp_path / "val", unseen=[2, 3], without=[1, 5, 8], classes=12))


# ---------------------------------------------------------------------------- data.py: layouts and own joints
def graph_file(graph):
    """→ a function that writes a graph.json."""
    return write("graph.json", json.dumps({"edges": graph.edges, "centre": graph.centre, "root": graph.root,
                                           "shoulders": graph.shoulders}))


def mediapipe_graph(folder):
    """The README's example of a graph.json, for MediaPipe's 33 joints."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (folder / "graph.json").write_text(re.search(r'\{"edges": \[\[0,.*?\}', readme, re.S)[0])
    return data.read_graph(folder / "graph.json")


def test_the_readmes_graph_of_33_joints_goes_all_the_way_through(features_folder, tmp_path):
    graph = mediapipe_graph(features_folder)
    assert len(graph.edges) == 32 and (graph.root, graph.shoulders) == ((23, 24), (11, 12))
    save_bodies(graph=graph)(features_folder)
    assert data.read_data(features_folder, "9_3").graph == graph
    result, _ = run_main(features_folder, tmp_path / "run", method="ridge")
    assert result["zsl"]["n"] == 12 and result["encoder"]["seen_test_acc"] is not None
    assert data.read_tensors(tmp_path / "run" / "model.pt", ())["encoder"]["graph"] == tuple(graph)
    shutil.copy(features_folder / "skeletons.npy", tmp_path / "new.npy")
    assert len(predictions_of(tmp_path / "run", tmp_path / "new.npy")) == 96      # with the graph in model.pt
    (features_folder / "graph.json").unlink()
    with pytest.raises(data.InputError, match="skeletons.npy: has 33 joints; give a graph.json, .* 25, 20,"):
        data.read_data(features_folder, "9_3")


@pytest.mark.parametrize("num_joints", [20, 17, 18])
def test_other_skeletons_go_all_the_way_through(features_folder, num_joints, tmp_path):
    (features_folder / "features.npy").unlink()
    walkers = [person(8, 0.2, seed=n, joints=num_joints) for n in range(96)]
    np.save(features_folder / "skeletons.npy", np.stack(walkers)[..., None].astype(np.float32))
    result, _ = run_main(features_folder, tmp_path / "run", method="ridge")
    assert result["zsl"]["n"] == 12
    assert result["encoder"]["seen_test_acc"] is not None
    assert len(predictions_of(tmp_path / "run", features_folder)) == 96


def test_a_folders_graph_outranks_the_built_in_one(features_folder, tmp_path):
    """BODY_25: standing in its own order, upside down in Kinect's. Another graph is another encoder."""
    chest = ((0, 1), (2, 1), (3, 2), (4, 3), (5, 1), (6, 5), (7, 6), (8, 1))
    legs = ((9, 8), (10, 9), (11, 10), (12, 8), (13, 12), (14, 13), (22, 11), (23, 22), (24, 11), (19, 14),
            (20, 19), (21, 14))
    graph = zsar.JointGraph((*chest, *legs, (15, 0), (16, 0), (17, 15), (18, 16)), 1, (8,), (5, 2))
    height = np.array([1.6, 1.5, 1.5, 1.2, 1, 1.5, 1.2, 1, 1, 1, 0.5, 0.1, 1, 0.5, 0.1, *[1.7] * 4, *[0] * 6])

    def standing(x):
        x[:, 1] = height[:, None]
        return x

    save_bodies(standing)(features_folder)
    with pytest.raises(data.InputError, match="skeletons.npy|mine: bodies do not stand, .* -?[0-9.]+ torso"):
        data.read_data(features_folder, "9_3")
    graph_file(graph)(features_folder)
    assert data.read_data(features_folder, "9_3").graph == graph
    features = []
    for centre in (1, 8):                                                 # hops are counted from it
        graph_file(graph._replace(centre=centre))(features_folder)
        result, _ = run_main(features_folder, tmp_path / "run", method="ridge")
        features.append(data.read_tensors(result["encoder"]["file"], ())["features"])
        assert not result["encoder"]["cached"]
    assert not torch.equal(*features)


BAD_GRAPHS = {  # what is wrong: (changes to the graph of NTU's joints, what the error must say)
    "two parts": ({"edges": [*zsar.NTU25.edges[:-1], [23, 24]]}, "joint 23 is not in the tree; 24 edges"),
    "an edge twice": ({"edges": [[1, 20], *zsar.NTU25.edges[1:]]}, "joint 0 is not in the tree"),
    "too few edges": ({"edges": zsar.NTU25.edges[:-1]}, "joint 23 is not in the tree; 23 edges must"),
    "a negative joint": ({"edges": [*zsar.NTU25.edges[:-1], [-1, 11]]}, "joint -1 is not in the tree"),
    "no such centre": ({"centre": 25}, "joint 0 is not in the tree; 24 edges must join the joints 0 to 24"),
    "no such shoulder": ({"shoulders": [4, 77]}, "joint 77 is not in the tree"),
    "one shoulder": ({"shoulders": [4]}, 'must be {"edges": [[child, parent], ...]'),
    "a number as root": ({"root": 0}, 'must be {"edges"'),
    "names": ({"centre": "spine"}, 'must be {"edges"'),
    "other skeletons": ({"edges": zsar.KINECT20.edges, "centre": 2}, "has 25 joints, graph.json joins 20"),
}


@pytest.mark.parametrize("case", BAD_GRAPHS)
def test_bad_graphs_name_the_joint(case, features_folder):
    changes, message = BAD_GRAPHS[case]
    save_bodies()(features_folder)
    value = {"edges": zsar.NTU25.edges, "centre": 20, "root": [0], "shoulders": [4, 8]} | changes
    (features_folder / "graph.json").write_text(json.dumps(value))
    with pytest.raises(data.InputError) as error:
        data.read_data(features_folder, "9_3")
    where = "skeletons.npy" if case == "other skeletons" else "graph.json"
    assert f"{features_folder / where}: " in str(error.value) and message in str(error.value)


def human36m(x):
    """Standing bodies in the order of Human3.6M: hip, legs, spine, thorax, neck, head, arms."""
    height = np.array([1, 1, 0.5, 0.1, 1, 0.5, 0.1, 1.2, 1.5, 1.6, 1.7, 1.5, 1.2, 1, 1.5, 1.2, 1])
    x = x[:, :, :, :17]
    x[:, 1] = height[:, None]
    return x


NOT_STANDING = {  # what is wrong: how standing people come out of it
    "y down": lambda x: x * np.array([1, -1, 1])[:, None, None, None],
    "z up": lambda x: x[:, [0, 2, 1]],
    "joints and time exchanged": lambda x: np.tile(x, (1, 1, 2, 1, 1))[:, :, :25].swapaxes(2, 3),
    "Human3.6M as COCO": human36m,
}


@pytest.mark.parametrize("case", NOT_STANDING)
def test_bodies_that_do_not_stand_are_refused(case, features_folder, small_folder):
    np.save(features_folder / "skeletons.npy", NOT_STANDING[case](np.load(small_folder / "skeletons.npy")))
    (features_folder / "features.npy").unlink()
    with pytest.raises(data.InputError) as error:
        data.read_data(features_folder, "9_3")
    line = str(error.value)
    assert f"{features_folder}: bodies do not stand, their shoulders are" in line
    assert "another joint layout, y down, z up, or are axes exchanged?" in line
    assert f"python docs/plot.py --data {features_folder} --row 0" in line and "--allow-lying" in line
    assert len(data.read_data(features_folder, "9_3", lying=True).train) == 36


def test_lying_people_are_allowed_on_request(features_folder, small_folder, tmp_path, capsys):
    lying = np.load(small_folder / "skeletons.npy")[:, [1, 0, 2]]
    np.save(features_folder / "skeletons.npy", lying)
    (features_folder / "features.npy").unlink()
    line = one_line_of(lambda: run_main(features_folder, tmp_path / "run", method="ridge"), capsys)
    assert "bodies do not stand" in line and not (tmp_path / "run").exists()
    result, _ = run_main(features_folder, tmp_path / "run", "--allow-lying", method="ridge")
    assert result["zsl"]["n"] == 12 and result["notes"] == []
    capsys.readouterr()
    assert "do not stand" in one_line_of(lambda: predictions_of(tmp_path / "run", features_folder), capsys)
    assert len(predictions_of(tmp_path / "run", features_folder, "--allow-lying")) == 96
    lying[40:] = np.load(small_folder / "skeletons.npy")[40:]             # the median stands
    np.save(features_folder / "skeletons.npy", lying)
    assert data.read_data(features_folder, "9_3").notes == []


# --------------------------------------------------------------------------------------- data.py: bad folders
def training_rows_of_type_int(folder):
    (folder / "splits.json").write_text(json.dumps({"9_3": {"unseen": [1, 5, 8]}}))
    np.save(folder / "training.npy", np.ones(96, int))


def truncated_features(folder):
    (folder / "features.npy").write_bytes((folder / "features.npy").read_bytes()[:5000])


def pickled(name):
    """→ a function that saves an array of Python objects."""
    return lambda folder: np.save(folder / name, np.array([{}] * 96, dtype=object), allow_pickle=True)


def start_token(text):
    """As raw CLIP output: row 0 is that of the start token, the same for all."""
    text[:, 0] = text[0, 0]
    return text


UNREADABLE = "cannot be read as a .npy array"
SPLIT = "splits.json: split '9_3'"
BAD_INPUT = {  # what is wrong: (how to spoil the folder, what the one line must name)
    "no folder": (shutil.rmtree, ["mine: no such folder; give a dataset folder, or --data synthetic"]),
    "no format": (remove("features.npy"),
                  ["mine: has no known format; looked for skeletons.npy (", "features.npy (", "train.npy (",
                   "seen_train_data.npy (SMIE", "python data.py"]),
    "two formats": (save("train.npy", np.zeros(1)),
                    ["mine: holds two formats, dataset folder with features and SynSE"]),
    "no labels": (remove("labels.npy"), [f"labels.npy: {UNREADABLE} (No such file"]),
    "no text": (lambda f: [remove(f"text_{name}.npy")(f) for name in ("label", "description")],
                ["text_label.npy: no such file; embed classes.txt with text/embed.py"]),
    "no classes": (remove("classes.txt"), ["classes.txt: cannot be read (No such file"]),
    "no splits": (remove("splits.json"), ["splits.json: cannot be read as JSON (No such file"]),
    "no subjects": (remove("subjects.npy"), [f"subjects.npy: {UNREADABLE} (No such file"]),
    "feature shape": (spoil("features.npy", lambda a: a[:, 0]),
                      ["features.npy: shape is (96,), must be (N, 3, T, V, M) or (N, F) or (N, F, 1, 1)"]),
    "feature dtype": (spoil("features.npy", lambda a: a.astype(int)),
                      ["features.npy: dtype is int64, must be float"]),
    "label dtype": (spoil("labels.npy", lambda a: a.astype(float)),
                    ["labels.npy: dtype is float64, must be int"]),
    "label count": (spoil("labels.npy", lambda a: a[:-1]), ["labels.npy: shape is (95,), must be (96,)"]),
    "skeleton shape": (skeletons(shape=(96, 4, 25, 1)),
                       ["skeletons.npy: shape is (96, 4, 25, 1), must be (N, 3, T, V, M)"]),
    "unknown joints": (skeletons(shape=(96, 3, 4, 24, 1)),
                       ["skeletons.npy: has 24 joints; give a graph.json", "25, 20, 17, 18"]),
    "NaN in skeletons": (skeletons(value=np.nan), ["skeletons.npy: nan in row 95 is not a finite"]),
    "farther than 100 m": (save_bodies(with_value((95, 2, 3, 24, 0), -101)),
                           ["mine: coordinates reach 101 in row 95, more than 100 m; are these millimetres"]),
    "nobody at all": (skeletons(), ["mine: no sequence has a body"]),
    "millimetres": (save_bodies(lambda x: 1000 * x), ["mine: coordinates reach", "are these millimetres"]),
    "decimetres": (save_bodies(lambda x: 10 * x), ["mine: the median torso", "5 m long, must be 0.05 to 3"]),
    "too small": (save_bodies(lambda x: 0.01 * x), ["mine: the median torso", "is 0.005 m long"]),
    "upside down": (save_bodies(lambda x: -x), ["mine: bodies do not stand, their shoulders are -1.00"]),
    "not the first person": (save_bodies(lambda x: np.concatenate([0 * x, x], -1)),
                             ["mine: no sequence has a body; all joints of the first person"]),
    "dead features": (spoil("features.npy", lambda a: a * np.float32(1e-8)),
                      ["mine: all features for training are the same"]),
    "the same features": (spoil("features.npy", np.ones_like),
                          ["mine: all features for training are the same"]),
    "one seen class": (split_file(seen=[0]), ["mine: split '9_3' leaves one class to train on"]),
    "NaN in features": (spoil("features.npy", with_value((7, 3), np.nan)), ["features.npy: nan in row 7"]),
    "infinity in text": (spoil("text_description.npy", with_value((2, 1, 0), np.inf)),
                         ["text_description.npy: inf in row 2"]),
    "label too high": (spoil("labels.npy", with_value(5, 13)),
                       ["labels.npy: label 13 in row 5", "0 to 11; Labels are 0-based"]),
    "label below 0": (spoil("labels.npy", with_value(5, -1)), ["labels.npy: label -1 in row 5"]),
    "labels from 1": (spoil("labels.npy", lambda a: a + 1),
                      ["labels.npy: label 12 in row 88 is outside", "0 to 11; are labels 1-based?"]),
    "text of other classes": (spoil("text_label.npy", lambda a: a[:11]),
                              ["text_label.npy: has text for 11 classes", "the dataset has 12"]),
    "text of other width": (spoil("text_label.npy", lambda a: a[..., :512]),
                            ["text_description.npy: width 768", "512"]),
    "empty text": (spoil("text_label.npy", with_value((4, 0), 0)),
                   ["text_label.npy: the pooled vector of class 4 is zero"]),
    "text shape": (spoil("text_label.npy", lambda a: a[:, 0, 0]), ["text_label.npy: shape is (12,)"]),
    "the same text": (spoil("text_label.npy", lambda a: a[[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 4, 11]]),
                      ["text_label.npy: classes 4 and 10 (", ") have the same text"]),
    "the start token": (spoil("text_description.npy", start_token),
                        ["text_description.npy: row 0 is the same for all classes, but must be the"]),
    "class name twice": (write("classes.txt", "a\nb\nc\nb\n"), ["classes.txt: names 'b' twice"]),
    "empty class name": (write("classes.txt", "a\n\nb\n"), ["classes.txt: has an empty line; give each"]),
    "class names of Windows": (write("classes.txt", "h\xf6her\nb".encode("cp1252")),
                               ["classes.txt: is not UTF-8 text; save it with the encoding UTF-8"]),
    "pickled labels": (pickled("labels.npy"), [f"labels.npy: {UNREADABLE} (it holds pickled objects, which"]),
    "a bare pickle": (write("labels.npy", b"\x80\x04]\x94."), [f"labels.npy: {UNREADABLE}"]),
    "truncated array": (truncated_features, [f"features.npy: {UNREADABLE}"]),
    "split unknown": (write("splits.json", '{"a": {}, "b": {}}'),
                      ["splits.json: has no split '9_3'", "a, b"]),
    "split is no JSON": (write("splits.json", '{"9_3": '), ["splits.json: cannot be read as JSON"]),
    "training dtype": (training_rows_of_type_int, ["training.npy: dtype is int64, must be bool"]),
    "split is a list": (write("splits.json", "[1]"),
                        ["splits.json: cannot be read as JSON (must be an object: {...})"]),
    "split holds a list": (write("splits.json", '{"9_3": [1]}'), [f"{SPLIT}: must be", '"test_subjects"']),
    "class twice": (split_file(unseen=[1, 5, 5]), [f"{SPLIT}: 'unseen' names a class twice: [5]"]),
    "unseen and val": (split_file(val=[5]), [f"{SPLIT}: class 5 is unseen, and 'val' or 'seen' names it"]),
    "unseen class in training": (split_file(seen=[0, 2, 5]),
                                 [f"{SPLIT}: class 5 is unseen, and 'val' or 'seen' names it"]),
    "class outside": (split_file(unseen=[12]), [f"{SPLIT}: 'unseen' must be a list of class ids from 0"]),
    "no unseen class": (split_file(unseen=[]), [f"{SPLIT}: 'unseen' lists 0 classes"]),
    "one unseen class": (split_file(unseen=[3]), [f"{SPLIT}: 'unseen' lists 1 classes"]),
    "unknown key": (split_file(unsen=[3]), [f"{SPLIT}: must be", 'optional keys are "val" and "seen"']),
    "val is not seen": (split_file(seen=[0, 2, 3], val=[4]),
                        [f"{SPLIT}: 'val' names class 4, which is not in 'seen'"]),
    "no test subjects": (split_file(test_subjects=None), [f"{SPLIT}: 'test_subjects' must list"]),
    "one test subject": (split_file(test_subjects=2), [f"{SPLIT}: 'test_subjects' must list"]),
    "nested test subjects": (split_file(test_subjects=[[2, 4]]), [f"{SPLIT}: 'test_subjects' must list"]),
    "nothing to test": (split_file(test_subjects=[9]), ["mine: split '9_3' leaves no unseen test samples"]),
    "nothing to train on": (split_file(test_subjects=[1, 2, 3, 4]),
                            ["mine: split '9_3' leaves no training samples"]),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_2(case, features_folder, tmp_path, capsys):
    spoiler, fragments = BAD_INPUT[case]
    spoiler(features_folder)
    line = one_line_of(lambda: run_main(features_folder, tmp_path / "out" / "run"), capsys)
    assert line.startswith("error: ") and all(fragment in line for fragment in fragments), line
    assert str(features_folder) in line
    assert not (tmp_path / "out").exists()                                # nothing half-written


def confidences(x):
    x[:, 2] = np.random.default_rng(1).random(x[:, 2].shape)
    return x


ODDITIES = {  # what may be meant: (how to change the folder, the one line)
    "strangers": (split_file(test_subjects=[2, 4, 77]), "tests subjects [77], who have no samples"),
    "an untested class": (spoil("labels.npy", lambda a: np.where(a == 5, 6, a)),
                          "no test samples of unseen classes: "),
    "labels from 1, the last class absent": (
        spoil("labels.npy", lambda a: np.maximum(a, 1)),
        "class 0, Drink water, has no sample, but the last class has; are labels 1-based?"),
    "a confidence": (save_bodies(confidences),
                     "the third channel lies within 0 to 1, the others do not; is it a confidence?"),
    "some in decimetres": (save_bodies(lambda x: np.concatenate([x[:90], 10 * x[90:]])),
                           "6 of 96 sequences have a torso outside 0.05 to 3 m"),
    "nobody in two": (save_bodies(with_value([0, 5], 0)), "2 of 96 sequences have no first person"),
}


@pytest.mark.parametrize("case", ODDITIES)
def test_oddities_are_one_note(case, features_folder):
    assert data.read_data(features_folder, "9_3").notes == []
    change, note = ODDITIES[case]
    change(features_folder)
    notes = data.read_data(features_folder, "9_3").notes
    assert len(notes) == 1 and note in notes[0] and str(features_folder) in notes[0]


def test_an_empty_class_0_of_ready_features_is_one_note(tmp_path):
    folder = write_published(tmp_path / "ntu60", without=[0])
    notes = data.read_data(folder, "mine").notes
    assert len(notes) == 1 and "class 0, Drink water, has no sample" in notes[0]
    spoil("train_label.npy", lambda y: y + 1)(folder)                     # 60 is beyond the last id
    with pytest.raises(data.InputError, match=r"train_label.npy: label 60 in row .*are labels 1-based\?"):
        data.read_data(folder, "mine")


def test_sequences_without_a_body_are_not_trained_on(features_folder):
    save_bodies(with_value([0, 2, 8], 0))(features_folder)
    d = data.read_data(features_folder, "9_3")
    assert np.load(features_folder / "labels.npy")[[0, 1, 2]].tolist() == [0, 0, 0]
    assert np.load(features_folder / "subjects.npy")[[0, 1, 2]].tolist() == [1, 1, 2]
    assert 0 not in d.train and 1 in d.train                              # of a training subject
    assert 2 in d.seen_test                                               # a test sample stays one


def test_millimetres_in_a_published_folder(tmp_path):
    folder = write_published(tmp_path / "published", data.SKELETONS_FORMAT)
    for name in ("seen_train_data", "unseen_data", "seen_test_data"):
        spoil(f"{name}.npy", lambda x: 1000 * x)(folder)
    with pytest.raises(data.InputError, match="published: .*are these millimetres"):
        data.read_data(folder, "55_5")


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("name", ["features.npy", "splits.json", "graph.json"])
def test_a_folder_on_random_edits(name, features_folder):
    """Fuzz: 100 random edits of a file end in one line, or in data that can be trained on."""
    rng, outcomes = np.random.default_rng(0), {"read": 0, "refused": 0}
    for text in ("text_label.npy", "text_description.npy"):
        spoil(text, lambda text: text[:, 0, :8])(features_folder)
    if name == "graph.json":
        save_bodies()(features_folder)
        graph_file(zsar.NTU25)(features_folder)
    path = features_folder / name
    good = path.read_bytes()
    for _ in range(100):
        content = bytearray(good)
        in_header = name != "features.npy" or rng.random() < 0.5
        start = 0 if in_header else int(rng.integers(len(good) - 200))
        part = content[start:start + 400]                                 # the header is short
        edit_at_random(part, rng)
        content[start:start + 400] = part
        path.write_bytes(content)
        try:
            d = data.read_data(features_folder, "9_3")
            assert d.features is None or np.isfinite(d.features).all()
            assert len(d.train) and len(d.unseen) > 1
            outcomes["read"] += 1
        except data.InputError as e:
            assert "\n" not in str(e) and str(features_folder) in str(e)
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 3, outcomes


# --------------------------------------------------------------------------------- data.py: the synthetic set
def test_synthetic_motion_follows_the_text():
    text = np.random.default_rng(0).normal(size=(16, 40))
    text[1] = text[0] + 0.01                                              # class 1 says almost the same
    x, labels, subjects = data.synthetic(text, performers=3, repeats=2, frames=20)
    assert x.shape == (96, 3, 20, 25, 1) and x.dtype == np.float32 and np.isfinite(x).all()
    assert np.bincount(labels).tolist() == [6] * 16
    assert np.bincount(subjects).tolist() == [0, 32, 32, 32]
    again, _, _ = data.synthetic(text, performers=3, repeats=2, frames=20)
    other, _, _ = data.synthetic(text, performers=3, repeats=2, frames=20, seed=1)
    np.testing.assert_array_equal(again, x)
    assert not np.array_equal(other, x)
    y = zsar.to_common_frame(x, zsar.NTU25)
    centre = np.stack([y[labels == c].mean(0) for c in range(16)])
    distance = np.sqrt(((centre[0] - centre) ** 2).mean((1, 2, 3, 4)))
    assert distance[1] < 0.5 * distance[2:].min()


def test_synthetic_bodies_are_not_mirrored():
    """In the common frame left is +x and up is +y, so that toes point to +z."""
    x, _, _ = data.synthetic(np.random.default_rng(0).normal(size=(8, 20)), performers=4, repeats=1, frames=4)
    front = zsar.to_common_frame(x, zsar.NTU25)[:, 2, 0, :, 0]            # (N, V): z in the first frame
    assert (front[:, 15] > front[:, 14]).mean() > 0.75                    # the left toes, its ankle
    assert (front[:, 19] > front[:, 18]).mean() > 0.75


def test_synthetic_bones_keep_their_length():
    text = np.random.default_rng(0).normal(size=(12, 20))
    x = data.synthetic(text, performers=4, repeats=1)[0][..., 0]          # (N, 3, T, V)
    for child, parent in enumerate(data._PARENT[1:], start=1):
        length = np.linalg.norm(x[:, :, :, child] - x[:, :, :, parent], axis=1)     # (N, T)
        assert length.std(1).max() < 0.03                                 # sensor noise alone, 0.5 to 1.5 cm


def test_the_default_synthetic_set():
    start = time.perf_counter()
    d = data.read_data("synthetic", "55_5")
    assert time.perf_counter() - start < 10
    assert d.source == "synthetic set" and d.notes == []
    assert d.skeletons.shape == (2160, 3, 32, 25, 1)
    assert len(d.classes) == 60
    assert len(d.train) == len(d.seen_test) == 990
    assert len(d.unseen_test) == 90 and d.val.tolist() == [16, 21, 25, 31, 48]


# ---------------------------------------------------------------------------------------------- text/embed.py
def test_embed_script_on_a_wrong_command(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for arguments, message in ((["M", "a.txt", "a.npy"], "pip install transformers"), (["M"], "usage: ")):
        monkeypatch.setattr(sys, "argv", ["embed.py", *arguments])
        line = one_line_of(lambda: runpy.run_path(str(ROOT / "text/embed.py"), run_name="__main__"), capsys)
        assert message in line


def tiny_text_model(folder, kind):
    """A folder with a random Sentence-BERT-like or CLIP text model of width 16, and a tokenizer of letters.
    """
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    letters = ["<pad>", "<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)])
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    sizes = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 2, "max_position_embeddings": 77, "bos_token_id": 2, "eos_token_id": 3,
             "pad_token_id": 0}
    with seeded(0):
        if kind == "clip":
            model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes))
        else:
            model = transformers.BertModel(transformers.BertConfig(**sizes))
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("kind", ["clip", "bert"])
def test_embed_script_on_a_tiny_model(kind, tmp_path):
    model = tiny_text_model(tmp_path / "model", kind)
    (tmp_path / "prompts.txt").write_text("a b c\nd\n" + " ".join("abcdefghij" * 4) + "\n")
    done = script("text/embed.py", tmp_path / "model", "prompts.txt", "text.npy", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "cut at 35 tokens: a b c" in done.stdout
    text = np.load(tmp_path / "text.npy").astype(np.float32)
    assert text.shape == (3, 1 + 35, 16)
    ids = torch.tensor([[2, 7, 3] + [0] * 32])                            # "d"
    with torch.inference_mode():
        output = model(ids) if kind == "clip" else model(ids[:, :3])
    tokens = output.last_hidden_state[0].numpy()
    np.testing.assert_allclose(text[1, 1:1 + len(tokens)], tokens, atol=5e-3)
    if kind == "clip":                                                    # as the model gives them
        np.testing.assert_allclose(text[1, 0], output.pooler_output[0], atol=5e-3)
        assert text[1, 4:].any(1).all()
    else:
        assert not text[1, 4:].any()
        np.testing.assert_allclose(np.linalg.norm(text[:, 0], axis=1), 1, atol=1e-3)
