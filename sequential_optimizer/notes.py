"""What callbacks keep in the saved state of an optimizer.

A callback has no place of its own in a checkpoint, so a run that is killed and resumed
would forget how long it has waited. What it notes here is saved with the optimizer.
"""

import io
import zipfile
import zlib
from typing import Any

import numpy as np
import tensorflow as tf


class Notes(tf.train.experimental.PythonState):
    """Named arrays, saved with the optimizer that holds them.

    `arrays` is a dict from names to NumPy arrays of NumPy's own dtypes.
    """

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}

    def serialize(self) -> bytes:
        buffer = io.BytesIO()
        np.savez(buffer, **self.arrays)  # type: ignore[arg-type]
        return buffer.getvalue()

    def deserialize(self, string_value: Any) -> None:
        self.arrays = _read(string_value)

    def write(self, store: Any) -> None:
        """Writes the arrays, if there are any, into a Keras file."""
        if self.arrays:
            store["notes"] = np.frombuffer(self.serialize(), np.uint8)

    @staticmethod
    def in_store(store: Any) -> dict[str, np.ndarray]:
        """Returns what `write` wrote."""
        if "notes" in store.keys():  # noqa: SIM118  (a store is not quite a dict)
            return _read(np.asarray(store["notes"]).tobytes())
        return {}


def _read(serialized: bytes) -> dict[str, np.ndarray]:
    try:
        with np.load(io.BytesIO(serialized), allow_pickle=False) as arrays:
            return dict(arrays)
    except (ValueError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            "What callbacks noted in a saved `SequentialOptimizer` must be arrays in "
            f"NumPy's npz format. Received: {serialized[:50]!r}. The file is damaged: "
            "load an earlier one."
        ) from error
