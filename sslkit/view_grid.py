"""A picture of what the networks are shown: training images, their views, and what was drawn for each view.

It works for every view generator that keeps the contract `sslkit.contracts.ViewMaker`: the normalisation is found out
from `clean`, and the parameters are written by the names that `draw` gives them.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from sslkit import randomness
from sslkit.api import Images, ImageSet, Originals, RunInfo, ViewMaker
from sslkit.build import build_views, choose_device
from sslkit.errors import RunFailed, UserError
from sslkit.features import normalisation
from sslkit.files import in_one_piece
from sslkit.recipe import read_recipe
from sslkit.telling import tell
from sslkit.view_words import Box, box, drawn, words
from sslkit.viewing import Viewing

SUFFIXES = (".png", ".jpg", ".jpeg")
SEARCHED = 10_000
"""Of so many images, in random order, those that are shown are taken: enough to find every class that is not rare."""

PAPER, INK, SOFT, ALARM = "#ffffff", "#1b1f24", "#59636e", "#d00000"
VIEW_COLOURS = ("#0969da", "#bc4c00", "#1a7f37", "#8250df", "#bf3989", "#9a6700", "#1b7c83", "#57606a")
GAP, MARGIN, SIDE, LARGEST = 14, 16, 144, 256
"""Pixels: between cells, around all, and what the side of a view is brought near to, and at most."""
NAMES, BESIDE, BELOW, NARROWEST = 104, 158, 128, 600
"""Pixels: width of the images' names, of a view's words beside it and below it, and of the whole at least."""
FEW, MOST_LINES = 3, 20
"""Up to so many views have their words beside them; and no view has more lines."""


# ---------------------------------------------------------------- what is shown


@dataclass
class Sample:
    """A training image with its views: pictures as float 0..1 `[C, h, w]`."""

    title: list[str]
    original: Tensor
    views: list[Tensor]
    words: list[list[str]]
    """What was drawn for each view."""
    common: list[str]
    """What was drawn for all views of the image alike."""
    boxes: list[Box | None]
    """Each view's crop in pixels of the original, where that is known."""
    difference: tuple[float, float] | None
    """Maximum and mean of |v1 - v2| of the normalised views; None where no two views have one size."""

    @property
    def columns(self) -> list[list[str]]:
        """What is written beside or below: the margin, the original, each view."""
        return [self.title, self.common, *self.words]


def samples(data: ImageSet, run: RunInfo, views: ViewMaker, images: int) -> tuple[list[Sample], bool]:
    """The images of a run that are shown, always the same for one seed, and whether the normalisation was undone."""
    indices = chosen(data.train, run.seed, images)
    with randomness.seeded(run.seed, "view_grid"):
        parameters = Viewing(data.train, views).draw(indices, randomness.generator(run.seed, "view_grid", 1))
        return samples_of(data, views, indices, parameters)


def samples_of(
    data: ImageSet, views: ViewMaker, indices: Tensor, parameters: Mapping[str, Tensor]
) -> tuple[list[Sample], bool]:
    """These training images with the views that these parameters make, and whether the normalisation was undone."""
    viewing, train = Viewing(data.train, views), data.train
    squares = train.read(indices[:1] if viewing.originals else indices)
    pixels = viewing.read(indices, parameters) if viewing.originals else squares
    with torch.no_grad():
        made = [v.float() for v in viewing.make(pixels, parameters)]
        line = normalisation(views, squares.shape[1:])
    if line is not None and any(v.shape[1] != len(line[0]) for v in made):
        line = None
    pair = _pair(made)
    found, count = [], len(made)
    grey = all(view.shape[1] == 1 for view in made)
    for i, index in enumerate(indices.tolist()):
        original = cast(Originals, train).original(index) if viewing.originals else squares[i]
        side = (original.shape[-2], original.shape[-1])
        own, common = drawn(parameters, i, len(indices), count)
        gap = None if pair is None else (made[pair[0]][i] - made[pair[1]][i]).abs()
        found.append(
            Sample(
                [*_titles(data, index), *([f"{side[1]} x {side[0]} px"] if viewing.originals else [])],
                original.float() / 255,
                [_undone(v[i], line) for v in made],
                [words(values, side, grey=grey) for values in own],
                words(common, side, grey=grey),
                [box(values, side) for values in own],
                None if gap is None else (float(gap.max()), float(gap.mean())),
            )
        )
    return found, line is not None


