import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cli
import store
from pipeline.commands import printing
from tests.store.examples import all_tensors, class_tensors, file_names, int8_tensors, make_manifest, read_all
from tests.store.test_merge import DATA_SET, OTHERS_ONLY, class_only_note, extract_all
from tests.store.test_merged_rows import draw_images, extract

Run = Callable[..., tuple[int, str, str]]
SAME_WAY = "Only embeddings of one teacher, made in one way, can be merged."
SIZE = make_manifest().preprocessing


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Run `store …` in this process and verify its output; returns its exit status and what it printed."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run_command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["clip-embed-kd", "store", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        printed = capsys.readouterr()
        assert "\x1b" not in printed.out + printed.err
        code = int(stopped.value.code or 0)
        if code == 0 and "--out" in arguments and arguments[0] != "plot":
            store.verify_artifact(str(arguments[arguments.index("--out") + 1]))
        return code, printed.out, printed.err

    yield run_command
    for number, handler in before.items():
        signal.signal(number, handler)


def damage(path: Path) -> Path:
    """Change the last byte of a tensor: of the last one in .safetensors, of any in .h5."""
    content = bytearray(path.read_bytes())
    with store.open_artifact(path) as artifact:
        last = artifact["sample/key"].tobytes()
    content[content.rindex(last) + len(last) - 1] ^= 1
    path.write_bytes(content)
    return path


