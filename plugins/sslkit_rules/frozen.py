"""Rules about weights that are not trained."""
