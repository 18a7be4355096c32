"""Checkpoints: what lies in them, and how one becomes another."""
