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

ONE_IMPORTER = {                                # library -> the modules that may import it
    "hydra": {"harness.config"},
    "omegaconf": {"harness.config"},
    "ray": {"harness.schedule"},
    "mlflow": {"harness.tracking"},
    "lm_eval": {"harness.evaluators.lm_eval_tasks"},
    "fsspec": {"harness.objects"},
    "peft": {"harness.formats.peft"},
}
LEAVES = {"harness.cell", "harness.errors", "harness.events"}
MAY_IMPORT = {                                  # module or package -> the parts of the harness that it may import
    "harness.cell": set(),
    "harness.errors": set(),
    "harness.events": set(),
    "harness.sweep": {"harness.cell"},
    "harness.plugins": {"harness.errors"},
    "harness.files": LEAVES,
    "harness.objects": LEAVES | {"harness.files"},
    "harness.store": LEAVES | {"harness.files", "harness.objects"},
    "harness.naming": {"harness.cell"},
    "harness.statistics": LEAVES | {"harness.store"},
    "harness.flips": LEAVES | {"harness.store"},
    "harness.published": LEAVES,
    "harness.tables": LEAVES | {
        "harness.sweep", "harness.store", "harness.statistics", "harness.plugins", "harness.published", "harness.naming",
        "harness.flips",
    },
    "harness.plots": LEAVES | {
        "harness.sweep", "harness.store", "harness.statistics", "harness.tables", "harness.plugins", "harness.naming",
    },
    "harness.numerics": LEAVES | {"harness.numerics"},
    "harness.methods": LEAVES | {"harness.numerics", "harness.methods.protocols"},
}
WITHOUT_TORCH = [
    "cell", "errors", "events", "sweep", "plugins", "sources", "store", "tracking", "tables", "plots", "published", "statistics",
    "naming", "findings", "flips", "config", "__main__",
]


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
    importers = {name for name, path in MODULES.items() if any(i.split(".")[0] == library for i in imports(path))}
    assert importers <= ONE_IMPORTER[library]
    assert importers, f"nothing imports {library}: the rule has lost its subject"


def test_imports_point_one_way() -> None:
    wrong = []
    for name, path in MODULES.items():
        rule = next((allowed for part, allowed in MAY_IMPORT.items() if name == part or name.startswith(part + ".")), None)
        if rule is None:
            continue
        for imported in imports(path):
            own = imported in MODULES and imported != "harness"
            if own and imported != name and not any(imported == a or imported.startswith(a + ".") for a in rule):
                wrong.append(f"{name} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_no_plugin_imports_a_plugin() -> None:
    from harness import plugins

    found = {f"harness.{folder}.{name}" for kind, (folder, _) in plugins.KINDS.items() for name in plugins.find(kind)}
    wrong = [
        f"{name} imports {imported}" for name in sorted(found) for imported in imports(MODULES[name])
        if imported in found and imported != name
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_loads_without_torch(module: str) -> None:
    code = f"import sys, harness.{module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0, f"harness.{module} imports torch"


def test_the_package_face_loads_without_torch() -> None:
    code = "import sys, harness; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_kernel_packages_need_only_torch_and_transformers() -> None:
    """numerics, streaming, methods, models, formats, runtime and evaluators run where only torch and transformers are installed."""
    allowed = {"torch", "transformers", "safetensors", "numpy", "tokenizers", "harness"} | set(sys.stdlib_module_names)
    optional = {
        "harness.evaluators.lm_eval_tasks", "harness.formats.compressed_tensors", "harness.formats.peft",
        "harness.evaluators.tasks.summaries", "harness.evaluators.tasks.translations",      # functions of lm-eval's task files
        "harness.runtime.placement",                            # accelerate, and only where a model exceeds one device
    }
    packages = ("numerics", "streaming", "methods", "models", "formats", "runtime", "evaluators")
    wrong = [
        f"{name} imports {imported}"
        for name, path in MODULES.items()
        if name.split(".")[1:2] and name.split(".")[1] in packages and name not in optional
        and not name.startswith("harness.evaluators.tasks.")        # functions that task YAMLs name: lm-eval loads them
        for imported in imports(path)
        if imported.split(".")[0] not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_the_walk_over_blocks_exists_once() -> None:
    """Only the pass touches a family's blocks in order: no method walks a model."""
    walkers = {name for name, path in MODULES.items() if "def run_pass" in path.read_text(encoding="utf-8")}
    assert walkers == {"harness.streaming.passes"}
    for name, path in MODULES.items():
        if name.startswith("harness.methods."):
            assert "named_modules()" not in path.read_text(encoding="utf-8"), f"{name} walks a model"


def test_nothing_is_unpickled() -> None:
    for name, path in MODULES.items():
        text = path.read_text(encoding="utf-8")
        assert not imports(path) & {"pickle", "dill", "joblib", "shelve"}, name
        assert "torch.load(" not in text, name
        assert "trust_remote_code=True" not in text, name


def test_no_catch_all_modules() -> None:
    names = {path.stem for path in MODULES.values()}
    assert not names & {"utils", "util", "common", "helpers", "misc"}


@pytest.mark.parametrize("slot,folder", [("transform", "transform"), ("rounding", "rounding"), ("tuning", "tuning")])
def test_a_method_is_a_file_and_its_yaml(slot: str, folder: str) -> None:
    from harness import plugins

    configured = {path.stem for path in (ROOT / "conf" / folder).glob("*.yaml")}
    assert configured == set(plugins.find(slot))


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
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node):
                bare.append(f"{name}.{node.name}")
    assert not bare, "\n".join(bare)
