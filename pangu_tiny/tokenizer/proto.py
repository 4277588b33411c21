"""A SentencePiece model file as a protocol buffer: the fields that are read or edited here.

The message is described at run time. The module that SentencePiece ships for it needs a newer
protobuf than Apache Beam allows. Fields that are not described stay in the message as they are.
"""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""The types of a piece."""

SPACE = "\u2581"
"""How a piece writes a space."""

UNIGRAM, BPE, WORD, CHAR = range(1, 5)
"""The types of a model."""

_FIELDS = {
    "ModelProto": (
        ("pieces", 1, "repeated", "Piece"),
        ("trainer_spec", 2, "optional", "TrainerSpec"),
        ("normalizer_spec", 3, "optional", "NormalizerSpec"),
        ("self_test_data", 4, "optional", "SelfTestData"),
    ),
    "Piece": (
        ("piece", 1, "optional", "string"),
        ("score", 2, "optional", "float"),
        ("type", 3, "optional", "int32"),
    ),
    "TrainerSpec": (
        ("model_type", 3, "optional", "int32"),
        ("vocab_size", 4, "optional", "int32"),
        ("treat_whitespace_as_suffix", 24, "optional", "bool"),
        ("byte_fallback", 35, "optional", "bool"),
        ("unk_id", 40, "optional", "int32"),
        ("bos_id", 41, "optional", "int32"),
        ("eos_id", 42, "optional", "int32"),
        ("pad_id", 43, "optional", "int32"),
    ),
    "NormalizerSpec": (
        ("name", 1, "optional", "string"),
        ("precompiled_charsmap", 2, "optional", "bytes"),
        ("add_dummy_prefix", 3, "optional", "bool"),
        ("remove_extra_whitespaces", 4, "optional", "bool"),
        ("escape_whitespaces", 5, "optional", "bool"),
    ),
    "SelfTestData": (),
}
_DEFAULTS = {
    "type": "1", "model_type": "1", "unk_id": "0", "bos_id": "1", "eos_id": "2", "pad_id": "-1",
    "add_dummy_prefix": "true", "remove_extra_whitespaces": "true", "escape_whitespaces": "true",
}  # fmt: skip


def parse(model_bytes: bytes) -> Any:
    """The message of a model file."""
    return _Model.FromString(model_bytes)


def _describe() -> Any:
    package = "pangu_tiny.sentencepiece"
    file = descriptor_pb2.FileDescriptorProto(
        name=f"{package}.proto", package=package, syntax="proto2"
    )
    kinds = descriptor_pb2.FieldDescriptorProto
    for name, fields in _FIELDS.items():
        message = file.message_type.add(name=name)
        for field, number, label, kind in fields:
            described = message.field.add(
                name=field, number=number, label=getattr(kinds, f"LABEL_{label.upper()}")
            )
            if kind in _FIELDS:
                described.type = kinds.TYPE_MESSAGE
                described.type_name = f".{package}.{kind}"
            else:
                described.type = getattr(kinds, f"TYPE_{kind.upper()}")
            if field in _DEFAULTS:
                described.default_value = _DEFAULTS[field]
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.ModelProto"))


_Model = _describe()
