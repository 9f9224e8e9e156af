"""Maps applied to tensors: weights, moments, and random values by address. Imports torch."""
