"""What each worker of the 2-process cluster runs: the sequence, and the oracle.

The oracle is plain optimizers, called by hand under the same strategy and switched with
a Python `if`. Both leave the same arrays behind: each weight and each counter after
every update, and all optimizer variables at the end.
"""

import functools
import re
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from sequential_optimizer import SequentialOptimizer, SwitchOnPlateau
from tests.slow import full_batch

Adam = keras.optimizers.Adam
SGD = keras.optimizers.SGD
schedules = keras.optimizers.schedules

UPDATES = 8
WORKERS = 2
AVERAGE = {"use_ema": True, "ema_momentum": 0.7}


# --- optimizers, one per phase -------------------------------------------------


def adam_sgd():
    return [Adam(0.1, name="adam"), SGD(0.05, momentum=0.9, name="sgd")]


def adam_sgd_late():
    return [*adam_sgd(), Adam(0.02, beta_1=0.5, name="late")]


def with_settings():
    """Returns children with every setting that belongs to a child."""
    return [
        Adam(
            schedules.CosineDecay(0.1, 4),
            clipnorm=0.5,
            weight_decay=0.1,
            name="adam",
            **AVERAGE,
        ),
        SGD(
            schedules.ExponentialDecay(0.1, 2, 0.5),
            momentum=0.9,
            global_clipnorm=0.3,
            weight_decay=0.2,
            name="sgd",
            **AVERAGE,
        ),
    ]


# --- cases -----------------------------------------------------------------------


def do_nothing(optimizer: Any, *args: Any) -> None:
    pass


def sequence(plain: list, boundaries: list, **kwargs: Any) -> SequentialOptimizer:
    return SequentialOptimizer(plain, boundaries, **kwargs)


def nested(plain: list) -> SequentialOptimizer:
    inner = SequentialOptimizer(plain[:2], [2], name="inner")
    return SequentialOptimizer([inner, plain[2]], [5])


@dataclass(frozen=True)
class Case:
    """A sequence under a cluster, and what it has to equal.

    Args:
        plain: function that makes the optimizers of all phases.
        wrap: function from them to the sequence.
        switches: the updates from which the next optimizer is active.
        average: whether the sequence keeps a moving average.
        after: function of (optimizer, t, worker), called after update t.
        in_step: function of (optimizer, signal), called in the graph around the
            replicas; the signal is 1 on worker 1 after update 2, and otherwise 0.
        in_replica: function of (optimizer, worker), called in each replica.
    """

    plain: Callable[[], list]
    wrap: Callable[[list], SequentialOptimizer]
    switches: tuple[int, ...] = (3,)
    average: bool = False
    after: Callable[..., None] = do_nothing
    in_step: Callable[..., None] = do_nothing
    in_replica: Callable[..., None] = do_nothing


def drop_phases_after_third(optimizer: Any, t: int, worker: int) -> None:
    """Leaves the state that a run with more phases has saved in its eighth."""
    if t == 2:
        optimizer._min_phase.assign(7)


def advance_after(*calls: tuple[int, int]) -> Callable[..., None]:
    """Returns a function that calls `advance()` after the update t of a worker."""

    def after(optimizer: Any, t: int, worker: int) -> None:
        if (t, worker) in calls:
            optimizer.advance()

    return after


def advance_on_signal(optimizer: Any, signal: tf.Tensor) -> None:
    tf.cond(signal > 0, optimizer.advance, lambda: None)


def advance_in_replica_of(*workers: int) -> Callable[..., None]:
    def in_replica(optimizer: Any, worker: int) -> None:
        if worker in workers:
            optimizer.advance()

    return in_replica


