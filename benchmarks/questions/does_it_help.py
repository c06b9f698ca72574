"""Does switching make a better model?

    python -m benchmarks does_it_help            # about 15 minutes on two cores
    python -m benchmarks does_it_help --quick    # seconds, but too short to compare

Adam, SGD with momentum, both in a sequence that switches halfway, and both in one that
`SwitchOnPlateau` switches, on two tasks (workloads/learning_tasks.py). Two more tell
what the switch is worth: Adam that lowers its learning rate to a tenth halfway, and the
sequence that takes SGD's learning rate from Adam by a rule of thumb. Learning
rates are tuned for all by the same rule: from one grid, or for a sequence from all its
pairs, those with the lowest mean loss on the validation data, over seeds that are not
used for testing. Then once more with Keras' default rates, as one would begin. A
seed sets the data, the first weights and the order of the batches, for
all alike, so differences are taken seed by seed.
"""

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure
from scipy import stats

from benchmarks.harness import report
from benchmarks.harness.checks import check_same
from benchmarks.harness.drawing import COLORS
from benchmarks.harness.terminal import Progress
from benchmarks.workloads.learning_tasks import (
    BATCH,
    Data,
    LearningTask,
    Split,
    digits_task,
    teacher_task,
)
from sequential_optimizer import SequentialOptimizer, SwitchOnPlateau

ALONE = ("Adam", "SGD")
HALFWAY, PLATEAU = "switch halfway", "switch on plateau"
LOWERED, RULE = "Adam, lowered halfway", "switch by rule of thumb"
CONTENDERS = (*ALONE, HALFWAY, PLATEAU, LOWERED, RULE)
LOWERED_BY = 0.1
MOMENTUM = 0.9
CONFIDENCE = 0.95
# Those that Keras gives Adam and SGD.
DEFAULT_RATES = {"Adam": (1e-3,), "SGD": (1e-2,), LOWERED: (1e-3,), RULE: (1e-3,)}
DEFAULT_RATES |= dict.fromkeys((HALFWAY, PLATEAU), (1e-3, 1e-2))


@dataclass(frozen=True)
class Settings:
    """How long it takes.

    Args:
        digits_epochs: epochs of 33 updates, an even number.
        teacher_epochs: epochs of 100 updates, an even number.
        rates: the grid of learning rates.
        tuning_seeds: runs for each entry of the grid.
        seeds: runs for testing.
        patience: epochs without improvement by 1% of the first loss, before the switch
            on a plateau.
    """

    digits_epochs: int = 20
    teacher_epochs: int = 20
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    tuning_seeds: int = 3
    seeds: int = 10
    patience: int = 3


FULL = Settings()
QUICK = Settings(
    digits_epochs=2, teacher_epochs=2, rates=(1e-2,), tuning_seeds=1, seeds=2
)
# Far from those for testing.
FIRST_TUNING_SEED = 1000


def measure(settings: Settings) -> dict[str, Any]:
    """Returns a row per contender, and one per difference of two; tuned and not."""
    result: dict[str, Any] = {
        "contenders": [],
        "differences": [],
        "untuned": [],
        "untuned_differences": [],
    }
    for task in (
        digits_task(settings.digits_epochs),
        teacher_task(settings.teacher_epochs),
    ):
        tuned, untuned = measure_task(task, settings)
        result["contenders"] += tuned
        result["differences"] += compare(tuned)
        result["untuned"] += untuned
        result["untuned_differences"] += compare(untuned)
    return result


# --- one run -------------------------------------------------------------------


