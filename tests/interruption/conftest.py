"""Runs in children that may be killed; see ``interrupted``."""

import shutil

import pytest

from tests.helpers.interrupted import end_the_rest, ended, recipe_for, result, train_in_child, train_in_two, warmed_up


@pytest.fixture(autouse=True)
def no_child_outlives_its_test():
    yield
    end_the_rest()


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def warm(domains_folder, openclip_name, shared_cache, tmp_path_factory):
    """Called first thing in a child."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISAM_PEFT_CACHE", str(shared_cache))
        return warmed_up(recipe_for(domains_folder, openclip_name, tmp_path_factory.mktemp("warm")))


@pytest.fixture
def make_recipe(domains_folder, openclip_name, tmp_path, monkeypatch, shared_cache, own_cache):
    """Recipes for tiny runs, with one cache for all of them: what changes is given as ``train={"steps": 3}``."""
    monkeypatch.setenv("DISAM_PEFT_CACHE", str(shared_cache))
    return lambda **changes: recipe_for(domains_folder, openclip_name, tmp_path / "runs", **changes)


@pytest.fixture
def start(warm):
    """Train in a child, after ``before()``: its pid."""

    def train(recipe, *before, resume=True):
        return train_in_child(recipe, before=lambda: [action() for action in (warm, *before)], resume=resume)

    return train


@pytest.fixture
def start_two(warm):
    """Train in two children, after ``before(rank)``: their pids."""

    def train(recipe, before=lambda rank: None):
        return train_in_two(recipe, before=lambda rank: (warm(), before(rank)))

    return train


@pytest.fixture
def finished(make_recipe, start):
    """What a run leaves that nobody interrupts; its folder is free again."""

    def files(begin=None, /, **changes):
        recipe = make_recipe(**changes)
        pids = (begin or start)(recipe)
        assert {ended(pid) for pid in ([pids] if isinstance(pids, int) else pids)} == {0}
        found = result(recipe)
        assert {"adapter/adapter_model.safetensors", "results.json", "metrics.jsonl"} <= set(found)
        shutil.rmtree(recipe.output)
        return found

    return files
