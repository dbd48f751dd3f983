"""Features of a part of a run's images, kept in the run's directory for the next evaluation."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable
from itertools import chain, repeat
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sslkit import features, randomness, registry
from sslkit.errors import RunFailed
from sslkit.evaluation import told
from sslkit.evaluation.material import Material, Network, Part
from sslkit.files import in_one_piece
from sslkit.opened_run import digest_of
from sslkit.progress import counted
from sslkit.viewing import Viewing, moved

SOME = 8
"""Images whose features are computed anew to see whether those that were kept hold."""
ALIKE = 0.05
"""How far these may be from them, as a share of the largest: another batch sums in another order, and bf16 rounds."""


def features_of(material: Material, network: Network, split: Part, patches: int = 0) -> Tensor:
    """float32 `[n, d]` on the device: features of clean images, or, with `patches`, their mean over so many views."""
    key = _key(material, network, split, patches)
    cache = material.known.setdefault(key, features.FeatureCache())
    kind = f"{network.name}-{split.name}-{material.opened.branch}-{network.layer}-{'patches' if patches else 'clean'}"
    path = material.opened.run / told.FOLDER / f"{kind}-{key[:16]}.safetensors"
    keep = material.keep and network.name != "pixels"

    def compute(missing: Tensor) -> Tensor:
        with counted(f"{network.name}, {split.name} images", len(missing)) as advance:
            if patches:
                return _patches(material, network, split, missing, patches, advance)
            done = chain([0], repeat(features.CHUNK))  # it is asked before each chunk
            return features.features(
                network.module, split.images, missing, material.opened.views.clean, material.device,
                bf16=material.bf16, channels_last=material.opened.channels_last, poll=lambda: advance(next(done)),
            )  # fmt: skip

    def compute_aloud(missing: Tensor) -> Tensor:
        if network.name != "pixels":
            material.say(f"{network.name} network: features of {len(missing):,} {split.name} images")
        return compute(missing)

    if keep and not cache.known and (kept := _read(path)):
        if _sound(*kept, split, compute):
            cache.known["features", split.name] = kept
        else:
            material.say(f"{path}: holds features that are not those of this network, and is not used")
    before = _known(cache)
    rows = cache.get(("features", split.name), split.where, compute_aloud).to(material.device)
    if not rows.isfinite().all():
        raise RunFailed(f"{material.opened.run}: features of the {network.name} network are not finite, so nothing can "
                        "be classified by them; `sslkit doctor` says when the run broke")  # fmt: skip
    if keep and _known(cache) > before:
        _write(material.opened.run, path, cache, split)
    return rows


def _patches(
    material: Material, network: Network, split: Part, where: Tensor, number: int, advance: Callable[[int], None]
) -> Tensor:
    """Views are drawn for CHUNK neighbours in the set at a time, for those that are not wanted, too.

    So an image has the same ones whatever else was wanted with it, or before. `where` ascends.
    """
    views, size = material.opened.views, features.CHUNK
    kinds = [spec.kind for spec in views.specs]
    chosen = [v for v, kind in enumerate(kinds) if kind == "global"] or list(range(len(kinds)))
    draws = -(-number // len(chosen))
    viewing, found, cells = Viewing(split.images, views), [], where // size
    autocast = torch.autocast(material.device.type, torch.bfloat16, enabled=material.bf16)
    with features.in_eval_mode(network.module), autocast:
        for cell in cells.unique().tolist():
            neighbours = torch.arange(cell * size, min((cell + 1) * size, len(split.images)))
            random = randomness.generator(0, f"evaluation/patches/{split.name}", cell)
            drawn = viewing.draw(neighbours.repeat_interleave(draws), random)
            for part in where[cells == cell].split(max(1, size // draws)):
                rows = ((part - cell * size)[:, None] * draws + torch.arange(draws)).flatten()
                made = _views(viewing, part, {name: values[rows] for name, values in drawn.items()}, material.device)
                outputs = [network.module(_as_kept(made[v], material)).float() for v in chosen]
                seen = torch.stack(outputs, dim=1).reshape(len(part), draws * len(chosen), -1)
                found.append(seen[:, :number].mean(dim=1))
                advance(len(part))
    return torch.cat(found)


def _views(viewing: Viewing, part: Tensor, parameters: dict[str, Tensor], device: torch.device) -> list[Tensor]:
    """Views of these images, each as often in succession as there are rows of parameters for it."""
    times = len(next(iter(parameters.values()))) // len(part)
    if viewing.originals:
        pixels = moved(viewing.read(part.repeat_interleave(times), parameters), device)
    else:
        pixels = viewing.images.read(part).to(device).repeat_interleave(times, dim=0)
    return viewing.make(pixels, {name: values.to(device) for name, values in parameters.items()})


def _as_kept(pixels: Tensor, material: Material) -> Tensor:
    return pixels.contiguous(memory_format=torch.channels_last) if material.opened.channels_last else pixels


def _key(material: Material, network: Network, split: Part, patches: int) -> str:
    """Changes whenever the features may; `clean` is known by what it makes of a few pictures of noise."""
    shape = (2, *split.images.read(split.where[:1]).shape[1:])
    noise = torch.randint(0, 256, shape, generator=randomness.generator(0, "noise"), dtype=torch.uint8)
    facts = {
        "weights": network.weights, "backbone": material.opened.spec.model_dump(mode="json"),
        "use": registry.provider_of(type(material.opened.spec)).provenance(), "set": split.name,
        "data": material.data.fingerprint, "clean": digest_of({"": material.opened.views.clean(noise).float()}),
        "bf16": material.bf16, "device": material.device.type, "torch": torch.__version__, "patches": patches,
        "views": (material.recipe.view_generator.model_dump(mode="json"), features.CHUNK) if patches else None,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _known(cache: features.FeatureCache) -> int:
    return sum(len(positions) for positions, _ in cache.known.values())


def _read(path: Path) -> tuple[Tensor, Tensor] | None:
    """Positions and features that an earlier evaluation kept; a file that is damaged is as one that is not there."""
    try:
        if path.is_symlink() or not path.is_file():
            return None
        found = load_file(path)
        positions, rows = found["positions"], found["features"]
    except (OSError, SafetensorError, KeyError):
        return None
    sound = positions.dtype == torch.int64 and rows.dtype == torch.float32 and rows.ndim == 2 and len(positions) > 0
    sound = sound and positions.shape == rows.shape[:1] and bool((positions[1:] > positions[:-1]).all())
    return (positions, rows) if sound else None


def _sound(positions: Tensor, rows: Tensor, split: Part, compute: Callable[[Tensor], Tensor]) -> bool:
    """Whether some of what was kept is what the network gives: the file may be a stranger's, as all of the run."""
    if positions[0] < 0 or positions[-1] >= len(split.images):
        return False
    places = torch.linspace(0, len(positions) - 1, min(SOME, len(positions))).round().long().unique()
    anew, kept = compute(positions[places]).cpu(), rows[places]
    if anew.shape != kept.shape:
        return False
    return bool(((anew - kept).abs().amax() <= ALIKE * anew.abs().amax()).item())


def _write(run: Path, path: Path, cache: features.FeatureCache, split: Part) -> None:
    """Keep features, and remove those of the same kind that do not hold any more."""
    positions, rows = cache.known["features", split.name]
    kind = re.compile(re.escape(path.name.rpartition("-")[0]) + r"-[0-9a-f]{16}\.safetensors")
    try:
        with told.held(run):
            with in_one_piece(path) as staging:
                save_file({"positions": positions, "features": rows.cpu().contiguous()}, staging)
            for other in list(path.parent.iterdir()):
                if other != path and kind.fullmatch(other.name):
                    with contextlib.suppress(OSError):  # it may be in use, on Windows
                        other.unlink()
    except (OSError, SafetensorError) as error:
        raise RunFailed(f"{path}: cannot be written: {error}; use --no-cache, or make room") from error
