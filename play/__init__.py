"""A local page that looks inside a trained agent and plays in its dream (``python -m play``)."""
