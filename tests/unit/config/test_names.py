"""Folders for names that anybody chose: safe, reversible, and what they always were for ordinary names."""

from __future__ import annotations

from pathlib import Path, PureWindowsPath

import pytest

from disam_peft.config.names import MAX_BYTES, OURS, folder_name, name_of_folder, same_but_for_case
from disam_peft.config.recipe import Recipe, load_recipe
from disam_peft.errors import UserError

ORDINARY = [
    *("photo", "art_painting", "Real World", "clipart-v2.1", "0", "2009", "1e3", "0.0", "true", "null", "50%", "%"),
    *("100%a", "sketch (bw)", "草图", "رسم", "🎨", "naïve", "all", "mean", "worst", "pooled", "console", "common"),
    *("a" * MAX_BYTES, "-x", "_", "#1", "a..b", "~", "$HOME", "a'b", "é" * 100),
]
HOSTILE = [
    *(".", "..", "...", "../../../evil", "a/b", "a\\b", "/etc/passwd", "\\\\host\\share", "C:", "C:evil", "c:\\x"),
    *("a\0b", "\0", "a\nb", "\r", "\t", "\x1b[31mred", "\x7f", "a\u2028b", "a ", " ", "a.", ".hidden", ".photo.lock"),
    *("a*b", "what?", 'say "x"', "<a>", "a|b", "%2F", "%2E%2E", "%252F", "%%2F", "%2%2F", "a%41", "CON", "con", "Nul"),
    *("aux.txt", "COM1", "lpt9.tar.gz", "com¹", "CONIN$", "con ", "nul .txt", "sweep-photo.json", "Sweep-x.JSON"),
    *("/" * 66, *sorted(OURS), *(name.upper() for name in sorted(OURS))),
]
TOO_LONG = ["a" * (MAX_BYTES + 1), "é" * 101, "/" * 67, "草" * 67, "x" * 100_000]


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_names_keep_the_folder_they_had(name: str) -> None:
    assert folder_name(name) == name
    assert name_of_folder(name) == name


@pytest.mark.parametrize("name", HOSTILE)
def test_row_47_every_name_has_one_safe_folder_and_is_read_back_from_it(name: str, tmp_path: Path) -> None:
    folder = folder_name(name)

    assert name_of_folder(folder) == name
    assert (tmp_path / "NAME" / folder).resolve().parent == tmp_path / "NAME"
    inside = PureWindowsPath("D:/runs/NAME") / folder
    assert inside.parent == PureWindowsPath("D:/runs/NAME") and not inside.is_reserved()
    assert not folder.startswith(".") and folder.isprintable() and folder.rstrip(". ") == folder
    assert folder.lower() not in OURS
    (tmp_path / folder).mkdir()  # this system takes it


def test_row_47_two_names_never_share_a_folder() -> None:
    folders = [folder_name(name) for name in {*ORDINARY, *HOSTILE}]

    assert len(set(folders)) == len(folders)
    assert {name_of_folder(folder) for folder in folders} == {*ORDINARY, *HOSTILE}


@pytest.mark.parametrize("name", [*TOO_LONG, "", "half \ud800 a pair"])
def test_row_47_what_cannot_be_a_folder_is_an_error_that_shows_its_beginning(name: str) -> None:
    with pytest.raises(UserError) as caught:
        folder_name(name)

    assert len(str(caught.value)) < 300
    assert name[:60].encode("utf-8", "backslashreplace").decode()[:20] in str(caught.value) or not name


@pytest.mark.parametrize("folder", ["%FF", "%C3", "a%2", "plain", "%61", "%2e", "%"])
def test_row_47_a_folder_that_was_made_otherwise_is_its_own_name(folder: str) -> None:
    assert name_of_folder(folder) == folder


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "name: try\nbackbone: {name: demo}\nadapter: {kind: lora}\ndata: {root: images}\nprotocol: {held_out: photo}\n"
    )
    return path


def test_row_47_a_run_lies_in_its_own_folder_whatever_its_domain_is_called(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)

    assert recipe.folder("photo") == Path("runs/try/photo")
    assert recipe.folder("../../../evil") == Path("runs/try/%2E.%2F..%2F..%2Fevil")
    assert recipe.folder("checkpoints") == Path("runs/try/%63heckpoints")
    assert [name_of_folder(recipe.folder(name).name) for name in HOSTILE] == HOSTILE


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("..", "'..' means another folder; choose another name"),
        (".", "means another folder"),
        ("con", "is the name of a device on Windows"),
        ("checkpoints", "is the name of a file or folder that every run has"),
        ("all_domains", "is the name of a file or folder that every run has"),
        (".hidden", "has characters that the name of a folder cannot have on every system"),
        ("x" * 201, "at most 200 are possible"),
        ("a/b", "pattern"),
        ("try\n", "pattern"),
    ],
)
def test_row_47_a_run_whose_name_is_no_folder_is_a_mistake_of_the_recipe(
    name: str, reason: str, recipe_file: Path
) -> None:
    values = load_recipe(recipe_file).model_dump(mode="json", exclude_none=True, exclude_unset=True)

    with pytest.raises(ValueError, match="name") as caught:
        Recipe.model_validate({**values, "name": name})

    assert reason in str(caught.value)


def test_row_48_names_that_differ_in_case_or_space_only_are_found() -> None:
    names = ["photo", "Photo", "sketch", "photo ", "art  painting", "art painting", "é", "e\u0301", "straße", "STRASSE"]

    assert same_but_for_case(names) == [
        ["photo", "Photo", "photo "],
        ["art  painting", "art painting"],
        ["é", "e\u0301"],
        ["straße", "STRASSE"],
    ]
    assert same_but_for_case(["photo", "photos", "photo"]) == []
