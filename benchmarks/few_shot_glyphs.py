"""Few-shot domains without a download: writing systems drawn from installed fonts, patterns, and handwriting.

Every domain is (classes of uint8 images of 28 x 28). Glyphs come from Debian's fonts-noto-core, fonts-dejavu-core and
fonts-liberation; a code point is drawn only by fonts whose cmap has it. Digits and photographs are scikit-learn's;
Omniglot and MNIST are read from a folder and left out where they are not. Nothing is written into the repository: the
rendered domains lie in one file that the caller names.
"""

import gzip
import io
import math
import unicodedata
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from fontTools.ttLib import TTFont
from fontTools.unicodedata import Scripts
from fontTools.unicodedata import script as script_of
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample, interpolate, max_pool2d, pad

FONTS = Path("/usr/share/fonts/truetype")
SIDE, CANVAS, PER_CLASS, MOST_CLASSES, MOST_FONTS, FEWEST = 28, 40, 20, 240, 5, 10

PRETRAINING = {"Tang": 900, "Yiii": 500, "Xsux": 300, "Egyp": 300, "Hluw": 200}
RETENTION = 300
IN_SCRIPTS = {
    "latin": "Latn Grek Cyrl",
    "indic": "Deva Beng Guru Gujr Orya Taml Telu Knda Mlym Sinh",
    "seasia, outlined": "Thai Laoo Khmr Mymr Bali Java Lana Cham",
    "syllabaries, noisy negatives": "Cher Cans Ethi Bamu",
    "semitic, low resolution": "Hebr Arab Syrc Thaa Nkoo Rohg Yezi",
    "modern scripts, dotted": "Adlm Osge Vaii Mend Medf Wara Wcho Olck Mtei Lisu",
}
OUT_SCRIPTS = {
    "held-out scripts": "Armn Geor Tfng Copt Glag Runr Ogam Tibt Dsrt Shaw",
    "ancient, broken": "Lina Linb Cprt Ugar Xpeo Cari Lyci Lydi Ital Goth Orkh Hung Phnx Armi Sarb Narb Khar Brah Avst",
    "held-out scripts, striped": "Mong Plrd Hmng Newa Tavt Pauc Shrd Gran Phag Sidd Tirh Talu",
}
TRAINED, HELD_OUT = "trained", "held out"
"""How domains begin that somebody names: `trained: Latn Grek`."""
IN_DOMAINS = (*IN_SCRIPTS, TRAINED, "textures", "shapes")
OUT_DOMAINS = (*OUT_SCRIPTS, HELD_OUT, "digits", "omniglot", "mnist", "photographs")
KEPT = "retention"
PARTS = ("train", "held_in", "out")


@dataclass(frozen=True)
class Pictures:
    """Images (items, 28, 28) uint8, and the class (items,) of each."""

    images: Tensor
    labels: Tensor

    def of(self, classes: Iterable[int]) -> "Pictures":
        """Some of the classes, renumbered."""
        number = {c: i for i, c in enumerate(sorted(classes))}
        rows = torch.tensor([i for i, c in enumerate(self.labels.tolist()) if c in number])
        return Pictures(self.images[rows], torch.tensor([number[int(c)] for c in self.labels[rows]]))

    @property
    def num_classes(self) -> int:
        return int(self.labels.max()) + 1


@dataclass(frozen=True)
class World:
    """Meta-training domains and validation classes (8 in all), domains never trained on, and the pretraining corpus."""

    train: dict[str, Pictures]
    held_in: dict[str, Pictures]
    out: dict[str, Pictures]
    pretraining: Pictures

    @property
    def tests(self) -> dict[str, Pictures]:
        return self.held_in | self.out


Glyphs = dict[str, dict[str, list[Path]]]


def letters(scripts: set[str], fonts: Path = FONTS) -> Glyphs:
    """script -> letter -> the font files whose cmap has it. No accents, and small letters where a script has both."""
    found: Glyphs = {name: {} for name in scripts}
    for file in sorted(fonts.rglob("*.ttf")):
        with TTFont(file, lazy=True) as font:
            drawable = {chr(code) for code in font.getBestCmap() or ()}
        for letter in sorted(drawable):
            usual = unicodedata.category(letter) in ("Lu", "Ll", "Lo", "Nl") and not unicodedata.decomposition(letter)
            small = letter.lower() == letter or letter.lower() not in drawable
            if usual and small and (name := script_of(letter)) in found:
                found[name].setdefault(letter, []).append(file)
    return found


