"""Texts for others name files, but not the folders of the machine."""

from __future__ import annotations

import pytest

from ray_soup.recipe import dump_recipe, make_recipe
from ray_soup.soups.report.paths import shortener


@pytest.mark.parametrize(
    ("zoo", "fit", "found"),
    [
        ("/mnt/shared/zoo", "/mnt/shared/data/fit.npz", ("zoo/*.pt", "data/fit.npz")),
        ("/home/ann/zoo", "/home/ann/data/fit.npz", ("zoo/*.pt", "data/fit.npz")),
        ("/home/ann/zoo", "/home/bob/fit.npz", ("*.pt", "fit.npz")),  # below /home their names would come first
        ("/scratch/zoo", "/home/ann/fit.npz", ("*.pt", "fit.npz")),
        ("s3://bucket/zoo", "/home/ann/fit.npz", ("s3://bucket/zoo/*.pt", "fit.npz")),
    ],
)
def test_paths_lose_the_folders_that_the_recipe_names(
    zoo: str, fit: str, found: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    recipe = make_recipe({"model": "a:b", "ingredients": f"{zoo}/*.pt", "data": {"fit": fit}})
    shorten = shortener(recipe)
    text = shorten(dump_recipe(recipe))
    assert f"ingredients: {found[0]}\n" in text
    assert f"fit: {found[1]}\n" in text
    assert shorten("of /home/ann: see /home/anna") == "of ~: see /home/anna"


def test_folders_within_other_paths_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/root")
    recipe = make_recipe({"model": "timm:vit?pretrained=/data/start.pt", "ingredients": "/data/zoo/*.pt"})
    shorten = shortener(recipe)
    for kept in ("s3://bucket/data/test.npz", "s3://data/zoo", "/mnt/data/a", "./data/a", "s3://bucket/root/a", "a-b/root"):
        assert shorten(kept) == kept
    assert shorten("'/data/a' (/data/b) timm:/data/c x=/data/d file:///data/e") == "'a' (b) timm:c x=d file://e"
    assert shorten("/root/a:/root file:///root/b") == "~/a:~ file://~/b"
