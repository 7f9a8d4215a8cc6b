"""Train the tiny transformer on latents of the PCA codec; no autoencoder is needed.

    torchrun --nproc-per-node 2 scripts/tiny_teacher/train_dit.py --steps 10000

Flow matching: x_t = (1 - t) x_0 + t eps, the network answers v = eps - x_0, and t is drawn from
shift(U, 2.5). Clips are rendered afresh for every step, from a seed made of the step and the rank,
so an interrupted run continues exactly when the same command is run again.

Shapes: B clips, latents [B, 16, 5, 8, 8], L = 12 text tokens.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import codec as codecs
from accvideo_core.evaluate import world
from accvideo_core.models import tiny
from checkpoint import Checkpoint
from optim import Muon, average_gradients, trapezoid

WORK = Path("build/tiny_teacher")
TOKENS = 12
SHIFT = 2.5
MUON_LR = 0.02
ADAM_LR = 1.5e-3
EMA = 0.9995

log = logging.getLogger("train_dit")


class PromptTable:
    """What the text encoders say about each of the 378 captions, computed once."""

    def __init__(self) -> None:
        pipeline: Any = tiny.build_pipeline(world.VOCABULARY)
        with torch.no_grad():
            embeds, pooled, mask = pipeline.encode_prompt(world.all_prompts())
        self.embeds, self.pooled = embeds[:, :TOKENS].clone(), pooled
        self.mask = mask[:, :TOKENS].float()
        self.specs = world.all_specs()


def draw_batch(
    prompts: PromptTable, codec: codecs.Codec, size: int, generator: torch.Generator
) -> tuple[dict[str, Tensor], Tensor]:
    """One batch of transformer inputs and the velocity it should answer."""
    index = torch.randint(len(prompts.specs), (size,), generator=generator)
    clean = codec.encode(world.render([prompts.specs[i] for i in index.tolist()], generator))
    noise = torch.randn(clean.shape, generator=generator)
    u = (torch.arange(size) + torch.rand(size, generator=generator)) / size  # stratified
    t = SHIFT * u / (1 + (SHIFT - 1) * u)
    mixed = torch.lerp(clean, noise, t.view(-1, 1, 1, 1, 1))
    guidance = (1 + 9 * torch.rand(size, generator=generator)) * 1000
    inputs = {
        "hidden_states": mixed,
        "timestep": t * 1000,
        "encoder_hidden_states": prompts.embeds[index],
        "encoder_attention_mask": prompts.mask[index],
        "pooled_projections": prompts.pooled[index],
        "guidance": guidance,
    }
    return inputs, noise - clean


def initialise(model: nn.Module, seed: int) -> None:
    """adaLN-zero: every block starts as the identity and the output as zero."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters():
        if "norm" in name and "linear" in name or name.startswith("proj_out"):
            nn.init.zeros_(parameter)


def optimisers(model: nn.Module) -> tuple[Muon, torch.optim.AdamW]:
    """Muon on the matrices of attention and feed-forward in the blocks, AdamW elsewhere."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        inside = "blocks" in name and ".norm" not in name and parameter.ndim == 2
        (matrices if inside else rest).append(parameter)
    return Muon(matrices, MUON_LR), torch.optim.AdamW(
        rest, ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0
    )


class Run(Checkpoint):
    """Networks and optimisers of a run, continued from its file where there is one."""

    def __init__(self, seed: int, path: Path) -> None:
        self.model = tiny.transformer()
        initialise(self.model, seed)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.optimisers = optimisers(self.model)
        muon, adam = self.optimisers
        super().__init__(path, {"model": self.model, "ema": self.ema, "muon": muon, "adam": adam})

    def set_rate(self, factor: float) -> None:
        for optimiser, rate in zip(self.optimisers, (MUON_LR, ADAM_LR), strict=True):
            for group in optimiser.param_groups:
                group["lr"] = rate * factor

    @torch.no_grad()
    def update(self) -> None:
        """One optimiser step, then the moving average of the weights."""
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.advance()
        decay = min(EMA, (1 + self.step) / (10 + self.step))
        old: list[Tensor] = list(self.ema.parameters())
        new: list[Tensor] = list(self.model.parameters())
        torch._foreach_lerp_(old, new, 1 - decay)


def train(options: argparse.Namespace, rank: int, ranks: int) -> None:
    codec = codecs.load_or_fit(WORK / "codec.safetensors")
    prompts = PromptTable()
    run = Run(options.seed, WORK / "dit.pt")
    parameters = list(run.model.parameters())
    forward = torch.compile(run.model, dynamic=False) if options.compile else run.model
    window: list[float] = []
    while run.step < options.steps:
        run.set_rate(trapezoid(run.step, options.steps))
        seed = (options.seed * 1_000_003 + run.step) * ranks + rank
        generator = torch.Generator().manual_seed(seed)
        inputs, target = draw_batch(prompts, codec, options.batch // ranks, generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
            answer = forward(**inputs, return_dict=False)[0]
        loss = F.mse_loss(answer.float(), target)
        loss.backward()
        average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        run.update()
        window.append(loss.item())
        if rank == 0 and run.step % 50 == 0:
            report(run, window)
            window = []
        if rank == 0:
            run.save_now_and_then()
    if rank == 0:
        run.save()


def report(run: Run, losses: list[float]) -> None:
    record = {
        "step": run.step,
        "loss": round(sum(losses) / len(losses), 4),
        "seconds": round(run.seconds, 1),
        "per_step": round(run.seconds / run.step, 3),
    }
    log.info("%s", record)
    with (WORK / "dit.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=48, help="over all processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    WORK.mkdir(parents=True, exist_ok=True)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    distributed = dist.is_initialized()
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    if rank == 0:
        codecs.load_or_fit(WORK / "codec.safetensors")
    if distributed:
        dist.barrier()
    train(options, rank, ranks)
    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
