"""A run folder from a stranger is data: every command opens it without running code of its configuration."""

import pickle
import shutil
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import anomalymatch as am
from anomalymatch import cluster, score
from anomalymatch.algorithms.base import WEIGHTS
from anomalymatch.build_images import build
from anomalymatch.config import check_same_run, compose, config_folder, resumed
from anomalymatch.data.label_log import import_csv
from anomalymatch.errors import ConfigError, StorageError
from anomalymatch.label import open_service
from anomalymatch.saved_config import MOST_BYTES, read_config, vocabulary


@pytest.fixture(scope="module")
def finished(tiny_job, tmp_path_factory):
    """A small finished run."""
    folder = tmp_path_factory.mktemp("run") / "run"
    am.run("algorithm=probe", *(w for w in tiny_job if not w.startswith("algorithm")), "al.cycles=1", folder=folder)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


class Payload:
    """Pickled, it makes the folder `made` when it is read."""

    def __init__(self, made):
        self.made = str(made)

    def __reduce__(self):
        return Path.mkdir, (Path(self.made),)


@pytest.fixture
def attacks(tmp_path):
    """Nodes that make the folder `made`, or a file of that name, when they are instantiated."""
    made, bait = tmp_path / "made", tmp_path / "bait"
    (tmp_path / "bait.pkl").write_bytes(pickle.dumps(Payload(made)))
    torch.save(Payload(made), tmp_path / "bait.pt")
    np.save(tmp_path / "bait.npy", np.array([Payload(made)], dtype=object), allow_pickle=True)
    bait.mkdir()
    (bait / "hubconf.py").write_text(f"import os\nos.mkdir({str(made)!r})\n")
    arguments = {
        "torch.load": {"f": f"{bait}.pt", "weights_only": False},
        "pandas.read_pickle": {"filepath_or_buffer": f"{bait}.pkl"},
        "joblib.load": {"filename": f"{bait}.pkl"},
        "numpy.load": {"file": f"{bait}.npy", "allow_pickle": True},
        "torch.hub.load": {"repo_or_dir": str(bait), "model": "x", "source": "local"},
        "torch.utils.collect_env.run": {"command": f"touch {made}"},
        "os.mkdir": {"path": str(made)},
        "shutil.copyfile": {"src": str(bait / "hubconf.py"), "dst": str(made)},
        "os.system": {"command": f"touch {made}"},
        "subprocess.check_output": {"args": ["touch", str(made)]},
        "builtins.exec": {"_args_": [f"open({str(made)!r}, 'w')"]},
        "logging.os.mkdir": {"path": str(made)},
        "hydra.utils.call": {"_args_": [{"_target_": "os.mkdir", "path": str(made)}]},
    }
    return {target: {"_target_": target, **values} for target, values in arguments.items()}


TARGETS = ["torch.load", "pandas.read_pickle", "joblib.load", "numpy.load", "torch.hub.load", "builtins.exec",
           "torch.utils.collect_env.run", "os.mkdir", "shutil.copyfile", "os.system", "subprocess.check_output",
           "logging.os.mkdir", "hydra.utils.call"]  # fmt: skip
PLACES = ["dataset.source", "dataset.source.storage_options.client.0.x", "algorithm.learner.probe", "logger",
          "inference", "al.strategy", "al.stopping.extra", "stretch", "trainer.lightning.callbacks",
          "clustering.grouper"]  # fmt: skip


def plant(run, place, node):
    """Put a node into the configuration of a run."""
    config = OmegaConf.load(run / "config.yaml")
    OmegaConf.update(config, place, node, merge=False, force_add=True)
    OmegaConf.save(config, run / "config.yaml")


def resume(run, *words):
    return resumed(run, compose(f"resume={run}", *words), [f"resume={run}", *words])


def label(run, *words):
    overrides = [f"resume={run}", *words]
    return open_service(compose(*overrides, name="label"), overrides)


def group(run, *words):
    return cluster.execute(compose(f"run={run}", f"output={run.parent / 'groups'}", *words, name="cluster"))


