"""How a SequentialOptimizer is saved, and what may be loaded into it.

**The rule**, the same for every format: the children that a file and an optimizer both
have must be the same (class with its module, name, variables), in the same order. More
or fewer at the end is fine, and warns. Anything else is refused, and then nothing has
changed.

A name that Keras made up (`adam_1`) counts for nothing, because it depends on what else
the process created. Children of one class without names of their own are told apart by
the settings that they were created with; if those were edited *and* the children moved,
nothing is left to tell them apart by. So name them: `Adam(1e-4, name="late")`. Layers
are told apart by their paths, in which Keras' numbers may have moved on by as much for
all of a class: if other layers of equal shapes are trained than were, name those, too.

**The file format**, version 1: a layout and arrays.

- The layout MUST be a JSON object with the keys that `SavedState.layout` writes and the
  `version`, and MUST NOT be longer than `_MAX_LAYOUT` bytes.
- It MUST list every array with its shape, and each array MUST have that shape.
- In a Keras file the layout is the uint8 array `layout` among the optimizer's own
  variables. The arrays of the optimizer are `0`, `1`, ...; those of child `i` are the
  same under `children/i/`, and those of an optimizer that child `i` has as attribute
  `a`, and does not count among its own variables, under `children/i/a/0/`. What a
  callback noted as `n` is `notes/n`.
- In a `tf.train.Checkpoint` the layout is the Python state of `_saved_state`, with a
  line feed and the bytes of the notes behind it. The variables are TensorFlow's to
  save, those of child `i` under `children/i`, and with them the number `_commit`.
- A file MAY hold other keys, which are not read.
"""

import contextlib
import copy
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from sequential_optimizer import _keras

_VERSION = 1
_MAX_LAYOUT = 2**24  # bytes; 100,000 variables take less

# The attribute of a SequentialOptimizer under which TensorFlow finds its `SavedState`.
STATE = "_saved_state"

Layout = dict[str, Any]
Arrays = dict[str, np.ndarray]
Read = Callable[[str, Sequence[int]], np.ndarray]

# The lowest values of the integers that Keras and we count with.
_LOWEST = {"iteration": 0, "min_phase": 0, "last_child": -1, "phase_starts": -1}


# --- what there is to save ---------------------------------------------------


class _Own:
    """The variables of a SequentialOptimizer without those of its children."""

    def __init__(self, optimizer: Any) -> None:
        self.variables = _keras.own_variables(optimizer)

    save_own_variables = keras.optimizers.Optimizer.save_own_variables
    load_own_variables = keras.optimizers.Optimizer.load_own_variables


def _is_sequence(optimizer: Any) -> bool:
    return hasattr(optimizer, STATE)


def _parts(optimizer: Any, seen: set[int] | None = None) -> Iterator[tuple[str, Any]]:
    """Yields what saves and loads its own variables, with the prefix of their keys."""
    seen = set() if seen is None else seen
    seen.update(map(id, optimizer.variables))
    if _is_sequence(optimizer):
        yield "", _Own(optimizer)
        for i, child in enumerate(optimizer.children):
            for prefix, part in _parts(child, seen):
                yield f"children/{i}/{prefix}", part
        return
    yield "", optimizer
    for name, value in sorted(vars(optimizer).items()):
        if name.startswith("_self_"):
            continue  # What TensorFlow keeps on every object.
        for i, inner in enumerate(_items(value)):
            if not isinstance(inner, keras.optimizers.Optimizer):
                continue
            # Not one that is saved already, nor the sequence that this is a child of.
            if seen.isdisjoint(map(id, inner.variables)):
                for prefix, part in _parts(inner, seen):
                    yield f"{name}/{i}/{prefix}", part


