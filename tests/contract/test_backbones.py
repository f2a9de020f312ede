"""Contract of every family of backbones, on small models with random weights."""

import json
from itertools import pairwise

import numpy as np
import pytest
import timm
import torch
from networks import built, network_of, some_images
from scipy.stats import spearmanr

from anomalymatch.algorithms.layer_groups import freeze_lower_groups, layerwise_groups
from anomalymatch.backbones.architectures import _tell_size
from anomalymatch.backbones.inference import Inference
from anomalymatch.backbones.network import anomaly_logit, image_classifier
from anomalymatch.backbones.openvino import has_openvino
from anomalymatch.backbones.stages import stage_statistics
from anomalymatch.cluster import cluster
from anomalymatch.config import compose
from anomalymatch.label import open_service
from anomalymatch.run import execute
from anomalymatch.score import score

TINY = {"depth": 4, "embed_dim": 48, "num_heads": 3}
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", TINY),
    "dinov2": ("vit_small_patch14_dinov2", TINY),
    "registers": ("vit_small_patch14_reg4_dinov2", TINY),
    "dinov3": ("vit_small_patch16_dinov3", TINY),
    "registers, no class": ("vit_medium_patch16_reg4_gap_256", TINY),
    "siglip": ("vit_base_patch16_siglip_224", TINY),
    "swin": ("swin_tiny_patch4_window7_224", {"depths": [1, 1, 2, 1], "embed_dim": 24}),
    "convnext": ("test_convnext", {}),
    "resnet": ("test_resnet", {}),
    "efficientnet": ("test_efficientnet", {}),
}
"""A member of each family, and arguments that make it small."""
PREFIX = {"vit": 1, "dinov2": 1, "registers": 5, "dinov3": 5, "registers, no class": 4, "siglip": 0}
"""Tokens before those of the patches: the class token and the registers."""
QUICK = ("registers", "swin")
"""Families that are trained in every run of the tests, not only with the slow ones."""
SIZE = {"dinov2": 42, "registers": 42}
"""Sizes of the images where it is not 32."""


@pytest.fixture
def name_of(tmp_path):
    """Function that writes the description of a small member of a family and returns the name of the model."""

    def write(family):
        architecture, arguments = FAMILIES[family]
        folder = tmp_path / "models" / family
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"architecture": architecture, "model_args": arguments}))
        return f"local-dir:{folder}"

    return write


