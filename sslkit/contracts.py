"""What a component may know of a run, and what the live object that it builds has to do.

The specs that build these objects are in `sslkit.api`, which offers all of this to authors. No torch at import.
Shapes: B images, V views, C channels, d dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
    cache: Path
    """`$SSLKIT_DATA`, else `~/.cache/sslkit`."""
    say: Callable[[str], None] = print
    """Tells the user something worth a line (a download, images left out)."""


@dataclass(frozen=True)
class RunInfo:
    """The facts of a run that a component may need. Fields are added over time, never removed."""

    seed: int
    device: str
    """`"cpu"` or `"cuda"`."""
    image_size: int
    """Side of the stored images, in pixels."""
    channels: int
    mean: tuple[float, ...]
    """Mean of the training images per channel, on the scale 0..1."""
    std: tuple[float, ...]
    """Standard deviation of the training images per channel, on the scale 0..1."""
    train_images: int
    total_steps: int
    """Optimizer steps of the whole run."""
    steps_per_epoch: int
    batch_size: int
    """Global: over all processes and micro-batches."""
    world_size: int = 1
    class_names: tuple[str, ...] | None = None
    labelled: bool = False
    """Whether the training images have labels."""
    views: tuple[ViewSpec, ...] = ()


# ---------------------------------------------------------------- data and views


class Images(Protocol):
    """N images. `read` gives some of them; a set that fits in memory also has them all as `tensor`."""

    labels: Tensor | None
    """int64 `[N]`, on the CPU, or None."""
    tensor: Tensor | None
    """uint8 `[N, C, H, W]` on the CPU, or None where the images do not fit in memory."""

    def __len__(self) -> int: ...

    def read(self, indices: Tensor) -> Tensor:
        """uint8 `[n, C, H, W]` on the CPU, in the order of `indices` (int64 `[n]`). Called from several threads."""
        ...


class ImageSet(Protocol):
    """What a data source opens: images to train on, perhaps images to test on."""

    train: Images
    test: Images | None
    class_names: tuple[str, ...] | None
    fingerprint: str
    """Changes when the images, their order or the preparation change; a resumed run compares it."""
    bad: Sequence[Mapping[str, str]]
    """Images that could not be read and were left out: `path` and `problem` of each."""


class ViewMaker(Protocol):
    """Makes V views of every image of a batch, with parameters drawn per sample.

    `crop` and `appear` are pure torch on static shapes, on whatever device the images are, so that the engine may
    compile them. They are separate because images of varying size are cropped one by one in loader workers, while
    everything that follows is batched.
    """

    specs: tuple[ViewSpec, ...]

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


# ---------------------------------------------------------------- networks, loss and target


class BackboneModule(Protocol):
    """An `nn.Module`: normalised images float `[B, C, h, w]` -> features `[B, feature_dim]`."""

    feature_dim: int

    def __call__(self, images: Tensor) -> Tensor: ...


class HeadModule(Protocol):
    """An `nn.Module`: `[B, in_dim]` -> `[B, out_dim]`."""

    out_dim: int

    def __call__(self, features: Tensor) -> Tensor: ...


class LossModule(Protocol):
    """An `nn.Module` that may own parameters and buffers; they are trained and saved with the rest.

    `forward` is pure: queues and centres move in `commit`, once after each optimizer step. It is called outside
    autocast, with branches in float32.
    """

    additive: bool
    """True where the mean of the losses of micro-batches is the loss of the batch; gradient accumulation needs it."""
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
    """Makes the target network and moves it. An `nn.Module`, so that state of its own would be saved."""

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
