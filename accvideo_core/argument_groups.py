"""Arguments that several of the terminal's commands have in common."""

from __future__ import annotations

import argparse
from pathlib import Path

from .embedded import teacher_path


def teacher(parser: argparse.ArgumentParser) -> None:
    network(parser)
    machine(parser)


def network(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--teacher",
        type=teacher_path,
        help="diffusers folder, a checkpoint file, or tiny or tiny-svd for the embedded "
        "HunyuanVideo or Stable Video Diffusion (tiny)",
    )
    parser.add_argument("--low-noise", type=Path, help="Wan 2.2 A14B: the low-noise checkpoint")
    parser.add_argument("--variant", help="family that a checkpoint's tensors cannot tell")
    parser.add_argument("--vae", type=Path, help="diffusers VAE folder, or Wan's VAE file")
    for name, target in (("", "the teacher"), ("-high", "its high-noise expert"),
                         ("-low", "its low-noise expert")):  # fmt: skip
        parser.add_argument(
            f"--lora{name}",
            action="append",
            default=[],
            metavar="FILE[=STRENGTH]",
            help=f"LoRA to put on {target}; may be repeated",
        )
    parser.add_argument(
        "--lora-mode",
        choices=("merge", "adapter"),
        default="merge",
        help="merge into the weights, or keep beside them (merge)",
    )
    parser.add_argument(
        "--weights",
        choices=("fp8", "nf4"),
        help="pack the blocks' weights into 8 or 4.5 bits after loading (as they are stored)",
    )


def cfg(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cfg", type=float, help="classifier-free guidance of the teacher (the family's; 1: none)"
    )
    parser.add_argument("--negative", help="negative prompt that goes with it (the family's)")


def machine(parser: argparse.ArgumentParser) -> None:
    device(parser)
    parser.add_argument("--dtype", help="of the network (bfloat16 on cuda, float32 on cpu)")


def device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="such as cuda or cpu (cuda where there is one)")
    threads(parser)


def threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, help="CPU threads of torch (torch's own choice)")


def prompts(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompts (at least one of them)")
    group.add_argument("--prompt", action="append", default=[], help="a prompt; may be repeated")
    group.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="text file with a prompt a line, JSON, CSV, Parquet, or a folder of images with "
        "captions",
    )
    group.add_argument("--column", metavar="NAME", help="column of that file with the prompts")
    group.add_argument(
        "--micro",
        metavar="FPS,MOTION,NOISE",
        help="Stable Video Diffusion: frames per second, motion bucket and noise on the image "
        "(7,127,0.02)",
    )
    group.add_argument(
        "--world", type=int, default=0, metavar="N", help="N of the embedded teacher (to 378)"
    )


def size(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("size of the clips (the student's or embedded teacher's)")
    group.add_argument("--frames", type=int, help="number of frames")
    group.add_argument("--height", type=int, help="pixels")
    group.add_argument("--width", type=int, help="pixels")


def sampling(parser: argparse.ArgumentParser) -> None:
    """Which model is sampled, and at what times."""
    parser.add_argument("--student", type=Path, help="student file; its own key times are used")
    parser.add_argument("--steps", type=int, help="steps of the teacher's grid, without --student")
    parser.add_argument("--preset", help="times and solver of a public few-step model")
    parser.add_argument("--shift", type=float, help="shift of the teacher's grid (the family's)")
    cfg(parser)


def speed(parser: argparse.ArgumentParser, exact: bool = False) -> None:
    """How the network computes; `exact` leaves out what changes the result more than rounding."""
    group = parser.add_argument_group("speed (see docs/sampling_speed.md)")
    group.add_argument("--attention", metavar="NAME", help="kernel, or auto for the fastest here")
    if not exact:
        group.add_argument(
            "--sparse",
            nargs="?",
            const="radial",
            metavar="PATTERN",
            help="leave out attention between distant tokens: faster, and not the same video",
        )
    group.add_argument(
        "--compile", action="store_true", help="compile the blocks (a minute at the first step)"
    )
    group.add_argument(
        "--cuda-graphs", action="store_true", help="record a step on the GPU and play it again"
    )
    if not exact:
        group.add_argument(
            "--fp8", action="store_true", help="linear layers in 8 bits (Ada, Hopper and newer)"
        )
    group.add_argument(
        "--swap-blocks",
        type=int,
        default=0,
        metavar="N",
        help="blocks of the network that wait in main memory until it is their turn (0)",
    )
    if not exact:
        group.add_argument(
            "--cfg-batch",
            metavar="HOW",
            help="ask for prompt and negative prompt batched, in-turn, or as memory allows (auto)",
        )


def decoding(parser: argparse.ArgumentParser) -> None:
    """What stands before and after the network."""
    parser.add_argument(
        "--tiny-vae",
        type=Path,
        metavar="FILE",
        help="decode by this tiny decoder (TAEHV: taehv, taew2_1, ...): faster, a little blurred",
    )
    vae_speed(parser)
    text_cache(parser)


def vae_speed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--vae-speed",
        default="plain",
        metavar="HOW",
        help="decode with channels_last, or compiled, on GPUs where that is faster (plain)",
    )


def text_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text-cache",
        type=Path,
        metavar="FOLDER",
        help="keep encoded prompts there, and load no text encoder for those that are there",
    )
