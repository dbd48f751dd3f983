"""What a component may know of a run, and what the live object that it builds has to do.

The specs that build these objects are in `sslkit.api`, which offers all of this to authors. No torch at import.
Shapes: B images, V views, C channels, d dimensions. What every kind has to keep to stands under `Contract:`, in the
same eight lines for each; docs/generate.py makes tables of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from sslkit.batch import Branches, LossTerms, Needs, ViewSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# ---------------------------------------------------------------- facts


@dataclass(frozen=True)
class DataInfo:
    """What a data source knows: it is built first, and `RunInfo` follows from what it finds."""

    seed: int
    """The recipe's."""
    cache: Path
    """`$SSLKIT_DATA`, else `~/.cache/sslkit`."""
    say: Callable[[str], None] = print
    """Tells the user something worth a line (a download, images left out)."""


@dataclass(frozen=True)
class RunInfo:
    """The facts of a run that a component may need. Fields are added over time, never removed."""

    seed: int
    """The recipe's; every draw of the run follows from it."""
    device: str
    """`"cpu"` or `"cuda"`."""
    image_size: int
    """Side in pixels of the squares that `read` gives."""
    channels: int
    """Of the stored images: 1 for grey, 3 for RGB, up to 16 where a source gives other bands."""
    mean: tuple[float, ...]
    """Mean of the training images per channel, on the scale 0..1."""
    std: tuple[float, ...]
    """Standard deviation of the training images per channel, on the scale 0..1."""
    train_images: int
    """Number of training images."""
    total_steps: int
    """Optimizer steps of the whole run."""
    steps_per_epoch: int
    """Optimizer steps of an epoch; images that do not fill a last batch are left out of it."""
    batch_size: int
    """Global: over all processes and micro-batches."""
    world_size: int = 1
    """Processes that train together, each with an equal share of every batch."""
    class_names: tuple[str, ...] | None = None
    """Names of the classes, by label, where the data source has them."""
    labelled: bool = False
    """Whether the training images have labels."""
    views: tuple[ViewSpec, ...] = ()
    """What the view generator makes; empty while it is itself being built."""
    weights_follow: bool = False
    """Whether a checkpoint's weights take the place of those that a network is built with, so that pretrained ones
    need not be fetched."""
    originals: bool = False
    """Whether views are cut from the images as they lie in their files, not from squares of `image_size`."""


# ---------------------------------------------------------------- data and views


class Images(Protocol):
    """N images. `read` gives some of them; a set that fits in memory also has them all as `tensor`. A set that has the
    file of each as `files` is named by them where a run says which images were in a batch."""

    labels: Tensor | None
    """int64 `[N]`, on the CPU, or None."""
    tensor: Tensor | None
    """uint8 `[N, C, H, W]` on the CPU, or None where the images do not fit in memory."""

    def __len__(self) -> int: ...

    def read(self, indices: Tensor) -> Tensor:
        """uint8 `[n, C, H, W]` on the CPU, in the order of `indices` (int64 `[n]`). Called from several threads."""
        ...


class Originals(Images, Protocol):
    """Images that can also be had as they lie in their files, of any size and shape, for views that are cut from them.

    Where `sizes` is None there are only squares. Views are cut by as many threads as it has `workers`; without that, by
    one for each core.
    """

    sizes: Tensor | None
    """int32 `[N, 2]` on the CPU: height and width of what `original` gives."""

    def original(self, index: int) -> Tensor:
        """uint8 `[C, h, w]`, contiguous, upright and with the channels that the recipe says. Called from several
        threads.

        Raises:
            RunFailed: the file is not what it was when the source was opened.
        """
        ...


class Ordered(Images, Protocol):
    """Images that are cheap to read in some orders only, because they lie in shards."""

    def order(self, generator: torch.Generator) -> Tensor:
        """int64 `[N]`: a permutation of the positions, of one epoch. It follows from the generator alone."""
        ...

    def sample(self, n: int) -> Tensor:
        """int64, ascending: at most n positions, spread over the set and cheap to read together."""
        ...


