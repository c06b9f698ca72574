"""Trains a SequentialOptimizer through other libraries, and keeps the outcome.

    python -m tests.works_with                     # all, some minutes each
    python -m tests.works_with keras_tuner wandb

Each library gets a virtual environment. Its program trains across the switch, saves and
resumes where the library does, and fails if an update was made by the wrong child; then
it runs with plain Adam, too. The outcome goes to works_with.json, and from there into
the table of README.md.
"""

import argparse
import datetime
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
README = FOLDER / "README.md"
OUTCOMES = Path(__file__).with_suffix(".json")
_TABLE = re.compile(r"(?<=<!-- begin works with -->\n).*?(?=<!-- end)", re.DOTALL)
SECONDS = 600
BOUNDARY = 12

# --- the programs ------------------------------------------------------------
#
# Each gets a function that makes an optimizer. What they import is in their own
# environment only.


def make_sequence(learning_rate: float = 0.01) -> Any:
    import keras

    from sequential_optimizer import SequentialOptimizer

    adam = keras.optimizers.Adam(learning_rate, name="adam")
    sgd = keras.optimizers.SGD(0.01, momentum=0.9, name="sgd")
    return SequentialOptimizer([adam, sgd], [BOUNDARY])


def make_adam(learning_rate: float = 0.01) -> Any:
    import keras

    return keras.optimizers.Adam(learning_rate)


def check_updates(optimizer: Any, number: int) -> None:
    """Raises unless `number` updates were made, by the right children."""
    assert int(optimizer.iterations) == number, int(optimizer.iterations)
    if hasattr(optimizer, "children"):
        made = [int(child.iterations) for child in optimizer.children]
        assert made == [min(number, BOUNDARY), max(number - BOUNDARY, 0)], made


def make_data() -> tuple[Any, Any]:
    """Returns 32 rows: four batches of eight per epoch."""
    import numpy as np

    x = np.random.default_rng(0).normal(size=(32, 3)).astype("float32")
    return x, x.sum(axis=1, keepdims=True)


def make_layers() -> Any:
    import keras

    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])


def make_model(optimizer: Any) -> Any:
    model = make_layers()
    model.compile(optimizer, "mse")
    return model


def keras_tuner(make: Callable) -> str:
    import keras_tuner as kt

    x, y = make_data()
    tuner = kt.Hyperband(
        lambda hp: make_model(make(hp.Float("learning_rate", 1e-3, 1e-1))),
        objective="val_loss",
        max_epochs=6,
        directory=".",
    )
    tuner.search(x, y, batch_size=8, validation_data=(x, y), verbose=0)
    assert all(trial.status == "COMPLETED" for trial in tuner.oracle.trials.values())
    (best,) = tuner.get_best_models(1)
    best.optimizer.build(best.trainable_variables)
    before = int(best.optimizer.iterations)
    best.fit(x, y, batch_size=8, epochs=4, verbose=0)
    check_updates(best.optimizer, before + 16)
    return "Hyperband, promoted trials resume; the best model trains on"


def optuna(make: Callable) -> str:
    import optuna
    from optuna_integration import KerasPruningCallback

    def objective(trial: Any) -> float:
        x, y = make_data()
        model = make_model(make(trial.suggest_float("learning_rate", 1e-3, 1e-1)))
        pruning = KerasPruningCallback(trial, "loss")
        history = model.fit(
            x, y, batch_size=8, epochs=5, verbose=0, callbacks=[pruning]
        )
        check_updates(model.optimizer, 20)
        return history.history["loss"][-1]

    study = optuna.create_study(pruner=optuna.pruners.NopPruner())
    study.optimize(objective, n_trials=3)
    assert len(study.trials) == 3
    return "a study with its Keras callback"


