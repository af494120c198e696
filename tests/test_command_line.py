"""The command line: what it writes, and one line on standard error with exit code 2 for whatever is wrong."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import cufuse
from cufuse.__main__ import main
from cufuse.commands import report as report_command
from cufuse.report import analyse
from cufuse.report_inputs import made_up_hidden_states, random_token_ids
from cufuse.synthetic import synthetic_embedding, synthetic_layer
from tests.commands_here import Command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers and 64 embeddings of a synthetic 0.6B."""
    folder = tmp_path_factory.mktemp("checkpoint") / "two layers"
    assert main(["synthesise", str(folder), "--layers", "2", "--embedding-rows", "64", "--attention-only"]) == 0
    return folder


def in_a_process(*arguments: str, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cufuse", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


QUICK = ("--tokens", "2", "--recipes", "late-rounding")


def test_report_prints_and_writes(command: Command, tmp_path: Path) -> None:
    done = command("report", *QUICK, "--json", "r.json", "--plot", "r.png")
    assert (done.code, done.err) == (0, "")
    assert "layer 0, 2 tokens, sm_90, separate projections, synthetic weights" in done.out
    assert "option 1: PyTorch's rounding points, one call: every bit of the PyTorch path" in done.out
    assert {path.name for path in tmp_path.iterdir()} == {"r.json", "r.png"}
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((tmp_path / "r.json").read_text())
    ids = random_token_ids(2, 151936, 0)
    expected = analyse(synthetic_layer(), synthetic_embedding("qwen3-0.6b", ids), recipes=["late-rounding"])
    assert content == json.loads(json.dumps(expected.to_json()))


def test_json_on_standard_output_is_all_there_is(command: Command, tmp_path: Path) -> None:
    done = command("report", *QUICK, "--json", "-")
    assert (done.code, done.err) == (0, "")
    assert list(json.loads(done.out)["recipes"]) == ["torch", "late-rounding"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", ["svg", "pdf"])
def test_other_plots(command: Command, tmp_path: Path, ending: str) -> None:
    (tmp_path / f"r.{ending}").write_text("an older plot")
    assert command("report", *QUICK, "--plot", f"r.{ending}").code == 0
    assert (tmp_path / f"r.{ending}").read_bytes()[:5] in (b"<?xml", b"%PDF-")
    assert len(list(tmp_path.iterdir())) == 1


def test_options_reach_the_report(command: Command) -> None:
    options = "--arch sm_80 --packed --reference float32 --seed 3 --layer 1"
    done = command("report", *QUICK, "--json", "-", *options.split())
    content = json.loads(done.out)
    told = [content[key] for key in ("arch", "form", "reference", "layer", "tokens")]
    assert told == ["sm_80", "packed", "float32", 1, 2]
    assert any("input is made up" in note for note in content["notes"])
    again = command("report", *QUICK, "--json", "-", "--layer", "1")
    assert json.loads(again.out)["recipes"] != content["recipes"]


def test_report_of_a_checkpoint(command: Command, checkpoint: Path) -> None:
    for source in (checkpoint, checkpoint / "model.safetensors"):
        done = command("report", source, "--token-ids", "1,2,63", "--recipes", "float32", "--json", "-")
        assert (done.code, done.err) == (0, "")
        content = json.loads(done.out)
        # the embedding of these ids is the same as without a file
        states = synthetic_embedding("qwen3-0.6b", [1, 2, 63])
        expected = json.loads(json.dumps(analyse(synthetic_layer(), states, recipes=["float32"]).to_json()))
        assert content["recipes"] == expected["recipes"]


def test_all_layers(command: Command, checkpoint: Path) -> None:
    done = command("report", checkpoint, "--layer", "all", *QUICK, "--json", "all.json")
    assert (done.code, done.err) == (0, "")
    assert "Keys after their norm, per layer" in done.out
    content = json.loads(Path("all.json").read_text())
    assert content["schema"] == 1
    assert [layer["layer"] for layer in content["layers"]] == [0, 1]
    single = command("report", checkpoint, "--layer", "1", *QUICK, "--json", "-")
    assert json.loads(single.out) == content["layers"][1]
    # a later layer's input is made up from the seed and the layer's number
    expected = analyse(synthetic_layer(layer=1), made_up_hidden_states(2, 1024, 1), recipes=["late-rounding"]).to_json()
    assert content["layers"][1]["recipes"] == json.loads(json.dumps(expected))["recipes"]


def test_hidden_states(command: Command, checkpoint: Path) -> None:
    states = made_up_hidden_states(3, 1024, 5)
    safetensors.numpy.save_file({"hidden_states": states, "other": states[:1]}, "h.safetensors")
    options = ("--recipes", "float32", "--json", "-")
    done = command("report", checkpoint, "--layer", "1", "--hidden-states", "h.safetensors", *options)
    assert (done.code, done.err) == (0, "")
    expected = analyse(synthetic_layer(layer=1), states, recipes=["float32"]).to_json()
    assert json.loads(done.out)["recipes"] == json.loads(json.dumps(expected))["recipes"]
    safetensors.numpy.save_file({"hidden_states.0": states[:2], "hidden_states.1": states}, "all.safetensors")
    done = command("report", checkpoint, "--layer", "all", "--hidden-states", "all.safetensors", *options)
    assert [layer["tokens"] for layer in json.loads(done.out)["layers"]] == [2, 3]
    safetensors.numpy.save_file({"hidden_states.0": states}, "first.safetensors")
    assert command("report", checkpoint, "--hidden-states", "first.safetensors", *options).code == 0
    done = command("report", checkpoint, "--layer", "all", "--hidden-states", "first.safetensors", *options)
    assert done.code == 2
    assert "hidden_states.1" in done.err


def test_recipes(command: Command) -> None:
    done = command("recipes")
    assert (done.code, done.err) == (0, "")
    assert [line.split()[0] for line in done.out.splitlines()] == list(cufuse.recipes)
    done = command("recipes", "torch", "gemma")
    assert done.out == f"{cufuse.recipes['torch']}\n\n{cufuse.recipes['gemma']}\n"


def test_version_and_help(command: Command) -> None:
    assert command("--version") == (0, f"cufuse {cufuse.__version__}\n", "")
    for arguments in (("--help",), ("report", "--help"), ("recipes", "--help"), ("synthesise", "--help")):
        done = command(*arguments)
        assert (done.code, done.err) == (0, "")
        assert "usage: cufuse" in done.out


@pytest.fixture(scope="module")
def broken(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of inputs that are wrong, each in one way."""
    folder = tmp_path_factory.mktemp("broken")
    whole = (checkpoint / "model.safetensors").read_bytes()
    (folder / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "header.safetensors").write_bytes(whole[:200])
    (folder / "empty.safetensors").write_bytes(b"")
    shutil.copytree(checkpoint, folder / "no config")
    (folder / "no config" / "config.json").write_text("{")
    (folder / "no weights").mkdir()
    states = np.ones((2, 512), ml_dtypes.bfloat16)
    safetensors.numpy.save_file({"hidden_states": states}, folder / "narrow.safetensors")
    safetensors.numpy.save_file({"hidden_states": states.astype(np.float16)}, folder / "float16.safetensors")
    safetensors.numpy.save_file({"a": states, "b": states}, folder / "unnamed.safetensors")
    return folder


WRONG = [
    ("", "the following arguments are required: command"),
    ("repot", "invalid choice: 'repot'"),
    ("report {broken}/nothing", "nothing: cannot be opened: No such file or directory"),
    ("report {broken}/truncated.safetensors", "truncated"),
    ("report {broken}/header.safetensors", "truncated"),
    ("report {broken}/empty.safetensors", "empty.safetensors"),
    ("report {broken}/no_weights", "No such file"),
    ("report {broken}/no?weights", "no weights"),
    ("report {broken}/no?config", "config.json"),
    ("report {checkpoint} --layer 2", "--layer is 2; available are 0 to 1"),
    ("report --layer 28", "--layer is 28; available are 0 to 27"),
    ("report --layer -1", "--layer is -1"),
    ("report --layer first", "--layer is 'first'; needed is a number or all"),
    ("report --recipes torch,pytorch", "recipe is 'pytorch'; known are torch"),
    ("report --recipes ,", "--recipes names none"),
    ("report --reference pytorch", "recipe is 'pytorch'"),
    ("report --json {broken}/nowhere/r.json", "nowhere/r.json: No such file or directory"),
    ("report --json {broken}", "is a folder; needed is a file name"),
    ("report --json /dev/null", "/dev/null is no ordinary file"),
    ("report --plot {broken}/nowhere/r.png", "nowhere/r.png: No such file or directory"),
    ("report --plot {broken}", "is a folder"),
    ("report --plot r", "r ends in ''; a plot's name ends in one of"),
    ("report --plot r.doc", "r.doc ends in 'doc'"),
    ("report --plot r.png --layer all", "--plot draws one layer"),
    ("report --token-ids a,b", "--token-ids is 'a,b'; needed are numbers with commas"),
    ("report --token-ids 1,", "--token-ids is '1,'"),
    ("report --token-ids 151936", "token_ids holds 151936; needed are ids in 0..151935"),
    ("report --token-ids -1", "token_ids holds -1"),
    ("report --token-ids 100000000000000000000", "token_ids"),
    ("report --token-ids 1 --layer 1", "--token-ids are the input of layer 0; give --hidden-states"),
    ("report {checkpoint} --token-ids 64", "token_ids holds 64; needed are ids in 0..63"),
    ("report --tokens 0", "--tokens is 0; needed is 1 to 65536"),
    ("report --tokens 65537", "--tokens is 65537"),
    ("report --tokens many", "argument --tokens: invalid int value: 'many'"),
    ("report --tokens 2 --token-ids 1", "not allowed with argument"),
    ("report --seed -1", "--seed is -1; needed is an integer >= 0"),
    ("report --model qwen2", "argument --model: invalid choice: 'qwen2'"),
    ("report --arch sm_75", "argument --arch: invalid choice: 'sm_75'"),
    ("report --hidden-states {broken}/nothing", "nothing: cannot be opened"),
    ("report --hidden-states {broken}/narrow.safetensors", "has shape [2, 512], needed is [tokens, 1024]"),
    ("report --hidden-states {broken}/float16.safetensors", "float16.safetensors"),
    ("report --hidden-states {broken}/unnamed.safetensors", "hidden_states"),
    ("report --hidden-states {broken}/truncated.safetensors", "truncated"),
    ("recipes pytorch", "recipe is 'pytorch'"),
    ("synthesise {checkpoint}", "exists"),
    ("synthesise x --model qwen2", "invalid choice: 'qwen2'"),
    ("synthesise x --layers 0", "layers is 0"),
    ("synthesise x --seed -1", "seed is -1"),
    ("synthesise x --embedding-rows -1", "-1"),
    ("synthesise {checkpoint}/model.safetensors/x", "model.safetensors"),
]


@pytest.mark.parametrize(("line", "message"), WRONG, ids=[line or "nothing" for line, _ in WRONG])
def test_one_line_and_exit_code_2(
    line: str, message: str, command: Command, checkpoint: Path, broken: Path, tmp_path: Path
) -> None:
    words = [word.replace("?", " ").format(checkpoint=checkpoint, broken=broken) for word in line.split()]
    done = command(*words)
    assert done.code == 2
    assert done.out == ""
    assert done.err.count("\n") == 1, done.err
    assert done.err.endswith("\n")
    assert done.err.startswith("cufuse")
    assert message in done.err
    assert list(tmp_path.iterdir()) == [], "something was left"


def test_exit_code_of_the_process() -> None:
    with in_a_process("report", "--tokens", "0") as process:
        out, err = process.communicate()
    assert (process.returncode, out) == (2, "")
    assert err.count("\n") == 1
    assert "Traceback" not in err


def full_disk(report: object, path: Path) -> None:
    Path(path).write_bytes(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_no_half_written_file(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up while the plot is written: no part of it is left, and the older plot is as it was."""
    (tmp_path / "r.png").write_text("an older plot")
    monkeypatch.setattr(report_command, "plot", full_disk)
    done = command("report", *QUICK, "--plot", "r.png")
    assert (done.code, done.err) == (2, "cufuse report: r.png: No space left on device\n")
    assert [path.name for path in tmp_path.iterdir()] == ["r.png"]
    assert (tmp_path / "r.png").read_text() == "an older plot"


@pytest.mark.parametrize(("error", "code", "message"), [
    (KeyboardInterrupt(), 130, "cufuse: interrupted; nothing was written half\n"),
    (MemoryError(), 2, "cufuse report: not enough memory; give fewer tokens or fewer recipes\n"),
])  # fmt: skip
def test_interrupted(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(report_command, "analyse", stop)
    done = command("report", *QUICK, "--json", "r.json")
    assert (done.code, done.err) == (code, message)
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_goes_away(tmp_path: Path) -> None:
    """``cufuse report | head -1``: no complaint, exit code 0, files written; here the reader has gone before the first line."""
    with in_a_process("report", *QUICK, "--json", str(tmp_path / "report.json")) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0
    assert json.loads((tmp_path / "report.json").read_text())["schema"] == 1
    pipe = f"{sys.executable} -m cufuse report {' '.join(QUICK)} | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", pipe], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    assert "qwen3-0.6b, layer 0" in done.stdout


def test_synthesise(command: Command, checkpoint: Path) -> None:
    done = command("synthesise", "new", "--layers", "1", "--embedding-rows", "8", "--attention-only", "--seed", "4")
    assert (done.code, done.err) == (0, "")
    assert "wrote new: synthetic weights, seed 4" in done.out
    assert json.loads(Path("new/config.json").read_text())["num_hidden_layers"] == 1
    assert {path.name for path in checkpoint.iterdir()} == {path.name for path in Path("new").iterdir()}
    assert command("synthesise", "new", "--layers", "1", "--embedding-rows", "8", "--attention-only", "--overwrite").code == 0
    assert json.loads(command("report", "new", *QUICK, "--json", "-").out)["synthetic"] is True
