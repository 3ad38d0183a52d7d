"""What is installed: the wheel's contents, the constraints, the command line's frame and `make demo`'s quoting."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import l4jax
import l4jax.cli
from l4jax.data import configs_path
from l4jax.paths import cache_root

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def constraints(file: str = "constraints.txt") -> dict[str, str]:
    lines = [line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]
    pins = [re.fullmatch(r"([a-z0-9-]+)==([0-9][0-9a-z.]*)", line) for line in lines]
    assert all(pins), "every line is NAME==VERSION"
    return {match[1]: match[2] for match in pins if match}


@pytest.mark.parametrize(
    ("file", "extras"), [("constraints.txt", ("cuda", "dev")), ("constraints-oldest.txt", ("dev",))], ids=["newest", "oldest"]
)
def test_every_requirement_is_pinned_within_its_range(file: str, extras: tuple[str, ...]) -> None:
    pins = constraints(file)
    for text in [*PROJECT["dependencies"], *(text for extra in extras for text in PROJECT["optional-dependencies"][extra])]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text


def test_the_oldest_jax_that_is_allowed_is_tested() -> None:
    pins = constraints("constraints-oldest.txt")
    allowed = {requirement.name: requirement.specifier for requirement in map(Requirement, PROJECT["dependencies"])}
    for name in ("jax", "jaxlib"):
        assert f">={pins[name]}" in str(allowed[name]).split(",")


def test_the_tests_run_on_versions_that_are_allowed() -> None:
    installed = {canonicalize_name(d.metadata["Name"]): d.version for d in distributions()}
    for requirement in map(Requirement, PROJECT["dependencies"]):
        assert requirement.specifier.contains(installed[canonicalize_name(requirement.name)]), requirement


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "--quiet",
        "-w",
        str(directory),
        ".",
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = directory.glob("*.whl")
    return built


def test_the_wheel_holds_all_code_and_all_configurations_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    sources = [p for package in ("l4jax", "sharding", "pallas_kernels") for p in (ROOT / package).rglob("*") if p.is_file()]
    code = {str(p.relative_to(ROOT)) for p in sources if "__pycache__" not in p.parts}
    data = {f"l4jax/{p.relative_to(ROOT)}" for p in (ROOT / "configs").rglob("*") if p.is_file()}
    assert data
    assert packed == code | data


def test_an_installed_wheel_finds_its_configurations(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = "import l4jax.data; p = l4jax.data.configs_path(); print(p); print(*sorted(str(f.relative_to(p)) for f in p.rglob('*.json')))"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-P", "-c", code], env=environment, cwd=tmp_path, check=True, capture_output=True, text=True)
    found, files = done.stdout.splitlines()
    assert found == str(tmp_path / "site" / "l4jax" / "configs")
    assert files.split() == sorted(str(f.relative_to(ROOT / "configs")) for f in (ROOT / "configs").rglob("*.json"))


def test_a_checkout_finds_its_configurations() -> None:
    assert configs_path() == ROOT / "configs"


@pytest.mark.parametrize(
    ("configured", "expected"), [("/somewhere", "/somewhere/l4jax"), ("", "/home/x/.cache/l4jax"), ("relative", "/home/x/.cache/l4jax")]
)
def test_cache_root(configured: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/x")
    monkeypatch.setenv("XDG_CACHE_HOME", configured)
    assert cache_root() == Path(expected)


def test_help_names_every_command_and_does_not_wait_for_jax() -> None:
    code = "import sys, l4jax.cli\ntry: l4jax.cli.main(['--help'])\nfinally: print('jax' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "False False"
    for command in l4jax.cli.COMMANDS:
        assert re.search(rf"^    {command}\s+\S", done.stdout, re.MULTILINE), command


def test_the_interactive_interpreter_completes_all_names_without_loading_jax() -> None:
    code = "import sys, l4jax; print(*sorted(set(l4jax.__all__) - set(dir(l4jax))), '__path__' in dir(l4jax), 'jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "True False\n"


def test_every_public_name_is_found_and_every_error_documented() -> None:
    found = {name: getattr(l4jax, name) for name in l4jax.__all__}
    assert found.keys() == l4jax._HOMES.keys()
    errors = {name: value for name, value in found.items() if isinstance(value, type) and issubclass(value, Exception)}
    assert {"ChatError", "CheckpointError"} <= errors.keys()
    _, _, section = (ROOT / "docs" / "python_api.md").read_text().partition("\n## Errors\n")
    for name, error in errors.items():
        assert issubclass(error, ValueError)
        assert re.search(rf"^\| `{name}`", section, re.MULTILINE), name


def fail_with(error: BaseException) -> object:
    def run(arguments: argparse.Namespace) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("two\nlines"), 2, "l4jax: error: two lines\n"),
        (
            FileNotFoundError(2, "No such file or directory", "x"),
            2,
            "l4jax: error: x cannot be read or written (No such file or directory); check that path, its permissions and its disk\n",
        ),
        (KeyboardInterrupt(), 130, "l4jax: interrupted\n"),
    ],
)
def test_errors_end_in_one_line(
    error: BaseException, status: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("l4jax.cli.demo.run", fail_with(error))
    assert l4jax.cli.main(["demo"]) == status
    assert capsys.readouterr() == ("", line)


def test_a_bug_shows_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("l4jax.cli.demo.run", fail_with(KeyError("bug")))
    with pytest.raises(KeyError):
        l4jax.cli.main(["demo"])


def test_a_reader_who_leaves_ends_the_command_quietly() -> None:
    code = """
