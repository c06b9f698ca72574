"""What is asked, one file per question. Imports from workloads and harness.

The docstring of a question begins with the question. It has

    FULL, QUICK         two instances of a frozen dataclass: how long it takes
    measure(settings)   measures, checks that what it measured is right, and returns
                        what JSON can hold: a dict of lists of rows, a row being a dict
    tables(result)      makes a list of `report.Table`, an empty one if nothing could
                        be measured
    headline(result)    answers the question in one sentence
    draw(result)        makes a matplotlib `Figure`

A question that is asked in parts has, in place of `measure`,

    measure_in_sittings(settings, earlier)

a generator of what `measure` returns, after each part of it. It leaves out what stands
in `earlier`, the result of the last sitting with the same settings, or `{}`.

The file then names the environment of each sitting (`earlier_sittings`).

If it is one of the costs in the main README, it has `COST`, its title there. A function
`prepare` is called before TensorFlow starts its devices.

`tables`, `headline` and `draw` see nothing but the JSON file, and nobody else knows
what is in it. So `python -m benchmarks --tables` writes both READMEs without measuring.
"""

# In the order in which they are asked.
QUESTIONS = (
    "step_throughput",
    "first_call",
    "the_switch",
    "memory",
    "idle_children",
    "rivals",
    "quasi_newton",
    "gpu",
    "does_it_help",
    "pinn",
    "deepxde",
    "faults",
)
