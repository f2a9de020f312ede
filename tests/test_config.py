import copy

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from anomalymatch.config import (
    CHANGEABLE_ON_RESUME,
    NULLABLE,
    check_overrides,
    check_same_run,
    compose,
    config_folder,
    resumed,
)
from anomalymatch.errors import ConfigError, StorageError

DATASETS = sorted(path.stem for path in (config_folder() / "dataset").glob("*.yaml"))
ANY = ("model=any", "model.name=convnext_tiny.fb_in1k")
WRONG = {
    "dataset=nope": "there is no dataset=nope: choose one of auto, catalogue, cifar10, demo, fits, folder",
    "algorithm=fixmach": "there is no algorithm=fixmach: choose one of fixmatch, fixmatch_reference, flexmatch, ",
    "+experiment=nope": "there is no experiment=nope: choose one of clustering_mvtec, demo_quick",
    "experiment=demo_quick": "write +experiment=demo_quick",
    "al=3": "there is no al=3: choose one of default",
    "al.cylces=3": "there is no key 'al.cylces': did you mean al.cycles?",
    "seeed=1": "there is no key 'seeed': did you mean seed?",
    "qqqq=1": "there is no key 'qqqq': see `python -m anomalymatch.run --cfg job` for all keys",
    "+foo=1": "there is no key 'foo', and none can be added there",
    "++al.foo=1": "there is no key 'al.foo', and none can be added there",
    "~al.budget": "~al.budget: a key cannot be removed",
    "~dataset": "there is no dataset=",
    "al.cycles=three": "al.cycles=three is not a whole number (the default is 3)",
    "al.cycles=1.5": "al.cycles=1.5 is not a whole number",
    "al.cycles=null": "al.cycles=None is not a whole number",
    "al.compare_probe=3": "al.compare_probe=3 is not true or false",
    "al.initial=3": "al.initial=3 is not a group of keys (set al.initial.anomalies=…)",
    "seed=[1,2]": "seed=[1, 2] is not a whole number",
    "dataset.holdout=half": "dataset.holdout=half is not a number (the default is 0.2)",
    "augment.zoom=3": "augment.zoom=3 is not a list (the default is [0.6, 1.2])",
    "log_level=3": "log_level=3 is not a word",
    "log_level=null": "log_level=None is not a word",
    "seed=0,1": "seed=0,1 gives several values: add -m to run them all",
    "foo": "'foo' cannot be understood, expected KEY=VALUE",
    "=3": "'=3' cannot be understood, expected KEY=VALUE",
    "model=any": "model.name has no default: set model.name=VALUE",
    "al.cycles=${nowhere": "cannot be understood, expected KEY=VALUE",
}


@pytest.mark.parametrize("word", WRONG)
def test_a_wrong_override_is_reported_in_one_line(word):
    with pytest.raises(ConfigError) as error:
        check_overrides([word])
    assert WRONG[word] in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "word",
    [
        *(f"{key}=null" for key in NULLABLE if not key.startswith("adapt.") and "label_column" not in key),
        "dataset.anomaly=3",
        "dataset.anomaly=[a,b]",
        "trainer.lightning.devices=auto",
        "trainer.lightning.strategy=ddp_spawn",
        "+algorithm.learner.optimizer.dampening=0.1",
        "++al.cycles=4",
        "al.budget=${seed}",
        "dataset.holdout=0",
        "hydra.run.dir=somewhere",
        "data.root=/a/b c",
    ],
)
def test_right_overrides_are_accepted(word):
    check_overrides([word], name="cluster" if word.startswith("clustering") else "config")


def test_values_of_a_sweep_are_checked_one_by_one():
    check_overrides(["seed=0,1", "algorithm=probe,fixmatch"], multirun=True)
    check_overrides(["seed=range(0,3)"], multirun=True)
    for word, wrong in (("seed=0,x", "seed=x"), ("algorithm=fixmatch,prob", "algorithm=prob")):
        with pytest.raises(ConfigError, match=wrong):
            check_overrides([word], multirun=True)


def test_a_user_folder_adds_choices(tmp_path):
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "mine.yaml").write_text("defaults: [demo, _self_]\nname: mine\n")
    check_overrides(["dataset=mine", "dataset.image_size=48"], folder=tmp_path)
    with pytest.raises(ConfigError, match="there is no dataset=mine"):
        check_overrides(["dataset=mine"])
    with pytest.raises(ConfigError, match=r"choose one of .*demo.*mine"):
        check_overrides(["dataset=other"], folder=tmp_path)


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_dataset_composes_with_all_keys(dataset):
    config = compose(f"dataset={dataset}")
    assert config.dataset.name == dataset
    assert {"anomaly", "prevalence", "holdout", "image_size", "start", "source"} <= set(config.dataset)
    assert config.model.image_size == config.dataset.image_size
    assert (config.al.initial.anomalies, config.al.initial.normals) == tuple(config.dataset.start.values())