@pytest.mark.parametrize("target", TARGETS)
def test_no_command_calls_a_foreign_target(run, attacks, command, tmp_path, target):
    assert set(attacks) == set(TARGETS)
    plant(run, "dataset.source.storage_options.client", attacks[target])
    for open_run in (resume, label, group):
        with pytest.raises(StorageError, match=rf"storage_options\.client\._target_={target} .*trust=true"):
            open_run(run)
    assert target in command(f"resume={run}").error_line
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("place", PLACES)
def test_a_foreign_target_is_found_at_any_depth(run, attacks, tmp_path, place):
    plant(run, place, attacks["shutil.copyfile"])
    with pytest.raises(StorageError, match=r"_target_=shutil\.copyfile"):
        resume(run)
    plant(run, place, [{"deep": [attacks["os.mkdir"]]}])
    with pytest.raises(StorageError, match=r"_target_=os\.mkdir"):
        resume(run)
    assert not (tmp_path / "made").exists()


def test_a_trusted_folder_may_have_classes_of_the_user(run, attacks, tmp_path):
    plant(run, "algorithm.learner.probe", attacks["shutil.copyfile"])
    config = resume(run, "trust=true")
    assert not (tmp_path / "made").exists()
    build(config.algorithm.learner)
    assert (tmp_path / "made").exists()


def test_a_folder_does_not_trust_itself(run, attacks):
    plant(run, "trust", True)
    plant(run, "dataset.source.trust", True)
    config = resume(run)
    assert (config.trust, config.dataset.source.trust) == (False, False)
    assert resume(run, "trust=true").dataset.source.trust is True


def test_scoring_reads_no_configuration(run, attacks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in PLACES:
        plant(run, place, attacks["os.mkdir"])
    description = run / "cycles" / "01" / Path(WEIGHTS).with_suffix(".json")
    description.write_text(description.read_text().replace("{", '{"_target_": "os.mkdir", "path": "made", ', 1))
    (description.parent / "checksums.json").unlink()  # a stranger can write what suits
    config = compose(f"run={run}", "dataset=demo", "dataset.source.count=20", "dataset.source.size=32", name="score")
    folder, complete = score.execute(config)
    assert complete
    assert (folder / "top.csv").exists()
    assert not (tmp_path / "made").exists()


def test_labels_and_names_of_groups_stay_text(tmp_path, monkeypatch):
    """Values that a careless reader would evaluate are labels like any others, or refused."""
    monkeypatch.chdir(tmp_path)
    hostile = "__import__('os').mkdir('made')"
    names = tmp_path / "groups.csv"
    names.write_text(f'cluster,name\n0,"{hostile}"\n"{hostile}",x\n')
    with pytest.raises(am.AnomalyMatchError):
        cluster.execute(compose(f"names={names}", name="cluster"))
    labels = tmp_path / "labels.csv"
    labels.write_text(f'filename,label\na.png,"{hostile}"\n')
    with pytest.raises(am.AnomalyMatchError):
        import_csv(labels, {"a.png"})
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "value", ["${oc.env:SECRET}", "x${oc.env:SECRET}", "${first:${oc.env:SECRET},1}", "${oc.decode:'${oc.env:SECRET}'}"]
)
def test_environment_variables_are_not_read(run, monkeypatch, value):
    monkeypatch.setenv("SECRET", "secret")
    plant(run, "dataset.anomaly", value)
    for open_run in (resume, label, group, lambda run: check_same_run(run, compose())):
        with pytest.raises(StorageError, match=r"dataset\.anomaly=") as error:
            open_run(run)
        assert "=secret" not in str(error.value)


def test_references_to_other_keys_are_resolved_in_limits(run):
    plant(run, "al.budget", "${al.initial.normals}")
    assert resume(run).al.budget == 10
    for i in range(22):
        plant(run, f"data.x{i}", [f"${{data.x{i + 1}}}"] * 2)
    plant(run, "data.x22", 1)
    with pytest.raises(StorageError, match=r"data\.x\d+"):
        resume(run)