def chosen(images: Images, seed: int, count: int) -> Tensor:
    """Positions of `count` images (fewer if there are not so many), keyed by the seed, spread over the classes."""
    order = torch.randperm(len(images), generator=randomness.generator(seed, "view_grid"))[:SEARCHED]
    if images.labels is None:
        return order[:count]
    seen: Counter[int] = Counter()
    turns = []
    for place, label in enumerate(images.labels[order].tolist()):
        turns.append((seen[label], place, label))  # the first of every class comes before the second of any
        seen[label] += 1
    return order[[place for _, place, label in sorted(sorted(turns)[:count], key=lambda turn: turn[2])]]


def _undone(view: Tensor, line: tuple[Tensor, Tensor] | None) -> Tensor:
    """A view `[C, h, w]` on the scale 0..1; without a line to undo, stretched from its least value to its greatest."""
    if line is not None:
        return (view.double() - line[0]) / line[1]
    low, high = view.min(), view.max()
    return (view - low) / (high - low).clamp_min(1e-12)


def _pair(views: Sequence[Tensor]) -> tuple[int, int] | None:
    """The first two views of one size."""
    shapes = [v.shape for v in views]
    return next(((a, b) for a in range(len(views)) for b in range(a + 1, len(views)) if shapes[a] == shapes[b]), None)


def _titles(data: ImageSet, index: int) -> list[str]:
    lines = [f"image {index}"]
    if data.train.labels is not None:
        label = int(data.train.labels[index])
        named = data.class_names is not None and 0 <= label < len(data.class_names)
        name = data.class_names[label] if named and data.class_names else str(label)
        lines.insert(0, f"class {name}" if name.isdigit() else name)
    return lines


# ---------------------------------------------------------------- the picture


def draw(data: ImageSet, run: RunInfo, views: ViewMaker, name: str, images: int = 6) -> Image.Image:
    """A row for each image: the original, and each view with its parameters; beside it, how much two views differ.

    Args:
        data: Of which training images are shown.
        run: The facts of the run.
        views: Makes the views, here on the CPU. The run's own randomness is left as it was.
        name: Of the recipe, for the title.
        images: How many.
    """
    return _drawn(*samples(data, run, views, images), run, views, name)


def draw_batch(
    data: ImageSet, run: RunInfo, views: ViewMaker, name: str, indices: Tensor, parameters: Mapping[str, Tensor]
) -> Image.Image:
    """The same for the images at `indices`, with the views that a step made of them by these parameters."""
    return _drawn(*samples_of(data, views, indices, parameters), run, views, name)


def _drawn(shown: list[Sample], undone: bool, run: RunInfo, views: ViewMaker, name: str) -> Image.Image:
    kinds = [spec.kind for spec in views.specs]
    return _Page(shown, _headings(shown, undone, run, views, name), kinds).image


def write(data: ImageSet, run: RunInfo, views: ViewMaker, name: str, path: Path, images: int = 6) -> None:
    """`draw` into a PNG file, which a reader never sees half of.

    Raises:
        RunFailed: the disk is full, or the directory is gone.
    """
    image = draw(data, run, views, name, images)
    try:
        with in_one_piece(path) as staging:
            image.save(staging, "PNG")
    except OSError as error:
        raise RunFailed(f"{path}: cannot be written: {error.strerror or error}") from error


