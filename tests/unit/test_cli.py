"""The command line: dispatch, messages, exit codes, start-up."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from fastpref import cli, commands
from fastpref.commands import add_config_options, config_from_options
from fastpref.config import Config, field_names
from fastpref.errors import NonFiniteError, Preempted

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A command `fake` whose options are the fields of Config; set `.run` to what it does."""
    module = types.ModuleType("fastpref.commands.fake", "A fake command.")
    module.add_arguments = add_config_options  # type: ignore[attr-defined]
    module.run = lambda args: 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(cli.COMMANDS, "fake", (module.__name__, "nothing"))
    return module


def test_every_listed_command_exists_and_every_command_is_listed() -> None:
    folder = Path(commands.__file__).parent
    assert {file.stem for file in folder.glob("[a-z]*.py")} == set(cli.COMMANDS)
    for name, (path, text) in cli.COMMANDS.items():
        module = importlib.import_module(path)
        assert path == f"fastpref.commands.{name}" and text and module.__doc__
        module.add_arguments(argparse.ArgumentParser())
        assert callable(module.run)


def test_overview_and_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in cli.COMMANDS)
    assert cli.main([]) == 2
    capsys.readouterr()
    assert cli.main(["trian"]) == 2
    out = capsys.readouterr()
    assert out.err == "error: unknown command 'trian'; did you mean train?\n" and not out.out


def test_help_of_a_command_lists_every_field(
    fake: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["fake", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"--{name}" in shown for name in field_names())
    assert "A fake command." in shown and "optimizer (how the weights move):" in shown


def test_options_become_a_config(fake: types.ModuleType, tmp_path: Path) -> None:
    seen: list[Config] = []
    fake.run = lambda args: seen.append(config_from_options(args)) or 0  # type: ignore[attr-defined]
    file = tmp_path / "run.yaml"
    file.write_text("beta: 0.3\nseed: 4\n")
    words = ["fake", str(file), "--dataset_name", "a", "b", "--seed=5", "--overwrite_output_dir"]
    assert cli.main([*words, "--max_steps", "-1", "--flip_behaviors"]) == 0
    assert seen[0].dataset_name == ("a", "b") and seen[0].beta == 0.3 and seen[0].seed == 5
    assert seen[0].overwrite_output_dir is True and seen[0].flip_behaviors == ()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--betta", "0.2"], "--betta: unknown name; did you mean beta?"),
        (["--lora_r=8"], "--lora_r: an option of LoRA, but trainable is 'all'"),
        (["--learning-rate", "1"], "did you mean learning_rate?"),
        (["a.yaml", "b.yaml"], "unexpected argument 'b.yaml'"),
        (["--beta"], "--beta: expected one argument"),
        (["--beta", "much"], "--beta: expected a finite number, got 'much'"),
        (["absent.yaml"], "absent.yaml: cannot read"),
    ],
)
def test_bad_input_is_two_and_a_message(
    fake: types.ModuleType, capsys: pytest.CaptureFixture[str], words: list[str], part: str
) -> None:
    fake.run = lambda args: config_from_options(args) and 0  # type: ignore[attr-defined]
    assert cli.main(["fake", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and part in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("bad"), 2),
        (NonFiniteError("step 3"), 3),
        (Preempted("step 3"), 143),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(
    fake: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
) -> None:
    def fail(args: argparse.Namespace) -> int:
        raise error

    fake.run = fail  # type: ignore[attr-defined]
    assert cli.main(["fake"]) == code
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and "Traceback" not in shown
    monkeypatch.setenv("FASTPREF_DEBUG", "1")
    assert cli.main(["fake"]) == code
    assert "Traceback" in capsys.readouterr().err


def test_a_mistake_of_ours_is_not_hidden(fake: types.ModuleType) -> None:
    fake.run = lambda args: [][0]  # type: ignore[attr-defined]
    with pytest.raises(IndexError):
        cli.main(["fake"])


def test_help_starts_quickly_and_without_torch() -> None:
    watch = "import sys; from fastpref.cli import main; main(['--help']); print(*sys.modules)"
    times = []
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", watch], cwd=ROOT, check=True, capture_output=True, text=True
        )
        times.append(time.perf_counter() - began)
    loaded = done.stdout.split()
    assert not {"torch", "numpy", "transformers", "pyarrow"} & set(loaded)
    # 0.2 s on an idle machine; the bound leaves room for a busy one.
    assert min(times) < 1.0, times


def test_env_shows_versions(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    assert cli.main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["torch"] == torch.__version__ and found["cores"] >= 1
    assert found["fastpref"] == found["fastpref_kernels"]
    assert cli.main(["env"]) == 0
    assert "cache folder" in capsys.readouterr().out


def test_env_survives_kernels_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    import fastpref_kernels

    from fastpref import require_matching_kernels
    from fastpref.commands.env import describe

    monkeypatch.setattr(fastpref_kernels, "__version__", "0.0.9", raising=False)
    with pytest.raises(ImportError, match="found fastpref_kernels 0.0.9"):
        require_matching_kernels()
    assert describe()["fastpref_kernels"].startswith("unusable")


def test_python_dash_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastpref", "--version"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.startswith("fastpref 0.")
