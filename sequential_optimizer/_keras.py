"""Refuses at import what SequentialOptimizer could only fail on later."""

import os

import keras

_OLDEST_KERAS = (3, 5)


def check_keras() -> None:
    """Raises ImportError unless `tf.keras` is a Keras 3 this package works with."""
    if os.environ.get("TF_USE_LEGACY_KERAS") in ("1", "True", "true"):
        raise ImportError(
            "`sequential_optimizer` needs Keras 3, but TF_USE_LEGACY_KERAS makes "
            "`tf.keras` Keras 2. Received: "
            f"TF_USE_LEGACY_KERAS={os.environ['TF_USE_LEGACY_KERAS']}. "
            "Unset the environment variable before you import TensorFlow."
        )
    version = tuple(int(part) for part in keras.__version__.split(".")[:2])
    if version < _OLDEST_KERAS:
        raise ImportError(
            "`sequential_optimizer` needs Keras >= 3.5. "
            f"Received: Keras {keras.__version__}. "
            "Upgrade with `pip install 'keras>=3.5'`."
        )
    if keras.config.backend() != "tensorflow":
        raise ImportError(
            "`sequential_optimizer` needs the TensorFlow backend of Keras. "
            f"Received: the backend {keras.config.backend()!r}. "
            "Set KERAS_BACKEND=tensorflow before you import Keras."
        )
