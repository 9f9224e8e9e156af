"""Train one stage of a family: a loop on Megatron-Core that can be killed at any moment.

`stage.train_stage` is the story. `engine` steps the model, `state` knows how a stage begins, is saved and goes on,
`signals` turns a request to stop into a flag that all ranks see, and `observers` tells people, records and trackers.
"""
