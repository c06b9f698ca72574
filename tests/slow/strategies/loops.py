"""The oracle under a strategy: what tests/helpers/oracle.py does, on every replica.

The replicas get different gradients. The values of a variable on each of them are
compared, bit for bit.
"""

import itertools

import keras
import numpy as np
import tensorflow as tf

from tests.slow.strategies.conftest import AGGREGATES, NAME, STRATEGIES

# The values that a variable has: one per replica where each has its own copy.
COPIES = STRATEGIES[NAME][0] if NAME.startswith("mirrored") else 1

UPDATES = 6
MODES = ("graph", "eager", "range")

# What plain Keras can do under this strategy; test_limits.py says what it cannot.
HAS_CONSTRAINTS = HAS_AVERAGE_OF_CHILD = HAS_BATCH_NORMALIZATION = (
    NAME != "central-storage"
)
# Keras 3.5 calls the train step in a Python loop, newer ones in a `tf.while_loop`.
HAS_SEVERAL_STEPS = not NAME.startswith("mirrored") or not AGGREGATES

_MOST_REPLICAS = 4
_SHAPES = {"kernel": (3, 2), "bias": (2,), "table": (4, 2), "unused": (2,)}
_ROWS = [0, 3, 3]  # of the table, in its sparse gradient: one row twice

_RNG = np.random.default_rng(0)
_VALUES = {name: _RNG.normal(size=shape) for name, shape in _SHAPES.items()}
# Small multiples of 1/32: sums over replicas are exact, in any order.
GRADIENTS = {
    name: _RNG.integers(-64, 64, size=(_MOST_REPLICAS, UPDATES, *shape)) / 32
    for name, shape in {**_SHAPES, "table": (len(_ROWS), 2)}.items()
}


def make_variables(strategy):
    """Returns variables of each kind: with a constraint, without, sparse, unused."""
    with strategy.scope():
        variables = [
            keras.Variable(value, dtype="float32", name=name)
            for name, value in _VALUES.items()
        ]
        if HAS_CONSTRAINTS:
            variables[0].constraint = keras.constraints.UnitNorm()
    return variables


def replica_id():
    return tf.distribute.get_replica_context().replica_id_in_sync_group


def gradients_of(update):
    """Returns the gradients of one update in the replica that asks."""
    kernel, bias, table = (
        tf.constant(GRADIENTS[name], tf.float32)[replica_id(), update]
        for name in ("kernel", "bias", "table")
    )
    shape = tf.constant(_SHAPES["table"], tf.int64)
    return [kernel, bias, tf.IndexedSlices(table, tf.constant(_ROWS), shape), None]


def values_of(strategy, variables):
    """Returns for each variable the list of its values, one per replica."""
    return [
        [
            np.array(part.numpy())
            for part in strategy.experimental_local_results(v.value)
        ]
        for v in variables
    ]


def counts_of(strategy, optimizers):
    """Returns for each replica how many updates it counts for each optimizer."""
    counts = values_of(strategy, [optimizer._iterations for optimizer in optimizers])
    return [[int(count) for count in replica] for replica in zip(*counts, strict=True)]


def build(strategy, optimizer, variables):
    with strategy.scope():
        optimizer.build(variables)


class Loop:
    """A training loop around `strategy.run`.

    Its mode is "graph", a traced step that is called in Python, "eager", the same step
    untraced, or "range", a traced `for` over a `tf.range`.
    """

    def __init__(self, strategy, optimizer, variables, mode):
        self.mode = mode
        self.replica_calls = 0  # in Python, so in a graph once per replica and trace

        @tf.autograph.experimental.do_not_convert
        def replica(update):
            self.replica_calls += 1
            optimizer.apply(gradients_of(update), variables)

        def step(update):
            strategy.run(replica, args=(update,))

        def loop(first, last):
            for update in tf.range(first, last):
                strategy.run(replica, args=(update,))

        self.function = {
            "graph": tf.function(step, autograph=False),
            "eager": step,
            "range": tf.function(loop),
        }[mode]

    def train(self, first=0, last=UPDATES):
        """Makes the updates from `first` up to `last`."""
        if self.mode == "range":
            self.function(tf.constant(first), tf.constant(last))
            return
        for update in range(first, last):
            self.function(tf.constant(update))


class PlainLoops:
    """A training loop with plain optimizers, each built when it is first used."""

    def __init__(self, strategy, mode):
        self.variables = make_variables(strategy)
        self._strategy = strategy
        self._mode = mode
        self._loops = {}

    def train(self, optimizer, first, last):
        """Makes the updates from `first` up to `last` with `optimizer`."""
        if id(optimizer) not in self._loops:
            build(self._strategy, optimizer, self.variables)
            self._loops[id(optimizer)] = Loop(
                self._strategy, optimizer, self.variables, self._mode
            )
        self._loops[id(optimizer)].train(first, last)


def run_plain(strategy, optimizers, boundaries, mode):
    """Trains with one optimizer per phase; returns the values of the variables."""
    loops = PlainLoops(strategy, mode)
    phases = itertools.pairwise([0, *boundaries, UPDATES])
    for optimizer, (first, last) in zip(optimizers, phases, strict=True):
        loops.train(optimizer, first, last)
    return values_of(strategy, loops.variables)
