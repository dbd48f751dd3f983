"""The model card: what the weights are, how they are used, and what is known of their worth."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from sslkit import doctor, evaluation_file, local
from sslkit.api import Portable
from sslkit.errors import UserError, printable
from sslkit.evaluation_file import FLOORS
from sslkit.exporting import graphs, hub
from sslkit.exporting.prepared import Check, Job, difference, pictures_of
from sslkit.image_files import reading
from sslkit.run_directory import read_metrics
from sslkit.starting_point import InitFrom

CARD = "README.md"
ALIKE = 1e-4
"""How far resized pixels may be from the run's own, as a share of the largest."""


@dataclass(frozen=True)
class Card:
    """All that the card tells of one export."""

    job: Job
    checks: Sequence[Check]

    def text(self) -> str:
        """The card as Markdown."""
        parts = [
            self._head(), f"# {escaped(self.job.name)}", self._what(), "## Use", *self._use(),
            "## Images", self._images(), "## Training", self._training(), "## Figures", self._figures(),
            "## Verdict", self._verdict(), "## Checked", self._checked(),
            "## Licence", self._licence(),
        ]  # fmt: skip
        return "\n\n".join(parts) + "\n"

    def _has(self, file: str) -> bool:
        return any(check.file == file for check in self.checks)

    def _head(self) -> str:
        by_name = self._has(hub.WEIGHTS) and hub.is_by_name(self.job.known)
        tags = ["image-feature-extraction", "self-supervised-learning", *(["timm"] if by_name else []), "sslkit"]
        lines = [
            *(["library_name: timm"] if by_name else []), f"license: {self.job.licence or 'unknown'}",
            "pipeline_tag: image-feature-extraction", "tags:", *(f"- {tag}" for tag in tags),
        ]  # fmt: skip
        return "\n".join(["---", *lines, "---"])

    def _what(self) -> str:
        opened, known = self.job.opened, self.job.known
        architecture = known.architecture if known else use_of(opened.tables, "backbone")
        return (
            f"Features of images: a {code(architecture)} with {opened.backbone.feature_dim} features, trained by "
            "sslkit. It is the backbone alone, without the heads of the training, and has no classifier."
        )

    # ------------------------------------------------------------ how it is used

    def _use(self) -> list[str]:
        parts = []
        if self._has(hub.WEIGHTS):
            parts += self._use_timm(self.job.known) if self.job.known else [self._use_own()]
        shape = f"2, {self.job.preparation.channels}, {self.job.side}, {self.job.side}"
        if self._has(graphs.TORCH):
            parts += [
                f"`{graphs.TORCH}` normalises images itself and needs PyTorch alone. Reading it unpickles, which can "
                "run code: open one from somebody you trust.",
                _python(
                    "import torch",
                    "",
                    f'model = torch.export.load("{graphs.TORCH}").module()',
                    f"features = model(torch.rand({shape}))  # images on the scale 0..1",
                ),
            ]
        if self._has(graphs.ONNX):
            parts += [
                f"`{graphs.ONNX}` normalises images itself, too:",
                _python(
                    "import numpy",
                    "import onnxruntime",
                    "",
                    f'session = onnxruntime.InferenceSession("{graphs.ONNX}")',
                    f'images = numpy.random.rand({shape}).astype("float32")  # on the scale 0..1',
                    '(features,) = session.run(["features"], {"images": images})',
                ),
            ]
        return parts

    def _use_timm(self, known: Portable) -> list[str]:
        how = (
            'With timm 1.0.16 or newer; on the hub, `timm.create_model("hf-hub:OWNER/NAME", pretrained=True)`:'
            if hub.is_by_name(known)
            else "timm has no name for this network: it is built by these lines, and loads as it should by no shorter "
            "way."
        )
        making = _python(*hub.imports_of(known), "", 'folder = "."  # where this file lies', *hub.lines_of(known))
        return [how, making, self._use_images()]

    def _use_images(self) -> str:
        channels, size = self.job.preparation.channels, self.job.preparation.size
        mode = {1: "L", 3: "RGB"}.get(channels)
        if mode is None:
            return _python(
                "import torch",
                "",
                f"mean = torch.tensor({list(self.job.preparation.mean)}).view(-1, 1, 1)",
                f"std = torch.tensor({list(self.job.preparation.std)}).view(-1, 1, 1)",
                *self._made_up(f"2, {channels}, {size}, {size}"),
                "with torch.no_grad():",
                "    features = model((images - mean) / std)",
            )
        raw = self.job.preparation.raw
        low, high = self._range or (0.0, 65535.0)
        resize = f'F.interpolate(pixels, ({size}, {size}), mode="bicubic", antialias=True).clamp(0, 1)'
        code = _python(
            "import numpy",
            "import torch",
            *(["import torch.nn.functional as F"] if raw != size else []),
            "from PIL import Image, ImageOps",
            "",
            f"mean = torch.tensor({list(self.job.preparation.mean)}).view(-1, 1, 1)",
            f"std = torch.tensor({list(self.job.preparation.std)}).view(-1, 1, 1)",
            'image = ImageOps.exif_transpose(Image.open("picture.jpg"))',
            *(
                [
                    'if image.mode.startswith(("I", "F")):  # more than 8 bits',
                    f'    values = (numpy.asarray(image, "float64") - {low:g}) / {high - low:g}',
                    '    image = Image.fromarray(numpy.rint(255 * values.clip(0, 1)).astype("uint8"))',
                ]
                if channels == 1 or self._range is not None
                else []
            ),
            "if image.has_transparency_data:  # laid on white, as the images of the training were",
            '    white = Image.new("RGBA", image.size, "white")',
            '    image = Image.alpha_composite(white, image.convert("RGBA"))',
            f'image = ImageOps.fit(image.convert("{mode}"), ({raw}, {raw}), Image.Resampling.BICUBIC)',
            f"pixels = torch.from_numpy(numpy.array(image)).view(1, {raw}, {raw}, {channels})",
            "pixels = pixels.permute(0, 3, 1, 2) / 255",
            *([f"pixels = {resize}"] if raw != size else []),
            "with torch.no_grad():",
            "    features = model((pixels - mean) / std)",
        )
        return code if self._resizes_alike() else (
            f"{code}\n\nThe run's view generator resizes squares of {raw} px in a way of its own, so that these "
            "features differ a little from those of `sslkit embed`."
        )  # fmt: skip

    def _resizes_alike(self) -> bool:
        """Whether the code resizes as the run's view generator does."""
        made = self.job.preparation
        pictures = pictures_of(made, made.raw)
        wanted, got = self.job.opened.views.clean(pictures), made.normalise(made.resize(pictures.float() / 255))
        return made.raw == made.size or difference(wanted, got) <= ALIKE

    @property
    def _range(self) -> tuple[float, float] | None:
        """The values that the data source made 0 and 255 of, where they are not 8-bit."""
        told: Any = reading(self.job.opened).get("value_range")
        return (told[0], told[1]) if _is_range(told) else None

    def _made_up(self, shape: str) -> list[str]:
        """Lines that make some images of bands, as a file of the run's data would be read."""
        if self._range is None:
            return [f"images = torch.rand({shape})  # on the scale 0..1"]
        low, high = self._range
        return [
            f"values = {low:g} + {high - low:g} * torch.rand({shape})  # as in the files",
            f"images = (255 * ((values - {low:g}) / {high - low:g}).clip(0, 1)).round() / 255",
        ]

    def _scaled(self) -> str:
        """What the data source made of values that are not 8-bit."""
        if self._range is None:
            return ""
        low, high = self._range
        return f", on which {low:g} is 0 and {high:g} is 1, clipped there and rounded to 1/255"

    def _use_own(self) -> str:
        use = use_of(self.job.opened.tables, "backbone")
        table = {name: value for name, value in self.job.opened.tables["backbone"].items() if name != "use"}
        return (
            f"`{hub.WEIGHTS}` holds the weights of sslkit's backbone {code(use)} with the options "
            f"{code(json.dumps(table, default=str))}, which no other library builds. "
            + (
                "Without sslkit, take the graph below."
                if self._has(graphs.TORCH) or self._has(graphs.ONNX)
                else "Without sslkit, export it as a graph: `--format torch` or `--format onnx`."
            )
        )

    def _images(self) -> str:
        made = self.job.preparation
        text = (
            f"Squares of {made.size} px with {made.channels} channel{'s' * (made.channels > 1)}, on the scale 0..1, "
            f"less the mean {list(made.mean)}, over {list(made.std)}, channel by channel. The run's figures were "
            "measured on images of this size and preparation."
        )
        text += (
            f" Files were read upright, transparency was laid on white, and values of 16 bits became 0..1 by their own "
            f"scale{self._scaled()}; Pillow's `convert` alone does none of these."
        )
        if self.job.side != made.size:
            text += f" The graphs take {self.job.side} px instead, at which nothing was measured."
        return text

    # ------------------------------------------------------------ where it comes from, and what it is worth

    def _training(self) -> str:
        opened, tables = self.job.opened, self.job.opened.tables
        train, info = tables.get("train", {}), opened.info
        which = ", the best by kNN" if opened.checkpoint == "best" else ""
        rows = {
            "Recipe": f"{code(str(tables.get('name', '')))}, hash {code(str(opened.facts.get('recipe_hash', '')))}",
            **{
                words: code(use_of(tables, slot))
                for slot, words in (("loss", "Loss"), ("target_updater", "Target"), ("view_generator", "Views"))
                if isinstance(tables.get(slot), dict)
            },
            "Images": f"{info.train_images:,} of {code(use_of(tables, 'data_source'))}, fingerprint "
            f"{code(str(opened.facts.get('data_fingerprint', ''))[:12])}",
            "Weights": f"step {opened.step:,} of {info.total_steps:,} ({train.get('epochs')} epochs, batch size "
            f"{info.batch_size}){which}, {opened.branch} network, SHA-256 {code(opened.weights[:12])}",
            "Began": self._began(),
        }  # fmt: skip
        return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])

    def _began(self) -> str:
        if (given := self.job.opened.tables.get("init_from")) is not None:
            try:
                source = InitFrom.model_validate_json(json.dumps(given, default=str)).source
            except ValueError:  # a lock file that was changed, or a later sslkit's
                return "with the weights of another training (`init_from`)"
            return f"with the weights of {code(source)} (`init_from`)"
        if self.job.opened.tables["backbone"].get("pretrained"):
            return "with weights that somebody else trained (`backbone.pretrained`)"
        return f"at random, seed {self.job.opened.info.seed}"

    def _figures(self) -> str:
        records, problem = evaluation_file.shown(self.job.opened.run)
        own = [r for r in records if _table(r, "checkpoint").get("weights") == self.job.opened.weights
               and _table(r, "data").get("fingerprint") == self.job.opened.facts.get("data_fingerprint")]  # fmt: skip
        whole = [r for r in own if not _is_a_try(_table(r, "options"))]
        if whole:
            floors = {name: words for name, words in FLOORS.items()
                      if name != "initialised" or any(name in record for record in whole)}  # fmt: skip
            heads = ["Protocol", "Top-1", *(w.removeprefix("the ").capitalize() for w in floors.values()), "Data"]
            rows = [_evaluated(record, list(floors)) for record in whole]
            text = "\n".join([f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|", *rows])
        else:
            alone = " `evaluation.json` has figures of other weights or other data alone."
            other = alone if records and not own else ""
            other += f" {problem}." if problem else ""
            text = (self._measured() or "None was measured on these weights.") + other
        if len(whole) < len(own):
            text += "\n\nFigures over a part of the test images, or of kNN in which all images vote, are left out."
        if self.job.opened.checkpoint == "best":
            text += (
                "\n\nThe checkpoint was chosen by its kNN accuracy on test images, so that figures on these are a "
                "little too good."
            )
        return text

    def _measured(self) -> str:
        """The accuracy that the run itself recorded for these weights."""
        try:
            records = [r for r in read_metrics(self.job.opened.run) if isinstance(r, dict) and "knn_top1" in r]
        except OSError:
            return ""
        if self.job.opened.branch != self.job.opened.facts.get("evaluated"):
            return ""
        now = [r for r in records if r.get("step") == self.job.opened.step]
        if not now:
            return ""
        first = [r for r in records if r.get("step") == 0]
        beside = f"; the network that the run began with has {_figure(first[0]['knn_top1'])}" if first else ""
        protocol = ", ".join(
            f"{words} {now[-1][key]}"
            for key, words in (("knn_k", "k"), ("knn_temperature", "T"), ("knn_bank", "training images"),
                               ("knn_queries", "test images"))
            if isinstance(now[-1].get(key), int | float)
        )  # fmt: skip
        protocol += f", features in {self.job.opened.tables.get('train', {}).get('precision')}"
        return f"kNN top-1 in the training itself ({protocol}): {_figure(now[-1]['knn_top1'])}{beside}."

    def _verdict(self) -> str:
        try:
            found = doctor.examine_run(self.job.opened.run)
        except UserError as error:
            return f"The run could not be examined: {escaped(error.lines[0])}"
        lines = [f"`sslkit doctor` on the run: **{escaped(found.verdict)}**."]
        lines += [f"- {escaped(f.what)} ({f.severity}): {escaped(f.evidence)}"
                  for f in found.findings if f.severity != "info"]  # fmt: skip
        return "\n".join([lines[0], "", *lines[1:]]).strip()

    def _checked(self) -> str:
        return "\n".join(f"- {escaped(check.words)}" for check in self.checks)

    def _licence(self) -> str:
        if self.job.licence:
            return (
                f"{self.job.licence}, as whoever exported it said. It does not say what the images' own licences allow."
            )
        return "None was given: ask whoever trained it before you use or share it."


def _is_a_try(options: Mapping[str, Any]) -> bool:
    """Whether a figure says too little to be published: few test images, or the vote of a whole bank."""
    queries, of, k, bank = (options.get(name) for name in ("queries", "of", "k", "bank"))
    part = isinstance(queries, int) and isinstance(of, int) and queries < of
    return part or (isinstance(k, int) and isinstance(bank, int) and k >= bank)


def _evaluated(record: Mapping[str, Any], floors: Sequence[str]) -> str:
    options, data = _table(record, "options"), _table(record, "data")
    how = ", ".join(f"{name} = {value}" for name, value in options.items() if not isinstance(value, dict | list))
    top1 = _figure(record.get("top1"))
    spread = record.get("spread")
    if _is_share(spread):
        top1 += f" ± {spread:.4f}"
    images = [f"{data[key]:,} {words}" for key, words in (("train", "training"), ("test", "test"))
              if isinstance(data.get(key), int)]  # fmt: skip
    cells = (
        escaped(f"{record.get('protocol')}{f' ({how})' if how else ''}"), top1,
        *(_figure(record.get(name)) for name in floors), ", ".join(images),
    )  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _is_range(value: object) -> bool:
    numbers = isinstance(value, list) and len(value) == 2 and all(isinstance(bound, int | float) for bound in value)
    return numbers and all(abs(bound) < 1e12 for bound in cast(list[float], value))


def _table(record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = record.get(key)
    return found if isinstance(found, dict) else {}


def _figure(value: object) -> str:
    return f"{value:.4f}" if _is_share(value) else "not measured"


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _python(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def use_of(tables: Mapping[str, Any], slot: str) -> str:
    """The component in a slot, without the folder of a file that it came from."""
    use = str(_table(tables, slot).get("use"))
    found = local.split(use)
    return f"{found[0].name}:{found[1]}" if found else use


def code(text: str) -> str:
    """A text that may be a stranger's, as code inside a line or a table's cell."""
    return f"`{printable(text).replace('`', chr(39)).replace('|', '/')}`"


def escaped(text: str) -> str:
    """A text that may be a stranger's, so that Markdown takes it as it is."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", printable(text))
