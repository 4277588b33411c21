"""The stage that writes a checkpoint in Hugging Face's layout, as `transformers` loads it.

Plain blocks are LlamaForCausalLM; with the modules of PanGu-π their code lies beside the weights
(`modeling_pangu_pi.py`). One shard is in memory while it is made, and one while it is written.
"""

import concurrent.futures
import json
import os
import pathlib
from typing import Any

import numpy as np

from pangu_tiny.checkpoints.read import Checkpoint, open_checkpoint
from pangu_tiny.checkpoints.write import FLOATS, Part, cast
from pangu_tiny.convert.card import Told, card
from pangu_tiny.convert.llama import PANGU_PI, Tensors, config_of, tensors, to_theirs
from pangu_tiny.convert.tokenizer_files import tokenizer_files
from pangu_tiny.data.dataset import TokenDataset
from pangu_tiny.errors import UserError, check_number, check_one_of
from pangu_tiny.progress import Progress
from pangu_tiny.workdir import absolute, check_same, claim, finished, read_json, write_atomically

_MODULES = pathlib.Path(__file__).with_name("modeling_pangu_pi.py")
_CONFIG = "config.json"  # written last: without it nothing loads


def export_hf(
    checkpoint: str,
    workdir: str,
    dtype: str | None = None,
    shard_bytes: int = 2**29,
    dataset: str | None = None,
    evaluation: str | None = None,
    benchmark: str | None = None,
) -> str:
    """Writes a checkpoint as a folder that `transformers` and the hub read, with a model card.

    Args:
      checkpoint: a train workdir, or that of inherit or import-hf, or a step in one.
      workdir: the local folder to write; what it was interrupted at is written anew.
      dtype: "float32", "bfloat16" or "float16" of the tensors; None keeps that of the checkpoint. A
        value that it cannot hold is an error.
      shard_bytes: the largest file of tensors; a tensor that is larger has a file of its own.
      dataset: the workdir of prepare-data that it was trained on, for the card.
      evaluation: the workdir of evaluate, for the card.
      benchmark: the workdir of benchmark, for the card.
    """
    check_one_of("export_hf.dtype", dtype, (None, *FLOATS))
    check_number("export_hf.shard_bytes", shard_bytes, 1)
    if "://" in workdir:
        raise UserError(f"export_hf.workdir is {workdir}, expected a local folder: copy it then")
    opened = open_checkpoint(checkpoint)
    kind = np.dtype(dtype or opened.dtype)
    told = Told(
        opened,
        str(kind),
        _trained_on(opened, dataset),
        _found(opened, "evaluation", evaluation, "sources", "bits_per_byte", "nats_per_token"),
        _found(opened, "benchmark", benchmark, "tasks", "lm_eval", "average"),
    )
    identity = {"checkpoint": opened.identity, "dtype": str(kind), "shard_bytes": shard_bytes}
    files = tokenizer_files(opened)
    folder = pathlib.Path(claim(workdir, "export-hf", identity))
    if not (folder / _CONFIG).exists():
        _write_tensors(opened, kind, shard_bytes, folder)
    about = opened.about
    marks = {
        "bos_token_id": about["begin_id"],
        "eos_token_id": about.get("end_ids") or about["end_id"],
    }
    config = config_of(opened.shape, about["sequence_length"], str(kind), marks)
    if config["model_type"] == PANGU_PI:
        names = {"AutoConfig": "PanguPiConfig", "AutoModelForCausalLM": "PanguPiForCausalLM"}
        config["auto_map"] = {auto: f"{_MODULES.stem}.{name}" for auto, name in names.items()}
        files[_MODULES.name] = _MODULES.read_text()
    files["generation_config.json"] = _json(marks)
    files["README.md"] = card(told)
    for name, content in files.items():
        write_atomically(folder / name, content)
    write_atomically(folder / _CONFIG, _json(config))
    trusted = ", trust_remote_code=True" if "auto_map" in config else ""
    print(
        f"exported {opened.path}: {opened.shape.parameters:,} parameters in {kind},"
        f" {config['architectures'][0]}\n"
        f"  from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"  model = AutoModelForCausalLM.from_pretrained({os.fspath(folder)!r}{trusted})\n"
        f"  tokenizer = AutoTokenizer.from_pretrained({os.fspath(folder)!r})"
    )
    return os.fspath(folder)


