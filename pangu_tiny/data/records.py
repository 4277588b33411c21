"""A row as a record: a `tf.train.Example` with one bytes feature, as TFDS writes and reads it.

All records of a dataset have the same length, so that the ids always lie in the same last bytes,
and reading a row needs no protocol buffer.
"""

from typing import Any

import numpy as np

FEATURE = "ids"


def row_dtype(vocab_size: int) -> np.dtype:
    """The type of an id on disk: two bytes where the vocabulary allows it, else four."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<i4")


def encode_row(row_t: np.ndarray) -> bytes:
    """The record of a row whose ids have their type on disk."""
    bytes_list = _field(1, row_t.tobytes())
    feature = _field(1, bytes_list)
    entry = _field(1, FEATURE.encode()) + _field(2, feature)
    features = _field(1, entry)
    return _field(1, features)


def decode_rows(records: list[bytes], row_length: int, dtype: np.dtype) -> np.ndarray:
    """The int32 ids [len(records), row_length] of some records.

    Raises:
      ValueError: a record is shorter than a row.
    """
    rows_bt = np.empty((len(records), row_length), np.int32)
    for row_t, record in zip(rows_bt, records, strict=True):
        row_t[:] = np.frombuffer(
            record, dtype, row_length, offset=len(record) - row_length * dtype.itemsize
        )
    return rows_bt


def tfds_features(row_length: int, dtype: np.dtype) -> Any:
    """The same record in TFDS's own words."""
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(
        {
            FEATURE: tfds.features.Tensor(
                shape=(row_length,), dtype=dtype.newbyteorder("=").type, encoding="bytes"
            )
        }
    )


def _field(number: int, payload: bytes) -> bytes:
    """A length-delimited protocol-buffer field."""
    length, size = bytearray(), len(payload)
    while size > 127:
        length.append(size & 127 | 128)
        size >>= 7
    length.append(size)
    return bytes([number << 3 | 2]) + bytes(length) + payload
