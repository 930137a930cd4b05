# SPDX-License-Identifier: Apache-2.0
"""Write the committed copies of what the native module declares about its nodes:
python_shim/node_schemas.json (shown while the binary is missing) and locales/en/nodeDefs.json
(the texts that translations start from).

python tools/write_schemas.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

SCHEMAS = REPOSITORY / "python_shim" / "node_schemas.json"
ENGLISH = REPOSITORY / "locales" / "en" / "nodeDefs.json"


def _texts(items: list[dict[str, Any]], keys: list[str]) -> dict[str, dict[str, str]]:
    return {
        key: {"name": item["display_name"], "tooltip": item["tooltip"]}
        for key, item in zip(keys, items, strict=True)
    }


def english(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    """The schemas' texts as ComfyUI reads them from locales/<language>/nodeDefs.json."""
    return {
        schema["id"]: {
            "display_name": schema["display_name"],
            "description": schema["description"],
            "inputs": _texts(schema["inputs"], [item["id"] for item in schema["inputs"]]),
            "outputs": _texts(schema["outputs"], [str(i) for i in range(len(schema["outputs"]))]),
        }
        for schema in schemas
    }


def main() -> None:
    from python_shim import loader

    text = loader.load().NodePack().schemas()
    SCHEMAS.write_text(text, "utf-8")
    translated = json.dumps(english(json.loads(text)), indent=2, ensure_ascii=False)
    ENGLISH.write_text(f"{translated}\n", "utf-8")


if __name__ == "__main__":
    main()
