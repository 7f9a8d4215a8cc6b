"""What our loops cost over the bare work, side by side in one run: `make bench`.

    sampling   sample() against the network's forward passes alone                 <= 1.05 x
    recording  record() against sample() over the same batches                     <= 1.10 x
    training   one update of distill() against a plain loop with the same maths    <= 1.10 x
    import     the pack's door and its nodes' schemas, as ComfyUI loads them       <  1 s

Both sides of a ratio run in turn, several times; the figure is the median of the pairs' ratios.
Beside the wall clock stands the same ratio in CPU seconds, which other programs disturb less.
The network is the embedded teacher's, untrained: its weights do not matter here.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from accvideo_core.conditioning import Condition, Prompt  # noqa: E402
from accvideo_core.distill.recipes import Recipe  # noqa: E402
from accvideo_core.distill.student import LoraSpec, Student, StudentInfo  # noqa: E402
from accvideo_core.distill.trainer import distill  # noqa: E402
from accvideo_core.flow import Times, key_indices, time_grid  # noqa: E402
from accvideo_core.latents import LatentSpec, seeded_noise  # noqa: E402
from accvideo_core.models import FAMILIES, VideoModel, tiny  # noqa: E402
from accvideo_core.sampling import SamplePlan, sample  # noqa: E402
from accvideo_core.trajectories.record import RecordSpec, record  # noqa: E402
from accvideo_core.trajectories.store import TrajectoryDataset  # noqa: E402

PLAN = SamplePlan(frames=17, height=32, width=32)
TOKENS = 12
GUIDANCE = 6.0
Seconds = tuple[float, float]
"""(wall, CPU)."""


@dataclass(frozen=True)
class Row:
    """One line of the result; `ours` and `plain` are wall seconds, the limit is on `figure`."""

    name: str
    ours: float
    plain: float | None
    figure: float
    limit: float
    cpu_figure: float | None = None

    @property
    def passed(self) -> bool:
        return self.figure <= self.limit


def timed(work: Callable[[], object]) -> Seconds:
    """Wall and CPU seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def compare(
    name: str,
    limit: float,
    repeats: int,
    ours: Callable[[], Seconds],
    plain: Callable[[], Seconds],
) -> Row:
    """Run the two sides in turn, after one round that only warms up."""
    ours(), plain()
    pairs = []
    for i in range(repeats):
        # The side that goes first changes, so that a drift of the machine favours neither.
        first, second = (ours, plain) if i % 2 else (plain, ours)
        one, two = first(), second()
        pairs.append((one, two) if i % 2 else (two, one))
    wall, cpu = (statistics.median(a[i] / b[i] for a, b in pairs) for i in (0, 1))
    sides = [statistics.median(pair[i][0] for pair in pairs) for i in (0, 1)]
    return Row(name, sides[0], sides[1], wall, limit, cpu)


def make_model(device: str) -> VideoModel:
    """The embedded teacher's network with random weights."""
    torch.manual_seed(0)
    module = tiny.transformer().to(device).eval().requires_grad_(False)
    spec = LatentSpec(tiny.LATENT_CHANNELS, 4, 4, (tiny.SCALING_FACTOR,), patch=2)
    return VideoModel(module, FAMILIES["hunyuan_video"], spec, source="bench")


def make_prompts(count: int) -> list[Prompt]:
    """Prompts with random conditions of the embedded teacher's widths."""
    width = tiny.TEXT_WIDTH
    text = seeded_noise((count, TOKENS, width), "text")
    pooled = seeded_noise((count, width), "pooled")
    cond = Condition(text, pooled=pooled).with_guidance(GUIDANCE)
    return [Prompt.of(f"prompt {i}", cond.select(i)) for i in range(count)]


def network_inputs(model: VideoModel, cond: Condition) -> dict[str, Tensor]:
    """What the bare network wants besides latents and time."""
    moved = cond.to(model.device, model.dtype)
    assert moved.pooled is not None and moved.guidance is not None
    return {
        "encoder_hidden_states": moved.text,
        "encoder_attention_mask": moved.full_mask(),
        "pooled_projections": moved.pooled,
        "guidance": moved.guidance * 1000,
    }


