"""A tiny image-text model with random weights, in a folder as open_clip reads it."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

CONTEXT = 16


def write_tiny_clip(folder: Path, *, seed: int = 0, **changes: Any) -> str:
    """Write the model and return its name; `changes` are of its configuration of the text tower."""
    import open_clip

    vision = {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16}
    text = {"context_length": CONTEXT, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = open_clip.CLIP(**config)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    config |= {"text_cfg": text | changes}
    described = {"model_cfg": config, "preprocess_cfg": {"mean": [0.3, 0.4, 0.5], "std": [0.2, 0.2, 0.3]}}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    return f"local-dir:{folder}"
