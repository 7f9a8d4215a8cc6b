"""A whole Stable Video Diffusion checkpoint in ComfyUI's own classes; prints what they compute.

    python tests/comfyui/svd_script.py <comfyui folder> <folder of a case>

case.safetensors holds a tiny checkpoint's UNet and VAE under the release's names, a question to the
UNet and latents. ComfyUI finds a model's sizes in a list of the releases', so they are given here.
"""

from __future__ import annotations

import json
import sys
from typing import Any

WIDTH, LEVELS, HEAD, TEXT, EMBED = 32, [1, 1, 1, 2], 16, 24, 16


def main(comfyui: str, folder: str) -> None:
    sys.path.insert(0, comfyui)
    sys.argv = [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    from safetensors.torch import load_file

    case = load_file(f"{folder}/case.safetensors")
    print(json.dumps({"unet": denoised(case), "vae": frames(case)}))


def within(case: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): x for name, x in case.items() if name.startswith(prefix)}


def denoised(case: dict[str, Any]) -> float:
    """How far ComfyUI's clean video is from ours, at the largest number."""
    import comfy.ops
    import torch
    from comfy.ldm.modules.diffusionmodules.openaimodel import Timestep, UNetModel
    from comfy.model_sampling import V_PREDICTION, ModelSamplingContinuousEDM

    network = UNetModel(
        image_size=32, in_channels=8, out_channels=4, model_channels=WIDTH,
        num_res_blocks=[1] * 4, channel_mult=LEVELS, transformer_depth=[1, 1, 1, 0],
        transformer_depth_output=[1] * 6 + [0] * 2, transformer_depth_middle=1,
        context_dim=TEXT, adm_in_channels=3 * EMBED, num_classes="sequential", num_heads=-1,
        num_head_channels=HEAD, use_spatial_transformer=True, use_linear_in_transformer=True,
        use_temporal_attention=True, use_temporal_resblock=True, video_kernel_size=[3, 1, 1],
        extra_ff_mix_layer=True, use_spatial_context=True, merge_strategy="learned_with_images",
        legacy=False, dtype=torch.float32, operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    network.load_state_dict(within(case, "model.diffusion_model."), strict=True)
    sampling = type("Sampling", (ModelSamplingContinuousEDM, V_PREDICTION), {})()
    x, sigma = case["x"], case["sigma"]
    told = torch.cat([Timestep(EMBED)(case["micro"][i : i + 1]) for i in range(3)]).flatten()
    with torch.no_grad():
        seen = torch.cat([sampling.calculate_input(sigma, x), case["image"]], dim=1)
        out = network.eval()(
            seen,
            sampling.timestep(sigma),
            context=case["text"],
            y=told.expand(len(x), -1),
            num_video_frames=len(x),
        )
        found = sampling.calculate_denoised(sigma, out, x)
    return float((found - case["denoised"]).abs().max())


def frames(case: dict[str, Any]) -> list[float]:
    """How far its latents and its frames are."""
    import torch
    from comfy.ldm.models.autoencoder import AutoencodingEngine

    sizes = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3,
             "ch": 32, "ch_mult": [1] * 4, "num_res_blocks": 2, "attn_resolutions": [],
             "dropout": 0.0}  # fmt: skip
    video = {**sizes, "video_kernel_size": [3, 1, 1], "alpha": 0.0}
    base = "comfy.ldm"
    vae = AutoencodingEngine(
        regularizer_config={"target": f"{base}.models.autoencoder.DiagonalGaussianRegularizer"},
        encoder_config={
            "target": f"{base}.modules.diffusionmodules.model.Encoder",
            "params": sizes,
        },
        decoder_config={"target": f"{base}.modules.temporal_ae.VideoDecoder", "params": video},
    )
    vae.load_state_dict(within(case, "first_stage_model."), strict=True)
    with torch.no_grad():
        vae.eval()
        mode = vae.encoder(case["pixels"])[:, :4]
        decoded = vae.decode(case["latents"])
    pairs = ((mode, case["mode"]), (decoded, case["decoded"]))
    return [float((found - expected).abs().max()) for found, expected in pairs]


if __name__ == "__main__":
    main(*sys.argv[1:])