def _items(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else [value]


def _variables_of(part: Any) -> dict[str, keras.Variable]:
    """Returns the variable of each key, if a part saves as Keras' base class does."""
    base = keras.optimizers.Optimizer
    if (
        type(part).save_own_variables is not base.save_own_variables
        or type(part).load_own_variables is not base.load_own_variables
    ):
        return {}
    return {str(i): variable for i, variable in enumerate(part.variables)}


def _saved_by(part: Any) -> Arrays:
    store: Arrays = {}
    part.save_own_variables(store)
    return {key: np.asarray(value) for key, value in store.items()}


def _arrays_of(part: Any) -> dict[str, tuple[str, list[int]]]:
    """Returns for each key the name of the variable and its shape."""
    if variables := _variables_of(part):
        return {key: (v.name, list(v.shape)) for key, v in variables.items()}
    return {key: ("", list(value.shape)) for key, value in _saved_by(part).items()}


def _layout_of(optimizer: Any, settings: dict[str, Any], seen: set[int]) -> Layout:
    if _is_sequence(optimizer):
        return getattr(optimizer, STATE).layout(seen)
    arrays = {
        prefix + key: array
        for prefix, part in _parts(optimizer, seen)
        for key, array in _arrays_of(part).items()
    }
    return {
        "class": _class_of(optimizer),
        "name": _name_of(optimizer),
        "settings": settings,
        "arrays": arrays,
        "children": [],
    }


def _class_of(optimizer: Any) -> str:
    cls = type(optimizer)
    registered = keras.saving.get_registered_name(cls)
    if ">" in registered:
        return registered
    # Keras moves its modules.
    module = "keras" if cls.__module__.startswith("keras.") else cls.__module__
    return f"{module}>{cls.__qualname__}"


def _name_of(optimizer: Any) -> str | None:
    """Returns the name, or `None` if Keras may have made it up (`adam_1`)."""
    name, class_name = (
        re.sub(r"_|\d+$", "", text).lower()
        for text in (optimizer.name, type(optimizer).__name__)
    )
    return None if name == class_name else optimizer.name


def _settings_of(optimizer: Any) -> dict[str, Any]:
    """Returns the config of an optimizer as JSON knows it, without any names."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # A `lambda` is not going to be loaded.
            config = json.dumps(
                optimizer.get_config(), default=lambda value: type(value).__name__
            )
    except Exception:  # noqa: BLE001
        # A user's class may have no config, and is trained and saved without one.
        return {}
    return json.loads(config, object_hook=_without_name)


def _without_name(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != "name"}


def _trained_by(optimizer: Any) -> list[tuple[str, str]]:
    """Returns path and shape of each variable, which may be of unknown rank."""
    return [
        (getattr(variable, "path", variable.name), str(variable.shape))
        for variable in _keras.trained_variables(optimizer)
    ]


# --- the rule ----------------------------------------------------------------


@contextlib.contextmanager
def _refusing_other_texts(text: bytes) -> Iterator[None]:
    """Turns what goes wrong with a text that is no layout into an error of ours."""
    try:
        yield
    except (
        AttributeError,
        IndexError,
        KeyError,
        OverflowError,
        RecursionError,
        TypeError,
        json.JSONDecodeError,
        UnicodeDecodeError,
    ) as error:
        raise ValueError(
            "The saved layout of a `SequentialOptimizer` must be one that this "
            f"version of sequential_optimizer writes (version {_VERSION}). "
            f"Received: {text[:200]!r}. Load the file with the version of "
            "sequential_optimizer that saved it, or check that it is intact."
        ) from error


_TYPES: dict[str, Any] = {
    "class": str,
    "name": str | None,
    "settings": dict,
    "arrays": dict,
    "children": list,
}
_TYPES_OF_SEQUENCE = _TYPES | {
    "child_of_phase": list,
    "phase_starts": list,
    "trained": list | None,
    "use_ema": bool,
    "gradient_accumulation_steps": int | None,
    "notes": dict,
}


def _parse(text: bytes) -> Layout:
    layout = json.loads(text)
    if layout["version"] != _VERSION:
        raise KeyError("version")
    _check_form(layout, is_sequence=True)
    return layout


def _check_form(layout: Layout, is_sequence: bool) -> None:
    """Raises one of the errors that `_refusing_other_texts` converts."""
    for key, type_ in (_TYPES_OF_SEQUENCE if is_sequence else _TYPES).items():
        if not isinstance(layout[key], type_):
            raise TypeError(key)
    pairs = list(layout["arrays"].values())
    if is_sequence:
        pairs += [*layout["notes"].values(), *(layout["trained"] or ())]
        phases, starts = layout["child_of_phase"], layout["phase_starts"]
        np.array(starts, np.int64)  # They fit.
        if len(starts) != len(phases) or set(phases) != set(
            range(len(layout["children"]))
        ):
            raise IndexError("phases")
    if any(len(pair) != 2 for pair in pairs):
        raise IndexError("pairs")
    for child in layout["children"]:
        _check_form(child, "child_of_phase" in child)


def _pairs(
    saved: Layout, now: Layout, prefix: str = ""
) -> Iterator[tuple[str, Layout, Layout]]:
    """Yields what both have: the optimizer, and its children, with their prefixes."""
    yield prefix, saved, now
    children = zip(saved["children"], now["children"], strict=False)
    for i, (before, child) in enumerate(children):
        yield from _pairs(before, child, f"{prefix}children/{i}/")


def _check_rule(saved: Layout, now: Layout) -> None:
    """Raises unless the children that both have are the same.

    Raises:
        ValueError: if a setting, or the class, name or settings of a child, differ.
    """
    for setting in ("use_ema", "gradient_accumulation_steps"):
        before, value = saved[setting], now[setting]
        if before != value:
            raise ValueError(
                f"`{setting}` must be what it was when the `SequentialOptimizer` "
                f"was saved ({before}), because its state depends on it. "
                f"Received: {setting}={value}. Create the optimizer with "
                f"`{setting}={before}`, then load."
            )
    for i, (before, child) in enumerate(
        zip(saved["children"], now["children"], strict=False)
    ):
        for what in ("class", "name", "settings"):
            if before[what] != child[what] and _counts(what, i, saved, now):
                raise ValueError(
                    "The children that a saved `SequentialOptimizer` and the one it is "
                    "loaded into both have must be the same (class, name, variables), "
                    "in the same order; more or fewer at the end is fine. Received: "
                    f"{_described(saved)}, now {_described(now)}, with another {what} "
                    f"of child {i}: {before[what]!s:.200}, now {child[what]!s:.200}. "
                    "Load it into the sequence that was saved, and build the new one "
                    "from its children. To edit the settings of one of several "
                    "children of a class, first give each a `name`, such as "
                    '"late"; to move a class, first register it with '
                    "`keras.saving.register_keras_serializable`."
                )
        if "child_of_phase" in child:
            _check_rule(before, child)


def _counts(what: str, i: int, saved: Layout, now: Layout) -> bool:
    """Whether a difference in `what` says that child `i` is another."""
    before, child = saved["children"][i], now["children"][i]
    if what == "class":
        return True
    both_named = before["name"] is not None and child["name"] is not None
    if what == "name" or both_named:
        return what == "name" and both_named
    # Settings may be edited, unless the child may be another of its class.
    before_all, now_all = (
        [one["settings"] for one in each["children"] if one["class"] == child["class"]]
        for each in (saved, now)
    )
    return (
        len(before_all) != len(now_all)
        or child["settings"] in before_all
        or before["settings"] in now_all
    )


def _described(layout: Layout) -> str:
    names = [child["class"].rpartition(">")[2] for child in layout["children"]]
    return f"children {names} in phases {layout['child_of_phase']}"


def _check_variables(saved: Layout, now: Layout, in_order: bool = True) -> None:
    """Raises if the variables of an optimizer, or of a child, differ."""
    for _, before, current in _pairs(saved, now):
        old = {key: shape for key, (_, shape) in before["arrays"].items()}
        new = {key: shape for key, (_, shape) in current["arrays"].items()}
        if saved["trained"] is None:
            # Saved before `build`, which adds variables to those that there are.
            new = {key: shape for key, shape in new.items() if key in old}
        if not in_order:
            old = {str(i): shape for i, shape in enumerate(sorted(old.values()))}
            new = {str(i): shape for i, shape in enumerate(sorted(new.values()))}
        if old != new:
            different = [
                f"{key}: {old.get(key, 'missing')}, now {new.get(key, 'missing')}"
                for key in {**old, **new}
                if old.get(key, "missing") != new.get(key, "missing")
            ]
            raise ValueError(
                "The variables of an optimizer must be those that were saved. "
                f"Received: {len(old)} arrays for {len(new)} variables of "
                f"`{current['name'] or current['class']}`; different: "
                f"{different[:3]}. Create it with the arguments that it was saved "
                "with, on the same model."
            )


def _warn_of_changes(saved: Layout, now: Layout) -> None:
    for _, before, current in _pairs(saved, now):
        if "child_of_phase" in current and _described(before) != _described(current):
            warnings.warn(
                f"A `SequentialOptimizer` saved with {_described(before)} is loaded "
                f"into one with {_described(current)}. Its iterations, and the "
                "children that both have, continue where they were; a child that was "
                "not saved stays as it is.",
                stacklevel=2,
            )


# --- the variables that are trained ------------------------------------------


def _order_of(saved: Layout, now: Layout) -> list[int] | None:
    """Returns for each trained variable its index among the saved ones.

    `None` if only some of them were saved.

    Raises:
        ValueError: if none of them was.
    """
    if saved["trained"] is None or now["trained"] is None:
        return []
    before, current = (
        [(path, shape) for path, shape in layout["trained"]] for layout in (saved, now)
    )
    if _are_alike(before, current):
        return list(range(len(current)))
    starts = [_common_start(variables) for variables in (before, current)]
    cut = [
        [(path[start:], shape) for path, shape in variables]
        for variables, start in zip((before, current), starts, strict=True)
    ]
    if Counter(cut[0]) == Counter(cut[1]) and len(set(cut[0])) == len(cut[0]):
        return [cut[0].index(variable) for variable in cut[1]]
    if any(
        shape == shape_before
        and (f"/{path}".endswith(f"/{other}") or f"/{other}".endswith(f"/{path}"))
        for path, shape in current
        for other, shape_before in before
    ):
        return None
    raise ValueError(
        "State loaded into a `SequentialOptimizer` must be of the model that it "
        f"trains. Received: a file for {_listed(saved)}, now {_listed(now)}. Load the "
        "file into the model that was saved."
    )


def _are_alike(saved: Sequence[Any], now: Sequence[Any]) -> bool:
    """Whether shapes and paths are the same, but for what Keras counts and nests.

    Keras counts layers within a process, so `dense_3` may now be `dense`, if `dense_4`
    then is `dense_1`; and a path begins with the model's name, or does not.
    """
    moved: dict[str, int] = {}
    for (path_before, _), (path, _) in zip(saved, now, strict=False):
        both = zip(path_before.split("/")[::-1], path.split("/")[::-1], strict=False)
        for part_before, part in both:
            (name_before, number_before), (name, number) = map(
                _counted, (part_before, part)
            )
            by = number - number_before
            if name_before != name or moved.setdefault(name, by) != by:
                return False
    return [shape for _, shape in saved] == [shape for _, shape in now]


def _counted(part: str) -> tuple[str, int]:
    match = re.fullmatch(r"(.+)_(\d+)", part)
    return (match[1], int(match[2])) if match else (part, 0)


def _common_start(variables: Sequence[Any]) -> int:
    """Returns the length of the names of models that every path begins with."""
    parents = {path.split("/")[0] + "/" for path, _ in variables}
    nested = min((path.count("/") for path, _ in variables), default=0) > 1
    return len(parents.pop()) if len(parents) == 1 and nested else 0


def _listed(layout: Layout) -> str:
    return f"{len(layout['trained'])} variables {dict(layout['trained'][:3])}"


def _keys_in_order(
    saved: Layout, now: Layout, order: Sequence[int]
) -> dict[str, str] | None:
    """Returns for each key the one in the file with the array of the same variable.

    Keras names an optimizer's variable after the one it belongs to. `None` if another
    name does not tell, which a user's class may choose freely.
    """
    before, current = (
        [re.sub("[/:]", "_", path) + "_" for path, _ in layout["trained"]]
        for layout in (saved, now)
    )
    starts = {start: before[i] for start, i in zip(current, order, strict=True)}
    keys = {}
    for prefix, optimizer_before, optimizer in _pairs(saved, now):
        old = {
            (name, tuple(shape)): key
            for key, (name, shape) in optimizer_before["arrays"].items()
        }
        for key, (name, shape) in optimizer["arrays"].items():
            start = max(filter(name.startswith, starts), key=len, default="")
            same = old.get((starts.get(start, "") + name[len(start) :], tuple(shape)))
            if same is None or (shape and not start):
                return None
            keys[prefix + key] = prefix + same
    return keys if len(set(keys.values())) == len(keys) else None


# --- values ------------------------------------------------------------------


def _read_from(store: Any) -> Read:
    """Returns a function that reads an array, but not one of another shape."""

    def read(key: str, shape: Sequence[int]) -> np.ndarray:
        stored = None
        try:
            stored = _keras.stored_shape(store, key)
            if stored in (None, tuple(shape)):
                value = np.asarray(store[key])
                stored = value.shape
                if stored == tuple(shape):
                    return value
        except (KeyError, ValueError, OSError):
            pass  # There is no such array that can be read.
        raise ValueError(
            "The file must have the arrays that its layout lists. Received: "
            f"{'nothing that can be read' if stored is None else stored} as the shape "
            f"of `{key}`, for {shape}. The file is damaged: load an earlier one."
        )

    return read


def check_values(
    source: str, values: Sequence[np.ndarray], variables: Sequence[Any]
) -> None:
    """Raises unless `variables` can be set to `values`.

    Args:
        source: where the values are from, for the message.
        values: the arrays.
        variables: the variables that they are for.

    Raises:
        ValueError: if their number, a shape, a dtype or a counter is impossible.
    """
    if len(values) != len(variables):
        raise ValueError(
            f"{source} must have one array for each variable of the optimizer. "
            f"Received: {len(values)} arrays for {len(variables)} variables. Use an "
            "optimizer with the same children, built on the same model variables."
        )
    for variable, value in zip(variables, values, strict=True):
        is_integer = keras.backend.is_int_dtype(variable.dtype)
        received, rule = "", ""
        if value.shape != tuple(variable.shape):
            rule = f"an array of shape {tuple(variable.shape)}"
            received = str(value.shape)
        elif value.dtype.kind not in ("iu" if is_integer else "fiubcV"):
            rule = "integers" if is_integer else "numbers"
            received = str(value.dtype)
        elif is_integer and value.size:
            limits = np.iinfo(variable.dtype)
            lowest = _LOWEST.get(variable.name, limits.min)
            if not lowest <= value.min() <= value.max() <= limits.max:
                rule = f"integers from {lowest} to {limits.max}"
                received = f"{value.min()} to {value.max()}"
        if rule:
            raise ValueError(
                f"{source} must have {rule} for `{variable.path}`. Received: "
                f"{received}. Use the arrays of an optimizer with the same children, "
                "built on the same model variables, as they were saved."
            )


def not_saved_from_one(received: str) -> ValueError:
    return ValueError(
        "State loaded into a `SequentialOptimizer` must have been saved from one. "
        f"Received: {received} optimizer. To go on from another optimizer, load its "
        "state into one of its own class, and pass that as the first of `optimizers`."
    )


# --- the state ---------------------------------------------------------------


class SavedState(tf.train.experimental.PythonState):
    """What a SequentialOptimizer saves besides variables, and the way in and out.

    TensorFlow restores Python state before any variable, so a checkpoint that is
    refused here leaves every variable as it was. Keras' files are written and read
    here as a whole: `SequentialOptimizer.__dir__` keeps Keras from the children.

    Args:
        optimizer: a SequentialOptimizer with its children.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        # With which the children were created; a config says with which they are now.
        self.settings = [
            {} if _is_sequence(child) else _settings_of(child)
            for child in optimizer.children
        ]
        self.notes: Arrays = {}
        # What was loaded before `build` made the variables that it is for.
        self._held: Arrays | None = None
        self._restored: Layout | None = None
        self._checked: tuple[Layout, Arrays] | None = None
        self._refused = False
        self._dependencies: Any = None
        self._is_foreign = False

    def layout(self, seen: set[int] | None = None) -> Layout:
        optimizer = self._optimizer
        # As in `_parts`: what several children share is saved with the first.
        seen = set() if seen is None else seen
        seen.update(map(id, optimizer.variables))
        children = [
            _layout_of(child, settings, seen)
            for child, settings in zip(optimizer.children, self.settings, strict=True)
        ]
        return {
            "version": _VERSION,
            "class": _class_of(optimizer),
            "name": _name_of(optimizer),
            "settings": {},
            "arrays": _arrays_of(_Own(optimizer)),
            "children": children,
            "child_of_phase": list(optimizer.child_of_phase),
            "phase_starts": optimizer.phase_starts.tolist(),
            "trained": _trained_by(optimizer) if optimizer.built else None,
            "use_ema": bool(optimizer.use_ema),
            "gradient_accumulation_steps": optimizer.gradient_accumulation_steps,
            "notes": {
                key: (value.dtype.str, list(value.shape))
                for key, value in self.notes.items()
            },
        }

    # --- build ---

    def check_not_refused(self) -> None:
        """Raises if what was loaded before `build` did not fit."""
        if self._refused:
            raise ValueError(
                "The optimizer must not be used after it refused state that was "
                "loaded before it was built, because a part of it may be in its "
                f"variables. Received: `{self._optimizer.name}`, which refused it. "
                "Create a new optimizer."
            )

    def after_build(self) -> None:
        """Sets, or checks, what was loaded before there were variables for it."""
        self._refused = True  # unless all of it fits
        if self._restored is not None:
            _check_by_position(self._restored, self.layout())
        if self._held is not None:
            self._load(self._held["layout"].tobytes(), self._held)
        self._held, self._restored, self._refused = None, None, False

    # --- files of Keras ---

    def write(self, store: Any) -> None:
        """Writes everything into a Keras file."""
        arrays = self._held
        if arrays is None:
            layout = json.dumps(self.layout()).encode()
            arrays = {"layout": np.frombuffer(layout, np.uint8)}
            for prefix, part in _parts(self._optimizer):
                arrays |= {prefix + key: v for key, v in _saved_by(part).items()}
            arrays |= {f"notes/{key}": value for key, value in self.notes.items()}
        for key, value in arrays.items():
            store[key] = value

    def read(self, store: Any) -> None:
        """Reads what `write` wrote; before `build`, holds it until then."""
        keys = set(store.keys())
        if "layout" not in keys:
            if keys and self._optimizer.built:
                raise not_saved_from_one(f"the {len(keys)} variables of another")
            warnings.warn(
                f"Skipping variable loading for `{self._optimizer.name}`, because the "
                f"file holds {'the variables of another' if keys else 'none of an'} "
                "optimizer.",
                stacklevel=3,
            )
            return
        length = _keras.stored_shape(store, "layout") or ()
        if len(length) != 1 or length[0] > _MAX_LAYOUT:
            raise ValueError(
                "The saved layout of a `SequentialOptimizer` must be a list of at most "
                f"{_MAX_LAYOUT} bytes. Received: an array of shape {length}. The file "
                "is damaged: load an earlier one."
            )
        text = np.asarray(store["layout"])
        if self._optimizer.built:
            self._load(text.tobytes(), store)
            return
        read = _read_from(store)
        with _refusing_other_texts(text.tobytes()):
            saved = _parse(text.tobytes())
            notes = self._notes_in(saved, lambda key, of: read(f"notes/{key}", of))
            saved["notes"] = {key: saved["notes"][key] for key in notes}
            self._held = {
                "layout": np.frombuffer(json.dumps(saved).encode(), np.uint8),
                **{f"notes/{key}": value for key, value in notes.items()},
                **{
                    prefix + key: read(prefix + key, shape)
                    for prefix, layout, _ in _pairs(saved, saved)
                    for key, (_, shape) in layout["arrays"].items()
                },
            }
        self._refused = False

    def _load(self, text: bytes, store: Any) -> None:
        """Loads all of a file, or raises and loads nothing."""
        now, read = self.layout(), _read_from(store)
        with _refusing_other_texts(text):
            saved = _parse(text)
            _check_rule(saved, now)
            shapes = {
                prefix + key: shape
                for prefix, _, current in _pairs(saved, now)
                for key, (_, shape) in current["arrays"].items()
            }
            keys = self._keys_for(saved, now)
            if keys is None:
                values = self._started_afresh(read)
            else:
                values = {key: read(old, shapes[key]) for key, old in keys.items()}
            if saved["trained"] is None:
                # Saved before `build`, so there was nothing else.
                values = self._started_afresh(read) | values
            notes = self._notes_in(saved, lambda key, of: read(f"notes/{key}", of))
        for prefix, part in _parts(self._optimizer):
            for key, variable in _variables_of(part).items():
                if prefix + key in values:
                    check_values("The file", [values[prefix + key]], [variable])
        _warn_of_changes(saved, now)
        self._set(values)
        self._set_starts(saved)
        self.notes = notes

    def _keys_for(self, saved: Layout, now: Layout) -> dict[str, str] | None:
        """Returns for each array the key in the file; `None` to start afresh."""
        order = _order_of(saved, now)
        if order is not None and order == sorted(order):
            _check_variables(saved, now)
            return {
                prefix + key: prefix + key
                for prefix, optimizer, _ in _pairs(saved, now)
                for key in optimizer["arrays"]
            }
        keys = None
        if order is not None:
            _check_variables(saved, now, in_order=False)
            keys = _keys_in_order(saved, now, order)
        if keys is None:
            warnings.warn(
                "The variables that the model trains are not those that it trained "
                f"when `{self._optimizer.name}` was saved: {_listed(saved)}, now "
                f"{_listed(now)}. The iterations and the phase are loaded, and every "
                "child starts afresh. To load a model without its optimizer, pass "
                "`compile=False` to `load_model`.",
                stacklevel=2,
            )
        return keys

    def _started_afresh(self, read: Read) -> Arrays:
        """Returns the saved counters, and fresh values for everything else."""
        optimizer = self._optimizer
        values = {key: read(key, ()) for key in ("0", "1", "2")}
        keys = {id(v): str(i) for i, v in enumerate(_keras.own_variables(optimizer))}
        trained = _keras.trained_variables(optimizer)
        for average, variable in zip(
            _keras.moving_averages(optimizer), trained, strict=False
        ):
            # Keras sets it at update 0, which is over: it starts from the weights.
            if average is not None:
                values[keys[id(average)]] = variable.numpy()
        if steps := optimizer.gradient_accumulation_steps:
            values["0"] = values["0"] // steps * steps  # so does the window
            for gradients in _keras.accumulators(optimizer):
                values[keys[id(gradients)]] = np.zeros_like(gradients.numpy())
        for i, child in enumerate(optimizer.children):
            if _keras.call_count(child).numpy():
                twin = type(child).from_config(copy.deepcopy(child.get_config()))
                twin.build(trained)
                for prefix, part in _parts(twin):
                    for key, value in _saved_by(part).items():
                        values[f"children/{i}/{prefix}{key}"] = value
        return values

    def _set(self, values: Arrays) -> None:
        set_before: list[tuple[Any, Arrays]] = []
        try:
            for prefix, part in _parts(self._optimizer):
                before = _saved_by(part)
                set_before.append((part, before))
                new = {key: values.get(prefix + key, before[key]) for key in before}
                part.load_own_variables(new)
        except Exception:
            # A user's class may load in a way of its own, and say no.
            for part, before in reversed(set_before):
                part.load_own_variables(before)
            raise

    def _set_starts(self, saved: Layout) -> None:
        """Sets `phase_starts`, also of sequences among the children."""
        starts = np.full(len(self._optimizer.child_of_phase), -1)
        phases = zip(
            saved["phase_starts"],
            saved["child_of_phase"],
            self._optimizer.child_of_phase,
            strict=False,
        )
        for phase, (start, child_before, child) in enumerate(phases):
            if child_before == child:
                starts[phase] = start
        self._optimizer._phase_starts.assign(starts)
        children = zip(saved["children"], self._optimizer.children, strict=False)
        for before, child in children:
            if _is_sequence(child):
                getattr(child, STATE)._set_starts(before)

    def _notes_in(self, saved: Layout, read: Read) -> Arrays:
        """Returns the saved notes of the callbacks that there are.

        Raises:
            ValueError: if one is not in the form in which its callback keeps it.
        """
        notes = {}
        for key, (dtype, shape) in saved["notes"].items():
            note = self.notes.get(key)
            if note is None:
                continue  # of a callback that is not there any more
            if (note.dtype.str, list(note.shape)) != (dtype, shape):
                raise ValueError(
                    "What a callback noted in a saved `SequentialOptimizer` must be "
                    f"what it notes now. Received: {dtype}{shape} for `{key}`, now "
                    f"{note.dtype.str}{list(note.shape)}. Use the callback with the "
                    "arguments that it had."
                )
            notes[key] = read(key, shape)
        return notes

    # --- checkpoints of TensorFlow ---

    def serialize(self) -> bytes:
        notes = b"".join(value.tobytes() for value in self.notes.values())
        return json.dumps(self.layout()).encode() + b"\n" + notes

    def deserialize(self, string_value: Any) -> None:
        text, _, raw = tf.compat.as_bytes(string_value).partition(b"\n")
        now = self.layout()
        try:
            with _refusing_other_texts(text):
                saved = _parse(text)
                _check_by_position(saved, now)
                notes = self._notes_in(saved, _read_bytes(saved, raw))
        except ValueError:
            # TensorFlow keeps what was refused for variables that do not exist yet.
            self._refused = not self._optimizer.built
            raise
        _warn_of_changes(saved, now)
        self._checked = saved, notes

    def commit(self) -> None:
        """Sets what `deserialize` has checked."""
        assert self._checked is not None
        saved, self.notes = self._checked
        self._set_starts(saved)
        self._restored = None if self._optimizer.built else saved
        self._held = self._checked = None

    def is_foreign(self, name: str, dependencies: Any) -> bool:
        """Whether the checkpoint that is being restored is of another optimizer.

        TensorFlow asks for each part of what was saved, in the order in which it was
        saved, and a SequentialOptimizer saves this state first. An optimizer that is
        built refuses another's checkpoint. One that is not warns and starts afresh, as
        Keras does.

        Args:
            name: of the part that TensorFlow looks for.
            dependencies: the same dict for all parts in a restore.
        """
        if dependencies is not self._dependencies:
            self._dependencies = dependencies
            self._is_foreign = name != STATE
            if self._is_foreign and self._optimizer.built:
                raise not_saved_from_one(f"the checkpoint, with `{name}`, of another")
            if self._is_foreign:
                warnings.warn(
                    f"Skipping variable loading for `{self._optimizer.name}`, because "
                    "the checkpoint holds the variables of another optimizer.",
                    stacklevel=3,
                )
        return self._is_foreign


class Commit(tf.Module):
    """Lets a restore set Python state together with the variables.

    TensorFlow restores Python state first. Were it set at once, it would stay when
    the data of the variables turn out to be damaged.
    """

    def __init__(self, state: SavedState) -> None:
        super().__init__()
        self._commit = state.commit

    def _serialize_to_tensors(self) -> dict[str, tf.Tensor]:
        return {"commit": tf.constant(_VERSION)}

    def _restore_from_tensors(self, restored_tensors: Any) -> None:
        self._commit()


def _check_by_position(saved: Layout, now: Layout) -> None:
    """Raises unless TensorFlow will put all variables where they belong."""
    _check_rule(saved, now)
    if saved["trained"] is None and max(now["phase_starts"]) >= 0:
        raise ValueError(
            "A checkpoint that was saved before the optimizer was built must be "
            "restored into an optimizer that has not trained. Received: "
            f"phase_starts={now['phase_starts']}. Create a new optimizer."
        )
    order = _order_of(saved, now)
    if order is None or order != sorted(order):
        raise ValueError(
            "The variables that a `SequentialOptimizer` trains must be those that it "
            "trained when a checkpoint was saved, in the same order, because "
            f"TensorFlow tells them apart by it. Received: {_listed(saved)}, now "
            f"{_listed(now)}. Restore into the model as it was, and change it then."
        )
    if now["trained"] is not None:
        _check_variables(saved, now)


def _read_bytes(saved: Layout, raw: bytes) -> Read:
    """Returns a function that reads a note from the bytes of all of them."""
    parts, end = {}, 0
    for key, (dtype, shape) in saved["notes"].items():
        start, end = end, end + np.dtype(dtype).itemsize * math.prod(shape)
        parts[key] = dtype, slice(start, end)
    if end != len(raw):
        raise ValueError(
            "The notes in a saved `SequentialOptimizer` must be as long as its layout "
            f"says ({end} bytes). Received: {len(raw)} bytes. The checkpoint is "
            "damaged: load an earlier one."
        )

    def read(key: str, shape: Sequence[int]) -> np.ndarray:
        dtype, part = parts[key]
        return np.frombuffer(raw[part], dtype).reshape(shape).copy()

    return read
