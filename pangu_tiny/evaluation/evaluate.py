"""The stage `evaluate`: the held-out loss of a checkpoint, beside what compressors reach."""

import json
from typing import Any

import jax

from pangu_tiny.checkpoints.read import open_checkpoint
from pangu_tiny.data.dataset import TokenDataset
from pangu_tiny.errors import UserError
from pangu_tiny.model.decoder import Decoder
from pangu_tiny.program.step import Objective, param_shardings, score_step
from pangu_tiny.progress import Progress
from pangu_tiny.topology.hardware import Hardware
from pangu_tiny.topology.mesh import check_divides, make_mesh
from pangu_tiny.topology.processes import alone, first, say
from pangu_tiny.training.held_out import HeldOut, score_held_out
from pangu_tiny.training.train import DTYPES
from pangu_tiny.workdir import claim_together, write_atomically


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

    Raises:
      UserError: no checkpoint, a dataset of another tokenizer or sequence length, nothing held out,
        or a mesh that does not fit.
    """
    if dtype not in DTYPES:
        raise UserError(f"evaluate.dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    opened = open_checkpoint(checkpoint)
    rows = TokenDataset.open(dataset)
    held_out = rows.description["splits"]["held_out"]
    opened.check_rows(rows)
    if not held_out["targets"]:
        raise UserError(f"dataset {dataset} holds nothing out: prepare_data.held_out_fraction is 0")
    mesh = make_mesh(hardware.data, hardware.fsdp, hardware.tensor)
    check_divides(opened.shape, mesh)
    decoder = Decoder(
        opened.shape, DTYPES[dtype], hardware.attention, hardware.remat, hardware.unroll
    )
    folder = claim_together(
        workdir,
        "evaluate",
        {
            "checkpoint": opened.about["identity"],
            "step": opened.about["step"],
            "data": rows.digest,
            "dtype": dtype,
        },
    )
    with jax.set_mesh(mesh):
        objective = Objective(decoder, rows.begin_id, rows.end_id, hardware.loss_chunk)
        score = score_step(objective, mesh)
        params = opened.params(param_shardings(opened.shape, mesh))
        with Progress("evaluate", rows.rows("held_out"), "row", shown=first()) as progress:
            found = score_held_out(
                score, params, rows, mesh, hardware.per_device_batch, progress=progress
            )
    result = {
        "step": opened.about["step"],
        **_figures(rows, found),
        "sources": {
            name: _figures(rows, found, name)
            for name in rows.sources
            if held_out["sources"][name]["targets"]
        },
    }
    with alone() as leads:
        if leads:
            write_atomically(folder / "evaluation.json", json.dumps(result, indent=2))
    each = f", each of the {result['documents']:,} documents on its own"
    say(f"held-out: {_line(result, each)}")
    for name in rows.sources if len(rows.sources) > 1 else ():
        figures = result["sources"].get(name)
        say(f"  {name:<12} {_line(figures) if figures else 'nothing held out'}")
    return result


def _figures(dataset: TokenDataset, found: HeldOut, source: str | None = None) -> dict[str, Any]:
    counts = dataset.description["splits"]["held_out"]
    if source is not None:
        counts = counts["sources"][source]
    return {
        "documents": counts["documents"],
        "bytes": counts["bytes"],
        **found.figures(dataset, source),
        "gzip_9_bits_per_byte": 8 * counts["gzip_bytes"] / counts["bytes"],
        "xz_9_bits_per_byte": 8 * counts["xz_bytes"] / counts["bytes"],
    }


def _line(figures: dict[str, Any], note: str = "") -> str:
    return (
        f"{figures['nats_per_token']:.4f} nats per token, "
        f"{figures['bits_per_byte']:.4f} bits per byte (gzip -9 "
        f"{figures['gzip_9_bits_per_byte']:.4f}, xz -9 {figures['xz_9_bits_per_byte']:.4f}{note})"
    )
