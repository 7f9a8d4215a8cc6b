"""The names of a network's tensors: one table per architecture, and its inverse derived from it.

"native" are the names of the official release (of stock ComfyUI where the release has diffusers'
own). An architecture is a file here with

    TITLE, CLASS      what people call it, and the name of diffusers' class
    UNSEEN            settings that no tensor shows, which a file's header may state
    PROBE             a configuration with one block of everything
    MARKERS           diffusers layers by which a file is recognised
    key_table(config) the table of one concrete network
    read(shapes)      (family name, diffusers configuration) from the shapes of a file
"""
