"""How torch.distributed.checkpoint writes and reads: JSON and safetensors, where its own writer pickles.

torch's planner tells which rank writes which part of a tensor (each part once, however many ranks hold it), and which
parts a rank must read for what it holds. Here is what then happens to the files.
"""

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.distributed.checkpoint import LoadPlan, LoadPlanner, SavePlan, SavePlanner, StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from parallel.checkpoint.files import (
    Checkpoint,
    Part,
    StoredTensor,
    move_latest,
    remove_checkpoint,
    sha256_of,
    write_manifest,
)

FILE_BYTES = 2**30  # a file is made in memory, and is about so large


class SafetensorsWriter(StorageWriter):
    """Writes one checkpoint into `folder`; `about`: what its manifest says beside the tensors.

    parts: what this rank holds of each tensor. Of the tensors that `save` is given it needs shapes and placements
        alone, so that training may go on with them.
    When `save` returns, every part is on the disk and has been read back, and `latest` names the folder.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], parts: Mapping[str, Tensor]) -> None:
        self.folder, self.about, self.parts = folder, about, parts

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None: ...

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On rank 0, before any rank writes."""
        remove_checkpoint(self.folder)  # what another life left unfinished, or damaged
        self.folder.mkdir(parents=True, exist_ok=True)
        return [dataclasses.replace(plan, storage_data=rank) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        groups: list[list[tuple[WriteItem, Tensor]]] = []  # of a file each
        room = 0
        for item in plan.items:
            tensor = self.parts[item.index.fqn]
            if not groups or tensor.nbytes > room:
                groups.append([])
                room = FILE_BYTES
            room -= tensor.nbytes
            groups[-1].append((item, tensor))
        results = []
        for number, group in enumerate(groups):
            name = f"part-{plan.storage_data:05}-{number:05}.safetensors"
            tensors = {item.index.fqn: tensor.detach().cpu().contiguous() for item, tensor in group}
            assert len(tensors) == len(group), "two parts of a tensor on one rank"
            file = (name, *_write_file(self.folder / name, tensors))
            results += [WriteResult(item.index, tensor.nbytes, file) for item, tensor in group]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On rank 0, after all have written."""
        stored = {one.index: one.storage_data for of_rank in results for one in of_rank}
        tensors = {}
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            parts = tuple(
                Part(
                    file=stored[MetadataIndex(name, one.offsets)][0], offsets=tuple(one.offsets), shape=tuple(one.sizes)
                )
                for one in tensor.chunks
            )
            dtype = str(tensor.properties.dtype).removeprefix("torch.")
            tensors[name] = StoredTensor(dtype=dtype, shape=tuple(tensor.size), parts=parts)
        files = {name: (n_bytes, sha256) for name, n_bytes, sha256 in stored.values()}
        write_manifest(Checkpoint(folder=self.folder, files=files, tensors=tensors, **self.about))
        move_latest(self.folder)


def _write_file(path: Path, tensors: dict[str, Tensor]) -> tuple[int, str]:
    """Its bytes and checksum, which the file on the disk has, too."""
    content = safetensors.torch.save(tensors)
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256_of(path) != sha256:
        raise OSError(f"{path.name} is not on the disk as it was written")
    return len(content), sha256


class SafetensorsReader(StorageReader):
    """Reads `checkpoint`, each rank what it needs."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.files: dict[MetadataIndex, str] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None: ...

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.files = metadata.storage_data

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors: dict[str, Any] = {}
        files: dict[MetadataIndex, str] = {}
        for name, stored in self.checkpoint.tensors.items():
            chunks = [ChunkStorageMetadata(torch.Size(part.offsets), torch.Size(part.shape)) for part in stored.parts]
            properties = TensorProperties(dtype=getattr(torch, stored.dtype))
            tensors[name] = TensorStorageMetadata(properties, torch.Size(stored.shape), chunks)
            files |= {MetadataIndex(name, part.offsets): part.file for part in stored.parts}
        return Metadata(tensors, storage_data=files)

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        in_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            in_file.setdefault(self.files[item.storage_index], []).append(item)
        for name, items in in_file.items():
            with safetensors.safe_open(self.checkpoint.folder / name, "pt") as file:
                for item in items:
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(part_in_file(file, item.storage_index.fqn, item.storage_offsets, item.lengths))
                    planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future


def part_in_file(file: Any, name: str, offsets: torch.Size, lengths: torch.Size) -> Tensor:
    """That box of the tensor called `name` in an open safetensors file."""
    if not lengths:  # a scalar has no slices
        return file.get_tensor(name)
    return file.get_slice(name)[tuple(slice(start, start + n) for start, n in zip(offsets, lengths, strict=True))]


def whole_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """The whole tensor of that name, of its parts."""
    stored = checkpoint.tensors[name]
    whole = torch.empty(stored.shape, dtype=getattr(torch, stored.dtype))
    for part in stored.parts:
        with safetensors.safe_open(checkpoint.folder / part.file, "pt") as file:
            box = tuple(slice(start, start + n) for start, n in zip(part.offsets, part.shape, strict=True))
            whole[box] = file.get_tensor(name)
    return whole
