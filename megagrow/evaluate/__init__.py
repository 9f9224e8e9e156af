"""Verifies a growth step by running the models of parent and child (`deep`).

A checkpoint of any layout is loaded whole into a Megatron-Core model in one process (`live`), in float64 where
possible. Parent and child run on the same tokens, and their outputs are compared (`deep`), their gradients against
the prediction of the dual rule (`duality`), and copies with their sources after some training steps (`copies`).
"""
