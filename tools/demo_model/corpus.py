# SPDX-License-Identifier: Apache-2.0
"""The training images: emoji artwork from three npm packages, composed into pictures.

The packages are fetched by name and version and checked against the registry's sha512 digests. The
images are never part of the repository.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
import re
import tarfile
import unicodedata
import urllib.request
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

log = logging.getLogger("lacuna.demo_model")

SIZE = 64  # pixels, both sides
OBJECT, FLAG = "object", "flag"


@dataclass(frozen=True)
class Package:
    """An npm package that holds one style's images."""

    style: str
    url: str
    file: str
    sha512: str  # base64, as the registry states it


PACKAGES = (
    Package(
        "noto",
        "https://registry.npmjs.org/emoji-datasource-google/-/emoji-datasource-google-16.0.0.tgz",
        "emoji-datasource-google-16.0.0.tgz",
        "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
    ),
    Package(
        "twemoji",
        "https://registry.npmjs.org/emoji-datasource-twitter/-/emoji-datasource-twitter-16.0.0.tgz",
        "emoji-datasource-twitter-16.0.0.tgz",
        "7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
    ),
    Package(
        "fluent",
        "https://registry.npmjs.org/@lobehub/fluent-emoji-3d/-/fluent-emoji-3d-1.1.0.tgz",
        "fluent-emoji-3d-1.1.0.tgz",
        "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
    ),
)
STYLES = tuple(package.style for package in PACKAGES)

# emoji short name -> the name and its synonyms; every object exists in all three styles
OBJECTS: dict[str, tuple[str, ...]] = {
    "dog": ("dog", "puppy"),
    "cat": ("cat", "kitten"),
    "horse": ("horse", "stallion"),
    "cow": ("cow", "cattle"),
    "pig": ("pig", "hog"),
    "frog": ("frog", "toad"),
    "bear": ("bear", "grizzly"),
    "panda_face": ("panda",),
    "tiger": ("tiger",),
    "lion_face": ("lion",),
    "penguin": ("penguin",),
    "owl": ("owl",),
    "fish": ("fish",),
    "crab": ("crab",),
    "turtle": ("turtle", "tortoise"),
    "butterfly": ("butterfly",),
    "elephant": ("elephant",),
    "unicorn_face": ("unicorn",),
    "apple": ("apple",),
    "banana": ("banana",),
    "strawberry": ("strawberry",),
    "watermelon": ("watermelon",),
    "pizza": ("pizza",),
    "hamburger": ("hamburger", "burger"),
    "car": ("car", "automobile"),
    "bus": ("bus", "coach"),
    "airplane": ("airplane", "plane", "aeroplane"),
    "rocket": ("rocket", "spaceship"),
    "ship": ("ship", "vessel"),
    "house": ("house", "home"),
    "evergreen_tree": ("tree", "pine"),
    "rose": ("rose",),
    "soccer": ("football", "soccer ball"),
    "guitar": ("guitar",),
    "umbrella": ("umbrella",),
    "gun": ("gun", "pistol"),
    "hocho": ("knife", "dagger"),
    "bomb": ("bomb", "explosive"),
    "crossed_swords": ("swords", "blades"),
    "teddy_bear": ("toy", "teddy"),
    "ghost": ("ghost", "phantom"),
    "robot_face": ("robot", "android"),
    "santa": ("santa claus",),
    "skull": ("skull",),
    "heart": ("heart",),
    "star": ("star",),
    "sun_with_face": ("sun",),
}

# Country codes of the flags: chosen greedily so that any two differ by FLAG_DISTANCE, well-known
# names first. (Many territories fly another country's flag, pixel by pixel.)
_FLAG_CODES = """
AF AG AM AO AQ AR AT AU AW AZ BA BB BD BE BF BH BI BJ BM BN BR BS BT BW BY BZ CA CH
CL CM CN CR CU CV CW CX CY CZ DE DJ DK DM DO DZ EC EE ER ES ET FI FJ FK FR GA GB GD
GE GG GH GI GL GM GN GP GR GT GU GY HN HT ID IL IN IO IR IS JE JM JP KE KH KI KM KP
KR KW KZ LA LB LC LK LR LS LV LY MC MG MM MN MO MP MQ MR MT MU MV MW MY MZ NA NE NG
NL NO NP NR NU OM PA PE PK PL PS PT PW QA RO RS RU RW SA SC SD SE SM SO SR SY SZ TG
TH TJ TK TL TN TO TT TZ UA UG US UY UZ VE VU WS XK YT ZM ZW
"""
FLAGS = frozenset(_FLAG_CODES.split())
FLAG_DISTANCE = 0.16  # RMS difference of two flags on white, of 1

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (16, 16, 16),
    "red": (214, 60, 60),
    "green": (90, 176, 96),
    "blue": (70, 110, 210),
    "yellow": (244, 214, 80),
}