def bench_sampling(model: VideoModel, repeats: int, batch: int = 8, steps: int = 5) -> Row:
    """sample() against as many forward passes."""
    prompts = make_prompts(batch)
    cond = Condition.cat([prompt.condition for prompt in prompts])
    noise = PLAN.noise(model.latent_spec, prompts, seed=0).to(model.device)
    times = time_grid(steps, model.family.shift)
    inputs = network_inputs(model, cond)

    @torch.no_grad()
    def forwards() -> None:
        for t in times[:-1]:
            timestep = torch.full((batch,), t * 1000, device=model.device)
            model.module(hidden_states=noise, timestep=timestep, **inputs, return_dict=False)

    return compare(
        "sampling / forwards",
        1.05,
        repeats,
        lambda: timed(lambda: sample(model, cond, noise, times)),
        lambda: timed(forwards),
    )


def bench_recording(model: VideoModel, repeats: int, batch: int = 8, steps: int = 50) -> Row:
    """record() of one batch, files and all, against sample() of the same batch."""
    prompts = make_prompts(batch)
    cond = Condition.cat([prompt.condition for prompt in prompts])
    noise = PLAN.noise(model.latent_spec, prompts, seed=0).to(model.device)
    times = model.family.time_grid(steps)
    spec = RecordSpec(PLAN.frames, PLAN.height, PLAN.width, steps=steps, kept=5, batch_size=batch)

    def recorded() -> Seconds:
        with tempfile.TemporaryDirectory() as folder:
            return timed(lambda: record(model, prompts, spec, Path(folder) / "dataset"))

    return compare(
        "recording / sampling",
        1.10,
        repeats,
        recorded,
        lambda: timed(lambda: sample(model, cond, noise, times)),
    )


def bench_training(model: VideoModel, repeats: int, batch: int = 16, updates: int = 8) -> Row:
    """Seconds per update of distill() against `PlainTraining`, both with LoRA and Eq. 6."""
    recipe = Recipe(
        name="bench", lora=LoraSpec(rank=16), batch_size=batch, train_steps=updates, lr=1e-4
    )
    spec = RecordSpec(PLAN.frames, PLAN.height, PLAN.width, steps=5, kept=5, batch_size=batch)
    with tempfile.TemporaryDirectory() as folder:
        dataset = record(model, make_prompts(2 * batch), spec, Path(folder) / "dataset")
        plain = PlainTraining(model, dataset, recipe)
        runs = iter(range(1_000_000))

        def ours() -> Seconds:
            return updates_of_distill(model, dataset, recipe, Path(folder) / f"run{next(runs)}")

        return compare("training update", 1.10, repeats, ours, lambda: plain.update_seconds())


def updates_of_distill(
    model: VideoModel, dataset: TrajectoryDataset, recipe: Recipe, folder: Path
) -> Seconds:
    """Median seconds of one update, from call to call of the monitor, metrics file and all.

    The last update also writes the checkpoint; a real run does so every `checkpoint_every`
    updates, and pays that share here.
    """
    marks: list[Seconds] = []
    distill(
        model,
        dataset,
        recipe,
        folder,
        monitor=lambda _progress: marks.append((time.perf_counter(), time.process_time())),
    )
    result = []
    for clock in (0, 1):
        took = [b[clock] - a[clock] for a, b in zip(marks, marks[1:], strict=False)]
        usual = statistics.median(took[:-1])
        result.append(usual + max(0.0, took[-1] - usual) / recipe.checkpoint_every)
    return result[0], result[1]


class PlainTraining:
    """Eq. 6 with LoRA as one would write it by hand, everything in memory."""

    def __init__(self, model: VideoModel, dataset: TrajectoryDataset, recipe: Recipe) -> None:
        info = dataset.info
        self.recipe, self.m = recipe, recipe.student_steps
        self.times: Times = tuple(info.time_grid[i] for i in key_indices(5, self.m))
        self.latents = dataset.load_all(dataset.ids(), range(self.m + 1)).to(model.device)
        conds = [dataset.prompt(dataset.read(id).prompt_id).condition for id in dataset.ids()]
        self.inputs = network_inputs(model, Condition.cat(conds))
        size = (info.frames, info.height, info.width)
        known = (model.family.name, model.fingerprint, self.times, GUIDANCE)
        student_info = StudentInfo(*known, recipe.lora, model.latent_spec, *size)
        self.module = Student.create(model, student_info).model.module
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, recipe.lr, recipe.betas, weight_decay=recipe.weight_decay
        )
        self.step = 0

    def update_seconds(self) -> Seconds:
        took = [timed(self.update) for _ in range(self.recipe.train_steps - 1)]
        return statistics.median(w for w, _ in took), statistics.median(c for _, c in took)

    def update(self) -> None:
        i = self.step % self.m
        rows = torch.randperm(len(self.latents))[: self.recipe.batch_size]
        x, nearer = self.latents[rows, i], self.latents[rows, i + 1]
        t, t_next = self.times[i], self.times[i + 1]
        v = self.module(
            hidden_states=x,
            timestep=torch.full((len(x),), t * 1000, device=x.device),
            **{name: value[rows] for name, value in self.inputs.items()},
            return_dict=False,
        )[0]
        F.mse_loss(v.float(), (nearer - x) / (t_next - t)).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1


