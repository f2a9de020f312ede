import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file
from tiny_clip import CONTEXT, write_tiny_clip

pytest.importorskip("open_clip", reason='pip install "anomalymatch[text]"')

import open_clip

from anomalymatch.backbones import image_text
from anomalymatch.backbones.image_text import ImageTextEmbedding, ImageTextSpec
from anomalymatch.backbones.inference import Inference
from anomalymatch.errors import ConfigError, DownloadError

TEMPLATES = ("{}", "a photo of {}.", "an image with {}")


def spec(model, **changes):
    return ImageTextSpec(**{"model": model, "pretrained": None, "image_size": None, "templates": TEMPLATES} | changes)


@pytest.fixture
def name(tmp_path):
    return write_tiny_clip(tmp_path / "clip")


@pytest.fixture
def embed(tmp_path):
    def make(source, model, **changes):
        inference = Inference(device="cpu", precision="fp32", workers=1, backend="torch")
        return ImageTextEmbedding(
            spec(model, **changes), source=source, cache_dir=tmp_path / "cache", inference=inference
        )

    return make


@pytest.fixture
def offline(monkeypatch):
    def refuse():
        raise ConnectionError

    monkeypatch.setattr(image_text, "require_hub", refuse)


# --- text -------------------------------------------------------------------------------------------------------


def test_a_description_is_the_normalised_mean_of_the_normalised_prompts(name):
    model, tokens = open_clip.create_model(name).eval(), open_clip.get_tokenizer(name)
    rows = []
    for prompt in ("a ring galaxy", "a photo of a ring galaxy.", "an image with a ring galaxy"):
        with torch.no_grad():
            row = model.encode_text(tokens([prompt]))[0].numpy().astype(np.float64)
        rows.append(row / np.sqrt((row**2).sum()))
    mean = sum(rows) / 3
    np.testing.assert_allclose(spec(name).load().encode_text("a ring galaxy"), mean / np.linalg.norm(mean), atol=1e-6)


def test_braces_in_a_description_are_plain_text(name):
    loaded = spec(name, templates=["{}"]).load()
    assert not np.allclose(loaded.encode_text("{0}"), loaded.encode_text("{}"))


@pytest.mark.parametrize(("words", "is_cut"), [(1, False), (CONTEXT - 2, False), (CONTEXT - 1, True), (99, True)])
def test_a_description_beyond_the_context_is_told(name, words, is_cut):
    """Start and end of the text take one token each; the longest template counts."""
    assert spec(name, templates=["{}"]).load().is_cut("galaxy " * words) == is_cut
    assert spec(name, templates=["{}", "a photo of {}"]).load().is_cut("galaxy " * (CONTEXT - 2))


# --- images -----------------------------------------------------------------------------------------------------


def test_image_embeddings_are_those_of_open_clip(name, embed, make_source):
    source = make_source(5, unreadable=["im000003"])
    features = embed(source, name).features()
    assert [reject.id for reject in features.rejects] == ["im000003"]
    model = open_clip.create_model(name).eval()
    for id_ in features.ids:
        pixels = torch.from_numpy(source.read([id_])[0]).permute(2, 0, 1)[None] / 255
        pixels = (pixels - torch.tensor([0.3, 0.4, 0.5])[:, None, None]) / torch.tensor([0.2, 0.2, 0.3])[:, None, None]
        with torch.no_grad():
            row = model.encode_image(pixels)[0].numpy()
        np.testing.assert_allclose(features.take([id_])[0], row / np.linalg.norm(row), atol=1e-3)


def test_the_cache_holds_the_features_of_each_model(name, embed, make_source, tmp_path):
    source = make_source(6)
    first = embed(source, name).features().take(source.ids)
    reads = source.reads
    np.testing.assert_array_equal(embed(source, name, templates=["{}"]).features().take(source.ids), first)
    assert source.reads == reads
    other = write_tiny_clip(tmp_path / "other", seed=1)
    for changed in (embed(source, other), embed(source, name, image_size=48)):
        assert np.abs(changed.features().take(source.ids) - first).max() > 0.01
    assert source.reads == 3 * reads


