"""The science: how a model of one shape becomes a larger one that computes the same function.

Everything is said by *axis maps* (`axes`): for each new coordinate of an axis its source, its share of the
source's effect, and a scale per role. An *operator* (`operators`, `heads`, `layers`) is a pure function that
makes them. `step` gathers the maps of one growth step; `tensors` applies them to weights and to Adam's
moments. No files, no ranks, no GPU: a researcher can read this room alone.
"""
