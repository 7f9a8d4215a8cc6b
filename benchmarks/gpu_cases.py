"""Models in their released shapes with random weights, made on the device they run on.

Nothing is read from disk or fetched. Text encoders have the released sizes too; the tokenizer's few
words do not matter to them. `TINY` has the same models at a size that shows that everything works.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from accvideo_core.conditioning import Condition
from accvideo_core.latents import LatentSpec, seeded_noise
from accvideo_core.models import FAMILIES, Family, VideoModel
from accvideo_core.models.building import empty
from accvideo_core.models.pipeline_folder import diffusers_class
from accvideo_core.models.tiny import tokenizer
from accvideo_core.models.tiny_decoder import Published, TinyDecoder, TinyNetwork
from accvideo_core.sampling import SamplePlan

WORDS = tuple("a the cat dog walks runs over under slowly quickly street river light wide".split())
PROMPT = " ".join(WORDS * 4)
"""As long as prompts that are written for these models."""
IMAGE_TOKENS = 257
"""Of CLIP ViT-H."""


@dataclass(frozen=True)
class Case:
    """A released network, and the clip that is sampled with it."""

    name: str
    family_name: str
    config: dict[str, Any]
    plan: SamplePlan
    text: dict[str, dict[str, Any]] = field(repr=False)
    """Name of a text encoder in the pipeline -> its configuration."""
    vae: dict[str, Any] = field(default_factory=dict, repr=False)
    tiny_widths: tuple[int, int, int, int] = (256, 128, 64, 64)
    steps: int = 5
    """Of a student."""

    @property
    def family(self) -> Family:
        return FAMILIES[self.family_name]

    @property
    def label(self) -> str:
        plan = self.plan
        return f"{self.name} {plan.height} x {plan.width} x {plan.frames}"

    def module(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The network."""
        cls = diffusers_class(self.family.transformer_class)
        return random_network(cls, self.config, device, dtype)

    def spec(self, module: Any, vae: Any) -> LatentSpec:
        return self.family.latent_spec(module.config, vae.config)

    def shape(self, spec: LatentSpec) -> tuple[int, int, int, int]:
        """[C, T, H, W] of the latents."""
        return spec.shape(self.plan.frames, self.plan.height, self.plan.width)

    def vae_module(self, device: torch.device, dtype: torch.dtype) -> Any:
        from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLWan

        hunyuan = self.family.name.startswith("hunyuan")
        cls: Any = AutoencoderKLHunyuanVideo if hunyuan else AutoencoderKLWan
        with torch.device(device):
            return cls(**self.vae).to(dtype).eval().requires_grad_(False)


@torch.no_grad()
def random_network(
    cls: type, config: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """A network of diffusers that never exists in float32 or anywhere but on the device."""
    module = empty(cls, config)
    # Tables of positions are real already and stay as they are.
    tables = {name: x.to(device) for name, x in module.named_buffers() if not x.is_meta}
    generator = torch.Generator(device).manual_seed(0)
    for name, p in list(module.named_parameters()):
        scale = 0.1 if p.dim() < 2 else p[0].numel() ** -0.5
        made = torch.empty(p.shape, device=device, dtype=dtype)
        made.normal_(0, scale, generator=generator)
        _put(module, name, nn.Parameter(made, requires_grad=False))
    for name, x in tables.items():
        _put(module, name, x)
    return module.eval()


def _put(module: nn.Module, name: str, x: Tensor) -> None:
    owner, _, last = name.rpartition(".")
    setattr(module.get_submodule(owner), last, x)


def text_encoders(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """By their names in the pipeline, an image's among them, with what prepares their inputs."""
    import transformers as t

    kinds: dict[str, tuple[Any, Any]] = {
        "llama": (t.LlamaModel, t.LlamaConfig),
        "clip_text_model": (t.CLIPTextModel, t.CLIPTextConfig),
        "clip_vision_model": (t.CLIPVisionModel, t.CLIPVisionConfig),
        "umt5": (t.UMT5EncoderModel, t.UMT5Config),
    }
    made: dict[str, Any] = {}
    for name, config in case.text.items():
        model, settings = kinds[config["kind"]]
        given = {key: value for key, value in config.items() if key != "kind"}
        with torch.device(device):
            module = model(settings(**given))
        made[name] = module.to(dtype).eval().requires_grad_(False)
        if name == "image_encoder":
            size = {"height": config["image_size"], "width": config["image_size"]}
            made["image_processor"] = t.CLIPImageProcessor(size=size, crop_size=size)
        else:
            made[name.replace("text_encoder", "tokenizer")] = tokenizer(WORDS)
    return made


def pipeline(case: Case, module: Any, vae: Any, texts: dict[str, Any]) -> Any:
    """diffusers' own, with its own scheduler."""
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    hunyuan = case.family.name.startswith("hunyuan")
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=case.family.shift)
    if not hunyuan:
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=case.family.shift
        )
    parts = {**texts, "transformer": module, "vae": vae, "scheduler": scheduler}
    made: Any = diffusers_class(case.family.pipeline_class)(**parts)
    made.set_progress_bar_config(disable=True)
    return made


def image_inputs(case: Case, spec: LatentSpec) -> dict[str, Tensor]:
    """Fields of a condition on an image, where the family takes one."""
    if case.family.encode_image is None:
        return {}
    channels = case.config["in_channels"] - spec.channels
    image = seeded_noise((1, channels, *case.shape(spec)[1:]), "image")
    return {
        "image": image,
        "image_tokens": seeded_noise((1, IMAGE_TOKENS, case.config["image_dim"]), "clip"),
    }


