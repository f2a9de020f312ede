"""Tests of the reference that is made from the comments in conf/."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from anomalymatch.config import compose_partly
from anomalymatch.help import config_folders, describe_keys, file_comments

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """All generated pages, by their path below `reference`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs" / "_ext"))
        import generated_reference

        folder = tmp_path_factory.mktemp("docs")
        (folder / "reference").mkdir()
        generated_reference.write_pages(SimpleNamespace(srcdir=folder))
        sys.modules.pop("generated_reference")
        files = (folder / "reference").rglob("*.md")
        yield {str(path.relative_to(folder / "reference")): path.read_text(encoding="utf-8") for path in files}


def test_every_key_has_a_type_a_default_and_a_meaning(pages):
    keys = [entry for text in pages.values() for entry in re.findall(r"^(`.*)\n:(.*)\n", text, flags=re.MULTILINE)]
    assert len(keys) > 500
    assert [key for key, text in keys if not text.strip()] == []
    assert ("`al.cycles` = `3` (whole number)", " trainings; the oracle labels between two of them") in keys


def test_every_group_of_the_configuration_has_a_page(pages):
    groups = {path.parent.relative_to(CONF) for path in CONF.rglob("*.yaml")}
    for group in groups - {Path("."), Path("base"), Path("sweep")}:
        text = pages[f"configuration/{'-'.join(group.parts)}.md"]
        for path in (CONF / group).glob("*.yaml"):
            assert f"\n## {path.stem}\n" in text
    index = pages["configuration.md"]
    listed = {f"{line}.md" for line in index.splitlines() if line.startswith("configuration/")}
    assert listed == {page for page in pages if page.startswith("configuration/")}


def test_comments_follow_the_files_that_a_file_includes(tmp_path):
    (tmp_path / "menu").mkdir()
    (tmp_path / "menu" / "first.yaml").write_text("# Head\na: 1 # one\nb: 2 # two\n  # and more\n")
    (tmp_path / "menu" / "second.yaml").write_text(
        "defaults:\n  - first\n  - first@inner\n  - /menu@chosen: first\n  - _self_\na: 3 # three\nb: 4\n"
    )
    texts = dict(file_comments([tmp_path], "menu/second"))
    assert texts == {
        "a": "three", "b": "two and more", "inner.a": "one", "inner.b": "two and more", "chosen.a": "one",
        "chosen.b": "two and more",
    }  # fmt: skip


def test_a_key_that_follows_another_one_has_its_text():
    keys = {key.name: key for key in describe_keys(compose_partly([]), config_folders(None), "config")}
    assert keys["algorithm.learner.batch.iterations"].text == keys["trainer.iterations"].text != ""
    assert (keys["stretch.fit"].value, keys["stretch.fit"].default) == ("stretch", "${dataset.fit}")
    assert "algorithm.name" not in keys
    assert "model.name" in keys


@pytest.mark.parametrize("name", ["results", "benchmarks", "how-it-finds"])
def test_the_figures_of_a_page_stand_in_the_notebook(name):
    """A table that is measured again leaves no old figure behind."""
    notebook = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"https?://\S+", "", (ROOT / "docs" / "explanation" / f"{name}.md").read_text(encoding="utf-8"))
    figures = set(re.findall(r"\d[\d,]*\.\d+(?: ± \d+\.\d+)?", text))
    assert figures
    assert sorted(figure for figure in figures if figure not in notebook) == []
