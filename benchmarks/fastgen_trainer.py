"""FastGen's own training steps on our network and data, where FastGen lies in a folder.

FastGen (NVlabs, Apache-2.0) is imported from the folder it is given in and called as its tests call
it: `single_train_step`, backward, `optimizers_schedulers_step`. Its Wan wrapper is given our
network's configuration and weights. It needs packages of its own (attrs, omegaconf, loguru, ...).

Shapes: B batch, m student steps, C channels, T latent frames, H, W latent size; L text tokens.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from accvideo_core.models import VideoModel
from accvideo_core.models.wan import TEXT_TOKENS
from benchmarks.training_cases import Samples

STEPS = 4
"""Student steps: FastGen's knowledge distillation takes paths of exactly four states."""
LARGEST_TIME = 0.999
"""FastGen's flow models start there."""


class FastGenTraining:
    """Its knowledge distillation, or its LADD with an update of student and discriminator."""

    def __init__(
        self,
        method: str,
        folder: Path,
        model: VideoModel,
        samples: Samples,
        size: int,
        temp: Path,
    ) -> None:
        """
        Args:
            method: "kd" or "ladd".
            folder: of a checkout of FastGen.
            model: whose weights it starts from; they are copied.
            samples: recorded states at `STEPS` + 1 key times.
            size: of a batch.
            temp: where the network's configuration is left for FastGen to read.
        """
        config, cls = _config(method, folder, model, samples, temp)
        self.samples, self.size = samples, size
        self.model = cls(config)
        for name in ("net", "teacher"):
            if hasattr(self.model, name):
                getattr(self.model, name).transformer.load_state_dict(model.module.state_dict())
        self.model.on_train_begin()
        self.model.init_optimizers()
        self.rounds = 2 if method == "ladd" else 1
        self.iteration = 0

    def update(self) -> dict[str, float]:
        """One update of everything that is trained; its losses."""
        losses = {}
        for _ in range(self.rounds):
            self.model.optimizers_zero_grad(self.iteration)
            found, _ = self.model.single_train_step(self.data(), self.iteration)
            self.model.grad_scaler.scale(found["total_loss"]).backward()
            self.model.optimizers_schedulers_step(self.iteration)
            self.iteration += 1
            losses |= {name: float(x.detach()) for name, x in found.items()}
        return losses

    def data(self) -> dict[str, Tensor]:
        """A batch as FastGen's loaders give it; the path is [B, m, C, T, H, W] from noise on."""
        batch = self.samples.draw(self.size)
        # FastGen's own encoder fills texts up as ours does, which its network leaves to the caller.
        text = F.pad(batch.cond.text, (0, 0, 0, TEXT_TOKENS - batch.cond.text.shape[1]))
        return {
            "real": batch.latents[0],
            "path": batch.latents[1:].flip(0).transpose(0, 1).contiguous(),
            "condition": text,
            "neg_condition": torch.zeros_like(text),
        }


def _imported(folder: Path) -> Any:
    """Its parts that are needed, quiet. Ends the program where it is not there."""
    if not (folder / "fastgen" / "methods").is_dir():
        raise SystemExit(f"{folder} is no checkout of FastGen (it holds no fastgen/methods)")
    os.environ.setdefault("HF_HOME", str(folder))  # read, and not used without pretrained weights
    sys.path.append(str(folder))
    try:
        from fastgen.configs.config import BaseModelConfig
        from fastgen.configs.methods.config_ladd import ModelConfig as LADDConfig
        from fastgen.methods import KDModel, LADDModel
        from fastgen.networks.discriminators import Discriminator_VideoDiT
        from fastgen.networks.Wan.network import Wan
        from fastgen.utils import LazyCall
        from loguru import logger
    except ImportError as error:
        raise SystemExit(f"FastGen cannot be imported ({error}); install what it needs") from error
    logger.remove()
    return SimpleNamespace(
        methods={"kd": (BaseModelConfig, KDModel), "ladd": (LADDConfig, LADDModel)},
        call=LazyCall,
        wan=Wan,
        discriminator=Discriminator_VideoDiT,
    )


def _config(
    method: str, folder: Path, model: VideoModel, samples: Samples, temp: Path
) -> tuple[Any, type]:
    """FastGen's configuration with its settings for Wan, and the class of the method."""
    its = _imported(folder)
    make_config, cls = its.methods[method]
    config = make_config()
    folder = temp / "Wan2.1-bench"  # FastGen tells Wan's versions by the folder's name
    model.module.save_config(folder / "transformer")
    config.net = its.call(its.wan)(
        model_id_or_local_path=str(folder),
        load_pretrained=False,
        disable_grad_ckpt=True,
        enable_logvar_linear=False,
    )
    config.device, config.precision = str(model.device), "float32"
    config.enable_preprocessors = False
    config.input_shape = list(samples.latents.shape[2:])
    config.student_sample_steps = STEPS
    config.sample_t_cfg.t_list = [min(t, LARGEST_TIME) for t in samples.times]
    config.sample_t_cfg.time_dist_type = "shifted"
    config.sample_t_cfg.min_t, config.sample_t_cfg.max_t = 0.001, LARGEST_TIME
    if method == "kd":
        return config, cls
    width = model.module.config.num_attention_heads * model.module.config.attention_head_dim
    config.discriminator = its.call(its.discriminator)(
        feature_indices={model.num_blocks - 1},
        num_blocks=model.num_blocks,
        disc_type="dit_simple_conv3d",
        # Features reach it as pixels of patches: the width over 2 x 2.
        inner_dim=width // 4,
    )
    config.gan_use_same_t_noise, config.student_update_freq = True, 2
    return config, cls
