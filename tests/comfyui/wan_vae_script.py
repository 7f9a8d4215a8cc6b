"""Write a tiny random Wan 2.1 VAE under the release's names, made by ComfyUI's own class.

    python tests/comfyui/wan_vae_script.py <comfyui folder> <file>

In a process of its own, because ComfyUI's modules have names such as `nodes` and `utils`.
"""

from __future__ import annotations

import sys


def main(comfyui: str, file: str) -> None:
    sys.path[0] = comfyui
    from comfy.cli_args import args

    args.cpu = True
    import torch
    from comfy.ldm.wan.vae import WanVAE
    from safetensors.torch import save_file

    vae = WanVAE(
        dim=16,
        z_dim=16,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=2,
        attn_scales=[],
        temperal_downsample=[False, True, True],
        image_channels=3,
        conv_out_channels=3,
        dropout=0.0,
    )
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, x in vae.state_dict().items():
        noise = torch.randn(x.shape, generator=generator)
        if name.endswith("gamma"):
            state[name] = 1 + 0.1 * noise
        else:
            state[name] = noise * (x[0].numel() ** -0.5 if x.dim() > 1 else 0.1)
    save_file(state, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
