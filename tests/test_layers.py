"""The floors: a module imports only from lower floors, or from its own folder."""

import ast
from pathlib import Path

import disam_peft

PACKAGE = Path(disam_peft.__file__).parent
FLOORS = {
    "sharpness": 0,
    "records": 0,
    "workers": 1,
    "errors": 0,
    "locking": 1,
    "config": 0,
    "progress": 0,
    "strict_yaml": 0,
    "data": 1,
    "backbones": 1,
    "adapters": 2,
    "classifier": 3,
    "frozen": 3,
    "inferred": 3,
    "objectives": 3,
    "prompts": 3,
    "training": 4,
    "evaluation": 4,
    "export": 4,
    "report": 4,
    "tables": 4,
    "shared": 4,
    "recipe": 5,
    "study": 5,
    "run_folder": 6,
    "run": 6,
    "demo": 7,
    "sweep": 7,
    "compare": 7,
    "doctor": 7,
    "cli": 8,
}
# On one floor, but one rests on the other: a classifier's frozen part, stored; domains inferred by a classifier of
# styles; a study varies a recipe; tables of the report are shown on the terminal; the error that a reader raises; a run
# in its folder.
BESIDE = {
    ("frozen", "classifier"),
    ("inferred", "classifier"),
    ("study", "recipe"),
    ("tables", "report"),
    ("strict_yaml", "errors"),
    ("run", "run_folder"),
}
# Only one place each may know a family's library.
GUARDED = {"open_clip": "backbones/openclip", "accelerate": ("training/", "run.py")}


def imports(path: Path) -> set[str]:
    """Dotted names of everything that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.name != "__init__.py")


def place(name: str) -> str:
    return name.removeprefix("disam_peft.").split(".")[0]


def test_every_module_has_a_floor():
    places = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in modules()}
    assert len(modules()) > 30
    assert places == set(FLOORS)


def test_imports_go_down():
    wrong = []
    for path in modules():
        here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for name in imports(path):
            there = place(name) if name.startswith("disam_peft.") else None
            if there in FLOORS and there != here and FLOORS[there] >= FLOORS[here] and (here, there) not in BESIDE:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not wrong


def test_the_step_knows_torch_alone():
    allowed = ("torch", "disam_peft.sharpness", "__future__")
    stdlib = ("math", "collections", "contextlib", "dataclasses", "types", "typing")
    for path in (PACKAGE / "sharpness").glob("*.py"):
        others = [name for name in imports(path) if not name.startswith(allowed + stdlib)]
        assert not others, f"{path.name} imports {others}"


def test_each_library_has_one_home():
    for library, homes in GUARDED.items():
        users = {
            str(path.relative_to(PACKAGE))
            for path in modules()
            if any(name.split(".")[0] == library for name in imports(path))
        }
        assert users, library
        assert all(user.startswith(homes) for user in users), users
