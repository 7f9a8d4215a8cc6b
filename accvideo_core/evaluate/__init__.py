"""Evaluation: figures, comparison and pictures of students against their teacher."""
