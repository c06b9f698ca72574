"""The supported versions, and every private name of Keras and TensorFlow.

A new version of either should need changes in this file only. Each function stands
for one private name; `test_private_name_is_still_there` fails and says which names a
version no longer has. Five hooks have to be methods and are not here:
`_trackable_children` and `_lookup_dependency` of `SequentialOptimizer`,
`_serialize_to_tensors` and `_restore_from_tensors` of `Commit`, and
`_distributed_tf_update_step` of `QuasiNewton`.
"""

import contextlib
import os
import random
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf


def check_keras() -> None:
    """Raises ImportError unless `tf.keras` is a Keras 3 this package works with."""
    version = tuple(int(part) for part in keras.__version__.split(".")[:2])
    legacy = os.environ.get("TF_USE_LEGACY_KERAS")
    backend = keras.config.backend() if version >= (3, 0) else "tensorflow"
    if version < (3, 5) or backend != "tensorflow" or legacy in ("1", "True", "true"):
        raise ImportError(
            "`sequential_optimizer` needs Keras >= 3.5 with the TensorFlow backend. "
            f"Received: Keras {keras.__version__}, the backend {backend!r} and "
            f"TF_USE_LEGACY_KERAS={legacy}. Upgrade with `pip install 'keras>=3.5'`. "
            "Unset the environment variable before you import TensorFlow, and set "
            "KERAS_BACKEND=tensorflow before you import Keras."
        )


check_keras()  # before anything here needs a name that Keras 2 does not have


# --- the base class of optimizers --------------------------------------------


def own_variables(optimizer: Any) -> list[keras.Variable]:
    """The variables that a plain optimizer saves; a subclass may have others, too."""
    return list(optimizer._variables)


def trained_variables(optimizer: Any) -> list[Any]:
    """The variables that an optimizer was built on."""
    return list(optimizer._trainable_variables)


def call_count(optimizer: Any) -> keras.Variable:
    """Counts calls of `apply`; `iterations` counts a window of several as one."""
    return optimizer._iterations


def counter_and_rate(optimizer: Any) -> list[Any]:
    """The call counter and the learning rate, which is a variable or a schedule."""
    return [optimizer._iterations, optimizer._learning_rate]


def key_of(optimizer: Any, variable: Any) -> Any:
    """The key that a variable, its wrapper, and its copies in replicas share."""
    return optimizer._var_key(variable)


def is_trained(optimizer: Any, variable: Any) -> bool:
    """Whether an optimizer was built on this variable, among others."""
    return key_of(optimizer, variable) in optimizer._trainable_variables_indices


def accumulator_of(optimizer: Any, variable: Any) -> keras.Variable:
    """Where the gradients of a variable are added up."""
    return optimizer._accumulated_gradients[optimizer._get_variable_index(variable)]


def update_averages(optimizer: Any) -> None:
    """Moves the averages towards the weights."""
    optimizer._update_model_variables_moving_average(trained_variables(optimizer))


def averages_of(optimizer: Any, variables: Iterable[Any]) -> list[tuple[Any, Any]]:
    """Returns those of the variables that have a moving average, each with it."""
    averages = optimizer._model_variables_moving_average
    trained = [v for v in variables if is_trained(optimizer, v)]
    pairs = [(v, averages[optimizer._get_variable_index(v)]) for v in trained]
    return [(v, average) for v, average in pairs if average is not None]


def set_to_averages(optimizer: Any, variables: Iterable[Any]) -> None:
    """Sets those of the variables that have a moving average to it."""
    for variable, average in averages_of(optimizer, variables):
        optimizer.assign(variable, average)


# --- variables ---------------------------------------------------------------


def is_of_keras(variable: Any) -> bool:
    """Whether a variable is one of Keras, not of TensorFlow."""
    # Not `isinstance`: in older versions of Keras, layers have variables of the class
    # that `keras.Variable` is derived from.
    return hasattr(variable, "path")


def native(variable: Any) -> tf.Variable:
    """Returns the variable of TensorFlow that a variable of Keras wraps."""
    return variable.value if is_of_keras(variable) else variable


def path_of(variable: Any) -> str:
    """Returns the path of a variable of Keras, or the name of one of TensorFlow."""
    return variable.path if is_of_keras(variable) else variable.name


# --- random numbers ----------------------------------------------------------


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Restores the random state of Keras, NumPy and Python at the end."""
    from keras.src.backend.common import global_state  # not in Keras 2

    generator = global_state.get_global_attribute("global_seed_generator")
    python, numpy = random.getstate(), np.random.get_state()
    # Keras makes a new one if it needs one.
    global_state.set_global_attribute("global_seed_generator", None)
    try:
        yield
    finally:
        global_state.set_global_attribute("global_seed_generator", generator)
        random.setstate(python)
        np.random.set_state(numpy)


# --- saved files -------------------------------------------------------------


def stored_shape(store: Any, key: str) -> tuple[int, ...] | None:
    """Returns the shape of an array in a Keras file, without reading the array.

    `None` if only reading can tell: in the later shards of a sharded file.
    """
    for group_name in ("_h5_entry_group", "group"):  # the latter before Keras 3.9
        store = getattr(store, group_name, store)
    return tuple(store[key].shape) if key in store else None


# --- graphs of TensorFlow ----------------------------------------------------

# See _switch_case.py.
PROPAGATE_CONSTANTS = "_xla_propagate_compile_time_consts"


def stop_propagating_constants(operation: tf.Operation) -> None:
    """Tells XLA not to look for compile-time constants among the inputs."""
    operation._set_attr(PROPAGATE_CONSTANTS, tf.compat.v1.AttrValue(b=False))


def repeat_constants(graph: Any) -> None:
    """Lets a graph repeat the small constants of the graphs around it.

    TensorFlow would make them inputs of the graph, which are not constants to XLA;
    but XLA needs the axis of a sum, say, when it compiles.
    """
    capture, repeated = graph.capture, {}

    def repeat_or_capture(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_small_constant(tensor, graph):
            return capture(tensor, *args, **kwargs)
        if id(tensor) not in repeated:
            with graph.as_default(), tf.control_dependencies(None):
                constant = tf.constant(tf.get_static_value(tensor), tensor.dtype)
            repeated[id(tensor)] = constant, tensor  # held, so its id stays unique
        return repeated[id(tensor)][0]

    graph.capture = repeat_or_capture


def _is_small_constant(tensor: Any, graph: Any) -> bool:
    """Whether a tensor is a small constant from outside `graph`."""
    # TensorFlow has the same limit for eager tensors.
    is_small = (tensor.shape.num_elements() or 0) <= 128
    is_eager = not tf.is_symbolic_tensor(tensor)
    is_constant = is_eager or (tensor.graph is not graph and tensor.op.type == "Const")
    return is_small and is_constant and tensor.dtype.is_numpy_compatible
