"""The order of the house: one stem in every layer, imports point down, files of one sitting, no machine's paths."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
import yaml

import uvg_engine
from uvg_engine import backends

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "uvg_engine"
MAX_LINES = 400

# An import goes to a lower rung or stays in its own part; parts on one rung do not know each other.
RUNGS = (
    ("files", "process", "surroundings"),
    ("reference", "kernels"),
    ("backends",),
    ("ops",),
    ("model", "flow", "media"),
    ("sampling", "training"),
    ("evaluation", "compat"),
    ("cli",),
)
RUNG = {part: rung for rung, parts in enumerate(RUNGS) for part in parts}

# Where a backend that claims an op keeps the op's file; library backends (sdpa, flash_attn) have none.
SOURCES = {
    "reference": ("uvg_engine/reference/{op}.py",),
    "triton": ("kernels/{op}.py",),
    "cpu": ("csrc/cpu/{op}.cpp", "csrc/include/uvg/{op}.h"),
    "cuda": ("csrc/cuda/{op}.cu", "csrc/include/uvg/{op}.h"),
}

OPS = sorted(path.stem for path in (PACKAGE / "ops").glob("*.py") if not path.stem.startswith("_"))


def house_files() -> list[Path]:
    """Files under version control; in an unpacked archive, all that is not hidden or built."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0 and listed.stdout:
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        built = {"build", "dist", "site", "runs", "demo_out"}
        paths = [p for p in ROOT.rglob("*") if not any(x[0] == "." or x in built for x in p.relative_to(ROOT).parts)]
    return [path for path in paths if path.is_file()]


def name_of(path: Path) -> str:
    """Dotted module name of a file of the package or of kernels/."""
    parts = ["uvg_engine", *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(part for part in (parts[1:] if parts[1] == "uvg_engine" else parts) if part != "__init__")


def imported(path: Path) -> set[str]:
    """Modules of uvg_engine that a file imports, anywhere in it, as uvg_engine.<part>[...]."""
    package = name_of(path) if path.name == "__init__.py" else name_of(path).rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *filter(None, [node.module])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("uvg_engine.")}


def test_ops_are_there():
    assert OPS, "uvg_engine/ops holds no op"
    assert sorted(backends.table("reference")) == OPS, "the reference serves every op and nothing else"


@pytest.mark.parametrize("op", OPS)
def test_op_has_its_test_and_its_bench(op):
    for name in (f"tests/ops/test_{op}.py", f"bench/ops/{op}.py"):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("backend", backends.ORDER)
def test_one_stem_in_every_layer(backend):
    served = backends.table(backend)
    assert set(served) <= set(OPS), f"{backend} serves what is no op"
    wanted = [pattern.format(op=op) for op in served for pattern in SOURCES.get(backend, ())]
    assert [name for name in wanted if not (ROOT / name).is_file()] == []


def test_kernel_files_are_named_after_ops():
    """Helpers lie in csrc/common or begin with an underscore; an op's second file is <op>_<what>."""
    folders = ("kernels/*.py", "csrc/cpu/*.cpp", "csrc/cuda/*.cu", "csrc/include/uvg/*.h")
    stems = {path.stem for pattern in folders for path in ROOT.glob(pattern)}
    strangers = {s for s in stems if not s.startswith("_") and not any(s == op or s.startswith(f"{op}_") for op in OPS)}
    assert strangers == set()


def test_imports_point_down():
    wrong = []
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        own = name_of(path).split(".")[1:2]
        if not own or own == ["__main__"]:
            continue  # the front door opens on every part
        assert own[0] in RUNG, f"{path.relative_to(ROOT)}: part {own[0]} has no rung in tests/test_house.py"
        for name in imported(path):
            part = name.split(".")[1]
            if part in RUNG and part != own[0] and RUNG[part] >= RUNG[own[0]]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []


def test_only_backends_touch_native_and_triton():
    """uvg_engine._cpu, _cuda and kernels are reached through backends, triton through kernels and backends."""
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        if name_of(path).startswith("uvg_engine.backends"):
            continue
        wrong += [
            f"{path.relative_to(ROOT)} imports {name}"
            for name in imported(path)
            if name.split(".")[1] in ("_cpu", "_cuda", "kernels")
        ]
    assert wrong == []


def test_a_file_is_read_in_one_sitting():
    code = [path for path in house_files() if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")]
    assert code
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in code}
    assert {name: count for name, count in lengths.items() if count > MAX_LINES} == {}


def test_no_paths_of_one_machine():
    pattern = re.compile(r"(?<![\w./-])/(?:work|root|home/\w+)/\w")
    found = []
    for path in house_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {match.group()}" for match in pattern.finditer(text)]
    assert found == []


def test_readme_shows_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert "make demo" in text and "make test" in text


def test_hooks_and_make_lint_are_the_same_pinned_tools():
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)(?:;.*)?$", (ROOT / "constraints.txt").read_text(), re.M))
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert local["repo"] == "local" and {hook["language"] for hook in local["hooks"]} == {"system"}
    hooks = {hook["entry"].split()[0].removeprefix(".venv/bin/") for hook in local["hooks"]}
    recipe = (ROOT / "Makefile").read_text().partition("\nlint: ")[2].partition("\n\n")[0]
    assert hooks == set(re.findall(r"\$\(BIN\)/([\w-]+)", recipe)) == {"ruff", "clang-format", "codespell", "mypy"}
    assert hooks | {"pre-commit"} <= set(pins), "a version of each stands in constraints.txt and nowhere else"


def test_versions_agree():
    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert uvg_engine.__version__ == version


def test_ci_hides_nothing():
    commands = [line for line in (ROOT / ".ci/run").read_text().splitlines() if line and not line.startswith("#")]
    assert commands == [
        "set -euo pipefail",
        'cd "$(dirname "$0")/.."',
        "export UVG_NATIVE=1",
        "make sanitize",
        "make test",
    ]


@pytest.mark.parametrize("folder", ["uvg_engine/backends", "uvg_engine/reference", "kernels"])
def test_buffers_name_their_dtype(folder):
    """A kernel writes the dtype it knows: into torch's default one, where a caller has set it to bf16, it overflows."""
    makers, bare = {"empty", "zeros", "ones", "full"}, []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in makers:
                of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
                if of_torch and not any(word.arg == "dtype" for word in node.keywords):
                    bare.append(f"{path.name}:{node.lineno}")
    assert not bare