class Contender:
    """A model with its optimizer, trained again and again without a new trace."""

    def __init__(self, name: str, task: LearningTask, updates: int, patience: int):
        self.name = name
        self.patience = patience
        self.task = task
        self.model = task.make_model()
        self.optimizer = make_optimizer(name, updates // 2)
        # A callback finds the optimizer in the model.
        self.model.compile(optimizer=self.optimizer)
        self.optimizer.build(self.model.trainable_variables)
        self._fresh = [np.array(v.numpy()) for v in self.optimizer.variables]
        self._train_step = self._make_train_step()
        self._predict = tf.function(
            functools.partial(self.model, training=False), jit_compile=True
        )

    def _make_train_step(self) -> Any:
        def train_step(x: tf.Tensor, y: tf.Tensor) -> None:
            with tf.GradientTape() as tape:
                loss = self.task.loss(y, self.model(x, training=True))
            weights = self.model.trainable_variables
            self.optimizer.apply(tape.gradient(loss, weights), weights)

        return tf.function(train_step, jit_compile=True, autograph=False)

    @property
    def children(self) -> list[keras.optimizers.Optimizer]:
        """The optimizers that have a learning rate."""
        return getattr(self.optimizer, "children", [self.optimizer])

    def restart(self, seed: int, rates: tuple[float, ...]) -> None:
        """Sets the first weights, and a fresh optimizer with these learning rates."""
        keras.utils.set_random_seed(seed)
        self.model.set_weights(self.task.make_model().get_weights())
        for variable, value in zip(self.optimizer.variables, self._fresh, strict=True):
            variable.assign(value)
        # The rule of thumb sets the second one later.
        for child, rate in zip(self.children, rates, strict=False):
            child.learning_rate = rate

    def train_epoch(self, data: Data, order: np.ndarray) -> None:
        """Makes an update with each row of `order`."""
        x, y = data
        for rows in order:
            self._train_step(tf.constant(x[rows]), tf.constant(y[rows]))

    def loss_and_outputs(self, data: Data) -> tuple[float, np.ndarray]:
        """Returns the loss on some data, and what the model makes of them."""
        outputs = self._predict(tf.constant(data[0]))
        return float(self.task.loss(data[1], outputs)), outputs.numpy()

    def train(self, seed: int, rates: tuple[float, ...]) -> dict[str, Any]:
        """Makes a whole run and returns how it ended."""
        split = self.task.load(seed)
        self.restart(seed, rates)
        callback = self._make_callback(split)
        rule = None
        for epoch, order in enumerate(orders(split, self.task.epochs, seed)):
            if callback:
                callback.on_epoch_begin(epoch)
            if 2 * epoch == self.task.epochs and self.name == LOWERED:
                self.optimizer.learning_rate = LOWERED_BY * rates[0]
            if 2 * epoch == self.task.epochs and self.name == RULE:
                adam, sgd = self.children
                rule = sgd.learning_rate = rate_by_rule(adam, MOMENTUM)
            self.train_epoch(split.train, order)
            if callback:
                loss, _ = self.loss_and_outputs(split.validation)
                callback.on_epoch_end(epoch, {"val_loss": loss})
        loss, _ = self.loss_and_outputs(split.validation)
        test_loss, outputs = self.loss_and_outputs(split.test)
        return {
            "validation_loss": loss,
            "test_loss": test_loss,
            "metric": self.task.judge(outputs, split.test[1]),
            "updates_by_child": [int(child.iterations) for child in self.children],
            "rate_by_rule": rule,
        }

    def _make_callback(self, split: Split) -> SwitchOnPlateau | None:
        if self.name != PLATEAU:
            return None
        loss, _ = self.loss_and_outputs(split.validation)
        callback = SwitchOnPlateau(
            "val_loss", patience=self.patience, min_delta=0.01 * loss
        )
        callback.set_model(self.model)
        callback.on_train_begin()
        return callback


def make_optimizer(name: str, boundary: int) -> keras.optimizers.Optimizer:
    """Returns the optimizer of a contender; its learning rates are set later."""
    adam = keras.optimizers.Adam(name="adam")
    sgd = keras.optimizers.SGD(momentum=MOMENTUM, name="sgd")
    if name in ("Adam", LOWERED):
        return adam
    if name == "SGD":
        return sgd
    return SequentialOptimizer([adam, sgd], [None if name == PLATEAU else boundary])


def rate_by_rule(adam: keras.optimizers.Adam, momentum: float) -> float:
    """Returns the learning rate with which SGD begins with steps as long as Adam's.

    SGD with momentum moves by rate / (1 - momentum) along a gradient that does not
    change. Adam has moved by its last step along its first moment.
    """
    firsts, seconds = (
        np.concatenate([v.numpy().ravel() for v in adam.variables if kind in v.name])
        for kind in ("_momentum", "_velocity")
    )
    count = int(adam.iterations)
    rate = float(adam.learning_rate) * np.sqrt(1 - adam.beta_2**count)
    rate /= 1 - adam.beta_1**count
    step = rate * firsts / (np.sqrt(seconds) + adam.epsilon)
    return float((1 - momentum) * np.linalg.norm(step) / np.linalg.norm(firsts))


def orders(split: Split, epochs: int, seed: int) -> list[np.ndarray]:
    """Returns for each epoch which examples each update sees."""
    rng = np.random.default_rng(seed)
    count = len(split.train[0])
    updates = count // BATCH
    return [
        rng.permutation(count)[: updates * BATCH]
        .reshape(updates, BATCH)
        .astype(np.int32)
        for _ in range(epochs)
    ]


# --- all runs ------------------------------------------------------------------


def measure_task(
    task: LearningTask, settings: Settings
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns the rows of a task, with tuned learning rates and with Keras' own."""
    updates = task.epochs * (len(task.load(0).train[0]) // BATCH)
    contenders = [
        Contender(name, task, updates, settings.patience) for name in CONTENDERS
    ]
    check(contenders, task)
    grids = [grid(contender, settings) for contender in contenders]
    total = sum(settings.tuning_seeds * len(g) + 2 * settings.seeds for g in grids)
    progress = Progress(total, task.name)
    tuned, untuned = [], []
    for contender, rates_to_try in zip(contenders, grids, strict=True):
        losses = {}
        for rates in rates_to_try:
            runs = []
            for seed in range(settings.tuning_seeds):
                runs.append(contender.train(FIRST_TUNING_SEED + seed, rates))
                progress.step(f"{contender.name}, tuning")
            losses[rates] = mean_loss(runs)
        best = min(losses, key=losses.__getitem__)
        row = try_rates(contender, best, settings.seeds, progress)
        # With a large rate a run may have diverged, and JSON has no infinity.
        del row["loss"]
        edge = sorted({rate for rate in best if at_edge(rate, settings)})
        tuned.append({**row, "at_edge_of_grid": edge})
        default = DEFAULT_RATES[contender.name]
        untuned.append(try_rates(contender, default, settings.seeds, progress))
    return tuned, untuned


def try_rates(
    contender: Contender, rates: tuple[float, ...], seeds: int, progress: Progress
) -> dict[str, Any]:
    """Returns how a contender does with these learning rates."""
    runs = []
    for seed in range(seeds):
        runs.append(contender.train(seed, rates))
        progress.step(f"{contender.name}, testing")
    values = [run["metric"] for run in runs]
    return {
        "task": contender.task.name,
        "metric": contender.task.metric,
        "contender": contender.name,
        "rates": rates,
        "values": values,
        **mean_and_interval(values),
        "loss": mean_and_interval([run["test_loss"] for run in runs]),
        "updates_by_child": [run["updates_by_child"] for run in runs],
        "rates_by_rule": [run["rate_by_rule"] for run in runs if run["rate_by_rule"]],
    }


def grid(contender: Contender, settings: Settings) -> list[tuple[float, ...]]:
    """Returns the learning rates that are tried: for two optimizers all pairs."""
    count = 1 if contender.name == RULE else len(contender.children)
    return list(itertools.product(settings.rates, repeat=count))


def at_edge(rate: float, settings: Settings) -> bool:
    """Returns whether a better learning rate may lie outside of the grid."""
    return rate in (min(settings.rates), max(settings.rates))


def mean_loss(runs: list[dict[str, Any]]) -> float:
    """Returns the mean validation loss, infinite if a run diverged."""
    mean = float(np.mean([run["validation_loss"] for run in runs]))
    return mean if np.isfinite(mean) else np.inf


def mean_and_interval(values: list[float]) -> dict[str, float]:
    """Returns the mean, and half the width of its confidence interval (Student's t)."""
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
    return {
        "mean": float(np.mean(values)),
        "half_width": float(quantile * stats.sem(values)),
    }


def check(contenders: list[Contender], task: LearningTask) -> None:
    """Checks that a sequence does what Adam does, and then what SGD does.

    Raises:
        CheckError: if after some updates of each the weights are others.
    """
    adam, sgd, _, plateau, *_ = contenders
    rates = (1e-3, 1e-2)
    split = task.load(0)
    # A few, because what rounding does grows with every update.
    few = [order[:5] for order in orders(split, 2, 0)]
    adam.restart(0, rates[:1])
    adam.train_epoch(split.train, few[0])
    sgd.restart(0, rates[1:])
    first = sgd.model.get_weights()
    sgd.model.set_weights(adam.model.get_weights())
    sgd.train_epoch(split.train, few[1])
    plateau.restart(0, rates)
    plateau.train_epoch(split.train, few[0])
    plateau.optimizer.advance()
    plateau.train_epoch(split.train, few[1])
    weights = [one.model.get_weights() for one in (plateau, sgd)]
    check_same(f"{task.name}, sequence", *weights, first)


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the differences of the sequences to each optimizer without a switch."""
    by_name = {row["contender"]: row for row in rows}
    found = []
    for name, alone in [
        *itertools.product((HALFWAY, PLATEAU), (*ALONE, LOWERED)),
        (RULE, HALFWAY),
    ]:
        values = np.subtract(by_name[name]["values"], by_name[alone]["values"])
        found.append(
            {
                "task": rows[0]["task"],
                "metric": rows[0]["metric"],
                "contender": name,
                "alone": alone,
                **mean_and_interval(values.tolist()),
            }
        )
    return found


# --- what is shown ---------------------------------------------------------------


def tables(result: dict[str, Any]) -> list[report.Table]:
    """Returns how all did, the differences, and how all did without tuning."""
    found = [table_of_contenders(result), table_of_differences(result)]
    # What was measured before 2026-11-25 does not have them.
    if "untuned" in result:
        found.append(table_of_untuned(result))
    return found


def table_of_contenders(result: dict[str, Any]) -> report.Table:
    """Returns a row per contender and task."""
    settings = result["settings"]
    rows = [
        (
            f"{row['task']}: {row['metric']}",
            row["contender"],
            rates_as_text(row),
            as_text(row, ".2f"),
            updates_as_text(row["updates_by_child"]),
        )
        for row in result["contenders"]
    ]
    caption = (
        f"On test data: mean over {settings['seeds']} seeds, with its "
        f"{CONFIDENCE:.0%} confidence interval; lower is better. Learning rates: of "
        f"{', '.join(f'{rate:g}' for rate in settings['rates'])} (for Adam and for SGD "
        "in a sequence: of all pairs), the one with the lowest mean validation loss "
        f"over {settings['tuning_seeds']} other seeds. A star marks a rate at the "
        "edge of the grid. So a sequence was tuned over more combinations, but "
        "neither when it switches nor the momentum (0.9) was tuned. The plateau switch "
        "looks at the validation data while it trains. The rule of thumb: SGD's rate "
        "is (1 - momentum) |Adam's last step| / |its first moment|. Last column: "
        "updates with each optimizer, the mean."
    )
    header = ("task: metric", "contender", "learning rates", "mean", "updates")
    return report.Table(caption, header, rows)


def rates_as_text(row: dict[str, Any]) -> str:
    """Returns the learning rates, and what the rule of thumb made of them."""
    texts = [rate_as_text(rate, row) for rate in row["rates"]]
    # What was measured before 2026-11-25 does not have them.
    if row.get("rates_by_rule"):
        low, high = min(row["rates_by_rule"]), max(row["rates_by_rule"])
        texts.append(f"{low:.2g} to {high:.2g} by the rule")
    return ", ".join(texts)


def rate_as_text(rate: float, row: dict[str, Any]) -> str:
    """Returns a learning rate, with a star if it is at the edge of the grid."""
    return f"{rate:g}{'*' if rate in row['at_edge_of_grid'] else ''}"


def updates_as_text(updates_by_child: list[list[int]]) -> str:
    """Returns the mean number of updates with each optimizer."""
    return " + ".join(f"{mean:.0f}" for mean in np.mean(updates_by_child, axis=0))


def table_of_differences(result: dict[str, Any]) -> report.Table:
    """Returns a row per sequence, optimizer alone and task."""
    rows = [
        (
            f"{row['task']}: {row['metric']}",
            f"{row['contender']} minus {row['alone']}",
            as_text(row, "+.2f"),
            verdict(row),
        )
        for row in result["differences"]
    ]
    caption = (
        "Differences seed by seed: mean, with its confidence interval. Below zero the "
        "sequence is better. A difference whose interval contains zero is none. One "
        f"interval in twenty misses by chance, and there are {len(rows)}."
    )
    header = ("task: metric", "difference", "mean", "the sequence is")
    return report.Table(caption, header, rows)


def table_of_untuned(result: dict[str, Any]) -> report.Table:
    """Returns a row per contender and task."""
    minus = {
        (row["task"], row["contender"], row["alone"]): as_text(row, "+.2f")
        for row in result["untuned_differences"]
    }
    rows = [
        (
            f"{row['task']}: {row['metric']}",
            row["contender"],
            ", ".join(f"{rate:g}" for rate in row["rates"]),
            as_text(row, ".2f"),
            as_text(row["loss"], ".4f"),
            *(minus.get((row["task"], row["contender"], name), "-") for name in ALONE),
        )
        for row in result["untuned"]
    ]
    caption = (
        "With the learning rates that Keras gives Adam and SGD, tuned by nobody: means "
        "on test data with their confidence intervals, and differences seed by seed."
    )
    header = ("task: metric", "contender", "learning rates", "mean", "test loss")
    return report.Table(caption, (*header, *(f"minus {n}" for n in ALONE)), rows)


def as_text(row: dict[str, Any], form: str) -> str:
    """Returns a mean with its confidence interval."""
    return f"{row['mean']:{form}} +- {row['half_width']:{form.lstrip('+')}}"


def verdict(row: dict[str, Any]) -> str:
    """Returns what a difference says."""
    if abs(row["mean"]) <= row["half_width"]:
        return "neither"
    return "better" if row["mean"] < 0 else "worse"


def headline(result: dict[str, Any]) -> str:
    """Answers the question in one sentence."""
    rows = [row for row in result["differences"] if row["contender"] != RULE]
    texts = []
    for task in dict.fromkeys(row["task"] for row in rows):
        verdicts = [verdict(row) for row in rows if row["task"] == task]
        texts.append(
            f"better in {verdicts.count('better')} and worse in "
            f"{verdicts.count('worse')} of {len(verdicts)} comparisons on {task}"
        )
    others = "; ".join(dict.fromkeys(row["alone"] for row in rows))
    return (
        f"Compared with one optimizer ({others}), switching was "
        f"{', and '.join(texts)}; the others show no difference."
    )


def draw(result: dict[str, Any]) -> Figure:
    """Returns a panel per task, with every run and the mean of each contender."""
    rows = result["contenders"]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks)), tasks, strict=True):
        found = [row for row in rows if row["task"] == task]
        for i, (row, color) in enumerate(zip(found, COLORS, strict=False)):
            values = row["values"]
            below = i + 0.2 * np.linspace(-1, 1, len(values))
            axes.plot(values, below, ".", color=color, alpha=0.4)
            axes.errorbar(
                row["mean"], i, xerr=row["half_width"], fmt="o", color=color, capsize=4
            )
        axes.set_yticks(range(len(found)), [row["contender"] for row in found])
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.set_xlabel(found[0]["metric"])
        axes.set_title(task)
        axes.grid(axis="x", linewidth=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