import sys, l4jax.cli, l4jax.cli.demo
def run(arguments):
    while True:
        print("x" * 1000)
l4jax.cli.demo.run = run
sys.exit(l4jax.cli.main(["demo"]))
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


def make(directory: Path, *arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": path or os.environ["PATH"], "HOME": str(directory)}
    return subprocess.run(["make", *arguments], cwd=directory, env=environment, check=False, capture_output=True, text=True)


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A checkout whose virtual environment is up to date and holds nothing but a command that prints its arguments."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    command = tmp_path / ".venv" / "bin" / "l4jax"
    command.write_text(f"#!{sys.executable}\nimport sys\nprint(ascii(sys.argv[1:]))\n")
    command.chmod(0o755)
    (tmp_path / ".venv" / ".installed").touch()
    return tmp_path


@pytest.mark.parametrize(
    "question",
    [
        "plain",
        'it\'s "quoted" `twice`',
        "$5 $(HOME) $${x} $(shell touch made) $$(touch made)",
        "back\\slash; touch made && # not a comment",
        "-p",
        "two\nlines",
        "été 🌍",
    ],
)
def test_make_demo_passes_the_question_on_as_it_was_typed(prepared: Path, question: str) -> None:
    done = make(prepared, "--silent", "demo", f"PROMPT={question}")
    assert done.stderr == ""
    assert done.stdout == ascii(["demo", f"--prompt={question}"]) + "\n"
    assert not (prepared / "made").exists()


def test_make_demo_without_a_question_asks_the_default(prepared: Path) -> None:
    assert make(prepared, "--silent", "demo").stdout == "['demo']\n"


def test_make_says_what_to_install_when_there_is_no_python(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("make", "sh", "touch"):
        (tools / tool).symlink_to(shutil.which(tool) or tool)
    # As a pyenv shim does for a version that is not installed; and a Python that is too old.
    for name, status in (("python3.12", 127), ("python3", 1)):
        (tools / name).write_text(f"#!/bin/sh\nexit {status}\n")
        (tools / name).chmod(0o755)
    done = make(tmp_path, "setup", path=str(tools))
    assert done.returncode != 0
    assert "needs Python 3.12" in done.stderr
    assert "apt-get install python3 python3-venv" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_the_repository_names_no_registry() -> None:
    for name in ("pyproject.toml", "constraints.txt", "constraints-oldest.txt", "Makefile", ".ci/run"):
        assert "://" not in (ROOT / name).read_text()