class CorpusError(RuntimeError):
    """A sentence for the person at the keyboard."""


@dataclass(frozen=True)
class Record:
    """One source image: what it shows (name first, then synonyms), in which style."""

    words: tuple[str, ...]
    style: str
    kind: str
    code: str  # Unicode code points, hexadecimal, without variation selectors

    @property
    def name(self) -> str:
        return self.words[0]


@dataclass(frozen=True)
class Corpus:
    """The image table: records and their RGBA images, uint8 [n, SIZE, SIZE, 4]."""

    records: tuple[Record, ...]
    images: torch.Tensor

    def names(self, kind: str) -> list[str]:
        """The distinct names of one kind, in a stable order."""
        return list(dict.fromkeys(record.name for record in self.records if record.kind == kind))

    def to(self, device: torch.device) -> Corpus:
        """The same table with its images on a device."""
        return replace(self, images=self.images.to(device))


def _digest(data: bytes) -> str:
    return base64.b64encode(hashlib.sha512(data).digest()).decode()


def fetch(folder: Path, package: Package) -> Path:
    """The package's tarball in `folder`, downloaded unless a sound copy is there."""
    path = folder / package.file
    if path.is_file() and _digest(path.read_bytes()) == package.sha512:
        return path
    log.info("downloading %s", package.url)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with urllib.request.urlopen(package.url, timeout=300) as response:
            data = response.read()
    except OSError as error:
        raise CorpusError(f"cannot download {package.url}: {error}.") from error
    if _digest(data) != package.sha512:
        raise CorpusError(f"{package.url} is not the file this script was written for.")
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(data)
    temporary.replace(path)
    return path


def _decode(data: bytes) -> np.ndarray:
    from PIL import Image

    image = Image.open(io.BytesIO(data)).convert("RGBA")
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.LANCZOS)
    return np.array(image)


def _read_members(path: Path, wanted: set[str]) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        return {
            member.name: archive.extractfile(member).read()
            for member in archive
            if member.name in wanted
        }


def _on_white(image: np.ndarray) -> np.ndarray:
    alpha = image[..., 3:] / 255.0
    return (image[..., :3] / 255.0 * alpha + 1 - alpha).astype(np.float32)


def least_distance(images: torch.Tensor) -> float:
    """The RMS difference (of 1) of the two images on white that are most alike."""
    flat = torch.stack([torch.from_numpy(_on_white(image)).flatten() for image in images.numpy()])
    distances = torch.cdist(flat, flat) / flat.shape[1] ** 0.5
    return float(distances.fill_diagonal_(torch.inf).min())


def _flag_name(emoji_name: str) -> str:
    """ "Curaçao Flag" -> "flag of curacao": plain letters that anybody can type."""
    name = re.sub(r" \(.*?\)| sar china", "", emoji_name.removesuffix(" Flag").lower())
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return "flag of " + plain


def _country_code(unified: str) -> str:
    return "".join(chr(int(point, 16) - 0x1F1E6 + ord("A")) for point in unified.split("-"))