class ImageSet(Protocol):
    """What a data source opens: images to train on, perhaps images to test on.

    Contract:
        shapes: Images `[C, S, S]`, all of one size, C from 1 to 16. `read` of n indices gives `[n, C, S, S]`, and
            `original`, where there is one, an image's own `[C, h, w]`.
        dtype: Images uint8, as stored: neither scaled nor normalised. Labels int64 from 0 on.
        device: The CPU. Where `tensor` is small enough the engine keeps a copy on the device.
        autocast: Not concerned.
        processes: The same images in the same order in each process, which takes its share of every batch.
        state: None is saved. `fingerprint` is, and a run is not resumed with another one.
        randomness: None once it is open. What `build` draws follows from its options or from `info.seed`.
        called: `build` first of all parts. `read` before each step, ahead of it in a thread of its own where the images
            do not lie on the device, and at the same time in the main thread to measure features.
    """

    train: Images
    """What is trained on."""
    test: Images | None
    """What features are measured on; None where there is none."""
    class_names: tuple[str, ...] | None
    """By label; None where they are not known."""
    fingerprint: str
    """Changes when the images, their order or the preparation change; a resumed run compares it."""
    bad: Sequence[Mapping[str, str]]
    """Images that could not be read and were left out: `path` and `problem` of each."""