class Epochs:
    """Drives a SwitchOnPlateau by hand, an epoch of two updates at a time.

    Args:
        losses: for each worker the loss after each epoch.
    """

    def __init__(self, *losses: tuple[float, ...]) -> None:
        self._losses = losses

    def __call__(self, optimizer: Any, t: int, worker: int) -> None:
        epoch, is_end = divmod(t, 2)
        if t == 0:
            self._callback = SwitchOnPlateau("loss", patience=1)
            self._callback.set_model(types.SimpleNamespace(optimizer=optimizer))
        if is_end:
            logs = {"loss": self._losses[worker][epoch]}
            self._callback.on_epoch_end(epoch, logs)
        else:
            self._callback.on_epoch_begin(epoch)


def is_sequence_of(plain: Callable[[], list], boundaries: list, **kwargs: Any) -> Case:
    return Case(
        plain,
        functools.partial(sequence, boundaries=boundaries),
        **{"switches": tuple(boundaries), **kwargs},
    )


CASES = {
    "adam, sgd": is_sequence_of(adam_sgd, [3]),
    "settings of the children": is_sequence_of(with_settings, [3]),
    "average of the parent": Case(
        adam_sgd,
        functools.partial(sequence, boundaries=[3], **AVERAGE),
        average=True,
    ),
    "nested": Case(adam_sgd_late, nested, (2, 5)),
}
ENDED = {
    "by one worker": is_sequence_of(
        adam_sgd, [None], switches=(3,), after=advance_after((2, 1))
    ),
    "by both workers, one phase": is_sequence_of(
        adam_sgd_late,
        [None, None],
        switches=(3, 6),
        after=advance_after((2, 0), (2, 1), (5, 0)),
    ),
    "by one worker at a boundary, two phases": is_sequence_of(
        adam_sgd_late, [3, None], switches=(3, 3), after=advance_after((2, 1))
    ),
    "by one worker's condition around the replicas": is_sequence_of(
        adam_sgd, [None], switches=(3,), in_step=advance_on_signal
    ),
    "in a run that had more phases": is_sequence_of(
        adam_sgd, [None], switches=(3,), after=drop_phases_after_third
    ),
    "in the replicas of both": is_sequence_of(
        adam_sgd_late,
        [None, None],
        switches=(1, 2),
        in_replica=advance_in_replica_of(0, 1),
    ),
    "in the replica of one": is_sequence_of(
        adam_sgd_late,
        [None, None],
        switches=(1, 2),
        in_replica=advance_in_replica_of(1),
    ),
    "by the plateau of one worker": is_sequence_of(
        adam_sgd_late,
        [None, None],
        switches=(4,),
        after=Epochs((4.0, 3.0, 2.0, 1.0), (4.0, 5.0, 3.0, 2.0)),
    ),
    "by the plateaus of both, one phase": is_sequence_of(
        adam_sgd_late,
        [None, None],
        switches=(4,),
        after=Epochs((4.0, 5.0, 3.0, 2.0), (3.0, 3.0, 2.0, 1.0)),
    ),
}


# --- running them ----------------------------------------------------------------


def make_batches(worker: int) -> list[tuple[tf.Tensor, ...]]:
    """Returns the batches of a worker: inputs, rows of the table, the signal."""
    rng = np.random.default_rng(worker)
    return [
        (
            tf.constant(rng.normal(size=(4, 3)), tf.float32),
            tf.constant(rng.integers(0, 5, size=(4,)), tf.int32),
            tf.constant(int((t, worker) == (2, 1))),
        )
        for t in range(UPDATES)
    ]


def make_variables() -> dict[str, keras.Variable]:
    """Returns the variables to train, with the same values at every call."""
    rng = np.random.default_rng(7)
    values = {
        "table": rng.normal(size=(5, 2)),  # its gradient is a tf.IndexedSlices
        "kernel": rng.uniform(size=(3, 2)),
        "unused": rng.normal(size=(2,)),  # its gradient is None
    }
    variables = {
        name: keras.Variable(value, dtype="float32", name=name)
        for name, value in values.items()
    }
    variables["kernel"].constraint = keras.constraints.NonNeg()
    return variables


def call_here(step: Callable, batch: tuple[tf.Tensor, ...]) -> None:
    step(*batch)


