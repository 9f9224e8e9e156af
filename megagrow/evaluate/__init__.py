"""What a model does: the proof of a growth step on real models (`deep`).

A checkpoint of any layout is loaded whole into one process' Megatron-Core model (`live`), in float64 where that
runs; parent and child see the same tokens, and what they compute is compared (`deep`), as is what training makes of
copies (`copies`).
"""
