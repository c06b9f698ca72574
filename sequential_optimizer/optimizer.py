"""The optimizer that hands each update to the child of the current phase."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Self

import keras
import numpy as np
import tensorflow as tf

from sequential_optimizer import _children, _gradients, _keras, _replicas
from sequential_optimizer._phases import Phases
from sequential_optimizer._saving import STATE, Commit, SavedState, is_sequence
from sequential_optimizer._switch_case import switch_case
from sequential_optimizer._weight_copies import are_initialized, find_copies, retake

# AutoGraph leaves Keras' code as it is, but would rewrite ours.
_not_autographed = tf.autograph.experimental.do_not_convert


def _learning_rate_of_children() -> float:
    """Stands in where the base class needs a learning rate.

    A callable, because from a float the base class would make a variable that
    nothing reads and that callbacks would set in vain.
    """
    raise RuntimeError("A SequentialOptimizer has the learning rate of its children.")


@keras.saving.register_keras_serializable(package="sequential_optimizer")
class SequentialOptimizer(keras.optimizers.Optimizer):
    """Optimizer that runs several optimizers one after the other.

    Every update is made by exactly one *child* optimizer. Which one depends on the
    number of updates applied so far, and is decided inside the graph: the train step
    is traced and compiled once, and a switch retraces nothing and resets nothing.
    Each child's variables are created when the optimizer is built, and saved whether
    or not the child's phase has begun.

    **Boundary rule.** Update number `t`, counted from 0, runs in phase `k`, where
    `k` is the number of integers in `boundaries` that are <= `t`. So a boundary `b`
    means that the first `b` updates belong to the earlier child, as in optax's
    `join_schedules` and PyTorch's `SequentialLR`. (Keras' own
    `PiecewiseConstantDecay([b], ...)` changes one update later.) `advance()` ends a
    phase before its integer boundary, or at any time if its boundary is `None`.

    **Counting.** `iterations` counts updates that were applied: steps that a
    `LossScaleOptimizer` skips do not count, and with `gradient_accumulation_steps` a
    whole window is one update. Each child counts its own updates only, so its bias
    correction and its `LearningRateSchedule` start at 0 when its first phase starts
    and continue from there when the child comes back.

    **Settings.** What spans the phases is set here: moving averages of the weights
    (`use_ema`), gradient accumulation, `loss_scale_factor`. What belongs to an
    update rule is set on the child: clipping and weight decay. The moving average
    sees the weights after their constraints are applied.

    Example:

    >>> import tensorflow as tf
    >>> from sequential_optimizer import SequentialOptimizer
    >>> optimizer = SequentialOptimizer(
    ...     [
    ...         tf.keras.optimizers.Adam(1e-3),
    ...         tf.keras.optimizers.SGD(1e-2, momentum=0.9),
    ...     ],
    ...     boundaries=[2],
    ... )
    >>> weight = tf.Variable([1.0, 2.0])
    >>> for _ in range(3):
    ...     print(int(optimizer.phase), type(optimizer.active_child()).__name__)
    ...     optimizer.apply([tf.ones(2)], [weight])
    0 Adam
    0 Adam
    1 SGD

    Args:
        optimizers: list of the child optimizers in the order of their phases. Each
            is a `keras.optimizers.Optimizer` or what `keras.optimizers.get` takes
            (`"adam"`, a config). One instance may appear several times: it then
            continues with its own state, and costs one branch and one set of
            variables. An instance that is already built is accepted if it was built
            on the same variables, and keeps its state. Children have different names,
            and of each class only one the name that Keras makes, because saved state
            is told apart by them: `[Adam(), Adam(1e-4, name="late")]`.
        boundaries: list with one entry fewer than `optimizers`. An `int` >= 1 is the
            number of updates, counted from the start of training, after which the
            next phase starts; with `None` only `advance()` starts it. The integers
            are strictly increasing and come before every `None`.
        name: string, the name of the optimizer. Defaults to one made from the class
            name.
        use_ema: bool, whether to keep an exponential moving average of the weights
            across all phases. Defaults to `False`.
        ema_momentum: float in [0, 1], the momentum of that average. Defaults to
            0.99.
        ema_overwrite_frequency: int, the number of updates after which the weights
            are overwritten by their average, or `None` (the default) to do so only
            in `finalize_variable_values`, at the end of `fit`.
        loss_scale_factor: float by which the loss is multiplied and the gradients
            are divided, or `None` (the default).
        gradient_accumulation_steps: int >= 2, the number of calls whose mean
            gradient makes one update, or `None` (the default). Not under a
            `tf.distribute` strategy that may have several replicas or workers.

    Raises:
        ValueError: if an argument breaks one of the rules above, or if a child is a
            `LossScaleOptimizer`, overrides `scale_loss` or `apply_gradients`, or has a
            `loss_scale_factor`.
    """

    # --- construct -----------------------------------------------------------

    def __init__(
        self,
        optimizers: Sequence[keras.optimizers.Optimizer | str | dict[str, Any]],
        boundaries: Sequence[int | None],
        name: str | None = None,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        ema_overwrite_frequency: int | None = None,
        loss_scale_factor: float | None = None,
        gradient_accumulation_steps: int | None = None,
        **kwargs: Any,
    ) -> None:
        _children.check_settings(kwargs)
        _replicas.check_accumulation(gradient_accumulation_steps)
        children, child_of_phase = _children.get_children(optimizers)
        phases = Phases.parse(boundaries, child_of_phase)
        super().__init__(
            learning_rate=_learning_rate_of_children,
            name=name,
            use_ema=use_ema,
            ema_momentum=ema_momentum,
            ema_overwrite_frequency=ema_overwrite_frequency,
            loss_scale_factor=loss_scale_factor,
            gradient_accumulation_steps=gradient_accumulation_steps,
            **{key: kwargs[key] for key in kwargs.keys() - _children.CHILD_SETTINGS},
        )
        _children.check_names_differ(self.name, children)
        # Not called `optimizers`: Keras' callbacks take any optimizer that has that
        # attribute for a MultiOptimizer, and act on every entry.
        self.children = tuple(children)
        self._phases = phases
        # `add_variable` also tracks: mere attributes would not be among `variables`,
        # nor be saved, if the optimizer is made from a config inside `Model.compile`.
        kind = {"dtype": "int", "aggregation": "only_first_replica"}
        # The lowest phase that may run: `advance()` ended those below it.
        self._min_phase = self.add_variable((), name="min_phase", **kind)
        # The child that made the last update, -1 before the first.
        none = keras.initializers.Constant(-1)
        self._last_child = self.add_variable((), none, name="last_child", **kind)
        start = np.full(len(child_of_phase), -1)
        with keras.name_scope(self.name):
            starts = keras.Variable(start, trainable=False, name="phase_starts", **kind)
        # Not tracked: TensorFlow cannot restore a variable of another length, so this
        # one is saved with the Python state.
        object.__setattr__(self, "_phase_starts", starts)
        self._saved_state = SavedState(self)
        # Of sequences in a sequence, only the outermost saves notes.
        for child in filter(is_sequence, children):
            object.__setattr__(child, "_self_parent", self)
        self._commit = Commit(self._saved_state)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "learning_rate":
            # The base classes would first read the rate, which in a graph is another
            # switch, and then track a variable that belongs to a child.
            return object.__setattr__(self, name, value)
        if name in ("boundaries", "children") and hasattr(self, name):
            raise AttributeError(
                f"`{name}` of a `SequentialOptimizer` cannot be changed. Received: "
                f"{value!r:.200}. Call `advance()` to end a phase early, or load what "
                "this optimizer saved into another one."
            )
        _children.check_settings({name: value})
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        children = [_children.in_words(self.children[i]) for i in self.child_of_phase]
        name, boundaries = type(self).__name__, list(self.boundaries)
        return f"{name}([{', '.join(children)}], boundaries={boundaries})"

    # --- look ----------------------------------------------------------------

    @property
    @_not_autographed
    def phase(self) -> tf.Tensor:
        """The phase that the next update runs in: a scalar int32 tensor.

        An index into the `optimizers` that were passed, in eager and in graph code.
        """
        return self._phases.phase(self.iterations, self._min_phase)

    @property
    def boundaries(self) -> tuple[int | None, ...]:
        """The boundaries that were passed."""
        return self._phases.boundaries

    @property
    def child_of_phase(self) -> tuple[int, ...]:
        """For each phase the index of its child in `children`."""
        return self._phases.child_of_phase

    @property
    def phase_starts(self) -> np.ndarray:
        """For each phase the iteration of its first update, or -1 without one.

        An int64 array, outside graphs. Iterations count from 0, so the first `n`
        updates were made before a phase that started at `n`.
        """
        return self._phase_starts.numpy()

    @property
    def notes(self) -> dict[str, np.ndarray]:
        """What callbacks keep in the saved state: named arrays of NumPy's own dtypes.

        Callbacks have no other place in a checkpoint. Loading sets the notes that
        exist here and in the file, raises if one has another dtype or shape in the
        file, and drops those that only the file has; so a callback should create its
        notes in `set_model`.
        """
        parent = getattr(self, "_self_parent", None)
        return parent.notes if parent else self._saved_state.notes

    def active_child(self) -> keras.optimizers.Optimizer:
        """Returns the child of the current phase, outside graphs.

        Raises:
            RuntimeError: in a `tf.function`, where the phase is not a Python value.
        """
        if not tf.executing_eagerly():
            raise RuntimeError(
                "`active_child()` must be called outside of a `tf.function`. Received: "
                "a call inside of one. Use the tensor `phase` there."
            )
        return self.children[int(self._phases.child(self.phase))]

    @_not_autographed
    def advance(self, to: int | None = None) -> None:
        """Ends the current phase, or every phase before `to`, at this iteration.

        Does nothing in the last phase, or if the current phase is `to` or a later one.
        So a callback that may run twice for one epoch, after a resume, should pass
        `to`. Works in eager and in graph code, in `tf.cond`, `tf.while_loop` and under
        XLA. A phase that was ended stays ended when the optimizer is saved and loaded.

        Under `tf.distribute`, call this outside `strategy.run(...)`, or in every
        replica alike. If one worker of a `MultiWorkerMirroredStrategy` calls it,
        all of them switch before their next update; until that update only this worker
        knows, so save after that update.

        Args:
            to: int, index of the phase that is to run, or `None` (the default) for the
                one after the current phase.

        Raises:
            ValueError: if there is no phase `to`.
            RuntimeError: in a conditional or a loop inside one of several replicas,
                which would all have to decide alike.
        """
        _replicas.once_across_replicas(self._end_phases, self._phases.parse_phase(to))

    def _end_phases(self, to: int | None) -> None:
        phase = tf.cast(self.phase, self._min_phase.dtype)
        target = phase + 1 if to is None else tf.constant(to, phase.dtype)
        ends = tf.logical_and(phase < target, target <= self._phases.last)
        self.assign(self._min_phase, tf.where(ends, target, self._min_phase))

    @property
    @_not_autographed
    def learning_rate(self) -> Any:
        """The learning rate of the current phase's child.

        A variable or a scalar float tensor; NaN for a child that has several rates
        (`MultiOptimizer`). Set it with `=`, because a tensor has no `assign`; this sets
        the active child's. In a graph the value must be a number; outside graphs it may
        be anything that the child accepts. If a child was created with a
        `LearningRateSchedule`, setting a number raises `TypeError`, and if it is a
        `MultiOptimizer`, `AttributeError`: outside graphs while that child is active,
        and in a graph always, because all children are traced.
        """
        if tf.executing_eagerly():
            return getattr(self.active_child(), "learning_rate", np.nan)

        def rate_of(i: int) -> tf.Tensor:
            rate = getattr(self.children[i], "learning_rate", np.nan)
            return tf.cast(rate, keras.config.floatx())

        return self._switch(self.phase, rate_of)

    @learning_rate.setter
    @_not_autographed
    def learning_rate(self, learning_rate: Any) -> None:
        if tf.executing_eagerly():
            self.active_child().learning_rate = learning_rate
            return
        if callable(learning_rate):
            raise ValueError(
                "`learning_rate` must be a number or a scalar tensor when it is set "
                f"inside a `tf.function`. Received: learning_rate={learning_rate!r}. "
                "Set a schedule outside of the graph, on the child itself."
            )

        _replicas.once_across_replicas(self._set_learning_rate, learning_rate)

    def _set_learning_rate(self, learning_rate: Any) -> None:
        def set_on(i: int) -> None:
            child = self.children[i]
            _replicas.for_each_replica(setattr, child, "learning_rate", learning_rate)

        self._switch(self.phase, set_on)

    @property
    def variables(self) -> list[keras.Variable]:
        """The optimizer's own variables, then those of each child."""
        of_children = [v for child in self.children for v in child.variables]
        return [*_keras.own_variables(self), self._phase_starts, *of_children]

    # --- build ---------------------------------------------------------------

    def exclude_from_weight_decay(
        self, var_list: Any = None, var_names: list[str] | None = None
    ) -> None:
        """Excludes variables from the weight decay of every child.

        Args:
            var_list: list of variables to exclude.
            var_names: list of strings; a variable whose name matches one of them,
                as a regular expression, is excluded.
        """
        for child in self.children:
            child.exclude_from_weight_decay(var_list=var_list, var_names=var_names)

    @_not_autographed
    def build(self, variables: Iterable[Any]) -> None:
        """Creates the variables of the optimizer and of every child.

        Args:
            variables: list of the variables to train.

        Raises:
            ValueError: if a child is already built on other variables, if the
                optimizer or a child was created under another `tf.distribute`
                strategy, or if the optimizer has refused a checkpoint.
        """
        self._saved_state.check_not_refused()
        _children.check_loss_scale(self.children)
        if self.built:
            return
        variables = list(variables)
        _replicas.check_strategy([self, *self.children])
        _children.check_built_on(variables, self.children)
        # Keras may call this while it traces the train step, and even while it traces
        # the model for the first time. Then the weights have no values yet, and a child
        # that copies them in `build` can do so only in the graph.
        with tf.init_scope():
            # What was loaded is set at once, which needs variables with values.
            in_graph = not (self._saved_state.held or are_initialized(variables))
        with contextlib.nullcontext() if in_graph else tf.init_scope():
            for child in self.children:
                if not child.built:
                    child.build(list(variables))
        with tf.init_scope():
            late, children = self._starts_later(), enumerate(self.children)
            copies = [find_copies(c, late or i > 0) for i, c in children]
            # Not tracked, nor saved, for which `held_by` passes over `_self_`: they are
            # variables of the children.
            object.__setattr__(self, "_self_weight_copies", copies)
            super().build(variables)
            self._saved_state.after_build()

    def _starts_later(self) -> bool:
        """Returns whether this is in a sequence whose first updates another makes."""
        parent = getattr(self, "_self_parent", None)
        if parent is None:
            return False
        return parent.children[0] is not self or parent._starts_later()

    # --- apply ---------------------------------------------------------------
    #
    # The path of the gradients, from one method to the next:
    #
    #   apply          check -> build -> the workers agree on the phase -> scale
    #                      -> the replicas meet
    #   _apply             -> accumulate, or update -> average -> count
    #   _accumulate            -> add to the sums, or update with their mean
    #   _update                -> switch: in the branch of one child,
    #   _apply_child               in each replica: child.apply
    #                          -> record the child and the start of the phase

    @_not_autographed
    def apply(self, grads: Iterable[Any], trainable_variables: Any = None) -> None:
        """Updates the variables with the child of the current phase.

        Args:
            grads: list of gradients: tensors or `tf.IndexedSlices` with the shape of
                their variable, or `None`. An empty list does nothing and is not
                counted.
            trainable_variables: list of the variables, in the order of `grads`.
                Defaults to those that the optimizer was built on. The first call
                builds the optimizer unless it is built already.

        Raises:
            ValueError: if the optimizer is not built and gets no variables, if there
                are more or fewer gradients than variables, if the optimizer was built
                without one of the variables, or if every gradient is `None`. Under
                `tf.distribute`, if this is called outside `strategy.run(...)`, or if
                the optimizer was created under another strategy.
            RuntimeError: in a conditional or a loop inside one of several replicas.
        """
        grads = list(grads)
        if not grads:
            return
        if tf.distribute.has_strategy():
            _replicas.check_in_replica()
            _replicas.check_strategy([self, *self.children])
        if trainable_variables is None:
            trainable_variables = _keras.trained_variables(self)
        variables = list(trainable_variables)
        _gradients.check_gradients(grads, variables)
        self.build(variables)
        _gradients.check_variables(variables, self)
        # All that is written waits for the gradients: the step that hits the end of a
        # dataset of unknown size has none, and must not count.
        with tf.name_scope(self.name), _gradients.computed_first(grads):
            if _replicas.has_several_workers():
                self._agree_on_min_phase()
            if self.loss_scale_factor is not None:
                grads = _gradients.divide(grads, self.loss_scale_factor, variables)
            _replicas.once_across_replicas(self._apply, grads, variables)

    def _agree_on_min_phase(self) -> None:
        """Ends, for all workers, each phase that any of them has ended."""
        last = self._phases.last
        agreed = _replicas.largest_of_workers(tf.minimum(self._min_phase, last), last)
        # `_min_phase` exceeds `last` if phases were dropped after the run was saved.
        agreed = tf.maximum(tf.cast(agreed, self._min_phase.dtype), self._min_phase)
        self.assign(self._min_phase, agreed)

    def _apply(self, grads: list[Any], variables: list[Any]) -> None:
        if self.gradient_accumulation_steps:
            self._accumulate(grads, variables)
        else:
            self._update(grads, variables)
        if self.use_ema:
            _keras.update_averages(self)
            if self.ema_overwrite_frequency:
                is_due = (self.iterations + 1) % self.ema_overwrite_frequency == 0
                tf.cond(is_due, self._overwrite_with_averages, lambda: None)
        # One operation: Keras' `Variable.assign_add` reads, then writes, and under an
        # asynchronous parameter server loses updates in between.
        self.assign_add(_keras.call_count(self), 1)

    def _accumulate(self, grads: list[Any], variables: list[Any]) -> None:
        """Adds to the accumulators, or empties them into an update."""
        steps = self.gradient_accumulation_steps
        passed = [_keras.accumulator_of(self, variable) for variable in variables]

        def add() -> None:
            # One by one: a variable may be there twice.
            for accumulator, g, v in zip(passed, grads, variables, strict=True):
                new_value = _gradients.add_to(accumulator, g, v)
                if new_value is not None:
                    self.assign(accumulator, new_value)
                    self._constrain([v])

        def update() -> None:
            sums = list(map(_gradients.add_to, passed, grads, variables))
            self._update(_gradients.divide(sums, steps, variables), variables)
            # All of them: this window ends for variables that were not passed, too.
            for variable in _keras.trained_variables(self):
                accumulator = _keras.accumulator_of(self, variable)
                self.assign(accumulator, tf.zeros_like(accumulator))

        ends_window = (_keras.call_count(self) + 1) % steps == 0
        switch_case(tf.cast(ends_window, tf.int32), [add, update])

    def _update(self, grads: list[Any], variables: list[Any]) -> None:
        """Lets the child of the current phase make the update."""

        def update_with(i: int) -> None:
            if copies := self._self_weight_copies[i]:
                is_of_child = np.equal(self.child_of_phase, i)
                has_started = (self._phase_starts >= 0) & is_of_child
                retake(copies, tf.reduce_any(has_started))
            _replicas.for_each_replica(self._apply_child, i, grads, variables)

        phase = self.phase
        self._switch(phase, update_with)
        self.assign(self._last_child, self._phases.child(phase))
        starts = self._phases.starts_after(self._phase_starts, phase, self.iterations)
        self.assign(self._phase_starts, starts)

    @_not_autographed
    def _apply_child(self, i: int, grads: list[Any], variables: list[Any]) -> None:
        grads = _gradients.brought_inside(grads, variables)
        self.children[i].apply(grads, list(variables))

    def _switch(self, phase: tf.Tensor, branch: Callable[[int], Any]) -> Any:
        """Runs `branch` on the index of the child of `phase`, in the graph."""
        branches = [partial(branch, i) for i in range(len(self.children))]
        return switch_case(self._phases.child(phase), branches)

    def _overwrite_with_averages(self) -> None:
        _keras.set_to_averages(self, _keras.trained_variables(self))
        # The average of weights on, say, a sphere is not on it.
        self._constrain(_keras.trained_variables(self))

    def _constrain(self, variables: Iterable[Any]) -> None:
        for variable in variables:
            if variable.constraint is not None:
                self.assign(variable, variable.constraint(variable))

    @_not_autographed
    def finalize_variable_values(self, var_list: Iterable[Any]) -> None:
        """Sets the final values of the weights; `fit` calls this when it ends.

        With `use_ema` they become their moving averages. Otherwise the child that
        made the last update decides, so a child's own moving average counts if
        training ends with that child. Before the first update nothing is set.

        Args:
            var_list: list of the variables that the optimizer was built on.
        """
        variables = list(var_list)
        if self.use_ema:
            finalize = partial(_keras.set_to_averages, self, variables)
            # Before the first update the average is zero.
            tf.cond(tf.greater(self.iterations, 0), finalize, lambda: None)
            return

        def finalize_with(i: int) -> None:
            if i < len(self.children):  # else no child, or one that was dropped since
                self.children[i].finalize_variable_values(variables)

        branches = [partial(finalize_with, i) for i in range(len(self.children) + 1)]
        switch_case(tf.cast(self._last_child, tf.int32), branches)

    def restart_averages(self) -> None:
        """Sets the averages of `use_ema` to the weights, for when these were set."""
        if self.use_ema:
            trained = _keras.trained_variables(self)
            for variable, average in _keras.averages_of(self, trained):
                self.assign(average, variable)

    # --- save ----------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """Returns a dict from which `from_config` creates the optimizer, without state.

        `optimizers` holds each child once, `child_of_phase` the index of each phase's
        child.
        """
        base, skipped = super().get_config(), _children.CHILD_SETTINGS
        return {
            **{key: value for key, value in base.items() if key not in skipped},
            "optimizers": list(map(keras.saving.serialize_keras_object, self.children)),
            "child_of_phase": list(self.child_of_phase),
            "boundaries": list(self.boundaries),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Self:
        """Creates an optimizer from what `get_config` returned.

        Args:
            config: dict, which is not modified.
            custom_objects: dict from names to the user's classes and functions that
                the children need.

        Raises:
            ValueError: if the config is not one of a SequentialOptimizer.
        """
        if cls is not SequentialOptimizer and "optimizers" not in config:
            return cls(**config)  # A subclass with its own arguments and config.
        optimizers = _children.from_config(config, custom_objects)
        others = {k: config[k] for k in {*config} - {"optimizers", "child_of_phase"}}
        return cls(optimizers=optimizers, **others)

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Sets the values of `variables`, those of the children included.

        Args:
            weights: list of arrays with the shapes of `variables`, in their order.

        Raises:
            ValueError: if the optimizer is not built, or if the number of arrays, a
                shape or a counter does not fit; nothing is set then.
        """
        self._saved_state.set_weights(weights)

    def save_own_variables(self, store: Any) -> None:
        """Writes the variables of the optimizer and of its children; see `_saving`."""
        self._saved_state.write(store)

    def load_own_variables(self, store: Any) -> None:
        """Reads what `save_own_variables` wrote, or raises and sets nothing.

        An optimizer that is not built yet takes the counters and learning rates at
        once, and holds the rest until it is built.

        Raises:
            ValueError: if the file breaks the rule of `_layout`, or is damaged.
        """
        self._saved_state.read(store)

    def __dir__(self) -> Iterable[str]:
        # In this list Keras finds what else to save and load. It would load children
        # one by one, after this optimizer, and continue when one of them does not fit.
        return set(super().__dir__()) - {"children", "_self_weight_copies"}

    # TensorFlow has no public hooks for these two.

    def _trackable_children(self, save_type: str = "checkpoint", **kwargs: Any) -> Any:
        children = super()._trackable_children(save_type, **kwargs)
        if save_type == "savedmodel":
            # A graph needs each of its variables, and no Python state.
            del children[STATE], children["_commit"]
            return {**children, "_phase_starts": self._phase_starts.value}
        # The state comes first: see `SavedState.is_foreign`.
        return {STATE: children.pop(STATE), **children}

    def _lookup_dependency(self, name: str, cached_dependencies: Any = None) -> Any:
        # A restore calls this for each part that was saved.
        restoring = cached_dependencies is not None
        if restoring and self._saved_state.is_foreign(name, cached_dependencies):
            return tf.train.Checkpoint()  # takes the part, and is thrown away
        return super()._lookup_dependency(name, cached_dependencies)