def test_verify_says_one_line_of_each_path(run: Run, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.safetensors", "b.h5", "c.safetensors", "d.h5", "e.h5", "f.safetensors")]
    whole, other, damaged, also, empty, text = paths
    for path in (whole, other, damaged, also):
        store.write_artifact(path, make_manifest(), all_tensors())
    damage(damaged), damage(also)
    empty.write_bytes(b"")
    text.write_text("Dear reader, this is a letter.\n")
    folder, missing, unknown = tmp_path / "folder.h5", tmp_path / "two  spaces.h5", tmp_path / "image.png"
    folder.mkdir()

    code, out, err = run("verify", *paths, folder, missing, unknown)
    assert (code, err) == (1, "")
    lines = out.splitlines()
    assert lines[:2] == [f"{whole}: ok", f"{other}: ok"]
    for path, line in zip((damaged, also), lines[2:4], strict=True):
        assert line.startswith(f"{path}: FAILED: sample/key has SHA-256 ")
        assert line.endswith("…. The file is damaged: copy or extract it again.")
        assert line.count(path.name) == 1
    assert lines[4].startswith(f"{empty}: FAILED: not a readable HDF5 file (")
    assert lines[5:] == [
        f"{text}: FAILED: the header should have {int.from_bytes(b'Dear rea', 'little')} bytes, the file has 31. "
        "It is cut off or not a safetensors file: copy it again.",
        f"{folder}: FAILED: artifact is a folder. Make one with `clip-embed-kd extract`.",
        f"{missing}: FAILED: artifact does not exist. Make one with `clip-embed-kd extract`.",
        f"{unknown}: FAILED: an artifact's name ends in .safetensors, .h5, .hdf5, found '.png'.",
    ]
    assert run("verify", whole, other) == (0, f"{whole}: ok\n{other}: ok\n", "")


def test_verify_in_json_is_a_list_of_all_paths(run: Run, tmp_path: Path) -> None:
    whole, empty = tmp_path / "a.h5", tmp_path / "b.safetensors"
    digest = store.write_artifact(whole, make_manifest(), int8_tensors()).sha256()
    empty.write_bytes(b"")
    code, out, err = run("verify", whole, empty, "--json")
    assert (code, err) == (1, "")
    reason = "the header should have 0 bytes, the file has 0. It is cut off or not a safetensors file: copy it again."
    assert json.loads(out) == [
        {"path": str(whole), "ok": True, "manifest_sha256": digest, "error": None},
        {"path": str(empty), "ok": False, "manifest_sha256": None, "error": reason},
    ]
    code, out, _ = run("verify", whole, "--json")
    assert (code, json.loads(out)[0]["ok"]) == (0, True)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PermissionError(13, "Permission denied", "x.h5"), "Permission denied."),
        (MemoryError(), "there is not enough memory for it."),
    ],
)
def test_what_the_machine_refuses_is_one_line_too(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def fail(path: Path, progress: object) -> None:
        raise error

    monkeypatch.setattr(store, "verify_artifact", fail)
    assert run("verify", "x.h5") == (1, f"x.h5: FAILED: {reason}\n", "")


def test_names_that_could_steer_a_terminal_are_escaped(run: Run, tmp_path: Path) -> None:
    hostile = tmp_path / "\x1b[2Ja.h5"
    classes = ("\x1b[2Jant", "bee\x9b1m", "cat\u202e")
    changes = {"preprocessing": {"size": "\x1b]0;title\x07\x9b"}}
    one = extract(hostile, draw_images(6, 0, classes), with_samples=False)
    two = extract(tmp_path / "b.h5", draw_images(6, 1, classes), with_samples=False)
    other = extract(tmp_path / "c.h5", draw_images(6, 2, classes), changes=changes)
    shown = [
        run("verify", one),
        run("convert", one, "--out", tmp_path / "\x1b[1mout.h5", "--drop-class", classes[0]),
        run("convert", one, "--out", tmp_path / "x.h5", "--drop-class", "\x1b[2J"),
        run("merge", one, two, "--out", tmp_path / "\x1b[1mboth.h5"),
        run("merge", one, other, "--out", tmp_path / "x.h5"),
    ]
    assert [code for code, _, _ in shown] == [0, 0, 1, 0, 1]
    for _, out, err in shown:
        assert (out + err).replace("\n", "").isprintable()
        assert "\\x1b[" in out + err
    assert "note      \\x1b[2Ja.h5, b.h5: class statistics only" in shown[3][1]
    assert shown[4][2] == (
        f"Error: c.h5: preprocessing.size is \\x1b]0;title\\x07\\x9b, \\x1b[2Ja.h5 has 224. {SAME_WAY}\n"
    )


def test_convert_shows_size_digest_and_loss(run: Run, tmp_path: Path) -> None:
    path, out_path = extract(tmp_path / "a.safetensors", draw_images(30, 0)), tmp_path / "b.h5"
    code, out, err = run("convert", path, "--out", out_path, "--dtype", "int8")
    digest = store.verify_artifact(out_path)
    assert (code, err) == (0, "")
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert list(rows) == ["artifact", "digest", "cosine", "classes"]
    change = out_path.stat().st_size / path.stat().st_size - 1
    assert rows["artifact"].startswith(f"{out_path}, ")
    assert rows["artifact"].endswith(f"({change:+.1%})")
    assert rows["digest"] == digest
    assert re.fullmatch(r"mean 0\.99999\d\d, worst 0\.9999\d{3}, of 30 samples", rows["cosine"])
    assert rows["classes"] == "nearest one unchanged for 100.00% of 30 samples"

    code, out, err = run("convert", path, "--out", out_path, "--dtype", "int8", "--gzip", "--overwrite", "--json")
    document = json.loads(out)
    assert (code, err) == (0, "")
    assert set(document) == {"artifact", "manifest_sha256", "bytes_before", "bytes_after", "loss", "notes"}
    assert (document["artifact"], document["manifest_sha256"]) == (str(out_path), digest)
    assert (document["bytes_before"], document["bytes_after"]) == (path.stat().st_size, out_path.stat().st_size)
    assert set(document["loss"]) == {
        *("mean_cosine", "worst_cosine", "nearest_class_agreement", "num_rows", "num_compared")
    }
    assert document["notes"] == []


def test_convert_without_loss_says_so_and_shows_notes(run: Run, tmp_path: Path) -> None:
    path, out_path = extract(tmp_path / "a.h5", draw_images(9, 0), with_head=True), tmp_path / "b.safetensors"
    note = "The ridge head was fitted again, without the dropped classes."
    drop = ("--drop-class", "ant", "--drop-class", "cat")
    code, out, _ = run("convert", path, "--out", out_path, *drop, "--class-only")
    assert (code, out.splitlines()[2:]) == (
        0,
        ["loss      none: what was kept is kept to the bit", f"note      {note}"],
    )
    assert set(read_all(out_path)) == {*class_tensors(), "head/weight", "head/bias"}
    code, out, _ = run("convert", path, "--out", out_path, *drop, "--overwrite", "--json")
    assert (json.loads(out)["loss"], json.loads(out)["notes"]) == (None, [note])
    with store.open_artifact(out_path) as artifact:
        assert artifact.manifest.classes == ("bee",)
        assert artifact.manifest.tensors["sample/key"].shape == (3, 16)


def test_merge_shows_classes_samples_and_notes(run: Run, tmp_path: Path) -> None:
    one, two, out_path = tmp_path / "a.h5", tmp_path / "b.h5", tmp_path / "c.safetensors"
    images = draw_images(9, 0)
    extract(one, images)
    extract(two, images._replace(names=["ant", "bee", "dog"] * 3))
    code, out, err = run("merge", one, two, "--out", out_path, "--allow-overlap")
    digest = store.verify_artifact(out_path)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"artifact  {out_path}, {out_path.stat().st_size:,} bytes",
        f"digest    {digest}",
        "classes   4",
        "samples   12, and 6 repeats of them left out",
    ]
    three = extract(tmp_path / "d.h5", draw_images(9, 1), with_samples=False)
    code, out, _ = run("merge", one, three, "--out", out_path, "--overwrite", "--json")
    assert code == 0
    assert json.loads(out) == {
        "artifact": str(out_path),
        "manifest_sha256": store.verify_artifact(out_path),
        "num_classes": 3,
        "num_samples": 9,
        "num_shared": 0,
        "notes": [class_only_note(three), OTHERS_ONLY],
    }
    code, out, _ = run(
        "merge", three, extract(tmp_path / "e.h5", draw_images(4, 2), with_samples=False), "--out", one, "--overwrite"
    )
    assert (code, out.splitlines()[3]) == (0, "samples   0")