def test_images_of_other_than_three_bands_are_grey(name, embed, make_source):
    class Grey(type(make_source(1))):
        def load(self, position):
            return super().load(position).mean(axis=2, keepdims=True).astype(np.uint8).repeat(self.channels, axis=2)

    rows = []
    for channels in (1, 3, 5):
        plain = make_source(4, channels=channels)
        plain.__class__ = Grey
        plain.load = lambda i: np.full((32, 32, 1), 20 * i, np.uint8).repeat(plain.channels, axis=2)  # noqa: B023
        plain.fingerprint = f"grey-{channels}"
        rows.append(embed(plain, name).features().take(plain.ids))
    np.testing.assert_allclose(rows[0], rows[1], atol=2e-3)
    np.testing.assert_allclose(rows[0], rows[2], atol=2e-3)


# --- models -----------------------------------------------------------------------------------------------------


def test_the_extra_must_be_installed(name, monkeypatch):
    monkeypatch.setattr(image_text, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"anomalymatch\[text\]"):
        spec(name).check()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "ViT-B-33"}, "ViT-B-32"),
        ({"model": "ViT-B-32"}, "text.pretrained=None.*openai"),
        ({"model": "ViT-B-32", "pretrained": "opanai"}, "text.pretrained=opanai.*openai"),
        ({"model": "local-dir:nowhere"}, "nowhere"),
        ({"templates": []}, "text.templates"),
        ({"templates": ["a photo"]}, "text.templates.*a photo"),
        ({"image_size": 8}, "text.image_size is 8"),
    ],
)
def test_a_wrong_setting_is_told_before_anything_is_loaded(changes, says):
    with pytest.raises(ConfigError, match=says):
        spec(**{"model": "ViT-B-32"} | changes).check()