def show(source: str, overrides: Sequence[str], out: str | Path, images: int = 6) -> None:
    """Draw the views of a recipe into a file. Opens the data and makes views; builds no network.

    Raises:
        UserError: the recipe, its data or the file do not allow it.
    """
    path = Path(out)
    check_suffix(path)
    if images < 1:
        raise UserError(f"--images {images}: should be 1 or more")
    recipe = read_recipe(source, overrides)
    data, run, views = build_views(recipe, choose_device("cpu"), tell)
    image = draw(data, run, views, recipe.name, images)
    try:
        image.save(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None
    tell(f"{path}: {min(images, len(data.train))} images, {len(views.specs)} views of each")


def check_suffix(path: Path) -> None:
    """
    Raises:
        UserError: the name does not say what kind of picture to write.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: should end in .png or .jpg, which says what kind of picture to write")


def _headings(shown: Sequence[Sample], undone: bool, run: RunInfo, views: ViewMaker, name: str) -> list[str]:
    sizes = Counter((spec.kind, spec.size) for spec in views.specs)
    kinds = len({kind for kind, _ in sizes})
    listed = ", ".join(f"{n} {f'{kind} ' if kinds > 1 else ''}of {size} px" for (kind, size), n in sizes.items())
    images = f"{len(shown)} training images" if len(shown) > 1 else "a training image"
    lines = [f"{name}: views of {images}"]
    lines.append(f"Seed {run.seed}. Views: {listed}.")
    if undone:
        lines[-1] += " The normalisation is undone; |v1 - v2| is of the normalised views."
    else:
        lines[-1] += " The normalisation cannot be undone: each view is stretched from its least value to its greatest."
    if not any(words for sample in shown for words in (*sample.words, sample.common)):
        lines.append("The view generator draws no parameters for them.")
    else:
        lines.append("Changes are listed where they were made; those of colour in the order in which they come.")
    if run.channels not in (1, 3):
        first = "the first is shown" if run.channels == 2 else "the first three are shown as red, green and blue"
        lines.append(f"The images have {run.channels} channels; {first}.")
    return lines


class _Page:
    """Lays the cells out and draws them: a column for the images' names, one for the originals, one for each view."""

    def __init__(self, shown: Sequence[Sample], headings: Sequence[str], kinds: Sequence[str]) -> None:
        self.big, self.plain, self.small = (_Type(size) for size in (20, 14, 12))
        views = shown[0].views
        zoom = _zoom(max(max(v.shape[-2:]) for v in views))
        self.zoom = zoom
        """Of views."""
        self.beside = len(views) <= FEW
        """Whether words stand beside their picture or below it."""
        self._measure(shown)

        width = max(2 * MARGIN + sum(self.widths) + GAP * (len(self.widths) - 1), NARROWEST)
        title = self.big.wrapped(headings[0], width - 2 * MARGIN)
        notes = [line for text in headings[1:] for line in self.plain.wrapped(text, width - 2 * MARGIN)]
        top = MARGIN + self.big.line * len(title) + self.plain.line * (len(notes) + 1) + GAP
        heights = [self._height(sample) for sample in shown]
        self.image = Image.new("RGB", (width, top + sum(heights) + (len(shown) - 1) * GAP + MARGIN), PAPER)
        self.pen = ImageDraw.Draw(self.image)
        y = self._lines(MARGIN, MARGIN, title, self.big, INK)
        y = self._lines(MARGIN, y, notes, self.plain, SOFT) + GAP
        self.pen.text((self._x(1), y), "original", SOFT, self.plain.font)
        for v, kind in enumerate(kinds):
            local = " (local)" if kind == "local" else ""
            self.pen.text((self._x(v + 2), y), f"view {v + 1}{local}", _colour(v), self.plain.font)
        for sample, height in zip(shown, heights, strict=True):
            self._row(top, sample)
            top += height + GAP

    def _measure(self, shown: Sequence[Sample]) -> None:
        """Widths of the columns, of the pictures in them and of the words."""
        originals = max(round(sample.original.shape[-1] * self._of_original(sample)) for sample in shown)
        self.pictures = [0, originals, *(round(view.shape[-1] * self.zoom) for view in shown[0].views)]
        columns = list(zip(*(sample.columns for sample in shown), strict=True))
        wordy = [any(texts) for texts in columns]
        if self.beside:
            self.words = [NAMES, *(BESIDE * some for some in wordy[1:])]
            both = zip(self.pictures, self.words, strict=True)
            self.widths = [picture + (words + 8 if words and picture else words) for picture, words in both]
        else:
            self.words = self.widths = [NAMES, *(max(BELOW, picture) for picture in self.pictures[1:])]

    def _of_original(self, sample: Sample) -> float:
        side = max(sample.original.shape[-2:])
        return self.zoom if side * self.zoom <= LARGEST else _zoom(side)

    def _zoomed(self, sample: Sample) -> list[tuple[Tensor, float]]:
        """Its pictures, and how many pixels of the page one of theirs takes."""
        return [(sample.original, self._of_original(sample)), *((view, self.zoom) for view in sample.views)]

    def _height(self, sample: Sample) -> int:
        margin = self.small.line * len(self._words(sample, 0)) + self.plain.line * len(_difference(sample))
        heights = [margin]
        for column, (picture, zoom) in enumerate(self._zoomed(sample), 1):
            words = self.small.line * len(self._words(sample, column))
            side = round(picture.shape[-2] * zoom)
            heights.append(max(side, words) if self.beside else side + 4 + words)
        return max(heights)

    def _row(self, top: int, sample: Sample) -> None:
        y = self._lines(MARGIN, top, self._words(sample, 0), self.small, INK)
        for line, colour in _difference(sample):
            y = self._lines(MARGIN, y, [line], self.plain if colour == ALARM else self.small, colour)
        for column, (values, zoom) in enumerate(self._zoomed(sample), 1):
            x, picture = self._x(column), _picture(values, zoom)
            self.image.paste(picture, (x, top))
            at = (x + picture.width + 8, top) if self.beside else (x, top + picture.height + 4)
            self._lines(*at, self._words(sample, column), self.small, INK)
        for v, crop in enumerate(sample.boxes):
            if crop is not None:
                self._outline(top, crop, self._of_original(sample), _colour(v))

    def _outline(self, top: int, crop: Box, zoom: float, colour: str) -> None:
        y, x, height, width = (round(n * zoom) for n in crop)
        left = self._x(1) + x
        corner = left + max(1, width) - 1, top + y + max(1, height) - 1
        self.pen.rectangle((left, top + y, *corner), outline=colour, width=2)

    def _words(self, sample: Sample, column: int) -> list[str]:
        lines = [line for text in sample.columns[column] for line in self.small.wrapped(text, self.words[column])]
        return (
            lines if len(lines) <= MOST_LINES else [*lines[: MOST_LINES - 1], f"… {len(lines) - MOST_LINES + 1} more"]
        )

    def _x(self, column: int) -> int:
        return MARGIN + sum(self.widths[:column]) + GAP * column

    def _lines(self, x: int, y: int, lines: Sequence[str], kind: _Type, colour: str) -> int:
        """Write lines, and tell where the next one goes."""
        for line in lines:
            self.pen.text((x, y), line, colour, kind.font)
            y += kind.line
        return y


class _Type:
    """Pillow's own font in one size."""

    def __init__(self, size: int) -> None:
        self.font, self.line = ImageFont.load_default(size=size), round(size * 1.35)

    def wrapped(self, text: str, width: int) -> list[str]:
        """The text in lines of `width` pixels; a word that is longer is cut."""
        lines = [""]
        for word in _drawable(text).split():
            joined = f"{lines[-1]} {word}".strip()
            if self.font.getlength(joined) <= width:
                lines[-1] = joined
                continue
            while self.font.getlength(word) > width and len(word) > 2:
                word = f"{word[:-2]}…"
            lines.append(word)
        return [line for line in lines if line]


def _drawable(text: str) -> str:
    """The text without accents, and `?` for what the font has no letter for."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return "".join(c if (c.isascii() and c.isprintable()) or c in "°…" else "?" for c in plain)


def _difference(sample: Sample) -> list[tuple[str, str]]:
    """What is written in the margin about |v1 - v2|, in which colour."""
    if sample.difference is None:
        return [("no two views of one size", SOFT)]
    most, mean = sample.difference
    if most == 0:
        return [("identical:", ALARM), ("|v1 - v2| = 0", ALARM)]
    colour = SOFT if math.isfinite(most) else ALARM
    return [("|v1 - v2|", colour), (f"max {most:.3g}", colour), (f"mean {mean:.3g}", colour)]


def _colour(view: int) -> str:
    return VIEW_COLOURS[view % len(VIEW_COLOURS)]


def _zoom(side: int) -> float:
    return max(1, round(SIDE / side)) if side <= LARGEST else LARGEST / side


def _picture(values: Tensor, zoom: float) -> Image.Image:
    """Float 0..1 `[C, h, w]` as a picture; enlarged so that every pixel is seen."""
    shown = values[:3] if len(values) >= 3 else values[:1]
    pixels = shown.double().nan_to_num().mul(255).round_().clamp_(0, 255).byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels if len(shown) == 3 else pixels[..., 0])
    size = max(1, round(image.width * zoom)), max(1, round(image.height * zoom))
    return image.resize(size, Image.Resampling.NEAREST if zoom >= 1 else Image.Resampling.LANCZOS)
