"""Networks of the Wan family with random weights, small enough for a CPU, and data for them.

Shapes: B batch, m student steps, C channels, T latent frames, H, W latent size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

from accvideo_core.conditioning import Condition, Prompt
from accvideo_core.distill.batch import KeyBatch
from accvideo_core.distill.recipes import Recipe
from accvideo_core.distill.student import LoraSpec
from accvideo_core.flow import key_indices
from accvideo_core.guidance import Cfg
from accvideo_core.latents import seeded_noise
from accvideo_core.models import FAMILIES, VideoModel
from accvideo_core.trajectories.record import RecordSpec, record
from accvideo_core.trajectories.store import TrajectoryDataset

TEXT_WIDTH, TOKENS, CHANNELS = 64, 16, 16
TEACHER_STEPS = 20


@dataclass(frozen=True)
class Case:
    """A network and the batches it is trained with."""

    name: str
    heads: int
    head_dim: int
    ffn: int
    blocks: int
    frames: int
    pixels: int
    """Height and width of the clips."""
    batch: int
    rank: int

    @property
    def tokens(self) -> int:
        """Video tokens of a batch; strides 4 and 8, patches of 2 x 2."""
        return self.batch * ((self.frames - 1) // 4 + 1) * (self.pixels // 16) ** 2


CASES = {
    # Many weights and few tokens, as with 13B on one card with checkpointing: weights dominate.
    "weights": Case("weights", 8, 64, 2048, 12, frames=5, pixels=64, batch=1, rank=16),
    # Few weights and many tokens: what autograd keeps dominates.
    "activations": Case("activations", 4, 32, 256, 4, frames=9, pixels=96, batch=4, rank=16),
    # Shows that everything works, and no more.
    "tiny": Case("tiny", 2, 12, 40, 3, frames=5, pixels=32, batch=2, rank=4),
}


def make_model(case: Case) -> VideoModel:
    """The frozen teacher; the same weights in every process."""
    torch.manual_seed(0)
    module = WanTransformer3DModel(
        num_attention_heads=case.heads,
        attention_head_dim=case.head_dim,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=case.ffn,
        num_layers=case.blocks,
        rope_max_seq_len=64,
    )
    family = FAMILIES["wan_t2v"]
    spec = family.latent_spec(module.config, {})
    return VideoModel(module.eval().requires_grad_(False), family, spec, source="bench")


def make_dataset(case: Case, model: VideoModel, folder: Path) -> TrajectoryDataset:
    """Twice as many recorded trajectories as a batch holds."""
    count = 2 * case.batch
    text = seeded_noise((count, TOKENS, TEXT_WIDTH), "text")
    cond = Condition(text, mask=torch.ones(count, TOKENS, dtype=torch.bool))
    prompts = [Prompt.of(f"prompt {i}", cond.select(i)) for i in range(count)]
    spec = RecordSpec(case.frames, case.pixels, case.pixels, dtype="float32")
    spec = replace(
        spec, steps=TEACHER_STEPS, kept=TEACHER_STEPS, batch_size=case.batch, cfg=Cfg(1.0)
    )
    return record(model, prompts, spec, folder)


class Samples:
    """A dataset's states at the key times in memory, drawn from as a plain loop would."""

    def __init__(self, dataset: TrajectoryDataset, steps: int, device: torch.device) -> None:
        info, ids = dataset.info, dataset.ids()
        grid = info.time_grid
        self.times = tuple(grid[i] for i in key_indices(len(grid) - 1, steps))
        self.t = self.times[::-1]
        states = dataset.load_all(ids, [info.times.index(time) for time in self.t])
        self.latents = states.to(device).transpose(0, 1).float()
        conds = [dataset.prompt(dataset.read(id).prompt_id).condition for id in ids]
        self.cond = Condition.cat(conds).with_guidance(info.guidance).to(device)

    def draw(self, size: int) -> KeyBatch:
        """Random recorded samples and fresh noise."""
        rows = torch.randint(self.latents.shape[1], (size,))
        latents = self.latents[:, rows]
        cond = self.cond.select(rows.tolist())
        noise = torch.randn(latents.shape[1:], device=latents.device)
        return KeyBatch(latents, self.t, cond, noise, torch.rand(size))


def make_recipe(case: Case, **changes: object) -> Recipe:
    """LoRA, trajectory guidance and the adversarial term, five student steps."""
    recipe = Recipe(
        name="bench",
        adversarial=True,
        lora=LoraSpec(rank=case.rank),
        batch_size=case.batch,
        lr=1e-4,
        head_lr=1e-4,
        head_width=64,
        checkpoint_every=100,
    )
    return replace(recipe, **changes)  # type: ignore[arg-type]
