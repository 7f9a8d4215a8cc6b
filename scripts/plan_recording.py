"""What recording a large dataset takes: GPU-hours, days, money and storage, as a table.

    python -m scripts.plan_recording                                  the table of docs/cluster.md
    python -m scripts.plan_recording --seconds 410 --price 2.1 \\
        --size 544x960x93 --states 6 --records 20000 --gpus 8         your own figures

Everything is computed from the seconds that a teacher takes for a record on one GPU. Measure them
with a short `accvideo record`, which shows records per hour.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accvideo_core.latents import LatentSpec  # noqa: E402

LATENTS = LatentSpec(channels=16, stride_t=4, stride_hw=8, patch=2)
"""Of HunyuanVideo and Wan 2.1."""
RECORDS = 110_000
OVERHEAD = 0.03
"""Of recording over sampling: the most that benchmarks/recorder.py lets pass."""
PRICES = {"A100": 1.5, "H100": 2.5, "H200": 3.5, "RTX 5090": 0.7}
"""USD per GPU-hour, assumed: nobody's offer."""
GB, TB = 1e9, 1e12


@dataclass(frozen=True, slots=True)
class Plan:
    """A teacher on a GPU, and how much of it is wanted."""

    teacher: str
    size: tuple[int, int, int]
    """Height, width, frames in pixels."""
    gpu: str
    seconds: float
    """Per record on one GPU."""
    source: str
    price: float
    """USD per GPU-hour."""
    records: int = RECORDS
    gpus: int = 64
    states: Sequence[int] = (6, 11, 51)
    """Numbers of kept states to compute storage for."""
    bytes_per_value: int = 2

    @property
    def gpu_hours(self) -> float:
        return self.records * self.seconds * (1 + OVERHEAD) / 3600

    @property
    def days(self) -> float:
        return self.gpu_hours / self.gpus / 24

    @property
    def cost(self) -> float:
        return self.gpu_hours * self.price

    def record_bytes(self, states: int) -> int:
        """Of the latents of one record, [K, C, T, H, W]; the file's header is under 2 KB."""
        height, width, frames = self.size
        c, t, h, w = LATENTS.shape(frames, height, width)
        return states * c * t * h * w * self.bytes_per_value

    def storage(self, states: int) -> float:
        """Bytes of all records."""
        return float(self.records) * self.record_bytes(states)

    def write_rate(self, states: int) -> float:
        """Bytes per second that all GPUs write together."""
        return self.gpus * self.record_bytes(states) / self.seconds


_HUNYUAN, _WAN = (544, 960, 93), (480, 832, 81)
_I2V_STEP = 9.77
PLANS = tuple(
    Plan(teacher, size, gpu, seconds, source, PRICES[gpu])
    for teacher, size, gpu, seconds, source in (
        ("HunyuanVideo 13B, 50 steps", _HUNYUAN, "A100", 704.0, "published (1)"),
        ("HunyuanVideo 13B, 50 steps", _HUNYUAN, "H100", 704 * 1904 / 3234, "computed (2)"),
        ("Wan 2.1 T2V 14B, 50 steps, CFG", _WAN, "A100", 932.0, "published (1)"),
        ("Wan 2.1 T2V 14B, 50 steps, CFG", _WAN, "H100", 50 * _I2V_STEP, "computed (3)"),
        ("Wan 2.1 I2V 14B, 40 steps, CFG", _WAN, "H100", 40 * _I2V_STEP, "computed (3)"),
        ("Wan 2.1 T2V 14B, 50 steps, CFG", _WAN, "RTX 5090", 1676.0, "published (4)"),
        ("Wan 2.1 T2V 1.3B, 50 steps, CFG", _WAN, "H200", 95.2, "published (5)"),
    )
)


def table(plans: Iterable[Plan]) -> str:
    """A Markdown table, a row per plan."""
    plans = list(plans)
    states = plans[0].states
    kept = [f"{k} states, TB" for k in states]
    head = ["teacher", "GPU", "s per record", "which is", "GPU-hours", "days", "USD", *kept, "MB/s"]
    rows = [head, ["---"] * len(head)]
    for p in plans:
        figures = [f"{p.gpu_hours:,.0f}", f"{p.days:.1f} on {p.gpus}", f"{p.cost:,.0f}"]
        storage = [f"{p.storage(k) / TB:.2f}" for k in states]
        rate = f"{p.write_rate(states[0]) / 1e6:.1f}"
        name = f"{p.teacher}, {'x'.join(map(str, p.size))}"
        rows.append([name, p.gpu, f"{p.seconds:.0f}", p.source, *figures, *storage, rate])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def prompt_bytes(prompts: int, tokens: int, width: int = 4096) -> float:
    """Of the prompts' files: a float32 vector of `width` for every token."""
    return float(prompts) * tokens * width * 4


def files_per_folder(records: int) -> tuple[float, float]:
    """Mean and standard deviation over the 256 folders; ids are hashes, so it is binomial."""
    share = 1 / 256
    return records * share, (records * share * (1 - share)) ** 0.5


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, help="per record on one GPU; then it is your row")
    parser.add_argument("--price", type=float, default=2.0, help="USD per GPU-hour (2)")
    parser.add_argument("--size", default="544x960x93", help="HEIGHTxWIDTHxFRAMES (544x960x93)")
    parser.add_argument("--states", default="6,11,51", help="numbers of kept states (6,11,51)")
    parser.add_argument("--records", type=int, default=RECORDS, help=f"({RECORDS})")
    parser.add_argument("--gpus", type=int, default=64, help="that record at once (64)")
    parser.add_argument("--float32", action="store_true", help="store float32 instead of bfloat16")
    parser.add_argument("--prompts", type=int, help="different ones (as many as records)")
    parser.add_argument("--tokens", type=int, default=100, help="of a prompt (100)")
    args = parser.parse_args(argv)
    plans = [_own(args)] if args.seconds else PLANS
    print(table(plans))
    records = plans[0].records
    mean, deviation = files_per_folder(records)
    stored = prompt_bytes(args.prompts or records, args.tokens) / GB
    print(f"\nprompts of {args.tokens} tokens: {stored:,.0f} GB")
    print(f"files in each of the 256 folders: {mean:,.0f} +- {deviation:,.0f}")


def _own(args: argparse.Namespace) -> Plan:
    height, width, frames = (int(part) for part in args.size.split("x"))
    return Plan(
        "your teacher",
        (height, width, frames),
        "yours",
        args.seconds,
        "given",
        args.price,
        args.records,
        args.gpus,
        tuple(int(part) for part in args.states.split(",")),
        4 if args.float32 else 2,
    )


if __name__ == "__main__":
    main()
