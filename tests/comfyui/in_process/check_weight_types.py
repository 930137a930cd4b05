# SPDX-License-Identifier: Apache-2.0
"""One bundle through every weight type in which ComfyUI can load its checkpoint."""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

import comfy.sd
import comfy.utils
import pytest
import torch
from comfy.cli_args import args

PREFIX = "cond_stage_model.transformer.text_model."
# The flag of ComfyUI's command line, the type its weights have then, and our name of it.
TYPES = [
    ("bf16", torch.bfloat16, "bf16"),
    ("fp32", torch.float32, "fp16"),  # of a file in fp16 no more is known
    ("fp8_e4m3fn", torch.float8_e4m3fn, "fp8_e4m3"),
]


def inputs(host: ModuleType, model: Any, clip: Any) -> dict[str, Any]:
    return {"model": host.ComfyDenoiser(model), "clip": host.ComfyTextEncoder(clip)}


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Any:
    import lacuna_shim.loader

    return lacuna_shim.loader.load().NodePack(str(tmp_path_factory.mktemp("output")))


@pytest.fixture(scope="module")
def bundle(host: ModuleType, checkpoint: Any, pack: Any) -> Any:
    """Trained hardly at all, on the file as it is (fp16); saved and loaded again."""
    with torch.inference_mode():
        concepts = pack.run(
            "LacunaConceptSet", {"concepts": "owl", "general_prior": "none", "templates": 1}
        )[0]
        training = {"gradient": "cached", "steps": 1, "images": 1, "sampling_steps": 2,
                    "width": 64, "height": 64, "concepts": concepts}  # fmt: skip
        loras = pack.run("LacunaLoRAErase", training | inputs(host, *checkpoint[:2]))[0]
        pack.run("LacunaSaveBundle", {"loras": loras, "filename_prefix": "owl"})
        return pack.run("LacunaLoadBundle", {"file": "owl_00001_.safetensors"})[0]


def test_samples_are_those_of_every_host(host: ModuleType, checkpoint: Any) -> None:
    from lacuna_shim.fingerprint import identify

    tensors = comfy.utils.load_torch_file(os.environ["LACUNA_TEST_CHECKPOINT"])
    named = {f"clip_l.{k.removeprefix(PREFIX)}": v for k, v in tensors.items() if PREFIX in k}
    samples = host.ComfyTextEncoder(checkpoint[1]).weight_samples
    assert samples == identify(named.items()).samples
    model = host.ComfyDenoiser(checkpoint[0])
    assert set(model.weight_samples) == {lora for _, lora, _ in model.cross_attention()}


@pytest.mark.parametrize(("flag", "dtype", "name"), TYPES)
def test_a_bundle_fits_its_model_in_every_weight_type(
    host: ModuleType, pack: Any, bundle: Any, flag: str, dtype: torch.dtype, name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for part in ("unet", "text_enc"):
        monkeypatch.setattr(args, f"{flag}_{part}", True)
    tensors = comfy.utils.load_torch_file(os.environ["LACUNA_TEST_CHECKPOINT"])
    generator = torch.Generator().manual_seed(1)
    tuned = dict(tensors)
    for key in (key for key in tensors if ".attn2.to_" in key):
        step = torch.randn(tensors[key].shape, generator=generator) * tensors[key].float().std()
        tuned[key] = (tensors[key] + 0.02 * step).half()
    load = comfy.sd.load_state_dict_guess_config
    same, clip = load(tensors, output_vae=False)[:2]
    other = load(tuned, output_vae=False, output_clip=False)[0]
    layer = same.model.diffusion_model.middle_block[1].transformer_blocks[0].attn2
    assert layer.to_k.weight.dtype == dtype
    report = pack.run("LacunaLoRAFuse", inputs(host, same, clip) | {"loras": bundle})[3]
    assert report.startswith("Fused 1 concept")
    with pytest.raises(ValueError, match="another base model than the one connected") as error:
        pack.run("LacunaLoRAFuse", inputs(host, other, clip) | {"loras": bundle})
    assert " in fp16 and " in str(error.value)
    assert f"{host.ComfyDenoiser(other).fingerprint[:8]} in {name}, " in str(error.value)