class ViewMaker(Protocol):
    """Makes V views of every image of a batch, with parameters drawn per sample.

    `crop` and `appear` are pure torch on static shapes, on whatever device the images are, so that the engine may
    compile them. `crop` is geometry, `appear` everything that follows.

    Contract:
        shapes: `[B, C, H, W]` -> V crops -> V views, `[B, C, h, w]` with the side that the view's spec says. B is that
            of a micro-batch, and the shapes are the same at every step.
        dtype: Images uint8, which are not to be changed in place; crops float32 0..1; views float32, normalised.
        device: `draw` gives CPU tensors. Everything else is made on the images' device; the engine sends the
            parameters.
        autocast: Outside autocast.
        processes: Parameters are drawn for the whole batch of all processes, and each process takes its rows of them.
            So a view may depend on its own row alone.
        state: None is saved.
        randomness: In `draw` alone and from its generator alone, which is keyed by seed and step: a resumed run has the
            views that it would have had.
        called: `draw` once for each step, perhaps ahead of it in another thread; `crop` and `appear` once for each
            micro-batch, compiled where the recipe says so; `clean` to measure features.
    """

    specs: tuple[ViewSpec, ...]
    """What the views are, in their order."""

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Random parameters of n samples: CPU tensors with leading dimension n, and nothing else is random."""
        ...

    def crop(self, images: Tensor, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        """uint8 `[B, C, H, W]` -> V crops, float 0..1 `[B, C, h, w]`."""
        ...

    def appear(self, crops: Sequence[Tensor], parameters: Mapping[str, Tensor]) -> list[Tensor]:
        """V crops -> V normalised views, float `[B, C, h, w]`."""
        ...

    def clean(self, images: Tensor) -> Tensor:
        """uint8 `[B, C, H, W]` -> the same images for evaluation: no randomness, normalised as the views are."""
        ...


class OriginalViewMaker(ViewMaker, Protocol):
    """A view generator that can also cut its crops from images of any size, one image at a time."""

    def draw_sized(self, sizes: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """As `draw`, for images of these heights and widths, int `[n, 2]`. Where all are squares of `image_size` it
        gives what `draw` gives."""
        ...

    def cut(self, original: Tensor, row: Mapping[str, Tensor]) -> list[Tensor]:
        """One image uint8 `[C, h, w]` -> V crops uint8 `[C, s, s]`, each as large as its view and flipped where it is
        to be. `row` is the image's own parameters, without their first dimension. Called from several threads. The
        crops, stacked and on the scale 0..1, are what `appear` then takes."""
        ...


# ---------------------------------------------------------------- networks, loss and target


@dataclass(frozen=True)
class Portable:
    """How a public library builds the network that a backbone's weights fit into, for whoever has no sslkit."""

    library: Literal["timm"]
    architecture: str
    """`resnet18`, as the library names it."""
    arguments: Mapping[str, Any]
    """What its constructor is given, beside the architecture."""
    after: tuple[str, ...] = ()
    """Lines of Python that then change `model`, as another stem needs; they use `nn` of torch."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """What the library's own configuration of weights says of the network: `first_conv`, `classifier`,
    `fixed_input_size`."""


@dataclass(frozen=True)
class Pretrained:
    """Weights that a public library has, for the network that a backbone builds."""

    weights: Mapping[str, Tensor]
    """The state dict of that network."""
    original: Mapping[str, Tensor]
    """The same weights before anything was adapted to it or drawn for it: their digest is what a lock file pins."""


class BackboneModule(Protocol):
    """An `nn.Module`: normalised images float `[B, C, h, w]` -> features `[B, feature_dim]`.

    Contract:
        shapes: `[B, C, h, w]` -> `[B, feature_dim]`. C is `run.channels`. Sides are those of the views and, in
            evaluation, of what the view generator's `clean` gives. B is a micro-batch, several views of it with
            `train.forward = "together"`, or any number in evaluation.
        dtype: float32 in. float32 out, and under autocast any floating dtype; losses and observers get float32.
        device: Built on the CPU and moved, in the memory format channels-last where the recipe says so. A tensor that
            `forward` makes goes where its input is.
        autocast: `forward` runs under autocast to bfloat16 where `train.precision` is `"bf16"`; weights stay float32.
        processes: Each process sees its share of the batch. Every trainable parameter takes part in every step, or
            DistributedDataParallel waits for it. BatchNorm's statistics are of the own share unless
            `train.batch_norm` is `"sync"`; the engine keeps their moving averages equal.
        state: Parameters and persistent buffers, in every checkpoint. It has to bear `copy.deepcopy`, which target
            updaters use.
        randomness: Torch's default generator: keyed by the seed in `build`, by seed, step and process in `forward`.
        called: In training mode once for each view that the loss wants, a target's copy without gradient; in eval mode
            without gradient to measure features, where an image's features depend on that image alone.
    """

    feature_dim: int
    """Dimension of the features, by which the projector is built."""

    def __call__(self, images: Tensor) -> Tensor: ...


class HeadModule(Protocol):
    """An `nn.Module`: `[B, in_dim]` -> `[B, out_dim]`.

    Contract:
        shapes: `[B, in_dim]` -> `[B, out_dim]`. `in_dim` is the backbone's `feature_dim` for a projector, the
            projector's `out_dim` for a predictor. B as for a backbone.
        dtype: float32 in and out. Under autocast what the part before it gives, which is bfloat16, and any floating
            dtype out; losses and observers get float32.
        device: Built on the CPU and moved. A tensor that `forward` makes goes where its input is.
        autocast: `forward` runs under autocast to bfloat16 where `train.precision` is `"bf16"`; weights stay float32.
        processes: Each process sees its share of the batch. Every trainable parameter takes part in every step, or
            DistributedDataParallel waits for it. BatchNorm's statistics are of the own share unless
            `train.batch_norm` is `"sync"`; the engine keeps their moving averages equal.
        state: Parameters and persistent buffers, in every checkpoint. A projector has to bear `copy.deepcopy`, which
            target updaters use.
        randomness: Torch's default generator: keyed by the seed and the slot in `build`, by seed, step and
            process in `forward`.
        called: In training mode once for each view that the loss wants, a target's projector without gradient; in eval
            mode where an observer measures projections.
    """

    out_dim: int
    """Dimension of the output, by which the next part is built."""

    def __call__(self, features: Tensor) -> Tensor: ...


class LossModule(Protocol):
    """An `nn.Module` that may own parameters and buffers; they are trained and saved with the rest.

    `forward` is pure: queues and centres move in `commit`, once after each optimizer step.

    Contract:
        shapes: Each list of `Branches` has V entries, `[B, feature_dim]` or `[B, d]`, and None for what `needs` left
            out. `total` and each term are 0-dim; a term's name is its key in `metrics.jsonl`.
        dtype: Branches come in float32 or better, whatever the networks computed in, and `total` is so too: float32 or
            float64.
        device: Built on the CPU and moved. A tensor that `forward` makes goes where the branches are.
        autocast: `forward` and `commit` run outside autocast.
        processes: A loss that is `additive` is given each process's share of the batch, and the mean over processes is
            taken. Any other is given the whole batch in each process, with gradients. `commit` is given the whole batch
            in each, and has to do the same in each.
        state: Parameters, which are trained in the group `loss`, and persistent buffers, in every checkpoint. On a GPU
            `commit` is called after a step that was not finite, too, and buffers are put back as they were: keep what
            moves in buffers.
        randomness: Torch's default generator: keyed by the seed in `build`, by seed and step in `forward`, the same in
            every process.
        called: `needs` before the first step; `forward` once for each micro-batch; `commit` once for each optimizer
            step, after the target has moved, without gradient and with all micro-batches joined.
    """

    additive: bool
    """True where the mean of the losses of micro-batches is the loss of the batch; gradient accumulation needs it. With
    several processes each then computes its own share; where it is False, all images are brought to each process."""
    prevents_collapse: bool
    """True where a constant output is a bad solution of the loss itself (negatives, a variance term, centring). False
    where only a predictor and a slow target keep it away; `train` then warns of parts that cannot. May be left out: a
    loss that does not say is not warned of."""

    def needs(self, specs: Sequence[ViewSpec]) -> Needs:
        """Which views the loss wants of each branch.

        Raises:
            UserError: the recipe's views or branches do not suffice.
        """
        ...

    def __call__(self, branches: Branches) -> LossTerms: ...

    def commit(self, branches: Branches) -> None:
        """Move the loss's own state, given the branches (detached) of the step that was just taken. May be left out."""
        ...


