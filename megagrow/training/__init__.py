"""Train one stage of a family with Megatron-Core; the run may be killed at any moment and resumed.

Start reading at `stage.train_stage`. `engine` steps the model, `state` finds the checkpoint to start from and saves new
ones, `signals` turns a request to stop into a flag that all ranks see, and `observers` passes records to the records
file, the progress bar and the trackers.
"""
