"""A user's own children, schedules and functions are saved as by plain Keras."""

import copy

import keras
import pytest

from sequential_optimizer import SequentialOptimizer
from tests.helpers.oracle import assert_same
from tests.helpers.saving import BOUNDARY, build, make_model, state_of, train

optimizers = keras.optimizers


class _SignDescent(optimizers.Optimizer):
    """A user's own optimizer, with an extra argument and an extra variable."""

    def __init__(self, learning_rate=0.01, decay=0.5, **kwargs):
        super().__init__(learning_rate=learning_rate, **kwargs)
        self.decay = decay

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        self.sums = [self.add_variable_from_reference(v, "sum") for v in variables]

    def update_step(self, gradient, variable, learning_rate):
        total = self.sums[self._get_variable_index(variable)]
        self.assign(total, total * self.decay + gradient)
        self.assign_sub(variable, learning_rate * keras.ops.sign(total))

    def get_config(self):
        return {**super().get_config(), "decay": self.decay}


@keras.saving.register_keras_serializable(package="tests")
class _Registered(_SignDescent):
    pass


def _with_own_class(cls):
    return SequentialOptimizer(
        [optimizers.Adam(0.05), cls(0.02, decay=0.25)], [BOUNDARY]
    )


@pytest.mark.parametrize("calls", [2, 3, 4])
@pytest.mark.parametrize("cls", [_SignDescent, _Registered])
def test_child_of_a_users_own_class_continues(tmp_path, cls, calls):
    expected = train(make_model(_with_own_class(cls)), 0, 6)
    model = make_model(_with_own_class(cls))
    train(model, 0, calls)
    model.save(tmp_path / "own.keras")
    custom_objects = None if cls is _Registered else {cls.__name__: cls}
    loaded = keras.saving.load_model(tmp_path / "own.keras", custom_objects)
    assert type(loaded.optimizer.children[1]) is cls
    assert loaded.optimizer.children[1].decay == 0.25
    assert_same(state_of(loaded), expected[calls - 1])
    assert_same(train(loaded, calls, 6), expected[calls:])


def _alone(child):
    return child


def _in_sequence(child):
    return SequentialOptimizer([child, optimizers.SGD(0.02, momentum=0.9)], [BOUNDARY])


@pytest.mark.parametrize("around", [_alone, _in_sequence])
def test_custom_objects_are_needed_as_for_a_plain_optimizer(tmp_path, around):
    # Keras finds a class of a module by itself, but not one of a function.
    class Local(_SignDescent):
        pass

    model = build(make_model(around(Local())))
    model.save(tmp_path / "own.keras")
    with pytest.raises(TypeError, match="Could not locate class 'Local'"):
        keras.saving.load_model(tmp_path / "own.keras")
    with keras.saving.custom_object_scope({"Local": Local}):
        loaded = keras.saving.load_model(tmp_path / "own.keras")
    assert_same(state_of(loaded), state_of(model))


def test_attribute_of_a_users_class_makes_it_no_sequence(tmp_path):
    # A child was once taken for a sequence by the name of an attribute.
    class Stateful(keras.optimizers.SGD):
        _saved_state = "of the user"

    model = build(make_model(SequentialOptimizer([Stateful(0.1), "adam"], [1])))
    model.save_weights(tmp_path / "model.weights.h5")
    assert (
        "Stateful"
        in model.optimizer._saved_state.layout()["optimizers"]["children/0/"]["class"]
    )


def test_from_config_passes_custom_objects():
    # Keras puts the schedule itself in its place, in the config that it is given.
    schedule = optimizers.schedules.ExponentialDecay(0.05, 1, 0.5)
    config = SequentialOptimizer(
        [optimizers.SGD(schedule), _SignDescent()], [BOUNDARY]
    ).get_config()
    before = copy.deepcopy(config)
    optimizer = SequentialOptimizer.from_config(
        config, custom_objects={"_SignDescent": _SignDescent}
    )
    assert type(optimizer.children[1]) is _SignDescent
    assert config == before


@pytest.mark.parametrize("around", [_alone, _in_sequence])
def test_lambda_needs_safe_mode_off_as_for_a_plain_optimizer(tmp_path, around):
    def make():
        return around(optimizers.Adam(lambda: 0.03))

    model = make_model(make())
    train(model, 0, 2)
    with pytest.warns(UserWarning, match="includes a `lambda`"):
        model.save(tmp_path / "lambda.keras")
    with pytest.raises(ValueError, match="safe_mode"):
        keras.saving.load_model(tmp_path / "lambda.keras", safe_mode=True)
    loaded = keras.saving.load_model(tmp_path / "lambda.keras", safe_mode=False)
    assert_same(train(loaded, 2, 6), train(model, 2, 6))


def test_registered_function_needs_no_safe_mode_off(tmp_path):
    model = make_model(
        SequentialOptimizer(
            [optimizers.SGD(0.02), optimizers.Adam(_learning_rate)], [BOUNDARY]
        )
    )
    train(model, 0, BOUNDARY)
    model.save(tmp_path / "function.keras")
    loaded = keras.saving.load_model(tmp_path / "function.keras")
    assert_same(train(loaded, BOUNDARY, 6), train(model, BOUNDARY, 6))


@keras.saving.register_keras_serializable(package="tests")
def _learning_rate():
    return 0.03