def bad_inputs(folder: Path) -> dict[str, tuple[list[object], int, str]]:
    one, two, damaged, out = folder / "one.h5", folder / "two.h5", folder / "damaged.h5", ("--out", folder / "out.h5")
    exists = f"{two}: exists. Choose another --out, or pass --overwrite."
    no_class = "one.h5: has no class 'dog' to drop. `store inspect` shows its classes."
    missing = f"{folder / 'no.h5'}: artifact does not exist. Make one with `clip-embed-kd extract`."
    is_damaged = "damaged.h5: sample/key has SHA-256 "
    shared = "one.h5, one.h5: of their samples 9 are repeated, same image and same label, and would be counted twice. "
    return {
        "nothing to verify": (["verify"], 2, "Missing argument 'PATH…'."),
        "an artifact in the way": (["convert", one, "--out", two], 1, exists),
        "an unknown type": (["convert", one, *out, "--dtype", "int4"], 2, "Invalid value for '--dtype': 'int4'"),
        "an unknown class": (["convert", one, *out, "--drop-class", "dog"], 1, no_class),
        "a damaged artifact to convert": (["convert", damaged, "--out", two, "--overwrite"], 1, is_damaged),
        "nothing to convert": (["convert", folder / "no.h5", *out], 1, missing),
        "one artifact to merge": (["merge", one, *out], 1, f"{out[1]}: a merge needs two artifacts or more, found 1."),
        "shared images": (["merge", one, one, *out], 1, shared),
        "a damaged artifact to merge": (["merge", one, damaged, *out], 1, is_damaged),
        "a folder to write": (["merge", one, two, "--out", folder], 1, f"{folder}: an artifact's name ends in "),
    }


@pytest.mark.parametrize("name", bad_inputs(Path()))
def test_bad_input_is_one_clear_line_and_changes_nothing(run: Run, tmp_path: Path, name: str) -> None:
    for index, stem in enumerate(("one", "two", "damaged")):
        extract(tmp_path / f"{stem}.h5", draw_images(9, index))
    damage(tmp_path / "damaged.h5")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    arguments, expected_code, expected = bad_inputs(tmp_path)[name]
    code, out, err = run(*arguments)
    assert (code, out) == (expected_code, "")
    assert err.splitlines()[-1].startswith(f"Error: {expected}")
    assert code == 2 or err.count("\n") == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


UNLIKE: list[tuple[tuple[int, int], dict[str, Any], str, str]] = [  # views, changes, what is found and expected
    ((1, 1), {"teacher.weights_sha256": "b" * 64}, f"teacher.weights_sha256 is {'b' * 64}", "a" * 64),
    ((1, 1), {"teacher.pooling": "mean"}, "teacher.pooling is mean", "cls"),
    ((1, 1), {"teacher.precision": "bfloat16"}, "teacher.precision is bfloat16", "float32"),
    ((1, 1), {"preprocessing": SIZE | {"resample": 3}}, "preprocessing.resample is 3", "None"),
    ((1, 1), {"preprocessing": SIZE | {"size": {"width": 9}}}, "preprocessing.size is {'width': 9}", "224"),
    ((1, 2), {}, "sampling.views is 2", "1"),
    ((2, 1), {}, "sampling.views is 1", "2"),
    ((2, 2), {"sampling.seed": 7}, "sampling.seed is 7", "0"),
    ((2, 2), {"sampling.view_size": 64}, "sampling.view_size is 64", "None"),
    ((2, 2), {"sampling.views_version": 2}, "sampling.views_version is 2", "None"),
    ((1, 1), {"data_set.classes_named": False}, "data_set.classes_named is False", "True"),
]


