"""Fold checkpoint directories into checkpoint directories, without the model in memory."""
