"""How a SequentialOptimizer is saved; `_layout` says what may be loaded into one.

**The file format**, version 1: a layout and arrays.

- The layout MUST be a JSON object of the form `_layout.FORM`, and in a Keras file MUST
  NOT be longer than `_MAX_LAYOUT` bytes. Its `optimizers` MUST hold, by prefix, the
  sequence (prefix "") and every child: child `i` of a sequence has that sequence's
  prefix, followed by `children/i/`.
- The layout MUST list every array of an optimizer, and every note of a callback with
  its dtype and shape.
- In a Keras file the layout MUST be the uint8 array `layout` among the optimizer's own
  variables, and each array that it lists MUST be beside it. The key of an array is the
  prefix of its optimizer, then `0`, `1`, ..., or what a user's class calls the array.
  If attribute `a` of a child holds optimizers, layers or metrics whose variables the
  child does not list, those of the first are `a/0/0`, `a/0/1`, ..., after the child's
  prefix. Note `n` is the array `notes/n`: its bytes, as uint8.
- In a `tf.train.Checkpoint` the layout MUST be the Python state `_saved_state`, and its
  `bytes` MUST be the notes, in base64. TensorFlow saves the variables, those of child
  `i` under `children/i`, and the number `_commit` MUST be among them.
- A file MAY hold other keys, which are not read.
"""

import base64
import itertools
import json
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from sequential_optimizer import _keras, _layout
from sequential_optimizer._children import given_name
from sequential_optimizer._layout import VERSION, Layout

_MAX_LAYOUT = 2**25  # bytes; 100,000 variables take less

# The attribute of a SequentialOptimizer under which TensorFlow finds its `SavedState`.
STATE = "_saved_state"

Arrays = dict[str, np.ndarray]

# The lowest valid value of each counter, Keras' and ours.
_LOWEST = {"iteration": 0, "min_phase": 0, "last_child": -1, "phase_starts": -1}


# --- what there is to save ---------------------------------------------------


class _Own:
    """Variables that are saved and loaded as an optimizer's are."""

    def __init__(self, variables: list[Any]) -> None:
        self.variables = variables

    save_own_variables = keras.optimizers.Optimizer.save_own_variables
    load_own_variables = keras.optimizers.Optimizer.load_own_variables


def is_sequence(optimizer: Any) -> bool:
    """Whether an optimizer is a SequentialOptimizer."""
    return isinstance(getattr(optimizer, STATE, None), SavedState)


def _tree(optimizer: Any) -> Iterator[tuple[str, Any]]:
    """Yields an optimizer and, if it is a sequence, its children, with key prefixes."""
    yield "", optimizer
    for i, child in enumerate(optimizer.children if is_sequence(optimizer) else ()):
        yield from ((f"children/{i}/{prefix}", one) for prefix, one in _tree(child))


def parts(optimizer: Any, seen: set[int] | None = None) -> Iterator[tuple[str, Any]]:
    """Yields whatever saves and loads its own variables, with the prefix of their keys.

    That is the optimizer, its children, and what their attributes hold: optimizers as
    they are, but a SequentialOptimizer, a layer or a metric as an `_Own`.
    """
    seen = set() if seen is None else seen
    for prefix, one in _tree(optimizer):
        yield from ((prefix + inner, part) for inner, part in _parts_of(one, seen))


