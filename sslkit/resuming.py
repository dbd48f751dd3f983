"""What an earlier call left in a run's directory, and whether this one may go on with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from sslkit import checkpoint, forking, launcher, local
from sslkit.build import Parts
from sslkit.diff import differences
from sslkit.distributed import World, restarted
from sslkit.errors import UserError
from sslkit.forking import Asked
from sslkit.progress import say
from sslkit.recipe import Recipe, parse_recipe
from sslkit.run_directory import OtherProcess, RunDirectory
from sslkit.starting_point import InitFrom
from sslkit.summary import summarise
from sslkit.words import spoken


def chosen(recipe: Recipe, asked: Asked, resume: str, world: World) -> tuple[Recipe, Path]:
    """The recipe and the directory of a run: the one that was chosen, `runs/NAME`, that of a fork, or with
    `resume = "never"` a new one beside it.

    Raises:
        UserError: a new run is wanted in a directory that was chosen and holds one.
    """
    if asked.run_dir == "":  # as an unset variable of a shell gives
        raise UserError(f"{spoken().run_dir} is empty; name a directory, or leave it out")
    if restarted() and (resume == "never" or asked.fork is not None):  # to go on with what was begun
        begun = asked.run_dir or launcher.noted_directory()
        if begun is None and resume == "never":
            raise UserError(
                f"{spoken().resume_never}: torchrun has started the processes again, and which run they had begun is "
                f"not known; name it by {spoken().run_dir}"
            )
        asked, resume = replace(asked, run_dir=begun), "auto"
    start, path = world.first(lambda: _chosen_here(recipe, asked, resume))
    return recipe.model_copy(update={"init_from": start}), path


def _chosen_here(recipe: Recipe, asked: Asked, resume: str) -> tuple[InitFrom | None, Path]:
    if asked.fork is None:
        path = _directory(recipe.name, asked.run_dir, resume)
    else:
        recipe, path = forking.begin(recipe, asked, resume=resume)
    launcher.note_directory(str(path))
    return recipe.init_from, path


def _directory(name: str, chosen: str | None, resume: str) -> Path:
    path = Path(chosen) if chosen else Path("runs") / name
    if resume == "auto" or not (path / "recipe.lock.toml").exists():
        return path
    if chosen:
        given, beside = spoken().resume_never, spoken().run_dir
        raise UserError(f"{path}: holds a run already, and {given} was given; choose another {beside}")
    number = 2
    while Path("runs", f"{name}-{number}").exists():
        number += 1
    return Path("runs", f"{name}-{number}")


@contextmanager
def opened(path: Path, world: World) -> Iterator[RunDirectory]:
    """The directory, held while the block runs; if nothing came of it, no trace is left."""
    files: RunDirectory = world.together(
        lambda: RunDirectory(path) if world.is_first else OtherProcess(path, world.rank)
    )
    try:
        yield files
    finally:
        files.close()
        if world.is_first and not files.has_run and path.is_dir():  # else it was removed or moved meanwhile
            for name in (".lock", ".attempt"):
                (path / name).unlink(missing_ok=True)
            if not any(path.iterdir()):
                path.rmdir()


def going_on(files: RunDirectory, recipe: Recipe, asked: Asked, console: Console) -> Recipe | None:
    """The recipe with what an earlier call settled; None if that has finished the run.

    Raises:
        UserError: it was of another recipe.
    """
    earlier = _earlier_recipe(files, leave=local.is_allowed() or bool(recipe.local_parts()))
    if earlier is None:
        return recipe
    recipe = forking.going_on(recipe, earlier, files.path, asked)
    if _finished(files):
        say(console, f"{files.path}: this run is finished")
        summarise(files.path, console)
        return None
    return recipe


def _earlier_recipe(files: RunDirectory, leave: bool) -> Recipe | None:
    """The recipe of the run that is there. Leave for the new one's code is also leave for the copies of that run, and
    for no other file: the directory may be a stranger's."""
    if not files.has_run:
        return None
    text = files.lock_file.read_text(encoding="utf-8")
    # A run that ended before its first checkpoint has nothing to lose: the directory is free.
    begun = files.checkpoints.is_dir() and any(not p.name.startswith(".") for p in files.checkpoints.iterdir())
    try:
        with local.allowed(leave and files.path.resolve() / local.FOLDER):
            return parse_recipe(text, str(files.lock_file)) if begun else None
    except UserError as error:
        raise UserError(
            f"{files.path}: holds a run whose recipe cannot be read here; choose another {spoken().run_dir}, or put "
            "back the packages that it was trained with",
            *(f"  {line}" for line in error.lines),
        ) from None


