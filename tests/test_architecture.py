"""The rules of the architecture: who may import what, what loads without torch, and that plugins are a file and its YAML."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "harness"

ONE_IMPORTER = {  # library -> the module or the folder that may import it
    "hydra": "harness.config",
    "omegaconf": "harness.config",
    "pydantic": "harness.config.typed",
    "ray": "harness.execution.executors.ray_cluster",
    "mlflow": "harness.tracking.connection",
    "lm_eval": "harness.evaluation.evaluators.lm_eval_tasks",
    "fsspec": "harness.storage.object_store",
    "peft": "harness.quantization.formats.peft",
    "numba": "harness.quantization.numerics.compiled_columns",
    "pynvml": "harness.evaluation.meters",
}
MAY_IMPORT = {  # folder -> what of the harness it may import besides itself
    "core": (),
    "data": ("core",),
    "storage": ("core",),
    "config": ("core", "data", "storage"),
    "quantization": ("core", "data", "storage"),
    "evaluation": ("core", "data", "storage", "quantization"),
    "planning": ("core", "data", "storage", "quantization"),
    "reporting": ("core", "storage", "evaluation.statistics", "evaluation.flips"),
    "tracking": ("core", "storage", "evaluation.flips", "reporting"),
    "execution": (
        "core",
        "data",
        "storage",
        "quantization",
        "evaluation",
        "planning",
        "reporting",
        "tracking",
    ),
    "cli": (
        "core",
        "data",
        "storage",
        "config",
        "quantization",
        "evaluation",
        "planning",
        "reporting",
        "tracking",
        "execution",
    ),
}
FLOORS = (  # of quantization, from the ground: a part imports from floors below its own
    {"numerics", "models"},
    {"methods", "formats", "calibration"},
    {"inference", "export"},
    {"pipeline"},
    {"diagnosis"},
)
WITHOUT_TORCH = ("core", "storage", "reporting", "tracking", "config", "__main__")
# files of more than 700 lines, each whole on purpose
LARGE = {"harness.execution.scheduler", "harness.evaluation.evaluators.lm_eval_tasks"}


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__"), path


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at the top or inside a function; `from a import b` counts as a.b and a."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import; write the full name"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


MODULES = dict(modules())


@pytest.mark.parametrize("library", sorted(ONE_IMPORTER))
def test_one_library_one_importer(library: str) -> None:
    importers = {
        name
        for name, path in MODULES.items()
        if any(i.split(".")[0] == library for i in imports(path))
    }
    place = ONE_IMPORTER[library]
    assert all(name == place or name.startswith(f"{place}.") for name in importers), importers
    assert importers, f"nothing imports {library}: the rule has lost its subject"


def own_imports(name: str) -> set[str]:
    """Modules of the harness that a module imports; of a package only what is taken from it, not the package itself."""
    found = {
        imported
        for imported in imports(MODULES[name])
        if imported in MODULES and imported not in (name, "harness")
    }
    return {
        each
        for each in found
        if not any(other.startswith(f"{each}.") for other in found)
        and not name.startswith(f"{each}.")
    }


def test_every_folder_is_bound() -> None:
    shown = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert shown == {"__init__.py", "__main__.py", "py.typed", *MAY_IMPORT}


def test_imports_go_down_the_folders() -> None:
    wrong = []
    for name in MODULES:
        folder = name.split(".")[1] if "." in name else ""
        if folder not in MAY_IMPORT:  # the package's face and `python -m harness` see everything
            continue
        for imported in own_imports(name):
            place = imported.removeprefix("harness.")
            if not any(
                place == allowed or place.startswith(f"{allowed}.")
                for allowed in (folder, *MAY_IMPORT[folder])
            ):
                wrong.append(f"{name} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_imports_go_down_inside_quantization() -> None:
    floor = {part: number for number, parts in enumerate(FLOORS) for part in parts}
    wrong = []
    for name in MODULES:
        if not name.startswith("harness.quantization."):
            continue
        part = name.split(".")[2]
        for imported in own_imports(name):
            other = imported.split(".")[2] if imported.startswith("harness.quantization.") else part
            if other != part and floor[other] >= floor[part]:
                wrong.append(f"{name} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_no_import_goes_in_a_circle() -> None:
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for imported in own_imports(name):
                walk(imported, (*path, name))
            done.add(name)

    for name in MODULES:
        walk(name, ())


def test_files_are_short_enough_to_read() -> None:
    long = {
        name
        for name, path in MODULES.items()
        if len(path.read_text(encoding="utf-8").splitlines()) > 700
    }
    assert long <= LARGE


def test_no_plugin_imports_a_plugin() -> None:
    from harness.core import plugins

    paths = {facts.path for kind in plugins.KINDS for facts in plugins.find(kind).values()}
    found = {name for name, path in MODULES.items() if path in paths}
    assert len(found) > 40, "the rule has lost its subject"
    wrong = [
        f"{name} imports {imported}"
        for name in sorted(found)
        for imported in imports(MODULES[name])
        if imported in found and imported != name
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", WITHOUT_TORCH)
def test_loads_without_torch(folder: str) -> None:
    """Tables, status and completion are instant on any laptop."""
    names = [name for name in MODULES if name.startswith(f"harness.{folder}")]
    code = f"import sys, {', '.join(names)}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0, (
        f"a module of harness/{folder}/ imports torch"
    )


def test_the_package_face_loads_without_torch() -> None:
    code = "import sys, harness; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_kernel_packages_need_only_torch_and_transformers() -> None:
    """quantization/ and evaluation/ run where only torch and transformers are installed."""
    allowed = {"torch", "transformers", "safetensors", "numpy", "tokenizers", "harness"} | set(
        sys.stdlib_module_names
    )
    optional = {
        "harness.evaluation.evaluators.lm_eval_tasks",
        "harness.quantization.formats.compressed_tensors",
        "harness.quantization.formats.peft",
        "harness.quantization.numerics.compiled_columns",  # Numba; a torch loop gives the same bits without it
        "harness.evaluation.flips",
        "harness.evaluation.meters",  # pynvml, and only where it is installed
        "harness.evaluation.statistics",  # of results, where no model is
        "harness.quantization.inference.placement",  # accelerate, and only where a model exceeds one device
    }
    wrong = [
        f"{name} imports {imported}"
        for name, path in MODULES.items()
        if name.startswith(("harness.quantization.", "harness.evaluation."))
        and name not in optional
        and not name.startswith(
            "harness.evaluation.tasks."
        )  # functions that task YAMLs name: lm-eval loads them
        for imported in imports(path)
        if imported.split(".")[0] not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_the_walk_over_blocks_exists_once() -> None:
    """Only the pass touches a family's blocks in order: no method walks a model."""
    walkers = {
        name for name, path in MODULES.items() if "def run_pass" in path.read_text(encoding="utf-8")
    }
    assert walkers == {"harness.quantization.pipeline.passes"}
    for name, path in MODULES.items():
        if name.startswith("harness.quantization.methods."):
            assert "named_modules()" not in path.read_text(encoding="utf-8"), (
                f"{name} walks a model"
            )


