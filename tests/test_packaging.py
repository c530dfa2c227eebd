"""What is installed, what an import drags in, and what must never stand in a file.

A folder called `kernels` at the root is a trap: Hugging Face has a package of that name, which
transformers probes for whenever a model class is imported. As long as ours has no `__init__.py` it
is at most an empty namespace; with one it would be taken for theirs and break every model class.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "fastpref": ROOT / "fastpref",
    "fastpref_kernels": ROOT / "kernels" / "fastpref_kernels",
}
CHECKOUT = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])  # both packages, uninstalled
SKIPPED_FOLDERS = {"build", "dist", "runs", "__pycache__"}


def run_python(code: str, *, pythonpath: str, cwd: Path) -> str:
    """Standard output of `code` in a fresh interpreter; its traceback is the failure message."""
    environment = {**os.environ, "PYTHONPATH": pythonpath}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def project_files() -> Iterator[Path]:
    """Files of the checkout; hidden folders, environments and run folders are not part of it."""
    for folder, names, files in os.walk(ROOT):
        names[:] = [
            name
            for name in names
            if name not in SKIPPED_FOLDERS
            and (not name.startswith(".") or name in {".ci", ".github"})
            and not (Path(folder, name) / "pyvenv.cfg").exists()
        ]
        yield from (Path(folder, name) for name in files)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = target.glob("*.whl")
    return zipfile.ZipFile(path)


def test_kernels_folder_is_not_a_package() -> None:
    assert (ROOT / "kernels" / "fastpref_kernels" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow Hugging Face's kernels"


def test_wheel_holds_the_two_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    top_level = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top_level if not name.endswith(".dist-info")} == set(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_wheel_holds_every_file_of_a_package(wheel: zipfile.ZipFile, package: str) -> None:
    folder = PACKAGES[package]
    expected = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".pyc" and not path.name.startswith(".")
    }
    packed = {name for name in wheel.namelist() if name.startswith(package + "/")}
    assert packed == expected


def test_wheel_asks_for_lower_bounds_only(wheel: zipfile.ZipFile) -> None:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    lines = wheel.read(name).decode().splitlines()
    wanted = [line.partition(": ")[2] for line in lines if line.startswith("Requires-Dist: ")]
    assert any(requirement.startswith("torch>=") for requirement in wanted)
    bounds = [requirement.partition(";")[0] for requirement in wanted]
    assert [bound for bound in bounds if re.search(r"<|==|~=|!=", bound)] == []


def test_constraints_pin_what_the_runtime_needs() -> None:
    """Everything exactly, but triton, which a CUDA build of torch pins itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    trl = project["optional-dependencies"]["trl"]
    needed = {re.split(r"[>=;\s]", line)[0].lower() for line in [*project["dependencies"], *trl]}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert needed - {"triton"} <= {name.lower() for name in pins}
    assert "triton" not in pins
    assert [name for name, version in pins.items() if "+" in version] == [], "a local build tag"


def test_transformers_does_not_see_our_folder() -> None:
    """With the checkout on the path, as `python -m` and notebooks have it."""
    code = """
import importlib.util, sys
spec = importlib.util.find_spec("kernels")
print(spec.origin if spec else None)
from transformers import LlamaForCausalLM
print(sorted(name for name in sys.modules if name.startswith("fastpref")))
"""
    origin, ours = run_python(code, pythonpath=str(ROOT), cwd=ROOT).splitlines()
    assert origin == "None" or "site-packages" in origin
    assert ours == "[]"


def test_one_version_everywhere() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    code = "import fastpref; print(fastpref.__version__, fastpref.require_matching_kernels())"
    assert run_python(code, pythonpath=CHECKOUT, cwd=ROOT).split() == [version, version]


def test_importing_fastpref_is_cheap() -> None:
    code = "import sys, fastpref; print({'torch', 'transformers', 'pyarrow'} & set(sys.modules))"
    assert run_python(code, pythonpath=str(ROOT), cwd=ROOT) == "set()"


def test_kernels_need_neither_fastpref_nor_hugging_face(tmp_path: Path) -> None:
    banned = ["fastpref", "transformers", "datasets", "peft", "trl", "pyarrow", "tokenizers"]
    code = f"""
import sys
sys.modules.update(dict.fromkeys({banned!r}))  # None: an import of it raises
import fastpref_kernels
print(fastpref_kernels.__file__)
"""
    path = run_python(code, pythonpath=str(ROOT / "kernels"), cwd=tmp_path)
    assert Path(path).parent == PACKAGES["fastpref_kernels"]


@pytest.mark.parametrize(
    "module",
    ["config", "data.formats", "data.generate", "dynamics.schema", "report", "report.html"],
)
def test_analysis_needs_no_torch(module: str, tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules.update(dict.fromkeys(["torch", "transformers"]))
import fastpref.{module}
"""
    run_python(code, pythonpath=CHECKOUT, cwd=tmp_path)


def test_no_file_names_a_place_on_one_machine() -> None:
    home = r"(?<![\w.}*])/(?:home|root|Users|work|workspace|mnt)/\w"
    place = re.compile("|".join([home, re.escape(str(ROOT)), r"\b[A-Z]:\\\\?Users"]))
    found = []
    for path in project_files():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # a picture
        for number, line in enumerate(lines, 1):
            if place.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}")
    assert found == []