def scikeras(make: Callable) -> str:
    import pickle

    from scikeras.wrappers import KerasRegressor
    from sklearn.base import clone

    x, y = make_data()

    estimator = clone(
        KerasRegressor(make_layers, loss="mse", optimizer=make(), verbose=0)
    )
    estimator.set_params(batch_size=8, epochs=2)
    estimator.fit(x, y)
    estimator = pickle.loads(pickle.dumps(estimator))
    for _ in range(3):
        estimator.partial_fit(x, y)
    check_updates(estimator.model_.optimizer, 20)
    return "`clone`, `fit`, pickled before the switch, `partial_fit`"


def wandb(make: Callable) -> str:
    import keras
    import wandb
    from wandb.integration.keras import WandbMetricsLogger, WandbModelCheckpoint

    x, y = make_data()
    with wandb.init(mode="offline"):
        callbacks = [
            WandbMetricsLogger(),
            WandbModelCheckpoint("model.keras", monitor="loss"),
        ]
        model = make_model(make())
        model.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=callbacks)
    resumed = keras.models.load_model("model.keras")
    resumed.fit(x, y, batch_size=8, epochs=3, verbose=0)
    check_updates(resumed.optimizer, 20)
    return "offline: its metrics and checkpoints, resumed from one"


def mlflow(make: Callable) -> str:
    import mlflow

    x, y = make_data()
    mlflow.set_tracking_uri("sqlite:///mlflow.db")
    mlflow.tensorflow.autolog()
    with mlflow.start_run() as run:
        model = make_model(make())
        model.fit(x, y, batch_size=8, epochs=2, verbose=0)
    resumed = mlflow.tensorflow.load_model(f"runs:/{run.info.run_id}/model")
    mlflow.tensorflow.autolog(disable=True)
    resumed.fit(x, y, batch_size=8, epochs=3, verbose=0)
    check_updates(resumed.optimizer, 20)
    return "autolog, resumed from the logged model"


def keras_hub(make: Callable) -> str:
    import keras_hub
    import numpy as np

    def make_classifier() -> Any:
        backbone = keras_hub.models.BertBackbone(
            vocabulary_size=9,
            num_layers=1,
            num_heads=1,
            hidden_dim=4,
            intermediate_dim=4,
        )
        model = keras_hub.models.BertTextClassifier(backbone, num_classes=2)
        model.compile(make(), "sparse_categorical_crossentropy", jit_compile=True)
        model.optimizer.build(model.trainable_variables)
        return model

    tokens = np.arange(32 * 5).reshape(32, 5) % 9
    ones = np.ones_like(tokens)
    x = {"token_ids": tokens, "segment_ids": 0 * ones, "padding_mask": ones}
    y = tokens[:, 0] % 2
    model, resumed = make_classifier(), make_classifier()
    model.fit(x, y, batch_size=8, epochs=2, verbose=0)
    model.save_weights("model.weights.h5")
    resumed.load_weights("model.weights.h5")
    resumed.fit(x, y, batch_size=8, epochs=3, verbose=0)
    check_updates(resumed.optimizer, 20)
    return "a tiny BERT classifier, resumed from `.weights.h5`"


def deepxde(make: Callable) -> str:
    os.environ["DDE_BACKEND"] = "tensorflow"
    import deepxde as dde
    import tensorflow as tf

    interval = dde.geometry.Interval(0, 1)
    start = dde.icbc.DirichletBC(interval, lambda x: 1, lambda x, _: x[0] < 1e-6)
    data = dde.data.PDE(interval, lambda x, u: dde.grad.jacobian(u, x) + u, start, 8, 2)
    model = dde.Model(data, dde.nn.FNN([1, 4, 1], "tanh", "Glorot uniform"))
    optimizer = make()
    model.compile(optimizer, lr=0.01)
    model.train(iterations=8, display_every=8)
    both = tf.train.Checkpoint(net=model.net, optimizer=optimizer)
    path = both.save("model")
    model.train(iterations=4)
    both.restore(path).assert_consumed()
    model.train(iterations=12)
    check_updates(optimizer, 20)
    return "its TensorFlow backend, resumed from a `tf.train.Checkpoint`"