def tiny_decoder(case: Case, model: VideoModel) -> TinyDecoder:
    """TAEHV's network at its published widths."""
    a, b, c, d = case.tiny_widths
    shapes = {
        "decoder.1.weight": (a, model.latent_spec.channels, 3, 3),
        "decoder.7.conv.weight": (a, a, 1, 1),
        "decoder.8.weight": (b, a, 3, 3),
        "decoder.13.conv.weight": (2 * b, b, 1, 1),
        "decoder.14.weight": (c, b, 3, 3),
        "decoder.19.conv.weight": (2 * c, c, 1, 1),
        "decoder.20.weight": (d, c, 3, 3),
        "decoder.22.weight": (3, d, 3, 3),
    }
    with torch.device(model.device):
        module = TinyNetwork(shapes).to(model.dtype)
    return TinyDecoder(module, model.latent_spec, Published("", ()))


def conditions(
    case: Case, pipe: Any, spec: LatentSpec, device: torch.device
) -> tuple[Condition, Condition]:
    """What the text encoders say about a prompt, with an image where there is one, and about a
    negative prompt.
    """
    encode, dtype = case.family.encode, pipe.transformer.dtype
    text, negative = (encode(pipe, [words], device) for words in (PROMPT, WORDS[0]))
    whole = Condition(**{**text.with_guidance(case.family.guidance).tensors(),
                         **image_inputs(case, spec)})  # fmt: skip
    return whole.to(device, dtype), negative.to(device, dtype)


def pipeline_inputs(case: Case, prompt: str, guidance: bool) -> dict[str, Any]:
    """What diffusers' pipeline is called with; a student asks for no classifier-free guidance."""
    if case.family.cfg is None:
        return {"prompt": prompt}
    given: dict[str, Any] = {"prompt": prompt}
    given["guidance_scale"] = case.family.cfg.scale if guidance else 1.0
    if case.family.encode_image is not None:
        from PIL import Image

        given["image"] = Image.new("RGB", (case.plan.width, case.plan.height))
    return given


# Released sizes -------------------------------------------------------------------------------

_LLAMA = {
    "kind": "llama",
    "vocab_size": 128320,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "pad_token_id": 0,
}
_CLIP = {
    "kind": "clip_text_model",
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "eos_token_id": 0,
}
_UMT5 = {
    "kind": "umt5",
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "pad_token_id": 0,
}
_VISION = {
    "kind": "clip_vision_model",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
}
_HUNYUAN = {"text_encoder": _LLAMA, "text_encoder_2": _CLIP}
_WAN = {"text_encoder": _UMT5}
_WAN_IMAGE = {**_WAN, "image_encoder": _VISION}
_WAN_SMALL = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
_WAN_I2V = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
_P544, _P720 = SamplePlan(93, 544, 960), SamplePlan(129, 720, 1280)
_W480, _W720 = SamplePlan(81, 480, 832), SamplePlan(81, 720, 1280)

# diffusers' default configurations are those of HunyuanVideo and of Wan 14B. The order is that of
# importance: what a call has no time for comes last.
CASES = (
    Case("HunyuanVideo 13B", "hunyuan_video", {}, _P720, _HUNYUAN),
    Case("Wan I2V 14B", "wan_i2v", _WAN_I2V, _W480, _WAN_IMAGE),
    Case("HunyuanVideo 13B", "hunyuan_video", {}, _P544, _HUNYUAN),
    Case("Wan 14B", "wan_t2v", {}, _W480, _WAN),
    Case("Wan 1.3B", "wan_t2v", _WAN_SMALL, _W480, _WAN),
    Case("Wan 14B", "wan_t2v", {}, _W720, _WAN),
    Case("Wan 1.3B", "wan_t2v", _WAN_SMALL, _W720, _WAN),
)

# Tiny ones ------------------------------------------------------------------------------------

_TINY_TEXT = {
    "text_encoder": {**_LLAMA, "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32,
                     "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2},
    "text_encoder_2": {**_CLIP, "vocab_size": 64, "hidden_size": 24, "intermediate_size": 24,
                       "num_hidden_layers": 1, "num_attention_heads": 2},
}  # fmt: skip
_TINY_UMT5 = {
    "text_encoder": {**_UMT5, "vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 32,
                     "num_layers": 1, "num_heads": 2},
}  # fmt: skip
_TINY_IMAGE = {
    **_TINY_UMT5,
    "image_encoder": {**_VISION, "hidden_size": 12, "intermediate_size": 12, "image_size": 32,
                      "num_hidden_layers": 2, "num_attention_heads": 2},
}  # fmt: skip
_TINY_HUNYUAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "rope_axes_dim": (4, 6, 6),
    "text_embed_dim": 32,
    "pooled_projection_dim": 24,
}
_TINY_WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "freq_dim": 16,
    "text_dim": 32,
}
_TINY_HUNYUAN_VAE = {
    "block_out_channels": (8, 8, 8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 1,
}
_TINY_WAN_VAE = {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
_SMALL, _FEW = SamplePlan(9, 32, 32), (8, 8, 8, 8)
_I2V = {"in_channels": 36, "image_dim": 12, "added_kv_proj_dim": 32}

TINY = (
    Case("HunyuanVideo tiny", "hunyuan_video", _TINY_HUNYUAN, _SMALL, _TINY_TEXT,
         _TINY_HUNYUAN_VAE, _FEW),
    Case("Wan I2V tiny", "wan_i2v", {**_TINY_WAN, **_I2V}, _SMALL, _TINY_IMAGE, _TINY_WAN_VAE,
         _FEW),
    Case("Wan tiny", "wan_t2v", _TINY_WAN, _SMALL, _TINY_UMT5, _TINY_WAN_VAE, _FEW),
)  # fmt: skip
