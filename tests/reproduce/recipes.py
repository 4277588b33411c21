"""Shipped recipes and tables, made small."""

from pangu_tiny import config

SMALL = {
    "prepare_data.vocab_size": 310,
    "compress_tokenizer.vocab_size": 300,
    "prepare_data.sequence_length": 32,
    "prepare_data.held_out_fraction": 0.1,
    "ModelShape.vocab_size": 300,
    "ModelShape.depth": 2,
    "ModelShape.width": 16,
    "ModelShape.heads": 2,
    "ModelShape.ffn_width": 24,
    "plain/ModelShape.vocab_size": 310,
    "plain/ModelShape.depth": 1,
    "plain/ModelShape.width": 24,
    "plain/ModelShape.ffn_width": 32,
    "teacher/ModelShape.vocab_size": 310,
    "teacher/ModelShape.depth": 3,
    "teacher/ModelShape.width": 24,
    "teacher/ModelShape.heads": 3,
    "teacher/ModelShape.ffn_width": 32,
    "teacher/train.steps": 6,
    "train.steps": 6,
    "train.global_batch": 8,
    "train.evaluate_every": 3,
    "Watching.log_every": 1,
    "Hardware.compilation_cache": "None",
    "Hardware.attention": "reference",  # and a scan over depth: what is fastest to compile
    "Hardware.unroll": 1,
    "rank_teacher.calibration_batches": 2,
    "rank_teacher.method": "l1",
    "LayerChoice.rule": "even",
    "generate.tokens": 4,
    "reproduce.parameter_tolerance": 0.9,
}
LADDER = {
    "tokenizer/ModelShape.depth": 1,
    "tokenizer/ModelShape.width": 24,
    "tokenizer/ModelShape.ffn_width": 32,
}

TABLE = {
    "prepare_data.vocab_size": 310,
    "prepare_data.sequence_length": 32,
    "prepare_data.held_out_fraction": 0.1,
    "prepare_data.text_key": "body",
    "ModelShape.vocab_size": 310,
    "train.steps": 2,
    "train.global_batch": 8,
    "train.evaluate_every": 2,
    "Hardware.compilation_cache": "None",
    "Hardware.attention": "reference",
    "Hardware.unroll": 1,
    "Hardware.fsdp": 1,  # widths are no multiples of as many devices
    "Hardware.data": -1,
    "reproduce.seeds": [1],
    "reproduce.parameter_tolerance": 0.9,
}
TEACHER = {
    "teacher/train.steps": 2,
    "rank_teacher.calibration_batches": 2,
}


def argv(recipe, workdir, **changes):
    """The command, with other bindings by their names."""
    bindings = {**SMALL, **(LADDER if recipe != "quickstart" else {}), **changes}
    bindings["reproduce.workdir"] = workdir
    flags = [f"--gin.{name}={value}" for name, value in bindings.items()]
    return ["reproduce", f"--gin_file=recipes/{recipe}.gin", *flags]


def shipped(pattern):
    """Paths of gin files below gin/."""
    root = config.shipped_files()
    found = sorted(str(file.relative_to(root)) for file in root.glob(pattern))
    assert found, f"no file is {pattern}"
    return found


def table_argv(name, text, workdir, **changes):
    """The command, with other bindings by their names."""
    given = {**TABLE, "reproduce.table": name, "reproduce.text": text, "reproduce.workdir": workdir}
    flags = [f"--gin.{binding}={value}" for binding, value in (given | changes).items()]
    return ["reproduce", "--gin_file=paper/laptop.gin", *flags]
