"""What training on many GPUs takes: memory, communication and time of an update, as a table.

    python -m scripts.plan_training                    what docs/distributed_training.md shows
    python -m scripts.plan_training --network hunyuan --gpus 16 --sequence 4 --forward 8.3

Nothing here is measured on many GPUs. Everything is computed from the sizes of a network, the
seconds that one of its passes takes for one clip on one GPU (published sampling times, or yours),
and the links' rates below. A full student computes in float32, for which no times are published;
its memory and its communication are told.

Shapes: N video tokens of a clip, D width of a token.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.plan_recording import LATENTS, PLANS  # noqa: E402

GB = 1e9
INSIDE, BETWEEN = 270e9, 40e9
"""Bytes a second that a GPU gets through: 60 % of an H100's NVLink (450 GB/s each way), 80 % of a
400 Gb/s network card. Assumed."""
ATTENTION_BACKWARD = 2.5
"""Of a fused attention's way back, in ways forward: 5 products of matrices for 2."""
BLOCK = 25
"""Numbers per token, in widths D, that the backward pass of one block holds at once; counted by the
trainer's memory plan (`accvideo distill` prints it)."""
STEPS = 5
UPDATES = 1200
RESIDENT = 2
"""Blocks whose weights are whole at a time: the one at work, and the next."""