class Training:
    """Variables under the strategy, and what is left behind of their training.

    Args:
        strategy: they are created under it.
        worker: int, whose batches they are trained with.
        call: function of (step, batch) that runs a step.
    """

    def __init__(
        self, strategy: tf.distribute.Strategy, worker: int, call: Callable
    ) -> None:
        self.strategy = strategy
        self.worker = worker
        self.call = call
        with strategy.scope():
            self.variables = make_variables()
        self.traces: list[int] = []
        self._steps: list[Callable] = []
        self._history: dict[str, list[np.ndarray]] = {}

    def make_step(
        self,
        optimizers: list[Any],
        in_step: Callable[..., None] = do_nothing,
        in_replica: Callable[..., None] = do_nothing,
    ) -> Callable:
        """Returns a traced step in which the optimizers act one after the other."""
        variables = self.variables
        trained = list(variables.values())
        with self.strategy.scope():
            for optimizer in optimizers:
                optimizer.build(trained)

        def replica(x: tf.Tensor, rows: tf.Tensor) -> None:
            with tf.GradientTape() as tape:
                outputs = x @ variables["kernel"].value
                outputs += tf.gather(variables["table"].value, rows)
                loss = tf.reduce_mean((outputs - 1) ** 2)
            gradients = tape.gradient(loss, [variable.value for variable in trained])
            assert isinstance(gradients[0], tf.IndexedSlices)
            assert gradients[2] is None
            for optimizer in optimizers:
                optimizer.apply(gradients, trained)
            in_replica(optimizers[0], self.worker)

        @tf.function(autograph=False)
        def step(x: tf.Tensor, rows: tf.Tensor, signal: tf.Tensor) -> None:
            self.strategy.run(replica, args=(x, rows))
            in_step(optimizers[0], signal)

        self._steps.append(step)
        return step

    def note(self, **variables: keras.Variable) -> None:
        """Notes the values of variables, after each update or at the end."""
        for name, variable in variables.items():
            # One for each replica that this worker has: one.
            (value,) = self.strategy.experimental_local_results(variable.value)
            self._history.setdefault(name, []).append(value.numpy())

    def note_state(self, optimizer: Any) -> None:
        """Notes all variables of an optimizer under their paths."""
        for variable in optimizer.variables:
            # Keras numbers the names of what is created twice.
            path = re.sub(r"_\d+(?=/|$)", "", variable.path)
            self.note(**{f"{optimizer.name}: {path}": variable})

    def arrays(self) -> dict[str, np.ndarray]:
        arrays = {name: np.stack(values) for name, values in self._history.items()}
        traces = [step.experimental_get_tracing_count() for step in self._steps]
        return {"traces": np.array(traces), **arrays}


def run_sequence(
    case: Case,
    strategy: tf.distribute.Strategy,
    worker: int,
    call: Callable = call_here,
) -> dict[str, np.ndarray]:
    """Trains with the sequence; returns what it leaves behind."""
    training = Training(strategy, worker, call)
    with strategy.scope():
        plain = case.plain()
        optimizer = case.wrap(plain)
    step = training.make_step([optimizer], case.in_step, case.in_replica)
    for t, batch in enumerate(make_batches(worker)):
        training.call(step, batch)
        training.note(**training.variables, iterations=optimizer.iterations)
        training.note(**{f"made by {one.name}": one.iterations for one in plain})
        case.after(optimizer, t, worker)
    for one in plain:
        training.note_state(one)
    if case.average:
        for i, average in enumerate(optimizer._model_variables_moving_average):
            training.note(**{f"average {i}": average})
    return training.arrays()


