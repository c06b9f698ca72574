"""What a saved SequentialOptimizer and the one it is loaded into must agree on.

Keras finds a child in an h5 file by its class name (`adam`, `adam_1`), and
TensorFlow finds it in a checkpoint by its position in `children`. Neither notices
when the children have changed in between: state would silently go to the wrong
child. So every file carries the layout that it was written with.
"""

import io
import json
import re
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

_VERSION = 1

Shapes = tuple[tuple[int | None, ...], ...]

# An optimizer's own variables begin with its counters, of which this is the last.
_LAST_PHASE = 2


@dataclass(frozen=True)
class Layout:
    """The parts of a SequentialOptimizer that decide where its state belongs.

    Args:
        classes: class name of each child.
        names: name of each child.
        phases: for each phase the index of its child.
        use_ema: whether the parent keeps moving averages.
        gradient_accumulation_steps: as on the parent.
        shapes: shape of each variable that is trained; `None` in an optimizer that is
            not built, and in files from before there was this field.
    """

    classes: tuple[str, ...]
    names: tuple[str, ...]
    phases: tuple[int, ...]
    use_ema: bool
    gradient_accumulation_steps: int | None
    shapes: Shapes | None = None

    def to_json(self) -> bytes:
        return json.dumps({"version": _VERSION, **asdict(self)}).encode()

    @classmethod
    def from_json(cls, text: bytes) -> "Layout":
        """Reads what `to_json` wrote; raises ValueError on anything else."""
        try:
            fields = json.loads(text)
            if fields.pop("version") != _VERSION:
                raise ValueError("unknown version")
            for key in ("classes", "names", "phases"):
                fields[key] = tuple(fields[key])
            if fields.get("shapes") is not None:
                fields["shapes"] = tuple(tuple(shape) for shape in fields["shapes"])
            return cls(**fields)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                "The saved layout of a `SequentialOptimizer` must be one that this "
                f"version of sequential_optimizer writes (version {_VERSION}). "
                f"Received: {text[:200]!r}. Load the file with the version of "
                "sequential_optimizer that saved it, or check that it is intact."
            ) from error

    def child_paths(self) -> list[tuple[str, int]]:
        """What an h5 file tells the children apart by: class, and which of it."""
        return [
            (name, self.classes[:i].count(name)) for i, name in enumerate(self.classes)
        ]

    def describe(self) -> str:
        return f"children {list(self.classes)} in phases {list(self.phases)}"


def check_loadable(saved: Layout, current: Layout, by_position: bool) -> None:
    """Raises if state saved under `saved` would go to the wrong place.

    Warns if it goes to the right places, but not everything saved has a place or
    not every place is filled.

    Args:
        saved: layout the file was written with.
        current: layout of the optimizer that reads it.
        by_position: whether the file tells children apart by their position
            (`tf.train.Checkpoint`), rather than by their class (h5).

    Raises:
        ValueError: if the layouts cannot be reconciled.
    """
    for setting in ("use_ema", "gradient_accumulation_steps"):
        before, now = getattr(saved, setting), getattr(current, setting)
        if before != now:
            raise ValueError(
                f"`{setting}` must be what it was when the `SequentialOptimizer` "
                f"was saved ({before}), because its state depends on it. "
                f"Received: {setting}={now}. Create the optimizer with "
                f"`{setting}={before}`, then load."
            )
    _check_shapes(saved.shapes, current.shapes)
    if saved.classes == current.classes and saved.phases == current.phases:
        _check_names(saved, current)
        return
    common = min(len(saved.classes), len(current.classes))
    if saved.classes[:common] != current.classes[:common]:
        if by_position:
            raise ValueError(
                "The children of a `SequentialOptimizer` may only be added or "
                "dropped at the end when it is restored from a checkpoint, which "
                "tells them apart by their position. Received: a checkpoint of "
                f"{saved.describe()} for {current.describe()}. Restore into the "
                "sequence that was saved, and build the new one from its children."
            )
        _check_found_by_class(saved, current)
    _check_names(saved, current)
    warnings.warn(
        f"A `SequentialOptimizer` saved with {saved.describe()} is loaded into one "
        f"with {current.describe()}. Its iterations, and the children that both "
        "have, go on where they were; a child that was not saved starts afresh.",
        stacklevel=2,
    )