def _finished(files: RunDirectory) -> bool:
    return files.read_status().get("status") == "done"


def newest_checkpoint(
    files: RunDirectory, parts: Parts, console: Console, world: World
) -> checkpoint.Checkpoint | None:
    """What the first process found, in every process; the others read it, too."""
    found: checkpoint.Checkpoint | None = None

    def look() -> str | None:
        nonlocal found
        found = _newest_here(files, parts, console)
        return None if found is None else found.path.name

    def read() -> checkpoint.Checkpoint | None:
        if world.is_first or name is None:
            return found
        if not (files.checkpoints / name).is_dir():
            raise UserError(f"{files.path}: process {world.rank} does not see it; all machines have to share it")
        return checkpoint.load(files.checkpoints / name)

    name = world.first(look)
    there: checkpoint.Checkpoint | None = world.together(read)
    return there


def _newest_here(files: RunDirectory, parts: Parts, console: Console) -> checkpoint.Checkpoint | None:
    checkpoint.clean(files.checkpoints)
    found, problems = checkpoint.newest(files.checkpoints)
    if found is None and (problems or any(files.checkpoints.glob("damaged-*"))):
        raise UserError(
            *problems,
            f"{files.path}: no checkpoint can be read; put a sound one back, or begin anew with another "
            f"{spoken().run_dir}",
        )
    for problem in problems:
        say(console, problem)
    if found and found.facts["data_fingerprint"] != parts.data.fingerprint:
        changes = other_data(found.facts["data_fingerprint"], found, parts)
        raise UserError(
            f"{files.path}: the data changed since this run began ({changes}); put the old data back, or start anew "
            f"with another {spoken().run_dir}"
        )
    if found and found.facts["recipe_hash"] != parts.recipe.hash():
        if parts.recipe.local_parts():
            raise UserError(
                f"{files.path}: the code in {files.path / local.FOLDER} is not what the run was begun with; put the "
                f"old one back, or start anew with another {spoken().run_dir}"
            )
        # An option that sslkit has had only since then changes the hash, but not the recipe.
        if changed := differences(parse_recipe(found.facts["recipe"], str(found.path)), parts.recipe):
            raise UserError(
                f"{found.path}: is the checkpoint of another recipe than that of {files.lock_file}; move it away, or "
                f"choose another {spoken().run_dir}",
                *(f"  {change}" for change in changed),
            )
    for line in other_code(found, parts.recipe) if found else ():
        say(console, f"warning: {line}")
    return found


def other_data(before: str, found: checkpoint.Checkpoint | None, parts: Parts) -> str:
    """In what data differ from those that a run was trained on, as far as the run has noted it."""
    digests = f"fingerprint {before[:12]}, now {parts.data.fingerprint[:12]}"
    then, now = ((found.facts.get("run") or {}) if found else {}).get("train_images"), parts.run.train_images
    if then is None:
        return digests
    images = f"{then} training images, now {now}" if then != now else f"{then} training images, as many as now"
    return f"{images}; {digests}"


def other_code(found: checkpoint.Checkpoint, recipe: Recipe) -> list[str]:
    """A line for each package that is not what it was when the checkpoint was written."""
    before = {was["component"]: was for was in found.facts.get("plugins", [])}
    changed: dict[str, list[str]] = {}
    for now in recipe.provenance():
        was = before.get(now["component"], now)
        package = now["distribution"]
        if was["version"] != now["version"]:
            line = f"{package} was {was['version']} up to step {found.step} and is {now['version']} now"
        elif was.get("source", now.get("source")) != now.get("source"):
            line = f"the code of {package} {now['version']} is not what it was up to step {found.step}"
        else:
            continue
        changed.setdefault(line, []).append(now["component"])
    return [f"{line} ({', '.join(parts)}): what follows need not compare" for line, parts in changed.items()]