def corrupt(text):
    """Yield damaged and hostile files by name."""
    yield "invalid UTF-8", text.encode().replace(b"seed", b"\xff")
    yield "UTF-16", text.encode("utf-16")
    yield "nested lists", b"a: " + b"[" * 100_000
    yield "nested keys", b"a: " + b"{a: " * 50_000
    yield (
        "alias bomb",
        b"a: &a [x]\n" + b"".join(b"%c: &%c [%s]\n" % (i + 1, i + 1, b"*%c," % i * 9) for i in range(97, 120)),
    )
    yield "large", text.encode() + b"# " + b"a" * MOST_BYTES
    yield "interpolation", text.encode() + b'\nx: "' + b"${" * 30_000 + b'"\n'
    yield "cycle", text.encode() + b"\nx: ${y}\ny: ${x}\n"
    yield "twice", text.encode() + b"\nx: 1\nx: 2\n"
    yield "Python", text.encode() + b"\nx: !!python/object/apply:os.mkdir [made]\n"
    yield "key", text.encode() + b"\n? [a]\n: b\n"
    yield "syntax", b"a: b: c"
    yield "text", b"hello"
    yield "list", b"- a"
    yield "empty", b""
    yield "NUL", b"\0"
    yield "one section", b"dataset: {name: demo}\n"


CORRUPT = [name for name, _ in corrupt("")]


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", CORRUPT)
def test_a_damaged_configuration_is_one_sentence(run, name):
    path = run / "config.yaml"
    path.write_bytes(dict(corrupt(path.read_text()))[name])
    for open_run in (resume, label, group):
        with pytest.raises(StorageError, match=r"config\.yaml is corrupt: ") as error:
            open_run(run)
        assert len(str(error.value)) < 500
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"), [("seed", "abc"), ("seed", [1]), ("al", 5), ("al.cycles", 1.5), ("model.image_size", "big")]
)
def test_a_value_of_a_wrong_type_is_named(run, key, value):
    config = OmegaConf.load(run / "config.yaml")
    OmegaConf.update(config, key, value, merge=False)
    OmegaConf.save(config, run / "config.yaml")
    for open_run in (resume, label, group):
        with pytest.raises(StorageError, match=rf"config\.yaml is corrupt: {key}="):
            open_run(run)


@pytest.mark.slow
def test_every_choice_of_the_menus_can_be_read_back(tmp_path):
    """Whatever the program writes, it accepts."""
    groups = ("dataset", "algorithm", "stretch", "model", "oracle", "al/strategy", "al/cold_start")
    words = [[f"{group}={path.stem}" for path in (config_folder() / group).glob("*.yaml")] for group in groups]
    experiments = (path.stem for path in (config_folder() / "experiment").glob("*.yaml"))
    jobs = [[f"+experiment={name}"] for name in experiments if name != "clustering_mvtec"]
    jobs += [[word for word in together if word] for together in zip_longest(*words)]
    jobs += [["optimizer=adamw"], ["algorithm=msc", "optimizer=lion"]]
    for job in jobs:
        config = compose(*job, "data.root=photos", "model.name=x")
        OmegaConf.save(config, tmp_path / "config.yaml")
        assert resumed(tmp_path, config, []) == config, job


def test_the_vocabulary_has_no_caller_of_other_functions():
    others = {t for t in vocabulary(config_folder()).targets if not t.startswith("anomalymatch.")}
    optimisers = {"torch.optim.SGD", "torch.optim.AdamW", "timm.optim.Lion"}
    assert others == {"pytorch_lightning.Trainer", *optimisers}


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(StorageError, match=r"config\.yaml"):
        read_config(tmp_path / "config.yaml", config_folder(), trust=False)


def test_a_run_with_classes_of_the_user_can_be_continued(run, attacks):
    plant(run, "oracle.answer", {"_target_": "my.Oracle"})
    config = OmegaConf.load(run / "config.yaml")
    check_same_run(run, config)  # the same words, with the same --config-dir
    with pytest.raises(ConfigError, match="oracle"):
        check_same_run(run, OmegaConf.merge(config, {"oracle": {"answer": {"_target_": "my.Other"}}}))
