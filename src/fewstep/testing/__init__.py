"""Exported checks and closed-form truths."""
