"""The ablation: what each part of the method gives on the embedded teacher, seed by seed.

    setting    how large the experiments are: the presets quick and full
    arms       the students that are trained, and the questions that they answer
    gauge      the figures of a student beside the teacher's 50 steps
    lab        every arm of every seed, each once, in a folder that may be gone on with
    features   what the blocks see at the key times
    spread     a figure over training seeds, with its interval
    words      what the figures say, in sentences chosen from the figures
    page       docs/experiments.md
"""