@pytest.mark.parametrize(("model", "tag"), [("hf-hub:nobody/nothing", None), ("ViT-B-32-SigLIP2-256", "webli")])
def test_without_the_hub_missing_weights_are_told(model, tag, offline, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for act in (spec(model, pretrained=tag).load, spec(model, pretrained=tag).check_weights):
        with pytest.raises(DownloadError, match="are not on this machine, and the hub cannot be reached"):
            act()


def test_cached_weights_need_no_hub(name, offline, tmp_path, monkeypatch):
    """A cache of the hub, as `huggingface_hub` lays it out, for a repository and for a name of open_clip."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    expected = spec(name).load().encode_text("a")
    for repository in ("somebody--model", "timm--vit_base_patch32_clip_224.openai"):
        folder = tmp_path / "hub" / f"models--{repository}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        (folder / "snapshots").mkdir()
        (folder / "snapshots" / ("0" * 40)).symlink_to(Path(name.removeprefix("local-dir:")))
    for model, tag in (("hf-hub:somebody/model", None), ("ViT-B-32", "openai")):
        spec(model, pretrained=tag).check_weights()
        np.testing.assert_array_equal(spec(model, pretrained=tag).load().encode_text("a"), expected)


@pytest.mark.parametrize("safe", [True, False])
def test_what_is_not_cached_is_fetched(name, tmp_path, monkeypatch, safe):
    """Weights as safetensors alone if the repository has them; `snapshot_download` is that of a small hub."""
    there, here, asked = Path(name.removeprefix("local-dir:")), tmp_path / "here", []
    expected = spec(name).load().encode_text("a")
    torch.save(load_file(there / "open_clip_model.safetensors"), there / "open_clip_pytorch_model.bin")
    if not safe:
        (there / "open_clip_model.safetensors").unlink()

    def snapshot_download(repository, *, allow_patterns=(), local_files_only=False):
        if local_files_only and not here.exists():
            raise LocalEntryNotFoundError("not there")
        here.mkdir(exist_ok=True)
        for file in there.iterdir():
            if any(file.match(pattern) for pattern in allow_patterns):
                asked.append(file.name)
                shutil.copy(file, here)
        return str(here)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr(image_text, "require_hub", lambda: None)
    for _ in range(2):
        np.testing.assert_array_equal(spec("hf-hub:a/b").load().encode_text("a"), expected)
    assert ("open_clip_pytorch_model.bin" in asked) == (not safe)
    fetched = len(asked)
    spec("hf-hub:a/b").check_weights()
    assert len(asked) == fetched
    shutil.rmtree(here)
    (there / "open_clip_config.json").unlink()
    with pytest.raises(ConfigError, match=r"a/b has no model of open_clip"):
        spec("hf-hub:a/b").load()
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="no name of a repository"):
        spec("hf-hub:a b").load()


def test_damaged_files_are_told_in_a_sentence(name):
    folder = Path(name.removeprefix("local-dir:"))
    (folder / "open_clip_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        spec(name).load()
    (folder / "open_clip_config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        spec(name).load()


def test_a_model_without_weights_is_refused(name):
    (Path(name.removeprefix("local-dir:")) / "open_clip_model.safetensors").unlink()
    with pytest.raises(ConfigError, match="cannot be loaded"):
        spec(name).load()


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_the_files_of_a_stranger_run_no_code(name, tmp_path):
    folder = Path(name.removeprefix("local-dir:"))
    (folder / "open_clip_model.safetensors").unlink()
    (folder / "open_clip_pytorch_model.bin").write_bytes(pickle.dumps(Evil(tmp_path / "was-here")))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        spec(name).load()
    torch.save({"state_dict": Evil(tmp_path / "was-here")}, folder / "open_clip_pytorch_model.bin")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        spec(name).load()
    assert not (tmp_path / "was-here").exists()
    write_tiny_clip(folder, hf_model_name="somebody/else")
    with pytest.raises(ConfigError, match="somebody/else"):
        spec(name).load()


def test_a_tokenizer_of_a_stranger_runs_no_code(tmp_path):
    pytest.importorskip("transformers", reason='pip install "anomalymatch[text]"')
    options = {"hf_tokenizer_name": "x", "tokenizer_kwargs": {"trust_remote_code": True}}
    name = write_tiny_clip(tmp_path / "evil", **options)
    folder = Path(name.removeprefix("local-dir:"))
    (folder / "own.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'was-here')!r}).touch()\n")
    plain = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(plain))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        spec(name).load()
    assert not (tmp_path / "was-here").exists()


def test_a_tokenizer_of_transformers_cuts_what_is_too_long(tmp_path):
    transformers = pytest.importorskip("transformers", reason='pip install "anomalymatch[text]"')
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2, "galaxy": 3, "ring": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    name = write_tiny_clip(tmp_path / "words", hf_tokenizer_name="x", tokenizer_kwargs={"clean": "canonicalize"})
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    fast.save_pretrained(name.removeprefix("local-dir:"))
    loaded = spec(name, templates=["{}"]).load()
    assert not loaded.is_cut("galaxy " * (CONTEXT - 1))
    assert loaded.is_cut("galaxy " * CONTEXT)
    np.testing.assert_array_equal(loaded.encode_text("Ring, galaxy!"), loaded.encode_text("ring galaxy"))
    assert not np.allclose(loaded.encode_text("galaxy ring"), loaded.encode_text("ring galaxy"))


def test_loading_leaves_the_root_logger_alone(name, caplog):
    import logging

    before = logging.getLogger().handlers[:], logging.getLogger().filters[:], logging.getLogger().level
    with caplog.at_level(logging.INFO):
        spec(name).load()
    assert caplog.records == []
    assert (logging.getLogger().handlers, logging.getLogger().filters, logging.getLogger().level) == before