def bitmap(letter: str, font: ImageFont.FreeTypeFont) -> np.ndarray | None:
    """The letter, cropped and centred on a canvas, its longer side 30 of 40 pixels; None where nothing is drawn."""
    left, top, right, bottom = font.getbbox(letter)
    width, height = int(right - left), int(bottom - top)
    if min(width, height) < 2:
        return None
    drawn = Image.new("L", (width + 8, height + 8))
    ImageDraw.Draw(drawn).text((4 - left, 4 - top), letter, fill=255, font=font)
    box = drawn.getbbox()
    if box is None:
        return None
    drawn = drawn.crop(box)
    scale = 30 / max(drawn.size)
    size = [max(2, round(side * scale)) for side in drawn.size]
    drawn = drawn.resize((size[0], size[1]), Image.Resampling.BOX)
    canvas = Image.new("L", (CANVAS, CANVAS))
    canvas.paste(drawn, ((CANVAS - drawn.width) // 2, (CANVAS - drawn.height) // 2))
    return np.asarray(canvas)


class Pen:
    """Draws letters, opening each font once."""

    def __init__(self) -> None:
        self.fonts: dict[Path, ImageFont.FreeTypeFont] = {}

    def classes(self, glyphs: dict[str, list[Path]], most: int, rng: np.random.Generator) -> list[np.ndarray]:
        """Up to `most` letters, each in up to five fonts (faces, 40, 40); a bitmap seen before drops its letter."""
        seen: set[bytes] = set()
        kept: list[np.ndarray] = []
        order = sorted(glyphs)
        for letter in (order[i] for i in rng.permutation(len(order))):
            files = [glyphs[letter][i] for i in rng.permutation(len(glyphs[letter]))[:MOST_FONTS]]
            drawn = [found for file in files if (found := bitmap(letter, self._font(file))) is not None]
            faces = {face.tobytes(): face for face in drawn}
            if faces and not seen & set(faces):
                kept.append(np.stack(list(faces.values())))
            seen |= set(faces)
            if len(kept) == most:
                break
        return kept

    def _font(self, file: Path) -> ImageFont.FreeTypeFont:
        if file not in self.fonts:
            self.fonts[file] = ImageFont.truetype(str(file), 60)
        return self.fonts[file]


def warped(images: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """Images (n, side, side) in [0, 1], each turned, sheared, scaled and shifted at random -> (n, 28, 28)."""
    count = len(images)

    def spread(width: float) -> Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * width * strength

    turn, shear, shift_x, shift_y = spread(math.pi / 12), spread(0.2), spread(0.12), spread(0.12)
    wide, tall = 1 + spread(0.15), 1 + spread(0.15)
    cos, sin = turn.cos(), turn.sin()
    first = torch.stack([cos * wide, (shear * cos - sin) * tall, shift_x], 1)
    second = torch.stack([sin * wide, (shear * sin + cos) * tall, shift_y], 1)
    grid = affine_grid(torch.stack([first, second], 1), [count, 1, SIDE, SIDE], align_corners=False)
    return grid_sample(images[:, None].float(), grid, align_corners=False)[:, 0].clamp(0, 1)


def degraded(images: Tensor, generator: torch.Generator) -> Tensor:
    """Warped images, each perhaps blurred, thickened, noisy, faint or negative: the pretraining's own way."""
    drawn = warped(images.float() / (255 if images.dtype == torch.uint8 else 1), generator)

    def some(share: float) -> Tensor:
        return torch.rand(len(drawn), 1, 1, generator=generator) < share

    blurred = avg_pool2d(pad(drawn[:, None], (1, 1, 1, 1)), 3, 1)[:, 0]
    drawn = torch.where(some(0.25), blurred, drawn)
    drawn = torch.where(some(0.25), (blurred * 2).clamp(0, 1), drawn)
    drawn = drawn * (0.5 + 0.5 * torch.rand(len(drawn), 1, 1, generator=generator))
    drawn = torch.where(some(0.3), drawn + 0.15 * torch.randn(drawn.shape, generator=generator), drawn)
    return torch.where(some(0.2), 1 - drawn, drawn).clamp(0, 1)


Style = Callable[[Tensor, torch.Generator], Tensor]


def plain(images: Tensor, generator: torch.Generator) -> Tensor:
    return images


def outlined(images: Tensor, generator: torch.Generator) -> Tensor:
    return (max_pool2d(images[:, None], 3, 1, 1)[:, 0] - images).clamp(0, 1)


def noisy_negative(images: Tensor, generator: torch.Generator) -> Tensor:
    return (1 - images + 0.2 * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def low_resolution(images: Tensor, generator: torch.Generator) -> Tensor:
    return interpolate(interpolate(images[:, None], size=11, mode="area"), size=SIDE)[:, 0]


def dotted(images: Tensor, generator: torch.Generator) -> Tensor:
    thick = max_pool2d(images[:, None], 2, 1)[:, 0]
    dots = torch.zeros(SIDE, SIDE)
    dots[::2, ::2] = 1
    return pad(thick, (0, 1, 0, 1)) * dots


def broken(images: Tensor, generator: torch.Generator) -> Tensor:
    gaps = torch.rand(len(images), 1, 7, 7, generator=generator) < 0.18
    return images * (1 - interpolate(gaps.float(), size=SIDE)[:, 0])


def striped(images: Tensor, generator: torch.Generator) -> Tensor:
    phase, angle = torch.rand(2, len(images), 1, 1, generator=generator) * math.pi
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    wave = torch.sin((x * angle.cos() + y * angle.sin()) * 1.3 + 2 * phase)
    return (0.65 * images + 0.35 * (wave > 0.3)).clamp(0, 1)


STYLES: dict[str, Style] = {
    "outlined": outlined,
    "noisy negatives": noisy_negative,
    "low resolution": low_resolution,
    "dotted": dotted,
    "broken": broken,
    "striped": striped,
}
"""By what stands behind the comma of a domain's name."""


def pictures(
    classes: list[np.ndarray], style: Style, generator: torch.Generator, per_class: int = PER_CLASS
) -> Pictures:
    """`per_class` warped images of every class, its faces in turn."""
    rows = [torch.from_numpy(faces[[i % len(faces) for i in range(per_class)]]) for faces in classes]
    drawn = style(warped(torch.cat(rows).float() / 255, generator), generator)
    return Pictures((drawn * 255).byte(), torch.arange(len(classes)).repeat_interleave(per_class))


def textures(count: int, rng: np.random.Generator) -> Pictures:
    """A class is two sinusoids; an item has phases, a turn and noise of its own."""
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    drawn: list[np.ndarray] = []
    for _ in range(count):
        angles, waves = rng.uniform(0, math.pi, 2), rng.uniform(0.35, 1.6, 2)
        for _ in range(PER_CLASS):
            turned, phases = angles + rng.normal(0, 0.06, 2), rng.uniform(0, 2 * math.pi, 2)
            rays = [(x * math.cos(a) + y * math.sin(a)) * w + p for a, w, p in zip(turned, waves, phases, strict=True)]
            drawn.append(0.5 + 0.25 * (np.sin(rays[0]) + np.sin(rays[1])) + rng.normal(0, 0.06, x.shape))
    return _pictures(np.stack(drawn) * 255, PER_CLASS)


def shapes(count: int, rng: np.random.Generator) -> Pictures:
    """A class is two polygons or stars of given corners, depth, stretch and filling; an item is one drawing of it."""
    canvases: list[np.ndarray] = []
    for _ in range(count):
        parts = [
            (rng.integers(3, 8), rng.uniform(0.35, 1), rng.uniform(0.5, 1), rng.random() < 0.5, rng.uniform(-6, 6, 2))
            for _ in range(2)
        ]
        for _ in range(PER_CLASS):
            image = Image.new("L", (CANVAS, CANVAS))
            pen = ImageDraw.Draw(image)
            for size, (corners, depth, stretch, filled, (dx, dy)) in zip((13, 7), parts, strict=True):
                start = rng.uniform(-0.25, 0.25)
                angles = [start + math.pi * i / corners for i in range(2 * corners)]
                reach = [size * (depth if i % 2 else 1) for i in range(2 * corners)]
                points = [
                    (20 + dx + r * math.cos(a), 20 + dy + r * stretch * math.sin(a))
                    for a, r in zip(angles, reach, strict=True)
                ]
                pen.polygon(points, fill=160 if filled else None, outline=255)
            canvases.append(np.asarray(image))
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    moved = warped(torch.from_numpy(np.stack(canvases)).float() / 255, generator, 0.7)
    return _pictures(moved.numpy() * 255, PER_CLASS)


def photographs(rng: np.random.Generator) -> Pictures:
    """A class is a place in one of scikit-learn's two photographs; an item is a crop near it."""
    from sklearn.datasets import load_sample_images

    crops: list[np.ndarray] = []
    for photograph in load_sample_images().images:
        grey = torch.from_numpy(np.asarray(photograph, dtype=np.float32).mean(2) / 255)
        for top in range(12, grey.shape[0] - 60, 52):
            for left in range(12, grey.shape[1] - 60, 52):
                place = grey[top - 8 : top + 56, left - 8 : left + 56]
                if place.std() < 0.06:
                    continue
                generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
                items = warped(place.expand(PER_CLASS, -1, -1), generator, 1.0)
                gain = 0.8 + 0.4 * torch.rand(PER_CLASS, 1, 1, generator=generator)
                crops.append((items * gain).clamp(0, 1).numpy() * 255)
    return _pictures(np.concatenate(crops), PER_CLASS)


def digits() -> Pictures:
    """Handwritten digits of scikit-learn, 8 x 8, enlarged."""
    from sklearn.datasets import load_digits

    found = load_digits()
    large = interpolate(torch.tensor(found.images).float()[:, None] / 16, size=SIDE, mode="bilinear")[:, 0]
    return Pictures((large * 255).byte(), torch.tensor(found.target).long())


def mnist(folder: Path, per_class: int = 100) -> Pictures:
    """The first images of each digit of the test set."""
    images = np.frombuffer(gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())[16:], np.uint8)
    labels = np.frombuffer(gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes())[8:], np.uint8)
    rows = np.concatenate([np.flatnonzero(labels == digit)[:per_class] for digit in range(10)])
    chosen = torch.from_numpy(images.reshape(-1, SIDE, SIDE)[rows].copy())
    return Pictures(chosen, torch.from_numpy(labels[rows].astype(np.int64)))


def omniglot(folder: Path) -> Pictures:
    """Every character of the two small background sets: twenty drawings each, white on black."""
    drawings: dict[str, list[np.ndarray]] = {}
    for archive in sorted(folder.glob("images_background_small*.zip")):
        with zipfile.ZipFile(archive) as file:
            for name in sorted(n for n in file.namelist() if n.endswith(".png")):
                key = "/".join(name.split("/")[-3:-1])
                if len(drawings.setdefault(key, [])) < PER_CLASS:
                    image = Image.open(io.BytesIO(file.read(name))).convert("L").resize((56, 56), Image.Resampling.BOX)
                    drawings[key].append(255 - np.asarray(image))
    stacked = torch.from_numpy(np.stack([d for key in sorted(drawings) for d in drawings[key]])).float()
    thick = (avg_pool2d(stacked[:, None], 2)[:, 0] * 1.6).clamp(0, 255)
    counts = torch.tensor([len(drawings[key]) for key in sorted(drawings)])
    return Pictures(thick.byte(), torch.arange(len(counts)).repeat_interleave(counts))


def _pictures(drawn: np.ndarray, per_class: int) -> Pictures:
    images = torch.from_numpy(drawn.clip(0, 255).astype(np.uint8))
    return Pictures(images, torch.arange(len(images) // per_class).repeat_interleave(per_class))


def split(all_of_it: Pictures, rng: np.random.Generator, share: float = 0.7) -> tuple[Pictures, Pictures]:
    """Classes to train on and classes to test on: no class in both."""
    order = rng.permutation(all_of_it.num_classes).tolist()
    cut = round(share * len(order))
    return all_of_it.of(order[:cut]), all_of_it.of(order[cut:])


@dataclass(frozen=True)
class Drawing:
    """Which writing systems are drawn, by ISO 15924 codes, from which fonts and with which randomness.

    Of `trained` and `held_out` each entry is a domain, such as "Armn Geor" or "Thai Laoo, striped"; none: the usual
    ones.
    """

    trained: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    fonts: Path = FONTS
    seed: int = 0

    def domains(self) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        """Scripts by domain, of training and held out. SystemExit for one that is on both sides, or pretrained on."""
        inside = _asked(TRAINED, self.trained) or {name: codes.split() for name, codes in IN_SCRIPTS.items()}
        outside = _asked(HELD_OUT, self.held_out) or {name: codes.split() for name, codes in OUT_SCRIPTS.items()}
        if self.trained and not self.held_out:
            outside = _without(outside, inside)
        if self.held_out and not self.trained:
            inside = _without(inside, outside)
        places: dict[str, str] = dict.fromkeys(PRETRAINING, "the pretraining corpus")
        for name, codes in (inside | outside).items():
            for code in codes:
                if code in places:
                    raise SystemExit(f"{name}: script {code} is in {places[code]} too; name it once, in one of them.")
                places[code] = name
        return inside, outside


def _without(usual: dict[str, list[str]], named: dict[str, list[str]]) -> dict[str, list[str]]:
    """The usual domains but for the scripts that somebody put elsewhere."""
    taken = {code for codes in named.values() for code in codes}
    left = {name: [code for code in codes if code not in taken] for name, codes in usual.items()}
    return {name: codes for name, codes in left.items() if codes}


def _asked(kind: str, given: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for entry in given:
        codes, comma, style = entry.partition(",")
        if not codes.split() or (comma and style.strip() not in STYLES):
            raise SystemExit(f"{entry!r}: expected script codes, such as 'Armn Geor', perhaps ', ' and {list(STYLES)}.")
        found[f"{kind}: {' '.join(codes.split())}" + (f", {style.strip()}" if comma else "")] = codes.split()
    return found


def _require(glyphs: Glyphs, drawing: Drawing) -> None:
    """SystemExit for a script that somebody names and no font draws."""
    for entry in (*drawing.trained, *drawing.held_out):
        for code in entry.partition(",")[0].split():
            if not glyphs[code]:
                why = "no font has a letter of it" if code in Scripts.NAMES else "there is no such ISO 15924 code"
                there = len(list(drawing.fonts.rglob("*.ttf"))) if drawing.fonts.is_dir() else 0
                raise SystemExit(
                    f"script {code!r}: {why} ({there} .ttf files under {drawing.fonts}); install one, such as Debian's "
                    "fonts-noto-core, give --fonts, or name another script."
                )


def render(data: Path, drawing: Drawing | None = None, most: int = MOST_CLASSES) -> World:
    """Draw everything. Of the usual scripts those that no font has are missing; one that is named must be there.

    SystemExit for a domain with too few letters.
    """
    drawing = drawing or Drawing()
    rng, generator = np.random.default_rng(drawing.seed), torch.Generator().manual_seed(drawing.seed)
    inside, outside = drawing.domains()
    named = inside | outside
    glyphs = letters({script for scripts in named.values() for script in scripts} | set(PRETRAINING), drawing.fonts)
    _require(glyphs, drawing)
    pen = Pen()
    whole: dict[str, Pictures] = {}
    for name, scripts in named.items():
        classes = pen.classes({k: v for script in scripts for k, v in glyphs[script].items()}, most, rng)
        if len(classes) < 2 * FEWEST:
            raise SystemExit(
                f"{name}: {len(classes)} letters found under {drawing.fonts}, and a domain needs {2 * FEWEST}; install "
                "fonts-noto-core and fonts-dejavu-core, or put more scripts into it."
            )
        whole[name] = pictures(classes, STYLES.get(name.rpartition(", ")[2], plain), generator)
    whole |= {"textures": textures(most // 2, rng), "shapes": shapes(most // 2, rng)}
    whole |= {"digits": digits(), "photographs": photographs(rng)}
    if (data / "omniglot").is_dir():
        whole["omniglot"] = omniglot(data / "omniglot")
    if (data / "mnist").is_dir():
        whole["mnist"] = mnist(data / "mnist")
    logographs = [c for name, count in PRETRAINING.items() for c in pen.classes(glyphs[name], count, rng)]
    order = rng.permutation(len(logographs)).tolist()
    unseen = min(RETENTION, len(order) // 4)
    faces = torch.from_numpy(np.stack([logographs[i][0] for i in order]))
    items = faces[:unseen].repeat_interleave(PER_CLASS, 0)
    whole[KEPT] = _pictures((degraded(items, generator) * 255).numpy(), PER_CLASS)
    halves = {name: split(whole[name], rng) for name in (*inside, "textures", "shapes")}
    others = (*outside, *(name for name in OUT_DOMAINS if name not in OUT_SCRIPTS), KEPT)
    return World(
        {name: half[0] for name, half in halves.items()},
        {name: half[1] for name, half in halves.items()},
        {name: whole[name] for name in others if name in whole},
        Pictures(faces[unseen:], torch.arange(len(faces) - unseen)),
    )


def world(cache: Path, data: Path, most: int = MOST_CLASSES, drawing: Drawing | None = None) -> World:
    """The domains, from the cache file or drawn into it."""
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        made = render(data, drawing, most)
        parts = {key: {n: (p.images, p.labels) for n, p in getattr(made, key).items()} for key in PARTS}
        torch.save(parts | {"pretraining": (made.pretraining.images, made.pretraining.labels)}, cache)
        return made
    kept = torch.load(cache, weights_only=True)
    parts = {key: {n: Pictures(*p) for n, p in kept[key].items()} for key in PARTS}
    return World(**parts, pretraining=Pictures(*kept["pretraining"]))