def pictures(count, size):
    """Draw smooth images of many kinds, so that their scores differ."""
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    bright = torch.linspace(0.2, 1, count).view(-1, 1, 1, 1)
    return (torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear") * bright * 255).to(torch.uint8)


@pytest.mark.parametrize("family", PREFIX)
def test_features_and_stages_of_a_transformer_are_those_of_its_tokens(name_of, family):
    size, prefix = SIZE.get(family, 32), PREFIX[family]
    backbone = built(name_of(family), image_size=size, stages=True)[1].eval()
    body, seen = backbone.body, {}
    for number, block in enumerate(body.blocks):
        block.register_forward_hook(lambda module, given, output, number=number: seen.update({number: output}))
    images = some_images(3, size=size)
    with torch.inference_mode():
        features, stages = backbone(images).split([backbone.features, backbone.stage_features], dim=1)
        pixels = backbone.normalise(images)
        tokens = body.norm(seen[3])
        if family in ("registers, no class", "siglip"):
            expected = body(pixels)
        else:
            expected = torch.cat([tokens[:, 0], tokens[:, prefix:].mean(1)], dim=1)
    side = size // body.patch_embed.patch_size[0]
    # Blocks at a quarter, half and three quarters of four: the first, the second and the third.
    maps = [seen[number][:, prefix:].transpose(1, 2).reshape(3, -1, side, side) for number in range(3)]
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(stages, stage_statistics(maps), atol=1e-5, rtol=1e-4)
    assert features.shape[1] == (48 if family in ("registers, no class", "siglip") else 96)


def test_features_are_normalised_after_pooling_where_the_model_does(name_of):
    backbone = built("eva02_tiny_patch14_224", image_size=28)[1].eval()
    body, images = backbone.body, some_images(2, size=28)
    with torch.inference_mode():
        tokens = body.forward_features(backbone.normalise(images))
        expected = torch.cat([body.fc_norm(tokens[:, 0]), body.fc_norm(tokens[:, 1:].mean(1))], dim=1)
        torch.testing.assert_close(backbone(images), expected)


def test_a_classifier_of_timm_keeps_its_logits():
    model = timm.create_model("test_vit", img_size=32, num_classes=7).eval()
    with torch.inference_mode():
        assert image_classifier(model)(some_images(2)).shape == (2, 7)


@pytest.mark.parametrize(
    ("family", "asked", "taken"),
    [
        ("dinov2", 28, 28),
        ("dinov2", 31, 28),
        ("dinov2", 36, 42),
        ("dinov2", 16, 28),  # 14 is too small
        ("vit", 84, 80),
        ("vit", 150, 144),
        ("swin", 150, 160),
        ("swin", 64, 64),
        ("resnet", 33, 33),
        ("convnext", 45, 45),
    ],
)
def test_any_size_that_the_patches_divide_else_the_nearest(name_of, family, asked, taken, caplog):
    _tell_size.cache_clear()
    name = name_of(family)
    for _ in range(2):
        spec, backbone = built(name, image_size=asked, stages=family != "swin")
    assert spec.image_size == taken
    assert backbone.eval()(some_images(2, size=taken)).isfinite().all()
    told = [record.message for record in caplog.records if "model.image_size" in record.message]
    assert len(told) == (asked != taken)
    assert all(f"is {taken}, not {asked}" in message for message in told)


def test_an_ensemble_takes_a_size_that_fits_all_its_models(name_of):
    assert built(f"{name_of('dinov2')}+{name_of('vit')}+test_resnet", image_size=100)[0].image_size == 112


@pytest.mark.parametrize("family", [*PREFIX, "swin", "convnext"])
def test_groups_learn_block_by_block_the_tokens_of_the_input_with_the_lowest(name_of, family):
    network = network_of(name_of(family), image_size=SIZE.get(family, 32))
    body = network.backbone.body
    freeze_lower_groups(body, 2)
    learning = {name for name, p in body.named_parameters() if p.requires_grad}
    assert learning
    assert not any(word in name for name in learning for word in ("cls_token", "reg_token", "pos_embed", "patch_embed"))
    freeze_lower_groups(body, None)
    rate = {id(p): group["lr_scale"] for group in layerwise_groups(network, 0.0, 0.5) for p in group["params"]}
    if family in PREFIX:
        blocks = [{rate[id(p)] for p in block.parameters()} for block in body.blocks]
        assert all(len(rates) == 1 for rates in blocks)
        order = [next(iter(rates)) for rates in blocks]
        assert [low / high for low, high in pairwise(order)] == [0.5] * 3
        stem = [rate[id(p)] for name, p in body.named_parameters() if name.startswith(("cls", "reg", "pos", "patch"))]
        assert set(stem) == {order[0] / 2}
    assert rate[id(network.head.linear.weight)] == 1.0


BACKENDS = [
    pytest.param(
        *(family, backend, precision),
        marks=[pytest.mark.slow] * (backend == "openvino" and family not in QUICK)
        + [pytest.mark.skipif(backend == "openvino" and not has_openvino(), reason="needs OpenVINO")],
    )
    for family in [*PREFIX, "swin", "convnext"]
    for backend, precision in [("torch", "bf16"), ("openvino", "fp32"), ("openvino", "bf16")]
]


@pytest.mark.parametrize(("family", "backend", "precision"), BACKENDS)
def test_every_backend_ranks_as_pytorch_does_in_single_precision(name_of, family, backend, precision):
    size = SIZE.get(family, 32)
    network = network_of(name_of(family), image_size=size).eval()
    images = pictures(200, size)
    plain = Inference("cpu", "fp32", backend="torch").prepare(network, size=size, count=1)(images)
    other = Inference("cpu", precision, backend=backend).prepare(network, size=size, count=1)(images)
    expected, got = (anomaly_logit(torch.from_numpy(rows)).numpy() for rows in (plain, other))
    assert len(np.unique(expected)) > 190
    assert spearmanr(expected, got).statistic > 0.999
    if precision == "fp32":
        np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize(
    "family", [family if family in QUICK else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]
)
def test_training_scores_groups_and_page(name_of, family, tiny_job, without_pictures, image_folder, tmp_path):
    given = [word for word in tiny_job if not word.startswith(("model.name", "al.cycles"))]
    words = [*given, "al.cycles=1", f"model.name={name_of(family)}", "model.image_size=40"]
    words += ["algorithm.learner.guard=warn", "inference.device=cpu"]
    run = tmp_path / "run"
    execute(compose(*words), run)
    archive, cache = image_folder(6), next(word for word in given if word.startswith("data.cache_dir"))
    done = score(f"run={run}", f"data.root={archive}", f"output={tmp_path / 'scores'}", cache)
    assert len((done / "scores.csv").read_text().splitlines()) == 7
    model = [word for word in words if word.startswith(("model.", "inference.", "logger"))]
    groups = ["clustering.patches.components=6", "clusters=2", "top=12", f"output={tmp_path / 'groups'}"]
    folder = cluster(f"run={run}", *groups, *model, cache)
    assert (folder / "clusters.parquet").exists()
    service = open_service(compose(f"resume={run}", name="label"), [f"resume={run}"])
    try:
        assert service.labels
        service.preparation.wait()
        assert service.preparation.status().state == "ready"
    finally:
        service.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "features"),
    [
        ("vit_tiny_patch16_224", 2 * 192),
        ("vit_small_patch14_dinov2", 2 * 384),
        ("vit_small_patch14_reg4_dinov2", 2 * 384),
        ("vit_small_patch16_dinov3", 2 * 384),
        ("vit_base_patch16_siglip_224", 768),
        ("swin_tiny_patch4_window7_224", 768),
        ("convnext_tiny", 768),
        ("resnet18", 512),
        ("tf_efficientnet_lite0", 1280),
    ],
)
def test_true_members_of_the_families(name, features):
    spec, backbone = built(name, image_size=64, stages=True)
    assert backbone.features == features
    rows = backbone.eval()(some_images(2, size=spec.image_size))
    assert rows.shape == (2, backbone.width)
    assert rows.isfinite().all()
