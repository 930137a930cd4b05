# SPDX-License-Identifier: Apache-2.0
"""Turn the training checkpoints into the compact float16 weights of assets/.

python tools/demo_model/export.py [--work DIR] [--out DIR]              the demo model
python tools/demo_model/export.py transformer [--work DIR] [--out DIR]  the demo transformer
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
from pathlib import Path

import torch
from captions import with_article
from corpus import FLAG, OBJECT, STYLES, Corpus, load
from safetensors.torch import save_file
from stage_text import load_text_encoder
from training import Options, load_checkpoint

log = logging.getLogger("lacuna.demo_model")

ASSETS = Path(__file__).resolve().parents[2] / "assets"


def _save(weights: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    half = {
        key: value.half().contiguous() if value.is_floating_point() else value.contiguous()
        for key, value in weights.items()
    }
    bad = [key for key, value in half.items() if not torch.isfinite(value).all()]
    if bad:
        raise SystemExit(f"{path.name} would hold numbers that float16 cannot: {bad[0]}.")
    temporary = path.with_name(path.name + ".part")
    save_file(half, temporary, metadata={"format": "pt", **metadata})
    temporary.chmod(0o644)
    temporary.replace(path)


def names(corpus: Corpus) -> dict[str, object]:
    """What the model can draw, for names.json."""
    synonyms = {
        record.name: list(record.words[1:]) for record in corpus.records if len(record.words) > 1
    }
    return {
        "objects": sorted(corpus.names(OBJECT)),
        "synonyms": dict(sorted(synonyms.items())),
        "styles": list(STYLES),
        "flags": corpus.names(FLAG),
        "no_article": [name for name in corpus.names(OBJECT) if with_article(name) == name],
    }


def export(work: Path, out: Path) -> None:
    """Write every part whose checkpoint is there; what was not trained stays as it is."""
    options = Options(work=work, steps=0)
    out.mkdir(parents=True, exist_ok=True)
    if options.checkpoint("text").is_file():
        text_encoder = load_text_encoder(options).compact()
        _save(text_encoder, out / "text_encoder.safetensors", {"layers": "2"})
    if unet := load_checkpoint(options.checkpoint("unet")):
        _save(unet["average"], out / "unet.safetensors", {"steps": str(unet["step"])})
    if decoder := load_checkpoint(options.checkpoint("decoder")):
        info = {"latent_std": repr(decoder["latent_std"]), "steps": str(decoder["step"])}
        _save(decoder["decoder"], out / "vae_decoder.safetensors", info)
        _save(decoder["encoder"], out / "patch_encoder.safetensors", {})
    if encoder := load_checkpoint(options.checkpoint("encoder")):
        steps = {"steps": str(encoder["step"])}
        _save(encoder["encoder"], out / "vae_encoder.safetensors", steps)
    if (work / "evaluator.safetensors").is_file():
        shutil.copyfile(work / "evaluator.safetensors", out / "evaluator.safetensors")
    text = json.dumps(names(load(work)), indent=1, ensure_ascii=False)
    (out / "names.json").write_text(text + "\n", encoding="utf-8")
    total = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    log.info("%s: %.1f MB of weights", out, total / 1e6)


def export_transformer(work: Path, out: Path) -> None:
    """Write the averaged weights of the transformer stage, and how far it is."""
    state = load_checkpoint(Options(work=work, steps=0).checkpoint("transformer"))
    if state is None:
        raise SystemExit(f"{work} holds no checkpoint of the transformer stage.")
    out.mkdir(parents=True, exist_ok=True)
    info = {"steps": str(state["step"]), "loss": f"{state['loss']:.4f}"}
    file = out / "transformer.safetensors"
    _save(state["average"], file, info)
    log.info("%s: %s, %.1f MB", file, info, file.stat().st_size / 1e6)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", choices=("demo_model", "transformer"),
                        default="demo_model", help="default: %(default)s")  # fmt: skip
    parser.add_argument("--work", type=Path, default=Path("build/demo_model"), metavar="DIR")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: the model's folder")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.model == "transformer":
        export_transformer(options.work, options.out or ASSETS / "demo_transformer")
    else:
        export(options.work, options.out or ASSETS / "demo_model")
    return 0


if __name__ == "__main__":
    sys.exit(main())