@pytest.mark.parametrize(("views", "changes", "found", "expected"), UNLIKE, ids=[case[2].split()[0] for case in UNLIKE])
def test_artifacts_not_made_in_one_way_are_not_merged(
    run: Run, tmp_path: Path, views: tuple[int, int], changes: dict[str, Any], found: str, expected: str
) -> None:
    parts = [draw_images(3, seed, views=views[seed == 2]) for seed in range(3)]
    one, two, other = extract_all(tmp_path, parts, {}, {}, changes)
    error = (1, "", f"Error: 2.safetensors: {found}, 0.safetensors has {expected}. {SAME_WAY}\n")
    assert run("merge", one, other, "--allow-overlap", "--out", tmp_path / "out.h5") == error
    assert run("merge", one, two, other, "--out", tmp_path / "out.h5") == error
    assert file_names(tmp_path) == [one.name, two.name, other.name]


@pytest.mark.parametrize("first_is_class_only", [False, True])
def test_different_types_of_samples_are_not_merged(run: Run, tmp_path: Path, first_is_class_only: bool) -> None:
    paths = [extract(tmp_path / f"{dtype}.h5", draw_images(3, 0), dtype=dtype) for dtype in ("float16", "int8")]
    if first_is_class_only:
        paths.insert(0, extract(tmp_path / "first.h5", draw_images(3, 1), with_samples=False))
    message = (
        "int8.h5: tensors.sample/embedding.dtype is int8, float16.h5 has float16. "
        "Make them equal with `clip-embed-kd store convert --dtype`."
    )
    assert run("merge", *paths, "--out", tmp_path / "out.safetensors") == (1, "", f"Error: {message}\n")


@pytest.mark.parametrize("field", ["name", "config", "label_column"])
def test_classes_without_names_are_those_of_one_data_set(run: Run, tmp_path: Path, field: str) -> None:
    unnamed, expected = {"data_set.classes_named": False}, getattr(DATA_SET, field)
    changes = unnamed, unnamed | {f"data_set.{field}": "other"}, unnamed | {"data_set.split": "test"}
    one, two, three = extract_all(tmp_path, [draw_images(3, seed, ("0", "1")) for seed in range(3)], *changes)
    message = f"1.safetensors: data_set.{field} is other, 0.safetensors has {expected}. {SAME_WAY}"
    assert run("merge", one, two, "--out", tmp_path / "out.safetensors") == (1, "", f"Error: {message}\n")
    assert run("merge", one, three, "--out", tmp_path / "out.safetensors")[0] == 0
    with store.open_artifact(tmp_path / "out.safetensors") as artifact:
        assert not artifact.manifest.data_set.classes_named


def test_long_work_shows_a_bar_on_stderr(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline import progress

    shown: list[tuple[str, int, str]] = []
    advanced: list[int] = []
    start = progress.ProgressBar.__init__

    def watch(bar: progress.ProgressBar, what: str, total: int, unit: str) -> None:
        shown.append((what, total, unit))
        start(bar, what, total, unit)

    monkeypatch.setattr(printing, "_BYTES_WITHOUT_BAR", 1_000_000)
    monkeypatch.setattr(progress.ProgressBar, "__init__", watch)
    monkeypatch.setattr(progress.ProgressBar, "advance", lambda bar, count: advanced.append(count))
    path = tmp_path / "a.h5"
    tensors = class_tensors(3, 400_000)
    store.write_artifact(path, make_manifest(3, 400_000), tensors)
    num_megabytes = path.stat().st_size // 10**6
    assert run("verify", path)[0] == 0
    assert shown == [("verifying", num_megabytes, "MB")]
    assert sum(advanced) == sum(array.nbytes for array in tensors.values()) // 10**6 == num_megabytes
    small = tmp_path / "b.h5"
    store.write_artifact(small, make_manifest(), {**class_tensors(), "class/m2": np.ones((3, 4), np.float32)})
    run("verify", small)
    assert len(shown) == 1


def test_plot_draws_a_picture_and_says_what_is_in_it(run: Run, tmp_path: Path) -> None:
    store.write_artifact(tmp_path / "a.h5", make_manifest(), all_tensors())
    code, out, _ = run("plot", tmp_path / "a.h5", "--out", tmp_path / "a.svg", "--method", "pca", "--json")
    document = json.loads(out)
    assert (code, document["num_classes"], document["num_samples"]) == (0, 3, 5)
    assert (tmp_path / "a.svg").read_bytes().startswith(b"<?xml")
