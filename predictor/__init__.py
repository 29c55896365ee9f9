"""The reference's names in `neurosurgeon.predictor`."""