def _check_shapes(before: Shapes | None, now: Shapes | None) -> None:
    """Raises if both are known, and not the same."""
    if before is None or now is None or before == now:
        return
    raise ValueError(
        "The variables that a `SequentialOptimizer` trains must have the shapes that "
        "they had when it was saved, because those of its children follow from them. "
        f"Received: {len(before)} variables of the shapes {before!s:.200}, now "
        f"{len(now)} of the shapes {now!s:.200}. Load the file into the model that "
        "was saved."
    )


def _check_names(saved: Layout, current: Layout) -> None:
    """Raises if the names say that children of one class changed places."""
    for class_name in set(saved.classes):
        before = _names_of(saved, class_name)
        now = _names_of(current, class_name)
        swapped = sorted(before) == sorted(now) and before != now
        moved = any(
            before.index(name) != now.index(name)
            for name in set(before) & set(now)
            if not _is_automatic(name, class_name)
        )
        if swapped or moved:
            raise ValueError(
                "Children of the same class must stay in the order in which they "
                "were saved, because the file tells them apart by that order. "
                f"Received: {before}, now {now}. Keep the order in `optimizers`."
            )


def _is_automatic(name: str, class_name: str) -> bool:
    """Whether Keras may have made the name, counting what was created before."""
    return re.sub(r"_?\d*$", "", name).replace("_", "").lower() == class_name.lower()


def _names_of(layout: Layout, class_name: str) -> list[str]:
    pairs = zip(layout.classes, layout.names, strict=True)
    return [name for class_, name in pairs if class_ == class_name]


def _check_found_by_class(saved: Layout, current: Layout) -> None:
    """Raises unless each class name leads to the same child as before."""
    before, now = Counter(saved.classes), Counter(current.classes)
    only_added_or_dropped = before <= now or now <= before
    ambiguous = [name for name in before & now if before[name] != now[name]]
    if only_added_or_dropped and not ambiguous:
        return
    raise ValueError(
        "The children of a saved `SequentialOptimizer` must be recognizable by "
        "their class: children may be added, dropped or reordered, not exchanged, "
        "and not dropped or inserted before another of the same class. "
        f"Received: a file of {saved.describe()} for {current.describe()}. Load it "
        "into the sequence that was saved, and build the new one from its children."
    )


def write_own(
    store: Any, layout: Layout, variables: Sequence[keras.Variable], built: bool
) -> None:
    """Writes an optimizer's own variables and its layout into a Keras file.

    Args:
        store: the dict-like object that Keras passes to `save_own_variables`.
        layout: the layout of the optimizer.
        variables: its own variables, without those of the children.
        built: whether it is built.
    """
    for i, variable in enumerate(variables):
        store[str(i)] = variable.numpy()
    store["built"] = np.asarray(built, np.uint8)
    store["layout"] = np.frombuffer(layout.to_json(), np.uint8)