def build(folder: Path) -> Corpus:
    """Read the tarballs in `folder` (fetched if need be) into one image table."""
    noto, twemoji, fluent = (fetch(folder, package) for package in PACKAGES)
    index_name = "package/emoji.json"
    emoji = json.loads(_read_members(noto, {index_name})[index_name])
    by_name = {entry["short_name"]: entry for entry in emoji}
    objects = [(by_name[short], words) for short, words in OBJECTS.items()]
    flags = [
        entry
        for entry in emoji
        if entry["subcategory"] == "country-flag" and _country_code(entry["unified"]) in FLAGS
    ]

    noto_files = {
        f"package/img/google/64/{entry['image']}"
        for entry in [entry for entry, _ in objects] + flags
    }
    twemoji_files = {f"package/img/twitter/64/{entry['image']}" for entry, _ in objects}
    fluent_files = {
        f"package/assets/{spelling}.webp"
        for entry, _ in objects
        for spelling in _fluent_spellings(entry["unified"])
    }
    noto_data = _read_members(noto, noto_files)
    twemoji_data = _read_members(twemoji, twemoji_files)
    fluent_data = _read_members(fluent, fluent_files)

    records: list[Record] = []
    images: list[np.ndarray] = []
    for entry, words in objects:
        code = entry["unified"].replace("-FE0F", "")
        spelled = [
            f"package/assets/{spelling}.webp" for spelling in _fluent_spellings(entry["unified"])
        ]
        sources = (
            noto_data[f"package/img/google/64/{entry['image']}"],
            twemoji_data[f"package/img/twitter/64/{entry['image']}"],
            next(fluent_data[name] for name in spelled if name in fluent_data),
        )
        for style, data in zip(STYLES, sources, strict=True):
            records.append(Record(tuple(words), style, OBJECT, code))
            images.append(_decode(data))
    for entry in flags:
        records.append(Record((_flag_name(entry["name"]),), "noto", FLAG, entry["unified"]))
        images.append(_decode(noto_data[f"package/img/google/64/{entry['image']}"]))
    return Corpus(tuple(records), torch.from_numpy(np.stack(images)))


def _fluent_spellings(unified: str) -> tuple[str, str, str]:
    code = unified.lower()
    bare = code.replace("-fe0f", "")
    return code, bare, f"{bare}-fe0f"


def save(corpus: Corpus, folder: Path) -> None:
    """Write the table to `folder`/images.npz and images.json."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "images.npz", images=corpus.images.numpy())
    text = json.dumps([asdict(record) for record in corpus.records], indent=1)
    (folder / "images.json").write_text(text + "\n", encoding="utf-8")


def load(folder: Path) -> Corpus:
    """The table that `save` wrote."""
    try:
        rows = json.loads((folder / "images.json").read_text(encoding="utf-8"))
        images = torch.from_numpy(np.load(folder / "images.npz")["images"])
    except OSError as error:
        raise CorpusError(f"no image table in {folder}; run the corpus stage first.") from error
    records = tuple(Record(tuple(row.pop("words")), **row) for row in rows)
    return Corpus(records, images)


def draw_backgrounds(count: int, generator: torch.Generator) -> list[str]:
    """Background names: white for one half, any of the six for the other."""
    names = list(BACKGROUNDS)
    coloured = torch.rand(count, generator=generator) < 0.5
    any_of = torch.randint(0, len(names), (count,), generator=generator)
    return [names[int(i)] if c else "white" for c, i in zip(coloured, any_of, strict=True)]


def render(
    corpus: Corpus,
    indices: list[int],
    backgrounds: list[str],
    generator: torch.Generator,
    augment: bool = True,
) -> torch.Tensor:
    """Pictures of the records on plain backgrounds: float [n, 3, SIZE, SIZE] in 0..1.

    Augmenting zooms out by 1 to 1.25, shifts by up to a tenth of the side and mirrors objects
    (never flags) every other time. The pictures are made where the corpus' images lie.
    """
    count, device = len(indices), corpus.images.device
    layers = corpus.images[indices].permute(0, 3, 1, 2).float() / 255
    alpha = layers[:, 3:]
    layers = torch.cat([layers[:, :3] * alpha, alpha], 1)
    if augment:
        zoom = 1 + 0.25 * torch.rand(count, generator=generator)
        shift = 0.4 * torch.rand(2, count, generator=generator) - 0.2  # grid units: side is 2
        mirror = torch.rand(count, generator=generator) < 0.5
        flags = torch.tensor([corpus.records[index].kind == FLAG for index in indices])
        sign = torch.where(mirror & ~flags, -1.0, 1.0)
        transform = torch.zeros(count, 2, 3)
        transform[:, 0, 0], transform[:, 1, 1] = zoom * sign, zoom
        transform[:, 0, 2], transform[:, 1, 2] = shift[0], shift[1]
        grid = F.affine_grid(transform.to(device), list(layers.shape), align_corners=False)
        layers = F.grid_sample(layers, grid, padding_mode="zeros", align_corners=False)
    colour = torch.tensor([BACKGROUNDS[name] for name in backgrounds]).to(device).float() / 255
    return layers[:, :3] + (1 - layers[:, 3:]) * colour.view(count, 3, 1, 1)
