"""What a soup's folder says of what it was made of."""

import json

from disam_peft.common.soup_record import SOUP, Ingredient, SoupRecord, read_soup, soup_settings, write_soup


def ingredient(method, *, kept=True):
    return Ingredient(f"runs/{method}", f"sha of {method}", "raw", 0, kept=kept, method=method)


def test_methods_of_what_was_kept_are_said_where_they_differ(tmp_path):
    """The recipe in the folder has the method of one of them."""
    write_soup(tmp_path, SoupRecord("greedy", [ingredient("erm"), ingredient("disam"), ingredient("sam", kept=False)]))
    assert soup_settings(tmp_path)["soup"].startswith("greedy of 2 (disam and erm), ")
    write_soup(tmp_path, SoupRecord("greedy", [ingredient("erm"), ingredient("sam", kept=False)]))
    assert soup_settings(tmp_path)["soup"].startswith("greedy of 1, ")


def test_a_file_without_methods_is_read(tmp_path):
    write_soup(tmp_path, SoupRecord("uniform", [ingredient("erm"), ingredient("disam")]))
    told = json.loads((tmp_path / SOUP).read_text())
    for one in told["ingredients"]:
        del one["method"]
    (tmp_path / SOUP).write_text(json.dumps(told))
    assert [one.method for one in read_soup(tmp_path).ingredients] == ["", ""]
    assert soup_settings(tmp_path)["soup"].startswith("uniform of 2, ")