# What several cases have to equal is run once.
@functools.cache
def run_plain(
    make: Callable[[], list],
    switches: tuple[int, ...],
    average: bool,
    strategy: tf.distribute.Strategy,
    worker: int,
    call: Callable = call_here,
) -> dict[str, np.ndarray]:
    """Trains with plain optimizers, each built when its phase starts."""
    training = Training(strategy, worker, call)
    with strategy.scope():
        plain = make()
        # It moves no weight, and averages those that the others have moved.
        averager = [SGD(0.0, name="averager", **AVERAGE)] if average else []
    steps: dict[int, Callable] = {}
    for t, batch in enumerate(make_batches(worker)):
        phase = sum(switch <= t for switch in switches)
        if phase not in steps:
            steps[phase] = training.make_step([plain[phase], *averager])
        training.call(steps[phase], batch)
        training.note(**training.variables)
        training.note(**{f"made by {one.name}": one.iterations for one in plain})
    for phase in steps:
        training.note_state(plain[phase])
    for one in averager:
        for i, value in enumerate(one._model_variables_moving_average):
            training.note(**{f"average {i}": value})
    return training.arrays()


def run_both(
    cases: dict[str, Case],
    strategy: tf.distribute.Strategy,
    worker: int,
    call: Callable = call_here,
) -> dict[str, np.ndarray]:
    """Runs cases with the sequence and with the oracle."""
    results: dict[str, np.ndarray] = {}
    for name, case in cases.items():
        plain = (case.plain, case.switches, case.average)
        results |= attempt(
            f"{name}/sequence", run_sequence, case, strategy, worker, call
        )
        results |= attempt(f"{name}/plain", run_plain, *plain, strategy, worker, call)
    return results


def attempt(name: str, run: Callable[..., dict], *args: Any) -> dict[str, np.ndarray]:
    """Returns the arrays of a run under its name, or its error as a text."""
    print(name, flush=True)
    try:
        return {f"{name}/{key}": value for key, value in run(*args).items()}
    except Exception as error:  # noqa: BLE001 (the test shows it)
        traceback.print_exc()
        return {f"{name}/error": np.array(f"{type(error).__name__}: {error}")}


def search(strategy: tf.distribute.Strategy, name: str) -> dict[str, np.ndarray]:
    """Trains on a full batch, of which each worker has a part."""
    values = full_batch.train(strategy, name)
    return {str(index): value for index, (value,) in enumerate(values)}


# --- what is refused ---------------------------------------------------------------


def advance_in_conditional(strategy: tf.distribute.Strategy, worker: int) -> dict:
    """Only one worker's condition would be true."""
    training = Training(strategy, worker, call_here)
    with strategy.scope():
        optimizer = SequentialOptimizer(adam_sgd(), [None])

    def in_replica(optimizer: Any, worker: int) -> None:
        is_decided = tf.constant(worker == 1)
        tf.cond(is_decided, optimizer.advance, lambda: None)

    step = training.make_step([optimizer], in_replica=in_replica)
    step(*make_batches(worker)[0])
    return {}


def accumulate(strategy: tf.distribute.Strategy, worker: int = 0) -> dict:
    with strategy.scope():
        SequentialOptimizer(adam_sgd(), [3], gradient_accumulation_steps=2)
    return {}


def fit_with_plain_adam(strategy: tf.distribute.Strategy, worker: int = 0) -> dict:
    with strategy.scope():
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        model.compile(Adam(0.1, name="adam"), loss="mse", jit_compile=False)
    x = np.ones((8, 3), "float32")
    data = tf.data.Dataset.from_tensor_slices((x, x[:, :1])).batch(4)
    model.fit(data, verbose=0)
    return {}


REFUSALS = {
    "advance in a conditional": advance_in_conditional,
    "accumulation": accumulate,
    # Last, because nothing can be said about the cluster after it has failed.
    "fit with plain Adam": fit_with_plain_adam,
}


def work(report: Callable, worker: int, file: str) -> None:
    """Runs all cases on a worker, and writes what they leave behind."""
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    assert strategy.num_replicas_in_sync == WORKERS
    results = run_both({**CASES, **ENDED}, strategy, worker)
    for name in full_batch.MAKE:
        results |= attempt(f"full batch, {name}", search, strategy, name)
    for name, refused in REFUSALS.items():
        results |= attempt(name, refused, strategy, worker)
    np.savez(file, **results)