def test_nothing_is_unpickled() -> None:
    for name, path in MODULES.items():
        text = path.read_text(encoding="utf-8")
        assert not imports(path) & {"pickle", "dill", "joblib", "shelve"}, name
        assert "torch.load(" not in text, name
        assert "trust_remote_code=True" not in text, name


def test_no_catch_all_modules() -> None:
    names = {path.stem for path in MODULES.values()}
    assert not names & {"utils", "util", "common", "helpers", "misc"}


@pytest.mark.parametrize("slot", ["reduction", "transform", "rounding", "tuning"])
def test_a_method_is_a_file_and_its_yaml(slot: str) -> None:
    from harness.core import plugins

    configured = {path.stem for path in (ROOT / "conf" / slot).glob("*.yaml")}
    assert configured == set(plugins.find(slot))


def test_the_tree_of_the_readme_is_the_tree_of_the_folders() -> None:
    """Every path of README's tree exists, and it shows every folder of harness/ with a remark."""
    shown = readme_tree()
    assert len(shown) > 40, "the rule has lost its subject"
    missing = [
        path
        for path in shown
        if not ((ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file())
    ]
    assert not missing, f"README's tree shows what is not there: {missing}"
    folders = {
        f"{folder.relative_to(ROOT).as_posix()}/"
        for folder in PACKAGE.rglob("*")
        if folder.is_dir() and folder.name != "__pycache__" and any(folder.glob("*.*"))
    }
    assert not folders - set(shown), f"README's tree lacks {sorted(folders - set(shown))}"
    bare = [path for path, remark in shown.items() if not remark and path != "harness/"]
    assert not bare, f"README's tree has no remark on {bare}"


def readme_tree() -> dict[str, str]:
    """path -> remark of the tree that README draws: one path per line, two spaces deeper for what lies in a folder."""
    block = (ROOT / "README.md").read_text(encoding="utf-8").split("## The tree\n\n```\n")[1]
    shown: dict[str, str] = {}
    parents: list[str] = []
    for line in block.split("```")[0].splitlines():
        name, _, remark = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        parents = [*parents[:depth], name]
        shown["".join(parents)] = remark.strip()
    return shown


def test_markdown_links_resolve() -> None:
    import re

    broken = []
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not target.startswith(("http", "mailto:")) and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken, "\n".join(broken)


def test_public_functions_are_documented() -> None:
    bare = []
    for name, path in MODULES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if path.read_text(encoding="utf-8").strip() and not ast.get_docstring(tree):
            bare.append(f"{name}: no module docstring")
        for node in tree.body:
            if (
                isinstance(node, ast.FunctionDef | ast.ClassDef)
                and not node.name.startswith("_")
                and not ast.get_docstring(node)
            ):
                bare.append(f"{name}.{node.name}")
    assert not bare, "\n".join(bare)
