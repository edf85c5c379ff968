"""Every public name says what it is and has its place in the API pages; the pages name what there is."""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import itertools
import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

import uvg_engine
from uvg_engine import backends
from uvg_engine.cli import app
from uvg_engine.training import Stage, TimeSampling, TrainConfig

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PACKAGES = ("ops", "backends", "model", "flow", "media", "sampling", "training", "training.data", "evaluation")
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]


def public_names(package):
    """What `__all__` lists; without one, what the module itself defines under a name of its own."""
    module = importlib.import_module(f"uvg_engine.{package}")
    if hasattr(module, "__all__"):
        return [(name, getattr(module, name)) for name in module.__all__]
    own = [(name, value) for name, value in vars(module).items() if not name.startswith("_")]
    return [(name, value) for name, value in own if getattr(value, "__module__", None) == module.__name__]


def constants_with_docstring(package):
    """Names of module level that are followed by a text of their own."""
    found = set()
    for path in (ROOT / "uvg_engine" / package.replace(".", "/")).glob("*.py"):
        body = ast.parse(path.read_text()).body
        for node, after in itertools.pairwise(body):
            told = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            found |= {target.id for target in targets if told and isinstance(target, ast.Name)}
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_has_a_docstring(package):
    assert inspect.getdoc(importlib.import_module(f"uvg_engine.{package}"))
    silent = []
    for name, value in public_names(package):
        if not (inspect.isclass(value) or inspect.isroutine(value)):
            silent += [name] if name not in constants_with_docstring(package) else []
        elif not value.__doc__ or value.__doc__.startswith(f"{name}("):  # a dataclass without one gets its signature
            silent.append(name)
        elif inspect.isclass(value):
            fields = getattr(value, "__dataclass_fields__", {})
            own = {k: v for k, v in vars(value).items() if not k.startswith("_") and k not in fields}
            methods = {k: v for k, v in own.items() if inspect.isroutine(v) or isinstance(v, property)}
            silent += [f"{name}.{k}" for k, v in methods.items() if not inspect.getdoc(v)]
    assert silent == []


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_in_the_api_pages(package):
    shown = {m for page in (DOCS / "api").glob("*.md") for m in re.findall(r"^::: (\S+)$", page.read_text(), re.M)}
    whole, folder = f"uvg_engine.{package}", ROOT / "uvg_engine" / package.replace(".", "/")
    # a function of its module's own name is hidden behind the module where the whole package is shown
    hidden = {name for name, _ in public_names(package) if (folder / f"{name}.py").exists()}
    missing = [
        name
        for name, value in public_names(package)
        if not (whole in shown and name not in hidden) and f"{getattr(value, '__module__', whole)}.{name}" not in shown
    ]
    assert missing == []


def test_the_front_door_is_part_of_the_pages():
    from uvg_engine import sampling

    assert set(uvg_engine.__all__) - {"__version__"} <= set(sampling.__all__)


def test_pages_are_in_the_navigation():
    def pages(entry):
        if isinstance(entry, str):
            return [entry]
        return [page for part in (entry if isinstance(entry, list) else entry.values()) for page in pages(part)]

    listed = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(listed) == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


def anchors(page):
    """Of a page's headings, as mkdocs and GitHub make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_are_there(page):
    targets = re.findall(r"\]\(([^)\s]+)[^)]*\)|src=\"([^\"]+)\"", page.read_text())
    local = [(a or b).partition("#") for a, b in targets if "://" not in (a or b)]
    places = [(page.parent / name if name else page, anchor) for name, _, anchor in local]
    assert [str(place) for place, _ in places if not place.exists()] == []
    assert [anchor for place, anchor in places if anchor and anchor not in anchors(place)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_there(page):
    """Modules after `python -m`, targets after `make`."""
    text = page.read_text()
    modules = re.findall(r"python -m ([\w.]*\w)(?![\w.*])", text)
    assert [name for name in modules if importlib.util.find_spec(name) is None] == []
    makefile = (ROOT / "Makefile").read_text()
    targets = [name for line in re.findall(r"`make ([a-z ]+)`", text) for name in line.split()]
    targets += re.findall(r"^(?:\$ )?make (\w+) +#", text, re.M)
    assert [name for name in targets if not re.search(rf"^{name}:", makefile, re.M)] == []


def options_of(command):
    """Of a command of `uvg` and of all below it."""
    own = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    return own.union(*(options_of(below) for below in getattr(command, "commands", {}).values()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_uvg_are_there(page):
    for line in re.findall(r"^\$ uvg ([^#\n]+)", page.read_text(), re.M):
        command, words = typer.main.get_command(app), shlex.split(line)
        while words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]
        options = {word for word in words if word.startswith("-")}
        assert not hasattr(command, "commands") and (command.name == "bench" or options <= options_of(command)), line


def test_the_command_line_page_names_options_that_are_there():
    told = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", (DOCS / "cli.md").read_text()))
    ours = options_of(typer.main.get_command(app))
    assert {"--no-ema", "--trajectory"} <= ours and told - ours == {"--quick", "--dtype", "--help"}  # bench's; click's


def test_training_page_explains_every_name():
    page = (DOCS / "training.md").read_text()
    names = [field.name for kind in (TrainConfig, Stage, TimeSampling) for field in dataclasses.fields(kind)]
    assert [name for name in names if f"`{name}`" not in page] == []


def test_design_names_every_part_of_the_house():
    page = (DOCS / "design.md").read_text()
    folders = [path.parent for path in (ROOT / "uvg_engine").glob("*/__init__.py")]
    folders += [path for path in (ROOT / "csrc").iterdir() if path.is_dir()]
    folders += [ROOT / name for name in ("kernels", "bench", "configs", "tests", "docs")]
    assert [str(path.relative_to(ROOT)) for path in folders if f"{path.relative_to(ROOT)}/" not in page] == []


def test_readme_tells_which_backend_serves_what():
    """The table of ops and backends is what the tables of the backends say."""
    lines = (ROOT / "README.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| op |"))
    columns = [re.findall(r"`(\w+)`", cell)[0] for cell in lines[start].split("|")[2:-1]]
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :])
    told = {row.split("|")[1].strip(" `"): [cell.strip() for cell in row.split("|")[2:-1]] for row in rows}

    def served(op, backend):
        kernel = backends.table(backend).get(op)
        return "-" if kernel is None else "f b" if kernel.backward else "f"

    assert set(columns) == set(backends.ORDER)
    assert told == {op: [served(op, name) for name in columns] for op in sorted(backends.table("reference"))}
