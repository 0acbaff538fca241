"""Checkpoints on disk: which are there, which are whole, and whether a recipe can go on from one.

    DIR/<name>/checkpoints/latest                                     the last that was written whole, by name
    DIR/<name>/checkpoints/step-00000006/checkpoint.json              step, recipe, data; where each part of a tensor is
    DIR/<name>/checkpoints/step-00000006/part-00003-00000.safetensors what rank 3 wrote of them

Tensors bear the names that they have in the whole model, and each part its place in the whole, so that any layout
reads what another wrote. JSON and safetensors hold data alone: nothing is unpickled, whoever wrote the files. No torch
here, so that `lab` can refuse before a process starts.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.recipe import Recipe, RecipeError

CHECKPOINTS = "checkpoints"
LATEST = "latest"
MANIFEST = "checkpoint.json"
FORMAT = 1
STEP_FOLDER = re.compile(r"step-[0-9]{8,10}")
PART_FILE = re.compile(r"part-[0-9]{5,8}-[0-9]{5}\.safetensors")
LARGEST_MANIFEST_BYTES = 2**30
# What makes two runs the same but for their layout: a run that resumes must not differ in these.
SAME_TRAINING = ("seq_len", "global_batch", "seed", "dtype", "learning_rate", "weight_decay", "grad_clip")


class Damaged(ValueError):
    """A checkpoint that is not as it was written. Its text is one line."""


class CheckpointError(OSError):
    """A checkpoint could not be written. Its text is one line."""


class Stopped(Exception):
    """A signal asked the run to end, and it has saved itself; its text says how to go on."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Of a tensor: a box that begins at `offsets` in the whole, and the file that holds it under the tensor's name."""

    file: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    dtype: str  # as torch calls it, without "torch."
    shape: tuple[int, ...]
    parts: tuple[Part, ...]  # none overlap, and together they are the whole


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What checkpoint.json says: `read_checkpoint` makes one."""

    folder: Path
    step: int  # the last that was trained; the tokens of the next follow
    recipe: Mapping[str, Any]  # resolved
    data: str | None  # description of the corpus; None: it was not trained here
    float32_matmul: str | None  # environment.float32_matmul of the record
    files: Mapping[str, tuple[int, str]]  # name -> bytes, sha256
    tensors: Mapping[str, StoredTensor]  # parameters by name, and the optimizer's state as "<name>.<its key>"

    @property
    def n_bytes(self) -> int:
        return sum(n_bytes for n_bytes, _ in self.files.values())

    def damage(self, file: str) -> str | None:
        """What is wrong with one of `files`; None where it is as it was written."""
        n_bytes, sha256 = self.files[file]
        path = self.folder / file
        try:
            found = path.stat().st_size
            if found != n_bytes:
                return f"{file} has {found} bytes, not {n_bytes}"
            return None if sha256_of(path) == sha256 else f"{file} does not have the checksum that was written"
        except OSError as error:
            return f"{file} cannot be read ({error.strerror})"


# ---- finding and reading -------------------------------------------------------------------------------------------


def step_folder(run: Path, step: int) -> Path:
    return run / CHECKPOINTS / f"step-{step:08}"


def step_folders(run: Path) -> list[Path]:
    """The folders of checkpoints of a run, whole or not, the newest first."""
    with contextlib.suppress(OSError):
        found = [path for path in (run / CHECKPOINTS).iterdir() if STEP_FOLDER.fullmatch(path.name) and path.is_dir()]
        return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)
    return []


def candidates(run: Path) -> list[Path]:
    """The checkpoints to go on from: the one that `latest` names, then those before it, the newest first."""
    folders = step_folders(run)
    if not (run / CHECKPOINTS / LATEST).exists():  # then a folder without a manifest was never whole
        return [folder for folder in folders if (folder / MANIFEST).exists()]
    with contextlib.suppress(OSError, ValueError):
        latest = (run / CHECKPOINTS / LATEST).read_text(encoding="utf-8").strip()
        if STEP_FOLDER.fullmatch(latest):
            return [folder for folder in folders if int(folder.name[5:]) <= int(latest[5:])]
    return folders


def read_checkpoint(folder: Path) -> Checkpoint:
    """What folder/checkpoint.json says. Raises Damaged where it is missing or not as it was written."""
    path = folder / MANIFEST
    try:
        if path.stat().st_size > LARGEST_MANIFEST_BYTES:
            raise Damaged(f"{MANIFEST} is larger than {LARGEST_MANIFEST_BYTES} bytes")
        sealed = json.loads(path.read_text(encoding="utf-8"))
        content = sealed["checkpoint"]
        if sealed["sha256"] != _seal(content):
            raise Damaged(f"{MANIFEST} does not have the checksum that was written")
        if content["format"] != FORMAT:
            raise Damaged(f"{MANIFEST} has format {str(content['format'])[:40]}, this version reads {FORMAT}")
        files = {_part_name(name): (int(file["bytes"]), str(file["sha256"])) for name, file in content["files"].items()}
        tensors = {name: _stored_tensor(name, tensor, files) for name, tensor in content["tensors"].items()}
        step, recipe, data = content["step"], content["recipe"], content["data"]
        sections = [recipe[section] for section in ("model", "data", "train", "parallel")]
        if type(step) is not int or step < 0 or not all(isinstance(section, dict) for section in sections):
            raise Damaged(f"{MANIFEST} has no step or no recipe")
        return Checkpoint(
            folder=folder,
            step=step,
            recipe=recipe,
            data=None if data is None else str(data),
            float32_matmul=matmul if (matmul := content["float32_matmul"]) in ("highest", "medium") else None,
            files=files,
            tensors=tensors,
        )
    except FileNotFoundError:
        raise Damaged(f"{MANIFEST} is missing: it was not written to its end") from None
    except OSError as error:
        raise Damaged(f"{MANIFEST} cannot be read ({error.strerror})") from None
    except Damaged:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{MANIFEST} is not what was written ({type(error).__name__})") from None


def _part_name(name: Any) -> str:
    if not isinstance(name, str) or not PART_FILE.fullmatch(name):  # no path that leaves the folder
        raise Damaged(f"{MANIFEST} names a file {str(name)[:80]!r}")
    return name


def _stored_tensor(name: str, tensor: Mapping[str, Any], files: Mapping[str, Any]) -> StoredTensor:
    def sizes(values: Sequence[int]) -> tuple[int, ...]:
        if not all(type(value) is int and value >= 0 for value in values):
            raise Damaged(f"{MANIFEST}: {name[:80]} has a size that is no whole number")
        return tuple(values)

    shape, parts = sizes(tensor["shape"]), []
    for part in tensor["parts"]:
        parts.append(Part(file=part["file"], offsets=sizes(part["offsets"]), shape=sizes(part["shape"])))
        fits = all(o + n <= whole for o, n, whole in zip(parts[-1].offsets, parts[-1].shape, shape, strict=True))
        if not fits or parts[-1].file not in files:
            raise Damaged(f"{MANIFEST}: a part of {name[:80]} is outside the whole or in no file")
    if sum(math.prod(part.shape) for part in parts) != math.prod(shape):
        raise Damaged(f"{MANIFEST}: the parts of {name[:80]} are not the whole")
    return StoredTensor(dtype=str(tensor["dtype"]), shape=shape, parts=tuple(parts))


def last_readable(run: Path) -> Checkpoint | None:
    """The checkpoint that a run is likely to go on from; its files are not looked at. None where there is none."""
    for folder in candidates(run):
        with contextlib.suppress(Damaged):
            return read_checkpoint(folder)
    return None


# ---- does it fit ---------------------------------------------------------------------------------------------------


def refuse_unfit(recipe: Recipe, checkpoint: Checkpoint, *, resume: bool, ended: bool = True) -> None:
    """RecipeError where `recipe` cannot go on from `checkpoint`.

    resume: as the same run, so that nothing may differ but the layout and how it is computed. Else the model must be
    the same, and the type of its weights. ended: else the run came to its last step, but to no record, and may.
    """
    was, now = checkpoint.recipe, recipe.resolved()
    option = "--resume" if resume else "--resume-from"
    if recipe.engine.name != "native":
        raise RecipeError("engine.name", recipe.engine.name, f"reads no checkpoints yet; {option} needs native")

    def refuse(section: str, key: str) -> None:
        theirs, mine = (tables.get(section, {}).get(key) for tables in (was, now))
        if theirs != mine:
            remedy = f"the checkpoint of step {checkpoint.step} was trained with {theirs!r}; {option} needs the same"
            raise RecipeError(f"{section}.{key}", mine, remedy)

    for field in dataclasses.fields(recipe.model):
        if field.name != "preset":  # a name for the others
            refuse("model", field.name)
    if resume:
        for key in now["data"]:
            refuse("data", key)
        for key in SAME_TRAINING:
            refuse("train", key)
    elif weight_dtype(str(was["train"].get("dtype"))) != weight_dtype(recipe.train.dtype):
        refuse("train", "dtype")
    if checkpoint.step > recipe.train.steps or (ended and checkpoint.step == recipe.train.steps):
        remedy = f"the checkpoint is of step {checkpoint.step}: all are done; use more, to train on"
        raise RecipeError("train.steps", recipe.train.steps, remedy)


def weight_dtype(dtype: str) -> str:
    """That of the weights, and of the optimizer's moments, where train.dtype is `dtype`."""
    return "float64" if dtype == "float64" else "float32"


