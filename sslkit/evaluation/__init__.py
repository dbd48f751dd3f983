"""What a run's features are worth: named protocols, with the figures of a random network beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

from sslkit.errors import UserError
from sslkit.evaluation import told
from sslkit.evaluation.protocols import OF, ONCE, WORDS, Wanted, given, percentages, several
from sslkit.evaluation.told import Evaluation
from sslkit.evaluation_file import FILE
from sslkit.telling import tell

if TYPE_CHECKING:
    from sslkit.evaluation.material import Material
    from sslkit.evaluation.scoring import Score
    from sslkit.opened_run import Branch, OpenedRun

__all__ = ["Evaluation", "command", "evaluate"]


def evaluate(
    run_dir: str | PathLike[str],
    protocols: Sequence[str] | str = ("knn", "linear"),
    *,
    branch: Branch = "evaluated",
    checkpoint: Literal["last", "best"] | int = "last",
    k: int | None = None,
    temperature: float | None = None,
    bank: int | None = None,
    queries: int = 0,
    layer: Literal["backbone", "projection"] = "backbone",
    labels: Sequence[float] | float | None = None,
    epochs: int | None = None,
    patches: int | None = None,
    seeds: int | None = None,
    floor: bool = True,
    cache: bool = True,
    overrides: Sequence[str] | str = (),
    device: Literal["auto", "cpu", "cuda"] = "auto",
    allow_local_code: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """Measure what a run's features are worth: what `sslkit evaluate` does.

    The figures are written to `evaluation.json` in the run's directory, each as soon as it is there, and into its
    report, if it has one. Features are kept in `evaluation/` and used again while the weights are the same.

    Args:
        run_dir: The run's directory.
        protocols: Of `knn`, `linear`, `linear_sgd`, `finetune` and `patches`; docs/reference/evaluation.md describes
            them.
        branch: Whose weights; `evaluated` is the branch that the run's own figures are of.
        checkpoint: `last`, `best` or the number of a step. `best` was chosen by kNN on the test images.
        k: Neighbours that vote in kNN; None is what the run's own kNN has.
        temperature: Of their weights exp(cosine / temperature); None likewise.
        bank: Training images in kNN's bank, and in no other protocol's; None and 0 are all.
        queries: Test images, of every protocol; 0 is all.
        layer: Whose output the features are: the backbone's or the projector's.
        labels: Percentages of the training images whose labels fine-tuning sees; None is 1, 10 and 100.
        epochs: Of `linear_sgd` and `finetune`; None is the protocol's own number.
        patches: Views of an image whose features are averaged; None is 16.
        seeds: How often what is drawn at random (splits, batches) is drawn; None is once.
        floor: Measure the random network and raw pixels, too.
        cache: Use features that were kept, and keep them.
        overrides: Keys of `data_source`, as `sslkit train --set` takes them: `data_source.root=...`. Other data than
            those of the run are taken only if they are named so.
        device: Where; `auto` is CUDA where there is a device.
        allow_local_code: Let the run's own copies of components in files beside its recipe run.
        say: Told what goes on.

    Raises:
        UserError: there is no run, its data have no labels or are not what they were, an argument does not fit, or
            none of the protocols has it.
        RunFailed: a checkpoint is damaged, or the features are not finite.
    """
    named, set_to = several(protocols), several(overrides)
    shares = None if labels is None else several(labels)
    own = given(named, k=k, temperature=temperature, bank=bank, epochs=epochs, patches=patches, seeds=seeds,
                labels=shares)  # fmt: skip
    wanted = Wanted(named, queries=queries, layer=layer, floor=floor, cache=cache, overrides=set_to, **own)
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device: should be 'auto', 'cpu' or 'cuda', not {device!r}")
    from sslkit.opened_run import open_run

    opened = open_run(run_dir, branch, checkpoint, allow_local_code=allow_local_code)
    return _evaluate(opened, wanted, device, say)


def command(runs: Sequence[str], **how: Any) -> None:
    """What the command does; its options are in `sslkit.cli_use`."""
    protocols = how["protocols"] or ("knn", "linear")
    labels = None if how["labels"] is None else percentages(how["labels"])
    own = given(protocols, labels=labels, **{name: how[name] for name in OF if name != "labels"})
    wanted = Wanted(
        protocols, queries=how["queries"], layer=how["layer"], floor=not how["no_floor"], cache=not how["no_cache"],
        overrides=how["overrides"], **own,
    )  # fmt: skip
    from sslkit import local
    from sslkit.opened_run import open_run

    leave = local.is_allowed()
    opened = [open_run(run, how["branch"], how["checkpoint"], allow_local_code=leave) for run in runs]
    _same(opened, wanted)
    found = [_evaluate(one, wanted, how["device"], partial(tell, error=True)) for one in opened]
    if how["as_json"]:
        tell(json.dumps(_as_json(found), indent=1))
    elif how["markdown"]:
        tell(told.markdown(found))
    else:
        tell("\n".join(_told(found)))


def _told(found: Sequence[Evaluation]) -> Iterator[str]:
    """All that the command prints."""
    yield told.table(found)
    yield from told.warnings(found)
    bases = dict.fromkeys(str(record["protocol"]) for record in found[0].records)
    for name in dict.fromkeys("patches" if base.startswith("patches") else base for base in bases):
        yield f"{name}: {WORDS[name]}"
    yield ONCE
    record = found[0].records[0]
    data, test = record["data"], record["options"]["test_set"]
    yield f"Data: {data['train']:,} training and {data['test']:,} test images ({test}), {data['classes']} classes"
    yield f"Weights: step {record['checkpoint']['step']}, {record['branch']} network"
    if record["checkpoint"]["which"] == "best":
        yield "The checkpoint was chosen by kNN on the test images, which favours its figures."
    if len(found) > 1:
        yield f"+- is the sample standard deviation over {len(found)} runs"
    yield told.markdown(found)
    for one in found:
        yield f"{one.run / FILE}: has these figures and all that they depend on"


def _as_json(found: Sequence[Evaluation]) -> dict[str, Any]:
    return {
        "runs": [{"run": str(one.run), "name": one.name, "seed": one.seed, "records": one.records} for one in found],
        "over_runs": [
            {"protocol": record["protocol"], "options": record["options"], "top1": top1, "spread": spread,
             "runs": len(found)}
            for record, top1, spread in told.over_runs(found)
        ],
    }  # fmt: skip


def _same(opened: Sequence[OpenedRun], wanted: Wanted) -> None:
    """Mean and spread are of runs that differ in their seed alone.

    Raises:
        UserError: they differ in something else, or two are copies of one, or of one seed.
    """
    if len(opened) < 2:
        return
    from sslkit.diff import differences
    from sslkit.evaluation.scoring import knn_options

    places = [one.run.resolve() for one in opened]
    if twice := next((one for one in opened if places.count(one.run.resolve()) > 1), None):
        raise UserError(f"{twice.run}: is given twice")
    first = opened[0]
    recipe = first.recipe(wanted.overrides)
    for one in opened[1:]:
        theirs = one.recipe(wanted.overrides)
        changes = [change for change in differences(recipe, theirs) if change.key != "seed"]
        if changes:
            more = f" and {len(changes) - 1} more" if len(changes) > 1 else ""
            raise UserError(f"{first.run} and {one.run} differ in more than their seed ({changes[0]}{more}), so a mean "
                            "over them means nothing; evaluate them one at a time")  # fmt: skip
        if (first.step, first.branch) != (one.step, one.branch):
            raise UserError(f"{first.run} and {one.run} have weights of step {first.step} ({first.branch}) and "
                            f"{one.step} ({one.branch}); choose a checkpoint that both have")  # fmt: skip
        own, others = knn_options(recipe, wanted), knn_options(theirs, wanted)
        if own != others and {"knn", "patches"} & set(wanted.protocols):
            raise UserError(
                f"{first.run} and {one.run} measure kNN with k {own[0]}, T {own[1]:g} and with k {others[0]}, T "
                f"{others[1]:g}, whose figures do not compare; give --k and --temperature"
            )
        if first.facts.get("data_fingerprint") != one.facts.get("data_fingerprint"):
            raise UserError(f"{first.run} and {one.run} were trained on other data; evaluate them one at a time")
    seeds: dict[object, OpenedRun] = {}
    for one in opened:
        for sample in (one.info.seed, one.weights):
            if (other := seeds.setdefault(sample, one)) is not one:
                what = f"are both of seed {sample}" if sample == one.info.seed else "have the same weights"
                raise UserError(f"{other.run} and {one.run} {what}, so they are not two samples of what the training "
                                "varies by; give runs of different seeds")  # fmt: skip


def _evaluate(opened: OpenedRun, wanted: Wanted, device: str, say: Callable[[str], None]) -> Evaluation:
    from sslkit import local
    from sslkit.evaluation import material as materials
    from sslkit.evaluation import scoring

    told.prepare(opened.run, say)
    with local.allowed(opened.allow_local_code):
        material = materials.open_material(opened, wanted.overrides, wanted.queries, device, wanted.cache, say)
        networks = materials.networks(material, wanted.layer, wanted.floor)
        records = []
        for protocol in scoring.protocols_of(material, wanted):
            scores = [scoring.score(material, network, protocol, wanted) for network in networks]
            record = _record(material, wanted, [one for one in scores if one is not None])
            told.keep(opened.run, [record], say)
            records.append(record)
    if (opened.run / "report.html").is_file():
        from sslkit import report

        with told.held(opened.run):
            report.write(opened.run)
    return Evaluation(opened.run, material.recipe.name, material.recipe.seed, records)


def _record(material: Material, wanted: Wanted, scores: Sequence[Score]) -> dict[str, Any]:
    """What `evaluation.json` says of a protocol; docs/reference/evaluation.md promises its keys."""
    import torch

    from sslkit import __version__

    opened, trained = material.opened, scores[0]
    data = {
        "fingerprint": material.data.fingerprint, "train": len(material.train.where), "test": len(material.test.where),
        "classes": material.classes,
    }  # fmt: skip
    weights = {"step": opened.step, "which": opened.checkpoint, "weights": opened.weights}
    return {
        "protocol": trained.protocol.name, "title": trained.protocol.title, "options": trained.protocol.options,
        "branch": opened.branch, "checkpoint": weights, "data": data, "top1": trained.top1, "spread": trained.spread,
        "seeds": list(trained.seeds), **{one.network: one.top1 for one in scores[1:]},
        "chosen": list(trained.chosen), "seconds": round(sum(one.seconds for one in scores), 2),
        "recipe_hash": opened.facts.get("recipe_hash"), "overrides": list(wanted.overrides), "sslkit": __version__,
        "torch": torch.__version__, "device": material.device.type,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