def read_own(
    store: Any, layout: Layout, variables: Sequence[keras.Variable], built: bool
) -> None:
    """Reads what `write_own` wrote into `variables`, or raises and sets none."""
    keys = set(store.keys())
    if not keys:
        warnings.warn(
            "Skipping variable loading for a `SequentialOptimizer`, because the file "
            "holds no variables of it.",
            stacklevel=3,
        )
        return
    if "layout" not in keys:
        raise not_saved_from_one(f"the {len(keys)} variables of another")
    saved_layout = Layout.from_json(np.asarray(store["layout"]).tobytes())
    if np.asarray(store["built"]) and not built:
        raise ValueError(
            "A `SequentialOptimizer` must be built before the state of a built one is "
            "loaded. Received: an optimizer without variables. "
            "Call `optimizer.build(model.trainable_variables)` first."
        )
    check_loadable(saved_layout, layout, by_position=False)
    count = sum(key.isdigit() for key in keys)
    values = [np.asarray(store[str(i)]) for i in range(count)]
    check_arrays("The file", values, variables)
    _check_counters(values)
    last_phase = _same_phase(saved_layout, layout, int(values[_LAST_PHASE]))
    values[_LAST_PHASE] = np.asarray(last_phase)
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def _check_counters(values: Sequence[np.ndarray]) -> None:
    """Raises if no optimizer can have counted what the first of `values` say."""
    counters = values[: _LAST_PHASE + 1]
    iterations, min_phase, last_phase = (int(value) for value in counters)
    if iterations < 0 or min_phase < 0 or last_phase < -1:
        raise ValueError(
            "The file must have counters that a `SequentialOptimizer` can reach. "
            f"Received: iterations={iterations}, min_phase={min_phase}, "
            f"last_phase={last_phase}. The file is damaged: load an earlier one."
        )


def _same_phase(saved: Layout, current: Layout, phase: int) -> int:
    """Returns a phase whose child gets the state of the saved phase's, or -1."""
    # Beyond the last one if phases were dropped since.
    if not 0 <= phase < len(saved.phases):
        return -1
    path = saved.child_paths()[saved.phases[phase]]
    paths = [current.child_paths()[child] for child in current.phases]
    if phase < len(paths) and paths[phase] == path:
        return phase
    return paths.index(path) if path in paths else -1


def check_arrays(
    source: str, values: Sequence[np.ndarray], variables: Sequence[keras.Variable]
) -> None:
    """Raises unless `variables` can be set to `values`.

    Args:
        source: where the values are from, for the message.
        values: the arrays.
        variables: the variables that they are for.

    Raises:
        ValueError: if their number, a shape, or the dtype of a counter is wrong.
    """
    received = [value.shape for value in values]
    expected = [tuple(variable.shape) for variable in variables]
    if received != expected:
        different = [
            f"{variable.path}: {shape} for {tuple(variable.shape)}"
            for variable, shape in zip(variables, received, strict=False)
            if shape != tuple(variable.shape)
        ]
        raise ValueError(
            f"{source} must have one array, of the same shape, for each variable of "
            f"the optimizer. Received: {len(received)} arrays for {len(expected)} "
            f"variables; different shapes: {different[:3]}. Use an optimizer with the "
            "same children, built on the same model variables."
        )
    rounded = [
        f"{variable.path}: {value.dtype}"
        for variable, value in zip(variables, values, strict=True)
        if keras.backend.is_int_dtype(variable.dtype) and value.dtype.kind not in "iu"
    ]
    if rounded:
        raise ValueError(
            f"{source} must have integers for the counters of the optimizer, which "
            f"other dtypes round. Received: {rounded[:3]}. Use the arrays as they were "
            "saved."
        )


def not_saved_from_one(received: str) -> ValueError:
    return ValueError(
        "State loaded into a `SequentialOptimizer` must have been saved from one. "
        f"Received: {received} optimizer. To go on from another optimizer, load its "
        "state into one of its own class, and pass that as the first of `optimizers`."
    )


class CheckpointedLayout(tf.train.experimental.PythonState):
    """Writes the layout into every `tf.train.Checkpoint`, checks it on restore.

    TensorFlow restores Python state before any variable, so a refused checkpoint
    leaves every variable as it was.
    """

    def __init__(self, get_layout: Callable[[], Layout]) -> None:
        # A function, because the layout has no shapes before the optimizer is built.
        self._get_layout = get_layout
        # A refused checkpoint stays queued for variables that do not exist yet.
        self.refused = False

    def serialize(self) -> bytes:
        return self._get_layout().to_json()

    def deserialize(self, string_value: Any) -> None:
        try:
            saved = Layout.from_json(string_value)
            check_loadable(saved, self._get_layout(), by_position=True)
        except ValueError:
            self.refused = True
            raise


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
