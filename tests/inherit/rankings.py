"""Rankings of a tiny teacher, for tests."""

import itertools

from pangu_tiny.data.loader import batches
from pangu_tiny.data.order import Order
from pangu_tiny.inherit.layers import LayerChoice
from pangu_tiny.inherit.masks import MaskTraining
from pangu_tiny.inherit.rank_teacher import rank_teacher
from pangu_tiny.topology.hardware import Hardware

EIGHT = Hardware(data=1, fsdp=4, tensor=2, per_device_batch=1)
"""A batch of 8 in two parts of four."""

CHOICE = LayerChoice(first=0, last=0)
FEW = MaskTraining(steps=6, save_every=2)


def rank(teacher, workdir, rows, hardware=EIGHT, choice=CHOICE, masks=FEW, **changes):
    settings = {"calibration_batches": 2, "batch_size": 8, "method": "taylor"} | changes
    dataset = rows and rows.path
    return rank_teacher(teacher, str(workdir), hardware, choice, masks, dataset, **settings)


def first_batches(rows, count=2):
    """What `rank` calibrates on."""
    return [batch["rows"] for batch in itertools.islice(batches(rows, "train", 8, Order(0)), count)]