def test_the_command_line_overrides_the_settings_of_a_dataset():
    assert compose("dataset=demo").model.crops == compose("dataset=galaxyzoo1", "model.crops=0").model.crops == 0
    assert compose("dataset=galaxyzoo1").model.crops == compose("dataset=galaxyzoo1", *ANY).model.crops == 5
    assert compose("dataset=demo").probe.orientations == 2
    assert compose("dataset=galaxyzoo1").probe.orientations == 8
    assert compose("dataset=galaxyzoo1", "probe.orientations=1").probe.orientations == 1


GALAXIES, OBJECTS, TEXTURE = "GalaxyAugmentation", "ObjectAugmentation", "TextureAugmentation"


@pytest.mark.parametrize(
    ("words", "views"),
    [
        ("dataset=demo", GALAXIES),
        ("dataset=galaxyzoo1 algorithm=flexmatch", GALAXIES),
        ("dataset=galaxymnist", GALAXIES),
        ("dataset=mvtec", TEXTURE),
        ("dataset=miniimagenet", OBJECTS),
        ("dataset=folder", OBJECTS),
        ("augment=texture dataset=galaxyzoo1", TEXTURE),
        ("dataset=galaxyzoo1 algorithm=fixmatch_reference", OBJECTS),
        ("+experiment=galaxymnist_paper", OBJECTS),
        ("algorithm=fixmatch_reference augment=galaxies", GALAXIES),
    ],
)
def test_a_dataset_chooses_its_views_the_paper_its_own_and_the_user_above_both(words, views):
    assert compose(*words.split()).augment._target_.endswith(views)


def test_datasets_with_views_of_their_own_compose_where_nothing_is_trained():
    for name in ("score", "cluster"):
        assert "augment" not in compose("dataset=galaxyzoo1", "run=any", name=name)


def test_changes_of_a_configuration_do_not_reach_the_next_one():
    first = compose()
    before = copy.deepcopy(OmegaConf.to_container(first, resolve=True))
    first.seed = 5
    first.algorithm.learner.loss.threshold = 0.1
    compose("seed=3", "al.cycles=9")
    assert OmegaConf.to_container(compose(), resolve=True) == before


def test_compose_keeps_the_hydra_state_of_a_notebook(tmp_path):
    (tmp_path / "mine.yaml").write_text("x: 1\n")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        compose("seed=3")
        with pytest.raises(ConfigError):
            compose("seed=x")
        assert hydra_compose("mine").x == 1
    assert not GlobalHydra.instance().is_initialized()
    compose()
    assert not GlobalHydra.instance().is_initialized()


# --- going on ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(compose("seed=7", "dataset=folder", "data.root=photos")))
    return tmp_path


def test_a_resumed_run_keeps_its_settings_except_the_changeable_ones(folder):
    words = ["al.cycles=9", "data.root=moved", "trainer.workers=2", "logger=none"]
    config = resumed(folder, compose(*words), [*words, f"resume={folder}"])
    assert (config.seed, config.dataset.name, config.al.cycles) == (7, "folder", 9)
    assert config.dataset.source.root == "moved"
    assert config.algorithm.learner.batch.workers == 2
    assert config.logger.none._target_.endswith(".Tracker")
    assert {"al.cycles", "data", "trainer.workers", "logger"} <= set(CHANGEABLE_ON_RESUME)


@pytest.mark.parametrize("word", ["seed=1", "dataset=demo", "al.initial.normals=3", "algorithm=probe", "al=default"])
def test_a_resumed_run_refuses_what_would_change_its_numbers(folder, word):
    with pytest.raises(ConfigError, match=f"{word} cannot change on resume: only al.cycles"):
        resumed(folder, compose(word), [word])


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [", "", None])
def test_a_missing_or_corrupt_configuration_is_reported_in_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(StorageError, match=r"config\.yaml") as error:
        resumed(tmp_path, compose(), [])
    assert "\n" not in str(error.value)


def test_a_folder_continues_only_the_same_run(folder):
    same = ("seed=7", "dataset=folder", "data.root=photos")
    check_same_run(folder, compose(*same))
    check_same_run(folder, compose(*same[:2], "data.root=moved", "data.cache_dir=elsewhere", "trainer.workers=1"))
    check_same_run(folder / "nothing", compose())
    for word, said in (("seed=8", "seed=7, not 8"), ("algorithm=probe", "algorithm")):
        with pytest.raises(ConfigError, match=f"{said}.*: choose another folder"):
            check_same_run(folder, compose(*same, word))
