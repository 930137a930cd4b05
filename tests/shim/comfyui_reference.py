# SPDX-License-Identifier: Apache-2.0
"""Run inside a ComfyUI checkout: what ComfyUI itself makes of a checkpoint, written to a file.

python comfyui_reference.py COMFYUI_FOLDER CHECKPOINT JOB.json RESULT.pt
"""

import json
import logging
import os
import sys

folder, checkpoint, job_file, result_file = sys.argv[1:]
sys.path[0] = folder
os.chdir(folder)

import comfy.cli_args  # noqa: E402

comfy.cli_args.args.cpu = True

import comfy.model_management  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.sd  # noqa: E402
import torch  # noqa: E402

with open(job_file, encoding="utf-8") as file:
    job = json.load(file)
warnings = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: warnings.append(record.getMessage())
logging.getLogger().addHandler(handler)

with torch.inference_mode():
    model, clip, vae = comfy.sd.load_checkpoint_guess_config(checkpoint)[:3]
    loading_warnings = list(warnings)

    def conditioning(text: str) -> list:
        return clip.encode_from_tokens_scheduled(clip.tokenize(text, disable_weights=True))

    result = {
        "warnings": loading_warnings,
        "tokens": [clip.tokenizer.clip_l.tokenizer(text)["input_ids"] for text in job["phrases"]],
        "encoded": torch.cat([conditioning(text)[0][0] for text in job["prompts"]]).clone(),
    }
    start = torch.tensor(job["start"])
    for name, case in job["cases"].items():
        latent = start if case["denoise"] < 1 else torch.zeros_like(start)
        latent = comfy.sample.sample(
            model, comfy.sample.prepare_noise(latent, case["seed"]), case["steps"], case["cfg"],
            case["sampler"], case["scheduler"], conditioning(case["prompt"]), conditioning(""),
            latent, denoise=case["denoise"], seed=case["seed"], disable_pbar=True,
        )  # fmt: skip
        result[name] = {"latent": latent.clone(), "image": vae.decode(latent).clone()}
    # One forward pass at several noise levels, through the sampler's own function.
    wanted = job["denoise"]
    comfy.model_management.load_models_gpu([model])
    result["denoised"] = model.model.apply_model(
        torch.tensor(wanted["noisy"]), torch.tensor(wanted["sigma"]),
        c_crossattn=torch.cat([conditioning(text)[0][0] for text in wanted["prompts"]]),
        transformer_options={},
    ).clone()  # fmt: skip
torch.save(result, result_file)