def _trained_on(opened: Checkpoint, dataset: str | None) -> dict[str, Any] | None:
    """What is told of its rows."""
    if dataset is None:
        return None
    rows, trained = TokenDataset.described(dataset), opened.about["identity"].get("dataset")
    check_same(f"dataset {dataset} is", rows.digest, f"checkpoint {opened.path} read", trained)
    return rows.description


_STAGES = {"evaluation": "evaluate", "benchmark": "benchmark"}


def _found(
    opened: Checkpoint, what: str, workdir: str | None, *names: str
) -> dict[str, Any] | None:
    """What the stage evaluate or benchmark found of it."""
    if workdir is None:
        return None
    file = finished(what, absolute(workdir), _STAGES[what], f"{what}.json")
    of = read_json(file.parent / "identity.json", "checkpoint", "step")
    if {"identity": of["checkpoint"], "step": of["step"]} != opened.identity:
        raise UserError(f"{what} {workdir} is of another checkpoint than {opened.path}")
    return read_json(file, *names)


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"


def _write_tensors(
    opened: Checkpoint, kind: np.dtype, shard_bytes: int, folder: pathlib.Path
) -> None:
    """The tensors in files of at most `shard_bytes`, and their index where they are several."""
    try:
        from safetensors.numpy import save_file
    except ImportError as error:
        raise UserError("export-hf needs safetensors: pip install 'pangu_tiny[hf]'") from error
    table = tensors(opened.shape)
    shards = _shards(table, kind.itemsize, shard_bytes)
    leaves = {name: opened.leaf(name) for name, _ in table}
    index = {}
    total = sum(int(np.prod(size)) for _, size in table.values()) * kind.itemsize
    with (
        Progress("export-hf", total, "B") as progress,
        concurrent.futures.ThreadPoolExecutor(1) as writer,
    ):
        written = writer.submit(int)
        for number, shard in enumerate(shards, 1):
            several = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
            file = folder / f"model{several}.safetensors"
            held = {}
            for name, layer in shard:
                theirs, size = table[name, layer]
                value = to_theirs(name, leaves[name].read(layer), size)
                held[theirs] = _contiguous(cast(Part(name, layer, value), kind))
                index[theirs] = file.name
                progress.update(held[theirs].nbytes)
            written.result()
            written = writer.submit(save_file, held, file, metadata={"format": "pt"})
        written.result()
    if len(shards) > 1:
        told = {"metadata": {"total_size": total}, "weight_map": index}
        write_atomically(folder / "model.safetensors.index.json", _json(told))


_BLOCK = 256


def _contiguous(value: np.ndarray) -> np.ndarray:
    """The same in the order of its axes; a matrix that is turned, block by block, which is more
    than twice as fast as NumPy's own."""
    if value.flags.c_contiguous or value.ndim != 2:
        return np.ascontiguousarray(value)
    found = np.empty(value.shape, value.dtype)
    for i in range(0, value.shape[0], _BLOCK):
        for j in range(0, value.shape[1], _BLOCK):
            block = slice(i, i + _BLOCK), slice(j, j + _BLOCK)
            found[block] = value[block]
    return found


def _shards(table: Tensors, itemsize: int, shard_bytes: int) -> list[list[tuple[str, int | None]]]:
    """The parts of each file, in order."""
    shards: list[list[tuple[str, int | None]]] = []
    room = 0
    for part, (_, size) in table.items():
        needed = int(np.prod(size)) * itemsize
        if not shards or needed > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(part)
        room -= needed
    return shards