@dataclass(frozen=True, slots=True)
class Network:
    """Sizes of a transformer, and how long one pass takes."""

    title: str
    parameters: float
    per_token: float
    """Weights that every video token is multiplied with."""
    blocks: int
    width: int
    text: int
    """Text tokens that go through the blocks beside the video's."""
    adapters: float
    """Trained numbers of a LoRA of rank 32."""
    heads: float
    """Of the discriminator, at 5 key times."""
    size: tuple[int, int, int]
    """Height, width, frames in pixels."""
    forward: float
    """Seconds of one pass for one clip on one GPU of the table."""
    source: str

    @property
    def tokens(self) -> int:
        """Of one clip."""
        height, width, frames = self.size
        _, t, h, w = LATENTS.shape(frames, height, width)
        return t * (h // LATENTS.patch) * (w // LATENTS.patch) + self.text

    @property
    def linear(self) -> float:
        """Operations of one pass in linear layers."""
        return 2 * self.per_token * self.tokens

    @property
    def attention(self) -> float:
        """Operations of one pass in attention among the clip's own tokens."""
        return 4.0 * self.tokens**2 * self.width * self.blocks


def _seconds(teacher: str, gpu: str, passes: int) -> float:
    """Of one pass, from the seconds of a whole sampling in docs/cluster.md."""
    return next(p.seconds / passes for p in PLANS if teacher in p.teacher and p.gpu == gpu)


HUNYUAN = Network(
    title="HunyuanVideo 13B",
    parameters=12.821e9,
    per_token=60 * 12 * 3072**2,
    blocks=60,
    width=3072,
    text=256,
    adapters=141.2e6,
    heads=65.9e6,
    size=(544, 960, 93),
    forward=_seconds("HunyuanVideo", "H100", 50),
    source="published",
)
WAN = Network(
    title="Wan 2.1 14B",
    parameters=14.288e9,
    per_token=40 * (6 * 5120**2 + 2 * 5120 * 13824),
    blocks=40,
    width=5120,
    text=0,
    adapters=153.4e6,
    heads=107.8e6,
    size=(480, 832, 81),
    forward=_seconds("T2V 14B", "H100", 100),
    source="published",
)
NETWORKS = {"hunyuan": HUNYUAN, "wan": WAN}


@dataclass(frozen=True, slots=True)
class Setup:
    """A network, the GPUs that train it, and how."""

    network: Network
    gpus: int
    sequence: int = 1
    full: bool = False
    """All weights, in float32, instead of a LoRA of rank 32."""
    batch: int = 32
    machine: int = 8
    """GPUs of one machine."""
    steps: int = STEPS
    queued: bool = False
    """Fakes by queues, one pass each, instead of rolled from noise in every update."""
    attention_backward: float = ATTENTION_BACKWARD

    def __post_init__(self) -> None:
        if self.gpus % self.sequence or self.batch % self.groups:
            raise SystemExit(
                f"{self.gpus} GPUs in groups of {self.sequence} cannot share {self.batch} clips "
                "equally; choose other numbers"
            )

    @property
    def groups(self) -> int:
        return self.gpus // self.sequence

    @property
    def clips(self) -> int:
        """Clips of an update that one group computes, one after the other."""
        return self.batch // self.groups

    # Memory of one GPU, bytes --------------------------------------------------------------------

    @property
    def weights(self) -> float:
        """The teacher's, and of a full student its own, with the blocks that are whole."""
        n = self.network
        within = min(self.machine, self.gpus)
        whole = RESIDENT * n.parameters / n.blocks if within > 1 else 0.0
        frozen = 2 * (n.parameters / within + whole)
        return frozen + (4 * (n.parameters / self.gpus + whole) if self.full else 0.0)

    @property
    def trained(self) -> float:
        """Gradients and AdamW's two moments, of adapters and heads with the values themselves."""
        n = self.network
        student = 12 * n.parameters / self.gpus if self.full else 16 * n.adapters
        return student + 16 * n.heads

    @property
    def activations(self) -> float:
        """What checkpointing keeps of one clip: every block's input, of student and teacher."""
        n = self.network
        each = n.blocks * n.tokens * n.width / self.sequence
        return each * (2 + (4 if self.full else 2))

    @property
    def working(self) -> float:
        """The one block that is recomputed and differentiated."""
        n = self.network
        return BLOCK * n.tokens * n.width * (4 if self.full else 2) / self.sequence

    @property
    def peak(self) -> float:
        return self.weights + self.trained + self.activations + self.working

    # Operations of an update, in passes of one clip ---------------------------------------------

    @property
    def forwards(self) -> float:
        """Ways forward of a clip, without those that checkpointing repeats: guidance, fakes (on
        average over the key times), the teacher on fakes and on recorded latents.
        """
        return 1 + self.rolled + 1 + 2

    @property
    def rolled(self) -> float:
        """Passes of the rollout without gradient."""
        return 0.0 if self.queued else (self.steps - 1) / 2

    @property
    def operations(self) -> float:
        """Of one clip in one update of a LoRA, with checkpointing."""
        n = self.network
        once = n.linear + n.attention
        # Gradients of inputs alone. diffusers' divided attention repeats its way forward there.
        repeated = n.attention if self.sequence > 1 else 0.0
        back = n.linear + self.attention_backward * n.attention + repeated
        return once * self.forwards + 3 * (once + back)

    @property
    def compute(self) -> float:
        """Seconds of one update's computation of a LoRA, all at the rate of a pass forward."""
        n = self.network
        rate = (n.linear + n.attention) / n.forward
        return self.clips * self.operations / rate / self.sequence

    # Communication of one GPU in an update, bytes -----------------------------------------------

    @property
    def gathered(self) -> float:
        """Weights that FSDP gathers: once for every way forward and every way back."""
        n = self.network
        frozen = 2 * n.parameters * _others(min(self.machine, self.gpus))
        if not self.full:
            return self.clips * (self.forwards + 3) * frozen
        own = 4 * n.parameters * _others(self.gpus)
        return self.clips * ((2 + 1) * frozen + (self.forwards - 2 + 2) * own)

    @property
    def exchanged(self) -> float:
        """Tokens for heads and back (Ulysses): queries, keys, values and the answer."""
        n = self.network
        each = 4 * n.blocks * n.tokens / self.sequence * n.width * _others(self.sequence)
        # Forward, repeated by checkpointing, and back: thrice where there is a gradient.
        student, teacher = 2 * 3 + self.rolled, 3 + 1
        return self.clips * each * ((4 if self.full else 2) * student + 2 * teacher)

    @property
    def reduced(self) -> float:
        """Gradients: all-reduced once in an update, or of a full student scattered at each of its
        two ways back.
        """
        n = self.network
        heads = 2 * 4 * n.heads * _others(self.gpus)
        if self.full:
            return heads + self.clips * 2 * 4 * n.parameters * _others(self.gpus)
        return heads + 2 * 4 * n.adapters * _others(self.gpus)

    @property
    def seconds(self) -> float:
        """Of a LoRA's update: weights are gathered while the GPU computes, the rest is waited for.
        Only gradients go from machine to machine.
        """
        crossing = BETWEEN if self.gpus > self.machine else INSIDE
        waited = self.exchanged / INSIDE + self.reduced / crossing
        return max(self.compute, self.gathered / INSIDE) + waited


def _others(count: int) -> float:
    """The part of something shared that `count` GPUs' others hold."""
    return (count - 1) / count


SETUPS = (
    Setup(HUNYUAN, 8),
    Setup(HUNYUAN, 8, sequence=2),
    Setup(HUNYUAN, 8, sequence=8),
    Setup(HUNYUAN, 32, sequence=4),
    Setup(HUNYUAN, 8, sequence=8, full=True),
    Setup(HUNYUAN, 32, sequence=8, full=True),
    Setup(WAN, 8),
    Setup(WAN, 8, sequence=4),
    Setup(WAN, 32, sequence=4),
    Setup(WAN, 32, sequence=8, full=True),
)


def memory_table(setups: Iterable[Setup]) -> str:
    """GB of one GPU, a row per setup."""
    head = ["network", "trained", "GPUs", "N", "weights", "trained, with its optimiser"]
    head += ["kept for the way back", "a block at work", "sum"]
    rows = []
    for s in setups:
        parts = (s.weights, s.trained, s.activations, s.working, s.peak)
        rows.append([*_names(s), *(f"{x / GB:.0f}" for x in parts)])
    return _table(head, rows)


def time_table(setups: Iterable[Setup]) -> str:
    """GB into one GPU, and seconds, of an update; a row per setup."""
    head = ["network", "trained", "GPUs", "N", "weights, GB", "tokens, GB", "gradients, GB"]
    head += ["computing, s", "update, s", f"{UPDATES} updates, days"]
    rows = []
    for s in setups:
        moved = [f"{x / GB:,.0f}" for x in (s.gathered, s.exchanged, s.reduced)]
        times = [f"{s.compute:.0f}", f"{s.seconds:.0f}", f"{s.seconds * UPDATES / 86400:.1f}"]
        rows.append([*_names(s), *moved, *(["-"] * 3 if s.full else times)])
    return _table(head, rows)


def _names(setup: Setup) -> list[str]:
    how = "all weights" if setup.full else "LoRA 32"
    size = "x".join(map(str, setup.network.size))
    return [f"{setup.network.title}, {size}", how, str(setup.gpus), str(setup.sequence)]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=NETWORKS, help="then it is your row")
    parser.add_argument("--gpus", type=int, default=8, help="(8)")
    parser.add_argument("--sequence", type=int, default=1, help="--sequence-parallel (1)")
    parser.add_argument("--full", action="store_true", help="train all weights")
    parser.add_argument("--batch", type=int, default=32, help="clips of an update (32)")
    parser.add_argument("--queued", action="store_true", help="rollout = queued")
    parser.add_argument("--size", help="HEIGHTxWIDTHxFRAMES (the network's in the table)")
    parser.add_argument("--forward", type=float, help="seconds of one pass for one clip on one GPU")
    args = parser.parse_args(argv)
    setups = [_own(args)] if args.network else SETUPS
    print(memory_table(setups))
    print()
    print(time_table(setups))


def _own(args: argparse.Namespace) -> Setup:
    network = NETWORKS[args.network]
    if args.size is not None:
        height, width, frames = (int(part) for part in args.size.split("x"))
        larger = replace(network, size=(height, width, frames))
        work = (larger.linear + larger.attention) / (network.linear + network.attention)
        network = replace(larger, forward=network.forward * work)
    if args.forward is not None:
        network = replace(network, forward=args.forward)
    return Setup(network, args.gpus, args.sequence, args.full, args.batch, queued=args.queued)


if __name__ == "__main__":
    main()
