"""The arrows of the design, read from the code: who may import whom, and that importing does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import reslab

PACKAGE = Path(reslab.__file__).parent
LEAVES = {"download", "errors", "host", "interval", "keras_backend", "run", "seeds", "tensors"}
NETWORK = {"spec", "layout", "family", "receptive"}
MAY_IMPORT = {
    "download": {"errors", "host"},
    "errors": set(),
    "host": set(),
    "interval": set(),
    "keras_backend": {"errors", "host"},
    "run": {"errors"},
    "seeds": set(),
    "tensors": {"errors", "run"},
    "spec": {"errors", "layout"},  # only when layers are asked for
    "layout": {"spec"},
    "family": {"errors", "spec"},
    "receptive": {"layout", "spec"},
    "catalogue": {"errors"} | NETWORK,
    "nets": LEAVES | NETWORK,
    "data": {"download", "errors", "host", "keras_backend", "run"},  # run: for writing whole
    "limits": {"errors"},
    "cluster": {"errors"},
    "use": LEAVES | NETWORK | {"nets", "data", "cluster"},
    "serve": LEAVES | NETWORK | {"data", "use", "__init__"},
    "train": LEAVES | NETWORK | {"catalogue", "nets", "data"},  # of the catalogue, the arithmetic of memory
    "report": LEAVES | {"study"},  # what a study works out of its records
    "study": LEAVES | NETWORK | {"__init__", "nets", "data", "train"},
    "studies": LEAVES | NETWORK | {"__init__", "cluster", "data", "limits", "study", "report", "use"},
    "describe": LEAVES | NETWORK | {"data", "limits", "train"},
    "resume": LEAVES | NETWORK | {"train"},
    "job": LEAVES | NETWORK | {"limits", "nets", "data", "train", "use", "report", "describe", "resume"},
    "terminal": {"data", "errors", "run"},
    "cli": LEAVES | NETWORK | {"catalogue", "nets", "data", "train", "use", "serve", "report", "job", "study", "studies", "terminal", "__init__"},
}
STANDARD_ONLY = [PACKAGE / f"{name}.py" for name in ("spec", "layout", "family", "receptive", "errors")] + sorted((PACKAGE / "catalogue").glob("*.py"))


def _typed(*tokens: str) -> str:
    """Code that does what a typed command does."""
    return f"import contextlib\nfrom reslab.cli import main\nwith contextlib.suppress(SystemExit): main({list(tokens)})"


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path}: imports are written out, so that they are seen here"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names if node.module == "reslab"}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(path: Path) -> None:
    here = room(path)
    if here in ("__init__", "__main__"):
        return
    rooms = {name.split(".")[1] for name in imports(path) if name.startswith("reslab.")}
    rooms = {"__init__" if name == "__version__" else name for name in rooms}
    assert rooms - {here} <= MAY_IMPORT[here]


@pytest.mark.parametrize("path", STANDARD_ONLY, ids=lambda p: p.stem)
def test_specs_and_what_is_told_of_them_need_the_standard_library_only(path: Path) -> None:
    outside = {module.split(".")[0] for module in imports(path)} - {"reslab"}
    assert outside <= sys.stdlib_module_names


HEAVY = ("torch", "keras", "numpy", "scipy", "sklearn", "matplotlib", "PIL", "cattrs", "jinja2", "tomli_w", "asyncio", "markdown_it")


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        ("import reslab; reslab.spec('resnet50').cost()", (*HEAVY, "cyclopts", "rich")),
        (_typed("models"), (*HEAVY, "rich")),
        (_typed("show", "resnet1202"), (*HEAVY, "rich")),
        (_typed("--help"), HEAVY),
    ],
    ids=["import reslab", "reslab models", "reslab show", "reslab --help"],
)
def test_nothing_slow_is_loaded_before_it_is_used(code: str, unwanted: tuple[str, ...]) -> None:
    """What keeps these under 0.3 s, without a clock: benchmarks/startup.py has one."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print([m for m in {unwanted} if m in sys.modules])"], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_public_names_are_these_and_all_load() -> None:
    assert set(reslab.__all__) == {
        "FAMILY", "RECIPES", "CallError", "Classifier", "Cost", "Prediction", "Recipe", "Spec", "WorkError", "build", "load", "load_weights",
        "save_weights", "spec", "train",
    }  # fmt: skip
    for name in reslab.__all__:
        assert getattr(reslab, name).__doc__ or name in ("FAMILY", "RECIPES")


def test_functions_are_not_hidden_by_modules_of_the_same_name() -> None:
    code = "import reslab, reslab.train.recipe, reslab.spec, reslab.train.fit; assert callable(reslab.train) and callable(reslab.spec); print('ok')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "ok\n"


def test_no_file_writes_a_pickle() -> None:
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text("utf-8")
        assert "torch.save(" not in text.replace("safetensors.torch.save(", ""), path
        assert "pickle.dump" not in text, path
        assert "torch.load(" not in text or "weights_only=True" in text, path


def test_devices_are_chosen_in_one_place() -> None:
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text("utf-8")
        assert ".cuda()" not in text, path
        assert "torch.cuda." not in text or path.name in ("hardware.py", "recording.py"), path  # recordings: of training and of predicting


def test_version_is_the_packages() -> None:
    from importlib.metadata import version

    assert reslab.__version__ == version("reslab")
