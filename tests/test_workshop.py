"""Files for contributors and releases: what they name exists, and CI runs what .ci/run runs."""

import json
import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TARGETS = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
PAGES = ["CONTRIBUTING.md", "CODE_OF_CONDUCT.md", "GOVERNANCE.md", "SECURITY.md", ".github/PULL_REQUEST_TEMPLATE.md"]


def load(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def steps(workflow):
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_ci_runs_what_every_change_must_pass_on_the_supported_versions():
    workflow = load(GITHUB / "workflows" / "ci.yml")
    words = "\n".join(step.get("run", "") for step in steps(workflow))
    required = re.findall(r"^make ([a-z-]+)", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert {"lint", "test", "docs"} <= set(required)
    assert set(required) <= set(re.findall(r"\bmake ([a-z-]+)", words)) <= TARGETS
    stated = [c.split(" :: ")[-1] for c in PROJECT["classifiers"] if re.fullmatch(r".* :: 3\.\d+", c)]
    for job in ("test", "wheel"):
        assert workflow["jobs"][job]["strategy"]["matrix"]["python"] == stated
    for name in re.findall(r"constraints[\w-]*\.txt", words):
        assert (ROOT / name).is_file()
    assert set(re.findall(r"\+experiment=(\w+)", words)) <= {path.stem for path in (ROOT / "conf/experiment").iterdir()}


def test_a_release_needs_no_password_and_checks_its_version(tmp_path):
    workflow = load(GITHUB / "workflows" / "release.yml")
    publish = workflow["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["needs"] == "build"
    assert publish["steps"][-1]["uses"].startswith("pypa/gh-action-pypi-publish@")
    assert "secrets." not in (GITHUB / "workflows" / "release.yml").read_text(encoding="utf-8")
    # The check of the tag, on a changelog in which the version has a date and on the one of a version in progress.
    check = ["bash", "-e", "-c", steps(workflow)[2]["run"]]
    dated = f"## [{PROJECT['version']}] - 2026-12-01\n"
    for tag, changelog, code in (
        (f"v{PROJECT['version']}", dated, 0),
        (f"v{PROJECT['version']}", f"## [{PROJECT['version']}] - unreleased\n", 1),
        ("v9.9.9", dated, 1),
    ):
        (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        (tmp_path / "CHANGELOG.md").write_text(changelog)
        assert subprocess.run(check, cwd=tmp_path, env=os.environ | {"GITHUB_REF_NAME": tag}).returncode == code


@pytest.mark.parametrize("path", sorted((GITHUB / "ISSUE_TEMPLATE").glob("[!c]*.yml")), ids=lambda path: path.stem)
def test_issue_forms_have_what_github_requires(path):
    form = load(path)
    assert {"name", "description", "body"} <= set(form)
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids)
    assert all(field["type"] == "textarea" and field["attributes"]["label"] for field in form["body"])
    assert any(field.get("validations", {}).get("required") for field in form["body"])


def test_hooks_are_the_programs_of_the_environment():
    local = next(repo for repo in load(ROOT / ".pre-commit-config.yaml")["repos"] if repo["repo"] == "local")
    programs = {hook["entry"].split()[0].removeprefix(".venv/bin/") for hook in local["hooks"]}
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert programs == {"ruff", "mypy"}
    assert all(re.search(rf"^{program}==", pinned, flags=re.MULTILINE) for program in programs)


def test_the_images_are_made_of_what_exists():
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    instructions = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    stages = [words.split(" AS ")[1] for name, words in instructions if name == "FROM" and " AS " in words]
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for words in (shlex.split(words) for name, words in instructions if name == "COPY"):
        if words[0].startswith("--from="):
            assert words[0].removeprefix("--from=") in stages
            continue
        for source in words[:-1]:
            assert (ROOT / source).exists(), source
            assert f"!{source}" in ignored
    arguments = dict(words.split("=") for name, words in instructions if name == "ARG")
    assert set(arguments["EXTRAS"].split(",")) <= set(PROJECT["optional-dependencies"])
    assert f"Programming Language :: Python :: {arguments['PYTHON']}" in PROJECT["classifiers"]
    entry = next(json.loads(words) for name, words in instructions if name == "ENTRYPOINT")
    assert entry[0] in PROJECT["scripts"]
    assert "USER" in {name for name, _ in instructions}


def test_the_devcontainer_makes_the_environment():
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))
    assert "make .venv/installed" in container["postCreateCommand"]
    assert f"Python :: {container['image'].rpartition(':')[2]}" in " ".join(PROJECT["classifiers"])


@pytest.mark.parametrize("page", PAGES)
def test_what_the_pages_name_exists(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    files = re.findall(r"`((?:tests|src|examples|experiments|conf|docs|\.github)/[\w/.-]*)`", text)
    files += re.findall(r"\b[A-Z_]{6,}\.md\b", text) + re.findall(r"\btests/[\w/.]*\w", text)
    assert not [name for name in [*links, *files] if not (ROOT / name).exists()]
    assert set(re.findall(r"`?\bmake ([a-z-]+)\b(?=[`  ]|$)", text)) <= TARGETS
    menus = {path.stem for path in (ROOT / "conf" / "debug").glob("*.yaml")}
    assert set(re.findall(r"\+debug=(\w+)", text)) <= menus