IMPORT = """
import asyncio, importlib.util, json, sys, time
server, pack = sys.argv[1:3]
sys.path.insert(0, server)
sys.argv = ["main.py"]
from comfy.cli_args import args
args.cpu = True
import folder_paths, torch
import comfy.model_management, comfy.utils, nodes
from comfy_api.latest import io
from torch.utils._python_dispatch import TorchDispatchMode

class Count(TorchDispatchMode):
    calls = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        Count.calls += 1
        return func(*args, **(kwargs or {}))

def load():
    spec = importlib.util.spec_from_file_location(
        "custom_nodes_accvideo", pack + "/__init__.py", submodule_search_locations=[pack])
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    async def nodes():
        extension = await module.comfy_entrypoint()
        await extension.on_load()
        return await extension.get_node_list()
    return [node.GET_SCHEMA() for node in asyncio.run(nodes())]

heavy = {"diffusers", "transformers", "peft", "av", "matplotlib"} - set(sys.modules)
start = time.perf_counter()
with Count():
    schemas = load()
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "torch_calls": Count.calls, "nodes": len(schemas),
                  "heavy": sorted(heavy & set(sys.modules))}))
"""


def bench_import(repeats: int) -> list[Row]:
    """Load the pack in a fresh interpreter that has already loaded what ComfyUI loads first."""
    from scripts.comfyui.server import ServerError, server_folder

    try:
        server = server_folder()
    except ServerError as error:
        logging.warning("import: skipped (%s)", error)
        return []
    command = [sys.executable, "-c", IMPORT, str(server), str(ROOT)]
    found = []
    for _ in range(repeats):
        done = subprocess.run(command, capture_output=True, text=True, cwd=server)
        if done.returncode:
            raise RuntimeError(f"the pack did not load:\n{done.stderr}")
        found.append(json.loads(done.stdout.splitlines()[-1]))
    seconds = statistics.median(run["seconds"] for run in found)
    return [
        Row(f"import of {found[0]['nodes']} nodes, s", seconds, None, seconds, 1.0),
        Row("torch calls while importing", 0, None, found[0]["torch_calls"], 0),
        Row("heavy libraries imported", 0, None, len(found[0]["heavy"]), 0),
    ]


HEADER = f"{'':30}{'ours s':>9}{'plain s':>9}{'figure':>8}{'(CPU)':>8}{'limit':>7}"


def line(row: Row) -> str:
    """A row of the printed table."""
    plain = "" if row.plain is None else f"{row.plain:.4f}"
    cpu = "" if row.cpu_figure is None else f"{row.cpu_figure:.3f}"
    mark = "" if row.passed else "  over the limit"
    figures = f"{row.ours:9.4f}{plain:>9}{row.figure:8.3f}{cpu:>8}{row.limit:7.2f}"
    return f"{row.name:30}{figures}{mark}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9, help="pairs per ratio")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads of torch (default: torch's own)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench.json")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    model = make_model(options.device)
    benches: list[Callable[[], list[Row]]] = [
        lambda: bench_import(3),
        lambda: [bench_sampling(model, 3 * options.repeats)],
        lambda: [bench_recording(model, options.repeats)],
        lambda: [bench_training(model, options.repeats)],
    ]
    print(HEADER, flush=True)
    rows: list[Row] = []
    for bench in benches:
        for row in bench():
            print(line(row), flush=True)
            rows.append(row)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {"device": options.device, "threads": torch.get_num_threads()}
    report = {**settings, "torch": torch.__version__, "rows": [asdict(row) for row in rows]}
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
