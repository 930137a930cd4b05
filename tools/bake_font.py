# SPDX-License-Identifier: Apache-2.0
"""Write native/data/sheet_font.txt, the glyphs of contact sheets.

The font is Aileron Regular by dotcolon (CC0 1.0), as Pillow carries it, 16 pixels high. A line per
glyph: code point, advance, width, and 4 bits of coverage for each of width x 20 pixels.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

HEIGHT, SIZE = 20, 16
TARGET = Path(__file__).resolve().parents[1] / "native" / "data" / "sheet_font.txt"


def glyph_line(font: ImageFont.FreeTypeFont, code: int) -> str:
    """One line of the file."""
    advance = round(font.getlength(chr(code)))
    width = max(advance, font.getbbox(chr(code))[2])
    cell = Image.new("L", (width, HEIGHT), 0)
    ImageDraw.Draw(cell).text((0, 0), chr(code), 255, font=font)
    pixels = "".join(f"{round(value / 17):x}" for value in cell.getdata())
    return f"{code} {advance} {width} {pixels}"


def main() -> None:
    """Bake the printable ASCII characters."""
    font = ImageFont.load_default(SIZE)
    TARGET.write_text("\n".join(glyph_line(font, code) for code in range(32, 127)) + "\n")


if __name__ == "__main__":
    main()
