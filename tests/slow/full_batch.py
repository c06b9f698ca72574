"""A run on a full batch, whose rows are spread over the replicas of a strategy."""

import keras
import numpy as np
import tensorflow as tf

from sequential_optimizer import LBFGS, SequentialOptimizer, SSBroyden

UPDATES = 15
ROWS = 16
# For weights of about 1, in float64: gradients are added up in another order.
ATOL = 1e-9

_RNG = np.random.default_rng(3)
X = _RNG.normal(size=(ROWS, 3))
Y = np.sin(2 * X.sum(-1, keepdims=True))
_WEIGHTS = [_RNG.normal(size=shape) / 2 for shape in ((3, 4), (4, 1))]


def make_sequence():
    # Without an epsilon the scale of the loss, which `fit` of Keras 3.5 multiplies by
    # the number of replicas, does not matter.
    adam = keras.optimizers.Adam(0.05, epsilon=1e-12, name="adam")
    return SequentialOptimizer([adam, LBFGS(0.25, history_size=4)], [3])


MAKE = {
    "LBFGS": lambda: LBFGS(0.25, history_size=4),
    "SSBroyden": lambda: SSBroyden(0.25),
    "sequence": make_sequence,
}


def train(strategy, name, mode="graph"):
    """Trains in a loop; returns for each variable its values, one per replica here."""
    with strategy.scope():
        weights = [keras.Variable(value, dtype="float64") for value in _WEIGHTS]
        optimizer = MAKE[name]()
        optimizer.build(weights)
    x, y = (
        tf.reshape(a, (strategy.num_replicas_in_sync, -1, a.shape[1])) for a in (X, Y)
    )

    @tf.autograph.experimental.do_not_convert
    def replica():
        own = tf.distribute.get_replica_context().replica_id_in_sync_group
        with tf.GradientTape() as tape:
            outputs = tf.tanh(x[own] @ weights[0].value) @ weights[1].value
            loss = tf.reduce_sum((outputs - y[own]) ** 2) / ROWS
        optimizer.apply(tape.gradient(loss, [w.value for w in weights]), weights)

    def step():
        strategy.run(replica)

    if mode == "graph":
        step = tf.function(step, autograph=False)
    for _ in range(UPDATES):
        step()
    if mode == "graph":
        assert step.experimental_get_tracing_count() == 1
    return [
        [np.array(v.numpy()) for v in strategy.experimental_local_results(one.value)]
        for one in [*weights, *optimizer.variables]
    ]