def gpflow(make: Callable) -> str:
    import gpflow
    import tensorflow as tf

    x, y = (array.astype("float64") for array in make_data())
    model = gpflow.models.GPR((x, y), gpflow.kernels.SquaredExponential())
    optimizer = make()
    optimizer.build(model.trainable_variables)

    @tf.function
    def step() -> None:
        with tf.GradientTape() as tape:
            loss = model.training_loss()
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)

    path = None
    both = tf.train.Checkpoint(model=model, optimizer=optimizer)
    for i in range(24):
        if i == 8:
            path = both.save("model")
        if i == 12:
            both.restore(path).assert_consumed()
        step()
    check_updates(optimizer, 20)
    return "Gaussian process regression in a loop, saved and resumed"


# What pip installs for each.
PACKAGES = {
    keras_tuner: ["keras-tuner", "tensorboard"],
    optuna: ["optuna", "optuna-integration[keras]"],
    scikeras: ["scikeras"],
    wandb: ["wandb"],
    mlflow: ["mlflow", "tensorboard"],
    keras_hub: ["keras-hub"],
    deepxde: ["deepxde", "tensorflow-probability", "tf-keras"],
    gpflow: ["gpflow"],
}
PROGRAMS = {program.__name__: program for program in PACKAGES}

# --- what runs them ----------------------------------------------------------


def outcome_of(name: str) -> dict[str, Any]:
    """Installs a library, runs its program, and returns what came out."""
    packages = PACKAGES[PROGRAMS[name]]
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        install = [python, "-m", "pip", "install", "-q", "-e", FOLDER.parent]
        subprocess.run([*install, *packages], check=True)
        base = re.split(r"\W", packages[0].replace("-", "_"))[0].replace("_", "-")
        code = f"import importlib.metadata as m; print(m.version({base!r}))"
        version = subprocess.check_output([python, "-c", code], text=True).strip()
        says = {"library": name, "version": version}
        for make in ("make_sequence", "make_adam"):
            done = subprocess.run(
                [python, "-m", "tests.works_with", "--make", make, name],
                env={**os.environ, "PYTHONPATH": str(FOLDER.parent)},
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=SECONDS,
            )
            if done.returncode == 0:
                says |= {make: "worked", "how": done.stdout.strip().splitlines()[-1]}
                break
            says[make] = f"failed: {done.stderr.strip().splitlines()[-1][:150]}"
    return {**says, "date": datetime.date.today().isoformat()}


def table(outcomes: Sequence[dict[str, Any]]) -> str:
    """Returns the table of README.md."""
    lines = ["| library | outcome | what was run | date |", "| --- | --- | --- | --- |"]
    for one in outcomes:
        outcome = one["make_sequence"]
        if "make_adam" in one:
            outcome += f"; plain Adam {one['make_adam']}"
        lines.append(
            f"| {one['library']} {one['version']} | {outcome} | {one.get('how', '')} "
            f"| {one['date']} |"
        )
    return "\n".join(lines)


def write(outcomes: Sequence[dict[str, Any]]) -> None:
    """Writes the file and the table."""
    OUTCOMES.write_text(json.dumps(outcomes, indent=1) + "\n")
    text = README.read_text()
    README.write_text(_TABLE.sub(lambda _: f"\n{table(outcomes)}\n\n", text))


def main() -> int:
    """Runs the command, and returns its exit code: 1 if a program failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("libraries", nargs="*", metavar="LIBRARY", default=PROGRAMS)
    parser.add_argument("--make", help="run the program in this environment")
    arguments = parser.parse_args()
    if arguments.make:
        (name,) = arguments.libraries
        here = importlib.import_module("tests.works_with")
        print(getattr(here, name)(getattr(here, arguments.make)))
        return 0
    known = json.loads(OUTCOMES.read_text()) if OUTCOMES.exists() else []
    outcomes = {one["library"]: one for one in known}
    for name in arguments.libraries:
        outcomes[name] = outcome_of(name)
        print(outcomes[name])
        write([outcomes[name] for name in PROGRAMS if name in outcomes])
    return int(any(one["make_sequence"] != "worked" for one in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
