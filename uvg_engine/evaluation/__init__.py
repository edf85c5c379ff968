"""Evaluation: what a model reaches, measured from pixels and from text."""
