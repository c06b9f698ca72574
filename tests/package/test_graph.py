"""The graph of a step: what makes XLA compile it fast, and the private names in it."""

import keras
import pytest
import tensorflow as tf

import sequential_optimizer
from sequential_optimizer import SequentialOptimizer, _keras
from sequential_optimizer._keras import PROPAGATE_CONSTANTS
from tests.helpers.oracle import make_gradients, make_variables

CASES = ("Case", "StatelessCase")


def adam_then_sgd(**kwargs):
    children = [keras.optimizers.Adam(), keras.optimizers.SGD(0.01, momentum=0.9)]
    return SequentialOptimizer(children, [3], **kwargs)


SETTINGS = {
    "plain": adam_then_sgd,
    "accumulation": lambda: adam_then_sgd(gradient_accumulation_steps=2),
    "loss scaling": lambda: keras.optimizers.LossScaleOptimizer(adam_then_sgd()),
    "nested": lambda: SequentialOptimizer(
        [keras.optimizers.SGD(0.1, name="first"), adam_then_sgd(name="inner")], [2]
    ),
}


def nodes_of(function, *args):
    """Returns the nodes of a traced function and of every function it calls."""
    graph = function.get_concrete_function(*args).graph.as_graph_def()
    nodes = list(graph.node)
    for inner in graph.library.function:
        nodes.extend(inner.node_def)
    return nodes


def cases_asking_for_constants(nodes):
    cases = [node for node in nodes if node.op in CASES]
    assert cases
    return [node.name for node in cases if node.attr[PROPAGATE_CONSTANTS].b]


@pytest.mark.parametrize("in_loop", [False, True], ids=["step", "while_loop"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_no_case_asks_xla_for_compile_time_constants(setting, in_loop):
    variables = make_variables()
    optimizer = SETTINGS[setting]()
    optimizer.build(variables)

    def step(*grads):
        optimizer.apply(list(grads), variables)

    @tf.function(jit_compile=True)
    def train(*grads):
        if in_loop:
            for _ in tf.range(3):
                step(*grads)
        else:
            step(*grads)

    assert (
        cases_asking_for_constants(nodes_of(train, *make_gradients(variables, 1)[0]))
        == []
    )


def test_learning_rate_in_the_graph_does_not_ask_either():
    optimizer = adam_then_sgd()

    @tf.function(jit_compile=True)
    def read():
        return optimizer.learning_rate + 0.0

    assert cases_asking_for_constants(nodes_of(read)) == []


def test_tensorflow_still_asks_for_compile_time_constants():
    # If this fails, TensorFlow no longer sets the attribute: then there is no need to
    # clear it in _switch_case.py, with the private `_set_attr`, any more.
    variable = tf.Variable(1.0)

    @tf.function(jit_compile=True)
    def step(index):
        tf.switch_case(
            index,
            [lambda: variable.assign_add(1.0), lambda: variable.assign_add(2.0)],
        )

    nodes = nodes_of(step, tf.constant(0))
    assert len(cases_asking_for_constants(nodes)) == 1


@pytest.mark.parametrize(
    "name",
    [
        "_accumulated_gradients",
        "_distributed_tf_update_step",
        "_get_variable_index",
        "_iterations",
        "_learning_rate",
        "_lookup_dependency",
        "_model_variables_moving_average",
        "_trackable_children",
        "_trainable_variables",
        "_trainable_variables_indices",
        "_update_model_variables_moving_average",
        "_var_key",
        "_variables",
    ],
)
def test_private_name_is_still_there(name):
    # If this fails, this version of Keras or TensorFlow has renamed what the package
    # builds upon: `_keras.py` says what for.
    optimizer = keras.optimizers.SGD(use_ema=True, gradient_accumulation_steps=2)
    optimizer.build(make_variables())
    assert hasattr(optimizer, name)


def test_keras_still_has_the_global_seed_generator():
    # As above, for `_keras.random_state_kept`.
    from keras.src.backend.common import global_state

    keras.random.uniform(())
    assert global_state.get_global_attribute("global_seed_generator") is not None


def test_operations_still_have_the_private_set_attr():
    # As above.
    assert hasattr(tf.Operation, "_set_attr")


def test_graphs_of_functions_still_capture():
    # `_keras.repeat_constants` replaces the method.
    graphs = []
    tf.function(lambda: graphs.append(tf.compat.v1.get_default_graph()))()
    assert callable(graphs[0].capture)


@pytest.mark.parametrize("name", ["_serialize_to_tensors", "_restore_from_tensors"])
def test_modules_still_have_the_private_hooks_of_checkpoints(name):
    # `_saving.Commit` builds upon them.
    assert hasattr(tf.Module, name)


def test_shape_in_a_keras_file_is_told_without_reading(tmp_path):
    # `_keras.stored_shape` knows two names for what Keras keeps of an h5 group.
    shapes = []

    class Looking(keras.optimizers.SGD):
        def load_own_variables(self, store):
            shapes.append(_keras.stored_shape(store, "0"))
            shapes.append(_keras.stored_shape(store, "7"))

    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile(Looking())
    model.save_weights(tmp_path / "model.weights.h5")
    model.load_weights(tmp_path / "model.weights.h5")
    assert shapes == [(), None]


def test_nothing_is_public_by_accident():
    assert sequential_optimizer.__all__ == [
        "LBFGS",
        "PhaseLogger",
        "SSBroyden",
        "SequentialOptimizer",
        "SwitchOnPlateau",
        "plot_history",
    ]
    own = {
        name
        for name in vars(SequentialOptimizer)
        if not name.startswith("_") and not hasattr(keras.optimizers.Optimizer, name)
    }
    assert own == {
        "active_child",
        "advance",
        "boundaries",
        "child_of_phase",
        "notes",
        "phase",
        "phase_starts",
        "restart_averages",
    }
    # Keras' callbacks take an optimizer that has it for a MultiOptimizer.
    assert not hasattr(SequentialOptimizer(["adam"], []), "optimizers")


def test_tflite_still_cannot_run_a_case():
    # A converted train step fails with "Function ... is not defined": ours, and any
    # with a `tf.switch_case`. If this fails, TFLite has its own operations for that:
    # see whether a model now trains on a device, and say so in the README.
    class Module(tf.Module):
        def __init__(self):
            self.weight = tf.Variable([1.0, 2.0])

        @tf.function(input_signature=[tf.TensorSpec([], tf.int32), tf.TensorSpec([2])])
        def step(self, index, x):
            def add():
                self.weight.assign_add(x)

            def subtract():
                self.weight.assign_sub(x)

            tf.switch_case(index, [add, subtract])
            return tf.identity(self.weight)

    module = Module()
    step = module.step.get_concrete_function()
    converter = tf.lite.TFLiteConverter.from_concrete_functions([step], module)
    converter.target_spec.supported_ops = [
        tf.lite.OpsSet.TFLITE_BUILTINS,
        tf.lite.OpsSet.SELECT_TF_OPS,
    ]
    converter.experimental_enable_resource_variables = True
    assert b"FlexCase" in converter.convert()