# ---- writing -------------------------------------------------------------------------------------------------------


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_whole(path: Path, text: str) -> None:
    """Writes the file and has it on the disk when it returns; whoever reads sees the old one or the new, whole."""
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Has the names in `folder` on the disk, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(checkpoint: Checkpoint) -> None:
    """Writes checkpoint.json, which makes the folder a checkpoint: after all its parts."""
    content = {key: value for key, value in dataclasses.asdict(checkpoint).items() if key != "folder"}
    content["files"] = {name: dict(bytes=n, sha256=sha256) for name, (n, sha256) in checkpoint.files.items()}
    content = json.loads(json.dumps({"format": FORMAT, **content}, allow_nan=False))  # as it will be read
    write_whole(checkpoint.folder / MANIFEST, json.dumps({"sha256": _seal(content), "checkpoint": content}) + "\n")


def move_latest(folder: Path) -> None:
    """From now on a run goes on from the checkpoint in `folder`, which is whole."""
    sync_folder(folder.parent)
    write_whole(folder.parent / LATEST, f"{folder.name}\n")


def remove_checkpoint(folder: Path) -> None:
    """Removes what we know of a checkpoint's files, and its folder where that leaves it empty."""
    for path in (folder / MANIFEST, folder / f"{MANIFEST}.partial", *folder.glob("part-*.safetensors")):
        path.unlink(missing_ok=True)  # the manifest first: from then on it is not whole
    with contextlib.suppress(OSError):
        folder.rmdir()
