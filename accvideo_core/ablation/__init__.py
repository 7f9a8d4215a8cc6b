"""The ablation: what each part of the method gives on the embedded teacher, seed by seed.

    study      what a study is: the experiments on one paper
    accvideo   the study of AccVideo; accvideo_setting: how large it is, quick or full
    arms       rows of the tables, and the questions that they answer
    gauge      the figures of a student beside the teacher's 50 steps
    lab        every arm of every seed, each once, in a folder that may be gone on with
    features   what the blocks see at the key times
    spread     a figure over training seeds, with its interval
    words      what the figures say, in sentences chosen from the figures
    page       the page of a study, such as docs/experiments.md
"""
