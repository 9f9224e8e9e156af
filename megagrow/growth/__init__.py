"""How a model of one shape becomes a larger one that computes the same function.

    maps/       data and arithmetic: for each target coordinate of an axis, its source, its share of the source's
                effect and a scale per role; a `GrowthStep` holds the maps of all axes
    operators/  pure functions that make maps, registered by name; `plan_growth` calls them
    values/     maps applied to weights and to Adam's moments, with torch on CPU

No files, no ranks, no GPU: a researcher can read this room without the others.
"""
