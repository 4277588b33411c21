"""The stage `evaluate`: the held-out loss of a checkpoint, beside what compressors reach."""

import json
from typing import Any

import jax

from pangu_tiny.checkpoints.read import open_checkpoint
from pangu_tiny.data.dataset import TokenDataset
from pangu_tiny.errors import UserError, check_one_of
from pangu_tiny.program.build import DTYPES, build
from pangu_tiny.progress import Progress
from pangu_tiny.topology.hardware import Hardware
from pangu_tiny.topology.processes import alone, first, from_first, say
from pangu_tiny.topology.shared_workdir import claim_together
from pangu_tiny.training.held_out import HeldOut, score_held_out
from pangu_tiny.workdir import read_json, write_atomically


def evaluate(
    checkpoint: str, dataset: str, workdir: str, hardware: Hardware, dtype: str = "float32"
) -> dict[str, Any]:
    """Scores every target of a dataset's held-out split once.

    Args:
      checkpoint: a train workdir or a step in it.
      dataset: workdir of prepare-data, with the checkpoint's tokenizer.
      workdir: where `evaluation.json` goes.
      hardware: how the work is laid out.
      dtype: of matrix products and activations.

    Returns:
      documents, bytes, targets, nats_per_token, bits_per_byte (nats over all targets / ln 2 / raw
      UTF-8 bytes), gzip_9_bits_per_byte and xz_9_bits_per_byte (each document compressed on its
      own); under `sources` the same by name, of those of which text is held out; and the step.
    """
    check_one_of("evaluate.dtype", dtype, DTYPES)
    opened = open_checkpoint(checkpoint)
    data = TokenDataset.open(dataset)
    held_out = data.description["splits"]["held_out"]
    opened.check_rows(data)
    if not held_out["targets"]:
        raise UserError(f"dataset {dataset} holds nothing out: prepare_data.held_out_fraction is 0")
    program = build(opened.shape, hardware, data.marks, dtype)
    folder = claim_together(
        workdir,
        "evaluate",
        {
            "checkpoint": opened.about["identity"],
            "step": opened.about["step"],
            "data": data.digest,
            "dtype": dtype,
        },
    )
    file = folder / "evaluation.json"
    if from_first(file.exists):
        result = read_json(file, "bits_per_byte", "sources")
    else:
        with jax.set_mesh(program.mesh):
            params = opened.params(program.param_shardings)
            with Progress("evaluate", data.count("held_out"), "row", shown=first()) as progress:
                scored = score_held_out(program, params, data, came_back=progress.update)
        result = {
            "step": opened.about["step"],
            **_figures(data, scored),
            "sources": {
                name: _figures(data, scored, name)
                for name in data.sources
                if held_out["sources"][name]["targets"]
            },
        }
        with alone() as leads:
            if leads:
                write_atomically(file, json.dumps(result, indent=2))
    each = f", each of the {result['documents']:,} documents on its own"
    say(f"held-out: {_line(result, each)}")
    for name in data.sources if len(data.sources) > 1 else ():
        figures = result["sources"].get(name)
        say(f"  {name:<12} {_line(figures) if figures else 'nothing held out'}")
    return result


def _figures(dataset: TokenDataset, scored: HeldOut, source: str | None = None) -> dict[str, Any]:
    counts = dataset.description["splits"]["held_out"]
    if source is not None:
        counts = counts["sources"][source]
    return {
        "documents": counts["documents"],
        "bytes": counts["bytes"],
        **scored.figures(dataset, source),
        "gzip_9_bits_per_byte": 8 * counts["gzip_bytes"] / counts["bytes"],
        "xz_9_bits_per_byte": 8 * counts["xz_bytes"] / counts["bytes"],
    }


def _line(figures: dict[str, Any], note: str = "") -> str:
    return (
        f"{figures['nats_per_token']:.4f} nats per token, "
        f"{figures['bits_per_byte']:.4f} bits per byte (gzip -9 "
        f"{figures['gzip_9_bits_per_byte']:.4f}, xz -9 {figures['xz_9_bits_per_byte']:.4f}{note})"
    )