class TargetModule(Protocol):
    """Makes the target network and moves it. An `nn.Module`, so that state of its own would be saved.

    Contract:
        shapes: `online` and `target` are backbone and projector together, with equal parameters in equal order.
        dtype: `tau(step)` is a Python float from 0 to 1. `update` gets it as it is on a CPU, and on a GPU as a 0-dim
            float64 tensor there. Parameters are float32.
        device: `make` runs on the CPU, before everything is moved. `update` works where the parameters are, and reads
            no number from the device.
        autocast: `update` runs outside autocast; the target's forward inside it, as the online network's.
        processes: Each process moves its own target, by the same rule from the same weights: nothing is exchanged.
        state: The target's parameters and persistent buffers, and those of the module itself, in every checkpoint.
            Counting calls is state too; `step` says it without.
        randomness: None is needed; torch's default generator is keyed by seed and step.
        called: `make` once. `tau` for any step, in any order. `update` once after each step of the optimizer, whatever
            the accumulation, with gradients recorded unless it says `torch.no_grad()`; after a step that was not finite
            it is called with tau = 1 on a GPU, and not on a CPU.
    """

    source: Literal["copy", "online", "none"]
    """`copy`: a second network. `online`: the online projections under stop-gradient (a second forward would move
    BatchNorm twice). `none`: no target branch."""
    evaluated: Literal["online", "target"]
    """The branch whose features are measured and exported."""

    def make(self, online: nn.Module) -> nn.Module | None:
        """The target network at the start of the run, without gradients; None unless `source` is `copy`."""
        ...

    def tau(self, step: int) -> float | None:
        """How much of the target remains at the update after step `step`; a number wherever `source` is `copy`, None
        where there is no such number."""
        ...

    def update(self, online: nn.Module, target: nn.Module, tau: float | Tensor) -> None:
        """Move the target once, after the optimizer's step."""
        ...


# ---------------------------------------------------------------- optimizer


@dataclass
class ParamGroup:
    """Parameters that share a learning rate and weight decay."""

    part: str
    """`backbone`, `projector`, `predictor` or `loss`."""
    excluded: bool
    """Bias or normalisation parameters, which by default take no weight decay and no LARS adaptation."""
    parameters: list[nn.Parameter]

    def as_torch(self) -> dict[str, Any]:
        """What a torch optimizer takes as one parameter group; `part` and `excluded` stay readable in it."""
        return {"params": self.parameters, "part": self.part, "excluded": self.excluded}