def _parts_of(optimizer: Any, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Yields the parts of one optimizer: not its children's, nor any seen before."""
    seen.update(map(id, [*optimizer.variables, *_keras.trained_variables(optimizer)]))
    own = _keras.own_variables(optimizer)
    yield "", _Own(own) if is_sequence(optimizer) else optimizer
    for prefix, inner in held_by(optimizer):
        if isinstance(inner, keras.optimizers.Optimizer):
            # Skips what is saved already, and the sequence that has this child.
            if seen.isdisjoint(map(id, inner.variables)):
                yield from ((prefix + key, part) for key, part in parts(inner, seen))
        elif isinstance(inner, keras.layers.Layer | keras.metrics.Metric):
            unseen = [v for v in inner.variables if id(v) not in seen]
            seen.update(map(id, unseen))
            if unseen:
                yield prefix, _Own(unseen)


def held_by(optimizer: Any) -> Iterator[tuple[str, Any]]:
    """Yields the values of attributes, or the items in lists and dicts, at any depth.

    With the prefix of their keys, and without what TensorFlow keeps on every object.
    """
    for name, value in sorted(vars(optimizer).items()):
        if not name.startswith("_self_"):
            for i, item in enumerate(items_in(value)):
                yield f"{name}/{i}/", item


def items_in(value: Any) -> list[Any]:
    """Returns the items in lists and dicts, at any depth, or the value alone."""
    if not isinstance(value, dict | list | tuple):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return [inner for item in items for inner in items_in(item)]


def _variables_of(part: Any) -> dict[str, Any]:
    """Returns each key's variable, or none if a part overrides how Keras saves."""
    base, cls = keras.optimizers.Optimizer, type(part)
    own = cls.save_own_variables, cls.load_own_variables
    if own != (base.save_own_variables, base.load_own_variables):
        return {}
    return {str(i): variable for i, variable in enumerate(part.variables)}


def _saved_by(part: Any) -> Arrays:
    store: Arrays = {}
    part.save_own_variables(store)
    return {key: np.asarray(value) for key, value in store.items()}


def _arrays_in(optimizer: Any) -> Arrays:
    return {
        prefix + key: value
        for prefix, part in parts(optimizer)
        for key, value in _saved_by(part).items()
    }


# --- the layout --------------------------------------------------------------


def _class_of(optimizer: Any) -> str:
    cls = type(optimizer)
    registered = keras.saving.get_registered_name(cls)
    # Keras moves its classes between modules.
    module = re.sub(r"^keras\..*", "keras", cls.__module__)
    return registered if ">" in registered else f"{module}>{cls.__qualname__}"


def _trained_by(optimizer: Any) -> list[list[str]]:
    """Returns each variable's path, the path to compare by, and its shape.

    Keras numbers layers per process: `dense_3` and `dense_4` may return as `dense` and
    `dense_1`, so numbers count from the lowest of a name in the same layer. The number
    in `block_3` is the user's, unless there is a class `Block`.
    """
    classes: list[type] = [keras.layers.Layer, keras.Variable]
    for cls in classes:
        classes += cls.__subclasses__()
    numbered = {cls.__name__.lower() for cls in classes}
    variables = _keras.trained_variables(optimizer)
    paths = [_keras.path_of(variable) for variable in variables]
    # For a/b_1/c: a, a/b_1 and a/b_1/c, each as (path without number, number).
    scopes = [itertools.accumulate(path.split("/"), "{}/{}".format) for path in paths]
    counted = [[_counted(scope, numbered) for scope in path] for path in scopes]
    # In a dict the last entry of a name counts.
    lowest = dict(sorted(itertools.chain(*counted), reverse=True))
    plain = [
        "/".join(f"{a.rpartition('/')[2]}_{n - lowest[a]}" for a, n in path)
        for path in counted
    ]
    shapes = [str(variable.shape) for variable in variables]  # may have no rank
    return [list(row) for row in zip(paths, plain, shapes, strict=True)]


def _counted(path: str, numbered: set[str]) -> tuple[str, int]:
    name, _, number = path.rpartition("_")
    is_numbered = name.rpartition("/")[2].replace("_", "").lower() in numbered
    return (name, int(number)) if number.isdecimal() and is_numbered else (path, 0)


def _form_of(note: np.ndarray) -> str:
    return f"{note.dtype.str}{list(note.shape)}"


def _layout_in(store: Any) -> Layout:
    """Returns the layout in a Keras file."""
    shape = _keras.stored_shape(store, "layout")
    is_short = shape is not None and math.prod(shape) <= _MAX_LAYOUT
    text = np.asarray(store["layout"]).tobytes() if is_short else b"too many bytes"
    return _layout.parse(text)


# --- values ------------------------------------------------------------------


def _read(store: Any, key: str, shape: Sequence[int]) -> np.ndarray:
    """Returns an array; one of another shape raises, if possible without being read."""
    wanted = tuple(shape)
    try:
        stored = _keras.stored_shape(store, key)
        if stored in (None, wanted):
            value = np.asarray(store[key])
            if value.shape == wanted:
                return value
            stored = value.shape
    except (KeyError, ValueError, OSError):
        stored = None
    raise ValueError(
        "The file must have the arrays that its layout lists. Received: "
        f"{'nothing that can be read' if stored is None else stored} as the shape of "
        f"`{key}`, not {wanted}. The file is damaged: load an earlier one."
    )


def _check_value(source: str, value: np.ndarray, variable: Any) -> None:
    """Raises unless a variable can be set to a value.

    Args:
        source: where the value comes from, for the message.
        value: an array.
        variable: the variable that it is for.

    Raises:
        ValueError: if the shape, the dtype or a counter does not fit.
    """
    dtype = keras.backend.standardize_dtype(variable.dtype)
    kinds, rule = "fiubcV", "numbers"
    if "int" in dtype:
        lowest = _LOWEST.get(variable.name, np.iinfo(dtype).min)
        highest = np.iinfo(dtype).max
        kinds, rule = "iu", f"integers from {lowest} to {highest}"
    fits = value.shape == variable.shape and value.dtype.kind in kinds
    if fits and "int" in dtype and value.size:
        fits = lowest <= int(value.min()) and int(value.max()) <= highest
    if not fits:
        raise ValueError(
            f"{source} must have {rule} for `{_keras.path_of(variable)}`, in an array "
            f"of shape {tuple(variable.shape)}. Received: {value!r:.99}. Use those of "
            "an optimizer with the same children, as they were saved."
        )


# --- the state ---------------------------------------------------------------


class SavedState(tf.train.experimental.PythonState):
    """What a SequentialOptimizer saves besides variables, and the way in and out.

    TensorFlow restores Python state before any variable, so a checkpoint that is
    refused here leaves every variable as it was. Keras' files are written and read
    here as a whole: `SequentialOptimizer.__dir__` hides the children from Keras.

    Args:
        optimizer: a SequentialOptimizer with its children.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.notes: Arrays = {}
        # What was loaded before `build` created the variables for it: arrays, and the
        # variables that there are before.
        self.held: dict[str, Any] | None = None
        # These variables, each with its values before and after the loading.
        self._early: list[tuple[Any, Any, Any]] = []
        # The layout and the notes in a checkpoint, if they fit.
        self._restored: Any = None
        self._refused = False
        # TensorFlow's dict of the parts in this restore, and whether it is foreign.
        self._restore: tuple[Any, bool] = None, False

    def layout(self) -> Layout:
        """Returns the layout of the optimizer as it is now."""
        optimizers: dict[str, Any] = {}
        arrays: dict[str, Any] = {}
        seen: set[int] = set()  # What several children share is saved with the first.
        for of, one in _tree(self._optimizer):
            phases: Any = []
            kept: dict[str, Any] = {}  # what must not change before it is loaded
            if is_sequence(one):
                phases = zip(one.child_of_phase, one.phase_starts.tolist(), strict=True)
                kept["use_ema"] = bool(one.use_ema)
                steps = one.gradient_accumulation_steps
                kept["gradient_accumulation_steps"] = steps and int(steps)
            optimizers[of] = {"class": _class_of(one), "name": given_name(one)}
            optimizers[of] |= {"settings": kept, "phases": list(phases)}
            for prefix, part in _parts_of(one, seen):
                for key, value in (_variables_of(part) or _saved_by(part)).items():
                    arrays[of + prefix + key] = [of, list(value.shape)]
        for key, note in self.notes.items():
            arrays[f"notes/{key}"] = ["notes/", [note.nbytes]]
        layout: Layout = {"version": VERSION, "trained": _trained_by(self._optimizer)}
        layout["notes"] = {key: _form_of(note) for key, note in self.notes.items()}
        return {**layout, "bytes": {}, "optimizers": optimizers, "arrays": arrays}

    # --- build ---

    def check_not_refused(self) -> None:
        """Raises if what was loaded before `build` did not fit."""
        if self._refused:
            raise ValueError(
                "An optimizer must not be used after it refused state that was loaded "
                "before it was built, because part of it may have been set. "
                f"Received: `{self._optimizer.name}`. Create a new optimizer."
            )

    def after_build(self) -> None:
        """Sets, or checks, what was loaded before there were variables for it."""
        self._refused = True  # unless all of it fits
        if self._restored is not None:
            _layout.check_by_position(self._restored[0], self.layout())
        if self.held is not None:
            self._load(_layout_in(self.held), self.held)
        self.held, self._restored, self._refused, self._early = None, None, False, []

    # --- weights ---

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Sets all variables of the optimizer, or raises and sets none."""
        variables = self._optimizer.variables
        arrays = [np.asarray(weight) for weight in weights]
        if not self._optimizer.built or len(arrays) != len(variables):
            raise ValueError(
                "An optimizer must be built before `set_weights`, and `weights` must "
                f"have one array for each of its {len(variables)} variables. Received: "
                f"{len(arrays)} arrays. Use those of one with the same children."
            )
        pairs = list(zip(variables, arrays, strict=True))
        for variable, array in pairs:
            _check_value("`weights`", array, variable)
        for variable, array in pairs:
            variable.assign(array)

    # --- files of Keras ---

    def write(self, store: Any) -> None:
        """Writes everything into a Keras file."""
        # The layout first: Keras may spread the arrays over several files.
        texts = {"layout": json.dumps(self.layout()).encode()}
        texts |= {f"notes/{key}": note.tobytes() for key, note in self.notes.items()}
        arrays = {key: np.frombuffer(text, np.uint8) for key, text in texts.items()}
        for key, value in (self.held or arrays | _arrays_in(self._optimizer)).items():
            store[key] = np.asarray(value)

    def read(self, store: Any) -> None:
        """Reads what `write` wrote, or holds it until `build`."""
        keys = set(store.keys())
        if "layout" not in keys:
            what = f"a file with {len(keys)} variables, and no layout"
            return self._pass_over(what, is_of_another=bool(keys))
        saved = _layout_in(store)
        if self._optimizer.built:
            return self._load(saved, store)
        held: dict[str, Any] = {"layout": np.asarray(store["layout"])}
        for key, (_, shape) in saved["arrays"].items():
            held[key] = _read(store, key, shape)
        # Notes, counters and rates not in `build`: by then a callback may have started
        # over, a phase have been ended, or a learning rate have been set.
        self.notes, self.held, self._refused = self._notes_in(saved, store), held, False
        self._set_starts(saved)
        for prefix, one in _tree(self._optimizer):
            own = [] if one.built else _keras.own_variables(one)
            for i, variable in enumerate(own):
                key, form = f"{prefix}{i}", (variable.shape, variable.dtype)
                if key in held and (held[key].shape, held[key].dtype) == form:
                    self._early.append((variable, variable.numpy(), held[key]))
                    variable.assign(held[key])
                    held[key] = variable

    def _load(self, saved: Layout, store: Any) -> None:
        """Loads all of a file, or raises and loads nothing."""
        now = self.layout()
        keys = _layout.keys_in_both(saved, now)
        # A file from before `build` resets an optimizer, unless it has just been built.
        resets = not saved["trained"] and not self.held
        values = self._fresh_values(store) if not keys or resets else {}
        for key in keys or []:
            values[key] = _read(store, key, now["arrays"][key][-1])
        notes = self.notes if self.held else self._notes_in(saved, store)
        for prefix, part in parts(self._optimizer):
            for key, variable in _variables_of(part).items():
                if prefix + key in values:
                    _check_value("The file", values[prefix + key], variable)
        _layout.warn_of_changes(saved, now, starts_afresh=keys is None)
        current = _arrays_in(self._optimizer)
        try:
            self._set(current | values)
        except Exception:
            # A user's class may load in its own way, and refuse.
            self._set(current)
            raise
        self._set_starts(saved)
        self.notes = notes

    def _set(self, values: Arrays) -> None:
        for prefix, part in parts(self._optimizer):
            part.load_own_variables({k: values[prefix + k] for k in _saved_by(part)})

    def _set_starts(self, saved: Layout) -> None:
        """Sets `phase_starts`, those of sequences among the children included."""
        for prefix, one in _tree(self._optimizer):
            before = saved["optimizers"].get(prefix)
            if before and is_sequence(one):
                phases = [*before["phases"], *[[None, -1]] * len(one.child_of_phase)]
                pairs = zip(one.child_of_phase, phases, strict=False)
                starts = [s if child == now else -1 for now, (child, s) in pairs]
                one._phase_starts.assign(starts)

    def _fresh_values(self, store: Any) -> Arrays:
        """Returns the saved counters, and fresh values for everything else."""
        optimizer = self._optimizer
        # The first variables of every sequence: the iteration and `min_phase`.
        values = {key: _read(store, key, ()).copy() for key in ("0", "1")}
        # The call counter goes back to where its window of accumulation began.
        values["0"] -= values["0"] % (optimizer.gradient_accumulation_steps or 1)
        for variable, before, loaded in reversed(self._early):
            if variable.numpy() == loaded:  # else it was set since
                variable.assign(before)
        # A user's classes need not be registered.
        classes = {type(child).__name__: type(child) for child in optimizer.children}
        twin = type(optimizer).from_config(optimizer.get_config(), classes)
        twin.build(_keras.trained_variables(optimizer))
        if twin.use_ema:
            # Keras starts the averages from the weights at update 0, which is past.
            _keras.update_averages(twin)
        return _arrays_in(twin) | values

    def _notes_in(self, saved: Layout, store: Any) -> Arrays:
        """Returns the saved notes that there is a callback for."""
        notes = {}
        for key, note in self.notes.items():
            form = saved["notes"].get(key)
            if form and form != _form_of(note):
                raise ValueError(
                    "What a callback noted must have the dtype and shape that it has "
                    f"now. Received: {form} for `{key}`, now {_form_of(note)}. Use the "
                    "callback with the arguments that it had when it was saved."
                )
            if form:
                content = _read(store, f"notes/{key}", [note.nbytes]).tobytes()
                notes[key] = np.ndarray(note.shape, note.dtype, content).copy()
        return notes

    # --- checkpoints of TensorFlow ---
    #
    # A restore calls, in this order:
    #
    #   is_foreign      for each part that was saved, this state first
    #   deserialize     -> checks the layout and keeps it, or raises
    #   (TensorFlow)    reads the variables, or raises
    #   commit          -> sets what `deserialize` kept
    #
    # If the optimizer is not built then, `after_build` checks the layout again.

    def serialize(self) -> bytes:
        notes = {f"notes/{key}": note.tobytes() for key, note in self.notes.items()}
        texts = {key: base64.b64encode(text).decode() for key, text in notes.items()}
        return json.dumps(self.layout() | {"bytes": texts}).encode()

    def deserialize(self, string_value: Any) -> None:
        try:
            saved, now = _layout.parse(tf.compat.as_bytes(string_value)), self.layout()
            _layout.check_by_position(saved, now)
            notes = self._notes_in(saved, saved["bytes"])
        except ValueError:
            # TensorFlow will still restore the variables that are created later.
            self._refused = not self._optimizer.built
            raise
        _layout.warn_of_changes(saved, now, starts_afresh=False)
        self._restored = saved, notes

    def commit(self) -> None:
        """Sets what `deserialize` has checked."""
        saved, self.notes = self._restored
        self._restored = None if self._optimizer.built else (saved, {})
        self._set_starts(saved)
        self.held = None

    def is_foreign(self, name: str, dependencies: Any) -> bool:
        """Whether the checkpoint that is being restored is of another optimizer.

        TensorFlow asks for each saved part in the order of saving, and a
        SequentialOptimizer saves this state first.

        Args:
            name: the name of the part that TensorFlow looks for.
            dependencies: the same dict for all parts of one restore.
        """
        if dependencies is not self._restore[0]:
            self._restore = dependencies, name != STATE
            if name != STATE:
                self._pass_over(f"`{name}` in the checkpoint of another optimizer")
        return self._restore[1]

    def _pass_over(self, what: str, is_of_another: bool = True) -> None:
        """Raises if a built optimizer gets what another one saved, and else warns.

        Before `build` it only warns, as Keras does, because fine-tuning needs that.
        """
        if is_of_another and self._optimizer.built:
            raise ValueError(
                "State loaded into a `SequentialOptimizer` must have been saved from "
                f"one. Received: {what}. To continue from another optimizer, load its "
                "state into one of its class, and pass that as the first child."
            )
        name = self._optimizer.name
        warnings.warn(f"Skipping variable loading for `{name}`: {what}.", stacklevel=4)


class Commit(tf.Module):
    """Lets a restore set Python state together with the variables.

    TensorFlow restores Python state first. If that were set at once, it would stay
    set when the variables' data turn out to be damaged.
    """

    def __init__(self, state: SavedState) -> None:
        super().__init__()
        self._commit = state.commit

    def _serialize_to_tensors(self) -> dict[str, tf.Tensor]:
        return {"commit": tf.constant(VERSION)}

    def _restore_from_tensors(self, restored_tensors: Any) -> None:
        self._commit()
