"""Distillation: from a teacher's recorded trajectories to a few-step student."""
