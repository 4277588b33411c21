"""Shipped pod recipes on the slices of shipped hardware files, laid out but not compiled."""

import jax
import pytest

from pangu_tiny import config
from pangu_tiny.cli import STAGES, find_stage
from pangu_tiny.planning.devices import devices_of
from pangu_tiny.planning.memory import saved_bytes
from pangu_tiny.planning.programs import ask
from pangu_tiny.rounds.stages import settings
from pangu_tiny.topology.hardware import Hardware
from pangu_tiny.topology.slices import parse_slice

LENGTH = 2048


def shipped(pattern):
    return sorted(file.stem for file in config.shipped_files().glob(pattern))


RECIPES, TPUS = shipped("recipes/pangu_pi_*.gin"), shipped("hardware/v*.gin")


def read(recipe, hardware, *bindings):
    files = [f"recipes/{recipe}.gin", f"hardware/{hardware}.gin"]
    config.read(map(find_stage, STAGES), files, bindings)


def lay(recipe, hardware, devices):
    """The train step, as `plan` compiles it."""
    read(recipe, hardware)
    asked = ask("train", LENGTH, 1.6e12, None)
    return asked.build(asked.hardware, devices)


def kept(program):
    """Bytes that a device keeps of its largest batch for the backward pass; it grows with the
    sequences, whose share is the same on all slices, and is found once."""
    return program.hardware.per_device_batch * saved_bytes(program.objective, 1, LENGTH)


def test_there_are_files():
    assert RECIPES == ["pangu_pi_1_5b_pro", "pangu_pi_1b_pro"]
    assert TPUS == ["v4_256", "v5e_256", "v5p_256", "v6e_256"]


@pytest.mark.parametrize("hardware", TPUS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_lies_on_a_slice(recipe, hardware, monkeypatch):
    """The file is called as its slice is. That mesh, model and batch divide is what
    laying them checks; that a program fits, tests/benchmarks/fits.py."""
    pytest.importorskip("libtpu")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    bound = config.build(Hardware, f"hardware/{hardware}.gin")
    assert bound.topology == hardware.replace("_", "-")
    where = parse_slice(bound.topology)
    devices = devices_of(where)
    planned = lay(recipe, hardware, devices)
    program = planned.program
    assert len(devices) == planned.mesh.size == where.chips
    assert planned.mesh.shape["fsdp"] == 16 and planned.mesh.shape["tensor"] == 1
    assert planned.accumulation == 1 and planned.sequences == 1024
    assert planned.rows <= bound.per_device_batch
    # Parameters and two moments in float32; what no axis of the mesh cuts is small.
    cut = 12 * program.shape.parameters / 16
    assert cut <= planned.held_bytes < 1.02 * cut
    assert planned.held_bytes + kept(program) < 0.9 * where.chip.memory


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_lies_on_eight_gpus(recipe):
    """Of 80 GB, a third of which is left to scores and logits."""
    planned = lay(recipe, "gpu_8", jax.devices())
    assert planned.mesh.shape == {"data": 1, "fsdp": 8, "tensor": 1}
    assert planned.held_bytes + kept(planned.program) < 0.65 * 80e9


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("hardware", [*TPUS, "gpu_8"])
def test_train_wants_no_more_than_a_dataset_and_a_workdir(recipe, hardware):
    read(recipe, hardware, ("train.dataset", "d"), ("train.workdir", "w"))
    found = settings(find_stage("train"))
    tokens = found["global_batch"] * LENGTH
    assert tokens == 2**21 and (found["steps"] - 1) * tokens < 1.6e12 <= found["steps"] * tokens
    assert found["optimizer"].peak_rate(tokens) == 2e-4 and found["dtype"] == "bfloat16"
    depth = {"pangu_pi_1b_pro": 21, "pangu_pi_1_5b_pro": 22}[recipe]
    assert (found["model"].depth, found["model"].series_terms) == (depth, 2)


@pytest.mark.parametrize("hardware", [*TPUS, "gpu_8"])
def test_hardware_files_bind_hardware_alone(hardware):
    assert config.build(Hardware, f"hardware/{hardware}.gin").remat == "dots"
